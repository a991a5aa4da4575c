"""CompRess: a small student sees what a given, large teacher sees.

Koohpayegani, Tejankar, Pirsiavash, NeurIPS 2020; ISD's parent. To be read beside `isd.py`: the same
divergence over the same queue, with a teacher that stands still.
"""

import keras
import tensorflow as tf

from isd_tf.methods import losses
from isd_tf.methods.feature_queue import FeatureQueue
from isd_tf.methods.student import Student, embedding_std
from isd_tf.networks.heads import compress_head
from isd_tf.networks.resizing import AntialiasedResizing
from isd_tf.training.distribution import gather_across_replicas
from isd_tf.views import augment


@keras.saving.register_keras_serializable("isd_tf")
class CompRess(Student):
    """A student that learns the similarities of a frozen teacher, which is handed over trained.

    Example:

        teacher = isd_tf.build_encoder("resnet50", image_size=224)
        isd_tf.load_weights(teacher, "moco_v2.pth")
        student = isd_tf.build_encoder("resnet18", image_size=224)
        model = isd_tf.CompRess(student, teacher)
        model.compile(isd_tf.TorchSGD(0.01))
        batches = isd_tf.pretraining_batches(train, ("crop",), 224, 256, seed=0)
        model.fit(batches, epochs=130, steps_per_epoch=5004)

    Batches hold one "view" of each image, which both networks see, or else "teacher_view" and
    "student_view"; and "label" as in `ISD`. A step reports what `ISD` reports.

    The student ends in a linear layer to the teacher's features, `head`, which encoder, exports and
    scores leave out. The teacher is no part of the model: neither trained nor moved, and in none of
    its weights, checkpoints and files.

    Args:
        encoder: becomes the student: normalised images [B, S, S, 3] to features.
        teacher: normalised images [B, T, T, 3] to features [B, D]; called in inference mode. Where
            T is not S, it is shown the student's view resized, antialiased. With a distribution
            strategy, build it in its scope.
        queue_size: anchors K; at least the global batch. The paper's is 128 000.
        temperature: divides the similarities of both; the paper's is 0.04.
        seed: of the queue's first rows, which are unit vectors here; the reference's are not.

    Raises:
        ValueError: for a temperature that is not positive, or networks that cannot see the same
            images.

    Source: UMBCvision/CompRess train_student_one_queue.py, nn/compress_loss.py.
    """

    def __init__(
        self,
        encoder: keras.Model,
        teacher: keras.Model,
        queue_size: int = 128_000,
        temperature: float = 0.04,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(encoder, seed, **kwargs)
        if not 0 < temperature < float("inf"):
            raise ValueError(
                f"temperature must be greater than 0, and finite. Received: {temperature}."
            )
        self.temperature = temperature
        self.given = _Given(_shown(teacher, encoder.input_shape[1:]))
        self.head = compress_head(encoder.output_shape[-1], teacher.output_shape[-1])
        self.queue = FeatureQueue(queue_size, teacher.output_shape[-1], seed, name="queue")

    def student_networks(self) -> list[keras.Model]:
        return [self.student_encoder, self.head]

    def encoders(self) -> dict[str, keras.Model]:
        return {"student": self.student_encoder, "teacher": self.given.teacher}

    def embed_teacher(self, view) -> tf.Tensor:
        """Returns the teacher's features of a batch's view as unit rows [b, D].

        By its moving statistics, where ISD's teacher normalises by those of the batch.
        """

        def embed(images):
            return self.given.teacher(images, training=False)

        embeddings = self._unit_rows(self._compiled(embed)(augment.finish(view)))
        return tf.stop_gradient(embeddings)

    def train_step(self, batch):
        labels = batch.get("label")  # [b], never part of the loss
        learning_rate = tf.convert_to_tensor(self.optimizer.learning_rate)

        if "view" in batch:
            # Finished once: both networks see the same pixels.
            teacher_view = student_view = augment.finish(batch["view"])
        else:
            teacher_view, student_view = batch["teacher_view"], batch["student_view"]

        # Forward pass. The teacher's answer is the target and carries no gradient.
        teacher_embeddings = self.embed_teacher(teacher_view)  # [b, D] unit rows
        anchors = self.queue.read_anchors()  # [K, D] earlier batches only
        with tf.GradientTape() as tape:
            student_embeddings = self.embed_student(student_view)  # [b, D] unit rows
            distillation = losses.similarity_distillation(
                student_embeddings,
                teacher_embeddings,
                anchors,
                self.temperature,
                self.temperature,
                neighbors=0 if labels is None else self.queue.purity_neighbors,
            )
            loss = tf.reduce_mean(distillation.divergence)
        gradient_norm = self.update_student(tape, loss)

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
        raise NotImplementedError(
            "A CompRess model is not saved whole, as its teacher is no part of it. Save "
            "student_encoder, or use save_weights, and load_weights in a model made anew."
        )


class _Given:
    """Holds the teacher where neither Keras nor TensorFlow looks for weights."""

    def __init__(self, teacher: keras.Model):
        self.teacher = teacher


def _shown(teacher, shape):
    """The teacher as a network for images of the student's shape: itself, or behind a resize."""
    own = teacher.input_shape[1:]
    if len(teacher.output_shape) != 2:
        raise ValueError(
            "A teacher must give one vector of features for each image. Received: an output of "
            f"{teacher.output_shape}. Pool it."
        )
    if len(own) == len(shape) and all(a in (None, b) for a, b in zip(own, shape, strict=True)):
        return teacher
    if len(own) != 3 or len(shape) != 3 or own[2] != shape[2] or None in own:
        raise ValueError(
            "Teacher and student must see the same images. Received: a teacher for images "
            f"{own}, and a student for {shape}."
        )
    # In the weights' precision: half of it would blur the teacher's sight.
    dtype = keras.config.dtype_policy().variable_dtype
    images = keras.Input(shape, dtype=dtype, name="images")
    resized = AntialiasedResizing(*own[:2], dtype=dtype, name="resized")(images)
    return keras.Model(images, teacher(resized), name=teacher.name)
