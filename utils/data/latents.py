"""Cached latents: those of every image of a data set, or their posterior moments, computed once and stored in
ArrayRecord files.

DIR/manifest.json says what they are made from; DIR/SPLIT-00000-of-00010.array_record hold them in the order of the data
set. A record is a condition (utils/data/records.py), then float16 arrays (views, arrays, h, w, c), little-endian;
views: the image and, where training flips, its mirror image; arrays: the latents alone, of a deterministic codec, or
mean and log-variance.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Array, Float, Float16, Key, PyTree

from utils.base.commands import write_command
from utils.base.external import read_json
from utils.base.files import atomic_write, check_regular
from utils.base.messages import UserError, log
from utils.conditions.condition import Condition
from utils.data.dataset import Batch, DataOptions, Example, ImageDataset
from utils.data.fingerprint import Fingerprint, compare_data, read_listing
from utils.data.records import RecordedConditions, condition_bytes, restore_kind

MANIFEST = "manifest.json"
FORMAT = 1
MAX_FILES = 10**6  # of a split, or of pairs: a manifest with more is taken for damaged


@dataclasses.dataclass(frozen=True)
class LatentsManifest:
    """Contents of a folder of latents; every machine that makes it from the same data and VAE writes the same."""

    dataset_name: str
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    # How many there are, in which files.
    num_examples: dict[str, int]  # by split
    num_views: dict[str, int]  # 2 where mirror images are stored
    shard_size: int  # examples a file
    # Identity of the VAE is its weights; where they came from is for messages alone.
    vae: str  # hub id or folder it was loaded from
    vae_sha256: str
    format: int = FORMAT
    splits: dict[str, dict[str, Any]] | None = None  # {split: fingerprint of its images}; older latents have none
    empty_classes: tuple[int, ...] = ()  # labels without training images; older latents do not say
    condition: dict[str, Any] | None = None  # the kind of the conditions, where they are no classes
    num_arrays: int = 2  # of a view: mean and log-variance; 1: the latents of a deterministic codec

    @property
    def own_condition(self) -> Condition | None:
        return restore_kind(self.condition)

    def check(self) -> None:
        """Raises ValueError for a value of the wrong type, or beyond the sizes that latents can have."""

        def is_count(value, lowest, highest):
            return type(value) is int and lowest <= value <= highest

        # Sizes: a damaged one would ask for any amount of memory.
        shapes = {"image_shape": self.image_shape, "latent_shape": self.latent_shape}
        for name, shape in shapes.items():
            if len(shape) != 3 or not all(is_count(size, 1, 2**14) for size in shape):
                raise ValueError(f"{name} {_short(shape)}")
        if not is_count(self.num_arrays, 1, 2):
            raise ValueError(f"num_arrays {_short(self.num_arrays)}")
        for name, counts, highest in (("num_examples", self.num_examples, 2**40), ("num_views", self.num_views, 2)):
            if not isinstance(counts, dict) or counts.keys() != {"train", "validation"}:
                raise ValueError(f"{name} {_short(counts)}")
            if not all(is_count(count, 1, highest) for count in counts.values()):
                raise ValueError(f"{name} {_short(counts)}")
        if not is_count(self.shard_size, 1, 2**40) or max(self.num_examples.values()) > MAX_FILES * self.shard_size:
            raise ValueError(f"shard_size {_short(self.shard_size)}")

        # Names, and labels of the classes that they name.
        texts = (*self.class_names, self.dataset_name, self.vae, self.vae_sha256)
        if not (self.class_names or self.own_condition) or not all(isinstance(text, str) for text in texts):
            raise ValueError("names that are not strings")
        if not all(is_count(label, 0, len(self.class_names) - 1) for label in self.empty_classes):
            raise ValueError(f"empty_classes {_short(self.empty_classes)}")

    def shards(self, split: str) -> list[tuple[str, range]]:
        """Returns (file name, numbers of its examples) for every file of a split."""
        total = self.num_examples[split]
        starts = range(0, total, self.shard_size)
        return [
            (
                f"{split}-{i:05d}-of-{len(starts):05d}.array_record",
                range(start, min(start + self.shard_size, total)),
            )
            for i, start in enumerate(starts)
        ]

    def to_json(self) -> dict[str, Any]:
        content = json.loads(json.dumps(dataclasses.asdict(self)))
        # Moments are as they were before there was anything else.
        if self.num_arrays == 2:
            del content["num_arrays"]
        return content

    def fingerprint(self, folder: Path, split: str) -> Fingerprint:
        """Returns what the latents in `folder` were made from, and how."""
        # Not the whole manifest: where the VAE came from, or the size of files, changes no latent.
        metadata = [(self.splits or {}).get(split), self.vae_sha256, self.num_views[split], self.latent_shape]
        sha256 = hashlib.sha256(json.dumps(metadata).encode()).hexdigest()
        return Fingerprint(
            "latents", self.num_examples[split], sha256, read_listing(folder, self.num_examples).get(split)
        )


def load_latents_manifest(folder: Path) -> LatentsManifest | None:
    """Returns the manifest of a folder of latents; None if it has none. Raises UserError if it cannot be understood."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        # JSON's lists as tuples; older manifests have no empty classes.
        content = read_json(path)
        for name in ("image_shape", "latent_shape", "class_names"):
            content[name] = tuple(content[name])
        content["empty_classes"] = tuple(content.get("empty_classes", ()))
        manifest = LatentsManifest(**content)
        manifest.check()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a valid latents manifest ({error}); make them again with encode_latents.py"
        ) from None
    if manifest.format != FORMAT:
        raise UserError(f"{path}: latents of format {manifest.format}, not {FORMAT}; make them again")
    return manifest


def check_same(
    folder: Path, found: LatentsManifest, requested: LatentsManifest, fingerprints: Mapping[str, Fingerprint]
) -> None:
    """Raises UserError if the latents in `folder` are not those requested.

    A VAE is identified by its weights, images by their `fingerprints`, {split: fingerprint}. Older latents do not say
    which images they are of; that is logged.
    """
    # The VAE's weights and the sizes. What is left out is compared with the images below, or follows from them.
    for field in dataclasses.fields(LatentsManifest):
        old = getattr(found, field.name)
        new = getattr(requested, field.name)
        if field.name not in ("vae", "dataset_name", "splits", "empty_classes") and old != new:
            raise UserError(
                f"--out={folder} holds latents with {field.name} {_short(old)}, not {_short(new)}; use another folder"
            )

    # The images, by their fingerprints: even a harmless difference leaves latents of other images.
    if found.splits is None:
        log(f"{folder} does not say which images its latents are of: whether they have changed is not known")
        return
    try:
        remarks = compare_data(
            found.to_json(), read_listing(folder, found.num_examples), requested.to_json(), fingerprints
        )
        if remarks:
            raise UserError(remarks[0])
    except UserError as difference:
        raise UserError(f"--out={folder} holds latents of other images ({difference}); choose another folder") from None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_latents(
    path: Path,
    examples: Iterable[tuple[PyTree, Float16[np.ndarray, "views arrays h w c"]]],
    kind: Condition | None = None,
) -> None:
    """Writes a file of (condition, moments) records, complete or not at all; without `kind`, conditions are labels."""
    with atomic_write(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")  # noise does not compress
        for condition, moments in examples:
            writer.write(condition_bytes(kind, condition) + moments.astype("<f2").tobytes())
        writer.close()


def check_num_files(num_records: int, shard_size: int, what: str) -> None:
    """Raises UserError, naming the records `what`, if so many would make more files than a manifest may name."""
    if num_records > MAX_FILES * shard_size:
        num_files = -(-num_records // shard_size)
        lowest = -(-num_records // MAX_FILES)
        raise UserError(
            f"--shard_size={shard_size}: {what} would be {num_files:,} files, of which there may be {MAX_FILES:,}; use "
            f"{lowest} or more"
        )


def count_finished(folder: Path, names: Sequence[str]) -> str:
    """Returns in words how many of these files are finished."""
    count = sum((folder / name).exists() for name in names)
    return f"{count} of {len(names)} files are finished, and kept"


def open_records(what: str, folder: Path, names: list[str], num_records: int, program: str) -> ArrayRecordDataSource:
    """Returns the records in the files `names`, which `program` makes.

    Raises UserError, which begins with `what`, if files are missing, cannot be read, or hold another number of records.
    """
    # A listing of the files says more than the library would.
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"{what} is not complete: {len(missing)} of its {len(names)} files are missing, such as {missing[0]}; run "
            f"the same {program} command again to finish it"
        )
    try:
        for name in names:
            check_regular(folder / name)
    except OSError as error:
        raise UserError(f"{what} cannot be read ({name}: {error.strerror}); bring the file back") from None

    # Their records.
    try:
        records = ArrayRecordDataSource([str(folder / name) for name in names])
    except Exception as error:  # of the library, which has no type of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what} cannot be read ({reason}); make it again with {program}") from None
    if len(records) != num_records:
        raise UserError(
            f"{what} holds {len(records)} records, but its manifest says {num_records}; make it again with {program}"
        )
    return records


class LatentBatch(Batch):
    """Latents of images, or their posterior moments, from which each epoch draws anew."""

    moments: PyTree  # float16 (b, 2, h, w, c): mean and log-variance; (b, 1, h, w, c): the latents

    @classmethod
    def empty(cls, count: int, dataset: ImageDataset, condition: PyTree) -> "LatentBatch":
        assert isinstance(dataset.latents, LatentsManifest)
        moments = np.empty((count, dataset.latents.num_arrays, *dataset.latents.latent_shape), np.float16)
        return cls(condition=condition, moments=moments)

    @classmethod
    def select(cls, example: Example, flip: bool) -> Example:
        return {"moments": example["moments"][int(flip)]}

    def to_latents(self, codec: Any, keys: Key[Array, "*b"]) -> Float[Array, "b h w c"]:
        """Returns the latents, drawn from their posterior if they have one, by the same keys as for the images."""
        if self.moments.shape[1] == 1:
            return jnp.asarray(self.moments[:, 0], jnp.float32)
        return codec.sample_latents(keys, self.moments[:, 0], self.moments[:, 1])


class LatentRecords:
    """Source of cached latents: example i is {'moments': float16 (views, arrays, h, w, c)} and a condition."""

    def __init__(self, folder: Path, manifest: LatentsManifest, split: str):
        self.shape = (manifest.num_views[split], manifest.num_arrays, *manifest.latent_shape)
        self.conditions = RecordedConditions(manifest.own_condition, manifest.class_names, str(folder))
        self.folder = folder
        names = [name for name, _ in manifest.shards(split)]
        what = f"--dataset_name=latents:{folder}"
        self.records = open_records(what, folder, names, manifest.num_examples[split], "encode_latents.py")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        if len(record) != self.conditions.size + 2 * math.prod(self.shape):
            raise UserError(f"{self.folder}: record {index} has {len(record)} bytes; make the latents again")
        # A view of the record, not a copy: batches copy it once, into their own memory.
        moments = np.frombuffer(record, "<f2", offset=self.conditions.size).reshape(self.shape)
        return {"moments": moments, **self.conditions.read(record, index)}


def load_latents(name: str, split: str, options: DataOptions) -> ImageDataset:
    """Returns the split of a folder of cached latents; they can be mirrored if the folder holds mirror images too."""
    folder = Path(name.partition(":")[2])
    manifest = load_latents_manifest(folder)
    if manifest is None:
        command = write_command("encode_latents.py", "--dataset_name", "imagenet256", "--out", folder)
        raise UserError(f"--dataset_name={name}: {folder} holds no cached latents; make them: {command}")

    # Mirror images are stored, not computed: the latents of a mirrored image are no mirrored latents.
    source = LatentRecords(folder, manifest, split)
    flips = split == "train" and manifest.num_views[split] == 2
    return ImageDataset(
        # Under the name of the images: a run on latents is a run on that data set.
        name=manifest.dataset_name,
        split=split,
        source=source,
        image_shape=manifest.image_shape,
        class_names=manifest.class_names,
        random_flip=flips,
        fingerprint=manifest.fingerprint(folder, split),
        latents=manifest,
        empty_classes=manifest.empty_classes if split == "train" else (),
        own_condition=manifest.own_condition,
        batch_type=LatentBatch,
    )
