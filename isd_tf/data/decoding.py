"""What happens to images that TensorFlow's graph cannot decode, and to those that nobody can.

Pillow has a second try (it reads forms that the graph refuses); what it cannot read is replaced by
the next candidate, counted and named in the log, so that no later batch shifts.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator

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

    Args:
        total: images in the dataset.
        limit: largest share of `total` that may be unreadable.
        fate: what becomes of them, for the log: REPLACED or LEFT_OUT.
        max_pixels: an image of more, width times height, counts as unreadable.
        in_service: whether a data service reads, in whose processes nothing can be counted: there
            the first one ends the training.
    """

    def __init__(
        self,
        total: int,
        limit: float,
        fate: str = LEFT_OUT,
        max_pixels: int = pixels.MAX_PIXELS,
        in_service: bool = False,
    ):
        self.total = total
        self.limit = limit
        self.fate = fate
        self.max_pixels = max_pixels
        self.in_service = in_service
        self.names: set[str] = set()
        self._lock = threading.Lock()

    @property
    def readable(self) -> int:
        """Images that are left, as far as they have been read."""
        return self.total - len(self.names)

    def add(self, name: str, reason: str) -> None:
        """Counts and logs an unreadable image; raises ValueError when they are too many."""
        with self._lock:
            if name not in self.names:
                self.names.add(name)
                logging.warning(
                    "Unreadable image, %s: %s (%s)", self.fate, shown(name), shown(reason)
                )
        self.check()

    def check(self) -> None:
        """Raises ValueError when more than the allowed share of the images is unreadable."""
        count = len(self.names)
        if count > self.limit * self.total or count == self.total:
            some = ", ".join(map(shown, sorted(self.names)[:3]))
            raise ValueError(
                f"At most {self.limit:.1%} of the images may be unreadable. Received: "
                f"{count} of {self.total}, for example {some}. "
                "Repair or remove them, or raise --max_unreadable."
            )


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
            counter.check()
        in_service = re.search(rf"\[{UNREADABLE_IN_SERVICE}\] \[(.*)\]", str(error))
        if in_service:
            raise ValueError(
                f"{UNREADABLE_IN_SERVICE} {in_service[1]}. Repair or remove it, or train without "
                "--data_service, which counts and replaces such images."
            ) from None
        raise


def open_first_readable(
    candidate: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]],
    read: Callable[[bytes], bytes],
    attempts: int,
    unreadable: Unreadable,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Opens the first candidate that can be read by Pillow, which reads more than a graph does.

    Args:
        candidate: attempt number (int64 scalar) to (source, name, label): strings and an int64.
        read: source to encoded bytes; says why not by pixels.UnreadableImage.
        attempts: how many candidates there are.
        unreadable: where failures are reported.

    Returns:
        The image, uint8 [H, W, 3], and its label; an empty image [0, 0, 3] if all failed.
    """

    def open_or_report(source, name):
        name = os.fsdecode(name)
        try:
            encoded = read(source)
            return np.asarray(pixels.open_image(encoded, shown(name), unreadable.max_pixels))
        except pixels.UnreadableImage as error:
            unreadable.add(name, str(error))
            return np.zeros([0, 0, 3], np.uint8)

    def attempt(number):
        source, name, label = candidate(number)
        image = tf.numpy_function(open_or_report, [source, name], tf.uint8, stateful=True)
        return number + 1, tf.ensure_shape(image, [None, None, 3]), label

    _, image, label = tf.while_loop(
        lambda number, image, label: (tf.size(image) == 0) & (number < attempts),
        lambda number, image, label: attempt(number),
        (tf.constant(0, tf.int64), tf.zeros([0, 0, 3], tf.uint8), tf.constant(-1, tf.int64)),
        shape_invariants=(tf.TensorShape([]), tf.TensorShape([None, None, 3]), tf.TensorShape([])),
    )
    return image, label
