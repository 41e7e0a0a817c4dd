"""Snapshots of a run's EMA profiles, from which `--params ema:WIDTH` makes an EMA of any width.

RUN/ema_snapshots/STEP.safetensors holds every profile after STEP in float16. Each array is multiplied by the power of
two that takes its largest value to 2^14 .. 2^15: none overflows, and small values keep their digits. The profiles at
the step of a checkpoint are in the checkpoint itself, in float32; they have most of the weight.
"""

import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from utils.base.background import in_background
from utils.base.external import BadFileError, open_safetensors
from utils.base.files import atomic_write, remove_temporaries
from utils.base.mesh import gather, place
from utils.base.messages import UserError, log, progress_bar, warn
from utils.networks.posthoc_ema import expected_error, fit_average, gamma_of, width_of
from utils.runs.checkpoint import Checkpoints
from utils.runs.names import SNAPSHOTS as FOLDER

FIRST_INTERVAL = 50  # steps between snapshots, until there would be too many
LARGEST_EXPONENT = 15  # of stored values: float16 ends at 65504, just below 2^16
NEGLIGIBLE = 1e-9  # weight of a snapshot below which float32 would not show it
ROUNDING = 2e-4  # root mean square of the relative error of float16
LARGE_ERROR = 0.01  # relative to the EMA's distance from the last parameters: users are warned above it


def snapshot_interval(step: int, most: int) -> int:
    """Returns the number of steps between the snapshots that are kept at `step`: the first of 50, 100, 200, ... by
    which there are no more than `most`."""
    interval = FIRST_INTERVAL
    while step > most * interval:
        interval *= 2
    return interval


def list_snapshots(run_dir: Path) -> dict[int, Path]:
    """Returns {step: file} of a run's snapshots, ascending."""
    files = {int(file.stem): file for file in (run_dir / FOLDER).glob("*.safetensors") if file.stem.isdecimal()}
    return dict(sorted(files.items()))


# --- Writing ---


class EmaSnapshots:
    """Writes the snapshots of a run that trains from `step` on, no more than `most` (0: none), in the background.

    The steps that have one follow from the last step alone: a resumed run ends with those of an uninterrupted one. Of
    several processes, the first writes, and all have to call `save`. Later snapshots than `step` are deleted.
    """

    def __init__(self, run_dir: Path, most: int, step: int):
        self.run_dir = run_dir
        self.most = most
        self._finish: Callable[[], None] | None = None  # waits for the file that is being written
        # The run takes these steps again.
        if most and jax.process_index() == 0:
            remove_temporaries(run_dir / FOLDER)
            for later, file in list_snapshots(run_dir).items():
                if later > step:
                    file.unlink()

    def is_due(self, step: int) -> bool:
        return bool(self.most) and step % snapshot_interval(step, self.most) == 0

    def save(self, profiles: Mapping[str, PyTree], step: int) -> None:
        """Starts to write a snapshot, and returns when the profiles may be donated."""
        self.wait()
        # Copies: on CPUs, NumPy would see the memory that the next step takes.
        arrays = {name: np.array(gather(x)) for name, x in flatten_dict(dict(profiles), sep="/").items()}
        if jax.process_index() == 0:
            self._finish = in_background(lambda: self._write(arrays, step))

    def wait(self) -> None:
        """Returns when everything is on disk. A snapshot that cannot be written is reported, and left out."""
        finish, self._finish = self._finish, None
        try:
            if finish is not None:
                finish()
        except (UserError, OSError) as error:
            log(f"{error}; training goes on without this snapshot of --ema_profiles")

    def _write(self, arrays: Mapping[str, np.ndarray], step: int) -> None:
        path = self.run_dir / FOLDER / f"{step}.safetensors"
        path.parent.mkdir(exist_ok=True)
        write_snapshot(path, arrays)
        # Once it is there, those that a longer interval leaves out can go.
        for earlier, file in list_snapshots(self.run_dir).items():
            if earlier % snapshot_interval(step, self.most):
                file.unlink()


def write_snapshot(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes float32 arrays {name: x} as float16, with the exponent and the checksum of each in the metadata."""
    from safetensors.numpy import save_file

    stored = {}
    facts = {}
    for name, x in arrays.items():
        exponent = LARGEST_EXPONENT - math.frexp(np.abs(x).max(initial=0))[1]
        stored[name] = np.ldexp(x, exponent).astype(np.float16)
        facts[name] = [exponent, _checksum(name, exponent, stored[name])]
    with atomic_write(path) as temporary:
        save_file(stored, temporary, metadata={"arrays": json.dumps(facts)})


def _checksum(name: str, exponent: int, x: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data, zlib.crc32(f"{name} {exponent}".encode()))


# --- Reading ---


class StoredSnapshot(NamedTuple):
    """A snapshot on disk: its arrays, mapped from the file, and {name: [exponent, checksum]}."""

    path: Path
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]

    @classmethod
    def open(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> "StoredSnapshot":
        """Opens a file. Raises UserError where it does not hold arrays of these shapes."""
        try:
            arrays, metadata = open_safetensors(path)
            facts = json.loads(metadata["arrays"])
            if {name: x.shape for name, x in arrays.items()} != shapes or facts.keys() != shapes.keys():
                raise ValueError("its arrays are not those of the run")
        except (BadFileError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise _damaged(path, error) from None
        return cls(path, arrays, facts)

    def read(self, name: str) -> np.ndarray:
        """Returns an array, unscaled, in float64. Raises UserError where it is not what was written."""
        x = self.arrays[name]
        match self.facts[name]:
            case [int(exponent), int(checksum)] if checksum == _checksum(name, exponent, x):
                return np.ldexp(x.astype(np.float64), -exponent)
        raise _damaged(self.path, f"{name} is not what was written")


def open_snapshots(run_dir: Path, step: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, StoredSnapshot]:
    """Returns {step: file} of the snapshots before `step`. Raises UserError where one is damaged."""
    files = {}
    for earlier, path in list_snapshots(run_dir).items():
        if earlier < step:
            try:
                files[earlier] = StoredSnapshot.open(path, shapes)
            except UserError:
                if path.exists():  # else a training, which goes on, has dropped it meanwhile
                    raise
    return files


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(
        f"snapshot {path} is damaged ({reason}); restore it from a copy, or move it away: the others are enough, less "
        "exactly"
    )


def reconstruct(run_dir: Path, step: int, width: float, profiles: Mapping[str, PyTree], params: PyTree) -> PyTree:
    """Returns the EMA of a relative width at `step`, from the `profiles` {width: EMA} at that step and the run's
    snapshots before it; a width among the profiles is returned as it is.

    `params` are the parameters at the step: warns where the expected error is large, relative to the EMA's distance
    from them. Raises UserError where a snapshot is damaged.
    """
    kept = {float(text): text for text in profiles}
    if width in kept:
        return profiles[kept[width]]

    # The sources: files, and the profiles at the step itself.
    now = {text: flatten_dict(tree, sep="/") for text, tree in profiles.items()}
    shapes = {f"{text}/{name}": x.shape for text, arrays in now.items() for name, x in arrays.items()}
    files = open_snapshots(run_dir, step, shapes)
    sources = [(t, text) for t in [*files, step] for text in profiles]
    steps = np.array([t for t, _ in sources], np.float64)
    gammas = np.array([gamma_of(float(text)) for _, text in sources])
    weights = fit_average(steps, gammas, step, gamma_of(width))

    # The sum, array by array: one array at a time is read, and is in memory in float64.
    total = {}
    squares = np.zeros(2)  # of the EMA's elements, and of their distance from the parameters
    last = flatten_dict(params, sep="/")
    arrays = next(iter(now.values())).items()
    for name, x in progress_bar(arrays, f"making the EMA of width {width:g}", len(arrays), unit="array", delay=2):
        array = np.zeros(x.shape)
        for (t, text), weight in zip(sources, weights, strict=True):
            if abs(weight) > NEGLIGIBLE:
                array += weight * (now[text][name] if t == step else files[t].read(f"{text}/{name}"))
        squares += np.square(array).sum(), np.square(array - last[name]).sum()
        total[name] = array.astype(x.dtype)

    # Two sources of error: the fit of the profile, and float16.
    size, distance = np.sqrt(squares)
    rounding = ROUNDING * np.linalg.norm(weights[steps < step]) * size / max(distance, 1e-30)
    error = math.hypot(expected_error(steps, gammas, weights, step, gamma_of(width)), rounding)
    if error > LARGE_ERROR:
        warn(
            f"--params ema:{width:g} at step {step:,}: {len(files)} snapshots in {run_dir / FOLDER} leave an error of "
            f"about {error:.1%} of its distance from the parameters; widths near {', '.join(profiles)} have a smaller "
            "one"
        )
    return unflatten_dict(total, sep="/")


def take_average(params: PyTree, which: str, checkpoints: Checkpoints, step: int, saved: Mapping[str, Any]) -> PyTree:
    """Returns the parameters that --params=`which` asks for.

    `params` are those of the checkpoint of `step`: returned as they are for ema and raw; for ema:WIDTH, with that EMA
    in place of their trained parts. `saved` is the run's configuration. Raises UserError for ema:WIDTH of a run without
    profiles, and where a snapshot is damaged.
    """
    width = width_of(which)
    if width is None:
        return params
    if not saved["ema_profiles"]:
        raise UserError(
            f"--params={which}: {checkpoints.run_dir} was trained without --ema_profiles, from which it would be made, "
            "or was exported without them; use ema or raw"
        )
    sharding = jax.tree.leaves(params)[0].sharding
    stored = checkpoints.restore_stored(step, "ema_profiles", sharding)
    profiles, last = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), (stored, params))
    average = reconstruct(checkpoints.run_dir, step, width, profiles, last)
    return {**params, **jax.tree.map(lambda x: place(x, sharding), average)}
