"""The folder of a run: one run at a time, the same for all workers, and its results.json."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import shutil
from collections.abc import Iterator

import flagfiles
import keras
import numpy as np
import program  # Before isd_tf, which it lets be found.
import tensorflow as tf

import isd_tf
from isd_tf.data import datasets
from isd_tf.data.datasets import Dataset
from isd_tf.data.folders import shown
from isd_tf.training import cluster, initial_weights, metrics
from isd_tf.training.checkpoints import Checkpoints
from isd_tf.views.python_crops import fastest_resizer

INITIAL_WEIGHTS = "initial_weights.weights.h5"
TEACHER = "teacher.json"
METRICS = "metrics.jsonl"
LEFT_OUT = "not_read.txt"
CROPS_BY = "random crops by"
IMAGES = "images.npy"


@contextlib.contextmanager
def locked(path: str, strategy: tf.distribute.Strategy) -> Iterator[pathlib.Path]:
    """Makes the workdir, keeps other runs out of it, and checks that all workers see it.

    Raises:
        OSError: when it cannot be written, is in use, or is another folder for some worker.
    """
    workdir = pathlib.Path(path)
    with contextlib.ExitStack() as until_the_end:
        with cluster.failing_together(strategy):
            if cluster.is_chief(strategy):
                until_the_end.enter_context(lock(workdir))
        _require_shared(workdir, strategy)
        yield workdir


@contextlib.contextmanager
def lock(workdir: pathlib.Path, flag: str = "--workdir") -> Iterator[None]:
    """Makes a folder, if it is missing, and keeps other processes out of it.

    Raises:
        OSError: when it cannot be written, or is in use.
        ValueError: for a name that is no UTF-8.
    """
    try:
        str(workdir).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{flag} must be a path in UTF-8, as TensorFlow writes to no other. Received: "
            f"{shown(str(workdir))}. Use another one; where the name is UTF-8, LC_ALL=C.UTF-8."
        ) from None
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "w")
    except OSError as error:
        raise OSError(
            f"{flag} must be a folder that can be written. Received: {workdir} ({error})."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"Another process is at work in {workdir}. Wait for it, or use another {flag}."
            ) from None
        yield


def _require_shared(workdir, strategy):
    """Lets the chief leave a number in the workdir, which all the others must find there."""
    if cluster.number_of_workers(strategy) == 1:
        return
    path, number = workdir / ".cluster", random.SystemRandom().getrandbits(60)
    with cluster.failing_together(strategy):
        if cluster.is_chief(strategy):
            path.write_text(str(number))
    number = int(cluster.gather_from_workers(strategy, number)[0])
    with cluster.failing_together(strategy):
        if not path.exists() or path.read_text() != str(number):
            raise FileNotFoundError(
                f"All workers must share the workdir. Received: --workdir={workdir}, which on "
                f"{platform.node()} does not hold what the chief has just written. Use a folder "
                "that all machines see."
            )


def record(workdir: pathlib.Path, results: dict[str, float], step: int) -> pathlib.Path:
    """Adds figures of a step to results.json, and returns its path.

    The file is about one step: with the first figures of another one it begins anew.
    """
    path = workdir / "results.json"
    before = read_json(path) if path.exists() else {}
    if before.get("step") == step:
        results = before | results
    write_json(path, results | {"step": step})
    return path


def forget(workdir: pathlib.Path, prefix: str) -> None:
    """Removes the figures whose names begin by `prefix` from results.json."""
    path = workdir / "results.json"
    if path.exists():
        results = read_json(path)
        write_json(path, {k: v for k, v in results.items() if not k.startswith(prefix)})


def about(workdir: pathlib.Path, flag_file: str = "run.flags") -> dict:
    """What a model card tells of a run: its recipe, what it began with, versions and scores."""
    files = {
        "data": "dataset.json",
        "initial_weights": "initial_weights.json",
        "teacher": TEACHER,
        "versions": "versions.json",
        "scores": "results.json",
    }
    found = {name: workdir / file for name, file in files.items() if (workdir / file).exists()}
    recipe = flagfiles.expand([f"--flagfile={workdir / flag_file}"])
    return {"recipe": recipe} | {name: read_json(path) for name, path in found.items()}


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes a JSON file beside its place and renames it: whoever reads it finds it whole."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    os.replace(unfinished, path)


def read_json(path: pathlib.Path) -> dict:
    """Reads what `write_json` has written.

    Raises:
        ValueError: where something else has come into it.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} must be as the run has written it. Received what is no JSON ({error}). "
            "Restore it, or remove it where it only holds results."
        ) from None


def keep_initial_weights(
    workdir: pathlib.Path, initial: initial_weights.InitialWeights, encoder: keras.Model
) -> None:
    """Keeps the weights that a run begins with, for its evaluation, and where they are from."""
    encoder.save_weights(workdir / INITIAL_WEIGHTS)
    loaded = initial.loaded._asdict()
    write_json(workdir / "initial_weights.json", initial._asdict() | {"loaded": loaded})


def require_same_initial_weights(workdir: pathlib.Path) -> None:
    """Raises ValueError when the file that a run began with holds other weights by now."""
    path = workdir / "initial_weights.json"
    if not path.exists():
        return
    record = read_json(path)
    now = initial_weights.digest(record["path"], record["step"])
    if now not in (None, record["sha256"]):  # It may be gone.
        raise ValueError(
            f"The workdir {workdir} was begun with other weights: {record['path']} had the sha256 "
            f"{record['sha256'][:12]}... then, {now[:12]}... now. Restore it, or use another "
            "--workdir."
        )


def require_same_teacher(workdir: pathlib.Path, teacher: dict, source: str) -> None:
    """Raises ValueError when a run was begun with another given teacher than `source` is now."""
    before = read_json(workdir / TEACHER)
    if before != teacher:
        raise ValueError(
            f"The workdir {workdir} was begun with another teacher: digest {before['digest']} "
            f"then, {teacher['digest']} of --teacher={source} now. Name the same one to continue "
            "it, or use another --workdir."
        )


def keep_images(workdir: pathlib.Path, dataset: Dataset) -> None:
    """Keeps a digest of each image that a run begins with."""
    np.save(workdir / IMAGES, datasets.image_digests(dataset))


def say_other_image(workdir: pathlib.Path, dataset: Dataset) -> str:
    """Says that of as many images as a run began with some are others, and names one."""
    said, path = ", the same number but not the same", workdir / IMAGES
    if not path.exists():
        return said
    before, now = np.load(path), datasets.image_digests(dataset)
    new = np.flatnonzero(~np.isin(now, before))
    if not len(new):
        return f"{said} in the same order"
    return f"{said}: {shown(datasets.names_of(dataset, new[:1])[0])} is new"


def name_left_out(folder: pathlib.Path, *splits: Dataset | None) -> None:
    """Names the files that lie beside the images and are not read."""
    names = [name for split in splits for name in getattr(split, "left_out", ())]
    if names:
        (folder / LEFT_OUT).write_text("".join(f"{shown(name)}\n" for name in names), "utf-8")


def note_versions(
    workdir: pathlib.Path, checkpoints: Checkpoints, stages: str, train: Dataset | None
) -> None:
    """Leaves what a run began with; says what is another now, and adds it to the record.

    Args:
        workdir: the run's.
        checkpoints: of the run, which has begun if there are any.
        stages: for the record.
        train: what is trained on; None where nothing is.
    """
    path = workdir / "versions.json"
    packages = (
        "tensorflow keras keras-cv tensorflow-datasets numpy pillow simplejpeg scikit-image "
        "scikit-learn"
    )
    now = {name: importlib.metadata.version(name) for name in packages.split()}
    now |= {"isd_tf": isd_tf.__version__, "python": platform.python_version()}
    if train is not None:
        now["replicas"] = checkpoints.strategy.num_replicas_in_sync
    if isinstance(train, datasets.FileDataset | datasets.RecordDataset):
        by = fastest_resizer()
        now[CROPS_BY] = f"{by} {importlib.metadata.version(by)}"
    if not (checkpoints.exist and path.exists()):
        write_json(path, now)
        return
    record = read_json(path)
    then = {name: record.get(name, value) for name, value in now.items()}
    if CROPS_BY in now:  # Runs that do not say so began when it was TensorFlow's graph.
        then[CROPS_BY] = record.get(CROPS_BY, "graph")
    others = {name: value for name, value in now.items() if then[name] != value}
    if not others:
        return
    differ = ", ".join(f"{name} {then[name]} then, {value} now" for name, value in others.items())
    program.say(
        f"Not as when the run began: {differ}. The bits may differ from those of an unbroken run."
    )
    later = {"after_step": checkpoints.newest_step, "stages": stages} | others
    record["later"] = [*record.get("later", []), later]
    write_json(path, record)


def remove_unfinished(folder: pathlib.Path) -> None:
    """Removes what a call that was killed has left half-way: the workdir is this one's."""
    for leftover in folder.glob("unfinished-*"):
        shutil.rmtree(leftover, ignore_errors=True)
        if leftover.is_file():
            leftover.unlink()


def used_data_service(workdir: pathlib.Path) -> bool:
    """Whether the run was begun with a data service."""
    return bool(flag(workdir, "data_service"))


def flag(workdir: pathlib.Path, name: str) -> str | None:
    """Returns a flag's value as the run was begun, or None."""
    lines = flagfiles.expand([f"--flagfile={workdir / 'run.flags'}"])
    start = f"--{name}="
    return next((line.removeprefix(start) for line in lines if line.startswith(start)), None)


def read_curves(workdir: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads a run's 1-NN accuracies over its epochs.

    Returns:
        For "student" and "teacher": epochs, counted from 1, and accuracies in [0, 1].

    Raises:
        FileNotFoundError: when the workdir is none, or has no accuracies.
    """
    if not (workdir / "run.flags").exists():
        raise FileNotFoundError(f"{workdir} is not the workdir of a run: it has no run.flags.")
    found = metrics.read(workdir / METRICS)
    curves = {name: found.curve(f"{name}_1nn", "epochs") for name in ("student", "teacher")}
    if not all(len(epochs) for epochs, _ in curves.values()):
        raise FileNotFoundError(
            f"{workdir} has no accuracies over the epochs in {METRICS}. Train with "
            "--knn_every_epochs, on labelled images that have a test split."
        )
    return curves
