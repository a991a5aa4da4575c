"""The referee of `make benchmark`: whose turn it is, what is timed, which variant counts."""

import importlib
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from isd_tf.views import python_crops

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
# A contestant whose thread writes the time into a file whenever it may run.
PROGRAM = """
import pathlib, sys, threading, time
sys.path.insert(0, {benchmarks!r})
import race

def count(variant, sizes, folder):
    def tick():
        while True:
            pathlib.Path(folder, "alive").write_text(str(time.monotonic()))
            time.sleep(0.005)

    threading.Thread(target=tick, daemon=True).start()
    print("not an answer")
    if variant == "broken":
        sys.exit(3)

    def run():
        time.sleep(0.3)
        return sizes["things"], 2.0

    return run

race.serve({{"count": count}})
"""


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def contestant(benchmark, tmp_path):
    program = tmp_path / "contestant.py"
    program.write_text(PROGRAM.format(benchmarks=str(BENCHMARKS)))
    command = [sys.executable, str(program)]
    side = benchmark("race").Contestant(command, "count", {"things": 10}, str(tmp_path))
    yield side
    side.end()


def test_a_contestant_answers_with_its_rate(contestant):
    assert contestant.rate("any") == 5.0
    assert contestant.rate("any") == 5.0


def test_a_contestant_that_waits_stands_still(contestant, tmp_path):
    contestant.rate("any")
    time.sleep(0.3)  # the signal's way
    before = (tmp_path / "alive").read_text()
    time.sleep(0.1)
    assert (tmp_path / "alive").read_text() == before
    contestant.rate("any")
    assert (tmp_path / "alive").read_text() != before


def test_a_contestant_that_dies_is_named(contestant):
    with pytest.raises(RuntimeError, match=r"contestant.py must answer.*exit status 3"):
        contestant.rate("broken")


def test_what_was_prepared_in_advance_is_not_timed(benchmark):
    ready = iter([0.0] * 3 + [0.02] * 4)
    things, seconds = benchmark("race").timed(lambda: time.sleep(next(ready)), 8, 4, discarded=3)
    assert things == 32 and 0.08 <= seconds < 0.5


def test_the_variant_with_the_best_median_counts(benchmark):
    against = benchmark("against_pytorch")
    row = against.Row("", "", "step", {}, ("lucky", "better"))
    rates = {"isd_tf": [4.0, 6.0, 5.0], "lucky": [1.0, 9.0, 1.0], "better": [2.0, 4.0, 2.5]}
    found = against.summary(row, rates)
    assert found["best"] == "better"
    assert found["ratio_of_medians"] == 2.0
    assert found["ratio_of_bests"] == 1.5
    assert found["ratio_by_round"] == [1.5, 2.0, 2.0]


def test_rows_are_chosen_by_how_their_names_begin(benchmark):
    against = benchmark("against_pytorch")
    assert list(against.chosen_rows("knn,views_224")) == [
        *("views_224", "views_224_host", "views_224_by_pillow", "views_224_host_by_pillow", "knn")
    ]
    assert against.chosen_rows("") == against.ROWS
    with pytest.raises(SystemExit, match="Received: nothing"):
        against.chosen_rows("views,nothing")


SMALL = dict(image_size=8, batch=2, calls=1, files=4, encoder="tiny_resnet", heads="isd")
SMALL |= dict(queue_size=8, temperatures=(0.1, 0.1), learning_rate=0.1, k=2)


@pytest.mark.parametrize(
    "kind, variant, own, things",
    [
        ("step", "isd_tf", {}, 2),
        ("views", "isd_tf", {"images": "files"}, 2),
        ("views", "isd_tf", {"images": "files", "by_pillow": True}, 2),
        ("host", "isd_tf", {"images": "patches"}, 2),
        ("training", "isd_tf", {"images": "patches"}, 2),
        ("neighbors", "isd_tf", {}, 3),
        ("evaluation", "features", {"images": "files"}, 2),
        ("evaluation", "encoder alone", {"images": "patches"}, 2),
    ],
)
def test_each_kind_of_row_runs_on_our_side(
    kind, variant, own, things, benchmark, tmp_path, monkeypatch
):
    resizer = python_crops.cykooz_resizer
    monkeypatch.setattr(python_crops, "cykooz_resizer", resizer)  # A row by Pillow sets it.
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (4, 9, 10, 3), np.uint8)
    np.save(tmp_path / "patches.npy", pictures)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.jpg")
    for name, count in (("bank", 5), ("queries", 3)):
        np.save(tmp_path / f"{name}.npy", random.standard_normal((count, 4)).astype(np.float32))
    make = getattr(benchmark("race_isd_tf"), kind)
    done, seconds = make(variant, SMALL | own, str(tmp_path))()
    assert done == things and seconds > 0
    assert python_crops.cykooz_resizer is (None if "by_pillow" in own else resizer)


@pytest.mark.parametrize("form", ["at once", "in chunks"])
def test_the_forms_of_the_divergence_can_be_raced(form, benchmark):
    kl = benchmark("kl")
    rows = tf.constant(np.eye(512, dtype=np.float32)[:6])
    loss, gradient, entropy, nearest = kl.loss_and_gradient(form)(rows[:2], rows[:2], rows)
    assert np.isfinite(loss) and gradient.shape == (2, 512)
    np.testing.assert_array_equal(nearest[:, 0], [0, 1])


@pytest.mark.slow
def test_what_processes_hand_over_is_counted():
    command = [sys.executable, str(BENCHMARKS / "handover.py"), "2", "4", "1"]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = re.fullmatch(
        r"(\d+) pairs/s \(\d+ to \d+\) of at most 500; (\S+) core-milliseconds a pair, (\S+) of "
        "them the training's own\n",
        result.stdout,
    )
    rate, whole, own = map(float, found.groups())
    # What was prepared in advance comes at once: the rate of a few batches can be above the most.
    assert rate > 0 and whole > own > 0
