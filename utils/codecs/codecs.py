"""The codecs by name, as --codec says them: how each is loaded, and what a run records of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from utils.base.files import expand_home
from utils.base.mesh import replicated
from utils.base.messages import UserError
from utils.base.settings import check_made, unknown_name
from utils.codecs.codec import Codec, PixelCodec
from utils.codecs.kl import KLCodec
from utils.codecs.tiny import DEFAULT_HUB_ID as TINY_HUB_ID
from utils.codecs.tiny import TinyCodec
from utils.storage.urls import refuse_url

# The VAE of --codec kl without a source.
DEFAULT_HUB_ID = "stabilityai/sd-vae-ft-mse"


class CodecSpec(NamedTuple):
    """The codec that --codec asks for: its name in CODECS, and where it is loaded from."""

    name: str
    source: str | None = None  # None: the kind's default

    def __str__(self) -> str:
        return self.name if self.source is None else f"{self.name}:{self.source}"


class CodecKind(NamedTuple):
    """A kind of codec: how those of one name are made.

    `load(source)` returns the codec; `source` is None for a kind without `placeholder`. Its UserErrors begin with
    --codec=NAME:SOURCE.
    """

    load: Callable[[Any], Codec]
    help: str
    placeholder: str = ""  # what follows the colon of --codec NAME:SOURCE; empty: nothing does
    default: str | None = None  # the source where none is named
    num_channels: int | None = None  # of images, where only so many are taken

    @property
    def is_path(self) -> bool:
        """Whether the source may be a path, in which a leading ~ stands for a home folder."""
        return "PATH" in self.placeholder


CODECS: dict[str, CodecKind] = {
    "pixels": CodecKind(lambda source: PixelCodec(), "the images themselves"),
    "kl": CodecKind(
        KLCodec.load,
        "latents of a KL autoencoder, such as Stable Diffusion's",
        placeholder="PATH_OR_HUB",
        default=DEFAULT_HUB_ID,
        num_channels=3,
    ),
    "tiny": CodecKind(
        TinyCodec.load,
        "latents of a tiny autoencoder, such as TAESD",
        placeholder="PATH_OR_HUB",
        default=TINY_HUB_ID,
        num_channels=3,
    ),
}


def list_codecs() -> list[str]:
    """Returns the values of --codec as a user writes them: pixels, kl:PATH_OR_HUB."""
    return [f"{name}:{kind.placeholder}" if kind.placeholder else name for name, kind in CODECS.items()]


def parse_codec(text: str, flag: str = "codec") -> CodecSpec:
    """Returns the codec of NAME or NAME:SOURCE.

    Raises UserError, naming the `flag`, for an unknown name, and for a source in excess.
    """
    name, colon, source = text.partition(":")
    spec = CodecSpec(name, source if colon else None)
    if name not in CODECS:
        # A hub id without its "kl:" is the likely mistake where there is a slash.
        raise unknown_name(f"--{flag}={text}", name, list_codecs(), f"kl:{text}" if "/" in text else None)

    # A colon needs a source after it, and a kind that takes one.
    kind = CODECS[name]
    if colon and not (kind.placeholder and source):
        raise UserError(f"--{flag}={text}: use {name}{f':{kind.placeholder}' if kind.placeholder else ''}")
    return spec


def expand_codec(text: str, flag: str = "codec") -> str:
    """Returns NAME:SOURCE with a leading ~ of a source that may be a path replaced.

    Raises UserError, naming the `flag`, where there is no such home, and for URLs.
    """
    # Hub ids and pixels stay as they are, and a name that is unknown is for `parse_codec` to refuse.
    name, colon, source = text.partition(":")
    if not colon or name not in CODECS or not CODECS[name].is_path:
        return text
    refuse_url(source, flag)
    return f"{name}:{expand_home(source, f'--{flag}={text}')}"


def codec_of_vae(vae: str) -> str:
    """Returns the value of --codec that --vae stands for. Raises UserError where it has a codec's name before it."""
    name, colon, source = vae.partition(":")
    if colon and name in CODECS:
        raise UserError(f"--vae={vae}: --vae takes what follows kl: in --codec; give --vae {source}")
    return f"kl:{vae}"


def translate_spellings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings {name: value} with those of earlier versions as "codec".

    `use_stable_vae` and `model.use_stable_vae` (1: kl, 0: pixels) and `vae` (the source of kl) are spellings of it.
    Raises UserError where two of them contradict each other.
    """
    # The old spellings are taken out; what they say comes back as "codec".
    values = dict(given)
    spellings = ("model.use_stable_vae", "use_stable_vae")
    switches = {name: values.pop(name, None) for name in spellings}
    switches = {name: value for name, value in switches.items() if value is not None}
    vae = values.pop("vae", None)
    codec = values.get("codec")

    # Contradictions, in the words in which they were given.
    if len(set(switches.values())) > 1:
        first, second = (f"--{name}={value}" for name, value in reversed(switches.items()))
        raise UserError(f"{first} contradicts {second}; give one")
    for name, value in switches.items():
        if codec is not None and bool(value) != (parse_codec(codec).name != "pixels"):
            raise UserError(f"--{name}={value} contradicts --codec={codec}; give one")
        if vae is not None and not value:
            raise UserError(f"--vae={vae} has no effect on pixels (--{name} 0); leave it out")
        values["codec"] = codec or ("kl" if value else "pixels")
    if vae is not None:
        # --vae alone asks for kl, too.
        asked = codec_of_vae(vae)
        if codec not in (None, "kl", asked):
            raise UserError(f"--vae={vae} contradicts --codec={codec}; give one")
        values["codec"] = asked
    return values


def load_codec(spec: CodecSpec, mesh: Mesh, image_shape: Sequence[int], expected_sha256: str | None = None) -> Codec:
    """Returns the codec of images (h, w, c), replicated over the mesh.

    `expected_sha256` is the hash of the weights that made the latents of a data set, empty for a codec without weights.
    Raises UserError where the codec cannot be loaded, does not take such images, or has other weights than those.
    """
    # What the codec cannot take, before its weights are read or fetched.
    kind = CODECS[spec.name]
    shown = f"--codec={spec}"
    height, width, channels = image_shape
    if expected_sha256 is not None and spec.name == "pixels":
        raise UserError(f"{shown}, but the data set is of latents; leave the flag out")
    if kind.num_channels not in (None, channels):
        what = "grey" if channels == 1 else f"of {channels} channels"
        raise UserError(f"{shown}, but the images are {what}; train on pixels with --codec pixels")

    # Other weights would decode the latents to something, but not to the images.
    codec = kind.load(spec.source or kind.default)
    check_made(codec, Codec, f"the loader of {shown}")
    if expected_sha256 is not None and expected_sha256 != (codec.sha256 or ""):
        raise UserError(
            f"{shown} is another VAE (sha256 {str(codec.sha256)[:12]}...) than the one that made the latents "
            f"({expected_sha256[:12]}...); name that one"
        )

    # Refuses sides that do not divide, now rather than while compiling.
    codec.latent_shape((height, width, channels))
    return jax.device_put(codec, replicated(mesh))


def describe_codec(spec: CodecSpec, sha256: str | None) -> dict[str, Any]:
    """Returns the record of a run's codec: "codec", and "vae" and "vae_sha256" for readers of earlier versions."""
    # With the hash, as the hub may later hold other weights under the same id.
    record = {"name": spec.name, "source": spec.source, "sha256": sha256}
    return {"codec": record, "vae": spec.source if spec.name == "kl" else None, "vae_sha256": sha256}


def choose_codec(recorded: Mapping[str, Any], requested: str | None) -> CodecSpec:
    """Returns the codec of a run: the `requested` one (a value of --codec), or as the run `recorded` it.

    Raises UserError where another kind of codec is requested, or the run's kind is not registered.
    """
    # A codec from outside this repository has to be registered by whoever loads its runs.
    name = recorded["name"]
    if name not in CODECS:
        raise unknown_name(f"--codec={name}", name, list_codecs())

    # Another place of the same kind is fine: the weights are compared by their hash when they are loaded.
    if requested is None:
        return CodecSpec(name, recorded["source"])
    spec = parse_codec(requested)
    if spec.name != name:
        what = "a run of pixels" if name == "pixels" else f"a run with --codec {name}"
        raise UserError(f"--codec={requested} has no effect on {what}; leave it out")
    return spec


def is_other_codec(spec: CodecSpec, recorded: Mapping[str, Any]) -> bool:
    """Returns whether a codec has other weights than a run's record of one of the same kind, wherever they are."""
    source = spec.source or CODECS[spec.name].default
    return source != recorded["source"] and CODECS[spec.name].load(source).sha256 != recorded["sha256"]


def name_for_manifest(spec: CodecSpec) -> str:
    """Returns the codec's name in a manifest of latents: the source alone where it is a KL autoencoder."""
    return str(spec) if spec.name != "kl" else spec.source or DEFAULT_HUB_ID


def read_manifest_name(name: str) -> CodecSpec:
    """Returns the codec that `name_for_manifest` gave this name."""
    return parse_codec(name) if name.partition(":")[0] in CODECS else CodecSpec("kl", name)
