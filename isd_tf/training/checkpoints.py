"""Checkpoints that a killed run continues from, exactly.

A checkpoint holds student, teacher, heads, queue, pointer, labels, optimizer and step. Order of
images and views are functions of (seed, step), so nothing else is state. Of several workers the
chief writes and all read; what one of them finds wrong ends them all.
"""

import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from isd_tf.training import cluster
from isd_tf.training.errors import sentence

# Exit code of a process that was told to stop, as shells have it: 128 + the signal, here SIGTERM.
EXIT_TOLD_TO_STOP = 128 + signal.SIGTERM


class Checkpoints:
    """The checkpoints of a directory: one folder a step.

    Args:
        directory: made if missing; all workers must see it.
        model: a compiled model, whose variables all exist.
        keep: how many of the newest to keep.
        keep_every_steps: besides these, every checkpoint at a multiple of it is kept; 0: none.
        continue_without: whether a checkpoint that cannot be written, on a full disk for example,
            is reported and the run goes on; by default it ends.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        model: keras.Model,
        keep: int = 2,
        keep_every_steps: int = 0,
        continue_without: bool = False,
    ):
        if keep < 1:
            raise ValueError(f"At least one checkpoint must be kept. Received: keep={keep}.")
        self.directory = pathlib.Path(directory)
        self.model = model
        self.keep = keep
        self.keep_every_steps = keep_every_steps
        self.continue_without = continue_without
        self.strategy = model.distribute_strategy
        self._checkpoint = _checkpoint(model)
        with cluster.failing_together(self.strategy):
            if cluster.is_chief(self.strategy):
                self.directory.mkdir(parents=True, exist_ok=True)

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return int(self.model.step.numpy())

    def save(self) -> None:
        """Writes the present step beside the others, and then gives it its name.

        Called by all workers.

        Raises:
            FloatingPointError: when a weight is not finite; the former checkpoints stay.
            OSError: when it cannot be written, unless `continue_without`; the former ones stay.
            WorkerError: on the other workers.
        """
        with cluster.failing_together(self.strategy):
            self._require_finite_weights()
            if not cluster.is_chief(self.strategy) or self._place(self.step).exists():
                return
            try:
                self._write(self._place(self.step))
            except (OSError, tf.errors.OpError) as error:
                problem = (
                    f"The checkpoint of step {self.step} cannot be written to {self.directory} "
                    f"({sentence(error)}); {self._newest()}. Free some space or repair the disk"
                )
                if not self.continue_without:
                    raise OSError(f"{problem}; the same command continues from there.") from error
                logging.error("%s. The run goes on without.", problem)

    def _require_finite_weights(self):
        for variable in self.model.variables:
            if not np.isfinite(variable.numpy()).all():
                raise FloatingPointError(
                    f"The weight {variable.path} is no longer finite at step {self.step}. "
                    f"{self.advice()}"
                )

    def _write(self, place):
        unfinished = self.directory / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            self._checkpoint.write(str(unfinished / "state"))
            _flush_to_disk(unfinished)
        except (OSError, tf.errors.OpError):
            shutil.rmtree(unfinished, ignore_errors=True)  # What is there fills the disk.
            raise
        unfinished.rename(place)
        _flush_to_disk(self.directory)
        for old in self._steps()[self.keep :]:
            if not self.keep_every_steps or old % self.keep_every_steps:
                shutil.rmtree(self._place(old), ignore_errors=True)

    def restore_newest(self) -> int:
        """Restores the newest checkpoint that can be read whole, and returns its step.

        Called by all workers, who take the one that the chief chooses. A checkpoint that cannot be
        read is reported and the one before it taken. Returns 0 and changes nothing where there is
        none.

        Raises:
            ValueError: when a checkpoint belongs to another model, or none of those there can be
                read.
            WorkerError: when that happened on another worker.
        """
        chosen = 0
        with cluster.failing_together(self.strategy):
            if cluster.is_chief(self.strategy):
                chosen = self._newest_readable()
        step = int(cluster.gather_from_workers(self.strategy, chosen)[0])
        with cluster.failing_together(self.strategy):
            if step:
                self._restore(step)
        return step

    def _newest_readable(self):
        for step in self._steps():
            problem = _read_problem(str(self._place(step) / "state"))
            if not problem:
                return step
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
        if self.exist:
            raise ValueError(
                f"None of the checkpoints in {self.directory} can be read. Restore one from a "
                "copy, or use another --workdir to start anew."
            )
        return 0

    def _restore(self, step):
        path = str(self._place(step) / "state")
        try:
            self._checkpoint.read(path).assert_consumed()
        except tf.errors.NotFoundError as error:
            raise FileNotFoundError(
                f"Every worker must see the checkpoints. Received: no {path} here. Use a --workdir "
                "that all machines share."
            ) from error
        except (ValueError, AssertionError) as error:
            raise ValueError(
                f"The checkpoint {path} belongs to another model: {str(error).splitlines()[0]} Use "
                "the flags that it was written with, or another --workdir."
            ) from error

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
        softer = any(name.endswith("temperature") for name in vars(self.model))
        return (
            f"{self._newest()}. The same flags would end in the same way: lower --learning_rate"
            f"{' or raise the temperatures' * softer}, in another --workdir."
        )

    def _newest(self):
        steps = self._steps()
        return (
            f"The last good checkpoint is {self._place(steps[0])}"
            if steps
            else "No checkpoint was saved yet"
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
        # An execution of several steps may pass over the multiple.
        due = self.every_steps and (
            self.checkpoints.step % self.every_steps < self.model.steps_per_execution
        )
        if due and not is_last:
            self.checkpoints.save()

    def on_epoch_end(self, epoch, logs=None):
        self.checkpoints.save()


class StopWhenTold(keras.callbacks.Callback):
    """At SIGTERM, as a machine sends that is about to be taken away: saves, and exits with 143.

    At Ctrl-C as well, with 130; a second Ctrl-C does not wait for the end of the step. On all
    workers after the same step, whichever of them was told: every call of the train function asks
    them. Stands behind SaveCheckpoints.

    Args:
        checkpoints: where to save.
    """

    def __init__(self, checkpoints: Checkpoints):
        super().__init__()
        self.checkpoints = checkpoints
        self.told = 0  # The signal.

    def on_train_begin(self, logs=None):
        def note(number, _):
            self.told = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, note)

    def on_train_batch_end(self, batch, logs=None):
        # The last step of an epoch is saved at its end, with what the epoch's logs say.
        if batch + 1 < self.params["steps"]:
            self._stop_if_told()

    def on_epoch_end(self, epoch, logs=None):
        self._stop_if_told()

    def on_train_end(self, logs=None):
        exit_when_told()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.told:
            sys.exit(128 + self.told)

    def _stop_if_told(self):
        # Of two signals on two workers, SIGTERM.
        told = int(cluster.gather_from_workers(self.checkpoints.strategy, int(self.told)).max())
        if told:
            self.checkpoints.save()
            print(
                f"Told to stop ({signal.Signals(told).name}) after step {self.checkpoints.step}; "
                f"saved step {self.checkpoints.newest_step}.",
                flush=True,
            )
            cluster.linger(self.checkpoints.strategy)
            sys.exit(128 + told)


def exit_when_told() -> None:
    """From now on SIGTERM ends the process with 143 at once, as where nothing is unsaved.

    Workers of a cluster would otherwise ignore it.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TOLD_TO_STOP))


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

    A callback ends the training as in Keras, by `model.stop_training`.

    Args:
        model: compiled, restored to `first_step`.
        batches_from: step to the batches from that step on.
        first_step: steps already taken.
        steps_per_epoch: of the whole training; a multiple of the model's steps_per_execution.
        epochs: of the whole training.
        **fit_arguments: handed to `fit`, callbacks and all.
    """
    epoch, done = divmod(first_step, steps_per_epoch)
    if done:
        # fit counts an epoch's steps from 0, so the broken epoch has a call of its own.
        remaining, steps_per_execution = steps_per_epoch - done, model.steps_per_execution
        if remaining % steps_per_execution:
            _set_steps_per_execution(model, 1)
        model.fit(
            batches_from(first_step),
            initial_epoch=epoch,
            epochs=epoch + 1,
            steps_per_epoch=remaining,
            shuffle=False,
            **fit_arguments,
        )
        _set_steps_per_execution(model, steps_per_execution)
        epoch += 1
    if epoch < epochs and not model.stop_training:
        model.fit(
            batches_from(epoch * steps_per_epoch),
            initial_epoch=epoch,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            shuffle=False,
            **fit_arguments,
        )


def _set_steps_per_execution(model, steps):
    if model.steps_per_execution != steps:
        model.steps_per_execution = steps
        model.make_train_function(force=True)


def _checkpoint(model):
    """All variables of a model and its optimizer.

    TensorFlow does not see what Keras layers keep in lists of other layers, as the blocks of
    transformers; these variables have lists of their own, by their network's name in the model.
    """
    networks = {name: one for name, one in vars(model).items() if isinstance(one, keras.Model)}
    unseen = {name: _hidden_variables(network) for name, network in networks.items()}
    found = {id(variable) for variables in unseen.values() for variable in variables}
    # What the model itself keeps in lists, as the best weights of a finetuning.
    unseen["model"] = [x for x in _hidden_variables(model) if id(x) not in found]
    unseen = {name: variables for name, variables in unseen.items() if variables}
    state = {"unseen": unseen} if unseen else {}
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer, **state)


def _hidden_variables(network):
    seen = {id(one) for one in tf.train.TrackableView(network).descendants()}
    return [variable for variable in network.variables if id(variable) not in seen]


def _flush_to_disk(directory):
    """Waits until a directory and its files would survive a loss of power."""
    for path in (*directory.glob("*"), directory):
        if path.is_file() or path == directory:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _read_problem(path):
    """Reads every value of a checkpoint; returns what went wrong, or None."""
    try:
        reader = tf.train.load_checkpoint(path)
        for key in reader.get_variable_to_shape_map():
            reader.get_tensor(key)
    except (tf.errors.OpError, ValueError, RuntimeError, IndexError) as error:
        return str(error).splitlines()[0][:200] or type(error).__name__
    return None
