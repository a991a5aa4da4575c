import warnings

import keras
import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf
from small_models import softmax

import isd_tf
from isd_tf.data.batches import probe_batches
from isd_tf.data.datasets import ArrayDataset
from isd_tf.evaluation import linear
from isd_tf.evaluation.features import Features

CLASSES, DIMENSION = 4, 5


def clouds(count=80, seed=0, spread=1.0):
    """Points around four centres."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(CLASSES, DIMENSION))
    labels = np.arange(count) % CLASSES
    values = centres[labels] + spread * random.normal(size=(count, DIMENSION))
    return Features(values.astype(np.float32), labels)


def standardized(values, by):
    rows, reference = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (values, by))
    return (rows - reference.mean(axis=0)) / np.sqrt(reference.var(axis=0, ddof=1) + 1e-5)


def test_standardization_is_that_of_unit_rows_with_the_unbiased_variance(monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", 32)
    values = clouds().values
    mean, inverse_deviation = linear.standardization(values)
    x = (values / np.linalg.norm(values, axis=1, keepdims=True) - mean) * inverse_deviation
    np.testing.assert_allclose(x, standardized(values, values), atol=1e-5)


def identity():
    """An encoder of 'images' that are features already."""
    return keras.Sequential([keras.Input((DIMENSION,)), keras.layers.Identity()])


def test_training_equals_numpy_across_both_drops_of_the_rate(monkeypatch):
    """Two settings at once, the reference's update by hand, a last batch with a remainder."""
    monkeypatch.setattr(linear, "DROP_EPOCHS", (2, 3))
    features = clouds(22)
    random = np.random.default_rng(5)
    epochs = []
    for _ in range(4):
        order = random.permutation(22)
        noisy = features.values + random.normal(size=(22, DIMENSION)).astype(np.float32)
        epochs.append([(noisy[rows], features.labels[rows]) for rows in np.split(order, [8, 16])])
    settings = [linear.Setting(0.01, 0.5), linear.Setting(0.3, 0.1)]
    reported = []

    trained = linear.train(
        identity(),
        lambda epoch: [tuple(map(tf.constant, batch)) for batch in epochs[epoch]],
        features,
        settings,
        seed=3,
        epochs=4,
        report=lambda epoch, losses: reported.append(losses),
    )

    begun = linear.train(identity(), None, features, settings, seed=3, epochs=0)
    np.testing.assert_array_equal(begun.weights[0], begun.weights[1])
    assert np.abs(begun.weights).max() <= DIMENSION**-0.5 < 1.3 * np.abs(begun.weights).max()
    for g, (decay, rate) in enumerate(settings):
        w, b = begun.weights[g].astype(np.float64), begun.biases[g].astype(np.float64)
        w_buffer, b_buffer = np.zeros_like(w), np.zeros_like(b)
        for epoch, batches in enumerate(epochs):
            losses = []
            for values, labels in batches:
                x = standardized(*(v.astype(np.float64) for v in (values, features.values)))
                p = softmax(x @ w + b)
                losses += list(-np.log(p[np.arange(len(labels)), labels]))
                error = (p - np.eye(CLASSES)[labels]) / len(labels)
                w_buffer = 0.9 * w_buffer + (x.T @ error + decay * w)
                b_buffer = 0.9 * b_buffer + (error.sum(axis=0) + decay * b)
                factor = rate * 0.1 ** sum(epoch >= drop for drop in (2, 3))
                w, b = w - factor * w_buffer, b - factor * b_buffer
            assert reported[epoch][g] == pytest.approx(np.mean(losses), rel=1e-4)
        np.testing.assert_allclose(trained.weights[g], w, atol=1e-5)
        np.testing.assert_allclose(trained.biases[g], b, atol=1e-5)


def test_values_of_l2_are_fitted_independently_of_their_order_and_silently():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = linear.fit(clouds(), [1e-6, 100.0, 1.0])
    for g, l2 in enumerate([1e-6, 100.0, 1.0]):
        alone = linear.fit(clouds(), [l2])
        right, alone_right = (
            linear.top_k_accuracy(c, clouds(seed=1), 1) for c in (together, alone)
        )
        assert right[g] == pytest.approx(alone_right[0], abs=0.03)
    assert np.linalg.norm(together.weights[1]) < np.linalg.norm(together.weights[2])


def objective_of(features, classes, decay):
    """The reference's objective as a function of weights and biases in one vector."""
    x = standardized(*[features.values.astype(np.float64)] * 2)

    def objective(flat):
        w, b = flat[:-classes].reshape(x.shape[1], classes), flat[-classes:]
        p = softmax(x @ w + b)
        loss = -np.log(p[np.arange(len(x)), features.labels]).mean()
        return loss + decay / 2 * (w**2).sum()

    return objective


@pytest.mark.parametrize("classes", [2, CLASSES])
def test_the_fast_classifier_is_the_minimum_of_the_same_objective(classes):
    features, decay = clouds(spread=2.0), 0.02
    few = features.labels < classes
    features = Features(features.values[few], features.labels[few])
    fitted = linear.fit(features, [decay * len(features.labels)])
    objective = objective_of(features, classes, decay)
    found = scipy.optimize.minimize(objective, np.zeros(classes * (DIMENSION + 1)), tol=1e-10)
    expected = found.x[:-classes].reshape(DIMENSION, classes)
    np.testing.assert_allclose(fitted.weights[0], expected, atol=2e-3)
    # Biases may all be shifted by the same.
    expected = found.x[-classes:] - found.x[-classes:].mean()
    np.testing.assert_allclose(fitted.biases[0] - fitted.biases[0].mean(), expected, atol=2e-3)


def test_labels_need_not_be_consecutive():
    features = clouds()
    two = features.labels < 2
    spaced = Features(features.values[two], features.labels[two] * 3)  # Labels 0 and 3.
    fitted = linear.fit(spaced, [0.1])
    assert fitted.weights.shape == (1, DIMENSION, 4)
    assert linear.top_k_accuracy(fitted, spaced, 1)[0] > 0.9


def test_with_many_classes_warm_and_cold_starts_end_in_the_same_minimum():
    """Of 60 classes each gradient is a sixtieth: a loose tolerance would stop at the start."""
    random = np.random.default_rng(0)
    labels = np.arange(600) % 60
    centres = random.normal(size=(60, 20))
    values = (centres[labels] + 1.5 * random.normal(size=(600, 20))).astype(np.float32)
    features = Features(values, labels)
    l2_values = [1e2, 1.0, 1e-1, 1e-2]
    together = linear.fit(features, l2_values)
    for g, l2 in enumerate(l2_values):
        objective = objective_of(features, 60, l2 / 600)
        alone = linear.fit(features, [l2])
        warm, cold = (
            objective(np.concatenate([c.weights[h].ravel(), c.biases[h]]))
            for c, h in ((together, g), (alone, 0))
        )
        assert warm == pytest.approx(cold, rel=1e-4)
    norms = np.linalg.norm(together.weights, axis=(1, 2))
    assert (np.diff(norms) > 1).all()


def classifiers_of_logits(logits):
    """Classifiers whose logits are a table's rows: of features that are one-hot."""
    count, dimension = logits.shape[0], logits.shape[1]
    biases = np.zeros((count, logits.shape[2]), np.float32)
    ones = np.ones(dimension, np.float32)
    return linear.Classifiers(0 * ones, ones, logits.astype(np.float32), biases)


def test_accuracies_count_ranks_and_classes(monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", 2)
    logits = np.array([[[3, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3]], [[0, 0, 9, 9]] * 3])
    classifiers = classifiers_of_logits(logits)
    features = Features(np.eye(3, dtype=np.float32), np.array([0, 1, 1]))
    for k, expected in ((1, [1 / 3, 0]), (2, [2 / 3, 0]), (3, [1, 1 / 3]), (5, [1, 1])):
        np.testing.assert_allclose(linear.top_k_accuracy(classifiers, features, k), expected)
    # Class 0 all right, class 1 none.
    np.testing.assert_allclose(linear.mean_per_class_accuracy(classifiers, features), [0.5, 0])


def test_the_encoder_is_left_as_it_was():
    encoder = isd_tf.build_encoder("tiny_resnet", 16, 4)
    images = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
    data = ArrayDataset("arrays", images, np.arange(24) % 3)
    before = [weight.numpy().copy() for weight in encoder.weights]
    features = isd_tf.evaluation.features.extract(encoder, data, 16)
    batches = lambda epoch: probe_batches(data, 16, 8, 0, epoch)  # noqa: E731
    linear.train(encoder, batches, features, [linear.Setting(0.1, 1.0)], seed=0, epochs=2)
    linear.fit(features, [0.1])
    for weight, old in zip(encoder.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old, err_msg=weight.path)


def as_dataset(features):
    """Images that carry features, for `choose`, which splits datasets."""
    return ArrayDataset("clouds", features.values[:, np.newaxis, np.newaxis], features.labels)


def features_of(dataset):
    return Features(dataset.images[:, 0, 0], dataset.labels)


def test_the_setting_that_does_best_on_held_out_examples_is_chosen():
    fitted_on = []

    def classifiers_of(dataset, settings):
        fitted_on.append(dataset)
        return linear.fit(features_of(dataset), settings)

    dataset = as_dataset(clouds(200, spread=0.5))
    choice = linear.choose([1e5, 1e-2, 1e4], dataset, classifiers_of, features_of, seed=0)
    assert choice.chosen == 1e-2 and list(choice.accuracies) == [1e5, 1e-2, 1e4]
    assert choice.accuracies[1e-2] == max(choice.accuracies.values())
    (part,) = fitted_on
    np.testing.assert_array_equal(np.bincount(part.labels), [40] * CLASSES)
    # The accuracy is that on the other fifth of each class.
    rows = {row.tobytes() for row in part.images}
    held_out = np.array([row.tobytes() not in rows for row in dataset.images])
    rest = Features(dataset.images[held_out][:, 0, 0], dataset.labels[held_out])
    expected = linear.top_k_accuracy(linear.fit(features_of(part), [1e-2]), rest, 1)[0]
    assert choice.accuracies[1e-2] == pytest.approx(expected, abs=0.03)


def test_accuracies_stand_beside_the_settings_that_reached_them():
    """Three that are told apart whatever their order: right in all, half and none of the cases."""
    dataset = as_dataset(clouds(50, spread=0.01))
    shares = {0.1: 1.0, 0.2: 0.0, 0.3: 0.5}

    def classifiers_of(part, settings):
        # A class is right or wrong as a whole: the share is that of CLASSES which are right.
        fitted = linear.fit(features_of(part), [1e-3])
        biases = np.repeat(fitted.biases, len(settings), 0)
        weights = np.repeat(fitted.weights, len(settings), 0)
        for i, setting in enumerate(settings):
            order = np.arange(CLASSES)
            wrong = order[round(shares[setting] * CLASSES) :]
            order[wrong] = np.roll(wrong, 1)
            biases[i], weights[i] = biases[i][order], weights[i][:, order]
        return fitted._replace(weights=weights, biases=biases)

    for settings in ([0.1, 0.2, 0.3], [0.2, 0.3, 0.1], [0.3, 0.1, 0.2]):
        choice = linear.choose(settings, dataset, classifiers_of, features_of, seed=0)
        assert choice.chosen == 0.1
        assert choice.accuracies == pytest.approx(shares)


def test_a_setting_that_diverges_is_never_right_and_alone_it_is_refused():
    known = clouds(40)
    batches = [(tf.constant(known.values), tf.constant(known.labels))]
    good, bad = linear.Setting(1e-4, 0.1), linear.Setting(1.0, 1e9)

    def train(*settings):
        return linear.train(identity(), lambda _: batches, known, list(settings), 0, 10)

    classifiers = train(bad, good)
    assert np.isnan(classifiers.weights[0]).any()
    accuracies = linear.top_k_accuracy(classifiers, known, 5)
    assert accuracies[0] == 0 and accuracies[1] == 1
    with pytest.raises(ValueError, match=r"has diverged. Received: .*learning_rate=1000000000"):
        train(bad)


def test_a_single_setting_is_not_searched():
    assert linear.choose([0.5], None, None, None, 0) == linear.Choice(0.5, {})


@pytest.mark.parametrize(
    ("labels", "test_labels", "message"),
    [
        ([0, 0, 0, 0], [0], "two classes with examples. Received: 1"),
        ([0, 1, -1, 0], [0], "label for every image of the training set. Received 1"),
        (
            [0, 1, 3, 0],
            [2],
            "examples in the training set. Received: none of 1 classes, the label 2",
        ),
        ([0, 1, 1, 0], [5], "none of 1 classes, the label 5"),
        ([0, 1, 1, 0], [-1], "label for every image of the test set"),
    ],
)
@pytest.mark.parametrize("way", ["fit", "train"])
def test_what_cannot_be_fitted_or_scored_is_refused(way, labels, test_labels, message):
    values = clouds(4).values
    if way == "train" and "two classes" in message:
        pytest.skip("SGD trains a single class as well.")
    with pytest.raises(ValueError, match=message):
        known = Features(values, np.array(labels))
        if way == "fit":
            fitted = linear.fit(known, [1.0])
        else:
            batches = [(tf.constant(values), tf.constant(labels))]
            fitted = linear.train(identity(), lambda _: batches, known, [linear.Setting()], 0, 1)
        linear.top_k_accuracy(fitted, Features(values[:1], np.array(test_labels)), 1)
