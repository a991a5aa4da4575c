import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import isd_tf
from isd_tf.data import subsets
from isd_tf.data.batches import evaluation_batches, pretraining_batches
from isd_tf.data.datasets import ArrayDataset, FileDataset
from isd_tf.views import photometric

CLASSES = 6


def numbered(count=120, classes=CLASSES, name="numbered/train"):
    """Images whose every pixel is their row; labels go round."""
    images = np.broadcast_to(
        np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 3)
    )
    names = tuple(f"class{i}" for i in range(classes))
    return ArrayDataset(name, images, np.arange(count) % classes, names)


class Streamed(tfds.core.GeneratorBasedBuilder):
    """The images of `numbered` in several sizes, so that TFDS streams them from shards."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(num_classes=CLASSES)
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(120), "test": self._generate_examples(30)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": np.full((8 + i % 2, 8, 3), i, np.uint8), "label": i % CLASSES}


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    config = tfds.download.DownloadConfig(num_shards=4)
    Streamed(data_dir=folder).download_and_prepare(download_config=config)
    return isd_tf.datasets.load("streamed", data_dir=folder)


def contents(dataset):
    """(number, label) of every image, as the evaluation reads them."""
    views = evaluation_batches(dataset, 8, 16)
    numbers = []
    for images, labels in views:
        red = photometric.denormalize(images)[:, 0, 0, 0]
        numbers += list(zip(np.round(red * 255).astype(int), labels.numpy(), strict=True))
    return sorted(numbers)


def test_streams_and_arrays_are_cut_alike(streams):
    train, _ = streams
    rows = np.array([7, 3, 100, 119])
    assert isinstance(subsets.take(numbered(), rows, "some"), ArrayDataset)
    labels = subsets.labels_of(train)  # TFDS shuffles as it stores: in the order of the shards.
    part = subsets.take(train, rows, "some")
    assert len(part) == 4 and part.name.endswith("(some)")
    np.testing.assert_array_equal(subsets.labels_of(part), labels[np.sort(rows)])
    # A part of a part.
    again = subsets.take(part, np.array([2]), "one")
    assert subsets.labels_of(again) == labels[100]
    assert [label == number % CLASSES for number, label in contents(part)] == [True] * 4


def test_few_images_of_a_stream_need_few_of_its_shards(streams):
    train, _ = streams
    rows = [3, 0, 2]
    part = subsets.take(train, np.array(rows), "few")
    assert len(part) == 3 and len(part.files) < len(train.files)
    np.testing.assert_array_equal(subsets.labels_of(part), subsets.labels_of(train)[[0, 2, 3]])
    names = isd_tf.datasets.names_of
    assert names(part, [0, 1, 2]) == names(train, [0, 2, 3])
    again = subsets.take(part, np.array([2]), "one")
    assert names(again, [0]) == names(train, [3])


def test_a_part_of_a_stream_is_trained_on_whole_and_alone(streams):
    part = subsets.take(streams[0], np.arange(0, 120, 3), "a third")
    batches = pretraining_batches(part, ("weak", "weak"), 8, 8, seed=0)
    labels = np.concatenate([batch["label"].numpy() for batch in batches.take(5)])
    np.testing.assert_array_equal(np.sort(labels), np.sort(subsets.labels_of(part)))


@pytest.mark.parametrize("kind", ["arrays", "streams"])
def test_a_fraction_takes_the_same_share_of_every_class(kind, streams):
    dataset = numbered() if kind == "arrays" else streams[0]
    rows = subsets.rows_of_fraction(dataset, 0.25, seed=0)
    counts = np.bincount(subsets.labels_of(dataset)[rows])
    np.testing.assert_array_equal(counts, [5] * CLASSES)
    assert len(set(rows)) == len(rows) == 30
    np.testing.assert_array_equal(rows, subsets.rows_of_fraction(dataset, 0.25, seed=0))
    assert (rows != subsets.rows_of_fraction(dataset, 0.25, seed=1)).any()
    np.testing.assert_array_equal(subsets.rows_of_fraction(dataset, 1.0, 0), np.arange(120))


def test_a_fraction_that_leaves_a_class_empty_is_refused_with_one_that_works():
    with pytest.raises(ValueError, match="0.01 of the 20 images of class0.*at least 0.075"):
        subsets.rows_of_fraction(numbered(), 0.01, 0)
    # There every class has two, of which one can be held out.
    rows = subsets.rows_of_fraction(numbered(), 0.075, 0)
    assert len(rows) == 2 * CLASSES
    subsets.hold_out(subsets.labels_of(numbered())[rows], 0.2, seed=0)
    # Of many images far less than a hundredth will do.
    large = ArrayDataset("large", np.zeros((700, 1, 1, 3), np.uint8), np.zeros(700, np.int64), ())
    with pytest.raises(ValueError, match="at least 0.0022"):
        subsets.rows_of_fraction(large, 0.0005, 0)
    assert len(subsets.rows_of_fraction(large, 0.0022, 0)) == 2


def test_held_out_rows_are_a_share_of_each_class_and_leave_one():
    labels = np.array([0] * 10 + [1] * 5 + [2])
    fit, held_out = subsets.hold_out(labels, 0.2, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([fit, held_out])), np.arange(16))
    np.testing.assert_array_equal(np.bincount(labels[held_out], minlength=3), [2, 1, 0])
    with pytest.raises(ValueError, match="two labelled examples.*one of each of 3 classes"):
        subsets.hold_out(np.arange(3), 0.2, 0)


@pytest.mark.parametrize("kind", ["arrays", pytest.param("streams", marks=pytest.mark.slow)])
def test_an_unbalanced_draw(kind, streams):
    train, test = streams if kind == "streams" else (numbered(), numbered(30, name="numbered/test"))
    draw = subsets.unbalance(train, test, large=2, rare=3, images=4, seed=0)
    assert draw.rare_labels == (2, 3, 4)
    # Twenty images a class: all of the large ones, four of each rare one, all in the bank.
    expected = {"pretraining": [20, 20, 4, 4, 4], "bank": [20] * 5, "queries": [5] * 5}
    for name, counts in expected.items():
        part = getattr(draw, name)
        np.testing.assert_array_equal(np.bincount(subsets.labels_of(part)), counts, err_msg=name)
        assert len(part) == sum(counts) and len(part.class_names) == 5
        # The label's name is still that of the image's class.
        names = [part.class_names[label] for _, label in contents(part)]
        assert [train.class_names.index(n) for n in names] == [
            number % CLASSES for number, _ in contents(part)
        ]
    assert {number for number, _ in contents(draw.pretraining)} < {
        number for number, _ in contents(draw.bank)
    }
    other = subsets.unbalance(train, test, 2, 3, 4, seed=1)
    assert other.bank.class_names != draw.bank.class_names


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((4, 3, 1), "no more classes than there are.*large=4, rare=3.*6 classes of numbered"),
        ((0, 3, 1), "needs a large and a rare class"),
        ((2, 3, 21), "rare class needs 21 training images. Received: 20 of class"),
    ],
)
def test_an_unbalanced_draw_that_cannot_be_is_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        subsets.unbalance(numbered(), None, *numbers, seed=0)
    unlabelled = dataclasses.replace(numbered(), labels=None)
    with pytest.raises(ValueError, match="has no labels"):
        subsets.unbalance(unlabelled, None, 1, 1, 1, 0)


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """A folder of ten classes with three images each, and a list in the reference's form."""
    root = tmp_path_factory.mktemp("listed")
    names = [f"n{i:08d}" for i in range(10)]
    for split, count in (("train", 3), ("val", 2)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (i, i, i)).save(root / split / name / f"{name}_{i}.JPEG")
    chosen = names[9:0:-1]  # Eight large classes, then a rare one: not in the folder's order.
    lines = ["class names : ", *chosen, "Train Images: "]
    lines += [f"/train/{name}/{name}_{i}.JPEG" for name in chosen[:8] for i in range(3)]
    lines += [f"/train/{chosen[8]}/{chosen[8]}_1.JPEG"]
    (root / "D1.txt").write_text("\n".join(lines) + "\n")
    return root, chosen


def test_a_list_of_the_papers_study_is_read(listed):
    root, chosen = listed
    train, test = isd_tf.datasets.load("folder", data_dir=str(root))
    draw = subsets.unbalance_by_list(train, test, str(root / "D1.txt"))
    assert isinstance(draw.pretraining, FileDataset) and draw.rare_labels == (8,)
    assert draw.bank.class_names == draw.queries.class_names == tuple(chosen)
    np.testing.assert_array_equal(np.bincount(draw.pretraining.labels), [3] * 8 + [1])
    np.testing.assert_array_equal(np.bincount(draw.bank.labels), [3] * 9)
    np.testing.assert_array_equal(np.bincount(draw.queries.labels), [2] * 9)
    for dataset in draw[:3]:
        assert [chosen[label] for label in dataset.labels] == [
            p.split("/")[-2] for p in dataset.paths
        ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n00000005_1", "n00000005_9", "1 images, of 25, that are not in .*n00000005_9.JPEG"),
        ("n00000003\n", "n99999999\n", "outside the classes that it names"),
        ("n00000009", "n99999999", "1 without a folder, such as n99999999"),
    ],
)
def test_a_list_that_names_what_the_folder_has_not_is_refused(listed, tmp_path, old, new, message):
    root, _ = listed
    (tmp_path / "D.txt").write_text((root / "D1.txt").read_text().replace(old, new))
    train, test = isd_tf.datasets.load("folder", data_dir=str(root))
    with pytest.raises(ValueError, match=message):
        subsets.unbalance_by_list(train, test, str(tmp_path / "D.txt"))


def test_a_list_needs_a_folder_and_a_file(listed):
    root, _ = listed
    with pytest.raises(ValueError, match="numbered/train, which is no folder.*--dataset=folder"):
        subsets.unbalance_by_list(numbered(), None, str(root / "D1.txt"))
    with pytest.raises(FileNotFoundError, match="does not exist.*D11.txt"):
        subsets.unbalance_by_list(numbered(), None, str(root / "D11.txt"))


def test_fingerprints_tell_parts_apart(streams):
    for dataset in (numbered(), streams[0]):
        parts = [dataset, *(subsets.take(dataset, np.arange(n, n + 9), "some") for n in (0, 1))]
        assert len({isd_tf.datasets.fingerprint(part) for part in parts}) == 3
