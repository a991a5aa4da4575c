"""One ISD step against its encoders' convolutions alone, and these against a product of matrices.

    PYTHONPATH=. python benchmarks/convolutions.py [ROUNDS]

A step's convolutions run forward for student and teacher, and backward for the student, by weights
and, but for the first, by inputs. Alone, they run in one graph on ready tensors of the same shapes.
How many operations a second they do is compared with a product of two large matrices, about the
most that the machine does. All take turns in one process.
"""

import math
import os
import statistics
import sys
import time

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import isd_tf
from isd_tf.networks.heads import HEADS

QUEUE = 16_384
SIDE = 4096  # of the two matrices
# encoder, image size, batch, heads: the steps of `make benchmark`.
STEPS = (
    ("resnet18", 32, 64, "isd"),
    ("resnet18", 224, 32, "isd"),
    ("resnet50", 224, 16, "isd_plus"),
)


def bare_convolutions(model, batch):
    """A graph of all convolutions of a step of `model` and nothing else."""
    students, teachers = (
        [layer for layer in encoder.layers if isinstance(layer, keras.layers.Conv2D)]
        for encoder in (model.student_encoder, model.teacher_encoder)
    )
    # Tensors of each layer's own, or TensorFlow would compute what is the same only once.
    inputs = [tf.random.normal([batch, *layer.input.shape[1:]]) for layer in students]
    gradients = [tf.random.normal([batch, *layer.output.shape[1:]]) for layer in students]

    @tf.function
    def run(inputs, gradients):
        results = []
        for i, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
            x, dy, kernel = inputs[i], gradients[i], student.kernel.value
            how = dict(strides=[1, *student.strides, 1], padding=student.padding.upper())
            for weights in (kernel, teacher.kernel.value):
                results.append(tf.nn.conv2d(x, weights, **how))
            results.append(
                tf.raw_ops.Conv2DBackpropFilter(
                    input=x, filter_sizes=kernel.shape, out_backprop=dy, **how
                )
            )
            if i:
                results.append(
                    tf.raw_ops.Conv2DBackpropInput(
                        input_sizes=x.shape, filter=kernel, out_backprop=dy, **how
                    )
                )
        # So that none is left out.
        return tf.add_n([result[0, 0, 0, 0] for result in results])

    return lambda: run(inputs, gradients).numpy()


def operations(model, batch):
    """Multiplications and additions of `bare_convolutions`, but for those with zeros beside it."""
    layers = [x for x in model.student_encoder.layers if isinstance(x, keras.layers.Conv2D)]
    once = [2 * batch * inside(x) ** 2 * math.prod(x.kernel.shape[2:]) for x in layers]
    return 4 * sum(once) - once[0]


def inside(layer):
    """Pairs, along one axis of square images, of an output and a pixel of the image under it."""
    size, (kernel, _), (stride, _) = layer.input.shape[1], layer.kernel_size, layer.strides
    margin = kernel // 2 if layer.padding == "same" else 0
    firsts = stride * np.arange(layer.output.shape[1]) - margin
    return int(np.sum(np.minimum(firsts + kernel, size) - np.maximum(firsts, 0)))


def product_of_matrices():
    factors = tf.random.normal([2, SIDE, SIDE])
    product = tf.function(lambda: tf.matmul(*tf.unstack(factors))[0, 0])
    return lambda: product().numpy()


def isd_step(model, batch, size):
    model.compile(isd_tf.TorchSGD(0.01))
    views = tf.random.stateless_normal([2, batch, size, size, 3], [0, 0])
    data = {"teacher_view": views[0], "student_view": views[1]}
    step = tf.function(model.train_step)
    return lambda: step(data)["loss"].numpy()


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(rounds):
    for name, size, batch, heads in STEPS:
        encoder = isd_tf.build_encoder(name, size)
        model = isd_tf.ISD(encoder, *HEADS[heads](encoder.output_shape[-1]), QUEUE)
        works = isd_step(model, batch, size), bare_convolutions(model, batch), product_of_matrices()
        for work in works:
            work()  # compiles
        times = [[seconds(work) for work in works] for _ in range(rounds)]
        steps, bares, products = zip(*times, strict=True)
        shares = [bare / step for step, bare in zip(steps, bares, strict=True)]
        rate, most = operations(model, batch) / min(bares) / 1e9, 2 * SIDE**3 / min(products) / 1e9
        print(
            f"{name}, {size}x{size}, batch {batch}: step {min(steps):.3f} s, convolutions alone "
            f"{min(bares):.3f} s (best of {rounds}), their share {min(bares) / min(steps):.2f}, "
            f"median of rounds {statistics.median(shares):.2f}; {rate:.0f} billion operations a "
            f"second, in a product of matrices {most:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
