"""Checkpoints that a killed run continues from, exactly.

A checkpoint holds student, teacher, heads, queue, pointer, labels, optimizer and step. Order of
images and views are functions of (seed, step), so nothing else is state.
"""

import os
import pathlib
import shutil
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from absl import logging


class Checkpoints:
    """The checkpoints of a directory: one folder a step, the newest ones kept.

    Args:
        directory: made if missing.
        model: a compiled model, whose variables all exist.
        keep: how many of the newest to keep.
    """

    def __init__(self, directory: str | os.PathLike, model: keras.Model, keep: int = 2):
        if keep < 1:
            raise ValueError(f"At least one checkpoint must be kept. Received: keep={keep}.")
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.model = model
        self.keep = keep
        self._checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return int(self.model.optimizer.iterations.numpy())

    def save(self) -> None:
        """Writes the present step beside the others, and then gives it its name.

        Raises:
            FloatingPointError: when a weight is not finite; the former checkpoints stay.
        """
        for variable in self.model.variables:
            if not np.isfinite(variable.numpy()).all():
                raise FloatingPointError(
                    f"The weight {variable.path} is no longer finite at step {self.step}. "
                    f"{self.advice()}"
                )
        place = self._place(self.step)
        if place.exists():
            return
        unfinished = self.directory / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        self._checkpoint.write(str(unfinished / "state"))
        unfinished.rename(place)
        for old in self._steps()[self.keep :]:
            shutil.rmtree(self._place(old))

    def restore_newest(self) -> int:
        """Restores the newest checkpoint that can be read whole, and returns its step.

        A checkpoint that cannot be read is reported and the one before it taken. Returns 0 and
        changes nothing where there is none.

        Raises:
            ValueError: when a checkpoint belongs to another model, or none of those there can be
                read.
        """
        for step in self._steps():
            path = str(self._place(step) / "state")
            problem = _read_problem(path)
            if problem:
                # Out of the way, so that this step can be saved again.
                damaged = self.directory / f"damaged-{step:08d}"
                shutil.rmtree(damaged, ignore_errors=True)
                self._place(step).rename(damaged)
                logging.warning(
                    "The checkpoint of step %d cannot be read (%s) and is now %s; taking the one "
                    "before.",
                    step,
                    problem,
                    damaged,
                )
                continue
            try:
                self._checkpoint.read(path).assert_consumed()
            except (ValueError, AssertionError) as error:
                raise ValueError(
                    f"The checkpoint {path} belongs to another model: "
                    f"{str(error).splitlines()[0]} Use the flags that it was written with, or "
                    "another --workdir."
                ) from error
            return step
        if self.exist:
            raise ValueError(
                f"None of the checkpoints in {self.directory} can be read. Restore one from a "
                "copy, or use another --workdir to start anew."
            )
        return 0

    @property
    def newest_step(self) -> int:
        """The step to continue from; 0 where there is none."""
        return max(self._steps(), default=0)

    @property
    def exist(self) -> bool:
        """Whether a run has saved any, damaged ones included."""
        return any(self.directory.glob("step-*")) or any(self.directory.glob("damaged-*"))

    def advice(self) -> str:
        """Where the last good checkpoint is, and what to do when values are no longer finite."""
        steps = self._steps()
        newest = f"The last good checkpoint is {self._place(steps[0])}." if steps else ""
        return (
            f"{newest} The same flags would end in the same way: lower --learning_rate or raise "
            "the temperatures, in another --workdir."
        )

    def _place(self, step):
        return self.directory / f"step-{step:08d}"

    def _steps(self):
        """Steps of the checkpoints, newest first."""
        names = [path.name.removeprefix("step-") for path in self.directory.glob("step-*")]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)


class SaveCheckpoints(keras.callbacks.Callback):
    """Saves every few steps and at the end of every epoch. Stands behind other evaluations.

    Args:
        checkpoints: where.
        every_steps: how often inside an epoch; 0 saves at the end of epochs only.
    """

    def __init__(self, checkpoints: Checkpoints, every_steps: int):
        super().__init__()
        self.checkpoints = checkpoints
        self.every_steps = every_steps

    def on_train_batch_end(self, batch, logs=None):
        # The last step is saved when the epoch's evaluations are done, or they could be lost.
        is_last = batch + 1 == self.params["steps"]
        if self.every_steps and self.checkpoints.step % self.every_steps == 0 and not is_last:
            self.checkpoints.save()

    def on_epoch_end(self, epoch, logs=None):
        self.checkpoints.save()


class StopAtNonFiniteLoss(keras.callbacks.Callback):
    """Ends the training at the first loss that is NaN or infinite. Stands before SaveCheckpoints.

    Raises:
        FloatingPointError: naming the step and the last good checkpoint.
    """

    def __init__(self, checkpoints: Checkpoints):
        super().__init__()
        self.checkpoints = checkpoints

    def on_train_batch_end(self, batch, logs=None):
        if not np.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"The loss is {logs['loss']} at step {self.checkpoints.step}. "
                f"{self.checkpoints.advice()}"
            )


def fit_from_step(
    model: keras.Model,
    batches_from: Callable[[int], tf.data.Dataset],
    first_step: int,
    steps_per_epoch: int,
    epochs: int,
    **fit_arguments,
) -> None:
    """Calls `model.fit` so that it continues at `first_step`, in the middle of an epoch or not.

    Args:
        model: compiled, restored to `first_step`.
        batches_from: step to the batches from that step on.
        first_step: optimizer steps already taken.
        steps_per_epoch: of the whole training.
        epochs: of the whole training.
        **fit_arguments: handed to `fit`, callbacks and all.
    """
    epoch, done = divmod(first_step, steps_per_epoch)
    if done:
        # fit counts an epoch's steps from 0, so the broken epoch has a call of its own.
        model.fit(
            batches_from(first_step),
            initial_epoch=epoch,
            epochs=epoch + 1,
            steps_per_epoch=steps_per_epoch - done,
            shuffle=False,
            **fit_arguments,
        )
        epoch += 1
    if epoch < epochs:
        model.fit(
            batches_from(epoch * steps_per_epoch),
            initial_epoch=epoch,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            shuffle=False,
            **fit_arguments,
        )


def _read_problem(path):
    """Reads every value of a checkpoint; returns what went wrong, or None."""
    try:
        reader = tf.train.load_checkpoint(path)
        for key in reader.get_variable_to_shape_map():
            reader.get_tensor(key)
    except (tf.errors.OpError, ValueError, RuntimeError, IndexError) as error:
        return str(error).splitlines()[0][:200] or type(error).__name__
    return None
