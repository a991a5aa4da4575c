import math

import pytest
import tensorflow as tf

from isd_tf.training.schedules import CosineByEpoch, DropsByEpoch


@pytest.mark.parametrize("step", [0, 99, 100, 10_000, 19_999])
def test_cosine_is_constant_inside_an_epoch(step):
    rate = CosineByEpoch(0.05, epochs=200, steps_per_epoch=100)(tf.constant(step, tf.int64))
    epoch = step // 100 + 1  # The paper counts from 1.
    expected = 0.5 * 0.05 * (1 + math.cos(math.pi * (epoch - 1) / 200))
    assert float(rate) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("epoch", "expected"), [(1, 0.01), (140, 0.01), (141, 0.002), (180, 0.002), (181, 0.0004)]
)
def test_drops_begin_with_their_epoch(epoch, expected):
    schedule = DropsByEpoch(0.01, ["141", "181"], 0.2, steps_per_epoch=5004)
    first, last = (epoch - 1) * 5004, epoch * 5004 - 1
    assert float(schedule(tf.constant(first, tf.int64))) == pytest.approx(expected, rel=1e-6)
    assert float(schedule(tf.constant(last, tf.int64))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("schedule", [CosineByEpoch(0.1, 3, 4), DropsByEpoch(0.1, [2], 0.2, 4)])
def test_config_makes_the_same_schedule(schedule):
    copy = type(schedule).from_config(schedule.get_config())
    assert [float(copy(tf.constant(s))) for s in range(12)] == [
        float(schedule(tf.constant(s))) for s in range(12)
    ]
