"""What processes of crop_processes_test do with an image. They import this file, not TensorFlow."""

import os
import signal
import sys
import time

import numpy as np


def as_it_is(image, draws):
    return image, draws


def where(image, draws):
    """The process, and whether TensorFlow is in it."""
    return [np.array([os.getpid(), "tensorflow" in sys.modules])]


def die(image, draws):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(image, draws):
    os._exit(3)


def fail(image, draws):
    raise ValueError("what is wrong")


def fail_with_the_third(image, draws):
    """As where the second of two views does not fit into the memory."""
    yield image
    if draws[0] == 4:
        raise MemoryError
    yield draws


def wait(image, draws):
    time.sleep(draws[0])
    return [np.array([os.getpid()])]
