"""Makes the configuration of a run from the settings that a user gives, in Python or on a command line.

Later layers win: defaults, the objective's own, the run that --load_dir names, what a run has recorded, the user's
file, and what the user typed. Each stands above the sizes of its preset.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from utils.base.effects import check_effects
from utils.base.messages import UserError, log
from utils.base.settings import find_entry, flatten_groups, settings_of, suggest_name
from utils.codecs import codecs
from utils.conditions.augmented import AUGMENTATIONS
from utils.data.loaders import find_loader, get_loader
from utils.images.decoding import find_mode
from utils.images.pixels import UINT8, PixelFormat, write_range
from utils.images.sizes import write_size
from utils.metrics.metrics import training_metrics
from utils.networks.network import NETWORKS
from utils.objectives.flow_matching import LEGACY_T_SAMPLERS
from utils.objectives.objectives import OBJECTIVES
from utils.runs.best import check_keep_best
from utils.runs.checkpoint import has_checkpoints
from utils.runs.config import OBJECTIVE_NAME, PRESET, START_SETTINGS, RunConfig, all_settings
from utils.runs.given import check_given
from utils.runs.opening import split_load_dir
from utils.runs.remote_run import find_remote_run
from utils.storage.urls import is_url
from utils.training.effects import PLAN_RULES, check_run_effects
from utils.training.start import SourceRun, read_started_from

# Settings under which earlier versions, and jax-flow, know the codec.
SPELLINGS = ("use_stable_vae", "model.use_stable_vae", "vae")
# Settings that a run which starts from another does not take from it: how it trains and computes.
OWN_MODEL_SETTINGS = ("model.class_dropout_prob", "model.dtype")


def make_config(
    given: Mapping[str, Any], *, file: Mapping[str, Any] | None = None, recorded: Mapping[str, Any] | None = None
) -> RunConfig:
    """Returns the configuration of a run with the settings {name: value}, named as the flags are; groups may be nested.

    Below `given` stand the settings of a user's `file`, which count as given, too, and below them what is `recorded` of
    another run and of environment variables, which does not. If `save_dir` is a run's and no data set is given, that
    run's own configuration is used below all of them. Raises UserError for unknown names, values out of bounds, and
    settings that contradict each other or have no effect.
    """
    # Names first: an unknown one is answered with the most similar setting.
    known = all_settings()
    file, given, recorded = (translate_spellings(flatten_groups(layer or {})) for layer in (file, given, recorded))
    for name in {**file, **given}:
        if name not in known and name not in (PRESET, OBJECTIVE_NAME):
            raise UserError(f"--{name} is no setting of a run{suggest_name(name, known, '--')}")
    for layer in (file, given):
        for name in layer.keys() & known:
            layer[name] = check_given(name, layer[name], known[name].metadata["is_path"])
    stated = {**file, **given}
    check_effects(PLAN_RULES, {"plan": stated.get("plan", 0)}, stated)

    # The run that is continued, or started from, decides what is left open.
    own = read_own_settings({**recorded, **stated})
    if own is not None:
        log(f"continuing {stated['save_dir']} with its own configuration")
        recorded = {**own, **recorded}
    layers = (drop_derived(recorded, stated), file, given)
    values = fill_layers(layers, find_inherited(layers) if own is None else {})
    if _has_mode(values) and codecs.parse_codec(values.get("codec") or "kl").name != "pixels":
        values.setdefault("image_mode", "RGB")  # which is what VAEs take
    if "flip" in (values.get("augment") or ()):
        values.setdefault("random_flip", 0)  # samples would be mirrored by that

    # The run is named after its data.
    name = values.get("wandb.name", known["wandb.name"].default)
    dataset_name = values.get("dataset_name", known["dataset_name"].default)
    values["wandb.name"] = name.replace("{dataset_name}", dataset_name)
    config = RunConfig.from_settings(values, frozenset(stated))
    check_together(config)
    check_run_effects(config, stated)
    return config


def translate_spellings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings under one name and value each. Raises UserError where two spellings contradict each other."""
    values = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}
    values = codecs.translate_spellings(values)
    if "model.t_sampler" in values:
        sampler = values["model.t_sampler"]
        values["model.t_sampler"] = LEGACY_T_SAMPLERS.get(sampler, sampler)
    return values


def flatten_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {name: value} of the settings in a run's JSON; records of its data and of JAX are left out."""
    known = {*all_settings(), PRESET, OBJECTIVE_NAME}
    flat = flatten_groups(content)
    return {name: value for name, value in flat.items() if name in known and value is not None}


def read_own_settings(settled: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the settings of the run in `save_dir`, where there is one and `settled` does not stand for itself."""
    # A whole command line names its data: nothing of the run's configuration is mixed in. Nor is it where --load_dir
    # asks to start from another run.
    folder = settled.get("save_dir")
    if folder is None:
        return None
    if is_url(folder):
        find_remote_run(folder).pull_run("save_dir")
    if "dataset_name" in settled or "load_dir" in settled or not has_checkpoints(split_load_dir(folder)[0]):
        return None
    saved = SourceRun.open(folder).saved
    settings = {name: value for name, value in flatten_settings(saved).items() if name not in START_SETTINGS}
    return _image_mode(saved, settings) | settings


def drop_derived(recorded: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that a run has recorded, without those that its objective has set if another is stated."""
    before = recorded.get(OBJECTIVE_NAME)
    after = stated.get(OBJECTIVE_NAME, before)
    if after == before:
        return dict(recorded)
    # A value that the run had by itself stays; one that is its objective's default follows the new objective.
    theirs, ours = own_defaults(OBJECTIVES.get(before)), own_defaults(OBJECTIVES.get(after))
    fields = all_settings()
    derived = {name: theirs.get(name, fields[name].default) for name in theirs.keys() | ours.keys() if name in fields}
    return {name: value for name, value in recorded.items() if name not in derived or value != derived[name]}


def own_defaults(objective: Any) -> dict[str, Any]:
    """Returns {name: value} of the settings of the network and the optimizer whose default is the objective's own."""
    return {f"model.{name}": value for name, value in getattr(objective, "MODEL_DEFAULTS", {}).items()}


def find_inherited(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the settings of the run from which a new one starts, or from which the one in its folder has started."""
    # A draft says where the run is and what it names; its architecture is not settled yet.
    draft = RunConfig.from_settings(fill_layers(layers, {}))
    folder = draft.folder
    draft_data = {"dataset_name": draft.data.dataset_name}
    if draft.start.load_dir and not has_checkpoints(folder):
        saved: Mapping[str, Any] | None = SourceRun.open(draft.start.load_dir).saved
    else:
        saved = read_started_from(folder)
    if saved is None:
        # A run that is continued reads its images as it did, also where that is no default any more.
        is_open = _has_mode(draft_data) and has_checkpoints(folder)
        return _image_mode(SourceRun.open(str(folder)).saved, draft_data) if is_open else {}

    # The architecture and the objective, the codec and, of images that can be resized, their size; of floats, their
    # range.
    model = find_entry("model.network", saved["model"]["network"], NETWORKS).config_class
    names = [name for name in settings_of(model, "model") if name not in OWN_MODEL_SETTINGS]
    theirs = flatten_settings(saved)
    names += ["model.t_sampler", *(name for name in theirs if name.startswith("objective."))]
    inherited = {name: theirs[name] for name in names if name in theirs}
    loader = get_loader(draft.data.dataset_name)
    record = saved["dataset"]["codec"]
    if record["name"] == "pixels" or loader.holds != "latents":  # latents say themselves what made them
        inherited["codec"] = str(codecs.CodecSpec(record["name"], record["source"]))
    # The same number stays the same input of the network.
    pixels = PixelFormat.from_record(saved["dataset"])
    if pixels != UINT8 and "value_range" in loader.options:
        inherited["value_range"] = write_range(pixels)
    if loader.is_resizable:
        inherited["image_size"] = write_size(saved["dataset"]["image_shape"][:2])
    return inherited | _image_mode(saved, draft_data)


def _has_mode(values: Mapping[str, Any]) -> bool:
    """Returns whether --image_mode has an effect on the data set of the settings {name: value}."""
    loader = find_loader(values.get("dataset_name") or "")
    return loader is not None and "image_mode" in loader.options


def _image_mode(saved: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the setting under which the data set of `values`, {name: value}, gives images of the channels and range
    of those of a run; {} if none does."""
    data = saved["dataset"]
    mode = find_mode(data["image_shape"], PixelFormat.from_record(data)) if _has_mode(values) else None
    return {} if mode is None else {"image_mode": mode}


def fill_layers(layers: Sequence[Mapping[str, Any]], inherited: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {name: value} of the layers, of which later ones win. Below them stand what is inherited, and the
    defaults of preset and objective."""
    chosen = {"model.network": "dit", OBJECTIVE_NAME: "flow_matching", **inherited}
    for layer in layers:
        chosen |= layer
    presets = find_entry("model.network", chosen["model.network"], NETWORKS).config_class.PRESETS
    defaults = own_defaults(find_entry(OBJECTIVE_NAME, chosen[OBJECTIVE_NAME], OBJECTIVES))

    def sizes(preset: str) -> dict[str, Any]:
        return {f"model.{name}": value for name, value in presets.get(preset, {}).items()}

    values = {**sizes(chosen.get(PRESET, "debug")), **defaults, **inherited}
    if chosen[OBJECTIVE_NAME] != inherited.get(OBJECTIVE_NAME, chosen[OBJECTIVE_NAME]):  # the run learns something else
        values |= {"model.step_conditioning": 0, **defaults}
    for layer in layers:
        below = values.get("codec") or ""
        values |= {**(sizes(layer[PRESET]) if PRESET in layer else {}), **layer}
        # A codec that is named without its source has the one below it.
        if below.startswith(f"{layer.get('codec')}:"):
            values["codec"] = below
    return values


def check_together(config: RunConfig) -> None:
    """Raises UserError for settings that are valid one by one, but not together."""
    # Presets are the network's; only one that was given must be known to it.
    presets = type(config.model).PRESETS
    if PRESET in config.given and config.preset not in presets:
        raise UserError(f"--{PRESET}={config.preset}: use one of {', '.join(presets) or 'none: it has no presets'}")
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
    # Scores that are logged.
    evaluation = config.evaluation
    if config.checkpoints.keep_best is not None:
        metrics = training_metrics(evaluation.metrics, evaluation.extractor)
        check_keep_best(config.checkpoints.keep_best, metrics, bool(evaluation.fid_stats))
    # Changes of images.
    augmentation = config.augmentation
    for name in augmentation.augment:
        if name not in AUGMENTATIONS:
            raise UserError(f"--augment={name} is unknown; use some of {','.join(AUGMENTATIONS)}")
    if augmentation.augment and augmentation.augment_prob == 0:
        raise UserError("--augment_prob=0 changes no image; use 0.12, for example, or leave --augment out")
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
