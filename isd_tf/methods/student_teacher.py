"""The pair: a student that learns by gradients and a teacher that follows as its average.

This file owns who moves how, what is trained and what is saved. It knows no loss and no queue.
"""

import keras
import tensorflow as tf

from isd_tf.networks.backbones import finalize_normalization, flat_layers
from isd_tf.networks.batch_norm import GroupedBatchNormalization
from isd_tf.training import distribution
from isd_tf.views import augment


@keras.saving.register_keras_serializable("isd_tf")
class StudentTeacher(keras.Model):
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
        super().__init__(**kwargs)
        if not 0 <= teacher_momentum <= 1:
            raise ValueError(
                "teacher_momentum must be in [0, 1]: the share of its past that the teacher keeps "
                f"each step. Received: {teacher_momentum}."
            )
        self.teacher_momentum = teacher_momentum
        self.shuffle_batch_norm = shuffle_batch_norm
        self.seed = seed

        self.student_encoder = encoder
        self.student_projector = projector
        self.predictor = predictor
        self.teacher_encoder = _frozen_copy(encoder)
        self.teacher_projector = _frozen_copy(projector) if projector else None
        self.step = self.add_weight(
            name="step", shape=(), dtype="int64", initializer="zeros", trainable=False,
            autocast=False, aggregation="none",
        )  # fmt: skip
        layers = flat_layers(encoder) + (flat_layers(projector) if projector else [])
        self._groups = any(isinstance(x, GroupedBatchNormalization) for x in layers)
        self.built = True

    @property
    def embedding_dim(self) -> int:
        """Length D of the embeddings that student and teacher are compared by."""
        return (self.student_projector or self.student_encoder).output_shape[-1]

    def compile(self, optimizer, jit_compile=False, **kwargs):
        """Keras' compile; builds the optimizer, so that a checkpoint finds all its variables.

        Args:
            optimizer: of the student. Under the policy mixed_float16, Keras wraps it in its
                LossScaleOptimizer.
            jit_compile: whether XLA compiles the networks, forward and backward. What replicas
                tell each other stays outside, as XLA cannot hold it on every device.
            **kwargs: as Keras', `steps_per_execution` among them.

        Raises:
            ValueError: for jit_compile with synchronised BatchNorm, which communicates inside.
        """
        networks = (self.student_encoder, self.student_projector, self.predictor)
        layers = [layer for network in networks if network for layer in flat_layers(network)]
        synchronized = [layer.name for layer in layers if getattr(layer, "synchronized", False)]
        if jit_compile and synchronized:
            raise ValueError(
                "XLA cannot compile networks whose BatchNorm is synchronised across replicas. "
                f"Received: jit_compile=True with {synchronized[0]} and {len(synchronized) - 1} "
                "more. Choose another BatchNorm (--batch_norm=shuffled), or leave --compile out."
            )
        super().compile(optimizer=optimizer, jit_compile=jit_compile, **kwargs)
        self.optimizer.build(self.trainable_variables)

    def compile_from_config(self, config):
        """Keras' counterpart of `compile`, for a model that is loaded from a file."""
        config = keras.saving.deserialize_keras_object(config)
        self.compile(
            config["optimizer"],
            config["jit_compile"],
            steps_per_execution=config["steps_per_execution"],
        )

    def call(self, images, training=False):
        """Features [B, C] of the student's encoder for normalised images [B, S, S, 3]."""
        return self.student_encoder(images, training=training)

    def embed_student(self, view) -> tf.Tensor:
        """Returns the student's embeddings of a batch's view: [b, D] unit rows.

        Args:
            view: as `augment.finish` takes it: normalised images [b, S, S, 3], or crops and seeds.
        """

        def embed(images):
            x = self.student_encoder(images, training=True)
            if self.student_projector:
                x = self.student_projector(x, training=True)
            return self.predictor(x, training=True) if self.predictor else x

        return self._unit_rows(self._compiled(embed)(augment.finish(view)))

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

    def update_student(self, tape: tf.GradientTape, loss: tf.Tensor) -> None:
        """Takes one optimizer step on the mean `loss` (a scalar) of this replica's examples."""
        with tape:
            # The optimizer adds the replicas' gradients; the batch's mean wants their average.
            scaled = self.optimizer.scale_loss(loss / distribution.number_of_replicas())
        gradients = tape.gradient(scaled, self.trainable_variables)
        # Those of position embeddings, which replicas could not add up otherwise.
        gradients = [
            tf.convert_to_tensor(x) if isinstance(x, tf.IndexedSlices) else x for x in gradients
        ]
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            gradients = distribution.spread_overflow(gradients)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.step.assign_add(1)
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            # By itself it leaves out steps that overflowed in float16, and the learning rate, which
            # follows its count, would lag behind the epochs.
            iterations = self.optimizer.iterations
            iterations.assign(tf.cast(self.step, iterations.dtype))

    def update_teacher(self) -> None:
        """Moves the teacher's weights towards the student's.

        Right after the student's step, where the reference moves the teacher at the start of the
        next one (train_isd.py:183): the same sequence, as teacher and student start equal, and a
        checkpoint holds the teacher that the next step uses.
        """
        for teacher, student in self._followed_pairs():
            momentum = tf.constant(self.teacher_momentum, teacher.dtype)
            teacher.assign(momentum * teacher + (1 - momentum) * student)

    def make_train_function(self, force=False):
        """Keras' hook: one call takes `steps_per_execution` steps and returns their mean logs.

        In place of Keras' own, which fails on several workers (keras-team/keras#20585), and with
        more than one step an execution on several replicas. To the logs of `train_step` it adds
        "waiting_seconds", how long a step waited for its batch, except under TensorFlow's op
        determinism, which tells no time.
        """
        if self.train_function is not None and not force:
            return self.train_function
        strategy, steps = self.distribute_strategy, self.steps_per_execution
        names = []
        timed = _time_is_told()
        now = tf.timestamp if timed else lambda: tf.constant(0.0, tf.float64)

        # AutoGraph would search the step's source for loops, which takes seconds; it has none.
        @tf.autograph.experimental.do_not_convert
        def replica_step(batch):
            logs = self.train_step(batch)
            names[:] = logs
            # In one vector, so that replicas exchange one message and not one a name.
            vector = tf.stack([tf.cast(value, logs["loss"].dtype) for value in logs.values()])
            return distribution.mean_over_replicas(vector)

        def one_step(iterator):
            asked = now()
            with tf.control_dependencies([asked]):
                batch = next(iterator)
            with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
                waited = now() - asked
            vectors = strategy.run(replica_step, args=(batch,))
            vector = strategy.experimental_local_results(vectors)[0]
            return tf.concat([vector, [tf.cast(waited, vector.dtype)]], axis=0)

        def train_function(iterator):
            total = one_step(iterator)
            if steps > 1:
                for _ in tf.range(steps - 1):
                    total += one_step(iterator)
                total /= steps
            logs = dict(zip([*names, "waiting_seconds"], tf.unstack(total), strict=True))
            return logs if timed else {name: logs[name] for name in names}

        if not self.run_eagerly:
            train_function = tf.function(train_function, reduce_retracing=True)
        self.train_function = train_function
        return train_function

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Keras' private hook: nothing is left to build.

        Keras would draw a batch to find the shapes, from an iterator of its own, and fail on
        several workers.
        """

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

    def _compiled(self, network):
        return tf.function(network, jit_compile=True) if self.jit_compile else network

    def _unit_rows(self, x):
        # In the variables' precision, also where mixed precision computes in half of it.
        return tf.math.l2_normalize(tf.cast(x, self.variable_dtype), axis=1)


def embedding_std(embeddings: tf.Tensor) -> tf.Tensor:
    """Spread of unit rows [B, D]: their deviation over B, mean over D, times sqrt(D).

    About 1 where they are spread over the sphere, 0 where they have collapsed.
    """
    dimension = tf.cast(tf.shape(embeddings)[1], embeddings.dtype)
    return tf.reduce_mean(tf.math.reduce_std(embeddings, axis=0)) * tf.sqrt(dimension)


def _frozen_copy(network: keras.Model) -> keras.Model:
    copy = keras.models.clone_model(network)
    copy.set_weights(network.get_weights())
    finalize_normalization(copy)
    # Variable by variable: `copy.trainable = False` would put BatchNorm into inference mode.
    for variable in copy.weights:
        variable.trainable = False
    return copy


def _time_is_told():
    """Whether operations may ask for the time; not under TensorFlow's op determinism."""
    try:
        return bool(tf.timestamp())
    except tf.errors.FailedPreconditionError:
        return False
