"""Flags of an evaluation arrive, and all that enters a number is in the key of its row. Nothing is scored here."""

import json

import jax
import numpy as np
import pytest

import eval_fid
from tests.test_generate import run  # noqa: F401 (fixture)
from utils.metrics.extractors import POOL
from utils.metrics.reference import FeatureReference, ReferenceStatistics
from utils.runs import run_evaluation, scoring
from utils.runs.opening import load_generator
from utils.runs.results import Results
from utils.sampling.generator import ImageGenerator, hash_params

COUNTS = np.arange(10)


@pytest.fixture
def evaluate(run, read_flags, tmp_path, monkeypatch):  # noqa: F811
    """evaluate('--flag value ...') -> rows of fid.json; evaluate.loaded is what was asked of Inception."""
    loaded = []

    def load_extractors(names, weights, convention, sharding):
        loaded.append((weights, convention))

    def load_statistics(path, widths):
        moments = {POOL: FeatureReference(np.zeros(2), np.eye(2))}
        return ReferenceStatistics(moments, f"hash of {path}", path, label_counts=COUNTS)

    def load_logits(path):
        loaded.append(path)
        return np.zeros((2048, 1008), np.float32)

    monkeypatch.setattr(scoring, "load_extractors", load_extractors)
    monkeypatch.setattr(scoring, "load_statistics", load_statistics)
    monkeypatch.setattr(scoring, "load_logits", load_logits)
    monkeypatch.setattr(run_evaluation.RunEvaluation, "evaluate", lambda self, sampler: {"fid": 1.0})

    def start(line=""):
        words = ["--load_dir", str(run), "--out", str(tmp_path), "--wandb.mode", "disabled", "--fid_stats", "s.npz"]
        eval_fid.main(read_flags(eval_fid, [*words, "--convention", "adm", *line.split()]))
        return Results(tmp_path).rows

    start.loaded = loaded
    return start


def test_a_row_of_other_parameters_is_another_row(evaluate, monkeypatch):
    (row,) = evaluate()
    assert evaluate() == [row]
    restore_params = run_evaluation.restore_params

    def restore_others(*arguments):
        step, params = restore_params(*arguments)
        return step, jax.tree.map(lambda leaf: leaf + 1, params)  # of a run that began again, say

    monkeypatch.setattr(run_evaluation, "restore_params", restore_others)
    first, second = evaluate()
    assert first == row
    assert {name for name in row if row[name] != second[name]} == {"params_sha256"}


def test_a_row_under_other_settings_of_jax_is_another_row(evaluate):
    (row,) = evaluate()
    jax.config.update("jax_random_seed_offset", 3)
    try:
        first, second = evaluate()
        assert evaluate() == [first, second]
    finally:
        jax.config.update("jax_random_seed_offset", 0)
    assert first == row
    assert second == row | {"jax_variables": ["JAX_RANDOM_SEED_OFFSET=3"]}
    assert evaluate() == [first, second]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--num_samples 7 --seed 5 --labels balanced --model.dtype float32 --fid_stats t.npz --solver heun "
            "--convention pytorch_fid --denoise_timesteps 3 --cfg_scale 2 --cfg_interval 0,0.5 --time_grid shift:3 "
            "--cfg_channels 1",
            {
                "num_samples": 7, "seed": 5, "labels": "balanced", "dtype": "float32", "fid_stats": "t.npz",
                "fid_stats_sha256": "hash of t.npz", "solver": "heun", "convention": "pytorch_fid", "num_steps": 3,
                "cfg_scale": 2, "cfg_interval": [0, 0.5], "time_shift": 3, "cfg_channels": 1, "checkpoint_step": 20,
            },
        ),
        ("--solver dopri5 --rtol 1e-3 --atol 1e-4", {"solver": "dopri5", "rtol": 1e-3, "atol": 1e-4}),
    ],
)  # fmt: skip
def test_a_row_says_what_enters_its_numbers(evaluate, line, expected):
    (row,) = evaluate(line)
    assert {name: row[name] for name in expected} == expected


def test_weights_labels_and_batches_are_those_of_the_flags(evaluate, monkeypatch, tmp_path):
    seen = []

    def look(self, sampler):
        seen.append(self)
        return {"fid": 1.0}

    monkeypatch.setattr(run_evaluation.RunEvaluation, "evaluate", look)
    flags = "--inception_weights w.pt --inception_logits fc.npz --labels dataset --batch_size 6 --seed 5"
    rows = evaluate(f"{flags} --json {tmp_path / 'rows.json'}")
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    (evaluation,) = seen
    assert evaluate.loaded == ["fc.npz", ("w.pt", "adm")]
    assert evaluation.logits is not None
    assert evaluation.batch_size == 6
    assert evaluation.generator.label_mode == "dataset"
    np.testing.assert_array_equal(evaluation.generator.counts, COUNTS)
    expected = ImageGenerator(evaluation.model, evaluation.generator.params, seed=5)
    np.testing.assert_array_equal(evaluation.generator.noise([3]), expected.noise([3]))


def test_raw_parameters_are_another_row_which_says_so(evaluate, run):  # noqa: F811
    (ema,) = evaluate()
    rows = evaluate("--params raw")
    assert evaluate("--params raw") == rows  # found again
    assert [row.get("params") for row in rows] == [None, "raw"]
    hashes = [hash_params(load_generator(run, params=which).params) for which in ("ema", "raw")]
    assert [row["params_sha256"] for row in rows] == hashes
    assert rows[0] == ema


def test_classes_without_images_are_not_drawn_and_make_another_row(evaluate, monkeypatch):
    (whole,) = evaluate()
    load_model = run_evaluation.load_model

    def load(saved, *arguments, **keywords):
        return load_model(saved | {"dataset": saved["dataset"] | {"empty_classes": [4]}}, *arguments, **keywords)

    monkeypatch.setattr(run_evaluation, "load_model", load)
    first, second = evaluate()
    assert first == whole
    assert {name for name in second if second[name] != first.get(name)} == {"empty_classes"}
    (_, _, by_reference) = evaluate("--labels dataset")  # which has images of it
    assert "empty_classes" not in by_reference
