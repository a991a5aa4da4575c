"""Parts of a labelled dataset: few labels, a validation split, and the paper's unbalanced study."""

import dataclasses
import os
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from isd_tf.data import datasets, lists
from isd_tf.data.datasets import ArrayDataset, Dataset, FileDataset, RecordDataset
from isd_tf.data.folders import shown

# The lists of the paper's unbalanced study name so many large classes first.
LISTED_LARGE_CLASSES = 8


def labels_of(dataset: Dataset) -> np.ndarray:
    """Returns all labels, int64 [N]. Of TFRecord files every record is read, and none decoded.

    Raises:
        ValueError: when there are none.
    """
    if not datasets.is_labelled(dataset):
        raise ValueError(f"{dataset.name} has no labels. Labelled images are needed here.")
    if not isinstance(dataset, RecordDataset):
        return dataset.labels
    labels = dataset.records.map(
        lambda file, index, record: dataset.parse(record)[1], tf.data.AUTOTUNE
    )
    return np.fromiter(labels.as_numpy_iterator(), np.int64)


def take(dataset: Dataset, rows: np.ndarray, what: str) -> Dataset:
    """Returns the images at `rows` (integers), in the dataset's own order; `what` they are."""
    rows, name = np.sort(rows), f"{dataset.name} ({what})"
    if isinstance(dataset, RecordDataset):
        everything = np.ones(sum(dataset.takes), bool) if dataset.kept is None else dataset.kept
        kept = np.zeros_like(everything)
        kept[np.flatnonzero(everything)[rows]] = True
        of_shards = np.split(kept, np.cumsum(dataset.takes)[:-1])
        shards = zip(dataset.files, dataset.skips, dataset.takes, of_shards, strict=True)
        # Whoever wants few images need not read all shards.
        files, skips, takes, kept = zip(*(x for x in shards if x[3].any()), strict=True)
        return dataclasses.replace(
            dataset, name=name, files=files, skips=skips, takes=takes, kept=np.concatenate(kept)
        )
    labels = None if dataset.labels is None else dataset.labels[rows]
    if isinstance(dataset, ArrayDataset):
        return dataclasses.replace(dataset, name=name, images=dataset.images[rows], labels=labels)
    paths = tuple(dataset.paths[row] for row in rows)
    return dataclasses.replace(dataset, name=name, paths=paths, labels=labels)


def divide(
    dataset: Dataset, fit_rows: np.ndarray, held_out_rows: np.ndarray
) -> tuple[Dataset, Dataset]:
    """Returns the images to fit on and those held out, as `hold_out` has drawn them.

    What they may hold of unreadable images together is not asked of each.
    """
    parts = take(dataset, fit_rows, "to fit on"), take(dataset, held_out_rows, "held out")
    if isinstance(dataset, ArrayDataset):
        return parts
    whole = dataset.whole or len(dataset)
    return tuple(dataclasses.replace(part, whole=whole) for part in parts)


def rows_of_fraction(dataset: Dataset, fraction: float, seed: int) -> np.ndarray:
    """Draws the same share of every class, at least of those that have images.

    Args:
        dataset: labelled.
        fraction: in (0, 1].
        seed: of the draw.

    Returns:
        Rows, sorted.

    Raises:
        ValueError: when no image of some class would be left.
    """
    labels = labels_of(dataset)
    random = np.random.RandomState(seed)
    rows = []
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        # Halves are rounded up.
        wanted = int(np.floor(fraction * count + 0.5))
        if wanted == 0:
            raise ValueError(
                f"Every class needs a labelled image. Received: {fraction:g} of the {count} images "
                f"of {shown(_class_name(dataset, label))} in {dataset.name}, which is none. Use at "
                f"least {_smallest_fraction(labels):g}, which leaves one also to choose by."
            )
        rows.append(random.permutation(np.flatnonzero(labels == label))[:wanted])
    return np.sort(np.concatenate(rows))


def _smallest_fraction(labels):
    """That leaves every class an image, and some class two if it has them, to hold one out.

    Rounded up to two digits.
    """
    counts = np.unique(labels, return_counts=True)[1]
    least = max(0.5 / counts.min(), min(1.5 / counts.max(), 1.0))
    scale = 10.0 ** (1 - np.floor(np.log10(least)))
    return np.ceil(least * scale - 1e-9) / scale


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows, class by class: what to fit on, and what to choose hyper-parameters by.

    Args:
        labels: int64 [N].
        share: of each class that is held out; one example at least is not.
        seed: of the draw.

    Returns:
        Rows to fit on and rows held out, both sorted.

    Raises:
        ValueError: when every class has a single example, so that nothing could be held out.
    """
    random = np.random.RandomState(seed)
    fit, held_out = [], []
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        count = min(int(np.ceil(share * len(rows))), len(rows) - 1)
        held_out.append(rows[:count])
        fit.append(rows[count:])
    fit, held_out = (np.sort(np.concatenate(part)) for part in (fit, held_out))
    if not len(held_out):
        raise ValueError(
            "Choosing hyper-parameters needs a class with two labelled examples. Received: one of "
            f"each of {len(fit)} classes. Use more labels, such as a --label_fraction that leaves "
            "a class two, or name a single --linear_learning_rates and --linear_weight_decays."
        )
    return fit, held_out


# -------------------------------------------------------------------------------- unbalanced


class Unbalanced(NamedTuple):
    """The datasets of the unbalanced study, labelled alike: large classes first, then rare ones.

    Source: paper section 4 and table 5.
    """

    pretraining: Dataset  # every image of the large classes, few of the rare ones
    bank: Dataset  # every training image of these classes, so balanced as they are
    queries: Dataset | None  # their test images
    rare_labels: tuple[int, ...]


def unbalance(
    train: Dataset, test: Dataset | None, large: int, rare: int, images: int, seed: int
) -> Unbalanced:
    """Draws large and rare classes; of the latter only some images are pretrained on.

    Args:
        train, test: labelled alike.
        large, rare: numbers of classes; the paper's are 8 and 30.
        images: of each rare class; the paper's are 100.
        seed: of classes and images; the paper draws ten times.

    Raises:
        ValueError: when there are not as many classes, or images in a rare class.
    """
    labels = labels_of(train)
    present = np.unique(labels)
    if large < 1 or rare < 1 or images < 1 or large + rare > len(present):
        raise ValueError(
            "An unbalanced draw needs a large and a rare class, an image of each, and no more "
            f"classes than there are. Received: large={large}, rare={rare}, images={images} for "
            f"the {len(present)} classes of {train.name}."
        )
    random = np.random.RandomState(seed)
    classes = random.permutation(present)[: large + rare]
    rows = [np.flatnonzero(np.isin(labels, classes[:large]))]
    for label in classes[large:]:
        own = np.flatnonzero(labels == label)
        if len(own) < images:
            raise ValueError(
                f"A rare class needs {images} training images. Received: {len(own)} of "
                f"{shown(_class_name(train, label))} in {train.name}. Ask for fewer."
            )
        rows.append(random.permutation(own)[:images])
    return _restrict(train, test, labels, classes, np.concatenate(rows), large)


def unbalance_by_list(train: Dataset, test: Dataset | None, image_list: str) -> Unbalanced:
    """Takes classes and images from a list of the paper's study (`D1.txt` to `D10.txt`).

    Args:
        train: a folder's images, whose classes have the names that the list gives.
        test: labelled alike.
        image_list: the file: "class names : ", the names, large ones first, "Train Images: ", and
            "/train/<class>/<file>" a line.

    Raises:
        FileNotFoundError: for a missing list.
        ValueError: for another file, and for classes or images that the folder has not.
    """
    entries, names = lists.read_list(image_list)
    if not isinstance(train, FileDataset) or train.labels is None:
        raise ValueError(
            f"{shown(image_list)} names files by class. Received: {train.name}, which is no folder "
            "of classes. Use --dataset=folder --data_dir=PATH."
        )
    unknown = [name for name in names if name not in train.class_names]
    if unknown or len(names) <= LISTED_LARGE_CLASSES:
        such_as = (
            f", {len(unknown)} without a folder, such as {shown(unknown[0])}" if unknown else ""
        )
        raise ValueError(
            f"{shown(image_list)} must name {LISTED_LARGE_CLASSES} large classes and then rare "
            f"ones, all with a folder in {train.name}. Received: {len(names)} classes{such_as}."
        )
    places = {tuple(path.split(os.sep)[-2:]): row for row, path in enumerate(train.paths)}
    wanted = [tuple(entry.path.split("/")[-2:]) for entry in entries]
    missing = [entry for entry, place in zip(entries, wanted, strict=True) if place not in places]
    if missing:
        raise ValueError(
            f"{shown(image_list)} lists {len(missing)} images, of {len(entries)}, that are not in "
            f"{train.name}, for example {shown(missing[0].path)} in line {missing[0].line}. "
            "Correct the list or --data_dir."
        )
    rows = np.array([places[place] for place in wanted])
    classes = np.array([train.class_names.index(name) for name in names])
    return _restrict(train, test, train.labels, classes, np.unique(rows), LISTED_LARGE_CLASSES)


def _restrict(train, test, labels, classes, pretraining_rows, large):
    def of_classes(dataset, labels, what):
        part = take(dataset, np.flatnonzero(np.isin(labels, classes)), what)
        return _relabel(part, classes)

    if test is not None:
        test = of_classes(test, labels_of(test), f"{len(classes)} classes")
    return Unbalanced(
        _relabel(take(train, pretraining_rows, "unbalanced"), classes),
        of_classes(train, labels, f"{len(classes)} classes"),
        test,
        tuple(range(large, len(classes))),
    )


def _relabel(dataset, classes):
    """Labels 0, 1, ... in the order of `classes`, instead of these."""
    new_labels = np.full(max(len(dataset.class_names), classes.max() + 1), -1, np.int64)
    new_labels[classes] = np.arange(len(classes))
    names = tuple(_class_name(dataset, label) for label in classes)
    if isinstance(dataset, RecordDataset):
        return dataclasses.replace(dataset, new_labels=new_labels, class_names=names)
    return dataclasses.replace(dataset, labels=new_labels[dataset.labels], class_names=names)


def _class_name(dataset, label):
    return dataset.class_names[label] if dataset.class_names else f"class {label}"
