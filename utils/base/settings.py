"""Fields of dataclasses that are flags too: default, help and bounds stand once, where the value is used."""

import dataclasses
from collections.abc import Collection
from typing import Any


def setting(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    *,
    choices: Collection[str] = (),
    is_fixed: bool = True,
    flag: str | None = None,
) -> Any:
    """A field of a frozen dataclass, with its default and what its flag needs.

    `choices`: the allowed values, perhaps of a registry, which is read when the flags are defined. `is_fixed`: a
    trained model is bound to the value, so that a run is not resumed under another. `flag`: the flag's name, where it
    is not that of the field in the dataclass's group.
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "is_fixed": is_fixed, "flag": flag}
    return dataclasses.field(default=default, metadata=metadata)
