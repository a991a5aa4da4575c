"""How many pairs of crops a training can take over from the processes that make them.

    PYTHONPATH=. python benchmarks/handover.py [PROCESSES] [MILLISECONDS] [BATCHES]

For each image a process sleeps as long as it would compute, 1.5 milliseconds, and hands two black
crops of 224x224 over: so a machine of few cores shows what a host of 16, or of PROCESSES, would
come to if nothing else were in the way of so many. Prints the pairs a second, the median of five
rounds of BATCHES (least to most), the most that the sleep allows, and the processors' time that a
pair took.

Only what the training's own process takes is not shared out among processes.
"""

import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np

SIZE, BATCH, ROUNDS = 224, 256, 5
# Of a core, about what an image takes: docs/performance.md, section 2.
MILLISECONDS = 1.5


class Sleep(NamedTuple):
    """What a process does instead of two crops."""

    seconds: float

    def __call__(self, image, draws):
        time.sleep(self.seconds)
        return [np.zeros([SIZE, SIZE, 3], np.uint8)] * 2


def main(processes=16, milliseconds=MILLISECONDS, batches=60):
    import handover  # Where the processes find `Sleep`; they import no TensorFlow.
    import joblib
    import psutil
    import race
    import tensorflow as tf
    from PIL import Image

    joblib.cpu_count = lambda: int(processes)
    import isd_tf
    from isd_tf.views import python_crops

    def processor_seconds():
        """Of this process, and of it and those that make the crops."""
        own = psutil.Process()
        seconds = [sum(x.cpu_times()[:2]) for x in (own, *own.children())]
        return np.array([seconds[0], sum(seconds)])

    python_crops.RandomCropsOfImage = lambda *_: handover.Sleep(float(milliseconds) / 1000)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "small.png")
        Image.new("RGB", (1, 1)).save(path)
        images = isd_tf.datasets.FileDataset("small", (str(path),) * 10_000)
        pipeline = isd_tf.pretraining_batches(images, ("weak", "strong"), SIZE, BATCH, seed=0)
        options = tf.data.Options()
        options.threading.private_threadpool_size = int(processes)  # As many as it has cores.
        made = iter(pipeline.with_options(options))
        rates, costs = [], []
        for _ in range(ROUNDS):
            before = processor_seconds()
            pairs, seconds = race.timed(lambda: next(made), BATCH, int(batches))
            rates.append(pairs / seconds)
            costs.append(1000 * (processor_seconds() - before) / (pairs + BATCH))
    allowed = 1000 * int(processes) / float(milliseconds)
    own, whole = np.median(costs, axis=0)
    print(
        f"{statistics.median(rates):.0f} pairs/s ({min(rates):.0f} to {max(rates):.0f}) of at most "
        f"{allowed:.0f}; {whole:.2f} core-milliseconds a pair, {own:.2f} of them the training's own"
    )


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main(*sys.argv[1:])
