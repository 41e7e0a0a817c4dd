"""data/demo_metrics.jsonl, and what docs/metrics.md says of it and of the loss floor, against theory."""

import json
import math
import re
import sys

import numpy as np
import pytest
from scipy.special import erf

from tests.conftest import ROOT, run_program
from utils.trackers.trackers import read_curves

PAGE = (ROOT / "docs" / "metrics.md").read_text()
NUM_OUTPUTS = (128 + 1) * 2 * 2  # weights and biases of the demo's last layer


@pytest.fixture(scope="module")
def demo():
    return read_curves(ROOT / "data" / "demo_metrics.jsonl", "runs")


@pytest.fixture
def loss_floor(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import loss_floor

    yield loss_floor
    for name in ("loss_floor", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def digits(loss_floor):
    return loss_floor.read_digits("train")[0]


def test_the_page_explains_every_name(demo):
    rows = set(
        re.findall(r"`([\w./*]+)`", "".join(line.split("|")[1] for line in PAGE.splitlines() if line[:1] == "|"))
    )
    for name in [*demo, "training/mfu", "fid"]:
        group, _, rest = name.partition("/")
        assert rows & {name, f"*/{rest}", f"{group}/*"}, name


def test_the_first_step_is_that_of_a_network_of_zeros(demo, digits):
    assert demo["training/l2_loss"][1] == pytest.approx(1 + (digits**2).mean(), rel=0.03)
    assert demo["training/v_pred_abs_mean"][1] == 0
    assert demo["training/update_norm"][1] == pytest.approx(1e-3 * math.sqrt(NUM_OUTPUTS), rel=1e-3)


def test_v_abs_mean_is_that_of_data_and_noise(demo, digits):
    of_pixels = math.sqrt(2 / math.pi) * np.exp(-(digits**2) / 2) + digits * erf(digits / math.sqrt(2))
    assert f"training digits it is {of_pixels.mean():.3f}" in PAGE
    values = np.array(list(demo["training/v_abs_mean"].values()))
    assert values.mean() == pytest.approx(of_pixels.mean(), abs=3 * 0.009 / math.sqrt(len(values)))
    assert len(set(demo["validation/v_abs_mean"].values())) == 1
    assert all(value < of_pixels.mean() for value in demo["training/v_pred_abs_mean"].values())


def test_the_tables_rows_are_those_of_the_demo_and_of_the_benchmark(demo):
    def row(name):
        return [float(cell) for cell in re.search(rf"^\| {re.escape(name)} \| (.*) \|$", PAGE, re.M)[1].split(" | ")]

    for split in ("validation", "training"):
        losses = [demo[f"{split}_loss_t/{i / 10:.1f}"][1500] for i in range(11)]
        assert row(f"demo, `{split}_loss_t`") == pytest.approx([*losses, demo[f"{split}/l2_loss"][1500]], abs=6e-4)
    printed = run_program("benchmarks/loss_floor.py", "--draws", 4, "--seed", 1).stdout
    for line in printed.splitlines()[2:]:
        name, *cells = line.strip("| ").split(" | ")
        assert row(name) == pytest.approx([float(cell) for cell in cells], rel=0.05, abs=0.01)


def test_a_linear_estimate_of_gaussian_data_reaches_the_floor(loss_floor):
    rng, variances = np.random.default_rng(0), np.array([0.1, 1.0, 4.0])
    x_1 = rng.normal(size=(200_000, 3)) * np.sqrt(variances)
    for t in (0, 0.2, 0.5, 0.9):
        x_t = t * x_1 + (1 - t) * rng.normal(size=x_1.shape)
        estimate = loss_floor.linear_estimate(x_t, t, np.zeros(3), np.diag(variances))
        expected = np.mean(variances / ((1 - t) ** 2 + t**2 * variances))
        assert loss_floor.velocity_loss(estimate, x_1, t) == pytest.approx(expected, rel=0.02)


def test_a_memorised_estimate_is_the_mean_at_first_and_the_image_at_last(loss_floor):
    images = np.random.default_rng(0).normal(size=(5, 8))
    noise = np.random.default_rng(1).normal(size=(5, 8))
    first = loss_floor.memorised_estimate(noise, 0, images)
    np.testing.assert_allclose(first, np.broadcast_to(images.mean(0), (5, 8)))
    np.testing.assert_allclose(loss_floor.memorised_estimate(0.99 * images + 0.01 * noise, 0.99, images), images)
    # Two points ±1 in one dimension: E[x_1 | x_t] = tanh(t x_t / (1 - t)^2).
    estimate = loss_floor.memorised_estimate(np.array([[0.3]]), 0.4, np.array([[1.0], [-1.0]]))
    assert estimate[0, 0] == pytest.approx(math.tanh(0.4 * 0.3 / 0.36))


def test_the_log_has_no_other_lines():
    lines = [json.loads(line) for line in (ROOT / "data" / "demo_metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "training/l2_loss" in line] == [1, *range(100, 1501, 100)]
    assert [line["step"] for line in lines if "validation_loss_t/mean" in line] == [500, 1000, 1500]
    assert len(lines) == 19
