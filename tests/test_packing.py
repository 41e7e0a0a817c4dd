"""Small arrays packed for the optimizer: the same trees, the same updates, fewer kernels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.hlo import count_kernels
from utils.networks.optimizers import make_optimizer
from utils.networks.packing import SMALL, Packed, Packing
from utils.training import build_run, make_config
from utils.training.build import compile_train_step


def make_tree(seed):
    shapes = {"kernel": (3, 5), "bias": (5,), "large": (SMALL + 1,), "block": {"kernel": (2, 2, 2), "scale": ()}}
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=is_shape)


def test_trees_are_packed_and_unpacked_bit_for_bit():
    tree = make_tree(0)
    packing = Packing.of(tree)
    packed = packing.pack(tree)
    assert [array.shape for array in packed.small] == [(1, 3 * 5 + 2 * 2 * 2), (5 + 1,)]
    assert [array.shape for array in packed.large] == [(SMALL + 1,)]
    jax.tree.map(np.testing.assert_array_equal, packing.unpack(packed), tree)

    # An optimizer's state: what has the structure of the parameters, and what has not.
    state = optax.adam(0.1).init(tree)
    both = packing.pack_all(state)
    assert isinstance(both[0].mu, Packed)
    assert both[0].count.shape == ()
    jax.tree.map(np.testing.assert_array_equal, packing.unpack_all(both), state)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.3}, {"grad_clip": 0.5}], ids=str)
def test_a_packed_update_is_that_of_each_array(settings):
    optimizer = make_optimizer(0.1, 0.9, 0.99, **settings)
    params, grads = make_tree(0), make_tree(1)
    packing = Packing.of(params)
    expected, state = optimizer.update(grads, optimizer.init(params), params)
    packed_state = packing.pack_all(optimizer.init(params))
    found, found_state = optimizer.update(packing.pack(grads), packed_state, packing.pack(params))
    compare = partial(np.testing.assert_allclose, rtol=1e-6)  # clipping sums in another order
    jax.tree.map(compare, packing.unpack(found), expected)
    jax.tree.map(compare, packing.unpack_all(found_state), state)


def test_the_demos_step_has_few_kernels(tmp_path):
    network = {"hidden_size": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 4, "patch_size": 2, "num_classes": 10}
    settings = {"dataset_name": "digits", "codec": "pixels", "save_dir": str(tmp_path / "run"), "batch_size": 128}
    run = build_run(make_config(settings | {f"model.{name}": value for name, value in network.items()}))
    text = compile_train_step(run, run.state_structs, run.validation_batch).as_text()
    # The state's 51 arrays alone are written by some 200 of them, one for each of four.
    assert 300 < count_kernels(text) < 800
