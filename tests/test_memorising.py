"""Samples compared with training images: copies are found and drawn, and what cannot be compared is refused."""

import dataclasses
import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eval_fid
from tests.test_generate import run  # noqa: F401 (fixture)
from utils.base.mesh import make_mesh
from utils.base.messages import UserError
from utils.data.dataset import array_dataset
from utils.data.loaders import load_dataset
from utils.images import plotting
from utils.images.pixels import ImageBatch
from utils.metrics.extractors import EXTRACTORS, PIXELS, POOL, Extractor
from utils.networks.state import TrainState
from utils.runs import memorising
from utils.runs.given import expand_path
from utils.runs.memorising import Memorising, SampleImages, choose_features, open_training
from utils.runs.results import Results, to_text
from utils.sampling.generator import ImageGenerator
from utils.training import evaluation
from utils.training.build import build_run

COPY, MIRROR = 5, 9  # among the samples
COPIED, MIRRORED = 17, 33  # among the training images


def draw_images(count: int, seed: int, shape=(8, 8, 1)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def plant(train: np.ndarray, dtype=np.uint8) -> np.ndarray:
    """Returns twenty samples: a copy, one's mirror image, and others that are like nothing."""
    samples = draw_images(20, 1, train.shape[1:]).astype(dtype)
    samples[COPY] = train[COPIED]
    samples[MIRROR] = train[MIRRORED][:, ::-1]
    return samples


@pytest.fixture
def files(tmp_path):
    train = draw_images(200, 0)
    np.savez(tmp_path / "train.npz", images=train, labels=np.zeros(200, int))
    np.savez(tmp_path / "samples.npz", arr_0=plant(train))
    np.savez(tmp_path / "floats.npz", arr_0=plant(train).astype(np.float32))
    np.savez(tmp_path / "large.npz", arr_0=draw_images(5, 0, (16, 8, 1)))
    np.savez(tmp_path / "one.npz", arr_0=draw_images(1, 0))
    return tmp_path


@pytest.fixture(autouse=True)
def tables(monkeypatch) -> list:
    """The arguments of every figure of images, of which the first row is drawn."""
    drawn = []
    draw = plotting.image_table

    def record(images, rows, columns, title):
        drawn.append((np.asarray(images), rows, columns, title))
        return draw(images[:1], rows[:1], columns, title)

    monkeypatch.setattr(plotting, "image_table", record)
    return drawn


def score(read_flags, folder, line: str) -> list[dict]:
    """Returns the rows of fid.json after an evaluation without feature networks, unless the line names some."""
    words = line.replace("IN", str(folder)).split()
    words += [] if "--extractor" in words or "--fid_stats" not in words else ["--metrics", "moments"]
    words += [] if "--samples" in words else ["--wandb.mode", "disabled"]
    eval_fid.main(read_flags(eval_fid, [*words, "--out", str(folder / "out")]))
    return json.loads((folder / "out" / "fid.json").read_text())["cells"]


def saved_run(folder, **settings) -> dict:
    """Returns the configuration of a run of the images in `files`."""
    return {"dataset_name": f"npz:{folder}/train.npz", "dataset": {"image_shape": [8, 8, 1]}, **settings}


# --- Images of a file ---


def test_a_planted_copy_is_counted_and_drawn(files, read_flags, tables, capsys):
    line = "--samples IN/samples.npz --fid_stats IN/train.npz --memorisation --train_images IN/train.npz"
    (row,) = score(read_flags, files, line)
    expected = {
        "memorised": 5,
        "memorised_error": pytest.approx(100 * np.sqrt(0.05 * 0.95 / 20)),
        "memorisation_features": "pixels",
        "train_images": str(files / "train.npz"),
        "train_mirrors": False,
        "num_train_images": 200,
    }
    assert row.items() >= expected.items()
    assert "memorised_validation" not in row  # a file is taken whole
    ((images, rows, columns, _),) = tables
    assert images.shape == (16, 3, 8, 8, 1)
    np.testing.assert_array_equal(images[0, 0], images[0, 1])
    np.testing.assert_array_equal(images[0, 0], draw_images(200, 0)[COPIED])
    assert (rows[0], columns) == (f"sample {COPY}: 0.00", ("sample", "nearest", "second"))
    assert (files / "out" / "memorised.png").exists()
    shown = capsys.readouterr()
    assert "| memorised (%) | AuthPct |" in shown.out
    assert " 5.0 ± 4.9 |" in shown.out

    # The row is another one than that without, which stays.
    short = "--samples IN/samples.npz --fid_stats IN/train.npz"
    assert len(score(read_flags, files, short)) == 2
    assert len(score(read_flags, files, line)) == 2


def test_a_file_against_itself_and_floats(files, read_flags, tables):
    line = "--samples IN/floats.npz --fid_stats IN/floats.npz --memorisation --train_images IN/floats.npz"
    (row,) = score(read_flags, files, line)
    assert (row["memorised"], row["authpct"]) == (100, 0)
    assert (tables[0][0].dtype, np.ptp(tables[0][0])) == (np.uint8, 255)


@pytest.mark.parametrize(("name", "count"), [("train.npz", 200), ("floats.npz", 20)])
def test_nothing_but_training_images_is_needed(name, count, files, read_flags, tables, capsys):
    (row,) = score(read_flags, files, f"--memorisation --train_images IN/{name} --samples IN/{name}")
    assert (row["memorised"], row["fid_stats"], row["num_train_images"]) == (100, None, count)
    assert "memorisation alone: other scores need --fid_stats" in capsys.readouterr().err


def test_features_of_an_extractor_are_compared(files, read_flags, monkeypatch, tables):
    """Features that are the pixels of the first channel find what the pixels find."""

    def load(weights, convention, sharding):
        return lambda images: {"first": images[..., 0].reshape(len(images), -1).astype(jnp.float32)}

    monkeypatch.setitem(EXTRACTORS, "first", Extractor({"first": 64}, load))
    line = "--samples IN/samples.npz --fid_stats IN/samples.npz --memorisation --train_images npz:IN/train.npz"
    line += " --extractor first --batch_size 32 --memorisation_features"
    rows = score(read_flags, files, f"{line} first")
    rows = score(read_flags, files, f"{line} pixels")
    assert [row["memorisation_features"] for row in rows] == ["first", "pixels"]
    names = ("memorised", "authpct", "memorised_validation", "authpct_validation")
    assert [rows[0][name] for name in names] == [rows[1][name] for name in names]
    assert rows[0]["num_train_images"] == 196  # the others are its validation split
    np.testing.assert_array_equal(tables[0][0], tables[1][0])


# --- Images of a run ---


def test_samples_of_a_run_are_compared_with_its_own_images(run, read_flags, tmp_path, monkeypatch, capsys):  # noqa: F811
    # Half of the samples are images that the run was trained on.
    dataset = load_dataset("digits")
    copies = np.stack([dataset.source[i]["image"] for i in range(20)])
    planted = np.concatenate([copies, draw_images(20, 2)])

    def generate(self, sampler, num_samples, batch_size):
        for start in range(0, num_samples, batch_size):
            images = jnp.asarray(planted[start : start + batch_size])
            yield ImageBatch(images, jnp.zeros(len(images), jnp.int32), len(images))

    monkeypatch.setattr(ImageGenerator, "generate", generate)
    monkeypatch.setattr(ImageGenerator, "straightness", lambda *arguments, **options: 0.0)
    line = f"--load_dir {run} --fid_stats IN/data.npz --num_samples 40 --denoise_timesteps 1 --use_cfg 0 --memorisation"
    np.savez(tmp_path / "data.npz", arr_0=copies)
    (row,) = score(read_flags, tmp_path, line)
    assert row["memorised"] == 50
    assert row["train_images"] == "digits"
    assert row["train_sha256"] == dataset.fingerprint.sha256
    assert row["num_train_images"] == len(dataset.source)
    assert row["memorised_validation"] < 15
    assert row["authpct_validation"] > 50 >= row["authpct"]
    assert (tmp_path / "out" / "memorised_1_none.png").exists()

    # It is found again, in another place too.
    monkeypatch.setattr(ImageGenerator, "generate", None)
    capsys.readouterr()
    assert score(read_flags, tmp_path, line) == [row]


def test_mirror_images_are_those_that_the_training_saw(files):
    for settings, expected in (({}, False), ({"random_flip": 1}, True), ({"augment": ["flip"]}, True)):
        assert open_training(None, saved_run(files, **settings), (8, 8, 1), "uint8").has_mirrors is expected


@pytest.mark.parametrize("has_mirrors", [False, True])
def test_mirror_images_count_where_the_training_saw_them(has_mirrors, files, tmp_path, tables, capsys):
    training = open_training(None, saved_run(files, random_flip=int(has_mirrors)), (8, 8, 1), "uint8")
    training = dataclasses.replace(training, held_out=None)  # which takes longer
    images = np.concatenate(list(training.images.read(500)))
    samples = SampleImages(20, (8, 8, 1), "uint8", tmp_path)
    for part in np.split(plant(images), [7]):
        samples.add(part)
    assert samples.is_full
    results, _ = Memorising(training, PIXELS, 16, make_mesh(), tmp_path).compute(samples.images)
    assert results["memorised"] == (10 if has_mirrors else 5)
    assert ("train.npz and their mirror images, by pixels" in capsys.readouterr().out) is has_mirrors
    ((drawn, _, _, _),) = tables
    np.testing.assert_array_equal(drawn[0, 1], images[COPIED])
    if has_mirrors:
        np.testing.assert_array_equal(drawn[1, 0], images[MIRRORED][:, ::-1])
        np.testing.assert_array_equal(drawn[1, 1], images[MIRRORED])


def test_images_that_memory_does_not_hold_are_read_again(files, tmp_path, monkeypatch):
    training = dataclasses.replace(open_training(None, saved_run(files), (8, 8, 1), "uint8"), held_out=None)
    samples = SampleImages(20, (8, 8, 1), "uint8", tmp_path)
    samples.add(plant(np.concatenate(list(training.images.read(500)))))
    results = []
    for limit in (2**30, 0):
        monkeypatch.setattr(memorising, "MAX_KEPT_BYTES", limit)
        results.append(Memorising(training, PIXELS, 16, make_mesh(), tmp_path).compute(samples.images)[0])
    assert results[0] == results[1]
    assert results[0]["memorised"] == 5
    assert len(list(tmp_path.iterdir())) == 5  # those of `files` alone


def test_held_out_images_are_of_all_classes():
    rows = np.arange(100, dtype=np.uint8)
    dataset = array_dataset("x", np.tile(rows[:, None, None, None], (1, 2, 2, 1)), np.repeat([0, 1], 50), ("a", "b"))
    (images,) = memorising._read_evenly(dataset, 12).read(20)
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(0, 100, 9))
    assert memorising._read_evenly(dataset, 100).num_samples == 100


def test_other_images_than_those_of_the_training_are_noticed(files, capsys):
    saved = saved_run(files)
    sha256 = load_dataset(saved["dataset_name"]).fingerprint.sha256
    saved["dataset"]["splits"] = {"train": {"sha256": sha256}}
    open_training(None, saved, (8, 8, 1), "uint8")
    assert "is not what it was" not in capsys.readouterr().err
    saved["dataset"]["splits"]["train"]["sha256"] = "0"
    open_training(None, saved, (8, 8, 1), "uint8")
    assert "train.npz is not what it was when the run was trained" in capsys.readouterr().err


def test_features_by_default():
    assert choose_features(None, (32, 32, 3), ("inception",)) == PIXELS
    assert choose_features(None, (64, 32, 3), ("inception",)) == ("inception", "pool")
    assert choose_features(None, (64, 64, 3), ()) == PIXELS


def test_a_row_of_other_training_images_is_another_row(tmp_path):
    settings = {"inception_logits_sha256": None, "metrics": ["moments"]}
    compared = {"memorisation_features": "pixels", "train_sha256": "a", "train_mirrors": False, "train_images": "x"}
    metrics = {"mean_error": 1.0, "num_steps": 4, "memorised": 3.25, "memorised_error": 0.5, "ct": -1.26}
    results = Results(tmp_path)
    row = results.add(settings | compared, metrics)
    assert Results(tmp_path).find(settings | compared | {"train_images": "y"}) == row
    for other in ({}, compared | {"train_sha256": "b"}, compared | {"train_mirrors": True}):
        assert Results(tmp_path).find(settings | other) is None
    assert [to_text(name, row) for name in ("memorised", "ct", "authpct")] == ["3.2 ± 0.5", "-1.3", ""]


def test_a_training_compares_as_many_samples_as_the_flag_says(tmp_path, configure, monkeypatch):
    copies = np.stack([load_dataset("digits").source[i]["image"] for i in range(30)])

    class Copies:
        """A generator of training images, the first of them mirrored."""

        def __init__(self, model, params, seed=0):
            pass

        def straightness(self):
            return 0.0

        def generate(self, sampler, num_samples, batch_size):
            images = np.concatenate([copies[:1, :, ::-1], copies[1:num_samples]])
            for start in range(0, num_samples, batch_size):
                rows = images[start : start + batch_size]
                yield ImageBatch(jnp.asarray(np.resize(rows, (batch_size, 8, 8, 1))), None, len(rows))

    monkeypatch.setattr(evaluation, "ImageGenerator", Copies)
    monkeypatch.setattr(evaluation, "loss_by_time", lambda *_: {})
    monkeypatch.setattr(evaluation, "reconstruction_panel", lambda *_: None)
    monkeypatch.setattr(evaluation, "sample_panels", lambda *_, **__: iter(()))
    flags = ["--dataset_name", "digits", "--codec", "pixels", "--batch_size", 8, "--model.preset", "debug"]
    built = build_run(configure([*flags, "--save_dir", tmp_path / "run", "--eval_memorisation", 20]))
    mirrored = {**built.datasets, "train": dataclasses.replace(built.datasets["train"], random_flip=True)}
    state = TrainState(step=1, params=None, ema_params=None, opt_state=None, key=jax.random.key(0))
    found = [
        dict(evaluation.evaluate(each, state, None)) for each in (built, dataclasses.replace(built, datasets=mirrored))
    ]
    assert [numbers["memorised"] for numbers in found] == [95, 100]
    assert found[0]["memorised_validation"] < 15
    assert found[0]["memorised_pairs"] is not None


# --- What cannot be compared ---

SAMPLES = "--samples IN/samples.npz --fid_stats IN/train.npz"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{SAMPLES} --memorisation", "--samples do not say what they were trained on; name it by --train_images"),
        (f"{SAMPLES} --train_images digits", "--train_images=digits has no effect without --memorisation"),
        (
            f"{SAMPLES} --memorisation --train_images IN/large.npz",
            "--train_images=.*large.npz holds uint8 16x8x1 images, the samples are uint8 8x8x1",
        ),
        (f"{SAMPLES} --memorisation --train_images IN/floats.npz", "holds float32 8x8x1 images, the samples are uint8"),
        (f"{SAMPLES} --memorisation --train_images IN/one.npz", "holds one image; memorisation compares the two"),
        (f"{SAMPLES} --memorisation --train_images IN/absent.npz", "--train_images=.*absent.npz is no data set"),
        (f"{SAMPLES} --memorisation --train_images folder:IN/absent", "^--train_images=folder:.*: there is no folder"),
        (f"{SAMPLES} --memorisation --train_images latents:IN", "--train_images=latents:.* holds latents; name the"),
        (
            f"{SAMPLES} --memorisation --train_images digits --memorisation_features inception",
            "inception: no metric of these images needs that network; add it by --extractor, and to --metrics where",
        ),
        (
            f"{SAMPLES} --memorisation --train_images digits --memorisation_features pixel",
            "--memorisation_features=pixel is unknown; did you mean pixels",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(line, message, files, read_flags):
    with pytest.raises(UserError, match=message) as error:
        score(read_flags, files, line)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_noticed_before_anything_is_sampled(files, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(UserError, match=r"has no room for 1.9e-06 GB of images .*No space left.*; name a folder of"):
        SampleImages(30, (8, 8, 1), "uint8", tmp_path)
    training = open_training(None, saved_run(files), (8, 8, 1), "uint8")
    with pytest.raises(UserError, match=r"has no room for 0.0016 GB"):
        Memorising(training, POOL, 16, make_mesh(), tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_interval", 0], "--eval_memorisation=9 has no effect with --eval_interval=0"),
        (["--dataset_name", "latents:x"], "--eval_memorisation=9 has no effect with --dataset_name=latents:x, which"),
    ],
)
def test_trainings_that_have_nothing_to_compare_are_refused(words, message, tmp_path, configure):
    with pytest.raises(UserError, match=message):
        configure(["--save_dir", tmp_path, "--eval_memorisation", 9, *words])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("latents:x", "the run's latents:x holds latents; name the images by --train_images"),
        ("mine", "the run's mine is not a known data set"),
    ],
)
def test_runs_whose_images_are_not_at_hand_are_refused(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_training(None, saved_run(tmp_path, dataset_name=name), (8, 8, 1), "uint8")


def test_training_images_may_be_a_data_set_in_object_storage():
    name = "zip:s3://bucket/cats.zip"
    assert expand_path(name, "train_images") == name
    with pytest.raises(UserError, match=r"--train_images=s3://bucket/cats is a URL, .*, or a data set such as"):
        expand_path("s3://bucket/cats", "train_images")
