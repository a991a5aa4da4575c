"""The host's half of a view: boxes cut out of images and resized, as uint8.

The resize is Pillow's: bilinear, antialiased, one axis after the other, each rounded to levels of
255; what lies outside a box does not count, as in torchvision. Weights are whole multiples of
2^-15, so that all sums are exact in float32: the result does not depend on the processor, on its
threads, or on what else is in a batch. It differs from Pillow's by one level at most.
"""

import math
from collections.abc import Callable

import tensorflow as tf

from isd_tf.views.randomness import Stream, between, uniforms

ATTEMPTS = 10
AREA = (0.2, 1.0)  # of the paper's views
ASPECT = (3 / 4, 4 / 3)

# Levels have 8 bits and float32 has 24: sums of levels in these weights are exact.
WEIGHT_BITS = 15
# Neighbouring outputs share most of their inputs: so many at a time are one matrix product.
BLOCK = 16
# Of a large image so many pixels at a time become floats, which take four times its memory.
PART_PIXELS = 2**21
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
    boxes = crop_boxes(crop_draws(seeds), images, area, aspect)
    return resize_boxes(to_levels(images), boxes, size)


def crop_draws(seeds: tf.Tensor) -> tf.Tensor:
    """Draws what `crop_boxes` needs for each seed of int64 [B, 2]: float32 [B, 22]."""
    return uniforms(seeds, Stream.CROP, 2 * ATTEMPTS + 2)


def crop_boxes(
    draws: tf.Tensor,
    images: tf.Tensor,
    area: tuple[float, float] = AREA,
    aspect: tuple[float, float] = ASPECT,
) -> tf.Tensor:
    """Chooses torchvision's random boxes: int32 [B, 4] of (top, left, height, width) in pixels.

    Ten attempts an image; the first box that fits is taken. Where none fits, the largest centred
    box of an allowed aspect is.

    Args:
        draws: [B, 22], of `crop_draws`.
        images: [B, H, W, 3].
        area, aspect: as in `random_resized_crop`.

    Source: torchvision.transforms.RandomResizedCrop.get_params.
    """
    # In double precision a box does not depend on how a processor rounds.
    draws = tf.cast(draws, tf.float64)
    height, width = tf.unstack(tf.cast(tf.shape(images)[1:3], tf.float64))
    pixels = height * width * between(draws[:, :ATTEMPTS], *area)
    ratios = tf.exp(between(draws[:, ATTEMPTS : 2 * ATTEMPTS], *map(math.log, aspect)))
    widths, heights = tf.round(tf.sqrt(pixels * ratios)), tf.round(tf.sqrt(pixels / ratios))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)

    any_fits, first_fit = tf.reduce_any(fits, axis=1), tf.argmax(tf.cast(fits, tf.int32), axis=1)
    box_height, box_width = (
        tf.where(any_fits, tf.gather(sides, first_fit, batch_dims=1), largest)
        for sides, largest in (
            (heights, tf.minimum(height, tf.round(width / aspect[0]))),
            (widths, tf.minimum(width, tf.round(height * aspect[1]))),
        )
    )
    top = tf.where(any_fits, draws[:, -2] * (height - box_height + 1), (height - box_height) // 2)
    left = tf.where(any_fits, draws[:, -1] * (width - box_width + 1), (width - box_width) // 2)
    return tf.cast(tf.stack([tf.floor(top), tf.floor(left), box_height, box_width], 1), tf.int32)


def resize_boxes(images: tf.Tensor, boxes: tf.Tensor, size: int) -> tf.Tensor:
    """Cuts one box out of each image and resizes it.

    Args:
        images: uint8 [B, H, W, 3].
        boxes: int32 [B, 4] of (top, left, height, width) in pixels.
        size: side S of the result in pixels.

    Returns:
        uint8 [B, S, S, 3].
    """
    starts, lengths = boxes[:, :2], boxes[:, 2:]
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
        steps = tf.cast(ends / resized, tf.float32)[tf.newaxis]  # [1, 2]
        margins = tf.round(tf.cast(resized - size, tf.float32) / 2)
        return _resample(
            central, margins * steps, steps, tf.zeros([1, 2], tf.int32), ends[tf.newaxis], size
        )

    crops = tf.cond(tf.reduce_all(sides == size), lambda: images, resize_and_cut)
    return tf.ensure_shape(crops, [None, size, size, 3])


def to_levels(images: tf.Tensor) -> tf.Tensor:
    """Rounds images in [0, 1] to uint8; uint8 images pass."""
    return tf.image.convert_image_dtype(images, tf.uint8, saturate=True)


def _resample(images, starts, steps, firsts, ends, size):
    """Resizes each image [H, W, 3], or all in the same way, along both axes.

    Output i of an axis is centred at starts + (i + 1/2) * steps of the input, and made of its
    pixels from `firsts` up to `ends`; each [B, 2] or [1, 2].
    """
    single = images.shape[0] == 1
    if single:  # Then no more than the box is worked on, a part of its rows at a time.
        sides, (top, left) = tf.shape(images)[1:3], tf.unstack(firsts[0])
        starts -= tf.cast(firsts, tf.float32)
        firsts, ends = tf.zeros_like(firsts), ends - firsts
    (rows, of_rows), (columns, of_columns) = (
        _blocks(*(values[:, axis] for values in (starts, steps, firsts, ends)), size)
        for axis in (0, 1)
    )

    # Across first, as Pillow does with few exceptions. What comes out has its sides swapped.
    if single:  # Of the box, what shows: of a centre, often half.
        rows, columns = rows + top, columns + left
        (upper, lower), (begin, end) = (
            _cover(x, side) for x, side in zip((rows, columns), tf.unstack(sides), strict=True)
        )
        box = images[:, upper:lower, begin:end]
        across = in_parts(
            lambda first, last: _resize_across(
                box[:, first:last], columns - begin, of_columns, size
            )[0],
            lower - upper,
            end - begin,
            result=tf.zeros([size, 0, 3], tf.uint8),
            joined=1,
        )[tf.newaxis]
        rows -= upper
    else:
        across = _resize_across(images, columns, of_columns, size)
    return tf.ensure_shape(_resize_across(across, rows, of_rows, size), [None, size, size, 3])


def _cover(window, side):
    """First and last + 1 of what holds a window of a side, in a multiple of SHAPE_STEP pixels."""
    first, length = tf.reduce_min(window), tf.reduce_max(window) - tf.reduce_min(window) + 1
    length = tf.minimum(-(-length // SHAPE_STEP) * SHAPE_STEP, side)
    first = tf.minimum(first, side - length)
    return first, first + length


def _resize_across(images, window, weights, size):
    """Resizes [B, H, W, 3] along W, by `_blocks` of it, to uint8 [B, size, H, 3]."""
    count, other, length = tf.unstack(tf.shape(images)[:3])
    # The scale belongs to the weights. Here it keeps TensorFlow from transposing before the cast,
    # as uint8, of which oneDNN complains in every run's output.
    lines = tf.transpose(tf.cast(images, tf.float32) * 2**-WEIGHT_BITS, [0, 2, 1, 3])
    _, blocks, _, taps = tf.unstack(tf.shape(weights))
    window = tf.broadcast_to(window, [count, blocks * taps])
    weights = tf.broadcast_to(weights, [count, blocks, BLOCK, taps])
    lines = tf.gather(tf.reshape(lines, [count, length, other * 3]), window, batch_dims=1)
    lines = tf.reshape(lines, [count * blocks, taps, other * 3])
    sums = tf.matmul(tf.reshape(weights, [-1, BLOCK, taps]), lines)
    levels = tf.floor(tf.reshape(sums, [count, blocks * BLOCK, other, 3])[:, :size] + 0.5)
    return tf.cast(levels, tf.uint8)


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


def _blocks(start, step, first, end, size):
    """Antialiased bilinear weights along one axis, for blocks of outputs; arguments [B].

    Returns the inputs of each block, int32 [B, blocks * taps], and what they weigh in each of its
    outputs, float32 [B, blocks, BLOCK, taps], in units of 2^-WEIGHT_BITS.
    """
    blocks = -(-size // BLOCK)
    # Pillow's triangle reaches one output pixel to each side, but never less than an input pixel.
    reach = tf.maximum(step, 1.0)[:, tf.newaxis, tf.newaxis, tf.newaxis]
    outputs = tf.range(blocks * BLOCK, dtype=tf.float32) + 0.5
    centres = start[:, tf.newaxis] + outputs * step[:, tf.newaxis]
    centres = tf.reshape(centres, [-1, blocks, BLOCK, 1])
    span = tf.reduce_max((BLOCK - 1) * step + 2 * tf.maximum(step, 1.0))
    taps = tf.range(tf.math.ceil(span) + 1)
    inputs = tf.floor(centres[:, :, :1] - reach + 0.5) + taps  # [B, blocks, 1, taps]
    weights = tf.maximum(1 - tf.abs(inputs + 0.5 - centres) / reach, 0.0)
    first, end = (
        tf.cast(x, tf.float32)[:, tf.newaxis, tf.newaxis, tf.newaxis] for x in (first, end)
    )
    weights = tf.where((inputs >= first) & (inputs < end), weights, 0.0)
    # Of outputs beyond the last, which fill its block, nothing may weigh.
    weights = tf.math.divide_no_nan(weights, tf.reduce_sum(weights, axis=3, keepdims=True))
    weights = tf.round(weights * 2**WEIGHT_BITS)
    window = tf.cast(tf.clip_by_value(inputs, first, end - 1), tf.int32)
    return tf.reshape(window, [-1, blocks * tf.size(taps)]), weights
