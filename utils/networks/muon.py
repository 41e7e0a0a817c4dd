"""Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon): matrices step along their orthogonalised momentum.

A kernel may hold several matrices side by side, such as those of query, key and value: each is orthogonalised by itself
(CMuon, arXiv:2608.02502). The network's configuration says how many it holds (`NetworkConfig.count_matrices`).
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from utils.base.mesh import batch_sharding, replicated
from utils.base.messages import UserError

# (path, shape) of a parameter -> how many matrices it holds; 0: it is not Muon's.
CountMatrices = Callable[[tuple[str, ...], tuple[int, ...]], int]

MOMENTUM = 0.95
# Root mean square of an update's elements: about Adam's, so that one learning rate suits both (arXiv:2502.16982).
ADAM_RMS = 0.2
# Newton-Schulz: x <- a x + b (x x^T) x + c (x x^T)^2 x brings singular values near 1, between 0.7 and 1.2.
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class MuonState(NamedTuple):
    """The momentum of each kernel, in the kernel's own shape, and the number of updates so far."""

    count: Int[Array, ""]
    mu: PyTree


def scale_by_muon(count_matrices: CountMatrices, dtype: str, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Replaces gradients of kernels by the orthogonalised momentum of each of their matrices, scaled to Adam's size.

    The momentum is Nesterov's, as in `optax.contrib.muon`. The orthogonalisation is computed in `dtype`, each matrix on
    one device of `mesh`; without a mesh, every device computes all. All parameters that reach it are taken for kernels:
    `init` raises UserError where there are none.
    """

    def init(params):
        if not jax.tree.leaves(params):
            raise UserError(
                "--optimizer=muon is for kernels inside the network, none of which is trained here; leave it out"
            )
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        # Nesterov's look-ahead: the momentum that the next step would have if its gradient were this one.
        count: Any = optax.safe_increment(state.count)
        mu: Any = optax.tree.update_moment(updates, state.mu, MOMENTUM, 1)
        directions = jax.tree.map(
            lambda m, g: MOMENTUM * m + (1 - MOMENTUM) * g,
            optax.tree.bias_correction(mu, MOMENTUM, optax.safe_increment(count)),
            optax.tree.bias_correction(updates, MOMENTUM, count),
        )
        return orthogonalize_tree(directions, count_matrices, dtype, mesh), MuonState(count, mu)

    return optax.GradientTransformation(init, update)


def orthogonalize_tree(
    directions: PyTree, count_matrices: CountMatrices, dtype: str, mesh: Mesh | None = None
) -> PyTree:
    """Returns the kernels, float32, with each of their matrices orthogonalised and scaled by ADAM_RMS sqrt(its longer
    side)."""
    # Matrices of one shape form one stack, whichever kernels they are from. Tall ones are transposed: X X^T is small.
    kernels, structure = jax.tree_util.tree_flatten_with_path(directions)
    split = [jnp.split(kernel, count_matrices(names_of(path), kernel.shape), axis=1) for path, kernel in kernels]
    stacks: dict[tuple[int, ...], list[Array]] = {}
    for matrix in itertools.chain.from_iterable(split):
        wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
        stacks.setdefault(wide.shape, []).append(wide)
    done = {shape: iter(orthogonalize_over(mesh, jnp.stack(stack), dtype)) for shape, stack in stacks.items()}

    # Back to their places: the matrices of a stack come out in the order in which they went in.
    def take(matrix):
        rows, columns = matrix.shape
        wide = next(done[min(rows, columns), max(rows, columns)]).astype(jnp.float32)
        return ADAM_RMS * max(rows, columns) ** 0.5 * (wide.T if rows > columns else wide)

    made = [jnp.concatenate([take(matrix) for matrix in matrices], axis=1) for matrices in split]
    return structure.unflatten(made)


def orthogonalize_over(mesh: Mesh | None, matrices: Float[Array, "k n m"], dtype: str) -> Float[Array, "k n m"]:
    """Returns `orthogonalize` of a stack, in `dtype`; each device of the mesh computes its part of it."""
    if mesh is None or mesh.size == 1:
        return orthogonalize(matrices, dtype)
    # Devices need equal shares: zero matrices fill up the stack, and stay zero.
    padded = jnp.pad(matrices, ((0, -len(matrices) % mesh.size), (0, 0), (0, 0)))
    done = orthogonalize(jax.lax.with_sharding_constraint(padded, batch_sharding(mesh)), dtype)
    return jax.lax.with_sharding_constraint(done, replicated(mesh))[: len(matrices)]


def orthogonalize(matrices: Float[Array, "k n m"], dtype: str) -> Float[Array, "k n m"]:
    """Returns U S' V^T for each matrix U S V^T, n <= m, in `dtype`: singular values S' are near 1, but 0 where S is 0.

    Products are summed in float32. Relative errors in bfloat16: 1.2 % for matrices of normal numbers (4 % where sums
    are rounded as well, as in `optax.contrib.muon`), 2 % for momenta of a training, 17 % in its first steps. The
    iteration itself ends 20 % from U V^T, and losses after 1,500 steps are equal to three digits (docs/training.md).
    """
    a, b, c = COEFFICIENTS

    def times(x, y, axis):
        # Summing in float32 and rounding afterwards is also faster on a CPU.
        return jax.lax.dot_general(x, y, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)

    # A transpose that XLA folds into a matmul would cost a CPU its fast kernels, hence the barrier.
    x = jax.lax.optimization_barrier(matrices)
    x = (x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)).astype(dtype)
    for _ in range(ITERATIONS):
        gram = times(x, x, 2).astype(dtype)
        polynomial = (b * gram.astype(jnp.float32) + c * times(gram, gram, 1)).astype(dtype)
        x = (a * x.astype(jnp.float32) + times(polynomial, x, 1)).astype(dtype)
    return x


def names_of(path: tuple) -> tuple[str, ...]:
    """Returns the names along a JAX key path to a parameter, as `count_matrices` takes them."""
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))
