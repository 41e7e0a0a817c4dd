"""Runs on the hub: pushed, and sampled from elsewhere by name."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import GOLDEN, ROOT, run_program
from tests.fake_hub import fake_hub
from utils.base.messages import UserError
from utils.convert.sources import read_source
from utils.runs.importing import import_run
from utils.runs.opening import open_checkpoint

MODEL = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "cfg_scale": 4.0, "denoise_timesteps": 32, "preset": "debug"}


@pytest.fixture
def hub(tmp_path):
    with fake_hub() as server:
        yield server


def run(hub, cwd, *args, check=True):
    environment = {
        "HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_x", "HF_HOME": str(cwd / "hub"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    return run_program(ROOT / args[0], *args[1:], check=check, env=environment, cwd=cwd)


def test_a_run_is_pushed_and_sampled_by_name(hub, tmp_path, monkeypatch):
    source = read_source(str(GOLDEN / "checkpoints" / "sit_small_train.pt"))
    codec = f"kl:{GOLDEN / 'vae_tiny'}"
    import_run("sit_small_train.pt", source, tmp_path / "run", MODEL, num_heads=2, codec=codec)
    here = tmp_path / "here"
    there = tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    push = ["convert_checkpoint.py", "--load_dir", tmp_path / "run", "--out", here / "faces", "--push", "someone/faces"]
    done = run(hub, here, *push, "--private")
    assert f"{hub.address}/someone/faces" in done.stdout
    assert hub.created[0]["visibility"] == "private"
    files = hub.repositories["someone/faces"]
    assert files.keys() == {"README.md", "config.json", "model.safetensors", "samples.png"}
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name:")
    assert "trained with the objective `flow_matching`" in card
    assert "a VAE with sha256 " in card
    assert str(tmp_path) not in card
    assert str(GOLDEN) not in card
    assert json.loads(files["config.json"])["imported"]["family"] == "sit"

    # Elsewhere, by the card's own line; the second time from what is there.
    (line,) = re.findall(r"^    python \$PYTHONPATH/(sample\.py .*)$", card, re.MULTILINE)
    assert line == "sample.py --load_dir hf:someone/faces --cfg_scale 2"
    words = [*line.split(), "--num_samples", 2, "--denoise_timesteps", 2, "--save_samples", "a.npz"]
    done = run(hub, there, *words)
    assert (there / "runs" / "someone--faces" / "samples" / "grid.png").is_file()
    run(hub, tmp_path, *["sample.py", "--load_dir", "run", *words[3:-1], tmp_path / "b.npz"])
    np.testing.assert_array_equal(*(np.load(path)["arr_0"] for path in (there / "a.npz", tmp_path / "b.npz")))
    count = len(hub.downloads)
    run(hub, there, *words)
    assert len(hub.downloads) == count

    # The card's Python.
    monkeypatch.chdir(there)
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len([line for line in lines.splitlines() if line]) == 3
    namespace = {}
    exec(lines.replace("num_steps=64", "num_steps=1"), namespace)
    assert namespace["images"].shape == (1, 64, 64, 3)
    assert "# uint8 (1, 64, 64, 3)" in lines

    done = run(hub, there, "sample.py", "--load_dir", "hf:someone/nothing", check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "someone/nothing is no file or folder here and cannot be fetched from the hub" in done.stderr


def test_a_run_that_was_not_fetched_to_its_end_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = read_source(str(GOLDEN / "checkpoints" / "sit_small_train.pt"))
    folder = Path("runs/someone--faces")
    left = folder / "checkpoints" / "0.orbax-checkpoint-tmp-0"
    left.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")

    def fetch(load_dir, into):
        assert (load_dir, into.resolve()) == ("hf:someone/faces", folder.resolve())
        import_run(load_dir, source, into, MODEL, num_heads=2, codec=f"kl:{GOLDEN / 'vae_tiny'}")

    monkeypatch.setattr("utils.runs.opening.fetch_run", fetch)
    _, steps = open_checkpoint("hf:someone/faces")
    assert steps == [0]
    assert not left.exists()
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["imported"]["family"] == "sit"
    monkeypatch.setattr("utils.runs.opening.fetch_run", None)  # no more
    assert open_checkpoint("hf:someone/faces")[1] == [0]


def test_a_hub_id_that_is_none_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whatever lies beside the checkout
    for source in ("a/b/c", "no such", "../x"):
        with pytest.raises(UserError, match=f"--source={source}: there is no such file"):
            read_source(source)
