"""Changes to a run between two starts: other data, other settings, damaged files, another process."""

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys

import jax
import pytest
from PIL import Image

from tests.conftest import ROOT, run_program
from tests.image_files import noise
from tests.runs import losses, start, wait_for_step
from utils.base.messages import progress_bar
from utils.runs.checkpoint import Checkpoints

pytestmark = pytest.mark.xdist_group("resume")

SMALL = """
    --use_stable_vae 0 --image_size 16 --model.patch_size 4 --model.hidden_size 8 --model.depth 1 --model.num_classes 5
    --model.dtype float32 --batch_size 4 --log_interval 1 --save_interval 2 --eval_interval 0 --wandb.mode disabled
""".split()  # noqa: SIM905 (a command line, as one types it)


def make_images(folder, names=("cat", "dog"), count=6) -> None:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(noise(10 * number + i, 16, 16, 3)).save(folder / name / f"{i}.png")


def train(run_dir, data, *args, check=True, max_steps=4, env=None):
    words = [*SMALL, "--dataset_name", f"folder:{data}", "--save_dir", run_dir, "--max_steps", max_steps, *args]
    return run_program("train_flow.py", *words, check=check, env=env)


def refused(done) -> str:
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "compiling" not in done.stdout
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return error


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pets"
    make_images(folder)
    return folder


@pytest.fixture(scope="module")
def to_step_4(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(folder, data)
    return folder


@pytest.fixture(scope="module")
def to_step_8(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, data, max_steps=8)
    return folder


@pytest.fixture
def run_dir(to_step_4, tmp_path):
    """A run that is to be continued after its step 4."""
    return shutil.copytree(to_step_4, tmp_path / "run")


def test_a_folder_that_grew_by_a_class_is_refused(run_dir, data, tmp_path):
    grown = shutil.copytree(data, tmp_path / "grown")
    make_images(grown, ["ant"])
    before = (run_dir / "config.json").read_bytes()
    assert "class 'ant' is new, so that labels shift: 0 was 'cat'" in refused(train(run_dir, grown, check=False))
    shutil.rmtree(grown / "ant")
    make_images(grown, count=7)
    assert re.search(
        r"2 images are new: cat/6.png, dog/6.png|1 image is new", refused(train(run_dir, grown, check=False))
    )
    assert (run_dir / "config.json").read_bytes() == before


def test_the_same_data_elsewhere_go_on_bit_for_bit(run_dir, data, to_step_8, tmp_path):
    copy = shutil.copytree(data, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    done = train(run_dir, copy, "--data_dir", "/nowhere", max_steps=8)
    assert "from step 4" in done.stdout
    assert "of the data" not in done.stdout
    assert losses(run_dir) == losses(to_step_8)
    assert len(list((run_dir / "configs").iterdir())) == 2
    # The machine of this start is in its folder alone: what is published is a checkpoint's configuration.
    text = (run_dir / "config.json").read_text()
    machine = json.loads(text)["machine"]
    assert (machine["devices"], machine["cores"], machine["jax"]) == (1, os.cpu_count(), jax.__version__)
    assert platform.node() not in text
    assert "machine" not in Checkpoints(run_dir).restore_config(8)


def test_changed_settings_are_said_and_another_objective_is_refused(run_dir, data):
    error = refused(train(run_dir, data, "--model.t_sampler", "uniform", check=False))
    assert "holds a run with --model.t_sampler=logit_normal, not uniform" in error
    assert "holds a run already" in refused(train(run_dir, data, "--load_dir", "no/such/run", check=False))
    error = refused(train(run_dir, data, env={"JAX_ENABLE_X64": "true"}, check=False))
    assert "was saved without JAX_ENABLE_X64=1: unset it to read it" in error
    words = ["--model.lr", 0.01, "--model.target_update_rate", 0.99]
    done = train(run_dir, data, *words, max_steps=5, env={"JAX_RANDOM_SEED_OFFSET": "3"})
    said = [line for line in done.stdout.splitlines() if line.startswith("since step 4")]
    assert said == [
        "since step 4: --max_steps=5, was 4",
        "since step 4: --model.lr=0.01, was 0.0001",
        "since step 4: --model.target_update_rate=0.99, was 0.9999",
        "since step 4: JAX_RANDOM_SEED_OFFSET=3, was 0: the numbers are others from here on",
    ]
    starts = sorted((run_dir / "configs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [json.loads(path.read_text())["model"]["lr"] for path in starts] == [0.0001, 0.01]


def test_a_run_that_started_from_another_goes_on_by_the_same_command(to_step_4, data, tmp_path):
    words = ["--load_dir", shutil.copytree(to_step_4, tmp_path / "source")]
    assert "arrays taken as they are" in train(tmp_path / "run", data, *words, max_steps=2).stdout
    shutil.rmtree(tmp_path / "source")
    assert "resuming" in train(tmp_path / "run", data, *words, max_steps=3).stdout


def test_another_architecture_to_start_from_is_refused_without_bad_advice(to_step_4, data, tmp_path):
    error = refused(train(tmp_path / "new", data, "--load_dir", to_step_4, "--model.hidden_size", 16, check=False))
    assert "--model.hidden_size=16, but --load_dir=" in error
    assert not re.search("delete|remove|damaged", error)


def test_runs_of_before_go_on_and_say_what_cannot_be_told(run_dir, data, to_step_8):
    for step in (2, 4):
        folder = run_dir / "checkpoints" / str(step)
        shutil.rmtree(folder / "checksums")
        (file,) = (folder / "config").glob("metadata")
        config = json.loads(file.read_text())
        del config["dataset"]["splits"], config["save_minutes"], config["max_megapixels"]
        file.write_text(json.dumps(config))
    (run_dir / "examples.tsv.gz").unlink()
    done = train(run_dir, data, max_steps=8)
    assert re.search("since step 4: of the data: .*is not known", done.stdout)
    assert losses(run_dir) == losses(to_step_8)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "json"])
def test_the_one_before_a_damaged_checkpoint_is_continued(run_dir, data, to_step_8, damage):
    newest = run_dir / "checkpoints" / "4"
    # Of all data files, since some are copies that are not read.
    files = [path for path in (newest / "params").rglob("*") if path.is_file() and path.parent.name == "d"]
    if damage in ("flip", "cut"):
        for file in files:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 16
            file.write_bytes(content if damage == "flip" else content[:50])
    elif damage == "missing":
        shutil.rmtree(newest / "ema_params")
    else:
        (file,) = (newest / "data").glob("metadata")
        file.write_text(file.read_text().replace("4", "5"))  # the position: still JSON
    (run_dir / "metrics.jsonl").write_bytes((run_dir / "metrics.jsonl").read_bytes() + b"\0" * 40)
    done = train(run_dir, data, max_steps=8)
    assert re.search(r"checkpoint .*checkpoints/4 is damaged: .*; going back to the one before it", done.stdout)
    assert "from step 2" in done.stdout
    assert losses(run_dir) == losses(to_step_8)
    assert (run_dir / "damaged_checkpoints" / "4.damaged1").is_dir()
    if damage == "flip":
        done = run_program(
            "eval_fid.py", "--load_dir", run_dir, "--model.cfg_scale", 1, "--out", run_dir / "out", check=False
        )
        assert "--model.cfg_scale=1.0 has no effect" in refused(done)


def test_a_file_that_vanishes_costs_no_step_and_a_second_process_is_refused(data, tmp_path):
    images = shutil.copytree(data, tmp_path / "images")
    args = [*SMALL, "--dataset_name", f"folder:{images}", "--save_interval", 100_000, "--log_interval", 20]
    run_dir = tmp_path / "run"
    process = start(*args, "--save_dir", run_dir, "--max_steps", 100_000)
    wait_for_step(process, run_dir, 20)

    second = train(run_dir, data, check=False)
    error = refused(second)
    assert re.search(rf"--save_dir={run_dir} is in use by process {process.pid} on \S+", error)

    (images / "cat" / "0.png").rename(tmp_path / "aside.png")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    (step,) = map(int, re.findall(r"cat/0.png cannot be read any more .*; saved at step (\d+)", error))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [str(step)]

    end = step + 3
    assert "1 image is gone: cat/0.png" in refused(train(run_dir, images, check=False, max_steps=end))
    (tmp_path / "aside.png").rename(images / "cat" / "0.png")
    train(run_dir, images, max_steps=end)
    train(tmp_path / "whole", images, "--log_interval", 20, "--save_interval", end, max_steps=end)
    expected = {at: values for at, values in losses(tmp_path / "whole").items() if at in losses(run_dir)}
    assert {at: values for at, values in losses(run_dir).items() if at in expected} == expected
    assert list(expected)[-1] == end

    process = start(*args, "--save_dir", run_dir, "--max_steps", 100_000)
    wait_for_step(process, run_dir, end + 40)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "resuming" in train(run_dir, images, max_steps=end + 1).stdout  # the lock of the killed one is none


def test_output_that_cannot_be_written_ends_no_run(data, tmp_path):
    args = [*SMALL, "--dataset_name", f"folder:{data}", "--save_dir", tmp_path, "--max_steps", 2]
    command = [sys.executable, "train_flow.py", *map(str, args)]
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=full, stderr=full, check=True)
    assert list(losses(tmp_path)) == [1, 2]


def test_no_progress_bar_fails_on_a_full_disk_under_the_log(monkeypatch):
    full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 (closing it fails)
    monkeypatch.setattr(sys, "stderr", full)
    assert list(progress_bar(range(3), "x", mininterval=0)) == [0, 1, 2]
    assert progress_bar(total=0).disable
    with contextlib.suppress(OSError):
        full.close()
    sources = [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py")]
    own = {path.name for path in sources if re.search(r"(from|import) tqdm", path.read_text(encoding="utf-8"))}
    assert own == {"bars.py"}


def test_what_still_waits_to_be_written_at_the_end_is_no_failure():
    # -E: with PYTHONUNBUFFERED nothing would wait.
    program = "from utils.base.messages import finish_output; print('a line that waits in the buffer')"
    for end, status in (("", 120), ("; finish_output()", 0)):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-E", "-c", program + end], cwd=ROOT, stdout=full, check=False)
        assert done.returncode == status


@pytest.mark.parametrize("prob", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_without_both_sides_of_guidance_there_is_none(data, tmp_path, weights, prob):
    words = ["--model.class_dropout_prob", prob, "--eval_interval", 2, "--model.denoise_timesteps", 2]
    done = train(tmp_path / "run", data, *words, max_steps=2)
    assert "samples are drawn without guidance" in done.stdout
    images = {path.name for path in (tmp_path / "run" / "images").iterdir()}
    assert images == {"reconstruction_n", "sample_cfg_1", "sample_raw_cfg_1", *(f"sample_N_{n}" for n in (1, 4, 32))}
    evaluate = ["eval_fid.py", "--load_dir", tmp_path / "run", "--fid_stats", "data/fid_stats_digits.npz"]
    evaluate += ["--num_samples", 4, "--denoise_timesteps", 2, "--batch_size", 4, "--wandb.mode", "disabled"]
    evaluate += ["--inception_weights", weights]
    assert f"--model.class_dropout_prob={prob} the model" in refused(
        run_program(*evaluate, "--cfg_scale", 4, check=False)
    )
