"""Pairs of noise and the sample that a model makes of it, for reflow and distillation (arXiv:2209.03003).

DIR/manifest.json says which model made them and how; DIR/pairs-00000-of-00010.array_record hold a record for each pair:
its condition (utils/data/records.py), then the sample x_1, float32 (h, w, c), little-endian. The noise is not stored:
that of pair i is the noise of sample i under the manifest's seed, which is drawn again when it is needed.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Array, Float, Float32, Key, PyTree, UInt32

from utils.base.commands import write_command
from utils.base.devices import RANDOM, changed_variables
from utils.base.external import BadFileError, read_json
from utils.base.files import atomic_write
from utils.base.messages import UserError
from utils.conditions.condition import Condition
from utils.data.dataset import (
    Batch,
    DataOptions,
    Example,
    ImageDataset,
    LatentMetadata,
    Subset,
    split_rows,
)
from utils.data.fingerprint import Fingerprint
from utils.data.latents import MAX_FILES, open_records
from utils.data.records import RecordedConditions, condition_bytes, restore_kind
from utils.images.pixels import UINT8, PixelFormat

MANIFEST = "manifest.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class PairsManifest:
    """Contents of a folder of pairs; every machine that makes it from the same model writes the same."""

    # Which model, and the draw of its samples.
    dataset_name: str
    params_sha256: str
    sampler: str  # in words
    seed: int
    # How many there are, in files of how many.
    num_pairs: int
    shard_size: int
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    # The VAE that decodes the samples; None for a model of pixels.
    vae: str | None
    vae_sha256: str | None
    format: int = FORMAT
    empty_classes: tuple[int, ...] = ()  # labels that were not drawn as the model's data have no images of them
    jax_variables: tuple[str, ...] = ()  # under which numbers were drawn, where they are not JAX's default
    pixels: PixelFormat = UINT8  # of the images
    condition: dict[str, Any] | None = None  # the kind of the conditions, where they are no classes

    @property
    def own_condition(self) -> Condition | None:
        return restore_kind(self.condition)

    def shards(self) -> list[tuple[str, range]]:
        """Returns (file name, numbers of its pairs) for every file."""
        starts = range(0, self.num_pairs, self.shard_size)
        return [
            (f"pairs-{i:05d}-of-{len(starts):05d}.array_record", range(s, min(s + self.shard_size, self.num_pairs)))
            for i, s in enumerate(starts)
        ]

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self) | {"pixels": self.pixels.to_json()}))

    def fingerprint(self, split: str, num_pairs: int) -> Fingerprint:
        """Returns the fingerprint of a split's pairs: what made them, and how."""
        manifest = self.to_json()
        del manifest["empty_classes"]  # follows from the model; older pairs do not say
        # As in older pairs.
        if not self.jax_variables:
            del manifest["jax_variables"]
        if self.pixels == UINT8:
            del manifest["pixels"]
        if self.condition is None:
            del manifest["condition"]
        content = json.dumps([split, manifest], sort_keys=True)
        return Fingerprint("pairs", num_pairs, hashlib.sha256(content.encode()).hexdigest())


def load_pairs_manifest(folder: Path) -> PairsManifest | None:
    """Returns the manifest of a folder of pairs; None if it has none. Raises UserError if it cannot be understood."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        # JSON's lists as tuples; older manifests lack the last of them.
        content = read_json(path)
        for name in ("image_shape", "latent_shape", "class_names"):
            content[name] = tuple(content[name])
        for name in ("empty_classes", "jax_variables"):
            content[name] = tuple(content.get(name, ()))
        content["pixels"] = PixelFormat.from_record(content)
        manifest = PairsManifest(**content)

        # Sizes, then the draw, then names and labels.
        sizes = (*manifest.image_shape, *manifest.latent_shape, manifest.num_pairs, manifest.shard_size)
        are_counts = all(type(size) is int and 0 < size < 2**40 for size in sizes)
        if len(sizes) != 8 or not are_counts or manifest.num_pairs > MAX_FILES * manifest.shard_size:
            raise ValueError("sizes that no pairs have")
        if type(manifest.seed) is not int or not 0 <= manifest.seed < 2**32 or manifest.format != FORMAT:
            raise ValueError(f"seed {manifest.seed}, format {manifest.format}")
        is_known = bool(manifest.class_names or manifest.own_condition)
        if not is_known or not all(isinstance(name, str) for name in manifest.class_names):
            raise ValueError("names that are not strings")
        if not all(type(label) is int and 0 <= label < len(manifest.class_names) for label in manifest.empty_classes):
            raise ValueError("empty classes that are none")
        if not all(isinstance(variable, str) for variable in manifest.jax_variables):
            raise ValueError("variables that are not strings")
    except (BadFileError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a valid manifest of pairs ({error}); make them again elsewhere") from None
    return manifest


def write_pairs(
    path: Path, pairs: Iterable[tuple[PyTree, Float32[np.ndarray, "h w c"]]], kind: Condition | None = None
) -> None:
    """Writes a file of (condition, x_1) records, complete or not at all; without `kind`, conditions are labels."""
    with atomic_write(path) as temporary:
        # Records by themselves, so that any order reads them one by one; floats hardly compress.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for condition, x_1 in pairs:
            writer.write(condition_bytes(kind, condition) + x_1.astype("<f4").tobytes())
        writer.close()


class PairBatch(Batch):
    """Samples of a model with the noise that they were made from."""

    x_1: PyTree  # float32 (b, h, w, c)
    pair: PyTree  # uint32 (b, 2): the seed and the number from which the noise is drawn

    @classmethod
    def empty(cls, count: int, dataset: ImageDataset, condition: PyTree) -> "PairBatch":
        assert dataset.pair_shape is not None
        return cls(
            condition=condition,
            x_1=np.empty((count, *dataset.pair_shape), np.float32),
            pair=np.empty((count, 2), np.uint32),
        )

    @classmethod
    def select(cls, example: Example, flip: bool) -> Example:
        assert not flip, "pairs cannot be mirrored"
        return {"x_1": example["x_1"], "pair": example["pair"]}

    def to_latents(self, codec: Any, keys: Key[Array, "*b"]) -> Float[Array, "b h w c"]:
        return self.x_1

    def draws(self) -> dict[str, Array]:
        return {"x_0": pair_noise(self.pair, self.x_1.shape[1:])}


class Pairs:
    """Source of pairs: {'x_1': float32 (h, w, c), 'pair': uint32 (2,), seed and number} and a condition."""

    def __init__(self, folder: Path, manifest: PairsManifest):
        self.folder = folder
        self.manifest = manifest
        self.conditions = RecordedConditions(manifest.own_condition, manifest.class_names, str(folder))
        names = [name for name, _ in manifest.shards()]
        self.records = open_records(
            f"--dataset_name=pairs:{folder}", folder, names, manifest.num_pairs, "make_pairs.py"
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        shape = self.manifest.latent_shape
        if len(record) != self.conditions.size + 4 * math.prod(shape):
            raise UserError(f"{self.folder}: record {index} has {len(record)} bytes; make the pairs again")
        x_1 = np.frombuffer(record, "<f4", offset=self.conditions.size).reshape(shape)
        pair = np.array([self.manifest.seed, index], np.uint32)
        return {"x_1": x_1, "pair": pair, **self.conditions.read(record, index)}


def load_pairs(name: str, split: str, options: DataOptions) -> ImageDataset:
    """Returns the split of a folder of pairs; a part is held out. Raises UserError if their noise cannot be drawn."""
    folder = Path(name.partition(":")[2])
    manifest = load_pairs_manifest(folder)
    if manifest is None:
        command = write_command("make_pairs.py", "--load_dir", "RUN", "--out", folder)
        raise UserError(f"--dataset_name={name}: {folder} holds no pairs; make them: {command}")

    # The noise is drawn again: by the same random numbers, or it is other noise.
    theirs = " ".join(manifest.jax_variables) or "none"
    ours = " ".join(changed_variables(RANDOM)) or "none"
    if theirs != ours:
        raise UserError(
            f"--dataset_name={name}: the pairs were made with the environment variables {theirs[:200]}, now there are "
            f"{ours}, by which their noise would be other noise; set them as they were"
        )

    # The data set of the model's samples: by its name, in its classes, never mirrored.
    rows = split_rows(manifest.num_pairs, split)
    return ImageDataset(
        name=manifest.dataset_name,
        split=split,
        source=Subset(Pairs(folder, manifest), rows),
        image_shape=manifest.image_shape,
        class_names=manifest.class_names,
        random_flip=False,
        fingerprint=manifest.fingerprint(split, len(rows)),
        latents=cast(LatentMetadata, manifest) if manifest.vae_sha256 else None,
        pair_shape=manifest.latent_shape,
        empty_classes=manifest.empty_classes,
        batch_type=PairBatch,
        pixels=manifest.pixels,
        own_condition=manifest.own_condition,
    )


def pair_noise(pairs: UInt32[Array, "b 2"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Returns x_0 of each pair (seed, number): the noise of that sample of an ImageGenerator with that seed."""

    def draw(pair: UInt32[Array, " 2"]) -> Array:
        # As ImageGenerator splits its key: pairs hold no noise of their own, so that both must stay the same.
        noise_key, _ = jax.random.split(jax.random.key(pair[0]))
        return jax.random.normal(jax.random.fold_in(noise_key, pair[1]), shape)

    return jax.vmap(draw)(pairs)
