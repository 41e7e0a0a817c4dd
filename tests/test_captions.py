"""Captions of data: from a table to tokens, and encoded once where that is slow."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from utils.base.messages import UserError
from utils.conditions.text_encoders import TEXT_ENCODERS, TextEncoder, TextEncoderKind, encode_words
from utils.conditions.tokens import TextCondition
from utils.data import captions
from utils.data.captions import EncodedCaptions, encode_captions
from utils.data.dataset import DataOptions
from utils.data.loaders import load_dataset

CAPTIONS = ["a b", "c", "a b", "d e f", "c"]


def test_captions_of_a_slow_encoder_are_encoded_once(monkeypatch):
    seen = []

    def encode(texts):
        seen.extend(texts)
        return encode_words(texts)

    monkeypatch.setitem(TEXT_ENCODERS, "slow", TextEncoderKind(lambda _: TextEncoder(encode), "", is_slow=True))
    monkeypatch.setattr(captions, "CHUNK", 2)
    source = [{"image": number, "caption": text} for number, text in enumerate(CAPTIONS)]
    condition = TextCondition(3, 64, "slow")
    encoded = encode_captions(source, condition, "x")
    assert sorted(seen) == sorted(set(CAPTIONS))
    for number, text in enumerate(CAPTIONS):
        found, expected = condition.read(encoded[number]), condition.read({"caption": text})
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert encoded.read_condition(number)["image"] == number
    assert encode_captions(source, dataclasses.replace(condition, encoder="words"), "x") is source
    monkeypatch.setattr(captions, "MAX_BYTES", 3 * 3 * 64 * 4 - 1)
    with pytest.raises(UserError, match=r"^x: tokens of 3 captions by --text_encoder=slow take 0\.0 GiB, of which 0 "):
        encode_captions(source, condition, "x")


@pytest.mark.parametrize("is_slow", [False, True])
def test_captions_of_a_table_are_encoded_as_the_flag_says(tmp_path, monkeypatch, is_slow):
    monkeypatch.setitem(TEXT_ENCODERS, "own", TextEncoderKind(lambda _: TextEncoder(encode_words), "", is_slow=is_slow))
    rows = [{"file_name": f"{number}.png", "caption": text} for number, text in enumerate(CAPTIONS)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for number in range(len(CAPTIONS)):
        Image.new("L", (4, 4), 10 * number).save(tmp_path / f"{number}.png")
    options = DataOptions(image_size=4, condition_columns="text:caption", text_encoder="own")
    for split in ("train", "validation"):
        dataset = load_dataset(f"folder:{tmp_path}", split, options)
        assert isinstance(dataset.source, EncodedCaptions) == is_slow
        assert (dataset.condition.encoder, dataset.random_flip, dataset.class_names) == ("own", False, ())
        for number in range(len(dataset.source)):
            row = dataset.row(number, False)
            text = CAPTIONS[row["image"].max() // 10]
            jax.tree.map(np.testing.assert_array_equal, row["condition"], dataset.condition.read({"caption": text}))
    with pytest.raises(
        UserError, match=r"^--condition_columns=text:caption: --text_encoder=word is unknown; did you mean"
    ):
        load_dataset(f"folder:{tmp_path}", "train", dataclasses.replace(options, text_encoder="word"))
    with pytest.raises(UserError, match=r"^--text_encoder=words: digits has no captions; leave it out$"):
        load_dataset("digits", "train", DataOptions(text_encoder="words"))
