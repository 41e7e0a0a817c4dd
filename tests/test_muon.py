"""Muon: golden updates, optax's own on separate matrices, which kernels it takes, and trainings with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_transformer import DiT
from tests.conftest import run_program
from tests.runs import assert_close, kill_and_continue, losses
from utils.base.messages import UserError
from utils.conditions.tokens import TokensCondition
from utils.networks.dit_config import DiTConfig
from utils.networks.lora import add_lora
from utils.networks.muon import MuonState, orthogonalize
from utils.networks.network import NetworkConfig
from utils.networks.optimizers import freeze_parts, make_optimizer
from utils.networks.state import apply_gradients, create_train_state
from utils.runs.checkpoint import Checkpoints
from utils.training.advice import bytes_on_device
from utils.training.build import build_run

# {path: its matrices}: of each kind and of each shape, and of what is Adam's.
KERNELS = {
    "block_0/attention/qkv/kernel": (3, (12, 36)),
    "block_0/attention/out/kernel": (1, (12, 12)),
    "block_0/cross_attention/key_value/kernel": (2, (12, 24)),
    "block_0/mlp/dense_0/kernel": (2, (12, 64)),  # SwiGLU
    "block_0/mlp/dense_1/kernel": (1, (32, 12)),  # tall
    "block_0/ada_ln/dense/kernel": (6, (12, 72)),
    "final_layer/ada_ln/dense/kernel": (2, (12, 24)),
    "timestep_embed/dense_0/kernel": (1, (20, 12)),
    "block_0/attention/qkv/bias": (0, (36,)),
    "final_layer/dense/kernel": (0, (12, 4)),
    "label_embed/Embed_0/embedding": (0, (8, 12)),
}
FLOAT32 = DiTConfig(dtype="float32", mlp="swiglu")


def nested(flat):
    return unflatten_dict({tuple(path.split("/")): jnp.asarray(value) for path, value in flat.items()})


def flattened(tree):
    return {"/".join(path): np.asarray(value) for path, value in flatten_dict(tree).items()}


def make_tree(seed, paths=KERNELS):
    rng = np.random.default_rng(seed)
    return nested({path: rng.standard_normal(KERNELS[path][1], np.float32) for path in paths})


def relative(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def muon_state(opt_state) -> MuonState:
    is_state = lambda node: isinstance(node, MuonState)  # noqa: E731
    (state,) = filter(is_state, jax.tree.leaves(opt_state, is_leaf=is_state))
    return state


def momenta(opt_state) -> dict[str, np.ndarray]:
    flat = flatten_dict(muon_state(opt_state).mu)
    return {"/".join(path): value for path, value in flat.items() if not isinstance(value, optax.MaskedNode)}


# --- The update ---


@pytest.fixture(scope="module")
def muon_small(shared):
    """tree(name): the arrays of muon_small.npz below that name, {path: value}."""
    arrays = np.load(shared / "golden" / "more" / "muon_small.npz")
    return lambda name: {key.removeprefix(f"{name}/"): arrays[key] for key in arrays if key.startswith(f"{name}/")}


def test_three_updates_are_the_golden_ones(muon_small):
    network = DiTConfig(dtype="float32")
    for path, count in muon_small("chunks").items():
        assert network.count_matrices(tuple(path.split("/")), muon_small("params_0")[path].shape) == count, path

    optimizer = make_optimizer(0.02, 0.9, 0.999, weight_decay=0.1, muon_of=network)
    update = jax.jit(optimizer.update)
    params = nested(muon_small("params_0"))
    state = optimizer.init(params)
    for step in (1, 2, 3):
        updates, state = update(nested(muon_small(f"grads_{step}")), state, params)
        params = optax.apply_updates(params, updates)
        for path, expected in muon_small(f"rms/params_{step}").items():
            start = muon_small("params_0")[path]
            assert relative(flattened(params)[path] - start, expected - start) < 2e-5, path
        assert momenta(state).keys() == muon_small("rms/mu_1").keys()
        for path, expected in muon_small(f"rms/mu_{step}").items():
            assert relative(momenta(state)[path], expected) < 1e-6, path


def test_updates_are_those_of_optax_for_each_matrix_by_itself():
    """At a rate that changes, with clipping before and decay of the kernels alone."""
    paths = [path for path in KERNELS if "ada_ln" not in path and "cross" not in path]
    settings = {"warmup_steps": 2, "weight_decay": 0.3, "grad_clip": 1.0}
    ours = make_optimizer(0.1, 0.9, 0.99, **settings, muon_of=FLOAT32)

    def split(tree):
        flat = flattened(tree)
        return {path: jnp.split(flat[path], max(KERNELS[path][0], 1), axis=-1) for path in paths}

    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {
                True: optax.contrib.muon(optax.linear_schedule(0, 0.1, 2), weight_decay=0.3, consistent_rms=0.2),
                False: optax.adam(optax.linear_schedule(0, 0.1, 2), b1=0.9, b2=0.99),
            },
            {path: KERNELS[path][0] > 0 for path in paths},
        ),
    )
    params, states = make_tree(0, paths), [ours.init(make_tree(0, paths)), theirs.init(split(make_tree(0, paths)))]
    steps = [jax.jit(ours.update), jax.jit(theirs.update)]
    for seed in (1, 2, 3):
        found, states[0] = steps[0](make_tree(seed, paths), states[0], params)
        expected, states[1] = steps[1](split(make_tree(seed, paths)), states[1], split(params))
    for path, parts in expected.items():
        assert relative(flattened(found)[path], np.concatenate(parts, axis=-1)) < 2e-5, path


def test_singular_values_come_near_one_and_bfloat16_is_near():
    rng = np.random.default_rng(0)
    matrices = jnp.asarray(rng.standard_normal((5, 32, 64), np.float32))
    expected = jax.jit(orthogonalize, static_argnums=1)(matrices, "float32")
    found = jax.jit(orthogonalize, static_argnums=1)(matrices, "bfloat16")
    assert found.dtype == jnp.bfloat16
    assert 1e-3 < relative(found.astype(jnp.float32), expected) < 0.02
    sizes = np.linalg.svd(np.asarray(expected), compute_uv=False)
    assert 0.65 < sizes.min() < sizes.max() < 1.25
    assert not orthogonalize(jnp.zeros((1, 2, 3)), "float32").any()


# --- Which parameters it takes ---


def test_kernels_inside_the_network_are_split_by_what_they_are_of():
    config = DiTConfig(
        patch_size=2, hidden_size=8, depth=1, token_mode="cross", step_conditioning=1, qk_norm=1, mlp_ratio=3
    )
    network = DiT(config, condition=TokensCondition(4, 5))
    arguments = (jnp.zeros((1, 4, 4, 1)), jnp.zeros(1), network.condition.null(1), jnp.zeros(1))
    shapes = jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"]
    lora = jax.eval_shape(lambda tree: add_lora(tree, 2, jax.random.key(0)), shapes)
    counts = {
        path[:-1]: count
        for path, leaf in flatten_dict(lora).items()
        if (count := config.count_matrices(path, leaf.shape))
    }
    block = {"attention/qkv": 3, "attention/out": 1, "cross_attention/query": 1, "cross_attention/key_value": 2}
    block |= {"cross_attention/out": 1, "mlp/dense_0": 1, "mlp/dense_1": 1, "ada_ln/dense": 6}
    expected = {f"block_0/{layer}": count for layer, count in block.items()} | {"final_layer/ada_ln/dense": 2}
    expected |= {f"{part}/dense_{i}": 1 for part in ("timestep_embed", "step_embed") for i in (0, 1)}
    assert {"/".join(path): count for path, count in counts.items()} == expected
    for path, (count, shape) in KERNELS.items():
        assert FLOAT32.count_matrices(tuple(path.split("/")), shape) == count

    # Of another network every kernel that is a matrix is one.
    known = {("Dense_0", "kernel"): (3, 5), ("Conv_0", "kernel"): (3, 3, 1, 2), ("Embed_0", "embedding"): (3, 5)}
    assert [NetworkConfig().count_matrices(path, shape) for path, shape in known.items()] == [1, 0, 0]


def test_without_a_kernel_to_train_it_is_refused():
    params = {**make_tree(0), "lora": {"block_0": {"kernel": {"a": jnp.ones((3, 2)), "b": jnp.zeros((2, 3))}}}}
    optimizer = freeze_parts(make_optimizer(0.1, 0.9, 0.99, muon_of=FLOAT32), tuple(make_tree(0)))
    with pytest.raises(UserError, match="--optimizer=muon is for kernels inside the network, none of which is trained"):
        optimizer.init(params)


def test_frozen_parts_stay_bit_for_bit_and_have_no_state():
    params, frozen = make_tree(0), ("block_0", "label_embed")
    optimizer = freeze_parts(make_optimizer(0.1, 0.9, 0.99, weight_decay=0.1, muon_of=FLOAT32), frozen)
    state = create_train_state(params, optimizer, jax.random.key(0))
    assert momenta(state.opt_state).keys() == {
        path for path in KERNELS if path.endswith(("ada_ln/dense/kernel", "dense_0/kernel")) and "block" not in path
    }
    state, _ = jax.jit(apply_gradients, static_argnums=(2, 3, 4))(state, make_tree(1), optimizer, 0.9, frozen)
    before, after = flattened(params), flattened(state.params)
    assert {path for path in KERNELS if not np.array_equal(after[path], before[path])} == {
        path for path in KERNELS if not path.startswith(frozen)
    }


# --- Trainings ---

WORDS = """
    --dataset_name digits --codec pixels --model.hidden_size 32 --model.depth 1 --model.num_heads 2 --model.mlp swiglu
    --model.patch_size 2 --model.num_classes 10 --batch_size 16 --model.lr 1e-2 --log_interval 1 --eval_interval 0
    --wandb.mode disabled --optimizer muon
""".split()  # noqa: SIM905 (a command line, as one types it)
NUM_STEPS = 12
RUN = [*WORDS, "--save_interval", "4", "--max_steps", NUM_STEPS, "--weight_decay", "0.1", "--warmup_steps", "2"]
RUN += ["--lr_schedule", "cosine", "--grad_clip", "1", "--skip_nonfinite", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_program("train_flow.py", *RUN, "--model.dtype", "float32", "--save_dir", folder)
    return folder


@pytest.mark.xdist_group("muon")
def test_eight_devices_with_shards_and_microbatches_are_one(whole, tmp_path):
    words = ["--model.dtype", "float32", "--save_dir", tmp_path, "--sharding", "fsdp", "--grad_accum", "2"]
    run_program("train_flow.py", *RUN, *words, devices=8)
    assert_close(losses(tmp_path), losses(whole), NUM_STEPS)
    assert losses(whole)[NUM_STEPS][0] < 0.9 * losses(whole)[1][0]


@pytest.mark.xdist_group("muon")
def test_a_run_starts_from_parameters_alone(whole, configure, tmp_path):
    run = build_run(configure([*WORDS, "--load_dir", whole, "--save_dir", tmp_path]))
    jax.tree.map(np.testing.assert_array_equal, run.start[0], Checkpoints(whole).restore_stored(NUM_STEPS, "params"))
    assert run.static["is_elementwise"] is False
    # One moment of the kernels, two of all else; and the numbers of updates.
    kernels = sum(value.size for value in momenta(run.state_structs.opt_state).values())
    params = sum(value.size for value in jax.tree.leaves(run.state_structs.params))
    assert bytes_on_device(run.state_structs.opt_state) == pytest.approx(4 * (2 * params - kernels), abs=8)


@pytest.mark.slow
def test_killed_and_started_again_in_bfloat16_equals_uninterrupted(tmp_path):
    run_program("train_flow.py", *RUN, "--save_dir", tmp_path / "whole")
    kill_and_continue(tmp_path / "killed", 4, *RUN)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
