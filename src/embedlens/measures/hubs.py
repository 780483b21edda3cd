"""Hubs of a lens: vocabulary entries that are nearest to everything, whatever is asked.

In many dimensions a few points become the nearest neighbours of very many others (Radovanović, Nanopoulos and
Ivanović 2010). So the words on visual tokens are counted beside those on directions that hold no picture: drawn from a
sphere, and with nothing of the tokens but their mean and covariance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from embedlens import stats
from embedlens.errors import EmbedLensError
from embedlens.lenses import Lens

TOKENS, MATCHED, RANDOM = KINDS = ("visual tokens", "matched directions", "random directions")
HUB_SCORE = 2.0  # standard deviations of N_k above its mean, the bar of Radovanović et al.
BLOCK = 16  # resamples counted at a time, so that a vocabulary of 150,000 fits


def occurrences(lens: Lens, h: Float[Tensor, "n d"], k: int = 1) -> Int[np.ndarray, " V"]:
    """N_k of every vocabulary entry: how many vectors have it among their k best."""
    return np.bincount(lens.topk(h, k)[1].cpu().numpy().ravel(), minlength=len(lens.tokens))


def skewness(counts: Shaped[np.ndarray, "*groups V"]) -> Float[np.ndarray, "*groups"]:
    """Third standardised moment of N_k over the vocabulary: 0 where no entry is favoured, large where few take all.
    Equation 1 of Radovanović et al. (2010). Counts that are all equal have skewness 0 here."""
    spread = counts.std(-1, keepdims=True)
    return (((counts - counts.mean(-1, keepdims=True)) / np.where(spread > 0, spread, 1)) ** 3).mean(-1)


def hubs(counts: Shaped[np.ndarray, " V"], score: float = HUB_SCORE) -> Bool[np.ndarray, " V"]:
    """Entries whose N_k is more than `score` standard deviations above the mean."""
    return counts - counts.mean() > score * counts.std()


def coverage(counts: Shaped[np.ndarray, " V"]) -> Float[np.ndarray, " V"]:
    """Share of all answers that the most frequent 1, 2, …, V entries give.

    >>> coverage(np.array([1, 0, 3])).tolist()
    [0.75, 1.0, 1.0]
    """
    if counts.sum() == 0:
        raise EmbedLensError("there are no answers to cover: count the occurrences of at least one vector")
    return np.sort(counts)[::-1].cumsum() / counts.sum()


def random_directions(n: int, d: int, seed: int = 0) -> Float[Tensor, "n d"]:
    """Directions without preference: standard normal vectors, the same on every machine."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def matched_directions(h: Float[Tensor, "m d"], n: int, seed: int = 0) -> Float[Tensor, "n d"]:
    """`n` normal vectors with the mean and covariance of the given ones, and nothing else of them."""
    if len(h) < 2:
        raise EmbedLensError(f"{len(h)} vectors have no covariance: pass at least two")
    given = h.detach().cpu().double()
    apart = given - given.mean(0)
    variances, axes = torch.linalg.eigh(apart.T @ apart / (len(given) - 1))  # Cholesky would refuse few tokens
    normal = random_directions(n, given.shape[1], seed).double()
    return (given.mean(0) + (normal * variances.clamp(min=0).sqrt()) @ axes.T).float()


def hubness(
    lens: Lens, tokens: Sequence[Float[Tensor, "_ d"]], k: int = 1, repeats: int = 10, seed: int = 0
) -> dict[str, Int[np.ndarray, "_ V"]]:
    """Count the answers of a lens on visual tokens (of each picture, as `model.visual_features_of` gives them) and on
    as many directions that hold no picture, drawn `repeats` times. Returns one of KINDS → `occurrences` among the k
    best, a row for each picture or repeat."""
    if repeats < 1 or not sum(map(len, tokens)):
        raise EmbedLensError("hubness needs visual tokens of at least one picture and at least one repeat")
    flat, seeds = torch.cat(list(tokens)), [seed * repeats + i for i in range(repeats)]
    counted = {
        TOKENS: (occurrences(lens, rows, k) for rows in tokens),
        MATCHED: (occurrences(lens, matched_directions(flat, len(flat), at), k) for at in seeds),
        RANDOM: (occurrences(lens, random_directions(len(flat), flat.shape[1], at), k) for at in seeds),
    }
    return {kind: np.stack(list(counts)) for kind, counts in counted.items()}


def skewed(
    counted: Mapping[str, Int[np.ndarray, "_ V"]], resamples: int = 500, seed: int = 0
) -> dict[str, stats.Estimate]:
    """`skewness` of what `hubness` gave: tokens with a bootstrap over pictures, directions with their range."""
    n = len(counted[TOKENS])
    times = np.vstack([np.ones((1, n)), stats.draws(n, resamples, seed)])
    drawn = [skewness(times[i : i + BLOCK] @ counted[TOKENS]) for i in range(0, len(times), BLOCK)]
    each = {kind: skewness(counts) for kind, counts in counted.items()}
    ranges = {kind: stats.Estimate(x.mean(), x.min(), x.max(), len(x), "draws") for kind, x in each.items()}
    return ranges | {TOKENS: stats.estimate(pd.Series(np.concatenate(drawn)), n)}


def share_on(
    counted: Mapping[str, Int[np.ndarray, "_ V"]], entries: Bool[np.ndarray, " V"], seed: int = 0
) -> dict[str, stats.Estimate]:
    """Share of the answers that are among `entries`: visual tokens by picture, directions by repeat."""
    found = {}
    for kind, counts in counted.items():
        rows = pd.DataFrame({"id": range(len(counts)), "on": counts[:, entries].sum(1), "all": counts.sum(1)})
        found[kind] = stats.estimate(stats.drawn(rows, "on", over="all", seed=seed))
    return found
