"""The benchmarks run with one command each, and what they compare with computes what it should."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from benchmarks.structure import GOALS, measure_structure
from diffusion_transformer import DiT, DiTConfig
from tests.conftest import ROOT, run_program
from utils.convert.jax_flow import import_jax_flow_params
from utils.data.loaders import load_dataset

SMALL = ["--model", "debug", "--patch_size", 8, "--batch", 2, "--rounds", 1]


@pytest.fixture
def baseline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import jax_flow_baseline

    yield jax_flow_baseline
    del sys.modules["jax_flow_baseline"]


def test_the_baseline_model_is_the_same_function(baseline):
    model = DiT(
        DiTConfig(
            patch_size=2,
            hidden_size=32,
            depth=1,
            num_heads=4,
            mlp_ratio=4.0,
            class_dropout_prob=0.1,
            num_classes=10,
            dtype="float32",
        )
    )
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_networks_side_by_side(weights, tmp_path):
    args = ["--inception_weights", weights, "--batch", 1, "--image_size", 32, "--rows", "ours,ours: bfloat16"]
    ours, low = measure("inception.py", tmp_path / "figures.json", *args)
    assert ours["largest difference"] is None
    assert 1e-6 < low["largest difference"] < 0.1


def write_losses(run, steps, difference=0.0) -> None:
    """Metrics of a run whose losses fall from 2 by 0.01 a step, plus a difference."""
    run.mkdir(parents=True)
    lines = [{"step": s, f"{g}/l2_loss": 2 - s / 100 + difference} for s in steps for g in ("training", "validation")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_side_by_side(tmp_path):
    for number, run in enumerate((tmp_path / "a", tmp_path / "b")):
        write_losses(run, range(30), number / 100)
        images = np.full((9, 8, 8, 1), 10 * number, np.uint8)
        np.savez(run / "samples.npz", arr_0=images, arr_1=np.arange(9))
    runs = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    done = run_program("benchmarks/loss_parity.py", "--runs", runs, "--out", tmp_path / "out", "--window", 5)
    assert "training/l2_loss, 30 logged steps, mean of 5: at most 0.57% apart (at step 29)" in done.stdout
    assert "10.0 grey levels apart" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"loss_parity.png", "samples_parity.png"}


def test_runs_of_few_steps_in_common_and_without_samples(tmp_path):
    a, b, c, d = (tmp_path / folder / "run" for folder in "abcd")  # all of one name
    for run, steps in ((a, range(1, 8)), (b, range(4, 12)), (c, range(20, 30))):
        write_losses(run, steps)
    (d / "checkpoints").mkdir(parents=True)
    command = ["benchmarks/loss_parity.py", "--out", tmp_path / "out", "--window"]

    def refuse(runs, window=2) -> str:
        done = run_program(*command, window, "--runs", ",".join(map(str, runs)), check=False)
        assert done.returncode == 1
        assert not (tmp_path / "out").exists()
        (line,) = done.stderr.splitlines()
        return line

    assert refuse([a, b], 5) == "error: --window=5 logged steps, but the runs share 4 of training/l2_loss; use less"
    assert "logged training/l2_loss at no step in common; use one --log_interval" in refuse([a, c])
    assert f"--runs={d} holds no metrics" in refuse([a, d])
    assert "give two folders" in refuse([a])

    done = run_program(*command, 4, "--runs", f"{a},{b}")
    assert "validation/l2_loss, 4 logged steps, mean of 4: at most 0.00% apart (at step 7)" in done.stdout
    assert f"samples are not compared: {a / 'samples.npz'} is not there" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["loss_parity.png"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 8, 8, 1), np.uint8), "arr_1": np.zeros(2)}, "they differ in number, size or labels"),
        ({"arr_0": np.zeros((3, 8, 8, 1), np.uint8), "arr_1": np.ones(3)}, "they differ in number, size or labels"),
        ({"arr_0": np.zeros((3, 4, 4, 3), np.uint8), "arr_1": np.zeros(3)}, "they differ in number, size or labels"),
        ({"arr_0": np.zeros((3, 8, 8, 1), np.uint8)}, "is no npz of labelled images"),
        ({"arr_0": np.uint8(3), "arr_1": np.zeros(3)}, "is no npz of labelled images"),
        (None, "is no npz of labelled images"),
    ],
)
def test_samples_that_cannot_be_compared_leave_the_losses(tmp_path, arrays, message):
    for name in ("a", "b"):
        write_losses(tmp_path / name, range(10))
        np.savez(tmp_path / name / "samples.npz", arr_0=np.zeros((3, 8, 8, 1), np.uint8), arr_1=np.zeros(3))
    if arrays is None:
        (tmp_path / "b" / "samples.npz").write_bytes(b"PK")
    else:
        np.savez(tmp_path / "b" / "samples.npz", **arrays)
    runs = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    done = run_program("benchmarks/loss_parity.py", "--runs", runs, "--out", tmp_path / "out")
    assert re.search(f"samples are not compared: .*{message}", done.stdout)
    assert done.stdout.splitlines()[2] == f"written: {tmp_path / 'out' / 'loss_parity.png'}"


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


def gpu_day(*args: object, **environment: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "SMALL": "1", **{name: str(value) for name, value in environment.items()}}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{environment['PATH']}"
    command = ["benchmarks/gpu_day.sh", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_part_that_is_none_is_refused(tmp_path):
    done = gpu_day("all", tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: all is none of right, step, sample, train, finish\n")


@pytest.mark.slow
def test_the_parts_of_a_gpu_day_run_in_small(tmp_path):
    assert gpu_day("right", tmp_path).returncode == 0
    rows = json.loads((tmp_path / "right.json").read_text())["rows"]
    assert {row["is"] for row in rows} == {"right"}
    assert {"du/dt of MeanFlow", "loss, bfloat16 of float32"} <= {row[""] for row in rows}
    done = gpu_day("sample", tmp_path)
    assert "| ours | " in done.stdout
    assert (tmp_path / "sample_b.json").exists()


def test_packed_images_are_unpacked_without_loss(tmp_path, weights):
    words = ["--dataset_name", "digits", "--inception_weights", weights, "--part_mib", 1, "--num_validation", 50]
    run_program("benchmarks/pack.py", *words, "--to", tmp_path / "parts")
    unpack = ["benchmarks/pack.py", "--unpack", tmp_path / "parts", "--to", tmp_path / "data"]
    run_program(*unpack)
    for split, count in (("train", 1500), ("validation", 50)):
        ours, packed = (load_dataset(name, split) for name in ("digits", f"npz:{tmp_path / 'data' / 'images.npz'}"))
        assert (packed.image_shape, packed.class_names, len(packed.source)) == ((8, 8, 1), ours.class_names, count)
        known = {(row["image"].tobytes(), int(row["label"])) for row in map(ours.source.__getitem__, range(count))}
        found = {(row["image"].tobytes(), int(row["label"])) for row in map(packed.source.__getitem__, range(count))}
        assert found == known
    assert (tmp_path / "data" / "inception.pt").read_bytes() == Path(weights).read_bytes()
    (tmp_path / "parts" / "part_0001").unlink()
    assert "parts are missing" in run_program(*unpack, check=False).stderr


@pytest.mark.slow
def test_a_gpu_day_trains_in_two_parts_and_scores_the_result(tmp_path, weights):
    words = ["--dataset_name", "digits", "--inception_weights", weights, "--to", tmp_path / "parts"]
    run_program("benchmarks/pack.py", *words, "--fid_stats", ROOT / "data" / "fid_stats_digits.npz")
    places = {"PARTS": tmp_path / "parts", "DATA": tmp_path / "data", "RUN": tmp_path / "run"}
    outputs = []
    for part in ("train", "finish"):
        done = gpu_day(part, tmp_path, **places, TRAIN_MINUTES=0.4, FINISH_MINUTES=0.4)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        outputs.append(done.stdout + done.stderr)
    stopped = [int(re.search(r"stopped at step (\d+) and saved", output).group(1)) for output in outputs]
    assert 0 < stopped[0] < stopped[1]
    assert f"resuming {tmp_path / 'run'} from step {stopped[0]}" in outputs[1]
    rows = json.loads((tmp_path / "fid.json").read_text())["cells"]
    assert [(row["num_steps"], row["num_samples"]) for row in rows] == [(50, 8), (1, 8)]


def test_the_structure_keeps_the_goals_that_it_has_reached():
    """All of `benchmarks/structure.py` but the lines from an image to its loss, of which two fifths are docstrings."""
    figures = measure_structure()
    least = {"lines with a comment, % (at least)"}
    most = GOALS.keys() - least - {"lines of these files"}
    assert [name for name in most if figures[name] > GOALS[name]] == []
    assert [name for name in least if figures[name] < GOALS[name]] == []
