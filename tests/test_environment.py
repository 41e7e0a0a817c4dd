"""JAX under other environment variables: what of it enters a run, and programs that cannot run so."""

import re
from functools import partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import run_program
from tests.test_saved_config import CONFIG
from utils.base import devices
from utils.base.devices import RECORDED, compare_jax_settings, jax_settings
from utils.base.mesh import make_mesh, replicated
from utils.convert.sources import read_source
from utils.networks.models import init_params
from utils.runs.checkpoint import Checkpoints
from utils.runs.export import export_run
from utils.runs.opening import load_generator, load_model
from utils.runs.saved_config import read_config
from utils.training.start import SourceRun, start_from


@pytest.fixture
def set_x64():
    yield lambda value: jax.config.update("jax_enable_x64", value)
    jax.config.update("jax_enable_x64", False)


def test_what_a_run_records_are_jaxs_defaults_here():
    assert jax_settings() == RECORDED == {name: jax.config.values[name] for name in RECORDED}


def test_differences_are_named_by_their_variable():
    assert compare_jax_settings(RECORDED, {}) == []
    assert compare_jax_settings({}, RECORDED) == []
    assert compare_jax_settings(RECORDED | {"jax_threefry_partitionable": False}, {"jax_random_seed_offset": 3}) == [
        "JAX_THREEFRY_PARTITIONABLE=0, was 1: the numbers are others from here on",
        "JAX_RANDOM_SEED_OFFSET=0, was 3: the numbers are others from here on",
    ]


@pytest.mark.parametrize(
    ("program", "environment", "message"),
    [
        ("train_flow.py", {"JAX_PLATFORMS": '"cuda"'}, "JAX_PLATFORMS=cuda: there is no such device here"),
        ("sample.py", {"JAX_PLATFORMS": '"gpu"'}, "JAX_PLATFORMS=gpu: there is no such device here"),
        ("convert_checkpoint.py", {"JAX_PLATFORMS": '"cdua"'}, "JAX_PLATFORMS=cdua: there is no such .*'cdua'"),
        ("eval_fid.py", {"JAX_PLATFORM_NAME": '"gpu"'}, "JAX_PLATFORM_NAME=gpu: there is no such device here"),
        ("likelihood.py", {"JAX_NUMPY_DTYPE_PROMOTION": '"strict"'}, "JAX_NUMPY_DTYPE_PROMOTION=strict: .*unset it"),
        ("make_pairs.py", {"JAX_NUMPY_RANK_PROMOTION": '"raise"'}, "JAX_NUMPY_RANK_PROMOTION=raise: .*unset it"),
        ("encode_latents.py", {"JAX_DISABLE_JIT": "true"}, "JAX_DISABLE_JIT=1: .*unset it"),
        ("plot_metrics.py", {"JAX_PLATFORMS": '"cuda"'}, "--runs is not given"),  # which computes on CPUs alone
    ],
)
def test_an_environment_in_which_nothing_runs_is_one_line(program, environment, message):
    done = run_program(program, check=False, env=environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.match(f"error: .*{message}", line)


@pytest.fixture(scope="module")
def model():
    return load_model(read_config(CONFIG), make_mesh())


@pytest.fixture(scope="module")
def params(model):
    shapes = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    draw = np.random.default_rng(0).standard_normal
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape), jnp.float32), shapes)


def test_float32_parameters_serve_programs_with_x64(tmp_path, model, params, set_x64):
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save_params(params, CONFIG)
    checkpoints.close()
    set_x64(True)
    generator = load_generator(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, generator.params, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(generator.params)} == {np.dtype(np.float32)}
    assert generator.sample([1], num_steps=1).shape == (1, 8, 8, 3)
    # Fine-tuning starts from parameters of the new run's types.
    shapes = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    source = SourceRun.open(str(tmp_path / "run"))
    start = start_from(source, fresh, CONFIG, replicated(make_mesh()), from_ema=False)
    jax.tree.map(lambda ours, new: np.testing.assert_equal(ours.dtype, new.dtype), start.params, fresh)
    assert np.dtype(np.float64) in {leaf.dtype for leaf in jax.tree.leaves(fresh)}


def test_float64_parameters_are_exported_as_float32(tmp_path, params, set_x64):
    set_x64(True)
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save_params(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params), CONFIG)
    checkpoints.close()
    export_run(str(tmp_path / "run"), tmp_path / "x.safetensors")
    state = read_source(str(tmp_path / "x.safetensors")).state
    assert {value.dtype for value in state.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(state["x_embedder.proj.bias"], params["patch_embed"]["bias"])


@pytest.mark.parametrize(("platform", "is_cached"), [("gpu", True), ("cpu", False)])
def test_programs_cache_what_they_compile_for_accelerators_and_a_mesh_does_not(monkeypatch, platform, is_cached):
    before = jax.config.values["jax_compilation_cache_dir"]
    device = Mock(jax.Device, platform=platform)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        make_mesh()
        assert jax.config.values["jax_compilation_cache_dir"] is None
        devices.start_devices()
        assert (jax.config.values["jax_compilation_cache_dir"] is not None) == is_cached
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
