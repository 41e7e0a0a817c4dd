from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils.ops import attention, dense


def test_dense_has_the_derivative_of_its_formula():
    """In float32 that of autodiff; in bfloat16 the parameters' gradients are float32 sums of the same matmul."""
    dtype, keys = jnp.bfloat16, jax.random.split(jax.random.key(0), 4)
    shapes = ((2, 5, 6), (6, 9), (9,), (2, 5, 9))
    x, kernel, bias, weights = map(jax.random.normal, keys, shapes)

    def gradients(function, x, kernel, bias):
        return jax.grad(lambda *args: (function(*args) * weights).sum(), argnums=(0, 1, 2))(x, kernel, bias)

    expected = gradients(lambda x, kernel, bias: x @ kernel + bias, x, kernel, bias)
    found = gradients(dense, x, kernel, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)

    low = jax.jit(lambda *args: gradients(dense, *args))(x.astype(dtype), kernel, bias)
    assert [g.dtype for g in low] == [dtype, jnp.float32, jnp.float32]
    rounded = weights.astype(dtype).astype(jnp.float32)
    dkernel = jnp.einsum("bnk,bnm->km", x.astype(dtype).astype(jnp.float32), rounded)
    np.testing.assert_allclose(low[1], dkernel, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(low[2], rounded.sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["by_head", "xla", "auto"])
@pytest.mark.parametrize("shape", [(3, 49, 2, 6), (2, 64, 3, 8), (1, 1, 2, 1)])
def test_attention_and_its_derivative_are_those_of_the_formula(shape, form):
    """As JAX's own has them in float32; in bfloat16, within the rounding of inputs, weights and scores."""
    *inputs, weights = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4))

    def value_and_gradients(function, dtype):
        def loss(*inputs):
            output = function(*inputs)
            return (output * weights).sum(), output

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        return gradient(*(x.astype(dtype) for x in inputs))

    expected = value_and_gradients(jax.nn.dot_product_attention, jnp.float32)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.02)):
        found = value_and_gradients(partial(attention, form=form), dtype)
        assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=tolerance * max(1, jnp.abs(b).max()))
