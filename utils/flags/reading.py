"""Values of flags: registered when a program calls `define_*`, read once by `run_program`, plain from there on.

Flags that jax-flow has keep its names and defaults. Some of its spellings are translated here (log-normal,
--wandb.offline, --use_stable_vae); target_update_rate and the guidance scale -1 are passed on as they are, and
translated by the functions below.
"""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from utils.base import effects
from utils.base.files import prepare_output_file
from utils.base.messages import UserError, log
from utils.codecs.codecs import translate_spellings
from utils.data.dataset import DataOptions
from utils.data.loaders import check_data_settings
from utils.flags.definitions import path_flags
from utils.flags.help import to_integer
from utils.objectives.flow_matching import LEGACY_T_SAMPLERS
from utils.objectives.objective import Objective, has_guidance
from utils.runs.config import fill_settings
from utils.runs.given import check_given
from utils.runs.settings import DataConfig
from utils.sampling.samplers import FLAGS as SAMPLER_FLAGS
from utils.sampling.samplers import can_guide, check_sampler, explain_no_guidance, guidance_scale
from utils.sampling.solvers import ADAPTIVE_SOLVERS, SOLVERS, SPACINGS, SamplerConfig
from utils.storage.staging import local_copy, stage_output
from utils.storage.urls import is_url

FLAGS = flags.FLAGS

# Flags of files and folders that programs write, beside the run of --save_dir, and of files that they read whole.
OUTPUTS = ("out", "save_samples", "json", "per_image")
INPUTS = ("source", "class_names", "condition_file", "inception_logits")
# {leaf of a --wandb.* flag: wandb's own environment variable, which counts where the flag is not given}.
WANDB_VARIABLES = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "notes": "WANDB_NOTES",
    "tags": "WANDB_TAGS",
}


# An attribute of flags that a file has, too: a FileValue.
FILE_VALUE = "file_value"


class FileValue(NamedTuple):
    """The value that --config FILE has for a flag."""

    value: Any
    is_recorded: bool  # by a run, in a file of its own: nobody has given the value
    is_typed: bool  # the command line has another one, which wins


def read_data_options(config: ConfigDict) -> DataOptions:
    """Returns the values of the flags of `define_data_flags` and, where the program has it, `define_flip_flag`."""
    return fill_settings(DataConfig, flatten(config), "").options


def check_data_flags(dataset_name: str) -> None:
    """Raises UserError for flags of `define_data_flags` that have no effect on a data set."""
    check_data_settings(dataset_name, explicit_values())


def read_samplers(
    config: ConfigDict,
    class_dropout_prob: float,
    objective: Objective | None = None,
    num_channels: int | None = None,
    inner_head: int | None = None,
) -> list[SamplerConfig]:
    """Returns a sampler for each combination of guidance scales and step counts of `define_sampler_flags`.

    They are for models of this `objective` (None: flow matching), trained with `class_dropout_prob` on `num_channels`
    channels and with an `inner_head` (0: none). Guidance is left out, and that is logged, if the model cannot be guided
    and the user did not ask for it. Raises UserError for values that `check_sampler` refuses, and for flags that the
    solver does not take.
    """
    guidance = read_guidance_scales(config, class_dropout_prob, objective)
    other_scales = read_other_scales(config)

    # Steps. An adaptive solver has no number of them: one sampler for each scale.
    steps = read_numbers(config.denoise_timesteps, "denoise_timesteps", int)
    if config.solver in ADAPTIVE_SOLVERS:
        refuse_ignored(("denoise_timesteps", "time_grid"), f"with --solver={config.solver}, which chooses its steps")
        steps = [0]
    else:
        refuse_ignored(("rtol", "atol"), f"with --solver={config.solver}, which takes --denoise_timesteps")

    # Every scale with every number of steps; one that was typed twice counts once.
    common = SamplerConfig(
        num_steps=0,
        cfg_scale=None,
        cfg_interval=tuple(read_numbers(config.cfg_interval, "cfg_interval", float)),
        solver=config.solver,
        cfg_channels=config.cfg_channels,
        **read_time_grid(config),
        rtol=config.rtol,
        atol=config.atol,
        inner_interval=tuple(read_numbers(config.inner_interval, "inner_interval", float)),
        guide_interval=tuple(read_numbers(config.guide_interval, "guide_interval", float)),
    )
    samplers = []
    for scale, inner, guide, num_steps in itertools.product(guidance, *other_scales, dict.fromkeys(steps)):
        sampler = common._replace(num_steps=num_steps, cfg_scale=scale, inner_scale=inner, guide_scale=guide)
        if scale is not None:  # among several scales, CFG-Zero* is for those with guidance
            sampler = sampler._replace(cfg_zero_star=bool(config.cfg_zero_star), cfg_zero_steps=config.cfg_zero_steps)
        samplers.append(sampler)
    for sampler in samplers:
        check_sampler(
            sampler,
            objective,
            class_dropout_prob=class_dropout_prob,
            num_channels=num_channels,
            inner_head=inner_head,
            has_guide=bool(config.guide),
            names=SAMPLER_FLAGS,
        )
    return samplers


def read_guidance_scales(
    config: ConfigDict, class_dropout_prob: float, objective: Objective | None
) -> list[float | None]:
    """Returns the values of --cfg_scale, each once; None stands for no guidance. Raises UserError for flags about
    guidance that have no effect; see `read_samplers`."""
    # A default that the model cannot follow is dropped; a scale that was typed is left to `check_sampler`.
    scales = read_numbers(config.cfg_scale, "cfg_scale", float) if config.get("use_cfg", 1) else [-1.0]
    if not is_explicit("cfg_scale"):
        if objective is not None and not has_guidance(objective):
            scales = [-1.0]
        elif not can_guide(class_dropout_prob) and any(guidance_scale(scale) is not None for scale in scales):
            log(f"{explain_no_guidance(class_dropout_prob)}: samples are drawn without guidance")
            scales = [-1.0]
    guidance = list(dict.fromkeys(guidance_scale(scale) for scale in scales))  # -1 and 1 are the same
    if not any(scale is not None for scale in guidance):
        refuse_ignored(("cfg_interval", "cfg_channels", "cfg_zero_star", "cfg_zero_steps"), "without guidance")
    return guidance


def read_other_scales(config: ConfigDict) -> tuple[list[float], list[float]]:
    """Returns the values of (--inner_scale, --guide_scale), each once; without --guide, 1 is the only guide scale.
    Raises UserError for flags about either that have no effect."""
    inner = list(dict.fromkeys(read_numbers(config.inner_scale, "inner_scale", float)))
    if inner == [1]:
        refuse_ignored(("inner_interval",), "with --inner_scale=1, which is no internal guidance")
    guide = list(dict.fromkeys(read_numbers(config.guide_scale, "guide_scale", float)))
    if not config.guide:
        refuse_ignored(("guide_params", "guide_scale", "guide_interval"), "without --guide")
        return inner, [1.0]
    if guide == [1]:
        refuse_ignored(("guide", "guide_params", "guide_interval"), "with --guide_scale=1, which is no autoguidance")
    return inner, guide


def read_time_grid(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields of a SamplerConfig that --time_grid sets. Raises UserError if the solver does not take it."""
    solver, grid = config.solver, config.time_grid
    kind = "any" if solver in ADAPTIVE_SOLVERS else SOLVERS[solver].grid
    # Times of a diffusion are spaced among its own noise levels; the flag's default means the first way.
    if kind == "objective":
        if is_explicit("time_grid") and grid not in SPACINGS:
            raise UserError(f"--time_grid={grid}: with --solver={solver} use one of {', '.join(SPACINGS)}")
        return {"spacing": grid if grid in SPACINGS else SPACINGS[0]}
    if kind == "sde":
        refuse_ignored(("time_grid",), f"with --solver={solver}, which has its own times")
        return {}
    return {"time_shift": read_time_shift(grid)}


def read_time_shift(time_grid: str) -> float:
    """Returns S of --time_grid=shift:S, and 1 for 'uniform'. Raises UserError for anything else."""
    kind, _, shift = time_grid.partition(":")
    try:
        value = 1.0 if time_grid == "uniform" else float(shift)
    except ValueError:
        value = math.nan  # which is within no bounds
    if kind not in ("uniform", "shift") or not 0.01 <= value <= 100:
        what = ", which is of --solver ddim and ddpm" if time_grid in SPACINGS else ""
        raise UserError(
            f"--time_grid={time_grid}{what}: use uniform, or shift:S with S from 0.01 to 100, such as shift:3"
        )
    return value


def read_flags(names: Iterable[str]) -> ConfigDict:
    """Returns the values of the flags `names`, those named `group.name` in a ConfigDict of their group.

    Raises UserError for values that no flag can have, and if two spellings of one flag contradict each other.
    """
    names, config = set(names), ConfigDict()
    for name in sorted(names, key=lambda name: ("." in name, name)):
        *group, leaf = name.split(".")
        if group and group[0] not in config:
            config[group[0]] = ConfigDict()
        value = check_value(name, FLAGS[name].value)
        (config[group[0]] if group else config)[leaf] = value

    # wandb's settings depend on each other and on the environment: they are settled together.
    if "trackers" in names:
        from utils.trackers.trackers import (
            check_trackers,  # which takes a while to import: not every program has trackers
        )

        resolve_wandb(config)
        check_trackers(config.to_dict(), explicit_values())
    return config


def check_value(name: str, value: Any) -> Any:
    """Returns the value of flag `name` as the programs use it: paths expanded, of a file at a URL its local copy, of an
    output there the local path where it is made. Raises UserError for values that no flag can have."""
    value = check_given(name, value, is_path=name in path_flags)
    if not isinstance(value, str) or not is_url(value):
        return value
    if name in OUTPUTS:
        return str(stage_output(value, name))
    return str(local_copy(value, name)) if name in INPUTS else value


def is_explicit(name: str) -> bool:
    """Returns whether the user gave the flag `name`; False for a setting that is not a flag of this program."""
    return name in FLAGS and bool(FLAGS[name].present)


def find_file_value(name: str) -> FileValue | None:
    """Returns what --config FILE has for the flag `name`, if anything."""
    return getattr(FLAGS[name], FILE_VALUE, None) if name in FLAGS else None


def is_typed(name: str) -> bool:
    """Returns whether the command line itself has the flag `name`, whatever a file has."""
    found = find_file_value(name)
    return is_explicit(name) and (found is None or found.is_typed)


def explicit_values() -> dict[str, Any]:
    """Returns {flag: value} of the flags that the user gave."""
    return {name: FLAGS[name].value for name in FLAGS if is_explicit(name)}


def read_codec(config: ConfigDict) -> str | None:
    """Returns the value of --codec, in whatever spelling it was given; None if the command line leaves it open."""
    given = {name: config[name] for name in ("codec", "vae") if config.get(name) is not None}
    return translate_spellings(given).get("codec")


def override_model(saved: dict[str, Any]) -> ConfigDict:
    """Returns the --model.* values `saved` with a run, with the compute dtype of this command line if it gives one.

    Raises UserError if it gives another value for anything else, which the trained parameters have settled.
    """
    model = ConfigDict(saved)
    for name in saved:
        if not is_explicit(f"model.{name}"):
            continue
        requested = FLAGS[f"model.{name}"].value
        # An older spelling of the same value is no change.
        requested = LEGACY_T_SAMPLERS.get(requested, requested)
        if name == "dtype":
            model.dtype = requested
        elif requested != model[name]:
            raise UserError(
                f"--model.{name}={requested}, but the run of --load_dir has {model[name]}; leave the flag out"
            )

    # The spelling without a group, which the loop has not seen.
    use_stable_vae = FLAGS["use_stable_vae"].value
    if use_stable_vae not in (None, model.use_stable_vae):
        raise UserError(
            f"--use_stable_vae={use_stable_vae}, but the run of --load_dir has {model.use_stable_vae}; leave it out"
        )
    return model


def refuse_other_objective(saved: Mapping[str, Any]) -> None:
    """Raises UserError if the command line gives an --objective.* flag another value than the run was trained with."""
    for flag in (flag for flag in FLAGS if flag.startswith("objective.") and is_explicit(flag)):
        requested, trained = FLAGS[flag].value, saved.get(flag.removeprefix("objective."))
        if requested != trained:
            raise UserError(f"--{flag}={requested}, but the run of --load_dir has {trained}; leave the flag out")


def refuse_ignored(names: Iterable[str], reason: str) -> None:
    """Raises UserError for a flag among `names` that the user gave although it has no effect here."""
    effects.refuse_ignored(names, explicit_values(), reason)


def resolve_wandb(config: ConfigDict) -> None:
    """Settles wandb's mode, and takes from its environment variables what the command line leaves open.

    Raises UserError if --wandb.offline contradicts --wandb.mode, or $WANDB_MODE is unknown.
    """
    # One mode from two flags; `offline` is not recorded beside it.
    wandb = config.wandb
    if wandb.offline and is_explicit("wandb.mode") and wandb.mode != "offline":
        if is_typed("wandb.offline") == is_typed("wandb.mode"):
            raise UserError(f"--wandb.offline contradicts --wandb.mode={wandb.mode}; give one")
        wandb.offline = is_typed("wandb.offline")  # which wins over a file
    if wandb.offline:
        wandb.mode = "offline"
    if wandb.mode is None:
        wandb.mode = _wandb_mode_of_environment()
    del wandb.offline

    # The flag wins over the variable.
    for leaf, variable in WANDB_VARIABLES.items():
        value = os.environ.get(variable)
        if value and not is_explicit(f"wandb.{leaf}"):
            wandb[leaf] = value.split(",") if leaf == "tags" else value
    if os.environ.get("WANDB_NAME") and not is_explicit("wandb.name"):
        wandb.display_name = os.environ["WANDB_NAME"]  # on wandb alone: the run's folder has the name of the flag


def _wandb_mode_of_environment() -> str:
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    mode = os.environ.get("WANDB_MODE") or "online"
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # their older names
    if mode not in ("online", "offline", "disabled"):
        raise UserError(f"WANDB_MODE={mode}: use online, offline or disabled, or give --wandb.mode")
    return mode


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns {flag: value} of a configuration."""
    # Groups are one level deep, as in the names of flags.
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= {f"{name}.{leaf}": value[leaf] for leaf in value} if isinstance(value, ConfigDict) else {name: value}
    return flat


def read_numbers(words: list[str], flag: str, kind: type) -> list:
    """Returns the numbers of a flag that takes several. Raises UserError if there is none, or a word is no number."""
    try:
        numbers = [to_integer(word) if kind is int else kind(word) for word in words]
    except ValueError:
        example = "100,20,5" if kind is int else "1,4"
        raise UserError(f"--{flag}={','.join(words)}: give numbers separated by commas, such as {example}") from None
    if not numbers:
        raise UserError(f"--{flag}= is empty: give numbers separated by commas")
    return numbers


def prepare_out(path: str, suffixes: Sequence[str], example: str) -> Path:
    """Returns the path of --out, whose folder is made if need be. Raises UserError where it cannot be written, or its
    name has none of the suffixes."""
    out = Path(path)
    if out.is_dir() or out.suffix.lower() not in suffixes:
        shown = out / example if out.is_dir() else example
        raise UserError(f"--out={out}: name a {' or '.join(suffixes)} file, such as {shown}")
    prepare_output_file(out, "out", example)
    return out
