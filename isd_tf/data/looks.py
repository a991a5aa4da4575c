"""Looks: what is seen of an image, its random crops or its centre, and who decodes and crops.

Two decode and crop:

    Python               random crops of files and records, in processes of their own
    TensorFlow's graph   the same where Python has no resizer, centre crops, and arrays, a batch at
                         once; what it cannot decode, Python does
"""

import functools
from typing import NamedTuple

import joblib
import tensorflow as tf

from isd_tf.data.datasets import FileDataset
from isd_tf.data.decoding import (
    UNREADABLE_IN_SERVICE,
    decode_first_readable,
    look_at_first_readable,
)
from isd_tf.data.graph_decoder import decode, graph_formats
from isd_tf.data.pixels import read_file
from isd_tf.data.service import crops_in_service
from isd_tf.views import crops, python_crops

# What TFDS writes. Files of others that it passed on as they were are read too, in Python.
TFDS_FORMATS = ("JPEG", "PNG")
# Images that are decoded one after the other, as one element of a dataset.
GROUP = 16
# Who makes random crops.
RESIZER, GRAPH = "cykooz_resizer", "graph"


class RandomCrops(NamedTuple):
    """One random crop for each view, drawn from (seed of the view, place)."""

    size: int
    areas: tuple[tuple[float, float], ...]
    view_seeds: tuple[int, ...]

    @property
    def nothing(self):
        return tuple(tf.zeros([0, self.size, self.size, 3], tf.uint8) for _ in self.view_seeds)

    def seeds(self, places):
        """For each view int64 [n, 2] of places [n]."""
        # Places count images over the whole training, so that no two views share a seed.
        return [tf.stack([tf.zeros_like(places) + seed, places], 1) for seed in self.view_seeds]

    def draws(self, places):  # [n]
        return tf.stack([crops.crop_draws(seeds) for seeds in self.seeds(places)], 1)  # [n, V, 22]

    def __call__(self, images, draws):  # [n, H, W, 3], [n, V, 22]
        boxes = crops.crop_boxes(draws, images, self.areas)
        return tuple(crops.resize_boxes(images, boxes, self.size))


class CentreCrop(NamedTuple):
    """The evaluation view's crop."""

    size: int

    @property
    def nothing(self):
        return (tf.zeros([0, self.size, self.size, 3], tf.uint8),)

    def draws(self, places):
        return tf.zeros([tf.size(places), 0])  # There is nothing to draw.

    def __call__(self, images, draws):
        return (crops.centre_crops(images, self.size),)


class SizedCentreCrop(CentreCrop):
    """The evaluation view's crop, and beside it int32 [n, 2], width and height of the image."""

    @property
    def nothing(self):
        return *super().nothing, tf.zeros([0, 2], tf.int32)

    def __call__(self, images, draws):
        count, height, width = tf.unstack(tf.shape(images)[:3])
        sizes = tf.tile([[width, height]], [count, 1])
        return *super().__call__(images, draws), sizes


def random_crops_by() -> str:
    """Who makes random crops of files and records."""
    return RESIZER if python_crops.cykooz_resizer else GRAPH


def is_in_python(look):
    return isinstance(look, RandomCrops) and random_crops_by() == RESIZER


def calls_at_a_time(unreadable):
    """Groups that are looked at side by side."""
    return tf.data.AUTOTUNE if unreadable.in_service else cores()  # Of whichever machine does it.


@functools.cache  # One answer for all pipelines of a process.
def cores() -> int:
    """Processors that this process may use, by its affinity and its container's quota."""
    return joblib.cpu_count()


def look_at_images(look, places, candidates, dataset, attempts, unreadable):
    """What is seen of a few images.

    Args:
        look: what to see of an image.
        places: int64 [n], of the images in the order of reading.
        candidates: as in `look_at_first_readable`.
        dataset: of the images. A source is a path, if it is of files, or else the file itself.
        attempts, unreadable: as there. In a data service every image must be readable.

    Returns:
        For each view uint8 [n, S, S, 3], labels [n], bool [n]: whether any could be read, and
        whether all were read at once.
    """
    count = tf.size(places, tf.int64)
    if is_in_python(look):
        are_paths, draws = isinstance(dataset, FileDataset), look.draws(places)
        in_python = python_crops.RandomCropsOfImage(look.size, look.areas)
        if unreadable.in_service:
            sources, names, labels = candidates(tf.range(count), tf.constant(0, tf.int64))
            limit = unreadable.max_pixels
            seen = crops_in_service(sources, names, are_paths, draws, in_python, limit)
            return seen, labels, tf.fill([count], True), tf.constant(True)
        return look_at_first_readable(
            candidates, are_paths, in_python, look.nothing, attempts, unreadable, places, draws
        )
    look_at, each = ways_to_look(look, places, candidates, dataset, attempts, unreadable)
    # All at once, and if one fails, each in Python. A graph has no exceptions to catch; a dataset
    # of one batch, whose errors are ignored, has, but takes half as long as decoding an image.
    at_once = tf.data.Dataset.range(count).map(as_it_stands(look_at)).batch(count, True)
    nothing = tf.data.Dataset.from_tensors((look.nothing, tf.zeros([0], tf.int64)))
    readable = at_once.ignore_errors().concatenate(nothing).take(1)
    return unless_missed(look, *readable.get_single_element(), each)


def ways_to_look(look, places, candidates, dataset, attempts, unreadable):
    """Two functions, with the arguments of `look_at_images`.

    Returns:
        One by the graph, which fails where an image cannot be read: of a number, int64, the views
        [S, S, 3] of that image, and its label. One in Python: of nothing, for each view
        [n, S, S, 3], labels [n] and bool [n], whether any could be read.
    """
    draws = look.draws(places)
    is_file = isinstance(dataset, FileDataset)
    formats = graph_formats(dataset.paths) if is_file else TFDS_FORMATS
    numbers = tf.range(tf.size(places, tf.int64))
    sources, names, labels = candidates(numbers, tf.constant(0, tf.int64))

    def look_at(i):
        encoded = tf.io.read_file(sources[i]) if is_file else sources[i]
        image = decode(encoded, unreadable.max_pixels, formats)
        seen = look(image[tf.newaxis], draws[i][tf.newaxis])
        return tuple(x[0] for x in seen), labels[i]

    def look_at_readable(i):
        image, label = decode_first_readable(
            lambda attempt: [part[0] for part in candidates(i[tf.newaxis], attempt)],
            read_file if is_file else bytes,
            attempts,
            unreadable,
            places[i],
        )
        readable = tf.size(image) > 0
        seen = tf.cond(
            readable,
            lambda: look(image[tf.newaxis], draws[i][tf.newaxis]),
            lambda: tuple(tf.zeros([1, *x.shape[1:]], x.dtype) for x in look.nothing),
        )
        return tuple(x[0] for x in seen), label, readable

    def each():
        if unreadable.in_service:
            count = tf.size(numbers)
            message = [UNREADABLE_IN_SERVICE, names[0]]
            with tf.control_dependencies([tf.debugging.Assert(False, message)]):
                views = tuple(tf.zeros([count, *x.shape[1:]], x.dtype) for x in look.nothing)
                return views, tf.zeros([count], tf.int64), tf.fill([count], False)
        types = (tuple(x.dtype for x in look.nothing), tf.int64, tf.bool)
        return tf.map_fn(look_at_readable, numbers, fn_output_signature=types)

    return look_at, each


def unless_missed(look, seen, labels, each):
    """What the graph has seen of a group, or, where that is nothing, what `each` sees."""
    all_at_once = tf.size(labels) > 0
    seen, labels, readable = tf.cond(
        all_at_once, lambda: (seen, labels, tf.fill([tf.size(labels)], True)), each
    )
    pairs = zip(seen, look.nothing, strict=True)
    seen = tuple(tf.ensure_shape(x, [None, *empty.shape[1:]]) for x, empty in pairs)
    labels, readable = (tf.ensure_shape(x, [None]) for x in (labels, readable))
    return seen, labels, readable, all_at_once


def as_it_stands(function):
    """Keeps AutoGraph from searching a function's source for loops, which takes seconds."""
    return tf.autograph.experimental.do_not_convert(function)
