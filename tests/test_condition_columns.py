"""Conditions of npz:FILE and of arrays in Python, and what is refused."""

import numpy as np
import pytest

from utils.base.messages import UserError, warn_once
from utils.codecs.codecs import CodecSpec, describe_codec
from utils.conditions.classes import ClassCondition
from utils.conditions.tokens import TextCondition, TokensCondition
from utils.conditions.vector import VectorCondition
from utils.data.columns import column_dataset
from utils.data.dataset import SPLITS, DataOptions, split_rows
from utils.data.loaders import describe_data, load_dataset
from utils.training import make_config
from utils.training.start import compare_with_saved

rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(200, 4, 6, 2)).astype(np.float32)
NUMBERS = rng.normal(3, 2, (200, 2))
TOKENS = rng.normal(size=(200, 5, 3)).astype(np.float32)
MASK = np.arange(5) < rng.integers(0, 6, (200, 1))
CAPTIONS = np.array([f"a {i % 7} left of ä{i % 3}" for i in range(200)])
UTF8 = np.array([text.encode() for text in CAPTIONS])


@pytest.fixture(autouse=True)
def _say_again():
    warn_once.cache_clear()


def write(tmp_path, **arrays):
    np.savez(tmp_path / "set.npz", **arrays)
    return f"npz:{tmp_path / 'set.npz'}"


def conditions_of(dataset, key):
    return np.stack([dataset.row(i, False)["condition"][key] for i in range(len(dataset.source))])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_numbers_are_read_row_by_row_and_measured_in_training(tmp_path, dtype, capfd):
    numbers = (10 * NUMBERS).astype(dtype)
    name = write(tmp_path, images=IMAGES, conditions=numbers, condition_names=["angle", "mass"])
    train, validation = (load_dataset(name, split) for split in SPLITS)
    of_train = numbers[split_rows(200, "train")].astype(np.float32)
    assert train.condition == validation.condition
    assert isinstance(train.condition, VectorCondition)
    assert train.condition.names == ("angle", "mass")
    np.testing.assert_allclose(train.condition.means, of_train.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(train.condition.stds, of_train.std(axis=0), rtol=1e-5)
    for split, dataset in zip(SPLITS, (train, validation), strict=True):
        np.testing.assert_array_equal(conditions_of(dataset, "value"), numbers[split_rows(200, split)].astype("f4"))
    assert (train.class_names, train.empty_classes, train.num_classes) == ((), (), 0)
    assert capfd.readouterr().err == ""


def test_other_numbers_are_other_data(tmp_path):
    fingerprints = {
        load_dataset(write(tmp_path, images=IMAGES, conditions=numbers)).fingerprint
        for numbers in (NUMBERS, NUMBERS + 1, NUMBERS[::-1])
    }
    assert len(fingerprints) == 3


def test_numbers_of_bytes_of_a_file_beside_and_of_a_split_of_its_own(tmp_path):
    np.save(tmp_path / "set.images.npy", np.arange(200 * 24, dtype=np.uint8).reshape(200, 4, 6))
    np.save(tmp_path / "set.conditions.npy", NUMBERS[:, 0])
    own = {"validation_images": np.zeros((3, 4, 6), np.uint8), "validation_conditions": [7, 8, 9]}
    train, validation = (load_dataset(write(tmp_path, **own), split) for split in SPLITS)
    assert train.condition.names == ("c0",)
    np.testing.assert_allclose(train.condition.highs, NUMBERS[:, 0].max(), rtol=1e-6)
    assert conditions_of(validation, "value").ravel().tolist() == [7, 8, 9]
    assert train.source.read_condition(5).keys() == {"conditions"}


def test_arrays_in_python_are_the_same_data_as_in_a_file(tmp_path):
    name = write(tmp_path, images=IMAGES, conditions=NUMBERS, condition_names=["a", "b"])
    for split in SPLITS:
        found = column_dataset("mine", {"images": IMAGES, "conditions": NUMBERS}, split, condition_names=("a", "b"))
        expected = load_dataset(name, split)
        assert (found.fingerprint, found.condition, found.pixels) == (
            expected.fingerprint,
            expected.condition,
            expected.pixels,
        )


def test_tokens_and_captions_are_conditions_too(tmp_path):
    tokens = load_dataset(write(tmp_path, images=IMAGES, tokens=TOKENS.astype(np.float16), token_mask=MASK))
    assert tokens.condition == TokensCondition(5, 3)
    rows = split_rows(200, "train")
    np.testing.assert_array_equal(conditions_of(tokens, "mask"), MASK[rows])
    expected = np.where(MASK[..., None], TOKENS.astype(np.float16).astype(np.float32), 0)[rows]
    np.testing.assert_array_equal(conditions_of(tokens, "value"), expected)
    by_words = [load_dataset(write(tmp_path, images=IMAGES, captions=texts)) for texts in (CAPTIONS, UTF8)]
    assert all(dataset.condition == TextCondition(5, 64, "words") for dataset in by_words)
    for dataset in by_words:
        row = dataset.row(3, False)["condition"]
        assert dataset.condition.titles({"text": row["text"][None]}) == [CAPTIONS[rows[3]]]
        assert row["mask"].sum() == 5


def test_several_are_learned_together(tmp_path):
    dataset = load_dataset(write(tmp_path, images=IMAGES, labels=np.arange(200) % 3, conditions=NUMBERS, tokens=TOKENS))
    assert [name for name, _ in dataset.condition.parts] == ["class", "vector", "tokens"]
    assert (dataset.class_names, dataset.num_classes) == (("0", "1", "2"), 3)
    row = split_rows(200, "train")[7]
    found = dataset.row(7, False)["condition"]
    assert found["class"] == row % 3
    np.testing.assert_array_equal(found["vector"]["value"], NUMBERS[row].astype(np.float32))
    np.testing.assert_array_equal(found["tokens"]["value"], TOKENS[row])


def choose(tmp_path, text, split="train"):
    arrays = {"images": IMAGES, "labels": np.arange(200) % 3, "conditions": NUMBERS, "condition_names": ["a", "b"]}
    return load_dataset(write(tmp_path, **arrays, tokens=TOKENS), split, DataOptions(condition_columns=text))


def test_columns_are_chosen_by_kind_and_name(tmp_path):
    assert choose(tmp_path, "class").condition == ClassCondition(("0", "1", "2"))
    one = choose(tmp_path, "vector:b", "validation")
    assert one.condition.names == ("b",)
    np.testing.assert_array_equal(
        conditions_of(one, "value")[:, 0], NUMBERS[split_rows(200, "validation"), 1].astype("f4")
    )
    turned = choose(tmp_path, "vector:b,a+class")
    assert (dict(turned.condition.parts)["vector"].names, turned.num_classes) == (("b", "a"), 3)
    assert isinstance(choose(tmp_path, "tokens").condition, TokensCondition)
    texts = write(tmp_path, images=IMAGES, labels=np.arange(200) % 3, captions=CAPTIONS)
    assert load_dataset(texts, "train", DataOptions(condition_columns="text")).condition == TextCondition(5, 64)
    assert len({choose(tmp_path, text).fingerprint for text in ("class", "vector", "vector:b", "vector:b,a")}) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vector:c", "--condition_columns=vector:c: there is no number c; there are a, b"),
        ("text", "--condition_columns=text: .*set.npz has no captions, which text needs"),
        ("class:species", "--condition_columns=class:species: an npz has one array for class; write class alone"),
        ("vectors", "--condition_columns=vectors: an npz has no vectors; use class, vector, tokens, text, image"),
        ("tokens+tokens", "--condition_columns=tokens[+]tokens: tokens is given twice"),
        ("class,vector", "an npz has no class,vector; use .*, joined by [+]"),
        ("class+", "--condition_columns=class[+]: name kinds, joined by [+], such as class[+]vector:angle,mass"),
        ("", "--condition_columns=: name kinds"),
    ],
)
def test_other_choices_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        choose(tmp_path, text)


BAD = NUMBERS.copy()
BAD[4, 1] = np.nan
REFUSED = {
    "not finite": ({"conditions": BAD}, "1 value is NaN or infinite in conditions, the first in row 4; mend them"),
    "constant": ({"conditions": 0 * NUMBERS}, "c0, c1 are the same in all rows of the training data; leave them out"),
    "other length": ({"conditions": NUMBERS[:7]}, r"conditions has the shape \(7, 2\); give one row for each of the 2"),
    "a number called as the classes": (
        {"labels": np.arange(200) % 3, "conditions": NUMBERS, "condition_names": ["a", "class"]},
        "a number is called class, as what lies beside it is; give it another name",
    ),
    "a table each": ({"conditions": TOKENS}, r"conditions must be numbers \(n, k\), not float32 \(200, 5, 3\)"),
    "texts": ({"conditions": CAPTIONS}, r"conditions must be numbers \(n, k\), not <U"),
    "few names": ({"conditions": NUMBERS, "condition_names": ["a"]}, r"there are 1 names \(a\) for 2 numbers"),
    "names of objects": (
        {"conditions": NUMBERS, "condition_names": np.array(["a", "b"], object)},
        r"condition_names is an array of Python objects, .*; save it as numpy.array\(names, dtype=str\)",
    ),
    "a part": (
        {"conditions": NUMBERS, "validation_images": IMAGES[:5]},
        "images have conditions, but validation_images have none; add validation_conditions, or leave",
    ),
    "flat tokens": ({"tokens": TOKENS[:, 0]}, r"tokens must be floats \(n, tokens, width\), not float32 \(200, 3\)"),
    "too many tokens": (
        {"tokens": np.zeros((200, 4097, 1), np.float16)},
        "tokens are 4,097 of 1 numbers; 4,096 of 65,536 are the most",
    ),
    "mask alone": ({"token_mask": MASK}, r"token_mask is \(200, 5\), but there are no tokens; give one truth value"),
    "other mask": ({"tokens": TOKENS, "token_mask": MASK[:, 1:]}, r"token_mask is \(200, 4\), but tokens are \(200, 5"),
    "mask of floats": ({"tokens": TOKENS, "token_mask": MASK / 2}, r"token_mask must be truth values \(n, tokens\)"),
    "captions of objects": (
        {"captions": CAPTIONS.astype(object)},
        r"captions is .*; save it as numpy.array\(texts, dt",
    ),
    "a caption": ({"captions": "a cat"}, r"captions has the shape \(\); give one row for each of the 200 images"),
    "numbers as captions": ({"captions": np.arange(200)}, r"captions must be texts \(n,\), not int64 \(200,\)"),
    "no words": ({"captions": np.full(200, "!")}, "no caption has any token of --text_encoder=words"),
    "tokens of another encoder": (
        {"captions": CAPTIONS, "tokens": TOKENS},
        "tokens beside the captions have 3 numbers each, those of --text_encoder=words 64; name the encoder",
    ),
    "condition images of integers": (
        {"condition_images": np.zeros((200, 4, 4), np.int32)},
        r"condition_images must be uint8, float16 or float32 .*; convert them with images.astype",
    ),
    "other numbers in the other split": (
        {"conditions": NUMBERS, "validation_images": IMAGES[:5], "validation_conditions": NUMBERS[:5, :1]},
        r"conditions are of one shape in both splits, not \(2,\) and \(1,\)",
    ),
    "other tokens in the other split": (
        {"tokens": TOKENS, "validation_images": IMAGES[:5], "validation_tokens": TOKENS[:5, :2, :1]},
        r"tokens are of one shape in both splits, not \(3,\) and \(1,\)",
    ),
    "other condition images in the other split": (
        {
            "condition_images": IMAGES,
            "validation_images": IMAGES[:5],
            "validation_condition_images": IMAGES[:5].astype(np.uint8),
        },
        "condition_images are of one kind in both splits, not float32 and uint8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_columns_are_refused(tmp_path, case):
    arrays, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        load_dataset(write(tmp_path, images=IMAGES, **arrays))


def test_the_splits_of_arrays_in_memory_fit_each_other():
    train = {"images": IMAGES, "conditions": NUMBERS}
    with pytest.raises(UserError, match=r"mine: images are of one shape in both splits, not \(.*\) and \("):
        column_dataset("mine", train, validation={"images": IMAGES[:5, 1:], "conditions": NUMBERS[:5]})
    with pytest.raises(UserError, match="mine: conditions are given for one of the splits alone; give them for both"):
        column_dataset("mine", train, validation={"images": IMAGES[:5]})


def test_names_that_are_misspelt_are_pointed_at(tmp_path, capfd):
    load_dataset(write(tmp_path, images=IMAGES, condition=NUMBERS))
    assert "not read: condition float64 (200, 2); did you mean conditions?" in capfd.readouterr().err


def test_a_run_goes_on_where_its_data_have_got_more_columns(tmp_path):
    """A run of classes can be continued when captions lie beside them: by asking for what it was trained on."""

    def record(columns, **arrays):
        name = write(tmp_path, images=IMAGES, labels=np.arange(200) % 3, **arrays)
        config = make_config({"dataset_name": name, "codec": "pixels", "condition_columns": columns})
        datasets = {split: load_dataset(name, split, config.data.options) for split in SPLITS}
        facts = describe_data(datasets) | describe_codec(CodecSpec("pixels"), None)
        return config.to_json() | {"dataset": facts}, datasets

    saved, _ = record(None)
    for columns in ("class", "class+text"):
        now, datasets = record(columns, captions=CAPTIONS)
        if columns == "class":
            assert compare_with_saved(now, saved, datasets, tmp_path) == []
            continue
        with pytest.raises(UserError) as error:
            compare_with_saved(now, saved, datasets, tmp_path)
        assert str(error.value).startswith(
            f"{tmp_path} holds a run of 3 classes, but the data have 3 classes, captions of up to 5 tokens by words: "
            "give the same data, choose what is read by --condition_columns, or another"
        )
