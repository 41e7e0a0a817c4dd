"""Images that are changed in training: the changes, what the network knows of them, and that nothing else sees them."""

import dataclasses
import json
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import ndimage

from diffusion_transformer import DiT, DiTConfig
from tests.conftest import run_program
from tests.runs import assert_close, losses
from utils.base.messages import UserError
from utils.codecs.codec import PixelCodec
from utils.conditions.augmented import AUGMENTATIONS, Augmented, Change
from utils.conditions.classes import ClassCondition
from utils.conditions.images import ImageCondition
from utils.conditions.several import SeveralCondition
from utils.conditions.tokens import TokensCondition
from utils.convert.sources import read_source
from utils.data.arrays import load_digits
from utils.data.dataset import Batch, PixelBatch
from utils.data.loaders import LOADERS, Loader
from utils.networks.network import NETWORKS, NetworkConfig, NetworkEntry
from utils.networks.state import create_train_state
from utils.objectives.flow_matching import FlowMatching
from utils.runs.export import export_run
from utils.runs.importing import import_run
from utils.runs.opening import load_generator
from utils.training import build_run, make_config, train
from utils.training.augmentation import draw_augmentation, warp
from utils.training.build import compile_steps, make_state
from utils.training.step import VALIDATION, compute_gradients, draw_examples, example_losses

DRAWN = np.array(
    [
        [0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, np.cos(0.7) - 1, np.sin(0.7), 0, 0, 0],
        [0, 0, 0, 0.8, -1.7, 0],
        [0, 0, 0, 0, 0, -2.3],
        [1, np.cos(-2.5) - 1, np.sin(-2.5), -2.5, 0.4, 1.5],
    ],
    np.float32,
)
jit_warp = jax.jit(warp)


def warp_by_scipy(image, flip, cosine, sine, right, down, size):
    """The same by SciPy: forward, (right, down) from the centre is mirrored, enlarged, turned and shifted."""
    forward = np.array([[1 + cosine, -sine], [sine, 1 + cosine]]) * 2 ** (0.2 * size) @ np.diag([1 - 2 * flip, 1])
    backward = np.linalg.inv(forward)[::-1, ::-1]  # rows first
    height, width, _ = image.shape
    centre = (np.array([height, width]) - 1) / 2
    offset = centre - backward @ (centre + np.array([height * down, width * right]) / 8)
    channels = [
        ndimage.affine_transform(channel, backward, offset, order=1, mode="mirror")
        for channel in np.moveaxis(image, 2, 0)
    ]
    return np.stack(channels, axis=2)


def test_changes_are_those_of_scipy():
    images = np.random.default_rng(0).uniform(-1, 1, (len(DRAWN), 7, 10, 2)).astype(np.float32)
    found = jit_warp(images, DRAWN)
    expected = [warp_by_scipy(np.float64(image), *row) for image, row in zip(images, DRAWN, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Exactly, where no pixel lies between others.
    np.testing.assert_array_equal(found[0], images[0])
    np.testing.assert_array_equal(found[1], images[1, :, ::-1])


def test_a_scene_is_changed_alike_in_any_resolution():
    fine = np.random.default_rng(0).normal(size=(len(DRAWN), 32, 32))
    fine = ndimage.gaussian_filter(fine, (0, 4, 4), mode="mirror")[..., None].astype(np.float32)

    def halve(images):
        return np.asarray(images).reshape(-1, 16, 2, 16, 2, 1).mean((2, 4))

    difference = halve(jit_warp(fine, DRAWN)) - jit_warp(halve(fine), DRAWN)
    inside = difference[:, 5:-5, 5:-5]  # edges are mirrored at the outermost pixels, which lie elsewhere
    assert np.abs(inside).max() < 0.1 * fine.std()


def test_each_change_is_drawn_as_often_as_is_asked():
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(draw_augmentation, static_argnums=1)
    drawn = np.asarray(draw(keys, AUGMENTATIONS, 0.25))
    flip, cosine, sine, right, down, size = drawn.T
    was = {"flip": flip > 0, "rotate": sine != 0, "translate": right != 0, "scale": size != 0}
    for name, is_changed in was.items():  # five standard errors
        assert abs(is_changed.mean() - 0.25) < 0.035, name
    assert abs((was["flip"] & was["rotate"]).mean() - 0.25**2) < 0.02
    np.testing.assert_array_equal(was["translate"], down != 0)

    # Any angle is as likely as any other; shifts and sizes are normal.
    angles = np.arctan2(sine, 1 + cosine)[was["rotate"]]
    np.testing.assert_allclose((1 + cosine) ** 2 + sine**2, 1, atol=1e-5)
    np.testing.assert_allclose(np.histogram(angles, 4, (-np.pi, np.pi))[0] / len(angles), 0.25, atol=0.07)
    for values in (right[was["translate"]], down[was["translate"]], size[was["scale"]]):
        np.testing.assert_allclose([values.mean(), values.std()], [0, 1], atol=0.16)

    # One alone is drawn as it is beside the others; with probability 0, none is.
    alone = np.asarray(draw(keys, ("translate",), 0.25))
    np.testing.assert_array_equal(alone, np.where(np.arange(6) // 3 * [0, 0, 0, 1, 1, 0] == 1, drawn, 0))
    assert not draw(keys, AUGMENTATIONS, 0.0).any()


# --- The network ---

SIZES = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "dtype": "float32"}
X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 8, 8, 1), np.float32))
T = jnp.asarray(np.linspace(0, 1, 6, dtype=np.float32))


def make_network(kind, **settings):
    """(a DiT of changed images, parameters of which none is zero)."""
    network = DiT(DiTConfig(**SIZES, **settings), condition=Augmented(kind, AUGMENTATIONS, 0.5))
    return network, random_params(network)


def random_params(network):
    shapes = jax.eval_shape(network.init, jax.random.key(0), X, T, network.condition.null(6))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), shapes)


@partial(jax.jit, static_argnums=0)
def run_network(network, params, condition):
    return network.apply({"params": params}, X, T, condition)


def test_no_parameters_are_those_of_an_image_as_it_is():
    kind = TokensCondition(2, 5)  # which brings no vector to which they could be added
    network, params = make_network(kind)
    run = partial(run_network, network)
    null = network.condition.null(6)
    plain = run(params, null)
    changed = run(params, Change(null, DRAWN))
    np.testing.assert_array_equal(run(params, Change(null, 0 * DRAWN)), plain)
    np.testing.assert_array_equal(changed[0], plain[0])
    assert (jnp.abs(changed - plain)[1:].max(axis=(1, 2, 3)) > 0.01).all()

    # It starts as the network of images as they are, which lacks one array.
    fresh = {**params, "augment_embed": {"kernel": jnp.zeros((6, 16))}}
    np.testing.assert_array_equal(run(fresh, Change(null, DRAWN)), run(fresh, null))
    alone = network.clone(condition=kind)
    rest = {part: tree for part, tree in fresh.items() if part != "augment_embed"}
    assert jax.tree.map(jnp.shape, rest) == jax.tree.map(jnp.shape, random_params(alone))
    np.testing.assert_array_equal(run_network(alone, rest, null), run(fresh, null))


def test_a_network_that_always_drops_its_condition_knows_the_change():
    network, params = make_network(ClassCondition(("a", "b", "c")), class_dropout_prob=1)
    labels = jnp.arange(6) % 3
    outputs = [run_network(network, params, Change(labels, drawn)) for drawn in (DRAWN, 0 * DRAWN)]
    assert jnp.abs(outputs[0] - outputs[1]).max() > 0.01


# --- The step ---


class Seen(FlowMatching):
    """An objective that keeps what its loss is given."""

    seen: ClassVar[list] = []

    def loss(self, model_fn, ema_model_fn, x_1, condition, draws):
        jax.debug.callback(lambda *given: self.seen.append(given), x_1, condition, draws["null"])
        return jnp.zeros(len(x_1)), {}


IMAGES = np.random.default_rng(0).integers(0, 255, (64, 8, 8, 1), np.uint8)
SMALL = {"image": IMAGES[:, ::2, ::2], "is_given": np.ones(64, bool)}
CONDITION_IMAGE = ImageCondition((4, 4, 1)).fit_latents((8, 8, 1), (8, 8, 1))


def see(grad_accum=1):
    """What the loss of a step on IMAGES is given, in each microbatch: (x_1, condition, no condition)."""
    kind = SeveralCondition((("class", ClassCondition(("a", "b", "c"))), ("image", CONDITION_IMAGE)))
    network, params = make_network(kind)
    state = create_train_state(params, optax.sgd(0.1), jax.random.key(0))
    batch = PixelBatch(condition={"class": jnp.arange(64) % 3, "image": SMALL}, image=jnp.asarray(IMAGES))
    static = {"model": network, "objective": Seen(), "grad_accum": grad_accum, "class_dropout_prob": 0.3}
    Seen.seen.clear()
    jax.jit(partial(compute_gradients, **static, augment_prob=0.5))(state, jax.random.key(1), batch, PixelCodec())
    jax.effects_barrier()
    return jax.tree.map(np.asarray, Seen.seen)


def test_the_network_learns_changed_images_and_is_told_how():
    ((x_1, condition, null),) = see()
    plain = np.float32(IMAGES / 127.5 - 1)
    is_changed = (condition.parameters != 0).any(axis=1)
    assert 0.8 < is_changed.mean() < 1  # of four changes at one half each: 15 of 16
    np.testing.assert_allclose(x_1, jit_warp(plain, condition.parameters), atol=1e-5)
    # Where the condition is dropped, too, and beside "no condition".
    is_dropped = condition.condition["class"] == 3
    assert 8 <= is_dropped.sum() <= 32
    assert is_changed[is_dropped].any()
    assert (null.condition["class"] == 3).all()
    np.testing.assert_array_equal(null.parameters, condition.parameters)

    # Images of the condition change as theirs do.
    given = condition.condition["image"]
    np.testing.assert_array_equal(given["is_given"], ~is_dropped)
    whole = CONDITION_IMAGE.prepare(PixelCodec(), SMALL)["channels"]
    expected = jit_warp(whole, condition.parameters)[~is_dropped]
    np.testing.assert_allclose(given["channels"][~is_dropped], expected, atol=1e-5)

    # Microbatches draw the same.
    found = np.concatenate([given.parameters for _, given, _ in see(grad_accum=4)])
    np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(condition.parameters, axis=0))


def test_images_are_changed_before_a_codec_encodes_them():
    class Thirds(PixelCodec):
        def encode(self, key, images):
            return images / 3

    batch = PixelBatch(condition=0, image=jnp.asarray(IMAGES))
    key = jax.random.key(0)
    found = batch.to_latents(Thirds(), key, lambda images: images + 1)
    np.testing.assert_allclose(found, (batch.to_latents(PixelCodec(), key) + 1) / 3, atol=1e-6)


# --- A run ---

SETTINGS = {
    "dataset_name": "digits", "codec": "pixels", "model.hidden_size": 16, "model.depth": 1, "model.patch_size": 4,
    "model.dtype": "float32", "model.num_classes": 10,
    "batch_size": 16, "eval_interval": 0, "wandb.mode": "disabled", "log_interval": 1,
}  # fmt: skip
AUGMENT = {"augment": ["flip", "rotate", "scale"], "augment_prob": 1.0}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A run of changed images, and its compiled step and validation."""
    run = build_run(make_config({**SETTINGS, **AUGMENT, "save_dir": str(tmp_path_factory.mktemp("compiled"))}))
    return run, *compile_steps(run, run.state_structs)


@pytest.fixture(scope="module")
def folder(compiled, tmp_path_factory):
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("augmented")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.training.loop.compile_steps", lambda *_: compiled[1:])
        train(build_run(make_config({**SETTINGS, **AUGMENT, "save_dir": str(folder), "max_steps": 3})))
    return folder


def test_validation_is_of_images_as_they_are(compiled):
    run, step, validate = compiled
    state, validation = validate(make_state(run))
    key, params = jax.random.fold_in(state.key, VALIDATION), jax.tree.map(np.asarray, state.params)
    _, training = step(state, run.validation_batch)

    # As of a network that knows of no changes.
    network = run.model.network.clone(condition=run.model.condition)
    rest = {part: tree for part, tree in params.items() if part != "augment_embed"}
    examples = draw_examples(key, run.validation_batch, FlowMatching(), 0.0)
    compute = jax.jit(partial(example_losses, model=network, objective=FlowMatching()))
    expected = compute(rest, rest, PixelCodec(), examples)[0].mean()
    np.testing.assert_allclose(validation["l2_loss"], expected, rtol=1e-6)
    assert abs(training["l2_loss"] - expected) > 1e-3


def test_samples_are_not_changed(folder):
    generator = load_generator(folder, params="raw")
    kernel = generator.params["augment_embed"]["kernel"]
    np.testing.assert_array_equal((np.asarray(kernel) != 0).any(axis=1), [True, True, True, False, False, True])

    # Samples do not depend on what was learned of changes.
    images = generator.sample(labels=[1, 2], num_steps=2, cfg_scale=2.0)
    generator.params["augment_embed"]["kernel"] = kernel + 1
    np.testing.assert_array_equal(generator.sample(labels=[1, 2], num_steps=2, cfg_scale=2.0), images)

    # The record is that of the data's condition, and says how they were changed.
    record = json.loads((folder / "config.json").read_text())
    assert record["dataset"]["condition"]["kind"] == "class"
    assert (record["augment"], record["augment_prob"], record["random_flip"]) == (AUGMENT["augment"], 1.0, 0)
    assert isinstance(generator.condition, ClassCondition)


def test_what_is_exported_needs_no_word_of_changes(folder, tmp_path):
    export_run(str(folder), tmp_path / "run.safetensors")
    source = read_source(str(tmp_path / "run.safetensors"), "--source")
    import_run("file", source, tmp_path / "run", {})
    generators = [load_generator(run) for run in (folder, tmp_path / "run")]
    assert "augment_embed" not in generators[1].params
    images = [generator.sample(labels=[3], num_steps=2) for generator in generators]
    np.testing.assert_array_equal(*images)


@pytest.mark.slow
def test_a_run_goes_on_exactly_on_one_device_and_on_eight(tmp_path):
    words = "--dataset_name digits --codec pixels --model.patch_size 4 --model.dtype float32 --batch_size 16"
    words += " --log_interval 1 --eval_interval 0 --wandb.mode disabled --augment flip,rotate --augment_prob 0.5"
    for name, devices, steps, more in (
        ("whole", 1, 4, ""),
        ("stopped", 1, 2, ""),
        ("stopped", 1, 4, ""),
        ("eight", 8, 4, "--grad_accum 2 --sharding fsdp"),
    ):
        more = [*more.split(), "--max_steps", steps, "--save_dir", tmp_path / name]
        run_program("train_flow.py", *words.split(), *more, devices=devices)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert_close(losses(tmp_path / "eight"), losses(tmp_path / "whole"), 4)


# --- What is refused ---


class Numbers(Batch):
    """Examples that hold no images."""


def load_numbers(name, split, options):
    return dataclasses.replace(load_digits(name, split, options), batch_type=Numbers)


def load_lines(name, split, options):
    return dataclasses.replace(load_digits(name, split, options), image_shape=(1, 64, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": ["flip", "spin"]}, "--augment=spin is unknown; use some of flip,rotate,translate,scale"),
        ({"augment": ["flip"], "augment_prob": 0.0}, "--augment_prob=0 changes no image; use 0.12, for example"),
        ({"augment": ["flip"], "augment_prob": 1.5}, "--augment_prob=1.5: use a number from 0 to 1"),
        ({"augment": ["flip"], "augment_prob": -0.1}, "--augment_prob=-0.1: use a number from 0 to 1"),
        ({"augment_prob": 0.5}, "--augment_prob=0.5 has no effect without --augment; leave it out"),
        ({"augment": ["flip"], "dataset_name": "numbers"}, "--dataset_name=numbers holds no images to change"),
        ({"augment": ["flip"], "dataset_name": "lines"}, "--augment=flip: images of 1x64 cannot be changed so"),
        ({"augment": ["flip"], "model.network": "deaf"}, "--model.network=deaf does not take how an image was changed"),
        (
            {"augment": ["scale"], "save_dir": "WHOLE", "max_steps": 4},
            "holds a run with --augment=flip,rotate,scale, not scale: give that",
        ),
        ({**AUGMENT, "augment_prob": 0.9, "save_dir": "WHOLE"}, "holds a run with --augment_prob=1.0, not 0.9"),
    ],
)
def test_refusals(settings, message, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(LOADERS, "numbers", Loader(load_numbers))
    monkeypatch.setitem(LOADERS, "lines", Loader(load_lines))
    monkeypatch.setitem(NETWORKS, "deaf", NetworkEntry(NetworkConfig, lambda *_: None))
    settings = {**SETTINGS, "save_dir": str(tmp_path / "run"), **settings}
    if settings["save_dir"] == "WHOLE":
        settings["save_dir"] = str(folder)
    if settings.get("model.network") == "deaf":
        settings = {name: value for name, value in settings.items() if not name.startswith("model.") or "net" in name}
    with pytest.raises(UserError) as error:
        train(build_run(make_config(settings)))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()
