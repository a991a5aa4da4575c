"""CompRess against its paper's formula in numpy, and what its teacher must not be: part of it."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import INPUTS, B, D, K, linear_encoder, softmax, unit

import isd_tf
from isd_tf.data.datasets import ArrayDataset
from isd_tf.serving.saved_encoder import load_encoder
from isd_tf.views import augment

RATE, TEMPERATURE, TEACHER_DIM = 0.5, 0.1, 5
IMAGES = np.random.default_rng(0).integers(0, 256, (24, 20, 20, 3), np.uint8)
DATA = ArrayDataset("arrays", IMAGES, np.arange(24) % 3, ("a", "b", "c"))


def linear_teacher(dtype="float32"):
    layer = keras.layers.Dense(TEACHER_DIM, use_bias=False)
    return keras.Sequential([keras.Input((INPUTS,), dtype=dtype), layer])


def test_steps_equal_a_numpy_implementation_of_the_paper(float64):
    """Linear student, six steps: loss, student, head and queue, with a queue that wraps."""
    given = linear_teacher("float64")
    model = isd_tf.CompRess(linear_encoder("float64"), given, K, TEMPERATURE)
    model.compile(isd_tf.TorchSGD(RATE, sgd_momentum=0.0, coupled_weight_decay=0.0))
    (student,), (head, bias) = model.student_encoder.get_weights(), model.head.get_weights()
    assert head.shape == (D, TEACHER_DIM) and bias.shape == (TEACHER_DIM,)
    (teacher,), queue, pointer = given.get_weights(), model.queue.read_anchors().numpy(), 0
    step = tf.function(model.train_step)
    random = np.random.default_rng(0)
    for _ in range(6):
        x = random.normal(size=(B, INPUTS))
        logs = step({"view": tf.constant(x)})

        features = x @ student
        z = features @ head + bias
        u, k = unit(z), unit(x @ teacher)
        p, q = softmax(k @ queue.T / TEMPERATURE), softmax(u @ queue.T / TEMPERATURE)
        loss = (p * np.log(p / q)).sum(axis=1).mean()
        g = (q - p) @ queue / TEMPERATURE / B
        g = (g - u * (u * g).sum(1, keepdims=True)) / np.linalg.norm(z, axis=1, keepdims=True)
        student, head, bias = (
            student - RATE * x.T @ (g @ head.T),
            head - RATE * features.T @ g,
            bias - RATE * g.sum(axis=0),
        )
        for row in k:
            queue[pointer] = row
            pointer = (pointer + 1) % K

        np.testing.assert_allclose(logs["loss"], loss, rtol=1e-10)
        np.testing.assert_allclose(model.student_encoder.get_weights()[0], student, rtol=1e-10)
        np.testing.assert_allclose(model.head.get_weights()[0], head, rtol=1e-10)
        np.testing.assert_allclose(model.head.get_weights()[1], bias, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(model.queue.read_anchors(), queue, rtol=1e-10)
        np.testing.assert_array_equal(given.get_weights()[0], teacher)
        np.testing.assert_allclose(logs["teacher_entropy"], -(p * np.log(p)).sum(1).mean())
        np.testing.assert_allclose(logs["student_entropy"], -(q * np.log(q)).sum(1).mean())
        np.testing.assert_allclose(logs["embedding_std"], k.std(0).mean() * np.sqrt(TEACHER_DIM))


def small(strategy=None, synchronized=False, **settings):
    """A student of 16 pixels, a teacher of 24 whose BatchNorm has seen images."""
    keras.utils.set_random_seed(3)
    with (strategy or tf.distribute.get_strategy()).scope():
        student = isd_tf.build_encoder("tiny_resnet", 16, 4, synchronized)
        teacher = isd_tf.build_encoder("tiny_resnet", 24, 8)
        for _ in range(9):
            teacher(np.random.default_rng(1).normal(size=(8, 24, 24, 3)), training=True)
        model = isd_tf.CompRess(student, teacher, 37)
        model.compile(isd_tf.TorchSGD(0.05), **settings)
    return model, teacher


def batches(views=("crop",), size=16):
    return isd_tf.pretraining_batches(DATA, views, size, 8, seed=0)


def fit(model, steps=6, **settings):
    history = model.fit(batches(), steps_per_epoch=steps, verbose=0, shuffle=False, **settings)
    return {name: values[0] for name, values in history.history.items()}


@pytest.fixture(scope="module")
def trained():
    model, teacher = small(steps_per_execution=3)
    before = teacher.get_weights()
    logs = fit(model)
    return model, teacher, before, logs


def test_the_teacher_stands_still_with_its_batch_norm_statistics(trained):
    model, teacher, before, logs = trained
    for weight, value in zip(teacher.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value, err_msg=weight.path)
    assert {"loss", "purity", "teacher_entropy", "student_entropy"} < set(logs)
    moved = model.student_encoder.get_layer("bn1").moving_mean.numpy()
    assert np.abs(moved).max() > 0  # The student's are its own.


def test_the_queue_holds_the_teachers_features_of_the_resized_view_in_inference_mode(trained):
    model, teacher, _, _ = trained
    last = list(batches().take(6))[-1]
    view = tf.image.resize(augment.finish(last["view"]), [24, 24], antialias=True)
    expected = unit(teacher(view, training=False).numpy())
    end = int(model.queue.pointer.numpy())
    rows = (end - 8 + np.arange(8)) % 37
    np.testing.assert_allclose(model.queue.read_anchors().numpy()[rows], expected, atol=1e-5)
    np.testing.assert_array_equal(model.queue.labels.numpy()[rows], last["label"])


def test_neither_weights_nor_files_hold_the_teacher(trained, tmp_path):
    model, teacher, _, _ = trained
    networks = (model.student_encoder, model.head, model.queue)
    own = {id(v) for network in networks for v in network.weights} | {id(model.step)}
    assert {id(v) for v in model.variables} == own
    expected = sum(network.count_params() for network in networks) + 1
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(tmp_path / "state"))
    shapes = tf.train.load_checkpoint(str(tmp_path / "state")).get_variable_to_shape_map()
    kinds = {key.split("/")[1] for key in shapes if key.startswith("model/")}
    assert not kinds & {"given", "teacher", "teacher_encoder"}, kinds
    of_optimizer = sum(int(np.prod(v.shape)) for v in model.optimizer.variables)
    stored = [
        np.prod(shape)
        for key, shape in shapes.items()
        if key[0] != "_" and "save_counter" not in key
    ]
    assert sum(stored) == expected + of_optimizer
    model.save_weights(tmp_path / "model.weights.h5")
    again, _ = small()
    again.load_weights(tmp_path / "model.weights.h5")
    for ours, theirs in zip(model.variables, again.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    sizes = []
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file.visititems(lambda _, x: sizes.append(getattr(x, "size", 0)))
    assert sum(sizes) == expected + of_optimizer
    with pytest.raises(NotImplementedError, match="not saved whole.*student_encoder"):
        model.save(tmp_path / "model.keras")


def test_both_networks_see_the_same_pixels_unless_there_are_two_views(monkeypatch):
    seen = {}

    def watch(name):
        embed = getattr(isd_tf.CompRess, f"embed_{name}")

        def embed_and_note(self, view):
            seen[name] = augment.finish(view).numpy()
            return embed(self, view)

        monkeypatch.setattr(isd_tf.CompRess, f"embed_{name}", embed_and_note)

    watch("teacher")
    watch("student")
    model, _ = small()
    (one,) = batches().take(1)
    assert set(one) == {"view", "label"} and set(one["view"]) == {"crop"}
    model.train_step(one)
    np.testing.assert_array_equal(seen["teacher"], seen["student"])
    (two,) = batches(("crop", "crop")).take(1)
    model.train_step(two)
    assert np.abs(seen["teacher"] - seen["student"]).max() > 0.1


def test_two_replicas_with_synchronised_batch_norm_equal_one(float64, two_replicas):
    models = [small(strategy, synchronized=True)[0] for strategy in (None, two_replicas)]
    one, two = models
    for ours, theirs in zip(one.variables, two.variables, strict=True):
        theirs.assign(ours)
    data = {
        "view": np.random.default_rng(0).normal(size=(48, 16, 16, 3)),
        "label": np.arange(48) % 3,
    }
    data = tf.data.Dataset.from_tensor_slices(data).batch(8, drop_remainder=True)
    logs = [m.fit(data, verbose=0, shuffle=False).history for m in models]
    np.testing.assert_allclose(logs[1]["loss"], logs[0]["loss"], rtol=1e-10)
    for ours, theirs in zip(one.variables, two.variables, strict=True):
        np.testing.assert_allclose(theirs.numpy(), ours.numpy(), atol=1e-10, err_msg=ours.path)


@pytest.mark.slow
def test_a_saved_model_teaches_on_two_replicas_as_on_one(two_replicas, tmp_path):
    _, teacher = small()
    path = isd_tf.export_encoder(teacher, 24, tmp_path)
    data = np.random.default_rng(0).normal(size=(16, 16, 16, 3)).astype(np.float32)
    data = tf.data.Dataset.from_tensor_slices({"view": data}).batch(8, drop_remainder=True)
    losses = []
    for strategy in (tf.distribute.get_strategy(), two_replicas):
        keras.utils.set_random_seed(3)
        with strategy.scope():
            student = isd_tf.build_encoder("tiny_resnet", 16, 4, synchronized_batch_norm=True)
            model = isd_tf.CompRess(student, load_encoder(path), 37)
            model.compile(isd_tf.TorchSGD(0.05))
        history = model.fit(data, verbose=0, shuffle=False).history
        losses.append(history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    model = isd_tf.CompRess(student, teacher, 37)
    view = tf.constant(np.random.default_rng(1).normal(size=(4, 16, 16, 3)), tf.float32)
    ours = isd_tf.CompRess(student, load_encoder(path), 37).embed_teacher(view)
    np.testing.assert_allclose(ours, model.embed_teacher(view), atol=1e-5)


@pytest.mark.slow
def test_xla_computes_the_same_steps(float64):
    plain, compiled = (small(jit_compile=jit)[0] for jit in (False, True))
    view = tf.constant(np.random.default_rng(0).normal(size=(8, 16, 16, 3)))
    for _ in range(2):
        logs = [tf.function(m.train_step)({"view": view}) for m in (plain, compiled)]
        np.testing.assert_allclose(logs[1]["loss"], logs[0]["loss"], rtol=1e-9)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_keeps_similarities_and_queue_in_float32(precision):
    before = keras.config.dtype_policy()
    expected = fit(small()[0], steps=3)["loss"]
    keras.config.set_dtype_policy(precision)
    try:
        model, teacher = small()
        assert teacher.get_layer("conv1").compute_dtype == precision.removeprefix("mixed_")
        logs = fit(model, steps=3)
    finally:
        keras.config.set_dtype_policy(before)
    assert logs["loss"] == pytest.approx(expected, rel=0.1) and model.queue.rows.dtype == "float32"
    norms = np.linalg.norm(model.queue.read_anchors(), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)


def vector_model(inputs, name="images"):
    images = keras.Input(inputs)
    return keras.Model(images, keras.layers.GlobalAveragePooling2D()(images))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: vector_model((16, 16, 1)), r"see the same images.*\(16, 16, 1\).*\(16, 16, 3\)"),
        (linear_teacher, r"see the same images.*\(6,\)"),
        (lambda: keras.Sequential([keras.Input((16, 16, 3)), keras.layers.ReLU()]),
         r"one vector of features.*\(None, 16, 16, 3\)"),
    ],
)  # fmt: skip
def test_a_teacher_that_cannot_see_the_students_images_is_refused(teacher, message):
    with pytest.raises(ValueError, match=message):
        isd_tf.CompRess(vector_model((16, 16, 3)), teacher(), K)


def test_a_teacher_for_any_size_sees_the_students():
    model = isd_tf.CompRess(vector_model((16, 16, 3)), vector_model((None, None, 3)), K)
    assert model.encoders()["teacher"].count_params() == 0
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    expected = unit(images.mean(axis=(1, 2)))
    np.testing.assert_allclose(model.embed_teacher(tf.constant(images)), expected, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be greater than 0.*Received"):
        isd_tf.CompRess(linear_encoder(), linear_teacher(), K, temperature)
