"""The classifier, its best epoch, class weights, batches and tables, against numpy."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight
from small_models import softmax
from small_runs import read_csv

import isd_tf
from isd_tf.data import datasets
from isd_tf.data.batches import evaluation_batches, finetuning_batches, probe_batches
from isd_tf.evaluation import confusion, features, linear
from isd_tf.finetuning import classifier as finetuning
from isd_tf.finetuning.classifier import Score
from isd_tf.training.checkpoints import fit_from_step

SIZE, CLASSES = 16, 3
LABELS = np.array([0] * 14 + [1] * 8 + [2] * 4)
IMAGES = np.random.default_rng(0).integers(0, 256, (26, SIZE, SIZE, 3), np.uint8)
DATA = datasets.ArrayDataset("arrays", IMAGES, LABELS, ("a", "b", "c"))


def make_classifier(rate=0.01):
    keras.utils.set_random_seed(0)
    model = finetuning.Classifier(isd_tf.build_encoder("tiny_resnet", SIZE, 4), CLASSES)
    model.compile(isd_tf.TorchSGD(rate))
    return model


@pytest.fixture(scope="module")
def model():
    return make_classifier()


# ------------------------------------------------------------------------------------ the head


def test_the_head_is_the_linear_classifier_of_the_features(model):
    found = features.extract(model.encoder, DATA, SIZE)
    fitted = linear.fit(found, [1.0, 0.1])
    model.set_head(fitted, 1)
    ((views, labels),) = evaluation_batches(DATA, SIZE, 32)
    np.testing.assert_array_equal(labels, LABELS)
    expected = fitted.logits(found.values)[1]
    np.testing.assert_allclose(model(views), expected, rtol=1e-3, atol=1e-4)


def test_fit_head_takes_the_l2_that_is_best_on_the_held_out_images(model):
    found = features.extract(model.encoder, DATA, SIZE)
    fit, held_out = (features.Features(found.values[i::2], found.labels[i::2]) for i in (0, 1))
    weights = np.array([1.0, 2.0, 3.0])
    decay = finetuning.fit_head(model, fit, held_out, weights)
    scores = {}
    for tried in linear.FEW_LABELS_WEIGHT_DECAYS:
        (logits,) = linear.fit(fit, [tried * 13], weights).logits(held_out.values)
        chosen = softmax(logits.astype(np.float64))[np.arange(13), held_out.labels]
        w = weights[held_out.labels]
        right = logits.argmax(1) == held_out.labels
        scores[tried] = (-(w * np.log(chosen)).sum() / w.sum(), w[right].sum() / w.sum())
    assert decay == min(scores, key=scores.get)
    best = (model.best_score.loss, model.best_score.accuracy)
    np.testing.assert_allclose(best, scores[decay], rtol=1e-2)
    assert int(model.best_epoch.numpy()) == 0


def test_a_class_without_images_is_refused(model):
    found = features.Features(np.ones((4, 16), np.float32), np.array([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="none of 1 classes, the label 2 first"):
        finetuning.fit_head(model, found, found, np.ones(3))
    with pytest.raises(ValueError, match="needs two classes. Received: 1"):
        finetuning.Classifier(model.encoder, 1)


# ------------------------------------------------------------------------------- class weights


def test_class_weights_are_scikit_learns_balanced_ones_up_to_a_limit():
    weights = finetuning.class_weights(LABELS, CLASSES)
    expected = compute_class_weight("balanced", classes=np.arange(CLASSES), y=LABELS)
    np.testing.assert_allclose(weights, expected)
    np.testing.assert_allclose(weights[LABELS].mean(), 1)
    rare = finetuning.class_weights(np.array([0] * 99 + [1]), 2)
    np.testing.assert_allclose(rare, [100 / 198, 10])


def test_the_linear_classifier_is_at_the_minimum_of_the_weighted_loss():
    random = np.random.default_rng(1)
    values = random.normal(size=(60, 5)).astype(np.float32)
    labels = random.integers(0, CLASSES, 60)
    weights = np.array([0.5, 1.0, 4.0])
    fitted = linear.fit(features.Features(values, labels), [2.0], weights)
    x = values / np.linalg.norm(values, axis=1, keepdims=True)
    x = (x - fitted.mean) * fitted.inverse_deviation
    errors = softmax(x @ fitted.weights[0] + fitted.biases[0]) - np.eye(CLASSES)[labels]
    gradient = x.T @ (weights[labels, np.newaxis] * errors) + 2.0 * fitted.weights[0]
    np.testing.assert_allclose(gradient, 0, atol=2e-2)
    unweighted = x.T @ errors + 2.0 * fitted.weights[0]
    assert np.abs(unweighted).max() > 1  # The same at the other minimum would prove nothing.


def test_class_weights_find_more_of_a_rare_class():
    random = np.random.default_rng(0)

    def draw(*counts):  # Two classes that overlap.
        labels = np.repeat(np.arange(2), counts)
        values = random.normal(size=(len(labels), 4)) + 1.5 * labels[:, np.newaxis]
        return features.Features(values.astype(np.float32), labels)

    train, rare, common = draw(380, 20), draw(0, 500), draw(500, 0)

    def recalls(weights):
        fitted = linear.fit(train, [1.0], weights)
        return [linear.top_k_accuracy(fitted, test, 1)[0] for test in (rare, common)]

    unweighted, weighted = recalls(None), recalls(finetuning.class_weights(train.labels, 2))
    assert weighted[0] > unweighted[0] + 0.1 and weighted[1] > 0.7


def test_the_training_loss_is_weighted_by_class():
    model = make_classifier(rate=0.0)
    weights = np.array([0.5, 1.0, 4.0])
    ((views, labels),) = finetuning_batches(DATA, SIZE, 26, 0).take(1)
    logits = model(views, training=True).numpy().astype(np.float64)
    losses = -np.log(softmax(logits))[np.arange(26), labels]
    expected = (weights[labels] * losses).mean()
    history = model.fit(
        finetuning_batches(DATA, SIZE, 26, 0),
        steps_per_epoch=1,
        class_weight=dict(enumerate(weights)),
        verbose=0,
    ).history
    np.testing.assert_allclose(history["loss"], expected, rtol=1e-4)


def test_two_replicas_take_the_steps_of_one(float64, two_replicas):
    moves = []
    for strategy in (tf.distribute.get_strategy(), two_replicas):
        synchronized = strategy.num_replicas_in_sync > 1
        keras.utils.set_random_seed(0)
        with strategy.scope():
            encoder = isd_tf.build_encoder("tiny_resnet", SIZE, 4, synchronized)
            model = finetuning.Classifier(encoder, CLASSES, synchronized)
            model.compile(isd_tf.TorchSGD(0.01))
        before = network_weights(model)
        model.fit(
            finetuning_batches(DATA, SIZE, 8, 0),
            steps_per_epoch=2,
            class_weight={0: 0.5, 1: 1.0, 2: 4.0},
            verbose=0,
        )
        after = network_weights(model)
        moves.append([x - y for x, y in zip(after, before, strict=True)])
    assert all(np.abs(move).max() > 1e-6 for move in moves[0])
    for one, two in zip(*moves, strict=True):
        np.testing.assert_allclose(two, one, atol=1e-8)


# ------------------------------------------------------------------------------ the best epoch


PLANTED = [(0.5, 1.0), (0.9, 0.9), (0.7, 0.8), (0.8, 0.8), (0.9, 0.85), (0.9, 0.9), (0.9, 0.1)]


def fit_with_planted_scores(model, at_start, patience):
    """Trains an epoch of one step a score; returns the weights after each."""
    model.keep_if_better(0, at_start)
    scores, weights = iter(PLANTED), [model.get_weights()]
    model.fit(
        finetuning_batches(DATA, SIZE, 8, 0),
        steps_per_epoch=1,
        epochs=len(PLANTED),
        verbose=0,
        callbacks=[
            finetuning.KeepBest(lambda: Score(*next(scores)), patience),
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: weights.append(network_weights(model))
            ),
        ],
    )
    return weights


def network_weights(model):
    return [weight.numpy() for weight in (*model.encoder.weights, *model.head.weights)]


def test_training_stops_after_the_patience_and_returns_to_the_best_epoch():
    model = make_classifier()
    weights = fit_with_planted_scores(model, Score(0.1, 2.0), patience=3)
    assert len(weights) == 1 + 6  # The best is the third; an equal one is not better.
    assert int(model.best_epoch.numpy()) == 3
    np.testing.assert_allclose(model.best_score, (0.7, 0.8), rtol=1e-6)
    model.return_to_best()
    for ours, then in zip(network_weights(model), weights[3], strict=True):
        np.testing.assert_array_equal(ours, then)
    assert any((ours != last).any() for ours, last in zip(weights[3], weights[6], strict=True))


def test_patience_that_ends_in_a_continued_epoch_ends_the_training():
    model = make_classifier()
    model.keep_if_better(0, Score(0.9, 0.1))
    fit_from_step(
        model,
        lambda step: finetuning_batches(DATA, SIZE, 8, 0, step),
        first_step=1,
        steps_per_epoch=3,
        epochs=4,
        callbacks=[finetuning.KeepBest(lambda: Score(0.5, 1.0), patience=1)],
        verbose=0,
    )
    assert int(model.step.numpy()) == 2  # The rest of the first epoch.


def test_the_linear_classifier_stays_where_no_epoch_is_better():
    model = make_classifier()
    before = network_weights(model)
    fit_with_planted_scores(model, Score(0.1, 0.05), patience=9)
    model.return_to_best()
    assert int(model.best_epoch.numpy()) == 0
    for ours, then in zip(network_weights(model), before, strict=True):
        np.testing.assert_array_equal(ours, then)


def test_logits_that_are_not_finite_are_an_error():
    logits_of = finetuning.logits_function(lambda views, training: views * np.inf)
    with pytest.raises(ValueError, match="logits must be finite"):
        logits_of([(tf.ones([2, 3]), np.zeros(2))])


# ------------------------------------------------------------------------------------- batches


def test_batches_from_a_step_are_those_of_the_whole_stream():
    whole = list(finetuning_batches(DATA, SIZE, 8, seed=3).take(7))
    rest = finetuning_batches(DATA, SIZE, 8, seed=3, first_step=4).take(3)
    for (views, labels), (other_views, other_labels) in zip(whole[4:], rest, strict=True):
        np.testing.assert_array_equal(views, other_views)
        np.testing.assert_array_equal(labels, other_labels)
    # The first epoch is that of the linear protocol, but for its remainder.
    for (views, labels), (other_views, other_labels) in zip(
        whole[:3], probe_batches(DATA, SIZE, 8, 3, 0), strict=False
    ):
        np.testing.assert_array_equal(views, other_views)
        np.testing.assert_array_equal(labels, other_labels)
    with pytest.raises(ValueError, match="at most the dataset's 26. Received: global_batch"):
        finetuning_batches(DATA, SIZE, 27, 0)


# -------------------------------------------------------------------------------------- tables


def test_tables_are_numpys(tmp_path):
    random = np.random.default_rng(2)
    logits = random.normal(size=(50, 7)).round(1)  # With ties.
    labels = random.integers(0, 5, 50)  # The classes 5 and 6 have no images.
    logits[:, 6] = -9  # And 6 is never predicted.
    predictions = logits.argmax(axis=1)
    matrix = confusion.confusion_matrix(labels, predictions, 7)
    expected = np.zeros((7, 7), int)
    for label, prediction in zip(labels, predictions, strict=True):
        expected[label, prediction] += 1
    np.testing.assert_array_equal(matrix, expected)
    for k in (1, 5):
        first = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        right = [label in row for label, row in zip(labels, first, strict=True)]
        assert confusion.top_k_accuracy(logits, labels, k) == np.mean(right)
    table = confusion.per_class(matrix)
    recall = [np.mean(predictions[labels == c] == c) for c in range(5)]
    precision = [np.mean(labels[predictions == c] == c) for c in range(6)]
    np.testing.assert_allclose(table["recall"], [*recall, np.nan, np.nan])
    np.testing.assert_allclose(table["precision"], [*precision, np.nan])
    f1 = f1_score(labels, predictions, labels=range(6), average=None, zero_division=0)
    np.testing.assert_allclose(table["f1"][:6], f1)
    names = ["a,b", "Käse", "\udce9", "d", "e", "f", "g"]
    confusion.write_confusion_csv(matrix, names, tmp_path / "confusion.csv")
    confusion.write_per_class_csv(matrix, names, tmp_path / "per_class.csv")
    rows = read_csv(tmp_path / "confusion.csv")
    assert rows[0][:3] == ["true \\ predicted", "a,b", "Käse"] and rows[1][0] == "a,b"
    np.testing.assert_array_equal(np.array([row[1:] for row in rows[1:]], int), expected)
    rows = read_csv(tmp_path / "per_class.csv")
    assert rows[0] == ["class", "images", "recall", "precision", "f1"]
    assert rows[7] == ["g", "0", "", "", ""] and float(rows[1][2]) == pytest.approx(recall[0])
