"""The page of report.py: one HTML file that opens from disk, with its data, its script and plotly's."""

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from utils.base.files import write_text
from utils.base.pages import hash_source, read_part, read_style
from utils.report.data import to_script


def render_page(content: Mapping[str, Any]) -> str:
    """Returns the page of what `data.gather` has returned."""
    # The page's own script is in two files, one of which would be too long to read.
    own = read_part(__file__, "charts.js") + read_part(__file__, "report.js")
    scripts = {"js": own, "plotly": get_plotlyjs()}
    hashes = " ".join(map(hash_source, scripts.values()))
    style = read_style(__file__, "report.css")
    template = Template(read_part(__file__, "report.html"))
    return template.substitute(scripts, css=style, data=to_script(content), hashes=hashes)


def write_page(out: Path, content: Mapping[str, Any]) -> None:
    """Writes the page, whole or not at all. Raises WriteError where the system does not let it."""
    write_text(out, render_page(content))
