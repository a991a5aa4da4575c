"""Few labels of photo_patches: a pretrained encoder, finetuned and frozen, against random weights.

    python benchmarks/finetune.py --encoder=runs/quickstart --workdir=runs/few_labels

Calls experiments/finetune.py for each share of the labels, each seed (which draws the labels and
the held-out part) and each start, and prints the table of docs/finetune.md. It can be interrupted:
what has been finished is only read.
"""

import argparse
import json
import pathlib
import subprocess
import sys

FINETUNE = pathlib.Path(__file__).parent.parent / "experiments" / "finetune.py"
SHARES = (0.01, 0.05, 0.1)
SEEDS = (0, 1, 2)
FROM_SCRATCH = ("--encoder=tiny_resnet", "--image_size=32")  # The quickstart's network.


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", required=True, help="workdir of the quickstart")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    asked = parser.parse_args()
    columns = {
        "pretrained, finetuned": ("pretrained", "top1"),
        "pretrained, frozen and linear": ("pretrained", "linear_top1"),
        "from scratch": ("scratch", "top1"),
        "random, frozen and linear": ("scratch", "linear_top1"),
    }
    print(f"| labels | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}", flush=True)
    for share in SHARES:
        results = {
            "pretrained": [
                results_of(asked, (f"--encoder={asked.encoder}",), share, s) for s in SEEDS
            ],
            "scratch": [results_of(asked, FROM_SCRATCH, share, seed) for seed in SEEDS],
        }
        cells = []
        for start, score in columns.values():
            values = [100 * of_seed[score] for of_seed in results[start]]
            mean = sum(values) / len(values)
            cells.append(f"{mean:.1f}% ({min(values):.1f} to {max(values):.1f})")
        print(f"| {share:.0%} | {' | '.join(cells)} |", flush=True)


def results_of(asked, start, share, seed):
    """The results.json of a training, which is done first if it has not been."""
    name = "scratch" if start is FROM_SCRATCH else "pretrained"
    workdir = asked.workdir / f"{name}_{share:g}_{seed}"
    if not (workdir / "results.json").exists():
        subprocess.run(
            [
                *(sys.executable, str(FINETUNE), "--dataset=photo_patches", *start),
                *(f"--label_fraction={share}", f"--seed={seed}", f"--workdir={workdir}"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return json.loads((workdir / "results.json").read_text())


if __name__ == "__main__":
    main()
