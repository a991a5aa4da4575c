"""A tf.data service, whose workers prepare batches on other machines.

Its workers run the trainer's graphs, in which a Python function is no more than the name that
TensorFlow gave it in its own process. So the worker's program offers one, `offer_crops`, before it
makes any other, and the trainer's graph calls whatever has the first name: `crops_in_service`.
"""

import dataclasses
import inspect
import os
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

import grpc  # TensorFlow depends on it.
import tensorflow as tf

from isd_tf.data.datasets import Dataset, FileDataset, RecordDataset
from isd_tf.data.decoding import WORKERS_MUST, crop_images
from isd_tf.data.folders import shown
from isd_tf.views import python_crops

# How long to wait for a service's first worker; TensorFlow would wait forever, in silence.
SECONDS = 60
# TensorFlow's name of a process's first Python function.
FIRST = "pyfunc_0"
# What this version of isd_tf sends.
ARGUMENTS = tuple(name.encode() for name in inspect.signature(crop_images).parameters)


class DataService(NamedTuple):
    """A tf.data service that prepares batches on other machines (experiments/data_service.py).

    Each batch is one that this machine would have made, and none comes twice; but they come as they
    get ready, so that no two runs are the same. Of a stream of TFRecord files, each of the
    service's workers prepares another epoch. Batches are lost with a worker that ends, and a run
    that is continued sees some twice and some not at all.
    """

    address: str  # of its dispatcher, host:port
    job: str  # a name that the trainers share, and no earlier start of theirs or of others has had


def require_workers(address: str) -> None:
    """Raises unless a tf.data service answers at `address` and has a worker, or soon has one."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        raise ValueError(
            "A data service's address must be its dispatcher's, host:port. "
            f"Received: --data_service={address}."
        )
    deadline = time.monotonic() + SECONDS
    with grpc.insecure_channel(address) as channel:
        # Both messages in bytes: a request without fields, and a list, empty while there is none.
        list_workers = channel.unary_unary("/tensorflow.data.DispatcherService/GetWorkers")
        try:
            while not list_workers(b"", timeout=10):
                if time.monotonic() > deadline:
                    raise OSError(
                        f"The tf.data service at {address} must have workers. Received: none in "
                        f"{SECONDS} seconds. Start some: "
                        f"experiments/data_service.py --role=worker --dispatcher={address}"
                    )
                time.sleep(0.5)
        except grpc.RpcError as error:
            raise OSError(
                f"A tf.data service's dispatcher must answer at --data_service={address}. "
                f"Received: {error.details()}. Start one: "
                f"experiments/data_service.py --role=dispatcher --port={port}"
            ) from None


def crops_in_service(inputs: Sequence[tf.Tensor], types: Sequence[tf.DType]) -> list[tf.Tensor]:
    """Calls `decoding.crop_images` in Python, wherever the service's worker is."""
    return tf.raw_ops.PyFuncStateless(input=[ARGUMENTS, *inputs], token=FIRST, Tout=types)


def with_whole_paths(dataset: Dataset) -> Dataset:
    """A dataset for workers that may have been started in other folders."""
    here = os.getcwd()
    match dataset:
        case FileDataset():
            paths = tuple(os.path.join(here, path) for path in dataset.paths)
            return dataclasses.replace(dataset, paths=paths)
        case RecordDataset():  # TFDS can have them in a cloud.
            files = (x if "://" in x else os.path.join(here, x) for x in dataset.files)
            return dataclasses.replace(dataset, files=tuple(files))
    return dataset


def offer_crops() -> tf.Graph:
    """Lets `crops_in_service` find its function in this process, for as long as the result lives.

    Raises:
        RuntimeError: when the process has another Python function for TensorFlow already.
    """
    graph = tf.Graph()
    with graph.as_default():
        name = tf.numpy_function(_crops, [], []).get_attr("token").decode()
    if name != FIRST:
        raise RuntimeError(f"A worker's first Python function must be {FIRST}. Received: {name}.")
    return graph


def _crops(names, *values):
    if tuple(names) != ARGUMENTS:
        raise RuntimeError(
            f"{WORKERS_MUST} have the trainer's version of isd_tf. Received: one with another. "
            "Start others."
        )
    sources, _, are_paths, *_, resizer, _ = values
    if resizer == b"cykooz_resizer" and not python_crops.cykooz_resizer:
        raise RuntimeError(
            f"{WORKERS_MUST} have cykooz_resizer, as the trainer has. Received: one without. There "
            "is no wheel for Linux on ARM: start others."
        )
    *crops, failures = crop_images(*values)
    for path in sources[failures != b""] if are_paths else ():
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            raise RuntimeError(
                f"{WORKERS_MUST} find the images under the trainer's paths. Received: on "
                f"{socket.gethostname()} no folder {shown(os.fsdecode(folder))}. Start them where "
                "the images are."
            )
    return *crops, failures
