"""Trains a flow-matching DiT: flags -> configuration -> one loop that steps, logs, evaluates and saves.

    python train_flow.py --dataset_name digits --use_stable_vae 0 --model.patch_size 2 --model.num_classes 10

The same command again continues a run from its newest checkpoint. README.md has the flags and the recipes.
"""

import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion_transformer import REMAT_POLICIES
from utils import config as cfg
from utils import evaluation, inception
from utils.checkpoint import Checkpoints, open_checkpoint
from utils.datasets import first_examples, load_dataset, training_batches
from utils.errors import UserError
from utils.fid import ImageStatistics, compare, load_statistics
from utils.files import write_json
from utils.sampling import Sampler
from utils.sharding import (
    abstract,
    compile_program,
    feed,
    initialize_processes,
    make_mesh,
    memory_of,
    replicated,
    state_sharding,
    to_devices,
)
from utils.throughput import StepTrace, Throughput
from utils.tracking import Tracker
from utils.train_state import TrainState, create_train_state, make_optimizer
from utils.train_step import INIT, VALIDATION, train_step, validation_step


def define_flags() -> None:
    cfg.define_data_flags()
    cfg.define_vae_flag()
    flags.DEFINE_string("save_dir", None, "Folder of the run; default runs/<--wandb.name>.")
    flags.DEFINE_string("load_dir", None, "Run whose parameters and average this run starts from.")
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
    flags.DEFINE_string("profile", None, "Folder for a trace of ten steps, for xprof or ui.perfetto.dev.")
    flags.DEFINE_string("fid_stats", None, "Reference statistics; with them, `fid` is logged at every evaluation.")
    flags.DEFINE_integer("fid_samples", 10_000, "Samples of a training-time FID.", lower_bound=2)
    flags.DEFINE_enum("convention", None, list(inception.CONVENTIONS), "Of --fid_stats, where the file does not say.")
    flags.DEFINE_string("inception_weights", None, "Local copy of the Inception weights.")
    cfg.define_model_flags()
    cfg.define_wandb_flags()
    cfg.define_device_flags()
    flags.adopt_module_key_flags(cfg)  # so that --help lists them


class Run:
    """What is set up once, before the first step: data, model, optimizer, folder. Wrong input ends here, uncompiled."""

    def __init__(self, config: ConfigDict):
        self.config, self.mesh = config, make_mesh()
        cfg.check_batch_size(config.batch_size, self.mesh.size, config.grad_accum)
        options = (config.data_dir, config.image_size, config.broken_images)
        dataset, validation_dataset = (
            load_dataset(config.dataset_name, split, *options) for split in ("train", "validation")
        )
        if config.debug_overfit:
            dataset = first_examples(dataset, config.batch_size)
        latents = dataset.latents
        vae = config.vae or (latents.vae if latents else cfg.VAE)
        codec = evaluation.load_codec(
            config.model.use_stable_vae, vae, self.mesh, dataset.image_shape, latents and latents.vae_sha256
        )
        facts = (dataset.image_shape, dataset.class_names)
        self.context = evaluation.make_context(config.model, codec, self.mesh, *facts, remat=config.remat)
        self.reference = load_statistics(config.fid_stats) if config.fid_stats else None
        if self.reference is not None:
            convention = evaluation.find_convention(self.reference, config.convention)
            weights = config.inception_weights
            self.extractor = inception.load_feature_extractor(weights, convention, replicated(self.mesh))
        self.folder = cfg.run_folder(config)
        cfg.check_writable(self.folder, "save_dir")
        if config.profile:
            cfg.check_writable(Path(config.profile), "profile")
        self.optimizer = make_optimizer(config.model.lr, config.model.beta1, config.model.beta2)
        self.checkpoints = Checkpoints(self.folder, config.keep_last, config.keep_every)
        # Enough to sample from a checkpoint without its data set.
        facts = {
            "name": dataset.name,
            "image_shape": list(dataset.image_shape),
            "class_names": list(dataset.class_names),
            "vae": vae if codec.sha256 else None,
            "vae_sha256": codec.sha256,
        }
        self.saved_config = {**config.to_dict(), "dataset": facts}

        hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        self.batches = training_batches(dataset, config.batch_size, config.seed, **hosts)
        # Always the same validation images, so that two points of a curve differ by the model alone.
        self.validation_batch = to_devices(
            next(training_batches(validation_dataset, config.batch_size, config.seed, **hosts)), self.mesh
        )
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

        step = self.checkpoints.latest_step()
        if step is not None:
            cfg.check_resumable(self.saved_config, self.checkpoints.restore_config(step), self.folder)
            state, position = self.checkpoints.restore(step, like)
            self.batches.set_state(position)
            say(f"resuming {self.folder} from step {step}")
            return state
        loaded = {}
        if self.config.load_dir:
            source, step = open_checkpoint(self.config.load_dir)
            names = ("params", "ema_params")
            loaded = dict(zip(names, source.restore_params(step, like.params, names), strict=True))
            say(f"starting from the parameters of {self.config.load_dir}, step {step}")
        return jax.jit(init, out_shardings=shardings)(key).replace(**loaded)

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
        sampler = Sampler(config.model.denoise_timesteps, cfg.guidance_scale(config.model.cfg_scale))
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


class StopRequest:
    """Whether Ctrl-C or SIGTERM asked for an end; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def is_due(self, step: int) -> bool:
        """The answer on which all processes of the run agree at this step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signal is not None


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def check_finite(metrics: dict[str, jax.Array], step: int, checkpoints: Checkpoints) -> None:
    """Ends a run that has diverged, before its state is saved over a good one."""
    if not np.isfinite([metrics["l2_loss"], metrics["param_norm"]]).all():
        checkpoints.wait()
        saved = checkpoints.latest_step()
        way = "start again" if saved is None else f"the same command continues from step {saved}: run it"
        raise UserError(
            f"loss or parameters are not finite any more at step {step}; {way} with a lower --model.lr, "
            "or with --model.dtype float32"
        )


def log_evaluation(tracker: Tracker, results: Iterator[tuple[str, object]], step: int) -> None:
    numbers = {}
    for name, value in results:
        if isinstance(value, Figure):
            tracker.log_figure(name, value, step)
        else:
            numbers[name] = value
    tracker.log(numbers, step)


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
        self.bar = tqdm(total=config.max_steps, initial=step, unit="step", mininterval=interval, disable=quiet)

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
    compiled_step = run.compile_train_step(state)
    validate = jax.jit(partial(validation_step, **run.parts))
    progress, trace = Progress(run, tracker, step), StepTrace(config.profile, step)
    with progress.bar:
        for batch, position in progress.throughput.waiting(feed(run.batches, run.mesh), progress.is_idle):
            step += 1
            trace.before(step)
            state, metrics = compiled_step(state, batch, codec)
            trace.after(step, metrics)
            is_end = step == config.max_steps
            is_last = is_end or stop.is_due(step)
            is_logged = step % config.log_interval == 0 or step == 1 or is_end
            progress.add(step, metrics, validate(state, run.validation_batch, codec) if is_logged else None)
            is_evaluated = config.eval_interval and (step % config.eval_interval == 0 or step == 1000 or is_end)
            is_saved = step % config.save_interval == 0 or is_last
            if is_evaluated or is_saved:
                progress.flush()
                check_finite(metrics, step, run.checkpoints)
            if is_saved:  # before the pictures, which take their time
                run.checkpoints.save(state, run.saved_config, position)
            if is_evaluated:
                progress.bar.set_description_str("drawing pictures")
                log_evaluation(tracker, run.evaluate(state, batch), step)
                progress.bar.set_description_str("")
            if is_evaluated or is_saved:
                progress.throughput.restart()
            if is_last:
                trace.close(metrics)
                return step


def main(config: ConfigDict) -> None:
    initialize_processes(config.coordinator_address, config.num_processes, config.process_id)
    stop = StopRequest()
    run = Run(config)
    state = run.first_state()
    if state.step >= config.max_steps:
        say(f"nothing to do: {run.folder} is at step {state.step} already; raise --max_steps to go on")
        return
    say(cfg.to_text(config))
    say(run.summary(state))
    if jax.process_index() == 0:
        write_json(run.folder / "config.json", run.saved_config)
    tracker = Tracker(run.folder, config, int(state.step))
    last_step = train(run, state, tracker, stop)
    run.checkpoints.close()
    tracker.close()
    if last_step < config.max_steps:
        say(f"stopped at step {last_step} and saved; the same command continues from there")


if __name__ == "__main__":
    cfg.run_program(define_flags, main)
