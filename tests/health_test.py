import math

import pytest

from isd_tf.report import health
from isd_tf.report.health import BAD, GOOD, WARNING, Facts
from isd_tf.training.metrics import Metrics

SOUND = Facts(
    images=10_000, batch_size=100, step=1000, steps=1000, queue_size=1024, teacher_momentum=0.99,
    unreadable_images=0, test_images_in_train=0, near_duplicates=(0, 500, 9000, 10_000),
)  # fmt: skip
SCORES = {"student_1nn": 0.8, "teacher_1nn": 0.8, "untrained_1nn": 0.5, "raw_pixels_1nn": 0.4}
LOG_K = math.log(1024)


def metrics_of(unreadable_lines=0, **changes):
    """40 logged steps, and their epochs; values are numbers, or functions of the share done."""
    values = {
        "loss": lambda done: 2 - done, "embedding_std": 0.7, "teacher_entropy": 3.0,
        "gradient_norm": 1.0, "waiting_share": 0.05, "images_per_second": 1000.0,
    } | changes  # fmt: skip

    def line(kind, number):
        done = number / 40
        known = {k: v(done) if callable(v) else v for k, v in values.items()}
        return {"kind": kind, "step": 25 * number, "epoch": 10 * done} | known

    numbers = range(1, 41)
    epochs = [line("epoch", number) for number in numbers if number % 4 == 0]
    return Metrics([line("step", number) for number in numbers], epochs, unreadable_lines)


def found(metrics=None, facts=SOUND, scores=SCORES):
    return health.examine(metrics or metrics_of(), facts, scores)


def test_of_a_sound_run_everything_is_good():
    findings = found()
    assert {finding.level for finding in findings} == {GOOD} and len(findings) == 8


def at(share, value, before):
    return lambda done: value if done > share else before


# Of each: what differs from the sound run, how bad that is, what is said, and its evidence.
CASES = [
    ({"embedding_std": 1e-4}, {}, {}, BAD, "collapsed", "embedding_std 0.0001"),
    ({"embedding_std": 0.1}, {}, {}, WARNING, "little of the sphere", "0.1"),
    ({"teacher_entropy": 0.98 * LOG_K}, {}, {}, BAD, "queue is dead", "log K 6.93"),
    ({}, {"queue_size": 20_000}, {}, WARNING, "larger than the data", "20000 anchors, 10000"),
    ({}, {"step": 5}, {}, WARNING, "not yet full", "500 of 1024 anchors"),
    ({}, {}, {"teacher_1nn": 0.7}, WARNING, "behind the student", "teacher 70.0%, student 80.0%"),
    ({}, {"teacher_momentum": 0.999}, {}, WARNING, "too slowly", "1000 steps, of 1000"),
    ({}, {"teacher_momentum": 1.0}, {}, WARNING, "too slowly", "inf steps"),
    ({"loss": lambda done: 2 + 0.01 * done}, {}, {}, WARNING, "loss is flat", "2.0"),
    ({"loss": lambda done: None if done > 0.5 else 2 - done}, {}, {}, BAD, "no number", "20 of 40"),
    ({"gradient_norm": at(0.9, None, 1.0)}, {}, {}, WARNING, "not finite", "4 of 40"),
    ({"gradient_norm": at(0.6, 50.0, 1.0)}, {}, {}, WARNING, "gradients grow", "1 at first, 50"),
    ({"waiting_share": 0.6}, {}, {}, WARNING, "wait for images", "60% of the time"),
    ({}, {"unreadable_images": 7}, {}, WARNING, "cannot be read", "7 of 10000"),
    ({}, {"test_images_in_train": 3}, {}, WARNING, "are training images too", "3 byte for byte"),
    ({}, {"near_duplicates": (9, 500, 9000, 10_000)}, {}, WARNING, "nearly the same",
     "9 of 500 test images looked at, among 9000 of 10000"),
    ({}, {}, {"initial_1nn": 0.95}, BAD, "worse than the weights it began with", "with 95.0%"),
    ({}, {}, {"initial_1nn": 0.8}, WARNING, "no better than the weights it began", "with 80.0%"),
    ({"student_entropy": 0.98 * LOG_K}, {"teacher_momentum": None}, {}, BAD,
     "sees nothing of what its teacher", "log K 6.93"),
    ({}, {}, {"student_1nn": 0.505, "teacher_1nn": 0.5}, WARNING, "no better", "student 50.5%"),
    ({}, {}, {"student_1nn": 0.3, "teacher_1nn": 0.3}, BAD, "worse than without", "student 30.0%"),
    ({"unreadable_lines": 2}, {}, {}, WARNING, "lines of the metrics", "2 lines"),
]  # fmt: skip


@pytest.mark.parametrize("changes, facts, scores, level, sentence, evidence", CASES)
def test_what_is_not_as_it_should_be_is_said_first(
    changes, facts, scores, level, sentence, evidence
):
    findings = found(metrics_of(**changes), SOUND._replace(**facts), SCORES | scores)
    first = findings[0]
    assert first.level == level and sentence in first.sentence and evidence in first.evidence
    # And nothing else is wrong.
    assert [finding.level for finding in findings[1:]] == [GOOD] * (len(findings) - 1)


def test_a_rising_loss_is_no_fault():
    findings = found(metrics_of(loss=lambda done: 1 + done))
    assert any("risen" in x.sentence and x.level == GOOD for x in findings)


def test_the_loss_is_judged_once_the_queue_is_full():
    """The first tenth of the images, while it fills, has another loss."""
    changed = metrics_of(loss=at(0.09, 2.0, 9.0))
    assert any("flat" in x.sentence for x in found(changed, SOUND._replace(queue_size=10_000)))
    assert not any("flat" in x.sentence for x in found(changed, SOUND._replace(queue_size=None)))


@pytest.mark.parametrize("student, said", [(0.85, "above"), (0.75, "below")])
def test_a_given_teacher_is_no_fault_wherever_it_stands(student, said):
    facts = SOUND._replace(teacher_momentum=None)
    # The spread is that of the teacher's embeddings, which says nothing of the student's.
    changed = metrics_of(embedding_std=1e-4, student_entropy=3.0)
    findings = found(changed, facts, SCORES | {"student_1nn": student})
    assert {x.level for x in findings} == {GOOD}
    for text in (f"{said} its teacher", "finds some anchors nearer than others"):
        assert any(text in x.sentence for x in findings)


def test_of_what_is_unknown_nothing_is_said():
    nothing = Metrics([], [], 0)
    facts = Facts(10, 2, 0, 10, None, None)
    assert health.examine(nothing, facts, {}) == []
    assert len(health.examine(nothing, SOUND, {})) == 2  # Of the queue, and of near-duplicates.
