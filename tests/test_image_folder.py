"""Folders of images: their layouts, every kind of file, and what is reported about broken ones."""

import errno
import io
import json
import os
import re
import sqlite3
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from tests.data_sets import load
from tests.image_files import make_classes, noise, resize_by_formula, write, write_png_16_bit
from utils.base.messages import UserError, warn_once
from utils.data import image_folder
from utils.data.batches import epoch_batches, training_batches
from utils.images import checks
from utils.images import decoding as images
from utils.images.decoding import (
    BrokenImageError,
    check_image,
    decode_image,
    open_image,
    read_image,
    read_image_file,
)
from utils.images.pixels import describe_range


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of the test's own, for what the check of the files finds. What was said before is said again."""
    warn_once.cache_clear()
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def read_one(folder, path, size) -> np.ndarray:
    """The image as load_dataset reads it: the one of the training split, the other being held out or filling up."""
    (folder / "train" / "a").mkdir(parents=True, exist_ok=True)
    (folder / "validation" / "a").mkdir(parents=True, exist_ok=True)
    path.rename(folder / "train" / "a" / path.name)
    dataset = load(f"folder:{folder}", image_size=size, image_mode="RGB")
    assert len(dataset.source) == 1
    image = dataset.source[0]["image"]
    assert image.shape == dataset.image_shape == (size, size, 3)
    assert image.dtype == np.uint8
    return image


def test_pillow_has_its_settings_where_an_image_is_first_opened(tmp_path, monkeypatch, recwarn):
    images.configure_pillow()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    path = tmp_path / "x.png"
    write(path, noise(0, 40, 40, 3))
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    images.configure_pillow.cache_clear()
    assert read_image(path.read_bytes(), "x", (8, 8)).shape == (8, 8, 3)
    warnings.warn_explicit("malformed", UserWarning, "TiffImagePlugin.py", 1, module="PIL.TiffImagePlugin")
    assert list(recwarn) == []


@pytest.mark.parametrize("shape", [(40, 40), (40, 63), (63, 40), (16, 16), (9, 12), (1, 1), (200, 17)])
def test_crops_the_middle_square_and_resizes_antialiased(tmp_path, shape):
    pixels = noise(0, *shape, 3)
    write(tmp_path / "x.png", pixels)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    expected = resize_by_formula(pixels[top : top + side, left : left + side], 16)
    # Two passes, each rounded to a level.
    np.testing.assert_allclose(read_one(tmp_path, tmp_path / "x.png", 16), expected, atol=1.01)


def test_reads_every_kind_of_file_as_rgb(tmp_path):
    def read(name):
        return read_one(tmp_path / name.replace(".", "_"), tmp_path / name, 8).astype(int)

    grey = noise(1, 8, 8)
    write(tmp_path / "grey.png", grey)
    np.testing.assert_array_equal(read("grey.png"), np.repeat(grey[..., None], 3, axis=2))

    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.JPG")
    np.testing.assert_allclose(read("cmyk.JPG"), np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=4)

    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read("palette.png"), np.broadcast_to([10, 200, 30], (8, 8, 3)))

    half_clear = np.zeros((8, 8, 4), np.uint8)
    half_clear[:4] = 40, 50, 60, 255
    write(tmp_path / "alpha.png", half_clear)
    on_white = read("alpha.png")
    assert (on_white[:4] == [40, 50, 60]).all()
    assert (on_white[4:] == 255).all()

    levels = np.linspace(0, 65535, 64).reshape(8, 8).round()
    write_png_16_bit(tmp_path / "grey16.png", levels)
    np.testing.assert_allclose(read("grey16.png"), np.repeat((levels / 257)[..., None], 3, axis=2), atol=0.51)
    write_png_16_bit(tmp_path / "rgb16.png", np.stack([levels, levels.T, 65535 - levels], axis=-1))
    np.testing.assert_allclose(read("rgb16.png"), np.stack([levels, levels.T, 65535 - levels], axis=-1) / 257, atol=1)

    write(tmp_path / "picture.webp", noise(2, 8, 8, 3), lossless=True)
    np.testing.assert_array_equal(read("picture.webp"), noise(2, 8, 8, 3))

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    write(tmp_path / "turned.png", noise(3, 8, 8, 3), exif=exif)
    np.testing.assert_array_equal(read("turned.png"), np.rot90(noise(3, 8, 8, 3), -1))


def contents(name, split) -> list[tuple[int, int]]:
    """(value of the first pixel, label) of every image."""
    batch = next(epoch_batches(load(name, split, image_size=2), 1000))
    return list(zip(batch.image[:, 0, 0, 0].tolist(), batch.condition.tolist(), strict=True))


def test_folders_are_classes_and_a_part_is_held_out(tmp_path):
    make_classes(tmp_path, {"cat": 9, "dog": 8, "Zebra": 7})
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".hidden.png").write_text("no image")
    (tmp_path / ".cache").mkdir()
    name = f"folder:{tmp_path}"
    train = contents(name, "train")
    validation = contents(name, "validation")
    dataset = load(name)
    assert dataset.class_names == ("Zebra", "cat", "dog")
    assert dataset.image_shape == (256, 256, 3)
    assert dataset.random_flip
    assert not load(name, "validation").random_flip
    assert (len(train), len(validation)) == (23, 1)
    values = {"cat": range(9), "dog": range(10, 18), "Zebra": range(20, 27)}
    expected = [(v, dataset.class_names.index(c)) for c in values for v in values[c]]
    assert sorted(train + validation) == sorted(expected)
    assert (contents(name, "train"), contents(name, "validation")) == (train, validation)


def test_a_share_of_two_percent_is_held_out_and_stays_when_images_are_added(tmp_path):
    make_classes(tmp_path / "old", {"a": 100, "b": 100})
    make_classes(tmp_path / "new", {"a": 101, "b": 100})
    old, new = (contents(f"folder:{tmp_path / folder}", "validation") for folder in ("old", "new"))
    assert len(old) == len(new) == 4
    assert len(set(old) & set(new)) >= 3


def test_a_class_whose_only_image_is_held_out_is_without_training_images(tmp_path):
    make_classes(tmp_path, {"a": 1, "b": 1})
    train, validation = (load(f"folder:{tmp_path}", split, image_size=2) for split in ("train", "validation"))
    assert train.empty_classes == (validation.source.labels[0],)


def test_a_flat_folder_is_one_class(tmp_path):
    for i in range(5):
        write(tmp_path / "faces" / f"{i}.png", np.full((2, 2, 3), i, np.uint8))
    name = f"folder:{tmp_path / 'faces'}"
    assert load(name).class_names == ("faces",)
    assert sorted(contents(name, "train") + contents(name, "validation")) == [(i, 0) for i in range(5)]


@pytest.mark.parametrize("validation", ["validation", "val"])
def test_splits_may_be_folders(tmp_path, validation):
    make_classes(tmp_path / "train", {"a": 2, "b": 2, "c": 1})
    make_classes(tmp_path / validation, {"a": 1, "c": 1})
    name = f"folder:{tmp_path}"
    assert contents(name, "train") == [(0, 0), (1, 0), (10, 1), (11, 1), (20, 2)]
    assert contents(name, "validation") == [(0, 0), (10, 2)]
    make_classes(tmp_path / validation, {"d": 1})
    with pytest.raises(UserError, match="class 'd'"):
        load(name, "validation")


def test_a_class_may_be_called_train(tmp_path):
    make_classes(tmp_path, {"bus": 3, "train": 3})
    assert load(f"folder:{tmp_path}").class_names == ("bus", "train")


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    make_classes(tmp_path / "single", {"a": 1})
    make_classes(tmp_path / "mixed", {"a": 2})
    write(tmp_path / "mixed" / "stray.png", noise(0, 2, 2, 3))
    for folder, message in [
        ("missing", "no folder .*missing/CLASS/IMAGE"),
        ("empty", "holds no images; .*empty/CLASS/IMAGE"),
        ("single", "holds 1 image"),
        ("mixed", "stray.png beside folders"),
    ]:
        with pytest.raises(UserError, match=f"--dataset_name=folder:.*{message}"):
            load(f"folder:{tmp_path / folder}", image_size=2)


@pytest.fixture
def zoo(tmp_path):
    """A folder with all that goes wrong in folders, beside five good images of two classes."""
    make_classes(tmp_path, {"cat": 3, "dog": 2})
    buffer = io.BytesIO()
    Image.fromarray(noise(0, 64, 64, 3)).save(buffer, "JPEG")
    (tmp_path / "cat" / "truncated.jpg").write_bytes(buffer.getvalue()[:-700])
    (tmp_path / "cat" / "text.png").write_text("no image")
    (tmp_path / "dog" / "nothing.webp").write_bytes(b"")
    (tmp_path / "dog" / "readme.txt").write_text("no image")
    write(tmp_path / "dog" / "pixel.png", noise(1, 1, 1, 3))
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "dog" / "cmyk.jpg")
    write_png_16_bit(tmp_path / "dog" / "deep.png", np.full((8, 8), 257 * 99))
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_broken_files_and_empty_classes_are_refused_by_name_before_training(zoo):
    with pytest.raises(UserError, match=r"3 of 11 images cannot be read: .*text.png.*--broken_images skip") as error:
        load(f"folder:{zoo}", image_size=8)
    assert [name for name in ("truncated.jpg", "nothing.webp") if name not in str(error.value)] == []
    for name in ("cat/truncated.jpg", "cat/text.png", "dog/nothing.webp"):
        (zoo / name).unlink()
    with pytest.raises(UserError, match=r"the folder .*empty of a class holds no images; .*--broken_images skip"):
        load(f"folder:{zoo}", image_size=8)


def test_broken_files_and_empty_classes_are_skipped_by_name(zoo, capfd):
    splits = [load(f"folder:{zoo}", split, None, 8, "skip") for split in ("train", "validation")]
    output = capfd.readouterr().err
    named = [
        "truncated.jpg",
        "text.png",
        "nothing.webp",
        "ignored 1 file",
        "readme.txt",
        "pixel.png",
        "side of 1",
        "empty",
    ]
    assert [name for name in named if name not in output] == []
    assert [len(dataset.source) for dataset in splits] == [7, 1]
    assert splits[0].class_names == ("cat", "dog")
    images = [batch.image for dataset in splits for batch in epoch_batches(dataset, 4)]
    colours = {tuple(image[4, 4].tolist()) for image in np.concatenate(images)}
    assert {(99, 99, 99), tuple(noise(1, 1, 1, 3)[0, 0].tolist())} <= colours
    assert any(red > 245 and green < 10 for red, green, _ in colours)  # the CMYK one
    batches = training_batches(splits[0], 4, 0)
    assert all(next(batches).image.shape == (4, 8, 8, 3) for _ in range(5))


def test_the_check_is_remembered_until_a_file_changes(zoo, monkeypatch):
    name = f"folder:{zoo}"
    assert len(load(name, "train", None, 8, "skip").source) == 7
    checked = []
    check = checks.check_image
    monkeypatch.setattr(checks, "check_image", lambda *args, **kwargs: checked.append(1) or check(*args, **kwargs))
    assert len(load(name, "train", None, 8, "skip").source) == 7
    assert not checked
    (zoo / "cat" / "0.png").write_bytes(b"broken since")
    assert len(load(name, "train", None, 8, "skip").source) == 6
    assert len(checked) == 1  # the others are not decoded again


def test_a_file_that_breaks_after_the_check_is_named_when_it_is_read(tmp_path):
    make_classes(tmp_path, {"a": 4})
    dataset = load(f"folder:{tmp_path}", image_size=2)
    for path in (tmp_path / "a").iterdir():
        path.write_bytes(b"gone")
    with pytest.raises(UserError, match=r"a/\d.png is not a readable image"):
        next(training_batches(dataset, 3, 0))


def test_ilsvrc_as_it_is_unpacked(tmp_path, shared):
    """A thousand folders of WordNet ids, and a flat `val`, whose labels are in no file name."""
    with tarfile.open(shared / "data" / "imagenet2012_sample" / "ILSVRC2012_img_train.tar") as classes:
        for member in classes:
            folder = tmp_path / "train" / member.name.removesuffix(".tar")
            with tarfile.open(fileobj=classes.extractfile(member)) as images:
                images.extractall(folder, filter="data")
    with tarfile.open(shared / "data" / "imagenet2012_sample" / "ILSVRC2012_img_val.tar") as images:
        images.extractall(tmp_path / "val", filter="data")
    train, validation = (load(f"folder:{tmp_path}", split) for split in ("train", "validation"))
    assert (len(train.source), len(validation.source)) == (980, 20)
    assert train.class_names[207] == "golden retriever"
    path, label = train.source.paths[500], train.source.labels[500]
    assert sorted(folder.name for folder in (tmp_path / "train").iterdir())[label] == path.split("/")[-2]
    assert train.source[500]["image"].shape == (256, 256, 3)


def test_known_names_of_splits_are_splits_and_what_was_taken_is_said(tmp_path, capfd):
    for number, (layout, train, validation) in enumerate(
        [
            (("train", "valid", "test"), "train", "valid"),
            (("Training", "Testing"), "Training", None),
            (("train2017", "val2017", "annotations"), "train2017", "val2017"),
            (("training_set", "test_set"), "training_set", None),
            (("seg_train", "seg_test", "dev"), "seg_train", "dev"),
            (("train_images", "eval", "masks"), "train_images", "eval"),
        ]
    ):
        root = tmp_path / str(number)
        for folder in layout:
            make_classes(root / folder, {"cat": 5, "dog": 5})
        datasets = [load(f"folder:{root}", split, image_size=2) for split in ("train", "validation")]
        assert datasets[0].class_names == ("cat", "dog")
        read = {path.split("/")[0] for dataset in datasets for path in dataset.source.paths}
        assert read == {train, validation} - {None}
        assert {path.split("/")[0] for path in datasets[0].source.paths} == {train}
        said = capfd.readouterr().err
        assert f"training on {train}/" in said
        left_out = set(layout) - {train, validation}
        assert all(f"{folder}/" in said for folder in left_out)
        assert said.count("training on") == 1


def test_flat_splits_of_one_class(tmp_path):
    for folder, count in (("train", 4), ("valid", 2), ("test", 3)):
        for i in range(count):
            write(tmp_path / folder / f"{i}.png", noise(i, 2, 2, 3))
    train, validation = (load(f"folder:{tmp_path}", split, image_size=2) for split in ("train", "validation"))
    assert train.class_names == validation.class_names == (tmp_path.name,)
    assert (len(train.source), len(validation.source)) == (4, 2)


def test_folders_wrapped_in_their_own_name_are_unwrapped(tmp_path):
    make_classes(tmp_path / "training_set" / "training_set", {"cat": 3, "dog": 3})
    make_classes(tmp_path / "test_set" / "test_set", {"cat": 1, "dog": 1})
    assert load(f"folder:{tmp_path}", image_size=2).class_names == ("cat", "dog")


AMBIGUOUS = {
    "no split to train on": (("valid", "test"), "holds test/, valid/ but no train/"),
    "classes beside a split": (("cat", "dog", "test"), "test/ may be splits .*unlike cat/, dog/"),
    "two for validation": (("train/cat", "val/cat", "dev/cat"), "dev/, val/ could each be the validation split"),
    "masks beside images": (("images", "masks"), "masks/ may be splits"),
    "train and classes": (("train/cat", "bus"), "train/ may be splits"),
    "splits inside of classes": (("cat/train", "cat/test", "dog/train"), "the class .*cat holds test/, train/"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_may_be_splits_or_classes_is_refused(tmp_path, case):
    folders, message = AMBIGUOUS[case]
    for folder in folders:
        write(tmp_path / folder / "0.png", noise(0, 2, 2, 3))
        write(tmp_path / folder / "1.png", noise(1, 2, 2, 3))
    with pytest.raises(UserError, match=f"--dataset_name=folder:.*{message}"):
        load(f"folder:{tmp_path}", image_size=2)


def test_images_at_any_depth_belong_to_their_class(tmp_path, capfd):
    make_classes(tmp_path / "cat", {"2019": 3, "2020/may": 2})
    make_classes(tmp_path, {"dog": 2})
    (tmp_path / "cat" / "2019" / "back").symlink_to(tmp_path / "cat")  # a circle
    dataset = load(f"folder:{tmp_path}", image_size=2)
    assert dataset.class_names == ("cat", "dog")
    held_out = load(f"folder:{tmp_path}", "validation", image_size=2)
    assert len(dataset.source) + len(held_out.source) == 7
    make_classes(tmp_path / "wrapped" / "all", {"a": 2, "b": 2})
    assert load(f"folder:{tmp_path / 'wrapped'}", image_size=2).class_names == ("all",)
    assert re.search("one class, all, .*if a/, b/ are classes, give folder:.*wrapped/all", capfd.readouterr().err)


def test_what_is_no_file_is_named_or_skipped(tmp_path, capfd):
    make_classes(tmp_path, {"cat": 3, "dog": 2})
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / ".nowhere.png")
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    name = f"folder:{tmp_path}"
    with pytest.raises(
        UserError, match=r"2 of 7 images .*gone.png \(a link to nothing\); .*pipe.png \(no regular file\)"
    ):
        load(name, image_size=2)
    assert len(load(name, "train", None, 2, "skip").source) == 4
    assert "gone.png" in capfd.readouterr().err
    write(tmp_path / ".nowhere.png", noise(0, 2, 2, 3))  # what the system could not read is not remembered as broken
    assert len(load(name, "train", None, 2, "skip").source) == 5


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("stored", ["1", "L", "LA", "RGB", "RGBA", "P", "I;16", "CMYK"])
def test_large_images_are_resized_in_strips_to_the_same_pixels(monkeypatch, stored, mode):
    """The expected ones are Pillow's own, of the whole image at once."""
    source = Image.fromarray(noise(3, 47, 64, 3))
    source = Image.fromarray(noise(3, 47, 128).view(np.uint16)) if stored == "I;16" else source.convert(stored)
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[images.EXIF_ORIENTATION] = orientation
        content = io.BytesIO()
        source.save(content, "TIFF" if stored == "CMYK" else "PNG", exif=exif)
        whole = decode_image(content.getvalue(), mode=mode)
        left, top = (whole.width - 47) // 2, (whole.height - 47) // 2
        # Of a rectangle twice as wide as high, the image's whole width.
        half = whole.width // 2
        wide = (0, (whole.height - half) // 2, whole.width, (whole.height - half) // 2 + half)
        square = (left, top, left + 47, top + 47)
        for (rows, columns), box in {(8, 8): square, (60, 60): square, (10, 20): wide}.items():
            expected = whole.crop(box).resize((columns, rows), Image.Resampling.BILINEAR)
            monkeypatch.setattr(images, "STRIP_PIXELS", 5 * 47)
            found = read_image(content.getvalue(), "x", (rows, columns), mode=mode)
            np.testing.assert_array_equal(found, np.asarray(expected).reshape(rows, columns, -1))


def test_images_are_bounded_by_the_bytes_that_they_take(tmp_path, monkeypatch):
    """A megapixel of --max_megapixels is of three bytes a pixel; deeper pixels count for what they are."""
    for shape, dtype, limit in (
        ((100, 100), np.uint8, 0.01),
        ((100, 100, 3), np.uint8, 0.01),
        ((100, 100), np.uint16, 0.01),
        ((100, 100, 4), np.uint8, 0.04 / 3),
    ):
        content = io.BytesIO()
        Image.fromarray(np.zeros(shape, dtype)).save(content, "PNG")
        shown = 255 if shape[2:] == (4,) else 0  # what is transparent is white
        mode = "I;16" if dtype == np.uint16 else "L" if len(shape) == 2 else "RGB"
        assert check_image(content.getvalue(), max_megapixels=limit * 1.001) == (100, 100, mode, shown, shown)
        with pytest.raises(BrokenImageError, match=f"megapixels{' of 4 bytes each' * (4 in shape)} are above"):
            check_image(content.getvalue(), max_megapixels=limit * 0.999)
    # A large file is not read before its header, nor where it holds more than pixels.
    monkeypatch.setattr(images, "SMALL_BYTES", 1000)
    (tmp_path / "a.png").write_bytes(content.getvalue() + bytes(90_000))
    with pytest.raises(BrokenImageError, match=r"it has 90,\d+ bytes for 100x100 pixels"):
        read_image_file(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(content.getvalue() + bytes(70_000))
    assert len(read_image_file(tmp_path / "a.png")) > 70_000
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BrokenImageError, match="it is no regular file"), open_image(tmp_path / "pipe.png"):
        pass


def test_a_verdict_of_the_system_is_not_remembered(tmp_path, monkeypatch):
    make_classes(tmp_path, {"cat": 3, "dog": 2})

    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(images, "read_bytes", fail)
        with pytest.raises(UserError, match=r"5 of 5 images cannot be read: .*Input/output error"):
            load(f"folder:{tmp_path}", image_size=2)
    assert len(load(f"folder:{tmp_path}", image_size=2).source) == 4


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\0", b"SQLite format 3\0" + b"\xff" * 9000])
def test_a_damaged_memory_of_checks_is_made_anew(tmp_path, content, cache):
    make_classes(tmp_path, {"cat": 3})
    load(f"folder:{tmp_path}", image_size=2)
    (kept,) = (cache / "jax-flow-matching").glob("checked-*.sqlite")
    whole = read_memory(kept)
    assert len(whole) == 3
    kept.write_bytes(content)
    load(f"folder:{tmp_path}", image_size=2)
    assert read_memory(kept) == whole


def read_memory(file) -> list[tuple]:
    connection = sqlite3.connect(file)
    try:
        return connection.execute("SELECT * FROM images").fetchall()
    finally:
        connection.close()


def test_names_that_are_no_utf8(tmp_path, capfd):
    for folder in (b"caf\xe9", b"cats"):
        (tmp_path / os.fsdecode(folder)).mkdir()
        for i in range(2):
            Image.fromarray(noise(i, 2, 2, 3)).save(tmp_path / os.fsdecode(folder) / f"{i}.png")
    (tmp_path / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.txt")).touch()
    dataset = load(f"folder:{tmp_path}", image_size=2)
    assert dataset.class_names == (r"caf\xe9", "cats")
    json.dumps(dataset.class_names).encode()
    assert r"\xff.txt" in capfd.readouterr().err


TABLES = {
    "labels.csv": ("image,label\n0.png,3\n", "beginning 'image,label'"),
    "train.tsv": ("a\tb\n", "beginning"),
    "metadata.jsonl": ('{"file_name": "0.png", "text": "a cat"}\n', "with file_name, text"),
    "annotations.json": ('{"images": [],\n "categories": []}', "with images, categories"),
    "list_attr.txt": ("0.png 1 -1\n", ""),
    "boxes.xml": ("<annotation/>", ""),
    "labels.parquet": ("PAR1", ""),
}
LAYOUTS = {"flat": ("0.png",), "classes": ("cat/0.png", "dog/0.png"), "splits": ("train/cat/0.png", "valid/cat/0.png"),
           "flat splits": ("train/0.png", "valid/0.png"), "wrapped": ("train/train/a/0.png", "test/0.png")}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_at_any_level_of_any_layout_are_named_as_not_used(tmp_path, layout, capfd):
    images = [tmp_path / name for name in LAYOUTS[layout]]
    for image in images:
        write(image, noise(0, 2, 2, 3))
        write(image.with_name("1.png"), noise(1, 2, 2, 3))
    read = [image for image in images if "test" not in image.parts]
    levels = {folder for image in read for folder in image.parents if folder.is_relative_to(tmp_path)}
    for folder in levels:
        for name, (content, described) in TABLES.items():
            (folder / name).write_text(content)
            for split in ("train", "validation"):
                load(f"folder:{tmp_path}", split, image_size=2)
            (line,) = [line for line in capfd.readouterr().err.splitlines() if "not used" in line]
            where = re.escape(name) if (described := re.escape(described)) == "" else rf"{re.escape(name)} {described}"
            assert re.search(rf"not used: 1 file that may hold labels or captions \(\S*{where}.*\)", line)
            (folder / name).unlink()
            warn_once.cache_clear()


def test_images_beside_a_folder_of_training_images_are_said_not_to_be_read(tmp_path, capfd):
    make_classes(tmp_path, {"train": 3})
    write(tmp_path / "stray.png", noise(0, 2, 2, 3))
    assert len(load(f"folder:{tmp_path}", image_size=2).source) == 2
    assert "validating on a part of it; not read: 1 image (stray.png)" in capfd.readouterr().err


def test_a_table_in_utf_16_is_shown_as_text(tmp_path, capfd):
    make_classes(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "labels.csv").write_text("image,label\n0.png,3\n", encoding="utf-16")
    load(f"folder:{tmp_path}", image_size=2)
    assert "(labels.csv beginning 'image,label')" in capfd.readouterr().err


def test_many_files_named_as_images_are_one_line(tmp_path, capfd):
    make_classes(tmp_path, {"cat": 20, "dog": 20})
    for image in tmp_path.glob("*/*.png"):
        image.with_suffix(".txt").write_text("a picture")
    (tmp_path / "labels.csv").touch()
    (tmp_path / "README.txt").write_text("about")
    load(f"folder:{tmp_path}", image_size=2)
    said = capfd.readouterr().err
    assert re.search(
        r"not used: 1 file that may .*\(labels.csv that is empty\); 40 files named as an image, such as cat/", said
    )
    assert "ignored 1 file" in said
    assert said.count(".txt") == 2


def make_edm(folder, labels, count=12, table="dataset.json"):
    """Images numbered as EDM and StyleGAN write them, four in a folder."""
    names = [f"{i // 4:05d}/img{i // 4:05d}{i:03d}.png" for i in range(count)]
    for i, name in enumerate(names):
        write(folder / name, np.full((2, 2, 3), 20 * i, np.uint8))
    if labels != "no table":
        pairs = labels and [[name, label] for name, label in zip(names, labels, strict=True)]
        (folder / table).write_text(json.dumps({"labels": pairs}))


def test_a_thousand_images_in_a_folder_as_of_ffhq_are_no_class(tmp_path):
    for number in (998, 999, 1000, 1001, 5999):
        write(tmp_path / f"{number // 1000:02d}000" / f"{number:05d}.png", noise(number, 2, 2, 3))
    assert load(f"folder:{tmp_path}", image_size=2).class_names == (tmp_path.name,)
    write(tmp_path / "06000" / "05999.png", noise(0, 2, 2, 3))
    assert load(f"folder:{tmp_path}", image_size=2).num_classes == 4


@pytest.mark.parametrize("below", ["", "train"])
@pytest.mark.parametrize("labels", [None, "no table", [5] * 12])
def test_folders_that_edm_numbers_are_no_classes(tmp_path, labels, below, capfd):
    make_edm(tmp_path / below, labels)
    dataset = load(f"folder:{tmp_path}", image_size=2)
    assert dataset.class_names == (tmp_path.name,)
    assert len(dataset.source) == 11
    said = capfd.readouterr().err
    assert (
        "folders of a thousand numbered images, as EDM, StyleGAN and FFHQ have them, are no classes: all images" in said
    )
    assert "if 00000/" not in said


@pytest.mark.parametrize("below", ["", "train"])
@pytest.mark.parametrize("labels", [[i % 2 for i in range(12)], [[i % 2, 1.5] for i in range(12)]])
def test_labels_that_folders_contradict_are_refused(tmp_path, labels, below):
    make_edm(tmp_path / below, labels)
    with pytest.raises(UserError, match=r"dataset.json has labels of 12 images, whose 2 classes are not the 3 folders"):
        load(f"folder:{tmp_path}", image_size=2)
    for image in [*tmp_path.rglob("0000[12]/*.png")]:
        image.unlink()
    with pytest.raises(UserError, match=r"4 images, whose 2 classes are not the folder that they lie in; .*npz:FILE$"):
        load(f"folder:{tmp_path}", image_size=2)
    (tmp_path / below / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset.json cannot be read, and the folders .* are numbered"):
        load(f"folder:{tmp_path}", image_size=2)


def test_labels_that_are_the_folders_are_named_and_other_folders_are_classes(tmp_path, capfd):
    make_edm(tmp_path / "same", [i // 4 + 7 for i in range(12)])
    assert load(f"folder:{tmp_path / 'same'}", image_size=2).class_names == ("00000", "00001", "00002")
    assert (
        "not used: 1 file that may hold labels or captions (dataset.json with labels of 12 images)"
        in capfd.readouterr().err
    )
    make_classes(tmp_path / "signs", {f"{i:05d}": 3 for i in range(3)})  # as of GTSRB, whose classes are numbered
    assert load(f"folder:{tmp_path / 'signs'}", image_size=2).num_classes == 3
    make_classes(tmp_path / "pets", {"cat": 2, "dog": 2})
    (tmp_path / "pets" / "dataset.json").write_text('{"labels": [["cat/0.png", 0], ["cat/1.png", 1]]}')
    with pytest.raises(
        UserError, match=r"labels of 2 images, whose 2 classes are not the 2 folders .* move dataset.json out"
    ):
        load(f"folder:{tmp_path / 'pets'}", image_size=2)


SYSTEM = (
    "@eaDir/0.png/SYNOFILE_THUMB_M.jpg", "#recycle/old.png", "$RECYCLE.BIN/S-1/x.png", "lost+found/#123.png",
    "System Volume Information/x.png", ".thumbnails/t.png", "__MACOSX/0.png", "._0.png", ".DS_Store", "Thumbs.db",
    "desktop.ini", "Backups.backupdb/a/x.png", "_gsdata_/x.png", ".Trash-1000/files/x.png",
    "@Recycle/x.jpg", ".@__thumb/default0.png",
)  # fmt: skip


@pytest.mark.parametrize("name", SYSTEM)
def test_what_systems_keep_beside_images_is_left_out_and_counted(tmp_path, name, capfd):
    for root, level in (("classes", ""), ("nested", "cat"), ("splits", "train"), ("splits2", "train/cat")):
        below = "train" if root.startswith("splits") else ""
        make_classes(tmp_path / root / below, {"cat": 3, "dog": 3})
        write(tmp_path / root / level / "other.png", noise(0, 2, 2, 3))
        target = tmp_path / root / level / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / root / level / "other.png").rename(target)
        dataset = load(f"folder:{tmp_path / root}", image_size=2)
        assert dataset.class_names == ("cat", "dog")
        assert len(dataset.source) == 5
        said = capfd.readouterr().err
        assert re.search(r"left out 1 system file \(\S.*\)", said)
        assert "ignored" not in said


def test_images_that_use_little_of_their_range_are_told_so(tmp_path, capfd):
    ramp = np.tile(np.linspace(0, 4095, 16).astype(np.uint16), (16, 1))  # 12 bits
    for i in range(3):
        (tmp_path / "twelve").mkdir(exist_ok=True)
        write_png_16_bit(tmp_path / "twelve" / f"{i}.png", ramp)
        write(tmp_path / "one" / f"{i}.png", np.full((4, 4), 7, np.uint8))
        write(tmp_path / "full" / f"{i}.png", noise(i, 8, 8, 3))
    expected = {"twelve": "values are 0 to 16 of 0 to 255", "one": "all values of all images are 7", "full": ""}
    for name, message in expected.items():
        for again in range(2):  # from the check, and from what it keeps
            warn_once.cache_clear()
            load(f"folder:{tmp_path / name}", image_size=16 if again else 4)
            said = capfd.readouterr().err
            assert (message in said) if message else ("values" not in said)


@pytest.mark.parametrize(
    ("extremes", "message"),
    [
        ([(0, 255), (3, 200)], ""),
        ([(0, 127), (0, 90)], "values are 0 to 127 of"),
        ([(0, 128), (0, 90)], ""),
        ([(128, 255)] * 3, "values are 128 to 255 of 0 to 255: rescale them to"),
        ([(0, 1)] * 3, "values are 0 to 1 of"),
        ([(0, 0), (255, 255)], "each image is of one value"),
        ([(0, 16), (0, 16), (0, 255), (0, 255)], "50% of the images span fewer than 64 of 256 levels: were they"),
        ([(0, 16)] + [(0, 255)] * 9, "10% of the images span fewer"),  # two cameras
        ([(0, 16)] + [(0, 255)] * 10, ""),
    ],
)
def test_ranges_in_words(extremes, message):
    said = describe_range(np.array(extremes, np.uint8))
    assert (message in said) if message else (said == "")


def test_names_are_utf_8_under_a_locale_of_another_encoding(monkeypatch):
    """Python reads names by the locale's encoding; class names and keys stay the same, and so do labels."""
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("latin-1"))
    assert image_folder._text("猫 Käse".encode().decode("latin-1")) == "猫 Käse"
    assert image_folder._text("caf\xe9") == r"caf\xe9"


EXIF_BEFORE = b"Exif\0\0"
BROKEN_EXIF = {
    "empty": EXIF_BEFORE,
    "garbage": EXIF_BEFORE + b"garbage!" * 4,
    "cut": EXIF_BEFORE + b"II*\0\x08\0\0\0\x05\0\x12\x01",
    "text": EXIF_BEFORE + b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0x\0\0\0\0\0\0\0",
    "zero": b"\0\x08\0\x02\x01\x12\0\x03",
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("case", BROKEN_EXIF)
def test_pixels_are_kept_where_their_metadata_are_broken(case, kind):
    buffer = io.BytesIO()
    pixels = noise(0, 8, 12, 3)
    Image.fromarray(pixels).save(buffer, kind, exif=BROKEN_EXIF[case], lossless=True, quality=95)
    read = np.asarray(decode_image(buffer.getvalue())).astype(int)
    np.testing.assert_allclose(read, pixels, atol=0 if kind != "JPEG" else 255)
    assert read.shape == (8, 12, 3)


def test_large_photographs_pass_up_to_a_limit(tmp_path):
    make_classes(tmp_path, {"cat": 2})
    Image.new("L", (20_000, 9_800)).save(tmp_path / "cat" / "photo.png")  # 196 megapixels
    name = f"folder:{tmp_path}"
    assert len(load(name, image_size=2).source) == 2
    with pytest.raises(UserError, match=r"photo\.png .196 megapixels are above --max_megapixels=100"):
        load(name, image_size=2, max_megapixels=100)
