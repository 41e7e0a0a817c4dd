"""Arrays as data sets: images of any shape and format, and beside them columns of labels, numbers, tokens, images or
texts, in memory or mapped from files."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from utils.base.messages import UserError, warn_once
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import Condition
from utils.conditions.images import ImageCondition
from utils.conditions.several import SeveralCondition
from utils.conditions.tokens import MAX_LENGTH, MAX_WIDTH, TextCondition, TokensCondition
from utils.conditions.vector import VectorCondition
from utils.data.dataset import (
    SPLITS,
    ArrayLike,
    Example,
    ImageDataset,
    check_label_array,
    check_labels,
    find_empty_classes,
    split_rows,
    warn_of_levels,
)
from utils.data.fingerprint import Fingerprint
from utils.data.summaries import Summary, summarize
from utils.images.pixels import UINT8, PixelFormat

# Keys of an example by the names of the arrays (n, ...) that users give.
KEYS = {
    "images": "image",
    "labels": "label",
    "conditions": "conditions",
    "tokens": "tokens",
    "token_mask": "token_mask",
    "condition_images": "condition_image",
    "captions": "caption",
}
NAMES = {key: name for name, key in KEYS.items()}
MANY_CHANNELS = 16  # above them, a first axis of 1, 3 or 4 is taken for the channels


@dataclasses.dataclass(frozen=True)
class Columns:
    """A source whose examples are rows of arrays (n, ...), named as the keys of an example.

    Floats become float32, and texts str, where an example is read: nothing is copied before, and what is mapped from a
    file stays there.
    """

    arrays: Mapping[str, np.ndarray]
    rows: Int[np.ndarray, " m"]  # of the arrays, in the order of the examples

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        return {key: _read_value(array[row]) for key, array in self.arrays.items()}

    def read_condition(self, index: int) -> Example:
        """Returns an example without its image, which may be large."""
        row = self.rows[index]
        return {key: _read_value(array[row]) for key, array in self.arrays.items() if key != "image"}

    def column(self, key: str) -> np.ndarray:
        """Returns one column of all rows, in memory."""
        return np.asarray(self.arrays[key][self.rows])

    def fingerprint(self) -> Fingerprint:
        """Returns what identifies the rows: a hash of all of their bytes; of images and labels, that of ArraySource."""
        return Fingerprint("arrays", len(self), self.summary.sha256)

    @functools.cached_property
    def summary(self) -> Summary:
        """The finding of one pass over all rows."""
        return summarize(self.arrays, self.rows, KEYS.values())


def _read_value(value: Any) -> Any:
    """Returns a value of an example: float32 for any float, int32 for labels, str for texts."""
    match value.dtype.kind:
        case "f":
            return np.asarray(value, np.float32)
        case "U":
            return str(value)
        case "S":
            return bytes(value).decode("utf-8", "replace")
    return np.asarray(value)


# --- Checks ---


def check_columns(name: str, arrays: Mapping[str, ArrayLike]) -> None:
    """Raises UserError for arrays, or headers of files, that are no columns of a data set; `arrays` are {name: array},
    and names are those of KEYS."""
    # The images, whose rows all others have to match.
    images = arrays["images"]
    _check_images(name, "images", images)
    if (remark := _channels_remark(images.shape)) is not None:
        warn_once(f"{name}: {remark}")

    # Each column by itself.
    for key, array in arrays.items():
        if array.dtype.hasobject:
            raise UserError(
                f"{name}: {key} is an array of Python objects, which only unpickling, and so running code, would read; "
                f"save it as {'numpy.array(texts, dtype=str)' if key == 'captions' else 'an array of numbers'}"
            )
        if key == "labels":
            check_label_array(name, images, array)
        if array.shape[:1] != images.shape[:1]:
            raise UserError(
                f"{name}: {key} has the shape {array.shape}; give one row for each of the {images.shape[0]} images"
            )
        wanted = {
            "conditions": ("numbers (n, k)", "fiub", (1, 2)),
            "tokens": ("floats (n, tokens, width)", "f", (3,)),
            "token_mask": ("truth values (n, tokens)", "biu", (2,)),
            "captions": ("texts (n,)", "US", (1,)),
        }
        if key in wanted:
            words, kinds, axes = wanted[key]
            if array.dtype.kind not in kinds or len(array.shape) not in axes or 0 in array.shape:
                raise UserError(f"{name}: {key} must be {words}, not {array.dtype} {array.shape}")
    if "condition_images" in arrays:
        _check_images(name, "condition_images", arrays["condition_images"])

    # A mask is that of tokens.
    mask, tokens = arrays.get("token_mask"), arrays.get("tokens")
    if mask is not None and (tokens is None or mask.shape != tokens.shape[:2]):
        has = "there are no tokens" if tokens is None else f"tokens are {tokens.shape}"
        raise UserError(f"{name}: token_mask is {mask.shape}, but {has}; give one truth value for each token")


def check_splits(name: str, splits: Sequence[Mapping[str, ArrayLike]]) -> None:
    """Raises UserError for columns whose rows are of another shape or kind in one of the splits, {name: array}, that
    `check_columns` has accepted."""
    for key in ("images", "conditions", "tokens", "condition_images"):
        arrays = [split[key] for split in splits if key in split]
        # There may be fewer tokens, or more.
        shapes = [array.shape[2 if key == "tokens" else 1 :] for array in arrays]
        if len(set(shapes)) > 1:
            raise UserError(f"{name}: {key} are of one shape in both splits, not {' and '.join(map(str, shapes))}")
        if key != "conditions" and len({array.dtype == np.uint8 for array in arrays}) > 1:
            kinds = " and ".join(str(array.dtype) for array in arrays)
            raise UserError(f"{name}: {key} are of one kind in both splits, not {kinds}")


def _check_images(name: str, key: str, images: ArrayLike) -> None:
    is_number = images.dtype == np.uint8 or (images.dtype.kind == "f" and images.dtype.itemsize <= 8)
    if not is_number or len(images.shape) not in (3, 4) or 0 in images.shape:
        fix = "; convert them with images.astype(numpy.float32)" if images.dtype.kind in "iub" and not is_number else ""
        raise UserError(
            f"{name}: {key} must be uint8, float16 or float32 (n, h, w, c) or (n, h, w), not {images.dtype} "
            f"{images.shape}{fix}"
        )


def _channels_remark(shape: tuple[int, ...]) -> str | None:
    if len(shape) == 4 and shape[1] in (1, 3, 4) and shape[3] > MANY_CHANNELS:
        return (
            f"images are {shape[1]}x{shape[2]} with {shape[3]} channels; if their channels come first, save "
            "images.transpose(0, 2, 3, 1)"
        )
    return None


def _check_finite(name: str, columns: Columns) -> None:
    """Raises UserError if a column holds values that are NaN or infinite."""
    for key, count in columns.summary.num_bad.items():
        row = columns.rows[columns.summary.first_bad[key]]
        verb = "value is" if count == 1 else "values are"
        raise UserError(
            f"{name}: {count:,} {verb} NaN or infinite in {NAMES[key]}, the first in row {row}; mend them, or leave "
            "these rows out"
        )


# --- Data sets ---


def column_dataset(
    name: str,
    columns: Mapping[str, Any],
    split: str = "train",
    *,
    validation: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    condition_names: Sequence[str] | None = None,
    value_range: tuple[float, float] | None = None,
    random_flip: bool = False,
) -> ImageDataset:
    """Returns a split of arrays with one row for each example, `columns`: images uint8 or float (n, h, w) or
    (n, h, w, c), and the conditions of a model that is trained on them: labels (n,), conditions (n, k) named by
    `condition_names`, tokens (n, l, d) with token_mask (n, l), condition_images (n, h2, w2, c2), captions (n,).

    `validation` are the arrays of that split; without them, 2 % of the rows are held out. `value_range` is what becomes
    -1 .. 1 of float images; without it, their range in the training split. Arrays may be mapped from files. Only
    'train' flips. Raises UserError, which begins with `name`, for other arrays, and for values that are not finite.
    """
    # What is given, checked by itself and then against the other split.
    given = {"train": columns, **({} if validation is None else {"validation": validation})}
    arrays = {part: {key: np.asanyarray(array) for key, array in found.items()} for part, found in given.items()}
    for found in arrays.values():
        if unknown := found.keys() - KEYS.keys():
            raise UserError(f"{name}: {min(unknown)} is none of the columns {', '.join(KEYS)}")
        if "images" not in found:
            raise UserError(f"{name}: there are no images among {', '.join(found) or 'no columns'}")
        check_columns(name, found)
    check_splits(name, list(arrays.values()))
    if lacking := {key for key in set().union(*arrays.values()) if not all(key in found for found in arrays.values())}:
        raise UserError(
            f"{name}: {min(lacking)} are given for one of the splits alone; give them for both, or for none"
        )

    # The rows of each split.
    counts = {part: len(found["images"]) for part, found in arrays.items()}
    if validation is None:
        if counts["train"] == 1:
            raise UserError(f"{name}: there is 1 image; 2 are needed, one of them to hold out")
        parts = {part: make_columns(arrays["train"], split_rows(counts["train"], part)) for part in SPLITS}
    else:
        parts = {part: make_columns(arrays[part], range(counts[part])) for part in SPLITS}
    return make_dataset(name, parts, split, class_names, condition_names, value_range, random_flip)


def make_columns(arrays: Mapping[str, np.ndarray], rows: Sequence[int] | np.ndarray) -> Columns:
    """Returns a source of `rows` of {name: array (n, ...)}, named as in KEYS, which `check_columns` has accepted."""
    # Grey images have a channel, as all others do.
    found = {KEYS[name]: array for name, array in arrays.items()}
    for key in ("image", "condition_image"):
        if key in found and found[key].ndim == 3:
            found[key] = found[key][..., None]
    # Every image has a class where nothing is given: the only one.
    if "label" in found or found.keys() == {"image"}:
        found["label"] = np.asarray(found.get("label", np.zeros(len(found["image"]))), np.int32)
    if "conditions" in found:
        found["conditions"] = np.asarray(found["conditions"], np.float32).reshape(len(found["image"]), -1)
    if "token_mask" in found:
        found["token_mask"] = np.asarray(found["token_mask"], bool)
    return Columns(found, np.asarray(rows, np.int64))


def make_dataset(
    name: str,
    parts: Mapping[str, Columns],
    split: str,
    class_names: Sequence[str] | None = None,
    condition_names: Sequence[str] | None = None,
    value_range: tuple[float, float] | None = None,
    random_flip: bool = False,
    text_encoder: str | None = None,
    image_space: str = "pixels",
) -> ImageDataset:
    """Returns the data set of one of `parts`, {split: its columns}; range and condition are those of 'train'.

    Raises UserError, which begins with `name`, for values that are not finite, for float images that are all of one
    value, and for labels and other columns that no model can be trained on.
    """
    # The format of the images: floats have a range, which is that of the training split.
    source = parts[split]
    _check_finite(name, source)
    images = source.arrays["image"]
    pixels = UINT8
    if images.dtype.kind == "f":
        pixels = PixelFormat("float32", *(value_range or _measure_range(name, parts["train"], "image")))
    elif split == "train":
        warn_of_levels(name, source.arrays["image"], source.rows)

    # Classes are those of both splits.
    names: tuple[str, ...] = ()
    empty: tuple[int, ...] = ()
    if "label" in source.arrays:
        labels = source.column("label")
        if class_names is None:
            class_names = list(map(str, range(1 + max(int(part.column("label").max()) for part in parts.values()))))
        names = check_labels(name, labels, class_names)
        empty = find_empty_classes(labels, len(names))

    # Other conditions have the statistics of the training split.
    _check_finite(name, parts["train"])
    train = parts["train"]
    small = {key: train.column(key) for key in ("label", "conditions", "caption") if key in train.arrays}
    columns = {**train.arrays, **small}  # of the others, the shapes are all that matters
    beside = _find_images(name, train, image_space)
    try:
        condition = make_condition(columns, condition_names, names, text_encoder, beside)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return ImageDataset(
        name=name,
        split=split,
        source=source,
        image_shape=images.shape[1:],
        class_names=names,
        random_flip=random_flip and split == "train",
        fingerprint=source.fingerprint(),
        empty_classes=empty,
        pixels=pixels,
        own_condition=condition,
    )


def make_condition(
    columns: Mapping[str, np.ndarray],
    names: Sequence[str] | None = None,
    class_names: Sequence[str] = (),
    text_encoder: str | None = None,
    images: ImageCondition | None = None,
) -> Condition | None:
    """Returns the condition of data whose training rows have these columns, {key of an example: (n, ...)}; None where
    labels are all there is.

    `names` are those of the numbers of "conditions", `class_names` those of the classes, () without; `text_encoder`
    makes tokens of captions (default: words); `images` is the condition of images. Raises UserError, which does not
    name the data, for columns on which no model can be trained.
    """
    # A part for each kind of column.
    parts: dict[str, Condition] = {}
    if class_names:
        empty = find_empty_classes(columns["label"], len(class_names)) if "label" in columns else ()
        parts["class"] = ClassCondition(tuple(class_names), empty)
    if "conditions" in columns:
        parts["vector"] = VectorCondition.of_rows(columns["conditions"], names)
    if "caption" in columns:
        parts["text"] = _make_text(columns, text_encoder or "words")
    elif "tokens" in columns:
        length, width = columns["tokens"].shape[1:]
        if length > MAX_LENGTH or width > MAX_WIDTH:
            raise UserError(f"tokens are {length:,} of {width:,} numbers; {MAX_LENGTH:,} of {MAX_WIDTH:,} are the most")
        parts["tokens"] = TokensCondition(length, width)
    if images is not None:
        parts["image"] = images

    # Labels alone need no condition of their own; of several parts, each number has a name by which it is asked for.
    if parts.keys() <= {"class"}:
        return None
    fields = [field for part in parts.values() for field in part.fields]
    if doubled := [field for field in fields if fields.count(field) > 1]:
        raise UserError(f"a number is called {doubled[0]}, as what lies beside it is; give it another name")
    return next(iter(parts.values())) if len(parts) == 1 else SeveralCondition(tuple(parts.items()))


def _make_text(columns: Mapping[str, np.ndarray], text_encoder: str) -> TextCondition:
    """Returns the condition of captions, whose tokens may lie beside them. Raises UserError for those of another
    encoder."""
    found = TextCondition.of_captions([_read_value(text) for text in columns["caption"]], text_encoder)
    if "tokens" in columns and columns["tokens"].shape[2] != found.width:
        raise UserError(
            f"tokens beside the captions have {columns['tokens'].shape[2]} numbers each, those of --text_encoder="
            f"{text_encoder} {found.width}; name the encoder that made them, or leave the tokens out"
        )
    return found


def _find_images(name: str, train: Columns, space: str) -> ImageCondition | None:
    """Returns the condition of images beside the images; None where there are none."""
    images = train.arrays.get("condition_image")
    if images is None:
        return None
    pixels = UINT8
    if images.dtype.kind == "f":
        pixels = PixelFormat("float32", *_measure_range(name, train, "condition_image"))
    height, width, channels = images.shape[1:]
    return ImageCondition((height, width, channels), pixels, space)


def _measure_range(name: str, train: Columns, key: str) -> tuple[float, float]:
    """Returns the lowest and the highest value of float images."""
    # In float32, in which the model computes: a range beyond it would be infinite.
    _check_finite(name, train)
    with np.errstate(over="ignore"):
        low, high = map(np.float32, train.summary.ranges[key])
        width = high - low
    if not low < high:
        raise UserError(f"{name}: all values of all {NAMES[key]} are {low:g}; give images that differ")
    if not np.isfinite(width):
        raise UserError(f"{name}: values are {low:g} to {high:g}, beyond what float32 can hold; rescale them")
    return float(low), float(high)
