"""BatchNorm with PyTorch's meaning, over a batch, its groups, or all replicas."""

import keras
import tensorflow as tf
from keras import layers

# What TensorFlow's fused kernel takes; its statistics are float32.
FUSED_DTYPES = ("float32", "bfloat16", "float16")


def batch_norm(synchronized: bool, groups: int, name: str) -> layers.BatchNormalization:
    """BatchNorm with PyTorch's constants (its momentum 0.1 is Keras' 0.9)."""
    settings = dict(momentum=0.9, epsilon=1e-5, name=name)
    if groups > 1:
        if synchronized:
            raise ValueError(
                "BatchNorm's statistics are either synchronised or those of groups. Received: "
                f"synchronized=True, groups={groups}."
            )
        return GroupedBatchNormalization(groups, **settings)
    return BatchNormalization(synchronized=synchronized, **settings)


@keras.saving.register_keras_serializable("isd_tf")
class BatchNormalization(layers.BatchNormalization):
    """BatchNorm over the last axis: Keras', by one fused kernel, and with PyTorch's statistics.

    A batch is normalised by its own variance, divided by n; the moving variance gathers the
    unbiased one, divided by n - 1, as PyTorch's does and Keras' own layer does not. n counts the
    values of a channel, with `synchronized` those of all replicas.

    TensorFlow's fused kernel knows neither double precision nor other replicas: there, and only
    there, mean and variance are taken one by one.

    Args:
        **kwargs: as in keras.layers.BatchNormalization; axis and renorm must stay as they are.
    """

    def call(self, inputs, training=None, mask=None):
        del mask  # As Keras' layer takes one, in whose place this may stand; images have none.
        if training and self.trainable:
            outputs, mean, variance = self._normalize(inputs)
            for moving, statistic in ((self.moving_mean, mean), (self.moving_variance, variance)):
                moving.assign(moving * self.momentum + statistic * (1 - self.momentum))
            return outputs
        if inputs.dtype in FUSED_DTYPES:
            return self._fused(inputs, (self.moving_mean, self.moving_variance))[0]
        return super().call(inputs, training=False)

    def _normalize(self, x):
        """Returns x [B, ..., C] normalised, and its mean and unbiased variance, each [C]."""
        if self.synchronized or x.dtype not in FUSED_DTYPES:
            return self._normalize_by_moments(x)
        return self._fused(x)

    def _fused(self, x, statistics=None):
        """The same by the fused kernel; or normalises by `statistics`: mean and variance."""
        is_vector, channels = x.shape.rank == 2, x.shape[-1:]
        mean, variance = (tf.cast(y, tf.float32) for y in statistics or ([], []))
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x[:, tf.newaxis, tf.newaxis] if is_vector else x,
            scale=tf.cast(self.gamma, tf.float32) if self.scale else tf.ones(channels),
            offset=tf.cast(self.beta, tf.float32) if self.center else tf.zeros(channels),
            mean=mean,
            variance=variance,
            epsilon=self.epsilon,
            is_training=statistics is None,
        )
        return outputs[:, 0, 0] if is_vector else outputs, mean, variance

    def _normalize_by_moments(self, x):
        # In the weights' precision, also where the network computes in half of it.
        x = tf.cast(x, self.variable_dtype)
        axes = list(range(x.shape.rank - 1))
        mean, variance = keras.ops.moments(x, axes, synchronized=self.synchronized)
        outputs = tf.nn.batch_normalization(x, mean, variance, self.beta, self.gamma, self.epsilon)
        count = tf.reduce_prod(tf.shape(x)[:-1])
        if self.synchronized:
            count *= tf.distribute.get_strategy().num_replicas_in_sync
        count = tf.cast(count, x.dtype)
        unbiased = variance * (count / tf.maximum(count - 1, 1))
        return tf.cast(outputs, self.compute_dtype), mean, unbiased


@keras.saving.register_keras_serializable("isd_tf")
class GroupedBatchNormalization(BatchNormalization):
    """BatchNorm over each of several groups of a batch: one device with the statistics of many.

    A batch [B, ..., C] is normalised in `groups` parts of B / groups consecutive examples, as that
    many devices would. The moving statistics gather the mean of the groups' own.

    Args:
        groups: number of parts; must divide the batch.
        **kwargs: as in BatchNormalization.

    Raises:
        ValueError: if groups is not positive, or does not divide a batch.
    """

    def __init__(self, groups: int, **kwargs):
        super().__init__(**kwargs)
        if groups < 1:
            raise ValueError(f"BatchNorm needs at least one group. Received: groups={groups}.")
        self.groups = groups

    def _normalize(self, x):
        if (x.shape[0] or 0) % self.groups:
            raise ValueError(
                f"BatchNorm's {self.groups} groups share a batch evenly. Received: a batch of "
                f"{x.shape[0]}. Use a multiple of {self.groups}."
            )
        normalize = super()._normalize
        parts = [normalize(part) for part in tf.split(x, self.groups)]
        outputs, means, variances = zip(*parts, strict=True)
        outputs = tf.ensure_shape(tf.concat(outputs, axis=0), x.shape)
        return outputs, tf.add_n(means) / self.groups, tf.add_n(variances) / self.groups

    def get_config(self):
        return {**super().get_config(), "groups": self.groups}
