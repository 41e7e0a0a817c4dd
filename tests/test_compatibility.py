"""Runs of earlier commits load: resumed, sampled and scored, they give the numbers that they gave then."""

import json
import shutil
import tarfile

import numpy as np
import pytest

from tests.conftest import GOLDEN, run_program
from tests.runs import losses

TRAIN = """
    train_flow.py --dataset_name digits --use_stable_vae 0 --model.hidden_size 32 --model.depth 1 --model.num_heads 2
    --model.patch_size 2 --model.num_classes 10 --batch_size 16 --log_interval 5 --eval_interval 0
    --wandb.mode disabled --model.dtype float32 --model.lr 1e-3 --model.target_update_rate 0.9 --max_steps 30
""".split()  # noqa: SIM905 (a command line, as one types it)
# The runs of tests/golden, and what continues each: the whole command line, or its folder alone.
RUNS = {"run": TRAIN, "shortcut_run": ["train_flow.py", "--max_steps", "30"]}
EVALUATE = """
    eval_fid.py --denoise_timesteps 4 --cfg_scale 2 --num_samples 16 --batch_size 16 --wandb.mode disabled
    --fid_stats data/fid_stats_digits.npz
""".split()  # noqa: SIM905

pytestmark = pytest.mark.xdist_group("golden run")


def unpack(name, folder):
    """Unpacks tests/golden/NAME.tar.gz: `run` at step 20, and what the commit that saved it made of it."""
    with tarfile.open(GOLDEN / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The oldest of the saved runs."""
    return unpack("run", tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", RUNS)
def test_a_saved_run_is_resumed(name, tmp_path):
    saved = unpack(name, tmp_path)
    run_dir = shutil.copytree(saved / "run", tmp_path / "resumed")
    done = run_program(*RUNS[name], "--save_dir", run_dir)
    assert "from step 20" in done.stdout
    changes = [line for line in done.stdout.splitlines() if line.startswith("since step")]
    assert changes == ["since step 20: --max_steps=30, was 20"]
    (saved / "run" / "metrics.jsonl").write_bytes((saved / "resumed_metrics.jsonl").read_bytes())
    expected, found = losses(saved / "run"), losses(run_dir)
    assert list(found) == [1, 5, 10, 15, 20, 25, 30]
    # On the machine that saved it bit for bit; elsewhere to float32 rounding.
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)


def test_a_saved_run_is_sampled_and_scored(saved, tmp_path, weights):
    arguments = ["--load_dir", saved / "run", "--out", tmp_path, "--save_samples", tmp_path / "samples.npz"]
    run_program(*EVALUATE, *arguments, "--inception_weights", weights)
    then, now = np.load(saved / "samples.npz"), np.load(tmp_path / "samples.npz")
    np.testing.assert_array_equal(now["arr_1"], then["arr_1"])
    difference = np.abs(now["arr_0"].astype(int) - then["arr_0"])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-2
    scores = [json.loads((folder / "fid.json").read_text())["cells"][0] for folder in (saved, tmp_path)]
    assert scores[1]["fid"] == pytest.approx(scores[0]["fid"], rel=1e-3)
    assert scores[0].keys() <= scores[1].keys()  # more is recorded since then


def test_a_saved_shortcut_model_is_sampled(tmp_path):
    saved = unpack("shortcut_run", tmp_path)
    words = ["--denoise_timesteps", 4, "--cfg_scale", 2, "--num_samples", 16, "--quiet"]
    out = tmp_path / "now.npz"
    run_program("sample.py", "--load_dir", saved / "run", "--out", tmp_path / "o", "--save_samples", out, *words)
    then, now = np.load(saved / "samples.npz"), np.load(out)
    np.testing.assert_array_equal(now["arr_1"], then["arr_1"])
    difference = np.abs(now["arr_0"].astype(int) - then["arr_0"])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-2
