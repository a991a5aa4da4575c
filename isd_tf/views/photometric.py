"""The device's half of a view: colours, blur, flip and normalising, for a batch at once.

Every function is pure: the same seed gives the same view on any device. Numbers mean what they mean
in torchvision, which the paper used. Compiled by XLA, a view has the same bits however many others
come with it, from two images on: no value depends on the order in which a device adds pixels up.

Images are float32 [B, H, W, 3] in [0, 1]; seeds are int64 [B, 2], one row an image. The colours
work on the three channels apart, [B, H, W] each, which processors do several times faster.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from isd_tf.views.randomness import Stream, between, uniforms

# ImageNet's channel statistics, which every recipe of the paper uses.
CHANNEL_MEAN = (0.485, 0.456, 0.406)
CHANNEL_STD = (0.229, 0.224, 0.225)
# ITU-R 601 luma, torchvision's rgb_to_grayscale.
LUMA = (0.2989, 0.587, 0.114)

# Sigmas reach 2 pixels; beyond three of them lies a thousandth of a Gaussian's weight.
BLUR_RADIUS = 6


def normalize(images: tf.Tensor) -> tf.Tensor:
    """Subtracts ImageNet's channel means and divides by its channel deviations."""
    shape = tf.shape(images)
    # By lines: to spread three values over an image takes TensorFlow five times as long.
    lines = tf.reshape(images, tf.concat([shape[:-2], [-1]], 0))
    mean, deviation = (tf.tile(x, shape[-2:-1]) for x in (CHANNEL_MEAN, CHANNEL_STD))
    return tf.reshape((lines - mean) / deviation, shape)


def denormalize(views: np.ndarray) -> np.ndarray:
    """Undoes `normalize`, for people to look at: values in [0, 1]."""
    return np.clip(np.asarray(views) * CHANNEL_STD + CHANNEL_MEAN, 0, 1)


def to_unit_range(images: tf.Tensor) -> tf.Tensor:
    """Turns uint8 images into float32 in [0, 1]; float images pass."""
    return tf.image.convert_image_dtype(images, tf.float32)


# ------------------------------------------------------------------------------------ colour


class Jitter(NamedTuple):
    """What colour jitter and greyscale do to each image, each value [B].

    Factors multiply (1 leaves the image as it is), hue is in turns. Of the random order of the four
    operations only one thing matters: which of the first three come before the hue shift. Among
    themselves they commute, as none but brightness changes the mean grey.
    """

    brightness: tf.Tensor
    contrast: tf.Tensor
    saturation: tf.Tensor
    hue: tf.Tensor
    before_hue: tf.Tensor  # bool [B, 3]: brightness, contrast, saturation
    grayscale: tf.Tensor  # bool


def color_jitter_and_grayscale(
    images: tf.Tensor,
    seeds: tf.Tensor,
    jitter_rate: float = 0.8,
    grayscale_rate: float = 0.2,
    strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
) -> tf.Tensor:
    """Jitters brightness, contrast, saturation and hue in random order; greys some images.

    Args:
        images: float32 [B, H, W, 3] in [0, 1].
        seeds: int64 [B, 2].
        jitter_rate: share of the images that are jittered.
        grayscale_rate: share of the images that turn grey, after the jitter.
        strengths: of brightness, contrast and saturation (factors are uniform in 1 +- strength)
            and of hue (a shift uniform in +- strength turns).

    Returns:
        float32 [B, H, W, 3] in [0, 1].
    """
    return apply_jitter(images, draw_jitter(seeds, jitter_rate, grayscale_rate, strengths))


def draw_jitter(
    seeds, jitter_rate=0.8, grayscale_rate=0.2, strengths=(0.4, 0.4, 0.4, 0.1)
) -> Jitter:
    """Draws the parameters of `apply_jitter`; arguments as in `color_jitter_and_grayscale`."""
    draws = uniforms(seeds, Stream.COLOR, 10)
    jittered = draws[:, 8] < jitter_rate
    factors = [
        tf.where(jittered, between(draws[:, i], 1 - strength, 1 + strength), 1.0)
        for i, strength in enumerate(strengths[:3])
    ]
    hue = tf.where(jittered, between(draws[:, 3], -strengths[3], strengths[3]), 0.0)
    # The operations follow each other in the order of four numbers, the last of which is hue's.
    return Jitter(*factors, hue, draws[:, 4:7] < draws[:, 7:8], draws[:, 9] < grayscale_rate)


def apply_jitter(images: tf.Tensor, jitter: Jitter) -> tf.Tensor:
    """Applies drawn jitter to images [B, H, W, 3] in [0, 1].

    Values are clipped before the hue shift and after all, where torchvision clips after every
    operation: a mean deviation of 0.2/255.
    """
    first, last = (
        [
            tf.where(chosen, factor, 1.0)
            for chosen, factor in zip(tf.unstack(side, axis=1), jitter[:3], strict=True)
        ]
        for side in (jitter.before_hue, ~jitter.before_hue)
    )
    channels = tf.unstack(images, axis=3)  # three of [B, H, W]
    channels = _adjust(channels, *first)
    channels = _shift_hue(channels, jitter.hue)
    brightness, contrast, saturation = last
    saturation = tf.where(jitter.grayscale, 0.0, saturation)
    return tf.stack(_adjust(channels, brightness, contrast, saturation), axis=3)


def _adjust(channels, brightness, contrast, saturation):
    """Scales channels [B, H, W] towards black, their mean grey, and their grey; each factor [B]."""
    gray = LUMA[0] * channels[0] + LUMA[1] * channels[1] + LUMA[2] * channels[2]
    color = (brightness * contrast * saturation)[:, tf.newaxis, tf.newaxis]
    gray_share = (brightness * contrast * (1 - saturation))[:, tf.newaxis, tf.newaxis]
    offset = (brightness * (1 - contrast) * _exact_mean(gray))[:, tf.newaxis, tf.newaxis]
    shared = gray_share * gray + offset
    return [tf.clip_by_value(color * channel + shared, 0.0, 1.0) for channel in channels]


def _exact_mean(channel):
    """Means [B] of values [B, H, W] in [0, 1], in integers: their sum has no order."""
    pixels = channel.shape[1] * channel.shape[2]
    scale = 2 ** (30 - (pixels - 1).bit_length())  # The sum stays below 2^31.
    levels = tf.cast(channel * scale + 0.5, tf.int32)
    return tf.cast(tf.reduce_sum(levels, axis=[1, 2]), tf.float32) / (pixels * scale)


def _shift_hue(channels, turns):
    """Shifts the hue of channels [B, H, W] in [0, 1] by `turns` [B], in HSV as torchvision does."""
    red, green, blue = channels
    value = tf.maximum(tf.maximum(red, green), blue)
    chroma = value - tf.minimum(tf.minimum(red, green), blue)
    per_chroma = 1 / tf.where(chroma > 0, chroma, 1.0)
    # In sixths of a turn. By order, not by equality with `value`: at a tie either side is right,
    # and a compiler may compute the two sides in different ways.
    hue = tf.where(
        (red >= green) & (red >= blue),
        (green - blue) * per_chroma,
        tf.where(green >= blue, 2 + (blue - red) * per_chroma, 4 + (red - green) * per_chroma),
    )
    hue += 6 * turns[:, tf.newaxis, tf.newaxis]

    def shifted(sixths):
        distance = hue + sixths
        distance -= 6 * tf.floor(distance * (1 / 6))
        return value - chroma * tf.clip_by_value(tf.minimum(distance, 4 - distance), 0.0, 1.0)

    return [shifted(5.0), shifted(3.0), shifted(1.0)]


# ----------------------------------------------------------------------------- blur and flip


def random_gaussian_blur(
    images: tf.Tensor,
    seeds: tf.Tensor,
    rate: float = 0.5,
    sigma: tuple[float, float] = (0.1, 2.0),
    in_memory: Callable[[tf.Tensor], tf.Tensor] = tf.identity,
) -> tf.Tensor:
    """Blurs a share of the images by Gaussians with edges extended, as Pillow extends them.

    Args:
        images: float32 [B, H, W, 3] in [0, 1].
        seeds: int64 [B, 2].
        rate: share of the images that are blurred.
        sigma: range of the Gaussian's deviation in pixels, uniform.
        in_memory: as in `blur`.

    Returns:
        float32 [B, H, W, 3] in [0, 1].
    """
    draws = uniforms(seeds, Stream.BLUR, 2)
    weights = gaussian_weights(between(draws[:, 1], *sigma))
    nothing = [1.0 if offset == 0 else 0.0 for offset in range(BLUR_RADIUS + 1)]
    return blur(images, tf.where(draws[:, :1] < rate, weights, nothing), in_memory)


def gaussian_weights(sigmas: tf.Tensor) -> tf.Tensor:
    """Weights [B, R + 1] of the pixels 0 to R = BLUR_RADIUS away, for deviations [B] in pixels."""
    distances = tf.range(BLUR_RADIUS + 1, dtype=tf.float32)
    weights = tf.exp(-(distances**2) / (2 * sigmas[:, tf.newaxis] ** 2))
    return weights / (2 * tf.reduce_sum(weights, axis=1, keepdims=True) - weights[:, :1])


def blur(
    images: tf.Tensor,
    weights: tf.Tensor,
    in_memory: Callable[[tf.Tensor], tf.Tensor] = tf.identity,
) -> tf.Tensor:
    """Averages images [B, H, W, 3] along both axes by `weights` as of `gaussian_weights`.

    A compiler can be told by `in_memory` what to compute once: else XLA looks, at each of the
    thirteen uses of a pixel, whether it is of the image or extends its edge.
    """
    channels = tf.concat(tf.unstack(images, axis=3), axis=0)  # [3B, H, W]
    weights = tf.unstack(tf.tile(weights, [3, 1])[..., tf.newaxis, tf.newaxis], axis=1)
    for axis in (1, 2):
        first, last = _cut(channels, axis, 0, 1), _cut(channels, axis, channels.shape[axis] - 1, 1)
        first, last = (tf.repeat(edge, BLUR_RADIUS, axis) for edge in (first, last))
        extended = in_memory(tf.concat([first, channels, last], axis))
        shifted = [
            _cut(extended, axis, start, channels.shape[axis])
            for start in range(2 * BLUR_RADIUS + 1)
        ]
        offsets = range(-BLUR_RADIUS, BLUR_RADIUS + 1)
        channels = tf.add_n([weights[abs(o)] * x for o, x in zip(offsets, shifted, strict=True)])
    return tf.stack(tf.split(channels, 3), axis=3)


def _cut(x, axis, start, length):
    return x[:, start : start + length] if axis == 1 else x[:, :, start : start + length]


def random_horizontal_flip(images: tf.Tensor, seeds: tf.Tensor, rate: float = 0.5) -> tf.Tensor:
    """Mirrors a share `rate` of the images [B, H, W, 3] left to right; seeds are int64 [B, 2]."""
    flipped = uniforms(seeds, Stream.FLIP, 1) < rate  # [B, 1]
    return tf.where(flipped[:, :, tf.newaxis, tf.newaxis], tf.reverse(images, [2]), images)
