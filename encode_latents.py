"""Encodes a data set once: latents of every image, or their moments, for `train_flow.py --dataset_name latents:DIR`.

    python encode_latents.py --dataset_name imagenet256 --out latents/imagenet256

The same command again continues after the last finished file.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float16, PyTree, UInt8
from ml_collections import ConfigDict

from utils.base import hosts
from utils.base.bars import Bar
from utils.base.commands import write_command
from utils.base.devices import check_batch_memory
from utils.base.files import FolderLock, check_writable, explaining_full_disk, prepare_output_folder, write_json
from utils.base.mesh import batch_sharding, check_batch_size, gather, local_mesh, shard_replicated
from utils.base.messages import UserError, log, progress_bar
from utils.codecs.codec import Codec, MomentCodec, num_cached_arrays
from utils.codecs.codecs import CodecSpec, load_codec, name_for_manifest, parse_codec
from utils.data import latents
from utils.data.batches import epoch_batches
from utils.data.dataset import SPLITS, ImageDataset, PixelBatch
from utils.data.fingerprint import Fingerprint, write_listing
from utils.data.loaders import load_splits
from utils.data.records import describe_kind, each_row
from utils.flags import program, reading
from utils.flags.definitions import (
    define_codec_flags,
    define_data_flags,
    define_flip_flag,
    define_path,
    define_process_flags,
    define_quiet_flag,
)
from utils.flags.help import topic
from utils.images.pixels import UINT8, images_from_uint8


def define_flags() -> None:
    define_data_flags()
    define_flip_flag()
    define_codec_flags()
    with topic("Latents"):
        define_path("out", None, "Folder to write.")
        flags.DEFINE_integer("batch_size", 64, "Images at a time, over all devices of a process.")
        flags.DEFINE_integer("shard_size", 4096, "Images per file.", lower_bound=1)
        define_quiet_flag()
    define_process_flags()


def encode_views(
    codec: Codec, images: UInt8[Array, "b h w 3"], *, num_views: int
) -> Float16[Array, "b views arrays h2 w2 c"]:
    """Returns what is kept of uint8 images and, as a second view, of their mirror images.

    That is one array, the latents, of a deterministic codec; else two, their mean and log-variance.
    """

    def encode(view: Float[Array, "b h w 3"]) -> list[Array]:
        if num_cached_arrays(codec) == 1:
            return [codec.encode(jax.random.key(0), view)]  # the key is not used
        assert isinstance(codec, MomentCodec)
        return list(codec.encode_moments(view))

    # float16 takes half the room on disk.
    views = (images, images[:, :, ::-1])[:num_views]
    encoded = [jnp.stack(encode(images_from_uint8(view)), axis=1) for view in views]
    return jnp.stack(encoded, axis=1).astype(jnp.float16)


def encode_examples(
    dataset: ImageDataset, rows: range, batch_size: int, encode: Callable[[np.ndarray], jax.Array]
) -> Iterator[tuple[PyTree, Float16[np.ndarray, "views arrays h w c"]]]:
    """Yields (condition, latents or moments) of the images `rows`; the devices compute a batch while the last one is
    written."""

    def finish(conditions, moments):
        # The last batch is computed whole: another would compile.
        return zip(each_row(conditions), gather(moments), strict=False)

    # JAX returns before it has computed: a batch is fetched only once the next is under way.
    waiting = None
    for batch in epoch_batches(dataset, batch_size, start=rows.start, stop=rows.stop):
        assert isinstance(batch, PixelBatch)
        images = np.resize(batch.image, (batch_size, *dataset.image_shape))  # the last batch repeats its own
        moments = encode(images)
        if waiting:
            yield from finish(*waiting)
        waiting = (batch.condition, moments)
    if waiting:
        yield from finish(*waiting)


def count_examples(examples: Iterator, bar: Bar) -> Iterator:
    """Yields the examples, and moves the bar by each."""
    for example in examples:
        yield example
        bar.update()


def load_images(config: ConfigDict) -> dict[str, ImageDataset]:
    """Returns {split: data set}. Raises UserError if they hold no images, or would make too many files."""
    reading.check_data_flags(config.dataset_name)
    config.image_mode = config.image_mode or "RGB"  # which is what VAEs take
    options = reading.read_data_options(config)
    datasets = load_splits(config.dataset_name, options)
    # Splits are of one kind: what holds of the training images holds of the others.
    train = datasets["train"]
    if train.latents or train.pair_shape:
        what = "pairs" if train.pair_shape else "latents"
        raise UserError(f"--dataset_name={config.dataset_name} holds {what} already; give a data set of images")
    if train.pixels != UINT8:
        raise UserError(
            f"--dataset_name={config.dataset_name} has images {train.pixels}: latents are kept of uint8 images; train "
            "on the images themselves"
        )

    # Numbers that a folder or the memory could not take.
    for split, dataset in datasets.items():
        count = len(dataset.source)
        latents.check_num_files(count, config.shard_size, f"the {count:,} images of the {split} split")
    check_batch_memory(config.batch_size, train.image_shape)
    return datasets


def load_cached_codec(spec: CodecSpec, mesh: Mesh, image_shape: tuple[int, int, int]) -> Codec:
    """Returns the codec of images (h, w, c). Raises UserError if nothing of it can be cached, as of pixels."""
    codec = load_codec(spec, mesh, image_shape)
    if num_cached_arrays(codec) is None:
        raise UserError(f"--codec={spec} has no moments to cache; train on the images themselves")
    return codec


def describe_latents(
    datasets: dict[str, ImageDataset], codec: Codec, spec: CodecSpec, shard_size: int
) -> latents.LatentsManifest:
    """Returns the manifest of the latents of {split: data set} under a codec, in files of `shard_size` examples."""
    train = datasets["train"]
    return latents.LatentsManifest(
        dataset_name=train.name,
        image_shape=train.image_shape,
        latent_shape=codec.latent_shape(train.image_shape),
        class_names=train.class_names,
        num_examples={split: len(dataset.source) for split, dataset in datasets.items()},
        num_views={split: 1 + dataset.random_flip for split, dataset in datasets.items()},
        shard_size=shard_size,
        vae=name_for_manifest(spec),
        vae_sha256=codec.sha256 or "",  # of the weights: a name may come to mean others
        splits={split: dataset.fingerprint.to_json() for split, dataset in datasets.items()},
        empty_classes=train.empty_classes,
        condition=describe_kind(train.condition),
        num_arrays=num_cached_arrays(codec) or 2,
    )


def prepare_folder(out: Path, manifest: latents.LatentsManifest, fingerprints: dict[str, Fingerprint]) -> None:
    """Writes manifest and listing of the images into a new folder. Raises UserError if it holds other latents."""
    found = latents.load_latents_manifest(out)
    # The manifest last: a folder that has one is complete but for its shards.
    if found is None:
        write_listing(out, fingerprints)
        write_json(out / latents.MANIFEST, manifest.to_json())
    else:
        latents.check_same(out, found, manifest, fingerprints)


def write_latents(
    out: Path,
    manifest: latents.LatentsManifest,
    datasets: dict[str, ImageDataset],
    codec: Codec,
    mesh: Mesh,
    batch_size: int,
) -> None:
    """Writes the files of the manifest that are not finished yet, and returns once all are; several processes share
    them."""
    files = {name: rows for split in SPLITS for name, rows in manifest.shards(split)}
    names = list(files)
    # Files are written whole or not at all, so one that is there needs no second look.
    own = hosts.share_files(out, names)
    # A full disk is reported with the number of files that are finished.
    explaining = explaining_full_disk(lambda: latents.count_finished(out, names))
    total = sum(len(files[name]) for name in own)
    with progress_bar(total=total, desc="encoding", unit="image") as bar, explaining:
        for split, dataset in datasets.items():
            # Compiled once a split, as only training has mirror images.
            views = partial(encode_views, num_views=manifest.num_views[split])
            compiled = jax.jit(views, out_shardings=batch_sharding(mesh))

            def encode(images: np.ndarray, compiled=compiled) -> jax.Array:  # bound to this split's
                return compiled(codec, shard_replicated(images, mesh))

            for name, rows in manifest.shards(split):
                if name in own:
                    examples = encode_examples(dataset, rows, batch_size, encode)
                    latents.write_latents(out / name, count_examples(examples, bar), dataset.condition)
    hosts.barrier()


def main(config: ConfigDict) -> None:
    if config.out is None:
        raise UserError("--out is not given: name the folder to write, such as latents/imagenet256")

    # Refusals that need neither data nor codec.
    out = Path(config.out)
    check_writable(out, "out")
    program.join_processes(config)
    mesh = local_mesh()  # a file has the bytes that one process alone would write
    check_batch_size(config.batch_size, mesh.size)

    # What is encoded, and by what.
    datasets = load_images(config)
    spec = parse_codec(reading.read_codec(config) or "kl")
    codec = load_cached_codec(spec, mesh, datasets["train"].image_shape)
    manifest = describe_latents(datasets, codec, spec, config.shard_size)

    # One command at a time fills a folder; the same command goes on where it stopped.
    if hosts.is_first():
        prepare_output_folder(out, "out")
    with FolderLock(out).held("out") if hosts.is_first() else nullcontext():
        if hosts.is_first():
            prepare_folder(out, manifest, {split: dataset.fingerprint for split, dataset in datasets.items()})
        write_latents(out, manifest, datasets, codec, mesh, config.batch_size)
    words = ["--dataset_name", f"latents:{out}"]
    words += ["--model.num_classes", str(len(manifest.class_names))] if manifest.class_names else []
    log(f"written: {out}; train on it: {write_command('train_flow.py', *words)}")


if __name__ == "__main__":
    program.run_program(define_flags, main)
