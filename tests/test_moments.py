"""Metrics of the images themselves: their moments against NumPy's, and programs that score any array by them."""

import json

import numpy as np
import pytest

import compute_fid_stats
import eval_fid
from utils.base.mesh import make_mesh
from utils.base.messages import UserError
from utils.data.loaders import load_dataset
from utils.metrics import inception, pixels
from utils.metrics.extractors import PIXELS
from utils.metrics.metrics import METRICS, Metric, choose_metrics
from utils.metrics.pixels import PixelReference, PixelStatistics, compute_moments, explain_moments, mode_radii
from utils.metrics.reference import load_statistics
from utils.runs.settings import EvaluationConfig
from utils.training.reference import load_reference

SHAPES = [(8, 8, 1), (24, 40, 4), (9, 13, 2), (1, 16, 1), (3, 10, 1)]


def random_images(shape, count=30, seed=0) -> np.ndarray:
    """Images with power at all radii, falling from the lowest, on a mean far above their spread."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, *shape))
    return (300 + noise + np.roll(noise, 1, 1) + np.roll(noise, 1, 2)).astype(np.float32)


def measure(images) -> PixelStatistics:
    statistics = PixelStatistics()
    for batch in np.split(images, [7, 8]):
        statistics.update(batch)
    return statistics


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_are_those_of_numpy(shape, monkeypatch):
    monkeypatch.setattr(pixels, "MAX_MODES_AT_ONCE", 4 * np.prod(shape))  # batches are taken in parts
    images = random_images(shape)
    found = measure(images)
    exact = images.astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, exact.std(0, ddof=1), rtol=1e-9)

    # The whole plane of frequencies, one by one, each in the ring of its radius.
    height, width, channels = shape
    power = np.mean(np.abs(np.fft.fft2(exact, axes=(1, 2))) ** 2, axis=0) / (height * width)
    side = height if height >= 8 else width  # the shorter side, unless it is too short
    rings: dict[int, list] = {}
    for y, row in enumerate(power):
        for x, mode in enumerate(row):
            if (y, x) != (0, 0):
                cycles = side * np.sqrt((min(y, height - y) / height) ** 2 + (min(x, width - x) / width) ** 2)
                rings.setdefault(max(1, round(cycles)), []).append(mode)
    assert sorted(rings) == list(range(1, len(rings) + 1))
    expected = np.stack([np.mean(rings[radius], axis=0) for radius in sorted(rings)])
    assert expected.shape == (len(rings), channels)
    np.testing.assert_allclose(found.spectrum, expected, rtol=1e-5)


def test_a_wave_has_the_radius_of_its_cycles():
    """A cos(2 pi k x / w) has the power (A / 2)^2 h w in two modes: Parseval's A^2 / 2 per pixel."""
    x = np.arange(32)
    waves = np.stack([6 * np.cos(2 * np.pi * 5 * x / 32 + phase) for phase in (0, 1)]).astype(np.float32)
    images = np.broadcast_to(waves[:, None, :, None], (2, 32, 32, 1))
    statistics = PixelStatistics()
    statistics.update(images)
    num_modes = np.bincount(np.rint(32 * np.hypot(*np.meshgrid(*[np.fft.fftfreq(32)] * 2))).astype(int).ravel())[5]
    assert statistics.spectrum[4, 0] == pytest.approx(2 * 3**2 * 32 * 32 / num_modes, rel=1e-5)
    np.testing.assert_allclose(np.delete(statistics.spectrum, 4, axis=0), 0, atol=1e-8)
    assert mode_radii(16, 40).ravel()[1] == 1  # below half a cycle of the shorter side, and yet not the mean


def test_errors_of_images_that_are_shifted_and_scaled():
    """About its mean image, a set scaled by 1.1 has 1.21 times the power, if that image has none."""
    images = random_images((16, 12, 2))
    images -= images.mean(0)
    reference = measure(images)
    deviation = np.sqrt(np.mean(images.astype(np.float64).var(0, ddof=1)))
    found = compute_moments(measure(1.1 * images + np.float32(0.25)), reference)
    assert found == {
        "mean_error": pytest.approx(0.25, rel=1e-4),
        "std_error": pytest.approx(0.1 * deviation, rel=1e-4),
        "spectrum_error": pytest.approx(21, rel=1e-3),
        "spectrum_worst": pytest.approx(21, rel=1e-3),
    }
    assert compute_moments(reference, reference) == dict.fromkeys(found, 0)


def test_weak_radii_and_other_units_of_a_channel_do_not_count():
    """A deviation counts where there is a hundredth of the channel's own peak, each channel as much as the other."""
    spectrum = np.array([[100.0, 1e-6], [1.0, 1e-7], [0.9, 1e-9]])
    other = spectrum * [[1, 1.3], [1.2, 1.1], [50, 50]]
    mean = np.zeros((9, 9, 2))
    samples, reference = (PixelReference(mean, mean + 1, each, 50, "float32") for each in (other, spectrum))
    found = compute_moments(samples, reference)
    assert found["spectrum_error"] == pytest.approx((0 + 20) / 4 + (30 + 10) / 4)
    assert found["spectrum_worst"] == pytest.approx(30)
    # The difference of two means of 50 has the variance 1/50 + 1/50.
    assert explain_moments(50, reference) == "mean error: 0.2 by chance, of 50 samples and 50 images"


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (random_images((1, 1, 3)), "spectrum: images of 1x1 have none"),
        (np.full((30, 4, 4, 1), 7, np.uint8), "spectrum: each image of the reference is of one value"),
    ],
)
def test_without_a_spectrum_the_other_moments_stay(images, reason):
    found = measure(images)
    assert compute_moments(found, found) == {"mean_error": 0, "std_error": 0}
    assert explain_moments(30, found).endswith(reason)


def test_the_first_images_are_kept_for_metrics_that_look_at_them():
    statistics = PixelStatistics(max_bytes=10 * 16 + 3)
    images = np.arange(20 * 16, dtype=np.uint8).reshape(20, 4, 4, 1)
    for batch in np.split(images, 5):
        statistics.update(batch)
    np.testing.assert_array_equal(statistics.images, images[:10])


def test_values_that_are_not_finite_are_counted():
    images = random_images((4, 4, 1))
    images[[8, 9], 0, 0, 0] = np.nan, np.inf
    with pytest.raises(UserError, match=r"^2 of 22 images after sample 8 have values that are NaN or infinite"):
        measure(images)


# --- Programs ---


@pytest.fixture
def fields(tmp_path, monkeypatch):
    """Files of float images of four channels, and no Inception."""

    def refuse(*arguments):
        raise AssertionError("Inception is loaded")

    monkeypatch.setattr(inception, "load_inception", refuse)
    np.savez(tmp_path / "data.npz", images=random_images((24, 40, 4)), conditions=np.zeros((30, 2)))
    np.savez(tmp_path / "samples.npz", arr_0=random_images((24, 40, 4), 20, seed=1), arr_1=np.zeros(20))
    np.save(tmp_path / "grey.npy", random_images((24, 40)))
    np.savez(tmp_path / "bytes.npz", arr_0=random_images((24, 40, 4)).astype(np.uint8))
    np.savez(tmp_path / "old.npz", mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    return tmp_path


def run(program, read_flags, folder, line):
    program.main(read_flags(program, line.replace("IN", str(folder)).split()))


def test_floats_are_scored_from_files_to_a_row(fields, read_flags, capsys):
    run(compute_fid_stats, read_flags, fields, "--images IN/data.npz --metrics moments --out IN/s.npz")
    made = load_statistics(fields / "s.npz", {})
    expected = measure(random_images((24, 40, 4)))
    for name in ("mean", "std", "spectrum"):
        np.testing.assert_allclose(getattr(made.pixels, name), getattr(expected, name), rtol=1e-6)
    assert (made.pixels.num_images, made.pixels.dtype, made.image_shape) == (30, "float32", "24x40x4")

    # Against statistics, and against the images themselves.
    samples = measure(random_images((24, 40, 4), 20, seed=1))
    row = compute_moments(samples, expected)
    for reference in ("s.npz", "data.npz"):
        line = f"--samples IN/samples.npz --metrics moments --fid_stats IN/{reference}"
        run(eval_fid, read_flags, fields, line)
        rows = json.loads((fields / "samples_fid" / "fid.json").read_text())["cells"]
        assert rows[-1].items() >= {name: pytest.approx(value, rel=1e-6) for name, value in row.items()}.items()
        assert (rows[-1]["metrics"], rows[-1]["extractor"], rows[-1]["inception_sha256"]) == (["moments"], [], None)
    assert len(rows) == 2
    shown = capsys.readouterr()
    assert "mean error (data's unit)" in shown.out
    assert f" {row['mean_error']:.3g} " in shown.out
    assert "by chance, of 20 samples and 30 images" in shown.err


def test_a_metric_of_ones_own_sees_the_images_of_both_sides(fields, read_flags, monkeypatch):
    def compute_nearest(samples, reference):
        flat = (np.reshape(each.images, (len(each.images), 1, -1)) for each in (samples, reference))
        first, second = flat
        return {"nearest": float(np.sqrt(np.square(first - second.swapaxes(0, 1)).mean(2).min()))}

    metrics = [*METRICS, Metric(compute_nearest, {"nearest": "nearest"}, PIXELS)]
    monkeypatch.setattr("utils.metrics.metrics.METRICS", metrics)
    line = "--samples IN/samples.npz --metrics nearest,moments --fid_stats IN/samples.npz"
    run(eval_fid, read_flags, fields, line)
    (row,) = json.loads((fields / "samples_fid" / "fid.json").read_text())["cells"]
    assert row["nearest"] == 0
    assert row["metrics"] == ["moments", "nearest"]


def test_a_training_scores_what_its_flags_say(fields, read_flags, configure):
    run(compute_fid_stats, read_flags, fields, "--dataset_name digits --metrics moments --out IN/s.npz")
    config = configure(["--save_dir", fields / "run", "--fid_stats", fields / "s.npz", "--metrics", "moments"])
    reference = load_reference(config, make_mesh(), load_dataset("digits"))
    assert (reference.extractors, list(map(str, reference.metrics))) == ({}, ["moments"])
    assert EvaluationConfig().metrics == ("fid",)


def test_pixels_are_asked_for_by_name():
    assert "moments" not in map(str, choose_metrics(None, ["inception"]))
    assert list(map(str, choose_metrics(["moments", "kid"]))) == ["kid", "moments"]


SCORE = "--samples IN/samples.npz --fid_stats IN/data.npz"


@pytest.mark.parametrize(
    ("program", "line", "message"),
    [
        (eval_fid, f"{SCORE} --metrics moment", "--metrics=moment is unknown; did you mean moments"),
        (eval_fid, f"{SCORE} --metrics fid,", "--metrics=fid,: an empty name is unknown"),
        (eval_fid, SCORE, "--samples=.*samples.npz holds float32 images; .* --metrics moments, which takes floats"),
        (eval_fid, f"{SCORE} --metrics fid", "--samples=.*holds float32 images; .* --metrics moments"),
        (eval_fid, f"{SCORE} --metrics moments --extractor inception", "--extractor=inception has no effect beside"),
        (
            eval_fid,
            f"{SCORE} --metrics moments --convention adm",
            "--convention=adm has no effect with --metrics",
        ),
        (
            eval_fid,
            "--samples IN/grey.npy --fid_stats IN/data.npz --metrics moments",
            "--metrics=moments: --fid_stats=.*data.npz is of 24x40x4 images, the samples are 24x40x1",
        ),
        (
            eval_fid,
            "--samples IN/bytes.npz --fid_stats IN/data.npz --metrics moments",
            "is of float32 images, the samples are uint8, of another unit",
        ),
        (
            eval_fid,
            "--samples IN/samples.npz --fid_stats IN/old.npz --metrics moments",
            "--metrics=moments: --fid_stats=.*old.npz holds no moments of pixels; make them by",
        ),
        (
            compute_fid_stats,
            "--images IN/data.npz --out IN/s.npz",
            "--images=.*data.npz holds no arrays that may be uint8 images",
        ),
        (
            compute_fid_stats,
            "--images IN/data.npz --out IN/s.npz --metrics moments --compact 1",
            "--compact=1 has no effect with --metrics of pixels alone",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_line(program, line, message, fields, read_flags):
    with pytest.raises(UserError, match=message) as error:
        run(program, read_flags, fields, line)
    assert "\n" not in str(error.value)
