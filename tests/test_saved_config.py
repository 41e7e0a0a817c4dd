"""Configurations of saved runs, from any file: a whole one is read, of any other the setting is named, at once."""

import itertools
import json
import math
import random
import resource
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_transformer import DiTConfig
from utils.base.external import BadFileError
from utils.base.mesh import make_mesh
from utils.base.messages import UserError
from utils.convert.published import export_published
from utils.convert.sources import METADATA_KEY, PublishedCheckpoint, read_source
from utils.networks.models import init_params, model_fn
from utils.runs.checkpoint import Checkpoints
from utils.runs.importing import import_run
from utils.runs.opening import load_generator, load_model
from utils.runs.saved_config import check_parameters, read_config

DIT = DiTConfig(patch_size=2, hidden_size=24, depth=1, num_heads=3, num_classes=2, dtype="float32")
OPTIMIZER = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "target_update_rate": 0.9999, "cfg_scale": 4.0}
CONFIG = {
    "dataset_name": "digits",
    "seed": 0,
    "batch_size": 8,
    "image_size": None,
    "lora_rank": 0,
    "freeze": [],
    "warmup_steps": 0,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "grad_clip": None,
    "lr_schedule": "constant",
    "ema_profiles": [],
    "check_images": 1,
    "dataset_weights": None,
    "augment": [],
    "augment_prob": 0.12,
    "coupling": "none",
    "coupling_rows": None,
    "coupling_weight": None,
    "coupling_draws": 100,
    "frozen": [],
    "save_dir": "runs/a",
    "codec": "pixels",
    "model": DIT.__dict__
    | OPTIMIZER
    | {"use_stable_vae": 0, "t_sampler": "uniform", "preset": "debug", "denoise_timesteps": 32},
    "objective": {
        "name": "flow_matching", "distill": 0, "diffusion_timesteps": None, "omega": None, "prediction": "velocity",
        "t_mean": 0.0, "t_std": 1.0, "noise_scale": 1.0,
    },
    "dataset": {
        "name": "digits", "image_shape": [8, 8, 3], "latent_shape": [8, 8, 3], "class_names": ["a", "b"], "vae": None,
        "vae_sha256": None, "codec": {"name": "pixels", "source": None, "sha256": None}, "empty_classes": [],
        "condition": {"kind": "class", "arrays": [[[], "int32"]]},
        "splits": {"train": {"format": "array", "num_examples": 9, "sha256": "x"}},
    },
    "jax": {"jax_enable_x64": False},
}  # fmt: skip
BAD = [
    None, True, -1, 0, 3, 2.5, 1e6, 2**20, 2**31, 10**400, math.nan, -math.inf, "", "x", "\0", "\ud800", [], [0],
    [[[]]], [8, 8], [0, 8, 3], [8, 8, 2**30], [8.0, 8, 3], ["a", 1], ["a", "a"], {}, {"a": {"b": 1}},
]  # fmt: skip


def paths(config, path=()):
    for name, value in config.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from paths(value, (*path, name))


PATHS = list(paths(CONFIG))


def changed(changes):
    """CONFIG with {path: value}, or without what is `Ellipsis`."""
    config = json.loads(json.dumps(CONFIG))
    for path, value in changes.items():
        group = config
        for name in path[:-1]:
            group = group.get(name) if isinstance(group, dict) else None
        if isinstance(group, dict):
            group[path[-1]] = value
            if value is ...:
                del group[path[-1]]
    return config


@pytest.fixture(scope="module")
def params():
    return jax.eval_shape(partial(init_params, load_model(read_config(changed({})), make_mesh())), jax.random.key(0))


@pytest.fixture(scope="module")
def sample_shape(params):
    """sample_shape(config): the shape of one sample, as long as nothing needs to be computed."""
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    mesh, known = make_mesh(), {}

    def find(config):
        config = read_config(config)
        check_parameters(config, shapes)
        model = load_model(config, mesh)
        key = (model.network, model.objective, model.latent_shape)
        if key not in known:
            fresh = jax.eval_shape(partial(init_params, model), jax.random.key(0))
            field = partial(velocity, model)
            known[key] = jax.eval_shape(field, fresh, jnp.zeros((1, *model.latent_shape)), jnp.zeros(1), jnp.zeros(1))
        return known[key].shape

    return find


def velocity(model, params, x, t, t_next):
    return model.objective.velocity(model_fn(model.network, params), jnp.zeros(1, jnp.int32))(x, t, t_next)


def test_whole_configurations_are_read_as_they_are(sample_shape):
    assert read_config(CONFIG) == CONFIG
    assert sample_shape(CONFIG) == (1, 8, 8, 3)
    # Older runs, other networks with settings of their own, and objectives that are registered elsewhere.
    others = {
        ("jax",): ..., ("dataset", "splits"): ..., ("model", "network"): "convnet", ("model", "hidden_size"): 7,
        ("model", "kernel_size"): 3, ("objective", "name"): "huber", ("objective", "delta"): 0.5,
    }  # fmt: skip
    assert read_config(changed(others)) == changed(others)
    oldest = changed({("objective",): ..., ("dataset",): {"image_shape": [8, 8, 3], "class_names": ["a"]}})
    for name in ("rope", "network", "timestep_scale"):
        del oldest["model"][name]
    oldest["model"]["t_sampler"] = "log-normal"
    found = read_config(oldest)
    assert (found["model"]["rope"], found["model"]["network"], found["model"]["t_sampler"]) == (
        0,
        "dit",
        "logit_normal",
    )
    assert found["objective"] == {name: value for name, value in CONFIG["objective"].items() if value is not None}
    assert found["dataset"]["name"] == "digits"
    assert "rope" not in oldest["model"]
    assert (found["codec"], found["dataset"]["codec"]["name"]) == ("pixels", "pixels")
    # The VAE of a run that does not say its latents' shape may have any number of channels, and any factor.
    oldest["model"]["use_stable_vae"] = 1
    del oldest["codec"]
    assert read_config(oldest | {"vae": "x"})["codec"] == "kl:x"
    assert read_config(oldest)["dataset"]["codec"] == {"name": "kl", "source": None, "sha256": None}
    shapes = {"['patch_embed']['kernel']": (2, 2, 16, 24), "['label_embed']['Embed_0']['embedding']": (3, 24)}
    check_parameters(read_config(oldest), shapes | {"['block_0']['mlp']": ()})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.num_heads", 0, "its configuration has model.num_heads=0, not an integer from 1 to 65536"),
        ("model.patch_size", 0, "model.patch_size=0, not an integer from 1"),
        ("model.patch_size", 3, "--model.patch_size=3 does not divide the 8x8 input"),
        ("model.depth", 10**12, "model.depth=1000000000000, not an integer from 1 to 1000"),
        ("model.depth", True, "model.depth=True, not an integer"),
        ("model.mlp_ratio", math.nan, "model.mlp_ratio=nan, not a number from 0"),
        ("model.dtype", "float128", "model.dtype='float128', not one of bfloat16, float32"),
        ("model.norm", None, "model.norm=NoneType, not one of layer, rms"),
        ("model.t_sampler", "x", "model.t_sampler='x', not one of logit_normal"),
        ("model.num_classes", 1, "its configuration has 2 names of 1 classes"),
        ("model.rope", 1, None),
        ("objective.name", 3, "objective.name=3, not a text"),
        ("objective.diffusion_timesteps", 10**9, "diffusion_timesteps=1000000000, not an integer from 21 to 10000"),
        ("dataset.class_names", [1, 2], r"dataset.class_names=\[1, 2\], not a list of names"),
        ("dataset.class_names", [], r"dataset.class_names=\[\], not a list of names"),
        ("dataset.image_shape", [8, 8], r"dataset.image_shape=\[8, 8\], not a height and a width"),
        ("dataset.latent_shape", [2**19, 2**19, 3], "dataset.latent_shape=.*, not a height and a width up to 8192"),
        ("dataset.latent_shape", [8, 8, 4], r"latents \(8, 8, 4\) of a model of pixels"),
        ("dataset.empty_classes", [2], "dataset.empty_classes of more than 2 classes"),
        ("dataset.empty_classes", [0, 1], "no class with images"),
        ("dataset.splits", {"train": 3}, "dataset.splits=dict, not the format"),
        ("image_size", "x", "image_size='x', not a value as its flag takes it, or null"),
        ("model.a-b", 1, "has a setting 'a-b', which is no name"),
        ("objective.", 1, "has a setting '', which is no name"),
        ("extra", [[[[[[[[[[[]]]]]]]]]]], "nested too deep"),
    ],
)
def test_settings_that_cannot_be_are_named(path, value, message):
    config = changed({tuple(path.split(".")): value})
    if message is None:
        read_config(config)
        return
    with pytest.raises(BadFileError, match=message) as error:
        read_config(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [300, pytest.param(None, marks=pytest.mark.slow)])
def test_no_change_of_a_configuration_is_a_traceback_or_takes_long(sample_shape, count):
    """Every setting with every bad value, and pairs of them, or `count` of all those: refused in one line, or a model
    that can be sampled."""
    draw = random.Random(0)
    changes = [{path: value} for path, value in itertools.product(PATHS, [*BAD, ...])]
    changes += [{path: draw.choice([*BAD, ...]) for path in draw.sample(PATHS, 2)} for _ in range(400)]
    changes = draw.sample(changes, count or len(changes))
    before, refused, longest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0.0
    for change in changes:
        started, message = time.process_time(), ""
        try:
            assert len(sample_shape(changed(change))) == 4
        except (UserError, BadFileError) as error:
            message = str(error)
        except Exception as error:
            raise AssertionError(f"{change}: {error!r}") from error
        assert "\n" not in message, change
        refused += bool(message)
        longest = max(longest, time.process_time() - started)
    assert refused > len(changes) / 2
    assert longest < 5  # a second or two go where the garbage of the whole suite is collected
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 2**10


FROM_ANYWHERE = [
    {("model", "depth"): 1000}, {("model", "hidden_size"): 65536}, {("model", "num_heads"): 0},
    {("model", "patch_size"): 8}, {("model", "num_classes"): 10**8}, {("model", "mlp_ratio"): 100.0},
    {("model", "dtype"): "int8"}, {("model", "norm"): "rms"}, {("objective", "name"): ["x"]},
    {("dataset", "class_names"): [1, 2]},
    *({("dataset", f"{kind}_shape"): [side, side, 3] for kind in ("image", "latent")} for side in (4096, 2**19)),
    {("model",): []}, {("dataset",): ...},
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(params):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)


@pytest.mark.parametrize("change", FROM_ANYWHERE, ids=lambda change: "+".join(".".join(path) for path in change))
def test_neither_exported_files_nor_checkpoints_of_others_are_trusted(tmp_path, trained, change):
    config = changed(change)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError, match=r"no configuration of a run|has the shape|no tensor") as error:
        import_run(
            "x", PublishedCheckpoint(export_published(trained, DIT, (8, 8, 3)), run=config), tmp_path / "run", {}
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    checkpoints = Checkpoints(tmp_path / "other")
    checkpoints.save_params(trained, config)
    checkpoints.close()
    with pytest.raises(UserError) as error:
        load_generator(tmp_path / "other")
    assert "\n" not in str(error.value)
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 2**10


def test_an_exported_network_of_another_kind_is_refused(tmp_path, trained):
    state = export_published(trained, DIT, (8, 8, 3))
    source = PublishedCheckpoint(state, run=changed({("model", "network"): "convnet"}))
    with pytest.raises(UserError, match="name the network 'convnet'; only dit is exported"):
        import_run("x", source, tmp_path / "run", {})


def test_the_metadata_of_a_file_are_read_strictly(tmp_path, trained):
    from safetensors.numpy import save_file

    state = export_published(trained, DIT, (8, 8, 3))
    for text in (
        "[" * 100_000,
        json.dumps(changed({("model", "extra"): "x" * 9})).replace('"xxxxxxxxx"', "[" * 99 + "]" * 99),
    ):
        save_file(state, tmp_path / "x.safetensors", metadata={METADATA_KEY: text})
        with pytest.raises(UserError, match="are no configuration of a run"):
            import_run("x", read_source(str(tmp_path / "x.safetensors")), tmp_path / "run", {})
    assert np.isfinite(state["pos_embed"]).all()
