import numpy as np
import pytest
import tensorflow as tf

from isd_tf.networks.resizing import AntialiasedResizing


@pytest.mark.parametrize("size", [(7, 9), (20, 30), (5, 40), (20, 12)])
def test_resizes_as_tensorflow_does_and_under_xla(size):
    images = np.random.default_rng(0).normal(size=(2, 20, 30, 3)).astype(np.float32)
    expected = tf.image.resize(images, size, antialias=True)
    layer = AntialiasedResizing(*size)
    np.testing.assert_allclose(layer(images), expected, atol=1e-5)
    np.testing.assert_allclose(tf.function(layer, jit_compile=True)(images), expected, atol=1e-5)
    assert AntialiasedResizing.from_config(layer.get_config()).width == size[1]
