"""Shares of grounded tokens against plain counting, and every outcome of the rules for E40 and E41."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest

from embedlens import claims
from embedlens.chapters import grounding
from embedlens.labels import LabelHits

matplotlib.use("Agg")


def hits(seed: int, n: int = 20, layers: int = 5) -> LabelHits:
    rng = np.random.default_rng(seed)
    objects = rng.integers(1, 9, n)
    return LabelHits(
        labels=("dog", "cat"),
        present=np.ones((n, 2), dtype=bool),
        retrieved=rng.random((layers, n, 2)) < 0.5,
        tokens=np.full(n, 16),
        object_tokens=objects,
        grounded=rng.integers(0, objects + 1, (layers, n)),
        label_tokens=np.array([30, 10]),
        retrieving=rng.integers(0, 9, (layers, 2)),
    )


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_those_of_plain_counting(seed):
    given = hits(seed)
    found = grounding.grounding(given, settled=2, seed=seed)
    by_layer = [given.grounded[at].sum() / given.object_tokens.sum() for at in range(5)]
    assert found.rate.value == pytest.approx(by_layer)
    assert float(found.plateau.value) == pytest.approx(np.mean(by_layer[2:]))
    assert float(found.rise.value) == pytest.approx(np.mean(by_layer[2:]) - by_layer[0])
    assert float(found.doubled.value) == pytest.approx(np.mean(by_layer[2:]) - 2 * by_layer[0])
    of_all = [given.grounded[at].sum() / given.tokens.sum() for at in range(5)]
    assert float(found.peak.value) == pytest.approx(max(of_all)) and found.top == int(np.argmax(of_all))
    assert found.accident == pytest.approx(given.token_chance()[found.top] * given.object_tokens.sum() / (16 * 20))


@pytest.mark.parametrize(
    ("rise", "doubled_low", "late", "plateau_low", "verdict"),
    [
        (0.08, 0.05, (0.10, 0.12), 0.09, claims.HOLDS),
        (0.08, -0.01, (0.10, 0.12), 0.09, claims.PARTLY),  # not twice the input
        (0.08, 0.05, (0.05, 0.12), 0.09, claims.PARTLY),  # does not stay
        (0.08, 0.05, (0.10, 0.12), 0.01, claims.PARTLY),  # no more than chance
        (0.00, 0.05, (0.10, 0.12), 0.09, claims.FAILS),
    ],
)
def test_the_share_must_rise_stay_and_beat_chance(rise, doubled_low, late, plateau_low, verdict):
    assert grounding.rise_verdict(rise, doubled_low, np.array(late), plateau_low, 0.02) == verdict


@pytest.mark.parametrize(
    ("low", "high", "share_low", "verdict"),
    [
        (0.05, 0.06, 0.05, claims.HOLDS),
        (0.05, 0.06, 0.01, claims.PARTLY),  # a lens that finds nothing
        (0.06, 0.08, 0.06, claims.PARTLY),
        (0.07, 0.08, 0.07, claims.FAILS),
    ],
)
def test_a_small_peak_counts_only_above_chance(low, high, share_low, verdict):
    assert grounding.peak_verdict(low, high, share_low, accident=0.02) == verdict


def test_findings_figure_and_table_are_of_the_same_numbers():
    given = hits(0)
    found = grounding.grounding(given, settled=2)
    findings = found.findings()
    assert findings["E40"].value == float(found.rise.value) and findings["E41"].value == float(found.peak.value)
    figure = grounding.grounding_figure(found, "miniature")
    assert figure.axes[0].get_title() == f"At most {found.rate.value.max():.0%} of the object tokens name their object"
    table = grounding.counting_table({("EmbedLens", 5, "strict"): given}, settled=2)
    assert table.loc[("strict", 5), "layers 2 to 4"] == found.plateau.texts(3)[0]
    assert set(found.told()) >= {"rate_first", "best_layer"} and found.numbers()["plateau"] == found.plateau.value
