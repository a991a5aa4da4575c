"""What a step and a pair of views cost: by their parts, and against K, B, image size and images.

    PYTHONPATH=. python benchmarks/cost.py step    parts of three steps, a minute
    PYTHONPATH=. python benchmarks/cost.py pair    parts of a pair of views
    PYTHONPATH=. python benchmarks/cost.py axes    tables of costs, and docs/performance.svg

The parts of a step are those of TensorFlow's profiler, with its operations one after the other on
all cores. The parts of a pair are differences: decoding alone, all that tf.data does, all of it;
in Python or in the graph, as `looks` has it.
"""

import collections
import os
import pathlib
import statistics
import sys
import tempfile
import time

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import against_pytorch
import keras
import matplotlib.pyplot as plt
import numpy as np
import race
import race_isd_tf
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

import isd_tf
from isd_tf.data import crop_processes, looks, python_calls
from isd_tf.views import python_crops

PICTURE = pathlib.Path(__file__).parent.parent / "docs" / "performance.svg"
STEPS = 5
BASE = against_pytorch.ROWS["step_resnet18_32"].sizes
# By axis its title and values. One varies, the others stay as in BASE.
AXES = {
    "queue_size": ("anchors K", [2**10, 2**12, 2**14, 2**16, 2**18, 2**20]),
    "batch": ("batch B", [16, 32, 64, 128, 256]),
    "image_size": ("image size S, B = 16", [72, 96, 128, 160, 224]),
}
IMAGES = [1000, 10_000, 100_000, 1_000_000]


# ---------------------------------------------------------------------------------------- parts


def operation_seconds(work, times):
    """Seconds of each kind of operation in one of `times` calls of `work`, and of the call."""
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        start = time.perf_counter()
        for _ in range(times):
            work()
        seconds = (time.perf_counter() - start) / times
        tf.profiler.experimental.stop()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(path.read_bytes())
    kinds = collections.Counter()
    for plane in space.planes:
        for line in plane.lines:
            if not line.name.startswith("tf_Compute"):
                continue
            for event in line.events:
                # "name in the graph:kind"
                kind = plane.event_metadata[event.metadata_id].name.split(":")[-1]
                kinds[kind] += event.duration_ps / 1e12 / times
    del kinds["Process"]  # The executor's own, around each operation.
    return kinds, seconds


def print_parts_of_steps():
    for name, row in against_pytorch.ROWS.items():
        if row.kind != "step":
            continue
        step = tf.function(race_isd_tf.model_of(row.sizes).train_step)
        batch = ready_views(row.sizes)
        for _ in range(2):
            step(batch)["loss"].numpy()
        kinds, seconds = operation_seconds(lambda: step(batch)["loss"].numpy(), 3)  # noqa: B023
        convolutions = sum(value for kind, value in kinds.items() if "Conv2D" in kind)
        print(f"\n{name}: {1000 * seconds:.0f} ms, {seconds / convolutions:.2f} of convolutions\n")
        print("| operation | ms | share |\n| --- | --- | --- |")
        print(
            f"| **all convolutions** | {1000 * convolutions:.0f} | {convolutions / seconds:.1%} |"
        )
        for kind, value in kinds.most_common(12):
            print(f"| {kind} | {1000 * value:.1f} | {value / seconds:.1%} |")
        keras.backend.clear_session()


def decode_alone(paths):
    """In a process, with no crop to hand over."""
    look = python_crops.RandomCropsOfImage(size=0, areas=(), resizer="")

    def decode(paths):
        images = list(paths), True, [""] * len(paths), np.zeros([len(paths), 0])
        crop_processes.look_at_in_process(crop_processes.Group(*images, look, [], [], 10**9))
        return paths

    return tf.ensure_shape(python_calls.call_python(decode, [paths], tf.string), [None])


def print_parts_of_a_pair():
    import cykooz_resizer  # Where there is none, there is nothing to compare.

    row = against_pytorch.ROWS["views_224"]
    with tempfile.TemporaryDirectory() as folder:
        against_pytorch.write_data(folder, row)
        dataset = race_isd_tf.images_of(row.sizes, folder)
        paths = tf.data.Dataset.from_tensor_slices(list(dataset.paths)).repeat()
        groups = paths.batch(looks.GROUP)
        columns = []
        for resizer in (cykooz_resizer, None):
            python_crops.cykooz_resizer = resizer  # None: by Pillow, as under Linux on ARM.
            decoded = iter(groups.map(decode_alone, race.CORES).rebatch(row.sizes["batch"]))
            parts = (
                race.timed(lambda: next(decoded), row.sizes["batch"], 40, 5),  # noqa: B023
                race_isd_tf.host("", row.sizes, folder)(),
                race_isd_tf.views("", row.sizes, folder)(),
            )
            columns.append([1000 * race.CORES * seconds / things for things, seconds in parts])
    print("\na pair of 224x224 views from 500x375 JPEG, core-milliseconds\n")
    print("| part | by cykooz_resizer | by Pillow |\n| --- | --- | --- |")
    (decode, host, pair) = np.transpose(columns)
    for part, values in (
        ("reading and decoding", decode),
        ("two crops, handing over", host - decode),
        ("the rest of both views, on the device", pair - host),
        ("sum", pair),
    ):
        print(f"| {part} | {values[0]:.2f} | {values[1]:.2f} |")


# ----------------------------------------------------------------------------------------- axes


def ready_views(sizes):
    shape = [2, sizes["batch"], sizes["image_size"], sizes["image_size"], 3]
    views = tf.random.stateless_normal(shape, [0, 0])
    return {"teacher_view": views[0], "student_view": views[1]}


def step_seconds(sizes):
    step = tf.function(race_isd_tf.model_of(sizes).train_step)
    batch = ready_views(sizes)
    seconds = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        step(batch)["loss"].numpy()
        seconds.append(time.perf_counter() - start)
    keras.backend.clear_session()
    return seconds[1:]  # The first one compiles.


def cost_against(axis):
    """Milliseconds of a step for each value of an axis: (median, least, most)."""
    points = {}
    for value in AXES[axis][1]:
        sizes = BASE | ({"batch": 16} if axis == "image_size" else {}) | {axis: value}
        seconds = step_seconds(sizes)
        points[value] = tuple(
            1000 * each for each in (statistics.median(seconds), min(seconds), max(seconds))
        )
        print(f"{axis}={value}: {points[value][0]:.0f} ms", file=sys.stderr, flush=True)
    return points


def cost_against_images():
    """For datasets of so many files: seconds until the first batch, and pairs a second after."""
    sizes = against_pytorch.ROWS["views_224"].sizes | {"image_size": 32, "batch": 64, "calls": 20}
    points = {}
    with tempfile.TemporaryDirectory() as folder:
        against_pytorch.write_files(folder, sizes["files"])
        for count in IMAGES:
            # The same few files under as many entries as a dataset of that size has.
            paths = tuple(f"{folder}/{i % sizes['files']}.jpg" for i in range(count))
            dataset = isd_tf.datasets.FileDataset("files", paths)
            start = time.perf_counter()
            pairs = iter(isd_tf.pretraining_batches(dataset, ("weak", "strong"), 32, 64, seed=0))
            next(pairs)
            first = time.perf_counter() - start
            things, seconds = race.timed(lambda: next(pairs), 64, 100, 10)  # noqa: B023
            points[count] = first, things / seconds
    return points


def print_costs():
    costs = {axis: cost_against(axis) for axis in AXES}
    for axis, points in costs.items():
        print(f"\n| {AXES[axis][0]} | ms a step, median (least to most) | µs an image |")
        print("| --- | --- | --- |")
        for value, (median, least, most) in points.items():
            images = value if axis == "batch" else 16 if axis == "image_size" else BASE["batch"]
            spread = f"{median:.0f} ({least:.0f} to {most:.0f})"
            print(f"| {value:,} | {spread} | {1000 * median / images:.0f} |".replace(",", " "))
    images = cost_against_images()
    print("\n| images N | s until the first batch | pairs/s, 32x32 from 500x375 JPEG |")
    print("| --- | --- | --- |")
    for count, (first, rate) in images.items():
        print(f"| {count:,} | {first:.2f} | {rate:.0f} |".replace(",", " "))
    draw(costs, images)


def draw(costs, images):
    plt.rcParams["svg.hashsalt"] = "isd_tf"  # the same picture from the same figures
    plt.rcParams["svg.fonttype"] = "none"
    figure, panels = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    for panel, (axis, points) in zip(panels, costs.items(), strict=False):
        # The best of the steps, which other work on the machine disturbs least, to the median.
        medians, least, _ = zip(*points.values(), strict=True)
        panel.plot(list(points), least, marker="o")
        panel.fill_between(list(points), least, medians, alpha=0.3)
        panel.set(xlabel=AXES[axis][0], ylim=(0, None))
        if axis == "queue_size":
            panel.set_xscale("log")
        else:
            panel.set_xticks(list(points)[1:])  # The first two of B would overlap.
    panels[0].set_ylabel("milliseconds a step")
    rates = [rate for _, rate in images.values()]
    panels[3].plot(list(images), rates, marker="o")
    panels[3].set(xlabel="images N", ylabel="pairs a second", xscale="log")
    panels[3].set_ylim(0, 1.05 * max(rates))
    figure.savefig(PICTURE, metadata={"Date": None})
    print(f"\n{PICTURE}")


if __name__ == "__main__":
    tf.config.threading.set_intra_op_parallelism_threads(race.CORES)
    if sys.argv[1:] == ["step"]:
        # In a row, so that no two operations share the cores and their times add up.
        tf.config.threading.set_inter_op_parallelism_threads(1)
        print_parts_of_steps()
    elif sys.argv[1:] == ["pair"]:
        print_parts_of_a_pair()
    elif sys.argv[1:] == ["axes"]:
        print_costs()
    else:
        sys.exit(__doc__)
