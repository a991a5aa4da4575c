"""The stage plan: its figures against what a run really takes, and that it leaves nothing."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from small_runs import RANDOM_TEACHER, ROOT, assert_same_end, command, small_run

sys.path.insert(0, str(ROOT / "experiments"))

import launch  # noqa: E402
import plan  # noqa: E402
import run  # noqa: E402
import run_data  # noqa: E402
import settings  # noqa: E402
from in_process import call, set_flags  # noqa: E402

import isd_tf  # noqa: E402

LONG_QUEUE = ["--queue_size=500", "--epochs=2"]


@pytest.fixture
def planned(photos, tmp_path, capsys):
    """Plans a small run; returns its table as words of one line."""

    def planned(*arguments):
        call(*small_run(photos, tmp_path / "run", *arguments), "--stages=plan")
        output = capsys.readouterr().out
        assert all(len(line) <= 100 for line in output.partition("images   ")[2].splitlines())
        return re.sub(r"\s+", " ", output)

    return planned


def in_bytes(text):
    """Reads "1.37 MB"."""
    number, unit = text.split()
    return float(number) * {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def found(pattern, text):
    return re.search(pattern, text).group(1)


@pytest.fixture(scope="module")
def before_a_run(photos, tmp_path_factory):
    """The table of a plan, what it left, and the workdir of the run that came after it."""
    workdir = tmp_path_factory.mktemp("runs") / "planned"
    arguments = small_run(photos, workdir, *LONG_QUEUE)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        call(*arguments, "--stages=plan")
    left = os.path.exists(workdir)
    call(*arguments, "--stages=pretrain", "--knn_every_epochs=0")
    return re.sub(r"\s+", " ", said.getvalue()), left, workdir


def test_a_plan_tells_of_images_steps_and_time_and_writes_nothing(before_a_run):
    output, left, _ = before_a_run
    assert "images 24 to train on, of 2 classes; 8 to test" in output
    assert "steps 12: 2 epochs of 6, each of 4 images" in output
    assert "for 12 steps" in output and "for 2 kNN scores" in output
    seconds = float(found(r"time ([\d.e-]+) s a step", output))
    rate = float(found(r"waiting for data\), (\d+) images/s", output))
    assert rate == pytest.approx(4 / seconds, rel=0.05)
    assert 0 <= int(found(r"timed, (\d+)% of it waiting", output)) <= 100
    assert not left


def test_memory_and_disk_are_those_of_the_run(before_a_run):
    output, _, workdir = before_a_run
    files = (workdir / "checkpoints" / "step-00000012").glob("state*")
    saved = sum(path.stat().st_size for path in files)
    checkpoint = in_bytes(found(r"checkpoints of ([\d.]+ \w+)", output))
    # The file also names each tensor, which is much of so small a one.
    assert 0.5 * saved < checkpoint <= saved
    most = in_bytes(found(r"at most ([\d.]+ \w+) at a time", output))
    assert most == pytest.approx(3 * checkpoint, rel=0.01)
    # ISD+'s projector makes 4 numbers of 16 features. Each row has a label, int64.
    queue = in_bytes(found(r"queue ([\d.]+ \w+)", output))
    assert queue == pytest.approx(500 * (4 * 4 + 8) + 8, rel=0.01)
    assert in_bytes(found(r"similarities ([\d.]+ \w+)", output)) == 10 * 4 * 500 * 4
    encoder = isd_tf.build_encoder("tiny_resnet", 16, 4)
    heads = isd_tf.isd_plus_heads(encoder.output_shape[-1])
    trained = sum(network.count_params() for network in (encoder, *heads))
    assert int(found(r"student's ([\d ]+) weights", output).replace(" ", "")) == trained
    taught = sum(network.count_params() for network in (encoder, heads[0]))
    assert f"teacher's {taught:,} ".replace(",", " ") in output


def test_the_run_after_a_plan_ends_in_the_same_bits(before_a_run, photos, tmp_path):
    call(*small_run(photos, tmp_path, *LONG_QUEUE), "--stages=pretrain", "--knn_every_epochs=0")
    assert_same_end(before_a_run[-1], tmp_path)


def test_a_plan_of_a_begun_run_is_about_what_is_left(before_a_run, planned, tmp_path):
    shutil.copytree(before_a_run[-1], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000012")
    left = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    assert "for the remaining 2 steps" in planned(*LONG_QUEUE)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == left
    with pytest.raises(ValueError, match="begun with another recipe: --epochs=2 then"):
        planned(*LONG_QUEUE, "--epochs=5")


def test_warnings_that_can_be_known_before(planned):
    output = planned(
        *("--queue_size=200", "--epochs=1", "--batch_size=18", "--teacher_momentum=0.999"),
        *("--test_split=train", "--batch_norm=groups:2", "--keep_every_epochs=1"),
    )
    for text in (
        "The queue (200) is larger than the dataset (24 images)",
        "The queue of 200 is never filled: all 1 steps bring 18 embeddings",
        "--teacher_momentum=0.999 keeps the teacher 1000 steps behind, and there are 1",
        "BatchNorm sees 9 images at a time",
        "24 images are few",
        "6 of 24 images have no place",
        "(1 of them for good)",
    ):
        assert text in output


@pytest.mark.parametrize("every", [0, 1, 3, 4, 6, 10])
def test_saves_are_those_at_the_ends_of_epochs_and_every_few_steps(every, monkeypatch):
    monkeypatch.setattr(plan, "FLAGS", types.SimpleNamespace(checkpoint_every_steps=every))
    for steps in range(40):
        saved = {s for s in range(1, steps + 1) if s % 6 == 0 or (every and s % every == 0)}
        assert plan.saves(steps, 6) == len(saved)


def test_a_disk_too_small_is_warned_of_with_what_is_kept_for_good(planned, monkeypatch):
    monkeypatch.setattr(plan, "free_disk", lambda: 600_000)
    assert "The disk does not suffice" not in planned("--epochs=8")
    assert "The disk does not suffice" in planned("--epochs=8", "--keep_every_epochs=1")


def test_folder_flags_plan_300_images(tmp_path, capsys):
    for name in "abc":
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        for i in range(100):
            Image.new("RGB", (12, 12), (i, 50, 9)).save(tmp_path / f"photos/train/{name}/{i}.png")
    small = ["--encoder=tiny_resnet", "--width=4", "--image_size=16"]
    call("--flagfile=folder.flags", f"--data_dir={tmp_path}/photos", "--stages=plan", *small)
    output = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "images 300 to train on, of 3 classes; none to test" in output
    assert "auto --queue_size=128: the largest power of two" in output
    epochs = int(found(r"--epochs=(\d+): ", output))
    assert f"steps {4 * epochs}: {epochs} epochs of 4, each of 64 images; 44 images" in output
    assert "300 images are few" in output and "--method=compress" in output
    assert "kNN: " in output and "no test split" in output


def test_a_sound_recipe_is_not_warned_of(monkeypatch):
    set_flags("--flagfile=imagenet.flags", "--workdir=x")
    monkeypatch.setattr(plan, "free_disk", lambda: 10**12)
    images = np.zeros((100_000, 1), np.uint8)
    data = isd_tf.datasets.ArrayDataset("many", images, np.arange(100_000) % 2, ("a", "b"))
    settings.FLAGS.queue_size = 65_536
    encoder = isd_tf.build_encoder("tiny_resnet", 32, 4)
    model = run.build_model(tf.distribute.get_strategy(), encoder, 390)
    assert plan.warnings(model, run_data.Data(data, data, data)) == []
    monkeypatch.setattr(plan, "free_disk", lambda: 10**6)
    (only,) = plan.warnings(model, run_data.Data(data, data, data))
    assert "The disk does not suffice" in only


def test_unlabelled_images_are_not_scored(photos, tmp_path, capsys):
    call(*small_run(photos / "train" / "dark", tmp_path / "run"), "--stages=plan")
    output = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "12 to train on, without labels; none to test" in output
    assert "Nothing is scored by kNN: " in output and "kNN scores" not in output


@pytest.mark.parametrize("method", ["byol", "compress"])
def test_every_method_is_planned(method, planned):
    teacher = [*RANDOM_TEACHER, "--temperature=0.1"] if method == "compress" else []
    output = planned(f"--method={method}", "--neighbors=2", *teacher)
    assert ("queue " in output.partition("memory")[2]) == (method != "byol")
    assert "teacher's" in output


@pytest.mark.parametrize(
    ("method", "anchors", "least", "most"),
    [
        ("isd", 65_536, 640, 640),  # ten matrices of 64 MiB
        ("isd", 131_072, 72, 100),  # streamed; `benchmarks/kl.py` saw 72 to 84
        ("isd", 1_048_576, 72, 100),
        ("msf", 131_072, 20, 20),
        ("moco_v2", 131_072, 384, 384),  # is never streamed: three matrices of 128 MiB
    ],
)
def test_similarities_to_a_large_queue_are_streamed_where_the_method_does(
    method, anchors, least, most
):
    recipe = {"isd": "imagenet"}.get(method, method)
    set_flags(f"--flagfile={recipe}.flags", "--workdir=x")
    rows = types.SimpleNamespace(shape=(anchors, 512))
    model = types.SimpleNamespace(queue=types.SimpleNamespace(rows=rows))
    assert least * 2**20 <= plan.similarities(256, model) <= most * 2**20


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (45_123_456, "45.1 MB"),
     (2**63, "9.22e+06 TB")],
)  # fmt: skip
def test_bytes_in_words(count, said):
    assert plan.size(count) == said


@pytest.mark.slow
def test_several_devices_and_workers_plan_together(photos, tmp_path):
    arguments = small_run(photos, tmp_path / "run", "--stages=plan")
    devices = [*arguments, "--strategy=mirrored", "--logical_cpus=2"]
    result = subprocess.run(command(*devices), cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "on 2 devices, 2 each" in result.stdout
    program = command(*arguments)[1:]
    assert sorted(launch.run_workers([sys.executable, *program], 2, [])) == [(0, 0), (1, 0)]
    assert not os.path.exists(tmp_path / "run")
