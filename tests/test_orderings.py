"""Promises of the orderings: each picture by its own scores, rank correlations, verdicts by rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedlens import samples
from embedlens.chapters import orderings
from embedlens.errors import EmbedLensError
from embedlens.groups import discover
from embedlens.intervals import Interval
from embedlens.redundancy import Protocol, token_scores


@pytest.fixture(scope="module")
def pictures():
    return samples.load("miniworld", n=4, split="train")


@pytest.fixture(scope="module")
def found(tiny, pictures):
    return orderings.study(tiny, pictures, Protocol(question="what is in the picture?"), discover(tiny, pictures))


def with_values(found, probability, attention=None, similarity=None, named=None):
    """The same study with made-up numbers."""
    scores = [
        replace(score, probability=torch.as_tensor(p, dtype=torch.float32))
        for score, p in zip(found.scores, probability, strict=True)
    ]
    none = [np.zeros(len(p), dtype=bool) for p in probability]
    return replace(
        found, scores=scores, attention=attention or found.attention, similarity=similarity or found.similarity,
        named=named or none, misnamed=none,
    )  # fmt: skip


# --- statistics ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=20))
def test_rank_correlation_is_spearmans(pairs):
    from scipy.stats import spearmanr

    a, b = (np.array(part, dtype=float) for part in zip(*pairs, strict=True))
    rho = orderings.rank_correlation(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert np.isnan(rho)
    else:
        assert rho == pytest.approx(spearmanr(a, b).statistic)


def test_each_picture_is_sorted_by_its_own_score_and_as_released_by_the_running_sum():
    order = [np.array([3.0, 2, 1]), np.array([1.0, 2, 9])]
    values = [np.array([10.0, 20, 30]), np.array([40.0, 50, 60])]
    assert orderings.by_rank(order, values).tolist() == [[10, 20, 30], [60, 50, 40]]
    # at the second picture the sums are 4, 4, 10
    assert orderings.by_rank(order, values, cumulative=True).tolist() == [[10, 20, 30], [60, 40, 50]]
    with pytest.raises(EmbedLensError, match="pass one of each per token"):
        orderings.by_rank(order, [np.zeros(2), np.zeros(3)])


def test_pictures_of_different_numbers_of_tokens_are_read_equally_far_along_and_not_summed():
    order = [np.array([3.0, 2, 1]), np.array([1.0, 2, 9, 4, 5])]
    values = [np.array([10.0, 20, 30]), np.array([40.0, 50, 60, 70, 80])]
    # the second picture in order: 60, 80, 70, 50, 40; first, middle and last of it
    assert orderings.by_rank(order, values).tolist() == [[10, 20, 30], [60, 70, 40]]
    with pytest.raises(EmbedLensError, match="do not sum: leave it out"):
        orderings.by_rank(order, values, cumulative=True)


def test_low_and_high_are_thirds_by_every_score(found):
    n = len(found.scores[0].places)
    made = replace(found, attention=[np.arange(float(n))] * 4, similarity=[np.arange(float(n))[::-1]] * 4)
    assert not any(mask.any() for mask in made.extreme(high=True))  # opposed scores leave nobody
    same = replace(found, attention=[np.arange(float(n))] * 4, similarity=[np.arange(float(n)) * 2.0] * 4)
    assert same.extreme(high=False)[0].tolist() == (np.arange(float(n)) < n / 3).tolist()
    assert same.extreme(high=True)[0].tolist() == (np.arange(float(n)) > n - 1 - n / 3).tolist()


def test_pairs_count_where_the_lower_one_matters_more(found):
    m = 16
    d = torch.arange(16.0).flip(0) / 10
    scores = [replace(s, region=d[:, None].expand(m, 2), picture=torch.zeros(m, 2)) for s in found.scores]
    made = replace(found, scores=scores, attention=[np.arange(16.0)] * 4, similarity=[np.arange(16.0)] * 4)
    assert float(orderings.larger_below(made).value) == 1
    made = replace(made, attention=[-np.arange(16.0)] * 4, similarity=[-np.arange(16.0)] * 4)
    assert float(orderings.larger_below(made).value) == 0
    opposed = replace(made, similarity=[np.arange(16.0)] * 4)
    assert np.isnan(orderings.larger_below(opposed).value)


# --- what is measured ------------------------------------------------------------------------------------------------


def test_a_study_has_the_scores_of_its_tokens(tiny, found, pictures):
    again = token_scores(tiny, found.prompts[:1], None, found.protocol)[0]
    assert torch.equal(found.scores[0].places, torch.arange(16))
    assert torch.allclose(found.scores[0].probability, again.probability, atol=1e-5)
    assert len(found.samples) == 4 and all(len(part) == 16 for part in (*found.attention, *found.similarity))
    with pytest.raises(EmbedLensError, match="at least two"):
        orderings.study(tiny, pictures[:1])
    with pytest.raises(EmbedLensError, match="unknown value"):
        found.values("D")


def test_a_tower_without_cls_leaves_one_order(found):
    bare = replace(found, similarity=None)
    assert list(bare.orders) == ["attention"]
    assert set(orderings.trends(bare)) == {("attention", "probability"), ("attention", "divergence")}
    assert orderings.told(bare)["rho_similarity_probability"] == "not measurable (no CLS)"


# --- verdicts --------------------------------------------------------------------------------------------------------

RAISED = tuple(Interval(*(np.array(v) for v in (1.0, 0.5, 1.5))) for _ in range(2))


def test_the_trend_claims_hold_only_without_a_trend(tiny, found):
    falling = [np.linspace(1, 0, 16)] * 4
    made = with_values(found, falling, attention=[np.linspace(5, 1, 16)] * 4, similarity=[np.linspace(1, 5, 16)] * 4)
    assert orderings.findings(tiny, made, raised=RAISED)["R08"].verdict == "partly"
    made = replace(made, similarity=made.attention)
    assert orderings.findings(tiny, made, raised=RAISED)["R08"].verdict == "does not hold"
    made = replace(made, similarity=[-part for part in made.attention], attention=[-part for part in made.attention])
    assert orderings.findings(tiny, made, raised=RAISED)["R08"].verdict == "holds"


def test_low_tokens_must_say_their_object_more_often_than_another_pictures_words(tiny, found, monkeypatch):
    low_first = [np.arange(16.0)] * 4
    sure = [np.where(np.arange(16) < 3, 0.9, 0.05)] * 4
    named = [np.arange(16) < 3] * 4
    made = with_values(found, sure, low_first, low_first, named)
    verdicts = orderings.findings(tiny, made, raised=RAISED)
    assert verdicts["R03"].verdict == "holds" and verdicts["R04"].verdict == "holds"
    assert orderings.findings(tiny, replace(made, misnamed=named), raised=RAISED)["R03"].verdict == "partly"
    unnamed = with_values(found, sure, low_first, low_first)
    none = orderings.findings(tiny, unnamed, raised=RAISED)["R03"]
    assert none.verdict == "partly" and none.value == 0 and none.high > 0.3  # four pictures rule out little
    monkeypatch.setattr(orderings, "SOME", 0.7)
    assert orderings.findings(tiny, unnamed, raised=RAISED)["R03"].verdict == "does not hold"
    monkeypatch.undo()
    opposed = with_values(found, sure, low_first, [-part for part in low_first], named)
    assert orderings.findings(tiny, opposed, raised=RAISED)["R03"].verdict == "not testable here"


def test_raised_logits_are_nan_where_nothing_is_named(tiny, found):
    made = with_values(found, [np.full(16, 0.9)] * 4)
    assert all(np.isnan(part.value) for part in orderings.raised_logits(tiny, made))
    verdicts = orderings.findings(tiny, made)
    assert verdicts["R06"].verdict == verdicts["R07"].verdict == "not testable here"
    made = with_values(found, [np.full(16, 0.9)] * 4, named=[np.arange(16) < 2] * 4)
    assert all(np.isfinite(part.value) for part in orderings.raised_logits(tiny, made))


def test_figures_draw_and_say_what_is_there(tiny, found):
    from matplotlib import pyplot as plt

    for figure in (
        orderings.words_figure(tiny, found, 0),
        orderings.shifts_figure(tiny, found, 0),
        orderings.orders_figure(found),
        orderings.orders_figure(replace(found, similarity=None)),
    ):
        figure.canvas.draw()
        plt.close(figure)
    low, high = orderings.two_patches(found, 0)
    assert low != high and not found.prompts[0].grid.padded[found.scores[0].places[high]]
