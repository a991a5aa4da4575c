"""The images of a run: loaded, drawn, told from others; what they can be scored by; their steps."""

import json
from typing import NamedTuple

import numpy as np
import settings
import tensorflow as tf
from program import say
from settings import FLAGS

import isd_tf
from isd_tf.data import check, subsets
from isd_tf.data.datasets import ArrayDataset, Dataset, RecordDataset, is_labelled
from isd_tf.data.folders import shown
from isd_tf.training import cluster


class Data(NamedTuple):
    """The images of a run."""

    train: Dataset  # pretrained on
    bank: Dataset  # whose labels are known to the evaluation: the same, unless --unbalanced
    test: Dataset | None
    rare_labels: tuple[int, ...] = ()


def load(strategy: tf.distribute.Strategy) -> Data:
    """The images that the flags name, the same for all workers.

    Raises:
        ValueError, OSError: for images that cannot be found, or are others for another worker.
    """
    # The chief first: what TFDS prepares on a shared disk, it prepares once.
    for turn in (True, False):
        with cluster.failing_together(strategy):
            if cluster.is_chief(strategy) == turn:
                train, test = load_splits()
                data = _unbalanced(train, test) or Data(train, train, test)
                if data.train is not train:
                    say(isd_tf.datasets.describe(data.train))
    cluster.require_same(strategy, {"images": json.dumps(fingerprint(data.train))})
    return data


def load_splits() -> tuple[Dataset, Dataset | None]:
    """The images to train on and to test with, as they are."""
    train, test = isd_tf.datasets.load(
        FLAGS.dataset, FLAGS.train_split, FLAGS.test_split, FLAGS.data_dir, FLAGS.image_list
    )
    for dataset in (train, test):
        if dataset:
            say(isd_tf.datasets.describe(dataset))
    return train, test


def _unbalanced(train, test):
    if not FLAGS.unbalanced:
        return None
    if numbers := settings.unbalanced_numbers():
        return Data(*subsets.unbalance(train, test, *numbers, FLAGS.unbalanced_seed))
    return Data(*subsets.unbalance_by_list(train, test, FLAGS.unbalanced))


def fingerprint(train: Dataset | None) -> dict:
    """What tells these images from others."""
    return {"images": len(train), "digest": isd_tf.datasets.fingerprint(train)} if train else {}


def steps_per_epoch(train: Dataset | None) -> int:
    """How many batches an epoch fills; 1 where there are no images."""
    return len(train) // FLAGS.batch_size if train else 1


def all_steps(train: Dataset | None) -> int:
    """How many the whole training has."""
    return FLAGS.epochs * steps_per_epoch(train)


def asked_images(data: Data) -> Dataset:
    """The images that `neighbors` takes its queries from."""
    return data.test or data.bank


def reason_not_to_score(data: Data) -> str | None:
    """Why labels of the test images cannot be predicted from others, or None."""
    for split in (data.bank, data.test):
        if split and not is_labelled(split):
            return f"{split.name} has no labels."
    if data.test is None:
        return f"{data.train.name} has no test split. Name one by --test_split."
    if has_one_class(data.bank):
        return f"{data.bank.name} has one class: there is nothing to tell apart."
    if not any(isinstance(split, RecordDataset) for split in (data.bank, data.test)):
        missing = np.setdiff1d(data.test.labels, data.bank.labels)
        if len(missing):
            names = data.test.class_names or range(data.test.labels.max() + 1)
            return (
                f"{len(missing)} classes of {data.test.name} have no images in {data.bank.name}, "
                f"{shown(str(names[missing[0]]))} first."
            )
    return None


def has_one_class(dataset: Dataset) -> bool:
    """Whether all of a labelled dataset's images are of one class."""
    if isinstance(dataset, RecordDataset):
        return len(dataset.class_names) == 1
    return len(np.unique(dataset.labels)) == 1


def shared_images(prefix: str, parts_of_train: list[Dataset], test: Dataset) -> dict[str, int]:
    """Tells which test images are training images too; returns how many, if that is known."""
    found = [_say_shared_images(train, test) for train in parts_of_train]
    return {} if None in found else {f"{prefix}test_images_in_train": sum(found)}


def _say_shared_images(train, test):
    pairs = check.shared_images(train, test)
    if pairs is None:
        say(
            f"Not compared: whether images of {test.name} are also in {train.name}, which takes "
            "reading all of both. --stages=check does."
        )
        return None
    if pairs:
        rows = [row for _, row in pairs[:3]]
        is_array = isinstance(test, ArrayDataset)
        names = [f"image {r}" for r in rows] if is_array else isd_tf.datasets.names_of(test, rows)
        say(
            f"{len(pairs)} of the {len(test)} images of {test.name} are also in {train.name}, so "
            f"that scores are too high: {', '.join(map(shown, names))}"
            f"{', ...' * (len(pairs) > len(names))}"
        )
    return len(pairs)
