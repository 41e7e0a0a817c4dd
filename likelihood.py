"""How likely a trained model finds images: bits per dimension, with their standard error over the images.

    python likelihood.py --load_dir runs/demo --num_images 100
    python likelihood.py --load_dir runs/demo --dataset_name folder:/data/cats --labels none --json -

For pixel models these are bits per dimension of 8-bit images, uniformly dequantised: an upper bound of their negative
log-likelihood. For latent models they are nats per element of the latents, which say nothing about pixels.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import Int32
from ml_collections import ConfigDict

from utils.base.devices import explaining_out_of_memory
from utils.base.files import explaining_full_disk, prepare_output_file
from utils.base.mesh import check_batch_size, gather, make_mesh, shard_replicated
from utils.base.messages import UserError, configure_output, log, progress_bar, show_result
from utils.codecs.codec import is_identity
from utils.conditions.classes import ClassCondition
from utils.conditions.condition import resize_rows
from utils.data.batches import epoch_batches
from utils.data.dataset import Batch, ImageDataset, PixelBatch
from utils.data.loaders import get_loader, load_dataset
from utils.flags import program, reading
from utils.flags.definitions import (
    define_codec_flags,
    define_data_flags,
    define_params_flag,
    define_path,
    define_quiet_flag,
)
from utils.flags.effects import RULES, check_effects
from utils.flags.help import topic
from utils.images.decoding import find_mode
from utils.images.pixels import PixelFormat, check_pictures, match_channels
from utils.images.sizes import write_size
from utils.runs.opening import load_model, name_run, open_checkpoint, restore_params
from utils.runs.results import check_json_path, likelihood_to_markdown, write_csv, write_json_rows
from utils.sampling.density import LikelihoodConfig, check_probes, describe_probes, measure_batch

# Taken from the run, where the images are its own and no flag says otherwise.
RUN_OPTIONS = (
    "image_size",
    "condition_columns",
    "text_encoder",
    "data_dir",
    "broken_images",
    "max_megapixels",
    "check_images",
)


def define_flags() -> None:
    with topic("Model"):
        define_path("load_dir", None, "Folder of a run, RUN/checkpoints/STEP, or an exported folder or file.")
        define_params_flag()
        define_codec_flags()
    define_data_flags(dataset_name=None)
    with topic("Data"):
        flags.DEFINE_enum("split", "validation", ["train", "validation"], "Split of the data set.")
        flags.DEFINE_integer("num_images", None, "Images, the first of the split; default: all.", 1)
        flags.DEFINE_enum(
            "labels", None, ["data", "none"], "Condition on the images' labels or on none; default: data, if the run's."
        )
    # How it is computed: the trace of the Jacobian, and the solver of the ODE.
    with topic("Likelihood"):
        flags.DEFINE_integer(
            "num_probes", 1, "Random signs per image for the trace (Hutchinson); 0: the exact trace.", 0, 10_000
        )
        flags.DEFINE_integer("seed", 0, "Dequantisation and signs of image i depend on this and on i alone.", 0)
        flags.DEFINE_enum("solver", "dopri5", ["dopri5", "midpoint"], "midpoint takes --denoise_timesteps steps.")
        flags.DEFINE_integer("denoise_timesteps", 100, "Steps of the midpoint rule, two velocities each.", 1, 10**6)
        flags.DEFINE_float("rtol", 1e-5, "Relative tolerance of dopri5.", 1e-7, 1)
        flags.DEFINE_float("atol", 1e-5, "Absolute tolerance of dopri5.", 1e-7, 1)
    with topic("Compute"):
        flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Compute dtype.")
        flags.DEFINE_integer("batch_size", 64, "Images at a time, over all devices.")
    # The mean is printed; each image by itself goes into a file.
    with topic("Output"):
        define_path("per_image", None, "Also write a CSV with a line for each image: index, label, value, NFE.")
        define_path("json", None, "Also write the result as JSON into this file; - prints it instead of the table.")
        define_quiet_flag()


class Measurement:
    """A run and the images that it measures. Raises UserError for bad input before anything compiles."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.mesh = make_mesh()

        # The run, and images that suit it.
        checkpoints, steps = open_checkpoint(config.load_dir, reading.read_codec(config))
        newest, saved = checkpoints.restore_newest(checkpoints.restore_config, steps)
        data = saved["dataset"]
        check_pictures(
            PixelFormat.from_record(data),
            data["image_shape"],
            f"--load_dir={config.load_dir}: likelihoods are of",
            "compare such runs by their validation/l2_loss (docs/metrics.md)",
        )
        self.dataset = self._load_dataset(saved)
        self.model = load_model(saved, self.mesh, dtype=config.dtype, codec=reading.read_codec(config))
        self.is_pixels = is_identity(self.model.codec)
        self.unit = "bits_per_dim" if self.is_pixels else "nats_per_latent_element"
        self._check_dataset()
        self.is_conditional = self._is_conditional()
        self.num_images = self._count_images()

        # How they are measured.
        check_batch_size(config.batch_size, self.mesh.size)
        check_probes(config.num_probes, math.prod(self.model.latent_shape))
        num_steps = config.denoise_timesteps if config.solver == "midpoint" else None
        self.settings = LikelihoodConfig(config.num_probes, num_steps, config.rtol, config.atol)

        # Parameters last: they are the largest to read.
        remaining = steps[steps.index(newest) :]
        self.step, self.params = restore_params(checkpoints, remaining, self.model, saved, config.params)

    def _load_dataset(self, saved: dict[str, Any]) -> ImageDataset:
        """Loads --dataset_name, or the run's own data set with the options that the run had."""
        config = self.config
        # The run's own images are read as it read them; flags that were typed win.
        is_own = config.dataset_name is None
        for name in (name for name in RUN_OPTIONS if is_own and not reading.is_explicit(name)):
            config[name] = saved.get(name, config[name])
        name = config.dataset_name or saved["dataset_name"]
        reading.check_data_flags(name)

        # Other images are brought to the run's size, where their loader can resize.
        if not is_own and config.image_size is None and get_loader(name).is_resizable:
            config.image_size = write_size(saved["dataset"]["image_shape"][:2])
        if config.image_mode is None and "image_mode" in get_loader(name).options:
            config.image_mode = find_mode(saved["dataset"]["image_shape"], PixelFormat.from_record(saved["dataset"]))
        return load_dataset(name, config.split, reading.read_data_options(config))

    def _check_dataset(self) -> None:
        """Raises UserError if the model cannot take the images. Grey and colour are converted, and that is logged."""
        ours = self.dataset.image_shape
        theirs = self.model.image_shape
        name = self.config.dataset_name or self.dataset.name
        if ours[:2] != theirs[:2]:
            sizes = [f"{height}x{width}" for height, width, _ in (ours, theirs)]
            raise UserError(f"--dataset_name={name}: its images are {sizes[0]}, the run's {sizes[1]}; give others")
        if self.dataset.pair_shape:
            raise UserError(
                f"--dataset_name={name} holds pairs of noise and samples, no images of others; give the data set that "
                "the first model of pairs was trained on"
            )
        if self.dataset.latents is not None and self.is_pixels:
            raise UserError(f"--dataset_name={name} holds latents, but the run is of pixels; give the images")
        what = f"--dataset_name={name}: likelihoods are of"
        check_pictures(self.dataset.pixels, ours, what, "convert them, or give others", whose="these")
        if ours[2] != theirs[2] and not self.dataset.latents:
            log(f"the images of {name} are made {'grey' if theirs[2] == 1 else 'RGB'}, as the run's")

    def _is_conditional(self) -> bool:
        """Returns whether the model is given the images' labels. Raises UserError for --labels that it cannot use."""
        is_own = self.model.condition.accepts(self.dataset.condition)
        choice = self.config.labels or ("data" if is_own else "none")
        dropout = self.model.network.config.class_dropout_prob
        if choice == "data" and not is_own:
            what = "classes" if isinstance(self.model.condition, ClassCondition) else "conditions"
            raise UserError(f"--labels=data: the {what} of the data set are not the run's; use --labels none")
        if not self.config.labels and not is_own and not isinstance(self.model.condition, ClassCondition):
            theirs, ours = self.dataset.condition.summary(), self.model.condition.summary()
            log(f"no condition is given: the data have {theirs}, the run {ours}; --condition_columns chooses")
        # Without dropped labels in training, the model has never seen the row of "no label".
        if choice == "none" and dropout == 0:
            hint = "use --labels data" if is_own else "give images of the run's classes"
            raise UserError(f"--labels={choice}: the model was trained without dropping labels; {hint}")
        return choice == "data"

    def _count_images(self) -> int:
        requested = self.config.num_images
        held = len(self.dataset.source)
        if requested and requested > held:
            raise UserError(f"--num_images={requested}: the split holds {held}; use {held} or fewer")
        return requested or held

    def batches(self) -> Iterator[tuple[Batch, Int32[np.ndarray, " b"]]]:
        """Yields (batch, numbers of its images (b,)), with labels as the model takes them; the last batch is padded."""
        size = self.config.batch_size
        first = 0
        # One shape for all batches, as another would compile; `measure` leaves the padding out.
        for batch in epoch_batches(self.dataset, size, stop=self.num_images):
            indices = np.arange(first, first + batch.num_examples, dtype=np.int32)
            first += batch.num_examples
            if not self.is_conditional:
                batch = batch.replace(condition=self.model.condition.null(batch.num_examples))
            if isinstance(batch, PixelBatch):
                batch = batch.replace(image=match_channels(batch.image, self.model.image_shape[2]))
            yield resize_rows((batch, indices), size)

    def measure(self) -> list[dict[str, Any]]:
        """Returns a row {index, label, value, NFE} for each image; the value stands under the name of its unit."""
        model = self.model
        rows = []
        bar = progress_bar(total=self.num_images, desc="likelihood", unit="image")
        for batch, indices in self.batches():
            placed = jax.tree.map(lambda rows: shard_replicated(rows, self.mesh), (batch, indices))
            # The same key for every batch: what is random of an image follows from its number.
            values, nfe = measure_batch(
                self.params, model.codec, jax.random.key(self.config.seed), *placed, network=model.network,
                objective=model.objective, config=self.settings, is_pixels=self.is_pixels,
            )  # fmt: skip
            values, nfe = (gather(each) for each in (values, nfe))
            labels = self._labels(batch)
            # The rows beyond are the padding of the last batch.
            for i in range(min(len(values), self.num_images - len(rows))):
                rows.append({"index": len(rows), "label": labels[i], self.unit: float(values[i]), "nfe": int(nfe[i])})
                bar.update()
        bar.close()
        return rows

    def _labels(self, batch: Batch) -> list[Any]:
        """Returns the label of each image; other conditions in words, and None where the model is given none."""
        if not self.is_conditional:
            return [None] * batch.num_examples
        condition = self.model.condition
        return batch.condition.tolist() if isinstance(condition, ClassCondition) else condition.titles(batch.condition)

    def summarize(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the mean over the images, its standard error, and the settings that it depends on."""
        config = self.config
        values = np.array([row[self.unit] for row in rows])
        # Of a single image there is no standard error.
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        # Everything that the number depends on, so that the JSON alone can be compared.
        return {
            self.unit: float(values.mean()),
            "standard_error": error,
            "num_images": len(rows),
            "dataset": self.dataset.name,
            "split": config.split,
            "labels": "data" if self.is_conditional else "none",
            "num_probes": config.num_probes,
            "solver": config.solver,
            "num_steps": self.settings.num_steps,
            "rtol": None if self.settings.num_steps else config.rtol,
            "atol": None if self.settings.num_steps else config.atol,
            "nfe": float(np.mean([row["nfe"] for row in rows])),
            "seed": config.seed,
            "params": config.params,
            "dtype": config.dtype,
            "checkpoint": name_run(config.load_dir),
            "checkpoint_step": self.step,
        }


def main(config: ConfigDict) -> None:
    configure_output(is_apart=True)
    if not config.load_dir:
        raise UserError("--load_dir is not given: name the folder of a run, such as runs/demo")
    check_effects(RULES["likelihood"], config)
    # Outputs, before the run is opened: nothing is measured that cannot be written.
    if config.per_image:
        prepare_output_file(Path(config.per_image), "per_image", "images.csv")
    check_json_path(config.json, {"per_image": config.per_image})

    # What is measured, said before it takes its time.
    measurement = Measurement(config)
    images = f"{measurement.num_images} image{'s' * (measurement.num_images > 1)} of {measurement.dataset.name}"
    log(f"{images}, {config.split}, with {describe_probes(config.num_probes)}")
    with explaining_out_of_memory("the likelihood", "a smaller --batch_size"):
        rows = measurement.measure()
    result = measurement.summarize(rows)

    # Printed first: a result that cannot be written is not lost.
    if config.json != "-":
        show_result(likelihood_to_markdown(result))
    with explaining_full_disk(lambda: "the result is above"):
        if config.json:
            write_json_rows(config.json, [result])
        if config.per_image:
            write_csv(Path(config.per_image), rows)


if __name__ == "__main__":
    program.run_program(define_flags, main)
