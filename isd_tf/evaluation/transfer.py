"""Transfer: linear classifiers on frozen features of other datasets.

Features are those of centre-cropped images, normalised and standardised as in `linear`. The
strength of L2 is chosen on a validation split, the dataset's own or a fifth of each class; then the
classifier is fitted to both and scored once on the test split.

Source: paper table 2, which does not publish its grid; this one is that of Kornblith et al., CVPR
2019, and BYOL's appendix D: L-BFGS, 45 values from 1e-6 to 1e5 by equal ratios.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from isd_tf.data import datasets, subsets
from isd_tf.data.datasets import Dataset
from isd_tf.evaluation import linear
from isd_tf.evaluation.features import Features

L2_VALUES = tuple(float(value) for value in np.logspace(-6, 5, 45))

METRICS = {
    "top1": lambda classifiers, features: linear.top_k_accuracy(classifiers, features, 1),
    "mean_per_class": linear.mean_per_class_accuracy,
}


class Task(NamedTuple):
    """A dataset to transfer to."""

    source: str  # as `datasets.load` names it
    metric: str = "top1"
    test_split: str | None = None  # None: test, or what `datasets.load` takes
    validation_split: str | None = None  # None: held out of the training split


# The paper's nine. TFDS calls Food101's test images validation.
PAPER_TASKS = {
    "food101": Task("food101", test_split="validation"),
    "cifar10": Task("cifar10"),
    "cifar100": Task("cifar100"),
    "sun397": Task("sun397/standard-part1-120k"),
    "cars196": Task("cars196"),
    "dtd": Task("dtd", validation_split="validation"),
    "pets": Task("oxford_iiit_pet", "mean_per_class"),
    "caltech101": Task("caltech101", "mean_per_class"),
    "flowers102": Task("oxford_flowers102", "mean_per_class", validation_split="validation"),
}


class Splits(NamedTuple):
    """What a task is fitted to, chosen by, and scored on."""

    training: Dataset
    validation: Dataset
    test: Dataset


def task_of(name: str) -> Task:
    """Returns the task of a name: one of PAPER_TASKS or its TFDS name, another, or folder:PATH."""
    by_source = {task.source: task for task in PAPER_TASKS.values()}
    return PAPER_TASKS.get(name) or by_source.get(name) or Task(name)


def score_name(name: str) -> str:
    """What a task is called in the names of scores: letters, digits and underscores."""
    return re.sub(r"\W+", "_", name)


def load(task: Task, data_dir: str | None, seed: int) -> Splits:
    """Opens a task's splits.

    Args:
        task: what to open.
        data_dir: TFDS' folder; a folder:PATH has its own.
        seed: of the validation split, where the dataset has none.

    Raises:
        ValueError: for a dataset without labels or test images, or an unknown name.
        FileNotFoundError: for one that is not there and cannot be prepared.
    """
    name, _, folder = task.source.partition("folder:")
    name, place = ("folder", folder) if folder else (name, data_dir)
    train, test = datasets.load(name, "train", task.test_split, place)
    if test is None:
        raise ValueError(f"{train.name} has no test images to score.")
    if task.validation_split:
        _, validation = datasets.load(name, "train", task.validation_split, place)
        return Splits(train, validation, test)
    rows = subsets.hold_out(subsets.labels_of(train), linear.HELD_OUT_SHARE, seed)
    return Splits(*subsets.divide(train, *rows), test)


class Score(NamedTuple):
    """What transfer to one dataset came to."""

    accuracy: float  # in [0, 1], on the test split
    l2: float  # the chosen one
    validation: dict[float, float]  # accuracy on the validation split of every value


def evaluate(
    splits: Splits,
    features_of: Callable[[Dataset], Features],
    metric: str = "top1",
    l2_values: tuple[float, ...] = L2_VALUES,
) -> Score:
    """Chooses L2 on the validation split, fits to both splits, and scores on the test split.

    Args:
        splits: as `load` gives them.
        features_of: a split to its features.
        metric: of METRICS, for the choice and the score.
        l2_values: to choose from; of equally good ones the largest is taken.

    Raises:
        ValueError: for classes that are tested and have no training images.
    """
    training, validation = features_of(splits.training), features_of(splits.validation)
    accuracies = METRICS[metric](linear.fit(training, list(l2_values)), validation)
    best = max(range(len(l2_values)), key=lambda i: (accuracies[i], l2_values[i]))
    both = Features(
        np.concatenate([training.values, validation.values]),
        np.concatenate([training.labels, validation.labels]),
    )
    classifiers = linear.fit(both, [l2_values[best]])
    accuracy = METRICS[metric](classifiers, features_of(splits.test))
    tried = dict(zip(l2_values, map(float, accuracies), strict=True))
    return Score(float(accuracy[0]), l2_values[best], tried)
