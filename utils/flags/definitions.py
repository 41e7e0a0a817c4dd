"""Definitions of the flags that several programs share.

Flags that jax-flow has keep its names and defaults.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from absl import flags

import diffusion_transformer  # noqa: F401 (enters DiT among the networks)
from utils.base.settings import kind_of, settings_of
from utils.codecs.codecs import CODECS
from utils.data.joined import SEPARATOR
from utils.data.loaders import list_names
from utils.flags.help import hide, topic
from utils.metrics.extractors import DEFAULT_EXTRACTOR, EXTRACTORS, ExtractorOptions
from utils.metrics.metrics import METRICS
from utils.networks.network import NETWORKS
from utils.networks.posthoc_ema import parse_params
from utils.objectives.objectives import OBJECTIVES
from utils.runs.config import GROUPS, OBJECTIVE_NAME, PRESET, network_settings, objective_settings
from utils.runs.settings import CodecConfig, DataConfig, EvaluationConfig, LoggingConfig, WandbConfig
from utils.sampling.solvers import ADAPTIVE_SOLVERS, SOLVERS

FLAGS = flags.FLAGS

# Flags whose value is a path, or a data set or a VAE that may be one: `check_given` expands a ~ in it.
path_flags: set[str] = set()


def define_path(name: str, default: str | None, help: str) -> None:
    """Registers a flag whose value is a path: a leading ~ stands for a home folder, wherever the flag is used."""
    path_flags.add(name)
    flags.DEFINE_string(name, default, help)


def define_quiet_flag() -> None:
    """Registers --quiet, which `program.parse_flags` applies."""
    flags.DEFINE_bool("quiet", False, "Results, or their paths, and errors alone: no progress, no notes, no warnings.")


class JoinedFlag(flags.Flag):
    """A flag whose values are joined where it is given several times."""

    def parse(self, argument: str) -> None:
        self.allow_overwrite = True
        super().parse(f"{self.value}{SEPARATOR}{argument}" if self.present else argument)


class SettingParser(flags.ArgumentParser):
    """The parser of a setting whose values have a form of their own, such as 24x40."""

    def __init__(self, parse: Callable[[Any], Any]):
        super().__init__()
        self.parse_value = parse

    def parse(self, argument: Any) -> Any:
        """Returns the value of what was typed. Raises ValueError, which absl answers with the flag's name."""
        return self.parse_value(argument)


def define_setting(name: str, field: dataclasses.Field, **changes: Any) -> None:
    """Registers the flag of a `setting`; `changes` may replace the default and the help of its field."""
    metadata = field.metadata
    default = changes.get("default", field.default)
    help_text = changes.get("help", metadata["help"])
    kind = kind_of(field)

    # Paths and choices are texts too, so they come before the plain types.
    if metadata["parse"]:
        serializer = flags.CsvListSerializer(",") if kind is tuple else flags.ArgumentSerializer()
        flags.DEFINE(SettingParser(metadata["parse"]), name, default, help_text, serializer=serializer)
    elif name == "dataset_name":
        path_flags.add(name)
        flags.DEFINE_flag(JoinedFlag(flags.ArgumentParser(), flags.ArgumentSerializer(), name, default, help_text))
    elif metadata["is_path"]:
        define_path(name, default, help_text)
    elif metadata["choices"]:
        flags.DEFINE_enum(name, default, list(metadata["choices"]), help_text)
    elif kind is tuple:
        flags.DEFINE_list(name, list(default), help_text)
    elif kind is str:
        flags.DEFINE_string(name, default, help_text)
    elif kind is float:
        flags.DEFINE_float(name, default, help_text, metadata["low"], metadata["high"])
    else:
        flags.DEFINE_integer(name, default, help_text, metadata["low"], metadata["high"])


def _leave_to_registry(name: str) -> None:
    """Lets an enum take any text: the registry refuses what it does not have, and says how more is registered."""
    FLAGS[name].parser = flags.ArgumentParser()


def define_group(part: str, without: tuple[str, ...] = ()) -> None:
    """Registers the flags of a group of a run's settings (utils/runs/settings.py)."""
    for name, field in settings_of(*GROUPS[part]).items():
        if name not in without:
            define_setting(name, field)


@topic("Data")
def define_data_flags(dataset_name: str | None = "imagenet256") -> None:
    """Registers the flags of which images are read, and how; see `read_data_options`.

    `dataset_name` is the default of that flag; None stands for the data set of the run that the program loads.
    """
    # Help that depends on the registry of loaders, to which a user's own may have been added.
    ending = "" if dataset_name else "; default: the run's"
    folders = ", ".join(list_names(lambda loader: "broken_images" in loader.options))
    helps = {
        "dataset_name": f"Data set, or several to be joined: {', '.join(list_names())}; see docs/data.md{ending}.",
        "broken_images": f"What to do about broken files of {folders}.",
        "max_megapixels": f"Largest image of {folders} to decode; 3 bytes a pixel.",
    }

    # Mirroring is left out: only programs that use training images need it (see `define_flip_flag`). So is the range of
    # floats, which a training alone takes.
    for name, field in settings_of(DataConfig).items():
        if name not in ("random_flip", "value_range"):
            default = dataset_name if name == "dataset_name" else field.default
            define_setting(name, field, default=default, help=helps.get(name, field.metadata["help"]))


@topic("Data")
def define_flip_flag() -> None:
    """Registers --random_flip, for training and for the encoding of what is trained on."""
    flipped = ", ".join(list_names(lambda loader: loader.flips))
    help_text = f"1 mirrors half of the training images left to right, 0 none; default: 1 for {flipped}."
    define_setting("random_flip", settings_of(DataConfig)["random_flip"], help=help_text)


@topic("Sampling")
def define_sampler_flags(cfg_scale: str, denoise_timesteps: str, *, takes_several: bool = False) -> None:
    """Registers the flags of how samples are drawn; see `read_samplers`.

    `cfg_scale` and `denoise_timesteps` are the defaults, as typed. `takes_several`: the program samples at each of
    several scales and step counts.
    """
    # Guidance. Scales and steps are lists in all programs; one that takes a single sampler refuses more.
    scales = "Guidance scales, separated by commas" if takes_several else "Guidance scale"
    flags.DEFINE_list("cfg_scale", [cfg_scale], f"{scales}; -1 or 1: no guidance.")
    flags.DEFINE_list("cfg_interval", ["0", "1"], "First and last time t at which guidance is on.")
    flags.DEFINE_integer("cfg_channels", None, "Channels that are guided, the first; default: all.", lower_bound=1)
    flags.DEFINE_integer(
        "cfg_zero_star", 0, "1: CFG-Zero*, which scales the prediction without the condition to fit that with it.", 0, 1
    )
    flags.DEFINE_integer(
        "cfg_zero_steps", 0, "First steps in which CFG-Zero* sets the velocity to zero; 4 % of the steps are usual.", 0
    )
    define_other_guidance(takes_several)

    # Steps: how many, and at which times.
    steps = "Step counts, separated by commas." if takes_several else "Steps."
    flags.DEFINE_list("denoise_timesteps", [denoise_timesteps], steps)
    flags.DEFINE_string(
        "time_grid",
        "uniform",
        "Times of the steps: uniform, or shift:S (S > 1: more at noise); of ddim and ddpm: linspace, or leading.",
    )

    # The solver. Only an adaptive one has tolerances.
    flags.DEFINE_enum(
        "solver",
        "euler",
        [*SOLVERS, *ADAPTIVE_SOLVERS],
        "heun and midpoint evaluate the model twice per step; heun_euler is heun with a last step of euler; dopri5 "
        "chooses its steps by --rtol and --atol; sde is SiT's stochastic sampler; ddim and ddpm are of models trained "
        "as diffusions.",
    )
    flags.DEFINE_float("rtol", 1e-5, "Relative tolerance of dopri5.", 1e-7, 1)
    flags.DEFINE_float("atol", 1e-5, "Absolute tolerance of dopri5.", 1e-7, 1)


def define_other_guidance(takes_several: bool) -> None:
    """Registers the flags of guidance by an inner head and by another model."""
    scale, several = ("Scales", ", separated by commas") if takes_several else ("Scale", "")
    flags.DEFINE_list(
        "inner_scale", ["1"], f"{scale} of internal guidance{several}; 1: none. Needs a model with --model.inner_head."
    )
    flags.DEFINE_list("inner_interval", ["0", "1"], "First and last time t of internal guidance.")
    define_path(
        "guide", None, "Autoguidance: a smaller or less trained model to lead away from, RUN or RUN/checkpoints/STEP."
    )
    flags.DEFINE_string("guide_params", "ema", "Parameters of --guide: ema, raw or ema:WIDTH, as for --params.")
    flags.DEFINE_list("guide_scale", ["2"], f"{scale} of autoguidance by --guide{several}; 1: none.")
    flags.DEFINE_list("guide_interval", ["0", "1"], "First and last time t of autoguidance.")


def define_params_flag() -> None:
    """Registers --params; eval_fid.py, which takes several, has one of its own."""
    flags.DEFINE(
        SettingParser(parse_params),
        "params",
        "ema",
        "ema: the EMA of the parameters; raw: the parameters themselves; ema:0.08: an EMA of that relative width, for "
        "a run with --ema_profiles.",
        serializer=flags.ArgumentSerializer(),
    )


def define_extractor_flags() -> None:
    """Registers the feature networks, and the options of those that have some (`ExtractorOptions`)."""
    names = ", ".join(EXTRACTORS)
    flags.DEFINE_list("extractor", [DEFAULT_EXTRACTOR], f"Feature networks, separated by commas: {names}.")
    for name in ExtractorOptions._fields:
        define_setting(name, settings_of(EvaluationConfig)[name])


def define_metrics_flag(what: str) -> None:
    names = ", ".join(map(str, METRICS))
    flags.DEFINE_list("metrics", None, f"{what}, separated by commas: {names}; default: those of --extractor.")


@topic("Model")
def define_codec_flags() -> None:
    """Registers --codec, and --vae, which is a spelling of it."""
    field = settings_of(CodecConfig)["codec"]
    # Each codec of the registry says itself how it is written.
    kinds = "; ".join(f"{name}: {kind.help}" for name, kind in CODECS.items())
    define_setting("codec", field, help=f"{field.metadata['help'].rstrip('.')}. {kinds}.")
    define_path("vae", None, "Hub id, folder or file of a VAE: the same as --codec kl:VAE.")


@topic("Model")
def define_model_flags() -> None:
    """Registers --model.*: the network, and what turns images into the arrays that it learns."""
    # Networks may have presets of the same name; an enum lists each once.
    presets = [name for entry in NETWORKS.values() for name in entry.config_class.PRESETS]
    flags.DEFINE_enum(PRESET, "debug", list(dict.fromkeys(presets)), "Sizes for the --model.* flags left unset.")
    for name, field in network_settings().items():
        define_setting(name, field)
    _leave_to_registry("model.network")

    # Spellings of --codec, so that jax-flow's command lines keep their meaning.
    flags.DEFINE_integer("model.use_stable_vae", None, "1: the same as --codec kl; 0: as --codec pixels.", 0, 1)
    flags.DEFINE_integer("use_stable_vae", None, "The same as --model.use_stable_vae.", 0, 1)


@topic("Objective")
def define_objective_flags() -> None:
    """Registers --objective.*: what is learned, and the fields of every objective."""
    flags.DEFINE_enum(OBJECTIVE_NAME, "flow_matching", list(OBJECTIVES), "What the model learns.")
    _leave_to_registry(OBJECTIVE_NAME)
    for name, field in objective_settings().items():
        if name.startswith("objective."):  # only the chosen objective knows its default
            define_setting(name, field, default=None)
        else:
            define_setting(name, field)


@topic("Optimizer, and how samples are drawn in training")
def define_optimizer_flags() -> None:
    """Registers Adam's settings, the EMA's, and the sampler of training-time samples."""
    define_group("optimizer")
    define_group("sampling")


def define_run_flags() -> None:
    """Registers every setting of a run, by topic."""
    with topic("Run"):
        define_path(
            "config",
            None,
            "YAML or JSON file of settings, which the command line overrides: a run's config.json, or a few.",
        )
        define_group("training")
    # The order of the calls is that of --help.
    define_data_flags()
    with topic("Data"):
        define_setting("value_range", settings_of(DataConfig)["value_range"])
    define_flip_flag()
    with topic("Data"):
        define_group("augmentation")
    with topic("Objective"):
        define_group("coupling")
    define_codec_flags()
    define_model_flags()
    define_objective_flags()
    define_optimizer_flags()
    for title, parts in {
        "Starting from another run": ("start",),
        "Logging and evaluation": ("logging", "evaluation"),
        "Checkpoints": ("checkpoints",),
        "Memory and devices": ("devices",),
    }.items():
        with topic(title):
            for part in parts:
                # --trackers is a setting of logging, but stands with --wandb.* in --help.
                define_group(part, without=("trackers",))
            if "logging" in parts:
                define_quiet_flag()
    define_tracker_flags()
    define_process_flags()


@topic("Several processes")
def define_process_flags() -> None:
    """Registers the flags by which the processes of one command find each other; see `program.join_processes`."""
    define_group("processes")


def define_saved_model_flags() -> None:
    """Registers --model.* and --objective.* for a program that loads a run, of which only the compute dtype may change.

    --help leaves out the others. They exist so that a pasted training command is told which flags to leave out.
    """
    before = set(FLAGS)
    define_model_flags()
    define_objective_flags()
    define_optimizer_flags()
    hide(name for name in set(FLAGS) - before if name != "model.dtype")


@topic("Trackers")
def define_tracker_flags(name: str | None = None, mode: str | None = None) -> None:
    """Registers --trackers and --wandb.*. `name` and `mode` replace the defaults of --wandb.name and --wandb.mode."""
    define_setting("trackers", settings_of(LoggingConfig)["trackers"])
    # wandb.display_name is no flag: only $WANDB_NAME sets it (see `resolve_wandb`).
    for setting_name, field in settings_of(WandbConfig, "wandb").items():
        if setting_name == "wandb.mode":
            define_setting(setting_name, field, default=mode)
            flags.DEFINE_bool("wandb.offline", False, "The same as --wandb.mode offline.")  # jax-flow's spelling
        elif setting_name == "wandb.name":
            define_setting(setting_name, field, default=name or field.default)
        elif setting_name != "wandb.display_name":
            define_setting(setting_name, field)
