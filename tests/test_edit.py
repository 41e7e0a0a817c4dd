"""Tests of edit.py: images between two samples, inversion and editing of given images, inpainting."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

import edit
from tests.test_generate import generator, run  # noqa: F401 (fixtures)
from utils.base.messages import UserError
from utils.images import plotting
from utils.sampling.solvers import SamplerConfig


@pytest.fixture
def draw(read_flags, run, tmp_path):  # noqa: F811
    """draw('--flag value ...') -> the folder where the program has written."""

    def start(line: str):
        words = ["--load_dir", str(run), "--out", str(tmp_path / "out"), *line.split()]
        edit.main(read_flags(edit, words))
        return tmp_path / "out"

    return start


@pytest.fixture
def tables(monkeypatch):
    """Records (images, titles of the rows) of every table that is drawn."""
    tables = []
    draw_table = plotting.image_table

    def keep(images, row_titles=(), *others):
        tables.append((images, list(row_titles)))
        return draw_table(images, row_titles, *others)

    monkeypatch.setattr(plotting, "image_table", keep)
    return tables


def assert_shows(found, generator, noise, labels):  # noqa: F811
    """Compares images with samples from this noise and these labels, up to rounding in a batch of another size."""
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


@pytest.fixture
def own(tmp_path):
    """Writes two larger images into folders of classes, and a mask of the run's size."""
    rng = np.random.default_rng(0)
    for label in ("3", "7"):
        (tmp_path / "own" / label).mkdir(parents=True)
        pixels = rng.integers(0, 256, (20, 16), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "own" / label / "a.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def test_given_images_are_inverted_and_made_again(draw, own, capsys):
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

    # Guidance of every kind is of the edits alone.
    draw(f"--invert {own}/own --edit 1 --denoise_timesteps 8 --solver midpoint --cfg_scale 2 --cfg_zero_star 1")
    assert f"round trip: root mean square error {error} of" in capsys.readouterr().err


@pytest.mark.parametrize("classes", ["", "--classes 5"])
def test_a_hole_is_filled(draw, own, classes, capfd):
    draw(f"--inpaint {own}/own --mask {own}/mask.png --denoise_timesteps 2 {classes} --save_samples {own}/filled.npz")
    with np.load(own / "filled.npz") as saved:
        assert list(saved["arr_1"]) == ([5, 5] if classes else [3, 7])
        assert saved["arr_0"].shape == (2, 8, 8, 1)
        filled = saved["arr_0"]

    # Fewer repeats fit less well.
    draw(
        f"--inpaint {own}/own --mask {own}/mask.png --denoise_timesteps 2 {classes} --inpaint_repeats 1 "
        f"--save_samples {own}/filled.npz"
    )
    with np.load(own / "filled.npz") as saved:
        assert not np.array_equal(saved["arr_0"], filled)

    # Folders that do not tell the classes.
    (own / "other" / "cat").mkdir(parents=True, exist_ok=True)
    shutil.copy(own / "own" / "3" / "a.png", own / "other" / "cat")
    draw(f"--inpaint {own}/other --mask {own}/mask.png --denoise_timesteps 2")
    assert "not all of its folders are named after classes, so its images have no label" in capfd.readouterr().err
    flat = own / "own" / "3"  # an image without a folder of its class below
    draw(f"--inpaint {flat} --mask {own}/mask.png --denoise_timesteps 2 --save_samples {own}/filled.npz")
    with np.load(own / "filled.npz") as saved:
        assert list(saved["arr_1"]) == [10]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--invert OWN/nowhere", r"--invert=\S+nowhere: there is no such folder"),
        ("--invert OWN --edit 12", r"--edit=12: there is no class 12; use 0 to 9"),
        ("--inpaint OWN/own", r"--mask is not given"),
        ("--inpaint OWN/own --mask OWN/nothing.png", r"--mask=\S+nothing.png cannot be read"),
        ("--inpaint OWN/own --mask OWN/own/3/a.png", r"--mask=\S+a.png is 20x16, but the images of the run are 8x8"),
        ("--inpaint OWN/own --mask OWN/white.png", r"--mask=\S+ is white throughout: white is filled"),
        ("--inpaint OWN/own --mask OWN/mask.png --solver dopri5", r"--solver=dopri5 cannot inpaint; use one of euler"),
        ("--inpaint OWN/own --invert OWN/own", r"--invert and --inpaint: give one of them"),
        ("--invert OWN/own --cfg_scale 3", r"--cfg_scale=3 has no effect with --invert but without --edit"),
        ("--invert OWN/own --cfg_interval 0,0.5", r"--cfg_interval=0,0.5 has no effect with --invert but without"),
        ("--invert OWN/own --seed 3", r"--seed=3 has no effect with --invert, which draws no noise"),
        ("--interpolate 3 --between classes --classes 3,3", r"--between=classes needs two of them"),
        ("--invert OWN/own --batch_size 2", r"--batch_size=2 has no effect on images of your own"),
        (
            "--inpaint OWN/own --mask OWN/mask.png --cfg_zero_star 1 --cfg_zero_steps 1",
            r"--cfg_zero_steps=1 has no effect with --inpaint",
        ),
        ("--edit 3", r"--interpolate, --invert and --inpaint: give one of them; sample.py draws new images"),
        ("--inpaint OWN/own --edit 3", r"--edit=3 has no effect without --invert"),
        ("--invert OWN/own --mask OWN/mask.png", r"--mask=\S+mask.png has no effect without --inpaint"),
        ("--invert OWN/own --between classes", r"--between=classes has no effect without --interpolate"),
        ("--inpaint OWN/own --labels balanced", r"--labels=balanced has no effect on images of your own"),
        ("--interpolate 3 --save_samples x.npz", r"--save_samples=x.npz has no effect with --interpolate"),
        ("--interpolate 3 --solver sde", r"--solver=sde cannot interpolate; use one of euler"),
    ],
)
def test_bad_input_is_one_line(draw, own, words, message):
    Image.new("L", (8, 8), 255).save(own / "white.png")
    with pytest.raises(UserError, match=message):
        draw(words.replace("OWN", str(own)))
