"""The folder of a run: one run at a time, the same for all workers, and its results.json."""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import random
from collections.abc import Iterator

import tensorflow as tf

from isd_tf import cluster


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
                until_the_end.enter_context(_lock(workdir))
        _require_shared(workdir, strategy)
        yield workdir


@contextlib.contextmanager
def _lock(workdir):
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "w")
    except OSError as error:
        raise OSError(
            f"--workdir must be a folder that can be written. Received: {workdir} ({error})."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"Another process is at work in {workdir}. Wait for it, or use another --workdir."
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


def record(workdir: pathlib.Path, results: dict[str, float]) -> pathlib.Path:
    """Adds figures to results.json, and returns its path."""
    path = workdir / "results.json"
    if path.exists():
        results = json.loads(path.read_text()) | results
    unfinished = workdir / "results.json.unfinished"
    unfinished.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    os.replace(unfinished, path)
    return path
