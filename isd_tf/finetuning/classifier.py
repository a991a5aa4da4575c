"""A classifier: a pretrained encoder with a linear head, that remembers the best it has been.

First the head alone is fitted to the frozen encoder's features (`fit_head`); this is epoch 0. Then
`fit` trains both, after each epoch `KeepBest` scores them on held-out images, and the best epoch's
weights are what counts in the end. All of it is in the model's variables, and so in its
checkpoints.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from isd_tf.evaluation import linear
from isd_tf.evaluation.features import Features, require_classes, require_labels

# What a class may count more than an average one: a single image must not overthrow a step.
LARGEST_CLASS_WEIGHT = 10.0


class Score(NamedTuple):
    """How good a classifier is on held-out images; the lower loss is the better one.

    Few images are held out where few are labelled, and of the same kind as those that are trained
    on: their accuracy soon stands still, and changes by chance, while the loss still tells.
    """

    accuracy: float  # share of the images that is right, each counted by its class' weight
    loss: float  # mean cross-entropy, nats, weighted likewise


class Classifier(keras.Model):
    """An encoder and a head: normalised images [B, S, S, 3] to logits [B, K].

    The head stands on features at unit length, standardised feature by feature, as the linear
    classifiers of isd_tf.evaluation do: a BatchNorm without scale and offset, and a dense layer.

    Args:
        encoder: images to features [B, C].
        classes: K, at least 2.
        synchronized_batch_norm: whether the head's statistics are those of all replicas.

    Raises:
        ValueError: for fewer than two classes.
    """

    def __init__(
        self,
        encoder: keras.Model,
        classes: int,
        synchronized_batch_norm: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if classes < 2:
            raise ValueError(f"A classifier needs two classes. Received: {classes}.")
        self.classes = classes
        self.encoder = encoder
        self.standardize = layers.BatchNormalization(
            momentum=0.9,
            epsilon=linear.EPSILON,
            center=False,
            scale=False,
            synchronized=synchronized_batch_norm,
            name="standardize",
        )
        self.dense = layers.Dense(classes, dtype=self.variable_dtype, name="logits")
        features = keras.Input((encoder.output_shape[-1],), name="features")
        unit = layers.UnitNormalization(name="unit_length")(features)
        self.head = keras.Model(features, self.dense(self.standardize(unit)), name="head")

        self.best_epoch = self._add_memory("best_epoch", (), "int64")
        self.best_accuracy = self._add_memory("best_accuracy", (), "float64")
        self.best_loss = self._add_memory("best_loss", (), "float64")
        self._best_weights = [
            self._add_memory(f"best_{weight.path.replace('/', '_')}", weight.shape, weight.dtype)
            for weight in self._network_weights
        ]
        self.built = True

    def _add_memory(self, name, shape, dtype):
        return self.add_weight(
            name=name, shape=shape, dtype=dtype, initializer="zeros", trainable=False,
            autocast=False, aggregation="none",
        )  # fmt: skip

    @property
    def _network_weights(self):
        return [*self.encoder.weights, *self.head.weights]

    @property
    def step(self) -> keras.Variable:
        """Optimizer steps taken so far, as the checkpoints count them."""
        return self.optimizer.iterations

    def compile(self, optimizer, **kwargs):
        """Keras' compile, for integer labels; builds the optimizer, for the checkpoints."""
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        # Keras' own choice is XLA, which it cannot have on several replicas.
        super().compile(optimizer=optimizer, loss=loss, jit_compile=False, **kwargs)
        self.optimizer.build(self.trainable_variables)

    def call(self, images, training=False):
        """Logits [B, K] of normalised images [B, S, S, 3]."""
        return self.head(self.encoder(images, training=training), training=training)

    def set_head(self, classifiers: linear.Classifiers, index: int) -> None:
        """Makes the head one of the linear classifiers that were fitted to the encoder's features.

        Args:
            classifiers: G of them, of K classes.
            index: which.
        """
        self.standardize.moving_mean.assign(classifiers.mean)
        self.standardize.moving_variance.assign(
            classifiers.inverse_deviation**-2.0 - linear.EPSILON
        )
        self.dense.kernel.assign(classifiers.weights[index])
        self.dense.bias.assign(classifiers.biases[index])

    def keep_if_better(self, epoch: int, score: Score) -> None:
        """Remembers the present weights if they are the best so far; epoch 0 is the first.

        Args:
            epoch: epochs of `fit` that led to them.
            score: theirs.
        """
        if epoch == 0 or score.loss < self.best_score.loss:
            self.best_epoch.assign(epoch)
            self.best_accuracy.assign(score.accuracy)
            self.best_loss.assign(score.loss)
            for best, weight in zip(self._best_weights, self._network_weights, strict=True):
                best.assign(weight.value)

    @property
    def best_score(self) -> Score:
        """The score of the best weights."""
        return Score(float(self.best_accuracy.numpy()), float(self.best_loss.numpy()))

    def epochs_since_best(self, epoch: int) -> int:
        """How many epochs, of `epoch` so far, have passed since the best one."""
        return epoch - int(self.best_epoch.numpy())

    def return_to_best(self) -> None:
        """Takes the best weights."""
        for best, weight in zip(self._best_weights, self._network_weights, strict=True):
            weight.assign(best.value)


class KeepBest(keras.callbacks.Callback):
    """Scores the classifier after every epoch, and stops when none has been better for a while.

    Adds "held_out_accuracy" and "held_out_loss" to the logs. Stands before SaveCheckpoints, so that
    an epoch's checkpoint knows its score.

    Args:
        score: says how good the classifier is now.
        patience: epochs without a better one, after which the training stops.
    """

    def __init__(self, score: Callable[[], Score], patience: int):
        super().__init__()
        self.score = score
        self.patience = patience

    def on_epoch_end(self, epoch, logs=None):
        score = self.score()
        logs.update(held_out_accuracy=score.accuracy, held_out_loss=score.loss)
        self.model.keep_if_better(epoch + 1, score)
        if self.model.epochs_since_best(epoch + 1) >= self.patience:
            self.model.stop_training = True


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Weights by which every class counts the same: N / (K n), but at most LARGEST_CLASS_WEIGHT.

    Args:
        labels: int64 [N].
        classes: K, each with n labels, at least one.

    Returns:
        float64 [K]. Without the limit their mean over the labels is 1.
    """
    counts = np.bincount(labels, minlength=classes)
    return np.minimum(len(labels) / (classes * counts), LARGEST_CLASS_WEIGHT)


def score_of(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Score:
    """Scores logits [N, K] by labels [N] and the classes' weights [K]."""
    weights = weights[labels] / weights[labels].sum()
    right = logits.argmax(axis=1) == labels
    shifted = logits - logits.max(axis=1, keepdims=True)
    own = np.take_along_axis(shifted, labels[:, np.newaxis], axis=1)[:, 0]
    cross_entropy = np.log(np.exp(shifted).sum(axis=1)) - own
    return Score(float(right @ weights), float(cross_entropy @ weights))


def fit_head(
    classifier: Classifier, features: Features, held_out: Features, weights: np.ndarray
) -> float:
    """Fits the head to the frozen encoder's features, by L-BFGS, and remembers it as epoch 0.

    L2 is chosen on the held-out images, of the values that isd_tf.evaluation tries for few labels.

    Args:
        classifier: whose encoder has made the features.
        features: to fit.
        held_out: to choose by.
        weights: [K], of the classes.

    Returns:
        The chosen L2, for a mean over the images.

    Raises:
        ValueError: when a class has no image to fit.
    """
    require_labels(features.labels, "training images")
    require_classes(np.arange(classifier.classes), features.labels, "training images")
    decays = linear.FEW_LABELS_WEIGHT_DECAYS
    fitted = linear.fit(features, [decay * len(features.labels) for decay in decays], weights)
    scores = [score_of(x, held_out.labels, weights) for x in fitted.logits(held_out.values)]
    best = min(range(len(scores)), key=lambda i: scores[i].loss)
    classifier.set_head(fitted, best)
    classifier.keep_if_better(0, scores[best])
    return decays[best]


def logits_function(
    classifier: keras.Model,
) -> Callable[[Iterable], tuple[np.ndarray, np.ndarray]]:
    """Makes a function from batches of views and labels to all logits [N, K] and labels [N].

    Raises (the function):
        ValueError: for logits that are not finite.
    """

    @tf.function(reduce_retracing=True)
    def infer(views):
        return tf.cast(classifier(views, training=False), tf.float32)

    def logits_of(batches):
        logits, labels = zip(*((infer(views), known) for views, known in batches), strict=True)
        logits, labels = np.concatenate(logits), np.concatenate(labels)
        if not np.isfinite(logits).all():
            raise ValueError(
                "The classifier's logits must be finite. Received NaN or infinity: its weights or "
                "BatchNorm statistics have diverged. Lower --learning_rate, in another --workdir."
            )
        return logits, labels

    return logits_of
