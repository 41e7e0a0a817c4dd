"""Latents and pairs of conditions that are no classes: a tree of arrays, as bytes and back."""

import dataclasses
import json
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import encode_latents
from utils.base.messages import UserError
from utils.conditions.condition import CONDITIONS, Condition
from utils.data.dataset import ImageDataset
from utils.data.fingerprint import Fingerprint
from utils.data.latents import MANIFEST, LatentsManifest, check_same, write_latents
from utils.data.loaders import load_dataset
from utils.data.records import condition_bytes, describe_kind
from utils.runs.pool import choose_pool


@dataclasses.dataclass(frozen=True)
class Wind(Condition):
    """A kind of three arrays, of three dtypes, with a fact of the data."""

    station: str = "north"
    spec: ClassVar[Any] = {
        "speed": jax.ShapeDtypeStruct((2,), jnp.float32),
        "is_given": jax.ShapeDtypeStruct((), jnp.bool_),
        "code": jax.ShapeDtypeStruct((3,), jnp.uint8),
    }

    def read(self, example):
        return example["wind"]

    def to_json(self):
        return {"station": self.station}

    @classmethod
    def from_json(cls, data):
        return cls(data["station"])


def wind(i: int) -> dict:
    return {"speed": np.array([i, -0.5], np.float32), "is_given": np.bool_(i % 2), "code": np.uint8([i, 255, 0])}


@pytest.fixture(autouse=True)
def kind(monkeypatch):
    monkeypatch.setitem(CONDITIONS, "wind", Wind)
    return Wind("south")


def test_the_bytes_are_those_of_the_leaves(kind):
    """In the order of the tree, which is that of the sorted names: code, is_given, speed."""
    assert condition_bytes(kind, wind(3)).hex(" ") == "03 ff 00 01 00 00 40 40 00 00 00 bf"
    assert condition_bytes(None, np.int32(258)).hex(" ") == "02 01 00 00"


@pytest.fixture
def folder(kind, tmp_path):
    """Latents of three images for each split, by what encode_latents.py is made of."""
    images = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8, 1)
    source = [{"image": image, "wind": wind(i)} for i, image in enumerate(images)]
    fingerprint = Fingerprint("winds", 3, "")
    dataset = ImageDataset("winds", "train", source, (8, 8, 1), (), False, fingerprint, own_condition=kind)
    made = LatentsManifest(
        "winds", (8, 8, 1), (1, 1, 4), (), dict.fromkeys(("train", "validation"), 3),
        dict.fromkeys(("train", "validation"), 1), 4, "some/vae", "0" * 64, condition=describe_kind(kind),
    )  # fmt: skip
    (tmp_path / MANIFEST).write_text(json.dumps(made.to_json()))

    def encode(images):  # the first four pixels as moments
        return np.float16(images.reshape(len(images), -1)[:, :8].reshape(-1, 1, 2, 1, 1, 4))

    for split in made.num_examples:
        examples = encode_latents.encode_examples(dataset, range(3), 2, encode)
        write_latents(tmp_path / made.shards(split)[0][0], examples, kind)
    check_same(tmp_path, made, made, {})
    return tmp_path


def test_latents_keep_any_condition(folder, kind, monkeypatch):
    dataset = load_dataset(f"latents:{folder}")
    assert (dataset.condition, dataset.class_names) == (kind, ())
    for i in range(3):
        row = dataset.row(i, False)
        jax.tree.map(np.testing.assert_array_equal, row["condition"], wind(i))
        np.testing.assert_array_equal(row["moments"].ravel(), 64 * i + np.arange(8))

    # Samples of a run that is trained on them are drawn from these conditions.
    monkeypatch.setattr(Wind, "DRAWS_ROWS", True)
    pool = choose_pool(dataset)
    jax.tree.map(np.testing.assert_array_equal, pool, jax.tree.map(lambda *rows: np.stack(rows), *map(wind, range(3))))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"condition": {"kind": "rain", "arrays": []}}, "'rain' is unknown"),
        ({"condition": {"kind": "wind", "arrays": []}, "station": "north"}, "has arrays"),
        ({"condition": {"kind": "wind"}}, "station"),
        (None, "names that are not strings"),
    ],
)
def test_a_manifest_of_an_unknown_condition_is_refused(folder, facts, message):
    content = json.loads((folder / MANIFEST).read_text()) | {"condition": facts}
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"manifest.json is not a valid latents manifest \(.*{message}"):
        load_dataset(f"latents:{folder}")


def test_a_damaged_condition_is_refused(folder, kind):
    broken = wind(0) | {"speed": np.float32([np.nan, 0])}
    moments = np.zeros((1, 2, 1, 1, 4), np.float16)
    (file,) = folder.glob("train-*")
    write_latents(file, [(broken, moments)] * 3, kind)
    dataset = load_dataset(f"latents:{folder}")
    with pytest.raises(UserError, match="record 2 has a condition that is NaN or infinite; make it again"):
        dataset.row(2, False)
