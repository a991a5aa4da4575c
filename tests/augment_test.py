import numpy as np
import pytest
import tensorflow as tf
from photographs import PATCHES, batch, some_seeds

from isd_tf.views import augment, crops, photometric

VIEWS = {"strong": augment.strong_view, "weak": augment.weak_view}


@pytest.mark.parametrize("recipe", VIEWS)
def test_views_are_the_same_eagerly_in_tf_data_and_on_replicas(recipe, two_replicas):
    images, seeds = tf.constant(PATCHES), some_seeds(4)
    view = VIEWS[recipe]
    eager = view(images, seeds, 24).numpy()

    mapped = tf.data.Dataset.from_tensors((images, seeds)).map(lambda i, s: view(i, s, 24))
    np.testing.assert_allclose(mapped.get_single_element(), eager, rtol=0, atol=2e-6)

    one_by_one = tf.data.Dataset.from_tensor_slices((images, seeds)).batch(1)
    one_by_one = np.concatenate([view(i, s, 24) for i, s in one_by_one])
    np.testing.assert_array_equal(one_by_one, eager)

    run = tf.function(lambda: two_replicas.run(lambda: view(images, seeds, 24)))
    for replica in two_replicas.experimental_local_results(run()):
        np.testing.assert_allclose(replica, eager, rtol=0, atol=2e-6)


def test_views_differ_by_either_part_of_the_seed():
    image = batch(PATCHES[0])
    views = [
        augment.strong_view(image, tf.constant([seed], tf.int64), 32).numpy().tobytes()
        for seed in ([0, 0], [0, 1], [1, 0], [1, 1])
    ]
    assert len(set(views)) == 4


def test_weak_view_crops_flips_and_normalises_only():
    seeds = some_seeds(4)
    crop = crops.random_resized_crop(tf.constant(PATCHES), seeds, 32)
    crop = photometric.random_horizontal_flip(crop, seeds).numpy()
    expected = (crop / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(
        augment.weak_view(tf.constant(PATCHES), seeds, 32), expected, atol=1e-5
    )


def test_strong_view_composes_its_operations_in_order():
    seeds = some_seeds(4, key=5)
    cut = crops.random_resized_crop(tf.constant(PATCHES), seeds, 32)
    x = photometric.color_jitter_and_grayscale(cut / 255, seeds)
    x = photometric.random_horizontal_flip(photometric.random_gaussian_blur(x, seeds), seeds)
    strong = augment.strong_view(tf.constant(PATCHES), seeds, 32)
    np.testing.assert_allclose(strong, photometric.normalize(x), atol=1e-5)
    # What a batch holds for the device is the same, compiled.
    np.testing.assert_allclose(augment.finish({"strong": (cut, seeds)}), strong, atol=1e-5)


def test_a_finished_view_passes():
    view = tf.ones([2, 4, 4, 3])
    assert augment.finish(view) is view


def test_evaluation_view_passes_images_of_the_training_size_unresized():
    ours = augment.evaluation_view(tf.constant(PATCHES), 32)
    expected = (PATCHES / 255 - photometric.CHANNEL_MEAN) / photometric.CHANNEL_STD
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("recipe", ["weak", "strong"])
def test_a_view_has_the_same_bits_however_many_others_come_with_it(recipe):
    """Workers prepare parts of a batch, and must not see other views than one process would."""
    for size, count in ((17, 60), (32, 60), (224, 12)):
        cut = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
        for rows in {2, 3, count // 4, count // 2}:
            np.testing.assert_array_equal(*in_parts(recipe, cut, rows))


@pytest.mark.parametrize("recipe", ["weak", "strong"])
@pytest.mark.parametrize("size", [17, 32, 224])
def test_a_view_of_an_image_alone_differs_in_the_last_bits_at_most(recipe, size):
    """XLA rounds the strong view otherwise."""
    cut = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), np.uint8)
    np.testing.assert_allclose(*in_parts(recipe, cut, 1), rtol=0, atol=2e-6)


def in_parts(recipe, cut, rows):
    """The views of so many images at a time, and of all at once."""
    images, seeds = tf.constant(cut), some_seeds(len(cut))
    parts = [
        augment.finish({recipe: (images[first : first + rows], seeds[first : first + rows])})
        for first in range(0, len(cut), rows)
    ]
    return tf.concat(parts, 0), augment.finish({recipe: (images, seeds)})
