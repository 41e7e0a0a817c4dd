"""Batches whose examples bring their noise, chosen by optimal transport while they are read: --coupling.

Noise depends on (seed, step, row of the global batch) alone, and a coupling on a fixed number of consecutive rows, so
that devices, microbatches and resuming change neither. Mathematics: utils/data/coupling.py, utils/data/semidiscrete.py.
"""

import contextlib
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key, PyTree, UInt8
from threadpoolctl import ThreadpoolController

from utils.base.messages import UserError, progress_bar
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import Condition
from utils.conditions.several import SeveralCondition
from utils.conditions.tokens import TokensCondition
from utils.conditions.vector import VectorCondition
from utils.data.coupling import Cells, couple, draw_rows
from utils.data.dataset import Batch, ImageDataset
from utils.data.semidiscrete import FILE, Potentials, fit_all, read_potentials

T = TypeVar("T")
find_libraries = functools.cache(ThreadpoolController)
blas_lock = threading.Lock()
Select = Callable[[int], tuple[list[int], list[bool]]]  # step -> (examples, which of them are mirrored) of this process
Read = Callable[[Sequence[int], Sequence[bool]], Batch]  # these examples

BLOCK_ROWS = 512  # noises whose points are found together, by one product of matrices
READ_ROWS = 512  # points that are read at a time


class CoupledBatch(Batch):
    """A batch of any type, with noise for each example."""

    x_0: PyTree  # float32 (b, h, w, c), standard normal: not yet scaled by the objective
    data: PyTree  # the batch, without its conditions

    @classmethod
    def of(cls, batch: Batch, x_0: Any) -> "CoupledBatch":
        return cls(condition=batch.condition, x_0=x_0, data=batch.replace(condition=None))

    def to_latents(self, codec: Any, keys: Key[Array, "*b"]) -> Float[Array, "b h w c"]:
        return self.data.to_latents(codec, keys)

    def to_images(self, codec: Any, x_1: Float[Array, "b h w c"]) -> UInt8[Array | np.ndarray, "b h2 w2 c2"]:
        return self.data.to_images(codec, x_1)

    def draws(self) -> dict[str, Array]:
        return {"x_0": self.x_0}


@runtime_checkable
class Coupling(Protocol):
    """A way to choose noise and data together."""

    def prepare(self, folder: Path, is_new: bool, expected_sha256: str | None = None) -> str | None:
        """Gets ready to read batches: finds what is kept in the run's folder, or computes it, which may take minutes.

        Returns its hash, None where nothing is kept. Of a run that is not new, raises UserError where it is damaged, of
        other data or settings, or not what the run had, `expected_sha256`.
        """

    def reader(self, rows: range, select: Select, read: Read) -> Callable[[int], Batch]:
        """Returns a function step -> batch with its noise; `rows` of the global batches are this process's."""


@dataclasses.dataclass(frozen=True)
class Space:
    """The space of noise and data in which costs are taken: the one in which the network sees them."""

    to_x_1: Callable[[Any], Float32[np.ndarray, "b ..."]]  # batch -> x_1 (b, h, w, c), on the host
    shape: tuple[int, ...]  # of an example, (h, w, c)
    seed: int  # of the noise
    scale: float  # x_0 is `scale` times the noise of a batch, as objectives multiply it

    def draw(self, step: int, rows: Sequence[int]) -> Float32[np.ndarray, "n ..."]:
        return draw_rows(self.seed, step, rows, self.shape)


class Blocks(Generic[T]):
    """Results for blocks of `size` consecutive steps: each block is computed once, by the thread that first asks."""

    KEPT = 4  # blocks whose results are kept: more than threads ever work at

    def __init__(self, size: int, compute: Callable[[range], Sequence[T]]):
        self.size = size
        self.compute = compute
        self.lock = threading.Lock()
        self.results: dict[int, Future] = {}

    def __call__(self, step: int) -> T:
        number, place = divmod(step, self.size)
        with self.lock:
            is_first = number not in self.results
            result = self.results.setdefault(number, Future())
            for old in list(self.results)[: -self.KEPT]:
                del self.results[old]
        if is_first:
            try:
                result.set_result(self.compute(range(number * self.size, (number + 1) * self.size)))
            except BaseException as error:
                result.set_exception(error)
        return result.result()[place]


@contextlib.contextmanager
def beside_training() -> Iterator[None]:
    """Leaves half of the cores to XLA while NumPy multiplies matrices: on shared cores, threads of both mostly wait."""
    with blas_lock, find_libraries().limit(limits=max(1, (os.cpu_count() or 1) // 2), user_api="blas"):
        yield


# --- Within a batch ---


class MinibatchCoupling:
    """The exact assignment within groups of `num_rows` consecutive rows of the global batches.

    One process reads all rows of a group: `num_rows` divides its rows of a batch or, with a single process, is a
    multiple of `batch_size`. `weight` is that of `couple`.
    """

    def __init__(self, space: Space, condition: Condition, num_rows: int, batch_size: int, weight: float | None):
        self.space = space
        self.condition = condition
        self.num_rows = num_rows
        self.weight = weight
        self.num_steps = max(1, num_rows // batch_size)

    def prepare(self, folder: Path, is_new: bool, expected_sha256: str | None = None) -> None:
        pass  # every batch stands by itself

    def reader(self, rows: range, select: Select, read: Read) -> Callable[[int], Batch]:
        return Blocks(self.num_steps, lambda steps: self.couple(steps, rows, select, read))

    def couple(self, steps: range, rows: range, select: Select, read: Read) -> list[Batch]:
        """Returns the batches of several steps, which together are one group of rows, or each of one group or more."""
        batches = [read(*select(step)) for step in steps]
        x_1 = np.concatenate([self.space.to_x_1(batch) for batch in batches])
        noise = np.concatenate([self.space.draw(step, rows) for step in steps])
        condition = jax.tree.map(lambda *parts: np.concatenate(parts), *(batch.condition for batch in batches))
        labels, vectors = split_condition(self.condition, condition)

        # Noise changes places within each group.
        x_0 = np.empty_like(noise)
        with beside_training():
            for start in range(0, len(noise), self.num_rows):
                group = slice(start, start + self.num_rows)
                parts = (None if part is None else part[group] for part in (labels, vectors))
                x_0[group] = noise[group][couple(x_1[group], noise[group] * self.space.scale, *parts, self.weight)]
        return [CoupledBatch.of(batch, part) for batch, part in zip(batches, np.split(x_0, len(batches)), strict=True)]


def split_condition(
    kind: Condition, values: PyTree
) -> tuple[Int[np.ndarray, " n"] | None, Float[np.ndarray, "n k"] | None]:
    """Returns (labels, vectors whose cosine says how alike conditions are) of conditions (n, ...); None for what a kind
    does not have. Raises UserError for a kind that `minibatch` cannot compare."""
    if isinstance(kind, ClassCondition):
        return (values if len(kind.class_names) > 1 else None), None
    if isinstance(kind, VectorCondition):
        standardised = (values["value"] - np.array(kind.means)) / np.array(kind.stds)
        return None, np.where(values["is_given"][:, None], standardised, 0)
    if isinstance(kind, TokensCondition):
        return None, np.where(values["mask"][..., None], values["value"], 0).sum(axis=1)
    if isinstance(kind, SeveralCondition):
        # Each part counts the same: of vectors of one length side by side, the cosine is the mean.
        found = [split_condition(part, values[name]) for name, part in kind.parts]
        labels = [part for part, _ in found if part is not None]
        vectors = [
            part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
            for _, part in found
            if part is not None
        ]
        return (labels[0] if labels else None), (np.concatenate(vectors, axis=1) if vectors else None)
    found = kind.summary() or "these conditions"
    raise UserError(f"--coupling=minibatch tells classes, numbers, tokens and texts apart, not {found}; leave it out")


# --- Between all noise and the points of the data ---


class SemidiscreteCoupling:
    """Every noise goes with one point of its class, the winner under the potentials.

    Points are the training images, and their mirror images where training mirrors. A row of the data gives its label
    alone: the noise chooses the image.
    """

    def __init__(self, space: Space, dataset: ImageDataset, read: Read, num_draws: int, batch_size: int):
        self.space = space
        self.dataset = dataset
        self.read_examples = read
        self.num_draws = num_draws
        self.num_steps = max(1, BLOCK_ROWS // batch_size)
        self.labels = np.empty(0, np.int64)  # of the examples
        self.cells: dict[int, Cells] = {}  # by label
        self.points: dict[int, np.ndarray] = {}  # numbers of the points of each label

    @property
    def num_examples(self) -> int:
        return len(self.dataset.source)

    @property
    def num_views(self) -> int:
        return 1 + self.dataset.random_flip

    def prepare(self, folder: Path, is_new: bool, expected_sha256: str | None = None) -> str:
        # Points, by class: point i is example i, and from `num_examples` on mirrored.
        points, self.labels = self.read_points()
        labels = np.tile(self.labels, self.num_views)
        for label in np.unique(labels).tolist():
            (self.points[label],) = np.nonzero(labels == label)
            self.cells[label] = Cells(points[self.points[label]], self.space.scale)

        # Their potentials: those of the run, or fitted now.
        path = folder / FILE
        kept = self.read_potentials(path, is_new)
        found = kept or self.fit()
        if not is_new and expected_sha256 not in (None, found.sha256):
            raise UserError(
                f"{path} does not hold the coupling that the run was trained with, and fitting it again gives other "
                "numbers: bring the file back from a copy of the run"
            )
        if kept is None and jax.process_index() == 0:  # all of them have fitted the same
            found.save(path)
        for label, rows in self.points.items():
            self.cells[label].set_potentials(found.values[rows])
        return found.sha256

    @property
    def facts(self) -> dict[str, Any]:
        """The facts on which the potentials depend, which `coupling.npz` records."""
        return {
            "data": self.dataset.fingerprint.sha256,
            "points": self.num_views * self.num_examples,
            "seed": self.space.seed,
            "scale": self.space.scale,
            "draws": self.num_draws,
        }

    def read_potentials(self, path: Path, is_new: bool) -> Potentials | None:
        """Returns the potentials in a file; None where it is missing or, for a new run, not of this coupling."""
        try:
            return read_potentials(path, self.facts) if path.exists() else None
        except UserError:
            if not is_new:
                raise
            return None

    def fit(self) -> Potentials:
        labels = list(self.cells)
        names = [self.dataset.class_names[label] for label in labels]
        cells = [self.cells[label] for label in labels]
        rows = [self.points[label] for label in labels]
        return fit_all(cells, rows, names, self.facts)

    def read_points(self) -> tuple[Float32[np.ndarray, "n d"], Int[np.ndarray, " m"]]:
        """Returns (x_1 of all points, flattened; the labels of the examples)."""
        count = self.num_examples
        points = np.empty((self.num_views * count, math.prod(self.space.shape)), np.float32)
        labels = np.empty(count, np.int64)
        with progress_bar(total=len(points), unit="image", desc="reading the points of the coupling") as bar:
            for view in range(self.num_views):
                for start in range(0, count, READ_ROWS):
                    rows = range(start, min(start + READ_ROWS, count))
                    batch = self.read_examples(rows, [bool(view)] * len(rows))
                    labels[start : start + READ_ROWS] = batch.condition
                    first = view * count + start
                    points[first : first + len(rows)] = self.space.to_x_1(batch).reshape(len(rows), -1)
                    bar.update(len(rows))
        return points, labels

    def reader(self, rows: range, select: Select, read: Read) -> Callable[[int], Batch]:
        blocks = Blocks(self.num_steps, lambda steps: self.find_points(steps, rows, select))

        def read_step(step: int) -> Batch:
            noise, points = blocks(step)
            mirrored, examples = np.divmod(points, self.num_examples)
            batch = read(examples.tolist(), mirrored.astype(bool).tolist())
            return CoupledBatch.of(batch, noise)

        return read_step

    def find_points(self, steps: range, rows: range, select: Select) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns (noise, number of the point of each row) of several steps."""
        noise = np.concatenate([self.space.draw(step, rows) for step in steps])
        labels = np.concatenate([self.labels[select(step)[0]] for step in steps])
        flat = noise.reshape(len(noise), -1)
        points = np.empty(len(noise), np.int64)
        with beside_training():
            for label in np.unique(labels).tolist():
                (places,) = np.nonzero(labels == label)
                points[places] = self.points[label][self.cells[label].find_winners(flat[places])]
        return list(zip(np.split(noise, len(steps)), np.split(points, len(steps)), strict=True))
