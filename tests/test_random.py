"""The unrolled form of JAX's random numbers: the same numbers, and no loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from utils.kernels.random import threefry, unroll


def test_vectors_of_the_paper():
    """Random123's known answers for threefry2x32 of 20 rounds (its file kat_vectors), and JAX's own function."""
    for key, count, expected in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ):
        words, counts = (jnp.array(pair, jnp.uint32) for pair in (key, count))
        assert tuple(map(int, threefry(tuple(words), *counts))) == expected
        assert tuple(map(int, threefry_2x32(tuple(words), counts))) == expected


DRAWS = {
    "normal": lambda key: jax.random.normal(key, (3, 5)),
    "uniform": lambda key: jax.random.uniform(key, (7,)),
    "low precision": lambda key: jax.random.normal(key, (4,), jnp.bfloat16),
    "bits": lambda key: jax.random.bits(key, (4,), jnp.uint8),
    "integers": lambda key: jax.random.randint(key, (9,), 0, 1000),
    "permutation": lambda key: jax.random.permutation(key, 11),
    "fold_in": lambda key: jax.random.uniform(jax.random.fold_in(key, 2**31 - 1)),
    "split": lambda key: jax.vmap(jax.random.normal)(jax.random.split(key, (2, 3)).reshape(6)),
    "nothing": lambda key: jax.random.normal(key, (0, 2)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_numbers_are_those_of_jax(name):
    draw = jax.jit(DRAWS[name])
    for seed in (0, 2**32 - 1):
        key = jax.random.fold_in(jax.random.key(seed), 3)
        np.testing.assert_array_equal(draw(unroll(key)), draw(key))


def test_there_is_no_loop_and_other_keys_stay():
    key = jax.random.key(0)

    def loops(key):
        return jax.jit(lambda key: jax.random.normal(key, (3,))).lower(key).as_text().count("while")

    assert (loops(key), loops(unroll(key))) == (1, 0)
    other = jax.random.key(0, impl="rbg")
    assert unroll(other) is other
    assert jax.random.key_impl(unroll(unroll(key))) == jax.random.key_impl(unroll(key))
