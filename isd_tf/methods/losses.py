"""Losses: tensors in, a value for each example out.

Shape letters here and everywhere: B batch, K queue, D embedding.
"""

from typing import NamedTuple

import tensorflow as tf

# From so many similarities (B * K) on, the anchors are read chunk by chunk: the [B, K] matrices of
# comparing at once would take 128 MiB each in float32, and about ten of them, the gradient's among
# them, may be held at a time (five to six are, by benchmarks/kl.py; docs/scaling.md, section 1).
STREAMED_FROM = 2**25
CHUNK = 2048


class Contrast(NamedTuple):
    """What telling an image's own teacher embedding from the anchors gives."""

    cross_entropy: tf.Tensor  # [B] nats, the loss
    is_nearest: tf.Tensor  # bool [B]: the own one is nearer than every anchor


def info_nce(
    student_embeddings: tf.Tensor,
    teacher_embeddings: tf.Tensor,
    anchors: tf.Tensor,
    temperature: float,
) -> Contrast:
    """Cross-entropy of telling an image's own teacher embedding from the anchors.

    -log(exp(q.k / T) / (exp(q.k / T) + sum_i exp(q.a_i / T))): every anchor is equally negative. No
    gradient reaches the teacher's embeddings or the anchors.

    Args:
        student_embeddings: [B, D] unit rows q.
        teacher_embeddings: [B, D] unit rows k.
        anchors: [K, D] unit rows a, earlier batches only.
        temperature: positive T.

    Returns:
        Cross-entropy in nats, and whether the own embedding is the nearest, each [B].

    Source: He et al., MoCo, CVPR 2020, equation 1.
    """
    teacher_embeddings = tf.stop_gradient(teacher_embeddings)
    queries = student_embeddings / temperature
    positive = tf.reduce_sum(queries * teacher_embeddings, axis=1)  # [B]
    negative = tf.matmul(queries, tf.stop_gradient(anchors), transpose_b=True)  # [B, K]
    logits = tf.concat([positive[:, tf.newaxis], negative], axis=1)  # [B, 1 + K]
    return Contrast(
        cross_entropy=tf.reduce_logsumexp(logits, axis=1) - positive,
        is_nearest=positive > tf.reduce_max(negative, axis=1),
    )


def squared_distance(student_embeddings: tf.Tensor, teacher_embeddings: tf.Tensor) -> tf.Tensor:
    """Squared distance [B] of unit rows [B, D]: 2 - 2 cos, without a gradient to the teacher's.

    Source: Grill et al., BYOL, NeurIPS 2020, equation 2; UMBCvision/ISD train_byol.py:90-96.
    """
    difference = student_embeddings - tf.stop_gradient(teacher_embeddings)
    return tf.reduce_sum(difference**2, axis=1)


class MeanShift(NamedTuple):
    """What comparing the student to the teacher's neighbourhood gives."""

    distance: tf.Tensor  # [B] the loss
    nearest: tf.Tensor  # [B, neighbors] rows of the anchors nearest to the teacher's embedding


def mean_shift(
    student_embeddings: tf.Tensor,
    teacher_embeddings: tf.Tensor,
    anchors: tf.Tensor,
    neighbors: int,
) -> MeanShift:
    """Mean squared distance of the student's embedding to the anchors nearest to the teacher's.

    2 - 2 q.a for unit rows, mean over the nearest anchors a. No gradient reaches the teacher's
    embeddings or the anchors.

    Args:
        student_embeddings: [B, D] unit rows q.
        teacher_embeddings: [B, D] unit rows.
        anchors: [K, D] unit rows, the teacher's embeddings of this batch among them.
        neighbors: how many anchors are near, at most K.

    Returns:
        Distances in [0, 4], [B], and the nearest anchors.

    Source: Koohpayegani et al., ICCV 2021, equation 1; UMBCvision/MSF train_msf.py.
    """
    anchors = tf.stop_gradient(anchors)
    nearest = _nearest(tf.stop_gradient(teacher_embeddings), anchors, neighbors)  # [B, n]
    means = tf.reduce_mean(tf.gather(anchors, nearest), axis=1)  # [B, D]
    return MeanShift(2 - 2 * tf.reduce_sum(student_embeddings * means, axis=1), nearest)


def _nearest(embeddings, anchors, neighbors):
    """Rows [B, neighbors] of the anchors most similar to embeddings [B, D], in chunks if many."""
    if not _is_streamed(embeddings, anchors):
        similarities = tf.matmul(embeddings, anchors, transpose_b=True)  # [B, K]
        return tf.math.top_k(similarities, neighbors).indices

    def add_chunk(first, best, rows):
        similarities = tf.matmul(embeddings, anchors[first : first + CHUNK], transpose_b=True)
        return first + CHUNK, *_keep_nearest(best, rows, first, similarities, neighbors)

    state = (tf.constant(0), *_no_neighbors(embeddings, neighbors))
    size = tf.shape(anchors)[0]
    _, _, rows = tf.while_loop(lambda first, *_: first < size, add_chunk, state)
    return rows


def _is_streamed(embeddings, anchors):
    return (embeddings.shape[0] or 0) * (anchors.shape[0] or 0) >= STREAMED_FROM


def _no_neighbors(embeddings, neighbors):
    """The nearest anchors before the first chunk: similarities and rows, each [B, neighbors]."""
    shape = [tf.shape(embeddings)[0], neighbors]
    return tf.fill(shape, tf.constant(-float("inf"), embeddings.dtype)), tf.zeros(shape, tf.int32)


def _keep_nearest(best, rows, first, similarities, neighbors):
    """The same after a chunk of similarities [B, c] to the anchors from row `first` on."""
    similar = tf.math.top_k(similarities, tf.minimum(neighbors, tf.shape(similarities)[1]))
    candidates = tf.concat([best, similar.values], axis=1)
    rows = tf.concat([rows, first + similar.indices], axis=1)
    chosen = tf.math.top_k(candidates, neighbors)
    return chosen.values, tf.gather(rows, chosen.indices, batch_dims=1)


class SimilarityDistillation(NamedTuple):
    """What comparing student and teacher over the anchors gives; entropies in nats."""

    divergence: tf.Tensor  # [B] the loss
    teacher_entropy: tf.Tensor  # [B]
    student_entropy: tf.Tensor  # [B]
    nearest: tf.Tensor  # [B, neighbors] rows of the anchors nearest to the teacher's embedding


def similarity_distillation(
    student_embeddings: tf.Tensor,
    teacher_embeddings: tf.Tensor,
    anchors: tf.Tensor,
    student_temperature: float,
    teacher_temperature: float,
    neighbors: int = 0,
) -> SimilarityDistillation:
    """KL divergence of the student's similarities to the anchors from the teacher's.

    Each image becomes a probability over the anchors, p for the teacher and q for the student: the
    softmax of its cosine similarities over a temperature. The divergence is
    sum_i p_i (log p_i - log q_i), the teacher's entropy included. It is computed from logits: with
    many anchors most probabilities are below any epsilon that a clipped logarithm could afford.
    No gradient reaches the teacher's embeddings or the anchors.

    Args:
        student_embeddings: [B, D] unit rows.
        teacher_embeddings: [B, D] unit rows.
        anchors: [K, D] unit rows, earlier batches only.
        student_temperature: positive; divides the student's similarities.
        teacher_temperature: positive; divides the teacher's similarities.
        neighbors: how many nearest anchors of the teacher's embedding to name.

    Returns:
        Divergence and entropies in nats, each [B], and the nearest anchors.

    Source: paper equations 1-3; UMBCvision/ISD train_isd.py:196-212.
    """
    is_streamed = _is_streamed(student_embeddings, anchors)
    compare = _compare_in_chunks if is_streamed else _compare_at_once
    return compare(
        student_embeddings,
        tf.stop_gradient(teacher_embeddings),
        tf.stop_gradient(anchors),
        student_temperature,
        teacher_temperature,
        neighbors,
    )


def _compare_at_once(
    student_embeddings,
    teacher_embeddings,
    anchors,
    student_temperature,
    teacher_temperature,
    neighbors,
):
    # Divided before the product, as in chunks, so that the logits of both are the same bits.
    teacher_logits, student_logits = _products_of_both(
        teacher_embeddings / teacher_temperature, student_embeddings / student_temperature, anchors
    )
    teacher_logits = tf.stop_gradient(teacher_logits)
    teacher_log = tf.nn.log_softmax(teacher_logits)  # [B, K]
    teacher = tf.exp(teacher_log)
    nearest = tf.math.top_k(teacher_logits, neighbors).indices if neighbors else None
    student_log = tf.nn.log_softmax(student_logits)  # [B, K]

    return SimilarityDistillation(
        divergence=tf.reduce_sum(teacher * (teacher_log - student_log), axis=1),
        teacher_entropy=-tf.reduce_sum(teacher * teacher_log, axis=1),
        student_entropy=tf.stop_gradient(-tf.reduce_sum(tf.exp(student_log) * student_log, axis=1)),
        nearest=nearest,
    )


@tf.custom_gradient
def _products_of_both(teacher_queries, student_queries, anchors):
    """Products [B, K] of each side's rows [B, D] with the anchors [K, D], read once for both.

    With a gradient of its own, to the student's rows: TensorFlow would compute the teacher's too.
    """
    stacked = tf.concat([teacher_queries, student_queries], axis=0)
    products = tf.split(tf.matmul(stacked, anchors, transpose_b=True), 2)
    return products, lambda of_teacher, of_student: (None, tf.matmul(of_student, anchors), None)


def _compare_in_chunks(
    student_embeddings,
    teacher_embeddings,
    anchors,
    student_temperature,
    teacher_temperature,
    neighbors,
):
    """The same in one pass over the anchors, with matrices [2B, CHUNK] and [2B, D], none [B, K].

    Teacher and student are stacked. With logits l and their running maximum m, the pass sums
    z = sum exp(l - m); the anchors weighted by exp(l - m), which are all that the gradient needs;
    and, so weighted, the logits and the teacher's less the student's, of which entropies and
    divergence are made. All are rescaled as m grows. The running sums are float64, so that many
    chunks round no more than one.
    """

    @tf.custom_gradient
    def compare(student_embeddings):
        teacher_queries = teacher_embeddings / teacher_temperature
        queries = tf.concat([teacher_queries, student_embeddings / student_temperature], axis=0)
        batch, size = tf.shape(teacher_embeddings)[0], tf.shape(anchors)[0]

        def widen(sums):
            return tf.cast(sums, tf.float64)

        def add_chunk(first, m, z, weighted, own, gap, best, rows):
            chunk = anchors[first : first + CHUNK]  # [c, D]
            logits = tf.matmul(queries, chunk, transpose_b=True)  # [2B, c]
            if neighbors:
                best, rows = _keep_nearest(best, rows, first, logits[:batch], neighbors)
            new_m = tf.maximum(m, tf.reduce_max(logits, axis=1))
            shift = widen(m) - widen(new_m)  # [2B]
            rescale = tf.exp(shift)
            logits -= new_m[:, tf.newaxis]
            weights = tf.exp(logits)
            # The logits so far are now less by the shift: their weighted sums, before z grows.
            own = rescale * (own + shift * z) + widen(tf.reduce_sum(weights * logits, axis=1))
            gap = rescale[:batch] * (gap + (shift[:batch] - shift[batch:]) * z[:batch])
            difference = logits[:batch] - logits[batch:]
            gap += widen(tf.reduce_sum(weights[:batch] * difference, axis=1))
            z = rescale * z + widen(tf.reduce_sum(weights, axis=1))
            weighted = rescale[:, tf.newaxis] * weighted + widen(tf.matmul(weights, chunk))
            return first + CHUNK, new_m, z, weighted, own, gap, best, rows

        zeros = tf.zeros_like(queries[:, 0], tf.float64)
        state = (
            tf.constant(0),
            tf.linalg.matvec(queries, anchors[0]),  # any logit will do, if it is finite
            zeros,
            tf.zeros_like(queries, tf.float64),
            zeros,
            zeros[:batch],
            *_no_neighbors(teacher_queries, neighbors),
        )
        _, _, z, weighted, own, gap, _, rows = tf.while_loop(
            lambda first, *_: first < size, add_chunk, state
        )
        means = weighted / z[:, tf.newaxis]  # [2B, D] anchors as each side weighs them
        difference = tf.cast(means[batch:] - means[:batch], queries.dtype)
        log_z = tf.math.log(z)
        entropies = tf.cast(log_z - own / z, queries.dtype)
        divergence = tf.cast(gap / z[:batch] + log_z[batch:] - log_z[:batch], queries.dtype)

        def gradient(by_divergence, *_):
            return by_divergence[:, tf.newaxis] * difference / student_temperature

        return (divergence, entropies[:batch], entropies[batch:], rows), gradient

    divergence, teacher_entropy, student_entropy, rows = compare(student_embeddings)
    return SimilarityDistillation(
        divergence,
        tf.stop_gradient(teacher_entropy),
        tf.stop_gradient(student_entropy),
        rows if neighbors else None,
    )
