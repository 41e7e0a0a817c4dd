"""A small classifier of Fashion-MNIST, whose features measure samples: two convolutions and 128 features.

    python benchmarks/fashion_classifier.py --data runs/fashion_mnist.npz

trains it anew in a minute, from the same seed, and writes its weights, which are part of this repository. `register`
makes it `--extractor fashion`, with the metrics fd_fashion and kd_fashion.
"""

import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.base.messages import log
from utils.flags import program
from utils.flags.definitions import define_path
from utils.metrics.extractors import EXTRACTORS, Extractor, FeatureKey
from utils.metrics.metrics import METRICS, Metric, frechet_metric, kernel_metric

WEIGHTS = Path(__file__).resolve().parent / "fashion_classifier.npz"  # float16
NAME = "fashion"
NUM_FEATURES = 128
NUM_CLASSES = 10
KEY = FeatureKey(NAME, "hidden")

BATCH_SIZE = 128
LEARNING_RATE = 2e-3


class Classifier(nn.Module):
    """Grey images (b, 28, 28, 1) in [0, 1] -> (features (b, 128), all >= 0, and logits (b, 10))."""

    @nn.compact
    def __call__(self, images):
        hidden = images
        for width in (32, 64):
            hidden = nn.relu(nn.Conv(width, (5, 5), strides=2)(hidden))
        # To 4x4: the kernel that follows is a third of what 7x7 would need.
        hidden = nn.max_pool(hidden, (2, 2), strides=(2, 2), padding="SAME")
        features = nn.relu(nn.Dense(NUM_FEATURES)(hidden.reshape(len(hidden), -1)))
        return features, nn.Dense(NUM_CLASSES)(features)


# --- Training ---


def train(images: np.ndarray, labels: np.ndarray, epochs: int, seed: int = 0) -> Any:
    """Returns parameters trained on uint8 images (n, 28, 28, 1) and labels (n,), half of the images mirrored."""
    model = Classifier()
    num_batches = len(images) // BATCH_SIZE
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, epochs * num_batches)
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    params = model.init(jax.random.key(seed), jnp.zeros((1, 28, 28, 1)))
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch, targets):
        def loss_fn(params):
            _, logits = model.apply(params, batch.astype(jnp.float32) / 255)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    # A new order of the images, and of mirror images, in each epoch.
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        losses = []
        for rows in rng.permutation(len(images))[: num_batches * BATCH_SIZE].reshape(num_batches, BATCH_SIZE):
            is_mirrored = rng.random(BATCH_SIZE)[:, None, None, None] < 0.5
            batch = np.where(is_mirrored, images[rows][:, :, ::-1], images[rows])
            params, opt_state, loss = step(params, opt_state, batch, labels[rows])
            losses.append(loss)
        log(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}")
    return params


def save_weights(params: Any, path: Path) -> None:
    """Writes parameters as float16, {name: array}."""
    flat = flatten_dict(params["params"], sep="/")
    with path.open("wb") as file:
        np.savez_compressed(file, **{name: np.asarray(value, np.float16) for name, value in flat.items()})


def load_weights(path: Path = WEIGHTS) -> Any:
    """Returns the parameters, float32."""
    with np.load(path) as file:
        flat = {name: np.asarray(file[name], np.float32) for name in file.files}
    return {"params": unflatten_dict(flat, sep="/")}


# --- Measuring ---


def load_extractor(weights, convention, sharding) -> Callable:
    """Returns the function from uint8 images (b, 28, 28, 3), whose channels are equal, to {"hidden": (b, 128)}."""
    params = load_weights()
    params = params if sharding is None else jax.device_put(params, sharding)
    apply = jax.jit(lambda params, images: Classifier().apply(params, images[..., :1].astype(jnp.float32) / 255)[0])
    return lambda images: {KEY.feature: apply(params, images)}


def register() -> None:
    """Adds the network to EXTRACTORS, and its metrics to METRICS, once."""
    if NAME in EXTRACTORS:
        return
    sha256 = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    EXTRACTORS[NAME] = Extractor({KEY.feature: NUM_FEATURES}, load_extractor, sha256)
    METRICS.append(Metric(frechet_metric("fd_fashion"), {"fd_fashion": "FD"}, KEY))
    METRICS.append(Metric(kernel_metric("kd_fashion"), {"kd_fashion": "KD"}, KEY, format=".4f", needs_rows=True))


def agreement(features: np.ndarray, labels: np.ndarray) -> float:
    """Returns the fraction in [0, 1] of images, by features (n, 128), that are classified as their labels (n,)."""
    head = load_weights()["params"]["Dense_1"]
    return float(np.mean((features @ head["kernel"] + head["bias"]).argmax(axis=1) == labels))


def define_flags() -> None:
    define_path("data", "runs/fashion_mnist.npz", "Images, by fashion_mnist.py.")
    define_path("out", str(WEIGHTS), "File of the weights.")
    flags.DEFINE_integer("epochs", 8, "Passes over the images.", lower_bound=1)


def main(config: ConfigDict) -> None:
    with np.load(config.data) as file:
        data = {name: file[name] for name in file.files}
    params = train(data["images"], data["labels"], config.epochs)
    save_weights(params, Path(config.out))

    # Of the weights as they are on disk.
    _, logits = jax.jit(Classifier().apply)(load_weights(Path(config.out)), data["validation_images"] / np.float32(255))
    accuracy = np.mean(np.argmax(logits, axis=1) == data["validation_labels"])
    log(f"written: {config.out}; it classifies {accuracy:.2%} of the test images as they are labelled")


if __name__ == "__main__":
    program.run_program(define_flags, main)
