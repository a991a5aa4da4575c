"""metrics.jsonl of a run: how its steps and epochs were, a line of JSON each.

    {"kind": "step", "step": 120, "epoch": 0.71, "time": 1795915308.9, "loss": 1.38, ...}
    {"kind": "epoch", "step": 168, "epoch": 1.0, "time": ..., "seconds": 9.4, "loss": 1.41, ...}

`time` is Unix time in seconds. Values of a step are that step's, but images_per_second and
waiting_share, which are those of the epoch so far; values of an epoch are means over it. What was
not finite is null. A run that was killed and continued writes some steps twice: the later line
counts. MEANINGS says what the other names mean.
"""

import json
import math
import os
import pathlib
import time
from typing import NamedTuple

import keras
import numpy as np
from absl import logging

# Of the values that steps and epochs have; methods add few of their own.
MEANINGS = {
    "loss": "what the student minimises",
    "teacher_entropy": "of the teacher's similarities, nats; log K where it sees no structure",
    "student_entropy": "of the student's similarities, nats; log K where it sees no structure",
    "embedding_std": "spread of the embeddings: about 1 over the whole sphere, 0 when collapsed",
    "purity": "share of the anchors nearest to an image that are of its class",
    "gradient_norm": "length of the loss's gradient, mean over replicas",
    "learning_rate": "of the student's optimizer",
    "images_per_second": "trained on, over the epoch so far",
    "waiting_share": "share of the time in which a step waits for its batch",
    "student_1nn": "the student's 1-NN accuracy",
    "student_20nn": "the student's 20-NN accuracy",
    "teacher_1nn": "the teacher's 1-NN accuracy",
    "teacher_20nn": "the teacher's 20-NN accuracy",
}


class Metrics(NamedTuple):
    """What a run's metrics.jsonl holds, in the order of the steps."""

    steps: list[dict]
    epochs: list[dict]
    unreadable_lines: int

    def curve(self, name: str, kind: str = "steps") -> tuple[np.ndarray, np.ndarray]:
        """Epochs and values, float64 [n] each, of the lines that have a finite value."""
        lines = [line for line in getattr(self, kind) if _is_number(line.get(name))]
        points = [(line["epoch"], line[name]) for line in lines]
        return tuple(np.array(points, np.float64).reshape(-1, 2).T)

    def newest_accuracies(self) -> dict[str, float]:
        """The accuracies by kNN of the last epoch that has any."""
        scored = next((line for line in reversed(self.epochs) if "student_1nn" in line), {})
        return {k: v for k, v in scored.items() if k.endswith("nn") and _is_number(v)}

    def last(self, name: str) -> float | None:
        """The last epoch's value, or None."""
        values = [line.get(name) for line in self.epochs[-1:]]
        return values[0] if values and _is_number(values[0]) else None


def read(path: str | os.PathLike) -> Metrics:
    """Reads a run's metrics.jsonl; of a file that is not there, nothing.

    Lines that a kill has cut off, and whatever else is no line of it, are counted and left out.
    """
    path, found, unreadable = pathlib.Path(path), {}, 0
    lines = path.read_bytes().splitlines() if path.exists() else []
    for text in lines:
        try:
            line = json.loads(text)
            place = line["kind"], int(line["step"])
            line["epoch"] = float(line["epoch"])
        except (ValueError, TypeError, KeyError):
            unreadable += bool(text.strip())
            continue
        found[place] = line
    in_order = [found[place] for place in sorted(found, key=lambda place: place[1])]
    steps, epochs = ([x for x in in_order if x["kind"] == kind] for kind in ("step", "epoch"))
    return Metrics(steps, epochs, unreadable)


class MetricsLog(keras.callbacks.Callback):
    """Writes metrics.jsonl. A disk that is full costs its lines, and is reported once an epoch.

    Args:
        path: of the file; a continued run adds to it.
        steps_per_epoch: of the whole training.
        every_steps: how often a step has a line; every epoch has one.
    """

    def __init__(self, path: str | os.PathLike, steps_per_epoch: int, every_steps: int):
        super().__init__()
        self.path = pathlib.Path(path)
        self.steps_per_epoch = steps_per_epoch
        self.every_steps = every_steps

    def on_epoch_begin(self, epoch, logs=None):
        self._start, self._complained = time.time(), False

    def on_train_batch_end(self, batch, logs=None):
        if is_due(self.model, self.every_steps):
            self._write("step", logs)

    def on_epoch_end(self, epoch, logs=None):
        self._write("epoch", {"seconds": time.time() - self._start} | logs)

    def _write(self, kind, logs):
        step = int(self.model.step.numpy())
        line = {"kind": kind, "step": step, "epoch": step / self.steps_per_epoch}
        line["time"] = time.time()
        for name, value in logs.items():
            line[name] = float(value) if math.isfinite(value) else None
        try:
            # In one piece, and behind the end of a line, whatever a kill has left there.
            with open(self.path, "ab+") as file:
                cut_off = file.tell() and not _ends_a_line(file)
                file.write(b"\n" * cut_off + json.dumps(line).encode() + b"\n")
        except OSError as error:
            if not self._complained:
                logging.error("%s cannot be written (%s).", self.path, error)
            self._complained = True


def is_due(model: keras.Model, every_steps: int) -> bool:
    """Whether the step that a model has just taken is one that is logged."""
    # An execution of several steps may pass over the multiple.
    return int(model.step.numpy()) % every_steps < model.steps_per_execution


def _ends_a_line(file):
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _is_number(value):
    return isinstance(value, int | float) and math.isfinite(value)
