"""The image and the locks: the Dockerfile's steps are targets of the Makefile, which install locked packages alone."""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text()
(DEVICES,) = re.findall(r"^DEVICES := (.*)$", MAKEFILE, re.MULTILINE)
LOCKS = {path.stem: path.read_text() for path in (ROOT / "requirements").glob("*.txt")}
# Packages that the programs do not need.
OF_TESTS = {"pytest", "hypothesis", "ruff", "beartype", "ty"}
OF_TFDS = {"tensorflow", "tensorflow-cpu", "tensorflow-datasets"}


def read_lock(text):
    """[(requirement, its hashes)] of a lock, each of which may stand there under several markers."""
    entries = re.split(r"\n(?=\w)", "\n" + re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))[1:]
    return [
        (Requirement(entry.partition(" \\\n")[0].strip()), re.findall(r"^    (\S+?)(?: \\)?$", entry, re.MULTILINE))
        for entry in entries
    ]


def pins(text):
    return {(canonicalize_name(found.name), str(found.specifier)) for found, _ in read_lock(text)}


def names(lock):
    return {name for name, _ in pins(LOCKS[lock])}


# --- Locks ---


def test_every_device_and_every_extra_has_a_lock():
    assert LOCKS.keys() == {*DEVICES.split(), *EXTRAS}
    assert set(DEVICES.split()) - {"cpu"} <= EXTRAS.keys()


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_the_common_versions_with_the_hashes_of_their_files(lock):
    entries = read_lock(LOCKS[lock])
    assert len(entries) > 50
    assert len(entries) == LOCKS[lock].count("==") - LOCKS[lock].count("== '")
    for found, hashes in entries:
        assert re.fullmatch(r"==[\w.]+", str(found.specifier)), found
        assert hashes, found
        assert [text for text in hashes if not re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", text)] == []
    # Whatever mirror made it, nobody is sent there.
    assert not re.search(r"://|--(extra-)?index|--find-links|@", LOCKS[lock])
    # An extra changes no version that the programs have, nor another extra's.
    common = pins((ROOT / "requirements.txt").read_text())
    known = {name for name, _ in common}
    assert [pin for pin in pins(LOCKS[lock]) if pin[0] in known and pin not in common] == []
    # All that is asked for is there.
    wanted = [Requirement(text) for text in (*PROJECT["dependencies"], *EXTRAS.get(lock, ()))]
    versions = dict(pins(LOCKS[lock]))
    assert [r for r in wanted if not r.specifier.contains(versions[canonicalize_name(r.name)].removeprefix("=="))] == []


def test_a_device_has_its_own_packages_and_none_of_the_tests():
    of_device = {device: names(device) - names("cpu") for device in DEVICES.split()}
    assert of_device.pop("cpu") == set()
    for device, marks in {"cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin", "tpu": "libtpu"}.items():
        assert [other for other, found in of_device.items() if marks in found] == [device]
    for device in DEVICES.split():
        assert names(device).isdisjoint(OF_TESTS | OF_TFDS)
    assert names("dev") > OF_TESTS
    assert names("tfds") > OF_TFDS


def make(*words, cwd=ROOT):
    """What `make` would run, without running it."""
    done = subprocess.run(["make", "--dry-run", *words], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.replace("\\\n", " ").splitlines()


def installs(lines):
    """The words behind `pip install` in lines of a shell."""
    return [shlex.split(line.partition("pip install ")[2]) for line in lines if "pip install " in line]


QUIET = ["--quiet", "--disable-pip-version-check"]


def test_setup_installs_from_the_locks_alone(context):
    lines = make("setup", "DEVICE=cuda13", "EXTRAS=tfds tensorboard", cwd=context)
    assert installs(lines) == [
        [*QUIET, "--require-hashes", "--requirement", f"requirements/{name}.txt"]
        for name in ("cuda13", "tfds", "tensorboard")
    ]
    assert any(line.endswith("python -m utils.metrics.inception") for line in lines)


def test_all_locks_are_made_by_one_command(context):
    lines = make("pins", cwd=context)
    (loop,) = [line for line in lines if line.startswith("for lock in ")]
    assert set(loop.removeprefix("for lock in ").partition(";")[0].split()) == LOCKS.keys()
    assert "--generate-hashes --no-strip-extras --constraint requirements.txt" in " ".join(loop.split())


def test_conda_installs_the_lock():
    *_, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert pip == {"pip": ["--requirement requirements/cpu.txt"]}


# --- The image ---


def read_dockerfile():
    """[(instruction, arguments)], without comments and with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


STEPS = read_dockerfile()
RUN = [arguments for instruction, arguments in STEPS if instruction == "RUN"]
ARGS = dict(shlex.split(arguments)[0].split("=") for instruction, arguments in STEPS if instruction == "ARG")


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """The files of the checkout that `docker build` is given."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]

    def ignored(folder, names):
        """Names that a pattern fits: a path from the top, or after `**/` a name anywhere."""
        paths = {name: os.path.relpath(os.path.join(folder, name), ROOT) for name in names}
        return [
            name
            for name, path in paths.items()
            for pattern in patterns
            if fnmatch.fnmatch(*((name, pattern[3:]) if pattern.startswith("**/") else (path, pattern)))
            and (pattern.startswith("**/") or path.count("/") == pattern.count("/"))
        ]

    return shutil.copytree(ROOT, tmp_path_factory.mktemp("image") / "app", ignore=ignored)


def test_its_steps_are_targets_of_the_makefile(context):
    assert ARGS == {"PYTHON": "3.12", "DEVICE": "cpu", "EXTRAS": "", "UID": "1000"}
    made = [shlex.split(line) for line in RUN if line.startswith("make ")]
    assert [words[1] for words in made] == ["packages", "setup"]
    assert all(words[2:] == ["DEVICE=$DEVICE", "EXTRAS=$EXTRAS"] for words in made)
    # As Docker would run them: neither TensorFlow nor the tests' packages.
    for words in made:
        lines = make(words[1], "DEVICE=cpu", "EXTRAS=", cwd=context)
        assert installs(lines) == [[*QUIET, "--require-hashes", "--requirement", "requirements/cpu.txt"]]
    # All else that is run prepares the system, and names no version by hand.
    others = [line for line in RUN if not line.startswith("make ")]
    assert [line.split()[0] for line in others] == ["apt-get", "useradd"]
    assert not re.search(r"\bpip\b|curl|wget", " ".join(others))


def test_it_runs_without_root_what_is_there(context):
    instructions = [instruction for instruction, _ in STEPS]
    users = [arguments for instruction, arguments in STEPS if instruction == "USER"]
    assert users == ["flow"]
    last_as_root = max(i for i, step in enumerate(STEPS) if step[0] == "RUN" and not step[1].startswith("make "))
    assert last_as_root < instructions.index("USER") < instructions.index("CMD") == len(STEPS) - 1
    # Whatever is copied is there, and belongs to the user.
    copied = [shlex.split(arguments) for instruction, arguments in STEPS if instruction == "COPY"]
    assert all(words[0] == "--chown=flow" and (context / words[1]).exists() for words in copied)
    assert {"train_flow.py", "utils", "data", "benchmarks", "requirements"} <= {path.name for path in context.iterdir()}
    assert not [name for name in ("tests", ".git", ".venv", "runs") if (context / name).exists()]
    # What it runs by default.
    (command,) = [yaml.safe_load(arguments) for instruction, arguments in STEPS if instruction == "CMD"]
    assert command == ["python", "train_flow.py", "--help"]


@pytest.mark.slow
def test_its_steps_make_an_environment_that_trains(context):
    """Without Docker: the steps of the image in a folder of their own, on the Python at hand."""
    clean = {name: os.environ[name] for name in os.environ if not name.startswith(("PYTHON", "JAX_", "XLA_"))}
    environment = {**clean, **ARGS, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    for line in RUN:
        if line.startswith("make "):
            subprocess.run(line, shell=True, cwd=context, env=environment, check=True)
    python = context / ".venv" / "bin" / "python"
    done = subprocess.run([python, "train_flow.py", "--help"], cwd=context, capture_output=True, text=True, check=False)
    assert "--dataset_name" in done.stdout
    absent = "import importlib.util as u; print([n for n in ('pytest', 'tensorflow', 'torch') if u.find_spec(n)])"
    assert subprocess.check_output([python, "-c", absent], text=True) == "[]\n"
    words = [
        "--dataset_name",
        "digits",
        "--use_stable_vae",
        "0",
        "--model.num_classes",
        "10",
        "--model.patch_size",
        "2",
    ]
    words += ["--batch_size", "8", "--max_steps", "2", "--wandb.mode", "disabled", "--save_dir", "runs/a"]
    subprocess.run([python, "train_flow.py", *words], cwd=context, env=environment, check=True)
    assert (context / "runs" / "a" / "checkpoints" / "2").is_dir()
