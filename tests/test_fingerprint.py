"""Data identified by content: what would shift labels or order is refused by its first difference, the rest logged."""

import gzip
import os
import shutil

import numpy as np
import pytest

from tests.data_sets import load
from tests.image_files import make_classes, noise, write
from utils.base.messages import UserError
from utils.data.fingerprint import LISTING, Fingerprint, Row, compare_data, read_listing, write_listing
from utils.data.loaders import describe_data


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def load_splits(folder) -> dict:
    return {split: load(f"folder:{folder}", split, image_size=2) for split in ("train", "validation")}


def fingerprints(datasets) -> dict[str, Fingerprint]:
    return {split: dataset.fingerprint for split, dataset in datasets.items()}


@pytest.fixture
def compare(tmp_path):
    """compare(change) -> remarks on a folder of two classes that was described, and then changed by change(folder)."""

    def run(change, keep_listing=True):
        folder = tmp_path / "data"
        make_classes(folder / "train", {"cat": 3, "dog": 3})
        make_classes(folder / "valid", {"cat": 1, "dog": 1})
        before = load_splits(folder)
        if keep_listing:
            write_listing(tmp_path, fingerprints(before))
        after = load_splits(change(folder) or folder)
        saved = describe_data(before)
        rows = read_listing(tmp_path, {split: found["num_examples"] for split, found in saved["splits"].items()})
        return compare_data(saved, rows, describe_data(after), fingerprints(after))

    return run


def test_the_same_content_under_another_path_is_the_same(compare, tmp_path):
    assert compare(lambda folder: shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)) == []


REFUSED = {
    "class added": (lambda f: make_classes(f / "train", {"ant": 1}), "class 'ant' is new, .*: 0 was 'cat'"),
    "class added at the end": (lambda f: make_classes(f / "train", {"eel": 1}), r"class 'eel' \(label 2\) is new"),
    "class gone": (lambda f: [shutil.rmtree(f / split / "cat") for split in ("train", "valid")], "'cat' .*is gone"),
    "class renamed": (lambda f: (f / "train/dog").rename(f / "train/fox") and (f / "valid/dog").rename(f / "valid/fox"),
                      "label 1 is class 'fox', which was 'dog'"),
    "image added": (lambda f: write(f / "train/dog/9.png", noise(0, 2, 2, 3)), "1 image is new: dog/9.png"),
    "image gone": (lambda f: (f / "train/cat/1.png").unlink(), "1 image is gone: cat/1.png"),
    "image renamed": (lambda f: (f / "train/cat/1.png").rename(f / "train/cat/7.png") and None, "is new: cat/7.png"),
    "image moved": (lambda f: (f / "train/cat/1.png").rename(f / "train/dog/1b.png") and None, "is new: dog/1b.png"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_shift_labels_or_order_is_refused_by_its_first_difference(compare, case):
    change, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        compare(lambda folder: change(folder) and None)


def test_without_a_listing_numbers_and_hashes_still_tell(compare):
    with pytest.raises(UserError, match="there were 6 images, now 5"):
        compare(lambda folder: (folder / "train/cat/1.png").unlink(), keep_listing=False)


def test_replaced_images_are_named_and_go_on(compare):
    def replace(folder):
        write(folder / "train" / "cat" / "1.png", noise(1, 2, 2, 3))

    assert compare(replace) == ["1 image is not the same as before: cat/1.png"]


def test_other_validation_images_are_said(compare):
    (remark,) = compare(lambda folder: write(folder / "valid/cat/5.png", noise(2, 2, 2, 3)))
    assert remark.startswith("validation, whose curve is another from here on: 1 image is new: cat/5.png")


def test_the_name_of_the_only_class_may_change(tmp_path):
    for name in ("faces", "copy"):
        for i in range(3):
            write(tmp_path / name / f"{i}.png", noise(i, 2, 2, 3))
    before = load_splits(tmp_path / "faces")
    after = load_splits(tmp_path / "copy")
    remarks = compare_data(describe_data(before), {}, describe_data(after), fingerprints(after))
    assert remarks == ["label 0 is class 'copy', which was 'faces'"]


def test_another_size_or_format_is_refused(tmp_path):
    make_classes(tmp_path, {"cat": 3, "dog": 3})
    datasets = load_splits(tmp_path)
    saved = describe_data(datasets)
    with pytest.raises(UserError, match="its images were 4x4x3, not 2x2x3"):
        compare_data(saved | {"image_shape": [4, 4, 3]}, {}, saved, fingerprints(datasets))
    other = {split: metadata | {"format": "tfrecord"} for split, metadata in saved["splits"].items()}
    with pytest.raises(UserError, match="read from tfrecord, now from files, in another order"):
        compare_data(saved | {"splits": other}, {}, saved, fingerprints(datasets))


def test_runs_that_did_not_keep_fingerprints_say_what_cannot_be_told(tmp_path):
    make_classes(tmp_path, {"cat": 3, "dog": 3})
    datasets = load_splits(tmp_path)
    found = describe_data(datasets)
    saved = {name: found[name] for name in ("name", "image_shape", "class_names")}
    (remark,) = compare_data(saved, {}, found, fingerprints(datasets))
    assert "is not known" in remark
    with pytest.raises(UserError, match="class 'dog'"):
        compare_data(saved | {"class_names": ["cat"]}, {}, found, fingerprints(datasets))


def test_listings_are_read_back_or_counted_as_none(tmp_path):
    rows = [Row("a/tab\there.png", 3, "0f"), Row("é.png", 0, "aa")]
    write_listing(tmp_path, {"train": Fingerprint.of_rows("files", rows)})
    assert read_listing(tmp_path, {"train": 2, "validation": 1}) == {"train": rows}
    assert read_listing(tmp_path, {"train": 1}) == {}
    assert read_listing(tmp_path, {"validation": 2}) == {}
    content = (tmp_path / LISTING).read_bytes()
    assert content[3:8] == bytes(5)  # neither a name nor a time: the same rows are the same bytes
    for damaged in (content[:-9], b"", np.zeros(50, np.uint8).tobytes()):
        (tmp_path / LISTING).write_bytes(damaged)
        assert read_listing(tmp_path, {"train": 2}) == {}
    bombs = gzip.compress(b"train\t0\taa\ta\n" * 500_000), gzip.compress(b"train\t0\taa\t" + b"a" * 10**6)
    for bomb in bombs:
        (tmp_path / LISTING).write_bytes(bomb)
        assert read_listing(tmp_path, {"train": 2**40}) == {}
    (tmp_path / LISTING).unlink()
    os.mkfifo(tmp_path / LISTING)
    assert read_listing(tmp_path, {"train": 2}) == {}
