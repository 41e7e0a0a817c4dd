"""Images as conditions: resized or encoded, mirrored with the image, given by files, and shown beside what is drawn."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

import sample
from utils.base.messages import UserError
from utils.codecs.codec import PixelCodec
from utils.conditions.condition import record_condition, restore_condition
from utils.conditions.images import ImageCondition
from utils.conditions.several import SeveralCondition
from utils.conditions.vector import VectorCondition
from utils.convert.sources import read_source
from utils.data.columns import column_dataset
from utils.data.dataset import DataOptions
from utils.data.loaders import load_dataset
from utils.flags.conditions import read_condition_images
from utils.images import plotting
from utils.images.pixels import PixelFormat
from utils.runs.export import export_run
from utils.runs.importing import import_run
from utils.runs.opening import load_generator
from utils.training import build_run, make_config, train

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, 8, 8, 1), np.uint8)
SMALL = IMAGES.reshape(60, 4, 2, 4, 2, 1).mean(axis=(2, 4)).round().astype(np.uint8)
KIND = ImageCondition((4, 4, 1)).fit_latents((8, 8, 1), (8, 8, 1))
SETTINGS = {
    "codec": "pixels", "model.hidden_size": 32, "model.depth": 1, "model.patch_size": 2, "batch_size": 8,
    "eval_interval": 0, "wandb.mode": "disabled", "model.dtype": "float32",
}  # fmt: skip


class HalvingCodec(PixelCodec):
    """Latents of half the size, to which noise is added, and another scale."""

    def encode(self, key, images):
        small = images[:, ::2, ::2] * 3
        return small + jax.vmap(lambda key: jax.random.normal(key, small.shape[1:]))(key)


# --- The kind ---


def test_images_are_resized_to_the_latents():
    found = KIND.prepare(PixelCodec(), KIND.check(SMALL))
    unit = SMALL.astype(np.float32) / 127.5 - 1
    expected = scipy.ndimage.zoom(unit, (1, 2, 2, 1), order=1, grid_mode=True, mode="nearest")
    np.testing.assert_allclose(found["channels"], expected, atol=1e-5)
    # Once more changes nothing, and floats have their own range.
    assert KIND.prepare(PixelCodec(), found) is found
    floats = ImageCondition((4, 4, 1), PixelFormat("float32", -2, 6)).fit_latents((8, 8, 1), (8, 8, 1))
    values = (unit * 4 + 2).astype(np.float32)
    again = floats.prepare(PixelCodec(), floats.check(values))
    np.testing.assert_allclose(again["channels"], expected, atol=1e-5)


def test_images_are_encoded_by_the_codec():
    kind = ImageCondition((4, 4, 1), space="latents").fit_latents((8, 8, 1), (4, 4, 1))
    rows = kind.check(np.concatenate([SMALL[:3], SMALL[:1]]))
    found = np.asarray(kind.prepare(HalvingCodec(), rows)["channels"])
    # The draws of the codec are the same for all: an image has the same latents wherever it stands.
    np.testing.assert_array_equal(found[0], found[3])
    unit = scipy.ndimage.zoom(SMALL[:3] / 127.5 - 1, (1, 2, 2, 1), order=1, grid_mode=True, mode="nearest")
    noise = found[:3] - 3 * unit[:, ::2, ::2]
    np.testing.assert_allclose(noise, np.broadcast_to(noise[:1], noise.shape), atol=1e-5)
    assert noise.std() > 0.5
    with pytest.raises(UserError, match=r"have 1 channel, the images 3, .* use --condition_columns image:pixels"):
        ImageCondition((4, 4, 1), space="latents").fit_latents((8, 8, 3), (4, 4, 4))


def test_what_is_not_given_is_told_from_zeros():
    embed = KIND.embedder(16)
    zeros = {"channels": jnp.zeros((2, 8, 8, 1)), "is_given": jnp.ones(2, bool)}
    np.testing.assert_array_equal(embed(zeros).channels[..., 0], 0)
    np.testing.assert_array_equal(embed(zeros).channels[..., 1], 1)
    np.testing.assert_array_equal(embed(KIND.null(2)).channels, 0)
    # Contents of what is not given do not matter, not even NaN.
    spoilt = {"channels": jnp.full((2, 8, 8, 1), jnp.nan), "is_given": jnp.zeros(2, bool)}
    np.testing.assert_array_equal(embed(spoilt).channels, 0)


def test_a_record_gives_the_kind_back():
    kind = ImageCondition((4, 6, 3), PixelFormat("float32", -0.1, 0.7), "latents")
    record = json.loads(json.dumps(record_condition(kind)))
    assert restore_condition(record) == kind
    for change in ({"shape": [4, 6]}, {"shape": [0, 6, 3]}, {"space": "x"}, {"pixels": None}, {"pixels": {}}):
        with pytest.raises(UserError, match="is no record of shape, pixels and space"):
            restore_condition({**record, "image": record["image"] | change})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (SMALL[:, :3], r"images are \(60, 3, 4, 1\), not \(n, 4, 4, 1\)"),
        (SMALL / 255, "images are float64, but those of the run are uint8"),
        ({"image": SMALL}, "the arrays are image, is_given, not image"),
    ],
)
def test_other_arrays_are_refused(images, message):
    with pytest.raises(UserError, match=message):
        KIND.check(images)


# --- Data and runs ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of data, an unconditional run, and one that goes on from it with images."""
    folder = tmp_path_factory.mktemp("images")
    np.savez(folder / "plain.npz", images=IMAGES)
    np.savez(folder / "data.npz", images=IMAGES, condition_images=SMALL)
    for name, data, source in (("plain", "plain", None), ("tuned", "data", str(folder / "plain"))):
        path = f"npz:{folder / data}.npz"
        own = {"dataset_name": path, "save_dir": str(folder / name), "load_dir": source, "max_steps": 3}
        train(build_run(make_config({**SETTINGS, **own})))
    return folder


def test_a_run_that_is_fine_tuned_with_images_starts_as_its_source(runs):
    settings = {**SETTINGS, "dataset_name": f"npz:{runs / 'data.npz'}", "load_dir": str(runs / "plain")}
    start = build_run(make_config({**settings, "save_dir": str(runs / "start"), "max_steps": 1}))
    parent = load_generator(runs / "plain", params="raw")
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    t = jnp.array([0.1, 0.5, 0.9])
    found = start.model.condition.prepare(start.model.codec, KIND.check(SMALL[:3]))
    params = jax.tree.map(jnp.asarray, start.start[0])
    expected = jax.jit(parent.model.network.apply)({"params": parent.params}, x, t, jnp.zeros(3, int))
    assert jnp.abs(expected).max() > 0
    network = start.model.network
    np.testing.assert_array_equal(jax.jit(network.apply)({"params": params}, x, t, found), expected)
    # Three steps later images matter.
    tuned = load_generator(runs / "tuned", params="raw")
    assert np.abs(tuned.params["condition_patches"]["kernel"]).max() > 0
    first, second = (tuned.model_fn(x, t, KIND.check(rows)) for rows in (SMALL[:3], SMALL[3:6]))
    assert jnp.abs(first - second).max() > 0


def test_an_export_is_the_run_without_rows_of_its_data(runs, tmp_path):
    *_, card = export_run(str(runs / "tuned"), tmp_path / "out", "raw", None)
    import_run("out", read_source(str(tmp_path / "out")), tmp_path / "again", {})
    before, after = load_generator(runs / "tuned", params="raw"), load_generator(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert before.condition == after.condition
    with pytest.raises(UserError, match=r"has no conditions\.npz, .*: give conditions, or copy that of the run"):
        after.conditions([0])
    # It is never written over a run, whose settings would be others.
    with pytest.raises(UserError, match=r"--out=.*tuned is the folder of a run; choose another"):
        export_run(str(runs / "tuned"), runs / "tuned")
    # What is on the page works without them.
    text = card.read_text(encoding="utf-8")
    assert "--condition_file FILE.npz\n" in text
    assert "conditions = ...  # of each sample: condition images 4x4x1\nimages = generator.sample(conditions=" in text


def test_files_are_conditions_and_stand_above_their_samples(runs, tmp_path, read_flags, monkeypatch):
    folder = tmp_path / "given"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(SMALL[i, ..., 0]).save(folder / f"{i}.png")
    tables = []
    monkeypatch.setattr(plotting, "image_table", lambda images, *words: tables.append(images) or plotting.Figure())
    words = f"--load_dir {runs / 'tuned'} --denoise_timesteps 2 --cfg_scale 2 --out {tmp_path / 'out'}".split()
    arguments = ["--condition_images", str(folder), "--num_samples", "6", "--save_samples", str(tmp_path / "six.npz")]
    sample.main(read_flags(sample, [*words, *arguments]))
    expected = load_generator(runs / "tuned").sample(conditions=SMALL[[0, 1, 2] * 2], num_steps=2, cfg_scale=2)
    with np.load(tmp_path / "six.npz") as saved:
        np.testing.assert_array_equal(saved["arr_0"], expected)
        np.testing.assert_array_equal(saved["condition_images"], SMALL[[0, 1, 2] * 2])
    # Given images, and two samples of each below it.
    (table,) = tables
    np.testing.assert_array_equal(table[0], np.repeat(SMALL[:3].repeat(2, axis=1).repeat(2, axis=2), 3, axis=-1))
    np.testing.assert_array_equal(table[1:, ..., :1], expected.reshape(2, 3, 8, 8, 1))

    # A file of them gives the same.
    np.savez(tmp_path / "rows.npz", condition_images=SMALL[:3])
    arguments = ["--condition_file", str(tmp_path / "rows.npz"), *arguments[2:]]
    sample.main(read_flags(sample, [*words, *arguments]))
    with np.load(tmp_path / "six.npz") as saved:
        np.testing.assert_array_equal(saved["arr_0"], expected)

    # What is no image of the run, before anything is drawn.
    for run, wrong, message in (
        ("plain", ["--condition_images", str(folder)], "the run's condition is no image"),
        ("tuned", ["--condition_images", str(tmp_path / "no")], "/no: there is no such folder"),
        ("tuned", ["--condition", "a=1"], "--condition=a=1: the run's condition has an image; give --condition_images"),
        ("tuned", ["--condition_images", str(folder), "--condition", "a=1"], "leave --condition out"),
        ("tuned", ["--condition_images", str(folder), "--classes", "1"], "give one of them"),
    ):
        with pytest.raises(UserError) as error:
            sample.main(read_flags(sample, [*words, "--load_dir", str(runs / run), *wrong]))
        assert message in str(error.value)


def test_images_beside_numbers_are_given_together(tmp_path, read_flags):
    vector = VectorCondition.of_rows(np.float32([[0], [2]]), ["angle"])
    kind = SeveralCondition((("vector", vector), ("image", KIND)))
    for i in range(2):
        Image.fromarray(SMALL[i, ..., 0]).save(tmp_path / f"{i}.png")
    found = read_condition_images(tmp_path, "angle=1", kind, 8)
    np.testing.assert_array_equal(found["image"]["image"], SMALL[:2])
    assert found["vector"]["value"].tolist() == [[1], [1]]
    assert kind.titles(found) == ["angle=1", "angle=1"]
    np.testing.assert_array_equal(kind.pictures(found), SMALL[:2])
    prepared = kind.prepare(PixelCodec(), found)
    assert jax.tree.structure(prepared) == jax.tree.structure(kind.null(2))
    with pytest.raises(UserError, match="give angle by --condition"):
        read_condition_images(tmp_path, None, kind, 8)


def test_an_image_is_mirrored_with_its_condition():
    dataset = column_dataset("arrays", {"images": IMAGES, "condition_images": SMALL}, random_flip=True)
    plain, mirrored = dataset.row(0, False), dataset.row(0, True)
    np.testing.assert_array_equal(mirrored["image"], plain["image"][:, ::-1])
    np.testing.assert_array_equal(mirrored["condition"]["image"], plain["condition"]["image"][:, ::-1])


def test_the_flag_says_whether_images_are_encoded(runs):
    name = f"npz:{runs / 'data.npz'}"
    for text, space in (("image", "pixels"), ("image:pixels", "pixels"), ("image:latents", "latents")):
        assert load_dataset(name, "train", DataOptions(condition_columns=text)).condition.space == space
    for text in ("image:colour", "image:pixels,latents"):
        with pytest.raises(UserError, match=r"--condition_columns=.*: write image:pixels or image:latents"):
            load_dataset(name, "train", DataOptions(condition_columns=text))
