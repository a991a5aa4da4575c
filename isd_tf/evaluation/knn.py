"""Nearest-neighbour accuracy of frozen features.

The bank is never held: its features stream past the queries, each of which keeps its best
neighbours so far. Memory is that of the queries' features and one chunk, so that a bank of 1.28
million features of 2048 numbers needs no more than a small one.
"""

from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf

# Queries compared at a time, and bank features gathered before they are compared: a block of
# similarities takes 64 MB.
QUERY_BLOCK = 4096
BANK_CHUNK = 4096
# Larger views are reduced to this side before their raw pixels are compared.
RAW_PIXEL_SIZE = 32

Encoder = Callable[[tf.Tensor], tf.Tensor]


def knn_accuracy(
    encoders: dict[str, Encoder],
    bank: Iterable,
    queries: Iterable,
    neighbors: tuple[int, ...] = (1, 20),
) -> dict[str, float]:
    """Share of the queries whose nearest neighbours in the bank vote for their label.

    Features are L2-normalised and compared by cosine. Every neighbour has one vote; a tie goes to
    the class whose member is nearest (the reference breaks ties by an unseeded shuffle). All
    encoders are scored in one pass over the images.

    Args:
        encoders: by name, functions from normalised images [b, S, S, 3] to features [b, C].
        bank: batches of (images [b, S, S, 3], labels [b]).
        queries: the same.
        neighbors: values of k.

    Returns:
        Accuracy in [0, 1] by flat name: "student_1nn", "student_20nn", ...

    Raises:
        ValueError: when there are no queries, labels are unknown, the bank has fewer examples than
            the largest k, or features are not finite.

    Source: protocol of UMBCvision/ISD eval_knn.py.
    """
    embed = _normalised_features(encoders)
    query_chunks = list(_chunks(embed, queries))
    if not query_chunks:
        raise ValueError("There are no queries to score. Received an empty test dataset.")
    labels = np.concatenate([chunk_labels for _, chunk_labels in query_chunks])
    _require_labels(labels, "queries")
    searches = {
        name: _NearestNeighbors(
            np.concatenate([features[name] for features, _ in query_chunks]), max(neighbors)
        )
        for name in encoders
    }
    del query_chunks
    bank_labels = []
    for chunk_features, chunk_labels in _chunks(embed, bank):
        _require_labels(chunk_labels, "bank")
        for name, search in searches.items():
            search.add(chunk_features[name])
        bank_labels.append(chunk_labels)
    bank_labels = np.concatenate(bank_labels) if bank_labels else np.zeros(0, np.int64)
    if len(bank_labels) < max(neighbors):
        raise ValueError(
            f"The bank must have at least {max(neighbors)} examples for {max(neighbors)}-NN. "
            f"Received: {len(bank_labels)}."
        )
    scores = {}
    for name, search in searches.items():
        neighbor_labels = bank_labels[search.rows]  # [Q, k], nearest first
        for k in neighbors:
            votes = majority(neighbor_labels[:, :k])
            scores[f"{name}_{k}nn"] = float(np.mean(votes == labels))
    return scores


def majority(labels: np.ndarray) -> np.ndarray:
    """Returns the most frequent label of each row of [Q, k], ties to the one that stands first."""
    counts = np.zeros(labels.shape, np.int32)
    for column in labels.T:
        counts += labels == column[:, np.newaxis]
    return labels[np.arange(len(labels)), np.argmax(counts, axis=1)]


def raw_pixels(images: tf.Tensor) -> tf.Tensor:
    """The features of no encoder: the pixels [b, S * S * 3], S at most 32."""
    if images.shape[1] > RAW_PIXEL_SIZE:
        images = tf.image.resize(images, [RAW_PIXEL_SIZE, RAW_PIXEL_SIZE], antialias=True)
    return tf.reshape(images, [tf.shape(images)[0], -1])


class EvaluateKNN(keras.callbacks.Callback):
    """Scores student and teacher every few epochs by 1-NN and 20-NN, as the paper's figure 2.

    The scores join the epoch's logs, and so the History, under knn_accuracy's names.

    Args:
        bank, queries: as in `knn_accuracy`.
        every_epochs: how often.
        hurried: asked again and again; once it says True, this epoch is left unscored. Of several
            workers only the chief scores and is asked: the others wait, and hear nothing.
    """

    def __init__(
        self,
        bank: Iterable,
        queries: Iterable,
        every_epochs: int,
        hurried: Callable[[], bool] = lambda: False,
    ):
        super().__init__()
        self.bank = bank
        self.queries = queries
        self.every_epochs = every_epochs
        self.hurried = hurried

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every_epochs:
            return
        encoders = {"student": self.model.student_encoder, "teacher": self.model.teacher_encoder}
        try:
            scores = knn_accuracy(encoders, *map(self._unless_hurried, (self.bank, self.queries)))
        except _HurriedError:
            print(f"Epoch {epoch + 1} is not scored: there is no time left.", flush=True)
            return
        if logs is not None:
            logs.update(scores)

    def _unless_hurried(self, batches):
        for batch in batches:
            if self.hurried():
                raise _HurriedError
            yield batch


class _HurriedError(Exception):
    pass


class _NearestNeighbors:
    """The k most similar bank rows of each query, kept while the bank streams past."""

    def __init__(self, queries: np.ndarray, k: int):
        self.k = k
        self.seen = 0
        self.queries = [
            tf.constant(queries[first : first + QUERY_BLOCK])
            for first in range(0, len(queries), QUERY_BLOCK)
        ]
        self.best = [
            (tf.fill([len(block), k], -np.inf), tf.fill([len(block), k], np.int64(-1)))
            for block in self.queries
        ]

    def add(self, features: np.ndarray) -> None:
        rows = tf.range(self.seen, self.seen + len(features), dtype=tf.int64)
        features = tf.constant(features)
        self.best = [
            _merge(block, *best, features, rows)
            for block, best in zip(self.queries, self.best, strict=True)
        ]
        self.seen += len(features)

    @property
    def rows(self) -> np.ndarray:
        """Bank rows [Q, k], nearest first."""
        return np.concatenate([rows for _, rows in self.best])


@tf.function(reduce_retracing=True)
def _merge(queries, best_similarities, best_rows, features, rows):
    similarities = tf.matmul(queries, features, transpose_b=True)  # [Q, c]
    k = tf.minimum(tf.shape(best_rows)[1], tf.shape(rows)[0])
    chunk_best = tf.math.top_k(similarities, k)
    # Earlier rows stand first, so that equal similarities keep the bank's order.
    candidates = tf.concat([best_similarities, chunk_best.values], axis=1)
    candidate_rows = tf.concat([best_rows, tf.gather(rows, chunk_best.indices)], axis=1)
    best = tf.math.top_k(candidates, tf.shape(best_rows)[1])
    return best.values, tf.gather(candidate_rows, best.indices, batch_dims=1)


def _normalised_features(encoders):
    """Compiles all encoders into one function: images to unit features [b, C] by name."""

    @tf.function(reduce_retracing=True)
    def embed(images):
        features = {}
        for name, encoder in encoders.items():
            is_network = isinstance(encoder, keras.Model)
            x = encoder(images, training=False) if is_network else encoder(images)
            features[name] = tf.math.l2_normalize(tf.cast(x, tf.float32), axis=1)
        return features

    return embed


def _chunks(embed, batches):
    """Yields (features by name [c, C], labels [c]) in chunks of about BANK_CHUNK examples."""
    features, labels, count = [], [], 0
    for images, batch_labels in batches:
        features.append(embed(images))
        labels.append(np.asarray(batch_labels))
        count += len(labels[-1])
        if count >= BANK_CHUNK:
            yield _joined(features), np.concatenate(labels)
            features, labels, count = [], [], 0
    if labels:
        yield _joined(features), np.concatenate(labels)


def _joined(batches):
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    for name, values in joined.items():
        if not np.isfinite(values).all():
            raise ValueError(
                f"The features of {name} must be finite. Received NaN or infinity: its weights or "
                "BatchNorm statistics have diverged."
            )
    return joined


def _require_labels(labels, what):
    if (labels < 0).any():
        raise ValueError(
            f"kNN needs a label for every image of the {what}. Received {(labels < 0).sum()} "
            f"without, of {len(labels)}."
        )
