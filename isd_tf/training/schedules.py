"""Learning rate schedules of the paper: constant inside an epoch, a function of the step alone.

Being functions of the optimizer's step, they need no callback and continue exactly after a resume.
"""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("isd_tf")
class CosineByEpoch(keras.optimizers.schedules.LearningRateSchedule):
    """0.5 * initial * (1 + cos(pi * epoch / epochs)), epochs counted from 0.

    Args:
        initial: learning rate of the first epoch.
        epochs: length of the training.
        steps_per_epoch: optimizer steps in an epoch.

    Source: UMBCvision/ISD util.py:9-22, whose epochs count from 1.
    """

    def __init__(self, initial: float, epochs: int, steps_per_epoch: int):
        self.initial = initial
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch

    def __call__(self, step):
        epoch = tf.cast(step // self.steps_per_epoch, tf.float32)
        return 0.5 * self.initial * (1 + tf.cos(3.141592653589793 * epoch / self.epochs))

    def get_config(self):
        return dict(initial=self.initial, epochs=self.epochs, steps_per_epoch=self.steps_per_epoch)


@keras.saving.register_keras_serializable("isd_tf")
class DropsByEpoch(keras.optimizers.schedules.LearningRateSchedule):
    """`initial`, multiplied by `factor` once each of `drop_epochs` has begun.

    Args:
        initial: learning rate of the first epoch.
        drop_epochs: epochs counted from 1, as the paper counts them: 141 drops after 140 epochs.
        factor: of each drop; the paper's is 0.2.
        steps_per_epoch: optimizer steps in an epoch.

    Source: UMBCvision/ISD util.py:9-22 and train_isd.py:40-47.
    """

    def __init__(self, initial: float, drop_epochs: list[int], factor: float, steps_per_epoch: int):
        self.initial = initial
        self.drop_epochs = [int(epoch) for epoch in drop_epochs]
        self.factor = factor
        self.steps_per_epoch = steps_per_epoch

    def __call__(self, step):
        epoch = step // self.steps_per_epoch + 1
        drops = sum(tf.cast(epoch >= drop, tf.float32) for drop in self.drop_epochs)
        return self.initial * tf.pow(self.factor, tf.cast(drops, tf.float32))

    def get_config(self):
        return dict(
            initial=self.initial,
            drop_epochs=self.drop_epochs,
            factor=self.factor,
            steps_per_epoch=self.steps_per_epoch,
        )
