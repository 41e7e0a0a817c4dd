"""Scores samples: of a run, for all step counts and guidance scales requested, or of a file.

    python eval_fid.py --load_dir runs/demo --denoise_timesteps 64,16,4 --cfg_scale 1,2 --num_samples 1000
    python eval_fid.py --samples samples.npz --fid_stats stats.npz

Prints a table, and writes fid.json, fid.csv, an image of samples for every row and a plot. Rows of the same settings
that fid.json has are not computed again, so that the same command continues after a kill; everything that enters a
number is among its settings.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from utils.base.files import check_writable
from utils.base.messages import UserError, configure_output, log
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import check_draw_mode, restore_condition
from utils.flags import program, reading
from utils.flags.definitions import (
    define_codec_flags,
    define_extractor_flags,
    define_metrics_flag,
    define_path,
    define_process_flags,
    define_quiet_flag,
    define_sampler_flags,
    define_saved_model_flags,
    define_tracker_flags,
)
from utils.flags.effects import RULES, check_effects
from utils.flags.help import topic
from utils.images.pixels import PixelFormat, check_pictures
from utils.images.samples import Samples, open_samples
from utils.metrics.extractors import ExtractorOptions, check_extractors
from utils.metrics.inception import CONVENTIONS
from utils.metrics.metrics import choose_metrics, sees_pixels
from utils.networks.posthoc_ema import parse_params
from utils.objectives.objectives import make_objective
from utils.runs.evaluations import evaluate_run, evaluate_samples
from utils.runs.opening import choose_steps, open_checkpoint, split_load_dir
from utils.runs.results import check_json_path
from utils.runs.run_evaluation import RunEvaluation, Snapshot
from utils.runs.scoring import FILES
from utils.storage.staging import local_copy
from utils.training.advice import shipped_statistics, write_statistics_command


def define_flags() -> None:
    # Samples of a run, or images that are there already.
    with topic("What is scored"):
        define_path("load_dir", None, "Folder of a run, RUN/checkpoints/STEP, or an exported folder or file.")
        define_path(
            "samples",
            None,
            "Instead of a run: npz, .npy (uint8 NHWC; any for --metrics moments) or folder of images.",
        )
        flags.DEFINE_integer(
            "num_samples", 50_000, "Samples, exactly; of --samples the first, default all.", lower_bound=2
        )
        flags.DEFINE_string(
            "checkpoints", None, "Of --load_dir, which: all, last:5, or steps such as 1000,2000; default: the newest."
        )
        flags.DEFINE_list(
            "params",
            ["ema"],
            "ema: the EMA of the parameters; raw: the parameters themselves; ema:0.08: an EMA of that relative width, "
            "for a run with --ema_profiles; or several, separated by commas.",
        )
        flags.DEFINE_integer("seed", 0, "Sample i depends on this and on i alone.")
        flags.DEFINE_enum(
            "labels",
            "uniform",
            list(ClassCondition.DRAW_MODES),
            "How labels are drawn; dataset: as often as in --fid_stats.",
        )
        flags.DEFINE_integer(
            "batch_size", None, "Samples at a time, over all devices; default: what fits, 128 on CPUs."
        )
    # What they are compared with, and by which features.
    with topic("Reference"):
        define_path("fid_stats", None, "Reference: statistics, as compute_fid_stats.py writes them, or images.")
        flags.DEFINE_string("dataset_name", None, "Data set whose shipped statistics are used; default: the run's.")
        define_extractor_flags()
        define_metrics_flag("Scores")
        flags.DEFINE_enum(
            "convention", None, list(CONVENTIONS), "Inception preprocessing, if --fid_stats does not record it."
        )
        define_path("inception_weights", None, "Local copy of the Inception weights.")
        define_path("inception_logits", None, "npz or safetensors with `fc.weight`, for the Inception Score.")
    define_memorisation_flags()
    # Results, and what is kept of the samples.
    with topic("Output"):
        define_path("out", None, "Output folder; default: that of --load_dir's run, or next to --samples.")
        define_path(
            "save_samples", None, "Also write samples: X.npz with conditions, as npz:X.npz reads it, else PNGs."
        )
        define_path("json", None, "Write the rows as JSON here; - is the standard output, instead of the table.")
        define_quiet_flag()
    define_sampler_flags(cfg_scale="4", denoise_timesteps="500", takes_several=True)  # a row for each of both
    with topic("Sampling"):
        flags.DEFINE_integer("use_cfg", 1, "0 turns guidance off.", 0, 1)
    define_codec_flags()
    define_saved_model_flags()
    define_tracker_flags(name="eval")
    define_process_flags()


def define_memorisation_flags() -> None:
    with topic("Memorisation"):
        flags.DEFINE_bool("memorisation", False, "Also say how many samples copy training images.")
        define_path(
            "train_images",
            None,
            "Data set, npz, .npy or folder that may have been copied; default: the run's training split.",
        )
        flags.DEFINE_string(
            "memorisation_features", None, "pixels, or one of --extractor; default: pixels below 64 pixels a side."
        )


def needs_no_statistics(config: ConfigDict) -> bool:
    """Returns whether the flags ask for --memorisation, and for nothing that compares with statistics."""
    named = [config.fid_stats, config.metrics, config.dataset_name]
    return config.memorisation and all(value is None for value in named)


def find_statistics(config: ConfigDict, dataset_name: str | None, saved: dict[str, Any] | None = None) -> Path | None:
    """Returns the file of --fid_stats, or the one that ships for the data set; None where --memorisation is all.

    Raises UserError if there is none, with the command that makes it from the images of the run, whose configuration
    is `saved`.
    """
    if config.fid_stats is not None:
        return local_copy(config.fid_stats, "fid_stats")
    if needs_no_statistics(config) and (dataset_name is None or shipped_statistics(dataset_name) is None):
        log("note: memorisation alone: other scores need --fid_stats")
        return None
    if dataset_name is None:
        raise UserError("--fid_stats is not given: name the statistics or images with which --samples are compared")
    # Those that ship hold no moments of pixels.
    has_pixels = sees_pixels(choose_metrics(config.metrics))
    path = None if has_pixels else shipped_statistics(dataset_name)
    if path is None:
        assert saved is not None
        # The command is for the data set that was asked for, read as the run reads its own.
        saved = saved | {"dataset": saved["dataset"] | {"name": dataset_name}}
        words = []
        for name in ("extractor", "metrics", "convention", "inception_weights", *ExtractorOptions._fields):
            if reading.is_explicit(name):
                words += [f"--{name}", ",".join(config[name]) if name in ("extractor", "metrics") else config[name]]
        raise UserError(
            f"--fid_stats is not given and no statistics {'of pixels ' * has_pixels}ship for {dataset_name}; "
            f"make them: {write_statistics_command(saved, Path('stats.npz'), *words)}"
        )
    return path


def open_run(config: ConfigDict) -> RunEvaluation:
    """Returns the evaluation that the flags ask for, of the newest checkpoint with an intact configuration, or of those
    of --checkpoints."""
    # The configuration alone: flags are checked against it before the parameters are read.
    checkpoints, steps = open_checkpoint(config.load_dir, reading.read_codec(config))
    if config.checkpoints:
        if split_load_dir(config.load_dir)[1] is not None:
            raise UserError(
                f"--checkpoints={config.checkpoints} has no effect beside --load_dir={config.load_dir}, which is one "
                "checkpoint; give the folder of the run"
            )
        steps = choose_steps(config.checkpoints, steps)[::-1]
    newest, saved = checkpoints.restore_newest(checkpoints.restore_config, steps)
    data = saved["dataset"]
    if not (sees_pixels(choose_metrics(config.metrics, config.extractor)) or needs_no_statistics(config)):
        check_pictures(
            PixelFormat.from_record(data),
            data["image_shape"],
            f"--load_dir={config.load_dir}: feature networks take",
            "--metrics moments takes any",
        )
    check_draw_mode(restore_condition(data), config.labels)

    # Flags against the run's own settings.
    dropout = saved["model"]["class_dropout_prob"]
    channels = (data["latent_shape"] or [None])[-1]  # older runs did not save it
    inner_head = saved["model"].get("inner_head", 0)
    samplers = reading.read_samplers(config, dropout, make_objective(saved), channels, inner_head)
    model = reading.override_model(saved["model"])
    reading.refuse_other_objective(saved["objective"])
    config.codec = reading.read_codec(config)

    # Statistics, and the checkpoints: should the newest be damaged, an older one is scored, unless steps are named.
    reference = find_statistics(config, config.dataset_name or data["name"], saved)
    is_optional = config.checkpoints == "all" or (config.checkpoints or "").startswith("last")
    groups = [[step] for step in steps[::-1]] if config.checkpoints else [steps[steps.index(newest) :]]
    snapshots = [Snapshot(group, params, is_optional) for group in groups for params in config.params]
    return RunEvaluation(config, reference, checkpoints, snapshots, saved, model, samplers)


def open_own_samples(config: ConfigDict) -> Samples:
    """Returns the samples of --samples, or the first --num_samples. Raises UserError if it holds fewer."""
    is_any = sees_pixels(choose_metrics(config.metrics)) or needs_no_statistics(config)
    samples = open_samples(config.samples, is_any=is_any)
    # The default of 50,000 is for runs: of a file, all are scored.
    if not reading.is_explicit("num_samples"):
        return samples
    if config.num_samples > samples.num_samples:
        raise UserError(f"--num_samples={config.num_samples}: --samples={config.samples} holds {samples.num_samples}")
    return samples.first(config.num_samples)


def read_params(words: Sequence[str]) -> list[str]:
    """Returns the values of --params in their one spelling. Raises UserError for an unknown one, and for one that is
    given twice."""
    given = f"--params={','.join(words)}"
    try:
        params = [parse_params(word) for word in words]
    except ValueError as error:
        raise UserError(f"{given}: {error}") from None
    if not params or len(set(params)) < len(params):
        raise UserError(f"{given}: give ema, raw or ema:WIDTH, each once")
    return params


def main(config: ConfigDict) -> None:
    configure_output(is_apart=True)
    if bool(config.load_dir) == bool(config.samples):
        raise UserError(
            "give one of --load_dir (the folder of a run, such as runs/demo) and --samples (images to score)"
        )

    # Features, flags and outputs, before anything is opened.
    check_extractors(config.extractor)
    choose_metrics(config.metrics)
    config.params = read_params(config.params)
    check_effects(RULES["eval_fid"], config)
    program.join_processes(config)
    if config.out:
        check_writable(Path(config.out), "out", names=FILES)
    check_json_path(config.json, {"samples": config.samples, "fid_stats": config.fid_stats})
    if config.load_dir:
        evaluate_run(open_run(config))
    else:
        samples = open_own_samples(config)
        evaluate_samples(config, samples, find_statistics(config, None))


if __name__ == "__main__":
    program.run_program(define_flags, main)
