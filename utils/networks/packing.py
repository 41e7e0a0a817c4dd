"""Small arrays of a tree as one, so that what is done element by element to all of them is done at once.

Of the 51 arrays of a small network most are biases. An optimizer makes some ten kernels of each, whatever its size:
a third of all that its training step has, to be compiled and launched.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

SMALL = 2**17  # elements of an array up to which it is packed; of larger ones, a copy would cost more than a kernel


class Packed(NamedTuple):
    """A tree of arrays, packed."""

    small: tuple[Array, ...]  # matrices (1, n), and others (n,): optimizers tell biases from matrices by their axes
    large: tuple[Array, ...]  # as they are


@dataclasses.dataclass(frozen=True)
class Packing:
    """A way to pack float32 trees of one structure and one shape, and back."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]  # of the leaves, in order
    groups: tuple[tuple[int, ...], ...]  # places among the leaves of those that are packed together
    large: tuple[int, ...]  # places of the others

    @classmethod
    def of(cls, tree: PyTree) -> "Packing":
        """Returns the packing for trees like this one."""
        leaves, structure = jax.tree.flatten(tree)
        small = [place for place, leaf in enumerate(leaves) if leaf.size <= SMALL]
        groups = [tuple(place for place in small if (leaves[place].ndim > 1) == is_matrix) for is_matrix in (1, 0)]
        large = tuple(place for place in range(len(leaves)) if place not in small)
        return cls(structure, tuple(leaf.shape for leaf in leaves), tuple(filter(None, groups)), large)

    def pack(self, tree: PyTree) -> Packed:
        """Returns a tree of this structure, packed."""
        leaves = jax.tree.leaves(tree)
        small = []
        for group in self.groups:
            vector = jnp.concatenate([leaves[place].ravel() for place in group])
            small.append(vector[None] if len(self.shapes[group[0]]) > 1 else vector)
        return Packed(tuple(small), tuple(leaves[place] for place in self.large))

    def unpack(self, packed: Packed) -> PyTree:
        """Returns the tree that `pack` packed."""
        leaves: dict[int, Array] = dict(zip(self.large, packed.large, strict=True))
        for group, rows in zip(self.groups, packed.small, strict=True):
            start = 0
            for place in group:
                stop = start + math.prod(self.shapes[place])
                leaves[place] = rows[..., start:stop].reshape(self.shapes[place])
                start = stop
        return self.structure.unflatten([leaves[place] for place in range(len(self.shapes))])

    def pack_all(self, tree: PyTree) -> PyTree:
        """Returns a tree with every part of this structure packed: the moments in an optimizer's state."""
        return jax.tree.map(lambda part: self.pack(part) if self._fits(part) else part, tree, is_leaf=self._fits)

    def unpack_all(self, tree: PyTree) -> PyTree:
        """Returns the tree that `pack_all` packed."""

        def is_packed(part):
            return isinstance(part, Packed)

        return jax.tree.map(lambda part: self.unpack(part) if is_packed(part) else part, tree, is_leaf=is_packed)

    def _fits(self, part: PyTree) -> bool:
        return jax.tree.structure(part) == self.structure
