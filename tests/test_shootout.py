"""Promises of the shoot-out: everyone is fed the budget, answers are the pruned prompt's own, verdicts follow rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from twins import BY_FAMILY, TWINS, save_twin

from embedlens import load, samples
from embedlens.chapters import orderings, shootout
from embedlens.codebook import Codebook, Recipe, Thresholds
from embedlens.engine import intervene
from embedlens.errors import EmbedLensError
from embedlens.groups import discover
from embedlens.pruners import INSIDE, PRUNERS, Context, average_tokens, features_of, plans_inside, prune
from embedlens.redundancy import Protocol
from embedlens.tasks import family_questions

SHARES = [6 / 16, 2 / 16]


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
    found = shootout.shootout(tiny, items, SHARES, books.named, reference, seeds=2)
    return found.assign(correct=(found["item"] % 2).astype(float))  # a random model is right about nothing


def test_everyone_before_layer_0_is_fed_exactly_the_budget(table):
    rows = table[(table["arm"] != "baseline") & ~table["inside"]]
    assert (rows["tokens"] == rows["budget"]).all() and set(rows["budget"]) == {6, 2}
    assert (rows["average"] == rows["budget"]).all()
    assert (table[table["arm"] == "baseline"]["tokens"] == 16).all()
    arms = set(shootout.arms_in(table))
    assert arms == {*PRUNERS, shootout.LOOSE_NAME}
    assert (
        table[table["arm"] == "random"]["seed"].nunique() == 2 and table[table["arm"] == "FastV"]["seed"].nunique() == 1
    )


def test_arms_inside_are_told_by_what_is_left_and_by_the_average(tiny, table):
    rows = table[table["inside"]]
    assert (rows["tokens"] == 16).all()  # all enter layer 0
    for name, rule in INSIDE.items():
        for share, budget in zip(SHARES, (6, 2), strict=True):
            left = rule.left(16, tiny.n_layers, budget)
            own = rows[(rows["arm"] == f"{name} inside, R left") & (rows["share"] == share)]
            assert len(own) == 8
            assert np.allclose(own["average"], average_tokens(left, 16, tiny.n_layers)) and left[-1][1] == budget
            # three layers: one or two of them have all 16, so that no average is as low as 2
            mean = rule.averaging(16, tiny.n_layers, budget)
            own = rows[(rows["arm"] == f"{name} inside, mean R") & (rows["share"] == share)]
            assert len(own) == (0 if mean is None else 8)
            assert mean is None or np.allclose(own["average"], average_tokens(mean, 16, tiny.n_layers))
    assert shootout.inside_in(table) == [
        "FastV inside, R left",
        "PyramidDrop inside, R left",
    ] + ["PyramidDrop inside, mean R"] * (INSIDE["PyramidDrop"].averaging(16, tiny.n_layers, 6) is not None)


def test_a_budget_that_the_first_layers_allow_is_met_on_average(tiny, books, reference):
    items = family_questions("general", 5)
    table = shootout.shootout(tiny, items, [13 / 16], books.named, reference, ["strided"], 1)
    for name in INSIDE:
        own = table[table["arm"] == f"{name} inside, mean R"]
        assert len(own) == 5 and (own["average"] - 13).abs().max() <= 0.5
        assert (table[table["arm"] == f"{name} inside, R left"]["average"] > 13).all()
    assert "14" not in set(shootout.score_table(table, [13 / 16]).columns)
    assert shootout.score_table(table, [13 / 16]).loc["FastV inside, mean R", "13"].endswith(" at 13.0")


def test_answers_inside_are_the_models_own_with_the_tokens_left(tiny, table):
    items = family_questions("general", 5) + family_questions("hallucination", 3)
    for name, rule in INSIDE.items():
        for at in (1, 7):
            prompt = tiny.prompt(items[at].sample.image, items[at].question.text)
            (plan,) = plans_inside(tiny, [prompt], rule, [rule.left(16, tiny.n_layers, 2)])
            with intervene(tiny, *plan):
                expected = tiny.answer(prompt, 12)
            rows = table[(table["arm"] == f"{name} inside, R left") & (table["budget"] == 2) & (table["item"] == at)]
            assert rows["prediction"].tolist() == [expected]


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
    one, many = (shootout.shootout(tiny, items, [3 / 16], books.named, reference, None, 1, size) for size in (1, 64))
    pd.testing.assert_frame_equal(one, many)


def test_budgets_are_shares_of_each_pictures_own_tokens():
    assert [shootout.budget_of(576, share) for share in shootout.SHARES] == [192, 96, 64, 29]
    assert len(shootout.shares_of([3])) == 1 and len(shootout.shares_of([3, 576])) == 4
    assert shootout.budget_name([64, 64], 1 / 9) == "7" and shootout.budget_name([64, 96], 1 / 9) == "11%"
    for share in (0.0, 1.5, -0.1):
        with pytest.raises(EmbedLensError, match="above 0 up to 1"):
            shootout.shares_of([64], [share])
    with pytest.raises(EmbedLensError, match="pass at least one of each"):
        shootout.shares_of([])


def test_wrong_input_gets_a_sentence(tiny, books, reference):
    items = family_questions("general", 5)
    foreign = replace(books.released, model="another")
    with pytest.raises(EmbedLensError, match="is of another, not of"):
        shootout.shootout(tiny, items, [0.2], {"codebook": foreign}, reference)
    with pytest.raises(EmbedLensError, match="pass at least one of each"):
        shootout.shootout(tiny, [], [0.2], books.named, reference)
    for share in (0, 17 / 16):
        with pytest.raises(EmbedLensError, match="of 16 tokens: pass shares above 0 up to 1"):
            shootout.shootout(tiny, items, [share], books.named, reference, ["strided"])
    with pytest.raises(EmbedLensError, match="unknown rule inside the model 'magic': use one of FastV, PyramidDrop"):
        shootout.shootout(tiny, items, [0.2], books.named, reference, ["strided"], inside=["magic"])


# --- reading it ------------------------------------------------------------------------------------------------------


def made_up(scores: dict[str, list[float]], share: float = 0.1, n_tokens: int = 64) -> pd.DataFrame:
    """A table with these answers of each arm; "baseline" is all right."""
    n = len(next(iter(scores.values())))
    rows = [
        {
            "item": i,
            "id": i,
            "family": "general",
            "arm": arm,
            "seed": 0,
            "share": share,
            "budget": round(share * n_tokens),
            "inside": "inside" in arm,
            "tokens": n_tokens if arm == "baseline" else round(share * n_tokens),
            "average": share * n_tokens,
            "correct": value,
        }
        for arm, values in {"baseline": [1.0] * n, **scores}.items()
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_kept_and_lead_are_means_of_answers():
    table = made_up({"codebook": [1.0, 1, 0, 0], "FastV": [1.0, 0, 0, 0], "random": [0.0, 0, 0, 0]})
    assert float(shootout.kept(table, "codebook", 0.1).value) == 0.5
    assert float(shootout.lead(table, "codebook", ["FastV", "random"], [0.1]).value) == pytest.approx(0.375)
    both = pd.concat([table, made_up({"codebook": [0.0] * 4}, 0.3).query("arm != 'baseline'")])
    # FastV has no budget of 0.3: only what both have is compared
    assert float(shootout.lead(both, "codebook", ["FastV"], [0.1, 0.3]).value) == pytest.approx(0.25)
    with pytest.raises(EmbedLensError, match="none of magic has any of these budgets"):
        shootout.lead(table, "codebook", ["magic"], [0.1])
    with pytest.raises(EmbedLensError, match="ask questions that it can answer"):
        shootout.kept(table.assign(correct=0.0), "codebook", 0.1)
    with pytest.raises(EmbedLensError, match="no arm 'magic'"):
        shootout.kept(table, "magic", 0.1)


def test_the_headline_claims_follow_their_rules(tiny, found, books):
    budgets = [0.125]

    def verdicts(own, rival):
        table = made_up({"codebook": own, "FastV": rival}, 0.125)
        return shootout.findings(tiny, table, found, books, budgets)

    good, bad = [1.0] * 40, [0.0] * 40
    assert (verdicts(good, bad)["R01"].verdict, verdicts(good, bad)["R10"].verdict) == ("holds", "holds")
    assert (verdicts(bad, good)["R01"].verdict, verdicts(bad, good)["R10"].verdict) == (
        "does not hold",
        "does not hold",
    )
    assert verdicts(good, good)["R10"].verdict == "does not hold"  # a tie is no lead
    matched = made_up({"codebook": good, "FastV": bad, "FastV inside, mean R": good}, 0.125)
    assert shootout.findings(tiny, matched, found, books, budgets)["R10"].verdict == "partly"  # it counts as a rival
    score = made_up({"codebook": good, "FastV": bad, "[cls] top": good}, 0.125)
    assert shootout.findings(tiny, score, found, books, budgets)["R10"].verdict == "holds"  # no published pruner
    open_ = made_up({"codebook": good, "FastV": [1.0, 0.0] * 20, "SparseVLM": good}, 0.125)
    assert shootout.findings(tiny, open_, found, books, budgets)["R10"].verdict == "partly"
    left = made_up({"codebook": good, "FastV": bad, "FastV inside, R left": good}, 0.125)
    assert shootout.findings(tiny, left, found, books, budgets)["R10"].verdict == "holds"  # it is fed more: no rival
    half = ([1.0] * 9 + [0.0]) * 4
    assert verdicts(half, bad)["R01"].verdict == "partly"


def test_claims_about_the_method_are_checked_on_what_ran(tiny, table, found, books):
    before = shootout.digest(tiny)
    got = shootout.findings(tiny, table, found, books, SHARES, 0)
    assert shootout.digest(tiny) == before
    assert {name: got[name].verdict for name in ("R11", "R12", "R13", "R14")} == dict.fromkeys(
        ("R11", "R12", "R13", "R14"), "holds"
    )
    assert shootout.findings(tiny, table, found, books, SHARES, 3)["R11"].verdict == "does not hold"
    more = table.assign(tokens=table["tokens"] + (table["arm"] == "FastV"))
    assert shootout.findings(tiny, more, found, books, SHARES)["R12"].verdict == "does not hold"
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
    shares = shootout.dead_shares(made, replace(books, released=book), 0.5)
    assert float(shares["all tokens"].value) == 0.25
    assert float(shares["prototypes, codebook"].value) == 0.5


def test_figures_and_page_values_are_there_for_any_model(tiny, table, found, books, reference):
    from matplotlib import pyplot as plt

    shares = shootout.dead_shares(found, books, SHARES[1])
    for figure in (
        shootout.pipeline_figure(books, found, SHARES[1]),
        shootout.removal_figure(found, books.released, 0, SHARES[1]),
        shootout.shootout_figure(table, SHARES, "tiny"),
        shootout.inside_figure(table, SHARES, "tiny"),
        shootout.families_figure(table, SHARES[1], "tiny"),
        shootout.overlap_figure(shares, "tiny", 4),
    ):
        figure.canvas.draw()
        plt.close(figure)
    place = shootout.told(table, books, shares, SHARES, tiny.n_layers)["place"]
    title = shootout.shootout_figure(table, SHARES, "tiny").get_suptitle()
    assert f"codebook: number {place} of {len(shootout.arms_in(table))}" in title
    told = shootout.told(table, books, shares, SHARES, tiny.n_layers)
    findings = orderings.findings(tiny, found) | shootout.findings(tiny, table, found, books, SHARES)
    told |= shootout.glued(findings) | orderings.told(found)
    assert all(value != "" and "nan" not in str(value) for value in told.values()), told
    assert all(np.isfinite(value) for value in shootout.numbers(table, books, SHARES).values())
    assert list(shootout.costs(tiny, found.prompts[:1], SHARES[1], books.named, reference).columns)[0] == "choosing"
    scores = shootout.score_table(table, SHARES)
    assert scores.shape == (len(PRUNERS) + 1 + len(shootout.inside_in(table)), 2) and list(scores) == ["6", "2"]
    assert all(" at " in cell or cell == "–" for cell in scores.loc[shootout.inside_in(table)].to_numpy().flat)
    assert not any(" at " in cell for cell in scores.loc[shootout.arms_in(table)].to_numpy().flat)
    assert shootout.inside_figure(table[~table["inside"]], SHARES, "tiny") is None


# --- pictures of different numbers of tokens -------------------------------------------------------------------------


def stretched(sample, width: int, height: int):
    """The picture in another shape, its boxes with it."""
    wide, high = width / sample.width, height / sample.height
    boxes = [
        {**e, "bbox": [a * b for a, b in zip(e["bbox"], (wide, high) * 2, strict=True)]} for e in sample.annotations
    ]
    image = sample.image.resize((width, height))
    return replace(sample, width=width, height=height, annotations=tuple(boxes), draw=lambda: image)


@pytest.mark.parametrize("family", sorted(BY_FAMILY))
def test_the_chapter_takes_pictures_of_different_numbers_of_tokens(family, tmp_path):
    from matplotlib import pyplot as plt

    sizes = TWINS[BY_FAMILY[family]].sizes
    model = load(save_twin(tmp_path / family, BY_FAMILY[family]), device="cpu")
    pictures = samples.load("miniworld", n=4, split="train")
    shapes = [*sizes, *sizes][:5]
    pictures = [stretched(own, *shape) for own, shape in zip(pictures, shapes, strict=False)]
    reference = discover(model, pictures)
    found = orderings.study(model, pictures, Protocol(question="what is in the picture?"), reference)
    counts = [len(own) for own in found.tokens]
    assert len(set(counts)) > 1
    books = shootout.codebooks_of(model, found, Recipe(more_pictures=0, most_in_picture=1.0), Thresholds(2.0, 99.0))
    shares = shootout.shares_of(counts, [1 / 3, 0.1])
    items = family_questions("general", 5)
    items = [item._replace(sample=stretched(item.sample, *shape)) for item, shape in zip(items, shapes, strict=True)]
    table = shootout.shootout(model, items, shares, books.named, reference, seeds=1)
    own = np.array(shootout.counts_in(table))
    for share in shares:
        rows = table[(table["share"] == share) & ~table["inside"]]
        budgets = np.array([shootout.budget_of(int(n), share) for n in own])
        assert (rows["tokens"] == budgets[rows["item"]]).all()  # of each picture's own number
    for name in INSIDE:
        rows = table[(table["arm"] == f"{name} inside, R left") & (table["share"] == shares[0])]
        assert (rows["average"] > rows["budget"]).all() and (rows["average"] < own).all()
    table = table.assign(correct=(table["item"] % 2).astype(float))
    dead = shootout.dead_shares(found, books, shares[1])
    for figure in (
        orderings.words_figure(model, found, 1),
        orderings.shifts_figure(model, found, 1),
        orderings.orders_figure(found),
        shootout.pipeline_figure(books, found, shares[1]),
        shootout.removal_figure(found, books.released, 1, shares[1]),
        shootout.shootout_figure(table, shares, family),
        shootout.inside_figure(table, shares, family),
        shootout.families_figure(table, shares[1], family),
    ):
        figure.canvas.draw()
        plt.close(figure)
    findings = orderings.findings(model, found) | shootout.findings(model, table, found, books, shares)
    assert findings["R12"].verdict == findings["R13"].verdict == "holds"
    told = shootout.told(table, books, dead, shares, model.n_layers) | shootout.glued(findings) | orderings.told(found)
    assert all(value != "" and "nan" not in str(value) for value in told.values()), told
    if len(set(own)) > 1:
        assert told["middle"].endswith("%") and " to " in told["tokens_a_picture"]
    assert len(shootout.costs(model, found.prompts[:2], shares[1], books.named, reference)) == len(
        shootout.arms_in(table)
    )
