"""The pair: a student that learns by gradients and a teacher that follows as its average.

This file owns how the teacher moves and what it sees. It knows no loss and no queue.
"""

import keras
import tensorflow as tf

from isd_tf.methods.student import Student
from isd_tf.networks.backbones import finalize_normalization, flat_layers
from isd_tf.networks.batch_norm import GroupedBatchNormalization
from isd_tf.training import distribution
from isd_tf.views import augment


@keras.saving.register_keras_serializable("isd_tf")
class StudentTeacher(Student):
    """A student, and a teacher that is the moving average of its weights.

    The teacher starts as a copy. Its weights are averaged, its BatchNorm statistics are not: they
    are its own, gathered from the views that it sees. Only the student, with its predictor, is
    trainable. In BYOL's words the student is the online network and the teacher the target; in
    MoCo's, query and key encoder.

    Args:
        encoder: images [B, S, S, 3] to features [B, C]; becomes the student.
        projector: features to [B, D], on both sides; or None.
        predictor: [B, D] to [B, D], on the student's side; or None.
        teacher_momentum: weight m in [0, 1] of the teacher's past: teacher <- m * teacher +
            (1 - m) * student.
        shuffle_batch_norm: whether the teacher sees its images shuffled across replicas. Of no
            effect on one replica, and pointless with synchronised BatchNorm.
        seed: of those permutations, together with the step.

    Raises:
        ValueError: if teacher_momentum is outside [0, 1].

    Source: paper section 3.1; UMBCvision/ISD train_isd.py:98-212.
    """

    def __init__(
        self,
        encoder: keras.Model,
        projector: keras.Model | None,
        predictor: keras.Model | None,
        teacher_momentum: float,
        shuffle_batch_norm: bool = True,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(encoder, seed, **kwargs)
        if not 0 <= teacher_momentum <= 1:
            raise ValueError(
                "teacher_momentum must be in [0, 1]: the share of its past that the teacher keeps "
                f"each step. Received: {teacher_momentum}."
            )
        self.teacher_momentum = teacher_momentum
        self.shuffle_batch_norm = shuffle_batch_norm

        self.student_projector = projector
        self.predictor = predictor
        self.teacher_encoder = _frozen_copy(encoder)
        self.teacher_projector = _frozen_copy(projector) if projector else None
        layers = flat_layers(encoder) + (flat_layers(projector) if projector else [])
        self._groups = any(isinstance(x, GroupedBatchNormalization) for x in layers)

    @property
    def embedding_dim(self) -> int:
        """Length D of the embeddings that student and teacher are compared by."""
        return (self.student_projector or self.student_encoder).output_shape[-1]

    def student_networks(self) -> list[keras.Model]:
        networks = (self.student_encoder, self.student_projector, self.predictor)
        return [network for network in networks if network]

    def encoders(self) -> dict[str, keras.Model]:
        return {"student": self.student_encoder, "teacher": self.teacher_encoder}

    def embed_teacher(self, view) -> tf.Tensor:
        """Returns the teacher's embeddings of a batch's view, as `embed_student` takes it.

        In training mode, so that student and teacher both normalise by batch statistics.
        """

        def embed(images):
            x = self.teacher_encoder(images, training=True)
            return self.teacher_projector(x, training=True) if self.teacher_projector else x

        def finish_and_embed(view):
            return self._compiled(embed)(augment.finish(view))

        if self.shuffle_batch_norm and (self._groups or distribution.number_of_replicas() > 1):
            # Crops are shuffled before they become views: a quarter of the bytes.
            seed = tf.stack([self.seed, self.step.value])
            x = distribution.call_shuffled(finish_and_embed, view, seed)
        else:
            x = finish_and_embed(view)
        return tf.stop_gradient(self._unit_rows(x))

    def update_teacher(self) -> None:
        """Moves the teacher's weights towards the student's.

        Right after the student's step, where the reference moves the teacher at the start of the
        next one (train_isd.py:183): the same sequence, as teacher and student start equal, and a
        checkpoint holds the teacher that the next step uses.
        """
        for teacher, student in self._followed_pairs():
            momentum = tf.constant(self.teacher_momentum, teacher.dtype)
            teacher.assign(momentum * teacher + (1 - momentum) * student)

    def get_config(self):
        networks = {
            "encoder": self.student_encoder,
            "projector": self.student_projector,
            "predictor": self.predictor,
        }
        return {
            "name": self.name,
            **{k: keras.saving.serialize_keras_object(v) for k, v in networks.items()},
            "teacher_momentum": self.teacher_momentum,
            "shuffle_batch_norm": self.shuffle_batch_norm,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        for network in ("encoder", "projector", "predictor"):
            config[network] = keras.saving.deserialize_keras_object(config[network])
        return cls(**config)

    def _followed_pairs(self):
        pairs = [(self.teacher_encoder, self.student_encoder)]
        if self.student_projector:
            pairs.append((self.teacher_projector, self.student_projector))
        for teacher, student in pairs:
            for theirs, ours in zip(teacher.weights, student.weights, strict=True):
                # BatchNorm's moving statistics are not trainable, and stay each network's own.
                if ours.trainable:
                    yield theirs, ours


def _frozen_copy(network: keras.Model) -> keras.Model:
    copy = keras.models.clone_model(network)
    copy.set_weights(network.get_weights())
    finalize_normalization(copy)
    # Variable by variable: `copy.trainable = False` would put BatchNorm into inference mode.
    for variable in copy.weights:
        variable.trainable = False
    return copy
