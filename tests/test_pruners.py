"""Promises of the pruners: each is pinned against a small case by hand, budgets are exact, what is missing is said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

import embedlens as el
from benchmarks.sweep import eager
from embedlens.codebook import Codebook
from embedlens.cues import Features, attended, cls_similarity, features_of, raters
from embedlens.errors import EmbedLensError
from embedlens.groups import TokenGroups
from embedlens.patches import Frame, ManyViews, PatchGrid
from embedlens.pruner_arms import INSIDE, average_tokens, plans_inside
from embedlens.pruners import (
    PRUNERS,
    Context,
    cells,
    divprune,
    hiprune,
    middles,
    prune,
    usable,
    vispruner,
)


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


@pytest.mark.parametrize("budget", [0, -3, 17])
def test_a_budget_outside_the_picture_is_refused(budget):
    with pytest.raises(EmbedLensError, match="keep at least 1 and at most 16"):
        prune(PRUNERS["random"], *made_up(), budget)


@pytest.mark.parametrize("name", [name for name, pruner in PRUNERS.items() if pruner.needs])
def test_a_pruner_refuses_a_model_that_lacks_what_it_needs(name):
    features, _ = made_up()
    bare = Features(features.tokens, features.grid)
    with pytest.raises(EmbedLensError, match="needs .*use 'strided'"):
        prune(PRUNERS[name], bare, Context(), 4)


def test_only_what_can_run_is_offered():
    features, context = made_up()
    assert [pruner.name for pruner in usable(features, context)] == list(PRUNERS)
    bare = Features(features.tokens, features.grid)
    assert {p.name for p in usable(bare, Context())} == {"random", "strided", "pooling", "DivPrune"}
    with pytest.raises(EmbedLensError, match="unknown pruner 'magic'"):
        usable(features, context, ["magic"])


# --- one by one ------------------------------------------------------------------------------------------------------


def test_random_is_seeded_and_nothing_else_draws_but_what_says_so():
    features, context = made_up()
    for pruner in PRUNERS.values():
        kept = [
            prune(pruner, features, replace(context, rng=np.random.default_rng(seed)), 5).keep for seed in (0, 0, 1)
        ]
        assert torch.equal(kept[0], kept[1])
        assert pruner.random or torch.equal(kept[0], kept[2])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_cells_divide_any_grid_into_as_many_parts_as_asked(rows, cols, data):
    budget = data.draw(st.integers(1, rows * cols))
    of = cells(grid_of(rows, cols), budget)
    assert set(of.tolist()) == set(range(budget))
    for cell in range(budget):  # each is a rectangle
        at = [divmod(int(i), cols) for i in (of == cell).nonzero()[:, 0]]
        tall, wide = ({x[axis] for x in at} for axis in (0, 1))
        assert len(at) == len(tall) * len(wide) == (max(tall) - min(tall) + 1) * (max(wide) - min(wide) + 1)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_several_views_share_a_budget_by_their_sizes(data):
    views = [PatchGrid(rows, cols, Frame.stretch(8, 8)) for rows, cols in ((2, 2), (3, 4), (1, 5))]
    budget = data.draw(st.integers(1, 21))
    of = cells(ManyViews.of(views), budget)
    assert set(of.tolist()) - {-1} == set(range(budget))
    features, context = made_up(3, 7)
    features = replace(features, grid=ManyViews.of(views))
    for name in ("strided", "pooling", "HiPrune"):
        assert int(prune(PRUNERS[name], features, context, budget).keep.sum()) == budget


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


def test_dead_tokens_go_first_and_alive_ones_only_when_none_is_left():
    features, context = made_up()
    dead = torch.arange(16) < 6
    context = replace(context, groups=groups_of(dead))
    assert not bool((prune(PRUNERS["dead and sinks"], features, context, 10).keep & dead).any())
    assert int((prune(PRUNERS["dead and sinks"], features, context, 13).keep & dead).sum()) == 3
    assert int((prune(PRUNERS["dead and sinks"], features, context, 4).keep & ~dead).sum()) == 4


def test_the_codebook_removes_the_most_redundant_first():
    features, context = made_up()
    redundancy = context.codebook.redundancy(features.tokens)
    previous = None
    for budget in range(1, 17):
        keep = prune(PRUNERS["codebook"], features, context, budget).keep
        gone = redundancy[~keep]
        assert not len(gone) or float(redundancy[keep].max()) <= float(gone.min())
        assert previous is None or bool((previous & ~keep).sum() == 0)  # a larger budget keeps what a smaller one kept
        previous = keep


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


def test_what_a_selection_keeps_is_what_the_model_is_fed(tiny, prompts):
    features, prompt = features_of(tiny, prompts)[0], prompts[0]
    kept = prune(PRUNERS["DivPrune"], features, Context(), 5)
    shorter = kept.prompt(prompt)
    assert len(shorter) == len(prompt) - 11
    assert torch.equal(shorter.embeds[shorter.visual], prompt.embeds[prompt.visual][kept.keep])
    merged = prune(PRUNERS["pooling"], features, Context(), 4)
    shorter = merged.prompt(prompt)
    assert_close(shorter.embeds[shorter.visual], merged.merged)
    assert torch.equal(shorter.embeds[~shorter.visual], prompt.embeds[~prompt.visual])
    # and it is what Prune does with gaps closed
    mask = ~kept.keep
    with el.intervene(tiny, el.Prune(mask, positions="renumber")):
        expected = tiny.logits(prompt)
    assert_close(tiny.logits(kept.prompt(prompt)), expected, atol=1e-5, rtol=1e-4)


# --- inside the language model ---------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
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


def test_wrong_budgets_and_models_get_a_sentence(tiny, prompts):
    for rule in INSIDE.values():
        for schedule in (rule.left, rule.averaging):
            for budget in (0, 17):
                with pytest.raises(EmbedLensError, match="keep at least 1 and at most 16"):
                    schedule(16, 8, budget)
        with pytest.raises(EmbedLensError, match="the model has 1: use a pruner before layer 0"):
            rule.left(16, 1, 4)
    rule = INSIDE["FastV"]
    with pytest.raises(EmbedLensError, match="1 schedules for 3 prompts: pass one per prompt"):
        plans_inside(tiny, prompts, rule, [rule.left(16, 3, 4)])
    with pytest.raises(EmbedLensError, match="pass one per prompt, from FastV's `left`"):
        plans_inside(tiny, prompts, rule, [((7, 4),)] * 3)
    with pytest.raises(EmbedLensError, match="keep at least 1 and at most 16"):
        plans_inside(tiny, prompts, rule, [((2, 0),)] * 3)


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


def test_attention_is_read_as_an_intervention_leaves_it(tiny, prompts):
    masks = [torch.arange(16) % (3 + i) == 1 for i in range(3)]
    with el.intervene(tiny, el.LeaveAt(masks, 1)):
        found = [own for own, _ in attended(tiny, prompts, batch_size=2)]
    with eager(tiny):
        for prompt, mask, own in zip(prompts, masks, found, strict=True):
            for layer in (1, 2):
                looked = last_attention(tiny, prompt, [(~prompt.spread(mask), 1, False)], layer)
                assert_close(own[layer][~mask], looked[~mask], atol=1e-5, rtol=1e-4)
                assert not own[layer][mask].any()  # weight that is hidden goes to the others
            assert (own[0][mask] > 0).all()


@pytest.mark.parametrize("name", INSIDE)
def test_what_leaves_inside_is_what_the_last_position_looks_at_least_with_the_others_gone(tiny, prompts, name):
    rule = INSIDE[name]
    stages = [rule.left(16, tiny.n_layers, budget) for budget in (5, 3, 12)]
    plans = plans_inside(tiny, prompts, rule, stages, batch_size=2)
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


def test_known_attention_and_the_batch_size_change_no_choice(tiny, prompts):
    attention = [own for own, _ in attended(tiny, prompts)]
    for rule in INSIDE.values():
        stages = [rule.left(16, tiny.n_layers, 4)] * 3
        one, many = (
            plans_inside(tiny, prompts, rule, stages, given, size) for given, size in ((None, 1), (attention, 64))
        )
        for a, b in zip(one, many, strict=True):
            assert [value.layer for value in a] == [value.layer for value in b]
            assert all(torch.equal(x.mask, y.mask) for x, y in zip(a, b, strict=True))
