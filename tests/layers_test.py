import numpy as np
import pytest
import tensorflow as tf
from photographs import PATCHES, some_seeds

from isd_tf.views import layers

LAYERS = [
    layers.RandomResizedCrop(size=24, seed=1),
    layers.ColorJitterAndGrayscale(seed=1),
    layers.RandomGaussianBlur(rate=1.0, seed=1),
    layers.RandomHorizontalFlip(rate=1.0, seed=1),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_layers_apply_their_function_to_kerascv_batches(layer):
    seeds = some_seeds(4)
    layer.get_random_transformation_batch = lambda *args, **kwargs: seeds
    out = layer({"images": tf.constant(PATCHES), "labels": tf.range(4)})
    expected = layer.augment(tf.constant(PATCHES / np.float32(255)), seeds) * 255
    np.testing.assert_allclose(out["images"], expected, atol=1e-3)
    np.testing.assert_array_equal(out["labels"], range(4))
    assert out["images"].dtype == tf.float32


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_layers_draw_their_own_seeds_inside_tf_data_and_keep_their_config(layer):
    layer = type(layer).from_config(layer.get_config())
    images = tf.data.Dataset.from_tensors(tf.constant(PATCHES)).repeat(2).map(layer)
    first, second = list(images)
    assert first.dtype == tf.float32 and 0 <= np.min(first) and np.max(first) <= 255.01
    if not isinstance(layer, layers.RandomHorizontalFlip):  # Here it flips every image.
        assert np.abs(first - second).max() > 0
