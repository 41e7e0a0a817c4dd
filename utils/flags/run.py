"""The command line of a training: from its flags to the configuration of a run, without flags that have no effect."""

from typing import Any

from ml_collections import ConfigDict

from utils.base.settings import settings_of
from utils.flags.effects import RULES, check_effects
from utils.flags.reading import FLAGS, check_data_flags, flatten, is_explicit, refuse_ignored
from utils.runs.checkpoint import has_checkpoints
from utils.runs.config import OBJECTIVE_NAME, PRESET, RunConfig, all_settings, network_settings, objective_settings
from utils.training.configure import SPELLINGS, make_config
from utils.training.start import read_started_from


def read_run_config(config: ConfigDict) -> RunConfig:
    """Returns the configuration of the run that a command line asks for, from the values of `read_flags`."""
    # `given` is what the user typed: it is checked against the run and wins. `resolved` only fills gaps.
    given: dict[str, Any] = {}
    resolved: dict[str, Any] = {}
    known = {*all_settings(), *SPELLINGS, PRESET, OBJECTIVE_NAME}
    known_defaults = {name: field.default for name, field in all_settings().items()}
    for name, value in flatten(config).items():
        if is_explicit(name) and name in known:
            given[name] = value
        elif name in FLAGS and getattr(FLAGS[name], "is_untyped", False) and value is not None:  # of a run's own file
            resolved[name] = value
        elif name.startswith("wandb.") and value not in (None, [], known_defaults.get(name)):
            resolved[name] = value  # of wandb's environment variables

    # --wandb.offline itself is no setting of a run: the mode that it means is.
    if is_explicit("wandb.offline"):
        given["wandb.mode"] = config.wandb.mode
    return make_config(given, resolved)


def check_run_effects(values: ConfigDict, config: RunConfig | None = None) -> None:
    """Raises UserError for a flag of training without effect; called before the configuration is made, and after."""
    if config is None:
        check_effects(RULES["train_flow.plan"], values.to_dict())
        return

    # Facts that no flag tells, but the folder of the run.
    is_new = not has_checkpoints(config.folder)
    is_started = bool(config.start.load_dir or read_started_from(config.folder))
    check_effects(RULES["train_flow"], config.to_json(), is_new=is_new, is_started=is_started)
    check_data_flags(config.data.dataset_name)
    if is_new:  # a run of an earlier version goes on as it began
        refuse_other_settings(config)


def refuse_other_settings(config: RunConfig) -> None:
    """Raises UserError for a setting that belongs to another objective or network than the run has."""
    # {flag: (chosen name, its configuration, settings of all that can be chosen, prefix of their names)}.
    choices = {
        "objective.name": (config.objective_name, config.objective, objective_settings(), "objective"),
        "model.network": (config.model.network, config.model, network_settings(), "model"),
    }
    for flag, (name, chosen, known, group) in choices.items():
        # Flags exist for all of them, so absl takes a flag of the wrong one without a word.
        others = known.keys() - settings_of(type(chosen), group).keys()
        refuse_ignored(sorted(others), f"with --{flag}={name}")
