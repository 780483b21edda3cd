"""The benchmark of the token scores compares like with like."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from benchmarks.measure import operations
from benchmarks.redundancy import BARE, FULL, OURS, lines, one_by_one
from embedlens import samples
from embedlens.readings import Protocol
from embedlens.redundancy import readings_of


def test_one_call_a_reading_gives_the_same_logits(tiny):
    prompt = tiny.prompt(samples.load("miniworld", n=1)[0].image, "what is in the picture?")
    ours = readings_of(tiny, prompt, [3, 5], Protocol(question=prompt.question, articles=()))
    expected = [ours.picture[0]]
    for row in range(2):
        expected += [part[row] for part in (ours.alone, ours.region, ours.region_without, ours.picture_without)]
    for released in (False, True):
        assert_close(one_by_one(tiny, prompt, [3, 5], released), torch.stack(expected), atol=2e-4, rtol=1e-4)


def test_the_printed_rows_name_every_way():
    ratio = {"median": 2.0, "low": 1.0, "high": 3.0}
    way = {"ratio": ratio, "operations": 5e9}
    found = {"tokens": 2, "readings": 9, "ways": dict.fromkeys((OURS, BARE, FULL), way)}
    assert [row[0].split(", ", 3)[2:] for row in lines(found)] == [["5.0 GFLOP", name] for name in (OURS, BARE, FULL)]


def test_sharing_spares_arithmetic_and_generation_costs_some(tiny):
    prompt = tiny.prompt(samples.load("miniworld", n=1)[0].image, "what is in the picture?")
    places = [0, 15]
    ours = operations(lambda: readings_of(tiny, prompt, places, Protocol(question=prompt.question, articles=())))
    bare, full = (operations(lambda way=way: one_by_one(tiny, prompt, places, way)) for way in (False, True))
    assert 0 < ours < bare < full


def test_operations_are_two_for_each_number_that_a_product_multiplies():
    assert operations(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 2 * 3 * 5 * 7
