"""Seconds from the command to the end of the first training step, and to each answer before it.

    python benchmarks/start.py [TIMES]

Starts experiments/run.py as a user does: the quickstart until metrics.jsonl has its first step, the
help, and two mistakes. Median, least and most of so many times, in turn.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

RUN = str(pathlib.Path(__file__).parent.parent / "experiments" / "run.py")
ANSWERS = ("--help", "--flagfile=quikstart.flags", "--epoch=3")


def to_first_step():
    with tempfile.TemporaryDirectory() as workdir:
        metrics = pathlib.Path(workdir) / "metrics.jsonl"
        flags = ["--flagfile=quickstart.flags", f"--workdir={workdir}", "--log_every_steps=1"]
        began = time.time()
        process = subprocess.Popen([sys.executable, RUN, *flags], stdout=subprocess.DEVNULL)
        try:
            while not (metrics.exists() and "\n" in metrics.read_text()):
                if process.poll() is not None:
                    sys.exit("The run ended early.")
                time.sleep(0.05)
            return json.loads(metrics.read_text().splitlines()[0])["time"] - began
        finally:
            process.kill()
            process.wait()


def to_the_answer(flag):
    began = time.time()
    answer = subprocess.run([sys.executable, RUN, flag], capture_output=True)
    if b"Traceback" in answer.stderr or not answer.stdout + answer.stderr:
        sys.exit(f"run.py {flag} must be answered in a sentence. Received: {answer.stderr!r}")
    return time.time() - began


def main(times):
    seconds = {"first step of the quickstart": []} | {flag: [] for flag in ANSWERS}
    for _ in range(times):
        for what, known in seconds.items():
            known.append(to_the_answer(what) if what in ANSWERS else to_first_step())
    for what, known in seconds.items():
        print(f"{what}: {statistics.median(known):.2f} s ({min(known):.2f} to {max(known):.2f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
