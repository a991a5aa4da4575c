"""MoCo v2 and BYOL against the papers' formulas in numpy, and with MSF as models like ISD."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import INPUTS, B, D, K, image_batches, linear_encoder, softmax, unit

import isd_tf
from isd_tf.methods import losses

RATE, MOMENTUM, TEMPERATURE = 0.5, 0.9, 0.2


def compiled(model):
    model.compile(isd_tf.TorchSGD(RATE, sgd_momentum=0.0, coupled_weight_decay=0.0))
    return model


def through_norm(gradient, z):
    """The gradient by z of what has `gradient` by z's unit rows."""
    u = unit(z)
    radial = u * (u * gradient).sum(axis=1, keepdims=True)
    return (gradient - radial) / np.linalg.norm(z, axis=1, keepdims=True)


def test_moco_steps_equal_a_numpy_implementation_of_its_paper(float64):
    """Linear student, six steps: loss, student, teacher and queue, with a queue that wraps."""
    model = compiled(isd_tf.MoCoV2(linear_encoder("float64"), None, None, K, TEMPERATURE, MOMENTUM))
    student = model.student_encoder.get_weights()[0]
    teacher, queue, pointer = student.copy(), model.queue.read_anchors().numpy(), 0
    step = tf.function(model.train_step)
    random = np.random.default_rng(0)
    for _ in range(6):
        x_teacher, x_student = random.normal(size=(2, B, INPUTS))
        logs = step(
            {"teacher_view": tf.constant(x_teacher), "student_view": tf.constant(x_student)}
        )

        z = x_student @ student
        q, k = unit(z), unit(x_teacher @ teacher)
        logits = np.concatenate([(q * k).sum(1, keepdims=True), q @ queue.T], axis=1) / TEMPERATURE
        p = softmax(logits)
        # Cross-entropy with class 0, and its gradient by q.
        loss = -np.log(p[:, 0]).mean()
        g = ((p[:, :1] - 1) * k + p[:, 1:] @ queue) / TEMPERATURE / B
        student = student - RATE * x_student.T @ through_norm(g, z)
        teacher = MOMENTUM * teacher + (1 - MOMENTUM) * student
        for row in k:
            queue[pointer] = row
            pointer = (pointer + 1) % K

        np.testing.assert_allclose(logs["loss"], loss, rtol=1e-10)
        np.testing.assert_allclose(logs["contrast_accuracy"], (p.argmax(axis=1) == 0).mean())
        np.testing.assert_allclose(model.student_encoder.get_weights()[0], student, rtol=1e-10)
        np.testing.assert_allclose(model.teacher_encoder.get_weights()[0], teacher, rtol=1e-10)
        np.testing.assert_allclose(model.queue.read_anchors(), queue, rtol=1e-10)
        np.testing.assert_allclose(logs["embedding_std"], k.std(0).mean() * np.sqrt(D))


def test_byol_steps_equal_a_numpy_implementation_of_its_paper(float64):
    """Linear student with a linear predictor: loss, student, predictor and teacher."""
    head = keras.Sequential(
        [keras.Input((D,), dtype="float64"), keras.layers.Dense(D, use_bias=False)]
    )
    model = compiled(isd_tf.BYOL(linear_encoder("float64"), None, head, MOMENTUM))
    student = model.student_encoder.get_weights()[0]
    predictor, teacher = head.get_weights()[0], student.copy()
    step = tf.function(model.train_step)
    random = np.random.default_rng(0)
    for _ in range(6):
        x_teacher, x_student = random.normal(size=(2, B, INPUTS))
        logs = step(
            {"teacher_view": tf.constant(x_teacher), "student_view": tf.constant(x_student)}
        )

        features = x_student @ student
        z = features @ predictor
        q, k = unit(z), unit(x_teacher @ teacher)
        loss = (2 - 2 * (q * k).sum(axis=1)).mean()
        g = through_norm(-2 * k / B, z)
        student, predictor = (
            student - RATE * x_student.T @ (g @ predictor.T),
            predictor - RATE * features.T @ g,
        )
        teacher = MOMENTUM * teacher + (1 - MOMENTUM) * student

        np.testing.assert_allclose(logs["loss"], loss, rtol=1e-10)
        np.testing.assert_allclose(model.student_encoder.get_weights()[0], student, rtol=1e-10)
        np.testing.assert_allclose(head.get_weights()[0], predictor, rtol=1e-10)
        np.testing.assert_allclose(model.teacher_encoder.get_weights()[0], teacher, rtol=1e-10)
        np.testing.assert_allclose(logs["embedding_std"], k.std(0).mean() * np.sqrt(D))


def test_moco_is_isd_with_a_teacher_that_knows_one_image_only(float64):
    """InfoNCE is ISD's divergence where the positive is an anchor and the teacher one-hot on it."""
    q, k, anchors = (
        unit(np.random.default_rng(i).normal(size=(n, D))) for i, n in enumerate((1, 1, K))
    )
    contrast = losses.info_nce(*map(tf.constant, (q, k, anchors)), TEMPERATURE)
    with_positive = tf.constant(np.concatenate([k, anchors]))
    divergence = losses.similarity_distillation(
        tf.constant(q), tf.constant(k), with_positive, TEMPERATURE, teacher_temperature=1e-5
    ).divergence
    np.testing.assert_allclose(contrast.cross_entropy, divergence, rtol=1e-10)


@pytest.mark.parametrize("loss", ["info_nce", "squared_distance"])
def test_no_gradient_reaches_teacher_or_anchors(loss):
    student, teacher, anchors = (
        tf.Variable(unit(np.random.default_rng(i).normal(size=(B, D)))) for i in range(3)
    )
    with tf.GradientTape() as tape:
        if loss == "info_nce":
            value = losses.info_nce(student, teacher, anchors, TEMPERATURE).cross_entropy
        else:
            value = losses.squared_distance(student, teacher)
    by_student, *others = tape.gradient(value, [student, teacher, anchors])
    assert np.abs(by_student).max() > 0.1 and others == [None, None]


def small(method, strategy, synchronized=False, **settings):
    keras.utils.set_random_seed(3)
    with strategy.scope():
        encoder = isd_tf.build_encoder("tiny_resnet", 16, 4, synchronized)
        if method == "moco_v2":
            model = isd_tf.MoCoV2(encoder, *isd_tf.moco_v2_heads(16), queue_size=37, **settings)
        elif method == "msf":
            heads = isd_tf.isd_plus_heads(16, synchronized)
            model = isd_tf.MSF(encoder, *heads, queue_size=37, neighbors=3, **settings)
        else:
            model = isd_tf.BYOL(encoder, *isd_tf.isd_plus_heads(16, synchronized), **settings)
        model.compile(isd_tf.TorchSGD(0.05))
    return model


@pytest.mark.parametrize("method", ["moco_v2", "byol", "msf"])
def test_two_replicas_with_synchronised_batch_norm_equal_one(method, float64, two_replicas):
    settings = dict(synchronized=True, shuffle_batch_norm=False)
    one = small(method, tf.distribute.get_strategy(), **settings)
    two = small(method, two_replicas, **settings)
    for ours, theirs in zip(one.variables, two.variables, strict=True):
        theirs.assign(ours)
    histories = [
        model.fit(image_batches(8), epochs=1, verbose=0, shuffle=False).history
        for model in (one, two)
    ]
    assert histories[0].pop("waiting_seconds") != histories[1].pop("waiting_seconds")
    # Half a batch has a gradient of its own: their mean length is more than that of their mean.
    norms = [history.pop("gradient_norm") for history in histories]
    assert np.all(np.array(norms[1]) > norms[0])
    for name, values in histories[0].items():
        rtol = 1e-6 if name == "purity" else 1e-9  # A share, in float32.
        np.testing.assert_allclose(histories[1][name], values, rtol=rtol, err_msg=name)
    for ours, theirs in zip(one.variables, two.variables, strict=True):
        np.testing.assert_allclose(theirs.numpy(), ours.numpy(), atol=1e-10, err_msg=ours.path)


@pytest.mark.parametrize("method", ["moco_v2", "byol", "msf"])
def test_a_model_is_saved_and_loaded_whole(method, tmp_path):
    model = small(method, tf.distribute.get_strategy())
    model.fit(image_batches(3), verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    batch = next(iter(image_batches(1)))
    logs, again = model.train_step(batch), loaded.train_step(batch)
    assert logs.keys() == again.keys()
    assert float(logs["loss"]) == float(again["loss"])


def test_mocos_purity_is_that_of_the_teachers_nearest_anchors():
    model = compiled(isd_tf.MoCoV2(linear_encoder(), None, None, K))
    random = np.random.default_rng(0)
    for _ in range(3):
        anchors, anchor_labels = model.queue.read_anchors().numpy(), model.queue.labels.numpy()
        views = random.normal(size=(B, INPUTS)).astype(np.float32)
        labels = random.integers(-1, 2, size=B)
        keys = unit(views @ model.teacher_encoder.get_weights()[0])
        nearest = np.argsort(-(keys @ anchors.T), axis=1)[:, :5]
        matches = (anchor_labels[nearest] == labels[:, None]) & (labels[:, None] >= 0)
        names = ("teacher_view", "student_view")
        batch = {name: tf.constant(views) for name in names} | {"label": tf.constant(labels)}
        assert float(model.train_step(batch)["purity"]) == pytest.approx(matches.mean())


def test_mocos_projector_has_no_batch_norm_and_128_outputs():
    projector, predictor = isd_tf.moco_v2_heads(512)
    assert predictor is None
    shapes = [tuple(weight.shape) for weight in projector.weights]
    assert shapes == [(512, 512), (512,), (512, 128), (128,)]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be greater than 0.*Received"):
        isd_tf.MoCoV2(linear_encoder(), None, None, K, temperature)
