"""Reads configurations that were saved with a run: completes those of older runs, refuses what no run can have.

`read_config` is the only way in, whatever file a configuration comes from: a checkpoint, a run's config.json, the
metadata of an exported file, the hub. Bounds are those of the flags (utils/base/settings.py).
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from utils.base.external import BadFileError
from utils.base.messages import UserError
from utils.base.settings import is_optional, kind_of, settings_of
from utils.images.pixels import PixelFormat
from utils.networks.dit_config import DiTConfig
from utils.networks.network import NETWORKS, NetworkConfig
from utils.objectives.flow_matching import LEGACY_T_SAMPLERS
from utils.objectives.objectives import OBJECTIVES
from utils.runs.config import GROUPS, objective_settings

# {setting: value} of runs that were saved before there was such a setting: how those runs behaved, whatever the
# default of a new run is.
OLDER_RUNS: dict[str, Any] = {
    "objective.name": "flow_matching",
    "freeze": [],
    "lora_rank": 0,
    "optimizer": "adam",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "grad_clip": None,
    "lr_schedule": "constant",
    "ema_profiles": [],
    "check_images": 1,
    "dataset_weights": None,
    "augment": [],
    "augment_prob": 0.12,
    "coupling": "none",
    "coupling_rows": None,
    "coupling_weight": None,
    "coupling_draws": 100,
    "model.network": "dit",
    "model.timestep_scale": 10_000.0,
    "model.step_conditioning": 0,
    "model.learned_positions": 0,
    "model.learn_sigma": 0,
    "model.condition_dropout": "together",
    "model.token_mode": "context",
    "model.class_tokens": 0,
    "model.inner_head": 0,
    "model.inner_weight": 0.5,
    "model.norm": "layer",
    "model.mlp": "gelu",
    "model.rope": 0,
    "model.qk_norm": 0,
    "model.bottleneck": 0,
}

VAE_FACTOR = 8  # of Stable Diffusion's VAE: image side over latent side
# Sizes that no run has; a file may be anyone's, and arrays are made of what it says.
MAX_SIDE = 2**13
MAX_CHANNELS = 256
MAX_PATCHES = 2**20  # of an image; a table of their positions is a constant of the model
MAX_TEXT = 4096  # characters; as long as paths on Linux
MAX_NESTING = 10


class Rule(NamedTuple):
    """A test of a value, and in words what it accepts (ends the message "not ...")."""

    is_good: Callable[[Any], bool]
    what: str


def _integer(low: float, high: float) -> Rule:
    # Not isinstance: a bool is an int to Python, but true is no number of layers.
    return Rule(lambda value: type(value) is int and low <= value <= high, f"an integer from {low} to {high}")


def _number(low: float | None, high: float | None) -> Rule:
    bounds = (-math.inf if low is None else low, math.inf if high is None else high)

    def is_good(value):
        # Compared as it is: converting an integer of hundreds of digits to float overflows.
        return type(value) in (int, float) and bounds[0] <= value <= bounds[1] and abs(value) < 1e300

    return Rule(is_good, f"a number from {bounds[0]} to {bounds[1]}")


def _choice(choices: Collection[str]) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")


def _parsed(parse: Callable[[Any], Any]) -> Rule:
    def is_good(value):
        try:
            parsed = parse(value)
            return (list(parsed) if isinstance(parsed, tuple) else parsed) == value
        except ValueError:
            return False

    return Rule(is_good, "a value as its flag takes it")


def _is_text(value: Any) -> bool:
    """Returns whether this can be a name or a path. Bytes of a file name that are no UTF-8 may be surrogates."""
    if not isinstance(value, str) or len(value) > MAX_TEXT or "\0" in value:
        return False
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _is_shape(value: Any) -> bool:
    # (height, width, channels)
    if not isinstance(value, (list, tuple)) or len(value) != 3 or any(type(size) is not int for size in value):
        return False
    return all(1 <= size <= most for size, most in zip(value, (MAX_SIDE, MAX_SIDE, MAX_CHANNELS), strict=True))


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_text, value))


def _are_labels(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(label) is int and label >= 0 for label in value)


def _is_condition(value: Any) -> bool:
    return isinstance(value, dict) and _is_text(value.get("kind")) and isinstance(value.get("arrays", []), list)


def _are_pixels(value: Any) -> bool:
    try:
        PixelFormat.from_json(value)
    except (ValueError, KeyError, TypeError):
        return False
    return True


def _are_splits(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(split, dict) and _is_text(split.get("format")) and type(split.get("num_examples")) is int
        for split in value.values()
    )


def _is_codec(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"name", "source", "sha256"}
        and _is_text(value["name"])
        and all(text is None or _is_text(text) for text in (value["source"], value["sha256"]))
    )


def _or_none(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.is_good(value), f"{rule.what}, or null")


# Rules that several settings share.
TEXT = Rule(_is_text, "a text")
SWITCH = _integer(0, 1)
NAMES = Rule(_are_names, "a list of names")
CONDITION = Rule(_is_condition, "a kind of condition with its arrays")
SHAPE = Rule(_is_shape, f"a height and a width up to {MAX_SIDE} and up to {MAX_CHANNELS} channels")

# Settings that are no flags: what every run must have, and what may be missing, as it is of other kinds of runs.
NEEDED = {"dataset.image_shape": SHAPE, "dataset.condition": CONDITION}
OTHERS = {
    "model.preset": TEXT,
    "objective.name": TEXT,
    "dataset.name": TEXT,
    "model.use_stable_vae": _integer(0, 1),
    # The codec, in the words of earlier versions and of this one.
    "vae": _or_none(TEXT),
    "dataset.vae": _or_none(TEXT),
    "dataset.vae_sha256": _or_none(TEXT),
    "dataset.codec": Rule(_is_codec, "name, source and sha256 of a codec"),
    "dataset.latent_shape": _or_none(SHAPE),
    # The images and their labels.
    "dataset.pixels": Rule(_are_pixels, "the dtype and range of images"),
    "dataset.splits": Rule(_are_splits, "the format and number of examples of each split"),
    "dataset.class_names": NAMES,
    "dataset.empty_classes": Rule(_are_labels, "a list of labels"),
    "seed": _integer(0, 2**32 - 1),
    "batch_size": _integer(1, 2**31 - 1),
    # Parts of the parameters that are not trained.
    "frozen": Rule(lambda value: value == [] or _are_names(value), "a list of names"),
}  # fmt: skip


def read_config(content: Any) -> dict[str, Any]:
    """Returns the configuration of a run, completed by what older runs did not save.

    A network or an objective that is not registered is accepted by its name: the code that makes it refuses it. Raises
    BadFileError naming the first setting that is missing, or that has a value that no run can have.
    """
    # The form first: what follows indexes groups and looks into them.
    _check_nesting(content)
    groups = ("model", "dataset", "objective", "jax")
    if not isinstance(content, dict) or not all(isinstance(content.get(group, {}), dict) for group in groups):
        raise BadFileError("it is no configuration of a run")
    config = _complete(content)

    # Names that no setting can have.
    odd = [name for group in groups for name in config.get(group, {}) if group != "dataset" and not name.isidentifier()]
    if odd:
        raise BadFileError(f"its configuration has a setting {odd[0][:60]!r}, which is no name of one")

    # What must be there, and every value by itself, before values are compared with each other.
    rules = _rules(config["model"]["network"])
    needed = settings_of(_find_network(config["model"]["network"]), "model")
    for name in (*needed, "model.use_stable_vae", "model.t_sampler", *NEEDED):
        if not _has(config, name):
            raise BadFileError(f"its configuration has no {name.partition('.')[2]}")
    for name, rule in rules.items():
        if _has(config, name) and not rule.is_good(_get(config, name)):
            raise BadFileError(f"its configuration has {name}={_show(_get(config, name))}, not {rule.what}")
    _check_together(config)
    return config


def _check_nesting(content: Any, room: int = MAX_NESTING) -> None:
    """Raises BadFileError for values nested deeper than any configuration's: writing them again as JSON may recurse
    too deep."""
    if room == 0:
        raise BadFileError("its configuration is nested too deep")
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        _check_nesting(value, room - 1)


def _show(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, (int, float, str, list)) else type(value).__name__


def _complete(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration with what older runs did not save; `content` itself is not changed."""
    # The data. The oldest runs named them in one place or the other.
    model, data = dict(content.get("model", {})), dict(content.get("dataset", {}))
    config = {**content, "model": model}
    absent = {"vae": None, "vae_sha256": None, "latent_shape": None, "condition": {"kind": "class"}}
    if "dataset_name" in config:
        absent = {"name": config["dataset_name"], **absent}
    elif "name" in data:
        config["dataset_name"] = data["name"]
    config["dataset"] = absent | data
    _complete_codec(config)

    # The objective: earlier names of time samplers, and defaults of fields that came later.
    t_sampler = model.get("t_sampler")
    if isinstance(t_sampler, str):
        model["t_sampler"] = LEGACY_T_SAMPLERS.get(t_sampler, t_sampler)
    config["objective"] = dict(content.get("objective", {}))
    name = config["objective"].get("name", "flow_matching")
    objective = OBJECTIVES.get(name) if isinstance(name, str) else None
    for setting, field in settings_of(objective, "objective").items() if objective else ():
        group, _, leaf = setting.rpartition(".")
        if group == "objective" and config["objective"].get(leaf) is None:
            config["objective"][leaf] = field.default

    # Settings that came later; those of a network only where this one has them.
    network = _find_network(model.get("network", "dit"))
    for name, value in OLDER_RUNS.items():
        group, _, leaf = name.rpartition(".")
        if group != "model" or hasattr(network, leaf):
            (config[group] if group else config).setdefault(leaf, value)
    return config


def _complete_codec(config: dict[str, Any]) -> None:
    """Adds what runs from before --codec did not save: the requested codec, and the one that was loaded."""
    data = config["dataset"]
    is_latent = config["model"].get("use_stable_vae")
    record = {"name": "kl" if is_latent else "pixels", "source": data["vae"], "sha256": data["vae_sha256"]}
    data.setdefault("codec", record)
    asked = f"kl:{config['vae']}" if config.get("vae") else None
    config.setdefault("codec", asked if is_latent else "pixels")


def _find_network(name: Any) -> Any:
    """Returns the configuration class of a network; the base class where the network is not registered."""
    entry = NETWORKS.get(name) if isinstance(name, str) else None
    return entry.config_class if entry else NetworkConfig


def _rules(network: Any) -> dict[str, Rule]:
    """Returns {group.name: rule} for all known settings: of every run, of registered objectives and of `network`."""
    fields: dict[str, dataclasses.Field] = {}
    for group_class, group in GROUPS.values():
        fields |= settings_of(group_class, group) if not group else {}
    fields |= settings_of(_find_network(network), "model")
    rules = {name: _rule_of(field) for name, field in fields.items()}

    # A network from outside this repository is accepted by its name.
    rules["model.network"] = TEXT
    for name, field in objective_settings().items():
        # Fields of other objectives than the run's are null.
        rules[name] = _or_none(_rule_of(field)) if name.startswith("objective.") else _rule_of(field)
    return rules | NEEDED | OTHERS


def _rule_of(field: dataclasses.Field) -> Rule:
    # The bounds that the command line checks, for values in JSON.
    metadata = field.metadata
    kind = kind_of(field)
    low, high = metadata["low"], metadata["high"]
    if metadata["parse"]:
        rule = _parsed(metadata["parse"])
    elif metadata["choices"]:
        rule = _choice(metadata["choices"])
    elif kind is tuple:
        rule = Rule(lambda value: value == [] or _are_names(value), "a list of names")
    elif kind is str:
        rule = TEXT
    elif kind is float:
        rule = _number(low, high)
    else:
        rule = _integer(-(2**31) if low is None else low, 2**31 if high is None else high)

    # null stands for "not given", where a setting can be without a value.
    return _or_none(rule) if is_optional(field) else rule


def _has(config: Mapping[str, Any], name: str) -> bool:
    group, dot, leaf = name.rpartition(".")
    return leaf in (config[group] if dot else config)


def _get(config: Mapping[str, Any], name: str) -> Any:
    group, dot, leaf = name.rpartition(".")
    return (config[group] if dot else config)[leaf]


def _check_together(config: Mapping[str, Any]) -> None:
    """Raises BadFileError for settings that are valid one by one, but not together."""
    # The data: their name, classes and shapes.
    model, data = config["model"], config["dataset"]
    if not _has(config, "objective.name") or not _has(config, "dataset.name"):
        raise BadFileError("its configuration has no name of an objective or of a data set")
    if data["condition"]["kind"] == "class":
        _check_classes(data, model["num_classes"])
    shape = find_latent_shape(config)
    if not model["use_stable_vae"] and list(shape) != list(data["image_shape"]):
        raise BadFileError(f"its configuration has latents {shape} of a model of pixels {data['image_shape']}")

    # The sizes of a DiT, which are known to divide only where the shape of the latents is no guess.
    if model["network"] != "dit" or not _is_latent_known(config):
        return
    try:
        DiTConfig.from_mapping(model).check_sizes(shape)
    except UserError as error:
        raise BadFileError(str(error)) from None
    if shape[0] * shape[1] // model["patch_size"] ** 2 > MAX_PATCHES:
        raise BadFileError(f"its configuration has images of more than {MAX_PATCHES:,} patches")


def _check_classes(data: Mapping[str, Any], num_classes: int) -> None:
    """Raises BadFileError where class names, labels without images and the number of labels contradict each other."""
    if "class_names" not in data:
        raise BadFileError("its configuration has no class_names")
    num_names = len(data["class_names"])
    empty = set(data.get("empty_classes", ()))
    if num_names > num_classes:
        raise BadFileError(f"its configuration has {num_names} names of {num_classes} classes")
    if max(empty, default=0) >= num_names:
        raise BadFileError(f"its configuration has dataset.empty_classes of more than {num_names} classes")
    if len(empty) == num_names:
        raise BadFileError("its configuration has no class with images (dataset.empty_classes)")


def check_parameters(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises BadFileError where the parameters of a DiT, {path: shape}, do not fit its configuration.

    It is called before anything is allocated by the sizes in the configuration.
    """
    model, kernel = config["model"], "['patch_embed']['kernel']"
    if model["network"] != "dit":
        return
    patch, width = model["patch_size"], model["hidden_size"]

    # Width, patch size and classes, by the arrays that have them. An older run does not record how many channels the
    # latents of its VAE have: any number will do.
    channels = (find_latent_shape(config)[2],) if _is_latent_known(config) else shapes.get(kernel, ())[2:3]
    expected = {kernel: (patch, patch, *channels, model["bottleneck"] or width)}
    if config["dataset"]["condition"]["kind"] == "class":
        expected["['label_embed']['Embed_0']['embedding']"] = (model["num_classes"] + 1, width)
    for path, shape in expected.items():
        if shapes.get(path) != shape:
            raise BadFileError(
                f"its configuration is not of its parameters ({path} is {shapes.get(path)}, not {shape})"
            )

    # Blocks are counted: their names are in the paths.
    depth = len({path.partition("]")[0] for path in shapes if path.startswith("['block_")})
    if depth != model["depth"]:
        raise BadFileError(f"its configuration has model.depth={model['depth']}, its parameters {depth} blocks")


def _is_latent_known(config: Mapping[str, Any]) -> bool:
    """Returns whether `find_latent_shape` is more than a guess."""
    return bool(config["dataset"].get("latent_shape")) or not config["model"]["use_stable_vae"]


def find_latent_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Returns the shape (h, w, c) of the input of a run's model.

    Runs from before the shape was recorded are taken to have a VAE of factor 8 and 4 channels (Stable Diffusion's).
    """
    data = config["dataset"]
    if data.get("latent_shape"):
        height, width, channels = data["latent_shape"]
    else:
        height, width, channels = data["image_shape"]
        if config["model"]["use_stable_vae"]:
            height, width, channels = height // VAE_FACTOR, width // VAE_FACTOR, 4
    return height, width, channels
