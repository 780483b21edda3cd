"""What is answered about one patch: every outcome of the rules for E46 and E47, and tables of the same numbers."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest

from embedlens import claims
from embedlens.chapters import one_patch
from embedlens.samples import patchbench
from embedlens.samples.patchbench import AXES, OBJECT
from embedlens.trajectories import canvas_of

matplotlib.use("Agg")
HOLDS, PARTLY, FAILS, UNTESTABLE = claims.HOLDS, claims.PARTLY, claims.FAILS, claims.UNTESTABLE


@pytest.mark.parametrize(
    ("named", "named_low", "low", "high", "verdict"),
    [
        (9, 0.2, 0.6, 0.9, HOLDS),
        (9, 0.2, 0.2, 0.6, PARTLY),  # the interval reaches one half
        (9, 0.2, 0.2, 0.4, PARTLY),  # above habit
        (9, 0.2, 0.05, 0.4, FAILS),
        (4, 0.2, 0.6, 0.9, UNTESTABLE),  # too few
        (9, 0.03, 0.6, 0.9, UNTESTABLE),  # no more than by habit
    ],
)
def test_colour_and_count_come_with_a_recognised_object_or_do_not(named, named_low, low, high, verdict):
    assert one_patch.together_verdict(named, named_low, 0.03, low, high, habit_high=0.1) == verdict


@pytest.mark.parametrize(
    ("low", "high", "beyond", "verdict"),
    [
        (0.1, 0.3, (0.1, -0.1), HOLDS),
        (-0.1, 0.3, (0.1, 0.1), PARTLY),
        (-0.3, 0.0, (-0.1, 0.1), FAILS),
        (0.1, 0.3, (0.0, 0.0), UNTESTABLE),
    ],
)
def test_pieces_are_judged_where_one_half_is_read(low, high, beyond, verdict):
    assert one_patch.pieces_verdict(low, high, beyond) == verdict


@pytest.fixture(scope="module")
def drawn(tiny):
    side, patch = canvas_of(tiny)
    return patchbench.pictures(14, side=side, patch=patch)


@pytest.fixture(scope="module")
def said(tiny, drawn):
    return one_patch.ask_all(tiny, drawn[:14], drawn)


def test_rates_are_shares_of_the_rows_of_each_cell(said, drawn):
    found = one_patch.rates(said)
    for name, answers in said.items():
        for group, axis in one_patch.CELLS:
            rows = answers[(answers.group == group) & (answers.axis == axis)]
            assert float(found[name][group, axis].value) == rows.correct.mean()
    assert one_patch.rates_table(found).shape == (9, 3)
    assert len(one_patch.rates_numbers(found)) == 27 and len(one_patch.rates_told(found)) == 10
    assert "cells" in one_patch.rates_figure(found, 14, "miniature").axes[0].get_title()
    assert len(one_patch.examples_figure(drawn, said["70"], "miniature").axes) == 6


def test_objects_are_paired_picture_by_picture(said, drawn):
    found = one_patch.together(said)
    objects = [picture.id for picture in drawn if picture.group == OBJECT]
    right = said["larger"].set_index(["id", "axis"]).correct
    assert found.named.tolist() == [right[i, AXES[0]] for i in objects]
    assert found.both.tolist() == [right[i, AXES[1]] and right[i, AXES[2]] for i in objects]
    table = one_patch.copies_table(said, drawn)
    assert table["count", "size"].sum() == len(objects)


def made(named, both):
    named, both = np.array(named, bool), np.array(both, bool)
    return one_patch.Together(named, both, both, np.zeros(len(named), bool), np.zeros(len(named), bool))


def test_a_finding_counts_the_recognised_and_says_when_they_are_too_few():
    many = made([1] * 30 + [0] * 10, [1] * 28 + [0] * 12)
    found = many.finding()
    assert (found.verdict, found.n, round(found.value, 3)) == (HOLDS, 30, round(28 / 30, 3))
    assert many.told()["n_both"] == 28 and many.told()["apart"] == pytest.approx((28 / 30) ** 2)
    few = made([1] * 3 + [0] * 37, [1] * 40)
    assert (few.finding().verdict, few.finding().n) == (UNTESTABLE, 40) and "too few" in few.finding().note
    assert made([0] * 4, [0] * 4).told()["apart"] == 0.0


def test_rungs_of_the_ladder_differ_in_what_they_say(tiny, drawn, said):
    named = one_patch.together(said).named
    climbed = one_patch.ladder(tiny, drawn, named, n=3)
    assert list(climbed) == ["own colours, one", "own colours, one to four", "tinted, one", "tinted, one to four"]
    assert float(climbed["tinted, one to four"].value) == named[:3].mean()
    assert one_patch.ladder_figure(climbed, 0.1, 3, "miniature").axes[0].get_xlabel() == "objects named rightly"


def halves(own, other, n=40):
    arrays = [{half: np.r_[np.ones(k), np.zeros(n - k)] for half, k in part.items()} for part in (own, other)]
    return one_patch.Halves(dict.fromkeys(own, 9), *arrays, n, seed=0)


def test_the_lead_takes_each_halfs_own_control_off():
    found = halves({"one piece": 30, "several pieces": 10}, {"one piece": 10, "several pieces": 10})
    assert float(found.lead.value) == pytest.approx(20 / 40)
    assert found.finding().verdict == HOLDS and found.told()["pieces_lead"].startswith("0.500 (")
    unread = halves({"one piece": 0, "several pieces": 0}, {"one piece": 0, "several pieces": 0})
    assert unread.finding().verdict == UNTESTABLE and unread.told()["pieces_lead"] == "not measured"
    alone = halves({"several pieces": 30}, {"several pieces": 0})
    assert alone.lead is None and "several pieces only" in alone.finding().note
    for shown in (found, alone):
        assert one_patch.halves_figure(shown, "miniature").axes[0].get_title().startswith("Two capitals read: ")


def test_halves_are_asked_with_strings_of_their_kind(tiny, drawn):
    found = one_patch.halves(tiny, drawn, n=4)
    texts = patchbench.strings(tiny.tokenizer)
    assert set(found.own) == {kind for kind, some in texts.items() if some}
    assert found.strings == {kind: len(some) for kind, some in texts.items()} and found.n == 4
    assert all(len(part) == 4 for part in found.own.values())


def test_splits_count_every_string_once(tiny, said, drawn):
    table = one_patch.splits_table(tiny.tokenizer, said, drawn)
    assert table.strings.sum() == sum(bool(picture.text) for picture in drawn)


def test_the_content_is_outlined_where_it_lies(tiny, drawn):
    picture = one_patch.firsts_of(drawn)[2]
    title = one_patch.words_figure(tiny, picture).texts[0].get_text()
    assert title.startswith(f"The patch with the {picture.ink} {picture.text} on {picture.ground}: ")
