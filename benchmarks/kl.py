"""The divergence over a large queue: streamed in chunks against all similarities at once.

    PYTHONPATH=. python benchmarks/kl.py            ratios at B = 256, K = 131 072, D = 512
    PYTHONPATH=. python benchmarks/kl.py 1048576    one ISD step with a queue of that size

Time: pairs in one process, in turn. Memory: by how much each form makes the peak of a process of
its own grow, without oneDNN, whose allocator keeps what is freed and so would hide it.
"""

import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf

import isd_tf
from isd_tf.methods import losses

BATCH, QUEUE, DIMENSION, PAIRS = 256, 131_072, 512, 10
FORMS = {"at once": losses._compare_at_once, "in chunks": losses._compare_in_chunks}


def unit_rows(count, seed):
    return tf.math.l2_normalize(tf.random.stateless_normal([count, DIMENSION], [seed, 0]), axis=1)


def loss_and_gradient(form):
    compare = FORMS[form]

    @tf.function
    def run(student, teacher, anchors):
        with tf.GradientTape() as tape:
            tape.watch(student)
            result = compare(student, teacher, anchors, 0.1, 0.01, 5)
            loss = tf.reduce_mean(result.divergence)
        return loss, tape.gradient(loss, student), result.student_entropy, result.nearest

    return run


def mebibytes(what):
    """VmRSS, what the process holds, or VmHWM, the most that it held."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(what))
    return int(line.split()[1]) / 1024


def measure_memory(form):
    loss_and_gradient(form)(unit_rows(8, 0), unit_rows(8, 1), unit_rows(64, 2))
    # Piece by piece, so that making the anchors leaves no higher peak behind.
    variable = tf.Variable(tf.zeros([QUEUE, DIMENSION]))
    for first in range(0, QUEUE, 1024):
        variable[first : first + 1024].assign(unit_rows(1024, first))
    inputs = unit_rows(BATCH, 0), unit_rows(BATCH, 1), tf.identity(variable)
    before = mebibytes("VmRSS")
    loss_and_gradient(form)(*inputs)
    print(mebibytes("VmHWM") - before)


def compare_forms():
    inputs = unit_rows(BATCH, 0), unit_rows(BATCH, 1), unit_rows(QUEUE, 2)
    runs = {form: loss_and_gradient(form) for form in FORMS}

    def seconds(form):
        start = time.perf_counter()
        runs[form](*inputs)[0].numpy()
        return time.perf_counter() - start

    for form in FORMS:
        seconds(form)
    ratios = []
    for i in range(PAIRS):
        order = list(FORMS) if i % 2 else list(FORMS)[::-1]
        times = {form: seconds(form) for form in order}
        ratios.append(times["in chunks"] / times["at once"])
    quartiles = statistics.quantiles(ratios, n=4)
    print(
        f"time, in chunks / at once: median {quartiles[1]:.2f}, quartiles {quartiles[0]:.2f} to "
        f"{quartiles[2]:.2f}, {PAIRS} pairs"
    )
    peaks = {}
    for form in FORMS:
        command = [sys.executable, __file__, "--memory", form]
        environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": "0"}
        child = subprocess.run(command, capture_output=True, text=True, env=environment)
        peaks[form] = float(child.stdout)
    share = peaks["in chunks"] / peaks["at once"]
    print(f"peak memory in MiB: {peaks}, in chunks / at once: {share:.3f}")


def run_step(queue_size):
    encoder = keras.Sequential([keras.Input((DIMENSION,)), keras.layers.Dense(DIMENSION)])
    model = isd_tf.ISD(encoder, None, None, queue_size)
    model.compile(isd_tf.TorchSGD(0.01))
    step = tf.function(model.train_step)
    batch = {"teacher_view": unit_rows(BATCH, 0), "student_view": unit_rows(BATCH, 1)}
    for _ in range(2):
        start = time.perf_counter()
        loss = float(step(batch)["loss"])
        print(f"loss {loss:.4f}, {time.perf_counter() - start:.1f} s")
    print(f"peak of the process: {mebibytes('VmHWM') / 1024:.1f} GiB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        measure_memory(sys.argv[2])
    elif sys.argv[1:]:
        run_step(int(sys.argv[1]))
    else:
        compare_forms()
