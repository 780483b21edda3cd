"""Promises of the token scores: each picture by its own scores, thirds by every score, pairs counted as they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from embedlens import samples
from embedlens.codebook import AS_SHARES, Recipe
from embedlens.errors import EmbedLensError
from embedlens.measures import scores
from embedlens.readings import Protocol
from embedlens.redundancy import token_scores


@pytest.fixture(scope="module")
def pictures():
    return samples.load("miniworld", n=3)


@pytest.fixture(scope="module")
def found(tiny, pictures):
    return scores.scored(tiny, pictures, Protocol(question="what is in the picture?"))


def made_up(*of_pictures: tuple[list[float], list[float]], **columns: list[float]) -> pd.DataFrame:
    """A table with an attention and a probability for every token of some pictures; no CLS unless given."""
    parts = []
    for picture, (attention, probability) in enumerate(of_pictures):
        parts.append(pd.DataFrame({"id": picture, "attention": attention, "probability": probability}))
    table = pd.concat(parts, ignore_index=True).assign(similarity=np.nan)
    return table.assign(divergence=table["probability"], patch=table.groupby("id").cumcount(), **columns)


def test_every_token_has_a_row_with_what_is_read_of_it(tiny, found, pictures):
    again = token_scores(tiny, found.prompts[:1], None, found.protocol)[0]
    own = found.table[found.table["id"] == pictures[0].id]
    assert own["patch"].tolist() == list(range(16))
    assert np.allclose(own["probability"], again.probability, atol=1e-5)
    assert np.allclose(own["divergence"], again.cascade(), atol=1e-5)
    assert scores.orders_in(found.table) == ["similarity", "attention"]
    with pytest.raises(EmbedLensError, match="at least two"):
        scores.scored(tiny, pictures[:1])


def test_each_picture_is_sorted_by_its_own_score_and_as_released_by_the_running_sum():
    table = made_up(([3.0, 2, 1], [10.0, 20, 30]), ([1.0, 2, 9], [40.0, 50, 60]))
    assert scores.by_rank(table, "attention")["probability"].tolist() == [10, 20, 30, 60, 50, 40]
    # at the second picture the sums are 4, 4, 10
    assert scores.by_rank(table, "attention", cumulative=True)["probability"].tolist() == [10, 20, 30, 60, 40, 50]


def test_pictures_of_different_numbers_of_tokens_are_read_equally_far_along_and_not_summed():
    table = made_up(([3.0, 2, 1], [10.0, 20, 30]), ([1.0, 2, 9, 4, 5], [40.0, 50, 60, 70, 80]))
    # the second picture in order: 60, 80, 70, 50, 40; first, middle and last of it
    assert scores.by_rank(table, "attention")["probability"].tolist() == [10, 20, 30, 60, 70, 40]
    with pytest.raises(EmbedLensError, match="do not sum: leave it out"):
        scores.by_rank(table, "attention", cumulative=True)


def test_low_and_high_are_thirds_by_every_score():
    rising = [float(i) for i in range(16)]
    alone = scores.extremes(made_up((rising, rising)))
    assert alone["low"].tolist() == [i < 16 / 3 for i in range(16)]
    assert alone["high"].tolist() == [i > 15 - 16 / 3 for i in range(16)]
    opposed = scores.extremes(made_up((rising, rising), similarity=rising[::-1]))
    assert not opposed["low"].any() and not opposed["high"].any()  # opposed scores leave nobody


def test_a_trend_is_spearmans_of_each_picture_and_none_where_nothing_varies():
    table = made_up(([1.0, 2, 3], [1.0, 9, 8]), ([1.0, 2, 3], [5.0, 5, 5]))
    rows = scores.trends(table)
    assert rows["id"].tolist() == [0, 0] and set(rows["score"]) == {"attention"}  # a tower without CLS has one order
    assert rows["rho"].tolist() == pytest.approx([0.5, 0.5])


def test_pairs_count_where_the_token_that_is_lower_by_every_score_matters_more():
    rising, falling = [1.0, 2, 3, 4], [4.0, 3, 2, 1]
    assert scores.larger_below(made_up((rising, falling)))[["hits", "asked"]].values.tolist() == [[6, 6]]
    assert scores.larger_below(made_up((rising, rising)))[["hits", "asked"]].values.tolist() == [[0, 6]]
    assert scores.larger_below(made_up((rising, rising), similarity=falling)).empty


def test_what_a_token_adds_is_its_words_logit_with_it_less_without(tiny, found, pictures):
    from embedlens.redundancy import readings_of

    one = (found.table["id"] == pictures[1].id) & (found.table["patch"] == 5)
    rows = scores.raised(tiny, found, one)
    read = readings_of(tiny, found.prompts[1], torch.tensor([5]), found.protocol)
    word = int(found.table[one]["word"].iloc[0])
    assert rows["id"].tolist() == [pictures[1].id]
    assert rows["region"].iloc[0] == pytest.approx(float(read.region[0, word] - read.region_without[0, word]))
    assert scores.raised(tiny, found, found.table["patch"] > 99).empty


def test_only_low_tokens_are_read_where_only_these_are_wanted(tiny, found, pictures):
    few = scores.scored(tiny, pictures, found.protocol, low_only=True)
    low = found.table[found.table["low"]]
    assert few.table[["id", "patch"]].values.tolist() == low[["id", "patch"]].values.tolist()
    assert np.allclose(few.table["probability"], low["probability"], atol=1e-5)
    assert [sample.id for sample in few.samples] == list(dict.fromkeys(low["id"]))


def test_pictures_without_a_prototype_give_no_codebook_and_say_why(tiny, found):
    with pytest.warns(UserWarning, match="these 3 pictures give no codebook: .*raise it"):
        assert found.codebook(tiny, replace(AS_SHARES, most_in_picture=0)) is None
    book, stages = found.codebook(tiny, Recipe(more_pictures=0, most_in_picture=1.0))
    assert len(book) == stages.codebook and book.model == tiny.name
    assert set(book.image_ids.tolist()) <= {sample.id for sample in found.samples}
