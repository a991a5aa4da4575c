"""Memory of the kNN evaluation with a bank of ImageNet's size.

    PYTHONPATH=. python benchmarks/knn_memory.py [QUERIES]

1 281 167 made-up features of 2048 numbers (10.5 GB) stream past the queries (2000 by default;
ImageNet has 50 000, whose features take 0.4 GB). Prints the process's peak.
"""

import os
import resource
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

import isd_tf

BANK, FEATURES, CLASSES, BATCH = 1_281_167, 2048, 1000, 4096


def features(count, seed):
    """Batches of (features, labels): a class's centre, and noise."""

    def make(first):
        rows = tf.range(first, tf.minimum(first + BATCH, count))
        labels = rows % CLASSES
        key = tf.stack([tf.constant(seed, tf.int64), first])
        noise = tf.random.stateless_normal([tf.size(rows), FEATURES], key)
        return tf.gather(centres, labels) + 3.0 * noise, labels

    centres = tf.random.stateless_normal([CLASSES, FEATURES], [0, 0])
    return tf.data.Dataset.range(0, count, BATCH).map(make).prefetch(1)


def peak_gigabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(queries):
    print(f"peak before: {peak_gigabytes():.2f} GB")
    start = time.perf_counter()
    scores = isd_tf.knn_accuracy({"made_up": tf.identity}, features(BANK, 1), features(queries, 2))
    print(f"{scores}, {time.perf_counter() - start:.0f} s, peak: {peak_gigabytes():.2f} GB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
