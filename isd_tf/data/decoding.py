"""What happens to images that TensorFlow's graph cannot decode, and to those that nobody can.

Pillow has a second try (it reads forms that the graph refuses); what it cannot read is replaced by
the next candidate, counted and named in the log, so that no later batch shifts.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from isd_tf.data import pixels
from isd_tf.data.folders import shown

# What a data service's worker says, in whose process nothing can be counted, before the name.
UNREADABLE_IN_SERVICE = "With a data service every image must be readable. Received:"
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
        in_service: whether a data service reads, in whose processes nothing can be counted: there
            the first one ends the training.
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
    """Turns TensorFlow's error, where too many unreadable images caused it, into `check`'s.

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


def open_first_readable(
    candidate: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]],
    read: Callable[[bytes], bytes],
    attempts: int,
    unreadable: Unreadable,
    place: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Opens the first candidate that can be read by Pillow, which reads more than a graph does.

    Args:
        candidate: attempt number (int64 scalar) to (source, name, label): strings and an int64.
        read: source to encoded bytes; says why not by pixels.UnreadableImage.
        attempts: how many candidates there are.
        unreadable: where failures are reported.
        place: int64 scalar, where in the order of reading an image is wanted.

    Returns:
        The image, uint8 [H, W, 3], and its label; an empty image [0, 0, 3] if all failed.
    """

    def open_or_report(source, name, place):
        name = os.fsdecode(name)
        try:
            encoded = read(source)
            image = pixels.open_image(encoded, shown(name), unreadable.max_pixels)
            del encoded
            return pixels.as_array(image)
        except pixels.UnreadableImage as error:
            unreadable.add(name, str(error), int(place))
            return np.zeros([0, 0, 3], np.uint8)

    def attempt(number):
        source, name, label = candidate(number)
        image = tf.numpy_function(open_or_report, [source, name, place], tf.uint8, stateful=True)
        return number + 1, tf.ensure_shape(image, [None, None, 3]), label

    # With one more than may be unreadable the limit ends the reading here. Of a million broken ones
    # all would be tried, at each place.
    attempts = min(attempts, int(unreadable.tolerated) + 1)
    _, image, label = tf.while_loop(
        lambda number, image, label: (tf.size(image) == 0) & (number < attempts),
        lambda number, image, label: attempt(number),
        (tf.constant(0, tf.int64), tf.zeros([0, 0, 3], tf.uint8), tf.constant(-1, tf.int64)),
        shape_invariants=(tf.TensorShape([]), tf.TensorShape([None, None, 3]), tf.TensorShape([])),
    )
    return image, label
