"""run: the same table whatever happens to the run; a bad picture is recorded, a bug raised, a mix-up refused."""

from __future__ import annotations

import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from functools import partial, wraps
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from PIL import Image
from torch import nn

from embedlens import EmbedLensError, Rescale, intervene, kept, load, run, sweep, tasks
from embedlens.processes import own_device
from embedlens.samples import Sample
from embedlens.study import ON_CPU, fitting_batch_size
from embedlens.vlm import VisionLanguageModel

ROOT = Path(__file__).parents[1]
LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # by torchrun
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
BAD = {104: EmbedLensError("104 is damaged: get a complete copy")}
CALLS: list[int] = []  # ids that a study was asked about; a global, so that it is no parameter of the study
BUGS: set[int] = set()


class Part(nn.Linear):
    dtype = torch.float32


def stand_in(seed: int = 0, name: str = "stand-in", preprocessing: str = "letterbox") -> VisionLanguageModel:
    """As much of a model as identifies rows: it loads in no time."""
    model = object.__new__(VisionLanguageModel)
    torch.manual_seed(seed)
    model.hf, model.name, model.preprocessing = Part(3, 2), name, preprocessing
    model._embedding, model._of_thread = model.hf.weight, threading.local()
    return model


def noise(index: int, bad: dict[int, Exception]) -> Image.Image:
    if index in bad:
        raise bad[index]
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (3, 4, 3), dtype=np.uint8))


def pictures(n: int, bad: dict[int, Exception] | None = None, first: int = 100, caption: str = "") -> list[Sample]:
    return [
        Sample(first + i, 4, 3, (), (f"{caption}{i}",), (), {}, partial(noise, first + i, bad or {})) for i in range(n)
    ]


def one_row(model, sample, scale=1.0):
    """Values that are hard to carry: float32, no short decimal, nan, infinity, letters, a tensor."""
    CALLS.append(sample.id)
    if sample.id in BUGS:
        raise KeyError("bbox")
    grey = np.asarray(sample.image, dtype=np.float32).mean() / np.float32(3)
    often = math.nan if sample.id % 3 == 0 else math.inf
    hard = {"grey": grey, "root": math.sqrt(sample.id) * scale, "odd": np.bool_(sample.id % 2), "often": often}
    return hard | {"word": f'wört\n"{sample.id}"', "left": torch.tensor(sample.id) % 7, "none": None}


def several(model, sample):
    """None to three records, some with more values than others; as a generator."""
    for token in range(sample.id % 4):
        yield {"token": token, "score": 1 / (1 + token)} | ({"last": "yes"} if token == 2 else {})


def of_batch(model, batch):
    """Every value depends on the company, as rounding does."""
    CALLS.extend(sample.id for sample in batch)
    total = sum(float(np.asarray(sample.image).mean()) for sample in batch)
    return [[{"share": float(np.asarray(s.image).mean()) / total, "company": len(batch)}] * (s.id % 3) for s in batch]


def slow(model, batch):
    time.sleep(0.006)
    return of_batch(model, batch)


def plain(rows):
    return pd.DataFrame([{k: v.item() if hasattr(v, "item") else v for k, v in row.items()} for row in rows])


def expected(samples, study=one_row):
    return plain([{"id": sample.id, **study(None, sample)} for sample in samples])


def expected_of_batches(samples, size):
    batches = [samples[i : i + size] for i in range(0, len(samples), size)]
    given = [(s, rows) for batch in batches for s, rows in zip(batch, of_batch(None, batch), strict=True)]
    return plain([{"id": sample.id, **row} for sample, rows in given for row in rows])


same = partial(assert_frame_equal, check_exact=True)


@pytest.fixture(autouse=True)
def fresh():
    CALLS.clear()
    BUGS.clear()


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
def test_the_table_is_what_the_study_gave_in_the_order_of_the_samples(tmp_path, kept):
    out = tmp_path / "deep" / "folder" if kept else None
    table = run(one_row, stand_in(), iter(pictures(7)), out)
    same(table, expected(pictures(7)))
    assert table["grey"].dtype == float and table["odd"].dtype == bool and table["left"].dtype == int
    assert table["often"].isna().sum() == 2 and table.attrs["failed"] == []
    with pytest.raises(AssertionError):
        same(table, expected(pictures(7)[::-1]))


def test_records_of_one_sample_stay_together_and_absent_values_are_nan():
    table = run(several, stand_in(), pictures(9))
    rows = [{"id": sample.id, **row} for sample in pictures(9) for row in several(None, sample)]
    same(table, pd.DataFrame(rows))
    assert len(table) == 12 and table["last"].isna().sum() == 10
    table = run(lambda model, sample: {"value": 1, "id": f"<{sample.id}>"}, stand_in(), pictures(2))
    assert table.columns.tolist() == ["value", "id"] and table["id"].tolist() == ["<100>", "<101>"]  # ids of its own


def test_batches_give_what_single_samples_give_and_their_bounds_are_fixed():
    apart = partial(one_row, scale=2.0)
    same(run(in_turn, stand_in(), pictures(10), batch_size=4), run(apart, stand_in(), pictures(10)))
    table = run(of_batch, stand_in(), pictures(10), batch_size=4)
    same(table, expected_of_batches(pictures(10), 4))
    assert set(table["company"]) == {4, 2}


def in_turn(model, batch):
    return [one_row(model, sample, 2.0) for sample in batch]


def test_samples_are_read_as_they_are_needed_and_let_go_of_their_pictures():
    read = []

    def stream():
        for sample in pictures(9):
            read.append(sample.id)
            yield sample

    def ahead(model, batch):
        return [{"ahead": read[-1] - sample.id, "mode": sample.image.mode} for sample in batch]

    assert run(ahead, stand_in(), stream(), batch_size=3)["ahead"].max() == 2
    samples = pictures(3)
    kept = samples[1].image
    run(ahead, stand_in(), samples, batch_size=3)
    assert ["image" in vars(sample) for sample in samples] == [False, True, False] and samples[1].image is kept


def test_a_bar_is_shown_on_terminals_and_on_request_only(capsys):
    run(one_row, stand_in(), pictures(2))
    assert capsys.readouterr() == ("", "")
    run(one_row, stand_in(), pictures(2), progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "/2 [" in shown.err


# --- killed and resumed ----------------------------------------------------------------------------------------------


def chunks(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def killed_until_done(folder: str, seed: int) -> None:
    """Runs in a process of its own: forks the run, kills the fork at a random moment, again and again."""
    rng, kills, rows = random.Random(seed), 0, Path(folder, "rows")
    while True:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run(slow, stand_in(), pictures(40), rows, batch_size=3).to_pickle(Path(folder, "table.pkl"))
                code = 0
            finally:
                os._exit(code)
        wanted, moment = len(chunks(rows)) + rng.randrange(1, 4), 0.0005 * rng.randrange(6)
        while (done := os.waitpid(pid, os.WNOHANG))[0] == 0 and len(chunks(rows)) < wanted:
            time.sleep(0.0005)
        time.sleep(moment)
        if done[0] == 0:
            os.kill(pid, signal.SIGKILL)
            done = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(done[1]):
            print(os.WEXITSTATUS(done[1]), kills)
            return
        kills += 1


def test_a_run_killed_at_random_moments_ends_with_the_table_of_an_uninterrupted_one(tmp_path):
    code = "import sys; from test_study import *; killed_until_done(sys.argv[1], 0)"  # beside these tests, whose
    how = {"cwd": Path(__file__).parent, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "timeout": 600}  # threads stay
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stderr
    status, kills = done.stdout.split()
    assert status == "0" and int(kills) >= 2
    same(pd.read_pickle(tmp_path / "table.pkl"), expected_of_batches(pictures(40), 3))


def test_a_finished_run_is_read_and_a_longer_one_goes_on_from_its_whole_chunks(tmp_path):
    run(of_batch, stand_in(), pictures(6), tmp_path, batch_size=4)
    whole, longer = expected_of_batches(pictures(6), 4), expected_of_batches(pictures(8), 4)
    others = pictures(8, first=200)[:4] + pictures(4, caption="x")  # those of an id known, but other samples
    other = expected_of_batches(others, 4)
    CALLS.clear()
    same(run(of_batch, stand_in(), pictures(6), tmp_path, batch_size=4), whole)
    assert CALLS == []
    same(run(of_batch, stand_in(), pictures(8), tmp_path, batch_size=4), longer)
    assert CALLS == [104, 105, 106, 107]  # in another company a sample is measured anew
    same(run(of_batch, stand_in(), others, tmp_path, batch_size=4), other)
    assert CALLS[4:8] == [200, 201, 202, 203] and len(CALLS) == 12


@pytest.mark.parametrize("harm", [lambda data: data[:-9], lambda data: b"", lambda data: data.replace(b"2", b"3")])
def test_a_damaged_chunk_is_named_and_measured_again(tmp_path, harm):
    whole = run(of_batch, stand_in(), pictures(6), tmp_path, batch_size=2)
    chunk = chunks(tmp_path)[1]
    chunk.write_bytes(harm(chunk.read_bytes()))
    CALLS.clear()
    with pytest.warns(UserWarning, match=f"{chunk.name} is damaged: what it held is measured again"):
        same(run(of_batch, stand_in(), pictures(6), tmp_path, batch_size=2), whole)
    assert len(CALLS) == 2
    same(run(of_batch, stand_in(), pictures(6), tmp_path, batch_size=2), whole)


def shifted(model, sample, by):
    return {"value": sample.id + by.sum()}


OTHERS = [{"study": several}, {"study": partial(shifted, by=np.arange(4))}, {"batch_size": 2, "study": of_batch}]
OTHERS += [{"model": stand_in(1)}, {"model": stand_in(name="other")}, {"model": stand_in(preprocessing="stretch")}]


@pytest.mark.parametrize("other", OTHERS)
def test_rows_of_something_else_are_not_mixed_in(tmp_path, other):
    usual = {"study": partial(shifted, by=np.arange(3)), "model": stand_in(), "samples": pictures(4), "out": tmp_path}
    first, kept = run(**usual), chunks(tmp_path)
    same(run(**usual | other), run(**usual | other | {"out": None}))
    assert len(chunks(tmp_path)) > len(kept) == 1
    same(run(**usual | {"study": partial(shifted, by=np.arange(3)), "model": stand_in()}), first)


def test_changed_code_is_not_mixed_in(tmp_path, monkeypatch):
    versions = {1: lambda model, sample: {"value": 1}, 2: lambda model, sample: {"value": 2}}  # of one name
    for n in (1, 2, 1):
        assert run(versions[n], stand_in(), pictures(2), tmp_path)["value"].tolist() == [n, n]
    assert len(chunks(tmp_path)) == 2
    monkeypatch.setattr(kept, "sources", lambda: "of another version")
    run(versions[1], stand_in(), pictures(2), tmp_path)
    assert len(chunks(tmp_path)) == 3


def test_a_parameter_without_identity_is_refused_only_where_rows_are_asked_for(tmp_path, monkeypatch):
    study = partial(shifted, by=(i for i in range(3)))
    with pytest.raises(EmbedLensError, match="cannot pickle 'generator' object.*leave out=None"):
        run(study, stand_in(), pictures(1), tmp_path)
    monkeypatch.setenv(kept.ROWS, str(tmp_path))
    with pytest.raises(AttributeError):
        run(study, stand_in(), pictures(1))


# --- rows that nobody asked to keep ----------------------------------------------------------------------------------


def test_under_the_environment_variable_every_run_is_kept_by_what_it_is(tmp_path, monkeypatch):
    scaled = partial(one_row, scale=3.0)
    tables = {size: {n: expected_of_batches(pictures(n), size) for n in (3, 5)} for size in (2, 8)}
    plain = expected(pictures(3), scaled)
    monkeypatch.setenv(kept.ROWS, str(tmp_path / "rows"))
    CALLS.clear()
    for _ in range(2):
        for n in (5, 3):  # the same study on other samples, and other studies, do not stand in each other's way
            same(run(of_batch, stand_in(), pictures(n), batch_size=2), tables[2][n])
            same(run(of_batch, stand_in(), pictures(n), batch_size="auto"), tables[8][n])
        same(run(scaled, stand_in(), pictures(3)), plain)
    assert len(CALLS) == 5 + 1 + 5 + 3 + 3  # each chunk once
    assert len(chunks(tmp_path / "rows")) == 4 + 2 + 1 + 1  # the batch size that was found, too


def first_value(model, sample):
    return {"value": model.hf.weight[0, 0].item()}


def test_a_model_that_was_touched_is_another(tmp_path, monkeypatch, tiny):
    monkeypatch.setenv(kept.ROWS, str(tmp_path))
    model = stand_in()
    before = run(first_value, model, pictures(1))["value"][0]
    with torch.no_grad():
        model.hf.weight[0, 0] += 1  # one value of one weight
    assert run(first_value, model, pictures(1))["value"][0] == pytest.approx(before + 1)
    plain = kept.of_model(tiny)
    with intervene(tiny, Rescale(2.0)):
        assert kept.of_model(tiny) != plain
        tiny.logits(tiny.prompt(noise(0, {}), "what ?"))
    assert kept.of_model(tiny) == plain


def doubled(x):
    return 2 * x


def calling(scale):
    def study(model, sample):
        return doubled(scale)

    return study


def repeated(times):
    def decorate(study):
        @wraps(study)
        def several(model, sample):
            return [study(model, sample)] * times

        return several

    return decorate


def test_a_digest_knows_what_decorators_were_given():
    twice, again, thrice = (kept.digest(repeated(times)(one_row)) for times in (2, 2, 3))
    assert twice == again != thrice and kept.digest(one_row) not in (twice, thrice)
    assert kept.digest(torch.no_grad()(one_row)) == kept.digest(torch.no_grad()(one_row))


def test_a_digest_is_of_values_and_of_the_code_that_is_called(monkeypatch):
    one, two = ("a", "b"), tuple("ab")
    assert kept.digest([one, one]) == kept.digest([one, two]) != kept.digest([one, two[::-1]])
    assert kept.digest(torch.zeros(0)) != kept.digest(torch.zeros(0, 2)) != kept.digest(torch.zeros(1))
    before = kept.digest(calling(1))
    assert before == kept.digest(calling(1)) != kept.digest(calling(2))
    monkeypatch.setitem(globals(), "doubled", one_row)
    assert kept.digest(calling(1)) != before


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_bad_picture_is_recorded_and_the_others_are_measured(tmp_path, batch_size):
    damaged = EmbedLensError("picture 102 is damaged: get a complete copy")
    bad = {102: damaged, 105: FileNotFoundError(2, "No such file", "105.jpg"), 106: MemoryError()}
    study = partial(one_row, scale=2.0) if batch_size is None else in_turn
    with pytest.warns(UserWarning, match="3 of 8 samples could not .* the first is sample 102: picture 102 is damaged"):
        table = run(study, stand_in(), pictures(8, bad), tmp_path, batch_size)
    good = [sample for sample in pictures(8) if sample.id not in bad]
    same(table, expected(good, partial(one_row, scale=2.0)))
    assert [(entry["index"], entry["id"]) for entry in table.attrs["failed"]] == [(2, 102), (5, 105), (6, 106)]
    said = [entry["error"] for entry in table.attrs["failed"]]
    assert "FileNotFoundError" in said[1] and "105.jpg" in said[1] and "too little memory" in said[2]
    mended = run(study, stand_in(), pictures(8), tmp_path, batch_size)  # no warning now
    same(mended, expected(pictures(8), partial(one_row, scale=2.0)))
    assert mended.attrs["failed"] == []


@pytest.mark.parametrize(
    ("study", "samples", "sentence"),
    [
        (one_row, pictures(3, {100 + i: OSError("gone") for i in range(3)}), "none of 3 samples could .*OSError: gone"),
        (lambda model, sample: [], pictures(2), "no record for any of 2 samples: return at least one"),
        (one_row, [], "no samples: pass at least one"),
    ],
)
def test_a_run_in_which_nothing_could_be_measured_is_an_error(study, samples, sentence):
    with pytest.raises(EmbedLensError, match=sentence):
        run(study, stand_in(), samples)


def test_a_bug_is_raised_at_once_and_the_rows_before_it_stay(tmp_path):
    BUGS.add(103)
    with pytest.raises(KeyError, match="bbox"):
        run(in_turn, stand_in(), pictures(6), tmp_path, batch_size=2)
    assert CALLS == [100, 101, 102, 103]
    BUGS.clear()
    CALLS.clear()
    table = run(in_turn, stand_in(), pictures(6), tmp_path, batch_size=2)
    assert CALLS == [102, 103, 104, 105]  # the batch in flight, and what follows
    same(table, expected(pictures(6), partial(one_row, scale=2.0)))


@pytest.mark.parametrize(
    ("given", "batch_size", "sentence"),
    [
        (None, None, "gave None for sample 100: return one record"),
        ("text", None, "gave a str for sample 100"),
        ([{"a": 1}, 2], None, "gave a int for sample 100"),
        ({"words": ["a", "b"]}, None, "value 'words' is a list: a record is flat"),
        ({"h": torch.zeros(2)}, None, "value 'h' is a Tensor"),
        ([{"a": 1}], 2, "gave 1 results for a batch of 2 samples"),
        ({"a": 1}, 2, "gave a dict for a batch of 2 samples"),
        (None, 2, "gave None for a batch of 2 samples"),
        ({"a": 1}, 0, "batch_size is 0: pass at least 1"),
    ],
)
def test_what_is_no_record_gets_its_sentence(given, batch_size, sentence):
    with pytest.raises(EmbedLensError, match=sentence):
        run(lambda model, sample: given, stand_in(), pictures(2), batch_size=batch_size)


# --- several processes -----------------------------------------------------------------------------------------------


def in_each_process(folder: str) -> None:
    """Studies whose rows depend on their company, kept and not; a sweep, the longest part of chapters 03, 04, 07, 08.

    What this process measured lies beside the tables; a sample cannot be read.
    """
    for name, out in (("kept", Path(folder, "rows")), ("dropped", None)):
        CALLS.clear()
        table = run(of_batch, stand_in(), pictures(23, BAD), out, batch_size=4)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "alone"
        table.to_pickle(Path(folder, f"{name}-{rank}.pkl"))
        Path(folder, f"{name}-{rank}").write_text(" ".join(map(str, CALLS)))
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
    lines += [f"sys.path.append({str(Path(__file__).parent)!r})", "import test_study"]
    lines += ["test_study.in_each_process('.')", f"sys.argv[1:] = {command}"]
    lines += ["from embedlens.__main__ import main", "main()"]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "chapter.py").write_text("\n".join(lines), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    environment[kept.ROWS] = str(two / "kept")
    how = {"cwd": two, "env": environment, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run([*LAUNCH, "chapter.py"], **how)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr and done.stderr.count("memory: about") == 1  # one of them speaks
    monkeypatch.chdir(one)
    monkeypatch.setenv(kept.ROWS, str(one / "kept"))
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("embedlens.groups.CALIBRATION", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("chapter.py", run_name="__main__")
    finally:
        torch.set_num_threads(threads)
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
    CALLS.clear()
    again = run(of_batch, stand_in(), pictures(23, BAD), two / "rows", batch_size=4)
    same(again, pd.read_pickle(one / "kept-alone.pkl"))
    assert set(CALLS) <= {104, 105, 106, 107}  # one goes on from what two left, trying again what failed


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    from accelerate.state import PartialState

    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(PartialState, "__init__", lambda self, cpu: None)
    monkeypatch.setattr(PartialState, "num_processes", 1, raising=False)
    with pytest.raises(EmbedLensError, match="2 processes were launched but accelerate knows of 1"):
        run(one_row, stand_in(), pictures(2))


@pytest.mark.parametrize(
    "left",
    [{"WORLD_SIZE": "many"}, {"WORLD_SIZE": "2", "RANK": "0"}, LAUNCHED | {"RANK": "x"}, LAUNCHED | {"RANK": "5"}],
)
def test_what_another_launcher_left_behind_is_named_with_the_way_out(monkeypatch, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    for call in (own_device, partial(run, one_row, stand_in(), pictures(2))):
        with pytest.raises(EmbedLensError, match=f"WORLD_SIZE={left['WORLD_SIZE']} is in .* run `unset WORLD_SIZE`"):
            call()


# --- batches that do not fit -----------------------------------------------------------------------------------------


class OnGpu(VisionLanguageModel):
    """A stand-in that says it is on a GPU."""

    device = torch.device("cuda")


def on_gpu() -> VisionLanguageModel:
    model = stand_in()
    model.__class__ = OnGpu
    return model


def of_room(model, samples, room):
    """A batched study on a device with room for so many samples."""
    CALLS.append(len(samples))
    if len(samples) > room:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return [{"width": sample.image.width} for sample in samples]


@pytest.mark.parametrize(("room", "found", "tried"), [(64, 64, [64]), (10, 8, [64, 32, 16, 8])])
def test_the_batch_size_is_found_by_halving_until_the_batch_fits(room, found, tried):
    CALLS.clear()
    assert fitting_batch_size(partial(of_room, room=room), on_gpu(), pictures(70)) == found
    assert tried == CALLS


def test_a_batch_that_does_not_fit_is_measured_in_halves_and_a_bug_is_no_lack_of_room(tmp_path):
    CALLS.clear()
    table = run(partial(of_room, room=2), stand_in(), pictures(7), tmp_path, batch_size=7)
    assert CALLS == [7, 3, 1, 2, 4, 2, 2] and table["id"].tolist() == list(range(100, 107))
    with pytest.raises(EmbedLensError, match="none of 2 samples .*too little memory"):
        run(partial(of_room, room=0), stand_in(), pictures(2), batch_size=2)
    with pytest.raises(EmbedLensError, match="too little memory for one sample .*quantize='4bit'"):
        fitting_batch_size(partial(of_room, room=0), on_gpu(), pictures(3))
    with pytest.raises(RuntimeError, match="mat1"):
        fitting_batch_size(lambda *_: torch.zeros(2, 3) @ torch.zeros(2, 3), on_gpu(), pictures(3))


def test_a_resumed_run_keeps_the_batch_size_that_was_found(tmp_path):
    CALLS.clear()
    table = run(partial(of_room, room=10), on_gpu(), pictures(20), tmp_path, batch_size="auto")
    assert CALLS == [16, 8, 8, 8, 4]
    same(run(partial(of_room, room=10), on_gpu(), pictures(20), tmp_path, batch_size="auto"), table)
    run(partial(of_room, room=10), on_gpu(), pictures(28), tmp_path, batch_size="auto")
    assert CALLS == [16, 8, 8, 8, 4, 8, 4]  # no trial, and the whole batches as they were
    fresh = run(of_batch, stand_in(), iter(pictures(20)), batch_size="auto")
    same(fresh, run(of_batch, stand_in(), pictures(20), batch_size=ON_CPU))
    with pytest.raises(EmbedLensError, match="batch_size is 'many': pass a number, 'auto'"):
        run(of_batch, stand_in(), pictures(2), batch_size="many")


def test_each_process_is_sent_to_a_device_of_its_own(monkeypatch):
    assert own_device() is None
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device() == "cuda:1"
