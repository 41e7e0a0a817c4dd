"""The records of data sources, and a loader that is registered from outside of the suite."""

import dataclasses
import json
import re

import numpy as np
import pytest

import compute_fid_stats
import edit
import eval_fid
import likelihood
import make_pairs
import sample
import train_flow
from tests.conftest import ROOT
from utils.base.messages import DataError, UserError
from utils.data import loaders
from utils.data.batches import next_batch, training_batches
from utils.data.dataset import SPLITS, ArraySource, ImageDataset
from utils.data.loaders import LOADERS, expand_name, list_names, load_dataset
from utils.flags import reading
from utils.images.pixels import UINT8, PixelFormat
from utils.images.plotting import sample_grid
from utils.metrics.pixels import PixelStatistics, compute_moments
from utils.metrics.reference import load_statistics
from utils.runs.opening import load_generator


@pytest.mark.parametrize("name", [name for name, loader in LOADERS.items() if loader.is_path])
def test_a_home_folder_stands_for_itself_in_every_path(name, read_flags, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert expand_name(f"{name}:~/x") == f"{name}:/home/ada/x"
    assert read_flags(train_flow, ["--dataset_name", f"{name}:~/x"]).dataset_name == f"{name}:/home/ada/x"
    with pytest.raises(UserError, match=rf"--dataset_name={name}:/home/ada/x: .*/home/ada/x"):
        load_dataset(f"{name}:~/x")


def test_a_name_that_is_no_path_keeps_its_tilde():
    assert expand_name("tfds:~/x") == "tfds:~/x"


def test_unknown_names_are_answered_with_the_known_ones(monkeypatch):
    monkeypatch.setitem(LOADERS, "mine", loaders.Loader(lambda *args: None, argument="WORD"))
    known = re.escape(", ".join(list_names()))
    assert "mine:WORD" in known
    for name in ("pears:x", "digits:3", "folder:", "mine", ""):
        with pytest.raises(UserError, match=f"--dataset_name={name} is unknown.* [Kk]nown are {known}"):
            load_dataset(name)
    with pytest.raises(UserError, match=r"did you mean digits\?"):
        load_dataset("digit")


def test_the_page_on_data_lists_every_source():
    page = (ROOT / "docs" / "data.md").read_text()
    table = re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE)
    assert {name for row in table for name in re.findall(r"`(.*?)`", row)} >= set(list_names())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset_name digits --max_megapixels 3", r"--max_megapixels=3.0 has no effect on digits, only on folder:"),
        ("--dataset_name pairs:x --broken_images skip", "--broken_images=skip has no effect on pairs:x, only on fold"),
    ],
)
def test_options_without_effect_follow_from_the_record(words, message, read_flags):
    config = read_flags(train_flow, words.split())
    with pytest.raises(UserError, match=message):
        reading.check_data_flags(config.dataset_name)


def load_fields(name, split, options):
    """32 float32 fields of 8x12 with 4 channels in -3 .. 3; those of class 0 are about -2, those of class 1 about 2."""
    rng = np.random.default_rng(SPLITS.index(split))
    labels = np.arange(32, dtype=np.int32) % 2
    images = rng.normal(4.0 * labels[:, None, None, None] - 2, 0.1, (32, 8, 12, 4)).astype(np.float32)
    return ImageDataset(
        name=name,
        split=split,
        source=(source := ArraySource(images, labels)),
        image_shape=(8, 12, 4),
        class_names=("low", "high"),
        random_flip=False,
        fingerprint=source.fingerprint(),
        pixels=FIELDS,
    )


def load_changed(monkeypatch, **changes):
    """The training split of the fields with these changes, registered and loaded."""
    dataset = dataclasses.replace(load_fields("fields", "train", None), **changes)
    monkeypatch.setitem(LOADERS, "fields", loaders.Loader(lambda name, split, options: dataset))
    return load_dataset("fields")


def test_floats_beyond_the_range_of_their_format_are_named(monkeypatch, capsys):
    load_changed(monkeypatch)
    assert capsys.readouterr().err == ""
    load_changed(monkeypatch, pixels=PixelFormat("float32", 0, 3))
    message = r"--dataset_name=fields: values are -2\.\d+ to 2\.\d+, but their format is float32 in 0 .. 3, to"
    assert re.search(message, capsys.readouterr().err)


def test_images_that_are_not_finite_or_would_be_cut_to_bytes_are_named(monkeypatch):
    images = load_fields("fields", "train", None).source.images.copy()
    images[7, 3, 2, 1] = np.nan
    source = ArraySource(images, np.zeros(len(images), np.int32))
    with pytest.raises(UserError, match="--dataset_name=fields: image 7 of train holds NaN or infinity; mend it, or"):
        load_changed(monkeypatch, source=source)
    dataset = load_changed(monkeypatch, pixels=UINT8)
    with pytest.raises(DataError, match=r"--dataset_name=fields: image \d+ of train is float32, not uint8; convert"):
        next_batch(training_batches(dataset, 4, seed=0))


FIELDS = PixelFormat("float32", -3.0, 3.0)
TRAIN = """--dataset_name fields --codec pixels --model.hidden_size 32 --model.depth 1 --model.num_heads 1
    --model.patch_size 4 --model.num_classes 2 --model.lr 1e-2 --model.class_dropout_prob 0 --batch_size 16
    --log_interval 100 --eval_interval 0 --wandb.mode disabled"""


def test_float_images_of_four_channels_are_trained_on_and_sampled(monkeypatch, read_flags, tmp_path, capsys):
    monkeypatch.setitem(LOADERS, "fields", loaders.Loader(load_fields))
    words = [*TRAIN.split(), "--save_dir", str(tmp_path / "run")]
    train_flow.main(read_flags(train_flow, [*words, "--max_steps", "30"]))
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["dataset"]["pixels"]
    assert PixelFormat.from_json(recorded) == FIELDS

    # Samples are in the format of the data, and can be shown.
    generator = load_generator(tmp_path / "run", params="raw")
    images = generator.sample(["low", "high"], num_steps=8)
    assert (images.shape, images.dtype) == ((2, 8, 12, 4), np.float32)
    assert np.abs(images).max() <= 3
    assert images.std() > 0.1
    pictures = generator.to_pictures(images)
    np.testing.assert_allclose(pictures, 255 * (images + 3) / 6, atol=0.51)
    sample_grid(pictures, np.arange(2), generator.class_names)  # shows the first three channels

    # Files, feature networks and likelihoods take pictures alone: refused by flag, before parameters are read.
    for program, line, message in (
        (sample, "--load_dir RUN --save_samples RUN/s", "--save_samples=.*s: PNGs hold .*; name a file .npz"),
        (edit, "--load_dir RUN --invert RUN", "--invert=.*run: files hold .*; use ImageGenerator.invert in Python"),
        (
            likelihood,
            "--load_dir RUN",
            "--load_dir=.*run: likelihoods are of .*; compare .* by their validation/l2_loss",
        ),
        (eval_fid, "--load_dir RUN", "--load_dir=.*run: feature networks take .*; --metrics moments takes any"),
        (compute_fid_stats, "--dataset_name fields --out RUN/s.npz", "--dataset_name=fields: .* --metrics moments"),
        (train_flow, f"{TRAIN} --fid_stats RUN/s.npz --eval_interval 1", "--fid_stats=.*s.npz: .*; leave it out, or"),
    ):
        with pytest.raises(UserError, match=message) as error:
            program.main(read_flags(program, line.replace("RUN", str(tmp_path / "run")).split()))
        assert "uint8 images of 1 or 3 channels, but " in str(error.value)
        assert "are float32 in -3 .. 3 with 4; " in str(error.value)

    # Moments take any format.
    stats = str(tmp_path / "s.npz")
    line = f"--dataset_name fields --metrics moments --out {stats}"
    compute_fid_stats.main(read_flags(compute_fid_stats, line.split()))
    line = f"""--load_dir {tmp_path / "run"} --metrics fid,moments --fid_stats {stats} --num_samples 24 --batch_size 16
        --denoise_timesteps 4 --params raw --wandb.mode disabled --save_samples {tmp_path / "floats.npz"}"""
    capsys.readouterr()
    eval_fid.main(read_flags(eval_fid, line.split()))
    shown = capsys.readouterr()
    assert "note: without fid: feature networks take uint8 images of 1 or 3 channels, not float32 with 4" in shown.err
    (row,) = json.loads((tmp_path / "run" / "fid.json").read_text())["cells"]
    assert row["metrics"] == ["fid", "moments"]
    expected = PixelStatistics()
    drawn = load_generator(tmp_path / "run", params="raw").sample(num_samples=24, num_steps=4)
    expected.update(drawn)
    with np.load(tmp_path / "floats.npz") as saved:
        np.testing.assert_allclose(saved["arr_0"], drawn, atol=1e-4)
    for name, value in compute_moments(expected, load_statistics(stats, {}).pixels).items():
        assert row[name] == pytest.approx(value, rel=1e-3)
    assert "| mean error (data's unit) | std error (data's unit) | spectrum error (%) | worst radius (%) |" in shown.out

    # Its pairs have its format, so that a run on them has it, too.
    line = f"--load_dir {tmp_path / 'run'} --num_pairs 100 --denoise_timesteps 1 --out {tmp_path / 'pairs'}"
    make_pairs.main(read_flags(make_pairs, line.split()))
    assert load_dataset(f"pairs:{tmp_path / 'pairs'}").pixels == FIELDS

    # Other data are refused, be it only by their range.
    other = dataclasses.replace(load_fields("fields", "train", None), pixels=PixelFormat("float32", 0.0, 9.0))
    monkeypatch.setitem(LOADERS, "fields", loaders.Loader(lambda name, split, options: other))
    with pytest.raises(UserError, match=r"images were float32 in -3 .. 3, not float32 in 0 .. 9"):
        train_flow.main(read_flags(train_flow, [*words, "--max_steps", "31"]))
