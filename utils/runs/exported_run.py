"""Runs that were exported: a folder or a file that `convert_checkpoint.py --load_dir` wrote, read where it lies.

Nothing is copied or written: the place may be read-only, and any number of processes may read it.
"""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from utils.base.commands import write_command
from utils.base.external import BadFileError, read_json
from utils.base.mesh import place
from utils.base.messages import UserError, warn
from utils.convert.sources import EXPORTED, is_exported, read_source
from utils.runs.checkpoint import Checkpoints
from utils.runs.checksums import leaf_shapes
from utils.runs.importing import convert_exported
from utils.runs.names import CHECKPOINTS

SUFFIX = ".safetensors"


def is_exported_file(place: str | Path) -> bool:
    """Returns whether `place` is one file that was exported here."""
    path = Path(place)
    return path.suffix == SUFFIX and path.is_file() and is_exported(path)


def folder_of_file(file: str) -> str:
    """Returns the folder that stands for that of the run, of the path or URL of an exported file: FOLDER of
    FOLDER/model.safetensors, and FOLDER/x, which need not exist, of FOLDER/x.safetensors."""
    start, _, name = file.rpartition("/")
    return (start or ".") if name == EXPORTED else file.removesuffix(SUFFIX)


class ExportedRun(Checkpoints):
    """An exported file, read as the one checkpoint of a run, of the step that was exported and with one set of
    parameters.

    `run_dir` stands for the run's folder, for outputs and for a conditions.npz. Raises UserError, which names `flag`,
    where the file cannot be read, is damaged, or is somebody else's.
    """

    def __init__(self, file: Path, run_dir: Path, flag: str):
        # In place of the base's manager of checkpoints, which would make a folder of them.
        self.remote = None
        self.run_dir = run_dir
        self.folder = run_dir / CHECKPOINTS
        self.flag = flag
        self.source = read_source(str(file), flag)
        if self.source.run is None:
            command = write_command("convert_checkpoint.py", "--source", file, "--family", "sit", "--out", "runs/NAME")
            raise UserError(f"{flag}: {file} was not exported here; make a run of it (or --family dit): {command}")
        if file.name == EXPORTED:
            warn_of_other_settings(file.parent / "config.json", self.source.run)

    @functools.cached_property
    def content(self) -> tuple[dict[str, Any], PyTree]:
        """(Configuration, parameters): arrays are views of the file where it holds float32."""
        try:
            return convert_exported(self.source)
        except BadFileError as error:
            raise UserError(f"{self.flag}: {error}") from None

    def steps(self) -> list[int]:
        return [self.source.step]

    def close(self) -> None:
        """Does nothing: no file is open."""

    # --- Items of the step, from which the base makes all else ---

    def _read_checksums(self, step: int) -> dict[str, Any]:
        """Returns {item: {leaf: [None, *shape]}}: the file's own checksums have been compared."""
        # The one set of parameters is read as the EMA; raw ones as both.
        shapes = {leaf: [None, *shape] for leaf, shape in leaf_shapes(self.content[1]).items()}
        return {"ema_params": shapes} | ({"params": shapes} if self.source.params == "raw" else {})

    def _metadata(self, step: int, name: str) -> PyTree:
        return self.content[1]

    def _read(self, step: int, targets: Mapping[str, PyTree], json_names: tuple[str, ...]) -> dict[str, Any]:
        config, params = self.content

        # Copies: an array on a CPU would be the file itself, which may change while the program runs.
        def put(target: jax.ShapeDtypeStruct, value: np.ndarray) -> jax.Array:
            return place(np.array(value), target.sharding)

        items = {name: jax.tree.map(put, target, params) for name, target in targets.items()}
        return items | {name: copy.deepcopy(config) for name in json_names}


def warn_of_other_settings(path: Path, run: Mapping[str, Any]) -> None:
    """Warns of a config.json that is not that of the weights beside it, as it is in a folder of two exports' files."""
    # A file without one, or beside a damaged one, is still whole: its own settings are in it.
    if not path.is_file():
        return
    try:
        found = read_json(path)
    except BadFileError as error:
        warn(f"{path}: {error}; the settings in {EXPORTED} count")
        return
    if differing := _differing(run, found):
        warn(f"{path} has another {differing[0]} than {EXPORTED}, whose own settings count; take both from one export")


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Returns the names of settings whose values differ, groups with a dot; what `theirs` has beyond is left out."""
    names = []
    for name, value in ours.items():
        other = theirs.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            names += [f"{name}.{inner}" for inner in _differing(value, other)]
        elif value != other:
            names.append(name)
    return names
