"""Distances and scores of features against closed forms and definitions spelled out; streaming; files."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

import compute_fid_stats
from utils.base.messages import UserError
from utils.metrics.extractors import POOL, SPATIAL
from utils.metrics.inception import INCEPTION_SHA256
from utils.metrics.metrics import caveats, compute_metrics
from utils.metrics.reference import (
    FeatureReference,
    ReferenceStatistics,
    find_convention,
    load_statistics,
    warn_of_other_shape,
)
from utils.metrics.scores import InceptionScore, covariance_root, frechet_distance, kid, mind, prdc
from utils.metrics.statistics import FeatureStatistics, ImageStatistics
from utils.metrics.statistics_files import save_statistics


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def random_rotation(size: int, rng: np.random.Generator) -> np.ndarray:
    return scipy.stats.ortho_group.rvs(size, random_state=rng)


def random_covariance(size: int, rng: np.random.Generator, rank: int | None = None) -> np.ndarray:
    """Positive semi-definite of the given rank, eigenvalues spread over four decades as those of real features are."""
    factor = random_rotation(size, rng)[:, : rank or size]
    return factor * 10 ** rng.uniform(-3, 1, rank or size) @ factor.T


def stream(features: np.ndarray, *sizes: int) -> FeatureStatistics:
    statistics = FeatureStatistics()
    for part in np.split(features, np.cumsum(sizes)):
        statistics.update(part)
    return statistics


# In one dimension the distance is (mu_1 - mu_2)^2 + (s_1 - s_2)^2.
@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (3, 1), (0, 5), (-2, 0), (1e3, 1e-3)])
def test_distance_in_one_dimension(mean, deviation):
    distance = frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([mean]), np.array([[deviation**2]]))
    assert distance == pytest.approx((mean - 1) ** 2 + (deviation - 2) ** 2, rel=1e-9)


def test_distance_of_commuting_covariances(rng):
    rotation = random_rotation(30, rng)
    a = rng.uniform(0, 3, 30)
    b = rng.uniform(0, 3, 30)
    mu_1, mu_2 = rng.normal(size=(2, 30))
    expected = np.sum((mu_1 - mu_2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    for basis in (np.eye(30), rotation):
        distance = frechet_distance(mu_1, basis * a @ basis.T, mu_2, basis * b @ basis.T)
        assert distance == pytest.approx(expected, rel=1e-6)


def test_distance_of_general_covariances_against_sqrtm(rng):
    for size in (2, 17, 100):
        mu_1, mu_2 = rng.normal(size=(2, size))
        sigma_1 = random_covariance(size, rng)
        sigma_2 = random_covariance(size, rng)
        cross = scipy.linalg.sqrtm(sigma_1 @ sigma_2).real
        expected = np.sum((mu_1 - mu_2) ** 2) + np.trace(sigma_1 + sigma_2 - 2 * cross)
        assert frechet_distance(mu_1, sigma_1, mu_2, sigma_2) == pytest.approx(expected, rel=1e-6)
        assert frechet_distance(mu_2, sigma_2, mu_1, sigma_1) == pytest.approx(expected, rel=1e-6)


def test_distance_of_covariances_in_two_dimensions(rng):
    """tr (S_1 S_2)^(1/2) = sqrt(tr S_1 S_2 + 2 sqrt(det S_1 S_2)) for 2x2 matrices (Cayley-Hamilton)."""
    a = random_covariance(2, rng)
    b = random_covariance(2, rng)
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * cross
    assert frechet_distance(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected, rel=1e-6)


def test_distance_of_rank_deficient_covariances(rng):
    zero = np.zeros(40)
    basis = random_rotation(40, rng)
    u = basis[:, 0]
    v = (basis[:, 0] + basis[:, 1]) / np.sqrt(2)
    a = 4 * np.outer(u, u)
    b = 9 * np.outer(v, v)  # rank one: tr (S_1 S_2)^(1/2) = 2 * 3 * |u.v|
    assert frechet_distance(zero, a, zero, b) == pytest.approx(4 + 9 - 2 * 6 / np.sqrt(2), rel=1e-6)
    left, right = (basis[:, cut] @ basis[:, cut].T for cut in (slice(0, 20), slice(20, 40)))  # disjoint supports
    assert frechet_distance(zero, left, zero, right) == pytest.approx(40, rel=1e-6)
    assert frechet_distance(zero, left, zero, np.zeros((40, 40))) == pytest.approx(20, rel=1e-6)
    assert frechet_distance(zero, np.zeros((40, 40)), zero, np.zeros((40, 40))) == 0
    few = random_covariance(40, rng, rank=7)
    shift = rng.normal(size=40)
    assert frechet_distance(zero, few, zero, few) == pytest.approx(0, abs=1e-6 * np.trace(few))
    assert frechet_distance(zero, few, shift, few) == pytest.approx(shift @ shift, rel=1e-6)


def test_a_root_has_as_many_columns_as_the_rank(rng):
    few = random_covariance(40, rng, rank=7)
    root = covariance_root(few)
    assert root.shape == (40, 7)
    np.testing.assert_allclose(root @ root.T, few, atol=1e-12 * np.trace(few))


def test_distance_is_invariant_to_a_change_of_basis_and_scales_quadratically(rng):
    mu_1, mu_2 = rng.normal(size=(2, 25))
    sigma_1 = random_covariance(25, rng)
    sigma_2 = random_covariance(25, rng, rank=10)
    basis = random_rotation(25, rng)
    distance = frechet_distance(mu_1, sigma_1, mu_2, sigma_2)
    turned = (basis @ mu_1, basis @ sigma_1 @ basis.T, basis @ mu_2, basis @ sigma_2 @ basis.T)
    assert frechet_distance(*turned) == pytest.approx(distance, rel=1e-6)
    assert frechet_distance(3 * mu_1, 9 * sigma_1, 3 * mu_2, 9 * sigma_2) == pytest.approx(9 * distance, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu_2": np.zeros(4), "sigma_2": np.eye(4)}, "3 and 4 features"),
        ({"sigma_1": np.eye(4)}, "first Gaussian.*shapes"),
        ({"mu_2": np.zeros((1, 3))}, "second Gaussian.*shapes"),
        ({"sigma_2": np.eye(3) + np.eye(3, k=1)}, "second Gaussian.*not symmetric"),
        ({"sigma_1": np.diag([1, 1, -0.1])}, "first Gaussian.*negative"),
        ({"sigma_2": np.diag([1, 1, -0.1])}, "second Gaussian.*negative"),
        ({"mu_1": np.array([0, 0, np.nan])}, "first Gaussian.*NaN"),
        ({"sigma_2": np.diag([1, 1, np.inf])}, "second Gaussian.*infinite"),
    ],
)
def test_distance_refuses_what_is_no_gaussian(change, message):
    gaussians = {"mu_1": np.zeros(3), "sigma_1": np.eye(3), "mu_2": np.ones(3), "sigma_2": np.eye(3), **change}
    with pytest.raises(ValueError, match=message):
        frechet_distance(**gaussians)


def test_distance_accepts_rounding_in_float32(rng):
    sigma = random_covariance(60, rng, rank=20)
    rounded = sigma.astype(np.float32) * (1 + rng.uniform(-6e-8, 6e-8, (60, 60)))  # unsymmetric, eigenvalues below 0
    assert frechet_distance(np.zeros(60), sigma, np.zeros(60), rounded) < 1e-3 * np.trace(sigma)


@pytest.mark.parametrize("offset", [0, 1e6])
@pytest.mark.parametrize("sizes", [(), (1,), (1,) * 199, (7, 1, 100, 0, 30), (100,), (199,)])
def test_streamed_statistics_equal_numpys(rng, sizes, offset):
    features = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12)) + offset * rng.normal(size=12)
    statistics = stream(features, *sizes)
    assert statistics.num_samples == 200
    np.testing.assert_allclose(statistics.mu, features.mean(axis=0), rtol=1e-10)
    covariance = np.cov(features - features.mean(axis=0), rowvar=False)  # centred first: exact for a large offset too
    np.testing.assert_allclose(statistics.sigma, covariance, rtol=1e-10, atol=1e-10 * np.abs(covariance).max())


def test_streamed_statistics_do_not_depend_on_order(rng):
    features = rng.normal(size=(300, 9))
    one = stream(features, 100, 50)
    other = stream(features[::-1], 7, 90)
    np.testing.assert_allclose(one.mu, other.mu, rtol=0, atol=1e-14)
    np.testing.assert_allclose(one.sigma, other.sigma, rtol=0, atol=1e-13)


def test_streamed_statistics_take_float32_and_sum_in_float64():
    features = np.full((5, 1000, 2), 0.1, np.float32)  # float32 sums of 0.1 drift in the seventh digit
    statistics = FeatureStatistics()
    for batch in features:
        statistics.update(batch)
    assert statistics.mu == pytest.approx(np.float64(np.float32(0.1)), rel=1e-14)
    assert statistics.sigma.dtype == np.float64


def test_statistics_are_copies(rng):
    statistics = stream(rng.normal(size=(10, 3)))
    before = statistics.mu, statistics.sigma
    statistics.mu[:] = 0
    statistics.sigma[:] = 0
    mu = statistics.mu
    statistics.update(rng.normal(size=(10, 3)))
    np.testing.assert_array_equal(mu, before[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_features_are_refused_and_leave_no_trace(rng, bad):
    features = rng.normal(size=(10, 4))
    statistics = stream(features)
    broken = features.copy()
    broken[3, 1] = bad
    with pytest.raises(UserError, match="1 of 10 feature rows after sample 10"):
        statistics.update(broken)
    assert statistics.num_samples == 10
    np.testing.assert_allclose(statistics.sigma, np.cov(features, rowvar=False), rtol=1e-10)


def test_features_of_another_shape_are_refused(rng):
    statistics = stream(rng.normal(size=(10, 4)))
    with pytest.raises(ValueError, match=r"\(10, 5\), expected \(n, 4\)"):
        statistics.update(rng.normal(size=(10, 5)))
    with pytest.raises(ValueError, match=r"\(4,\), expected \(n, d\)"):
        FeatureStatistics().update(rng.normal(size=4))


def test_too_few_samples_are_refused():
    statistics = FeatureStatistics()
    with pytest.raises(UserError, match="--num_samples"):
        _ = statistics.mu
    statistics.update(np.ones((1, 3)))
    np.testing.assert_array_equal(statistics.mu, np.ones(3))
    with pytest.raises(UserError, match="--num_samples"):
        _ = statistics.sigma


def images_of(features: np.ndarray, spatial: np.ndarray | None = None, max_rows: int = 0) -> ImageStatistics:
    """Statistics of images with those features, seen in two batches."""
    statistics = ImageStatistics(max_rows)
    arrays = {"pool": features} | ({} if spatial is None else {"spatial": spatial})
    half = len(features) // 2
    for rows in (slice(half), slice(half, None)):
        statistics.update({name: array[rows] for name, array in arrays.items()})
    return statistics


@pytest.mark.parametrize("num_samples", [15, 400])
def test_saved_statistics_load_back(rng, tmp_path, num_samples):
    features = rng.normal(size=(num_samples, 20)) @ random_covariance(20, rng)
    spatial = rng.normal(size=(num_samples, 6))
    counts = np.array([3, 0, 7])
    path = tmp_path / "new" / "stats"
    statistics = images_of(features, spatial, max_rows=10)
    metadata = {"convention": "adm", "dataset": "digits", "split": "train"}
    save_statistics(path, statistics, **metadata, label_counts=counts)
    loaded = load_statistics(path, {POOL: 20, SPATIAL: 6})
    for key, rows in ((POOL, features), (SPATIAL, spatial)):
        np.testing.assert_allclose(loaded[key].mu, rows.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(loaded[key].sigma, np.cov(rows, rowvar=False), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(loaded[POOL].rows, features[:10], rtol=1e-6)
    np.testing.assert_array_equal(loaded.label_counts, counts)
    assert (loaded.num_images, loaded.convention, loaded.dataset) == (num_samples, "adm", "digits")
    assert (loaded.path, len(loaded.sha256)) == (path, 64)
    with np.load(path) as archive:
        assert (archive["split"], archive["inception_sha256"]) == ("train", INCEPTION_SHA256)
    assert list(path.parent.iterdir()) == [path]  # nothing half-written is left beside it


def test_compact_statistics_are_those_of_the_features(rng, tmp_path):
    features = rng.normal(size=(30, 20)).astype(np.float32)
    statistics = images_of(features, max_rows=30)
    path = tmp_path / "stats.npz"
    save_statistics(path, statistics, convention="adm", dataset="x", is_compact=True)
    with np.load(path) as archive:
        content = dict(archive)
    assert not {"mu", "sigma"} & set(content)
    loaded = load_statistics(path, {POOL: 20})
    np.testing.assert_allclose(loaded[POOL].mu, statistics[POOL].mu, rtol=1e-12)
    np.testing.assert_allclose(loaded[POOL].sigma, statistics[POOL].sigma, rtol=1e-9, atol=1e-12)
    np.savez(path, **content | {"num_images": 31})  # of which one is not there
    with pytest.raises(UserError, match="holds no `mu` and `sigma`"):
        load_statistics(path, {POOL: 20})
    save_statistics(path, images_of(features, max_rows=10), convention="adm", dataset="x", is_compact=True)
    np.testing.assert_allclose(load_statistics(path, {POOL: 20})[POOL].mu, statistics[POOL].mu, rtol=1e-12)


@pytest.mark.parametrize(("num_samples", "cost"), [(30, 1e-3), (60, 1e-3), (120, 1e-6), (1000, 1e-6)])
def test_storing_statistics_costs_next_to_nothing(rng, tmp_path, num_samples, cost):
    """Below full rank (100) float32 costs more: its rounding fills the null space, and the root magnifies it."""
    scale = scipy.linalg.sqrtm(random_covariance(100, rng)).real
    reference, samples = (images_of(rng.normal(size=(n, 100)) @ scale) for n in (num_samples, 500))
    save_statistics(tmp_path / "stats.npz", reference, convention="adm", dataset="digits")
    reference, samples = reference[POOL], samples[POOL]
    loaded = load_statistics(tmp_path / "stats.npz", {POOL: 100})[POOL]
    exact = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
    assert frechet_distance(samples.mu, samples.sigma, loaded.mu, loaded.sigma) == pytest.approx(exact, rel=cost)


def write_arrays(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def test_statistics_of_other_tools_need_only_mu_and_sigma(tmp_path):
    path = write_arrays(tmp_path / "stats.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32))
    loaded = load_statistics(path, {POOL: 3})
    assert (loaded.num_images, loaded.convention, loaded.dataset) == (None, None, None)
    assert loaded[POOL].mu.dtype == loaded[POOL].sigma.dtype == np.float64


def test_statistics_that_do_not_fit_are_refused_in_one_line(tmp_path):
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    whole = write_arrays(tmp_path / "whole.npz", **good).read_bytes()
    files = {
        "not a file": tmp_path / "missing.npz",
        "holds no": write_arrays(tmp_path / "keys.npz", mu=np.zeros(3)),
        "not of 3 features": write_arrays(tmp_path / "features.npz", mu=np.zeros(4), sigma=np.eye(4)),
        r"sigma \(3,\)": write_arrays(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.zeros(3)),
        "NaN": write_arrays(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3)),
    }
    broken = {
        "half.npz": whole[: len(whole) // 2],
        "empty.npz": b"",
        "text.npz": b"mu, sigma",
        "flip.npz": whole.replace(np.eye(3).tobytes(), np.ones((3, 3)).tobytes()),
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "array.npy", np.eye(3))
    strings = write_arrays(tmp_path / "text_arrays.npz", mu=np.array(["a", "b", "c"]), sigma=np.eye(3))
    cases = list(files.items())
    cases += [("not a whole npz", path) for path in (strings, tmp_path / "array.npy", *map(tmp_path.joinpath, broken))]
    for message, path in cases:
        with pytest.raises(UserError, match=message) as raised:
            load_statistics(path, {POOL: 3})
        assert f"--fid_stats={path}" in str(raised.value)
        assert "compute_fid_stats.py --" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_what_would_fail_after_sampling_is_refused_on_loading(rng, tmp_path):
    features = rng.normal(size=(20, 30))
    mu = features.mean(axis=0)
    sigma = np.cov(features, rowvar=False)
    good = {"mu": mu, "sigma": sigma}
    load_statistics(write_arrays(tmp_path / "good.npz", **good), {POOL: 30})
    cases = {
        "`sigma`: the covariance is not symmetric": {"sigma": np.triu(sigma)},
        "`sigma`: .* negative eigenvalue .*float32 at least": {"sigma": sigma.astype(np.float16)},
        "negative eigenvalue": {"sigma": sigma - 2 * np.eye(30)},
        r"`sigma_s` has the shape \(5, 5\), not \(4, 4\)": {"mu_s": np.zeros(4), "sigma_s": np.eye(5)},
        "`sigma_s`: the covariance is not symmetric": {"mu_s": np.zeros(4), "sigma_s": np.triu(np.ones((4, 4)))},
        r"`features` has the shape \(20, 29\)": {"features": features[:, 1:]},
        r"`features` has the shape \(30,\)": {"features": features[0]},
        "`label_counts` are not": {"label_counts": np.array([3, -1])},
        "`label_counts` are not numbers": {"label_counts": np.array([0.5, 1])},
    }
    for message, arrays in cases.items():
        path = write_arrays(tmp_path / "bad.npz", **{**good, **arrays})
        with pytest.raises(UserError, match=f"--fid_stats={path}: .*{message}.*compute_fid_stats.py") as error:
            load_statistics(path, {POOL: 30, SPATIAL: 4})
        assert "\n" not in str(error.value)


def test_adms_files_bring_spatial_statistics(tmp_path):
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.ones(2), "sigma_s": np.eye(2) * 2}
    path = write_arrays(tmp_path / "VIRTUAL.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8), **arrays)
    loaded = load_statistics(path, {POOL: 3, SPATIAL: 2})
    np.testing.assert_array_equal(loaded[SPATIAL].mu, np.ones(2))
    np.testing.assert_array_equal(loaded[SPATIAL].sigma, np.eye(2) * 2)
    assert loaded[POOL].rows is None
    images = write_arrays(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"holds no `mu` and `sigma`; .*compute_fid_stats.py --images"):
        load_statistics(images, {POOL: 3})


def test_edm2s_pickles_load_and_no_other_does(tmp_path):
    sets = {"fid": {"mu": np.arange(3.0), "sigma": np.eye(3)}, "fd_dinov2": {"mu": np.zeros(9), "sigma": np.eye(9)}}
    path = tmp_path / "img512.pkl"
    path.write_bytes(pickle.dumps(sets))
    loaded = load_statistics(path, {POOL: 3})
    np.testing.assert_array_equal(loaded[POOL].mu, np.arange(3.0))
    np.testing.assert_array_equal(loaded[POOL].sigma, np.eye(3))
    assert len(loaded.sha256) == 64
    for content in (pickle.dumps({"dino": sets["fid"]}), pickle.dumps(sets)[:99]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="--fid_stats"):
            load_statistics(path, {POOL: 3})
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return ran.touch, ()

    path.write_bytes(pickle.dumps({"fid": Code()}))
    with pytest.raises(UserError, match="not a whole npz") as raised:
        load_statistics(path, {POOL: 3})
    assert "which no array needs" in str(raised.value.__cause__)
    assert not ran.exists()


def test_every_metric_that_the_reference_allows(rng, tmp_path):
    real = rng.normal(size=(40, 4))
    fake = rng.normal(0.3, 1, size=(50, 4))
    real_s = rng.normal(size=(40, 2))
    fake_s = rng.normal(0.5, 1, size=(50, 2))
    samples = images_of(fake, fake_s, max_rows=30)
    save_statistics(tmp_path / "all", images_of(real, real_s, 100), convention="adm", dataset="x")
    write_arrays(tmp_path / "few.npz", mu=real.mean(axis=0), sigma=np.cov(real, rowvar=False))
    metrics = compute_metrics(samples, load_statistics(tmp_path / "all", {POOL: 4, SPATIAL: 2}))
    few = compute_metrics(samples, load_statistics(tmp_path / "few.npz", {POOL: 4}))
    assert list(few) == ["fid"]

    def distance(x, y):
        return frechet_distance(x.mean(axis=0), np.cov(x.T), y.mean(axis=0), np.cov(y.T))

    expected = {"fid": distance(fake, real), "sfid": distance(fake_s, real_s)}
    expected["kid"], expected["kid_error"] = kid(fake[:30], real)
    expected["mind"], expected["mind_error"] = mind(fake[:30], real)
    expected |= prdc(real, fake[:30])
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert few["fid"] == pytest.approx(expected["fid"], rel=1e-9)
    five = compute_metrics(
        images_of(fake[:5], fake_s[:5], 30), load_statistics(tmp_path / "all", {POOL: 4, SPATIAL: 2})
    )
    # No image has five others as its neighbours.
    assert list(five) == ["fid", "sfid", "kid", "kid_error", "mind", "mind_error"]


def test_each_metric_of_few_samples_has_its_caveat(tmp_path, rng):
    features = rng.normal(size=(40, 4))
    save_statistics(tmp_path / "all", images_of(features, features[:, :2], 100), convention="adm", dataset="x")
    reference = load_statistics(tmp_path / "all", {POOL: 4, SPATIAL: 2})
    found = "; ".join(caveats(3, reference, has_logits=True))
    assert "FID: 3 samples are fewer than the 4 features" in found
    assert "sFID" not in found  # it has two
    assert "precision, recall, density and coverage: of 3 samples and 40 images" in found
    assert "KID: 3 samples and 40 images are few" in found
    assert "Inception Score: it grows with the number of samples" in found
    bare = dataclasses.replace(reference[POOL], rows=None)
    assert caveats(5000, dataclasses.replace(reference, by_feature={POOL: bare}), has_logits=True) == []


def test_a_convention_is_known_or_asked_for(tmp_path, rng):
    write_arrays(tmp_path / "bare.npz", mu=np.zeros(4), sigma=np.eye(4))
    bare = load_statistics(tmp_path / "bare.npz", {POOL: 4})
    with pytest.raises(UserError, match=r"--fid_stats=.*bare.npz does not record .* --convention pytorch_fid"):
        find_convention(bare, None)
    assert find_convention(bare, "pytorch_fid") == ("pytorch_fid", "flag")
    recorded = dataclasses.replace(bare, convention="adm")
    assert find_convention(recorded, None) == find_convention(recorded, "adm") == ("adm", "file")
    with pytest.raises(UserError, match=r"--convention=pytorch_fid, but .* was made under adm"):
        find_convention(recorded, "pytorch_fid")


def test_files_in_use_are_recognised(shared):
    reference = load_statistics(shared / "data" / "cifar10_train_stats_pytorch_fid.npz")
    assert find_convention(reference, None) == ("pytorch_fid", "known file")


def test_samples_of_another_size_than_the_reference_are_reported(tmp_path, rng, capsys):
    features = rng.normal(size=(10, 4))
    statistics = images_of(features, features[:, :2], 0)
    save_statistics(tmp_path / "s.npz", statistics, convention="adm", dataset="x", image_shape=(64, 64, 3))
    reference = load_statistics(tmp_path / "s.npz", {POOL: 4})
    warn_of_other_shape(reference, [64, 64, 3])
    assert capsys.readouterr().err == ""
    warn_of_other_shape(reference, (32, 32, 3))
    assert "is of 64x64x3 images, the samples are 32x32x3" in capsys.readouterr().err


def test_the_inception_score_needs_logits(rng):
    logits = rng.normal(size=(4, 6))
    statistics = ImageStatistics(0, logits)
    features = rng.normal(size=(20, 4))
    statistics.update({"pool": features})
    exponentials = np.exp(features @ logits)
    score = InceptionScore()
    score.update(exponentials / exponentials.sum(axis=1, keepdims=True))
    reference = ReferenceStatistics({POOL: FeatureReference(np.zeros(4), np.eye(4))}, "", Path("x"))
    metrics = compute_metrics(statistics, reference)
    assert (metrics["inception_score"], metrics["inception_score_std"]) == pytest.approx(score.mean_and_std)


def test_published_statistics_load_and_make_gaussians(shared):
    loaded = load_statistics(shared / "data" / "cifar10_train_stats_pytorch_fid.npz")
    mu = loaded[POOL].mu
    sigma = loaded[POOL].sigma
    assert (mu.shape, sigma.shape, loaded.convention) == ((2048,), (2048, 2048), None)
    mu, sigma = mu[:200], sigma[:200, :200]  # of some of the features: all would take half a minute
    assert frechet_distance(mu, sigma, mu + 0.1, sigma) == pytest.approx(200 * 0.1**2, rel=1e-6)
    assert frechet_distance(mu, sigma, mu, 4 * sigma) == pytest.approx(np.trace(sigma), rel=1e-6)


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD by its definition, pair by pair (Gretton et al. 2012, eq. 3)."""

    def kernel(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    n = len(x)
    m = len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_is_its_definition():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 7))
    y = rng.normal(0.3, 1.2, size=(20, 7))
    value, error = kid(x, y)  # sets below a subset are taken whole
    assert value == pytest.approx(polynomial_mmd(x, y), rel=1e-10)
    assert (value, error) == pytest.approx(kid(x, y, num_subsets=1), rel=1e-10)
    assert kid(x[:3], y)[1] is None  # too few for an error


def test_kernel_distance_draws_the_subsets_of_torch_fidelity():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 5))
    y = rng.normal(0.5, 1, size=(50, 5))
    draw = np.random.RandomState(2020)
    values = [polynomial_mmd(x[draw.choice(60, 12, False)], y[draw.choice(50, 12, False)]) for _ in range(8)]
    value, _ = kid(x, y, num_subsets=8, subset_size=12)
    assert value == pytest.approx(np.mean(values), rel=1e-10)


@pytest.mark.parametrize("shift", [0, 0.3])
@pytest.mark.parametrize("sizes", [(40, 60), (20, 400), (150, 120)])
def test_the_error_of_the_kernel_distance_is_its_deviation_over_draws_of_both_sets(sizes, shift):
    rng = np.random.default_rng(6)
    (n, m) = sizes
    draws = [(rng.normal(shift, 1, size=(n, 16)), rng.normal(size=(m, 16))) for _ in range(250)]
    values, errors = zip(*(kid(x, y, num_subsets=8, subset_size=50) for x, y in draws), strict=True)
    # The deviation of 250 values is itself known to 5 to 10 %.
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)


def test_kernel_distance_of_one_distribution_is_unbiased():
    rng = np.random.default_rng(2)
    values = [kid(*rng.normal(size=(2, 40, 6)), num_subsets=1)[0] for _ in range(300)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 5 * np.std(values) / 300**0.5


def balls(points: np.ndarray, k: int) -> list[tuple[np.ndarray, float]]:
    """Each point with the distance to its k-th nearest other point."""
    return [(p, sorted(np.linalg.norm(q - p) for q in points)[k]) for p in points]  # place 0 is the point itself


def test_manifold_metrics_are_their_definitions():
    rng = np.random.default_rng(3)
    real = rng.normal(size=(40, 3))
    fake = rng.normal(0.8, 0.7, size=(30, 3))
    real_3 = balls(real, 3)
    fake_3 = balls(fake, 3)
    real_5 = balls(real, 5)
    inside = np.array([[np.linalg.norm(y - x) <= radius for x, radius in real_5] for y in fake])
    expected = {
        "precision": np.mean([any(np.linalg.norm(y - x) <= radius for x, radius in real_3) for y in fake]),
        "recall": np.mean([any(np.linalg.norm(x - y) <= radius for y, radius in fake_3) for x in real]),
        "density": inside.sum() / (5 * len(fake)),
        "coverage": inside.any(axis=0).mean(),
    }
    assert 0 < expected["recall"] < expected["precision"] < 1
    assert prdc(real, fake) == pytest.approx(expected, rel=1e-12)


def test_manifold_metrics_of_the_set_itself_and_of_one_far_away():
    real = np.random.default_rng(4).normal(size=(2100, 2))  # more than one block
    itself = prdc(real, real)
    assert {name: itself[name] for name in ("precision", "recall", "coverage")} == dict.fromkeys(
        ("precision", "recall", "coverage"), 1
    )
    assert itself["density"] == pytest.approx((5 + 1) / 5, abs=0.2)  # a ball holds its centre and five neighbours
    assert prdc(real, real + 100) == dict.fromkeys(("precision", "recall", "density", "coverage"), 0)


def test_sets_that_are_too_small_or_of_another_width_are_refused():
    with pytest.raises(ValueError, match="more than 5"):
        prdc(np.zeros((5, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="cannot be compared"):
        kid(np.zeros((5, 2)), np.zeros((5, 3)))


def test_inception_score_is_its_definition_over_parts():
    rng = np.random.default_rng(5)
    probabilities = rng.dirichlet(np.ones(6), size=25)
    score = InceptionScore(split_size=10)
    for batch in np.split(probabilities, [3, 11, 24]):
        score.update(batch)
    expected = []
    for part in (probabilities[:10], probabilities[10:20], probabilities[20:]):
        divergences = (part * (np.log(part) - np.log(part.mean(axis=0)))).sum(axis=1)
        expected.append(np.exp(divergences.mean()))
    assert score.mean_and_std == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-12)


def test_inception_score_of_certain_and_equal_classes_is_their_number():
    score = InceptionScore()
    score.update(np.eye(8).repeat(3, axis=0))
    assert score.mean_and_std[0] == pytest.approx(8)
    with pytest.raises(UserError, match="no samples"):
        _ = InceptionScore().mean_and_std


@pytest.fixture
def marked_images(tmp_path, monkeypatch):
    """npz of 60 images, each of its own grey, and 3 classes in order, whose features are read off the pixels."""
    greys = np.arange(60, dtype=np.uint8)
    images = np.broadcast_to(greys[:, None, None, None], (60, 4, 4, 1))
    np.savez(tmp_path / "marked.npz", images=images, labels=greys.astype(np.int32) // 20)

    def extract(batch):
        pool = np.asarray(batch)[:, 0, 0].astype(np.float32)
        return {"pool": pool, "spatial": pool[:, :2]}

    monkeypatch.setattr(compute_fid_stats, "load_extractors", lambda *_, **__: {"inception": extract})
    return tmp_path / "marked.npz"


def test_fewer_images_are_drawn_at_random_from_all_classes(marked_images, read_flags, tmp_path, capsys):
    def make(*words):
        config = read_flags(compute_fid_stats, [*words, "--out", str(tmp_path / "made.npz"), "--batch_size", "8"])
        compute_fid_stats.main(config)
        return dict(np.load(tmp_path / "made.npz"))

    data = ["--dataset_name", f"npz:{marked_images}"]
    whole = make(*data)
    part = make(*data, "--num_images", "20")
    total = int(whole["num_images"])
    assert (part["num_images"], part["total_images"], whole["total_images"]) == (20, total, total)
    assert f"(20 of {total} images of npz:" in capsys.readouterr().err
    greys = part["features"][:, 0]
    assert len(set(greys)) == 20
    assert greys.max() > 40  # the first 20 would be of one class
    np.testing.assert_array_equal(part["label_counts"], np.bincount(greys.astype(int) // 20, minlength=3))
    np.testing.assert_array_equal(part["features"], make(*data, "--num_images", "20")["features"])
    own = make("--images", str(marked_images), "--num_images", "21")
    assert own["features"].shape == (21, 3)
    assert len(set(own["features"][:, 0])) == 21
    assert 25 < own["features"].mean() < 35
    with pytest.raises(UserError, match=rf"--num_images=61: {marked_images} holds 60"):
        make("--images", str(marked_images), "--num_images", "61")


def test_statistics_are_of_the_split_and_hold_what_the_flags_say(marked_images, read_flags, tmp_path, monkeypatch):
    asked = []
    extractors = compute_fid_stats.load_extractors()

    def load_extractors(names, weights, convention, sharding):
        asked.append((weights, convention))
        return extractors

    monkeypatch.setattr(compute_fid_stats, "load_extractors", load_extractors)
    with np.load(marked_images) as file:
        images = file["images"]
        labels = file["labels"]
    validation = {"validation_images": images[:30] + np.uint8(100), "validation_labels": labels[:30]}
    np.savez(tmp_path / "splits.npz", images=images, labels=labels, **validation)

    def make(line):
        words = f"--dataset_name npz:{tmp_path / 'splits.npz'} --split validation --out {tmp_path / 'made.npz'} {line}"
        compute_fid_stats.main(read_flags(compute_fid_stats, words.split()))
        return dict(np.load(tmp_path / "made.npz"))

    part = make("--num_features 5 --convention pytorch_fid --inception_weights weights.pt --batch_size 8")
    assert asked == [("weights.pt", "pytorch_fid")]
    assert (part["num_images"], part["convention"]) == (30, "pytorch_fid")
    np.testing.assert_array_equal(part["features"][:, 0], range(100, 105))
    np.testing.assert_allclose(part["mu"], 114.5)
    np.testing.assert_array_equal(part["label_counts"], [20, 10, 0])
    assert "mu" not in make("--compact 1")
