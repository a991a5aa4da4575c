import time
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_runs import full_disk

import isd_tf
from isd_tf.training import monitoring


@pytest.fixture
def fit():
    """Fits a small model for 2 epochs of 3 steps; returns its history and every step's loss."""

    def run(*callbacks, late=None):
        encoder = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
        model = isd_tf.ISD(encoder, None, None, queue_size=16, student_temperature=0.1)
        model.compile(isd_tf.TorchSGD(0.5))
        views = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
        batches = tf.data.Dataset.from_tensor_slices({"teacher_view": views, "student_view": views})
        batches = batches.batch(4)
        if late:

            def deliver(step, batch):
                tf.numpy_function(lambda step: time.sleep(late(step)), [step], [])
                return batch

            batches = batches.enumerate().map(deliver)
        losses = []
        record = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: losses.append(logs["loss"])
        )
        history = keras.callbacks.History()
        model.fit(
            batches,
            epochs=2,
            verbose=0,
            shuffle=False,
            callbacks=[*callbacks, record, history],
        )
        return history.history, np.reshape(losses, [2, 3])

    return run


def test_an_epochs_values_are_the_means_of_its_steps(fit):
    history, losses = fit(monitoring.EpochMeans())
    np.testing.assert_allclose(history["loss"], losses.mean(axis=1), rtol=1e-6)
    assert not np.allclose(losses.mean(axis=1), losses[:, -1])  # What Keras alone would say.


def test_throughput_counts_the_images_of_the_steps_after_compilation(fit, monkeypatch):
    clock = iter(range(1000))
    ticking = types.SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr(monitoring, "time", ticking)
    history, _ = fit(monitoring.Throughput(global_batch_size=4))
    # A second passes at each look at the clock: 2 steps in 3 seconds, then 3 steps in 4.
    np.testing.assert_allclose(history["images_per_second"], [8 / 3, 12 / 4])
    assert "waiting_seconds" not in history


def test_the_share_of_waiting_is_told(monkeypatch):
    """Logs as of a step that waited 0.25 s, on a clock that a step takes a second of."""
    now = [0.0]
    monkeypatch.setattr(monitoring, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    throughput = monitoring.Throughput(global_batch_size=4)
    throughput.on_train_begin()
    throughput.on_epoch_begin(0)
    for batch in range(5):
        now[0] += 1
        logs = {"waiting_seconds": 99.0 if batch == 0 else 0.25}  # The first step compiles.
        throughput.on_train_batch_end(batch, logs)
    assert logs == {"images_per_second": 4.0, "waiting_share": 0.25}


def test_a_step_measures_how_long_it_waited_for_its_batch(fit):
    """Of three batches the third comes late."""
    seconds = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seconds.append(logs["waiting_seconds"])
    )
    fit(record, late=lambda step: 0.5 if step == 2 else 0.0)
    assert seconds[2] >= 0.4 > np.median(seconds)


def test_progress_without_a_terminal_prints_lines_and_one_for_each_epoch(fit, capsys):
    _, losses = fit(monitoring.EpochMeans(), monitoring.Progress(epochs=7, seconds=0.0))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[1].startswith("  step 2 of 3: loss ")
    assert lines[7].startswith(f"Epoch 2/7: loss {losses[1].mean():.4g}, ")


def test_an_epochs_line_has_all_that_matters_in_100_columns(monkeypatch, capsys):
    """Two epochs of 90 minutes each: of 200, 198 are left."""
    now = [0.0]
    monkeypatch.setattr(monitoring, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    progress = monitoring.Progress(epochs=200)
    progress.set_params({"steps": 5})
    for epoch in (0, 1):
        progress.on_epoch_begin(epoch)
        now[0] += 5400
        progress.on_epoch_end(epoch, {
            "loss": 12.3456, "student_1nn": 0.79222, "student_20nn": 0.8, "teacher_1nn": 0.7907,
            "images_per_second": 12345.6, "waiting_share": 0.2355, "teacher_entropy": 2.9,
        })  # fmt: skip
    assert capsys.readouterr().out.splitlines()[1] == (
        "Epoch 2/200: loss 12.35, 1-NN 79.2% (teacher 79.1%), 12346 images/s, 24% waiting, "
        "12 d 9 h left"
    )


@pytest.mark.parametrize(
    "seconds, said",
    [(0, "0 s"), (0.0312, "0.031 s"), (89.4, "89 s"), (90, "2 min"), (3540, "59 min"),
     (3590, "1 h 0 min"), (48 * 3600 - 61, "47 h 59 min"), (48 * 3600, "2 d 0 h"),
     (400 * 86400, "400 d 0 h")],
)  # fmt: skip
def test_durations_are_said_in_one_or_two_units(seconds, said):
    assert monitoring.duration(seconds) == said


def test_progress_in_a_terminal_fits_into_80_columns_and_ends_in_the_epochs_mean(
    fit, capsys, monkeypatch
):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    _, losses = fit(
        monitoring.EpochMeans(), monitoring.Throughput(4), monitoring.Progress(epochs=2)
    )
    output = capsys.readouterr().out
    for control in ("\x1b[1m", "\x1b[0m", "\x1b[32m", "\x1b[37m"):
        output = output.replace(control, "")
    lines = output.replace("\r", "\n").replace("\b", "").splitlines()
    bars = [line for line in lines if "━" in line]
    assert bars and all("loss" in bar and len(bar) < 80 for bar in bars)
    told = [bar.split("waiting %: ") for bar in bars if "waiting" in bar]
    assert told and all(0 < float(share.split()[0]) <= 100 for _, share in told)
    assert max(map(len, lines)) < 80 and "Epoch 2/2: " in output
    ends = [float(bar.split("loss: ")[1].split()[0]) for bar in bars if "3/3" in bar]
    np.testing.assert_allclose(ends, losses.mean(axis=1), atol=1e-4)
    assert not np.allclose(ends, losses[:, -1], atol=1e-3)


def test_a_bar_that_is_told_of_no_waiting_shows_images_a_second(capsys, monkeypatch):
    """As in a finetuning; and of a first step, which compiles, neither."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    progress = monitoring.Progress(epochs=1)
    progress.set_params({"steps": 2})
    progress.on_epoch_begin(0)
    progress.on_train_batch_end(0, {"loss": 1.0})
    first = capsys.readouterr().out
    progress.on_train_batch_end(1, {"loss": 1.0, "images_per_second": 123.0})
    last = capsys.readouterr().out
    assert "loss: 1.0000" in first and "images/s" not in first
    assert "images/s: 123.0000" in last and "waiting" not in first + last


def logged_steps(directory):
    (path,) = directory.iterdir()
    return [
        (value.tag, event.step)
        for record in tf.compat.v1.io.tf_record_iterator(str(path))
        for event in [tf.compat.v1.Event.FromString(record)]
        for value in event.summary.value
    ]


def test_a_log_that_cannot_be_written_is_reported_once_an_epoch_and_ends_nothing(
    fit, tmp_path, caplog
):
    with full_disk(largest_file=100):
        history, _ = fit(monitoring.TensorBoardLog(tmp_path, every_steps=1))
    assert len(history["loss"]) == 2
    assert caplog.text.count(f"The log {tmp_path} cannot be written") == 2


def test_the_log_has_a_value_for_each_multiple_that_an_execution_passes(tmp_path):
    log = monitoring.TensorBoardLog(tmp_path, every_steps=4)
    log.set_model(types.SimpleNamespace(step=tf.Variable(0), steps_per_execution=3))
    log.on_train_begin()
    log.on_epoch_begin(0)
    for step in range(3, 19, 3):
        log.model.step.assign(step)
        log.on_train_batch_end(step - 1, {"loss": 1.0})
    log.on_train_end()
    assert logged_steps(tmp_path) == [("step/loss", step) for step in (6, 9, 12, 18)]
