"""What one replica must know of the others: the strategy, the whole batch, Shuffle-BN."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from isd_tf.training import cluster

STRATEGIES = ("auto", "one", "mirrored", "multi_worker")


def choose_strategy(
    name: str, tf_config: str = "", cluster_timeout: float = 600
) -> tf.distribute.Strategy:
    """Returns the distribution strategy of a name. Comes before anything else of TensorFlow's.

    Args:
        name: "one" (a single device), "mirrored" (every visible GPU or, without GPUs, every
            logical CPU), "multi_worker" (every GPU, or else the CPU, of every process in
            `tf_config`), or "auto": multi_worker where `tf_config` names a cluster, mirrored where
            several GPUs are visible, else one.
        tf_config: what the environment has as TF_CONFIG, as in `cluster.parse_tf_config`.
        cluster_timeout: seconds to wait for the other workers.

    Raises:
        ValueError: for another name, or a cluster that cannot be read.
        OSError: when the workers do not find each other.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}. Received: {name!r}.")
    if name == "multi_worker" or (name == "auto" and cluster.parse_tf_config(tf_config)):
        return cluster.join(tf_config, cluster_timeout)
    gpus = tf.config.list_logical_devices("GPU")
    if name == "mirrored" or (name == "auto" and len(gpus) > 1):
        devices = gpus or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    return tf.distribute.get_strategy()


def bfloat16_is_native() -> bool:
    """Whether the visible devices compute in bfloat16, rather than emulate it many times slower."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
        return all(each.get("compute_capability", (0, 0)) >= (8, 0) for each in details)
    try:
        with open("/proc/cpuinfo") as file:
            words = set(file.read().split())
    except OSError:
        return True  # Not Linux: unknown, so nothing to warn of.
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def number_of_replicas() -> int:
    """Replicas of the strategy in whose scope or replica this is called."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def gather_across_replicas(values: tf.Tensor) -> tf.Tensor:
    """Concatenates every replica's values [b, ...] in the order of the global batch [B, ...]."""
    if number_of_replicas() == 1:
        return values
    context = tf.distribute.get_replica_context()
    replica = tf.reshape(tf.convert_to_tensor(context.replica_id_in_sync_group), [1])
    # Made here: what comes from outside the replica, as a batch does, may lie on no device that
    # TensorFlow knows of.
    gathered, replicas = (
        context.all_gather(tf.identity(mine), axis=0) for mine in (values, replica)
    )
    return in_replica_order(gathered, replicas)


def in_replica_order(gathered: tf.Tensor, replicas: tf.Tensor) -> tf.Tensor:
    """Sorts what all_gather has brought by the replicas that it came from.

    TensorFlow's own order is another from the eleventh worker on ("task:10" stands before "task:2")
    and where a machine's GPUs are linked unequally.

    Args:
        gathered: [B, ...], equal parts of all replicas.
        replicas: [R] whose parts they are.

    Returns:
        [B, ...] with the first replica's part first.
    """
    shape = tf.shape(gathered)
    parts = tf.reshape(gathered, tf.concat([tf.shape(replicas), [-1], shape[1:]], 0))
    sorted_parts = tf.gather(parts, tf.argsort(replicas))
    return tf.ensure_shape(tf.reshape(sorted_parts, shape), gathered.shape)


def mean_over_replicas(values: tf.Tensor) -> tf.Tensor:
    """Returns, on every replica, the mean of all replicas' values, of the same shape on each."""
    if number_of_replicas() == 1:
        return values
    return tf.distribute.get_replica_context().all_reduce("MEAN", values)


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


def spread_overflow(gradients: list[tf.Tensor]) -> list[tf.Tensor]:
    """Makes gradients that are not finite on one replica so on every replica.

    Keras' loss scaling skips a step whose gradients overflow, but lets each replica judge by its
    own: they would part ways, or wait for each other for ever.
    """
    if number_of_replicas() == 1:
        return gradients
    nothing = tf.add_n([tf.reduce_sum(gradient * 0) for gradient in gradients])  # 0 or NaN
    nothing = tf.distribute.get_replica_context().all_reduce("SUM", nothing)
    return [gradient + nothing for gradient in gradients]


def replica_digests(strategy: tf.distribute.Strategy, variables: list) -> np.ndarray:
    """Returns a digest of every replica's copy of every Keras variable: int64 [replicas, V].

    Two copies have the same digest where they have the same bits. All of it passes through the
    host: for checks, not for every step.
    """
    copies = [strategy.experimental_local_results(variable.value) for variable in variables]
    digests = [[cluster.digest(copy.numpy().tobytes()) for copy in each] for each in copies]
    workers = cluster.gather_from_workers(strategy, np.array(digests, np.int64).T)
    return workers.reshape(-1, len(variables))


def call_shuffled(function: Callable[..., tf.Tensor], examples, seed: tf.Tensor) -> tf.Tensor:
    """Calls `function` on examples shuffled across all replicas, and returns its rows unshuffled.

    Where BatchNorm sees one replica, or one group, at a time (Shuffle-BN, MoCo section 3.3),
    teacher and student would otherwise share the statistics of the same images, and match by them.

    Args:
        function: examples to embeddings [b, D].
        examples: this replica's share of the global batch: a tensor [b, ...], or some in a nest.
        seed: integers [2]; the same seed gives the same permutation on every replica.

    Returns:
        Embeddings [b, D] in the order of `examples`.
    """
    count = tf.shape(tf.nest.flatten(examples)[0])[0]
    order = tf.random.experimental.stateless_shuffle(tf.range(count * number_of_replicas()), seed)

    def shuffle(values):  # [b, ...]
        if values.dtype == tf.uint8:
            words = shuffle(_bytes_to_words(values))
            return _words_to_bytes(words, values.shape)
        everyone = gather_across_replicas(values)  # [B, ...]
        # Gathering has lost the number of rows, which compilers want to know.
        return tf.ensure_shape(tf.gather(everyone, own_rows(order, count)), values.shape)

    embeddings = function(tf.nest.map_structure(shuffle, examples))
    shuffled = gather_across_replicas(embeddings)  # [B, D]
    return own_rows(tf.gather(shuffled, tf.argsort(order)), count)


def _bytes_to_words(values: tf.Tensor) -> tf.Tensor:
    """Takes uint8 [b, ...] for float32 [b, n] of the same bits, rows filled up with zeros.

    TensorFlow's collectives move no bytes, and its GPUs gather none; float32 they do everything
    with, and moving it changes no bit.
    """
    size = values.shape[1:].num_elements()
    rows = tf.pad(tf.reshape(values, [-1, size]), [[0, 0], [0, -size % 4]])
    return tf.bitcast(tf.reshape(rows, [-1, (size + 3) // 4, 4]), tf.float32)


def _words_to_bytes(words: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    """Undoes `_bytes_to_words` for values of that shape."""
    rows = tf.reshape(tf.bitcast(words, tf.uint8), [-1, 4 * words.shape[1]])
    rows = rows[:, : shape[1:].num_elements()]
    return tf.ensure_shape(tf.reshape(rows, [-1, *shape[1:]]), shape)
