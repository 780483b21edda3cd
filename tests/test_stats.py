"""Estimates over pictures: against scipy, against a plain loop, how often they cover the truth, three values."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap

from embedlens import stats
from embedlens.errors import EmbedLensError
from embedlens.stats import Estimate


def ratio(hit, asked, axis):
    return hit.sum(axis) / asked.sum(axis)


def test_a_ratio_of_sums_agrees_with_scipy():
    rng = np.random.default_rng(3)
    asked = rng.integers(1, 5, 300)
    table = pd.DataFrame({"id": range(300), "hits": rng.binomial(asked, 0.4), "asked": asked})
    ours = stats.estimate(stats.drawn(table, "hits", over="asked", resamples=4000))
    theirs = bootstrap(
        (table.hits.to_numpy(float), asked), ratio, paired=True, method="percentile", n_resamples=4000, rng=0
    ).confidence_interval
    assert ours.value == pytest.approx(table.hits.sum() / asked.sum()) and ours.n == 300
    assert [ours.low, ours.high] == pytest.approx(list(theirs), abs=0.004)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for seed in range(200):
        asked = rng.integers(1, 4, 120)
        table = pd.DataFrame({"id": range(120), "hits": rng.binomial(asked, 0.4), "asked": asked})
        found = stats.estimate(stats.drawn(table, "hits", over="asked", resamples=300, seed=seed))
        covered += found.low <= 0.4 <= found.high
    assert 180 <= covered <= 199  # 190 expected; 5 standard errors of 3 below would be 175, never 200


def test_pairs_of_pictures_are_drawn_by_picture_and_cover_the_truth_where_drawing_pairs_would_not():
    n, rng, covered, naive = 30, np.random.default_rng(0), 0, 0
    pairs = np.array([(i, j) for i in range(n) for j in range(n) if i != j])
    for seed in range(60):
        values = pd.DataFrame({"of": rng.normal(2, 1, n)[pairs].mean(1)})  # the truth is 2; only the 30 pictures vary
        found = stats.estimate(stats.drawn_pairs(values, pairs, resamples=200, seed=seed))
        alone = stats.estimate(stats.drawn(values.assign(id=range(len(pairs))), "of", resamples=200))
        covered, naive = covered + (found.low <= 2 <= found.high), naive + (alone.low <= 2 <= alone.high)
    assert covered >= 51 > naive  # 57 expected; 51 is 3.5 standard errors below
    some = pd.DataFrame({0: [1.0, 3.0, math.nan], 1: [math.nan, 5.0, 5.0]})
    assert stats.drawn_pairs(some, np.array([[0, 1], [1, 2], [2, 0]])).loc[0].tolist() == [2, 5]


def test_what_adds_up_to_a_bar_is_on_it_in_whatever_order_a_processor_adds():
    tenths = np.repeat([0.1, 0.2, -0.3], 20)
    for values in (tenths, tenths[::-1], np.sort(tenths)):
        assert stats.estimate(stats.drawn(pd.DataFrame({"id": range(60), "of": values}), "of")).value == 0.0


def test_cells_are_paired_and_a_picture_without_a_row_is_drawn_all_the_same():
    rng = np.random.default_rng(1)
    base = rng.normal(size=50)
    table = pd.DataFrame(
        [{"id": i, "arm": arm, "value": base[i] + shift} for i in range(50) for arm, shift in (("a", 0.0), ("b", 0.1))]
    )
    found = stats.drawn(table, "value", by="arm")
    gap = stats.estimate(found["b"] - found["a"])
    assert (gap.low, gap.high) == pytest.approx((0.1, 0.1))
    fewer = stats.drawn(table.drop(table.index[1]), "value", by="arm")  # picture 0 has no b
    times = stats.draws(50, seed=0)
    assert fewer["a"].to_numpy() == pytest.approx(found["a"].to_numpy())
    assert fewer["b"].iloc[1:].to_numpy() == pytest.approx(times[:, 1:] @ (base[1:] + 0.1) / times[:, 1:].sum(1))


def test_what_arithmetic_makes_of_resamples_keeps_how_many_pictures_it_rests_on():
    table = pd.DataFrame([(i, g, x, x * i + 1.0) for i in range(8) for g in "ab" for x in (0, 1)])
    table.columns = ["id", "group", "layer", "value"]
    found = stats.drawn(table, "value", by=["group", "layer"])
    assert stats.curve(found["a"] / found["b"])["n"].tolist() == [8, 8]
    assert stats.estimate(found["a"].max(axis=1)).n == 8


@pytest.mark.parametrize("low, high, bar, above", [(1, 3, 0, True), (1, 3, 3, False), (1, 3, 2, None), (1, 3, 1, None)])
def test_a_comparison_has_three_values(low, high, bar, above):
    found = Estimate(2, low, high, 9)
    assert (found > bar) is above
    mirrored = Estimate(-2, -high, -low, 9)
    assert (mirrored < -bar) is above
    with pytest.raises(EmbedLensError, match="difference"):
        found > mirrored  # noqa: B015


def test_no_number_prints_as_minus_zero():
    assert f"{Estimate(-0.0001, -0.0002, 0.0002, 9):.2f}" == "0.00 (0.00 to 0.00)"
    assert f"{Estimate(-0.0001, -0.02, 0.01, 9):.0%}" == "0 % (−2 to 1)"


def test_a_share_has_exact_bounds_also_where_no_picture_shows_it():
    from scipy.stats import beta

    for hits, asked in ((0, 10), (3, 10), (10, 10)):  # Clopper and Pearson's
        low = beta.ppf(0.025, hits, asked - hits + 1) if hits else 0.0
        high = beta.ppf(0.975, hits + 1, asked - hits) if hits < asked else 1.0
        found = stats.share(hits, asked)
        assert (found.low, found.high) == pytest.approx((low, high))
    table = pd.DataFrame({"id": range(20), "seen": 0.0})
    none = stats.at_least_seen(stats.estimate(stats.drawn(table, "seen")))
    assert (none.value, none.low) == (0, 0) and none.high == pytest.approx(stats.share(0, 20).high)
    some = Estimate(0.5, 0.4, 0.6, 20)
    assert stats.at_least_seen(some) is some


def test_a_groups_difference_is_of_pictures_that_have_both_and_of_no_picture_it_is_unknown():
    rows = pd.DataFrame(
        {"id": [0, 0, 1, 1, 2], "group": ["a", "b", "a", "b", "a"], "layer": 0, "norm": [3.0, 2.0, 9.0, 3.0, 100.0]}
    )
    found = stats.estimate(stats.of_group(rows, "norm", "a", minus="b")[0])
    assert (found.value, found.n) == (3.5, 3)  # the third picture is drawn, and says nothing
    assert stats.of_group(rows, "norm", "a", over="b")[0][0] == pytest.approx((1.5 + 3) / 2)
    assert stats.known(stats.of_group(rows, "norm", "c", minus="a")) == [None]
    assert stats.known(stats.of_group(rows, "norm", "a", minus="b")) == [found]
