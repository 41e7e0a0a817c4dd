"""The table of metrics of samples against a reference. A new metric is one function and one line of METRICS."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from utils.base.bars import within
from utils.base.messages import UserError, log, progress_bar
from utils.base.settings import unknown_name
from utils.metrics.extractors import CLASS_TOKEN, PIXELS, POOL, SPATIAL, FeatureKey, check_extractors
from utils.metrics.pixels import compute_moments, explain_moments
from utils.metrics.reference import FeatureReference, ReferenceStatistics
from utils.metrics.scores import DENSITY_NEIGHBOURS, INCEPTION_SCORE_PART, KID_SUBSET, frechet_distance, kid, mind, prdc
from utils.metrics.statistics import MAX_SAMPLE_ROWS, FeatureStatistics, ImageStatistics
from utils.metrics.statistics_files import array_names, format_shape

# (samples, reference) of the feature that a metric needs -> {result: value}, empty where they do not allow it: a
# FeatureStatistics and a FeatureReference, of PIXELS a PixelStatistics and a PixelReference.
Compute = Callable[[Any, Any], dict[str, float]]
PRDC = ("precision", "recall", "density", "coverage")


def frechet_metric(name: str) -> Compute:
    """Returns a metric's `compute` that calls the Fréchet distance `name`."""
    return lambda samples, reference: {
        name: frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma, reference.root)
    }


def kernel_metric(name: str) -> Compute:
    """Returns a metric's `compute` that calls the kernel distance `name`, with its standard error as NAME_error; no
    error where a set has fewer than four rows."""

    def compute(samples: FeatureStatistics, reference: FeatureReference) -> dict[str, float]:
        if samples.rows is None or reference.rows is None:
            return {}
        mean, error = kid(samples.rows, reference.rows)
        return {name: mean} | ({} if error is None else {f"{name}_error": error})

    return compute


def mind_metric(name: str) -> Compute:
    """Returns a metric's `compute` that calls the MIND `name`, with its standard error as NAME_error."""

    def compute(samples: FeatureStatistics, reference: FeatureReference) -> dict[str, float]:
        if samples.rows is None or reference.rows is None:
            return {}
        distance, error = mind(samples.rows, reference.rows)
        return {name: distance, f"{name}_error": error}

    return compute


def compute_prdc(samples: FeatureStatistics, reference: FeatureReference) -> dict[str, float]:
    """Returns precision, recall, density and coverage where both sides have more rows than neighbours to look at."""
    if samples.rows is None or reference.rows is None:
        return {}
    if min(len(reference.rows), len(samples.rows)) <= DENSITY_NEIGHBOURS:
        return {}
    return prdc(reference.rows, samples.rows)


def compute_prdc_dinov2(samples: FeatureStatistics, reference: FeatureReference) -> dict[str, float]:
    return {f"{name}_dinov2": value for name, value in compute_prdc(samples, reference).items()}


def compute_inception_score(samples: FeatureStatistics, reference: FeatureReference) -> dict[str, float]:
    # It compares nothing with the reference; without --inception_logits there are no class probabilities.
    if samples.logits is None:
        return {}
    mean, std = samples.inception_score.mean_and_std
    return {"inception_score": mean, "inception_score_std": std}


# Caveats: results of few samples are computed all the same, and say what they are worth.
def explain_few(name: str, num_features: int, num_samples: int) -> str | None:
    if num_samples >= num_features:
        return None
    return f"{name}: {num_samples} samples are fewer than the {num_features} features, it comes out far too high"


def explain_neighbours(num_samples: int, reference: FeatureReference) -> str | None:
    # These metrics depend on both numbers: balls shrink as sets grow.
    num_reference = 0 if reference.rows is None else len(reference.rows)
    if not num_reference or min(num_samples, num_reference) >= MAX_SAMPLE_ROWS:
        return None
    return (
        f"precision, recall, density and coverage: of {min(num_samples, MAX_SAMPLE_ROWS)} samples and "
        f"{num_reference} images, comparable with the same numbers alone"
    )


def explain_kernel(name: str, num_samples: int, reference: FeatureReference) -> str | None:
    if reference.rows is None or min(num_samples, len(reference.rows)) >= KID_SUBSET:
        return None
    return f"{name}: {num_samples} samples and {len(reference.rows)} images are few: unbiased, but uncertain"


class Metric(NamedTuple):
    """A metric of one feature of one extractor, which `needs` names.

    `compute` is given that feature's statistics of the samples and of the reference; it returns {} where they do not
    allow it. `columns` are {result: title in tables}, all of them better where they are lower, unless
    `is_higher_better`. `explain(num_samples, reference)` returns a caveat about so few samples, or None. `name` is that
    of --metrics, by default that of the first result; `format` that of its numbers. `needs_rows`: of single images.
    """

    compute: Compute
    columns: Mapping[str, str]
    needs: FeatureKey = POOL
    explain: Callable[[int, Any], str | None] = lambda num_samples, reference: None
    name: str | None = None
    format: str = ".3f"
    is_higher_better: bool = False
    needs_rows: bool = False

    def __str__(self) -> str:
        return self.name or next(iter(self.columns))


# Of each, results are computed where both sides have what it `needs`; errors and deviations have no columns.
METRICS = [  # in the order of the tables' columns
    Metric(
        frechet_metric("fid"),
        {"fid": "FID"},
        explain=lambda num_samples, reference: explain_few("FID", reference.mu.size, num_samples),
    ),
    Metric(  # Nash et al., arXiv:2103.03841
        frechet_metric("sfid"),
        {"sfid": "sFID"},
        SPATIAL,
        lambda num_samples, reference: explain_few("sFID", reference.mu.size, num_samples),
    ),
    Metric(kernel_metric("kid"), {"kid": "KID"}, explain=partial(explain_kernel, "KID"), needs_rows=True),
    Metric(mind_metric("mind"), {"mind": "MIND"}, needs_rows=True),
    Metric(
        compute_prdc,
        {name: name for name in PRDC},
        explain=explain_neighbours,
        name="prdc",
        is_higher_better=True,
        needs_rows=True,
    ),
    Metric(compute_inception_score, {"inception_score": "IS"}, is_higher_better=True),
    Metric(  # Stein et al., arXiv:2306.04675
        frechet_metric("fd_dinov2"),
        {"fd_dinov2": "FD-DINOv2"},
        CLASS_TOKEN,
        lambda num_samples, reference: explain_few("FD-DINOv2", reference.mu.size, num_samples),
    ),
    Metric(
        kernel_metric("kd_dinov2"),
        {"kd_dinov2": "KD-DINOv2"},
        CLASS_TOKEN,
        partial(explain_kernel, "KD-DINOv2"),
        needs_rows=True,
    ),
    Metric(mind_metric("mind_dinov2"), {"mind_dinov2": "MIND (DINOv2)"}, CLASS_TOKEN, needs_rows=True),
    Metric(
        compute_prdc_dinov2,
        {f"{name}_dinov2": f"{name} (DINOv2)" for name in PRDC},
        CLASS_TOKEN,
        explain_neighbours,
        name="prdc_dinov2",
        is_higher_better=True,
        needs_rows=True,
    ),
    Metric(
        compute_moments,
        {
            "mean_error": "mean error (data's unit)",
            "std_error": "std error (data's unit)",
            "spectrum_error": "spectrum error (%)",
            "spectrum_worst": "worst radius (%)",
        },
        PIXELS,
        explain_moments,
        name="moments",
        format=".3g",
    ),
]


def choose_metrics(names: Sequence[str] | None, extractors: Sequence[str] = ()) -> tuple[Metric, ...]:
    """Returns the metrics of these names, in the order of the table; of None, all of `extractors`.

    Raises UserError for an unknown name and for an empty list.
    """
    if names is None:
        return tuple(metric for metric in METRICS if metric.needs.extractor in extractors)
    # A name may be a list itself, as in a sweep's settings.
    text = ",".join(names)
    known = [str(metric) for metric in METRICS]
    for name in text.split(","):
        if name not in known:
            which = "" if name == text else f": {name or 'an empty name'}"
            raise unknown_name(f"--metrics={text}{which}", name, known)
    return tuple(metric for metric in METRICS if str(metric) in text.split(","))


def training_metrics(names: Sequence[str], extractors: Sequence[str]) -> tuple[Metric, ...]:
    """Returns the metrics that a training logs: those of `names`, or the first, the distance, of each of `extractors`.

    Raises UserError for an unknown name.
    """
    if not extractors:
        return choose_metrics(names)
    firsts = [next((m for m in METRICS if m.needs.extractor == name), None) for name in check_extractors(extractors)]
    return tuple(metric for metric in firsts if metric is not None)


def needed_extractors(metrics: Sequence[Metric]) -> tuple[str, ...]:
    """Returns the names of the feature networks that these metrics need; of pixels there is none."""
    return tuple(dict.fromkeys(metric.needs.extractor for metric in metrics if metric.needs != PIXELS))


def sees_pixels(metrics: Sequence[Metric]) -> bool:
    """Returns whether one of the metrics needs the images themselves, of any shape and format."""
    return any(metric.needs == PIXELS for metric in metrics)


def why_no_picture(metric: Metric, image_shape: Sequence[int], dtype: str) -> str | None:
    """Returns why a metric cannot be computed of such images, or None: feature networks take pictures alone."""
    if metric.needs == PIXELS or (dtype == "uint8" and image_shape[-1] in (1, 3)):
        return None
    return f"feature networks take uint8 images of 1 or 3 channels, not {dtype} with {image_shape[-1]}"


def why_no_moments(
    metric: Metric, reference: ReferenceStatistics, image_shape: Sequence[int], dtype: str
) -> str | None:
    """Returns why a metric of pixels cannot be computed against a reference, or None."""
    if metric.needs != PIXELS:
        return None
    # Statistics, then images that they can be of.
    pixels = reference.pixels
    if pixels is None:
        command = "compute_fid_stats.py --metrics moments"
        return f"--fid_stats={reference.path} holds no moments of pixels; make them by {command}"
    shapes = [format_shape(pixels.mean.shape), format_shape(image_shape)]
    if shapes[0] != shapes[1]:
        return f"--fid_stats={reference.path} is of {shapes[0]} images, the samples are {shapes[1]}"
    if (pixels.dtype == "uint8") != (dtype == "uint8"):
        return f"--fid_stats={reference.path} is of {pixels.dtype} images, the samples are {dtype}, of another unit"
    return None


def why_no_features(metric: Metric, reference: ReferenceStatistics, has_logits: bool = False) -> str | None:
    """Returns why a metric of features cannot be computed against a reference, or None."""
    if metric.needs == PIXELS:
        return None
    if metric.columns.keys() == {"inception_score"} and not has_logits:
        return "it needs class probabilities, by --inception_logits of eval_fid.py"
    names = array_names(metric.needs)
    lacks = f"--fid_stats={reference.path} holds no"
    found = reference.by_feature.get(metric.needs)
    if found is None:
        return f"{lacks} `{names.mu}` and `{names.sigma}`, which compute_fid_stats.py keeps"
    if metric.needs_rows and found.rows is None:
        return f"{lacks} `{names.rows}` of single images, which compute_fid_stats.py keeps"
    return None


def leave_out(metrics: Sequence[Metric], why_not: Callable[[Metric], str | None]) -> tuple[Metric, ...]:
    """Returns the metrics that can be computed; a line says of the others why not. Raises UserError where all are left
    out. `why_not(metric)` is that reason, or None."""
    reasons = {str(metric): why_not(metric) for metric in metrics}
    kept = tuple(metric for metric in metrics if reasons[str(metric)] is None)
    left_out: dict[str, list[str]] = {}  # metrics by reason: a line for each
    for name, reason in reasons.items():
        if reason is not None:
            left_out.setdefault(reason, []).append(name)
    if not kept and left_out:
        raise UserError(f"--metrics={','.join(reasons)}: {'; '.join(left_out)}")
    for reason, names in left_out.items():
        log(f"note: without {', '.join(names)}: {reason}")
    return kept


def metric_formats() -> dict[str, str]:
    """Returns {result: format of its number} of all metrics."""
    return {name: metric.format for metric in METRICS for name in metric.columns}


def metric_columns() -> dict[str, str]:
    """Returns {result: title in tables} of all metrics."""
    return {name: title for metric in METRICS for name, title in metric.columns.items()}


def caveats(
    num_samples: int, reference: ReferenceStatistics, has_logits: bool, metrics: Sequence[Metric] | None = None
) -> list[str]:
    """Returns what a reader has to know about `metrics`, by default all, of so few samples, a line each; empty where
    there are enough."""
    # A metric that the reference does not allow needs no caveat.
    metrics = [metric for metric in METRICS if metric.needs != PIXELS] if metrics is None else metrics
    found = [metric.explain(num_samples, reference[metric.needs]) for metric in metrics if metric.needs in reference]
    if has_logits and num_samples < INCEPTION_SCORE_PART:
        found.append(f"Inception Score: it grows with the number of samples, up to {INCEPTION_SCORE_PART}")
    return list(dict.fromkeys(text for text in found if text))  # one may hold of several extractors


def compute_metrics(
    samples: ImageStatistics, reference: ReferenceStatistics, metrics: Sequence[Metric] | None = None
) -> dict[str, float]:
    """Returns {name: value} of every one of `metrics`, by default all, that the two allow."""
    # sFID, for one, is missing where a file holds the moments of `pool` alone.
    results: dict[str, float] = {}
    possible = [
        metric
        for metric in (METRICS if metrics is None else metrics)
        if metric.needs in samples and metric.needs in reference
    ]
    # Those of many rows take minutes: their own bars are parts of this one.
    with progress_bar(total=len(possible), desc="distances", unit="metric", delay=2) as bar:
        for metric in possible:
            with within(bar, str(metric)):
                results |= metric.compute(samples[metric.needs], reference[metric.needs])
            bar.update()
    return results
