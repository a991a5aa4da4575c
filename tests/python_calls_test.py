"""Programs that would wait for ever while tf.data calls Python functions."""

import subprocess
import sys

import pytest

PIPELINE = """
import time
import tensorflow as tf
from isd_tf.data.python_calls import call_python

def slow(i):
    lists = [[j] for j in range(3000)]  # As many as make Python look for garbage.
    time.sleep(0.01)
    return i

numbers = tf.data.Dataset.range(10**9)
slowly = numbers.map(lambda i: call_python(slow, [i], tf.int64), num_parallel_calls=3)

def begin():
    iterator = iter(slowly.batch(4).prefetch(30))
    next(iterator)
    return iterator
"""
ENDINGS = {
    "in the midst": "taken = begin()",
    "by an error": "taken = begin()\nraise SystemExit(1)",
    # The frame holds the error, the error its traceback, and that the frame and its iterator.
    "after an error that is kept": """
def train():
    iterator = begin()
    try:
        raise ValueError
    except ValueError as error:
        kept = error
train()
""",
    # Which then gets an error.
    "while a thread takes batches": """
import threading
thread = threading.Thread(target=list, args=(slowly,), daemon=True)
thread.start()
time.sleep(1)
""",
    # Though someone turns Python's own collection on; and a fork has it back.
    "with its garbage collected": """
import gc, os, weakref
class Holder:
    pass
taken, holder = begin(), Holder()
holder.itself, dead = holder, weakref.ref(holder)
gc.enable()
del holder
while dead() or gc.isenabled():
    next(taken)
if not os.fork():
    os._exit(0 if gc.isenabled() else 1)
assert os.wait()[1] == 0
""",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_ends_while_functions_are_called(ending):
    result = subprocess.run(
        [sys.executable, "-c", PIPELINE + ENDINGS[ending] + "\nprint('end')"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    by_error = ending == "by an error"
    assert result.returncode == by_error, result.stderr
    assert ("end" in result.stdout) != by_error
    assert "Reading does not end" not in result.stderr
