"""Resident memory of a run at step 300 and at step 2000, seen from outside.

    python benchmarks/memory.py

Runs the quickstart's recipe by experiments/run.py, checkpoints and logs and all, at batch 16 and
without the kNN evaluations, whose features come and go; reads /proc/<pid>/status when the
checkpoints of steps 300, 1000 and 2000 appear.
"""

import pathlib
import subprocess
import sys
import tempfile
import time

RUN = pathlib.Path(__file__).parent.parent / "experiments" / "run.py"


def resident_megabytes(pid):
    with open(f"/proc/{pid}/status") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def main(arguments):
    with tempfile.TemporaryDirectory() as workdir:
        flags = ["--flagfile=quickstart.flags", "--batch_size=16", "--epochs=4"]
        flags += ["--knn_every_epochs=0", "--checkpoint_every_steps=100", f"--workdir={workdir}"]
        process = subprocess.Popen(
            [sys.executable, str(RUN), *flags, *arguments], stdout=subprocess.DEVNULL
        )
        seen = {}
        for step in (300, 1000, 2000):
            checkpoint = pathlib.Path(workdir) / "checkpoints" / f"step-{step:08d}"
            while not checkpoint.exists():
                if process.poll() is not None:
                    sys.exit("The run ended early.")
                time.sleep(0.05)
            seen[step] = resident_megabytes(process.pid)
            print(f"step {step}: {seen[step]:.0f} MB, {seen[step] / seen[300]:.3f} of step 300")
        process.kill()
        process.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
