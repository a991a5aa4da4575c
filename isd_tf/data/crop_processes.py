"""Processes beside this one, in which images are read, decoded and cropped in Python.

Python runs one thread at a time, and a host of many cores has work for many. So each thread of
tf.data hands a group of images to a process, and waits for the crops:

    tf.data's thread  ->  Group  ->  socket  ->  look_at, image by image  ->  socket  ->  crops

There are as many as cores, each started when a thread first finds none free. They stay, and end
when their sockets do: with this process, however that ends, and with the group that they have in
hand.
"""

import functools
import logging as python_logging
import os
import pathlib
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
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

    sources: Iterable[bytes]  # n paths, or n encoded images
    are_paths: bool
    names: list[str]  # of the n images, for warnings
    draws: np.ndarray  # [n, ...]
    look: Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray]]  # image and draws to V arrays
    shapes: list[tuple[int, ...]]  # of each of these
    types: list[np.dtype]
    max_pixels: int  # as in `pixels.decode`

    def arrays(self, make: Callable) -> list[np.ndarray]:
        """V times [n, ...], made of shape and type."""
        shapes = [(len(self.names), *shape) for shape in self.shapes]
        return list(map(make, shapes, self.types))


def look_at(group: Group) -> tuple[list[np.ndarray], dict[int, str]]:
    """Looks at the images of a group, one after the other.

    Returns:
        V arrays [n, ...], zeros where an image cannot be read, and for each of those why.
    """
    seen, reasons = group.arrays(np.zeros), {}

    def look_at_image(
        i, source
    ):  # Of its own, so that its image is gone before the next is opened.
        encoded = pixels.read_file(source) if group.are_paths else source
        image = pixels.decode(encoded, group.names[i], group.max_pixels)
        for of_all, of_one in zip(seen, group.look(image, group.draws[i]), strict=True):
            of_all[i] = of_one

    for i, source in enumerate(group.sources):
        try:
            look_at_image(i, source)
        except pixels.UnreadableImage as error:
            reasons[i] = str(error)
    return seen, reasons


def look_at_in_process(group: Group) -> tuple[list[np.ndarray], dict[int, str]]:
    """Does `look_at` in another process, without Python's lock.

    Raises:
        OSError: when the process cannot be started, or ends.
        MemoryError, RuntimeError: what else `look_at` raises there.
    """
    if group.are_paths:  # The process may have been started elsewhere.
        group = group._replace(sources=list(map(_whole_path, group.sources)))
    with _turns():
        process = _free_process()
        answer = process.look_at(group)
        _free.append(process)
    if isinstance(answer, Exception):
        raise answer
    return answer


def _whole_path(path):
    return path if os.path.isabs(path) else os.path.join(os.getcwdb(), path)


@functools.cache
def _turns():
    """Lets as many threads pass as there are cores."""
    import joblib  # Which the processes do not need.

    return threading.BoundedSemaphore(joblib.cpu_count())


def _free_process():
    while _free:
        process = _free.pop()
        if process.is_alive:  # What ended when it had no work has lost nothing.
            return process
        process.socket.close()
    return _Process()


class _Process:
    """A process, as the one that started it sees it."""

    def __init__(self):
        self.socket, its_own = socket.socketpair()
        # Its work is one thread's. By what this process finds its modules, it does.
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        paths = [path for path in sys.path if isinstance(path, str) and path]
        # Who tells all processes of a training to end means the training, which ends this one.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with its_own:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", PROGRAM, str(PACKAGE)],
                    stdin=its_own,
                    env=os.environ | one_thread | {"PYTHONPATH": os.pathsep.join(paths)},
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _started.add(self)

    @property
    def is_alive(self):
        return self.process.poll() is None

    def look_at(self, group):
        seen = group.arrays(np.empty)
        try:
            _send_group(self.socket, group)
            answer, records = _receive(self.socket)
            if not isinstance(answer, Exception):
                for array in seen:
                    _receive_into(self.socket, array)
        except (EOFError, ConnectionError):
            raise OSError(self._end(group)) from None
        for name, level, text in records:
            if name == "absl":  # `pixels` warns of one thing, once, as each process does.
                logging.log_first_n(logging.WARNING, "%s", 1, text)
            else:
                python_logging.getLogger(name).log(level, text)
        return answer if isinstance(answer, Exception) else (seen, answer)

    def _end(self, group):
        self.socket.close()
        _started.discard(self)
        status = self.process.wait()
        how, cure = f"exit code {status}", "What it said stands above."
        if status < 0:
            how = f"signal {-status} ({signal.strsignal(-status)})"
            cure = "If one of these images brings it about, remove it."
        if -status == signal.SIGKILL:
            cure = (
                "So Linux ends what takes more memory than there is: run fewer programs beside "
                "it, or lower --max_pixels. The same command continues."
            )
        images = f"{len(group.names)} images from {group.names[0]} on"
        return f"{MUST_LIVE} Received: the end of one by {how}, which had {images} in hand. {cure}"


_free: list[_Process] = []
_started: set[_Process] = set()


def _begin_anew():
    """In a fork: the processes are its parent's, and end when no one has their sockets."""
    for process in _started:
        process.socket.close()
    _started.clear()
    _free.clear()
    _turns.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def serve(descriptor: int) -> None:
    """The program of a process: looks at the groups that a socket brings, until it ends."""
    records = _Records()
    python_logging.basicConfig(handlers=[records])
    with socket.socket(fileno=descriptor) as its_socket:
        while True:
            try:
                group = _receive_group(its_socket)
                seen, answer = [], None
                try:
                    seen, answer = look_at(group)
                except MemoryError as error:
                    answer = error
                except Exception as error:  # Of whatever kind: it is the training's to tell.
                    answer = RuntimeError(f"{type(error).__name__}: {error}")
                for _ in group.sources:  # That are still to come, after an error.
                    pass
                _send(its_socket, (answer, records.taken()))
                for array in seen:
                    its_socket.sendall(memoryview(array).cast("B"))
            except (EOFError, ConnectionError):
                return


class _Records(python_logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append((record.name, record.levelno, record.getMessage()))

    def taken(self):
        records, self.records = self.records, []
        return records


def _send_group(its_socket, group):
    if group.are_paths:
        _send(its_socket, group)
        return
    _send(its_socket, group._replace(sources=()))
    for source in group.sources:  # One by one, as they can be large.
        its_socket.sendall(LENGTH.pack(len(source)))
        its_socket.sendall(source)


def _receive_group(its_socket):
    group = _receive(its_socket)
    if group.are_paths:
        return group
    return group._replace(sources=(bytes(_receive_bytes(its_socket)) for _ in group.names))


def _send(its_socket, message):
    encoded = pickle.dumps(message)
    its_socket.sendall(LENGTH.pack(len(encoded)))
    its_socket.sendall(encoded)


def _receive(its_socket):
    return pickle.loads(_receive_bytes(its_socket))


def _receive_bytes(its_socket):
    length = bytearray(LENGTH.size)
    _receive_into(its_socket, length)
    message = bytearray(LENGTH.unpack(length)[0])
    _receive_into(its_socket, message)
    return message


def _receive_into(its_socket, buffer):
    """Fills a buffer. All of it is one call, for each gives Python's lock up and waits for it."""
    view = memoryview(buffer).cast("B")
    while view:
        count = its_socket.recv_into(view, len(view), socket.MSG_WAITALL)
        if not count:
            raise EOFError
        view = view[count:]
