"""One ISD step against its encoders alone, against their convolutions, and these against a product.

    PYTHONPATH=. python benchmarks/convolutions.py [ROUNDS]
    PYTHONPATH=. python benchmarks/convolutions.py [ROUNDS] layers

The encoders alone run forward for student and teacher, and backward for the student: no heads, no
similarities, no optimizer, no move of the teacher. Their convolutions alone, backward by weights
and, but for the first, by inputs, run in one graph on ready tensors of the same shapes. How many
operations a second these do is compared with a product of two large matrices, about the most that
the machine does. All take turns in one process.

`layers` times every convolution by itself instead, and sums up by kernel and stride.
"""

import collections
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


def convolutions(encoder):
    return [layer for layer in encoder.layers if isinstance(layer, keras.layers.Conv2D)]


def ready(layer, batch):
    """Numbers in the shapes of the layer's inputs and of the gradient to its outputs."""
    shapes = (batch, *layer.input.shape[1:]), (batch, *layer.output.shape[1:])
    return tuple(tf.random.normal(shape) for shape in shapes)


def forward(layer, x, dy):
    return tf.nn.conv2d(x, layer.kernel.value, **_how(layer))


def to_weights(layer, x, dy):
    return tf.raw_ops.Conv2DBackpropFilter(
        input=x, filter_sizes=layer.kernel.shape, out_backprop=dy, **_how(layer)
    )


def to_inputs(layer, x, dy):
    return tf.raw_ops.Conv2DBackpropInput(
        input_sizes=x.shape, filter=layer.kernel.value, out_backprop=dy, **_how(layer)
    )


def _how(layer):
    return dict(strides=[1, *layer.strides, 1], padding=layer.padding.upper())


def bare_convolutions(model, batch):
    """A graph of all convolutions of a step of `model` and nothing else."""
    students, teachers = map(convolutions, (model.student_encoder, model.teacher_encoder))
    # Tensors of each layer's own, or TensorFlow would compute what is the same only once.
    tensors = [ready(layer, batch) for layer in students]

    @tf.function
    def run(tensors):
        results = []
        for i, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
            results += [part(student, *tensors[i]) for part in (forward, to_weights)]
            results.append(forward(teacher, *tensors[i]))
            if i:
                results.append(to_inputs(student, *tensors[i]))
        # So that none is left out.
        return tf.add_n([result[0, 0, 0, 0] for result in results])

    return lambda: run(tensors).numpy()


def operations(layer, batch):
    """Multiplications and additions of a layer, but for those with zeros beside its images."""
    return 2 * batch * inside(layer) ** 2 * math.prod(layer.kernel.shape[2:])


def inside(layer):
    """Pairs, along one axis of square images, of an output and a pixel of the image under it."""
    (kernel, _), (stride, _) = layer.kernel_size, layer.strides
    margin = kernel // 2
    # Before a stride the zeros are a layer of their own.
    size = layer.input.shape[1] - (2 * margin if layer.padding == "valid" else 0)
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


def encoders_alone(model, batch, size):
    views = tf.random.stateless_normal([2, batch, size, size, 3], [0, 0])
    weights = model.student_encoder.trainable_variables

    @tf.function
    def run(views):
        with tf.GradientTape() as tape:
            features = model.student_encoder(views[1], training=True)
        results = [model.teacher_encoder(views[0], training=True)]
        results += tape.gradient(features, weights)
        # So that none is left out.
        return tf.add_n([tf.reshape(result, [-1])[0] for result in results])

    return lambda: run(views).numpy()


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(rounds):
    for name, size, batch, heads in STEPS:
        encoder = isd_tf.build_encoder(name, size)
        model = isd_tf.ISD(encoder, *HEADS[heads](encoder.output_shape[-1]), QUEUE)
        works = (
            isd_step(model, batch, size),
            encoders_alone(model, batch, size),
            bare_convolutions(model, batch),
            product_of_matrices(),
        )
        for work in works:
            work()  # compiles
        times = [[seconds(work) for work in works] for _ in range(rounds)]
        steps, encoders, bares, products = zip(*times, strict=True)
        of_encoders, of_convolutions = (
            statistics.median(part / step for step, part in zip(steps, parts, strict=True))
            for parts in (encoders, bares)
        )
        counts = [operations(layer, batch) for layer in convolutions(encoder)]
        rate = (4 * sum(counts) - counts[0]) / min(bares) / 1e9
        most = 2 * SIDE**3 / min(products) / 1e9
        print(
            f"{name}, {size}x{size}, batch {batch}: step {min(steps):.3f} s, encoders alone "
            f"{min(encoders):.3f} s, their convolutions alone {min(bares):.3f} s (best of "
            f"{rounds}); shares, medians of rounds, {of_encoders:.3f} and {of_convolutions:.2f}; "
            f"{rate:.0f} billion operations a second, in a product of matrices {most:.0f}",
            flush=True,
        )


def by_layer(rounds):
    product = product_of_matrices()
    for name, size, batch, _ in STEPS:
        sums = collections.defaultdict(lambda: [0.0, 0.0])
        for i, layer in enumerate(convolutions(isd_tf.build_encoder(name, size))):
            parts = {forward: 2, to_weights: 1} | ({to_inputs: 1} if i else {})  # times in a step
            works = [*(alone(part, layer, batch) for part in parts), product]
            for work in works:
                work()  # compiles
            times = [[seconds(work) for work in works] for _ in range(rounds)]
            *bares, whole = (min(each) * 1e3 for each in zip(*times, strict=True))
            as_product = whole * operations(layer, batch) / (2 * SIDE**3)
            for (part, count), bare in zip(parts.items(), bares, strict=True):
                sum_of = sums[layer.kernel_size[0], layer.strides[0], part.__name__]
                sum_of[0] += count * bare
                sum_of[1] += count * as_product
        print(f"{name}, {size}x{size}, batch {batch}: ms, as a product of matrices, their ratio")
        for (kernel, stride, part), (bare, product_ms) in sorted(sums.items()):
            print(
                f"    {kernel}x{kernel}, stride {stride}, {part:10} {bare:7.1f} {product_ms:7.1f} "
                f"{bare / product_ms:5.2f}",
                flush=True,
            )


def alone(part, layer, batch):
    tensors = ready(layer, batch)
    run = tf.function(lambda x, dy: part(layer, x, dy)[0, 0, 0, 0])
    run = run.get_concrete_function(*tensors)
    return lambda: run(*tensors).numpy()


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdecimal()]
    work = by_layer if "layers" in sys.argv else main
    work(*numbers[:1] or [10])
