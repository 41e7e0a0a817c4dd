"""Guidance by an inner head and by another model, CFG-Zero*, and their cost: golden numbers, identities, programs."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eval_fid
import sample as sample_program
from diffusion_transformer import DiTConfig
from tests.conftest import run_program
from tests.golden_network import error
from utils.base.mesh import make_mesh
from utils.base.messages import UserError
from utils.codecs.codec import PixelCodec
from utils.conditions.classes import ClassCondition
from utils.data.dataset import PixelBatch
from utils.flags import reading
from utils.networks.models import init_params, make_model, model_fn
from utils.networks.state import create_train_state
from utils.objectives.diffusion import Diffusion
from utils.objectives.flow_matching import FlowMatching
from utils.objectives.mean_flow import MeanFlow
from utils.objectives.objective import Heads
from utils.runs import opening, run_evaluation
from utils.runs.opening import load_generator
from utils.sampling.generator import ImageGenerator, check_guide
from utils.sampling.guidance import guide, guide_by_inner, guide_by_model, project, within
from utils.sampling.samplers import check_sampler
from utils.sampling.solvers import GUIDANCE, SamplerConfig, sample
from utils.trackers.trackers import read_metrics
from utils.training.step import compute_gradients

# --- Golden numbers: models whose data are Gaussian, by label ---


@pytest.fixture(scope="module")
def numbers(shared):
    return dict(np.load(shared / "golden" / "more" / "guidance_small.npz"))


def gaussian(numbers, ending=""):
    """(x, t, label) -> velocity of the data N(mu, s^2) of each label, exactly."""
    mu, s = numbers["mu" + ending], numbers["s" + ending]

    def velocity(x, t, labels, *step):
        t = t.reshape(-1, 1, 1, 1)
        mean, deviation = jnp.asarray(mu)[labels], jnp.asarray(s)[labels].reshape(-1, 1, 1, 1)
        slope = (t * deviation**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * deviation**2)
        return mean + slope * (x - t * mean)

    return velocity


def guided_fields(numbers):
    """{method of the golden file: (field (x, t, label, t_next), first step)}."""
    model, inner, weak = (gaussian(numbers, ending) for ending in ("", "_internal", "_bad"))
    by_labels, by_inner, by_model = (float(numbers[f"scale_{name}"]) for name in ("cfg", "internal", "auto"))
    num_labels = len(numbers["mu"]) - 1

    def null(count):
        return jnp.full(count, num_labels)

    def heads(low=0.0, high=1.0):
        def field(x, t, labels, *step):
            scales = jnp.where((low <= t) & (t <= high), by_inner, 1.0)
            both = lambda *given: Heads(model(*given), inner(*given))  # noqa: E731
            return guide_by_inner(both, scales)(x, t, labels)

        return field

    zero_star = guide(model, null, by_labels, is_zero_star=True)
    return {
        "plain": (model, 0),
        "cfg": (guide(model, null, by_labels), 0),
        "cfg_interval": (within(guide(model, null, by_labels), model, 0.2, 0.7), 0),
        "autoguidance": (guide_by_model(model, weak, by_model), 0),
        "internal": (heads(), 0),
        "internal_interval": (heads(0.0, 0.6), 0),
        "internal_cfg": (guide(heads(), null, by_labels), 0),
        **{f"cfg_zero_{count}": (zero_star, count) for count in (0, 1, 2)},
    }


@pytest.mark.usefixtures("optimised")
def test_fields_and_samples_are_the_golden_ones(numbers):
    x_0, labels = jnp.asarray(numbers["x0"]), jnp.asarray(numbers["labels"])
    for name, (field, first) in guided_fields(numbers).items():
        for t in (0.0, 0.3, 0.95):
            found = field(x_0, jnp.full(8, t, jnp.float32), labels, jnp.full(8, t))
            assert error(found, numbers[f"velocity_t{t:g}/{name}"]) < 1e-5, (name, t)

        def velocity_fn(x, t, t_next, field=field):
            return field(x, t, labels, t_next)

        for solver in ("euler", "heun"):
            if f"{solver}/{name}" in numbers:
                found = jax.jit(partial(sample, velocity_fn, num_steps=12, solver=solver, first=first))(x_0)
                assert error(found, numbers[f"{solver}/{name}"]) < 1e-5, (name, solver)


def test_the_factor_of_the_unconditional_velocity_is_that_of_each_example(numbers):
    x, t, labels = jnp.asarray(numbers["x0"]), jnp.full(8, 0.3), jnp.asarray(numbers["labels"])
    model = gaussian(numbers)
    found = project(model(x, t, labels), model(x, t, jnp.full(8, len(numbers["mu"]) - 1)))
    np.testing.assert_allclose(found[:, 0, 0, 0], numbers["cfg_zero_scale_t0.3"], rtol=1e-5)


# --- Identities ---


def test_what_changes_nothing_changes_nothing(numbers):
    x, t, labels = jnp.asarray(numbers["x0"]), jnp.full(8, 0.3), jnp.asarray(numbers["labels"])
    model, other = gaussian(numbers), gaussian(numbers, "_bad")
    plain = model(x, t, labels)
    # Bit for bit: a guide that is the model, whatever the scale; scale 1, whatever the guide.
    np.testing.assert_array_equal(guide_by_model(model, model, 3.7)(x, t, labels, t), plain)
    np.testing.assert_array_equal(guide_by_model(model, other, 1.0)(x, t, labels, t), plain)
    np.testing.assert_array_equal(
        guide_by_inner(lambda *a: Heads(model(*a), other(*a)), jnp.ones(8))(x, t, labels), plain
    )

    # CFG-Zero* does not see how long the unconditional velocity is, and keeps one that is parallel.
    def scaled(factor):
        return lambda x, t, labels: jnp.where((labels == 5)[:, None, None, None], factor, 1) * model(x, t, labels)

    def null(count):
        return jnp.full(count, 5)

    once, thrice = (guide(scaled(k), null, 2.5, is_zero_star=True)(x, t, labels) for k in (1.0, 3.0))
    np.testing.assert_allclose(once, thrice, rtol=1e-4, atol=1e-5)

    def parallel(x, t, labels):
        factor = jnp.where(labels == 5, 0.5, 1)[:, None, None, None]
        return factor * jnp.concatenate([plain, plain])[: len(x)]

    np.testing.assert_allclose(guide(parallel, null, 2.5, is_zero_star=True)(x, t, labels), plain, rtol=1e-4, atol=1e-5)


# --- A network with an inner head ---


def make_small(objective=None, key=0, **changes):
    """(model, parameters that are not zero anywhere) of a DiT for 4x4 images of three classes."""
    values = {"patch_size": 2, "hidden_size": 8, "depth": 2, "num_classes": 3, "dtype": "float32", "inner_head": 1}
    config = DiTConfig(**(values | changes))
    shape = (4, 4, 1)
    model = make_model(
        config, objective or FlowMatching(), PixelCodec(), make_mesh(), shape, ClassCondition(("a", "b", "c"))
    )
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(key)
    return model, jax.tree.map(lambda leaf: 0.3 * jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), shapes)


@pytest.fixture(scope="module")
def small():
    return make_small()


NUM = 8 * 1  # a row for each virtual device


def one_step(generator, **sampler):
    """(x_1 - x_0 of one Euler step, noise, labels), of all samples of `generator`."""
    noise = generator.noise(range(NUM))
    labels = generator.conditions(range(NUM))
    latents = generator.sample_latents(noise, labels, SamplerConfig(1, **sampler))
    return np.asarray(latents) - np.asarray(noise), noise, labels


def test_the_last_layer_is_that_of_a_network_without_the_inner_one(small):
    model, params = small
    plain, _ = make_small(inner_head=0)
    rest = {part: tree for part, tree in params.items() if part != "inner_layer"}
    x, t, labels = jnp.ones((2, 4, 4, 1)), jnp.array([0.2, 0.7]), jnp.array([0, 2])
    expected = model_fn(plain.network, rest)(x, t, labels)
    np.testing.assert_array_equal(model_fn(model.network, params)(x, t, labels), expected)
    final, inner = model_fn(model.network, params, with_inner=True)(x, t, labels)
    np.testing.assert_array_equal(final, expected)

    # After the first block: the second one does not reach it.
    others = {**params, "block_1": jax.tree.map(jnp.zeros_like, params["block_1"])}
    np.testing.assert_array_equal(model_fn(model.network, others, with_inner=True)(x, t, labels).inner, inner)
    assert error(inner, np.asarray(final)) > 0.1


@pytest.mark.parametrize("objective", [FlowMatching(), Diffusion()])
def test_the_inner_loss_is_that_of_the_inner_output(objective):
    x_1 = jnp.ones((2, 4, 4, 1))
    draws = objective.draw(*jax.random.split(jax.random.key(0)), 2)

    def losses(*outputs):
        def model_fn(x, t, condition, *step):
            given = [jnp.full_like(x, value) for value in outputs]
            return Heads(*given) if len(given) > 1 else given[0]

        loss, metrics = objective.loss(model_fn, model_fn, x_1, jnp.zeros(2, jnp.int32), draws)
        return loss, metrics

    loss, metrics = losses(0.5, -2.0)
    np.testing.assert_array_equal(loss, losses(0.5)[0])
    np.testing.assert_array_equal(metrics["inner_loss"], losses(-2.0)[0])


def test_both_outputs_learn_and_the_loss_is_that_of_the_last():
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), np.uint8)
    batch = PixelBatch(image=jnp.asarray(images), condition=jnp.arange(8) % 3)

    def gradients(weight):
        model, params = make_small(inner_weight=weight)
        state = create_train_state(params, optax.sgd(1.0), jax.random.key(1))
        static = {"model": model.network, "objective": model.objective, "grad_accum": 1, "class_dropout_prob": 0.1}
        return jax.jit(partial(compute_gradients, **static))(state, jax.random.key(2), batch, PixelCodec())

    # The loss is that of the last layer, whatever the weight, and both blocks and layers have their share of it.
    (once, metrics), (twice, same) = gradients(0.25), gradients(0.5)
    for name, value in metrics.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-5)
    for part in ("final_layer", "block_1"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), once[part], twice[part])
    kernels = [grads["inner_layer"]["dense"]["kernel"] for grads in (once, twice)]
    np.testing.assert_allclose(kernels[1], 2 * kernels[0], rtol=1e-4, atol=1e-6)
    assert np.abs(kernels[0]).max() > 1e-3
    early = [grads["block_0"]["mlp"]["dense_0"]["kernel"] for grads in (once, twice)]
    assert np.abs(early[0] - early[1]).max() > 1e-4


def test_a_sampler_guides_by_the_inner_head_then_by_labels(small):
    model, params = small
    generator = ImageGenerator(model, params)
    plain, noise, labels = one_step(generator, cfg_scale=None)
    np.testing.assert_array_equal(one_step(generator, cfg_scale=None, inner_scale=1.0)[0], plain)

    def mixed(labels):
        final, inner = model_fn(model.network, params, with_inner=True)(noise, jnp.zeros(NUM), labels)
        return inner + 1.5 * (final - inner)

    found, *_ = one_step(generator, cfg_scale=None, inner_scale=1.5)
    np.testing.assert_allclose(found, mixed(labels), rtol=1e-4, atol=1e-5)
    # Outside of its interval it is off: the step is at t = 0.
    found, *_ = one_step(generator, cfg_scale=None, inner_scale=1.5, inner_interval=(0.1, 1.0))
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)

    # In every branch of guidance by labels.
    null = np.full(NUM, 3)
    found, *_ = one_step(generator, cfg_scale=3.0, inner_scale=1.5)
    np.testing.assert_allclose(found, mixed(null) + 3 * (mixed(labels) - mixed(null)), rtol=1e-3, atol=1e-4)


def test_another_model_guides_in_every_branch(small):
    model, params = small
    weak_model, weak_params = make_small(key=5, inner_head=0, hidden_size=4)
    alone = ImageGenerator(model, params)
    generator = ImageGenerator(model, params, guide=ImageGenerator(weak_model, weak_params))
    plain, noise, labels = one_step(alone, cfg_scale=None)
    np.testing.assert_array_equal(one_step(generator, cfg_scale=None)[0], plain)
    own = ImageGenerator(model, params, guide=alone)
    np.testing.assert_array_equal(one_step(own, cfg_scale=None, guide_scale=2.5)[0], plain)

    def mixed(labels):
        v, v_weak = (
            model_fn(each.network, tree)(noise, jnp.zeros(NUM), labels)
            for each, tree in ((model, params), (weak_model, weak_params))
        )
        return v_weak + 2.5 * (v - v_weak)

    null = np.full(NUM, 3)
    found, *_ = one_step(generator, cfg_scale=3.0, guide_scale=2.5)
    np.testing.assert_allclose(found, mixed(null) + 3 * (mixed(labels) - mixed(null)), rtol=1e-3, atol=1e-4)
    found, *_ = one_step(generator, cfg_scale=None, guide_scale=2.5, guide_interval=(0.5, 1.0))
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)


def test_a_guide_without_dropped_labels_has_no_part_in_guidance_by_labels(small):
    model, params = make_small(class_dropout_prob=0.0)
    generator = ImageGenerator(*small, guide=ImageGenerator(model, params))
    generator.check_sampler(SamplerConfig(4, None, guide_scale=2.0))
    generator.check_sampler(SamplerConfig(4, 2.0))
    with pytest.raises(UserError, match=r"^--guide: .*class_dropout_prob=0.*no label.*; use --cfg_scale 1"):
        generator.check_sampler(SamplerConfig(4, 2.0, guide_scale=2.0))


def test_zero_steps_leave_the_noise_as_it_is(small):
    generator = ImageGenerator(*small)
    noise, labels = generator.noise(range(NUM)), generator.conditions(range(NUM))
    sampler = SamplerConfig(4, 2.0, cfg_zero_star=True, cfg_zero_steps=2)
    stages = list(generator.path(noise, labels, sampler, 4))
    for stage in stages[1:3]:
        np.testing.assert_array_equal(stage, noise)
    assert error(stages[3], np.asarray(noise)) > 1e-3
    images = generator.sample(labels, num_steps=4, cfg_scale=2.0, cfg_zero_star=True, cfg_zero_steps=2)
    np.testing.assert_array_equal(images, generator.decode(stages[-1]))
    with pytest.raises(UserError, match=r"^cfg_zero_steps=2: steps that are left out cannot invert; use 0"):
        generator.invert(noise, labels, sampler)


@pytest.mark.parametrize(
    ("sampler", "passes"),
    [
        (SamplerConfig(10, None), 10),
        (SamplerConfig(10, 2.0), 20),
        (SamplerConfig(10, 2.0, solver="heun"), 40),
        (SamplerConfig(10, None, inner_scale=1.5), 10),
        (SamplerConfig(10, 2.0, cfg_zero_star=True, cfg_zero_steps=3), 14),
        # t = 0.3, 0.4, ..., 0.7 of 0, 0.1, ..., 0.9.
        (SamplerConfig(10, 2.0, (0.25, 0.75)), 15),
        # Half-way points as well: 0.25, 0.35, ..., 0.75.
        (SamplerConfig(10, 2.0, (0.22, 0.77), solver="midpoint"), 20 + 5 + 6),
        (SamplerConfig(10, None, guide_scale=2.0), 10 * 1.25),
        (SamplerConfig(10, 2.0, (0.25, 0.75), guide_scale=2.0, guide_interval=(0.0, 0.35)), 15 + 0.25 * (4 + 1)),
    ],
)
def test_passes_of_the_network_are_counted(small, sampler, passes):
    model, params = small
    generator = ImageGenerator(model, params, guide=ImageGenerator(model, params))
    generator.guide.model = model._replace(network=CountingNetwork(model.network, 0.25))
    assert generator.count_passes(sampler) == pytest.approx(passes)


def test_straightness_takes_over_every_field_of_guidance():
    """Of the field that is sampled: all its settings but the steps that are left out."""
    fields = {name for name in SamplerConfig._fields if name.startswith(("cfg_", "inner_", "guide_"))}
    assert fields - {"cfg_zero_steps"} == set(GUIDANCE)


class CountingNetwork:
    """A network of which a pass costs a fraction of that of another."""

    def __init__(self, network, fraction):
        self.network, self.fraction = network, fraction

    def count_flops(self, shape):
        return self.fraction * self.network.count_flops(shape)


def test_passes_are_those_that_are_computed(small):
    model, params = small
    generator = ImageGenerator(model, params)
    batch = generator.generate(SamplerConfig(0, 2.0, solver="dopri5", rtol=1e-2), NUM, NUM)
    nfe = float(np.mean(next(iter(batch)).nfe))
    assert generator.count_passes(SamplerConfig(0, 2.0, solver="dopri5"), nfe) == 2 * nfe


# --- Refusals, and programs ---

REFUSED = [
    ({"inner_scale": 1.5}, "--inner_scale 1.5", "the model has no inner head"),
    ({"inner_scale": -1.0}, "--inner_scale=-1", "use a scale from 0 to 1000; 1 is no guidance"),
    ({"inner_interval": (0.9, 0.1)}, "--inner_interval 0.9,0.1 --inner_scale 2", "give first and last time"),
    ({"guide_scale": 2000.0}, "--guide runs/other --guide_scale 2000", "use a scale from 0 to 1000"),
    ({"cfg_zero_steps": 4, "cfg_zero_star": True}, "--cfg_zero_star 1 --cfg_zero_steps 4", "whole number below the 4"),
    ({"cfg_zero_steps": 1}, "--cfg_zero_steps 1", "it has no effect without cfg_zero_star"),
    ({"cfg_zero_steps": 1, "cfg_zero_star": True, "solver": "sde"},
     "--cfg_zero_star 1 --cfg_zero_steps 1 --solver sde", "sde has no steps to leave out"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "line", "message"), REFUSED)
def test_python_and_flags_refuse_the_same(read_flags, fields, line, message):
    name = next(iter(fields))
    sampler = SamplerConfig(4, 2.0)._replace(**fields)
    with pytest.raises(UserError, match=f"^{name}=.*{message}"):
        check_sampler(sampler, inner_head=0)
    with pytest.raises(UserError, match=f"^--{name}=.*{message}"):
        reading.read_samplers(read_flags(eval_fid, f"--denoise_timesteps 4 {line}".split()), 0.1, inner_head=0)


def test_the_flags_arrive(read_flags):
    line = "--denoise_timesteps 9 --cfg_scale 2,3 --cfg_zero_star 1 --cfg_zero_steps 2 --inner_scale 1.4"
    line += " --inner_interval 0.1,0.9 --guide runs/other --guide_scale 1.5,2.5 --guide_interval 0.2,0.8"
    common = {"cfg_zero_star": True, "cfg_zero_steps": 2, "inner_scale": 1.4, "inner_interval": (0.1, 0.9)}
    common["guide_interval"] = (0.2, 0.8)
    expected = [SamplerConfig(9, cfg, guide_scale=scale, **common) for cfg in (2.0, 3.0) for scale in (1.5, 2.5)]
    assert reading.read_samplers(read_flags(eval_fid, line.split()), 0.1, inner_head=1) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--guide_scale 2", "--guide_scale=2 has no effect without --guide"),
        ("--guide runs/other --guide_scale 1", "--guide=runs/other has no effect with --guide_scale=1"),
        ("--inner_interval 0,0.5", "--inner_interval=0,0.5 has no effect with --inner_scale=1"),
        ("--cfg_scale 1 --cfg_zero_star 1", "--cfg_zero_star=1 has no effect without guidance"),
    ],
)
def test_flags_without_effect_are_refused(read_flags, line, message):
    with pytest.raises(UserError, match=message):
        reading.read_samplers(read_flags(eval_fid, line.split()), 0.1, inner_head=2)


class Unregistered(MeanFlow):
    """An objective that OBJECTIVES does not know, as from Python."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": Unregistered()}, "--objective.name=Unregistered has no loss for a second output"),
        ({"inner_head": 2}, "--model.inner_head=2 has to come before the last of --model.depth=2 blocks"),
        ({"objective": MeanFlow()}, "--model.inner_head=1: --objective.name=mean_flow has no loss for a second output"),
    ],
)
def test_networks_that_cannot_have_an_inner_head_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_small(**changes)


RUN = """
    --dataset_name digits --codec pixels --model.hidden_size 16 --model.depth 2 --model.num_heads 2 --model.inner_head 1
    --model.patch_size 4 --model.num_classes 10 --batch_size 64 --model.lr 1e-3 --model.dtype float32
    --model.target_update_rate 0.5 --log_interval 1 --eval_interval 0 --wandb.mode disabled
""".split()  # noqa: SIM905 (a command line, as one types it)


def test_runs_with_an_inner_head_resume_and_are_the_same_on_any_devices(tmp_path, read_flags, monkeypatch, capsys):
    run_program("train_flow.py", *RUN, "--max_steps", 4, "--save_interval", 2, "--save_dir", tmp_path / "run")
    run_program("train_flow.py", *RUN, "--max_steps", 4, "--grad_accum", 2, "--save_dir", tmp_path / "split", devices=8)
    logs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "split")]
    for name in ("training/l2_loss", "training/inner_loss", "training/grad_norm"):
        values = [[line[name] for line in log if name in line] for log in logs]
        assert len(values[0]) == 4
        np.testing.assert_allclose(*values, rtol=2e-4)

    # Scored by all kinds of guidance: rows of their own, found again.
    words = ["eval_fid.py", "--load_dir", tmp_path / "run", "--denoise_timesteps", 2, "--num_samples", 16]
    words += ["--metrics", "moments", "--fid_stats", tmp_path / "images.npy", "--cfg_scale", 2, "--inner_scale", 1.5]
    words += ["--guide", tmp_path / "run" / "checkpoints" / "2", "--guide_scale", "1,2"]
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), np.uint8))
    done = run_program(*words)
    shown = done.stdout
    rows = json.loads((tmp_path / "run" / "fid.json").read_text())["cells"]
    assert [(row["inner_scale"], row.get("guide_scale"), row["passes"]) for row in rows] == [
        (1.5, None, 4),
        (1.5, 2, 8),
    ]
    assert ["guide_sha256" in row for row in rows] == [False, True]
    assert "its parameters are those of the model" not in done.stderr
    hint = (
        "the EMA of --guide at step 2 is still 25% initial parameters, noise; --guide_params raw takes the parameters"
    )
    assert hint in done.stderr
    assert "| inner | autoguidance | passes |" in shown
    names = {path.name for path in (tmp_path / "run").glob("samples_2_*.png")}
    assert names == {"samples_2_2_inner_1.5.png", "samples_2_2_inner_1.5_guide_2.png"}

    # The programs load the guide that they were given, and the parameters of it.
    def stop(guide, params, *_):
        raise UserError(f"{guide}, {params}")

    words = ["--load_dir", str(tmp_path / "run"), "--denoise_timesteps", "2", "--guide", "runs/other"]
    words += ["--guide_scale", "2", "--guide_params", "raw"]
    for program, module in ((eval_fid, run_evaluation), (sample_program, opening)):
        monkeypatch.setattr(module, "load_guide", stop)
        own = ["--fid_stats", str(tmp_path / "images.npy"), "--metrics", "moments"] if program is eval_fid else []
        with pytest.raises(UserError, match=r"^runs/other, raw$"):
            program.main(read_flags(program, [*words, *own]))
    monkeypatch.undo()

    # By itself a model is not guided.
    load_generator(tmp_path / "run", guide=tmp_path / "run")
    assert "/run: its parameters are those of the model, so that it changes nothing" in capsys.readouterr().err


def test_a_guide_has_learned_latents_of_the_same_codec(small):
    model, _ = small

    class Weighted(PixelCodec):
        sha256 = "a"

    class Other(PixelCodec):
        sha256 = "b"

    first, second = (model._replace(codec=codec()) for codec in (Weighted, Other))
    check_guide(model, first)
    with pytest.raises(UserError, match="--guide: it learned the latents of another codec"):
        check_guide(first, second)
