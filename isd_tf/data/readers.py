"""Readers: what a batch needs of arrays, files and records, image by image, in which order.

Each kind of dataset has a reader, which decodes its images and cuts the crops out of them, in the
order of the training or in the dataset's own. `batches` makes batches of that. There are two ways:

    Pillow               random crops of files and records, on hosts with few cores
    TensorFlow's graph   the same on others and in a data service, centre crops, and arrays, a batch
                         at once; what it cannot decode, Pillow does
"""

import functools
import os
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from isd_tf.data.datasets import ArrayDataset, FileDataset, RecordDataset
from isd_tf.data.decoding import (
    UNREADABLE_IN_SERVICE,
    Unreadable,
    decode_first_readable,
    look_at_first_readable,
)
from isd_tf.data.graph_decoder import decode, graph_formats
from isd_tf.data.pixels import read_file
from isd_tf.data.python_calls import call_python
from isd_tf.views import crops, pillow_crops

# Shards read side by side, and undecoded records among which a stream is shuffled.
STREAM_SHARDS = 16
STREAM_BUFFER = 8192
# An unreadable record of a stream gives way to the readable one among so many that follow.
STREAM_CANDIDATES = 4
# What TFDS writes. Files of others that it passed on as they were are read too, by Pillow.
TFDS_FORMATS = ("JPEG", "PNG")
# Images that are decoded one after the other, as one element of a dataset.
GROUP = 16
# Pillow makes a pair of crops in two thirds of the graph's time. But for a tenth of it or more it
# holds Python's lock, which one thread has at a time, and the training needs too: from about so
# many cores on the graph should be faster, by reckoning. It was measured on two cores alone.
GRAPH_CORES = 8


# --------------------------------------------------------------------- what is seen of an image


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

    def by_pillow(self, image, draws):  # [V, 22]
        views = zip(draws.tolist(), self.areas, strict=True)
        boxes = [pillow_crops.crop_box(own, image.height, image.width, area) for own, area in views]
        return [pillow_crops.resize_box(image, box, self.size) for box in boxes]


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


def in_own_order(dataset, look, unreadable, batch_size):
    """What is seen of a dataset's images in its own order, those that cannot be read left out.

    Returns a dataset of (numbers [n], for each view [n, S, S, 3], labels [n]).
    """
    unreadable = unreadable or Unreadable(len(dataset), 0.0)
    if isinstance(dataset, ArrayDataset):
        with tf.device("CPU:0"):  # Where a GPU is, its memory is for the networks.
            all_images, all_labels = tf.constant(dataset.images), tf.constant(_labels(dataset))

        def look_at_batch(first):
            numbers = tf.range(first, tf.minimum(first + batch_size, len(dataset)))
            seen = look(all_images[first : first + batch_size], look.draws(numbers))
            return numbers, seen, all_labels[first : first + batch_size]

        firsts = tf.data.Dataset.range(0, len(dataset), batch_size)
        return mapped(firsts, look_at_batch)

    def leave_out(numbers, seen, labels, readable):
        return tf.nest.map_structure(
            lambda values: tf.boolean_mask(values, readable), (numbers, seen, labels)
        )

    in_groups = _file_groups if isinstance(dataset, FileDataset) else _record_groups
    groups = in_groups(dataset, look, unreadable)
    return mapped(_ended_beyond_limit(groups, unreadable), leave_out)


def _record_groups(dataset, look, unreadable):
    records = tf.data.Dataset.from_tensor_slices(dataset.shards).flat_map(dataset.read_shard)
    sources = mapped(records, functools.partial(_source_of_record, dataset))

    def look_at_group(numbers, group):  # [n], three of [n]
        def candidates(which, attempt):
            return [tf.gather(part, which) for part in group]

        return numbers, *_look_at_group(look, numbers, candidates, dataset, 1, unreadable)

    groups = sources.enumerate().batch(GROUP)
    return groups.map(as_it_stands(look_at_group), _calls_at_a_time(look, unreadable))


def _file_groups(dataset, look, unreadable):
    paths, labels = tf.constant(_paths(dataset)), tf.constant(_labels(dataset))
    groups = -(-len(dataset) // GROUP)

    def of_group(group):
        numbers = tf.range(GROUP * group, tf.minimum(GROUP * (group + 1), len(dataset)))

        def candidates(which, attempt):
            own = tf.gather(numbers, which)
            return tf.gather(paths, own), tf.gather(paths, own), tf.gather(labels, own)

        return numbers, candidates

    if _is_for_pillow(look, unreadable):

        def look_at_group(group):
            numbers, candidates = of_group(group)
            return numbers, *_look_at_group(look, numbers, candidates, dataset, 1, unreadable)

        calls = _calls_at_a_time(look, unreadable)
        return tf.data.Dataset.range(groups).map(as_it_stands(look_at_group), calls)
    return _file_groups_by_graph(dataset, look, unreadable, groups, of_group)


def _file_groups_by_graph(dataset, look, unreadable, groups, of_group):
    """The graph looks at all groups. In which one fails, that is missed, and looked at by Pillow.

    As `_look_at_group` does it, but there is an outer dataset for all groups here instead of an
    inner one for each, which TensorFlow does not optimise: it takes twice the time.
    """
    nothing = look.nothing, tf.zeros([0], tf.int64)
    types = tf.nest.map_structure(lambda x: x.dtype, nothing)

    def ways_to_look(group):
        numbers, candidates = of_group(group)
        return numbers, *_ways_to_look(look, numbers, candidates, dataset, 1, unreadable)

    def look_at_once(group):
        numbers, look_at, _ = ways_to_look(group)
        places = tf.range(tf.size(numbers, tf.int64))
        return group, tf.map_fn(look_at, places, fn_output_signature=types, parallel_iterations=1)

    def look_at_missed(group, seen_at_once):
        numbers, _, each = ways_to_look(group)
        return numbers, *_unless_missed(look, *seen_at_once, each)

    def count(expected, found):
        group, _ = found
        return group + 1, (expected, *found)

    def with_missed_before(expected, group, seen):
        missed = tf.data.Dataset.range(expected, group).map(as_it_stands(lambda g: (g, nothing)))
        return missed.concatenate(tf.data.Dataset.from_tensors((group, seen)))

    of_graph = mapped(tf.data.Dataset.range(groups), look_at_once).ignore_errors()
    if not graph_formats(dataset.paths):
        of_graph = of_graph.take(0)
    end = tf.data.Dataset.from_tensors((tf.constant(groups, tf.int64), nothing))
    counted = of_graph.concatenate(end).scan(tf.constant(0, tf.int64), as_it_stands(count))
    all_groups = counted.flat_map(as_it_stands(with_missed_before)).take(groups)
    return mapped(all_groups, look_at_missed)


def _group_size(unreadable):
    """Images that are looked at together; in a data service one, to name the unreadable one."""
    return 1 if unreadable.in_service else GROUP


def random_crops_by(in_service: bool = False) -> str:
    """Who makes random crops of files and records, here or in a data service: Pillow or graph."""
    return "Pillow" if _cores() < GRAPH_CORES and not in_service else "graph"


def _is_for_pillow(look, unreadable):
    return isinstance(look, RandomCrops) and random_crops_by(unreadable.in_service) == "Pillow"


def _calls_at_a_time(look, unreadable):
    """Groups that are looked at side by side."""
    # A number that TensorFlow chooses could grow while the program ends (see `python_calls`).
    return _cores() if _is_for_pillow(look, unreadable) else tf.data.AUTOTUNE


@functools.cache  # One answer for all pipelines of a process.
def _cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ended_beyond_limit(groups, unreadable):
    """Ends the reading at the first group up to which too many images could not be read.

    In the order of the groups, whichever of them were read first. (Only where one could not be
    read, as Python is slow, and waited for where an iterator is given up.)
    """

    def check(place):
        unreadable.check(int(place))
        return place

    def in_order(places, seen, labels, readable, all_at_once):
        last = places[-1] + 1
        checked = tf.cond(all_at_once, lambda: last, lambda: call_python(check, [last], tf.int64))
        with tf.control_dependencies([checked]):
            return tf.nest.map_structure(tf.identity, (places, seen, labels, readable))

    return groups.map(as_it_stands(in_order))


def _look_at_group(look, places, candidates, dataset, attempts, unreadable):
    """What is seen of a few images.

    Args:
        look: what to see of an image.
        places: int64 [n], of the images in the order of reading.
        candidates: as in `look_at_first_readable`.
        dataset: of the images. A source is a path, if it is of files, or else the file itself.
        attempts, unreadable: as there. A data service's workers have no Python: every image must be
            readable then.

    Returns:
        For each view uint8 [n, S, S, 3], labels [n], bool [n]: whether any could be read, and
        whether all were read at once.
    """
    if _is_for_pillow(look, unreadable):
        draws, read = look.draws(places), _read(dataset)
        return look_at_first_readable(
            candidates, read, look.by_pillow, look.nothing, attempts, unreadable, places, draws
        )
    look_at, each = _ways_to_look(look, places, candidates, dataset, attempts, unreadable)
    count = tf.size(places, tf.int64)
    # All at once, and if one fails, each by Pillow. A graph has no exceptions to catch; a dataset
    # of one batch, whose errors are ignored, has, but takes half as long as decoding an image.
    at_once = tf.data.Dataset.range(count).map(as_it_stands(look_at)).batch(count, True)
    nothing = tf.data.Dataset.from_tensors((look.nothing, tf.zeros([0], tf.int64)))
    readable = at_once.ignore_errors().concatenate(nothing).take(1)
    return _unless_missed(look, *readable.get_single_element(), each)


def _unless_missed(look, seen, labels, each):
    """What the graph has seen of a group, or, where that is nothing, what `each` sees."""
    all_at_once = tf.size(labels) > 0
    seen, labels, readable = tf.cond(
        all_at_once, lambda: (seen, labels, tf.fill([tf.size(labels)], True)), each
    )
    pairs = zip(seen, look.nothing, strict=True)
    seen = tuple(tf.ensure_shape(x, [None, *empty.shape[1:]]) for x, empty in pairs)
    labels, readable = (tf.ensure_shape(x, [None]) for x in (labels, readable))
    return seen, labels, readable, all_at_once


def _ways_to_look(look, places, candidates, dataset, attempts, unreadable):
    """Two functions, with the arguments of `_look_at_group`.

    Returns:
        One by the graph, which fails where an image cannot be read: of a number, int64, the views
        [S, S, 3] of that image, and its label. One by Pillow: of nothing, for each view
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
            _read(dataset),
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


def _read(dataset):
    """What makes a source's encoded bytes; a record is them."""
    return read_file if isinstance(dataset, FileDataset) else bytes


# ---------------------------------------------------------------- images in the order of training
# Each reader returns an endless dataset of (places [n], for each view [n, S, S, 3], labels [n]),
# this worker's.


class Order(NamedTuple):
    """Which places of the training belong to this worker: in every batch, its part of the rows.

    Places count images over the whole training. An epoch has `images_per_epoch` of them: a multiple
    of the batch, or with `keep_remainder`, for a single worker, the whole dataset.
    """

    dataset_size: int
    global_batch_size: int
    seed: int
    first_step: int = 0
    last_step: int = tf.int64.max
    workers: int = 1
    worker: int = 0
    keep_remainder: bool = False

    @property
    def rows(self):
        return self.global_batch_size // self.workers

    @property
    def steps_per_epoch(self):
        whole, remainder = divmod(self.dataset_size, self.global_batch_size)
        return whole + (self.keep_remainder and remainder > 0)

    @property
    def images_per_epoch(self):
        images = self.steps_per_epoch * self.global_batch_size
        return min(images, self.dataset_size) if self.keep_remainder else images

    @property
    def steps(self):
        return tf.data.Dataset.range(self.first_step, self.last_step)

    @property
    def epochs(self):
        last = (self.last_step - 1) // self.steps_per_epoch + 1
        return tf.data.Dataset.range(self.first_step // self.steps_per_epoch, last)

    def places(self, step):
        epoch, step_in_epoch = step // self.steps_per_epoch, step % self.steps_per_epoch
        first = step_in_epoch * self.global_batch_size + self.worker * self.rows
        places = first + tf.range(self.rows, dtype=tf.int64)
        if self.keep_remainder:
            places = places[: self.images_per_epoch - first]
        return epoch * self.images_per_epoch + places

    def images_at(self, places, attempt=0):
        """Which images stand at places of one epoch, or `attempt` places further on in it."""
        epoch = tf.reshape(places, [-1])[0] // self.images_per_epoch
        places_in_epoch = (places % self.images_per_epoch + attempt) % self.dataset_size
        return permuted(places_in_epoch, epoch, self.dataset_size, self.seed)

    def is_own(self, place):
        return place % self.global_batch_size // self.rows == self.worker


def permuted(places: tf.Tensor, epoch: tf.Tensor, count: int, seed: int) -> tf.Tensor:
    """Returns which images stand at `places` (int64, below `count`) of an epoch's permutation."""
    key = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
    return tf.random.experimental.index_shuffle(places, key, count - 1)


def _array_batches(dataset, order, look, unreadable):
    del unreadable  # Arrays are decoded.
    with tf.device("CPU:0"):  # Where a GPU is, its memory is for the networks.
        all_images, all_labels = tf.constant(dataset.images), tf.constant(_labels(dataset))

    def look_at_batch(step):
        places = order.places(step)
        rows = order.images_at(places)
        seen = look(tf.gather(all_images, rows), look.draws(places))
        return places, seen, tf.gather(all_labels, rows)

    return mapped(order.steps, look_at_batch)


def _file_images(dataset, order, look, unreadable):
    paths, labels = tf.constant(_paths(dataset)), tf.constant(_labels(dataset))

    def places_of(step):
        return tf.data.Dataset.from_tensor_slices(order.places(step)).batch(_group_size(unreadable))

    def look_at_group(places):  # [n]
        def candidates(which, attempt):
            # What cannot be read gives way to the next image in the epoch's order.
            rows = order.images_at(tf.gather(places, which), attempt)
            return tf.gather(paths, rows), tf.gather(paths, rows), tf.gather(labels, rows)

        count = len(dataset)
        return places, *_look_at_group(look, places, candidates, dataset, count, unreadable)

    calls = _calls_at_a_time(look, unreadable)
    groups = order.steps.flat_map(places_of).map(as_it_stands(look_at_group), calls)
    # Where none can be read, the limit ends the training.
    return _in_training(groups, order, unreadable).map(as_it_stands(lambda *group: group[:3]))


def _record_images(dataset, order, look, unreadable):
    images_per_epoch = order.images_per_epoch
    first_epoch, first_step_in_epoch = divmod(order.first_step, order.steps_per_epoch)
    skipped = first_step_in_epoch * order.global_batch_size
    all_shards = [tf.constant(values) for values in dataset.shards]

    def epoch_of_records(epoch):
        key = tf.stack([tf.constant(order.seed, tf.int64), epoch])
        permutation = tf.random.experimental.stateless_shuffle(tf.range(len(dataset.files)), key)
        shards = tuple(tf.gather(values, permutation) for values in all_shards)
        in_shards = tf.data.Dataset.from_tensor_slices(shards).interleave(
            dataset.read_shard, cycle_length=STREAM_SHARDS, num_parallel_calls=tf.data.AUTOTUNE
        )
        # `shuffle` would mix the program's global seed in. This sets that of this function's graph
        # alone; 0 would make it fail, as it compares both seeds with 0 in Python.
        tf.compat.v1.set_random_seed(1)
        # One key a (seed, epoch): a training has fewer than a million epochs.
        shuffled = in_shards.shuffle(
            STREAM_BUFFER, seed=order.seed * 1_000_000 + epoch, reshuffle_each_iteration=False
        )
        # Each record with those that would replace it; the last ones are followed by some again.
        extended = shuffled.concatenate(in_shards.repeat().take(STREAM_CANDIDATES - 1))
        windows = extended.window(STREAM_CANDIDATES, shift=1, drop_remainder=True)
        windows = windows.flat_map(
            lambda *parts: tf.data.Dataset.zip(*(part.batch(STREAM_CANDIDATES) for part in parts))
        )
        images = windows.take(images_per_epoch).enumerate(epoch * images_per_epoch)
        # Here, not once for all epochs: each of a data service's workers begins with another.
        return images.skip(skipped * tf.cast(epoch == first_epoch, tf.int64))

    def look_at_group(places, group):  # [n], three of [n, STREAM_CANDIDATES]
        def candidates(which, attempt):
            return tf.map_fn(
                lambda record: _source_of_record(dataset, *record),
                [tf.gather(part, which)[:, attempt] for part in group],
                fn_output_signature=(tf.string, tf.string, tf.int64),
            )

        return places, *_look_at_group(
            look, places, candidates, dataset, STREAM_CANDIDATES, unreadable
        )

    def require_readable(places, seen, labels, readable):
        message = f"{STREAM_CANDIDATES} records of {dataset.name} in a row cannot be read."
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(readable), [message])]):
            return places, seen, tf.identity(labels)

    windows = order.epochs.flat_map(epoch_of_records)
    windows = windows.filter(lambda place, window: order.is_own(place))
    groups = windows.batch(_group_size(unreadable))
    groups = groups.map(as_it_stands(look_at_group), _calls_at_a_time(look, unreadable))
    return _in_training(groups, order, unreadable).map(as_it_stands(require_readable))


def _in_training(groups, order, unreadable):
    """Ends the training beyond the limit, unless others must count: several workers together."""
    if unreadable.in_service or order.workers > 1:
        return groups.map(as_it_stands(lambda *group: group[:4]))
    return _ended_beyond_limit(groups, unreadable)


READERS = {ArrayDataset: _array_batches, FileDataset: _file_images, RecordDataset: _record_images}


def mapped(dataset, function):
    return dataset.map(as_it_stands(function), tf.data.AUTOTUNE)


def as_it_stands(function):
    """Keeps AutoGraph from searching a function's source for loops, which takes seconds."""
    return tf.autograph.experimental.do_not_convert(function)


def _source_of_record(dataset, file, index, record):
    """Encoded image, name and label of a record."""
    encoded, label = dataset.parse(record)
    return encoded, tf.strings.join([file, ", record ", tf.strings.as_string(index)]), label


def _paths(dataset):
    return [os.fsencode(path) for path in dataset.paths]  # A name need not be UTF-8.


def _labels(dataset):
    return np.full(len(dataset), -1, np.int64) if dataset.labels is None else dataset.labels
