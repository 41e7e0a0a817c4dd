"""A transformer's functions element by element, and its sums over tokens: GELU, SwiGLU, normalisation, modulation.

All of it but `modulate` is float32 inside, and rounded once, whatever the dtype of the arrays: on CPUs, XLA would round
to bfloat16 after every operation, which takes longer than the operation. Derivatives are written out for both modes, so
that a backward pass needs the arguments alone.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from utils.kernels.derivatives import define_derivatives

EPSILON = 1e-6  # added to a variance

# --- Activations ---


def _float32(*arrays: Array) -> list[Array]:
    return [x.astype(jnp.float32) for x in arrays]


def _gelu_parts(x: Float[Array, "*n"]) -> tuple[Array, Array]:
    """Returns GELU by its tanh approximation (arXiv:1606.08415), and its slope, float32."""
    scale = math.sqrt(2 / math.pi)
    cubic = 0.044715
    (y,) = _float32(x)
    tanh = jnp.tanh(scale * (y + cubic * y**3))
    slope = 0.5 * (1 + tanh) + 0.5 * y * (1 - tanh**2) * scale * (1 + 3 * cubic * y**2)
    return 0.5 * y * (1 + tanh), slope


def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns GELU by its tanh approximation, in the dtype of x."""

    def times_slope(arguments, factors):
        return (_gelu_parts(arguments[0])[1] * factors[0]).astype(x.dtype)

    return define_derivatives(
        lambda x: (_gelu_parts(x)[0].astype(x.dtype), ()),
        times_slope,
        lambda arguments, saved, cotangent: (times_slope(arguments, (cotangent,)),),
    )(x)


def swiglu(gate: Float[Array, "*n"], values: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns silu(gate) * values (arXiv:2002.05202), in their dtype."""
    dtype = gate.dtype

    def parts(gate):
        (g,) = _float32(gate)
        sigmoid = jax.nn.sigmoid(g)
        return g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))

    def tangent(arguments, tangents):
        silu, slope = parts(arguments[0])
        (values,) = _float32(arguments[1])
        dgate, dvalues = _float32(*tangents)
        return (slope * dgate * values + silu * dvalues).astype(dtype)

    def cotangents(arguments, saved, cotangent):
        silu, slope = parts(arguments[0])
        values, c = _float32(arguments[1], cotangent)
        return (slope * values * c).astype(dtype), (silu * c).astype(dtype)

    return define_derivatives(lambda gate, values: ((parts(gate)[0] * values).astype(dtype), ()), tangent, cotangents)(
        gate, values
    )


# --- Normalisation ---


def layer_norm(x: Float[Array, "*rows d"], dtype) -> Float[Array, "*rows d"]:
    """Normalises x over its last axis (eps 1e-6), without scale or bias; returns the compute dtype."""

    def parts(x):
        (x,) = _float32(x)
        # Centred before it is squared: the difference of two moments would cancel.
        x = x - x.mean(axis=-1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + EPSILON)
        return x * factor, factor

    # The Jacobian is symmetric: the tangent is its own transpose.
    def times_jacobian(x, vector, dtype):
        y, factor = parts(x)
        (v,) = _float32(vector)
        v = v - v.mean(axis=-1, keepdims=True) - y * (y * v).mean(axis=-1, keepdims=True)
        return (factor * v).astype(dtype)

    return define_derivatives(
        lambda x: (parts(x)[0].astype(dtype), ()),
        lambda arguments, tangents: times_jacobian(arguments[0], tangents[0], dtype),
        lambda arguments, saved, cotangent: (times_jacobian(arguments[0], cotangent, arguments[0].dtype),),
    )(x)


# --- Broadcasting over tokens ---


def _sum_tokens(x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
    """Returns the float32 sums over tokens."""
    # As a matmul on CPUs, where XLA would reduce in two passes, each in one thread.

    def by_matmul(x):
        ones = jnp.ones((len(x), x.shape[1]), x.dtype)
        return jax.lax.dot_general(ones, x, (((1,), (1,)), ((0,), (0,))))

    return jax.lax.platform_dependent(x, cpu=by_matmul, default=lambda x: x.sum(axis=1))


def modulate(x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Float[Array, "b n d"]:
    """Returns x * (1 + scale) + shift, the same for all tokens of an image, computed in the dtype of x.

    Float32 here would keep the normalised tokens of every block in float32, whatever is rematerialised: XLA takes the
    rounding between two functions of float32 away.
    """

    # One plus the scale: layers whose modulation starts at zero leave x as it is.
    def rows(vectors):
        return vectors[:, None].astype(x.dtype)

    def forward(x, shift, scale):
        return x * (1 + rows(scale)) + rows(shift), ()

    def tangent(arguments, tangents):
        x, _, scale = arguments
        dx, dshift, dscale = tangents
        return dx * (1 + rows(scale)) + x * rows(dscale) + rows(dshift)

    def cotangents(arguments, saved, cotangent):
        x, _, scale = arguments
        sums = [_sum_tokens(*_float32(products)).astype(scale.dtype) for products in (cotangent, cotangent * x)]
        return cotangent * (1 + rows(scale)), *sums

    return define_derivatives(forward, tangent, cotangents)(x, shift, scale)


def add_gated(x: Float[Array, "b n d"], gate: Float[Array, "b d"], y: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Returns x + gate * y, the same gate for all tokens of an image, in the dtype of x."""
    dtype = x.dtype

    def forward(x, gate, y):
        x, gate, y = _float32(x, gate[:, None], y)
        return (x + gate * y).astype(dtype), ()

    def tangent(arguments, tangents):
        gate, y = _float32(arguments[1][:, None], arguments[2])
        dx, dgate, dy = _float32(tangents[0], tangents[1][:, None], tangents[2])
        return (dx + dgate * y + gate * dy).astype(dtype)

    def cotangents(arguments, saved, cotangent):
        gate, y, c = _float32(arguments[1][:, None], arguments[2], cotangent)
        return cotangent, _sum_tokens(c * y).astype(arguments[1].dtype), (gate * c).astype(dtype)

    return define_derivatives(forward, tangent, cotangents)(x, gate, y)
