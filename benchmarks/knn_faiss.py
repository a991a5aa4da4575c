"""Exact nearest neighbours by inner product: isd_tf's search against faiss-cpu's IndexFlatIP.

    PYTHONPATH=. python benchmarks/knn_faiss.py [K]

The 20 (or K) nearest of 100 000 unit rows of 512 numbers for each of 10 000 queries. faiss lives in
an environment of its own, ~/.cache/isd_tf/knn_faiss, made at the first run. Each side is a process
with all cores; the two search in turn, and the ratio is taken pair by pair. Only the search is
timed: faiss has its index before, while isd_tf is handed the bank chunk by chunk, as knn_accuracy
does. Then prints how far the neighbours agree.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import venv

import numpy as np

BANK, QUERIES, DIMENSION, CLASSES, PAIRS = 100_000, 10_000, 512, 1000, 15
PACKAGES = ["faiss-cpu==1.15.1", "numpy==2.4.6"]
FAISS_HOME = pathlib.Path.home() / ".cache" / "isd_tf" / "knn_faiss"


def unit_rows(count, seed):
    """A class's centre, and noise."""
    centres = np.random.default_rng(0).standard_normal((CLASSES, DIMENSION), np.float32)
    noise = np.random.default_rng(seed).standard_normal((count, DIMENSION), np.float32)
    rows = centres[np.arange(count) % CLASSES] + 3 * noise
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def faiss_search(bank, queries, k):
    import faiss

    faiss.omp_set_num_threads(os.cpu_count())
    index = faiss.IndexFlatIP(DIMENSION)
    index.add(bank)
    return lambda: index.search(queries, k)[1]


def isd_tf_search(bank, queries, k):
    import tensorflow as tf

    from isd_tf.evaluation import knn

    tf.config.threading.set_intra_op_parallelism_threads(os.cpu_count())

    def search():
        nearest = knn._NearestNeighbors(queries, k)
        for first in range(0, BANK, knn.BANK_CHUNK):
            nearest.add(bank[first : first + knn.BANK_CHUNK])
        return nearest.rows

    return search


def serve(side, folder, k):
    """Searches once for every line that comes, and answers with the seconds it took."""
    make = {"faiss": faiss_search, "isd_tf": isd_tf_search}[side]
    search = make(np.load(f"{folder}/bank.npy"), np.load(f"{folder}/queries.npy"), int(k))
    for _ in sys.stdin:
        start = time.perf_counter()
        rows = search()
        print(time.perf_counter() - start, flush=True)
    np.save(f"{folder}/{side}.npy", rows)


def faiss_python():
    python = FAISS_HOME / "bin" / "python"
    if not python.exists():
        venv.create(FAISS_HOME, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def start(python, *arguments):
    # OPENBLAS_CORETYPE and its like would choose faiss's matrix product for it.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENBLAS_", "OMP_"))
    } | {"TF_ENABLE_ONEDNN_OPTS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [python, __file__, "--serve", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    return subprocess.Popen(command, env=environment, **pipes)


def seconds(process):
    process.stdin.write("\n")
    return float(process.stdout.readline())


def compare_times(processes):
    for process in processes.values():
        seconds(process)  # compiles
    pairs = []
    for i in range(PAIRS):
        # Whichever comes second may find a warmer or a busier machine: take turns.
        order = list(processes) if i % 2 else list(processes)[::-1]
        pairs.append({side: seconds(processes[side]) for side in order})
    ratios = [times["isd_tf"] / times["faiss"] for times in pairs]
    print(
        f"time, isd_tf / faiss: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to "
        f"{max(ratios):.3f}, {PAIRS} pairs"
    )
    for side in processes:
        print(f"{side}: median {statistics.median(times[side] for times in pairs):.2f} s")


def compare_neighbors(rows, bank, queries):
    differ = rows["isd_tf"] != rows["faiss"]  # [Q, k]
    print(f"neighbours that agree: {1 - differ.mean():.6f} of {differ.size}")
    if differ.any():
        asking = queries[np.nonzero(differ)[0]].astype(np.float64)
        ours, theirs = (np.sum(asking * bank[rows[x][differ]], axis=1) for x in rows)
        print(f"similarities where they do not: at most {np.abs(ours - theirs).max():.1e} apart")


def main(k):
    bank, queries = unit_rows(BANK, 1), unit_rows(QUERIES, 2)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/bank.npy", bank)
        np.save(f"{folder}/queries.npy", queries)
        pythons = {"isd_tf": sys.executable, "faiss": faiss_python()}
        processes = {side: start(pythons[side], side, folder, str(k)) for side in pythons}
        compare_times(processes)
        for process in processes.values():
            process.stdin.close()
            process.wait()
        rows = {side: np.load(f"{folder}/{side}.npy") for side in processes}
    compare_neighbors(rows, bank, queries)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
