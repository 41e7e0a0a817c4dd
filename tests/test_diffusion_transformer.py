"""The DiT against the published implementation's numbers, and its invariances."""

import jax
import numpy as np
import optax
import pytest

from diffusion_transformer import DiT
from utils import checkpoint, flow, sampling
from utils.train_state import apply_gradients, create_train_state, make_optimizer

TOLERANCE = 2e-4


@pytest.fixture(scope="session")
def model(golden) -> DiT:
    sizes = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes")
    return DiT(class_dropout_prob=0.1, **{name: int(golden[f"meta/{name}"]) for name in sizes})


@pytest.fixture(scope="session")
def params(golden):
    flat = {name.removeprefix("params/"): value for name, value in golden.items() if name.startswith("params/")}
    return checkpoint.import_jax_flow_params(flat)


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def test_output_equals_published(golden, model, params):
    v = model.apply({"params": params}, golden["x_1"], golden["t"], golden["labels"])
    np.testing.assert_allclose(v, golden["v_of_x1"], atol=TOLERANCE)
    v = model.apply({"params": params}, golden["x_t"], golden["t"], golden["labels"])
    np.testing.assert_allclose(v, golden["v_pred"], atol=TOLERANCE)


def test_label_drop_equals_published(golden, model, params):
    v = model.apply({"params": params}, golden["x_1"], golden["t"], golden["labels"], True, golden["drop_ids"])
    on_x_t = model.apply({"params": params}, golden["x_t"], golden["t"], golden["labels"], True, golden["drop_ids"])
    assert min(np.abs(v - golden["v_dropped"]).max(), np.abs(on_x_t - golden["v_dropped"]).max()) < TOLERANCE


def test_objective_equals_published(golden, model, params):
    def velocity_fn(x, t):
        return model.apply({"params": params}, x, t, golden["labels"])

    x_0, x_1, t = golden["eps"], golden["x_1"], golden["t"]
    np.testing.assert_allclose(flow.interpolate(x_0, x_1, t), golden["x_t"], atol=1e-6)
    np.testing.assert_allclose(flow.target_velocity(x_0, x_1), golden["v_target"], atol=1e-6)
    losses = flow.flow_matching_loss(velocity_fn, x_0, x_1, t)
    np.testing.assert_allclose(losses, golden["loss_per_example"], atol=TOLERANCE)
    np.testing.assert_allclose(losses.mean(), golden["loss"], atol=TOLERANCE)


def test_adam_steps_equal_published(golden, model, params):
    optimizer = make_optimizer(1e-4, 0.9, 0.99)
    state = create_train_state(params, optimizer, jax.random.key(0))

    @jax.jit
    def step(state, x_0, t):
        def loss_fn(params):
            def velocity_fn(x, t):
                return model.apply({"params": params}, x, t, golden["labels"])

            return flow.flow_matching_loss(velocity_fn, x_0, golden["x_1"], t).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return apply_gradients(state, grads, optimizer, 0.9999)[0], loss, optax.tree.norm(grads)

    for k in range(5):
        state, loss, grad_norm = step(state, golden["adam_eps"][k], golden["adam_t"][k])
        np.testing.assert_allclose(loss, golden["adam_loss"][k], atol=TOLERANCE)
        np.testing.assert_allclose(grad_norm, golden["adam_grad_norm"][k], rtol=TOLERANCE)
    kernel, bias = state.params["patch_embed"]["kernel"], state.params["final_layer"]["dense"]["bias"]
    np.testing.assert_allclose(kernel, golden["adam_final_patch_kernel"], atol=TOLERANCE)
    np.testing.assert_allclose(bias, golden["adam_final_out_bias"], atol=TOLERANCE)


@pytest.mark.parametrize("case", ["1_cfg4.0", "7_cfg4.0", "16_cfg1.5", "16_nocfg", "8_cfg0.0"])
def test_samples_equal_published(golden, model, params, case):
    num_steps, guidance = case.split("_")
    cfg_scale = None if guidance == "nocfg" else float(guidance.removeprefix("cfg"))

    def model_fn(x, t, labels):
        return model.apply({"params": params}, x, t, labels)

    velocity_fn = sampling.guided_velocity(model_fn, golden["sample_labels"], model.num_classes, cfg_scale)
    samples = sampling.euler_sample(velocity_fn, golden["noise"], int(num_steps))
    np.testing.assert_allclose(samples, golden[f"sample_steps{case}"], atol=TOLERANCE)
