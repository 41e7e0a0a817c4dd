"""Samples from a run's averaged parameters and scores them: prints a table, writes fid.json and a sample grid.

python eval_fid.py --load_dir runs/demo --denoise_timesteps 64 --cfg_scale 2 --num_samples 1000
"""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from utils import config as cfg
from utils import evaluation, inception, plotting
from utils.checkpoint import open_checkpoint
from utils.errors import UserError
from utils.fid import FeatureStatistics, ReferenceStatistics, frechet_distance, load_statistics
from utils.sampling import Sampler
from utils.sharding import abstract, make_mesh, replicated
from utils.tracking import write_json

GRID_IMAGES = 64


def define_flags() -> None:
    flags.DEFINE_string("load_dir", None, "Folder of a run, or RUN/checkpoints/STEP for one of its checkpoints.")
    flags.DEFINE_string("dataset_name", None, "Data set whose shipped statistics are used; default: the run's.")
    flags.DEFINE_string("fid_stats", None, "Reference statistics, as compute_fid_stats.py writes them.")
    flags.DEFINE_string("out", None, "Folder of fid.json and samples.png; default: --load_dir's run.")
    flags.DEFINE_string("save_samples", None, "Also write samples: .npz, arr_0 uint8 NHWC, arr_1 labels.")
    flags.DEFINE_float("cfg_scale", 4.0, "Guidance scale; -1: no guidance.")
    flags.DEFINE_integer("use_cfg", 1, "0 turns guidance off.", 0, 1)
    flags.DEFINE_integer("denoise_timesteps", 500, "Euler steps.", lower_bound=1)
    flags.DEFINE_integer("num_samples", 50_000, "Samples, exactly.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 128, "Samples made at a time, over all devices.")
    flags.DEFINE_integer("seed", 0, "Sample i depends on this and on i alone.")
    flags.DEFINE_enum("convention", None, list(inception.CONVENTIONS), "Of --fid_stats, where the file does not say.")
    flags.DEFINE_string("inception_weights", None, "Local copy of the Inception weights.")
    cfg.define_vae_flag()
    cfg.define_model_flags()
    flags.adopt_module_key_flags(cfg)  # so that --help lists them


def find_statistics(config: ConfigDict, dataset_name: str) -> ReferenceStatistics:
    """The statistics of --fid_stats, or those that ship for the data set; UserError where there are none."""
    path = config.fid_stats or Path(__file__).parent / "data" / f"fid_stats_{dataset_name}.npz"
    if config.fid_stats is None and not path.exists():
        raise UserError(
            f"--fid_stats is not given and no statistics ship for {dataset_name}; make them: "
            f"python compute_fid_stats.py --dataset_name {dataset_name} --out stats.npz"
        )
    return load_statistics(path)


class Evaluation:
    """What is set up before the first sample. Wrong input ends here, uncompiled."""

    def __init__(self, config: ConfigDict):
        if config.load_dir is None:
            raise UserError("--load_dir is not given: name the folder of a run, such as runs/demo")
        checkpoints, self.step = open_checkpoint(config.load_dir)
        saved = checkpoints.restore_config(self.step)
        mesh = make_mesh()
        cfg.check_batch_size(config.batch_size, mesh.size)
        data = saved["dataset"]
        self.reference = find_statistics(config, config.dataset_name or data["name"])
        self.weights = inception.inception_weights_path(config.inception_weights)
        self.out = Path(config.out or checkpoints.folder.parent)
        cfg.check_writable(self.out, "out")
        if config.save_samples:
            cfg.check_writable(Path(config.save_samples).parent, "save_samples")
        model = cfg.override_model(saved["model"])
        vae, sha256 = config.vae or data["vae"], data["vae_sha256"]
        codec = evaluation.load_codec(model.use_stable_vae, vae, mesh, data["image_shape"], sha256)
        self.context = evaluation.make_context(model, codec, mesh, data["image_shape"], data["class_names"])
        shapes = jax.eval_shape(partial(evaluation.init_params, self.context), jax.random.key(0))
        (self.params,) = checkpoints.restore_params(self.step, abstract(shapes, replicated(mesh)), ("ema_params",))
        self.convention = evaluation.find_convention(self.reference, config.convention)
        self.extractor = inception.load_feature_extractor(self.weights, self.convention, replicated(mesh))


def main(config: ConfigDict) -> None:
    run = Evaluation(config)
    cfg_scale = cfg.guidance_scale(config.cfg_scale) if config.use_cfg else None
    sizes = {"num_samples": config.num_samples, "batch_size": config.batch_size, "seed": config.seed}
    sampler = Sampler(config.denoise_timesteps, cfg_scale)
    num_kept = config.num_samples if config.save_samples else GRID_IMAGES
    statistics, kept = FeatureStatistics(), []
    with tqdm(total=config.num_samples, unit="image") as bar:
        for images, labels in evaluation.generate_images(run.context, run.params, sampler, **sizes):
            features = evaluation.extract_features(run.extractor, images, config.batch_size, run.context.mesh)
            if statistics.num_samples < num_kept:
                kept.append((images, labels))
            statistics.update(features)
            bar.update(len(images))
    images, labels = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    reference = run.reference
    result = {
        "fid": frechet_distance(statistics.mu, statistics.sigma, reference.mu, reference.sigma),
        "num_steps": config.denoise_timesteps,
        "cfg_scale": cfg_scale,
        "num_samples": statistics.num_samples,
        "seed": config.seed,
        "checkpoint": str(config.load_dir),
        "checkpoint_step": run.step,
        "fid_stats": str(reference.path),
        "fid_stats_sha256": reference.sha256,
        "convention": run.convention,
        "inception_sha256": inception.INCEPTION_SHA256,
    }
    title = f"{sampler}, checkpoint of step {run.step}"
    grid = plotting.sample_grid(images[:GRID_IMAGES], labels[:GRID_IMAGES], run.context.class_names, title)
    grid.savefig(run.out / "samples.png")
    if config.save_samples:
        np.savez(config.save_samples, arr_0=images, arr_1=labels)
    write_json(run.out / "fid.json", result)
    print("| checkpoint step | Euler steps | guidance | samples | FID |\n|---:|---:|---:|---:|---:|")
    scale = "none" if cfg_scale is None else f"{cfg_scale:g}"
    print(f"| {run.step} | {config.denoise_timesteps} | {scale} | {statistics.num_samples} | {result['fid']:.3f} |")
    print(f"written: {run.out / 'fid.json'}, {run.out / 'samples.png'}")


if __name__ == "__main__":
    cfg.run_program(define_flags, main)
