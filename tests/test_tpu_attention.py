"""The TPU's attention kernels, interpreted, against the plain formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from diffusion_transformer import DiT, DiTConfig
from tests.conftest import run_program
from utils.base.mesh import make_mesh
from utils.kernels.ops import attention, choose_attention_for, packed_attention
from utils.kernels.tpu_attention import TpuAttention, count_buffers, split_heads

MIB = 2**20


@pytest.fixture(scope="module")
def form():
    return TpuAttention(make_mesh(), is_interpreted=True)


def plain(qkv, num_heads):
    query, key, value = split_heads(qkv, num_heads)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value).reshape(*qkv.shape[:2], -1)


def draw(num_images, num_tokens, num_heads, head_dim, dtype):
    """qkv and a cotangent, whose scores are not nearly equal."""
    rng, width = np.random.default_rng(0), num_heads * head_dim
    arrays = (2 * rng.standard_normal((num_images, num_tokens, factor * width)) for factor in (3, 1))
    return [jnp.asarray(x, dtype) for x in arrays]


def error(found, expected):
    """Largest difference, relative to the largest value."""
    return float(np.abs(np.float64(found) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-7)])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "head_dim"), [(64, 4, 64), (256, 2, 72), (300, 2, 96), (1024, 1, 128), (4096, 1, 64)]
)
def test_the_kernels_are_the_formula(form, num_tokens, num_heads, head_dim, dtype, tolerance):
    def both(function):
        """(output, gradient), compiled as one."""

        def of(qkv, cotangent):
            output, pull = jax.vjp(lambda qkv: function(qkv, num_heads), qkv)
            return output, pull(cotangent)[0]

        return jax.jit(of)

    arrays = draw(1 if num_tokens > 1000 else 2, num_tokens, num_heads, head_dim, dtype)
    found = both(form)(*arrays)
    assert [x.dtype for x in found] == [dtype, dtype]
    with jax.enable_x64(True):
        expected = both(plain)(*(jnp.asarray(np.float64(x)) for x in arrays))
        assert error(found[0], expected[0]) < tolerance
        assert error(found[1], expected[1]) < tolerance


def test_forward_mode_is_that_of_the_formula(form):
    qkv, _ = draw(2, 64, 2, 64, "float32")
    tangent = jnp.roll(qkv, 1, axis=1)
    found = jax.jvp(lambda qkv: form(qkv, 2), (qkv,), (tangent,))
    expected = jax.jvp(lambda qkv: plain(qkv, 2), (qkv,), (tangent,))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("settings", [{}, {"qk_norm": 1, "rope": 1}])
def test_a_network_computes_the_same_in_this_form(form, settings):
    config = DiTConfig(
        patch_size=2,
        hidden_size=128,
        depth=1,
        num_heads=2,
        mlp_ratio=2.0,
        class_dropout_prob=0.1,
        num_classes=10,
        dtype="float32",
        **settings,
    )
    x, labels = jax.random.normal(jax.random.key(1), (2, 16, 16, 4)), jnp.array([3, 10])

    @jax.jit
    def init(key):
        params = DiT(config).init(key, x, jnp.zeros(2), labels)["params"]
        return jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)

    params = init(jax.random.key(0))

    def loss(params, form):
        return jnp.square(DiT(config, attention_form=form).apply({"params": params}, x, jnp.ones(2), labels)).mean()

    gradient = jax.jit(jax.grad(loss), static_argnames="form")
    found, expected = (gradient(params, form=each) for each in (form, "by_head"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-7), found, expected)


def test_packed_and_separate_arrays_agree(form):
    qkv, _ = draw(1, 64, 2, 64, "float32")
    for each in (form, "xla", "by_head"):
        np.testing.assert_allclose(packed_attention(qkv, 2, each), plain(qkv, 2), atol=2e-5)
        separate = attention(*split_heads(qkv, 2), each).reshape(1, 64, 128)
        np.testing.assert_allclose(separate, plain(qkv, 2), atol=2e-5)


def test_what_fits_on_the_chip():
    # DiT-B/2 and XL/2 at 256x256, XL/2 at 1024x1024 with one copy of its arrays, and an old chip.
    assert count_buffers(256, 768, 2, 100 * MIB) >= 2
    assert count_buffers(256, 1152, 2, 100 * MIB) >= 2
    assert count_buffers(4096, 1152, 2, 100 * MIB) == 1
    assert count_buffers(4096, 1152, 2, 12 * MIB) == 0


class Device:
    """A TPU that is only described."""

    platform, device_kind, id, process_index = "tpu", "TPU v5 lite", 0, 0


def test_tpus_take_it_where_heads_are_whole_sublanes():
    mesh = Mesh(np.array([Device()]), ("replica",))
    form = choose_attention_for(mesh, 72, "bfloat16")
    assert isinstance(form, TpuAttention)
    assert 99 * MIB < form.vmem_bytes < 100 * MIB
    assert choose_attention_for(mesh, 36, "bfloat16") == "xla"


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from utils.base.mesh import make_mesh, shard_replicated
from utils.kernels.tpu_attention import TpuAttention
mesh = make_mesh(4)
form = TpuAttention(mesh, is_interpreted=True)
rows = np.random.default_rng(0).standard_normal((8, 64, 3 * 64)).astype(np.float32)
gradient = jax.jit(jax.grad(lambda qkv: jnp.square(form(qkv, 2)).sum()))
qkv = shard_replicated(rows, mesh)
found = gradient(qkv)
print(found.sharding.is_equivalent_to(qkv.sharding, 3))
plain = gradient(rows[:1])  # which eight devices do not divide
print(np.abs(np.asarray(found)[0] - plain[0]).max() < 1e-5)
"""


def test_every_device_takes_its_own_images():
    assert run_program("-c", SHARDED, devices=8).stdout.split() == ["True", "True"]
