"""CelebA-HQ prepared from parquet files and from folders: every image once, unchanged where it fits, and read back."""

import fnmatch
import io
import os
import pickle
import sys
import time
import unittest

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from PIL import Image

tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")

from data import celebahq256
from data.celebahq256 import Celebahq256, fit
from tests.conftest import run_program
from tests.data_sets import load
from utils.base.messages import UserError

pytestmark = pytest.mark.xdist_group("celebahq256")  # one worker imports TensorFlow, not both

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema([("image", IMAGE), ("label", pa.int64())])


def noise(seed: int, height: int = 256, width: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def write(path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_parquet(path, rows: list[tuple[bytes | None, int]], **options) -> None:
    """Rows (encoded image, label) as Hugging Face's `datasets` writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [{"bytes": data, "path": "1.jpg"} for data, _ in rows], "label": [label for _, label in rows]}
    pq.write_table(pa.table(columns, SCHEMA), path, **options)


def write_small_set(folder) -> dict[str, list[tuple[bytes, int]]]:
    """Seven images in the hub's layout, two files of them for training, in several row groups."""
    rows = [(encoded(noise(i), "JPEG" if i % 2 else "PNG"), i % 2) for i in range(7)]
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", rows[:3], row_group_size=2)
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", rows[3:5])
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", rows[5:])
    return {"train": rows[:5], "validation": rows[5:]}


def prepare(source, data_dir, file_format: str = "array_record") -> Celebahq256:
    builder = Celebahq256(source=source, data_dir=data_dir)
    builder.download_and_prepare(file_format=file_format)
    return builder


def stored(builder: Celebahq256, split: str) -> list[tuple[bytes, int]]:
    """(encoded image, label) of every example, in the order of the files."""
    skip = {"image": tfds.decode.SkipDecoding()}
    if builder.info.file_format.value == "array_record":
        examples = builder.as_data_source(split, decoders=skip)
    else:
        examples = tfds.as_numpy(builder.as_dataset(split=split, decoders=skip))
    return [(bytes(example["image"]), int(example["label"])) for example in examples]


def examples(data_dir, split: str) -> list[tuple[np.ndarray, int]]:
    """(pixels, label) of every example, as training reads them."""
    dataset = load("celebahq256", split, data_dir=data_dir)
    assert dataset.class_names == ("female", "male")
    assert dataset.image_shape == (256, 256, 3)
    return [(dataset.source[i]["image"], int(dataset.source[i]["label"])) for i in range(len(dataset.source))]


def contents(data_dir, split: str) -> set[tuple[bytes, int]]:
    return {(pixels.tobytes(), label) for pixels, label in examples(data_dir, split)}


# Parquet


def test_passes_the_test_case_of_tfds(tmp_path, monkeypatch):
    try:
        import dill  # noqa: F401 (TFDS imports it here, and uses it for tests of features alone)
    except ImportError:
        monkeypatch.setitem(sys.modules, "dill", pickle)
    write_small_set(tmp_path)

    class BuilderTest(tfds.testing.DatasetBuilderTestCase):
        DATASET_CLASS = Celebahq256
        SPLITS = {"train": 5, "validation": 2}  # noqa: RUF012 (so TFDS asks for it)
        EXAMPLE_DIR = tmp_path

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(BuilderTest).run(result)
    assert not result.errors + result.failures, result.errors + result.failures
    assert result.testsRun - len(result.skipped) >= 4


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_the_real_sample_is_stored_byte_for_byte(shared, tmp_path, file_format):
    folder = shared / "data" / "celebahq_sample"
    builder = prepare(folder, tmp_path, file_format)
    for split, count in [("train", 240), ("validation", 60)]:
        rows = pq.read_table(folder / f"{split}-00000-of-00001.parquet").to_pylist()
        expected = [(row["image"]["bytes"], row["label"]) for row in rows]
        found = stored(builder, split)
        assert len(found) == count
        assert sorted(found) == sorted(expected)
        assert found != expected  # TFDS shuffles
        if file_format == "array_record":
            assert contents(tmp_path, split) == {(decoded(data).tobytes(), label) for data, label in expected}


def test_the_order_is_the_same_each_time(tmp_path):
    write_small_set(tmp_path / "source")
    first, second = (prepare(tmp_path / "source", tmp_path / name) for name in "ab")
    for split in ("train", "validation"):
        assert stored(first, split) == stored(second, split)


def test_parquet_that_says_it_holds_far_more_is_refused(tmp_path):
    (tmp_path / "rows").mkdir()
    rows = pa.table({"image": pa.nulls(10**6 + 1, IMAGE), "label": pa.nulls(10**6 + 1, pa.int64())})
    pq.write_table(rows, tmp_path / "rows" / "train.parquet")
    (tmp_path / "bytes").mkdir()
    zeros = pa.array([{"bytes": bytes(2**20), "path": ""}] * 100, IMAGE)
    table = pa.table({"image": zeros, "label": pa.array([0] * 100)})
    pq.write_table(table, tmp_path / "bytes" / "train.parquet", use_dictionary=False, compression="zstd")
    for name in ("rows", "bytes"):
        with pytest.raises(UserError, match=r"train\.parquet is no readable parquet file \(it says that it holds"):
            celebahq256.open_source(str(tmp_path / name))


def test_parquet_without_a_validation_file_has_images_held_out(tmp_path):
    rows = [(encoded(np.full((256, 256, 3), i, np.uint8)), i % 2) for i in range(30)]
    write_parquet(tmp_path / "train.parquet", rows)
    builder = prepare(tmp_path, tmp_path / "out")
    train, validation = stored(builder, "train"), stored(builder, "validation")
    assert (len(train), len(validation)) == (28, 2)
    assert sorted(train + validation) == sorted(rows)


def test_the_manual_folder_is_the_source_where_none_is_given(tmp_path):
    rows = write_small_set(tmp_path / "downloads" / "manual" / "celebahq256")
    assert sorted(stored(prepare(None, tmp_path), "train")) == sorted(rows["train"])


def test_fetches_from_the_hub_what_it_reads(tmp_path, monkeypatch):
    rows, asked = write_small_set(tmp_path / "snapshot"), {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    builder = prepare("owner/faces", tmp_path)
    assert sorted(stored(builder, "validation")) == sorted(rows["validation"])
    assert (asked["repo_id"], asked["repo_type"]) == ("owner/faces", "dataset")
    on_hub = ["data/train-00000-of-00006.parquet", "validation-00000-of-00001.parquet", "data/test-0.parquet", "a.zip"]
    fetched = [path for path in on_hub if any(fnmatch.fnmatch(path, p) for p in asked["allow_patterns"])]
    assert fetched == on_hub[:2]


# Folders


def resize_by_formula(image: np.ndarray) -> np.ndarray:
    """The middle square at 256x256: the triangle filter, widened to the pixels of the larger grid, in float64."""
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    scale = side / 256
    centres, pixels = (np.arange(256) + 0.5) * scale, np.arange(side) + 0.5
    weights = np.maximum(0, 1 - np.abs(pixels - centres[:, None]) / max(scale, 1))
    weights /= weights.sum(axis=1, keepdims=True)
    square = image[top : top + side, left : left + side].astype(np.float64)
    return np.einsum("yi,xj,ijc->yxc", weights, weights, square, optimize=True)


def test_a_folder_of_odd_sizes_is_cropped_resized_labelled_and_held_out(tmp_path):
    shapes = [(256, 256), (300, 280), (280, 300), (512, 512), (100, 90), (257, 256)]
    images = [noise(i, *shapes[i % len(shapes)]) for i in range(14)]
    for i, pixels in enumerate(images):
        folder, kind = ("female", "png") if i % 3 else ("male", "WEBP")
        options = {} if kind == "png" else {"lossless": True}
        write(tmp_path / "source" / folder / f"{i}.{kind}", encoded(pixels, kind.upper(), **options))
    write(tmp_path / "source" / "male" / "notes.txt", b"no image")
    write(tmp_path / "source" / "male" / "._1.png", b"no image")
    prepare(tmp_path / "source", tmp_path)
    train, validation = examples(tmp_path, "train"), examples(tmp_path, "validation")
    assert (len(train), len(validation)) == (13, 1)
    remaining = train + validation
    for i, pixels in enumerate(images):
        errors = [np.abs(found - resize_by_formula(pixels)).max() for found, _ in remaining]
        assert min(errors) < 1.01  # two passes, each rounded to a level
        assert remaining.pop(int(np.argmin(errors)))[1] == int(i % 3 == 0)


def write_flat(folder, numbers) -> None:
    for i in numbers:
        write(folder / f"{i:05}.png", encoded(np.full((256, 256, 3), i, np.uint8)))


def levels(builder: Celebahq256, split: str) -> list[int]:
    return sorted(int(decoded(data)[0, 0, 0]) for data, _ in stored(builder, split))


def test_a_flat_folder_has_no_labels_and_holds_out_by_name(tmp_path, capsys):
    write_flat(tmp_path / "flat", range(45))
    builder = prepare(tmp_path / "flat", tmp_path / "out")
    lines = [line for line in capsys.readouterr().out.splitlines() if "labels are unknown" in line]
    assert len(lines) == 1
    assert str(tmp_path / "flat") in lines[0]
    assert {label for split in ("train", "validation") for _, label in stored(builder, split)} == {0}
    assert len(levels(builder, "validation")) == 3
    assert sorted(levels(builder, "train") + levels(builder, "validation")) == list(range(45))

    write_flat(tmp_path / "classes" / "Male", range(0, 45, 2))
    write_flat(tmp_path / "classes" / "Female", range(1, 45, 2))
    elsewhere = prepare(tmp_path / "classes", tmp_path / "out2")
    assert levels(elsewhere, "validation") == levels(builder, "validation")


@pytest.mark.parametrize("name", ["validation", "val"])
def test_folders_of_splits_are_the_splits(tmp_path, name):
    write_flat(tmp_path / "source" / "train" / "male", range(4))
    write_flat(tmp_path / "source" / name / "female", range(4, 6))
    write_flat(tmp_path / "source" / "train" / "@eaDir", range(6, 8))  # thumbnails of a file server
    builder = prepare(tmp_path / "source", tmp_path)
    assert [levels(builder, split) for split in ("train", "validation")] == [[0, 1, 2, 3], [4, 5]]
    assert [stored(builder, split)[0][1] for split in ("train", "validation")] == [1, 0]


def test_only_what_does_not_fit_is_encoded_anew():
    pixels = noise(0)
    for kind in ("PNG", "JPEG"):
        data = encoded(pixels, kind)
        assert fit(data, "x") is data

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    half_clear = np.dstack([pixels, np.full((256, 256), 255, np.uint8)])
    half_clear[128:, :, 3] = 0
    on_white = np.where(half_clear[..., 3:] == 0, 255, pixels)
    changed = [
        (encoded(pixels, "WEBP", lossless=True), pixels),
        (encoded(pixels[..., 0]), np.repeat(pixels[..., :1], 3, axis=2)),
        (encoded(pixels, exif=exif), np.rot90(pixels, -1)),
        (encoded(half_clear), on_white),
        (encoded(np.zeros_like(pixels), transparency=(0, 0, 0)), np.full_like(pixels, 255)),
    ]
    for data, expected in changed:
        found = fit(data, "x")
        assert found.startswith(b"\x89PNG")
        np.testing.assert_array_equal(decoded(found), expected)


# The program


# Not None in sys.modules, in which TFDS looks whether TensorFlow is loaded.
NO_TENSORFLOW = """
import runpy, sys
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name == "tensorflow" else find_spec(name, *args)
from tensorflow_datasets.core import shuffle
shuffle.MAX_MEM_BUFFER_SIZE = 0  # as if the set were of gigabytes
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_program_needs_no_tensorflow(tmp_path):
    rows = write_small_set(tmp_path / "source")
    words = ["-c", NO_TENSORFLOW, "data/celebahq256.py", "--source", tmp_path / "source", "--data_dir"]
    done = run_program(*words, tmp_path)
    last = done.stdout.splitlines()[-1]
    assert f"python train_flow.py --dataset_name celebahq256 --data_dir {tmp_path}" in last
    assert "array_record, 5 train, 2 validation" in last
    for split in ("train", "validation"):
        assert contents(tmp_path, split) == {(decoded(data).tobytes(), label) for data, label in rows[split]}

    done = run_program(*words, tmp_path / "other", "--file_format", "tfrecord", check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --file_format=tfrecord needs TensorFlow")


def test_the_program_says_when_there_is_nothing_to_do(tmp_path, monkeypatch, capsys):
    write_small_set(tmp_path / "source")
    left = tmp_path / "celebahq256" / "incomplete.ABC_1.0.0"
    for folder in (left, left.with_name("incomplete.DEF_1.0.0")):
        write(folder / "part", b"x")
    old = time.time() - 2 * 24 * 3600
    os.utime(left / "part", (old, old))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for source, words in (
        ("source", "prepared: {}/celebahq256/1.0.0 (array_record"),
        ("source", "prepared already: {}/celebahq256/1.0.0; train on it"),
        ("other", "prepared already: {0}/celebahq256/1.0.0, from {0}/source, which was not compared with --source="),
        ("damaged", "prepared already: {}/celebahq256/1.0.0, from an unknown source, which was not compared with"),
    ):
        if source == "damaged":
            (tmp_path / "celebahq256" / "1.0.0" / celebahq256.SOURCE_FILE).write_bytes(b"{\0")
        celebahq256.main(
            ConfigDict({"source": str(tmp_path / source), "data_dir": None, "file_format": "array_record"})
        )
        output = capsys.readouterr().out.splitlines()[-1]
        assert output.startswith(words.format(tmp_path))
        assert f"--dataset_name celebahq256 --data_dir {tmp_path}" in output
    left_now = sorted(path.name for path in (tmp_path / "celebahq256").iterdir())
    assert left_now == ["1.0.0", "incomplete.DEF_1.0.0"]  # that of a day ago is gone, that of now may be in use


def one_image(folder):
    write(folder / "1.png", encoded(noise(0)))


def broken_file(folder):
    write_flat(folder / "train" / "male", range(3))
    write(folder / "train" / "male" / "00001.png", encoded(noise(0))[:1000])
    write_flat(folder / "validation" / "male", range(2))


def broken_row(folder):
    write_small_set(folder)
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", [(encoded(noise(0)), 0), (None, 1)])


def other_label(folder):
    write_parquet(folder / "train.parquet", [(encoded(noise(0)), 0), (encoded(noise(1)), 2)])


def other_columns(folder):
    folder.mkdir()
    pq.write_table(pa.table({"image": [b"x"], "age": [3]}), folder / "train.parquet")


def half_a_file(folder):
    write_small_set(folder)
    file = folder / "data" / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-100])


def damaged_pages(folder):
    write_parquet(folder / "train.parquet", [(encoded(noise(i)), 0) for i in range(3)])
    data = bytearray((folder / "train.parquet").read_bytes())
    data[4:60] = bytes(56)
    (folder / "train.parquet").write_bytes(data)


def a_file_missing(folder):
    write_small_set(folder)
    (folder / "data" / "train-00000-of-00002.parquet").unlink()


def no_training_file(folder):
    write_small_set(folder)
    for file in (folder / "data").glob("train*"):
        file.unlink()


def strangers(folder):
    write_flat(folder / "female", range(2))
    write_flat(folder / "cats", range(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "there is no such folder; .*hub id such as korexyz/celeba-hq-256x256"),
        (lambda folder: folder.mkdir(), "holds neither parquet files nor images; expected are"),
        (one_image, "holds 1 image; 2 are needed"),
        (broken_file, "train/male/00001.png is not a readable image.*put a good copy in its place"),
        (broken_row, "row 1 of .*validation-00000-of-00001.parquet is not a readable image"),
        (other_label, "row 1 of .*train.parquet has the label 2; 0 .* and 1"),
        (other_columns, r"train.parquet has the columns image \(binary\), age \(int64\); .*label \(int64\)"),
        (half_a_file, "train-00001-of-00002.parquet is no readable parquet file .*; fetch it again"),
        (damaged_pages, "train.parquet is no readable parquet file .*; fetch it again"),
        (a_file_missing, "holds 1 of the 2 files that train-00001-of-00002.parquet is one of; fetch the others"),
        (no_training_file, "has no train split; expected are"),
        (strangers, "holds cats/00000.png, neither in female nor in male; move it away"),
    ],
)
def test_what_cannot_be_prepared_is_one_line_and_leaves_nothing(tmp_path, read_flags, make, message):
    source = tmp_path / "source"
    make(source)
    config = read_flags(celebahq256, ["--source", str(source), "--data_dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match=f"^--source={source}:? .*{message}") as error:
        celebahq256.main(config)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out" / "celebahq256").iterdir())
    with pytest.raises(UserError, match="no data set celebahq256"):
        load("celebahq256", data_dir=tmp_path / "out")


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, read_flags, monkeypatch):
    def snapshot_download(*args, **options):
        raise FileNotFoundError("Got: ConnectError: [Errno -2] Name or service not known\nAn error happened while")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config = read_flags(celebahq256, ["--source", "owner/faces", "--data_dir", str(tmp_path)])
    with pytest.raises(UserError, match=r"--source=owner/faces: .*ConnectError.*not known.*check the name") as error:
        celebahq256.main(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--source is not given: .*korexyz"),
        (["--source", ".", "--data_dir", "gs://bucket/sets"], "--data_dir=gs://bucket/sets is not on this machine"),
        (["--source", ".", "--data_dir", "{file}/x"], "--data_dir={file}/x cannot be written"),
        (["--source", ".", "--data_dir", "{tmp}", "--file_format", "tfrecord"], "as array_record; move it away"),
        (["--source", ".", "--file_format", "csv"], "--file_format=csv: .*array_record"),
    ],
)
def test_flags_that_cannot_be_are_refused(tmp_path, read_flags, words, message):
    write_small_set(tmp_path / "source")
    prepare(tmp_path / "source", tmp_path)
    (tmp_path / "file").touch()
    names = {"tmp": tmp_path, "file": tmp_path / "file"}
    with pytest.raises(UserError, match=message.format(**names)):
        celebahq256.main(read_flags(celebahq256, [word.format(**names) for word in words]))
