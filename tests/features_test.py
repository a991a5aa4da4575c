import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import isd_tf
from isd_tf.data.datasets import ArrayDataset
from isd_tf.data.decoding import Unreadable
from isd_tf.evaluation import features


@pytest.fixture
def encoder():
    keras.utils.set_random_seed(0)
    return isd_tf.build_encoder("tiny_resnet", 16, 4)


def arrays(seed=0, count=30):
    images = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)
    return ArrayDataset("arrays", images, np.arange(count) % 3)


def test_features_are_the_encoders_of_the_evaluation_views(encoder, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 8)
    monkeypatch.setattr(features, "CHUNK", 16)
    data = arrays()
    values, labels, rows = features.extract(encoder, data, 16)
    views = isd_tf.augment.evaluation_view(tf.constant(data.images), 16)
    np.testing.assert_allclose(values, encoder(views, training=False), atol=1e-5)
    np.testing.assert_array_equal(labels, data.labels)
    np.testing.assert_array_equal(rows, np.arange(30))


def test_kept_features_are_found_again_and_bit_equal(encoder, tmp_path, monkeypatch):
    first = features.extract(encoder, arrays(), 16, cache=tmp_path)
    assert len(os.listdir(tmp_path)) == 1
    np.testing.assert_array_equal(first.values, features.extract(encoder, arrays(), 16).values)

    def refuse(*arguments):
        raise AssertionError("The encoder was called.")

    monkeypatch.setattr(features, "in_chunks", refuse)
    again = features.extract(encoder, arrays(), 16, cache=tmp_path)
    np.testing.assert_array_equal(again.values, first.values)
    np.testing.assert_array_equal(again.labels, first.labels)


def test_rows_tell_the_images_that_are_left_and_what_has_vanished_is_left_out(encoder, tmp_path):
    for i in range(6):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * i,) * 3).save(path)
    train, _ = isd_tf.datasets.load("folder", data_dir=str(tmp_path))
    whole = features.extract(encoder, train, 16, cache=tmp_path / "kept")
    os.remove(train.paths[1])
    os.truncate(train.paths[4], 40)
    for _ in range(2):  # The second time from the cache.
        counter = Unreadable(6, 0.5)
        part = features.extract(encoder, train, 16, counter, tmp_path / "kept")
        np.testing.assert_array_equal(part.rows, [0, 2, 3, 5])
        np.testing.assert_array_equal(part.labels, train.labels[part.rows])
        np.testing.assert_allclose(part.values, whole.values[part.rows], atol=1e-5)
    assert len(os.listdir(tmp_path / "kept")) == 2


def test_other_weights_or_images_are_never_taken_for_those_kept(encoder, tmp_path):
    def extract(data):
        kept = features.extract(encoder, data, 16, cache=tmp_path).values
        np.testing.assert_array_equal(kept, features.extract(encoder, data, 16).values)

    extract(arrays())
    extract(arrays(seed=1))
    statistics = next(w for w in encoder.weights if "moving_mean" in w.path)
    statistics.assign(statistics + 0.5)  # Not a trainable weight, and yet the features change.
    extract(arrays())
    assert len(os.listdir(tmp_path)) == 3


def test_files_of_the_same_names_in_another_folder_are_other_images(encoder, tmp_path):
    kept = []
    for folder, level in (("a", 10), ("b", 200)):
        for name in "xy":
            path = tmp_path / folder / "train" / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (16, 16), (level,) * 3).save(path)
        train, _ = isd_tf.datasets.load("folder", data_dir=str(tmp_path / folder))
        kept.append(features.extract(encoder, train, 16, cache=tmp_path / "kept").values)
    assert np.abs(kept[0] - kept[1]).max() > 0.01
    # And a file that is written anew under its old name, with as many bytes.
    path = tmp_path / "b" / "train" / "x" / "0.png"
    encoded = path.read_bytes()
    Image.new("RGB", (16, 16), (60,) * 3).save(path)
    assert len(encoded) == path.stat().st_size
    again = features.extract(encoder, train, 16, cache=tmp_path / "kept").values
    assert np.abs(again[0] - kept[1][0]).max() > 0.01


def test_files_that_differ_in_their_content_alone_are_other_images(encoder, tmp_path):
    """Equally long, written at the same time: as an archive's files are."""
    kept = []
    for folder, level in (("train", 10), ("val", 200)):
        for name in "xy":
            path = tmp_path / folder / name / "0.bmp"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (16, 16), (level,) * 3).save(path)
            os.utime(path, (1e9, 1e9))
    for split in isd_tf.datasets.load("folder", data_dir=str(tmp_path)):
        kept.append(features.extract(encoder, split, 16, cache=tmp_path / "kept").values)
    assert np.abs(kept[0] - kept[1]).max() > 0.01
    # And under another name the folder is the same.
    (tmp_path / "train").rename(tmp_path / "renamed")
    renamed, _ = isd_tf.datasets.load("folder", "renamed", "val", str(tmp_path))
    features.extract(encoder, renamed, 16, cache=tmp_path / "kept")
    assert len(os.listdir(tmp_path / "kept")) == 2


def test_what_a_killed_process_of_the_same_number_left_is_overwritten(encoder, tmp_path):
    key = features.key(encoder, arrays(), 16)
    left = tmp_path / f"unfinished-{key}-{os.getpid()}"
    left.mkdir()
    (left / "values.float32").write_bytes(b"x" * 10**6)
    kept = features.extract(encoder, arrays(), 16, cache=tmp_path).values
    np.testing.assert_array_equal(kept, features.extract(encoder, arrays(), 16).values)
    assert os.listdir(tmp_path) == [key]


def test_what_was_not_finished_is_not_kept(encoder, tmp_path):
    broken = keras.Sequential([keras.Input((16, 16, 3)), keras.layers.Flatten()])
    broken.add(keras.layers.Lambda(lambda x: x / 0))
    with pytest.raises(ValueError, match="must be finite"):
        features.extract(broken, arrays(), 16, cache=tmp_path)
    assert os.listdir(tmp_path) == []


def test_images_of_another_size_are_refused(encoder):
    with pytest.raises(ValueError, match=r"takes images of shape \(16, 16, 3\).*\(24, 24, 3\)"):
        features.extract(encoder, arrays(), 24)


def test_unit_rows_leave_zeros():
    rows = features.unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]], rtol=1e-6)
