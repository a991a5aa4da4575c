import csv
import dataclasses
import os

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from isd_tf.data import check, datasets
from isd_tf.data.datasets import ArrayDataset, FileDataset, RecordDataset

random = np.random.RandomState(0)


def noise(height=40, width=50):
    return Image.fromarray(random.randint(0, 255, (height, width, 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Ten ordinary images in train and in val, and one of each kind of oddity."""
    for split in ("train", "val"):
        for i in range(10):
            path = tmp_path / split / "cat" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise().save(path)
    train = tmp_path / "train" / "cat"
    (train / "empty.jpg").write_bytes(b"")
    (train / "empty_too.jpg").write_bytes(b"")
    (train / "gone.jpg").symlink_to("/nowhere")
    noise(9, 30).save(train / "tiny.png")
    noise(400, 40).save(train / "thin.png")
    Image.new("L", (50, 40), 12).save(train / "night.png")
    (train / "copy.png").write_bytes((train / "3.png").read_bytes())
    (tmp_path / "val" / "cat" / "leaked.png").write_bytes((train / "5.png").read_bytes())
    return tmp_path


def found_in(checked):
    return {(f.split, os.path.basename(f.image), f.kind) for f in checked.findings}


def test_every_oddity_is_found_and_nothing_else(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "IMAGES_AT_ONCE", 4)
    monkeypatch.setattr(check, "LARGE_PIXELS", 15_000)
    train, test = datasets.load("folder", data_dir=str(folder))
    told = []
    checked = check.check(
        {"train": train, "test": test}, 32, progress=lambda *numbers: told.append(numbers)
    )
    assert found_in(checked) == {
        ("train", "empty.jpg", "unreadable"),
        ("train", "empty_too.jpg", "unreadable"),
        ("train", "gone.jpg", "unreadable"),
        ("train", "tiny.png", "very small"),
        ("train", "thin.png", "extremely thin"),
        ("train", "thin.png", "very large"),
        ("train", "night.png", "near-black"),
        ("train", "copy.png", "duplicate"),
        ("test", "leaked.png", "in train and test"),
    }
    assert told[-1] == (28, 28) and [done for done, _ in told] == sorted(done for done, _ in told)
    assert checked.images == {"train": 17, "test": 11}
    assert checked.modes == {"RGB": 24, "L": 1} and (40, 400) in checked.sizes

    text = check.summary(checked)
    assert text.startswith("17 train, 11 test images read, 9 findings.")
    assert "3 unreadable        replaced by the next image" in text and "(no such file)" in text
    assert "height: 9 to 400 pixels, median 40" in text and "modes: 24 RGB, 1 L" in text
    check.write_csv(checked, str(tmp_path / "check.csv"))
    with open(tmp_path / "check.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    leaked = next(row for row in rows if row["kind"] == "in train and test")
    assert len(rows) == 9 and leaked["what pretraining does"].endswith("scores are too high")
    assert leaked["detail"] == f"same as {folder}/train/cat/5.png"


def test_arrays_are_checked_as_files_are():
    images = random.randint(0, 255, (4, 20, 20, 3)).astype(np.uint8)
    images[2], images[3] = images[0], 0
    checked = check.check({"train": ArrayDataset("", images)}, 32)
    assert found_in(checked) == {
        ("train", "image 2", "duplicate"),
        ("train", "image 3", "near-black"),
    }


def test_streams_are_checked_as_files_are(tmp_path):
    class Stream:
        """Of a RecordDataset what reading it takes."""

        def __len__(self):
            return 2

        @property
        def records(self):
            records = tf.data.Dataset.from_tensor_slices([b"no image", picture])
            return records.enumerate().map(lambda index, record: ("a.tfrecord", index, record))

        def parse(self, record):
            return record, tf.constant(-1, tf.int64)

    noise(9, 30).save(tmp_path / "x.png")
    picture = (tmp_path / "x.png").read_bytes()
    checked = check.check({"train": Stream()}, 32)
    assert found_in(checked) == {
        ("train", "a.tfrecord record 0", "unreadable"),
        ("train", "a.tfrecord record 1", "very small"),
    }


def test_images_in_train_and_test_are_found_without_reading_all(folder, monkeypatch):
    train, test = datasets.load("folder", data_dir=str(folder))
    os.link(folder / "train" / "cat" / "2.png", folder / "val" / "cat" / "linked.png")
    # As long as another, and the same in the middle, but not the same.
    almost = bytearray((folder / "train" / "cat" / "1.png").read_bytes())
    almost[20] ^= 1
    (folder / "val" / "cat" / "almost.png").write_bytes(almost)
    monkeypatch.setattr(check, "SAMPLE_BYTES", 64)
    digested = []
    digest = check._digest_of_file
    monkeypatch.setattr(
        check, "_digest_of_file", lambda path: digested.append(path) or digest(path)
    )
    train, test = datasets.load("folder", data_dir=str(folder))
    pairs = check.shared_images(train, test)
    named = [(os.path.basename(train.paths[i]), os.path.basename(test.paths[j])) for i, j in pairs]
    assert named == [("5.png", "leaked.png"), ("2.png", "linked.png")]
    assert {os.path.basename(path) for path in digested} == {
        *("1.png", "almost.png", "5.png", "leaked.png", "2.png", "linked.png")
    }
    assert check.shared_images(train, train)[0] == (0, 0)


def test_equal_arrays_are_found():
    images = random.randint(0, 255, (6, 8, 8, 3)).astype(np.uint8)
    train = ArrayDataset("", images[:4])
    test = ArrayDataset("", images[[5, 2, 4, 0]])
    assert check.shared_images(train, test) == [(2, 1), (0, 3)]
    assert check.shared_images(train, dataclasses.replace(test, images=test.images[:, :4])) == []
    assert check.shared_images(train, FileDataset("", ("a.jpg",))) is None


def test_equal_records_of_short_streams_are_found(tmp_path, monkeypatch):
    features = tfds.features.FeaturesDict({"image": tfds.features.Image()})

    def stream(name, colours, skip):
        with tf.io.TFRecordWriter(str(tmp_path / name)) as writer:
            for colour in colours:
                image = np.full((4, 4, 3), colour, np.uint8)
                writer.write(features.serialize_example(features.encode_example({"image": image})))
        shards = ((str(tmp_path / name),), (skip,), (len(colours) - skip,))
        return RecordDataset(name, *shards, features, "image", None)

    train, test = stream("train", [9, 1, 2, 3], 1), stream("test", [4, 3, 9, 1], 0)
    assert check.shared_images(train, test) == [(2, 1), (0, 3)]
    monkeypatch.setattr(check, "LARGEST_STREAM_BYTES", 100)
    assert check.shared_images(train, test) is None
