"""Decoding and cropping in Python, and what happens to images that cannot be read.

In training the next candidate replaces each, so that no later batch shifts; elsewhere they are left
out. Whoever decodes, here or in a data service, says which failed and why; `Unreadable` counts them
and names them in the log.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from isd_tf.data import crop_processes, pixels
from isd_tf.data.folders import shown
from isd_tf.views import python_crops

WORKERS_MUST = "A data service's workers must"
# What becomes of an unreadable image: in training, in evaluations.
REPLACED, LEFT_OUT = "replaced by the next one", "left out"


class Unreadable:
    """The unreadable images of a dataset: counted once each, named in the log, limited.

    Each counts from the place on at which the reading meets it, so that the verdict at a place is
    the same however far ahead of it is read.

    Args:
        total: images in the dataset.
        limit: largest share of `total` that may be unreadable.
        fate: what becomes of them, for the log: REPLACED or LEFT_OUT.
        max_pixels: an image of more, width times height, counts as unreadable.
        whole: images that `limit` is a share of; None: `total`.
    """

    def __init__(
        self,
        total: int,
        limit: float,
        fate: str = LEFT_OUT,
        max_pixels: int = pixels.MAX_PIXELS,
        whole: int | None = None,
    ):
        self.total = total
        self.tolerated = limit * (whole or total)
        self.images = f"{total}" + (f", a part of {whole}" if whole else "")
        self.limit = limit
        self.fate = fate
        self.max_pixels = max_pixels
        self.verdict = ""  # What was raised.
        self._first_places: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> set[str]:
        """All that were met so far, those that were read ahead too."""
        with self._lock:
            return set(self._first_places)

    @property
    def readable(self) -> int:
        """Images that are left, as far as they have been read."""
        return self.total - len(self._first_places)

    def met_before(self, place: int) -> list[str]:
        """Names of the unreadable images that stand before a place."""
        with self._lock:
            return [name for name, first in self._first_places.items() if first < place]

    def count(self, places: np.ndarray, failures: np.ndarray) -> None:
        """Counts the images that could not be read at some places.

        Args:
            places: int64 [n], in the order of reading.
            failures: bytes [n], those of each place one after the other; empty where all was well.
        """
        for place, failure in zip(places.tolist(), failures, strict=True):
            for name, reason in _told(failure):
                self.add(name, reason, place)

    def require_one(self, failures: np.ndarray) -> None:
        """Raises ValueError where there are places at which all candidates have failed.

        Unless too many are unreadable: the limit then ends the training, on all workers together.

        Args:
            failures: bytes, as in `count`, of such places alone.
        """
        met = self.names
        if not len(failures) or self.refusal(len(met), met):
            return
        names = [shown(name) for name, _ in _told(failures[0])]
        self.verdict = (
            "An image that cannot be read gives way to the next one that can. Received: "
            f"{len(names)} in a row that cannot, {', '.join(names[:4])}. Repair or remove them, or "
            "see that their disk is there."
        )
        raise ValueError(self.verdict)

    def add(self, name: str, reason: str, place: int) -> None:
        """Counts and logs an image that cannot be read where the order has it.

        Args:
            name: path, or place in the files of the dataset.
            reason: for the log.
            place: in the order of reading.
        """
        with self._lock:
            is_new = name not in self._first_places
            self._first_places[name] = min(place, self._first_places.get(name, place))
            if is_new:
                logging.warning(
                    "Unreadable image, %s: %s (%s)", self.fate, shown(name), shown(reason)
                )

    def refusal(self, count: int, names: Iterable[str]) -> str:
        """Says, with some of their names, that so many are too many; empty where they are not."""
        if count <= self.tolerated and count < self.total:
            return ""
        return (
            f"At most {self.limit:.1%} of the images may be unreadable. Received: "
            f"{count} of {self.images}, for example {', '.join(map(shown, sorted(names)[:3]))}. "
            "Repair or remove them, or raise --max_unreadable."
        )

    def check(self, place: int) -> None:
        """Raises ValueError when too many of the images before a place are unreadable."""
        names = self.met_before(place)
        if refusal := self.refusal(len(names), names):
            self.verdict = refusal
            raise ValueError(refusal)


@contextlib.contextmanager
def explaining(counters: list[Unreadable]) -> Iterator[None]:
    """Turns TensorFlow's error, where reading images caused it, into that of the reading.

    Args:
        counters: of all that is read inside; more may be added there.
    """
    try:
        yield
    except tf.errors.OpError as error:
        for counter in counters:
            if counter.verdict:
                raise ValueError(counter.verdict) from None
        # What Python has said, here or in a data service.
        for beginning in (crop_processes.MUST_LIVE, WORKERS_MUST):
            if said := re.search(f"{re.escape(beginning)}.*", str(error)):
                raise OSError(said[0]) from None
        if "Could not find callback with key=" in str(error):
            raise OSError(
                f"{WORKERS_MUST} be those of experiments/data_service.py. Received: one that does "
                "not know how to crop. Start others."
            ) from None
        raise


def decode_or_say(
    read: Callable[[bytes], bytes], max_pixels: int, source: bytes, name: bytes
) -> tuple[np.ndarray, bytes]:
    """Decodes an image, if it can be read.

    Args:
        read: source to encoded bytes; says why not by pixels.UnreadableImage.
        max_pixels: as in `pixels.decode`.
        source: what to read.
        name: of the image.

    Returns:
        uint8 [H, W, 3], upright, and nothing; or [0, 0, 3], and its failure, for
        `Unreadable.count`.
    """
    name = os.fsdecode(name)
    try:
        return pixels.decode(read(source), shown(name), max_pixels), b""
    except pixels.UnreadableImage as error:
        return np.zeros([0, 0, 3], np.uint8), _failure(name, error)


def crop_images(
    sources: np.ndarray,
    names: np.ndarray,
    are_paths: bool,
    wanted: np.ndarray,
    draws: np.ndarray,
    size: int,
    areas: np.ndarray,
    resizer: bytes,
    max_pixels: int,
) -> list[np.ndarray]:
    """Makes random crops of images in a process beside this one.

    Args:
        sources: bytes [n], paths, or encoded images.
        names: bytes [n], of the images.
        are_paths: which of the two.
        wanted: bool [n]; the others are not read.
        draws: float32 [n, V, 22], of `crops.crop_draws`.
        size, areas, resizer: of `python_crops.RandomCropsOfImage`; float64 [V, 2] the areas.
        max_pixels: as in `pixels.decode`.

    Returns:
        V times uint8 [n, S, S, 3], zeros where there is nothing to see; and bytes [n], the failures
        of images that cannot be read, for `Unreadable.count`.
    """
    size, areas, rows = int(size), tuple(map(tuple, areas.tolist())), np.flatnonzero(wanted)
    names = [os.fsdecode(names[row]) for row in rows]
    group = crop_processes.Group(
        [sources[row] for row in rows],
        bool(are_paths),
        [shown(name) for name in names],
        draws[rows],
        python_crops.RandomCropsOfImage(size, areas, resizer.decode()),
        [(size, size, 3)] * len(areas),
        [np.dtype(np.uint8)] * len(areas),
        int(max_pixels),
    )
    seen, reasons = crop_processes.look_at_in_process(group)
    if len(rows) < len(wanted):
        seen = [_in_rows(array, rows, len(wanted)) for array in seen]
    failures = np.full(len(wanted), b"", object)
    for i, reason in reasons.items():
        failures[rows[i]] = _failure(names[i], reason)
    return [*seen, failures]


def _in_rows(array, rows, count):
    """[count, ...], zeros but for `rows`, which are `array`'s."""
    whole = np.zeros((count, *array.shape[1:]), array.dtype)
    whole[rows] = array
    return whole


def _failure(name, reason):
    """One of those that `Unreadable.count` takes; no name holds a zero byte."""
    reason = str(reason).replace("\0", "").encode("utf-8", "backslashreplace")
    return os.fsencode(name) + b"\0" + reason + b"\0"


def _told(failures):
    """Names and reasons of failures, one after the other."""
    parts = failures.split(b"\0")
    names, reasons = map(os.fsdecode, parts[:-1:2]), (part.decode() for part in parts[1::2])
    return zip(names, reasons, strict=True)
