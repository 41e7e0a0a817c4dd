"""The mathematics of memorisation, against numbers of dgm-eval and scikit-learn, and against brute force."""

from collections.abc import Iterator
from functools import partial

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from hypothesis import given, settings

from tests.conftest import GOLDEN
from utils.metrics import memorisation
from utils.metrics.memorisation import Blocks, Neighbours, authentic, c_t, mann_whitney, memorised, nearest


@pytest.fixture(scope="module", params=["small", "offset"])
def golden(request) -> dict[str, np.ndarray]:
    """Samples of all kinds: copies, noisy ones, midpoints, fresh ones, copies of a row that is there twice."""
    with np.load(GOLDEN / f"memorisation_{request.param}.npz") as file:
        return dict(file)


def in_blocks(rows: np.ndarray, size: int = 1000) -> Blocks:
    """Returns blocks of rows (n, d) of one view each, or (n, views, d)."""
    views = rows if rows.ndim == 3 else rows[:, None]

    def read() -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(views), size):
            yield start, views[start : start + size]

    return read


def brute_force(queries: np.ndarray, rows: np.ndarray, exclude: np.ndarray | None = None) -> Neighbours:
    """Returns neighbours by all differences in float64, equal distances in the order of the rows."""
    views = rows if rows.ndim == 3 else rows[:, None]
    differences = queries.astype(float)[:, None, None] - views.astype(float)
    distances = np.sqrt(np.square(differences).sum(-1).min(-1))
    if exclude is not None:
        distances[np.arange(len(queries)), exclude] = np.inf
    order = distances.argsort(axis=1, kind="stable")[:, :2]
    return Neighbours(np.take_along_axis(distances, order, axis=1), order, 0)


def assert_equal(found: Neighbours, expected: Neighbours) -> None:
    np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-12)
    np.testing.assert_array_equal(found.indices, expected.indices)


@pytest.mark.parametrize(("size", "candidates"), [(1000, 8), (7, 2)])
def test_golden_numbers(golden, size, candidates):
    blocks = in_blocks(golden["train"], size)
    found = nearest(golden["gen"], blocks, candidates=candidates)
    np.testing.assert_allclose(found.distances, np.stack([golden["d1"], golden["d2"]], axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found.indices[:, 0], golden["nearest"])
    np.testing.assert_array_equal(memorised(found), golden["memorised"])
    assert memorised(found).mean() == golden["fraction"]

    # Every row against the others.
    own = nearest(golden["train"], blocks, exclude=np.arange(len(golden["train"])), candidates=candidates)
    np.testing.assert_allclose(own.distances[:, 0], golden["own_nearest"], rtol=1e-9, atol=1e-12)
    is_authentic = authentic(found, own.distances[found.indices[:, 0], 0])
    np.testing.assert_array_equal(is_authentic, golden["authentic"])

    # The test rows, and both together.
    held_out = nearest(golden["test"], blocks)
    assert mann_whitney(found.distances[:, 0], held_out.distances[:, 0]) == pytest.approx(float(golden["zu"]), rel=1e-9)
    results = memorisation.measure(golden["gen"], golden["test"], blocks).results
    expected = {"memorised": 100 * golden["fraction"], "authpct": golden["authpct"]}
    expected |= {"memorised_validation": 100 * golden["test_fraction"], "authpct_validation": golden["test_authpct"]}
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert "ct" not in results  # without rows to which cells are fitted


def test_golden_ct(golden):
    distances = {}
    for name in ("gen", "test"):
        distances[name] = np.empty(len(golden[name]))
        for cell in range(3):
            of_cell = golden[f"{name}_cells"] == cell
            rows = golden["train"][golden["train_cells"] == cell]
            distances[name][of_cell] = nearest(golden[name][of_cell], in_blocks(rows)).distances[:, 0]
    value, parts = c_t(distances["gen"], golden["gen_cells"], distances["test"], golden["test_cells"])
    assert value == pytest.approx(float(golden["ct"]), rel=1e-9)
    np.testing.assert_allclose([parts[cell] for cell in range(3)], golden["ct_per_cell"], rtol=1e-9)


def test_ct_of_cells():
    # Of cells with 21 samples, 20, and none held out, the first alone counts.
    samples = np.linspace(1, 2, 51)
    cells = np.repeat([0, 1, 2], [21, 20, 10])
    held_out = np.linspace(1.2057, 2.2, 30)
    value, parts = c_t(samples, cells, held_out, np.repeat([0, 1], 15))
    # Half a pair is added (Meehan et al.'s code), as their correction for continuity.
    statistic = scipy.stats.mannwhitneyu(samples[:21], held_out[:15]).statistic
    assert parts == {0: value}
    assert value == pytest.approx((statistic - 21 * 15 / 2 + 0.5) / np.sqrt(21 * 15 * 37 / 12))
    assert np.isnan(c_t(samples[:20], cells[:20], held_out, np.zeros(30, int))[0])
    # Nor does one without training rows, to which all distances are infinite.
    assert np.isnan(c_t(np.full(30, np.inf), np.zeros(30, int), np.full(30, np.inf), np.zeros(30, int))[0])


def test_cells_and_ct_of_everything():
    # Three clouds, of which the samples copy one.
    rng = np.random.default_rng(0)
    clouds = rng.normal(size=(3, 1, 5)) * 20

    def draw(count: int) -> np.ndarray:
        return (clouds + rng.normal(size=(3, count, 5))).reshape(-1, 5)

    train = draw(60)
    samples = draw(40)
    samples[:40] = train[:40] + 0.01
    found = memorisation.measure(samples, draw(60), in_blocks(train, 50), train)
    assert found.results["memorised"] == pytest.approx(100 / 3)
    assert found.results["memorised_error"] == pytest.approx(100 * np.sqrt(2 / 9 / 120))
    assert found.results["ct"] < -2 < found.results["ct_validation"] < 2

    # Components of more pixels than rows, and cells that a fit finds again.
    wide = memorisation.fit_cells(np.pad(train, [(0, 0), (0, 500)]))
    expected = memorisation.fit_cells(train).find(samples)
    np.testing.assert_array_equal(expected, np.repeat(expected[[0, 40, 80]], 40))
    assert len(set(wide.find(np.pad(samples, [(0, 0), (0, 500)])))) == len(set(expected)) == 3


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), mean=st.floats(-1e4, 1e4), log_scale=st.integers(-25, 25), spread=st.floats(0, 3))
def test_bounds_hold(seed, mean, log_scale, spread):
    rng = np.random.default_rng(seed)
    rows = 2.0**log_scale * (mean + rng.normal(size=(12, 8)) * 10 ** rng.uniform(-spread, spread, (12, 1)))
    queries = rows[:5] + 2.0**log_scale * rng.normal(size=(5, 8)) * 1e-3
    exact = np.square(queries[:, None] - rows).sum(-1)
    single = [jnp.asarray(values, jnp.float32) for values in (queries, rows[:, None])]
    bounds, least, _ = memorisation.lower_bounds(*single, jnp.asarray(12), jnp.full(5, -1), 2)
    assert (np.asarray(bounds) <= exact * (1 + 1e-12)).all()
    np.testing.assert_array_equal(least, np.sort(bounds, axis=1)[:, :2])
    assert_equal(nearest(queries, in_blocks(rows)), brute_force(queries, rows))


def test_many_equal_rows_and_ties():
    # Whatever is left by chance: each row dozens of times, in blocks and across them.
    rng = np.random.default_rng(1)
    rows = np.concatenate([rng.integers(0, 4, (40, 3))] * 30).astype(np.uint8)
    queries = rng.integers(0, 4, (20, 3)).astype(np.uint8)
    found = nearest(queries, in_blocks(rows, 500), max_block=170)
    assert found.num_repaired > 0
    assert_equal(found, brute_force(queries, rows))
    assert memorised(found)[found.distances[:, 0] == 0].all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_mirrors_are_views(dtype):
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (50, 4, 4, 1)).astype(dtype)
    rows = np.stack([images, images[:, :, ::-1]], axis=1).reshape(50, 2, 16)
    queries = np.concatenate([rows[[3, 30], 1], rows[[3], 0], rng.integers(0, 256, (5, 16)).astype(dtype)])
    found = nearest(queries, in_blocks(rows, 7))
    assert_equal(found, brute_force(queries, rows))
    assert found.indices[:3, 0].tolist() == [3, 30, 3]
    # An image's own mirror is no other image.
    own = nearest(rows[:, 0], in_blocks(rows), exclude=np.arange(50))
    assert_equal(own, brute_force(rows[:, 0], rows, np.arange(50)))
    assert own.distances.min() > 0


def test_far_from_the_origin():
    # Squares of the rows themselves lose everything in float32.
    rng = np.random.default_rng(3)
    rows = (1e4 + rng.normal(size=(300, 6))).astype(np.float32)
    queries = (1e4 + rng.normal(size=(60, 6))).astype(np.float32)
    queries[:10] = rows[:10]
    assert_equal(nearest(queries, in_blocks(rows)), brute_force(queries, rows))


def test_few_rows():
    rows = np.arange(4.0).reshape(2, 2)
    found = nearest(rows[:1], in_blocks(rows[:1]))
    assert found.distances.tolist() == [[0, np.inf]]
    assert found.indices.tolist() == [[0, -1]]
    # Equal queries have no spread, and rows beyond float32 are compared all the same.
    found = nearest(np.zeros((2, 2)), in_blocks(np.array([[1e30, 1e30], [3, 4], [0, 1]])))
    assert found.distances.tolist() == [[1, 5], [1, 5]]
    np.testing.assert_array_equal(
        memorisation.take_rows(in_blocks(np.arange(20).reshape(10, 2), 3), np.array([0, 7])), [[0, 1], [14, 15]]
    )


def test_a_set_against_itself():
    rng = np.random.default_rng(4)
    images = rng.integers(0, 256, (40, 12)).astype(np.uint8)
    results = memorisation.measure(images, None, in_blocks(images)).results
    assert (results["memorised"], results["authpct"]) == (100, 0)


@pytest.mark.slow
def test_memory_is_bounded():
    def read() -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, 2_000_000, 100_000):
            yield start, np.random.default_rng(start).normal(size=(100_000, 1, 64)).astype(np.float32)

    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nearest(np.random.default_rng(1).normal(size=(1000, 64)), partial(read))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KB
