import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from isd_tf.data import datasets, originals, pixels, tfds_builders


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        ValueError, match="Received: 'cifar11'. Did you mean .*cifar10.*photo_patches"
    ):
        datasets.load("cifar11")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("cifar-10", "cifar10"), ("CIFAR10", "cifar10"), ("Fashion MNIST", "fashion_mnist")],
)
def test_names_as_people_write_them_get_a_suggestion(name, suggestion):
    with pytest.raises(ValueError, match=f"Received: '{name}'.*Did you mean .*{suggestion}"):
        datasets.load(name)


class Photos(tfds.core.GeneratorBasedBuilder):
    """Grey images of one size."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "validation": self._generate_examples(4)}

    def _generate_examples(self, count):
        for i in range(count):
            image = np.full((8, 8, 1), i, np.uint8)
            yield i, {"id": str(i), "image": image, "label": i % 2}


def test_tfds_name_of_small_images_is_held_in_memory(tmp_path):
    train, test = datasets.load("photos", data_dir=str(tmp_path))
    assert isinstance(train, datasets.ArrayDataset) and train.images.shape == (10, 8, 8, 3)
    np.testing.assert_array_equal(train.labels, train.images[:, 0, 0, 2] % 2)
    assert train.class_names == ("even", "odd")
    assert len(test) == 4 and test.name == "photos/validation"


def test_tfds_split_of_large_images_is_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "LARGEST_ARRAY_BYTES", 0)
    train, _ = datasets.load("photos", train_split="train[2:7]", data_dir=str(tmp_path))
    assert isinstance(train, datasets.RecordDataset)
    assert len(train) == 5 and datasets.is_labelled(train)


class WithoutLabels(Photos):
    """As TFDS has them: labels of -1."""

    def _generate_examples(self, count):
        for i, (key, example) in enumerate(super()._generate_examples(count)):
            yield key, example | {"label": -1, "image": np.full((8, 8, 1), i, np.uint8)}


@pytest.mark.parametrize("limit", [0, 2**30])
def test_tfds_split_whose_labels_are_unknown_has_none(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(datasets, "LARGEST_ARRAY_BYTES", limit)
    train, _ = datasets.load("without_labels", data_dir=str(tmp_path))
    assert len(train) == 10 and not datasets.is_labelled(train)


def test_unknown_tfds_split_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="photos has the splits train, validation.*'dev'"):
        datasets.load("photos", train_split="dev", data_dir=str(tmp_path))


class Unreachable(Photos):
    """A dataset whose download fails."""

    def _split_generators(self, dl_manager):
        raise ConnectionError("no route to host")


def test_tfds_name_that_cannot_be_prepared_says_how_to(tmp_path):
    message = "not prepared in .*ConnectionError: no route.*tfds build unreachable.*--data_dir"
    with pytest.raises(FileNotFoundError, match=message):
        datasets.load("unreachable", data_dir=str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(
    not tfds_builders.DEBIAN_FASHION_MNIST.is_dir(),
    reason="needs Debian's package: apt-get install dataset-fashion-mnist",
)
def test_fashion_mnist_is_prepared_from_debians_package(tmp_path):
    train, test = datasets.load("fashion_mnist", data_dir=str(tmp_path))
    assert train.images.shape == (60_000, 28, 28, 3) and len(test) == 10_000
    assert train.class_names[9] == "Ankle boot"
    np.testing.assert_array_equal(np.bincount(test.labels), np.full(10, 1000))
    # What was prepared is the official data set: TFDS itself reads it.
    official = tfds.load("fashion_mnist", split="test", data_dir=str(tmp_path), download=False)
    first = next(iter(official.as_numpy_iterator()))
    np.testing.assert_array_equal(first["image"][..., 0], test.images[0, ..., 1])


def test_originals_are_the_images_of_every_kind_of_dataset(tmp_path, monkeypatch):
    """A file turned by its EXIF orientation, an array, and a record of a stream."""
    turned = np.zeros((4, 6, 3), np.uint8)
    turned[:, :3] = 250
    exif = Image.Exif()
    exif[0x0112] = 6  # Upright after a quarter turn to the right: light is on top.
    Image.fromarray(turned).save(tmp_path / "turned.png", exif=exif)
    files = datasets.FileDataset(
        "files", (str(tmp_path / "turned.png"), str(tmp_path / "gone.png"))
    )
    image = originals.open_original(files, 0)
    assert image.size == (4, 6) and image.getpixel((1, 0)) == (250,) * 3
    assert image.getpixel((1, 5)) == (0,) * 3
    with pytest.raises(pixels.UnreadableImage, match="no such file"):
        originals.open_original(files, 1)
    grey = datasets.ArrayDataset("grey", np.full((2, 3, 5, 1), 7, np.uint8))
    assert originals.open_original(grey, 1).size == (5, 3)
    assert originals.open_original(grey, 1).getpixel((4, 2)) == (7, 7, 7)
    held, _ = datasets.load("photos", data_dir=str(tmp_path))
    monkeypatch.setattr(datasets, "LARGEST_ARRAY_BYTES", 0)
    stream, _ = datasets.load("photos", data_dir=str(tmp_path))
    for row in (0, len(stream) - 1):
        found = np.asarray(originals.open_original(stream, row))
        np.testing.assert_array_equal(found, held.images[row])
