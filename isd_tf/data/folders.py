"""Folders of images: which files are images, which subfolders are splits and classes."""

import collections
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from absl import logging

from isd_tf.data.pixels import BEGINNING, image_suffixes, kind_of_beginning

# What systems and programs leave behind, in lower case; names that begin with a dot beside these.
LEFT_BY_SYSTEMS = frozenset(
    {
        # Synology, QNAP and other network drives.
        *("@eadir", "#recycle", "@recycle", "#snapshot", "@tmp", "network trash folder"),
        # Windows, Linux, macOS.
        *("$recycle.bin", "recycler", "system volume information", "thumbs.db", "ehthumbs.db"),
        *("desktop.ini", "lost+found", "__macosx", "icon\r", "temporary items"),
        # Picture managers and Python.
        *("_thumbs", "_thumbnails", "__pycache__"),
    }
)
# Names of splits, whatever their case; of several test splits the first is taken.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "validation", "valid", "val")
# "train2017", "val_images" and the like are not taken for a split, but not for a class either; what
# has something before it, or is an unusual word, may be a class, such as "bullet_train".
LOOKS_LIKE_A_SPLIT = re.compile(
    r"(?P<before>.*?[^a-z])??"
    r"((?P<train>train|training|trn)|(test|testing|validation|valid|val|tst|dev|eval|evaluation))"
    r"([^a-z].*|images?|imgs?|set|data)?",
    re.IGNORECASE,
)


# Of files that are no images, or of programs that Pillow shows a small preview of: not looked into.
NO_IMAGES = frozenset(
    ".txt .csv .tsv .json .jsonl .xml .yaml .yml .md .rst .html .htm .ini .cfg .conf .log .lst"
    " .pdf .doc .docx .xls .xlsx .ppt .pptx .rtf .odt .eps .ps .ai .svg .wmf .emf .url .lnk"
    " .zip .tar .gz .tgz .bz2 .xz .7z .rar .zst .iso .bak .tmp .part .crdownload .download"
    " .mp4 .mov .avi .mkv .webm .mpg .mpeg .m4v .3gp .wmv .mp3 .wav .flac .ogg .m4a .aac"
    " .npy .npz .pt .pth .ckpt .pkl .mat .h5 .hdf5 .parquet .arrow .tfrecord .db .sqlite .onnx"
    " .py .ipynb .pyc .c .h .cpp .js .css .sh .bat .exe .dll .so .sha1 .sha256 .md5 .xmp .aae"
    " .heic .heif .cr2 .cr3 .nef .arw .dng .orf .rw2 .raf .pef .srw .raw".split()
)
# Of so many files with one unknown suffix, none of them an image, the rest are taken for none too.
LOOKED_INTO = 1000


class Found(NamedTuple):
    """What lies below a folder."""

    paths: tuple[str, ...]  # of images
    classes: tuple[str, ...] | None  # of each image the subfolder that it is in; None: no classes
    left_out: tuple[str, ...]  # paths of files that are no images


def find_splits(
    root: str, train_split: str, test_split: str | None
) -> tuple[str | None, str | None]:
    """Returns the names of the subfolders to train on and to test on.

    Args:
        root: the folder.
        train_split: as asked for; "train" stands for all of TRAIN_NAMES.
        test_split: as asked for; None for the first of TEST_NAMES that there is.

    Returns:
        Both names. The first is None where nothing looks like a split, the second where there is
        no test split.

    Raises:
        FileNotFoundError: for a split that there is not, or not under that name.
    """
    folders = _subfolders(root)
    train = train_split if train_split in folders else None
    if train is None and train_split == "train":
        train = _only(root, folders, TRAIN_NAMES, "--train_split")
    if train is None:
        alike = parts_among(folders)
        if train_split != "train" or test_split or alike:
            raise FileNotFoundError(
                f"The folder {shown(root)} has no subfolder {train_split!r} to train on"
                + (f", but {_listed(alike)}, which look like parts of a dataset" if alike else "")
                + ". Name the right ones by --train_split and --test_split, or give a folder that "
                "holds training images only."
            )
        return None, None
    if test_split is None:
        for name in TEST_NAMES:
            test_split = test_split or _only(root, folders, (name,), "--test_split")
    elif test_split not in folders:
        raise FileNotFoundError(
            f"The test folder {shown(os.path.join(root, test_split))} does not exist. It has the "
            f"folders {_listed(folders)}. Correct --test_split."
        )
    unused = [name for name in folders if name not in (train, test_split)]
    if unused:
        logging.warning(
            "Of %s only %s are read. Beside them are: %s.",
            shown(root),
            " and ".join(shown(name) for name in (train, test_split) if name),
            _listed(unused),
        )
    return train, test_split


def parts_among(names: Iterable[str]) -> list[str]:
    """Which names of folders look like those of a dataset's parts.

    Those that may as well be classes do so only where there are both training and test images.
    """
    found = {name: match for name in names if (match := LOOKS_LIKE_A_SPLIT.fullmatch(name))}
    if _holds_both(found):
        return list(found)
    known = (*TRAIN_NAMES, *TEST_NAMES)
    return [
        name for name, match in found.items() if not match["before"] and match[2].lower() in known
    ]


def _subfolders(root):
    with os.scandir(root) as entries:
        return sorted(
            e.name for e in entries if _kind(e) == "folder" and not is_left_by_system(e.name)
        )


def _only(root, folders, names, flag):
    """The folder with one of some names: in this case, or else the only one in another."""
    exact = [name for name in folders if name in names]
    found = exact or [name for name in folders if name.lower() in names]
    if len(found) > 1:
        raise FileNotFoundError(
            f"The folder {shown(root)} has {_listed(found)}. Say by {flag} which of them is meant."
        )
    return found[0] if found else None


def is_left_by_system(name: str) -> bool:
    """Whether a file or folder is none of the user's."""
    return name.startswith(".") or name.lower() in LEFT_BY_SYSTEMS


def scan(folder: str, labelled: bool) -> Found:
    """Lists the images below a folder, at any depth; its immediate subfolders are the classes.

    A name that ends as an image's is one. Into files of unknown suffix, or none, it looks.

    Args:
        folder: where to look. Linked folders are followed, but not in a circle.
        labelled: whether subfolders are classes, which they are where no image lies beside them.

    Raises:
        ValueError: where there is no image, or where training and test images would be mixed.
    """
    is_image = _image_test()
    paths, left_out = [], []
    for path in _files_below(folder):
        (paths if is_image(path) else left_out).append(path)
    if not paths:
        raise ValueError(
            f"Found no image below {shown(folder)}, which holds "
            f"{count_by_suffix(left_out) or 'no file at all'}. Expected names that end in .jpg, "
            f".png or another of the {len(image_suffixes())} suffixes that Pillow reads."
        )
    tops = [os.path.relpath(path, folder).split(os.sep) for path in paths]
    if not labelled:
        _refuse_mixed_splits(folder, tops)
        return Found(tuple(paths), None, tuple(left_out))
    beside = [parts[0] for parts in tops if len(parts) == 1]
    if beside and len(beside) < len(paths):
        logging.warning(
            "%s holds %d images beside its subfolders, such as %s: no image is taken as labelled.",
            shown(folder),
            len(beside),
            shown(beside[0]),
        )
    classes = [parts[0] for parts in tops]
    empty = [name for name in _subfolders(folder) if name not in set(classes)]
    if empty:
        logging.warning("Without an image, so no class of %s: %s.", shown(folder), _listed(empty))
    return Found(tuple(paths), None if beside else tuple(classes), tuple(left_out))


def _files_below(folder):
    """Paths of files, at any depth: a folder's own, then its subfolders', each in order of names.

    Pipes, sockets and devices are no files, and are named. A link to nothing is one.
    """
    waiting, visited = [folder], set()
    while waiting:
        directory = waiting.pop()
        real = os.path.realpath(directory)
        if real in visited:  # A link back up.
            continue
        visited.add(real)
        found = {"folder": [], "file": [], "other": []}
        with os.scandir(directory) as entries:
            for entry in entries:
                if not is_left_by_system(entry.name):
                    found[_kind(entry)].append(entry.path)
        for path in found["other"]:
            logging.warning("Not read: %s, a pipe, socket or device.", shown(path))
        yield from sorted(found["file"])
        waiting += sorted(found["folder"], reverse=True)


def _kind(entry):
    """Whether an entry of a folder is a "folder", a "file" or something "other"."""
    try:
        # Most systems know this without another look at the disk.
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
        entry.stat()
        return "other"
    except OSError:
        return "file"  # A link to nothing or to itself, which cannot be read.


def _image_test():
    """Returns a function that tells whether a path is that of an image."""
    suffixes, looks, images = image_suffixes(), collections.Counter(), set()

    def is_image(path):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in suffixes:
            return True
        hopeless = looks[suffix] >= LOOKED_INTO and suffix not in images
        if suffix in NO_IMAGES or hopeless:
            return False
        looks[suffix] += 1
        try:
            with open(path, "rb") as file:
                kind = kind_of_beginning(file.read(BEGINNING))
        except OSError:
            return False
        if kind == "HEIC":
            logging.log_first_n(
                logging.WARNING,
                "Not read: %s, a HEIC file. pip install pillow-heif lets it be read.",
                1,
                shown(path),
            )
        if kind == "image":
            images.add(suffix)
        return kind == "image"

    return is_image


def _refuse_mixed_splits(folder, tops):
    """Raises where a folder deeper down holds both training and test images."""
    inside = collections.defaultdict(set)
    for parts in tops:
        for depth, name in enumerate(parts[:-1]):
            inside[os.path.join(folder, *parts[:depth])].add(name)
    mixed = {
        parent: parts
        for parent, names in inside.items()
        if _holds_both(parts := parts_among(names))
    }
    if not mixed:
        return
    first, *others = mixed
    which = f"{shown(folder)} has no train folder, but {_listed(list(mixed))}"
    what = f"{_listed(sorted(mixed[first]))}, which would be trained on together"
    if others:
        raise ValueError(
            f"{which} have {what}. If these are classes, arrange them the other way round, as "
            "train/<class>/ and test/<class>/; else pass one of them as --data_dir."
        )
    raise ValueError(
        f"{which} has {what}. Pass --data_dir={shown(first)}, or a folder that holds training "
        "images only."
    )


def _holds_both(parts):
    """Whether of a dataset's parts some are for training and some for testing."""
    return len({LOOKS_LIKE_A_SPLIT.fullmatch(name)["train"] is None for name in parts}) == 2


def count_by_suffix(paths: list[str] | tuple[str, ...]) -> str:
    """Tells how many files end in what, for example "15 files: 10 .txt, 5 without suffix"."""
    if not paths:
        return ""
    suffixes = collections.Counter(os.path.splitext(path)[1].lower() for path in paths)
    parts = []
    for suffix, count in sorted(suffixes.items(), key=lambda item: (-item[1], item[0])):
        hint = " (pip install pillow-heif)" if suffix in (".heic", ".heif") else ""
        parts.append(f"{count} {shown(suffix) or 'without suffix'}{hint}")
    more = f", {len(parts) - 8} other kinds" if len(parts) > 8 else ""
    files = "file" if len(paths) == 1 else "files"
    return f"{len(paths)} {files}: {', '.join(parts[:8])}{more}"


def shown(name: str) -> str:
    """A name as text: what is not printable, or no UTF-8, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _listed(names):
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(shown(name) for name in names[:5]) + more
