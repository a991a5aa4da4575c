"""Who decodes and crops, on which host, and what is seen where images cannot be read."""

import io
import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from isd_tf.data import looks
from isd_tf.data.datasets import FileDataset
from isd_tf.data.decoding import Unreadable
from isd_tf.views.python_crops import RandomCropsOfImage


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux' affinity")
def test_of_many_cores_those_count_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    assert looks.cores.__wrapped__() <= len(allowed)  # A container may have a quota of fewer.
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert looks.cores.__wrapped__() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


SCENE, OTHER = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), np.uint8)
SCENE_PNG, OTHER_PNG = png(SCENE), png(OTHER)
LOOK = looks.RandomCrops(8, areas=((0.2, 1.0), (0.5, 0.6)), view_seeds=(6, 7))


def views_of(image, number, resizer):
    """What LOOK should see of the image with this number."""
    draws = LOOK.draws(tf.constant([number + 5], tf.int64))[0].numpy()
    return RandomCropsOfImage(8, LOOK.areas, resizer)(image, draws)


def see(images, unreadable, dataset=None, attempts=None):
    """Sees the first readable of each image's candidates, [n][attempts], inside tf.data.

    Of image i, candidate j is called "image i.j" and labelled 10 i + j, or named as its path is.
    """
    sources, numbers = tf.constant(images), tf.range(len(images), dtype=tf.int64)

    def look(_):
        def candidates(attempt):
            attempt = tf.cast(attempt, tf.int64)
            named = tf.strings.join(
                ["image ", tf.strings.as_string(numbers), ".", tf.strings.as_string(attempt)]
            )
            own = sources[:, attempt]
            return own, own if dataset else named, 10 * numbers + attempt

        attempts_of_each = attempts or len(images[0])
        return looks.look_at_images(
            LOOK, numbers + 5, candidates, dataset, attempts_of_each, unreadable.max_pixels
        )

    failures, readable, seen, labels = tf.nest.map_structure(
        lambda x: x.numpy(), tf.data.Dataset.range(1).map(look).get_single_element()
    )
    unreadable.count(numbers.numpy() + 5, failures)
    return np.stack(seen, 1), labels, readable


def test_each_image_goes_on_to_its_own_first_readable_candidate(resizer):
    images = [
        [SCENE_PNG, b"", b"x"],
        [b"", b"x", OTHER_PNG],
        [b"x", SCENE_PNG, OTHER_PNG],
        [b"", b"x", b"y"],
    ]
    unreadable = Unreadable(12, 0.9)
    seen, labels, readable = see(images, unreadable)
    for number, image in enumerate([SCENE, OTHER, SCENE]):
        np.testing.assert_array_equal(seen[number], views_of(image, number, resizer))
    assert not seen[3].any()
    assert labels.tolist()[:3] == [0, 12, 21] and readable.tolist() == [True, True, True, False]
    # What was not needed was not read. Each counts where it was wanted.
    names = {1: {"1.0", "1.1"}, 2: {"2.0"}, 3: {"3.0", "3.1", "3.2"}}
    for number, own in names.items():
        met = {*unreadable.met_before(number + 6)} - {*unreadable.met_before(number + 5)}
        assert met == {f"image {name}" for name in own}


def test_a_missing_file_is_named_with_its_reason(tmp_path, caplog):
    present = tmp_path / "here.png"
    present.write_bytes(SCENE_PNG)
    paths = (str(tmp_path / "gone.png"), str(present))
    _, labels, _ = see([paths], Unreadable(2, 0.5), FileDataset("files", paths))
    assert labels == [1]
    assert f"left out: {tmp_path / 'gone.png'} (no such file)" in caplog.text


def test_of_each_image_only_its_candidates_are_tried():
    *_, readable = see([[b"", b"x", SCENE_PNG]], Unreadable(9, 0.9), attempts=2)
    assert readable == [False]
