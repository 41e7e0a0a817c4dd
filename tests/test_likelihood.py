"""Likelihoods against closed forms, the published solver's numbers and the exact trace."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import likelihood
from tests.conftest import GOLDEN
from tests.test_bad_input import write_pairs
from tests.test_generate import run  # noqa: F401 (fixture)
from utils.base.messages import UserError, WriteError
from utils.data.dataset import ArraySource, ImageDataset
from utils.data.loaders import LOADERS, Loader, load_dataset
from utils.images.pixels import PixelFormat
from utils.runs.opening import load_generator
from utils.sampling import density
from utils.sampling.density import (
    LikelihoodConfig,
    adaptive_log_likelihood,
    bits_per_dim,
    divergence,
    draw_probes,
    midpoint_log_likelihood,
)

MEAN = jnp.asarray(np.array([2.0409191, -2.555665, 0.4180988, -0.5677696], np.float32))
STD = 0.5


def gaussian_field(labels=None):
    """Returns the velocity of data N(m, s^2 I)."""

    def velocity_fn(x, t, t_next):
        t = t[:, None]
        variance = (1 - t) ** 2 + t**2 * STD**2
        return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)

    return velocity_fn


def gaussian_log_p(x):
    return -0.5 * (((x - MEAN) / STD) ** 2).sum(axis=1) - 4 * np.log(STD * np.sqrt(2 * np.pi))


X = jnp.asarray(np.asarray(MEAN) + np.float32(STD) * np.random.default_rng(0).standard_normal((6, 4), np.float32))
LABELS = jnp.asarray(np.zeros(6, np.int32))


def test_of_a_gaussian_it_is_the_closed_form_to_a_thousandth_of_a_bit():
    found = adaptive_log_likelihood(gaussian_field, X, LABELS, None)
    np.testing.assert_allclose(found.log_p, gaussian_log_p(X), atol=4e-3 * np.log(2))  # of four elements
    np.testing.assert_allclose(found.x_0, (X - MEAN) / STD, atol=1e-4)
    assert 30 < found.nfe.min() <= found.nfe.max() < 100


def test_hutchinson_is_exact_where_the_jacobian_is_diagonal_up_to_signs():
    probes = draw_probes(jax.random.key(1), jnp.arange(6), (4,), 2)
    assert set(np.unique(probes)) == {-1.0, 1.0}
    exact, estimated = (adaptive_log_likelihood(gaussian_field, X, LABELS, p) for p in (None, probes))
    np.testing.assert_allclose(estimated.log_p, exact.log_p, atol=1e-4)


def test_hutchinson_is_unbiased_within_its_standard_error():
    matrix = jax.random.normal(jax.random.key(2), (4, 4))

    def velocity_fn(x, t, t_next):
        return jnp.sin(x @ matrix)

    _, exact = divergence(velocity_fn, X, jnp.zeros(6), None)
    jacobians = jax.vmap(jax.jacobian(lambda x: jnp.sin(x @ matrix)))(X)
    np.testing.assert_allclose(exact, np.trace(jacobians, axis1=1, axis2=2), rtol=1e-4)
    probes = draw_probes(jax.random.key(3), jnp.arange(6), (4,), 500)
    estimates = jax.jit(jax.vmap(lambda probe: divergence(velocity_fn, X, jnp.zeros(6), probe[None])[1]))(probes)
    errors = estimates.std(axis=0) / np.sqrt(len(estimates))
    assert (np.abs(estimates.mean(axis=0) - exact) < 4 * errors).all()
    np.testing.assert_allclose(divergence(velocity_fn, X, jnp.zeros(6), probes)[1], estimates.mean(axis=0), rtol=1e-3)


@pytest.mark.parametrize("dit", ["dit_latent_small"])
def test_through_the_network_it_is_that_of_the_published_solver(dit, shared):
    """Midpoint rule of flow_matching in float64, around the golden DiT; nats."""
    from tests.test_diffusion_transformer import DiT, DiTConfig, import_jax_flow_params, model_fn

    golden = dict(np.load(GOLDEN / f"{dit}.npz"))
    published = np.load(shared / "golden" / "next" / "likelihood_dit.npz")
    names = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes")
    sizes = {name: int(golden[f"meta/{name}"]) for name in names}
    network = DiT(DiTConfig(class_dropout_prob=0.1, dtype="float32", **sizes))
    flat = {name.removeprefix("params/"): value for name, value in golden.items() if name.startswith("params/")}
    function = model_fn(network, jax.tree.map(jnp.asarray, import_jax_flow_params(flat)))
    count = int(published["num_examples"])
    x_1 = jnp.asarray(golden["x_1"][:count])
    labels = jnp.asarray(golden["labels"][:count])
    signs = jnp.asarray(published["signs"], jnp.float32)[None]

    def velocity_fn(x, t, t_next):
        return function(x, t, labels)

    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda x, e: midpoint_log_likelihood(velocity_fn, x, e, int(published["num_steps"])))(
            x_1, signs
        )
        t = jnp.full(count, published["divergence_t"], jnp.float32)
        _, exact = jax.jit(lambda x: divergence(velocity_fn, x, t, None))(x_1)
    np.testing.assert_allclose(found.log_p, published["hutchinson_log_p"], atol=1e-3)
    np.testing.assert_allclose(found.x_0, published["hutchinson_x_0"], atol=1e-4)
    np.testing.assert_allclose(exact, published["divergence_at_x_1"], atol=1e-3)


def test_dequantised_levels_stay_apart_and_bits_count_them():
    images = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    x = density.dequantise(jax.random.key(0), jnp.arange(1), images)
    np.testing.assert_array_equal(jnp.round((x + 1) * 127.5), images)
    assert np.abs((x + 1) * 127.5 - images).mean() == pytest.approx(0.25, abs=0.03)
    # Uniform noise over the 256 levels has the density 1 / (256 / 127.5) in each element: eight bits.
    log_p = jnp.array([-256 * np.log(256 / 127.5)])
    np.testing.assert_allclose(bits_per_dim(log_p, 256), 8, rtol=1e-5)


@pytest.fixture
def measure(read_flags, run, tmp_path, capsys):  # noqa: F811
    """measure('--flag value ...') -> what the program prints as JSON."""

    def start(line):
        likelihood.main(read_flags(likelihood, ["--load_dir", str(run), "--json", "-", *line.split()]))
        (result,) = json.loads(capsys.readouterr().out)
        return result

    return start


def test_the_program_measures_images_one_by_one(measure, run, tmp_path):  # noqa: F811
    words = "--solver midpoint --denoise_timesteps 4 --num_images 6 --seed 2"
    result = measure(f"{words} --per_image {tmp_path}/a.csv --batch_size 6")
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = np.array([float(row["bits_per_dim"]) for row in rows])
    dataset = load_dataset("digits", "validation")
    assert [int(row["label"]) for row in rows] == [int(dataset.row(i, False)["condition"]) for i in range(6)]
    assert result["bits_per_dim"] == pytest.approx(values.mean())
    assert result["standard_error"] == pytest.approx(values.std(ddof=1) / np.sqrt(6))
    assert (result["nfe"], result["num_images"], result["labels"]) == (8, 6, "data")
    # Image i depends on its number, not on its batch.
    measure(f"{words} --per_image {tmp_path}/b.csv --batch_size 4")
    with (tmp_path / "b.csv").open() as file:
        again = np.array([float(row["bits_per_dim"]) for row in csv.DictReader(file)])
    np.testing.assert_allclose(again, values, atol=1e-3)
    assert measure(f"{words} --labels none")["bits_per_dim"] != result["bits_per_dim"]


def test_a_result_that_cannot_be_written_is_printed_first(run, read_flags, tmp_path, full_disk, monkeypatch, capsys):  # noqa: F811
    line = f"--solver midpoint --denoise_timesteps 1 --num_images 8 --json {tmp_path}/a.json"
    measured = likelihood.Measurement.measure

    def fill_disk(measurement):
        rows = measured(measurement)
        full_disk(100)
        return rows

    monkeypatch.setattr(likelihood.Measurement, "measure", fill_disk)
    message = r"a\.json could not be written \(File too large\); the result is above; raise the limit"
    with pytest.raises(WriteError, match=message):
        likelihood.main(read_flags(likelihood, ["--load_dir", str(run), *line.split()]))
    assert "| 8 | digits, validation | data |" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_pairs_are_no_images(measure, tmp_path):
    with pytest.raises(UserError, match=r"--dataset_name=pairs:.* holds pairs of noise and samples, no images"):
        measure(f"--dataset_name pairs:{write_pairs(tmp_path / 'few')}")


def test_floats_are_no_images_of_a_run_of_bytes(measure, monkeypatch):
    source = ArraySource(np.zeros((4, 8, 8, 2), np.float32), np.zeros(4, np.int32))
    pixels = PixelFormat("float32", 0, 1)

    def load(name, split, options):
        return ImageDataset(name, split, source, (8, 8, 2), ("a",), False, source.fingerprint(), pixels=pixels)

    monkeypatch.setitem(LOADERS, "floats", Loader(load))
    with pytest.raises(UserError, match=r"--dataset_name=floats: likelihoods are of uint8 .* float32 in 0 .. 1 with 2"):
        measure("--dataset_name floats")


def test_other_images_are_fitted_to_the_run(measure, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(tmp_path / f"{number}.png")
    words = f"--dataset_name folder:{tmp_path} --solver midpoint --denoise_timesteps 2 --split train"
    result = measure(words)
    assert (result["num_images"], result["labels"], result["nfe"]) == (2, "none", 4)
    # The network has hardly learned, so its Jacobian's trace is small: an estimate of it errs little.
    assert measure(f"{words} --num_probes 0")["bits_per_dim"] == pytest.approx(result["bits_per_dim"], abs=0.05)
    with pytest.raises(UserError, match="--labels=data: the classes of the data set are not the run's"):
        measure(f"{words} --labels data")


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("--rtol 1e-3 --atol 1e-4", LikelihoodConfig(3, None, 1e-3, 1e-4)),
        ("--solver midpoint --denoise_timesteps 7", LikelihoodConfig(3, 7, 1e-5, 1e-5)),
    ],
)
def test_what_is_measured_is_what_the_flags_say(measure, run, monkeypatch, words, method):  # noqa: F811
    calls = []

    def note(params, codec, key, batch, indices, *, network, objective, config, is_pixels):
        calls.append((params, key, network, config))
        return np.zeros(len(batch.condition)), np.zeros(len(batch.condition), int)

    monkeypatch.setattr(likelihood, "measure_batch", note)
    words += " --num_probes 3 --seed 5 --params raw --dtype bfloat16 --num_images 5 --batch_size 2"
    result = measure(words)
    params, key, network, config = calls[0]
    assert (len(calls), config, network.config.dtype) == (3, method, "bfloat16")
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(5)))
    jax.tree.map(np.testing.assert_array_equal, params, load_generator(run, params="raw").params)
    recorded = {"num_probes": 3, "seed": 5, "params": "raw", "dtype": "bfloat16", "num_steps": method.num_steps}
    assert recorded.items() <= result.items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_images 400", r"--num_images=400: the split holds 297; use 297 or fewer"),
        ("--denoise_timesteps 5", r"--denoise_timesteps=5 has no effect with --solver=dopri5"),
        ("--solver midpoint --rtol 1e-3", r"--rtol=0.001 has no effect with --solver=midpoint"),
        ("--batch_size 0", r"--batch_size=0: use 1 or a multiple of it"),
        ("--dataset_name folder:/nowhere", r"there is no folder /nowhere"),
    ],
)
def test_bad_input_of_the_program_is_one_line(measure, words, message):
    with pytest.raises(UserError, match=message):
        measure(words)
