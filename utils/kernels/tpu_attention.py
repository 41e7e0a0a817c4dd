"""Attention for TPUs on packed queries, keys and values, as one Pallas kernel in each direction.

A TPU's own form of the plain formula writes the n x n weights of every head to memory, and copies heads of fewer than
128 channels to pad them. Here all heads of an image stay on the chip: a program of the grid reads qkv (n, 3 d) of one
image, slices heads from it, and writes (n, d); the backward pass recomputes the weights and writes the gradient of qkv
packed. Weights are held transposed, (keys, queries), so that the sums of the softmax run over sublanes.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from utils.kernels.derivatives import define_derivatives

ALIGNMENT = 128  # few tokens are padded to a multiple of it, and more to one of CHUNK
CHUNK = 256  # queries at a time: their weights for all keys are in memory at once
VMEM_MIB = {  # on-chip memory of a core, by device kind; older ones have 16
    "TPU v5 lite": 128, "TPU v5e": 128, "TPU v6 lite": 128, "TPU v6e": 128, "TPU v5": 64, "TPU v5p": 64, "TPU7x": 64,
}  # fmt: skip
VMEM_FRACTION = 0.78  # the part of it that a kernel may take


def count_buffers(num_tokens: int, width: int, itemsize: int, vmem_bytes: int) -> int:
    """Counts the copies of an image's arrays that fit on the chip beside its weights, in the backward kernel."""
    tokens = _pad(num_tokens)
    arrays = 7 * tokens * width * itemsize  # qkv, the cotangent, and the gradient of qkv
    weights = 6 * tokens * min(CHUNK, tokens) * 4  # weights, scores and their derivatives, float32
    return max(0, (vmem_bytes - weights) // arrays)


def _pad(num_tokens: int) -> int:
    """Rounds up to a number of tokens that the kernels take."""
    step = ALIGNMENT if num_tokens <= CHUNK else CHUNK
    return -(-num_tokens // step) * step


def _weights(query: Array, key: Array, num_tokens: int) -> Array:
    """Returns the softmax over keys, (keys, queries) float32; keys from `num_tokens` on are padding."""
    scores = _matmul(key, query, 1, 1) * query.shape[-1] ** -0.5
    # Padding gets no weight: its scores are minus infinity.
    if num_tokens < len(key):
        is_token = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) < num_tokens
        scores = jnp.where(is_token, scores, -jnp.inf)
    # Less their maximum, scores cannot overflow.
    weights = jnp.exp(scores - scores.max(axis=0, keepdims=True))
    return weights / weights.sum(axis=0, keepdims=True)


def _matmul(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _slices(width: int, num_heads: int, head: int) -> list[slice]:
    """Returns the channels of a head's query, key and value in the packed array."""
    size = width // num_heads
    return [slice(part * width + head * size, part * width + (head + 1) * size) for part in range(3)]


def _forward_kernel(qkv_ref, out_ref, *, num_heads: int, num_tokens: int):
    """Writes the attention of one image: qkv_ref (1, n, 3 d), out_ref (1, n, d)."""
    padded, width = out_ref.shape[1:]
    chunk = min(CHUNK, padded)
    for head in range(num_heads):
        of_query, of_key, of_value = _slices(width, num_heads, head)
        # Keys and values of a head are read once, for all chunks of its queries.
        key = qkv_ref[0, :, of_key]
        value = qkv_ref[0, :, of_value]

        def attend(i, _, of_query=of_query, key=key, value=value):
            rows = pl.ds(i * chunk, chunk)
            weights = _weights(qkv_ref[0, rows, of_query], key, num_tokens).astype(value.dtype)
            out_ref[0, rows, of_query] = _matmul(weights, value, 0, 0).astype(out_ref.dtype)

        jax.lax.fori_loop(0, padded // chunk, attend, None)


def _backward_kernel(qkv_ref, cotangent_ref, dqkv_ref, *, num_heads: int, num_tokens: int):
    """Writes the gradient of one image's qkv; the weights are recomputed, a chunk of queries at a time."""
    padded, width = cotangent_ref.shape[1:]
    chunk = min(CHUNK, padded)
    for head in range(num_heads):
        of_query, of_key, of_value = _slices(width, num_heads, head)
        # Keys and values of a head are read once, for all chunks of its queries.
        key = qkv_ref[0, :, of_key]
        value = qkv_ref[0, :, of_value]
        dtype = key.dtype
        scale = key.shape[-1] ** -0.5

        def add(i, sums, of_query=of_query, key=key, value=value, dtype=dtype, scale=scale):
            rows = pl.ds(i * chunk, chunk)
            query = qkv_ref[0, rows, of_query]
            cotangent = cotangent_ref[0, rows, of_query]
            # Recomputed: the forward pass leaves no weights behind.
            weights = _weights(query, key, num_tokens)
            # Through the softmax (arXiv:2205.14135, appendix B); gradients of keys and values sum over the chunks.
            dweights = _matmul(value, cotangent, 1, 1)
            dscores = weights * (dweights - (weights * dweights).sum(axis=0, keepdims=True)) * scale
            # Matmuls take the compute dtype and sum in float32.
            weights = weights.astype(dtype)
            dscores = dscores.astype(dtype)
            dqkv_ref[0, rows, of_query] = _matmul(dscores, key, 0, 0).astype(dtype)
            return sums[0] + _matmul(dscores, query, 1, 0), sums[1] + _matmul(weights, cotangent, 1, 0)

        # Every query contributes to all keys and values, so that their gradients are complete at the end only.
        zeros = jnp.zeros(key.shape, jnp.float32)
        dkey, dvalue = jax.lax.fori_loop(0, padded // chunk, add, (zeros, zeros))
        dqkv_ref[0, :, of_key] = dkey.astype(dtype)
        dqkv_ref[0, :, of_value] = dvalue.astype(dtype)


def _run(
    kernel: Callable, num_heads: int, out_factor: int, vmem_bytes: int, is_interpreted: bool, *arrays: Array
) -> Array:
    """Runs a kernel over the images of arrays (b, n, channels), qkv first; returns (b, n, `out_factor` * width)."""
    b, n, channels = arrays[0].shape
    width = channels // 3
    dtype = arrays[0].dtype
    # Kernels take whole chunks; what is computed for padding is cut off at the end.
    padded = _pad(n)
    arrays = tuple(jnp.pad(x, ((0, 0), (0, padded - n), (0, 0))) for x in arrays)
    # With room for two copies, the next image is read meanwhile.
    mode = None if count_buffers(n, width, dtype.itemsize, vmem_bytes) > 1 else pl.Buffered(1)

    def spec(channels: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, padded, channels), lambda i: (i, 0, 0), pipeline_mode=mode)

    # A program of the grid for each image. They are independent, so that cores of a chip may share them.
    out = pl.pallas_call(
        functools.partial(kernel, num_heads=num_heads, num_tokens=n),
        grid=(b,),
        in_specs=[spec(x.shape[-1]) for x in arrays],
        out_specs=spec(out_factor * width),
        out_shape=jax.ShapeDtypeStruct((b, padded, out_factor * width), dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem_bytes, dimension_semantics=("parallel",)),
        interpret=is_interpreted,
    )(*arrays)
    return out[:, :n]


def split_heads(qkv: Float[Array, "b n c"], num_heads: int) -> tuple[Array, ...]:
    """Returns query, key and value, each (b, n, heads, d / heads), of the packed array."""
    b, n, channels = qkv.shape
    return tuple(jnp.moveaxis(qkv.reshape(b, n, 3, num_heads, channels // (3 * num_heads)), 2, 0))


@dataclasses.dataclass(frozen=True)
class TpuAttention:
    """A function of qkv (b, n, 3 d) that returns softmax(query key^T / sqrt(h)) value of each head, (b, n, d).

    The channels of qkv are those of query, key and value, each by head. The softmax is float32, whatever the dtype.
    Every device of the mesh takes its own images. The plain formula serves batches that the devices do not divide,
    images too large for the chip, and derivatives in forward mode or of higher order. `is_interpreted`: JAX interprets
    the kernels, on any platform; for tests.
    """

    mesh: Mesh
    is_interpreted: bool = False

    def __call__(self, qkv: Float[Array, "b n c"], num_heads: int) -> Float[Array, "b n d"]:
        # Kernels need whole images for each device, and one image at least on the chip.
        b, n, channels = qkv.shape
        if b % self.mesh.size or not count_buffers(n, channels // 3, qkv.dtype.itemsize, self.vmem_bytes):
            return _plain(qkv, num_heads)
        return self._kernels(num_heads)(qkv)

    @property
    def vmem_bytes(self) -> int:
        # A mesh is of one kind of device; interpreted kernels get the memory of a common one.
        kind = "TPU v5e" if self.is_interpreted else self.mesh.devices.flat[0].device_kind
        return int(VMEM_FRACTION * VMEM_MIB.get(kind, 16) * 2**20)

    def _kernels(self, num_heads: int) -> Callable[[Array], Array]:
        # Reverse mode, which training uses, has a kernel; forward mode is by the formula.
        how = (self.vmem_bytes, self.is_interpreted)
        forward = self._sharded(functools.partial(_run, _forward_kernel, num_heads, 1, *how))
        backward = self._sharded(functools.partial(_run, _backward_kernel, num_heads, 3, *how))
        plain = functools.partial(_plain, num_heads=num_heads)
        return define_derivatives(
            lambda qkv: (forward(qkv), ()),
            lambda arguments, tangents: jax.jvp(plain, tuple(arguments), tuple(tangents))[1],
            lambda arguments, saved, cotangent: (backward(*arguments, cotangent),),
        )

    def _sharded(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """Splits a function over all axes of the mesh, along the first axis of the arrays."""
        # pallas_call does not say how its output varies over the mesh, which `check_vma` would ask for.
        spec = PartitionSpec(self.mesh.axis_names)
        return jax.shard_map(function, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)


def _plain(qkv: Float[Array, "b n c"], num_heads: int) -> Float[Array, "b n d"]:
    query, key, value = split_heads(qkv, num_heads)
    return jax.nn.dot_product_attention(query, key, value, implementation="xla").reshape(*qkv.shape[:2], -1)
