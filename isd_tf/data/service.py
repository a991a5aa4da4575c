"""A tf.data service, whose workers prepare batches on other machines.

Its workers run the trainer's graphs, in which a Python function is no more than the name that
TensorFlow gave it in its own process. So the worker's program offers one, `offer_crops`, before it
makes any other, and the trainer's graph calls whatever has the first name: `crops_in_service`.
"""

import os
import time
from typing import NamedTuple

import grpc  # TensorFlow depends on it.
import numpy as np
import tensorflow as tf

from isd_tf.data import crop_processes
from isd_tf.data.decoding import UNREADABLE_IN_SERVICE, WORKERS_MUST
from isd_tf.data.folders import shown
from isd_tf.views import python_crops

# How long to wait for a service's first worker; TensorFlow would wait forever, in silence.
SECONDS = 60
# TensorFlow's name of a process's first Python function.
FIRST = "pyfunc_0"


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


def crops_in_service(
    sources: tf.Tensor,
    names: tf.Tensor,
    are_paths: bool,
    draws: tf.Tensor,
    look: python_crops.RandomCropsOfImage,
    max_pixels: int,
) -> tuple[tf.Tensor, ...]:
    """Makes random crops of images in Python, wherever the service's worker is.

    Args:
        sources: string [n], paths, or encoded images.
        names: string [n], of the images, for errors.
        are_paths: which of the two.
        draws: float32 [n, V, 22], of `crops.crop_draws`.
        look: S and the V areas.
        max_pixels: as in `pixels.decode`.

    Returns:
        V times uint8 [n, S, S, 3]. An image that cannot be read is an error.
    """
    areas = tf.constant(look.areas, tf.float64)
    inputs = [sources, names, are_paths, draws, look.size, areas, np.int64(max_pixels)]
    types = [tf.uint8] * len(look.areas)
    crops = tf.raw_ops.PyFuncStateless(input=inputs, token=FIRST, Tout=types)
    return tuple(tf.ensure_shape(crop, [None, look.size, look.size, 3]) for crop in crops)


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


def _crops(sources, names, are_paths, draws, size, areas, max_pixels):
    if not python_crops.cykooz_resizer:
        raise RuntimeError(
            f"{WORKERS_MUST} have cykooz_resizer, as the trainer has. Received: one without. There "
            "is no wheel for Linux on ARM: start others."
        )
    look = python_crops.RandomCropsOfImage(int(size), tuple(map(tuple, areas.tolist())))
    names = [shown(os.fsdecode(name)) for name in names]
    views = len(look.areas)
    group = crop_processes.Group(
        list(sources),
        bool(are_paths),
        names,
        draws,
        look,
        [(look.size, look.size, 3)] * views,
        [np.dtype(np.uint8)] * views,
        int(max_pixels),
    )
    crops, reasons = crop_processes.look_at_in_process(group)
    for i, reason in reasons.items():
        raise ValueError(
            f"{UNREADABLE_IN_SERVICE} {names[i]} ({shown(reason)}). Repair or remove it, or train "
            "without --data_service, which counts and replaces it."
        )
    return crops
