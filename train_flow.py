"""Trains a flow-matching DiT: flags -> configuration -> one loop that steps, logs, evaluates and saves.

    python train_flow.py --dataset_name digits --use_stable_vae 0 --model.patch_size 2 --model.num_classes 10

The same command again continues a run from its newest checkpoint. README.md has the flags and the recipes.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
import optax
from absl import flags
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion_transformer import REMAT_POLICIES
from utils import config as cfg
from utils import evaluation, inception
from utils.checkpoint import Checkpoints, DamagedCheckpointError, Saver, open_checkpoint
from utils.console import TolerantStream, say
from utils.datasets import SPLITS, describe_data, first_examples, load_dataset, training_batches
from utils.errors import DataError, UserError
from utils.fid import ImageStatistics, compare, load_statistics
from utils.files import FolderLock, remove_temporaries, write_json
from utils.fingerprint import compare_data, read_listing, write_listing
from utils.sampling import Sampler
from utils.sharding import (
    abstract,
    compile_program,
    feed,
    initialize_processes,
    make_mesh,
    memory_of,
    next_batch,
    replicated,
    state_sharding,
    to_devices,
)
from utils.throughput import StepTrace, Throughput
from utils.tracking import Tracker, read_metrics
from utils.train_state import TrainState, create_train_state, make_optimizer
from utils.train_step import INIT, VALIDATION, train_step, validation_step


def define_flags() -> None:
    cfg.define_data_flags()
    cfg.define_vae_flag()
    cfg.define_path("save_dir", None, "Folder of the run; default runs/<--wandb.name>.")
    cfg.define_path("load_dir", None, "Run whose parameters and average this run starts from.")
    flags.DEFINE_integer("seed", 0, "Seed of parameters, data order, noise and samples.")
    flags.DEFINE_integer("batch_size", 256, "Global batch size.")
    flags.DEFINE_integer("max_steps", 1_000_000, "Training steps.", lower_bound=0)
    flags.DEFINE_integer(
        "log_interval", 1000, "Steps between logged metrics; also at the first and last.", lower_bound=1
    )
    flags.DEFINE_integer(
        "eval_interval", 50_000, "Steps between pictures; also at step 1000 and at the end. 0: none.", lower_bound=0
    )
    flags.DEFINE_integer("save_interval", 200_000, "Steps between checkpoints; also at the end.", lower_bound=1)
    flags.DEFINE_float("save_minutes", 15, "Minutes between checkpoints, whatever the step; 0: never.", lower_bound=0)
    flags.DEFINE_integer("keep_last", 2, "Newest checkpoints kept.", lower_bound=1)
    flags.DEFINE_integer("keep_every", 1_000_000, "Checkpoints of multiples of this step are kept too.", lower_bound=1)
    flags.DEFINE_integer("debug_overfit", 0, "1 trains on one repeated batch.", 0, 1)
    flags.DEFINE_enum("sharding", "dp", ["dp", "fsdp"], "dp replicates the state over the devices, fsdp splits it.")
    flags.DEFINE_integer("grad_accum", 1, "Parts in which a batch is computed, for less memory.", lower_bound=1)
    flags.DEFINE_enum(
        "remat",
        "none",
        list(REMAT_POLICIES),
        "What the backward pass recomputes, for less memory: dots all but products.",
    )
    flags.DEFINE_float("peak_tflops", None, "Of one device, where its kind is not known, for the MFU.", lower_bound=0)
    cfg.define_path("profile", None, "Folder for a trace of ten steps, for xprof or ui.perfetto.dev.")
    cfg.define_path("fid_stats", None, "Reference statistics; with them, `fid` is logged at every evaluation.")
    flags.DEFINE_integer("fid_samples", 10_000, "Samples of a training-time FID.", lower_bound=2)
    flags.DEFINE_enum("convention", None, list(inception.CONVENTIONS), "Of --fid_stats, where the file does not say.")
    cfg.define_path("inception_weights", None, "Local copy of the Inception weights.")
    cfg.define_model_flags()
    cfg.define_wandb_flags()
    cfg.define_device_flags()
    flags.adopt_module_key_flags(cfg)  # so that --help lists them


class Run:
    """What is set up once, before the first step: data, model, optimizer, folder. Wrong input ends here, uncompiled."""

    def __init__(self, config: ConfigDict):
        self.config, self.mesh = config, make_mesh()
        cfg.check_batch_size(config.batch_size, self.mesh.size, config.grad_accum)
        refuse_ignored(config)
        options = (config.data_dir, config.image_size, config.broken_images, config.max_megapixels)
        self.datasets = {split: load_dataset(config.dataset_name, split, *options) for split in SPLITS}
        dataset = self.datasets["train"]
        cfg.check_batch_memory(config.batch_size, dataset.image_shape)
        if config.debug_overfit:
            dataset = first_examples(dataset, config.batch_size)
        latents = dataset.latents
        vae = config.vae or (latents.vae if latents else cfg.VAE)
        codec = evaluation.load_codec(
            config.model.use_stable_vae, vae, self.mesh, dataset.image_shape, latents and latents.vae_sha256
        )
        facts = (dataset.image_shape, dataset.class_names)
        self.context = evaluation.make_context(config.model, codec, self.mesh, *facts, remat=config.remat)
        if not cfg.can_guide(config.model.class_dropout_prob):
            say(f"{cfg.explain_no_guidance(config.model.class_dropout_prob)}: samples are drawn without guidance")
        self.reference = load_statistics(config.fid_stats) if config.fid_stats else None
        if self.reference is not None:
            convention = evaluation.find_convention(self.reference, config.convention)
            weights = config.inception_weights
            self.extractor = inception.load_feature_extractor(weights, convention, replicated(self.mesh))
            if not config.eval_interval:
                cfg.refuse_ignored(("fid_stats",), "with --eval_interval=0: FID is part of an evaluation")
        self.folder = cfg.run_folder(config)
        cfg.check_writable(self.folder, "save_dir")
        self.lock = FolderLock(self.folder)
        if jax.process_index() == 0:
            self.lock.acquire("save_dir")
        if config.profile:
            cfg.check_writable(Path(config.profile), "profile")
        self.optimizer = make_optimizer(config.model.lr, config.model.beta1, config.model.beta2)
        self.checkpoints = Checkpoints(self.folder, config.keep_last, config.keep_every)
        self.checkpoints.remove_unfinished()
        remove_temporaries(self.folder)
        facts = {"vae": vae if codec.sha256 else None, "vae_sha256": codec.sha256}
        self.saved_config = {**config.to_dict(), "dataset": describe_data(self.datasets) | facts}

        hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        self.batches = training_batches(dataset, config.batch_size, config.seed, **hosts)
        # Always the same validation images, so that two points of a curve differ by the model alone.
        validation_batches = training_batches(self.datasets["validation"], config.batch_size, config.seed, **hosts)
        self.validation_batch = to_devices(next_batch(validation_batches), self.mesh)
        self.parts = {
            "model": self.context.model,
            "optimizer": self.optimizer,
            "t_sampler": config.model.t_sampler,
            "grad_accum": config.grad_accum,
        }
        self.flops_per_step = 3 * config.batch_size * self.context.model.count_flops(self.context.latent_shape)

    def first_state(self) -> TrainState:
        """The newest checkpoint's state, with the data moved to its position; or step 0, perhaps of --load_dir.

        The state of step 0 is the same on every process and any number of devices.
        """

        def init(key):
            params = evaluation.init_params(self.context, jax.random.fold_in(key, INIT))
            return create_train_state(params, self.optimizer, key)

        key = jax.random.key(self.config.seed)
        shapes = jax.eval_shape(init, key)
        shardings = state_sharding(shapes, self.mesh, self.config.sharding)
        like = abstract(shapes, shardings)

        steps = self.checkpoints.steps()
        if steps:
            return self.resume(steps, like)
        loaded = {}
        if self.config.load_dir:
            names = ("params", "ema_params")
            source, steps = open_checkpoint(self.config.load_dir)
            _, saved = source.restore_newest(source.restore_config, steps)
            cfg.check_architecture(self.config.model, saved["model"], self.config.load_dir)
            step, trees = source.restore_newest(lambda step: source.restore_params(step, like.params, names), steps)
            loaded = dict(zip(names, trees, strict=True))
            say(f"starting from the parameters of {self.config.load_dir}, step {step}")
        return jax.jit(init, out_shardings=shardings)(key).replace(**loaded)

    def resume(self, steps: list[int], like: TrainState) -> TrainState:
        """The state of the newest checkpoint that is whole, with the data moved to its position. What has changed since
        it was saved is said, or refused where the run would become another."""

        def read(step):
            differences = self.compare_with(self.checkpoints.restore_config(step))
            state, position = self.checkpoints.restore(step, like)
            next_index = position.get("next_index") if isinstance(position, dict) else None
            if type(next_index) is not int or next_index < 0:
                raise DamagedCheckpointError(f"checkpoint of step {step} is damaged: it is of no place in the data")
            return differences, state, position

        step, (differences, state, position) = self.checkpoints.restore_newest(read, steps)
        for damaged in steps[: steps.index(step)]:
            self.checkpoints.set_aside(damaged)
        self.batches.set_state(position)
        say(f"resuming {self.folder} from step {step}")
        for difference in differences:
            say(f"since step {step}: {difference}")
        return state

    def compare_with(self, saved: dict) -> list[str]:
        """What differs from the configuration `saved` with a checkpoint of this run, in words; UserError where it is of
        other data or learns something else."""
        name, changed = self.config.dataset_name, cfg.check_resumable(self.saved_config, saved, self.folder)
        if "splits" not in saved["dataset"] and saved["dataset_name"] != name:
            old = saved["dataset_name"]
            raise UserError(
                f"{self.folder} holds a run with --dataset_name={old}, not {name}: give it, or {cfg.NEW_RUN}"
            )
        fingerprints = {split: dataset.fingerprint for split, dataset in self.datasets.items()}
        try:
            remarks = compare_data(
                saved["dataset"], read_listing(self.folder), self.saved_config["dataset"], fingerprints
            )
        except UserError as difference:
            raise UserError(
                f"--dataset_name={name} is not what {self.folder} was trained on: {difference}; give the same data, or "
                f"{cfg.NEW_RUN}"
            ) from None
        settings = [f"--{flag}={new}, was {old}" for flag, (old, new) in changed.items()]
        return settings + [f"of the data: {remark}" for remark in remarks]

    def keep_config(self, step: int) -> None:
        """Writes config.json, a copy of it under the time and step of this start, and the listing of the data."""
        if jax.process_index() > 0:
            return
        history = self.folder / "configs"
        history.mkdir(exist_ok=True)
        for path in (history / f"{time.strftime('%Y%m%d-%H%M%S')}_step{step}.json", self.folder / "config.json"):
            write_json(path, self.saved_config)
        write_listing(self.folder, {split: dataset.fingerprint for split, dataset in self.datasets.items()})

    def is_evaluation_due(self, step: int) -> bool:
        """Whether pictures are drawn, and FID computed, after this step."""
        interval, is_end = self.config.eval_interval, step == self.config.max_steps
        return bool(step and interval and (step % interval == 0 or step == 1000 or is_end))

    def is_evaluation_missing(self, step: int) -> bool:
        """Whether the evaluation due after the step from which this run continues is not in its log: a kill or a signal
        has ended it."""
        if not self.is_evaluation_due(step):
            return False
        lines = read_metrics(self.folder / "metrics.jsonl") if jax.process_index() == 0 else []
        is_there = any(line["step"] == step and "validation_loss_t/mean" in line for line in lines)
        return not multihost_utils.broadcast_one_to_all(np.bool_(is_there)) if jax.process_count() > 1 else not is_there

    def last_batch(self) -> PyTree:
        """The batch before the one that comes next."""
        self.batches.set_state({"next_index": self.batches.get_state()["next_index"] - 1})
        return to_devices(next_batch(self.batches), self.mesh)

    def compile_train_step(self, state: TrainState):
        """train_step(state, batch, codec) compiled for this run's shapes; it takes over the state's memory."""
        ema_decay = cfg.ema_decay(self.config.model.target_update_rate)
        shardings = (jax.tree.map(lambda x: x.sharding, state), replicated(self.mesh))
        step = partial(train_step, **self.parts, ema_decay=ema_decay)
        step = jax.jit(step, donate_argnums=0, out_shardings=shardings)
        say("compiling the training step ...")
        started = time.monotonic()
        compiled = compile_program(step, state, self.validation_batch, self.context.codec)
        say(f"compiled in {time.monotonic() - started:.1f} s; it needs {memory_of(compiled) / 2**30:.2f} GiB a device")
        return compiled

    def summary(self, state: TrainState) -> str:
        model, shape = self.config.model, self.context.latent_shape
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        return (
            f"DiT {model.hidden_size} wide, {model.depth} deep, {model.num_heads} heads, patch {model.patch_size} on "
            f"{'x'.join(map(str, shape))}: {count:,} parameters, {self.flops_per_step / 1e9:,.1f} GFLOP a step of "
            f"{self.config.batch_size} images, on {self.mesh.size} x {jax.devices()[0].device_kind}"
        )

    def evaluate(self, state: TrainState, batch: PyTree) -> Iterator[tuple[str, object]]:
        """(name, number or figure) of what is looked at every --eval_interval; pictures and FID use the average."""
        config, context, key = self.config, self.context, jax.random.fold_in(state.key, VALIDATION)
        for name, data in (("training", batch), ("validation", self.validation_batch)):
            for t, loss in evaluation.loss_by_time(context, state.params, data, key).items():
                yield f"{name}_loss_t/{t}", loss
        yield "reconstruction_n", evaluation.reconstruction_panel(context, state.ema_params, self.validation_batch, key)
        can_guide = cfg.can_guide(config.model.class_dropout_prob)
        scale = cfg.guidance_scale(config.model.cfg_scale) if can_guide else None
        sampler = Sampler(config.model.denoise_timesteps, scale)
        yield from evaluation.sample_panels(context, state.ema_params, key, sampler)
        if self.reference is not None:
            yield "fid", self.compute_fid(state, sampler)

    def compute_fid(self, state: TrainState, sampler: Sampler) -> float:
        config = self.config
        generator = evaluation.Generator(self.context, state.ema_params, seed=config.seed)
        needed = -(-config.fid_samples // self.mesh.size) * self.mesh.size
        samples = generator.generate(sampler, config.fid_samples, min(config.batch_size, needed))
        statistics = ImageStatistics()
        for _ in evaluation.measure_images(self.extractor, samples, statistics):
            pass
        return compare(statistics, self.reference)["fid"]


class Interrupted(Exception):
    """What a signal raises where it may."""


class StopRequest:
    """Whether Ctrl-C or SIGTERM asked for an end; a second Ctrl-C interrupts at once.

    To be made before the processes of a run join: JAX then takes SIGTERM over, and tells all of them of one that
    reaches any. Ctrl-C, which often reaches a single process, is passed on to it.
    """

    def __init__(self):
        self.signal, self.is_interruptible = None, False
        self.num_asked, self.is_agreed = 0, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGINT and jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
        if self.is_interruptible:
            raise Interrupted

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Lets a signal raise Interrupted in the block. Not in a run of several processes, which have to agree."""
        self.is_interruptible = jax.process_count() == 1
        if self.is_interruptible and self.signal is not None:
            raise Interrupted
        try:
            yield
        finally:
            self.is_interruptible = False

    def is_due(self) -> bool:
        """The answer on which all processes of the run agree; each has to ask as often as the others."""
        if jax.process_count() == 1:
            return self.signal is not None
        self.num_asked += 1
        self.is_agreed = self.is_agreed or multihost_utils.reached_preemption_sync_point(self.num_asked)
        return self.is_agreed


def refuse_ignored(config: ConfigDict) -> None:
    """UserError for flags that would have no effect on this run."""
    if not config.fid_stats:
        cfg.refuse_ignored(("fid_samples", "convention", "inception_weights"), "without --fid_stats")
    if not config.model.use_stable_vae:
        cfg.refuse_ignored(("vae",), "on pixels (--use_stable_vae 0)")
    if not config.dataset_name.startswith("folder:"):
        cfg.refuse_ignored(("broken_images", "max_megapixels"), f"on {config.dataset_name}, only on folder:PATH")


tree_norm = jax.jit(optax.tree.norm)


def check_finite(
    metrics: dict[str, jax.Array], step: int, checkpoints: Checkpoints, ema_params: PyTree | None = None
) -> None:
    """Ends a run that has diverged, before its state is saved over a good one."""
    values = [metrics["l2_loss"], metrics["param_norm"]]
    if ema_params is not None:
        values.append(tree_norm(ema_params))
    if not np.isfinite(values).all():
        checkpoints.wait()
        saved = checkpoints.steps()
        way = f"the same command continues from step {saved[0]}: run it" if saved else "start again"
        raise UserError(
            f"loss or parameters are not finite any more at step {step}; {way} with a lower --model.lr, "
            "or with --model.dtype float32"
        )


def log_evaluation(tracker: Tracker, results: Iterator[tuple[str, object]], step: int, stop: StopRequest) -> bool:
    """Whether all results were logged; a signal ends it, and the same evaluation is made when the run continues."""
    numbers = {}
    try:
        with stop.interrupting():
            for name, value in results:
                if isinstance(value, Figure):
                    tracker.log_figure(name, value, step)
                else:
                    numbers[name] = value
                if jax.process_count() > 1 and stop.is_due():
                    return False
    except Interrupted:
        return False
    tracker.log(numbers, step)
    return True


class Progress:
    """What is said of the steps under way: a bar, and metrics at the steps that are logged.

    A step is reported once the next one is dispatched, so that its numbers are read without leaving the devices idle
    (and, as that waits for it, no more than two are ever in flight). `flush` reports what is left.
    """

    def __init__(self, run: Run, tracker: Tracker, step: int):
        config = run.config
        self.run, self.tracker, self.pending = run, tracker, None
        self.throughput = Throughput(config.batch_size, run.flops_per_step, config.peak_tflops)
        interval = 0.2 if sys.stderr.isatty() else 10  # a log file wants a line now and then
        quiet = jax.process_index() > 0
        options = {"unit": "step", "mininterval": interval, "disable": quiet, "file": TolerantStream()}
        self.bar = tqdm(total=config.max_steps, initial=step, **options)

    def add(self, step: int, metrics: dict[str, jax.Array], validation: dict[str, jax.Array] | None) -> None:
        """Reports the step before; then step `step` is the one to be reported, and logged if it has `validation`."""
        self.flush()
        self.pending = (step, metrics, validation)

    def flush(self) -> None:
        if self.pending is None:
            return
        (step, metrics, validation), self.pending = self.pending, None
        loss = float(metrics["l2_loss"])
        self.throughput.num_steps += 1
        self.bar.set_postfix_str(f"loss {loss:.4f}, {self.throughput}", refresh=False)
        self.bar.update()
        if validation is not None:
            check_finite(metrics, step, self.run.checkpoints)
            groups = {"training": metrics | self.throughput.read(), "validation": validation}
            self.tracker.log(
                {f"{group}/{name}": x for group, named in groups.items() for name, x in named.items()}, step
            )
            self.throughput.restart()

    def is_idle(self) -> bool:
        """Whether the devices have finished all that was dispatched."""
        return self.pending is None or self.pending[1]["l2_loss"].is_ready()


def train(run: Run, state: TrainState, tracker: Tracker, stop: StopRequest) -> int:
    """Trains to --max_steps or a stop request, logging, evaluating and saving on the way; returns the last step."""
    config, codec, step = run.config, run.context.codec, int(state.step)
    metrics = position = None  # of the last step
    if run.is_evaluation_missing(step):
        say(f"the evaluation of step {step} was not finished: making it now")
        if not log_evaluation(tracker, run.evaluate(state, run.last_batch()), step, stop):
            return step
    if step >= config.max_steps:
        return step
    compiled_step = run.compile_train_step(state)
    validate = jax.jit(partial(validation_step, **run.parts))
    saver = Saver(run.checkpoints, run.saved_config, config.save_interval, config.save_minutes, step)
    progress, trace = Progress(run, tracker, step), StepTrace(config.profile, step)
    batches = progress.throughput.waiting(feed(run.batches, run.mesh), progress.is_idle)
    with progress.bar:
        while True:
            try:
                batch, position = next(batches)
            except DataError as error:
                progress.flush()
                if position is not None:
                    check_finite(metrics, step, run.checkpoints)
                end_without_data(error, step, saver, state, position)
            step += 1
            trace.before(step)
            state, metrics = compiled_step(state, batch, codec)
            trace.after(step, metrics)
            is_end = step == config.max_steps
            is_last = is_end or stop.is_due()
            is_logged = step % config.log_interval == 0 or step == 1 or is_end
            progress.add(step, metrics, validate(state, run.validation_batch, codec) if is_logged else None)
            is_evaluated = run.is_evaluation_due(step)
            is_saved = saver.is_due(step) or is_last
            if is_evaluated or is_saved:
                progress.flush()
                check_finite(metrics, step, run.checkpoints, state.ema_params)
            if is_saved:  # before the pictures, which take their time
                (saver.save_last if is_last else saver.save)(state, position)
            if is_evaluated:
                progress.bar.set_description_str("drawing pictures")
                if not log_evaluation(tracker, run.evaluate(state, batch), step, stop) and not is_last:
                    saver.save_last(state, position)
                    is_last = True
                progress.bar.set_description_str("")
            if is_evaluated or is_saved:
                progress.throughput.restart()
            if is_last:
                trace.close(metrics)
                return step


def end_without_data(error: DataError, step: int, saver: Saver, state: TrainState, position: object) -> NoReturn:
    """Ends a run whose data cannot be read any more, after saving what it has learned."""
    # Of several processes the others cannot be told in time: they wait for this one's share of a step.
    if position is None or jax.process_count() > 1:
        raise error
    saver.save_last(state, position)
    raise UserError(f"{error}; saved at step {step}: with the data back, the same command continues from there")


def main(config: ConfigDict) -> None:
    stop = StopRequest()
    initialize_processes(config.coordinator_address, config.num_processes, config.process_id)
    run = Run(config)
    state = run.first_state()
    if state.step >= config.max_steps and not run.is_evaluation_missing(int(state.step)):
        say(f"nothing to do: {run.folder} is at step {state.step} already; raise --max_steps to go on")
        return
    say(cfg.to_text(config))
    say(run.summary(state))
    run.keep_config(int(state.step))
    tracker = Tracker(run.folder, config, int(state.step))
    last_step = train(run, state, tracker, stop)
    run.checkpoints.wait()
    run.checkpoints.close()
    tracker.close()
    run.lock.release()
    if last_step < config.max_steps or run.is_evaluation_missing(last_step):
        say(f"stopped at step {last_step} and saved; the same command continues from there")


if __name__ == "__main__":
    cfg.run_program(define_flags, main)
