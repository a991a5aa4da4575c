"""The queue: the anchors that student and teacher compare an image to."""

import keras
import tensorflow as tf

UNKNOWN_LABEL = -1
# Neighbours whose labels make up the purity: UMBCvision/ISD train_isd_plus.py:206-214.
PURITY_NEIGHBORS = 5


class FeatureQueue(keras.layers.Layer):
    """A ring of the teacher's latest embeddings, as layer weights so that they are saved.

    Rows start as random unit vectors and are overwritten oldest first; the ring wraps at any row,
    so its size need not be a multiple of the batch. Labels ride along for monitoring only.

    Args:
        size: number of rows K. The paper uses 128 000 on ImageNet.
        dimension: length D of a row.
        seed: of the first rows.

    Raises:
        ValueError: if size or dimension is not positive.

    Source: paper section 3.1; UMBCvision/ISD train_isd.py:140-175, whose queue must be a multiple
    of the batch and whose first rows have norm 0.063 (normalised along the wrong axis).
    """

    def __init__(self, size: int, dimension: int, seed: int = 0, **kwargs):
        super().__init__(trainable=False, **kwargs)
        if size < 1 or dimension < 1:
            raise ValueError(
                "A queue needs at least one row and one column. "
                f"Received: size={size}, dimension={dimension}."
            )
        self.size = size
        self.dimension = dimension
        self.seed = seed

        def random_unit_rows(shape, dtype=None):
            rows = tf.random.stateless_normal(shape, [self.seed, 0], dtype=dtype)
            return tf.math.l2_normalize(rows, axis=1)

        # Never averaged over replicas: every replica writes the same gathered rows.
        own = dict(trainable=False, autocast=False, aggregation="none")
        self.rows = self.add_weight(
            name="rows", shape=(size, dimension), initializer=random_unit_rows, **own
        )
        self.labels = self.add_weight(
            name="labels",
            shape=(size,),
            dtype="int64",
            initializer=keras.initializers.Constant(UNKNOWN_LABEL),
            **own,
        )
        self.pointer = self.add_weight(
            name="pointer", shape=(), dtype="int64", initializer="zeros", **own
        )
        self.built = True

    def read_anchors(self) -> tf.Tensor:
        """Returns all rows, [K, D] unit vectors in storage order."""
        # A sparse read: after a scatter update a dense read would copy the variable once more.
        return tf.gather(self.rows.value, tf.range(self.size))

    @property
    def purity_neighbors(self) -> int:
        """How many nearest rows `purity` is about: five, of fewer rows all."""
        return min(PURITY_NEIGHBORS, self.size)

    def purity(self, nearest: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Share of the nearest rows that carry the image's label; unknown labels never match.

        Args:
            nearest: integers [B, n], the rows nearest to each image's teacher embedding.
            labels: integers [B], -1 where unknown.
        """
        nearest_labels = tf.gather(self.labels.value, nearest)  # [B, n]
        labels = tf.cast(labels, nearest_labels.dtype)[:, tf.newaxis]
        matches = tf.logical_and(nearest_labels == labels, labels >= 0)
        return tf.reduce_mean(tf.cast(matches, tf.float32))

    def enqueue(self, embeddings: tf.Tensor, labels: tf.Tensor | None = None) -> None:
        """Overwrites the oldest rows.

        Args:
            embeddings: [B, D] unit rows of the global batch, B <= K. Every replica must pass the
                same rows in the same order.
            labels: int64 [B], or None when unknown.

        Raises:
            ValueError: when B exceeds K.
        """
        if (embeddings.shape[0] or 0) > self.size:
            raise ValueError(
                f"The queue must be at least the global batch size ({embeddings.shape[0]}). "
                f"Received: size={self.size}."
            )
        count = tf.shape(embeddings, out_type=tf.int64)[0]
        if embeddings.shape[0] is None:
            tf.debugging.assert_less_equal(
                count, tf.constant(self.size, tf.int64), "The batch is larger than the queue."
            )
        places = tf.math.floormod(self.pointer.value + tf.range(count), self.size)
        if labels is None:
            labels = tf.fill([count], tf.constant(UNKNOWN_LABEL, tf.int64))
        # Scattering touches B rows; assigning a new queue would touch all K.
        self.rows.value.scatter_update(tf.IndexedSlices(embeddings, places))
        self.labels.value.scatter_update(tf.IndexedSlices(tf.cast(labels, tf.int64), places))
        self.pointer.assign(tf.math.floormod(self.pointer.value + count, self.size))

    def get_config(self):
        mine = {"size": self.size, "dimension": self.dimension, "seed": self.seed}
        return {**super().get_config(), **mine}
