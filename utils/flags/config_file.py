"""Settings from a file, below those of the command line: --config FILE."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from utils.base.errors import UserError
from utils.base.external import BadFileError, read_bounded

MAX_BYTES = 2**22
# Flags of a start rather than of a run: not taken from another run's config.json.
OF_A_START = ("config", "save_dir", "plan", "profile", "coordinator_address", "num_processes", "process_id")
FOLDER_FLAGS = ("save_dir", "wandb.name")


def expand_config_file(argv: Sequence[str], names: Collection[str]) -> tuple[list[str], set[str]]:
    """Returns (a command line with the settings of its --config FILE in front of its own words, which win; the settings
    that a run's own file gives, which nobody has typed: those without effect are no mistake).

    `names` are the flags there are. FILE is YAML or JSON: a run's config.json as it is, or a few settings, `group.name`
    nested or with a dot. Raises UserError for a file that cannot be read, and for names that are no flags.
    """
    path = find_value(argv, "config")
    if path is None:
        return list(argv), set()
    # What the file has, but for what belongs to one start of a run.
    settings = read_settings_file(Path(path).expanduser())
    untyped: set[str] = set()
    if isinstance(settings.get("dataset.image_shape"), list):  # a run's own file
        settings = {name: value for name, value in settings.items() if name in names and name not in OF_A_START}
        if not any(find_value(argv, flag) for flag in FOLDER_FLAGS):
            raise UserError(
                f"--config={path} is the configuration of a run: name the folder of the new one with --save_dir, or "
                "continue that run with --save_dir alone"
            )
        untyped = {name for name in settings if find_value(argv, name) is None}
    # A misspelt setting would be without effect.
    unknown = sorted(settings.keys() - set(names))
    if unknown:
        raise UserError(f"--config={path}: {unknown[0]} is no setting (--help lists the flags)")
    words = [f"--{name}={write_value(value)}" for name, value in settings.items() if value is not None]
    return [argv[0], *words, *argv[1:]], untyped


def find_value(argv: Iterable[str], flag: str) -> str | None:
    """Returns the last value of a flag on a command line, written --flag value or --flag=value."""
    value, is_next = None, False
    for word in argv:
        if is_next:
            value = word
        name, equals, rest = word.partition("=")
        is_flag = name in (f"--{flag}", f"-{flag}")
        is_next = is_flag and not equals
        if is_flag and equals:
            value = rest
    return value


def read_settings_file(path: Path) -> dict[str, Any]:
    """Returns {name: value} of a YAML or JSON file, groups as group.name."""
    try:
        content = yaml.safe_load(read_bounded(path, MAX_BYTES))
    except (BadFileError, OSError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--config={path} cannot be read ({reason}); give a YAML or JSON file of settings") from None
    if not isinstance(content, dict):
        raise UserError(f"--config={path} has no settings; write one a line, such as batch_size: 64")
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{leaf}": leaf_value for leaf, leaf_value in value.items()}
        else:
            flat[str(name)] = value
    return flat


def write_value(value: Any) -> str:
    """Returns a setting's value as on a command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)
