"""Images and labels in one NumPy file: npz:FILE."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils.console import printable
from utils.data.dataset import DataOptions, ImageDataset, array_dataset, check_own_size, split_rows
from utils.errors import UserError
from utils.external import ArrayHeader, BadFileError, read_npz, read_npz_headers
from utils.memory import format_bytes, host_memory

IMAGES, LABELS = ("images", "arr_0"), ("labels", "arr_1")  # the second of each as in ADM's files
VALIDATION, CLASS_NAMES = "validation_", "class_names"
MAX_CLASSES = 2**20
WANTED = "images uint8 (n, h, w, c) and labels (n,)"


def load_array_file(name: str, split: str, options: DataOptions) -> ImageDataset:
    """The split of an npz with `images`, uint8 (n, h, w, c), and `labels` (n,), or ADM's `arr_0` and `arr_1`.

    Without labels all images are of one class. `validation_images` and `validation_labels` are the validation split;
    without them a part is held out. `class_names` names the classes. The images of the split are held in memory.
    UserError where the file is missing, damaged, larger than the memory, or holds something else.
    """
    path, flag = Path(name.partition(":")[2]).expanduser(), f"--dataset_name={name}"
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {path}; name an npz with {WANTED}")
    try:
        headers = read_npz_headers(path)
        train, validation = _find_split(headers, ""), _find_split(headers, VALIDATION)
        if train is None:
            found = printable(", ".join(sorted(headers))[:200]) or "nothing"
            raise UserError(f"{flag}: {path} holds {found}; needed are {WANTED}")
        images_name, labels_name = validation if validation and split == "validation" else train
        label_names = [part[1] for part in (train, validation) if part and part[1]]
        needed = {each: headers[each] for each in {images_name, *label_names, CLASS_NAMES} if each in headers}
        _check_size(needed, headers, (train, validation), flag)
        arrays = read_npz(path, needed)
    except BadFileError as error:
        raise UserError(f"{flag}: {path} cannot be read ({error}); write it with numpy.savez") from None
    images = arrays[images_name]
    labels = arrays[labels_name] if labels_name else np.zeros(images.shape[:1], np.int32)
    class_names = arrays.get(CLASS_NAMES)
    if class_names is None:
        class_names = np.arange(1 + _highest_label([arrays[each] for each in label_names], flag))
    if validation is None and images.ndim and labels.shape == images.shape[:1]:  # others are refused below
        rows = split_rows(len(images), split)
        images, labels = images[rows], labels[rows]
    dataset = array_dataset(name, images, labels, list(map(str, np.atleast_1d(class_names))), split)
    check_own_size(name, dataset.image_shape[0], options)
    return dataset


def _find_split(headers: Mapping[str, ArrayHeader], prefix: str) -> tuple[str, str | None] | None:
    """(name of the images, name of the labels or None) of a split; None where it has no images."""

    def find(names):
        return next((prefix + name for name in names if prefix + name in headers), None)

    images = find(IMAGES)
    return images and (images, find(LABELS))


def _check_size(
    needed: Mapping[str, ArrayHeader],
    headers: Mapping[str, ArrayHeader],
    splits: tuple[tuple[str, str | None] | None, ...],
    flag: str,
) -> None:
    """UserError where what is needed is larger than the memory, or the splits' images are of several shapes."""
    size, there = sum(header.num_bytes for header in needed.values()), host_memory()
    if size > there:
        raise UserError(
            f"{flag}: its arrays take {format_bytes(size)}, this machine has {format_bytes(there)} of memory; put the "
            "images into a folder, and use folder:PATH"
        )
    shapes = {part[0]: headers[part[0]].shape[1:] for part in splits if part}
    if len(set(shapes.values())) > 1:
        raise UserError(f"{flag}: images are of one shape in both splits, not {shapes}")


def _highest_label(labels: list[np.ndarray], flag: str) -> int:
    """Of both splits; 0 for what are no labels, which is refused later."""
    highest = max((int(each.max(initial=0)) for each in labels if each.dtype.kind in "iu"), default=0)
    if highest >= MAX_CLASSES:
        raise UserError(f"{flag}: a label is {highest}; number the classes 0, 1, 2, ...")
    return highest
