"""Python functions that tf.data calls, from threads of its own.

Two things would then keep a program waiting for ever, and are seen to here:

    its end    A call that is inside Python, or waits for Python's lock, while the interpreter ends
               never returns, and its pipeline's end waits for it. So the program's end comes after
               all calls; what calls then gets an error.
    garbage    Python collects in whichever thread allocates. Where a call finds an iterator so (one
               of a training that failed, which its error's cycle holds), the iterator's end waits
               for the call. So from the first such pipeline on, Python's own collection is off, and
               a separate thread collects.
"""

import atexit
import functools
import gc
import os
import threading
import time
from collections.abc import Callable, Sequence

import tensorflow as tf
from absl import logging

# So long no call may have come or gone for the pipelines to rest; and how long to wait for that.
REST_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 30
# Between collections of what is young; each 32nd is of all, and the first after a new pipeline.
COLLECTION_SECONDS = 1.0
COLLECTIONS_TO_A_FULL_ONE = 32


class _Calls:
    """What this process has of them; a forked one begins anew."""

    def __init__(self):
        self.lock = threading.Lock()
        self.begun = self.ended = 0
        self.ending = threading.Event()
        self.is_new_pipeline = False
        self.collector: threading.Thread | None = None


_calls = _Calls()


def call_python(
    function: Callable, inputs: Sequence[tf.Tensor], types: Sequence[tf.DType] | tf.DType
) -> list[tf.Tensor]:
    """`tf.numpy_function` for functions that count, log or take long.

    TensorFlow keeps them for ever: they should hold nothing large, and no tensors.
    """
    _collect_elsewhere()

    @functools.wraps(function)
    def counted(*arguments):
        gc.disable()  # Whoever has turned it on meanwhile.
        with _calls.lock:
            _calls.begun += 1
        try:
            if _calls.ending.is_set():
                raise RuntimeError("The program ends.")
            return function(*arguments)
        finally:
            with _calls.lock:
                _calls.ended += 1

    return tf.numpy_function(counted, inputs, types, stateful=True)


def _collect_elsewhere():
    gc.disable()  # Before the lock, which the calls need whose end a found iterator waits for.
    with _calls.lock:
        _calls.is_new_pipeline = True
        if _calls.collector or _calls.ending.is_set():
            return
        _calls.collector = threading.Thread(target=_collect, name="collector", daemon=True)
        _calls.collector.start()


def _collect():
    number = 0
    while not _calls.ending.wait(COLLECTION_SECONDS):
        number += 1
        full = _calls.is_new_pipeline or number % COLLECTIONS_TO_A_FULL_ONE == 0
        _calls.is_new_pipeline = False
        gc.collect(2 if full else 1)


@atexit.register
def _come_to_rest():
    if not _calls.collector:
        return
    _calls.ending.set()
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    before = None
    while before != (now := (_calls.begun, _calls.ended)) or _calls.begun > _calls.ended:
        if time.monotonic() > deadline:
            logging.warning("Reading does not end: is what it reads from still there?")
            return
        before = now
        time.sleep(REST_SECONDS)
    _calls.collector.join(LONGEST_WAIT_SECONDS)


def _begin_anew():
    global _calls
    if _calls.collector:
        gc.enable()
    _calls = _Calls()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
