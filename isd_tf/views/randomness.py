"""Random numbers as a function of (seed, place, stream), for a whole batch at once.

A counter-based generator keeps no state: an image draws the same numbers eagerly, in tf.data, under
XLA, on any device, and whatever other images are in its batch.
"""

import tensorflow as tf

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


class Stream:
    """Keeps the draws of one image's operations apart."""

    CROP, COLOR, BLUR, FLIP = 1, 2, 3, 4


def uniforms(seeds: tf.Tensor, stream: int, count: int) -> tf.Tensor:
    """Draws numbers uniform in [0, 1), each row from its own seed.

    Args:
        seeds: int64 [B, 2].
        stream: of `Stream`.
        count: numbers a row.

    Returns:
        float32 [B, count], multiples of 2^-24.

    Source: SplitMix64, Steele et al., OOPSLA 2014: here a number's counter is hashed in turn with
    the stream and both parts of the seed.
    """
    first, second = tf.unstack(tf.bitcast(tf.cast(seeds, tf.int64), tf.uint64), axis=1)
    hashed = _mix(_mix(first + _unsigned(stream * GOLDEN)) + second)[:, tf.newaxis]
    counters = tf.stack([_unsigned(number * GOLDEN) for number in range(1, count + 1)])
    bits = tf.bitwise.right_shift(_mix(hashed + counters), _unsigned(40))
    return tf.cast(tf.cast(bits, tf.int32), tf.float32) * 2**-24


def between(uniform: tf.Tensor, low, high) -> tf.Tensor:
    """Stretches numbers uniform in [0, 1) to [low, high), each a number or an array."""
    return low + uniform * (high - low)


def _mix(z):
    """SplitMix64's finaliser: a permutation of all uint64."""
    z = (z ^ tf.bitwise.right_shift(z, _unsigned(30))) * _unsigned(0xBF58476D1CE4E5B9)
    z = (z ^ tf.bitwise.right_shift(z, _unsigned(27))) * _unsigned(0x94D049BB133111EB)
    return z ^ tf.bitwise.right_shift(z, _unsigned(31))


def _unsigned(number):
    return tf.constant(number % 2**64, tf.uint64)
