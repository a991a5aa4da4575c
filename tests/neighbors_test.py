import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

import isd_tf
from isd_tf.data.batches import pretraining_batches
from isd_tf.data.datasets import ArrayDataset, FileDataset
from isd_tf.data.decoding import Unreadable
from isd_tf.evaluation import neighbors
from isd_tf.views import augment

SIZE, BATCH, QUEUE, SEED = 8, 6, 20, 3


def images(count, seed):
    """Each with a label of its own, so that labels tell which image it is."""
    values = np.random.default_rng(seed).integers(0, 256, (count, 10, 10, 3), np.uint8)
    return ArrayDataset(f"images {seed}", values, np.arange(count))


@pytest.fixture(scope="module")
def trained():
    """A teacher that stays as it is, so that the queue's rows can be computed again."""
    keras.utils.set_random_seed(0)
    flatten = [keras.layers.Flatten(), keras.layers.Dense(12)]
    encoder = keras.Sequential([keras.Input((SIZE, SIZE, 3)), *flatten])
    model = isd_tf.ISD(encoder, None, None, QUEUE, teacher_momentum=1.0)
    model.compile(isd_tf.TorchSGD(0.01))
    batches = pretraining_batches(images(30, 0), ("weak", "strong"), SIZE, BATCH, SEED)
    model.fit(batches, steps_per_epoch=8, verbose=0, shuffle=False)
    return model


def teacher_rows(batch):
    return unit(tf.reshape(augment.finish(batch["teacher_view"]), [BATCH, -1]).numpy())


def find(model, queries=None, train=None, **settings):
    settings = dict(views=("weak", "strong"), image_size=SIZE, global_batch_size=BATCH) | settings
    queries = images(4, 1) if queries is None else queries
    train = images(30, 0) if train is None else train
    return neighbors.find(model, 0.1, queries, train=train, seed=SEED, neighbors=5, **settings)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_views_shown_are_those_that_became_the_rows(trained):
    found = find(trained)
    assert found.anchor_views.shape == (4, 5, SIZE, SIZE, 3)
    anchors = trained.queue.read_anchors().numpy()
    teacher = trained.teacher_encoder

    queries = unit(teacher(found.query_views).numpy())
    p = np.exp(queries @ anchors.T / 0.1)
    p /= p.sum(axis=1, keepdims=True)
    rows = np.argsort(-p, axis=1)[:, :5]
    np.testing.assert_allclose(found.probabilities, np.take_along_axis(p, rows, 1), rtol=1e-4)
    # The teacher never moved: from the views shown it makes the queue's rows again.
    again = unit(teacher(found.anchor_views.reshape(-1, SIZE, SIZE, 3)).numpy())
    np.testing.assert_allclose(again, anchors[rows].reshape(20, -1), atol=1e-5)
    np.testing.assert_array_equal(found.anchor_labels, trained.queue.labels.numpy()[rows])


def test_queries_stay_in_order_with_two_different_views(trained):
    found = find(trained)
    np.testing.assert_array_equal(found.query_labels, range(4))
    assert np.abs(found.query_views - found.other_views).max() > 0.1
    np.testing.assert_array_equal(find(trained).query_views, found.query_views)


def test_one_view_that_both_see_is_the_one_that_became_the_rows():
    keras.utils.set_random_seed(0)
    pixels = keras.Input((SIZE, SIZE, 3))
    teacher = keras.Model(pixels, keras.layers.Flatten()(pixels))
    student = keras.Sequential([keras.Input((SIZE, SIZE, 3)), keras.layers.Flatten()])
    model = isd_tf.CompRess(student, teacher, QUEUE)
    model.compile(isd_tf.TorchSGD(0.01))
    batches = pretraining_batches(images(30, 0), ("crop",), SIZE, BATCH, SEED)
    model.fit(batches, steps_per_epoch=8, verbose=0, shuffle=False)
    found = find(model, views=("crop",))
    assert found.other_views is None
    anchors = model.queue.read_anchors().numpy()
    shown = unit(found.anchor_views.reshape(20, -1))
    nearest = np.argsort(-(unit(found.query_views.reshape(4, -1)) @ anchors.T), axis=1)[:, :5]
    np.testing.assert_allclose(shown, anchors[nearest].reshape(20, -1), atol=1e-5)


class QueuedImages(tfds.core.GeneratorBasedBuilder):
    """Thirty images of two sizes, so that TFDS streams them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(num_classes=30)
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, image in enumerate(images(30, 0).images):
            yield i, {"image": image[: 10 - i % 2], "label": i}


@pytest.mark.slow
def test_streams_show_their_own_images_and_few_queries(tmp_path):
    """One query is fewer than the records that would replace an unreadable one."""
    with tfds.core.registered.skip_registration():
        kind = type("QueuedImages", (QueuedImages,), {})
    kind(data_dir=str(tmp_path)).download_and_prepare()
    train = isd_tf.datasets._open_split(kind(data_dir=str(tmp_path)), "train")
    keras.utils.set_random_seed(0)
    encoder = keras.Sequential([keras.Input((SIZE, SIZE, 3)), keras.layers.Flatten()])
    model = isd_tf.ISD(encoder, None, None, QUEUE)
    for batch in pretraining_batches(train, ("weak", "weak"), SIZE, BATCH, SEED).take(4):
        model.queue.enqueue(teacher_rows(batch), batch["label"])
        model.step.assign_add(1)
    query = isd_tf.subsets.take(train, np.array([17]), "one")
    found = find(model, query, train, views=("weak", "weak"))
    assert found.query_views.shape[0] == 1
    flat = unit(found.anchor_views.reshape(5, -1))
    rows = [np.abs(model.queue.read_anchors() - x).max(axis=1).argmin() for x in flat]
    np.testing.assert_allclose(flat, model.queue.read_anchors().numpy()[rows], atol=1e-5)
    np.testing.assert_array_equal(model.queue.labels.numpy()[rows], found.anchor_labels[0])


def test_images_that_the_training_has_tolerated_are_tolerated(tmp_path):
    paths = []
    for i, image in enumerate(images(30, 0).images):
        paths.append(str(tmp_path / f"{i:02d}.png"))
        Image.fromarray(image).save(paths[-1])
    (tmp_path / "07.png").write_bytes(b"broken")
    train = FileDataset("files", tuple(paths), np.arange(30))
    encoder = keras.Sequential([keras.Input((SIZE, SIZE, 3)), keras.layers.Flatten()])
    model = isd_tf.ISD(encoder, None, None, QUEUE)
    tolerant = Unreadable(30, 0.1)
    recipe = (("weak", "weak"), SIZE, BATCH, SEED)
    for batch in pretraining_batches(train, *recipe, unreadable=tolerant).take(5):
        model.queue.enqueue(teacher_rows(batch), batch["label"])
        model.step.assign_add(1)
    queries = isd_tf.subsets.take(train, np.array([6, 7, 8]), "three")
    found = find(model, queries, train, views=("weak", "weak"), unreadable=Unreadable(30, 0.1))
    np.testing.assert_array_equal(found.query_labels, [6, 8])
    assert 7 not in found.anchor_labels


def test_images_without_labels_are_shown_as_well():
    keras.utils.set_random_seed(0)
    encoder = keras.Sequential([keras.Input((SIZE, SIZE, 3)), keras.layers.Flatten()])
    model = isd_tf.MoCoV2(encoder, None, None, QUEUE)
    train = dataclasses.replace(images(30, 0), labels=None)
    model.compile(isd_tf.TorchSGD(0.01))
    batches = pretraining_batches(train, ("weak", "weak"), SIZE, BATCH, SEED)
    model.step.assign(0)
    for batch in batches.take(4):
        model.queue.enqueue(teacher_rows(batch))
        model.step.assign_add(1)
    found = find(model, train, train, views=("weak", "weak"))
    assert (found.query_labels == -1).all() and (found.anchor_labels == -1).all()
    flat = unit(found.anchor_views.reshape(30, 5, -1))
    shown = np.einsum("qnd,qd->qn", flat, unit(found.query_views.reshape(30, -1)))
    np.testing.assert_array_equal(np.argsort(-shown, axis=1), [range(5)] * 30)


def test_a_queue_that_is_not_full_is_refused(trained):
    young = keras.models.clone_model(trained.student_encoder)
    model = isd_tf.ISD(young, None, None, QUEUE)
    with pytest.raises(ValueError, match="full of images. Received: 0 after step 0, of 20"):
        find(model)


def test_other_images_than_those_of_the_training_are_noticed(trained):
    other = dataclasses.replace(images(30, 0), labels=np.arange(30)[::-1].copy())
    with pytest.raises(ValueError, match="filled with other images than images 0 gives now"):
        find(trained, train=other)
