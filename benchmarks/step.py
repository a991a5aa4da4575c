"""One ISD step against the same step without queue, KL and teacher update.

    PYTHONPATH=. python benchmarks/step.py

The plain step runs both encoders forward and the student's backward and optimizer alone. Steps
alternate in one process, and the ratio is taken pair by pair: ResNet-18, 32x32, batch 64, queue of
16 384, both heads.
"""

import os
import statistics
import sys
import time

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

import isd_tf
from isd_tf.networks.heads import HEADS

BATCH, SIZE, QUEUE = 64, 32, 16_384


class Plain(isd_tf.StudentTeacher):
    """Both encoders forward, the student backward: no queue, no KL, no teacher update."""

    def train_step(self, batch):
        target = self.embed_teacher(batch["teacher_view"])
        with tf.GradientTape() as tape:
            embeddings = self.embed_student(batch["student_view"])
            loss = tf.reduce_mean(tf.reduce_sum(tf.square(embeddings - target), axis=1))
        self.update_student(tape, loss)
        return {"loss": loss}


def make(kind, heads, **settings):
    encoder = isd_tf.build_encoder("resnet18", SIZE)
    model = kind(encoder, *heads(512), teacher_momentum=0.99, **settings)
    model.compile(isd_tf.TorchSGD(0.01))
    return tf.function(model.train_step)


def seconds(step, batch):
    start = time.perf_counter()
    step(batch)["loss"].numpy()
    return time.perf_counter() - start


def main(pairs):
    views = tf.random.stateless_normal([2, BATCH, SIZE, SIZE, 3], [0, 0])
    batch = {"teacher_view": views[0], "student_view": views[1]}
    labelled = batch | {"label": tf.range(BATCH, dtype=tf.int64)}
    for name, heads in HEADS.items():
        isd = make(isd_tf.ISD, heads, queue_size=QUEUE)
        plain = make(Plain, heads)
        for data, what in ((batch, "no labels"), (labelled, "labels, so purity as well")):
            for step in (isd, plain):
                seconds(step, data)  # compiles
            ratios = []
            for i in range(pairs):
                # Whichever comes second finds warmer caches: take turns.
                first, second = (isd, plain) if i % 2 else (plain, isd)
                a, b = seconds(first, data), seconds(second, data)
                ratios.append(a / b if i % 2 else b / a)
            quartiles = statistics.quantiles(ratios, n=4)
            print(
                f"{name} ({what}): ISD / plain step: median {quartiles[1]:.3f}, "
                f"quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}, {pairs} pairs",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
