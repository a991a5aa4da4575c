"""Readers: the images of arrays, files and records in order, and what is seen of each.

Each kind of dataset has a reader in the order of the training and one in the dataset's own. `looks`
has what is seen of an image, and who decodes and crops it; `batches` makes batches of that.
"""

import functools
import os
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from isd_tf.data.datasets import ArrayDataset, FileDataset, RecordDataset
from isd_tf.data.decoding import Unreadable
from isd_tf.data.graph_decoder import graph_formats
from isd_tf.data.looks import (
    GROUP,
    RandomCrops,
    as_it_stands,
    calls_at_a_time,
    cores,
    look_at_images,
    unless_missed,
    ways_to_look,
)
from isd_tf.data.python_calls import call_python

# Shards read side by side, and undecoded records among which a stream is shuffled.
STREAM_SHARDS = 16
STREAM_BUFFER = 8192
# An unreadable image gives way to the readable one among so many: of a stream, whose records are
# kept for it, or of files, where a disk that is gone shall end a training soon.
STREAM_CANDIDATES, FILE_CANDIDATES = 4, 64
# Whole batches that are worked on side by side: each takes memory.
BATCHES_AT_A_TIME = 16


# ------------------------------------------------------------------------ in the dataset's order


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
            seen = look(all_images[first : first + batch_size], numbers)
            return numbers, seen, all_labels[first : first + batch_size]

        firsts = tf.data.Dataset.range(0, len(dataset), batch_size)
        return mapped(firsts, look_at_batch)

    def count(numbers, failures, readable):
        unreadable.count(numbers, failures)
        unreadable.check(int(numbers[-1]) + 1)

    def leave_out(numbers, failures, readable, seen, labels):
        return tf.nest.map_structure(
            lambda values: tf.boolean_mask(values, readable), (numbers, seen, labels)
        )

    in_groups = _file_groups if isinstance(dataset, FileDataset) else _record_groups
    groups = in_groups(dataset, look, unreadable.max_pixels)
    return mapped(_with_failures_shown(groups, count), leave_out)


def _record_groups(dataset, look, max_pixels):
    sources = mapped(dataset.records, functools.partial(_source_of_record, dataset))

    def look_at_group(numbers, group):  # [n], three of [n]
        return numbers, *look_at_images(look, numbers, lambda _: group, dataset, 1, max_pixels)

    return sources.enumerate().batch(GROUP).map(as_it_stands(look_at_group), cores())


def _file_groups(dataset, look, max_pixels):
    paths, labels = tf.constant(_paths(dataset)), tf.constant(_labels(dataset))
    groups = -(-len(dataset) // GROUP)

    def of_group(group):
        numbers = tf.range(GROUP * group, tf.minimum(GROUP * (group + 1), len(dataset)))
        own = tf.gather(paths, numbers)
        return numbers, (own, own, tf.gather(labels, numbers))

    if isinstance(look, RandomCrops):

        def look_at_group(group):
            numbers, sources = of_group(group)
            return numbers, *look_at_images(
                look, numbers, lambda _: sources, dataset, 1, max_pixels
            )

        return tf.data.Dataset.range(groups).map(as_it_stands(look_at_group), cores())
    return _file_groups_by_graph(dataset, look, max_pixels, groups, of_group)


def _file_groups_by_graph(dataset, look, max_pixels, groups, of_group):
    """The graph looks at all groups. In which one fails, that is missed, and looked at in Python.

    As `look_at_images` does it, but there is an outer dataset for all groups here instead of an
    inner one for each, which TensorFlow does not optimise: it takes twice the time.
    """
    nothing = look.nothing
    types = tuple(x.dtype for x in nothing)

    def ways_of_group(group):
        numbers, (sources, names, labels) = of_group(group)
        return numbers, labels, *ways_to_look(look, sources, names, dataset, max_pixels)

    def look_at_once(group):
        numbers, _, look_at, _ = ways_of_group(group)
        places = tf.range(tf.size(numbers))
        return group, tf.map_fn(look_at, places, fn_output_signature=types, parallel_iterations=1)

    def look_at_missed(group, seen_at_once):
        numbers, labels, _, each = ways_of_group(group)
        failures, seen = unless_missed(look, seen_at_once, each)
        return numbers, failures, failures == "", seen, labels

    def with_expected(expected, found):
        group, _ = found
        return group + 1, (expected, *found)

    def with_missed_before(expected, group, seen):
        missed = tf.data.Dataset.range(expected, group).map(as_it_stands(lambda g: (g, nothing)))
        return missed.concatenate(tf.data.Dataset.from_tensors((group, seen)))

    of_graph = tf.data.Dataset.range(groups).map(as_it_stands(look_at_once), cores())
    of_graph = of_graph.ignore_errors()
    if not graph_formats(dataset.paths):
        of_graph = of_graph.take(0)
    end = tf.data.Dataset.from_tensors((tf.constant(groups, tf.int64), nothing))
    in_turn = of_graph.concatenate(end).scan(tf.constant(0, tf.int64), as_it_stands(with_expected))
    all_groups = in_turn.flat_map(as_it_stands(with_missed_before)).take(groups)
    return mapped(all_groups, look_at_missed)


# ---------------------------------------------------------------- images in the order of training
# Each reader returns an endless dataset of this worker's places [n] and what `look_at_images` says
# of them: failures [n], readable [n], for each view [n, S, S, 3], labels [n]. The failures have
# been counted, but those of a data service: the trainer counts them in what it gets.


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
    with tf.device("CPU:0"):  # Where a GPU is, its memory is for the networks.
        all_images, all_labels = tf.constant(dataset.images), tf.constant(_labels(dataset))

    def look_at_batch(step):
        places = order.places(step)
        rows = order.images_at(places)
        seen = look(tf.gather(all_images, rows), places)
        failures, readable = tf.fill([tf.size(places)], ""), tf.ones_like(places, tf.bool)
        return places, failures, readable, seen, tf.gather(all_labels, rows)

    if look.in_service:
        return order.steps.map(as_it_stands(look_at_batch), tf.data.AUTOTUNE)
    return mapped(order.steps, look_at_batch)


def _file_images(dataset, order, look, unreadable):
    paths, labels = tf.constant(_paths(dataset)), tf.constant(_labels(dataset))
    # With one more than may be unreadable the limit ends the training.
    attempts = min(len(dataset), int(unreadable.tolerated) + 1, FILE_CANDIDATES)

    def places_of(step):
        return tf.data.Dataset.from_tensor_slices(order.places(step)).batch(GROUP)

    def look_at_group(places):  # [n]
        def candidates(attempt):
            # What cannot be read gives way to the next image in the epoch's order.
            rows = order.images_at(places, attempt)
            return tf.gather(paths, rows), tf.gather(paths, rows), tf.gather(labels, rows)

        max_pixels = unreadable.max_pixels
        return places, *look_at_images(look, places, candidates, dataset, attempts, max_pixels)

    groups = order.steps.flat_map(places_of).map(as_it_stands(look_at_group), calls_at_a_time(look))
    return _counted_unless_in_service(groups, order, look, unreadable)


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
        def candidates(attempt):
            return tf.map_fn(
                lambda record: _source_of_record(dataset, *record),
                [part[:, attempt] for part in group],
                fn_output_signature=(tf.string, tf.string, tf.int64),
            )

        return places, *look_at_images(
            look, places, candidates, dataset, STREAM_CANDIDATES, unreadable.max_pixels
        )

    windows = order.epochs.flat_map(epoch_of_records)
    windows = windows.filter(lambda place, window: order.is_own(place))
    groups = windows.batch(GROUP).map(as_it_stands(look_at_group), calls_at_a_time(look))
    return _counted_unless_in_service(groups, order, look, unreadable)


def _counted_unless_in_service(groups, order, look, unreadable):
    if look.in_service:
        return groups
    return counted_in_training(groups, unreadable, others_count=order.workers > 1)


READERS = {ArrayDataset: _array_batches, FileDataset: _file_images, RecordDataset: _record_images}


# ------------------------------------------------------------------------- what both orders need


def counted_in_training(dataset, unreadable, others_count):
    """Counts what failed in elements (places [n], failures [n], readable [n], ...).

    Ends the reading at the first element up to which too many images could not be read, unless
    others count: several workers together. Below the limit also, on this worker, at a place whose
    candidates have all failed.
    """

    def count(places, failures, readable):
        unreadable.count(places, failures)
        if not others_count:
            unreadable.check(int(places[-1]) + 1)
        unreadable.require_one(failures[~readable])

    return _with_failures_shown(dataset, count)


def _with_failures_shown(dataset, count):
    """Shows what failed, and where, to `count`, one element after the other.

    By Python, which is slow, and waited for where an iterator is given up: only where it did.
    """

    def show(*known):
        count(*known)
        return known[0]

    def in_order(*element):
        places, failures, readable, *_ = element
        in_python = functools.partial(call_python, show, [places, failures, readable], tf.int64)
        shown = tf.cond(tf.reduce_all(failures == ""), lambda: places, in_python)
        with tf.control_dependencies([shown]):
            return tf.nest.map_structure(tf.identity, element)

    return dataset.map(as_it_stands(in_order))


def mapped(dataset, function):
    return dataset.map(as_it_stands(function), min(cores(), BATCHES_AT_A_TIME))


def _source_of_record(dataset, file, index, record):
    """Encoded image, name and label of a record."""
    encoded, label = dataset.parse(record)
    return encoded, tf.strings.join([file, ", record ", tf.strings.as_string(index)]), label


def _paths(dataset):
    return [os.fsencode(path) for path in dataset.paths]  # A name need not be UTF-8.


def _labels(dataset):
    return np.full(len(dataset), -1, np.int64) if dataset.labels is None else dataset.labels
