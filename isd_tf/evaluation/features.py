"""Features of frozen encoders: computed batch by batch, checked, and kept on disk if wanted."""

import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from isd_tf.data import datasets
from isd_tf.data.batches import numbered_batches
from isd_tf.data.datasets import ArrayDataset, Dataset, FileDataset
from isd_tf.data.decoding import Unreadable

BATCH = 256
# Examples that are joined before they are compared or written.
CHUNK = 4096

Encoder = Callable[[tf.Tensor], tf.Tensor]


class Features(NamedTuple):
    """What a frozen encoder makes of a dataset's evaluation views."""

    values: np.ndarray  # float32 [N, C]
    labels: np.ndarray  # int64 [N], -1 where unknown
    rows: np.ndarray | None = None  # int64 [N], which of the dataset's images these are of


def extract(
    encoder: keras.Model,
    dataset: Dataset,
    image_size: int,
    unreadable: Unreadable | None = None,
    cache: str | os.PathLike | None = None,
) -> Features:
    """Computes the features of all images of a dataset, or finds them where they were left.

    Args:
        encoder: normalised images [b, S, S, 3] to features [b, C]; called in inference mode.
        dataset: what to read.
        image_size: side S of the evaluation views in pixels.
        unreadable: counts images that cannot be read, which are left out.
        cache: a folder for features, or None. They are found again by the digest of the weights and
            of the images (of files: names, sizes, times, inodes and permissions), whatever folders
            are called.

    Raises:
        ValueError: for images of another size than the encoder takes, features that are not
            finite, or a dataset without images.
        OSError: when the cache cannot be written.
    """

    def compute():
        if not len(dataset):
            raise ValueError(f"There are no images in {dataset.name}.")
        batches = numbered_batches(dataset, image_size, BATCH, unreadable)
        known = ((views, np.stack([labels, rows], 1)) for rows, views, labels in batches)
        for values, labels_and_rows in in_chunks({encoder.name: encoder}, known, CHUNK):
            yield values[encoder.name], labels_and_rows

    if cache is None:
        values, known = (np.concatenate(parts) for parts in zip(*compute(), strict=True))
        return Features(values, *known.T)

    place = pathlib.Path(cache) / key(encoder, dataset, image_size)
    if not place.exists():
        unfinished = place.with_name(f"unfinished-{place.name}-{os.getpid()}")
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            known = []
            with open(unfinished / "values.float32", "wb") as file:
                for values, labels_and_rows in compute():
                    file.write(values.tobytes())
                    known.append(labels_and_rows)
            np.save(unfinished / "labels_and_rows.npy", np.concatenate(known))
            unfinished.rename(place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    labels, rows = np.load(place / "labels_and_rows.npy").T
    values = np.memmap(place / "values.float32", np.float32, mode="r")
    return Features(values.reshape(len(labels), -1), labels, rows)


def in_chunks(
    encoders: dict[str, Encoder], batches: Iterable, size: int
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Computes the features of several encoders in one pass, about `size` examples at a time.

    Args:
        encoders: by name, functions from images [b, S, S, 3] to features [b, C]. Keras models are
            called in inference mode.
        batches: pairs of images [b, S, S, 3] and labels [b], or whatever is known of each image.
        size: examples in a chunk, rounded up to whole batches.

    Yields:
        Features by name, float32 [c, C], and labels [c].

    Raises:
        ValueError: for images of another size than an encoder takes, or features that are not
            finite.
    """

    @tf.function(reduce_retracing=True)
    def embed(images):
        features = {}
        for name, encoder in encoders.items():
            is_network = isinstance(encoder, keras.Model)
            x = encoder(images, training=False) if is_network else encoder(images)
            features[name] = tf.cast(x, tf.float32)
        return features

    waiting, labels, count = [], [], 0
    for images, batch_labels in batches:
        _require_size(encoders, images)
        waiting.append(embed(images))
        labels.append(np.asarray(batch_labels))
        count += len(labels[-1])
        if count >= size:
            yield _joined(waiting), np.concatenate(labels)
            waiting, labels, count = [], [], 0
    if labels:
        yield _joined(waiting), np.concatenate(labels)


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Divides each row of [N, C] by its length; rows of zeros stay."""
    # By numpy: the features of a whole dataset need not fit on a GPU.
    lengths = np.sqrt(np.einsum("nc,nc->n", features, features))
    return features / np.maximum(lengths, 1e-12)[:, np.newaxis]


def require_labels(labels: np.ndarray, what: str) -> None:
    """Raises ValueError unless every example has a label."""
    if (labels < 0).any():
        raise ValueError(
            f"A score needs a label for every image of the {what}. Received {(labels < 0).sum()} "
            f"without, of {len(labels)}."
        )


def require_classes(labels: np.ndarray, known: np.ndarray, what: str) -> None:
    """Raises ValueError unless every class of `labels` is also in `known`, those of `what`.

    And where `known` are of one class, as there is nothing to tell apart.
    """
    missing = np.setdiff1d(labels, known)
    if len(missing):
        raise ValueError(
            f"Every class that is tested needs examples in the {what}. Received: none of "
            f"{len(missing)} classes, the label {missing[0]} first. Add some, or leave these "
            "classes out of the test images."
        )
    if len(np.unique(known)) < 2:
        raise ValueError(f"A score needs two classes in the {what}. Received: one. Add another.")


def key(encoder: keras.Model, dataset: Dataset, image_size: int) -> str:
    """Names features by all that they depend on: weights, images and their size.

    Of files, names, sizes, times, inodes and permissions stand for the images: a folder may be
    called otherwise, and another folder of equally called files is never taken for it.
    """
    digest = hashlib.sha256(f"labels and rows {datasets.fingerprint(dataset)}".encode())
    if not isinstance(dataset, ArrayDataset):
        # A fingerprint knows files by their names alone.
        for path in dataset.paths if isinstance(dataset, FileDataset) else dataset.files:
            digest.update(repr(_identity(path)).encode())
    return f"{weights_digest(encoder)}-{digest.hexdigest()[:16]}-{image_size}"


def _identity(path):
    try:
        status = os.stat(path)
    except OSError:
        return None  # Unreadable as others are: it has no features.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode


def weights_digest(encoder: keras.Model) -> str:
    """Returns a digest of all weights, and of the precision that they are used in."""
    digest = hashlib.sha256()
    digest.update(repr([layer.compute_dtype for layer in encoder.layers]).encode())
    for weight in encoder.weights:
        digest.update(repr((tuple(weight.shape), weight.dtype)).encode())
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()[:16]


def _joined(batches):
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    for name, values in joined.items():
        if not np.isfinite(values).all():
            raise ValueError(
                f"The features of {name} must be finite. Received NaN or infinity: its weights or "
                "BatchNorm statistics have diverged."
            )
    return joined


def _require_size(encoders, images):
    for name, encoder in encoders.items():
        if isinstance(encoder, keras.Model):
            expected = encoder.input_shape[1:]
            received = tuple(images.shape[1:])
            pairs = zip(expected, received, strict=False)
            if len(expected) != len(received) or any(e not in (None, r) for e, r in pairs):
                raise ValueError(
                    f"The encoder {name} takes images of shape {expected}. Received: {received}. "
                    "Use the image size that it was built for."
                )
