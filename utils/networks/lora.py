"""LoRA (Hu et al., arXiv:2106.09685): kernels W of attention and MLP become W + A B, where only A and B are trained.

The factors lie beside the network's parameters, under "lora". The network is always given the merged kernels, so that
it needs to know nothing of them, and a merged model computes exactly what was trained.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key, PyTree

# The top-level part of the parameters that holds the factors, and the layers of a block whose kernels get some.
KEY = "lora"
LAYERS = ("attention", "cross_attention", "mlp")


def add_lora(params: PyTree, rank: int, key: Key[Array, ""]) -> PyTree:
    """Returns the parameters with factors a (in, rank), normal of variance 1 / in, and b (rank, out), zero: the model
    starts as the same function. A network without such kernels gets none."""
    factors = {}
    # Sorted: a kernel's random key depends on the names alone, not on the order of the tree.
    for number, (path, kernel) in enumerate(sorted(flatten_dict(params).items())):
        if path[-1] == "kernel" and len(path) > 2 and path[1] in LAYERS and kernel.ndim == 2:
            rows, columns = kernel.shape
            a = jax.random.normal(jax.random.fold_in(key, number), (rows, rank)) / rows**0.5
            factors[path] = {"a": a, "b": jnp.zeros((rank, columns))}
    return {**params, KEY: unflatten_dict(factors)}


def merge_lora(params: PyTree) -> PyTree:
    """Returns the network's own parameters, with W + A B in the place of every W that has factors."""
    if KEY not in params:
        return params
    plain = flatten_dict({name: value for name, value in params.items() if name != KEY})
    factors: dict[tuple[str, ...], Any] = flatten_dict(params[KEY])
    for *path, leaf in factors:
        if leaf == "a":
            a, b = factors[*path, "a"], factors[*path, "b"]
            # An accelerator's default precision would round the factors: to TF32, or to bfloat16 on a TPU.
            plain[tuple(path)] = plain[tuple(path)] + jnp.dot(a, b, precision="highest")
    return unflatten_dict(plain)
