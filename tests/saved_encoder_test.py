import keras
import numpy as np
import pytest
import tensorflow as tf

import isd_tf
from isd_tf.serving.saved_encoder import load_encoder

SIZE = 16
VIEWS = np.random.default_rng(1).normal(size=(3, SIZE, SIZE, 3)).astype(np.float32)


def test_the_newest_version_encodes_as_the_encoder_and_is_frozen(tmp_path):
    keras.utils.set_random_seed(0)
    isd_tf.export_encoder(isd_tf.build_encoder("tiny_resnet", SIZE, 4), SIZE, tmp_path)
    encoder = isd_tf.build_encoder("tiny_resnet", SIZE, 8)
    for _ in range(3):
        encoder(VIEWS, training=True)  # So that BatchNorm's statistics are not their initial ones.
    newest = isd_tf.export_encoder(encoder, SIZE, tmp_path)
    expected = encoder(VIEWS, training=False)
    for place in (tmp_path, newest):
        loaded = load_encoder(place)
        assert loaded.input_shape == (None, SIZE, SIZE, 3) and loaded.output_shape == (None, 32)
        assert loaded.count_params() == encoder.count_params()
        assert not loaded.trainable_variables
        for training in (False, True):
            np.testing.assert_allclose(loaded(VIEWS, training=training), expected, 1e-4, 1e-5)


def written(directory, name, function, shape):
    archive = keras.export.ExportArchive()
    archive.add_endpoint(name, function, [tf.TensorSpec(shape, tf.float32, name="views")])
    archive.write_out(str(directory), verbose=False)
    return directory


def test_a_saved_model_without_encode_names_the_signatures_that_it_has(tmp_path):
    written(tmp_path / "1", "serve", lambda views: {"features": views[:, 0, 0]}, [None, 2, 2, 3])
    message = "by its signature `encode`.*Received: .*1 with serve, serving_default"
    with pytest.raises(ValueError, match=message):
        load_encoder(tmp_path)


def test_an_encode_that_is_another_is_refused(tmp_path):
    def encode(views):
        return {"embedding": views}

    other = written(tmp_path / "1", "encode", encode, [None, 8])
    with pytest.raises(ValueError, match=r"take images .*Received: \(None, 8\) to embedding in"):
        load_encoder(other)


def test_a_folder_without_a_saved_model_and_a_broken_one_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="Expected a SavedModel.*nothing, which does not exist"
    ):
        load_encoder(tmp_path / "nothing")
    (tmp_path / "saved_model.pb").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        load_encoder(tmp_path)
