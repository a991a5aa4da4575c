"""experiments/run.py as users run it: every flag file, kill and continue, a second call."""

import csv
import fcntl
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

import isd_tf
from isd_tf.views.python_crops import fastest_resizer

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import devices  # noqa: E402
import flagfiles  # noqa: E402
import run  # noqa: E402
from in_process import call, set_flags  # noqa: E402
from small_runs import (  # noqa: E402
    RANDOM_TEACHER,
    SMALL,
    STEPS,
    assert_same_end,
    command,
    newest_weights,
    small_run,
    wait_for_checkpoint,
)

FLAG_FILES = sorted(path.name for path in (ROOT / "experiments").glob("*.flags"))


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """The workdir of an uninterrupted run, as a command from the repository's root."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    result = subprocess.run(
        command(*small_run(photos, workdir)), cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # Nothing of TensorFlow's.
    (workdir / "output.txt").write_text(result.stdout)
    return workdir


def test_a_run_leaves_what_it_promises(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["step"] == STEPS
    for name in ("raw_pixels", "untrained", "student", "teacher"):
        for k in (1, 20):
            assert 0 <= results[f"{name}_{k}nn"] <= 1
    assert all(isinstance(value, int | float) for value in results.values())
    assert "tensorflow" in json.loads((finished / "versions.json").read_text())
    assert os.listdir(finished / "saved_model") == ["1"]
    output = (finished / "output.txt").read_text()
    assert "24 images of 2 classes, 12 of each" in output
    assert "Epoch 4/4: " in output
    for line in ("raw pixels", "untrained", "student", "teacher", "1-NN", "images/s"):
        assert line in output


def test_logs_hold_every_monitored_value(finished):
    (path,) = (finished / "logs").iterdir()
    steps = {}
    for record in tf.compat.v1.io.tf_record_iterator(str(path)):
        event = tf.compat.v1.Event.FromString(record)
        for value in event.summary.value:
            steps.setdefault(value.tag, []).append(event.step)
    monitored = (
        "loss teacher_entropy student_entropy embedding_std purity gradient_norm learning_rate"
    ).split()
    for name in (*monitored, "student_1nn", "teacher_20nn"):
        assert steps[f"epoch/{name}"] == [6, 12, 18, 24]
    for name in monitored:
        assert steps[f"step/{name}"] == [10, 20]


def test_saved_model_has_the_last_checkpoints_student(finished):
    serve = tf.saved_model.load(str(finished / "saved_model" / "1")).signatures["serving_default"]
    features = serve(images=tf.zeros([2, 50, 40, 3], tf.uint8))["features"]
    assert features.shape == (2, 16) and np.isfinite(features).all()
    _, weights = newest_weights(finished)
    # The first trainable variable is the stem's kernel, which the teacher's copy differs from.
    stored = weights["optimizer/_trainable_variables/0/.ATTRIBUTES/VARIABLE_VALUE"]
    reader = tf.train.load_checkpoint(str(finished / "saved_model" / "1" / "variables/variables"))
    kernels = [
        reader.get_tensor(key)
        for key, shape in reader.get_variable_to_shape_map().items()
        if shape == [3, 3, 3, 4]
    ]
    np.testing.assert_array_equal(kernels, [stored])


@pytest.mark.slow
def test_the_effective_flags_run_the_same_again(finished, tmp_path):
    flag_file = finished / "run.flags"
    call(f"--flagfile={flag_file}", f"--workdir={tmp_path}", "--stages=pretrain")
    assert_same_end(tmp_path, finished)


def kill_and_continue(arguments, workdir, step):
    """Kills a run by SIGKILL once it has saved `step` or a later one, and continues it."""
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_checkpoint(workdir, step, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Continuing" in result.stdout and "complete" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("step", np.random.default_rng(0).integers(2, 14, 2))
def test_a_run_killed_at_a_random_moment_continues_to_the_same_bits(
    finished, photos, tmp_path, step
):
    kill_and_continue(small_run(photos, tmp_path, "--stages=pretrain"), tmp_path, step)
    assert_same_end(tmp_path, finished)


@pytest.mark.slow
def test_sigterm_saves_exits_143_and_is_continued(photos, tmp_path):
    """On two devices; one is checkpoints_test.py's, two workers are multi_worker_test.py's."""
    devices = ["--strategy=mirrored", "--logical_cpus=2"]
    arguments = small_run(photos, tmp_path, "--stages=pretrain", *devices)
    process = subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for_checkpoint(tmp_path, 4, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143
    saved = re.search(r"Told to stop \(SIGTERM\) after step \d+; saved step (\d+)", output).group(1)
    assert newest_weights(tmp_path)[0] == f"step-{saved.zfill(8)}"
    result = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"after step {saved}." in result.stdout
    assert json.loads((tmp_path / "results.json").read_text())["step"] == STEPS


@pytest.mark.slow
def test_all_switches_together(photos, tmp_path):
    arguments = small_run(
        photos, tmp_path, "--strategy=mirrored", "--logical_cpus=2", "--batch_norm=groups:2",
        "--precision=mixed_bfloat16", "--compile", "--check_replicas", "--deterministic",
        "--steps_per_execution=3", "--keep_every_epochs=1", "--if_checkpoint_fails=continue",
        "--batch_size=8", "--queue_size=16",
    )  # fmt: skip
    result = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        f"step-{step:08d}" for step in (3, 6, 9, 12)
    ]
    results = json.loads((tmp_path / "results.json").read_text())
    assert np.isfinite(results["loss"]) and results["step"] == STEPS // 2


class NumberedPhotos(tfds.core.GeneratorBasedBuilder):
    """A TFDS dataset of several image sizes, so that it is read as a stream."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(30), "validation": self._generate_examples(6)}

    def _generate_examples(self, count):
        random = np.random.default_rng(count)
        for i in range(count):
            image = random.integers(0, 256, (20 + i % 5, 24, 3), np.uint8)
            yield i, {"image": image, "label": i % 3}


@pytest.mark.slow
def test_a_tfds_stream_is_pretrained_on_and_continued_to_the_same_bits(tmp_path):
    NumberedPhotos(data_dir=str(tmp_path / "tfds")).download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=3)
    )
    recipe = ["--flagfile=imagenet.flags", "--dataset=numbered_photos", *SMALL]
    recipe += [f"--data_dir={tmp_path / 'tfds'}"]
    call(*recipe, f"--workdir={tmp_path / 'whole'}")
    arguments = [*recipe, f"--workdir={tmp_path / 'killed'}", "--stages=pretrain"]
    kill_and_continue(arguments, tmp_path / "killed", 9)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    assert "student_1nn" in json.loads((tmp_path / "whole" / "results.json").read_text())


@pytest.mark.slow
def test_mirrored_strategy_trains_on_two_logical_devices_and_exports(photos, tmp_path):
    arguments = small_run(photos, tmp_path, "--strategy=mirrored", "--logical_cpus=2")
    result = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2 CPU replicas: global batch 4, replica batch 2" in result.stdout
    assert json.loads((tmp_path / "results.json").read_text())["step"] == STEPS
    reader = tf.train.load_checkpoint(str(tmp_path / "saved_model/1/variables/variables"))
    encoder = isd_tf.build_encoder("tiny_resnet", 16, 4)
    assert len(reader.get_variable_to_shape_map()) - 1 == len(encoder.weights)
    serve = tf.saved_model.load(str(tmp_path / "saved_model/1")).signatures["serving_default"]
    assert np.isfinite(serve(images=tf.zeros([1, 16, 16, 3], tf.uint8))["features"]).all()


@pytest.mark.parametrize(
    "flag_file",
    [
        # It alone runs all its stages.
        pytest.param(name, marks=[pytest.mark.slow] * (name == "quickstart.flags"))
        for name in FLAG_FILES
    ],
)
def test_every_flag_file_runs(flag_file, photos, tmp_path, capsys):
    """Its own recipe, at the size of a test: networks, data and length are replaced."""
    unbalanced, whole = "unbalanced" in flag_file, flag_file == "quickstart.flags"
    call(f"--flagfile={flag_file}", "--dataset=folder", f"--data_dir={photos}", *SMALL,
         *(["--unbalanced=1,1,8"] if unbalanced else []),
         *(RANDOM_TEACHER if "compress" in flag_file else []),
         *([] if whole else ["--stages=pretrain", "--knn_every_epochs=0"]),
         "--epochs=1", f"--workdir={tmp_path}")  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert np.isfinite(results["loss"]) and results["step"] == (5 if unbalanced else 6)
    if whole:
        assert {"student_1nn", "student_fast_linear_top1", "student_clusters_ari"} < set(results)
        figures = {"clusters_student.png", "neighbors.png", "student_teacher.png"}
        assert {path.name for path in tmp_path.glob("figures/*")} == figures
        assert (tmp_path / "saved_model" / "1").is_dir()


def test_recipes_are_the_papers():
    def settings(name):
        lines = flagfiles.expand([f"--flagfile={name}"])
        return dict(line.removeprefix("--").split("=") for line in lines)

    plus = settings("imagenet.flags")
    expected = dict(
        dataset="imagenet2012", encoder="resnet50", heads="isd_plus", views="weak/strong",
        queue_size="128000", teacher_temperature="0.01", student_temperature="0.1",
        teacher_momentum="0.99", epochs="200", batch_size="256", learning_rate="0.05",
        learning_rate_schedule="cosine", sgd_momentum="0.9", weight_decay="0.0001",
        image_size="224", batch_norm="shuffled",
    )  # fmt: skip
    assert expected.items() <= plus.items()
    isd = settings("imagenet_resnet18.flags")
    expected |= dict(
        encoder="resnet18", heads="isd", views="strong/strong", teacher_temperature="0.02",
        student_temperature="0.02", teacher_momentum="0.999", learning_rate="0.01",
        learning_rate_schedule="drops", drop_epochs="141,181", drop_factor="0.2",
    )  # fmt: skip
    assert expected.items() <= isd.items()
    expected = dict(
        method="msf", encoder="resnet50", heads="isd_plus", views="weak/strong", neighbors="10",
        queue_size="128000", teacher_momentum="0.99", epochs="200", batch_size="256",
        learning_rate="0.05", learning_rate_schedule="cosine",
    )  # fmt: skip
    assert expected.items() <= settings("msf.flags").items()
    expected = dict(
        method="compress", teacher="resnet50", encoder="resnet18", views="crop", epochs="130",
        queue_size="128000", temperature="0.04", learning_rate="0.01", batch_size="256",
        learning_rate_schedule="drops", drop_epochs="91,121", drop_factor="0.2",
        sgd_momentum="0.9", weight_decay="0.0001",
    )  # fmt: skip
    assert expected.items() <= settings("compress.flags").items()


def test_unlabelled_images_pretrain_and_export(photos, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (photos / "train").rglob("*.png"):
        (flat / f"{path.parent.name}{path.name}").symlink_to(path)
    call(*small_run(flat, tmp_path / "run"), "--epochs=1")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "purity" not in results and "student_1nn" not in results
    output = capsys.readouterr().out
    assert "without labels" in output and "Not evaluated" in output and "SavedModel" in output


@pytest.mark.slow
def test_stages_run_on_their_own(finished, photos, tmp_path):
    arguments = small_run(photos, tmp_path, "--epochs=1")
    call(*arguments, "--stages=pretrain")
    assert not (tmp_path / "saved_model").exists()
    call(*arguments, "--stages=evaluate,export", "--export_encoder=teacher")
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"loss", "teacher_1nn", "step"} <= results.keys()
    assert os.listdir(tmp_path / "saved_model") == ["1"]


def test_a_check_lists_what_is_odd_and_needs_no_recipe(photos, tmp_path, capsys):
    folder, workdir = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photos, folder)
    (folder / "train/dark/notes.txt").write_text("no image")
    (folder / "train/dark/3.png").write_bytes(b"")
    shutil.copy(folder / "train/light/2.png", folder / "val/light/2.png")
    call("--stages=check", "--dataset=folder", f"--data_dir={folder}", "--image_size=16",
         f"--workdir={workdir}", "--max_pixels=700")  # fmt: skip
    output = capsys.readouterr().out
    assert "train: 24 images of 2 classes, 12 of each. 1 file not read: 1 .txt.\n" in output
    assert "24 train, 8 test images read, " in output and "modes: " in output
    with open(workdir / "check.csv", newline="") as file:
        found = {(f["split"], os.path.relpath(f["image"], folder), f["kind"], f["detail"])
                 for f in csv.DictReader(file)}  # fmt: skip
    large = {
        ("train", f"train/{name}/{i}.png", "unreadable",
         f"30 x {20 + i} pixels, more than --max_pixels=700")
        for name in ("dark", "light") for i in range(4, 12)
    }  # fmt: skip
    assert found == large | {
        ("train", "train/dark/3.png", "unreadable", "empty"),
        ("test", "val/light/2.png", "in train and test", f"same as {folder}/train/light/2.png"),
    }
    assert (workdir / "not_read.txt").read_text() == f"{folder}/train/dark/notes.txt\n"


def test_a_training_on_black_images_says_that_nothing_was_learned(tmp_path, caplog, capsys):
    (tmp_path / "black").mkdir()
    for i in range(16):
        Image.new("RGB", (20 + i, 30)).save(tmp_path / "black" / f"{i}.png")
    call(*small_run(tmp_path / "black", tmp_path / "run"), "--epochs=1", "--stages=pretrain")
    assert "Nothing was learned: all images have nearly the same embedding" in caplog.text
    assert "--batch_norm=groups:N takes statistics of N parts" in capsys.readouterr().out


def test_an_unreadable_image_is_counted(photos, tmp_path, caplog):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "train" / "dark" / "3.png").write_bytes(b"broken")
    call(*small_run(folder, tmp_path / "run"), "--max_unreadable=0.05", "--stages=pretrain")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["unreadable_images"] == 1
    assert "dark/3.png" in caplog.text
    with pytest.raises(ValueError, match="At most 1.0%.*1 of 24.*dark/3.png"):
        call(*small_run(folder, tmp_path / "strict"), "--max_unreadable=0.01")


def test_a_queue_larger_than_the_dataset_warns(photos, tmp_path, caplog):
    call(*small_run(photos, tmp_path), "--queue_size=30", "--epochs=1", "--stages=pretrain")
    assert "queue (30) is larger than the dataset (24 images)" in caplog.text


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_that_is_emulated_warns(native, photos, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(devices.distribution, "bfloat16_is_native", lambda: native)
    before = keras.config.dtype_policy()
    set_flags(*small_run(photos, tmp_path, "--precision=mixed_bfloat16"))
    try:
        devices.choose()
    finally:
        keras.config.set_dtype_policy(before)
    assert ("emulate bfloat16" in caplog.text) == (not native)


def test_another_recipe_in_the_same_workdir_is_refused(finished, photos):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="--seed=0 then, --seed=1 now"):
        call(*small_run(photos, finished), "--seed=1")
    call(*small_run(photos, finished), "--stages=evaluate", "--log_every_steps=5")
    for path, content in before.items():
        assert path.read_bytes() == content, path


def test_other_images_in_the_same_workdir_are_refused(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    arguments = small_run(folder, tmp_path / "run", "--stages=pretrain", "--epochs=1")
    call(*arguments)
    shutil.copy(folder / "train" / "dark" / "3.png", folder / "train" / "dark" / "extra.png")
    with pytest.raises(ValueError, match="begun with other images: 24 then, 25 of"):
        call(*arguments)
    (folder / "train" / "dark" / "3.png").unlink()
    with pytest.raises(ValueError, match="the same number but .* same: .*dark/extra.png is new."):
        call(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("bad", ["--teacher_temperature=0", "--views=weak-strong", "--encoder=vit"])
def test_a_corrected_command_may_use_the_same_workdir(bad, photos, tmp_path):
    arguments = small_run(photos, tmp_path, "--stages=pretrain", "--epochs=1")
    with pytest.raises(ValueError):
        call(*arguments, bad)
    call(*arguments)
    assert json.loads((tmp_path / "results.json").read_text())["step"] == 6


def test_other_packages_and_replicas_than_at_the_beginning_are_said_and_added_to_the_record(
    finished, photos, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("cykooz_resizer")
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "versions.json"
    began = json.loads(path.read_text())
    assert began["replicas"] == 1 and began["keras"] == keras.__version__
    assert began.pop("random crops by").split()[0] == fastest_resizer()
    # As a run that began before this was noted, when it was always the graph.
    resizer = f"cykooz_resizer {importlib.metadata.version('cykooz-resizer')}"
    began |= {"keras": "3.0.0", "replicas": 2}
    path.write_text(json.dumps(began))
    now = f"keras 3.0.0 then, {keras.__version__} now"
    for stages in ("evaluate", "pretrain"):
        call(*small_run(photos, tmp_path / "run"), f"--stages={stages}", "--evaluations=curves")
        of_training = f", replicas 2 then, 1 now, random crops by graph then, {resizer} now"
        expected = f"{now}{of_training if stages == 'pretrain' else ''}"
        assert f"Not as when the run began: {expected}. " in capsys.readouterr().out
    record = json.loads(path.read_text())
    later = {"after_step": STEPS, "keras": keras.__version__}
    assert record.pop("later") == [
        later | {"stages": "evaluate"},
        later | {"stages": "pretrain", "replicas": 1, "random crops by": resizer},
    ]  # fmt: skip
    assert record == began


def test_two_processes_do_not_share_a_workdir(photos, tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="Another process is at work"):
            call(*small_run(photos, tmp_path))


def test_an_unreadable_test_image_ends_in_one_sentence_and_loses_nothing(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "val" / "light" / "1.png").write_bytes(b"broken")
    arguments = small_run(folder, tmp_path / "run", "--knn_every_epochs=0")
    with pytest.raises(ValueError, match="At most 1.0%.*1 of 8.*light/1.png"):
        call(*arguments)
    assert np.isfinite(json.loads((tmp_path / "run" / "results.json").read_text())["loss"])
    call(*arguments, "--max_unreadable=0.2")  # It may change, and nothing is trained again.
    assert "student_1nn" in json.loads((tmp_path / "run" / "results.json").read_text())


def test_a_finished_workdir_is_exported_without_its_data(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    call(f"--flagfile={finished / 'run.flags'}", f"--workdir={tmp_path / 'run'}",
         "--data_dir=gone", "--stages=export")  # fmt: skip
    assert sorted(os.listdir(tmp_path / "run" / "saved_model")) == ["1", "2"]


def test_the_untrained_contestant_is_the_student_before_its_first_step():
    set_flags(*small_run("unused", "unused"))
    keras.utils.set_random_seed(run.FLAGS.seed)
    encoder, _ = run.build_encoder(tf.distribute.get_strategy())
    model = run.build_model(tf.distribute.get_strategy(), encoder, 1)
    keras.utils.set_random_seed(run.FLAGS.seed)
    untrained = isd_tf.build_encoder(run.FLAGS.encoder, run.FLAGS.image_size, run.FLAGS.width)
    for ours, theirs in zip(model.student_encoder.weights, untrained.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
