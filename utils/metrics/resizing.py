"""Bicubic resizes of images for feature networks: on the devices, and Pillow's on the host."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image


@partial(jax.jit, static_argnames="side")
def resize_on_device(images: UInt8[Array | np.ndarray, "b h w c"], side: int) -> Float[Array, "b s s c"]:
    """Returns images of side x side, bicubic with a = -1/2 and antialiased, in grey levels; it may overshoot 0..255."""
    shape = (images.shape[0], side, side, images.shape[-1])
    return jax.image.resize(images.astype(jnp.float32), shape, "bicubic", antialias=True)


def resize_pil(image: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "s s 3"]:
    """Returns Pillow's antialiased bicubic resize of bytes, which it rounds and clips after each axis."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def resize_pil_float(image: UInt8[np.ndarray, "h w 3"], side: int) -> Float[np.ndarray, "s s 3"]:
    """Returns the same of floats, channel by channel, clipped to 0..255 at the end and not rounded (as clean-fid has
    it, arXiv:2104.11222)."""
    channels = [Image.fromarray(image[..., i].astype(np.float32)) for i in range(image.shape[-1])]
    resized = [np.asarray(channel.resize((side, side), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, axis=-1).clip(0, 255)


def map_on_host(resize: Callable[[np.ndarray, int], np.ndarray], images: Any, side: int) -> Array:
    """Returns `resize(image, side)` of every image of a batch, placed as the batch is; each process resizes the rows
    that its own devices hold."""
    images = jnp.asarray(images)
    # Pillow lets go of the interpreter's lock, so that threads share the work.
    with ThreadPoolExecutor() as pool:
        parts = []
        for part in images.addressable_shards:
            resized = np.stack(list(pool.map(lambda image: resize(image, side), np.asarray(part.data))))
            parts.append(jax.device_put(resized, part.device))
    shape = (images.shape[0], *parts[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, images.sharding, parts)
