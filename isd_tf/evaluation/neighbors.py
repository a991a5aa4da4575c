"""What a teacher sees in its queue: for some images, the anchors nearest to them.

The queue holds embeddings, not images. But order and views are functions of seed and step, so the
views that became its rows can be made again: those shown are the very ones.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from isd_tf.data.batches import VIEW_NAMES, numbered_views, pretraining_batches
from isd_tf.data.datasets import Dataset
from isd_tf.data.decoding import REPLACED, Unreadable, explaining
from isd_tf.methods.feature_queue import UNKNOWN_LABEL
from isd_tf.methods.student import Student
from isd_tf.views import augment


class QueueNeighbors(NamedTuple):
    """For Q images the n nearest anchors, the nearest first. Views are normalised [S, S, 3]."""

    query_views: np.ndarray  # [Q, S, S, 3], the teacher's
    other_views: np.ndarray | None  # [Q, S, S, 3], the student's, if it has one of its own
    anchor_views: np.ndarray  # [Q, n, S, S, 3]
    probabilities: np.ndarray  # [Q, n], the teacher's over all anchors
    query_labels: np.ndarray  # int64 [Q], -1 where unknown
    anchor_labels: np.ndarray  # int64 [Q, n]


def find(
    model: Student,
    temperature: float,
    queries: Dataset,
    train: Dataset,
    views: tuple[str, ...],
    image_size: int,
    global_batch_size: int,
    seed: int,
    neighbors: int,
    unreadable: Unreadable | None = None,
) -> QueueNeighbors:
    """Finds the anchors nearest to each query's embedding, and the views that they came from.

    The teacher embeds in inference mode, where in training it used batch statistics.

    Args:
        model: with a queue, as the training left it.
        temperature: divides the similarities.
        queries: Q images; those that cannot be read are left out.
        train, views, image_size, global_batch_size, seed: of the training.
        neighbors: n, at most the anchors.
        unreadable: counts training images that cannot be read, which the next ones replaced.

    Raises:
        ValueError: when the queue is not yet full of images, or was filled with others.

    Source: paper figure 1.
    """
    unreadable = unreadable or Unreadable(len(train), 0.0, REPLACED)
    size, step = model.queue.size, int(model.step.numpy())
    enqueued = step * global_batch_size
    if enqueued < size:
        raise ValueError(
            f"The queue must be full of images. Received: {enqueued} after step {step}, of {size}. "
            "Train on, or use a smaller --queue_size."
        )
    query_views, *other_views, query_labels = _drawn_views(
        queries, views, image_size, seed, unreadable.max_pixels
    )
    embeddings = _embed(model, query_views)  # [Q, D]
    similarities = tf.matmul(embeddings, model.queue.read_anchors(), transpose_b=True)  # [Q, K]
    best = tf.math.top_k(tf.nn.softmax(similarities / temperature), min(neighbors, size))
    rows = best.indices.numpy()  # [Q, n]

    # Where in the training, counted in images, each row was last written.
    places = enqueued - 1 - (enqueued - 1 - rows) % size  # [Q, n]
    first_step = int(places.min()) // global_batch_size
    batches = pretraining_batches(
        train, views, image_size, global_batch_size, seed, first_step, unreadable
    )
    wanted, found = set(places.flat), {}
    for number, batch in zip(range(first_step, step), batches, strict=False):
        first = number * global_batch_size
        places_here = wanted & set(range(first, first + global_batch_size))
        if places_here:
            views_here = augment.finish(batch[VIEW_NAMES[len(views)][0]]).numpy()
            labels_here = batch.get("label", tf.fill([global_batch_size], UNKNOWN_LABEL)).numpy()
        for place in places_here:
            found[place] = views_here[place - first], labels_here[place - first]
    anchor_labels = model.queue.labels.numpy()[rows]
    for place, expected in zip(places.flat, anchor_labels.flat, strict=True):
        _, label = found[place]
        if label != expected:
            raise ValueError(
                f"The queue was filled with other images than {train.name} gives now: the label "
                f"{expected} is in it, and {label} comes again. Use the data and flags of the "
                "training; one with --data_service has no order to repeat."
            )
    return QueueNeighbors(
        query_views,
        other_views[0] if other_views else None,
        np.array([[found[place][0] for place in of_query] for of_query in places]),
        best.values.numpy(),
        query_labels,
        anchor_labels,
    )


def _drawn_views(queries, views, image_size, seed, max_pixels):
    """Draws the views of each query by its number: the teacher's, the student's; then labels."""
    unreadable, read = Unreadable(len(queries), 1, max_pixels=max_pixels), []
    with explaining([unreadable]):
        for *drawn, label in numbered_views(queries, views, image_size, seed, unreadable):
            read.append([*map(augment.finish, drawn), label])
    return [np.concatenate(side) for side in zip(*read, strict=True)]


def _embed(model, views):
    x = model.encoders()["teacher"](views, training=False)
    projector = getattr(model, "teacher_projector", None)  # A given teacher has none.
    x = projector(x, training=False) if projector else x
    return tf.math.l2_normalize(tf.cast(x, model.queue.rows.dtype), axis=1)
