"""--condition_columns: tables and captions beside the images of a folder, from the files to the examples."""

import json
import re

import numpy as np
import pytest
from data_sets import load
from image_files import write

from utils.base.messages import UserError
from utils.conditions.classes import ClassCondition
from utils.conditions.several import SeveralCondition
from utils.conditions.vector import VectorCondition
from utils.data.fingerprint import compare_data
from utils.data.folder_tables import Asked, read_conditions
from utils.images.tables import read_table
from utils.storage.tree import LocalTree

COUNT = 6
ANGLES = [0.5 * i for i in range(COUNT)]
SPECIES = ["owl", "cat", "owl", "cat", "cat", "owl"]


def write_images(folder, count=COUNT):
    """Images whose values are their numbers."""
    for i in range(count):
        write(folder / f"{i}.png", np.full((2, 2, 3), 10 * i, np.uint8))


def write_csv(folder, rows=None, header="file_name,angle,mass,species"):
    rows = rows_of()[::-1] if rows is None else rows
    (folder / "metadata.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def write_jsonl(folder):
    rows = [{"file_name": f"{i}.png", "angle": ANGLES[i], "mass": i * i, "species": SPECIES[i]} for i in range(COUNT)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_edm(folder, labels):
    pairs = [[f"{i}.png", label] for i, label in enumerate(labels)]
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}), encoding="utf-8")


def load_table(folder, columns, split="train", **options):
    return load(f"folder:{folder}", split, image_size=2, condition_columns=columns, **options)


def read_all(dataset):
    """{number of an image, by its values: its example}."""
    rows = [dataset.source[i] for i in range(len(dataset.source))]
    return {int(row["image"].max()) // 10: row for row in rows}


@pytest.mark.parametrize("write_table", [write_csv, write_jsonl])
def test_numbers_of_a_table_are_the_condition(tmp_path, write_table, capfd):
    write_images(tmp_path)
    write_table(tmp_path)
    datasets = [load_table(tmp_path, "vector:mass,angle", split) for split in ("train", "validation")]
    assert sum(len(dataset.source) for dataset in datasets) == COUNT
    for dataset in datasets:
        for i, row in read_all(dataset).items():
            np.testing.assert_array_equal(row["conditions"], np.array([i * i, ANGLES[i]], np.float32))
        assert dataset.source.read_condition(0).keys() == {"label", "conditions"}
        assert not dataset.random_flip  # an angle turns with its image
    # Names, means and ranges are those of the training images, in both splits.
    assert isinstance(datasets[0].condition, VectorCondition)
    train = np.array([[i * i, ANGLES[i]] for i in sorted(read_all(datasets[0]))])
    for dataset in datasets:
        assert (dataset.condition.names, dataset.class_names) == (("mass", "angle"), ())
        np.testing.assert_allclose(dataset.condition.means, train.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(dataset.condition.highs, train.max(axis=0))
    assert load_table(tmp_path, "vector:angle", random_flip=True).random_flip
    assert "not used" not in capfd.readouterr().err
    load(f"folder:{tmp_path}", image_size=2)
    assert re.search(r"not used: 1 file .*\(metadata.*\); --condition_columns reads it", capfd.readouterr().err)


@pytest.mark.parametrize("write_table", [write_csv, write_jsonl])
def test_a_column_of_texts_is_the_classes(tmp_path, write_table):
    write_images(tmp_path)
    write_table(tmp_path)
    dataset = load_table(tmp_path, "class:species")
    assert dataset.condition == ClassCondition(("cat", "owl"))
    assert dataset.random_flip
    assert {i: row["label"] for i, row in read_all(dataset).items()}.items() <= dict(
        enumerate([1, 0, 1, 0, 0, 1])
    ).items()
    # Whole numbers are in their own order.
    assert load_table(tmp_path, "class:mass").class_names == ("0", "1", "4", "9", "16", "25")


def test_labels_of_edm_are_classes(tmp_path):
    write_images(tmp_path)
    write_edm(tmp_path, [3, 0, 3, 10, -1, 0])
    dataset = load_table(tmp_path, "class")
    assert dataset.class_names == ("0", "3", "10")
    rows = read_all(dataset) | read_all(load_table(tmp_path, "class", "validation"))
    assert {i: int(row["label"]) for i, row in rows.items()} == {0: 1, 1: 0, 2: 1, 3: 2, 5: 0}  # -1 is no label


def test_labels_of_edm_are_vectors(tmp_path):
    write_images(tmp_path)
    write_edm(tmp_path, [[i, -i / 3] for i in range(COUNT)])
    dataset = load_table(tmp_path, "vector")
    assert dataset.condition.names == ("label_0", "label_1")
    for i, row in read_all(dataset).items():
        np.testing.assert_array_equal(row["conditions"], np.array([i, -i / 3], np.float32))


def test_captions_are_a_column_or_files(tmp_path):
    """Read as far as the example: a kind of condition takes them from there."""
    write_images(tmp_path, 2)
    tree = LocalTree(tmp_path)
    images = ["0.png", "1.png"]
    kinds = {"text": ()}
    for number, text in enumerate(["one\n", "\ufeffzwölf"]):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    found = read_conditions(Asked("--flag", kinds), tree, None, images, "")
    assert found.columns["caption"].tolist() == ["one", "zwölf"]
    write_csv(tmp_path, ['0.png,"red, and ""big"""', "1.png,green"], "file_name,text")
    found = read_conditions(Asked("--flag", kinds), tree, "metadata.csv", images, "")
    assert found.columns["caption"].tolist() == ['red, and "big"', "green"]
    (tmp_path / "0.txt").unlink()
    with pytest.raises(UserError, match=r"--flag: .*\*.txt: caption is empty in 1 row \(first that of 0.png\)"):
        read_conditions(Asked("--flag", {"text": ("caption",)}), tree, None, images, "")


def test_captions_are_the_condition(tmp_path):
    """In the tokens of the words, which the network learns from."""
    write_images(tmp_path, 3)
    for i, text in enumerate(("a red owl", "a cat", "an owl")):
        (tmp_path / f"{i}.txt").write_text(text)
    dataset = load_table(tmp_path, "text")
    assert (dataset.class_names, dataset.random_flip) == ((), False)
    condition = dataset.condition.read(dataset.source[0])
    (caption,) = dataset.condition.titles({name: np.asarray(rows)[None] for name, rows in condition.items()})
    assert caption == dataset.source[0]["caption"]
    np.testing.assert_array_equal(condition["value"], dataset.condition.encode([caption])["value"][0])


def test_each_split_has_its_table_or_that_of_the_root(tmp_path):
    for split in ("train", "valid"):
        write_images(tmp_path / split)
    for folder in (tmp_path / "train", tmp_path / "valid"):
        write_csv(folder)
    dataset = load_table(tmp_path, "class:species", "validation")
    assert (len(dataset.source), dataset.class_names) == (COUNT, ("cat", "owl"))
    # Numbers of other names are not taken for each other.
    write_csv(tmp_path / "valid", [f"{i}.png,{i}" for i in range(COUNT)], "file_name,mass")
    with pytest.raises(
        UserError, match=r"valid has the numbers mass, that of the training images angle, mass; name those to learn"
    ):
        load_table(tmp_path, "vector", "validation")
    for folder in (tmp_path / "train", tmp_path / "valid"):
        (folder / "metadata.csv").unlink()
    rows = [rf"{split}\{i}.png,{i + 10 * (split == 'valid')}" for split in ("train", "valid") for i in range(COUNT)]
    write_csv(tmp_path, rows, "file_name,mass")
    dataset = load_table(tmp_path, "vector", "validation")
    assert {i: row["conditions"].tolist() for i, row in read_all(dataset).items()} == {
        i: [10 + i] for i in range(COUNT)
    }
    assert dataset.condition.highs == (COUNT - 1,)


def test_classes_of_folders_stay_beside_a_table(tmp_path):
    for name in ("cat", "owl"):
        write_images(tmp_path / name, 3)
    write_csv(tmp_path, [f"{name}/{i}.png,{i}" for name in ("cat", "owl") for i in range(3)], "file_name,mass")
    assert load_table(tmp_path, "vector:mass").class_names == ()
    assert load_table(tmp_path, "class").class_names == ("cat", "owl")
    both = load_table(tmp_path, "vector:mass+class")
    assert isinstance(both.condition, SeveralCondition)
    assert (both.condition.fields, both.class_names) == (("class", "mass"), ("cat", "owl"))


def test_another_condition_of_an_image_is_another_data_set(tmp_path):
    write_images(tmp_path)
    write_csv(tmp_path)
    saved = load_table(tmp_path, "vector:angle")
    record = {"image_shape": (2, 2, 3), "splits": {"train": saved.fingerprint.to_json()}}
    table = (tmp_path / "metadata.csv").read_text()
    (tmp_path / "metadata.csv").write_text(table.replace("1.0,4", "1.25,4"))
    found = load_table(tmp_path, "vector:angle")
    with pytest.raises(UserError, match=r"1 image is of another class or condition: 2.png"):
        compare_data(record, {"train": saved.fingerprint.rows}, record, {"train": found.fingerprint})


def rows_of(*changes):
    rows = [f"{i}.png,{ANGLES[i]},{i * i},{SPECIES[i]}" for i in range(COUNT)]
    for row, text in changes:
        rows[row : row + 1] = [text] if text else []
    return rows


BAD = [
    ("vector:angel", rows_of(), "has no column 'angel'; did you mean angle?"),
    ("vector:angle", rows_of((3, "")), r"no row for 1 of 6 images \(3.png\); add rows, or move the images out"),
    ("vector:angle", rows_of((3, "2.png,1,1,owl")), "2.png has several rows; leave it one"),
    ("vector:angle", rows_of((3, "3.png,nan,1,owl")), r"angle is NaN or infinite in 1 row \(first that of 3.png\)"),
    ("vector:angle", rows_of((3, "3.png,-inf,1,owl")), r"angle is NaN or infinite in 1 row \(first that of 3.png\)"),
    ("vector:angle", rows_of((3, "3.png,,1,owl")), r"angle is empty in 1 row \(first that of 3.png\); fill it in"),
    ("vector:angle", rows_of((3, "3.png,,1")), "line 5 has 3 values for 4 columns"),
    ("vector:species", rows_of(), "species of 0.png is 'owl', no number; a column of texts is a class:species"),
    ("class:angle", rows_of(), r"angle of 1.png is 0.5, no class; give vector:angle"),
    ("class:angle,mass", rows_of(), "class takes one column; name one"),
    ("vector:one", [f"{i}.png,3" for i in range(COUNT)], "one is the same in all rows"),
    ("image:angle", rows_of(), "image"),
    ("vector:", rows_of(), "needs the name of a column"),
    # A column that is not named, but is of numbers in most rows, is not left out in silence.
    ("vector", rows_of((3, "3.png,north,1,owl")), "angle of 3.png is 'north', no number"),
    ("vector", rows_of((3, "3.png,,1,owl")), r"angle is empty in 1 row \(first that of 3.png\)"),
    (
        "vector:angle",
        [row.replace(".png", "", 1) for row in rows_of()],
        r"no row for 6 of 6 .*; its first is of 0, ...",
    ),
    (
        "text",
        rows_of(),
        r"there are no captions .*\*.txt beside the images; .*metadata.csv has the columns angle, mass",
    ),
]


@pytest.mark.parametrize(("columns", "rows", "message"), BAD)
def test_what_a_table_lacks_is_said_in_one_line(tmp_path, columns, rows, message):
    write_images(tmp_path)
    write_csv(tmp_path, rows, "file_name,one" if "one" in columns else "file_name,angle,mass,species")
    with pytest.raises(UserError, match=f"^--condition_columns={re.escape(columns)}: .*{message}") as error:
        load_table(tmp_path, columns)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "angle\n1\n", "its first line names angle, not file_name and columns"),
        ("metadata.csv", "", "its first line names nothing"),
        ("metadata.csv", b"file_name,a\n\xff,1\n", "cannot be read"),
        ("metadata.jsonl", '{"file_name": "0.png"}\n{', "line 2"),
        ("metadata.jsonl", "[1]", "line 1 is no object with a file_name"),
        ("dataset.json", '{"labels": null}', "it says that there are no labels"),
        ("dataset.json", '{"labels": 5}', r"its labels are 5, not a list of \[file name, label\]"),
        ("dataset.json", "{", "cannot be read"),
        ("dataset.json", '{"labels": [["0.png", [1]], ["1.png", 2]]}', "label holds lists of different lengths"),
    ],
)
def test_a_table_that_cannot_be_understood_is_named(tmp_path, name, content, message):
    write_images(tmp_path, 2)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"--condition_columns=vector: .*{name}.*{message}"):
        load_table(tmp_path, "vector")


def test_a_folder_has_one_table(tmp_path):
    write_images(tmp_path)
    with pytest.raises(UserError, match=r"holds none of metadata.csv, metadata.jsonl, dataset.json"):
        load_table(tmp_path, "vector")
    write_csv(tmp_path)
    write_jsonl(tmp_path)
    with pytest.raises(UserError, match=r"holds metadata.csv and metadata.jsonl; leave one of them there"):
        load_table(tmp_path, "vector")


def test_rows_without_an_image_are_said(tmp_path, capfd):
    write_images(tmp_path)
    write_csv(tmp_path, [*rows_of(), "lost.png,1,1,owl"])
    load_table(tmp_path, "vector:angle")
    assert f"{tmp_path}/metadata.csv: 1 row without an image (lost.png)" in capfd.readouterr().err


def test_a_spreadsheets_csv_is_read(tmp_path):
    """With a byte-order mark, Windows' ends of lines and backslashes, and empty lines at the end."""
    (tmp_path / "metadata.csv").write_bytes("\ufefffile_name,a\r\ncat\\0.png,1\r\n./1.png,2\r\n\r\n".encode())
    table = read_table(LocalTree(tmp_path), "metadata.csv")
    assert (table.numbers, table.columns) == ({"cat/0.png": 0, "1.png": 1}, {"a": ["1", "2"]})
