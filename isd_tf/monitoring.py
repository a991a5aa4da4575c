"""Callbacks that only watch: throughput and the TensorBoard log."""

import os
import time

import keras
import numpy as np
import tensorflow as tf


class Throughput(keras.callbacks.Callback):
    """Adds "images_per_second" to the logs, over the steps of the present epoch.

    The first step of a call to `fit`, which compiles, is not counted.

    Args:
        global_batch_size: images a step.
    """

    def __init__(self, global_batch_size: int):
        super().__init__()
        self.global_batch_size = global_batch_size

    def on_train_begin(self, logs=None):
        self._uncompiled = True

    def on_epoch_begin(self, epoch, logs=None):
        self._start, self._steps = time.monotonic(), 0

    def on_train_batch_end(self, batch, logs=None):
        if self._uncompiled:
            self._uncompiled = False
            self._start = time.monotonic()
            return
        self._steps += 1
        logs["images_per_second"] = self._rate()

    def on_epoch_end(self, epoch, logs=None):
        if self._steps:
            logs["images_per_second"] = self._rate()

    def _rate(self):
        return self._steps * self.global_batch_size / max(time.monotonic() - self._start, 1e-9)


class TensorBoardLog(keras.callbacks.Callback):
    """Writes the logs for TensorBoard, by optimizer step, also across continued runs.

    Needs no tensorboard package to write; `pip install tensorboard` to look.

    Args:
        directory: of the event files.
        every_steps: how often the values of a step are written; those of an epoch always are,
            under epoch/.
    """

    def __init__(self, directory: str | os.PathLike, every_steps: int):
        super().__init__()
        self.directory = str(directory)
        self.every_steps = every_steps

    def on_train_begin(self, logs=None):
        self._writer = tf.summary.create_file_writer(self.directory)

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations.numpy())
        if step % self.every_steps == 0:
            self._write("step", logs, step)

    def on_epoch_end(self, epoch, logs=None):
        self._write("epoch", logs, int(self.model.optimizer.iterations.numpy()))
        self._writer.flush()

    def on_train_end(self, logs=None):
        self._writer.close()

    def _write(self, prefix, logs, step):
        with self._writer.as_default(step):
            for name, value in logs.items():
                # tf.summary.scalar is a function of the tensorboard package; this is TensorFlow's.
                tf.summary.write(f"{prefix}/{name}", np.float32(value), metadata=_SCALARS)


_SCALARS = tf.compat.v1.SummaryMetadata(
    plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars")
)
