"""The positions of prefetched batches, and where the state lives; eight virtual devices in a subprocess."""

import itertools

import jax
import numpy as np
import pytest

from tests.conftest import run_program
from utils.base.mesh import choose_num_shards, gather, make_mesh, shard_replicated
from utils.base.messages import UserError
from utils.data.batches import to_devices


class Counting:
    """An iterator like Grain's: its position is the number of batches taken from it."""

    def __init__(self):
        self.taken = 0

    def __next__(self):
        self.taken += 1
        return {"image": np.full((2, 1), self.taken)}

    def get_state(self):
        return {"next_index": self.taken}

    def set_state(self, state):
        self.taken = state["next_index"]


def test_each_batch_comes_with_the_position_just_after_it():
    batches = Counting()
    for batch, position in itertools.islice(to_devices(batches, make_mesh(), buffer_size=2), 5):
        assert position == {"next_index": int(batch["image"][0, 0])}
    assert batches.taken == 7  # the others are on their way


def test_gather_and_shard_are_inverse():
    rows = np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(gather(shard_replicated(rows, make_mesh())), rows)


LAYOUT = """
import jax, jax.numpy as jnp
from utils.base.mesh import choose_num_shards, make_mesh, shard_replicated, state_sharding, unsplit_fraction
from utils.networks.state import TrainState
tree = {"kernel": jnp.zeros((16, 64)), "odd": jnp.zeros((3, 12)), "none": jnp.zeros((3, 5)), "scalar": jnp.zeros(())}
state = TrainState(jnp.zeros(()), tree, tree, (), jax.random.key(0), {"0.1": tree})
for mode, requested in (("dp", None), ("zero", None), ("fsdp", None), ("hybrid", 4), ("hybrid", None)):
    mesh = make_mesh(choose_num_shards(mode, requested, jax.devices()))
    shardings = state_sharding(state, mesh, mode)
    placed = jax.device_put(state, shardings)
    print(mode, dict(mesh.shape), f"{unsplit_fraction(state, shardings):.2f}")
    for part in (placed.params, placed.ema_params, placed.ema_profiles["0.1"]):
        print({name: leaf.addressable_shards[0].data.shape for name, leaf in part.items()})
    print(shard_replicated(jnp.arange(16), mesh).addressable_shards[3].data)
"""


def test_layouts_on_eight_devices():
    lines = run_program("-c", LAYOUT, devices=8).stdout.splitlines()
    whole = "{'kernel': (16, 64), 'none': (3, 5), 'odd': (3, 12), 'scalar': ()}"
    of_8 = "{'kernel': (16, 8), 'none': (3, 5), 'odd': (3, 12), 'scalar': ()}"
    of_4 = "{'kernel': (16, 16), 'none': (3, 5), 'odd': (3, 3), 'scalar': ()}"
    expected = [
        ("dp {'replica': 8, 'shard': 1} 1.00", whole, whole, whole),
        ("zero {'replica': 8, 'shard': 1} 0.37", whole, of_8, of_8),
        ("fsdp {'replica': 1, 'shard': 8} 0.05", of_8, of_8, of_8),
        ("hybrid {'replica': 2, 'shard': 4} 0.02", of_4, of_4, of_4),
        ("hybrid {'replica': 1, 'shard': 8} 0.05", of_8, of_8, of_8),
    ]
    assert lines == [line for mode in expected for line in (*mode, "[6 7]")]


class Device:
    def __init__(self, process_index, slice_index=None, platform="tpu"):
        self.process_index, self.platform = process_index, platform
        if slice_index is not None:
            self.slice_index = slice_index


@pytest.mark.parametrize(
    ("slices", "size", "expected"), [(1, 8, 8), (1, 64, 16), (2, 16, 16), (4, 4, 4), (1, 12, 12), (1, 24, 12)]
)
def test_a_replica_is_a_slice_or_a_part_of_one(slices, size, expected):
    devices = [Device(number // 4, number // size) for number in range(slices * size)]
    assert choose_num_shards("hybrid", None, devices) == expected
    with pytest.raises(UserError, match="--num_shards=5 does not divide the"):
        choose_num_shards("hybrid", 5, devices)


@pytest.mark.parametrize(("platform", "expected"), [("tpu", 16), ("gpu", 4)])
def test_without_a_slice_number_tpus_are_one_slice_and_gpus_of_hosts(platform, expected):
    devices = [Device(number // 4, platform=platform) for number in range(64)]
    assert choose_num_shards("hybrid", None, devices) == expected


def test_one_device_is_the_default_here():
    assert len(jax.devices()) == 1
