"""The DiT against the published implementation's numbers, and its invariances."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffusion_transformer
from diffusion_transformer import DiT, DiTConfig
from utils.base.devices import memory_needed
from utils.base.mesh import compile_step
from utils.convert.jax_flow import import_jax_flow_params
from utils.networks.models import model_fn
from utils.networks.optimizers import make_optimizer
from utils.networks.state import apply_gradients, create_train_state
from utils.objectives.flow_matching import FlowMatching
from utils.sampling import solvers as sampling
from utils.sampling.guidance import guide

pytestmark = pytest.mark.usefixtures("optimised")

TOLERANCE = 2e-4


def with_config(model: DiT, **changes) -> DiT:
    return model.clone(config=dataclasses.replace(model.config, **changes))


@pytest.fixture(scope="session")
def model(golden) -> DiT:
    sizes = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes")
    values = {name: int(golden[f"meta/{name}"]) for name in sizes}
    return DiT(DiTConfig(class_dropout_prob=0.1, dtype="float32", **values))


@pytest.fixture(scope="session")
def params(golden):
    flat = {name.removeprefix("params/"): value for name, value in golden.items() if name.startswith("params/")}
    return jax.tree.map(jnp.asarray, import_jax_flow_params(flat))


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
    labels = jnp.where(golden["drop_ids"] == 1, model.config.num_classes, golden["labels"])
    v = model.apply({"params": params}, golden["x_1"], golden["t"], labels)
    np.testing.assert_allclose(v, golden["v_dropped"], atol=TOLERANCE)


def test_objective_equals_published(golden, model, params):
    draws = {"x_0": golden["eps"], "t": jnp.asarray(golden["t"])}
    objective, x_1, functions = FlowMatching(), golden["x_1"], [model_fn(model, params)] * 2
    np.testing.assert_allclose(objective.corrupt(x_1, draws), golden["x_t"], atol=1e-6)
    losses, metrics = objective.loss(*functions, x_1, golden["labels"], draws)
    np.testing.assert_allclose(losses, golden["loss_per_example"], atol=TOLERANCE)
    np.testing.assert_allclose(losses.mean(), golden["loss"], atol=TOLERANCE)
    axes = tuple(range(1, x_1.ndim))
    np.testing.assert_allclose(metrics["v_abs_mean"], np.abs(golden["v_target"]).mean(axes), atol=1e-6)
    np.testing.assert_allclose(metrics["v_pred_abs_mean"], np.abs(golden["v_pred"]).mean(axes), atol=TOLERANCE)


def test_adam_steps_equal_published(golden, model, params):
    optimizer = make_optimizer(1e-4, 0.9, 0.99)
    state = create_train_state(params, optimizer, jax.random.key(0))

    @jax.jit
    def step(state, x_0, t):
        def loss_fn(params):
            functions = [model_fn(model, params)] * 2
            losses, _ = FlowMatching().loss(*functions, golden["x_1"], golden["labels"], {"x_0": x_0, "t": t})
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return apply_gradients(state, grads, optimizer, 0.9999)[0], loss, optax.tree.norm(grads)

    for k in range(5):
        state, loss, grad_norm = step(state, golden["adam_eps"][k], golden["adam_t"][k])
        np.testing.assert_allclose(loss, golden["adam_loss"][k], atol=TOLERANCE)
        np.testing.assert_allclose(grad_norm, golden["adam_grad_norm"][k], rtol=TOLERANCE)
    kernel, bias = state.params["patch_embed"]["kernel"], state.params["final_layer"]["dense"]["bias"]
    # Five steps of 1e-4 move a parameter by up to 5e-4: the tolerance has to be far below that.
    np.testing.assert_allclose(kernel, golden["adam_final_patch_kernel"], atol=5e-6)
    np.testing.assert_allclose(bias, golden["adam_final_out_bias"], atol=5e-6)


@pytest.mark.parametrize("case", ["1_cfg4.0", "7_cfg4.0", "16_cfg1.5", "16_nocfg", "8_cfg0.0"])
def test_samples_equal_published(golden, model, params, case):
    num_steps, guidance = case.split("_")
    cfg_scale = None if guidance == "nocfg" else float(guidance.removeprefix("cfg"))

    guided = guide(model_fn(model, params), model.condition.null, cfg_scale)
    velocity_fn = FlowMatching().velocity(guided, golden["sample_labels"])
    samples = sampling.sample(velocity_fn, golden["noise"], int(num_steps))
    np.testing.assert_allclose(samples, golden[f"sample_steps{case}"], atol=TOLERANCE)


def test_position_table_formula():
    """Column 3 of row 1: the first half of the channels encodes 3, the second half 1; sines, then cosines."""
    table = diffusion_transformer.position_table(4, 4, 16)
    frequencies = 1 / 10_000 ** (2 * np.arange(4) / 8)
    expected = [f(p * frequencies) for p in (3, 1) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(table[1 * 4 + 3], np.concatenate(expected), atol=1e-6)


def test_initial_parameters_are_the_recipes():
    model = DiT(
        DiTConfig(
            patch_size=2, hidden_size=256, depth=1, num_heads=4, mlp_ratio=4, class_dropout_prob=0.1, num_classes=10
        )
    )
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    params = params["params"]
    assert "pos_embed" not in params
    block = params["block_0"]
    for zero in (block["ada_ln"], params["final_layer"]):
        assert all(not leaf.any() for leaf in jax.tree.leaves(zero))
    for normal in (params["timestep_embed"]["dense_0"]["kernel"], params["label_embed"]["Embed_0"]["embedding"]):
        assert normal.std() == pytest.approx(0.02, rel=0.1)
    assert block["mlp"]["dense_0"]["bias"].std() == pytest.approx(1e-6, rel=0.2)
    # Xavier uniform reaches sqrt(6 / (fan in + fan out)); each of query, key and value counts for itself.
    limits = {
        "qkv": (block["attention"]["qkv"]["kernel"], 256 + 256),
        "out": (block["attention"]["out"]["kernel"], 256 + 256),
        "mlp": (block["mlp"]["dense_0"]["kernel"], 256 + 1024),
        "patch": (params["patch_embed"]["kernel"], 2 * 2 * 4 + 2 * 2 * 256),
    }
    for name, (kernel, fans) in limits.items():
        assert np.abs(kernel).max() == pytest.approx(np.sqrt(6 / fans), rel=0.01), name


def test_a_model_that_never_saw_labels_ignores_them(golden, model, params):
    blind = with_config(model, class_dropout_prob=1.0)
    outputs = [
        blind.apply({"params": params}, golden["x_1"], golden["t"], labels)
        for labels in (golden["labels"], jnp.full_like(golden["labels"], model.config.num_classes))
    ]
    np.testing.assert_array_equal(*outputs)
    assert np.abs(outputs[0] - golden["v_of_x1"]).max() > 1e-3


def test_without_t_conditioning_times_do_not_matter(golden, model, params):
    blind = with_config(model, t_conditioning=0)
    x, labels = golden["x_1"], golden["labels"]
    v = blind.apply({"params": params}, x, golden["t"], labels)
    np.testing.assert_array_equal(v, blind.apply({"params": params}, x, 1 - golden["t"], labels))
    np.testing.assert_allclose(v, model.apply({"params": params}, x, 0 * golden["t"], labels), atol=1e-6)


def test_bfloat16_stays_close_and_keeps_float32_parameters(golden, model, params):
    low = with_config(model, dtype="bfloat16")
    v = low.apply({"params": params}, golden["x_t"], golden["t"], golden["labels"])
    assert v.dtype == jnp.float32
    assert np.linalg.norm(v - golden["v_pred"]) < 0.03 * np.linalg.norm(golden["v_pred"])
    shapes = jax.eval_shape(low.init, jax.random.key(0), golden["x_t"], golden["t"], golden["labels"])
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("remat", ["dots", "blocks"])
def test_rematerialisation_changes_no_gradient(remat):
    model = DiT(
        DiTConfig(
            patch_size=4,
            hidden_size=16,
            depth=2,
            num_heads=2,
            mlp_ratio=2.0,
            class_dropout_prob=0.1,
            num_classes=10,
            dtype="float32",
        )
    )
    x, t, labels = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([0.2, 0.7]), jnp.array([3, 10])
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0), x, t, labels)
    params = jax.tree.map(lambda like: jnp.asarray(0.2 * rng.normal(size=like.shape), jnp.float32), shapes)

    def gradients(model):
        return jax.jit(jax.grad(lambda params: jnp.square(model.apply(params, x, t, labels)).mean()))(params)

    pairs = zip(*(jax.tree.leaves(gradients(m)) for m in (model, model.clone(remat=remat))), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_rematerialisation_saves_memory_by_the_compilers_analysis():
    def memory(remat):
        model = DiT(
            DiTConfig(
                patch_size=2,
                hidden_size=64,
                depth=4,
                num_heads=2,
                mlp_ratio=4.0,
                class_dropout_prob=0.1,
                num_classes=10,
                dtype="bfloat16",
            ),
            remat,
        )
        x, t, labels = jnp.zeros((64, 8, 8, 4)), jnp.zeros(64), jnp.zeros(64, jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), x, t, labels)
        step = jax.jit(jax.grad(lambda params: jnp.square(model.apply(params, x, t, labels)).mean()))
        return memory_needed(compile_step(step, params, platform="cpu"))

    none, dots, blocks = map(memory, ("none", "dots", "blocks"))
    assert blocks < 0.85 * none
    assert dots < none  # of tiny blocks, what lies between the matmuls is little


def test_flops_are_those_the_compiler_counts(golden, model, params):
    """Matmuls dominate even here; the compiler adds the elementwise operations."""
    x = golden["x_t"]
    wide = with_config(model, hidden_size=384, num_heads=6)
    args = (jnp.asarray(x), jnp.zeros(len(x)), jnp.zeros(len(x), jnp.int32))
    wide_params = jax.eval_shape(wide.init, jax.random.key(0), *args)
    counted = jax.jit(wide.apply).lower(wide_params, *args).cost_analysis()["flops"]
    assert len(x) * wide.count_flops(x.shape[1:]) == pytest.approx(counted, rel=0.1)
    dit_b = DiT(
        DiTConfig(
            patch_size=2, hidden_size=768, depth=12, num_heads=12, mlp_ratio=4, class_dropout_prob=0.1, num_classes=1000
        )
    )
    assert 3 * dit_b.count_flops((32, 32, 4)) == pytest.approx(138e9, rel=0.01)
