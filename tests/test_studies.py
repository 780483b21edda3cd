"""embedlens run: the same record in one process and in two, estimates before a long run, mistakes named at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from test_study import LAUNCHED
from typer.testing import CliRunner

from embedlens import EmbedLensError, load, records, sweep, tasks
from embedlens.__main__ import app
from embedlens.measures import anatomy
from embedlens.studies import STUDIES, run_named

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
TABLE = pd.DataFrame({"correct": [True]})
RECORD = "results/miniature/09_other_models.json"


@pytest.fixture(autouse=True)
def few_to_calibrate(monkeypatch):
    """This is about running, not about which groups are found."""
    monkeypatch.setattr("embedlens.groups.CALIBRATION", 4)


def long_sides(model, sample):
    """A study of the reader's own."""
    return {"side": max(sample.image.size), "tokens": len(model.prompt(sample.image, "What?").grid)}


@pytest.mark.slow
def test_two_processes_write_the_records_that_one_writes(tmp_path):
    """A notebook with its parameters, as a script, behind a launcher, as the page says; then a study by its command."""
    command = ["run", "other_models", "-n", "4", "--batch-size", "2", "--device", "cpu", "--results", "results"]
    parameters = {"n_images": 4, "out": "results"}
    lines = ["import sys, embedlens.groups", "embedlens.groups.CALIBRATION = 4"] + [
        cell["source"] + f"\nglobals().update({parameters})" * ("parameters" in cell["metadata"].get("tags", []))
        for cell in nbformat.read(ROOT / "notebooks/01_motivation_clustering.ipynb", as_version=4)["cells"]
        if cell["cell_type"] == "code"
    ]
    lines += [f"sys.argv[1:] = {command}", "from embedlens.__main__ import main", "main()"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    records_of = []
    for name, launch in {"one": [sys.executable], "two": LAUNCH}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "chapter.py").write_text("\n".join(lines), encoding="utf-8")
        rows = {"EMBEDLENS_ROWS": str(folder / "rows")}
        run = {"cwd": folder, "env": environment | rows, "capture_output": True, "text": True, "timeout": 600}
        done = subprocess.run([*launch, "chapter.py"], **run)
        assert done.returncode == 0, done.stderr
        files = sorted((folder / "results/miniature").iterdir())
        assert [file.stem for file in files] == ["01_motivation_clustering", "09_other_models"]
        records_of.append([json.loads(file.read_text(encoding="utf-8")) for file in files])
    assert records_of[0] == records_of[1] and [record["n_images"] for record in records_of[0]] == [4, 4]
    assert "2 processes" in done.stderr and done.stderr.count("memory: about") == 1  # one of them speaks
    tables = [tmp_path / name / "runs/miniature/other_models/table.csv" for name in ("one", "two")]
    assert tables[0].read_bytes() == tables[1].read_bytes() and len([*tables[0].parent.glob("*.json")]) == 2


def swept(folder: Path | str) -> str:
    """A sweep of six questions in chunks of two, for `test_study`; what this process answered lies beside the table."""
    rank = str(torch.distributed.get_rank()) if torch.distributed.is_initialized() else "alone"
    model, items = load("miniature", device="cpu"), tasks.questions("existence", 6, 0)
    answered: list[str] = []

    def some(model, items, *more):
        answered.extend(map(str, items))
        return real(model, items, *more)

    real, sweep._rows_of = sweep._rows_of, some
    chunk, sweep.CHUNK = sweep.CHUNK, 1
    try:
        table = sweep.run_arms(model, items, [sweep.BASELINE], lambda _, prompts: [None] * len(prompts), batch_size=2)
    finally:
        sweep._rows_of, sweep.CHUNK = real, chunk
    table.to_pickle(Path(folder, f"{rank}.pkl"))
    Path(folder, f"answered-{rank}").write_text(" ".join(answered))
    return rank


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
