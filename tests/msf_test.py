"""MSF against its paper's formula in numpy. As a model like the others: baselines_test.py."""

import numpy as np
import pytest
import tensorflow as tf
from small_models import INPUTS, B, K, linear_encoder, unit

import isd_tf
from isd_tf.methods import losses

RATE, MOMENTUM, NEIGHBORS = 0.5, 0.9, 3


def test_steps_equal_a_numpy_implementation_of_the_paper(float64):
    """Linear student, six steps: loss, student, teacher and queue, with a queue that wraps."""
    model = isd_tf.MSF(linear_encoder("float64"), None, None, K, NEIGHBORS, MOMENTUM)
    model.compile(isd_tf.TorchSGD(RATE, sgd_momentum=0.0, coupled_weight_decay=0.0))
    student = model.student_encoder.get_weights()[0]
    teacher, queue, pointer = student.copy(), model.queue.read_anchors().numpy(), 0
    queue_labels = np.full(K, -1)
    step = tf.function(model.train_step)
    random = np.random.default_rng(0)
    for _ in range(6):
        x_teacher, x_student = random.normal(size=(2, B, INPUTS))
        labels = random.integers(-1, 2, size=B)
        views = {"teacher_view": tf.constant(x_teacher), "student_view": tf.constant(x_student)}
        logs = step(views | {"label": tf.constant(labels)})

        z = x_student @ student
        q, k = unit(z), unit(x_teacher @ teacher)
        for row, label in zip(k, labels, strict=True):  # Before they are compared.
            queue[pointer], queue_labels[pointer] = row, label
            pointer = (pointer + 1) % K
        nearest = np.argsort(-(k @ queue.T), axis=1)[:, :NEIGHBORS]
        np.testing.assert_allclose(queue[nearest[:, 0]], k)  # Each image's own comes first.
        loss = ((q[:, np.newaxis] - queue[nearest]) ** 2).sum(axis=2).mean()
        g = -2 * queue[nearest].mean(axis=1) / B
        g = (g - q * (q * g).sum(1, keepdims=True)) / np.linalg.norm(z, axis=1, keepdims=True)
        student = student - RATE * x_student.T @ g
        teacher = MOMENTUM * teacher + (1 - MOMENTUM) * student
        matches = (queue_labels[nearest] == labels[:, np.newaxis]) & (labels[:, np.newaxis] >= 0)

        np.testing.assert_allclose(logs["loss"], loss, rtol=1e-10)
        np.testing.assert_allclose(logs["purity"], matches.mean(), rtol=1e-6)
        np.testing.assert_allclose(model.student_encoder.get_weights()[0], student, rtol=1e-10)
        np.testing.assert_allclose(model.teacher_encoder.get_weights()[0], teacher, rtol=1e-10)
        np.testing.assert_allclose(model.queue.read_anchors(), queue, rtol=1e-10)
        assert int(model.queue.pointer) == pointer


@pytest.mark.parametrize("chunk", [4, 7, 100])
def test_anchors_read_in_chunks_give_the_same(chunk, monkeypatch):
    random = np.random.default_rng(0)
    student, teacher, anchors = (tf.Variable(unit(random.normal(size=(n, 8)))) for n in (5, 5, 23))

    def compare():
        with tf.GradientTape() as tape:
            shift = losses.mean_shift(student, teacher, anchors, 6)
        by_student, *others = tape.gradient(shift.distance, [student, teacher, anchors])
        assert others == [None, None]
        return *shift, by_student

    at_once = compare()
    rows = np.argsort(-(teacher.numpy() @ anchors.numpy().T), axis=1)[:, :6]
    np.testing.assert_array_equal(at_once[1], rows)
    monkeypatch.setattr(losses, "STREAMED_FROM", 1)
    monkeypatch.setattr(losses, "CHUNK", chunk)
    for ours, expected in zip(compare(), at_once, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize("neighbors", [0, K + 1])
def test_more_neighbours_than_anchors_are_refused(neighbors):
    with pytest.raises(ValueError, match=rf"at most queue_size \({K}\).*{neighbors}"):
        isd_tf.MSF(linear_encoder(), None, None, K, neighbors)
