import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import INPUTS, linear_encoder

import isd_tf
from isd_tf.methods.feature_queue import FeatureQueue


def rows(values, dimension=3):
    return tf.tile(tf.constant(values, tf.float32)[:, tf.newaxis], [1, dimension])


def test_first_rows_are_random_unit_vectors():
    anchors = FeatureQueue(500, 16, seed=1).read_anchors().numpy()
    np.testing.assert_allclose(np.linalg.norm(anchors, axis=1), 1, rtol=1e-5)
    # Directions spread evenly: the mean of 500 unit vectors has length about 1/sqrt(500).
    assert np.linalg.norm(anchors.mean(axis=0)) < 0.1
    assert not np.allclose(anchors, FeatureQueue(500, 16, seed=2).read_anchors())


def test_enqueue_overwrites_the_oldest_and_wraps_off_a_multiple():
    queue = FeatureQueue(5, 3)
    expected, expected_labels = queue.read_anchors().numpy().copy(), np.full(5, -1)
    for batch in range(4):
        values = np.arange(3) + 10 * batch
        queue.enqueue(rows(values), tf.constant(values, tf.int64))
        for i, value in enumerate(values):
            expected[(3 * batch + i) % 5] = value
            expected_labels[(3 * batch + i) % 5] = value
        np.testing.assert_array_equal(queue.read_anchors(), expected)
        np.testing.assert_array_equal(queue.labels.numpy(), expected_labels)
    assert int(queue.pointer) == 12 % 5


def test_enqueue_without_labels_forgets_the_labels_of_overwritten_rows():
    queue = FeatureQueue(4, 3)
    queue.enqueue(rows([1, 2, 3]), tf.constant([7, 8, 9], tf.int64))
    queue.enqueue(rows([4, 5]))
    np.testing.assert_array_equal(queue.labels.numpy(), [-1, 8, 9, -1])


def test_a_batch_may_fill_the_queue_and_no_more():
    queue = FeatureQueue(3, 3)
    queue.enqueue(rows([1, 2, 3]))
    np.testing.assert_array_equal(queue.read_anchors(), rows([1, 2, 3]))
    with pytest.raises(ValueError, match="at least the global batch size .4.*size=3"):
        queue.enqueue(rows([1, 2, 3, 4]))
    of_any_size = tf.function(queue.enqueue, input_signature=[tf.TensorSpec([None, 3])])
    with pytest.raises(tf.errors.InvalidArgumentError, match="larger than the queue"):
        of_any_size(rows([1, 2, 3, 4]))


def test_rows_labels_and_pointer_are_saved_weights(tmp_path):
    queue = FeatureQueue(5, 3)
    queue.enqueue(rows([1, 2, 3]), tf.constant([1, 2, 3], tf.int64))
    keras.Sequential([keras.Input((2,)), _Holder(queue)]).save_weights(tmp_path / "q.weights.h5")

    other = FeatureQueue(5, 3, seed=9)
    keras.Sequential([keras.Input((2,)), _Holder(other)]).load_weights(tmp_path / "q.weights.h5")

    np.testing.assert_array_equal(other.read_anchors(), queue.read_anchors())
    np.testing.assert_array_equal(other.labels.numpy(), [1, 2, 3, -1, -1])
    assert int(other.pointer) == 3
    assert not other.trainable_variables


class _Holder(keras.layers.Layer):
    def __init__(self, queue):
        super().__init__()
        self.queue = queue

    def call(self, x):
        return x


def test_size_must_be_positive():
    with pytest.raises(ValueError, match="at least one row.*size=0"):
        FeatureQueue(0, 3)


@pytest.mark.parametrize("method", [isd_tf.ISD, isd_tf.MoCoV2])
def test_purity_of_a_queue_of_fewer_than_five_rows_is_about_all_of_them(method):
    model = method(linear_encoder("float32"), None, None, queue_size=4)
    model.compile(isd_tf.TorchSGD(0.1))
    x = tf.random.stateless_normal([4, INPUTS], [0, 0])
    batch = {"teacher_view": x, "student_view": x, "label": tf.constant([0, 0, 0, 1], tf.int64)}
    assert model.train_step(batch)["purity"] == 0  # Nothing has a label yet.
    # Three images meet three rows of four with their label, the fourth meets one.
    assert model.train_step(batch)["purity"] == (3 * 3 + 1) / 16
