"""The devices that a run trains on, and whether its batch can be shared among them."""

import os
import sys

import keras
import settings
import tensorflow as tf
from absl import logging
from program import say
from settings import FLAGS

from isd_tf.training import checkpoints as checkpointing
from isd_tf.training import cluster, distribution


def choose() -> tf.distribute.Strategy:
    """Sets up what trains here, agrees with the other workers, and says what it is.

    From here on only the chief's sentences are shown; errors of all are.

    Raises:
        ValueError: for a batch that the replicas cannot share, one image for BatchNorm, logical
            CPUs on several workers, or flags that other workers have otherwise.
        cluster.PeersError: when the other workers cannot be reached.
    """
    if FLAGS.logical_cpus > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration()] * FLAGS.logical_cpus
        tf.config.set_logical_device_configuration(cpu, parts)
    keras.config.set_dtype_policy(FLAGS.precision)
    if FLAGS.deterministic:
        tf.config.experimental.enable_op_determinism()
    tf_config = os.environ.get("TF_CONFIG", "")
    training = bool({"pretrain", "plan"} & set(FLAGS.stages) or cluster.parse_tf_config(tf_config))
    strategy = distribution.choose_strategy(
        FLAGS.strategy if training else "one", tf_config, FLAGS.cluster_timeout
    )
    checkpointing.exit_when_told()
    with cluster.noticing_lost_peers(strategy):
        # First of all: different flags would part the workers' ways.
        shared = [f for f in settings.own_flags() if f.name not in settings.MACHINES_OWN]
        cluster.require_same(strategy, {f"--{flag.name}": str(flag.value) for flag in shared})
    _check(strategy, training)
    _tell(strategy, training)
    if not cluster.is_chief(strategy):
        # The chief speaks for all; errors go to stderr.
        sys.stdout = open(os.devnull, "w", errors="replace")
    return strategy


def _check(strategy, training):
    workers, replicas = cluster.number_of_workers(strategy), strategy.num_replicas_in_sync
    synchronized, groups = settings.batch_norm()
    if FLAGS.batch_size % (replicas * groups):
        raise ValueError(
            "The replicas, and their groups, share the batch evenly. Received: "
            f"--batch_size={FLAGS.batch_size} for {replicas} replica{'s' * (replicas > 1)}"
            + (f" of {groups} groups" if groups > 1 else "")
            + f". Use a multiple of {replicas * groups}, or another --strategy or --batch_norm."
        )
    # Synchronised, BatchNorm sees all replicas' images.
    alike = FLAGS.batch_size // (1 if synchronized else replicas * groups)
    if alike == 1 and training:
        raise ValueError(
            "BatchNorm needs two images at least: of one, every feature becomes 0, and nothing is "
            f"learned. Received: --batch_size={FLAGS.batch_size} for {replicas} "
            f"replica{'s' * (replicas > 1)} with --batch_norm={FLAGS.batch_norm}. Use a larger "
            "batch, or fewer replicas or groups."
        )
    if workers > 1 and FLAGS.logical_cpus > 1:
        raise ValueError(
            "A worker of a cluster trains on its GPUs or on its whole CPU. Received: "
            f"--logical_cpus={FLAGS.logical_cpus}, which is for --strategy=mirrored."
        )
    if FLAGS.precision == "mixed_bfloat16" and not distribution.bfloat16_is_native():
        logging.warning(
            "These devices emulate bfloat16, many times slower than float32. --precision=float32 "
            "is the faster one here."
        )


def _tell(strategy, training):
    workers, replicas = cluster.number_of_workers(strategy), strategy.num_replicas_in_sync
    here = replicas // workers
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    index = cluster.worker_index(strategy)
    who = f"Worker {index} of {workers}{' (the chief)' * (index == 0)}: " if workers > 1 else ""
    say(
        f"{who}{here} {kind} replica{'s' * (here > 1)}"
        + (f", {replicas} in all" if workers > 1 else "")
        + f": global batch {FLAGS.batch_size}, replica batch {FLAGS.batch_size // replicas}."
    )
    moves = "teacher_momentum" in settings.METHODS[FLAGS.method]  # Or else sees no batch.
    if FLAGS.batch_norm == "shuffled" and replicas == 1 and training and moves:
        say(
            "On one device there is nothing to shuffle: BatchNorm sees the whole batch. "
            "--batch_norm=groups:N takes statistics of N parts, as N devices would."
        )
