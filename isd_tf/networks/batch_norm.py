"""BatchNorm with PyTorch's constants, over a batch, its groups, or all replicas."""

import keras
import tensorflow as tf
from keras import layers


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
    return layers.BatchNormalization(synchronized=synchronized, **settings)


@keras.saving.register_keras_serializable("isd_tf")
class GroupedBatchNormalization(layers.BatchNormalization):
    """BatchNorm over each of several groups of a batch: one device with the statistics of many.

    A batch [B, ..., C] is normalised in `groups` parts of B / groups consecutive examples, as that
    many devices would. The moving statistics gather the mean of the groups' own.

    Args:
        groups: number of parts; must divide the batch.
        **kwargs: as in keras.layers.BatchNormalization.

    Raises:
        ValueError: if groups is not positive, or does not divide a batch.
    """

    def __init__(self, groups: int, **kwargs):
        super().__init__(**kwargs)
        if groups < 1:
            raise ValueError(f"BatchNorm needs at least one group. Received: groups={groups}.")
        self.groups = groups

    def call(self, inputs, training=None, mask=None):
        if not training:
            return super().call(inputs, training=False, mask=mask)
        if (inputs.shape[0] or 0) % self.groups:
            raise ValueError(
                f"BatchNorm's {self.groups} groups share a batch evenly. Received: a batch of "
                f"{inputs.shape[0]}. Use a multiple of {self.groups}."
            )
        shape = tf.shape(inputs)
        # In the weights' precision, also where the network computes in half of it.
        x = tf.cast(inputs, self.variable_dtype)
        x = tf.reshape(x, tf.concat([[self.groups, shape[0] // self.groups], shape[1:]], 0))
        axes = list(range(1, inputs.shape.rank))
        mean, variance = tf.nn.moments(x, axes, keepdims=True)  # [groups, 1, ..., C]
        for moving, statistic in ((self.moving_mean, mean), (self.moving_variance, variance)):
            new = tf.reshape(tf.reduce_mean(statistic, axis=0), [-1])
            moving.assign(moving * self.momentum + new * (1 - self.momentum))
        x = tf.nn.batch_normalization(x, mean, variance, self.beta, self.gamma, self.epsilon)
        return tf.cast(tf.ensure_shape(tf.reshape(x, shape), inputs.shape), self.compute_dtype)

    def get_config(self):
        return {**super().get_config(), "groups": self.groups}
