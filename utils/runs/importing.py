"""Makes runs of published models: of a file, somebody else's or exported here, or of one on the hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from diffusion_transformer import DiTConfig
from utils.base.bars import watching
from utils.base.commands import write_command
from utils.base.external import BadFileError
from utils.base.files import FolderLock, check_writable, count_bytes, prepare_output_folder, write_json
from utils.base.messages import UserError, log, progress_bar
from utils.codecs.codecs import CODECS, CodecSpec, choose_codec, describe_codec, is_other_codec, parse_codec
from utils.conditions.classes import imagenet_class_names
from utils.conditions.condition import Condition, restore_condition
from utils.convert.jax_flow_files import find_jax_flow_config, import_jax_flow, keep_classes, training_settings
from utils.convert.published import FAMILIES, JAX_FLOW, find_config, import_published
from utils.convert.sources import METADATA_KEY, PublishedCheckpoint, fetch, read_source
from utils.runs.checkpoint import Checkpoints, SaveError, has_checkpoints
from utils.runs.saved_config import VAE_FACTOR, find_latent_shape, read_config

HUB_PREFIX = "hf:"  # --load_dir of a run on the hub
# Side of the image by which a codec's factor (image side over latent side) is found; factors divide it.
MAX_FACTOR = 256


def import_run(
    source_name: str,
    source: PublishedCheckpoint,
    out: Path,
    model: Mapping[str, Any],
    *,
    family: str | None = None,
    num_heads: int | None = None,
    class_names: Sequence[str] | None = None,
    codec: str | None = None,
    file: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the run of a published checkpoint to the folder `out`, and returns its configuration.

    `model` has the --model.* values that a checkpoint does not record, such as how it would be trained. `codec`, such
    as kl:PATH, made its latents if that is not the family's usual one. `file` is recorded, to know the file again.
    Raises UserError, and writes nothing, where something is missing, contradictory or does not fit, and where `out`
    holds a run.
    """
    # Configuration and parameters, in memory.
    check_new_run(out)
    raw = None
    try:
        if source.run is not None:
            config, params = convert_exported(source)
        else:
            # Somebody else's: sizes are read from the tensors, the rest is the family's.
            family = _choose_family(source, family)
            names = class_names or source.class_names
            source, architecture, latent_shape = _find_architecture(source, family, num_heads, names)
            config = read_config(
                _new_config(source_name, source, family, architecture, latent_shape, model, names, codec)
            )
            if source.jax_flow is not None:
                params, raw = import_jax_flow(source.jax_flow, architecture)
            else:
                condition = _fit_condition(config, latent_shape)
                params = import_published(source.state, architecture, latent_shape, condition)
    except BadFileError as error:
        raise UserError(f"--source={source_name}: {error}") from None

    if file is not None:
        config["imported"] = {**config.get("imported", {}), **file}

    # On disk, the checkpoint last: with it, the run is complete.
    prepare_output_folder(out, "out")
    with FolderLock(out).held("out"):
        check_new_run(out)  # another process may have finished one
        write_json(out / "config.json", config)
        write_params(out, params, raw, config)
    return config


def write_params(out: Path, params: PyTree, raw: PyTree | None, config: dict[str, Any]) -> None:
    """Writes the checkpoint of a run that holds an EMA, and parameters where there are some. Raises SaveError."""
    # Orbax does not tell how far it is; its files do.
    checkpoints = Checkpoints(out)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, raw)))
    bar = progress_bar(total=size, desc="writing the run", unit="B", unit_scale=True, delay=2)
    try:
        with watching(bar, lambda: count_bytes(checkpoints.folder)):
            checkpoints.save_params(jax.tree.map(jnp.asarray, params), config, jax.tree.map(jnp.asarray, raw))
    except SaveError as error:
        raise SaveError(f"{error}: make room, and give the same command again") from None
    checkpoints.close()


def check_new_run(out: Path) -> None:
    """Raises UserError where no run can be written to `out`, and where it holds one: a finished checkpoint, or the log
    of a training that has none yet. The remains of an import that was stopped are no run."""
    if has_checkpoints(out) or any((out / name).exists() for name in ("configs", "metrics.jsonl")):
        raise UserError(f"--out={out} holds a run already; choose another folder")
    check_writable(out, "out")


def _choose_family(source: PublishedCheckpoint, family: str | None) -> str:
    # What the file says and what the user says must not differ.
    if family is None and source.family is None:
        raise BadFileError("no tensor tells DiT from SiT: give --family dit or --family sit (or lightningdit)")
    if family and source.family and family != source.family:
        raise BadFileError(f"it is a {FAMILIES[source.family].title}'s, not {FAMILIES[family].title}'s")
    if family == JAX_FLOW and source.jax_flow is None:
        raise BadFileError("it is no pickle, as jax-flow's checkpoints are; give --family dit or --family sit")
    return family or source.family or ""


def _find_architecture(
    source: PublishedCheckpoint, family: str, num_heads: int | None, class_names: Sequence[str] | None
) -> tuple[PublishedCheckpoint, DiTConfig, tuple[int, int, int]]:
    """Returns (source, configuration, latent shape) of somebody else's checkpoint; the source with as many labels as
    have names, where jax-flow's table has more."""
    if source.jax_flow is None:
        num_classes = len(class_names) if class_names else source.num_classes
        config, latent_shape = find_config(source.state, family, num_heads or source.num_heads, num_classes)
        return source, config, latent_shape
    config, latent_shape = find_jax_flow_config(source.jax_flow, num_heads)
    if class_names and len(class_names) < config.num_classes:
        checkpoint, config = keep_classes(source.jax_flow, config, len(class_names))
        source = source._replace(jax_flow=checkpoint)
    return source, config, latent_shape


def convert_exported(source: PublishedCheckpoint) -> tuple[dict[str, Any], PyTree]:
    """Returns (configuration, parameters) of a model that was exported here: its file says everything. Raises
    BadFileError where the two do not fit each other."""
    assert source.run is not None
    config = _exported_config(source.run)
    latent_shape = find_latent_shape(config)
    architecture = DiTConfig.from_mapping(config["model"])
    return config, import_published(source.state, architecture, latent_shape, _fit_condition(config, latent_shape))


def _fit_condition(config: Mapping[str, Any], latent_shape: tuple[int, int, int]) -> Condition:
    return restore_condition(config["dataset"]).fit_latents(tuple(config["dataset"]["image_shape"]), latent_shape)


def _exported_config(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration in an exported file. Raises BadFileError if no run of this suite can have it."""
    try:
        config = read_config(run)
    except BadFileError as error:
        raise BadFileError(f"its metadata {METADATA_KEY} are no configuration of a run: {error}") from None
    network = config["model"]["network"]
    if network != "dit":
        raise BadFileError(f"its metadata {METADATA_KEY} name the network {network!r}; only dit is exported")
    return config


def _new_config(
    source_name: str,
    source: PublishedCheckpoint,
    family: str,
    architecture: DiTConfig,
    latent_shape: tuple[int, int, int],
    model: Mapping[str, Any],
    class_names: Sequence[str] | None,
    codec: str | None,
) -> dict[str, Any]:
    """Returns the configuration of a run for somebody else's checkpoint."""
    known = FAMILIES[family]
    height, width, channels = latent_shape

    # Images or latents: without --codec, a model of one or three channels takes pixels.
    is_latent = codec is not None or channels not in (1, 3)
    spec = parse_codec(codec) if codec else CodecSpec("kl", known.vae) if is_latent else CodecSpec("pixels")
    factor = VAE_FACTOR
    sha256 = None

    # Only a codec that is named is loaded: the usual one's factor is known, and its weights may not be here.
    if codec is not None:
        loaded = CODECS[spec.name].load(spec.source)
        side, _, found = loaded.latent_shape((MAX_FACTOR, MAX_FACTOR, 3))
        factor = MAX_FACTOR // side
        sha256 = loaded.sha256
        if found != channels:
            raise UserError(
                f"--codec={codec} has latents of {found} channels, the model {channels}; give the VAE with which it "
                "was trained"
            )

    # The data: ImageNet is known by its classes and size.
    shape = [height * factor, width * factor, 3] if is_latent else list(latent_shape)
    names = _check_class_names(class_names, architecture.num_classes)
    is_imagenet = architecture.num_classes == 1000 and shape[:2] == [256, 256]
    return {
        "dataset_name": "imagenet256" if is_imagenet else "published",
        "seed": 0,
        "model": {
            **dict(model),
            **known.settings,
            **(training_settings(source.jax_flow.config, architecture) if source.jax_flow else {}),
            **architecture.__dict__,
            "use_stable_vae": int(is_latent),
        },
        "objective": dict(known.objective),
        "dataset": {
            "name": "imagenet256" if is_imagenet else "published",
            "image_shape": shape,
            "latent_shape": list(latent_shape),
            "class_names": list(names),
            **describe_codec(spec, sha256),
        },
        "imported": {"source": source_name, "family": family, "tensors": len(source.state)},
    }


def _check_class_names(names: Sequence[str] | None, num_classes: int) -> Sequence[str]:
    # A model of 1000 classes is taken for one of ImageNet.
    if names is None:
        return imagenet_class_names() if num_classes == 1000 else [str(label) for label in range(num_classes)]
    if len(names) != num_classes:
        raise BadFileError(f"it has {num_classes} classes, but --class_names names {len(names)}")
    return names


def _refuse_several(load_dir: str | Path) -> None:
    """Raises UserError where several processes would make the same run."""
    if jax.process_count() > 1:
        command = write_command("sample.py", "--load_dir", load_dir)
        raise UserError(f"--load_dir={load_dir} is no run here yet; make it one by one process first: {command}")


def fetch_run(load_dir: str, folder: Path) -> None:
    """Downloads hf:USER/NAME or hf:USER/NAME@REVISION, and makes a run of it in `folder`.

    Raises UserError where that fails, and for a model that was not exported here.
    """
    # The folder first: nothing is downloaded for one that cannot be used.
    check_new_run(folder)
    _refuse_several(load_dir)
    hub_id, _, revision = load_dir.removeprefix(HUB_PREFIX).partition("@")
    source = read_source(str(fetch(hub_id, revision or None)), f"--load_dir={load_dir}")
    if source.run is None:
        command = write_command("convert_checkpoint.py", "--source", hub_id, "--family", "sit", "--out", folder)
        raise UserError(
            f"--load_dir={load_dir} is no model of this suite; make a run of it (or --family dit): {command}"
        )
    import_run(load_dir, source, folder, {})
    log(f"{load_dir} is in {folder}")


def import_file(file: Path, folder: Path, codec: str | None) -> None:
    """Makes a run of a published file in `folder`, unless there is one of the same file.

    Raises UserError where the file does not say enough, and where the run is of another file, codec or content.
    """
    shown = f"--load_dir={file}"
    identity = {"source": str(file.absolute()), "modified": file.stat().st_mtime_ns}
    if has_checkpoints(folder):
        checkpoints = Checkpoints(folder)
        _, saved = checkpoints.restore_newest(checkpoints.restore_config, checkpoints.steps())
        recorded = saved.get("imported", {})
        if recorded.get("source") != identity["source"]:
            raise UserError(f"{shown} would be kept in {folder}, another run; rename the file, or give the run")
        anew = f"move {folder} away, and the same command imports it anew"
        if recorded.get("modified", identity["modified"]) != identity["modified"]:
            raise UserError(f"{shown} has changed since it was imported; {anew}")
        own = saved["dataset"]["codec"]
        if codec is not None and is_other_codec(choose_codec(own, codec), own):
            raise UserError(f"--codec={codec} is another VAE than that with which {file} was imported; {anew}")
        return

    # What the import cannot know is asked for in words that can be typed.
    _refuse_several(file)
    source = read_source(str(file), shown)
    if source.run is None and source.family is None:
        command = write_command("convert_checkpoint.py", "--source", file, "--family", "sit", "--out", folder)
        raise UserError(f"{shown}: no tensor tells DiT from SiT; make a run of it (or --family dit): {command}")
    if source.run is None and codec is None and FAMILIES[source.family or ""].vae is None:
        command = write_command("convert_checkpoint.py", "--source", file, "--vae", "VAVAE.pt", "--out", folder)
        raise UserError(
            f"{shown} is a {FAMILIES[source.family or ''].title}'s: name the autoencoder of its latents with "
            f"--codec kl:FILE, or make a run of it first: {command}"
        )
    import_run(identity["source"], source, folder, {}, codec=None if source.run else codec, file=identity)
    log(f"{shown} is in {folder}")
