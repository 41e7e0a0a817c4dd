"""The commands that training ends with: they work as typed, on these data."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import compute_fid_stats
import eval_fid
import sample
import train_flow
from tests.conftest import ROOT
from utils.base import commands
from utils.data.loaders import load_dataset
from utils.flags import reading
from utils.training import advice

MODEL = {"denoise_timesteps": 32, "cfg_scale": 4.0, "class_dropout_prob": 0.1, "use_stable_vae": 0}
SAVED = {
    "dataset_name": "tfds:flowers", "data_dir": "/data/my sets", "image_size": 64, "model": MODEL,
    "objective": {"name": "flow_matching"}, "dataset": {"name": "tfds:flowers", "image_shape": [64, 64, 3]},
    "wandb": {"mode": "online"}, "fid_stats": None, "broken_images": "refuse", "max_megapixels": 200.0,
}  # fmt: skip


def write(saved: dict, num_images: int = 70_000, params: str = "ema") -> dict[str, list[str]]:
    """{purpose: words of the command behind the interpreter}."""
    found = advice.commands_after_training(Path("runs/my run"), saved, num_images, params)
    return {purpose: shlex.split(command)[1:] for purpose, command in found}


def test_commands_name_what_finds_the_data_again(read_flags):
    programs = write(SAVED)
    assert [Path(words[0]).name for words in programs.values()] == ["sample.py", "compute_fid_stats.py", "eval_fid.py"]
    stats = read_flags(compute_fid_stats, programs["reference of FID"][1:])
    assert (stats.dataset_name, stats.data_dir, stats.image_size) == ("tfds:flowers", "/data/my sets", 64)
    scoring = read_flags(eval_fid, programs["FID"][1:])
    assert (scoring.load_dir, scoring.fid_stats) == ("runs/my run", stats.out)
    assert (scoring.num_samples, scoring.denoise_timesteps, scoring.cfg_scale) == (50_000, ["32"], ["4"])


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"dataset_name": "digits", "dataset": {"name": "digits", "image_shape": [8, 8, 1]}}, None),
        ({"fid_stats": "a.npz", "convention": "adm"}, None),
        ({"dataset_name": "latents:L", "image_size": None, "data_dir": None}, "tfds:flowers --image_size 64"),
        ({"dataset_name": "pairs:P", "image_size": None, "data_dir": None}, "tfds:flowers --image_size 64"),
        ({"dataset_name": "pairs:P", "image_size": None, "data_dir": None,
          "dataset": {"name": "pairs of runs/a", "image_shape": [64, 64, 3]}}, "NAME --image_size 64"),
        ({"image_size": "24x40", "data_dir": None}, "tfds:flowers --image_size 24x40"),
        ({"dataset_name": "npz:x.npz", "image_size": None, "data_dir": None,
          "dataset": {"name": "npz:x.npz", "image_shape": [16, 24, 3]}}, "npz:x.npz"),
        ({"dataset_name": "folder:a b", "image_size": None, "data_dir": None, "broken_images": "skip",
          "max_megapixels": 9.0, "dataset": {"name": "folder:a b", "image_shape": [32, 32, 3]}},
         "'folder:a b' --image_size 32 --broken_images skip --max_megapixels 9.0"),
    ],
)  # fmt: skip
def test_a_reference_is_made_where_there_is_none(changes, flags, read_flags):
    programs = write(SAVED | changes)
    read_flags(eval_fid, programs["FID"][1:])
    assert ("reference of FID" in programs) == (flags is not None)
    if flags is not None:
        _, *words = programs["reference of FID"]
        assert words == shlex.split(f"--dataset_name {flags} --out 'runs/my run/fid_stats.npz'")
        read_flags(compute_fid_stats, words)


def test_features_are_those_of_the_training(read_flags):
    options = {"extractor_weights": "w.pth", "preprocessing": "dgm_eval", "extractor_dtype": "bfloat16"}
    saved = SAVED | {"fid_stats": "a.npz", "extractor": ["dinov2"], "metrics": ["fid"], **options}
    scoring = read_flags(eval_fid, write(saved)["FID"][1:])
    assert scoring.extractor == ["dinov2"]
    assert {name: scoring[name] for name in options} == options


def test_counts_scales_and_parameters_fit_the_run(read_flags):
    def scoring(*args, **model):
        return read_flags(eval_fid, write(SAVED | {"model": MODEL | model}, *args)["FID"][1:])

    assert scoring(1500).num_samples == 1500
    assert scoring(40).num_samples == 1000
    assert scoring(40, "raw").params == ["raw"]
    assert scoring(40, cfg_scale=-1.0).cfg_scale == ["-1"]
    assert not any("cfg" in word for word in write(SAVED | {"model": MODEL | {"class_dropout_prob": 0.0}})["FID"])


def test_another_interpreter_and_folder_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(commands.shutil, "which", lambda _: sys.executable)
    monkeypatch.chdir(ROOT)
    assert commands.write_command("sample.py", "--out", "a b") == "python sample.py --out 'a b'"
    monkeypatch.setattr(commands.shutil, "which", lambda _: "/elsewhere/python")
    monkeypatch.chdir(tmp_path)
    assert commands.write_command("sample.py") == shlex.join([sys.executable, str(ROOT / "sample.py")])


@pytest.mark.parametrize(
    ("words", "argv", "started"),
    [
        ("mine.py train_flow --seed 1", "mine.py --seed 1", "mine.py sample"),  # which has taken the program's name
        ("-X utf8 ../mine.py train_flow", "../mine.py", "-X utf8 ../mine.py sample"),
        ("-m mine train_flow --seed 1", "/x/mine.py --seed 1", "-m mine sample"),
        ("train_flow.py --seed 1", "train_flow.py --seed 1", "sample.py"),
        ("mine.py --seed 1", "mine.py --seed 1", "sample.py"),
        ("mine.py train_flow --seed 1", "mine.py --seed 2", "sample.py"),  # with words of its own
        ("notebook.py x", "notebook.py", "sample.py"),
    ],
)
def test_a_script_that_has_started_a_program_starts_the_others(monkeypatch, words, argv, started):
    monkeypatch.setattr(sys, "orig_argv", ["python", *words.split()])
    monkeypatch.setattr(sys, "argv", argv.split())
    monkeypatch.setattr(commands.shutil, "which", lambda _: sys.executable)
    monkeypatch.chdir(ROOT)
    assert commands.write_command("sample.py", "--out", "a b") == f"python {started} --out 'a b'"


@pytest.mark.parametrize(
    "data", [{"pixels": {"dtype": "float32", "range": [-3, 3]}}, {"image_shape": [64, 64, 4]}], ids=str
)
def test_moments_are_proposed_of_what_inception_does_not_take(data, read_flags):
    programs = write(SAVED | {"dataset": SAVED["dataset"] | data})
    assert [*programs] == ["samples", "reference of moments", "moments"]
    stats = read_flags(compute_fid_stats, programs["reference of moments"][1:])
    scoring = read_flags(eval_fid, programs["moments"][1:])
    assert (stats.metrics, scoring.metrics, scoring.fid_stats) == (["moments"], ["moments"], stats.out)


def test_the_scores_of_a_run_are_proposed_against_its_own_reference(read_flags):
    words = write(SAVED | {"fid_stats": "own.npz", "metrics": ["kid", "moments"]})["FID"]
    scoring = read_flags(eval_fid, words[1:])
    assert (scoring.fid_stats, scoring.metrics) == ("own.npz", ["kid", "moments"])


@pytest.fixture
def photographs(tmp_path) -> Path:
    folder = tmp_path / "my photographs"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


RUN = """
    --image_size 16 --use_stable_vae 0 --model.hidden_size 8 --model.depth 1 --model.num_heads 1 --model.patch_size 4
    --model.num_classes 2 --model.denoise_timesteps 2 --batch_size 4 --max_steps 1 --eval_interval 0
    --wandb.mode disabled
""".split()  # noqa: SIM905 (a command line, as one types it)


def train(photographs: Path, read_flags) -> None:
    data = ["--dataset_name", f"folder:{photographs}", "--save_dir", f"{photographs.parent}/a run"]
    train_flow.main(read_flags(train_flow, [*RUN, *data]))


def printed_commands(output: str) -> dict[str, str]:
    return dict(re.findall(r"^(samples|reference of FID|FID): (.*)$", output, re.MULTILINE))


def test_training_ends_with_commands_for_its_data(photographs, read_flags, capsys, signal_handlers, monkeypatch):
    monkeypatch.setattr(train_flow, "train", lambda *_: SimpleNamespace(step=1))
    train(photographs, read_flags)
    printed = printed_commands(capsys.readouterr().out)
    words = {purpose: shlex.split(command)[2:] for purpose, command in printed.items()}
    drawing = read_flags(sample, words["samples"])
    assert (drawing.load_dir, drawing.params) == (f"{photographs.parent}/a run", "raw")  # after one step
    config = read_flags(compute_fid_stats, words["reference of FID"])
    dataset = load_dataset(config.dataset_name, "train", reading.read_data_options(config))
    assert dataset.image_shape == (16, 16, 3)
    scoring = read_flags(eval_fid, words["FID"])
    assert (scoring.params, scoring.num_samples, scoring.fid_stats) == (["raw"], 1000, config.out)


@pytest.mark.slow
def test_the_commands_of_a_training_work_as_typed(photographs, read_flags, capsys, tmp_path, weights, signal_handlers):
    train(photographs, read_flags)
    for command in printed_commands(capsys.readouterr().out).values():
        command = command.replace("--num_samples 1000", "--num_samples 20")  # for which a test can wait
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a run" / "fid.json").exists()
