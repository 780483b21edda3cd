"""Intervals over pictures: against scipy, against a plain loop, and how often they cover the truth."""

import numpy as np
import pytest

from embedlens.errors import EmbedLensError
from embedlens.intervals import Interval, mean_interval, pair_interval, ratio_interval


def test_the_interval_of_a_ratio_agrees_with_scipy():
    from scipy.stats import bootstrap

    rng = np.random.default_rng(3)
    asked = rng.integers(1, 5, 300).astype(float)
    hit = rng.binomial(asked.astype(int), 0.4).astype(float)

    def ratio(hit, asked, axis):
        return hit.sum(axis) / asked.sum(axis)

    theirs = bootstrap((hit, asked), ratio, paired=True, method="percentile", n_resamples=4000, rng=0)
    ours = ratio_interval(hit, asked, resamples=4000)
    assert [float(ours.low), float(ours.high)] == pytest.approx(list(theirs.confidence_interval), abs=0.004)


def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        asked = rng.integers(1, 4, 120)
        interval = ratio_interval(rng.binomial(asked, 0.4), asked, resamples=300, seed=seed)
        covered += interval.low <= 0.4 <= interval.high
    assert 180 <= covered <= 199  # 190 expected; 5 standard errors of 3 below would be 175, never 200


def test_a_ratio_of_nothing_is_refused():
    with pytest.raises(EmbedLensError, match="no picture has a label"):
        ratio_interval(np.zeros(3), np.zeros(3))


def test_the_interval_of_a_mean_agrees_with_scipy():
    from scipy.stats import bootstrap

    values = np.random.default_rng(0).gamma(2.0, size=200)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    ours = mean_interval(values, resamples=4000)
    assert float(ours.value) == pytest.approx(values.mean())
    assert [float(ours.low), float(ours.high)] == pytest.approx(list(theirs), abs=0.01)  # 0.1 is one standard error
    wider = mean_interval(values, level=0.99, resamples=4000)
    assert wider.low < ours.low < ours.high < wider.high


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.normal(2, 1, 100), resamples=300, seed=seed) for seed in range(200)]
    covered = sum(bool(found.low <= 2 <= found.high) for found in intervals)
    assert 178 <= covered <= 199  # 190 expected, 4 standard errors of 3; never 200


@pytest.mark.parametrize("seed", range(5))
def test_pictures_without_a_value_are_left_out_of_their_column_only(seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(40, 3, 2))
    values[rng.random(values.shape) < 0.3] = np.nan
    found = mean_interval(values, resamples=500, seed=seed)
    assert found.value == pytest.approx(np.nanmean(values, axis=0))
    # the same resamples, one picture after the other
    times = np.random.default_rng(seed).multinomial(40, np.full(40, 1 / 40), size=500)
    means = [np.nanmean(np.repeat(values[:, 1, 0], row)) for row in times]
    assert [float(found.low[1, 0]), float(found.high[1, 0])] == pytest.approx(np.quantile(means, [0.025, 0.975]))


def test_one_picture_with_a_value_among_many_is_still_an_interval():
    values = np.full((30, 1), np.nan)
    values[3] = 5.0
    assert [float(part[0]) for part in mean_interval(values, resamples=100)] == [5, 5, 5]


@pytest.mark.parametrize("values", [np.full((3, 2), np.nan), np.array([[1.0, np.nan]] * 3), np.zeros((0, 2))])
def test_a_mean_of_nothing_is_refused(values):
    with pytest.raises(EmbedLensError, match="no picture has a value"):
        mean_interval(values)


def test_an_interval_of_pairs_covers_the_truth_where_drawing_pairs_would_not():
    n = 30
    pairs = np.array([(i, j) for i in range(n) for j in range(n) if i != j])
    rng = np.random.default_rng(0)
    covered = naive = 0
    for seed in range(60):
        of_picture = rng.normal(2, 1, n)
        values = of_picture[pairs].mean(1)  # the truth is 2; only the 30 pictures vary
        found, drawn = (pair_interval(values, pairs, resamples=200, seed=seed), mean_interval(values, resamples=200))
        covered += bool(found.low <= 2 <= found.high)
        naive += bool(drawn.low <= 2 <= drawn.high)
    assert covered >= 51 > naive  # 57 expected; 51 is 3.5 standard errors below


def test_pairs_without_a_value_are_left_out_and_a_mean_of_none_is_refused():
    pairs = np.array([[0, 1], [1, 2], [2, 0]])
    values = np.array([[1.0, np.nan], [3.0, 5.0], [np.nan, 5.0]])
    assert pair_interval(values, pairs, resamples=50).value.tolist() == [2, 5]
    with pytest.raises(EmbedLensError, match="no pair has a value"):
        pair_interval(np.full((3, 1), np.nan), pairs)


def test_the_same_seed_gives_the_same_interval_and_differences_are_paired():
    values = np.random.default_rng(0).normal(size=50)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)
    shifted = mean_interval((values + 3) - values)
    assert float(shifted.high - shifted.low) == pytest.approx(0, abs=1e-12)


def test_an_interval_as_text_has_no_negative_zero():
    assert Interval(np.array(-0.001), np.array(-0.2), np.array(0.1)).texts(1) == ["0.0 (-0.2 to 0.1)"]


def test_what_adds_up_to_a_bar_is_on_it_in_whatever_order_a_processor_adds():
    tenths = np.repeat([0.1, 0.2, -0.3], 20)
    same = np.full(60, 0.1)
    for values in (tenths, tenths[::-1], np.sort(tenths)):
        assert float(mean_interval(values).value) == 0.0
        assert float(ratio_interval(values, np.ones(60)).value) == 0.0
    pairs = np.array([[0, 1], [1, 2], [2, 0]])
    for found in (mean_interval(same), ratio_interval(same, np.ones(60)), pair_interval(same[:3], pairs)):
        assert [float(part) for part in found] == [0.1, 0.1, 0.1]
