"""Cached latents: what is stored comes back, files are all or nothing, and nothing is mixed."""

import dataclasses
import json

import numpy as np
import pytest

import encode_latents
from encode_latents import describe_latents
from tests.conftest import GOLDEN
from tests.data_sets import load
from utils.base.messages import UserError
from utils.codecs.codecs import CodecSpec
from utils.codecs.kl import KLCodec, KLConfig
from utils.data.batches import epoch_batches, training_batches
from utils.data.dataset import SPLITS, array_dataset
from utils.data.latents import (
    MANIFEST,
    LatentsManifest,
    check_num_files,
    check_same,
    load_latents_manifest,
    write_latents,
)

MOMENTS = (
    np.random.default_rng(0).normal(size=(10, 2, 2, 3, 3, 4)).astype(np.float16)
)  # image, view, mean/logvar, h w c
SHA256 = "0" * 64


def manifest(**changes) -> LatentsManifest:
    values = {
        "dataset_name": "folder:/images",
        "image_shape": (24, 24, 3),
        "latent_shape": (3, 3, 4),
        "class_names": ("cat", "dog"),
        "num_examples": {"train": 10, "validation": 3},
        "num_views": {"train": 2, "validation": 1},
        "shard_size": 4,
        "vae": "some/vae",
        "vae_sha256": SHA256,
    }
    return LatentsManifest(**(values | changes))


@pytest.fixture
def folder(tmp_path):
    """Latents of ten training images, labels alternating, and of three for validation."""
    made = manifest()
    (tmp_path / MANIFEST).write_text(json.dumps(made.to_json()))
    for split, views in made.num_views.items():
        for name, rows in made.shards(split):
            write_latents(tmp_path / name, [(i % 2, MOMENTS[i, :views]) for i in rows])
    return tmp_path


def test_a_manifest_comes_back(folder):
    assert load_latents_manifest(folder) == manifest()
    assert "num_arrays" not in manifest().to_json()  # of moments, as earlier versions write and read it
    assert load_latents_manifest(folder / "elsewhere") is None
    shards = manifest().shards("train")
    assert [list(rows) for _, rows in shards] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert shards[2][0] == "train-00002-of-00003.array_record"


def test_moments_come_back_in_order(folder):
    dataset = load(f"latents:{folder}", "validation")
    assert (dataset.name, dataset.image_shape, dataset.class_names) == ("folder:/images", (24, 24, 3), ("cat", "dog"))
    assert not dataset.random_flip
    (batch,) = epoch_batches(dataset, 5)
    np.testing.assert_array_equal(batch.moments, MOMENTS[:3, 0])
    assert batch.moments.dtype == np.float16
    assert batch.condition.tolist() == [0, 1, 0]


def test_training_takes_either_view_of_every_image(folder):
    dataset = load(f"latents:{folder}")
    batches = training_batches(dataset, 10, 0)
    views = {
        moments.tobytes(): (image, view) for image, pair in enumerate(MOMENTS) for view, moments in enumerate(pair)
    }
    taken = []
    for _ in range(20):
        batch = next(batches)
        epoch = [views[moments.tobytes()] for moments in batch.moments]
        assert sorted(image for image, _ in epoch) == list(range(10))
        assert batch.condition.tolist() == [image % 2 for image, _ in epoch]
        taken += [view for _, view in epoch]
    assert abs(np.mean(taken) - 0.5) < 0.18  # five standard deviations of a fair coin


def test_a_shard_of_the_same_examples_has_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_latents(tmp_path / name, [(i, MOMENTS[i]) for i in range(10)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_interrupted_shard_leaves_no_file_of_its_name(tmp_path):
    def examples():
        yield 0, MOMENTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path / "a", examples())
    assert not (tmp_path / "a").exists()


def test_what_is_missing_is_told(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match=f"{empty} holds no cached latents; .*encode_latents.py"):
        load(f"latents:{empty}")
    with pytest.raises(UserError, match=r"--image_size=32: the images of latents:.* are 24x24"):
        load(f"latents:{folder}", image_size=32)
    (folder / "train-00001-of-00003.array_record").unlink()
    with pytest.raises(UserError, match="1 of its 3 files are missing, such as train-00001"):
        load(f"latents:{folder}")
    (folder / "validation-00000-of-00001.array_record").write_bytes(b"")
    write_latents(folder / "validation-00000-of-00001.array_record", [(0, MOMENTS[0, :1])])
    with pytest.raises(UserError, match="holds 1 records, but its manifest says 3"):
        load(f"latents:{folder}", "validation")
    (folder / MANIFEST).write_text('{"format": 1}')
    with pytest.raises(UserError, match="not a valid latents manifest"):
        load(f"latents:{folder}")


@pytest.mark.parametrize(("count", "shard_size", "fix"), [(1_281_167, 1, 2), (10**9, 999, 1000), (10**6 + 1, 1, 2)])
def test_no_more_files_are_made_than_are_read(count, shard_size, fix):
    with pytest.raises(UserError, match=rf"--shard_size={shard_size}: x would be [\d,]+ files, .* use {fix} or more"):
        check_num_files(count, shard_size, "x")
    check_num_files(count, fix, "x")
    for size in (shard_size, fix):
        content = manifest(num_examples={"train": count, "validation": 1}, shard_size=size)
        if size == fix:
            content.check()
        else:
            with pytest.raises(ValueError, match="shard_size"):
                content.check()


def test_a_data_set_is_not_encoded_to_more_files_than_are_read(read_flags, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.latents.MAX_FILES", 10)
    words = ["--dataset_name", "digits", "--out", str(tmp_path / "out"), "--shard_size", "149"]
    with pytest.raises(UserError, match=r"--shard_size=149: the 1,500 images of the train split would be 11 files"):
        encode_latents.main(read_flags(encode_latents, words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"vae_sha256": "1" * 64},
        {"image_shape": (32, 32, 3)},
        {"num_examples": {"train": 11, "validation": 3}},
        {"class_names": ("cat", "fox")},
        {"num_arrays": 1},
    ],
)
def test_other_latents_are_not_mixed_in(folder, change):
    (name,) = change
    with pytest.raises(UserError, match=f"--out=.* holds latents with {name} "):
        check_same(folder, manifest(), manifest(**change), {})


def test_the_same_vae_and_images_may_lie_elsewhere(folder):
    moved = dataclasses.replace(manifest(), vae="/another/copy", dataset_name="folder:/another")
    check_same(folder, manifest(), moved, {})


def test_classes_without_images_come_along_and_older_latents_do_not_say(folder):
    new = manifest(empty_classes=(0,))
    check_same(folder, manifest(), new, {})  # an encoding that an older version began goes on
    (folder / MANIFEST).write_text(json.dumps(new.to_json()))
    assert [load(f"latents:{folder}", split).empty_classes for split in ("train", "validation")] == [(0,), ()]
    older = {name: value for name, value in new.to_json().items() if name != "empty_classes"}
    (folder / MANIFEST).write_text(json.dumps(older))
    assert load(f"latents:{folder}").empty_classes == ()
    codec = KLCodec.random(0, KLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4))
    images = np.zeros((4, 8, 8, 3), np.uint8)
    datasets = {split: array_dataset("gaps", images, np.array([0, 2, 2, 4]), split=split) for split in SPLITS}
    assert describe_latents(datasets, codec, CodecSpec("kl", "vae"), 4).empty_classes == (1, 3)
    for wrong in ([2], [-1], ["cat"], 3):
        (folder / MANIFEST).write_text(json.dumps(older | {"empty_classes": wrong}))
        with pytest.raises(UserError, match="not a valid latents manifest"):
            load(f"latents:{folder}")


@pytest.mark.parametrize(("flip", "views"), [("", 1), ("--random_flip 1", 2)])
def test_what_is_encoded_is_what_the_flags_say(read_flags, tmp_path, monkeypatch, flip, views):
    class Prepared(Exception):
        """Raised with the manifest, before anything is encoded."""

    def end(out, manifest, fingerprints):
        raise Prepared(manifest)

    np.savez(tmp_path / "a.npz", images=np.zeros((20, 16, 16, 3), np.uint8), labels=np.zeros(20, np.int32))
    monkeypatch.setattr(encode_latents, "prepare_folder", end)
    words = f"--dataset_name npz:{tmp_path / 'a.npz'} --vae {GOLDEN / 'vae_tiny'} --shard_size 7 {flip}"
    with pytest.raises(Prepared) as prepared:
        encode_latents.main(read_flags(encode_latents, [*words.split(), "--out", str(tmp_path / "out")]))
    (manifest,) = prepared.value.args
    assert manifest.num_views == {"train": views, "validation": 1}
    assert (manifest.shard_size, manifest.vae) == (7, str(GOLDEN / "vae_tiny"))
