"""What is computed element by element is the plain formula, in value and in every derivative; bfloat16 rounds once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils.kernels.elementwise import _sum_tokens, add_gated, gelu, layer_norm, modulate, swiglu


def plain_layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)


B, N, D = 2, 3, 5
TOKENS, VECTORS = (B, N, D), (B, D)
# {name: (function, plain formula, shapes of its arguments)}
FUNCTIONS = {
    "gelu": (gelu, nn.gelu, [TOKENS]),
    "swiglu": (swiglu, lambda gate, values: nn.silu(gate) * values, [TOKENS, TOKENS]),
    "layer_norm": (lambda x: layer_norm(x, x.dtype), plain_layer_norm, [TOKENS]),
    "modulate": (
        modulate,
        lambda x, shift, scale: x * (1 + scale[:, None]) + shift[:, None],
        [TOKENS, VECTORS, VECTORS],
    ),
    "add_gated": (add_gated, lambda x, gate, y: x + gate[:, None] * y, [TOKENS, VECTORS, TOKENS]),
}


def draw(shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_derivatives_are_those_of_the_formula(name):
    function, plain, shapes = FUNCTIONS[name]
    arguments = draw(shapes)
    tangents = draw(shapes, seed=1)
    weights = jax.random.normal(jax.random.key(2), TOKENS)

    def derivatives(function):
        def loss(*arguments):
            return (jnp.sin(function(*arguments)) * weights).sum()

        gradient = jax.grad(loss, argnums=tuple(range(len(shapes))))
        forward = jax.jvp(function, arguments, tangents)  # value and tangent
        mixed = jax.jvp(gradient, arguments, tangents)  # gradient, and forward over reverse
        nested = jax.grad(lambda *arguments: jax.jvp(loss, arguments, tangents)[1])(*arguments)  # reverse over forward
        mapped = jax.vmap(gradient)(*(x[None] for x in arguments))
        return forward, mixed, nested, mapped

    found, expected = (jax.jit(lambda f=f: derivatives(f))() for f in (function, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "modulate"])
def test_bfloat16_is_rounded_once(name):
    function, plain, shapes = FUNCTIONS[name]
    arguments = [x.astype(jnp.bfloat16) for x in draw(shapes)]
    exact, pullback = jax.vjp(plain, *(x.astype(jnp.float32) for x in arguments))
    found, pullback_found = jax.vjp(jax.jit(function), *arguments)
    cotangent = jax.random.normal(jax.random.key(3), TOKENS, jnp.bfloat16)
    pairs = [(found, exact), *zip(pullback_found(cotangent), pullback(cotangent.astype(jnp.float32)), strict=True)]
    for ours, theirs in pairs:
        assert ours.dtype == jnp.bfloat16
        # Half a unit in the last of bfloat16's 8 bits; float32's own rounding decides ties.
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=2**-8 * 1.01, atol=1e-6)


def test_token_sums_do_not_end_at_256():
    low = jax.grad(lambda shift: modulate(jnp.zeros((1, 4096, 3), jnp.bfloat16), shift, 0 * shift).sum())
    np.testing.assert_array_equal(low(jnp.ones((1, 3), jnp.bfloat16)), jnp.full((1, 3), 4096, jnp.bfloat16))
    x = jax.random.normal(jax.random.key(0), TOKENS)
    np.testing.assert_allclose(jax.jit(_sum_tokens)(x), x.sum(1), rtol=1e-5, atol=1e-6)
