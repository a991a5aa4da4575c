"""isd_tf against PyTorch on the same cores: steps, views, a whole training, nearest neighbours.

    make benchmark                      every row, three quarters of an hour on two cores
    make benchmark ONLY=views,knn       rows whose names begin so: step, views, quickstart, ...

Each side of a row is a process with all cores, PyTorch's in an environment of its own. They take
turns, forth and back (A B C, C B A), and the one that waits is stopped, with its loaders. A block
starts by using up what was prepared in advance. PyTorch runs in several variants, of which the one
with the best median counts. The evaluation's rows have isd_tf on both sides.

Prints a table, and writes all rates as JSON: --json, by default runs/benchmark.json.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import race
import skimage
from PIL import Image

HERE = pathlib.Path(__file__).parent
ROUNDS = 6


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        title: what is done.
        unit: what a rate counts.
        kind: which function of each side does it.
        sizes: what that function is told.
        theirs: PyTorch's variants, or with `ours` isd_tf's own to compare with.
        ours: the variant of isd_tf.
    """

    title: str
    unit: str
    kind: str
    sizes: dict
    theirs: tuple[str, ...]
    ours: str = "isd_tf"


NETWORKS = ("eager", "channels_last, compile")
VIEWS = ("PIL", "tensors")
ISD = dict(heads="isd", temperatures=(0.02, 0.02), learning_rate=0.01, queue_size=16_384)
ISD_PLUS = ISD | dict(heads="isd_plus", temperatures=(0.01, 0.1))
RESNET18 = dict(encoder="resnet18", features=512)
RESNET50 = dict(encoder="resnet50", features=2048)
# quickstart.flags
QUICKSTART = dict(
    encoder="tiny_resnet", features=128, heads="isd", temperatures=(0.02, 0.1), learning_rate=0.1
)
FILES = dict(images="files", files=256)

ROWS = {
    "step_resnet18_32": Row(
        "ISD step, ResNet-18, 32x32, B = 64, K = 16 384",
        "images/s",
        "step",
        ISD | RESNET18 | dict(image_size=32, batch=64, calls=6),
        NETWORKS,
    ),
    "step_resnet18_224": Row(
        "ISD step, ResNet-18, 224x224, B = 32, K = 16 384",
        "images/s",
        "step",
        ISD | RESNET18 | dict(image_size=224, batch=32, calls=3),
        NETWORKS,
    ),
    "step_resnet50_224": Row(
        "ISD+ step, ResNet-50, 224x224, B = 16, K = 16 384",
        "images/s",
        "step",
        ISD_PLUS | RESNET50 | dict(image_size=224, batch=16, calls=2),
        NETWORKS,
    ),
    "views_224": Row(
        "pairs of views, 224x224 from 500x375 JPEG, weak and strong",
        "pairs/s",
        "views",
        FILES | dict(image_size=224, batch=32, calls=40),
        VIEWS,
    ),
    "views_224_host": Row(
        "the host's half of them: decoding, two crops",
        "pairs/s",
        "host",
        FILES | dict(image_size=224, batch=32, calls=60),
        VIEWS,
    ),
    # As under Linux on ARM.
    "views_224_by_pillow": Row(
        "the same pairs, resized by Pillow",
        "pairs/s",
        "views",
        FILES | dict(image_size=224, batch=32, calls=40, by_pillow=True),
        VIEWS,
    ),
    "views_224_host_by_pillow": Row(
        "the host's half of them, resized by Pillow",
        "pairs/s",
        "host",
        FILES | dict(image_size=224, batch=32, calls=60, by_pillow=True),
        VIEWS,
    ),
    "views_32": Row(
        "pairs of views, 32x32 from arrays",
        "pairs/s",
        "views",
        dict(images="patches", image_size=32, batch=64, calls=200),
        VIEWS,
    ),
    "quickstart": Row(
        "quickstart end to end: views, networks, queue",
        "images/s",
        "training",
        QUICKSTART | dict(images="patches", image_size=32, batch=64, queue_size=1024, calls=60),
        NETWORKS,
    ),
    "knn": Row(
        "kNN, 10 000 queries, bank of 100 000 x 512",
        "queries/s",
        "neighbors",
        dict(k=20, calls=1),
        ("faiss-cpu, IndexFlatIP",),
    ),
    "evaluation_224": Row(
        "features of evaluation views, ResNet-18, images of 224x224",
        "images/s",
        "evaluation",
        dict(encoder="resnet18", image_size=224, images="squares", batch=64, calls=4),
        ("encoder alone",),
        "features",
    ),
    "evaluation_224_files": Row(
        "the same from 500x375 JPEG",
        "images/s",
        "evaluation",
        FILES | dict(encoder="resnet18", image_size=224, batch=64, calls=4),
        ("encoder alone",),
        "features",
    ),
    "evaluation_32": Row(
        "features of evaluation views, ResNet-18, images of 32x32",
        "images/s",
        "evaluation",
        dict(encoder="resnet18", image_size=32, images="patches", batch=256, calls=4),
        ("encoder alone",),
        "features",
    ),
}


# ---------------------------------------------------------------------------------- their images


def write_files(folder, count):
    """JPEG files of 500x375, ImageNet's usual size, from scikit-image's photographs."""
    photographs = [
        Image.open(pathlib.Path(skimage.__file__).parent / "data" / name).convert("RGB")
        for name in ("astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
    ]
    random = np.random.default_rng(0)
    for i in range(count):
        side = random.integers(200, 400)
        corner = random.integers(0, 100, 2)
        box = (*corner, corner[0] + side, corner[1] + side * 3 // 4)
        photograph = photographs[i % 4].resize((500, 375), box=box)
        photograph.save(f"{folder}/{i}.jpg", quality=90)


def write_data(folder, row):
    """Writes what both sides of a row read."""
    images = row.sizes.get("images")
    if images == "files":
        write_files(folder, row.sizes["files"])
    elif images == "patches":
        from isd_tf.data import photo_patches

        np.save(f"{folder}/patches.npy", photo_patches.make_patches("train")[0])
    elif images == "squares":
        squares = np.random.default_rng(0).integers(0, 256, (512, 224, 224, 3), np.uint8)
        np.save(f"{folder}/squares.npy", squares)
    elif row.kind == "neighbors":
        for name, count, seed in (("bank", 100_000, 1), ("queries", 10_000, 2)):
            np.save(f"{folder}/{name}.npy", unit_rows(count, seed))


def unit_rows(count, seed, dimension=512, classes=1000):
    """A class's centre, and noise."""
    centres = np.random.default_rng(0).standard_normal((classes, dimension), np.float32)
    noise = np.random.default_rng(seed).standard_normal((count, dimension), np.float32)
    rows = centres[np.arange(count) % classes] + 3 * noise
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# ------------------------------------------------------------------------------------- the race


def run_row(row, torch_python, rounds):
    """Returns the rates of every round by variant, isd_tf's first, and what else was seen."""
    is_own = row.kind == "evaluation"
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder, row)

        def contestant(python, program):
            return race.Contestant([python, str(HERE / program)], row.kind, row.sizes, folder)

        ours = contestant(sys.executable, "race_isd_tf.py")
        theirs = ours if is_own else contestant(torch_python, "race_pytorch.py")
        turns = [(row.ours, ours), *((variant, theirs) for variant in row.theirs)]
        try:
            for variant, side in turns:
                side.rate(variant)  # builds, compiles, warms up
            rates = {variant: [] for variant, _ in turns}
            for i in range(rounds):
                # Whichever comes second finds a warmer machine: forth and back.
                for variant, side in turns if i % 2 == 0 else reversed(turns):
                    rates[variant].append(side.rate(variant))
        finally:
            for side in {ours, theirs}:
                side.end()
        seen = compare_neighbors(folder) if row.kind == "neighbors" else {}
    return rates, seen


def compare_neighbors(folder):
    bank, queries, ours, theirs = (
        np.load(f"{folder}/{name}.npy") for name in ("bank", "queries", "rows_isd_tf", "rows_faiss")
    )
    differ = ours != theirs  # [Q, k]
    asking = queries[np.nonzero(differ)[0]].astype(np.float64)
    similarities = [np.sum(asking * bank[rows[differ]], axis=1) for rows in (ours, theirs)]
    apart = np.abs(similarities[0] - similarities[1]).max(initial=0.0)
    return {"neighbors_that_differ": float(differ.mean()), "their_similarities": float(apart)}


def summary(row, rates):
    """The rates of isd_tf over those of the variant with the best median."""
    best = max(row.theirs, key=lambda variant: statistics.median(rates[variant]))
    ours, theirs = rates[row.ours], rates[best]
    by_round = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "best": best,
        "ratio_of_medians": statistics.median(ours) / statistics.median(theirs),
        "ratio_of_bests": max(ours) / max(theirs),
        "ratio_by_round": [min(by_round), statistics.median(by_round), max(by_round)],
    }


def machine():
    with open("/proc/cpuinfo") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return {"processor": models[0] if models else platform.machine(), "cores": race.CORES}


def versions(python):
    """What is installed beside `python` of all that matters here."""
    names = "tensorflow keras torch torchvision faiss-cpu".split()
    names += "pillow simplejpeg cykooz-resizer numpy".split()
    program = (
        "import importlib.metadata as m, json; have = {d.name.lower(): d.version for d in "
        f"m.distributions()}}; print(json.dumps({{n: have[n] for n in {names} if n in have}}))"
    )
    done = subprocess.run([python, "-c", program], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------------ the table


def figure(rate):
    return f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"


def spread(values):
    return f"{figure(statistics.median(values))} ({figure(min(values))} to {figure(max(values))})"


def table(results):
    """Markdown: rates as median (least to most), ratios of medians (by round) and of bests."""
    lines = [
        "| same work | isd_tf | against | isd_tf / best | best of each |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        row, rates, found = ROWS[name], result["rates"], result["summary"]
        against = "; ".join(f"{variant}: {spread(rates[variant])}" for variant in row.theirs)
        least, _, most = found["ratio_by_round"]
        lines.append(
            f"| {row.title} | {spread(rates[row.ours])} {row.unit} | {against} | "
            f"**{found['ratio_of_medians']:.2f}** ({least:.2f} to {most:.2f}) | "
            f"{found['ratio_of_bests']:.2f} |"
        )
    return "\n".join(lines)


def chosen_rows(only):
    wanted = only.split(",") if only else [""]
    for prefix in wanted:
        if not any(name.startswith(prefix) for name in ROWS):
            sys.exit(f"ONLY must name rows: {', '.join(ROWS)}. Received: {prefix}.")
    return {name: row for name, row in ROWS.items() if name.startswith(tuple(wanted))}


def main(arguments):
    rows = chosen_rows(arguments.only)
    about = {
        "machine": machine(),
        "rounds": arguments.rounds,
        "isd_tf": versions(sys.executable),
        "pytorch": versions(arguments.torch_python),
    }
    results = {}
    for name, row in rows.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        rates, seen = run_row(row, arguments.torch_python, arguments.rounds)
        results[name] = {"unit": row.unit, "rates": rates, "summary": summary(row, rates)} | seen
        print(table({name: results[name]}).splitlines()[-1], file=sys.stderr, flush=True)
        # After every row, so that one that fails loses no other.
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(about | {"rows": results}, indent=2) + "\n")
    print(f"{about['machine']['processor']}, {race.CORES} cores, {arguments.rounds} rounds; rates")
    print("as median (least to most), their ratio also round by round.\n")
    print(table(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch_python", required=True, help="with benchmarks/requirements.txt")
    parser.add_argument("--only", default="", help="names of rows begin so, with commas between")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("runs/benchmark.json"))
    main(parser.parse_args())
