"""Callbacks that only watch: means, throughput, lines of progress, the TensorBoard log."""

import os
import time

import keras
import numpy as np
import tensorflow as tf


class EpochMeans(keras.callbacks.Callback):
    """Makes an epoch's logs the means over its steps, where Keras would show the last step's.

    In an epoch that was continued, over the steps since. Stands before the other callbacks.
    """

    def on_epoch_begin(self, epoch, logs=None):
        self._sums, self._steps = {}, 0

    def on_train_batch_end(self, batch, logs=None):
        self._steps += 1
        for name, value in logs.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def on_epoch_end(self, epoch, logs=None):
        logs.update({name: total / self._steps for name, total in self._sums.items()})


class ProgressLines(keras.callbacks.Callback):
    """Prints a line every minute, for output that is not a terminal's and has no progress bar."""

    def __init__(self, seconds: float = 60.0):
        super().__init__()
        self.seconds = seconds

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._last = epoch, time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        if time.monotonic() - self._last >= self.seconds:
            self._last = time.monotonic()
            values = ", ".join(f"{name} {value:.4g}" for name, value in logs.items())
            steps = self.params["steps"]
            print(f"epoch {self._epoch + 1}, step {batch + 1} of {steps}: {values}", flush=True)


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
