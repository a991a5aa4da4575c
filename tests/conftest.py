"""Set-up of all tests: two logical CPUs, so that MirroredStrategy has replicas to run on."""

import os

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from PIL import Image

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture
def float64():
    """Variables and arithmetic of Keras in double precision, for comparisons to 1e-12."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(before)


# One for all tests: TensorFlow's collectives on CPUs mix up the strategies of one process.
@pytest.fixture(scope="session")
def two_replicas():
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of two classes: 24 images of several sizes to train on, 8 to test."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                values = random.integers(0, 100, (20 + i, 30, 3), np.uint8) + np.uint8(label * 150)
                Image.fromarray(values).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(params=["cykooz_resizer", "pillow"])
def resizer(request, monkeypatch):
    """Who resizes random crops of files and records."""
    if request.param == "pillow":  # As under Linux on ARM.
        monkeypatch.setattr("isd_tf.views.python_crops.cykooz_resizer", None)
    else:
        pytest.importorskip("cykooz_resizer")
    return request.param


@pytest.fixture(autouse=True)
def no_flags_of_another_test():
    """A test that reads flags must set them itself, whichever ran before it in its process."""
    flags.FLAGS.unparse_flags()
