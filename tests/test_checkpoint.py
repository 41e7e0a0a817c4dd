"""Checkpoints: complete, atomic, readable under other shardings; the import of jax-flow's parameters."""

import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_transformer import DiT, DiTConfig, position_table
from utils.base.mesh import make_mesh, replicated, shape_structs, state_sharding
from utils.base.messages import UserError
from utils.convert.jax_flow import import_jax_flow_params
from utils.networks.optimizers import make_optimizer
from utils.networks.state import apply_gradients, create_train_state
from utils.runs import checkpoint, checksums
from utils.runs.opening import open_checkpoint
from utils.training import saving

# Orbax reports a damaged checkpoint from several threads, beside the error that is tested.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]

METADATA = {"image_shape": [8, 8, 1], "class_names": ["a"]}
SETTINGS = DiTConfig(network="another").__dict__ | {"use_stable_vae": 0, "t_sampler": "uniform"}
OLD_CONFIG = {"model": SETTINGS, "dataset_name": "digits", "dataset": METADATA}
# With what runs were trained with before there was a setting for it.
CONFIG = {
    **OLD_CONFIG,
    "objective": {
        "name": "flow_matching",
        "distill": 0,
        "prediction": "velocity",
        "t_mean": 0.0,
        "t_std": 1.0,
        "noise_scale": 1.0,
    },
    "freeze": [],
    "lora_rank": 0,
    "warmup_steps": 0,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "grad_clip": None,
    "lr_schedule": "constant",
    "ema_profiles": [],
    "augment": [],
    "augment_prob": 0.12,
    "coupling": "none",
    "coupling_rows": None,
    "coupling_weight": None,
    "coupling_draws": 100,
    "codec": "pixels",
    "check_images": 1,
    "dataset_weights": None,
    "dataset": {
        **METADATA,
        "name": "digits",
        "vae": None,
        "vae_sha256": None,
        "latent_shape": None,
        "condition": {"kind": "class"},
        "codec": {"name": "pixels", "source": None, "sha256": None},
    },
}
OPTIMIZER = make_optimizer(1e-3, 0.9, 0.99)


@pytest.fixture
def state():
    params = {"a": {"kernel": jax.random.normal(jax.random.key(1), (64, 32))}, "b": jnp.arange(8.0)}
    state = create_train_state(params, OPTIMIZER, jax.random.key(7))
    sharding = state_sharding(state, make_mesh(), "dp")
    return jax.device_put(apply_gradients(state, params, OPTIMIZER, 0.9)[0], sharding)


def assert_equal(a, b):
    key_data = [jax.random.key_data(x.key) for x in (a, b)]
    np.testing.assert_array_equal(*key_data)
    jax.tree.map(np.testing.assert_array_equal, a.replace(key=0), b.replace(key=0))


def test_everything_comes_back(tmp_path, state):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(state, CONFIG, {"next_index": 12})
    checkpoints.close()
    checkpoints, (step,) = open_checkpoint(tmp_path)
    restored, position = checkpoints.restore(step, shape_structs(state, replicated(make_mesh())))
    assert step == 1
    assert position == {"next_index": 12}
    assert_equal(restored, state)
    assert checkpoints.restore_config(1) == CONFIG
    (ema_params,) = checkpoints.restore_params(1, shape_structs(state.params, replicated(make_mesh())), ("ema_params",))
    jax.tree.map(np.testing.assert_array_equal, ema_params, state.ema_params)


def test_runs_of_before_the_vae_are_read(tmp_path, state):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(state, OLD_CONFIG, None)
    checkpoints.wait()
    assert checkpoints.restore_config(1) == CONFIG


def test_a_state_donated_right_after_the_save_is_saved_as_it_was(tmp_path, state):
    expected = jax.tree.map(np.array, state.params)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    checkpoints.save(state, CONFIG, None)
    like = shape_structs(state, replicated(make_mesh()))
    overwritten = state.params
    for _ in range(5):
        overwritten = jax.block_until_ready(overwrite(overwritten))
    checkpoints.wait()
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, like)[0].params, expected)


def test_newest_and_every_nth_are_kept(tmp_path, state):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep_last=2, keep_every=3)
    for step in range(1, 9):
        checkpoints.save(state.replace(step=jnp.int32(step)), CONFIG, None)
    checkpoints.close()
    assert sorted(checkpoint.Checkpoints(tmp_path).manager.all_steps()) == [3, 6, 7, 8]


def test_missing_and_unfinished_checkpoints(tmp_path):
    with pytest.raises(UserError, match=r"--load_dir=.*holds no checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp-1").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint was finished"):
        open_checkpoint(tmp_path)


def test_one_checkpoint_of_several_can_be_named(tmp_path, state):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state.replace(step=jnp.int32(step)), CONFIG, None)
    checkpoints.close()
    assert open_checkpoint(tmp_path)[1] == [2, 1]
    assert open_checkpoint(tmp_path / "checkpoints" / "1")[1] == [1]
    assert open_checkpoint(tmp_path / "checkpoints")[1] == [2, 1]
    run = shutil.copytree(tmp_path / "checkpoints", tmp_path / "new" / "checkpoints" / "checkpoints").parent
    assert open_checkpoint(run)[1] == [2, 1]  # a run of that name
    assert open_checkpoint(run / "checkpoints")[1] == [2, 1]
    with pytest.raises(UserError, match="found steps 1, 2"):
        open_checkpoint(tmp_path / "checkpoints" / "5")


def test_truncated_checkpoint_is_one_line(tmp_path, state):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(state, CONFIG, None)
    checkpoints.close()
    for path in (tmp_path / "checkpoints" / "1").rglob("*"):
        if path.is_file() and "/d/" in str(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    checkpoints, (step,) = open_checkpoint(tmp_path)
    with pytest.raises(UserError) as error:
        checkpoints.restore(step, shape_structs(state, replicated(make_mesh())))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "checkpoints" / "1") in str(error.value)


def files_of(checkpoint_dir):
    return sorted(path for path in checkpoint_dir.rglob("*") if path.is_file() and path.stat().st_size)


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(tmp_path, state):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(state, CONFIG, {"next_index": 1200})
    checkpoints.close()
    like = shape_structs(state, replicated(make_mesh()))
    rng = np.random.default_rng(0)
    noticed = 0
    files = files_of(tmp_path / "checkpoints" / "1")
    for file in [*files, *rng.choice(files, 20)]:
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(flipped)
        try:
            restored, position = checkpoint.Checkpoints(tmp_path).restore(1, like)
            assert_equal(restored, state)
            assert position == {"next_index": 1200}
            assert checkpoint.Checkpoints(tmp_path).restore_config(1) == CONFIG
        except checkpoint.DamagedCheckpointError:
            noticed += 1
        file.write_bytes(content)
    assert noticed > 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksums_tell_any_change_of_one_element_apart(dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (5, 7, 3)), dtype)
    ((name, (sum_, *shape)),) = checksums.checksums({"x": x}).items()
    assert (name, tuple(shape)) == ("['x']", x.shape)
    sums = {sum_}
    for place in range(x.size):
        changed = np.array(x)
        changed.view(np.uint8).reshape(x.size, -1)[place, 0] ^= 1
        sums.add(checksums.checksums({"x": jnp.asarray(changed)})["['x']"][0])
    assert len(sums) == 1 + x.size
    swapped = np.array(x)[:, ::-1]
    assert checksums.checksums({"x": jnp.asarray(swapped)})["['x']"][0] != sum_


@pytest.mark.parametrize("shape", [(), (0,), (5, 7, 3), (checksums.CHUNK // 8, 3, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int32", "uint8", "bool"])
def test_host_and_devices_find_the_same_checksum(dtype, shape):
    values = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 200, shape)
    with jax.enable_x64(True):
        x = jnp.asarray(values, dtype)
        (expected,) = checksums._checksums([x])
    assert checksums.checksums({"x": x})["['x']"] == [int(expected), *shape]


def test_the_one_before_a_damaged_checkpoint_is_used_and_nothing_is_removed(tmp_path, state, capfd):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(state.replace(step=jnp.int32(step)), CONFIG, step)
    checkpoints.close()
    like = shape_structs(state, replicated(make_mesh()))
    damaged = files_of(tmp_path / "checkpoints" / "3" / "config")[-1]
    damaged.write_bytes(b"")
    checkpoints, steps = open_checkpoint(tmp_path)

    def read(step):
        checkpoints.restore_config(step)
        return checkpoints.restore(step, like)

    step, (restored, position) = checkpoints.restore_newest(read, steps)
    assert (step, position, int(restored.step)) == (2, 2, 2)
    assert "checkpoints/3 is damaged" in capfd.readouterr().out
    checkpoints.set_aside(3)
    assert checkpoints.steps() == [2, 1]
    assert (
        tmp_path / "damaged_checkpoints" / "3.damaged1" / damaged.relative_to(tmp_path / "checkpoints" / "3")
    ).exists()
    checkpoints.save(restored.replace(step=jnp.int32(3)), CONFIG, 3)
    checkpoints.close()
    assert open_checkpoint(tmp_path)[1] == [3, 2, 1]
    for step in (1, 2, 3):
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "optimizer")
    checkpoints, steps = open_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"checkpoints/1 is damaged: .* \(as are those of steps 3, 2\)"):
        checkpoints.restore_newest(read, steps)


def test_a_checkpoint_of_another_model_is_not_called_damaged(tmp_path, state):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(state, CONFIG, None)
    checkpoints.close()
    other = jax.tree.map(lambda x: jax.ShapeDtypeStruct((9, *x.shape), x.dtype), state.params)
    for _ in range(2):
        checkpoints = checkpoint.Checkpoints(tmp_path)
        with pytest.raises(UserError, match=r"is of another model: .* here; give the --model flags") as error:
            checkpoints.restore_params(1, shape_structs(other, replicated(make_mesh())), ("params",))
        assert not isinstance(error.value, checkpoint.DamagedCheckpointError)
        assert "delet" not in str(error.value)
        shutil.rmtree(
            tmp_path / "checkpoints" / "1" / "checksums", ignore_errors=True
        )  # then once more as one of before


def test_a_configuration_that_lacks_a_setting_is_damaged(tmp_path, state):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    model = {name: value for name, value in SETTINGS.items() if name != "num_heads"} | {"network": "dit"}
    checkpoints.save(state, {**CONFIG, "model": model}, None)
    checkpoints.wait()
    with pytest.raises(checkpoint.DamagedCheckpointError, match="its configuration has no num_heads"):
        checkpoints.restore_config(1)


def make_state():
    """As a model's: with JAX_ENABLE_X64=1, of float64."""
    params = {"kernel": jnp.arange(64.0).reshape(8, 8), "table": jnp.ones(8, jnp.float32)}
    state = create_train_state(params, OPTIMIZER, jax.random.key(7))
    return jax.device_put(state, state_sharding(state, make_mesh(), "dp"))


@pytest.fixture
def set_jax():
    defaults = dict(jax.config.values)
    changed = set()

    def update(name, value):
        changed.add(name)
        jax.config.update(name, value)

    yield update
    for name in changed:
        jax.config.update(name, defaults[name])


@pytest.mark.parametrize("was_x64", [False, True])
def test_another_x64_is_no_damage_and_is_named(tmp_path, set_jax, was_x64):
    set_jax("jax_enable_x64", was_x64)
    saved = make_state()
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(saved, CONFIG, None)
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(tmp_path)
    sharding = replicated(make_mesh())
    assert_equal(checkpoints.restore(0, shape_structs(saved, sharding))[0], saved)
    set_jax("jax_enable_x64", not was_x64)
    target = shape_structs(jax.eval_shape(lambda: make_state()), sharding)  # not from the cache
    refusal = f"was saved {'with' if was_x64 else 'without'} JAX_ENABLE_X64=1: {'' if was_x64 else 'un'}set it"
    reads = [lambda: checkpoints.restore(0, target)]
    others = [
        lambda: checkpoints.restore_params(0, target.params, ("ema_params",))[0],
        lambda: checkpoints.restore_stored(0, "ema_params"),
    ]
    for read in reads + others * was_x64:
        with pytest.raises(UserError, match=refusal) as error:
            read()
        assert not isinstance(error.value, checkpoint.DamagedCheckpointError)
    for read in [] if was_x64 else others:  # parameters alone may have other types than new ones
        jax.tree.map(np.testing.assert_array_equal, read(), saved.ema_params)
    assert checkpoints.restore_config(0) == CONFIG


def test_another_kind_of_random_key_is_no_damage_and_is_named(tmp_path, set_jax):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(make_state(), CONFIG, None)
    checkpoints.wait()
    set_jax("jax_default_prng_impl", "rbg")
    shapes = jax.eval_shape(lambda: make_state())  # not from the cache, which has the other key
    target = shape_structs(shapes, replicated(make_mesh()))
    with pytest.raises(UserError, match="another kind than JAX_DEFAULT_PRNG_IMPL=rbg makes; set that variable as"):
        checkpoints.restore(0, target)


@pytest.mark.parametrize("error", [MemoryError(), ValueError("x [OS error 5: Input/output error]"), OSError(24, "x")])
def test_what_the_system_refuses_is_no_damage(tmp_path, error):
    def read():
        with checkpoint._readable(tmp_path):
            raise error

    with pytest.raises(UserError, match=r"cannot be read .*it may be whole") as raised:
        read()
    assert not isinstance(raised.value, checkpoint.DamagedCheckpointError)


def test_checkpoints_without_checksums_load(tmp_path, state):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(state, CONFIG, None)
    checkpoints.close()
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "checksums")
    like = shape_structs(state, replicated(make_mesh()))
    assert_equal(checkpoint.Checkpoints(tmp_path).restore(1, like)[0], state)


def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path, state, full_disk, silent_orbax, capfd):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep_last=2)
    saver = saving.Saver(checkpoints, CONFIG, interval=10, minutes=0, step=0)
    saver.save(state.replace(step=jnp.int32(10)), 10)
    checkpoints.wait()
    full_disk(2048)
    saver.save(state.replace(step=jnp.int32(20)), 20)
    deadline = time.monotonic() + 20
    while not (said := capfd.readouterr()).out:
        assert not saver.is_due(21)
        assert time.monotonic() < deadline
    assert said.out == (
        f"checkpoint of step 20 could not be written to {tmp_path}/checkpoints (File too large); step 10 is safe; "
        "training goes on and saves again in a minute\n"
    )
    assert said.err == ""
    saver.RETRY_SECONDS = 0
    saver._note(checkpoint.SaveError("again"), 22)
    assert saver.is_due(23)
    with pytest.raises(checkpoint.SaveError, match=r"step 24 could not be written .*; step 10 is safe"):
        saver.save_last(state.replace(step=jnp.int32(24)), 24)
    full_disk(None)
    saver.save_last(state.replace(step=jnp.int32(25)), 25)
    checkpoints.close()
    # What the full disk cut short is removed when the run starts again.
    assert sorted(name for name in os.listdir(tmp_path / "checkpoints") if name.isdigit()) == ["10", "25"]


def test_saves_are_due_by_step_and_by_time(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    saver = saving.Saver(checkpoint.Checkpoints(tmp_path), CONFIG, interval=100, minutes=15, step=0)
    assert [step for step in range(1, 301) if saver.is_due(step)] == [100, 200, 300]
    now += 899
    assert not saver.is_due(301)
    now += 1
    assert saver.is_due(302)
    never = saving.Saver(checkpoint.Checkpoints(tmp_path), CONFIG, interval=100, minutes=0, step=0)
    now += 1e9
    assert not never.is_due(303)


def test_processes_of_one_run_save_at_the_step_that_the_first_ones_clock_says(tmp_path, monkeypatch):
    """Steps of a second on the first process; the second's clock runs at another pace."""
    checkpoints = checkpoint.Checkpoints(tmp_path)
    told = []
    now = 0.0
    monkeypatch.setattr(checkpoint.Checkpoints, "poll", lambda self: None)
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def due_steps(seconds, broadcast):
        nonlocal now
        now = 0.0
        monkeypatch.setattr(saving.multihost_utils, "broadcast_one_to_all", broadcast)
        saver = saving.Saver(checkpoints, CONFIG, interval=10**6, minutes=15, step=0)
        due = []
        for step in range(1, 2001):
            now += seconds
            if saver.is_due(step):
                due.append(step)
                saver._wait(step, saver.seconds)
        return due

    def tell(elapsed):
        told.append(elapsed)
        return elapsed

    first = due_steps(1.0, tell)
    answers = iter(told)
    second = due_steps(5.0, lambda elapsed: next(answers))
    assert first == second
    assert [step - before for before, step in zip([0, *first], first, strict=False)] == pytest.approx([900, 900], abs=2)
    assert not list(answers)  # both have told each other at the same steps
    assert len(told) < 50  # and not at every one


def jax_flow_params(golden):
    return {name.removeprefix("params/"): value for name, value in golden.items() if name.startswith("params/")}


def test_import_has_the_shapes_of_the_model(golden):
    meta = {name.removeprefix("meta/"): int(value) for name, value in golden.items() if name.startswith("meta/")}
    image = jnp.zeros((1, meta.pop("image_size"), meta["patch_size"] * 4, meta.pop("channels")))
    model = DiT(DiTConfig(class_dropout_prob=0.1, dtype="float32", **meta))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]
    imported = import_jax_flow_params(jax_flow_params(golden))
    assert jax.tree.map(jnp.shape, imported) == jax.tree.map(lambda x: x.shape, shapes)


def test_import_refuses_other_trees(golden):
    flat = jax_flow_params(golden)
    with pytest.raises(ValueError, match="DiTBlock_0/Dense_0/bias is missing"):
        import_jax_flow_params({k: v for k, v in flat.items() if k != "DiTBlock_0/Dense_0/bias"})
    with pytest.raises(ValueError, match="Extra/kernel has no counterpart"):
        import_jax_flow_params({**flat, "Extra/kernel": np.zeros(1)})


def test_import_keeps_a_position_table_that_training_moved(golden, monkeypatch):
    flat = jax_flow_params(golden)
    flat["pos_embed"] = flat["pos_embed"] * 2
    meta = {name.removeprefix("meta/"): int(value) for name, value in golden.items() if name.startswith("meta/")}
    del meta["image_size"], meta["channels"]
    model = DiT(DiTConfig(class_dropout_prob=0.1, dtype="float32", **meta))
    inputs = (golden["x_1"], golden["t"], golden["labels"])
    moved = jax.jit(model.apply)({"params": import_jax_flow_params(flat)}, *inputs)
    # The same model with its constant moved instead.
    flat["pos_embed"] = flat["pos_embed"] / 2
    params = import_jax_flow_params(flat)
    assert "pos_embed" not in params
    monkeypatch.setattr("diffusion_transformer.position_table", lambda *size: 2 * position_table(*size))
    np.testing.assert_allclose(moved, jax.jit(model.apply)({"params": params}, *inputs), atol=1e-5)
    assert np.abs(moved - golden["v_of_x1"]).max() > 1e-3
