"""pip installs the suite's dependencies and none of its modules; every version is pinned."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what setuptools would find: it leaves files behind."""
    folder = tmp_path_factory.mktemp("packaging") / "checkout"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "golden", "wandb")
    return shutil.copytree(ROOT, folder, ignore=ignored)


@pytest.mark.parametrize("kind", ["build_wheel", "build_editable"])
def test_no_name_of_the_checkout_is_installed(checkout, tmp_path, kind):
    command = [sys.executable, "-c", BUILD, kind, tmp_path]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        paths = [archive.read(name).decode() for name in names if name.endswith(".pth")]
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    tops = {name.partition("/")[0] for name in names}
    assert [top for top in tops if not top.startswith("__editable__") and not top.endswith(".dist-info")] == []
    assert [text for text in paths if str(checkout) in text] == []
    required = {Requirement(text).name for text in re.findall(r"^Requires-Dist: ([^;\n]+)", metadata, re.MULTILINE)}
    assert required >= {Requirement(text).name for text in PROJECT["project"]["dependencies"]}


def test_the_readmes_python_lines_import_from_any_folder(tmp_path):
    readme = (ROOT / "README.md").read_text()
    assert "export PYTHONPATH=" in readme
    (line,) = re.findall(r"^from utils.*", readme, flags=re.MULTILINE)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", line], cwd=tmp_path, env=environment, check=True)


def test_every_direct_dependency_is_pinned_within_its_range():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(re.match(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines if not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    requirements = [Requirement(text) for text in PROJECT["project"]["dependencies"] + extras["tfds"] + extras["dev"]]
    assert [r.name for r in requirements if not r.specifier.contains(pins.get(r.name.lower(), "0"))] == []
