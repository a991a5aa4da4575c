"""Text files that name images: a path a line, or the lists of the paper's unbalanced study."""

import codecs
import os
import re

from isd_tf.data.folders import shown

# The longer marks first: that of UTF-32 begins as that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_list(image_list: str) -> tuple[list[tuple[str, str | None]], tuple[str, ...]]:
    """Reads (path, class name or None) a line of a list, and the class names in order.

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
        raise FileNotFoundError(
            f"The list of images does not exist. Received: {shown(image_list)}."
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
    lines = re.split("\r\n|\n|\r", text)
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise ValueError(
                f"Line {number} of {shown(image_list)} holds zero bytes, as UTF-16 without its "
                "mark does. Save it as UTF-8."
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
        entries.append((path, name))
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
                f"{expected} Received in line {number} of {shown(image_list)}: {shown(line)!r}."
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
        before, other_name = seen.setdefault(path, (number, name))
        if other_name != name:
            refuse(
                f"Expected one class name for an image. Line {before} has {shown(other_name)!r} "
                "for the same path."
            )
        entries.append((path, name))
    return entries, tuple(sorted({name for _, name in entries if name is not None}))


def explain_missing(path: str, root: str) -> str:
    """Says what form a line should have, where a path that is missing shows that it has another."""
    for separator, looks in ((None, "path label"), (",", "path,label"), (";", "path;label")):
        parts = path.rsplit(separator, 1)
        if len(parts) == 2 and os.path.isfile(os.path.join(root, parts[0].strip().strip('"'))):
            return f" The line looks like {looks!r}: put a tab between the path and the class name."
    if "\\" in path and os.path.isfile(os.path.join(root, path.replace("\\", "/"))):
        return " Write / instead of \\."
    if any("\udc80" <= character <= "\udcff" for character in path):
        return (
            " The line is not UTF-8 but, say, Latin-1: unless the file's name is so too, save the "
            "list as UTF-8."
        )
    return ""
