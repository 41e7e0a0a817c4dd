"""What training looks at, with networks whose answer is known: every panel shows what its title says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from diffusion_transformer import DiTConfig
from utils.codecs.pixels import PixelCodec
from utils.models import ImageModel, Network
from utils.objectives.flow_matching import FlowMatching
from utils.panels import loss_by_time, reconstruction_panel, sample_panels
from utils.sampling import SamplerConfig
from utils.sharding import make_mesh

NUM_CLASSES = 10


class Probe(Network):
    """A network with v = 0.2 label / 10 - 0.1 + 0.25 t everywhere; "no label" is the label 10."""

    config = DiTConfig(num_classes=NUM_CLASSES)

    def apply(self, variables, x, t, labels):
        velocity = 0.02 * labels - 0.1 + 0.25 * t
        return jnp.broadcast_to(velocity[:, None, None, None], x.shape) + 0 * variables["params"]["unused"]


PARAMS = {"unused": jnp.zeros(())}


@pytest.fixture(scope="module")
def model():
    return ImageModel(Probe(), FlowMatching(), PixelCodec(), make_mesh(), (8, 8, 1), tuple("abcdefghij"))


class Table(Figure):
    """A panel before it is drawn."""

    def __init__(self, images, row_titles=(), column_titles=(), title=""):
        super().__init__()
        self.cells, self.column_titles = images, column_titles


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    monkeypatch.setattr("utils.plotting.image_table", Table)


def pixels(panel, row: int, column: int) -> np.ndarray:
    """A panel's image in [-1, 1], with NaN where it was clipped."""
    image = panel.cells[row, column].astype(float) / 127.5 - 1
    return np.where(np.abs(image) < 1, image, np.nan)


def test_loss_by_time_is_the_loss_at_that_time(model):
    """x_1 = 0 and label 5 give a velocity error of x_0 + 0.25 t, whose mean square is 1 + t^2 / 16."""
    images = np.full((256, 8, 8, 1), 127.5).round().astype(np.uint8)
    losses = loss_by_time(model, PARAMS, {"image": images, "label": np.full(256, 5, np.int32)}, jax.random.key(0))
    assert list(losses) == [*(f"{i / 10:.1f}" for i in range(11)), "mean"]
    base = losses["0.0"]
    assert base == pytest.approx(1, abs=0.05)
    for name, loss in list(losses.items())[:11]:
        t = float(name)
        assert loss - base == pytest.approx(t**2 / 16, abs=0.02), name  # one noise at every t: no more than its mean
    assert losses["mean"] == pytest.approx(np.mean([losses[f"{i / 10:.1f}"] for i in range(1, 10)]), rel=1e-6)


def test_reconstructions_are_clean_noised_and_predicted(model):
    values = (50 + 10 * np.arange(8)).astype(np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (8, 8, 8, 1))
    labels = np.arange(8, dtype=np.int32)
    panel = reconstruction_panel(model, PARAMS, {"image": images, "label": labels}, jax.random.key(0))
    for column in range(8):
        t, x_1 = column / 8, values[column] / 127.5 - 1
        clean, noised, predicted = (pixels(panel, row, column) for row in range(3))
        np.testing.assert_allclose(clean, x_1, atol=0.005)
        noise = (noised - t * x_1) / (1 - t)
        assert np.nanstd(noise) > 0.4  # clipped, a standard normal has 0.54 at t = 0
        assert np.nanmean(np.abs(noised - x_1)) > 0.05
        velocity = 0.02 * column - 0.1 + 0.25 * t
        np.testing.assert_allclose(np.nanmedian(predicted - noised), (1 - t) * velocity, atol=0.01)


def test_sample_panels_show_their_scale_and_their_labels(model):
    """An Euler path of 8 steps moves the noise by mean(velocity): 0.25 x 7/16, and by the guided label part."""
    panels = dict(sample_panels(model, PARAMS, jax.random.key(0), SamplerConfig(8, 2.0)))
    assert list(panels) == [*(f"sample_cfg_{s}" for s in (0, 0.1, 1, 4, 10)), *(f"sample_N/{n}" for n in (1, 4, 32))]
    start = {label: pixels(panels["sample_cfg_1"], label, 0) for label in range(8)}
    for scale in (0, 0.1, 1, 4, 10):
        for label in range(8):
            v_uncond, v_cond = 0.02 * NUM_CLASSES - 0.1, 0.02 * label - 0.1
            velocity = v_uncond + scale * (v_cond - v_uncond)
            first, last = (pixels(panels[f"sample_cfg_{scale}"], label, column) for column in (0, 7))
            moved = np.nanmedian(last - first)
            assert moved == pytest.approx(7 / 8 * velocity + 0.25 * sum(range(1, 8)) / 64, abs=0.02), (scale, label)
            if scale == 1:
                np.testing.assert_array_equal(first, start[label])
    for steps in (1, 4, 32):  # titles are the labels' names, and the whole way is gone
        panel = panels[f"sample_N/{steps}"]
        assert panel.column_titles == list("abcdefgh")
        for label in range(8):
            velocity = 0.1 + 2.0 * (0.02 * label - 0.2)
            moved = np.nanmedian(pixels(panel, 0, label) - start[label])
            first_step = (0.02 * label - 0.1) / 8  # `start` is after one of 8 steps at scale 1
            expected = velocity + 0.25 * (steps - 1) / (2 * steps) - first_step
            assert moved == pytest.approx(expected, abs=0.03), (steps, label)
