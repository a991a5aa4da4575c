import keras
import numpy as np
import pytest
import tensorflow as tf

import isd_tf


def make_pair(momentum, heads=isd_tf.isd_plus_heads):
    keras.utils.set_random_seed(0)
    encoder = isd_tf.build_encoder("tiny_resnet", 16, 4)
    pair = isd_tf.StudentTeacher(encoder, *heads(16), teacher_momentum=momentum)
    pair.compile(isd_tf.TorchSGD(0.1))
    return pair


VIEWS = tf.constant(np.random.default_rng(0).normal(size=(8, 16, 16, 3)), tf.float32)


def move_student(pair):
    for variable in pair.trainable_variables:
        variable.assign(variable + 1.0)


def test_teacher_starts_as_a_copy_with_its_own_variables():
    pair = make_pair(0.9)
    for theirs, ours in zip(
        pair.teacher_encoder.weights, pair.student_encoder.weights, strict=True
    ):
        np.testing.assert_array_equal(theirs.numpy(), ours.numpy())
        assert theirs is not ours
    move_student(pair)
    assert not np.allclose(
        pair.teacher_encoder.get_weights()[0], pair.student_encoder.get_weights()[0]
    )


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_teacher_moves_by_its_momentum_and_keeps_its_own_statistics(momentum):
    pair = make_pair(momentum)
    before = [v.numpy().copy() for v in pair.teacher_projector.weights]
    move_student(pair)
    for variable in pair.student_projector.non_trainable_variables:
        variable.assign(variable + 5.0)  # BatchNorm statistics of the student
    pair.update_teacher()
    student = pair.student_projector.weights
    for theirs, ours, old in zip(pair.teacher_projector.weights, student, before, strict=True):
        expected = momentum * old + (1 - momentum) * ours.numpy() if ours.trainable else old
        np.testing.assert_allclose(theirs.numpy(), expected, rtol=1e-6)


def test_only_the_student_and_its_heads_are_trained():
    pair = make_pair(0.9)
    networks = (pair.student_encoder, pair.student_projector, pair.predictor)
    expected = {id(v) for network in networks for v in network.trainable_variables}
    assert {id(v) for v in pair.trainable_variables} == expected


def test_teacher_normalises_by_batch_statistics_and_gathers_its_own():
    pair = make_pair(0.9)
    before = pair.teacher_encoder.get_layer("bn1").moving_mean.numpy().copy()
    student = pair.student_encoder.get_layer("bn1").moving_mean.numpy().copy()
    pair.embed_teacher(VIEWS)
    conv1 = pair.teacher_encoder.get_layer("conv1")
    conv1_outputs = conv1(pair.teacher_encoder.get_layer("conv1_pad")(VIEWS)).numpy()
    expected = 0.9 * before + 0.1 * conv1_outputs.mean(axis=(0, 1, 2))
    moving_mean = pair.teacher_encoder.get_layer("bn1").moving_mean.numpy()
    np.testing.assert_allclose(moving_mean, expected, atol=1e-5)
    np.testing.assert_array_equal(pair.student_encoder.get_layer("bn1").moving_mean, student)


def test_embeddings_are_unit_rows_and_carry_no_gradient_to_the_teacher():
    pair = make_pair(0.9)
    with tf.GradientTape() as tape:
        tape.watch([v.value for v in pair.teacher_encoder.weights])
        teacher, student = pair.embed_teacher(VIEWS), pair.embed_student(VIEWS)
        total = tf.reduce_sum(teacher * student)
    np.testing.assert_allclose(np.linalg.norm(teacher, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(student, axis=1), 1, rtol=1e-5)
    gradients = tape.gradient(total, [v.value for v in pair.teacher_encoder.weights])
    assert all(gradient is None for gradient in gradients)


def test_embeddings_are_float32_under_mixed_precision():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        pair = make_pair(0.9)
        assert pair.student_encoder.get_layer("conv1").compute_dtype == "bfloat16"
        assert pair.student_encoder(VIEWS).dtype == tf.float32
        assert pair.predictor.layers[0].compute_dtype == "bfloat16"
        assert pair.predictor(tf.zeros([2, pair.predictor.input_shape[-1]])).dtype == tf.float32
        assert pair.embed_student(VIEWS).dtype == tf.float32
        norms = np.linalg.norm(pair.embed_teacher(VIEWS), axis=1)
        np.testing.assert_allclose(norms, 1, rtol=1e-5)  # bfloat16 would be off by 1e-2
    finally:
        keras.config.set_dtype_policy(before)
