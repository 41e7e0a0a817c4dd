"""Makes the configuration of a run from the settings that a user gives, in Python or on a command line.

Later layers win: defaults, the preset, the objective's own defaults, the run that --load_dir names, a preset that was
given, and what the user gave.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.base.messages import UserError, log
from utils.base.settings import find_entry, flatten_groups, settings_of
from utils.codecs import codecs
from utils.data.loaders import get_loader
from utils.networks.network import NETWORKS
from utils.objectives.flow_matching import LEGACY_T_SAMPLERS
from utils.objectives.objectives import OBJECTIVES
from utils.runs.checkpoint import has_checkpoints
from utils.runs.config import (
    GROUPS,
    OBJECTIVE_NAME,
    PRESET,
    START_SETTINGS,
    RunConfig,
    all_settings,
)
from utils.training.start import SourceRun, read_started_from

# Settings under which earlier versions, and jax-flow, know the codec.
SPELLINGS = ("use_stable_vae", "model.use_stable_vae", "vae")
# Groups of settings that say what is learned and how. A command line with none of them continues a run as it is.
SUBJECTS = ("data", "codec", "optimizer", "sampling", "devices")
# Settings that a run which starts from another does not take from it: how it trains and computes.
OWN_MODEL_SETTINGS = ("model.class_dropout_prob", "model.dtype")


def make_config(given: Mapping[str, Any], resolved: Mapping[str, Any] | None = None) -> RunConfig:
    """Returns the configuration of a run with the settings {name: value}, named as the flags are.

    `resolved` are further values, such as those of environment variables, which count as not given. If `save_dir` is a
    run's and no setting says what is learned, that run's own configuration is used below what is given. Raises
    UserError for unknown names, values out of bounds, and settings that contradict each other.
    """
    # Names first: an unknown one is answered with the most similar setting.
    known = all_settings()
    given = translate_spellings(given)
    resolved = translate_spellings(resolved or {})
    for name in given:
        if name not in known and name not in (PRESET, OBJECTIVE_NAME):
            close = difflib.get_close_matches(name, known, 1)
            raise UserError(f"--{name} is no setting of a run" + (f"; did you mean --{close[0]}?" if close else ""))

    # The run that is continued, or started from, decides what is left open.
    settled = {**resolved, **given}
    layers = read_own_settings(given)
    if layers is None:
        inherited = find_inherited(settled)
        # A codec that is named without its source has the run's.
        if inherited.get("codec", "").startswith(f"{settled.get('codec')}:"):
            settled["codec"] = inherited["codec"]
        layers = fill_layers(settled, inherited)
    else:
        log(f"continuing {given['save_dir']} with its own configuration")
    values = {**layers, **settled}

    # The run is named after its data.
    name = values.get("wandb.name", known["wandb.name"].default)
    dataset_name = values.get("dataset_name", known["dataset_name"].default)
    values["wandb.name"] = name.replace("{dataset_name}", dataset_name)
    config = RunConfig.from_settings(values, frozenset(given))
    check_together(config)
    return config


def translate_spellings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings under one name and value each. Raises UserError where two spellings contradict each other."""
    values = codecs.translate_spellings(given)
    if "model.t_sampler" in values:
        sampler = values["model.t_sampler"]
        values["model.t_sampler"] = LEGACY_T_SAMPLERS.get(sampler, sampler)
    return values


def flatten_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {name: value} of the settings in a run's JSON; records of its data and of JAX are left out."""
    known = {*all_settings(), PRESET, OBJECTIVE_NAME}
    flat = flatten_groups(content)
    return {name: value for name, value in flat.items() if name in known and value is not None}


def read_own_settings(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the settings of the run in `save_dir`, where there is one and nothing given says what is learned."""
    # Only an existing run can be continued, and only if --load_dir does not ask to start from another.
    folder = given.get("save_dir")
    if folder is None or not has_checkpoints(Path(folder)) or "load_dir" in given:
        return None
    # A command line that says what is learned stands for itself: nothing of the run's configuration is mixed in.
    subjects = {PRESET, OBJECTIVE_NAME, "batch_size", "seed", "debug_overfit"}
    for part in SUBJECTS:
        subjects |= settings_of(*GROUPS[part]).keys()
    if any(name in subjects or name.startswith(("model.", "objective.")) for name in given):
        return None
    saved = SourceRun.open(folder).saved
    return {name: value for name, value in flatten_settings(saved).items() if name not in START_SETTINGS}


def find_inherited(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of the run from which a new one starts, or from which the one in its folder has started."""
    # A draft says where the run is and what it names; its architecture is not settled yet.
    draft = RunConfig.from_settings(fill_layers(values, {}))
    folder = draft.folder
    if draft.start.load_dir and not has_checkpoints(folder):
        saved: Mapping[str, Any] | None = SourceRun.open(draft.start.load_dir).saved
    else:
        saved = read_started_from(folder)
    if saved is None:
        return {}

    # The architecture and the objective, the codec and, of images that can be resized, their size.
    model = find_entry("model.network", saved["model"]["network"], NETWORKS).config_class
    names = [name for name in settings_of(model, "model") if name not in OWN_MODEL_SETTINGS]
    theirs = flatten_settings(saved)
    names += ["model.t_sampler", *(name for name in theirs if name.startswith("objective."))]
    inherited = {name: theirs[name] for name in names if name in theirs}
    loader = get_loader(draft.data.dataset_name)
    record = saved["dataset"]["codec"]
    if record["name"] == "pixels" or loader.holds != "latents":  # latents say themselves what made them
        inherited["codec"] = str(codecs.CodecSpec(record["name"], record["source"]))
    if loader.is_resizable:
        inherited["image_size"] = saved["dataset"]["image_shape"][0]
    return inherited


def fill_layers(given: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {name: value} with the defaults of preset and objective, and what is inherited, below what is given."""
    network = given.get("model.network", inherited.get("model.network", "dit"))
    objective_name = given.get(OBJECTIVE_NAME, inherited.get(OBJECTIVE_NAME, "flow_matching"))
    config_class = find_entry("model.network", network, NETWORKS).config_class
    objective = find_entry(OBJECTIVE_NAME, objective_name, OBJECTIVES)

    # Presets are the network's; only one that was given must be known to it.
    preset = given.get(PRESET, "debug")
    if PRESET in given and preset not in config_class.PRESETS:
        raise UserError(
            f"--{PRESET}={preset}: use one of {', '.join(config_class.PRESETS) or 'none: it has no presets'}"
        )
    sizes = {f"model.{name}": value for name, value in config_class.PRESETS.get(preset, {}).items()}
    own_defaults = {f"model.{name}": value for name, value in getattr(objective, "MODEL_DEFAULTS", {}).items()}
    layers = {**sizes, **own_defaults, **inherited}
    if objective_name != inherited.get(OBJECTIVE_NAME, objective_name):  # the run learns something else
        layers |= {"model.step_conditioning": 0, **own_defaults}
    return {**layers, **(sizes if PRESET in given else {}), **given}


def check_together(config: RunConfig) -> None:
    """Raises UserError for settings that are valid one by one, but not together."""
    # Sampler and optimizer.
    optimizer = config.optimizer
    scale = config.sampling.cfg_scale
    if scale < 0 and scale != -1:
        raise UserError(f"--model.cfg_scale={scale}: use a scale of 0 or more, or -1 for no guidance")
    for name in ("beta1", "beta2"):
        beta = getattr(optimizer, name)
        if beta >= 1:
            raise UserError(f"--model.{name}={beta} must be below 1; use 0.99, for example")
    if optimizer.lr_schedule == "cosine" and 0 < config.training.max_steps <= optimizer.warmup_steps:
        raise UserError(
            f"--warmup_steps={optimizer.warmup_steps}: --lr_schedule=cosine ends at --max_steps="
            f"{config.training.max_steps}; use fewer"
        )
    # What is trained.
    if config.start.lora_rank and config.start.freeze:
        raise UserError(
            f"--freeze={','.join(config.start.freeze)}: with --lora_rank the whole network is frozen but for its "
            "labels; leave one of the two out"
        )
    if not has_checkpoints(config.folder):  # a run of an earlier version goes on as it began
        check_new_run(config)


def check_new_run(config: RunConfig) -> None:
    """Raises UserError for settings of a new run that its objective or its data make pointless."""
    # The network's step is the objective's to ask for.
    needs_step = getattr(config.objective, "MODEL_DEFAULTS", {}).get("step_conditioning", 0)
    has_step = config.model.step_conditioning
    if "model.step_conditioning" in config.given and has_step != needs_step:
        raise UserError(
            f"--model.step_conditioning={has_step}: --objective.name={config.objective_name} "
            f"{'needs it' if needs_step else 'gives the network no step'}; leave the flag out"
        )
    # Objective and data.
    if getattr(config.objective, "distill", 0) and get_loader(config.data.dataset_name).holds != "pairs":
        raise UserError(
            f"--objective.distill=1 learns one step from pairs, not from --dataset_name={config.data.dataset_name}; "
            "make some with make_pairs.py, and give pairs:DIR"
        )
    if config.training.debug_overfit and config.data.random_flip:
        raise UserError("--random_flip=1 has no effect with --debug_overfit=1; leave it out")


def with_classes(config: RunConfig, num_classes: int) -> RunConfig:
    """Returns the configuration with as many labels as the data have, unless the user gave their number."""
    if "model.num_classes" in config.given or not num_classes:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=num_classes))
