"""Shared by the tests: golden files, the folder of larger real data beside the checkout, how programs are run."""

import atexit
import contextlib
import functools
import hashlib
import http.server
import itertools
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

import absl.logging
import numpy as np
import pytest
from absl import flags
from jaxtyping import Array, install_import_hook

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported, whatever the machine has
# Most of the suite's time is XLA's: compiling takes half as long without these. What is compared with golden numbers is
# compiled in full, see `optimised`. In one part instead of 32, a module takes a twelfth less.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
FUSION_EMITTERS = "xla_cpu_use_fusion_emitters"
HAS_EMITTERS = tuple(map(int, metadata.version("jax").split(".")[:2])) < (0, 11)  # XLA aborts on unknown flags
XLA_FLAGS = f"--{FUSION_EMITTERS}=false --xla_cpu_parallel_codegen_split_count=1" if HAS_EMITTERS else ""
os.environ["XLA_FLAGS"] = XLA_FLAGS
# One cache for all workers and the programs that they start: most of these compile what another has compiled.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
import jax
import jax.numpy as jnp
from jax._src import compiler

from tests import typecheck  # noqa: F401  the hook below imports it by name

# Shapes, dtypes and types of every annotated function are checked while the suite runs.
install_import_hook(["diffusion_transformer", "utils"], "tests.typecheck.check")

from utils.base.messages import UserError, configure_output, silence_orbax
from utils.base.processes import END_SIGNALS, KEYBOARD_SIGNALS
from utils.flags.program import parse_flags
from utils.metrics.inception import inception_weights_path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take long")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder `shared` with larger real data beside the checkout")
    return folder


@pytest.fixture(scope="session", params=["dit_latent_small", "dit_pixel_patch4"])
def golden(request) -> dict[str, Array]:
    """Outputs of the published DiT, see tests/golden/README.md."""
    return {name: jnp.asarray(value) for name, value in np.load(GOLDEN / f"{request.param}.npz").items()}


@pytest.fixture(scope="session")
def imagenet_sample(shared, tmp_path_factory) -> Path:
    """A folder with `array_record/` and `tfrecord/`: what TFDS's own builder makes of 48 + 16 images of ImageNet."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    root = tmp_path_factory.mktemp("imagenet")
    manual = root / "manual"
    manual.mkdir()
    for name, count in {"ILSVRC2012_img_train.tar": 48, "ILSVRC2012_img_val.tar": 16}.items():
        with (
            tarfile.open(shared / "data" / "imagenet2012_sample" / name) as whole,
            tarfile.open(manual / name, "w") as part,
        ):
            for member in itertools.islice(whole, count):
                part.addfile(member, whole.extractfile(member))
    for file_format in ("array_record", "tfrecord"):
        config = tfds.download.DownloadConfig(manual_dir=manual)
        builder = tfds.builder("imagenet2012", data_dir=root / file_format)
        builder.download_and_prepare(file_format=file_format, download_config=config)
    return root


@pytest.fixture(scope="session")
def weights() -> Path:
    """The Inception weights; they are fetched once."""
    try:
        return inception_weights_path()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium of the system, driven by Playwright. `.ci/run` installs it; elsewhere `apt-get install
    chromium`, or name one by CHROMIUM=/path/to/chrome."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no browser: apt-get install chromium, or name one by CHROMIUM=")
    # A sandbox of its own needs a user other than root.
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """hub(files) -> the list of what is asked of the hub, which from then on is a server of those {path: content}."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with contextlib.ExitStack() as stack:

        def serve(files):
            asked = []

            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    asked.append((self.command, self.path))
                    content = files.get(self.path.removeprefix("/owner/name/resolve/").partition("/")[2])
                    self.send_response(404 if content is None else 200)
                    if content is None:
                        self.send_header("X-Error-Code", "EntryNotFound")
                    else:
                        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                    self.send_header("X-Repo-Commit", "0" * 40)
                    self.send_header("Content-Length", str(len(content or b"")))
                    self.end_headers()
                    if self.command == "GET":
                        self.wfile.write(content or b"")

                do_HEAD = do_GET

                def log_message(self, *args):
                    pass

            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.shutdown)
            redirect(f"http://127.0.0.1:{server.server_port}")
            return asked

        def redirect(address):
            monkeypatch.setattr(constants, "ENDPOINT", address)
            template = address + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

        serve.redirect = redirect
        yield serve


@pytest.fixture
def configure(read_flags):
    """configure(words) -> RunConfig of that command line of train_flow.py."""
    import train_flow  # after the hook above
    from utils.flags.run import read_run_config

    return lambda words: read_run_config(read_flags(train_flow, [*map(str, words)]))


@pytest.fixture
def read_flags():
    """read_flags(program, words) -> configuration of that command line; the flags are gone again afterwards."""
    builtin = set(flags.FLAGS)

    def forget():
        for name in set(flags.FLAGS) - builtin:
            delattr(flags.FLAGS, name)

    def read(program, words):
        forget()
        return parse_flags(program.define_flags, [program.__name__, *words])

    yield read
    forget()


@pytest.fixture
def silent_orbax(monkeypatch):
    """What Orbax logs is kept off the screen, as in a program; afterwards Python's hooks are as they were."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    for logger in (absl.logging.get_absl_logger(), logging.getLogger("asyncio")):
        monkeypatch.setattr(logger, "filters", list(logger.filters))
    silence_orbax.__wrapped__()


@pytest.fixture
def full_disk():
    """full_disk(2048) lets the system refuse every write beyond so many bytes of a file, as a full disk does; None:
    there is room again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if limit is None else limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def optimised():
    """XLA compiles as it does for users."""
    get_options = compiler.get_compile_options

    # XLA_FLAGS hold for the whole process; above them are only the options of each compilation.
    def get_all_options(*args, env_options_overrides, **keywords):
        options = {**({FUSION_EMITTERS: True} if HAS_EMITTERS else {}), **(env_options_overrides or {})}
        return get_options(*args, env_options_overrides=options, **keywords)

    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", get_all_options)
        jax.config.update("jax_disable_most_optimizations", False)
        yield
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0")


@pytest.fixture(autouse=True)
def output():
    """Programs that run in this process say where their lines go; the next test starts anew."""
    yield
    configure_output(is_apart=False, is_quiet=False)


@pytest.fixture
def signal_handlers():
    """Signals mean afterwards what they meant before."""
    handlers = {number: signal.getsignal(number) for number in (*END_SIGNALS, *KEYBOARD_SIGNALS)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@functools.cache
def fork_server() -> subprocess.Popen:
    """The process in which `Program` starts scripts; it ends with this one."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests" / "fork_server.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def ask_fork_server(**request) -> int | None:
    server = fork_server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


class Program:
    """`python ARGV...` of a script in a process of its own, forked by the fork server; to be used as a `Popen`.

    Its standard error goes where its output goes, unless they are kept apart.
    """

    def __init__(self, argv: list[str], environment: dict[str, str], cwd: Path = ROOT, is_apart: bool = False):
        self._folder = tempfile.TemporaryDirectory(prefix="program-")
        self._files = {name: Path(self._folder.name, name if is_apart else "both") for name in ("stdout", "stderr")}
        files = {name: str(file) for name, file in self._files.items()}
        self.pid = ask_fork_server(argv=argv, environment=environment, cwd=str(cwd), **files)
        self.returncode = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = ask_fork_server(wait=self.pid, is_patient=False)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = ask_fork_server(wait=self.pid, is_patient=True)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def outputs(self) -> list[str]:
        """What has been written to the standard output and to the standard error so far."""
        return [file.read_text(errors="replace") if file.exists() else "" for file in self._files.values()]

    def communicate(self, timeout: float) -> list[str]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"{self.outputs()[0][-3000:]}\nhas not ended after {timeout} s"
            time.sleep(0.02)
        return self.outputs()


def xla_flags(devices: int) -> str:
    """The environment's XLA_FLAGS for a process with so many virtual devices."""
    return f"{XLA_FLAGS} --xla_force_host_platform_device_count={devices}"


def run_program(
    *args, devices: int = 1, check: bool = True, env: dict | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """Runs `python ARGS...` in the checkout on `devices` virtual CPU devices; output captured as text."""
    environment = {"XLA_FLAGS": xla_flags(devices), **(env or {})}
    args = list(map(str, args))
    if args[0].endswith(".py") and "NO_FORK_SERVER" not in os.environ:
        program = Program(args, environment, cwd, is_apart=True)
        done = subprocess.CompletedProcess(args, program.wait(), *program.outputs())
    else:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
        command = [sys.executable, *args]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if check:
        assert done.returncode == 0, f"{' '.join(args)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done
