"""ISD: self-supervised learning by iterative similarity distillation.

Tejankar et al., ICCV 2021, arXiv:2012.09259. The method is `train_step`, in the paper's order.
"""

import keras
import tensorflow as tf

from isd_tf.methods import losses
from isd_tf.methods.feature_queue import FeatureQueue
from isd_tf.methods.student import embedding_std
from isd_tf.methods.student_teacher import StudentTeacher
from isd_tf.training.distribution import gather_across_replicas


@keras.saving.register_keras_serializable("isd_tf")
class ISD(StudentTeacher):
    """A student that learns to see the neighbourhood which a slowly moving teacher sees.

    Example:

        encoder = isd_tf.build_encoder("resnet18", image_size=224)
        model = isd_tf.ISD(encoder, *isd_tf.isd_heads(512), queue_size=128_000)
        model.compile(isd_tf.TorchSGD(0.01))
        model.fit(batches, epochs=200, steps_per_epoch=5004)

    Batches are dicts of "teacher_view" and "student_view", as `pretraining_batches` makes them or
    normalised images [B, S, S, 3], and optionally "label", integers [B] that are only monitored. A
    step reports:

        loss                the KL divergence, nats, mean over the batch
        teacher_entropy     of the teacher's similarities, nats; log K where it sees no structure
        student_entropy     of the student's similarities, nats
        embedding_std       deviation of the teacher's embeddings over the global batch, mean over
                            dimensions, times sqrt(D): about 1 when spread out, 0 when collapsed
        purity              with labels: share of the 5 anchors nearest to the teacher's embedding
                            that carry the image's label; unknown labels never match
        gradient_norm       length of the loss's gradient over all weights; of several replicas, the
                            mean of each one's own
        learning_rate       that this step used

    Args:
        encoder, projector, predictor, shuffle_batch_norm, seed: as in `StudentTeacher`.
        queue_size: anchors K; at least the global batch. The paper's is 128 000.
        teacher_temperature: divides the teacher's similarities; the lower, the fewer neighbours
            matter. The paper's ISD has 0.02, its ISD+ 0.01.
        student_temperature: divides the student's similarities; 0.02 and 0.1.
        teacher_momentum: as in `StudentTeacher`; 0.999 and 0.99.

    Raises:
        ValueError: for a temperature that is not positive, or a momentum outside [0, 1].
    """

    def __init__(
        self,
        encoder: keras.Model,
        projector: keras.Model | None,
        predictor: keras.Model | None,
        queue_size: int = 128_000,
        teacher_temperature: float = 0.02,
        student_temperature: float = 0.02,
        teacher_momentum: float = 0.999,
        shuffle_batch_norm: bool = True,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(
            encoder, projector, predictor, teacher_momentum, shuffle_batch_norm, seed, **kwargs
        )
        for name, value in (
            ("teacher_temperature", teacher_temperature),
            ("student_temperature", student_temperature),
        ):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be greater than 0, and finite. Received: {value}.")
        self.teacher_temperature = teacher_temperature
        self.student_temperature = student_temperature
        self.queue = FeatureQueue(queue_size, self.embedding_dim, seed, name="queue")

    def train_step(self, batch):
        labels = batch.get("label")  # [b], never part of the loss
        learning_rate = tf.convert_to_tensor(self.optimizer.learning_rate)

        # Forward pass. The teacher's answer is the target and carries no gradient.
        teacher_embeddings = self.embed_teacher(batch["teacher_view"])  # [b, D] unit rows
        anchors = self.queue.read_anchors()  # [K, D] earlier batches only
        with tf.GradientTape() as tape:
            student_embeddings = self.embed_student(batch["student_view"])  # [b, D] unit rows
            distillation = losses.similarity_distillation(
                student_embeddings,
                teacher_embeddings,
                anchors,
                self.student_temperature,
                self.teacher_temperature,
                neighbors=0 if labels is None else self.queue.purity_neighbors,
            )
            loss = tf.reduce_mean(distillation.divergence)
        gradient_norm = self.update_student(tape, loss)
        self.update_teacher()

        monitored = {
            "loss": loss,
            "teacher_entropy": tf.reduce_mean(distillation.teacher_entropy),
            "student_entropy": tf.reduce_mean(distillation.student_entropy),
        }
        if labels is not None:
            monitored["purity"] = self.queue.purity(distillation.nearest, labels)

        # Last, so that a batch never meets itself among its anchors.
        embeddings = gather_across_replicas(teacher_embeddings)  # [B, D]
        self.queue.enqueue(embeddings, None if labels is None else gather_across_replicas(labels))

        monitored["embedding_std"] = embedding_std(embeddings)
        monitored["gradient_norm"] = gradient_norm
        monitored["learning_rate"] = learning_rate
        return monitored

    def get_config(self):
        mine = {
            "queue_size": self.queue.size,
            "teacher_temperature": self.teacher_temperature,
            "student_temperature": self.student_temperature,
        }
        return {**super().get_config(), **mine}
