"""The objectives by name. A new one is a file that implements `Objective`, and one line here."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from utils.base.messages import UserError
from utils.base.settings import find_entry, settings_of
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


def make_objective(config: Mapping[str, Any] | ConfigDict) -> Objective:
    """Returns the objective of a saved configuration, with the values of its settings; missing ones have their default.

    Raises UserError for one that is not registered, and for values that do not go together.
    """
    objective = find_entry("objective.name", config["objective"]["name"], OBJECTIVES)
    values = {}
    for name, field in settings_of(objective, "objective").items():
        # A setting may have a flag of another group, such as --model.t_sampler. Older runs lack the newer ones.
        group, _, leaf = name.partition(".")
        if config[group].get(leaf) is not None:
            values[field.name] = config[group][leaf]
    try:
        return objective(**values)
    except ValueError as error:  # the message names the flags
        raise UserError(str(error)) from None
