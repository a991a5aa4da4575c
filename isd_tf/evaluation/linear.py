"""Linear classifiers on frozen features: the reference's protocol, and a fast one.

Both see features that are L2-normalised and then standardised, by the statistics of the
normalised, centre-cropped training features. `train` follows the reference: random views and SGD.
`fit` finds the minimum of the same objective on the centre-cropped features by L-BFGS: no random
views, converged instead of stopped after 40 epochs, and without weight decay on the bias.

Several settings are tried at once, and the choice among them made on examples held out of the
training set; then the chosen one is trained on all of it.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # scikit-learn depends on it.

from isd_tf.data import subsets
from isd_tf.data.datasets import Dataset
from isd_tf.evaluation.features import CHUNK, Features, require_classes, require_labels, unit_rows

# The reference's: UMBCvision/ISD eval_linear.py:31-75.
EPOCHS = 40
DROP_EPOCHS = (15, 30)  # epochs counted from 0 that begin with a tenth of the rate
LEARNING_RATE = 0.01
SGD_MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
BATCH = 256
EPSILON = 1e-5
# Of a training set, where hyper-parameters are chosen.
HELD_OUT_SHARE = 0.2
# Of L-BFGS: it stops where no entry of the mean gradient is larger than this over the number of
# classes (each class has about that share of it), or after so many iterations.
TOLERANCE = 1e-4
MAX_ITERATIONS = 1000
# Products of fewer multiplications are done before several threads have met: on two busy cores they
# took fifty times as long as one.
THREADED_FROM = 10**9


# Tried where few images are labelled: nothing is published.
FEW_LABELS_LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FEW_LABELS_WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)


class Setting(NamedTuple):
    """Hyper-parameters to choose: of `train` both, of `fit` the weight decay."""

    weight_decay: float = WEIGHT_DECAY
    learning_rate: float | None = LEARNING_RATE


class Classifiers(NamedTuple):
    """Linear classifiers of standardised features, one for each of G settings."""

    mean: np.ndarray  # [C], of unit features
    inverse_deviation: np.ndarray  # [C]
    weights: np.ndarray  # [G, C, classes]
    biases: np.ndarray  # [G, classes]

    def logits(self, values: np.ndarray) -> np.ndarray:
        """Returns what features [n, C] score: [G, n, classes]."""
        x = (unit_rows(values) - self.mean) * self.inverse_deviation
        return np.matmul(x, self.weights) + self.biases[:, np.newaxis]


def standardization(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and inverse deviation, each [C], of the unit rows of features [N, C].

    The variance is the unbiased one. Source: UMBCvision/ISD eval_linear.py:165-203.
    """
    total, squares = 0.0, 0.0
    for first in range(0, len(values), CHUNK):
        rows = unit_rows(values[first : first + CHUNK]).astype(np.float64)
        total, squares = total + rows.sum(axis=0), squares + (rows**2).sum(axis=0)
    mean = total / len(values)
    variance = (squares - len(values) * mean**2) / max(len(values) - 1, 1)
    inverse_deviation = 1 / np.sqrt(np.maximum(variance, 0) + EPSILON)
    return mean.astype(np.float32), inverse_deviation.astype(np.float32)


def train(
    encoder: keras.Model,
    views_of_epoch: Callable[[int], Iterable],
    features: Features,
    settings: list[Setting],
    seed: int,
    epochs: int = EPOCHS,
    report: Callable[[int, np.ndarray], None] = lambda epoch, losses: None,
) -> Classifiers:
    """Trains a linear classifier a setting by the reference's protocol, all on the same views.

    Args:
        encoder: normalised images [b, S, S, 3] to features [b, C]; stays as it is.
        views_of_epoch: epoch, from 0, to batches of random views [b, S, S, 3] and labels [b].
        features: of the same images, centre-cropped: they give the standardisation.
        settings: G of them.
        seed: of the initial weights, PyTorch's: uniform in +-1/sqrt(C).
        epochs: passes; the learning rate falls to a tenth after 15 and after 30.
        report: called after each epoch with it and the mean cross-entropies [G].

    Returns:
        The classifiers after the last epoch; the reference reports the best one on the test set.
        Where only some have diverged, nothing they say counts as right.

    Raises:
        ValueError: when all have diverged, or a label is missing.
    """
    require_labels(features.labels, "training set")
    mean, inverse_deviation = standardization(features.values)
    count, dimension, classes = len(settings), len(mean), int(features.labels.max()) + 1
    limit = dimension**-0.5
    shapes = ((count, dimension, classes), (count, 1, classes))
    variables = [
        # Every setting begins with the same weights.
        tf.Variable(
            tf.tile(
                tf.random.stateless_uniform((1, *shape[1:]), [seed, i], -limit, limit),
                [count, 1, 1],
            )
        )
        for i, shape in enumerate(shapes)
    ]
    buffers = [tf.Variable(tf.zeros(shape)) for shape in shapes]
    decays, rates = (
        tf.constant(values, tf.float32)[:, tf.newaxis, tf.newaxis]
        for values in zip(*settings, strict=True)
    )

    @tf.function(reduce_retracing=True)
    def step(views, labels, drop):
        x = tf.cast(encoder(views, training=False), tf.float32)  # [b, C], frozen
        x = (tf.math.l2_normalize(x, axis=1) - mean) * inverse_deviation
        with tf.GradientTape() as tape:
            logits = tf.matmul(x[tf.newaxis], variables[0]) + variables[1]  # [G, b, classes]
            labels = tf.tile(labels[tf.newaxis], [count, 1])
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            losses = tf.reduce_mean(losses, axis=1)  # [G]
        # The gradient of their sum: no classifier's weights are in another's loss.
        gradients = tape.gradient(losses, variables)
        for variable, buffer, gradient in zip(variables, buffers, gradients, strict=True):
            buffer.assign(SGD_MOMENTUM * buffer + gradient + decays * variable)
            variable.assign_sub(rates * drop * buffer)
        return losses

    for epoch in range(epochs):
        drop = tf.constant(0.1 ** sum(epoch >= drop_epoch for drop_epoch in DROP_EPOCHS))
        total, images = 0.0, 0
        for views, labels in views_of_epoch(epoch):
            total = total + step(views, labels, drop) * len(labels)
            images += len(labels)
        report(epoch, np.asarray(total) / images)
    weights, biases = variables[0].numpy(), variables[1].numpy()[:, 0]
    if not np.isfinite(weights).all(axis=(1, 2)).any():
        raise ValueError(
            f"The linear classifier has diverged. Received: {', '.join(map(str, settings))}. Use a "
            "lower learning rate or weight decay."
        )
    absent = np.setdiff1d(np.arange(classes), features.labels)
    biases[:, absent] = -np.inf  # Classes without an example are never chosen.
    return Classifiers(mean, inverse_deviation, weights, biases)


def fit(
    features: Features, l2_values: list[float], class_weights: np.ndarray | None = None
) -> Classifiers:
    """Fits a logistic regression a value of L2 by scikit-learn's L-BFGS.

    Minimised is the sum of the cross-entropies plus l2 / 2 times the squared norm of the weights.
    In double precision, which takes about 20 bytes a feature of each image.

    Args:
        features: labelled.
        l2_values: positive; fitted from the largest to the smallest, each from the one before.
        class_weights: [classes], by which the cross-entropy of each image is multiplied; None: 1.

    Raises:
        ValueError: when there are fewer than two classes.
    """
    require_labels(features.labels, "training set")
    present = np.unique(features.labels)
    if len(present) < 2:
        raise ValueError(
            f"A classifier needs two classes with examples. Received: {len(present)}. Add images."
        )
    mean, inverse_deviation = standardization(features.values)
    x = unit_rows(features.values).astype(np.float64)
    x -= mean
    x *= inverse_deviation
    shape = (len(l2_values), x.shape[1], present[-1] + 1)
    # Classes without an example are never chosen.
    weights = np.zeros(shape, np.float32)
    biases = np.full((shape[0], shape[2]), -np.inf, np.float32)
    model = LogisticRegression(
        max_iter=MAX_ITERATIONS, tol=TOLERANCE / len(present), warm_start=True
    )
    image_weights = None if class_weights is None else class_weights[features.labels]
    stopped = []
    for i in sorted(range(len(l2_values)), key=lambda i: -l2_values[i]):
        # Of two classes scikit-learn knows the difference w alone, and penalises its squared norm:
        # twice that of both classes' weights, w / 2 and -w / 2.
        model.C = (2 if len(present) == 2 else 1) / l2_values[i]
        is_small = x.size * len(present) < THREADED_FROM
        threads = threadpool_limits(1, "blas") if is_small else contextlib.nullcontext()
        with threads, warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # Said below, in one line.
            model.fit(x, features.labels, image_weights)
        if model.n_iter_.max() >= MAX_ITERATIONS:
            stopped.append(l2_values[i])
        coefficients, intercepts = model.coef_, model.intercept_
        if len(present) == 2:
            coefficients, intercepts = (
                np.concatenate([-values, values]) / 2 for values in (coefficients, intercepts)
            )
        weights[i][:, present], biases[i][present] = coefficients.T, intercepts
    if stopped:
        logging.warning(
            "L-BFGS had not converged after %d iterations at %d of %d values of L2.",
            MAX_ITERATIONS,
            len(stopped),
            len(l2_values),
        )
    return Classifiers(mean, inverse_deviation, weights, biases)


def top_k_accuracy(classifiers: Classifiers, features: Features, k: int) -> np.ndarray:
    """Share [G] of the examples whose class is among a classifier's k highest, k >= 1."""
    right = _is_right(classifiers, features, k)
    return right.mean(axis=1)


def mean_per_class_accuracy(classifiers: Classifiers, features: Features) -> np.ndarray:
    """Mean [G] over the classes of the share of their examples that is classified right."""
    right = _is_right(classifiers, features, 1)
    classes = np.unique(features.labels)
    return np.mean([right[:, features.labels == label].mean(axis=1) for label in classes], axis=0)


def _is_right(classifiers, features, k):
    """Whether each example's class is among each classifier's k highest: bool [G, N]."""
    require_labels(features.labels, "test set")
    known = np.flatnonzero(classifiers.biases[0] != -np.inf)
    require_classes(features.labels, known, "training set")
    right = []
    for first in range(0, len(features.labels), CHUNK):
        logits = classifiers.logits(features.values[first : first + CHUNK])  # [G, n, classes]
        labels = features.labels[first : first + CHUNK]
        own = np.take_along_axis(logits, labels[np.newaxis, :, np.newaxis], axis=2)
        # Of equal logits the lower class stands first.
        ahead = (logits > own) | ((logits == own) & (np.arange(logits.shape[2]) < labels[:, None]))
        # Of what has diverged, nothing is ahead of anything.
        right.append((ahead.sum(axis=2) < k) & np.isfinite(own[:, :, 0]))
    return np.concatenate(right, axis=1)


class Choice(NamedTuple):
    """A setting, and how all that were tried did on the held-out examples."""

    chosen: Setting | float
    accuracies: dict[Setting | float, float]  # top-1; empty where there was nothing to choose


def choose(
    settings: list,
    dataset: Dataset,
    classifiers_of: Callable[[Dataset, list], Classifiers],
    features_of: Callable[[Dataset], Features],
    seed: int,
) -> Choice:
    """Chooses the setting with the best top-1 on a fifth of each class that is held out.

    Args:
        settings: of the classifiers; where there is one, it is taken.
        dataset: the training set.
        classifiers_of: trains one classifier a setting on (a part of) the dataset.
        features_of: (a part of) the dataset to its features.
        seed: of the split.

    Raises:
        ValueError: when nothing can be held out.
    """
    if len(settings) == 1:
        return Choice(settings[0], {})
    rows = subsets.hold_out(subsets.labels_of(dataset), HELD_OUT_SHARE, seed)
    fit, held_out = subsets.divide(dataset, *rows)
    classifiers = classifiers_of(fit, settings)
    accuracies = top_k_accuracy(classifiers, features_of(held_out), 1)
    tried = dict(zip(settings, map(float, accuracies), strict=True))
    return Choice(max(tried, key=tried.get), tried)
