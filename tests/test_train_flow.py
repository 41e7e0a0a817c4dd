"""The wiring of train_flow.py: every flag and every part arrives where it is used; nothing is trained here."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from utils.base.mesh import SHARDING_MODES, replicated
from utils.data.dataset import SPLITS
from utils.data.loaders import load_dataset
from utils.metrics.extractors import POOL
from utils.metrics.reference import FeatureReference, ReferenceStatistics
from utils.networks.state import EmaSchedule, create_train_state
from utils.sampling.solvers import SamplerConfig
from utils.training import build, evaluation, reference
from utils.training.build import Run, build_run, make_state
from utils.training.step import jit_train_step

DIGITS = """
    --dataset_name digits --use_stable_vae 0 --model.patch_size 2 --model.num_classes 10 --model.hidden_size 32
    --model.depth 1 --batch_size 16 --wandb.mode disabled
""".split()  # noqa: SIM905 (a command line, as one types it)


@pytest.fixture
def make_run(configure, tmp_path):
    """make_run('--flag value ...') -> the run of that command line."""
    return lambda line="": build_run(configure([*DIGITS, "--save_dir", tmp_path / "run", *line.split()]))


# --- Data ---


def images_of(split: str) -> set[bytes]:
    return {image.tobytes() for image in load_dataset("digits", split).source.images}


def images_in(batch) -> list[bytes]:
    return [image.tobytes() for image in np.asarray(batch.image)]


def test_training_and_validation_batches_are_of_their_splits(make_run):
    run, images = make_run(), {split: images_of(split) for split in SPLITS}
    assert not images["train"] & images["validation"]
    assert set(images_in(run.validation_batch)) <= images["validation"]
    assert set(images_in(next(run.training_batches()))) <= images["train"]


def test_the_seed_orders_the_data(make_run):
    first, again, other = (images_in(next(make_run(f"--seed {seed}").training_batches())) for seed in (1, 1, 2))
    assert first == again
    assert sorted(first) != sorted(other)


def test_the_seed_is_that_of_the_first_state(make_run, monkeypatch):
    init = partial(create_train_state, {"w": jnp.zeros(2)}, optax.identity())  # of a network that compiles at once
    monkeypatch.setattr(build, "init_state", lambda run, key, draw_key: init(key))
    state = make_state(make_run("--seed 5"))
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(jax.random.key(5)))


def test_images_are_mirrored_on_request(make_run):
    mirrored = {image[:, ::-1].tobytes() for image in load_dataset("digits").source.images}
    plain, flipped = (images_in(next(make_run(f"--random_flip {flip}").training_batches())) for flip in (0, 1))
    assert set(plain) <= images_of("train")
    assert 0 < len(set(flipped) - images_of("train")) < 16
    assert set(flipped) <= images_of("train") | mirrored


def test_one_batch_is_overfitted_on_request(make_run):
    batches = make_run("--debug_overfit 1").training_batches()
    assert sorted(images_in(next(batches))) == sorted(images_in(next(batches)))


# --- Optimizer, EMA, memory ---


def updates(run: Run, gradients, params) -> list:
    """The updates that the run's optimizer makes of a sequence of gradients, the parameters staying as they are."""
    state, found = run.optimizer.init(params), []
    for gradient in gradients:
        update, state = run.optimizer.update(gradient, state, params)
        found.append(update)
    return found


def test_rate_warm_up_and_cosine_reach_the_optimizer(make_run):
    """Where the gradient is always the same, Adam's update is the rate itself."""
    run = make_run("--model.lr 0.5 --warmup_steps 4 --lr_schedule cosine --max_steps 12")
    found = updates(run, [jnp.ones(1)] * 12, jnp.zeros(1))
    expected = [0.5 * n / 4 if n < 4 else 0.25 * (1 + np.cos(np.pi * (n - 4) / 8)) for n in range(12)]
    np.testing.assert_allclose(-np.concatenate(found), expected, rtol=1e-4, atol=1e-6)


def test_the_decays_of_adam_reach_the_optimizer(make_run):
    """A gradient of 1, then 0: the moments are b (1 - b), divided by 1 - b^2."""
    run = make_run("--model.lr 0.5 --model.beta1 0.5 --model.beta2 0.75")
    _, second = updates(run, [jnp.ones(1), jnp.zeros(1)], jnp.zeros(1))
    np.testing.assert_allclose(second, -0.5 * (1 / 3) / np.sqrt(3 / 7), rtol=1e-5)


def test_weight_decay_reaches_the_optimizer(make_run):
    params = {"matrix": jnp.full((2, 2), 3.0), "vector": jnp.full(2, 3.0)}
    run = make_run("--model.lr 0.5 --weight_decay 0.1")
    (update,) = updates(run, [jax.tree.map(jnp.zeros_like, params)], params)
    np.testing.assert_allclose(update["matrix"], -0.5 * 0.1 * 3.0, rtol=1e-5)
    assert not update["vector"].any()


def test_clipping_reaches_the_optimizer(make_run):
    """Gradients of 100 and 1, both of norm 1 once clipped, are the same to Adam: the second update is the rate."""
    run = make_run("--model.lr 0.5 --grad_clip 1")
    _, second = updates(run, [jnp.full(1, 100.0), jnp.ones(1)], jnp.zeros(1))
    np.testing.assert_allclose(second, -0.5, rtol=1e-5)


def test_decay_of_the_ema_and_what_saves_memory_reach_the_step(make_run):
    run = make_run("--model.target_update_rate 0.9 --ema_warmup 1 --grad_accum 4 --remat dots")
    assert run.ema == EmaSchedule(0.9, has_warmup=True)
    assert run.static["grad_accum"] == 4
    assert run.static["model"].remat == "dots"


@pytest.mark.parametrize("mode", SHARDING_MODES)
def test_the_state_is_split_as_the_flag_says(make_run, mode):
    state = make_run(f"--sharding {mode}").state_structs
    trees = {"params": state.params, "ema_params": state.ema_params, "opt_state": state.opt_state}
    split = {
        name
        for name, tree in trees.items()
        if any(leaf.sharding.spec != PartitionSpec() for leaf in jax.tree.leaves(tree))
    }
    assert split == {"dp": set(), "zero": {"ema_params", "opt_state"}}.get(mode, set(trees))


def test_the_flops_of_a_step_are_those_the_compiler_counts(make_run):
    """Matmuls dominate at this width; the compiler adds the elementwise operations."""
    run = make_run("--model.hidden_size 384 --model.num_heads 6 --model.mlp_ratio 4")
    state = run.state_structs
    step = jit_train_step(jax.tree.map(lambda leaf: leaf.sharding, state), replicated(run.mesh), **run.static)
    counted = step.lower(state, run.validation_batch, run.model.codec).cost_analysis()["flops"]
    assert run.flops_per_step == pytest.approx(counted, rel=0.1)


# --- Evaluation ---


class Generator:
    """In place of ImageGenerator: notes what it is given."""

    calls: list

    def __init__(self, model, params, seed=None):
        self.of = (float(params["w"]), seed)

    def straightness(self):
        self.calls.append(("straightness", *self.of))
        return 0.5

    def generate(self, sampler, num_samples, batch_size):
        self.calls.append(("fid", *self.of, sampler, num_samples))
        return []


@pytest.fixture
def calls(monkeypatch):
    """The looks of an evaluation, in order: (what, weight of the parameters, ...)."""
    calls = Generator.calls = []

    def note(name, *details):
        calls.append((name, *details))
        return ()

    monkeypatch.setattr(evaluation, "ImageGenerator", Generator)
    monkeypatch.setattr(
        evaluation,
        "loss_by_time",
        lambda model, params, batch, key: dict(note("loss", float(params["w"]), batch["name"])),
    )
    monkeypatch.setattr(
        evaluation,
        "reconstruction_panel",
        lambda model, params, batch, key: note("reconstruction", float(params["w"]), batch["name"]),
    )
    monkeypatch.setattr(
        evaluation,
        "sample_panels",
        lambda model, params, key, sampler, name="sample", **_: note(name, float(params["w"]), sampler),
    )
    monkeypatch.setattr(evaluation, "measure_images", lambda extractors, *_, **__: note("measure", extractors))
    monkeypatch.setattr(
        evaluation,
        "compute_metrics",
        lambda statistics, reference, metrics: note("distance", str(reference.path)) or {str(metrics[0]): 7.0},
    )
    monkeypatch.setattr(reference, "load_extractors", lambda names, weights, convention, **_: (weights, convention))
    moments = {POOL: FeatureReference(np.zeros(2), np.eye(2))}
    monkeypatch.setattr(reference, "load_statistics", lambda path, _: ReferenceStatistics(moments, "0", Path(path)))
    return calls


def test_pictures_and_fid_are_of_the_ema_and_losses_of_the_parameters(make_run, calls):
    run = make_run(
        "--fid_stats stats.npz --fid_samples 40 --inception_weights weights.pt --convention pytorch_fid --seed 5 "
        "--model.denoise_timesteps 3 --model.cfg_scale 1.5"
    )
    run = dataclasses.replace(run, validation_batch={"name": "held out"})
    state = create_train_state({"w": jnp.array(1.0)}, optax.identity(), jax.random.key(0))
    state = state.replace(ema_params={"w": jnp.array(2.0)})
    sampler = SamplerConfig(3, 1.5)
    results = dict(evaluation.evaluate(run, state, {"name": "trained on"}))
    assert results["fid"] == 7
    assert calls == [
        ("loss", 1, "trained on"),
        ("loss", 1, "held out"),
        ("reconstruction", 2, "held out"),
        ("sample", 2, sampler),
        ("sample_raw", 1, sampler),  # as the EMA is all initial parameters
        ("straightness", 2, 5),
        ("fid", 2, 5, sampler, 40),
        ("measure", ("weights.pt", "pytorch_fid")),
        ("distance", "stats.npz"),
    ]


def test_evaluations_are_due_as_the_flags_say(make_run):
    run = make_run("--eval_interval 400 --max_steps 1500")
    assert [step for step in range(1501) if evaluation.is_evaluation_due(run.config, step)] == [
        400,
        800,
        1000,
        1200,
        1500,
    ]
    never = make_run("--eval_interval 0 --max_steps 1500").config
    assert not any(evaluation.is_evaluation_due(never, step) for step in range(1501))
