"""The page of report.py: one HTML file that opens from disk, with its data, its script and plotly's."""

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from utils.base.files import write_text
from utils.pages.report_data import to_script

FOLDER = Path(__file__).parent
FILES = ("report.html", "report.css", "report_charts.js", "report.js")


def render_page(content: Mapping[str, Any]) -> str:
    """Returns the page of what `report_data.gather` has returned."""
    # The script in two files, one of which would be too long to read.
    parts = {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES}
    template = Template(parts["report.html"])
    script = parts["report_charts.js"] + parts["report.js"]
    return template.substitute(css=parts["report.css"], js=script, plotly=get_plotlyjs(), data=to_script(content))


def write_page(out: Path, content: Mapping[str, Any]) -> None:
    """Writes the page, whole or not at all. Raises WriteError where the system does not let it."""
    write_text(out, render_page(content))
