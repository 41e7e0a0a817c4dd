"""The records of data sources, and a loader that is registered from outside of the suite."""

import re

import pytest

import train_flow
from tests.conftest import ROOT
from utils.base.errors import UserError
from utils.data import loaders
from utils.data.loaders import LOADERS, expand_name, list_names, load_dataset
from utils.flags import reading


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
        with pytest.raises(UserError, match=f"--dataset_name={name} is unknown.* Known are {known}"):
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
