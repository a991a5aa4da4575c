"""The host's half of a view: boxes cut out of images and resized, as uint8.

The resize is Pillow's: bilinear, antialiased, one axis after the other, each rounded to levels of
255; what lies outside a box does not count, as in torchvision. Weights are whole multiples of
2^-15, so that all sums are exact in float32: the result does not depend on the processor, on its
threads, or on what else is in a batch. Some pixels differ from Pillow's by a level; by two at
most, as both round twice.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from isd_tf.views.python_crops import ASPECT, ATTEMPTS, PART_PIXELS
from isd_tf.views.randomness import Stream, between, uniforms

AREA = (0.2, 1.0)  # of the paper's views

# Levels have 8 bits and float32 has 24: sums of levels in these weights are exact.
WEIGHT_BITS = 15
# Neighbouring outputs share most of their inputs: so many at a time are one matrix product.
BLOCK = 16
# Sides of what is worked on are multiples of it: for each new shape oneDNN makes its kernels anew,
# which takes half as long as a crop.
SHAPE_STEP = 64


def random_resized_crop(
    images: tf.Tensor,
    seeds: tf.Tensor,
    size: int,
    area: tuple[float, float] = AREA,
    aspect: tuple[float, float] = ASPECT,
) -> tf.Tensor:
    """Cuts a random box out of each image and resizes it.

    Args:
        images: uint8, or float32 in [0, 1], [B, H, W, 3].
        seeds: int64 [B, 2].
        size: side S of the result in pixels.
        area: range of the box's share of the image's area, uniform.
        aspect: range of the box's width over height, log-uniform.

    Returns:
        uint8 [B, S, S, 3].
    """
    boxes = crop_boxes(crop_draws(seeds)[:, tf.newaxis], images, [area], aspect)
    return resize_boxes(to_levels(images), boxes, size)[0]


def crop_draws(seeds: tf.Tensor) -> tf.Tensor:
    """Draws what `crop_boxes` needs for each seed of int64 [B, 2]: float32 [B, 22]."""
    return uniforms(seeds, Stream.CROP, 2 * ATTEMPTS + 2)


def crop_boxes(
    draws: tf.Tensor,
    images: tf.Tensor,
    areas: Sequence[tuple[float, float]] = (AREA,),
    aspect: tuple[float, float] = ASPECT,
) -> tf.Tensor:
    """Chooses torchvision's random boxes, of each image one for each of V views.

    Ten attempts a box; the first that fits is taken. Where none fits, the largest centred box of an
    allowed aspect is.

    Args:
        draws: [B, V, 22], of `crop_draws`.
        images: [B, H, W, 3].
        areas: of each view, as `area` in `random_resized_crop`.
        aspect: as there.

    Returns:
        int32 [B, V, 4] of (top, left, height, width) in pixels.

    Source: torchvision.transforms.RandomResizedCrop.get_params.
    """
    if draws.shape[1] != len(areas):
        raise ValueError(f"Each view needs draws of its own. Received: {draws.shape} for {areas}.")
    # In double precision a box does not depend on how a processor rounds.
    draws = tf.cast(draws, tf.float64)
    height, width = tf.unstack(tf.cast(tf.shape(images)[1:3], tf.float64))
    low, high = np.transpose(areas)[:, :, np.newaxis]  # Each [V, 1].
    pixels = height * width * between(draws[..., :ATTEMPTS], low, high)
    ratios = tf.exp(between(draws[..., ATTEMPTS : 2 * ATTEMPTS], *map(math.log, aspect)))
    widths, heights = tf.round(tf.sqrt(pixels * ratios)), tf.round(tf.sqrt(pixels / ratios))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)

    any_fits, first_fit = tf.reduce_any(fits, axis=2), tf.argmax(tf.cast(fits, tf.int32), axis=2)
    box_height, box_width = (
        tf.where(any_fits, tf.gather(sides, first_fit, batch_dims=2), largest)
        for sides, largest in (
            (heights, tf.minimum(height, tf.round(width / aspect[0]))),
            (widths, tf.minimum(width, tf.round(height * aspect[1]))),
        )
    )
    top = tf.where(any_fits, draws[..., -2] * (height - box_height + 1), (height - box_height) // 2)
    left = tf.where(any_fits, draws[..., -1] * (width - box_width + 1), (width - box_width) // 2)
    return tf.cast(tf.stack([tf.floor(top), tf.floor(left), box_height, box_width], 2), tf.int32)


def resize_boxes(images: tf.Tensor, boxes: tf.Tensor, size: int) -> list[tf.Tensor]:
    """Cuts V boxes out of each image and resizes them.

    Args:
        images: uint8 [B, H, W, 3].
        boxes: int32 [B, V, 4] of (top, left, height, width) in pixels.
        size: side S of the result in pixels.

    Returns:
        V times uint8 [B, S, S, 3].
    """
    starts, lengths = boxes[..., :2], boxes[..., 2:]
    steps = tf.cast(lengths, tf.float32) / size
    return _resample(images, tf.cast(starts, tf.float32), steps, starts, starts + lengths, size)


def centre_crops(images: tf.Tensor, size: int) -> tf.Tensor:
    """Resizes the shorter side of images to 256/224 of `size` and cuts the centre.

    Images that already have this size pass, as small benchmark images do in the literature.

    Args:
        images: uint8 [B, H, W, 3]; H and W may be unknown until run time.
        size: side S of the result in pixels.

    Returns:
        uint8 [B, S, S, 3]. Source: UMBCvision/ISD eval_knn.py:77-83.
    """
    sides = tf.shape(images)[1:3]

    def resize_and_cut():
        # What lies far outside the central square shows nowhere, and could be gigabytes.
        shorter = tf.reduce_min(sides)
        top, left = tf.unstack(tf.maximum(sides - 2 * shorter, 0) // 2)
        central = images[:, top : sides[0] - top, left : sides[1] - left]
        # torchvision rounds the longer side down, and half of the margin to even.
        ends = tf.shape(central)[1:3]
        resized = ends * round(size * 256 / 224) // shorter
        steps = tf.cast(ends / resized, tf.float32)
        margins = tf.round(tf.cast(resized - size, tf.float32) / 2)
        places = margins * steps, steps, tf.zeros([2], tf.int32), ends
        return _resample(central, *(values[tf.newaxis, tf.newaxis] for values in places), size)[0]

    crops = tf.cond(tf.reduce_all(sides == size), lambda: images, resize_and_cut)
    return tf.ensure_shape(crops, [None, size, size, 3])


def to_levels(images: tf.Tensor) -> tf.Tensor:
    """Rounds images in [0, 1] to uint8; uint8 images pass."""
    return tf.image.convert_image_dtype(images, tf.uint8, saturate=True)


def _resample(images, starts, steps, firsts, ends, size):
    """Resizes V parts of each image [H, W, 3], or the same of all, along both axes.

    Output i of an axis is centred at starts + (i + 1/2) * steps of the input, and made of its
    pixels from `firsts` up to `ends`; each [B, V, 2] or [1, V, 2].
    """
    single = images.shape[0] == 1
    origins = tf.zeros_like(firsts)
    if single:  # Then no more than the box is worked on, a part of its rows at a time.
        origins, sides = firsts, tf.unstack(tf.shape(images)[1:3])
        starts, ends = starts - tf.cast(firsts, tf.float32), ends - firsts
        firsts = tf.zeros_like(firsts)
    windows, weights, taps = _blocks(starts, steps, firsts, ends, size)
    windows += origins[..., tf.newaxis, tf.newaxis]

    views = []
    for view, own_taps in enumerate(tf.unstack(taps)):
        (rows, of_rows), (columns, of_columns) = (
            (windows[:, view, axis, :, :count], _whole(weights[:, view, axis, :, :, :count]))
            for axis, count in enumerate(tf.unstack(own_taps))
        )
        # Across first, as Pillow does with few exceptions. What comes out has its sides swapped.
        if single:  # Of the box, what shows: of a centre, often half.
            upper, lower = _cover(rows, sides[0])
            begin, end = _cover(columns, sides[1])
            across = _resize_one_across(
                images[:, upper:lower, begin:end], columns - begin, of_columns, size
            )
            rows -= upper
        else:
            across = _resize_across(images, columns, of_columns, size)
        views.append(_resize_across(across, rows, of_rows, size))
    return [tf.ensure_shape(view, [None, size, size, 3]) for view in views]


def _cover(window, side):
    """First and last + 1 of what holds a window of a side, in a multiple of SHAPE_STEP pixels."""
    first, length = tf.reduce_min(window), tf.reduce_max(window) - tf.reduce_min(window) + 1
    length = tf.minimum(-(-length // SHAPE_STEP) * SHAPE_STEP, side)
    first = tf.minimum(first, side - length)
    return first, first + length


def _resize_across(images, window, weights, size):
    """Resizes [B, H, W, 3] along W, by `_blocks` of it, to uint8 [B, size, H, 3]."""
    count, other, length = tf.unstack(tf.shape(images)[:3])
    lines = with_sides_swapped(tf.cast(images, tf.float32))
    _, blocks, _, taps = tf.unstack(tf.shape(weights))
    window = tf.broadcast_to(tf.reshape(window, [-1, blocks * taps]), [count, blocks * taps])
    weights = tf.broadcast_to(weights, [count, blocks, BLOCK, taps])
    lines = tf.gather(tf.reshape(lines, [count, length, other * 3]), window, batch_dims=1)
    lines = tf.reshape(lines, [count * blocks, taps, other * 3])
    sums = tf.matmul(tf.reshape(weights, [-1, BLOCK, taps]), lines)
    sums = tf.reshape(sums, [count, blocks * BLOCK, other, 3])[:, :size]
    return tf.cast(sums + 0.5, tf.uint8)  # Which cuts off what is behind the point.


def with_sides_swapped(images: tf.Tensor) -> tf.Tensor:
    """Transposes float32 [B, H, W, 3] to [B, W, H, 3].

    TensorFlow would do `tf.transpose` on the other side of a cast, as uint8, which takes longer,
    and of which oneDNN complains in every run's output.
    """
    return tf.raw_ops.ConjugateTranspose(x=images, perm=[0, 2, 1, 3])


def _resize_one_across(images, window, weights, size):
    """The same of one image, of whatever size."""
    return in_parts(
        lambda first, last: _resize_across(images[:, first:last], window, weights, size)[0],
        *tf.unstack(tf.shape(images)[1:3]),
        result=tf.zeros([size, 0, 3], tf.uint8),
        joined=1,
    )[tf.newaxis]


def in_parts(
    function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    lines: tf.Tensor,
    line_pixels: tf.Tensor,
    result: tf.Tensor,
    joined: int,
) -> tf.Tensor:
    """Makes an image of parts, one after the other, so that what each takes is soon free again.

    Args:
        function: where a part begins and ends, in lines, to uint8 of rank 3.
        lines: of the image, rows or columns.
        line_pixels: of each line. A part has about PART_PIXELS.
        result: what no part at all would give, of length 0 along `joined`.
        joined: axis along which the parts are put together.
    """
    step = tf.maximum(PART_PIXELS // tf.maximum(line_pixels, 1), 1)

    def join(begin, result):
        end = tf.minimum(begin + step, lines)
        return end, tf.concat([result, function(begin, end)], joined)

    shape = result.shape.as_list()
    shape[joined] = None

    def one_after_the_other():
        return tf.while_loop(
            lambda begin, result: begin < lines,
            join,
            (tf.constant(0), result),
            shape_invariants=(tf.TensorShape([]), tf.TensorShape(shape)),
            parallel_iterations=1,
        )[1]

    # Of an ordinary image the loop would take a tenth of the time of a crop.
    return tf.cond(lines <= step, lambda: function(tf.constant(0), lines), one_after_the_other)


def _blocks(starts, steps, firsts, ends, size):
    """Antialiased bilinear weights for blocks of outputs; arguments [B, V, 2] as of `_resample`.

    Returns the inputs of each block, int32 [B, V, 2, blocks, T], what they weigh in each of its
    outputs, float32 [B, V, 2, blocks, BLOCK, T], up to a factor, and how many of the T a view and
    an axis needs, int32 [V, 2]: the first ones.
    """
    starts, steps, firsts, ends = (
        tf.cast(values, tf.float32)[..., tf.newaxis, tf.newaxis, tf.newaxis]
        for values in (starts, steps, firsts, ends)
    )
    # Pillow's triangle reaches one output pixel to each side, but never less than an input pixel.
    reach = tf.maximum(steps, 1.0)
    spans = tf.reduce_max((BLOCK - 1) * steps + 2 * reach, axis=[0, 3, 4, 5])
    taps = tf.math.ceil(spans) + 1
    outputs = np.arange(-(-size // BLOCK) * BLOCK, dtype=np.float32).reshape(-1, BLOCK, 1) + 0.5
    centres = starts + outputs * steps
    inputs = tf.floor(centres[..., :1, :] - reach + 0.5) + tf.range(tf.reduce_max(taps))
    weights = tf.maximum(1 - tf.abs(inputs + 0.5 - centres) / reach, 0.0)
    weights = tf.where((inputs >= firsts) & (inputs < ends), weights, 0.0)
    windows = tf.cast(tf.clip_by_value(inputs, firsts, ends - 1)[..., 0, :], tf.int32)
    return windows, weights, tf.cast(taps, tf.int32)


def _whole(weights):
    """Weights [..., T] that add up to 1, as multiples of 2^-WEIGHT_BITS."""
    # Of outputs beyond the last, which fill its block, nothing may weigh.
    weights = tf.math.divide_no_nan(weights, tf.reduce_sum(weights, axis=-1, keepdims=True))
    return tf.round(weights * 2**WEIGHT_BITS) * 2**-WEIGHT_BITS
