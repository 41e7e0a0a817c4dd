"""From evaluations to their rows: computed or found again, in fid.json, fid.csv, a table and figures."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from utils.base.devices import explaining_out_of_memory
from utils.base.hosts import broadcast, is_first
from utils.base.messages import log
from utils.images.pixels import ImageBatch
from utils.images.samples import Samples, content_sha256
from utils.runs.results import (
    Results,
    plot_by_ema,
    plot_by_step,
    plot_fid,
    row_width,
    sampler_settings,
    score_columns,
    write_csv,
)
from utils.runs.run_evaluation import RunEvaluation
from utils.runs.scoring import Scoring
from utils.sampling.solvers import SamplerConfig
from utils.trackers.trackers import Trackers, choose_trackers


def evaluate_run(run: RunEvaluation) -> None:
    """Scores every sampler with each of a run's snapshots, in turn, and writes and prints the rows. Of several
    processes, which share the sampling, the first keeps the rows."""
    config = run.config
    results = Results(run.out) if is_first() else None
    trackers = None
    if choose_trackers(config.to_dict()):
        # -1: no line of an earlier evaluation is kept, as finished rows are logged again below.
        axis = "checkpoint_step" if run.has_several_steps else "num_steps"
        trackers = Trackers(run.out / "evaluation", config.to_dict(), first_step=-1, axis=axis)

    # A row for every sampler: the one that an earlier evaluation has finished, or a new one.
    rows: list[dict[str, Any]] = []
    for number, sampler in enumerate(run.each_row()):
        row = score_sampler(run, sampler, results)
        rows.append(row)
        if trackers:
            scores = {f"{key}/{run.curve_name(sampler)}": row[key] for key in score_columns() if key in row}
            steps = {"num_steps": row["num_steps"] or row["nfe"]}
            if run.has_several_steps:
                steps["checkpoint_step"] = run.step
            trackers.log(number, scores | steps)
        if broadcast(run.failure is not None):
            break  # the others would be lost as well
    if results is None:
        return

    # Files, and the table at last.
    with run.going_on():
        write_csv(run.out / "fid.csv", results.rows)
    if len(rows) > 1:
        figures = {"by_step": plot_by_step} if run.has_several_steps else {"fid": plot_fid}
        if len({row_width(row) for row in rows} - {None}) > 1:
            figures["by_ema"] = plot_by_ema
        for name, draw in figures.items():
            figure = draw(rows)
            run.save_figure(figure, f"{name}.png")
            if trackers:
                trackers.log_figure(len(rows), name, figure)
    if trackers:
        trackers.log_table("scores", rows)
        trackers.close()
    steps = dict.fromkeys(str(row["checkpoint_step"]) for row in rows)
    of_params = "" if config.params == ["ema"] else f", {' and '.join(config.params)} parameters"
    where = f"step{'s' * (len(steps) > 1)} {', '.join(steps)} of {config.load_dir}{of_params}"
    against = "" if run.reference is None else f", against {run.reference.path}"
    log(f"{where}, labels {config.labels}{against}")
    with run.going_on():
        run.show_rows(rows)
    run.finish()
    log(run.describe_files())


def score_sampler(run: RunEvaluation, sampler: SamplerConfig, results: Results | None) -> dict[str, Any]:
    """Returns the row of a sampler: a finished one of the same settings, or a new one, which is added to `results`.
    With --save_samples it is always a new one."""
    settings = {**sampler_settings(sampler), **run.settings}
    if sampler.is_model_guided:
        settings |= run.guide_settings
    row = None
    if results is not None and not run.config.save_samples:  # a finished row has no images
        row = results.find(settings)
    if (row := broadcast(row)) is not None:
        return row
    with explaining_out_of_memory("sampling", "a smaller --batch_size"):
        metrics = run.evaluate(sampler)
    if results is not None:
        with run.going_on():
            results.add(settings, metrics)
    return {**settings, **metrics}


def evaluate_samples(config: ConfigDict, samples: Samples, reference: Path | None) -> None:
    """Scores the samples of --samples, and writes and prints their row."""
    path = Path(config.samples)
    # A folder of its own: others' files may lie beside the samples.
    default_out = path.with_name(f"{path.stem if path.is_file() else path.name}_fid")
    scoring = Scoring(config, reference, samples.image_shape, samples.num_samples, default_out, samples.dtype)
    settings = {
        "samples": str(config.samples),
        "samples_sha256": content_sha256(path),  # wherever the file is
        "num_samples": samples.num_samples,
        **scoring.settings,
    }
    results = Results(scoring.out) if is_first() else None
    statistics = scoring.new_statistics()
    images = scoring.new_images(samples.num_samples, samples.image_shape, samples.dtype)

    def collect(batch: ImageBatch) -> None:
        if images is not None and not images.is_full:
            images.add(batch.rows(batch.images))

    with explaining_out_of_memory("Inception", "a smaller --batch_size"):
        scoring.measure_samples(samples, statistics, "scoring", "num_samples", collect)
    metrics = scoring.compute(statistics, images, "memorised.png")
    if results is None:
        return
    with scoring.going_on():
        results.add(settings, metrics)
        write_csv(scoring.out / "fid.csv", results.rows)
    with scoring.going_on():  # the table comes though a file fails
        scoring.show_rows([{**settings, **metrics}])
    scoring.finish()
    log(scoring.describe_files())
