import colorsys
import itertools
import math
import pathlib

import numpy as np
import pytest
import skimage
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageFilter
from scipy import ndimage, stats

from isd_tf.views import augment

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


# -------------------------------------------------------------------------------------- crop


@pytest.mark.parametrize(
    "box", [(0, 0, 120, 150), (7, 31, 61, 47), (90, 100, 20, 25), (3, 5, 64, 64)]
)
def test_crop_equals_pillows_antialiased_resize(box):
    ours = augment.resize_boxes(batch(PHOTO), tf.constant([box]), 64)[0].numpy()
    top, left, height, width = box
    cut = Image.fromarray(PHOTO).crop((left, top, left + width, top + height))
    theirs = np.asarray(cut.resize((64, 64), Image.Resampling.BILINEAR)) / 255
    assert np.abs(ours - theirs).mean() <= LEVEL
    assert np.abs(ours - theirs).max() <= 3 * LEVEL


def torchvision_box(random, height, width):
    """RandomResizedCrop.get_params, written again with numpy."""
    for _ in range(10):
        area = height * width * random.uniform(0.2, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.integers(0, height - h + 1), random.integers(0, width - w + 1), h, w
    return None


@pytest.mark.parametrize(("height", "width"), [(224, 224), (375, 500), (32, 32)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    ours = augment.crop_boxes(some_seeds(4000), height, width).numpy().astype(float)
    random = np.random.default_rng(0)
    theirs = np.array(
        [b for b in (torchvision_box(random, height, width) for _ in range(4000)) if b]
    )
    for value in (
        lambda b: b[:, 2] * b[:, 3] / (height * width),  # area
        lambda b: b[:, 3] / b[:, 2],  # aspect
        lambda b: (b[:, 0] + 0.5) / (height - b[:, 2] + 1),  # place
        lambda b: (b[:, 1] + 0.5) / (width - b[:, 3] + 1),
    ):
        assert stats.ks_2samp(value(ours), value(theirs)).pvalue > 1e-3
    area = ours[:, 2] * ours[:, 3] / (height * width)
    aspect = ours[:, 3] / ours[:, 2]
    tolerance = 2 / min(height, width) ** 0.5  # Sides are rounded to pixels.
    assert 0.2 * (1 - tolerance) <= area.min() < 0.25 and 0.95 < area.max() <= 1
    assert 0.75 * (1 - tolerance) <= aspect.min() and aspect.max() <= 4 / 3 * (1 + tolerance)


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10))]
)
def test_where_no_box_fits_the_largest_centred_one_is_taken(height, width, expected):
    boxes = augment.crop_boxes(some_seeds(50), height, width)
    assert (np.all(boxes == expected, axis=1)).mean() > 0.9


# ------------------------------------------------------------------------------------ colour


def jitter_of(
    brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, order=(0, 1, 2, 3), gray=False
):
    return augment.Jitter(
        *(tf.constant([v], tf.float32) for v in (brightness, contrast, saturation, hue)),
        tf.constant([order]),
        tf.constant([gray]),
    )


def numpy_jitter(image, brightness, contrast, saturation, hue, order):
    """torchvision's ColorJitter on floats, one operation and one clip after the other."""

    def gray(x):
        return x @ np.array([0.2989, 0.587, 0.114])

    x = image.astype(np.float64) / 255
    for operation in order:
        if operation == 0:
            x = x * brightness
        elif operation == 1:
            x = contrast * x + (1 - contrast) * gray(x).mean()
        elif operation == 2:
            x = saturation * x + (1 - saturation) * gray(x)[..., np.newaxis]
        else:
            hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3)]
            rgb = [colorsys.hsv_to_rgb((h + hue) % 1, s, v) for h, s, v in hsv]
            x = np.array(rgb).reshape(x.shape)
        x = x.clip(0, 1)
    return x


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_jitter_equals_torchvisions_operations_in_every_order(order):
    random = np.random.default_rng(sum(place * o for place, o in enumerate(order)))
    deviations = []
    for patch in PATCHES:
        factors = [*random.uniform(0.6, 1.4, size=3), random.uniform(-0.1, 0.1)]
        ours = augment.apply_jitter(
            batch(patch / np.float32(255)), jitter_of(*factors, order=order)
        )
        deviations.append(np.abs(ours[0] - numpy_jitter(patch, *factors, order)).mean())
    assert np.mean(deviations) <= LEVEL


@pytest.mark.parametrize(
    ("name", "enhancer"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
@pytest.mark.parametrize("factor", [0.6, 0.9, 1.4])
def test_single_colour_operations_equal_pillows(name, enhancer, factor):
    for patch in PATCHES:
        ours = augment.apply_jitter(batch(patch / np.float32(255)), jitter_of(**{name: factor}))
        theirs = np.asarray(enhancer(Image.fromarray(patch)).enhance(factor)) / 255
        assert np.abs(ours[0] - theirs).mean() <= LEVEL


def test_order_matters():
    views = {
        order: augment.apply_jitter(
            batch(PATCHES[0] / np.float32(255)), jitter_of(1.3, 0.6, 1.4, 0.1, order)
        ).numpy()
        for order in ((0, 1, 2, 3), (3, 2, 1, 0))
    }
    assert np.abs(np.subtract(*views.values())).mean() > 0.001


def test_grayscale_equals_pillows():
    ours = augment.apply_jitter(batch(PATCHES[1] / np.float32(255)), jitter_of(gray=True))[0]
    theirs = np.asarray(Image.fromarray(PATCHES[1]).convert("L"))[..., np.newaxis] / 255
    assert np.abs(ours - theirs).mean() <= LEVEL
    np.testing.assert_array_equal(ours[..., 0], ours[..., 2])


def test_jitter_parameters_are_distributed_as_torchvisions():
    n = 6000
    jitter = augment.draw_jitter(some_seeds(n))
    jittered = jitter.hue.numpy() != 0
    # Rates within four standard deviations.
    assert abs(jittered.mean() - 0.8) < 4 * (0.8 * 0.2 / n) ** 0.5
    assert abs(jitter.grayscale.numpy().mean() - 0.2) < 4 * (0.8 * 0.2 / n) ** 0.5
    for values in (jitter.brightness, jitter.contrast, jitter.saturation):
        values = values.numpy()
        assert (values[~jittered] == 1).all()
        assert stats.kstest(values[jittered], stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3
    hue = jitter.hue.numpy()[jittered]
    assert stats.kstest(hue, stats.uniform(-0.1, 0.2).cdf).pvalue > 1e-3
    orders, counts = np.unique(jitter.order.numpy(), axis=0, return_counts=True)
    assert len(orders) == 24 and stats.chisquare(counts).pvalue > 1e-3
    # Parameters are independent of each other.
    columns = [v.numpy()[jittered] for v in jitter[:4]]
    assert np.abs(np.corrcoef(columns) - np.eye(4)).max() < 0.06


# ----------------------------------------------------------------------------- blur and flip


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_equals_scipys_and_pillows_with_edges_extended(sigma):
    image = PHOTO[:64, :48] / np.float32(255)
    ours = augment.gaussian_blur(batch(image), tf.constant([sigma]))[0].numpy()
    exact = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest", radius=8)
    np.testing.assert_allclose(ours, exact, atol=1e-5)
    blurred = Image.fromarray(PHOTO[:64, :48]).filter(ImageFilter.GaussianBlur(sigma))
    assert np.abs(ours - np.asarray(blurred) / 255).mean() <= LEVEL


def test_blur_does_not_darken_the_borders():
    white = tf.ones([1, 32, 32, 3])
    np.testing.assert_allclose(augment.gaussian_blur(white, tf.constant([2.0])), white, rtol=1e-6)


def test_blur_and_flip_happen_at_their_rates():
    n = 2000
    image = tf.tile(batch(PATCHES[0][:16, :16] / np.float32(255)), [n, 1, 1, 1])
    blurred = augment.random_gaussian_blur(image, some_seeds(n)).numpy()
    changed = (blurred != image.numpy()).any(axis=(1, 2, 3))
    # Sigmas of a fifth of a pixel change nothing that float32 shows in some images.
    assert 0.40 < changed.mean() < 0.55
    flipped = augment.random_horizontal_flip(image, some_seeds(n)).numpy()
    mirrored = (flipped == image.numpy()[:, :, ::-1]).all(axis=(1, 2, 3))
    unchanged = (flipped == image.numpy()).all(axis=(1, 2, 3))
    assert (mirrored ^ unchanged).all()
    assert abs(mirrored.mean() - 0.5) < 4 * (0.25 / n) ** 0.5


def test_sigmas_are_uniform():
    # One white pixel tells the sigma: what remains of it is the kernel's centre, squared.
    n = 3000
    point = np.zeros([n, 17, 17, 3], np.float32)
    point[:, 8, 8] = 1
    centre = augment.random_gaussian_blur(tf.constant(point), some_seeds(n), rate=1.0)[:, 8, 8, 0]
    grid = np.linspace(0.1, 2.0, 400)
    kernels = np.exp(-(np.arange(-8, 9)[:, None] ** 2) / (2 * grid**2))
    grid_centres = (1 / kernels.sum(axis=0)) ** 2  # falls with sigma
    sigmas = np.interp(-centre.numpy(), -grid_centres, grid)
    tall = sigmas[sigmas > 0.4]  # Below, the centre is 1 to rounding.
    assert stats.kstest(tall, stats.uniform(0.4, 1.6).cdf).pvalue > 1e-3
    assert abs((sigmas > 0.4).mean() - 1.6 / 1.9) < 0.03


# ----------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("recipe", augment.RECIPES)
def test_views_are_the_same_eagerly_in_tf_data_and_on_replicas(recipe, two_replicas):
    images, seeds = tf.constant(PATCHES), some_seeds(4)
    view = augment.RECIPES[recipe]
    eager = view(images, seeds, 24).numpy()

    mapped = tf.data.Dataset.from_tensors((images, seeds)).map(lambda i, s: view(i, s, 24))
    np.testing.assert_allclose(mapped.get_single_element(), eager, atol=1e-6)

    one_by_one = tf.data.Dataset.from_tensor_slices((images, seeds)).batch(1)
    one_by_one = np.concatenate([view(i, s, 24) for i, s in one_by_one])
    np.testing.assert_allclose(one_by_one, eager, atol=1e-5)

    run = tf.function(lambda: two_replicas.run(lambda: view(images, seeds, 24)))
    for replica in two_replicas.experimental_local_results(run()):
        np.testing.assert_allclose(replica, eager, atol=1e-6)


def test_views_differ_by_either_part_of_the_seed():
    image = batch(PATCHES[0])
    views = [
        augment.strong_view(image, tf.constant([seed], tf.int64), 32).numpy().tobytes()
        for seed in ([0, 0], [0, 1], [1, 0], [1, 1])
    ]
    assert len(set(views)) == 4


def test_weak_view_crops_flips_and_normalises_only():
    seeds = some_seeds(4)
    crop = augment.random_resized_crop(tf.constant(PATCHES), seeds, 32)
    crop = augment.random_horizontal_flip(crop, seeds).numpy()
    expected = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(
        augment.weak_view(tf.constant(PATCHES), seeds, 32), expected, atol=1e-5
    )


def test_strong_view_composes_its_operations_in_order():
    seeds = some_seeds(4, key=5)
    x = augment.random_resized_crop(tf.constant(PATCHES), seeds, 32)
    x = augment.color_jitter_and_grayscale(x, seeds)
    x = augment.random_horizontal_flip(augment.random_gaussian_blur(x, seeds), seeds)
    strong = augment.strong_view(tf.constant(PATCHES), seeds, 32)
    np.testing.assert_allclose(strong, augment.normalize(x), atol=1e-6)


# -------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(("height", "width"), [(120, 150), (150, 120), (300, 301), (20, 33)])
def test_evaluation_view_equals_pillows_resize_and_centre_crop(height, width):
    image = photograph("coffee.png", (width, height))
    ours = augment.evaluation_view(batch(image), 56)[0] * augment.CHANNEL_STD + augment.CHANNEL_MEAN
    short = min(height, width)
    size = [64 * width // short, 64 * height // short]  # 256 / 224 of 56
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    top, left = (round((side - 56) / 2) for side in resized.shape[:2])
    theirs = resized[top : top + 56, left : left + 56] / 255
    assert np.abs(ours - theirs).mean() <= LEVEL


@pytest.mark.parametrize("shape", [(1, 10_000), (10_000, 2), (30, 200)])
def test_evaluation_view_of_very_long_images_shows_their_centre(shape):
    image = np.zeros((*shape, 3), np.uint8)
    centre = tuple(slice(max(s // 2 - min(shape), 0), s // 2 + min(shape)) for s in shape)
    image[centre] = 255
    view = augment.evaluation_view(batch(image), 56)[0] * augment.CHANNEL_STD + augment.CHANNEL_MEAN
    np.testing.assert_allclose(view, 1.0, atol=1e-5)


def test_evaluation_view_passes_images_of_the_training_size_unresized():
    ours = augment.evaluation_view(tf.constant(PATCHES), 32)
    expected = (PATCHES / 255 - augment.CHANNEL_MEAN) / augment.CHANNEL_STD
    np.testing.assert_allclose(ours, expected, atol=1e-5)


# --------------------------------------------------------------------------- KerasCV's shells


LAYERS = [
    augment.RandomResizedCrop(size=24, seed=1),
    augment.ColorJitterAndGrayscale(seed=1),
    augment.RandomGaussianBlur(rate=1.0, seed=1),
    augment.RandomHorizontalFlip(rate=1.0, seed=1),
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
    if not isinstance(layer, augment.RandomHorizontalFlip):  # Here it flips every image.
        assert np.abs(first - second).max() > 0


@pytest.mark.parametrize("recipe", ["weak", "strong"])
def test_a_view_has_the_same_bits_however_many_images_come_with_it(recipe):
    """Workers prepare parts of a batch, and must not see other views than one process would."""
    images = tf.constant(np.random.default_rng(0).integers(0, 256, (60, 23, 29, 3), np.uint8))
    view = tf.function(augment.RECIPES[recipe])
    for seed in range(3):
        seeds = tf.stack([tf.fill([60], np.int64(seed)), tf.range(60, dtype=tf.int64)], axis=1)
        whole = view(images, seeds, 17)
        for rows in (3, 4, 15, 30):
            parts = [
                view(images[first : first + rows], seeds[first : first + rows], 17)
                for first in range(0, 60, rows)
            ]
            np.testing.assert_array_equal(tf.concat(parts, 0), whole)
