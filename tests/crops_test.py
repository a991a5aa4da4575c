import math

import numpy as np
import pytest
import tensorflow as tf
from photographs import PHOTO, batch, photograph, some_seeds
from PIL import Image
from scipy import stats

from isd_tf.views import crops, python_crops
from isd_tf.views.python_crops import cykooz_resizer


def drawn_boxes(count, height, width):
    draws = crops.crop_draws(some_seeds(count))[:, tf.newaxis]
    return crops.crop_boxes(draws, tf.zeros([1, height, width, 3], tf.uint8))[:, 0]


@pytest.mark.parametrize(
    "box", [(0, 0, 120, 150), (7, 31, 61, 47), (90, 100, 20, 25), (3, 5, 64, 64), (119, 0, 1, 150)]
)
@pytest.mark.parametrize("size", [7, 48, 64])
def test_crop_equals_pillows_antialiased_resize_but_for_a_level(box, size):
    ours = crops.resize_boxes(batch(PHOTO), tf.constant([[box]]), size)[0][0].numpy().astype(int)
    top, left, height, width = box
    cut = Image.fromarray(PHOTO).crop((left, top, left + width, top + height))
    theirs = np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR))
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - theirs).mean() <= 0.2  # where Pillow goes down before across; else 0.01


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
    ours = drawn_boxes(4000, height, width).numpy().astype(float)
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
    boxes = drawn_boxes(50, height, width)
    assert (np.all(boxes == expected, axis=1)).mean() > 0.9


def test_a_large_image_is_resized_in_parts_to_the_same_bits(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (1, 211, 157, 3), np.uint8)
    boxes = tf.constant([[[3, 5, 200, 149]]])

    def both():
        return crops.resize_boxes(image, boxes, 24)[0], crops.centre_crops(tf.constant(image), 24)

    whole = both()
    for part in (1, 1000, 157 * 50):
        monkeypatch.setattr(crops, "PART_PIXELS", part)
        for ours, theirs in zip(both(), whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("count", [1, 3])
def test_boxes_of_an_image_are_cut_as_each_alone(count):
    """However unlike they are: of each, other pixels weigh."""
    images = tf.tile(batch(PHOTO), [count, 1, 1, 1])
    boxes = tf.tile([[(119, 0, 1, 150), (0, 0, 120, 150), (40, 40, 9, 80)]], [count, 1, 1])
    together = crops.resize_boxes(images, boxes, 24)
    for view, cut in enumerate(together):
        (alone,) = crops.resize_boxes(images, boxes[:, view : view + 1], 24)
        np.testing.assert_array_equal(cut, alone)
    assert len({cut.numpy().tobytes() for cut in together}) == 3


def test_each_view_needs_draws_of_its_own():
    draws = crops.crop_draws(some_seeds(1))[:, tf.newaxis]
    with pytest.raises(ValueError, match="draws of its own. Received: .*22.* for"):
        crops.crop_boxes(draws, batch(PHOTO), [crops.AREA] * 2)


def test_a_crop_has_the_same_bits_alone_and_among_others():
    images = tf.constant(np.random.default_rng(0).integers(0, 256, (60, 23, 29, 3), np.uint8))
    cut = tf.function(crops.random_resized_crop, reduce_retracing=True)
    for size in (17, 40):
        whole = cut(images, some_seeds(60), size)
        for rows in (1, 3, 4, 15, 30):
            parts = [
                cut(images[first : first + rows], some_seeds(60)[first : first + rows], size)
                for first in range(0, 60, rows)
            ]
            np.testing.assert_array_equal(tf.concat(parts, 0), whole)


@pytest.mark.parametrize(("height", "width"), [(120, 150), (150, 120), (300, 301), (20, 33)])
def test_centre_crop_equals_pillows_resize_and_centre_crop(height, width):
    image = photograph("coffee.png", (width, height))
    ours = crops.centre_crops(batch(image), 56)[0].numpy().astype(int)
    short = min(height, width)
    size = [64 * width // short, 64 * height // short]  # 256 / 224 of 56
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    top, left = (round((side - 56) / 2) for side in resized.shape[:2])
    theirs = resized[top : top + 56, left : left + 56]
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - theirs).mean() <= 0.2  # where Pillow goes down before across; else 0.01


@pytest.mark.parametrize("shape", [(1, 10_000), (10_000, 2), (30, 200)])
def test_centre_crop_of_very_long_images_shows_their_centre(shape):
    image = np.zeros((*shape, 3), np.uint8)
    centre = tuple(slice(max(s // 2 - min(shape), 0), s // 2 + min(shape)) for s in shape)
    image[centre] = 255
    np.testing.assert_array_equal(crops.centre_crops(batch(image), 56), 255)


def test_what_a_crop_works_on_holds_its_inputs_and_has_one_of_few_lengths():
    random, side, lengths = np.random.RandomState(0), 500, set()
    for first, end in np.sort(random.randint(0, side + 1, [200, 2])):
        window = np.arange(first, max(end, first + 1)).clip(max=side - 1)
        begin, past = map(int, crops._cover(tf.constant(window), side))
        assert 0 <= begin <= window[0] and window[-1] < past <= side
        lengths.add(past - begin)
    assert lengths <= {64, 128, 192, 256, 320, 384, 448, 500}


# -------------------------------------------------------------------------------- in Python

needs_cykooz = pytest.mark.skipif(cykooz_resizer is None, reason="no wheel for this machine")
NOISE = np.random.default_rng(0).integers(0, 256, PHOTO.shape, np.uint8)


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 375), (32, 32), (1, 1), (3, 400), (400, 3), (97, 61)]
)
@pytest.mark.parametrize("area", [(0.2, 1.0), (0.08, 1.0)])
def test_boxes_in_python_are_the_graphs(height, width, area):
    draws = crops.crop_draws(some_seeds(500))
    of_graph = crops.crop_boxes(draws[:, None], tf.zeros([1, height, width, 3], tf.uint8), [area])
    boxes = [python_crops.crop_box(row, height, width, area) for row in draws.numpy().tolist()]
    np.testing.assert_array_equal(boxes, of_graph[:, 0])


@pytest.mark.parametrize("size", [7, 48, 64])
@pytest.mark.parametrize(
    "box", [(0, 0, 120, 150), (7, 31, 61, 47), (90, 100, 20, 25), (3, 5, 64, 64), (119, 0, 1, 150)]
)
@pytest.mark.parametrize("image", [PHOTO, NOISE], ids=["photo", "noise"])
def test_crops_in_python_are_the_graphs_but_for_a_level(image, box, size, resizer):
    ours = python_crops.resize_box(image, box, size, resizer).astype(int)
    of_graph = crops.resize_boxes(batch(image), tf.constant([[box]]), size)[0][0].numpy()
    assert ours.shape == (size, size, 3)
    assert np.abs(ours - of_graph).max() <= 1
    # Of 147 values, in noise, 8 differ once; wherever there are more, one in twenty at most does.
    assert np.abs(ours - of_graph).mean() <= (0.05 if size > 7 else 8 / 147)


def test_crops_of_noise_differ_by_two_levels_at_most(resizer):
    """Where many sums lie halfway between two levels, both axes' roundings can add up."""
    ours = python_crops.resize_box(NOISE, (0, 0, 64, 64), 224, resizer).astype(int)
    of_graph = crops.resize_boxes(batch(NOISE), tf.constant([[(0, 0, 64, 64)]]), 224)[0][0].numpy()
    assert 0 < np.abs(ours - of_graph).max() <= 2
    assert np.abs(ours - of_graph).mean() <= 0.1


@pytest.mark.parametrize("size", [7, 48, 224])
@pytest.mark.parametrize("box", [(0, 0, 120, 150), (7, 31, 61, 47), (119, 0, 1, 150)])
def test_crops_are_one_call_of_pillows_but_for_a_level(box, size, resizer):
    """Which goes down first, where that is less work."""
    top, left, height, width = box
    cut = Image.fromarray(NOISE).crop((left, top, left + width, top + height))
    expected = np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR), int)
    ours = python_crops.resize_box(NOISE, box, size, resizer)
    assert np.abs(ours - expected).max() <= 1
    assert np.abs(ours - expected).mean() <= 0.25


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_view_is_cropped_as_its_copy_is(turns, resizer):
    """Turned photographs come as views."""
    turned, box = np.rot90(PHOTO, turns), (5, 10, 100, 60)
    np.testing.assert_array_equal(
        python_crops.resize_box(turned, box, 40, resizer),
        python_crops.resize_box(turned.copy(), box, 40, resizer),
    )


def test_a_large_box_is_cut_in_parts(resizer, monkeypatch):
    box, made = (5, 10, 100, 120), []
    whole = python_crops.resize_box(PHOTO, box, 40, resizer)
    monkeypatch.setattr(python_crops, "PART_PIXELS", 120 * 33)
    library, name = (Image, "frombuffer") if resizer == "pillow" else (cykooz_resizer, "ImageData")
    monkeypatch.setattr(library, name, spied(getattr(library, name), made))
    in_parts = python_crops.resize_box(PHOTO, box, 40, resizer)
    sides = [sides if resizer == "pillow" else (first, sides) for first, sides, *_ in made]
    assert [height for width, height in sides if width == 120] == [33, 33, 33, 1]
    np.testing.assert_array_equal(in_parts, whole)


@needs_cykooz
@pytest.mark.parametrize("size", [7, 48, 224])
@pytest.mark.parametrize("box", [(0, 0, 120, 150), (7, 31, 61, 47), (119, 0, 1, 150)])
def test_crops_in_python_do_not_depend_on_the_processor(box, size, monkeypatch):
    """Not on which of its extensions are used, of those that this one has."""
    resizer, extensions = cykooz_resizer.Resizer, cykooz_resizer.CpuExtensions
    own = resizer().cpu_extensions
    expected = python_crops.resize_box(NOISE, box, size, "cykooz_resizer")
    for older in [extensions.none, *([extensions.sse4_1] if own is extensions.avx2 else [])]:
        used = []

        def of_older_processor(older=older, used=used):
            used.append(resizer())
            used[-1].cpu_extensions = older
            return used[-1]

        monkeypatch.setattr(cykooz_resizer, "Resizer", of_older_processor)
        ours = python_crops.resize_box(NOISE, box, size, "cykooz_resizer")
        np.testing.assert_array_equal(ours, expected)
        assert used


@pytest.mark.parametrize("level", [0, 1, 127, 128, 254, 255])
def test_a_plain_image_keeps_its_level(level, resizer):
    for side in (1, 30, 97):
        colour = np.uint8([level, 255 - level, level])
        cut = python_crops.resize_box(np.tile(colour, (50, side, 1)), (0, 0, 50, side), 32, resizer)
        np.testing.assert_array_equal(cut, np.broadcast_to(colour, cut.shape))


def spied(function, calls):
    def call(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return call
