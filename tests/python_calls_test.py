"""Programs that end while tf.data calls Python functions."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, time
import tensorflow as tf
from isd_tf.data.python_calls import call_python, is_ending

calls = []

def slow(i):
    calls.append(i)
    if is_ending():
        return i
    time.sleep(0.02)
    return i

numbers = tf.data.Dataset.range(10**9)
slowly = numbers.map(lambda i: call_python(slow, [i], tf.int64), num_parallel_calls=3)
taken = iter(slowly.batch(4).prefetch(2))
for _ in range(3):
    next(taken)
if sys.argv[1] == "error":
    raise SystemExit("An error.")
if sys.argv[1] == "dropped":
    del taken
print(len(calls), "calls")
"""


@pytest.mark.parametrize(("ending", "status"), [("normal", 0), ("dropped", 0), ("error", 1)])
def test_a_program_ends_while_functions_are_called(ending, status):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, ending], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == status, result.stderr
    assert ("calls" in result.stdout) == (status == 0)
