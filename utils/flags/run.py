"""The command line of a training, as the configuration of a run."""

from typing import Any

from ml_collections import ConfigDict

from utils.flags.reading import find_file_value, flatten, is_explicit, is_typed
from utils.runs.config import OBJECTIVE_NAME, PRESET, RunConfig, all_settings
from utils.training.configure import SPELLINGS, make_config


def read_run_config(config: ConfigDict) -> RunConfig:
    """Returns the configuration of the run that a command line asks for, from the values of `read_flags`."""
    # By where a value comes from: only what was typed, or written into a file of settings, counts as given.
    typed: dict[str, Any] = {}
    file: dict[str, Any] = {}
    recorded: dict[str, Any] = {}
    known = {*all_settings(), *SPELLINGS, PRESET, OBJECTIVE_NAME}
    known_defaults = {name: field.default for name, field in all_settings().items()}
    for name, value in flatten(config).items():
        found = find_file_value(name)
        if found and name in known:
            (recorded if found.is_recorded else file)[name] = found.value
        if is_typed(name) and name in known:
            typed[name] = value
        elif not is_explicit(name) and name.startswith("wandb.") and value not in (None, [], known_defaults.get(name)):
            recorded[name] = value  # of wandb's environment variables

    # --wandb.offline itself is no setting of a run: the mode that it means is.
    if is_explicit("wandb.offline"):
        typed["wandb.mode"] = config.wandb.mode
    return make_config(typed, file=file, recorded=recorded)
