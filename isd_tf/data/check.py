"""Looks at every image of a dataset before it is trained on: what is odd, and what becomes of it.

`check` reads everything once. `shared_images` only asks whether training and test images are the
same, and reads no more than that takes.
"""

import collections
import concurrent.futures
import csv
import functools
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import joblib
import numpy as np
from PIL import Image

from isd_tf.data import pixels
from isd_tf.data.datasets import ArrayDataset, Dataset, FileDataset, RecordDataset
from isd_tf.data.folders import shown

LARGE_PIXELS = 50_000_000
# Longer side by shorter side. Random crops are at most 4/3 as long as wide.
THIN_RATIO = 8.0
# Nearly all pixels of a near-black image have at most this level of 255.
BLACK_LEVEL = 16
BLACK_SHARE = 0.999
# Each kind of finding, and what pretraining does with such an image.
CONSEQUENCES = {
    "unreadable": "replaced by the next image, counted, limited by --max_unreadable",
    "in train and test": "used by both: scores are too high",
    "duplicate": "used each time: seen so much more often",
    "near-black": "used: both views of it are black",
    "very small": "used: enlarged, so blurred",
    "extremely thin": "used: a crop sees a small part of it",
    "very large": "used: read whole, so slow",
}
# Images looked at between two reports of progress, and held by name at a time.
IMAGES_AT_ONCE = 256
# What TFRecord files of training and test images hold together, where they are compared.
LARGEST_STREAM_BYTES = 2**30
# How much of two files of one size is compared before the whole of them is.
SAMPLE_BYTES = 4096


class Finding(NamedTuple):
    """Something odd about an image."""

    split: str
    image: str  # path, or place in the dataset
    kind: str  # of CONSEQUENCES
    detail: str


class Checked(NamedTuple):
    """What was found."""

    images: dict[str, int]  # of each split how many there are
    findings: list[Finding]
    sizes: list[tuple[int, int]]  # width and height of each readable image
    modes: dict[str, int]  # of each of Pillow's modes how many images have it


class _Seen(NamedTuple):
    digest: bytes
    size: tuple[int, int] | None = None
    mode: str = ""
    black: bool = False
    reason: str = ""  # why it cannot be read


def check(
    splits: dict[str, Dataset],
    image_size: int,
    max_pixels: int = pixels.MAX_PIXELS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Reads every image once, on all cores.

    Args:
        splits: datasets by what they are called, training images first.
        image_size: side of the views in pixels; what is not half as wide is very small.
        max_pixels: as in `pixels.open_image`.
        progress: is told how many images are done, of how many.
    """
    total = sum(len(dataset) for dataset in splits.values())
    findings, sizes, modes, done = [], [], collections.Counter(), 0
    first_of_all = {}  # By digest: the split and the name that an image was first met under.
    with concurrent.futures.ThreadPoolExecutor(joblib.cpu_count()) as pool:
        for split, dataset in splits.items():
            images = _images(dataset)
            while some := list(itertools.islice(images, IMAGES_AT_ONCE)):
                looks = pool.map(lambda image: _look(*image, max_pixels), some)
                for (name, _), seen in zip(some, looks, strict=True):
                    odd = list(_oddities(seen, image_size))
                    first_split, first = first_of_all.setdefault(seen.digest, (split, name))
                    # Two that cannot be read, such as two empty files, are no pair to warn of.
                    if not seen.reason and (first_split, first) != (split, name):
                        kind = "duplicate" if first_split == split else "in train and test"
                        odd.append((kind, f"same as {first}"))
                    findings += [Finding(split, name, *finding) for finding in odd]
                    if seen.size:
                        sizes.append(seen.size)
                        modes[seen.mode] += 1
                done += len(some)
                progress(done, total)
    return Checked({split: len(d) for split, d in splits.items()}, findings, sizes, dict(modes))


def _images(dataset) -> Iterator[tuple[str, Callable[[], bytes | np.ndarray]]]:
    """Names, and how each image is read."""
    if isinstance(dataset, FileDataset):
        for path in dataset.paths:
            yield path, lambda path=path: pixels.read_file(path)
    elif isinstance(dataset, ArrayDataset):
        for row, image in enumerate(dataset.images):
            yield f"image {row}", lambda image=image: image
    else:
        encoded = dataset.records.map(
            lambda file, index, record: (file, index, dataset.parse(record)[0])
        )
        for file, index, image in encoded.as_numpy_iterator():
            yield f"{os.fsdecode(file)} record {index}", lambda image=image: image


def _look(name, read, max_pixels):
    try:
        content = read()
    except pixels.UnreadableImage as error:
        return _Seen(os.fsencode(name), reason=str(error))
    digest = hashlib.sha256(content.tobytes() if isinstance(content, np.ndarray) else content)
    try:
        if isinstance(content, np.ndarray):
            image = Image.fromarray(content)
            mode = image.mode
        else:
            image = pixels.open_image(content, shown(name), max_pixels)
            with Image.open(io.BytesIO(content)) as stored:
                mode = stored.mode
    except pixels.UnreadableImage as error:
        return _Seen(digest.digest(), reason=str(error))
    levels = np.array(image.convert("L").histogram())
    black = levels[: BLACK_LEVEL + 1].sum() >= BLACK_SHARE * levels.sum()
    return _Seen(digest.digest(), image.size, mode, bool(black))


def _oddities(seen, image_size):
    if seen.reason:
        yield "unreadable", seen.reason
        return
    short, long = sorted(seen.size)
    size = "{} x {} pixels".format(*seen.size)
    if seen.black:
        yield "near-black", f"no level above {BLACK_LEVEL} of 255"
    if 2 * short < image_size:
        yield "very small", size
    if long > THIN_RATIO * short:
        yield "extremely thin", size
    if short * long > LARGE_PIXELS:
        yield "very large", size


def summary(checked: Checked) -> str:
    """Tells what was found as text: a table of kinds with examples, sizes and modes."""
    images = ", ".join(f"{count} {split}" for split, count in checked.images.items())
    lines = [f"{images} images read, {len(checked.findings)} findings."]
    for kind, consequence in CONSEQUENCES.items():
        found = [finding for finding in checked.findings if finding.kind == kind]
        if found:
            lines.append(f"{len(found):8} {kind:17} {consequence}")
            lines += [f"{'':8} {shown(f.image)} ({shown(f.detail)})" for f in found[:3]]
    if checked.sizes:
        widths, heights = zip(*checked.sizes, strict=True)
        for side, values in (("width", widths), ("height", heights)):
            low, middle, high = np.percentile(values, [0, 50, 100])
            lines.append(f"{side}: {low:.0f} to {high:.0f} pixels, median {middle:.0f}")
        modes = sorted(checked.modes.items(), key=lambda item: -item[1])
        lines.append("modes: " + ", ".join(f"{count} {mode}" for mode, count in modes))
    return "\n".join(lines)


def write_csv(checked: Checked, path: str) -> None:
    """Writes all findings, one a line; names that are no text are escaped."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("split", "image", "kind", "detail", "what pretraining does"))
        for split, image, kind, detail in checked.findings:
            writer.writerow((split, shown(image), kind, shown(detail), CONSEQUENCES[kind]))


# ----------------------------------------------------------------------------- train and test


def shared_images(train: Dataset, test: Dataset) -> list[tuple[int, int]] | None:
    """Finds test images that are training images too: the same file, bytes or pixels.

    Of files only those are read that have the size of another, of TFRecord files all.

    Returns:
        Pairs of a row of `train` and a row of `test`, in the order of the latter. None for streams
        of TFRecord files that are long to read, and for datasets of two kinds: these are not
        compared.
    """
    if isinstance(train, ArrayDataset) and isinstance(test, ArrayDataset):
        if train.images.shape[1:] != test.images.shape[1:]:
            return []
        return _pairs(*(map(_digest_of_array, dataset.images) for dataset in (train, test)))
    if isinstance(train, RecordDataset) and isinstance(test, RecordDataset):
        files = {*train.files, *test.files}
        if sum(map(os.path.getsize, files)) > LARGEST_STREAM_BYTES:
            return None
        return _pairs(*(map(_digest_of_record, _images(dataset)) for dataset in (train, test)))
    if not (isinstance(train, FileDataset) and isinstance(test, FileDataset)):
        return None
    with concurrent.futures.ThreadPoolExecutor(4 * joblib.cpu_count()) as pool:
        both = (train.paths, test.paths)
        files = [list(pool.map(_file_and_size, paths)) for paths in both]
        # The size, then also a sample, then also everything: where all before agrees.
        keys = [[size for _, size in part] for part in files]
        for read in (_sample, _digest_of_file):
            common = set(keys[0]) & set(keys[1]) - {None}
            read_more = functools.partial(_extended, common, read)
            keys = [
                list(pool.map(read_more, part, paths))
                for part, paths in zip(keys, both, strict=True)
            ]
    same_file = _pairs(*([file for file, _ in part] for part in files))
    return sorted({*same_file, *_pairs(*keys)}, key=lambda pair: pair[::-1])


def _pairs(train_keys, test_keys):
    first = {}
    for row, key in enumerate(train_keys):
        first.setdefault(key, row)
    return [(first[k], row) for row, k in enumerate(test_keys) if k is not None and k in first]


def _extended(common, read, key, path):
    if key not in common:
        return None
    try:
        return key, read(path)
    except OSError:
        return None


def _file_and_size(path):
    try:
        status = os.stat(path)
    except OSError:
        return None, None
    # Files that hold nothing are no images.
    return (status.st_dev, status.st_ino), status.st_size or None


def _sample(path):
    with open(path, "rb") as file:
        file.seek(os.path.getsize(path) // 2)
        return file.read(SAMPLE_BYTES)


def _digest_of_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _digest_of_record(named):
    _, read = named
    return hashlib.sha256(read()).digest()


def _digest_of_array(image):
    return hashlib.sha256(image.tobytes()).digest()
