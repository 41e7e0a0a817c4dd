"""Films as WebP, GIF and MP4, of samples and of files, decoded again; pictures at any scale."""

import importlib.util
import subprocess
import weakref
from itertools import groupby
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

import edit
import sample
from tests.test_generate import run  # noqa: F401 (fixture)
from utils.base.messages import UserError, WriteError
from utils.flags import drawing
from utils.images import films, plotting
from utils.images.films import film_of_files, save_film
from utils.images.pictures import PictureFolder

COLOURS = np.array([[255, 0, 0], [0, 160, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]], np.uint8)
# Emoji, markup, line breaks, 300 letters, right to left, mathematics, an override of the direction.
HOSTILE = (
    "🦒 🏳️‍🌈 猫",
    "<script>alert(1)</script>",
    "two\nlines\r\n\x07bell",
    "letters" * 43,
    "שלום קטה",
    "$x_1$ \u202eleft",
)


@pytest.fixture(autouse=True)
def no_fork(monkeypatch):
    """imageio-ffmpeg's reader would fork, which JAX warns about."""
    monkeypatch.setenv("IMAGEIO_FFMPEG_NO_PREVENT_SIGINT", "1")


def read_mp4(path: Path) -> tuple[dict, np.ndarray]:
    """Returns (what ffmpeg says about a film, its frames (n, h, w, 3))."""
    frames = imageio_ffmpeg.read_frames(str(path))
    about = next(frames)
    width, height = about["size"]
    return about, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames])


def read_pages(path: Path) -> list[tuple[int, np.ndarray]]:
    """Returns (milliseconds, image) of each frame of a WebP or GIF."""
    pages = []
    with Image.open(path) as film:
        for place in range(film.n_frames):
            film.seek(place)
            film.load()
            pages.append((film.info["duration"], np.asarray(film.convert("RGB"))))
    return pages


def render(figure) -> np.ndarray:
    """Returns a figure as Matplotlib draws it: (h, w, 3)."""
    canvas = plotting.FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


# --- MP4 ---


@pytest.mark.parametrize(("count", "height", "width", "channels"), [(1, 8, 8, 1), (4, 40, 26, 3), (2, 9, 150, 4)])
def test_an_mp4_shows_the_grids_at_their_sizes(tmp_path, count, height, width, channels):
    """One of odd width, and of odd height; grey, RGB, and of four channels."""
    images = np.random.default_rng(0).integers(0, 256, (3, count, 2, 2, channels), np.uint8)
    images = images.repeat(-(-height // 2), 2)[:, :, :height].repeat(-(-width // 2), 3)[:, :, :, :width]
    labels = np.arange(count)[::-1].copy()
    names = [f"class {i}" for i in range(count)]
    save_film(tmp_path / "film.mp4", images, "mp4", 0.3, labels, names, "A title")
    about, frames = read_mp4(tmp_path / "film.mp4")
    assert (about["codec"], about["pix_fmt"].partition("(")[0]) == ("h264", "yuv420p")
    assert "bt709" in about["pix_fmt"]
    first, last = (render(plotting.sample_grid(images[i], labels, names, "A title")) for i in (0, -1))
    height, width = first.shape[:2]
    assert frames.shape[1:3] == (height + height % 2, width + width % 2)
    for shown, expected in ((frames[0], first), (frames[-1], last)):
        # Colours have half the resolution: brightness is compared, and what was added is white.
        shown, expected = (image.astype(float).mean(-1) for image in (shown, expected))
        difference = np.abs(shown[:height, :width] - expected)
        assert difference.mean() < 3
        assert shown[height:].min(initial=255) > 250
        assert shown[:, width:].min(initial=255) > 250
    assert np.abs(first.astype(float) - last).mean() > 5
    content = (tmp_path / "film.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before all of it has come


def test_colours_of_an_mp4_are_those_of_the_images(tmp_path):
    images = np.broadcast_to(COLOURS[None, :, None, None], (2, 6, 64, 64, 3))
    save_film(tmp_path / "film.mp4", images, "mp4", 1.0)
    _, frames = read_mp4(tmp_path / "film.mp4")
    grid = render(plotting.sample_grid(images[0], np.zeros(6, int), [""]))
    cell = plotting._Cell.fit(64, 64)
    for place, colour in enumerate(COLOURS):
        row, column = divmod(place, 3)
        y = frames.shape[1] - 2 * (cell.height + cell.gap) + row * (cell.height + cell.gap) + 40
        x = grid.shape[1] - 3 * (cell.width + cell.gap) + column * (cell.width + cell.gap) + 40
        assert np.abs(frames[0, y : y + 30, x : x + 30].mean((0, 1)) - colour).max() < 4, colour


@pytest.mark.parametrize(("count", "seconds"), [(5, 1.0), (40, 0.5), (3, 4.0), (1, 1.0)])
def test_frames_of_an_mp4_are_shown_for_their_times(tmp_path, count, seconds):
    images = np.repeat((6 * np.arange(count, dtype=np.uint8))[:, None, None, None, None], 256, axis=2)
    images = np.broadcast_to(images.reshape(count, 1, 16, 16, 1), (count, 1, 16, 16, 1))
    save_film(tmp_path / "film.mp4", images, "mp4", seconds)
    about, frames = read_mp4(tmp_path / "film.mp4")
    levels = np.round(frames[:, -40:-10, -60:-10].mean((1, 2, 3)) / 6).astype(int)
    shown = [(level, len(list(group)) / about["fps"]) for level, group in groupby(levels)]
    each = max(0.02, seconds / count)
    expected = [0.5, *[each] * (count - 2), 2.0][-count:]
    assert [level for level, _ in shown] == list(range(count))
    np.testing.assert_allclose([time for _, time in shown], expected, atol=1 / about["fps"] + 1e-3)
    assert 24 <= about["fps"] <= 51
    # To a frame altogether, too.
    assert abs(about["duration"] - sum(expected)) <= count * 5e-4 + 1 / about["fps"]


# --- WebP, GIF ---


def test_gifs_last_as_long_as_webps_though_their_clock_is_coarser(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (33, 1, 8, 8, 1), np.uint8)
    for name in ("webp", "gif"):
        save_film(tmp_path / name, images, name, 3.0)
    webp, gif = ([time for time, _ in read_pages(tmp_path / name)] for name in ("webp", "gif"))
    assert webp == [500, *[91] * 31, 2000]  # 3 s / 33
    assert set(gif[1:-1]) == {90, 100}
    assert abs(sum(gif) - sum(webp)) <= 5
    save_film(tmp_path / "fast", images, "webp", 0.1)
    assert {time for time, _ in read_pages(tmp_path / "fast")[1:-1]} == {20}


@pytest.mark.parametrize("name", films.FORMATS)
def test_encoders_take_frames_one_at_a_time(tmp_path, name):
    pages = []
    most = 0

    def draw():
        nonlocal most
        for level in range(20):
            page = Image.new("RGB", (64, 64), (10 * level,) * 3)
            pages.append(weakref.ref(page))
            most = max(most, sum(page() is not None for page in pages))
            yield page
            del page

    films.write_film(tmp_path / "film", draw(), [40] * 20, name)
    assert most <= 3
    if name != "mp4":
        shown = [round(page.mean() / 10) for _, page in read_pages(tmp_path / "film")]
        assert shown == list(range(20))


@pytest.mark.parametrize("name", films.FORMATS)
def test_one_frame_is_a_film(tmp_path, name):
    images = np.full((1, 2, 16, 16, 3), 40, np.uint8)
    save_film(tmp_path / "film", images, name, 3.0)
    frames = (
        read_mp4(tmp_path / "film")[1] if name == "mp4" else [np.asarray(Image.open(tmp_path / "film").convert("RGB"))]
    )
    assert np.abs(frames[0][-40:-10, -40:-10].astype(int) - 40).max() < 4


# --- Texts, sizes ---


@pytest.mark.parametrize("title", HOSTILE)
def test_any_title_is_text_within_the_frame(title):
    table, _ = plotting.lay_out_grid((16, 16), np.zeros(4, int), [""], title, 1.0)
    (page,) = table.draw_pages([np.zeros((4, 16, 16, 1), np.uint8)])
    title_bar = np.asarray(page.convert("L"))[: table.top - 4]
    assert title_bar.min() < 100
    assert title_bar[:, :3].min() == title_bar[:, -3:].min() == title_bar[-1].min() == 255


@pytest.mark.parametrize(
    ("scale", "side", "dots"), [(1, 64, 1), (2, 128, 2), (5, 320, 5), (1.5, 96, 1.5), (0.5, 32, 1)]
)
def test_a_scale_multiplies_images_and_above_one_all_else(scale, side, dots):
    """Of 2x3 digits of 8x8: a margin of 0.1 inches of 100 dots, and 3 between images."""
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    drawn = render(plotting.sample_grid(images, np.zeros(5, int), [""], scale=scale))
    margin = round(10 * dots)
    gap = round(3 * dots)
    assert drawn.shape[:2] == (margin + 2 * (side + gap), margin + 3 * (side + gap))
    shown = drawn[margin : margin + side, margin : margin + side, 0]
    resample = Image.Resampling.BICUBIC
    np.testing.assert_array_equal(shown, np.asarray(Image.fromarray(images[0, ..., 0]).resize((side, side), resample)))


def test_enlarged_pixels_stay_pixels_and_texts_grow():
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 16, 16, 1), np.uint8)
    drawn = render(plotting.image_table(image, scale=2))  # 16 -> 112 -> 224
    np.testing.assert_array_equal(drawn[20:244, 20:244, 0], image[0, 0, ..., 0].repeat(14, 0).repeat(14, 1))
    # Reduced, they are averaged: dots become grey.
    dots = (255 * (np.indices((100, 100)).sum(0) % 2)).astype(np.uint8).reshape(1, 1, 100, 100, 1)
    drawn = render(plotting.image_table(dots, scale=0.5))
    assert np.abs(drawn[-50:-5, -50:-5].astype(int) - 127).max() < 10
    titles = (["row"], ["column"], "A title")
    once, thrice = (render(plotting.image_table(image, *titles, scale=scale)) for scale in (1, 3))
    assert np.abs(np.divide(thrice.shape, (3, 3, 1)) - once.shape).max() <= 1
    bars = [drawn[: round(40 * scale)].min(-1) for drawn, scale in ((once, 1), (thrice, 3))]
    assert (bars[1] < 128).sum() == pytest.approx(9 * (bars[0] < 128).sum(), rel=0.3)


def test_pictures_that_would_be_too_large_are_refused_in_pixels(tmp_path, monkeypatch):
    plotting.check_table("x.png", (1, 13), (8, 8), 64.0)
    message = (
        r"^--scale=64: x.png would be 60,032 pixels wide and 4,288 high, of at most 60,000 a side; use --scale 63.96,"
    )
    with pytest.raises(UserError, match=message):
        plotting.check_table("x.png", (1, 14), (8, 8), 64.0)
    with pytest.raises(UserError, match=r"17,152 high, of at most 268,435,456 in all; use --scale 61.13, or fewer"):
        plotting.check_table("x.png", (4, 4), (8, 8), 64.0)
    monkeypatch.setattr(plotting, "Table", pytest.fail)
    folder = PictureFolder(tmp_path, scale=64.0)
    images = np.zeros((64, 8, 8, 1), np.uint8)
    labels = np.zeros(64, int)
    for save in (
        lambda: folder.save_grid("x.png", images, labels, [""], ""),
        lambda: folder.save_table("x.png", images.reshape(8, 8, 8, 8, 1), (), (), ""),
        lambda: folder.save_film("x.webp", images[None], labels, [""], ""),
    ):
        with pytest.raises(UserError, match=r"--scale=64: x\S* would be 34,304 pixels wide and 34,304 high"):
            save()
    assert list(tmp_path.iterdir()) == []


# --- What goes wrong ---


@pytest.fixture
def started(monkeypatch):
    """The processes that are started."""
    processes = []
    start = subprocess.Popen

    def keep(*args, **options):
        processes.append(start(*args, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", keep)
    return processes


def fake_ffmpeg(tmp_path, monkeypatch, script: str) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo \"Unknown encoder 'libx264'\nmore\" >&2; exit 8", r"ffmpeg failed \(Unknown encoder 'libx264'\); use"),
        ("kill -9 $$", r"ffmpeg failed \(ended by SIGKILL\); use --film_format webp"),
        ("exit 3", r"ffmpeg failed \(exit status 3\)"),
        ("exec <&-; exit 0", r"ffmpeg failed \(exit status 0\)"),  # content, without having read a frame
    ],
)
def test_an_encoder_that_fails_is_one_line(tmp_path, monkeypatch, started, script, message):
    fake_ffmpeg(tmp_path, monkeypatch, script)
    folder = PictureFolder(tmp_path / "out")
    folder.folder.mkdir()
    images = np.zeros((200, 16, 16, 16, 1), np.uint8)  # more than a pipe holds
    with pytest.raises(UserError, match=f"--film_format=mp4: {message}") as error:
        folder.save_film("film.mp4", images, np.zeros(16, int), [""], "")
    assert "\n" not in str(error.value)
    assert list(folder.folder.iterdir()) == folder.written == []
    assert started[-1].poll() is not None


def test_an_encoder_that_is_not_there_is_one_line(tmp_path, monkeypatch, read_flags):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    with pytest.raises(UserError, match=r"--film_format=mp4: /nowhere/ffmpeg cannot be started \(No such file"):
        save_film(tmp_path / "film.mp4", np.zeros((2, 1, 8, 8, 1), np.uint8), "mp4", 1.0)

    # Without the package, before a run is opened.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(drawing, "load_generator", pytest.fail)
    message = "--film_format=mp4 needs the package imageio-ffmpeg: make setup EXTRAS=film; or use --film_format webp"
    for program, words in ((sample, []), (edit, ["--interpolate", "3"])):
        words = ["--load_dir", str(tmp_path), *words, "--film", "--film_format", "mp4"]
        with pytest.raises(UserError, match=f"^{message}$"):
            program.main(read_flags(program, words))
    with pytest.raises(UserError, match=f"^{message}$"):
        film_of_files([], [], tmp_path / "film.mp4", "mp4", 3.0)


@pytest.mark.parametrize("size", [0, 2000, 20_000])
def test_an_mp4_on_a_full_disk_is_one_line(tmp_path, full_disk, size):
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 8, 8, 1), np.uint8)
    folder = PictureFolder(tmp_path)
    full_disk(size)
    with pytest.raises(WriteError, match=r"film.mp4 could not be written \(File too large\); raise the limit"):
        folder.save_film("film.mp4", images, np.zeros(4, int), [""], "")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_the_encoder(tmp_path, monkeypatch, started):
    def draw():
        yield Image.new("RGB", (64, 64))
        assert started[-1].poll() is None
        raise KeyboardInterrupt

    monkeypatch.setattr(plotting.Table, "draw_pages", lambda table, frames: draw())
    with pytest.raises(KeyboardInterrupt):
        PictureFolder(tmp_path).save_film("film.mp4", np.zeros((9, 1, 8, 8, 1), np.uint8), np.zeros(1, int), [""], "")
    assert started[-1].returncode == -9
    assert list(tmp_path.iterdir()) == []


# --- Files ---


def write_panels(folder: Path, sizes: list[tuple[int, int]]) -> list[Path]:
    """Writes a PNG of one grey level, 10, 20, ..., for each (width, height)."""
    paths = [folder / f"{1000 * (i + 1):08d}.png" for i in range(len(sizes))]
    for i, size in enumerate(sizes):
        Image.new("L", size, 10 * (i + 1)).save(paths[i])
    return paths


@pytest.mark.parametrize("name", films.FORMATS)
def test_a_film_of_files_is_padded_titled_and_evenly_spaced(tmp_path, name):
    paths = write_panels(tmp_path, [(200, 90), (120, 140), (201, 100), (200, 100)])
    titles = [f"step {int(path.stem):,}" for path in paths]
    film_of_files(paths, titles, tmp_path / "film", name, 2.0)
    if name == "mp4":
        about, frames = read_mp4(tmp_path / "film")
        pages = [
            (1000 / about["fps"] * len(frames) / 4, frames[i])
            for i in range(len(frames) // 8, len(frames), len(frames) // 4)
        ]
        assert about["duration"] == pytest.approx(2, abs=1 / about["fps"])
    else:
        pages = read_pages(tmp_path / "film")
    assert [time for time, _ in pages] == pytest.approx([500] * 4, abs=10)
    height, width = pages[0][1].shape[:2]
    top = height - 140 - height % 2 * (name == "mp4")
    assert width == 201 + (name == "mp4")
    assert 20 <= top <= 40
    for i, (_, page) in enumerate(pages):
        with Image.open(paths[i]) as panel:
            left = (201 - panel.width) // 2
            inside = page[top : top + panel.height, left : left + panel.width]
            page = page.astype(int).mean(-1)
            assert np.abs(inside[4:-4, 4:-4].astype(int) - 10 * (i + 1)).max() < 5
            assert page[top + panel.height + 4 :].min(initial=255) > 245  # white around it
            assert page[top + 4 : top + panel.height - 4, : max(0, left - 4)].min(initial=255) > 245
        assert page[2 : top - 2].min() < 140  # its title
    assert np.abs(pages[0][1][:top].astype(int) - pages[1][1][:top]).max() > 100  # which differs


def test_damaged_and_missing_files_are_left_out(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(films, "warn", warned.append)
    paths = write_panels(tmp_path, [(40, 40)] * 5)
    paths[1].write_bytes(paths[1].read_bytes()[:60])
    paths[3].unlink()
    film_of_files(paths, list(HOSTILE[:5]), tmp_path / "film.webp", "webp", 2.0)
    found = [round(page[-20:].mean() / 10) for _, page in read_pages(tmp_path / "film.webp")]
    assert found == [1, 3, 5]
    assert warned == [
        f"{paths[1]} is left out of the film: it cannot be read (image file is truncated)",
        f"{paths[3]} is left out of the film: it cannot be read (No such file or directory)",
    ]
    with pytest.raises(UserError, match=r"none.webp: a film needs two images that can be read, of which there are 1$"):
        film_of_files(paths[:2], ["a", "b"], tmp_path / "none.webp", "webp", 2.0)
    assert not (tmp_path / "none.webp").exists()


def test_of_many_files_the_first_and_last_stay(tmp_path):
    paths = write_panels(tmp_path, [(16, 16)] * 25)
    film_of_files(paths, ["x"] * 25, tmp_path / "film.webp", "webp", 0.4)
    pages = read_pages(tmp_path / "film.webp")
    assert [time for time, _ in pages] == [40] * 10  # at most 25 a second
    levels = [round(page[-10:].mean() / 10) for _, page in pages]
    assert (levels[0], levels[-1]) == (1, 25)
    assert set(np.diff(levels)) == {2, 3}
    assert films.spread(1000, films.MAX_FILES)[-1] == 999


def test_films_of_files_are_scaled_and_bounded(tmp_path):
    paths = write_panels(tmp_path, [(30, 20), (2000, 20)])
    film_of_files(paths, ["a", "b"], tmp_path / "film.webp", "webp", 1.0, 0.5)
    once = read_pages(tmp_path / "film.webp")[1][1].shape
    assert once[1] == 1000
    message = r"film.gif: its frames would be 6,000 pixels wide and \d+ high, of at most 4,096; use --scale 2.04"
    with pytest.raises(UserError, match=message):
        film_of_files(paths, ["a", "b"], tmp_path / "film.gif", "gif", 1.0, 3.0)
    assert not (tmp_path / "film.gif").exists()


# --- The programs ---


def test_sample_films_with_title_and_scale(run, read_flags, tmp_path):  # noqa: F811
    words = f"--load_dir {run} --out {tmp_path} --num_samples 2 --denoise_timesteps 2 --cfg_scale 1"
    words += " --film --film_format mp4 --film_seconds 1.5 --scale 2"
    flags = [
        *words.split(),
        "--film_title",
        "Ünïcode 🦒",
    ]
    sample.main(read_flags(sample, flags))
    about, frames = read_mp4(tmp_path / "film.mp4")
    assert about["duration"] == pytest.approx(3.0, abs=0.05)  # 0.5, 1.5 / 3 and 2 seconds
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width == 20 + 2 * (2 * 64 + 6) == frames.shape[2]
        shown = np.asarray(grid.convert("L")).astype(int)
    last = frames[-1].astype(int).mean(-1)
    assert np.abs(last[-120:] - shown[-120:]).mean() < 3
    assert np.abs(last[:60] - shown[:60]).max() > 100  # another title


def test_edit_films_an_interpolation(run, read_flags, tmp_path, monkeypatch):  # noqa: F811
    filmed = []
    monkeypatch.setattr(PictureFolder, "save_film", lambda folder, *values: filmed.append(values))
    tables = []
    monkeypatch.setattr(
        PictureFolder, "save_table", lambda folder, name, images, *titles: tables.append((images, titles))
    )
    words = f"--load_dir {run} --out {tmp_path} --interpolate 5 --num_samples 4 --denoise_timesteps 1 --cfg_scale 1"
    words += " --film --film_format gif --film_title none --scale 3"
    edit.main(read_flags(edit, words.split()))
    ((name, frames, places, names, title, seconds),) = filmed
    ((table, titles),) = tables
    assert (name, title, seconds, list(places), names) == ("interpolation.gif", "", 3.0, [0, 1], titles[0])
    assert frames.shape == (5, 2, 8, 8, 1)
    np.testing.assert_array_equal(frames, table.swapaxes(0, 1))


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        (sample, "--film --num_samples 64 --scale 20", "film.webp would be 10,720 pixels wide and 10,720 high"),
        (sample, "--num_samples 400 --scale 20", "grid.png would be 26,800 pixels wide"),
        (edit, "--interpolate 100 --scale 20", "interpolation.png would be 134,000 pixels wide"),
        (edit, "--interpolate 2 --film --num_samples 32 --scale 20", "interpolation.webp would be 5,360 pixels"),
    ],
)
def test_too_large_a_scale_is_refused_before_the_work(run, read_flags, tmp_path, monkeypatch, program, words, message):  # noqa: F811
    for work in ("generate", "sample_latents", "path"):
        monkeypatch.setattr(drawing.ImageGenerator, work, pytest.fail)
    with pytest.raises(UserError, match=f"--scale=20: {message}"):
        program.main(read_flags(program, ["--load_dir", str(run), "--out", str(tmp_path), *words.split()]))
