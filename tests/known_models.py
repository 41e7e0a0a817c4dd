"""Models that need no training: where their paths end is known beforehand."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from diffusion_transformer import DiTConfig
from utils.base.mesh import make_mesh
from utils.codecs.codec import PixelCodec
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import Condition
from utils.networks.models import ImageModel
from utils.objectives.flow_matching import FlowMatching
from utils.sampling.generator import ImageGenerator

# All that is read of it is that the model knows "no condition", so that it can be guided.
CONFIG = DiTConfig(
    patch_size=2,
    hidden_size=32,
    depth=1,
    num_heads=1,
    mlp_ratio=4,
    class_dropout_prob=0.1,
    num_classes=10,
    dtype="float32",
)


class Straight(nn.Module):
    """The velocity of straight paths to images that a condition names: a subclass says which."""

    config: Any
    condition: Any

    def __call__(self, x, t, condition):
        return (self.target(condition) - x) / jnp.maximum(1 - t, 1e-3)[:, None, None, None]

    def count_flops(self, image_shape):
        return 1


class MeanDigits(Straight):
    """Leads to the mean digit of a class; without a class, to that of all."""

    def target(self, labels):
        return self.get_variable("params", "means")[labels]


class Levels(Straight):
    """Leads to an image of one level, the number `level` of the condition."""

    def target(self, condition):
        return condition["vector"]["value"][:, :1, None, None]


class Given(Straight):
    """Leads to the image that it is given as its condition."""

    def target(self, condition):
        return condition["image"]["channels"]


def make_generator(kind: type[Straight], condition: Condition, params: Any) -> ImageGenerator:
    network = kind(CONFIG, condition.fit_latents((8, 8, 1), (8, 8, 1)))
    return ImageGenerator(ImageModel(network, FlowMatching(), PixelCodec(), make_mesh(), (8, 8, 1)), params)


def make_digits(class_names=tuple("0123456789")) -> ImageGenerator:
    """Returns the generator of MeanDigits, with other names for its classes, or for the first of them."""
    digits = load_digits()
    means = [digits.images[digits.target == label].mean(axis=0) for label in range(len(class_names))]
    means.append(digits.images.mean(axis=0))
    params = {"means": jnp.asarray(np.stack(means), jnp.float32)[..., None] / 8 - 1}  # of levels 0 .. 16
    return make_generator(MeanDigits, ClassCondition(tuple(class_names)), params)
