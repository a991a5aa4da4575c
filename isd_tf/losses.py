"""Losses: tensors in, a value for each example out.

Shape letters here and everywhere: B batch, K queue, D embedding.
"""

from typing import NamedTuple

import tensorflow as tf


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
    anchors = tf.stop_gradient(anchors)
    similarities = tf.matmul(tf.stop_gradient(teacher_embeddings), anchors, transpose_b=True)
    teacher_log = tf.nn.log_softmax(similarities / teacher_temperature)  # [B, K]
    teacher = tf.exp(teacher_log)
    nearest = tf.math.top_k(similarities, neighbors).indices if neighbors else None

    similarities = tf.matmul(student_embeddings, anchors, transpose_b=True)
    student_log = tf.nn.log_softmax(similarities / student_temperature)  # [B, K]

    return SimilarityDistillation(
        divergence=tf.reduce_sum(teacher * (teacher_log - student_log), axis=1),
        teacher_entropy=-tf.reduce_sum(teacher * teacher_log, axis=1),
        student_entropy=-tf.reduce_sum(tf.exp(student_log) * tf.stop_gradient(student_log), axis=1),
        nearest=nearest,
    )
