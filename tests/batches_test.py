import collections
import functools
import gc
import itertools
import os
import pathlib
import re
import time

import numpy as np
import psutil
import pytest
import tensorflow as tf
from numbered_images import (
    ARRAYS,
    IMAGES,
    SIZE,
    N,
    finished,
    labels_of,
    numbered_files,
    prepare_records,
    take,
)
from PIL import ExifTags, Image
from tensorflow.python.framework.func_graph import FuncGraph

from isd_tf.data import batches as batching
from isd_tf.data import datasets, graph_decoder
from isd_tf.data.decoding import Unreadable
from isd_tf.data.looks import GROUP
from isd_tf.views import augment, crops, photometric, python_crops


@pytest.fixture
def files(tmp_path):
    return numbered_files(tmp_path)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return prepare_records(tmp_path_factory.mktemp("tfds"))


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(a[key], b[key], err_msg=key, **(tolerance or dict(rtol=0)))


def cut_batches(dataset, steps):
    """Batches as the host hands them over, in numpy."""
    batches = batching.pretraining_batches(dataset, ("weak", "strong"), SIZE, 4, 1)
    return list(batches.take(steps).as_numpy_iterator())


def assert_same_levels(ours, theirs, at_most):
    """Levels of 255 that differ by so many at most, and seldom."""
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert difference.max() <= at_most and difference.mean() < 0.1


def assert_same_crops(ours, theirs):
    """Batches with the same crops, of two libraries: a few of their levels differ."""
    differ = False
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one["label"], other["label"])
        for view, recipe in (("teacher_view", "weak"), ("student_view", "strong")):
            (crop, seeds), (expected, expected_seeds) = one[view][recipe], other[view][recipe]
            np.testing.assert_array_equal(seeds, expected_seeds)
            assert_same_levels(crop, expected, at_most=1)
            differ |= (crop != expected).any()
    assert differ


@pytest.fixture(params=["arrays", "files", "records"])
def dataset(request):
    return ARRAYS if request.param == "arrays" else request.getfixturevalue(request.param)


def test_batches_hold_two_views_and_a_label(dataset):
    (batch,) = take(dataset, 1)
    assert batch["teacher_view"].shape == batch["student_view"].shape == (4, SIZE, SIZE, 3)
    assert batch["teacher_view"].dtype == np.float32
    assert np.abs(batch["teacher_view"] - batch["student_view"]).mean() > 0.1


def test_one_view_is_the_only_one_that_is_cut_and_drawn(dataset):
    """The recipe `crop`: from 8% of the area on, flipped or not, and nothing else."""
    arguments = (dataset, ("crop",), SIZE, 4, 1)
    (batch,) = batching.pretraining_batches(*arguments).take(1)
    assert set(batch) == {"view", "label"} and set(batch["view"]) == {"crop"}
    cut, seeds = batch["view"]["crop"]
    for row, label in enumerate(batch["label"]):
        image = IMAGES[label][: 16 - int(label) % 2 if dataset.name.startswith("num") else 16]
        expected = crops.random_resized_crop(image[None], seeds[row][None], SIZE, (0.08, 1))
        assert_same_levels(cut[row], expected[0], at_most=0 if dataset is ARRAYS else 1)
    views = augment.finish(batch["view"]).numpy()
    plain = photometric.normalize(cut / 255).numpy()
    mirrored = [np.allclose(v, p[:, ::-1], atol=1e-5) for v, p in zip(views, plain, strict=True)]
    same = [np.allclose(v, p, atol=1e-5) for v, p in zip(views, plain, strict=True)]
    assert np.logical_xor(mirrored, same).all()


def test_an_epoch_is_a_permutation_less_its_remainder(dataset):
    steps = N // 4
    first = labels_of(take(dataset, steps))
    second = labels_of(take(dataset, steps, first_step=steps))
    assert len(set(first)) == len(set(second)) == 20
    assert list(first) != list(second) and list(first) != sorted(first)
    both = collections.Counter([*first, *second])
    assert max(both.values()) == 2


def test_batches_from_any_step_on_are_those_of_the_whole_run(dataset):
    whole = take(dataset, 14)
    for first_step in (1, 5, 9):
        assert_same(take(dataset, 14 - first_step, first_step), whole[first_step:])


def test_order_and_views_depend_on_the_seed(dataset):
    one, same, other = (take(dataset, 5, seed=seed) for seed in (1, 1, 2))
    assert_same(one, same)
    assert list(labels_of(one)) != list(labels_of(other))


def test_files_and_arrays_give_the_same_batches(files, resizer):
    """But for a level of 255 here and there; of other images two, see crops_test."""
    assert_same_crops(cut_batches(files, 7), cut_batches(ARRAYS, 7))


def test_both_resizers_make_the_same_batches(records, monkeypatch):
    """But for a level of 255 here and there; of other images two, see crops_test."""
    pytest.importorskip("cykooz_resizer")
    batches = cut_batches(records, 12)
    monkeypatch.setattr(python_crops, "cykooz_resizer", None)
    assert_same_crops(batches, cut_batches(records, 12))


def test_a_pipeline_that_is_gone_leaves_no_graph_behind(files, resizer):
    """TensorFlow keeps the Python functions of all of them, and whatever they hold."""

    def graphs():
        gc.collect()
        return sum(isinstance(thing, FuncGraph) for thing in gc.get_objects())

    take(files, 1)  # Some stay for good: decoders, and views that are compiled.
    before = graphs()
    for _ in range(3):
        take(files, 1)
    for _ in range(50):  # A collection that is under way elsewhere makes ours do nothing.
        if graphs() <= before:
            break
        time.sleep(0.1)
    assert graphs() <= before


@pytest.mark.parametrize("recipes", itertools.product(("weak", "strong"), repeat=2), ids="/".join)
def test_views_are_drawn_by_seed_view_and_place(recipes):
    """Against a computation step by step, for the second batch of the second epoch."""
    batch = take(ARRAYS, 1, first_step=6, seed=3, views=recipes)[0]
    order = tf.random.experimental.index_shuffle(np.arange(N), np.int64([3, 1]), N - 1).numpy()
    rows = order[4:8]
    np.testing.assert_array_equal(batch["label"], rows)
    functions = {"weak": augment.weak_view, "strong": augment.strong_view}
    for view, recipe in enumerate(recipes):
        seeds = np.int64([[2 * 3 + view, place] for place in range(24, 28)])
        expected = functions[recipe](tf.constant(IMAGES[rows]), tf.constant(seeds), SIZE)
        name = ("teacher_view", "student_view")[view]
        np.testing.assert_allclose(batch[name], expected, atol=1e-5)


def test_replicas_share_the_global_batches_in_order(two_replicas):
    batches = batching.pretraining_batches(ARRAYS, ("weak", "strong"), SIZE, 4, 1)
    iterator = iter(two_replicas.experimental_distribute_dataset(batches))
    for expected in take(ARRAYS, 6):
        parts = [finished(b) for b in two_replicas.experimental_local_results(next(iterator))]
        assert [len(part["label"]) for part in parts] == [2, 2]
        for name, values in expected.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)


def test_file_names_need_not_be_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Image.fromarray(IMAGES[0]).save(open(path, "wb"), "PNG")
    odd = datasets.FileDataset("odd", (os.fsdecode(path),))
    assert np.isfinite(take(odd, 1, batch=1)[0]["teacher_view"]).all()
    assert len(list(batching.evaluation_batches(odd, SIZE, 1))) == 1


def test_unlabelled_images_give_no_labels(files):
    unlabelled = datasets.FileDataset("flat", files.paths)
    (batch,) = take(unlabelled, 1)
    assert set(batch) == {"teacher_view", "student_view"}


def test_the_order_of_records_does_not_depend_on_the_global_seed(records):
    orders = []
    for global_seed in (0, 1, None):
        tf.random.set_seed(global_seed)
        orders.append(list(labels_of(take(records, 5))))
    assert orders[0] == orders[1] == orders[2]


def test_views_and_batches_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="strong, weak.*weak/hard"):
        take(ARRAYS, 1, views=("weak", "hard"))
    with pytest.raises(ValueError, match="two of strong, weak, crop.*Received: weak/weak/weak"):
        take(ARRAYS, 1, views=("weak", "weak", "weak"))
    with pytest.raises(ValueError, match="at most the dataset's 23.*=24"):
        take(ARRAYS, 1, batch=24)


def peak_of(what):
    """Bytes by which this process and its own grow at most while something is done."""

    def folders():
        children = psutil.Process().children()
        alive = [each for each in children if each.status() != psutil.STATUS_ZOMBIE]
        return [pathlib.Path(f"/proc/{process.pid}") for process in (psutil.Process(), *alive)]

    def sum_of(key):
        texts = [(folder / "status").read_text() for folder in folders()]
        return sum(1024 * int(re.search(rf"{key}:\s+(\d+)", text)[1]) for text in texts)

    before = sum_of("VmRSS")
    for folder in folders():
        (folder / "clear_refs").write_text("5")  # The peak is counted anew.
    what()
    return sum_of("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' /proc")
@pytest.mark.parametrize(
    ("kind", "pixels"),
    [
        *(
            (kind, 1e8)
            for kind in ("plain.jpg", "cmyk.jpg", "turned.jpg", "plain.png", "alpha.png")
        ),
        ("turned and alpha.tif", 1e8),
        # The largest that the graph does; beyond them Python does it, as it does the others.
        *((kind, graph_decoder.LARGE_PIXELS) for kind in ("turned.jpg", "alpha.png")),
    ],
)
def test_a_large_photograph_takes_no_more_memory_than_is_promised(
    kind, pixels, tmp_path, monkeypatch
):
    """2 GB above the baseline."""
    width, height = int((pixels * 10 / 7) ** 0.5), int((pixels * 7 / 10) ** 0.5)
    image = Image.fromarray(IMAGES[0]).resize((width, height), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6 if "turned" in kind else 1
    if "alpha" in kind:
        image.putalpha(100)
    path = tmp_path / kind
    fast = {"compress_level": 1} if kind.endswith("png") else {}
    image.convert("CMYK" if kind == "cmyk.jpg" else image.mode).save(path, exif=exif, **fast)
    del image
    small = tmp_path / "small.png"
    Image.fromarray(IMAGES[0]).save(small)

    def among_others(path):  # So that one such photograph is read at a time.
        return datasets.FileDataset("photo", (str(path), *(str(small),) * 20))

    resizers = (None, python_crops.cykooz_resizer)

    def evaluate(path):
        list(batching.evaluation_batches(among_others(path), SIZE, 7))

    def train_by(resizer, path):
        monkeypatch.setattr(python_crops, "cykooz_resizer", resizer)
        take(among_others(path), 20, views=("weak", "weak"), batch=1)

    # Training last: its readers may be at work on the next epoch when it ends.
    ways = (evaluate, *(functools.partial(train_by, by) for by in resizers))
    for read in ways:
        read(small)  # What TensorFlow takes once and for all.
        assert peak_of(lambda read=read: read(path)) < 2e9


# -------------------------------------------------------------------------------- evaluation


def test_no_iterators_end_waits_for_tensorflows_tuner(dataset):
    """Which took as long as the iterator had lived, up to a minute, now and then."""
    views = ("weak", "strong")
    made = [
        batching.pretraining_batches(dataset, views, SIZE, 4, 1),
        batching.evaluation_batches(dataset, SIZE, 4),
        batching.numbered_batches(dataset, SIZE, 4),
        batching.sized_batches(dataset, SIZE, GROUP),
        batching.numbered_views(dataset, views, SIZE, 1),
        batching.probe_batches(dataset, SIZE, 4, 1, 0),
        batching.finetuning_batches(dataset, SIZE, 4, 1),
        *([dataset.records] if isinstance(dataset, datasets.RecordDataset) else []),
    ]
    assert [batches.options().autotune.enabled for batches in made] == [False] * len(made)


def test_a_data_services_workers_keep_the_tuner(files, monkeypatch):
    """They have other processors than the machine that asks for the batches."""
    sent = []
    service = tf.data.experimental.service
    monkeypatch.setattr(service, "distribute", lambda *_, **__: lambda x: sent.append(x) or x)
    monkeypatch.setattr(batching.service, "require_workers", lambda address: None)
    way = batching.service.DataService("host:1", "job")
    batching.pretraining_batches(files, ("weak", "strong"), SIZE, 4, 1, data_service=way)
    (dataset,) = sent
    assert dataset.options().autotune.enabled is not False


def test_evaluation_reads_every_image_once_in_order(dataset):
    made = batching.evaluation_batches(dataset, SIZE, 5)
    # Of files some may turn out to be unreadable. Keras warns where the number is unknown.
    known = isinstance(dataset, datasets.ArrayDataset)
    assert made.cardinality() == (5 if known else tf.data.UNKNOWN_CARDINALITY)
    batches = list(made.as_numpy_iterator())
    labels = np.concatenate([labels for _, labels in batches])
    assert sorted(labels) == list(range(N))
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 5, 3]
    images = np.concatenate([images for images, _ in batches])
    for i in (0, 10, 22):
        rows = 15 if isinstance(dataset, datasets.RecordDataset) and i % 2 else 16
        expected = augment.evaluation_view(IMAGES[i : i + 1, :rows], SIZE)[0]
        np.testing.assert_allclose(images[list(labels).index(i)], expected, atol=1e-5)


def test_evaluation_leaves_unreadable_files_out(files):
    with open(files.paths[3], "wb") as file:
        file.write(b"broken")
    unreadable = Unreadable(N, 0.1)
    batches = batching.evaluation_batches(files, SIZE, 5, unreadable)
    labels = np.concatenate([labels for _, labels in batches.as_numpy_iterator()])
    assert list(labels) == [i for i in range(N) if i != 3]
    assert unreadable.names == {files.paths[3]}


@pytest.mark.parametrize("kinds", [("TIFF",), ("TIFF", "PNG", "TIFF")])
def test_what_the_graph_cannot_read_comes_in_its_place(kinds, tmp_path):
    for i in range(40):  # Three groups, of which the graph misses all, or the first and the last.
        kind = kinds[i // GROUP % len(kinds)]
        grey = np.full((SIZE, SIZE, 3), 5 * i, np.uint8)
        Image.fromarray(grey).save(tmp_path / f"{i:02d}.{kind.lower()}", kind)
    dataset = datasets.load_collection(str(tmp_path))
    seen = list(batching.numbered_batches(dataset, SIZE, 16))
    assert np.concatenate([places for places, *_ in seen]).tolist() == list(range(40))
    red = np.concatenate([views[:, 0, 0, 0] for _, views, _ in seen])
    np.testing.assert_allclose(red, (5 * np.arange(40) / 255 - 0.485) / 0.229, atol=1e-5)


def test_a_probes_epoch_sees_every_image_once_its_remainder_too(dataset):
    def epoch(number, seed=0):
        batches = batching.probe_batches(dataset, SIZE, 8, seed, number)
        return list(batches.as_numpy_iterator())

    first = epoch(0)
    assert [len(labels) for _, labels in first] == [8, 8, 7]
    assert all(views.shape[1:] == (SIZE, SIZE, 3) for views, _ in first)
    labels = [np.concatenate([labels for _, labels in epoch(i)]) for i in (0, 1, 0)]
    np.testing.assert_array_equal(np.sort(labels[0]), range(N))
    np.testing.assert_array_equal(np.sort(labels[1]), range(N))
    np.testing.assert_array_equal(labels[0], labels[2])
    assert (labels[0] != labels[1]).any()
    assert (labels[0] != np.concatenate([labels for _, labels in epoch(0, seed=1)])).any()


def test_a_probes_views_are_crops_of_8_percent_on_and_flips():
    """A batch is no more than the dataset; seeds are those of (seed, place in all epochs)."""
    views, labels = next(iter(batching.probe_batches(ARRAYS, SIZE, 999, 5, 2)))
    assert len(labels) == N
    seeds = tf.stack(
        [tf.fill([N], tf.constant(5, tf.int64)), 2 * N + tf.range(N, dtype=tf.int64)], 1
    )
    images = tf.constant(IMAGES[labels])
    boxes = crops.crop_boxes(crops.crop_draws(seeds)[:, tf.newaxis], images, areas=[(0.08, 1.0)])
    (cut,) = crops.resize_boxes(images, boxes, SIZE)
    expected = photometric.random_horizontal_flip(cut, seeds)
    np.testing.assert_allclose(views, photometric.normalize(expected / 255), atol=1e-5)
    assert np.prod(boxes[:, 0, 2:], axis=1).min() < 0.2 * 16 * 20
