"""Where published checkpoints come from: files of PyTorch and safetensors, folders, the Hugging Face hub."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.convert.published import rename_diffusers
from utils.convert.torch_files import Namespace, read_torch_file
from utils.errors import UserError
from utils.external import BadFileError, open_safetensors, parse_json, read_json, read_start

HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
METADATA_KEY = "jax_flow_matching"  # of a safetensors file that `convert_checkpoint.py --load_dir` wrote: its run
EXPORTED = "model.safetensors"
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# The noise schedule that a published DiT has been trained with.
SCHEDULE = {
    "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}  # fmt: skip


class PublishedSource(NamedTuple):
    """The tensors of a checkpoint under the published names, and what is known beside them."""

    state: dict[str, np.ndarray]
    family: str | None = None
    num_heads: int | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    run: dict[str, Any] | None = None  # the configuration of the run that was exported


def read_source(source: str, flag: str | None = None) -> PublishedSource:
    """The checkpoint in a file (.pt, .bin, .safetensors), in a folder (of diffusers, or exported here), or of a hub id.

    No pickle is executed. UserError, naming --source (or another `flag`), where there is none or it cannot be read.
    """
    path = Path(source)
    if not path.exists() and re.fullmatch(HUB_ID, source):
        path = fetch(source)
    try:
        if path.is_dir():
            return _read_folder(path)
        return _read_file(path)
    except BadFileError as error:
        raise UserError(f"{flag or f'--source={source}'}: {error}") from None


def fetch(hub_id: str, revision: str | None = None) -> Path:
    """The folder, in the hub's cache, of what `_read_folder` reads of a repository. UserError where it is not there."""
    import huggingface_hub as hub

    wanted = ["config.json", EXPORTED, "model_index.json", "scheduler/*.json", "transformer/*"]
    try:
        return Path(hub.snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's, its HTTP client's and the file system's share no type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{hub_id} is no file or folder here and cannot be fetched from the hub ({reason}); give a path, or the id "
            "of a repository that you may read"
        ) from None


def _read_folder(folder: Path) -> PublishedSource:
    if (folder / EXPORTED).is_file():
        return _read_file(folder / EXPORTED)
    transformer = next((place for place in (folder / "transformer", folder) if _find_weights(place)), None)
    if transformer is None:
        names = f"{EXPORTED}, {' or '.join(DIFFUSERS_WEIGHTS)}, here or in a folder transformer"
        raise BadFileError(f"the folder holds no weights ({names})")
    config = read_json(transformer / "config.json")
    _check_schedule(transformer.parent / "scheduler" / "scheduler_config.json")
    weights = _find_weights(transformer)
    assert weights is not None
    heads, head_dim, patch, side = (
        _positive(config, key) for key in ("num_attention_heads", "attention_head_dim", "patch_size", "sample_size")
    )
    state = rename_diffusers(_read_tensors(transformer / weights), side, heads * head_dim, patch)
    return PublishedSource(
        state,
        family="dit",
        num_heads=heads,
        class_names=_label_names(transformer.parent / "model_index.json"),
    )


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value < 2**20:
        raise BadFileError(f"its config.json has {key} {value}, no number from 1 up")
    return value


def _find_weights(folder: Path) -> str | None:
    return next((name for name in DIFFUSERS_WEIGHTS if (folder / name).is_file()), None)


def _check_schedule(path: Path) -> None:
    if not path.is_file():
        return
    found = read_json(path)
    for key, value in SCHEDULE.items():
        if found.get(key, value) != value:
            raise BadFileError(f"its scheduler has {key} {found[key]}, but DiT's is {value}, which is built in")


def _label_names(path: Path) -> tuple[str, ...] | None:
    """The names in model_index.json, `id2label` {"0": name, ...}."""
    labels = read_json(path).get("id2label") if path.is_file() else None
    if not isinstance(labels, dict) or sorted(labels, key=str) != sorted(map(str, range(len(labels)))):
        return None
    return tuple(str(labels[str(i)]) for i in range(len(labels)))


def _read_file(path: Path) -> PublishedSource:
    if not path.exists():
        raise BadFileError("there is no such file or folder, and it is no hub id (USER/NAME)")
    run = _read_metadata(path)
    content = _read_tensors(path)
    family = None
    if any(isinstance(value, Mapping) for value in content.values()):  # of a training run
        arguments = content.get("args")
        if isinstance(arguments, Namespace) and hasattr(arguments, "path_type"):
            family = "sit"  # DiT's training has no choice of paths
            _check_transport(arguments)
        content = next((content[key] for key in ("ema", "model") if isinstance(content.get(key), Mapping)), {})
    state = {re.sub(r"^(module|_orig_mod)\.", "", str(name)): value for name, value in content.items()}
    state = {re.sub(r"^_orig_mod\.", "", name): value for name, value in state.items()}
    others = [name for name, value in state.items() if not isinstance(value, np.ndarray)]
    if others or not state:
        raise BadFileError(f"it holds no tensors of a model ({others[0][:50] if others else 'neither ema nor model'})")
    if run is not None:
        return PublishedSource(state, run=run)
    return PublishedSource(state, family=family)


def _check_transport(arguments: Any) -> None:
    """BadFileError for a SiT trained on another path or prediction than the published models."""
    for name, value in {"path_type": "Linear", "prediction": "velocity"}.items():
        if getattr(arguments, name, value) != value:
            raise BadFileError(f"it was trained with {name} {getattr(arguments, name)}; only {value} is imported")


def _read_tensors(path: Path) -> dict[str, Any]:
    """What a file holds, by its first bytes, whatever its name is."""
    start = read_start(path, 9)
    if not start:
        raise BadFileError("it is empty")
    if start[8:9] == b"{":  # after the length of a header in JSON
        return dict(open_safetensors(path).tensors)
    content = read_torch_file(path)
    if not isinstance(content, Mapping):
        raise BadFileError(f"it holds {type(content).__name__.strip('_')}, not the tensors of a model by name")
    return dict(content)


def _read_metadata(path: Path) -> dict[str, Any] | None:
    """The run that an exported file says it is of."""
    try:
        text = open_safetensors(path).metadata.get(METADATA_KEY)
    except BadFileError:  # no safetensors file: read by other means, or refused there
        return None
    if text is None:
        return None
    try:
        run = parse_json(text) if isinstance(text, str) else {}
    except BadFileError:
        run = {}
    if not all(isinstance(run.get(key), dict) for key in ("model", "dataset")):
        raise BadFileError(f"its metadata {METADATA_KEY} are no configuration of a run")
    return run
