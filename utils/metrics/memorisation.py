"""The mathematics of memorisation: exact nearest training rows, copies, AuthPct and C_T.

Rows are images or features of any number type, compared by the Euclidean distance. Training rows pass in blocks, and an
image may have several views, its mirror among them: its distance is that of the nearest one. utils/runs/memorising.py
says whose rows they are.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # whose parts are imported when they are used
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, Int64

# A pass over the training rows: (index of the first, rows (b, views, d)), in order.
Blocks = Callable[[], Iterable[tuple[int, np.ndarray]]]

CANDIDATES = 8  # rows of a block that are looked at exactly without a second look at the block
MAX_BLOCK = 4096  # rows at a time
MAX_PAIRS = 2**25  # of queries and views at a time, 128 MB
MAX_ELEMENTS = 2**22  # of exact differences at a time, 32 MB
UNIT_ROUNDING = 2.0**-24  # of float32
UNDERFLOW = 1e-30  # more than products lose that are too small for float32, where the largest norm is 1
COPY_RATIO = 1 / 3  # of the distances to the nearest and to the second nearest row
MIN_CELL_SAMPLES = 20  # C_T leaves out cells with no more samples
NUM_CELLS = 3
CELL_DIMENSIONS = 64
CELL_ROWS = 2048  # training rows to which the cells are fitted


# {result: title in tables} of `measure`, and {result: its error}. Results of held-out images are the baselines.
_TITLES = {"memorised": "memorised (%)", "authpct": "AuthPct", "ct": "C_T"}
COLUMNS = {
    name + suffix: title + of
    for name, title in _TITLES.items()
    for suffix, of in {"": "", "_validation": ", validation"}.items()
}
ERRORS = {name + suffix: f"{name}_error{suffix}" for name in ("memorised", "authpct") for suffix in ("", "_validation")}


class Neighbours(NamedTuple):
    """The nearest and second nearest training image of each query; infinite and -1 where there is none."""

    distances: Float64[np.ndarray, "n 2"]
    indices: Int64[np.ndarray, "n 2"]
    num_repaired: int  # queries, block by block, that had more than CANDIDATES rows to be looked at


# --- Nearest rows ---


@functools.partial(jax.jit, static_argnames="num_candidates")
def lower_bounds(
    queries: Float32[Array, "n d"],
    rows: Float32[Array, "b views d"],
    num_rows: Int[Array, ""],
    excluded: Int[Array, " n"],
    num_candidates: int,
) -> tuple[Float32[Array, "n b"], Float32[Array, "n k"], Int[Array, "n k"]]:
    """Returns lower bounds of the squared distances, and the `num_candidates` least of each query with their rows.

    Rows from `num_rows` on are padding; they and the row `excluded` of each query are infinitely far. In the order of
    any summation, the computed s = |a|^2 + |b|^2 - 2 a.b is within g (|a| + |b|)^2 of the squared distance of the
    rows before they were rounded to float32, g = (d + 8) u / (1 - (d + 8) u): sums of d products err by d u of the sum
    of their magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, sec. 3.1), together
    d u (|a| + |b|)^2; rounding a and b adds 2 u, the two sums 2 u, and this function's own differences 2 u.
    """
    size = queries.shape[-1] + 8
    relative = size * UNIT_ROUNDING / (1 - size * UNIT_ROUNDING)
    query_norms = jnp.square(queries).sum(-1)[:, None, None]
    row_norms = jnp.square(rows).sum(-1)
    products = jnp.einsum("nd,bvd->nbv", queries, rows, precision=jax.lax.Precision.HIGHEST)
    error = relative * jnp.square(jnp.sqrt(query_norms) + jnp.sqrt(row_norms)) + UNDERFLOW
    bounds = (query_norms + row_norms - 2 * products - error).min(axis=-1)

    # Numbers beyond float32 say nothing, so that their rows are looked at.
    bounds = jnp.where(jnp.isnan(bounds), -jnp.inf, bounds)
    places = jnp.arange(rows.shape[0])
    bounds = jnp.where((places >= num_rows) | (places == excluded[:, None]), jnp.inf, bounds)
    least, chosen = jax.lax.top_k(-bounds, num_candidates)
    return bounds, -least, chosen


class _Ranking:
    """The two nearest rows so far of each query, by exact differences of the raw rows."""

    def __init__(self, queries: np.ndarray):
        self.queries = queries
        self.squares = np.full((len(queries), 2), np.inf)
        self.indices = np.full((len(queries), 2), -1, np.int64)

    def limits(self, owners: np.ndarray | slice = np.s_[:]) -> np.ndarray:
        """Returns the squared distance (n,) above which no row can be one of the two, rounding included."""
        return self.squares[owners, 1] * (1 + 4 * self.queries.shape[1] * 2.0**-53)

    def add(self, start: int, rows: np.ndarray, owners: np.ndarray, places: np.ndarray) -> None:
        """Ranks the pairs (owners[p], rows[places[p]]), of which none was ranked before."""
        count = max(1, MAX_ELEMENTS // rows[0].size)
        for first in range(0, len(owners), count):
            owner = owners[first : first + count]
            place = places[first : first + count]
            # Differences before squares, in float64: bytes would overflow.
            differences = rows[place].astype(np.float64) - self.queries[owner].astype(np.float64)[:, None]
            self._merge(owner, np.square(differences).sum(axis=-1).min(axis=-1), start + place)

    def _merge(self, owners: np.ndarray, squares: np.ndarray, indices: np.ndarray) -> None:
        known = np.unique(owners)
        owners = np.concatenate([owners, known, known])
        squares = np.concatenate([squares, self.squares[known, 0], self.squares[known, 1]])
        indices = np.concatenate([indices, self.indices[known, 0], self.indices[known, 1]])

        # Of each owner the first two, of equal distances those of the lowest index.
        order = np.lexsort((indices, squares, owners))
        first = np.searchsorted(owners[order], known)
        kept = np.stack([order[first], order[first + 1]], axis=1)
        self.squares[known] = squares[kept]
        self.indices[known] = indices[kept]


def nearest(
    queries: np.ndarray,
    blocks: Blocks,
    exclude: Int[np.ndarray, " n"] | None = None,
    candidates: int = CANDIDATES,
    max_block: int = MAX_BLOCK,
) -> Neighbours:
    """Returns the two nearest training images of each query (n, d), exactly; of equal ones, those of lower index.

    Matmuls in float32 give a lower bound of each distance (`lower_bounds`). Rows of which it is not above the second
    nearest so far are compared in float64, so that nothing is lost whatever mean and spread the rows have. `exclude` is
    an image for each query that does not count, nor do its views. Memory grows with the queries and the block, not with
    the training rows.
    """
    # About the centre of the queries, in units of their largest norm: small numbers lose least in float32.
    centre = queries.mean(axis=0, dtype=np.float64)
    centred = queries - centre
    largest = np.sqrt(np.square(centred).sum(axis=1).max())
    scale = 2.0 ** -np.ceil(np.log2(largest)) if largest > 0 else 1.0
    on_devices = jnp.asarray(centred * scale, jnp.float32)
    excluded = np.full(len(queries), -1) if exclude is None else exclude

    ranking = _Ranking(queries)
    num_repaired = 0
    for start, rows, count in _split(blocks(), len(queries), max_block):
        scaled = np.zeros(rows.shape, np.float32)
        scaled[:count] = (rows[:count] - centre) * scale
        # Places in the block; those of other blocks are none of its rows.
        bounds, least, places = lower_bounds(
            on_devices,
            jnp.asarray(scaled),
            jnp.asarray(count),
            jnp.asarray(excluded - start),
            min(candidates, len(rows)),
        )
        num_repaired += _rank_block(ranking, start, rows, bounds, np.asarray(least), np.asarray(places), scale)
    return Neighbours(np.sqrt(ranking.squares), ranking.indices, num_repaired)


def _split(
    blocks: Iterable[tuple[int, np.ndarray]], num_queries: int, max_block: int
) -> Iterable[tuple[int, np.ndarray, int]]:
    """Yields (index of the first, rows, how many of them are real), all of one shape, which compiles once."""
    size = None
    for start, rows in blocks:
        if size is None:
            most = max(1, min(max_block, MAX_PAIRS // (num_queries * rows.shape[1])))
            # Powers of two, which divide the blocks of most readers.
            size = min(1 << (most.bit_length() - 1), 1 << (len(rows) - 1).bit_length())
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            padding = np.zeros((size - len(part), *part.shape[1:]), part.dtype)
            yield start + first, np.concatenate([part, padding]) if len(padding) else part, len(part)


def _rank_block(
    ranking: _Ranking,
    start: int,
    rows: np.ndarray,
    bounds: Array,
    least: np.ndarray,
    places: np.ndarray,
    scale: float,
) -> int:
    """Ranks the rows of a block that may be among the nearest; returns of how many queries they were not the few least
    bounds."""
    # The candidates: their exact distances may already rule out all others.
    is_near = (least <= scale**2 * ranking.limits()[:, None]) & (least < np.inf)
    owners, columns = np.nonzero(is_near)
    ranking.add(start, rows, owners, places[owners, columns])

    # Where they do not, as among many equal rows, all that the bounds leave, in parts of bounded size.
    last = least[:, -1]
    repaired = np.flatnonzero((last <= scale**2 * ranking.limits()) & (last < np.inf))
    if not len(repaired):
        return 0
    all_bounds = np.asarray(bounds)
    size = max(1, MAX_ELEMENTS // len(rows))
    for first in range(0, len(repaired), size):
        part = repaired[first : first + size]
        remaining = all_bounds[part]
        np.put_along_axis(remaining, places[part], np.inf, axis=1)
        is_left = (remaining <= scale**2 * ranking.limits(part)[:, None]) & (remaining < np.inf)
        owners, columns = np.nonzero(is_left)
        ranking.add(start, rows, part[owners], columns)
    return len(repaired)


def take_rows(blocks: Blocks, indices: Int[np.ndarray, " k"]) -> np.ndarray:
    """Returns the first views (k, d) of the images `indices`, which are sorted and distinct, in one pass."""
    return np.concatenate(list(_choose(blocks, indices)))


def _choose(blocks: Blocks, indices: Int[np.ndarray, " k"]) -> Iterable[np.ndarray]:
    for start, rows in blocks():
        first, last = np.searchsorted(indices, [start, start + len(rows)])
        if last > first:
            yield rows[indices[first:last] - start, 0]


# --- What the distances say ---


def memorised(neighbours: Neighbours) -> Bool[np.ndarray, " n"]:
    """Returns which queries are copies: nearer than a third of the way to the second nearest row (arXiv:2505.17638).

    A distance of 0 is one of a copy, also where the row is there twice.
    """
    first, second = neighbours.distances.T
    return (first == 0) | (first < COPY_RATIO * second)


def authentic(neighbours: Neighbours, own_distances: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Returns which queries are authentic: their nearest training image has another one strictly nearer to it, at
    `own_distances` (Alaa et al., arXiv:2102.08921, in the form of Stein et al., arXiv:2306.04675)."""
    return own_distances < neighbours.distances[:, 0]


def mann_whitney(samples: Float[np.ndarray, " n"], held_out: Float[np.ndarray, " m"]) -> float:
    """Returns the standardised number of pairs whose sample is farther from the training rows than the held-out row.

    Around 0 for samples as far as held-out rows, far below it for copies (Meehan et al., arXiv:2004.05675, eq. 2).
    """
    n = len(samples)
    m = len(held_out)
    farther = np.searchsorted(np.sort(held_out), samples, side="left").sum()
    return float((farther - (n * m / 2 - 0.5)) / np.sqrt(n * m * (n + m + 1) / 12))


def c_t(
    samples: Float[np.ndarray, " n"],
    sample_cells: Int[np.ndarray, " n"],
    held_out: Float[np.ndarray, " m"],
    held_out_cells: Int[np.ndarray, " m"],
) -> tuple[float, dict[int, float]]:
    """Returns (C_T, its part of each cell): `mann_whitney` within cells, weighted by their shares of the held-out rows.

    Distances are those to the training rows of the same cell. Cells of up to 20 samples do not count, nor those without
    held-out or training rows; NaN where none does (Meehan et al., arXiv:2004.05675, sec. 4.2).
    """
    weights = {}
    parts = {}
    for cell in np.unique(held_out_cells):
        ours = samples[(sample_cells == cell) & np.isfinite(samples)]
        theirs = held_out[held_out_cells == cell]
        if len(ours) > MIN_CELL_SAMPLES:
            weights[int(cell)] = len(theirs)
            parts[int(cell)] = mann_whitney(ours, theirs)
    if not parts:
        return float("nan"), {}
    return float(np.average(list(parts.values()), weights=list(weights.values()))), parts


# --- Cells ---


class Cells(NamedTuple):
    """Parts of the space of rows: k-means on the principal components of some training rows."""

    mean: Float64[np.ndarray, " d"]
    components: Float64[np.ndarray, "d k"]
    centres: Float64[np.ndarray, "cells k"]

    def find(self, rows: np.ndarray) -> Int[np.ndarray, " n"]:
        """Returns the cell of each row (n, d)."""
        projected = (rows - self.mean) @ self.components
        return np.square(projected[:, None] - self.centres).sum(axis=-1).argmin(axis=1)


def fit_cells(rows: np.ndarray, num_cells: int = NUM_CELLS, dimensions: int = CELL_DIMENSIONS) -> Cells:
    """Returns cells fitted to training rows (n, d): 3 clusters of 64 principal components, as dgm-eval takes them."""
    mean = rows.mean(axis=0, dtype=np.float64)
    centred = rows - mean
    # Eigenvectors of the smaller of both Gram matrices: pixels may be more than rows.
    count = min(dimensions, *centred.shape)
    size = min(centred.shape)
    is_wide = centred.shape[1] > len(centred)
    gram = centred @ centred.T if is_wide else centred.T @ centred
    values, vectors = scipy.linalg.eigh(gram, subset_by_index=(size - count, size - 1))
    if is_wide:
        vectors = centred.T @ vectors / np.sqrt(np.maximum(values, np.finfo(float).tiny))
    centres, _ = scipy.cluster.vq.kmeans2(centred @ vectors, min(num_cells, len(rows)), minit="++", seed=0)
    return Cells(mean, vectors, centres)


# --- All of it ---


class Memorisation(NamedTuple):
    """The nearest training images of samples, and the results of `measure`."""

    neighbours: Neighbours
    results: dict[str, float]


def measure(
    samples: np.ndarray,
    held_out: np.ndarray | None,
    blocks: Blocks,
    cell_rows: np.ndarray | None = None,
) -> Memorisation:
    """Returns the nearest training images of samples (n, d), and what they say of them and of held-out rows (m, d).

    `memorised` and `authpct` are percentages of the samples with binomial errors `memorised_error` and `authpct_error`,
    `*_validation` those of the held-out rows. `ct` is of cells fitted to `cell_rows`, which are training rows (k, d),
    `ct_validation` that of one half of the held-out rows against the other. There is no `ct` without both kinds of
    rows, nor where no cell has enough of them. There are three passes over the training rows, and one for each cell.
    """
    # Both sides in one pass; then the rows that were found, against all others.
    queries = samples if held_out is None else np.concatenate([samples, held_out])
    neighbours = nearest(queries, blocks)
    distinct, places = np.unique(neighbours.indices[:, 0], return_inverse=True)
    own = nearest(take_rows(blocks, distinct), blocks, exclude=distinct)
    is_copy = memorised(neighbours)
    is_authentic = authentic(neighbours, own.distances[places, 0])

    count = len(samples)
    results = _percentages(is_copy[:count], is_authentic[:count], "")
    if held_out is not None:
        results |= _percentages(is_copy[count:], is_authentic[count:], "_validation")
        if cell_rows is not None:
            results |= _measure_cells(samples, held_out, blocks, fit_cells(cell_rows))
    ours = Neighbours(neighbours.distances[:count], neighbours.indices[:count], neighbours.num_repaired)
    return Memorisation(ours, results)


def _percentages(is_copy: np.ndarray, is_authentic: np.ndarray, suffix: str) -> dict[str, float]:
    results = {}
    for name, values in (("memorised", is_copy), ("authpct", is_authentic)):
        fraction = values.mean()
        results[name + suffix] = float(100 * fraction)
        results[ERRORS[name + suffix]] = float(100 * np.sqrt(fraction * (1 - fraction) / len(values)))
    return results


def _measure_cells(samples: np.ndarray, held_out: np.ndarray, blocks: Blocks, cells: Cells) -> dict[str, float]:
    """Returns `ct` and `ct_validation`, where there are enough rows for them."""
    queries = np.concatenate([samples, held_out])
    query_cells = cells.find(queries)
    distances = np.full(len(queries), np.inf)
    for cell in range(len(cells.centres)):
        of_cell = query_cells == cell
        # Their indices do not matter.
        parts = functools.partial(_rows_of_cell, blocks, cells, cell)
        if of_cell.any():
            distances[of_cell] = nearest(queries[of_cell], parts).distances[:, 0]

    count = len(samples)
    first = np.s_[count::2]
    second = np.s_[count + 1 :: 2]
    found = {
        "ct": c_t(distances[:count], query_cells[:count], distances[count:], query_cells[count:])[0],
        "ct_validation": c_t(distances[first], query_cells[first], distances[second], query_cells[second])[0],
    }
    return {name: value for name, value in found.items() if not np.isnan(value)}


def _rows_of_cell(blocks: Blocks, cells: Cells, cell: int) -> Iterable[tuple[int, np.ndarray]]:
    for start, rows in blocks():
        of_cell = rows[cells.find(rows[:, 0]) == cell]
        if len(of_cell):
            yield start, of_cell
