"""Text files that name images: a path a line, or the lists of the paper's unbalanced study."""

import codecs
import os
import re
from typing import NamedTuple

from isd_tf.data.folders import shown

# The longer marks first: that of UTF-32 begins as that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


# What people put between columns, and how such a line looks.
SEPARATORS = ((None, "path label"), (",", "path,label"), (";", "path;label"), ("|", "path|label"))
# Of so many lines whose files are missing it is looked for what is wrong with all of them.
LOOKED_INTO = 10


class Entry(NamedTuple):
    """An image that a list names."""

    path: str
    class_name: str | None
    line: int  # counted from 1


def read_list(image_list: str) -> tuple[list[Entry], tuple[str, ...]]:
    """Reads an entry a line of a list, and the class names in order.

    Two forms: a path a line, optionally a tab and a class name behind it; and the lists of ISD's
    unbalanced study ("class names : ", the names, "Train Images: ", then "/train/<class>/<file>").
    UTF-8, UTF-16 and UTF-32 with their marks are read. Bytes that are no UTF-8 stay as they are,
    as in names of files.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a list of neither form, or without images.
    """
    lines = _read_lines(image_list)
    heads = [line.strip().lower().replace(" ", "").rstrip(":") for line in lines]
    if "trainimages" in heads:
        entries, class_names = _read_unbalanced(image_list, lines, heads)
    else:
        entries, class_names = _read_plain(image_list, lines)
    if not entries:
        raise ValueError(f"{shown(image_list)} lists no image. Expected one path a line.")
    return entries, class_names


def _read_lines(image_list):
    if not os.path.isfile(image_list):
        is_folder = os.path.isdir(image_list)
        raise FileNotFoundError(
            f"The list of images {'must be a file' if is_folder else 'does not exist'}. Received: "
            f"{shown(image_list)}{', a folder' * is_folder}."
        )
    with open(image_list, "rb") as file:
        content = file.read()
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding, "surrogateescape" if "utf-8" in encoding else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{shown(image_list)} begins as {encoding.upper()} but is not: {error.reason} at byte "
            f"{error.start}. Save it as UTF-8."
        ) from None
    # Lists that were put together have a mark in the middle too.
    lines = [line.removeprefix("\ufeff") for line in re.split("\r\n|\n|\r", text)]
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise ValueError(
                f"Line {number} of {shown(image_list)} holds zero bytes, as UTF-16 without its "
                "mark does, and what is no text. Save it as UTF-8."
            )
    return lines


def _read_unbalanced(image_list, lines, heads):
    begin, end = (
        heads.index("classnames") if "classnames" in heads else 0,
        heads.index("trainimages"),
    )
    class_names = tuple(" ".join(lines[begin + 1 : end]).replace(",", " ").split())
    entries = []
    for number, line in enumerate(lines[end + 1 :], end + 2):
        if not line.strip():
            continue
        # A leading slash means the root of ImageNet, not of the machine.
        path = line.strip().lstrip("/")
        name = path.split("/")[-2] if "/" in path else None
        if name not in class_names:
            raise ValueError(
                f"{shown(image_list)} lists an image outside the classes that it names. Received "
                f"in line {number}: {shown(path)}. Expected /train/<class>/<file> with one of "
                f"{len(class_names)} classes."
            )
        entries.append(Entry(path, name, number))
    return entries, class_names


def _read_plain(image_list, lines):
    entries, seen = [], {}
    first = None  # The number of the first line, and whether it has a class name.
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]

        def refuse(expected, number=number, line=line):
            raise ValueError(
                f"{expected} Received in line {number} of {shown(image_list)}: '{shown(line)}'."
            )

        if len(cells) > 2:
            refuse("Expected a path, a tab and a class name, and no third column.")
        if not cells[0]:
            refuse("Expected a path before the tab.")
        if len(cells) > 1 and not cells[1]:
            refuse("Expected a class name behind the tab.")
        path, name = cells[0], cells[1] if len(cells) > 1 else None
        first = first or (number, name is not None)
        if first[1] != (name is not None):
            refuse(
                "Expected a tab and a class name on every line, or on none. Line "
                f"{first[0]} has {'one' if first[1] else 'none'}."
            )
        before, other_name = seen.setdefault(os.path.normpath(path), (number, name))
        if other_name != name:
            refuse(
                f"Expected one class name for an image. Line {before} has '{shown(other_name)}' "
                "for the same path."
            )
        entries.append(Entry(path, name, number))
    names = {entry.class_name for entry in entries}
    return entries, tuple(sorted(names - {None}))


def explain_missing(missing: list[Entry], root: str) -> str:
    """Says what form a line should have, where those whose files are missing show another one.

    Args:
        missing: in their order, not all of the list.
        root: what their paths are relative to.
    """

    def exists(path):
        return path and os.path.isfile(os.path.join(root, path))

    for path, class_name, line in missing[:LOOKED_INTO]:
        where = f" Line {line} "
        for separator, looks in SEPARATORS:
            cells = [cell.strip().strip("\"'") for cell in path.split(separator)]
            joined = path.rsplit(separator, 1)[0].strip().strip("\"'")
            if len(cells) > 1 and exists(joined):
                return (
                    f"{where}looks like {looks!r}: put a tab between the path and the class name."
                )
            if len(cells) > 1 and any(map(exists, cells)):
                found = next(filter(exists, cells))
                return (
                    f"{where}has more than the path {shown(found)}: a line is a path, optionally a "
                    "tab and a class name."
                )
        if exists(class_name):
            return f"{where}has the class name first: the path comes first."
        if exists(path.strip("\"'")):
            return f"{where}has quotes around the path: write it without."
        if exists(path.replace("\\", "/")):
            return f"{where}has \\ in its path: write / instead."
        if exists(path.lstrip("/")):
            return f"{where}begins with /, which is the machine's root: leave it out."
        if any("\udc80" <= character <= "\udcff" for character in path):
            return (
                f"{where}is not UTF-8 but, say, Latin-1: unless the file's name is so too, save "
                "the list as UTF-8."
            )
        if os.path.isdir(os.path.join(root, path)):
            return f"{where}names a folder: a list names files."
    if [entry.line for entry in missing] == [1] and "." not in missing[0].path:
        return " Line 1 looks like a heading: a list has none."
    return ""
