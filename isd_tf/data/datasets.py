"""Where images come from: TFDS, a folder, a list of files, or the embedded photo_patches.

A dataset here is what the input pipeline needs to know and no more: how many images there are, how
to reach them, and their labels if they have any. Order, decoding and views are not its concern.
"""

import dataclasses
import hashlib
import os
import pathlib
import unicodedata
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf
from absl import logging

from isd_tf.data import folders, lists, photo_patches, pixels, tfds_builders
from isd_tf.data.folders import shown

if TYPE_CHECKING:
    # It takes seconds to import, and is imported where one of its datasets is asked for.
    import tensorflow_datasets as tfds

# TFDS splits of one image size that decode to less than this are held in memory.
LARGEST_ARRAY_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class ArrayDataset:
    """Images of one size in memory.

    Attributes:
        name: for messages, printable.
        images: uint8 [N, H, W, 3].
        labels: int64 [N], or None.
        class_names: of the labels.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self):
        return len(self.images)


@dataclasses.dataclass(frozen=True)
class FileDataset:
    """Image files of any size; attributes as in `ArrayDataset`, `paths` for images.

    Attributes:
        left_out: paths of files beside them that are not read, as their names are no images'.
        whole: images that the limit of unreadable ones is a share of; None: these. A part that is
            held out has few, of which one may already be too many.
    """

    name: str
    paths: tuple[str, ...]
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    whole: int | None = None

    def __len__(self):
        return len(self.paths)


@dataclasses.dataclass(frozen=True)
class RecordDataset:
    """A TFDS split in TFRecord files, read as a stream.

    Attributes:
        name: for messages.
        files, skips, takes: for each shard its path, and which of its records belong.
        features: TFDS' description of what is wanted of a record.
        image_key, label_key: features of a record; label_key may be None.
        class_names: of the labels.
        kept: bool, for each record of all shards in turn whether it belongs; None: all do.
        new_labels: int64, what each stored label is called here; None: the same.
        whole: as in `FileDataset`.
    """

    name: str
    files: tuple[str, ...]
    skips: tuple[int, ...]
    takes: tuple[int, ...]
    features: "tfds.features.FeaturesDict"
    image_key: str
    label_key: str | None
    class_names: tuple[str, ...] = ()
    kept: np.ndarray | None = None
    new_labels: np.ndarray | None = None
    whole: int | None = None

    def __len__(self):
        return sum(self.takes) if self.kept is None else int(self.kept.sum())

    @property
    def shards(self) -> tuple:
        """Of each shard what `read_shard` takes: path, records to skip, to take, and before it."""
        counts = (self.skips, self.takes, np.cumsum((0, *self.takes[:-1])))
        return np.array(self.files), *(np.array(values, np.int64) for values in counts)

    @property
    def records(self) -> tf.data.Dataset:
        """All of them in order, as `read_shard` gives them."""
        return untuned(tf.data.Dataset.from_tensor_slices(self.shards).flat_map(self.read_shard))

    def read_shard(self, file, skip, take, before) -> tf.data.Dataset:
        """The records of a shard that belong to the dataset: (file, index in it, record)."""
        records = tf.data.TFRecordDataset(file).enumerate().skip(skip).take(take)
        if self.kept is not None:
            kept = tf.constant(self.kept)
            records = records.filter(lambda index, record: kept[before + index - skip])
        return records.map(lambda index, record: (file, index, record))

    def parse(self, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the encoded image and the label (-1 if there is none) of a record."""
        import tensorflow_datasets as tfds

        decoders = {self.image_key: tfds.decode.SkipDecoding()}
        example = self.features.deserialize_example(record, decoders=decoders)
        label = tf.cast(example[self.label_key] if self.label_key else -1, tf.int64)
        if self.new_labels is not None:
            label = tf.gather(tf.constant(self.new_labels), label)
        return example[self.image_key], label


Dataset = ArrayDataset | FileDataset | RecordDataset


def untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the same dataset without TensorFlow's tuner.

    Its thread sleeps ever longer, up to a minute, and at times an iterator's end waits for it.
    (What a strategy puts between a dataset and several devices has a tuner of its own.)
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def is_labelled(dataset: Dataset) -> bool:
    """Whether the images have labels."""
    if isinstance(dataset, RecordDataset):
        return dataset.label_key is not None
    return dataset.labels is not None


def load(
    name: str,
    train_split: str = "train",
    test_split: str | None = None,
    data_dir: str | None = None,
    image_list: str | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Opens the training images and, where there are some, the test images.

    Args:
        name: "photo_patches", "folder", "list", or a TFDS name such as "cifar10".
        train_split: TFDS split or subfolder to pretrain on.
        test_split: the same for testing; None takes the first of test, validation and val that
            exists, or none.
        data_dir: the folder of "folder"; what the paths of "list" are relative to (by default the
            list's own folder); TFDS' data_dir (by default its own).
        image_list: the file of "list".

    Returns:
        Training and test dataset; the test dataset is None where the source has none.

    Raises:
        ValueError: for an unknown name or split, or a source without images.
        FileNotFoundError: for a folder, list or listed file that is missing.
    """
    if name == "photo_patches":
        return tuple(
            ArrayDataset(
                f"photo_patches/{split}",
                *photo_patches.make_patches(split),
                photo_patches.CLASS_NAMES,
            )
            for split in (train_split, test_split or "test")
        )
    if name == "folder":
        return _load_folder(data_dir, train_split, test_split)
    if name == "list":
        return _load_list(image_list, data_dir), None
    return _load_tfds(name, train_split, test_split, data_dir)


def load_collection(images: str, split: str = "train", data_dir: str | None = None) -> Dataset:
    """Opens images that are no training or test part of anything.

    Args:
        images: a folder, of which all images are taken, whose subfolders are the classes if no
            image lies beside them; a list's path; or tfds:NAME, NAME as `load` takes it.
        split: of tfds:NAME.
        data_dir: as in `load`, of a list or tfds:NAME.

    Raises:
        FileNotFoundError, ValueError: as `load`; and for a folder that holds such parts.
    """
    if images.startswith("tfds:"):
        return load(images.removeprefix("tfds:"), split, data_dir=data_dir)[0]
    if os.path.isfile(images):
        with open(images, "rb") as file:
            if pixels.kind_of_beginning(file.read(pixels.BEGINNING)):
                raise ValueError(
                    f"Images must be a folder, a list in a file, or tfds:NAME. Received: "
                    f"{shown(images)}, which is an image. Write its path into a list."
                )
        return load("list", image_list=images, data_dir=data_dir)[0]
    if not os.path.isdir(images):
        raise FileNotFoundError(
            "Images must be a folder, a list in a file, or tfds:NAME. Received: "
            f"{shown(images)}, which does not exist."
        )
    found = folders.scan(images, labelled=True)
    parts = set(folders.parts_among(set(found.classes or ())))
    if parts and parts == set(found.classes):
        names = sorted(parts)
        raise ValueError(
            f"{shown(images)} holds parts of a dataset: {', '.join(map(shown, names))}. Name one "
            f"of them, such as {shown(os.path.join(images, names[0]))}."
        )
    return _open_folder(images, found)


def names_of(dataset: Dataset, rows: Sequence[int]) -> list[str]:
    """Returns what each of some images is called: its path, or its place in what holds it."""
    if isinstance(dataset, FileDataset):
        return [dataset.paths[row] for row in rows]
    if isinstance(dataset, ArrayDataset):
        return [f"{dataset.name}, image {row}" for row in rows]
    places = np.arange(sum(dataset.takes))
    if dataset.kept is not None:
        places = np.flatnonzero(dataset.kept)
    places = places[rows]
    ends = np.cumsum(dataset.takes)
    shards = np.searchsorted(ends, places, side="right")
    indices = places - (ends - dataset.takes)[shards] + np.array(dataset.skips)[shards]
    # As `readers` names the records that it cannot read.
    return [
        f"{dataset.files[shard]}, record {index}"
        for shard, index in zip(shards, indices, strict=True)
    ]


def describe(dataset: Dataset) -> str:
    """Says in a line or two which images a dataset has, of which classes, and what is left out."""
    text = f"{dataset.name}: {len(dataset)} images"
    if not is_labelled(dataset):
        text += " without labels"
    elif isinstance(dataset, RecordDataset):
        text += f" of {len(dataset.class_names)} classes"
    else:
        count = max(len(dataset.class_names), int(dataset.labels.max(initial=-1)) + 1)
        sizes = np.bincount(dataset.labels, minlength=count)
        names = dataset.class_names or [f"class {label}" for label in range(count)]
        smallest, largest = int(sizes.argmin()), int(sizes.argmax())
        if count == 1:
            text += f" of one class, {shown(names[0])}: there is nothing to tell apart"
        elif sizes[smallest] == sizes[largest]:
            text += f" of {count} classes, {sizes[0]} of each"
        else:
            text += (
                f" of {count} classes, from {shown(names[smallest])} with {sizes[smallest]} to "
                f"{shown(names[largest])} with {sizes[largest]}"
            )
    if isinstance(dataset, FileDataset) and dataset.left_out:
        total, kinds = folders.count_by_suffix(dataset.left_out).split(": ", 1)
        text += f". {total} not read: {kinds}"
    return text + "."


def fingerprint(dataset: Dataset) -> str:
    """Returns a digest of which images a dataset holds in which order, wherever they are stored.

    Of files it takes names and labels, of TFDS records shards and counts, of arrays all values.
    """
    digest = hashlib.sha256()
    if isinstance(dataset, ArrayDataset):
        digest.update(dataset.images.tobytes())
    elif isinstance(dataset, FileDataset):
        root = os.path.commonpath([os.path.dirname(path) for path in dataset.paths])
        digest.update(b"\0".join(os.fsencode(os.path.relpath(p, root)) for p in dataset.paths))
    else:
        shards = [os.path.basename(file) for file in dataset.files]
        digest.update(repr((shards, dataset.skips, dataset.takes)).encode())
        for part in (dataset.kept, dataset.new_labels):
            digest.update(b"" if part is None else part.tobytes())
    if not isinstance(dataset, RecordDataset) and dataset.labels is not None:
        digest.update(dataset.labels.tobytes())
    return digest.hexdigest()[:16]


def image_digests(dataset: Dataset) -> np.ndarray:
    """Returns uint32 [N], of each image what `fingerprint` digests: to find one that is another."""
    if isinstance(dataset, ArrayDataset):
        contents = (image.tobytes() for image in dataset.images)
    elif isinstance(dataset, FileDataset):
        root = os.path.commonpath([os.path.dirname(path) for path in dataset.paths])
        contents = (os.fsencode(os.path.relpath(path, root)) for path in dataset.paths)
    else:
        names = names_of(dataset, np.arange(len(dataset)))
        contents = (os.fsencode(os.path.basename(name)) for name in names)
    digests = np.fromiter(map(zlib.crc32, contents), np.uint32, len(dataset))
    if not isinstance(dataset, RecordDataset) and dataset.labels is not None:
        digests ^= dataset.labels.astype(np.uint32)
    return digests


# ------------------------------------------------------------------------------------- files


def _load_folder(data_dir, train_split, test_split):
    if not data_dir:
        raise ValueError("--dataset=folder needs the folder's path. Pass --data_dir=PATH.")
    root = str(pathlib.Path(data_dir))
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f"The image folder does not exist. Received: --data_dir={shown(data_dir)}. "
            "Expected a folder with train/<class>/ inside, or with images at any depth."
        )
    train_split, test_split = folders.find_splits(root, train_split, test_split)
    if train_split is None:
        logging.warning(
            "%s has no subfolder train: all images below it are taken as unlabelled. For labels "
            "give a folder that holds train/<class>/ and val/<class>/.",
            shown(root),
        )
        return _open_folder(root, folders.scan(root, labelled=False)), None
    train_root = os.path.join(root, train_split)
    train = _open_folder(train_root, folders.scan(train_root, labelled=True))
    if test_split is None:
        return train, None
    test_root = os.path.join(root, test_split)
    test = folders.scan(test_root, labelled=True)
    if train.labels is None:
        # Whatever the folders of the test images are, there are no classes to call them by.
        test = test._replace(classes=None)
    return train, _open_folder(test_root, test, train.class_names)


def _open_folder(folder, found, class_names=None):
    if found.classes is None:
        return FileDataset(shown(folder), found.paths, left_out=found.left_out)
    names = class_names or tuple(sorted(set(found.classes)))
    unknown = sorted(set(found.classes) - set(names))
    if unknown:
        raise ValueError(
            f"Every class of {shown(folder)} needs training images. Received classes without: "
            f"{', '.join(map(shown, unknown[:5]))}. The training folder has {len(names)} classes, "
            f"for example {', '.join(map(shown, names[:3]))}.{_explain_unknown(unknown, names)}"
        )
    places = {name: place for place, name in enumerate(names)}
    labels = np.array([places[name] for name in found.classes], np.int64)
    return FileDataset(shown(folder), found.paths, labels, names, found.left_out)


def _explain_unknown(unknown, names):
    """What to do about test classes without training images."""

    def letters(name):
        return unicodedata.normalize("NFC", name).casefold()

    same = {letters(name): name for name in names}
    for name in unknown:
        if other := same.get(letters(name)):
            how = "in how letters are stored, as é can be one character or two"
            if unicodedata.normalize("NFC", name) != unicodedata.normalize("NFC", other):
                how = "in capitals"
            return f" {shown(name)} differs from {shown(other)} only {how}: rename one of them."
    return (
        " If the folders are no classes but dates, say, pass the training folder itself as "
        "--data_dir: its images are then taken as unlabelled, and nothing is scored."
    )


def _load_list(image_list, data_dir):
    if not image_list:
        raise ValueError("--dataset=list needs a file. Pass --image_list=PATH.")
    entries, class_names = lists.read_list(image_list)
    root = data_dir or os.path.dirname(os.path.abspath(image_list))
    paths = [os.path.join(root, entry.path) for entry in entries]
    missing = [entries[row] for row, path in enumerate(paths) if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(
            f"{shown(image_list)} names {len(missing)} files that do not exist, of {len(paths)}; "
            f"the first, in line {missing[0].line}, is {shown(missing[0].path)}. Paths are "
            f"relative to {shown(root)}: correct the list or --data_dir."
            f"{lists.explain_missing(missing, root)}"
        )
    labels = None
    if class_names:
        places = {name: place for place, name in enumerate(class_names)}
        labels = np.array([places[entry.class_name] for entry in entries], np.int64)
    return FileDataset(shown(image_list), tuple(paths), labels, class_names)


# -------------------------------------------------------------------------------------- TFDS


def _load_tfds(name, train_split, test_split, data_dir):
    builder = tfds_builders.prepared_builder(name, data_dir, ("photo_patches", "folder", "list"))
    splits = list(builder.info.splits)
    if test_split is None:
        found = [split for split in ("test", "validation", "val") if split in splits]
        # A test split without labels (ImageNet's) can only be predicted, not scored.
        test_split = "validation" if name.startswith("imagenet2012") else (found or [None])[0]
    datasets = []
    for split in (train_split, test_split):
        try:
            datasets.append(_open_split(builder, split) if split else None)
        except (KeyError, ValueError) as error:
            if split.split("[")[0] in splits:
                raise
            raise ValueError(
                f"{name} has the splits {', '.join(splits)}. Received: {split!r}."
            ) from error
    return tuple(datasets)


def _open_split(builder, split):
    import tensorflow_datasets as tfds

    features = builder.info.features
    image_key = next((k for k, f in features.items() if isinstance(f, tfds.features.Image)), None)
    if image_key is None:
        raise ValueError(
            f"{builder.name} holds no images. Its features are: {', '.join(features)}."
        )
    labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    supervised = builder.info.supervised_keys or (None, None)
    label_key = supervised[1] if supervised[1] in labels else (labels or [None])[0]
    class_names = tuple(features[label_key].names) if label_key else ()

    name = f"{builder.name}/{split}"
    shape = features[image_key].shape
    count = builder.info.splits[split].num_examples
    if None not in shape and count * shape[0] * shape[1] * 3 <= LARGEST_ARRAY_BYTES:
        return _read_into_memory(builder, split, name, image_key, label_key, class_names)

    shards = builder.info.splits[split].file_instructions
    if not all(".tfrecord" in shard.filename for shard in shards):
        raise ValueError(
            f"{name} is not stored as TFRecord files but as {shards[0].filename}. Prepare it "
            "again with TFDS' default file format."
        )
    takes = tuple(
        shard.take if shard.take >= 0 else shard.examples_in_shard - shard.skip for shard in shards
    )
    dataset = RecordDataset(
        name,
        tuple(str(shard.filename) for shard in shards),
        tuple(shard.skip for shard in shards),
        takes,
        tfds.features.FeaturesDict({k: features[k] for k in (image_key, label_key) if k}),
        image_key,
        label_key,
        class_names,
    )
    first = next(iter(tf.data.TFRecordDataset(dataset.files[0])))
    if label_key and int(dataset.parse(first)[1]) < 0:
        # TFDS marks the unknown labels of a whole split by -1.
        return dataclasses.replace(dataset, label_key=None, class_names=())
    return dataset


def _read_into_memory(builder, split, name, image_key, label_key, class_names):
    import tensorflow_datasets as tfds

    examples = tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))
    images, labels = [], []
    for example in examples:
        images.append(example[image_key])
        labels.append(example[label_key] if label_key else -1)
    images = np.stack(images)
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    labels = np.array(labels, np.int64)
    # TFDS marks the unknown labels of a whole split by -1.
    return ArrayDataset(name, images, None if (labels < 0).any() else labels, class_names)
