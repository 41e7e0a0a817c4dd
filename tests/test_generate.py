"""A trained model as Python calls it: samples by label and seed, paths, the network, the codec."""

import re
import tarfile

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_transformer import DiTConfig
from tests.conftest import GOLDEN, ROOT
from utils.base.mesh import make_mesh
from utils.base.messages import UserError
from utils.codecs.codec import PixelCodec
from utils.conditions.classes import ClassCondition
from utils.networks.models import ImageModel, Network
from utils.objectives.flow_matching import FlowMatching
from utils.runs.opening import load_generator, load_model, open_checkpoint
from utils.sampling.generator import ImageGenerator
from utils.sampling.solvers import SamplerConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with tarfile.open(GOLDEN / "run.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"


@pytest.fixture(scope="module")
def generator(run):
    return load_generator(run, seed=3)


def test_images_are_of_the_labels_and_the_seed(generator):
    images = generator.sample([3, 7, 3], num_steps=4, cfg_scale=2.0)
    assert (images.shape, images.dtype) == ((3, 8, 8, 1), np.uint8)
    np.testing.assert_array_equal(images, generator.sample([3, 7, 3], num_steps=4, cfg_scale=2.0, seed=3))
    assert not np.array_equal(images, generator.sample([3, 7, 3], num_steps=4, cfg_scale=2.0, seed=4))
    images, other = (generator.sample([3, label, 3], num_steps=4, cfg_scale=50.0) for label in (7, 8))
    assert [bool((a == b).all()) for a, b in zip(images, other, strict=True)] == [True, False, True]


def test_without_labels_they_are_those_that_an_evaluation_draws(generator):
    (batch,) = generator.generate(SamplerConfig(4, None), 5, 5)
    expected, labels = batch.to_host()
    np.testing.assert_array_equal(generator.conditions(range(5)), labels)
    np.testing.assert_array_equal(generator.sample(num_samples=5, num_steps=4), expected)
    np.testing.assert_array_equal(generator.sample(labels, num_steps=4), expected)


@pytest.mark.parametrize("label", [-1, 9.5, 11, None])
def test_labels_that_are_not_there_are_refused(generator, label):
    with pytest.raises(ValueError, match=f"no label {label}; use 0 to 9"):
        generator.sample(np.array([label]))


def with_classes(model, *classes):
    return model._replace(network=model.network.clone(condition=ClassCondition(*classes)))


def test_labels_may_be_names_of_classes(generator):
    named = generator.with_seed(3)
    named.model = with_classes(generator.model, ("cat", "dog", *generator.class_names[2:]))
    np.testing.assert_array_equal(named.condition.check(["dog", "CAT", "7"]), [1, 0, 7])
    np.testing.assert_array_equal(named.condition.check("cat"), [0])
    np.testing.assert_array_equal(named.sample("dog", num_steps=2), generator.sample(1, num_steps=2))
    with pytest.raises(UserError, match="'cot' is no class of this run; did you mean cat"):
        named.sample(["cot"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps=0: use a whole number"),
        ({"cfg_scale": float("nan")}, "cfg_scale=nan: use a scale"),
        ({"solver": "eular"}, "solver=eular: did you mean euler"),
        ({"cfg_channels": 2, "cfg_scale": 2.0}, "cfg_channels=2: the model has 1 channels"),
        ({"seed": 2**32}, "seed=4294967296: use a number from 0"),
        ({"seed": -1}, "seed=-1"),
        ({"num_samples": 2}, "num_samples=2, but there are 1 labels"),
        ({"labels": None, "num_samples": 0}, "num_samples=0: use a whole number, 1 or more"),
        ({"num_steps": True}, "num_steps=True: use a whole number"),
        ({"labels": [True]}, "there is no label True"),
        ({"labels": []}, "labels is empty"),
    ],
)
def test_the_api_refuses_what_the_flags_refuse(generator, arguments, message):
    with pytest.raises(UserError, match=message):
        generator.sample(**{"labels": [3], "num_steps": 2} | arguments)


def test_samplers_are_checked_wherever_one_is_given(generator):
    noise, bad = generator.noise([0]), SamplerConfig(0, None)
    for draw in (
        lambda: next(generator.generate(bad, 1, 1)),
        lambda: next(generator.path(noise, [3], bad, 1)),
        lambda: generator.sample_latents(noise, [3], bad),
        lambda: generator.invert(noise, [3], bad),
        lambda: generator.inpaint(np.zeros((1, 8, 8, 1), np.uint8), np.eye(8, dtype=bool), [3], bad),
    ):
        with pytest.raises(UserError, match="num_steps=0"):
            draw()


def test_scales_of_the_flags_for_no_guidance_are_none(generator):
    plain = generator.sample([3], num_steps=2)
    for scale in (-1, 1, 1.0):
        np.testing.assert_array_equal(generator.sample([3], num_steps=2, cfg_scale=scale), plain)


def test_no_samples_are_drawn_of_classes_without_images(generator):
    sparse = ImageGenerator(with_classes(generator.model, generator.class_names, (0, 3, 9)), generator.params, seed=3)
    labels = sparse.conditions(range(200))
    assert set(labels.tolist()) == {1, 2, 4, 5, 6, 7, 8}
    balanced = ImageGenerator(sparse.model, generator.params, label_mode="balanced")
    assert balanced.conditions(range(8)).tolist() == [1, 2, 4, 5, 6, 7, 8, 1]


@pytest.mark.parametrize("sampler", [SamplerConfig(6, 2.0), SamplerConfig(0, None, solver="dopri5", rtol=1e-3)])
def test_a_path_leads_from_the_noise_to_the_sample(generator, sampler):
    noise = generator.noise([0, 1])
    stages = list(generator.path(noise, [3, 7], sampler, 3))
    assert len(stages) == 4
    np.testing.assert_array_equal(stages[0], noise)
    fields = sampler._asdict()
    images = generator.sample([3, 7], **fields).astype(int)
    assert np.abs(generator.decode(stages[-1]) - images).max() <= (3 if sampler.is_adaptive else 1)
    distances = [float(np.square(x - stages[-1]).mean()) for x in stages]
    assert distances == sorted(distances, reverse=True)
    np.testing.assert_array_equal(generator.sample_latents(noise, [3, 7], SamplerConfig(6, 2.0)).shape, noise.shape)


def test_one_euler_step_is_the_network_itself(generator):
    noise = generator.noise([0, 1])
    latents = generator.sample_latents(noise, [3, 7], SamplerConfig(1, None))
    velocity = generator.model_fn(noise, np.zeros(2, np.float32), np.array([3, 7], np.int32))
    assert velocity.dtype == np.float32
    np.testing.assert_allclose(latents, noise + velocity, atol=2e-3)


@pytest.mark.parametrize("sampler", [SamplerConfig(20, None, solver="heun"), SamplerConfig(0, None, solver="dopri5")])
def test_inversion_finds_the_noise_of_a_sample(generator, sampler):
    noise = generator.noise([0, 1])
    latents = generator.sample_latents(noise, [3, 7], sampler)
    found = generator.invert(latents, [3, 7], sampler)
    assert np.abs(found - noise).max() < 0.05 < np.abs(latents - noise).max()


def test_inpainting_changes_the_hole_alone(generator):
    images = np.arange(128, dtype=np.uint8).reshape(2, 8, 8, 1)
    is_hole = np.zeros((8, 8), bool)
    is_hole[2:5, 3:] = True
    filled = generator.inpaint(images, is_hole, [3, 7], SamplerConfig(3, 2.0), num_repeats=2)
    np.testing.assert_array_equal(filled[:, ~is_hole], images[:, ~is_hole])
    assert (filled[:, is_hole] != images[:, is_hole]).mean() > 0.5
    with pytest.raises(ValueError, match="dopri5 cannot inpaint"):
        generator.inpaint(images, is_hole, [3, 7], SamplerConfig(0, None, solver="dopri5"))


class Affine(Network):
    """v = label / 10 + t everywhere; "no label" is the label 10."""

    config = DiTConfig(num_classes=10)
    condition = ClassCondition(tuple("abcdefghij"))

    def apply(self, variables, x, t, labels):
        return jnp.broadcast_to((labels / 10 + t)[:, None, None, None], x.shape) + 0 * variables["params"]["unused"]


def affine_generator(codec=None, image_shape=(8, 8, 1)) -> ImageGenerator:
    model = ImageModel(Affine(), FlowMatching(), codec or PixelCodec(), make_mesh(), image_shape)
    return ImageGenerator(model, {"unused": jnp.zeros(())})


@pytest.mark.parametrize("change", [{}, {"cfg_interval": (0.25, 0.5)}, {"time_shift": 3.0}, {"cfg_channels": 1}])
def test_guidance_and_times_are_those_of_the_sampler(change):
    """Eight Euler steps of label 2 at scale 3; without a label the velocity is 0.8 larger."""
    generator, sampler = affine_generator(image_shape=(2, 2, 3)), SamplerConfig(8, 3.0, **change)
    noise = generator.noise([0])
    moved = np.asarray(generator.sample_latents(noise, [2], sampler) - noise)
    times = np.linspace(0, 1, 9)
    times = times / (times + sampler.time_shift * (1 - times))
    low, high = sampler.cfg_interval
    for channel in range(3):
        is_guided = (low <= times[:-1]) & (times[:-1] <= high) & (channel < (sampler.cfg_channels or 3))
        velocity = np.where(is_guided, 1 + 3 * (0.2 - 1), 0.2) + times[:-1]
        np.testing.assert_allclose(moved[..., channel], (np.diff(times) * velocity).sum(), rtol=1e-4)


@pytest.mark.parametrize("loose", ["rtol", "atol"])
def test_tolerances_are_those_of_the_sampler(generator, loose):
    strict = SamplerConfig(0, None, solver="dopri5", rtol=1e-6, atol=1e-6)
    most, fewer = (
        np.asarray(next(generator.generate(sampler, 2, 2, [3, 7])).nfe).mean()
        for sampler in (strict, strict._replace(**{loose: 1e-2}))
    )
    assert fewer < most


class Blocks(PixelCodec):
    """Latents are the means of 2x2 pixels."""

    def encode(self, key, images):
        return images.reshape(len(images), 4, 2, 4, 2, 1).mean(axis=(2, 4))

    def decode(self, latents):
        return jnp.repeat(jnp.repeat(latents, 2, axis=1), 2, axis=2)

    def latent_shape(self, image_shape):
        return (4, 4, 1)


def test_what_is_in_the_hole_does_not_enter_its_filling():
    """Also not by a latent of which only a part lies in the hole."""
    generator, is_hole = affine_generator(Blocks()), np.zeros((8, 8), bool)
    is_hole[1:4, 3:6] = True
    images = np.full((1, 8, 8, 1), 100, np.uint8)
    others = np.where(is_hole[..., None], np.uint8(250), images)
    filled, again = (generator.inpaint(x, is_hole, [3], SamplerConfig(4, None)) for x in (images, others))
    np.testing.assert_array_equal(filled, again)
    assert (filled[:, is_hole] != 100).mean() > 0.5


@pytest.mark.parametrize("sampler", [SamplerConfig(3, 50.0), SamplerConfig(0, 50.0, solver="dopri5", rtol=1e-2)])
def test_between_two_classes_the_ends_are_those_of_the_classes(generator, sampler):
    noise = generator.noise([0, 0, 0])
    mixed = generator.sample_latents(noise, generator.condition.mix([3] * 3, [7] * 3, [0.0, 0.5, 1.0]), sampler)
    for row, label in ((0, 3), (2, 7)):
        alone = generator.sample_latents(noise, [label] * 3, sampler)
        np.testing.assert_allclose(mixed[row], alone[row], atol=0.02)
    assert np.abs(mixed[1] - mixed[0]).max() > 0.01


def test_pixels_are_encoded_and_decoded(generator):
    images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    latents = generator.encode(images)
    np.testing.assert_allclose(latents, images / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(generator.decode(latents), images)


def test_parameters_with_and_without_ema(run, generator):
    assert generator.class_names == tuple("0123456789")
    raw = load_generator(run, params="raw", seed=3)
    assert not np.array_equal(raw.sample([3], num_steps=2), generator.sample([3], num_steps=2))
    with pytest.raises(UserError, match="--params=best: use ema, raw, or ema:WIDTH"):
        load_generator(run, params="best")
    with pytest.raises(UserError, match="no checkpoint"):
        load_generator(run / "images")
    with pytest.raises(UserError, match="--dtype=float16 is unknown"):
        load_generator(run, dtype="float16")


def test_a_run_says_that_classes_had_no_images(run, tmp_path, capsys):
    """As config.json and the checkpoint's configuration record it."""
    checkpoints, (step, *_) = open_checkpoint(run)
    saved = checkpoints.restore_config(step)
    model = load_model(saved | {"dataset": saved["dataset"] | {"empty_classes": [2, 5]}}, make_mesh())
    assert "note: 2 of 10 classes had no training images" in capsys.readouterr().err
    assert model.condition.drawn_classes.tolist() == [1, 1, 0, 1, 1, 0, 1, 1, 1, 1]


def test_an_ema_of_initial_parameters_is_named(run, capsys):
    load_generator(run)
    assert "the EMA at step 20 is still" in capsys.readouterr().err
    load_generator(run, params="raw")
    assert "EMA" not in capsys.readouterr().err


@pytest.mark.parametrize("page", ["README.md", "docs/sampling.md"])
def test_the_documented_lines_run(run, page):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    names = {}
    exec(code.replace("runs/demo", str(run)), names)
    assert names["images"].shape == (2, 8, 8, 1)
