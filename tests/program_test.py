"""How programs begin and end, with a few lines in TensorFlow's place where it must not be met."""

import os
import pathlib
import subprocess
import sys

import pytest

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"


def python(*arguments, path, cwd=None, **environment):
    """Runs Python with the modules in `path` before all that are installed."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(path)} | environment,
        cwd=cwd or path,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def without_tensorflow(tmp_path):
    """Runs a program that must not import TensorFlow."""
    (tmp_path / "tensorflow.py").write_text("import os; os._exit(99)")

    def run(program, *arguments):
        return python(EXPERIMENTS / program, *arguments, path=tmp_path)

    assert run("run.py", "--flagfile=quickstart.flags").returncode == 99
    return run


@pytest.mark.parametrize(
    ("program", "arguments", "said"),
    [
        ("run.py", ["--help"], "--[no]check_replicas: Whether every step"),
        ("run.py", ["--help"], "--label_fraction: Share of each"),
        ("run.py", ["--help"], "    python experiments/run.py --flagfile=quickstart.flags"),
        ("run.py", ["--helpfull"], "--teacher_momentum: Share of its past"),
        ("run.py", ["--flagfile=quickstart.flags", "--epoch=3"], "Did you mean: epochs ?"),
        ("run.py", ["--flagfile=quikstart.flags"], "No such flag file.*quickstart_byol.flags"),
        ("run.py", ["--dataset=folder"], "run.py: A recipe must set --image_size, --views"),
        ("run.py", ["--flagfile=quickstart.flags", "--epochs=x"], "run.py: flag --epochs=x: "),
        ("run.py", ["--flagfile=quickstart.flags", "--encoder=vit"], "Expected one of resnet18"),
        ("run.py", ["--flagfile=quickstart.flags", "--unbalanced=8,30"], "LARGE,RARE,IMAGES"),
        ("run.py", ["--flagfile=quickstart.flags", "now"], "must be flags. Received: now."),
        ("launch.py", ["--help"], "--restarts=3 -- "),
        ("launch.py", ["--workers=0", "--", "--x"], "must be at least 1"),
        ("finetune.py", ["--help"], "python experiments/finetune.py --encoder=runs/quickstart"),
        ("finetune.py", ["--help"], "--patience: Epochs without a better one"),
        ("finetune.py", ["--help"], "To train from scratch"),
        ("finetune.py", ["--dataset=folder"], "finetune.py: Finetuning needs --encoder, --workdir"),
        ("data_service.py", ["--help"], "--role=worker --dispatcher=HOST:5000"),
        ("data_service.py", ["--role=cook"], "invalid choice: 'cook'"),
        ("data_service.py", ["--role=worker"], "A worker needs --dispatcher=HOST:PORT"),
        ("embed.py", ["--help"], "usage: python experiments/embed.py --images=photos"),
        ("embed.py", ["--images=x"], "arguments are required: --model, --out"),
        ("embed_beam.py", ["--help"], "usage: python experiments/embed_beam.py --images=photos"),
        ("search.py", ["--help"], "usage: python experiments/search.py --embeddings=embedded"),
        ("search.py", ["--embeddings=x"], "one of the arguments --query --row"),
        ("search.py", ["--embeddings=x", "--diverse=3", "--engine=faiss"], "Leave it out here"),
        ("search.py", ["--embeddings=x", "--near_duplicates=1", "--engine=faiss"], "Leave it out"),
    ],
)
def test_help_and_mistakes_are_answered_without_tensorflow(
    program, arguments, said, without_tensorflow
):
    result = without_tensorflow(program, *arguments)
    output = result.stdout + result.stderr
    assert (result.returncode == 0) == (arguments[0] in ("--help", "--helpfull"))
    assert all(part in output for part in said.split(".*")) and "Traceback" not in output


@pytest.mark.parametrize(
    "program", ["finetune.py", "embed.py", "embed_beam.py", "search.py", "serving/client.py"]
)
def test_what_follows_a_training_begins_its_help_with_an_example(program, without_tensorflow):
    first = without_tensorflow(program, "--help").stdout.strip().splitlines()[0]
    assert first.removeprefix("usage: ").startswith(f"python experiments/{program} --")


@pytest.mark.parametrize(
    "module",
    [
        *("beginning", "data_service", "devices", "embed", "embed_beam", "evaluations"),
        *("finetune_settings", "flagfiles", "launch", "pretraining", "program", "run_data"),
        *("search", "search_results", "settings", "settings_checks"),
    ],
)
def test_a_file_can_be_imported_alone(module, tmp_path):
    """Whichever of them is a program's or a test's first import."""
    code = f"import sys; sys.path.insert(0, {str(EXPERIMENTS)!r}); import {module}"
    result = python("-c", code, path=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def importing(tmp_path):
    """Imports a TensorFlow that writes a line past Python, and then does as it is told."""
    (tmp_path / "tensorflow.py").write_text(
        "import os, sys\n"
        "os.write(2, b'said at the import\\n' * 9999)\n"
        "exec(os.environ['THEN'])\n"
        "class config:\n"
        "    list_physical_devices = lambda kind: os.write(2, b'no GPU\\n') and []\n"
    )

    def run(then="", driver="/nowhere"):
        code = (
            f"import os, pathlib, sys; sys.path.insert(0, {str(EXPERIMENTS)!r}); import program\n"
            f"program.GPU_DRIVER = pathlib.Path({driver!r})\n"
            "program.import_tensorflow()\n"
            "os.write(2, b'said afterwards\\n')"
        )
        result = python("-c", code, path=tmp_path, THEN=then)
        return result.returncode, result.stderr

    return run


def test_what_tensorflow_says_at_its_import_is_not_shown(importing):
    assert importing() == (0, "said afterwards\n")


@pytest.mark.parametrize(
    ("then", "code"),
    [
        ("raise ImportError('libtensorflow')", 1),
        ("os.abort()", -6),  # As on a processor without the instructions that it was built for.
        ("os.kill(os.getpid(), 4)", -4),
        ("os._exit(3)", 3),
    ],
)
def test_what_a_failing_import_has_said_is_shown(then, code, importing):
    returned, stderr = importing(then)
    assert returned == code and stderr.count("said at the import") == 9999
    assert "\0" not in stderr and "afterwards" not in stderr


def test_what_is_said_of_a_gpu_that_cannot_be_used_is_shown(importing):
    _, stderr = importing(driver="/dev/null")
    assert stderr.endswith("said at the import\nno GPU\nsaid afterwards\n")


@pytest.mark.parametrize(
    "program", ["run.py", "launch.py", "data_service.py", "embed.py", "search.py", "finetune.py"]
)
def test_windows_is_refused_in_a_sentence(program):
    code = (
        "import runpy, sys; sys.modules['fcntl'] = None; sys.argv = [sys.argv[1], '--help']\n"
        f"sys.path.insert(0, {str(EXPERIMENTS)!r}); runpy.run_path(sys.argv[0], {{}}, '__main__')"
    )
    result = python("-c", code, EXPERIMENTS / program, path=EXPERIMENTS)
    assert result.returncode == 1 and "need Linux or macOS" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_is_said_moves_no_cursor_and_turns_no_letters():
    text = "a\x1b[31m\rb\u202ec\udce9 d\nthe next line"
    code = (
        f"import sys; sys.path.insert(0, {str(EXPERIMENTS)!r}); import program; program.prepare()\n"
        f"program.say({text!r})\n"
    )
    result = python("-c", code, path=EXPERIMENTS)
    assert result.stdout == "a\\x1b[31m\\rb\\u202ec\\udce9 d\nthe next line\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_cannot_show_a_name_ends_nothing(encoding, tmp_path):
    name = "caf\u00e9 \u732b \udce9"  # The last is a byte of a name that is in no encoding.
    code = (
        f"import sys; sys.path.insert(0, {str(EXPERIMENTS)!r}); import program; program.prepare()\n"
        f"program.say({name!r}); print({name!r}, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    expected = name.encode(encoding, "backslashreplace") + b"\n"
    assert result.stdout == result.stderr == expected


ENDING = """
import sys
sys.path.insert(0, {path!r})
import program
sys.argv = ["a/cook.py", *{arguments!r}]
def main():
    program.say("cooks")
    raise {error}
program.begin(program.FLAGS)
program.run(main)
"""


@pytest.mark.parametrize(
    ("error", "arguments", "code", "said"),
    [
        ("ValueError('Too hot.')", [], 1, "cook.py: Too hot.\n(--verbosity=1 shows"),
        ("KeyError('salt')", [], 1, "cook.py: KeyError: 'salt'\n(--verbosity=1 shows"),
        ("ValueError('Too hot.')", ["--verbosity=1"], 1, "Traceback"),
        ("SystemExit(143)", [], 143, ""),
    ],
)
def test_an_error_is_a_sentence_and_at_verbosity_1_a_stack_trace(
    error, arguments, code, said, tmp_path
):
    script = ENDING.format(path=str(EXPERIMENTS), arguments=arguments, error=error)
    result = python("-c", script, path=tmp_path)
    assert (result.returncode, result.stdout) == (code, "cooks\n")
    assert said in result.stderr and ("Traceback" in result.stderr) == ("Traceback" == said)
