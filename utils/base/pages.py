"""Parts of the pages of report.py and app.py: files beside their modules, colours, and the hashes of their policies."""

import base64
import hashlib
from pathlib import Path

from utils.base.files import read_bytes


def read_part(module: str, name: str) -> str:
    """Returns the text of a part of a page, which lies beside the module whose __file__ this is."""
    return read_bytes(Path(module).with_name(name)).decode()


def read_style(module: str, name: str) -> str:
    """Returns a page's style: the colours of all pages, then its own."""
    return read_part(__file__, "page.css") + read_part(module, name)


def hash_source(text: str) -> str:
    """Returns a script or a style as a policy names it (Content Security Policy Level 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
