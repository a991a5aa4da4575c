"""Runs of experiments/run.py that take seconds: their flags, what disturbs them, what is left."""

import contextlib
import csv
import pathlib
import resource
import sys
import time

import numpy as np
import tensorflow as tf

ROOT = pathlib.Path(__file__).parent.parent
SMALL = [
    *("--image_size=16", "--encoder=tiny_resnet", "--width=4", "--queue_size=16", "--epochs=4"),
    *("--batch_size=4", "--knn_every_epochs=1", "--checkpoint_every_steps=2"),
    "--stages=pretrain,evaluate,export",
]
# What stands in a flag file's place that names a trained teacher.
RANDOM_TEACHER = ["--teacher=tiny_resnet", "--teacher_weights=random"]
STEPS = 24 // 4 * 4  # 24 images in batches of 4, 4 epochs


def command(*arguments):
    return [sys.executable, str(ROOT / "experiments" / "run.py"), *map(str, arguments)]


def small_run(photos, workdir, *arguments):
    return [
        *("--flagfile=imagenet.flags", "--dataset=folder", f"--data_dir={photos}", *SMALL),
        *(f"--workdir={workdir}", *arguments),
    ]


def newest_weights(workdir):
    path = max((workdir / "checkpoints").glob("step-*"))
    reader = tf.train.load_checkpoint(str(path / "state"))
    return path.name, {
        key: reader.get_tensor(key)
        for key in reader.get_variable_to_shape_map()
        if key != "_CHECKPOINTABLE_OBJECT_GRAPH"
    }


def assert_same_end(workdir, other):
    (name, ours), (other_name, theirs) = newest_weights(workdir), newest_weights(other)
    assert name == other_name and ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def wait_for_checkpoint(workdir, step, process):
    """Waits until a run has saved `step` or a later one."""
    while not any(int(p.name[5:]) >= step for p in workdir.glob("checkpoints/step-*")):
        assert process.poll() is None, "The run ended before it could be disturbed."
        time.sleep(0.005)


@contextlib.contextmanager
def full_disk(largest_file=8192):
    """Lets no file grow beyond some bytes: writing fails half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
