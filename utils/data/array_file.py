"""Images and labels in one NumPy file: npz:FILE."""

from pathlib import Path

import numpy as np

from utils.data.dataset import DataOptions, ImageDataset, array_dataset, check_own_size, split_rows
from utils.errors import UserError
from utils.external import BadFileError, read_npz, read_npz_headers
from utils.memory import format_bytes, host_memory

# {what it is: its names}; those of ADM's files second.
NAMES = {"images": ("images", "arr_0"), "labels": ("labels", "arr_1")}
VALIDATION = "validation_"
WANTED = "images uint8 (n, h, w, c) and labels (n,)"


def load_array_file(name: str, split: str, options: DataOptions) -> ImageDataset:
    """The split of an npz with `images`, uint8 (n, h, w, c), and `labels` (n,), or ADM's `arr_0` and `arr_1`.

    Without labels all images are of one class. `validation_images` and `validation_labels` are the validation split;
    without them a part is held out. `class_names` names the classes. All of it is held in memory.
    UserError where the file is missing, damaged, larger than the memory, or holds something else.
    """
    path, flag = Path(name.partition(":")[2]).expanduser(), f"--dataset_name={name}"
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {path}; name an npz with {WANTED}")
    arrays = _read_arrays(path, flag)
    train, validation = _find_split(arrays, ""), _find_split(arrays, VALIDATION)
    if train is None:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise UserError(f"{flag}: {path} holds {found}; needed are {WANTED}")
    if validation and validation[0].shape[1:] != train[0].shape[1:]:
        raise UserError(f"{flag}: images are {train[0].shape[1:]}, but validation_images {validation[0].shape[1:]}")
    class_names = arrays.get("class_names", np.arange(1 + max(map(_highest_label, filter(None, (train, validation))))))
    images, labels = validation if validation and split == "validation" else train
    dataset = array_dataset(name, images, labels, list(map(str, class_names)), split)  # which checks them
    check_own_size(name, dataset.image_shape[0], options)
    if validation:
        return dataset
    rows = split_rows(len(images), split)
    return array_dataset(name, images[rows], labels[rows], dataset.class_names, split)


def _highest_label(part: tuple[np.ndarray, np.ndarray]) -> int:
    """0 for what are no labels, which is refused later."""
    _, labels = part
    return int(labels.max(initial=0)) if labels.dtype.kind in "iu" else 0


def _read_arrays(path: Path, flag: str) -> dict[str, np.ndarray]:
    """The arrays that are needed, of those that are there."""
    known = {prefix + name for prefix in ("", VALIDATION) for names in NAMES.values() for name in names}
    try:
        headers = {key: header for key, header in read_npz_headers(path).items() if key in known | {"class_names"}}
        needed = sum(header.num_bytes for header in headers.values())
        if needed > host_memory():
            raise UserError(
                f"{flag}: {path} holds {format_bytes(needed)}, this machine {format_bytes(host_memory())} of memory; "
                "put the images into a folder, and use folder:PATH"
            )
        return read_npz(path, headers)
    except BadFileError as error:
        raise UserError(f"{flag}: {path} cannot be read ({error}); write it with numpy.savez") from None


def _find_split(arrays: dict[str, np.ndarray], prefix: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(images, labels) whose names begin so; labels 0 where there are none."""

    def find(what):
        return next((arrays[prefix + name] for name in NAMES[what] if prefix + name in arrays), None)

    images, labels = find("images"), find("labels")
    if images is None:
        return None
    return images, np.zeros(len(images), np.int32) if labels is None else labels
