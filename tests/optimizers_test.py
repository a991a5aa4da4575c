import keras
import numpy as np
import pytest

from isd_tf.training.optimizers import TorchSGD
from isd_tf.training.schedules import DropsByEpoch


def test_steps_equal_pytorchs_formula_across_a_drop_of_the_rate(float64):
    random = np.random.default_rng(0)
    weight = random.normal(size=(4, 3))
    gradients = random.normal(size=(6, 4, 3))
    variable = keras.Variable(weight)
    optimizer = TorchSGD(DropsByEpoch(0.125, [2], 0.25, steps_per_epoch=3), 0.9, 0.01)

    buffer = np.zeros_like(weight)
    for step, gradient in enumerate(gradients):
        optimizer.apply_gradients([(keras.ops.convert_to_tensor(gradient), variable)])
        buffer = 0.9 * buffer + gradient + 0.01 * weight
        weight = weight - (0.125 if step < 3 else 0.03125) * buffer
        # Rates are powers of two, as the schedule computes in float32.
        np.testing.assert_allclose(variable.numpy(), weight, rtol=1e-12)


def test_config_makes_the_same_optimizer():
    copy = TorchSGD.from_config(TorchSGD(0.3, 0.8, 0.02).get_config())
    assert float(copy.learning_rate) == pytest.approx(0.3)
    assert (copy.sgd_momentum, copy.coupled_weight_decay) == (0.8, 0.02)


@pytest.mark.parametrize("arguments", [dict(sgd_momentum=1.0), dict(coupled_weight_decay=-1)])
def test_values_outside_their_range_are_refused(arguments):
    with pytest.raises(ValueError, match="Received"):
        TorchSGD(0.1, **arguments)
