"""The benchmarks run, on sizes that say nothing about speed; what they report has the shape that the book reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import embedlens as el
from benchmarks import clustering, looking, measure, prefill, retrieval, sweep, trace
from embedlens import tasks

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results.json"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """A fresh process for each measurement takes seconds to start; one test below starts one."""
    here = lambda function, threads, **arguments: function(**arguments)  # noqa: E731
    for module in (retrieval, trace, clustering, sweep, prefill, looking):
        monkeypatch.setattr(module, "in_fresh_process", here)
    monkeypatch.setattr("embedlens.groups.CALIBRATION", 4)
    for module in (el.sweep, tasks):  # a random model never ends an answer
        monkeypatch.setattr(module, "answer_tokens", lambda _: 4)


def complete(ways):
    for way in ways.values():
        for quantity in ("seconds", "ratio"):
            found = way[quantity]
            assert 0 < found["low"] <= found["median"] <= found["high"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_retrieval_is_measured_and_its_ways_find_the_same_words(dtype):
    found = retrieval.retrieval(1, tokens=4, vocabulary=50, width=8, dtype=dtype, repeats=2)
    complete(found["ways"])
    assert found["ways"]["bare product"]["ratio"]["median"] == 1
    assert found["similarity_matrix_bytes"] == 4 * 50 * (4 if dtype == "float32" else 2)
    assert len(retrieval.lines(found)) == 3
    ways = retrieval._ways(tokens=6, vocabulary=60, width=16, dtype="float32", k=3)
    assert torch.equal(ways["EmbedLens.topk"](6)[1], ways["as released"](6))


def test_tracing_and_clustering_are_measured():
    traced = trace.trace(1, prompts=2, repeats=2)
    clustered = clustering.clustering(1, few=2, many=4, repeats=1)
    for found in (traced, clustered):
        complete(found["ways"])
    assert clustered["ways"]["many"]["pictures"] == 4
    assert (len(trace.lines(traced)), len(clustering.lines(clustered))) == (3, 2)


def test_looking_is_measured(tiny_folder):
    maps = looking.attention(1, repeats=2, side=112, width=64, model=str(tiny_folder))
    bank = looking.context(1, tokens=4, rows=50, width=8, repeats=2)
    page = looking.explorer(1, repeats=1)
    for found in (*maps, bank):
        complete(found["ways"])
    assert 0 < page["seconds"]["low"] and 10_000 < page["bytes"] < 3e6
    assert len(looking.lines(maps, bank, page)) == 2 * 3 + 2 + 1


def test_a_sweep_is_measured_and_both_ways_answer_the_same(tiny_folder):
    questions, pictures = 5, 1
    found = sweep.sweep(1, 5, questions, repeats=1, batch_size=8, model=str(tiny_folder))
    complete(found["ways"])
    assert (found["questions"], found["pictures"], found["arms"]) == (questions, pictures, 8)
    assert found["same_answers"] > 0.9  # other kernels and batches: a near tie may fall the other way
    assert len(sweep.lines(found)) == 1


def test_prefill_is_measured_beside_the_rows_that_it_runs(tiny_folder):
    found = prefill.prefill(1, pictures=2, repeats=2, side=112, width=64, model=str(tiny_folder))
    assert len(prefill.lines(found)) == len(found["settings"]) == 3
    for setting in found["settings"]:
        complete(setting["ways"])
        rows = setting["rows"]
        assert 0 < rows["dead tokens pruned"] < rows["all tokens"]
        assert setting["rows_ratio"] == pytest.approx(rows["dead tokens pruned"] / rows["all tokens"], rel=1e-3)
    assert "64 visual tokens" in found["settings"][2]["name"]


def test_every_way_is_timed_equally_often_and_ratios_are_within_rounds():
    calls = []
    times = measure.timed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=4)
    assert calls.count("a") == calls.count("b") == 5 and len(times["a"]) == len(times["b"]) == 4
    found = measure.compared({"a": [1.0, 10.0], "b": [2.0, 20.0]}, to="a")
    assert found["b"]["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0, "repeats": 2}


def test_peak_memory_sees_what_is_freed_before_the_end_and_not_what_was_there_before():
    kept = torch.ones(3_000_000)  # 12 MB, before

    def run():
        torch.ones(20_000_000).sum()  # 80 MB, gone when the call ends
        torch.ones(5_000_000).sum()

    peak = measure.peak_extra_bytes(run)
    if peak is None:
        pytest.skip("only Linux lets a process set its high-water mark back")
    assert 75e6 < peak < 100e6
    assert measure.peak_extra_bytes(lambda: kept.sum()) < 10e6


def test_a_fresh_process_has_the_threads_it_was_given():
    assert measure.in_fresh_process(torch.get_num_threads, threads=1) == 1


def test_the_committed_results_are_what_the_book_reads():
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert {"machine", "instructions", "threads", "load_before", "versions"} <= set(content)
    lines = [line for found in content["retrieval"] for line in retrieval.lines(found)]
    lines += [line for found in content["trace"] for line in trace.lines(found)]
    lines += [line for found in content["sweep"] for line in sweep.lines(found)] + prefill.lines(content["prefill"])
    lines += looking.lines(content["attention"], content["context"], content["explorer"])
    assert len(lines + clustering.lines(content["clustering"])) == 19 + 6 + 9
