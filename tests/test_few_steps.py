"""Shortcut models and MeanFlow against published numbers (tests/golden/README.md) and against theory."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eval_fid
from diffusion_transformer import DiTConfig, TimestepEmbed
from tests.conftest import run_program
from tests.golden_network import error, load_golden
from utils.base.messages import UserError
from utils.codecs.codec import PixelCodec
from utils.conditions.classes import ClassCondition
from utils.data.dataset import PixelBatch
from utils.flags.reading import read_samplers
from utils.networks.models import model_fn
from utils.networks.optimizers import make_optimizer
from utils.networks.state import create_train_state
from utils.objectives.flow_matching import draw_noise
from utils.objectives.mean_flow import MeanFlow
from utils.objectives.shortcut import Shortcut
from utils.runs.opening import load_generator
from utils.sampling import solvers as sampling
from utils.sampling.guidance import guide
from utils.training.start import refit_times, zero_step_embed
from utils.training.step import compute_gradients

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


# --- Shortcut models ---


# The file has its bootstrap rows first; here they are every eighth.
SHORTCUT_ROWS = np.concatenate([[i, *range(8 + 7 * i, 15 + 7 * i)] for i in range(8)])


@pytest.fixture(scope="module")
def shortcut():
    return load_golden("shortcut_small", step_conditioning=1)


def shortcut_batch(golden):
    rows = {name: golden[name][SHORTCUT_ROWS] for name in ("x_1", "x_0", "t", "d", "labels")}
    draws = {"x_0": rows["x_0"], "t": rows["t"], "level": rows["d"], "null": jnp.full(64, 10)}
    return rows["x_1"], rows["labels"], draws


def scaled(params, factor):
    return jax.tree.map(lambda leaf: factor * leaf, params)


@pytest.mark.parametrize(
    ("case", "guidance", "has_ema"), [("plain", 1.0, True), ("cfg", 1.5, True), ("no_ema", 1.0, False)]
)
def test_targets_losses_and_gradients_of_shortcuts_equal_published(shortcut, case, guidance, has_ema):
    golden, objective = shortcut.numbers, Shortcut(bootstrap_guidance=guidance)
    x_1, labels, draws = shortcut_batch(golden)
    ema_params = scaled(shortcut.params, float(golden["meta/ema_factor"])) if has_ema else shortcut.params
    ema_model = model_fn(shortcut.network, ema_params)
    x_t = objective.corrupt(x_1, draws)
    rows = (x_t[::8], draws["t"][::8], labels[::8], draws["null"][::8], draws["level"][::8])
    assert error(rows[0], golden["x_t_first8"]) < TOLERANCE
    targets = jax.jit(lambda params, *rows: objective.bootstrap_targets(model_fn(shortcut.network, params), *rows))
    assert error(targets(ema_params, *rows), golden[f"v_target_{case}"]) < TOLERANCE

    if case == "no_ema":  # what differs are the targets alone
        return

    def loss_fn(params):
        losses, _ = objective.loss(model_fn(shortcut.network, params), ema_model, x_1, labels, draws)
        return losses.mean(), losses

    (loss, losses), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(shortcut.params)
    np.testing.assert_allclose(loss, golden[f"{case}_loss"], rtol=TOLERANCE)
    np.testing.assert_allclose(losses[::8].mean(), golden[f"{case}_loss_bootstrap"], rtol=TOLERANCE)
    flow = np.delete(np.asarray(losses), np.arange(0, 64, 8))
    np.testing.assert_allclose(flow.mean(), golden[f"{case}_loss_flow"], rtol=TOLERANCE)
    assert error(grads["step_embed"]["dense_1"]["bias"], golden[f"{case}_grad_d_bias"]) < TOLERANCE
    assert error(grads["final_layer"]["dense"]["bias"], golden[f"{case}_grad_out_bias"]) < TOLERANCE
    np.testing.assert_allclose(optax.tree.norm(grads), golden[f"{case}_grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 128])
@pytest.mark.parametrize("guidance", [None, 1.5])
def test_samples_of_shortcuts_equal_published(shortcut, num_steps, guidance):
    golden = shortcut.numbers
    guided = guide(model_fn(shortcut.network, shortcut.params), shortcut.network.condition.null, guidance)
    field = Shortcut().velocity(guided, golden["sample_labels"])
    found = jax.jit(lambda noise: sampling.sample(field, noise, num_steps))(golden["noise"])
    name = "nocfg" if guidance is None else f"cfg{guidance}"
    assert error(found, golden[f"sample_steps{num_steps}_{name}"]) < TOLERANCE


def test_levels_take_turns_whatever_the_batch_is_split_into():
    objective = Shortcut()
    draws = objective.draw(jax.random.key(0), jax.random.key(1), 16 * 7 * 4)
    level, t = np.asarray(draws["level"]), np.asarray(draws["t"])
    assert level[:64:8].tolist() == [6, 5, 4, 3, 2, 1, 0, 6]
    assert (np.delete(level, np.arange(0, len(level), 8)) == 7).all()
    assert (t * 2**level % 1 == 0).all()
    assert t.max() < 1
    blocks = level.reshape(-1, 8)
    assert sorted(blocks[:7, 0]) == list(range(7))
    for num_steps, is_fine in ((1, True), (128, True), (3, False), (256, False)):
        assert (objective.check_steps(num_steps) == "") == is_fine
    with pytest.raises(ValueError, match=r"--objective\.finest_steps=100 is no power of two"):
        Shortcut(finest_steps=100)


# --- MeanFlow ---


# The file has its rows with r = t first; here every second row learns a step.
MEAN_FLOW_ROWS = np.array([4, 0, 5, 1, 6, 2, 7, 3])


@pytest.fixture(scope="module")
def mean_flow():
    golden = load_golden("meanflow_small", step_conditioning=1)
    golden.numbers = {
        name: value[MEAN_FLOW_ROWS] if value.shape[:1] == (8,) and "sample" not in name and name != "noise" else value
        for name, value in golden.numbers.items()
    }
    return golden


def in_our_convention(network, params):
    """The file's network is of time 1 at noise, and its velocity of the other sign."""
    plain = model_fn(network, params)
    return lambda x, t, labels, h: -plain(x, 1 - t, labels, h)


@pytest.mark.parametrize("case", ["none", "cfg_kappa0", "cfg"])
def test_targets_losses_and_gradients_of_mean_flow_equal_published(mean_flow, case):
    golden = mean_flow.numbers
    settings = {name: float(golden[f"{case}/{name}"]) for name in ("omega", "kappa", "norm_p", "norm_eps")}
    if not golden[f"{case}/guided"]:
        settings |= {"omega": 1.0, "kappa": 0.0}
    times = {"guidance_start": 1 - float(golden[f"{case}/t_end"]), "guidance_end": 1 - float(golden[f"{case}/t_start"])}
    objective = MeanFlow(step_every=2, **settings, **times)
    x_1, x_0, labels = golden["x"], golden["e"], golden["labels"]
    t, h = 1 - golden["t"], golden["t"] - golden["r"]
    assert (golden[f"{case}/num_dropped"], h[1::2].tolist()) == (0, [0, 0, 0, 0])
    draws = {"x_0": x_0, "t": t, "h": h, "is_dropped": jnp.zeros(8, bool), "null": jnp.full(8, 10)}
    network = in_our_convention(mean_flow.network, mean_flow.params)
    x_t = objective.corrupt(x_1, draws)
    assert error(x_t, golden["z_t"]) < TOLERANCE
    velocity = jax.jit(lambda *args: objective.guided_velocity(network, *args))(x_t, t, labels, draws, x_1 - x_0)
    assert error(velocity, -golden[f"{case}/v_g"]) < TOLERANCE
    rows = (x_t[::2], t[::2], h[::2], labels[::2], velocity[::2])
    u, du_dt = jax.jit(lambda *rows: objective.derivative(network, *rows))(*rows)
    assert error(u, -golden[f"{case}/u"][::2]) < TOLERANCE
    assert error(du_dt, golden[f"{case}/du_dt"][::2]) < TOLERANCE
    assert error(velocity[::2] + h[::2, None, None, None] * du_dt, -golden[f"{case}/u_tgt"][::2]) < TOLERANCE

    if case == "cfg_kappa0":  # what differs is the velocity alone
        return

    def loss_fn(params):
        network = in_our_convention(mean_flow.network, params)
        losses, metrics = objective.loss(network, network, x_1, labels, draws)
        return losses.mean(), metrics

    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(mean_flow.params)
    np.testing.assert_allclose(loss, golden[f"{case}/loss"], rtol=TOLERANCE)
    np.testing.assert_allclose(metrics["sum_of_squares"], golden[f"{case}/sum_of_squares"], rtol=TOLERANCE)
    assert error(grads["step_embed"]["dense_1"]["bias"], golden[f"{case}/grad_h_bias"]) < 3 * TOLERANCE
    assert error(grads["final_layer"]["dense"]["bias"], golden[f"{case}/grad_out_bias"]) < 3 * TOLERANCE
    np.testing.assert_allclose(optax.tree.norm(grads), golden[f"{case}/grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_samples_of_mean_flow_equal_published(mean_flow, num_steps):
    golden = mean_flow.numbers
    field = MeanFlow().velocity(in_our_convention(mean_flow.network, mean_flow.params), golden["sample_labels"])
    found = sampling.sample(field, golden["noise"], num_steps)
    assert error(found, golden[f"sample_steps{num_steps}"]) < TOLERANCE


def test_dropped_labels_are_learned_without_a_step():
    objective = MeanFlow(omega=3.0, kappa=0.2)
    seen = []

    def network(x, t, labels, h):
        """1 of a label, 0 of none, and minus the rest of the path, so that du/dt = 1 along it."""
        seen.append(labels)
        return jnp.zeros_like(x) + ((labels < 10) * 1.0 - h).reshape(-1, 1, 1, 1)

    x_1, labels = jnp.ones((8, 2, 2, 1)), jnp.arange(8)
    draws = objective.draw(jax.random.key(0), jax.random.key(1), 8) | {
        "is_dropped": jnp.arange(8) == 4,
        "null": jnp.full(8, 10),
    }
    _, metrics = objective.loss(network, network, x_1, labels, draws)
    x_0 = draw_noise(draws, x_1)
    h = draws["h"].at[4].set(0).reshape(-1, 1, 1, 1)  # the other row that would learn a step is row 0
    expected = 3 * (1 - x_0) + 0.2 * 1
    expected = expected.at[4].set((1 - x_0)[4]) + h
    np.testing.assert_allclose(metrics["v_abs_mean"], np.abs(expected).mean((1, 2, 3)), rtol=1e-5)
    assert (draws["h"] > 0).tolist() == [i % 4 == 0 for i in range(8)]
    assert any((labels == 10).all() for labels in seen)


# --- Theory: Gaussian data ---

MEAN, STD = 0.4, 0.5


def flow_map(x, t, r):
    """x(r) of the path through x at t, for data N(MEAN, STD^2)."""
    a, b = (jnp.sqrt((1 - s) ** 2 + s**2 * STD**2) for s in (t, r))
    return r * MEAN + b / a * (x - t * MEAN)


def exact_average(x, t, labels, h):
    """u(x, t, t + h), and its limit, the marginal velocity, at h = 0."""
    t, h = (s.reshape(-1, 1, 1, 1) for s in (t, h))
    safe = jnp.where(h == 0, 1.0, h)
    average = (flow_map(x, t, t + safe) - x) / safe
    variance = (1 - t) ** 2 + t**2 * STD**2
    return jnp.where(h == 0, MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN), average)


@pytest.fixture
def double():
    """float64, in which theory holds to more digits than any fault would leave."""
    with jax.enable_x64(True):
        yield


def test_the_exact_average_velocity_is_the_target_of_mean_flow(double):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2, 2, 1)))
    t, r = np.array([0.0, 0.1, 0.3, 0.5, 0.2]), np.array([1.0, 0.9, 0.31, 0.8, 0.95])
    t, h = jnp.asarray(t), jnp.asarray(r - t)
    labels = jnp.zeros(5, jnp.int32)
    velocity = exact_average(x, t, labels, jnp.zeros_like(t))
    u, du_dt = MeanFlow().derivative(exact_average, x, t, h, labels, velocity)
    np.testing.assert_allclose(u, exact_average(x, t, labels, h), atol=1e-12)
    np.testing.assert_allclose(velocity + h.reshape(-1, 1, 1, 1) * du_dt, u, atol=1e-9)
    one = sampling.sample(MeanFlow().velocity(exact_average, labels), x, 1)
    np.testing.assert_allclose(one, MEAN + STD * x, atol=1e-7)


def test_the_exact_average_velocity_is_the_target_of_shortcuts(double):
    def network(x, t, labels, level):
        return exact_average(x, t, labels, 2.0**-level)

    x = jnp.asarray(np.random.default_rng(1).standard_normal((7, 2, 2, 1)))
    level, labels = jnp.arange(7.0), jnp.zeros(7, jnp.int32)
    t = jnp.array([0, 0.5, 0.25, 0.5, 3 / 16, 0, 0.5])
    found = Shortcut().bootstrap_targets(network, x, t, labels, labels, level)
    np.testing.assert_allclose(found, network(x, t, labels, level), atol=1e-9)
    one = sampling.sample(Shortcut().velocity(network, labels), x, 1)
    np.testing.assert_allclose(one, MEAN + STD * x, atol=1e-7)


def test_the_derivative_through_the_network_is_that_of_finite_differences():
    golden = load_golden("meanflow_small", step_conditioning=1)
    network = model_fn(golden.network, golden.params)
    x, labels = golden.numbers["x"][:2], golden.numbers["labels"][:2]
    t, h, v = jnp.float32([0.3, 0.6]), jnp.float32([0.5, 0.2]), golden.numbers["e"][:2]
    _, du_dt = MeanFlow().derivative(network, x, t, h, labels, v)
    step = 2e-2  # float32: of the fourth order, so that it need not be small

    def along(s):
        return np.float64(network(x + s * v, t + s, labels, h - s))

    difference = (8 * (along(step) - along(-step)) - (along(2 * step) - along(-2 * step))) / (12 * step)
    assert error(du_dt, difference) < 1e-3


def test_the_derivative_in_bfloat16_is_that_of_float32_within_rounding():
    golden = load_golden("meanflow_small", step_conditioning=1)
    x, labels, v = (golden.numbers[name] for name in ("x", "labels", "e"))
    t, h = jnp.linspace(0.1, 0.6, 8), jnp.full(8, 0.3)
    found = []
    for dtype in ("float32", "bfloat16"):
        network = golden.network.clone(config=dataclasses.replace(golden.network.config, dtype=dtype))
        found.append(MeanFlow().derivative(model_fn(network, golden.params), x, t, h, labels, v)[1])
    assert 0 < error(found[1], np.asarray(found[0])) < 0.03


# --- Training ---


class Network:
    """A linear network of all that it is given, which counts as a static argument."""

    config = DiTConfig(num_classes=10)
    condition = ClassCondition(num_classes=10)

    def apply(self, variables, x, t, labels, step):
        weights = variables["params"]
        scale = weights["t"] * t + weights["labels"] * labels + weights["step"] * step
        return weights["x"] * x + scale.reshape(-1, 1, 1, 1)

    def init(self, *arguments):
        raise NotImplementedError

    def count_flops(self, image_shape):
        return 1


@pytest.mark.parametrize("objective", [Shortcut(bootstrap_every=4, bootstrap_guidance=2.0), MeanFlow()])
def test_microbatches_change_nothing(objective):
    params = {name: jnp.float32(value) for name, value in {"x": 0.5, "t": 0.2, "labels": 0.01, "step": 0.1}.items()}
    state = create_train_state(params, make_optimizer(1e-3, 0.9, 0.99), jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = PixelBatch(
        condition=np.arange(32, dtype=np.int32) % 10, image=rng.integers(0, 256, (32, 4, 4, 1), np.uint8)
    )
    found = [
        compute_gradients(
            state, jax.random.key(1), jax.tree.map(jnp.asarray, batch), PixelCodec(), model=Network(),
            objective=objective, grad_accum=grad_accum, class_dropout_prob=0.3,
        )
        for grad_accum in (1, 2, 4)
    ]  # fmt: skip
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found[0], other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--objective.name shortcut --objective.finest_steps 8", "a power of two up to 8 steps"),
        pytest.param(
            "--objective.name mean_flow",
            "--cfg_scale=2: guidance is part of what the model has learned",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_model_of_few_steps_is_trained_and_sampled_in_one(tmp_path, read_flags, words, message):
    folder = tmp_path / "run"
    line = f"""
        --dataset_name digits --use_stable_vae 0 --save_dir {folder} --model.patch_size 2 --model.num_classes 10
        --model.hidden_size 32 --model.depth 1 --model.denoise_timesteps 2 --batch_size 16 --max_steps 6
        --eval_interval {6 * ("mean_flow" in words)} --wandb.mode disabled {words}
    """
    run_program("train_flow.py", *line.split())
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["model"]["step_conditioning"], saved["model"]["timestep_scale"]) == (1, 1.0)
    generator = load_generator(folder)
    assert generator.sample([3, 7], num_steps=1).shape == (2, 8, 8, 1)
    objective = generator.model.objective
    for flags in ("--solver heun", "--cfg_scale 2 --denoise_timesteps 3"):
        with pytest.raises(UserError, match=message if "cfg" in flags else "does not fit what the model learned"):
            read_samplers(read_flags(eval_fid, flags.split()), 0.1, objective)
    done = run_program("train_flow.py", *line.replace("--batch_size 16", "--batch_size 10").split(), check=False)
    assert "--batch_size=10 does not divide" in done.stderr


# --- From a flow to few steps ---


def test_a_new_step_embedding_changes_nothing_at_first():
    golden = load_golden("meanflow_small", step_conditioning=1)
    x, labels, t = golden.numbers["x"], golden.numbers["labels"], golden.numbers["t"]
    params = zero_step_embed(golden.params)
    network = model_fn(golden.network, jax.tree.map(jnp.asarray, params))
    plain = golden.network.clone(config=dataclasses.replace(golden.network.config, step_conditioning=0))
    without = {name: tree for name, tree in golden.params.items() if name != "step_embed"}
    for h in (0.0, 0.3):
        expected = model_fn(plain, without)(x, t, labels)
        np.testing.assert_allclose(network(x, t, labels, jnp.full(8, h)), expected, atol=1e-6)


def test_times_are_fitted_at_another_scale():
    golden = load_golden("meanflow_small", step_conditioning=1)
    t = jnp.linspace(0, 1, 333)

    def embed(params, scale):
        weights = jax.tree.map(jnp.asarray, params["timestep_embed"])
        return TimestepEmbed(32, scale, jnp.float32).apply({"params": weights}, t)

    fitted, left = refit_times(golden.params, 10.0, 1.0)
    targets = embed(golden.params, 10.0)
    found = np.sqrt(np.square(embed(fitted, 1.0) - targets).mean() / targets.var(axis=0).mean())
    assert found == pytest.approx(left, abs=0.01)
    assert left < 0.02
    np.testing.assert_array_equal(*(tree["final_layer"]["dense"]["bias"] for tree in (fitted, golden.params)))
    # What oscillates fast is left out, whatever the old embedding has of it.
    fast, much = refit_times(golden.params, 10_000.0, 1.0)
    assert much > 0.3
    slopes = [np.abs(np.diff(embed(*of), axis=0)).max() for of in ((fast, 1.0), (golden.params, 10_000.0))]
    assert slopes[0] < 0.2 * slopes[1]


def test_a_flow_becomes_a_mean_flow(tmp_path):
    common = [
        "--dataset_name",
        "digits",
        "--use_stable_vae",
        "0",
        "--batch_size",
        "16",
        "--eval_interval",
        "0",
        "--wandb.mode",
        "disabled",
        "--model.dtype",
        "float32",
    ]
    sizes = "--model.patch_size 2 --model.num_classes 10 --model.hidden_size 32 --model.depth 1"
    run_program("train_flow.py", *common, *sizes.split(), "--max_steps", 4, "--save_dir", tmp_path / "flow")
    words = ["--load_dir", tmp_path / "flow", "--objective.name", "mean_flow", "--save_dir", tmp_path / "mean_flow"]
    done = run_program("train_flow.py", *common, *words, "--max_steps", 2)
    assert "made new: step_embed/" in done.stdout
    assert "time embedding: fitted to that of the source at another scale" in done.stdout
    assert "was trained with --objective.name=flow_matching; this run has mean_flow, and learns it anew" in done.stdout
    saved = json.loads((tmp_path / "mean_flow" / "config.json").read_text())["model"]
    assert (saved["timestep_scale"], saved["step_conditioning"], saved["hidden_size"]) == (1.0, 1, 32)
