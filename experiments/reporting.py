"""report.html in the workdir of a run: what it has learned, for a person to look at.

While it trains, the page shows what its metrics tell; the stage `report` adds what the student sees
in images (report_images.py).
"""

import os
import platform
import shlex
import time
from collections.abc import Callable

import joblib
import keras
import numpy as np
import report_images
import run_data
import tensorflow as tf
import workdirs
from absl import logging
from evaluations import Run
from program import sentence
from settings import FLAGS

from isd_tf.data.datasets import is_labelled
from isd_tf.data.folders import shown
from isd_tf.report import charts, health, pages
from isd_tf.report.charts import Level, Line
from isd_tf.report.pages import Section, Table
from isd_tf.training import metrics
from isd_tf.training.monitoring import duration

PAGE = "report.html"
METHODS = {"isd": "ISD", "moco_v2": "MoCo v2", "byol": "BYOL", "msf": "MSF", "compress": "CompRess"}
# Epochs by which the time left is told.
LATELY = 10


class Refresh(keras.callbacks.Callback):
    """Writes the page at the end of the first epoch, and of every one that is scored.

    Whatever fails is reported, and the training goes on. Stands behind MetricsLog.
    """

    def __init__(self, run: Run, steps: int, every_epochs: int, hurried: Callable[[], bool]):
        super().__init__()
        self.run, self.steps, self.every_epochs, self.hurried = run, steps, every_epochs, hurried

    def on_train_begin(self, logs=None):
        self.views = None

    def on_epoch_end(self, epoch, logs=None):
        if (epoch and (epoch + 1) % self.every_epochs) or self.hurried():
            return
        try:
            self.views = self.views or report_images.views_of(self.run)
            pages.write(_Page(self.run, self.steps, self.views).render(), self.run.workdir / PAGE)
        except Exception as error:
            logging.error("%s cannot be written: %s", PAGE, sentence(error))


def write(run: Run, steps: int) -> os.PathLike:
    """Looks at images, some thousands, and writes the whole page; returns its path.

    Args:
        run: what is trained.
        steps: of the whole training.
    """
    page = _Page(run, steps, report_images.views_of(run), finished=True)
    pages.write(page.render(), run.workdir / PAGE)
    return run.workdir / PAGE


class _Page:
    """What is shown of a run, in the order of the page."""

    def __init__(self, run, steps, views, finished=False):
        self.run, self.steps, self.views, self.finished = run, steps, views, finished
        self.metrics = metrics.read(run.workdir / workdirs.METRICS)
        self.about = workdirs.about(run.workdir)
        newest = self.metrics.epochs[-1] if self.metrics.epochs else {}
        self.step = run.step if finished else newest.get("step", 0)
        results = {k: v for k, v in self.about.get("scores", {}).items() if v is not None}
        self.scores = self.metrics.newest_accuracies() | results
        self.seen = report_images.Seen(run, self.step)

    def render(self):
        sections = [
            self.curves(),
            self.accuracies(),
            self.views,
            *(self.seen.sections() if self.finished else []),
            self.score_table(),
            self.recipe(),
            self.commands(),
        ]
        findings = health.examine(self.metrics, self.facts(), self.scores)
        return pages.render(
            "report.html.jinja",
            title=shown(str(self.run.workdir)),
            headline=self.headline(),
            state=self.state(),
            findings=findings,
            sections=[section for section in sections if section],
        )

    # ------------------------------------------------------------------------------ in a sentence

    def headline(self):
        train, epochs = self.run.data.train, self.step * FLAGS.epochs / self.steps
        text = (
            f"{METHODS[FLAGS.method]} has trained {FLAGS.encoder} on the {len(train)} images of "
            f"{train.name} for {epochs:.4g} of {FLAGS.epochs} epochs."
        )
        if "student_1nn" not in self.scores:
            reason = run_data.reason_not_to_score(self.run.data)
            return f"{text} {reason or 'It is not scored yet.'}"
        others = (
            ("raw_pixels", "raw pixels"), ("untrained", "the untrained encoder"),
            ("initial", "the weights it began with"),
            *((("teacher", "its teacher"),) if FLAGS.method == "compress" else ()),
        )  # fmt: skip
        known = [
            f"{name} {self.scores[f'{key}_1nn']:.1%}"
            for key, name in others
            if f"{key}_1nn" in self.scores
        ]
        return (
            f"{text} The nearest training image tells the class of "
            f"{self.scores['student_1nn']:.1%} of the test images by its student"
            + (f" ({', '.join(known)})." if known else ".")
        )

    def state(self):
        written = time.strftime("%Y-%m-%d %H:%M")
        if self.finished:
            return f"Written {written}, after step {self.step}."
        left, seconds = "", [line["seconds"] for line in self.metrics.epochs[-LATELY:]]
        if seconds and self.step < self.steps:
            epochs = FLAGS.epochs * (1 - self.step / self.steps)
            left = f" About {duration(np.mean(seconds) * epochs)} left."
        return (
            f"Written {written}, while it trains, after step {self.step} of {self.steps}.{left} "
            "Load it again to see later epochs; neighbours, clusters and map come at the end."
        )

    def facts(self):
        model = self.run.model
        results = self.about.get("scores", {})
        return health.Facts(
            images=len(self.run.data.train),
            batch_size=FLAGS.batch_size,
            step=self.step,
            steps=self.steps,
            queue_size=model.queue.size if hasattr(model, "queue") else None,
            teacher_momentum=getattr(model, "teacher_momentum", None),
            unreadable_images=results.get("unreadable_images"),
            test_images_in_train=results.get("test_images_in_train"),
            near_duplicates=self.seen.near_duplicates,
        )

    # ---------------------------------------------------------------------------- over the epochs

    def curves(self):
        queue = getattr(self.run.model, "queue", None)
        log_k = Level("log K", float(np.log(queue.size))) if queue and queue.size > 1 else None
        has_entropy = FLAGS.method in ("isd", "compress")
        of_anchors = has_entropy or FLAGS.method == "moco_v2"  # In nats, as log K is.
        drawn = [
            self.chart("Loss", {"loss": "loss"}, scale=log_k if of_anchors else None),
            self.chart(
                "Entropy of the similarities (nats)",
                {"teacher_entropy": "teacher", "student_entropy": "student"},
                levels=[log_k] if log_k and has_entropy else [],
            ),
            self.chart("Spread of the embeddings", {"embedding_std": "embedding_std"}),
            self.chart("Purity of the nearest anchors", {"purity": "purity"}, percent=True),
            self.chart("Length of the gradient", {"gradient_norm": "norm"}, logarithmic=True),
            self.chart("Learning rate", {"learning_rate": "learning rate"}),
            self.chart("Images a second", {"images_per_second": "images/s"}),
            self.chart("Time waiting for data", {"waiting_share": "share"}, percent=True),
        ]
        drawn = [chart for chart in drawn if chart]
        text = "" if drawn else f"There is nothing in {workdirs.METRICS}, as of older versions."
        return Section("Curves", text, charts=drawn)

    def chart(self, title, names, kind=None, levels=(), **how):
        # A run of a few steps has none that was logged.
        kind, lines = kind or ("steps" if self.metrics.steps else "epochs"), []
        for number, (name, text) in enumerate(names.items()):
            x, y = self.metrics.curve(name, kind)
            if len(x):
                lines.append(Line(text, x, y, number, dashed=number % 2 == 1))
        return charts.chart(title, lines, levels, **how) if lines else None

    def accuracies(self):
        both = [
            self.chart(
                f"{k}-NN accuracy",
                {f"teacher_{k}nn": "teacher", f"student_{k}nn": "student"},
                kind="epochs",
                levels=[
                    Level(text, self.scores[f"{name}_{k}nn"])
                    for name, text in (("raw_pixels", "raw pixels"), ("untrained", "untrained"))
                    if f"{name}_{k}nn" in self.scores
                ],
                percent=True,
            )
            for k in (1, 20)
        ]
        both = [chart for chart in both if chart]
        reason = run_data.reason_not_to_score(self.run.data) or "No epoch was scored."
        text = f"Of {self.run.data.test.name}." if both else reason
        return Section("Student and teacher", text, charts=both)

    # ------------------------------------------------------------------------ figures and recipe

    def score_table(self):
        rows = sorted(
            (shown(name), float(value))
            for name, value in self.scores.items()
            if isinstance(value, int | float)
        )
        text = "All figures of results.json; docs/evaluation.md explains the names."
        return Section("Scores", text, tables=[Table(("name", "value"), rows)] if rows else ())

    def recipe(self):
        flags = [line.removeprefix("--").partition("=") for line in self.about["recipe"]]
        flags = [(shown(name), shown(value)) for name, _, value in flags]
        versions = self.about.get("versions", {})
        rows = [(name, str(value)) for name, value in versions.items()]
        rows += [("hardware, where this page was written", hardware())]
        seconds = [x["seconds"] for x in self.metrics.epochs if x.get("seconds")]
        if seconds:
            rows.append(("time of the epochs that were logged whole", duration(sum(seconds))))
        if "initial_weights" in self.about:
            rows.append(("initial weights", shown(str(self.about["initial_weights"]["path"]))))
        if "teacher" in self.about:
            rows.append(("given teacher", shown(str(FLAGS.teacher))))
        tables = [Table(("flag", "value"), flags), Table(("what", "value"), rows)]
        return Section("Recipe", tables=tables)

    def commands(self):
        workdir = shlex.quote(str(self.run.workdir))
        flag_file = f"--flagfile={shlex.quote(str(self.run.workdir / 'run.flags'))}"
        run = f"python experiments/run.py {flag_file}"
        commands = [("Continue, if it was stopped", run)]
        if not run_data.reason_not_to_score(self.run.data):
            evaluate = f"{run} --stages=evaluate,report --evaluations=knn,fast_linear"
            commands.append(("Evaluate", evaluate))
        labelled = is_labelled(self.run.data.bank)
        data = " ".join(
            shlex.quote(f"--{name}={FLAGS[name].value}")
            for name in ("dataset", "data_dir", "image_list", "train_split", "test_split")
            if FLAGS[name].value
        )
        commands.append((
            "Finetune a classifier" + " on labelled images of yours" * (not labelled),
            f"python experiments/finetune.py --encoder={workdir} "
            f"{data if labelled else '--dataset=folder --data_dir=PATH'} "
            "--workdir=runs/classifier",
        ))  # fmt: skip
        text = "From the repository's root."
        if (self.run.workdir / "saved_model").exists():
            commands += [
                (
                    "Embed a collection",
                    f"python experiments/embed.py --images=PATH --model={workdir}/saved_model "
                    "--out=embeddings",
                ),
                (
                    "Serve (docs/serving.md)",
                    f"docker run -p 8501:8501 -v {shlex.quote(os.path.abspath(self.run.workdir))}"
                    "/saved_model:/models/encoder -e MODEL_NAME=encoder tensorflow/serving",
                ),
            ]
        else:
            text += " To embed images or to serve, export first: --stages=export,report."
        return Section("Commands", text, commands=commands)


def hardware() -> str:
    """Says what this machine computes with."""
    gpus = [
        tf.config.experimental.get_device_details(gpu).get("device_name", "a GPU")
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        processor = names[0] if names else processor
    except OSError:
        pass  # Not Linux.
    return ", ".join([*gpus, f"{joblib.cpu_count()} cores of {processor}"])
