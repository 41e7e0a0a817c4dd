"""Checksums of trees of arrays, which checkpoints record: where the arrays are, on devices or in memory."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

# The factors of neighbouring elements are multiples of Knuth's constant, which spreads them apart.
KNUTH = 2654435761
CHUNK = 2**16  # elements that NumPy takes at a time, so that they stay in the processor's cache


def _checksum(x: Array) -> UInt32[Array, ""]:
    """Returns the sum over all elements' bits, each multiplied by an odd number of its place, modulo 2^32.

    A change of one element always changes it, a change of several with a probability of 1 - 2^-32. Sums of integers do
    not depend on how x is split over devices.
    """
    # The bits as unsigned integers; a type of eight bytes becomes two words.
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, _word(x))

    # The place of each element, row by row.
    place = jnp.uint32(0)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]

    # Odd factors can be inverted modulo 2^32, so no change is lost.
    return jnp.sum(bits.astype(jnp.uint32) * (place * jnp.uint32(KNUTH) | 1), dtype=jnp.uint32)


def _word(x: Array | np.ndarray) -> np.dtype:
    """Returns the type of the unsigned integers as which the bits of an array are summed."""
    return np.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")


def _checksum_on_host(x: np.ndarray) -> int:
    """Returns `_checksum` of an array in this process's memory."""
    bits = x.reshape(-1).view(_word(x))
    total = 0
    # Unsigned integers of NumPy wrap around, as those of a device do.
    for start in range(0, bits.size, CHUNK):
        chunk = bits[start:][:CHUNK].astype(np.uint32)
        place = np.arange(chunk.size, dtype=np.uint32) + np.uint32(start % 2**32)
        total += int(np.sum(chunk * (place * np.uint32(KNUTH) | np.uint32(1)), dtype=np.uint32))
    return total % 2**32


@jax.jit  # one compiled function: several that communicate at once can get stuck on virtual CPU devices
def _checksums(leaves: list[Array]) -> list[UInt32[Array, ""]]:
    return [_checksum(leaf) for leaf in leaves]


def checksums(tree: PyTree) -> dict[str, list[int]]:
    """Returns {path of a leaf: [checksum, *shape]}, computed where the arrays are, within milliseconds."""
    shapes = leaf_shapes(tree)
    leaves = jax.block_until_ready(jax.tree.leaves(tree))
    # CPUs take longer to compile a sum of each array than to compute them all.
    if jax.default_backend() == "cpu" and all(leaf.is_fully_addressable for leaf in leaves):
        values = [_checksum_on_host(np.asarray(leaf)) for leaf in leaves]
    else:
        values = jax.device_get(_checksums(leaves))
    return {path: [int(value), *shape] for (path, shape), value in zip(shapes.items(), values, strict=True)}


def leaf_shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Returns {path of a leaf: shape}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}
