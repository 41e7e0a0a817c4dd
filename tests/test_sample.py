"""The sampling program: classes by name, the same images as an evaluation's, films from noise to image."""

import shutil

import numpy as np
import pytest
from PIL import Image

import sample
from tests.test_generate import generator, run  # noqa: F401 (fixtures)
from utils.errors import UserError
from utils.plotting import tile_images
from utils.sampling import SamplerConfig

NAMES = ("tench", "goldfish", "great white shark", "tiger shark")


@pytest.fixture
def draw(read_flags, run, tmp_path):  # noqa: F811
    """draw('--flag value ...') -> the folder where the program has written."""

    def start(line: str):
        words = ["--load_dir", str(run), "--out", str(tmp_path / "out"), *line.split()]
        sample.main(read_flags(sample, words))
        return tmp_path / "out"

    return start


def test_classes_are_named_by_names_and_numbers():
    assert sample.read_classes("goldfish, 3,Tench", NAMES) == [1, 3, 0]
    assert sample.read_classes("all", NAMES) == [0, 1, 2, 3]
    assert sample.read_classes(None, NAMES) is None
    assert sample.read_classes("3,1", ("3", "2", "1")) == [0, 2]  # names go before numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("goldfsh", r"--classes=goldfsh: 'goldfsh' is no class of this run; did you mean goldfish"),
        ("4", r"there is no class 4; use 0 to 3"),
        ("-1", r"there is no class -1"),
        ("tench,", r"'' is no class"),
    ],
)
def test_unknown_classes_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        sample.read_classes(text, NAMES)


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


@pytest.mark.parametrize("options", ["--film_format webp", "--film_format gif --solver dopri5 --rtol 1e-2"])
def test_a_film_starts_at_the_noise_and_ends_at_the_images(draw, generator, options, tmp_path):  # noqa: F811
    steps = "" if "dopri5" in options else "--denoise_timesteps 6"
    out = draw(
        f"--num_samples 4 {steps} --film --film_frames 3 --seed 3 {options} --save_samples {tmp_path / 'samples.npz'}"
    )
    (path,) = out.glob("film.*")
    with Image.open(path) as film:
        assert film.n_frames == 4
        film.seek(3)
        last = np.asarray(film.convert("RGB")).astype(int)
        film.seek(0)
        first = np.asarray(film.convert("RGB")).astype(int)
    with np.load(tmp_path / "samples.npz") as saved:
        images = saved["arr_0"]
    noise = generator.decode(generator.noise(range(4)))
    # Their formats are lossy.
    assert np.abs(first - tile_images(noise)).mean() < 5
    assert np.abs(last - tile_images(images)).mean() < 5
    assert np.abs(first - last).mean() > 15
    assert (out / "strip.png").stat().st_size > 1000


def test_interpolations_begin_and_end_at_the_samples(draw, generator):  # noqa: F811
    drawing = draw("--interpolate 5 --num_samples 4 --denoise_timesteps 2 --seed 3")
    assert (drawing / "interpolation.png").stat().st_size > 1000
    assert not (drawing / "grid.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--classes 11", r"--classes=11: there is no class 11"),
        ("--denoise_timesteps 0", r"--denoise_timesteps=0: give numbers of 1 or more"),
        ("--denoise_timesteps 4,2", r"give one of each; eval_fid.py compares several"),
        ("--film_frames 9", r"--film_frames=9 has no effect without --film"),
        ("--interpolate 4 --film", r"--film=True has no effect with --interpolate"),
        ("--classes 3 --labels balanced", r"--labels=balanced has no effect beside --classes"),
        ("--batch_size 0", r"--batch_size=0: use 1 or more"),
    ],
)
def test_bad_input_is_one_line(draw, words, message):
    with pytest.raises(UserError, match=message):
        draw(words)


def test_a_run_of_one_class_and_no_run(draw, read_flags, tmp_path, run):  # noqa: F811
    with pytest.raises(UserError, match="--load_dir is not given"):
        sample.main(read_flags(sample, []))
    shutil.copytree(run / "checkpoints", tmp_path / "copy" / "checkpoints")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "20" / "ema_params")
    words = ["--load_dir", str(tmp_path / "copy"), "--out", str(tmp_path)]
    with pytest.raises(UserError, match="is damaged"):
        sample.main(read_flags(sample, words))
