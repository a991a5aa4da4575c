import pathlib
import sys

import pytest
from absl import flags

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import flagfiles  # noqa: E402


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    """A working directory, and an experiments/ elsewhere."""
    (tmp_path / "here").mkdir()
    (tmp_path / "experiments").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(flagfiles, "EXPERIMENTS", tmp_path / "experiments")
    return tmp_path / "experiments"


def test_bare_names_are_found_in_experiments_nested_ones_too(experiments):
    (experiments / "base.flags").write_text("# a comment\n\n--a=1\n--b=2\n// another\n")
    (experiments / "variant.flags").write_text("--flagfile=base.flags\n  --b=3  \n")
    assert flagfiles.expand(["run.py", "--x=0", "--flagfile=variant.flags", "--c=4"]) == [
        *("run.py", "--x=0", "--a=1", "--b=2", "--b=3", "--c=4")
    ]


def test_the_working_directory_comes_first(experiments):
    (experiments / "base.flags").write_text("--a=theirs\n")
    pathlib.Path("base.flags").write_text("--a=mine\n")
    for spelled in (
        ["--flagfile=base.flags"],
        ["--flagfile", "base.flags"],
        ["-flagfile=base.flags"],
    ):
        assert flagfiles.expand(spelled) == ["--a=mine"]


def test_flagfile_after_two_dashes_is_an_argument(experiments):
    assert flagfiles.expand(["--", "--flagfile=x"]) == ["--", "--flagfile=x"]


def test_missing_flag_file_lists_the_known_ones(experiments):
    (experiments / "quickstart.flags").write_text("")
    with pytest.raises(FileNotFoundError, match="--flagfile=imagnet.flags.*quickstart.flags"):
        flagfiles.expand(["--flagfile=imagnet.flags"])


def test_flag_file_that_includes_itself_is_refused(experiments):
    (experiments / "loop.flags").write_text("--flagfile=loop.flags\n")
    with pytest.raises(ValueError, match="loop.flags includes itself"):
        flagfiles.expand(["--flagfile=loop.flags"])


TEXT = "# comment\n--name=caf\u00e9\n\n--size=5\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        "\ufeff".encode("utf-16-be") + TEXT.encode("utf-16-be"),
        TEXT.replace("\n", "\r\n").encode("utf-8-sig"),
        TEXT.replace("\n", "\r\n").encode("utf-16"),
        TEXT.replace("\n", "\r").encode(),
    ],
)
def test_a_flag_file_is_read_as_any_editor_saves_it(data, experiments):
    (experiments / "edited.flags").write_bytes(data)
    assert flagfiles.expand(["--flagfile=edited.flags"]) == ["--name=caf\u00e9", "--size=5"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXT.encode("latin-1"), "edited.flags, line 2: .*Latin-1. Save it as UTF-8"),
        (TEXT.replace("\n", "\r\n").encode("latin-1"), "edited.flags, line 2: "),
        (TEXT.encode("utf-16-le")[:16], "edited.flags, with zero bytes, as UTF-16 without"),
        (b"\xff\xfe-", "edited.flags, line 1: "),
        (b"\x7fELF\x02\0\xff", "edited.flags, line 1: no text"),
    ],
)
def test_a_flag_file_in_another_encoding_is_named_with_its_line(data, message, experiments):
    (experiments / "edited.flags").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        flagfiles.expand(["--flagfile=edited.flags"])


@pytest.fixture
def values():
    values = flags.FlagValues()
    flags.DEFINE_integer("size", 3, "", flag_values=values)
    flags.DEFINE_string("name", None, "", flag_values=values)
    flags.DEFINE_string("path", None, "", flag_values=values)
    flags.DEFINE_list("epochs", [], "", flag_values=values)
    flags.DEFINE_bool("quick", True, "", flag_values=values)
    return values


def all_flags(values):
    return [values[name] for name in ("size", "name", "path", "epochs", "quick")]


def test_written_flags_run_the_same_again(values, tmp_path):
    values(["x", "--size=5", "--epochs=1,2", "--noquick", "--path=/caf\udce9\u2028x"])
    flagfiles.write(tmp_path / "run.flags", all_flags(values))
    values.unparse_flags()
    for name in ("size", "epochs", "quick", "path"):
        values[name].unparse()
    values(["x", *flagfiles.expand([f"--flagfile={tmp_path / 'run.flags'}"])])
    assert (values.size, values.name, values.epochs, values.quick) == (5, None, ["1", "2"], False)
    assert values.path == "/caf\udce9\u2028x"  # In no encoding, as Linux allows.
    assert [path.name for path in tmp_path.iterdir()] == ["run.flags"]


def test_another_recipe_is_refused_naming_what_differs(values, tmp_path):
    path = tmp_path / "run.flags"
    flagfiles.require_same(path, [])  # Nothing was begun yet.
    values(["x", "--name=a"])
    flagfiles.write(path, all_flags(values))
    flagfiles.require_same(path, all_flags(values))
    values(["x", "--size=7", "--noquick"])
    values["name"].unparse()
    with pytest.raises(ValueError) as error:
        flagfiles.require_same(path, all_flags(values))
    for text in ("--size=3 then, --size=7 now", "--quick then, --noquick now",
                 "--name=a then, --name unset now", "another --workdir"):  # fmt: skip
        assert text in str(error.value)
    assert "epochs" not in str(error.value)
