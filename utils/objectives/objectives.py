"""The objectives. One more is one file that implements `Objective`, and one line here."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from utils.base.errors import UserError
from utils.objectives.diffusion import Diffusion
from utils.objectives.flow_matching import FlowMatching
from utils.objectives.mean_flow import MeanFlow
from utils.objectives.objective import Objective
from utils.objectives.shortcut import Shortcut

# Frozen dataclasses that implement Objective.
OBJECTIVES: dict[str, Any] = {
    "flow_matching": FlowMatching,
    "diffusion": Diffusion,
    "shortcut": Shortcut,
    "mean_flow": MeanFlow,
}


def flag_of(field: dataclasses.Field) -> str:
    """The flag of an objective's field."""
    return field.metadata["flag"] or f"objective.{field.name}"


def objective_fields() -> Iterator[dataclasses.Field]:
    """The fields of all objectives, each flag once."""
    fields = [field for objective in OBJECTIVES.values() for field in dataclasses.fields(objective)]
    yield from {flag_of(field): field for field in fields}.values()


def make_objective(config: Mapping[str, Any] | ConfigDict) -> Objective:
    """The objective of a run's configuration: `config["objective"]["name"]`, its fields from their flags' values.
    UserError where it is not registered."""
    name = config["objective"]["name"]
    if name not in OBJECTIVES:
        raise UserError(
            f"--objective.name={name} is unknown; known are {', '.join(OBJECTIVES)}. Register it first "
            "(docs/change_this.md)"
        )
    objective = OBJECTIVES[name]
    values = {}
    for field in dataclasses.fields(objective):
        group, _, name = flag_of(field).partition(".")
        if config[group].get(name) is not None:
            values[field.name] = config[group][name]
    try:
        return objective(**values)
    except ValueError as error:  # values that do not go together; the message names the flag
        raise UserError(str(error)) from None
