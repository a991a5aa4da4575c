"""The reference's optimizer: PyTorch's SGD, which Keras' SGD is not."""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("isd_tf")
class TorchSGD(keras.optimizers.Optimizer):
    """SGD with momentum and coupled weight decay, in PyTorch's meaning.

        buffer <- momentum * buffer + (gradient + weight_decay * weight)
        weight <- weight - learning_rate * buffer

    Keras' SGD decouples the decay (about ten times weaker at momentum 0.9) and stores the learning
    rate of the past in its buffer, so that a drop of the rate lags.

    Args:
        learning_rate: a number or a schedule of the step.
        sgd_momentum: in [0, 1).
        coupled_weight_decay: applied to every trainable weight, BatchNorm and biases included, as
            the reference does.

    Raises:
        ValueError: for values outside their range.

    Source: UMBCvision/ISD train_isd.py:155-158; torch.optim.SGD.
    """

    def __init__(
        self,
        learning_rate=0.05,
        sgd_momentum: float = 0.9,
        coupled_weight_decay: float = 1e-4,
        name: str = "torch_sgd",
        **kwargs,
    ):
        if not 0 <= sgd_momentum < 1:
            raise ValueError(f"sgd_momentum must be in [0, 1). Received: {sgd_momentum}.")
        if coupled_weight_decay < 0:
            raise ValueError(
                f"The weight decay must not be negative. Received: {coupled_weight_decay}."
            )
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.sgd_momentum = sgd_momentum
        self.coupled_weight_decay = coupled_weight_decay

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.buffers = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient, variable, learning_rate):
        buffer = self.buffers[self._get_variable_index(variable)].value
        # One kernel, which keeps the rate out of the buffer as PyTorch does.
        tf.raw_ops.ResourceApplyMomentum(
            var=variable.handle,
            accum=buffer.handle,
            lr=tf.cast(learning_rate, variable.dtype),
            grad=gradient + self.coupled_weight_decay * variable,
            momentum=tf.constant(self.sgd_momentum, variable.dtype),
        )

    def get_config(self):
        mine = dict(sgd_momentum=self.sgd_momentum, coupled_weight_decay=self.coupled_weight_decay)
        return {**super().get_config(), **mine}
