"""Makes runs of published checkpoints, and published checkpoints of runs.

    python convert_checkpoint.py --source SiT-XL-2-256.pt --family sit --out runs/sit-xl
    python convert_checkpoint.py --source facebook/DiT-XL-2-256 --out runs/dit-xl
    python convert_checkpoint.py --source checkpoint.pkl --family jax-flow --out runs/old
    python convert_checkpoint.py --load_dir runs/demo --out demo.safetensors
    python convert_checkpoint.py --load_dir runs/demo --out demo --push USER/demo

No pickle is executed, and PyTorch is not needed. docs/converting.md says which files are read, and how to score them.
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from utils.base.commands import write_command
from utils.base.external import BadFileError, read_bounded
from utils.base.messages import UserError, log, show_result
from utils.codecs.codecs import codec_of_vae
from utils.conditions.condition import recorded_kind, restore_condition
from utils.convert.published import FAMILIES
from utils.convert.sources import read_source
from utils.flags import program
from utils.flags.definitions import define_params_flag, define_path, define_quiet_flag, define_saved_model_flags
from utils.flags.effects import RULES, check_effects
from utils.flags.help import hide, topic
from utils.runs.export import check_export, export_run, push
from utils.runs.importing import check_new_run, import_run
from utils.runs.model_card import example_fields
from utils.runs.pool import FILE as POOL

MAX_NAMES_BYTES = 2**24  # of --class_names


def define_flags() -> None:
    define_path("out", None, "Folder of the new run; of --load_dir: a file X.safetensors, or a folder for the hub.")
    define_quiet_flag()
    # One direction ...
    with topic("Published to run"):
        define_path(
            "source",
            None,
            "Published checkpoint: .pt, .bin, .safetensors, jax-flow's .pkl; a folder of diffusers; a hub id.",
        )
        flags.DEFINE_enum("family", None, list(FAMILIES), "Whose checkpoint it is, where the file does not say.")
        flags.DEFINE_integer("num_heads", None, "Attention heads; default: those of the published model that wide.", 1)
        define_path("class_names", None, "Text file with a class name a line; default: ImageNet's of 1,000.")
        define_path("vae", None, "VAE of its latents, as kl: takes it; default: that of the publication.")
    # ... and the other.
    with topic("Run to published"):
        define_path("load_dir", None, "Run to export; RUN/checkpoints/STEP for one of its checkpoints.")
        define_params_flag()
        flags.DEFINE_string("push", None, "Also upload the folder --out to this repository of the hub, USER/NAME.")
        flags.DEFINE_bool("private", False, "With --push: only you may read the repository.")
        define_path("picture", None, "Picture of the model card: a file, or none; default: samples, drawn.")
        flags.DEFINE_string("license", None, "Licence in the model card, by the hub's name: mit, cc-by-4.0, other.")
    define_saved_model_flags()  # what a checkpoint does not say has their defaults
    hide(["model.dtype"])


def read_class_names(path: str) -> list[str]:
    """Returns the lines of a text file. Raises UserError if it has none, or if a line is empty or there twice."""
    try:
        names = read_bounded(Path(path), MAX_NAMES_BYTES).decode().splitlines()
    except (BadFileError, UnicodeDecodeError) as error:
        raise UserError(f"--class_names={path}: {error}; give a text file with a name a line") from None

    # Classes are asked for by name, so each has to have one of its own.
    if not names or not all(map(str.strip, names)) or len(set(names)) != len(names):
        raise UserError(f"--class_names={path}: every line must hold a name of its own")
    return names


def import_checkpoint(config: ConfigDict) -> None:
    """Makes a run of --source in the folder --out, and logs what it is and how to sample it."""
    # Refusals first: a published file may have gigabytes.
    check_new_run(Path(config.out))
    source = read_source(config.source)
    check_effects(RULES["convert_checkpoint.source"], config, is_exported=source.run is not None)
    saved = import_run(
        config.source,
        source,
        Path(config.out),
        config.model.to_dict(),
        family=config.family,
        num_heads=config.num_heads,
        class_names=read_class_names(config.class_names) if config.class_names else None,
        codec=codec_of_vae(config.vae) if config.vae else None,
    )

    # What it is: most of it was read from the shapes of tensors, for the user to compare.
    model = saved["model"]
    data = saved["dataset"]
    names = data.get("class_names", ())
    given = f"{len(names)} classes" if names else f"the condition {recorded_kind(data)!r}"
    log(
        f"{model['hidden_size']} wide, {model['depth']} deep, {model['num_heads']} heads, patch {model['patch_size']} "
        f"on {'x'.join(map(str, data['latent_shape']))}, {given}, objective "
        f"{saved['objective']['name']}, time times {model['timestep_scale']:g}"
    )
    if model["learned_positions"]:
        log("its position table has been trained: it is kept")
    is_latent = data["codec"]["name"] != "pixels"
    if is_latent:
        log(f"latents of {data['codec']['source'] or 'a VAE that is not read here: give --vae'}")

    # How it is sampled.
    family = FAMILIES.get(saved.get("imported", {}).get("family"), FAMILIES["dit"])
    guidance = list(family.guidance) if is_latent else []
    condition = restore_condition(data)
    if condition.DRAWS_ROWS:
        log(f"without {POOL}, rows of its data: give conditions, or copy that of the run it was exported from")
        fields = ",".join(f"{name}={text}" for name, text in example_fields(condition).items())
        guidance += ["--condition", fields] if fields else ["--condition_file", "FILE.npz"]
    log(f"samples: {write_command('sample.py', '--load_dir', config.out, *guidance, '--num_samples', 4)}")
    show_result(config.out)


def export_checkpoint(config: ConfigDict) -> None:
    """Writes the run of --load_dir to --out under the published names, and uploads it with --push."""
    out = Path(config.out)
    if config.push and out.suffix == ".safetensors":
        raise UserError(f"--push={config.push}: --out={out} is a file; give a folder")
    check_export(config.push, config.license)
    # On disk first: the hub gets what has been written.
    written = export_run(
        config.load_dir, out, config.params, config.push, picture=config.picture, licence=config.license
    )
    for path in written:
        show_result(str(path))
    if config.push:
        show_result(push(written, config.push, config.private))


def main(config: ConfigDict) -> None:
    if bool(config.source) == bool(config.load_dir):
        raise UserError("give one of --source (a published checkpoint) and --load_dir (a run to export)")
    if not config.out:
        raise UserError("--out is not given: name a folder for the run, or a file X.safetensors for the export")
    # The direction is known: flags of the other one are refused.
    check_effects(RULES["convert_checkpoint"], config)
    if config.source:
        import_checkpoint(config)
    else:
        export_checkpoint(config)


if __name__ == "__main__":
    program.run_program(define_flags, main)
