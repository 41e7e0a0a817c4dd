"""Makes pairs of noise and sample from a trained model, for reflow and distillation.

    python make_pairs.py --load_dir runs/digits --num_pairs 5000 --cfg_scale 2 --denoise_timesteps 64 --out pairs/digits
    python train_flow.py --load_dir runs/digits --dataset_name pairs:pairs/digits --wandb.name reflow

The same command again continues after the last finished file.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import PyTree
from ml_collections import ConfigDict

from utils.base import hosts
from utils.base.bars import Bar
from utils.base.commands import write_command
from utils.base.devices import RANDOM, changed_variables, explaining_out_of_memory
from utils.base.files import FolderLock, check_writable, explaining_full_disk, prepare_output_folder, write_json
from utils.base.mesh import check_batch_size, gather, local_mesh, shard_replicated
from utils.base.messages import UserError, log, progress_bar
from utils.codecs.codec import pixel_format
from utils.conditions.condition import check_draw_mode, restore_condition
from utils.data import pairs
from utils.data.latents import check_num_files, count_finished
from utils.data.records import describe_kind, each_row
from utils.flags import program, reading
from utils.flags.definitions import (
    define_codec_flags,
    define_params_flag,
    define_path,
    define_process_flags,
    define_quiet_flag,
    define_sampler_flags,
)
from utils.flags.help import topic
from utils.networks.models import ImageModel
from utils.runs.opening import load_generator, open_checkpoint
from utils.sampling.generator import RECIPE_BATCH_SIZE, ImageGenerator, hash_params
from utils.sampling.solvers import SOLVERS, SamplerConfig


def define_flags() -> None:
    with topic("Pairs"):
        define_path("load_dir", None, "Run, or exported folder or file, whose model makes the pairs.")
        define_path("out", None, "Folder to write.")
        flags.DEFINE_integer("num_pairs", 50_000, "Pairs.", 100, 10**9)
        flags.DEFINE_integer("seed", 0, "Pair i depends on this and on i alone.")
        flags.DEFINE_enum(
            "labels", "balanced", ["uniform", "balanced"], "How labels are drawn; other conditions always uniform."
        )
        flags.DEFINE_integer("shard_size", 4096, "Pairs per file.", lower_bound=1)
        flags.DEFINE_integer("batch_size", RECIPE_BATCH_SIZE, "Pairs at a time, over all devices of a process.")
        define_params_flag()
        flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Compute dtype; default: the run's.")
        define_codec_flags()
        define_quiet_flag()
    define_sampler_flags(cfg_scale="1", denoise_timesteps="100")
    define_process_flags()


def make_examples(
    generator: ImageGenerator, sampler: SamplerConfig, rows: range, batch_size: int, bar: Bar
) -> Iterator[tuple[PyTree, np.ndarray]]:
    """Yields (condition, x_1) of the pairs `rows`; x_1, the latent that was drawn, is float32 (h, w, c)."""
    for start in range(rows.start, rows.stop, batch_size):
        # The last batch is computed whole: another shape would compile. Noise and conditions follow from the numbers.
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        conditions = generator.conditions(indices)
        noise = shard_replicated(gather(generator.noise(indices)), generator.model.mesh)  # each device has its rows
        latents = gather(generator.sample_latents(noise, conditions, sampler))
        for condition, x_1 in zip(each_row(conditions), latents[: rows.stop - start], strict=False):
            yield condition, np.asarray(x_1, np.float32)
            bar.update()


def check_requests(config: ConfigDict) -> None:
    """Raises UserError for missing flags, and for outputs that cannot be written, before a run is loaded."""
    for name, what in {"load_dir": "a run", "out": "the pairs"}.items():
        if config[name] is None:
            raise UserError(f"--{name} is not given: name the folder of {what}")
    check_writable(Path(config.out), "out")
    check_num_files(config.num_pairs, config.shard_size, f"--num_pairs={config.num_pairs}")


def read_sampler(config: ConfigDict, model: ImageModel) -> SamplerConfig:
    """Returns the one sampler of the pairs. Raises UserError for several, and for one that draws noise on the way."""
    network = model.network.config
    # A pair is made once: one scale, one number of steps.
    sampler, *others = reading.read_samplers(
        config, network.class_dropout_prob, model.objective, model.latent_shape[-1], network.inner_head
    )
    if others:
        raise UserError("--denoise_timesteps and the scales of guidance: give one of each")
    # Solvers that are not in the table choose their steps, and are ODE solvers as Euler is.
    if SOLVERS.get(sampler.solver, SOLVERS["euler"]).is_stochastic:
        raise UserError(
            f"--solver={sampler.solver} draws noise on the way, so that a sample has no one noise; use euler"
        )
    return sampler


def describe_pairs(config: ConfigDict, generator: ImageGenerator, sampler: SamplerConfig) -> pairs.PairsManifest:
    """Returns the manifest of the pairs that a generator makes."""
    model = generator.model
    codec = model.codec
    # Whatever decides the samples: the same command continues only if all of it is the same.
    return pairs.PairsManifest(
        dataset_name=f"pairs of {config.load_dir}",
        params_sha256=hash_params(generator.params),  # of the weights: the run may train on
        sampler=f"{sampler}{describe_guide(generator, sampler)}, {generator.label_mode} labels",
        seed=config.seed,
        num_pairs=config.num_pairs,
        shard_size=config.shard_size,
        image_shape=model.image_shape,
        latent_shape=model.latent_shape,
        class_names=generator.class_names,
        vae=getattr(codec, "source", None) if codec.sha256 else None,  # None: a codec without weights
        vae_sha256=codec.sha256,
        empty_classes=getattr(model.condition, "empty_classes", ()),
        jax_variables=tuple(changed_variables(RANDOM)),  # the noise is drawn again under these
        pixels=pixel_format(codec),
        condition=describe_kind(model.condition),
    )


def describe_guide(generator: ImageGenerator, sampler: SamplerConfig) -> str:
    """Returns which model guides a sampler, by its parameters; nothing where there is none."""
    if generator.guide is None or not sampler.is_model_guided:
        return ""
    return f" by {hash_params(generator.guide.params):.12}"


def prepare_folder(out: Path, manifest: pairs.PairsManifest) -> None:
    """Writes the manifest into a new folder. Raises UserError if it holds other pairs."""
    found = pairs.load_pairs_manifest(out)
    if found is None:
        write_json(out / pairs.MANIFEST, manifest.to_json())
    elif found != manifest:
        raise UserError(f"--out={out} holds pairs of another model or sampler ({found.sampler}); choose another folder")


def write_pairs(
    out: Path, manifest: pairs.PairsManifest, generator: ImageGenerator, sampler: SamplerConfig, batch_size: int
) -> None:
    """Writes the files of the manifest that are not finished yet, `batch_size` pairs at a time, and returns once all
    are; several processes share them."""
    shards = manifest.shards()
    names = [name for name, _ in shards]
    # Files are written whole or not at all, so one that is there needs no second look.
    own = hosts.share_files(out, names)
    with (
        progress_bar(total=sum(len(rows) for name, rows in shards if name in own), desc="drawing", unit="pair") as bar,
        explaining_out_of_memory("sampling", "a smaller --batch_size"),
        explaining_full_disk(lambda: count_finished(out, names)),
    ):
        # A file at a time, in order: what a stop leaves behind is a whole number of files.
        for name, rows in shards:
            if name in own:
                examples = make_examples(generator, sampler, rows, batch_size, bar)
                pairs.write_pairs(out / name, examples, generator.condition)
    hosts.barrier()


def main(config: ConfigDict) -> None:
    check_requests(config)
    program.join_processes(config)
    out = Path(config.out)

    # How conditions are drawn. That, first: no parameters are read for a refusal.
    checkpoints, steps = open_checkpoint(config.load_dir, reading.read_codec(config))
    _, saved = checkpoints.restore_newest(checkpoints.restore_config, steps)
    condition = restore_condition(saved["dataset"])
    if not reading.is_explicit("labels") and config.labels not in condition.DRAW_MODES:
        config.labels = condition.DRAW_MODES[0]
    check_draw_mode(condition, config.labels)

    # The run; with its codec, without which no image could be made of the pairs.
    generator = load_generator(
        config.load_dir,
        params=config.params,
        seed=config.seed,
        label_mode=config.labels,
        dtype=config.dtype,
        codec=reading.read_codec(config),
        mesh=local_mesh(),  # a file has the bytes that one process alone would write
        needs_images=True,
        guide=config.guide,
        guide_params=config.guide_params,
    )

    # The sampler has to suit the model, and the batch its devices.
    check_batch_size(config.batch_size, generator.model.mesh.size)
    sampler = read_sampler(config, generator.model)
    manifest = describe_pairs(config, generator, sampler)

    # One command at a time fills the folder.
    if hosts.is_first():
        prepare_output_folder(out, "out")
    with FolderLock(out).held("out") if hosts.is_first() else nullcontext():
        if hosts.is_first():
            prepare_folder(out, manifest)
        write_pairs(out, manifest, generator, sampler, config.batch_size)
    words = ["--load_dir", config.load_dir, "--dataset_name", f"pairs:{out}"]
    log(f"written: {out}; train on it: {write_command('train_flow.py', *words)}")


if __name__ == "__main__":
    program.run_program(define_flags, main)
