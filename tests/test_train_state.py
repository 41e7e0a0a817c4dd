"""The EMA and the optimizer step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils.networks.optimizers import make_optimizer
from utils.networks.state import EmaSchedule, apply_gradients, create_train_state, update_ema

OPTIMIZER = make_optimizer(0.1, 0.9, 0.99)


def test_the_ema_is_of_the_parameters_just_updated():
    state = create_train_state({"w": jnp.array([1.0, 2.0])}, OPTIMIZER, jax.random.key(0))
    new, updates = apply_gradients(state, {"w": jnp.array([1.0, -1.0])}, OPTIMIZER, 0.75)
    np.testing.assert_allclose(new.params["w"], state.params["w"] + updates["w"])
    np.testing.assert_allclose(updates["w"], [-0.1, 0.1], rtol=1e-5)  # Adam's first step is lr * sign(gradient)
    np.testing.assert_allclose(new.ema_params["w"], 0.75 * state.params["w"] + 0.25 * new.params["w"], rtol=1e-6)
    assert new.step == 1


@pytest.mark.parametrize(("decay", "expected"), [(0.0, 5.0), (0.9, 1.4)])
def test_ema_formula(decay, expected):
    np.testing.assert_allclose(update_ema({"w": jnp.array(1.0)}, {"w": jnp.array(5.0)}, decay)["w"], expected)


@pytest.mark.parametrize("schedule", [EmaSchedule(0.9), EmaSchedule(0.9, has_warmup=True), EmaSchedule(0.0)])
def test_the_weight_of_the_initial_parameters_is_that_of_the_average_itself(schedule):
    """An EMA that starts at 1 and follows 0 is the weight of its start."""
    weight = {"w": jnp.ones(())}
    for step in range(60):
        assert weight["w"] == pytest.approx(schedule.initial_weight(step), rel=1e-4, abs=1e-9)
        weight = update_ema(weight, {"w": jnp.zeros(())}, schedule.decay_at(jnp.int32(step)))


def test_warm_up_follows_the_parameters_until_the_rate_is_reached():
    schedule = EmaSchedule(0.99, has_warmup=True)
    decays = [float(schedule.decay_at(jnp.int32(step))) for step in (0, 1, 10, 10_000)]
    assert decays == pytest.approx([1 / 10, 2 / 11, 11 / 20, 0.99])
