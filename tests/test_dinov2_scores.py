"""Scores by DINOv2's features: from images to statistics, rows and columns, and what is refused."""

import contextlib
import json
import pickle
import re

import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from safetensors.numpy import save_file

import compute_fid_stats
import eval_fid
from tests.conftest import run_program
from tests.dinov2_network import make_tensors
from tests.test_dinov2 import narrow  # noqa: F401 (fixture)
from utils.base.mesh import make_mesh
from utils.base.messages import UserError
from utils.data.loaders import load_dataset
from utils.images.samples import SampleWriter
from utils.metrics.dinov2 import read_dinov2
from utils.metrics.extractors import CLASS_TOKEN, EXTRACTORS, POOL, Extractor, feature_widths
from utils.metrics.measure import most_images
from utils.metrics.reference import load_statistics
from utils.training.reference import load_reference

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 30, 6, 5, 3), dtype=np.uint8)
IMAGES[1] //= 2


def load_colours(weights, convention, sharding):
    return lambda images: {"pool": images.mean((1, 2)), "spatial": images.mean((1, 3))}


@pytest.fixture(autouse=True)
def small_inception(monkeypatch):
    monkeypatch.setitem(EXTRACTORS, "inception", Extractor({"pool": 3, "spatial": 5}, load_colours, "1ce"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, samples, and two networks."""
    folder = tmp_path_factory.mktemp("scores")
    for name, images in zip(("data", "samples"), IMAGES, strict=True):
        with SampleWriter(folder / f"{name}.npz", len(images)) as writer:
            writer.write(images, np.zeros(len(images), np.int32))
    tensors = make_tensors(depth=1)
    save_file(tensors, folder / "w.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "other.safetensors")
    return folder


DINOV2 = "--extractor_weights IN/w.safetensors --extractor"


@pytest.fixture
def run(folder, read_flags):
    """run(program, line) -> rows of fid.json; IN is the folder."""

    def run_line(program, line):
        program.main(read_flags(program, line.replace("IN", str(folder)).split()))
        path = folder / "samples_fid" / "fid.json"
        return json.loads(path.read_text())["cells"] if program is eval_fid else []

    return run_line


def moments(path, images) -> tuple[np.ndarray, np.ndarray]:
    features = np.asarray(read_dinov2(path).load()(jnp.asarray(images))["cls"], np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def test_both_extractors_from_images_to_a_row(run, folder, capsys):
    run(compute_fid_stats, f"--images IN/data.npz --out IN/both.npz {DINOV2} inception,dinov2")
    with np.load(folder / "both.npz") as file:
        assert {"mu", "sigma", "features", "dinov2.cls.mu", "dinov2.cls.sigma", "dinov2.cls.rows"} <= set(file)
        assert (file["dinov2.preprocessing"], file["dinov2.extractor_dtype"]) == ("edm2", "float32")
        assert (file["inception_sha256"], len(str(file["dinov2.sha256"]))) == ("1ce", 64)
        (mu, sigma), (mu_samples, sigma_samples) = (moments(folder / "w.safetensors", images) for images in IMAGES)
        np.testing.assert_allclose(file["dinov2.cls.mu"], mu, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(file["dinov2.cls.sigma"], sigma, rtol=1e-3, atol=1e-5)

    # The distance of the two Gaussians, by SciPy's square root.
    line = f"--samples IN/samples.npz --fid_stats IN/both.npz {DINOV2} inception,dinov2"
    rows = run(eval_fid, line)
    root = scipy.linalg.sqrtm(sigma @ sigma_samples).real
    expected = np.square(mu - mu_samples).sum() + np.trace(sigma + sigma_samples - 2 * root)
    assert rows[-1]["fd_dinov2"] == pytest.approx(expected, rel=1e-3)
    columns = {"fid", "kid", "kd_dinov2", "kd_dinov2_error", "mind_dinov2", "precision", "precision_dinov2"}
    assert columns | {"recall_dinov2", "density_dinov2", "coverage_dinov2"} <= rows[-1].keys()
    assert (rows[-1]["preprocessing"], rows[-1]["extractor_dtype"]) == ("edm2", "float32")
    shown = capsys.readouterr()
    assert "compiling the Inception and DINOv2 networks, unless they are cached ..." in shown.err
    assert "| FD-DINOv2 | KD-DINOv2 | MIND (DINOv2) | precision (DINOv2) |" in shown.out
    assert f" {rows[-1]['kd_dinov2']:.5f} ± {rows[-1]['kd_dinov2_error']:.5f} " in shown.out
    assert shown.err.count("precision, recall, density and coverage: of 30 samples") == 1

    # The row is found again; images as the reference give the same, each way of resizing its own file of them.
    assert run(eval_fid, line) == rows
    line = f"--samples IN/samples.npz --fid_stats IN/data.npz {DINOV2} dinov2"
    assert run(eval_fid, line)[-1]["fd_dinov2"] == pytest.approx(rows[-1]["fd_dinov2"], rel=1e-6)
    capsys.readouterr()
    rows = run(eval_fid, f"{line} --preprocessing dgm_eval")
    assert capsys.readouterr().err.count("compiling") == 1  # for both sides
    assert rows[-1]["preprocessing"] == "dgm_eval"
    assert rows[-1]["fd_dinov2"] != pytest.approx(rows[-2]["fd_dinov2"], rel=1e-3)
    assert len(list((folder / "samples_fid").glob("reference_*_dinov2_dgm_eval_float32_*.npz"))) == 1


def test_a_metric_by_name_needs_no_other_network(run, folder, monkeypatch):
    monkeypatch.setitem(EXTRACTORS, "inception", Extractor({"pool": 3}, lambda *_: pytest.fail("Inception is loaded")))
    names = "--extractor_weights IN/w.safetensors --extractor_dtype bfloat16 --metrics fd_dinov2"
    run(compute_fid_stats, f"--images IN/data.npz --out IN/bfloat16.npz {names}")
    row = run(eval_fid, f"--samples IN/samples.npz --fid_stats IN/bfloat16.npz {names}")[-1]
    assert (row["metrics"], row["extractor_dtype"]) == (["fd_dinov2"], "bfloat16")
    assert row["fd_dinov2"] > 0
    assert "kd_dinov2" not in row


def test_a_training_logs_the_distance(run, folder, configure):
    run(compute_fid_stats, f"--images IN/data.npz --out IN/dgm.npz --preprocessing dgm_clean {DINOV2} dinov2")
    words = ["--save_dir", folder / "run", "--fid_stats", folder / "dgm.npz", "--extractor", "dinov2"]
    words += ["--extractor_weights", folder / "w.safetensors", "--preprocessing", "dgm_clean"]
    reference = load_reference(configure(words), make_mesh(), load_dataset("digits"))
    assert list(map(str, reference.metrics)) == ["fd_dinov2"]
    features = reference.extractors["dinov2"](jnp.asarray(IMAGES[0]))["cls"]
    rows = reference.statistics[CLASS_TOKEN].rows
    np.testing.assert_allclose(features, rows, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"--preprocessing=edm2: .* was made under dgm_clean; give --pre"):
        load_reference(configure(words[:-2]), make_mesh(), load_dataset("digits"))
    with pytest.raises(UserError, match="--preprocessing=edm2 has no effect without dinov2 among"):
        configure([*words[:4], "--preprocessing", "edm2"])
    with pytest.raises(UserError, match="--metrics=kid has no effect beside --extractor"):
        configure([*words, "--metrics", "kid"])


def test_what_the_reference_does_not_allow_is_said(run, folder, configure, capsys):
    np.savez(folder / "pool.npz", mu=np.zeros(3), sigma=np.eye(3), convention="adm")
    row = run(eval_fid, "--samples IN/samples.npz --fid_stats IN/pool.npz --metrics fid,prdc")[-1]
    assert "fid" in row
    assert "precision" not in row
    assert re.search("note: without prdc: .*pool.npz holds no `features` of single images", capsys.readouterr().err)

    # A training would else keep no checkpoint for a score that it does not log.
    words = ["--save_dir", folder / "run", "--fid_stats", folder / "pool.npz", "--metrics", "fid,kid"]
    for score, refused in {"fid": False, "kid": True}.items():
        with pytest.raises(UserError, match="kid is not logged") if refused else contextlib.nullcontext():
            config = configure([*words, "--keep_best", f"{score}:1"])
            assert list(map(str, load_reference(config, make_mesh(), load_dataset("digits")).metrics)) == ["fid"]


SCORE = "--samples IN/samples.npz --fid_stats IN/made.npz"
POOL_ONLY = f"{SCORE.replace('made', 'pool')} --convention adm"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{SCORE} --extractor dinov2", r"--extractor_weights is not given: .* https://dl.fbaipublicfiles.com"),
        (f"{SCORE} --preprocessing edm2", "--preprocessing=edm2 has no effect without dinov2 among the features"),
        (f"{SCORE} --metrics fid --extractor_dtype float32", "--extractor_dtype=float32 has no effect without dinov2"),
        (f"{SCORE} {DINOV2} dinov2 --preprocessing dgm_eval", "--preprocessing=dgm_eval: .* was made under edm2; give"),
        (f"{SCORE} {DINOV2} dinov2 --extractor_dtype bfloat16", "--extractor_dtype=bfloat16: .* made under float32"),
        (
            f"{SCORE} --extractor dinov2 --extractor_weights IN/other.safetensors",
            r"--extractor_weights=.*other.safetensors has other weights \(sha256 [0-9a-f]{12}..\) than those",
        ),
        (
            f"{SCORE.replace('made', 'foreign')} {DINOV2} dinov2",
            "foreign.npz does not record how its images entered dinov2: give --preprocessing dgm_eval for",
        ),
        (f"{POOL_ONLY} --metrics kid,mind", "--metrics=kid,mind: .*pool.npz holds no `features` of single images"),
        (f"{POOL_ONLY} --metrics sfid", "--metrics=sfid: .*pool.npz holds no `mu_s` and `sigma_s`, which"),
        (f"{POOL_ONLY} --metrics inception_score", "=inception_score: it needs class probabilities, by --inception_l"),
        (f"{SCORE.replace('made', 'pool')} {DINOV2} dinov2", "none of dinov2; .* --extractor_weights WEIGHTS --out"),
    ],
)
def test_others_are_refused(run, folder, line, message):
    if not (folder / "made.npz").exists():
        run(compute_fid_stats, f"--images IN/data.npz --out IN/made.npz {DINOV2} dinov2")
        moments = {"dinov2.cls.mu": np.zeros(24), "dinov2.cls.sigma": np.eye(24)}
        np.savez(folder / "foreign.npz", **moments)
        np.savez(folder / "pool.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match=message) as error:
        run(eval_fid, line)
    assert "\n" not in str(error.value)


def test_edm2s_statistics_are_read(folder):
    moments = [{"mu": np.full(n, n, np.float64), "sigma": np.eye(n)} for n in (3, 24)]
    (folder / "edm2.pkl").write_bytes(pickle.dumps({"num_images": 9, "fid": moments[0], "fd_dinov2": moments[1]}))
    statistics = load_statistics(folder / "edm2.pkl", {POOL: 3, CLASS_TOKEN: 24})
    assert [list(statistics[key].mu) for key in (POOL, CLASS_TOKEN)] == [[3] * 3, [24] * 24]
    assert statistics.details == {"dinov2.preprocessing": "edm2"}


def test_statistics_of_before_are_read(folder):
    np.savez(folder / "old.npz", mu=np.zeros(3), sigma=np.eye(3), convention="adm")
    assert load_statistics(folder / "old.npz", {POOL: 3}).details == {}
    assert feature_widths(["dinov2"]) == {CLASS_TOKEN: 1024}


@pytest.mark.slow
def test_two_devices_are_one(run, folder, tmp_path):
    for devices in (1, 2):
        code = (
            "import compute_fid_stats; from utils.flags import program; from utils.metrics import dinov2;"
            "dinov2.HEADS[24] = 3; program.run_program(compute_fid_stats.define_flags, compute_fid_stats.main)"
        )
        words = f"--images IN/data.npz --preprocessing dgm_eval --batch_size 8 --out OUT/{devices}.npz {DINOV2} dinov2"
        words = words.replace("IN", str(folder)).replace("OUT", str(tmp_path)).split()
        run_program("-c", code, *words, devices=devices)
    one, two = (np.load(tmp_path / f"{devices}.npz")["dinov2.cls.rows"] for devices in (1, 2))
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


def test_batches_fit_the_memory():
    large = {
        "dinov2": Extractor({"cls": 1024}, load_colours, image_bytes=24 * 10**6),
        "inception": EXTRACTORS["inception"],
    }
    assert most_images({"inception": EXTRACTORS["inception"]}, 1, None) is None
    assert [most_images(large, devices, None) for devices in (1, 3, 64)] == [32, 30, 64]
    # Half of the memory, a power of two for each device, and no more than it has use for.
    assert [most_images(large, 2, gigabytes * 10**9) for gigabytes in (0, 1, 8, 140)] == [2, 32, 256, 512]
