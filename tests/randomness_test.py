import numpy as np
import tensorflow as tf
from scipy import stats

from isd_tf.views.randomness import Stream, uniforms

GOLDEN = 0x9E3779B97F4A7C15


def split_mix(state):
    """The next number of Java's SplittableRandom, in Python's whole numbers."""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_the_finaliser_is_split_mixs():
    """The generator's published first numbers from the state 0."""
    assert split_mix(GOLDEN) == 0xE220A8397B1DCDAF
    assert split_mix(2 * GOLDEN) == 0x6E789E6AA1B965F4


def test_numbers_are_hashes_of_stream_seed_and_counter():
    seeds = np.array([[0, 0], [7, 3], [-1, 2**62], [2**40, 5]], np.int64)
    for stream in (Stream.CROP, Stream.FLIP):
        hashed = [split_mix(split_mix(a + stream * GOLDEN) + b) for a, b in seeds.tolist()]
        bits = [[split_mix(h + i * GOLDEN) >> 40 for i in range(1, 6)] for h in hashed]
        expected = np.array(bits) * 2.0**-24
        ours = uniforms(tf.constant(seeds), stream, 5)
        np.testing.assert_array_equal(ours, expected.astype(np.float32))
        compiled = tf.function(uniforms, jit_compile=True)(tf.constant(seeds), stream, 5)
        np.testing.assert_array_equal(compiled, ours)


def test_numbers_are_uniform_and_independent():
    places = tf.range(20_000, dtype=tf.int64)
    columns = [
        uniforms(tf.stack([tf.fill([20_000], tf.constant(seed, tf.int64)), places], 1), stream, 2)
        for seed, stream in ((0, Stream.CROP), (1, Stream.CROP), (0, Stream.BLUR))
    ]
    columns = np.concatenate(columns, axis=1)  # [N, 6]
    for column in columns.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(column[1:], column[:-1])[0, 1]) < 0.03  # neighbouring places
    assert np.abs(np.corrcoef(columns.T) - np.eye(6)).max() < 0.03
