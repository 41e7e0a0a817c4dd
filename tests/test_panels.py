"""The panels of training, with networks whose answer is known: every panel shows what its title says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from diffusion_transformer import DiTConfig
from utils.base.mesh import make_mesh
from utils.codecs.codec import PixelCodec
from utils.conditions.classes import ClassCondition
from utils.data.dataset import PixelBatch
from utils.networks.models import ImageModel, Network
from utils.networks.state import TrainState
from utils.objectives.flow_matching import FlowMatching
from utils.runs.config import RunConfig
from utils.sampling.solvers import SamplerConfig
from utils.training import evaluation
from utils.training.build import build_run
from utils.training.evaluation import loss_by_time, reconstruction_panel, sample_panels

NUM_CLASSES = 10


class Probe(Network):
    """A network with v = 0.2 label / 10 - 0.1 + 0.25 t everywhere; "no label" is the label 10."""

    config = DiTConfig(num_classes=NUM_CLASSES)
    condition = ClassCondition(tuple("abcdefghij"))

    def apply(self, variables, x, t, labels):
        velocity = 0.02 * labels - 0.1 + 0.25 * t
        return jnp.broadcast_to(velocity[:, None, None, None], x.shape) + 0 * variables["params"]["unused"]


PARAMS = {"unused": jnp.zeros(())}


@pytest.fixture(scope="module")
def model():
    return ImageModel(Probe(), FlowMatching(), PixelCodec(), make_mesh(), (8, 8, 1))


class Table(Figure):
    """A panel before it is drawn."""

    def __init__(self, images, row_titles=(), column_titles=(), title=""):
        super().__init__()
        self.cells = images
        self.column_titles = column_titles


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    monkeypatch.setattr("utils.images.plotting.image_table", Table)


def pixels(panel, row: int, column: int) -> np.ndarray:
    """A panel's image in [-1, 1], with NaN where it was clipped."""
    image = panel.cells[row, column].astype(float) / 127.5 - 1
    return np.where(np.abs(image) < 1, image, np.nan)


def test_loss_by_time_is_the_loss_at_that_time(model):
    """x_1 = 0 and label 5 give a velocity error of x_0 + 0.25 t, whose mean square is 1 + t^2 / 16."""
    images = np.full((256, 8, 8, 1), 127.5).round().astype(np.uint8)
    batch = PixelBatch(condition=np.full(256, 5, np.int32), image=images)
    losses = loss_by_time(model, PARAMS, batch, jax.random.key(0))
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
    panel = reconstruction_panel(model, PARAMS, PixelBatch(condition=labels, image=images), jax.random.key(0))
    for column in range(8):
        t = column / 8
        x_1 = values[column] / 127.5 - 1
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
    scales = (0, 0.1, 1, 2, 4, 10)
    assert list(panels) == [*(f"sample_cfg_{s}" for s in scales), *(f"sample_N/{n}" for n in (1, 4, 32))]
    start = {label: pixels(panels["sample_cfg_1"], label, 0) for label in range(8)}
    for scale in scales:
        for label in range(8):
            v_uncond = 0.02 * NUM_CLASSES - 0.1
            v_cond = 0.02 * label - 0.1
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


def test_panels_take_no_more_steps_than_the_objective_has(model):
    class FewSteps(FlowMatching):
        def check_steps(self, num_steps):
            return "" if num_steps in (1, 2) else "1 or 2"

    few = model._replace(objective=FewSteps())
    panels = dict(sample_panels(few, PARAMS, jax.random.key(0), SamplerConfig(2, None), scales=(1,)))
    assert list(panels) == ["sample_cfg_1", "sample_N/1", "sample_N/2"]


def test_panels_show_every_class_with_images_over_the_evaluations(model):
    """Ten classes, of which half of the rows are always the first four."""

    def show(number, names="abcdefghij", empty=()):
        return ClassCondition(tuple(names), empty).show(number, 8).tolist()

    assert [show(number) for number in range(3)] == [
        [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 8, 9, 4, 5], [0, 1, 2, 3, 6, 7, 8, 9]
    ]  # fmt: skip
    assert show(5, empty=(0, 4)) == [1, 2, 3, 5, 6, 7, 8, 9]
    assert show(5, "abc") == [0, 1, 2, 0, 1, 2, 0, 1]
    many = tuple(map(str, range(1000)))
    shown = {label for number in range(-(-995 // 4)) for label in show(number, many, (999,))}
    assert shown == set(range(999))
    panel = dict(sample_panels(model, PARAMS, jax.random.key(0), SamplerConfig(8, 2.0), number=1))["sample_N/4"]
    assert panel.column_titles == list("abcdijef")


@pytest.mark.parametrize(("interval", "max_steps"), [(400, 2100), (1000, 4000), (50_000, 100_000), (3, 10)])
def test_evaluations_are_counted_from_the_step_alone(interval, max_steps):
    """So that a run that goes on shows what it would have shown."""
    config = RunConfig.from_settings({"eval_interval": interval, "max_steps": max_steps})
    due = [step for step in range(1, max_steps + 1) if evaluation.is_evaluation_due(config, step)]
    assert [evaluation.count_evaluations(config, step) for step in due] == list(range(len(due)))


def test_a_training_says_which_evaluation_which_scales_and_which_classes(configure, tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "twelve.npz", images=images, labels=1 + np.arange(60) % 11)
    words = f"--dataset_name npz:{tmp_path}/twelve.npz --use_stable_vae 0 --batch_size 8 --eval_interval 500"
    words += " --model.hidden_size 8 --model.depth 2 --model.num_heads 1 --model.num_classes 12 --model.cfg_scale 2.5"
    words += " --model.patch_size 4 --model.inner_head 1 --model.inner_scale 1.5 --wandb.mode disabled"
    run = build_run(configure(words.split()))
    shown = []
    monkeypatch.setattr(evaluation, "sample_panels", lambda *args, **kwargs: shown.append((args, kwargs)) or ())
    monkeypatch.setattr(evaluation, "loss_by_time", lambda *_: {})
    monkeypatch.setattr(evaluation, "reconstruction_panel", lambda *_: None)
    monkeypatch.setattr(evaluation.ImageGenerator, "straightness", lambda _: 0.0)
    state = TrainState(step=1500, params="raw", ema_params="EMA", opt_state=None, key=jax.random.key(0))
    list(evaluation.evaluate(run, state, None))
    ((model, params, _, sampler), of_ema), ((_, raw, *_), of_raw) = shown
    assert (params, raw, sampler.cfg_scale, sampler.inner_scale) == ("EMA", "raw", 2.5, 1.5)
    assert of_ema["number"] == of_raw["number"] == 2  # after those of steps 500 and 1000
    assert model.condition.show(0, 8).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
