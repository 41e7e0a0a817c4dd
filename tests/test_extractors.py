"""A feature network registered from outside: its statistics, its metric, and an evaluation that takes it alone."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import compute_fid_stats
import eval_fid
from utils.base.messages import UserError
from utils.images.samples import SampleWriter
from utils.metrics.extractors import EXTRACTORS, POOL, Extractor, FeatureKey, feature_widths, load_extractors
from utils.metrics.metrics import METRICS, Metric, compute_metrics, frechet_metric
from utils.metrics.reference import load_statistics
from utils.metrics.statistics import ImageStatistics
from utils.metrics.statistics_files import save_statistics

COLOUR = FeatureKey("colour", "mean")


def load_colour(weights, convention, sharding):
    """Mean colour, as numbers in [0, 1], and a projection of all pixels."""
    assert weights is None
    assert convention is None

    def extract(images):
        pixels = images.astype(jnp.float32) / 255
        projection = np.random.default_rng(0).normal(size=(pixels[0].size, 2)).astype(np.float32)
        return {"mean": pixels.mean((1, 2)), "projection": pixels.reshape(len(pixels), -1) @ projection}

    return extract


@pytest.fixture(autouse=True)
def colour(monkeypatch):
    monkeypatch.setitem(EXTRACTORS, "colour", Extractor({"mean": 3, "projection": 2}, load_colour, sha256="c0"))
    metrics = list(METRICS)
    METRICS.append(Metric(frechet_metric("fd_colour"), {"fd_colour": "FD (colour)"}, COLOUR))
    yield
    METRICS[:] = metrics


def flat_images(greys: np.ndarray) -> np.ndarray:
    """One image of each grey, uint8 (n, 4, 4, 1)."""
    return np.broadcast_to(greys.astype(np.uint8)[:, None, None, None], (len(greys), 4, 4, 1))


def write_images(path, greys):
    with SampleWriter(path, len(greys)) as writer:
        writer.write(flat_images(greys), np.zeros(len(greys), np.int32))
    return path


# Greys of mean 100 and 160 whose standard deviations (divisor n - 1) are in the ratio 1 to 3.
SPREAD = np.array([-1, -1, 1, 1, 0, 0]) * 10
REFERENCE = 100 + SPREAD
SAMPLES = 160 + 3 * SPREAD


def expected_distance() -> float:
    """Of two Gaussians along the direction (1, 1, 1): (difference of the means)^2 + (difference of the deviations)^2,
    three times, as the three channels are equal."""
    deviation = np.std(SPREAD, ddof=1) / 255
    return 3 * ((60 / 255) ** 2 + (2 * deviation) ** 2)


def test_it_is_scored_from_images_to_a_row(read_flags, tmp_path, capsys):
    reference = write_images(tmp_path / "a.npz", REFERENCE)
    samples = write_images(tmp_path / "b.npz", SAMPLES)
    words = ["--images", str(reference), "--out", str(tmp_path / "stats.npz"), "--extractor", "colour"]
    compute_fid_stats.main(read_flags(compute_fid_stats, words))
    with np.load(tmp_path / "stats.npz") as file:
        assert {"colour.mean.mu", "colour.mean.sigma", "colour.mean.rows", "colour.projection.mu"} <= set(file)
        assert not {"mu", "sigma", "features", "convention"} & set(file)
        assert file["colour.sha256"] == "c0"

    def score(statistics):
        words = ["--samples", str(samples), "--fid_stats", str(statistics), "--extractor", "colour"]
        eval_fid.main(read_flags(eval_fid, words))
        return json.loads((tmp_path / "b_fid" / "fid.json").read_text())["cells"][-1]

    row = score(tmp_path / "stats.npz")
    assert row["fd_colour"] == pytest.approx(expected_distance(), rel=1e-5)
    assert "fid" not in row
    assert (row["extractor"], row["extractor_sha256"]) == (["colour"], ["c0"])
    assert (row["convention"], row["inception_sha256"]) == (None, None)
    assert "FD (colour)" in capsys.readouterr().out
    # The reference may be the images themselves.
    assert score(reference)["fd_colour"] == pytest.approx(row["fd_colour"], rel=1e-9)


def measure(images, *names) -> ImageStatistics:
    statistics = ImageStatistics()
    rgb = jnp.asarray(images).repeat(3, axis=-1)
    for name, extract in load_extractors(names).items():
        statistics.update({feature: np.asarray(rows) for feature, rows in extract(rgb).items()}, name)
    return statistics


def test_features_are_those_that_are_declared():
    (extract,) = load_extractors(["colour"]).values()
    message = r"--extractor=colour makes mean \(6, 5\), projection \(6, 2\) of 6 images, but .* mean \(b, 3\)"
    with pytest.raises(UserError, match=message):
        extract(jnp.zeros((6, 4, 4, 5), jnp.uint8))


def test_statistics_of_two_extractors_share_a_file(tmp_path):
    """Each metric finds the feature that it needs."""
    both = [measure(flat_images(greys), "colour") for greys in (REFERENCE, SAMPLES)]
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 4))
    for statistics, shift in zip(both, (0, 2), strict=True):
        statistics.update({"pool": features + shift})
    save_statistics(tmp_path / "both.npz", both[0], convention="adm", dataset="x")
    loaded = load_statistics(tmp_path / "both.npz", {POOL: 4, **feature_widths(["colour"])})
    results = compute_metrics(both[1], loaded)
    assert results["fid"] == pytest.approx(4 * 2**2)
    assert results["fd_colour"] == pytest.approx(expected_distance(), rel=1e-5)


def test_statistics_of_another_extractor_are_refused(tmp_path):
    colour = tmp_path / "colour.npz"
    save_statistics(colour, measure(flat_images(REFERENCE), "colour"), convention=None, dataset="x")
    inception = tmp_path / "inception.npz"
    np.savez(inception, mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    with pytest.raises(UserError, match=r"--fid_stats=.*holds statistics of colour, none of inception; .* NAME --out"):
        load_statistics(colour)
    with pytest.raises(UserError, match=r"statistics of inception, none of colour; .* --extractor colour --") as error:
        load_statistics(inception, feature_widths(["colour"]))
    assert "\n" not in str(error.value)

    # The command that makes what is missing makes all that was asked for.
    with pytest.raises(UserError, match=r"statistics of inception, none of colour; .* --extractor inception,colour --"):
        load_statistics(inception, feature_widths(["inception", "colour"]))
    with pytest.raises(UserError, match=r"x.npz is not a file; make it: .* --dataset_name NAME --extractor colour --"):
        load_statistics(tmp_path / "x.npz", feature_widths(["colour"]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--extractor clip", "--extractor=clip is unknown; known are inception, dinov2, colour"),
        ("--extractor=", "--extractor= is unknown"),
        ("--extractor colour,", "--extractor=colour,: an empty name is unknown"),
        ("--extractor colour --convention adm", "--convention=adm has no effect without inception in --extractor"),
    ],
)
def test_flags_of_extractors_are_checked(read_flags, line, message):
    with pytest.raises(UserError, match=message):
        eval_fid.main(read_flags(eval_fid, ["--samples", "x.npz", "--fid_stats", "y.npz", *line.split()]))
