"""The benchmark of the token scores compares like with like."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from benchmarks.redundancy import BARE, FULL, OURS, lines, one_by_one
from embedlens import samples
from embedlens.redundancy import Protocol, readings_of


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
    found = {"tokens": 2, "readings": 9, "ways": {name: {"ratio": ratio} for name in (OURS, BARE, FULL)}}
    assert [row[0].split(", ", 2)[2] for row in lines(found)] == [OURS, BARE, FULL]
