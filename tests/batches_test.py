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
import tensorflow_datasets as tfds
from PIL import ExifTags, Image
from tensorflow.python.framework.func_graph import FuncGraph

from isd_tf.data import batches as batching
from isd_tf.data import datasets, graph_decoder
from isd_tf.data.decoding import Unreadable, explaining
from isd_tf.data.looks import GROUP
from isd_tf.views import augment, crops, photometric, python_crops

N, SIZE = 23, 12
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 16, 20, 3), np.uint8)
ARRAYS = datasets.ArrayDataset("arrays", IMAGES, np.arange(N), tuple(map(str, range(N))))


@pytest.fixture
def files(tmp_path):
    paths = []
    for i, image in enumerate(IMAGES):
        paths.append(str(tmp_path / f"{i:02d}.png"))
        Image.fromarray(image).save(paths[-1])
    return datasets.FileDataset("files", tuple(paths), np.arange(N), ())


class NumberedImages(tfds.core.GeneratorBasedBuilder):
    """N images of two sizes, each with its number; some may be a broken file."""

    VERSION = tfds.core.Version("1.0.0")
    broken_file, broken = None, ()

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(num_classes=N),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, image in enumerate(IMAGES):
            image = self.broken_file if i in self.broken else image[: 16 - i % 2]
            yield i, {"image": image, "label": i}


def prepare_records(directory, broken_file=None, broken=(7,)):
    own = {"broken_file": broken_file, "broken": broken if broken_file else ()}
    with tfds.core.registered.skip_registration():
        kind = type("NumberedImages", (NumberedImages,), own)
    builder = kind(data_dir=str(directory))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    assert len(builder.info.splits["train"].filepaths) == 4
    return datasets._open_split(builder, "train")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return prepare_records(tmp_path_factory.mktemp("tfds"))


def take(dataset, steps, first_step=0, views=("weak", "strong"), seed=1, batch=4, **arguments):
    batches = batching.pretraining_batches(
        dataset, views, SIZE, batch, seed, first_step, **arguments
    )
    return [finished(batch) for batch in batches.take(steps)]


def finished(batch):
    """The batch as the networks see it, in numpy."""
    return {
        name: (augment.finish(value) if name.endswith("view") else value).numpy()
        for name, value in batch.items()
    }


def labels_of(batches):
    return np.concatenate([batch["label"] for batch in batches])


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


def test_an_unreadable_file_is_replaced_by_the_next_in_order_and_shifts_nothing(files, resizer):
    whole = take(files, 10)
    order = tf.random.experimental.index_shuffle(np.arange(N), np.int64([1, 0]), N - 1).numpy()
    broken = order[6]
    with open(files.paths[broken], "wb") as file:
        file.write(b"broken")

    unreadable = Unreadable(N, 0.1)
    batches = take(files, 10, unreadable=unreadable)

    assert unreadable.names == {files.paths[broken]}
    assert labels_of(batches)[6] == order[7]
    intact = labels_of(whole) != broken
    np.testing.assert_array_equal(labels_of(batches)[intact], labels_of(whole)[intact])
    for name in ("teacher_view", "student_view"):
        ours, theirs = (np.concatenate([b[name] for b in run]) for run in (batches, whole))
        np.testing.assert_array_equal(ours[intact], theirs[intact])
        assert np.isfinite(ours).all()


def test_unreadable_files_are_not_tolerated_unless_allowed(files, resizer):
    with open(files.paths[0], "wb") as file:
        file.write(b"broken")
    with pytest.raises(tf.errors.OpError):
        take(files, 12)


@pytest.mark.parametrize("ahead", [1, 40])
def test_the_limit_ends_the_training_at_the_same_batch_however_far_is_read_ahead(
    files, ahead, monkeypatch, resizer
):
    """Three broken of 23: two are allowed. Batches of one, in an order that is known."""
    order = tf.random.experimental.index_shuffle(np.arange(N), np.int64([1, 0]), N - 1).numpy()
    broken = [files.paths[order[place]] for place in (2, 9, 16)]
    for path in broken:
        with open(path, "wb") as file:
            file.write(b"broken")
    monkeypatch.setattr(batching, "PREFETCHED_BATCHES", ahead)
    unreadable, taken = Unreadable(N, 0.1), 0
    batches = batching.pretraining_batches(files, ("weak", "weak"), SIZE, 1, 1, 0, unreadable)
    examples = ", ".join(sorted(broken))
    with pytest.raises(ValueError, match=f"10.0%.*: 3 of 23, for example {re.escape(examples)}. "):
        with explaining([unreadable]):
            for _ in batches:
                taken += 1
                if taken == 5:
                    time.sleep(0.5)  # Long enough to read all ahead.
                    assert ahead == 1 or len(unreadable.names) > 1
                assert len(unreadable.met_before(taken)) == int(taken > 2) + int(taken > 9)
    assert taken == 16


def test_an_unreadable_record_is_replaced_by_the_next(records, tmp_path, resizer):
    (tmp_path / "broken.png").write_bytes(b"broken")
    broken = prepare_records(tmp_path / "tfds", str(tmp_path / "broken.png"))
    unreadable = Unreadable(N, 0.5)
    # Six epochs, most of which meet number 7.
    ours, theirs = labels_of(take(broken, 30, unreadable=unreadable)), labels_of(take(records, 30))
    assert 7 in theirs and 7 not in ours
    np.testing.assert_array_equal(ours[theirs != 7], theirs[theirs != 7])
    places = [place for place in np.flatnonzero(theirs == 7) if place % 20 < 19]
    for place in places:
        assert ours[place] == theirs[place + 1]
    assert places
    # Named by its place in the files, so that it is counted once in all epochs.
    (name,) = unreadable.names
    assert re.search(r"numbered_images-train.tfrecord-0000\d-of-00004, record \d$", name)


def test_a_broken_last_record_of_an_epoch_is_replaced_too(tmp_path, resizer):
    (tmp_path / "broken.png").write_bytes(b"broken")
    broken = prepare_records(tmp_path / "tfds", str(tmp_path / "broken.png"))
    # With batches of 1 an epoch has no remainder: in 40 epochs number 7 is last at times.
    labels = labels_of(take(broken, N * 40, batch=1, unreadable=Unreadable(N, 0.5)))
    assert 7 not in labels


def broken_records(folder, kept):
    """Records that are broken but for the first `kept`."""
    (folder / "broken.png").write_bytes(b"broken")
    return prepare_records(folder / "tfds", str(folder / "broken.png"), range(kept, N))


def broken_files(folder, kept):
    """One broken file, all but `kept` times."""
    (folder / "broken.png").write_bytes(b"broken")
    Image.fromarray(IMAGES[0]).save(folder / "whole.png")
    paths = [str(folder / "whole.png")] * kept + [str(folder / "broken.png")] * (N - kept)
    return datasets.FileDataset("files", tuple(paths))


@pytest.mark.parametrize(
    ("kind", "limit", "expected"),
    [
        (broken_files, 0.05, "2 in a row that cannot, .*/broken.png, .*/broken.png. Repair"),
        (broken_records, 0.99, r"4 in a row that cannot, .*-00004, record \d, .*, .*, .*. Repair"),
        (broken_records, 0.0, r"At most 0.0%.*: \d+ of 23, for example .*-00004, record \d"),
    ],
)
def test_a_place_without_a_readable_candidate_ends_the_training(tmp_path, kind, limit, expected):
    unreadable = Unreadable(N, limit)
    with pytest.raises(ValueError, match=expected), explaining([unreadable]):
        take(kind(tmp_path, kept=5), 12, unreadable=unreadable)


def test_no_more_images_are_tried_for_a_place_than_may_be_unreadable_and_one(files):
    """Of a million broken ones all would be, at each place."""
    for path in files.paths:
        with open(path, "wb") as file:
            file.write(b"broken")
    unreadable, context = Unreadable(N, 0.1), tf.distribute.InputContext(2, 0, 2)
    take(files, 1, batch=2, unreadable=unreadable, input_context=context)
    order = tf.random.experimental.index_shuffle(np.arange(N), np.int64([1, 0]), N - 1).numpy()
    assert unreadable.met_before(1) == [files.paths[i] for i in order[:3]]


@pytest.mark.parametrize("kind", [broken_files, broken_records])
def test_of_several_workers_none_ends_alone(tmp_path, kind):
    """They count together: `CountUnreadable` asks each for what it has met up to a step."""
    unreadable, context = Unreadable(N, 0.0), tf.distribute.InputContext(2, 0, 2)
    take(kind(tmp_path, kept=5), 12, unreadable=unreadable, input_context=context)
    assert unreadable.met_before(12 * 4)


@pytest.mark.parametrize("kind", ["files", "records"])
def test_an_image_of_too_many_pixels_is_not_seen(kind, files, tmp_path):
    Image.new("RGB", (30, 30)).save(files.paths[7])
    dataset = prepare_records(tmp_path / "tfds", files.paths[7]) if kind == "records" else files
    counters = [Unreadable(N, 0.1, max_pixels=16 * 20) for _ in range(2)]
    trained_on = labels_of(take(dataset, 30, unreadable=counters[0]))
    evaluated = batching.evaluation_batches(dataset, SIZE, 4, counters[1])
    evaluated = np.concatenate([labels for _, labels in evaluated])
    assert 7 not in trained_on and sorted({*range(N)} - {*evaluated}) == [7]
    assert [len(counter.names) for counter in counters] == [1, 1]


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
