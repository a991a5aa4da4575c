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


CASES = [  # B, K, D, chunk, student's and teacher's temperature
    *((4, 50, 8, 7, 0.1, 0.02), (3, 64, 16, 64, 0.02, 0.02), (8, 1000, 32, 128, 0.2, 0.01)),
    *((5, 33, 4, 1, 0.1, 0.05), (2, 9, 3, 100, 1.0, 0.5), (16, 300, 64, 299, 0.1, 0.1)),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 5e-6)])
def test_streaming_over_chunks_equals_comparing_at_once(case, dtype, tolerance, monkeypatch):
    batch, size, dimension, chunk, student_temperature, teacher_temperature = case
    monkeypatch.setattr(losses, "CHUNK", chunk)
    random = np.random.default_rng(size)
    student, teacher, anchors = (
        tf.constant(unit_rows(random, count, dimension), dtype) for count in (batch, batch, size)
    )
    weights = tf.constant(random.uniform(size=batch), dtype)
    results = []
    for streamed_from in (2**60, 0):
        monkeypatch.setattr(losses, "STREAMED_FROM", streamed_from)

        @tf.function
        def run():
            with tf.GradientTape() as tape:
                tape.watch(student)
                result = losses.similarity_distillation(
                    student, teacher, anchors, student_temperature, teacher_temperature, 3
                )
                loss = tf.reduce_sum(weights * result.divergence)
            return result, tape.gradient(loss, student)

        assert ("while" in str(run.get_concrete_function().graph.as_graph_def())) == (
            streamed_from == 0
        )
        results.append(run())
    (at_once, gradient), (streamed, streamed_gradient) = results
    for ours, theirs in (
        (streamed.divergence, at_once.divergence),
        (streamed.teacher_entropy, at_once.teacher_entropy),
        (streamed.student_entropy, at_once.student_entropy),
        (streamed_gradient, gradient),
    ):
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()
    np.testing.assert_array_equal(streamed.nearest, at_once.nearest)
