"""Archives as data sets: the same images, keys and conditions as a folder's, and one line for what is no archive."""

import contextlib
import io
import json
import os
import tarfile
import threading
import zipfile
from collections import Counter

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.data_sets import load
from tests.fake_hub import fake_hub
from tests.image_files import encoded, noise
from utils.base.messages import UserError, warn_once
from utils.conditions.tokens import TextCondition
from utils.data.batches import epoch_batches, training_batches
from utils.data.dataset import DataOptions
from utils.data.joined import count_rows
from utils.data.loaders import load_dataset, load_splits
from utils.images import checks
from utils.storage import remote, zip_files
from utils.storage.remote_tree import fetch_folder

CLASSES = ("cat", "dog")
FILES = {
    f"{split}/{name}/{i:03}.png": encoded(noise(100 * part + 10 * label + i, 9, 7, 3)).getvalue()
    for part, (split, count) in enumerate({"train": 6, "validation": 2}.items())
    for label, name in enumerate(CLASSES)
    for i in range(count)
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of the test's own. What was said before is said again."""
    warn_once.cache_clear()
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "jax-flow-matching"


def write_folder(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return f"folder:{root}"


def write_zip(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return f"zip:{path}"


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return f"tar:{path}"


def write_parquet(path, images, columns=None, features=None, group=3, names=None):
    """Images as `datasets` writes them, in row groups of a few; `features` are what it says of the columns."""
    rows = [{"bytes": image, "path": names[i] if names else None} for i, image in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), **(columns or {})})
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path, row_group_size=group)
    return f"parquet:{path}"


def class_label(*names):
    return {"label": {"_type": "ClassLabel", "names": list(names)}, "image": {"_type": "Image"}}


def write_splits(folder):
    """FILES as parquet, a file for each split. The names of the images are those of their files in the folder."""
    for split in ("train", "validation"):
        own = {path: content for path, content in FILES.items() if path.startswith(split)}
        labels = pa.array([CLASSES.index(path.split("/")[1]) for path in own])
        names = [path.partition("/")[2] for path in own]
        features = class_label(*CLASSES)
        write_parquet(
            folder / f"{split}-00000-of-00001.parquet", own.values(), {"label": labels}, features, names=names
        )
    return f"parquet:{folder}/*.parquet"


def read(dataset):
    return [
        (row["image"].tobytes(), int(row["label"]))
        for row in map(dataset.source.__getitem__, range(len(dataset.source)))
    ]


@contextlib.contextmanager
def on_hub(folder, monkeypatch, files):
    with fake_hub() as hub:
        hub.repositories["someone/pets"] = files
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
        yield hub


KINDS = ("zip", "stored zip", "zip of a folder", "tar", "tars", "parquet", "hf")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    return load_splits(write_folder(root, FILES), DataOptions(image_size=8))


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_is_the_data_set_that_its_folder_is(tmp_path, monkeypatch, expected, kind):
    """Images, labels, order, what is held out, fingerprints: a run goes on with either."""
    with contextlib.ExitStack() as stack:
        if kind == "hf":
            write_splits(tmp_path)
            files = {f"data/{path.name}": path.read_bytes() for path in tmp_path.glob("*.parquet")}
            stack.enter_context(on_hub(tmp_path, monkeypatch, {"README.md": b"# Pets", **files}))
            name = "hf:someone/pets"
        elif kind == "tars":
            paths = list(FILES)
            for shard in range(3):
                write_tar(tmp_path / f"{shard:05}.tar", {path: FILES[path] for path in paths[shard::3]})
            name = f"tar:{tmp_path}/*.tar"
        elif kind == "parquet":
            name = write_splits(tmp_path)
        else:
            method = zipfile.ZIP_STORED if "stored" in kind else zipfile.ZIP_DEFLATED
            # In no order: that of a folder's names counts.
            shuffled = dict(sorted(FILES.items(), key=lambda item: hash(item[1])))
            if kind == "zip of a folder":  # as `zip -r pets.zip pets` packs it
                shuffled = {"pets/": b"", **{f"pets/{path}": content for path, content in shuffled.items()}}
            name = (
                write_tar(tmp_path / "a.tar", shuffled)
                if kind == "tar"
                else write_zip(tmp_path / "a.zip", shuffled, method)
            )
        found = load_splits(name, DataOptions(image_size=8))
    for split, dataset in found.items():
        assert dataset.class_names == CLASSES
        assert dataset.fingerprint == expected[split].fingerprint
        assert read(dataset) == read(expected[split])
        assert [row.key for row in dataset.fingerprint.rows] == [row.key for row in expected[split].fingerprint.rows]
    one, other = (training_batches(datasets["train"], 4, 7) for datasets in (found, expected))
    for _ in range(4):
        np.testing.assert_array_equal(next(one).image, next(other).image)


def test_a_folder_that_was_packed_with_its_name_is_the_top(tmp_path, capfd):
    images = {f"pets/{path.partition('/')[2]}": FILES[path] for path in FILES if path.startswith("train")}
    rows = "".join(f"{path.partition('/')[2]},{number}\n" for number, path in enumerate(images))
    name = write_zip(tmp_path / "x.zip", {**images, "pets/metadata.csv": f"file_name,age\n{rows}".encode()})
    assert load(name, image_size=8).class_names == CLASSES
    assert "x.zip: read from pets/, the only folder in it" in capfd.readouterr().err
    assert load(name, image_size=8, condition_columns="vector").condition.names == ("age",)
    # Images in a folder, or in one of another, are of one class.
    for below in ("", "more/"):
        flat = {f"cats/{below}{i}.png": content for i, content in enumerate(images.values())}
        assert load(write_tar(tmp_path / f"{len(below)}.tar", flat), image_size=8).class_names == ("cats",)
    # What cannot be reached by another name is not said to be.
    load(write_zip(tmp_path / "y.zip", {f"train/{path}": content for path, content in images.items()}), image_size=8)
    assert "if cat/, dog/ are classes, move them into" in capfd.readouterr().err


def test_data_in_object_storage_are_those_on_the_disk(tmp_path, expected):
    memory = fsspec.filesystem("memory")
    write_folder(tmp_path / "folder", FILES)
    write_zip(tmp_path / "a.zip", FILES)
    write_tar(tmp_path / "a.tar", FILES)
    write_splits(tmp_path)
    for path in tmp_path.rglob("*.*"):
        memory.pipe_file(f"/archives/{path.relative_to(tmp_path)}", path.read_bytes())
    arrays = {"images": np.stack([noise(i, 4, 4, 3) for i in range(8)]), "labels": np.arange(8) % 2}
    np.savez(tmp_path / "x.npz", **arrays)
    memory.pipe_file("/archives/x.npz", (tmp_path / "x.npz").read_bytes())
    try:
        for name in ("folder:{}/folder", "zip:{}/a.zip", "tar:{}/*.tar", "parquet:{}/*.parquet"):
            found = load_splits(name.format("memory://archives"), DataOptions(image_size=8))
            assert [found[split].fingerprint for split in found] == [each.fingerprint for each in expected.values()]
            assert read(found["validation"]) == read(expected["validation"])
        # What is mapped is fetched, and again when it changes.
        remote = load("npz:memory://archives/x.npz")
        assert remote.name == "npz:memory://archives/x.npz"
        assert read(remote) == read(load(f"npz:{tmp_path}/x.npz"))
        np.savez(tmp_path / "x.npz", images=arrays["images"][::-1], labels=arrays["labels"])
        memory.pipe_file("/archives/x.npz", (tmp_path / "x.npz").read_bytes())
        assert read(load("npz:memory://archives/x.npz")) == read(load(f"npz:{tmp_path}/x.npz")) != read(remote)
        folder = fetch_folder("memory://archives/folder", "dataset_name")
        assert {str(path.relative_to(folder)) for path in folder.rglob("*.png")} == set(FILES)
        memory.rm("/archives/folder/train/cat/000.png")
        memory.pipe_file("/archives/folder/train/dog/000.png", b"another")
        assert fetch_folder("memory://archives/folder", "dataset_name") == folder
        assert not (folder / "train/cat/000.png").exists()
        assert (folder / "train/dog/000.png").read_bytes() == b"another"
    finally:
        memory.rm("/archives", recursive=True)


def test_images_in_object_storage_are_asked_for_together(tmp_path, monkeypatch):
    """A thread waits for each: of a million images at 30 ms, two at a time would take four hours."""
    files = {f"{i:02}.png": encoded(noise(i, 4, 4, 3)).getvalue() for i in range(16)}
    memory = fsspec.filesystem("memory")
    for path, content in files.items():
        memory.pipe_file(f"/together/{path}", content)
    together = threading.Barrier(8)
    read_bytes = remote.read_bytes

    def wait_for_others(*args):
        together.wait(timeout=10)
        return read_bytes(*args)

    monkeypatch.setattr(remote, "read_bytes", wait_for_others)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    try:
        dataset = load("folder:memory://together", image_size=4)  # the check reads all, in rounds of eight
        assert dataset.is_remote
        next(epoch_batches(dataset, 8, stop=8))
    finally:
        memory.rm("/together", recursive=True)


def test_files_are_held_out_of_an_archive_as_of_its_folder(tmp_path):
    files = {f"{i:02}.png": encoded(noise(i, 4, 4, 3)).getvalue() for i in range(60)}
    parts = [
        load_splits(name, DataOptions(image_size=4))
        for name in (
            write_folder(tmp_path / "flat", files),
            write_zip(tmp_path / "a.zip", files),
            write_tar(tmp_path / "a.tar", files),
            write_parquet(tmp_path / "a.parquet", files.values(), names=list(files), group=7),
        )
    ]
    assert len({datasets["validation"].fingerprint.sha256 for datasets in parts}) == 1
    assert len({datasets["train"].fingerprint.sha256 for datasets in parts}) == 1


def test_webdataset_has_classes_numbers_and_captions_beside_its_images(tmp_path):
    files = {}
    for i in range(12):
        files[f"{i:04}.png"] = encoded(noise(i, 4, 4, 3)).getvalue()
        files[f"{i:04}.cls"] = str(i % 3).encode()
        files[f"{i:04}.json"] = json.dumps({"angle": i / 7, "kind": "ab"[i % 2]}).encode()
        files[f"{i:04}.txt"] = f"number {i}".encode()
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", dict(list(files.items())[24 * shard : 24 * shard + 24]))
    name = f"tar:{tmp_path}/*.tar"

    def key_of(dataset):
        return [int(row.key.removesuffix(".png")) for row in dataset.fingerprint.rows]

    classes = load(name, image_size=4)
    assert classes.class_names == ("0", "1", "2")
    assert [int(row["label"]) for row in map(classes.source.__getitem__, range(11))] == [i % 3 for i in key_of(classes)]
    numbers = load(name, image_size=4, condition_columns="vector:angle")
    assert [row["conditions"][0] for row in map(numbers.source.__getitem__, range(11))] == [
        np.float32(i / 7) for i in key_of(numbers)
    ]
    named = load(name, image_size=4, condition_columns="class:kind")
    assert named.class_names == ("a", "b")
    texts = load(name, image_size=4, condition_columns="class+text")
    assert texts.condition.find_part(TextCondition) is not None
    assert texts.source.read_condition(2)["label"] == key_of(texts)[2] % 3
    # The same files in a folder are read by the same words.
    write_folder(tmp_path / "unpacked", files)
    again = load(f"folder:{tmp_path}/unpacked", image_size=4, condition_columns="class")
    assert read(again) == read(classes)


def test_tars_that_are_named_after_splits_are_told_to_be_one(tmp_path, capfd):
    for split in ("train", "val"):
        files = {f"{split}{i}.png": encoded(noise(i, 4, 4, 3)).getvalue() for i in range(3)}
        write_tar(tmp_path / f"{split}-000.tar", files)
    assert len(load(f"tar:{tmp_path}/*.tar", image_size=4).source) == 5
    assert "named after splits (train, val), and all are trained on; name those of" in capfd.readouterr().err
    load(f"tar:{tmp_path}/train-*.tar", image_size=4)
    assert "named after splits" not in capfd.readouterr().err
    # Splits in the tars are kept apart.
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}-000.tar", {f"{split}/{i}.png": IMAGE for i in range(3)})
    assert len(load(f"tar:{tmp_path}/*.tar", image_size=4).source) == 3
    assert "named after splits" not in capfd.readouterr().err


def test_a_zip_of_edm_has_the_labels_of_its_dataset_json(tmp_path):
    images = {f"00000/img{i:08}.png": encoded(noise(i, 4, 4, 3)).getvalue() for i in range(8)}
    table = {"labels": [[name, i % 2] for i, name in enumerate(images)]}
    name = write_zip(tmp_path / "edm.zip", {"dataset.json": json.dumps(table).encode(), **images})
    dataset = load(name, image_size=4, condition_columns="class")
    labels = {row.key: int(dataset.source[i]["label"]) for i, row in enumerate(dataset.fingerprint.rows)}
    assert dataset.class_names == ("0", "1")
    assert labels == {key: int(key[-5]) % 2 for key in labels}


def test_columns_of_parquet_are_classes_numbers_and_texts(tmp_path):
    images = [encoded(noise(i, 4, 4, 3)).getvalue() for i in range(10)]
    columns = {"label": [i % 2 for i in range(10)], "mass": [i / 3 for i in range(10)], "caption": list("abcdefghij")}
    name = write_parquet(tmp_path / "a.parquet", images, columns, class_label("old", "new"))
    dataset = load(name, image_size=4)
    assert dataset.class_names == ("old", "new")  # in their own order, not by the alphabet
    numbers = [int(row.key.removesuffix(".png")) for row in dataset.fingerprint.rows]
    assert [int(dataset.source[i]["label"]) for i in range(9)] == [number % 2 for number in numbers]
    several = load(name, image_size=4, condition_columns="class:label+vector:mass")
    assert several.condition.summary()
    assert several.source[3]["conditions"][0] == np.float32(numbers[3] / 3)
    # Without what `datasets` says, labels are numbers, and images have any of the usual names.
    table = pa.table({"jpg": pa.array(images, pa.binary()), "label": [3] * 5 + [7] * 5})
    parquet.write_table(table, tmp_path / "b.parquet")
    assert load(f"parquet:{tmp_path}/b.parquet", image_size=4).class_names == ("3", "7")
    table = pa.table({"jpg": pa.array(images, pa.binary()), "label": ["old"] * 5 + ["new"] * 5})
    parquet.write_table(table, tmp_path / "c.parquet")
    assert load(f"parquet:{tmp_path}/c.parquet", image_size=4).class_names == ("new", "old")


def test_a_configuration_and_a_split_of_the_hub_are_chosen(tmp_path, monkeypatch):
    for part, count in {"train": 8, "test": 4}.items():
        images = [encoded(noise(i, 4, 4, 3)).getvalue() for i in range(count)]
        write_parquet(tmp_path / f"{part}.parquet", images, {"label": [i % 2 for i in range(count)]})
    card = (
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: s/a*.parquet\n"
        "  - split: test\n    path: s/b.parquet\n- config_name: large\n  data_files: l/*.parquet\n---\n"
    )
    files = {"s/a0.parquet": "train", "s/b.parquet": "test", "l/x.parquet": "test"}
    content = {path: (tmp_path / f"{part}.parquet").read_bytes() for path, part in files.items()}
    with on_hub(tmp_path, monkeypatch, {"README.md": card.encode(), **content}) as hub:
        with pytest.raises(UserError, match="its configurations are small, large; add one, as in hf:USER/NAME:small"):
            load("hf:someone/pets", image_size=4)
        assert len(load("hf:someone/pets:small:test", image_size=4).source) == 3  # and one held out
        assert "l/x.parquet" not in hub.downloads
        assert "s/a0.parquet" not in hub.downloads
        with pytest.raises(UserError, match="has no split dev; there are test, train"):
            load("hf:someone/pets:small:dev", image_size=4)
        with pytest.raises(UserError, match="cannot be fetched from the hub"):
            load("hf:someone/nothing", image_size=4)
    # Without a way to the hub, what is there is read.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert len(load("hf:someone/pets:small:test", image_size=4).source) == 3


# --- What is no archive ---

IMAGE = encoded(noise(0, 64, 64, 3)).getvalue()
TWO = {"a.png": IMAGE, "b.png": encoded(noise(1, 4, 4, 3)).getvalue()}


def patch(path, old, new, count=1):
    content = path.read_bytes()
    assert content.count(old) >= 1
    path.write_bytes(content.replace(old, new, count))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def encrypt(path):
    """Sets bit 0 of the flags, in the local headers and in the directory."""
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = -1
        while (start := content.find(mark, start + 1)) >= 0:
            content[start + offset] |= 1
    path.write_bytes(content)


def make_bad(kind, folder):
    """Writes an archive that cannot be used, and returns its name."""
    path = folder / "x"
    match kind:
        case "no file":
            return f"zip:{path}"
        case "no tar":
            return f"tar:{folder}/*.tar"
        case "a folder":
            return f"zip:{folder}"
        case "a folder of parquet":
            return f"parquet:{folder}"
        case "braces":
            return f"tar:{folder}/*-{{0000..0003}}.tar"
        case "tars in a tar":
            return write_tar(path, {"cat.tar": b"", "dog.tar": b""})
        case "no zip":
            path.write_bytes(IMAGE)
            return f"zip:{path}"
        case "cut zip" | "cut zip, early":
            name = write_zip(path, TWO)
            cut(path, 60 if "early" in kind else len(path.read_bytes()) - 30)
            return name
        case "hole in a zip":  # the directory is whole, an image is not
            name = write_zip(path, TWO)
            content = path.read_bytes()
            path.write_bytes(content[:200] + bytes(64) + content[264:])
            return name
        case "encrypted zip":
            name = write_zip(path, TWO)
            encrypt(path)
            return name
        case "bzip2 in a zip":
            return write_zip(path, TWO, zipfile.ZIP_BZIP2)
        case "zip that leads out" | "tar that leads out" | "absolute":
            bad = "/etc/a.png" if kind == "absolute" else "../../a.png"
            return (write_tar if "tar" in kind else write_zip)(path, {bad: IMAGE, **TWO})
        case "zip bomb":
            name = write_zip(path, {"z.png": b"\0" * 10**6, **TWO})
            # The directory says that it becomes four gigabytes.
            patch(path, (10**6).to_bytes(4, "little"), (2**32 - 2).to_bytes(4, "little"), 2)
            return name
        case "zip of text":
            return write_zip(path, {"a.txt": b"hello"})
        case "empty zip":
            return write_zip(path, {})
        case "two of one path":
            name = write_zip(path, {"a.png": IMAGE, "b.png": IMAGE}, zipfile.ZIP_STORED)
            patch(path, b"b.png", b"a.png", 2)
            return name
        case "two of one path, in tars":
            write_tar(folder / "0.tar", TWO)
            write_tar(folder / "1.tar", TWO)
            return f"tar:{folder}/*.tar"
        case "two of one key":
            return write_tar(path, {"a.png": IMAGE, "a.jpg": IMAGE, "a.cls": b"0", "b.png": IMAGE, "b.cls": b"1"})
        case "tar without images":
            return write_tar(path, {"a.cls": b"0"})
        case "compressed tar":
            with tarfile.open(path, "w:gz") as archive:
                archive.addfile(tarfile.TarInfo("a.png"))
            return f"tar:{path}"
        case "no tar at all":
            path.write_bytes(IMAGE)
            return f"tar:{path}"
        case "cut tar" | "cut tar, between files":
            name = write_tar(path, {"a.png": IMAGE, "b.png": IMAGE})
            cut(path, 512 + -(-len(IMAGE) // 512) * 512 + (700 if kind == "cut tar" else 0))
            return name
        case "no class in a tar":
            return write_tar(path, {"a.png": IMAGE, "a.cls": b"1.5", "b.png": IMAGE, "b.cls": b"1"})
        case "image without its class":
            return write_tar(path, {"a.png": IMAGE, "a.cls": b"1", "b.png": IMAGE})
        case "no parquet":
            path.write_bytes(IMAGE)
            return f"parquet:{path}"
        case "cut parquet":
            name = write_parquet(path, TWO.values())
            cut(path, 1000)
            return name
        case "parquet without images":
            parquet.write_table(pa.table({"text": ["a", "b"]}), path)
            return f"parquet:{path}"
        case "two columns of images":
            parquet.write_table(pa.table({"left": [IMAGE] * 2, "right": [IMAGE] * 2}), path)
            return f"parquet:{path}"
        case "empty parquet":
            return write_parquet(path, [])
        case "row without an image":
            return write_parquet(path, [IMAGE, None, IMAGE])
        case "label out of range":
            return write_parquet(path, [IMAGE] * 3, {"label": [0, 1, 2]}, class_label("old", "new"))
        case "other columns":
            write_parquet(folder / "0.parquet", [IMAGE] * 2, {"label": [0, 1]})
            write_parquet(folder / "1.parquet", [IMAGE] * 2, {"mass": [0, 1]})
            return f"parquet:{folder}/*.parquet"
        case "no name on the hub":
            return "hf:pets"
        case "a text in an archive":
            return write_zip(path, {"a.png": b"hello", **{"b.png": IMAGE}})
        case "one image":
            return write_zip(path, {"a.png": IMAGE})
        case "AES in a zip":
            name = write_zip(path, TWO, zipfile.ZIP_STORED)
            content = bytearray(path.read_bytes())
            start = content.find(b"PK\1\2")
            content[start + 10 : start + 12] = (99).to_bytes(2, "little")
            path.write_bytes(content)
            return name
        case "torn directory of a zip":
            name = write_zip(path, TWO)
            patch(path, b"PK\1\2", b"PK\1\0")
            return name
        case "wrong place in a zip":
            name = write_zip(path, TWO)
            content = bytearray(path.read_bytes())
            start = content.find(b"PK\1\2")
            content[start + 42 : start + 46] = (2**31).to_bytes(4, "little")
            path.write_bytes(content)
            return name
        case "images beside folders in a zip":
            return write_zip(path, {"cat/a.png": IMAGE, "dog/a.png": IMAGE, "b.png": IMAGE})
        case "validation without training":
            return write_zip(path, {"validation/a.png": IMAGE, "test/b.png": IMAGE})
        case "links in a tar":
            with tarfile.open(path, "w") as archive:
                for target in ("/etc/passwd", "b.png"):
                    info = tarfile.TarInfo("a.png")
                    info.type, info.linkname = tarfile.SYMTYPE, target
                    archive.addfile(info)
            return f"tar:{path}"
        case "a list in a .json" | "a class in no UTF-8":
            beside = {"a.json": b"[1]"} if "list" in kind else {"a.cls": b"\xff\xfe"}
            return write_tar(path, {"a.png": IMAGE, "b.png": IMAGE, "b.cls": b"1", "a.cls": b"1", **beside})
        case "negative label in parquet":
            return write_parquet(path, [IMAGE] * 3, {"label": [0, 1, -2]}, class_label("old", "new"))
        case "empty image in parquet":
            return write_parquet(path, [IMAGE, b"", IMAGE])
        case "torn row group":
            name = write_parquet(path, [IMAGE] * 3)
            content = path.read_bytes()
            path.write_bytes(content[:100] + bytes(len(IMAGE) // 2) + content[100 + len(IMAGE) // 2 :])
            return name
        case "numbers for images":
            parquet.write_table(pa.table({"image": [1, 2, 3]}), path)
            return f"parquet:{path}"
        case "no bucket":
            return f"folder:memory://nothing{folder.name}/x"
        case "no object":
            return f"zip:memory://nothing{folder.name}/x.zip"
        case "no objects of a pattern":
            return f"tar:memory://nothing{folder.name}/*.tar"
        case "no array in a bucket":
            return f"npz:memory://nothing{folder.name}/x.npz"
        case "no latents in a bucket":
            return f"latents:memory://nothing{folder.name}/x"
        case "another scheme":
            return f"folder:ftp://{folder.name}/x"
        case "joined with nothing":
            return f"{write_zip(path, TWO)} + folder:{folder / 'none'}"
        case "joined with an unknown one":
            return "digits + nothing"
        case "joined classes":
            one = write_zip(folder / "1.zip", {"cat/a.png": IMAGE, "dog/a.png": IMAGE, "cat/b.png": IMAGE})
            return f"{one} + {write_zip(path, {'cat/a.png': IMAGE, 'cow/a.png': IMAGE, 'cow/b.png': IMAGE})}"
        case "joined in grey":
            grey = {f"{i}.png": encoded(noise(i, 4, 4)).getvalue() for i in range(3)}
            return f"{write_zip(folder / '1.zip', TWO)} + {write_zip(path, grey)}"


BAD = {
    "no file": "there is no file .*/x; check the path",
    "no tar": r"there is no file .*/\*.tar; give a file, or a pattern in quotes",
    "a folder": "it is no regular file",
    "a folder of parquet": r"it is a folder; give its files, 'parquet:.*/\*.parquet'",
    "braces": r"braces are no pattern, write 'tar:.*/\*-\*.tar'",
    "tars in a tar": r"holds no images, but 2 archives \(cat.tar, dog.tar\) that are to be unpacked",
    "no zip": "it is no whole zip",
    "cut zip": "it is no whole zip",
    "cut zip, early": "it is no whole zip",
    "hole in a zip": r"1 of 2 images cannot be read: .*/x/a.png \(it is damaged in the archive",
    "encrypted zip": "a.png is encrypted; give one without a password$",
    "bzip2 in a zip": "a.png is compressed by bzip2; pack the images again by zip -0",
    "zip that leads out": r"\.\./\.\./a.png leads out of the archive",
    "tar that leads out": r"\.\./\.\./a.png leads out of the archive",
    "absolute": "/etc/a.png leads out of the archive",
    "zip bomb": "z.png says that .* bytes become 4,294,967,294",
    "zip of text": "holds no images; expected are",
    "empty zip": "holds no images; expected are",
    "two of one path": "there are two files a.png",
    "two of one path, in tars": r"there are two files a.png in .*/0.tar and .*/1.tar; pack them under different names$",
    "two of one key": "are two images of one key",
    "tar without images": "holds no images; expected are",
    "compressed tar": "is compressed, and cannot be read at random; unpack it to a .tar",
    "no tar at all": "is no whole tar",
    "cut tar": "is cut short",
    "cut tar, between files": "is cut short: its end is missing",
    "no class in a tar": "label of a.png is 1.5, no class",
    "image without its class": r"label is empty in 1 row \(first that of b.png\)",
    "no parquet": "is no whole parquet file",
    "cut parquet": "is no whole parquet file",
    "parquet without images": r"has no column of images \(its columns are text\)",
    "two columns of images": r"has several columns of images \(its columns are left, right\)",
    "empty parquet": "has no rows",
    "row without an image": r"1 of 3 images cannot be read: row 1 of .*/x \(the row has no image\)",
    "label out of range": "label of 2.png is 2, but there are 2 classes, 0 to 1",
    "other columns": "1.parquet has other columns than .*/0.parquet",
    "no name on the hub": "pets is no data set on the hub; give hf:USER/NAME",
    "one image": "holds 1 image; 2 are needed",
    "AES in a zip": "a.png is compressed by method 99; pack the images again",
    "torn directory of a zip": "it is no whole zip",
    "wrong place in a zip": "it is cut short",
    "images beside folders in a zip": "holds b.png beside folders of classes; move it into one",
    "validation without training": "holds .*validation/ but no train/",
    "links in a tar": "holds no images; expected are",
    "a list in a .json": "a.json cannot be read .it is no JSON object",
    "a class in no UTF-8": r"a.cls cannot be read \('utf-8' codec",
    "negative label in parquet": "label of 2.png is -2, but there are 2 classes, 0 to 1",
    "empty image in parquet": r"row 1 of .*/x \(the row has no image\)",
    "torn row group": r"images cannot be read: row . of",
    "numbers for images": r"has no column of images \(its columns are image\)",
    "no bucket": "there are no objects below memory://nothing.*/x; check the name",
    "no object": "there is no file memory://nothing.*/x.zip; check the path",
    "no objects of a pattern": "there is no file memory://nothing.*; give a file, or a pattern in quotes",
    "no array in a bucket": "there is no such object; check the name",
    "no latents in a bucket": "there are no objects below it; check the name",
    "another scheme": "is a URL, which is not supported; give folder:PATH, zip:s3://BUCKET/FILE",
    "joined with nothing": "there is no folder .*/none",
    "joined with an unknown one": "--dataset_name=nothing is unknown",
    "joined classes": r"the classes of zip:.*/x are cat, cow \(2\), those of zip:.*/1.zip cat, dog \(2\)",
    "joined in grey": "the images of zip:.*/x are 4x4x1, those of zip:.*/1.zip 4x4x3; join data of one kind",
    "a text in an archive": r"1 of 2 images cannot be read: .*/x/a.png \(it is no image of a known format\)",
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_archive_is_one_line(tmp_path, kind):
    name = make_bad(kind, tmp_path)
    with pytest.raises(UserError, match=BAD[kind]) as error:
        load(name, image_size=4)
    assert "\n" not in str(error.value)
    assert name.partition(":")[2].partition("*")[0].split(" + ")[0] in str(error.value) or " + " in name


def test_a_file_without_its_kind_is_guessed(tmp_path):
    path = tmp_path / "pets.zip"
    write_zip(path, TWO)
    with pytest.raises(UserError, match=f"--dataset_name={path} is unknown; did you mean zip:{path}"):
        load(str(path), image_size=4)
    with pytest.raises(UserError, match=r"pets.zip is a file; zip:, tar:, parquet: and npz: read files"):
        load(f"folder:{path}", image_size=4)
    with pytest.raises(UserError, match="there is no file memory://none/pets; give a file, or a pattern in quotes"):
        load("parquet:memory://none/pets", image_size=4)


def test_an_image_that_breaks_later_is_named(tmp_path):
    dataset = load(write_zip(tmp_path / "a.zip", TWO), image_size=4)
    archive = tmp_path / "a.zip"
    with archive.open("r+b") as file:
        file.write(bytes(400))
    with pytest.raises(UserError, match=r"a.zip/[ab].png cannot be read any more \(the archive is cut short, or"):
        dataset.source[0]


# --- What is remembered ---


def test_an_archive_is_listed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    name = write_zip(tmp_path / "a.zip", TWO)
    load(name, image_size=4)
    listed = []
    list_zip = zip_files.list_zip
    monkeypatch.setattr(zip_files, "list_zip", lambda files: listed.append(1) or list_zip(files))
    assert read(load(name, image_size=4)) == read(load(name, image_size=4))
    assert not listed
    write_zip(tmp_path / "a.zip", {**TWO, "c.png": IMAGE})
    assert len(load(name, image_size=4).source) == 2
    assert len(listed) == 1


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_a_damaged_index_is_made_anew(tmp_path, cache, content):
    name = write_zip(tmp_path / "a.zip", TWO)
    whole = read(load(name, image_size=4))
    (kept,) = cache.glob("index-*.npz")
    kept.write_bytes(content)
    assert read(load(name, image_size=4)) == whole
    assert kept.read_bytes() != content


def test_a_check_that_was_stopped_goes_on(tmp_path, monkeypatch):
    files = {f"{i:03}.png": IMAGE for i in range(40)}
    name = write_tar(tmp_path / "a.tar", files)
    monkeypatch.setattr(checks, "CHUNK", 8)
    check = checks.check_image
    seen = []

    def stop(content, **options):
        seen.append(1)
        if len(seen) > 20:
            raise KeyboardInterrupt
        return check(content, **options)

    with monkeypatch.context() as context:
        context.setattr(checks, "check_image", stop)
        with pytest.raises(KeyboardInterrupt):
            load(name, image_size=4)
    again = []
    monkeypatch.setattr(checks, "check_image", lambda *args, **options: again.append(1) or check(*args, **options))
    load(name, image_size=4)
    assert len(again) == 24  # two chunks of eight were kept


def test_images_that_are_trusted_are_not_decoded(tmp_path, monkeypatch):
    files = {f"{i:03}.png": encoded(noise(i, 4, 4)).getvalue() for i in range(200)}
    name = write_folder(tmp_path / "all", files)
    checked = load(name, image_size=4)
    seen = []
    check = checks.check_image
    monkeypatch.setattr(checks, "check_image", lambda *args, **options: seen.append(1) or check(*args, **options))
    trusted = load(name, image_size=4, check_images=False)
    assert len(seen) <= checks.NUM_TRUSTED
    assert trusted.image_shape == checked.image_shape == (4, 4, 1)
    assert read(trusted) == read(checked)
    assert {row.digest for row in trusted.fingerprint.rows} == {""}
    # What is broken is found where it is read.
    (tmp_path / "all" / trusted.source.paths[5]).write_bytes(b"broken")
    with pytest.raises(UserError, match=r"is not a readable image"):
        load(name, image_size=4, check_images=False).source[5]


# --- Several as one ---


def test_joined_data_have_every_image_and_the_shares_that_are_asked_for(tmp_path):
    one = write_zip(
        tmp_path / "a.zip", {path: content for path, content in FILES.items() if "cat" in path or "000" in path}
    )
    other = write_folder(tmp_path / "b", FILES)
    parts = [load(name, image_size=8) for name in (one, other)]
    joined = load(f"{one} + {other}", image_size=8)
    assert read(joined) == read(parts[0]) + read(parts[1])
    assert joined.class_names == CLASSES
    weighted = load(f"{one} + {other}", image_size=8, dataset_weights=(3.0, 1.0))
    rows = read(weighted)
    # The second source is the scarcer for its weight: 12 images once, and those of the first three times as many.
    assert rows[36:] == read(parts[1])
    assert set(Counter(rows[:36]).values()) == {5, 6}
    assert set(rows) == set(read(joined))
    assert sum(len(batch.image) for batch in epoch_batches(weighted, 4)) == 48
    assert load(f"{one} + {other}", "validation", image_size=8).fingerprint.num_examples == 3 + 4
    assert weighted.fingerprint.sha256 != joined.fingerprint.sha256
    with pytest.raises(UserError, match="--dataset_weights=1,2,3: give 2 numbers, one for each --dataset_name"):
        load(f"{one} + {other}", image_size=8, dataset_weights=(1, 2, 3))
    with pytest.raises(UserError, match=r"the images of digits are 8x8x1, those of zip:.* 8x8x3; join data"):
        load_dataset(f"{one} + digits", options=DataOptions(image_size=8))


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([10, 30], None, [10, 30]),
        ([10, 30], (1, 3), [10, 30]),
        ([10, 30], (1, 1), [30, 30]),
        ([7, 5, 3], (1, 1, 2), [7, 7, 14]),
    ],
)
def test_rows_of_an_epoch(sizes, weights, expected):
    assert count_rows(sizes, weights) == expected
