import numpy as np
import pytest
import tensorflow as tf

from isd_tf import losses


def unit_rows(random, count, dimension):
    rows = random.normal(size=(count, dimension))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.fixture
def embeddings():
    random = np.random.default_rng(0)
    return unit_rows(random, 5, 8), unit_rows(random, 5, 8), unit_rows(random, 33, 8)


def test_divergence_and_entropies_equal_the_papers_formula(embeddings):
    student, teacher, anchors = embeddings
    p, q = softmax(teacher @ anchors.T / 0.02), softmax(student @ anchors.T / 0.1)

    result = losses.similarity_distillation(
        *map(tf.constant, embeddings), student_temperature=0.1, teacher_temperature=0.02
    )

    np.testing.assert_allclose(result.divergence, (p * np.log(p / q)).sum(1), rtol=1e-12)
    np.testing.assert_allclose(result.teacher_entropy, -(p * np.log(p)).sum(1), rtol=1e-12)
    np.testing.assert_allclose(result.student_entropy, -(q * np.log(q)).sum(1), rtol=1e-12)


def test_divergence_is_zero_for_equal_embeddings_and_temperatures(embeddings):
    student, _, anchors = embeddings
    result = losses.similarity_distillation(student, student, tf.constant(anchors), 0.05, 0.05)
    np.testing.assert_allclose(result.divergence, np.zeros(5), atol=1e-14)


def test_entropy_is_log_k_where_all_anchors_are_equal(embeddings):
    student, teacher, anchors = embeddings
    same = np.repeat(anchors[:1], 33, axis=0)
    result = losses.similarity_distillation(student, teacher, tf.constant(same), 0.1, 0.02)
    np.testing.assert_allclose(result.teacher_entropy, np.full(5, np.log(33)), rtol=1e-12)
    np.testing.assert_allclose(result.student_entropy, np.full(5, np.log(33)), rtol=1e-12)


def test_gradient_is_the_difference_of_probabilities_and_spares_the_teacher(embeddings):
    student, teacher, anchors = map(tf.constant, embeddings)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([student, teacher, anchors])
        result = losses.similarity_distillation(student, teacher, anchors, 0.1, 0.02)
        total = tf.reduce_sum(result.divergence)

    p = softmax(embeddings[1] @ embeddings[2].T / 0.02)
    q = softmax(embeddings[0] @ embeddings[2].T / 0.1)
    expected = (q - p) @ embeddings[2] / 0.1
    np.testing.assert_allclose(tape.gradient(total, student), expected, rtol=1e-11)
    assert tape.gradient(total, teacher) is None
    assert tape.gradient(total, anchors) is None


def test_improbable_anchors_still_get_a_gradient_in_float32():
    # Probabilities of 1e-20: a KL of clipped probabilities would ignore these anchors.
    student = tf.constant([[1.0, 0.0]])
    anchors = tf.constant([[1.0, 0.0], [-1.0, 0.0]])
    with tf.GradientTape() as tape:
        tape.watch(student)
        result = losses.similarity_distillation(
            student, tf.constant([[-1.0, 0.0]]), anchors, 0.05, 0.05
        )
    np.testing.assert_allclose(result.divergence, [40.0], rtol=1e-6)
    np.testing.assert_allclose(tape.gradient(result.divergence, student)[0, 0], 40.0, rtol=1e-6)


def test_nearest_are_those_of_the_teacher(embeddings):
    student, teacher, anchors = embeddings
    result = losses.similarity_distillation(
        student, teacher, tf.constant(anchors), 0.1, 0.02, neighbors=5
    )
    expected = np.argsort(-(teacher @ anchors.T), axis=1)[:, :5]
    np.testing.assert_array_equal(result.nearest, expected)
