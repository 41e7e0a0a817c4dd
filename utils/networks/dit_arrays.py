"""Arrays of a DiT made fit for a DiT of other images: another grid of patches, other channels."""

import jax
import jax.numpy as jnp
import numpy as np

POSITIONS = ("pos_embed",)
PATCHES = ("patch_embed", "kernel")
TOKEN_POSITIONS = ("token_embed", "positions")
OUTPUTS = (("final_layer", "dense", "kernel"), ("final_layer", "dense", "bias"))
# Top-level parts that no DiT of classes has, and parts of a block.
CONDITION_PARTS = (
    "vector_embed", "token_embed", "base_vector", "class_positions", "condition_patches", "augment_embed",
)  # fmt: skip
CROSS_PARTS = ("cross_attention", "norm_cross")


def fit_array(
    path: tuple[str, ...], array: np.ndarray, shape: tuple[int, ...], patch_size: int
) -> tuple[np.ndarray, str] | None:
    """Returns (an array of the parameters made fit for `shape`, a remark); None where there is no way.

    - A learned table of positions is resized from one square grid to another.
    - Channels that both have are taken. Further inputs count nothing at first, and further outputs are zero.
    - Positions of a condition's tokens that both have are taken, and further ones are zero.
    """
    if path == POSITIONS and all(round(tokens**0.5) ** 2 == tokens for tokens in (array.shape[1], shape[1])):
        resized = f"position table: resized from {array.shape[1]} to {shape[1]} tokens"
        return _resize_positions(array, shape), resized
    if path[-2:] == TOKEN_POSITIONS:
        fitted = _fit(array, np.zeros(shape, np.float32), axis=0)
        return fitted, f"positions of tokens: {shape[0]}, of which {min(len(array), shape[0])} were there"
    if path == PATCHES and array.shape[:2] == shape[:2]:
        fitted = _fit(array, np.zeros(shape, np.float32), axis=2)
        return fitted, f"input: {shape[2]} channels, of which {min(array.shape[2], shape[2])} were there"
    if path in OUTPUTS and not array.shape[-1] % patch_size**2:
        by_channel = (*array.shape[:-1], patch_size**2, -1)
        blank = np.zeros((*shape[:-1], patch_size**2, shape[-1] // patch_size**2), np.float32)
        return _fit(array.reshape(by_channel), blank, axis=-1).reshape(shape), ""
    return None


def _resize_positions(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resizes a table (1, tokens, width) from one square grid to another, bicubically."""
    old_side, new_side = (round(tokens**0.5) for tokens in (table.shape[1], shape[1]))
    grid = jnp.asarray(table).reshape(old_side, old_side, -1)
    return np.asarray(jax.image.resize(grid, (new_side, new_side, grid.shape[-1]), "bicubic")).reshape(shape)


def _fit(value: np.ndarray, blank: np.ndarray, axis: int) -> np.ndarray:
    """Returns `blank` with what `value` has in common with it along an axis."""
    count = min(value.shape[axis], blank.shape[axis])
    place = [slice(None)] * blank.ndim
    place[axis] = slice(count)
    blank[tuple(place)] = value[tuple(place)]
    return blank
