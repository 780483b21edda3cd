"""Words on tokens beside words on directions without a picture: counts by hand."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest

from embedlens.chapters import hub_words
from embedlens.hubs import Hubness, hubs, skewness

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def found():
    rng = np.random.default_rng(0)

    def counts(weights, rows):
        return np.stack(
            [np.bincount(rng.choice(20, 200, p=weights / weights.sum()), minlength=20) for _ in range(rows)]
        )

    crowded, even = np.r_[np.ones(19), 60.0], np.ones(20)
    given = Hubness(counts(crowded, 6), counts(crowded, 3), counts(even, 3), k=5)
    return hub_words.hub_words(given, tuple(map(str, range(20))))


def test_shares_and_skewness_are_those_of_the_counts(found):
    given = found.counted
    assert float(found.skewed["visual tokens"].value) == pytest.approx(float(skewness(given.tokens.sum(0))))
    marked = hubs(given.matched.sum(0))
    assert found.matched_hubs.tolist() == marked.tolist() and marked[19]
    wanted = given.tokens[:, marked].sum() / given.tokens.sum()
    assert float(found.on_hubs["visual tokens"].value) == pytest.approx(wanted)
    assert found.half["visual tokens"] == 1 and found.half["random directions"] > 5


def test_the_table_lists_the_entries_that_tokens_name_most(found):
    table, counts = found.table(most=3), found.counted.tokens.sum(0)
    assert list(table.index) == [str(i) for i in np.argsort(-counts, kind="stable")[:3]]
    assert table.iloc[0]["visual tokens"] == pytest.approx(counts.max() * 5 / counts.sum(), abs=1e-3)
    assert table.iloc[0]["hub of matched directions"] == "yes"


def test_prose_record_and_figure_say_the_same(found):
    told = found.told()
    assert told["half_tokens"] == 1 and told["n_hubs"] == found.matched_hubs.sum()
    assert found.numbers()["skewness_of_visual_tokens"] == float(told["skew_tokens"].value)
    axes = hub_words.coverage_figure(found, 6, "miniature").axes[0]
    assert axes.get_title() == "1 of 20 entries give half of the answers on tokens"
    assert len(axes.get_lines()) == 4
