"""Exports a run: its parameters under the published names, a folder for the hub, and the upload.

An exported file has the run's configuration in its metadata, so that importing it again gives the same run.
"""

import glob
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from diffusion_transformer import DiTConfig
from utils.base.bars import silent_hub, watching
from utils.base.external import BadFileError
from utils.base.files import (
    atomic_write,
    check_writable,
    count_bytes,
    explaining_full_disk,
    prepare_output_file,
    prepare_output_folder,
    write_json,
    write_text,
)
from utils.base.messages import UserError, are_bars_silent, log, one_line, printable, progress_bar, warn
from utils.conditions.augmented import PART
from utils.conditions.condition import restore_condition
from utils.convert.published import export_published
from utils.convert.sources import EXPORT_KEY, EXPORTED, METADATA_KEY, tensor_checksums
from utils.networks.lora import merge_lora
from utils.runs.card_picture import NAME, add_picture, check_picture
from utils.runs.checkpoint import has_checkpoints
from utils.runs.comparison import RESULTS_FILE
from utils.runs.ema_snapshots import take_average
from utils.runs.exported_run import SUFFIX
from utils.runs.model_card import Extras, describe_unusual, model_card
from utils.runs.opening import open_checkpoint
from utils.runs.results import read_results
from utils.runs.saved_config import find_latent_shape
from utils.sampling.generator import hash_params

# The first holds the run's settings, the second is shown by the hub.
CARD = ("config.json", "README.md")  # beside the weights of an exported folder


def check_export(hub_id: str | None, licence: str | None) -> None:
    """Raises UserError for a repository, and a licence, that the hub cannot have: it would say so after the work."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if hub_id is not None:
        try:
            validate_repo_id(hub_id)
        except HFValidationError as error:
            raise UserError(f"--push={hub_id}: {one_line(error)}; give USER/NAME") from None
        if "/" not in hub_id:
            raise UserError(f"--push={hub_id} names no user; give USER/NAME")
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,99}", licence):
        raise UserError(f"--license={licence}: give the hub's name of a licence, such as mit, cc-by-4.0 or other")


def export_run(
    load_dir: str,
    out: Path,
    which: str = "ema",
    hub_id: str | None = None,
    *,
    picture: str | None = None,
    licence: str | None = None,
) -> list[Path]:
    """Writes a run's parameters under the published names, and returns the files that it has written.

    `out` is a file *.safetensors, or a folder for the hub: with model.safetensors, config.json, a picture and a model
    card, which names the repository `hub_id` and the `licence`. `which` is 'ema', 'raw' or 'ema:WIDTH'. `picture` is a
    file, or 'none'; by default, samples are drawn. Raises UserError where the run cannot be read or `out` cannot be
    written.
    """
    # Room first: reading a large run takes a while.
    is_file = out.suffix == SUFFIX
    if is_file:
        prepare_output_file(out, "out", EXPORTED)
    elif has_checkpoints(out):  # its config.json would be replaced
        raise UserError(f"--out={out} is the folder of a run; choose another")
    else:
        check_writable(out, "out", names=(EXPORTED, f"{NAME}.png", *CARD))
    if picture not in (None, "none"):
        check_picture(picture)

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
    params = merge_lora(params)
    config, state = _convert(load_dir, config, architecture, params)

    # The files, the weights first: a full disk then costs the small ones alone.
    if not is_file:
        prepare_output_folder(out, "out")
    file = out if is_file else out / EXPORTED
    write_safetensors(file, state, config, step, which)
    log(f"exported {which} parameters of step {step} of {load_dir}: {len(state)} tensors")
    if unusual := describe_unusual(config):
        log(f"note: its network {' and '.join(unusual)}, as the file says; programs for SiT cannot sample from it")
    if is_file:
        return [file]
    with explaining_full_disk(lambda: f"{file} is whole"):
        write_json(out / CARD[0], config)
        shown, caption = add_picture(out, picture, config)
        rows = find_scores(checkpoints.run_dir / RESULTS_FILE, hash_params(params))
        extras = Extras(shown, caption, rows, licence)
        write_text(out / CARD[1], model_card(config, hub_id or f"USER/{out.resolve().name}", step, extras))
    return [file, *(out / name for name in (shown, *CARD) if name)]


def _convert(
    load_dir: str, config: dict[str, Any], architecture: DiTConfig, params: PyTree
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns (configuration, tensors) as others will read them: without what is told of changed images, and with the
    shape of the latents, which older runs lack. LoRA's factors are merged already."""
    latent_shape = find_latent_shape(config)
    data: dict[str, Any] = {**config["dataset"], "latent_shape": list(latent_shape)}
    # A file holds one set of parameters.
    config = {**config, "dataset": data, "lora_rank": 0, "augment": [], "ema_profiles": []}
    try:
        condition = restore_condition(data).fit_latents(tuple(data["image_shape"]), latent_shape)
        trees = {part: tree for part, tree in params.items() if part != PART}
        return config, export_published(trees, architecture, latent_shape, condition)
    except ValueError as error:
        raise UserError(f"--load_dir={load_dir} cannot be exported: {error}") from None


def find_scores(results: Path, sha256: str) -> list[dict[str, Any]]:
    """Returns the rows of a fid.json that are of the parameters with this hash, wherever their run was then."""
    try:
        return [row for row in read_results(results) if row.get("params_sha256") == sha256]
    except (BadFileError, OSError) as error:
        warn(f"{results} cannot be read ({getattr(error, 'strerror', None) or error}): the card has no scores")
        return []


def write_safetensors(
    path: Path, state: Mapping[str, np.ndarray], config: Mapping[str, Any], step: int, which: str
) -> None:
    """Writes a safetensors file whose metadata hold the configuration of its run, and which parameters it has."""
    from safetensors.numpy import save_file

    # "pt" tells Hugging Face's loaders that the layout is PyTorch's. The format has no checksums of its own.
    facts = {"step": step, "params": which, "crc32": tensor_checksums(state)}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(config), EXPORT_KEY: json.dumps(facts)}
    size = sum(tensor.nbytes for tensor in state.values())
    bar = progress_bar(total=size, desc=f"writing {printable(path.name)}", unit="B", unit_scale=True, delay=2)
    with atomic_write(path) as temporary, watching(bar, lambda: count_bytes(temporary)):
        save_file(dict(state), temporary, metadata=metadata)


def push(files: Sequence[Path], hub_id: str, is_private: bool = False) -> str:
    """Uploads the files of an exported folder to a model repository, which is created if need be, and returns its
    address. What else lies in the folder, such as samples, stays.

    Raises UserError where the hub refuses.
    """
    import huggingface_hub as hub

    folder = files[0].parent
    names = [glob.escape(path.name) for path in files]
    try:
        hub.create_repo(hub_id, private=is_private, exist_ok=True)
        with silent_hub(are_bars_silent()):
            hub.upload_folder(repo_id=hub_id, folder_path=folder, allow_patterns=names, commit_message="Upload a model")
    except Exception as error:  # the hub's and its HTTP client's share no type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"--push={hub_id} failed ({reason}); {folder} holds what was to be pushed. Log in with `hf auth login`"
        ) from None
    return f"{hub.constants.ENDPOINT}/{hub_id}"
