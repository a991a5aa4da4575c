"""Decoding in Python, and what happens to images that it cannot read.

They are counted and named in the log. In training the next candidate replaces each, so that no
later batch shifts; elsewhere they are left out.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from isd_tf.data import crop_processes, pixels
from isd_tf.data.folders import shown
from isd_tf.data.python_calls import call_python

# What a data service's worker says, in whose process nothing is counted, before the name.
UNREADABLE_IN_SERVICE = "With a data service every image must be readable. Received:"
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
        in_service: whether a data service reads, in whose processes nothing is counted: there the
            first one ends the training.
        whole: images that `limit` is a share of; None: `total`.
    """

    def __init__(
        self,
        total: int,
        limit: float,
        fate: str = LEFT_OUT,
        max_pixels: int = pixels.MAX_PIXELS,
        in_service: bool = False,
        whole: int | None = None,
    ):
        self.total = total
        self.tolerated = limit * (whole or total)
        self.images = f"{total}" + (f", a part of {whole}" if whole else "")
        self.limit = limit
        self.fate = fate
        self.max_pixels = max_pixels
        self.in_service = in_service
        self.verdict = ""  # What `check` has raised.
        self._first_places: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> set[str]:
        """All that were met so far, those that were read ahead too."""
        return set(self._first_places)

    @property
    def readable(self) -> int:
        """Images that are left, as far as they have been read."""
        return self.total - len(self._first_places)

    def met_before(self, place: int) -> list[str]:
        """Names of the unreadable images that stand before a place."""
        with self._lock:
            return [name for name, first in self._first_places.items() if first < place]

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
        in_service = re.search(rf"\[{UNREADABLE_IN_SERVICE}\] \[(.*)\]", str(error))
        if in_service:
            raise ValueError(_explain_unreadable_in_service(in_service[1])) from None
        # What Python has said, here or in a data service.
        for beginning, kind in (
            (crop_processes.MUST_LIVE, OSError),
            (WORKERS_MUST, OSError),
            (f"{UNREADABLE_IN_SERVICE} ", ValueError),
        ):
            if said := re.search(f"{re.escape(beginning)}.*", str(error)):
                raise kind(said[0]) from None
        if "Could not find callback with key=" in str(error):
            raise OSError(
                f"{WORKERS_MUST} be those of experiments/data_service.py. Received: one that does "
                "not know how to crop. Start others."
            ) from None
        raise


def _explain_unreadable_in_service(name):
    """A service's worker cannot say why. The trainer looks at the file, where it sees it."""
    reason = ""
    cure = "Repair or remove it, or train without --data_service, which counts and replaces it"
    if os.path.isfile(name):
        try:
            width, height = pixels.open_image(pixels.read_file(name), shown(name)).size
        except pixels.UnreadableImage as error:
            reason = f" ({error})"
        else:
            reason = f" ({width} x {height} pixels, which Pillow reads and a graph does not)"
            cure = (
                "Save it in another form (docs/folders.md tells what a graph reads), or train "
                "without --data_service, which reads it"
            )
    return f"{UNREADABLE_IN_SERVICE} {name}{reason}. {cure}."


def decode_readable(
    read: Callable[[bytes], bytes], unreadable: Unreadable, source: bytes, name: bytes, place: int
) -> np.ndarray | None:
    """Decodes an image in Python, which reads more than a graph; one that it cannot is counted.

    Args:
        read: source to encoded bytes; says why not by pixels.UnreadableImage.
        unreadable: where a failure is reported.
        source: what to read.
        name: of the image.
        place: where in the order of reading the image is wanted.

    Returns:
        uint8 [H, W, 3], upright; None where it cannot be read.
    """
    name = os.fsdecode(name)
    try:
        return pixels.decode(read(source), shown(name), unreadable.max_pixels)
    except pixels.UnreadableImage as error:
        unreadable.add(name, str(error), place)
        return None


def decode_first_readable(
    candidate: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]],
    read: Callable[[bytes], bytes],
    attempts: int,
    unreadable: Unreadable,
    place: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes the first of an image's candidates that can be read.

    Args:
        candidate: attempt number (int64 scalar) to (source, name, label): strings and an int64.
        read, unreadable: as in `decode_readable`.
        attempts: how many candidates there are.
        place: int64 scalar, where in the order of reading the image is wanted.

    Returns:
        The image, uint8 [H, W, 3], and its label; an empty image [0, 0, 3] if all failed.
    """

    def decode(source, name, place):
        image = decode_readable(read, unreadable, source, name, int(place))
        return np.zeros([0, 0, 3], np.uint8) if image is None else image

    def attempt(number):
        source, name, label = candidate(number)
        image = call_python(decode, [source, name, place], tf.uint8)
        return number + 1, tf.ensure_shape(image, [None, None, 3]), label

    attempts = _worth_trying(attempts, unreadable)
    _, image, label = tf.while_loop(
        lambda number, image, label: (tf.size(image) == 0) & (number < attempts),
        lambda number, image, label: attempt(number),
        (tf.constant(0, tf.int64), tf.zeros([0, 0, 3], tf.uint8), tf.constant(-1, tf.int64)),
        shape_invariants=(tf.TensorShape([]), tf.TensorShape([None, None, 3]), tf.TensorShape([])),
    )
    return image, label


def look_at_first_readable(
    candidates: Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]],
    are_paths: bool,
    look: Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray]],
    nothing: Sequence[tf.Tensor],
    attempts: int,
    unreadable: Unreadable,
    places: tf.Tensor,
    draws: tf.Tensor,
) -> tuple[tuple[tf.Tensor, ...], tf.Tensor, tf.Tensor, tf.Tensor]:
    """Looks, for each of n images, at the first of its candidates that can be read.

    Args:
        candidates: which of n images (int64 [m]) and the number of an attempt (int64 scalar) to
            sources, names and labels, each [m].
        are_paths: whether sources are paths, or encoded images.
        look: image and draws [...] to what is seen of it, V arrays; without TensorFlow, as
            `crop_processes` has it.
        nothing: V tensors [0, ...], of the types and shapes of what is seen.
        attempts: how many candidates each image has.
        unreadable: as in `decode_readable`.
        places: int64 [n], where in the order of reading the images are wanted.
        draws: [n, ...].

    Returns:
        V times [n, ...], zeros where no candidate could be read; the labels of those seen, int64
        [n]; bool [n], whether there is one; and whether all first candidates could be read.
    """

    of_each = tf.TensorShape([None])
    shapes = tuple(tf.TensorShape([None, *x.shape[1:]]) for x in nothing)
    types = tuple(x.dtype for x in nothing)
    images = tf.range(tf.size(places, tf.int64))
    of_image = [tuple(x.shape[1:]) for x in nothing], [x.dtype.as_numpy_dtype for x in nothing]
    max_pixels = unreadable.max_pixels

    def look_at_wanted(sources, names, places, draws, wanted):
        rows = np.flatnonzero(wanted)
        names = [os.fsdecode(names[row]) for row in rows]
        group = crop_processes.Group(
            [sources[row] for row in rows],
            are_paths,
            [shown(name) for name in names],
            draws[rows],
            look,
            *of_image,
            max_pixels,
        )
        found = np.zeros(len(places), bool)
        found[rows] = True
        seen, reasons = crop_processes.look_at_in_process(group)
        for i, reason in reasons.items():
            unreadable.add(names[i], reason, int(places[rows[i]]))
            found[rows[i]] = False
        if len(rows) < len(places):
            seen = [_in_rows(array, rows, len(places)) for array in seen]
        return *seen, found

    def attempt(number, wanted):
        sources, names, labels = candidates(images, number)
        inputs = [sources, names, places, draws, wanted]
        *seen, found = call_python(look_at_wanted, inputs, [*types, tf.bool])
        seen = tuple(map(tf.ensure_shape, seen, shapes))
        return seen, labels, tf.ensure_shape(found, of_each)

    def attempt_again(number, readable, known):
        seen, labels, found = attempt(number, ~readable)

        def newest(new, old):
            return tf.where(tf.reshape(found, [-1, *[1] * (old.shape.rank - 1)]), new, old)

        known = tf.nest.map_structure(newest, (seen, labels), known)
        return number + 1, readable | found, known

    attempts = _worth_trying(attempts, unreadable)
    seen, labels, found = attempt(tf.constant(0, tf.int64), tf.ones_like(places, tf.bool))
    all_at_once = tf.reduce_all(found)
    _, readable, (seen, labels) = tf.while_loop(
        lambda number, readable, known: ~tf.reduce_all(readable) & (number < attempts),
        attempt_again,
        (tf.constant(1, tf.int64), found, (seen, labels)),
        shape_invariants=(tf.TensorShape([]), of_each, (shapes, of_each)),
    )
    return seen, labels, readable, all_at_once


def _in_rows(array, rows, count):
    """[count, ...], zeros but for `rows`, which are `array`'s."""
    whole = np.zeros((count, *array.shape[1:]), array.dtype)
    whole[rows] = array
    return whole


def _worth_trying(attempts, unreadable):
    """With one more than may be unreadable the limit ends the reading.

    Of a million broken ones all would be tried, at each place.
    """
    return min(attempts, int(unreadable.tolerated) + 1)
