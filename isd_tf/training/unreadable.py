"""One limit of unreadable images for all workers, of which each meets its own."""

import os
from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf

from isd_tf.training import cluster


class CountUnreadable(keras.callbacks.Callback):
    """Counts the unreadable images that all workers have met, and ends all after the same step.

    Stands before all other callbacks: no step that met too many is saved or reported.

    Args:
        strategy: of all workers.
        met_before: place in the order of the training to the names of the unreadable images that
            this worker has met before it.
        refusal: how many there are, with some of their names, to why these are too many; empty
            where they are not.
        global_batch_size: places that a step takes.

    Raises:
        ValueError: on every worker, when together they have met too many.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        met_before: Callable[[int], list[str]],
        refusal: Callable[[int, Iterable[str]], str],
        global_batch_size: int,
    ):
        super().__init__()
        self.strategy = strategy
        self.met_before = met_before
        self.refusal = refusal
        self.global_batch_size = global_batch_size
        self._mine, self._everyones = set(), set()

    @property
    def count(self) -> int:
        """Images that could not be read up to this step, each counted once."""
        return len(self._everyones)

    def on_train_batch_end(self, batch, logs=None):
        names = self.met_before(int(self.model.step.numpy()) * self.global_batch_size)
        new = [cluster.digest(os.fsencode(name)) for name in set(names) - self._mine]
        self._mine |= set(names)
        most = int(cluster.gather_from_workers(self.strategy, len(new)).max())
        if not most:
            return
        padded = np.resize(np.int64(new or [0]), most)
        everyones_new = cluster.gather_from_workers(self.strategy, padded)
        self._everyones |= {*map(int, everyones_new.ravel())} - {0}
        if self.refusal(self.count, names):
            # No name holds a zero byte.
            told = cluster.gather_messages(self.strategy, "\0".join(sorted(names)[:3]))
            everyones = {name for text in told for name in text.split("\0") if name}
            cluster.linger(self.strategy)
            raise ValueError(self.refusal(self.count, everyones))
