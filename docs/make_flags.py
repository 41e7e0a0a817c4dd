"""Writes docs/flags.md from the flags that the programs define: `make docs`."""

import sys
from pathlib import Path

from absl import flags

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import compute_fid_stats  # noqa: E402
import encode_latents  # noqa: E402
import eval_fid  # noqa: E402
import train_flow  # noqa: E402

PROGRAMS = (train_flow, eval_fid, encode_latents, compute_fid_stats)
HEAD = """# Flags

Made by `make docs` from the flags themselves. A value that is not a default is given as `--name value`; a misspelt name
is answered with the nearest one.
"""


def describe(program) -> list[str]:
    """A row for every flag that the program defines. The flags are gone again afterwards."""
    builtin = set(flags.FLAGS)
    program.define_flags()
    names = sorted(set(flags.FLAGS) - builtin, key=lambda name: ("." in name, name))
    rows = []
    for name in names:
        flag = flags.FLAGS[name]
        default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
        shown = "" if default in (None, "") else f"`{default}`"
        rows.append(f"| `--{name}` | {shown} | {flag.help.replace('|', chr(92) + '|')} |")
        delattr(flags.FLAGS, name)
    return rows


def make_text() -> str:
    """The whole page."""
    sections = [HEAD]
    for program in PROGRAMS:
        table = ["| flag | default | meaning |", "|---|---|---|", *describe(program)]
        sections.append(f"## {Path(program.__file__).name}\n\n" + "\n".join(table) + "\n")
    return "\n".join(sections)


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(make_text())
