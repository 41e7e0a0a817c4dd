"""Files of statistics and features, whoever wrote them, under the names of our own.

| suite | file | what is read |
|---|---|---|
| here, TTUR, pytorch-fid, EDM, ADM | .npz | as it is |
| clean-fid | .npz of `feats`, in its folder `stats` | Inception's rows of all images |
| dgm-eval, with --save | .npz of `model`, `reps` | DINOv2's rows of all images |
| EDM2 | .pkl of `fid`, `fd_dinov2` | moments of both |
| torch-fidelity, in its cache | .pt of `mu`, `sigma`, or of one tensor | Inception's moments, or rows of all images |
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.base.external import ArrayHeader, BadFileError, read_npz, read_npz_headers, read_rows
from utils.base.messages import UserError
from utils.base.pickles import read_pickled_arrays
from utils.base.torch_files import read_torch_file
from utils.metrics.extractors import CLASS_TOKEN, POOL
from utils.metrics.statistics_files import Shapes, array_names

ROWS_AT_A_TIME = 1024  # 8 MB of Inception's as float32
NUMBERS = "fiub"  # kinds of dtypes

# What the names of files say of how images entered Inception: those that clean-fid (NAME_MODE_SPLIT_SIZE, of one's own
# custom_na) and torch-fidelity give them.
NAMED_CONVENTIONS = {
    r"_clean_[a-z0-9]+_(na|\d+)(_kid)?\.npz": "clean",
    r"_legacy_tensorflow_[a-z0-9]+_(na|\d+)(_kid)?\.npz": "adm",
    r"_legacy_pytorch_[a-z0-9]+_(na|\d+)(_kid)?\.npz": "pytorch_fid",
    r"-inception-v3-compat-(stat-fid|features)-2048\.pt": "adm",
}


class StoredArrays(NamedTuple):
    """Arrays of a file, under the names of our own: shapes; a function that reads some of them; one that reads the rows
    of one in parts."""

    shapes: Shapes
    read: Callable[[Iterable[str]], dict[str, np.ndarray]]
    read_rows: Callable[[str], Iterator[np.ndarray]]


def open_arrays(path: Path) -> StoredArrays:
    """Opens a file of statistics. Raises BadFileError where it cannot be read, and UserError where its features are of
    a network that is none here."""
    if path.suffix == ".pkl":
        return _in_memory(_edm2_arrays(read_pickled_arrays(path)), path)
    if path.suffix in (".pt", ".pth"):
        return _in_memory(_torch_fidelity_arrays(read_torch_file(path, with_arrays=True)), path)
    return _open_npz(path)


def _facts(path: Path, num_images: int | None = None) -> dict[str, np.ndarray]:
    """Returns what a file does not hold, but its name or its layout tells: the convention, and that rows are of all
    images."""
    facts: dict[str, Any] = {} if num_images is None else {"num_images": num_images}
    for pattern, convention in NAMED_CONVENTIONS.items():
        if re.search(f"{pattern}$", path.name):
            facts["convention"] = convention
    return {name: np.array(value) for name, value in facts.items()}


def _in_memory(arrays: Mapping[str, np.ndarray], path: Path) -> StoredArrays:
    rows = array_names(POOL).rows
    arrays = {**arrays, **_facts(path, len(arrays[rows]) if rows in arrays else None)}

    def read_parts(name: str) -> Iterator[np.ndarray]:
        _check_numbers(name, arrays[name].dtype)
        for start in range(0, len(arrays[name]), ROWS_AT_A_TIME):
            yield arrays[name][start : start + ROWS_AT_A_TIME]

    shapes = {name: array.shape for name, array in arrays.items()}
    return StoredArrays(shapes, lambda names: {name: arrays[name] for name in names}, read_parts)


def _edm2_arrays(content: Any) -> dict[str, np.ndarray]:
    arrays = {}
    for metric, key in {"fid": POOL, "fd_dinov2": CLASS_TOKEN}.items():
        moments = content.get(metric) if isinstance(content, dict) else None
        for name, array in moments.items() if isinstance(moments, dict) else ():
            if name in ("mu", "sigma") and isinstance(array, np.ndarray):
                arrays[getattr(array_names(key), name)] = array
    # By default, for which the published files were made.
    return {**arrays, "dinov2.preprocessing": np.array("edm2")}


def _torch_fidelity_arrays(content: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a cached item: statistics as {mu, sigma}, or the features of all images as one tensor."""
    names = array_names(POOL)
    if isinstance(content, np.ndarray) and content.ndim == 2:
        return {names.rows: content}
    if isinstance(content, dict) and content.keys() == {"mu", "sigma"}:
        return {names.mu: np.asarray(content["mu"]), names.sigma: np.asarray(content["sigma"])}
    raise BadFileError("it holds neither mu and sigma nor one matrix of features, as torch-fidelity's cache does")


def _open_npz(path: Path) -> StoredArrays:
    """Opens an npz, which is read array by array, and only those that are asked for."""
    headers = read_npz_headers(path)
    renamed = _rename(path, headers)
    facts = {}
    if renamed:
        (rows,) = renamed
        facts = _facts(path, *headers[renamed[rows]].shape[:1])
        headers = {rows: headers[renamed[rows]]}
    elif "convention" not in headers:
        facts = _facts(path)

    def read(names: Iterable[str]) -> dict[str, np.ndarray]:
        names = list(names)
        found = read_npz(path, {renamed.get(name, name): headers[name] for name in names if name not in facts})
        return {name: facts[name] if name in facts else found[renamed.get(name, name)] for name in names}

    def read_parts(name: str) -> Iterator[np.ndarray]:
        _check_numbers(name, headers[name].dtype)
        # Column after column, such a file has no rows to be read in parts.
        if headers[name].is_fortran:
            yield read([name])[name]
        else:
            yield from read_rows(path, renamed.get(name, name), ROWS_AT_A_TIME)

    shapes = {**{name: header.shape for name, header in headers.items()}, **dict.fromkeys(facts, ())}
    return StoredArrays(shapes, read, read_parts)


def _rename(path: Path, headers: Mapping[str, ArrayHeader]) -> dict[str, str]:
    """Returns {our name: theirs} of the one array of rows in a file of another suite; empty for every other file."""
    if headers.keys() == {"feats"}:
        return {array_names(POOL).rows: "feats"}
    if headers.keys() >= {"model", "reps"}:
        # Beside them lie pickled settings, which are never read.
        model = str(read_npz(path, {"model": headers["model"]})["model"])
        if model != "dinov2":
            raise UserError(
                f"--fid_stats={path} holds features of dgm-eval's {model[:50]}; of its networks dinov2 is read"
            )
        return {array_names(CLASS_TOKEN).rows: "reps"}
    return {}


def _check_numbers(name: str, dtype: np.dtype) -> None:
    if dtype.kind not in NUMBERS:
        raise ValueError(f"`{name}` holds {dtype}, no numbers")
