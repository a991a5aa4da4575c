"""Collections of a few images, and an exported encoder that numpy can do as well."""

import io
import os
import pathlib
import sys

import keras
import numpy as np
from PIL import Image
from small_models import unit

import isd_tf
from isd_tf.views import photometric

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "experiments"))

import embed as embed_program  # noqa: E402, F401
import search as search_program  # noqa: E402, F401
import search_results  # noqa: E402, F401

SIZE, DIMENSION = 16, 5
# Names that a file system takes, and text forms, pages and terminals must survive.
ODD_NAMES = [
    b'quo"te.png',
    b"<b>bold.png",
    b"new\nline.png",
    b"\xff\xfe.png",
    b"back\\slash.png",
    "\u202eright to left \u05d0\u05d1.png".encode(),
    "emoji \U0001f408 \u2028.png".encode(),
]


def export(folder, seed=0):
    """A linear encoder of views: its path and its weights [S * S * 3, D]."""
    keras.utils.set_random_seed(seed)
    layer = keras.layers.Conv2D(DIMENSION, SIZE, use_bias=False)
    layers = [keras.Input((SIZE, SIZE, 3)), layer, keras.layers.Flatten()]
    path = isd_tf.export_encoder(keras.Sequential(layers, name="linear"), SIZE, folder)
    return path, layer.kernel.numpy().reshape(-1, DIMENSION)


def embedding_by_numpy(image, weights):
    """Of an image of the views' own size."""
    view = (image / 255 - photometric.CHANNEL_MEAN) / photometric.CHANNEL_STD
    return unit(view.reshape(1, -1) @ weights.astype(np.float64))[0]


def random_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def write_image(folder, name, image, form="PNG", **options):
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(os.fsencode(folder), os.fsencode(name))
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, form, **options)
    with open(path, "wb") as file:
        file.write(encoded.getvalue())
    return os.fsdecode(path)


def call(program, *arguments, monkeypatch):
    """Runs main() of a program of experiments/ in this process."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, arguments)])
    # What it does to the streams is for a process of its own.
    monkeypatch.setattr("program.prepare", lambda: None)
    program.main()
