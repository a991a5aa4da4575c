"""Encoded images to pixels: what every file means, wherever it is read.

Pillow's first frame in RGB. `open_image` is how files are read here; `decode` does the same inside
a TensorFlow graph, for a tf.data service's workers and for serving, which have no Python.
"""

import io

import numpy as np
import tensorflow as tf
from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


def open_image(encoded: bytes) -> Image.Image:
    """Decodes an image by Pillow to its mode RGB; raises what Pillow raises."""
    with Image.open(io.BytesIO(encoded)) as image:
        if image.mode.startswith("I;16"):
            # Pillow's own conversion of 16 bits clips at 255 instead of scaling.
            gray = (np.asarray(image) >> 8).astype(np.uint8)
            return Image.fromarray(gray).convert("RGB")
        return image.convert("RGB")


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes JPEG, PNG, WebP, BMP or GIF (first frame) to uint8 [H, W, 3]; may fail."""
    image = tf.cond(
        tf.io.is_jpeg(encoded),
        # Pillow's inverse transform; TensorFlow's default is off by 1 to 2 of 255 levels.
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )
    return tf.ensure_shape(image, [None, None, 3])
