"""Processes beside this one, in which images are read, decoded and cropped in Python.

Python runs one thread at a time, and a host of many cores has work for many. So each thread of
tf.data hands a group of images to a process, and waits for the crops:

    tf.data's thread  ->  Group  ->  socket  ->  look_at, image by image  ->  socket  ->  crops

There are at most as many as cores, each started when a thread finds none free. They stay, and end
when this process does, however it ends, after the group that they have in hand.
"""

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
import weakref
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

    Raises:
        RuntimeError: for whatever else is amiss, with the name of the image.
    """
    seen, reasons = group.arrays(np.zeros), {}

    # A function of its own, so that an image is gone before the next is opened.
    def look_at_image(i, source):
        encoded = pixels.read_file(source) if group.are_paths else source
        image = pixels.decode(encoded, group.names[i], group.max_pixels)
        for of_all, of_one in zip(seen, group.look(image, group.draws[i]), strict=True):
            of_all[i] = of_one

    for i, source in enumerate(group.sources):
        try:
            look_at_image(i, source)
        except pixels.UnreadableImage as error:
            reasons[i] = str(error)
        except MemoryError:
            reasons[i] = "more than fits into the memory"
            for of_all in seen:  # Some may have been there.
                of_all[i] = 0
        except Exception as error:
            text = f"{group.names[i]} cannot be cropped: {type(error).__name__}: {error}"
            raise RuntimeError(text) from error
    return seen, reasons


def look_at_in_process(group: Group) -> tuple[list[np.ndarray], dict[int, str]]:
    """Does `look_at` in another process, without Python's lock.

    Raises:
        OSError: when the process cannot be started, or ends.
        RuntimeError: as `look_at` does.
    """
    if group.are_paths:  # The process may have been started elsewhere.
        here = os.getcwdb()
        group = group._replace(sources=[os.path.join(here, path) for path in group.sources])
    with _turns():
        process = _free_process()
        try:
            answer = process.look_at(group)
        except BaseException:  # Who knows what the process would take the next message for.
            process.socket.close()
            raise
        _free.append(process)
    if isinstance(answer, Exception):
        raise answer
    return answer


def _turns():
    """Lets as many threads pass as there are cores."""
    if not _only_turns:
        import joblib  # Which the processes do not need.

        # Of threads that come here at once, the first one's is everyone's.
        _only_turns.setdefault("", threading.BoundedSemaphore(joblib.cpu_count()))
    return _only_turns[""]


def _free_process():
    while True:
        try:
            process = _free.pop()
        except IndexError:
            return _Process()
        if process.process.poll() is None:
            return process
        process.socket.close()  # What ended when it had no work has lost nothing.


class _Process:
    """A process, as the one that started it sees it."""

    def __init__(self):
        self.socket, its_own = socket.socketpair()
        _sockets.update((self.socket, its_own))
        # Its work is one thread's. It looks for modules where this process does.
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        paths = [path for path in sys.path if isinstance(path, str) and path]
        # It never sees these signals: who sends them to all processes of a training means the
        # training, which ends this one.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
            with its_own:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", PROGRAM, str(PACKAGE)],
                    stdin=its_own,
                    env=os.environ | one_thread | {"PYTHONPATH": os.pathsep.join(paths)},
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

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
        status = self.process.wait()
        how = f"exit code {status}"
        cure = "What it said stands in the output of the program that had started it."
        if status < 0:
            how = f"signal {-status} ({signal.strsignal(-status)})"
            cure = "If one of these images brings that about, remove it."
        if -status == signal.SIGKILL:
            cure = (
                "So Linux ends what takes more memory than there is: run fewer programs beside "
                "it, or lower --max_pixels. The same command continues."
            )
        images = ", ".join(group.names)
        return f"{MUST_LIVE} Received: the end of one, by {how}. It had to decode {images}. {cure}"


_free: list[_Process] = []
_only_turns: dict[str, threading.BoundedSemaphore] = {}
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _begin_anew():
    """In a fork: the processes are its parent's, and end when no one else has their sockets."""
    for own in _sockets:
        own.close()
    _free.clear()
    _only_turns.clear()


os.register_at_fork(after_in_child=_begin_anew)


def serve(descriptor: int) -> None:
    """The program of a process: looks at the groups that a socket brings, until it ends."""
    records = _Records()
    python_logging.basicConfig(handlers=[records])
    with socket.socket(fileno=descriptor) as its_socket:
        while True:
            try:
                group = _receive_group(its_socket)
                seen, answer = _answer_to(group)
                for _ in group.sources:  # That are still to come, after an error.
                    pass
                _send(its_socket, (answer, records.taken()))
                for array in seen:
                    its_socket.sendall(memoryview(array).cast("B"))
            except (EOFError, ConnectionError):
                return


def _answer_to(group):
    try:
        return look_at(group)
    except RuntimeError as error:
        return [], RuntimeError(str(error))  # Without what its traceback holds.


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
