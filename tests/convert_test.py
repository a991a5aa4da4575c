"""experiments/convert.py: every way once, in the test's own process."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from in_process import call
from small_runs import ROOT, small_run

import isd_tf

sys.path.insert(0, str(ROOT / "experiments"))

import convert  # noqa: E402


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    convert.main()


@pytest.fixture(scope="module")
def workdir(photos, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    call(*small_run(photos, workdir, "--stages=pretrain", "--epochs=1", "--knn_every_epochs=0"))
    return workdir


def load(source, encoder="student"):
    network = isd_tf.build_encoder("tiny_resnet", 16, 4)
    isd_tf.load_weights(network, source, encoder)
    return network.get_weights()


def assert_equal(weights, others):
    for ours, theirs in zip(weights, others, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_through_all_files_and_back(workdir, tmp_path, monkeypatch, capsys):
    network = ["--encoder=tiny_resnet", "--image_size=16", "--width=4"]
    keras_file, torch_file = tmp_path / "new" / "a.keras", tmp_path / "a.safetensors"
    last = tmp_path / "a.weights.h5"
    teacher = ["--source_encoder=teacher", "--source_step=6"]
    run(monkeypatch, f"--source={workdir}", f"--target={torch_file}", *teacher)
    assert "Read: all 45 arrays" in capsys.readouterr().out
    run(monkeypatch, f"--source={torch_file}", f"--target={keras_file}", *network)
    run(monkeypatch, f"--source={keras_file}", f"--target={last}")
    expected = load(workdir, "teacher")
    assert_equal(load(torch_file), expected)
    assert_equal(keras.saving.load_model(keras_file).get_weights(), expected)
    assert_equal(load(last), expected)
    assert not list(tmp_path.rglob("unfinished*"))


def test_an_existing_target_is_replaced_only_when_asked(workdir, tmp_path, monkeypatch, capsys):
    target = tmp_path / "a.safetensors"
    target.write_text("precious")
    arguments = [f"--source={workdir}", f"--target={target}"]
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    assert caught.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert target.read_text() == "precious"
    run(monkeypatch, *arguments, "--overwrite")
    assert_equal(load(target), load(workdir))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=gone", "--target=a.keras"], "No such source"),
        (["--source={tmp}", "--target=a.onnx"], "must end in one of .keras"),
        (["--source={tmp}/a.h5", "--target={tmp}/b.keras"], "end in one of .keras, .weights.h5"),
        (["--source={tmp}/a.safetensors", "--target={tmp}/a.keras"], "weights alone.*--encoder"),
        (["--source={tmp}", "--target={tmp}/a.keras"], "no run.flags"),
        (["--source={tmp}", "--target={tmp}/a.keras", "--encoder=resnet18"], "Leave --encoder out"),
        (["--source={tmp}/a.safetensors", "--target={tmp}/b.keras", "--encoder=tiny_resnet"],
         "is empty"),
    ],
)  # fmt: skip
def test_bad_input_is_a_sentence_and_nothing_written(
    arguments, message, tmp_path, monkeypatch, capsys
):
    for name in ("a.safetensors", "a.h5"):
        (tmp_path / name).write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *(text.format(tmp=tmp_path) for text in arguments))
    said = capsys.readouterr().err + str(caught.value.code)
    assert __import__("re").search(message, said), said
    assert sorted(tmp_path.rglob("*")) == before


def test_help_begins_with_an_example_and_needs_no_tensorflow():
    code = (
        "import sys; sys.argv = ['convert.py', '--help']; import convert\n"
        "try: convert.main()\nexcept SystemExit: sys.exit('tensorflow' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "experiments", capture_output=True, text=True
    )
    assert result.returncode == 0
    assert "python experiments/convert.py --source=runs/imagenet" in result.stdout[:1000]
