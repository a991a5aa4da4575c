"""Nearest-neighbour accuracy of frozen features.

The bank is never held: its features stream past the queries, each of which keeps its best
neighbours so far. Memory is that of the queries' features and one chunk, so that a bank of 1.28
million features of 2048 numbers needs no more than a small one.
"""

from collections.abc import Callable, Collection, Iterable

import keras
import numpy as np
import tensorflow as tf

from isd_tf.evaluation.features import (
    Encoder,
    in_chunks,
    require_classes,
    require_labels,
    unit_rows,
)

# Queries compared at a time, and bank features gathered before they are compared: a block of
# similarities takes 41 MB.
QUERY_BLOCK = 1250
BANK_CHUNK = 8192
# Columns of that block whose largest similarity decides whether they are looked at one by one.
GROUP = 64
# Larger views are reduced to this side before their raw pixels are compared.
RAW_PIXEL_SIZE = 32


def knn_accuracy(
    encoders: dict[str, Encoder],
    bank: Iterable,
    queries: Iterable,
    neighbors: tuple[int, ...] = (1, 20),
    rare_labels: Collection[int] = (),
) -> dict[str, float]:
    """Share of the queries whose nearest neighbours in the bank vote for their label.

    Features are L2-normalised and compared by cosine. Every neighbour has one vote; a tie goes to
    the class whose member is nearest (the reference breaks ties by an unseeded shuffle). All
    encoders are scored in one pass over the images.

    Args:
        encoders: by name, functions from normalised images [b, S, S, 3] to features [b, C].
        bank: batches of (images [b, S, S, 3], labels [b]).
        queries: the same.
        neighbors: values of k; what is larger than the bank is left out.
        rare_labels: labels whose queries are also scored on their own.

    Returns:
        Accuracy in [0, 1] by flat name: "student_1nn", "student_20nn", ..., and with rare_labels
        "student_1nn_rare", ...

    Raises:
        ValueError: when there are no queries, labels are unknown, the bank has fewer examples than
            the smallest k, one class or none of a query's, or features are not finite.

    Source: protocol of UMBCvision/ISD eval_knn.py.
    """
    query_chunks = list(in_chunks(encoders, queries, BANK_CHUNK))
    if not query_chunks:
        raise ValueError("There are no queries to score. Received an empty test dataset.")
    labels = np.concatenate([chunk_labels for _, chunk_labels in query_chunks])
    require_labels(labels, "queries")
    searches = {
        name: NearestNeighbors(
            unit_rows(np.concatenate([features[name] for features, _ in query_chunks])),
            max(neighbors),
        )
        for name in encoders
    }
    del query_chunks
    bank_labels = []
    for chunk_features, chunk_labels in in_chunks(encoders, bank, BANK_CHUNK):
        require_labels(chunk_labels, "bank")
        for name, search in searches.items():
            search.add(unit_rows(chunk_features[name]))
        bank_labels.append(chunk_labels)
    bank_labels = np.concatenate(bank_labels) if bank_labels else np.zeros(0, np.int64)
    if len(bank_labels) < min(neighbors):
        raise ValueError(
            f"The bank must have at least {min(neighbors)} examples for {min(neighbors)}-NN. "
            f"Received: {len(bank_labels)}."
        )
    require_classes(labels, bank_labels, "bank")
    is_rare = np.isin(labels, list(rare_labels))
    scores = {}
    for name, search in searches.items():
        neighbor_labels = bank_labels[search.rows]  # [Q, k], nearest first
        for k in (k for k in neighbors if k <= len(bank_labels)):
            right = majority(neighbor_labels[:, :k]) == labels
            scores[f"{name}_{k}nn"] = float(np.mean(right))
            if is_rare.any():
                scores[f"{name}_{k}nn_rare"] = float(np.mean(right[is_rare]))
    return scores


def nearest(queries: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k bank rows most similar to each query by cosine, exactly.

    Args:
        queries: features [Q, C], compared at unit length.
        bank: features [N, C], which may be on disk.
        k: at most N.

    Returns:
        Rows int64 [Q, k], nearest first and equal ones in the bank's order, and their cosines.

    Raises:
        ValueError: when the bank has fewer than k rows, or of another length.
    """
    if len(bank) < k or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"The bank must have {k} rows of {queries.shape[1]} numbers or more. Received: "
            f"{len(bank)} of {bank.shape[1]}."
        )
    search = NearestNeighbors(unit_rows(queries), k)
    for first in range(0, len(bank), BANK_CHUNK):
        search.add(unit_rows(bank[first : first + BANK_CHUNK]))
    return search.rows, search.similarities


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
    Where knn_accuracy refuses to score, it is printed why, and the training goes on.

    Args:
        bank, queries: as in `knn_accuracy`.
        every_epochs: how often.
        rare_labels: as in `knn_accuracy`.
        references: what does not change, to stand beside them: scored once, repeated each time.
        hurried: asked again and again; once it says True, this epoch is left unscored. Of several
            workers only the chief scores and is asked: the others wait, and hear nothing.
    """

    def __init__(
        self,
        bank: Iterable,
        queries: Iterable,
        every_epochs: int,
        rare_labels: Collection[int] = (),
        references: dict[str, Encoder] | None = None,
        hurried: Callable[[], bool] = lambda: False,
    ):
        super().__init__()
        self.bank = bank
        self.queries = queries
        self.every_epochs = every_epochs
        self.rare_labels = rare_labels
        self.references = references or {}
        self.reference_scores = {}
        self.hurried = hurried

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every_epochs:
            return
        encoders = self.model.encoders()
        if not self.reference_scores:
            encoders = self.references | encoders
        try:
            data = map(self._unless_hurried, (self.bank, self.queries))
            scores = knn_accuracy(encoders, *data, rare_labels=self.rare_labels)
        except _HurriedError:
            print(f"Epoch {epoch + 1} is not scored: there is no time left.", flush=True)
            return
        except ValueError as error:
            # A training is worth more than its curve; the evaluation after it will not be as mild.
            print(f"Epoch {epoch + 1} is not scored: {error}", flush=True)
            return
        self.reference_scores |= {
            name: score
            for name, score in scores.items()
            if name.startswith(tuple(f"{reference}_" for reference in self.references))
        }
        if logs is not None:
            logs.update(self.reference_scores | scores)

    def _unless_hurried(self, batches):
        for batch in batches:
            if self.hurried():
                raise _HurriedError
            yield batch


class _HurriedError(Exception):
    pass


class NearestNeighbors:
    """The k most similar bank rows of each query, kept while the bank streams past.

    Args:
        queries: float32 [Q, C], compared as they are.
        k: neighbours to keep.
    """

    def __init__(self, queries: np.ndarray, k: int):
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
        """Shows it the next rows of the bank, float32 [n, C]."""
        part, seen = tf.convert_to_tensor(features), tf.constant(self.seen, tf.int64)
        self.best = _merge(self.queries, self.best, part, seen, is_first=self.seen == 0)
        self.seen += len(features)

    @property
    def rows(self) -> np.ndarray:
        """Bank rows int64 [Q, k], nearest first."""
        return np.concatenate([rows for _, rows in self.best])

    @property
    def similarities(self) -> np.ndarray:
        """Cosines [Q, k] to these rows."""
        return np.concatenate([similarities for similarities, _ in self.best])


@tf.function(reduce_retracing=True)
def _merge(blocks, best, features, seen, is_first):
    """The k best of those so far and of a chunk's, whose first row is `seen`, for all blocks.

    One graph for all saves 3% of the time; one after another, they need the memory of one.
    """
    merged = []
    for queries, (best_similarities, best_rows) in zip(blocks, best, strict=True):
        with tf.control_dependencies(merged[-1] if merged else ()):
            merged.append(
                _merge_block(queries, best_similarities, best_rows, features, seen, is_first)
            )
    return merged


def _merge_block(queries, best_similarities, best_rows, features, seen, is_first):
    """One block's part of it.

    Most of a chunk is further away than the k-th best so far (in the first chunk: than the largest
    of the k-th best group). Looking through all columns for the rest takes longer than looking
    through the largest of each group first.
    """
    k = tf.shape(best_rows)[1]
    similarities = tf.matmul(queries, features, transpose_b=True)  # [Q, c]
    padding = [[0, 0], [0, -tf.shape(features)[0] % GROUP]]
    similarities = tf.pad(similarities, padding, constant_values=-np.inf)
    groups = tf.reshape(similarities, [tf.shape(queries)[0], -1, GROUP])
    largest = tf.reduce_max(groups, axis=2)
    if is_first:
        k_largest = tf.math.top_k(tf.concat([best_similarities, largest], axis=1), k).values
        kth_best, may_be_near = k_largest[:, -1], tf.greater_equal
    else:
        kth_best, may_be_near = best_similarities[:, -1], tf.greater  # An equal one comes later.
    query_and_group = tf.where(may_be_near(largest, kth_best[:, tf.newaxis]))  # [G, 2]
    members = tf.gather_nd(groups, query_and_group)  # [G, GROUP]
    threshold = tf.gather(kth_best, query_and_group[:, 0])
    group_and_member = tf.where(may_be_near(members, threshold[:, tf.newaxis]))  # [N, 2]
    query, group = tf.unstack(tf.gather(query_and_group, group_and_member[:, 0]), axis=1)
    rows = seen + group * GROUP + group_and_member[:, 1]
    # Earlier rows stand first, so that equal similarities keep the bank's order.
    count = tf.shape(queries, tf.int64)[0]
    values = tf.gather_nd(members, group_and_member)
    nearer = tf.RaggedTensor.from_value_rowids(values, query, count, validate=False)
    best = tf.math.top_k(tf.concat([best_similarities, nearer.to_tensor(-np.inf)], axis=1), k)
    candidate_rows = tf.concat([best_rows, nearer.with_values(rows).to_tensor(-1)], axis=1)
    return best.values, tf.gather(candidate_rows, best.indices, batch_dims=1)
