"""The Diffusion Transformer (DiT, Peebles & Xie, arXiv:2212.09748) as a velocity model v(x_t, t, condition), in Flax.

No flags, no I/O. Parameters and their gradients, normalisation, softmax, the sums inside matmuls and the timestep
features are float32 whatever the compute dtype. Shape comments use b = batch, n = tokens, m = tokens of the condition,
d = hidden size, h/w/c = image axes, p = patch.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from utils.base.messages import warn_once
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import Condition, Embedded, count_rows, embedded_shapes
from utils.kernels.elementwise import add_gated, gelu, layer_norm, modulate, swiglu
from utils.kernels.layers import Dense, RMSNorm, position_table, rope_angles, rotate, xavier_of_rows
from utils.kernels.ops import (
    AttentionForm,
    attention,
    choose_attention_for,
    dense,
    packed_attention,
    split_heads,
    takes_mask,
)
from utils.networks.dit_config import DiTConfig
from utils.networks.network import NETWORKS, NetworkEntry
from utils.objectives.objective import Heads

# Sinusoids of the time, before the first layer of its embedding.
TIMESTEP_FEATURES = 256

# {--remat: what a block saves for its backward pass}; the rest is recomputed (arXiv:1604.06174).
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("dense"),  # matmuls with parameters, not attention's
    "blocks": jax.checkpoint_policies.nothing_saveable,  # its input alone
}

# As in DiT: normal for embeddings, Xavier for matmuls, zeros for modulations and the output.
normal_init = nn.initializers.normal(0.02)
xavier_uniform = nn.initializers.xavier_uniform()
zeros_init = nn.initializers.zeros


def timestep_features(t: Float[Array, " b"], scale: float = 10_000.0) -> Float[Array, "b 256"]:
    """Returns cosines, then sines, of `scale` t at 128 geometric frequencies 1 .. 1 / 10,000 (exclusive).

    They are float32: near the default scale, bfloat16 has steps of 64.
    """
    half = TIMESTEP_FEATURES // 2
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    # Products of float32 throughout: a rounded time would turn the fastest sinusoid by radians.
    angles = scale * t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class PatchEmbed(nn.Module):
    """Images (b, h, w, c) -> tokens (b, n, d): a convolution with kernel = stride = patch, written as one matmul.

    With `starts_at_zero`, its kernel is zero at first, and it has no bias. With a `bottleneck`, it has that many
    outputs and no bias, and a second matmul leads to d: patches hold less than their numbers (JiT, arXiv:2511.13720).
    """

    patch_size: int
    hidden_size: int
    dtype: Any
    starts_at_zero: bool = False
    bottleneck: int = 0

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        p = self.patch_size
        width = self.bottleneck or self.hidden_size
        # The kernel has the shape of a convolution, for its fans and for checkpoints.
        kernel_init = zeros_init if self.starts_at_zero else xavier_of_rows if self.bottleneck else xavier_uniform
        kernel = self.param("kernel", kernel_init, (p, p, c, width))
        has_bias = not (self.starts_at_zero or self.bottleneck)
        bias = self.param("bias", zeros_init, (width,)) if has_bias else jnp.zeros(width)
        # Each patch becomes a row of p * p * c values.
        patches = x.astype(self.dtype).reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)  # (b, h/p, w/p, p, p, c)
        rows = dense(patches.reshape(b, -1, p * p * c), kernel.reshape(-1, width), bias)
        return Dense(self.hidden_size, self.dtype, xavier_uniform, name="out")(rows) if self.bottleneck else rows


class TimestepEmbed(nn.Module):
    """Times (b,) -> (b, d)."""

    hidden_size: int
    scale: float
    dtype: Any

    @nn.compact
    def __call__(self, t):
        # From sinusoids (b, 256) through two layers.
        features = timestep_features(t, self.scale)
        x = Dense(self.hidden_size, self.dtype, normal_init, name="dense_0")(features)
        return Dense(self.hidden_size, self.dtype, normal_init, name="dense_1")(nn.silu(x))


class Attention(nn.Module):
    """Multi-head self-attention with biases, tokens (b, n, d) -> (b, n, d), which end with those of an image of `grid`
    = (rows, columns) patches. Query, key and value come from one matmul. `mask` (b, n) says which tokens are there."""

    config: DiTConfig
    grid: tuple[int, int]
    dtype: Any
    form: AttentionForm

    @nn.compact
    def __call__(self, x, mask=None):
        config = self.config
        d = x.shape[-1]
        # Three kernels (d, d) side by side; variance 1 / d is what Xavier gives each of them.
        qkv_init = nn.initializers.variance_scaling(2, "fan_avg", "uniform")
        qkv = Dense(3 * d, self.dtype, qkv_init, name="qkv")(x)
        # Queries and keys that nothing changes stay packed, as a TPU's kernels read them.
        if config.qk_norm or config.rope:
            x = self._attend(*split_heads(qkv, config.num_heads), mask).reshape(x.shape)
        else:
            x = packed_attention(qkv, config.num_heads, self.form, mask)
        return Dense(d, self.dtype, xavier_uniform, name="out")(x)

    def _attend(self, query, key, value, mask):
        """Returns attention (b, n, heads, h), query and key normalised and rotated first as the configuration says."""
        if self.config.qk_norm:
            query = RMSNorm(self.dtype, name="q_norm")(query)
            key = RMSNorm(self.dtype, name="k_norm")(key)
        if self.config.rope:
            angles = rope_angles(*self.grid, query.shape[-1])
            # Tokens before the image's have no place in it: they are not turned.
            angles = np.pad(angles, ((query.shape[1] - len(angles), 0), (0, 0)))
            query = rotate(query, angles)
            key = rotate(key, angles)
        return attention(query, key, value, self.form, mask)


class CrossAttention(nn.Module):
    """Tokens (b, n, d) attend to those of a condition (b, m, d), of which the `mask` (b, m) says which are there.

    Zero-initialised: a network that gets it starts as it was.
    """

    config: DiTConfig
    dtype: Any
    form: AttentionForm

    @nn.compact
    def __call__(self, x, context, mask):
        config = self.config
        d = x.shape[-1]

        def split(y, parts):
            return jnp.split(y.reshape(*y.shape[:2], parts * config.num_heads, -1), parts, axis=2)

        # Queries of the image, keys and values of the condition.
        (query,) = split(Dense(d, self.dtype, xavier_uniform, name="query")(x), 1)
        key_init = nn.initializers.variance_scaling(4 / 3, "fan_avg", "uniform")  # Xavier for each of the two
        key, value = split(Dense(2 * d, self.dtype, key_init, name="key_value")(context), 2)
        if config.qk_norm:
            query = RMSNorm(self.dtype, name="q_norm")(query)
            key = RMSNorm(self.dtype, name="k_norm")(key)
        attended = attention(query, key, value, self.form, mask).reshape(x.shape)
        return Dense(d, self.dtype, zeros_init, name="out")(attended)


class Mlp(nn.Module):
    """Two layers around GELU, or SwiGLU (arXiv:2002.05202), whose first matmul gives gate and values side by side."""

    width: int
    kind: str
    dtype: Any

    @nn.compact
    def __call__(self, x):
        # As in ViT's MLP.
        bias_init = nn.initializers.normal(1e-6)
        if self.kind == "swiglu":
            hidden = Dense(2 * self.width, self.dtype, xavier_uniform, bias_init, name="dense_0")(x)
            gate, values = jnp.split(hidden, 2, axis=-1)
            hidden = swiglu(gate, values)
        else:
            hidden = Dense(self.width, self.dtype, xavier_uniform, bias_init, name="dense_0")(x)
            hidden = gelu(hidden)
        return Dense(x.shape[-1], self.dtype, xavier_uniform, bias_init, name="dense_1")(hidden)


class AdaLayerNorm(nn.Module):
    """Condition c (b, d) -> `count` modulations (b, d); zero-initialised, so that each block starts as the identity."""

    count: int
    dtype: Any

    @nn.compact
    def __call__(self, c):
        width = self.count * c.shape[-1]
        x = Dense(width, self.dtype, zeros_init, name="dense")(nn.silu(c))
        # Float32, so that their gradients are sums over tokens as they are.
        return jnp.split(x.astype(jnp.float32), self.count, axis=-1)


def make_norm(kind: str, dtype: Any, name: str) -> Callable:
    """Returns the normalisation of tokens: layer_norm, without parameters, or RMSNorm as a submodule `name`."""
    return RMSNorm(dtype, name=name) if kind == "rms" else partial(layer_norm, dtype=dtype)


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated before and gated after by the condition c (adaLN-Zero).

    Maps tokens (b, n, d) and conditions (b, d) to tokens (b, n, d). Masks say which of the tokens, and of those of
    `context` (b, m, d), if there is any, are there.
    """

    config: DiTConfig
    grid: tuple[int, int]
    dtype: Any
    attention_form: AttentionForm

    @nn.compact
    def __call__(self, x, c, mask=None, context=None, context_mask=None):
        config = self.config
        dtype = self.dtype
        modulations = AdaLayerNorm(6, dtype, name="ada_ln")(c)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulations

        # Tokens attend to each other.
        y = modulate(make_norm(config.norm, dtype, "norm1")(x), shift_attention, scale_attention)
        attended = Attention(config, self.grid, dtype, self.attention_form, name="attention")(y, mask)
        x = add_gated(x, gate_attention, attended)

        # Then to the condition, neither modulated nor gated, as in PixArt (arXiv:2310.00426).
        if context is not None:
            y = make_norm(config.norm, dtype, "norm_cross")(x)
            x = x + CrossAttention(config, dtype, self.attention_form, name="cross_attention")(y, context, context_mask)

        # Each token by itself.
        y = modulate(make_norm(config.norm, dtype, "norm2")(x), shift_mlp, scale_mlp)
        return add_gated(x, gate_mlp, Mlp(config.mlp_width, config.mlp, dtype, name="mlp")(y))


class FinalLayer(nn.Module):
    """Tokens (b, n, d) -> patches (b, n, p * p * c), zero-initialised."""

    out_features: int
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x, c):
        # No gate: the last matmul starts at zero itself.
        shift, scale = AdaLayerNorm(2, self.dtype, name="ada_ln")(c)
        x = modulate(make_norm(self.norm, self.dtype, "norm")(x), shift, scale)
        return Dense(self.out_features, self.dtype, zeros_init, name="dense")(x)


class DiT(nn.Module):
    """Velocity model of the same output shape as its input; `init` needs only the "params" random stream.

    The output is float32; with `learn_sigma` it has twice the channels of its input, predictions first. `remat` names
    what a block recomputes in its backward pass: 'none'; 'dots', all but matmuls with parameters; 'blocks', everything.
    `attention_form` is a form of `ops.attention`. `condition` is the kind of condition that it takes; default: a label
    below `config.num_classes`.
    """

    # Hashable, all of them: a module is a static argument of compiled functions.
    config: DiTConfig
    remat: str = "none"
    attention_form: AttentionForm = "by_head"
    condition: Condition = ClassCondition()

    def __post_init__(self):
        self.condition = self.condition.fit(self.config.num_classes)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        condition: PyTree,
        step: Float[Array, " b"] | None = None,
        with_inner: bool = False,
    ) -> Float[Array, "b h w c_out"] | Heads:
        """Velocity at x_t (noise at t = 0, data at t = 1), given `condition`, arrays (b, ...) of `self.condition`.

        With `step_conditioning`, it is the average velocity over a step of length `step`, in the objective's own units.
        With `with_inner`, returns `Heads`: the output of the inner head as well (internal guidance, arXiv:2512.24176).
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        b, h, w, c = x.shape
        p = config.patch_size
        tokens = self.embed_patches(x)

        # What every block is conditioned on. Without t_conditioning, the time is zero: the parameters are the same.
        t = t if config.t_conditioning else jnp.zeros_like(t)
        conditioning = TimestepEmbed(config.hidden_size, config.timestep_scale, dtype, name="timestep_embed")(t)
        vector, embedded = self.embed_condition(condition)
        conditioning += vector
        if config.step_conditioning:
            # It may be left out where only shapes matter.
            step = jnp.zeros_like(t) if step is None else step
            conditioning += TimestepEmbed(config.hidden_size, config.timestep_scale, dtype, name="step_embed")(step)
        if embedded.augmentation is not None:
            conditioning += embedded.augmentation

        # Channels beside those of x: further rows of the patches' kernel, in a matmul of their own, so that the sums
        # over the others stay the same bit for bit.
        if embedded.channels is not None:
            patches = PatchEmbed(p, config.hidden_size, dtype, starts_at_zero=True, name="condition_patches")
            tokens += patches(embedded.channels)

        before, *context = self.place_tokens(vector, embedded, tokens.shape[1])
        if before:
            tokens = jnp.concatenate([*before, tokens], axis=1)
        tokens, inner_tokens = self.apply_blocks(tokens, conditioning, (h // p, w // p), *context)

        # Back to an image: from the last block and, with `with_inner`, from an earlier one.
        c_out = 2 * c if config.learn_sigma else c

        def to_image(tokens, name):
            tokens = tokens[:, -(h // p) * (w // p) :] if before else tokens
            patches = FinalLayer(p * p * c_out, config.norm, dtype, name=name)(tokens, conditioning)
            image = patches.reshape(b, h // p, w // p, p, p, c_out).swapaxes(2, 3)  # (b, h/p, p, w/p, p, c_out)
            return image.reshape(b, h, w, c_out).astype(jnp.float32)

        final = to_image(tokens, "final_layer")
        if config.inner_head and (with_inner or self.is_initializing()):
            inner = to_image(inner_tokens, "inner_layer")
            return Heads(final, inner) if with_inner else final
        return final

    def embed_patches(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        """Returns the tokens of the patches of x, with their positions."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        p = config.patch_size
        tokens = PatchEmbed(p, config.hidden_size, dtype, bottleneck=config.bottleneck, name="patch_embed")(x)
        table = jnp.asarray(position_table(x.shape[1] // p, x.shape[2] // p, config.hidden_size))[None]
        # A checkpoint's own table, which training has moved, is used whatever the configuration says.
        if config.learned_positions or self.has_variable("params", "pos_embed"):
            table = self.param("pos_embed", lambda key: table)
        return tokens + table.astype(dtype)

    def embed_condition(self, condition: PyTree) -> tuple[Float[Array, "b d"], Embedded]:
        """Returns (the vector that is added to the embedding of time, all that the condition brings)."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        if config.class_dropout_prob == 1:
            # Always dropped in training: no other embedding has been learned.
            condition = self.condition.without(condition)
        embedded = self.condition.embedder(config.hidden_size, dtype)(condition)
        if embedded.vector is not None:
            return embedded.vector, embedded
        # The same for all, where there is none: a run that goes on from one with classes keeps its "no label" there.
        vector = self.param("base_vector", zeros_init, (config.hidden_size,)).astype(dtype)
        return jnp.broadcast_to(vector, (count_rows(condition), config.hidden_size)), embedded

    def place_tokens(
        self, vector: Float[Array, "b d"], embedded: Embedded, num_patches: int
    ) -> tuple[list[Array], Array | None, Array | None, Array | None]:
        """Returns (tokens that stand before the image's, which tokens of the whole sequence are there, the tokens that
        blocks attend to across, which of those are there); None stands for all, or for no tokens."""
        config = self.config
        before = []
        if config.class_tokens:
            # The vector once more, as tokens (JiT, arXiv:2511.13720).
            positions = self.param("class_positions", normal_init, (config.class_tokens, config.hidden_size))
            before.append(vector[:, None] + positions.astype(vector.dtype))
        if embedded.tokens is None:
            return before, None, None, None
        if config.token_mode == "cross":
            mask = jnp.ones(embedded.tokens.shape[:2], bool) if embedded.mask is None else embedded.mask
            return before, None, embedded.tokens, mask
        # Of a sequence, only the condition's tokens may be missing.
        mask = embedded.mask
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (config.class_tokens, num_patches)), constant_values=True)
        return [*before, embedded.tokens], mask, None, None

    def apply_blocks(
        self, tokens: Float[Array, "b n d"], conditioning: Float[Array, "b d"], grid: tuple[int, int], *context: Any
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
        """Returns the tokens after all blocks, and those after the first `inner_head` of them."""
        # Unrolled rather than scanned over: benchmarks/train_step.py measures what that costs and gains.
        # Blocks have the names of checkpoints, whether they are rematerialised or not.
        config = self.config
        dtype = jnp.dtype(config.dtype)
        Block = DiTBlock if self.remat == "none" else nn.remat(DiTBlock, policy=REMAT_POLICIES[self.remat])
        inner_tokens = tokens
        for i in range(config.depth):
            block = Block(config, grid, dtype, self.attention_form, name=f"block_{i}")
            tokens = block(tokens, conditioning, *context)
            inner_tokens = tokens if i + 1 == config.inner_head else inner_tokens
        return tokens, inner_tokens

    @nn.nowrap  # it makes modules to look at, which are no part of this one
    def count_flops(self, image_shape: tuple[int, int, int]) -> int:
        """Returns the floating-point operations of a forward pass on one (h, w, c) image, matmuls only (2 per MAC),
        without the module that embeds the condition.

        A training step costs three times this per image; the usual basis of model FLOPs utilisation (MFU).
        """
        config = self.config
        h, w, c = image_shape
        d = config.hidden_size
        p = config.patch_size
        num_patches = (h // p) * (w // p)
        brought = embedded_shapes(self.condition, d)
        num_brought = 0 if brought.tokens is None else brought.tokens.shape[1]
        is_cross = config.token_mode == "cross"
        n = num_patches + config.class_tokens + (0 if is_cross else num_brought)

        # A block: projections and MLP by token, scores and weighted sums by pair of tokens, the modulation by image.
        mlp = (3 if config.mlp == "swiglu" else 2) * config.mlp_width * d
        block = n * (4 * d * d + mlp) + 2 * n * n * d + 6 * d * d
        if is_cross:
            block += 2 * (n + num_brought) * d * d + 2 * n * num_brought * d

        # Patches in and out, the final modulation, and the two layers of the time embedding.
        c_out = 2 * c if config.learn_sigma else c
        c_beside = 0 if brought.channels is None else brought.channels.shape[-1]
        patches = p * p * (c_beside + c_out) * d + config.count_embedding(c)
        ends = num_patches * patches + 2 * d * d + TIMESTEP_FEATURES * d + d * d
        # The inner head: its modulation, and patches out.
        inner = num_patches * p * p * c_out * d + 2 * d * d if config.inner_head else 0
        return 2 * (config.depth * block + ends + inner)


def build_dit(config: DiTConfig, remat: str, mesh: Mesh, condition: Condition) -> DiT:
    """Returns the network, with the form of attention that suits the devices of the mesh. Raises UserError where the
    condition does not bring what the configuration is about."""
    form = choose_attention_for(mesh, config.head_dim, config.dtype)
    brought = embedded_shapes(condition, config.hidden_size)
    config.check_condition(brought)
    if (brought.mask is not None or config.token_mode == "cross") and not takes_mask(form):
        warn_once("note: attention to a condition's tokens takes XLA's form: the faster one of this device has no mask")
    return DiT(config, remat, form, condition)


NETWORKS["dit"] = NetworkEntry(DiTConfig, build_dit)
