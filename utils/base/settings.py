"""Dataclass fields that are settings of a run: default, help and bounds stand once, where the value is used.

The flags, the checks of saved configurations and the names in a run's config.json follow from them.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from types import UnionType
from typing import Any

from utils.base.messages import UserError

MAX_INTEGER = 2**31 - 1  # the largest integer that compiled functions take


def setting(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    *,
    choices: Collection[str] = (),
    is_fixed: bool = True,
    flag: str | None = None,
    is_path: bool = False,
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns a field of a frozen dataclass, with its default and what its flag needs.

    `choices`: the allowed values, perhaps of a registry, which is read when the flags are defined. `is_fixed`: a
    trained model is bound to the value, so that a run is not resumed under another. `flag`: the setting's name, where
    it is not that of the field in the dataclass's group. `is_path`: a leading ~ stands for a home folder. `parse`: from
    a value in any form, or text, to that of the field; raises ValueError, which says what to use.
    """
    # On the field itself, where `settings_of` finds it; fields without help are no settings.
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "is_fixed": is_fixed, "flag": flag}
    return dataclasses.field(default=default, metadata={**metadata, "is_path": is_path, "parse": parse})


def settings_of(config_class: Any, group: str = "") -> dict[str, dataclasses.Field]:
    """Returns {name: field} of a dataclass's settings, named as flags are: `group.field` unless the field says."""
    prefix = f"{group}." if group else ""
    fields = [field for field in dataclasses.fields(config_class) if "help" in field.metadata]
    return {field.metadata["flag"] or f"{prefix}{field.name}": field for field in fields}


def kind_of(field: dataclasses.Field) -> type:
    """Returns the type of a setting's value where it has one: int, float, str or tuple (of texts)."""
    # Of "int | None", the part that is not None; of tuple[str, ...], tuple.
    kinds = typing.get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
    kind: Any = next(kind for kind in kinds if kind is not type(None))
    return typing.get_origin(kind) or kind


def is_optional(field: dataclasses.Field) -> bool:
    """Returns whether a setting may have no value, None."""
    return isinstance(field.type, UnionType)


def check_setting(name: str, field: dataclasses.Field, value: Any) -> Any:
    """Returns the value of a setting as its dataclass holds it: a list as a tuple, and an integer as a float if the
    field is one. Raises UserError for another type, a number out of bounds, or a value that is no choice."""
    kind, metadata = kind_of(field), field.metadata
    # None leaves a setting open, where its type allows that.
    if value is None and is_optional(field):
        return None
    # Values of a form of their own.
    if metadata["parse"]:
        try:
            return metadata["parse"](value)
        except ValueError as error:
            raise UserError(f"--{name}={value}: {error}") from None
    # Listed values, which may be of any type.
    if metadata["choices"]:
        if value not in metadata["choices"]:
            raise UserError(f"--{name}={value}: use one of {', '.join(metadata['choices'])}")
        return value
    # Texts, and lists of them.
    if kind is tuple and isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
        return tuple(value)
    if kind is str and isinstance(value, str):
        return value
    # Numbers, within bounds; no flag takes one that is not finite.
    if kind in (int, float) and isinstance(value, (int, float) if kind is float else int):
        low = -math.inf if metadata["low"] is None else metadata["low"]
        high = math.inf if metadata["high"] is None else metadata["high"]
        if not low <= value <= high or not math.isfinite(value):
            raise UserError(f"--{name}={value}: use a number from {low:g} to {high:g}")
        return kind(value)

    # No kind has fitted.
    words: dict[type, str] = {int: "a whole number", float: "a number", str: "a text", tuple: "a list of texts"}
    raise UserError(f"--{name}={value!r}: use {words[kind]}")


def same_definition(first: dataclasses.Field, second: dataclasses.Field) -> bool:
    """Returns whether two fields are one setting: of the same type, default, bounds, choices and help."""

    def definition(field: dataclasses.Field) -> tuple[Any, ...]:
        return (field.type, field.default, *(field.metadata[name] for name in ("help", "low", "high", "choices")))

    return definition(first) == definition(second)


def merge_settings(what: str, registry: Mapping[str, Any], group: str) -> dict[str, dataclasses.Field]:
    """Returns {name: field} of all classes in a registry, each name once.

    Raises UserError if two of them define one name in different ways: a flag can have only one meaning.
    """
    merged: dict[str, dataclasses.Field] = {}
    owners: dict[str, str] = {}
    for owner, config_class in registry.items():
        for name, field in settings_of(config_class, group).items():
            if name in merged and not same_definition(merged[name], field):
                raise UserError(
                    f"--{name} is defined in different ways by the {what} {owners[name]} and {owner}; rename the "
                    "field of one"
                )
            # Classes may share a setting; one definition serves all of them.
            merged[name] = field
            owners[name] = owner
    return merged


def find_entry(name: str, value: str, registry: Mapping[str, Any]) -> Any:
    """Returns the entry `value` of a registry; raises UserError, naming the flag, where there is none."""
    if value not in registry:
        raise unknown_name(f"--{name}={value}", value, registry)
    return registry[value]


def suggest_name(name: str, known: Collection[str], prefix: str = "") -> str:
    """Returns "; did you mean X?", of the known name that is most like an unknown one; nothing if none is."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def unknown_name(given: str, name: str, known: Iterable[str], guess: str | None = None) -> UserError:
    """Returns the error for a name that a registry does not have.

    `given` says where the name stands, such as --flag=name; `known` are those that there are, as a user writes them;
    `guess` is what was probably meant, where that is more than a slip of the fingers.
    """
    known = list(known)
    if hint := f"; did you mean {guess}?" if guess else suggest_name(name, known):
        return UserError(f"{given} is unknown{hint} Known are {', '.join(known)}")
    return UserError(f"{given} is unknown; known are {', '.join(known)}. Register it first (docs/change_this.md)")


def check_made(made: Any, kind: type, maker: str) -> None:
    """Raises UserError where what a registered function, `maker`, has returned is not of the kind that it is for."""
    if not isinstance(made, kind):
        raise UserError(f"{maker} returned no {kind.__name__}; docs/change_this.md shows one that does")


def flatten_groups(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {name: value} of settings in groups, `group.name` as flags are named: {model: {depth: 12}} has
    model.depth. One level, as flags have. Raises UserError for a setting that is given in both forms."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        group = value if isinstance(value, Mapping) else None
        settings = {str(name): value} if group is None else {f"{name}.{leaf}": group[leaf] for leaf in group}
        twice = flat.keys() & settings.keys()
        if twice:
            raise UserError(f"{min(twice)} is given twice, nested and with a dot; give it once")
        flat |= settings
    return flat
