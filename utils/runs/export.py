"""Exports a run: its parameters under the published names, a folder for the hub, and the upload.

An exported file has the run's configuration in its metadata, so that importing it again gives the same run.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_transformer import DiTConfig
from utils.base.files import (
    atomic_write,
    check_writable,
    explaining_full_disk,
    prepare_output_file,
    prepare_output_folder,
    write_json,
    write_text,
)
from utils.base.messages import UserError, log
from utils.conditions.augmented import PART
from utils.conditions.condition import Condition, recorded_kind, restore_condition
from utils.conditions.images import ImageCondition
from utils.convert.published import export_published
from utils.convert.sources import EXPORTED, HUB_ID, METADATA_KEY
from utils.data.joined import SEPARATOR
from utils.data.loaders import split_names
from utils.images.pixels import PixelFormat
from utils.networks.lora import merge_lora
from utils.objectives.objective import has_guidance
from utils.objectives.objectives import OBJECTIVES
from utils.runs.checkpoint import has_checkpoints
from utils.runs.ema_snapshots import take_average
from utils.runs.opening import open_checkpoint
from utils.runs.saved_config import find_latent_shape
from utils.sampling.samplers import can_guide

# The first holds the run's settings, the second is shown by the hub.
CARD = ("config.json", "README.md")  # beside the weights of an exported folder


def export_run(load_dir: str, out: Path, which: str = "ema", hub_id: str | None = None) -> list[Path]:
    """Writes a run's parameters under the published names, and returns the files that it has written.

    `out` is a file *.safetensors, or a folder for the hub: with model.safetensors, config.json and a model card, which
    names the repository `hub_id`. `which` is 'ema', 'raw' or 'ema:WIDTH'. Raises UserError where the run cannot be read
    or `out` cannot be written.
    """
    # Room first: reading a large run takes a while.
    is_file = out.suffix == ".safetensors"
    if is_file:
        prepare_output_file(out, "out", EXPORTED)
    elif has_checkpoints(out):  # its config.json would be replaced
        raise UserError(f"--out={out} is the folder of a run; choose another")
    else:
        check_writable(out, "out", names=(EXPORTED, *CARD))

    # The run, in memory: the newest checkpoint whose configuration is intact, then the newest from there on whose
    # parameters are.
    checkpoints, steps = open_checkpoint(load_dir)
    newest, config = checkpoints.restore_newest(checkpoints.restore_config, steps)
    architecture = DiTConfig.from_mapping(config["model"])
    if architecture.network != "dit":
        raise UserError(f"--load_dir={load_dir} is of --model.network={architecture.network}; only dit is exported")
    name = "ema_params" if which == "ema" else "params"
    step, params = checkpoints.restore_newest(
        lambda step: take_average(checkpoints.restore_stored(step, name), which, checkpoints, step, config),
        steps[steps.index(newest) :],
    )
    params = {part: tree for part, tree in merge_lora(params).items() if part != PART}

    # As others will read it: without LoRA's factors and what is told of changed images, and with the shape of the
    # latents, which older runs lack.
    config["dataset"]["latent_shape"] = list(find_latent_shape(config))
    config["lora_rank"] = 0  # merged
    config["augment"] = []
    config["ema_profiles"] = []  # a file holds one set of parameters
    try:
        latent_shape = tuple(config["dataset"]["latent_shape"])
        condition = restore_condition(config["dataset"]).fit_latents(
            tuple(config["dataset"]["image_shape"]), latent_shape
        )
        state = export_published(params, architecture, latent_shape, condition)
    except ValueError as error:
        raise UserError(f"--load_dir={load_dir} cannot be exported: {error}") from None

    # The files, the weights first: a full disk then costs the small ones alone.
    if not is_file:
        prepare_output_folder(out, "out")
    file = out if is_file else out / EXPORTED
    write_safetensors(file, state, config)
    log(f"exported {which} parameters of step {step} of {load_dir}: {len(state)} tensors")
    if unusual := describe_unusual(config):
        log(f"note: its network {' and '.join(unusual)}, as the file says; programs for SiT cannot sample from it")
    if is_file:
        return [file]
    with explaining_full_disk(lambda: f"{file} is whole"):
        write_json(out / CARD[0], config)
        write_text(out / CARD[1], model_card(config, hub_id or f"USER/{out.resolve().name}", step))
    return [file, *(out / name for name in CARD)]


def describe_unusual(config: Mapping[str, Any]) -> list[str]:
    """Returns, in words, what the network of a run's configuration does differently from a SiT."""
    objective = config["objective"]
    scale = objective.get("noise_scale") or 1
    bottleneck = config["model"].get("bottleneck", 0)
    words = {
        "predicts the data instead of the velocity": objective.get("prediction") == "data",
        f"starts from noise of standard deviation {scale:g}": scale != 1,
        f"reads patches through a bottleneck of {bottleneck} channels": bottleneck > 0,
    }
    return [text for text, is_so in words.items() if is_so]


def write_safetensors(path: Path, state: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    """Writes a safetensors file whose metadata hold the configuration of its run."""
    from safetensors.numpy import save_file

    # "pt" tells Hugging Face's loaders that the layout is PyTorch's.
    metadata = {"format": "pt", METADATA_KEY: json.dumps(config)}
    with atomic_write(path) as temporary:
        save_file(dict(state), temporary, metadata=metadata)


def model_card(config: Mapping[str, Any], hub_id: str, step: int) -> str:
    """Returns the README.md of the hub repository `hub_id`, with the metadata that the hub reads.

    It names no folder of this machine: neither that of the data nor that of a VAE.
    """
    # What the text needs, as words.
    model = config["model"]
    data = config["dataset"]
    objective = config["objective"]["name"]
    scale = f"{model['timestep_scale']:g}"
    unusual = "".join(f", {words}" for words in describe_unusual(config))
    shape = "x".join(map(str, data["image_shape"]))
    latents = f", as latents {'x'.join(map(str, data['latent_shape']))} of {_public_vae(data)}" if data["vae"] else ""

    condition = restore_condition(data)
    returned = f"{PixelFormat.from_record(data).dtype} (1, {', '.join(map(str, data['image_shape']))})"

    # The example guides only a model that can be guided: it is to run as it stands.
    # Rows of the data, from which conditions other than classes are drawn, are not published: the example gives one.
    wanted = "labels=[0]" if "class_names" in data else "num_samples=1"
    given = ""
    lines = ""
    if condition.DRAWS_ROWS:
        fields = example_fields(condition)
        wanted = "conditions=conditions"
        given = f' --condition "{",".join(f"{name}={text}" for name, text in fields.items())}"'
        lines = f"conditions = generator.condition.from_fields([{fields}])\n"
        if not fields:
            given = " --condition_file FILE.npz"
            lines = f"conditions = ...  # of each sample: {condition.summary()}\n"
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
({condition.summary() or f"the condition {recorded_kind(data)}"}){latents}. These are the parameters of step {step:,}.

`model.safetensors` has the tensor names of DiT and SiT. Its network takes the time times {scale}{unusual}.

    python sample.py --load_dir hf:{hub_id}{given}
    python train_flow.py --load_dir hf:{hub_id} --dataset_name folder:PATH

In Python:

```python
from utils.runs.opening import load_generator

generator = load_generator("hf:{hub_id}")
{lines}images = generator.sample({wanted}, num_steps=64{guidance})  # {returned}
```
"""


def example_fields(condition: Condition) -> dict[str, str]:
    """Returns a value for each field of a condition, as a user would write it; {} where it cannot be written."""
    known = {**condition.typical, "class": "0", "text": "a text"}
    is_written = condition.find_part(ImageCondition) is None and set(condition.fields) <= known.keys()
    return {name: known[name] for name in condition.fields} if is_written else {}


def _public_name(dataset_name: str) -> str:
    """Returns the name of a data set without the folders of a path in it."""
    if len(names := split_names(dataset_name)) > 1:
        return SEPARATOR.join(map(_public_name, names))
    kind, colon, path = dataset_name.partition(":")
    return f"{kind}{colon}{Path(path).name}" if colon else Path(dataset_name).name


def _public_vae(data: Mapping[str, Any]) -> str:
    """Returns the hub id of a VAE, or the hash of one in a folder: that identifies it on any machine."""
    # "a/b" may be a hub id or a relative path; a folder of that name decides.
    if re.fullmatch(HUB_ID, data["vae"]) and not Path(data["vae"]).exists():
        return f"`{data['vae']}`"
    return f"a VAE with sha256 {data['vae_sha256']}" if data["vae_sha256"] else "a VAE"


def push(folder: Path, hub_id: str, is_private: bool = False) -> str:
    """Uploads an exported folder to a model repository, which is created if need be, and returns its address.

    Raises UserError where the hub refuses.
    """
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
