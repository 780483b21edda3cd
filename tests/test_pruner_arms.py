"""Promises of pruners as arms of a sweep: everyone is fed the budget, answers are the pruned prompt's own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from twins import BY_FAMILY, TWINS, save_twin

from embedlens import load, samples, sweep
from embedlens.codebook import Codebook
from embedlens.cues import features_of
from embedlens.engine import intervene
from embedlens.errors import EmbedLensError
from embedlens.groups import discover
from embedlens.pruner_arms import (
    INSIDE,
    SHARES,
    at_budgets,
    budget_name,
    budget_of,
    plans_inside,
    pruner_arms,
    seen,
    shares_of,
)
from embedlens.pruners import PRUNERS, Context, prune
from embedlens.tasks import answer_tokens, family_questions

SHARE = 6 / 16


@pytest.fixture(scope="module")
def reference(tiny):
    return discover(tiny, samples.load("miniworld", n=3, split="train"))


@pytest.fixture(scope="module")
def items():
    return family_questions("general", 5)[:3]


@pytest.fixture(scope="module")
def asking(tiny, items, reference):
    """The books, what one picture shows, and the sweep."""
    prompt = tiny.prompt(items[0].sample.image, items[0].question.text)
    rows = prompt.embeds[prompt.visual][:3].clone()
    ids = torch.tensor([1, 1, 2])
    book = Codebook(rows, ids, torch.tensor([0, 1, 2]), *[torch.zeros(3)] * 3, torch.zeros(3).long(), tiny.name)
    return {"codebook": book, "another": book}, seen(tiny, [prompt], reference, SHARE)[0]


@pytest.fixture(scope="module")
def table(tiny, items, reference, asking):
    books, look = asking
    arms = [sweep.BASELINE, *pruner_arms(look, SHARE, books, seeds=2)]
    return sweep.run_arms(tiny, items, arms, partial(seen, reference=reference, share=SHARE))


def test_everyone_before_layer_0_is_fed_exactly_the_budget(table):
    rows = table[(table["arm"] != "baseline") & ~table["arm"].str.contains("inside")]
    assert set(rows["tokens"]) == {16 - 6}  # how many go
    assert set(rows["arm"]) == {*PRUNERS, "another"}
    assert table.groupby("arm")["seed"].nunique()[["random", "FastV"]].tolist() == [2, 1]


def test_answers_are_those_of_the_physically_shorter_prompt(tiny, table, items):
    for at in (0, 2):
        prompt = tiny.prompt(items[at].sample.image, items[at].question.text)
        features = features_of(tiny, [prompt])[0]
        for name in ("DivPrune", "pooling"):  # one takes tokens out, one writes new ones
            shorter = prune(PRUNERS[name], features, Context(), 6).prompt(prompt)
            rows = table[(table["arm"] == name) & (table["item"] == at)]
            assert rows["prediction"].tolist() == [tiny.answer(shorter, answer_tokens(tiny))]


def test_answers_inside_are_the_models_own_with_the_tokens_left(tiny, table, items):
    for name, rule in INSIDE.items():
        prompt = tiny.prompt(items[1].sample.image, items[1].question.text)
        (plan,) = plans_inside(tiny, [prompt], rule, [rule.left(16, tiny.n_layers, 6)])
        with intervene(tiny, *plan):
            expected = tiny.answer(prompt, answer_tokens(tiny))
        rows = table[(table["arm"] == f"{name} inside, R left") & (table["item"] == 1)]
        assert rows["prediction"].tolist() == [expected]


def test_an_average_that_the_first_layers_exceed_is_no_arm(tiny, reference, asking):
    books, look = asking
    low = seen(tiny, [look.prompt], reference, 1 / 16)[0]
    assert INSIDE["FastV"].averaging(16, tiny.n_layers, 1) is None
    names = [arm.name for arm in pruner_arms(low, 1 / 16, books, ["strided"])]
    assert "FastV inside, R left" in names and "FastV inside, mean R" not in names


def test_the_batch_size_changes_no_answer(tiny, items, reference, asking):
    arms = pruner_arms(asking[1], SHARE, asking[0], ["random", "pooling", "FastV"], 1)
    choose = partial(seen, reference=reference, share=SHARE)
    one, many = (sweep.run_arms(tiny, items, arms, choose, batch_size=size) for size in (1, 64))
    pd.testing.assert_frame_equal(one, many)


def test_budgets_are_shares_of_each_pictures_own_tokens():
    assert [budget_of(576, share) for share in SHARES] == [192, 96, 64, 29]
    assert len(shares_of([3])) == 1 and len(shares_of([3, 576])) == 4
    assert budget_name([64, 64], 1 / 9) == "7" and budget_name([64, 96], 1 / 9) == "11%"
    for share in (0.0, 1.5, -0.1):
        with pytest.raises(EmbedLensError, match="above 0 up to 1"):
            shares_of([64], [share])
    with pytest.raises(EmbedLensError, match="pass at least one of each"):
        shares_of([])


def test_what_draws_is_seeded_by_picture_pruner_and_seed(tiny, asking):
    books, look = asking
    arms = [arm for arm in pruner_arms(look, SHARE, books, ["random"], 2) if arm.name == "random"]

    def kept(arm, seed):
        return arm.act(look, look.prompt.grid, sweep.generator(7, arm.name, seed))[0].mask.numpy()

    assert np.array_equal(kept(arms[0], 0), kept(arms[1], 0))
    assert not np.array_equal(kept(arms[0], 0), kept(arms[0], 1))


def test_every_budget_is_asked_and_all_tokens_once(tiny, items, reference, asking):
    table = at_budgets(tiny, items, [6 / 16, 2 / 16], asking[0], reference, ["random", "strided"], 2)
    tokens = table.groupby(["arm", "share"])["tokens"].agg(["size", "max"])
    assert tokens.loc[("baseline", 1.0)].tolist() == [3, 0]
    assert {at: row.tolist() for at, row in tokens.drop("baseline").iterrows()} == {
        ("random", 6 / 16): [6, 10], ("random", 2 / 16): [6, 14],
        ("strided", 6 / 16): [3, 10], ("strided", 2 / 16): [3, 14],
    }  # fmt: skip


def test_pictures_of_different_numbers_of_tokens_are_pruned_by_their_own(items, tmp_path):
    name = BY_FAMILY["llava_next"]
    model = load(save_twin(tmp_path / "twin", name), device="cpu")
    shapes = [*TWINS[name].sizes, *TWINS[name].sizes][: len(items)]
    resized = [
        item._replace(sample=replace(item.sample, width=w, height=h, draw=partial(item.sample.image.resize, (w, h))))
        for item, (w, h) in zip(items, shapes, strict=True)
    ]
    counts = [len(model.prompt(item.sample.image, "?").grid) for item in resized]
    assert len(set(counts)) > 1
    reference = discover(model, [item.sample for item in resized])
    table = at_budgets(model, resized, [1 / 3], {}, reference, ["strided"], 1, inside=[1 / 3])
    rows = table[table["arm"] == "strided"].sort_values("item")
    assert rows["tokens"].tolist() == [n - budget_of(n, 1 / 3) for n in counts]
    assert "FastV inside, R left" in set(table["arm"])
