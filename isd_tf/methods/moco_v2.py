"""MoCo v2: momentum contrast, the baseline that tells every other image away equally.

He et al., CVPR 2020; Chen et al., arXiv:2003.04297. To be read beside `isd.py`.
"""

import keras
import tensorflow as tf

from isd_tf.methods import losses
from isd_tf.methods.feature_queue import FeatureQueue
from isd_tf.methods.student import embedding_std
from isd_tf.methods.student_teacher import StudentTeacher
from isd_tf.training.distribution import gather_across_replicas


@keras.saving.register_keras_serializable("isd_tf")
class MoCoV2(StudentTeacher):
    """Momentum contrast: tell the teacher's embedding of an image from those of all the others.

    The student is MoCo's query encoder, the teacher its key encoder, and the anchors its queue of
    negatives. A step reports, besides loss (InfoNCE, nats), embedding_std, purity and learning_rate
    as `ISD` does:

        contrast_accuracy   share of the images whose own teacher embedding is nearer than every
                            anchor; MoCo's training accuracy

    Args:
        encoder, projector, shuffle_batch_norm, seed: as in `StudentTeacher`.
        predictor: None in MoCo v2.
        queue_size: anchors K; at least the global batch. MoCo's is 65 536.
        temperature: divides the similarities; MoCo v2's is 0.2.
        teacher_momentum: as in `StudentTeacher`; MoCo's is 0.999.

    Raises:
        ValueError: for a temperature that is not positive, or a momentum outside [0, 1].

    Source: He et al., CVPR 2020; Chen et al., arXiv:2003.04297.
    """

    def __init__(
        self,
        encoder: keras.Model,
        projector: keras.Model | None,
        predictor: keras.Model | None = None,
        queue_size: int = 65_536,
        temperature: float = 0.2,
        teacher_momentum: float = 0.999,
        shuffle_batch_norm: bool = True,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(
            encoder, projector, predictor, teacher_momentum, shuffle_batch_norm, seed, **kwargs
        )
        if not 0 < temperature < float("inf"):
            raise ValueError(
                f"temperature must be greater than 0, and finite. Received: {temperature}."
            )
        self.temperature = temperature
        self.queue = FeatureQueue(queue_size, self.embedding_dim, seed, name="queue")

    def train_step(self, batch):
        labels = batch.get("label")  # [b], never part of the loss
        learning_rate = tf.convert_to_tensor(self.optimizer.learning_rate)

        # Forward pass. The teacher's embedding is the positive and carries no gradient.
        teacher_embeddings = self.embed_teacher(batch["teacher_view"])  # [b, D] unit rows
        anchors = self.queue.read_anchors()  # [K, D] earlier batches only
        with tf.GradientTape() as tape:
            student_embeddings = self.embed_student(batch["student_view"])  # [b, D] unit rows
            contrast = losses.info_nce(
                student_embeddings, teacher_embeddings, anchors, self.temperature
            )
            loss = tf.reduce_mean(contrast.cross_entropy)
        gradient_norm = self.update_student(tape, loss)
        self.update_teacher()

        monitored = {
            "loss": loss,
            "contrast_accuracy": tf.reduce_mean(tf.cast(contrast.is_nearest, tf.float32)),
        }
        if labels is not None:
            similarities = tf.matmul(teacher_embeddings, anchors, transpose_b=True)  # [b, K]
            nearest = tf.math.top_k(similarities, self.queue.purity_neighbors).indices
            monitored["purity"] = self.queue.purity(nearest, labels)

        # Last, so that a batch is never among its own negatives.
        embeddings = gather_across_replicas(teacher_embeddings)  # [B, D]
        self.queue.enqueue(embeddings, None if labels is None else gather_across_replicas(labels))

        monitored["embedding_std"] = embedding_std(embeddings)
        monitored["gradient_norm"] = gradient_norm
        monitored["learning_rate"] = learning_rate
        return monitored

    def get_config(self):
        mine = {"queue_size": self.queue.size, "temperature": self.temperature}
        return {**super().get_config(), **mine}
