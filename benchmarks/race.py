"""A race of two processes that never run at once: what both sides and their referee share."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

CORES = len(os.sched_getaffinity(0))


def serve(makers):
    """A contestant's program: answers the referee's messages, JSON by the line, until they end.

    Args:
        makers: by name, functions of (variant, sizes, folder) that set a row up and return `run`,
            which does one block of the work and returns how many things it did, and the seconds.
    """
    # What libraries print goes to stderr, so that answers stand alone on stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runs = {}
    for line in sys.stdin:
        message = json.loads(line)
        variant = message["variant"]
        if variant not in runs:
            runs[variant] = makers[message["kind"]](variant, message["sizes"], message["folder"])
        print(json.dumps(runs[variant]()), file=answers, flush=True)


def timed(work, things, calls, discarded=1):
    """Calls `work` and returns how many things that made, and the seconds.

    The first calls are not counted: they find cold caches, and what was prepared in advance.
    """
    for _ in range(discarded):
        work()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return calls * things, time.perf_counter() - start


class Contestant:
    """The referee's handle of one side: a process that is stopped whenever it is not its turn.

    Stopped by a signal, with all its children: what prepares data in advance would otherwise do so
    in the other side's time.
    """

    def __init__(self, command, kind, sizes, folder):
        self.name = " ".join(command)
        self.message = {"kind": kind, "sizes": sizes, "folder": folder}
        environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        self._signal(signal.SIGSTOP)

    def rate(self, variant):
        """Lets the contestant do one block of a variant; returns things a second."""
        self._signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(self.message | {"variant": variant}) + "\n")
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"{self.name} must answer with a time. Received: its end, with exit status "
                f"{self.process.wait()}. Its own message stands above."
            )
        self._signal(signal.SIGSTOP)
        things, seconds = json.loads(answer)
        return things / seconds

    def end(self):
        """Ends the process and its children; waits, so that their memory is free."""
        with contextlib.suppress(ProcessLookupError):  # It may have ended by itself.
            self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number):
        os.killpg(self.process.pid, number)
