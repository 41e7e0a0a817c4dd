"""The sampling program: classes by name, the same images as an evaluation's, films from noise to image."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

import sample
from tests.conftest import ROOT, xla_flags
from tests.test_generate import generator, run  # noqa: F401 (fixtures)
from utils.base.errors import UserError, WriteError
from utils.images import plotting
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


def test_classes_are_named_by_names_and_numbers(generator):  # noqa: F811
    model = generator.model._replace(class_names=NAMES)
    assert sample.choose_classes("goldfish, 3,Tench", model) == [1, 3, 0]
    assert sample.choose_classes("all", model) == [0, 1, 2, 3]
    assert sample.choose_classes(None, model) is None
    with pytest.raises(UserError, match="--edit=goldfsh: 'goldfsh' is no class"):
        sample.choose_classes("goldfsh", model, "edit")


def test_classes_without_images_are_not_among_all_and_named_where_asked_for(generator, capsys):  # noqa: F811
    model = generator.model._replace(class_names=NAMES, empty_classes=(0, 2))
    assert sample.choose_classes("all", model) == [1, 3]
    assert capsys.readouterr().err == ""
    assert sample.choose_classes("tench,3", model) == [0, 3]
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
    environment = {**os.environ, "XLA_FLAGS": xla_flags(8)}
    words = "--num_samples 5 --denoise_timesteps 4 --cfg_scale 2 --seed 3 --save_samples samples.npz --quiet"
    command = [sys.executable, ROOT / "sample.py", "--load_dir", run, "--out", ".", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["grid.png", "samples.npz"]
    (batch,) = generator.generate(SamplerConfig(4, 2.0), 5, 5)
    with np.load(tmp_path / "samples.npz") as saved:
        # Rounding to bfloat16 depends on the batch that a device has.
        assert np.abs(saved["arr_0"].astype(int) - batch.to_host()[0]).max() <= 1


def test_what_is_whole_on_a_full_disk_is_named(draw, full_disk, tmp_path, capsys):
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
    labels, names, title = generator.labels(range(4)), generator.class_names, "6 Euler steps, guidance 4, seed 3"
    sample_grid(noise, labels, names, title).savefig(tmp_path / "noise.png")
    sample_grid(noise, labels, [" "] * len(names), " ").savefig(tmp_path / "without_texts.png")

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


@pytest.fixture
def tables(monkeypatch):
    """[(images, titles of the rows)] of the tables that are drawn."""
    tables, draw_table = [], plotting.image_table

    def keep(images, row_titles=(), *others):
        tables.append((images, list(row_titles)))
        return draw_table(images, row_titles, *others)

    monkeypatch.setattr(plotting, "image_table", keep)
    return tables


def assert_shows(found, generator, noise, labels):  # noqa: F811
    """Whether images are those of this noise and these labels, up to rounding in a batch of another size."""
    images = generator.decode(generator.sample_latents(noise, labels, SamplerConfig(2, 50.0)))
    assert np.abs(found.astype(int) - images).max() <= 1


def test_interpolations_begin_and_end_at_the_samples(draw, generator, tables):  # noqa: F811
    out = draw("--interpolate 5 --num_samples 4 --classes 3,7,1,9 --denoise_timesteps 2 --cfg_scale 50 --seed 3")
    assert (out / "interpolation.png").stat().st_size > 1000
    assert not (out / "grid.png").exists()
    ((table, titles),) = tables
    assert (table.shape, titles) == ((2, 5, 8, 8, 1), ["3", "1"])
    assert_shows(table[:, 0], generator, generator.noise([0, 2]), [3, 1])
    assert_shows(table[:, -1], generator, generator.noise([1, 3]), [3, 1])
    assert np.abs(table[:, 0].astype(int) - table[:, -1]).mean() > 20


def test_between_two_classes_the_first_is_on_the_left(draw, generator, tables):  # noqa: F811
    words = "--classes 3,7 --denoise_timesteps 2 --cfg_scale 50 --seed 3"
    draw(f"--interpolate 3 --between classes --num_samples 2 {words}")
    ((table, titles),) = tables
    assert (table.shape, titles) == ((1, 3, 8, 8, 1), ["3 to 7"])
    assert_shows(table[:, 0], generator, generator.noise([0]), [3])
    assert_shows(table[:, -1], generator, generator.noise([0]), [7])
    assert np.abs(table[:, 0].astype(int) - table[:, -1]).max() > 3


def test_labels_parameters_and_dtype_are_those_of_the_flags(draw, read_flags, run, tmp_path):  # noqa: F811
    draw(f"--num_samples 20 --labels balanced --denoise_timesteps 1 --save_samples {tmp_path / 'samples.npz'}")
    with np.load(tmp_path / "samples.npz") as saved:
        assert list(saved["arr_1"]) == [*range(10), *range(10)]
    words = ["--load_dir", str(run), "--out", str(tmp_path), "--params", "raw", "--dtype", "float32"]
    generator = sample.Drawing(read_flags(sample, words)).generator  # noqa: F811
    assert generator.model.network.config.dtype == "float32"
    jax.tree.map(np.testing.assert_array_equal, generator.params, load_generator(run, params="raw").params)


def test_more_classes_than_samples_are_said(read_flags, run, tmp_path, capfd):  # noqa: F811
    words = ["--load_dir", str(run), "--out", str(tmp_path), "--classes", "1,2,3", "--num_samples", "2"]
    assert sample.Drawing(read_flags(sample, words)).labels.tolist() == [1, 2]
    said = capfd.readouterr().err
    assert "--classes=1,2,3 names 3 classes; only the first are drawn with --num_samples=2" in said


@pytest.fixture
def own(tmp_path):
    """A folder of two larger images in folders of classes, and a mask of the run's size."""
    rng = np.random.default_rng(0)
    for label in ("3", "7"):
        (tmp_path / "own" / label).mkdir(parents=True)
        pixels = rng.integers(0, 256, (20, 16), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "own" / label / "a.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def test_images_of_ones_own_are_inverted_and_made_again(draw, own, capsys):
    samples = own / "samples.npz"
    out = draw(
        f"--invert {own}/own --edit 1,8 --denoise_timesteps 8 --solver midpoint --cfg_scale 2 --save_samples {samples}"
    )
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(out / "inversion.png"), str(out / "noise.npz"), str(samples)]
    (error,) = re.findall(r"round trip: root mean square error (\S+) of", printed.err)
    assert float(error) < 0.01
    with np.load(out / "noise.npz") as saved:
        assert saved["noise"].shape == (2, 8, 8, 1)
        assert list(saved["labels"]) == [3, 7]
    with np.load(samples) as saved:
        assert saved["arr_0"].shape == (4, 8, 8, 1)
        assert list(saved["arr_1"]) == [1, 8, 1, 8]


@pytest.mark.parametrize("classes", ["", "--classes 5"])
def test_a_hole_is_filled(draw, own, classes, capfd):
    draw(f"--inpaint {own}/own --mask {own}/mask.png --denoise_timesteps 2 {classes} --save_samples {own}/filled.npz")
    with np.load(own / "filled.npz") as saved:
        assert list(saved["arr_1"]) == ([5, 5] if classes else [3, 7])
        assert saved["arr_0"].shape == (2, 8, 8, 1)
        filled = saved["arr_0"]
    draw(
        f"--inpaint {own}/own --mask {own}/mask.png --denoise_timesteps 2 {classes} --inpaint_repeats 1 "
        f"--save_samples {own}/filled.npz"
    )
    with np.load(own / "filled.npz") as saved:  # less fitting than the five times of the default
        assert not np.array_equal(saved["arr_0"], filled)
    (own / "other" / "cat").mkdir(parents=True, exist_ok=True)
    shutil.copy(own / "own" / "3" / "a.png", own / "other" / "cat")
    draw(f"--inpaint {own}/other --mask {own}/mask.png --denoise_timesteps 2")
    assert "not all of its folders are named after classes, so its images have no label" in capfd.readouterr().err
    flat = own / "own" / "3"  # the images of which no folder is named after a class
    draw(f"--inpaint {flat} --mask {own}/mask.png --denoise_timesteps 2 --save_samples {own}/filled.npz")
    with np.load(own / "filled.npz") as saved:
        assert list(saved["arr_1"]) == [10]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--invert OWN/nowhere", r"--invert=\S+nowhere is no folder"),
        ("--invert OWN --edit 12", r"--edit=12: there is no class 12; use 0 to 9"),
        ("--inpaint OWN/own", r"--mask is not given"),
        ("--inpaint OWN/own --mask OWN/nothing.png", r"--mask=\S+nothing.png cannot be read"),
        ("--inpaint OWN/own --mask OWN/own/3/a.png", r"--mask=\S+a.png is 20x16, but the images of the run are 8x8"),
        ("--inpaint OWN/own --mask OWN/white.png", r"--mask=\S+ is white throughout: white is filled"),
        ("--inpaint OWN/own --mask OWN/mask.png --solver dopri5", r"--solver=dopri5 cannot inpaint; use one of euler"),
        ("--inpaint OWN/own --invert OWN/own", r"--invert and --inpaint: give one of them"),
        ("--invert OWN/own --film", r"--film=True has no effect with --invert"),
        ("--invert OWN/own --cfg_scale 3", r"--cfg_scale=3 has no effect with --invert but without --edit"),
        ("--invert OWN/own --cfg_interval 0,0.5", r"--cfg_interval=0,0.5 has no effect with --invert but without"),
        ("--invert OWN/own --seed 3", r"--seed=3 has no effect with --invert, which draws no noise"),
        ("--interpolate 3 --between classes --classes 3,3", r"--classes=3,3: --between=classes needs two classes"),
        ("--invert OWN/own --batch_size 2", r"--batch_size=2 has no effect on images of your own"),
        ("--edit 3", r"--edit=3 has no effect without --invert"),
        ("--between classes", r"--between=classes has no effect without --interpolate"),
    ],
)
def test_bad_input_about_ones_own_images_is_one_line(draw, own, words, message):
    Image.new("L", (8, 8), 255).save(own / "white.png")
    with pytest.raises(UserError, match=message):
        draw(words.replace("OWN", str(own)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--classes 11", r"--classes=11: there is no class 11"),
        ("--denoise_timesteps 0", r"--denoise_timesteps=0: use a whole number from 1"),
        ("--denoise_timesteps 4,2", r"give one of each; eval_fid.py compares several"),
        ("--film_frames 9", r"--film_frames=9 has no effect without --film"),
        ("--interpolate 4 --film", r"--film=True has no effect with --interpolate"),
        ("--classes 3 --labels balanced", r"--labels=balanced has no effect beside --classes"),
        ("--batch_size 0", r"--batch_size=0: use 1 or more"),
        ("--vae x", r"--vae=x has no effect on a run of pixels"),
        ("--cfg_channels 2", r"--cfg_channels=2: the model has 1 channels"),
        ("--classes ²", r"--classes=²: '²' is no class of this run"),
    ],
)
def test_bad_input_is_one_line(draw, words, message):
    with pytest.raises(UserError, match=message):
        draw(words)


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
