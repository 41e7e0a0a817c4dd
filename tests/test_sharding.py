"""The positions of prefetched batches, and where the state lives; eight virtual devices in a subprocess."""

import itertools

import jax
import numpy as np
import pytest

from tests.conftest import run_program
from utils import sharding
from utils.errors import UserError


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
    for batch, position in itertools.islice(sharding.prefetch(batches, sharding.make_mesh(), buffer_size=2), 5):
        assert position == {"next_index": int(batch["image"][0, 0])}
    assert batches.taken == 7  # the others are on their way


def test_gather_and_shard_are_inverse():
    rows = np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(sharding.gather(sharding.shard_replicated(rows, sharding.make_mesh())), rows)


def test_incomplete_process_flags_are_refused():
    with pytest.raises(UserError, match="--coordinator_address"):
        sharding.initialize_processes(None, 2, 0)
    with pytest.raises(UserError, match="--num_processes and --process_id"):
        sharding.initialize_processes("localhost:1234", None, 0)
    sharding.initialize_processes(None, None, None)


LAYOUT = """
import jax, jax.numpy as jnp
from utils.sharding import make_mesh, shard_replicated, state_sharding
mesh = make_mesh()
tree = {"kernel": jnp.zeros((16, 64)), "odd": jnp.zeros((3, 5)), "scalar": jnp.zeros(())}
for mode in ("dp", "fsdp"):
    placed = jax.device_put(tree, state_sharding(tree, mesh, mode))
    print(mode, {name: leaf.addressable_shards[0].data.shape for name, leaf in placed.items()})
print(shard_replicated(jnp.arange(16), mesh).addressable_shards[3].data)
"""


def test_layouts_on_eight_devices():
    lines = run_program("-c", LAYOUT, devices=8).stdout.splitlines()
    assert lines == [
        "dp {'kernel': (16, 64), 'odd': (3, 5), 'scalar': ()}",
        "fsdp {'kernel': (16, 8), 'odd': (3, 5), 'scalar': ()}",
        "[6 7]",
    ]


def test_one_device_is_the_default_here():
    assert len(jax.devices()) == 1
