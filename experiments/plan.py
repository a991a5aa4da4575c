"""What a run would take: the stage `plan`, which times a few steps and leaves nothing behind."""

import math
import os
import pathlib
import resource
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable
from typing import NamedTuple

import auto
import run_data
import settings
import tensorflow as tf
from settings import FLAGS

from isd_tf.data.batches import evaluation_batches
from isd_tf.data.datasets import is_labelled
from isd_tf.evaluation import features
from isd_tf.methods import losses
from isd_tf.methods.student import Student
from isd_tf.report import health
from isd_tf.training import cluster
from isd_tf.training.monitoring import duration

COLUMNS, LABEL = 100, 18
FLOAT = 4  # bytes
# Calls of the train function that are timed; before them, where steps are quick, so many whose
# batches were read while the first one compiled.
FEWEST_CALLS, MOST_CALLS, SECONDS = 2, 30, 10
CALLS_READ_AHEAD = 3
KNN_BATCH, KNN_BATCHES = 64, 3
# Below so many images BatchNorm's statistics err much (Wu and He, Group Normalization, figure 1).
FEW_FOR_BATCH_NORM = 16
# Of all similarities of a step: both networks' and what their gradient needs (losses.py).
MATRICES = {"isd": 10, "compress": 10, "moco_v2": 3, "msf": 1, "byol": 0}
# And where anchors are streamed: of the similarities to a chunk, as the loop runs ten ahead (of
# student and teacher 21 each, docs/scaling.md, section 1), and of the anchors that they weight.
STREAMED = {"isd": (42, 12), "compress": (42, 12), "msf": (10, 0)}


class Timing(NamedTuple):
    """What the timed steps took."""

    steps: int
    seconds: float  # each
    waiting: float | None  # share of them, for data; None where it is not told


def show(model: Student, data: run_data.Data, chosen: list[str], batches: Iterable) -> str:
    """Takes a few steps and says, in a table, what the whole run would take.

    Called by all workers, as they take the steps together.

    Args:
        model: compiled, as the run would begin with it.
        data: of the run.
        chosen: what `auto` has become, and why.
        batches: of the run, from its first step on.
    """
    strategy = model.distribute_strategy
    timing = time_steps(model, batches)
    with cluster.failing_together(strategy):
        if not cluster.is_chief(strategy):
            return ""
        steps = len(data.train) // FLAGS.batch_size
        rows = [
            ("images", _images(data)),
            *(("auto", sentence) for sentence in chosen),
            ("steps", _steps(data.train, steps, strategy)),
            *(("memory", text) for text in memory(model)),
            *(("disk", text) for text in disk(model, steps)),
            *(("time", text) for text in _times(model, data, timing, steps)),
            *(("warnings", text) for text in warnings(model, data)),
        ]
    return table(rows)


def time_steps(model: Student, batches: Iterable) -> Timing:
    """Times steps as a run takes them, without the first ones. Called by all workers."""
    take, iterator = model.make_train_function(), iter(batches)
    float(take(iterator)["loss"])  # Compiles.
    start = time.monotonic()
    float(take(iterator)["loss"])
    calls = math.ceil(SECONDS / max(time.monotonic() - start, 1e-3))
    calls = min(max(calls, FEWEST_CALLS), MOST_CALLS)
    # One worker's clock decides for all.
    calls = int(cluster.gather_from_workers(model.distribute_strategy, calls)[0])
    for _ in range(min(CALLS_READ_AHEAD, calls - FEWEST_CALLS)):
        float(take(iterator)["loss"])
    waited, start = 0.0, time.monotonic()
    for _ in range(calls):
        logs = take(iterator)
        waited += float(logs.get("waiting_seconds", math.nan)) * model.steps_per_execution
    seconds = max(time.monotonic() - start, 1e-9)
    steps = calls * model.steps_per_execution
    return Timing(steps, seconds / steps, None if math.isnan(waited) else waited / seconds)


def memory(model: Student) -> list[str]:
    """What a step holds on each device, and what the process has held so far."""
    student = [v for network in model.student_networks() for v in network.variables]
    queue = model.queue.variables if hasattr(model, "queue") else []
    others = {id(v) for v in (*student, *queue, model.step)}
    teacher = [v for v in model.variables if id(v) not in others]
    if FLAGS.method == "compress":
        teacher = model.encoders()["teacher"].variables
    replicas = model.distribute_strategy.num_replicas_in_sync
    parts = {
        f"student's {_count(student)} weights": nbytes(student),
        f"teacher's {_count(teacher)}": nbytes(teacher),
        "gradients": nbytes(model.trainable_variables),
        "optimizer": nbytes(model.optimizer.variables),
        "queue": nbytes(queue),
        "similarities": similarities(FLAGS.batch_size // replicas, model),
    }
    held = ", ".join(f"{name} {size(value)}" for name, value in parts.items() if value)
    total = f"{held}: {size(sum(parts.values()))}"
    total += " on each of the devices" if replicas > 1 else ""
    return [f"{total}, besides the activations", f"so far {_most_memory()}"]


def similarities(images: int, model: Student) -> int:
    """Bytes of a replica's similarities to the queue, for so many images a step."""
    if not hasattr(model, "queue"):
        return 0
    anchors, dimension = model.queue.rows.shape
    if images * anchors >= losses.STREAMED_FROM and FLAGS.method in STREAMED:
        of_chunk, of_sums = STREAMED[FLAGS.method]
        return images * (of_chunk * losses.CHUNK + of_sums * dimension) * FLOAT
    return MATRICES[FLAGS.method] * images * anchors * FLOAT


def disk(model: Student, steps_per_epoch: int) -> list[str]:
    """What the checkpoints take."""
    each, forever = nbytes([*model.variables, *model.optimizer.variables]), kept_for_good()
    text = f"checkpoints of {size(each)}, at most {size(most_of_disk(model))} at a time"
    text += f" ({forever} of them for good)" if forever else ""
    written = saves(FLAGS.epochs * steps_per_epoch, steps_per_epoch)
    written -= saves(_taken(), steps_per_epoch)
    text += f"; {written} are written, {size(written * each)} in all; {size(free_disk())} are free"
    return [text]


def kept_for_good() -> int:
    """How many checkpoints of the whole training are never removed."""
    return FLAGS.epochs // FLAGS.keep_every_epochs if FLAGS.keep_every_epochs else 0


def most_of_disk(model: Student) -> int:
    """Bytes that all checkpoints take at most."""
    each = nbytes([*model.variables, *model.optimizer.variables])
    # The new one is written before an old one goes.
    return (FLAGS.keep_checkpoints + 1 + kept_for_good()) * each


def saves(steps: int, steps_per_epoch: int) -> int:
    """How often so many steps are saved: at the ends of epochs, and every few steps."""
    saved = steps // steps_per_epoch
    if every := FLAGS.checkpoint_every_steps:
        saved += steps // every - steps // math.lcm(every, steps_per_epoch)
    return saved


def free_disk() -> int:
    """Free bytes where the workdir is, or will be."""
    path = pathlib.Path(FLAGS.workdir).absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def warnings(model: Student, data: run_data.Data) -> list[str]:
    """What can be known before the training, and might be regretted after it."""
    images = len(data.train)
    steps = images // FLAGS.batch_size * FLAGS.epochs
    found = [queue_warning(images), few_images_warning(images)]
    if hasattr(model, "queue") and steps * FLAGS.batch_size < FLAGS.queue_size:
        found.append(
            f"The queue of {FLAGS.queue_size} is never filled: all {steps} steps bring "
            f"{steps * FLAGS.batch_size} embeddings, and the rest stays random."
        )
    momentum = FLAGS.teacher_momentum if FLAGS.method != "compress" else 0
    if momentum and steps * (1 - momentum) < health.TEACHER_LIVES:
        found.append(
            f"--teacher_momentum={momentum:g} keeps the teacher {1 / max(1 - momentum, 1e-9):.0f} "
            f"steps behind, and there are {steps}: it hardly leaves its random weights. Use more "
            "--epochs or a lower momentum."
        )
    synchronized, groups = settings.batch_norm()
    replicas = 1 if synchronized else model.distribute_strategy.num_replicas_in_sync
    alike = FLAGS.batch_size // (replicas * groups)
    if alike < FEW_FOR_BATCH_NORM:
        found.append(
            f"BatchNorm sees {alike} images at a time, whose mean says little. Use a larger "
            "--batch_size, or --batch_norm=synchronized on several devices."
        )
    left_out = images % FLAGS.batch_size
    if left_out * 10 > images:
        found.append(f"{left_out} of {images} images have no place in an epoch's whole batches.")
    if FLAGS.knn_every_epochs and (reason := run_data.reason_not_to_score(data)):
        found.append(f"Nothing is scored by kNN: {reason}")
    if (needed := most_of_disk(model)) > free_disk():
        found.append(
            f"The disk does not suffice: {size(needed)} of checkpoints, {size(free_disk())} free. "
            "Lower --keep_checkpoints, or use a --workdir elsewhere."
        )
    return [text for text in found if text]


def queue_warning(images: int) -> str:
    """Why the queue is too large for so many images, or nothing."""
    if "queue_size" not in settings.METHODS[FLAGS.method] or FLAGS.queue_size <= images:
        return ""
    return (
        f"The queue ({FLAGS.queue_size}) is larger than the dataset ({images} images): images "
        "will meet older keys of themselves among their anchors."
    )


def few_images_warning(images: int) -> str:
    """What to expect of so few images, and what to do instead; or nothing."""
    if images >= auto.FEW_IMAGES or FLAGS.method == "compress" or FLAGS.initial_weights:
        return ""
    return (
        f"{images} images are few. Expect an encoder for images much like these, better than an "
        "untrained one (figures: docs/settings.md); of what they do not show it learns nothing. "
        "Given weights (--initial_weights), or a trained network as the teacher "
        "(--method=compress, docs/distillation.md), bring what other images have taught."
    )


def table(rows: list[tuple[str, str]]) -> str:
    """Lays out labels and texts in COLUMNS; a label stands once for the rows that share it."""
    lines, last = [], None
    for label, text in rows:
        wrapped = textwrap.wrap(text, COLUMNS - LABEL)
        lines.append(f"{label if label != last else '':{LABEL}}{wrapped[0]}")
        lines += [" " * LABEL + line for line in wrapped[1:]]
        last = label
    return "\n".join(lines)


def nbytes(variables: Iterable) -> int:
    return sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables)


def size(count: float) -> str:
    """Bytes in words: 45.1 MB."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(int(math.log10(max(count, 1)) / 3), len(units) - 1)
    return f"{count / 1000**power:.3g} {units[power]}"


def _images(data):
    text = f"{len(data.train)} to train on, "
    classes = f"of {len(data.train.class_names)} classes"
    text += classes if is_labelled(data.train) else "without labels"
    return text + (f"; {len(data.test)} to test" if data.test else "; none to test")


def _steps(train, steps, strategy):
    replicas = strategy.num_replicas_in_sync
    shared = f" on {replicas} devices, {FLAGS.batch_size // replicas} each" if replicas > 1 else ""
    text = (
        f"{steps * FLAGS.epochs}: {FLAGS.epochs} epochs of {steps}, each of {FLAGS.batch_size} "
        f"images{shared}"
    )
    left_out = len(train) % FLAGS.batch_size
    return text + (
        f"; {left_out} images, others each time, are left out of an epoch" * bool(left_out)
    )


def _times(model, data, timing, steps_per_epoch):
    steps = steps_per_epoch * FLAGS.epochs
    waiting = "" if timing.waiting is None else f", {timing.waiting:.0%} of it waiting for data"
    left = steps - _taken()
    yield (
        f"{timing.seconds:.3g} s a step ({timing.steps} timed{waiting}), "
        f"{FLAGS.batch_size / timing.seconds:.0f} images/s"
    )
    yield f"{duration(left * timing.seconds)} for {'the remaining ' * (left < steps)}{left} steps"
    every = FLAGS.knn_every_epochs
    if every and not run_data.reason_not_to_score(data):
        scored = len(data.bank) + len(data.test)
        each = scored * _seconds_to_embed(model, data.bank)
        times = FLAGS.epochs // every - _taken() // steps_per_epoch // every
        yield f"{duration(times * each)} for {times} kNN scores, {duration(each)} each"
    yield "not in it: writing checkpoints, the evaluation and the export at the end"


def _taken():
    """Steps that the run has taken already."""
    names = os.listdir(path) if os.path.isdir(path := f"{FLAGS.workdir}/checkpoints") else []
    steps = [name.removeprefix("step-") for name in names]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def _seconds_to_embed(model, bank):
    """Of an image, by student and teacher."""
    batches = evaluation_batches(bank, FLAGS.image_size, KNN_BATCH).repeat()
    chunks = features.in_chunks(model.encoders(), batches.take(1 + KNN_BATCHES), 1)
    next(chunks)  # Compiles.
    start = time.monotonic()
    images = sum(len(labels) for _, labels in chunks)
    return (time.monotonic() - start) / images


def _count(variables):
    """How many weights, in words: 11.2 M."""
    count = sum(math.prod(v.shape) for v in variables)
    return f"{count / 1e6:.3g} M" if count >= 1e5 else f"{count:,}".replace(",", " ")


def _most_memory():
    gpus = tf.config.list_logical_devices("GPU")
    if gpus:
        peaks = [tf.config.experimental.get_memory_info(gpu.name)["peak"] for gpu in gpus]
        return f"at most {size(max(peaks))} on a GPU"
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"the training itself has taken {size(most)} at most, of the machine's {size(there)}"
