"""Another size of image, inside a network."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers


@keras.saving.register_keras_serializable("isd_tf")
class AntialiasedResizing(layers.Layer):
    """Resizes images [B, H, W, C] by antialiased bilinear weights, as torchvision does.

    As a product along each axis, which XLA compiles: TensorFlow's own operation it does not.

    Args:
        height, width: of the result in pixels.
    """

    def __init__(self, height: int, width: int, **kwargs):
        super().__init__(**kwargs)
        self.height, self.width = height, width

    def build(self, input_shape):
        self._rows = _weights(input_shape[1], self.height)
        self._columns = _weights(input_shape[2], self.width)

    def call(self, images):
        rows, columns = (tf.constant(x, self.compute_dtype) for x in (self._rows, self._columns))
        images = tf.einsum("oh,bhwc->bowc", rows, images)
        return tf.einsum("ow,bhwc->bhoc", columns, images)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.height, self.width, input_shape[3])

    def get_config(self):
        return {**super().get_config(), "height": self.height, "width": self.width}


def _weights(length, size):
    """What each of `length` pixels weighs in each of `size`: [size, length], rows sum to 1."""
    step = length / size
    centres = (np.arange(size)[:, np.newaxis] + 0.5) * step
    # A triangle that reaches one output pixel to each side, but never less than an input pixel.
    weights = np.maximum(1 - np.abs(np.arange(length) + 0.5 - centres) / max(step, 1), 0)
    return weights / weights.sum(axis=1, keepdims=True)
