"""Bytes and seconds of a step by formulas: the tables of docs/scaling.md, by calculation alone.

    PYTHONPATH=. python benchmarks/scaling.py    ResNet-50 ISD+ on ImageNet, on GPUs

`scaling_measured.py` holds the formulas to what can be measured on a CPU.
"""

import os
from typing import NamedTuple

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import isd_tf
from isd_tf.methods import losses

# ------------------------------------------------------------------------------------- formulas


class Sizes(NamedTuple):
    """What the formulas need to know of the networks; counts of numbers, not bytes."""

    student: int  # every weight, with BatchNorm's moving statistics and the predictor
    trainable: int  # P: those with a gradient
    teacher: int
    norms: tuple[int, int]  # BatchNorm layers of student and teacher
    channels: tuple[int, int]  # the same, their channels added up
    multiply_adds: tuple[int, int]  # of one image forward through student and teacher
    activations: tuple[int, int]  # of one image: least and most that the student's backward keeps


def sizes(encoder, projector, predictor) -> Sizes:
    teacher = [network for network in (encoder, projector) if network]
    student = teacher + [network for network in (predictor,) if network]

    def layers(networks, kind):
        return [x for network in networks for x in network.layers if isinstance(x, kind)]

    def channels(networks):
        return sum(x.gamma.shape[0] for x in layers(networks, keras.layers.BatchNormalization))

    def multiply_adds(networks):
        kinds = keras.layers.Conv2D, keras.layers.Dense
        places = [np.prod(x.output.shape[1:-1], dtype=int) for x in layers(networks, kinds)]
        kernels = [np.prod(x.kernel.shape) for x in layers(networks, kinds)]
        return int(np.dot(places, kernels))

    def outputs(kind):
        return sum(int(np.prod(x.output.shape[1:])) for x in layers([encoder], kind))

    weights = sum(network.count_params() for network in student)
    return Sizes(
        student=weights,
        trainable=weights - 2 * channels(student),
        teacher=sum(network.count_params() for network in teacher),
        norms=tuple(len(layers(x, keras.layers.BatchNormalization)) for x in (student, teacher)),
        channels=(channels(student), channels(teacher)),
        multiply_adds=(multiply_adds(student), multiply_adds(teacher)),
        activations=(
            outputs((keras.layers.Conv2D, keras.layers.BatchNormalization)),
            outputs(keras.layers.Layer),
        ),
    )


def variable_bytes(net: Sizes, queue: int, dimension: int) -> dict[str, int]:
    """Bytes of every replica's variables."""
    return {
        "student": 4 * net.student,
        "teacher": 4 * net.teacher,
        "optimizer": 4 * net.trainable + 12,  # its count of steps and its learning rate
        "queue": (4 * dimension + 8) * queue + 8,  # rows, labels, pointer
        "step": 8,
    }


def passing_bytes(net: Sizes, queue: int, dimension: int, batch: int, side: int, replicas: int,
                  batch_norm: str) -> dict[str, int]:  # fmt: skip
    """Bytes of what a replica holds for a while in each step, without activations."""
    own = batch // replicas
    crop, seed, view = 3 * side**2, 16, 12 * side**2  # uint8, two int64, float32
    # Matrices at a time, least and most: docs/scaling.md, section 1.
    if own * queue >= losses.STREAMED_FROM:
        least, most, matrix = 18, 21, 4 * 2 * own * losses.CHUNK
    else:
        least, most, matrix = 5, 10, 4 * own * queue
    gathers = replicas > 1 and batch_norm == "shuffled"
    return {
        # Where they are exchanged, also in one piece before and after.
        "gradients": 4 * net.trainable * (3 if replicas > 1 else 1),
        "anchors as read": 4 * queue * dimension,
        "similarities, least": least * matrix,
        "similarities, most": most * matrix,
        "crops and seeds": 2 * (crop + seed) * own,
        "views": 2 * view * own,
        # What arrives, put together, sorted by replica, and this replica's part of it.
        "crops gathered": (crop + seed) * (3 * batch + own) if gathers else 0,
    }


def messages(
    net: Sizes, dimension: int, batch: int, side: int, batch_norm: str, labelled: bool = True
) -> dict[str, tuple[str, int, int]]:
    """What several replicas tell each other in a step.

    Returns:
        (operation, how many, bytes of all together) by name. The bytes are those of the result,
        which is the same on every replica: the whole of a gather, one copy of a sum.
    """
    student, teacher = net.channels
    shuffled = batch_norm == "shuffled"
    told = {
        "gradients": ("reduce", 1, 4 * net.trainable),
        "logs": ("reduce", 1, 4 * (6 + labelled)),
        "embeddings": ("gather", 1 + shuffled, 4 * dimension * batch * (1 + shuffled)),
    }
    if labelled:
        told["labels"] = ("gather", 1, 8 * batch)
    if shuffled:
        told["images"] = ("gather", 1, 3 * side**2 * batch)  # The host's crops, uint8.
        told["seeds"] = ("gather", 1, 16 * batch)
    if batch_norm == "synchronized":
        # Forward sum, sum of squares and count; backward, by the student, two of them.
        count = 3 * sum(net.norms) + 2 * net.norms[0]
        told["BatchNorm"] = ("reduce", count, 4 * (3 * (student + teacher) + 2 * student))
    return told


def received(operation: str, size: int, replicas: int) -> float:
    """Bytes that a ring brings to each replica."""
    return {"gather": 1, "reduce": 2}[operation] * size * (replicas - 1) / replicas


# ----------------------------------------------------------------------------------- prediction


class Machines(NamedTuple):
    """Assumed, not measured: see docs/scaling.md, section 6."""

    supervised: float  # images/s of one GPU that trains ResNet-50 with labels
    link: float  # bytes/s that a ring gets through its narrowest place
    latency: float  # seconds of a small all-reduce
    memory: float = 1.2e12  # bytes/s of a GPU's memory
    matmul: float = 5e13  # operations a second of float32 matrix products (TF32)


# A JPEG decoded, cropped twice to 224x224 and handed over: 0.65 and 0.92 core-milliseconds by a run
# of benchmarks/cost.py pair; docs/performance.md, section 2.
PAIRS_PER_CORE = 1000 / (0.65 + 0.92)
VIEW_PASSES = 20  # over float32 views on the device, about: docs/performance.md, section 4
IMAGES = 1_281_167  # of ImageNet's train split
IMAGE_BYTES = 110_000  # an ImageNet JPEG, on average
GPUS_PER_MACHINE = 8
TF32, MIXED = 909, 2375
NVLINK, ETHERNET, GRPC = 300e9, 12.5e9, 1.5e9
IN_MACHINE, BETWEEN = 30e-6, 150e-6
# A ring of 64 takes 2 * 63 hops to add up, here 0.15 ms each in a process and 0.75 between two.
BETWEEN_GRPC = 126 * (7 / 8 * 0.15e-3 + 1 / 8 * 0.75e-3)
# Small sums, with the gather of shapes before it: 1.6 between logical devices, measured here.
GATHER_WAIT = 1.5


def step_seconds(
    net: Sizes, queue: int, dimension: int, batch: int, side: int, replicas: int, batch_norm: str,
    machines: Machines,
) -> dict[str, float]:  # fmt: skip
    """Seconds of a step's parts. They add up: the gradients leave in one piece, after the last."""
    own, rows = batch // replicas, 4 * queue * dimension
    student, teacher = net.multiply_adds
    # Supervised training is one pass forward and two backward; the teacher adds one forward.
    compute = own / machines.supervised * (3 * student + teacher) / (3 * student)
    # Of the matrices [b, K], each operation's reads and writes: docs/scaling.md, section 3.
    products, passes = (4, 32) if own * queue >= losses.STREAMED_FROM else (3, 39)
    parts = {
        "views": VIEW_PASSES * 2 * 12 * side**2 * own / machines.memory,
        "networks": compute,
        # Read and written for a copy, which is then read twice: once for the products of both
        # sides, once to weight the anchors.
        "queue and KL": (4 * rows + passes * 4 * own * queue) / machines.memory
        + 2 * products * own * queue * dimension / machines.matmul,
        # Optimizer: weight and buffer read and written, gradient read. Teacher: two read, one
        # written.
        "updates": (5 + 3) * 4 * net.trainable / machines.memory,
    }
    for name, (operation, count, size) in messages(net, dimension, batch, side, batch_norm).items():
        if replicas > 1:
            wait = machines.latency * (GATHER_WAIT if operation == "gather" else 1)
            parts[name] = count * wait + received(operation, size, replicas) / machines.link
    return parts


SCENARIOS = {  # GPUs, B, batch_norm, machines
    "A": (8, 256, "shuffled", Machines(TF32, NVLINK, IN_MACHINE)),
    "B": (8, 256, "shuffled", Machines(MIXED, NVLINK, IN_MACHINE)),
    "C": (8, 256, "synchronized", Machines(MIXED, NVLINK, IN_MACHINE)),
    "D": (64, 256, "shuffled", Machines(MIXED, ETHERNET, BETWEEN)),
    "E": (64, 2048, "shuffled", Machines(MIXED, ETHERNET, BETWEEN)),
    "F": (64, 2048, "synchronized", Machines(MIXED, ETHERNET, BETWEEN)),
    "G": (64, 2048, "shuffled", Machines(MIXED, GRPC, BETWEEN_GRPC)),
    "H": (64, 2048, "synchronized", Machines(MIXED, GRPC, BETWEEN_GRPC)),
}


def tables() -> list[str]:
    """The tables of docs/scaling.md, as they stand there."""
    queue, side = 128_000, 224
    encoder = isd_tf.build_encoder("resnet50", side)
    networks = (encoder, *isd_tf.isd_plus_heads(encoder.output_shape[-1]))
    dimension = networks[-1].output_shape[-1]
    net = sizes(*networks)

    def table(title, columns, form):
        names = list(dict.fromkeys(row for column in columns.values() for row in column))
        names.sort(key="sum".__eq__)  # to the end
        width = max(8, *(len(name) + 2 for name in columns))
        lines = [f"{title:24}" + "".join(f"{name:>{width}}" for name in columns)]
        for name in names:
            values = (column.get(name, 0) for column in columns.values())
            lines.append(f"{name:24}" + "".join(f"{form(x):>{width}}" for x in values))
        return "\n".join(lines)

    def megabytes(x):
        return f"{x / 1e6:.2f}" if x < 1e7 else f"{x / 1e6:.0f}"

    variables = variable_bytes(net, queue, dimension)
    variables["sum"] = sum(variables.values())

    held = {
        f"{gpus} x {batch // gpus}{', sync' * (norm == 'synchronized')}": passing_bytes(
            net, queue, dimension, batch, side, gpus, norm
        )
        | {
            "activations, least": 4 * net.activations[0] * batch // gpus,
            "activations, most": 4 * net.activations[1] * batch // gpus,
        }
        for gpus, batch, norm in (
            (1, 256, "shuffled"),
            (8, 256, "shuffled"),
            (64, 2048, "shuffled"),
            (64, 2048, "synchronized"),
        )
    }

    told, parts, totals = {}, {}, {}
    for letter, (gpus, batch, norm, machines) in SCENARIOS.items():
        if letter in "BCDEF":
            told[letter] = {
                name: received(operation, size, gpus)
                for name, (operation, _, size) in messages(
                    net, dimension, batch, side, norm
                ).items()
            }
        parts[letter] = step_seconds(net, queue, dimension, batch, side, gpus, norm, machines)
        seconds = parts[letter]["sum"] = sum(parts[letter].values())
        rate, hosts = batch / seconds, gpus / GPUS_PER_MACHINE
        totals[letter] = {
            "images/s": rate,
            "hours of 200 epochs": 200 * (IMAGES // batch) * seconds / 3600,
            "cores a host": rate / PAIRS_PER_CORE / hosts,
            "folder, GB/s a host": rate * IMAGE_BYTES / 1e9 / hosts,
            "TFRecord, GB/s a host": rate * IMAGE_BYTES / 1e9,
            "service, GB/s a host": rate * 2 * (3 * side**2 + 16) / 1e9 / hosts,
        }
    return [
        table("variables", {"MB": variables}, megabytes),
        table("held for a while, MB", held, megabytes),
        table("received, MB", told, megabytes),
        table("milliseconds", parts, lambda x: f"{1e3 * x:.1f}" if x < 1 else f"{1e3 * x:.0f}"),
        table("if the hosts keep up", totals, lambda x: f"{x:.0f}" if x >= 100 else f"{x:.1f}"),
    ]


if __name__ == "__main__":
    print("\n\n".join(tables()))
