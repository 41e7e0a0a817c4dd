"""The first hour of three kinds of users, by the documented commands. Minutes long: `pytest --slow`."""

import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from utils.trackers.trackers import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("journeys")]


def run(*args, cwd=ROOT, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def photographs(shared, tmp_path_factory):
    """A flat folder of 300 JPEGs of faces."""
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("photographs")
    files = sorted((shared / "data" / "celebahq_sample").glob("*.parquet"))
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    for number, row in enumerate(rows):
        (folder / f"{number:03d}.jpg").write_bytes(row["image"]["bytes"])
    return folder


@pytest.fixture(scope="session")
def student(photographs, tmp_path_factory):
    """(folder of her run, what it printed): a thousand steps at 32x32."""
    folder = tmp_path_factory.mktemp("student") / "faces"
    done = run(
        "train_flow.py", "--dataset_name", f"folder:{photographs}", "--image_size", 32, "--use_stable_vae", 0,
        "--model.hidden_size", 128, "--model.depth", 4, "--model.num_heads", 4, "--model.patch_size", 4,
        "--model.num_classes", 1, "--model.lr", "5e-4", "--batch_size", 32, "--max_steps", 1000,
        "--log_interval", 100, "--eval_interval", 500, "--save_dir", folder, "--wandb.mode", "disabled",
    )  # fmt: skip
    return folder, done.stdout + done.stderr


def test_a_student_is_told_why_her_first_pictures_are_noise(student):
    folder, output = student
    assert re.search(r"data: folder:\S+, \d+ images to train on and \d+ held out, 32x32x3, 1 class, ", output)
    assert "half of them mirrored" in output
    assert "of which 95% is initial parameters at the first evaluation (step 500)" in output
    assert "--ema_warmup 1 follows the parameters from the start" in output
    assert {path.name for path in (folder / "images").iterdir()} >= {"sample_cfg_4", "sample_raw_cfg_4"}
    assert f"done: images, metrics.jsonl and checkpoints are in {folder}" in output


def test_every_rate_of_the_students_bar_is_plausible(student):
    folder, output = student
    rates = [line["training/images_per_second"] for line in read_metrics(folder / "metrics.jsonl")
             if "training/images_per_second" in line]  # fmt: skip
    assert len(rates) >= 9
    assert max(rates) < 3 * min(rates)
    assert [float(rate.replace(",", "")) for rate in re.findall(r"([\d,.]+) images/s", output)]


def test_what_the_student_trained_is_faces_without_the_ema(student, photographs, tmp_path):
    """Nearer to the mean face than noise is, and as varied as faces."""
    folder, _ = student
    samples = tmp_path / "samples.npz"
    run("sample.py", "--load_dir", folder, "--params", "raw", "--num_samples", 16, "--save_samples", samples,
        "--out", tmp_path)  # fmt: skip
    made = np.load(samples)["arr_0"].astype(float)
    faces = [Image.open(path).convert("RGB").resize((32, 32)) for path in sorted(photographs.iterdir())[:100]]
    faces = np.stack([np.asarray(face, float) for face in faces])

    def roughness(images):
        """Mean difference of neighbours, over the deviation: about 1.1 of noise."""
        return np.abs(np.diff(images, axis=2)).mean() / images.std()

    assert roughness(faces) < 0.4
    assert roughness(made) < 0.6
    assert made.std(axis=0).mean() > 0.3 * faces.std(axis=0).mean()


def test_an_engineer_compares_two_folders(photographs, tmp_path):
    for name, rows in {"A": slice(0, 50), "B": slice(50, 150)}.items():
        (tmp_path / name).mkdir()
        for path in sorted(photographs.iterdir())[rows]:
            Image.open(path).convert("RGB").resize((64, 64)).save(tmp_path / name / f"{path.stem}.png")
    command = "eval_fid.py --samples A --fid_stats B --json - --quiet".split()  # noqa: SIM905
    done = run(ROOT / command[0], *command[1:], cwd=tmp_path)
    assert done.stderr == ""
    (row,) = json.loads(run("-m", "json.tool", input=done.stdout).stdout)
    assert 20 < row["fid"] < 300
    assert row["num_samples"] == 50
    assert {path.name for path in (tmp_path / "A_fid").iterdir()} >= {"fid.json", "fid.csv"}


def test_a_developer_uses_the_checkout_from_elsewhere(student, tmp_path):
    folder, _ = student
    script = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from utils.runs.opening import load_generator
        generator = load_generator({str(folder)!r})
        images = generator.sample(labels=[0, 0], num_steps=4, seed=0)
        print(images.shape, images.dtype, generator.class_names)
    """
    done = run("-I", "-c", textwrap.dedent(script), cwd=tmp_path)
    assert done.stdout.startswith("(2, 32, 32, 3) uint8")
