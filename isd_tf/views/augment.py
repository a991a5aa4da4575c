"""Views: the random transformations whose agreement ISD learns from.

Every view is a pure function of (images, seeds): the same seed gives the same view eagerly, inside
tf.data and on any number of replicas. Numbers mean what they mean in torchvision, which the paper
used; KerasCV 0.9's stock layers give other meanings to the same numbers (its brightness adds, its
crop does not antialias, its jitter has a fixed order). The layers at the end of this file wrap the
functions for KerasCV pipelines.

Images are float32 [B, H, W, 3] in [0, 1], unless a docstring says otherwise; seeds are int64
[B, 2], one row an image. The two recipes, side by side:

    strong: crop, colour jitter (p .8), greyscale (p .2), blur (p .5), flip (p .5), normalise
    weak:   crop,                                                      flip (p .5), normalise

Source: paper section 4; UMBCvision/ISD train_isd_plus.py:260-286; torchvision.transforms.
"""

from typing import NamedTuple

import keras_cv
import numpy as np
import tensorflow as tf

# ImageNet's channel statistics, which every recipe of the paper uses.
CHANNEL_MEAN = (0.485, 0.456, 0.406)
CHANNEL_STD = (0.229, 0.224, 0.225)
# ITU-R 601 luma, torchvision's rgb_to_grayscale.
LUMA = np.array([0.2989, 0.587, 0.114], np.float32)

# Sigmas reach 2 pixels; beyond four of them a Gaussian weighs less than half a level of 255.
BLUR_RADIUS = 8


def strong_view(images: tf.Tensor, seeds: tf.Tensor, size: int) -> tf.Tensor:
    """Draws the paper's strong view of each image.

    Args:
        images: uint8 or float32 in [0, 1], [B, H, W, 3].
        seeds: int64 [B, 2].
        size: side of the view in pixels.

    Returns:
        float32 [B, size, size, 3], normalised by ImageNet's channel statistics.
    """
    views = random_resized_crop(images, seeds, size)
    views = color_jitter_and_grayscale(views, seeds)
    views = random_gaussian_blur(views, seeds)
    views = random_horizontal_flip(views, seeds)
    return normalize(views)


def weak_view(images: tf.Tensor, seeds: tf.Tensor, size: int) -> tf.Tensor:
    """Draws the paper's weak view of each image; arguments and result as in `strong_view`."""
    views = random_resized_crop(images, seeds, size)
    views = random_horizontal_flip(views, seeds)
    return normalize(views)


RECIPES = {"strong": strong_view, "weak": weak_view}


def linear_view(images: tf.Tensor, seeds: tf.Tensor, size: int) -> tf.Tensor:
    """Draws the view that the linear classifier is trained on; arguments as in `strong_view`.

    Crop of 8% to all of the area, flip, normalise. Source: UMBCvision/ISD eval_linear.py:131-136.
    """
    views = random_resized_crop(images, seeds, size, area=(0.08, 1.0))
    views = random_horizontal_flip(views, seeds)
    return normalize(views)


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
    images = to_unit_range(images)
    height, width = tf.shape(images)[1], tf.shape(images)[2]

    def resize_and_crop():
        # What lies far outside the central square shows nowhere, and could be gigabytes if resized.
        top, left = tf.maximum(height - 2 * width, 0) // 2, tf.maximum(width - 2 * height, 0) // 2
        central = images[:, top : height - top, left : width - left]
        resized_shorter = round(size * 256 / 224)
        sides = tf.shape(central)[1:3]
        # torchvision rounds the longer side down, and half of the margin to even.
        new_sides = sides * resized_shorter // tf.reduce_min(sides)
        resized = tf.image.resize(central, new_sides, antialias=True)
        top, left = tf.unstack(tf.cast(tf.round((new_sides - size) / 2), tf.int32))
        return resized[:, top : top + size, left : left + size]

    has_training_size = tf.logical_and(tf.equal(height, size), tf.equal(width, size))
    views = tf.cond(has_training_size, lambda: images, resize_and_crop)
    return normalize(tf.ensure_shape(views, [None, size, size, 3]))


def to_unit_range(images: tf.Tensor) -> tf.Tensor:
    """Turns uint8 images into float32 in [0, 1]; float images pass."""
    return tf.image.convert_image_dtype(images, tf.float32)


def normalize(images: tf.Tensor) -> tf.Tensor:
    """Subtracts ImageNet's channel means and divides by its channel deviations."""
    return (images - tf.constant(CHANNEL_MEAN)) / tf.constant(CHANNEL_STD)


def denormalize(views: np.ndarray) -> np.ndarray:
    """Undoes `normalize`, for people to look at: values in [0, 1]."""
    return np.clip(np.asarray(views) * CHANNEL_STD + CHANNEL_MEAN, 0, 1)


# ------------------------------------------------------------------------------------- crop


def random_resized_crop(
    images: tf.Tensor,
    seeds: tf.Tensor,
    size: int,
    area: tuple[float, float] = (0.2, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> tf.Tensor:
    """Cuts a random box out of each image and resizes it to size x size, antialiased bilinear.

    Args:
        images: uint8 or float32 in [0, 1], [B, H, W, 3].
        seeds: int64 [B, 2].
        size: side of the result in pixels.
        area: range of the box's share of the image's area, uniform.
        aspect: range of the box's width over height, log-uniform.

    Returns:
        float32 [B, size, size, 3] in [0, 1].
    """
    boxes = crop_boxes(seeds, tf.shape(images)[1], tf.shape(images)[2], area, aspect)
    return resize_boxes(images, boxes, size)


def crop_boxes(seeds, height, width, area=(0.2, 1.0), aspect=(3 / 4, 4 / 3)) -> tf.Tensor:
    """Draws torchvision's crop boxes: int32 [B, 4] of (top, left, height, width) in pixels.

    Ten attempts an image; the first box that fits is taken. Where none fits, the largest centred
    box of an allowed aspect is.
    """
    attempts = 10
    draws = uniforms(seeds, _Stream.CROP, 2 * attempts + 2)  # [B, 22]
    full_height, full_width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    areas = full_height * full_width * _between(draws[:, :attempts], *area)
    ratios = _exp(_between(draws[:, attempts:-2], np.log(aspect[0]), np.log(aspect[1])))
    widths, heights = tf.round(tf.sqrt(areas * ratios)), tf.round(tf.sqrt(areas / ratios))
    fits = (widths > 0) & (widths <= full_width) & (heights > 0) & (heights <= full_height)

    whole_ratio = full_width / full_height
    fallback_width = tf.minimum(full_width, tf.round(full_height * aspect[1]))
    fallback_height = tf.minimum(full_height, tf.round(full_width / aspect[0]))
    fallback_width = tf.where(whole_ratio < aspect[0], full_width, fallback_width)
    fallback_height = tf.where(whole_ratio > aspect[1], full_height, fallback_height)

    first_fit = tf.argmax(tf.cast(fits, tf.int32), axis=1)
    any_fits = tf.reduce_any(fits, axis=1)
    box_height = tf.where(any_fits, tf.gather(heights, first_fit, batch_dims=1), fallback_height)
    box_width = tf.where(any_fits, tf.gather(widths, first_fit, batch_dims=1), fallback_width)
    random_top = tf.floor(draws[:, -2] * (full_height - box_height + 1))
    random_left = tf.floor(draws[:, -1] * (full_width - box_width + 1))
    top = tf.where(any_fits, random_top, (full_height - box_height) // 2)
    left = tf.where(any_fits, random_left, (full_width - box_width) // 2)
    return tf.cast(tf.stack([top, left, box_height, box_width], axis=1), tf.int32)


def resize_boxes(images: tf.Tensor, boxes: tf.Tensor, size: int) -> tf.Tensor:
    """Cuts one box out of each image and resizes it, antialiased bilinear as Pillow does.

    Args:
        images: uint8 or float32 in [0, 1], [B, H, W, 3].
        boxes: int32 [B, 4] of (top, left, height, width) in pixels.
        size: side of the result in pixels.

    Returns:
        float32 [B, size, size, 3] in [0, 1].
    """

    def resize_box(image_and_box):
        image, (top, left, height, width) = image_and_box[0], tf.unstack(image_and_box[1])
        box = image[top : top + height, left : left + width]
        return tf.image.resize(box, [size, size], antialias=True)

    scale = 255.0 if images.dtype == tf.uint8 else 1.0
    resized = tf.map_fn(resize_box, (images, boxes), fn_output_signature=tf.float32)
    return tf.ensure_shape(resized, [images.shape[0], size, size, 3]) / scale


# ------------------------------------------------------------------------------------ colour


class Jitter(NamedTuple):
    """What colour jitter and greyscale do to each image, each value [B].

    Factors multiply (1 leaves the image as it is), hue is in turns, and `order[b]` lists the four
    operations (0 brightness, 1 contrast, 2 saturation, 3 hue) as they follow each other.
    """

    brightness: tf.Tensor
    contrast: tf.Tensor
    saturation: tf.Tensor
    hue: tf.Tensor
    order: tf.Tensor  # [B, 4]
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
        images: float32 [B, S, S, 3] in [0, 1].
        seeds: int64 [B, 2].
        jitter_rate: share of the images that are jittered.
        grayscale_rate: share of the images that turn grey, after the jitter.
        strengths: of brightness, contrast and saturation (factors are uniform in 1 +- strength)
            and of hue (a shift uniform in +- strength turns).

    Returns:
        float32 [B, S, S, 3] in [0, 1].
    """
    return apply_jitter(images, draw_jitter(seeds, jitter_rate, grayscale_rate, strengths))


def draw_jitter(
    seeds, jitter_rate=0.8, grayscale_rate=0.2, strengths=(0.4, 0.4, 0.4, 0.1)
) -> Jitter:
    """Draws the parameters of `apply_jitter`; arguments as in `color_jitter_and_grayscale`."""
    draws = uniforms(seeds, _Stream.COLOR, 10)
    jittered = draws[:, 8] < jitter_rate
    factors = [
        tf.where(jittered, _between(draws[:, i], 1 - strength, 1 + strength), 1.0)
        for i, strength in enumerate(strengths[:3])
    ]
    hue = tf.where(jittered, _between(draws[:, 3], -strengths[3], strengths[3]), 0.0)
    return Jitter(*factors, hue, tf.argsort(draws[:, 4:8], axis=1), draws[:, 9] < grayscale_rate)


def apply_jitter(images: tf.Tensor, jitter: Jitter) -> tf.Tensor:
    """Applies drawn jitter to images [B, S, S, 3] in [0, 1].

    Brightness, contrast, saturation and greyscale are affine in RGB, so those before the hue shift
    fold into one matrix an image, and those after it into another. Values are clipped once after
    each matrix, where torchvision clips after every operation: a mean deviation of 0.2/255.
    """
    hue_rank = tf.argmax(tf.cast(jitter.order == 3, tf.int32), axis=1, output_type=tf.int32)
    ranks = tf.range(4)[tf.newaxis]
    views = _apply_affine(images, jitter, ranks < hue_rank[:, tf.newaxis])
    views = _shift_hue(views, jitter.hue)
    return _apply_affine(views, jitter, ranks > hue_rank[:, tf.newaxis], grayscale=jitter.grayscale)


def _apply_affine(images, jitter, active, grayscale=None):
    """Applies the affine operations whose rank is `active` [B, 4], folded into one matrix."""
    luma = tf.constant(LUMA)
    to_gray = tf.tile(luma[tf.newaxis], [3, 1])  # [3, 3]: every channel becomes the luma
    mean = tf.reduce_mean(images, axis=[1, 2])  # [B, 3]
    matrix = tf.eye(3, batch_shape=[tf.shape(images)[0]])  # [B, 3, 3]
    offset = tf.zeros_like(mean)  # [B, 3]
    for rank in range(4):
        operation = tf.where(active[:, rank], jitter.order[:, rank], 3)

        def where_operation_is(index, factor, operation=operation):
            return tf.where(operation == index, factor, 1.0)

        brightness = where_operation_is(0, jitter.brightness)
        contrast = where_operation_is(1, jitter.contrast)
        saturation = where_operation_is(2, jitter.saturation)[:, tf.newaxis, tf.newaxis]
        step = saturation * tf.eye(3) + (1 - saturation) * to_gray
        step *= (brightness * contrast)[:, tf.newaxis, tf.newaxis]
        # Contrast blends with the mean grey of the image as transformed so far.
        # A product with all images at once would round each by how many there are.
        mean_gray = tf.reduce_sum((tf.linalg.matvec(matrix, mean) + offset) * luma, axis=1)  # [B]
        shift = ((1 - contrast) * mean_gray)[:, tf.newaxis]
        matrix, offset = step @ matrix, tf.linalg.matvec(step, offset) + shift
    if grayscale is not None:
        gray = grayscale[:, tf.newaxis]
        matrix = tf.where(gray[..., tf.newaxis], to_gray @ matrix, matrix)
        offset = tf.where(gray, tf.linalg.matvec(to_gray, offset), offset)
    pixels = tf.reshape(images, [tf.shape(images)[0], -1, 3])
    pixels = tf.linalg.matmul(pixels, matrix, transpose_b=True) + offset[:, tf.newaxis]
    return tf.clip_by_value(tf.reshape(pixels, tf.shape(images)), 0.0, 1.0)


def _shift_hue(images, turns):
    """Shifts the hue of images in [0, 1] by `turns` [B], in HSV as torchvision does."""
    hue, saturation, value = tf.unstack(tf.image.rgb_to_hsv(images), axis=-1)
    hue = tf.math.floormod(hue + turns[:, tf.newaxis, tf.newaxis], 1.0)
    return tf.image.hsv_to_rgb(tf.stack([hue, saturation, value], axis=-1))


# ----------------------------------------------------------------------------- blur and flip


def random_gaussian_blur(
    images: tf.Tensor,
    seeds: tf.Tensor,
    rate: float = 0.5,
    sigma: tuple[float, float] = (0.1, 2.0),
) -> tf.Tensor:
    """Blurs a share of the images by Gaussians with edges extended, as Pillow extends them.

    Args:
        images: float32 [B, S, S, 3] in [0, 1].
        seeds: int64 [B, 2].
        rate: share of the images that are blurred.
        sigma: range of the Gaussian's deviation in pixels, uniform.

    Returns:
        float32 [B, S, S, 3] in [0, 1].
    """
    draws = uniforms(seeds, _Stream.BLUR, 2)
    blurred = draws[:, 0] < rate
    sigmas = _between(draws[:, 1], *sigma)
    return tf.cond(
        tf.reduce_any(blurred),
        lambda: tf.where(
            blurred[:, tf.newaxis, tf.newaxis, tf.newaxis], gaussian_blur(images, sigmas), images
        ),
        lambda: images,
    )


def gaussian_blur(images: tf.Tensor, sigmas: tf.Tensor) -> tf.Tensor:
    """Blurs images [B, H, W, 3] by Gaussians of deviation `sigmas` [B] in pixels."""
    blurred = images
    # Once along each axis; swapping the axes in between makes both one large matrix product.
    for _ in range(2):
        _, length, other, channels = blurred.shape
        flat = tf.reshape(blurred, [-1, length, other * channels])
        blurred = tf.reshape(_blur_matrices(sigmas, length) @ flat, [-1, length, other, channels])
        blurred = tf.transpose(blurred, [0, 2, 1, 3])
    return blurred


def _blur_matrices(sigmas, length):
    """Blurring along one axis as matrices [B, length, length]; every row sums to 1."""
    offsets = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    weights = _exp(-(offsets.astype(np.float32) ** 2) / (2 * sigmas[:, tf.newaxis] ** 2))
    weights /= tf.reduce_sum(weights, axis=1, keepdims=True)  # [B, 2R + 1]
    # taps[o, i, j] = 1 where output i reads input j at offset o; beyond an edge, the edge itself.
    source = np.clip(np.arange(length)[np.newaxis] + offsets[:, np.newaxis], 0, length - 1)
    taps = np.eye(length, dtype=np.float32)[source]  # [2R + 1, length, length]
    return tf.tensordot(weights, tf.constant(taps), axes=1)


def random_horizontal_flip(images: tf.Tensor, seeds: tf.Tensor, rate: float = 0.5) -> tf.Tensor:
    """Mirrors a share `rate` of the images [B, H, W, 3] left to right; seeds are int64 [B, 2]."""
    flipped = uniforms(seeds, _Stream.FLIP, 1) < rate  # [B, 1]
    return tf.where(flipped[:, :, tf.newaxis, tf.newaxis], tf.reverse(images, [2]), images)


# --------------------------------------------------------------------------------- randomness


class _Stream:
    """Keeps the draws of one image's operations apart. Odd multiples of a large constant."""

    CROP, COLOR, BLUR, FLIP = (k * 0x9E3779B97F4A7C15 % 2**63 for k in (1, 3, 5, 7))


def uniforms(seeds: tf.Tensor, stream: int, count: int) -> tf.Tensor:
    """Draws float32 [B, count] uniform in [0, 1), each row from its own seed of int64 [B, 2]."""
    seeds = tf.bitwise.bitwise_xor(tf.cast(seeds, tf.int64), [[stream, 0]])
    draws = tf.map_fn(
        lambda seed: tf.random.stateless_uniform([count], seed),
        seeds,
        fn_output_signature=tf.float32,
    )
    return tf.ensure_shape(draws, [None, count])


def _exp(x):
    """tf.exp of [B, n], each row with the same bits whatever B is.

    Processors take 4 to 16 numbers at a time, and what is left over singly, with another rounding.
    """
    count = x.shape[1]
    return tf.exp(tf.pad(x, [[0, 0], [0, -count % 16]]))[:, :count]


def _between(uniform, low, high):
    return low + uniform * (high - low)


# ----------------------------------------------------------------------- shells for KerasCV


class _SeededAugmentation(keras_cv.layers.VectorizedBaseImageAugmentationLayer):
    """A KerasCV layer that draws seeds and calls one of the functions above.

    Args:
        value_range: values of black and white in the images given and returned.
        seed: of the generator that draws the seeds.
    """

    def __init__(self, value_range=(0, 255), seed=None, **kwargs):
        super().__init__(seed=seed, **{"dtype": "float32", **kwargs})
        self.value_range = value_range
        self.seed = seed

    def augment(self, images, seeds):
        """The function of this shell: images [B, H, W, 3] in [0, 1], seeds [B, 2]."""
        raise NotImplementedError

    def get_random_transformation_batch(self, batch_size, **kwargs):
        return self._random_generator.uniform([batch_size, 2], maxval=2**62, dtype=tf.int64)

    def augment_images(self, images, transformations, **kwargs):
        black, white = self.value_range
        return (
            self.augment((images - black) / (white - black), transformations) * (white - black)
            + black
        )

    def augment_ragged_image(self, image, transformation, **kwargs):
        return self.augment_images(image[tf.newaxis], transformation[tf.newaxis])[0]

    def augment_labels(self, labels, transformations, **kwargs):
        return labels

    def get_config(self):
        return {**super().get_config(), "value_range": self.value_range, "seed": self.seed}


class RandomResizedCrop(_SeededAugmentation):
    """`random_resized_crop` as a KerasCV layer; `size` in pixels."""

    def __init__(self, size, area=(0.2, 1.0), aspect=(3 / 4, 4 / 3), **kwargs):
        super().__init__(**kwargs)
        self.size, self.area, self.aspect = size, area, aspect
        self.force_output_dense_images = True

    def augment(self, images, seeds):
        return random_resized_crop(images, seeds, self.size, self.area, self.aspect)

    def get_config(self):
        mine = {"size": self.size, "area": self.area, "aspect": self.aspect}
        return {**super().get_config(), **mine}


class ColorJitterAndGrayscale(_SeededAugmentation):
    """`color_jitter_and_grayscale` as a KerasCV layer."""

    def __init__(
        self, jitter_rate=0.8, grayscale_rate=0.2, strengths=(0.4, 0.4, 0.4, 0.1), **kwargs
    ):
        super().__init__(**kwargs)
        self.jitter_rate, self.grayscale_rate = jitter_rate, grayscale_rate
        self.strengths = strengths

    def augment(self, images, seeds):
        return color_jitter_and_grayscale(
            images, seeds, self.jitter_rate, self.grayscale_rate, self.strengths
        )

    def get_config(self):
        rates = {"jitter_rate": self.jitter_rate, "grayscale_rate": self.grayscale_rate}
        return {**super().get_config(), **rates, "strengths": self.strengths}


class RandomGaussianBlur(_SeededAugmentation):
    """`random_gaussian_blur` as a KerasCV layer."""

    def __init__(self, rate=0.5, sigma=(0.1, 2.0), **kwargs):
        super().__init__(**kwargs)
        self.rate, self.sigma = rate, sigma

    def augment(self, images, seeds):
        return random_gaussian_blur(images, seeds, self.rate, self.sigma)

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "sigma": self.sigma}


class RandomHorizontalFlip(_SeededAugmentation):
    """`random_horizontal_flip` as a KerasCV layer."""

    def __init__(self, rate=0.5, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate

    def augment(self, images, seeds):
        return random_horizontal_flip(images, seeds, self.rate)

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}
