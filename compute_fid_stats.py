"""Makes reference statistics for FID: Inception features of a data set, exactly as eval_fid.py takes those of samples.

python compute_fid_stats.py --dataset_name digits --out data/fid_stats_digits.npz --compact 1
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from utils import checks, cli
from utils.console import configure_output, log
from utils.data.batches import epoch_batches
from utils.data.dataset import Batch
from utils.data.registry import load_dataset
from utils.errors import UserError
from utils.help import topic
from utils.metrics.inception import CONVENTIONS, INCEPTION_SHA256, load_feature_extractor
from utils.metrics.measure import measure_images, pad_and_shard
from utils.metrics.reference import MAX_FEATURES, save_statistics
from utils.metrics.samples import open_samples
from utils.metrics.statistics import ImageStatistics
from utils.sharding import make_mesh, replicated


def define_flags() -> None:
    cli.define_data_flags()
    with topic("Data"):
        cli.define_path("images", None, "Instead of a data set: npz (arr_0) or folder of images, as they are.")
        flags.DEFINE_enum("split", "train", ["train", "validation"], "Split that is the reference.")
    with topic("Statistics"):
        cli.define_path("out", None, "The .npz to write.")
        flags.DEFINE_integer(
            "num_features", 10_000, "Images whose features are kept, for KID, precision...", 0, MAX_FEATURES
        )
        flags.DEFINE_integer(
            "compact", 0, "1: no covariance where all features are kept; smaller, and for this suite alone.", 0, 1
        )
        flags.DEFINE_enum("convention", "adm", list(CONVENTIONS), "Resize and scaling before Inception.")
        cli.define_path("inception_weights", None, "Local copy of the Inception weights.")
        flags.DEFINE_integer("batch_size", 128, "Images at a time, over all devices.")
        flags.DEFINE_bool("quiet", False, "Errors alone.")


def main(config: ConfigDict) -> None:
    configure_output(is_apart=True, is_quiet=config.quiet)
    if config.out is None:
        raise UserError("--out is not given: name the file to write, such as stats.npz")
    out = Path(config.out)
    if out.is_dir():
        raise UserError(f"--out={out} is a folder; name the file to write, such as {out / 'stats.npz'}")
    if config.images:
        data_flags = ("dataset_name", "split", "data_dir", "image_size", "broken_images", "max_megapixels")
        cli.refuse_ignored(data_flags, "with --images, which are taken as they are")
    checks.check_writable(out.parent, "out")
    mesh = make_mesh()
    checks.check_batch_size(config.batch_size, mesh.size)
    samples = open_samples(config.images, "images") if config.images else None
    if samples is None:
        dataset = load_dataset(config.dataset_name, config.split, cli.read_data_options(config))
        if dataset.latents:
            raise UserError(f"--dataset_name={config.dataset_name} holds no images; give the data set it was made from")
    checks.check_batch_memory(config.batch_size, (299, 299, 3), copies=40)  # of float32, and the first layers' outputs
    extractor = load_feature_extractor(config.inception_weights, config.convention, replicated(mesh))
    statistics, label_counts = ImageStatistics(config.num_features), None
    if samples:
        batches, total, source, split = samples.read(config.batch_size), samples.num_samples, config.images, None
        shape = samples.image_shape
    else:
        label_counts = np.zeros(dataset.num_classes, np.int64)
        batches = count_labels(epoch_batches(dataset, config.batch_size), label_counts)
        total, source, split = len(dataset.source), dataset.name, config.split
        shape = dataset.image_shape
    measure_images(extractor, pad_and_shard(batches, config.batch_size, mesh), statistics, total)
    save_statistics(
        out,
        statistics,
        convention=config.convention,
        dataset=source,
        split=split,
        image_shape=shape,
        label_counts=label_counts,
        inception_sha256=INCEPTION_SHA256,
        is_compact=bool(config.compact),
    )
    log(f"written: {out} ({statistics.num_samples} images of {source}{f', {split}' * bool(split)})")


def count_labels(batches: Iterable[Batch], label_counts: np.ndarray) -> Iterator[np.ndarray]:
    """The images of the batches, whose labels are added to `label_counts` on the way."""
    for batch in batches:
        label_counts += np.bincount(batch["label"], minlength=len(label_counts))
        yield batch["image"]


if __name__ == "__main__":
    cli.run_program(define_flags, main)
