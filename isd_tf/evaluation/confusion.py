"""What a classifier takes for what: confusion matrix, a table by class, and CSV files of both."""

import csv
import os
from collections.abc import Sequence

import numpy as np

from isd_tf.data.folders import shown


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Counts images: int64 [K, K], a row for each true class, a column for each predicted one.

    Args:
        labels: int [N], the true classes.
        predictions: int [N].
        classes: K.
    """
    counts = np.bincount(labels * classes + predictions, minlength=classes**2)
    return counts.reshape(classes, classes)


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """The table by class of a confusion matrix [K, K]: columns by name, each [K].

    Returns:
        "images" of the class; "recall", the share of these that is recognised; "precision", the
        share of the images taken for the class that are of it; "f1", their harmonic mean. NaN where
        there are no images to take a share of.
    """
    right, images, taken = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "images": images,
            "recall": right / images,
            "precision": right / taken,
            "f1": 2 * right / (images + taken),
        }


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of the images whose class is among the k highest of its row of logits [N, K]."""
    own = np.take_along_axis(logits, labels[:, np.newaxis], axis=1)
    # Of equal logits the lower class stands first.
    ahead = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
    return float((ahead.sum(axis=1) < k).mean())


def write_confusion_csv(
    confusion: np.ndarray, class_names: Sequence[str], path: str | os.PathLike
) -> None:
    """Writes a confusion matrix: true classes below each other, predicted ones side by side."""
    names = [shown(str(name)) for name in class_names]
    rows = ([name, *row] for name, row in zip(names, confusion.tolist(), strict=True))
    _write(path, [["true \\ predicted", *names], *rows])


def write_per_class_csv(
    confusion: np.ndarray, class_names: Sequence[str], path: str | os.PathLike
) -> None:
    """Writes the table by class; shares that do not exist stay empty."""
    table = per_class(confusion)
    columns = [
        ["" if np.isnan(value) else f"{value:.6g}" for value in values] for values in table.values()
    ]
    names = [shown(str(name)) for name in class_names]
    _write(path, [["class", *table], *zip(names, *columns, strict=True)])


def _write(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
