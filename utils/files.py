"""Where files are kept between runs, and how one is written whole."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """`flow-matching/` in $XDG_CACHE_HOME or ~/.cache; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flow-matching"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON so that a reader, or a kill, never meets half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
