"""fid.json: nothing that enters a number is left out of its key, and no result is lost."""

import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from utils.runs.results import Results, plot_fid, sampler_settings, to_markdown, write_csv, write_json_rows
from utils.sampling.solvers import SamplerConfig

SETTINGS = {"num_steps": 2, "cfg_scale": None, "num_samples": 8, "fid_stats": "a", "inception_logits_sha256": None}
WITH_LOGITS = SETTINGS | {"inception_logits_sha256": "0f"}


def test_a_row_without_an_inception_score_is_not_taken_for_one_with(tmp_path):
    results = Results(tmp_path)
    results.add(SETTINGS, {"fid": 1.0})
    assert results.find(SETTINGS | {"fid_stats": "moved"})["fid"] == 1
    assert results.find(WITH_LOGITS) is None
    results.add(WITH_LOGITS, {"fid": 1.0, "inception_score": 3.0})
    assert Results(tmp_path).find(WITH_LOGITS)["inception_score"] == 3
    assert len(Results(tmp_path).rows) == 2
    results.add(SETTINGS, {"fid": 2.0})  # scored again: the other row stays
    assert [row["fid"] for row in Results(tmp_path).rows] == [1, 2]


def test_a_row_with_an_inception_score_serves_where_none_is_asked_for(tmp_path):
    results = Results(tmp_path)
    results.add(WITH_LOGITS, {"fid": 1.0, "inception_score": 3.0})
    assert results.find(SETTINGS)["fid"] == 1


def test_tables_have_the_columns_of_all_rows(tmp_path):
    rows = [SETTINGS | {"fid": 1.0}, SETTINGS | {"fid": 2.0, "inception_score": 3.0}]
    assert to_markdown(rows).splitlines() == [
        "| steps | guidance | samples | FID | IS |",
        "|---:|---:|---:|---:|---:|",
        "| 2 | none | 8 | 1.000 |  |",
        "| 2 | none | 8 | 2.000 | 3.000 |",
    ]
    write_csv(tmp_path / "fid.csv", [*rows, {"extractor": ["inception", "dinov2"]}])
    with (tmp_path / "fid.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["inception_score"] for row in read] == ["", "3.0", ""]
    assert json.loads(read[-1]["extractor"]) == ["inception", "dinov2"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b'{"cells": [{"fid"', b"\xff\xfe", b"[]", b'{"cells": 3}', b"\0" * 9, b"[" * 100_000,
        b'{"cells": ' + b"[" * 100_000, b'{"cells": [{"fid": ' + b"9" * 5000 + b"}]}",
    ],
)  # fmt: skip
def test_a_damaged_file_is_set_aside(tmp_path, content, capsys):
    (tmp_path / "fid.json").write_bytes(content)
    results = Results(tmp_path)
    assert "fid.json.damaged1" in capsys.readouterr().out
    assert (tmp_path / "fid.json.damaged1").read_bytes() == content
    results.add(SETTINGS, {"fid": 1.0})
    assert len(json.loads((tmp_path / "fid.json").read_text())["cells"]) == 1


def test_programs_on_one_folder_keep_each_others_rows(tmp_path):
    all_results = [Results(tmp_path) for _ in range(4)]

    def add(number):
        for steps in range(10):
            all_results[number].add(SETTINGS | {"num_steps": 100 * number + steps}, {"fid": 1.0})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert len(Results(tmp_path).rows) == 40


def test_what_is_recorded_only_where_it_is_not_usual_is_compared_too(tmp_path):
    results = Results(tmp_path)
    usual = {"num_steps": 4, "inception_logits_sha256": None}
    results.add(usual | {"time_shift": 3.0}, {"fid": 1.0})
    assert results.find(usual) is None
    results.add(usual, {"fid": 2.0})
    assert results.find(usual)["fid"] == 2
    assert results.find(usual | {"time_shift": 3.0})["fid"] == 1
    assert results.find(usual | {"convention_source": "flag"})["fid"] == 2  # older rows do not have it


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_the_noise_levels_of_a_diffusion_enter_the_key(solver):
    usual = SamplerConfig(8, None, solver=solver)
    assert sampler_settings(usual) != sampler_settings(usual._replace(spacing="leading"))
    assert "spacing" not in sampler_settings(SamplerConfig(8, None))


def test_rows_are_written_as_json_and_tables_know_adaptive_solvers(tmp_path, capsys):
    rows = [{"num_steps": None, "nfe": 26.5, "cfg_scale": None, "num_samples": 8, "fid": 3.0, "kid": 0.5}]
    write_json_rows("-", rows)
    assert json.loads(capsys.readouterr().out) == rows
    write_json_rows(str(tmp_path / "rows.json"), rows)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert to_markdown(rows).splitlines()[2] == "| 26.5 | adaptive | none | 8 | 3.000 | 0.50000 |"


def test_rows_that_no_evaluation_writes_are_left_out_and_kept_aside(tmp_path, capsys):
    rows = [
        {"fid": "low"}, {"fid": [1.0]}, {"fid": True}, {"fid": int("9" * 400)}, {"kid_error": "x"}, {"note": {"a": 1}},
        {"note": [[1]]}, 3,
    ]  # fmt: skip
    good = SETTINGS | {"fid": 1.0, "nfe": float("nan"), "cfg_interval": [0.0, 1.0], "image_shape": [8, 8, 1]}
    content = json.dumps({"cells": [*rows, good]})
    (tmp_path / "fid.json").write_text(content)
    results = Results(tmp_path)
    assert len(results.rows) == 1
    assert results.find(SETTINGS)["fid"] == 1
    assert "left out 8 of 9 rows" in capsys.readouterr().out
    assert (tmp_path / "fid.json.damaged1").read_text() == content
    assert len(json.loads((tmp_path / "fid.json").read_text())["cells"]) == 1


def test_rows_without_a_fid_are_shown_and_evaluated_again(tmp_path):
    rows = [SETTINGS | {"fid": None}, SETTINGS | {"num_steps": 3}, SETTINGS | {"num_steps": None, "fid": 1.0}]
    (tmp_path / "fid.json").write_text(json.dumps({"cells": rows}))
    results = Results(tmp_path)
    assert results.rows == rows
    for row in rows:
        assert results.find(SETTINGS | {"num_steps": row["num_steps"]}) is None
    assert to_markdown([*rows, SETTINGS | {"fid": 2.0, "kid": 1.0, "kid_error": None}]).splitlines()[2:] == [
        "| 2 | none | 8 |  |  |",
        "| 3 | none | 8 |  |  |",
        "| adaptive | none | 8 | 1.000 |  |",
        "| 2 | none | 8 | 2.000 | 1.00000 |",
    ]
    write_csv(tmp_path / "fid.csv", rows)
    (axes,) = plot_fid([*rows, SETTINGS | {"fid": 2.0}]).axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[2.0, 2.0]]]


@pytest.mark.parametrize(("score", "title"), [("memorised", "memorised (%)"), ("kid", "KID")])
def test_scores_that_may_be_zero_or_below_are_drawn(score, title):
    values = {2: 0.0 if score == "memorised" else -0.01, 4: 60.0}
    asked = {"fid_stats": None} if score == "memorised" else {"metrics": ["kid"]}
    rows = [SETTINGS | asked | {"num_steps": steps, score: value} for steps, value in values.items()]
    (axes,) = plot_fid(rows).axes
    assert (axes.get_ylabel(), axes.get_yscale()) == (title, "linear")
    assert [line.get_xydata().tolist() for line in axes.lines] == [[list(pair) for pair in values.items()]]


def test_a_named_pipe_is_set_aside(tmp_path, capsys):
    os.mkfifo(tmp_path / "fid.json")
    assert Results(tmp_path).rows == []
    assert "it is no regular file; it is kept as" in capsys.readouterr().out
    assert (tmp_path / "fid.json.damaged1").is_fifo()
