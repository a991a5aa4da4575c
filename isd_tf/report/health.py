"""How a training is, in plain words, with the evidence for each."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from isd_tf.training.metrics import Metrics

GOOD, WARNING, BAD = "good", "warning", "bad"
# Spread of unit embeddings, of which 1 is the whole sphere's.
COLLAPSED_STD, NARROW_STD = 0.01, 0.2
# Share of log K from which similarities are as good as equal.
NO_STRUCTURE = 0.97
# Accuracies that differ by less are called equal.
SAME_ACCURACY = 0.01
# Relative change of the loss over a training below which it is called flat.
FLAT = 0.02
MUCH_WAITING = 0.25
BEGINNING = "weights it began with"
# Times that a teacher must have forgotten all but 1/e of what it began with.
TEACHER_LIVES = 5


class Finding(NamedTuple):
    """One thing that is as it should be, or is not."""

    level: str  # GOOD, WARNING or BAD
    sentence: str
    evidence: str


class Facts(NamedTuple):
    """What is known of a run besides its metrics; None: not known, or there is none."""

    images: int  # trained on
    batch_size: int
    step: int  # reached
    steps: int  # of the whole training
    queue_size: int | None
    teacher_momentum: float | None  # None: the teacher stands still
    unreadable_images: int | None = None
    test_images_in_train: int | None = None  # byte for byte
    # Found, test images asked, and among how many of how many training images.
    near_duplicates: tuple[int, int, int, int] | None = None


def examine(metrics: Metrics, facts: Facts, scores: dict[str, float]) -> list[Finding]:
    """Looks at everything that can be looked at; the worst first.

    Args:
        metrics: of the run.
        facts: of the run.
        scores: accuracies by knn_accuracy's names, the newest ones.
    """
    checks = (_learning, _collapse, _queue, _teacher, _loss, _gradients, _waiting, _images)
    found = [finding for check in checks for finding in check(metrics, facts, scores)]
    if metrics.unreadable_lines:
        found.append(
            Finding(
                WARNING,
                "Some lines of the metrics cannot be read, as after a kill. They are left out.",
                f"{metrics.unreadable_lines} lines",
            )
        )
    return sorted(found, key=lambda finding: (BAD, WARNING, GOOD).index(finding.level))


def _learning(metrics, facts, scores) -> Iterator[Finding]:
    student = scores.get("student_1nn")
    references = {
        text: scores[name]
        for name, text in (
            ("raw_pixels_1nn", "raw pixels"),
            ("untrained_1nn", "untrained"),
            ("initial_1nn", BEGINNING),
        )
        if name in scores
    }
    if student is None or not references:
        return
    best = max(references, key=references.get)
    than = f"the {BEGINNING}" if best == BEGINNING else "without any training"
    evidence = ", ".join(f"{text} {value:.1%}" for text, value in references.items())
    evidence = f"1-NN: student {student:.1%}, {evidence}"
    if student > references[best] + SAME_ACCURACY:
        yield Finding(GOOD, "The student has learned to tell classes apart.", evidence)
    elif student < references[best] - SAME_ACCURACY:
        yield Finding(BAD, f"The student tells classes apart worse than {than}.", evidence)
    else:
        yield Finding(WARNING, f"The student is no better than {than}.", evidence)


def _collapse(metrics, facts, scores):
    if facts.teacher_momentum is None:  # Then the embeddings are those of the given teacher.
        yield from _taught(metrics, facts)
        return
    std = metrics.last("embedding_std")
    if std is None:
        return
    evidence = f"embedding_std {std:.3g}; 1 is the whole sphere, 0 a single point"
    if std < COLLAPSED_STD:
        yield Finding(
            BAD,
            "The embeddings have collapsed: all images have nearly the same. Are the images all "
            "alike? If not, try a lower learning rate or a higher teacher momentum.",
            evidence,
        )
    elif std < NARROW_STD:
        yield Finding(WARNING, "The embeddings fill little of the sphere.", evidence)
    else:
        yield Finding(GOOD, "The embeddings are spread out, not collapsed.", evidence)


def _taught(metrics, facts):
    """Whether a student of a given teacher sees any anchor nearer than others."""
    entropy = metrics.last("student_entropy")
    if entropy is None or (facts.queue_size or 0) < 2:
        return
    log_k = math.log(facts.queue_size)
    evidence = f"student's entropy {entropy:.2f} nats, log K {log_k:.2f}"
    if entropy > NO_STRUCTURE * log_k:
        yield Finding(
            BAD,
            "The student finds all anchors equally near: it sees nothing of what its teacher "
            "sees. Try another --learning_rate.",
            evidence,
        )
    else:
        yield Finding(GOOD, "The student finds some anchors nearer than others.", evidence)


def _queue(metrics, facts, scores):
    size = facts.queue_size
    if size is None:
        return
    seen = facts.step * facts.batch_size
    evidence = f"{size} anchors, {facts.images} images"
    if size > facts.images:
        yield Finding(
            WARNING,
            "The queue is larger than the data: images meet older keys of themselves. Lower "
            "--queue_size.",
            evidence,
        )
    elif seen >= size:
        yield Finding(GOOD, "The queue holds images, and is not larger than the data.", evidence)
    if seen < size:
        yield Finding(
            WARNING,
            "The queue is not yet full of images: the rest of it is random.",
            f"{seen} of {size} anchors",
        )
    entropy = metrics.last("teacher_entropy")
    if entropy is None or size < 2 or seen < size:
        return
    evidence = f"teacher's entropy {entropy:.2f} nats, log K {math.log(size):.2f}"
    if entropy > NO_STRUCTURE * math.log(size):
        yield Finding(
            BAD,
            "The queue is dead: the teacher finds all anchors equally near. Lower its "
            "temperature, if the embeddings have not collapsed.",
            evidence,
        )
    else:
        near = math.exp(entropy)
        yield Finding(
            GOOD, f"The teacher finds about {near:.0f} anchors near to an image.", evidence
        )


def _teacher(metrics, facts, scores):
    student, teacher = scores.get("student_1nn"), scores.get("teacher_1nn")
    known = student is not None and teacher is not None
    evidence = f"1-NN: teacher {teacher:.1%}, student {student:.1%}" if known else ""
    if facts.teacher_momentum is None:
        if known:
            share = "above" if student > teacher else "below"
            yield Finding(
                GOOD, f"The student is {share} its teacher, which stands still.", evidence
            )
        return
    if known and teacher < student - 2 * SAME_ACCURACY:
        yield Finding(
            WARNING,
            "The teacher is behind the student, which it should be ahead of or beside. Lower "
            "--teacher_momentum, or train longer.",
            evidence,
        )
    elif known:
        yield Finding(GOOD, "The teacher is not behind the student.", evidence)
    memory = 1 / (1 - facts.teacher_momentum) if facts.teacher_momentum < 1 else math.inf
    if TEACHER_LIVES * memory > facts.steps:
        yield Finding(
            WARNING,
            "The teacher hardly leaves its beginning: it moves too slowly for so short a training. "
            "Lower --teacher_momentum, or train longer.",
            f"it averages over about {memory:.0f} steps, of {facts.steps} in all",
        )


def _loss(metrics, facts, scores):
    epochs, losses = metrics.curve("loss")
    if len(losses) < len(metrics.steps):
        yield Finding(
            BAD,
            "The loss was no number in some steps. Lower --learning_rate.",
            f"{len(metrics.steps) - len(losses)} of {len(metrics.steps)} logged steps",
        )
    # While the queue fills with images, the loss tells of its random rows.
    filled = epochs * facts.images >= (facts.queue_size or 0)
    losses = losses[filled] if filled.any() else losses
    if len(losses) < 20:
        return
    parts = [part.mean() for part in np.array_split(losses, 10)]
    change = (max(parts) - min(parts)) / max(abs(max(parts)), 1e-12)
    evidence = f"first tenth {parts[0]:.4g}, last tenth {parts[-1]:.4g}"
    if change < FLAT:
        yield Finding(
            WARNING,
            "The loss is flat. If it is not at its end, try a higher --learning_rate.",
            evidence,
        )
    elif parts[-1] < parts[0]:
        yield Finding(GOOD, "The loss has fallen.", evidence)
    else:
        yield Finding(
            GOOD,
            "The loss has risen, as it does while the teacher learns to see more.",
            evidence,
        )


def _gradients(metrics, facts, scores):
    logged = [line for line in metrics.steps if "gradient_norm" in line]
    _, norms = metrics.curve("gradient_norm")
    if len(norms) < len(logged):
        yield Finding(
            WARNING,
            "Some gradients were not finite, and their steps left out. A few are usual with "
            "mixed_float16.",
            f"{len(logged) - len(norms)} of {len(logged)} logged steps",
        )
    if len(norms) < 20:
        return
    first, last = (np.median(part) for part in (norms[: len(norms) // 4], norms[-10:]))
    if last > 20 * first:
        yield Finding(
            WARNING,
            "The gradients grow. Lower --learning_rate if the loss jumps.",
            f"median length {first:.3g} at first, {last:.3g} now",
        )


def _waiting(metrics, facts, scores):
    share, rate = metrics.last("waiting_share"), metrics.last("images_per_second")
    if share is None or rate is None:
        return
    evidence = f"{share:.0%} of the time waiting for a batch, {rate:.4g} images/s"
    if share > MUCH_WAITING:
        yield Finding(
            WARNING,
            "Steps wait for images: reading and cropping them is the bottleneck. Faster disks, "
            "more cores or --data_service help.",
            evidence,
        )
    else:
        yield Finding(GOOD, "The networks are the bottleneck, not the images.", evidence)


def _images(metrics, facts, scores):
    if facts.unreadable_images:
        yield Finding(
            WARNING,
            "Some images cannot be read, and were replaced. --stages=check lists them.",
            f"{facts.unreadable_images} of {facts.images}",
        )
    if facts.test_images_in_train:
        yield Finding(
            WARNING,
            "Some test images are training images too, so that scores are too high.",
            f"{facts.test_images_in_train} byte for byte",
        )
    if facts.near_duplicates is None:
        return
    found, asked, searched, total = facts.near_duplicates
    among = f"among {searched} of {total} training images"
    if found:
        yield Finding(
            WARNING,
            "Some test images are nearly the same as training images, so that scores are too high.",
            f"{found} of {asked} test images looked at, {among}",
        )
    else:
        yield Finding(
            GOOD,
            "No test image looks the same as a training image, as far as was looked.",
            f"{asked} test images looked at, {among}",
        )
