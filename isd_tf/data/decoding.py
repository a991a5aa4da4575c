"""Encoded images to pixels, and what happens to those that cannot be read.

Decoding runs in TensorFlow's graph. Where it fails, Pillow has a second try (it reads a few rare
forms that TensorFlow does not); what neither can read is replaced by the next candidate, counted
and named in the log, so that no later batch shifts.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from isd_tf.data.pixels import decode, open_image

# What a data service's worker says, in whose process nothing can be counted, before the name.
UNREADABLE_IN_SERVICE = "With a data service every image must be readable. Received:"


class Unreadable:
    """The unreadable images of a dataset: counted once each, named in the log, limited.

    Args:
        total: images in the dataset.
        limit: largest share of `total` that may be unreadable.
    """

    def __init__(self, total: int, limit: float):
        self.total = total
        self.limit = limit
        self.names: set[str] = set()
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Counts and logs an unreadable image; raises ValueError when they are too many."""
        with self._lock:
            if name not in self.names:
                self.names.add(name)
                logging.warning("Unreadable image, replaced by the next one: %s (%s)", name, reason)
        self.check()

    def check(self) -> None:
        """Raises ValueError when more than the allowed share of the images is unreadable."""
        count = len(self.names)
        if count > self.limit * self.total or count == self.total:
            some = ", ".join(sorted(self.names)[:3])
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


def decode_first_readable(
    candidate: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]],
    read: Callable[[tf.Tensor], tf.Tensor],
    attempts: int,
    unreadable: Unreadable | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes the first candidate that can be read.

    Args:
        candidate: attempt number (int64 scalar) to (source, name, label): strings and an int64.
        read: source to encoded bytes; may fail, as decoding may.
        attempts: how many candidates there are.
        unreadable: where failures are reported; None where this runs in another process, which
            can only fail at the first.

    Returns:
        The image, uint8 [H, W, 3], and its label; an empty image [0, 0, 3] if all failed.
    """
    if unreadable is None:
        source, name, label = candidate(tf.constant(0, tf.int64))
        image = _decode_or_empty(source, read)
        message = [UNREADABLE_IN_SERVICE, name]
        with tf.control_dependencies([tf.debugging.Assert(tf.size(image) > 0, message)]):
            return tf.identity(image), label

    def attempt(number):
        source, name, label = candidate(number)
        image = _decode_or_empty(source, read)
        image = tf.cond(
            tf.size(image) > 0,
            lambda: image,
            lambda: _decode_by_pillow(source, read, name, unreadable),
        )
        return number + 1, image, label

    # The first attempt stands outside the loop: almost always it is the only one.
    state = attempt(tf.constant(0, tf.int64))
    _, image, label = tf.while_loop(
        lambda number, image, label: (tf.size(image) == 0) & (number < attempts),
        lambda number, image, label: attempt(number),
        state,
        shape_invariants=(tf.TensorShape([]), tf.TensorShape([None, None, 3]), tf.TensorShape([])),
    )
    return image, label


def _decode_or_empty(source, read):
    # A graph has no exceptions to catch; a dataset of one element, whose errors are ignored, has.
    image = tf.data.Dataset.from_tensors(source).map(lambda x: decode(read(x))).ignore_errors()
    empty = tf.data.Dataset.from_tensors(tf.zeros([0, 0, 3], tf.uint8))
    return image.concatenate(empty).take(1).get_single_element()


def _decode_by_pillow(source, read, name, unreadable):
    def decode_or_report(source, name):
        try:
            return np.asarray(open_image(read(tf.constant(source)).numpy()))
        except Exception as error:  # Pillow's plugins raise whatever they meet in broken files.
            unreadable.add(name.decode(errors="replace"), str(error) or type(error).__name__)
            return np.zeros([0, 0, 3], np.uint8)

    image = tf.numpy_function(decode_or_report, [source, name], tf.uint8, stateful=True)
    return tf.ensure_shape(image, [None, None, 3])
