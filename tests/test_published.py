"""Published checkpoints against what the published PyTorch code computes, see tests/golden/README.md."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from diffusion_transformer import DiT, DiTConfig
from tests.conftest import GOLDEN, ROOT
from tests.published_network import forward
from utils.base.external import BadFileError
from utils.conditions.classes import ClassCondition
from utils.convert.published import FAMILIES, export_published, find_config, import_published, tensor_table
from utils.convert.sources import read_source
from utils.networks.models import model_fn
from utils.objectives.objectives import make_objective
from utils.sampling import solvers as sampling
from utils.sampling.guidance import guide, within
from utils.sampling.solvers import SOLVERS, SamplerConfig

TOLERANCE = 1e-5  # of the largest value; recipe_checkpoints.md says what a wrong import would differ by
SHARED = ROOT.parent / "shared" / "golden" / "checkpoints"  # files too large to stand twice
FILES = {
    "sit_small_train.pt": "sit", "sit_tiny.pt": "sit", "dit_tiny.pt": "dit", "dit_tiny.safetensors": "dit",
    "dit_tiny_diffusers": "dit", "lightningdit_tiny.pt": "lightningdit",
}  # fmt: skip
PLACES = {
    name: next((place / name for place in (GOLDEN / "checkpoints", SHARED) if (place / name).exists()), None)
    for name in FILES
}
SITS = [name for name in FILES if FILES[name] == "sit" and PLACES[name]]
DITS = [name for name in FILES if FILES[name] == "dit" and PLACES[name]]


def to_nhwc(x):
    return np.moveaxis(x, -3, -1)


def error(found, expected):
    """The largest deviation, relative to the largest value."""
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def load(name):
    """Returns a published file as it is imported, and its golden numbers, images NHWC."""
    path, family = PLACES[name], FILES[name]
    stem = name.split(".")[0].removesuffix("_train").removesuffix("_diffusers")
    numbers = np.load(path.parent / f"{stem}_golden.npz")
    golden = {key: jnp.asarray(to_nhwc(value) if value.ndim >= 4 else value) for key, value in numbers.items()}
    sizes = json.loads((path.parent / f"{stem}.json").read_text())
    state = read_source(str(path)).state
    config, latent_shape = find_config(state, family, sizes["num_heads"])
    for field in ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes"):
        assert getattr(config, field) == sizes[field]
    assert latent_shape == (sizes["input_size"], sizes["input_size"], sizes["in_channels"])
    params = jax.tree.map(jnp.asarray, import_published(state, config, latent_shape))
    objective = make_objective({"objective": FAMILIES[family].objective, "model": FAMILIES[family].settings})
    network = model_fn(DiT(config), params)
    return SimpleNamespace(
        state=state, config=config, latent_shape=latent_shape, params=params, objective=objective, network=network,
        golden=golden,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=SITS)
def sit(request):
    return load(request.param)


@pytest.fixture(scope="module", params=DITS)
def dit(request):
    return load(request.param)


def null_of(model):
    return ClassCondition(num_classes=model.config.num_classes).null


def velocity(model, labels, cfg_scale, cfg_channels=3):
    guided = guide(model.network, null_of(model), cfg_scale, cfg_channels)
    return model.objective.velocity(guided, jnp.asarray(labels, jnp.int32))


def test_a_sit_computes_what_the_published_one_does(sit):
    golden = sit.golden
    assert error(sit.network(golden["x"], golden["t"], golden["y"]), golden["out"]) < TOLERANCE
    guided = velocity(sit, golden["cfg_y"], golden["cfg_scale"])
    assert error(guided(golden["cfg_z"], golden["cfg_t"], golden["cfg_t"]), golden["cfg_out"]) < TOLERANCE
    # The loss of its training, at the noise of the file.
    t = golden["t"][:, None, None, None]
    np.testing.assert_allclose((1 - t) * golden["train_x0"] + t * golden["train_x1"], golden["train_xt"], atol=1e-6)
    prediction = sit.network(golden["train_xt"], golden["t"], golden["y"])
    losses = np.square(prediction - golden["train_ut"]).mean((1, 2, 3))
    np.testing.assert_allclose(losses, golden["train_loss"], rtol=TOLERANCE)
    np.testing.assert_array_equal(golden["train_ut"], golden["train_x1"] - golden["train_x0"])


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("guidance", ["cfg", "nocfg"])
@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint"])
def test_a_sit_is_sampled_as_published(sit, solver, guidance, num_steps):
    golden = sit.golden
    scale = float(golden["sample_cfg"]) if guidance == "cfg" else None
    field = velocity(sit, golden["sample_y"], scale)
    samples = sampling.sample(field, jnp.asarray(golden["sample_z"]), num_steps, solver)
    assert error(samples, golden[f"{solver}_{num_steps}_{guidance}"]) < TOLERANCE


def test_a_sits_sde_is_the_published_one(sit):
    golden = sit.golden
    field, x = velocity(sit, golden["sample_y"], float(golden["sample_cfg"])), jnp.asarray(golden["sample_z"])
    noises = [*golden["sde_noises"], np.full_like(x, np.nan)]  # the last step draws none
    for i, fresh in enumerate(noises):
        t, t_next = (sampling.sde_time_at(step, len(noises)) for step in (i, i + 1))
        x = SOLVERS["sde"].step(field, x, t, t_next, jnp.nan_to_num(fresh) if i < 3 else jnp.zeros_like(x))
    assert error(x, golden["sde4_cfg"]) < TOLERANCE


def test_adaptive_steps_lead_where_the_published_ones_do(sit):
    """The published file was made with rtol 1e-3, and deviates by about as much; many fixed steps do not."""
    golden = sit.golden
    noise, labels = jnp.asarray(golden["sample_z"]), jnp.asarray(golden["sample_y"], jnp.int32)
    scale = float(golden["sample_cfg"])
    found, _ = sampling.adaptive_sample(lambda y: velocity(sit, y, scale), noise, labels, rtol=1e-6, atol=1e-6)
    fixed = sampling.sample(velocity(sit, labels, scale), noise, 128, "heun")
    assert error(found, fixed) < 3 * TOLERANCE
    assert error(found, golden["dopri5_cfg"]) < 1e-3


def test_a_dit_computes_what_the_published_one_does(dit):
    golden, levels = dit.golden, dit.golden["t"].astype(jnp.float32)
    assert error(dit.network(golden["x"], levels, golden["y"]), golden["out"]) < TOLERANCE
    found = dit.network(golden["x"], golden["t_frac"], golden["y"])
    assert error(found, golden["out_frac"]) < TOLERANCE
    # The noise that a velocity on the straight path amounts to.
    t = dit.objective.time_of(golden["t"])[:, None, None, None]
    x = golden["x"] * np.hypot(t, 1 - t)
    noise = x - t * velocity(dit, golden["y"], None)(x, t.ravel(), t.ravel())
    assert error(noise, golden["out"][..., :4]) < TOLERANCE
    predicted = dit.objective.predict_data(dit.network, golden["x"], t.ravel(), jnp.asarray(golden["y"]))
    for i in range(4):
        assert error(predicted[i], golden["step_pred_xstart"][i]) < 2 * TOLERANCE


def test_guidance_of_a_dit_leaves_its_last_channel_and_sigma(dit):
    golden = dit.golden
    guided = guide(dit.network, null_of(dit), float(golden["cfg_scale"]), 3)
    found = guided(golden["cfg_z"], jnp.asarray(golden["cfg_t"], jnp.float32), jnp.asarray(golden["cfg_y"], jnp.int32))
    assert error(found, golden["cfg_out"]) < TOLERANCE


def test_ddim_of_a_dit_is_euler_on_the_straight_path(dit):
    golden = dit.golden
    field = velocity(dit, golden["sample_y"], float(golden["sample_cfg"]))

    def times(step, num_steps):
        return dit.objective.time_at(step, num_steps, "leading")

    levels = [round(float(dit.objective.level_at(times(i, 4)))) for i in range(4)]
    assert levels == golden["ddim4_timesteps"].tolist()[::-1]
    samples = sampling.sample(field, jnp.asarray(golden["sample_z"]), 4, "ddim", times)
    assert error(samples, golden["ddim4"]) < TOLERANCE


def test_ddpm_of_a_dit_has_its_learned_variance(dit):
    golden = dit.golden
    # One step of the process with all 1,000 levels, from each of four; no noise is added after the last.
    labels, levels = golden["y"].astype(jnp.int32), golden["t"]
    field = dit.objective.velocity_with_variance(dit.network, labels)
    for i, level in enumerate(levels.tolist()):
        t = dit.objective.time_of(jnp.int32(level))
        t_next = dit.objective.time_of(jnp.int32(level - 1)) if level else jnp.float32(1)
        x = golden["x"] * jnp.hypot(t, 1 - t)
        found = SOLVERS["ddpm"].step(field, x, t, t_next, golden["step_noise"])[i] / jnp.hypot(t_next, 1 - t_next)
        assert error(found, golden["step_ddpm"][i]) < 2 * TOLERANCE
    for name, cfg_scale in (("ddpm4", float(golden["sample_cfg"])), ("ddpm4_nocfg", None)):
        guided = guide(dit.network, null_of(dit), cfg_scale, 3)
        field = dit.objective.velocity_with_variance(guided, golden["sample_y"].astype(jnp.int32))
        times = dit.objective.time_at
        assert [round(float(dit.objective.level_at(times(i, 4)))) for i in range(4)] == [999, 666, 333, 0]
        x = sampling.start_path(golden["sample_z"], 4, times)
        for i in range(4):
            x = SOLVERS["ddpm"].step(field, x, times(i, 4), times(i + 1, 4), golden["sample_noises"][i])
        assert error(x, golden[name]) < 2 * TOLERANCE


def test_a_lightningdit_computes_what_the_published_one_does():
    model = load("lightningdit_tiny.pt")
    golden = model.golden
    assert (model.config.norm, model.config.mlp, model.config.rope) == ("rms", "swiglu", 1)
    assert error(model.network(golden["x"], golden["t"], golden["y"]), golden["out"]) < TOLERANCE
    plain, guided = (velocity(model, golden["sample_y"], scale) for scale in (None, 6.7))
    field = within(guided, plain, 0.125, 1.0)

    def times(step, num_steps):
        return sampling.time_at(step, num_steps, 1 / 0.3)

    np.testing.assert_allclose([times(i, 5) for i in range(6)], golden["sample_times"], atol=1e-6)
    samples = sampling.sample(field, jnp.asarray(golden["sample_z"]), 5, "euler", times)
    assert error(samples, golden["euler_5_shift03_cfg67_from0125"]) < TOLERANCE


# --- There and back ---


@pytest.mark.parametrize("name", [name for name in FILES if PLACES[name]])
def test_exporting_what_was_imported_gives_the_file(name):
    model = load(name)
    exported = export_published(model.params, model.config, model.latent_shape)
    assert exported.keys() == model.state.keys()
    half = model.state["final_layer.linear.bias"].size // (1 if model.config.learn_sigma else 2)
    for tensor, value in model.state.items():
        if tensor.startswith("final_layer.linear") and FILES[name] == "sit":  # without the half that nothing uses
            p, channels = model.config.patch_size, model.latent_shape[2]
            value = value.reshape(p * p, 2 * channels, -1)[:, :channels].reshape(half, *value.shape[1:])
        if tensor.startswith("feat_rope"):  # computed anew
            np.testing.assert_allclose(exported[tensor], value, atol=1e-6)
        else:
            np.testing.assert_array_equal(exported[tensor], value, err_msg=tensor)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learned_positions": 1, "class_dropout_prob": 0.0},
        {"learn_sigma": 1, "mlp_ratio": 2.3},
        {"norm": "rms", "mlp": "swiglu", "rope": 1, "qk_norm": 1, "mlp_ratio": 2.3},
    ],
)
def test_importing_what_was_exported_gives_the_parameters(changes):
    config = DiTConfig(patch_size=2, hidden_size=24, depth=2, num_heads=3, num_classes=5, dtype="float32", **changes)
    params = random_params(config, (8, 8, 4))
    if config.class_dropout_prob == 0:  # a row that means nothing
        params["label_embed"]["Embed_0"]["embedding"] *= (jnp.arange(6) < 5)[:, None]
    state = export_published(params, config, (8, 8, 4))
    again = flatten_dict(import_published(state, config, (8, 8, 4)))
    for path, value in flatten_dict(params).items():
        np.testing.assert_array_equal(again.pop(path), value, err_msg="/".join(path))
    assert not again
    family = "lightningdit" if config.mlp == "swiglu" else "dit"
    found, shape = find_config(state, family, 3, 5 if config.class_dropout_prob == 0 else None)
    assert shape == (8, 8, 4)
    expected = dataclasses.replace(config, timestep_scale=1.0, mlp_ratio=found.mlp_ratio)
    assert (found, found.mlp_width) == (expected, config.mlp_width)


def param_shapes(config, latent_shape):
    arguments = (jnp.zeros((1, *latent_shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    return jax.eval_shape(DiT(config).init, jax.random.key(0), *arguments)["params"]


def random_params(config, latent_shape):
    rng = np.random.default_rng(0)
    shapes = param_shapes(config, latent_shape)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape, np.float32)), shapes)


def test_the_published_formulas_give_our_numbers_from_our_file():
    """In the other direction: a second implementation reads what this one exports."""
    sit = load("sit_small_train.pt")
    golden = np.load(GOLDEN / "checkpoints" / "sit_small_golden.npz")
    second = forward(sit.state, golden["x"], golden["t"], golden["y"], sit.config.num_heads)
    assert error(second, golden["out_all"]) < TOLERANCE  # it is one of the published network

    config = DiTConfig(patch_size=2, hidden_size=24, depth=2, num_heads=3, num_classes=5, dtype="float32")
    params = random_params(config, (8, 8, 4))
    state = export_published(params, config, (8, 8, 4))
    x, t, labels = golden["x"], np.float32([0, 0.1234, 0.5, 1]), np.array([0, 3, 4, 5])
    arguments = (jnp.asarray(to_nhwc(x)), jnp.asarray(t), jnp.asarray(labels))
    found = model_fn(DiT(config), params)(*arguments)
    # Sinusoids of up to 10,000 radians: float32 has three digits behind the point there.
    assert error(found, to_nhwc(forward(state, x, 10_000 * t, labels, 3))) < 1e-3
    slow = dataclasses.replace(config, timestep_scale=1.0)
    found = model_fn(DiT(slow), params)(*arguments)
    assert error(found, to_nhwc(forward(state, x, t, labels, 3))) < TOLERANCE


# --- What is refused ---


def small_state():
    config = DiTConfig(patch_size=2, hidden_size=24, depth=1, num_heads=3, num_classes=5, dtype="float32")
    return export_published(random_params(config, (8, 8, 4)), config, (8, 8, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.attn.proj.bias": None}, "no tensor blocks.0.attn.proj.bias"),
        ({"blocks.0.extra": np.zeros(3, np.float32)}, "a tensor blocks.0.extra that no such model has"),
        ({"blocks.0.attn.proj.bias": np.zeros(23, np.float32)}, r"block_0/attention/out/bias has the shape \(23,\)"),
        ({"blocks.0.attn.proj.bias": np.full(24, np.nan, np.float32)}, "NaN"),
        ({"blocks.0.attn.proj.bias": np.zeros(24, np.int64)}, "holds int64"),
        ({"x_embedder.proj.weight": None}, "no tensor x_embedder.proj.weight"),
        ({"x_embedder.proj.weight": np.zeros((24, 16), np.float32)}, r"has the shape \(24, 16\)"),
        ({"pos_embed": None}, "no pos_embed"),
        ({"pos_embed": np.zeros((1, 15, 24), np.float32)}, "square image"),
        ({"final_layer.linear.weight": np.zeros((12, 24), np.float32)}, "3 output channels for 4"),
        ({"blocks.0.mlp.w12.weight": np.zeros((8, 24), np.float32)}, "LightningDiT"),
        ({"pos_embed": np.zeros((1, 16, 20), np.float32)}, r"pos_embed has the shape \(1, 16, 20\), not \(1, 16, 24\)"),
        ({"blocks.0.attn.q_norm.weight": np.zeros(100, np.float32)}, "its heads are wider than its width 24"),
        ({"blocks.0.attn.q_norm.weight": np.zeros((), np.float32)}, r"q_norm.weight has the shape \(\)"),
        ({"feat_rope.freqs_cos": np.zeros((16, 0), np.float32)}, r"freqs_cos has the shape \(16, 0\)"),
        ({"final_layer.linear.bias": np.zeros(5, np.float32)}, r"linear.bias has the shape \(5,\)"),
        ({"blocks.0.attn.proj.weight": np.zeros((), np.float32)}, r"attn.proj.weight has the shape \(\)"),
        ({"y_embedder.embedding_table.weight": np.zeros(6, np.float32)}, r"table.weight has the shape \(6,\)"),
    ],
)
def test_what_is_no_such_model_is_refused_by_name(change, message):
    state = {name: value for name, value in (small_state() | change).items() if value is not None}
    with pytest.raises(BadFileError, match=message):
        import_published(state, *find_config(state, "sit", 3))


def test_heads_are_known_by_width_or_asked_for():
    state = small_state()
    with pytest.raises(BadFileError, match=r"no published model is 24 wide: give .* --num_heads"):
        find_config(state, "sit")
    with pytest.raises(BadFileError, match="--num_heads=5 does not divide its width 24"):
        find_config(state, "sit", 5)
    with pytest.raises(BadFileError, match="no LightningDiT"):
        find_config(state, "lightningdit", 3)
    heads = {}
    for width in (384, 768, 1024, 1152):
        config = DiTConfig(patch_size=2, hidden_size=width, depth=0, num_heads=12, mlp_ratio=4.0, num_classes=2)
        shapes = param_shapes(config, (8, 8, 4))
        state = export_published(jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes), config, (8, 8, 4))
        state["blocks.0.mlp.fc2.weight"] = np.zeros((width, 4 * width), np.float32)
        heads[width] = find_config(state, "dit")[0].num_heads
    assert heads == {384: 6, 768: 12, 1024: 16, 1152: 16}


def test_a_position_table_that_has_moved_is_kept():
    state = small_state()
    assert find_config(state, "sit", 3)[0].learned_positions == 0
    state["pos_embed"] = 1.5 * state["pos_embed"]
    config, shape = find_config(state, "sit", 3)
    params = import_published(state, config, shape)
    np.testing.assert_array_equal(params["pos_embed"], state["pos_embed"])
    x, t, labels = np.ones((1, 8, 8, 4), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int32)
    arguments = map(jnp.asarray, (x, t, labels))
    found = DiT(config).apply({"params": jax.tree.map(jnp.asarray, params)}, *arguments)
    assert error(found, to_nhwc(forward(state, np.moveaxis(x, -1, 1), t, labels, 3))) < TOLERANCE
    assert "pos_embed" in param_shapes(config, shape)


def test_every_parameter_has_a_published_name():
    for config in (DiTConfig(depth=3), DiTConfig(norm="rms", mlp="swiglu", rope=1, qk_norm=1)):
        params = param_shapes(config, (8, 8, 4))
        paths = [tensor.path for tensor in tensor_table(config)]
        assert sorted(paths) == sorted(flatten_dict(params))
        assert len(paths) == len(set(paths))


def test_the_sampler_describes_itself():
    assert str(SamplerConfig(4, 1.5, solver="ddim", cfg_channels=3)) == "4 DDIM steps, guidance 1.5 of 3 channels"
    leading = SamplerConfig(250, None, solver="ddpm", spacing="leading")
    assert str(leading) == "250 DDPM steps with leading spacing, no guidance"
