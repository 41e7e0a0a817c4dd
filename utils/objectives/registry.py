"""The objectives. One more is one file that implements `Objective`, and one line here."""

from collections.abc import Callable

from utils.objectives.flow_matching import FlowMatching
from utils.objectives.objective import Objective

OBJECTIVES: dict[str, Callable[..., Objective]] = {"flow_matching": FlowMatching}
