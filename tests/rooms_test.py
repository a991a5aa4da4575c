"""The package's rooms build on each other in one direction, and each room's files do so too."""

import ast
import graphlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "isd_tf"
# Each room, and the rooms whose files it may import, from the ground up. Those that may import none
# know TensorFlow and Keras alone.
MAY_IMPORT = {
    "views": (),
    "networks": ("views",),
    "training": ("networks",),
    "data": ("views",),
    "methods": ("views", "networks", "training"),
    "evaluation": ("data", "views", "methods"),
    "finetuning": ("evaluation",),
    "serving": ("data", "views", "networks"),
    "report": ("views", "training", "evaluation"),
}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path):
    """The package's own modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively."
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def room(name):
    return name.split(".")[1]


def own_imports(name):
    return {other for other in imports(MODULES[name]) if other.split(".")[0] == "isd_tf"}


def test_every_room_is_on_the_list():
    assert {room(name) for name in MODULES if name != "isd_tf"} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "isd_tf"])
def test_a_file_imports_only_from_rooms_below(name):
    for other in own_imports(name):
        assert other in MODULES and other != "isd_tf", f"{name} imports {other}."
        assert room(other) == room(name) or room(other) in MAY_IMPORT[room(name)]


def test_no_file_imports_itself_through_others():
    """`prepare` raises at a cycle."""
    graphlib.TopologicalSorter({name: own_imports(name) for name in MODULES}).prepare()


def test_the_package_imports_no_program():
    programs = {path.stem for path in (PACKAGE.parent / "experiments").glob("*.py")}
    for path in MODULES.values():
        assert not {name.split(".")[0] for name in imports(path)} & programs
