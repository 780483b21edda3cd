"""The groups are a partition, found by a written procedure in any model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from embedlens import groups as found_by
from embedlens import samples
from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, TokenGroups, discover, phi, token_groups, token_groups_of
from embedlens.lenses import EmbedLens


@pytest.fixture(scope="module")
def reference(tiny) -> Reference:
    return discover(tiny, samples.load("miniworld", n=4, split="train"))


@pytest.fixture(scope="module")
def prompts(tiny):
    pictures = samples.load("miniworld", n=3)
    return tiny.prompts([picture.image for picture in pictures], ["What?", "What is it?", "And here?"])


def with_every_group(tiny, prompts, reference) -> Reference:
    """A reference under which each group has some tokens, so that the partition is put to the test."""
    lens = EmbedLens.from_model(tiny)
    tokens = torch.cat([prompt.embeds[prompt.visual] for prompt in prompts])
    norms = torch.stack(tiny.tower_states_of(prompts))[:, -1].norm(dim=-1)
    stream = tiny.hidden_states(prompts[0])[1]
    return replace(
        reference,
        vit_norm=float(norms.median()),
        sink_dims=(3, 7),
        sink_layer=1,
        phi_threshold=float(phi(stream[prompts[0].visual], (3, 7)).median()),
        dead_id=int(lens.topk(tokens, 1)[1][0, 0]),
        vit_sink_id=int(lens.topk(tokens, 1)[1][1, 0]),
        llm_sink_id=int(lens.topk(tokens, 1)[1][2, 0]),
    )


def test_phi_is_the_definition_computed_element_by_element():
    h, dims = torch.randn(30, 12, generator=torch.Generator().manual_seed(0)), (2, 5, 11)
    for row, found in zip(h.tolist(), phi(h, dims).tolist(), strict=True):
        rms = (sum(x * x for x in row) / len(row)) ** 0.5
        assert found == pytest.approx(max(abs(row[d]) / rms for d in dims), rel=1e-5)
    assert phi(torch.ones(2, 4), ()).tolist() == [0, 0] and phi(torch.zeros(1, 4), (1,)).tolist() == [0]


def test_the_fence_lets_ordinary_values_pass_and_planted_outliers_not():
    ordinary = np.exp(np.random.default_rng(0).normal(0, 0.3, 20_000))
    assert (ordinary > found_by.fence(ordinary)).mean() < 1e-3
    assert found_by.fence(np.concatenate([ordinary, np.full(200, 50.0)])) < 50


def test_a_sink_dimension_is_found_in_a_narrow_model_too():
    """|x|/RMS ends at √width: in SmolLM2 (576) a fence drawn on it lay above, and 39 % of the attention was no sink."""
    largest = np.exp(np.random.default_rng(0).normal(np.log(13), 0.2, (10, 9, 64))).clip(max=23)
    first = np.ones((9, 576))
    first[2:, 507] = 23.8
    assert found_by.fence(largest.ravel()) > 576**0.5 and found_by.sink_dims(first, largest)[0] == (507,)


def test_the_text_distant_cluster_is_the_largest_that_lies_away_from_words():
    words = torch.nn.functional.normalize(torch.ones(8), dim=0)
    near = words + 0.01 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    far = -words + 0.01 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    found = found_by.text_distant_cluster(torch.cat([near, far]), words)
    assert found.tolist() == [False] * 6 + [True] * 4
    assert not found_by.text_distant_cluster(torch.eye(8), words).any()  # no cluster of two


@pytest.mark.parametrize("membership", found_by.MEMBERSHIPS)
def test_the_groups_are_a_partition(tiny, prompts, reference, membership):
    several = with_every_group(tiny, prompts, reference)
    found = token_groups_of(tiny, prompts, several, membership, batch_size=2)
    for groups, prompt in zip(found, prompts, strict=True):
        assert groups.names == token_groups(tiny, prompt, several, membership).names  # one by one equals together
        masks = torch.stack(list(groups.named.values()))
        assert masks.shape == (4, len(prompt.grid)) and bool((masks.sum(0) == 1).all())
        assert [name for name, mask in groups.named.items() if mask[0]] == groups.names[:1]
        for name, met in groups.met.items():
            assert not (groups.named[name] & ~met).any()
    total = torch.stack([torch.stack(list(groups.named.values())).sum(1) for groups in found]).sum(0)
    assert bool((total > 0).sum() >= 3), "the test needs several groups with tokens"
    none = replace(reference, vit_norm=None, sink_dims=(), sink_layer=None, phi_threshold=None, dead_id=None)
    assert bool(token_groups(tiny, prompts[0], none, membership).alive.all())
    assert set(reference.notes) == {"ViT sink", "LLM sink", "dead"}  # each says how it was found


def test_membership_equals_its_definition(tiny, prompts, reference):
    several = with_every_group(tiny, prompts, reference)
    tokens = prompts[0].embeds[prompts[0].visual]
    rows = torch.nn.functional.normalize(tiny.input_embeddings, dim=-1)
    cosines = torch.nn.functional.normalize(tokens, dim=-1) @ rows.T
    expected = [several.dead_id in row.topk(3).indices.tolist() for row in cosines]
    groups = token_groups(tiny, prompts[0], several)
    assert groups.met["dead"].tolist() == expected and any(expected)
    norms = torch.stack(tiny.tower_states_of(prompts[:1]))[0, -1].norm(dim=-1)
    assert groups.met["ViT sink"].tolist() == (norms > several.vit_norm).tolist()
    assert not found_by.near_word(tokens, EmbedLens.from_model(tiny), None).any()


def test_what_does_not_fit_is_refused(tiny, prompts, reference):
    with pytest.raises(EmbedLensError, match="run discover on this model"):
        token_groups(tiny, prompts[0], replace(reference, width=4096))
    with pytest.raises(EmbedLensError, match="unknown membership"):
        token_groups(tiny, prompts[0], reference, "nearest")
    with pytest.raises(EmbedLensError, match="overlap or leave tokens out"):
        some = torch.ones(4, dtype=torch.bool)
        TokenGroups(some, some, some, some, {})
