"""Promises of the shoot-out: everyone is fed the budget, answers are the pruned prompt's own, verdicts follow rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from embedlens import samples
from embedlens.chapters import orderings, shootout
from embedlens.codebook import Codebook, Recipe, Thresholds
from embedlens.errors import EmbedLensError
from embedlens.groups import discover
from embedlens.pruners import PRUNERS, Context, features_of, prune
from embedlens.redundancy import Protocol
from embedlens.tasks import family_questions


@pytest.fixture(scope="module")
def reference(tiny):
    return discover(tiny, samples.load("miniworld", n=4, split="train"))


@pytest.fixture(scope="module")
def found(tiny, reference):
    pictures = samples.load("miniworld", n=4, split="train")
    return orderings.study(tiny, pictures, Protocol(question="what is in the picture?"), reference)


@pytest.fixture(scope="module")
def books(tiny, found):
    """Every token is a candidate and every cluster recurs, so that there are codebooks of a random model."""
    return shootout.codebooks_of(tiny, found, Recipe(more_pictures=0, most_in_picture=1.0), Thresholds(2.0, 99.0))


@pytest.fixture(scope="module")
def table(tiny, books, reference):
    items = family_questions("general", 5) + family_questions("hallucination", 3)
    found = shootout.shootout(tiny, items, [6, 2], books.named, reference, seeds=2)
    return found.assign(correct=(found["item"] % 2).astype(float))  # a random model is right about nothing


def test_everyone_is_fed_exactly_the_budget(table):
    rows = table[table["arm"] != "baseline"]
    assert (rows["tokens"] == rows["budget"]).all() and set(rows["budget"]) == {6, 2}
    assert (table[table["arm"] == "baseline"]["tokens"] == 16).all()
    arms = set(shootout.arms_in(table))
    assert arms == {*PRUNERS, shootout.LOOSE_NAME}
    assert (
        table[table["arm"] == "random"]["seed"].nunique() == 2 and table[table["arm"] == "FastV"]["seed"].nunique() == 1
    )


def test_answers_are_those_of_the_physically_shorter_prompt(tiny, table):
    items = family_questions("general", 5) + family_questions("hallucination", 3)
    for at in (0, 6):
        prompt = tiny.prompt(items[at].sample.image, items[at].question.text)
        features = features_of(tiny, [prompt])[0]
        for name in ("DivPrune", "pooling"):
            shorter = prune(PRUNERS[name], features, Context(), 6).prompt(prompt)
            rows = table[(table["arm"] == name) & (table["budget"] == 6) & (table["item"] == at)]
            assert rows["prediction"].tolist() == [tiny.answer(shorter, 12)]


def test_the_batch_size_changes_no_answer(tiny, books, reference):
    items = family_questions("general", 5)
    one, many = (
        shootout.shootout(tiny, items, [3], books.named, reference, ["codebook", "strided", "pooling"], 1, size)
        for size in (1, 64)
    )
    pd.testing.assert_frame_equal(one, many)


def test_budgets_scale_with_the_tokens():
    assert shootout.budgets_of(576) == [192, 96, 64, 29] and shootout.budgets_of(3) == [1]
    with pytest.raises(EmbedLensError, match="above 0 up to 1"):
        shootout.budgets_of(64, [0.0])


def test_wrong_input_gets_a_sentence(tiny, books, reference):
    items = family_questions("general", 5)
    foreign = replace(books.released, model="another")
    with pytest.raises(EmbedLensError, match="is of another, not of"):
        shootout.shootout(tiny, items, [3], {"codebook": foreign}, reference)
    with pytest.raises(EmbedLensError, match="pass at least one of each"):
        shootout.shootout(tiny, [], [3], books.named, reference)
    with pytest.raises(EmbedLensError, match="budget is 17 of 16"):
        shootout.shootout(tiny, items, [17], books.named, reference, ["strided"])


# --- reading it ------------------------------------------------------------------------------------------------------


def made_up(scores: dict[str, list[float]], budget: int = 7) -> pd.DataFrame:
    """A table with these answers of each arm; "baseline" is all right."""
    n = len(next(iter(scores.values())))
    rows = [
        {
            "item": i,
            "id": i,
            "family": "general",
            "arm": arm,
            "seed": 0,
            "budget": budget,
            "tokens": budget,
            "correct": value,
        }
        for arm, values in {"baseline": [1.0] * n, **scores}.items()
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_kept_and_lead_are_means_of_answers():
    table = made_up({"codebook": [1.0, 1, 0, 0], "FastV": [1.0, 0, 0, 0], "random": [0.0, 0, 0, 0]})
    assert float(shootout.kept(table, "codebook", 7).value) == 0.5
    assert float(shootout.lead(table, "codebook", ["FastV", "random"], [7]).value) == pytest.approx(0.375)
    with pytest.raises(EmbedLensError, match="ask questions that it can answer"):
        shootout.kept(table.assign(correct=0.0), "codebook", 7)
    with pytest.raises(EmbedLensError, match="no arm 'magic'"):
        shootout.kept(table, "magic", 7)


def test_the_headline_claims_follow_their_rules(tiny, found, books):
    budgets = [2]

    def verdicts(own, rival):
        table = made_up({"codebook": own, "FastV": rival}, 2)
        return shootout.findings(tiny, table, found, books, budgets)

    good, bad = [1.0] * 40, [0.0] * 40
    assert (verdicts(good, bad)["R01"].verdict, verdicts(good, bad)["R10"].verdict) == ("holds", "holds")
    assert (verdicts(bad, good)["R01"].verdict, verdicts(bad, good)["R10"].verdict) == (
        "does not hold",
        "does not hold",
    )
    assert verdicts(good, good)["R10"].verdict == "does not hold"  # a tie is no lead
    half = ([1.0] * 9 + [0.0]) * 4
    assert verdicts(half, bad)["R01"].verdict == "partly"


def test_claims_about_the_method_are_checked_on_what_ran(tiny, table, found, books):
    before = shootout.digest(tiny)
    got = shootout.findings(tiny, table, found, books, [6, 2], 0)
    assert shootout.digest(tiny) == before
    assert {name: got[name].verdict for name in ("R11", "R12", "R13", "R14")} == dict.fromkeys(
        ("R11", "R12", "R13", "R14"), "holds"
    )
    assert shootout.findings(tiny, table, found, books, [6, 2], 3)["R11"].verdict == "does not hold"
    more = table.assign(tokens=table["tokens"] + (table["arm"] == "FastV"))
    assert shootout.findings(tiny, more, found, books, [6, 2])["R12"].verdict == "does not hold"
    for name in ("R02", "R15", "R16", "R18"):
        assert got[name].verdict == "not testable here" and got[name].value is None


def test_shares_of_dead_tokens_are_counted_by_hand(found, books):
    dead = torch.zeros(16, dtype=torch.bool)
    dead[:4] = True
    none = torch.zeros(16, dtype=torch.bool)
    from embedlens.groups import TokenGroups

    made = replace(found, groups=[TokenGroups(none, none, dead, ~dead, {})] * 4)
    ids = torch.tensor([found.samples[0].id, found.samples[0].id, found.samples[1].id, found.samples[2].id])
    rows = found.tokens[0][:4].clone()
    book = Codebook(rows, ids, torch.tensor([0, 9, 1, 12]), *[torch.zeros(4)] * 3, torch.zeros(4).long(), found.model)
    shares = shootout.dead_shares(made, replace(books, released=book), 8)
    assert float(shares["all tokens"].value) == 0.25
    assert float(shares["prototypes, codebook"].value) == 0.5


def test_average_tokens_of_a_pruner_inside_the_model():
    assert shootout.average_tokens(64, 576, 32) == (2 * 576 + 30 * 64) / 32
    assert shootout.average_tokens(576, 576, 32) == 576


def test_figures_and_page_values_are_there_for_any_model(tiny, table, found, books, reference):
    from matplotlib import pyplot as plt

    shares = shootout.dead_shares(found, books, 2)
    for figure in (
        shootout.pipeline_figure(books, found, 2),
        shootout.removal_figure(found, books.released, 0, 2),
        shootout.shootout_figure(table, [6, 2], "tiny", 16),
        shootout.families_figure(table, 2, "tiny"),
        shootout.overlap_figure(shares, "tiny", 4),
    ):
        figure.canvas.draw()
        plt.close(figure)
    place = shootout.told(table, books, shares, [6, 2], 16, tiny.n_layers)["place"]
    title = shootout.shootout_figure(table, [6, 2], "tiny", 16).get_suptitle()
    assert f"codebook: number {place} of {len(shootout.arms_in(table))}" in title
    told = shootout.told(table, books, shares, [6, 2], 16, tiny.n_layers)
    findings = orderings.findings(tiny, found) | shootout.findings(tiny, table, found, books, [6, 2])
    told |= shootout.glued(findings) | orderings.told(found)
    assert all(value != "" and "nan" not in str(value) for value in told.values()), told
    assert all(np.isfinite(value) for value in shootout.numbers(table, books, [6, 2]).values())
    assert list(shootout.costs(tiny, found.prompts[:1], 2, books.named, reference).columns)[0] == "choosing"
    assert shootout.score_table(table, [6, 2]).shape == (len(PRUNERS) + 1, 2)
