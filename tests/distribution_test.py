import io

import numpy as np
import pytest
import tensorflow as tf

from isd_tf.training import distribution

VALUES = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


def on_replicas(strategy, function):
    """Runs function(rows of this replica) on each, and returns their results."""

    def rows_of(context):
        i = context.replica_id_in_sync_group
        return tf.constant(VALUES[4 * i : 4 * i + 4])

    rows = strategy.experimental_distribute_values_from_function(rows_of)
    result = tf.function(lambda: strategy.run(function, args=(rows,)))()
    return [value.numpy() for value in strategy.experimental_local_results(result)]


def test_gather_gives_every_replica_the_global_batch_in_order(two_replicas):
    for gathered in on_replicas(two_replicas, distribution.gather_across_replicas):
        np.testing.assert_array_equal(gathered, VALUES)


def test_what_comes_in_another_order_is_sorted_by_replica():
    parts = [VALUES[4:6], VALUES[0:2], VALUES[6:8], VALUES[2:4]]
    ordered = distribution.in_replica_order(tf.concat(parts, 0), tf.constant([2, 0, 3, 1]))
    np.testing.assert_array_equal(ordered, VALUES)


def test_shuffled_call_normalises_over_shuffled_groups_and_restores_the_order(two_replicas):
    def centre(rows):
        return rows - tf.reduce_mean(rows, axis=0)

    results = on_replicas(
        two_replicas, lambda rows: distribution.call_shuffled(centre, rows, tf.constant([7, 3]))
    )

    order = tf.random.experimental.stateless_shuffle(tf.range(8), [7, 3]).numpy()
    expected = np.empty_like(VALUES)
    for group in (order[:4], order[4:]):
        expected[group] = VALUES[group] - VALUES[group].mean(axis=0)
    np.testing.assert_allclose(np.concatenate(results), expected, atol=1e-6)
    assert sorted(order[:4]) != [0, 1, 2, 3]  # The groups are mixed, or this test shows nothing.


def test_permutation_depends_on_the_seed(two_replicas):
    def first_row_of_group(rows):
        return tf.repeat(rows[:1], 4, axis=0)

    seen = {
        np.concatenate(
            on_replicas(
                two_replicas,
                lambda rows, step=step: distribution.call_shuffled(
                    first_row_of_group, rows, tf.constant([0, step])
                ),
            )
        ).tobytes()
        for step in range(4)
    }
    assert len(seen) > 1


def test_crops_are_shuffled_with_their_seeds_bit_by_bit(two_replicas):
    # Rows of 27 bytes fill no whole number of words, and as float32 the first words are a
    # signalling NaN and a denormal number.
    crops = np.random.default_rng(1).integers(0, 256, (8, 3, 3, 3), np.uint8)
    crops.reshape(8, -1)[:, :8] = [1, 0, 128, 127, 1, 0, 0, 0]
    crops[:, 2, 2, 2] = np.arange(8)
    seeds = np.arange(8, dtype=np.int64)[:, np.newaxis] + [0, 2**40]

    def own(rows):
        first = 4 * tf.distribute.get_replica_context().replica_id_in_sync_group
        examples = {"strong": (tf.constant(crops)[first:][:4], tf.constant(seeds)[first:][:4])}
        seen = []

        def note(shuffled):
            images, numbers = shuffled["strong"]
            assert (images.dtype, images.shape) == (tf.uint8, [4, 3, 3, 3])
            seen.extend([tf.reshape(tf.cast(images, tf.int64), [4, -1]), numbers])
            return tf.cast(numbers, tf.float32)

        embeddings = distribution.call_shuffled(note, examples, tf.constant([7, 3]))
        return tf.concat([*seen, tf.cast(embeddings, tf.int64)], axis=1)

    results = np.concatenate(on_replicas(two_replicas, own))
    order = tf.random.experimental.stateless_shuffle(tf.range(8), [7, 3]).numpy()
    np.testing.assert_array_equal(results[:, :27], crops.reshape(8, -1)[order])
    np.testing.assert_array_equal(results[:, 27:29], seeds[order])
    np.testing.assert_array_equal(results[:, 29:], seeds.astype(np.float32))


def test_one_replica_calls_without_shuffling():
    result = distribution.call_shuffled(tf.identity, tf.constant(VALUES), tf.constant([0, 0]))
    np.testing.assert_array_equal(result, VALUES)


def test_gradients_that_overflow_on_one_replica_do_so_on_all(two_replicas):
    def gradients_of(rows):
        first = tf.distribute.get_replica_context().replica_id_in_sync_group == 0
        fine = [tf.constant([1.0, 2.0]), rows]
        broken = [tf.constant([1.0, float("inf")]), rows]
        broken = [tf.where(first, *pair) for pair in zip(fine, broken, strict=True)]
        return [distribution.spread_overflow(gradients) for gradients in (fine, broken)]

    run = tf.function(lambda: two_replicas.run(gradients_of, args=(tf.constant(VALUES),)))
    fine, broken = run()
    for copy in two_replicas.experimental_local_results(fine[0]):
        np.testing.assert_array_equal(copy, [1.0, 2.0])
    for gradient in broken:
        for copy in two_replicas.experimental_local_results(gradient):
            assert np.isnan(copy).all()


def test_bfloat16_is_native_where_the_processor_says_so(monkeypatch):
    for flags, native in (("fpu sse avx2", False), ("fpu avx512f avx512_bf16", True)):
        monkeypatch.setattr("builtins.open", lambda *_, flags=flags: io.StringIO(flags))
        assert distribution.bfloat16_is_native() == native


def test_strategies_by_name():
    assert distribution.choose_strategy("one").num_replicas_in_sync == 1
    assert distribution.choose_strategy("auto").num_replicas_in_sync == 1  # No GPU here.
    assert distribution.choose_strategy("mirrored").num_replicas_in_sync == 2
    with pytest.raises(ValueError, match="auto, one, mirrored, multi_worker.*'tpu'"):
        distribution.choose_strategy("tpu")
