"""The configuration of a run: RunConfig collects the settings of every subject, of the network and of the objective.

The settings of the subjects are in utils/runs/settings.py. A run saves its configuration as JSON under the names of the
flags, `group.name` nested. `make_config` (utils/training/configure.py) makes one from what a user gives.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.base.messages import UserError
from utils.base.settings import check_setting, find_entry, merge_settings, settings_of
from utils.networks.network import NETWORKS, NetworkConfig
from utils.objectives.objective import Objective
from utils.objectives.objectives import OBJECTIVES
from utils.runs.remote_run import RemoteRun, find_remote_run
from utils.runs.settings import (
    AugmentationConfig,
    CheckpointConfig,
    CodecConfig,
    CouplingConfig,
    DataConfig,
    DeviceConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    ProcessConfig,
    SamplingConfig,
    StartConfig,
    TrainingConfig,
    WandbConfig,
)
from utils.storage.urls import is_url

# {field of RunConfig: (its class, group of its settings' names)}; network and objective are chosen by name instead.
GROUPS: dict[str, tuple[Any, str]] = {
    "training": (TrainingConfig, ""),
    "start": (StartConfig, ""),
    "data": (DataConfig, ""),
    "augmentation": (AugmentationConfig, ""),
    "coupling": (CouplingConfig, ""),
    "codec": (CodecConfig, ""),
    "optimizer": (OptimizerConfig, ""),
    "sampling": (SamplingConfig, ""),
    "evaluation": (EvaluationConfig, ""),
    "logging": (LoggingConfig, ""),
    "wandb": (WandbConfig, "wandb"),
    "checkpoints": (CheckpointConfig, ""),
    "devices": (DeviceConfig, ""),
    "processes": (ProcessConfig, ""),
}
# Settings of one start of a run rather than of the run: not taken from another run's configuration.
START_SETTINGS = ("save_dir", "plan", "profile", *settings_of(ProcessConfig))
PRESET = "model.preset"
OBJECTIVE_NAME = "objective.name"
# Groups of a saved configuration that are no settings: what is known of the data, of JAX and of the machine.
NOT_SETTINGS = ("dataset", "jax", "machine")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that a run is trained with. `given` names the settings that the user gave; the others are defaults."""

    training: TrainingConfig
    start: StartConfig
    data: DataConfig
    augmentation: AugmentationConfig
    coupling: CouplingConfig
    codec: CodecConfig
    model: NetworkConfig
    objective_name: str
    objective: Objective
    optimizer: OptimizerConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig
    logging: LoggingConfig
    wandb: WandbConfig
    checkpoints: CheckpointConfig
    devices: DeviceConfig
    processes: ProcessConfig
    preset: str = "debug"
    # Not compared: two runs with the same values are the same, whoever set them.
    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], given: frozenset[str] = frozenset()) -> "RunConfig":
        """Returns the configuration with the settings {name: value}; what is missing has its default.

        Raises UserError for a value that a setting cannot have, and for an unknown network or objective.
        """
        # Groups whose fields are known beforehand.
        parts: dict[str, Any] = {
            part: fill_settings(group_class, settings, group) for part, (group_class, group) in GROUPS.items()
        }

        # The network and the objective bring fields of their own.
        network = settings.get("model.network", "dit")
        objective_name = settings.get(OBJECTIVE_NAME, "flow_matching")
        parts["model"] = fill_settings(find_entry("model.network", network, NETWORKS).config_class, settings, "model")
        try:
            parts["objective"] = fill_settings(
                find_entry(OBJECTIVE_NAME, objective_name, OBJECTIVES), settings, "objective"
            )
        except ValueError as error:  # values that do not go together; the message names the flag
            raise UserError(str(error)) from None
        return cls(**parts, objective_name=objective_name, preset=settings.get(PRESET, "debug"), given=given)

    def settings(self) -> dict[str, Any]:
        """Returns {name: value} of all settings.

        Fields of other objectives are None; settings that objectives share have their default.
        """
        # Every objective's names, so that all runs save the same keys.
        values: dict[str, Any] = {
            name: None if name.startswith("objective.") else field.default
            for name, field in objective_settings().items()
        }

        # This run's own values replace them.
        for part, (group_class, group) in GROUPS.items():
            values |= read_settings(getattr(self, part), group_class, group)
        values |= read_settings(self.model, type(self.model), "model")
        values |= read_settings(self.objective, type(self.objective), "objective")
        if values["wandb.display_name"] is None:  # which is saved only where it differs from the folder's
            del values["wandb.display_name"]
        return values | {PRESET: self.preset, OBJECTIVE_NAME: self.objective_name}

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as a run saves them: `group.name` in a dictionary of its own, lists for tuples."""
        # Names without a group first, then the groups in order.
        values = self.settings()
        content: dict[str, Any] = {}
        for name in sorted(values, key=lambda name: ("." in name, name)):
            *group, leaf = name.split(".")
            value = list(values[name]) if isinstance(values[name], tuple) else values[name]
            (content.setdefault(group[0], {}) if group else content)[leaf] = value

        # Readers of earlier versions know the codec by these two.
        spec = self.codec.spec
        content["model"]["use_stable_vae"] = int(spec.name != "pixels")
        content["vae"] = spec.source if spec.name == "kl" else None
        return dict(sorted(content.items()))

    def describe_given(self) -> str:
        """Returns the settings that the user gave, as on a command line."""
        values = {name: value for name, value in self.settings().items() if name in self.given}
        texts = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return " ".join(f"--{name}={texts[name]}" for name in sorted(texts))

    @property
    def folder(self) -> Path:
        """The folder of everything that the run keeps: --save_dir, or runs/<--wandb.name>, made fit for a file name.

        Raises UserError where the name cannot be a folder's.
        """
        # Any name is fine on wandb; 255 bytes is the limit of most file systems.
        name = re.sub(r"[^\w.=+-]+", "_", self.wandb.name)
        if not self.training.save_dir and (not name.strip(".") or len(name.encode()) > 255):
            raise UserError(
                f"--wandb.name={self.wandb.name[:60]} is no name for a folder; choose another, or --save_dir"
            )
        if self.remote is not None:
            return self.remote.folder
        return Path(self.training.save_dir or Path("runs") / name)

    @property
    def remote(self) -> RemoteRun | None:
        """The run in object storage of which `folder` is the local copy, where --save_dir is a URL."""
        url = self.training.save_dir
        return find_remote_run(url) if url and is_url(url) else None


def network_settings() -> dict[str, dataclasses.Field]:
    """Returns {name: field} of the settings of all networks."""
    return merge_settings("networks", {name: entry.config_class for name, entry in NETWORKS.items()}, "model")


def objective_settings() -> dict[str, dataclasses.Field]:
    """Returns {name: field} of the settings of all objectives."""
    return merge_settings("objectives", OBJECTIVES, "objective")


def all_settings() -> dict[str, dataclasses.Field]:
    """Returns {name: field} of every setting that a run can have, but for those that choose preset and objective."""
    fields: dict[str, dataclasses.Field] = {}
    for group_class, group in GROUPS.values():
        fields |= settings_of(group_class, group)
    return fields | network_settings() | objective_settings()


def fill_settings(group_class: Any, settings: Mapping[str, Any], group: str) -> Any:
    """Returns an instance of `group_class` with its values among {name: value}; None stands for the default.

    Raises UserError for a value that a setting cannot have.
    """
    values = {}
    for name, field in settings_of(group_class, group).items():
        value = settings.get(name, field.default)
        values[field.name] = field.default if value is None else check_setting(name, field, value)
    return group_class(**values)


def read_settings(part: Any, group_class: Any, group: str) -> dict[str, Any]:
    """Returns {name: value} of a dataclass of settings."""
    return {name: getattr(part, field.name) for name, field in settings_of(group_class, group).items()}


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {name: value} of a configuration as a run saves it, groups as group.name, without NOT_SETTINGS."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if not isinstance(value, dict):
            flat[name] = value
        elif name not in NOT_SETTINGS:
            flat |= {f"{name}.{leaf}": leaf_value for leaf, leaf_value in value.items()}
    return flat
