import threading
import types

import numpy as np
import pytest

from isd_tf.data.decoding import Unreadable
from isd_tf.training import unreadable


class Workers:
    """Two workers as threads of this process: what `cluster` is to the callback."""

    def __init__(self):
        self.told, self.barrier = [None, None], threading.Barrier(2)

    def gather(self, worker, value):
        self.told[worker] = value
        self.barrier.wait(5)
        everyones = list(self.told)
        self.barrier.wait(5)
        return everyones

    def gather_from_workers(self, worker, value):
        return np.array(self.gather(worker, value))

    gather_messages = gather
    digest = staticmethod(hash)

    def linger(self, worker):
        pass


def train(met, limit):
    """Steps of 4 images, of 100; `met` has for each worker names by place. Returns what ended."""
    ends = [None, None]

    def work(worker):
        counter = Unreadable(100, limit)
        for name, place in met[worker]:
            counter.add(name, "broken", place)
        callback = unreadable.CountUnreadable(worker, counter.met_before, counter.refusal, 4)
        try:
            for step in range(1, 26):
                now = types.SimpleNamespace(numpy=lambda step=step: step)
                callback.set_model(types.SimpleNamespace(step=now))
                callback.on_train_batch_end(step - 1)
            ends[worker] = (25, callback.count)
        except ValueError as error:
            ends[worker] = (step, str(error).split("Received: ")[1].split(". ")[0])

    threads = [threading.Thread(target=work, args=[worker]) for worker in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


@pytest.fixture(autouse=True)
def workers(monkeypatch):
    monkeypatch.setattr(unreadable, "cluster", Workers())


def test_all_workers_end_after_the_step_that_meets_too_many_together():
    met = [("a.jpg", 2), ("d.jpg", 90)], [("c.jpg", 17), ("b.jpg", 12), ("a.jpg", 30)]
    # The places 2, 12 and 17: the third is of step 17 // 4 + 1.
    assert train(met, 0.02) == [(5, "3 of 100, for example a.jpg, b.jpg, c.jpg")] * 2


def test_an_image_that_two_workers_meet_is_counted_once():
    met = [("a.jpg", 2), ("b.jpg", 50)], [("b.jpg", 8), ("a.jpg", 60)]
    assert train(met, 0.02) == [(25, 2)] * 2
