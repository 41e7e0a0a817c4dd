"""A KL autoencoder in one file, with the names of latent diffusion's own code (CompVis, VA-VAE, MAR, REPA-E).

Such a file holds neither sizes, which are read from the tensors, nor what brings latents to unit variance: statistics
are in a file beside it, or the user says a scale.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.base.external import BadFileError
from utils.base.files import expand_home, file_sha256
from utils.base.messages import AbsentCodecError, UserError, log, warn
from utils.base.torch_files import read_tensor_file
from utils.codecs.kl_config import KLConfig

STATISTICS = "latents_stats.pt"  # taken where it stands beside the weights and nothing else is said
GROUPS = 32  # of every normalisation, whatever the widths
# Before names, in files of a whole latent diffusion model.
PREFIX = "first_stage_model."
# Parts of a training that no image passes through.
DROPPED = ("loss.", "foundation_model.", "linear_proj.")

# diffusers' names of the parts of a name, applied in turn.
RENAMED = (
    (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"\.(block|attn)\.(\d+)\.", lambda m: f".{'resnets' if m[1] == 'block' else 'attentions'}.{m[2]}."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# Names that such an autoencoder can have, by which others are told.
CONV = r"\.(weight|bias)"
RESNET = rf"(norm1|conv1|norm2|conv2|nin_shortcut){CONV}"
KNOWN = re.compile(
    rf"(encoder|decoder)\.(conv_in|conv_out|norm_out){CONV}"
    rf"|(encoder\.down|decoder\.up)\.\d+\.block\.\d+\.{RESNET}"
    rf"|(encoder\.down|decoder\.up)\.\d+\.attn\.\d+\.(norm|q|k|v|proj_out){CONV}"
    rf"|encoder\.down\.\d+\.downsample\.conv{CONV}|decoder\.up\.\d+\.upsample\.conv{CONV}"
    rf"|(encoder|decoder)\.mid\.(block_[12]\.{RESNET}|attn_1\.(norm|q|k|v|proj_out){CONV})"
    rf"|(post_)?quant_conv{CONV}"
)


class LDMSource(NamedTuple):
    """FILE[,stats=FILE2][,scale=NUMBER], taken apart."""

    file: Path
    statistics: Path | None = None
    scale: float | None = None


def parse_source(text: str, shown: str) -> LDMSource | None:
    """Returns the file and the options of FILE[,stats=FILE2][,scale=NUMBER]; None where it is no file, but a folder or
    a hub id.

    Raises UserError, which begins with the flag `shown`, for options of anything else, and for both of them.
    """
    # A name may have commas, too: options are what has their names, at the end.
    match = re.fullmatch(r"(?P<file>.*?)(?P<options>(,(stats|scale)=[^,]*)*)", text, re.DOTALL)
    assert match is not None
    file = Path(match["file"])
    options = [option.split("=", 1) for option in match["options"].split(",")[1:]]
    if not options:
        return LDMSource(file) if file.is_file() else None
    if not file.is_file():
        what = "a folder, whose config.json has its scale" if file.is_dir() else "no file"
        kind = UserError if file.is_dir() else AbsentCodecError
        raise kind(f"{shown}: {file} is {what}; stats= and scale= belong to a file of weights")

    # One scale: statistics would be multiplied by the other.
    if len(options) > 1:
        raise UserError(f"{shown}: give one of stats=FILE and scale=NUMBER, once")
    ((name, value),) = options
    if name == "stats":
        if not value:
            raise UserError(f"{shown}: stats= names no file; give stats=FILE, or leave it out")
        return LDMSource(file, statistics=Path(expand_home(value, shown)))
    try:
        scale = float(value)
    except ValueError:
        scale = math.nan
    if not 1e-6 <= scale <= 1e6:
        raise UserError(f"{shown}: scale={value} is no factor of latents; Stable Diffusion's is scale=0.18215")
    return LDMSource(file, scale=scale)


def read_ldm(source: LDMSource, shown: str) -> tuple[dict[str, np.ndarray], KLConfig, str]:
    """Returns (tensors under diffusers' names, configuration, hash of the weights, shift and scale) of a file.

    Raises UserError, which begins with the flag `shown`, for a file that is broken or of another network.
    """
    file = source.file
    try:
        tensors = _find_autoencoder(read_tensor_file(file), file, shown)
    except (BadFileError, OSError) as error:
        raise UserError(f"{shown}: {file} cannot be read ({error}); fetch it again") from None

    # What the tensors do not say: how latents are brought to unit variance.
    sizes = _find_sizes(tensors, file, shown)
    statistics = source.statistics
    beside = file.parent / STATISTICS
    if statistics is None and source.scale is None and beside.is_file():
        statistics = beside
        log(f"{shown}: latents are normalised by {beside}, which is beside the weights")
    if statistics is not None:
        mean, std = read_statistics(statistics, sizes["latent_channels"], shown)
        scaling = {"scaling_factor": 1.0, "latents_mean": mean, "latents_std": std}
    else:
        scaling = {"scaling_factor": source.scale or 1.0}
        if source.scale is None:
            warn(
                f"{shown}: latents are as the autoencoder makes them, for the file has no scale; give ,scale=0.18215 "
                "for Stable Diffusion's, or ,stats=FILE"
            )
    config = KLConfig(**sizes, **scaling)
    config.check(str(statistics or file), shown)

    # diffusers' names. Weights, shift and scale together are what makes latents.
    levels = len(config.block_out_channels)
    renamed = {_rename(name, levels): value for name, value in tensors.items()}
    digest = hashlib.sha256(file_sha256(file).encode())
    for values in (config.shift, config.scale):
        digest.update(np.broadcast_to(values, config.latent_channels).astype("<f4").tobytes())
    return renamed, config, digest.hexdigest()


def _find_autoencoder(content: Mapping[str, Any], file: Path, shown: str) -> dict[str, np.ndarray]:
    """Returns the autoencoder's tensors, without a prefix and without parts of its training.

    Raises UserError, which begins with the flag `shown`, for a tensor that no such autoencoder has.
    """
    # The keys under which trainings keep it.
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, np.ndarray)}
    # Of a whole model, only the autoencoder.
    if any(name.startswith(PREFIX) for name in tensors):
        tensors = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    tensors = {name: value for name, value in tensors.items() if not name.startswith(DROPPED)}
    if not any(name.startswith("encoder.down.") for name in tensors):
        raise UserError(
            f"{shown}: {file} has no tensors encoder.down.*, as latent diffusion's autoencoders have; of diffusers' "
            "layout, name the folder of its config.json"
        )
    surplus = sorted(name for name in tensors if not KNOWN.fullmatch(name))
    if surplus:
        raise UserError(f"{shown}: {file} has a tensor {surplus[0][:100]} that no KL autoencoder has")
    return tensors


def _find_sizes(tensors: Mapping[str, np.ndarray], file: Path, shown: str) -> dict[str, Any]:
    """Returns the fields of KLConfig that the tensors tell, under latent diffusion's names.

    Raises UserError, which begins with the flag `shown`, where one that tells them is missing or of an odd shape.
    """

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != ndim:
            what = "a tensor of another shape under" if name in tensors else "no tensor"
            raise UserError(f"{shown}: {file} has {what} {name}, which every KL autoencoder has; fetch it again")
        return tensors[name].shape

    def count(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    # Widths of the levels, which count from the image.
    levels = count(r"encoder\.down\.(\d+)\.")
    widths = tuple(shape(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels))
    if odd := [width for width in widths if width % GROUPS]:
        raise UserError(f"{shown}: {file} has a width of {odd[0]}, no multiple of {GROUPS}, in which it is normalised")

    # Latents: the last convolution has mean and log-variance.
    if "quant_conv.weight" not in tensors:
        raise UserError(
            f"{shown}: {file} has no quant_conv, which latent diffusion's have; those without, FLUX's and SD3's, are "
            "read in diffusers' layout: name its folder or hub id"
        )
    embedded, channels = (size // 2 for size in shape("quant_conv.weight", 4)[:2])
    if embedded != channels:
        raise UserError(
            f"{shown}: {file} has latents of {embedded} channels (embed_dim) made from {channels} (z_channels); "
            "only equal ones are known here"
        )
    down = tuple(f"encoder.down.{i}.attn.0.q.weight" in tensors for i in range(levels))
    up = tuple(f"decoder.up.{i}.attn.0.q.weight" in tensors for i in reversed(range(levels)))
    return {
        "in_channels": shape("encoder.conv_in.weight", 4)[1],
        "out_channels": shape("decoder.conv_out.weight", 4)[0],
        "block_out_channels": widths,
        "layers_per_block": count(r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": channels,
        "norm_num_groups": GROUPS,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in tensors,
        "down_attention": down if any(down) else (),
        "up_attention": up if any(up) else (),
    }


def _rename(name: str, levels: int) -> str:
    """Returns diffusers' name of one of latent diffusion's, which counts the decoder's levels from the image."""
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", name)
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return re.sub(r"(\.attentions\.\d+)\.(\w+)", lambda m: f"{m[1]}.{ATTENTION[m[2]]}", name)


def read_statistics(path: Path, channels: int, shown: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns (mean, standard deviation) of each of the latents' channels from a file of VA-VAE's form (mean, std) or
    REPA-E's (latents_bias, latents_scale, the reciprocal of the deviation).

    Raises UserError, which begins with the flag `shown`, where there are other numbers than one for each channel.
    """
    try:
        content = read_tensor_file(path)
    except (BadFileError, OSError) as error:
        raise UserError(f"{shown}: statistics in {path} cannot be read ({error})") from None

    # All numbers of both, in float64: one divides by the other's.
    pairs = (("mean", "std"), ("latents_bias", "latents_scale"))
    names = next((names for names in pairs if all(isinstance(content.get(name), np.ndarray) for name in names)), None)
    if names is None:
        found = ", ".join(str(name)[:50] for name in list(content)[:4])
        raise UserError(f"{shown}: {path} holds {found}, not mean and std, or latents_bias and latents_scale")
    mean, scale = (np.asarray(content[name], np.float64).ravel() for name in names)
    for name, values in zip(names, (mean, scale), strict=True):
        if len(values) != channels:
            raise UserError(f"{shown}: {path} has {len(values)} numbers of {name}, but the latents {channels} channels")
        if not np.isfinite(values).all() or (values is scale and (values <= 0).any()):
            raise UserError(f"{shown}: {path} has {name} that are no finite numbers, or not above 0")
    std = scale if names[1] == "std" else 1 / scale
    return tuple(mean.tolist()), tuple(std.tolist())
