"""The products of a transformer in the form that is fast on what computes them: `affine` and `attention`.

Both take any compute type and sum in float32; the gradients of affine's parameters are left in float32. XLA's CPU
kernels for bfloat16 are twice as fast as those for float32 where they write float32 and find their operands as rows of
a matrix; NVIDIA devices have cuDNN's fused attention. Elsewhere this is what JAX makes of the formulas.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def is_cpu() -> bool:
    return jax.default_backend() == "cpu"


def contract(x: Array, y: Array, axes: tuple[int, int], dtype: Any = None) -> Array:
    """Sum of products over one axis of each, taken in float32; of type `dtype`, if given, else of that of x."""
    written = jnp.float32 if is_cpu() else dtype  # an accelerator is as fast with either
    z = jax.lax.dot_general(x, y, (([axes[0] % x.ndim], [axes[1]]), ([], [])), preferred_element_type=written)
    return z.astype(dtype or x.dtype)


def transpose(x: Float[Array, "n m"]) -> Float[Array, "m n"]:
    """x.T to be contracted over n. Folded into the product, it would cost a CPU's fast kernels."""
    if is_cpu() and x.dtype == jnp.bfloat16:
        return jnp.concatenate(jnp.array_split(x.T, 2))  # a join of two pieces is not folded
    return x.T


@jax.custom_vjp
def affine(
    x: Float[Array, "*rows k"], kernel: Float[Array, "k m"], bias: Float[Array, " m"]
) -> Float[Array, "*rows m"]:
    """x @ kernel + bias in the type of x.

    Its derivative is written out, because JAX's would round the parameters' gradients to that type before Adam sees
    them, and would contract batch and tokens as two axes, which on a CPU takes half as long again.
    """
    return contract(x, kernel.astype(x.dtype), (-1, 0)) + bias.astype(x.dtype)


def _affine_forward(x, kernel, bias):
    return affine(x, kernel, bias), (x, kernel)


def _affine_backward(saved, gradient):
    x, kernel = saved
    rows, gradients = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    of_x = contract(gradients, kernel.astype(x.dtype), (1, 1)).reshape(x.shape)
    of_kernel = contract(transpose(rows), gradients, (1, 0), jnp.float32)
    return of_x, of_kernel, gradients.sum(axis=0, dtype=jnp.float32)


affine.defvjp(_affine_forward, _affine_backward)


@functools.cache
def has_cudnn_attention() -> bool:
    """Whether the devices are NVIDIA's with cuDNN's fused attention (Ampere or newer)."""
    device = jax.devices()[0]
    return "cuda" in device.client.platform_version and float(device.compute_capability) >= 8


def attention(
    query: Float[Array, "b n h d"], key: Float[Array, "b n h d"], value: Float[Array, "b n h d"]
) -> Float[Array, "b n h d"]:
    """softmax(query key^T / sqrt(d)) value of each head, in the type of the query; the softmax in float32."""
    if is_cpu():
        heads = (jnp.moveaxis(x, 2, 0) for x in (query, key, value))
        return jnp.moveaxis(_attention_by_head(*heads), 0, 2)
    is_taken = query.dtype == jnp.bfloat16 and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    implementation = "cudnn" if is_taken and has_cudnn_attention() else "xla"
    return jax.nn.dot_product_attention(query, key, value, implementation=implementation)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # outside of a compiled program, it compiles once
def _over_heads(function, *arrays: Float[Array, "h b n d"]):
    """function(n d, ...) mapped over images at once and over heads in turn: what one head's n x n weights take stays
    small, and its memory is used again for the next."""
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


def _weights(query: Float[Array, "n d"], key: Float[Array, "n d"]) -> Float[Array, "n n"]:
    return jax.nn.softmax(contract(query, key, (1, 1), jnp.float32) * query.shape[-1] ** -0.5)


def _attend(query, key, value):
    return contract(_weights(query, key).astype(value.dtype), value, (1, 0))


def _attend_backward(query, key, value, gradient):
    """The derivative of `_attend`; the weights are computed again rather than kept (arXiv:2205.14135)."""
    weights = _weights(query, key)
    of_weights = contract(gradient, value, (1, 1), jnp.float32)
    of_scores = weights * (of_weights - (weights * of_weights).sum(axis=-1, keepdims=True)) * query.shape[-1] ** -0.5
    weights, of_scores = weights.astype(value.dtype), of_scores.astype(value.dtype)
    of_query, of_key = contract(of_scores, key, (1, 0)), contract(transpose(of_scores), query, (1, 0))
    return of_query, of_key, contract(transpose(weights), gradient, (1, 0))


@jax.custom_vjp
def _attention_by_head(query, key, value):
    return _over_heads(_attend, query, key, value)


def _attention_by_head_forward(query, key, value):
    return _attention_by_head(query, key, value), (query, key, value)


def _attention_by_head_backward(saved, gradient):
    return _over_heads(_attend_backward, *saved, gradient)


_attention_by_head.defvjp(_attention_by_head_forward, _attention_by_head_backward)
