"""The ablation on Fashion-MNIST: its data, features, search and tables, and a cell through the real functions."""

import gzip
import importlib
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from numpy.lib.stride_tricks import sliding_window_view

from tests.conftest import ROOT
from utils.base.messages import UserError
from utils.data.loaders import load_dataset
from utils.metrics.extractors import EXTRACTORS, load_extractors
from utils.metrics.metrics import METRICS

NAMES = (
    "common",
    "fashion_mnist",
    "fashion_classifier",
    "ablation_rows",
    "ablation_scores",
    "ablation_tables",
    "ablation",
)


@pytest.fixture(scope="module")
def benchmarks():
    """The modules by name; afterwards their extractor and metrics are unknown again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setattr(sys, "path", list(sys.path))
        extractors, metrics = dict(EXTRACTORS), list(METRICS)
        yield {name: importlib.import_module(name) for name in NAMES}
        for name in NAMES:
            sys.modules.pop(name, None)
        EXTRACTORS.clear()
        EXTRACTORS.update(extractors)
        METRICS[:] = metrics


def write_idx(path, array, magic=b"\0\0\x08") -> bytes:
    content = magic + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return content


def test_idx_files_become_an_npz_that_is_read(benchmarks, tmp_path, monkeypatch):
    module = benchmarks["fashion_mnist"]
    monkeypatch.setattr(module, "SPLITS", {"": ("train", 30), "validation_": ("t10k", 12)})
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (count, 28, 28), np.uint8) for name, count in module.SPLITS.values()}
    labels = {name: np.arange(len(part), dtype=np.uint8) % 10 for name, part in images.items()}
    for name in images:
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images[name])
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", labels[name])
    module.main(ConfigDict({"idx": str(tmp_path), "out": str(tmp_path / "new" / "fashion.npz")}))

    for split, name in (("train", "train"), ("validation", "t10k")):
        dataset = load_dataset(f"npz:{tmp_path / 'new' / 'fashion.npz'}", split)
        assert (dataset.class_names[9], len(dataset.source)) == ("ankle boot", len(images[name]))
        np.testing.assert_array_equal(dataset.source[11]["image"], images[name][11][..., None])
        assert dataset.source[11]["label"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path, content: path.write_bytes(content[:-1]), "is no idx file of 3x28x28 bytes"),
        (lambda path, content: path.write_bytes(b"\0\0\x0d" + content[3:]), "is no idx file of 3x28x28 bytes"),
        (lambda path, content: path.write_bytes(content[:7] + b"\x04" + content[8:]), "is no idx file"),
        (lambda path, content: path.unlink(), "there is no images or images.gz"),
    ],
)
def test_other_files_are_refused(benchmarks, tmp_path, change, message):
    images = np.ones((3, 28, 28), np.uint8)
    content = write_idx(tmp_path / "images", images)
    np.testing.assert_array_equal(benchmarks["fashion_mnist"].read_idx(tmp_path / "images", images.shape), images)
    change(tmp_path / "images", content)
    with pytest.raises(UserError, match=message):
        benchmarks["fashion_mnist"].read_idx(tmp_path / "images", images.shape)


def convolve(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A convolution of 5x5 with stride 2 on an even side: one row of zeros before, two after."""
    padded = np.pad(x, ((0, 0), (1, 2), (1, 2), (0, 0)))
    windows = sliding_window_view(padded, (5, 5), axis=(1, 2))[:, ::2, ::2]
    return np.maximum(np.einsum("nhwcij,ijco->nhwo", windows, kernel) + bias, 0)


def test_features_are_those_of_the_committed_weights_by_numpy(benchmarks):
    module = benchmarks["fashion_classifier"]
    module.register()
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)
    layers = module.load_weights()["params"]
    x = images / 255
    for name in ("Conv_0", "Conv_1"):
        x = convolve(x, layers[name]["kernel"], layers[name]["bias"])
    x = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))).reshape(3, 4, 2, 4, 2, 64).max(axis=(2, 4))
    expected = np.maximum(x.reshape(3, -1) @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"], 0)
    found = load_extractors(["fashion"])["fashion"](jnp.asarray(np.repeat(images, 3, axis=-1)))["hidden"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert expected.max() > 0.5

    classes = (expected @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]).argmax(axis=1)
    assert module.agreement(expected, classes) == 1
    assert module.agreement(expected, [classes[0], *(classes[1:] + 1) % 10]) == pytest.approx(1 / 3)


def test_the_search_ends_at_the_minimum_of_a_valley_and_measures_nothing_twice(benchmarks):
    seen = []

    def measure(values):
        seen.append(tuple(values.values()))
        return (values["a"] - 4) ** 2 + (values["b"] - 2 * values["a"]) ** 2

    axes = {"a": range(7), "b": range(0, 14), "c": (1,)}
    found = benchmarks["ablation_scores"].climb(axes, {"a": 1, "b": 2, "c": 1}, measure)
    assert len(seen) == len(set(seen)) < 40
    before = set(seen)
    assert measure(found[0]) == found[1] == min(measure(dict(zip("abc", place, strict=True))) for place in before)


def test_flags_are_settings(benchmarks):
    words = "--model.lr 1e-3 --augment flip,rotate --name 0.05,0.1 --objective.name flow_matching --t=-1"
    found = benchmarks["ablation_rows"].parse_flags(words.replace("=", " "))
    values = {"model.lr": 1e-3, "augment": ("flip", "rotate"), "name": ("0.05", "0.1")}
    assert found == {**values, "objective.name": "flow_matching", "t": -1}


def fake_work(ablation, name):
    ablation.make_config(name, {})
    return lambda: np.zeros(1)


@pytest.fixture
def tiny(benchmarks, tmp_path, monkeypatch):
    """Returns ablations of a tiny network on random images, all of one folder."""
    rng = np.random.default_rng(0)
    arrays = {f"{split}images": rng.integers(0, 256, (40, 28, 28, 1), np.uint8) for split in ("", "validation_")}
    arrays |= {f"{split}labels": np.arange(40, dtype=np.uint8) % 10 for split in ("", "validation_")}
    np.savez(tmp_path / "data.npz", **arrays)
    module = benchmarks["ablation"]
    sizes = "--model.hidden_size 16 --model.depth 1 --model.num_heads 2 --model.mlp_ratio 2 --model.patch_size 14"
    recipe = f"--codec pixels {sizes} --model.num_classes 10 --model.target_update_rate 0.5 --batch_size 8"
    monkeypatch.setattr(module, "RECIPE", recipe)
    monkeypatch.setattr(module, "STEP_COUNTS", (2, 1))
    monkeypatch.setattr(module, "CHOICE_STEPS", 1)
    # A second compilation of the step would take as long as all else: a step's time is that of nothing.
    monkeypatch.setattr(module.Ablation, "make_work", fake_work)
    rows = benchmarks["ablation_rows"].ROWS
    monkeypatch.setattr(module, "ROWS", rows | {"unknown": rows["recipe"]._replace(flags="--no_flag 1")})
    counts = {"num_samples": 20, "num_choice": 10, "num_authpct": 4, "train_steps": 4, "seeds": 1, "inception": 0}
    options = {"rounds": 1, "repeats": 1, "best": "", "time_budget": None, "rows": ["recipe", "unknown"]}
    paths = {"data": str(tmp_path / "data.npz"), "out": str(tmp_path / "out"), "results": str(tmp_path / "lines.jsonl")}
    return lambda **others: module.Ablation(ConfigDict({**counts, **options, **paths, **others}))


def test_a_cell_is_made_once_and_shown(benchmarks, tiny, tmp_path, capsys, monkeypatch):
    tables = benchmarks["ablation_tables"]
    monkeypatch.setattr(tables, "STEP_COUNTS", (2, 1))
    monkeypatch.setattr(tables, "MOST", "2")
    first = tiny()
    benchmarks["ablation"].make_cells(first)
    assert list(first.failures) == ["unknown"]
    assert "--no_flag is no setting of a run" in first.failures["unknown"]
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["real", "speed", "score"]  # as many steps as time: one cell
    assert (lines[1]["ratio"], lines[1]["row"]) == (1, "recipe")
    (line,) = lines[2:]
    assert (line["row"], line["seed"], line["steps"]) == ("recipe", 0, 4)
    assert line["scores"].keys() == {"2", "1"}
    assert all({"fd_fashion", "kd_fashion", "agreement"} <= scores.keys() for scores in line["scores"].values())
    assert 0 < line["loss"] < 10
    assert line["passes"] == 1 + (line["setting"]["cfg_scale"] != 1)
    assert first.checkpoint(benchmarks["ablation"].Cell("recipe", 0, "steps")).is_dir()
    assert len(list(first.checkpoint(benchmarks["ablation"].Cell("recipe", 0, "steps")).parent.iterdir())) >= 4

    # Another call trains and scores nothing.
    again = tiny()
    monkeypatch.setattr(again, "train", None)
    benchmarks["ablation"].make_cells(again)
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == 3
    shown = tables.Tables(again)
    capsys.readouterr()
    shown.show()
    row = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("| recipe |"))
    assert f"| {line['scores']['2']['fd_fashion']:.1f} | {line['scores']['1']['fd_fashion']:.1f} |" in row
    shown.draw()
    assert (tmp_path / "lines.png").exists()
    assert (tmp_path / "lines_samples.png").exists()
