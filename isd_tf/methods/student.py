"""The student: what every method trains, how a step moves it, and how `fit` takes steps.

This file knows no teacher, no loss and no queue.
"""

import keras
import tensorflow as tf

from isd_tf.networks.backbones import flat_layers
from isd_tf.training import distribution
from isd_tf.views import augment


class Student(keras.Model):
    """An encoder that learns behind a head, by a method that gives it its `train_step`.

    Args:
        encoder: images [B, S, S, 3] to features [B, C].
        seed: of what a method draws in its steps.
    """

    def __init__(self, encoder: keras.Model, seed: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.seed = seed
        self.student_encoder = encoder
        self.step = self.add_weight(
            name="step", shape=(), dtype="int64", initializer="zeros", trainable=False,
            autocast=False, aggregation="none",
        )  # fmt: skip
        self.built = True

    def student_networks(self) -> list[keras.Model]:
        """What the student's embeddings pass through, in order: the encoder and its heads."""
        raise NotImplementedError

    def encoders(self) -> dict[str, keras.Model]:
        """What is scored: "student" and "teacher", normalised images [B, S, S, 3] to features."""
        raise NotImplementedError

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
        layers = [layer for network in self.student_networks() for layer in flat_layers(network)]
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
            x = images
            for network in self.student_networks():
                x = network(x, training=True)
            return x

        return self._unit_rows(self._compiled(embed)(augment.finish(view)))

    def update_student(self, tape: tf.GradientTape, loss: tf.Tensor) -> tf.Tensor:
        """Takes one optimizer step on the mean `loss` (a scalar) of this replica's examples.

        Returns:
            The length of this loss's gradient, over all weights; a scalar.
        """
        with tape:
            # The optimizer adds the replicas' gradients; the batch's mean wants their average.
            scaled = self.optimizer.scale_loss(loss / distribution.number_of_replicas())
        gradients = tape.gradient(scaled, self.trainable_variables)
        # Those of position embeddings, which replicas could not add up otherwise.
        gradients = [
            tf.convert_to_tensor(x) if isinstance(x, tf.IndexedSlices) else x for x in gradients
        ]
        scale = self.optimizer.scale_loss(1 / distribution.number_of_replicas())
        norm = tf.linalg.global_norm(gradients) / tf.cast(scale, gradients[0].dtype)
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            gradients = distribution.spread_overflow(gradients)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.step.assign_add(1)
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            # By itself it leaves out steps that overflowed in float16, and the learning rate, which
            # follows its count, would lag behind the epochs.
            iterations = self.optimizer.iterations
            iterations.assign(tf.cast(self.step, iterations.dtype))
        return norm

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


def _time_is_told():
    """Whether operations may ask for the time; not under TensorFlow's op determinism."""
    try:
        return bool(tf.timestamp())
    except tf.errors.FailedPreconditionError:
        return False
