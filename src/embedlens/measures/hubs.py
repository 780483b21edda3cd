"""Hubs of a lens: vocabulary entries that are nearest to everything, whatever is asked.

In many dimensions a few points become the nearest neighbours of very many others (Radovanović, Nanopoulos and
Ivanović 2010). An entry that is nearest to random directions too says little about the token on which it stands. So
the words on visual tokens are counted beside the words on directions that hold no picture: directions drawn from a
sphere, and directions that share nothing with the tokens but their mean and covariance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from embedlens import stats
from embedlens.errors import EmbedLensError
from embedlens.lenses import Lens

HUB_SCORE = 2.0  # standard deviations of N_k above its mean, the bar of Radovanović et al.
BLOCK = 16  # resamples counted at a time, so that a vocabulary of 150,000 fits


def occurrences(lens: Lens, h: Float[Tensor, "*groups n d"], k: int = 1) -> Int[np.ndarray, "*groups V"]:
    """N_k of every vocabulary entry: how many vectors of a group have it among their k best.

    Args:
        h: vectors; leading sides are groups that are counted apart, such as pictures.

    Raises:
        EmbedLensError: as `Lens.topk` does.

    >>> from embedlens import EmbedLens
    >>> occurrences(EmbedLens(torch.eye(3), ["a", "b", "c"]), torch.tensor([[1.0, 0, 0], [2.0, 1, 0], [0, 0, 1]]))
    array([2, 0, 1])
    """
    ids = lens.topk(h, k)[1].cpu().numpy()
    groups = ids.reshape(-1, ids.shape[-2] * k)
    counts = [np.bincount(group, minlength=len(lens.tokens)) for group in groups]
    return np.stack(counts).reshape(*ids.shape[:-2], len(lens.tokens))


def skewness(counts: Shaped[np.ndarray, "*groups V"]) -> Float[np.ndarray, "*groups"]:
    """Third standardised moment of N_k over the vocabulary: 0 where no entry is favoured, large where few take all.

    Equation 1 of Radovanović et al. (2010). Counts that are all equal have skewness 0 here.

    >>> float(skewness(np.array([1, 1, 1, 1]))), round(float(skewness(np.array([0, 0, 0, 4]))), 3)
    (0.0, 1.155)
    """
    from scipy.stats import skew

    flat = counts.reshape(-1, counts.shape[-1]).astype(np.float64)
    uneven = flat.std(-1) > 0
    found = np.zeros(len(flat))
    if uneven.any():
        found[uneven] = skew(flat[uneven], axis=-1)
    return found.reshape(counts.shape[:-1])


def hubs(counts: Shaped[np.ndarray, " V"], score: float = HUB_SCORE) -> Bool[np.ndarray, " V"]:
    """Entries whose N_k is more than `score` standard deviations above the mean.

    >>> hubs(np.array([0] * 9 + [10])).nonzero()[0].tolist()
    [9]
    """
    spread = counts.std()
    return counts - counts.mean() > score * spread if spread > 0 else np.zeros(counts.shape, dtype=bool)


def coverage(counts: Shaped[np.ndarray, " V"]) -> Float[np.ndarray, " V"]:
    """Share of all answers that the most frequent 1, 2, …, V entries give.

    Raises:
        EmbedLensError: no answers at all.

    >>> coverage(np.array([1, 0, 3])).tolist()
    [0.75, 1.0, 1.0]
    """
    if counts.sum() == 0:
        raise EmbedLensError("there are no answers to cover: count the occurrences of at least one vector")
    return np.sort(counts)[::-1].cumsum() / counts.sum()


def random_directions(n: int, d: int, seed: int = 0) -> Float[Tensor, "n d"]:
    """Directions without preference: standard normal vectors, the same on every machine.

    >>> random_directions(2, 3).shape
    torch.Size([2, 3])
    """
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def matched_directions(h: Float[Tensor, "m d"], n: int, seed: int = 0) -> Float[Tensor, "n d"]:
    """Normal vectors with the mean and covariance of given ones, and nothing else of them.

    Args:
        h: at least two vectors.
        n: how many to draw.

    Raises:
        EmbedLensError: fewer than two vectors, which have no covariance.
    """
    if len(h) < 2:
        raise EmbedLensError(f"{len(h)} vectors have no covariance: pass at least two")
    given = h.detach().cpu().double()
    mean = given.mean(0)
    covariance = (given - mean).T @ (given - mean) / (len(given) - 1)
    variances, axes = torch.linalg.eigh(covariance)  # tokens may span fewer than d dimensions; Cholesky would refuse
    normal = random_directions(n, given.shape[1], seed).double()
    return (mean + (normal * variances.clamp(min=0).sqrt()) @ axes.T).float()


@dataclass(frozen=True, eq=False)
class Hubness:
    """How often each vocabulary entry is among the k best, for visual tokens and for directions without a picture."""

    tokens: Int[np.ndarray, "pictures V"]  #: Visual tokens, picture by picture
    matched: Int[np.ndarray, "repeats V"]
    """As many directions with the mean and covariance of the visual tokens, drawn anew in each repeat."""
    random: Int[np.ndarray, "repeats V"]  #: As many directions without preference
    k: int

    @property
    def n(self) -> int:
        """Visual tokens counted, and directions of each repeat."""
        return int(self.tokens.sum()) // self.k

    @property
    def answers(self) -> dict[str, Int[np.ndarray, "groups V"]]:
        """The three kinds by name."""
        return {"visual tokens": self.tokens, "matched directions": self.matched, "random directions": self.random}

    def skewness(self, resamples: int = 500, seed: int = 0) -> dict[str, stats.Estimate]:
        """`skewness` of the three: tokens with a bootstrap over pictures, directions with their range over repeats."""
        n = len(self.tokens)
        times = np.vstack([np.ones((1, n)), stats.draws(n, resamples, seed)])
        drawn = [skewness(times[i : i + BLOCK] @ self.tokens) for i in range(0, len(times), BLOCK)]
        each = {name: skewness(counts) for name, counts in self.answers.items()}
        ranges = {name: stats.Estimate(x.mean(), x.min(), x.max(), len(x), "draws") for name, x in each.items()}
        return ranges | {"visual tokens": stats.estimate(pd.Series(np.concatenate(drawn)), n)}

    def share_on(self, entries: Bool[np.ndarray, " V"], seed: int = 0) -> dict[str, stats.Estimate]:
        """Share of answers that are among `entries`: visual tokens by picture, directions by repeat."""
        found = {}
        for name, counts in self.answers.items():
            rows = pd.DataFrame({"id": range(len(counts)), "on": counts[:, entries].sum(1), "all": counts.sum(1)})
            found[name] = stats.estimate(stats.drawn(rows, "on", over="all", seed=seed))
        return found


def _of_pictures(
    lens: Lens, tokens: Float[Tensor, "pictures n d"] | Sequence[Float[Tensor, "_ d"]], k: int
) -> Int[np.ndarray, "pictures V"]:
    if len({len(rows) for rows in tokens}) == 1:  # all at once, where they stack
        return occurrences(lens, torch.stack(list(tokens)), k)
    return np.stack([occurrences(lens, rows, k) for rows in tokens])


def hubness(
    lens: Lens,
    tokens: Float[Tensor, "pictures n d"] | Sequence[Float[Tensor, "_ d"]],
    k: int = 1,
    repeats: int = 10,
    seed: int = 0,
) -> Hubness:
    """Count the answers of a lens on visual tokens and, as often, on directions that hold no picture.

    Args:
        tokens: visual tokens of several pictures, as `model.visual_features_of` gives them.
        k: answers per vector.
        repeats: draws of the directions, each as large as `tokens`.

    Raises:
        EmbedLensError: no pictures, no repeats, or what `Lens.topk` refuses.
    """
    if repeats < 1 or not sum(map(len, tokens)):
        raise EmbedLensError("hubness needs visual tokens of at least one picture and at least one repeat")
    flat = torch.cat(list(tokens))
    n, d = flat.shape
    seeds = [seed * repeats + i for i in range(repeats)]

    def counted(drawn: Iterator[Tensor]) -> np.ndarray:
        return np.stack([occurrences(lens, directions, k) for directions in drawn])

    return Hubness(
        tokens=_of_pictures(lens, tokens, k),
        matched=counted(matched_directions(flat, n, at) for at in seeds),
        random=counted(random_directions(n, d, at) for at in seeds),
        k=k,
    )
