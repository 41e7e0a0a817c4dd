"""Tests of sample.py: classes by name, the same images as in an evaluation, films from noise to image."""

import os
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import edit
import sample
from tests.conftest import ROOT, run_program
from tests.test_generate import generator, run  # noqa: F401 (fixtures)
from utils.base.messages import UserError, WriteError
from utils.conditions.classes import ClassCondition
from utils.flags import conditions, drawing
from utils.images.plotting import sample_grid
from utils.images.samples import open_samples
from utils.runs.opening import load_generator
from utils.sampling.solvers import SamplerConfig

NAMES = ("tench", "goldfish", "great white shark", "tiger shark")


@pytest.fixture
def draw(read_flags, run, tmp_path):  # noqa: F811
    """draw('--flag value ...') -> the folder where the program has written."""

    def start(line: str):
        words = ["--load_dir", str(run), "--out", str(tmp_path / "out"), *line.split()]
        sample.main(read_flags(sample, words))
        return tmp_path / "out"

    return start


def rename(model, *names):
    """The model with other classes."""
    return model._replace(network=model.network.clone(condition=ClassCondition(*names)))


def test_classes_are_named_by_names_and_numbers(generator):  # noqa: F811
    model = rename(generator.model, NAMES)
    assert conditions.choose_conditions("goldfish, 3,Tench", model).tolist() == [1, 3, 0]
    assert conditions.choose_conditions("all", model).tolist() == [0, 1, 2, 3]
    assert conditions.choose_conditions(None, model) is None
    with pytest.raises(UserError, match="--edit=goldfsh: 'goldfsh' is no class"):
        conditions.choose_conditions("goldfsh", model, "edit")


def test_classes_without_images_are_not_among_all_and_named_where_asked_for(generator, capsys):  # noqa: F811
    model = rename(generator.model, NAMES, (0, 2))
    assert conditions.choose_conditions("all", model).tolist() == [1, 3]
    assert capsys.readouterr().err == ""
    assert conditions.choose_conditions("tench,3", model).tolist() == [0, 3]
    assert "--classes=tench,3: the run had no training images of tench; expect noise" in capsys.readouterr().err


def test_the_images_are_those_of_an_evaluation(draw, generator, tmp_path, capsys):  # noqa: F811
    words = "--num_samples 5 --denoise_timesteps 4 --cfg_scale 2 --seed 3 --batch_size 5"
    out = draw(f"{words} --save_samples {tmp_path / 'samples.npz'}")
    (batch,) = generator.generate(SamplerConfig(4, 2.0), 5, 5)
    images, labels = batch.to_host()
    with np.load(tmp_path / "samples.npz") as saved:
        np.testing.assert_array_equal(saved["arr_0"], images)
        np.testing.assert_array_equal(saved["arr_1"], labels)
    assert capsys.readouterr().out.splitlines() == [str(out / "grid.png"), str(tmp_path / "samples.npz")]
    draw(f"{words} --classes 3,7 --save_samples {tmp_path / 'chosen.npz'}")
    with np.load(tmp_path / "chosen.npz") as saved:
        assert list(saved["arr_1"]) == [3, 7, 3, 7, 3]


def test_eight_devices_and_another_working_directory_change_no_image(run, generator, tmp_path):  # noqa: F811
    words = "--num_samples 5 --denoise_timesteps 4 --cfg_scale 2 --seed 3 --save_samples samples.npz --quiet"
    program = [ROOT / "sample.py", "--load_dir", run, "--out", "."]
    done = run_program(*program, *words.split(), devices=8, cwd=tmp_path)
    assert done.stdout.splitlines() == ["grid.png", "samples.npz"]
    (batch,) = generator.generate(SamplerConfig(4, 2.0), 5, 5)
    with np.load(tmp_path / "samples.npz") as saved:
        # Rounding to bfloat16 depends on the batch that a device has.
        assert np.abs(saved["arr_0"].astype(int) - batch.to_host()[0]).max() <= 1


def test_files_finished_before_the_disk_was_full_are_named(draw, full_disk, tmp_path, capsys):
    full_disk(12_000)  # for 100 samples of 8x8, but no grid of them
    words = f"--num_samples 100 --denoise_timesteps 1 --cfg_scale 1 --save_samples {tmp_path / 's.npz'}"
    with pytest.raises(
        WriteError, match=r"grid\.png could not be written \(File too large\); the files above are whole"
    ):
        draw(words)
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "s.npz")]
    assert list((tmp_path / "out").iterdir()) == []
    assert open_samples(tmp_path / "s.npz").num_samples == 100


@pytest.mark.parametrize("file_format", ["webp", "gif"])
def test_a_film_starts_at_the_noise_and_ends_at_the_images(draw, generator, file_format, tmp_path):  # noqa: F811
    words = f"--film --film_frames 3 --film_format {file_format}"
    out = draw(f"--num_samples 4 --denoise_timesteps 6 --seed 3 {words}")
    (path,) = out.glob("film.*")
    with Image.open(path) as film:
        assert film.n_frames == 4
        film.seek(3)
        last = np.asarray(film.convert("RGB")).astype(int)
        film.seek(0)
        first = np.asarray(film.convert("RGB")).astype(int)
    noise = generator.decode(generator.noise(range(4)))
    labels = generator.conditions(range(4))
    names = generator.class_names
    title = "6 Euler steps, guidance 4, seed 3"
    sample_grid(noise, labels, names, title).savefig(tmp_path / "noise.png")
    dots = re.sub(r"\S", ".", title)  # in as many lines
    sample_grid(noise, labels, [" "] * len(names), dots).savefig(tmp_path / "without_texts.png")

    def difference(shown: np.ndarray, path: Path) -> float:
        """Compares a frame with a figure of its size."""
        expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert shown.shape == expected.shape
        return np.abs(shown - expected).mean()

    # Film formats are lossy.
    assert difference(first, tmp_path / "noise.png") < min(5, 0.5 * difference(first, tmp_path / "without_texts.png"))
    assert difference(last, out / "grid.png") < 5
    assert np.abs(first - last).mean() > 10
    assert (out / "strip.png").stat().st_size > 1000


def test_labels_parameters_and_dtype_are_those_of_the_flags(draw, read_flags, run, tmp_path):  # noqa: F811
    draw(f"--num_samples 20 --labels balanced --denoise_timesteps 1 --save_samples {tmp_path / 'samples.npz'}")
    with np.load(tmp_path / "samples.npz") as saved:
        assert list(saved["arr_1"]) == [*range(10), *range(10)]
    words = ["--load_dir", str(run), "--out", str(tmp_path), "--params", "raw", "--dtype", "float32"]
    generator = drawing.load_request(read_flags(sample, words)).generator  # noqa: F811
    assert generator.model.network.config.dtype == "float32"
    jax.tree.map(np.testing.assert_array_equal, generator.params, load_generator(run, params="raw").params)


def test_more_classes_than_samples_are_reported(read_flags, run, tmp_path, capfd):  # noqa: F811
    words = ["--load_dir", str(run), "--out", str(tmp_path), "--classes", "1,2,3", "--num_samples", "2"]
    assert drawing.load_request(read_flags(sample, words)).conditions.tolist() == [1, 2]
    warned = capfd.readouterr().err
    assert "3 conditions are given; only the first are drawn with --num_samples=2" in warned


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--classes 11", r"--classes=11: there is no class 11"),
        ("--denoise_timesteps 0", r"--denoise_timesteps=0: use a whole number from 1"),
        ("--denoise_timesteps 4,2", r"give one of each; eval_fid.py compares several"),
        ("--film_frames 9", r"--film_frames=9 has no effect without --film"),
        ("--classes 3 --labels balanced", r"--labels=balanced has no effect where conditions are given"),
        ("--batch_size 0", r"--batch_size=0: use 1 or more"),
        ("--vae x", r"--codec=kl:x has no effect on a run of pixels"),
        ("--cfg_channels 2", r"--cfg_channels=2: the model has 1 channels"),
        ("--classes ²", r"--classes=²: '²' is no class of this run"),
    ],
)
def test_bad_input_is_one_line(draw, words, message):
    with pytest.raises(UserError, match=message):
        draw(words)


@pytest.mark.parametrize(
    ("words", "flag", "answer"),
    [
        ("--inpaint=photos --mask=m.png", "--inpaint=photos", "--inpaint photos --mask m.png"),
        ("--invert ~/photos --edit 3,7", "--invert=~/photos", "--invert '~/photos' --edit 3,7"),
        ("--interpolate 8 --between classes", "--interpolate=8", "--interpolate 8 --between classes"),
        (
            "--quiet --interpolate 3 --cfg_scale=-1 --rtol 1e-3 --wandb.tags a,b",
            "--interpolate=3",
            "--interpolate 3 --quiet --cfg_scale=-1 --rtol 0.001 --wandb.tags a,b",
        ),
        # What edit.py does not take alone.
        ("--mask m.png", "--mask=m.png beside --inpaint", "--mask m.png --inpaint FOLDER"),
        ("--inpaint photos", "--inpaint=photos beside --mask", "--inpaint photos --mask IMAGE"),
        ("--inpaint_repeats 3 --film", "--inpaint_repeats=3 beside --inpaint and --mask",
         "--inpaint_repeats 3 --inpaint FOLDER --mask IMAGE"),
        ("--between classes", "--between=classes beside --interpolate", "--between classes --interpolate 8"),
        ("--edit 3 --classes 3", "--edit=3 beside --invert", "--edit 3 --invert FOLDER --classes 3"),
    ],
)  # fmt: skip
def test_flags_of_edit_are_answered_with_its_command(read_flags, words, flag, answer):
    words = ["--load_dir", "my run", *words.split()]
    command = rf"\S*python \S*edit\.py --load_dir 'my run' {re.escape(answer)}"
    given, is_alone, others = flag.partition(" beside ")
    beside = f", beside {others}" if is_alone else ""
    with pytest.raises(UserError, match=f"^{given} is a flag of edit.py{beside}: {command}$") as error:
        sample.main(read_flags(sample, words))
    asked = read_flags(sample, words).to_dict()
    typed = shlex.split(str(error.value).partition(": ")[2])
    understood = read_flags(edit, typed[2:]).to_dict()
    assert edit.choose_mode(ConfigDict(understood))
    assert set(asked) - set(understood) == set(sample.OWN_FLAGS) - set(understood)
    for name in understood.keys() - {"wandb", *sample.OWN_FLAGS}:
        if asked.get(name) is None:
            continue
        assert str(understood[name]) == os.path.expanduser(str(asked[name])), name


def test_no_run_and_a_damaged_one_are_refused(read_flags, tmp_path, run):  # noqa: F811
    with pytest.raises(UserError, match="--load_dir is not given"):
        sample.main(read_flags(sample, []))
    shutil.copytree(run / "checkpoints", tmp_path / "copy" / "checkpoints")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "20" / "ema_params")
    words = ["--load_dir", str(tmp_path / "copy"), "--out", str(tmp_path)]
    with pytest.raises(UserError, match="is damaged"):
        sample.main(read_flags(sample, words))


def test_samples_that_a_disk_has_no_room_for_are_refused_before_work(draw, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match=r"--save_samples=\S+s.npz takes up to 1,048,640 bytes, but 1,048,576 are free"):
        draw(f"--num_samples 16385 --save_samples {tmp_path / 's.npz'}")
