"""Conditions as bytes, at the start of a record: the arrays of their kind, leaf by leaf, little-endian.

Of a class that is its label, an int32. Manifests name other kinds; without one, records are of classes.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from utils.base.messages import UserError
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import RECORDED, Condition, record_condition, restore_condition
from utils.data.dataset import Example


def describe_kind(condition: Condition) -> dict[str, Any] | None:
    """Returns what a manifest says of conditions: their kind and its facts; None of classes, whose names it has."""
    if isinstance(condition, ClassCondition):
        return None
    return json.loads(json.dumps(record_condition(condition)))  # tuples become lists, as they will be read


def restore_kind(recorded: Mapping[str, Any] | None) -> Condition | None:
    """Returns the kind of condition that a manifest names; None for classes. Raises UserError for an unknown one."""
    return None if recorded is None else restore_condition(recorded)


def condition_bytes(kind: Condition | None, condition: PyTree) -> bytes:
    """Returns one condition, a tree of arrays without the axis of a batch, as bytes; of no `kind`, a label."""
    leaves = zip(jax.tree.leaves(condition), _leaves(kind or ClassCondition(())), strict=True)
    return b"".join(np.asarray(leaf, dtype).reshape(shape).tobytes() for leaf, (shape, dtype) in leaves)


def each_row(conditions: PyTree) -> Iterator[PyTree]:
    """Yields the conditions (n, ...) one by one."""
    leaves, structure = jax.tree.flatten(conditions)
    yield from (jax.tree.unflatten(structure, row) for row in zip(*leaves, strict=True))


def _leaves(kind: Condition) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Returns (shape, dtype) of each array of a condition, in the order of its tree."""
    return [(leaf.shape, np.dtype(leaf.dtype).newbyteorder("<")) for leaf in jax.tree.leaves(kind.spec)]


class RecordedConditions:
    """Reads the conditions of records: of `kind`, or, where it is None, labels of the classes `class_names`.

    `where` names the records' folder in messages. `size` is the number of bytes of a condition.
    """

    def __init__(self, kind: Condition | None, class_names: Sequence[str], where: str):
        self.kind = kind or ClassCondition(tuple(class_names))
        self.num_classes = None if kind else len(class_names)
        self.where = where
        self.leaves = _leaves(self.kind)
        self.structure = jax.tree.structure(self.kind.spec)
        self.size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.leaves)

    def read(self, record: bytes, index: int) -> Example:
        """Returns the condition of record `index` as part of an example of a data set.

        Raises UserError for a label of no class, and for numbers that are NaN or infinite: a record of the right size
        may still be damaged.
        """
        arrays = []
        offset = 0
        for shape, dtype in self.leaves:
            arrays.append(np.frombuffer(record, dtype, math.prod(shape), offset).reshape(shape))
            offset += arrays[-1].nbytes
            if dtype.kind == "f" and not np.isfinite(arrays[-1]).all():
                raise UserError(f"{self.where}: record {index} has a condition that is NaN or infinite; make it again")
        if self.num_classes is None:
            return {RECORDED: jax.tree.unflatten(self.structure, arrays)}
        label = arrays[0][()]
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"{self.where}: record {index} has the label {label}, but there are {self.num_classes} classes; make "
                "it again"
            )
        return {"label": label}
