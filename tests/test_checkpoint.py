"""Checkpoints: complete, atomic, readable under other shardings; the import of jax-flow's parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_transformer import DiT, position_table
from utils import checkpoint
from utils.errors import UserError
from utils.sharding import abstract, make_mesh, replicated, state_sharding
from utils.train_state import apply_gradients, create_train_state, make_optimizer

FACTS = {"image_shape": [8, 8, 1], "class_names": ["a"]}
OLD_CONFIG = {"model": {"depth": 2}, "dataset_name": "digits", "dataset": FACTS}
CONFIG = {**OLD_CONFIG, "dataset": {**FACTS, "name": "digits", "vae": None, "vae_sha256": None}}
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
    checkpoints, (step,) = checkpoint.open_checkpoint(tmp_path)
    restored, position = checkpoints.restore(step, abstract(state, replicated(make_mesh())))
    assert step == 1
    assert position == {"next_index": 12}
    assert_equal(restored, state)
    assert checkpoints.restore_config(1) == CONFIG
    (ema_params,) = checkpoints.restore_params(1, abstract(state.params, replicated(make_mesh())), ("ema_params",))
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
    like = abstract(state, replicated(make_mesh()))
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
        checkpoint.open_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp-1").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint was finished"):
        checkpoint.open_checkpoint(tmp_path)


def test_one_checkpoint_of_several_can_be_named(tmp_path, state):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state.replace(step=jnp.int32(step)), CONFIG, None)
    checkpoints.close()
    assert checkpoint.open_checkpoint(tmp_path)[1] == [2, 1]
    assert checkpoint.open_checkpoint(tmp_path / "checkpoints" / "1")[1] == [1]
    with pytest.raises(UserError, match="found steps 1, 2"):
        checkpoint.open_checkpoint(tmp_path / "checkpoints" / "5")


def test_truncated_checkpoint_is_one_line(tmp_path, state):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(state, CONFIG, None)
    checkpoints.close()
    for path in (tmp_path / "checkpoints" / "1").rglob("*"):
        if path.is_file() and "/d/" in str(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    checkpoints, (step,) = checkpoint.open_checkpoint(tmp_path)
    with pytest.raises(UserError) as error:
        checkpoints.restore(step, abstract(state, replicated(make_mesh())))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "checkpoints" / "1") in str(error.value)


def jax_flow_params(golden):
    return {name.removeprefix("params/"): value for name, value in golden.items() if name.startswith("params/")}


def test_import_has_the_shapes_of_the_model(golden):
    meta = {name.removeprefix("meta/"): int(value) for name, value in golden.items() if name.startswith("meta/")}
    image = jnp.zeros((1, meta.pop("image_size"), meta["patch_size"] * 4, meta.pop("channels")))
    model = DiT(class_dropout_prob=0.1, **meta)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]
    imported = checkpoint.import_jax_flow_params(jax_flow_params(golden))
    assert jax.tree.map(jnp.shape, imported) == jax.tree.map(lambda x: x.shape, shapes)


def test_import_refuses_other_trees(golden):
    flat = jax_flow_params(golden)
    with pytest.raises(ValueError, match="DiTBlock_0/Dense_0/bias is missing"):
        checkpoint.import_jax_flow_params({k: v for k, v in flat.items() if k != "DiTBlock_0/Dense_0/bias"})
    with pytest.raises(ValueError, match="Extra/kernel has no counterpart"):
        checkpoint.import_jax_flow_params({**flat, "Extra/kernel": np.zeros(1)})


def test_import_keeps_a_position_table_that_training_moved(golden, monkeypatch):
    flat = jax_flow_params(golden)
    flat["pos_embed"] = flat["pos_embed"] * 2
    meta = {name.removeprefix("meta/"): int(value) for name, value in golden.items() if name.startswith("meta/")}
    del meta["image_size"], meta["channels"]
    model, inputs = DiT(class_dropout_prob=0.1, **meta), (golden["x_1"], golden["t"], golden["labels"])
    moved = model.apply({"params": checkpoint.import_jax_flow_params(flat)}, *inputs)
    # The same model with its constant moved instead.
    flat["pos_embed"] = flat["pos_embed"] / 2
    params = checkpoint.import_jax_flow_params(flat)
    assert "pos_embed" not in params
    monkeypatch.setattr("diffusion_transformer.position_table", lambda *size: 2 * position_table(*size))
    np.testing.assert_allclose(moved, model.apply({"params": params}, *inputs), atol=1e-5)
    assert np.abs(moved - golden["v_of_x1"]).max() > 1e-3
