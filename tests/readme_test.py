"""What the README says works: its Python examples run, and its commands are those of make."""

import pathlib
import re
import subprocess

import keras
import pytest
import tensorflow as tf

import isd_tf

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# finetune_test.py runs the one that needs a converted encoder.
PYTHON_BLOCKS = [
    block
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    if "encoder.keras" not in block
]


@pytest.fixture
def quickstart_model(tmp_path, monkeypatch):
    """A working directory in which a quickstart has left its SavedModel."""
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    encoder = isd_tf.build_encoder("tiny_resnet", 32)
    isd_tf.export_encoder(encoder, 32, "runs/quickstart/saved_model")
    return encoder


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=lambda block: block.splitlines()[-1][:40])
def test_python_examples_run(block, quickstart_model, capsys):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    if "encode" in names:
        assert names["features"].shape == (1, 128)
    else:
        assert "student_1nn" in capsys.readouterr().out
        assert tf.io.gfile.listdir("runs/by_hand") == ["1"]


def test_there_are_two_python_examples():
    assert len(PYTHON_BLOCKS) == 2


@pytest.mark.parametrize("target", ["quickstart", "test"])
def test_the_commands_without_make_are_those_of_make(target):
    # -B: as if nothing were installed yet.
    planned = subprocess.run(
        ["make", "-n", "-B", target, "VENV=.venv"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    block = next(b for b in re.findall(r"```\n(.*?)```", README, re.DOTALL) if "-m venv" in b)
    create, install, run, test = block.strip().splitlines()
    for command in (create, install, {"quickstart": run, "test": test}[target]):
        assert command in planned


def test_every_flag_file_is_in_the_table_of_recipes():
    for path in (ROOT / "experiments").glob("*.flags"):
        assert f"| `{path.name}` |" in README


def test_the_docstring_of_the_package_names_what_exists():
    for name in re.findall(r"isd_tf\.(\w+)", isd_tf.__doc__):
        assert hasattr(isd_tf, name)
