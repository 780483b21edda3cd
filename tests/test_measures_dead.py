"""Likeness, drift, attention and entropy of groups of tokens, against what the words mean computed one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

import embedlens as el
from embedlens import samples
from embedlens.errors import EmbedLensError
from embedlens.groups import discover, token_groups_of
from embedlens.lenses import EmbedLens
from embedlens.measures.dead import (
    GROUPS,
    by_group,
    checked,
    chosen_by_half,
    common,
    is_word,
    masks_of,
    pairwise_cosine,
)
from embedlens.tracing import trace
from embedlens.vlm import QUESTION


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
    return common(tiny, pictures[:2], reference, batch_size=1)


@pytest.fixture(scope="module")
def rows(tiny, pictures, reference, shared):
    return el.run(partial(by_group, reference=reference, shared=shared), tiny, pictures[2:], batch_size=2)


def cell(rows, picture, part, group, name):
    """One value, by layer."""
    own = rows[(rows.id == picture) & (rows.part == part) & (rows.group == group)]
    return own.sort_values("layer")[name].dropna().tolist()


@pytest.mark.parametrize("seed", range(2))
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


def test_random_tokens_are_as_many_as_dead_and_hang_on_picture_and_seed_alone(tiny, pictures, reference):
    prompts = tiny.prompts([picture.image for picture in pictures], [QUESTION] * len(pictures))
    found = masks_of(tiny, pictures, prompts, reference, seed=0)
    assert sum(int(masks["dead"].sum()) for masks in found)
    for masks, picture, prompt in zip(found, pictures, prompts, strict=True):
        assert tuple(masks) == GROUPS and masks["random"].sum() == masks["dead"].sum()
        assert torch.equal(masks["remaining"], ~masks["dead"])
        (alone,), (other,) = (masks_of(tiny, [picture], [prompt], reference, seed) for seed in (0, 1))
        assert torch.equal(alone["random"], masks["random"])
        assert not 3 < masks["dead"].sum() < 13 or not torch.equal(other["random"], masks["random"])


def test_rows_do_not_hang_on_batches_or_on_the_pictures_before(tiny, pictures, reference, shared, rows):
    alone = el.run(partial(by_group, reference=reference, shared=shared), tiny, pictures[4:], batch_size=1)
    for where, name in (("picture", "entropy"), ("stream", "inside"), ("stream", "attention"), ("tower", "norm")):
        for group in ("dead", "random", "remaining"):
            wanted = cell(alone, 4, where, group, name)
            assert cell(rows, 4, where, group, name) == pytest.approx(wanted, abs=1e-4, rel=1e-4)


def test_rows_are_what_one_picture_after_the_other_gives(tiny, pictures, reference, shared, rows):
    seen = 0
    for picture in pictures[2:]:
        prompt = tiny.prompt(picture.image, QUESTION)
        groups = token_groups_of(tiny, [prompt], reference)[0]
        run = trace(tiny, prompt, {"dead": prompt.spread(groups.dead), "visual": prompt.visual})
        chosen = groups.dead.nonzero()[:, 0].tolist()
        of = partial(cell, rows, picture.id)
        assert of("picture", "dead", "tokens") == ([len(chosen)] if chosen else [])
        if not chosen:
            continue
        seen += 1
        assert of("picture", "dead", "share") == pytest.approx([len(chosen) / len(groups.dead)])
        asking = torch.arange(len(prompt)) > int(prompt.visual.nonzero()[-1])
        states = run.stream[:, prompt.visual]
        of_all = [float(run.attention["dead"][layer][asking].mean()) for layer in range(tiny.n_layers)]
        visual = [float(run.attention["visual"][layer][asking].mean()) for layer in range(tiny.n_layers)]
        assert of("stream", "dead", "attention") == pytest.approx(of_all, abs=1e-5)
        assert of("stream", "dead", "of_visual") == pytest.approx(np.divide(of_all, visual).tolist(), abs=1e-4)
        assert of("stream", "dead", "per_token") == pytest.approx([part / len(chosen) for part in of_all], abs=1e-5)
        kept = [np.mean([cosine(a[i], b[i]) for i in chosen]) for a, b in zip(states[:-1], states[1:], strict=True)]
        assert of("stream", "dead", "kept") == pytest.approx(kept, abs=1e-5)
        pairs = [
            np.mean([cosine(h[i], h[j]) for i in chosen for j in chosen if i != j]) for h in states if len(chosen) > 1
        ]
        assert of("stream", "dead", "inside") == pytest.approx(pairs, abs=1e-4)
        aligned, removed = [], []
        for h, direction, center in zip(states, shared["stream"]["dead"], shared["stream"]["all"], strict=True):
            aligned.append(np.mean([cosine(h[i], direction) for i in chosen]))
            removed.append(np.mean([cosine(normalize(h[i], dim=0) - center, direction - center) for i in chosen]))
        assert of("stream", "dead", "aligned") == pytest.approx(aligned, abs=1e-5)
        assert of("stream", "dead", "aligned_removed") == pytest.approx(removed, abs=1e-4)
        shares = tiny.logits(prompt)[prompt.visual][chosen].double().softmax(-1)
        nats = -(shares * shares.log()).sum(-1)
        assert of("picture", "dead", "entropy") == pytest.approx([float(nats.mean())], abs=1e-3)
        tower = torch.stack(tiny.tower_states_of([prompt]))[0][:, chosen]
        assert of("tower", "dead", "norm") == pytest.approx(tower.norm(dim=-1).mean(-1).tolist(), rel=1e-5)
        assert of("tower", "dead", "norm_l1") == pytest.approx(tower.abs().sum(-1).mean(-1).tolist(), rel=1e-5)
        nearest = EmbedLens.from_model(tiny).words(prompt.embeds[prompt.visual][chosen], 1)
        no_words = np.mean([not is_word(words[0]) for words in nearest])
        assert of("picture", "dead", "no_words") == pytest.approx([no_words])
    assert seen


def test_common_is_the_mean_of_all_tokens_whatever_the_batches(tiny, pictures, reference, shared):
    prompts = tiny.prompts([picture.image for picture in pictures[:2]], [QUESTION] * 2)
    tokens = torch.cat([prompt.embeds[prompt.visual] for prompt in prompts])
    torch.testing.assert_close(shared["stream"]["all"][0], normalize(tokens, dim=-1).mean(0), atol=1e-6, rtol=1e-5)
    together = common(tiny, pictures[:2], reference, batch_size=2)
    for where in ("stream", "tower"):
        own, other = shared[where]["remaining"], together[where]["remaining"]
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)
    assert "ViT sink" not in shared["stream"]
    with pytest.raises(EmbedLensError, match="no samples"):
        common(tiny, [], reference)


def test_a_group_without_tokens_has_no_rows_and_nothing_is_nan_that_is_there(tiny, pictures, reference, rows):
    assert "ViT sink" not in set(rows.group) and "dead" in set(rows.group)
    own = rows[(rows.part == "picture") & (rows.group != "random directions")]
    assert own[["tokens", "share", "in_bars", "no_words", "entropy"]].notna().all(axis=None)
    parts = own[own.group.isin(["dead", "remaining"])].groupby("id").share.sum()
    assert parts.to_numpy() == pytest.approx(1)
    none = replace(reference, dead_id=None)
    wordless = common(tiny, pictures[:2], none)
    found = el.run(partial(by_group, reference=none, shared=wordless), tiny, pictures[2:], batch_size=3)
    assert set(found.group) == {"alive", "remaining", "random directions"}  # no stand-in


def test_a_dead_word_stands_only_if_both_halves_of_the_pictures_have_tokens_near_it(tiny, pictures, reference):
    assert checked(tiny, [pictures[3]], reference) is reference
    lens, tokens = EmbedLens.from_model(tiny), torch.stack(tiny.visual_features_of([p.image for p in pictures]))
    seen = set(lens.topk(tokens, 3)[1].flatten().tolist())
    absent = next(index for index in range(len(tiny.tokens)) if index not in seen)
    assert checked(tiny, pictures, replace(reference, dead_id=absent)).dead_id is None
    assert checked(tiny, pictures, replace(reference, dead_id=None)).dead_id is None


def test_likeness_is_measured_on_the_half_that_did_not_choose(tiny, pictures, reference, shared):
    tokens = tiny.visual_features_of([pictures[3].image])[0].float()
    words, order = {}, torch.from_numpy(np.random.default_rng((0, 0)).permutation(tiny.width))
    one, other = order[: tiny.width // 2], order[tiny.width // 2 :]
    for chosen, rest in ((one, other), (other, one)):
        lens = EmbedLens(tiny.input_embeddings[:, chosen], tiny.tokens)
        words[rest] = lens.topk(tokens[:, chosen], 3)[1]
    often = int(torch.cat(list(words.values())).flatten().bincount().argmax())
    each = []
    for rest, ids in words.items():
        own = (ids == often).any(-1).nonzero()[:, 0].tolist()
        pairs = [cosine(tokens[i, rest], tokens[j, rest]) for i in own for j in own if i != j]
        each += [np.mean(pairs)] if pairs else []
    study = partial(chosen_by_half, reference=replace(reference, dead_id=often), shared=shared, splits=1)
    (row,) = study(tiny, [pictures[3]])[0]
    assert row["other_half"] == pytest.approx(np.mean(each), abs=1e-4)
    assert all(abs(value) <= 1 + 1e-6 for value in row.values())
    assert chosen_by_half(tiny, [pictures[3]], replace(reference, dead_id=None), shared) == [[]]
