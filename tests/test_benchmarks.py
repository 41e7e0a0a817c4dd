"""The benchmarks run with one command each, and what they compare with computes what it should."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from diffusion_transformer import DiT, DiTConfig
from tests.conftest import ROOT, run_program
from utils.convert.jax_flow import import_jax_flow_params

SMALL = ["--model", "debug", "--patch_size", 8, "--batch", 2, "--rounds", 1]


@pytest.fixture
def baseline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import jax_flow_baseline

    yield jax_flow_baseline
    del sys.modules["jax_flow_baseline"]


def test_the_baseline_model_is_the_same_function(baseline):
    model = DiT(DiTConfig(2, 32, 1, 4, 4.0, 0.1, 10, dtype="float32"))
    params = baseline.create_params(model, (8, 8, 4))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), params)
    names = {
        r"^Conv_0": "PatchEmbed_0/Conv_0",
        r"^Dense_0": "TimestepEmbedder_0/Dense_1",  # Flax numbers the outer of two nested calls first
        r"^Dense_1": "TimestepEmbedder_0/Dense_0",
        r"^Embed_0": "LabelEmbedder_0/Embed_0",
        r"^Dense_2": "FinalLayer_0/Dense_0",
        r"^Dense_3": "FinalLayer_0/Dense_1",
        r"^Block_(\d+)/Dense_1": r"DiTBlock_\1/MlpBlock_0/Dense_1",
        r"^Block_(\d+)/Dense_2": r"DiTBlock_\1/MlpBlock_0/Dense_0",
        r"^Block_": "DiTBlock_",
    }
    flat = {}
    for name, value in flatten_dict(params["params"], sep="/").items():
        pattern = next((pattern for pattern in names if re.match(pattern, name)), "$^")
        flat[re.sub(pattern, names.get(pattern, ""), name)] = value
    flat["pos_embed"] = flat["pos_embed"][None]
    x, t = jax.random.normal(jax.random.key(0), (3, 8, 8, 4)), jnp.array([0.0, 0.3, 0.9])
    labels = jnp.array([1, 5, 10])
    expected = jax.jit(model.apply)({"params": import_jax_flow_params(flat)}, x, t, labels)
    found = jax.jit(baseline.DiT(model.config).apply)(params, x, t, labels)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def measure(program: str, path, *args) -> list[dict]:
    """The rows that a benchmark writes; each stands in the table that it prints."""
    done = run_program(f"benchmarks/{program}", *args, "--rounds", 1, "--json", path)
    rows = json.loads(path.read_text())["rows"]
    for row in rows:
        assert row["images/s"] > 0
        assert f"| {next(iter(row.values()))} | " in done.stdout
    return rows


@pytest.mark.parametrize(
    ("program", "names"),
    [
        ("train_step.py", ["jax-flow baseline", "ours"]),
        ("sample.py", ["jax-flow baseline", "ours"]),
    ],
)
def test_models_side_by_side(program, names, tmp_path):
    rows = measure(program, tmp_path / "figures.json", *SMALL, "--rows", ",".join(names), "--peak_tflops", 1)
    assert [row[""] for row in rows] == names
    assert [row["images/s"] for row in rows] == pytest.approx([2e3 / row["ms"] for row in rows])
    assert rows[0]["ratio"] == 1
    assert all(row["TFLOP/s"] > 0 and row["MFU"].endswith("%") for row in rows)


def test_pipelines_side_by_side(shared, tmp_path):
    args = ["--dataset_name", "cifar10", "--data_dir", shared / "data" / "tfds", "--batch", 8, "--repeats", 2]
    rows = measure("batches.py", tmp_path / "figures.json", *args, "--baseline_buffer", 50, "--step_ms", 1)
    assert [row["pipeline"] for row in rows] == ["ours", "jax-flow baseline"]
    assert [row["MB to the device an image"] for row in rows] == pytest.approx([0.0031, 0.0123], abs=1e-3)


def test_networks_side_by_side(weights, tmp_path):
    args = ["--inception_weights", weights, "--batch", 1, "--image_size", 32, "--rows", "ours,ours: bfloat16"]
    ours, low = measure("inception.py", tmp_path / "figures.json", *args)
    assert ours["largest difference"] is None
    assert 1e-6 < low["largest difference"] < 0.1


def test_runs_side_by_side(tmp_path):
    for number, run in enumerate(("a", "b")):
        (tmp_path / run).mkdir()
        losses = [
            {"step": s, f"{g}/l2_loss": 2 - s / 100 + number / 100}
            for s in range(30)
            for g in ("training", "validation")
        ]
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))
        images = np.full((9, 8, 8, 1), 10 * number, np.uint8)
        np.savez(tmp_path / run / "samples.npz", arr_0=images, arr_1=np.arange(9))
    runs = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    done = run_program("benchmarks/loss_parity.py", "--runs", runs, "--out", tmp_path / "out", "--window", 5)
    assert "training/l2_loss, 30 logged steps, mean of 5: at most 0.57% apart (at step 29)" in done.stdout
    assert "10.0 grey levels apart" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"loss_parity.png", "samples_parity.png"}


def test_unknown_rows_are_refused():
    done = run_program("benchmarks/train_step.py", *SMALL, "--rows", "theirs", check=False)
    assert done.returncode == 1
    assert "error: --rows=theirs is not measured here; there are jax-flow baseline, ours" in done.stderr


@pytest.mark.slow
def test_what_is_promised_of_a_run_holds_in_a_small_campaign():
    """`python benchmarks/campaigns.py` is the whole one. Full disks want root, and are left out here."""
    counts = ["--kill_runs", 2, "--kills", 3, "--signals", 4, "--flips", 60, "--full_disks", 0]
    done = run_program("benchmarks/campaigns.py", *counts)
    assert "60 flipped bits: " in done.stdout
    assert "silent" not in done.stdout
    assert "SIGTERM and SIGINT to either: 4 stopped and saved" in done.stdout
    assert re.search(r"2 runs, \d kills: 2 final states and 2 whole logs equal", done.stdout)
