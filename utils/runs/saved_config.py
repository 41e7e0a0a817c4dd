"""Configurations that were saved with a run: what older runs left out, and whether one can be a run's at all.

`read_config` is the only way in, whatever file a configuration is from: a checkpoint, a run's config.json, the metadata
of an exported file, the hub. Bounds are those of the flags (utils/base/settings.py).
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from utils.base.errors import UserError
from utils.base.external import BadFileError
from utils.base.settings import is_optional, kind_of, settings_of
from utils.images.pixels import PixelFormat
from utils.networks.dit_config import DiTConfig
from utils.networks.network import NETWORKS, NetworkConfig
from utils.objectives.flow_matching import LEGACY_T_SAMPLERS
from utils.objectives.objectives import OBJECTIVES
from utils.runs.config import GROUPS, objective_settings

# {setting: value} of runs that were saved before there was such a setting.
OLDER_RUNS: dict[str, Any] = {
    "objective.name": "flow_matching",
    "freeze": [],
    "lora_rank": 0,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "grad_clip": None,
    "lr_schedule": "constant",
    "model.network": "dit",
    "model.timestep_scale": 10_000.0,
    "model.step_conditioning": 0,
    "model.learned_positions": 0,
    "model.learn_sigma": 0,
    "model.norm": "layer",
    "model.mlp": "gelu",
    "model.rope": 0,
    "model.qk_norm": 0,
}

VAE_FACTOR = 8  # of Stable Diffusion's VAE: image side over latent side
MAX_SIDE = 2**13
MAX_CHANNELS = 256
MAX_PATCHES = 2**20  # of an image; a table of their positions is a constant of the model
MAX_TEXT = 4096
MAX_NESTING = 10


class Rule(NamedTuple):
    """A test of a value, and what it asks for in words."""

    is_good: Callable[[Any], bool]
    what: str


def _integer(low: float, high: float) -> Rule:
    return Rule(lambda value: type(value) is int and low <= value <= high, f"an integer from {low} to {high}")


def _number(low: float | None, high: float | None) -> Rule:
    bounds = (-math.inf if low is None else low, math.inf if high is None else high)

    def is_good(value):
        # Compared before it is converted: an integer of any length is no float.
        return type(value) in (int, float) and bounds[0] <= value <= bounds[1] and abs(value) < 1e300

    return Rule(is_good, f"a number from {bounds[0]} to {bounds[1]}")


def _choice(choices: Collection[str]) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")


def _is_text(value: Any) -> bool:
    """Whether this can be a name or a path: bytes that are no UTF-8 are surrogates, as in names of files."""
    if not isinstance(value, str) or len(value) > MAX_TEXT or "\0" in value:
        return False
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _is_shape(value: Any) -> bool:
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


TEXT = Rule(_is_text, "a text")
SWITCH = _integer(0, 1)
NAMES = Rule(_are_names, "a list of names")
CONDITION = Rule(_is_condition, "a kind of condition with its arrays")
SHAPE = Rule(_is_shape, f"a height and a width up to {MAX_SIDE} and up to {MAX_CHANNELS} channels")

# What a run must have, beside MODEL_SETTINGS; and what may be missing, or of other kinds of runs.
NEEDED = {"dataset.image_shape": SHAPE, "dataset.condition": CONDITION}
OTHERS = {
    "model.preset": TEXT,
    "objective.name": TEXT,
    "dataset.name": TEXT,
    "model.use_stable_vae": _integer(0, 1),
    "vae": _or_none(TEXT),
    "dataset.vae": _or_none(TEXT),
    "dataset.vae_sha256": _or_none(TEXT),
    "dataset.codec": Rule(_is_codec, "name, source and sha256 of a codec"),
    "dataset.latent_shape": _or_none(SHAPE),
    "dataset.pixels": Rule(_are_pixels, "the dtype and range of images"),
    "dataset.splits": Rule(_are_splits, "the format and number of examples of each split"),
    "dataset.class_names": NAMES,
    "dataset.empty_classes": Rule(_are_labels, "a list of labels"),
    "seed": _integer(0, 2**32 - 1),
    "batch_size": _integer(1, 2**31 - 1),
    "frozen": Rule(lambda value: value == [] or _are_names(value), "a list of names"),
}  # fmt: skip


def read_config(content: Any) -> dict[str, Any]:
    """The configuration of a run, with what older runs did not save.

    A network or an objective that is not registered here is accepted by its name: who makes it says that. BadFileError
    naming the first setting that is missing, or that no run can have.
    """
    _check_nesting(content)
    groups = ("model", "dataset", "objective", "jax")
    if not isinstance(content, dict) or not all(isinstance(content.get(group, {}), dict) for group in groups):
        raise BadFileError("it is no configuration of a run")
    config = _complete(content)
    odd = [name for group in groups for name in config.get(group, {}) if group != "dataset" and not name.isidentifier()]
    if odd:
        raise BadFileError(f"its configuration has a setting {odd[0][:60]!r}, which is no name of one")
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
    """BadFileError for values within values within values that no configuration has, which JSON cannot write again."""
    if room == 0:
        raise BadFileError("its configuration is nested too deep")
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        _check_nesting(value, room - 1)


def _show(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, (int, float, str, list)) else type(value).__name__


def _complete(content: dict[str, Any]) -> dict[str, Any]:
    """The configuration with what older runs did not save."""
    model, data = dict(content.get("model", {})), dict(content.get("dataset", {}))
    config = {**content, "model": model}
    absent = {"vae": None, "vae_sha256": None, "latent_shape": None, "condition": {"kind": "class"}}
    if "dataset_name" in config:
        absent = {"name": config["dataset_name"], **absent}
    elif "name" in data:
        config["dataset_name"] = data["name"]
    config["dataset"] = absent | data
    _complete_codec(config)
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
    network = _find_network(model.get("network", "dit"))
    for name, value in OLDER_RUNS.items():
        group, _, leaf = name.rpartition(".")
        if group != "model" or hasattr(network, leaf):
            (config[group] if group else config).setdefault(leaf, value)
    return config


def _complete_codec(config: dict[str, Any]) -> None:
    """Adds what runs of before --codec did not save: the codec that was asked for, and the one that was loaded."""
    data = config["dataset"]
    is_latent = config["model"].get("use_stable_vae")
    record = {"name": "kl" if is_latent else "pixels", "source": data["vae"], "sha256": data["vae_sha256"]}
    data.setdefault("codec", record)
    asked = f"kl:{config['vae']}" if config.get("vae") else None
    config.setdefault("codec", asked if is_latent else "pixels")


def _find_network(name: Any) -> Any:
    """Returns the configuration class of a network; that of every network where it is not registered."""
    entry = NETWORKS.get(name) if isinstance(name, str) else None
    return entry.config_class if entry else NetworkConfig


def _rules(network: Any) -> dict[str, Rule]:
    """Returns {group.name: rule} of everything that is known; also of registered objectives and this network."""
    fields: dict[str, dataclasses.Field] = {}
    for group_class, group in GROUPS.values():
        fields |= settings_of(group_class, group) if not group else {}
    fields |= settings_of(_find_network(network), "model")
    rules = {name: _rule_of(field) for name, field in fields.items()}
    rules["model.network"] = TEXT
    for name, field in objective_settings().items():
        # Of several objectives, those that are not the run's have no value.
        rules[name] = _or_none(_rule_of(field)) if name.startswith("objective.") else _rule_of(field)
    return rules | NEEDED | OTHERS


def _rule_of(field: dataclasses.Field) -> Rule:
    metadata = field.metadata
    kind = kind_of(field)
    low, high = metadata["low"], metadata["high"]
    if metadata["choices"]:
        rule = _choice(metadata["choices"])
    elif kind is tuple:
        rule = Rule(lambda value: value == [] or _are_names(value), "a list of names")
    elif kind is str:
        rule = TEXT
    elif kind is float:
        rule = _number(low, high)
    else:
        rule = _integer(-(2**31) if low is None else low, 2**31 if high is None else high)
    return _or_none(rule) if is_optional(field) else rule


def _has(config: Mapping[str, Any], name: str) -> bool:
    group, dot, leaf = name.rpartition(".")
    return leaf in (config[group] if dot else config)


def _get(config: Mapping[str, Any], name: str) -> Any:
    group, dot, leaf = name.rpartition(".")
    return (config[group] if dot else config)[leaf]


def _check_together(config: Mapping[str, Any]) -> None:
    """BadFileError for settings of which each may be, but not all together."""
    model, data = config["model"], config["dataset"]
    if not _has(config, "objective.name") or not _has(config, "dataset.name"):
        raise BadFileError("its configuration has no name of an objective or of a data set")
    if data["condition"]["kind"] == "class":
        _check_classes(data, model["num_classes"])
    shape = find_latent_shape(config)
    if not model["use_stable_vae"] and list(shape) != list(data["image_shape"]):
        raise BadFileError(f"its configuration has latents {shape} of a model of pixels {data['image_shape']}")
    if model["network"] != "dit" or not _is_latent_known(config):
        return
    try:
        DiTConfig.from_mapping(model).check_sizes(shape)
    except UserError as error:
        raise BadFileError(str(error)) from None
    if shape[0] * shape[1] // model["patch_size"] ** 2 > MAX_PATCHES:
        raise BadFileError(f"its configuration has images of more than {MAX_PATCHES:,} patches")


def _check_classes(data: Mapping[str, Any], num_classes: int) -> None:
    """BadFileError where names, labels without images and the number of labels do not go together."""
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
    """BadFileError where the parameters of a DiT, {path: shape}, are not those of its configuration: compared before
    anything is made of its sizes."""
    model, kernel = config["model"], "['patch_embed']['kernel']"
    if model["network"] != "dit":
        return
    patch, width = model["patch_size"], model["hidden_size"]
    # An older run does not say how many channels the latents of its VAE have.
    channels = (find_latent_shape(config)[2],) if _is_latent_known(config) else shapes.get(kernel, ())[2:3]
    expected = {kernel: (patch, patch, *channels, width)}
    if config["dataset"]["condition"]["kind"] == "class":
        expected["['label_embed']['Embed_0']['embedding']"] = (model["num_classes"] + 1, width)
    for path, shape in expected.items():
        if shapes.get(path) != shape:
            raise BadFileError(
                f"its configuration is not of its parameters ({path} is {shapes.get(path)}, not {shape})"
            )
    depth = len({path.partition("]")[0] for path in shapes if path.startswith("['block_")})
    if depth != model["depth"]:
        raise BadFileError(f"its configuration has model.depth={model['depth']}, its parameters {depth} blocks")


def _is_latent_known(config: Mapping[str, Any]) -> bool:
    """Whether `find_latent_shape` is more than a guess."""
    return bool(config["dataset"].get("latent_shape")) or not config["model"]["use_stable_vae"]


def find_latent_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """The shape (h, w, c) of the input of a run's model. Runs of before it was recorded had a VAE of factor 8 and 4
    channels."""
    data = config["dataset"]
    if data.get("latent_shape"):
        height, width, channels = data["latent_shape"]
    else:
        height, width, channels = data["image_shape"]
        if config["model"]["use_stable_vae"]:
            height, width, channels = height // VAE_FACTOR, width // VAE_FACTOR, 4
    return height, width, channels
