"""Trainings on the same photographs in a folder, a zip, a tar, parquet and on the hub: equal to the last bit. Slow."""

import pytest
from pyarrow import parquet

from tests.conftest import run_program
from tests.fake_hub import fake_hub
from tests.runs import SCALARS, kill_and_continue, losses
from tests.test_archives import write_folder, write_tar, write_zip
from tests.test_hosts import run_two, together

NUM_STEPS = 20
WORDS = f"""
    --image_size 16 --codec pixels --model.hidden_size 32 --model.depth 2 --model.num_heads 2 --model.patch_size 4
    --model.num_classes 1 --batch_size 32 --log_interval 1 --eval_interval 0 --save_interval 5 --max_steps {NUM_STEPS}
    --wandb.mode disabled
""".split()


@pytest.fixture(scope="module")
def names(shared, tmp_path_factory):
    """{kind: name of the data set} of 240 photographs to train on and 60 held out."""
    root = tmp_path_factory.mktemp("faces")
    files, repository = {}, {"README.md": b"# Faces"}
    for path in sorted((shared / "data" / "celebahq_sample").glob("*.parquet")):
        split = path.name.partition("-")[0]
        for row in parquet.read_table(path).to_pylist():
            files[f"{split}/{row['image']['path']}"] = row["image"]["bytes"]
        repository[f"data/{path.name}"] = path.read_bytes()
    assert len(files) == 300
    with fake_hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.repositories["someone/faces"] = repository
        patch.setenv("HF_ENDPOINT", hub.address)
        patch.setenv("HF_HOME", str(root / "hub"))
        yield {
            "folder": write_folder(root / "folder", files),
            "zip": write_zip(root / "faces.zip", files),
            "tar": write_tar(root / "faces.tar", files),
            "parquet": f"parquet:{shared / 'data' / 'celebahq_sample'}/*.parquet",
            "hf": "hf:someone/faces",
        }


@pytest.fixture(scope="module")
def expected(names, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "whole"
    run_program("train_flow.py", *WORDS, "--dataset_name", names["folder"], "--save_dir", run)
    found = losses(run)
    assert list(found) == list(range(1, NUM_STEPS + 1))
    assert len(found[1]) == 2 * len(SCALARS)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "tar", "parquet", "hf"])
def test_losses_are_those_of_the_folder_also_after_a_kill(names, expected, tmp_path, kind):
    kill_and_continue(tmp_path / kind, 6, *WORDS, "--dataset_name", names[kind])
    assert losses(tmp_path / kind) == expected


@pytest.mark.slow
def test_a_run_goes_on_when_its_folder_has_become_a_zip(names, expected, tmp_path):
    run_program("train_flow.py", *WORDS, "--max_steps", 10, "--dataset_name", names["folder"], "--save_dir", tmp_path)
    run_program("train_flow.py", *WORDS, "--dataset_name", names["zip"], "--save_dir", tmp_path)
    assert losses(tmp_path) == expected


@pytest.mark.slow
@together
def test_two_processes_learn_the_same_from_every_source(names, tmp_path):
    found = {}
    for kind, name in names.items():
        run_two("train_flow.py", *WORDS, "--dataset_name", name, "--save_dir", tmp_path / kind)
        found[kind] = losses(tmp_path / kind)
    assert all(each == found["folder"] for each in found.values())
