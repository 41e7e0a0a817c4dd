"""Generated images and Inception features: exactly the number asked for, the same for every batch size."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from utils.base.mesh import make_mesh
from utils.codecs.codec import PixelCodec
from utils.conditions.classes import ClassCondition
from utils.images.pixels import ImageBatch
from utils.metrics import measure
from utils.metrics.extractors import POOL, SPATIAL
from utils.metrics.measure import measure_images, pad_and_shard
from utils.metrics.statistics import ImageStatistics
from utils.networks.dit_config import DiTConfig
from utils.networks.models import init_params, make_model
from utils.objectives.flow_matching import FlowMatching
from utils.runs.scoring import Scoring
from utils.sampling import compiled
from utils.sampling import solvers as sampling
from utils.sampling.compiled import lower_sampler
from utils.sampling.generator import RECIPE_BATCH_SIZE, ImageGenerator
from utils.sampling.solvers import SamplerConfig
from utils.training.evaluation import sample_stages

MODEL = DiTConfig(patch_size=2, num_classes=10, class_dropout_prob=0.1, dtype="float32")


@pytest.fixture(scope="module")
def model():
    return make_model(MODEL, FlowMatching(), PixelCodec(), make_mesh(), (8, 8, 1), ClassCondition(tuple("0123456789")))


@pytest.fixture(scope="module")
def params(model):
    @jax.jit
    def init(key):
        params = init_params(model, key)
        # The last layers start at zero; here the output is to depend on the input.
        return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params)

    return init(jax.random.key(0))


def generate(model, params, batch_size, num_samples=1003, seed=0, **changes):
    sampler = SamplerConfig(3, 2.0)._replace(**changes)
    batches = ImageGenerator(model, params, seed=seed).generate(sampler, num_samples, batch_size)
    images, labels = zip(*(batch.to_host() for batch in batches), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def test_exactly_the_number_asked_for_and_the_same_for_every_batch_size(model, params):
    images, labels = generate(model, params, 128)
    assert images.shape == (1003, 8, 8, 1)
    assert images.dtype == np.uint8
    assert images.std() > 20
    assert set(labels) == set(range(10))
    for batch_size in (1003, 40):
        others, other_labels = generate(model, params, batch_size)
        np.testing.assert_array_equal(labels, other_labels)
        # Programs of other shapes round differently: a value at the edge between two grey levels may fall to either.
        difference = np.abs(images.astype(int) - others)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-4


def test_the_first_samples_do_not_depend_on_how_many_follow(model, params):
    np.testing.assert_array_equal(generate(model, params, 64, 10)[0], generate(model, params, 64, 100)[0][:10])
    assert not np.array_equal(generate(model, params, 64, 10)[0], generate(model, params, 64, 10, seed=1)[0])


def test_guidance_scale_and_steps_compile_one_program(model, params):
    generate(model, params, 32, 32, cfg_scale=2.0, num_steps=3)
    num_compiled = compiled.generate._cache_size()
    generate(model, params, 32, 32, cfg_scale=0.5, num_steps=9)
    assert compiled.generate._cache_size() == num_compiled


def test_the_network_is_compiled_twice_for_an_interval_of_guidance_alone(model, params):
    """Once for the times with guidance and once for those without, whichever times they are."""

    def count_matmuls(sampler):
        return lower_sampler(model, params, sampler, 8).as_text().count("dot_general")

    network = count_matmuls(SamplerConfig(3, None))
    assert network > 10
    assert count_matmuls(SamplerConfig(3, None, (0.2, 0.5))) == network
    assert count_matmuls(SamplerConfig(3, 2.0)) == network
    for interval in ((0.2, 1.0), (0.0, 0.5)):
        assert count_matmuls(SamplerConfig(3, 2.0, interval)) == 2 * network

    # The times themselves are numbers: others compile nothing.
    generate(model, params, 32, 32, cfg_interval=(0.2, 1.0))
    num_compiled = compiled.generate._cache_size()
    generate(model, params, 32, 32, cfg_interval=(0.0, 0.5))
    assert compiled.generate._cache_size() == num_compiled


def test_the_batch_is_what_fits_the_memory(model, params):
    generator = ImageGenerator(model, params, seed=0)

    def fit(free_memory, num_samples=10**7):
        return generator.fitting_batch_size(SamplerConfig(3, 2.0), num_samples, free_memory)

    assert fit(None) == 128
    assert fit(None, num_samples=10) == 10
    assert fit(1) == 1
    small = fit(2**30)
    large = fit(2**33)
    assert small > 1
    assert large == 8 * small
    assert fit(2**40, num_samples=100) == 100


def test_grey_images_are_three_equal_channels_and_padding_does_not_count(model):
    seen = []

    def extractor(images):
        seen.append(np.asarray(images))
        means = jnp.ones((len(images), 1)) * images.astype(jnp.float32).mean((1, 2))
        return {"pool": means, "spatial": 2 * means[:, :2]}

    images = np.random.default_rng(0).integers(0, 256, (13, 8, 8, 1), np.uint8)
    batches = pad_and_shard([images[:8], images[8:]], 8, model.mesh)
    statistics = ImageStatistics()
    measured = []
    measure_images({"inception": extractor}, batches, statistics, on_batch=measured.append)
    assert [batch.count for batch in measured] == [8, 5]
    assert [rows.shape for rows in seen] == [(8, 8, 8, 3)] * 2
    assert all((rows == rows[..., :1]).all() for rows in seen)
    expected = images.mean((1, 2)).repeat(3, axis=1)
    np.testing.assert_allclose(statistics[POOL].rows, expected, rtol=1e-5)
    np.testing.assert_allclose(statistics[SPATIAL].mu, 2 * expected.mean(axis=0)[:2], rtol=1e-6)
    assert statistics.num_samples == 13


def test_the_devices_have_the_next_batch_while_the_host_waits(monkeypatch):
    """Features of batch k are fetched after batch k + 1 has been made and sent to the network."""
    events = []

    def fetch(number):
        events.append(f"fetch {number}")
        return np.zeros((2, 3), np.float32)

    def make():
        for number in range(3):
            events.append(f"make {number}")
            yield ImageBatch(jnp.zeros((2, 4, 4, 3), jnp.uint8), None, 2)

    def extractor(images):
        number = sum(event.startswith("extract") for event in events)
        events.append(f"extract {number}")
        return {"pool": np.array(number)}

    monkeypatch.setattr("utils.images.pixels.gather", fetch)
    measure_images({"inception": extractor}, make(), ImageStatistics())
    assert events == [
        "make 0", "extract 0", "make 1", "extract 1", "fetch 0", "make 2", "extract 2", "fetch 1", "fetch 2",
    ]  # fmt: skip


def test_one_step_panel_goes_the_whole_way(model, params):
    """`sample_N/1` is x_0 + v(x_0, 0), not 1/32 of it."""
    noise = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    labels = jnp.arange(8)
    (last,) = sample_stages(model, params, noise, labels, SamplerConfig(1, None))[:, -1:].swapaxes(0, 1)
    v = jax.jit(model.network.apply)({"params": params}, noise, jnp.zeros(8), labels)
    expected = np.round((np.clip(noise + v, -1, 1) + 1) * 127.5)
    assert np.abs(last - expected).max() <= 1


def test_generated_images_are_clipped_and_rounded_once(model, params):
    """Inception is given uint8 pixels of what lies in [-1, 1]: not scaled again, not cut off, not wrapped around."""
    images, labels = generate(model, params, 16, 16, cfg_scale=None, num_steps=2)
    noise_key, _ = jax.random.split(jax.random.key(0))
    x = sampling.sample_noise(noise_key, jnp.arange(16), (8, 8, 1))
    for t in (0.0, 0.5):
        x = x + jax.jit(model.network.apply)({"params": params}, x, jnp.full(16, t), labels) / 2
    x = np.asarray(x)
    assert (x < -1.1).any()
    assert (x > 1.1).any()
    expected = np.floor((np.clip(x, -1, 1) + 1) / 2 * 255 + 0.5)
    difference = np.abs(images - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(
    ("per_batch", "total", "flag", "expected"),
    [
        (1, 4_000, "num_images", None),  # seconds for 8 images: 500 in all
        (0.064, 1_281_167, "num_images", "about 2.8 hours for 1,281,167 images; --num_images 50000 takes 6.7 minutes"),
        (80, 50_000, "num_samples", "about 5.8 days for 50,000 images; --num_samples 1000 takes 2.8 hours"),
        (80, 900, "num_samples", "about 2.5 hours for 900 images"),
        (80, 50_000, None, "about 5.8 days for 50,000 images"),
    ],
)
def test_hours_are_announced_after_the_first_batches(per_batch, total, flag, expected, monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr(measure.time, "monotonic", lambda: clock[-1])

    def extractor(images):
        clock.append(clock[-1] + per_batch + 1e5 * (len(clock) == 1))  # the first compiles for a day
        return {"pool": np.zeros((8, 3), np.float32)}

    batches = (ImageBatch(jnp.zeros((8, 4, 4, 3), jnp.uint8), None, 8) for _ in range(6))
    measure_images({"inception": extractor}, batches, ImageStatistics(), total, flag=flag)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("about")]
    assert said == ([] if expected is None else [expected])


def test_batches_hold_fewer_of_large_images():
    scoring = SimpleNamespace(config=ConfigDict({"batch_size": None}), mesh=SimpleNamespace(size=1), records={})
    sizes = {side: Scoring._choose_batch_size(scoring, 1000, (side, side, 3)) for side in (32, 1024, 2048, 8192)}
    assert sizes == {32: RECIPE_BATCH_SIZE, 1024: RECIPE_BATCH_SIZE, 2048: 2**28 // (3 * 2048**2), 8192: 1}
    assert Scoring._choose_batch_size(scoring, 4, (32, 32, 3)) == 4
