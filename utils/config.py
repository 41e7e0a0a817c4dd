"""Flags shared by the programs, presets, and the checks that refuse a configuration before anything compiles.

Flags are registered when a program calls `define_*`, read once by `run_program`, and are plain values from there on.
Legacy spellings of jax-flow (log-normal, target_update_rate, --wandb.offline) end in this file.
"""

import math
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import jax
import yaml
from absl import app, flags, logging
from ml_collections import ConfigDict

from utils.errors import UserError
from utils.images import MAX_MEGAPIXELS

FLAGS = flags.FLAGS

# A preset fills what the user left unset; hidden size, patch, depth, heads, MLP ratio.
PRESETS = {
    "debug": {"hidden_size": 64, "patch_size": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0},
    "big": {"hidden_size": 768, "patch_size": 2, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0},
    "semilarge": {"hidden_size": 1024, "patch_size": 2, "depth": 22, "num_heads": 16, "mlp_ratio": 4.0},
    "large": {"hidden_size": 1024, "patch_size": 2, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0},
    "xlarge": {"hidden_size": 1152, "patch_size": 2, "depth": 28, "num_heads": 16, "mlp_ratio": 4.0},
}

BROKEN_IMAGES = ("refuse", "skip")
VAE = "stabilityai/sd-vae-ft-mse"

# What makes the parameters of one run unreadable under another value.
ARCHITECTURE = ("hidden_size", "patch_size", "depth", "num_heads", "mlp_ratio", "num_classes", "use_stable_vae")
# What a run learns: from what times, given what.
OBJECTIVE = ("t_sampler", "t_conditioning", "class_dropout_prob")
# A run is continued only under the same values of these; the rest may change, and is said to have.
FIXED = (*(f"model.{name}" for name in (*ARCHITECTURE, *OBJECTIVE)), "batch_size", "seed", "debug_overfit")
# Told apart by the content of the data instead (utils/fingerprint.py), or by rules of their own.
COMPARED_ELSEWHERE = ("dataset_name", "data_dir", "image_size", "vae", "load_dir", "save_dir")

# More than any sampler has use for.
MAX_STEPS, MAX_SCALE = 10**6, 1000

NEW_RUN = "another --wandb.name or --save_dir starts a new run"


# Flags whose value is a path, or a data set or a VAE that may be one.
_path_flags: set[str] = set()


def define_path(name: str, default: str | None, help: str) -> None:
    """Registers a flag whose value is a path: a leading ~ stands for a home folder, wherever the flag is used."""
    _path_flags.add(name)
    flags.DEFINE_string(name, default, help)


def expand_path(path: str, flag: str) -> str:
    """The path with a leading ~ or ~user, also of folder:~/x, replaced; UserError where there is no such home."""
    prefix, colon, rest = path.partition(":") if path.startswith(("folder:", "latents:")) else ("", "", path)
    if not rest.startswith("~"):
        return path
    expanded = os.path.expanduser(rest)
    if expanded == rest:
        raise UserError(f"--{flag}={path}: there is no home folder for {rest.split('/')[0]}; give the whole path")
    return f"{prefix}{colon}{expanded}"


def define_data_flags() -> None:
    """Registers which images are read, and how."""
    define_path("dataset_name", "imagenet256", "Data set; README.md lists what is read.")
    define_path("data_dir", None, "Where prepared data sets are; gs://... too.")
    flags.DEFINE_integer("image_size", None, "Side to which images of any size are resized.", 1, 2**13)
    flags.DEFINE_enum("broken_images", "refuse", BROKEN_IMAGES, "What is done about broken files of folder:PATH.")
    flags.DEFINE_float("max_megapixels", MAX_MEGAPIXELS, "Largest image of folder:PATH that is decoded.", 0, 10_000)


def define_vae_flag() -> None:
    """Registers --vae."""
    define_path(
        "vae", None, f"Hub id or folder of the VAE; default: that of the run or of the cached latents, else {VAE}."
    )


def define_model_flags() -> None:
    """Registers --model.*: the network, its objective and optimizer, and how samples are drawn."""
    debug = PRESETS["debug"]
    flags.DEFINE_enum("model.preset", "debug", list(PRESETS), "Sizes for the --model.* flags left unset.")
    flags.DEFINE_integer("model.hidden_size", debug["hidden_size"], "Width of the transformer.", 4, 2**16)
    flags.DEFINE_integer("model.patch_size", debug["patch_size"], "Side of a patch.", 1, 2**12)
    flags.DEFINE_integer("model.depth", debug["depth"], "Transformer blocks.", 1, 1000)
    flags.DEFINE_integer("model.num_heads", debug["num_heads"], "Attention heads.", 1, 2**16)
    flags.DEFINE_float("model.mlp_ratio", debug["mlp_ratio"], "Width of the MLP over --model.hidden_size.", 0, 100)
    flags.DEFINE_enum("model.dtype", "bfloat16", ["bfloat16", "float32"], "Compute type; parameters stay float32.")
    flags.DEFINE_integer("model.num_classes", 1000, "Labels; one more row stands for no label.", 1, 10**8)
    flags.DEFINE_float("model.class_dropout_prob", 0.1, "Share of labels dropped in training.", 0, 1)
    flags.DEFINE_float("model.lr", 1e-4, "Adam's learning rate.", lower_bound=0)
    flags.DEFINE_float("model.beta1", 0.9, "Adam's first decay.", 0, 1)
    flags.DEFINE_float("model.beta2", 0.99, "Adam's second decay.", 0, 1)
    flags.DEFINE_float(
        "model.target_update_rate", 0.9999, "Decay of the parameters' moving average; 1: no averaging.", 0, 1
    )
    flags.DEFINE_enum(
        "model.t_sampler", "log-normal", ["log-normal", "uniform"], "Training times: sigmoid of a normal, or uniform."
    )
    flags.DEFINE_integer("model.t_conditioning", 1, "0 feeds zeros to the model instead of t.", 0, 1)
    flags.DEFINE_integer("model.denoise_timesteps", 32, "Euler steps of training-time samples.", 1, MAX_STEPS)
    flags.DEFINE_float(
        "model.cfg_scale", 4.0, "Guidance scale of training-time samples; -1: no guidance.", -1, MAX_SCALE
    )
    flags.DEFINE_integer("model.use_stable_vae", 1, "1 trains on the latents of a VAE, 0 on pixels.", 0, 1)
    flags.DEFINE_integer("use_stable_vae", None, "The same as --model.use_stable_vae.", 0, 1)


def define_wandb_flags(name: str = "flow_{dataset_name}") -> None:
    """Registers --wandb.*, --wandb.name with that default."""
    flags.DEFINE_enum("wandb.mode", None, ["online", "offline", "disabled"], "Default: $WANDB_MODE, else online.")
    flags.DEFINE_bool("wandb.offline", False, "The same as --wandb.mode offline.")
    flags.DEFINE_string("wandb.project", "flow", "Project.")
    flags.DEFINE_string("wandb.entity", None, "User or team.")
    flags.DEFINE_string("wandb.group", None, "Group of runs.")
    flags.DEFINE_string("wandb.name", name, "Name of the run, and of its folder under runs/.")
    flags.DEFINE_string("wandb.notes", None, "A longer description.")
    flags.DEFINE_list("wandb.tags", [], "Tags, separated by commas.")


def define_device_flags() -> None:
    """Registers how several processes find each other."""
    flags.DEFINE_string(
        "coordinator_address", None, "host:port of process 0 where a run has several; 'auto' on TPU pods, SLURM."
    )
    flags.DEFINE_integer("num_processes", None, "Processes in the run, with --coordinator_address.")
    flags.DEFINE_integer("process_id", None, "This process's number, with --coordinator_address.")


def run_program(define_flags: Callable[[], None], main: Callable[[ConfigDict], None]) -> None:
    """Reads a program's flags and calls main(config); a UserError ends it with one line and status 1."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be in any encoding
    try:
        app.run(main, flags_parser=lambda argv: parse_flags(define_flags, argv))
    except UserError as error:
        _end(str(error))
    except OSError as error:
        if error.errno is None or error.filename is None:
            raise
        _end(f"{error.filename}: {error.strerror}")
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        reason = str(error).partition("\n")[0][:200]
        _end(
            f"process {jax.process_index()} of the run has lost another one ({reason}); give all their commands again, "
            "and they continue from the last checkpoint"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _end(message: str) -> NoReturn:
    """Ends the program with one line and status 1."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(1)  # an ordinary end would wait for the other processes, which wait for this one
    sys.exit(1)


def parse_flags(define_flags: Callable[[], None], argv: list[str]) -> ConfigDict:
    """The configuration that a command line (argv[0] = the program) asks for; UserError where it cannot be read."""
    builtin = set(FLAGS)
    define_flags()
    try:
        extra = FLAGS(argv)[1:]
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())} (--help lists the flags)") from None
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}: flags are written --name value (--help lists them)")
    logging.set_verbosity(logging.WARNING)  # Orbax reports every stage of every save otherwise
    return read_flags(set(FLAGS) - builtin)


def read_flags(names: Iterable[str]) -> ConfigDict:
    """The values of flags `names`, those named `group.name` in a ConfigDict of their own, presets filled in.

    Raises UserError where two spellings of one flag contradict each other.
    """
    names, config = set(names), ConfigDict()
    for name in sorted(names, key=lambda name: ("." in name, name)):
        *group, leaf = name.split(".")
        if group and group[0] not in config:
            config[group[0]] = ConfigDict()
        value = check_value(name, FLAGS[name].value)
        (config[group[0]] if group else config)[leaf] = value
    if "model.preset" in names:
        resolve_model(config)
    if "wandb.mode" in names:
        resolve_wandb(config)
    return config


def check_value(name: str, value: Any) -> Any:
    """The value of flag `name` as the programs use it; UserError for what no flag can be: numbers that are not finite
    or beyond 32 bits, names that no file can have."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name}={value} is no finite number; give one")
    if name == "seed" and not 0 <= value < 2**32:
        raise UserError(f"--seed={value}: use a number from 0 to {2**32 - 1}")
    if name != "seed" and isinstance(value, int) and abs(value) >= 2**31:
        raise UserError(f"--{name}={value} is too large; use a number below {2**31}")
    if name in _path_flags and value is not None:
        value = expand_path(value, name)
        if not value or any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in value.split("/")):
            raise UserError(f"--{name}={value[:60]}: a name of 1 to 255 bytes is needed")
    return value


def is_explicit(name: str) -> bool:
    """Whether the user gave flag `name`."""
    return bool(FLAGS[name].present)


def resolve_model(config: ConfigDict) -> None:
    """Fills the preset's sizes into what the user left unset, and folds --use_stable_vae in."""
    model = config.model
    for name, value in PRESETS[model.preset].items():
        if not is_explicit(f"model.{name}"):
            model[name] = value
    use_stable_vae = FLAGS["use_stable_vae"].value
    del config.use_stable_vae
    if use_stable_vae is not None:
        if is_explicit("model.use_stable_vae") and model.use_stable_vae != use_stable_vae:
            raise UserError(
                f"--use_stable_vae={use_stable_vae} contradicts --model.use_stable_vae={model.use_stable_vae}; give one"
            )
        model.use_stable_vae = use_stable_vae


def override_model(saved: dict[str, Any]) -> ConfigDict:
    """The --model.* values `saved` with a run, with the compute type of this command line, if it gives one.

    UserError where it gives another value than the run's for what a trained model has settled.
    """
    model = ConfigDict(saved)
    for name in saved:
        if not is_explicit(f"model.{name}"):
            continue
        given = FLAGS[f"model.{name}"].value
        if name == "dtype":
            model.dtype = given
        elif given != model[name]:
            raise UserError(f"--model.{name}={given}, but the run of --load_dir has {model[name]}; leave the flag out")
    use_stable_vae = FLAGS["use_stable_vae"].value
    if use_stable_vae not in (None, model.use_stable_vae):
        raise UserError(
            f"--use_stable_vae={use_stable_vae}, but the run of --load_dir has {model.use_stable_vae}; leave it out"
        )
    return model


def check_architecture(model: ConfigDict, saved: dict[str, Any], load_dir: str) -> None:
    """UserError where the parameters of a run with the --model.* values `saved` do not fit the `model`."""
    for name in ARCHITECTURE:
        if model[name] != saved[name]:
            raise UserError(f"--model.{name}={model[name]}, but --load_dir={load_dir} has {saved[name]}; give that")


def model_flags() -> list[str]:
    """The names of all --model.* flags."""
    return [name for name in FLAGS if name.startswith("model.")]


def refuse_ignored(names: Iterable[str], reason: str) -> None:
    """UserError for a flag among `names` that the user gave although it has no effect here."""
    for name in names:
        if name in FLAGS and is_explicit(name):
            value = FLAGS[name].value
            value = ",".join(value) if isinstance(value, list) else value
            raise UserError(f"--{name}={value} has no effect {reason}; leave it out")


def resolve_wandb(config: ConfigDict) -> None:
    """Settles mode and name."""
    wandb = config.wandb
    if wandb.offline and wandb.mode not in (None, "offline"):
        raise UserError(f"--wandb.offline contradicts --wandb.mode={wandb.mode}; give one")
    if wandb.mode is None:
        wandb.mode = "offline" if wandb.offline else os.environ.get("WANDB_MODE", "online")
    if wandb.mode not in ("online", "offline", "disabled"):
        raise UserError(f"WANDB_MODE={wandb.mode}: use online, offline or disabled, or give --wandb.mode")
    del wandb.offline
    wandb.name = wandb.name.replace("{dataset_name}", str(config.dataset_name))


def run_folder(config: ConfigDict) -> Path:
    """Where a run keeps everything: --save_dir, or runs/<--wandb.name>, made fit for a file name."""
    name = re.sub(r"[^\w.=+-]+", "_", config.wandb.name)
    if not config.save_dir and (not name.strip(".") or len(name.encode()) > 255):
        raise UserError(f"--wandb.name={config.wandb.name[:60]} is no name for a folder; choose another, or --save_dir")
    return Path(config.save_dir or Path("runs") / name)


def guides(cfg_scale: float) -> bool:
    """Whether a guidance scale takes a second pass of the model."""
    return guidance_scale(cfg_scale) is not None


def guidance_scale(cfg_scale: float) -> float | None:
    """None (no guidance, one pass a step) for the flag's -1 and for 1, which equals it; otherwise the scale."""
    return None if cfg_scale in (-1, 1) else cfg_scale


def ema_decay(target_update_rate: float) -> float:
    """The decay of the moving average; the recipe's rate 1 means "no averaging" (decay 0), not "frozen"."""
    return 0.0 if target_update_rate == 1 else target_update_rate


def read_numbers(words: list[str], flag: str, kind: type, highest: float, lowest: float | None = None) -> list:
    """The numbers of a flag that takes several; UserError where one is none, not finite, or out of bounds."""
    try:
        numbers = [kind(word) for word in words]
    except ValueError:
        example = "100,20,5" if kind is int else "1,4"
        raise UserError(f"--{flag}={','.join(words)}: give numbers separated by commas, such as {example}") from None
    if not numbers:
        raise UserError(f"--{flag}= is empty: give numbers separated by commas")
    if not all(map(math.isfinite, numbers)) or max(numbers) > highest:
        raise UserError(f"--{flag}={','.join(words)}: give numbers up to {highest}")
    if lowest is not None and min(numbers) < lowest:
        raise UserError(f"--{flag}={','.join(words)}: give numbers of {lowest} or more")
    return numbers


def check_model(model: ConfigDict, latent_shape: tuple[int, int, int]) -> None:
    """Raises UserError where no DiT of this configuration can work on latents (h, w, c)."""
    height, width, _ = latent_shape
    patch = model.patch_size
    if height % patch or width % patch:
        fits = [p for p in range(1, min(height, width) + 1) if height % p == 0 and width % p == 0]
        raise UserError(
            f"--model.patch_size={patch} does not divide the {height}x{width} input of the model; "
            f"use one of {', '.join(map(str, fits))}"
        )
    if model.hidden_size % model.num_heads:
        raise UserError(
            f"--model.num_heads={model.num_heads} does not divide --model.hidden_size={model.hidden_size}; "
            f"use {_nearest_divisor(model.hidden_size, model.num_heads)} heads, for example"
        )
    if model.hidden_size % 4:
        raise UserError(
            f"--model.hidden_size={model.hidden_size} must be a multiple of 4 (sines and cosines of two axes); "
            f"use {-(-model.hidden_size // 4) * 4}"
        )
    if int(model.mlp_ratio * model.hidden_size) < 1:
        raise UserError(f"--model.mlp_ratio={model.mlp_ratio} leaves the MLP no width; use 4, for example")
    num_params, limit = count_parameters(model, latent_shape), memory_limit()
    if 16 * num_params > limit:  # float32 parameters, EMA and two moments
        raise UserError(
            f"a model of --model.hidden_size={model.hidden_size}, --model.depth={model.depth}, --model.mlp_ratio="
            f"{model.mlp_ratio:g} and --model.num_classes={model.num_classes} has {num_params:,} parameters; with "
            f"optimizer they need {16 * num_params / 2**30:,.0f} GiB, of which there are {limit / 2**30:,.0f}; use less"
        )
    if model.cfg_scale < 0 and model.cfg_scale != -1:
        raise UserError(f"--model.cfg_scale={model.cfg_scale}: use a scale of 0 or more, or -1 for no guidance")
    for beta in ("beta1", "beta2"):
        if model[beta] >= 1:
            raise UserError(f"--model.{beta}={model[beta]} must be below 1; use 0.99, for example")


def count_parameters(model: ConfigDict, latent_shape: tuple[int, int, int]) -> int:
    """Parameters of the DiT, but for biases; and its table of positions, a constant as large as a parameter."""
    height, width, channels = latent_shape
    d, p = model.hidden_size, model.patch_size
    block = (10 + 2 * model.mlp_ratio) * d * d
    ends = (3 * d + 256 + 2 * p * p * channels + model.num_classes) * d
    return int(model.depth * block + ends + (height // p) * (width // p) * d)


def memory_limit() -> int:
    """Bytes of this machine's memory, or of all devices if those have more."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    of_devices = sum(stat.get("bytes_limit", 0) for stat in stats) * jax.process_count()
    return max(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), of_devices)


def check_batch_memory(batch_size: int, image_shape: tuple[int, ...], copies: int = 6) -> None:
    """UserError where the machine cannot hold that many images: a batch, those read ahead, and work on it."""
    needed, limit = copies * batch_size * math.prod(image_shape) // jax.process_count(), memory_limit()
    if needed > limit:
        raise UserError(
            f"--batch_size={batch_size} of {'x'.join(map(str, image_shape))} images needs {needed / 2**30:,.0f} GiB, "
            f"but there are {limit / 2**30:,.0f}; use a smaller one"
        )


def _nearest_divisor(number: int, near: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))


def check_batch_size(batch_size: int, num_devices: int, grad_accum: int = 1) -> None:
    """Raises UserError where a global batch does not spread evenly over the devices of all processes, in every one of
    `grad_accum` parts."""
    divisor = num_devices * grad_accum
    if batch_size < 1:
        raise UserError(f"--batch_size={batch_size}: use {divisor} or a multiple of it")
    if batch_size % divisor:
        parts = f" in --grad_accum={grad_accum} parts" if grad_accum > 1 else ""
        raise UserError(
            f"--batch_size={batch_size} does not divide over {num_devices} device{'s' * (num_devices > 1)}{parts}; "
            f"use a multiple of {divisor}"
        )


def check_writable(folder: Path, flag: str) -> None:
    """Creates `folder` and proves that files can be written there; UserError otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a name of its own: the processes of a run try at the same time
            pass
    except OSError as error:
        raise UserError(f"--{flag}={folder} cannot be written ({error.strerror}); choose another folder") from None


def check_resumable(config: dict[str, Any], saved: dict[str, Any], folder: Path) -> dict[str, tuple[Any, Any]]:
    """{flag: (old, new)} of what differs between the run in `folder`, of configuration `saved`, and `config`; UserError
    where it cannot be continued so. Data are compared by utils/fingerprint.py."""
    if saved["dataset"]["vae_sha256"] != config["dataset"]["vae_sha256"]:
        raise UserError(
            f"{folder} holds a run on the latents of --vae={saved['dataset']['vae']}, which is not "
            f"{config['dataset']['vae']}; give that one, or {NEW_RUN}"
        )
    old, new = _flatten(saved), _flatten(config)
    changed = {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}
    for name in FIXED:
        if name in changed:
            before, now = changed[name]
            raise UserError(f"{folder} holds a run with --{name}={before}, not {now}: give that value, or {NEW_RUN}")
    if new["load_dir"] is not None and new["load_dir"] != old.get("load_dir"):
        raise UserError(
            f"--load_dir={new['load_dir']}: {folder} holds a run already, which did not start from there; leave the "
            f"flag out to continue it, or {NEW_RUN}"
        )
    return {name: values for name, values in changed.items() if name not in COMPARED_ELSEWHERE}


def _flatten(config: dict[str, Any]) -> dict[str, Any]:
    """{flag: value} of a configuration, groups as group.name, without what is known of the data."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{leaf}": leaf_value for leaf, leaf_value in value.items()} if name != "dataset" else {}
        else:
            flat[name] = value
    return flat


def can_guide(class_dropout_prob: float) -> bool:
    """Whether a model trained so knows both sides of classifier-free guidance: the label dropped, and given."""
    return 0 < class_dropout_prob < 1


def explain_no_guidance(class_dropout_prob: float) -> str:
    what = 'has no meaning for "no label"' if class_dropout_prob == 0 else "knows no labels"
    return f"with --model.class_dropout_prob={class_dropout_prob:g} the model {what}, which guidance needs"


def to_text(config: ConfigDict) -> str:
    """The configuration as YAML, groups last, for a person to read."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False).rstrip()
