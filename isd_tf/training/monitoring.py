"""Callbacks that only watch: means, throughput, progress, the TensorBoard log."""

import contextlib
import math
import os
import shutil
import sys
import textwrap
import time

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from isd_tf.training import distribution, metrics
from isd_tf.training.errors import sentence


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


class Progress(keras.callbacks.Callback):
    """Shows how far an epoch is, its mean loss, and how long it has waited for data.

    In a terminal a bar that fits into 80 columns, elsewhere a line every so often. An epoch ends
    with a line about it, whose time left is that of the whole training, scoring included. Where no
    waiting is told, as in a finetuning, images a second stand in its place. (Keras' own bar shows
    every value, wraps, and then fills the screen.)

    Args:
        epochs: of the whole training.
        seconds: between lines where there is no terminal.
    """

    def __init__(self, epochs: int, seconds: float = 20.0):
        super().__init__()
        self.epochs = epochs
        self.seconds = seconds
        self._began = None

    def on_epoch_begin(self, epoch, logs=None):
        self._last = time.monotonic()
        if self._began is None:
            self._began, self._first_epoch = self._last, epoch
        self._bar, self._losses, self._executions = None, 0.0, 0
        if sys.stdout.isatty():
            # Left to Keras' bar, the mean would be the last step's loss at the end.
            shown_as_given = ["loss", "waiting %", "images/s"]
            self._bar = keras.utils.Progbar(
                self.params["steps"], width=10, stateful_metrics=shown_as_given
            )

    def on_train_batch_end(self, batch, logs=None):
        step, steps = batch + 1, self.params["steps"]
        rate, waiting = logs.get("images_per_second", 0.0), logs.get("waiting_share")
        self._losses, self._executions = self._losses + logs["loss"], self._executions + 1
        loss = self._losses / self._executions
        if self._bar:
            # One more has room. The time of a step is the bar's own.
            if waiting is not None:
                more = [("waiting %", 100 * waiting)]
            else:
                more = [("images/s", rate)] * ("images_per_second" in logs)
            self._bar.update(step, [("loss", loss), *more], finalize=step == steps)
        elif time.monotonic() - self._last >= self.seconds:
            self._last = time.monotonic()
            print(
                f"  step {step} of {steps}: loss {loss:.4f}, {rate:.0f} images/s"
                + (f", {waiting:.0%} waiting for data" if waiting is not None else ""),
                flush=True,
            )

    def on_epoch_end(self, epoch, logs=None):
        line = f"Epoch {epoch + 1}/{self.epochs}: {', '.join(_in_short(logs))}"
        done = epoch + 1 - self._first_epoch
        if epoch + 1 < self.epochs:
            seconds = (time.monotonic() - self._began) / done * (self.epochs - epoch - 1)
            line += f", {duration(seconds)} left"
        # One column less: some terminals begin a new line behind their last one.
        columns = shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else 100
        print(textwrap.fill(line, columns, subsequent_indent="  "), flush=True)


def duration(seconds: float) -> str:
    """Says a time in one or two units: 0.03 s, 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.2g} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def _in_short(logs):
    """What of an epoch's means stands in its line. metrics.jsonl has all."""
    yield f"loss {logs['loss']:.4g}"
    if "student_1nn" in logs:
        yield f"1-NN {logs['student_1nn']:.1%} (teacher {logs['teacher_1nn']:.1%})"
    if "held_out_accuracy" in logs:
        yield f"held-out accuracy {logs['held_out_accuracy']:.1%}"
        yield f"held-out loss {logs['held_out_loss']:.4g}"
    if "images_per_second" in logs:
        rate = logs["images_per_second"]
        yield f"{rate:.0f} images/s" if rate >= 100 else f"{rate:.3g} images/s"
    if "waiting_share" in logs:
        yield f"{logs['waiting_share']:.0%} waiting"


class Throughput(keras.callbacks.Callback):
    """Adds "images_per_second" and "waiting_share" to the logs, over the steps of this epoch.

    The share is that of the time in which a step waits for its batch: what faster reading would
    save. The first step of a call to `fit`, which compiles, is not counted.

    Args:
        global_batch_size: images a step.
    """

    def __init__(self, global_batch_size: int):
        super().__init__()
        self.global_batch_size = global_batch_size

    def on_train_begin(self, logs=None):
        self._uncompiled = True

    def on_epoch_begin(self, epoch, logs=None):
        self._start, self._first_step, self._step = time.monotonic(), 0, 0
        self._waited = 0.0

    def on_train_batch_end(self, batch, logs=None):
        steps, self._step = batch + 1 - self._step, batch + 1
        waited = steps * float(logs.pop("waiting_seconds", float("nan")))
        if self._uncompiled:
            self._uncompiled = False
            self._start, self._first_step = time.monotonic(), self._step
        else:
            self._waited += waited
            self._tell(logs)

    def on_epoch_end(self, epoch, logs=None):
        logs.pop("waiting_seconds", None)
        if self._step > self._first_step:
            self._tell(logs)

    def _tell(self, logs):
        seconds = max(time.monotonic() - self._start, 1e-9)
        logs["images_per_second"] = (
            (self._step - self._first_step) * self.global_batch_size / seconds
        )
        if not math.isnan(self._waited):
            logs["waiting_share"] = self._waited / seconds


class CheckReplicas(keras.callbacks.Callback):
    """Compares all replicas' copies of all variables after every call of the train function.

    For debugging: a replica that parts from the others raises no error of its own. BatchNorm's
    moving statistics are left out where they are each replica's own.

    Args:
        synchronized_batch_norm: whether they are shared instead.

    Raises:
        RuntimeError: naming the step and the variables that differ.
    """

    def __init__(self, synchronized_batch_norm: bool):
        super().__init__()
        self.synchronized_batch_norm = synchronized_batch_norm

    def on_train_batch_end(self, batch, logs=None):
        variables = [
            variable
            for variable in (*self.model.variables, *self.model.optimizer.variables)
            if self.synchronized_batch_norm
            or variable.path.split("/")[-1] not in ("moving_mean", "moving_variance")
        ]
        digests = distribution.replica_digests(self.model.distribute_strategy, variables)
        differ = (digests != digests[0]).any(axis=0)  # [V]
        if differ.any():
            paths = [v.path for v, other in zip(variables, differ, strict=True) if other]
            raise RuntimeError(
                f"All {len(digests)} replicas must hold the same values. Received after step "
                f"{int(self.model.step.numpy())}: {len(paths)} variables that differ, "
                f"{', '.join(paths[:3])} first. This is an error of the program, not of its flags."
            )


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

    def on_epoch_begin(self, epoch, logs=None):
        self._complained = False

    def on_train_batch_end(self, batch, logs=None):
        if metrics.is_due(self.model, self.every_steps):
            with self._outliving_a_full_disk():
                self._write("step", logs, int(self.model.step.numpy()))

    def on_epoch_end(self, epoch, logs=None):
        with self._outliving_a_full_disk():
            self._write("epoch", logs, int(self.model.step.numpy()))
            self._writer.flush()

    def on_train_end(self, logs=None):
        with self._outliving_a_full_disk():
            self._writer.close()

    def _write(self, prefix, logs, step):
        with self._writer.as_default(step):
            for name, value in logs.items():
                # tf.summary.scalar is a function of the tensorboard package; this is TensorFlow's.
                tf.summary.write(f"{prefix}/{name}", np.float32(value), metadata=_scalar(name))

    @contextlib.contextmanager
    def _outliving_a_full_disk(self):
        # A run is worth more than its curves: what a full disk does to it, the checkpoints decide.
        try:
            yield
        except tf.errors.OpError as error:
            if not self._complained:
                logging.error("The log %s cannot be written. %s", self.directory, sentence(error))
            self._complained = True


def _scalar(name):
    return tf.compat.v1.SummaryMetadata(
        summary_description=metrics.MEANINGS.get(name, ""),
        plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars"),
    )
