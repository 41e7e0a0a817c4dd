"""Starts of a run: from its own checkpoint, if that has the same data and settings, or from another run.

The parameters of another run are taken where they fit and made new elsewhere; some of them may be frozen.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from diffusion_transformer import TIMESTEP_FEATURES, TimestepEmbed, timestep_features
from utils.base.devices import compare_jax_settings
from utils.base.external import BadFileError, read_json
from utils.base.messages import UserError
from utils.base.settings import settings_of
from utils.codecs.codecs import CodecSpec
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import restore_condition
from utils.data.dataset import ImageDataset
from utils.data.fingerprint import compare_data, read_listing
from utils.networks.dit_arrays import CONDITION_PARTS, CROSS_PARTS
from utils.networks.dit_config import DiTConfig
from utils.networks.lora import KEY as LORA
from utils.networks.lora import merge_lora
from utils.networks.models import read_network
from utils.networks.network import NetworkConfig
from utils.runs.checkpoint import Checkpoints
from utils.runs.config import flatten, objective_settings
from utils.runs.opening import open_checkpoint, split_load_dir
from utils.runs.saved_config import read_config

LABELS = ("label_embed", "Embed_0", "embedding")  # the end of the path, wherever a network embeds its condition
# What stands for "no condition" in the vector of a DiT, and for any condition where a network has just been given it.
NULL_VECTORS = ("/".join(LABELS), "vector_embed/null", "vector_embed/dense_1/bias", "base_vector")
MAX_LISTED = 3
SHARPNESS = 16.0  # slope of hidden units in a refitted time embedding; see `refit_times`


NEW_RUN = "another --wandb.name or --save_dir starts a new run"
# A run is resumed only under the same values of these, beside the fixed settings of its network and its objective.
# The rest may change, and is reported.
FIXED = (
    "objective.name", "batch_size", "seed", "debug_overfit", "freeze", "lora_rank",
    "optimizer", "warmup_steps", "weight_decay", "grad_clip", "lr_schedule", "ema_profiles", "augment", "augment_prob",
    "coupling", "coupling_rows", "coupling_weight", "coupling_draws",
)  # fmt: skip
# Identified by the content of the data instead (utils/data/fingerprint.py), or by rules of their own.
COMPARED_ELSEWHERE = (
    "dataset_name", "dataset_weights", "data_dir", "image_size", "image_mode", "condition_columns", "text_encoder",
    "value_range", "codec", "vae", "model.use_stable_vae", "load_dir", "save_dir", "wandb.display_name",
)  # fmt: skip
# Parameters mean something else under another value of these, even if their shapes are the same.
MEANING_OF_PARAMETERS = (
    "network", "hidden_size", "num_heads", "mlp_ratio", "norm", "mlp", "rope", "qk_norm", "timestep_scale",
    "bottleneck",
)  # fmt: skip


class SourceRun(NamedTuple):
    """The run that --load_dir of a training names."""

    load_dir: str
    checkpoints: Checkpoints
    steps: list[int]  # to be tried, newest first
    saved: dict[str, Any]  # its configuration

    @classmethod
    def open(cls, load_dir: str) -> "SourceRun":
        """Opens it. Raises UserError where no checkpoint is intact."""
        checkpoints, steps = open_checkpoint(load_dir)
        newest, saved = checkpoints.restore_newest(checkpoints.restore_config, steps)
        return cls(load_dir, checkpoints, steps[steps.index(newest) :], saved)

    def restore(self, sharding: Any) -> tuple[int, list[PyTree]]:
        """Returns (step, [parameters, EMA]): NumPy arrays of the run's own shapes, LoRA's factors merged."""

        def read(step):
            trees = (self.checkpoints.restore_stored(step, name, sharding) for name in ("params", "ema_params"))
            return [jax.tree.map(_to_host, merge_lora(tree)) for tree in trees]

        return self.checkpoints.restore_newest(read, self.steps)

    def differences(self, config: dict[str, Any]) -> list[str]:
        """Says what a run of this configuration has to learn anew, a line each."""
        remarks = []
        for setting, default in {"name": None, "prediction": "velocity", "noise_scale": 1.0}.items():
            # Objectives without the other two have their defaults.
            ours, theirs = (settings["objective"].get(setting) or default for settings in (config, self.saved))
            if ours != theirs:
                trained = f"note: --load_dir was trained with --objective.{setting}={theirs}"
                remarks.append(f"{trained}; this run has {ours}, and learns it anew")
        weights = [settings["dataset"]["codec"]["sha256"] for settings in (config, self.saved)]
        if all(weights) and weights[0] != weights[1]:
            remarks.append("note: the latents are of another VAE than those of --load_dir")
        return remarks


def _to_host(x: jax.Array) -> np.ndarray:
    return np.asarray(x.addressable_data(0))  # replicated: any device has all of it


def read_started_from(folder: Path) -> dict[str, Any] | None:
    """Returns the configuration of the run in `folder` if that started from another one; None otherwise."""
    try:
        config = read_config(read_json(folder / "config.json"))
    except BadFileError:
        return None
    return config if config.get("load_dir") else None


class Adapted(NamedTuple):
    """Parameters for another model, what happened to them in words, and the paths of those that are new."""

    params: PyTree
    remarks: list[str]
    new: tuple[str, ...]


def adapt_params(
    source: PyTree, fresh: PyTree, network: NetworkConfig, old_classes: Sequence[str], new_classes: Sequence[str]
) -> Adapted:
    """Returns the `fresh` parameters of a network, replaced by those of `source` as far as they fit.

    - Arrays of one shape are taken as they are.
    - Labels: a class that the source knows by name keeps its row; the others start from its "no label".
    - What the network can make fit of another shape (`NetworkConfig.fit_array`) is.
    - Everything else (another patch size, more blocks) is made new.
    """
    old = flatten_dict(source)
    target = flatten_dict(fresh)
    adapted = {}
    remarks = []
    made_new = []
    num_taken = 0

    # Each array by the first rule that fits it.
    for path, new in target.items():
        value = old.get(path)
        if value is not None and path[-len(LABELS) :] == LABELS and value.shape[1:] == new.shape[1:]:
            adapted[path], remark = _adapt_labels(value, new.shape, old_classes, new_classes)
            remarks += remark
            num_taken += not remark
        elif value is not None and value.shape == new.shape:
            adapted[path] = value
            num_taken += 1
        elif value is not None and (fitted := network.fit_array(path, value, new.shape)):
            adapted[path], remark = fitted
            remarks += [remark] if remark else []
        else:
            adapted[path] = np.asarray(new)
            made_new.append("/".join(path))

    # What happened, in words.
    taken = f"{num_taken} of {len(target)} arrays taken as they are"
    if made_new:
        others = f" and {len(made_new) - MAX_LISTED} more" if len(made_new) > MAX_LISTED else ""
        remarks.append(f"made new: {', '.join(made_new[:MAX_LISTED])}{others}")
    typed = {path: np.asarray(value, np.asarray(target[path]).dtype) for path, value in adapted.items()}
    return Adapted(unflatten_dict(typed), [taken, *remarks], tuple(made_new))


def _adapt_labels(
    rows: np.ndarray, shape: tuple[int, ...], old_classes: Sequence[str], new_classes: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """Returns (label table of `shape`, remarks about it)."""
    if tuple(old_classes) == tuple(new_classes) and rows.shape == shape:
        return rows, []
    known = {name: label for label, name in enumerate(old_classes)}
    table = np.repeat(rows[-1:], shape[0], axis=0)  # "no label", the last row of both
    kept = [(label, known[name]) for label, name in enumerate(new_classes) if name in known]
    for label, old_label in kept:
        table[label] = rows[old_label]
    num_new = len(new_classes) - len(kept)
    words = f'label table: {len(kept)} classes kept where names match, {num_new} new rows started from "no label"'
    return table, [words]


class Start(NamedTuple):
    """The first parameters of a run that starts from another."""

    params: PyTree
    ema_params: PyTree
    remarks: list[str]  # what happened to them, line by line
    new: tuple[str, ...]  # paths of arrays that are new


def start_from(source: SourceRun, fresh: PyTree, config: dict[str, Any], sharding: Any, *, from_ema: bool) -> Start:
    """Returns the parameters of `source` and their EMA, made fit for a run of this configuration.

    The run's own parameters would be `fresh`. `from_ema` takes both from the source's EMA.
    """
    # What fits is taken.
    step, trees = source.restore(sharding)
    if from_ema:
        trees = [trees[1], trees[1]]
    network = read_network(config["model"])
    classes = [settings["dataset"].get("class_names", ()) for settings in (source.saved, config)]
    adapted = [adapt_params(tree, fresh, network, *classes) for tree in trees]
    remarks = adapted[0].remarks
    new = adapted[0].new
    remarks[0] = f"starting from {source.load_dir}, step {step}: {remarks[0]}"
    params = [tree.params for tree in adapted]

    # A DiT that is given another condition, the step as well or the time at another scale computes what it did before.
    if isinstance(network, DiTConfig):
        params = [keep_null_vector(tree, found, new, source.saved) for tree, found in zip(trees, params, strict=True)]
        if any(path.startswith("step_embed/") for path in new):
            params = [zero_step_embed(tree) for tree in params]
        scales = [settings["model"]["timestep_scale"] for settings in (source.saved, config)]
        if scales[0] != scales[1]:
            fitted = [refit_times(tree, *scales) for tree in params]
            params = [tree for tree, _ in fitted]
            remarks.append(
                f"time embedding: fitted to that of the source at another scale; {fitted[1][1]:.0%} error is left"
            )
    return Start(*params, [*remarks, *source.differences(config)], new)


def keep_null_vector(source: PyTree, params: PyTree, new: Sequence[str], saved: Mapping[str, Any]) -> PyTree:
    """Has what is new in the place of the source's embedding of classes or vectors start as its "no condition".

    Of a source of one class, unless it has always dropped it, that class is what it has learned. Returns `params` where
    what the source has is taken over. `saved` is the configuration of the source.
    """
    # What the source adds to the time where nothing is given, (d,).
    theirs = {"/".join(path): value for path, value in flatten_dict(source).items()}
    labels = theirs.get("/".join(LABELS))
    null = theirs.get("vector_embed/null", theirs.get("base_vector"))
    if labels is not None:
        is_unconditional = len(saved["dataset"].get("class_names", ())) == 1
        null = labels[0 if is_unconditional and saved["model"]["class_dropout_prob"] != 1 else -1]

    # The same, where nothing is given and at first whatever is.
    ours = {"/".join(path): value for path, value in flatten_dict(params).items()}
    places = [path for path in ours if path in NULL_VECTORS]
    if null is None or not set(places) <= set(new):
        return params
    kept = {path: np.broadcast_to(null, ours[path].shape) for path in places if ours[path].shape[-1:] == null.shape}
    return unflatten_dict({tuple(path.split("/")): value for path, value in (ours | kept).items()})


def zero_step_embed(params: PyTree) -> PyTree:
    """Zeroes the last layer of the step's embedding: the model then computes what it did without one."""
    last = jax.tree.map(np.zeros_like, params["step_embed"]["dense_1"])
    return {**params, "step_embed": {**params["step_embed"], "dense_1": last}}


def refit_times(params: PyTree, old_scale: float, new_scale: float) -> tuple[PyTree, float]:
    """Fits the embedding of t to another scale of t.

    Returns (parameters, error): the embedding at `new_scale` is near the old one at `old_scale`, and the error is the
    root mean square of the difference, over that of the old embedding without its mean. The new hidden units switch on
    one after the other over [0, 1], softly, and the last layer is fitted by least squares. What oscillates faster than
    about SHARPNESS is left out: a derivative by t, which MeanFlow takes, would be led by it.
    """
    # The old embedding at many times: the target of the fit.
    old = jax.tree.map(jnp.asarray, params["timestep_embed"])
    width = old["dense_1"]["bias"].size
    times = jnp.linspace(0, 1, 1024)
    targets = np.asarray(TimestepEmbed(width, old_scale, jnp.float32).apply({"params": old}, times), np.float64)

    # Hidden unit j is silu(SHARPNESS (sin(s t) - sin(s c_j)) / sin(s)), s being the scale: one feature, and the bias.
    slope = SHARPNESS / math.sin(min(new_scale, 1))
    kernel = np.zeros(old["dense_0"]["kernel"].shape, np.float32)
    kernel[TIMESTEP_FEATURES // 2] = slope  # sin(s t)
    centres = np.linspace(-0.1, 1.1, width)
    hidden = {"kernel": kernel, "bias": np.float32(-slope * np.sin(min(new_scale, 1) * centres))}
    units = np.asarray(timestep_features(times, new_scale), np.float64) @ hidden["kernel"] + hidden["bias"]

    # The last layer: ridge regression.
    units = np.append(units / (1 + np.exp(-units)), np.ones((len(times), 1)), axis=1)
    gram = units.T @ units + 1e-6 * len(times) * np.eye(width + 1)
    last = np.linalg.solve(gram, units.T @ targets)
    left = np.sqrt(np.square(units @ last - targets).mean() / targets.var(axis=0).mean())
    fitted = {"dense_0": hidden, "dense_1": {"kernel": np.float32(last[:-1]), "bias": np.float32(last[-1])}}
    return {**params, "timestep_embed": fitted}, float(left)


# --- What is trained ---


def read_frozen(words: Sequence[str], parts: Sequence[str]) -> tuple[str, ...]:
    """Returns the top-level parts of the parameters, such as block_3, that --freeze names.

    A word is blocks, blocks.N, blocks.A-B (both included) or the name of a part. Raises UserError for any other, and
    where nothing would be trained.
    """
    # LoRA's factors are no part to freeze: they exist to be trained.
    depth = sum(part.startswith("block_") for part in parts)
    others = [part for part in parts if not part.startswith("block_") and part != LORA]
    frozen: dict[str, None] = {}
    for word in words:
        match = re.fullmatch(r"blocks(?:\.(\d+)(?:-(\d+))?)?", word)
        if match and depth:
            first = int(match[1] or 0)
            last = int(match[2]) if match[2] else (first if match[1] else depth - 1)
            if not first <= last < depth:
                raise UserError(f"--freeze={word}: the model has blocks.0-{depth - 1}")
            frozen |= dict.fromkeys(f"block_{i}" for i in range(first, last + 1))
        elif word in others:
            frozen[word] = None
        else:
            names = ", ".join([*["blocks.A-B"] * bool(depth), *others])
            raise UserError(f"--freeze={word} is no part of the model; use {names}")

    # Something has to be left.
    if frozen.keys() >= set(parts):
        raise UserError(f"--freeze={','.join(words)} leaves nothing to train; leave a part out")
    return tuple(frozen)


def frozen_beside_lora(parts: Sequence[str], new: Sequence[str]) -> tuple[str, ...]:
    """Returns the parts that LoRA freezes: all but its factors, what embeds the condition, and what has been made new.

    Raises UserError where new layers inside of old blocks would have these trained as a whole.
    """
    if any(path.startswith(f"block_0/{CROSS_PARTS[0]}/") for path in new) and "block_0/attention/out/kernel" not in new:
        raise UserError(
            "--model.token_mode=cross: the blocks of --load_dir lack its layers, and --lora_rank adds none; use context"
        )
    trained = {LORA, LABELS[0], *CONDITION_PARTS, *(path.split("/")[0] for path in new)}
    return tuple(part for part in parts if part not in trained)


# --- Resuming ---


def compare_with_saved(
    config: dict[str, Any], saved: dict[str, Any], datasets: Mapping[str, ImageDataset], folder: Path
) -> list[str]:
    """Says how `config` differs from the configuration `saved` with a checkpoint of the run in `folder`, a line each.

    Raises UserError where the data are others, and where the run would learn something else.
    """
    # Settings.
    name = config["dataset_name"]
    changed = check_settings(config, saved, folder)

    # Data: by their fingerprints, or in older runs by their name.
    if "splits" not in saved["dataset"] and saved["dataset_name"] != name:
        old = saved["dataset_name"]
        raise UserError(f"{folder} holds a run with --dataset_name={old}, not {name}: give it, or {NEW_RUN}")
    fingerprints = {split: dataset.fingerprint for split, dataset in datasets.items()}
    old, new = restore_condition(saved["dataset"]), datasets["train"].condition
    are_classes = isinstance(old, ClassCondition) and isinstance(new, ClassCondition)
    if not are_classes and old != new:  # differences between classes have words of their own
        others = "" if old.summary() != new.summary() else ", which are others"
        raise UserError(
            f"{folder} holds a run of {old.summary()}, but the data have {new.summary()}{others}: give the same data, "
            f"choose what is read by --condition_columns, or {NEW_RUN}"
        )
    try:
        remarks = compare_data(
            saved["dataset"], read_listing(folder, _example_counts(saved)), config["dataset"], fingerprints
        )
    except UserError as difference:
        raise UserError(
            f"--dataset_name={name} is not what {folder} was trained on: {difference}; give the same data, or {NEW_RUN}"
        ) from None
    settings = [f"--{flag}={new}, was {old}" for flag, (old, new) in changed.items()]
    settings += compare_jax_settings(config.get("jax", {}), saved.get("jax", {}))
    return settings + [f"of the data: {remark}" for remark in remarks]


def _example_counts(saved: Mapping[str, Any]) -> dict[str, int]:
    """Returns {split: number of its examples} of a saved configuration."""
    return {split: found["num_examples"] for split, found in saved["dataset"].get("splits", {}).items()}


def check_settings(config: dict[str, Any], saved: dict[str, Any], folder: Path) -> dict[str, tuple[Any, Any]]:
    """Returns {flag: (old, new)} for what differs between `config` and the configuration `saved` of a run in `folder`.

    Raises UserError where a setting differs that has to stay as it is. Data are compared by `compare_with_saved`.
    """
    # The codec.
    theirs, ours = (settings["dataset"]["codec"] for settings in (saved, config))
    if (theirs["name"], theirs["sha256"]) != (ours["name"], ours["sha256"]):
        before, now = (CodecSpec(record["name"], record["source"]) for record in (theirs, ours))
        raise UserError(f"{folder} holds a run with --codec={before}, not {now}: give that value, or {NEW_RUN}")

    # Settings that must be the same.
    network = type(read_network(config["model"]))
    of_network = [name for name, field in settings_of(network, "model").items() if field.metadata["is_fixed"]]
    of_objective = [name for name, field in objective_settings().items() if field.metadata["is_fixed"]]
    old = {**dict.fromkeys(of_objective), **flatten(saved)}
    new = flatten(config)
    changed = {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}
    for name in (*FIXED, *of_network, *of_objective):  # an objective before what follows from it
        if name in changed:
            before, now = (",".join(v) or "nothing" if isinstance(v, list) else v for v in changed[name])
            which = f"without --{name}" if before == "nothing" else f"with --{name}={before}"
            fix = "leave it out" if before == "nothing" else "give that value"
            raise UserError(f"{folder} holds a run {which}, not {now}: {fix}, or {NEW_RUN}")

    # The run that it has started from.
    if new["load_dir"] is not None and not _is_same_place(new["load_dir"], old.get("load_dir")):
        raise UserError(
            f"--load_dir={new['load_dir']}: {folder} holds a run already, which did not start from there; leave the "
            f"flag out to continue it, or {NEW_RUN}"
        )
    return {name: values for name, values in changed.items() if name not in COMPARED_ELSEWHERE}


def check_architecture(
    config: Mapping[str, Any], saved: Mapping[str, Any], load_dir: str, is_other: bool = False
) -> None:
    """Raises UserError where the parameters of a run of the configuration `saved` mean something else in `config`.

    The scale of time may differ where the objective `is_other`: the embedding is then fitted anew.
    """
    ours = {f"model.{name}": config["model"].get(name) for name in MEANING_OF_PARAMETERS}
    theirs = {f"model.{name}": saved["model"].get(name) for name in MEANING_OF_PARAMETERS}
    ours["codec"] = config["dataset"]["codec"]["name"]
    theirs["codec"] = saved["dataset"]["codec"]["name"]
    # Another encoder has other tokens, whatever their shape is.
    texts = [settings["dataset"].get("text") for settings in (config, saved)]
    if all(texts):
        ours["text_encoder"], theirs["text_encoder"] = (text["encoder"] for text in texts)
    for name, value in ours.items():
        if is_other and name == "model.timestep_scale":
            continue
        if value != theirs[name]:
            raise UserError(
                f"--{name}={value}, but --load_dir={load_dir} has {theirs[name]}; give that, or leave the flag out"
            )


def _is_same_place(load_dir: str, saved: str | None) -> bool:
    return saved is not None and split_load_dir(load_dir) == split_load_dir(saved)
