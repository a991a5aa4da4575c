"""The queue's part of a step, as FeatureQueue does it against other ways of read and enqueue.

    PYTHONPATH=. python benchmarks/queue_step.py

A step reads the anchors, compares a batch to them and enqueues it. The ways alternate in one
process, each with a queue of its own, and the ratio is taken round by round.
"""

import os
import statistics
import time

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

from isd_tf.methods import feature_queue

BATCH, QUEUE, DIMENSION, ROUNDS = 256, 65_536, 128, 60


def read_sparsely(queue):
    return queue.read_anchors()


def read_densely(queue):
    return queue.rows.value.read_value()


def scatter(queue, anchors, embeddings):
    queue.enqueue(embeddings)


def assign_all(queue, anchors, embeddings):
    queue.rows.assign(tf.concat([anchors[BATCH:], embeddings], axis=0))


WAYS = {
    "FeatureQueue (gather, scatter)": (read_sparsely, scatter),
    "dense read, scatter": (read_densely, scatter),
    "dense read, assign a new queue": (read_densely, assign_all),
}


def make(read, enqueue):
    queue = feature_queue.FeatureQueue(QUEUE, DIMENSION)

    @tf.function
    def step(embeddings):
        anchors = read(queue)
        similarities = tf.matmul(embeddings, anchors, transpose_b=True)
        enqueue(queue, anchors, embeddings)
        return tf.reduce_max(similarities)

    return step


def main():
    embeddings = tf.math.l2_normalize(
        tf.random.stateless_normal([BATCH, DIMENSION], [0, 0]), axis=1
    )
    steps = {way: make(*functions) for way, functions in WAYS.items()}

    def seconds(way):
        start = time.perf_counter()
        steps[way](embeddings).numpy()
        return time.perf_counter() - start

    for way in WAYS:
        seconds(way)  # compiles
    times = {way: [] for way in WAYS}
    order = list(WAYS)
    for _ in range(ROUNDS):
        order = order[1:] + order[:1]  # whichever comes later finds warmer caches: take turns
        for way in order:
            times[way].append(seconds(way))
    ours, *others = WAYS
    print(f"{ours}: median {1000 * statistics.median(times[ours]):.1f} ms, {ROUNDS} rounds")
    for way in others:
        ratios = [a / b for a, b in zip(times[ours], times[way], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        print(
            f"{ours} / ({way}): median {quartiles[1]:.3f}, quartiles {quartiles[0]:.3f} to "
            f"{quartiles[2]:.3f}"
        )


if __name__ == "__main__":
    main()
