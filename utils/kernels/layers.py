"""Layers and positions that a transformer is made of, for networks and for the modules that embed conditions.

Parameters are float32, and so are their gradients; a layer computes in the `dtype` that it is given.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from utils.kernels.ops import dense


class Dense(nn.Module):
    """`ops.dense` with its parameters: rows (..., k) -> (..., features), computed in `dtype`."""

    features: int
    dtype: Any
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        # The name is what the policy 'dots' saves.
        return checkpoint_name(dense(x.astype(self.dtype), kernel, bias), "dense")


def xavier_of_rows(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns a kernel (..., c, n), drawn by Xavier's rule for the matrix (... * c, n) that it is used as."""
    return nn.initializers.xavier_uniform()(key, (math.prod(shape[:-1]), shape[-1])).reshape(shape)


class RMSNorm(nn.Module):
    """Divides x by the root mean square of its last axis, in float32 (eps 1e-6), times a scale (arXiv:1910.07467)."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6) * scale).astype(self.dtype)


# --- Positions ---


def position_table(rows: int, columns: int, width: int) -> np.ndarray:
    """Returns the 2-D sin-cos position table, float32 (rows * columns, width).

    The first half of the channels encodes the column, the second half the row; each half holds sines then cosines
    with frequencies 10000^(-2i / (width / 2)) (Vaswani et al., arXiv:1706.03762, along each axis).
    """
    half = width // 2
    frequencies = 10_000.0 ** (-np.arange(half // 2) / (half // 2))
    # (rows * columns, width / 4) angles along each axis.
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [np.outer(position, frequencies) for position in (column, row)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def rope_angles(rows: int, columns: int, head_dim: int) -> np.ndarray:
    """Returns angles of rotary positions (arXiv:2104.09864) on a grid, float32 (rows * columns, head_dim).

    As in LightningDiT, the first half of a head's channels turns by row, the second by column, with frequencies
    10000^(-2j / (head_dim / 2)); neighbours 2i and 2i + 1 are one pair, and have the same angle.
    """
    half = head_dim // 2
    frequencies = 10_000.0 ** (-np.arange(0, half, 2) / half)
    angles = [
        np.repeat(np.outer(position, frequencies), 2, axis=1) for position in np.divmod(range(rows * columns), columns)
    ]
    return np.concatenate(angles, axis=1).astype(np.float32)


def rotate(x: Float[Array, "b n heads h"], angles: np.ndarray) -> Float[Array, "b n heads h"]:
    """Turns each pair (a, b) of neighbouring channels in float32: (a cos - b sin, b cos + a sin)."""
    cos, sin = (jnp.asarray(f(angles))[:, None] for f in (np.cos, np.sin))
    y = x.astype(jnp.float32)
    # (-b, a) for each pair (a, b).
    turned = jnp.stack([-y[..., 1::2], y[..., ::2]], axis=-1).reshape(y.shape)
    return (y * cos + turned * sin).astype(x.dtype)
