"""The EMA and the optimizer step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_transformer import DiTConfig
from utils.codecs.pixels import PixelCodec
from utils.objectives.flow_matching import FlowMatching
from utils.train_state import apply_gradients, create_train_state, make_optimizer, update_ema
from utils.train_step import train_step

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


def test_training_noise_times_and_label_drops_differ_from_step_to_step():
    """A model that answers with its input shows what the step feeds it."""
    seen = []

    class Probe:
        config = DiTConfig(class_dropout_prob=0.5, num_classes=10)

        def apply(self, variables, x_t, t, labels):
            seen.append((x_t, t, labels))
            return x_t * variables["params"]["w"]

    state = create_train_state({"w": jnp.array(1.0)}, OPTIMIZER, jax.random.key(0))
    batch = {"image": jnp.zeros((16, 2, 2, 1), jnp.uint8), "label": jnp.zeros(16, jnp.int32)}
    static = {"model": Probe(), "objective": FlowMatching(), "optimizer": OPTIMIZER, "grad_accum": 1}
    with jax.disable_jit():
        for _ in range(2):
            state, _ = train_step(state, batch, PixelCodec(), **static, ema_decay=0.9)
    first, second = [[np.asarray(jax.lax.stop_gradient(x)) for x in call] for call in seen]
    assert all(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
