"""Definitions of the flags that several programs have.

Flags that jax-flow has keep its names and defaults.
"""

import dataclasses
from typing import Any

from absl import flags

from diffusion_transformer import PRESETS, DiTConfig
from utils.codecs.registry import DEFAULT_HUB_ID
from utils.data.loaders import list_names
from utils.flags.help import hide, topic
from utils.images.decoding import MAX_MEGAPIXELS
from utils.objectives.registry import OBJECTIVES, flag_of, objective_fields
from utils.sampling.samplers import MAX_SCALE, MAX_STEPS
from utils.sampling.solvers import ADAPTIVE_SOLVERS, SOLVERS

FLAGS = flags.FLAGS

BROKEN_IMAGES = ("refuse", "skip")

# Flags whose value is a path, or a data set or a VAE that may be one.
path_flags: set[str] = set()


def define_path(name: str, default: str | None, help: str) -> None:
    """Registers a flag whose value is a path: a leading ~ stands for a home folder, wherever the flag is used."""
    path_flags.add(name)
    flags.DEFINE_string(name, default, help)


@topic("Data")
def define_data_flags(dataset_name: str | None = "imagenet256") -> None:
    """Registers which images are read, and how; see `read_data_options`. `dataset_name` None: the run's."""
    default = "" if dataset_name else "; default: the run's"
    define_path("dataset_name", dataset_name, f"Data set: {', '.join(list_names())}; see docs/data.md{default}.")
    define_path("data_dir", None, "Where TFDS keeps prepared data sets; gs://... too.")
    flags.DEFINE_integer("image_size", None, "Images are centre-cropped and resized to this side.", 1, 2**13)
    folders = ", ".join(list_names(lambda loader: "broken_images" in loader.options))
    flags.DEFINE_enum("broken_images", "refuse", BROKEN_IMAGES, f"What to do about broken files of {folders}.")
    flags.DEFINE_float(
        "max_megapixels", MAX_MEGAPIXELS, f"Largest image of {folders} to decode; 3 bytes a pixel.", 0, 10_000
    )


@topic("Data")
def define_flip_flag() -> None:
    """Registers --random_flip, of programs that train."""
    flipped = ", ".join(list_names(lambda loader: loader.flips))
    help = f"1 mirrors half of the training images left to right, 0 none; default: 1 for {flipped}."
    flags.DEFINE_integer("random_flip", None, help, 0, 1)


def define_setting(name: str, field: dataclasses.Field, **changes: Any) -> None:
    """Registers the flag of a `setting`, with the field's default or another."""
    metadata, default = field.metadata, changes.get("default", field.default)
    if metadata["choices"]:
        flags.DEFINE_enum(name, default, metadata["choices"], metadata["help"])
    elif isinstance(field.default, float):
        flags.DEFINE_float(name, default, metadata["help"], metadata["low"], metadata["high"])
    else:
        flags.DEFINE_integer(name, default, metadata["help"], metadata["low"], metadata["high"])


@topic("Sampling")
def define_sampler_flags(cfg_scale: str, denoise_timesteps: str, *, takes_several: bool = False) -> None:
    """Registers how samples are drawn, with these defaults; see `read_samplers`."""
    scales = "Guidance scales, separated by commas" if takes_several else "Guidance scale"
    flags.DEFINE_list("cfg_scale", [cfg_scale], f"{scales}; -1 or 1: no guidance.")
    flags.DEFINE_list("cfg_interval", ["0", "1"], "First and last time t at which guidance is on.")
    flags.DEFINE_integer("cfg_channels", None, "Channels that are guided, the first; default: all.", lower_bound=1)
    steps = "Step counts, separated by commas." if takes_several else "Steps."
    flags.DEFINE_list("denoise_timesteps", [denoise_timesteps], steps)
    flags.DEFINE_string(
        "time_grid",
        "uniform",
        "Times of the steps: uniform, or shift:S (S > 1: more at noise); of ddim and ddpm: linspace, or leading.",
    )
    flags.DEFINE_enum(
        "solver",
        "euler",
        [*SOLVERS, *ADAPTIVE_SOLVERS],
        "heun and midpoint evaluate the model twice per step; dopri5 chooses its steps by --rtol and --atol; sde is "
        "SiT's stochastic sampler; ddim and ddpm are of models trained as diffusions.",
    )
    flags.DEFINE_float("rtol", 1e-5, "Relative tolerance of dopri5.", 1e-7, 1)
    flags.DEFINE_float("atol", 1e-5, "Absolute tolerance of dopri5.", 1e-7, 1)


@topic("Model")
def define_vae_flag() -> None:
    """Registers --vae."""
    define_path(
        "vae",
        None,
        f"Hub id or folder of the VAE; default: that of the run or of the cached latents, else {DEFAULT_HUB_ID}.",
    )


@topic("Model")
def define_model_flags() -> None:
    """Registers --model.*: the network, its objective and optimizer, and how samples are drawn."""
    flags.DEFINE_enum("model.preset", "debug", list(PRESETS), "Sizes for the --model.* flags left unset.")
    for field in dataclasses.fields(DiTConfig):
        define_setting(f"model.{field.name}", field)
    flags.DEFINE_float("model.lr", 1e-4, "Adam's learning rate.", lower_bound=0)
    flags.DEFINE_float("model.beta1", 0.9, "Adam's first decay.", 0, 1)
    flags.DEFINE_float("model.beta2", 0.99, "Adam's second decay.", 0, 1)
    flags.DEFINE_float("model.target_update_rate", 0.9999, "Decay of the EMA of the parameters; 1: no EMA.", 0, 1)
    flags.DEFINE_integer("model.denoise_timesteps", 32, "Euler steps of training-time samples.", 1, MAX_STEPS)
    flags.DEFINE_float(
        "model.cfg_scale", 4.0, "Guidance scale of training-time samples; -1: no guidance.", -1, MAX_SCALE
    )
    flags.DEFINE_integer("model.use_stable_vae", 1, "1 trains on the latents of a VAE, 0 on pixels.", 0, 1)
    flags.DEFINE_integer("use_stable_vae", None, "The same as --model.use_stable_vae.", 0, 1)


@topic("Objective")
def define_objective_flags() -> None:
    """Registers --objective.*: what is learned, and the fields of every objective."""
    flags.DEFINE_enum("objective.name", "flow_matching", list(OBJECTIVES), "What the model learns.")
    for field in objective_fields():
        name = flag_of(field)
        if name.startswith("objective."):  # of one objective among several: it has the default
            define_setting(name, field, default=None)
        else:
            define_setting(name, field)


def define_saved_model_flags() -> None:
    """Registers --model.* and --objective.* of a program that loads a run: only the compute dtype can be another. The
    others are not in --help, but so that training's command line may be told what to leave out."""
    before = set(FLAGS)
    define_model_flags()
    define_objective_flags()
    hide(name for name in set(FLAGS) - before if name != "model.dtype")


@topic("Trackers")
def define_tracker_flags(name: str = "flow_{dataset_name}", mode: str | None = None) -> None:
    """Registers --trackers and --wandb.*, of which --wandb.name and --wandb.mode have these defaults."""
    flags.DEFINE_list(
        "trackers",
        ["wandb"],
        "Where numbers and images go beside the run's folder: wandb, tensorboard, or nowhere.",
    )
    flags.DEFINE_enum("wandb.mode", mode, ["online", "offline", "disabled"], "Default: $WANDB_MODE, else online.")
    flags.DEFINE_bool("wandb.offline", False, "The same as --wandb.mode offline.")
    flags.DEFINE_string("wandb.project", "flow", "Project; default: $WANDB_PROJECT, else flow.")
    flags.DEFINE_string("wandb.entity", None, "User or team; default: $WANDB_ENTITY.")
    flags.DEFINE_string("wandb.group", None, "Group of runs; default: $WANDB_RUN_GROUP.")
    flags.DEFINE_string(
        "wandb.name", name, "Name of the wandb run; train_flow.py names its folder under runs/ after it too."
    )
    flags.DEFINE_string("wandb.notes", None, "A longer description; default: $WANDB_NOTES.")
    flags.DEFINE_list("wandb.tags", [], "Tags, separated by commas; default: $WANDB_TAGS.")


@topic("Several processes")
def define_device_flags() -> None:
    """Registers how several processes find each other."""
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "host:port of process 0 in a multi-process run; 'auto' on TPU pods, under SLURM and mpirun.",
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "Processes in the run, with --coordinator_address; 1 without it: a run of its own under srun or torchrun.",
    )
    flags.DEFINE_integer("process_id", None, "This process's number, with --coordinator_address.")
