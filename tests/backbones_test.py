"""Foreign backbones: each a run's life in small, and what they make of pixels and mistakes."""

import hashlib
import sys

import in_process
import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from small_runs import newest_weights

import isd_tf
from isd_tf.networks import backbones
from isd_tf.networks.batch_norm import BatchNormalization, GroupedBatchNormalization
from isd_tf.training.checkpoints import Checkpoints
from isd_tf.views import augment

SIZE = 32
LEVELS = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)


def normalized(levels):
    return (levels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]


IMAGES = tf.constant(normalized(LEVELS), tf.float32)
BATCH = {"teacher_view": IMAGES, "student_view": IMAGES[:, :, ::-1]}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder with a small ViT of KerasHub, its random weights and its image converter."""
    folder = tmp_path_factory.mktemp("presets") / "small_vit"
    keras.utils.set_random_seed(5)
    network = keras_hub.models.ViTBackbone(
        (SIZE, SIZE, 3), 8, 2, 2, 16, 32, dropout_rate=0.1, attention_dropout=0.1
    )
    network.save_to_preset(folder)
    converter = keras_hub.layers.ViTImageConverter((SIZE, SIZE), 1 / 127.5, (-1.0, -0.9, -0.8))
    converter.save_to_preset(folder)
    return folder


# ------------------------------------------------------------------------------- the whole of a run

LIVES = ["keras:MobileNetV3Small", "keras:EfficientNetV2B0", "keras:ConvNeXtTiny", "keras_hub"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LIVES)
def test_trains_continues_to_the_bit_and_exports(name, vit, tmp_path, monkeypatch):
    name = f"keras_hub:{vit}" if name == "keras_hub" else name
    # Its blocks are alike: a third of its weights, and of the time.
    convnext = sys.modules["keras.src.applications.convnext"]
    monkeypatch.setitem(convnext.MODEL_CONFIGS["tiny"], "depths", [1, 1, 1, 1])

    def begin():
        keras.utils.set_random_seed(0)
        encoder = isd_tf.build_encoder(name, SIZE)
        model = isd_tf.ISD(encoder, *isd_tf.isd_heads(encoder.output_shape[-1]), queue_size=8)
        model.compile(isd_tf.TorchSGD(0.01))
        return model

    model = begin()
    encoder, teacher = model.student_encoder, model.teacher_encoder
    np.testing.assert_array_equal(teacher(IMAGES), encoder(IMAGES))
    for network in (encoder, teacher):
        # No generators' state, which no checkpoint would hold.
        assert {id(x) for x in network.variables} == {id(x) for x in network.weights}
    assert not any(x.trainable for x in teacher.weights)
    first = encoder.get_weights()
    for _ in range(2):
        assert np.isfinite(model.train_step(BATCH)["loss"])
    moved = [not np.array_equal(a, b) for a, b in zip(first, encoder.get_weights(), strict=True)]
    assert np.mean(moved) > 0.9
    norms = [x for x in backbones.flat_layers(teacher) if isinstance(x, BatchNormalization)]
    assert bool(norms) == ("NetV" in name)  # ConvNeXt and ViT have none.
    assert all(x.moving_mean.numpy().any() for x in norms)  # In training mode.
    Checkpoints(tmp_path / "checkpoints", model).save()
    for which in ("student", "teacher"):  # Another run may begin with either.
        other = isd_tf.build_encoder(name, SIZE)
        isd_tf.load_weights(other, tmp_path, which)
        saved = model.encoders()[which].weights
        for ours, theirs in zip(other.weights, saved, strict=True):
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=ours.path)

    continued = begin()
    assert Checkpoints(tmp_path / "checkpoints", continued).restore_newest() == 2
    for one in (model, continued):
        one.train_step(BATCH)
    for ours, theirs in zip(model.variables, continued.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=ours.path)

    path = isd_tf.export_encoder(encoder, SIZE, tmp_path / "saved_model")
    served = tf.saved_model.load(path).signatures["serving_default"](images=tf.constant(LEVELS))
    expected = encoder(augment.evaluation_view(tf.constant(LEVELS), SIZE), training=False)
    # Statistics are nearly the initial ones yet, and some networks' features many thousands.
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(served["features"], expected, rtol=1e-4, atol=atol)
    stored = tf.train.list_variables(f"{path}/variables/variables")
    sizes = [np.prod(shape) for key, shape in stored if not key.startswith("_CHECKPOINTABLE")]
    assert sum(sizes) == encoder.count_params()


@pytest.mark.slow
def test_a_run_scores_draws_and_exports_a_foreign_encoder(photos, tmp_path, capsys):
    in_process.call(
        *("--flagfile=folder.flags", f"--data_dir={photos}", f"--workdir={tmp_path}"),
        *("--image_size=32", "--encoder=keras:MobileNetV3Small", "--queue_size=8", "--epochs=1"),
        *("--batch_size=8", "--knn_every_epochs=0", "--evaluations=knn"),
    )
    assert "keras:MobileNetV3Small: its random layers (dropout, stochastic depth) are off." in (
        capsys.readouterr().out
    )
    name, weights = newest_weights(tmp_path)
    assert name == "step-00000003"
    assert any("student_encoder" in key for key in weights)
    assert (tmp_path / "saved_model" / "1" / "saved_model.pb").exists()


# ------------------------------------------------------------------------------------------- pixels


class ReachedError(Exception):
    """What stands before the first layer that computes."""


def pixels_of_keras(name, monkeypatch):
    """What keras.applications makes of levels: `preprocess_input`, and its networks' first layers.

    Of the networks nothing else is built: the first layer of another kind ends it.
    """
    application = getattr(keras.applications, name)
    module = sys.modules[application.__module__]

    class Layers:
        Input = staticmethod(keras.layers.Input)
        Rescaling = keras.layers.Rescaling
        Normalization = keras.layers.Normalization

        def __getattr__(self, _):
            return lambda *args, **kwargs: stop

    def stop(x):
        raise ReachedError(x)

    # ResNets of version 2 are built in the file of version 1.
    source = module if hasattr(module, "layers") else module.resnet
    monkeypatch.setattr(source, "layers", Layers())
    monkeypatch.setattr(source, "Sequential", lambda *args, **kwargs: stop, raising=False)
    images = keras.Input((96, 96, 3))
    with pytest.raises(ReachedError) as reached:
        application(include_top=False, weights="imagenet", input_tensor=images)
    network = keras.Model(images, reached.value.args[0])
    for layer in network.layers:
        if isinstance(layer, keras.layers.Normalization) and layer.input_mean is None:
            # As in the published weights: tensorflow/tensorflow#49930.
            statistics = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 0
            layer.set_weights(list(map(np.array, statistics)))
            layer.finalize_state()
    return lambda levels: network(module.preprocess_input(levels)).numpy()


@pytest.mark.parametrize("name", backbones.APPLICATIONS)
def test_pixels_are_those_of_keras_applications(name, monkeypatch):
    levels = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3)).astype(np.float32)
    expected = pixels_of_keras(name, monkeypatch)(levels.copy())
    ours = backbones.PixelsFromNormalized(*backbones.APPLICATIONS[name])
    found = ours(tf.constant(normalized(levels), tf.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_all_image_classifiers_of_keras_are_known():
    theirs = {name for name in dir(keras.applications) if name[0].isupper()}
    assert theirs == set(backbones.APPLICATIONS)


def test_features_are_those_of_keras_own_network():
    encoder = isd_tf.build_encoder("keras:MobileNetV3Small", SIZE)
    theirs = keras.applications.MobileNetV3Small(
        include_top=False, weights=None, input_shape=(SIZE, SIZE, 3), pooling="avg"
    )
    random = np.random.default_rng(0)  # Initial statistics would hide a BatchNorm that is missing.
    weights = [w + random.uniform(0, 0.1, w.shape) for w in encoder.get_weights()]
    for network in (encoder, theirs):
        network.set_weights(weights)
    expected = theirs(LEVELS.astype(np.float32), training=False)
    np.testing.assert_allclose(encoder(IMAGES, training=False), expected, rtol=1e-3, atol=1e-5)


def test_a_hub_backbones_features_are_its_class_token_of_converted_pixels(vit):
    encoder = isd_tf.build_encoder(f"keras_hub:{vit}", SIZE, published_weights=True)
    backbone = keras_hub.models.Backbone.from_preset(str(vit))
    converter = keras_hub.layers.ImageConverter.from_preset(str(vit))
    expected = backbone(converter(LEVELS.astype(np.float32)), training=False)[:, 0]
    np.testing.assert_allclose(encoder(IMAGES, training=True), expected, rtol=1e-4, atol=1e-5)


def test_a_run_begins_with_published_weights_and_tells_of_them(vit, tmp_path, capsys):
    arguments = [f"--encoder=keras_hub:{vit}", f"--workdir={tmp_path}"]
    in_process.set_flags("--flagfile=quickstart.flags", "--initial_weights=published", *arguments)
    encoder, initial = in_process.run.build_encoder(tf.distribute.get_strategy())
    expected = isd_tf.build_encoder(f"keras_hub:{vit}", SIZE, published_weights=True)
    for ours, theirs in zip(encoder.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    stored = b"".join(weight.numpy().tobytes() for weight in expected.weights)
    assert initial.sha256 == hashlib.sha256(stored).hexdigest()
    assert f"of what is published for keras_hub:{vit}" in capsys.readouterr().out


def test_a_hub_backbone_is_built_for_other_images_where_it_is_not_tied_to_weights(vit):
    assert isd_tf.build_encoder(f"keras_hub:{vit}", 48).input_shape == (None, 48, 48, 3)
    with pytest.raises(ValueError, match="with its weights cannot take images of 48 pixels"):
        isd_tf.build_encoder(f"keras_hub:{vit}", 48, published_weights=True)
    with pytest.raises(ValueError, match="cannot take images of 33 pixels.*divisible by patch"):
        isd_tf.build_encoder(f"keras_hub:{vit}", 33)


def test_a_hub_backbone_of_maps_is_pooled_by_their_mean_and_has_our_batch_norm(tmp_path):
    network = keras_hub.models.ResNetBackbone(
        [64], [3], [64, 128], [1, 1], [1, 2], "basic_block", image_shape=(None, None, 3)
    )
    network.save_to_preset(tmp_path)
    keras_hub.layers.ResNetImageConverter(scale=1 / 255).save_to_preset(tmp_path)
    encoder = isd_tf.build_encoder(
        f"keras_hub:{tmp_path}", SIZE, batch_norm_groups=2, published_weights=True
    )
    expected = network(LEVELS / np.float32(255)).numpy().mean((1, 2))
    np.testing.assert_allclose(encoder(IMAGES), expected, rtol=1e-4, atol=1e-5)
    norms = [x for x in backbones.flat_layers(encoder) if "BatchNorm" in type(x).__name__]
    assert norms and all(x.groups == 2 for x in norms)
    pair = isd_tf.StudentTeacher(encoder, None, None, 0.9)
    np.testing.assert_array_equal(pair.teacher_encoder(IMAGES), encoder(IMAGES))


# ------------------------------------------------------------------------------------- what is ours


def test_batch_norm_is_ours_with_their_constants():
    def norms(**settings):
        encoder = isd_tf.build_encoder("keras:MobileNetV3Small", SIZE, **settings)
        return [x for x in encoder.layers if isinstance(x, keras.layers.BatchNormalization)]

    assert {type(x) for x in norms()} == {BatchNormalization}
    assert {(x.momentum, x.epsilon) for x in norms()} == {(0.999, 0.001)}
    assert {type(x) for x in norms(batch_norm_groups=2)} == {GroupedBatchNormalization}
    synchronized = norms(synchronized_batch_norm=True)
    assert synchronized and all(x.synchronized for x in synchronized)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_batch_norm_without_scale_and_centre_is_that_of_keras(dtype):
    x = np.random.default_rng(0).normal(2, 3, (8, 4, 4, 3)).astype(dtype)
    settings = dict(scale=False, center=False, momentum=0.5, dtype=dtype)
    ours, theirs = BatchNormalization(**settings), keras.layers.BatchNormalization(**settings)
    for training in (True, False):
        expected = theirs(x, training=training)
        if not training:
            ours.set_weights(theirs.get_weights())
        np.testing.assert_allclose(ours(x, training=training), expected, rtol=1e-4, atol=1e-5)


def test_features_are_in_the_weights_precision():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        encoder = isd_tf.build_encoder("keras:MobileNetV3Small", 64)
        assert encoder.get_layer("conv").compute_dtype == "bfloat16"
        features = encoder(tf.repeat(tf.repeat(IMAGES, 2, 1), 2, 2))
        assert features.dtype == tf.float32
        # More digits than bfloat16 has.
        assert (features != tf.cast(tf.cast(features, "bfloat16"), "float32")).numpy().any()
        assert encoder.get_layer("pixels").compute_dtype == "float32"
    finally:
        keras.config.set_dtype_policy(before)


# -------------------------------------------------------------------------------------------- files


def small_network(outputs=None):
    images = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Normalization()(images)
    x = keras.layers.Conv2D(8, 3, 4, activation="relu")(x)
    x = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(x))
    return keras.Model(images, outputs(x) if outputs else keras.layers.GlobalMaxPooling2D()(x))


def test_a_file_brings_architecture_and_weights(tmp_path):
    network = small_network()
    random = np.random.default_rng(0)
    network.set_weights([random.uniform(0.1, 2, w.shape) for w in network.get_weights()])
    network.layers[1].finalize_state()
    path = tmp_path / "network.keras"
    network.save(path)
    encoder = isd_tf.build_encoder(str(path), SIZE)
    expected = network(IMAGES, training=False)
    np.testing.assert_allclose(encoder(IMAGES, training=False), expected, rtol=1e-5)
    assert len(encoder.variables) == len(encoder.weights)
    pair = isd_tf.StudentTeacher(encoder, None, None, 0.9)
    np.testing.assert_array_equal(pair.teacher_encoder(IMAGES), encoder(IMAGES))
    # And once more, as what a run leaves is loaded elsewhere.
    encoder.save(tmp_path / "encoder.keras")
    again = isd_tf.build_encoder(str(tmp_path / "encoder.keras"), SIZE)
    np.testing.assert_allclose(again(IMAGES, training=False), expected, rtol=1e-5)


def test_an_encoder_of_tokens_survives_a_file(vit, tmp_path):
    encoder = isd_tf.build_encoder(f"keras_hub:{vit}", SIZE)
    encoder.save(tmp_path / "encoder.keras")
    again = isd_tf.build_encoder(str(tmp_path / "encoder.keras"), SIZE)
    np.testing.assert_allclose(again(IMAGES), encoder(IMAGES), rtol=1e-5)


class Unregistered(keras.layers.Layer):
    def call(self, x):
        return x


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda x: x, r"one feature vector of each image.*\(None, 8, 8, 8\)"),
        (lambda x: [keras.layers.Flatten()(x)] * 2, r"one feature vector of each image"),
        (lambda x: Unregistered()(keras.layers.Flatten()(x)), "must be registered"),
        (lambda x: keras.layers.RandomFlip()(x)[:, 0, 0], "draw random numbers"),
    ],
)
def test_a_file_that_is_no_encoder_is_refused(outputs, message, tmp_path):
    small_network(outputs).save(tmp_path / "network.keras")
    with pytest.raises(ValueError, match=message):
        isd_tf.build_encoder(str(tmp_path / "network.keras"), SIZE)


def test_a_file_for_other_images_or_of_nothing_is_refused(tmp_path):
    path = str(tmp_path / "network.keras")
    with pytest.raises(FileNotFoundError, match="No such file"):
        isd_tf.build_encoder(path, SIZE)
    with open(path, "wb"):
        pass
    with pytest.raises(ValueError, match="cannot be read as a Keras model"):
        isd_tf.build_encoder(path, SIZE)
    small_network().save(path)
    with pytest.raises(ValueError, match=r"takes images of shape \(None, 64, 64, 3\) and nothing"):
        isd_tf.build_encoder(path, 64)
    with pytest.raises(ValueError, match="of a file are its own"):
        isd_tf.build_encoder(path, SIZE, published_weights=True)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        with pytest.raises(ValueError, match="keeps its precision"):
            isd_tf.build_encoder(path, SIZE)
    finally:
        keras.config.set_dtype_policy("float32")


def test_any_model_of_ones_own_can_be_an_encoder():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(8)

        def call(self, images):
            return self.dense(keras.layers.Flatten()(images))

        def get_config(self):
            return {}

    images = keras.Input((4, 4, 3))
    flat = [keras.layers.Flatten(), keras.layers.Dense(8)]
    views = tf.random.normal((4, 4, 4, 3), seed=0)
    for encoder in (keras.Model(images, Own()(images)), keras.Sequential([images, *flat])):
        model = isd_tf.ISD(encoder, *isd_tf.isd_heads(8), queue_size=4)
        model.compile(isd_tf.TorchSGD(0.1))
        np.testing.assert_array_equal(model.teacher_encoder(views), encoder(views))
        model.train_step({"teacher_view": views, "student_view": views})
        assert np.isfinite(encoder(views)).all()


# -------------------------------------------------------------------------------- published weights


def test_published_weights_and_pixels_are_those_of_keras(tmp_path, monkeypatch):
    """A file of our own in place of the download, of a family that keeps its pixels' statistics."""
    module = sys.modules["keras.src.applications.efficientnet"]
    asked = []

    def get_file(name, *args, **kwargs):
        asked.append(name)
        return str(tmp_path / "published.weights.h5")

    def of_keras(weights):
        return keras.applications.EfficientNetB0(
            include_top=False, weights=weights, input_shape=(SIZE, SIZE, 3), pooling="avg"
        )

    monkeypatch.setattr(module.file_utils, "get_file", get_file)
    published = of_keras(None)
    statistics = [np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]), np.array(0)]
    published.layers[2].set_weights(statistics)
    published.save_weights(tmp_path / "published.weights.h5")
    encoder = isd_tf.build_encoder("keras:EfficientNetB0", SIZE, published_weights=True)
    assert asked == ["efficientnetb0_notop.h5"]
    expected = of_keras("imagenet")(LEVELS.astype(np.float32), training=False)
    tolerance = dict(rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(encoder(IMAGES, training=False), expected, **tolerance)


def test_what_cannot_be_downloaded_is_one_readable_error(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network here\nwith a long tail")

    monkeypatch.setattr(
        sys.modules["keras.src.applications.mobilenet_v3"].file_utils, "get_file", no_network
    )
    with pytest.raises(OSError, match=r"could not be had \(no network here\)"):
        isd_tf.build_encoder("keras:MobileNetV3Small", SIZE, published_weights=True)
    monkeypatch.setattr(keras_hub.models.Backbone, "from_preset", no_network)
    with pytest.raises(OSError, match=r"could not be downloaded \(no network here\)"):
        isd_tf.build_encoder("keras_hub:vit_base_patch16_224_imagenet", SIZE)
    with pytest.raises(ValueError, match="Of resnet18 no weights are published"):
        isd_tf.build_encoder("resnet18", SIZE, published_weights=True)


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("keras:mobilenetv3small", 32, "Did you mean MobileNetV3Small.*Received: keras:mobilenetv"),
        ("MobileNetV3Smal", 32, "Did you mean keras:MobileNetV3Small"),
        ("keras_hub:vit_base_patch16_224_imagenett", 32, "Did you mean vit_base_patch16_224_image"),
        ("keras:InceptionV3", 32, "cannot take images of 32 pixels.*at least 75x75"),
        ("keras:NASNetMobile", 31, "cannot take images of 31 pixels"),
    ],
)
def test_unknown_names_and_small_images_are_readable_errors(name, size, message):
    with pytest.raises(ValueError, match=message):
        isd_tf.build_encoder(name, size)


def test_a_folder_that_is_no_image_preset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold a saved preset of an image backbone"):
        isd_tf.build_encoder(f"keras_hub:{tmp_path}", SIZE)
    with pytest.raises(ValueError, match="have a width"):
        isd_tf.build_encoder("keras:MobileNetV3Small", SIZE, width=8)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("keras:VGG18", "Did you mean VGG19?.*Expected one of ResNet50, .*--encoder=keras:VGG18"),
        ("resnet_18", "Did you mean resnet18?"),
        ("nowhere.keras", "No such file. Received: --encoder=nowhere.keras"),
        ("keras:VGG16", "have a width. Received: --width=8 with --encoder=keras:VGG16"),
    ],
)
def test_the_command_line_is_refused_before_tensorflow_is_needed(encoder, message):
    width = ["--width=8"] if encoder == "keras:VGG16" else []
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        in_process.set_flags("--flagfile=quickstart.flags", f"--encoder={encoder}", *width)
