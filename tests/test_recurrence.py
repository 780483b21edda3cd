"""Clusters that come back: every outcome of the rules for E05 to E09, and summaries against the study itself."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest

from embedlens import claims, samples
from embedlens.chapters import recurrence
from embedlens.clusters import cluster_study, jaccard, picture_pairs

matplotlib.use("Agg")
HOLDS, PARTLY, FAILS, UNTESTABLE = claims.HOLDS, claims.PARTLY, claims.FAILS, claims.UNTESTABLE


@pytest.mark.parametrize(
    ("lows", "verdict"), [((0.6, 0.6, 0.6), HOLDS), ((0.4, 0.6, 0.4), PARTLY), ((0.5, 0.5, 0.5), FAILS)]
)
def test_larger_than_all_others_means_a_share_above_one_half(lows, verdict):
    assert recurrence.dominance_verdict(np.array(lows)) == verdict


@pytest.mark.parametrize(
    ("low", "variance", "lead", "verdict"),
    [
        (0.99, 1e-5, 0.01, HOLDS),
        (0.99, 1e-5, 0.0, PARTLY),  # random sets are as alike
        (0.99, 1e-3, 0.01, PARTLY),
        (0.97, 1e-5, 0.01, PARTLY),
        (0.97, 1e-3, 0.01, FAILS),
    ],
)
def test_c0_is_alike_and_more_so_than_random_sets(low, variance, lead, verdict):
    assert recurrence.c0_verdict(low, variance, lead) == verdict


@pytest.mark.parametrize(
    ("value", "low", "lead", "verdict"),
    [
        (0.995, 0.993, 0.1, HOLDS),
        (0.995, 0.98, 0.1, PARTLY),
        (0.995, 0.993, 0.0, PARTLY),
        (0.96, 0.95, 0.1, PARTLY),
        (0.95, 0.94, 0.1, FAILS),
    ],
)
def test_the_most_alike_rank_is_near_one_beyond_chance(value, low, lead, verdict):
    assert recurrence.most_alike_verdict(value, low, lead) == verdict


@pytest.mark.parametrize(("consistent", "verdict"), [(3, HOLDS), (2, HOLDS), (1, PARTLY), (0, FAILS)])
def test_several_smaller_clusters_are_at_least_two(consistent, verdict):
    assert recurrence.smaller_verdict(consistent) == verdict


@pytest.mark.parametrize(("lows", "verdict"), [((0.95, 0.91), HOLDS), ((0.95, 0.9), PARTLY), ((0.9, 0.5), FAILS)])
def test_the_same_pattern_means_the_same_tokens_at_both_thresholds(lows, verdict):
    assert recurrence.threshold_verdict(lows) == verdict


@pytest.fixture(scope="module")
def studies(tiny):
    pictures = samples.load("miniworld", n=6, seed=0)
    found = cluster_study(tiny, pictures, thresholds=(0.95, 0.9, 0.8))
    return found | cluster_study(tiny, pictures, orders=("raster",))


@pytest.fixture(scope="module")
def study(studies):
    return studies[0.9, "greedy"]


@pytest.fixture(scope="module")
def ranks(study):
    return int((study.sizes > 0).any(0).sum())


def test_shares_and_dominance_are_means_of_the_study(study, ranks):
    found = recurrence.dominance(study, ranks)
    assert found.shares.value == pytest.approx(study.shares[:, :ranks].mean(0))
    assert found.finding().value == pytest.approx(study.dominance[:, 0].mean())
    assert len(found.table()) == 3 and len(found.numbers()) == ranks
    assert recurrence.shares_figure(found, "miniature").axes[0].get_title().endswith("of the visual tokens")


def test_the_lead_is_what_clustering_adds_to_random_sets(study, ranks):
    pairs = picture_pairs(len(study))
    found = recurrence.alike(study, pairs, ranks)
    own, null = (study.similarity(pairs, null=random)[:, :ranks] for random in (False, True))
    assert found.raw.value == pytest.approx(np.nanmean(own, 0), abs=1e-6)
    assert found.lead.value == pytest.approx(np.nanmean(own - null, 0), abs=1e-6)
    assert found.variance == pytest.approx(np.nanvar(own[:, 0]))
    assert set(found.findings()) == {"E06", "E07", "E08"}
    assert found.findings()["E06"].value == pytest.approx(found.raw.value.max())
    assert len(recurrence.alike_figure(found, "miniature").axes) == 2 and len(found.table()) == ranks


def test_no_second_cluster_is_no_verdict_on_smaller_ones(study):
    pairs = picture_pairs(len(study))
    found = recurrence.alike(study, pairs, ranks=1)
    assert found.smaller is None and found.findings()["E08"].verdict == UNTESTABLE


def test_overlaps_are_those_of_the_largest_clusters(studies, study):
    found = recurrence.thresholds(studies)
    for key, overlap in found.overlaps.items():
        wanted = [jaccard(*two) for two in zip(study.largest, studies[key].largest, strict=True)]
        assert float(overlap.value) == pytest.approx(np.mean(wanted))
    assert found.finding().value == min(float(overlap.value) for overlap in found.of_thresholds)
    assert set(found.told()) == {"overlap_95", "overlap_80", "overlap_raster"}
    assert len(recurrence.thresholds_table(studies, picture_pairs(len(study)))) == len(studies)
    figure = recurrence.thresholds_figure(found, "miniature")
    assert len(figure.axes) == 2
    assert figure.get_suptitle().endswith(f" is {found.finding().value:.0%}")  # rounded as the bar is, not cut off


def test_framing_tells_bars_from_clusters(study):
    found = recurrence.framing({"letterbox": study, "centre-crop": study, "stretch": study})
    assert float(found.change["stretch"].value) == 0.0
    barred = study.bars > 0
    held = study.in_bars[barred, 0] * study.sizes[barred, 0] / (study.bars * study.tokens)[barred]
    assert (found.caught is None) == (not barred.any())
    assert found.caught is None or float(found.caught.value) == pytest.approx(held.mean())
    assert (found.square is None) == barred.all()
    assert set(found.numbers()) >= {"c0_share_letterbox", "c0_in_bars", "bars"}
    assert recurrence.framing_figure(found, "miniature").axes[0].get_title().endswith("of C0 lies in bars")
