"""Flag files by bare name, and the recipe that a workdir was begun with.

absl resolves the names inside a flag file from the working directory, so that
`--flagfile=imagenet.flags` typed at the repository's root, or written in another flag file, would
not be found. Here every name is looked for as it is written, and then beside this file.
"""

import codecs
import os
import pathlib
import re

from absl import flags

EXPERIMENTS = pathlib.Path(__file__).resolve().parent
HEADER = "# The effective flags of this run. To run the same anew:"


def expand(arguments: list[str], _open_files: tuple[pathlib.Path, ...] = ()) -> list[str]:
    """Replaces every --flagfile by the arguments in it, in place, nested ones too.

    Raises:
        FileNotFoundError: for a flag file that is nowhere.
        ValueError: for a flag file that includes itself, or is no text in UTF-8 or UTF-16.
    """
    expanded = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--":
            return [*expanded, argument, *remaining]
        match = re.fullmatch(r"--?flagfile(=(.*))?", argument)
        if not match:
            expanded.append(argument)
            continue
        path = find(match.group(2) if match.group(1) else next(remaining, ""))
        if path in _open_files:
            raise ValueError(f"The flag file {path} includes itself.")
        lines = [line.strip() for line in re.split(r"\r\n|\r|\n", _read(path))]
        lines = [line for line in lines if line and not line.startswith(("#", "//"))]
        expanded += expand(lines, (*_open_files, path))
    return expanded


def _read(path):
    """The text of a flag file, as editors on any system may have saved it."""
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding, errors = "utf-16", "strict"
    else:
        # A run's own file keeps the names of files that are no UTF-8.
        own = data.startswith(HEADER.encode())
        encoding, errors = "utf-8-sig", "surrogateescape" if own else "strict"
    try:
        text = data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\r|\n", data[: error.start])) + 1
        received = "text in another encoding, such as Latin-1" if b"\0" not in data else "no text"
        raise ValueError(
            f"A flag file must be text in UTF-8, or in UTF-16 with its byte order mark. Received: "
            f"{path}, line {line}: {received}. Save it as UTF-8."
        ) from None
    if "\0" in text:
        raise ValueError(
            f"A flag file must be text in UTF-8, or in UTF-16 with its byte order mark. Received: "
            f"{path}, with zero bytes, as UTF-16 without the mark has them. Save it as UTF-8."
        )
    return text


def find(name: str) -> pathlib.Path:
    """Returns the flag file of a name: as written, or else in experiments/."""
    for path in (pathlib.Path(name).expanduser(), EXPERIMENTS / name):
        if name and path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.name for path in EXPERIMENTS.glob("*.flags")))
    raise FileNotFoundError(
        f"No such flag file. Received: --flagfile={name}. Looked in the working directory and in "
        f"{EXPERIMENTS}, which has: {known}."
    )


def write(path: pathlib.Path, effective: list[flags.Flag], program: str = "run.py") -> None:
    """Writes flags as a flag file by which `program` runs the same again."""
    lines = [
        HEADER,
        f"#   python experiments/{program} --flagfile=THIS_FILE --workdir=A_NEW_FOLDER",
        *(flag.serialize() for flag in effective if flag.value is not None),
    ]
    # Beside and renamed: a full disk leaves the former file whole.
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
    os.replace(unfinished, path)


def require_same(path: pathlib.Path, recipe: list[flags.Flag]) -> None:
    """Compares the flags of a recipe with those that `write` left at `path`, if it did.

    Raises:
        ValueError: naming the flags that differ.
    """
    if not path.exists():
        return
    written = {}
    for line in expand([f"--flagfile={path}"]):
        written[re.match(r"--([^=]*)", line).group(1)] = line
    differ = []
    for flag in recipe:
        if flag.name not in written and f"no{flag.name}" not in written:
            # Unset, or newer than the workdir.
            if flag.value == flag.default:
                continue
        was = written.get(flag.name, written.get(f"no{flag.name}", f"--{flag.name} unset"))
        now = flag.serialize() if flag.value is not None else f"--{flag.name} unset"
        if was != now:
            differ.append(f"{was} then, {now} now")
    if differ:
        raise ValueError(
            f"The workdir {path.parent} was begun with another recipe: {'; '.join(differ)}. "
            "Use the same flags to continue it, or another --workdir."
        )
