"""Processes beside this one, in which images are read, decoded and cropped in Python.

Python runs one thread at a time, and a host of many cores has work for many. So each thread of
tf.data hands a group of images to a process, and waits for the crops:

    tf.data's thread  ->  Group  ->  socket  ->  look_at, image by image  ->  socket  ->  crops

A process is started when a thread finds none free, and stays. It ends with this one, however that
ends, as its socket then does.
"""

import logging as python_logging
import os
import pathlib
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from isd_tf.data import pixels

# The package itself imports TensorFlow, which would take each process 5 seconds and 500 MB.
PROGRAM = """
import sys, types
package = types.ModuleType("isd_tf")
package.__path__ = [sys.argv[1]]
sys.modules["isd_tf"] = package
from isd_tf.data import crop_processes
crop_processes.serve(0)
"""
PACKAGE = pathlib.Path(__file__).parent.parent
MUST_LIVE = "The processes that decode images must live as long as the training."
# Ahead of each message: its length in bytes.
LENGTH = struct.Struct("<Q")


class Group(NamedTuple):
    """Images, and what is wanted of them; all of it can be pickled."""

    sources: list[bytes]  # n paths, or n encoded images
    are_paths: bool
    names: list[str]  # of the images, for warnings
    draws: np.ndarray  # [n, ...]
    look: Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray]]  # image and draws to V arrays
    shapes: list[tuple[int, ...]]  # of each of these
    types: list[np.dtype]
    max_pixels: int  # as in `pixels.decode`

    def arrays(self, make: Callable) -> list[np.ndarray]:
        """V times [n, ...], made of shape and type."""
        shapes = [(len(self.sources), *shape) for shape in self.shapes]
        return list(map(make, shapes, self.types))


def look_at(group: Group) -> tuple[list[np.ndarray], dict[int, str]]:
    """Looks at the images of a group, one after the other.

    Returns:
        V arrays [n, ...], zeros where an image cannot be read, and for each of those why.
    """
    seen, reasons = group.arrays(np.zeros), {}

    def look_at_image(i):  # Of its own, so that its image is gone before the next is opened.
        source = group.sources[i]
        encoded = pixels.read_file(source) if group.are_paths else source
        image = pixels.decode(encoded, group.names[i], group.max_pixels)
        for of_all, of_one in zip(seen, group.look(image, group.draws[i]), strict=True):
            of_all[i] = of_one

    for i in range(len(group.sources)):
        try:
            look_at_image(i)
        except pixels.UnreadableImage as error:
            reasons[i] = str(error)
    return seen, reasons


def look_at_in_process(group: Group) -> tuple[list[np.ndarray], dict[int, str]]:
    """Does `look_at` in another process, without Python's lock.

    Raises:
        OSError: when the process cannot be started, or ends.
    """
    try:
        process = _free.get_nowait()
    except queue.Empty:
        process = _Process()
    answer = process.look_at(group)
    _free.put(process)
    return answer


class _Process:
    """A process, as the one that started it sees it."""

    def __init__(self):
        self.socket, its_own = socket.socketpair()
        # Its work is one thread's. What this process can import, it can.
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with its_own:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, str(PACKAGE)],
                stdin=its_own,
                env=os.environ | one_thread | paths,
                start_new_session=True,  # A terminal's Ctrl-C is for the training to answer.
            )

    def look_at(self, group):
        seen = group.arrays(np.empty)
        try:
            _send(self.socket, group)
            reasons, warnings = _receive(self.socket)
            for array in seen:
                _receive_into(self.socket, array)
        except (EOFError, ConnectionError):
            raise OSError(self._end()) from None
        for text in warnings:  # Of one kind, which is said once; each process has its own first.
            logging.log_first_n(logging.WARNING, "%s", 1, text)
        return seen, reasons

    def _end(self):
        self.socket.close()
        status = self.process.wait()
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        return (
            f"{MUST_LIVE} Received: the end of one, by {how}. By SIGKILL Linux ends what takes "
            "more memory than there is: run fewer programs beside it, or lower --max_pixels. The "
            "same command continues."
        )


_free: queue.SimpleQueue[_Process] = queue.SimpleQueue()


def _begin_anew():
    global _free
    _free = queue.SimpleQueue()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)  # The processes are its parent's.


def serve(descriptor: int) -> None:
    """The program of a process: looks at the groups that a socket brings, until it ends."""
    # Who tells all processes of a training to end means the training, which ends this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    warnings = _Texts()
    python_logging.basicConfig(handlers=[warnings])
    with socket.socket(fileno=descriptor) as its_socket:
        while True:
            try:
                seen, reasons = look_at(_receive(its_socket))
                _send(its_socket, (reasons, warnings.taken()))
                for array in seen:
                    its_socket.sendall(memoryview(array).cast("B"))
            except (EOFError, ConnectionError):
                return


class _Texts(python_logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())

    def taken(self):
        texts, self.texts = self.texts, []
        return texts


def _send(its_socket, message):
    encoded = pickle.dumps(message)
    its_socket.sendall(LENGTH.pack(len(encoded)))
    its_socket.sendall(encoded)


def _receive(its_socket):
    length = bytearray(LENGTH.size)
    _receive_into(its_socket, length)
    encoded = bytearray(LENGTH.unpack(length)[0])
    _receive_into(its_socket, encoded)
    return pickle.loads(encoded)


def _receive_into(its_socket, buffer):
    """Fills a buffer. All of it is one call, for each gives Python's lock up and waits for it."""
    view = memoryview(buffer).cast("B")
    while view:
        count = its_socket.recv_into(view, len(view), socket.MSG_WAITALL)
        if not count:
            raise EOFError
        view = view[count:]
