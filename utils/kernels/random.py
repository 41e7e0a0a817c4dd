"""JAX's random numbers, in a form that CPUs compile in less time. The numbers are the same, bit for bit."""

import math
from collections.abc import Hashable
from functools import cache

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl, threefry_prng_impl
from jaxtyping import Array, Key, UInt32

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def threefry(key: tuple[Array, Array], high: UInt32[Array, "*n"], low: UInt32[Array, "*n"]) -> tuple[Array, Array]:
    """Returns Threefry-2x32 of the counts (high, low), in 20 rounds (Salmon et al., doi:10.1145/2063384.2063405)."""
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(PARITY))
    x, y = high + keys[0], low + keys[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << rotation) | (y >> (32 - rotation)))
        # Each group of four rounds ends with the next two words of the key, and its number.
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def _of_positions(key: UInt32[Array, "2"], shape: tuple[int, ...]) -> tuple[Array, Array]:
    if math.prod(shape) >= 2**32:
        raise NotImplementedError(f"random numbers of the shape {shape}: 2^32 at most")
    positions = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return threefry((key[0], key[1]), jnp.zeros_like(positions), positions)


def _random_bits(key: UInt32[Array, "2"], bit_width: int, shape: tuple[int, ...]) -> Array:
    high, low = _of_positions(key, shape)
    if bit_width == 64:
        return (high.astype(jnp.uint64) << 32) | low.astype(jnp.uint64)
    return (high ^ low).astype(f"uint{bit_width}")


def _fold_in(key: UInt32[Array, "2"], data: int | Array) -> UInt32[Array, "2"]:
    return jnp.stack(threefry((key[0], key[1]), jnp.uint32(0), jnp.asarray(data, jnp.uint32)))


@cache
def _unrolled() -> Hashable:
    """Returns the implementation, as JAX knows it."""
    return define_prng_impl(
        key_shape=(2,),
        seed=threefry_prng_impl.seed,
        split=lambda key, shape: jnp.stack(_of_positions(key, shape), axis=-1),
        random_bits=_random_bits,
        fold_in=_fold_in,
        name="unrolled_threefry2x32",
    )


def unroll(key: Key[Array, ""]) -> Key[Array, ""]:
    """Returns a key with the same random numbers, which CPUs compile sooner; other kinds of keys stay as they are.

    JAX's own are a loop on CPUs: of a hundred small draws, as a network is initialised, it makes four hundred kernels.
    Large draws keep the loop, see `roll`: it computes a little faster.
    """
    is_default = jax.random.key_impl(key) == "threefry2x32" and jax.config.values["jax_threefry_partitionable"]
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_unrolled()) if is_default else key


def roll(key: Key[Array, "*n"]) -> Key[Array, "*n"]:
    """Returns the keys that `unroll` would turn into these."""
    is_unrolled = jax.random.key_impl(key) == _unrolled()
    return jax.random.wrap_key_data(jax.random.key_data(key), impl="threefry2x32") if is_unrolled else key
