"""The class of an image as the condition of a model: an integer label, and the names of the classes."""

import dataclasses
import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from utils.base.messages import UserError
from utils.conditions.condition import CONDITIONS, Condition, Embedded

# A name a line, in label order.
IMAGENET_LABELS = Path(__file__).resolve().parents[2] / "data" / "imagenet_labels.txt"
MAX_LISTED = 5  # classes named in a message


def imagenet_class_names() -> tuple[str, ...]:
    """Returns the English names of ImageNet's 1,000 classes in label order, which is that of their WordNet ids."""
    return tuple(IMAGENET_LABELS.read_text(encoding="utf-8").splitlines())


def find_class(word: str, class_names: Sequence[str]) -> int:
    """Returns the label of a class that a user writes by name or number.

    A name in its exact spelling goes first, then a number (classes may be named by digits), then the only name that is
    the same but for case, spaces around it and Unicode composition (macOS writes é as e and an accent). Raises
    UserError, listing the candidates, where there is none or are several.
    """
    # In the order of the docstring. Two classes may differ in case alone: then the exact spelling decides.
    exact = [label for label, name in enumerate(class_names) if name == word]
    alike = exact or [label for label, name in enumerate(class_names) if _fold(name) == _fold(word)]
    number = int(word) if re.fullmatch(r"-?[0-9]{1,18}", word) else None
    if not exact and number is not None:
        if 0 <= number < len(class_names):
            return number
        raise UserError(f"there is no class {word}; use 0 to {len(class_names) - 1}, or names")

    # By name, where it means one class.
    if len(alike) == 1:
        return alike[0]
    if alike:
        listed = ", ".join(f"{label} ({class_names[label]})" for label in alike)
        raise UserError(f"{word!r} may be any of the classes {listed}; give its number")

    # Nothing fits: the nearest names, or a few for an idea of what names look like.
    by_folded = {_fold(name): name for name in class_names}
    near = difflib.get_close_matches(_fold(word), by_folded, n=3, cutoff=0.4)
    hint = f"there are {', '.join(class_names[:5])}, ..."
    if near:
        hint = f"did you mean {' or '.join(by_folded[name] for name in near)}?"
    raise UserError(f"{word!r} is no class of this run; {hint}")


def _fold(name: str) -> str:
    # Composed again after the change of case, which may take letters apart.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def read_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """Returns the labels of classes separated by commas, each as `find_class` reads it; names may hold commas."""
    words = text.split(",")
    labels = []
    start = 0
    while start < len(words):
        # The longest run of words that is a name; else one word, which `find_class` reads or refuses.
        runs = ((",".join(words[start:stop]).strip(), stop) for stop in range(len(words), start + 1, -1))
        name, stop = next((run for run in runs if run[0] in class_names), (words[start].strip(), start + 1))
        labels.append(find_class(name, class_names))
        start = stop
    return labels


class LabelEmbed(nn.Module):
    """Labels (b,) in [0, num_classes] -> vectors (b, d); row `num_classes` means "no label" (arXiv:2207.12598)."""

    num_classes: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, labels):
        # Rows are rounded after they are taken, so that their gradients are summed in float32.
        init = nn.initializers.normal(0.02)
        table = nn.Embed(self.num_classes + 1, self.width, embedding_init=init, dtype=jnp.float32)
        return Embedded(vector=table(labels).astype(self.dtype))


@dataclasses.dataclass(frozen=True)
class ClassCondition(Condition):
    """A class by its label, int32 (n,) in [0, num_classes); the label `num_classes` means "no class".

    A model may have more labels than its data have classes: `fit` sets `num_classes`.
    """

    # Values of --labels, see `draw_labels`.
    DRAW_MODES: ClassVar = ("uniform", "balanced", "dataset")

    class_names: tuple[str, ...] = ()  # in label order
    empty_classes: tuple[int, ...] = ()  # labels without training images, of which no samples are drawn
    num_classes: int = 0  # labels of the model; default: as many as there are names

    def __post_init__(self):
        # The dataclass is frozen: its fields are set only here.
        if not self.num_classes:
            object.__setattr__(self, "num_classes", len(self.class_names))

    # --- Arrays ---

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), jnp.int32)

    def read(self, example: Mapping[str, Any]) -> Any:
        return example["label"]

    def null(self, count: int) -> Int[Array, " n"]:
        return jnp.full(count, self.num_classes, jnp.int32)

    @property
    def drawn_classes(self) -> Float[np.ndarray, " classes"]:
        """1 for each class whose samples are drawn, 0 for the empty ones."""
        counts = np.ones(len(self.class_names))
        counts[list(self.empty_classes)] = 0
        return counts

    def draw(
        self,
        key: Key[Array, ""],
        indices: Int[Array, " n"],
        mode: str = "uniform",
        weights: Num[Array, " classes"] | None = None,
    ) -> Int[Array, " n"]:
        """Returns the labels of samples by number, see `draw_labels`; `weights` count the images of each class."""
        return draw_labels(key, indices, self.drawn_classes if weights is None else weights, mode)

    def show(self, number: int, count: int) -> Int[np.ndarray, " n"]:
        """Returns labels with images: all of them where they fit. Otherwise half of the places have the same at every
        evaluation, and the others take the rest in turn."""
        # The fixed half shows progress, the other half every class in time.
        labels = np.flatnonzero(self.drawn_classes).astype(np.int32)
        if len(labels) <= count:
            return np.resize(labels, count)
        half = count // 2
        rest = np.roll(labels[half:], -half * number)
        return np.concatenate([labels[:half], rest[:half]])

    def embedder(self, width: int, dtype: Any = jnp.float32) -> LabelEmbed:
        return LabelEmbed(self.num_classes, width, dtype, name="label_embed")

    def accepts(self, other: Condition) -> bool:
        return isinstance(other, ClassCondition) and self.class_names == other.class_names

    # --- Words ---

    def check(self, values: Any) -> Int[np.ndarray, " n"]:
        """Returns the labels (n,) of numbers or names of classes; `num_classes`, "no class", is one of them.

        Raises UserError for an unknown class, and for an empty list.
        """
        # Numbers become Python's; beside a name they become texts, which `find_class` reads too.
        found = []
        for value in [values] if isinstance(values, str) else np.atleast_1d(np.asarray(values)).tolist():
            if isinstance(value, str):
                found.append(find_class(value, self.class_names))
            elif _is_whole(value) and (0 <= value < len(self.class_names) or value == self.num_classes):
                found.append(int(value))
            else:
                raise UserError(f"there is no label {value}; use 0 to {len(self.class_names) - 1}, or names")
        if not found:
            raise UserError("labels is empty; give one for each image")
        return np.array(found, np.int32)

    def parse(self, text: str) -> Int[np.ndarray, " n"]:
        """Returns the labels of `3,7` or `golden retriever`; "all" names all classes of which samples are drawn."""
        # A class may itself be called "all".
        if text.strip() == "all" and "all" not in self.class_names:
            return np.flatnonzero(self.drawn_classes).astype(np.int32)
        return np.array(read_classes(text, self.class_names), np.int32)

    @property
    def fields(self) -> tuple[str, ...]:
        return ("class",)

    def from_fields(self, rows: Sequence[Mapping[str, str]]) -> Int[np.ndarray, " n"]:
        return np.array([find_class(row["class"], self.class_names) for row in rows], np.int32)

    def titles(self, condition: Any) -> list[str]:
        names = self.class_names if len(self.class_names) > 1 else ("",)  # that of an only class says nothing
        return [names[label] if label < len(names) else "no class" for label in condition]

    def summary(self) -> str:
        num_classes = len(self.class_names)
        empty = ""
        if self.empty_classes:
            names = ", ".join(self.class_names[label] for label in self.empty_classes[:MAX_LISTED])
            more = ", ..." * (len(self.empty_classes) > MAX_LISTED)
            empty = f", {len(self.empty_classes)} of them without images to train on ({names}{more})"
        return f"{num_classes} class{'es' * (num_classes != 1)}{empty}"

    def remark(self) -> str:
        if not self.empty_classes:
            return ""
        return (
            f"{len(self.empty_classes)} of {len(self.class_names)} classes had no training images; labels are drawn "
            "from the others"
        )

    # --- A run ---

    def to_json(self) -> dict[str, Any]:
        return {"class_names": list(self.class_names), "empty_classes": list(self.empty_classes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ClassCondition":
        return cls(tuple(data["class_names"]), tuple(data.get("empty_classes", ())))

    def fit(self, num_classes: int) -> "ClassCondition":
        if len(self.class_names) > num_classes:
            raise UserError(
                f"--model.num_classes={num_classes} is fewer than the {len(self.class_names)} classes of the data set; "
                f"use {len(self.class_names)} or more"
            )
        return dataclasses.replace(self, num_classes=num_classes)


CONDITIONS["class"] = ClassCondition


def check_classes(condition: Condition, what: str, load_dir: str) -> None:
    """Raises UserError, which says `what` is for classes alone, for a run with another kind of condition."""
    if not isinstance(condition, ClassCondition):
        raise UserError(f"{what} is for runs that are conditioned on classes; --load_dir={load_dir} is not")


def draw_labels(
    key: Key[Array, ""], indices: Int[Array, " b"], counts: Num[Array | np.ndarray, " classes"], mode: str = "uniform"
) -> Int[Array, " b"]:
    """Returns the labels (b,) of samples by number; entry j is a function of (key, indices[j]) alone.

    `mode`: 'uniform' draws every class with the same probability, 'balanced' interleaves them, 'dataset' draws them in
    proportion to `counts`. Classes whose count is 0 are never drawn.
    """
    counts = jnp.asarray(counts)
    if mode == "dataset":
        # The inverse of the cumulative distribution.
        fractions = jnp.cumsum(counts) / jnp.sum(counts)
        draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(indices)
        # The last fraction is 1, up to rounding.
        return jnp.searchsorted(fractions[:-1], draws, side="right").astype(jnp.int32)
    # Classes are drawn by their place among those with images.
    num_drawn = jnp.count_nonzero(counts)
    labels = jnp.argsort(counts == 0, stable=True).astype(jnp.int32)  # those that are drawn first, ascending
    if mode == "balanced":
        return labels[indices % num_drawn]
    places = jax.vmap(lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, num_drawn))(indices)
    return labels[places]


def _is_whole(value: Any) -> bool:
    # 2.0 passes, as arrays of labels may be floats; True does not.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer()
