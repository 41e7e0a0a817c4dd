"""The Diffusion Transformer (DiT, Peebles & Xie, arXiv:2212.09748) as a velocity model v(x_t, t, label), in Flax.

No flags, no configuration, no I/O. Parameters and their gradients, normalisation, softmax, the sums inside products and
the timestep features are float32 whatever the compute type `dtype`. Shape comments use b = batch, n = tokens,
d = hidden size, h/w/c = image axes, p = patch.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from utils.products import affine, attention

TIMESTEP_FEATURES = 256
TIMESTEP_SCALE = 10_000.0  # t in [0, 1] is stretched to the range that the sinusoids were made for

# What of a block is kept for its backward pass; the rest is computed again (rematerialisation, arXiv:1604.06174).
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("affine"),  # products with parameters, not attention's
    "blocks": jax.checkpoint_policies.nothing_saveable,  # its input alone
}

normal_init = nn.initializers.normal(0.02)
xavier_uniform = nn.initializers.xavier_uniform()
zeros_init = nn.initializers.zeros


def position_table(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed 2-D sin-cos position table, float32 (rows * columns, width); a constant of the model, never trained.

    The first half of the channels encodes the column, the second half the row; each half holds sines then cosines
    with frequencies 10000^(-2i / (width / 2)) (Vaswani et al., arXiv:1706.03762, along each axis).
    """
    half = width // 2
    frequencies = 10_000.0 ** (-np.arange(half // 2) / (half // 2))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [np.outer(position, frequencies) for position in (column, row)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def timestep_features(t: Float[Array, " b"]) -> Float[Array, "b 256"]:
    """Cosines then sines of 10000 t at 128 geometric frequencies; float32, because the arguments reach 10,000."""
    half = TIMESTEP_FEATURES // 2
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = TIMESTEP_SCALE * t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def modulate(x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Float[Array, "b n d"]:
    return x * (1 + scale[:, None]) + shift[:, None]


class Dense(nn.Module):
    """`affine` of the last axis, with its parameters; computes in `dtype`."""

    features: int
    dtype: Any
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer = zeros_init

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        return checkpoint_name(affine(x.astype(self.dtype), kernel, bias), "affine")


class PatchEmbed(nn.Module):
    """Images (b, h, w, c) -> tokens (b, n, d): a convolution with kernel = stride = patch, written as one product."""

    patch_size: int
    hidden_size: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        p, d = self.patch_size, self.hidden_size
        kernel = self.param("kernel", xavier_uniform, (p, p, c, d))
        bias = self.param("bias", zeros_init, (d,))
        patches = x.astype(self.dtype).reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)  # (b, h/p, w/p, p, p, c)
        return affine(patches.reshape(b, -1, p * p * c), kernel.reshape(-1, d), bias)


class TimestepEmbed(nn.Module):
    """Times (b,) in [0, 1] -> (b, d)."""

    hidden_size: int
    dtype: Any

    @nn.compact
    def __call__(self, t):
        x = Dense(self.hidden_size, self.dtype, normal_init, name="dense_0")(timestep_features(t))
        return Dense(self.hidden_size, self.dtype, normal_init, name="dense_1")(nn.silu(x))


class LabelEmbed(nn.Module):
    """Labels (b,) in [0, num_classes] -> (b, d); row `num_classes` stands for "no label".

    In training a label is dropped with probability `dropout_prob` (classifier-free guidance, arXiv:2207.12598), by the
    random stream "label_dropout"; `force_drop_ids` (b,), 1 = drop, replaces the draw. With `dropout_prob` 1 labels are
    dropped always, after training too: no row of theirs has been learned.
    """

    num_classes: int
    hidden_size: int
    dropout_prob: float
    dtype: Any

    @nn.compact
    def __call__(self, labels, train, force_drop_ids):
        if self.dropout_prob == 1:
            labels = jnp.full_like(labels, self.num_classes)
        elif force_drop_ids is not None:
            labels = jnp.where(jnp.asarray(force_drop_ids) == 1, self.num_classes, labels)
        elif train and self.dropout_prob > 0:
            drop = jax.random.bernoulli(self.make_rng("label_dropout"), self.dropout_prob, labels.shape)
            labels = jnp.where(drop, self.num_classes, labels)
        table = nn.Embed(self.num_classes + 1, self.hidden_size, embedding_init=normal_init, dtype=self.dtype)
        return table(labels)


class Attention(nn.Module):
    """Multi-head self-attention with biases; query, key and value come from one product."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        (b, n, d), head_dim = x.shape, x.shape[-1] // self.num_heads
        # Three kernels (d, d) side by side, each of which starts as Xavier would have it.
        qkv_init = nn.initializers.variance_scaling(2, "fan_avg", "uniform")
        qkv = Dense(3 * d, self.dtype, qkv_init, name="qkv")(x).reshape(b, n, 3, self.num_heads, head_dim)
        x = attention(*jnp.moveaxis(qkv, 2, 0))
        return Dense(d, self.dtype, xavier_uniform, name="out")(x.reshape(b, n, d))


class Mlp(nn.Module):
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        bias_init = nn.initializers.normal(1e-6)
        hidden = nn.gelu(Dense(self.width, self.dtype, xavier_uniform, bias_init, name="dense_0")(x), approximate=True)
        return Dense(x.shape[-1], self.dtype, xavier_uniform, bias_init, name="dense_1")(hidden)


class AdaLayerNorm(nn.Module):
    """c (b, d) -> `count` modulations of (b, d) each; zero-initialised, so that every block starts as the identity."""

    count: int
    dtype: Any

    @nn.compact
    def __call__(self, c):
        width = self.count * c.shape[-1]
        x = Dense(width, self.dtype, zeros_init, name="dense")(nn.silu(c))
        return jnp.split(x, self.count, axis=-1)


def layer_norm(x: Float[Array, "b n d"], dtype) -> Float[Array, "b n d"]:
    """x normalised over its last axis in float32, without scale or bias (eps 1e-6), in the compute type."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)).astype(dtype)


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated before and gated after by the condition c (adaLN-Zero)."""

    num_heads: int
    mlp_ratio: float
    dtype: Any

    @nn.compact
    def __call__(self, x, c):
        modulations = AdaLayerNorm(6, self.dtype, name="ada_ln")(c)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulations
        y = modulate(layer_norm(x, self.dtype), shift_attention, scale_attention)
        x = x + gate_attention[:, None] * Attention(self.num_heads, self.dtype, name="attention")(y)
        y = modulate(layer_norm(x, self.dtype), shift_mlp, scale_mlp)
        width = int(self.mlp_ratio * x.shape[-1])
        return x + gate_mlp[:, None] * Mlp(width, self.dtype, name="mlp")(y)


class FinalLayer(nn.Module):
    """Tokens (b, n, d) -> patches (b, n, p * p * c), zero-initialised."""

    out_features: int
    dtype: Any

    @nn.compact
    def __call__(self, x, c):
        shift, scale = AdaLayerNorm(2, self.dtype, name="ada_ln")(c)
        x = modulate(layer_norm(x, self.dtype), shift, scale)
        return Dense(self.out_features, self.dtype, zeros_init, name="dense")(x)


class DiT(nn.Module):
    """Velocity model of the same output shape as its input; `init` needs only the "params" random stream.

    Sizes: `patch_size` divides the image sides, `num_heads` divides `hidden_size`, `hidden_size` is a multiple of 4
    (two axes of sines and cosines). Without `t_conditioning` the model sees t = 0 always. `dtype` is the compute type;
    the output is float32. `remat` names what a block recomputes in its backward pass: 'none'; 'dots', all but products
    with parameters; 'blocks', everything.
    """

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float
    class_dropout_prob: float
    num_classes: int
    dtype: Any = jnp.float32
    t_conditioning: bool = True
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        y: Int[Array, " b"],
        train: bool = False,
        force_drop_ids: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Velocity at x_t (noise at t = 0, data at t = 1) for labels y; y = num_classes means "no label"."""
        b, h, w, c = x.shape
        p = self.patch_size
        tokens = PatchEmbed(p, self.hidden_size, self.dtype, name="patch_embed")(x)
        table = position_table(h // p, w // p, self.hidden_size)
        if self.has_variable("params", "pos_embed"):  # a jax-flow checkpoint's, which training has moved
            table = self.get_variable("params", "pos_embed")
        tokens = tokens + table.astype(self.dtype)

        t = t if self.t_conditioning else jnp.zeros_like(t)
        condition = TimestepEmbed(self.hidden_size, self.dtype, name="timestep_embed")(t)
        condition += LabelEmbed(
            self.num_classes, self.hidden_size, self.class_dropout_prob, self.dtype, name="label_embed"
        )(y, train, force_drop_ids)

        tokens = self.apply_blocks(tokens, condition)
        patches = FinalLayer(p * p * c, self.dtype, name="final_layer")(tokens, condition)

        image = patches.reshape(b, h // p, w // p, p, p, c).swapaxes(2, 3)  # (b, h/p, p, w/p, p, c)
        return image.reshape(b, h, w, c).astype(jnp.float32)

    def apply_blocks(self, tokens: Float[Array, "b n d"], condition: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        # Written out rather than scanned over: see benchmarks/train_step.py for what that costs and gains.
        Block = DiTBlock if self.remat == "none" else nn.remat(DiTBlock, policy=REMAT_POLICIES[self.remat])
        for i in range(self.depth):
            tokens = Block(self.num_heads, self.mlp_ratio, self.dtype, name=f"block_{i}")(tokens, condition)
        return tokens

    def count_flops(self, image_shape: tuple[int, int, int]) -> int:
        """Floating-point operations of one forward pass on one (h, w, c) image, matrix products only (2 per MAC).

        A training step costs three times this per image; the usual basis of model FLOPs utilisation (MFU).
        """
        h, w, c = image_shape
        d, p = self.hidden_size, self.patch_size
        n = (h // p) * (w // p)
        block = n * (4 * d * d + 2 * int(self.mlp_ratio * d) * d) + 2 * n * n * d + 6 * d * d
        ends = 2 * n * p * p * c * d + 2 * d * d + TIMESTEP_FEATURES * d + d * d
        return 2 * (self.depth * block + ends)
