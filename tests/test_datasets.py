"""Every image once, in an order that its position determines; every kind of image file; errors that say the fix."""

import io
import itertools
import json
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.conftest import run_program
from utils.datasets import (
    IMAGENET_LABELS,
    ImageDataset,
    epoch_batches,
    first_examples,
    load_dataset,
    training_batches,
)
from utils.errors import UserError


def numbered(num_images: int, random_flip: bool = True) -> ImageDataset:
    """Images labelled by their number, that number left and a zero right, so that a flip shows."""
    source = [{"image": np.array([[[i], [0]]], np.uint8), "label": np.int32(i)} for i in range(1, num_images + 1)]
    names = tuple(map(str, range(num_images + 1)))
    return ImageDataset("numbered", "train", source, (1, 2, 1), names, random_flip)


def take(batches, count: int) -> list[dict[str, np.ndarray]]:
    return [next(batches) for _ in range(count)]


def labels(batches) -> list[int]:
    return [int(label) for batch in batches for label in batch["label"]]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


# Batches


def test_batches_have_the_promised_types():
    batch = next(training_batches(numbered(10), 4, 0))
    assert batch["image"].shape == (4, 1, 2, 1)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].shape == (4,)
    assert batch["label"].dtype == np.int32


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 4), (7, 7), (3, 8), (1, 2)])
def test_every_epoch_is_a_new_order_of_every_image_once(num_images, batch_size):
    num_epochs = 8
    stream = labels(take(training_batches(numbered(num_images), batch_size, 0), num_epochs * num_images // batch_size))
    epochs = [stream[i : i + num_images] for i in range(0, num_images * num_epochs, num_images)]
    assert all(sorted(epoch) == list(range(1, num_images + 1)) for epoch in epochs)
    if num_images > 5:
        assert len({tuple(epoch) for epoch in epochs}) == num_epochs


def test_orders_are_uniform():
    """Each image is equally often at each place: chi-squared within five standard deviations of its mean."""
    stream = np.reshape(labels(take(training_batches(numbered(10), 100, 0), 400)), (-1, 10)) - 1
    counts = np.array([np.bincount(place, minlength=10) for place in stream.T])
    expected = len(stream) / 10
    assert abs(((counts - expected) ** 2 / expected).sum() - 81) < 5 * np.sqrt(2 * 81)


def test_seeds_share_no_epoch():
    """Not even shifted by one, as they would if epoch e of seed s were epoch 0 of seed s + e."""
    epochs = {
        tuple(epoch)
        for seed in range(4)
        for epoch in np.reshape(labels(take(training_batches(numbered(20), 20, seed), 4)), (4, 20))
    }
    assert len(epochs) == 16


def test_the_same_seed_is_the_same_stream_on_any_number_of_threads():
    streams = [
        take(training_batches(numbered(9), 4, 5, num_threads=threads, prefetch=ahead), 20)
        for threads, ahead in [(1, 0), (3, 1), (8, 5)]
    ]
    assert_same(streams[0], streams[1])
    assert_same(streams[0], streams[2])


@pytest.mark.parametrize("num_hosts", [2, 3])
def test_hosts_share_out_each_global_batch(num_hosts):
    whole = take(training_batches(numbered(10), 6, 0), 15)
    parts = [
        take(training_batches(numbered(10), 6, 0, process_index=host, process_count=num_hosts), 15)
        for host in range(num_hosts)
    ]
    for host, part in enumerate(parts):  # flips too are those of one host alone
        rows_of_host = slice(host * 6 // num_hosts, (host + 1) * 6 // num_hosts)
        assert_same(part, [{key: rows[rows_of_host] for key, rows in batch.items()} for batch in whole])


@pytest.mark.parametrize("position", [0, 1, 7])
def test_resumes_exactly_on_any_number_of_hosts(position):
    uninterrupted = take(training_batches(numbered(10), 6, 3), position + 9)
    batches = training_batches(numbered(10), 6, 3)
    take(batches, position)
    state = json.loads(json.dumps(batches.get_state()))
    take(batches, 2)
    batches.set_state(state)  # back, in the same stream
    assert_same(take(batches, 9), uninterrupted[position:])
    host = training_batches(numbered(10), 6, 3, process_index=1, process_count=2)
    host.set_state(state)
    halves = [{key: rows[3:] for key, rows in batch.items()} for batch in uninterrupted[position:]]
    assert_same(take(host, 9), halves)


def test_flips_half_of_the_images_anew_each_epoch():
    stream = take(training_batches(numbered(200), 200, 0), 20)
    flipped = np.array([batch["image"][np.argsort(batch["label"]), 0, 0, 0] == 0 for batch in stream])
    assert abs(flipped.mean() - 0.5) < 0.04  # five standard deviations of a fair coin
    assert all(0 < share < 1 for share in flipped.mean(axis=0))
    unflipped = labels(take(training_batches(numbered(200, random_flip=False), 200, 0), 20))
    assert unflipped == labels(stream)
    assert all(batch["image"][0, 0, 0, 0] for batch in take(training_batches(numbered(9, random_flip=False), 4, 0), 9))


@pytest.mark.parametrize(("batch_size", "num_hosts"), [(4, 1), (4, 2), (6, 3), (20, 2), (5, 1), (2, 2)])
def test_an_epoch_is_every_image_once_in_order_and_in_step(batch_size, num_hosts):
    hosts = [
        list(epoch_batches(numbered(13), batch_size, process_index=host, process_count=num_hosts))
        for host in range(num_hosts)
    ]
    assert {len(batches) for batches in hosts} == {-(-13 // batch_size)}
    rows = [sorted(labels(batches)) for batches in zip(*hosts, strict=True)]
    assert list(itertools.chain.from_iterable(rows)) == list(range(1, 14))
    assert all(len(global_batch) == batch_size for global_batch in rows[:-1])
    assert all(batch["image"][:, 0, 0, 0].all() for batches in hosts for batch in batches)


def test_first_examples_are_one_batch_for_ever():
    batches = take(training_batches(first_examples(numbered(10), 4), 4, 0), 5)
    assert [sorted(labels([batch])) for batch in batches] == [[1, 2, 3, 4]] * 5
    assert all(batch["image"][:, 0, 0, 0].all() for batch in batches)
    assert len(first_examples(numbered(3), 4).source) == 3


def test_what_a_reading_thread_raises_reaches_the_consumer():
    class Broken(list):
        def __getitem__(self, index):
            raise UserError("image 3 is broken")

    dataset = ImageDataset("broken", "train", Broken([None] * 5), (1, 1, 1), ("a",), False)
    with pytest.raises(UserError, match="image 3"):
        next(training_batches(dataset, 4, 0))
    with pytest.raises(UserError, match="image 3"):
        list(epoch_batches(dataset, 4))


def test_refuses_batches_that_do_not_divide():
    with pytest.raises(UserError, match=r"--batch_size=6 .*multiple of 4"):
        training_batches(numbered(9), 6, 0, process_count=4)
    with pytest.raises(UserError, match=r"--batch_size=6 .*multiple of 4"):
        epoch_batches(numbered(9), 6, process_count=4)
    with pytest.raises(UserError, match="--batch_size=0"):
        training_batches(numbered(9), 0, 0)
    with pytest.raises(UserError, match="--seed=-1"):
        training_batches(numbered(9), 4, -1)


# Digits


def test_digits_are_the_real_ones_split_once():
    from sklearn.datasets import load_digits

    real = load_digits()
    levels = np.rint(real.images / 16 * 255).astype(np.uint8)
    expected = sorted((image.tobytes(), label) for image, label in zip(levels, real.target.tolist(), strict=True))
    splits = [load_dataset("digits", split) for split in ("train", "validation")]
    assert [len(dataset.source) for dataset in splits] == [1500, 297]
    examples = [dataset.source[i] for dataset in splits for i in range(len(dataset.source))]
    found = sorted((example["image"].tobytes(), int(example["label"])) for example in examples)
    assert found == expected  # all of them, hence none in both
    for dataset in splits:
        batch = next(epoch_batches(dataset, 2000))
        assert batch["image"].shape[1:] == dataset.image_shape == (8, 8, 1)
        assert (batch["image"].min(), batch["image"].max()) == (0, 255)
        assert np.bincount(batch["label"]).min() > 0.07 * len(batch["label"])
        assert dataset.class_names == tuple("0123456789")
        assert dataset.num_classes == 10
        assert not dataset.random_flip


# Folders


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def write_png_16_bit(path, levels: np.ndarray) -> None:
    """A PNG of 16 bits a channel, grey (h, w) or RGB (h, w, 3), by the format's specification (RFC 2083)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = levels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if levels.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def read_one(folder, path, size) -> np.ndarray:
    """The image as load_dataset reads it: the one of the training split, the other being held out or filling up."""
    (folder / "train" / "a").mkdir(parents=True, exist_ok=True)
    (folder / "validation" / "a").mkdir(parents=True, exist_ok=True)
    path.rename(folder / "train" / "a" / path.name)
    dataset = load_dataset(f"folder:{folder}", image_size=size)
    assert len(dataset.source) == 1
    image = dataset.source[0]["image"]
    assert image.shape == dataset.image_shape == (size, size, 3)
    assert image.dtype == np.uint8
    return image


def resize_by_formula(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear interpolation with the triangle filter widened to the source's pixel spacing, in float64."""

    def weights(length):
        scale = length / size
        centres, pixels = (np.arange(size) + 0.5) * scale, np.arange(length) + 0.5
        triangle = np.maximum(0, 1 - np.abs(pixels - centres[:, None]) / max(scale, 1))
        return triangle / triangle.sum(axis=1, keepdims=True)

    rows = np.tensordot(weights(image.shape[0]), image.astype(np.float64), 1)  # (y, j, c)
    return np.einsum("xj,yjc->yxc", weights(image.shape[1]), rows)


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


def make_classes(root, counts: dict[str, int]) -> None:
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write(root / name / f"{i}.png", np.full((2, 2, 3), 10 * label + i, np.uint8))


def contents(name, split) -> list[tuple[int, int]]:
    """(value of the first pixel, label) of every image."""
    batch = next(epoch_batches(load_dataset(name, split, image_size=2), 1000))
    return list(zip(batch["image"][:, 0, 0, 0].tolist(), batch["label"].tolist(), strict=True))


def test_folders_are_classes_and_a_part_is_held_out(tmp_path):
    make_classes(tmp_path, {"cat": 9, "dog": 8, "Zebra": 7})
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".hidden.png").write_text("no image")
    (tmp_path / ".cache").mkdir()
    name = f"folder:{tmp_path}"
    train, validation = contents(name, "train"), contents(name, "validation")
    dataset = load_dataset(name)
    assert dataset.class_names == ("Zebra", "cat", "dog")
    assert dataset.image_shape == (256, 256, 3)
    assert dataset.random_flip
    assert not load_dataset(name, "validation").random_flip
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


def test_a_flat_folder_is_one_class(tmp_path):
    for i in range(5):
        write(tmp_path / "faces" / f"{i}.png", np.full((2, 2, 3), i, np.uint8))
    name = f"folder:{tmp_path / 'faces'}"
    assert load_dataset(name).class_names == ("faces",)
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
        load_dataset(name, "validation")


def test_a_class_may_be_called_train(tmp_path):
    make_classes(tmp_path, {"bus": 3, "train": 3})
    assert load_dataset(f"folder:{tmp_path}").class_names == ("bus", "train")


def test_folders_without_images_are_refused(tmp_path):
    make_classes(tmp_path / "one_empty", {"a": 2})
    (tmp_path / "one_empty" / "b").mkdir()
    (tmp_path / "empty").mkdir()
    make_classes(tmp_path / "single", {"a": 1})
    make_classes(tmp_path / "mixed", {"a": 2})
    write(tmp_path / "mixed" / "stray.png", noise(0, 2, 2, 3))
    for folder, message in [
        ("missing", "no folder .*missing/CLASS/IMAGE"),
        ("empty", "holds no images; .*empty/CLASS/IMAGE"),
        ("one_empty", "one_empty/b of a class holds no images"),
        ("single", "holds 1 image"),
        ("mixed", "stray.png beside folders"),
    ]:
        with pytest.raises(UserError, match=f"--dataset_name=folder:.*{message}"):
            load_dataset(f"folder:{tmp_path / folder}")


def test_a_broken_image_is_named_when_it_is_read(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(noise(0, 64, 64, 3)).save(buffer, "JPEG")
    for name, data in [("truncated.jpg", buffer.getvalue()[:700]), ("text.png", b"no image"), ("empty.webp", b"")]:
        folder = tmp_path / name.split(".")[0] / "train"
        folder.mkdir(parents=True)
        (folder.parent / "validation").mkdir()
        (folder / name).write_bytes(data)
        dataset = load_dataset(f"folder:{folder.parent}")
        with pytest.raises(UserError, match=f"{name} is not a readable image"):
            next(training_batches(dataset, 2, 0))


# Names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imgenet256", "did you mean imagenet256?"),
        ("celebahq", "did you mean celebahq256?"),
        ("my_imagenet256_copy", "folder:PATH, tfds:NAME"),  # not by part of a name
        ("folder:", "folder:PATH"),
        ("s3:bucket", "folder:PATH"),
        ("", "folder:PATH"),
    ],
)
def test_unknown_names_list_the_known_ones(name, message):
    with pytest.raises(UserError, match=f"--dataset_name={name} is unknown.*{message}") as error:
        load_dataset(name)
    assert "digits" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bare_path_is_guessed_to_be_a_folder(tmp_path):
    with pytest.raises(UserError, match=f"did you mean folder:{tmp_path}?"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "size"), [("digits", 16), ("imagenet256", 128), ("imagenet128", 256), ("celebahq256", 64)]
)
def test_sizes_that_a_name_fixes_are_not_overridden(name, size):
    with pytest.raises(UserError, match=f"--image_size={size}.*leave it out"):
        load_dataset(name, image_size=size)


def test_unknown_splits_are_refused():
    with pytest.raises(UserError, match="--split=test"):
        load_dataset("digits", "test")


# Data sets of TFDS


def test_imagenet_has_a_thousand_readable_class_names():
    names = IMAGENET_LABELS.read_text().splitlines()
    assert len(names) == len(set(names)) == 1000
    # Well-known places in ILSVRC order.
    assert [names[i] for i in (0, 1, 207, 817, 999)] == [
        "tench",
        "goldfish",
        "golden retriever",
        "sports car",
        "toilet tissue",
    ]


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("imagenet256", "ILSVRC2012_img_train.tar .*downloads/manual.*tfds.builder\\('imagenet2012'.*array_record"),
        ("imagenet128", "tfds.builder\\('imagenet2012'"),
        ("tfds:imagenet2012", "ILSVRC2012_img_val.tar"),
        ("celebahq256", "features image .*array_record"),
        (
            "tfds:cifar10",
            "tfds.builder\\('cifar10', data_dir='.*'\\).download_and_prepare\\(file_format='array_record'\\)",
        ),
    ],
)
def test_a_missing_set_says_where_it_was_sought_and_how_to_make_it(tmp_path, name, fix):
    (tmp_path / "imagenet2012" / "incomplete.X_5.1.0").mkdir(parents=True)  # what an interrupted preparation leaves
    (tmp_path / "imagenet2012" / "incomplete.X_5.1.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=f"--dataset_name={name}: .*--data_dir={tmp_path}.*{fix}.*make demo") as error:
        load_dataset(name, data_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_the_data_folder_is_the_flags_the_variables_or_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/from/variable")
    for data_dir, sought in [(tmp_path, str(tmp_path)), (None, "/from/variable")]:
        with pytest.raises(UserError, match=f"--data_dir={sought};"):
            load_dataset("tfds:mnist", data_dir=data_dir)
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"--data_dir={tmp_path}/tensorflow_datasets;"):
        load_dataset("tfds:mnist")


def test_a_set_of_tfrecords_alone_says_how_to_convert_it(shared):
    with pytest.raises(UserError, match=r"cifar10/3\.0\.2 is prepared as tfrecord only.*tfds convert_format") as error:
        load_dataset("tfds:cifar10", data_dir=shared / "data" / "tfds")
    assert "\n" not in str(error.value)


def test_a_set_cannot_be_read_without_tfds(tmp_path, monkeypatch):
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"fileFormat": "array_record"}')
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="pip install tensorflow-datasets"):
        load_dataset("tfds:mnist", data_dir=tmp_path)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    buffer.seek(0)
    return buffer


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A folder where TFDS prepared small sets: CelebA-HQ's and CIFAR's shapes, grey images, ImageNet's many sizes."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    root = tmp_path_factory.mktemp("tfds")

    def prepare(set_name, shape, class_names, splits: dict[str, list[tuple[np.ndarray, int]]]):
        class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            name = set_name
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=shape),
                    "label": tfds.features.ClassLabel(names=class_names),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(examples) for split, examples in splits.items()}

            def _generate_examples(self, examples):
                for i, (pixels, label) in enumerate(examples):
                    yield i, {"image": encoded(pixels), "label": label}

        Prepared(data_dir=root).download_and_prepare(file_format="array_record")

    def examples(count, *shape):
        return [(noise(i, *shape), i % 2) for i in range(count)]

    prepare(
        "celebahq256",
        (256, 256, 3),
        ["female", "male"],
        {"train": examples(5, 256, 256, 3), "validation": examples(3, 256, 256, 3)},
    )
    prepare("like_cifar", (8, 8, 3), ["a", "b"], {"train": examples(4, 8, 8, 3), "test": examples(2, 8, 8, 3)})
    prepare("grey", (8, 8, 1), ["a", "b"], {"train": examples(50, 8, 8)})
    prepare(
        "imagenet2012",
        (None, None, 3),
        [f"n{i:08}" for i in range(1000)],
        {"train": examples(3, 300, 280, 3), "validation": examples(1, 20, 30, 3)},
    )
    return root


def images_of(dataset) -> list[np.ndarray]:
    return [dataset.source[i]["image"] for i in range(len(dataset.source))]


def test_reads_celebahq_as_it_is_and_the_test_split_where_none_is_for_validation(tfds_folder):
    celeba = load_dataset("celebahq256", "validation", tfds_folder)
    examples = (celeba.source[i] for i in range(len(celeba.source)))
    found = {example["image"].tobytes(): int(example["label"]) for example in examples}
    assert found == {noise(i, 256, 256, 3).tobytes(): i % 2 for i in range(3)}
    assert celeba.class_names == ("female", "male")
    assert celeba.image_shape == (256, 256, 3)
    assert not celeba.random_flip
    assert [len(load_dataset("tfds:like_cifar", split, tfds_folder).source) for split in ("train", "validation")] == [
        4,
        2,
    ]


def test_holds_out_where_tfds_has_one_split_and_keeps_grey(tfds_folder):
    train, validation = (load_dataset("tfds:grey", split, tfds_folder) for split in ("train", "validation"))
    assert train.image_shape == (8, 8, 1)
    assert (len(train.source), len(validation.source)) == (49, 1)
    found = {image.tobytes() for image in images_of(train) + images_of(validation)}
    assert found == {noise(i, 8, 8).tobytes() for i in range(50)}


@pytest.mark.parametrize("size", [128, 256])
def test_imagenet_is_cropped_resized_flipped_and_named_for_people(tfds_folder, size):
    train = load_dataset(f"imagenet{size}", "train", tfds_folder)
    assert train.image_shape == (size, size, 3)
    assert train.random_flip
    assert not load_dataset(f"imagenet{size}", "validation", tfds_folder).random_flip
    assert train.class_names[207] == "golden retriever"
    expected = [resize_by_formula(noise(i, 300, 280, 3)[10:290], size) for i in range(3)]
    for image in images_of(train):
        assert min(np.abs(image - candidate).max() for candidate in expected) < 1.01


def test_images_of_many_sizes_need_a_size(tfds_folder):
    with pytest.raises(UserError, match="--image_size 256"):
        load_dataset("tfds:imagenet2012", data_dir=tfds_folder)
    assert load_dataset("tfds:imagenet2012", "train", tfds_folder, image_size=32).image_shape == (32, 32, 3)
    assert load_dataset("tfds:like_cifar:1.0.0", "train", tfds_folder).image_shape == (8, 8, 3)


def test_array_record_beside_another_format_is_found(tfds_folder, tmp_path):
    shutil.copytree(tfds_folder / "like_cifar", tmp_path / "like_cifar")
    file = tmp_path / "like_cifar" / "1.0.0" / "dataset_info.json"
    info = json.loads(file.read_text()) | {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    file.write_text(json.dumps(info))
    dataset = load_dataset("tfds:like_cifar", "train", tmp_path)
    assert {image.tobytes() for image in images_of(dataset)} == {noise(i, 8, 8, 3).tobytes() for i in range(4)}


NO_TENSORFLOW = """
import sys
from utils.datasets import epoch_batches, load_dataset, training_batches
for name in sys.argv[2:]:
    dataset = load_dataset(name, "train", sys.argv[1], image_size=None if name == "digits" else 8)
    next(training_batches(dataset, 4, 0)), next(epoch_batches(dataset, 4))
assert "tensorflow" not in sys.modules
print("ended with batches read ahead")
"""


def test_never_imports_tensorflow_and_ends_cleanly(tmp_path):
    make_classes(tmp_path, {"a": 5})
    done = run_program("-c", NO_TENSORFLOW, tmp_path, "digits", f"folder:{tmp_path}", timeout=60)
    assert done.stdout.strip() == "ended with batches read ahead"
    assert "Exception" not in done.stderr


def test_reads_tfds_without_tensorflow(tfds_folder):
    done = run_program("-c", NO_TENSORFLOW, tfds_folder, "tfds:grey", "tfds:imagenet2012", timeout=60)
    assert done.stdout.strip() == "ended with batches read ahead"
