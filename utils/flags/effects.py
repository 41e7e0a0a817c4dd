"""Which flag has no effect beside which other settings: one table, read before anything compiles."""

from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from utils.base import effects
from utils.base.effects import Rule
from utils.flags.conditions import GIVING
from utils.flags.reading import explicit_values
from utils.metrics.extractors import ExtractorOptions, check_extractors, takes_options
from utils.metrics.metrics import choose_metrics, needed_extractors

# Flags about a published checkpoint.
OF_IMPORT = ("family", "num_heads", "class_names", "vae")


# Flags of guidance other than classifier-free.
OTHER_GUIDANCE = (
    *("cfg_zero_star", "cfg_zero_steps", "inner_scale", "inner_interval"),
    *("guide", "guide_params", "guide_scale", "guide_interval"),
)


def _has_options(given: Any) -> bool:
    metrics = given.metrics
    return takes_options(needed_extractors(choose_metrics(metrics)) if metrics else check_extractors(given.extractor))


_METRICS = (
    Rule(("extractor",), "beside --metrics, which say what they need", lambda given: given.metrics),
    Rule(ExtractorOptions._fields, "without dinov2 among the features", lambda given: not _has_options(given)),
    Rule(
        ("convention", "inception_weights", "inception_logits"),
        "without inception in --extractor",
        lambda given: not given.metrics and "inception" not in given.extractor,
    ),
    Rule(
        ("convention", "inception_weights"),
        "with --metrics of which none needs Inception",
        lambda given: given.metrics and "inception" not in needed_extractors(choose_metrics(given.metrics)),
    ),
    Rule(
        ("inception_logits",),
        "without inception_score in --metrics",
        lambda given: given.metrics and "inception_score" not in given.metrics,
    ),
)
_LABELS = Rule(
    ("labels",),
    "where conditions are given",
    lambda given: any(getattr(given, name, None) is not None for name in GIVING),
)
_FILM = Rule(("film_format", "film_seconds", "film_title"), "without --film", lambda given: not given.film)


# {program: its rules}, in the order in which they are looked at. Those of a training are in utils/training/effects.py:
# they hold from Python, too.
RULES: dict[str, tuple[Rule, ...]] = {
    # Images of a file need no model. What was trained cannot be changed, and the sampler has flags of its own.
    "eval_fid": (
        Rule(
            (
                *("cfg_scale", "cfg_interval", "cfg_channels", "use_cfg", "denoise_timesteps", "time_grid", "solver"),
                *OTHER_GUIDANCE,
                *("rtol", "atol", "labels", "params", "seed", "save_samples", "checkpoints"),
                *("codec", "vae", "dataset_name", "use_stable_vae"),
                *("model.*", "objective.*"),
            ),
            "on --samples, which are scored as they are",
            lambda given: given.samples,
        ),
        Rule(
            ("model.preset", "model.lr", "model.beta1", "model.beta2", "model.target_update_rate"),
            "in an evaluation",
            lambda given: True,
        ),
        Rule(("model.cfg_scale",), "here, where --cfg_scale says it", lambda given: True),
        Rule(("model.denoise_timesteps",), "here, where --denoise_timesteps says it", lambda given: True),
        Rule(("dataset_name",), "beside --fid_stats", lambda given: given.fid_stats),
        Rule(
            ("train_images", "memorisation_features"),
            "without --memorisation",
            lambda given: not given.memorisation,
        ),
        *_METRICS,
    ),
    # --images takes the place of a data set, and of all that says how one is read.
    "compute_fid_stats": (
        Rule(
            (
                *("dataset_name", "split", "data_dir", "image_size", "image_mode", "condition_columns", "text_encoder"),
                *("broken_images", "max_megapixels", "check_images"),
            ),
            "with --images, which are taken as they are",
            lambda given: given.images,
        ),
        Rule(
            ("num_features", "compact"),
            "with --metrics of pixels alone",
            lambda given: given.metrics and not needed_extractors(choose_metrics(given.metrics)),
        ),
        *_METRICS,
    ),
    "sample": (
        _LABELS,
        _FILM,
        Rule(("film_frames",), "without --film", lambda given: not given.film),
    ),
    # --interpolate draws samples of its own; --invert and --inpaint take images.
    "edit": (
        _LABELS,
        Rule(("between", "film"), "without --interpolate", lambda given: given.interpolate is None),
        _FILM,
        Rule(
            ("save_samples",),
            "with --interpolate, which draws rows of images alone",
            lambda given: given.interpolate is not None,
        ),
        Rule(("edit",), "without --invert", lambda given: given.invert is None),
        Rule(
            ("cfg_scale", "cfg_interval", "cfg_channels", *OTHER_GUIDANCE, "save_samples"),
            "with --invert but without --edit: it is without guidance",
            lambda given: given.invert is not None and given.edit is None,
        ),
        Rule(("seed",), "with --invert, which draws no noise", lambda given: given.invert is not None),
        Rule(("labels",), "on images of your own; --classes names theirs", lambda given: given.interpolate is None),
        Rule(
            ("batch_size",),
            "on images of your own, which are one batch; --num_samples limits them",
            lambda given: given.interpolate is None,
        ),
        Rule(
            ("cfg_zero_steps",),
            "with --inpaint, which takes every step",
            lambda given: given.inpaint is not None,
        ),
        Rule(("mask", "inpaint_repeats"), "without --inpaint", lambda given: given.inpaint is None),
    ),
    # One solver has tolerances, the other a number of steps.
    "likelihood": (
        Rule(
            ("rtol", "atol"),
            "with --solver=midpoint, which takes --denoise_timesteps",
            lambda given: given.solver == "midpoint",
        ),
        Rule(
            ("denoise_timesteps",),
            "with --solver={solver}, which chooses its steps",
            lambda given: given.solver != "midpoint",
        ),
    ),
    "plot_metrics": (
        Rule(("smooth", "log_y", "x", "dpi"), "on a table, which has the values", lambda given: given.table),
        Rule(("dpi",), "on {out}, which has no pixels", lambda given: not given.out.lower().endswith(".png")),
    ),
    "report": (
        Rule(("watch_seconds",), "without --watch", lambda given: not given.watch),
        Rule(("watch", "image_megabytes"), "with --film, which writes no page", lambda given: given.film),
        Rule(("film_seconds", "scale"), "without --film", lambda given: not given.film),
    ),
    # A file that is imported has its own architecture; a run that is exported is complete.
    "convert_checkpoint": (
        Rule(("model.*", "objective.*"), "here: a checkpoint has its own", lambda given: True),
        Rule(("params", "push", "private", "picture", "license"), "with --source", lambda given: given.source),
        Rule(
            ("picture", "license"),
            "where --out={out} is a file; a folder has a model card",
            lambda given: str(given.out).endswith(".safetensors"),
        ),
        Rule(OF_IMPORT, "with --load_dir", lambda given: given.load_dir),
        Rule(("private",), "without --push", lambda given: not given.push),
    ),
    # Once it is known whether the source is a file that was exported here.
    "convert_checkpoint.source": (
        Rule(OF_IMPORT, "on {source}, which says it itself", lambda given: given.is_exported),
    ),
}


def check_effects(rules: Iterable[Rule], config: Mapping[str, Any] | ConfigDict, **facts: Any) -> None:
    """Raises UserError for a flag that the user gave although it has no effect.

    `facts` are what a program knows beside its flags, such as is_latent=True; rules read them as `values.is_latent`.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    effects.check_effects(rules, {**values, **facts}, explicit_values())
