"""Rules for resuming a run, and for starting from another: data and settings compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.base.devices import compare_jax_settings
from utils.base.errors import UserError
from utils.base.settings import settings_of
from utils.data.dataset import ImageDataset
from utils.data.fingerprint import compare_data, read_listing
from utils.networks.models import read_network
from utils.runs.config import objective_settings
from utils.runs.opening import split_load_dir

NEW_RUN = "another --wandb.name or --save_dir starts a new run"

# A run is resumed only under the same values of these, beside the fixed settings of its network and its objective.
# The rest may change, and is reported.
FIXED = (
    "model.use_stable_vae", "objective.name", "batch_size", "seed", "debug_overfit", "freeze", "lora_rank",
    "warmup_steps", "weight_decay", "grad_clip", "lr_schedule",
)  # fmt: skip
# Parameters mean something else under another value of these, even if their shapes are the same.
MEANING_OF_PARAMETERS = (
    "network", "hidden_size", "num_heads", "mlp_ratio", "norm", "mlp", "rope", "qk_norm", "timestep_scale",
    "use_stable_vae",
)  # fmt: skip
# Groups of a configuration that are no flags.
NOT_FLAGS = ("dataset", "jax")
# Identified by the content of the data instead (utils/data/fingerprint.py), or by rules of their own.
COMPARED_ELSEWHERE = ("dataset_name", "data_dir", "image_size", "vae", "load_dir", "save_dir", "wandb.display_name")


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

    Raises UserError where the run cannot be resumed so. Data are compared by compare_with_saved.
    """
    # The VAE.
    if saved["dataset"]["vae_sha256"] != config["dataset"]["vae_sha256"]:
        raise UserError(
            f"{folder} holds a run on the latents of --vae={saved['dataset']['vae']}, which is not "
            f"{config['dataset']['vae']}; give that one, or {NEW_RUN}"
        )

    # Settings that must be the same.
    network = type(read_network(config["model"]))
    of_network = [name for name, field in settings_of(network, "model").items() if field.metadata["is_fixed"]]
    of_objective = [name for name, field in objective_settings().items() if field.metadata["is_fixed"]]
    old = {**dict.fromkeys(of_objective), **_flatten(saved)}
    new = _flatten(config)
    changed = {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}
    for name in (*of_network, *FIXED, *of_objective):
        if name in changed:
            before, now = changed[name]
            raise UserError(f"{folder} holds a run with --{name}={before}, not {now}: give that value, or {NEW_RUN}")

    # The run that it has started from.
    if new["load_dir"] is not None and not _is_same_place(new["load_dir"], old.get("load_dir")):
        raise UserError(
            f"--load_dir={new['load_dir']}: {folder} holds a run already, which did not start from there; leave the "
            f"flag out to continue it, or {NEW_RUN}"
        )
    return {name: values for name, values in changed.items() if name not in COMPARED_ELSEWHERE}


def check_architecture(model: Mapping[str, Any], saved: dict[str, Any], load_dir: str, is_other: bool = False) -> None:
    """Raises UserError where the parameters of a run with the --model.* values `saved` mean something else in `model`.

    The scale of time may differ where the objective `is_other`: the embedding is then fitted anew.
    """
    for name in MEANING_OF_PARAMETERS:
        if is_other and name == "timestep_scale":
            continue
        if model.get(name) != saved.get(name):
            raise UserError(
                f"--model.{name}={model.get(name)}, but --load_dir={load_dir} has {saved.get(name)}; give that, or "
                "leave the flag out"
            )


def _is_same_place(load_dir: str, saved: str | None) -> bool:
    return saved is not None and split_load_dir(load_dir) == split_load_dir(saved)


def _flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Returns {flag: value} of a configuration, groups as group.name, without what is known of the data and of JAX."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if not isinstance(value, dict):
            flat[name] = value
        elif name not in NOT_FLAGS:
            flat |= {f"{name}.{leaf}": leaf_value for leaf, leaf_value in value.items()}
    return flat
