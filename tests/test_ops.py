from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_transformer import DiT, DiTConfig
from utils.kernels.derivatives import define_derivatives, save_pullback
from utils.kernels.ops import FOLDED_MATMULS_FAIL, attention, choose_attention, dense


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
@pytest.mark.parametrize("shape", [(3, 49, 2, 6), (2, 64, 3, 8), (4, 6, 3, 8), (1, 1, 2, 1)])
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


@pytest.mark.parametrize(("num_queries", "num_keys", "form"), [(12, 5, "by_head"), (3, 4, "auto")])
def test_what_is_masked_is_as_if_it_were_not_there(num_queries, num_keys, form):
    """Output, gradients and tangents are those of JAX's own attention to the other keys alone."""
    shapes = [(3, num_queries, 2, 6), *[(3, num_keys, 2, 6)] * 2]
    draw = jax.random.normal
    inputs, tangents = ([draw(jax.random.key(i + 3 * j), shapes[i]) for i in range(3)] for j in range(2))
    weights = draw(jax.random.key(6), shapes[0])
    mask = np.array(jax.random.bernoulli(jax.random.key(3), 0.5, (3, num_keys)))
    mask[:, 1] = True
    mask[0] = [False] * (num_keys - 1) + [True]

    def alone(query, key, value):
        rows = [
            jax.nn.dot_product_attention(q[None], k[None, is_there], v[None, is_there])
            for q, k, v, is_there in zip(query, key, value, mask, strict=True)
        ]
        return jnp.concatenate(rows)

    def measure(function):
        def loss(*inputs):
            output, tangent = jax.jvp(function, inputs, tuple(tangents))
            return (weights * (output + jnp.square(tangent))).sum(), (output, tangent)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)

    with jax.default_matmul_precision("highest"):
        expected = measure(alone)
        found = measure(partial(attention, form=form, mask=jnp.asarray(mask)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, jnp.abs(b).max()))
    low = attention(*(x.astype(jnp.bfloat16) for x in inputs), form=form, mask=jnp.asarray(mask))
    np.testing.assert_allclose(low.astype(jnp.float32), alone(*inputs), atol=0.05)


def random_model(dtype: str, remat: str = "none", form: str = "by_head"):
    """(a DiT whose output depends on its inputs, parameters, inputs)."""
    model = DiT(
        DiTConfig(
            patch_size=2,
            hidden_size=32,
            depth=2,
            num_heads=2,
            mlp_ratio=2.0,
            class_dropout_prob=0.1,
            num_classes=10,
            dtype=dtype,
        ),
        remat,
        form,
    )
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 2))
    t = jnp.array([1.0, 2.0, 4.0]) * 2.0**-10  # 10,000 t, of which sines are taken, is exact to 1e-6
    labels = jnp.array([0, 3, 10])
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t, labels)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda target: jnp.asarray(0.2 * rng.normal(size=target.shape), jnp.float32), shapes)
    return model, params, (x, t, labels)


@pytest.mark.parametrize("remat", ["none", "dots", "blocks"])
def test_forward_mode_through_the_model_is_the_slope_of_finite_differences(remat):
    model, params, (x, t, labels) = random_model("float32", remat)
    dx, dt = jax.random.normal(jax.random.key(1), x.shape), jnp.array([2.0, -1.0, 4.0]) * 2.0**-11

    def along(step):
        return model.apply(params, x + step * dx, t + step * dt, labels)

    with jax.default_matmul_precision("highest"):
        _, tangent = jax.jit(lambda: jax.jvp(along, (0.0,), (1.0,)))()
        step = 2.0**-8  # of which multiples are added to t without rounding
        values = {k: jax.jit(along)(k * step) for k in (-2, -1, 1, 2)}
    slope = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)  # of order 4
    np.testing.assert_allclose(tangent, slope, atol=2e-3 * jnp.abs(slope).max())


def test_forward_mode_in_bfloat16_is_that_of_float32_within_rounding():
    (low, params, inputs), (high, *_) = random_model("bfloat16"), random_model("float32")
    tangents = (jax.random.normal(jax.random.key(1), inputs[0].shape), jnp.ones(3) * 1e-3)

    def tangent(model):
        return jax.jvp(lambda x, t: model.apply(params, x, t, inputs[2]), inputs[:2], tangents)[1]

    expected = jax.jit(tangent, static_argnums=0)(high)
    found = jax.jit(tangent, static_argnums=0)(low)
    assert jnp.linalg.norm(found - expected) < 0.05 * jnp.linalg.norm(expected)


def test_the_gradient_of_a_forward_derivative_is_that_of_plain_formulas():
    """Mean-flow objectives take these: reverse over forward mode, through both derivatives written by hand."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, dx, weights = (jax.random.normal(key, (2, 9, 2, 4)) for key in keys[:3])
    kernel, bias = jax.random.normal(keys[3], (8, 8)), jax.random.normal(keys[4], (8,))

    def loss(kernel, bias, dense, attention):
        def function(x):
            y = dense(x.reshape(2, 9, 8), kernel, bias).reshape(x.shape)
            return attention(y, x, jnp.sin(y))

        output, tangent = jax.jvp(function, (x,), (dx,))
        return (weights * (output + jnp.square(tangent))).sum()

    def gradients(dense, attention):
        return jax.jit(jax.grad(partial(loss, dense=dense, attention=attention), argnums=(0, 1)))(kernel, bias)

    with jax.default_matmul_precision("highest"):
        expected = gradients(lambda x, kernel, bias: x @ kernel + bias, jax.nn.dot_product_attention)
        found = gradients(dense, partial(attention, form="by_head"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * jnp.abs(b).max())


def test_derivatives_that_save_something_are_right_in_both_modes_and_under_vmap():
    """As cuDNN's attention has them: a custom VJP, which forbids forward mode by itself, is saved and called later."""

    @jax.custom_vjp
    def fused(x, y):
        return jnp.sin(x) * y

    fused.defvjp(
        lambda x, y: (fused(x, y), (jnp.cos(x), jnp.sin(x), y)),
        lambda saved, g: (g * saved[0] * saved[2], g * saved[1]),
    )
    with_saved, cotangents = save_pullback(fused)
    function = define_derivatives(
        with_saved,
        lambda arguments, tangents: (
            jnp.cos(arguments[0]) * arguments[1] * tangents[0] + jnp.sin(arguments[0]) * tangents[1]
        ),
        cotangents,
    )
    x, y, dx, dy = jax.random.normal(jax.random.key(0), (4, 5))
    plain = lambda x, y: jnp.sin(x) * y  # noqa: E731
    for transform in (lambda f: f, jax.jit, jax.vmap, lambda f: jax.jit(jax.vmap(f))):
        both = [transform(f) for f in (function, plain)]
        results = [jax.jvp(f, (x, y), (dx, dy)) for f in both]
        results = zip(*map(jax.tree.leaves, results), strict=True)
        gradients = [jax.grad(lambda *a, f=f: jnp.square(f(*a)).sum(), argnums=(0, 1))(x, y) for f in both]
        hessians = [jax.hessian(lambda x, f=f: f(x, y).sum())(x) for f in both]
        for a, b in [*results, *zip(*gradients, strict=True), hessians]:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_form_of_attention_follows_the_device_that_is_compiled_for():
    assert choose_attention("cpu", 64, "bfloat16") == "by_head"
    assert choose_attention("tpu", 64, "bfloat16") == "xla"
    assert choose_attention("gpu", 64, "bfloat16", 9.0) == "cudnn"
    for head_dim, dtype, capability in (
        (64, "float32", 9.0),
        (60, "bfloat16", 9.0),
        (512, "bfloat16", 9.0),
        (64, "bfloat16", 7.5),
    ):
        assert choose_attention("gpu", head_dim, dtype, capability) == "xla"


def test_dense_compiled_for_another_platform_has_no_trace_of_this_one():
    """On CPUs the transposed matmul is a concatenation or behind a barrier; a program lowered for TPUs has neither."""

    def gradient(x, kernel):
        return jax.grad(lambda kernel: dense(x, kernel, jnp.zeros(8)).astype(jnp.float32).sum())(kernel)

    arguments = (jnp.ones((16, 8), jnp.bfloat16), jnp.ones((8, 8)))
    texts = {
        platform: jax.jit(gradient).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu")
    }
    assert ("optimization_barrier" if FOLDED_MATMULS_FAIL else "concatenate") in texts["cpu"]
    assert "concatenate" not in texts["tpu"]
    assert "optimization_barrier" not in texts["tpu"]
