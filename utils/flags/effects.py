"""Which flag has no effect beside which other settings: one table, read before anything compiles."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from utils.flags.reading import refuse_ignored


class Rule(NamedTuple):
    """Flags without effect where `applies` to the values of all flags and the facts that a program adds.

    `reason` completes "--flag=value has no effect ..."; {names} in it are values of flags or facts.
    """

    flags: tuple[str, ...]
    reason: str
    applies: Callable[[Any], bool]


# {program: its rules}, in the order in which they are looked at.
RULES: dict[str, tuple[Rule, ...]] = {}


def check_effects(rules: Iterable[Rule], config: ConfigDict, **facts: Any) -> None:
    """Raises UserError for a flag that the user gave although it has no effect.

    `facts` are what a program knows beside its flags, such as is_latent=True; rules read them as `values.is_latent`.
    """
    known = {**config.to_dict(), **facts}
    values = SimpleNamespace(**known)
    for rule in rules:
        if rule.applies(values):
            refuse_ignored(rule.flags, rule.reason.format(**known))
