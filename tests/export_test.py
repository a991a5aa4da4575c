import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import isd_tf
from isd_tf.views import augment

RUNNER = pathlib.Path(__file__).parent / "saved_model_c_api.py"
SIZE = 32


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    encoder = isd_tf.build_encoder("tiny_resnet", SIZE, 8)
    model = isd_tf.ISD(encoder, *isd_tf.isd_plus_heads(32), queue_size=64)
    # At larger rates features grow to 1e4, and the rounding of their sums buries small features.
    model.compile(isd_tf.TorchSGD(0.001))
    random = np.random.default_rng(0)
    views = tf.constant(random.normal(size=(16, SIZE, SIZE, 3)), tf.float32)
    for _ in range(3):  # So that BatchNorm's statistics are not their initial ones.
        model.train_step({"teacher_view": views, "student_view": views + 0.1})
    return model


@pytest.fixture(scope="module")
def saved_model(model, tmp_path_factory):
    return isd_tf.export_encoder(model.student_encoder, SIZE, tmp_path_factory.mktemp("models"))


def run_c_api(saved_model, images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, str(RUNNER), saved_model, "serving_default"]
    return subprocess.run(
        [*command, str(tmp_path / "images.npy"), str(tmp_path / "features.npy")],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
    )


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 70, 45), (1, 20, 33), (1, 300, 200)])
def test_tf_servings_loader_gives_the_encoders_features(model, saved_model, shape, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    result = run_c_api(saved_model, images, tmp_path)
    assert result.returncode == 0, result.stderr
    served = np.load(tmp_path / "features.npy")
    views = augment.evaluation_view(tf.constant(images), SIZE)
    expected = model.student_encoder(views, training=False)
    np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-5)


def test_an_image_without_batch_axis_is_an_error_and_no_crash(saved_model, tmp_path):
    result = run_c_api(saved_model, np.zeros((32, 32, 3), np.uint8), tmp_path)
    assert result.returncode == 1  # Not a signal: the server lives on.
    assert "TF_Code 3" in result.stderr


def test_the_file_holds_the_encoders_weights_once_and_nothing_else(model, saved_model):
    reader = tf.train.load_checkpoint(os.path.join(saved_model, "variables", "variables"))
    stored = sorted(
        reader.get_tensor(key).tobytes()
        for key in reader.get_variable_to_shape_map()
        if key != "_CHECKPOINTABLE_OBJECT_GRAPH"
    )
    assert stored == sorted(weight.numpy().tobytes() for weight in model.student_encoder.weights)


def test_teacher_and_student_export_differently(model, saved_model, tmp_path):
    teacher = isd_tf.export_encoder(model.teacher_encoder, SIZE, tmp_path)
    images = np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    features = [
        tf.saved_model.load(path).signatures["serving_default"](images=tf.constant(images))
        for path in (teacher, saved_model)
    ]
    assert not np.allclose(*(f["features"] for f in features), rtol=1e-4)


def test_versions_count_up_and_nothing_unfinished_stays(model, tmp_path):
    paths = [isd_tf.export_encoder(model.student_encoder, SIZE, tmp_path / "m") for _ in range(2)]
    assert [pathlib.Path(path).name for path in paths] == ["1", "2"]
    assert sorted(os.listdir(tmp_path / "m")) == ["1", "2"]


def test_a_directory_that_cannot_be_made_is_an_error(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        isd_tf.export_encoder(model.student_encoder, SIZE, tmp_path / "file" / "models")
