"""Conditions, which a model is given beside x and t. The class of an image is one kind.

In a batch, in `model_fn(x, t, condition)` and everywhere in between, a condition is a pytree of arrays whose first axis
is that of the batch. Objectives, guidance, solvers, panels and likelihoods pass it through. Only its kind looks inside:
the kind knows how it is read from data, drawn, written by a user, shown, mixed and embedded.

A new kind is a frozen dataclass that implements `Condition`, and a line `CONDITIONS["name"] = MyCondition`.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from utils.base.messages import UserError
from utils.base.settings import unknown_name

KindT = TypeVar("KindT")
RECORDED = "recorded_condition"  # key of an example that comes with its condition as the kind would read it


class Embedded(NamedTuple):
    """A condition as a network takes it; None stands for what the kind does not use."""

    vector: Float[Array, "b d"] | None = None  # added to the embedding of time
    augmentation: Float[Array, "b d"] | None = None  # likewise; zero where the image is as it was
    tokens: Float[Array, "b m d"] | None = None  # beside those of the image
    channels: Float[Array, "b h w k"] | None = None  # beside those of x
    mask: Bool[Array, "b m"] | None = None  # which tokens are there; default: all of them


class Mixture(NamedTuple):
    """Two conditions mixed by their velocities: (1 - fraction) v(first) + fraction v(second)."""

    first: PyTree  # (n, ...)
    second: PyTree  # (n, ...)
    fraction: Any  # (n,) in [0, 1]


@runtime_checkable
class Condition(Protocol):
    """A kind of condition, with its facts about the data. Immutable and hashable, as a static argument must be.

    A class that derives from this one has to define the members that have no default here.
    """

    # How conditions of samples can be drawn; the first is the default.
    DRAW_MODES: ClassVar[tuple[str, ...]] = ("uniform",)
    # Whether conditions of samples are rows of the training data, which a run keeps (utils/runs/pool.py), rather than
    # what `draw` returns.
    DRAWS_ROWS: ClassVar[bool] = False

    @property
    def spec(self) -> PyTree:
        """Shapes and dtypes of the condition of one example: a tree of jax.ShapeDtypeStruct."""
        ...

    def read(self, example: Mapping[str, Any]) -> PyTree:
        """Returns the condition of an example of a data source: the values under the keys that this kind reads."""
        ...

    def null(self, count: int) -> PyTree:
        """Returns `count` times "no condition", prepared, as training drops it and guidance leads away from it."""
        ...

    def without(self, condition: PyTree) -> PyTree:
        """Returns conditions (n, ...) of which nothing is given."""
        return self.null(count_rows(condition))

    @property
    def num_parts(self) -> int:
        """The number of conditions of which it consists, which can be dropped one by one; 0 of a single one."""
        return 0

    def drop_each(self, drops: Bool[Array, "n parts"], condition: PyTree) -> PyTree:
        """Returns the conditions (n, ...) without the parts for which `drops` is true."""
        return condition

    def draw(
        self, key: Key[Array, ""], indices: Int[Array, " n"], mode: str = "uniform", weights: Array | None = None
    ) -> PyTree:
        """Returns the conditions of samples by number; row j is a function of (key, indices[j]) alone.

        `mode` is one of DRAW_MODES. `weights` says how often each is wanted, where a kind counts its conditions. It is
        not called for a kind that DRAWS_ROWS.
        """
        raise TypeError(f"{type(self).__name__} draws rows of the data, of which there are none")

    def embedder(self, width: int, dtype: Any) -> Callable[[PyTree], Embedded]:
        """Returns the module, or a function of modules, prepared condition (b, ...) -> Embedded, `width` wide, for use
        inside a network."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Returns the facts that a run records, for `from_json`."""
        return {}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Condition":
        """Returns the condition of a run that recorded `data`, in which there may be other facts too."""
        return cls()

    def fit(self, num_classes: int) -> "Condition":
        """Returns the condition for a model of --model.num_classes. Raises UserError where they do not fit."""
        return self

    def fit_latents(self, image_shape: tuple[int, int, int], latent_shape: tuple[int, int, int]) -> "Condition":
        """Returns the condition for a model of images and latents (h, w, c). Raises UserError where they do not fit."""
        return self

    def prepare(self, codec: Any, condition: PyTree, change: Callable[[Array], Array] | None = None) -> PyTree:
        """Returns conditions (n, ...) of `spec` as networks take them, encoded by the codec, perhaps; those that are
        prepared already, as they are. `change`, a pytree, is what augmentation does to images (n, h, w, c)."""
        return jax.tree.map(lambda leaf, rows: jnp.asarray(rows, leaf.dtype), self.spec, condition)

    def mirror(self, condition: PyTree) -> PyTree:
        """Returns the condition of one image, mirrored left to right, from that of the image as it was."""
        return condition

    def inherit(self, source: "Condition") -> "Condition":
        """Returns the condition of data for a run that starts from one with the condition `source`: with what its
        parameters rely on, such as means and standard deviations."""
        return self

    def accepts(self, other: "Condition") -> bool:
        """Whether conditions of data of this `other` kind mean the same to a model with this one."""
        return self == other

    def check(self, values: Any) -> PyTree:
        """Returns the conditions (n, ...) that a user gives in Python, as NumPy arrays. Raises UserError for others."""
        try:
            return jax.tree.map(_as_rows, self.spec, values)
        except (TypeError, ValueError) as error:
            raise UserError(f"conditions={values!r}: {error}") from None

    def parse(self, text: str) -> PyTree:
        """Returns the conditions (n, ...) that a user writes as --classes. Raises UserError for others."""
        instead = "give --condition_file FILE.npz, or leave the flag out"
        if self.fields:
            instead = f'use --condition "{",".join(f"{name}=..." for name in self.fields)}"'
        raise UserError(f"the run's conditions are no classes; {instead}")

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of what a user gives for one condition, as --condition NAME=VALUE; none if it cannot be written so."""
        return ()

    def from_fields(self, rows: Sequence[Mapping[str, str]]) -> PyTree:
        """Returns the conditions (n, ...) of texts for each of `fields`. Raises UserError for others."""
        raise UserError("the run's conditions cannot be written; give --condition_file FILE.npz, or leave the flag out")

    def to_columns(self, condition: PyTree) -> dict[str, np.ndarray]:
        """Returns the arrays of conditions (n, ...) under the names by which npz:FILE reads them.

        A file of samples has them beside the images.
        """
        # ADM's names: of classes, arr_1 is that of the labels.
        return {f"arr_{number}": np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(condition), start=1)}

    @property
    def typical(self) -> dict[str, str]:
        """Texts of those `fields` that have a typical value, for a sweep through another field."""
        return {}

    def remarks(self, condition: PyTree) -> list[str]:
        """Returns remarks on conditions (n, ...) that a user gives, such as values that no training image had."""
        return []

    def titles(self, condition: PyTree) -> list[str]:
        """Returns how a figure names each of the conditions (n, ...)."""
        # The numbers themselves, for want of names.
        rows = zip(*(np.asarray(leaf) for leaf in jax.tree.leaves(condition)), strict=True)
        return [", ".join(np.array2string(value, precision=3) for value in row) for row in rows]

    def find_part(self, kind: type[KindT]) -> KindT | None:
        """Returns the condition, or that one of several, which is of a kind; None where there is none."""
        return self if isinstance(self, kind) else None

    def pictures(self, condition: PyTree) -> UInt8[np.ndarray, "n h w c"] | None:
        """Returns conditions (n, ...) as images, which figures show beside those drawn; None for a kind without any."""
        return None

    def mix(self, first: PyTree, second: PyTree, fraction: Any) -> PyTree | Mixture:
        """Returns conditions (n, ...) between two, at each `fraction` (n,) of the way."""
        # By velocity, which works for every kind; a kind whose arrays can be averaged may do that instead.
        return Mixture(first, second, fraction)

    def show(self, number: int, count: int) -> PyTree:
        """Returns the `count` conditions that the panels of evaluation `number` show."""
        # The same at every evaluation, so that its panels can be compared.
        return self.draw(jax.random.key(0), jnp.arange(count))

    def summary(self) -> str:
        """Returns a few words on what there is, for the line about a run's data."""
        return ""

    def remark(self) -> str:
        """Returns a remark for users who sample the model; empty where there is none."""
        return ""


# Kinds by the names that runs record. A new one is one file and one line.
CONDITIONS: dict[str, type[Condition]] = {}


def record_condition(condition: Condition) -> dict[str, Any]:
    """Returns a run's record: {"condition": kind, shapes and dtypes}, and the kind's own facts beside it.

    Raises ValueError for a kind that is not registered: the run could not be sampled.
    """
    # The exact type: a subclass under its parent's name would be restored as the parent.
    kinds = [name for name, kind in CONDITIONS.items() if type(condition) is kind]
    if not kinds:
        raise ValueError(f"{type(condition).__name__} is not in CONDITIONS; register it under a name")
    arrays = [[list(leaf.shape), str(leaf.dtype)] for leaf in jax.tree.leaves(condition.spec)]
    return {"condition": {"kind": kinds[0], "arrays": arrays}, **condition.to_json()}


def restore_condition(data: Mapping[str, Any]) -> Condition:
    """Returns the condition that `record_condition` recorded.

    Raises UserError for a kind that is not registered, or whose arrays are not the recorded ones.
    """
    # The kind may be defined outside of this repository, and must be registered by then.
    kind = recorded_kind(data)
    if kind not in CONDITIONS:
        raise unknown_name(f"the run's condition {kind!r}", kind, CONDITIONS)

    # Its definition may have changed since; the parameters expect the arrays of then.
    condition = CONDITIONS[kind].from_json(data)
    found = record_condition(condition)["condition"]["arrays"]
    recorded = data.get("condition", {}).get("arrays", found)
    if found != recorded:
        raise UserError(f"the run's condition has arrays {recorded}, but {kind!r} is {found}")
    return condition


def recorded_kind(data: Mapping[str, Any]) -> str:
    """Returns the name of a recorded kind; that of older runs, which name none, is the class."""
    return data.get("condition", {"kind": "class"})["kind"]


def check_draw_mode(condition: Condition, mode: str) -> None:
    """Raises UserError for a value of --labels (`label_mode` in Python) that a kind of condition does not have."""
    modes = condition.DRAW_MODES
    if mode not in modes:
        raise UserError(
            f"--labels={mode}: the run's conditions are drawn {' or '.join(modes)}; use --labels {modes[0]}"
        )


class _Probe(nn.Module):
    condition: Condition
    width: int

    @nn.compact
    def __call__(self):
        return self.condition.embedder(self.width, jnp.float32)(self.condition.null(1))


def embedded_shapes(condition: Condition, width: int) -> Embedded:
    """Returns what a kind brings to a network so wide: the shapes of one condition, (1, ...), and None as it has it."""
    found, _ = jax.eval_shape(_Probe(condition, width).init_with_output, jax.random.key(0))
    return found


# --- Rows of a tree of arrays ---


def count_rows(condition: PyTree) -> int:
    """Returns how many conditions a tree of arrays (n, ...) holds."""
    return len(jax.tree.leaves(condition)[0])


def number_rows(condition: Condition, values: PyTree) -> tuple[Int[np.ndarray, " n"], list[str]]:
    """Returns (the place of each condition (n, ...) among the distinct ones, in ascending order; their titles)."""
    # A row for each condition, of all its numbers, so that whole conditions are compared.
    columns = [np.asarray(leaf).reshape(count_rows(values), -1) for leaf in jax.tree.leaves(values)]
    _, first, places = np.unique(np.concatenate(columns, axis=1), axis=0, return_index=True, return_inverse=True)
    return places.reshape(-1), condition.titles(jax.tree.map(lambda rows: np.asarray(rows)[first], values))


def take_rows(condition: PyTree, places: Any) -> PyTree:
    """Returns the rows at `places`: numbers of rows, a mask, or a slice."""
    return jax.tree.map(lambda rows: rows[places], condition)


def drop_rows(is_dropped: Bool[Array, " b"], null: PyTree, condition: PyTree) -> PyTree:
    """Returns `null` in the rows that are dropped, and `condition` in the others."""

    # The mask broadcasts over the other axes of each leaf.
    def choose(none, given):
        return jnp.where(is_dropped.reshape(-1, *[1] * (given.ndim - 1)), none, given)

    return jax.tree.map(choose, null, condition)


def resize_rows(condition: PyTree, count: int) -> PyTree:
    """Returns `count` rows as NumPy arrays, from the first on and around."""
    return jax.tree.map(lambda rows: np.resize(rows, (count, *np.shape(rows)[1:])), condition)


def read_example(condition: Condition, example: Mapping[str, Any]) -> PyTree:
    """Returns the condition of an example of a data source, which may have been read before."""
    return example[RECORDED] if RECORDED in example else condition.read(example)


def read_rows(condition: Condition, examples: Iterable[Mapping[str, Any]], count: int) -> PyTree:
    """Returns the conditions (count, ...) of `count` examples of a data source, as NumPy arrays."""
    rows = empty_rows(condition, count)
    for place, example in enumerate(examples):
        values = read_example(condition, example)
        jax.tree.map(lambda leaf, value, place=place: operator.setitem(leaf, place, value), rows, values)
    return rows


def empty_rows(condition: Condition, count: int) -> PyTree:
    """Returns NumPy arrays for `count` conditions, to be filled."""
    return jax.tree.map(lambda leaf: np.empty((count, *leaf.shape), leaf.dtype), condition.spec)


def _as_rows(leaf: jax.ShapeDtypeStruct, values: Any) -> np.ndarray:
    rows = np.asarray(values, leaf.dtype)
    if rows.shape[1:] != leaf.shape or not len(rows):
        raise ValueError(f"the shape is {rows.shape}, not (n{''.join(f', {size}' for size in leaf.shape)})")
    return rows
