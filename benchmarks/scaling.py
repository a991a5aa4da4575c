"""Bytes and seconds of a step: the formulas of docs/scaling.md, and measurements to hold them to.

    PYTHONPATH=. python benchmarks/scaling.py --predict    ResNet-50 ISD+ on ImageNet, on GPUs: the
                                                           document's tables, by calculation alone
    PYTHONPATH=. python benchmarks/scaling.py              what can be measured on a CPU, 4 minutes

The measurements run in processes of their own, which take turns: one device, two logical devices,
and two workers on this machine. Ratios and differences are taken round by round.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "experiments"))

import keras
import launch
import numpy as np
import tensorflow as tf

import isd_tf
from isd_tf.methods import losses
from isd_tf.training import distribution

ROOT = pathlib.Path(__file__).resolve().parent.parent
BATCH_NORMS = ("local", "shuffled", "synchronized")  # "local" is for comparison: no flag has it.

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
    streamed = own * queue >= losses.STREAMED_FROM
    gathers = replicas > 1 and batch_norm == "shuffled"
    return {
        # Where they are exchanged, also in one piece before and after.
        "gradients": 4 * net.trainable * (3 if replicas > 1 else 1),
        "anchors as read": 4 * queue * dimension,
        # About seven at a time, by benchmarks/kl.py's 896 MB; streamed, 74 MB at b = 256.
        "similarities": 290_000 * own if streamed else 7 * 4 * own * queue,
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


# Two 224x224 crops from a JPEG: docs/performance.md, make benchmark ONLY=views_224_host.
PAIRS_PER_CORE = 234
VIEW_PASSES = 20  # over float32 views on the device, about: docs/performance.md, section 4
IMAGES = 1_281_167  # of ImageNet's train split
IMAGE_BYTES = 110_000  # an ImageNet JPEG, on average
GPUS_PER_MACHINE = 8
TF32, MIXED = 909, 2375
NVLINK, ETHERNET, GRPC = 300e9, 12.5e9, 1.5e9
IN_MACHINE, BETWEEN = 30e-6, 150e-6
# A ring of 64 takes 2 * 63 hops to add up, here 0.15 ms each in a process and 0.75 between two.
BETWEEN_GRPC = 126 * (7 / 8 * 0.15e-3 + 1 / 8 * 0.75e-3)
GATHER_WAIT = 1.5  # small all-reduces, with the gather of shapes before it: measured here


def step_seconds(
    net: Sizes, queue: int, dimension: int, batch: int, side: int, replicas: int, batch_norm: str,
    machines: Machines,
) -> dict[str, float]:  # fmt: skip
    """Seconds of a step's parts. They add up: the gradients leave in one piece, after the last."""
    own, rows = batch // replicas, 4 * queue * dimension
    student, teacher = net.multiply_adds
    # Supervised training is one pass forward and two backward; the teacher adds one forward.
    compute = own / machines.supervised * (3 * student + teacher) / (3 * student)
    products, reads = (4, 2) if own * queue >= losses.STREAMED_FROM else (3, 3)
    parts = {
        "views": VIEW_PASSES * 2 * 12 * side**2 * own / machines.memory,
        "networks": compute,
        # Copied once, then read by each product.
        "queue and KL": (2 + reads) * rows / machines.memory
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


# ---------------------------------------------------------------------------------- measurement

QUEUE = 4096
SETTINGS = {  # With ISD's heads: encoder, width, S, B. One computes much, the other tells much.
    "computing": ("resnet18", 32, 96, 32),
    "telling": ("tiny_resnet", 16, 224, 32),
}
CHAIN = 10  # collective operations in one call, so that the call itself counts for little
MESSAGE_BYTES = (256, 2**16, 2**20, 2**22, 2**25)
QUEUE_SIZES = (8192, 32_768, 131_072)
ROUNDS, STEPS = 10, 3


def networks(setting, synchronized=False):
    name, width, side, _ = SETTINGS[setting]
    encoder = isd_tf.build_encoder(name, side, width, synchronized)
    return encoder, *isd_tf.isd_heads(encoder.output_shape[-1], synchronized)


def serve():
    """A process that is told by lines on stdin what to time, and answers in seconds."""
    kind = sys.argv[2]
    if kind == "mirrored":
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
        )
    strategy = distribution.choose_strategy(kind, os.environ.get("TF_CONFIG", ""), 120)
    work = Work(strategy)
    for line in sys.stdin:
        what, argument = json.loads(line)
        print(json.dumps(getattr(work, what)(argument)), flush=True)
    os._exit(0)  # Without waiting for the other worker.


class Work:
    def __init__(self, strategy):
        self.strategy = strategy
        self.made = {}

    def remembered(self, name, make):
        if name not in self.made:
            self.made[name] = make()
            self.made[name]()  # compiles
        return self.made[name]

    def step(self, setting_and_batch_norm):
        name = " ".join(setting_and_batch_norm)
        run = self.remembered(name, lambda: self.make_step(*setting_and_batch_norm))
        return seconds(lambda: [run() for _ in range(STEPS)]) / STEPS

    def make_step(self, setting, batch_norm):
        *_, side, batch_size = SETTINGS[setting]
        own = batch_size // self.strategy.num_replicas_in_sync
        with self.strategy.scope():
            model = isd_tf.ISD(
                *networks(setting, batch_norm == "synchronized"),
                queue_size=QUEUE,
                shuffle_batch_norm=batch_norm == "shuffled",
            )
            model.compile(isd_tf.TorchSGD(0.01))
        crops, seeds = random_crops(own, side)
        batch = {
            "teacher_view": {"weak": (crops, seeds)},
            "student_view": {"strong": (crops, seeds)},
            "label": tf.range(own, dtype=tf.int64),
        }
        batches = self.strategy.distribute_datasets_from_function(
            lambda _: tf.data.Dataset.from_tensors(batch).repeat()
        )
        iterator, train = iter(batches), model.make_train_function()
        return lambda: train(iterator)["loss"].numpy()

    def collective(self, operation_and_size):
        operation, size = operation_and_size
        run = self.remembered(f"{operation} {size}", lambda: self.make_chain(operation, size))
        return seconds(run) / CHAIN

    def make_chain(self, operation, size):
        count = size // 4
        if operation == "gather":
            count //= self.strategy.num_replicas_in_sync
        with self.strategy.scope():
            values = tf.Variable(tf.zeros([count]))

        def chain():
            x = tf.zeros([])
            for _ in range(CHAIN):
                told = values + x
                if operation == "gather":
                    told = distribution.gather_across_replicas(told)
                else:
                    told = distribution.mean_over_replicas(told)
                x = told[0]
            return x

        run = tf.function(lambda: self.strategy.run(chain))
        return lambda: self.strategy.experimental_local_results(run())[0].numpy()

    def shuffle(self, _):
        """Shuffle-BN around a network that does next to nothing."""

        def make():
            *_, side, batch = SETTINGS["telling"]
            own = batch // self.strategy.num_replicas_in_sync
            with self.strategy.scope():
                crops, seeds = (tf.Variable(x) for x in random_crops(own, side))

            def shuffled():
                first_pixels = distribution.call_shuffled(
                    lambda view: tf.cast(view[0][:, 0, 0], tf.float32),
                    (tf.convert_to_tensor(crops), tf.convert_to_tensor(seeds)),
                    tf.constant([0, 0]),
                )
                return first_pixels[0, 0]

            run = tf.function(lambda: self.strategy.run(shuffled))
            return lambda: self.strategy.experimental_local_results(run())[0].numpy()

        return seconds(self.remembered("shuffle", make))

    def forward(self, _):
        def make():
            *_, side, batch = SETTINGS["computing"]
            encoder, images = networks("computing")[0], tf.zeros([batch, side, side, 3])
            function = tf.function(lambda: tf.reduce_sum(encoder(images, training=True)))
            return lambda: function().numpy()

        return seconds(self.remembered("forward", make))

    def read_queue(self, size):
        def make():
            queue = isd_tf.FeatureQueue(size, 256)
            # One column of what was read, so that reading is what takes the time.
            function = tf.function(lambda: queue.read_anchors()[:, 0])
            return lambda: function().numpy()

        return seconds(self.remembered(f"queue {size}", make))


def random_crops(count, side):
    """The host's half of a view: uint8 [b, S, S, 3] and seeds [b, 2]."""
    crops = np.random.default_rng(0).integers(0, 256, [count, side, side, 3], np.uint8)
    return tf.constant(crops), tf.constant(np.arange(2 * count).reshape(count, 2))


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Server:
    """One process that serves, or several workers that are told the same at the same time."""

    def __init__(self, kind, workers=1):
        addresses = launch.free_addresses(workers)
        self.errors = tempfile.TemporaryFile("w+")
        self.processes = []
        for index in range(workers):
            task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            if workers > 1:
                environment["TF_CONFIG"] = json.dumps(task)
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, "--serve", kind],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.errors,
                    text=True,
                )
            )

    def ask(self, what, argument=None):
        for process in self.processes:
            process.stdin.write(json.dumps([what, argument]) + "\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in self.processes]
        if not all(answers):
            self.errors.seek(0)
            codes = [process.poll() for process in self.processes]
            raise RuntimeError(f"A process has ended {codes}: {self.errors.read()[-2000:]}")
        return max(json.loads(answer) for answer in answers)

    def end(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def in_turn(questions):
    """Asks everything once for warmth and then ROUNDS times; returns all answers by question."""
    answers = {name: [] for name in questions}
    for name in questions:
        questions[name]()
    order = list(questions)
    for _ in range(ROUNDS):
        order = order[1:] + order[:1]
        for name in order:
            answers[name].append(questions[name]())
    return answers


def quartiles(values, form="{:.2f}"):
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{form.format(middle)} ({form.format(low)} to {form.format(high)})"


def fit(times):
    """(a, bandwidth) of t = a + bytes / bandwidth; small messages count as much as large ones."""
    size = np.array(list(times), float)
    t = np.array([statistics.median(values) for values in times.values()])
    matrix = np.stack([np.ones_like(size), size], axis=1) / t[:, np.newaxis]
    a, slope = np.linalg.lstsq(matrix, np.ones_like(t), rcond=None)[0]
    error = max(abs(a + slope * size - t) / t)
    return max(a, 0), 1 / slope, error


def measure():
    servers = {
        "one device": Server("one"),
        "two logical devices": Server("mirrored"),
        "two workers": Server("multi_worker", 2),
    }
    try:
        measure_with(servers)
    finally:
        for server in servers.values():
            server.end()


def measure_with(servers):
    one, *several = servers

    def asking(server, what, argument=None):
        return lambda: servers[server].ask(what, argument)

    # Networks that compute much: what sharing the batch costs where computing is shared as well.
    steps = in_turn(
        {server: asking(server, "step", ("computing", "local")) for server in servers}
        | {"forward": asking(one, "forward")}
    )

    def ratio(this, other):
        pairs = zip(steps[this], steps[other], strict=True)
        return quartiles([a / b for a, b in pairs])

    print(f"Median (quartiles) of {ROUNDS} rounds. Encoder, width, S, B: {SETTINGS}, K = {QUEUE}")
    print(f"computing, one device: {1e3 * statistics.median(steps[one]):.0f} ms a step")
    print(f"  step / encoder forward: {ratio(one, 'forward')}")
    for server in several:
        print(f"  {server} / one device: {ratio(server, one)}")
    print(f"  {several[1]} / {several[0]}: {ratio(*several[::-1])}")
    for server in several:
        measure_messages(server, asking)

    reads = in_turn({size: asking(one, "read_queue", size) for size in QUEUE_SIZES})
    a, bandwidth, error = fit({2 * 4 * 256 * size: times for size, times in reads.items()})
    shown = ", ".join(f"{1e3 * statistics.median(times):.2f}" for times in reads.values())
    print(f"queue read, K = {QUEUE_SIZES}, D = 256: {shown} ms")
    print(f"  fit {1e3 * a:.2f} ms + 8 K D bytes / {bandwidth / 1e9:.1f} GB/s, off by {error:.0%}")


def measure_messages(server, asking):
    """Fits seconds to bytes, and holds the fit to what Shuffle-BN and synchronising add."""
    operations = ("gather", "reduce")
    times = in_turn(
        {
            (operation, size): asking(server, "collective", (operation, size))
            for operation in operations
            for size in MESSAGE_BYTES
        }
    )
    fits = {}
    for operation in operations:
        of_sizes = {size: times[operation, size] for size in MESSAGE_BYTES}
        fits[operation] = a, bandwidth, error = fit(of_sizes)
        shown = ", ".join(f"{1e3 * statistics.median(x):.2f}" for x in of_sizes.values())
        print(f"{server}, {operation} of {MESSAGE_BYTES} bytes: {shown} ms")
        print(f"  fit {1e3 * a:.2f} ms + bytes / {bandwidth / 1e9:.2f} GB/s, off by {error:.0%}")

    steps = in_turn(
        {x: asking(server, "step", ("telling", x)) for x in BATCH_NORMS}
        | {"shuffle": asking(server, "shuffle")}
    )
    encoder, *heads = networks("telling")
    net, (*_, side, batch) = sizes(encoder, *heads), SETTINGS["telling"]

    def told(batch_norm):
        operations = messages(net, encoder.output_shape[-1], batch, side, batch_norm).values()
        return sum(count * fits[x][0] + size / fits[x][1] for x, count, size in operations)

    local = steps["local"]
    print(f"telling, {server}, local: {1e3 * statistics.median(local):.0f} ms a step")
    for batch_norm in BATCH_NORMS[1:]:
        more = [1e3 * (a - b) for a, b in zip(steps[batch_norm], local, strict=True)]
        formula = 1e3 * (told(batch_norm) - told("local"))
        print(f"  {batch_norm} - local: {quartiles(more, '{:.0f}')} ms; formula {formula:.0f} ms")
    alone = [1e3 * x for x in steps["shuffle"]]
    print(f"  Shuffle-BN without networks: {quartiles(alone, '{:.0f}')} ms")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve()
    elif sys.argv[1:2] == ["--predict"]:
        print("\n\n".join(tables()))
    else:
        measure()
