"""Makes reference statistics for FID: Inception features of a data set, exactly as eval_fid.py takes those of samples.

python compute_fid_stats.py --dataset_name digits --out data/fid_stats_digits.npz
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from utils import config as cfg
from utils import evaluation, inception
from utils.datasets import epoch_batches, load_dataset
from utils.errors import UserError
from utils.fid import FeatureStatistics, save_statistics
from utils.sharding import make_mesh, replicated


def define_flags() -> None:
    cfg.define_data_flags()
    flags.DEFINE_enum("split", "train", ["train", "validation"], "Split that is the reference.")
    flags.DEFINE_string("out", None, "The .npz to write.")
    flags.DEFINE_integer("batch_size", 128, "Images at a time, over all devices.")
    flags.DEFINE_enum("convention", "adm", list(inception.CONVENTIONS), "Resize and scaling before Inception.")
    flags.DEFINE_string("inception_weights", None, "Local copy of the Inception weights.")


def main(config: ConfigDict) -> None:
    if config.out is None:
        raise UserError("--out is not given: name the file to write, such as stats.npz")
    out = Path(config.out)
    cfg.check_writable(out.parent, "out")
    mesh = make_mesh()
    cfg.check_batch_size(config.batch_size, mesh.size)
    options = (config.data_dir, config.image_size, config.broken_images)
    dataset = load_dataset(config.dataset_name, config.split, *options)
    if dataset.latents:
        raise UserError(f"--dataset_name={config.dataset_name} holds no images; give the data set it was made from")
    extractor = inception.load_feature_extractor(config.inception_weights, config.convention, replicated(mesh))
    statistics = FeatureStatistics()
    with tqdm(total=len(dataset.source), unit="image") as bar:
        for batch in epoch_batches(dataset, config.batch_size):
            statistics.update(evaluation.extract_features(extractor, batch["image"], config.batch_size, mesh))
            bar.update(len(batch["image"]))
    save_statistics(
        out,
        statistics,
        convention=config.convention,
        dataset=dataset.name,
        split=config.split,
        inception_sha256=inception.INCEPTION_SHA256,
    )
    print(f"written: {out} ({statistics.num_samples} images of {dataset.name}, {config.split})")


if __name__ == "__main__":
    cfg.run_program(define_flags, main)
