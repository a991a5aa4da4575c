import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies

from isd_tf.methods import losses


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
    assert tape.gradient(result.teacher_entropy, student) is None


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


def compare(form, inputs, temperatures, neighbors=0):
    student, teacher, anchors, weights = inputs
    with tf.GradientTape() as tape:
        tape.watch(student)
        result = form(student, teacher, anchors, *temperatures, neighbors)
        loss = tf.reduce_sum(weights * result.divergence)
    return result, tape.gradient(loss, student)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    batch=strategies.integers(1, 32),
    size=strategies.integers(20, 200),
    dimension=strategies.integers(2, 128),
    chunk=strategies.integers(1, 220),
    student_temperature=strategies.floats(0.01, 0.2),
    teacher_temperature=strategies.floats(0.01, 0.2),
    neighbors=strategies.integers(1, 20),
    seed=strategies.integers(0, 2**32 - 1),
)
def check_streaming_equals_comparing_at_once(
    dtype,
    tolerance,
    batch,
    size,
    dimension,
    chunk,
    student_temperature,
    teacher_temperature,
    neighbors,
    seed,
):
    # Products of fewer rows or columns go by other kernels, which in float32 round otherwise.
    hypothesis.assume(dtype == "float64" or (batch >= 16 and chunk > 1))
    random = np.random.default_rng(seed)
    rows = [unit_rows(random, count, dimension) for count in (batch, batch, size)]
    inputs = [tf.constant(value, dtype) for value in (*rows, random.uniform(0.5, 1, batch))]
    temperatures = student_temperature, teacher_temperature
    at_once, gradient = compare(losses._compare_at_once, inputs, temperatures, neighbors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK", chunk)
        streamed, streamed_gradient = compare(
            losses._compare_in_chunks, inputs, temperatures, neighbors
        )
    for ours, theirs in (
        (streamed.divergence, at_once.divergence),
        (streamed.teacher_entropy, at_once.teacher_entropy),
        (streamed.student_entropy, at_once.student_entropy),
        (streamed_gradient, gradient),
    ):
        # Of values near zero, as the entropy of one certain anchor, neither form has many digits.
        assert np.abs(ours - theirs).max() <= tolerance * max(1.0, np.abs(theirs).max())
    np.testing.assert_array_equal(streamed.nearest, at_once.nearest)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_streaming_over_chunks_equals_comparing_at_once(dtype, tolerance):
    check_streaming_equals_comparing_at_once(dtype, tolerance)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_large_queue_is_streamed_and_no_tensor_spans_batch_and_queue(streamed, monkeypatch):
    batch, size = 6, 1009
    monkeypatch.setattr(losses, "STREAMED_FROM", batch * size + (not streamed))
    monkeypatch.setattr(losses, "CHUNK", 64)
    inputs = [tf.zeros(shape) for shape in ((batch, 5), (batch, 5), (size, 5), (batch,))]
    run = tf.function(lambda: compare(losses.similarity_distillation, inputs, (0.1, 0.02), 3))

    graph = run.get_concrete_function().graph.as_graph_def(add_shapes=True)
    nodes = [*graph.node, *(node for body in graph.library.function for node in body.node_def)]
    shapes = {
        tuple(dimension.size for dimension in shape.dim)
        for node in nodes
        for shape in node.attr["_output_shapes"].list.shape
    }
    assert any(node.op in ("While", "StatelessWhile") for node in nodes) == streamed
    spanning = {shape for shape in shapes if size in shape and {batch, 2 * batch} & {*shape}}
    assert bool(spanning) != streamed
    # The loop's tensors are among those looked at: a chunk's length is not known beforehand.
    assert ((2 * batch, -1) in shapes) == streamed
