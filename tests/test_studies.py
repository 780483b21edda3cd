"""embedlens run: the same record in one process and in two, estimates before a long run, mistakes named at once."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import test_study
import torch
from test_study import LAUNCHED, of_batch, pictures, same, stand_in
from typer.testing import CliRunner

from embedlens import EmbedLensError, load, records, run, sweep, tasks
from embedlens.__main__ import app
from embedlens.kept import ROWS
from embedlens.measures import anatomy
from embedlens.studies import STUDIES, run_named

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
TABLE = pd.DataFrame({"correct": [True]})
BAD = {104: EmbedLensError("104 is damaged: get a complete copy")}
RECORD = "results/miniature/09_other_models.json"


@pytest.fixture(autouse=True)
def few_to_calibrate(monkeypatch):
    """This is about running, not about which groups are found."""
    monkeypatch.setattr("embedlens.groups.CALIBRATION", 4)


def long_sides(model, sample):
    """A study of the reader's own."""
    return {"side": max(sample.image.size), "tokens": len(model.prompt(sample.image, "What?").grid)}


def in_each_process(folder: str) -> None:
    """Studies whose rows depend on their company, kept and not; a sweep, the longest part of chapters 03, 04, 07, 08.

    What this process measured lies beside the tables; a sample cannot be read.
    """
    torch.set_num_threads(1)
    for name, out in (("kept", Path(folder, "rows")), ("dropped", None)):
        test_study.CALLS.clear()
        table = run(of_batch, stand_in(), pictures(23, BAD), out, batch_size=4)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "alone"
        table.to_pickle(Path(folder, f"{name}-{rank}.pkl"))
        Path(folder, f"{name}-{rank}").write_text(" ".join(map(str, test_study.CALLS)))
    answered: list[str] = []

    def some(model, items, *more):
        answered.extend(map(str, items))
        return real(model, items, *more)

    real, chunk = sweep._rows_of, sweep.CHUNK
    sweep._rows_of, sweep.CHUNK = some, 1
    try:
        model, items = load("miniature", device="cpu"), tasks.questions("existence", 6, 0)
        arms = [sweep.BASELINE]
        table = sweep.run_arms(model, items, arms, lambda _, prompts: [None] * len(prompts), batch_size=2)
    finally:
        sweep._rows_of, sweep.CHUNK = real, chunk
    table.to_pickle(Path(folder, f"swept-{rank}.pkl"))
    Path(folder, f"swept-{rank}").write_text(" ".join(answered))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:1 of 23")
def test_two_processes_write_the_records_and_tables_that_one_writes(tmp_path, monkeypatch):
    """A notebook with its parameters, as a script, behind a launcher, as the page says; then a study by its command."""
    command = ["run", "other_models", "-n", "4", "--batch-size", "2", "--device", "cpu", "--results", "results"]
    parameters = {"n_images": 4, "out": "results"}
    lines = ["import sys, embedlens.groups", "embedlens.groups.CALIBRATION = 4"] + [
        cell["source"] + f"\nglobals().update({parameters})" * ("parameters" in cell["metadata"].get("tags", []))
        for cell in nbformat.read(ROOT / "notebooks/01_motivation_clustering.ipynb", as_version=4)["cells"]
        if cell["cell_type"] == "code" and "tsne" not in cell["source"]  # which takes half the time
    ]
    lines += [f"sys.path.append({str(Path(__file__).parent)!r})", "import test_studies"]
    lines += ["test_studies.in_each_process('.')", f"sys.argv[1:] = {command}"]
    lines += ["from embedlens.__main__ import main", "main()"]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "chapter.py").write_text("\n".join(lines), encoding="utf-8")
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg", ROWS: str(two / "kept")}
    how = {"cwd": two, "env": os.environ | environment, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run([*LAUNCH, "chapter.py"], **how)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr and done.stderr.count("memory: about") == 1  # one of them speaks
    monkeypatch.chdir(one)
    monkeypatch.setenv(ROWS, str(one / "kept"))
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("chapter.py", run_name="__main__")
    assert not ended.value.code

    files = [sorted((folder / "results/miniature").iterdir()) for folder in (one, two)]
    assert [file.stem for file in files[1]] == ["01_motivation_clustering", "09_other_models"]
    found = [[json.loads(file.read_text(encoding="utf-8")) for file in of] for of in files]
    assert found[0] == found[1] and [record["n_images"] for record in found[1]] == [4, 4]
    tables = [folder / "runs/miniature/other_models/table.csv" for folder in (one, two)]
    assert tables[0].read_bytes() == tables[1].read_bytes() and len([*tables[0].parent.glob("*.json")]) == 2

    for name in ("kept", "dropped", "swept"):
        alone, *shared = (pd.read_pickle(folder) for folder in (one / f"{name}-alone.pkl", *two.glob(f"{name}-?.pkl")))
        for table in shared:
            same(table, alone)
            assert table.attrs == alone.attrs
        measured = [set((two / f"{name}-{rank}").read_text().split()) for rank in (0, 1)]
        assert all(measured) and not measured[0] & measured[1]  # they did share the work
        assert measured[0] | measured[1] == set((one / f"{name}-alone").read_text().split())
    test_study.CALLS.clear()
    again = run(of_batch, stand_in(), pictures(23, BAD), two / "rows", batch_size=4)
    same(again, pd.read_pickle(one / "kept-alone.pkl"))
    assert set(test_study.CALLS) <= {104, 105, 106, 107}  # one goes on from what two left, trying again what failed


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
