"""BatchNorm against its formulas in double precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from isd_tf.networks.batch_norm import BatchNormalization, GroupedBatchNormalization

EPSILON, MOMENTUM = 1e-5, 0.9
# Of a value's size: what the inputs' and outputs' precision, or float32's sums, leave.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "mixed_float16": 2e-3, "mixed_bfloat16": 2e-2}


def make(policy="float32", kind=BatchNormalization, rank=4, **settings):
    """A layer whose weights and statistics are not their initial ones."""
    layer = kind(momentum=MOMENTUM, epsilon=EPSILON, dtype=policy, **settings)
    layer.build((None,) * (rank - 1) + (4,))
    random = np.random.default_rng(1)
    for variable in layer.weights:
        variable.assign(random.uniform(0.5, 2.0, 4))
    return layer


def formulas(layer, x, dy):
    """Outputs, gradients of sum(outputs * dy) by x, gamma and beta, mean, unbiased variance."""
    gamma, beta = (w.numpy().astype(np.float64) for w in (layer.gamma, layer.beta))
    axes = tuple(range(x.ndim - 1))
    count = x[..., 0].size
    mean = x.sum(axes) / count
    squares = ((x - mean) ** 2).sum(axes)
    deviation = np.sqrt(squares / count + EPSILON)
    normal = (x - mean) / deviation
    by_gamma, by_beta = (dy * normal).sum(axes), dy.sum(axes)
    by_x = gamma / deviation * (dy - by_beta / count - normal * by_gamma / count)
    unbiased = squares / max(count - 1, 1)
    return normal * gamma + beta, (by_x, by_gamma, by_beta), mean, unbiased


def values(shape, dtype, seed):
    """Numbers with means that differ from 0, rounded to `dtype`: a tensor, and in float64."""
    random = np.random.default_rng(seed)
    tensor = tf.cast(tf.constant(random.normal(1.0, 2.0, shape)), dtype)
    return tensor, tf.cast(tensor, tf.float64).numpy()


def assert_close(ours, expected, tolerance):
    ours = tf.cast(ours, tf.float64)
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("shape", [(6, 5, 5, 4), (16, 4), (2, 1, 1, 4), (1, 1, 1, 4)])
@pytest.mark.parametrize("policy", TOLERANCES)
def test_outputs_gradients_and_moving_statistics_are_the_formulas(policy, shape, jit_compile):
    layer, tolerance = make(policy, rank=len(shape)), TOLERANCES[policy]
    before = [statistic.numpy() for statistic in (layer.moving_mean, layer.moving_variance)]
    x, x64 = values(shape, layer.compute_dtype, 2)
    dy, dy64 = values(shape, layer.compute_dtype, 3)
    expected, by_expected, mean, variance = formulas(layer, x64, dy64)

    @tf.function(jit_compile=jit_compile)
    def run(x):
        weights = [layer.gamma.value, layer.beta.value]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, tape.gradient(y, [x, *weights], output_gradients=dy)

    y, gradients = run(x)
    assert y.dtype == layer.compute_dtype
    assert_close(y, expected, tolerance)
    for ours, theirs in zip(gradients, by_expected, strict=True):
        assert_close(ours, theirs, tolerance)
    # Statistics are never half as precise, whatever the network computes in.
    tolerance = min(tolerance, 1e-6)
    for moving, old, new in zip(
        (layer.moving_mean, layer.moving_variance), before, (mean, variance), strict=True
    ):
        assert_close(moving.value, MOMENTUM * old + (1 - MOMENTUM) * new, tolerance)


@pytest.mark.parametrize("shape", [(6, 5, 5, 4), (16, 4)])
@pytest.mark.parametrize("policy", TOLERANCES)
def test_inference_normalises_by_the_moving_statistics_and_keeps_them(policy, shape):
    layer = make(policy, rank=len(shape))
    before = [variable.numpy().astype(np.float64) for variable in layer.weights]
    gamma, beta, mean, variance = before
    x, x64 = values(shape, layer.compute_dtype, 2)
    expected = (x64 - mean) / np.sqrt(variance + EPSILON) * gamma + beta
    assert_close(layer(x, training=False), expected, TOLERANCES[policy])
    layer.trainable = False
    assert_close(layer(x, training=True), expected, TOLERANCES[policy])
    for variable, old in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), old)


@pytest.mark.parametrize("policy", ["float64", "float32", "mixed_bfloat16"])
def test_groups_are_normalised_as_so_many_devices_would(policy):
    """Bit by bit, gradients as well; the moving statistics are the mean of the devices' own."""
    grouped, single = make(policy, GroupedBatchNormalization, groups=3), make(policy)
    initial = single.get_weights()
    x, _ = values((12, 5, 5, 4), single.compute_dtype, 2)
    dy, _ = values((12, 5, 5, 4), single.compute_dtype, 3)

    def run(layer, x, dy):
        layer.set_weights(initial)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, tape.gradient(y, x, output_gradients=dy), *layer.get_weights()[2:]

    *ours, mean, variance = run(grouped, x, dy)
    devices = [run(single, *parts) for parts in zip(tf.split(x, 3), tf.split(dy, 3), strict=True)]
    outputs, gradients, means, variances = zip(*devices, strict=True)
    np.testing.assert_array_equal(ours[0], np.concatenate(outputs))
    np.testing.assert_array_equal(ours[1], np.concatenate(gradients))
    np.testing.assert_allclose(mean, np.mean(means, axis=0), rtol=1e-6)
    np.testing.assert_allclose(variance, np.mean(variances, axis=0), rtol=1e-6)
    with pytest.raises(ValueError, match="3 groups share a batch evenly.*a batch of 10"):
        grouped(x[:10], training=True)


@pytest.mark.parametrize("policy", TOLERANCES)
def test_synchronised_statistics_are_those_of_all_replicas(policy, two_replicas):
    with two_replicas.scope():
        layer = make(policy, synchronized=True)
    before = [statistic.numpy() for statistic in (layer.moving_mean, layer.moving_variance)]
    x, x64 = values((6, 3, 3, 4), layer.compute_dtype, 2)
    expected, _, mean, variance = formulas(layer, x64, np.zeros_like(x64))
    halves = tf.split(x, 2)

    @tf.function
    def run():
        def replica(half):
            return layer(half, training=True)

        given = two_replicas.experimental_distribute_values_from_function(
            lambda context: halves[context.replica_id_in_sync_group]
        )
        return two_replicas.experimental_local_results(two_replicas.run(replica, (given,)))

    assert_close(tf.concat(run(), axis=0), expected, TOLERANCES[policy])
    for moving, old, new in zip(
        (layer.moving_mean, layer.moving_variance), before, (mean, variance), strict=True
    ):
        for copy in two_replicas.experimental_local_results(moving.value):
            moved = MOMENTUM * old + (1 - MOMENTUM) * new
            assert_close(copy, moved, min(TOLERANCES[policy], 1e-6))


@pytest.mark.parametrize(
    "kind, settings",
    [
        (BatchNormalization, {}),
        (BatchNormalization, {"synchronized": True}),
        (GroupedBatchNormalization, {"groups": 2}),
    ],
)
def test_a_network_with_it_is_saved_and_loaded(kind, settings, tmp_path):
    network = keras.Sequential([keras.Input((3, 3, 4)), make(kind=kind, name="bn", **settings)])
    network.save(tmp_path / "network.keras")
    loaded = keras.models.load_model(tmp_path / "network.keras")
    layer = loaded.get_layer("bn")
    assert type(layer) is kind
    assert layer.get_config() == network.get_layer("bn").get_config()
    assert [w.name for w in layer.weights] == ["gamma", "beta", "moving_mean", "moving_variance"]
    x, _ = values((4, 3, 3, 4), "float32", 2)
    for training in (False, True):
        np.testing.assert_array_equal(loaded(x, training=training), network(x, training=training))
