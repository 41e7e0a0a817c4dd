"""Networks that predict the data, times and noise of other means and deviations, and the bottleneck of patches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy import stats

from diffusion_transformer import DiT, DiTConfig, PatchEmbed
from tests.golden_network import error
from utils.base.mesh import make_mesh
from utils.base.messages import UserError
from utils.codecs.codec import PixelCodec
from utils.conditions.classes import ClassCondition
from utils.conditions.images import ImageCondition
from utils.convert.published import export_published, import_published
from utils.data.dataset import PixelBatch
from utils.networks.models import ImageModel, Network
from utils.objectives.flow_matching import FlowMatching, draw_noise, interpolate, sample_times, velocity_model
from utils.objectives.mean_flow import MeanFlow
from utils.objectives.objective import Heads, scale_noise
from utils.runs.export import describe_unusual
from utils.sampling import density, paths, solvers
from utils.sampling.density import LikelihoodConfig, measure_batch
from utils.sampling.generator import ImageGenerator, check_guide
from utils.sampling.guidance import guide, within
from utils.sampling.solvers import SamplerConfig
from utils.training.start import SourceRun, adapt_params, check_architecture

DATA = FlowMatching(prediction="data")
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X_1, X_0 = (jnp.asarray(RNG.standard_normal((8, 4, 4, 3), np.float32)) for _ in range(2))
LABELS = jnp.asarray(np.arange(8, dtype=np.int32))
TIMES = jnp.asarray(
    np.float32([0, 0.1, 0.5, 0.9, 0.94, 0.96, 0.99, 1])
)  # the last three are beyond the divisor's bound


def expand(values):
    return jnp.reshape(values, (-1, 1, 1, 1))


def as_data(model_fn):
    """The network that predicts as data what this one predicts as a velocity."""
    return lambda x, t, *given: x + jnp.maximum(1 - expand(t), 0.05) * model_fn(x, t, *given)


def smooth(x, t, labels, *step):
    """Any velocity that depends on all that it is given."""
    h = step[0] if step else jnp.zeros_like(t)
    return jnp.sin(x * expand(1 + t)) + expand(t * (0.1 * labels - h) + h**2)


# --- Data prediction ---


@pytest.fixture(scope="module")
def published(shared):
    return {name: jnp.asarray(value) for name, value in np.load(shared / "golden/more/guidance_small.npz").items()}


def test_velocities_targets_and_losses_are_the_published_ones(published):
    x_1, t, x_hat, x_t = (published[f"jit/{name}"] for name in ("x1", "t", "x_hat", "x_t"))
    draws = {"t": t, "x_0": published["x0"]}
    np.testing.assert_allclose(DATA.corrupt(x_1, draws)[:6], x_t[:6], atol=1e-6)  # up to t = 0.99
    for predicted, name in ((x_hat, "v_hat"), (x_1, "v_target")):
        found = velocity_model(lambda *given, x=predicted: x, "data")(x_t, t, published["labels"])
        assert error(found, published[f"jit/{name}"]) < 1e-5
    loss, _ = DATA.loss(lambda *given: x_hat, smooth, x_1, published["labels"], draws)
    np.testing.assert_allclose(loss, published["jit/loss"], rtol=2e-5)


@pytest.mark.parametrize("num_steps", [10, 50])
def test_heun_with_a_last_step_of_eulers_is_the_published_one(published, num_steps):
    mu, s, labels = published["mu"], published["s"], published["labels"]

    def predict(x, t, labels):  # the data that Gaussian ones of each class are expected to be
        t, mean, variance = expand(t), mu[labels], expand(s[labels] ** 2)
        return mean + (t * variance) / ((1 - t) ** 2 + t**2 * variance) * (x - t * mean)

    no_label = jnp.int32(len(mu) - 1)
    guided = guide(predict, lambda count: jnp.full(count, no_label), float(published["scale_cfg"]))
    # The interval is open: t = 0.1 itself is without guidance.
    field = within(DATA.velocity(guided, labels), DATA.velocity(predict, labels), 0.1001, 1.0)
    golden = published[f"jit_heun_{num_steps}"]
    found = jax.jit(lambda x: [solvers.sample(field, x, num_steps, name) for name in ("heun_euler", "heun")])
    cut, plain = found(published["x0"])
    assert error(cut, golden) < 1e-5
    assert error(plain, golden) > 1e-3


def test_exact_data_have_no_loss_and_the_velocity_of_the_path():
    draws = {"t": TIMES, "x_0": X_0}
    loss, _ = DATA.loss(lambda x, t, labels: X_1, smooth, X_1, LABELS, draws)
    np.testing.assert_array_equal(loss, 0)
    x_t = interpolate(X_0, X_1, TIMES)
    found = DATA.velocity(lambda x, t, labels: X_1, LABELS)(x_t, TIMES, TIMES)
    factor = expand(np.minimum(1, (1 - np.minimum(TIMES, 0.99)) / 0.05))
    np.testing.assert_allclose(found, factor * (X_1 - X_0), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(DATA.predict_data(lambda x, t, labels: X_1, x_t, TIMES, LABELS), X_1)


def test_the_loss_is_the_error_of_the_data_over_the_divisor():
    offsets = 1 + jnp.arange(8.0)
    loss, metrics = DATA.loss(lambda *given: X_1 + expand(offsets), smooth, X_1, LABELS, {"t": TIMES, "x_0": X_0})
    np.testing.assert_allclose(loss, (offsets / np.maximum(1 - TIMES, 0.05)) ** 2, rtol=1e-4)
    assert set(metrics) == {"v_abs_mean", "v_pred_abs_mean"}


def test_one_network_in_both_forms_is_one_field():
    assert velocity_model(smooth, "velocity") is smooth
    x = X_0 + TIMES[:, None, None, None]
    plain = FlowMatching()
    fields = [plain.velocity(smooth, LABELS), DATA.velocity(as_data(smooth), LABELS)]
    np.testing.assert_allclose(*(field(x, TIMES, TIMES) for field in fields), atol=1e-5)
    # And one loss, as long as the target is that of the path.
    rows = slice(0, 5)
    draws = {"t": TIMES, "x_0": X_0}
    losses = [
        objective.loss(network, network, X_1, LABELS, draws)[0]
        for objective, network in ((plain, smooth), (DATA, as_data(smooth)))
    ]
    np.testing.assert_allclose(losses[0][rows], losses[1][rows], rtol=1e-4)


def test_mean_flow_is_the_same_in_both_forms_beyond_the_bound_too():
    plain, data = (MeanFlow(4, omega=2.0, kappa=0.3, prediction=name) for name in ("velocity", "data"))
    draws = {
        "t": jnp.roll(TIMES, 2),
        "h": jnp.full(8, 0.02),
        "x_0": X_0,
        "null": jnp.full(8, 8),
        "is_dropped": LABELS == 5,
    }

    def results(objective, network):
        loss, metrics = objective.loss(network, network, X_1, LABELS, draws)
        predicted = objective.predict_data(network, X_0, TIMES, LABELS)
        field = objective.velocity(network, LABELS)
        return loss, metrics, predicted, field(X_0, TIMES, jnp.ones(8))

    found = jax.jit(lambda: (results(plain, smooth), results(data, as_data(smooth))))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), *found)
    assert found[0][1]["du_dt_abs_mean"][0] > 0.1  # at t = 0.99: of a row that learns a step


def test_an_inner_head_predicts_the_data_too():
    heads = Heads(X_1 + 0.5, X_1 - 1)
    loss, metrics = DATA.loss(lambda *given: heads, smooth, X_1, LABELS, {"t": TIMES, "x_0": X_0})
    divisor = np.maximum(1 - TIMES, 0.05)
    np.testing.assert_allclose(loss, (0.5 / divisor) ** 2, rtol=1e-4)
    np.testing.assert_allclose(metrics["inner_loss"], (1 / divisor) ** 2, rtol=1e-4)


def test_the_identity_of_mean_flow_holds_where_data_are_predicted():
    """The average velocity u of the exact flow of N(m, s^2) fulfils u = v + h du/dt, also past the divisor's bound."""
    m, s = 0.4, 0.3
    t, h = jnp.array([0.2, 0.6, 0.9, 0.96]), jnp.array([0.3, 0.4, 0.1, 0.03])

    def deviation(t):
        return jnp.hypot(1 - t, s * t)

    def average(x, t, labels, h):
        t, h = expand(t), expand(h)
        end = (t + h) * m + deviation(t + h) / deviation(t) * (x - t * m)
        return (end - x) / h

    v = m + expand((t * s**2 - (1 - t)) / deviation(t) ** 2) * (X_0[:4] - expand(t) * m)
    network = velocity_model(as_data(average), "data")
    u, du_dt = MeanFlow(prediction="data").derivative(network, X_0[:4], t, h, LABELS[:4], v)
    np.testing.assert_allclose(u, average(X_0[:4], t, LABELS, h), atol=1e-4)
    np.testing.assert_allclose(u, v + expand(h) * du_dt, atol=1e-3)
    assert np.abs(expand(h) * du_dt).max((1, 2, 3)).min() > 0.03


# --- Times ---


def test_times_have_the_mean_and_deviation_asked_for():
    default = jax.nn.sigmoid(jax.random.normal(KEY, (1000,)))
    np.testing.assert_array_equal(sample_times(KEY, 1000, "logit_normal"), default)
    objective = FlowMatching(t_mean=-0.8, t_std=0.5)
    t = np.asarray(objective.draw(KEY, KEY, 20_000)["t"], np.float64)
    assert stats.kstest(np.log(t / (1 - t)), stats.norm(-0.8, 0.5).cdf).pvalue > 0.01


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--objective.t_mean 1 --model.t_sampler uniform", "t_mean=1.0 has no effect with --model.t_sampler=uniform"),
        (
            "--objective.t_std 2 --objective.distill 1 --dataset_name pairs:x",
            "--objective.t_std=2.0 has no effect with --objective.distill=1",
        ),
        (
            "--objective.name shortcut --objective.prediction data",
            "--objective.prediction=data has no effect with --objective.name=shortcut",
        ),
        (
            "--objective.name mean_flow --objective.noise_scale 2",
            "--objective.noise_scale=2.0 has no effect with --objective.name=mean_flow",
        ),
    ],
)
def test_settings_without_effect_are_refused(configure, line, message):
    with pytest.raises(UserError, match=message):
        configure(line.split())


# --- Noise of another deviation ---

MEAN, STD, SCALE = 0.1, 0.4, 2.0  # of the data; of the noise


class Exact(Network):
    """The velocity of data N(0.1, 0.4^2) and noise N(0, 2^2): noise n leads to 0.1 + 0.4 n."""

    config = DiTConfig(num_classes=2)
    condition = ClassCondition(("a", "b"))

    def apply(self, variables, x, t, labels):
        t = expand(t)
        variance = ((1 - t) * SCALE) ** 2 + (t * STD) ** 2
        return variables["params"]["one"] * (MEAN + (t * STD**2 - (1 - t) * SCALE**2) / variance * (x - t * MEAN))


WIDE = FlowMatching(noise_scale=SCALE)


@pytest.fixture(scope="module")
def generator():
    model = ImageModel(Exact(), WIDE, PixelCodec(), make_mesh(), (4, 4, 1))
    return ImageGenerator(model, {"one": jnp.ones(())})


def test_training_starts_from_scaled_noise_of_pairs_too():
    drawn = WIDE.draw(KEY, KEY, 8)
    for draws in (drawn, {"x_0": X_0}):
        noise = draw_noise(draws, X_1)
        np.testing.assert_array_equal(WIDE.corrupt(X_1, draws | {"t": jnp.zeros(8)}), 2 * noise)
        loss, _ = WIDE.loss(lambda x, t, labels, n=noise: X_1 - 2 * n, smooth, X_1, LABELS, draws | {"t": TIMES})
        np.testing.assert_array_equal(loss, 0)
    assert scale_noise(X_0, 1.0) is X_0


def test_samplers_start_from_scaled_noise_and_inversion_ends_at_noise(generator):
    noise, labels = generator.noise(range(3)), np.array([0, 1, 0])
    expected = MEAN + STD * np.asarray(noise)
    images = np.clip(np.round((expected + 1) * 127.5), 0, 255)
    for sampler in (SamplerConfig(64, None, solver="heun"), SamplerConfig(0, None, solver="dopri5")):
        found = generator.sample(labels, num_steps=sampler.num_steps, solver=sampler.solver)
        np.testing.assert_allclose(np.asarray(found, float), images, atol=1)
    # Stage by stage, and back.
    heun = SamplerConfig(64, None, solver="heun")
    first, _, last = generator.path(noise, labels, heun, 2)
    np.testing.assert_array_equal(first, SCALE * noise)
    np.testing.assert_allclose(last, expected, atol=2e-3)
    np.testing.assert_allclose(generator.invert(jnp.asarray(expected), labels, heun), noise, atol=2e-2)
    field = WIDE.velocity(lambda *given: Exact().apply({"params": {"one": 1.0}}, *given), labels)
    straight = paths.straightness(field, SCALE * noise).mean()
    assert generator.straightness(3) == pytest.approx(float(straight), rel=1e-4)


def test_fresh_noise_is_as_wide(generator):
    noise, labels = generator.noise(range(256)), np.zeros(256, int)
    sampled = generator.sample_latents(noise, labels, SamplerConfig(200, None, solver="sde"))
    assert np.asarray(sampled).std() == pytest.approx(STD, rel=0.05)
    assert np.asarray(sampled).mean() == pytest.approx(MEAN, abs=0.02)
    # All of an image is a hole: once, it is drawn as any sample; with repeats, the deviation stays that of the data.
    black, hole = np.zeros((256, 4, 4, 1), np.uint8), np.ones((4, 4), bool)
    once = generator.inpaint(black, hole, labels, SamplerConfig(20, None), 1)
    plain = generator.decode(generator.sample_latents(noise, labels, SamplerConfig(20, None)))
    np.testing.assert_allclose(once.astype(float), plain.astype(float), atol=1)
    filled = generator.inpaint(black, hole, labels, SamplerConfig(200, None), 3) / 127.5 - 1
    assert filled.std() == pytest.approx(np.clip(MEAN + STD * noise, -1, 1).std(), rel=0.06)


@pytest.mark.parametrize("num_steps", [None, 64])
def test_likelihoods_are_of_the_scaled_noise(generator, num_steps):
    images = np.random.default_rng(1).integers(100, 160, (2, 4, 4, 1), np.uint8)
    batch = PixelBatch(condition=jnp.zeros(2, jnp.int32), image=jnp.asarray(images))
    static = {"network": Exact(), "objective": WIDE, "config": LikelihoodConfig(0, num_steps), "is_pixels": False}
    nats, _ = measure_batch(generator.params, PixelCodec(), KEY, batch, jnp.arange(2), **static)
    expected = -stats.norm(MEAN, STD).logpdf(images / 127.5 - 1).mean((1, 2, 3))
    np.testing.assert_allclose(nats, expected, atol=2e-3)
    np.testing.assert_allclose(
        density.log_normal(X_0, SCALE), stats.norm(0, SCALE).logpdf(X_0).sum((1, 2, 3)), rtol=1e-5
    )


def test_a_guide_has_learned_with_the_same_noise(generator):
    check_guide(generator.model, generator.model._replace(objective=dataclasses.replace(WIDE, prediction="data")))
    with pytest.raises(UserError, match=r"--guide: it learned with --objective.noise_scale=1, the model with 2; use"):
        check_guide(generator.model, generator.model._replace(objective=FlowMatching()))


def test_heun_of_predicted_data_ends_with_eulers_step_and_is_inverted(generator):
    class Predicts(Exact):
        def apply(self, variables, x, t, labels):
            return x + (1 - expand(t)) * super().apply(variables, x, t, labels)

    objective = dataclasses.replace(WIDE, prediction="data")
    model = generator.model._replace(network=Predicts(), objective=objective)
    data = ImageGenerator(model, generator.params)
    noise, labels = generator.noise(range(3)), np.zeros(3, int)
    heun = SamplerConfig(64, None, solver="heun")
    field = objective.velocity(lambda *given: Predicts().apply({"params": {"one": 1.0}}, *given), labels)
    latents = data.sample_latents(noise, labels, heun)
    cut, plain = (solvers.sample(field, noise, 64, name, noise_scale=SCALE) for name in ("heun_euler", "heun"))
    np.testing.assert_allclose(latents, cut, atol=1e-5)
    assert np.abs(plain - cut).max() > 1e-3
    np.testing.assert_allclose(
        data.sample_latents(data.invert(latents, labels, heun), labels, heun), latents, atol=2e-3
    )


# --- The bottleneck of patches ---

NARROW = DiTConfig(patch_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3, bottleneck=6, dtype="float32")


def make_params(config=NARROW, channels=3, condition=None):
    network = DiT(config, condition=condition or ClassCondition(num_classes=3))
    arguments = (jnp.zeros((1, 8, 8, channels)), jnp.zeros(1), network.condition.null(1))
    shapes = jax.eval_shape(network.init, KEY, *arguments)["params"]
    return jax.tree.map(lambda leaf: RNG.standard_normal(leaf.shape, np.float32), shapes)


def test_patches_go_through_two_matrices():
    embed = PatchEmbed(4, 16, jnp.float32, bottleneck=6)
    images = jnp.asarray(RNG.standard_normal((2, 8, 8, 3), np.float32))
    params = jax.tree.map(jnp.asarray, make_params()["patch_embed"])
    assert {"/".join(path): leaf.shape for path, leaf in flatten_dict(params).items()} == {
        "kernel": (4, 4, 3, 6), "out/kernel": (6, 16), "out/bias": (16,),
    }  # fmt: skip
    rows = images.reshape(2, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(2, 4, 48)
    expected = rows @ params["kernel"].reshape(48, 6) @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(embed.apply({"params": params}, images), expected, rtol=1e-4, atol=1e-4)
    # Xavier's rule for the matrices themselves: variance 2 / (inputs + outputs).
    fresh = PatchEmbed(16, 128, jnp.float32, bottleneck=64).init(KEY, jnp.zeros((1, 16, 16, 3)))["params"]
    assert fresh["kernel"].std() == pytest.approx(np.sqrt(2 / (768 + 64)), rel=0.02)
    assert fresh["out"]["kernel"].std() == pytest.approx(np.sqrt(2 / (64 + 128)), rel=0.02)
    assert not fresh["out"]["bias"].any()


def test_its_matrices_are_counted():
    wide = dataclasses.replace(NARROW, bottleneck=0)
    difference = 48 * 6 + 6 * 16 - 48 * 16
    assert NARROW.count_parameters((8, 8, 3)) - wide.count_parameters((8, 8, 3)) == difference
    flops = [DiT(config).count_flops((8, 8, 3)) for config in (NARROW, wide)]
    assert flops[0] - flops[1] == 2 * 4 * difference
    assert not NARROW.hints((8, 8, 3))
    (hint,) = dataclasses.replace(NARROW, bottleneck=16).hints((8, 8, 3))
    assert "--model.bottleneck=16 is no narrower than a patch or the model, 16" in hint


def test_channels_of_a_condition_go_around_it():
    condition = ImageCondition((8, 8, 1)).fit_latents((8, 8, 3), (8, 8, 3))
    shapes = {path[-2:]: leaf.shape for path, leaf in flatten_dict(make_params(condition=condition)).items()}
    assert shapes["condition_patches", "kernel"] == (4, 4, 2, 16)  # whether it is given is a channel, too
    assert shapes["patch_embed", "kernel"] == (4, 4, 3, 6)


def test_a_bottleneck_is_exported_and_goes_on_with_other_channels():
    source = make_params()
    state = export_published(source, NARROW, (8, 8, 3))
    again = import_published(state, NARROW, (8, 8, 3))
    jax.tree.map(np.testing.assert_array_equal, again, source)
    adapted = adapt_params(source, make_params(channels=4), NARROW, "abc", "abc").params
    kernel = adapted["patch_embed"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, :3], source["patch_embed"]["kernel"])
    assert not kernel[:, :, 3].any()


# --- From one run to another ---


def test_an_export_says_what_is_unusual():
    assert describe_unusual(saved(prediction="velocity", noise_scale=1.0)) == []
    assert describe_unusual(saved(prediction=None, noise_scale=None)) == []  # of other objectives
    assert describe_unusual(saved(bottleneck=8, prediction="data", noise_scale=2.0)) == [
        "predicts the data instead of the velocity",
        "starts from noise of standard deviation 2",
        "reads patches through a bottleneck of 8 channels",
    ]


def saved(bottleneck=0, **objective):
    dataset = {"codec": {"name": "pixels", "source": None, "sha256": None}}
    return {
        "objective": {"name": "flow_matching", **objective},
        "model": {"bottleneck": bottleneck},
        "dataset": dataset,
    }


def test_starting_from_a_run_that_learned_something_else_is_said():
    source = SourceRun("runs/a", None, [], saved(prediction="velocity", noise_scale=1.0))
    assert source.differences(saved(prediction="velocity", noise_scale=1.0)) == []
    assert source.differences({**saved(), "objective": {"name": "flow_matching"}}) == []  # as of other objectives
    assert source.differences(saved(prediction="data", noise_scale=2.0)) == [
        "note: --load_dir was trained with --objective.prediction=velocity; this run has data, and learns it anew",
        "note: --load_dir was trained with --objective.noise_scale=1.0; this run has 2.0, and learns it anew",
    ]
    with pytest.raises(UserError, match=r"--model\.bottleneck=0, but --load_dir=runs/a has 8; give that"):
        check_architecture(saved(), saved(bottleneck=8), "runs/a")
