import os
import re
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_runs import full_disk

import isd_tf
from isd_tf.data import datasets
from isd_tf.training import checkpoints as checkpointing

IMAGES = np.random.default_rng(0).integers(0, 256, (26, 16, 16, 3), np.uint8)
DATA = datasets.ArrayDataset("arrays", IMAGES, np.arange(26) % 3, ("a", "b", "c"))
STEPS_PER_EPOCH = 26 // 4


def make_model(strategy=None, queue_size=10, seed=0):
    keras.utils.set_random_seed(seed)
    with (strategy or tf.distribute.get_strategy()).scope():
        encoder = keras.Sequential(
            [
                keras.Input((16, 16, 3)),
                keras.layers.Conv2D(16, 3, 2, name="conv"),
                keras.layers.BatchNormalization(),
                keras.layers.ReLU(),
                keras.layers.GlobalAveragePooling2D(),
            ]
        )
        model = isd_tf.ISD(encoder, *isd_tf.isd_plus_heads(16), queue_size, 0.05, 0.1, 0.9)
        model.compile(isd_tf.TorchSGD(isd_tf.CosineByEpoch(0.1, 3, STEPS_PER_EPOCH)))
    return model


def batches_from(step):
    return isd_tf.pretraining_batches(DATA, ("weak", "strong"), 16, 4, 0, step)


def train(model, directory, until=None, every_steps=4, keep=2):
    """Trains as run.py does, stopped after `until` steps; returns the step it began at."""
    checkpoints = checkpointing.Checkpoints(directory, model, keep)
    first_step = checkpoints.restore_newest()

    class KilledError(Exception):
        pass

    class Kill(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if checkpoints.step == until:
                raise KilledError

    callbacks = [checkpointing.SaveCheckpoints(checkpoints, every_steps), Kill()]
    try:
        checkpointing.fit_from_step(
            model, batches_from, first_step, STEPS_PER_EPOCH, 3, callbacks=callbacks, verbose=0
        )
    except KilledError:
        pass
    return first_step


def state_of(model):
    return [v.numpy() for v in (*model.variables, *model.optimizer.variables)]


def assert_same_bits(model, other):
    for variable, ours, theirs in zip(
        (*model.variables, *model.optimizer.variables),
        state_of(model),
        state_of(other),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=variable.path)


@pytest.mark.slow
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_run_killed_twice_ends_in_the_bits_of_an_uninterrupted_one(
    tmp_path, mirrored, two_replicas
):
    strategy = two_replicas if mirrored else None
    whole = make_model(strategy)
    train(whole, tmp_path / "whole")

    # Saved at steps 4, 6 (the end of an epoch) and 8; the others are lost and taken again.
    assert train(make_model(strategy), tmp_path / "other", until=7) == 0
    assert train(make_model(strategy), tmp_path / "other", until=11) == 6
    last = make_model(strategy, seed=1)
    assert train(last, tmp_path / "other") == 8

    assert int(last.step.numpy()) == int(last.optimizer.iterations.numpy()) == 18
    assert_same_bits(last, whole)


def test_everything_of_the_run_is_restored(tmp_path):
    model = make_model()
    train(model, tmp_path, until=5, every_steps=5)
    other = make_model(seed=9)
    assert checkpointing.Checkpoints(tmp_path, other).restore_newest() == 5
    assert_same_bits(other, model)
    assert int(other.queue.pointer.numpy()) == 20 % 10
    assert (other.queue.labels.numpy() >= 0).all()


def test_a_checkpoint_of_two_replicas_continues_on_one(tmp_path, two_replicas):
    model = make_model(two_replicas)
    train(model, tmp_path, until=4)
    other = make_model()
    assert checkpointing.Checkpoints(tmp_path, other).restore_newest() == 4
    assert_same_bits(other, model)


def test_only_the_newest_are_kept(tmp_path):
    train(make_model(), tmp_path, every_steps=1, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:08d}" for s in (16, 17, 18)]


def test_every_so_many_steps_one_is_kept_for_good(tmp_path):
    model = make_model()
    checkpoints = checkpointing.Checkpoints(tmp_path, model, keep=2, keep_every_steps=4)
    for step in range(1, 12):
        model.step.assign(step)
        checkpoints.save()
    assert sorted(int(p.name[5:]) for p in tmp_path.iterdir()) == [4, 8, 10, 11]


@pytest.mark.parametrize("continue_without", [False, True])
def test_a_full_disk_keeps_the_former_checkpoint_and_ends_or_not_as_told(
    tmp_path, continue_without, caplog
):
    model = make_model()
    checkpoints = checkpointing.Checkpoints(tmp_path, model, continue_without=continue_without)
    model.step.assign(1)
    checkpoints.save()
    good = make_model(seed=9)
    checkpointing.Checkpoints(tmp_path, good).restore_newest()

    model.step.assign(2)
    message = "step 2 cannot be written .*File too large.*last good checkpoint is .*step-00000001"
    with full_disk():
        if continue_without:
            checkpoints.save()
            assert re.search(message, caplog.text) and "goes on without" in caplog.text
        else:
            with pytest.raises(OSError, match=message):
                checkpoints.save()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.restore_newest() == 1
    assert_same_bits(model, good)
    model.step.assign(3)
    checkpoints.save()  # Once there is space again.
    assert checkpoints.newest_step == 3


KILLED_WHILE_SAVING = """
import os, pathlib, signal, sys
sys.path[:0] = {path!r}
import tensorflow as tf
import checkpoints_test
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

def write_half(self, path):
    written = write(self, path)
    (data,) = pathlib.Path(path).parent.glob("*.data*")
    os.truncate(data, data.stat().st_size // 2)
    kill()

def from_step_8_on(method, replacement):
    def call(self, *arguments):
        late = os.path.exists({directory!r} + "/step-00000006")
        return (replacement if late else method)(self, *arguments)
    return call

write = tf.train.Checkpoint.write
if {moment!r} == "in the middle":
    tf.train.Checkpoint.write = from_step_8_on(write, write_half)
else:
    pathlib.Path.rename = from_step_8_on(pathlib.Path.rename, kill)
checkpoints_test.train(checkpoints_test.make_model(), {directory!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in the middle", "before the name"])
def test_a_run_killed_while_it_saves_continues_to_the_same_bits(tmp_path, moment):
    whole = make_model()
    train(whole, tmp_path / "whole")
    directory = str(tmp_path / "killed")
    code = KILLED_WHILE_SAVING.format(path=sys.path, directory=directory, moment=moment)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert sorted(os.listdir(directory)) == ["step-00000004", "step-00000006", "unfinished"]
    model = make_model(seed=1)
    assert train(model, directory) == 6
    assert_same_bits(model, whole)


@pytest.mark.parametrize(
    ("step", "number", "code"), [(5, signal.SIGTERM, 143), (6, signal.SIGTERM, 143),
                                 (5, signal.SIGINT, 130), (6, signal.SIGINT, 130)]
)  # fmt: skip
def test_a_signal_saves_after_the_running_step_and_exits(tmp_path, step, number, code):
    """In the middle of an epoch, and at the end of one, where its evaluations come first."""
    model = make_model()
    checkpoints = checkpointing.Checkpoints(tmp_path, model)
    stop = checkpointing.StopWhenTold(checkpoints)
    evaluated = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if checkpoints.step == step:
                os.kill(os.getpid(), number)

        def on_epoch_end(self, epoch, logs=None):
            evaluated.append(checkpoints.step)

    callbacks = [Watch(), checkpointing.SaveCheckpoints(checkpoints, 0), stop]
    try:
        with pytest.raises(SystemExit) as stopped:
            checkpointing.fit_from_step(
                model, batches_from, 0, STEPS_PER_EPOCH, 3, callbacks=callbacks, verbose=0
            )
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert stopped.value.code == code
    assert [p.name for p in tmp_path.iterdir()] == [f"step-{step:08d}"]
    assert evaluated == ([6] if step == 6 else [])


def test_a_second_interrupt_does_not_wait_for_the_step(tmp_path):
    checkpoints = checkpointing.Checkpoints(tmp_path, make_model())
    stop = checkpointing.StopWhenTold(checkpoints)
    stop.on_train_begin()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.told == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
def test_several_steps_an_execution_continue_from_any_step_to_the_same_bits(tmp_path):
    whole = make_model()
    train(whole, tmp_path / "whole")
    train(make_model(), tmp_path / "other", until=5, every_steps=5)
    model = make_model()
    model.steps_per_execution = 2
    assert train(model, tmp_path / "other", every_steps=3) == 5
    assert model.steps_per_execution == 2
    assert_same_bits(model, whole)


def test_several_steps_an_execution_are_saved_once_the_multiple_has_passed(tmp_path):
    model = make_model()
    model.steps_per_execution = 2
    train(model, tmp_path, every_steps=3, keep=99)
    assert sorted(int(p.name[5:]) for p in tmp_path.iterdir()) == [4, 6, 10, 12, 16, 18]


def damage(path, how):
    (data,) = path.glob("*.data*")
    (index,) = path.glob("*.index")
    if how == "cut off":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif how == "empty":
        data.write_bytes(b"")
        index.write_bytes(b"")
    elif how == "without data":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-100] + bytes(100))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut off", "empty", "without data", "overwritten"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, how, caplog):
    train(make_model(), tmp_path, until=8)
    good = make_model()
    train(good, tmp_path / "good", until=6)  # Steps 6 and 8 are those kept above.
    damage(tmp_path / "step-00000008", how)

    model = make_model()
    assert checkpointing.Checkpoints(tmp_path, model).restore_newest() == 6
    assert_same_bits(model, good)
    assert "step 8 cannot be read" in caplog.text and "taking the one before" in caplog.text

    # The damaged step is taken and saved again, and what is left of the old one is kept aside.
    assert train(model, tmp_path, until=9) == 6
    assert (tmp_path / "damaged-00000008").is_dir()
    assert checkpointing.Checkpoints(tmp_path, make_model()).restore_newest() == 8


def test_when_all_checkpoints_are_damaged_nothing_is_overwritten(tmp_path):
    train(make_model(), tmp_path, until=8)
    for path in list(tmp_path.iterdir()):
        damage(path, "cut off")
    for _ in range(2):  # Nor is anything begun anew at the second attempt.
        with pytest.raises(ValueError, match="None of the checkpoints in .* can be read"):
            checkpointing.Checkpoints(tmp_path, make_model()).restore_newest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged-00000006", "damaged-00000008"]


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    train(make_model(), tmp_path, until=6)
    with pytest.raises(ValueError, match="another model.*another --workdir"):
        checkpointing.Checkpoints(tmp_path, make_model(queue_size=12)).restore_newest()


def test_a_half_written_checkpoint_is_not_taken_for_one(tmp_path):
    train(make_model(), tmp_path, until=7)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "state.index").write_bytes(b"half")
    model = make_model()
    assert checkpointing.Checkpoints(tmp_path, model).restore_newest() == 6
    train(model, tmp_path, until=8)
    assert (tmp_path / "step-00000008").is_dir() and not (tmp_path / "unfinished").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    model = make_model()
    checkpoints = checkpointing.Checkpoints(tmp_path, model)

    class Poison(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if checkpoints.step == 5:
                kernel = model.student_encoder.trainable_variables[0]
                kernel.assign(kernel * np.nan)

    callbacks = [
        Poison(),
        checkpointing.StopAtNonFiniteLoss(checkpoints),
        checkpointing.SaveCheckpoints(checkpoints, 2),
    ]
    with pytest.raises(FloatingPointError, match="loss is nan at step 6.*step-00000004"):
        checkpointing.fit_from_step(
            model, batches_from, 0, STEPS_PER_EPOCH, 3, callbacks=callbacks, verbose=0
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model = make_model()
    train(model, tmp_path, until=7)
    model.trainable_variables[0].assign(model.trainable_variables[0] * np.inf)
    model.step.assign(7)
    with pytest.raises(FloatingPointError, match="conv/kernel.*step 7.*step-00000006"):
        checkpointing.Checkpoints(tmp_path, model).save()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]


def test_temperatures_are_advised_where_there_are_some(tmp_path):
    with_temperatures = make_model()
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    other.compile("sgd")
    said = [
        checkpointing.Checkpoints(tmp_path, model).advice() for model in (with_temperatures, other)
    ]
    assert ["lower --learning_rate" in text for text in said] == [True, True]
    assert ["temperatures" in text for text in said] == [True, False]


def test_an_epochs_last_step_is_saved_after_its_evaluations(tmp_path):
    model = make_model()
    checkpoints = checkpointing.Checkpoints(tmp_path, model)
    newest_when_evaluated = []

    class Evaluation(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            newest_when_evaluated.append(max(p.name for p in tmp_path.iterdir()))

    callbacks = [Evaluation(), checkpointing.SaveCheckpoints(checkpoints, 3)]
    checkpointing.fit_from_step(
        model, batches_from, 0, STEPS_PER_EPOCH, 2, callbacks=callbacks, verbose=0
    )
    assert newest_when_evaluated == ["step-00000003", "step-00000009"]
    assert checkpoints.restore_newest() == 12


def test_at_least_one_checkpoint_is_kept(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        checkpointing.Checkpoints(tmp_path, make_model(), keep=0)
