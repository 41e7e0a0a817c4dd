"""The size and shape of the code beside its goals, as a Markdown table: `python benchmarks/structure.py`."""

import ast
import graphlib
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOALS = {
    "files from an image to its loss": 12,
    "lines of these files": 2200,
    "longest function, lines": 60,
    "longest file, lines": 450,
    "lines with a comment, % (at least)": 7,
    "packed assignments per 1,000 lines": 4,
    'docstrings that open with "What" or "Of"': 0,
    "import cycles": 0,
    "README, words": 900,
}


def measure_structure(root: Path = ROOT) -> dict[str, float | None]:
    """The figures of a checkout, by the names of GOALS: of the programs, the network and `utils/`. None where
    docs/layout.md has no list "From an image to its loss"."""
    paths = [*root.glob("*.py"), *(root / "utils").rglob("*.py")]
    files = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    trees = {name: ast.parse(text) for name, text in files.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    lengths = {name: text.count("\n") for name, text in files.items()}
    total = sum(lengths.values())

    section = (
        (root / "docs/layout.md")
        .read_text(encoding="utf-8")
        .partition("From an image to its loss")[2]
        .partition("\n## ")[0]
    )
    listed = dict.fromkeys(re.findall(r"^(?:- |\d+\. |\| ?)`([\w/]+\.py)`", section, flags=re.MULTILINE))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    comments = [
        token
        for text in files.values()
        for token in tokenize.generate_tokens(iter(text.splitlines(True)).__next__)
        if token.type == tokenize.COMMENT
    ]
    packed = [
        node
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
    ]
    documented = [node for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    openings = [(ast.get_docstring(node) or "").partition(" ")[0] for node in documented]
    values = [
        len(listed) or None,
        sum(lengths[name] for name in listed) or None,
        max((node.end_lineno or 0) - node.lineno + 1 for node in functions),
        max(lengths.values()),
        100 * len(comments) / total,
        1000 * len(packed) / total,
        openings.count("What") + openings.count("Of"),
        count_cycles(trees),
        len((root / "README.md").read_text(encoding="utf-8").split()),
    ]
    return dict(zip(GOALS, values, strict=True))


def count_cycles(trees: dict[str, ast.Module]) -> int:
    """1 if some files import each other, within functions included; else 0."""
    arrows = {}
    for name, tree in trees.items():
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                imported |= {start + alias.name for alias in node.names}
        arrows[name] = {f"{module.replace('.', '/')}.py" for module in imported} & trees.keys()
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError:
        return 1
    return 0


if __name__ == "__main__":
    print("| | here | goal |\n|---|---:|---:|")
    for name, value in measure_structure().items():
        here = "docs/layout.md has no such list" if value is None else f"{value:,.1f}".removesuffix(".0")
        print(f"| {name} | {here} | {GOALS[name]:,} |")
