"""Potentials of semidiscrete optimal transport (arXiv:2509.25519): fitted once for the points of a data set, and kept
beside the run, RUN/coupling.npz."""

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int
from scipy.special import ndtri
from threadpoolctl import threadpool_limits

from utils.base.external import BadFileError, read_npz, read_npz_headers
from utils.base.files import atomic_write
from utils.base.messages import UserError, log, progress_bar
from utils.data.coupling import FITTING, TESTING, Cells, chi_squared, draw_block

FILE = "coupling.npz"
MAX_BYTES = 2**32  # of potentials in such a file, which may be anyone's

MIN_DRAWS = 2**14  # fewest noises for the fit of a class, however few points it has
TOLERANCE = 1e-3  # chi^2 below which a fit ends before it has used all of its noises
MIN_HITS = 500  # noises for each point before a fit may end early; chi^2 falls as 2 / noises
TEST_ERROR = 3e-4  # intended standard deviation of the estimate of chi^2, by an eighth of a fit's noises at most
# Rates of the stochastic Newton steps (diagonal Hessian): the largest, and the power by which they fall with hits.
MAX_RATE = 0.5
DECAY = 0.6


class Fit(NamedTuple):
    """The fitted potentials of the points of a class."""

    potentials: Float64[np.ndarray, " n"]  # of mean 0
    chi2: float  # of how often the points win, see `chi_squared`
    num_draws: int  # noises that the fit has used


def fit_potentials(
    cells: Cells,
    num_draws: int,
    seed: int = 0,
    part: int = 0,
    weights: Float64[np.ndarray, " n"] | None = None,
    tolerance: float = TOLERANCE,
    report: Callable[[int], Any] = lambda count: None,
) -> Fit:
    """Fits the potentials by which each point wins the share `weights` (default: 1 / n each) of `num_draws` noises.

    Maximises E min_j(|x - y_j|^2 / 2 - g_j) + sum_j b_j g_j by stochastic gradients, b_j - P(j wins), and averages the
    second half of the steps. Only counts of winners enter, which do not depend on how a library multiplies matrices.
    `part` numbers the class in the random stream; `report(count)` is called after each batch of noises. A fit whose
    chi^2 falls below `tolerance` ends early.
    """
    n = len(cells)
    weights = np.full(n, 1 / n) if weights is None else weights
    if n == 1:
        return Fit(np.zeros(1), 0.0, 0)
    size = int(np.clip(n // 4, 256, 1024))  # of a batch of noise
    num_steps = -(-num_draws // size)
    ends = [end for end in (num_steps // 4, num_steps // 2) if end * size >= MIN_HITS * n] + [num_steps]

    # The first guess takes the points to lie in independent directions: the score of each is normal, and has to exceed
    # one threshold with probability b_j. The unit of a step is the change of g_j there that multiplies P_j by e.
    quantiles = ndtri(1 - weights)
    potentials = cells.halves - cells.lengths * quantiles
    units = cells.lengths * weights * np.sqrt(2 * np.pi) * np.exp(np.square(quantiles) / 2)
    hits = min(1, size / n)  # expected wins of a point in a batch of noise, 1 at most
    total = np.zeros(n)

    # The mean begins anew after 1/8, 1/4 and 1/2 of all steps: at each of the `ends`, it is of the second half so far.
    first = 0
    for step in range(num_steps):
        if step in (num_steps // 8, num_steps // 4, num_steps // 2):
            first = step
            total[:] = 0
        counts = count_winners(cells, potentials, seed, FITTING, part, step, size)
        rate = min(MAX_RATE, hits / (1 + step * hits) ** DECAY)
        potentials = potentials + rate * units * (1 - counts / (size * weights))
        total += potentials
        report(size)
        if step + 1 in ends:
            mean = total / (step + 1 - first)
            chi2 = estimate_chi2(cells, mean, weights, seed, part, (step + 1) * size // 8, size)
            if chi2 < tolerance:
                report((num_steps - step - 1) * size)
                break
    return Fit(mean - mean.mean(), chi2, (step + 1) * size)


def count_winners(
    cells: Cells, potentials: Float64[np.ndarray, " n"], seed: int, stream: int, part: int, number: int, size: int
) -> Int[np.ndarray, " n"]:
    """Returns how many of the `size` noises of a block each point wins. Sets the potentials of `cells`."""
    cells.set_potentials(potentials)
    noise = draw_block(seed, stream, part, number, (size, cells.directions.shape[1]))
    return np.bincount(cells.find_winners(noise), minlength=len(cells))


def estimate_chi2(
    cells: Cells,
    potentials: Float64[np.ndarray, " n"],
    weights: Float64[np.ndarray, " n"],
    seed: int,
    part: int,
    max_draws: int,
    size: int = 1024,
) -> float:
    """Returns chi^2 by fresh noises, in batches of `size`: as many as TEST_ERROR asks for, but about `max_draws` at
    most."""
    num_draws = min(np.sqrt(2 * len(cells)) / TEST_ERROR, max_draws)
    counts = np.zeros(len(cells), np.int64)
    for number in range(max(2, int(num_draws / size))):
        counts += count_winners(cells, potentials, seed, TESTING, part, number, size)
    return chi_squared(counts, weights)


# --- All classes of a run ---


@dataclasses.dataclass(frozen=True)
class Potentials:
    """Potentials of all points of a data set."""

    values: Float64[np.ndarray, " n"]  # in the order of the points
    chi2: Float64[np.ndarray, " classes"]  # that the fit of each class has reached
    facts: dict[str, Any]  # on which they depend, in JSON's types

    @property
    def sha256(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.values, "<f8").data).hexdigest()

    def save(self, path: Path) -> None:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, potentials=self.values, chi2=self.chi2, facts=json.dumps(self.facts, sort_keys=True))


def read_potentials(path: Path, facts: dict[str, Any]) -> Potentials:
    """Reads what `Potentials.save` wrote. Raises UserError for a damaged file, and for potentials of other `facts`."""
    try:
        headers = read_npz_headers(path)
        if headers.keys() != {"potentials", "chi2", "facts"} or headers["potentials"].num_bytes > MAX_BYTES:
            raise BadFileError("its arrays are not those of a coupling")
        arrays = read_npz(path, headers)
        found = json.loads(str(arrays["facts"]))
        values = arrays["potentials"]
        if values.dtype != np.float64 or not np.isfinite(values).all():
            raise BadFileError("its potentials are not finite numbers")
    except (BadFileError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): take it from a copy of the run, or move it away to have its potentials "
            "fitted again, to the same numbers"
        ) from None
    different = [name for name, value in facts.items() if not isinstance(found, dict) or found.get(name) != value]
    if different or values.shape != (facts["points"],):
        name = (different or ["points"])[0]
        theirs = found.get(name) if isinstance(found, dict) else None
        raise UserError(
            f"{path} is of another coupling (its {name}: {theirs}, not {facts[name]}): give the data and settings of "
            "the run, or another --save_dir"
        )
    return Potentials(values, arrays["chi2"], facts)


def fit_all(cells: list[Cells], rows: list[np.ndarray], names: list[str], facts: dict[str, Any]) -> Potentials:
    """Fits the potentials of all classes, a thread for each, under a progress bar, and logs the largest chi^2.

    `rows` are the places of each class's points among all points, `names` the names of the classes. `facts` has the
    number of `points`, the `seed`, and the `draws` of noise for each point.
    """
    values = np.zeros(facts["points"])
    chi2 = np.zeros(len(cells))
    draws = [max(MIN_DRAWS, facts["draws"] * len(each)) if len(each) > 1 else 0 for each in cells]
    num_threads = min(os.cpu_count() or 1, len(cells))
    is_stopped = threading.Event()
    # A thread for each class: several threads for one product of small matrices would mostly wait for each other.
    with (
        progress_bar(total=sum(draws), unit="noise", unit_scale=True, desc="fitting the coupling") as bar,
        threadpool_limits(max(1, (os.cpu_count() or 1) // num_threads), "blas"),
        ThreadPoolExecutor(num_threads) as pool,
    ):

        def report(count: int) -> None:
            bar.update(count)
            if is_stopped.is_set():
                raise CancelledError

        def fit(place: int) -> None:
            found = fit_potentials(cells[place], draws[place], facts["seed"], place, report=report)
            values[rows[place]] = found.potentials
            chi2[place] = found.chi2

        # A signal reaches this thread alone, which then waits for the others.
        try:
            list(pool.map(fit, range(len(cells))))
        except BaseException:
            is_stopped.set()
            raise
    worst = int(chi2.argmax())
    log(
        f"coupling: potentials of {len(values):,} points; chi^2 of the frequencies of their images is at most "
        f"{chi2[worst]:.2g} ({names[worst]}), which more --coupling_draws lower"
    )
    return Potentials(values, chi2, facts)
