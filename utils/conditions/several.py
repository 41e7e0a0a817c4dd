"""Several conditions at once, such as a class and numbers: each of its own kind, embedded by itself."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from utils.base.messages import UserError
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import CONDITIONS, Condition, Embedded, count_rows, drop_rows


def join(found: Sequence[Embedded]) -> Embedded:
    """Returns several conditions as one: vectors are summed, tokens and channels stand side by side."""

    def concatenate(values: Sequence[Any], axis: int) -> Any:
        present = [value for value in values if value is not None]
        return jnp.concatenate(present, axis) if present else None

    vectors = [embedded.vector for embedded in found if embedded.vector is not None]
    tokens = [(embedded.tokens, embedded.mask) for embedded in found if embedded.tokens is not None]
    # Tokens without a mask are all there; without any mask, there is none.
    mask = None
    if any(there is not None for _, there in tokens):
        masks = [jnp.ones(rows.shape[:2], bool) if there is None else there for rows, there in tokens]
        mask = jnp.concatenate(masks, axis=1)
    return Embedded(
        vector=sum(vectors[1:], vectors[0]) if vectors else None,
        tokens=concatenate([rows for rows, _ in tokens], 1),
        channels=concatenate([embedded.channels for embedded in found], -1),
        mask=mask,
    )


@dataclasses.dataclass(frozen=True)
class SeveralCondition(Condition):
    """Conditions of different kinds, {kind: (n, ...)}. Those of samples are rows of the data, so that what belongs
    together stays together."""

    DRAWS_ROWS: ClassVar = True

    parts: tuple[tuple[str, Condition], ...] = ()  # by the names of CONDITIONS

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in label order; none without a class among the parts."""
        return next((part.class_names for _, part in self.parts if isinstance(part, ClassCondition)), ())

    # --- Arrays ---

    @property
    def spec(self) -> dict[str, PyTree]:
        return {name: part.spec for name, part in self.parts}

    def read(self, example: Mapping[str, Any]) -> dict[str, PyTree]:
        return {name: part.read(example) for name, part in self.parts}

    def null(self, count: int) -> dict[str, PyTree]:
        return {name: part.null(count) for name, part in self.parts}

    def embedder(self, width: int, dtype: Any = jnp.float32) -> Callable[[PyTree], Embedded]:
        # No module: parameters of the parts have the names that they have alone, so that fine-tuning finds them.
        embedders = [(name, part.embedder(width, dtype)) for name, part in self.parts]
        return lambda condition: join([embed(condition[name]) for name, embed in embedders])

    def fit(self, num_classes: int) -> "SeveralCondition":
        return self._map(lambda name, part: part.fit(num_classes))

    def fit_latents(self, image_shape: tuple[int, int, int], latent_shape: tuple[int, int, int]) -> "SeveralCondition":
        return self._map(lambda name, part: part.fit_latents(image_shape, latent_shape))

    def prepare(self, codec: Any, condition: PyTree, change: Any = None) -> dict[str, PyTree]:
        return {name: part.prepare(codec, condition[name], change) for name, part in self.parts}

    def mirror(self, condition: PyTree) -> dict[str, PyTree]:
        return {name: part.mirror(condition[name]) for name, part in self.parts}

    def inherit(self, source: Condition) -> "SeveralCondition":
        known = dict(source.parts) if isinstance(source, SeveralCondition) else {}
        return self._map(lambda name, part: part.inherit(known.get(name, source)))

    def accepts(self, other: Condition) -> bool:
        if not isinstance(other, SeveralCondition) or other.spec.keys() != self.spec.keys():
            return False
        theirs = dict(other.parts)
        return all(part.accepts(theirs[name]) for name, part in self.parts)

    @property
    def num_parts(self) -> int:
        return len(self.parts)

    def drop_each(self, drops: Bool[Array, "b parts"], condition: PyTree) -> PyTree:
        null = self.null(len(drops))
        return {
            name: drop_rows(drops[:, place], null[name], condition[name]) for place, (name, _) in enumerate(self.parts)
        }

    def to_columns(self, condition: PyTree) -> dict[str, np.ndarray]:
        columns: dict[str, np.ndarray] = {}
        for name, part in self.parts:
            if isinstance(part, ClassCondition):
                columns |= {"labels": np.asarray(condition[name]), "class_names": np.array(part.class_names)}
            else:
                columns |= part.to_columns(condition[name])
        return columns

    def _map(self, function: Any) -> "SeveralCondition":
        return SeveralCondition(tuple((name, function(name, part)) for name, part in self.parts))

    # --- Words ---

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(field for _, part in self.parts for field in part.fields)

    @property
    def typical(self) -> dict[str, str]:
        return {field: text for _, part in self.parts for field, text in part.typical.items()}

    def from_fields(self, rows: Sequence[Mapping[str, str]]) -> dict[str, PyTree]:
        return {name: part.from_fields(rows) for name, part in self.parts}

    def check(self, values: Any) -> dict[str, PyTree]:
        """Returns the conditions of {kind: what that kind takes}. Raises UserError for others."""
        names = [name for name, _ in self.parts]
        if not isinstance(values, Mapping) or set(values) != set(names):
            raise UserError(f"conditions: give a mapping of {', '.join(names)}, each with n conditions")
        found = {name: part.check(values[name]) for name, part in self.parts}
        counts = {name: count_rows(rows) for name, rows in found.items()}
        if len(set(counts.values())) > 1:
            raise UserError(f"conditions: {counts} are not as many of each")
        return found

    def titles(self, condition: PyTree) -> list[str]:
        titles = (part.titles(condition[name]) for name, part in self.parts)
        return [", ".join(filter(None, texts)) for texts in zip(*titles, strict=True)]

    def find_part(self, kind: Any) -> Any:
        return next((part for _, part in self.parts if isinstance(part, kind)), None)

    def pictures(self, condition: PyTree) -> Any:
        found = (part.pictures(condition[name]) for name, part in self.parts)
        return next((pictures for pictures in found if pictures is not None), None)

    def remarks(self, condition: PyTree) -> list[str]:
        return [remark for name, part in self.parts for remark in part.remarks(condition[name])]

    def summary(self) -> str:
        return ", ".join(filter(None, (part.summary() for _, part in self.parts)))

    def remark(self) -> str:
        return "; ".join(filter(None, (part.remark() for _, part in self.parts)))

    # --- A run ---

    def to_json(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"parts": [name for name, _ in self.parts]}
        for _, part in self.parts:
            facts |= part.to_json()
        return facts

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SeveralCondition":
        """Returns the recorded condition. Raises UserError for parts that are not registered, or not of a record."""
        names = data.get("parts")
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not is_list or not names or len(set(names)) < len(names):
            raise UserError(f"the run's condition has parts {str(names)[:100]}, which is no list of kinds")
        if unknown := [name for name in names if name not in CONDITIONS or name == "several"]:
            raise UserError(f"the run's condition has a part {str(unknown[0])[:100]!r}, which is not registered")
        return cls(tuple((name, CONDITIONS[name].from_json(data)) for name in names))


CONDITIONS["several"] = SeveralCondition
