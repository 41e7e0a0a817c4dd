"""hf:USER/NAME[:CONFIG[:SPLIT]]: parquet files of a data set on the Hugging Face hub, kept in the hub's own cache.

A data set that holds no parquet has the hub's conversion of it, on the branch refs/convert/parquet.
"""

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from utils.base.external import BadFileError, read_bounded
from utils.base.messages import UserError, download_bar, printable
from utils.storage.archive import explaining
from utils.storage.parquet_files import ParquetTree
from utils.storage.parts import LocalFile

CONVERTED = "refs/convert/parquet"
NAME = re.compile(r"[\w.-]+/[\w.-]+")
CARD = "README.md"
MAX_CARD_BYTES = 2**22
FIRST_ANSWER = 10  # seconds within which the hub has to answer for the first time


def open_hub(source: str) -> ParquetTree:
    """Opens a data set on the hub; only the files of the configuration, and of the split, are fetched.

    With SPLIT, a part of that split is held out. Raises UserError where there is no such data set, configuration or
    split, or no way to the hub.
    """
    name, config, split = [*source.partition(":")[2].split(":", 2), "", ""][:3]
    flag = f"--dataset_name={source}"
    if not NAME.fullmatch(name):
        raise UserError(f"{flag}: {printable(name)} is no data set on the hub; give hf:USER/NAME")
    folder, files, revision = _list_files(flag, name)
    chosen = choose_files(flag, files, _read_card(folder, flag, name, revision), config, split)
    if folder is None:
        folder = _fetch(flag, name, revision, [path for path, _ in chosen])
    with explaining(source):
        return ParquetTree(source, [LocalFile(folder / path) for path, _ in chosen], [part for _, part in chosen])


def choose_files(
    flag: str, files: Sequence[str], card: dict[str, Any], config: str, split: str
) -> list[tuple[str, str | None]]:
    """Returns (path, split or None where its name tells) of the parquet files of a configuration.

    `card` is the header of the data set's README, whose `configs` say which file is of what. Raises UserError, which
    begins with `flag` and names the others, for a configuration or split that is not there.
    """
    configs = _read_configs(card)
    if configs:
        names = list(configs)
        chosen = config or ("default" if "default" in configs or len(configs) != 1 else names[0])
        if chosen not in configs:
            raise UserError(
                f"{flag}: its configurations are {', '.join(names)}; add one, as in hf:USER/NAME:{names[0]}"
            )
        found: list[tuple[str, str | None]] = [
            (path, part)
            for part, patterns in configs[chosen]
            for path in files
            if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
        ]
    else:
        # Without a header, folders are configurations: CONFIG/SPLIT/0000.parquet, as the hub converts them.
        tops = {path.split("/")[0] for path in files if path.count("/") > 1}
        if config and config not in tops | {"default"}:
            raise UserError(f"{flag} has no configuration {config}; there are {', '.join(sorted(tops)) or 'none'}")
        if not config and len(tops) > 1:
            config = "default" if "default" in tops else ""
            if not config:
                names = ", ".join(sorted(tops))
                raise UserError(f"{flag}: its configurations are {names}; add one, as in hf:USER/NAME:CONFIG")
        found = [(path, None) for path in files if not config or not tops or path.startswith(f"{config}/")]

    # One split alone is a data set of its own.
    if split:
        parts = {path: part or _split_of(path) for path, part in found}
        if split not in parts.values():
            raise UserError(f"{flag} has no split {split}; there are {', '.join(sorted(set(parts.values())))}")
        found = [(path, "") for path, _ in found if parts[path] == split]
    if not found:
        raise UserError(f"{flag} holds no parquet files; fetch its images, and give folder:PATH")
    return found


def _read_configs(card: dict[str, Any]) -> dict[str, list[tuple[str | None, list[str]]]]:
    """Returns {configuration: [(split or None, patterns of its files)]}; {} where the header does not say."""
    # `data_files` is a pattern, a list of them, or a list of {split, path}.
    configs: dict[str, list[tuple[str | None, list[str]]]] = {}
    found = card.get("configs")
    for each in found if isinstance(found, list) else ():
        files = each.get("data_files") if isinstance(each, dict) else None
        rows = files if isinstance(files, list) else [] if files is None else [files]
        parts: list[tuple[str | None, list[str]]] = []
        for row in rows:
            part, patterns = (row.get("split"), row.get("path")) if isinstance(row, dict) else (None, row)
            patterns = [patterns] if isinstance(patterns, str) else patterns
            if isinstance(patterns, list) and all(isinstance(pattern, str) for pattern in patterns):
                parts.append((part, patterns))
        if parts:
            configs[str(each.get("config_name", "default"))] = parts
    return configs


def _split_of(path: str) -> str:
    """Returns the split of SPLIT-00000-of-00002.parquet or SPLIT/0000.parquet."""
    file = PurePosixPath(path)
    match = re.match(r"(?:partial-)?([A-Za-z_]+)(?=[-.])", file.name)
    return match[1] if match else file.parent.name


def _list_files(flag: str, name: str) -> tuple[Path | None, list[str], str | None]:
    """Returns (folder of what is here already where there is no way to the hub, parquet files, revision)."""
    import huggingface_hub as hub

    # Parquet files of the data set itself, or of the hub's conversion.
    try:
        for revision in (None, CONVERTED):
            # One request, which is not tried again for half a minute where there is no network.
            info = hub.HfApi().dataset_info(name, revision=revision or "main", timeout=FIRST_ANSWER)
            paths = [file.rfilename for file in info.siblings or ()]
            if found := sorted(path for path in paths if path.endswith(".parquet")):
                return None, found, revision
        return None, [], None
    except hub.errors.RevisionNotFoundError:  # the hub has converted nothing
        return None, [], None
    except Exception as error:  # the hub's, its HTTP client's and the file system's share no type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    # Without a way to the hub, what was fetched before.
    for revision in (None, CONVERTED):
        for folder in _find_cached(name, revision or "main"):
            if found := sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")):
                return folder, found, revision
    raise UserError(
        f"{flag} cannot be fetched from the hub ({reason}); check the name, the network, and that you may read it"
    )


def _find_cached(name: str, revision: str) -> list[Path]:
    """Returns the folders of what is in the hub's cache of a revision of a data set."""
    import huggingface_hub as hub

    try:
        repositories = hub.scan_cache_dir().repos
    except hub.CacheNotFound:
        return []
    own = [each for each in repositories if (each.repo_id, each.repo_type) == (name, "dataset")]
    return [found.snapshot_path for each in own for found in each.revisions if revision in found.refs]


def _read_card(folder: Path | None, flag: str, name: str, revision: str | None) -> dict[str, Any]:
    """Returns the header of the data set's README; {} where it has none, and for the hub's conversion."""
    if revision is not None:
        return {}
    folder = folder or _fetch(flag, name, None, [CARD])
    try:
        # Between the first two lines of dashes.
        head = read_bounded(folder / CARD, MAX_CARD_BYTES).decode().split("---")
        card = yaml.safe_load(head[1]) if len(head) > 2 and not head[0].strip() else None
    except (BadFileError, ValueError, yaml.YAMLError, RecursionError):
        card = None
    return card if isinstance(card, dict) else {}


def _fetch(flag: str, name: str, revision: str | None, paths: list[str]) -> Path:
    """Fetches files into the hub's cache. Raises UserError where that fails."""
    import huggingface_hub as hub

    options: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "allow_patterns": paths}
    try:
        with download_bar(f"fetching {name}") as bar:
            return Path(hub.snapshot_download(name, tqdm_class=bar, **options))
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{flag} cannot be fetched from the hub ({reason}); give its command again") from None
