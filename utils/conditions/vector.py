"""Numbers as the condition of a model: an angle, a temperature, (cos, sin), whatever was measured beside each image."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from utils.base.messages import UserError
from utils.conditions.condition import CONDITIONS, Condition, Embedded
from utils.kernels.layers import Dense

MAX_NUMBERS = 1024  # of a condition
MAX_LISTED = 5  # names in a message

Values = dict[str, Shaped[Any, "n ..."]]  # {"value": float32 (n, k), "is_given": bool (n,)}


class VectorEmbed(nn.Module):
    """Numbers {"value": (b, k), "is_given": (b,)} -> vectors (b, d): standardised, then two layers.

    Rows that are not given have a vector of their own, which is learned. Both start at zero, so that a network which is
    fine-tuned from a run without this condition starts as that run.
    """

    means: tuple[float, ...]
    stds: tuple[float, ...]
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, condition):
        # Zeros where nothing is given, so that nothing can come from there.
        is_given = condition["is_given"][:, None]
        value = (condition["value"] - jnp.array(self.means)) / jnp.array(self.stds)
        value = jnp.where(is_given, value, 0)

        # Float32 up to the first activation: bfloat16 cannot tell 0.999 from 1.
        hidden = Dense(self.width, jnp.float32, nn.initializers.normal(1.0), name="dense_0")(value)
        zeros = nn.initializers.zeros
        vector = Dense(self.width, self.dtype, zeros, name="dense_1")(nn.silu(hidden))
        null = self.param("null", zeros, (self.width,)).astype(self.dtype)
        return Embedded(vector=jnp.where(is_given, vector, null))


@dataclasses.dataclass(frozen=True)
class VectorCondition(Condition):
    """Numbers by name, {"value": float32 (n, k), "is_given": bool (n,)}; rows that are not given mean "no condition".

    The mean, standard deviation and range of each number are those of the training data.
    """

    DRAWS_ROWS: ClassVar = True

    names: tuple[str, ...] = ()
    means: tuple[float, ...] = ()
    stds: tuple[float, ...] = ()
    lows: tuple[float, ...] = ()
    highs: tuple[float, ...] = ()

    @classmethod
    def of_rows(cls, rows: Float[np.ndarray, "n k"], names: Sequence[str] | None = None) -> "VectorCondition":
        """Returns the condition whose training data are `rows`; default names are c0, c1, ...

        Raises UserError, which does not name the data, for NaN, infinity, names that do not fit, and a number that is
        the same in all rows.
        """
        # Names, which users write: each by itself, and none that the syntax of --condition would cut.
        count = rows.shape[1]
        names = tuple(f"c{i}" for i in range(count)) if names is None else tuple(map(str, names))
        if not 1 <= count <= MAX_NUMBERS:
            raise UserError(f"a condition is of 1 to {MAX_NUMBERS} numbers, not {count}")
        if len(names) != count:
            raise UserError(f"there are {len(names)} names ({_list(names)}) for {count} numbers; give one for each")
        for name in names:
            if not name or set(name) & set("=,;:+\"'") or name != name.strip() or names.count(name) > 1:
                raise UserError(f"{name!r} cannot name a number: use each name once, without = , ; : + and quotes")

        # Numbers.
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            raise UserError(
                f"the conditions of {np.count_nonzero(~finite):,} of {len(rows):,} rows are NaN or infinite (the first "
                f"is row {np.argmin(finite)}); leave these rows out"
            )
        constant = [
            name for name, low, high in zip(names, rows.min(axis=0), rows.max(axis=0), strict=True) if low == high
        ]
        if constant:
            are, them = ("are", "them") if len(constant) > 1 else ("is", "it")
            raise UserError(f"{_list(constant)} {are} the same in all rows of the training data; leave {them} out")

        # Statistics in float64, recorded as float32.
        def numbers(values):
            return tuple(map(float, np.asarray(values, np.float32)))

        wide = rows.astype(np.float64)
        return cls(
            names,
            *(numbers(values) for values in (wide.mean(axis=0), wide.std(axis=0), wide.min(axis=0), wide.max(axis=0))),
        )

    # --- Arrays ---

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        count = len(self.names)
        return {"value": jax.ShapeDtypeStruct((count,), jnp.float32), "is_given": jax.ShapeDtypeStruct((), jnp.bool_)}

    def read(self, example: Mapping[str, Any]) -> Any:
        return {"value": example["conditions"], "is_given": True}

    def null(self, count: int) -> dict[str, Array]:
        return {"value": jnp.zeros((count, len(self.names))), "is_given": jnp.zeros(count, bool)}

    def embedder(self, width: int, dtype: Any = jnp.float32) -> VectorEmbed:
        return VectorEmbed(self.means, self.stds, width, dtype, name="vector_embed")

    def inherit(self, source: Condition) -> Condition:
        return source if self.accepts(source) else self

    def accepts(self, other: Condition) -> bool:
        return isinstance(other, VectorCondition) and self.names == other.names

    def mix(self, first: Any, second: Any, fraction: Any) -> dict[str, Any]:
        """Returns the numbers between two conditions, which differ by their values alone."""
        weight = np.asarray(fraction, np.float32)[:, None]
        value = (1 - weight) * first["value"] + weight * second["value"]
        return {"value": value, "is_given": first["is_given"] & second["is_given"]}

    def to_columns(self, condition: Any) -> dict[str, np.ndarray]:
        return {"conditions": np.asarray(condition["value"]), "condition_names": np.array(self.names)}

    # --- Words ---

    @property
    def fields(self) -> tuple[str, ...]:
        return self.names

    @property
    def typical(self) -> dict[str, str]:
        return {name: f"{mean:.4g}" for name, mean in zip(self.names, self.means, strict=True)}

    def from_fields(self, rows: Sequence[Mapping[str, str]]) -> dict[str, np.ndarray]:
        return self._given(np.array([[_read_number(row, name) for name in self.names] for row in rows], np.float32))

    def check(self, values: Any) -> dict[str, np.ndarray]:
        """Returns conditions of numbers (n, k), in the order of `names`, or of a column for each name.

        Raises UserError for others, and for NaN.
        """
        if isinstance(values, Mapping) and values.keys() == self.spec.keys():
            tree: Any = super().check(values)
            return self._given(tree["value"], tree["is_given"])
        try:
            columns = [values[name] for name in self.names] if isinstance(values, Mapping) else None
            rows = np.asarray(values if columns is None else np.stack(columns, axis=1), np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"conditions={values!r}: {error}; give an array (n, {len(self.names)})") from None
        if rows.ndim != 2 or rows.shape[1] != len(self.names) or not len(rows):
            raise UserError(
                f"conditions: the shape is {rows.shape}, not (n, {len(self.names)}), for {_list(self.names)}"
            )
        return self._given(rows)

    def _given(self, rows: Float[np.ndarray, "n k"], is_given: Any = True) -> dict[str, np.ndarray]:
        """Returns the numbers, zeros where none are given. Raises UserError for NaN and infinity."""
        given = np.broadcast_to(is_given, len(rows))
        rows = np.where(given[:, None], rows, np.float32(0))
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            raise UserError(f"the condition in row {np.argmin(finite)} (from 0) is NaN or infinite")
        return {"value": rows, "is_given": given}

    def titles(self, condition: Any) -> list[str]:
        """Returns `angle=0.3, mass=2` for each condition, to three digits."""
        values = np.asarray(condition["value"])
        given: Bool[np.ndarray, " n"] = np.asarray(condition["is_given"])
        texts = (
            ", ".join(f"{name}={value:.3g}" for name, value in zip(self.names, row, strict=True)) for row in values
        )
        return [text if is_given else "no condition" for text, is_given in zip(texts, given, strict=True)]

    def remarks(self, condition: Any) -> list[str]:
        """Returns a remark for each number that leaves its range in the training data."""
        # A margin of a rounding: ends of the range are written in decimals.
        found = []
        given = np.asarray(condition["value"])[np.asarray(condition["is_given"])]
        for name, column, low, high in zip(self.names, given.T, self.lows, self.highs, strict=True):
            margin = 1e-5 * (high - low)
            outside = column[(column < low - margin) | (column > high + margin)]
            if len(outside):
                found.append(f"{name}={outside[0]:.4g} is outside of the training data, {low:.4g} to {high:.4g}")
        return found

    def summary(self) -> str:
        return f"conditions {_list(self.names)}"

    # --- A run ---

    def to_json(self) -> dict[str, Any]:
        return {"vector": {name: list(values) for name, values in dataclasses.asdict(self).items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "VectorCondition":
        """Returns the recorded condition. Raises UserError for a record that no training can have written."""
        record = data.get("vector")
        fields = [field.name for field in dataclasses.fields(cls)]
        try:
            columns = [tuple(record[name]) for name in fields]  # ty: ignore[not-subscriptable]
            found = cls(columns[0], *(tuple(map(float, values)) for values in columns[1:]))
            is_good = 1 <= len(found.names) <= MAX_NUMBERS and {len(values) for values in columns} == {len(found.names)}
            is_good &= all(np.isfinite(columns[1:]).ravel()) and min(found.stds) > 0
            is_good &= all(isinstance(name, str) for name in found.names)
        except (TypeError, KeyError, ValueError, IndexError):
            is_good = False
        if not is_good:
            raise UserError(f"the run's condition, {str(record)[:100]}, is no record of names, means, stds and ranges")
        return found


CONDITIONS["vector"] = VectorCondition


def _read_number(row: Mapping[str, str], name: str) -> float:
    text = row[name].strip()
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise UserError(f"{name}={text} is no number")
    return number


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + ", ..." * (len(names) > MAX_LISTED)
