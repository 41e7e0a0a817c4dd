"""Statistics and features of clean-fid, torch-fidelity and dgm-eval, in files of their layouts."""

import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from tests.dinov2_network import numpy_bicubic
from tests.torch_writer import save_torch
from utils.base.messages import UserError
from utils.metrics import inception
from utils.metrics.dinov2 import load_dinov2
from utils.metrics.extractors import CLASS_TOKEN, POOL, Extractor, ExtractorOptions
from utils.metrics.reference import check_details, find_convention, load_statistics

ROWS = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
MOMENTS = {"mu": ROWS.mean(axis=0), "sigma": np.cov(ROWS, rowvar=False)}


def save_numpy_in_torch(path, content):
    """What torch.save makes of NumPy's arrays: they are in the pickle itself, by its protocol 2."""
    save_torch(path, {}, pickled=pickle.dumps(content, protocol=2))


WRITERS = {
    "cats_clean_custom_na.npz": lambda path: np.savez_compressed(path, **MOMENTS),
    "cats_clean_custom_na_kid.npz": lambda path: np.savez_compressed(path, feats=ROWS),
    "cifar10_clean_train_32.npz": lambda path: np.savez(path, **MOMENTS),
    "ffhq_legacy_tensorflow_trainval70k_1024.npz": lambda path: np.savez(path, **MOMENTS),
    "cats_legacy_pytorch_custom_na.npz": lambda path: np.savez_compressed(path, **MOMENTS),
    "cats-inception-v3-compat-stat-fid-2048.pt": lambda path: save_numpy_in_torch(path, MOMENTS),
    "cats-inception-v3-compat-features-2048.pt": lambda path: save_torch(path, ROWS),
}


@pytest.mark.parametrize(
    ("name", "convention", "has_rows"),
    [
        ("cats_clean_custom_na.npz", "clean", False),
        ("cats_clean_custom_na_kid.npz", "clean", True),
        ("cifar10_clean_train_32.npz", "clean", False),
        ("ffhq_legacy_tensorflow_trainval70k_1024.npz", "adm", False),
        ("cats_legacy_pytorch_custom_na.npz", "pytorch_fid", False),
        ("cats-inception-v3-compat-stat-fid-2048.pt", "adm", False),
        ("cats-inception-v3-compat-features-2048.pt", "adm", True),
    ],
)
def test_inceptions_are_read(tmp_path, name, convention, has_rows):
    WRITERS[name](tmp_path / name)
    loaded = load_statistics(tmp_path / name, {POOL: 4})
    np.testing.assert_allclose(loaded[POOL].mu, MOMENTS["mu"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(loaded[POOL].sigma, MOMENTS["sigma"], rtol=1e-5, atol=1e-7)
    assert loaded.has_rows == has_rows
    if has_rows:
        np.testing.assert_array_equal(loaded[POOL].rows, ROWS)
    assert find_convention(loaded, None) == (convention, "file")

    # Under another name, nothing says how the images entered Inception.
    other = tmp_path / f"x{name[-4:] if name.endswith('npz') else '.pt'}"
    (tmp_path / name).rename(other)
    with pytest.raises(UserError, match=r"does not record how its .* clean for clean-fid's, adm"):
        find_convention(load_statistics(other, {POOL: 4}), None)


def save_dgm_eval(path, reps, model="dinov2"):
    np.savez(path, model=model, reps=reps, hparams={"path": "cats", "nimages": len(reps)})


def test_dgm_evals_features_are_read(tmp_path):
    path = tmp_path / "reps_cats_dinov2_nimage-40_train.npz"
    save_dgm_eval(path, ROWS.astype(np.float64))
    loaded = load_statistics(path, {CLASS_TOKEN: 4})
    np.testing.assert_allclose(loaded[CLASS_TOKEN].mu, MOMENTS["mu"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(loaded[CLASS_TOKEN].sigma, MOMENTS["sigma"], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(loaded[CLASS_TOKEN].rows, ROWS)

    # Which of its two resizes it was, the user says.
    network = Extractor({"cls": 4}, load_dinov2, details={"preprocessing": "dgm_clean", "extractor_dtype": "float32"})
    check_details(loaded, {"dinov2": network}, ExtractorOptions(preprocessing="dgm_clean"))
    with pytest.raises(UserError, match="does not record how its images entered dinov2: give --preprocessing dgm_eval"):
        check_details(loaded, {"dinov2": network}, ExtractorOptions())


def save_other(path, kind):
    if kind == "clip":
        save_dgm_eval(path, ROWS, model="clip")
    elif kind == "narrow":
        save_dgm_eval(path, ROWS)
    elif kind == "tensor":
        save_torch(path, {"mu": MOMENTS["mu"]})
    elif kind == "vector":
        save_torch(path, ROWS[0])
    elif kind == "code":
        save_torch(path, {}, pickled=b"cbuiltins\nprint\n(tR.")
    elif kind == "nan":
        np.savez(path, feats=np.full((5, 4), np.nan))
    else:
        np.savez(path, feats=np.array(list("text")).reshape(1, 4).repeat(3, axis=0))


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("clip.npz", CLASS_TOKEN, "holds features of dgm-eval's clip; of its networks dinov2 is read"),
        ("narrow.npz", CLASS_TOKEN, r"`dinov2.cls.rows` has the shape \(40, 4\), not \(2 to 50,000, 3\)"),
        ("narrow.npz", POOL, "holds statistics of dinov2, none of inception"),
        ("tensor.pt", POOL, "neither mu and sigma nor one matrix of features, as torch-fidelity's cache"),
        ("vector.pt", POOL, "neither mu and sigma nor one matrix"),
        ("code.pt", POOL, "builtins.print"),
        ("nan.npz", POOL, "it holds NaN or infinity"),
        ("text.npz", POOL, "`features` holds <U1, no numbers"),
    ],
)
def test_others_are_refused(tmp_path, capsys, name, key, message):
    save_other(tmp_path / name, name.partition(".")[0])
    width = 4 if name[:3] in ("nan", "tex") else 3
    with pytest.raises(UserError, match=f"--fid_stats=.*{message}") as error:
        load_statistics(tmp_path / name, {key: width})
    assert "\n" not in str(error.value)
    assert not capsys.readouterr().out


def test_clean_fids_resize(monkeypatch):
    """Under `clean`, Inception is given what Pillow makes of floats: bicubic, clipped, not rounded."""
    monkeypatch.setattr(inception, "_read_weights", lambda weights: b"")
    monkeypatch.setattr(inception, "_read_params", lambda content: {})
    monkeypatch.setattr(inception.InceptionV3, "apply", lambda self, params, x: {"pool": x.reshape(len(x), -1)})
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 400, 3), dtype=np.uint8)
    given = inception.load_inception(convention="clean")(jnp.asarray(images))["pool"]
    expected = (np.clip(numpy_bicubic(images.astype(np.float64), 299), 0, 255) - 128) / 128
    np.testing.assert_allclose(given, expected.reshape(2, -1), atol=1e-5)
