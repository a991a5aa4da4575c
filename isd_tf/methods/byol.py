"""BYOL-asym: the baseline without anchors.

Grill et al., NeurIPS 2020, in one direction as the paper compares with. To be read beside `isd.py`.
"""

import keras
import tensorflow as tf

from isd_tf.methods import losses
from isd_tf.methods.student import embedding_std
from isd_tf.methods.student_teacher import StudentTeacher
from isd_tf.training.distribution import gather_across_replicas


@keras.saving.register_keras_serializable("isd_tf")
class BYOL(StudentTeacher):
    """BYOL-asym: predict the teacher's embedding of another view of the same image.

    One direction only, as the paper compares with: the student is BYOL's online network, the
    teacher its target. There are no anchors. A step reports loss (squared distance of unit vectors,
    0 to 4), embedding_std, gradient_norm and learning_rate as `ISD` does.

    Args:
        encoder, projector, predictor, shuffle_batch_norm, seed: as in `StudentTeacher`. Without a
            predictor BYOL collapses.
        teacher_momentum: as in `StudentTeacher`; the paper's BYOL-asym has 0.99.

    Raises:
        ValueError: for a momentum outside [0, 1].

    Source: Grill et al., NeurIPS 2020; UMBCvision/ISD train_byol.py.
    """

    def __init__(
        self,
        encoder: keras.Model,
        projector: keras.Model | None,
        predictor: keras.Model | None,
        teacher_momentum: float = 0.99,
        shuffle_batch_norm: bool = True,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(
            encoder, projector, predictor, teacher_momentum, shuffle_batch_norm, seed, **kwargs
        )

    def train_step(self, batch):
        learning_rate = tf.convert_to_tensor(self.optimizer.learning_rate)

        # Forward pass. The teacher's embedding is the target and carries no gradient.
        teacher_embeddings = self.embed_teacher(batch["teacher_view"])  # [b, D] unit rows
        with tf.GradientTape() as tape:
            student_embeddings = self.embed_student(batch["student_view"])  # [b, D] unit rows
            distance = losses.squared_distance(student_embeddings, teacher_embeddings)  # [b]
            loss = tf.reduce_mean(distance)
        gradient_norm = self.update_student(tape, loss)
        self.update_teacher()

        embeddings = gather_across_replicas(teacher_embeddings)  # [B, D]
        return {
            "loss": loss,
            "embedding_std": embedding_std(embeddings),
            "gradient_norm": gradient_norm,
            "learning_rate": learning_rate,
        }
