"""Settings from a file, below those of the command line: --config FILE."""

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from absl import flags

from utils.base.external import BadFileError, read_bounded
from utils.base.messages import UserError
from utils.base.settings import flatten_groups, suggest_name
from utils.flags.definitions import JoinedFlag
from utils.flags.reading import FILE_VALUE, FileValue, check_value
from utils.runs.config import START_SETTINGS

FLAGS = flags.FLAGS
MAX_BYTES = 2**22  # a run's config.json also lists its classes
# Without one of these, the file's own name of a run would lead back into that run's folder.
FOLDER_FLAGS = ("save_dir", "wandb.name")


def expand_config_file(argv: Sequence[str], names: Collection[str]) -> tuple[list[str], dict[str, FileValue]]:
    """Returns (argv, found): the command line with the settings of its --config FILE put in front of its own words,
    which override them; and {flag: what the file has}.

    `names` are the known flags. FILE is YAML or JSON: the config.json of a run, or a few settings, with `group.name`
    nested or dotted. Raises UserError if the file cannot be read, names an unknown flag, or has a value that a flag
    cannot have.
    """
    path = find_value(argv, "config")
    if path is None:
        return list(argv), {}

    # All that the file has; of a run's own file, without what belongs to one start of that run.
    settings = read_settings_file(Path(path).expanduser())
    is_run = isinstance(settings.get("dataset.image_shape"), list)  # only a run's own file records its data
    if is_run:
        settings = {name: value for name, value in settings.items() if name in names and name not in START_SETTINGS}
        if not any(find_value(argv, flag) for flag in FOLDER_FLAGS):
            raise UserError(
                f"--config={path} is the configuration of a run: name the folder of the new one with --save_dir, or "
                "continue that run with --save_dir alone"
            )

    # In front of the command line's own words: of a flag that is given twice, the last value counts.
    words, found = [], {}
    try:
        for name, value in settings.items():
            if value is not None:
                text = write_value(name, value, names)
                is_typed = find_value(argv, name) is not None
                if not (is_typed and isinstance(FLAGS[name], JoinedFlag)):  # whose values would be joined
                    words.append(f"--{name}={text}")
                found[name] = FileValue(read_value(name, text), is_run, is_typed)
    except UserError as error:
        raise UserError(f"--config={path}: {error}") from None
    return [argv[0], *words, *argv[1:]], found


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


def record_file_values(found: Mapping[str, FileValue]) -> None:
    """Records on the parsed flags what the file has. A setting that is recorded of a run counts as not given: it is no
    mistake if it has no effect beside a typed one."""
    for name, value in found.items():
        setattr(FLAGS[name], FILE_VALUE, value)
        if value.is_recorded and not value.is_typed:
            FLAGS[name].present = 0


class SettingsLoader(yaml.SafeLoader):
    """Reads YAML, and refuses a name that stands twice in one mapping: the last would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key.value, str):
                if key.value in names:
                    raise UserError(f"line {key.start_mark.line + 1}: {key.value} is given twice; give it once")
                names.add(key.value)
        return super().construct_mapping(node, deep)


def read_settings_file(path: Path) -> dict[str, Any]:
    """Returns {name: value} of a YAML or JSON file, groups as group.name.

    Raises UserError if it cannot be read, is too large, is no mapping, or has a setting twice.
    """
    try:
        content = yaml.load(read_bounded(path, MAX_BYTES), SettingsLoader)
        if not isinstance(content, dict):
            raise UserError("there are no settings in it; write one a line, such as batch_size: 64")
        return flatten_groups(content)
    except UserError as error:
        raise UserError(f"--config={path}: {error}") from None
    except (BadFileError, OSError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--config={path} cannot be read ({reason}); give a YAML or JSON file of settings") from None


def write_value(name: str, value: Any, names: Collection[str]) -> str:
    """Returns the value of a setting as it is written on a command line.

    Raises UserError for a name that is not among `names`, and for several values where the flag takes one.
    """
    # A misspelt setting would silently do nothing.
    if name not in names:
        raise UserError(f"{name} is no setting{suggest_name(name, names)} (--help lists the flags)")
    if name == "config":
        raise UserError(f"config={value} names another file, which is not read; give one file, with --config")
    # Only a list may have several values; its commas separate them, so one that is part of a value is quoted.
    flag = FLAGS[name]
    if isinstance(value, list) and (isinstance(flag.parser, flags.ListParser) or isinstance(flag.default, tuple)):
        row = io.StringIO()
        csv.writer(row, lineterminator="").writerow(value)
        return row.getvalue()
    if isinstance(value, (list, dict)):
        raise UserError(f"{name}={value} is no single value; give one")
    return str(value)


def read_value(name: str, text: str) -> Any:
    """Returns the value of a flag that is written so. Raises UserError for one that the flag cannot have."""
    # Apart from the command line's own words, so that the message can name the file.
    try:
        value = FLAGS[name].parser.parse(text)
    except ValueError as error:
        raise UserError(f"{name}={text}: {error}") from None
    return check_value(name, value)
