"""Seconds a step with --precision, --compile and --steps_per_execution against without.

    PYTHONPATH=. python benchmarks/options.py [PAIRS]

Calls of the train function alternate in one process, and the ratio is taken pair by pair: ISD,
ResNet-18, 32x32, batch 64, queue of 16 384. mixed_float16 is left out: it is for
GPUs, and had not ended here after minutes.
"""

import os
import statistics
import sys
import time

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf

import isd_tf

BATCH, SIZE, QUEUE = 64, 32, 16_384
OPTIONS = {
    "float32": {},
    "mixed_bfloat16": {"precision": "mixed_bfloat16"},
    "compile": {"jit_compile": True},
    "steps_per_execution=4": {"steps_per_execution": 4},
}


def make(precision="float32", steps_per_execution=1, jit_compile=False):
    """Returns a function that takes some steps and returns the seconds of one."""
    keras.config.set_dtype_policy(precision)
    encoder = isd_tf.build_encoder("resnet18", SIZE)
    model = isd_tf.ISD(encoder, *isd_tf.isd_heads(512), queue_size=QUEUE)
    settings = dict(steps_per_execution=steps_per_execution, jit_compile=jit_compile)
    model.compile(isd_tf.TorchSGD(0.01), **settings)
    views = tf.random.stateless_normal([2, BATCH, SIZE, SIZE, 3], [0, 0])
    batch = {"teacher_view": views[0], "student_view": views[1]}
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    train = model.make_train_function()

    def seconds():
        start = time.perf_counter()
        train(batches)["loss"].numpy()
        return (time.perf_counter() - start) / steps_per_execution

    seconds()  # compiles
    return seconds


def main(pairs):
    plain = make()
    for name, option in OPTIONS.items():
        with_option = make(**option)
        ratios = []
        for i in range(pairs):
            # Whichever comes second finds warmer caches: take turns.
            first, second = (with_option, plain) if i % 2 else (plain, with_option)
            a, b = first(), second()
            ratios.append(a / b if i % 2 else b / a)
        quartiles = statistics.quantiles(ratios, n=4)
        print(
            f"{name} / float32: median {quartiles[1]:.2f}, quartiles {quartiles[0]:.2f} to "
            f"{quartiles[2]:.2f}, {pairs} pairs",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
