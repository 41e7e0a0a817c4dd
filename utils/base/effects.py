"""Rules about which settings have no effect beside which others."""

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from utils.base.messages import UserError


class Rule(NamedTuple):
    """Settings without effect where `applies` to the values of all settings and the facts that a program adds.

    `reason` completes "--name=value has no effect ..."; {names} in it are values of settings or facts.
    """

    names: tuple[str, ...]  # "model.*" stands for all settings of that group
    reason: str
    applies: Callable[[Any], bool]


def check_effects(rules: Iterable[Rule], values: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises UserError for a setting among `given`, {name: value}, that has no effect.

    `values` has those of all settings, groups nested, and facts such as is_new; rules read them as `values.is_new`.
    """
    known = SimpleNamespace(**values)
    for rule in rules:
        if rule.applies(known):
            names = [name for pattern in rule.names for name in _expand(pattern, given)]
            refuse_ignored(names, given, rule.reason.format(**values))


def refuse_ignored(names: Iterable[str], given: Mapping[str, Any], reason: str) -> None:
    """Raises UserError for a setting among `names` that is `given`, {name: value}, although it has no effect."""
    for name in names:
        if name in given:
            value = given[name]
            value = ",".join(value) if isinstance(value, (list, tuple)) else value
            raise UserError(f"--{name}={value} has no effect {reason}; leave it out")


def _expand(pattern: str, given: Iterable[str]) -> list[str]:
    """Returns the names that a rule means by `pattern`, of a group those that are given."""
    group, is_group, _ = pattern.partition("*")
    return [name for name in given if name.startswith(group)] if is_group else [pattern]
