"""The settings of a run, by subject: each with its name as a flag, default, help and bounds, defined nowhere else."""

import dataclasses

import optax
from jax.sharding import Mesh

from diffusion_transformer import REMAT_POLICIES
from utils.base.mesh import SHARDING_MODES
from utils.base.settings import setting
from utils.codecs.codecs import DEFAULT_HUB_ID, CodecSpec, list_codecs, parse_codec
from utils.conditions.augmented import AUGMENTATIONS
from utils.conditions.text_encoders import list_text_encoders
from utils.data.dataset import DataOptions
from utils.data.joined import parse_weights
from utils.images.decoding import MAX_MEGAPIXELS, MODES
from utils.images.pixels import parse_range
from utils.images.sizes import parse_size
from utils.metrics.dinov2 import DTYPES, PREPROCESSING
from utils.metrics.inception import CONVENTIONS
from utils.networks.network import NetworkConfig
from utils.networks.optimizers import make_optimizer
from utils.networks.posthoc_ema import parse_profiles
from utils.sampling.samplers import MAX_SCALE, MAX_STEPS

# End at the first broken file, or train on the others.
BROKEN_IMAGES = ("refuse", "skip")
# Values of --coupling.
COUPLINGS = ("none", "minibatch", "semidiscrete")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long a run trains, from which seed, and on how many images at a time."""

    # Where to write, and what to train.
    save_dir: str | None = setting(
        None, "Folder of the run, s3:// and gs:// too; default runs/<--wandb.name>.", is_path=True
    )
    seed: int = setting(0, "Seed of parameters, data order, noise and samples.")
    batch_size: int = setting(256, "Global batch size.")
    max_steps: int = setting(1_000_000, "Training steps.", 0)

    # Modes beside an ordinary training.
    debug_overfit: int = setting(0, "1 trains on one repeated batch.", 0, 1)
    plan: int = setting(0, "1: says what this training will take (memory, time), and ends.", 0, 1)


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Another run whose parameters this one starts from, and which of them it trains."""

    load_dir: str | None = setting(
        None,
        "Run or export, s3:// and gs:// too, or hf:USER/NAME, whose parameters this run starts from.",
        is_path=True,
    )
    freeze: tuple[str, ...] = setting((), "Parts of --load_dir that are not trained: blocks.0-5, label_embed, ...")
    lora_rank: int = setting(0, "Above 0: of --load_dir, train low-rank factors and labels alone.", 0, 4096)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images are read, and how."""

    # The source.
    dataset_name: str = setting("imagenet256", "Data set; given several times, they are joined.", is_path=True)
    dataset_weights: str | None = setting(
        None, "Shares of several data sets in an epoch, such as 1,2; default: by their sizes."
    )
    data_dir: str | None = setting(None, "Where TFDS keeps prepared data sets; gs://... too.", is_path=True)

    # How each image is decoded and prepared.
    image_size: int | str | None = setting(
        None,
        "Images are centre-cropped and resized to this side, or to rows x columns, such as 24x40.",
        parse=parse_size,
    )
    image_mode: str | None = setting(
        None, "Grey, colour, with transparency, or grey of 16 bits; default: what the files have.", choices=MODES
    )
    text_encoder: str | None = setting(
        None, f"What makes tokens of captions: {' or '.join(list_text_encoders())}; default: words."
    )
    condition_columns: str | None = setting(
        None, "Conditions in the data: class, vector:a,b, tokens, text, image:pixels, joined by +; see docs/data.md."
    )
    broken_images: str = setting("refuse", "What to do about broken image files.", choices=BROKEN_IMAGES)
    max_megapixels: float = setting(MAX_MEGAPIXELS, "Largest image to decode; 3 bytes a pixel.", 0, 10_000)
    check_images: int = setting(1, "0 trusts image files; 1 decodes each once, before training.", 0, 1)
    value_range: str | None = setting(
        None, "LOW,HIGH: values of float images that become -1 and 1; default: the range of the training images."
    )
    random_flip: int | None = setting(
        None,
        "1 mirrors half of the training images left to right, 0 none; default: as usual for the data set.",
        0,
        1,
    )

    @property
    def options(self) -> DataOptions:
        """The settings as a data set's loader takes them."""
        flip = None if self.random_flip is None else bool(self.random_flip)
        bounds = None if self.value_range is None else parse_range(self.value_range)
        return DataOptions(
            self.data_dir,
            self.image_size,
            self.broken_images,
            self.max_megapixels,
            check_images=bool(self.check_images),
            dataset_weights=None if self.dataset_weights is None else parse_weights(self.dataset_weights),
            random_flip=flip,
            image_mode=self.image_mode,
            condition_columns=self.condition_columns,
            value_range=bounds,
            text_encoder=self.text_encoder,
        )


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """How training images are changed, of which the network is told, so that its samples are not."""

    augment: tuple[str, ...] = setting(
        (), f"Changes of training images, for small data sets: {', '.join(AUGMENTATIONS)}; samples show none."
    )
    augment_prob: float = setting(0.12, "How often an image undergoes each change of --augment.", 0, 1)


@dataclasses.dataclass(frozen=True)
class CouplingConfig:
    """Which noise goes with which image: by chance, or by optimal transport."""

    coupling: str = setting(
        "none",
        "minibatch: noise and images of a batch are paired by optimal transport, per class or condition; semidiscrete: "
        "all noise with the training images of its class, by potentials that are fitted first.",
        choices=COUPLINGS,
    )
    # Of pairs within a batch.
    coupling_rows: int | None = setting(
        None,
        "Consecutive rows among which --coupling=minibatch pairs; default: the largest divisor of the batch up to 256.",
        2,
        2**16,
    )
    coupling_weight: float | None = setting(
        None,
        "For conditions other than classes: weight of 1 - cosine of two conditions beside the squared distance (C2OT); "
        "default: found for each group of rows.",
        0,
        1e9,
    )
    # Of all noise with the training images.
    coupling_draws: int = setting(
        100,
        "Noise samples for each image, by which the potentials are fitted; N of them leave relative errors of about "
        "sqrt(2 / N) in how often images are used.",
        1,
        10**6,
    )


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """The codec: it turns images into the arrays that the model learns."""

    # As on the command line; `spec` is what it means.
    text: str | None = setting(
        None,
        f"Codec: {', '.join(list_codecs())}; default: that of the run or of the cached latents, "
        f"else kl:{DEFAULT_HUB_ID}.",
        flag="codec",
        is_path=True,
    )

    @property
    def spec(self) -> CodecSpec:
        """The requested codec; its source is None where the data or a default decide it."""
        return parse_codec(self.text or "kl")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its schedule and safeguards, and the EMA of the parameters."""

    name: str = setting(
        "adam",
        "muon: orthogonalised steps for the matrices inside the network, and Adam's for all else.",
        choices=("adam", "muon"),
        flag="optimizer",
    )

    # The recipe; jax-flow knows these flags by the same names, in the group `model`.
    lr: float = setting(1e-4, "Learning rate.", 0, flag="model.lr")
    beta1: float = setting(0.9, "Adam's first decay.", 0, 1, flag="model.beta1")
    beta2: float = setting(0.99, "Adam's second decay.", 0, 1, flag="model.beta2")
    target_update_rate: float = setting(
        0.9999, "Decay of the EMA of the parameters; 1: no EMA.", 0, 1, flag="model.target_update_rate"
    )

    # Off by default, so that the recipe stays Adam at a constant rate.
    ema_warmup: int = setting(
        0, "1: the EMA's decay grows as (1 + n) / (10 + n) up to --model.target_update_rate.", 0, 1
    )
    ema_profiles: tuple[str, ...] = setting(
        (),
        "Also keep power-function EMAs of these relative widths, such as 0.05,0.1: --params ema:0.08 then makes one of "
        "any other width (EDM2).",
        parse=parse_profiles,
    )
    warmup_steps: int = setting(0, "Steps in which the learning rate rises from 0.", 0)
    lr_schedule: str = setting("constant", "cosine: to 0 at --max_steps.", choices=("constant", "cosine"))
    weight_decay: float = setting(0.0, "AdamW's decay of matrices; with --optimizer=muon, of Muon's alone.", 0, 100)
    grad_clip: float | None = setting(None, "Bound of the norm of the gradients.", 1e-6)
    skip_nonfinite: int = setting(0, "Above 0: leave out updates that are not finite; so many in a row end the run.", 0)

    def make(self, max_steps: int, network: NetworkConfig, mesh: Mesh) -> optax.GradientTransformation:
        """Returns the optimizer of all parameters of a network, for a run of `max_steps` on these devices."""
        return make_optimizer(
            self.lr,
            self.beta1,
            self.beta2,
            warmup_steps=self.warmup_steps,
            decay_steps=max_steps if self.lr_schedule == "cosine" else None,
            weight_decay=self.weight_decay,
            grad_clip=self.grad_clip,
            muon_of=network if self.name == "muon" else None,
            mesh=mesh,
        )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn while a run trains."""

    denoise_timesteps: int = setting(
        32, "Euler steps of training-time samples.", 1, MAX_STEPS, flag="model.denoise_timesteps"
    )
    cfg_scale: float = setting(
        4.0,
        "Guidance scale of training-time samples; -1: no guidance.",
        -1,
        MAX_SCALE,
        flag="model.cfg_scale",
    )
    inner_scale: float = setting(
        1.0, "Internal guidance of training-time samples; 1: none.", 0, MAX_SCALE, flag="model.inner_scale"
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When a run looks at samples, and against which statistics it scores them."""

    # The evaluation at step 1000 shows early whether a run goes wrong.
    eval_interval: int = setting(50_000, "Steps between evaluations; also at step 1000 and at the end. 0: none.", 0)
    preview: str | None = setting(
        None, "tiny:PATH_OR_HUB, which decodes the panels in a fraction of the codec's time; not FID.", is_path=True
    )

    # FID is computed only with statistics; the other fields have no effect without them.
    fid_stats: str | None = setting(
        None, "Reference statistics; with them, `fid` is logged at every evaluation.", is_path=True
    )
    metrics: tuple[str, ...] = setting(("fid",), "Scores against --fid_stats, as those of eval_fid.py.")
    extractor: tuple[str, ...] = setting(
        (), "Instead of --metrics: feature networks, by commas, whose distance is logged; dinov2: `fd_dinov2`."
    )
    extractor_weights: str | None = setting(None, "Weights of dinov2, in any of their published forms.", is_path=True)
    preprocessing: str | None = setting(
        None, "How images are resized for dinov2; default: edm2.", choices=PREPROCESSING
    )
    extractor_dtype: str | None = setting(None, "Type of dinov2's matmuls; default: float32.", choices=DTYPES)
    fid_samples: int = setting(10_000, "Samples of a training-time FID.", 2)
    eval_memorisation: int = setting(0, "Samples compared with the training images at every evaluation. 0: none.", 0)
    convention: str | None = setting(
        None, "Inception preprocessing, if --fid_stats does not record it.", choices=CONVENTIONS
    )
    inception_weights: str | None = setting(None, "Local copy of the Inception weights.", is_path=True)


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Logs of a run: where numbers and images go, how often, and traces."""

    # Numbers and images.
    trackers: tuple[str, ...] = setting(
        ("wandb",), "Where numbers and images go beside the run's folder: wandb, tensorboard, or nowhere."
    )
    log_interval: int = setting(1000, "Steps between logged metrics; also at the first and last.", 1)

    # Speed. The peak is TFLOP/s of dense bfloat16 matmuls (PEAK_TFLOPS in utils/training/progress.py).
    peak_tflops: float | None = setting(None, "Peak of one device, for the MFU of unknown kinds.", 0)
    profile: str | None = setting(None, "Folder for a trace of ten steps, for xprof or ui.perfetto.dev.", is_path=True)


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """The run's page on wandb."""

    # Variables of wandb's own stand in for flags that are left out.
    mode: str = setting("online", "Default: $WANDB_MODE, else online.", choices=("online", "offline", "disabled"))
    project: str = setting("flow", "Project; default: $WANDB_PROJECT, else flow.")
    entity: str | None = setting(None, "User or team; default: $WANDB_ENTITY.")
    group: str | None = setting(None, "Group of runs; default: $WANDB_RUN_GROUP.")
    name: str = setting(
        "flow_{dataset_name}", "Name of the wandb run; train_flow.py names its folder under runs/ after it too."
    )
    notes: str | None = setting(None, "A longer description; default: $WANDB_NOTES.")
    tags: tuple[str, ...] = setting((), "Tags, separated by commas; default: $WANDB_TAGS.")
    display_name: str | None = setting(None, "Name on wandb alone, from $WANDB_NAME; no flag.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved, and which checkpoints are kept."""

    # When to save: by steps, and by the time since the last save.
    save_interval: int = setting(200_000, "Steps between checkpoints; also at the end.", 1)
    save_minutes: float = setting(15.0, "Minutes between checkpoints, whatever the step; 0: never.", 0)

    # What stays on disk.
    keep_last: int = setting(2, "Newest checkpoints to keep.", 1)
    keep_every: int = setting(1_000_000, "Also keep checkpoints at multiples of this step.", 1)
    keep_best: str | None = setting(
        None, "SCORE:COUNT, such as fid:3 or loss:1: also keep those with the best scores, and save at evaluations."
    )
    ema_snapshots: int = setting(
        32,
        "Most snapshots of --ema_profiles to keep: one every 50 steps; where there would be more, every 100, 200, ...",
        2,
    )


@dataclasses.dataclass(frozen=True)
class DeviceConfig:
    """How a step is spread over memory, devices and processes."""

    # Less memory for more time: neither changes what is computed, but for rounding.
    grad_accum: int = setting(1, "Microbatches per step, to save memory.", 1)
    remat: str = setting(
        "none",
        "What the backward pass recomputes, to save memory: dots is everything but matmuls.",
        choices=REMAT_POLICIES,
    )

    # The layout of the state over the devices.
    sharding: str = setting(
        "dp",
        "dp: every device has the whole state; zero: the parameters alone; fsdp: a part of everything; hybrid: fsdp "
        "within replicas.",
        choices=SHARDING_MODES,
    )
    num_shards: int | None = setting(
        None, "Devices of a replica of --sharding hybrid; default: of a slice, up to 16.", 1
    )


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """How several processes find each other."""

    coordinator_address: str | None = setting(
        None, "host:port of process 0 where several share the work; 'auto' on TPU pods, under SLURM and mpirun."
    )
    num_processes: int | None = setting(
        None,
        "Processes, with --coordinator_address; 1 without it: under srun or torchrun, each works for itself.",
    )
    process_id: int | None = setting(None, "This process's number, with --coordinator_address.")
