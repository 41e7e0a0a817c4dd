"""`dense` and `attention`, where a transformer spends its time, each in the form that is fast on a platform.

Both take any compute dtype and sum in float32; the gradients of dense's parameters are left in float32. XLA's CPU
kernels for bfloat16 are twice as fast as those for float32 where they write float32 and find their operands as rows of
a matrix; NVIDIA devices have cuDNN's fused attention. Elsewhere this is what JAX makes of the formulas. Derivatives
are written out for both modes: forward (jax.jvp) and reverse (jax.grad), of any order.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PyTree

from utils.kernels.derivatives import define_derivatives, save_pullback
from utils.kernels.tpu_attention import TpuAttention, split_heads

# XLA's CPU, as of jax 0.11, ends with an error in batched bfloat16 matmuls that contract the left side's rows.
FOLDED_MATMULS_FAIL = jax.__version_info__ >= (0, 11)
# How `attention` can be computed (see there); a TpuAttention is a form, too, bound to its mesh.
ATTENTION_FORMS = ("auto", "by_head", "xla", "cudnn")
AttentionForm = str | TpuAttention
# The score of a key that nothing attends to: its weight is exactly 0. Finite, so that derivatives are, too.
MASKED_SCORE = -1e30

# --- Matmuls ---


def matmul(x: Array, y: Array, axes: tuple[int, int], dtype: Any = None, bias: Array | None = None) -> Array:
    """Contracts one axis of x with one of y, summing in float32, and adds the bias; the result has `dtype`, by default
    that of x."""
    dtype = dtype or x.dtype
    dimensions = (([axes[0] % x.ndim], [axes[1]]), ([], []))

    def written_as(written):
        def compute(x, y, *bias):
            products = jax.lax.dot_general(x, y, dimensions, preferred_element_type=written)
            return sum((b.astype(written) for b in bias), start=products).astype(dtype)

        return compute

    # A CPU is faster when it writes float32 and rounds afterwards; an accelerator is as fast with either.
    operands = (x, y) if bias is None else (x, y, bias)
    return jax.lax.platform_dependent(*operands, cpu=written_as(jnp.float32), default=written_as(dtype))


def transpose(x: Float[Array, "n m"]) -> Float[Array, "m n"]:
    """Returns x.T, to be contracted over n. Folded into the matmul, it would cost a CPU's fast kernels."""
    if x.dtype != jnp.bfloat16:
        return x.T

    def unfolded(x):
        if FOLDED_MATMULS_FAIL:
            return jax.lax.optimization_barrier(x.T)
        # A concatenation is not folded either, and is faster than a barrier.
        return jnp.concatenate(jnp.array_split(x.T, 2))

    return jax.lax.platform_dependent(x, cpu=unfolded, default=jnp.transpose)


def _dense(x, kernel, bias):
    return matmul(x, kernel.astype(x.dtype), (-1, 0), bias=bias), ()


def _dense_tangent(arguments, tangents):
    x, kernel, _ = arguments
    dx, dkernel, dbias = tangents
    # The product rule; the bias enters linearly.
    from_x = matmul(dx, kernel.astype(x.dtype), (-1, 0))
    from_kernel = matmul(x, dkernel.astype(x.dtype), (-1, 0))
    return from_x + from_kernel + dbias.astype(x.dtype)


def _dense_cotangents(arguments, saved, cotangent):
    """Returns the cotangents of x, kernel and bias.

    JAX's own rule would round the parameters' gradients to the compute dtype before Adam sees them, and would contract
    batch and tokens as two axes, which takes a CPU half as long again.
    """
    x, kernel, _ = arguments
    # Batch and tokens as one axis.
    rows = x.reshape(-1, x.shape[-1])
    cotangents = cotangent.reshape(-1, cotangent.shape[-1])
    dx = matmul(cotangents, kernel.astype(x.dtype), (1, 1)).reshape(x.shape)
    dkernel = matmul(transpose(rows), cotangents, (1, 0), kernel.dtype)
    return dx, dkernel, cotangents.sum(axis=0, dtype=kernel.dtype)


_differentiable_dense = define_derivatives(_dense, _dense_tangent, _dense_cotangents)


def dense(x: Float[Array, "*rows k"], kernel: Float[Array, "k m"], bias: Float[Array, " m"]) -> Float[Array, "*rows m"]:
    """Returns x @ kernel + bias in the dtype of x; kernel and bias get gradients of their own dtype."""
    return _differentiable_dense(x, kernel, bias)


# --- Attention ---


def choose_attention(platform: str, head_dim: int, dtype: Any, compute_capability: float = 0.0) -> str:
    """Returns the form of `attention` for devices of a platform ('cpu', 'gpu', 'tpu').

    cuDNN's takes bfloat16 and heads of up to 128 channels on NVIDIA's Ampere (compute capability 8) or newer.
    """
    if platform == "cpu":
        return "by_head"
    is_supported = jnp.dtype(dtype) == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if is_supported and compute_capability >= 8 else "xla"


def choose_attention_for(mesh: Mesh, head_dim: int, dtype: Any) -> AttentionForm:
    """Returns the form of attention for a mesh's devices, which may exist only as descriptions."""
    device = mesh.devices.flat[0]
    if device.platform == "tpu" and head_dim % 8 == 0:
        return TpuAttention(mesh)
    # AMD's devices are of the platform 'gpu' too, and their compute capability is no number.
    is_nvidia = "nvidia" in device.device_kind.lower()
    capability = float(getattr(device, "compute_capability", 0) or 0) if is_nvidia else 0.0
    return choose_attention(device.platform, head_dim, dtype, capability)


def takes_mask(form: AttentionForm) -> bool:
    """Whether a form of `attention` computes masked attention itself. The others leave it to 'xla'."""
    return form in ("auto", "by_head", "xla")


def packed_attention(
    qkv: Float[Array, "b n c"], num_heads: int, form: AttentionForm, mask: Bool[Array, "b n"] | None = None
) -> Float[Array, "b n d"]:
    """Computes `attention` of qkv, whose channels are those of query, key and value, each by head."""
    if isinstance(form, TpuAttention) and mask is None:
        return form(qkv, num_heads)
    query, key, value = split_heads(qkv, num_heads)
    return attention(query, key, value, form, mask).reshape(*qkv.shape[:2], -1)


def attention(
    query: Float[Array, "b n h d"],
    key: Float[Array, "b m h d"],
    value: Float[Array, "b m h d"],
    form: AttentionForm = "auto",
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b n h d"]:
    """Returns softmax(query key^T / sqrt(d)) value of each head, in the dtype of the query; the softmax is float32.

    `mask` says which keys are there; the others have no weight at all, and one of each image has to be there.

    `form`: 'by_head' takes the heads in turn, so that only one head's weights are in memory, and recomputes them for
    derivatives (arXiv:2205.14135); 'cudnn' is NVIDIA's fused kernel; 'xla' the plain formula; a TpuAttention packs
    its arguments first. 'auto' is 'by_head' on CPUs and 'xla' elsewhere, by the platform that is compiled for; with
    derivatives it would take the memory of both.
    """
    if mask is not None:
        return _masked_attention(query, key, value, mask, form)
    # Arguments that were not packed, because queries and keys were normalised or rotated, are packed here.
    if isinstance(form, TpuAttention):
        b, n, num_heads, _ = query.shape
        packed = jnp.concatenate([x.reshape(b, n, -1) for x in (query, key, value)], axis=-1)
        return form(packed, num_heads).reshape(query.shape)
    if form not in ATTENTION_FORMS:
        raise ValueError(f"unknown form of attention {form!r}; use one of {', '.join(ATTENTION_FORMS)}")

    # The platform is known when the function is lowered, so that both forms are traced.
    if form == "auto":
        forms = {name: partial(attention, form=name) for name in ("by_head", "xla")}
        return jax.lax.platform_dependent(query, key, value, cpu=forms["by_head"], default=forms["xla"])
    if form == "by_head":
        heads = (jnp.moveaxis(x, 2, 0) for x in (query, key, value))
        return jnp.moveaxis(_attention_by_head(*heads), 0, 2)
    if form == "cudnn":
        return _attention_by_cudnn(query, key, value)
    return jax.nn.dot_product_attention(query, key, value, implementation="xla")


def _masked_attention(query, key, value, mask, form):
    if form == "auto":
        forms = {name: partial(_masked_attention, form=name) for name in ("by_head", "xla")}
        return jax.lax.platform_dependent(query, key, value, mask, cpu=forms["by_head"], default=forms["xla"])
    if form != "by_head":
        return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None], implementation="xla")
    # The mask becomes an array like the others: what is added to the scores of each head and image.
    bias = jnp.where(mask, 0, MASKED_SCORE).astype(query.dtype)
    heads = (jnp.moveaxis(x, 2, 0) for x in (query, key, value))
    found = _attention_by_head(*heads, jnp.broadcast_to(bias, (query.shape[2], *bias.shape)))
    return jnp.moveaxis(found, 0, 2)


def _over_heads(function: Callable, *arrays: Float[Array, "h b ..."]) -> PyTree:
    """Maps function(n d, ...) over images at once and over heads in turn: the memory of one head's n x m weights is
    small, and is used again for the next. Of short sequences, whose weights are no larger than the arguments, all heads
    are taken at once, in fewer kernels."""
    num_heads, num_images, num_queries, head_dim = arrays[0].shape
    num_keys = arrays[1].shape[2]
    if max(num_queries, num_keys) <= head_dim:
        rows = jax.vmap(function)(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        return jax.tree.map(lambda x: x.reshape(num_heads, num_images, *x.shape[1:]), rows)
    dtype = arrays[0].dtype

    # XLA's CPU would convert a whole bfloat16 array to float32 and back for each slice that is taken or written.
    def to_bits(x):
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if dtype == jnp.bfloat16 else x

    def from_bits(x):
        return jax.lax.bitcast_convert_type(x, dtype)

    found = jax.lax.map(
        lambda head: jax.tree.map(to_bits, jax.vmap(function)(*map(from_bits, head))), tuple(map(to_bits, arrays))
    )
    return jax.tree.map(from_bits, found)


# Of one head of one image. `bias` is nothing, or one array (m,): 0 for the keys that are there.
def _weights(query: Float[Array, "n d"], key: Float[Array, "m d"], *bias: Float[Array, " m"]) -> Float[Array, "n m"]:
    scores = matmul(query, key, (1, 1), jnp.float32) * query.shape[-1] ** -0.5
    return jax.nn.softmax(sum((b.astype(jnp.float32) for b in bias), start=scores))


def _attend(query, key, value, *bias):
    return matmul(_weights(query, key, *bias).astype(value.dtype), value, (1, 0))


def _attend_tangent(arguments, tangents):
    query, key, value, *bias = arguments
    # The bias says what is there: it has no tangent.
    dquery, dkey, dvalue, *_ = tangents
    weights = _weights(query, key, *bias)
    # The product rule for the scores, then the softmax's derivative: diag(w) - w w^T.
    dscores = matmul(dquery, key, (1, 1), jnp.float32) + matmul(query, dkey, (1, 1), jnp.float32)
    dscores = dscores * query.shape[-1] ** -0.5
    dweights = weights * (dscores - (weights * dscores).sum(axis=-1, keepdims=True))
    return matmul(dweights.astype(value.dtype), value, (1, 0)) + matmul(weights.astype(value.dtype), dvalue, (1, 0))


def _attend_cotangents(query, key, value, *bias_and_cotangent):
    *bias, cotangent = bias_and_cotangent
    weights = _weights(query, key, *bias)
    # Back through the product with value, the softmax, and the scores.
    dweights = matmul(cotangent, value, (1, 1), jnp.float32)
    dscores = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True)) * query.shape[-1] ** -0.5
    weights = weights.astype(value.dtype)
    dscores = dscores.astype(value.dtype)
    # Each gradient is a matmul in the compute dtype, summed in float32.
    dquery = matmul(dscores, key, (1, 0))
    dkey = matmul(transpose(dscores), query, (1, 0))
    return dquery, dkey, matmul(transpose(weights), cotangent, (1, 0)), *map(jnp.zeros_like, bias)


# Jitted, so that calls outside of a compiled function compile once.
_by_head = jax.jit(lambda *heads: _over_heads(_attend, *heads), inline=True)
_by_head_tangent = jax.jit(lambda *parts: jax.vmap(jax.vmap(_attend_tangent))(*parts), inline=True)
_by_head_cotangents = jax.jit(lambda *heads: _over_heads(_attend_cotangents, *heads), inline=True)

_attention_by_head = define_derivatives(
    lambda *heads: (_by_head(*heads), ()),
    lambda heads, tangents: _by_head_tangent(tuple(heads), tuple(tangents)),
    lambda heads, saved, cotangent: _by_head_cotangents(*heads, cotangent),
)


def _tangent_over_heads(arguments, tangents):
    # By formula: cuDNN's kernel has derivatives in reverse mode alone.
    heads = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (tuple(arguments), tuple(tangents)))
    return jnp.moveaxis(_by_head_tangent(*heads), 0, 2)


_cudnn, _cudnn_cotangents = save_pullback(partial(jax.nn.dot_product_attention, implementation="cudnn"))
_attention_by_cudnn = define_derivatives(_cudnn, _tangent_over_heads, _cudnn_cotangents)
