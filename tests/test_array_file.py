"""npz:FILE: images and labels of one NumPy file."""

import numpy as np
import pytest

from utils.data.dataset import DataOptions
from utils.data.registry import load_dataset
from utils.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (100, 4, 4, 3), np.uint8)
LABELS = np.arange(100) % 7


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


def test_without_labels_there_is_one_class(tmp_path):
    assert load_dataset(write(tmp_path, arr_0=IMAGES)).class_names == ("0",)


REFUSED = {
    "floats": ({"images": IMAGES / 255, "labels": LABELS}, "images must be uint8"),
    "no channels": ({"images": IMAGES[..., 0], "labels": LABELS}, "images must be uint8"),
    "labels of others": ({"images": IMAGES, "labels": LABELS[:9]}, r"labels must be integers \(100,\)"),
    "labels that are none": ({"images": IMAGES, "labels": LABELS / 2}, "labels must be integers"),
    "negative": ({"images": IMAGES, "labels": LABELS - 1}, "labels are -1 to 5, but must be 0 to 5"),
    "too few names": ({"images": IMAGES, "labels": LABELS, "class_names": ["a"]}, "labels are 0 to 6"),
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
