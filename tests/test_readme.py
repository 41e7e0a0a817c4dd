"""The README's and the docs' commands are read by the programs' own flags, and the table of flags is theirs."""

import importlib
import re
import shlex

import pytest

import compute_fid_stats
import convert_checkpoint
import encode_latents
import eval_fid
import likelihood
import make_pairs
import plot_metrics
import sample
import train_flow
from tests.conftest import ROOT, run_program

PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
PAGES |= {path: path.read_text() for path in (ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md")}
PROGRAMS = {
    "train_flow.py": train_flow,
    "eval_fid.py": eval_fid,
    "encode_latents.py": encode_latents,
    "compute_fid_stats.py": compute_fid_stats,
    "plot_metrics.py": plot_metrics,
    "convert_checkpoint.py": convert_checkpoint,
    "likelihood.py": likelihood,
    "make_pairs.py": make_pairs,
    "sample.py": sample,
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
def test_python_commands_are_understood(command, read_flags):
    words = shlex.split(command.partition(" | ")[0], comments=True)
    if words[1] == "-c":
        compile(words[2], "README.md", "exec")
        return
    assert words[1] in PROGRAMS, command
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


def test_the_recipes_commands_resolve_to_what_they_name(read_flags):
    for command, patch, vae in zip(RECIPE, (2, 2, 8), (1, 1, 0), strict=True):
        model = read_flags(train_flow, shlex.split(command)[2:]).model
        sizes = (
            model.hidden_size,
            model.depth,
            model.num_heads,
            model.mlp_ratio,
            model.patch_size,
            model.use_stable_vae,
        )
        assert sizes == (768, 12, 16, 4, patch, vae)


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
