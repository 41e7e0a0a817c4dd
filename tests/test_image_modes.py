"""--image_mode: how many channels the images of a folder have, and of how many bits."""

import io
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from data_sets import load
from image_files import noise, write, write_png_16_bit
from PIL import Image

from utils.base.messages import UserError
from utils.data.loaders import check_data_settings
from utils.images import decoding
from utils.images.decoding import SIXTEEN_BITS, find_mode, read_image
from utils.images.pixels import UINT8, PixelFormat
from utils.storage.tree import stem
from utils.training import configure, make_config

LEVELS = np.random.default_rng(0).integers(0, 2**16, (6, 8), dtype=np.uint16)


def write_tiff(path, levels):
    Image.fromarray(levels).save(path)


@pytest.mark.parametrize("name", ["png", "tif", "tiff"])
def test_16_bits_are_kept_as_floats_where_all_files_have_them(tmp_path, name, capfd):
    """Each of 65,536 levels keeps a value of its own: level / 65535 in float32."""
    for i in range(2):
        (write_png_16_bit if name == "png" else write_tiff)(tmp_path / f"{i}.{name}", LEVELS + np.uint16(i))
    dataset = load(f"folder:{tmp_path}", image_size="6x8")
    assert (dataset.image_shape, dataset.pixels) == ((6, 8, 1), SIXTEEN_BITS)
    path = Path(dataset.source.paths[0])
    expected = (LEVELS + np.uint16(int(path.stem))).astype(np.float64) / 65535
    np.testing.assert_array_equal(dataset.row(0, False)["image"][..., 0], expected.astype(np.float32))
    assert f"{tmp_path}: all images have 16 bits: they are read as float32 in 0 .. 1" in capfd.readouterr().err
    # On demand they are rounded, as in a file beside one of 8 bits.
    rounded = np.round(expected * 255).astype(np.uint8)
    asked = load(f"folder:{tmp_path}", image_size="6x8", image_mode="L")
    np.testing.assert_array_equal(asked.row(0, False)["image"][..., 0], rounded)
    write(tmp_path / "2.png", noise(0, 6, 8))
    assert load(f"folder:{tmp_path}", image_size="6x8").pixels == UINT8
    asked = load(f"folder:{tmp_path}", image_size="6x8", image_mode="I;16")
    images = {stem(path): asked.row(i, False)["image"] for i, path in enumerate(asked.source.paths)}
    if "2" in images:  # unless it is held out
        np.testing.assert_array_equal(images["2"][..., 0], noise(0, 6, 8).astype(np.float32) / np.float32(255))


@pytest.mark.parametrize(
    ("modes", "channels"),
    [
        (["L", "LA", "1"], 1),
        (["L", "I;16"], 1),
        (["L", "RGB"], 3),
        (["P", "L"], 3),
        (["RGBA", "RGBA"], 3),
    ],
)
def test_images_are_in_colour_if_one_of_them_is(tmp_path, modes, channels):
    (tmp_path / "one").mkdir()
    for i, mode in enumerate(modes):
        image = Image.fromarray(LEVELS) if mode == "I;16" else Image.fromarray(noise(i, 6, 8, 3)).convert(mode)
        image.save(tmp_path / "one" / f"{i}.png")
    # Those that are held out, and those of a split of their own, may lack what the others have.
    write(tmp_path / "two" / "valid" / "0.png", noise(0, 6, 8))
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "train")
    for folder in ("one", "two"):
        for split in ("train", "validation"):
            dataset = load(f"folder:{tmp_path / folder}", split, image_size="6x8")
            assert dataset.image_shape == dataset.row(0, False)["image"].shape == (6, 8, channels)
            assert dataset.pixels == UINT8


def test_transparency_is_kept_on_demand(tmp_path, monkeypatch):
    pixels = noise(0, 47, 64, 4)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    kept = read_image(content.getvalue(), "x", (47, 64), mode="RGBA")
    np.testing.assert_array_equal(kept, pixels)
    # Resized whole or in strips, as Pillow resizes with transparency.
    for strip in (2**20, 5 * 64):
        monkeypatch.setattr(decoding, "STRIP_PIXELS", strip)
        np.testing.assert_array_equal(read_image(content.getvalue(), "x", (47, 64), mode="RGBA"), kept)
        found = read_image(content.getvalue(), "x", (6, 8), mode="RGBA")
        box = decoding.find_middle((47, 64), (6, 8))
        expected = Image.fromarray(pixels).crop(box).resize((8, 6), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(found, np.asarray(expected))


def test_16_bits_are_resized_in_strips_to_the_same_values(monkeypatch):
    levels = np.random.default_rng(1).integers(0, 2**16, (47, 64), dtype=np.uint16)
    content = io.BytesIO()
    Image.fromarray(levels).save(content, "TIFF")
    whole = read_image(content.getvalue(), "x", (6, 8), mode="I;16")
    # Averages of thousands of levels lie between them: nothing is rounded to 8 bits on the way.
    assert whole.dtype == np.float32
    assert not np.allclose(whole * 255, np.round(whole * 255), atol=1e-2)
    monkeypatch.setattr(decoding, "STRIP_PIXELS", 5 * 64)
    np.testing.assert_array_equal(read_image(content.getvalue(), "x", (6, 8), mode="I;16"), whole)


def test_a_mode_is_found_for_the_images_of_a_run():
    for mode, shape, pixels in [
        ("L", (8, 8, 1), UINT8),
        ("RGB", (8, 8, 3), UINT8),
        ("RGBA", (8, 8, 4), UINT8),
        ("I;16", (8, 8, 1), SIXTEEN_BITS),
        (None, (8, 8, 2), UINT8),
        (None, (8, 8, 1), PixelFormat("float32", -1, 1)),
    ]:
        assert find_mode(shape, pixels) == mode


def test_a_run_that_is_continued_reads_its_images_as_it_did(tmp_path, monkeypatch):
    """Earlier versions read grey folders in three channels, and recorded no mode."""
    run = types.SimpleNamespace(saved={"dataset_name": "folder:x", "dataset": {"image_shape": [8, 8, 3]}})
    monkeypatch.setattr(configure, "has_checkpoints", lambda folder: True)
    monkeypatch.setattr(configure.SourceRun, "open", lambda folder: run)
    again = {"save_dir": str(tmp_path)}
    for given in (again, again | {"dataset_name": "folder:x", "codec": "pixels"}):
        assert make_config(given).data.image_mode == "RGB"
    run.saved["dataset"] |= {"image_shape": [8, 8, 1], "pixels": SIXTEEN_BITS.to_json()}
    assert make_config(again).data.image_mode == "I;16"
    assert make_config(again | {"dataset_name": "npz:x"}).data.image_mode is None


def test_a_vae_takes_colours_and_other_data_no_mode():
    assert make_config({"dataset_name": "folder:x"}).data.image_mode == "RGB"
    assert make_config({"dataset_name": "folder:x", "codec": "pixels"}).data.image_mode is None
    assert make_config({"dataset_name": "npz:x"}).data.image_mode is None
    with pytest.raises(UserError, match=r"--image_mode=L.*tfds:x, only on folder:PATH"):
        check_data_settings("tfds:x", {"image_mode": "L"})
    with pytest.raises(UserError, match="--image_mode=CMYK: use one of L, RGB, RGBA, I;16"):
        make_config({"dataset_name": "folder:x", "image_mode": "CMYK"})
