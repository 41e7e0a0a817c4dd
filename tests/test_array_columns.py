"""npz:FILE and arrays in Python of any shape and format: floats, files that are mapped, and their samples."""

import json
import tracemalloc

import numpy as np
import pytest

import sample
import train_flow
from utils.base.messages import UserError, warn_once
from utils.data import summaries
from utils.data.columns import column_dataset
from utils.data.dataset import SPLITS, ArraySource, DataOptions, array_dataset, split_rows
from utils.data.loaders import load_dataset
from utils.images.pixels import UINT8, PixelFormat
from utils.images.samples import SampleWriter, open_samples
from utils.training.configure import make_config

rng = np.random.default_rng(0)
FIELDS = rng.normal(20, 3, (200, 6, 10, 4)).astype(np.float32)  # a temperature, say
BYTES = rng.integers(0, 256, (200, 6, 10, 4), np.uint8)
LABELS = np.arange(200) % 3


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """Gives each test a cache of its own, and all warnings."""
    warn_once.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(tmp_path, **arrays):
    np.savez(tmp_path / "set.npz", **arrays)
    return f"npz:{tmp_path / 'set.npz'}"


def images_of(dataset):
    return np.stack([dataset.row(i, False)["image"] for i in range(len(dataset.source))])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [0, 1, 4])
def test_floats_have_the_range_of_the_training_split(tmp_path, dtype, channels):
    images = FIELDS[..., :channels].astype(dtype) if channels else FIELDS[..., 0].astype(dtype)
    name = write(tmp_path, images=images, labels=LABELS)
    train, validation = (load_dataset(name, split) for split in SPLITS)
    expected = images.reshape(200, 6, 10, -1).astype(np.float32)
    for split, dataset in zip(SPLITS, (train, validation), strict=True):
        rows = split_rows(200, split)
        np.testing.assert_array_equal(images_of(dataset), expected[rows])
        assert [dataset.row(i, False)["condition"] for i in range(len(rows))] == LABELS[rows].tolist()
    of_train = expected[split_rows(200, "train")]
    assert train.pixels == validation.pixels == PixelFormat("float32", float(of_train.min()), float(of_train.max()))
    assert train.image_shape == (6, 10, channels or 1)


def test_the_range_is_that_of_training_and_a_given_one_goes_first(tmp_path, capfd):
    train, validation = FIELDS[:150], 100 + FIELDS[150:]
    name = write(tmp_path, images=train, validation_images=validation)
    found = load_dataset(name, "validation")
    assert (found.pixels.low, found.pixels.high) == (train.min(), train.max())
    capfd.readouterr()
    assert load_dataset(name, "train", DataOptions(value_range=(20.0, 25.5))).pixels == PixelFormat("float32", 20, 25.5)
    assert "but their format is float32 in 20 .. 25.5, to which samples are clipped; give --value_range=" in (
        capfd.readouterr().err
    )


@pytest.mark.parametrize("shape", [(200, 6, 10), (200, 6, 10, 2), (200, 6, 10, 7)])
def test_bytes_may_have_any_number_of_channels(tmp_path, shape):
    images = np.resize(BYTES, shape)
    dataset = load_dataset(write(tmp_path, images=images, labels=LABELS))
    assert (dataset.pixels, dataset.image_shape) == (UINT8, (*shape, 1)[1:4])
    np.testing.assert_array_equal(images_of(dataset), images.reshape(*shape[:3], -1)[split_rows(200, "train")])


def test_images_and_labels_are_the_same_data_however_they_are_read(tmp_path):
    rows = split_rows(200, "train")
    expected = ArraySource(BYTES[rows], LABELS[rows].astype(np.int32)).fingerprint()
    assert load_dataset(write(tmp_path, images=BYTES, labels=LABELS)).fingerprint == expected
    np.save(tmp_path / "set.images.npy", BYTES)
    assert load_dataset(write(tmp_path, labels=LABELS)).fingerprint == expected
    assert column_dataset("mine", {"images": BYTES, "labels": LABELS}).fingerprint == expected
    assert array_dataset("mine", BYTES[rows], LABELS[rows]).fingerprint == expected


# --- Files that are mapped ---


def test_a_file_beside_an_npz_and_one_by_itself_are_mapped(tmp_path, monkeypatch):
    np.save(tmp_path / "set.images.npy", FIELDS)
    np.save(tmp_path / "set.validation_images.npy", FIELDS[:9])
    name = write(tmp_path, labels=LABELS, validation_labels=LABELS[:9], class_names=["a", "b", "c"])
    train, validation = (load_dataset(name, split) for split in SPLITS)
    assert all(isinstance(dataset.source.arrays["image"], np.memmap) for dataset in (train, validation))
    np.testing.assert_array_equal(images_of(validation), FIELDS[:9])
    assert (len(train.source), train.class_names) == (200, ("a", "b", "c"))
    alone = load_dataset(f"npz:{tmp_path / 'set.images.npy'}")
    assert (alone.class_names, len(alone.source)) == (("0",), 196)

    # What was found is kept, until the file changes.
    with monkeypatch.context() as patch:
        patch.setattr(summaries, "_look", lambda *args: pytest.fail("looked again"))
        assert load_dataset(name).fingerprint == train.fingerprint
    np.save(tmp_path / "set.images.npy", FIELDS + 1)
    changed = load_dataset(name)
    assert changed.fingerprint != train.fingerprint
    assert changed.pixels.low == (FIELDS + 1).min()


def test_a_mapped_file_is_not_read_into_memory(tmp_path):
    shape = (4096, 64, 64, 1)  # 64 MiB, of which the disk holds two pages
    array = np.lib.format.open_memmap(tmp_path / "set.npy", "w+", np.float32, shape)
    array[3, 2, 1] = 5
    array.flush()
    tracemalloc.start()
    try:
        dataset = load_dataset(f"npz:{tmp_path / 'set.npy'}")
        dataset.row(0, True)
        assert tracemalloc.get_traced_memory()[1] < 2.5 * summaries.CHUNK_BYTES
    finally:
        tracemalloc.stop()
    assert dataset.pixels == PixelFormat("float32", 0.0, 5.0)


# --- Refusals ---

BAD = FIELDS.copy()
BAD[3, 2, 1] = np.nan
BAD[7, 0, 0, 0] = np.inf
WIDE = FIELDS.astype(np.float64)
WIDE[0, 0, 0, 0] = 1e300
REFUSED = {
    "not finite": ({"images": BAD}, "5 values are NaN or infinite in images, the first in row 3; mend them"),
    "constant": ({"images": 0 * FIELDS}, "all values of all images are 0; give images that differ"),
    "beyond float32": ({"images": WIDE}, "beyond what float32 can hold; rescale them"),
    "half of the splits": ({"images": FIELDS, "validation_images": BYTES}, "of one kind in both splits, not .* uint8"),
    "complex": ({"images": FIELDS.astype(complex)}, r"must be uint8, float16 or float32 .* not complex128"),
    "truth": ({"images": FIELDS > 20}, r"not bool .*; convert them with images.astype\(numpy.float32\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_images_are_refused(tmp_path, case):
    arrays, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        load_dataset(write(tmp_path, **arrays))


def test_other_files_are_refused(tmp_path):
    name = write(tmp_path, images=FIELDS, labels=LABELS)
    np.save(tmp_path / "set.images.npy", FIELDS)
    with pytest.raises(UserError, match=r"there are images in set.npz and in set.images.npy; remove one of the two"):
        load_dataset(name)
    np.save(tmp_path / "set.images.npy", np.asfortranarray(FIELDS))
    with pytest.raises(UserError, match=r"set.images.npy is in Fortran order, last axis first; save numpy.ascont"):
        load_dataset(write(tmp_path, labels=LABELS))
    (tmp_path / "set.images.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"set.images.npy cannot be read \(.*\); write it with numpy.save"):
        load_dataset(name)
    with pytest.raises(UserError, match="mine: pictures is none of the columns images, labels"):
        column_dataset("mine", {"images": FIELDS, "pictures": FIELDS})


@pytest.mark.parametrize("text", ["1,0", "1", "0,1,2", "nan,1", "0,inf", "a,b"])
def test_a_range_is_of_two_numbers(text):
    with pytest.raises(UserError, match=f"--value_range={text}: give LOW,HIGH, two numbers, the lower one first"):
        _ = make_config({"dataset_name": "npz:x.npz", "value_range": text}).data.options


def test_a_range_without_floats_is_refused(tmp_path):
    with pytest.raises(UserError, match="--value_range=0,1 has no effect on digits, only on npz:FILE"):
        make_config({"dataset_name": "digits", "value_range": "0,1", "save_dir": str(tmp_path / "run")})


def test_channels_that_come_first_are_pointed_at(tmp_path, capfd):
    load_dataset(write(tmp_path, images=np.moveaxis(np.resize(BYTES, (20, 32, 32, 3)), -1, 1)))
    assert "images are 3x32 with 32 channels; if their channels come first, save images.transpose" in (
        capfd.readouterr().err
    )


# --- From arrays to arrays ---

TRAIN = """--codec pixels --model.hidden_size 16 --model.depth 1 --model.num_heads 1 --model.patch_size 2
    --model.num_classes 3 --batch_size 8 --log_interval 1 --eval_interval 0 --wandb.mode disabled"""


def test_floats_are_trained_on_sampled_and_written_in_their_range(tmp_path, read_flags):
    name = write(tmp_path, images=FIELDS, labels=LABELS)
    run = str(tmp_path / "run")
    words = ["--dataset_name", name, *TRAIN.split(), "--save_dir", run]
    train_flow.main(read_flags(train_flow, [*words, "--max_steps", "1"]))
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    of_train = FIELDS[split_rows(200, "train")]
    pixels = PixelFormat.from_record(record["dataset"])
    assert pixels == PixelFormat("float32", float(of_train.min()), float(of_train.max()))

    # Floats in a file that can be trained on.
    path = tmp_path / "samples.npz"
    line = f"--load_dir {run} --num_samples 6 --classes 0,2 --denoise_timesteps 1 --cfg_scale 1 --out {tmp_path}"
    sample.main(read_flags(sample, [*line.split(), "--save_samples", str(path)]))
    again = np.load(path)
    assert again["arr_0"].dtype == np.float32
    assert again["arr_1"].tolist() == [0, 2, 0, 2, 0, 2]
    assert again["arr_0"].min() >= pixels.low
    assert again["arr_0"].max() <= pixels.high
    parts = [load_dataset(f"npz:{path}", split, DataOptions(value_range=(pixels.low, pixels.high))) for split in SPLITS]
    assert {image.tobytes() for part in parts for image in images_of(part)} == {
        image.tobytes() for image in again["arr_0"]
    }

    # Not as PNGs, nor for FID.
    with pytest.raises(UserError, match=r"--save_samples=.*: PNGs hold uint8 images .* with 4; name a file .npz, wh"):
        sample.main(read_flags(sample, [*line.split(), "--save_samples", str(tmp_path / "pngs")]))
    with pytest.raises(UserError, match="holds float32 images; FID is of uint8 pixels"):
        open_samples(path)

    # A run that starts from this one sees the same numbers as the same inputs.
    other = write(tmp_path, images=FIELDS / 2, labels=LABELS)
    given = {"dataset_name": other, "load_dir": run, "save_dir": str(tmp_path / "second")}
    assert make_config(given).data.options.value_range == (pixels.low, pixels.high)
    assert make_config({**given, "value_range": "0,50"}).data.options.value_range == (0, 50)


def test_pngs_of_floats_are_refused_in_python(tmp_path):
    with (
        pytest.raises(UserError, match=r"pngs: PNGs hold uint8 images of 1 or 3 channels, .* float32 with 4; name an"),
        SampleWriter(tmp_path / "pngs", 2) as writer,
    ):
        writer.write(FIELDS[:2], LABELS[:2])


def test_a_range_of_bytes_is_refused(tmp_path, read_flags):
    words = ["--dataset_name", write(tmp_path, images=BYTES, labels=LABELS), "--value_range", "-1,1", *TRAIN.split()]
    with pytest.raises(UserError, match=r"--value_range=-1,1: the images are uint8, of 0 .. 255; leave it out"):
        train_flow.main(read_flags(train_flow, [*words, "--save_dir", str(tmp_path / "run")]))
