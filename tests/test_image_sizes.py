"""Images that are not square: --image_size 24x40, from the flag to the images of a folder."""

import numpy as np
import pytest
from data_sets import load
from image_files import noise
from PIL import Image

from utils.base.messages import UserError
from utils.data.dataset import DataOptions
from utils.images.sizes import parse_size, write_size
from utils.sampling.editing import read_images
from utils.training import make_config


@pytest.mark.parametrize(
    ("given", "setting", "size"),
    [
        (256, 256, (256, 256)),
        ("256", 256, (256, 256)),
        ("24x40", "24x40", (24, 40)),
        ("24X24", 24, (24, 24)),
        ((40, 24), "40x24", (40, 24)),
        ([8, 8], 8, (8, 8)),
    ],
)
def test_a_size_is_a_side_or_rows_by_columns(given, setting, size):
    assert parse_size(given) == setting == write_size(size)
    assert DataOptions(image_size=setting).size == size
    config = make_config({"dataset_name": "folder:x", "image_size": given, "codec": "pixels"})
    assert config.data.image_size == config.to_json()["image_size"] == setting
    assert config.data.options.size == size


@pytest.mark.parametrize("given", ["", "x", "24x", "x40", "24x40x3", "0", "0x8", "-8", "8193", "1_0", "8.0", (8,) * 3])
def test_what_is_no_size_is_refused(given):
    with pytest.raises(UserError, match=r"--image_size=.*use the side of a square, such as 256, or rows x columns"):
        make_config({"dataset_name": "folder:x", "image_size": given})


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((24, 40), slice(24), slice(40)),
        ((30, 40), slice(3, 27), slice(40)),
        ((24, 51), slice(24), slice(5, 45)),
    ],
)
def test_the_middle_in_the_proportions_of_the_size_is_read(tmp_path, shape, rows, columns):
    """These need no resizing: their pixels are those of the file. Training and edit.py read the same."""
    for i in range(2):
        Image.fromarray(noise(i, *shape, 3)).save(tmp_path / f"{i}.png")
    dataset = load(f"folder:{tmp_path}", image_size="24x40")
    assert dataset.image_shape == (24, 40, 3)
    path = tmp_path / dataset.source.paths[0]
    expected = noise(int(path.stem), *shape, 3)[rows, columns]
    np.testing.assert_array_equal(dataset.row(0, False)["image"], expected)
    found, files = read_images(tmp_path, (24, 40, 3), 2)
    np.testing.assert_array_equal(found[files.index(path)], expected)


def test_images_that_lack_rows_or_columns_are_said_to_be_enlarged(tmp_path, capfd):
    for name, shape in {"a": (24, 39), "b": (23, 80), "c": (24, 40)}.items():
        Image.fromarray(noise(0, *shape, 3)).save(tmp_path / f"{name}.png")
    load(f"folder:{tmp_path}", image_size="24x40")
    assert (
        f"images below 24x40 pixels are enlarged; the smallest, {tmp_path}/b.png, has 23x80" in capfd.readouterr().err
    )
    load(f"folder:{tmp_path}", image_size="24x39")
    assert "b.png, has 23x80" in capfd.readouterr().err
