"""Which setting of a training has no effect beside which others: checked before anything compiles."""

from collections.abc import Mapping
from typing import Any

from utils.base.effects import Rule, check_effects, refuse_ignored
from utils.base.settings import settings_of
from utils.data.loaders import check_data_settings, find_loader
from utils.metrics.extractors import DEFAULT_EXTRACTOR, ExtractorOptions, takes_options
from utils.metrics.metrics import needed_extractors, training_metrics
from utils.runs.checkpoint import has_checkpoints
from utils.runs.config import OBJECTIVE_NAME, RunConfig, network_settings, objective_settings
from utils.trackers.trackers import check_trackers
from utils.training.start import read_started_from


def _is_derived(dataset_name: str) -> bool:
    loader = find_loader(dataset_name)
    return loader is not None and loader.is_derived


def _extractors(values: Any) -> tuple[str, ...]:
    return needed_extractors(training_metrics(values.metrics, values.extractor))


# From what is given alone, before a run of --load_dir is opened.
PLAN_RULES = (
    Rule(
        ("load_dir", "freeze", "lora_rank"),
        "with --plan, which is of a whole network from scratch",
        lambda v: v.plan,
    ),
    Rule(("profile",), "with --plan, which trains nothing", lambda v: v.plan),
)

# From the whole configuration, with defaults and the settings of the run of --load_dir. The facts `is_new` and
# `is_started` say whether the run's folder has no checkpoint yet, and whether its parameters are those of another run.
RULES = (
    Rule(
        ("metrics", "extractor", *ExtractorOptions._fields, "fid_samples", "convention", "inception_weights"),
        "without --fid_stats",
        lambda v: not v.fid_stats,
    ),
    Rule(("metrics",), "beside --extractor, whose distances are logged", lambda v: v.extractor),
    Rule(
        ("convention", "inception_weights"),
        "with --metrics of which none needs Inception",
        lambda v: DEFAULT_EXTRACTOR not in _extractors(v),
    ),
    Rule(ExtractorOptions._fields, "without dinov2 among the features", lambda v: not takes_options(_extractors(v))),
    Rule(("fid_stats",), "with --eval_interval=0: FID is part of an evaluation", lambda v: not v.eval_interval),
    Rule(("keep_best",), "with --eval_interval=0: evaluations bring the scores", lambda v: not v.eval_interval),
    Rule(("eval_memorisation",), "with --eval_interval=0: it is part of an evaluation", lambda v: not v.eval_interval),
    Rule(
        ("eval_memorisation",),
        "with --dataset_name={dataset_name}, which holds no images",
        lambda v: _is_derived(v.dataset_name),
    ),
    Rule(("preview",), "with --eval_interval=0: panels are part of an evaluation", lambda v: not v.eval_interval),
    Rule(("num_shards",), "with --sharding={sharding}, only with hybrid", lambda v: v.sharding != "hybrid"),
    Rule(
        ("objective.t_mean", "objective.t_std"),
        "with --model.t_sampler=uniform, only with logit_normal",
        lambda v: v.model["t_sampler"] == "uniform",
    ),
    Rule(
        ("objective.t_mean", "objective.t_std"),
        "with --objective.distill=1, which trains at t = 0 alone",
        lambda v: v.objective.get("distill"),
    ),
    Rule(("augment_prob",), "without --augment", lambda v: not v.augment),
    Rule(
        ("model.inner_weight", "model.inner_scale"),
        "with --model.inner_head=0",
        lambda v: not v.model.get("inner_head"),
    ),
    Rule(
        ("coupling_rows", "coupling_weight"),
        "with --coupling={coupling}, only with minibatch",
        lambda v: v.coupling != "minibatch",
    ),
    Rule(
        ("coupling_draws",),
        "with --coupling={coupling}, only with semidiscrete",
        lambda v: v.coupling != "semidiscrete",
    ),
    Rule(("ema_snapshots",), "without --ema_profiles", lambda v: not v.ema_profiles),
    Rule(("lr_schedule",), "with --max_steps=0, which trains nothing", lambda v: v.max_steps == 0),
    Rule(("freeze", "lora_rank"), "without --load_dir", lambda v: not v.is_started),
    Rule(
        # Only of new runs: those of earlier versions may have been started so.
        ("ema_warmup",),
        "with --model.target_update_rate=1, which is no EMA",
        lambda v: v.is_new and v.model["target_update_rate"] == 1,
    ),
)


def check_run_effects(config: RunConfig, given: Mapping[str, Any]) -> None:
    """Raises UserError for a setting among `given`, {name: value}, that has no effect on the run."""
    # Facts that no setting tells, but the folder of the run.
    is_new = not has_checkpoints(config.folder)
    is_started = bool(config.start.load_dir or read_started_from(config.folder))
    check_effects(RULES, {**config.to_json(), "is_new": is_new, "is_started": is_started}, given)
    check_trackers(config.to_json(), given)
    check_data_settings(config.data.dataset_name, given)
    if not is_new:  # a run of an earlier version goes on as it began
        return

    # Settings of another objective or network than the run has: every name is known, of whichever it is.
    # {setting: (chosen name, its configuration, settings of all that can be chosen, prefix of their names)}.
    choices = {
        OBJECTIVE_NAME: (config.objective_name, config.objective, objective_settings(), "objective"),
        "model.network": (config.model.network, config.model, network_settings(), "model"),
    }
    for setting, (name, chosen, known, group) in choices.items():
        others = known.keys() - settings_of(type(chosen), group).keys()
        refuse_ignored(sorted(others), given, f"with --{setting}={name}")
