"""Curves of several runs' metrics: what is drawn is what was logged, of the runs and metrics that were asked for."""

import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import plot_metrics
from tests.conftest import run_program
from tests.test_compatibility import unpack
from utils.base.messages import UserError
from utils.images import plotting
from utils.trackers.trackers import name_runs, read_curves


def write_run(folder: Path, *lines: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Run a: 40 logged steps, loss 100 / step, and one FID; run b: the same without FID, loss 200 / step."""
    paths = []
    for scale, name in ((100, "a"), (200, "b")):
        lines = [{"step": s, "training/l2_loss": scale / s, "training_loss_t/0.5": 0.5} for s in range(1, 41)]
        paths.append(write_run(tmp_path / "runs" / name, *lines, *([{"step": 40, "fid": 20}] * (name == "a"))))
    return paths


@pytest.fixture
def draw(read_flags, monkeypatch):
    """draw(words) -> the figure that the program saves."""

    def draw(*words):
        figures = []
        original = plotting.metric_curves
        monkeypatch.setattr(plotting, "metric_curves", lambda *args: figures.append(original(*args)) or figures[-1])
        plot_metrics.main(read_flags(plot_metrics, map(str, words)))
        return figures[0]

    return draw


def drawn(axis) -> list[tuple[list, list]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]


def test_a_png_with_the_default_metrics(runs, tmp_path):
    out = tmp_path / "new" / "curves.png"
    done = run_program("plot_metrics.py", "--runs", f"{runs[0]},{runs[1]}", "--out", out)
    assert done.stdout.splitlines() == ["b has not logged fid", f"written: {out}"]
    image = plt.imread(out)
    assert min(image.shape[:2]) > 200
    assert image[..., :3].std() > 0.05


def test_an_axis_per_metric_and_a_colour_per_run(runs, draw, tmp_path):
    figure = draw("--runs", f"{runs[0]},{runs[1]}", "--out", tmp_path / "c.png", "--metrics", "fid,training*,*0.5")
    loss, by_time = (axis for axis in figure.axes[1:])
    assert [axis.get_title() for axis in figure.axes] == ["fid", "training/l2_loss", "training_loss_t/0.5"]
    assert drawn(figure.axes[0]) == [([40], [20])]
    assert figure.axes[0].lines[0].get_marker() == "."  # or one point would not be seen
    assert drawn(loss) == [(list(range(1, 41)), [scale / s for s in range(1, 41)]) for scale in (100, 200)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    colours = [line.get_color() for line in figure.legends[0].get_lines()]
    assert colours[0] != colours[1]
    assert [[line.get_color() for line in axis.lines] for axis in (loss, by_time)] == [colours, colours]
    assert {axis.get_yscale() for axis in figure.axes} == {"linear"}
    assert {axis.get_xlabel() for axis in figure.axes} == {"step"}


def test_a_metrics_file_beside_a_run(runs, draw, tmp_path):
    copy = shutil.copy(runs[1] / "metrics.jsonl", tmp_path / "reference.jsonl")
    figure = draw("--runs", f"{runs[0]},{copy}", "--out", tmp_path / "c.png", "--metrics", "training/l2_loss")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "reference"]
    assert drawn(figure.axes[0])[1][1][0] == 200


def test_smoothed_and_logarithmic(runs, draw, tmp_path):
    words = ["--runs", runs[0], "--out", tmp_path / "c.png", "--metrics", "training/l2_loss"]
    figure = draw(*words, "--smooth", 3, "--log_y")
    raw, smoothed = drawn(figure.axes[0])
    assert raw[1][:3] == [100, 50, 100 / 3]
    assert smoothed[1][:4] == pytest.approx([100, 75, 550 / 9, (50 + 100 / 3 + 25) / 3])
    assert raw[0] == smoothed[0]
    assert figure.axes[0].get_yscale() == "log"


@pytest.mark.parametrize("window", [1, 4, 100])
def test_the_running_mean_is_that_of_a_convolution(window):
    values = np.random.default_rng(0).normal(size=50)
    weights = np.ones(window)
    expected = np.convolve(values, weights)[:50] / np.convolve(np.ones(50), weights)[:50]
    np.testing.assert_allclose(plotting.running_mean(list(values), window), expected)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0, 1e308])
def test_values_that_no_logarithm_has(draw, tmp_path, value):
    run = write_run(tmp_path / "a", {"step": 1, "x": value, "y": value}, {"step": 2, "x": value, "y": 1.0})
    draw("--runs", run, "--out", tmp_path / "c.png", "--metrics", "*", "--log_y", "--smooth", 2)
    assert (tmp_path / "c.png").stat().st_size > 0


def test_many_metrics_fill_a_table(draw, tmp_path):
    run = write_run(tmp_path / "a", {"step": 1, **{f"m{i}": 1.0 for i in range(7)}})
    figure = draw("--runs", run, "--out", tmp_path / "c.png", "--metrics", "m*")
    assert [axis.axison for axis in figure.axes] == [True] * 7 + [False] * 2


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [write_run(tmp_path / name, {"step": 1}) for name in ("x/a", "y/a", "b")]
    assert name_runs(paths) == [str(paths[0]), str(paths[1]), "b"]
    assert name_runs([paths[0], paths[2] / "metrics.jsonl", Path()]) == ["a", "b", tmp_path.name]


def test_what_a_log_holds(tmp_path):
    lines = [{"step": 2, "a": 2}, {"step": 1, "a": 1.5, "text": "x", "yes": True, "none": None}, {"step": 2, "a": 3.0}]
    run = write_run(tmp_path / "runs" / "a", *lines)
    assert read_curves(run, "runs") == {"a": {1: 1.5, 2: 3.0}}
    assert list(read_curves(run / "metrics.jsonl", "runs")["a"]) == [1, 2]
    with pytest.raises(UserError, match=f"--runs=.*b is not there; .*: there are {run}$"):
        read_curves(tmp_path / "runs" / "b", "runs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no metrics; .*has none$"):
        read_curves(tmp_path / "empty", "runs")


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".SVG", b"<?xml")])
def test_the_suffix_says_the_format(runs, read_flags, tmp_path, suffix, start):
    out = tmp_path / f"curves{suffix}"
    plot_metrics.main(read_flags(plot_metrics, ["--runs", str(runs[0]), "--out", str(out)]))
    assert out.read_bytes().startswith(start)


def test_dpi_scales_the_pixels(runs, read_flags, tmp_path):
    sizes = []
    for dpi in (60, 180):
        out = tmp_path / f"{dpi}.png"
        plot_metrics.main(read_flags(plot_metrics, ["--runs", str(runs[0]), "--out", str(out), "--dpi", str(dpi)]))
        sizes.append(plt.imread(out).shape[1])
    assert sizes[1] == pytest.approx(3 * sizes[0], abs=3)
    config = read_flags(plot_metrics, ["--runs", str(runs[0]), "--out", f"{tmp_path}/c.pdf", "--dpi", "60"])
    with pytest.raises(UserError, match=r"--dpi=60 has no effect on .*c.pdf, which has no pixels"):
        plot_metrics.main(config)


def test_curves_over_hours_and_images(tmp_path, draw, saved_config):
    # A run that logged step 2 after an hour and step 4, the last, after four; its batches have 32 images.
    lines = [{"step": 2, "seconds": 3600.0, "fid": 2.0}, {"step": 3, "fid": 3.0}]
    lines.append({"step": 4, "seconds": 14400.0, "fid": 4.0})
    run = write_run(tmp_path / "run", *lines)
    words = ["--runs", run, "--metrics", "fid", "--out", tmp_path / "c.png", "--x"]
    hours = draw(*words, "hours").axes[0]
    assert drawn(hours) == [([1.0, 2.5, 4.0], [2.0, 3.0, 4.0])]
    assert hours.get_xlabel() == "hours"
    with pytest.raises(UserError, match=r"--x=images: .*run has no config.json that says its batch size; use --x"):
        draw(*words, "images")
    (run / "config.json").write_text(json.dumps({**saved_config, "batch_size": 32}))
    assert drawn(draw(*words, "images").axes[0]) == [([64.0, 96.0, 128.0], [2.0, 3.0, 4.0])]
    with pytest.raises(UserError, match=r"--x=hours: .*old has recorded no times, as older runs have not; use --x"):
        draw("--runs", write_run(tmp_path / "old", {"step": 1, "fid": 1.0}), *words[2:], "hours")


@pytest.fixture(scope="module")
def saved_config(tmp_path_factory):
    """The configuration that an early version has saved with its run."""
    run = unpack("run", tmp_path_factory.mktemp("saved")) / "run"
    return json.loads((run / "config.json").read_text())
