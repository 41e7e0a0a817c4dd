"""Files of an autoencoder in the Hugging Face layout: found or fetched, read against the expected shapes, written."""

import contextlib
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from utils.base.external import BadFileError, read_json, read_safetensors, read_safetensors_shapes
from utils.base.files import atomic_write, write_json
from utils.base.messages import AbsentCodecError, UserError, download_bar

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FILE_SUFFIXES = (".ckpt", ".pt", ".safetensors")  # of weights in latent diffusion's own layout

# Codecs by the class that a config.json names.
CLASSES = {"AutoencoderKL": "kl", "AutoencoderKLFlux2": "kl", "AutoencoderTiny": "tiny"}


def find_files(
    path: str, shown: str, kind: str = "kl", example: str = "stabilityai/sd-vae-ft-mse"
) -> tuple[Path, Path]:
    """Returns the paths of (config.json, weights) in a folder or its subfolder `vae`, or fetched from the hub.

    Raises UserError, which begins with the flag `shown`, where they are not found; `kind` is the codec's name, and
    `example` the hub id of one.
    """
    # A folder goes first: a hub id may also be the path of one.
    folder = Path(path)
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        return _fetch_files(path, shown, kind)
    if not folder.is_dir():
        what = "a file, a folder" if kind == "kl" else "a folder"
        raise AbsentCodecError(f"{shown} is neither {what} nor a hub id, such as {example}")

    # A VAE by itself, or one in the folder of a whole pipeline.
    found = next((place for place in (folder, folder / "vae") if (place / CONFIG).is_file()), None)
    if found is None:
        # Latent diffusion's own code saves a file alone, whose folder is a likely mistake.
        files = [file for file in folder.iterdir() if kind == "kl" and file.suffix in FILE_SUFFIXES]
        largest = max(files, key=lambda file: file.stat().st_size, default=None)
        other = f", or one of its files, such as --codec kl:{largest}" if largest else ""
        raise UserError(
            f"{shown}: the folder has no {CONFIG}; give a folder of a VAE in the Hugging Face layout{other}"
        )
    if not (found / WEIGHTS).is_file():
        raise UserError(
            f"{shown}: {found} has no {WEIGHTS}; fetch it beside {CONFIG} "
            "(a .bin file is not read: save the model again with safetensors)"
        )
    return found / CONFIG, found / WEIGHTS


def _fetch_files(hub_id: str, shown: str, kind: str) -> tuple[Path, Path]:
    """Returns the paths of (config.json, weights) in the hub's cache, after fetching what is not there."""
    # Imported here, as only hub ids need it.
    import huggingface_hub as hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    reason = f"neither it nor its folder vae has a {CONFIG}"
    places = (None, "vae")  # a VAE's own repository, a whole pipeline's
    try:
        # From the cache, without a network, where both files are there.
        for place in places:
            find = partial(hub.hf_hub_download, hub_id, subfolder=place, local_files_only=True)
            with contextlib.suppress(LocalEntryNotFoundError):
                return Path(find(CONFIG)), Path(find(WEIGHTS))
        for place in places:
            with contextlib.suppress(RemoteEntryNotFoundError):
                # Asks once: without a network a download by itself would try again for half a minute.
                hub.get_hf_file_metadata(hub.hf_hub_url(hub_id, CONFIG, subfolder=place))
                with download_bar(f"fetching {CONFIG}") as bar:
                    config = hub.hf_hub_download(hub_id, CONFIG, subfolder=place, tqdm_class=bar)
                reason = f"it has no {WEIGHTS} beside its {CONFIG}; other files, such as .bin, are not read"
                with download_bar(f"fetching {hub_id}") as bar:
                    return Path(config), Path(hub.hf_hub_download(hub_id, WEIGHTS, subfolder=place, tqdm_class=bar))
    except Exception as error:  # the hub's, its HTTP client's and the file system's share no type
        reason = " ".join(str(error).split()) or type(error).__name__
    raise AbsentCodecError(
        f"{shown} is no folder and cannot be fetched from the hub ({reason}); fetch {CONFIG} and {WEIGHTS} "
        f"elsewhere and name their folder with --codec {kind}:FOLDER, or train on pixels with --codec pixels"
    )


def read_config(file: Path, shown: str, kind: str, path: str) -> dict[str, Any]:
    """Returns the content of the config.json of a codec of this kind, named by its `path`.

    Raises UserError, which begins with the flag `shown`, where it is damaged, or of another kind of codec.
    """
    try:
        content = read_json(file)
    except BadFileError as error:
        raise UserError(f"{shown}: {file} is no configuration ({error}); fetch it again") from None
    found = content.get("_class_name")
    other = CLASSES.get(found, kind) if isinstance(found, str) else kind
    if other != kind:
        raise UserError(f"{shown}: {file} is an {found}'s; use --codec {other}:{path}")
    return content


def draw_params(seed: int, shapes: Mapping[tuple[str, ...], Any]) -> PyTree:
    """Returns random float32 parameters of these shapes, which keep the variance of their inputs."""
    rng = np.random.default_rng(seed)
    # Kernels over the root of their fan-in; normalisation as the identity.
    draw = {
        "kernel": lambda shape: rng.standard_normal(shape, np.float32) / np.prod(shape[:-1]) ** 0.5,
        "scale": lambda shape: np.ones(shape),
        "bias": lambda shape: np.zeros(shape),
        "running_mean": lambda shape: np.zeros(shape),
        "running_var": lambda shape: np.ones(shape),
    }
    params = {path: jnp.asarray(draw[path[-1]](target.shape), jnp.float32) for path, target in shapes.items()}
    return unflatten_dict(params)


def write_files(folder: Path, config: Mapping[str, Any], params: PyTree, surplus: Collection[str] = ()) -> None:
    """Writes config.json and weights into a folder, made if need be; the reverse of `read_config` and `read_params`.

    `surplus` names integers of the same class that are written as zero.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config)
    # Names and layout of PyTorch.
    tensors = {
        tensor_name(path): np.ascontiguousarray(to_torch_layout(np.asarray(value)))
        for path, value in flatten_dict(params).items()
    }
    with atomic_write(folder / WEIGHTS) as temporary:
        save_file(tensors | {name: np.zeros((), np.int64) for name in surplus}, temporary)


def tensor_name(path: tuple[str, ...]) -> str:
    """Returns a parameter's name in the file: ('down_blocks_0', 'conv1', 'kernel') is 'down_blocks.0.conv1.weight'."""
    *modules, leaf = path
    leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    return ".".join([*(re.sub(r"_(\d+)$", r".\1", module) for module in modules), leaf])


def to_torch_layout(value: np.ndarray) -> np.ndarray:
    """Returns a kernel (h, w, in, out) as (out, in, h, w), or (in, out) as (out, in)."""
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def read_params(
    file: Path, targets: Mapping[tuple[str, ...], Any], shown: str, ignored: Collection[str] = ()
) -> PyTree:
    """Returns float32 parameters of the shapes of `targets` from a safetensors file, without the tensors `ignored`.

    Raises UserError, before a tensor is read, where one is missing, left over, or of another shape.
    """
    try:
        found = {name: shape for name, shape in read_safetensors_shapes(file).items() if name not in ignored}
        requested = _match_tensors(found, targets, file, shown)
        tensors = read_safetensors(file, {name: found[name] for name in requested})
    except (BadFileError, OSError) as error:
        raise UserError(f"{shown}: {file} cannot be read ({error}); fetch it again") from None

    return _to_params(tensors, requested, targets)


def arrange_params(
    tensors: Mapping[str, np.ndarray], targets: Mapping[tuple[str, ...], Any], file: Path, shown: str
) -> PyTree:
    """Returns float32 parameters of the shapes of `targets` from tensors under diffusers' names.

    Raises UserError, which begins with the flag `shown` and names the `file`, where one is missing, left over, of
    another shape, or not finite.
    """
    requested = _match_tensors({name: value.shape for name, value in tensors.items()}, targets, file, shown, "the rest")
    values = {name: np.asarray(tensors[name], np.float32) for name in requested}
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise UserError(f"{shown}: {file} has NaN or infinity in {name}; fetch it again")
    return _to_params(values, requested, targets)


def _to_params(
    tensors: Mapping[str, np.ndarray],
    requested: Mapping[str, tuple[str, ...]],
    targets: Mapping[tuple[str, ...], Any],
) -> PyTree:
    """Returns the tensors in Flax's layout, channels last; `requested` has the path of each."""
    params = {}
    for name, path in requested.items():
        value = tensors[name]
        # A dense layer that the file writes as a convolution of side 1.
        if len(targets[path].shape) == 2 and value.ndim == 4:
            value = value[:, :, 0, 0]
        params[path] = jnp.asarray(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T)
    return unflatten_dict(params)


def _match_tensors(
    found: Mapping[str, tuple[int, ...]],
    targets: Mapping[tuple[str, ...], Any],
    file: Path,
    shown: str,
    asking: str = f"its {CONFIG}",
) -> dict[str, tuple[str, ...]]:
    """Returns {name in the file: path of the parameter}; attention may have its older names.

    Raises UserError where what is `asking` for the parameters and the file contradict each other.
    """
    again = "fetch both again" if CONFIG in asking else "fetch it again"
    newer = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    names = {re.sub(r"\.(query|key|value|proj_attn)\.", lambda m: f".{newer[m[1]]}.", name): name for name in found}
    names |= {name: name for name in found if name in names}  # where a file has both, the older one is left over

    # Every parameter needs its tensor, of the shape in PyTorch's layout.
    matched = {}
    for path, target in targets.items():
        requested = tensor_name(path)
        if requested not in names:
            raise UserError(f"{shown}: {file} has no tensor {requested}, which {asking} asks for; {again}")
        shape = tuple(target.shape)
        shape = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
        # Attention may be written as convolutions of side 1.
        if found[names[requested]] not in (shape, (*shape, 1, 1) if len(shape) == 2 else shape):
            raise UserError(f"{shown}: {file} has {requested} of another shape than {asking} asks for; {again}")
        matched[names[requested]] = path

    # A tensor left over would mean another architecture than the one that is computed here.
    left = sorted(found.keys() - matched.keys())
    if left:
        raise UserError(f"{shown}: {file} has a tensor {left[0]} that {asking} does not know; {again}")
    return matched
