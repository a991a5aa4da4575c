"""Looks: what is seen of an image, its random crops or its centre, and who decodes and crops.

Two decode and crop:

    Python               random crops of files and records, in processes of their own
    TensorFlow's graph   centre crops of them (what it cannot decode, Python does), and all crops of
                         arrays, a batch at once
"""

import functools
from typing import NamedTuple

import joblib
import numpy as np
import tensorflow as tf

from isd_tf.data.datasets import FileDataset
from isd_tf.data.decoding import crop_images, decode_or_say
from isd_tf.data.graph_decoder import decode, graph_formats
from isd_tf.data.pixels import read_file
from isd_tf.data.python_calls import call_python
from isd_tf.data.service import crops_in_service
from isd_tf.views import crops, python_crops

# What TFDS writes. Files of others that it passed on as they were are read too, in Python.
TFDS_FORMATS = ("JPEG", "PNG")
# Images that are decoded one after the other, as one element of a dataset.
GROUP = 16


class RandomCrops(NamedTuple):
    """One random crop for each view, drawn from (seed of the view, place)."""

    size: int
    areas: tuple[tuple[float, float], ...]
    view_seeds: tuple[int, ...]
    in_service: bool = False  # Whether a data service's workers make them.

    def seeds(self, places):
        """For each view int64 [n, 2] of places [n]."""
        # Places count images over the whole training, so that no two views share a seed.
        return [tf.stack([tf.zeros_like(places) + seed, places], 1) for seed in self.view_seeds]

    def draws(self, places):  # [n]
        return tf.stack([crops.crop_draws(seeds) for seeds in self.seeds(places)], 1)  # [n, V, 22]

    def __call__(self, images, places):  # [n, H, W, 3], [n]
        boxes = crops.crop_boxes(self.draws(places), images, self.areas)
        return tuple(crops.resize_boxes(images, boxes, self.size))


class CentreCrop(NamedTuple):
    """The evaluation view's crop."""

    size: int

    @property
    def nothing(self):
        return (tf.zeros([0, self.size, self.size, 3], tf.uint8),)

    def __call__(self, images, places=None):  # [n, H, W, 3]
        return (crops.centre_crops(images, self.size),)


class SizedCentreCrop(CentreCrop):
    """The evaluation view's crop, and beside it int32 [n, 2], width and height of the image."""

    @property
    def nothing(self):
        return *super().nothing, tf.zeros([0, 2], tf.int32)

    def __call__(self, images, places=None):
        count, height, width = tf.unstack(tf.shape(images)[:3])
        return *super().__call__(images), tf.tile([[width, height]], [count, 1])


@functools.cache  # One answer for all pipelines of a process.
def cores() -> int:
    """Processors that this process may use, by its affinity and its container's quota."""
    return joblib.cpu_count()


def calls_at_a_time(look: RandomCrops) -> int:
    """Groups that are looked at side by side in a training."""
    return tf.data.AUTOTUNE if look.in_service else cores()  # Of whichever machine does it.


def look_at_images(look, places, candidates, dataset, attempts, max_pixels):
    """What is seen of a few images.

    Args:
        look: what to see of an image.
        places: int64 [n], of the images in the order of reading.
        candidates: number of an attempt, from 0, to sources, names and labels, each [n].
        dataset: of the images. A source is a path, if it is of files, or else the file itself.
        attempts: how many candidates each image has; for a centre crop one.
        max_pixels: an image of more, width times height, cannot be read.

    Returns:
        Failures, string [n], of the candidates that cannot be read; bool [n], whether one can be;
        for each view uint8 [n, S, S, 3], zeros where none can; and labels, int64 [n].
    """
    if isinstance(look, RandomCrops):
        are_paths = isinstance(dataset, FileDataset)
        return _crop_first_readable(look, places, candidates, are_paths, attempts, max_pixels)
    count = tf.size(places, tf.int64)
    sources, names, labels = candidates(0)
    look_at, each = ways_to_look(look, sources, names, dataset, max_pixels)
    # All at once, and if one fails, each in Python. A graph has no exceptions to catch; a dataset
    # of one batch, whose errors are ignored, has, but takes half as long as decoding an image.
    at_once = tf.data.Dataset.range(count).map(as_it_stands(look_at)).batch(count, True)
    nothing = tf.data.Dataset.from_tensors(look.nothing)
    readable = at_once.ignore_errors().concatenate(nothing).take(1)
    failures, seen = unless_missed(look, readable.get_single_element(), each)
    return failures, failures == "", seen, labels


def _crop_first_readable(look, places, candidates, are_paths, attempts, max_pixels):
    """`look_at_images` in Python: of each image, crops of the first candidate that can be read."""
    areas, resizer = np.float64(look.areas), python_crops.fastest_resizer()
    how = [look.draws(places), look.size, areas, resizer, np.int64(max_pixels)]
    views = len(areas)
    types = [tf.uint8] * views + [tf.string]
    of_each, of_view = tf.TensorShape([None]), tf.TensorShape([None, look.size, look.size, 3])
    call = crops_in_service if look.in_service else functools.partial(call_python, crop_images)

    def attempt(number, wanted):
        sources, names, labels = candidates(number)
        outputs = call([sources, names, are_paths, wanted, *how], types)
        *seen, failures = map(tf.ensure_shape, outputs, [*[of_view] * views, of_each])
        return failures, wanted & (failures == ""), tuple(seen), labels

    def attempt_again(number, failures, readable, seen, labels):
        more_failures, found, *newest = attempt(number, ~readable)

        def newest_of(new, old):
            return tf.where(tf.reshape(found, [-1, *[1] * (old.shape.rank - 1)]), new, old)

        seen, labels = tf.nest.map_structure(newest_of, tuple(newest), (seen, labels))
        return number + 1, failures + more_failures, readable | found, seen, labels

    first = attempt(tf.constant(0, tf.int64), tf.ones_like(places, tf.bool))
    _, *result = tf.while_loop(
        lambda number, failures, readable, *_: ~tf.reduce_all(readable) & (number < attempts),
        attempt_again,
        (tf.constant(1, tf.int64), *first),
        shape_invariants=(tf.TensorShape([]), of_each, of_each, (of_view,) * views, of_each),
    )
    return result


def ways_to_look(look, sources, names, dataset, max_pixels):
    """Two functions that look at images by their sources.

    Returns:
        One by the graph, which fails where an image cannot be read: of a number, int64, what is
        seen of that image. One in Python: of nothing, failures [n] and what is seen of all.
    """
    is_file = isinstance(dataset, FileDataset)
    formats = graph_formats(dataset.paths) if is_file else TFDS_FORMATS
    read = read_file if is_file else bytes

    def crop(image):
        return tuple(x[0] for x in look(image[tf.newaxis]))

    def look_at(i):
        encoded = tf.io.read_file(sources[i]) if is_file else sources[i]
        return crop(decode(encoded, max_pixels, formats))

    def look_at_readable(source_and_name):
        decode_here = functools.partial(decode_or_say, read, max_pixels)
        image, failure = call_python(decode_here, source_and_name, [tf.uint8, tf.string])
        image, failure = tf.ensure_shape(image, [None, None, 3]), tf.ensure_shape(failure, [])
        nothing = tuple(tf.zeros(x.shape[1:], x.dtype) for x in look.nothing)
        return failure, tf.cond(failure == "", lambda: crop(image), lambda: nothing)

    def each():
        types = tf.string, tuple(x.dtype for x in look.nothing)
        return tf.map_fn(look_at_readable, (sources, names), fn_output_signature=types)

    return look_at, each


def unless_missed(look, seen, each):
    """What the graph has seen of a group, or, where that is nothing, what `each` sees."""
    count = tf.shape(seen[0])[0]
    failures, seen = tf.cond(count > 0, lambda: (tf.fill([count], ""), seen), each)
    pairs = zip(seen, look.nothing, strict=True)
    seen = tuple(tf.ensure_shape(x, [None, *empty.shape[1:]]) for x, empty in pairs)
    return tf.ensure_shape(failures, [None]), seen


def as_it_stands(function):
    """Keeps AutoGraph from searching a function's source for loops, which takes seconds."""
    return tf.autograph.experimental.do_not_convert(function)
