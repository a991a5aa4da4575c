"""Python functions that tf.data calls, from threads of its own.

While the interpreter ends, no thread can enter Python any more: a call that comes then never
returns, and what waits for it (the pipeline's own end) waits for ever. So the program's end waits
until all calls have returned and the pipeline's buffers are full, when no more come.
"""

import atexit
import functools
import threading
import time
from collections.abc import Callable, Sequence

import tensorflow as tf

# So long no call may have come for the pipelines to be at rest.
REST_SECONDS = 0.1


class _Calls:
    running = begun = 0
    ending = False
    lock = threading.Lock()


def call_python(
    function: Callable, inputs: Sequence[tf.Tensor], types: Sequence[tf.DType] | tf.DType
) -> list[tf.Tensor]:
    """`tf.numpy_function`, for functions that count or log, and may run when the program ends."""

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
    """Whether the program ends, so that nobody will take what a long call makes."""
    return _Calls.ending


@atexit.register
def _come_to_rest():
    _Calls.ending = True
    before = 0
    while _Calls.running or _Calls.begun > before:
        before = _Calls.begun
        time.sleep(REST_SECONDS)
