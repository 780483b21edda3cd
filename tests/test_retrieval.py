"""Two lenses against chance and each other: every outcome of the rules for E13 and E14, and summaries by hand."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest

from embedlens import EmbedLens, LogitLens, claims, samples
from embedlens.chapters import retrieval
from embedlens.intervals import Interval
from embedlens.labels import RULES, LabelHits, label_ids, largest_object

matplotlib.use("Agg")
HOLDS, PARTLY, FAILS, UNTESTABLE = claims.HOLDS, claims.PARTLY, claims.FAILS, claims.UNTESTABLE


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.3, 0.4, HOLDS), (0.1, 0.2, PARTLY), (-0.1, 0.3, PARTLY), (-0.1, 0.2, FAILS), (0.0, 0.25, FAILS)],
)
def test_a_substantial_portion_is_a_quarter_beyond_chance(low, high, verdict):
    assert retrieval.substantial_verdict(low, high) == verdict


@pytest.mark.parametrize(
    ("low", "high", "ahead", "verdict"),
    [(0.1, 0.2, 6, HOLDS), (0.1, 0.2, 5, PARTLY), (-0.1, 0.2, 6, PARTLY), (-0.2, 0.0, 0, FAILS)],
)
def test_the_lead_must_be_there_at_every_layer(low, high, ahead, verdict):
    assert retrieval.lead_verdict(low, high, ahead, layers=6) == verdict


def hits(seed: int, often: float, n: int = 30, layers: int = 4) -> LabelHits:
    rng, present = np.random.default_rng(seed), np.random.default_rng(0).random((n, 5)) < 0.4
    return LabelHits(
        labels=tuple("abcde"),
        present=present,
        retrieved=rng.random((layers, n, 5)) < np.where(present, often, 0.1),
        tokens=np.full(n, 16),
        object_tokens=np.full(n, 4),
        grounded=rng.integers(0, 5, (layers, n)),
        label_tokens=np.full(5, 10),
        retrieving=rng.integers(0, 9, (layers, 5)),
    )


@pytest.fixture(scope="module")
def found():
    return retrieval.retrieval(hits(1, 0.9), hits(2, 0.3), middle=2, permutations=50)


def test_a_lens_that_finds_more_leads_at_every_layer(found):
    embed, logit = hits(1, 0.9), hits(2, 0.3)
    wanted = [((embed.retrieved & embed.present)[at].sum() - (logit.retrieved & logit.present)[at].sum())
              / embed.present.sum() for at in range(4)]  # fmt: skip
    assert found.lead.value == pytest.approx(wanted)
    assert float(found.mean_lead.value) == pytest.approx(np.mean(wanted[:3]))
    assert (found.ahead, found.ahead_beyond_chance) == (3, 3)
    assert {name: entry.verdict for name, entry in found.findings().items()} == {"E13": HOLDS, "E14": HOLDS}
    assert found.told()["behind_layers"] == "no layer" and found.told()["logit_above_chance"] <= 4


def test_the_other_way_round_it_is_behind_and_says_where():
    swapped = retrieval.retrieval(hits(2, 0.3), hits(1, 0.9), middle=2, permutations=50)
    assert swapped.findings()["E13"].verdict == FAILS
    assert swapped.told()["behind_layers"] == "layers 0, 1, 2, 3"


def test_tables_and_records_have_a_row_a_layer(found):
    assert len(found.table()) == len(found.lead_table()) == 4
    assert len(found.numbers()) == 3 * 2 * 4
    assert found.numbers()["recall_EmbedLens_layer_0"] == found.recall["EmbedLens"].value[0]


def test_figures_draw_both_lenses(found):
    for draw in (retrieval.recall_figure, retrieval.excess_figure):
        labels = [line.get_label() for line in draw(found, "miniature").axes[0].get_lines()]
        assert {"EmbedLens", "LogitLens"} <= set(labels)
    every = {(lens, k, rule): hits(i, often) for i, (lens, often) in enumerate((("EmbedLens", 0.9), ("LogitLens", 0.3)))
             for k in retrieval.KS for rule in RULES}  # fmt: skip
    figure = retrieval.rules_figure(every, 2, "miniature")
    assert len(figure.axes) == 9 and figure.get_suptitle() == "EmbedLens has the higher mean in 9 of 9 ways to count"
    assert len(retrieval.rules_table(every)) == 18
    (axes,) = retrieval.tokens_figure(hits(1, 0.9), hits(2, 0.3), "miniature").axes
    assert axes.get_title().startswith("Layers above chance: EmbedLens 4 of 4, LogitLens ")


def test_titles_count_layers_whose_whole_interval_lies_on_one_side(found):
    title = retrieval.recall_figure(found, "miniature").axes[0].get_title()
    assert title == "EmbedLens finds more at 4 of 4 layers, LogitLens at 0"
    swapped = Interval(-found.lead.value, -found.lead.high, -found.lead.low)
    assert retrieval.who_finds_more(swapped) == "EmbedLens finds more at 0 of 4 layers, LogitLens at 4"
    wide = Interval(found.lead.value, found.lead.value - 2, found.lead.value + 2)
    assert retrieval.who_finds_more(wide) == "EmbedLens finds more at 0 of 4 layers, LogitLens at 0"
    excess = retrieval.excess_figure(found, "miniature").axes[0].get_title()
    assert excess == f"Beyond chance,\n{retrieval.who_finds_more(found.lead_beyond_chance)}"


def test_readings_keep_the_pictures_and_change_one_thing(miniature):
    pictures = samples.load("miniworld", n=3, seed=0)
    every = retrieval.label_hits(miniature, pictures)
    embed, logit = (every[lens, 5, "head-word"] for lens in ("EmbedLens", "LogitLens"))
    found = retrieval.readings(miniature, pictures, embed, logit, middle=2)
    assert list(found.pairs)[0] == "as above" and len(found.table()) == 4
    assert found.pairs["LogitLens without final norm"][0] is embed
    plain = retrieval.label_hits(miniature, pictures, lenses={"o": LogitLens.from_model(miniature, norm=False)})
    other = found.pairs["LogitLens without final norm"][1]
    assert np.array_equal(other.retrieved, plain["o", 5, "head-word"].retrieved)
    assert not any(name[:1] == "A" and name[1:2].isdigit() for name in found.pairs)
    signs = np.sign([float(lead.value) for lead in found.leads])
    assert found.told()["ablations_turn"] == ((signs[1:] != signs[0]).sum() or "none")


def test_the_followed_token_is_in_the_middle_of_the_largest_object(miniature):
    sample = next(s for s in samples.load("miniworld", n=8, seed=0) if s.labels)
    found = retrieval.follow(miniature, sample)
    prompt = miniature.prompt(sample.image, retrieval.QUESTION)
    assert (found.label, found.patch) == largest_object(miniature, sample, prompt.grid)
    states = miniature.hidden_states(prompt)[:, prompt.visual][:, found.patch]
    scores = EmbedLens.from_model(miniature).scores(states[:1])[0]
    best = max(float(scores[i]) for i in label_ids(miniature.tokenizer, found.label))
    assert abs(found.ranks["EmbedLens"][0] - (1 + int((scores > best).sum()))) <= 1  # ties and rounding
    assert len(found.table()) == miniature.n_layers + 1 and found.told()["followed"] == found.label
    title = retrieval.followed_figure(found, "miniature").texts[0].get_text()
    assert title == f"The token that is followed: {found.label}"
