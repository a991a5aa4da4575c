import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy

import isd_tf
from isd_tf.serving.formats import keras_hub_path
from isd_tf.views import augment

SIZE = 96


def build(name, seed=0, **settings):
    keras.utils.set_random_seed(seed)
    encoder = isd_tf.build_encoder(name, SIZE, **settings)
    random = np.random.default_rng(seed)
    for variable in encoder.weights:  # BatchNorm's values are no longer their initial ones.
        if variable.ndim == 1:
            variable.assign(random.uniform(0.5, 1.5, variable.shape))
    return encoder


@pytest.fixture(scope="module")
def encoder():
    return build("resnet18")


def test_a_preset_has_the_encoders_features_and_is_finetuned(encoder, tmp_path):
    path = isd_tf.export_keras_hub(encoder, SIZE, tmp_path)
    assert path == str(tmp_path / "1")
    classifier = keras_hub.models.ImageClassifier.from_preset(path, num_classes=5)
    images = np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    maps = classifier.backbone(classifier.preprocessor(images), training=False)
    expected = encoder(augment.evaluation_view(images, SIZE), training=False).numpy()
    difference = np.abs(np.mean(maps, axis=(1, 2)) - expected).max()
    assert difference < 1e-5 * np.abs(expected).max()
    # Of another size, and as float: the converter resizes and takes 0..255.
    wide = np.random.default_rng(1).integers(0, 256, (2, 100, 120, 3)).astype(np.float32)
    before = classifier.backbone.get_weights()[0].copy()
    classifier.fit(wide, np.arange(2), epochs=1, verbose=0)
    assert np.any(classifier.backbone.get_weights()[0] != before)


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_every_resnet_has_its_place_in_keras_hubs(name):
    ours = {keras_hub_path(v.path): v.shape for v in isd_tf.build_encoder(name, SIZE).weights}
    backbone = keras_hub.models.ResNetBackbone(
        [64], [7], [64, 128, 256, 512], [3, 4, 6, 3], [1, 2, 2, 2],
        "bottleneck_block" if name == "resnet50" else "basic_block",
    )  # fmt: skip
    assert ours == {v.path: v.shape for v in backbone.weights}


@pytest.mark.parametrize(
    ("name", "size", "width", "message"),
    [
        ("tiny_resnet", SIZE, 64, "resnet18, resnet34, resnet50.*Received: tiny_resnet"),
        ("resnet18", SIZE, 8, "width 64.*Received: resnet18, width=8"),
        ("resnet18", 64, 64, "above 64 pixels.*image_size=64"),
    ],
)
def test_what_keras_hub_does_not_have_is_refused(name, size, width, message, tmp_path):
    encoder = isd_tf.build_encoder(name, size, width)
    with pytest.raises(ValueError, match=message):
        isd_tf.export_keras_hub(encoder, size, tmp_path / "presets")
    assert not (tmp_path / "presets").exists()


def test_pytorchs_file_takes_the_next_number(tmp_path):
    encoder = build("tiny_resnet", width=4)
    paths = [isd_tf.export_torch(encoder, tmp_path) for _ in range(2)]
    assert paths == [str(tmp_path / f"{n}.safetensors") for n in (1, 2)]
    state = safetensors.numpy.load_file(paths[1])
    kernel = encoder.get_layer("conv1").kernel.numpy()
    np.testing.assert_array_equal(state["conv1.weight"], np.einsum("yxio->oiyx", kernel))
