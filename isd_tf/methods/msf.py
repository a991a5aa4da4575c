"""MSF: mean shift for self-supervised learning.

Koohpayegani, Tejankar, Pirsiavash, ICCV 2021. To be read beside `isd.py`: the same pair and queue,
but the student follows the teacher's nearest neighbours themselves, and not its similarities.
"""

import keras
import tensorflow as tf

from isd_tf.methods import losses
from isd_tf.methods.feature_queue import FeatureQueue
from isd_tf.methods.student import embedding_std
from isd_tf.methods.student_teacher import StudentTeacher
from isd_tf.training.distribution import gather_across_replicas


@keras.saving.register_keras_serializable("isd_tf")
class MSF(StudentTeacher):
    """A student that moves towards the mean of the teacher's neighbourhood of each image.

    Heads and batches are ISD+'s. A step reports, besides embedding_std and learning_rate as `ISD`
    does:

        loss                squared distance, 0 to 4, mean over the neighbours and the batch
        purity              with labels: share of the neighbours that carry the image's label. The
                            image's own embedding is one, so that it is 1 / neighbors at least

    Args:
        encoder, projector, predictor, shuffle_batch_norm, seed: as in `StudentTeacher`.
        queue_size: anchors K; at least the global batch. The paper's is 128 000.
        neighbors: how many anchors an image is moved to, its own teacher embedding included. The
            published command has 10.
        teacher_momentum: as in `StudentTeacher`; the paper's is 0.99.

    Raises:
        ValueError: for fewer anchors than neighbours, or a momentum outside [0, 1].

    Source: UMBCvision/MSF train_msf.py.
    """

    def __init__(
        self,
        encoder: keras.Model,
        projector: keras.Model | None,
        predictor: keras.Model | None,
        queue_size: int = 128_000,
        neighbors: int = 5,
        teacher_momentum: float = 0.99,
        shuffle_batch_norm: bool = True,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(
            encoder, projector, predictor, teacher_momentum, shuffle_batch_norm, seed, **kwargs
        )
        if not 1 <= neighbors <= queue_size:
            raise ValueError(
                f"neighbors must be at least 1 and at most queue_size ({queue_size}). "
                f"Received: {neighbors}."
            )
        self.neighbors = neighbors
        self.queue = FeatureQueue(queue_size, self.embedding_dim, seed, name="queue")

    def train_step(self, batch):
        labels = batch.get("label")  # [b], never part of the loss
        learning_rate = tf.convert_to_tensor(self.optimizer.learning_rate)

        # Forward pass. The teacher's embeddings are the targets and carry no gradient.
        teacher_embeddings = self.embed_teacher(batch["teacher_view"])  # [b, D] unit rows
        # First, where ISD enqueues last: each image's own embedding is the nearest of its anchors.
        embeddings = gather_across_replicas(teacher_embeddings)  # [B, D]
        self.queue.enqueue(embeddings, None if labels is None else gather_across_replicas(labels))
        anchors = self.queue.read_anchors()  # [K, D] this batch included
        with tf.GradientTape() as tape:
            student_embeddings = self.embed_student(batch["student_view"])  # [b, D] unit rows
            shift = losses.mean_shift(
                student_embeddings, teacher_embeddings, anchors, self.neighbors
            )
            loss = tf.reduce_mean(shift.distance)
        gradient_norm = self.update_student(tape, loss)
        self.update_teacher()

        monitored = {"loss": loss}
        if labels is not None:
            monitored["purity"] = self.queue.purity(shift.nearest, labels)
        monitored["embedding_std"] = embedding_std(embeddings)
        monitored["gradient_norm"] = gradient_norm
        monitored["learning_rate"] = learning_rate
        return monitored

    def get_config(self):
        mine = {"queue_size": self.queue.size, "neighbors": self.neighbors}
        return {**super().get_config(), **mine}
