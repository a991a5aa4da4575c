import json
import math
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_runs import full_disk

import isd_tf
from isd_tf.training import metrics
from isd_tf.training.metrics import MetricsLog


def model_at(step=0, steps_per_execution=1):
    return types.SimpleNamespace(
        step=tf.Variable(step, dtype=tf.int64), steps_per_execution=steps_per_execution
    )


def log_of(path, model, steps_per_epoch=6, every_steps=4):
    log = MetricsLog(path, steps_per_epoch, every_steps)
    log.set_model(model)
    log.on_epoch_begin(0)
    return log


def test_steps_and_epochs_are_lines_that_come_back(tmp_path):
    model = model_at()
    log = log_of(tmp_path / "metrics.jsonl", model)
    for step in range(1, 7):
        model.step.assign(step)
        log.on_train_batch_end(step - 1, {"loss": step / 2, "images_per_second": 100.0})
    log.on_epoch_end(0, {"loss": 1.75, "student_1nn": 0.5})
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(x["kind"], x["step"], x["loss"]) for x in lines] == [
        ("step", 4, 2.0), ("epoch", 6, 1.75)
    ]  # fmt: skip
    found = metrics.read(tmp_path / "metrics.jsonl")
    assert found.steps == lines[:1] and found.epochs == lines[1:] and not found.unreadable_lines
    epochs, losses = found.curve("loss")
    np.testing.assert_allclose([epochs, losses], [[4 / 6], [2.0]])
    assert found.last("student_1nn") == 0.5 and found.last("teacher_1nn") is None
    assert lines[1]["seconds"] >= 0 and lines[0]["time"] <= lines[1]["time"]


def test_an_execution_of_several_steps_logs_the_multiples_it_passes(tmp_path):
    model = model_at(steps_per_execution=3)
    log = log_of(tmp_path / "metrics.jsonl", model)
    for step in range(3, 19, 3):
        model.step.assign(step)
        log.on_train_batch_end(step - 1, {"loss": 1.0})
    assert [x["step"] for x in metrics.read(tmp_path / "metrics.jsonl").steps] == [6, 9, 12, 18]


def test_what_is_not_finite_is_null_and_no_point_of_a_curve(tmp_path):
    log = log_of(tmp_path / "metrics.jsonl", model_at(4))
    log.on_train_batch_end(3, {"loss": math.nan, "gradient_norm": math.inf, "purity": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are no JSON.
    found = metrics.read(tmp_path / "metrics.jsonl")
    assert found.steps[0]["loss"] is None and len(found.curve("loss")[0]) == 0
    assert found.curve("purity")[1] == [0.5]


def test_a_line_that_a_kill_has_cut_off_harms_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = log_of(path, model_at(4))
    log.on_train_batch_end(3, {"loss": 1.0})
    log.model.step.assign(8)
    log.on_train_batch_end(7, {"loss": 2.0})
    path.write_bytes(path.read_bytes()[:-20])  # The end of the second, with its newline.
    log_of(path, model_at(8)).on_train_batch_end(7, {"loss": 3.0})
    found = metrics.read(path)
    assert [(x["step"], x["loss"]) for x in found.steps] == [(4, 1.0), (8, 3.0)]
    assert found.unreadable_lines == 1


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"[1, 2]", b"7", b"\xff\xfe", b'{"kind": "step"}', b'"text"', b"null",
        b'{"kind": "step", "step": "x", "epoch": 1}', b'{"kind": "step", "step": 1, "epoch": null}',
    ],
)  # fmt: skip
def test_lines_of_anything_else_are_counted_and_left_out(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"kind": "epoch", "step": 6, "epoch": 1, "loss": 1.5}\n'
    path.write_bytes(good + line + b"\n\n")
    found = metrics.read(path)
    assert found.unreadable_lines == 1 and found.last("loss") == 1.5


def test_later_lines_of_a_continued_run_count_and_older_versions_lack_values(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [(10, 1.0), (20, 2.0), (15, 5.0), (20, 3.0)]
    lines = [{"kind": "step", "step": s, "epoch": s / 10, "loss": x} for s, x in steps]
    lines.append({"kind": "something new", "step": 1, "epoch": 0})
    path.write_text("\n".join(map(json.dumps, lines)))
    found = metrics.read(path)
    assert [(x["step"], x["loss"]) for x in found.steps] == [(10, 1.0), (15, 5.0), (20, 3.0)]
    assert found.epochs == [] and len(found.curve("gradient_norm")[0]) == 0
    assert metrics.read(tmp_path / "gone.jsonl") == ([], [], 0)


def test_a_full_disk_costs_lines_and_is_reported_once_an_epoch(tmp_path, caplog):
    log = log_of(tmp_path / "metrics.jsonl", model_at(4))
    with full_disk(largest_file=100):
        for _ in range(3):
            log.on_train_batch_end(3, {"loss": 1.0})
        log.on_epoch_end(0, {"loss": 1.0})
    assert caplog.text.count("metrics.jsonl cannot be written") == 1


def test_the_gradients_norm_is_that_of_the_step():
    """Against the step that plain SGD takes: its length is the norm times the rate."""
    views = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    batch = {"teacher_view": views, "student_view": views[::-1].copy()}

    def step(policy, optimizer):
        keras.config.set_dtype_policy(policy)
        keras.utils.set_random_seed(0)
        encoder = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
        model = isd_tf.ISD(encoder, None, None, queue_size=16, student_temperature=0.1)
        model.compile(optimizer)
        before = [w.numpy().astype(np.float64) for w in model.trainable_variables]
        norm = model.train_step(tf.nest.map_structure(tf.constant, batch))["gradient_norm"]
        after = [w.numpy() for w in model.trainable_variables]
        moved = np.sqrt(sum(np.square(a - b).sum() for a, b in zip(after, before, strict=True)))
        return float(norm), moved / 0.5

    try:
        sgd = keras.optimizers.SGD(0.5)
        scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=64)
        for policy, optimizer, tolerance in (
            ("float32", sgd, 1e-4), ("mixed_float16", scaled, 2e-2)
        ):  # fmt: skip
            norm, expected = step(policy, optimizer)
            assert norm > 0.01
            np.testing.assert_allclose(norm, expected, rtol=tolerance)
    finally:
        keras.config.set_dtype_policy("float32")
