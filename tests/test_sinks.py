"""Sinks are measured as defined, in models that have them and in models that have none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sink_references import both_found, none_found
from torch.testing import assert_close

from embedlens import samples
from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, phi, ratios
from embedlens.interventions import SkipSublayers, intervene
from embedlens.sinks import (
    COLUMNS,
    KINDS,
    _commonest,
    _masks,
    _stream_row,
    aligner_of,
    attention_per_token,
    cosine_to_first,
    curve,
    followed,
    found_kinds,
    group_curves,
    group_means,
    highest,
    labels_of,
    leading_dims,
    most_alike_cluster,
    overlap,
    pair_cosines,
    pair_curve,
    places,
    queries_of,
    share_interval,
    sink_groups,
    sink_study,
    skip_effect,
    times,
)
from embedlens.tracing import Trace, trace

seeds = given(st.integers(0, 10_000))
few_examples = settings(max_examples=20, deadline=None)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pictures():
    return list(samples.load("miniworld", n=5))


@pytest.fixture(scope="module")
def prompts(tiny, pictures):
    return tiny.prompts([picture.image for picture in pictures], ["What?"] * len(pictures))


@pytest.fixture(scope="module")
def without_sinks(tiny) -> Reference:
    return none_found(tiny)


@pytest.fixture(scope="module")
def with_sinks(tiny, prompts, without_sinks) -> Reference:
    return both_found(tiny, prompts, without_sinks)


# --- on numbers ------------------------------------------------------------------------------------------------------


@seeds
@few_examples
def test_cosines_and_group_means_are_the_definitions_element_by_element(seed):
    states = normal(seed, 3, 6, 4)
    cosine = cosine_to_first(states)
    for layer in range(3):
        for token in range(6):
            a, b = states[layer, token].tolist(), states[layer, 0].tolist()
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            norm = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
            assert float(cosine[layer, token]) == pytest.approx(dot / norm, abs=1e-5)
    mask = normal(seed + 1, 6) > 0
    means = group_means(cosine, {"some": mask, "none": torch.zeros(6, dtype=torch.bool)})
    for layer in range(3):
        inside = [float(cosine[layer, token]) for token in range(6) if mask[token]]
        assert means[layer, 0] == pytest.approx(sum(inside) / len(inside), abs=1e-5) if inside else True
    assert np.isnan(means[:, 1]).all()


@seeds
@few_examples
def test_places_and_followed_tokens_agree_with_sorting_by_hand(seed):
    values = (normal(seed, 4, 7) * 2).round()  # rounded, so that there are ties
    rows = []
    for row in values.tolist():
        order = sorted(range(7), key=lambda i: (-row[i], i))
        rows.append([order.index(i) + 1 for i in range(7)])
    assert places(values).tolist() == rows
    chosen = sorted(range(7), key=lambda i: rows[2][i])[:3]
    assert followed(values, at=2, k=3).tolist() == [[rows[layer][i] for layer in range(4)] for i in chosen]
    assert highest(values[2], 3).tolist() == [i in chosen for i in range(7)]
    assert followed(values, at=2, k=99).shape == (7, 4)


@seeds
@few_examples
def test_attention_per_token_is_one_for_uniform_attention_and_counts_by_hand_otherwise(seed):
    n, queries = 9, torch.arange(9) >= 6
    uniform = torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(6, generator=torch.Generator().manual_seed(seed))[:3]] = True
    assert_close(attention_per_token(uniform[None][:, :, mask].sum(-1), 3, queries), torch.ones(1))
    weights = normal(seed, 2, n, n).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    found = attention_per_token(weights[:, :, mask].sum(-1), 3, queries)
    for layer in range(2):
        by_hand = [float(weights[layer, q, k]) * (q + 1) for q in range(6, 9) for k in range(n) if mask[k]]
        assert float(found[layer]) == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)
    assert attention_per_token(torch.ones(2, n), 0, queries).isnan().all()
    assert attention_per_token(torch.ones(2, n), 3, torch.zeros(n, dtype=torch.bool)).isnan().all()


@seeds
@few_examples
def test_overlap_is_set_arithmetic_over_all_pictures(seed):
    rng = np.random.default_rng(seed)
    first, second = ([rng.random(8) < share for _ in range(6)] for share in (0.4, 0.6))
    a = {(i, int(t)) for i, mask in enumerate(first) for t in np.flatnonzero(mask)}
    b = {(i, int(t)) for i, mask in enumerate(second) for t in np.flatnonzero(mask)}
    found = overlap(first, second)
    for value, by_hand in (
        (found.precision, (len(a & b), len(b))),
        (found.recall, (len(a & b), len(a))),
        (found.jaccard, (len(a & b), len(a | b))),
    ):
        assert float(value.value) == pytest.approx(by_hand[0] / by_hand[1])


def test_overlap_with_nothing_says_so_instead_of_dividing_by_zero():
    none, some = [np.zeros(3, dtype=bool)] * 2, [np.ones(3, dtype=bool)] * 2
    found = overlap(none, some)
    assert np.isnan(found.recall.value) and float(found.precision.value) == 0 and float(found.jaccard.value) == 0
    assert np.isnan(overlap(none, none).jaccard.value)
    with pytest.raises(EmbedLensError, match="one of each per picture"):
        overlap(none, some[:1])


def test_cosines_of_pairs_leave_out_pictures_that_have_none():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(4, 3, 5))
    means[2] = np.nan
    pairs = np.array([[0, 1], [1, 2], [3, 0]])
    found = pair_cosines(means, pairs)
    for row, (a, b) in enumerate(pairs):
        cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(means[a], means[b], strict=True)]
        assert found[row] == pytest.approx(np.mean(cosines), nan_ok=True)
    assert np.isnan(found).tolist() == [False, True, False]
    same = np.tile(means[0, 0], (4, 1))
    assert pair_cosines(same, pairs) == pytest.approx(1)
    assert pair_cosines(means[:, 0], pairs[:1], center=means[0, 0])[0] == 0  # nothing is left of the first


def test_the_cluster_that_is_alike_in_all_pictures_is_found_whatever_its_rank():
    common = torch.nn.functional.normalize(normal(0, 8), dim=-1)
    own = torch.nn.functional.normalize(normal(1, 4, 3, 8), dim=-1)
    where = [0, 2, 1, 2]
    for picture, rank in enumerate(where):
        own[picture, rank] = common
    pairs = np.array([[a, b] for a in range(4) for b in range(4) if a != b])
    assert most_alike_cluster(list(own), pairs).tolist() == where


@seeds
@few_examples
def test_the_most_alike_cluster_is_the_best_match_in_every_partner_averaged(seed):
    means = [torch.nn.functional.normalize(normal(seed + i, 2 + i, 3), dim=-1) for i in range(4)]
    pairs = np.array([[0, 1], [0, 3], [1, 0], [2, 1], [3, 2], [3, 0]])
    for picture, found in enumerate(most_alike_cluster(means, pairs)):
        partners = [other for one, other in pairs if one == picture]
        scores = [sum(max(float(c @ o) for o in means[other]) for other in partners) for c in means[picture]]
        assert scores[found] == pytest.approx(max(scores), abs=1e-6)


def test_the_first_token_is_no_text_and_queries_come_after_the_picture(tiny, prompts, without_sinks):
    prompt = prompts[0]
    masks = _masks(prompt, sink_groups(tiny, [prompt], without_sinks)[0])
    assert sum(mask.int() for mask in masks.values()).eq(1).all()  # every position in one set
    assert masks["first"].nonzero().tolist() == [[0]] and not masks["text"][0]
    last = max(i for i, visual in enumerate(prompt.visual.tolist()) if visual)
    assert queries_of(prompt).nonzero()[:, 0].tolist() == list(range(last + 1, len(prompt)))


def test_an_absence_has_the_exact_upper_bound():
    value, low, high = share_interval(0, 200)
    assert (float(value), float(low)) == (0, 0) and float(high) == pytest.approx(1 - 0.025 ** (1 / 200))
    assert [float(part) for part in share_interval(3, 3)][0] == 1
    with pytest.raises(EmbedLensError, match="at least one"):
        share_interval(0, 0)


def test_what_no_picture_has_is_nan_and_is_left_out_of_figures():
    values = np.random.default_rng(0).normal(size=(4, 3, len(COLUMNS)))
    values[:, :, 1], values[0, :, 2] = np.nan, np.nan
    assert list(group_curves(values)) == ["ViT sink", "dead", "alive", "text"]
    np.testing.assert_allclose(group_curves(values)["dead"].value, values[1:, :, 2].mean(0))
    assert curve(values).value.shape == (3, len(COLUMNS)) and np.isnan(curve(values[:, 0, 1]).value)
    assert float(times(values[:, 0, 2], values[:, 0, 0]).value) == pytest.approx(
        values[1:, 0, 2].sum() / values[1:, 0, 0].sum()
    )
    assert np.isnan(times(values[:, 0, 1], values[:, 0, 0]).value)
    pairs = np.array([[0, 1], [1, 2]])
    assert np.isnan(pair_curve(np.full(2, np.nan), pairs).value)
    assert float(pair_curve(np.array([1.0, np.nan]), pairs).value) == 1
    assert _commonest(np.array([-1, -1])) is None and _commonest(np.array([4, 2, 4, -1, -1, -1])) == 4


def test_leading_dimensions_are_those_the_first_token_excites_between_the_ends():
    of_first = np.ones((6, 9))
    of_first[0, 1] = of_first[-1, 2] = 50  # the ends do not count
    of_first[1:-1, 7], of_first[1:-1, 4] = 20, 30
    assert leading_dims(of_first) == (4, 7)


# --- which tokens ----------------------------------------------------------------------------------------------------


def test_a_model_without_sinks_gets_the_tokens_that_come_nearest(tiny, prompts, without_sinks):
    assert not any(found_kinds(without_sinks).values())
    groups = sink_groups(tiny, prompts, without_sinks, few=3)
    norms = tiny.tower_states(prompts)[:, -1].norm(dim=-1)
    for prompt, found, norm in zip(prompts, groups, norms, strict=True):
        assert set(norm.topk(3).indices.tolist()) == set(found.met["ViT sink"].nonzero()[:, 0].tolist())
        stream = tiny.hidden_states(prompt)
        dims = leading_dims(ratios(stream[:, 0]).numpy())
        excited = phi(stream[min(2, tiny.n_layers), prompt.visual], dims)
        assert set(excited.topk(3).indices.tolist()) == set(found.met["LLM sink"].nonzero()[:, 0].tolist())
        assert sum(mask.int() for mask in found.named.values()).eq(1).all()
    assert labels_of(without_sinks)["ViT sink"] == "5 highest-norm patches"


def test_a_model_with_sinks_gets_no_stand_ins(tiny, prompts, with_sinks):
    assert found_kinds(with_sinks) == {"ViT sink": True, "LLM sink": True, "dead": False}
    assert labels_of(with_sinks)["LLM sink"] == "LLM sinks"
    norms = tiny.tower_states(prompts)[:, -1].norm(dim=-1)
    for found, norm in zip(sink_groups(tiny, prompts, with_sinks), norms, strict=True):
        assert torch.equal(found.met["ViT sink"], norm > with_sinks.vit_norm)


# --- planted sinks ---------------------------------------------------------------------------------------------------


def planted(prompt, n_layers: int, planted_at: list[int], aligner: int, width: int) -> Trace:
    """A stream in which some visual tokens take the first token's direction at one sublayer and keep it."""
    length = len(prompt)
    start = normal(0, length, width)
    states = start[None].repeat(2 * n_layers + 1, 1, 1) + 0.01 * normal(1, 2 * n_layers + 1, length, width)
    states[:, 0, 5] = 40.0
    for row, token in enumerate(planted_at):
        states[aligner:, token] = (2 + row) * states[aligner:, 0] + 0.01 * row * normal(2 + row, width)
    even = {name: torch.full((n_layers, length), 0.1) for name in (*COLUMNS, "first")}
    return Trace(states[::2], states[1::2], even)


def test_planted_sinks_jump_at_the_aligner_and_stay_first(tiny, prompts, without_sinks):
    prompt, layers = prompts[0], 4
    visual = prompt.visual.nonzero()[:, 0].tolist()
    sinks, aligner = visual[3:6], aligner_of(layers)
    mask = torch.zeros(len(visual), dtype=torch.bool)
    mask[3:6] = True
    groups = sink_groups(tiny, [prompt], without_sinks)[0]
    met = {**groups.met, "LLM sink": mask, "ViT sink": ~mask, "dead": torch.zeros_like(mask)}
    empty = torch.zeros_like(mask)
    groups = replace(groups, vit_sink=~mask, llm_sink=mask, dead=empty, alive=empty, met=met)
    seen = planted(prompt, layers, sinks, aligner, 32)
    row = _stream_row(seen, prompt, groups, _masks(prompt, groups), without_sinks, 3)
    of_sinks, of_others = row["cosine"][:, COLUMNS.index("LLM sink")], row["cosine"][:, COLUMNS.index("ViT sink")]
    assert int(np.diff(of_sinks).argmax()) + 1 == aligner and of_sinks[aligner:].min() > 0.95
    assert abs(of_sinks[:aligner]).max() < 0.5 and abs(of_others).max() < 0.5
    assert (row["places"][:, aligner:] <= 3).all() and not (row["places"][:, :aligner] <= 3).all()
    assert row["dims"][0] == 5
    after = aligner // 2
    assert (row["phi"][after:, 1] > 4).all() and (row["phi"][:after, 1] < 4).all() and (row["phi"][:, 0] < 4).all()
    assert np.isnan(row["cosine"][:, COLUMNS.index("dead")]).all()  # an empty group is no zero


# --- the whole study -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["with_sinks", "without_sinks"])
def test_the_study_agrees_with_one_prompt_at_a_time(tiny, pictures, kind, request):
    reference = request.getfixturevalue(kind)
    study = sink_study(tiny, pictures, reference, few=3, repeats=2, batch_size=2)
    assert len(study) == len(pictures) and study.first_moves < 1e-5
    for at, picture in enumerate(pictures[:2]):
        prompt = tiny.prompt(picture.image, "What is in the picture?")
        groups = sink_groups(tiny, [prompt], reference, few=3)[0]
        masks = _masks(prompt, groups)
        seen = trace(tiny, prompt, masks)
        cosine = cosine_to_first(seen.sublayers)
        size = int(masks["LLM sink"].sum())
        for column, name in enumerate(COLUMNS):
            by_hand = cosine[:, masks[name]].mean(-1).double().numpy()
            np.testing.assert_allclose(study.cosine[at, :, column], by_hand, atol=1e-4)
        queries = queries_of(prompt)
        assert queries.any() and not (queries & prompt.visual).any()
        received = attention_per_token(seen.attention["LLM sink"], size, queries)
        np.testing.assert_allclose(study.attention[at, :, 1], received.numpy(), rtol=1e-3)
        np.testing.assert_allclose(study.norms[at], tiny.tower_states([prompt])[0].norm(dim=-1).numpy(), rtol=1e-4)
        tokens = prompt.embeds[prompt.visual]
        for number, name in enumerate(KINDS):
            mask = groups.met[name]
            if not bool(mask.any()):
                assert np.isnan(study.means[number, at]).all() and study.words[number, at] == -1
                continue
            mean = torch.nn.functional.normalize(tokens[mask], dim=-1).mean(0)
            np.testing.assert_allclose(study.means[number, at], mean.numpy(), atol=1e-5)
    assert study.kept[:, study.aligner] == pytest.approx(1)
    assert study.kept_by_chance == pytest.approx(3 / len(prompt.grid))
    own, random = study.agreeing("ViT sink")
    assert np.nanmax(own) == 1 and 0 <= np.nanmin(random) <= np.nanmax(random) <= 1
    inside = study.in_cluster("LLM sink", np.zeros(len(study), dtype=int))
    assert inside[0, 1] == pytest.approx((study.clusters[0] == 0).mean())
    assert len(study.norm_fences) == len(study.norms[0]) and len(study.ratio_fences) == tiny.n_layers + 1


def test_no_pictures_are_refused(tiny, without_sinks):
    with pytest.raises(EmbedLensError, match="at least one picture"):
        sink_study(tiny, [], without_sinks)


def test_skipping_changes_the_tokens_it_skips_as_one_prompt_alone_does(tiny, prompts):
    masks = [torch.arange(len(p.grid)) % 5 == 1 for p in prompts]
    masks[1] = torch.zeros_like(masks[1])
    found = skip_effect(tiny, prompts, masks, at=0.5, batch_size=2)
    assert np.isnan(found.cosine[1]).all() and not np.isnan(found.cosine[[0, 2, 3, 4]]).any()
    prompt, own = prompts[2], prompts[2].spread(masks[2])
    with intervene(tiny, SkipSublayers(masks[2], at=[0.5])):
        seen = trace(tiny, prompt, {"own": own})
    np.testing.assert_allclose(found.cosine[2, 1], cosine_to_first(seen.sublayers)[:, own].mean(-1).numpy(), atol=1e-4)
    by_hand = seen.attention["own"][:, queries_of(prompt)].mean(-1).numpy()
    np.testing.assert_allclose(found.mass[2, 1], by_hand, rtol=1e-3)
    assert np.abs(found.cosine[2, 1] - found.cosine[2, 0])[2] > 1e-6  # and it did change something at MLP-1
    np.testing.assert_allclose(found.cosine[2, 2, :3], found.cosine[2, 0, :3], atol=1e-5)  # others' MLP is not theirs
    change = found.change("skipped", slice(2, None))
    np.testing.assert_allclose(change[2, 0], (found.cosine[2, 1] - found.cosine[2, 0])[2:].mean())


def test_skipping_nothing_anywhere_is_no_measurement(tiny, prompts):
    nothing = [torch.zeros(len(p.grid), dtype=torch.bool) for p in prompts]
    assert np.isnan(skip_effect(tiny, prompts, nothing, at=0.5).mass).all()
