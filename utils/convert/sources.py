"""Reads published checkpoints: files of PyTorch, safetensors and jax-flow, folders, repositories of the hub."""

import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.base.external import BadFileError, open_safetensors, parse_json, read_json, read_start
from utils.base.messages import UserError, download_bar, log
from utils.base.pickles import Namespace
from utils.base.torch_files import LEGACY_START, read_tensor_file
from utils.convert.diffusers import rename_diffusers
from utils.convert.jax_flow_files import START as PICKLE_START
from utils.convert.jax_flow_files import JaxFlowCheckpoint, read_jax_flow
from utils.convert.published import JAX_FLOW, LIGHTNINGDIT

HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
METADATA_KEY = "jax_flow_matching"  # of a safetensors file that `convert_checkpoint.py --load_dir` wrote: its run
EXPORT_KEY = "jax_flow_matching_export"  # beside it, JSON: the step, the value of --params, and checksums of tensors
EXPORTED = "model.safetensors"
LFS_START = b"version https://git-lfs"
INDEX = ".index.json"  # of shards: follows the name of the file that they would be together
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
DIFFUSERS_WEIGHTS += tuple(f"{name}{INDEX}" for name in DIFFUSERS_WEIGHTS)
# The tensor by which a model is found, whatever prefix it has.
ROOT = "x_embedder.proj.weight"
DIFFUSERS_ROOT = "pos_embed.proj.weight"
# What wrappers put anywhere into a name: (D)DP and DeepSpeed, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# Names under which trainings keep a network; an average of it has "ema" in its name.
MODELS = {
    "model", "net", "network", "online_model", "diffusion_model", "transformer", "denoiser", "backbone", "dit", "sit",
    "state_dict", "model_state_dict", "params", "weights", "checkpoint", "state",
}  # fmt: skip
# What may stand beside a network: counters of averages, and other networks of a training.
COUNTERS = {"n_averaged", "step", "initted", "decay", "num_updates", "update_counter", "global_step"}
OTHER_PARTS = {"vae", "first_stage_model", "cond_stage_model", "text_encoder", "loss", "lpips", "discriminator"}
MAX_NESTING = 8
# The noise schedule with which the published DiTs were trained.
SCHEDULE = {
    "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}  # fmt: skip


class PublishedCheckpoint(NamedTuple):
    """The tensors of a checkpoint under the published names, and what is known beside them."""

    state: dict[str, np.ndarray]
    # None where the source does not tell.
    family: str | None = None
    num_heads: int | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    run: dict[str, Any] | None = None  # the configuration of the run that was exported
    step: int = 0  # of the checkpoint that was exported
    params: str = "ema"  # which of its parameters, as --params says it
    jax_flow: JaxFlowCheckpoint | None = None  # both sets of parameters, under jax-flow's names, as `state` is then


def read_source(source: str, flag: str | None = None) -> PublishedCheckpoint:
    """Reads a checkpoint: a file (.pt, .bin, .safetensors, .pkl), a folder (diffusers' or exported here), or a hub id.

    No code of a pickle runs. Raises UserError, naming --source or another `flag`, where nothing is found and where the
    checkpoint cannot be read.
    """
    # A path that exists wins over a hub id that looks like it.
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
    """Downloads what `_read_folder` needs of a repository, and returns its folder in the hub's cache.

    Raises UserError where that fails.
    """
    import huggingface_hub as hub

    # Not the whole repository: some hold the same weights in several formats.
    wanted = ["config.json", EXPORTED, f"{EXPORTED}{INDEX}", "model-*-of-*.safetensors", "diffusion_pytorch_model*"]
    wanted += ["model_index.json", "scheduler/*.json", "transformer/*"]
    try:
        with download_bar(f"fetching {hub_id}") as bar:
            return Path(hub.snapshot_download(hub_id, revision=revision, allow_patterns=wanted, tqdm_class=bar))
    except Exception as error:  # the hub's, its HTTP client's and the file system's share no type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{hub_id} is no file or folder here and cannot be fetched from the hub ({reason}); give a path, or the id "
            "of a repository that you may read"
        ) from None


def _read_folder(folder: Path) -> PublishedCheckpoint:
    # Exported here, or published like that.
    for name in (EXPORTED, f"{EXPORTED}{INDEX}"):
        if (folder / name).is_file():
            return _read_file(folder / name)

    # Of diffusers: the network may be in a folder of its own.
    transformer = next((place for place in (folder / "transformer", folder) if _find_weights(place)), None)
    if transformer is None:
        names = f"{EXPORTED} or {' or '.join(DIFFUSERS_WEIGHTS[:2])}, here or in a folder transformer, or their {INDEX}"
        raise BadFileError(f"the folder holds no weights ({names})")

    # Its settings are checked before the weights, which may be gigabytes, are read.
    config = read_json(transformer / "config.json")
    _check_schedule(transformer.parent / "scheduler" / "scheduler_config.json")
    weights = _find_weights(transformer)
    assert weights is not None
    heads, head_dim, patch, side = (
        _positive(config, key) for key in ("num_attention_heads", "attention_head_dim", "patch_size", "sample_size")
    )
    tensors = _find_model(_read_tensors(transformer / weights), DIFFUSERS_ROOT)
    state = rename_diffusers(tensors, side, heads * head_dim, patch)
    return PublishedCheckpoint(
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
    """Returns the names of classes in a model_index.json, `id2label` {"0": name, ...}; None where it has none."""
    labels = read_json(path).get("id2label") if path.is_file() else None
    if not isinstance(labels, dict) or sorted(labels, key=str) != sorted(map(str, range(len(labels)))):
        return None
    return tuple(str(labels[str(i)]) for i in range(len(labels)))


def _read_file(path: Path) -> PublishedCheckpoint:
    if not path.exists():
        raise BadFileError("there is no such file or folder, and it is no hub id (USER/NAME)")
    if read_start(path, len(LFS_START)) == LFS_START:
        raise BadFileError("it is a pointer of Git LFS in place of the file; fetch that by git lfs pull")
    start = read_start(path, len(LEGACY_START))
    if PICKLE_START.match(start) and start != LEGACY_START:
        checkpoint = read_jax_flow(path)
        return PublishedCheckpoint(checkpoint.ema_params, family=JAX_FLOW, jax_flow=checkpoint)
    run, facts = _read_metadata(path)
    content = _read_tensors(path)
    _compare_checksums(content, facts.get("crc32"))
    family = None
    arguments = content.get("args")  # of a training run
    if isinstance(arguments, Namespace) and hasattr(arguments, "path_type"):
        family = "sit"  # DiT's training has no choice of paths
        _check_transport(arguments)
    state = _find_model(content, ROOT)
    if not state.keys().isdisjoint(LIGHTNINGDIT):
        family = "lightningdit"
    if run is not None:
        step, params = facts.get("step"), facts.get("params")
        is_known = type(step) is int and 0 <= step < 2**31 and isinstance(params, str)  # older files do not say it
        return PublishedCheckpoint(state, run=run, **({"step": step, "params": params} if is_known else {}))
    return PublishedCheckpoint(state, family=family)


class _Model(NamedTuple):
    """The tensors under one prefix of a file."""

    prefix: str
    tensors: dict[str, np.ndarray]
    others: dict[str, Any]  # values beside them in the same dictionary

    @property
    def is_ema(self) -> bool:
        return any(_is_ema(part) for part in self.prefix.split("."))

    @property
    def is_known(self) -> bool:
        return all(part in MODELS or _is_ema(part) for part in self.prefix.split(".")[:-1])


def _is_ema(part: str) -> bool:
    return "ema" in part.lower().split("_")


def _find_model(content: Mapping[str, Any], root: str) -> dict[str, np.ndarray]:
    """Returns the tensors of the model in a file, without the prefixes of wrappers and training scripts.

    Among several models, the EMA is chosen. Dictionaries may be nested, and prefixes stand in any order. `root` is a
    tensor that every such model has. Raises BadFileError for an unknown prefix, for several models without an EMA among
    them, and for an unknown tensor beside a model.
    """
    # All models in the file, and the one that is meant.
    models = [model for path, mapping in _walk(content, (), set()) for model in _models_in(path, mapping, root)]
    if not models:
        return _tensors_without_root(content, root)
    known = [model for model in models if model.is_known]
    if not known:
        raise BadFileError(
            f"its tensors are under {models[0].prefix!r}, which no known wrapper writes; save the state_dict of the "
            "network itself"
        )
    chosen = [model for model in known if model.is_ema] or known
    if len(chosen) > 1:
        prefixes = " and ".join(repr(model.prefix) for model in chosen[:2])
        raise BadFileError(f"it holds {len(chosen)} models, under {prefixes}; save the one that is meant alone")
    (model,) = chosen

    # What is left out.
    left = [repr(other.prefix) for other in models if other is not model]
    if left:
        what = "the EMA" if model.is_ema else "what is"
        log(f"{what} under {model.prefix!r} is taken; what is under {', '.join(left)} is not")
    surplus = sorted(name for name in model.others if not _is_known_beside(name))
    if surplus:
        raise BadFileError(
            f"it has a tensor {surplus[0]} beside those under {model.prefix!r} that no such model has "
            f"({len(surplus)} are left over)"
        )
    # Counters and other networks of a training are no error, but worth a line.
    if model.others:
        log(f"not of the model, and left out: {', '.join(sorted(model.others)[:3])}{', ...' * (len(model.others) > 3)}")
    return model.tensors


def _walk(content: Mapping, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """Yields (keys that lead there, dictionary) for all dictionaries within `content`, each once."""
    if id(content) in seen or len(path) > MAX_NESTING:
        return
    seen.add(id(content))
    yield path, content
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _walk(value, (*path, str(key)), seen)


def _models_in(path: tuple[str, ...], mapping: Mapping, root: str) -> list[_Model]:
    """Returns the models whose `root` a dictionary of tensors holds."""
    # Names without wrappers: they may stand anywhere, and say nothing about which model it is.
    tensors: dict[str, np.ndarray] = {}
    for name, value in mapping.items():
        if isinstance(value, np.ndarray):
            short = _without_wrappers(str(name).split("."))
            if short in tensors:
                raise BadFileError(f"it has two tensors {short}, under different wrappers; save one of the two models")
            tensors[short] = value

    # Each tensor belongs to the longest prefix that it has.
    prefixes = [name.removesuffix(root) for name in tensors if name == root or name.endswith(f".{root}")]
    groups: dict[str | None, dict[str, np.ndarray]] = {prefix: {} for prefix in (*prefixes, None)}
    for name, value in tensors.items():
        is_beside = "" in prefixes and _is_known_beside(name)
        fitting = [prefix for prefix in prefixes if name.startswith(prefix) and not (is_beside and prefix == "")]
        prefix = max(fitting, key=len, default=None)
        groups[prefix][name.removeprefix(prefix or "")] = value
    before = "".join(f"{part}." for part in path if part not in WRAPPERS)
    return [_Model(f"{before}{prefix}", groups[prefix], groups[None]) for prefix in prefixes]


def _without_wrappers(parts: list[str]) -> str:
    return ".".join(part for part in parts if part not in WRAPPERS)


def _is_known_beside(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] in COUNTERS or any(part in OTHER_PARTS for part in parts[:2])


def _tensors_without_root(content: Mapping[str, Any], root: str) -> dict[str, np.ndarray]:
    """Returns the tensors of a file that lacks `root`: the import then names what is missing.

    Raises BadFileError where the file has no tensors at its top level.
    """
    # Every array in the file, by its full name: the message can then say what there is instead.
    found = [
        (".".join((*path, str(name))), value)
        for path, mapping in _walk(content, (), set())
        for name, value in mapping.items()
        if isinstance(value, np.ndarray)
    ]
    if not found:
        others = [name for name, value in content.items() if not isinstance(value, Mapping)]
        raise BadFileError(
            f"it holds no tensors of a model ({str(others[0])[:50] if others else 'neither ema nor model'})"
        )

    # An autoencoder, diffusers' names, or tensors deeper in the file than those of a bare state_dict.
    if root == ROOT and any(name.endswith("encoder.conv_in.weight") for name, _ in found):
        raise BadFileError(
            "it is an autoencoder; name the model's file here, and this one by --codec kl:FILE (or --vae FILE)"
        )
    if root == ROOT and any(name.endswith(DIFFUSERS_ROOT) for name, _ in found):
        raise BadFileError("its tensors have diffusers' names; give the folder that it is in, with config.json")
    if not any(isinstance(value, np.ndarray) for value in content.values()):
        raise BadFileError(f"it has no tensor {root}, which every model of these families has, but {found[0][0][:100]}")
    return {str(name): value for name, value in content.items() if isinstance(value, np.ndarray)}


def _check_transport(arguments: Any) -> None:
    """Raises BadFileError for a SiT trained with another path or prediction than the published models."""
    for name, value in {"path_type": "Linear", "prediction": "velocity"}.items():
        if getattr(arguments, name, value) != value:
            raise BadFileError(f"it was trained with {name} {getattr(arguments, name)}; only {value} is imported")


def _read_tensors(path: Path) -> dict[str, Any]:
    """Returns the content of a file, whose first bytes tell its kind; for an index, the content of its shards."""
    if path.name.endswith(INDEX):
        return _read_shards(path)
    return read_tensor_file(path)


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of all files that an index names; they are beside it."""
    # The files. Names with a folder in them are refused, so that an index cannot lead elsewhere.
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_shard, weight_map.values())):
        raise BadFileError(f"{index.name} has no weight_map to files beside it")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (index.parent / shard).exists()]
    if missing:
        raise BadFileError(
            f"its shard {missing[0]} is missing ({len(missing)} of {len(shards)} are): all belong beside {index.name}"
        )

    # Their tensors; errors name the shard.
    tensors = {}
    for shard in shards:
        try:
            content = _read_tensors(index.parent / shard)
        except BadFileError as error:
            raise BadFileError(f"its shard {shard}: {error}") from None
        for name in (name for name, place in weight_map.items() if place == shard):
            if name not in content:
                raise BadFileError(f"its shard {shard} has no tensor {name[:100]}, which {index.name} says it has")
        # Tensors that the index leaves out belong to the model too, or turn out to be surplus later.
        tensors |= {name: value for name, value in content.items() if weight_map.get(name, shard) == shard}
    return tensors


def _is_shard(name: Any) -> bool:
    """Returns whether this can be the name of a file beside an index."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin|pt)", name))


# --- What was exported here ---


def is_exported(file: Path) -> bool:
    """Returns whether a file is a safetensors file with the configuration of a run."""
    try:
        return METADATA_KEY in open_safetensors(file).metadata
    except BadFileError:
        return False


def tensor_checksums(tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Returns {name: CRC-32 of the bytes} of tensors."""
    return {name: zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data) for name, x in tensors.items()}


def _compare_checksums(content: Mapping[str, Any], recorded: Any) -> None:
    """Raises BadFileError for a tensor that is not as it was exported; older files record no checksums."""
    if not isinstance(recorded, dict):
        return
    found = tensor_checksums(content)
    changed = sorted(name for name in found.keys() | recorded.keys() if found.get(name) != recorded.get(name))
    if changed:
        raise BadFileError(f"its tensor {changed[0][:100]} is not what was written; take the file from a copy")


def _read_metadata(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Returns (configuration of the run, facts under EXPORT_KEY) of an exported file; (None, {}) for other files."""
    try:
        metadata = open_safetensors(path).metadata
    except BadFileError:  # no safetensors file: read by other means, or refused there
        return None, {}
    if METADATA_KEY not in metadata:
        return None, {}
    run, facts = (_parse_object(metadata.get(key)) for key in (METADATA_KEY, EXPORT_KEY))
    if not all(isinstance(run.get(key), dict) for key in ("model", "dataset")):
        raise BadFileError(f"its metadata {METADATA_KEY} are no configuration of a run")
    return run, facts


def _parse_object(text: Any) -> dict[str, Any]:
    """Returns the object in a JSON text, {} for anything else."""
    try:
        return parse_json(text) if isinstance(text, str) else {}
    except BadFileError:
        return {}
