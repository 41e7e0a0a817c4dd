"""What pip installs, and that the pins are of the ranges."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

from packaging.requirements import Requirement

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def copy_checkout(folder):
    """What is to be packaged, in a folder of its own: setuptools leaves files behind."""
    names = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "tests", "wandb")
    return shutil.copytree(ROOT, folder, ignore=names)


def test_a_wheel_has_all_modules_even_beside_runs(tmp_path):
    copy_checkout(tmp_path / "checkout")
    (tmp_path / "checkout" / "runs").mkdir()  # a second top-level folder stops setuptools from guessing
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ".",
    ]
    subprocess.run(command, cwd=tmp_path / "checkout", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "utils").rglob("*.py")}
    modules |= {path.name for path in ROOT.glob("*.py")}
    data = {"data/imagenet_labels.txt", "data/fid_stats_digits.npz", "utils/py.typed"}
    assert (modules | data) - installed == set()
    assert not [name for name in installed if name.startswith(("tests/", "runs/", "benchmarks/"))]


def test_every_direct_dependency_is_pinned_within_its_range():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(re.match(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines if not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    requirements = [Requirement(text) for text in PROJECT["project"]["dependencies"] + extras["tfds"] + extras["dev"]]
    assert [r.name for r in requirements if not r.specifier.contains(pins.get(r.name.lower(), "0"))] == []
