"""What one replica must know of the others: the strategy, the whole batch, Shuffle-BN."""

from collections.abc import Callable

import tensorflow as tf


def choose_strategy(name: str) -> tf.distribute.Strategy:
    """Returns the distribution strategy of a name.

    Args:
        name: "one" (a single device), "mirrored" (every visible GPU or, without GPUs, every
            logical CPU), or "auto" (mirrored when several GPUs are visible).

    Raises:
        ValueError: for another name.
    """
    gpus = tf.config.list_logical_devices("GPU")
    if name == "one" or (name == "auto" and len(gpus) < 2):
        return tf.distribute.get_strategy()
    if name in ("auto", "mirrored"):
        devices = gpus or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    raise ValueError(f"strategy must be one of auto, one, mirrored. Received: {name!r}.")


def number_of_replicas() -> int:
    """Replicas of the strategy in whose scope or replica this is called."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def gather_across_replicas(values: tf.Tensor) -> tf.Tensor:
    """Concatenates every replica's values [b, ...] in the order of the global batch [B, ...]."""
    if number_of_replicas() == 1:
        return values
    return tf.distribute.get_replica_context().all_gather(values, axis=0)


def own_rows(values: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Returns this replica's `count` rows of values [B, ...] in the order of the global batch."""
    if number_of_replicas() == 1:
        return values
    first = tf.distribute.get_replica_context().replica_id_in_sync_group * count
    return tf.slice(
        values,
        tf.concat([[first], tf.zeros([tf.rank(values) - 1], tf.int32)], 0),
        tf.concat([[count], tf.shape(values)[1:]], 0),
    )


def call_shuffled(
    function: Callable[[tf.Tensor], tf.Tensor], images: tf.Tensor, seed: tf.Tensor
) -> tf.Tensor:
    """Calls `function` on images shuffled across all replicas, and returns its rows unshuffled.

    Where BatchNorm sees one replica at a time (Shuffle-BN, MoCo section 3.3), teacher and student
    would otherwise share the statistics of the same images, and match by them.

    Args:
        function: images [b, S, S, 3] to embeddings [b, D].
        images: this replica's share [b, S, S, 3] of the global batch.
        seed: integers [2]; the same seed gives the same permutation on every replica.

    Returns:
        Embeddings [b, D] in the order of `images`.
    """
    if number_of_replicas() == 1:
        return function(images)  # A permutation of the only batch changes no statistic.
    count = tf.shape(images)[0]
    everyone = gather_across_replicas(images)  # [B, S, S, 3]
    order = tf.random.experimental.stateless_shuffle(tf.range(tf.shape(everyone)[0]), seed)
    embeddings = function(tf.gather(everyone, own_rows(order, count)))
    shuffled = gather_across_replicas(embeddings)  # [B, D]
    return own_rows(tf.gather(shuffled, tf.argsort(order)), count)
