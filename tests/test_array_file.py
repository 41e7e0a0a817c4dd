"""npz:FILE: images and labels of one NumPy file."""

import numpy as np
import pytest

from utils.base.messages import UserError, warn_once
from utils.data.dataset import DataOptions, array_dataset, iterable_dataset, split_rows
from utils.data.loaders import load_dataset

IMAGES = np.random.default_rng(0).integers(0, 256, (100, 4, 4, 3), np.uint8)
LABELS = np.arange(100) % 7


@pytest.fixture(autouse=True)
def _say_again():
    """Forgets the warnings of other tests, so that each is given again."""
    warn_once.cache_clear()


def write(tmp_path, **arrays):
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)
    return f"npz:{path}"


def rows(dataset):
    examples = [dataset.source[i] for i in range(len(dataset.source))]
    return {example["image"].tobytes(): int(example["label"]) for example in examples}


@pytest.mark.parametrize("names", [("images", "labels"), ("arr_0", "arr_1")])
def test_a_part_is_held_out_and_every_image_keeps_its_label(tmp_path, names):
    name = write(tmp_path, **dict(zip(names, (IMAGES, LABELS), strict=True)))
    train, validation = (load_dataset(name, split) for split in ("train", "validation"))
    assert (len(train.source), len(validation.source), train.num_classes) == (98, 2, 7)
    assert train.name == name
    assert rows(train) | rows(validation) == {
        image.tobytes(): int(label) for image, label in zip(IMAGES, LABELS, strict=True)
    }
    assert not train.random_flip
    assert load_dataset(name, "train", DataOptions(random_flip=True)).random_flip


def test_a_validation_split_of_its_own_and_names(tmp_path):
    own = {"validation_images": IMAGES[:5], "validation_labels": LABELS[:5] + 2, "class_names": list("abcdefghi")}
    name = write(tmp_path, images=IMAGES, labels=LABELS, **own)
    train, validation = (load_dataset(name, split) for split in ("train", "validation"))
    assert (len(train.source), len(validation.source)) == (100, 5)
    assert train.class_names == validation.class_names == tuple("abcdefghi")
    own.pop("class_names")
    name = write(tmp_path, images=IMAGES, labels=LABELS, **own)
    assert load_dataset(name, "train").num_classes == 7  # labels of both splits: 0 to 6


def test_without_labels_there_is_one_class_which_is_said(tmp_path, capfd):
    name = write(tmp_path, arr_0=IMAGES, targets=LABELS / 2, y=LABELS[:9], meta=np.array([{}]))
    assert [load_dataset(name, split).class_names for split in ("train", "validation")] == [("0",), ("0",)]
    (line,) = capfd.readouterr().err.splitlines()
    assert f"--dataset_name={name}: it has no labels, so all images are of one class; not read: " in line
    assert "meta object (1,), targets float64 (100,), y int64 (9,)" in line


@pytest.mark.parametrize("labels", ["label", "targets", "target", "y"])
def test_labels_by_other_names_are_labels(tmp_path, labels, capfd):
    own = {"validation_images": IMAGES[:5], f"validation_{labels}": LABELS[:5] + 2}
    name = write(tmp_path, images=IMAGES, **{labels: LABELS.astype(np.uint8)}, **own)
    assert rows(load_dataset(name)) == {image.tobytes(): label for image, label in zip(IMAGES, LABELS, strict=True)}
    assert list(rows(load_dataset(name, "validation")).values()) == [2, 3, 4, 5, 6]
    assert capfd.readouterr().err == ""
    write(tmp_path, images=IMAGES, labels=LABELS[::-1], **{labels: LABELS})  # `labels` goes first
    assert load_dataset(name).source.labels.tolist() == [LABELS[::-1][row] for row in split_rows(100, "train")]
    assert f"not read: {labels} int64 (100,)" in capfd.readouterr().err


def test_images_without_a_label_are_left_out_and_a_split_of_them_is_not_used(tmp_path, capfd):
    labels = np.where(LABELS == 3, -1, LABELS)
    labelled = {image.tobytes(): label for image, label in zip(IMAGES, LABELS, strict=True) if label != 3}
    name = write(tmp_path, images=IMAGES, labels=labels, validation_images=IMAGES[:5], validation_labels=[-1] * 5)
    train, validation = (load_dataset(name, split) for split in ("train", "validation"))
    assert rows(train) | rows(validation) == labelled
    assert (len(train.source), len(validation.source)) == (84, 2)
    assert (train.num_classes, train.empty_classes) == (7, (3,))
    said = capfd.readouterr().err
    assert "no validation image has a label, so a part of the others is held out" in said
    assert said.count("14 of 100 images of train have no label (-1); they are left out") == 1
    name = write(tmp_path, images=IMAGES, labels=LABELS, validation_images=IMAGES, validation_labels=labels)
    assert rows(load_dataset(name, "validation")) == labelled


@pytest.mark.parametrize("kind", ["array", "iterable", "npz"])
def test_images_that_use_little_of_their_range_are_told_so(tmp_path, kind, capfd):
    dark = IMAGES // 16
    if kind == "npz":
        load_dataset(write(tmp_path, images=dark, labels=LABELS))
    elif kind == "array":
        array_dataset("mine", dark, LABELS)
    else:
        iterable_dataset("mine", [{"image": dark[0], "label": 0}])
    assert "the images' values are 0 to 15 of 0 to 255" in capfd.readouterr().err
    load_dataset(write(tmp_path, images=IMAGES, labels=LABELS))
    assert capfd.readouterr().err == ""


NAMES = [f"{i:03d} Käse-Straße, 猫, of a thousand names: {'ж' * 60}" for i in range(1000)]


@pytest.mark.parametrize("names", [np.array(NAMES), np.array([name.encode() for name in NAMES])])
def test_a_thousand_names_beyond_ascii_as_text_or_bytes(tmp_path, names):
    dataset = load_dataset(write(tmp_path, images=IMAGES, labels=LABELS, class_names=names))
    assert dataset.class_names == tuple(NAMES)
    assert dataset.empty_classes == tuple(range(7, 1000))


@pytest.mark.parametrize(("size", "is_fit"), [(None, True), (4, False), (6, False), (46, False)])
def test_sizes_are_written_as_height_and_width(tmp_path, size, is_fit):
    name = write(tmp_path, images=np.tile(IMAGES, (1, 1, 2, 1))[:, :, :6], labels=LABELS)
    if is_fit:
        assert load_dataset(name, "train", DataOptions(image_size=size)).image_shape == (4, 6, 3)
        return
    with pytest.raises(UserError, match=rf"--image_size={size}: the images of {name} are 4x6; leave it out"):
        load_dataset(name, "train", DataOptions(image_size=size))


REFUSED = {
    "integers": (
        {"images": IMAGES.astype(np.int16), "labels": LABELS},
        r"images must be uint8, float16 or float32 .*, not int16 \(100, 4, 4, 3\); convert them with images.astype",
    ),
    "vectors": ({"images": IMAGES[..., 0, 0], "labels": LABELS}, "images must be uint8"),
    "labels of others": ({"images": IMAGES, "labels": LABELS[:9]}, r"labels must be integers \(100,\)"),
    "labels that are none": ({"images": IMAGES, "labels": LABELS / 2}, "labels must be integers"),
    "negative": ({"images": IMAGES, "labels": LABELS - 2}, "labels are -2 to 4, but must be 0 to 4"),
    "two signs": ({"images": IMAGES, "labels": LABELS % 2 * 2 - 1}, "labels are -1 and 1 to 1, without a 0; number"),
    "no label": ({"images": IMAGES, "labels": LABELS * 0 - 1}, "all of labels are -1, no label; leave them out"),
    "labels of training alone": (
        {"images": IMAGES, "labels": LABELS, "validation_images": IMAGES, "val_labels": LABELS},
        r"images have labels, but validation_images have none; add integers validation_labels \(n,\).*val_labels int64",
    ),
    "labels of validation alone": (
        {"images": IMAGES, "validation_images": IMAGES, "validation_labels": LABELS},
        r"validation_images have labels, but images have none; add integers labels \(n,\)",
    ),
    "too few names": (
        {"images": IMAGES, "labels": LABELS, "class_names": ["a"]},
        "class_names holds 1, but a label is 6; give 7 names",
    ),
    "names of objects": (
        {"images": IMAGES, "labels": LABELS, "class_names": np.array(list("abcdefg"), object)},
        r"class_names is an array of Python objects, .*; save it as numpy.array\(names, dtype=str\)",
    ),
    "labels of objects": ({"images": IMAGES, "labels": LABELS.astype(object)}, "labels is an array of Python objects"),
    "names of other bytes": (
        {"images": IMAGES, "labels": LABELS, "class_names": np.array([b"K\xe4se"] * 7)},
        "class_names cannot be decoded .*; save numpy.array",
    ),
    "a table of names": (
        {"images": IMAGES, "labels": LABELS, "class_names": [["a"], ["b"]]},
        r"class_names has the shape \(2, 1\); give one name for a class",
    ),
    "one image": ({"images": IMAGES[:1], "labels": LABELS[:1]}, "holds 1 image; 2 are needed, one of them to hold out"),
    "other names": ({"x_train": IMAGES}, "holds x_train; needed are images uint8"),
    "other size": (
        {"images": IMAGES, "validation_images": IMAGES[:, :2]},
        r"images are of one shape in both splits, not .*\(2, 4, 3\)",
    ),
    "huge labels": ({"images": IMAGES, "labels": LABELS + 2**40}, "a label is 1099511627782; number the classes"),
    "one number": ({"images": np.uint8(3)}, "images must be uint8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_arrays_are_refused(tmp_path, case):
    arrays, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        load_dataset(write(tmp_path, **arrays))


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_dataset(f"npz:{tmp_path / 'none.npz'}")
    name = write(tmp_path, images=IMAGES, labels=LABELS)
    content = (tmp_path / "set.npz").read_bytes()
    (tmp_path / "set.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cannot be read .*; write it with numpy\.savez"):
        load_dataset(name)
    with pytest.raises(UserError, match="--image_size=8"):
        load_dataset(write(tmp_path, images=IMAGES), "train", DataOptions(image_size=8))
