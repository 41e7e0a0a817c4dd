"""Tests of sample files: npz and PNGs give back the same images, and damaged ones are refused by name."""

import contextlib
import gc
import re

import numpy as np
import pytest
from PIL import Image

from tests.image_files import noise, write
from utils.base.messages import UserError, WriteError
from utils.data.dataset import DataOptions
from utils.data.loaders import load_dataset
from utils.images.samples import SampleWriter, content_sha256, open_samples

IMAGES = noise(0, 10, 6, 5, 3)
LABELS = np.arange(10, dtype=np.int32)


def write_samples(path, images=IMAGES, batch_size=4):
    with SampleWriter(path, len(images)) as writer:
        for start in range(0, len(images), batch_size):
            stop = min(start + batch_size, len(images))
            writer.write(images[start:stop], LABELS[start:stop])
    return path


def read_all(path, batch_size: int) -> np.ndarray:
    samples = open_samples(path)
    batches = list(samples.read(batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    images = np.concatenate(batches)
    assert images.shape == (samples.num_samples, *samples.image_shape)
    return images


@pytest.mark.parametrize("name", ["samples.npz", "folder"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read(tmp_path, name, channels):
    images = IMAGES[..., :channels]
    path = write_samples(tmp_path / name, images)
    for batch_size in (3, 10, 99):
        np.testing.assert_array_equal(read_all(path, batch_size), images)


def test_the_npz_is_adms(tmp_path):
    with np.load(write_samples(tmp_path / "samples.npz")) as archive:
        np.testing.assert_array_equal(archive["arr_0"], IMAGES)
        np.testing.assert_array_equal(archive["arr_1"], LABELS)
        assert archive["arr_0"].dtype == np.uint8


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files_of_others_are_read(tmp_path, save):
    save(tmp_path / "samples.npz", IMAGES, LABELS)
    np.testing.assert_array_equal(read_all(tmp_path / "samples.npz", 4), IMAGES)


def test_an_interrupted_npz_does_not_appear(tmp_path):
    def images():
        yield IMAGES[:4]
        raise KeyboardInterrupt

    def write_all():
        with SampleWriter(tmp_path / "samples.npz", 10) as writer:
            for batch in images():
                writer.write(batch, LABELS[:4])

    with pytest.raises(KeyboardInterrupt):
        write_all()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_finished_is_refused_with_both_numbers(tmp_path):
    folder = tmp_path / "class 3" / "folder"

    def write(count):
        with SampleWriter(folder, 10) as writer:
            writer.write(IMAGES[:count], LABELS[:count])
            raise KeyboardInterrupt

    for count in (4, 0):
        with pytest.raises(KeyboardInterrupt):
            write(count)
        for path in (folder, folder.parent) if count else (folder,):
            with pytest.raises(UserError, match=f"--images={path}: .*folder holds {count} of 10 samples") as error:
                open_samples(path, "images")
            assert "\n" not in str(error.value)
        with pytest.raises(UserError, match=r"--dataset_name=folder:.* of 10 samples"):
            load_dataset(f"folder:{folder}", "train", DataOptions())
    (folder / ".000003.png.0123abcd.7.tmp").touch()  # of a writer that was killed, elsewhere
    write_samples(folder)
    np.testing.assert_array_equal(read_all(folder, 4), IMAGES)
    assert [path.name for path in folder.iterdir() if path.suffix not in (".png", ".tmp")] == []


@pytest.mark.parametrize("name", ["samples.npz", "folder"])
def test_a_full_disk_is_one_line_and_who_wants_to_go_on_can(tmp_path, full_disk, capfd, name):
    images = noise(0, 4, 40, 40, 3)
    labels = np.arange(4)
    full_disk(4500)  # which has room for less than one of them

    def write(catching):
        with SampleWriter(tmp_path / name, 4) as writer:
            for rows in (slice(0, 2), slice(2, 4)):
                with catching:
                    writer.write(images[rows], labels[rows])
        return writer.failure

    what = "0 of 4 samples are whole; " if name == "folder" else ""
    with pytest.raises(WriteError, match=rf"{name}\S* could not be written \(File too large\); {what}raise the limit"):
        write(contextlib.nullcontext())
    assert isinstance(write(contextlib.suppress(WriteError)), WriteError)
    gc.collect()
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in tmp_path.rglob("*")} <= {"folder", ".unfinished.json"}
    full_disk(None)
    assert write(contextlib.nullcontext()) is None
    np.testing.assert_array_equal(read_all(tmp_path / name, 4), images)


@pytest.mark.parametrize(("num_images", "num_labels"), [(3, 4), (9, 9), (11, 11)])
def test_no_npz_of_fewer_samples_or_other_labels_appears(tmp_path, num_images, num_labels):
    images = np.resize(IMAGES, (num_images, *IMAGES.shape[1:]))
    labels = np.zeros(num_labels, np.int32)
    expected = pytest.raises(ValueError, match=r"labels of|samples were written")
    with expected, SampleWriter(tmp_path / "samples.npz", 10) as writer:
        writer.write(images, labels)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_written_anew(tmp_path):
    write_samples(tmp_path / "folder")
    write_samples(tmp_path / "folder", IMAGES[:3])
    assert len(list((tmp_path / "folder").iterdir())) == 3


def test_what_is_no_samples_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "float.npz", IMAGES / 255)
    np.savez(tmp_path / "flat.npz", IMAGES[..., 0])
    (tmp_path / "text.npz").write_text("no zip")
    content = write_samples(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty").mkdir()
    write(tmp_path / "mixed" / "0.png", IMAGES[0])
    write(tmp_path / "mixed" / "1.png", IMAGES[0][:4])
    (tmp_path / "cmyk").mkdir()
    Image.fromarray(IMAGES[0]).convert("CMYK").save(tmp_path / "cmyk" / "0.jpg")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "float.npy", IMAGES / 255)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_text("no image")
    for name, message in {
        "none.npz": "neither a file nor a folder",
        "float.npz": "holds float64 images; .*uint8",
        "flat.npz": r"shape \(10, 6, 5\)",
        "text.npz": "not a whole npz",
        "cut.npz": "not a whole npz",
        "empty": "holds no images",
        "mixed": "0.png is 6x5 but 1.png is 4x5",
        "cmyk": "0.jpg has the pixels CMYK",
        "cut.npy": "not a whole .npy",
        "float.npy": "holds float64 images; .*uint8",
        "broken": "0.png is not a readable image",
    }.items():
        with pytest.raises(UserError, match=f"--samples={tmp_path / name}.*{message}"):
            open_samples(tmp_path / name)


def test_folders_are_read_at_any_depth_but_not_what_systems_put_there(tmp_path, capfd):
    for i, image in enumerate(IMAGES):
        write(tmp_path / "edm" / f"{i // 4:06d}" / f"{i:06d}.png", image)
    write(tmp_path / "edm" / ".thumbnails" / "0.png", IMAGES[0][:2])
    for name in ("0.jpg", "1.jpg"):
        write(tmp_path / "edm" / "000000" / "@eaDir" / name, IMAGES[0][:3])
    (tmp_path / "edm" / "000000" / "back").symlink_to(tmp_path / "edm")
    np.testing.assert_array_equal(read_all(tmp_path / "edm", 4), IMAGES)
    assert re.search(
        r"edm: left out 3 system files \((.thumbnails/, @eaDir/|@eaDir/, .thumbnails/)\)", capfd.readouterr().err
    )
    write(tmp_path / "edm" / "grid.png", np.concatenate(IMAGES[:2]))
    with pytest.raises(UserError, match=r"000000/000000.png is 6x5 but grid.png is 12x5"):
        open_samples(tmp_path / "edm")


def test_every_lossless_format_that_pytorch_fid_reads_counts(tmp_path):
    for i, suffix in enumerate(("png", "bmp", "tif", "tiff", "ppm")):
        write(tmp_path / "images" / f"{i}.{suffix}", IMAGES[i])
    np.testing.assert_array_equal(read_all(tmp_path / "images", 4), IMAGES[:5])


def test_npy_files_are_read_as_they_are(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    np.testing.assert_array_equal(read_all(tmp_path / "images.npy", 4), IMAGES)


def test_alpha_is_left_out_with_a_warning_and_mixed_grey_is_rgb(tmp_path, capsys):
    rgba = noise(1, 4, 4, 4)
    write(tmp_path / "alpha" / "0.png", rgba)
    write(tmp_path / "alpha" / "1.png", rgba[..., :3])
    write(tmp_path / "alpha" / "2.png", rgba[..., 0])
    grey = np.repeat(rgba[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(read_all(tmp_path / "alpha", 2), [rgba[..., :3], rgba[..., :3], grey])
    assert "1 of 3 images have an alpha channel, which is left out" in capsys.readouterr().err


def test_content_is_identified_wherever_it_is(tmp_path):
    for name in ("a", "b"):
        for i, image in enumerate(IMAGES[:3]):
            write(tmp_path / name / f"{i}.png", image)
    assert content_sha256(tmp_path / "a") == content_sha256(tmp_path / "b")
    before = content_sha256(tmp_path / "b")
    (tmp_path / "b" / "2.png").rename(tmp_path / "b" / "3.png")
    assert content_sha256(tmp_path / "b") != before
    write(tmp_path / "a" / "2.png", IMAGES[5])
    assert content_sha256(tmp_path / "a") != before


def test_the_array_of_images_is_found_by_what_it_is(tmp_path):
    np.savez(tmp_path / "labels_first.npz", labels=LABELS, samples=IMAGES)
    np.testing.assert_array_equal(read_all(tmp_path / "labels_first.npz", 4), IMAGES)
    np.savez(tmp_path / "two.npz", a=IMAGES, b=IMAGES)
    np.savez(tmp_path / "none.npz", labels=LABELS, other=IMAGES / 255)
    np.savez(tmp_path / "many.npz", **{f"array{number}": LABELS for number in range(100)})
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(IMAGES))
    for name, message in {
        "two.npz": r"holds 2 arrays that may be uint8 images \(a uint8 \(10, 6, 5, 3\), b uint8 .*arr_0",
        "none.npz": r"holds no arrays that may be uint8 images \(labels int32 \(10,\), other float64",
        "many.npz": r"holds no arrays that may be uint8 images \(array0 int32 .{1,200}\); save the images",
        "fortran.npz": "in Fortran order.*ascontiguousarray",
    }.items():
        with pytest.raises(UserError, match=f"--samples={tmp_path / name} .*{message}"):
            open_samples(tmp_path / name)


def test_images_that_use_little_of_their_range_are_remarked_on(tmp_path, capfd):
    np.savez(tmp_path / "dark.npz", IMAGES // 128)
    assert read_all(tmp_path / "dark.npz", 4).max() == 1
    assert "were they in [0, 1]" in capfd.readouterr().err
    for name, message in (("black.npz", "all values of all images are 0"), ("dim.npz", "values are 0 to 15 of 0")):
        np.savez(tmp_path / name, IMAGES // 16 * (name == "dim.npz"))
        read_all(tmp_path / name, 4)
        assert message in capfd.readouterr().err
    read_all(write_samples(tmp_path / "good.npz"), 4)
    assert capfd.readouterr().err == ""


def test_the_first_samples_alone(tmp_path):
    samples = open_samples(write_samples(tmp_path / "samples.npz")).first(7)
    assert samples.num_samples == 7
    assert [len(batch) for batch in samples.read(4)] == [4, 3]
    np.testing.assert_array_equal(np.concatenate(list(samples.read(3))), IMAGES[:7])


def test_a_bomb_is_one_line(tmp_path):
    Image.new("1", (40_000, 30_000)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"0.png is not a readable image \(1,200 megapixels are above"):
        open_samples(tmp_path)


def test_an_image_that_is_cut_short_is_named_when_it_is_read(tmp_path):
    write_samples(tmp_path / "folder")
    path = tmp_path / "folder" / "000007.png"
    Image.fromarray(noise(2, 6, 5, 3)).save(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"000007\.png is not a readable image"):
        list(open_samples(tmp_path / "folder").read(4))


def test_nothing_but_earlier_samples_is_removed(tmp_path):
    write_samples(tmp_path / "folder")
    (tmp_path / "folder" / "Thumbs.db").touch()  # no reason to refuse the folder
    write_samples(tmp_path / "folder", IMAGES[:3])
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == [
        *(f"00000{i}.png" for i in range(3)),
        "Thumbs.db",
    ]
    write(tmp_path / "home" / "holiday.png", IMAGES[0])
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "nested" / "000000.png").mkdir(parents=True)
    (tmp_path / "nested" / "000000.png" / "mine.txt").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "000001.png").symlink_to(tmp_path / "file")
    messages = {"home": "holds holiday.png", "file": "is a file", "folder.npz": "is a folder"}
    messages |= {"nested": "holds 000000.png, which is no sample", "linked": "holds 000001.png, which is no sample"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=f"--save_samples={tmp_path / name} {message}"):
            SampleWriter(tmp_path / name, 3)
    assert (tmp_path / "home" / "holiday.png").exists()
