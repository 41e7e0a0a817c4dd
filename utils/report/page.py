"""The page of report.py: one HTML file that opens from disk, with its data, its script and plotly's."""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from utils.base.files import write_text
from utils.report.data import to_script

FOLDER = Path(__file__).parent
FILES = ("report.html", "report.css", "charts.js", "report.js")


def render_page(content: Mapping[str, Any]) -> str:
    """Returns the page of what `data.gather` has returned."""
    # The script in two files, one of which would be too long to read.
    parts = {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES}
    template = Template(parts["report.html"])
    scripts = {"js": parts["charts.js"] + parts["report.js"], "plotly": get_plotlyjs()}
    hashes = " ".join(f"'sha256-{_hash_text(script)}'" for script in scripts.values())
    return template.substitute(scripts, css=parts["report.css"], data=to_script(content), hashes=hashes)


def _hash_text(text: str) -> str:
    """Returns the hash of a script as a policy names it (Content Security Policy Level 3, section 2.3.1)."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_page(out: Path, content: Mapping[str, Any]) -> None:
    """Writes the page, whole or not at all. Raises WriteError where the system does not let it."""
    write_text(out, render_page(content))
