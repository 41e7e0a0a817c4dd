"""Data sets prepared by TFDS, read at random from array_record and as a stream from tfrecord."""

import dataclasses
import json
import shutil
import sys
from collections import Counter
from io import BytesIO
from pathlib import PurePosixPath

import numpy as np
import pytest
from PIL import Image

from tests.conftest import run_program
from tests.data_sets import load
from tests.image_files import encoded, make_classes, noise, resize_by_formula
from utils.base.messages import UserError, warn_once
from utils.data import tfds, tfds_files
from utils.data.batches import epoch_batches, first_examples, training_batches
from utils.data.dataset import Batch


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("imagenet256", "ILSVRC2012_img_train.tar .*downloads/manual.*tfds.builder\\('imagenet2012'.*array_record"),
        ("imagenet128", "tfds.builder\\('imagenet2012'"),
        ("tfds:imagenet2012", "ILSVRC2012_img_val.tar"),
        ("celebahq256", "python data/celebahq256.py --source"),
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
        load(name, data_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_the_data_folder_is_the_flags_the_variables_or_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/from/variable")
    for data_dir, sought in [(tmp_path, str(tmp_path)), (None, "/from/variable")]:
        with pytest.raises(UserError, match=f"--data_dir={sought};"):
            load("tfds:mnist", data_dir=data_dir)
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"--data_dir={tmp_path}/tensorflow_datasets;"):
        load("tfds:mnist")


def test_tfrecords_without_tensorflow_say_how_to_convert_them(shared, monkeypatch):
    def import_tensorflow():
        raise ImportError("No module named 'tensorflow'")

    monkeypatch.setattr(tfds_files, "import_tensorflow", import_tensorflow)
    fix = (
        r"cifar10/3\.0\.2 is prepared as tfrecord.*pip install tensorflow.*tfds convert_format --dataset_version_dir /"
    )
    with pytest.raises(UserError, match=fix) as error:
        load("tfds:cifar10", data_dir=shared / "data" / "tfds")
    assert "\n" not in str(error.value)


def test_a_set_cannot_be_read_without_tfds(tmp_path, monkeypatch):
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"fileFormat": "array_record"}')
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="pip install tensorflow-datasets"):
        load("tfds:mnist", data_dir=tmp_path)


FORMATS = ("array_record", "tfrecord")
PARTLY_LABELLED = (0, 2, -1, 3)  # -1: TFDS's "no label"; no image is of class 1


@pytest.fixture(scope="module")
def prepared_folder(tmp_path_factory):
    """A folder where TFDS prepared small sets: CelebA-HQ's and CIFAR's shapes, grey images, ImageNet's many sizes."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    root = tmp_path_factory.mktemp("tfds")

    def prepare(set_name, shape, class_names, splits: dict[str, list[tuple[np.ndarray | bytes, int]]], extra=()):
        class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            name = set_name
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=shape),
                    "label": tfds.features.ClassLabel(names=class_names),
                    **{name: tfds.features.ClassLabel(num_classes=2) for name in extra},
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(examples) for split, examples in splits.items()}

            def _generate_examples(self, examples):
                for i, (pixels, label) in enumerate(examples):
                    is_encoded = isinstance(pixels, bytes)
                    others = dict.fromkeys(extra, 1)
                    yield i, {"image": pixels if is_encoded else encoded(pixels), "label": label, **others}

        for file_format in FORMATS:
            Prepared(data_dir=root / file_format).download_and_prepare(file_format=file_format)

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
    gaps = [(image, PARTLY_LABELLED[i % 4]) for i, (image, _) in enumerate(examples(40, 8, 8, 3))]
    unlabelled = [(image, -1) for image, _ in examples(4, 8, 8, 3)]
    splits = {"train": gaps, "test": unlabelled}
    prepare("partly_labelled", (8, 8, 3), list("abcd"), splits, extra=("coarse_label", "id"))
    prepare(
        "imagenet2012",
        (None, None, 3),
        [f"n{i:08}" for i in range(1000)],
        {"train": examples(3, 300, 280, 3), "validation": examples(1, 20, 30, 3)},
    )
    odd = [(image, i) for i, image in enumerate(odd_images())]
    prepare("odd", (32, 32, 3), list(map(str, range(len(odd)))), {"train": odd, "validation": odd})
    return root


def odd_images() -> list[bytes]:
    """One 32x32 image in each mode that files have."""
    ramp = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))
    colours = np.stack([ramp, ramp[::-1], ramp.T], axis=-1)
    half_clear = np.stack([np.full_like(ramp, 255), ramp, ramp.T, ramp], axis=-1)
    palette = Image.fromarray(ramp // 128, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [
        (Image.fromarray(half_clear, "RGBA"), "PNG", {}),
        (palette, "PNG", {"transparency": 0}),
        (palette, "PNG", {}),
        (Image.fromarray(half_clear[..., [1, 3]], "LA"), "PNG", {}),
        (Image.fromarray(ramp), "PNG", {"transparency": 9}),
        (Image.fromarray(ramp.astype(np.uint16) * 250), "PNG", {}),
        (Image.fromarray(ramp > 99), "PNG", {}),
        (Image.fromarray(colours).convert("CMYK"), "JPEG", {"quality": 95}),
        (Image.fromarray(colours), "JPEG", {"exif": exif}),
        (Image.fromarray(ramp), "JPEG", {}),
    ]
    files = []
    for image, kind, options in images:
        buffer = BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


@pytest.fixture
def tfds_folder(prepared_folder):
    return prepared_folder / "array_record"


@pytest.fixture(params=FORMATS)
def either_folder(request, prepared_folder):
    return prepared_folder / request.param


def images_of(dataset) -> list[np.ndarray]:
    return [image for batch in epoch_batches(dataset, 10) for image in batch.image]


def contents(dataset) -> Counter:
    """How often each (image, label) is in the split."""
    batches = epoch_batches(dataset, 500)
    return Counter(
        (image.tobytes(), label)
        for batch in batches
        for image, label in zip(batch.image, batch.condition.tolist(), strict=True)
    )


def test_both_formats_give_what_tfds_decodes_whatever_the_mode(prepared_folder):
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder_from_directory(prepared_folder / "tfrecord" / "odd" / "1.0.0")
    expected = {example["label"]: example["image"] for example in tfds.as_numpy(builder.as_dataset("validation"))}
    assert len(expected) == len(odd_images())
    for folder in FORMATS:
        (batch,) = epoch_batches(load("tfds:odd", "validation", prepared_folder / folder), 100)
        found = dict(zip(batch.condition.tolist(), batch.image, strict=True))
        for label, image in expected.items():
            # TFDS lets TensorFlow decode JPEGs by a fast approximation, a few levels off; here both are exact.
            np.testing.assert_allclose(found[label].astype(int), image, atol=5 if label in (7, 8, 9) else 0)
        (exact,) = epoch_batches(load("tfds:odd", "validation", prepared_folder / "tfrecord"), 100)
        np.testing.assert_array_equal(batch.image[batch.condition.argsort()], exact.image[exact.condition.argsort()])


def test_the_format_and_the_content_are_told_apart(prepared_folder, tmp_path, monkeypatch):
    datasets = [load("tfds:like_cifar", "train", prepared_folder / folder) for folder in FORMATS]
    assert [dataset.fingerprint.format for dataset in datasets] == list(FORMATS)
    shutil.copytree(prepared_folder / "tfrecord" / "like_cifar", tmp_path / "like_cifar")
    copy = load("tfds:like_cifar", "train", tmp_path)
    assert copy.fingerprint == datasets[1].fingerprint
    (file,) = (tmp_path / "like_cifar" / "1.0.0").glob("*-train.tfrecord*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"the labels of like_cifar.* cannot be read .*; prepare it again"):
        load("tfds:like_cifar", "train", tmp_path)
    monkeypatch.setattr(tfds_files.PreparedSplit, "_labels", lambda self, split: np.zeros(4, np.int32))
    monkeypatch.setattr(tfds, "find_extremes", lambda prepared, source: np.array([[0, 255]], np.uint8))
    assert load("tfds:like_cifar", "train", tmp_path).fingerprint != copy.fingerprint


def test_reads_celebahq_as_it_is_and_the_test_split_where_none_is_for_validation(either_folder):
    celeba = load("celebahq256", "validation", either_folder)
    assert contents(celeba) == {(noise(i, 256, 256, 3).tobytes(), i % 2): 1 for i in range(3)}
    assert celeba.class_names == ("female", "male")
    assert celeba.image_shape == (256, 256, 3)
    assert not load("celebahq256", "train", either_folder).random_flip
    splits = [load("tfds:like_cifar", split, either_folder) for split in ("train", "validation")]
    assert [len(dataset.source) for dataset in splits] == [4, 2]


def test_holds_out_where_tfds_has_one_split_and_keeps_grey(either_folder):
    train, validation = (load("tfds:grey", split, either_folder) for split in ("train", "validation"))
    assert train.image_shape == (8, 8, 1)
    assert (len(train.source), len(validation.source)) == (49, 1)
    found = {image.tobytes() for image in images_of(train) + images_of(validation)}
    assert found == {noise(i, 8, 8).tobytes() for i in range(50)}


@pytest.fixture
def partly(either_folder, tmp_path, monkeypatch):
    """load(split) of the set with images without a label, its labels not read before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    warn_once.cache_clear()
    return lambda split="train": load("tfds:partly_labelled", split, either_folder)


def test_images_without_a_label_are_left_out_and_a_split_of_them_is_not_used(partly, capfd):
    train = partly()
    validation = partly("validation")
    labelled = [(noise(i, 8, 8, 3).tobytes(), label) for i in range(40) if (label := PARTLY_LABELLED[i % 4]) >= 0]
    assert contents(train) + contents(validation) == Counter(labelled)
    assert (len(train.source), len(validation.source)) == (len(labelled) - 1, 1)
    assert train.empty_classes == (1,)
    said = capfd.readouterr().err
    assert "no image of its split test has a label, so others are used for validation" in said
    assert "--dataset_name=tfds:partly_labelled: not read: coarse_label\n" in said
    assert "10 of 40 images of train have no label (-1); they are left out" in said
    assert partly().fingerprint == train.fingerprint  # with labels from the cache
    # Two hosts share out an epoch, whichever images are left out, and a stream goes on where it was.
    parts = [take(training_batches(train, 14, 0, process_index=host, process_count=2), 2) for host in range(2)]
    assert all(label >= 0 for part in parts for _, label in rows(part))
    assert max(Counter(rows(parts[0]) + rows(parts[1])).values()) == 1
    again = training_batches(train, 14, 0, process_index=1, process_count=2)
    again.set_state({"next_index": 1})
    assert_same(take(again, 1), parts[1][1:])
    assert rows(epoch_batches(train, 4, start=3, stop=9)) == rows(epoch_batches(train, 29))[3:9]


def test_images_that_use_little_of_their_range_are_told_so(partly, monkeypatch, capfd):
    partly()
    assert "values" not in capfd.readouterr().err
    monkeypatch.setattr("utils.images.pixels.MIN_RANGE", 300)  # what every image is below
    monkeypatch.setattr(tfds.RecordStream, "epoch_batches", None)  # the images are not read again
    monkeypatch.setattr(tfds, "read_image", None)
    partly()
    assert "--dataset_name=tfds:partly_labelled: the images' values are 0 to 255 of 0 to 255" in capfd.readouterr().err


def test_labels_of_large_sets_are_checked_as_they_are_read(partly, monkeypatch):
    monkeypatch.setattr(tfds_files, "MAX_LABELLED_BYTES", 0)
    for module in (tfds, tfds_files):
        monkeypatch.setattr(module, "NUM_SAMPLED", 1)
    train = partly()
    assert len(train.source) == 39  # the test split, of whose labels one was read, is not used
    assert train.empty_classes == ()
    for read in (lambda: list(epoch_batches(train, 10)), lambda: take(training_batches(train, 39, 0, prefetch=0), 1)):
        with pytest.raises(UserError, match=r"an image of partly_labelled.* has no label \(-1\)"):
            read()


def test_sets_without_labels_or_with_others_are_refused(partly, monkeypatch):
    for label, message in ((-1, "no image of its split train has a label"), (4, "has the label 4, but 4 classes")):
        monkeypatch.setattr(
            tfds_files.PreparedSplit, "_labels", lambda self, split, label=label: np.full(40, label, np.int32)
        )
        with pytest.raises(UserError, match=f"--dataset_name=tfds:partly_labelled: .*{message}"):
            partly()


@pytest.mark.parametrize("size", [128, 256])
def test_imagenet_is_cropped_resized_flipped_and_named_for_people(either_folder, size):
    train = load(f"imagenet{size}", "train", either_folder)
    assert train.image_shape == (size, size, 3)
    assert train.random_flip
    assert not load(f"imagenet{size}", "validation", either_folder).random_flip
    assert train.class_names[207] == "golden retriever"
    expected = [resize_by_formula(noise(i, 300, 280, 3)[10:290], size) for i in range(3)]
    for image in images_of(train):
        assert min(np.abs(image - candidate).max() for candidate in expected) < 1.01


def test_images_of_many_sizes_need_a_size(either_folder):
    with pytest.raises(UserError, match="--image_size 256"):
        load("tfds:imagenet2012", data_dir=either_folder)
    assert load("tfds:imagenet2012", "train", either_folder, image_size=32).image_shape == (32, 32, 3)
    middle = {noise(i, 300, 280, 3)[75:225].tobytes() for i in range(3)}
    wide = load("tfds:imagenet2012", "train", either_folder, image_size="150x280")
    assert {image.tobytes() for image in images_of(wide)} <= middle
    assert load("tfds:like_cifar:1.0.0", "train", either_folder).image_shape == (8, 8, 3)


def test_array_record_beside_another_format_is_preferred(tfds_folder, tmp_path):
    shutil.copytree(tfds_folder / "like_cifar", tmp_path / "like_cifar")
    file = tmp_path / "like_cifar" / "1.0.0" / "dataset_info.json"
    info = json.loads(file.read_text()) | {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    file.write_text(json.dumps(info))
    dataset = load("tfds:like_cifar", "train", tmp_path)
    assert isinstance(dataset.source, tfds.Records)
    assert {image.tobytes() for image in images_of(dataset)} == {noise(i, 8, 8, 3).tobytes() for i in range(4)}


def test_addresses_in_the_cloud_stay_as_they_are(monkeypatch):
    sought = []

    class Bucket(PurePosixPath):
        def __str__(self):
            return super().__str__().replace("gs:/", "gs://")

        def expanduser(self):
            return self

        def glob(self, pattern):
            sought.append(f"{self}/{pattern}")
            if len(sought) > 1:
                raise RuntimeError("no route to host")
            return []

    monkeypatch.setattr(tfds_files.epath, "Path", Bucket)
    with pytest.raises(UserError, match="no data set imagenet2012 under --data_dir=gs://bucket/sets;"):
        load("imagenet256", data_dir="gs://bucket/sets")
    with pytest.raises(UserError, match="--data_dir=gs://bucket/sets cannot be read: no route to host"):
        load("imagenet256", data_dir="gs://bucket/sets")
    assert sought == ["gs://bucket/sets/imagenet2012/[0-9]*/dataset_info.json"] * 2


NO_TENSORFLOW = """
import sys
from tests.data_sets import load
from utils.data.batches import epoch_batches, training_batches
for name in sys.argv[2:]:
    dataset = load(name, "train", sys.argv[1], image_size=None if name == "digits" else 8)
    next(training_batches(dataset, 4, 0)), next(epoch_batches(dataset, 4))
assert "tensorflow" not in sys.modules
print("ended with batches read ahead")
"""


def test_only_tfrecords_import_tensorflow_and_readers_end_cleanly(tfds_folder, tmp_path):
    make_classes(tmp_path, {"a": 5})
    names = ("digits", f"folder:{tmp_path}", "tfds:grey", "tfds:imagenet2012")
    done = run_program("-c", NO_TENSORFLOW, tfds_folder, *names)
    assert done.stdout.strip() == "ended with batches read ahead"
    assert "Exception" not in done.stderr


NUM_CIFAR = 2000


@pytest.fixture(scope="session")
def part_of_cifar(shared, tmp_path_factory):
    """A folder with the first of CIFAR-10's test images, as tfrecord; its training split is the same ones."""
    source = shared / "data" / "tfds" / "cifar10" / "3.0.2"
    folder = tmp_path_factory.mktemp("cifar")
    part = folder / "cifar10" / "3.0.2"
    part.mkdir(parents=True)
    for name in ("features.json", "label.labels.txt"):
        shutil.copy(source / name, part)
    info = json.loads((source / "dataset_info.json").read_text(encoding="utf-8"))
    for split in info["splits"]:
        split["shardLengths"] = [str(NUM_CIFAR)]
    (part / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    content = (source / "cifar10-test.tfrecord-00000-of-00001").read_bytes()
    end = 0
    for _ in range(NUM_CIFAR):
        end += 16 + int.from_bytes(content[end : end + 8], "little")  # a record has its length and two checksums
    for split in info["splits"]:
        (part / f"cifar10-{split['name']}.tfrecord-00000-of-00001").write_bytes(content[:end])
    return folder


@pytest.fixture
def cifar(part_of_cifar, monkeypatch):
    """Test images of CIFAR-10 as tfrecord, drawn from a buffer much smaller than they are."""
    monkeypatch.setattr(tfds, "SHUFFLE_BYTES", 2**20)
    return load("cifar10", "validation", part_of_cifar)


def take(batches, count: int) -> list[Batch]:
    return [next(batches) for _ in range(count)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.condition, b.condition)


def rows(batches) -> list[tuple[bytes, int]]:
    return [
        (image.tobytes(), label)
        for batch in batches
        for image, label in zip(batch.image, batch.condition.tolist(), strict=True)
    ]


def test_a_stream_has_every_image_once_an_epoch_in_a_new_order(cifar):
    # Batches run on across the epoch's end.
    stream = rows(take(training_batches(cifar, 128, 0), 2 * NUM_CIFAR // 128 + 1))
    epochs = [stream[:NUM_CIFAR], stream[NUM_CIFAR : 2 * NUM_CIFAR]]
    everything = contents(cifar)
    assert len(everything) == NUM_CIFAR
    assert [Counter(epoch) == everything for epoch in epochs] == [True, True]
    places = {row: place for place, row in enumerate(epochs[0])}
    moves = np.array([places[row] - place for place, row in enumerate(epochs[1])])
    assert np.abs(moves).mean() > 50
    other_seed = rows(take(training_batches(cifar, 128, 1), 1))
    assert other_seed != stream[:128]


def test_hosts_stream_disjoint_images_that_are_the_whole_split(cifar):
    parts = [take(training_batches(cifar, 100, 0, process_index=host, process_count=2), 20) for host in range(2)]
    counts = [Counter(rows(part)) for part in parts]
    assert all(len(batch.condition) == 50 for part in parts for batch in part)
    assert not counts[0] & counts[1]
    assert counts[0] + counts[1] == contents(cifar)
    ordered = [list(epoch_batches(cifar, 800, process_index=host, process_count=2)) for host in range(2)]
    assert [[len(batch.condition) for batch in host] for host in ordered] == [[400, 400, 200]] * 2
    assert Counter(rows(ordered[0]) + rows(ordered[1])) == contents(cifar)


def test_a_stream_continues_exactly(cifar):
    train = dataclasses.replace(cifar, random_flip=True)
    uninterrupted = take(training_batches(train, 100, 3), 25)
    for position in (0, 8, 23):
        batches = training_batches(train, 100, 3)
        batches.set_state(json.loads(json.dumps({"next_index": position})))
        assert batches.get_state() == {"next_index": position}
        assert_same(take(batches, 2), uninterrupted[position : position + 2])
        assert batches.get_state() == {"next_index": position + 2}


def test_a_stream_flips_half_of_the_training_images_anew_each_epoch(cifar):
    upright = {image for image, _ in contents(cifar)}
    train = dataclasses.replace(cifar, random_flip=True)
    stream = [image for batch in take(training_batches(train, 100, 0), 40) for image in batch.image]
    flipped = [
        {image[:, ::-1].tobytes() for image in epoch if image.tobytes() not in upright}
        for epoch in (stream[:NUM_CIFAR], stream[NUM_CIFAR:])
    ]
    assert all(epoch <= upright for epoch in flipped)
    assert all(abs(len(epoch) - NUM_CIFAR / 2) < 112 for epoch in flipped)  # five standard deviations of a fair coin
    assert abs(len(flipped[0] & flipped[1]) - NUM_CIFAR / 4) < 112


def test_a_part_of_a_stream_in_its_own_order(cifar):
    everything = rows(epoch_batches(cifar, 500))
    assert rows(epoch_batches(cifar, 64, start=900, stop=1100)) == everything[900:1100]
    first = first_examples(cifar, 10)
    assert [
        (example["image"].tobytes(), int(example["label"])) for example in (first.source[i] for i in range(10))
    ] == (everything[:10])


MEMORY = """
import sys
import psutil
from utils.data import tfds
from utils.data.batches import training_batches
from tests.data_sets import load
tfds.SHUFFLE_BYTES = 2**23
def stream(split, steps):
    dataset = load("cifar10", split, sys.argv[1])
    batches = training_batches(dataset, 100, 0)
    for _ in range(steps):
        next(batches)
        peak[0] = max(peak[0], psutil.Process().memory_info().rss)
    return dataset.source.memory_bound(100)
peak = [0]
stream("validation", 20)  # TensorFlow and its threads are there
before = psutil.Process().memory_info().rss
bound = stream("train", 300)
print(peak[0] - before, bound)
"""


@pytest.mark.slow
def test_a_stream_holds_no_more_memory_than_it_says(shared):
    """30,000 of CIFAR-10's training images, 70 MB encoded and 92 MB decoded, through a buffer of 8 MiB."""
    done = run_program("-c", MEMORY, shared / "data" / "tfds")
    growth, bound = map(int, done.stdout.split()[-2:])
    assert bound < 32 * 2**20
    assert growth < bound + 16 * 2**20


def test_jpegs_look_the_same_in_both_formats(imagenet_sample):
    ours, theirs = (load("imagenet256", "validation", imagenet_sample / kind) for kind in FORMATS)
    for a, b in zip(epoch_batches(ours, 16), epoch_batches(theirs, 16), strict=True):
        np.testing.assert_array_equal(a.condition, b.condition)
        assert np.abs(a.image.astype(int) - b.image).max() <= 1
