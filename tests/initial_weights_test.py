"""Initial weights: any source through isd_tf.load_weights, and whole runs that begin with them."""

import json
import pathlib
import re
import shlex
import shutil
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import isd_tf
from isd_tf.training.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import run  # noqa: E402
import settings_checks  # noqa: E402
from in_process import call, set_flags  # noqa: E402
from small_runs import SMALL, small_run  # noqa: E402

DOCS = ROOT / "docs"
# Whose steps change no weight that is trained.
STANDING = ["--learning_rate=1e-20", "--epochs=1", "--evaluations=knn", "--knn_every_epochs=0"]


def build(seed=1, size=16, width=4):
    keras.utils.set_random_seed(seed)
    return isd_tf.build_encoder("tiny_resnet", size, width)


def assert_equal(encoder, other):
    for ours, theirs in zip(encoder.weights, other.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=ours.path)


@pytest.fixture(scope="module")
def first(photos, tmp_path_factory):
    """The workdir of a run of two epochs."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    saved = ["--checkpoint_every_steps=0", "--knn_every_epochs=0"]  # At the steps 6 and 12.
    call(*small_run(photos, workdir, "--stages=pretrain", "--epochs=2", *saved))
    return workdir


def encoder_of(workdir, name):
    """An encoder of a finished run, restored as the run itself would."""
    set_flags(*small_run("unused", workdir))
    strategy = tf.distribute.get_strategy()
    model = run.build_model(strategy, run.build_encoder(strategy)[0], 6)
    Checkpoints(workdir / "checkpoints", model).restore_newest()
    return getattr(model, f"{name}_encoder")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An encoder in a file of every kind."""
    folder, encoder = tmp_path_factory.mktemp("files"), build()
    for variable in encoder.weights:  # So that BatchNorm's statistics are not their initial ones.
        variable.assign(variable + 0.25)
    encoder.save(folder / "a.keras")
    encoder.save_weights(folder / "a.weights.h5")
    isd_tf.torch_weights.save(encoder, folder / "a.safetensors")
    model = isd_tf.ISD(encoder, *isd_tf.isd_heads(16), queue_size=16)
    model.teacher_encoder.weights[0].assign(model.teacher_encoder.weights[0] + 1)
    model.save(folder / "model.keras")
    return folder, encoder


@pytest.mark.parametrize("name", ["a.keras", "a.weights.h5", "a.safetensors", "model.keras"])
def test_every_file_gives_its_weights(files, name):
    folder, encoder = files
    ours = build(2)
    initial = isd_tf.load_weights(ours, folder / name)
    assert_equal(ours, encoder)
    assert initial.loaded.weights == 45 and initial.loaded.values == encoder.count_params()
    assert initial.loaded.from_encoder == ("student" if name == "model.keras" else None)
    if name != "model.keras":
        with pytest.raises(ValueError, match="holds one encoder, and no teacher"):
            isd_tf.load_weights(ours, folder / name, "teacher")
    else:
        isd_tf.load_weights(ours, folder / name, "teacher")
        difference = ours.weights[0].numpy() - encoder.weights[0].numpy()
        np.testing.assert_allclose(difference, 1, atol=1e-6)


@pytest.mark.parametrize("name", ["a.keras", "a.weights.h5", "a.safetensors"])
@pytest.mark.parametrize(
    ("size", "width", "message"),
    [(16, 8, "45 mis-shaped"), (96, 4, "1 mis-shaped.*3x3 stem.*lower --image_size")],
)
def test_files_of_other_networks_are_refused_and_change_nothing(files, name, size, width, message):
    ours = build(2, size, width)
    before = ours.get_weights()
    with pytest.raises(ValueError, match=message):
        isd_tf.load_weights(ours, files[0] / name)
    for array, other in zip(ours.get_weights(), before, strict=True):
        np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize("name", ["a.keras", "a.weights.h5", "a.safetensors"])
def test_damaged_files_are_refused_in_a_sentence(files, name, tmp_path):
    content = (files[0] / name).read_bytes()
    for damaged, message in ((b"", "is empty"), (content[: len(content) // 3], "a.*whole|cannot")):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as caught:
            isd_tf.load_weights(build(), tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_run_gives_its_student_and_its_teacher(first):
    for name in ("student", "teacher"):
        ours = build(2)
        initial = isd_tf.load_weights(ours, first, name)
        assert_equal(ours, encoder_of(first, name))
        assert initial.step == 12 and initial.loaded.from_encoder == name
    with pytest.raises(ValueError, match="of the steps 6, 12. Received: 5"):
        isd_tf.load_weights(build(), first, step=5)
    with pytest.raises(ValueError, match="45 mis-shaped"):
        isd_tf.load_weights(build(width=8), first)


def test_all_replicas_have_the_same_weights(files, two_replicas):
    with two_replicas.scope():
        ours = build(2)
        isd_tf.load_weights(ours, files[0] / "a.weights.h5")
    for variable, expected in zip(ours.weights, files[1].weights, strict=True):
        values = two_replicas.experimental_local_results(variable.value)
        assert len(values) == 2
        for value in values:
            np.testing.assert_array_equal(value.numpy(), expected.numpy())


# -------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def standing(first, photos, tmp_path_factory):
    """A run that begins with the first one's teacher and does not move, evaluated."""
    workdir = tmp_path_factory.mktemp("runs") / "standing"
    arguments = small_run(
        photos, workdir, f"--initial_weights={first}", "--initial_weights_encoder=teacher",
        "--initial_weights_step=6", *STANDING, "--stages=pretrain,evaluate",
    )  # fmt: skip
    call(*arguments)
    return workdir, arguments


def test_a_run_trains_from_its_initial_weights_and_scores_them(standing, first):
    workdir, _ = standing
    expected = build(2)
    isd_tf.load_weights(expected, first, "teacher", 6)
    kept = build(3)
    kept.load_weights(workdir / "initial_weights.weights.h5")
    assert_equal(kept, expected)
    for name in ("student", "teacher"):
        encoder = encoder_of(workdir, name)
        for ours, theirs in zip(encoder.weights, expected.weights, strict=True):
            if "moving" not in ours.path:  # Which gathers what the images of this run are like.
                np.testing.assert_allclose(
                    ours.numpy(), theirs.numpy(), 1e-5, 1e-6, err_msg=ours.path
                )
    record = json.loads((workdir / "initial_weights.json").read_text())
    assert record["step"] == 6 and len(record["sha256"]) == 64
    assert record["loaded"] == {
        "weights": 45, "values": 5212, "from_encoder": "teacher", "ignored": [],
    }  # fmt: skip
    results = json.loads((workdir / "results.json").read_text())
    assert {"raw_pixels_1nn", "untrained_1nn", "initial_1nn", "student_1nn"} <= results.keys()


def test_a_continued_run_does_not_load_again_and_refuses_other_weights(
    standing, first, tmp_path, monkeypatch
):
    workdir, arguments = standing
    shutil.copytree(workdir, tmp_path / "run")
    shutil.copytree(first, tmp_path / "first")
    monkeypatch.setattr(isd_tf, "load_weights", None)
    again = [*arguments, f"--workdir={tmp_path / 'run'}", "--stages=pretrain"]
    call(*again)
    with pytest.raises(ValueError, match="another recipe: --initial_weights=.*first then"):
        call(*again, f"--initial_weights={tmp_path / 'first'}")
    record = json.loads((tmp_path / "run" / "initial_weights.json").read_text())
    record["path"] = str(tmp_path / "first")
    (tmp_path / "run" / "initial_weights.json").write_text(json.dumps(record))
    call(*again)
    next(tmp_path.glob("first/checkpoints/step-00000006/*data*")).write_bytes(b"other")
    with pytest.raises(ValueError, match="other weights: .*first had the sha256 .* then, .* now"):
        call(*again)
    shutil.rmtree(tmp_path / "first" / "checkpoints")
    call(*again)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--initial_weights=gone.pth"], FileNotFoundError, "No such weights.*gone.pth"),
        (["--initial_weights={first}", "--width=8"], ValueError, "45 mis-shaped"),
        (["--initial_weights={first}", "--initial_weights_step=5"], ValueError, "steps 6, 12"),
        (["--initial_weights=published"], ValueError, "keras: and keras_hub:.*encoder=tiny_resnet"),
        (["--initial_weights_step=5"], ValueError, "without --initial_weights"),
        (["--initial_weights={photos}"], ValueError, "Received: --initial_weights=.*, without any"),
        (["--initial_weights={tmp}/run"], ValueError, "which is --workdir"),
        (["--initial_weights={tmp}/empty.keras"], ValueError, "empty.keras is empty"),
        (["--initial_weights={tmp}/a.txt"], ValueError, "ending in .keras, .*Received: .*a.txt"),
        (["--initial_weights={tmp}/empty.keras", "--initial_weights_step=5"], ValueError,
         "Only runs have steps"),
        (["--evaluated_encoders=initial"], ValueError, "of a run with --initial_weights"),
        (["--export_format=onnx"], ValueError, "some of saved_model, keras_hub, torch.*onnx"),
        (["--export_format=keras_hub"], ValueError, "KerasHub's ResNet is.*tiny_resnet"),
        (["--export_format=keras_hub", "--encoder=resnet18", "--image_size=64"], ValueError,
         "above 64 pixels.*--image_size=64, --width=4"),
    ],
)  # fmt: skip
def test_bad_input_is_one_error_and_nothing_written(
    first, photos, tmp_path, arguments, error, message
):
    (tmp_path / "empty.keras").write_bytes(b"")
    (tmp_path / "a.txt").write_text("weights")
    before = sorted(tmp_path.rglob("*"))
    arguments = [text.format(first=first, photos=photos, tmp=tmp_path) for text in arguments]
    with pytest.raises(error, match=message):
        call(*small_run(photos, tmp_path / "run", *arguments))
    assert sorted(tmp_path.rglob("*")) == before


def test_pickles_without_pytorch_are_refused_before_tensorflow(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(settings_checks.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pip install 'torch>=2.6'"):
        set_flags(*small_run(photos, tmp_path / "run", f"--initial_weights={tmp_path / 'a.pth'}"))


COMMANDS = [
    line
    for line in re.findall(
        r"^python experiments/run.py (.*)$", (DOCS / "weights.md").read_text(), re.M
    )
    if "--initial_weights=runs/" in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_documented_trainings_begin_with_weights(command, first, photos, tmp_path, capsys):
    workdir = re.search(r"--initial_weights=(\S+)", command)[1]
    arguments = shlex.split(command.replace(workdir, str(first)).replace("PATH", str(photos)))
    source = ["--dataset=folder", f"--data_dir={photos}"]
    call(*arguments, *source, *SMALL, *STANDING, f"--workdir={tmp_path}", "--stages=pretrain")
    assert f"Initial weights: all 45 arrays (5212 values) of {first}, step 12" in (
        capsys.readouterr().out
    )


def test_there_are_two_such_commands():
    assert len(COMMANDS) == 2
