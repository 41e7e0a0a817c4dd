"""Runs made of published checkpoints, and published checkpoints made of runs.

An imported run holds its parameters once, and the configuration that train_flow.py would have written. An exported
file holds the same tensors under the published names, and the run's configuration in its metadata, so that importing it
again gives the same run.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_transformer import DiTConfig
from utils.checkpoint import HUB_PREFIX, Checkpoints, SaveError, has_checkpoints, open_checkpoint
from utils.checks import can_guide, check_file_writable, check_writable
from utils.codecs.vae import StableVAE
from utils.console import log
from utils.convert.published import FAMILIES, export_published, find_config, import_published
from utils.convert.sources import EXPORTED, HUB_ID, METADATA_KEY, PublishedSource, fetch, read_source
from utils.data.class_names import imagenet_class_names
from utils.errors import UserError
from utils.external import BadFileError
from utils.files import FolderLock, atomic_write, explaining_full_disk, write_json, write_text
from utils.lora import merge_lora
from utils.objectives.objective import has_guidance
from utils.objectives.registry import OBJECTIVES
from utils.saved_config import VAE_FACTOR, find_latent_shape, read_config

CARD = ("config.json", "README.md")  # beside the weights of an exported folder


def import_run(
    source_name: str,
    source: PublishedSource,
    out: Path,
    model: Mapping[str, Any],
    *,
    family: str | None = None,
    num_heads: int | None = None,
    class_names: Sequence[str] | None = None,
    vae: str | None = None,
) -> dict[str, Any]:
    """Writes the run of a published checkpoint to the folder `out`; returns its configuration.

    `model` has the --model.* values of what a checkpoint does not say (how it would be trained). `vae` is that of its
    latents, if not the family's usual one. UserError where something is missing, contradicts, or does not fit, and
    where `out` holds a run; nothing is written then.
    """
    check_new_run(out)
    try:
        if source.run is not None:
            config = _exported_config(source.run)
            architecture = DiTConfig.from_mapping(config["model"])
            latent_shape = find_latent_shape(config)
        else:
            family = _choose_family(source, family)
            names = class_names or source.class_names
            num_classes = len(names) if names else source.num_classes
            heads = num_heads or source.num_heads
            architecture, latent_shape = find_config(source.state, family, heads, num_classes)
            config = read_config(
                _new_config(source_name, source, family, architecture, latent_shape, model, names, vae)
            )
        params = import_published(source.state, architecture, latent_shape)
    except BadFileError as error:
        raise UserError(f"--source={source_name}: {error}") from None

    check_writable(out, "out")
    with FolderLock(out).held("out"):
        check_new_run(out)  # which another process may have finished
        # The checkpoint last: with it, the run is whole.
        write_json(out / "config.json", config)
        checkpoints = Checkpoints(out)
        try:
            checkpoints.save_params(jax.tree.map(jnp.asarray, params), config)
        except SaveError as error:
            raise SaveError(f"{error}: make room, and give the same command again") from None
        checkpoints.close()
    return config


def check_new_run(out: Path) -> None:
    """UserError where no run can be written to `out`, or it holds one, rather than what is left of an import that was
    stopped: a finished checkpoint, or the log of a training that has none yet."""
    if has_checkpoints(out) or any((out / name).exists() for name in ("configs", "metrics.jsonl")):
        raise UserError(f"--out={out} holds a run already; choose another folder")
    check_writable(out, "out", creates=False)


def _choose_family(source: PublishedSource, family: str | None) -> str:
    if family is None and source.family is None:
        raise BadFileError("no tensor tells DiT from SiT: give --family dit or --family sit (or lightningdit)")
    if family and source.family and family != source.family:
        raise BadFileError(f"it is a {FAMILIES[source.family].title}'s, not {FAMILIES[family].title}'s")
    return family or source.family or ""


def _exported_config(run: dict[str, Any]) -> dict[str, Any]:
    """The configuration in an exported file, which may be of anyone. BadFileError where it cannot be that of a run."""
    try:
        config = read_config(run)
    except BadFileError as error:
        raise BadFileError(f"its metadata {METADATA_KEY} are no configuration of a run: {error}") from None
    network = config["model"]["network"]
    if network != "dit":
        raise BadFileError(f"its metadata {METADATA_KEY} name the network {network!r}; only dit is exported")
    return config


def _new_config(
    source_name: str,
    source: PublishedSource,
    family: str,
    architecture: DiTConfig,
    latent_shape: tuple[int, int, int],
    model: Mapping[str, Any],
    class_names: Sequence[str] | None,
    vae: str | None,
) -> dict[str, Any]:
    """The configuration of a run for a checkpoint of others."""
    known = FAMILIES[family]
    height, width, channels = latent_shape
    # Pixels are what has the channels of pixels.
    is_latent = vae is not None or channels not in (1, 3)
    factor, sha256 = VAE_FACTOR, None
    if vae is not None:
        codec = StableVAE.load(vae)
        factor, sha256 = codec.config.downsampling, codec.sha256
        if codec.config.latent_channels != channels:
            raise UserError(
                f"--vae={vae} has latents of {codec.config.latent_channels} channels, the model {channels}; give the "
                "VAE with which it was trained"
            )
    shape = [height * factor, width * factor, 3] if is_latent else list(latent_shape)
    names = _check_class_names(class_names, architecture.num_classes)
    is_imagenet = architecture.num_classes == 1000 and shape[:2] == [256, 256]
    return {
        "dataset_name": "imagenet256" if is_imagenet else "published",
        "seed": 0,
        "model": {
            **dict(model),
            **known.settings,
            **architecture.__dict__,
            "use_stable_vae": int(is_latent),
        },
        "objective": dict(known.objective),
        "dataset": {
            "name": "imagenet256" if is_imagenet else "published",
            "image_shape": shape,
            "latent_shape": list(latent_shape),
            "class_names": list(names),
            "vae": (vae or known.vae) if is_latent else None,
            "vae_sha256": sha256,
        },
        "imported": {"source": source_name, "family": family, "tensors": len(source.state)},
    }


def _check_class_names(names: Sequence[str] | None, num_classes: int) -> Sequence[str]:
    if names is None:
        return imagenet_class_names() if num_classes == 1000 else [str(label) for label in range(num_classes)]
    if len(names) != num_classes:
        raise BadFileError(f"it has {num_classes} classes, but --class_names names {len(names)}")
    return names


# --- Export ---


def export_run(load_dir: str, out: Path, which: str = "ema", hub_id: str | None = None) -> list[Path]:
    """Writes a run's parameters under the published names: `out` is a file *.safetensors, or a folder for the hub with
    model.safetensors, config.json and a model card, which names the repository `hub_id`. Returns what was written.
    UserError where the run cannot be read or `out` cannot be written."""
    is_file = out.suffix == ".safetensors"
    if is_file:
        check_file_writable(out, "out", EXPORTED)
    else:
        check_writable(out, "out", creates=False, names=(EXPORTED, *CARD))
    checkpoints, steps = open_checkpoint(load_dir)
    newest, config = checkpoints.restore_newest(checkpoints.restore_config, steps)
    name = "ema_params" if which == "ema" else "params"
    step, params = checkpoints.restore_newest(
        lambda step: checkpoints.restore_stored(step, name), steps[steps.index(newest) :]
    )
    params = merge_lora(params)
    architecture = DiTConfig.from_mapping(config["model"])
    if architecture.network != "dit":
        raise UserError(f"--load_dir={load_dir} is of --model.network={architecture.network}; only dit is exported")
    config["dataset"]["latent_shape"] = list(find_latent_shape(config))
    config["lora_rank"] = 0  # merged
    try:
        state = export_published(params, architecture, tuple(config["dataset"]["latent_shape"]))
    except ValueError as error:
        raise UserError(f"--load_dir={load_dir} cannot be exported: {error}") from None

    if not is_file:
        check_writable(out, "out")
    file = out if is_file else out / EXPORTED
    write_safetensors(file, state, config)
    log(f"exported {which} parameters of step {step} of {load_dir}: {len(state)} tensors")
    if is_file:
        return [file]
    with explaining_full_disk(lambda: f"{file} is whole"):
        write_json(out / CARD[0], config)
        write_text(out / CARD[1], model_card(config, hub_id or f"USER/{out.resolve().name}", step))
    return [file, *(out / name for name in CARD)]


def write_safetensors(path: Path, state: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    """A safetensors file whose metadata hold the configuration of its run."""
    from safetensors.numpy import save_file

    metadata = {"format": "pt", METADATA_KEY: json.dumps(config)}
    with atomic_write(path) as temporary:
        save_file(dict(state), temporary, metadata=metadata)


def model_card(config: Mapping[str, Any], hub_id: str, step: int) -> str:
    """README.md of the hub repository `hub_id`, with the metadata that the hub reads. Of data and of a VAE on this
    machine it names no folder."""
    model, data, objective = config["model"], config["dataset"], config["objective"]["name"]
    shape = "x".join(map(str, data["image_shape"]))
    latents = f", as latents {'x'.join(map(str, data['latent_shape']))} of {_public_vae(data)}" if data["vae"] else ""
    is_guided = can_guide(model["class_dropout_prob"]) and has_guidance(OBJECTIVES.get(objective))
    guidance = ", cfg_scale=2.0" if is_guided else ""
    return f"""---
library_name: jax-flow-matching
pipeline_tag: unconditional-image-generation
tags: [diffusion-transformer, {objective.replace("_", "-")}]
---
# {hub_id.rpartition("/")[2]}

A diffusion transformer, {model["hidden_size"]} wide, {model["depth"]} deep, {model["num_heads"]} heads, patch
{model["patch_size"]}, trained with the objective `{objective}` on images {shape} of `{_public_name(data["name"])}`
({len(data["class_names"])} classes){latents}. These are the parameters of step {step:,}.

`model.safetensors` has the tensor names of DiT and SiT. Its network takes the time times {model["timestep_scale"]:g}.

    python sample.py --load_dir hf:{hub_id}
    python train_flow.py --load_dir hf:{hub_id} --dataset_name folder:PATH

In Python:

```python
from utils.generate import load_generator

generator = load_generator("hf:{hub_id}")
images = generator.sample(labels=[0], num_steps=64{guidance})  # uint8 (1, {", ".join(map(str, data["image_shape"]))})
```
"""


def _public_name(dataset_name: str) -> str:
    """The name of a data set without the folders of a path in it."""
    kind, colon, path = dataset_name.partition(":")
    return f"{kind}{colon}{Path(path).name}" if colon else Path(dataset_name).name


def _public_vae(data: Mapping[str, Any]) -> str:
    """The hub id of a VAE; of one in a folder, what identifies it anywhere."""
    if re.fullmatch(HUB_ID, data["vae"]) and not Path(data["vae"]).exists():
        return f"`{data['vae']}`"
    return f"a VAE with sha256 {data['vae_sha256']}" if data["vae_sha256"] else "a VAE"


# --- The hub ---


def push(folder: Path, hub_id: str, is_private: bool = False) -> str:
    """Uploads an exported folder to a model repository, which is made where there is none; returns its address.
    UserError where the hub refuses."""
    import huggingface_hub as hub

    try:
        hub.create_repo(hub_id, private=is_private, exist_ok=True)
        hub.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Upload a model")
    except Exception as error:  # the hub's and its HTTP client's share no type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"--push={hub_id} failed ({reason}); {folder} holds what was to be pushed. Log in with `hf auth login`"
        ) from None
    return f"{hub.constants.ENDPOINT}/{hub_id}"


def fetch_run(load_dir: str, folder: Path) -> None:
    """Makes a run in `folder` of what hf:USER/NAME, or hf:USER/NAME@REVISION, names. UserError where it cannot be."""
    check_new_run(folder)
    hub_id, _, revision = load_dir.removeprefix(HUB_PREFIX).partition("@")
    source = read_source(str(fetch(hub_id, revision or None)), f"--load_dir={load_dir}")
    if source.run is None:
        raise UserError(
            f"--load_dir={load_dir} is no model of this suite; make a run of it: python convert_checkpoint.py "
            f"--source {hub_id} --family sit --out {folder} (or --family dit)"
        )
    import_run(load_dir, source, folder, {})
    log(f"{load_dir} is in {folder}")
