"""A table over runs: their last and best metrics, their size, and the settings that differ, and no other."""

import csv
import json
import math
import shutil

import jax
import pytest

import plot_metrics
from tests.test_compatibility import unpack
from tests.test_plot_metrics import write_run
from utils.base.messages import UserError
from utils.runs.comparison import count_parameters, find_best, find_direction, find_runs, read_scores
from utils.runs.opening import load_generator
from utils.storage import remote


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of 20 steps that an early version has saved: it lacks settings that came later."""
    return unpack("run", tmp_path_factory.mktemp("saved")) / "run"


@pytest.fixture
def runs(saved, tmp_path):
    """runs/a; runs/b, of another rate and augmentation; runs/c, without known settings; runs/notes, which is none."""
    folder = tmp_path / "runs"
    shutil.copytree(saved, folder / "a")
    config = json.loads((saved / "config.json").read_text())
    config |= {"skip_nonfinite": 3, "trackers": ["wandb"]}
    config["model"] |= {"lr": 0.00025, "inner_scale": 1.0}
    config["augment"] = ["flip"]
    config["save_dir"] = "elsewhere"
    config["wandb"]["name"] = "b"
    lines = [
        {"step": step, "seconds": 60.0 * step, "training/l2_loss": loss, "fid": fid, "precision": 0.1 * step}
        for step, loss, fid in ((1, 2.0, 40.0), (2, 0.5, 12.34567), (3, float("nan"), 30.0))
    ]
    write_run(folder / "b", *lines)
    (folder / "b" / "config.json").write_text(json.dumps(config))
    write_run(folder / "c", {"step": 7, "training/grad_norm": 3.0, "training/l2_loss": float("inf")})
    (folder / "notes").mkdir()
    (folder / "table.md").write_text("| run |\n")
    return folder


@pytest.fixture
def show(read_flags, capsys):
    """show(words) -> (cells of the table {run: {column: cell}}, other lines) that the program prints."""

    def show(*words):
        plot_metrics.main(read_flags(plot_metrics, ["--table", *map(str, words)]))
        lines = capsys.readouterr().out.splitlines()
        table = [line for line in lines if line.startswith("| ")]
        assert len({len(line) for line in table}) == 1  # aligned
        names, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
        found = {row[0]: dict(zip(names, row, strict=True)) for row in rows}
        return found, [line for line in lines if line not in table]

    return show


def test_settings_that_differ_and_no_other(runs, show):
    table, others = show("--runs", runs / "*")
    assert list(table) == ["a", "b", "c"]
    columns = ["run", "augment", "model.lr", "step", "seconds", "parameters"]
    assert list(table["a"])[:6] == columns
    assert [table["a"][name] for name in columns[1:4]] == ["none", "0.001", "20"]
    assert [table["b"][name] for name in columns[1:]] == ["flip", "0.00025", "3", "180", ""]
    assert [table["c"][name] for name in columns[1:]] == ["", "", "7", "", ""]
    assert others == [f"--runs={runs}/*: left out what holds no metrics: notes"]


def test_last_and_best_values(runs, show):
    table, _ = show("--runs", runs / "*")
    names = ["training/l2_loss", "lowest training/l2_loss", "fid", "lowest fid"]
    assert [table["b"][name] for name in names] == ["nan", "0.5", "30", "12.35"]
    assert [table["c"][name] for name in names] == ["nan", "nan", "", ""]  # too large for an axis: no number
    table, _ = show("--runs", runs / "?", "--metrics", "precision,*norm")
    assert [table["b"][name] for name in ("precision", "highest precision")] == ["0.3", "0.3"]
    assert not [name for name in table["c"] if name.split()[0] in ("lowest", "highest") and "norm" in name]
    assert table["c"]["training/grad_norm"] == "3"


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("training/l2_loss", "lowest"), ("validation_loss_t/0.5", "lowest"), ("fid", "lowest"), ("kid", "lowest"),
        ("recall", "highest"), ("inception_score", "highest"), ("fid.json/coverage_dinov2", "highest"),
        ("fid.json/fd_dinov2", "lowest"), ("training/grad_norm", None), ("validation/v_abs_mean", None),
    ],
)  # fmt: skip
def test_which_values_are_better(metric, direction):
    assert find_direction(metric) == direction
    best = find_best(metric, [3.0, math.nan, 1.0, 2.0, math.inf])
    assert best == (3 if direction == "highest" else 1)
    assert math.isnan(find_best(metric, [math.nan]))


def test_the_number_of_parameters_is_that_of_the_model(saved, show):
    expected = sum(leaf.size for leaf in jax.tree.leaves(load_generator(saved).params))
    assert count_parameters(saved) == expected
    table, _ = show("--runs", saved)
    assert table["run"]["parameters"] == f"{expected:,}"
    assert list(table["run"])[:3] == ["run", "step", "parameters"]  # one run differs from none


def test_a_checkpoint_that_cannot_be_read_has_no_number_of_parameters(runs, show):
    for file in (runs / "a" / "checkpoints" / "20").rglob("*"):
        if file.is_file() and file.name not in ("commit_success.txt", "_CHECKPOINT_METADATA"):
            file.write_bytes(b"")
    assert "parameters" not in show("--runs", f"{runs}/a,{runs}/b")[0]["a"]


def test_settings_of_other_versions_and_networks_are_no_difference(runs, show):
    """An older run is completed by how it behaved; what it cannot have is compared with nothing."""
    older = json.loads((runs / "a" / "config.json").read_text())
    assert not {"augment", "skip_nonfinite", "trackers"} & set(older)
    config = json.loads((runs / "b" / "config.json").read_text())
    assert {"skip_nonfinite", "trackers"} < set(config)
    table, _ = show("--runs", f"{runs}/a,{runs}/b")
    assert [name for name in table["a"] if name in (*config, "model.lr", "model.inner_scale")] == [
        "augment",
        "model.lr",
    ]


def test_a_damaged_configuration_costs_the_settings_alone(runs, show, capsys):
    (runs / "b" / "config.json").write_text("{")
    table, _ = show("--runs", f"{runs}/a,{runs}/b")
    assert list(table) == ["a", "b"]
    assert "model.lr" not in table["a"]


def test_scores_of_evaluations(runs, show):
    cells = [
        {"checkpoint_step": 1, "num_steps": 4, "fid": 9.0, "fid_validation": 0.1, "precision": 0.5},
        {"checkpoint_step": 2, "num_steps": 4, "fid": 8.0, "precision": 0.2},
        {"checkpoint_step": 2, "num_steps": 8, "fid": 8.5, "precision": 0.3},
        {"checkpoint_step": None, "num_steps": 8, "fid": 0.5},
    ]
    (runs / "b" / "fid.json").write_text(json.dumps({"cells": cells}))
    assert read_scores(runs / "b") == {"fid.json/fid": {1: 9.0, 2: 8.0}, "fid.json/precision": {1: 0.5, 2: 0.3}}
    table, _ = show("--runs", runs / "*")
    assert [table["b"][name] for name in ("fid", "fid.json/fid", "lowest fid.json/fid")] == ["30", "8", "8"]
    table, _ = show("--runs", runs / "b", "--metrics", "fid.json/p*")
    assert table["b"]["highest fid.json/precision"] == "0.5"
    # Nothing is set aside, as an evaluation does.
    (runs / "b" / "fid.json").write_text("{")
    table, _ = show("--runs", runs / "b")
    assert "fid.json/fid" not in table["b"]
    assert (runs / "b" / "fid.json").read_text() == "{"


def test_files_have_what_is_printed(runs, show, tmp_path, capsys):
    table, _ = show("--runs", runs / "*", "--out", tmp_path / "new" / "table.csv")
    with (tmp_path / "new" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(table["a"])
    assert [row["run"] for row in rows] == ["a", "b", "c"]
    assert rows[1]["lowest fid"] == "12.34567"  # unrounded
    assert rows[2]["fid"] == ""
    show("--runs", runs / "b", "--out", tmp_path / "table.md")
    plot_text = (tmp_path / "table.md").read_text()
    assert plot_text.splitlines()[2].startswith("| b ")
    assert plot_text.endswith("|\n")


def test_a_metrics_file_beside_runs(runs, show, tmp_path):
    copy = shutil.copy(runs / "b" / "metrics.jsonl", runs / "a" / "log.jsonl")
    table, _ = show("--runs", f"{copy},{runs}/b/metrics.jsonl,{runs}/a")
    assert list(table) == ["log", "b", "a"]
    assert [table[name]["model.lr"] for name in table] == ["", "0.00025", "0.001"]  # a log that is no run's own
    assert [table[name]["seconds"] for name in ("log", "b")] == ["180", "180"]


def test_patterns_and_names_that_look_like_them(runs):
    names = lambda words: [path.name for path in find_runs(words, "runs")]  # noqa: E731
    assert names([str(runs / "[bc]"), str(runs / "*")]) == ["b", "c", "a"]
    write_run(runs / "[bc]", {"step": 1, "x": 1.0})
    assert names([str(runs / "[bc]")]) == ["[bc]"]
    with pytest.raises(UserError, match=rf"--runs={runs}/z\* matches no run; there are {runs}/\[bc\], {runs}/a, "):
        find_runs([str(runs / "z*")], "runs")
    with pytest.raises(UserError, match=r"matches no run; .*notes has none; name folders of runs$"):
        find_runs([str(runs / "notes" / "*")], "runs")


def test_patterns_match_runs_in_object_storage(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("b", "a"):
        remote.write_bytes(f"memory://sweep/{name}/metrics.jsonl", b'{"step": 1, "fid": 3.0}\n')
    remote.write_bytes("memory://sweep/notes/x", b"no run")
    try:
        assert list(find_runs(["memory://sweep/*"], "runs").values()) == [{"fid": {1: 3.0}}] * 2
        with pytest.raises(UserError, match=r"--runs=memory://sweep/z\* matches no run; check the name"):
            find_runs(["memory://sweep/z*"], "runs")
    finally:
        for name in ("a/metrics.jsonl", "b/metrics.jsonl", "notes/x"):
            remote.remove(f"memory://sweep/{name}")


def test_curves_take_patterns_too(runs, read_flags, tmp_path, capsys):
    plot_metrics.main(read_flags(plot_metrics, ["--runs", f"{runs}/*", "--out", str(tmp_path / "c.png")]))
    assert "a has not logged fid" in capsys.readouterr().out
    assert (tmp_path / "c.png").exists()
