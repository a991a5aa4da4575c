"""Holds the formulas of scaling.py to what can be measured on a CPU, in 3 minutes.

    PYTHONPATH=. python benchmarks/scaling_measured.py

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

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "experiments"))

import launch
import numpy as np
import scaling
import tensorflow as tf

import isd_tf
from isd_tf.training import distribution

ROOT = pathlib.Path(__file__).resolve().parent.parent
BATCH_NORMS = ("local", "shuffled", "synchronized")  # "local" is for comparison: no flag has it.

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
    # What the package prints, as when workers find each other, is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kind = sys.argv[2]
    if kind == "mirrored":
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
        )
    strategy = distribution.choose_strategy(kind, os.environ.get("TF_CONFIG", ""), 120)
    work = Work(strategy)
    for line in sys.stdin:
        what, argument = json.loads(line)
        print(json.dumps(getattr(work, what)(argument)), file=answers, flush=True)
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
            # No variables: TensorFlow cannot tell a uint8 one's first value to other workers.
            crops_and_seeds = random_crops(batch // self.strategy.num_replicas_in_sync, side)

            def shuffled():
                first_pixels = distribution.call_shuffled(
                    lambda view: tf.cast(view[0][:, 0, 0], tf.float32),
                    crops_and_seeds,
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
    net, (*_, side, batch) = scaling.sizes(encoder, *heads), SETTINGS["telling"]

    def told(batch_norm):
        messages = scaling.messages(net, encoder.output_shape[-1], batch, side, batch_norm)
        return sum(n * fits[x][0] + size / fits[x][1] for x, n, size in messages.values())

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
    else:
        measure()
