import keras
import numpy as np
import pytest
import tensorflow as tf

import isd_tf
from isd_tf.evaluation import features, knn


def batches(values, labels, size):
    """Batches of 'images' that are features already."""
    return tf.data.Dataset.from_tensor_slices((values.astype(np.float32), labels)).batch(size)


def brute_force(bank, bank_labels, queries, k):
    """Votes one query at a time; ties go to the class whose member is nearest."""
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    votes = []
    for query in queries:
        nearest = bank_labels[np.argsort(-(bank @ query), kind="stable")[:k]]
        best = max(np.count_nonzero(nearest == label) for label in nearest)
        votes.append(next(x for x in nearest if np.count_nonzero(nearest == x) == best))
    return np.array(votes)


def test_accuracy_equals_brute_force_across_chunks(monkeypatch):
    monkeypatch.setattr(knn, "BANK_CHUNK", 64)
    monkeypatch.setattr(knn, "QUERY_BLOCK", 50)
    random = np.random.default_rng(0)
    bank, queries = random.normal(size=(500, 6)), random.normal(size=(120, 6))
    bank_labels = (bank[:, 0] > 0) * 2 + (bank[:, 1] > 0)
    labels = (queries[:, 0] > 0) * 2 + (queries[:, 1] > 0)

    scores = isd_tf.knn_accuracy(
        {"mine": tf.identity, "shifted": lambda x: x + 1.0},
        batches(bank, bank_labels, 30),
        batches(queries, labels, 32),
        neighbors=(1, 7, 20),
    )

    for k in (1, 7, 20):
        expected = (brute_force(bank, bank_labels, queries, k) == labels).mean()
        assert scores[f"mine_{k}nn"] == pytest.approx(expected)
        expected = (brute_force(bank + 1, bank_labels, queries + 1, k) == labels).mean()
        assert scores[f"shifted_{k}nn"] == pytest.approx(expected)


def test_ties_go_to_the_class_whose_member_is_nearest():
    labels = np.array([[2, 1, 1, 2], [1, 2, 2, 1], [3, 1, 2, 2], [5, 5, 5, 5], [1, 2, 3, 4]])
    np.testing.assert_array_equal(knn.majority(labels), [2, 1, 2, 5, 1])


def test_equal_similarities_keep_the_banks_order(monkeypatch):
    monkeypatch.setattr(knn, "BANK_CHUNK", 2)
    bank, labels = np.ones((6, 2)), np.array([4, 0, 0, 0, 0, 0])
    scores = knn.knn_accuracy(
        {"x": tf.identity}, batches(bank, labels, 2), batches(np.ones((1, 2)), [4], 1), (1,)
    )
    assert scores["x_1nn"] == 1.0


def test_networks_are_used_in_inference_mode():
    encoder = isd_tf.build_encoder("tiny_resnet", 16, 4)
    images = np.random.default_rng(0).normal(size=(40, 16, 16, 3)).astype(np.float32)
    before = [w.numpy().copy() for w in encoder.weights]
    data = tf.data.Dataset.from_tensor_slices((images, np.arange(40))).batch(8)
    scores = knn.knn_accuracy({"encoder": encoder}, data, data)
    assert scores["encoder_1nn"] == 1.0  # Every image is its own nearest neighbour.
    for ours, old in zip(encoder.weights, before, strict=True):
        np.testing.assert_array_equal(ours.numpy(), old)


def test_memory_is_that_of_the_queries_and_a_chunk():
    """The bank's features are dropped as they pass: none of 40 chunks is kept."""
    alive, most = set(), [0]

    class Tracked(np.ndarray):
        def __del__(self):
            alive.discard(id(self))

    def track(array):
        array = array.view(Tracked)
        alive.add(id(array))
        most[0] = max(most[0], len(alive))
        return array

    original = features._joined

    def joined(batches):
        return {name: track(values) for name, values in original(batches).items()}

    bank = np.random.default_rng(0).normal(size=(4000, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_joined", joined)
        patch.setattr(knn, "BANK_CHUNK", 100)
        data = batches(bank, np.arange(4000), 100)
        knn.knn_accuracy({"x": tf.identity}, data, data.take(1))
    assert most[0] <= 4


def test_raw_pixels_are_those_of_a_small_image():
    images = tf.random.stateless_uniform([2, 64, 64, 3], [0, 0])
    assert knn.raw_pixels(images).shape == (2, 32 * 32 * 3)
    small = images[:, :8, :8]
    np.testing.assert_array_equal(knn.raw_pixels(small), np.reshape(small, [2, -1]))


def test_callback_scores_student_and_teacher_every_few_epochs():
    encoder = isd_tf.build_encoder("tiny_resnet", 16, 4)
    model = isd_tf.ISD(encoder, *isd_tf.isd_heads(16), queue_size=16)
    model.compile(isd_tf.TorchSGD(0.0))
    images = np.random.default_rng(0).normal(size=(40, 16, 16, 3)).astype(np.float32)
    data = tf.data.Dataset.from_tensor_slices((images, np.arange(40))).batch(8)
    views = data.map(lambda x, y: {"teacher_view": x, "student_view": x})
    history = model.fit(views, epochs=4, verbose=0, callbacks=[knn.EvaluateKNN(data, data, 2)])
    assert history.history["student_1nn"] == [1.0, 1.0]
    assert len(history.history["teacher_20nn"]) == 2 and len(history.history["loss"]) == 4


def test_callback_scores_references_once_and_repeats_them():
    encoder = isd_tf.build_encoder("tiny_resnet", 16, 4)
    model = isd_tf.ISD(encoder, *isd_tf.isd_heads(16), queue_size=16)
    images = np.random.default_rng(0).normal(size=(40, 16, 16, 3)).astype(np.float32)
    data = tf.data.Dataset.from_tensor_slices((images, np.arange(40) % 2)).batch(8)
    traced = []

    def first_pixels(images):
        traced.append(images.shape)
        return knn.raw_pixels(images)[:, :3]

    callback = knn.EvaluateKNN(data, data, 1, references={"first_pixels": first_pixels})
    callback.set_model(model)
    first, second = {}, {}
    callback.on_epoch_end(0, first)
    count = len(traced)
    callback.on_epoch_end(1, second)
    assert first["first_pixels_1nn"] == second["first_pixels_1nn"] == 1.0
    assert first["first_pixels_20nn"] == second["first_pixels_20nn"] < 1
    assert count and len(traced) == count  # Not asked again.
    assert {"student_1nn", "teacher_1nn"} < second.keys()


def test_rare_classes_are_also_scored_on_their_own():
    """Queries of class 0 find themselves, those of classes 1 and 2 each other's."""
    bank, labels = np.eye(3), np.array([0, 1, 2])
    queries, query_labels = np.eye(3)[[0, 0, 2, 1, 1]], np.array([0, 0, 1, 2, 1])
    scores = knn.knn_accuracy(
        {"x": tf.identity},
        batches(bank, labels, 2),
        batches(queries, query_labels, 2),
        (1,),
        {1, 2},
    )
    assert scores == {"x_1nn": pytest.approx(3 / 5), "x_1nn_rare": pytest.approx(1 / 3)}


def test_a_query_whose_class_the_bank_lacks_is_refused():
    bank = batches(np.ones((30, 2)), np.zeros(30, int), 8)
    queries = batches(np.ones((3, 2)), [0, 7, 9], 2)
    with pytest.raises(ValueError, match="examples in the bank.*none of 2 classes, the label 7"):
        knn.knn_accuracy({"x": tf.identity}, bank, queries)


def test_an_epoch_that_cannot_be_scored_does_not_end_the_training(capsys):
    model = isd_tf.ISD(isd_tf.build_encoder("tiny_resnet", 16, 4), None, None, queue_size=16)
    model.compile(isd_tf.TorchSGD(0.0))
    images = np.random.default_rng(0).normal(size=(24, 16, 16, 3)).astype(np.float32)
    bank = tf.data.Dataset.from_tensor_slices((images, np.zeros(24, int))).batch(8)
    queries = tf.data.Dataset.from_tensor_slices((images[:3], [0, 1, 1])).batch(3)
    views = bank.map(lambda x, y: {"teacher_view": x, "student_view": x})
    history = model.fit(views, epochs=2, verbose=0, callbacks=[knn.EvaluateKNN(bank, queries, 1)])
    assert len(history.history["loss"]) == 2 and "student_1nn" not in history.history
    assert "Epoch 2 is not scored: Every class that is tested" in capsys.readouterr().out


@pytest.mark.parametrize("k", [1, 3, 200])
@pytest.mark.parametrize("distinct", [3, 10**6])
@pytest.mark.parametrize("ends", [[1, 2, 40, 41, 105, 298], [250], []])
def test_neighbours_are_those_of_a_stable_sort(k, distinct, ends, monkeypatch):
    """Chunks of all sizes, many equal similarities, more neighbours than a chunk has rows."""
    monkeypatch.setattr(knn, "QUERY_BLOCK", 7)
    random = np.random.default_rng(0)
    bank = (random.integers(0, distinct, (300, 2)) - distinct // 2).astype(np.float32)
    queries = random.integers(-3, 4, (20, 2)).astype(np.float32)
    search = knn.NearestNeighbors(queries, k)
    for part in np.split(bank, ends):
        search.add(part)
    expected = np.argsort(-(queries @ bank.T), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(search.rows, expected)


@pytest.mark.parametrize(
    ("bank_size", "labels", "feature", "message"),
    [
        (0, 0, 1.0, "at least 1 examples.*0"),
        (30, 0, 1.0, "two classes in the bank. Received: one"),
        (30, -1, 1.0, "label for every image of the bank.*30 without"),
        (30, 0, np.nan, "features of x must be finite"),
    ],
)
def test_what_cannot_be_scored_is_refused(bank_size, labels, feature, message):
    bank = batches(np.full((bank_size, 2), feature), np.full(bank_size, labels), 8)
    with pytest.raises(ValueError, match=message):
        knn.knn_accuracy({"x": tf.identity}, bank, batches(np.ones((2, 2)), [0, 0], 2))


def test_a_bank_too_small_for_many_neighbours_is_searched_for_fewer():
    bank, labels = np.eye(4)[[0, 1, 2]], np.array([0, 1, 1])
    data = batches(bank, labels, 2), batches(np.eye(4)[[0, 1, 2]], [0, 1, 0], 2)
    scores = knn.knn_accuracy({"x": tf.identity}, *data, neighbors=(1, 3, 4))
    assert scores == {"x_1nn": pytest.approx(2 / 3), "x_3nn": pytest.approx(1 / 3)}


def test_no_queries_are_refused():
    bank = batches(np.ones((30, 2)), np.zeros(30, int), 8)
    with pytest.raises(ValueError, match="no queries"):
        knn.knn_accuracy({"x": tf.identity}, bank, bank.take(0))


def test_float64_encoders_are_accepted(float64):
    encoder = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    data = batches(np.random.default_rng(0).normal(size=(30, 2)), np.arange(30), 8)
    assert knn.knn_accuracy({"x": encoder}, data, data)["x_1nn"] == 1.0


def test_neighbours_at_a_right_angle_are_found():
    """The first chunk's bound is then exactly zero, and what equals it counts."""
    search = knn.NearestNeighbors(np.eye(4, dtype=np.float32)[:1], 3)
    search.add(np.eye(4, dtype=np.float32)[[1, 2, 0, 3]])
    np.testing.assert_array_equal(search.rows, [[2, 0, 1]])
