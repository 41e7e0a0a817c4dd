"""Settings from a file, below those of the command line: --config FILE."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from utils.base.external import BadFileError, read_bounded
from utils.base.messages import UserError
from utils.base.settings import flatten_groups
from utils.runs.config import START_SETTINGS

MAX_BYTES = 2**22  # a run's config.json also lists its classes
# Without one of these, the file's own name of a run would lead back into that run's folder.
FOLDER_FLAGS = ("save_dir", "wandb.name")


def expand_config_file(argv: Sequence[str], names: Collection[str]) -> tuple[list[str], set[str]]:
    """Returns (argv, untyped): the command line with the settings of its --config FILE put in front of its own words,
    which override them; and the names of the settings that come from a run's own file, which nobody has typed.

    `names` are the known flags. FILE is YAML or JSON: the config.json of a run, or a few settings, with `group.name`
    nested or dotted. An untyped setting without effect is no mistake. Raises UserError if the file cannot be read, or
    names an unknown flag.
    """
    path = find_value(argv, "config")
    if path is None:
        return list(argv), set()

    # All that the file has; of a run's own file, without what belongs to one start of that run.
    settings = read_settings_file(Path(path).expanduser())

    untyped: set[str] = set()
    if isinstance(settings.get("dataset.image_shape"), list):  # only a run's own file records its data
        settings = {name: value for name, value in settings.items() if name in names and name not in START_SETTINGS}
        if not any(find_value(argv, flag) for flag in FOLDER_FLAGS):
            raise UserError(
                f"--config={path} is the configuration of a run: name the folder of the new one with --save_dir, or "
                "continue that run with --save_dir alone"
            )
        # A saved setting may have no effect beside a typed one. As nobody has typed it, it is not refused.
        untyped = {name for name in settings if find_value(argv, name) is None}

    # A misspelt setting would silently do nothing.
    unknown = sorted(settings.keys() - set(names))
    if unknown:
        raise UserError(f"--config={path}: {unknown[0]} is no setting (--help lists the flags)")

    # In front of the command line's own words: of a flag that is given twice, the last value counts.
    words = [f"--{name}={write_value(value)}" for name, value in settings.items() if value is not None]
    return [argv[0], *words, *argv[1:]], untyped


def find_value(argv: Iterable[str], flag: str) -> str | None:
    """Returns the last value of a flag on a command line, written --flag value or --flag=value."""
    # By hand: absl can parse the words only once those of the file are among them.
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
    """Returns {name: value} of a YAML or JSON file, groups as group.name.

    Raises UserError if it cannot be read, is too large, or is no mapping.
    """
    try:
        content = yaml.safe_load(read_bounded(path, MAX_BYTES))
    except (BadFileError, OSError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--config={path} cannot be read ({reason}); give a YAML or JSON file of settings") from None
    if not isinstance(content, dict):
        raise UserError(f"--config={path} has no settings; write one a line, such as batch_size: 64")
    return flatten_groups(content)


def write_value(value: Any) -> str:
    """Returns the value of a setting as it is written on a command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)
