import colorsys
import itertools
import math

import numpy as np
import pytest
import tensorflow as tf
from photographs import LEVEL, PATCHES, PHOTO, batch, some_seeds
from PIL import Image, ImageEnhance, ImageFilter
from scipy import ndimage, stats

from isd_tf.views import photometric


def jitter_of(
    brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, order=(0, 1, 2, 3), gray=False
):
    return photometric.Jitter(
        *(tf.constant([v], tf.float32) for v in (brightness, contrast, saturation, hue)),
        # Operation i comes before the hue shift, 3.
        tf.constant([[order.index(i) < order.index(3) for i in range(3)]]),
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
        ours = photometric.apply_jitter(
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
        ours = photometric.apply_jitter(batch(patch / np.float32(255)), jitter_of(**{name: factor}))
        theirs = np.asarray(enhancer(Image.fromarray(patch)).enhance(factor)) / 255
        assert np.abs(ours[0] - theirs).mean() <= LEVEL


def test_order_matters():
    views = {
        order: photometric.apply_jitter(
            batch(PATCHES[0] / np.float32(255)), jitter_of(1.3, 0.6, 1.4, 0.1, order)
        ).numpy()
        for order in ((0, 1, 2, 3), (3, 2, 1, 0))
    }
    assert np.abs(np.subtract(*views.values())).mean() > 0.001


def test_grayscale_equals_pillows():
    ours = photometric.apply_jitter(batch(PATCHES[1] / np.float32(255)), jitter_of(gray=True))[0]
    theirs = np.asarray(Image.fromarray(PATCHES[1]).convert("L"))[..., np.newaxis] / 255
    assert np.abs(ours - theirs).mean() <= LEVEL
    np.testing.assert_array_equal(ours[..., 0], ours[..., 2])


def test_jitter_parameters_are_distributed_as_torchvisions():
    n = 6000
    jitter = photometric.draw_jitter(some_seeds(n))
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
    # In a random order of four, 0 to 3 of the others come before hue, equally often, and equally
    # often each of them.
    counts = np.zeros([2, 2, 2])
    np.add.at(counts, tuple(jitter.before_hue.numpy().astype(int).T), 1)
    shares = np.array([1 / 4 / math.comb(3, sum(which)) for which in np.ndindex(2, 2, 2)])
    assert stats.chisquare(counts.ravel(), shares * n).pvalue > 1e-3
    # Parameters are independent of each other.
    columns = [v.numpy()[jittered] for v in jitter[:4]]
    assert np.abs(np.corrcoef(columns) - np.eye(4)).max() < 0.06


def gaussian_blur(images, sigma):
    return photometric.blur(images, photometric.gaussian_weights(tf.constant([sigma])))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_equals_scipys_and_pillows_with_edges_extended(sigma):
    image = PHOTO[:64, :48] / np.float32(255)
    ours = gaussian_blur(batch(image), sigma)[0].numpy()
    exact = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest", radius=6)
    np.testing.assert_allclose(ours, exact, atol=1e-5)
    blurred = Image.fromarray(PHOTO[:64, :48]).filter(ImageFilter.GaussianBlur(sigma))
    assert np.abs(ours - np.asarray(blurred) / 255).mean() <= LEVEL


def test_blur_does_not_darken_the_borders():
    white = tf.ones([1, 32, 32, 3])
    np.testing.assert_allclose(gaussian_blur(white, 2.0), white, rtol=1e-6)


def test_blur_and_flip_happen_at_their_rates():
    n = 2000
    image = tf.tile(batch(PATCHES[0][:16, :16] / np.float32(255)), [n, 1, 1, 1])
    blurred = photometric.random_gaussian_blur(image, some_seeds(n)).numpy()
    changed = (blurred != image.numpy()).any(axis=(1, 2, 3))
    # Sigmas of a fifth of a pixel change nothing that float32 shows in some images.
    assert 0.40 < changed.mean() < 0.55
    flipped = photometric.random_horizontal_flip(image, some_seeds(n)).numpy()
    mirrored = (flipped == image.numpy()[:, :, ::-1]).all(axis=(1, 2, 3))
    unchanged = (flipped == image.numpy()).all(axis=(1, 2, 3))
    assert (mirrored ^ unchanged).all()
    assert abs(mirrored.mean() - 0.5) < 4 * (0.25 / n) ** 0.5


def test_sigmas_are_uniform():
    # One white pixel tells the sigma: what remains of it is the kernel's centre, squared.
    n = 3000
    point = np.zeros([n, 17, 17, 3], np.float32)
    point[:, 8, 8] = 1
    centre = photometric.random_gaussian_blur(tf.constant(point), some_seeds(n), rate=1.0)[
        :, 8, 8, 0
    ]
    grid = np.linspace(0.1, 2.0, 400)
    kernels = np.exp(-(np.arange(-6, 7)[:, None] ** 2) / (2 * grid**2))
    grid_centres = (1 / kernels.sum(axis=0)) ** 2  # falls with sigma
    sigmas = np.interp(-centre.numpy(), -grid_centres, grid)
    tall = sigmas[sigmas > 0.4]  # Below, the centre is 1 to rounding.
    assert stats.kstest(tall, stats.uniform(0.4, 1.6).cdf).pvalue > 1e-3
    assert abs((sigmas > 0.4).mean() - 1.6 / 1.9) < 0.03
