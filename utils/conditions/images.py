"""An image as the condition of a model: a small, grey or damaged version of the image to draw, or any other picture."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from utils.base.messages import UserError
from utils.conditions.condition import CONDITIONS, Condition, Embedded
from utils.images.pixels import UINT8, PixelFormat

SPACES = ("pixels", "latents")
MAX_SIDE = 2**14  # of a recorded image


@dataclasses.dataclass(frozen=True)
class ImageCondition(Condition):
    """Images {"image": (n, h, w, c) in the format of the data, "is_given": bool (n,)}; those not given mean "no
    condition".

    The network takes them as channels beside those of x, {"channels": float32 (n, h, w, c), "is_given"}. In the space
    'pixels' they are resized to the latents' height and width; in 'latents' to the images', and encoded by the codec.
    """

    DRAWS_ROWS: ClassVar = True

    shape: tuple[int, int, int]  # of the images
    pixels: PixelFormat = UINT8
    space: str = "pixels"  # or 'latents'
    # Of a model, as `fit_latents` finds them.
    image_shape: tuple[int, int, int] | None = None
    channels_shape: tuple[int, int, int] | None = None

    # --- Arrays ---

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "image": jax.ShapeDtypeStruct(self.shape, self.pixels.dtype),
            "is_given": jax.ShapeDtypeStruct((), jnp.bool_),
        }

    def read(self, example: Mapping[str, Any]) -> dict[str, Any]:
        return {"image": example["condition_image"], "is_given": True}

    def mirror(self, condition: Any) -> dict[str, Any]:
        return {**condition, "image": condition["image"][:, ::-1]}

    def fit_latents(self, image_shape: tuple[int, int, int], latent_shape: tuple[int, int, int]) -> "ImageCondition":
        """Returns the condition of a model of these shapes. Raises UserError for images that its codec cannot take."""
        if self.space == "pixels":
            return dataclasses.replace(self, channels_shape=(*latent_shape[:2], self.shape[2]))
        if self.shape[2] != image_shape[2]:
            raise UserError(
                f"condition images have {self.shape[2]} channel{'s' * (self.shape[2] != 1)}, the images "
                f"{image_shape[2]}, as the codec takes them; use --condition_columns image:pixels"
            )
        return dataclasses.replace(self, image_shape=image_shape, channels_shape=latent_shape)

    def null(self, count: int) -> dict[str, Array]:
        return {"channels": jnp.zeros((count, *self._channels_shape)), "is_given": jnp.zeros(count, bool)}

    def prepare(self, codec: Any, condition: Any, change: Any = None) -> dict[str, Array]:
        return condition if "channels" in condition else _prepare(codec, condition, change, kind=self)

    def embedder(self, width: int, dtype: Any = jnp.float32) -> Callable[[Any], Embedded]:
        # Zeros where nothing is given, and a channel that says so: a given image may be of zeros, too.
        def embed(condition):
            is_given = condition["is_given"][:, None, None, None]
            channels = jnp.where(is_given, condition["channels"], 0)
            plane = jnp.broadcast_to(is_given, (*channels.shape[:3], 1)).astype(channels.dtype)
            return Embedded(channels=jnp.concatenate([channels, plane], axis=-1))

        return embed

    def inherit(self, source: Condition) -> Condition:
        return source if self.accepts(source) else self

    def accepts(self, other: Condition) -> bool:
        # The range is that of the model: values of other data keep their meaning.
        return isinstance(other, ImageCondition) and (self.spec, self.space) == (other.spec, other.space)

    def check(self, values: Any) -> dict[str, np.ndarray]:
        """Returns conditions of images (n, h, w, c), or (n, h, w) where they have one channel, or of the arrays of
        `spec`. Raises UserError for others, and for NaN."""
        is_given: Any = True
        if isinstance(values, Mapping):
            if values.keys() != self.spec.keys():
                raise UserError(f"conditions: the arrays are {', '.join(self.spec)}, not {', '.join(values) or 'none'}")
            is_given = values["is_given"]
            values = values["image"]
        images = np.asarray(values)
        if images.ndim == 3 and self.shape[2] == 1:
            images = images[..., None]
        if images.shape[1:] != self.shape or not len(images):
            raise UserError(f"conditions: images are {images.shape}, not (n, {', '.join(map(str, self.shape))})")
        if not np.can_cast(images.dtype, self.pixels.dtype, "same_kind"):
            raise UserError(f"conditions: images are {images.dtype}, but those of the run are {self.pixels}")
        if images.dtype.kind == "f" and not np.isfinite(images).all():
            raise UserError("conditions: some values of the images are NaN or infinite")
        return {"image": images.astype(self.pixels.dtype), "is_given": np.broadcast_to(is_given, len(images)) != 0}

    def to_columns(self, condition: Any) -> dict[str, np.ndarray]:
        return {"condition_images": np.asarray(condition["image"])}

    @property
    def _channels_shape(self) -> tuple[int, int, int]:
        if self.channels_shape is None:
            raise ValueError("the shape of the latents is not known: call fit_latents first")
        return self.channels_shape

    # --- Words and pictures ---

    def pictures(self, condition: Any) -> UInt8[np.ndarray, "n h w c"]:
        return np.asarray(self.pixels.to_uint8(np.asarray(condition["image"])))

    def titles(self, condition: Any) -> list[str]:
        return ["" if is_given else "no condition" for is_given in np.asarray(condition["is_given"])]

    def remarks(self, condition: Any) -> list[str]:
        """Returns a remark on values of given images that leave the range of the training data."""
        values = np.asarray(condition["image"])[np.asarray(condition["is_given"])]
        _, low, high = self.pixels
        margin = 1e-5 * (high - low)
        if not values.size or (values.min() >= low - margin and values.max() <= high + margin):
            return []
        span = f"{values.min():.4g} to {values.max():.4g}"
        return [f"values of {span} are outside of the training data, {low:.4g} to {high:.4g}"]

    def summary(self) -> str:
        height, width, channels = self.shape
        return f"condition images {height}x{width}x{channels}{' as latents' * (self.space == 'latents')}"

    # --- A run ---

    def to_json(self) -> dict[str, Any]:
        return {"image": {"shape": list(self.shape), "pixels": self.pixels.to_json(), "space": self.space}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ImageCondition":
        """Returns the recorded condition. Raises UserError for a record that no training can have written."""
        record = data.get("image")
        try:
            height, width, channels = record["shape"]  # ty: ignore[not-subscriptable]
            found = cls((height, width, channels), PixelFormat.from_json(record["pixels"]), record["space"])  # ty: ignore[not-subscriptable]
            is_good = all(type(size) is int and 1 <= size <= MAX_SIDE for size in found.shape) and found.space in SPACES
        except (TypeError, KeyError, ValueError):
            is_good = False
        if not is_good:
            raise UserError(f"the run's condition, {str(record)[:100]}, is no record of shape, pixels and space")
        return found


@partial(jax.jit, static_argnames=("kind",))
def _prepare(codec: Any, condition: Any, change: Any, *, kind: ImageCondition) -> dict[str, Array]:
    # As many rows to a column as the images have, whose change it may undergo.
    shape = kind._channels_shape if kind.space == "pixels" else kind.image_shape
    assert shape is not None
    channels = _resize(kind.pixels.to_unit(condition["image"]), *shape[:2])
    if change is not None:
        channels = change(channels)
    if kind.space == "latents":
        # What a codec draws is drawn by one key for all: the same image always has the same latents.
        keys = jnp.broadcast_to(jax.random.key(0), len(channels))
        channels = codec.encode(keys, channels)
    return {"channels": channels.astype(jnp.float32), "is_given": condition["is_given"]}


def _resize(images: Float[Array, "b h w c"], height: int, width: int) -> Float[Array, "b height width c"]:
    """Returns images of another size, linearly interpolated; reduced ones are smoothed first."""
    if images.shape[1:3] == (height, width):
        return images
    return jax.image.resize(images, (len(images), height, width, images.shape[3]), "linear")


CONDITIONS["image"] = ImageCondition
