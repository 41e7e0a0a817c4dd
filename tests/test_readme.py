"""The README's and the docs' commands are read by the programs' own flags; the table of flags and the layout of the
code are those of the code."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import app
import compute_fid_stats
import convert_checkpoint
import edit
import encode_latents
import eval_fid
import likelihood
import make_pairs
import plot_metrics
import report
import sample
import train_flow
from benchmarks.recognise_digits import recognised_fraction
from tests.conftest import ROOT, run_program
from utils.flags import reading

PAGES = {
    path: path.read_text()
    for path in [ROOT / "README.md", *sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])]
}
PAGES |= {path: path.read_text() for path in (ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md")}
PROGRAMS = {
    "train_flow.py": train_flow,
    "eval_fid.py": eval_fid,
    "encode_latents.py": encode_latents,
    "compute_fid_stats.py": compute_fid_stats,
    "plot_metrics.py": plot_metrics,
    "report.py": report,
    "convert_checkpoint.py": convert_checkpoint,
    "likelihood.py": likelihood,
    "make_pairs.py": make_pairs,
    "sample.py": sample,
    "edit.py": edit,
    "app.py": app,
    "data/celebahq256.py": None,  # needs TFDS
}
BLOCKS = [
    block
    for text in PAGES.values()
    for block in re.findall(r"^```(?:bash)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
]
COMMANDS = [
    line
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"(python|make|pip|conda|tfds) ", line)
]
RECIPE = [
    "python train_flow.py --dataset_name imagenet256 --wandb.name DiT-B --model.depth 12 --model.hidden_size 768 "
    "--model.patch_size 2 --model.num_heads 16 --model.mlp_ratio 4 --batch_size 512",
    "python train_flow.py --dataset_name celebahq256 --wandb.name DiT-B-CelebA --model.depth 12 "
    "--model.hidden_size 768 --model.patch_size 2 --model.num_heads 16 --model.mlp_ratio 4 --batch_size 512",
    "python train_flow.py --dataset_name celebahq256 --wandb.name DiT-B-CelebAPixel --model.depth 12 "
    "--model.hidden_size 768 --model.patch_size 8 --model.num_heads 16 --model.mlp_ratio 4 --batch_size 512 "
    "--use_stable_vae 0",
]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("python ")])
def test_python_commands_are_understood(command, read_flags, monkeypatch):
    words = shlex.split(command.partition(" | ")[0], comments=True)
    if words[1] == "-c":
        compile(words[2], "README.md", "exec")
        return
    if words[1].startswith("benchmarks/"):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        read_flags(importlib.import_module(Path(words[1]).stem), words[2:])
        return
    assert words[1] in PROGRAMS, command
    # Buckets of examples are not asked for.
    monkeypatch.setattr(reading, "local_copy", lambda url, flag: url)
    monkeypatch.setattr(reading, "stage_output", lambda url, flag: url)
    if words[1] == "data/celebahq256.py":
        pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    read_flags(PROGRAMS[words[1]] or importlib.import_module("data.celebahq256"), words[2:])


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = {shlex.split(line, comments=True)[1] for line in COMMANDS if line.startswith("make ")}
    assert {"demo", "test"} <= used <= targets


def test_the_recipes_commands_stand_there_as_written():
    commands = [" ".join(line.split()) for line in COMMANDS]
    assert [command for command in RECIPE if command not in commands] == []


def test_the_recipes_commands_resolve_to_what_they_name(configure):
    for command, patch, vae in zip(RECIPE, (2, 2, 8), (1, 1, 0), strict=True):
        model = configure(shlex.split(command)[2:]).to_json()["model"]
        names = ("hidden_size", "depth", "num_heads", "mlp_ratio", "patch_size", "use_stable_vae")
        assert tuple(model[name] for name in names) == (768, 12, 16, 4, patch, vae)


def test_the_table_of_flags_is_that_of_the_programs():
    done = run_program("-c", "import sys; sys.path.insert(0, 'docs'); import make_flags; print(make_flags.make_text())")
    assert done.stdout.rstrip() == PAGES[ROOT / "docs" / "flags.md"].rstrip(), "run `make docs`"


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_lists_every_flag(program):
    if program == "data/celebahq256.py":
        pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    done = run_program(program, "--help")
    table = PAGES[ROOT / "docs" / "flags.md"].partition(f"## {program}\n")[2].partition("\n## ")[0]
    names = re.findall(r"^\| `--([\w.]+)`", table, flags=re.MULTILINE) or ["source", "data_dir", "file_format"]
    assert [
        name for name in names if not re.search(rf"^ +--(?:\[no\])?{re.escape(name)}:", done.stdout, re.MULTILINE)
    ] == []


def test_images_and_pages_named_are_there():
    for page, text in PAGES.items():
        for path in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / path).exists(), f"{page.name}: {path}"
    assert "not measured yet" not in PAGES[ROOT / "README.md"]


@pytest.mark.slow
def test_the_first_three_commands_give_digits(tmp_path):
    """As typed, one after the other; a classifier of the real digits recognises what they draw."""
    section = PAGES[ROOT / "README.md"].partition("## Train, sample, evaluate\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^python (.*)$", section, flags=re.MULTILINE)
    environment = {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}

    def run(line):
        program, *words = shlex.split(line)
        done = subprocess.run(
            [sys.executable, ROOT / program, *words], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]

    for command in commands:
        run(command)
    names = {path.name for path in (tmp_path / "runs" / "digits" / "samples").iterdir()}
    assert {"grid.png", "film.webp", "strip.png"} <= names
    rows = json.loads((tmp_path / "runs" / "digits" / "fid.json").read_text())["cells"]
    assert [(row["num_steps"], row["cfg_scale"]) for row in rows] == [
        (64, None), (16, None), (4, None), (64, 2), (16, 2), (4, 2)
    ]  # fmt: skip
    run(f"{commands[1]} --save_samples chosen.npz")
    run("sample.py --load_dir runs/digits --classes all --num_samples 100 --cfg_scale 2 --save_samples all.npz")
    for name in ("chosen.npz", "all.npz"):
        with np.load(tmp_path / name) as samples:
            assert recognised_fraction(samples["arr_0"], samples["arr_1"]) >= 0.9


def read_layout() -> dict[str, list[str]]:
    """{package: its files} of docs/layout.md, from the top down; the programs are a package of their own."""
    plan = re.findall(r"^```\n(.*?)^```", PAGES[ROOT / "docs" / "layout.md"], flags=re.DOTALL | re.MULTILINE)[0]
    packages: dict[str, list[str]] = {}
    for line in plan.splitlines():
        if line and not line.startswith(" "):
            package = packages.setdefault(line.split()[0], [])
            folder = line.split()[0] if line.startswith("utils/") else ""
        elif line:
            name = line.split()[0]
            package.append(name if (ROOT / name).is_file() else folder + name)
    return packages


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a file imports, by their paths from the root."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    paths = {f"{name.replace('.', '/')}.py" for name in names}
    return {name for name in paths if (ROOT / name).is_file()}


def test_the_layout_names_every_module_and_imports_point_downwards():
    packages = read_layout()
    ranks = {name: rank for rank, names in enumerate(packages.values()) for name in names}
    there = {path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py")]}
    assert set(ranks) == there - {"utils/__init__.py"}
    assert set(PROGRAMS) - {"data/celebahq256.py"} == set(packages["programs"])
    for name, rank in ranks.items():
        imported = imported_modules(ROOT / name) & set(ranks)
        lowest = rank + (rank == 0)  # programs do not import each other
        assert {other for other in imported if ranks[other] < lowest} == set(), name
    readers = {name for name in ranks if "flags.FLAGS" in (ROOT / name).read_text()}
    assert {name for name in readers if not name.startswith("utils/flags/")} == set()
