"""Conditions of the training data that a run keeps, RUN/conditions.npz: samples without conditions of their own draw
from these rows, with no need of the data."""

from pathlib import Path
from typing import cast

import jax
import numpy as np
from jaxtyping import PyTree

from utils.base.external import BadFileError, read_npz, read_npz_headers
from utils.base.files import atomic_write
from utils.base.messages import UserError
from utils.conditions.condition import Condition, read_rows
from utils.data.captions import read_condition
from utils.data.dataset import ImageDataset, RandomAccess, hold_out

FILE = "conditions.npz"
MAX_ROWS = 4096
MAX_BYTES = 2**26  # of all rows


def choose_pool(dataset: ImageDataset) -> PyTree | None:
    """Returns conditions (n, ...) of a training split; None for a kind whose conditions are drawn without data.

    They are all of them up to 4,096 rows or 64 MiB, otherwise as many, chosen by the rows' numbers alone.
    """
    condition = dataset.condition
    if not condition.DRAWS_ROWS:
        return None
    row_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(condition.spec))
    source = cast(RandomAccess, dataset.source)
    count = min(len(source), MAX_ROWS, max(1, MAX_BYTES // row_bytes))
    rows = range(count) if count == len(source) else hold_out(list(map(str, range(len(source)))), count)[1]

    return read_rows(condition, (read_condition(source, row) for row in rows), count)


def write_pool(folder: Path, pool: PyTree | None) -> None:
    """Writes FOLDER/conditions.npz, an array for each leaf in the tree's order; no pool, no file."""
    if pool is None:
        return
    with atomic_write(folder / FILE) as temporary, temporary.open("wb") as file:
        np.savez(file, *jax.tree.leaves(pool))


def read_pool(folder: Path, condition: Condition) -> PyTree | None:
    """Returns the conditions that `write_pool` wrote; None without a file, and for a kind that has none.

    Raises UserError for a file that is damaged, or is not of this condition.
    """
    path = folder / FILE
    if not condition.DRAWS_ROWS or not path.is_file():
        return None

    # The file may be anyone's: shapes are compared before an array is read.
    specs, structure = jax.tree.flatten(condition.spec)
    names = [f"arr_{i}" for i in range(len(specs))]
    try:
        headers = read_npz_headers(path)
        shapes = [headers[name].shape if name in headers else () for name in names]
        counts = {shape[:1] for shape in shapes}
        is_fitting = [shape[1:] for shape in shapes] == [spec.shape for spec in specs] and len(counts) == 1
        if not is_fitting or len(headers) != len(names) or not 0 < max(shapes[0][:1], default=0) <= MAX_ROWS:
            raise BadFileError("its arrays are not of the run's condition")
        arrays = read_npz(path, {name: headers[name] for name in names})
    except BadFileError as error:
        raise UserError(
            f"{path} cannot be read ({error}); conditions of samples are drawn from it: take it from a copy of the run"
        ) from None
    return structure.unflatten([arrays[name].astype(spec.dtype) for name, spec in zip(names, specs, strict=True)])
