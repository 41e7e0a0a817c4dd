"""Panels of a run decoded by a tiny autoencoder instead of the codec, in a fraction of the time.

What is measured (FID, losses) and what is saved never passes through it.
"""

import re
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from utils.base.mesh import gather, replicated
from utils.base.messages import UserError, log
from utils.codecs.codec import Codec, is_identity
from utils.codecs.codecs import CODECS, parse_codec
from utils.conditions.condition import resize_rows
from utils.networks.models import ImageModel
from utils.runs.config import RunConfig

KIND = "tiny"
NUM_COMPARED = 2  # validation images by which viewer and codec are compared; a VAE takes seconds for each on a CPU
POOR = 18.0  # dB; below it, the viewer is probably of other latents (TAESD's own are above 25)


class PreviewCodec(flax.struct.PyTreeNode):
    """A codec that encodes as one and decodes as another."""

    codec: Any
    viewer: Any

    @property
    def sha256(self) -> str | None:
        return self.codec.sha256

    def encode(self, key: Key[Array, "*b"], images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        return self.codec.encode(key, images)

    def sample_latents(
        self, key: Key[Array, "*b"], mean: Float[Array, "b h w c"], logvar: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w c"]:
        return self.codec.sample_latents(key, mean, logvar)

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        return self.viewer.decode(latents)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return self.codec.latent_shape(image_shape)


def load_preview(config: RunConfig, model: ImageModel, batch: Any) -> Codec | None:
    """Returns the codec for the panels of a run that --preview asks for, None where none are drawn by it, and logs how
    near it comes to the run's own on `batch`, the validation images.

    Raises UserError for anything but a tiny autoencoder of latents of the same shape.
    """
    text = config.evaluation.preview
    if text is None or config.training.plan:
        return None
    if text.partition(":")[0] != KIND:
        raise UserError(f"--preview={text}: only {KIND}:PATH_OR_HUB decodes in a moment; leave it out")
    spec = parse_codec(text, "preview")
    if is_identity(model.codec):
        raise UserError(f"--preview={text}: the latents are the images, which need no decoding; leave it out")

    # The loader's messages are of --codec, and advise what is none of a preview.
    try:
        viewer = CODECS[KIND].load(spec.source or CODECS[KIND].default)
        shape = viewer.latent_shape(model.image_shape)
    except UserError as error:
        words = str(error).replace("--codec=", "--preview=").replace(f"--codec {KIND}", f"--preview {KIND}")
        words = words.replace(", or train on pixels with --codec pixels", ", or leave it out")
        words = re.sub(r"use --codec \w+:.*", "give the folder of a tiny one, or leave it out", words)
        raise UserError(words) from None
    if shape != model.latent_shape:
        theirs, ours = ("x".join(map(str, shape)) for shape in (shape, model.latent_shape))
        raise UserError(
            f"--preview={text} has latents {theirs} of these images, but the model learns {ours}; give the tiny "
            "autoencoder that was made for this codec, or leave it out"
        )
    codec = PreviewCodec(model.codec, jax.device_put(viewer, replicated(model.mesh)))
    report_likeness(text, codec, batch)
    return codec


def report_likeness(text: str, codec: PreviewCodec, batch: Any) -> None:
    """Logs the PSNR of what the viewer decodes against what the codec does, of a few images of `batch`."""
    rows = resize_rows(jax.tree.map(gather, batch), NUM_COMPARED)
    latents = rows.to_latents(codec.codec, jax.random.key(0))
    decode = jax.jit(lambda codec, latents: jnp.clip(codec.decode(latents), -1, 1))
    images, shown = (gather(decode(each, latents)) for each in (codec.codec, codec.viewer))
    # Of numbers in [-1, 1], whose range is 2.
    psnr = 10 * np.log10(4 / max(float(np.mean((images - shown) ** 2)), 1e-10))
    doubt = "; is it the tiny autoencoder of this VAE?" if psnr < POOR else ""
    log(f"--preview={text} draws panels: {psnr:.1f} dB (PSNR) from what the codec decodes{doubt}")
