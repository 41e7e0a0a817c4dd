"""The diffusion objective against published numbers (tests/golden/README.md) and against theory."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eval_fid
from diffusion_transformer import DiT, DiTConfig
from tests.conftest import GOLDEN, run_program
from utils.base.messages import UserError
from utils.conditions.classes import ClassCondition
from utils.convert.jax_flow import import_jax_flow_params
from utils.flags import reading
from utils.networks.models import model_fn
from utils.networks.optimizers import make_optimizer
from utils.networks.state import apply_gradients, create_train_state
from utils.objectives.diffusion import Diffusion, path_times
from utils.objectives.flow_matching import FlowMatching
from utils.runs.opening import load_generator
from utils.sampling import solvers as sampling
from utils.sampling.guidance import guide
from utils.sampling.samplers import check_sampler
from utils.sampling.solvers import ODE_SOLVERS, SOLVERS, SamplerConfig, ancestral_step
from utils.trackers.trackers import read_metrics


def error(found, expected):
    """The largest deviation, relative to the largest value."""
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def golden():
    return {name: jnp.asarray(value) for name, value in np.load(GOLDEN / "diffusion_small.npz").items()}


@pytest.fixture(scope="module")
def model(golden):
    sizes = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes")
    config = DiTConfig(dtype="float32", timestep_scale=1.0, **{name: int(golden[f"meta/{name}"]) for name in sizes})
    flat = {name.removeprefix("params/"): value for name, value in golden.items() if name.startswith("params/")}
    return SimpleNamespace(network=DiT(config), params=jax.tree.map(jnp.asarray, import_jax_flow_params(flat)))


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def test_the_noise_levels_are_the_published_ones(golden):
    t = path_times(500)
    abar = t**2 / (t**2 + (1 - t) ** 2)
    np.testing.assert_allclose(abar, golden["schedule/alphas_cumprod"], rtol=2e-4)
    betas = np.linspace(0.0001, 0.02, 1000)
    t = path_times(1000)
    np.testing.assert_allclose(t**2 / (t**2 + (1 - t) ** 2), np.cumprod(1 - betas), rtol=1e-12)


@pytest.mark.parametrize("num_levels", [21, 500, 1000, 10_000])
def test_levels_and_times_are_inverse_to_each_other(num_levels):
    objective, levels = Diffusion(num_levels), jnp.arange(num_levels)
    np.testing.assert_allclose(objective.level_at(objective.time_of(levels)), levels, atol=1e-4 * num_levels)
    assert objective.level_at(jnp.float32([0, 1])).tolist() == [num_levels - 1, 0]
    assert 0 < path_times(num_levels)[-1] < 0.01 < 0.9 < path_times(num_levels)[0] < 1


def test_loss_and_prediction_equal_published(golden, model):
    objective, network = Diffusion(), model_fn(model.network, model.params)
    draws = {"x_0": golden["eps"], "t": objective.time_of(golden["k"])}
    assert error(objective.corrupt(golden["x_1"], draws), golden["x_t"]) < 1e-5
    losses, metrics = objective.loss(network, network, golden["x_1"], golden["labels"], draws)
    np.testing.assert_allclose(losses, golden["loss_per_example"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(losses.mean(), golden["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["v_abs_mean"], np.abs(golden["eps"]).mean((1, 2, 3)), rtol=1e-5)
    predicted = objective.predict_data(network, golden["x_t"], draws["t"], golden["labels"])
    assert error(predicted, golden["x_1_pred"]) < 2e-5
    guided = guide(network, ClassCondition(num_classes=10).null, float(golden["meta/eps_pred_guided_scale"]))
    found = guided(golden["x_t"], golden["k"].astype(jnp.float32), golden["labels"])
    assert error(found, golden["eps_pred_guided"]) < 1e-5


def test_adam_steps_equal_published(golden, model):
    optimizer, objective = make_optimizer(1e-4, 0.9, 0.99), Diffusion()
    state = create_train_state(model.params, optimizer, jax.random.key(0))

    @jax.jit
    def step(state, x_0, k):
        def loss_fn(params):
            network = model_fn(model.network, params)
            draws = {"x_0": x_0, "t": objective.time_of(k)}
            return objective.loss(network, network, golden["x_1"], golden["labels"], draws)[0].mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return apply_gradients(state, grads, optimizer, 0.9999)[0], loss, optax.tree.norm(grads)

    for i in range(5):
        state, loss, grad_norm = step(state, golden["adam_eps"][i], golden["adam_k"][i])
        np.testing.assert_allclose(loss, golden["adam_l2_loss_eps"][i], rtol=1e-5)
        np.testing.assert_allclose(grad_norm, golden["adam_grad_norm"][i], rtol=1e-4)


CHAINS = ["ddim_steps50_cfg4.0", "ddim_steps10_nocfg", "ddim_steps5_cfg1.5", "ddim_steps4_cfg0.0"]
CHAINS += ["ddpm_steps500_cfg4.0", "ddpm_steps50_nocfg", "ddpm_steps10_cfg4.0"]


@pytest.mark.parametrize("name", CHAINS)
def test_chains_equal_published(golden, model, name):
    solver, steps, guidance = name.split("_")
    num_steps, objective = int(steps.removeprefix("steps")), Diffusion()
    cfg_scale = None if guidance == "nocfg" else float(guidance.removeprefix("cfg"))
    guided = guide(model_fn(model.network, model.params), model.network.condition.null, cfg_scale)
    field, times = objective.velocity(guided, golden["sample_labels"]), objective.time_at
    levels = [round(float(objective.level_at(times(i, num_steps)))) for i in range(num_steps)]
    assert levels == golden[f"index_steps{num_steps}"].tolist()
    if solver == "ddim":
        found = sampling.sample(field, golden["noise"], num_steps, "ddim", times)
    else:

        def body(i, x):
            fresh = jnp.where(i < num_steps - 1, golden["step_noise"][i % 8], 0)  # none at the last
            return ancestral_step(field, x, times(i, num_steps), times(i + 1, num_steps), fresh)

        start = sampling.start_path(golden["noise"], num_steps, times)
        found = jax.jit(lambda x: jax.lax.fori_loop(0, num_steps, body, x))(start)
    assert error(found, golden[name]) < 2e-5


MEAN, STD = 0.3, 0.5


def exact_noise(x_k, level, labels):
    """E[x_0 | x_k] for data N(MEAN, STD^2)."""
    # As jnp.interp has it, but faster.
    times = jnp.float32(path_times(1000))
    below = jnp.clip(jnp.floor(level), 0, 998).astype(int)
    t = (times[below] + (level - below) * (times[below + 1] - times[below]))[:, None]
    a, s = t / jnp.hypot(t, 1 - t), (1 - t) / jnp.hypot(t, 1 - t)
    return s * (x_k - a * MEAN) / (a**2 * STD**2 + s**2)


def exact_velocity(x, t, labels):
    """Returns the velocity of flow matching for the same data."""
    t = t[:, None]
    variance = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def test_the_velocity_of_exact_noise_is_that_of_flow_matching():
    labels, x = jnp.zeros(7, jnp.int32), jax.random.normal(jax.random.key(0), (7, 5))
    t = jnp.float32([0.0064, 0.01, 0.1, 0.5, 0.9, 0.98, 0.99])
    found = Diffusion(1000).velocity(exact_noise, labels)(x, t, t)
    np.testing.assert_allclose(found, exact_velocity(x, t, labels), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_every_ode_solver_is_for_diffusions(solver):
    check_sampler(SamplerConfig(4, None, solver=solver), Diffusion())


@pytest.mark.parametrize("solver", ["euler", "heun", "sde", "ddim", "ddpm"])
@pytest.mark.parametrize("objective", [Diffusion(1000), FlowMatching()], ids=["noise", "velocity"])
def test_samples_of_exact_fields_have_the_law_of_the_data(objective, solver):
    count, num_steps = 20_000, 400
    labels, noise = jnp.zeros(count, jnp.int32), jax.random.normal(jax.random.key(1), (count, 1))
    network = exact_noise if isinstance(objective, Diffusion) else exact_velocity
    times = {"any": sampling.time_at, "sde": sampling.sde_time_at, "objective": Diffusion(1000).time_at}
    keys = jax.random.split(jax.random.key(2), count)
    field = objective.velocity(network, labels)
    samples = sampling.sample(field, noise, num_steps, solver, times[SOLVERS[solver].grid], keys)
    # Four standard errors, and what 400 steps of order one leave.
    assert samples.mean() == pytest.approx(MEAN, abs=4 * STD / count**0.5 + 2e-3)
    assert samples.std() == pytest.approx(STD, abs=4 * STD / (2 * count) ** 0.5 + 5e-3)
    if solver in ("sde", "ddpm"):  # fresh noise has a part in them
        assert abs(np.corrcoef(samples.ravel(), noise.ravel())[0, 1]) < 0.5


def test_ancestral_steps_are_the_posterior_of_ddpm():
    """Against the coefficients of DDPM's paper, in float64."""
    abar = path_times(1000) ** 2 / (path_times(1000) ** 2 + (1 - path_times(1000)) ** 2)
    x, fresh, v = (jax.random.normal(jax.random.key(i), (1, 50)) for i in range(3))
    for k, k_next in ((999, 998), (999, 749), (500, 499), (500, 250), (10, 3), (1, 0)):
        a, p = abar[k], abar[k_next]
        t, t_next = (path_times(1000)[i] for i in (k, k_next))
        x_1 = np.float64(x) + (1 - t) * np.float64(v)
        beta = 1 - a / p
        mean = beta * np.sqrt(p) / (1 - a) * x_1 + (1 - p) * np.sqrt(1 - beta) / (1 - a) * x / np.hypot(t, 1 - t)
        expected = (mean + np.sqrt(beta * (1 - p) / (1 - a)) * fresh) * np.hypot(t_next, 1 - t_next)
        found = ancestral_step(lambda x, t, t_next: v, x, jnp.float32(t), jnp.float32(t_next), fresh)
        assert error(found, expected) < 1e-5


def test_step_noise_is_a_function_of_seed_sample_and_step():
    field = FlowMatching().velocity(exact_velocity, jnp.zeros(4, jnp.int32))
    keys, noise = jax.random.split(jax.random.key(3), 4), jnp.zeros((4, 2))
    whole = sampling.sample(field, noise, 6, "sde", sampling.sde_time_at, keys)
    halves = [sampling.sample(field, noise[i : i + 2], 6, "sde", sampling.sde_time_at, keys[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(whole, np.concatenate(halves), rtol=1e-6)
    x = sampling.start_path(noise, 6, sampling.sde_time_at)
    for first, last in ((0, 2), (2, 6)):
        x = sampling.take_steps(field, x, first, last, 6, "sde", sampling.sde_time_at, keys)
    np.testing.assert_allclose(whole, x, rtol=1e-6)
    assert len(np.unique(np.asarray(whole))) == 8


def test_a_diffusion_is_trained_and_sampled_from_its_run(tmp_path):
    folder = tmp_path / "run"
    words = f"""
        --dataset_name digits --use_stable_vae 0 --save_dir {folder} --model.patch_size 2 --model.num_classes 10
        --model.hidden_size 32 --model.depth 1 --model.denoise_timesteps 2 --batch_size 16 --max_steps 8
        --eval_interval 0 --wandb.mode disabled --objective.name diffusion --objective.diffusion_timesteps 100
    """
    run_program("train_flow.py", *words.split())
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["objective"]["diffusion_timesteps"], saved["model"]["timestep_scale"]) == (100, 1.0)
    lines = read_metrics(folder / "metrics.jsonl")
    assert 0.5 < lines[0]["training/l2_loss"] < 2  # of noise of unit variance, of which nothing is known
    assert lines[0]["training/v_abs_mean"] == pytest.approx((2 / np.pi) ** 0.5, rel=0.05)
    generator = load_generator(folder)
    for solver in ("ddpm", "dopri5"):
        images = generator.sample([3, 7], num_steps=3, cfg_scale=2.0, solver=solver, rtol=0.1, atol=0.1)
        assert images.shape == (2, 8, 8, 1)
    with pytest.raises(ValueError, match="ddim cannot invert"):
        generator.invert(generator.noise([0]), [3], sampling.SamplerConfig(2, None, solver="ddim"))


def test_solvers_that_do_not_fit_are_refused(read_flags):
    cases = {
        "--solver ddim": "--solver=ddim: it is of models trained as diffusions; use one of euler, heun, ",
        "--solver sde --denoise_timesteps 1": "--denoise_timesteps=1: use a whole number from 2",
        "--solver sde --time_grid shift:3": "--time_grid=shift:3 has no effect with --solver=sde",
        "--time_grid leading": "--time_grid=leading, which is of --solver ddim and ddpm",
    }
    for line, message in cases.items():
        with pytest.raises(UserError, match=message):
            reading.read_samplers(read_flags(eval_fid, line.split()), 0.1, FlowMatching())
    cases = {
        "--solver ddim --denoise_timesteps 501": "the model has 500 noise levels",
        "--solver ddim --time_grid shift:3": "--time_grid=shift:3: with --solver=ddim use one of linspace, leading",
    }
    for line, message in cases.items():
        with pytest.raises(UserError, match=message):
            reading.read_samplers(read_flags(eval_fid, line.split()), 0.1, Diffusion())
    config = read_flags(eval_fid, ["--solver", "ddim", "--time_grid", "leading"])
    (sampler,) = reading.read_samplers(config, 0.1, Diffusion())
    assert (sampler.spacing, sampler.time_shift) == ("leading", 1.0)
