"""Hubness: counts and moments against their definitions, hubs planted where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embedlens import EmbedLens, EmbedLensError, samples
from embedlens.measures.hubs import (
    KINDS,
    MATCHED,
    RANDOM,
    TOKENS,
    coverage,
    hubness,
    hubs,
    matched_directions,
    occurrences,
    random_directions,
    share_on,
    skewed,
    skewness,
)


def lens_of(embeddings: torch.Tensor) -> EmbedLens:
    return EmbedLens(embeddings, [f"t{index}" for index in range(len(embeddings))])


@pytest.mark.parametrize("seed, k", [(0, 1), (1, 3)])
def test_occurrences_count_every_answer_once(seed, k):
    embeddings, h = random_directions(30, 8, seed), random_directions(100, 8, seed + 50)
    counted = np.zeros(30, dtype=int)
    for vector in h:
        cosines = torch.cosine_similarity(vector[None], embeddings, dim=-1)
        counted[sorted(range(30), key=lambda at: -float(cosines[at]))[:k]] += 1
    assert occurrences(lens_of(embeddings), h, k).tolist() == counted.tolist()


@pytest.mark.parametrize("seed", range(2))
def test_skewness_is_the_third_standardised_moment(seed):
    counts = np.random.default_rng(seed).poisson(3, (2, 40))
    for row, found in zip(counts, skewness(counts), strict=True):
        mean = sum(row) / 40
        moments = [sum((value - mean) ** power for value in row) / 40 for power in (2, 3)]
        assert found == pytest.approx(moments[1] / moments[0] ** 1.5)
    assert skewness(np.full((2, 5), 3)).tolist() == [0, 0]  # not nan


def test_hubs_are_entries_far_above_the_mean():
    counts = np.random.default_rng(0).poisson(5, 1000)
    counts[[3, 500]] = 100
    assert {3, 500} <= set(hubs(counts, score=4).nonzero()[0])
    assert hubs(counts).sum() < 60 and not hubs(np.full(9, 4)).any()


def test_coverage_grows_to_one_and_starts_with_the_most_frequent():
    counts = np.random.default_rng(0).poisson(2, 50)
    covered = coverage(counts)
    assert covered[0] == counts.max() / counts.sum() and covered[-1] == pytest.approx(1)
    assert (np.diff(covered) >= 0).all() and (np.diff(covered, 2) <= 1e-12).all()
    with pytest.raises(EmbedLensError, match="no answers"):
        coverage(np.zeros(3, dtype=int))


def test_matched_directions_have_the_mean_and_covariance_of_what_was_given():
    mix = random_directions(6, 6, seed=1)
    mix[5] = mix[4]  # they span five dimensions of six
    h = random_directions(500, 6, seed=2) @ mix.T * 3 + torch.arange(6.0)
    drawn = matched_directions(h, 40_000, seed=3)
    torch.testing.assert_close(drawn.mean(0), h.mean(0), atol=0.2, rtol=0)  # standard error 0.04
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(h.T), atol=1.0, rtol=0.05)
    torch.testing.assert_close(drawn[:, 5] - drawn[:, 4], torch.ones(40_000), atol=1e-3, rtol=0)
    assert torch.equal(matched_directions(h, 9, seed=3), matched_directions(h, 9, seed=3))
    assert not torch.equal(matched_directions(h, 9, seed=3), matched_directions(h, 9, seed=4))


def planted(seed: int = 0) -> dict[str, np.ndarray]:
    """Words that lie along the mean of the tokens are hubs of tokens and matched directions, not of random ones."""
    embeddings = random_directions(200, 16, seed)
    mean = random_directions(1, 16, seed + 1)
    embeddings[:3] = 0.3 * embeddings[:3] + mean
    tokens = random_directions(20 * 30, 16, seed + 2).view(20, 30, 16) + 2 * mean
    return hubness(lens_of(embeddings), list(tokens), repeats=3, seed=seed)


def test_a_hub_made_by_the_mean_is_told_from_a_hub_of_the_vocabulary():
    found = planted()
    assert [found[kind].shape for kind in KINDS] == [(20, 200), (3, 200), (3, 200)]
    assert found[TOKENS].sum() == 600 and found[MATCHED].sum(1).tolist() == found[RANDOM].sum(1).tolist() == [600] * 3
    lean, entries = skewed(found, resamples=100), hubs(found[MATCHED].sum(0))
    assert min(lean[TOKENS].low, lean[MATCHED].low) > 2 * lean[RANDOM].high
    assert entries[:3].all()
    share = share_on(found, entries)
    assert share[TOKENS].low > 0.3 > share[RANDOM].high
    for interval in (*lean.values(), *share.values()):
        assert interval.low <= interval.value <= interval.high
    again, other = planted(), planted(1)
    assert np.array_equal(found[MATCHED], again[MATCHED]) and not np.array_equal(found[RANDOM], other[RANDOM])
    assert not np.array_equal(found[RANDOM][0], found[RANDOM][1])


def test_hubness_of_nothing_is_refused():
    with pytest.raises(EmbedLensError, match="at least one picture"):
        hubness(lens_of(torch.eye(3)), [])
    with pytest.raises(EmbedLensError, match="no covariance: pass at least two"):
        matched_directions(torch.zeros(1, 3), 5)


def test_the_hubness_of_a_models_tokens_has_no_holes(tiny):
    tokens = tiny.visual_features_of([sample.image for sample in samples.load("miniworld", n=2)])
    found = hubness(EmbedLens.from_model(tiny), tokens, k=5, repeats=2)
    assert found[TOKENS].sum(1).tolist() == [16 * 5] * 2 and set(skewed(found, resamples=20)) == set(KINDS)
