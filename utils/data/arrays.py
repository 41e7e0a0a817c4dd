"""Data sets that are held in memory: images and labels in one NumPy file (npz:FILE), and the digits of scikit-learn."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.base.devices import format_bytes, host_memory
from utils.base.external import ArrayHeader, BadFileError, read_npz, read_npz_headers
from utils.base.messages import UserError, printable, warn_once
from utils.data.dataset import (
    DataOptions,
    ImageDataset,
    array_dataset,
    check_arrays,
    split_rows,
    unlabelled_message,
)

IMAGES = ("images", "arr_0")  # the second of each as in ADM's files
LABELS = ("labels", "arr_1")
OTHER_LABELS = ("label", "targets", "target", "y")  # taken for labels where they are integers (n,)
VALIDATION = "validation_"  # begins the names of the validation split's arrays
CLASS_NAMES = "class_names"
MAX_CLASSES = 2**20
MAX_NAMES_BYTES = 2**26  # of class names; NumPy takes four bytes for a letter
MAX_LISTED = 5  # arrays named in a message
NUM_HELD_OUT_DIGITS = 297
WANTED = "images uint8 (n, h, w, c) and labels (n,)"


def load_digits(name: str, split: str, options: DataOptions) -> ImageDataset:
    """Returns the split of 1,797 real handwritten digits, 8x8 and grey, shipped with scikit-learn (UCI, CC BY 4.0)."""
    # The file alone: to import scikit-learn takes most of a second. A row has 64 levels of ink, 0 .. 16, and the digit.
    (package,) = importlib.util.find_spec("sklearn").submodule_search_locations  # ty: ignore[unresolved-attribute]
    rows = np.loadtxt(Path(package) / "datasets/data/digits.csv.gz", delimiter=",")
    images = np.round(rows[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = rows[:, -1].astype(np.int64)
    chosen = split_rows(len(rows), split, NUM_HELD_OUT_DIGITS)
    return array_dataset(name, images[chosen], labels[chosen], tuple("0123456789"), split)


class SplitArrays(NamedTuple):
    """Names of the arrays of one split."""

    images: str
    labels: str | None


def load_array_file(name: str, split: str, options: DataOptions) -> ImageDataset:
    """Returns the split of an npz with `images`, uint8 (n, h, w, c), and `labels` (n,), or ADM's `arr_0` and `arr_1`.

    Integers (n,) called `label`, `targets`, `target` or `y` are labels too. Without labels all images are of one class;
    images labelled -1 are left out. `validation_images` and `validation_labels` are the validation split; without them,
    or where all of these labels are -1, a part is held out. `class_names` names the classes. The images of the split
    are held in memory.

    Raises UserError if the file is missing, damaged, larger than the memory, or holds something else.
    """
    path = Path(name.partition(":")[2])
    flag = f"--dataset_name={name}"
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {path}; name an npz with {WANTED}")
    try:
        found = _read_arrays(path, split, flag)
    except BadFileError as error:
        raise UserError(f"{flag}: {path} cannot be read ({error}); write it with numpy.savez") from None

    # Classes are those of both splits.
    highest = _highest_label(list(found.all_labels.values()), flag)
    class_names = found.class_names
    if class_names is None:
        class_names = list(map(str, range(1 + highest)))
    elif len(class_names) <= highest:
        raise UserError(
            f"{flag}: class_names holds {len(class_names)}, but a label is {highest}; give {highest + 1} names, one "
            "for a class"
        )

    # Examples of the split, without those that have no label. Arrays that do not fit together are refused below.
    part, images = found.part, found.images
    labels = found.all_labels[part.labels] if part.labels else np.zeros(images.shape[:1], np.int32)
    if images.ndim and labels.shape == images.shape[:1]:
        images, labels = _leave_out_unlabelled(images, labels, part, flag)
        if not found.has_validation:
            if len(images) == 1:
                raise UserError(f"{flag}: {path} holds 1 image; 2 are needed, one of them to hold out")
            rows = split_rows(len(images), split)
            images, labels = images[rows], labels[rows]
    return array_dataset(name, images, labels, class_names, split)


class _Arrays(NamedTuple):
    """Contents of a file as far as one split needs them."""

    images: np.ndarray
    part: SplitArrays  # of the images
    all_labels: dict[str, np.ndarray]  # of both splits, by name
    class_names: list[str] | None
    has_validation: bool  # whether the file has a validation split that can be used


def _read_arrays(path: Path, split: str, flag: str) -> _Arrays:
    """Reads what `split` needs. Raises BadFileError, or UserError for arrays that cannot be used."""
    # Headers first: no array is read for a refusal.
    headers = read_npz_headers(path)
    train = _find_split(headers, "")
    validation = _find_split(headers, VALIDATION)
    if train is None:
        found = printable(", ".join(sorted(headers))[:200]) or "nothing"
        raise UserError(f"{flag}: {path} holds {found}; needed are {WANTED}")
    parts = [part for part in (train, validation) if part]
    _check_headers(headers, parts, flag)

    # Labels of both splits, which settle the classes, then the images of one.
    labels = read_npz(path, {part.labels: headers[part.labels] for part in parts if part.labels})
    class_names = _read_class_names(path, headers, flag)
    if validation and _is_unlabelled(labels.get(validation.labels)):
        warn_once(f"{flag}: no validation image has a label, so a part of the others is held out for validation")
        validation = None
    part = validation if validation and split == "validation" else train
    _check_size(headers[part.images], flag)
    images = read_npz(path, {part.images: headers[part.images]})[part.images]
    return _Arrays(images, part, labels, class_names, validation is not None)


def _find_split(headers: Mapping[str, ArrayHeader], prefix: str) -> SplitArrays | None:
    """Returns the arrays of a split, named `prefix` and one of the known names; None if it has no images."""
    images = next((prefix + name for name in IMAGES if prefix + name in headers), None)
    if images is None:
        return None
    labels = next((prefix + name for name in LABELS if prefix + name in headers), None)
    if labels is None:
        # Other usual names may hold something else: they count only where their arrays could be labels.
        alike = (prefix + name for name in OTHER_LABELS if prefix + name in headers)
        labels = next((name for name in alike if _may_be_labels(headers[name], headers[images])), None)
    return SplitArrays(images, labels)


def _may_be_labels(header: ArrayHeader, images: ArrayHeader) -> bool:
    return header.dtype.kind in "iu" and header.shape == images.shape[:1]


def _check_headers(headers: Mapping[str, ArrayHeader], parts: list[SplitArrays], flag: str) -> None:
    """Raises UserError if arrays of the splits hold objects or do not fit together; warns of arrays that are not
    read."""
    # Arrays that are read: none of objects.
    used = {name for part in parts for name in part if name} | {CLASS_NAMES} & headers.keys()
    for name in used:
        if headers[name].dtype.hasobject:
            wanted = "numpy.array(names, dtype=str)" if name == CLASS_NAMES else "an array of numbers"
            raise UserError(
                f"{flag}: {name} is an array of Python objects, which only unpickling, and so running code, would "
                f"read; save it as {wanted}"
            )

    # Shapes.
    shapes = {part.images: headers[part.images].shape[1:] for part in parts}
    if len(set(shapes.values())) > 1:
        raise UserError(f"{flag}: images are of one shape in both splits, not {shapes}")
    for part in parts:
        labels = headers[part.labels] if part.labels else None
        check_arrays(flag.removeprefix("--dataset_name="), headers[part.images], labels)

    # Arrays that are not read: among them may be the labels that one split lacks.
    unread = [f"{name} {headers[name].dtype} {headers[name].shape}" for name in sorted(headers.keys() - used)]
    not_read = f"not read: {', '.join(unread[:MAX_LISTED])}{', ...' * (len(unread) > MAX_LISTED)}" if unread else ""
    labelled = [part.images for part in parts if part.labels]
    if 0 < len(labelled) < len(parts):
        (other,) = (part.images for part in parts if not part.labels)
        prefix = VALIDATION if other.startswith(VALIDATION) else ""
        raise UserError(
            f"{flag}: {labelled[0]} have labels, but {other} have none; add integers {prefix}labels (n,), or leave "
            f"validation_images out{f' ({not_read})' * bool(unread)}"
        )

    # What a user may not expect, in one warning.
    remarks = [] if labelled else ["it has no labels, so all images are of one class"]
    if unread:
        remarks.append(not_read)
    if remarks:
        warn_once(f"{flag}: {'; '.join(remarks)}")


def _check_size(images: ArrayHeader, flag: str) -> None:
    """Raises UserError if the images take more than the memory of this machine."""
    limit = host_memory()
    if images.num_bytes > limit:
        raise UserError(
            f"{flag}: its arrays take {format_bytes(images.num_bytes)}, this machine has {format_bytes(limit)} of "
            "memory; put the images into a folder, and use folder:PATH"
        )


def _read_class_names(path: Path, headers: Mapping[str, ArrayHeader], flag: str) -> list[str] | None:
    """Returns the names of the classes; None if the file has none. Raises UserError if they cannot be names."""
    # One for a class, or a single one: by the header, before any text is read.
    header = headers.get(CLASS_NAMES)
    if header is None:
        return None
    if len(header.shape) > 1:
        raise UserError(f"{flag}: class_names has the shape {header.shape}; give one name for a class, (classes,)")
    if header.num_bytes > MAX_NAMES_BYTES:
        raise UserError(
            f"{flag}: class_names takes {format_bytes(header.num_bytes)}, above {format_bytes(MAX_NAMES_BYTES)}; give "
            "shorter names"
        )

    # Numbers are names too; bytes are UTF-8.
    try:
        names = np.atleast_1d(read_npz(path, {CLASS_NAMES: header}, "fiubUS", MAX_NAMES_BYTES)[CLASS_NAMES]).tolist()
        return [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    except BadFileError:
        raise
    except ValueError as error:  # bytes or code points that stand for no letter
        raise UserError(
            f"{flag}: class_names cannot be decoded ({error}); save numpy.array(names, dtype=str)"
        ) from None


def _is_unlabelled(labels: np.ndarray | None) -> bool:
    """Returns whether all labels are -1, no label."""
    return labels is not None and labels.dtype.kind == "i" and labels.size > 0 and bool((labels == -1).all())


def _leave_out_unlabelled(
    images: np.ndarray, labels: np.ndarray, part: SplitArrays, flag: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images and labels without those labelled -1. Raises UserError if -1 may stand for something else."""
    if labels.dtype.kind != "i" or not (labels == -1).any():
        return images, labels
    if _is_unlabelled(labels):
        raise UserError(f"{flag}: all of {part.labels} are -1, no label; leave them out to train without classes")
    if not (labels == 0).any():  # -1 and 1 as two classes
        raise UserError(
            f"{flag}: {part.labels} are -1 and {labels[labels != -1].min()} to {labels.max()}, without a 0; number the "
            "classes 0, 1, 2, ..."
        )
    is_labelled = labels != -1
    split = "validation" if part.images.startswith(VALIDATION) else "train"
    warn_once(unlabelled_message(flag, split, int((~is_labelled).sum()), len(labels)))
    return images[is_labelled], labels[is_labelled]


def _highest_label(labels: list[np.ndarray], flag: str) -> int:
    """Returns the highest label of both splits; 0 where they are no integers, which is refused later."""
    highest = max((int(each.max(initial=0)) for each in labels if each.dtype.kind in "iu"), default=0)
    if highest >= MAX_CLASSES:
        raise UserError(f"{flag}: a label is {highest}; number the classes 0, 1, 2, ...")
    return highest
