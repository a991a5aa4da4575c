"""What experiments/run.py refuses: bad input, a training that diverges, workdirs of no use."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import run  # noqa: E402
import workdirs  # noqa: E402
from in_process import call  # noqa: E402
from small_runs import command, small_run  # noqa: E402


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=imagnet"], "Unknown dataset.*imagnet.*photo_patches"),
        (["--encoder=vit"], "Unknown encoder.*resnet18.*vit"),
        (["--views=weak/hard"], "Unknown views.*strong, weak.*weak/hard"),
        (["--views=weak"], "the teacher's and then the student's.*weak"),
        (["--stages=train"], "Unknown stages.*pretrain, evaluate, export.*train"),
        (["--stages=evaluate"], "no checkpoint"),
        (["--queue_size=3"], r"at least the global batch size \(4\).*queue_size=3"),
        (["--batch_size=25", "--queue_size=99"], "must fit into the dataset.*25.*24 images"),
        (["--teacher_temperature=0"], "teacher_temperature must be greater than 0"),
        (["--student_temperature=-1"], "student_temperature must be greater than 0"),
        (["--teacher_momentum=1.1"], r"teacher_momentum must be in \[0, 1\].*1.1"),
        (["--sgd_momentum=1"], r"sgd_momentum must be in \[0, 1\)"),
        (["--learning_rate=0"], "learning_rate must be positive"),
        (["--batch_norm=frozen"], "--batch_norm must be shuffled, .* groups:8. Received: frozen"),
        (["--batch_norm=groups:0"], "--batch_norm must be shuffled"),
        (
            ["--batch_norm=groups:3"],
            "--batch_size=4 for 1 replica of 3 groups. Use a multiple of 3",
        ),
        (
            ["--batch_norm=groups:4"],
            "BatchNorm needs two images.*--batch_norm=groups:4. Use a larger",
        ),
        (["--stages=check,pretrain"], "a call of its own.*Received: --stages=check,pretrain"),
        (["--max_pixels=0"], "--max_pixels must be at least 1"),
        (["--compile", "--batch_norm=synchronized"], "XLA cannot compile.*leave --compile out"),
        (["--steps_per_execution=4"], "divide the 6 steps.*Received: 4. Use one of 1, 2, 3, 6"),
        (["--strategy=multi_worker"], "Several workers need TF_CONFIG"),
        (["--keep_every_epochs=-1"], "--keep_every_epochs must be at least 0"),
        (["--learning_rate_schedule=drops"], "--drop_epochs=141,181"),
        (["--epochs=0"], "--epochs must be at least 1.*0"),
        ([f"--batch_size={10**20}"], "--batch_size must be .* at most 2147483647. Received: 10000"),
        (["--knn_every_epochs=-1"], "--knn_every_epochs must be at least 0.*-1"),
        (["--max_unreadable=5"], "--max_unreadable must be at least 0 and at most 1.*5"),
        (["--seed=-1"], "--seed must be at least 0"),
        (["--teacher_temperature=inf"], "teacher_temperature must be .* finite"),
        (["--data_dir=nowhere"], "does not exist.*nowhere"),
        (["--dataset=list", "--image_list=nowhere.txt"], "nowhere.txt"),
        (["--width=100000000"], "the weights of --width=100000000 need .* 8 GiB. Lower --width"),
        (["--image_size=9000"], "4 images of 9000 x 9000 pixels a step need at least 10 GiB"),
        (["--queue_size=2000000000"], "--queue_size=2000000000 of length 4 need at least 30"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments, message, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(run.memory, "available", lambda: 8 * 2**30)
    with pytest.raises((ValueError, OSError), match=message):
        call(*small_run(photos, tmp_path / "run"), *arguments)


def test_a_diverging_run_stops_and_keeps_finite_checkpoints_only(photos, tmp_path):
    arguments = small_run(photos, tmp_path, "--stages=pretrain", "--checkpoint_every_steps=1")
    with pytest.raises(FloatingPointError, match="step \\d+.*another --workdir"):
        call(*arguments, "--learning_rate=1e30")
    for path in (tmp_path / "checkpoints").glob("step-*"):
        reader = tf.train.load_checkpoint(str(path / "state"))
        for key in reader.get_variable_to_shape_map():
            if key != "_CHECKPOINTABLE_OBJECT_GRAPH" and not key.startswith("optimizer/_variables"):
                assert np.isfinite(reader.get_tensor(key)).all(), key


def test_a_workdir_that_cannot_be_written_is_refused(photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--workdir must be a folder that can be written.*file"):
        call(*small_run(photos, tmp_path / "file" / "run"))


def test_a_workdir_whose_name_is_no_utf8_is_refused_before_the_training(tmp_path):
    name = f"{tmp_path}/caf\udce9"
    with pytest.raises(ValueError, match="--workdir must be a path in UTF-8.*caf.udce9.*LC_ALL"):
        with workdirs.lock(pathlib.Path(name)):
            pass


def test_results_that_somebody_has_broken_are_named(tmp_path):
    workdirs.record(tmp_path, {"a": 1.0}, 3)
    assert workdirs.read_json(tmp_path / "results.json") == {"a": 1.0, "step": 3}
    (tmp_path / "results.json").write_text('{"a": 1.0,')
    with pytest.raises(ValueError, match="results.json must be as the run.*Received what is no"):
        workdirs.record(tmp_path, {"b": 1.0}, 3)


def test_a_recipe_that_lacks_flags_says_which():
    with pytest.raises(ValueError, match="must set --image_size, --views.*quickstart.flags"):
        call("--dataset=photo_patches", "--workdir=x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--flagfile=quickstart.flags", "--batch_size=5", "--queue_size=4"], "queue_size must be"),
        (["--flagfile=nowhere.flags"], "No such flag file"),
        (["--flagfile=quickstart.flags", "--queue=3"], "Unknown command line flag 'queue'"),
        (["--flagfile=quickstart.flags", "--strategy=mirrored", "--logical_cpus=3"],
         "share the batch evenly.*--batch_size=64 for 3 replicas"),
    ],
)  # fmt: skip
def test_usage_errors_exit_with_a_message_and_no_stack_trace(arguments, message, tmp_path):
    result = subprocess.run(
        command(*arguments, f"--workdir={tmp_path / 'run'}"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
