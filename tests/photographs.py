"""Photographs and seeds for the tests of the views."""

import pathlib

import numpy as np
import skimage
import tensorflow as tf
from PIL import Image

LEVEL = 1 / 255


def photograph(name, size):
    path = pathlib.Path(skimage.__file__).parent / "data" / name
    return np.asarray(Image.open(path).convert("RGB").resize(size))


PHOTO = photograph("astronaut.png", (150, 120))  # [120, 150, 3] uint8
PATCHES = np.stack(
    [photograph(n, (32, 32)) for n in ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")]
)


def some_seeds(count, key=0):
    return tf.stack(
        [tf.fill([count], tf.constant(key, tf.int64)), tf.range(count, dtype=tf.int64)], 1
    )


def batch(image):
    return tf.constant(image)[tf.newaxis]
