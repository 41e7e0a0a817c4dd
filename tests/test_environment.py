"""JAX under other environment variables: what of it enters a run, and programs that cannot run so."""

import platform
import re
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from tests.conftest import run_program
from tests.test_saved_config import CONFIG
from utils.base import devices
from utils.base.devices import RECORDED, compare_jax_settings, jax_settings
from utils.base.mesh import make_mesh, replicated
from utils.convert.sources import read_source
from utils.flags import program
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


@pytest.fixture
def cache_settings():
    """JAX's settings of its cache are afterwards as they were; until then, no folder is set."""
    names = ("compilation_cache_dir", "compilation_cache_max_size", "persistent_cache_min_compile_time_secs")
    names = [f"jax_{name}" for name in (*names, "enable_compilation_cache")]
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
@pytest.mark.usefixtures("cache_settings")
def test_programs_cache_what_they_compile_and_a_mesh_does_not(monkeypatch, kind):
    device = Mock(jax.Device, platform=kind)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    make_mesh()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    devices.start_devices()
    name = Path(jax.config.values["jax_compilation_cache_dir"]).name
    assert re.fullmatch("compiled-[0-9a-f]{16}" if kind == "cpu" else "compiled", name)
    devices.start_devices()  # as a folder of the environment's, it is kept
    assert Path(jax.config.values["jax_compilation_cache_dir"]).name == name


def test_another_kind_of_cpu_or_compiler_has_another_cache(monkeypatch):
    here = devices.describe_cpu()
    assert platform.machine() in here
    if Path("/proc/cpuinfo").exists():
        assert re.search(r"^(flags|Features)\s*: \w+", here, re.MULTILINE)
    keys = {devices.machine_key(cpu) for cpu in (here, f"{here} avx1024", "")}
    monkeypatch.setattr(jax, "__version__", "99.0")
    keys.add(devices.machine_key(here))
    assert len(keys) == 4


@pytest.mark.usefixtures("cache_settings")
def test_what_is_cached_is_not_compiled_again_unless_it_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "cache_folder", lambda: tmp_path)
    devices.start_devices()
    hits = []

    def note(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    monitoring.register_event_listener(note)

    def affine(x):
        return x * 14 + 0.5

    def compute():
        """The number of functions that are found in the cache."""
        jax.clear_caches()
        x = np.float32(3)
        hits.clear()
        assert np.asarray(jax.jit(affine)(x)) == 42.5
        return len(hits)

    try:
        assert (compute(), compute()) == (0, 1)
        (entry,) = (path for path in tmp_path.glob("compiled-*/*-cache") if "affine" in path.name)
        content = entry.read_bytes()
        for damaged in (b"", content[:-9], content[:200] + bytes([content[200] ^ 1]) + content[201:]):
            entry.write_bytes(damaged)
            with warnings.catch_warnings(record=True) as said:
                assert compute() == 0
            assert said == []
        # Nothing is lost where nothing can be written.
        shutil.rmtree(entry.parent)
        entry.parent.write_text("no folder")
        compilation_cache.reset_cache()
        compute()
    finally:
        monitoring.unregister_event_listener(note)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.usefixtures("cache_settings", "signal_handlers")
def test_the_cache_is_turned_off_by_a_flag(monkeypatch, value):
    seen = []
    main = lambda config: seen.append((config.to_dict(), jax.config.values["jax_enable_compilation_cache"]))  # noqa: E731
    monkeypatch.setattr(sys, "argv", ["program.py", "--compilation_cache", str(value)])
    with pytest.raises(SystemExit):
        program.run_program(lambda: None, main)
    assert seen == [({}, bool(value))]
    delattr(flags.FLAGS, "compilation_cache")
