"""A condition together with how its image was changed in training, so that samples are like images as they are (EDM,
arXiv:2206.00364, appendix F.2)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from utils.conditions.condition import Condition, Embedded, count_rows

AUGMENTATIONS = ("flip", "rotate", "translate", "scale")
NUM_PARAMETERS = 6  # of how an image was changed; utils/training/augmentation.py draws them
PART = "augment_embed"  # of a network's parameters


class Change(NamedTuple):
    """Conditions of images, and how these were changed. Outside of training there are conditions alone."""

    condition: PyTree  # (b, ...)
    parameters: Float[Array, "b 6"]  # zero where the image is as it was


class AugmentEmbed(nn.Module):
    """Parameters (b, 6) -> (b, width), linearly: an image as it is adds zeros, and at first any does."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, parameters):
        kernel = self.param("kernel", nn.initializers.zeros, (NUM_PARAMETERS, self.width))
        return (parameters @ kernel).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Augmented(Condition):
    """The condition of a network that is trained on changed images: `inner`, or a `Change`.

    It is seen by networks and by the training step alone. Data, users and records have the inner kind.
    """

    inner: Condition
    names: tuple[str, ...] = ()  # of AUGMENTATIONS: how images are changed
    prob: float = 0.0  # in (0, 1]: how often each of them is

    @property
    def spec(self) -> PyTree:
        return self.inner.spec

    def read(self, example: Mapping[str, Any]) -> PyTree:
        return self.inner.read(example)

    def null(self, count: int) -> PyTree:
        return self.inner.null(count)

    def without(self, condition: PyTree) -> PyTree:
        null = self.null(count_rows(condition))
        return condition._replace(condition=null) if isinstance(condition, Change) else null

    @property
    def num_parts(self) -> int:
        return self.inner.num_parts

    def drop_each(self, drops: Bool[Array, "n parts"], condition: PyTree) -> PyTree:
        return self.inner.drop_each(drops, condition)

    def prepare(self, codec: Any, condition: PyTree, change: Any = None) -> PyTree:
        return self.inner.prepare(codec, condition, change)

    def fit(self, num_classes: int) -> "Augmented":
        return dataclasses.replace(self, inner=self.inner.fit(num_classes))

    def embedder(self, width: int, dtype: Any) -> Callable[[PyTree], Embedded]:
        embed = self.inner.embedder(width, dtype)
        embed_change = AugmentEmbed(width, dtype, name=PART)

        def apply(condition):
            if not isinstance(condition, Change):
                condition = Change(condition, jnp.zeros((count_rows(condition), NUM_PARAMETERS)))
            return embed(condition.condition)._replace(augmentation=embed_change(condition.parameters))

        return apply


def without_augmentation(condition: Condition) -> Condition:
    """Returns the kind that data and users have."""
    return condition.inner if isinstance(condition, Augmented) else condition
