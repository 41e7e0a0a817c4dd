"""The blocks of docs/change_this.md are run as they stand, each against what it promises."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_transformer import NETWORKS
from tests.conftest import ROOT
from utils.base.messages import UserError
from utils.codecs.codec import PixelCodec
from utils.codecs.codecs import CODECS
from utils.conditions.condition import CONDITIONS
from utils.conditions.text_encoders import TEXT_ENCODERS
from utils.conditions.tokens import TextCondition
from utils.data.batches import training_batches
from utils.data.loaders import LOADERS, Loader, get_loader, load_dataset
from utils.metrics.extractors import EXTRACTORS, POOL, FeatureKey, load_extractors
from utils.metrics.metrics import METRICS, compute_metrics, metric_columns
from utils.metrics.reference import FeatureReference, ReferenceStatistics
from utils.metrics.statistics import ImageStatistics
from utils.networks.models import init_params
from utils.objectives.flow_matching import FlowMatching
from utils.objectives.objectives import OBJECTIVES
from utils.runs.opening import load_generator
from utils.trackers.trackers import TRACKERS, Trackers, read_metrics
from utils.training import build_run, make_config

PAGE = (ROOT / "docs" / "change_this.md").read_text()
BLOCKS = dict(re.findall(r"^```python\n# (\w+)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE))
COMMANDS = re.findall(r"^PYTHONPATH=\S+ python mine.py (.*)$", PAGE, flags=re.MULTILINE)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*blocks) -> their names, in a folder with mine.npz; what they register is gone again afterwards."""
    rng = np.random.default_rng(0)
    labels = np.arange(100) % 2
    images = rng.integers(0, 100, (100, 8, 8, 1)) + 150 * labels[:, None, None, None]  # cats dark, dogs bright
    np.savez(tmp_path / "mine.npz", images=images.astype(np.uint8), labels=labels)
    monkeypatch.chdir(tmp_path)
    registries = (LOADERS, CONDITIONS, TEXT_ENCODERS, NETWORKS, OBJECTIVES, CODECS, EXTRACTORS, TRACKERS)
    before = [dict(entries) for entries in registries]
    metrics = list(METRICS)

    def run_blocks(*names: str) -> dict:
        namespace: dict = {"__name__": "page"}
        for name in names:
            exec(compile(BLOCKS[name], f"docs/change_this.md, {name}", "exec"), namespace)
        return namespace

    yield run_blocks
    for entries, old in zip(registries, before, strict=True):
        entries.clear()
        entries.update(old)
    METRICS[:] = metrics


def test_every_block_has_a_test():
    assert PAGE.count("```python\n") == len(BLOCKS)
    assert set(BLOCKS) == {
        "condition",
        "data",
        "fields",
        "iterable",
        "encoder",
        "network",
        "loss",
        "codec",
        "metric",
        "extractor",
        "tracker",
        "programs",
        "loop",
        "fit",
    }
    source = Path(__file__).read_text()
    assert [name for name in BLOCKS if not re.search(rf'(run|script)\(.*"{name}"', source)] == []


def test_arrays_are_a_data_set(run):
    run("data")
    train, validation = (load_dataset("mine", split) for split in ("train", "validation"))
    assert (len(train.source), len(validation.source)) == (98, 2)
    assert train.class_names == ("cat", "dog")
    batch = next(training_batches(train, 16, seed=0))
    assert (batch.image.shape, batch.image.dtype) == ((16, 8, 8, 1), np.uint8)
    assert (batch.condition.shape, batch.condition.dtype) == ((16,), np.int32)
    np.testing.assert_array_equal(batch.image.mean((1, 2, 3)) > 125, batch.condition)


def test_an_iterable_is_a_data_set(run):
    from sklearn.datasets import load_sample_images

    run("iterable")
    train, validation = (load_dataset("photos", split) for split in ("train", "validation"))
    assert train.image_shape == validation.image_shape == (320, 320, 3)
    batch = next(training_batches(train, 4, seed=0))
    assert sorted(batch.condition) == [0, 0, 1, 1]
    for image, label in zip(batch.image, batch.condition, strict=True):
        np.testing.assert_array_equal(image, load_sample_images().images[label][:320, :320])


def test_data_have_a_condition_of_their_own(run):
    names = run("condition")
    dataset = load_dataset("ramps")
    batch = next(training_batches(dataset, 8, seed=0))
    assert (batch.condition.shape, batch.condition.dtype) == ((8, 2), np.float32)
    right = batch.image[:, :, 4:].mean((1, 2, 3)) - batch.image[:, :, :4].mean((1, 2, 3))
    np.testing.assert_allclose(right / 91, batch.condition[:, 0], atol=0.02)
    drawn = names["Direction"]().draw(jax.random.key(0), jnp.arange(5))
    np.testing.assert_allclose(jnp.square(drawn).sum(axis=1), 1, rtol=1e-5)


def test_an_encoder_is_a_function_of_texts(run):
    run("encoder")
    condition = TextCondition.of_captions(["ab", "abc"], "letters")
    assert condition == TextCondition(3, 1, "letters")
    np.testing.assert_array_equal(condition.check(["b"])["value"][0], np.float32([[98 / 128 - 1], [0], [0]]))
    assert condition.check("b")["mask"].tolist() == [[True, False, False]]


def test_fields_of_floats_are_a_data_set(run):
    run("fields")
    batch = next(training_batches(load_dataset("fields"), 4, seed=0))
    assert (batch.image.shape, batch.image.dtype) == ((4, 8, 12, 4), np.float32)
    x_1 = batch.to_latents(PixelCodec(), jax.random.key(0))
    np.testing.assert_allclose(x_1, batch.image / 3, atol=1e-6)


def test_an_own_network_and_loss_learn_in_an_own_loop(run):
    names = run("data", "network", "loss", "loop", "fit")
    losses = [line["training/l2_loss"] for line in read_metrics(Path("runs/python/metrics.jsonl"))]
    assert losses[-1] < 0.7 * losses[0]
    assert (names["images"].shape, names["images"].dtype) == ((2, 8, 8, 1), np.uint8)
    cat, dog = names["images"].mean((1, 2, 3))
    assert cat < dog

    # Its run is the start of another.
    given = {"load_dir": "runs/python", "dataset_name": "mine", "batch_size": 32, "wandb.mode": "disabled"}
    tuned = build_run(make_config({**given, "save_dir": "runs/tuned"}))
    assert tuned.config.model == names["generator"].model.network.config
    theirs = load_generator("runs/python", params="raw").params
    jax.tree.map(np.testing.assert_array_equal, tuned.start[0], theirs)
    with pytest.raises(UserError, match=r"--lora_rank=2 is for kernels .* of which --model.network=convnet has none"):
        build_run(make_config({**given, "save_dir": "runs/lora", "lora_rank": 2}))


@pytest.mark.parametrize("objective", ["shortcut", "mean_flow"])
def test_an_objective_of_steps_needs_a_network_that_takes_one(run, objective):
    network = run("data", "network")["ConvNet"]
    settings = {"dataset_name": "mine", "model.network": "convnet", "codec": "pixels", "objective.name": objective}
    config = make_config({**settings, "batch_size": 32, "wandb.mode": "disabled"})
    message = f"--objective.name={objective} needs a network that takes a step; --model.network=convnet does not"
    with pytest.raises(UserError, match=message):
        build_run(config)
    assert not Path("runs").exists()

    class WithStep(network):
        @nn.compact
        def __call__(self, x, t, condition, step=None):
            return x if step is None else x * nn.Dense(1, name="step")(step[:, None])[:, None, None]

    NETWORKS["convnet"] = NETWORKS["convnet"]._replace(build=lambda config, remat, mesh, kind: WithStep(config, kind))
    built = build_run(config)
    assert {*init_params(built.model, jax.random.key(0))} == {"step"}


def test_what_makes_no_data_codec_or_network_is_named(run):
    run("data", "network")
    settings = {"dataset_name": "mine", "model.network": "convnet", "codec": "none", "wandb.mode": "disabled"}
    CODECS["none"] = CODECS["pixels"]._replace(load=lambda source: None)
    NETWORKS["convnet"] = NETWORKS["convnet"]._replace(build=lambda *_: None)
    LOADERS["none"] = Loader(lambda *_: None)
    for changes, message in (
        ({"dataset_name": "none"}, "the loader of --dataset_name=none returned no ImageDataset"),
        ({}, "the loader of --codec=none returned no Codec"),
        ({"codec": "pixels"}, "the builder of --model.network=convnet returned no Network"),
    ):
        with pytest.raises(UserError, match=message):
            build_run(make_config({**settings, **changes, "batch_size": 32}))


@pytest.mark.parametrize(
    ("flag", "name"),
    [("dataset_name", "mine"), ("model.network", "convnet"), ("objective.name", "huber"), ("codec", "blocks"),
     ("trackers", "diary")],
)  # fmt: skip
def test_what_is_not_registered_is_refused_in_the_same_words(configure, flag, name):
    with pytest.raises(UserError, match=rf"--{flag}={name}\b.* is unknown; known are .*\. Register it first \(docs/ch"):
        get_loader(configure([f"--{flag}", name]).data.dataset_name)


def test_the_loss_is_quadratic_for_small_errors_and_linear_for_large_ones(run):
    huber = run("loss")["Huber"]
    x_1 = jnp.ones((4, 8, 8, 1))
    labels = jnp.zeros(4, jnp.int32)
    draws = FlowMatching().draw(jax.random.key(0), jax.random.key(1), 4)

    def losses(objective):  # of a network that answers 0
        return objective.loss(lambda x, t, labels: 0 * x, lambda x, t, labels: 0 * x, x_1, labels, draws)

    squared, _ = losses(FlowMatching())
    np.testing.assert_allclose(losses(huber(delta=30.0))[0], squared, rtol=0.01)
    linear, metrics = losses(huber(delta=0.001))
    np.testing.assert_allclose(linear, 2 * 0.001 * metrics["abs_error"], rtol=0.01)


def test_a_codec_is_inverted(run):
    codec = run("codec")["Blocks"]()
    images = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    latents = codec.encode(jax.random.key(1), images)
    assert latents.shape[1:] == codec.latent_shape((6, 4, 3)) == (3, 2, 12)
    np.testing.assert_array_equal(latents[:, 1, 0, 3:6], images[:, 2, 1])
    np.testing.assert_array_equal(codec.decode(latents), images)
    with pytest.raises(UserError, match="--codec=blocks takes images of even sides, not 5x4"):
        codec.latent_shape((5, 4, 3))


def test_a_metric_is_a_result_and_a_column(run):
    run("metric")
    samples = ImageStatistics(0)
    features = np.random.default_rng(0).normal(size=(50, 3))
    samples.update({"pool": features + np.array([3, 0, 4])})
    moments = FeatureReference(features.mean(0), np.cov(features, rowvar=False))
    results = compute_metrics(samples, ReferenceStatistics({POOL: moments}, "", Path("mine_stats.npz")))
    assert results["mean_distance"] == pytest.approx(5)
    assert results["fid"] == pytest.approx(25)
    assert metric_columns()["mean_distance"] == "mean distance"


def test_a_feature_network_has_its_own_distance(run):
    run("extractor")
    (extract,) = load_extractors(["colours"]).values()
    greys = np.array([0, 255, 51, 51], np.uint8)
    features = extract(jnp.broadcast_to(greys[:, None, None, None], (4, 8, 8, 3)))
    samples = ImageStatistics()
    mean = FeatureKey("colours", "mean")
    samples.update({name: np.asarray(rows) for name, rows in features.items()}, "colours")
    np.testing.assert_allclose(samples[mean].rows[:, 0], [0, 1, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(samples[FeatureKey("colours", "contrast")].mu, 0, atol=1e-6)
    moments = FeatureReference(samples[mean].mu + np.array([3, 0, 4]), samples[mean].sigma)
    results = compute_metrics(samples, ReferenceStatistics({mean: moments}, "", Path("mine_stats.npz")))
    assert results == {"fd_colours": pytest.approx(25)}
    assert metric_columns()["fd_colours"] == "FD (colours)"


def test_a_tracker_is_told_of_numbers_and_images(run, tmp_path):
    run("tracker")
    trackers = Trackers(tmp_path, {"trackers": ["diary"], "wandb": {"mode": "disabled"}}, 7)
    trackers.log(8, {"training/l2_loss": 0.25, "validation/l2_loss": 1})
    trackers.log_image_files(8, [tmp_path / "cat.png", tmp_path / "cats.npz"])
    trackers.close()
    lines = (tmp_path / "diary.txt").read_text().splitlines()
    assert lines == ["from step 7", "step 8: loss 0.250", f"step 8: cat is in {tmp_path / 'cat.png'}"]


def test_commands_are_understood(run, read_flags):
    run("data", "network", "loss")
    assert len(COMMANDS) == 3
    for command in COMMANDS:
        program, *words = shlex.split(command)
        read_flags(importlib.import_module(program), words)


def test_a_script_trains_with_own_data_network_and_loss(run, tmp_path):
    script(tmp_path / "mine.py", "data", "network", "loss", "metric", "programs")
    small = shlex.split("--max_steps 3 --batch_size 8 --eval_interval 0 --log_interval 1 --wandb.mode disabled")
    command = [sys.executable, "mine.py", *shlex.split(COMMANDS[0]), *small]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # The commands to go on with are the script's: the programs themselves do not know the network.
    for purpose, program in {"samples": "sample", "reference of FID": "compute_fid_stats", "FID": "eval_fid"}.items():
        assert re.search(rf"^{purpose}: \S*python mine.py {program} --", done.stdout, re.MULTILINE)
    lines = read_metrics(tmp_path / "runs" / "flow_mine" / "metrics.jsonl")
    assert lines[0]["training/abs_error"] > 0
    with pytest.raises(UserError, match=r"--objective.name=huber is unknown; known are flow_matching, diffusion, "):
        load_generator("runs/flow_mine")
    run("loss")
    with pytest.raises(UserError, match=r"--model.network=convnet is unknown; known are dit. Register it"):
        load_generator("runs/flow_mine")
    run("network")
    generator = load_generator("runs/flow_mine")
    assert generator.model.objective.delta == 0.5
    assert generator.class_names == ("cat", "dog")
    assert generator.sample([0, 1], num_steps=2).shape == (2, 8, 8, 1)


def script(path: Path, *names: str) -> None:
    """Writes a script of these blocks."""
    path.write_text("\n\n".join(BLOCKS[name] for name in names))
