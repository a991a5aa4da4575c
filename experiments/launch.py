r"""Runs several workers of run.py on this machine, and restarts all of them when one dies.

    python experiments/launch.py --workers=2 --restarts=3 -- \
        --flagfile=quickstart.flags --strategy=multi_worker

What stands behind `--` is handed to every run.py as it is. Several GPUs of one machine need no
launcher, --strategy=mirrored trains on all of them; here every worker would take them all.

TensorFlow's collectives cannot take a worker back: when one is lost, the others must end too, and
the whole group starts again from the last checkpoint. torchrun restarts a group that way, but
needs PyTorch; supervisors of single processes restart only the one that died.

Exit code: 0 when all workers ended with 0. A worker's own error (wrong flags, say), which a restart
cannot cure, is passed on. 143 or 130: told to stop (SIGTERM, Ctrl-C), and the workers have saved.
Otherwise, with no restart left, that of the worker that died first; 128 + the number for a signal.
"""

import argparse
import contextlib
import ctypes
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import program

RUN = pathlib.Path(__file__).resolve().with_name("run.py")
GRACE_SECONDS = 40  # A worker notices within 30 that a peer is lost, and says so.
STOP_SECONDS = 600  # For saving, once the launcher was told to stop.
POLL_SECONDS = 0.1
LOST_PEER = 75  # run.py's exit code for it.
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # run.py was told to stop, and has saved.
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def launch(command: list[str], workers: int, restarts: int) -> int:
    """Runs `workers` processes of `command` to their end, and returns the launcher's exit code."""
    received = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    for restart in range(restarts + 1):
        if restart:
            count = f"restart {restart} of {restarts}"
            say(f"Restarting all workers from the last checkpoint ({count}).")
        ended = run_workers(command, workers, received)
        codes = [code for _, code in ended]
        if not any(codes):
            return 0
        own_errors = [end for end in ended if end[1] > 0 and end[1] not in (LOST_PEER, *STOPPED)]
        if own_errors:
            worker, code = own_errors[0]
            say(f"No restart cures an error of its own: worker {worker} has said it above.")
            return code
        if received:
            return 128 + received[0]
        stopped = [code for code in codes if code in STOPPED]
        if stopped:
            return stopped[0]
    worker, first = next(end for end in ended if end[1])
    say(
        f"No restart is left of {restarts}. Worker {worker} was the first to end, {how(first)}. "
        "The same command continues from the last checkpoint."
    )
    return first if first > 0 else 128 - first


def run_workers(command: list[str], workers: int, received: list[int]) -> list[tuple[int, int]]:
    """Runs the group once.

    Args:
        command: the same for all; TF_CONFIG tells a worker which one it is.
        workers: how many.
        received: signals that the launcher was sent; its handlers add to it meanwhile.

    Returns:
        Workers and their exit codes in the order in which they ended; -number for a signal.
    """
    processes = start(command, workers)
    # Threads only now, when all are started: `start` forks.
    readers = [
        threading.Thread(target=print_lines, args=(index, process.stdout), daemon=True)
        for index, process in enumerate(processes)
    ]
    for reader in readers:
        reader.start()
    running = dict(enumerate(processes))
    ended, deadline, forwarded, killed = [], None, False, set()
    while running:
        time.sleep(POLL_SECONDS)
        for index, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[index]
            ended.append((index, code))
            if code:
                by_launcher = index in killed and code == -signal.SIGKILL
                what = "by SIGKILL of the launcher" if by_launcher else how(code)
                say(f"Worker {index} ended {what}.")
                # A launcher that was told to stop lets the others save.
                if deadline is None and not received:
                    deadline = time.monotonic() + GRACE_SECONDS
                    if running:
                        say(
                            f"None can go on without it: {_workers(running)} will notice and end; "
                            f"in {GRACE_SECONDS:g} s the launcher ends who has not."
                        )
        if received and not forwarded:
            say(f"{signal.Signals(received[0]).name}: the workers save and end.")
            for process in running.values():
                process.terminate()
            forwarded = True
            deadline = time.monotonic() + STOP_SECONDS
        impatient = signal.SIGINT in received[1:]
        if impatient or (deadline is not None and time.monotonic() > deadline):
            # One whose peer is gone cannot save any more.
            for index in set(running) - killed:
                say(
                    f"Worker {index} has not ended by itself: the launcher ends it. (Who scores, "
                    "or waits for who scores, does not notice that another one is gone.)"
                )
                running[index].kill()
                killed.add(index)
    for reader in readers:
        reader.join(timeout=5)  # A grandchild might hold the pipe open.
    return ended


def how(code: int) -> str:
    """How a process has ended."""
    if code < 0:
        name = signal.Signals(-code).name
        # Nothing else is heard of it.
        return f"by {name}" + ", as where the machine's memory ran out" * (code == -signal.SIGKILL)
    meanings = {LOST_PEER: "it has lost another worker"}
    meanings |= dict.fromkeys(STOPPED, "it was told to stop, and has saved")
    return f"with exit code {code} ({meanings.get(code, 'an error of its own')})"


def _workers(running):
    return f"worker{'s' * (len(running) > 1)} {', '.join(map(str, running))}"


def start(command: list[str], workers: int) -> list[subprocess.Popen]:
    addresses = free_addresses(workers)
    libc = ctypes.CDLL(None)

    def end_with_the_launcher():
        # Should the launcher be killed, its workers save and end instead of living on.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    processes = []
    for index in range(workers):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        processes.append(
            subprocess.Popen(
                command,
                env={**os.environ, "TF_CONFIG": json.dumps(task), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches them through the launcher only.
                preexec_fn=end_with_the_launcher if sys.platform == "linux" else None,
            )
        )
    return processes


def free_addresses(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        # All open until the last is chosen, or one port would be given twice.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


def print_lines(index: int, stream) -> None:
    for line in stream:
        say(f"[worker {index}] {line.rstrip()}")


def say(text: str) -> None:
    # In one piece: the lines of several threads must not mix.
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    program.prepare()
    here = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    flags_of_run = sys.argv[here + 1 :]
    # argparse, not absl: what is wrong ends with exit code 2, and --flagfile is left to run.py.
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="launch.py [--workers=N] [--restarts=N] -- FLAGS OF run.py",
        allow_abbrev=False,
    )
    parser.add_argument("--workers", type=int, default=2, help="how many; default 2")
    parser.add_argument("--restarts", type=int, default=3, help="of all workers; default 3")
    settings = parser.parse_args(sys.argv[1:here])
    if not flags_of_run:
        parser.error(
            "Expected run.py's flags behind --. Received: nothing. "
            "Add, for example: -- --flagfile=quickstart.flags --strategy=multi_worker"
        )
    if settings.workers < 1:
        parser.error(f"--workers must be at least 1. Received: {settings.workers}.")
    if settings.restarts < 0:
        parser.error(f"--restarts must be at least 0. Received: {settings.restarts}.")
    # As other programs in `launch.py ... | head`: else the workers would block on a full pipe.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    return launch([sys.executable, str(RUN), *flags_of_run], settings.workers, settings.restarts)


if __name__ == "__main__":
    sys.exit(main())
