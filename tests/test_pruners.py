"""Promises of the pruners: each is pinned against a small case by hand, budgets are exact, what is missing is said."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from twins import BY_FAMILY, TWINS

from benchmarks.sweep import eager
from embedlens import pruner_arms, samples, sweep
from embedlens.codebook import Codebook
from embedlens.cues import Features, attended, cls_similarity, features_of, raters
from embedlens.engine import intervene
from embedlens.errors import EmbedLensError
from embedlens.groups import TokenGroups, discover
from embedlens.patches import Frame, ManyViews, PatchGrid
from embedlens.pruner_arms import INSIDE, at_budgets, average_tokens, budget_of, plans_inside, seen
from embedlens.pruners import PRUNERS, Context, cells, divprune, hiprune, middles, prune, usable, vispruner
from embedlens.tasks import answer_tokens, family_questions

SHARE = 6 / 16


def grid_of(rows: int, cols: int) -> PatchGrid:
    return PatchGrid(rows=rows, cols=cols, frame=Frame.stretch(cols, rows))


def codebook_of(rows: torch.Tensor, model: str = "made up") -> Codebook:
    n = len(rows)
    none, zero = torch.zeros(n), torch.zeros(n, dtype=torch.long)
    return Codebook(rows, zero, zero, none, none, none, zero, model)


def groups_of(dead: torch.Tensor) -> TokenGroups:
    none = torch.zeros_like(dead)
    return TokenGroups(none, none, dead, ~dead, {})


def made_up(rows: int = 4, cols: int = 4, seed: int = 0) -> tuple[Features, Context]:
    """Features of any size with everything that a pruner may need; the projector doubles."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    n = rows * cols
    features = Features(
        some(n, 6) - 0.5, grid_of(rows, cols), some(n, 6) - 0.5, some(6), some(n), some(n), some(n, 5) - 0.5,
        some(3, n), lambda x: 2 * x,
    )  # fmt: skip
    dead = some(n) < 0.4
    book = codebook_of(some(3, 6) - 0.5)
    return features, Context(some(4, n), some(n), groups_of(dead), book, np.random.default_rng(seed))


# --- all of them -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_every_pruner_keeps_exactly_its_budget_on_every_grid(rows, cols, data):
    budget = data.draw(st.integers(1, rows * cols))
    features, context = made_up(rows, cols)
    for pruner in PRUNERS.values():
        chosen = prune(pruner, features, context, budget)
        assert int(chosen.keep.sum()) == budget and chosen.keep.shape == (rows * cols,), pruner.name
        assert chosen.merged is None or chosen.merged.shape == (budget, 6)
    of = cells(grid_of(rows, cols), budget)  # as many parts as asked, each a rectangle
    assert set(of.tolist()) == set(range(budget))
    for cell in range(budget):
        tall, wide = (set(axis.tolist()) for axis in (of.view(rows, cols) == cell).nonzero().T)
        assert int((of == cell).sum()) == len(tall) * len(wide)
        assert len(tall) * len(wide) == (max(tall) - min(tall) + 1) * (max(wide) - min(wide) + 1)
    views = ManyViews.of([PatchGrid(r, c, Frame.stretch(8, 8)) for r, c in ((2, 2), (rows, cols))])
    features, context = made_up(1, 4 + rows * cols)
    for name in ("strided", "pooling", "HiPrune"):  # several views share a budget
        assert int(prune(PRUNERS[name], replace(features, grid=views), context, budget).keep.sum()) == budget


def test_only_what_can_run_is_offered_and_a_pruner_refuses_a_model_that_lacks_what_it_needs():
    features, context = made_up()
    assert [pruner.name for pruner in usable(features, context)] == list(PRUNERS)
    bare = Features(features.tokens, features.grid)
    assert {p.name for p in usable(bare, Context())} == {"random", "strided", "pooling", "DivPrune"}
    with pytest.raises(EmbedLensError, match="unknown pruner 'magic'"):
        usable(features, context, ["magic"])
    for pruner in PRUNERS.values():
        if pruner.needs:
            with pytest.raises(EmbedLensError, match="needs .*use 'strided'"):
                prune(pruner, bare, Context(), 4)
        with pytest.raises(EmbedLensError, match="keep at least 1 and at most 16"):
            prune(pruner, features, context, 17)


# --- one by one ------------------------------------------------------------------------------------------------------


def test_random_is_seeded_and_nothing_else_draws_but_what_says_so():
    features, context = made_up()
    for pruner in PRUNERS.values():
        kept = [
            prune(pruner, features, replace(context, rng=np.random.default_rng(seed)), 5).keep for seed in (0, 0, 1)
        ]
        assert torch.equal(kept[0], kept[1])
        assert pruner.random or torch.equal(kept[0], kept[2])


def test_pooling_means_cells_and_strides_keep_their_middles():
    tokens = torch.arange(16.0)[:, None].repeat(1, 6)
    features = Features(tokens, grid_of(4, 4))
    pooled = prune(PRUNERS["pooling"], features, Context(), 4)
    assert pooled.merged[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert middles(grid_of(3, 3), 1).nonzero()[:, 0].tolist() == [4]
    assert prune(PRUNERS["strided"], Features(tokens[:9], grid_of(3, 3)), Context(), 9).keep.all()


def test_cls_top_and_bottom_are_the_ends_of_one_order():
    features, context = made_up()
    top, bottom = (prune(PRUNERS[name], features, context, 8).keep for name in ("[cls] top", "[cls] bottom"))
    assert not bool((top & bottom).any())
    similarity = cls_similarity(features)
    expected = [
        float(features.tower[i] @ features.cls / features.tower[i].norm() / features.cls.norm()) for i in range(16)
    ]
    assert_close(similarity, torch.tensor(expected))
    assert float(similarity[top].min()) >= float(similarity[bottom].max())


def test_fastv_and_sparsevlm_keep_what_text_looks_at():
    features, _ = made_up(1, 4)
    attention = torch.tensor([[9.0, 0, 0, 0], [0.1, 0.4, 0.2, 0.3], [0, 0, 0, 9]])
    context = Context(attention, torch.tensor([0.4, 0.1, 0.3, 0.2]))
    assert prune(PRUNERS["FastV"], features, context, 2).keep.tolist() == [False, True, False, True]  # second layer
    assert prune(PRUNERS["SparseVLM"], features, context, 2).keep.tolist() == [True, False, True, False]


def test_dead_or_most_redundant_tokens_go_first():
    features, context = made_up()
    dead = torch.arange(16) < 6
    context = replace(context, groups=groups_of(dead))
    for budget, kept_dead in ((4, 0), (10, 0), (13, 3)):  # alive ones go only when none is left
        assert int((prune(PRUNERS["dead and sinks"], features, context, budget).keep & dead).sum()) == kept_dead
    redundancy = context.codebook.redundancy(features.tokens)
    for budget in (1, 5, 15):
        keep = prune(PRUNERS["codebook"], features, context, budget).keep
        assert float(redundancy[keep].max()) <= float(redundancy[~keep].min())


def test_visionzip_merges_the_rest_into_strided_targets_by_key():
    # 6 patches, budget 4: 10/64 of 4 rounds to 1 contextual token
    attention = torch.tensor([0.9, 0.0, 0.8, 0.1, 0.7, 0.0])
    tower = torch.arange(6.0)[:, None].repeat(1, 6)
    features = Features(tower, grid_of(2, 3), tower, torch.ones(6), attention, attention, torch.ones(6, 5),
                        torch.ones(1, 6), lambda x: 2 * x)  # fmt: skip
    chosen = prune(PRUNERS["VisionZip"], features, Context(), 4)
    # dominant 0, 2, 4; of the rest 1, 3, 5 the first is the target and takes the mean of 3 and 5
    assert chosen.keep.nonzero()[:, 0].tolist() == [0, 1, 2, 4]
    assert chosen.merged[:, 0].tolist() == [0.0, 2 * (1 + 4), 4.0, 8.0]


def test_prumerge_adds_the_nearest_and_one_row_for_all_that_is_dropped():
    # 4 patches, budget 2: one by attention, no strided, one row for the rest at the most attended of them
    attention = torch.tensor([0.1, 0.6, 0.2, 0.1])
    tower = torch.tensor([1.0, 10.0, 100.0, 1000.0])[:, None].repeat(1, 6)
    keys = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [-1, 0]])
    features = Features(
        tower, grid_of(2, 2), tower, torch.ones(6), attention, attention, keys, torch.ones(1, 4), lambda x: x
    )
    chosen = prune(PRUNERS["PruMerge+"], features, Context(), 2)
    assert chosen.keep.tolist() == [False, True, True, False]
    # patch 1 takes up its nearest by key, patch 0; the other row is 0.1 * 1 + 0.2 * 100 + 0.1 * 1000
    assert_close(chosen.merged[:, 0], torch.tensor([10 + 0.1 * 1, 120.1]))


def test_hiprune_takes_anchors_with_neighbours_then_registers_and_does_not_wrap():
    shallow, deep = torch.zeros(9), torch.arange(9.0)
    shallow[2] = 1  # top right corner: neighbours are 1 and 5, not 3 of the next row
    keep = hiprune(shallow, deep, grid_of(3, 3), 7)  # 7 * 0.1 / 5 rounds to no anchor: registers only
    assert keep.nonzero()[:, 0].tolist() == [2, 3, 4, 5, 6, 7, 8]
    wide = torch.zeros(100)
    wide[9] = 1
    keep = hiprune(wide, torch.arange(100.0), grid_of(10, 10), 30)  # 30 * 0.1 / 5 rounds to one
    assert {9, 8, 19} <= set(keep.nonzero()[:, 0].tolist()) and not keep[10]
    assert int(keep[73:].sum()) == 27 and int(keep.sum()) == 30


def test_vispruner_keeps_the_important_and_drops_duplicates_of_the_rest():
    attention = torch.tensor([0.9, 0.8, 0.5, 0.4, 0.3, 0.2])
    rows = torch.eye(6)
    rows[4] = rows[3]  # in order of attention the rest is 2, 3, 4, 5; even places 2 and 4, odd 3 and 5
    assert vispruner(attention, rows, 4).tolist() == [True, True, False, True, False, True]  # both even ones go
    assert not bool(vispruner(attention, rows, 5)[4])  # of the even ones, 4 is like 3, 2 is like none


def test_divprune_is_greedy_farthest_points():
    angles = torch.tensor([0.0, 0.1, 1.5, 3.0])
    tokens = torch.stack([angles.cos(), angles.sin()], -1)
    # nearest others: 0.1, 0.1, 1.4, 1.5 rad, so the last one starts; then the one farthest from it, and so on
    assert divprune(tokens, 1).tolist() == [False, False, False, True]
    assert divprune(tokens, 2).tolist() == [True, False, False, True]
    assert divprune(tokens, 3).tolist() == [True, False, True, True]


# --- what the model gives --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tiny):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)) for _ in range(3)]
    return tiny.prompts(pictures, ["what is in the picture?", "how many?", "what is in the picture?"])


def test_attention_in_the_tower_is_the_towers_own(tiny, prompts):
    tower = tiny.hf.model.vision_tower
    tower.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            stock = tower(
                torch.cat([p.pixel_values for p in prompts]), output_attentions=True, output_hidden_states=True
            )
    finally:
        tower.set_attn_implementation("sdpa")
    layer = tiny.feature_layer
    for row, found in enumerate(features_of(tiny, prompts)):
        weights = stock.attentions[layer - 1][row].mean(0)
        assert_close(found.cls_attention, weights[0, 1:], atol=1e-5, rtol=1e-4)
        assert_close(found.received[-1], weights.mean(0)[1:], atol=1e-5, rtol=1e-4)
        assert_close(found.cls, stock.hidden_states[layer][row, 0], atol=1e-5, rtol=1e-4)
        assert_close(found.tower, stock.hidden_states[layer][row, 1:], atol=1e-5, rtol=1e-4)
        assert_close(found.project(found.tower[None])[0], found.tokens, atol=1e-4, rtol=1e-4)
        assert len(found.received) == layer


def test_attention_of_the_text_is_the_language_models_own(tiny, prompts):
    found = attended(tiny, prompts)
    with eager(tiny):
        for prompt, (last, rated) in zip(prompts, found, strict=True):
            with torch.no_grad():
                stock = tiny.hf(inputs_embeds=prompt.embeds[None], output_attentions=True).attentions
            expected = torch.stack([layer[0].mean(0)[-1][prompt.visual] for layer in stock])
            assert_close(last, expected, atol=1e-5, rtol=1e-4)
            assert_close(rated, stock[2][0].mean(0)[raters(prompt)][:, prompt.visual].mean(0), atol=1e-5, rtol=1e-4)


# --- inside the language model ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 600), st.integers(2, 40), st.data())
def test_stages_leave_exactly_the_budget_or_have_it_on_average(n, n_layers, data):
    budget = data.draw(st.integers(1, n))
    for rule in INSIDE.values():
        left = rule.left(n, n_layers, budget)
        assert left[-1][1] == budget and [layer for layer, _ in left] == list(rule.layers(n_layers))
        assert 0 < left[0][0] and left[-1][0] < n_layers
        counts = [n, *(count for _, count in left)]
        assert counts == sorted(counts, reverse=True)
        by_hand = [next((c for layer, c in reversed(left) if layer <= at), n) for at in range(n_layers)]
        assert average_tokens(left, n, n_layers) == pytest.approx(sum(by_hand) / n_layers)
        mean = rule.averaging(n, n_layers, budget)
        least = average_tokens(tuple((layer, 1) for layer in rule.layers(n_layers)), n, n_layers)
        assert (mean is None) == (least > budget)
        if mean is not None:  # stages are whole numbers of tokens, so that an average is met to half of one each
            assert abs(average_tokens(mean, n, n_layers) - budget) <= len(mean) / 2
            assert mean[-1][1] <= budget


def test_stages_are_those_of_the_papers():
    # FastV: K = 2, half of 576. PyramidDrop: a half, a quarter, an eighth after 8, 16 and 24 of 32 layers
    assert INSIDE["FastV"].left(576, 32, 288) == ((2, 288),)
    assert INSIDE["PyramidDrop"].left(576, 32, 72) == ((8, 288), (16, 144), (24, 72))
    assert INSIDE["PyramidDrop"].layers(8) == (2, 4, 6) and INSIDE["FastV"].layers(8) == (2,)
    assert INSIDE["FastV"].averaging(576, 32, 64) == ((2, 30),)  # (2 * 576 + 30 * 30) / 32 = 64.1
    assert INSIDE["FastV"].averaging(576, 32, 29) is None  # the first two layers alone have 36
    for rule in INSIDE.values():
        for schedule in (rule.left, rule.averaging):
            with pytest.raises(EmbedLensError, match="keep at least 1 and at most 16"):
                schedule(16, 8, 0)
        with pytest.raises(EmbedLensError, match="the model has 1: use a pruner before layer 0"):
            rule.left(16, 1, 4)


@torch.no_grad()
def last_attention(model, prompt, gone, layer):
    """Attention of the last position in one layer, the stock blocks run on rows that stages have left: [(rows, layer)].

    Eager, so that the weights are the model's own.
    """
    h, rows = prompt.embeds[None], torch.arange(len(prompt))
    places = rows
    for index, block in enumerate(model.blocks):
        for stay, at, closing in gone:
            if at == index:
                left = stay[rows]
                h, rows, places = h[:, left], rows[left], places[left]
                places = torch.arange(len(rows)) if closing else places
        rotary = model.decoder.rotary_emb(h, places[None])
        mask = torch.full((len(rows),) * 2, float("-inf")).triu(1)[None, None]
        if index == layer:
            weights = block.self_attn(block.input_layernorm(h), position_embeddings=rotary, attention_mask=mask)[1]
            whole = torch.full((len(prompt),), -torch.inf)
            whole[rows] = weights[0].mean(0)[-1]
            return whole[prompt.visual]
        h = block(h, attention_mask=mask, position_embeddings=rotary)
    raise AssertionError


@pytest.mark.parametrize("name", INSIDE)
def test_what_leaves_inside_is_what_the_last_position_looks_at_least_with_the_others_gone(tiny, prompts, name):
    rule = INSIDE[name]
    stages = [rule.left(16, tiny.n_layers, budget) for budget in (5, 3, 12)]
    plans = plans_inside(tiny, prompts, rule, stages, batch_size=2)
    known = plans_inside(tiny, prompts, rule, stages, [own for own, _ in attended(tiny, prompts)])
    assert [[v.mask.tolist() for v in plan] for plan in known] == [[v.mask.tolist() for v in plan] for plan in plans]
    with eager(tiny):
        for prompt, own, plan in zip(prompts, stages, plans, strict=True):
            gone, out = [], torch.zeros(16, dtype=torch.bool)
            for (layer, count), value in zip(own, plan, strict=True):
                assert (value.layer, value.positions) == (layer, rule.positions)
                looked = last_attention(tiny, prompt, gone, layer + rule.ranked)
                out = out | value.mask
                assert int((~out).sum()) == count
                assert float(looked[~out].min()) >= float(looked[value.mask].max())
                gone.append((~prompt.spread(out), layer, rule.positions == "renumber"))
    assert len({tuple(map(int, plan[0].mask)) for plan in plans}) > 1  # the choice depends on picture and question


# --- as arms of a sweep ----------------------------------------------------------------------------------------------


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
    arms = [sweep.BASELINE, *pruner_arms.pruner_arms(look, SHARE, books, seeds=2)]
    return sweep.run_arms(tiny, items, arms, partial(seen, reference=reference, share=SHARE))


def test_everyone_before_layer_0_is_fed_exactly_the_budget(table):
    rows = table[(table["arm"] != "baseline") & ~table["arm"].str.contains("inside")]
    assert set(rows["tokens"]) == {16 - 6}  # how many go
    assert set(rows["arm"]) == {*PRUNERS, "another"}
    assert table.groupby("arm")["seed"].nunique()[["random", "FastV"]].tolist() == [2, 1]


def test_answers_are_those_of_the_physically_shorter_prompt(tiny, table, items):
    for at in (0, 2):  # of three that were asked together
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


def test_an_average_that_the_first_layers_exceed_is_no_arm_and_what_draws_is_seeded(tiny, reference, asking):
    books, look = asking
    low = seen(tiny, [look.prompt], reference, 1 / 16)[0]
    assert INSIDE["FastV"].averaging(16, tiny.n_layers, 1) is None
    names = [arm.name for arm in pruner_arms.pruner_arms(low, 1 / 16, books, ["strided"])]
    assert "FastV inside, R left" in names and "FastV inside, mean R" not in names
    arms = [arm for arm in pruner_arms.pruner_arms(look, SHARE, books, ["random"], 2) if arm.name == "random"]
    kept = [
        arm.act(look, look.prompt.grid, sweep.generator(7, arm.name, seed))[0].mask.tolist()
        for arm, seed in ((arms[0], 0), (arms[1], 0), (arms[0], 1))
    ]
    assert kept[0] == kept[1] != kept[2]


def test_budgets_are_shares_of_each_pictures_own_tokens():
    assert [budget_of(576, share) for share in pruner_arms.SHARES] == [192, 96, 64, 29]
    assert len(pruner_arms.shares_of([3])) == 1 and len(pruner_arms.shares_of([3, 576])) == 4
    assert pruner_arms.budget_name([64, 64], 1 / 9) == "7" and pruner_arms.budget_name([64, 96], 1 / 9) == "11%"


def test_every_budget_is_asked_and_all_tokens_once(tiny, items, reference, asking):
    table = at_budgets(tiny, items, [6 / 16, 2 / 16], asking[0], reference, ["random", "strided"], 2)
    tokens = table.groupby(["arm", "share"])["tokens"].agg(["size", "max"])
    assert tokens.loc[("baseline", 1.0)].tolist() == [3, 0]
    assert {at: row.tolist() for at, row in tokens.drop("baseline").iterrows()} == {
        ("random", 6 / 16): [6, 10], ("random", 2 / 16): [6, 14],
        ("strided", 6 / 16): [3, 10], ("strided", 2 / 16): [3, 14],
    }  # fmt: skip


def test_pictures_of_different_numbers_of_tokens_are_pruned_by_their_own(items, twin_of):
    name = BY_FAMILY["llava_next"]
    _, model = twin_of(name)
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
