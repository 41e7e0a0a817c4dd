"""Opens the run that --load_dir names: a folder, a step of it, an export, a model on the hub, or a published file."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from utils.base import hosts
from utils.base.mesh import gather, make_mesh, replicated, shape_structs
from utils.base.messages import AbsentCodecError, UserError, rewording, warn
from utils.codecs.codec import AbsentCodec, set_pixel_format
from utils.codecs.codecs import choose_codec, load_codec
from utils.conditions.condition import check_draw_mode, restore_condition
from utils.convert.sources import EXPORTED
from utils.images.pixels import PixelFormat
from utils.networks.lora import merge_lora
from utils.networks.models import ImageModel, init_params, make_model, read_network
from utils.networks.posthoc_ema import parse_params
from utils.networks.state import young_ema_hint
from utils.objectives.objectives import make_objective
from utils.runs.checkpoint import FOLDER, Checkpoints, has_checkpoints
from utils.runs.ema_snapshots import take_average
from utils.runs.exported_run import SUFFIX, ExportedRun, folder_of_file, is_exported_file
from utils.runs.importing import HUB_PREFIX, fetch_run, import_file
from utils.runs.pool import read_pool
from utils.runs.remote_run import RemoteRun, find_remote_run, split_run_url
from utils.sampling.generator import ImageGenerator, check_guide
from utils.storage.staging import local_copy, upload_with_outputs
from utils.storage.urls import is_url, refuse_url

HUB_RUNS = Path("runs")  # where a run on the hub is kept


def split_load_dir(load_dir: str | Path) -> tuple[Path, int | None]:
    """Returns (folder of the run, step or None for the newest) for RUN, RUN/checkpoints and RUN/checkpoints/STEP.

    An exported folder is taken for that of a run, and so is NAME of an exported NAME.safetensors. hf:USER/NAME is kept
    in runs/USER--NAME, somebody else's NAME.pt in runs/NAME, and a URL, of a run or of what was exported, in the cache.
    """
    if is_url(load_dir):
        url, step = split_run_url(folder_of_file(str(load_dir)))
        return find_remote_run(url).folder, step
    if is_exported_file(load_dir):
        return Path(folder_of_file(str(load_dir))).absolute(), None
    if Path(load_dir).is_file():
        load_dir = HUB_RUNS / Path(load_dir).stem
    elif str(load_dir).startswith(HUB_PREFIX):
        load_dir = HUB_RUNS / str(load_dir).removeprefix(HUB_PREFIX).replace("/", "--")
    path = Path(load_dir).absolute()
    if path.parent.name == FOLDER and path.name.isdigit():
        return path.parent.parent, int(path.name)
    is_inside = path.name == FOLDER and not (path / FOLDER).is_dir()  # rather than a run of that name
    return path.parent if is_inside else path, None


def name_run(load_dir: str | Path) -> str:
    """Returns the URL or the absolute path of a run, to be recorded."""
    return str(load_dir) if is_url(load_dir) else str(Path(load_dir).absolute())


def open_checkpoint(load_dir: str | Path, codec: str | None = None) -> tuple[Checkpoints, list[int]]:
    """Opens what --load_dir names. It is read where it lies if it is a run, or was exported here; fetched from the hub
    or object storage if it is there; imported if it is somebody else's file, whose latents are those of `codec`, such
    as kl:FILE.

    Returns (checkpoints, steps to try, newest first). Raises UserError naming --load_dir where there is none.
    """
    # A run on the hub is fetched once, somebody else's file is imported once, and both are local runs from then on.
    refuse_url(load_dir, "load_dir")
    run_dir, step = split_load_dir(load_dir)
    remote = find_remote_run(split_run_url(folder_of_file(str(load_dir)))[0]) if is_url(load_dir) else None
    if remote is not None:
        remote.pull_run("load_dir", step)
        upload_with_outputs(remote)  # what a program writes into the run's folder
    elif str(load_dir).startswith(HUB_PREFIX) and not has_checkpoints(run_dir):
        fetch_run(str(load_dir), run_dir)
    elif Path(load_dir).is_file() and not is_exported_file(load_dir):
        import_file(Path(load_dir), run_dir, codec)

    # What was exported is one checkpoint.
    exported = _find_exported(load_dir, run_dir, remote)
    if exported is not None:
        checkpoints: Checkpoints = ExportedRun(exported, run_dir, f"--load_dir={load_dir}")
        if step is not None:
            only = checkpoints.steps()[0]
            raise UserError(f"--load_dir={load_dir}: an export has the parameters of one step, {only}; give {run_dir}")
        return checkpoints, checkpoints.steps()
    if not (run_dir / FOLDER).is_dir():
        raise UserError(
            f"--load_dir={load_dir} holds no checkpoint (no folder {run_dir / FOLDER}, and no file {EXPORTED}); "
            "give a run's folder, or an exported one; convert_checkpoint.py --source makes a run of others' weights"
        )

    # A step that is named is the only one to try.
    checkpoints = Checkpoints(run_dir, remote=remote)
    # Of several processes, the first looks: a training that still runs may save another meanwhile.
    steps = hosts.broadcast(checkpoints.steps())
    if not steps or (step is not None and step not in steps):
        found = f"found steps {', '.join(map(str, sorted(steps)))}" if steps else "no checkpoint was finished there"
        raise UserError(f"--load_dir={load_dir} holds no such checkpoint ({found})")
    return checkpoints, steps if step is None else [step]


def _find_exported(load_dir: str | Path, run_dir: Path, remote: RemoteRun | None) -> Path | None:
    """Returns the weights that --load_dir names, where it is an exported file, or a folder with such weights that is no
    run's; None elsewhere. Those in object storage are fetched."""
    if is_url(load_dir) and str(load_dir).endswith(SUFFIX):
        return local_copy(load_dir, "load_dir")
    if is_exported_file(load_dir):
        return Path(load_dir)
    if remote is not None:
        return None if remote.steps else remote.fetch_file(EXPORTED)
    file = run_dir / EXPORTED
    return file if file.is_file() and not has_checkpoints(run_dir) else None


def choose_steps(text: str, steps: Sequence[int]) -> list[int]:
    """Returns the steps, ascending, that --checkpoints=`text` names among those of a run: all, last:5, or 1000,2000.

    Raises UserError for other words, and for a step that is not there.
    """
    flag = f"--checkpoints={text}"
    known = sorted(steps)
    if text == "all":
        return known
    if match := re.fullmatch(r"last:([1-9]\d*)", text):
        return known[-int(match[1]) :]

    # Steps by their numbers, each once, in whichever order.
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"{flag}: give all, last:5 for the newest five, or steps such as 1000,2000")
    chosen = sorted({int(word) for word in words})
    if absent := [step for step in chosen if step not in known]:
        raise UserError(f"{flag}: no checkpoint of step {absent[0]} is there; found {', '.join(map(str, known))}")
    return chosen


def load_generator(
    run: str | Path,
    *,
    params: str = "ema",
    seed: int = 0,
    label_mode: str = "uniform",
    dtype: str | None = None,
    codec: str | None = None,
    mesh: Mesh | None = None,
    needs_images: bool = False,
    guide: str | Path | None = None,
    guide_params: str = "ema",
) -> ImageGenerator:
    """Loads the generator of a run: RUN, RUN/checkpoints/STEP for an older checkpoint, an exported folder or file,
    hf:USER/NAME, or a file of a published model.

    `params` is 'ema', 'raw', or 'ema:WIDTH' of a run with EMA profiles. `label_mode` says how labels are drawn where
    none are given. `dtype` is the compute dtype ('bfloat16' or 'float32') if it is not that of the training, and
    `codec`, such as kl:PATH, the place of the codec if that has moved. A codec that cannot be found is reported when
    images are decoded, or at once with `needs_images`. `guide` is a run, or a checkpoint of one, whose parameters
    `guide_params` guide the model where a sampler's `guide_scale` is not 1. Raises UserError where no checkpoint is
    intact, where the codec is not the one of the training, and where the guide does not fit the model.
    """
    # Words first: nothing is loaded for a misspelt one.
    try:
        params = parse_params(params)
    except ValueError as error:
        raise UserError(f"--params={params}: {error}") from None
    if dtype not in (None, "bfloat16", "float32"):
        raise UserError(f"--dtype={dtype} is unknown; use bfloat16 or float32")

    # The newest checkpoint whose configuration is intact, then the newest from there on whose parameters are.
    mesh = mesh or make_mesh()
    checkpoints, steps = open_checkpoint(str(run), codec)
    newest, saved = checkpoints.restore_newest(checkpoints.restore_config, steps)
    folder = checkpoints.folder.parent
    model = load_model(saved, mesh, dtype=dtype, codec=codec, needs_images=needs_images, folder=folder)
    check_draw_mode(model.condition, label_mode)  # before parameters are read
    weak = load_guide(guide, guide_params, model, codec)
    _, loaded = restore_params(checkpoints, steps[steps.index(newest) :], model, saved, params)
    generator = ImageGenerator(model, loaded, seed=seed, label_mode=label_mode, guide=weak)
    warn_of_same_guide(generator, guide)
    return generator


def load_guide(
    guide: str | Path | None, params: str, model: ImageModel, codec: str | None = None
) -> ImageGenerator | None:
    """Loads the run that guides a model, in the model's compute dtype; returns None where `guide` is None.

    Raises UserError, which names --guide and --guide_params, where it cannot be loaded and where it does not fit the
    model (`check_guide`).
    """
    if guide is None:
        return None
    dtype = model.network.config.dtype
    with rewording({"--load_dir": "--guide", "--params": "--guide_params", "the EMA at": "the EMA of --guide at"}):
        loaded = load_generator(guide, params=params, dtype=dtype, codec=codec, mesh=model.mesh)
        check_guide(model, loaded.model)
    return loaded


def warn_of_same_guide(generator: ImageGenerator, guide: str | Path | None) -> None:
    """Warns of a guide that has the parameters of the model itself: it changes nothing."""
    weak = generator.guide
    if weak is None or weak.model.network.config != generator.model.network.config:
        return
    pairs = zip(jax.tree.leaves(generator.params), jax.tree.leaves(weak.params), strict=True)
    if all(np.array_equal(gather(ours), gather(theirs)) for ours, theirs in pairs):  # ends at the first difference
        warn(
            f"--guide={guide}: its parameters are those of the model, so that it changes nothing without "
            "--inner_scale; name an earlier checkpoint or a smaller network"
        )


def load_model(
    saved: dict[str, Any],
    mesh: Mesh,
    *,
    dtype: str | None = None,
    codec: str | None = None,
    needs_images: bool = True,
    folder: Path | None = None,
) -> ImageModel:
    """Makes the model of a saved configuration, without parameters.

    Without `needs_images`, a codec that cannot be found is reported only when it is used. `folder` is the run's, which
    has kept conditions for samples that are given none. Raises UserError where the codec is not the one of the
    training, and for a damaged file of conditions.
    """
    # The network, in the run's dtype or another.
    data = saved["dataset"]
    objective = make_objective(saved)
    config = read_network(saved["model"])
    if dtype:
        config = dataclasses.replace(config, dtype=dtype)

    # The codec: without its weights, a model can still draw latents.
    shape = data["image_shape"]
    spec = choose_codec(data["codec"], codec)
    try:
        loaded = load_codec(spec, mesh, shape, data["codec"]["sha256"])
        loaded = set_pixel_format(loaded, PixelFormat.from_record(data))
    except AbsentCodecError as error:
        if needs_images or codec is not None or not data["latent_shape"]:
            raise
        loaded = AbsentCodec(str(error), tuple(data["latent_shape"]))

    # The model, which has to fit the codec's latents.
    condition = restore_condition(data)
    if remark := condition.remark():
        warn(f"note: {remark}")
    model = make_model(config, objective, loaded, mesh, shape, condition, augment=saved["augment"])
    if data["latent_shape"] and tuple(data["latent_shape"]) != model.latent_shape:
        theirs, ours = ("x".join(map(str, shape)) for shape in (model.latent_shape, data["latent_shape"]))
        raise UserError(
            f"--codec={spec} makes latents {theirs} of images "
            f"{'x'.join(map(str, shape))}, but the model takes {ours}; give the VAE with which it was trained"
        )
    return model if folder is None else model._replace(pool=read_pool(folder, model.condition))


def restore_params(
    checkpoints: Any, steps: list[int], model: ImageModel, saved: Mapping[str, Any], which: str = "ema"
) -> tuple[int, PyTree]:
    """Returns (step, parameters) of the first checkpoint of `steps` that is intact, placed on every device.

    `which` is 'ema', 'raw' or 'ema:WIDTH'. Warns of an EMA that is mostly initial parameters, as the configuration
    `saved` tells.
    """
    # Shapes alone: the model's parameters are never made, only read.
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    target = shape_structs(shapes, replicated(model.mesh))
    name = "ema_params" if which == "ema" else "params"

    # LoRA's factors, of runs that have them, are merged: sampling needs one kernel per layer.
    def read(step):
        factors = checkpoints.stored_lora(step, name, replicated(model.mesh))
        (params,) = checkpoints.restore_params(step, target | factors, (name,))
        # A published model may have one set, which serves as both.
        if which == "raw" and not checkpoints.has_raw(step):
            warn(f"note: {checkpoints.run_dir} holds one set of parameters, which --params=raw takes as well")
        return merge_lora(take_average(params, which, checkpoints, step, saved))

    step, params = checkpoints.restore_newest(read, steps)
    if which == "ema" and not checkpoints.is_imported(step) and (hint := young_ema_hint(saved, step)):
        warn(hint)
    return step, params
