"""Python functions that tf.data calls, from threads of its own.

Two things would then keep a program waiting for ever, and are seen to here:

    its end    A call that is inside Python, or waits for Python's lock, while the interpreter ends
               never returns, and its pipeline's end waits for it. So the program ends only when
               the pipelines rest: no call runs, and their buffers are full.
    garbage    Python collects in whichever thread allocates. Where a call finds an iterator so (one
               of a training that failed, which its error's cycle holds), the iterator's end waits
               for the call. So a thread of its own collects.
"""

import atexit
import functools
import gc
import threading
import time
from collections.abc import Callable, Sequence

import tensorflow as tf

# So long no call may have come for the pipelines to rest.
REST_SECONDS = 0.1
# Between collections, each of what is young, and the 64th of all.
COLLECTION_SECONDS = 1.0
COLLECTIONS_TO_A_FULL_ONE = 64


class _Calls:
    running = begun = 0
    lock = threading.Lock()
    ending = threading.Event()


def call_python(
    function: Callable, inputs: Sequence[tf.Tensor], types: Sequence[tf.DType] | tf.DType
) -> list[tf.Tensor]:
    """`tf.numpy_function` for functions that count, log or take long.

    TensorFlow keeps them for ever: they should hold nothing large, and no tensors.
    """
    _collect_elsewhere()

    @functools.wraps(function)
    def counted(*arguments):
        with _Calls.lock:
            _Calls.running += 1
            _Calls.begun += 1
        try:
            return function(*arguments)
        finally:
            with _Calls.lock:
                _Calls.running -= 1

    return tf.numpy_function(counted, inputs, types, stateful=True)


def is_ending() -> bool:
    """Whether the program ends, so that nobody will take what a call makes."""
    return _Calls.ending.is_set()


@atexit.register
def _come_to_rest():
    _Calls.ending.set()
    before = 0
    while _Calls.running or _Calls.begun > before:
        before = _Calls.begun
        time.sleep(REST_SECONDS)


def _collect_elsewhere():
    if not gc.isenabled():  # It is so already, or by the user's own will.
        return
    gc.disable()

    def collect():
        number = 0
        while not _Calls.ending.wait(COLLECTION_SECONDS):
            number += 1
            gc.collect(1 if number % COLLECTIONS_TO_A_FULL_ONE else 2)

    threading.Thread(target=collect, name="garbage of tf.data's callers", daemon=True).start()
