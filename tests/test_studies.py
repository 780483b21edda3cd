"""embedlens run: whose record is written where, estimates before a long run, mistakes named at once."""

import json
from pathlib import Path

import pandas as pd
import pytest
from test_study import LAUNCHED
from typer.testing import CliRunner

from embedlens import EmbedLensError, records, sweep, tasks
from embedlens.__main__ import app
from embedlens.measures import anatomy
from embedlens.studies import STUDIES, run_named

TABLE = pd.DataFrame({"correct": [True]})
RECORD = "results/miniature/09_other_models.json"


@pytest.fixture(autouse=True)
def few_to_calibrate(monkeypatch):
    """This is about running, not about which groups are found."""
    monkeypatch.setattr("embedlens.groups.CALIBRATION", 4)


def long_sides(model, sample):
    """A study of the reader's own."""
    return {"side": max(sample.image.size), "tokens": len(model.prompt(sample.image, "What?").grid)}


def test_a_study_of_the_readers_own_is_found_by_its_name_and_resumed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    said: list[str] = []
    table = run_named("test_studies:long_sides", n=3, device="cpu", out=tmp_path, say=said.append)
    assert table.columns.tolist() == ["id", "side", "tokens"] and len(pd.read_csv(tmp_path / "table.csv")) == 3
    again = run_named("test_studies:long_sides", n=3, device="cpu", out=tmp_path, say=said.append)
    assert again.equals(table) and len(list(tmp_path.glob("*.json"))) == 1
    assert not any(line.startswith("time:") for line in said)


def test_another_preprocessing_writes_rows_and_record_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for way in ("stretch", "letterbox"):
        run_named("other_models", n=2, device="cpu", preprocessing=way, results="results")
    assert sorted(path.name for path in Path("results").iterdir()) == ["miniature", "miniature@stretch"]
    assert sorted(path.name for path in Path("runs").iterdir()) == ["miniature", "miniature@stretch"]


def test_a_long_run_says_first_what_time_it_takes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr("embedlens.studies.LONG", 2)
    said: list[str] = []
    run_named("test_studies:long_sides", n=2, device="cpu", out=tmp_path, say=said.append)
    memory, time = (next(line for line in said if line.startswith(start)) for start in ("memory:", "time:"))
    assert "estimate from the config" in memory and "a picture in a first batch" in time
    assert said.index(time) < next(i for i, line in enumerate(said) if line.startswith("2 rows"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nosuch"], "no study 'nosuch': choose other_models, sinks, dead"),
        (["json:nosuch"], "json has no function 'nosuch'"),
        (["no_such_module:f"], "no module 'no_such_module'"),
        (["other_models", "-n", "0"], "n is 0"),
        (["other_models", "--batch-size", "big"], "--batch-size big: pass a number or 'auto'"),
        (["other_models", "--quantize", "2bit"], "unknown quantize '2bit'"),
        (["sinks", "--dataset", "coco:/nowhere"], "has no questions to answer"),
    ],
)
def test_a_mistake_is_named_before_anything_is_measured(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("_toc.yml", "_config.yml"):
        (tmp_path / name).touch()  # a checkout of its own, where a record would land
    with pytest.raises(EmbedLensError, match=sentence):
        CliRunner().invoke(app, ["run", *words, "--device", "cpu"], catch_exceptions=False)
    assert not (tmp_path / "results").exists()


def test_one_model_over_all_gpus_is_no_share_of_several_processes(monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EmbedLensError, match="device='auto' spreads one model over all GPUs"):
        run_named("other_models", n=4, device="auto")


@pytest.mark.parametrize("name", ["sinks", "dead"])
def test_the_arms_of_a_table_are_answered_family_by_family(name, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(sweep, "run_arms", lambda model, items, arms, **how: asked.update(i=items, a=arms) or TABLE)
    run_named(name, n=5, device="cpu", out=tmp_path)
    assert [arm.name for arm in asked["a"]] == [arm.name for arm in STUDIES[name].arms()]
    assert len(asked["i"]) == 5 * len(tasks.FAMILIES) and (tmp_path / "table.csv").is_file()


def test_the_record_of_a_study_is_the_checkouts_and_replaces_none_of_other_parameters(tmp_path, monkeypatch, capsys):
    for name in ("_toc.yml", "_config.yml"):
        (tmp_path / name).touch()
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    run_named("other_models", n=3, device="cpu", out="rows")
    main = tmp_path / RECORD
    before = main.read_text()
    run_named("other_models", n=2, device="cpu", out="fewer")
    assert main.read_text() == before and json.loads(before)["parameters"] == {"dataset": "miniworld"}
    beside = main.with_name("09_other_models.n_images=2.json")
    assert "this run's record is 09_other_models.n_images=2.json" in capsys.readouterr().out
    assert [records.read(file).n_images for file in records.main_records("")] == [3]  # pages read the main one
    assert records.read(beside).n_images == 2


def test_a_study_that_is_a_part_of_a_chapter_says_that_it_writes_no_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    run_named("sinks", n=5, device="cpu", say=said.append)
    assert said[-1].startswith("no record: sinks is the arms of Table 1; a part of chapter 03")
    assert Path("runs/miniature/sinks/table.csv").is_file() and not Path("results").exists()


def test_the_help_says_what_every_study_is():
    text = " ".join(CliRunner().invoke(app, ["run", "--help"]).output.split())
    assert (
        all(f"{name}: {study.about}" in text for name, study in STUDIES.items())
        and anatomy.CHAPTER == "09_other_models"
    )
