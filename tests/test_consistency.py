"""Likeness, drift, attention and entropy of groups of tokens, against what the words mean computed one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from embedlens import samples
from embedlens.consistency import (
    ARMS,
    SELECTION,
    arms,
    common,
    entropy,
    group_means,
    group_study,
    halves,
    is_word,
    layer_cosines,
    membership_for,
    pairwise_cosine,
    selection_study,
)
from embedlens.errors import EmbedLensError
from embedlens.groups import QUESTION, discover, token_groups_of
from embedlens.lenses import EmbedLens
from embedlens.tracing import trace


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(cosine_similarity(a.double(), b.double(), dim=0))


@pytest.fixture(scope="module")
def pictures():
    return samples.load("miniworld", n=5)


@pytest.fixture(scope="module")
def reference(tiny, pictures):
    """A reference under which some tokens are dead by their word, so that both memberships have something to do."""
    found = discover(tiny, pictures[:2])
    tokens = torch.cat([prompt.embeds[prompt.visual] for prompt in tiny.prompts([pictures[3].image], [QUESTION])])
    words = EmbedLens.from_model(tiny).topk(tokens, 3)[1].flatten()
    return replace(found, dead_id=int(words.bincount().argmax()))


@pytest.fixture(scope="module")
def shared(tiny, pictures, reference):
    return common(tiny, pictures[:2], reference, "cluster", batch_size=1)


@pytest.fixture(scope="module")
def study(tiny, pictures, reference, shared):
    return group_study(tiny, pictures[2:], reference, shared, "cluster", batch_size=2)


@pytest.mark.parametrize("seed", range(8))
def test_pairwise_cosine_is_the_mean_over_pairs(seed):
    tokens = seeded(2, 9, 5, seed=seed) + 0.5
    tokens[0, 3] = 0
    masks = seeded(3, 9, seed=seed + 100) > 0
    masks[0], masks[1, 1:] = True, False
    found = pairwise_cosine(tokens, masks)
    for layer in range(2):
        for group in range(3):
            chosen = [i for i in range(9) if masks[group, i]]
            pairs = [cosine(tokens[layer, i], tokens[layer, j]) for i in chosen for j in chosen if i != j]
            if len(pairs):
                assert float(found[layer, group]) == pytest.approx(np.mean(pairs), abs=1e-5)
            else:
                assert math.isnan(float(found[layer, group]))


@pytest.mark.parametrize("seed", range(8))
def test_entropy_is_its_definition_and_survives_impossible_entries(seed):
    logits = 5 * seeded(4, 11, seed=seed)
    logits[0, 3] = -torch.inf
    for row, found in zip(logits, entropy(logits), strict=True):
        shares = [math.exp(x) for x in row.double().tolist()]
        shares = [share / sum(shares) for share in shares]
        assert float(found) == pytest.approx(-sum(p * math.log(p) for p in shares if p), rel=1e-4)
    assert float(entropy(torch.zeros(50))) == pytest.approx(math.log(50))


def test_group_means_and_layer_cosines_are_what_loops_give():
    states, masks = seeded(3, 6, 4), torch.tensor([[True, False, True, True, False, False], [False] * 6])
    map_ = layer_cosines(states)
    for a in range(3):
        for b in range(3):
            for i in range(6):
                assert float(map_[a, b, i]) == pytest.approx(cosine(states[a, i], states[b, i]), abs=1e-6)
    found = group_means(map_, masks)
    assert float(found[0, 1, 0]) == pytest.approx(float(map_[0, 1, [0, 2, 3]].mean()), abs=1e-6)
    assert bool(found[..., 1].isnan().all())


def test_arms_cover_the_groups_and_random_tokens_are_as_many_as_dead(tiny, pictures, reference):
    prompt = tiny.prompt(pictures[2].image, QUESTION)
    groups = token_groups_of(tiny, [prompt], reference, "cluster")[0]
    norms = torch.arange(len(prompt.grid), dtype=torch.float32)
    found = arms(groups, norms, seed=(0, 1))
    assert set(found) == set(ARMS)
    assert found["random"].sum() == found["dead"].sum() > 0
    assert bool((found["remaining"] == ~found["dead"]).all())
    assert found["highest norm"].nonzero()[:, 0].tolist() == list(range(len(norms)))[-5:]
    assert bool((arms(groups, norms, (0, 1))["random"] == found["random"]).all())
    draws = [arms(groups, norms, (0, at))["random"].tolist() for at in range(20)]
    assert found["dead"].all() or len({tuple(draw) for draw in draws}) > 1


@pytest.mark.parametrize("membership", ["cluster", "top3"])
def test_the_study_is_what_one_picture_after_the_other_gives(tiny, pictures, reference, membership):
    shared = common(tiny, pictures[:2], reference, membership)
    study = group_study(tiny, pictures[2:], reference, shared, membership, batch_size=2)
    seen = 0
    for at, picture in enumerate(pictures[2:]):
        prompt = tiny.prompt(picture.image, QUESTION)
        groups = token_groups_of(tiny, [prompt], reference, membership)[0]
        masks = {"dead": prompt.spread(groups.dead), "visual": prompt.visual}
        run = trace(tiny, prompt, masks)
        chosen = groups.dead.nonzero()[:, 0].tolist()
        assert study.sizes[at, 1] == len(chosen)
        if not chosen:
            assert np.isnan(study.of("entropy", "dead")[at])
            continue
        seen += 1
        asking = torch.arange(len(prompt)) > int(prompt.visual.nonzero()[-1])
        states = run.stream[:, prompt.visual]
        for layer in range(tiny.n_layers):
            of_all = run.attention["dead"][layer][asking].mean()
            of_visual = of_all / run.attention["visual"][layer][asking].mean()
            assert study.of("attention", "dead")[at, layer] == pytest.approx(float(of_all), abs=1e-5)
            assert study.attention_of_visual("dead")[at, layer] == pytest.approx(float(of_visual), abs=1e-4)
            assert study.attention_per_token("dead")[at, layer] == pytest.approx(float(of_all) / len(chosen), abs=1e-5)
            kept = np.mean([cosine(states[layer, i], states[layer + 1, i]) for i in chosen])
            assert study.of("kept", "dead")[at, layer] == pytest.approx(kept, abs=1e-5)
            direction = shared.direction["dead"][layer]
            aligned = np.mean([cosine(states[layer, i], direction) for i in chosen])
            assert study.of("aligned", "dead")[at, layer] == pytest.approx(aligned, abs=1e-5)
            center = shared.center[layer]
            removed = [cosine(normalize(states[layer, i], dim=0) - center, direction - center) for i in chosen]
            assert study.of("aligned_removed", "dead")[at, layer] == pytest.approx(np.mean(removed), abs=1e-4)
        logits = tiny.logits(prompt)[prompt.visual][chosen]
        assert study.of("entropy", "dead")[at] == pytest.approx(float(entropy(logits).mean()), abs=1e-3)
        tower = tiny.tower_states([prompt])[0]
        norms = tower[:, chosen].norm(dim=-1).mean(-1)
        assert study.of("tower_norms", "dead")[at] == pytest.approx(norms.double().numpy(), rel=1e-5)
        nearest = EmbedLens.from_model(tiny).words(prompt.embeds[prompt.visual][chosen], 1)
        no_words = np.mean([not is_word(words[0]) for words in nearest])
        assert study.of("no_words", "dead")[at] == pytest.approx(no_words)
    assert seen


def test_common_is_the_mean_of_all_tokens_whatever_the_batches(tiny, pictures, reference, shared):
    prompts = tiny.prompts([picture.image for picture in pictures[:2]], [QUESTION] * 2)
    tokens = torch.cat([prompt.embeds[prompt.visual] for prompt in prompts])
    torch.testing.assert_close(shared.center[0], normalize(tokens, dim=-1).mean(0), atol=1e-6, rtol=1e-5)
    together = common(tiny, pictures[:2], reference, "cluster", batch_size=2)
    torch.testing.assert_close(shared.direction["dead"], together.direction["dead"], atol=1e-5, rtol=1e-4)
    assert shared.n_pictures == 2 and "ViT sink" not in shared.direction
    with pytest.raises(EmbedLensError, match="no samples"):
        common(tiny, [], reference)


def test_groups_without_tokens_are_nan_and_nothing_else(study):
    assert not study.has("ViT sink") and study.has("dead", 2)
    assert np.isnan(study.of("inside", "ViT sink")).all() and np.isfinite(study.of("inside", "dead")).any()
    assert (study.attention_per_token("dead") >= 0).all() and np.isnan(study.attention_per_token("ViT sink")).all()
    assert np.allclose(study.share("dead") + study.share("remaining"), 1)
    with pytest.raises(EmbedLensError, match="no group 'undead'"):
        study.of("inside", "undead")


def test_the_stand_in_is_taken_where_no_word_marks_dead_tokens(tiny, pictures, reference):
    assert membership_for(tiny, pictures, replace(reference, dead_id=None)) == "cluster"
    assert membership_for(tiny, [pictures[3]], reference) == "top3"
    lens, tokens = EmbedLens.from_model(tiny), tiny.visual_features([picture.image for picture in pictures])
    seen = set(lens.topk(tokens, 3)[1].flatten().tolist())
    absent = next(index for index in range(len(tiny.tokens)) if index not in seen)
    assert membership_for(tiny, pictures, replace(reference, dead_id=absent)) == "cluster"


def test_halves_are_disjoint_and_both_are_selected_on():
    for chosen, rest in halves(11, splits=2, seed=3):
        assert sorted([*chosen.tolist(), *rest.tolist()]) == list(range(11))
    assert len(halves(11, splits=2)) == 4
    assert [a.tolist() for a, _ in halves(11)] == [a.tolist() for a, _ in halves(11)]


@pytest.mark.parametrize("membership", ["cluster", "top3"])
def test_likeness_made_by_choosing_shows_as_the_gap_between_the_halves(tiny, pictures, reference, shared, membership):
    found = selection_study(tiny, pictures[2:], reference, shared, membership, splits=2)
    assert found.shape == (3, len(SELECTION)) and (np.isnan(found).all(1) == np.isnan(found).any(1)).all()
    chosen = found[~np.isnan(found[:, 0])]
    assert len(chosen) and (np.abs(chosen) <= 1 + 1e-6).all()
    if membership == "cluster":  # random tokens cluster by chance only, so the other half does not know of it
        assert (chosen[:, 0] >= chosen[:, 1]).all()
    with pytest.raises(EmbedLensError, match="no samples"):
        selection_study(tiny, [], reference, shared)
