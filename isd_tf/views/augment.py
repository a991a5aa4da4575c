"""Views: the random transformations whose agreement is learned, and the fixed one that is scored.

Every view is a pure function of (images, seeds). Numbers mean what they mean in torchvision, which
the paper used. A view is cut in two: the host crops an image as uint8 (`crops.py`), the device does
the rest for a batch at once (`photometric.py`). The recipes, side by side:

    strong: crop | colour jitter (p .8), greyscale (p .2), blur (p .5), flip (p .5), normalise
    weak:   crop |                                                      flip (p .5), normalise
    crop:   crop from 8% of the area on |                               flip (p .5), normalise

`crop` is what CompRess shows its networks, and the linear classifier is trained on.

Source: paper section 4; UMBCvision/ISD train_isd_plus.py:260-286 and eval_linear.py:131-136;
UMBCvision/CompRess train_student_one_queue.py; torchvision.transforms.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla  # Nothing public has its barrier.

from isd_tf.views import crops
from isd_tf.views.photometric import (
    color_jitter_and_grayscale,
    normalize,
    random_gaussian_blur,
    random_horizontal_flip,
    to_unit_range,
)


def finish_strong(images: tf.Tensor, seeds: tf.Tensor, in_memory=tf.identity) -> tf.Tensor:
    """The strong view's part after the crop: images [B, S, S, 3] and seeds [B, 2] to views."""
    views = color_jitter_and_grayscale(to_unit_range(images), seeds)
    views = random_gaussian_blur(views, seeds, in_memory=in_memory)
    return normalize(random_horizontal_flip(views, seeds))


def finish_weak(images: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
    """The weak view's part after the crop: images [B, S, S, 3] and seeds [B, 2] to views."""
    return normalize(random_horizontal_flip(to_unit_range(images), seeds))


class Recipe(NamedTuple):
    """How a view is made."""

    area: tuple[float, float]  # range of the crop's share of the image's area
    finish: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # the device's half


RECIPES = {
    "strong": Recipe(crops.AREA, finish_strong),
    "weak": Recipe(crops.AREA, finish_weak),
    "crop": Recipe((0.08, 1.0), finish_weak),
}


def _in_memory(x):
    return xla.optimization_barrier(x)[0]


# One program for a recipe, a batch's shape and a device.
_COMPILED = {
    name: tf.function(
        functools.partial(finish_strong, in_memory=_in_memory)
        if recipe.finish is finish_strong
        else recipe.finish,
        jit_compile=True,
    )
    for name, recipe in RECIPES.items()
}


def finish(view: tf.Tensor | dict[str, tuple[tf.Tensor, tf.Tensor]]) -> tf.Tensor:
    """Does the device's half of a view, compiled by XLA; a finished view passes.

    Args:
        view: float32 [B, S, S, 3]; or, under a recipe's name, crops uint8 [B, S, S, 3] and seeds
            int64 [B, 2], as `pretraining_batches` makes them.

    Returns:
        float32 [B, S, S, 3], normalised by ImageNet's channel statistics. From two images on each
        has the same bits whatever others come with it (of a single one XLA rounds some otherwise).
    """
    if not isinstance(view, dict):
        return view
    ((recipe, (images, seeds)),) = view.items()
    return _COMPILED[recipe](images, seeds)


def strong_view(images: tf.Tensor, seeds: tf.Tensor, size: int) -> tf.Tensor:
    """Draws the paper's strong view of each image.

    Args:
        images: uint8 or float32 in [0, 1], [B, H, W, 3].
        seeds: int64 [B, 2].
        size: side of the view in pixels.

    Returns:
        float32 [B, size, size, 3], normalised by ImageNet's channel statistics.
    """
    return finish_strong(crops.random_resized_crop(images, seeds, size), seeds)


def weak_view(images: tf.Tensor, seeds: tf.Tensor, size: int) -> tf.Tensor:
    """Draws the paper's weak view of each image; arguments and result as in `strong_view`."""
    return finish_weak(crops.random_resized_crop(images, seeds, size), seeds)


def evaluation_view(images: tf.Tensor, size: int) -> tf.Tensor:
    """Resizes the shorter side to 256/224 of `size`, crops the centre and normalises.

    Images that already have the training size pass unresized, as small benchmark images do in the
    literature.

    Args:
        images: uint8 or float32 in [0, 1], [B, H, W, 3]; H and W may be unknown until run time.
        size: side of the view in pixels.

    Returns:
        float32 [B, size, size, 3], normalised. Source: UMBCvision/ISD eval_knn.py:77-83.
    """
    return normalize(to_unit_range(crops.centre_crops(crops.to_levels(images), size)))
