"""A value with its interval over pictures: bootstrap of ratios and means.

Pictures are drawn, not tokens: what one picture shows belongs together, and tokens of a picture are no independent
observations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from embedlens.errors import EmbedLensError


class Interval(NamedTuple):
    """A value with the bounds of its interval, one entry per layer (or 0-d)."""

    value: Float[np.ndarray, "*layers"]
    low: Float[np.ndarray, "*layers"]
    high: Float[np.ndarray, "*layers"]

    def texts(self, digits: int = 2) -> list[str]:
        """One "value (low to high)" per layer, for tables.

        >>> Interval(np.array([0.5]), np.array([-0.001]), np.array([0.75])).texts()
        ['0.50 (0.00 to 0.75)']
        """
        rows = np.round(np.stack([np.ravel(part) for part in self], -1), digits) + 0.0  # + 0.0: no "-0.00"
        return [f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})" for value, low, high in rows]

    def at(self, place: int) -> Interval:
        """One entry, such as that of one layer, 0-d.

        >>> Interval(np.array([0.5, 0.25]), np.array([0.0, 0.125]), np.array([0.75, 0.5])).at(-1).texts()
        ['0.25 (0.12 to 0.50)']
        """
        return Interval(*(part[place] for part in self))


def ratio_interval(
    hits: Shaped[np.ndarray, "pictures *layers"],  # noqa: UP037 - a shape, no annotation to unquote
    asked: Shaped[np.ndarray, " pictures"],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Sum of `hits` over sum of `asked`, with a percentile bootstrap over pictures.

    Pictures are drawn, not labels or tokens, because what one picture shows belongs together. The same seed draws the
    same pictures, so differences of two lenses are paired: pass the difference of their hits.

    Raises:
        EmbedLensError: nothing was asked at all.

    >>> found = ratio_interval(np.array([1.0, 0.0, 1.0, 1.0]), np.ones(4), resamples=200)
    >>> float(found.value), bool(found.low < 0.75 < found.high)
    (0.75, True)
    """
    if asked.sum() == 0:
        raise EmbedLensError("no picture has a label that counts: take more pictures, or a rule that matches more")
    flat = hits.reshape(len(hits), -1).astype(np.float64)
    times = draws(len(hits), resamples, seed)
    drawn = (times @ flat) / np.maximum(times @ asked.astype(np.float64), 1)[:, None]
    return percentile_interval(flat.sum(0) / asked.sum(), drawn, level, hits.shape[1:])


def mean_interval(
    values: Shaped[np.ndarray, "pictures *columns"],  # noqa: UP037 - a shape, no annotation to unquote
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over pictures of what each picture gives, with a percentile bootstrap over pictures.

    A nan says that a picture has no such value (a group without tokens, a rank without a cluster); it is left out of
    its column, here and in every resample. The same seed draws the same pictures, so differences are paired.

    Args:
        values: one row per picture; any number of columns (layers, ranks), or none.

    Raises:
        EmbedLensError: a column has no value in any picture.

    >>> found = mean_interval(np.array([[1.0, 2.0], [3.0, np.nan]]), resamples=200)
    >>> found.value.tolist(), float(found.low[0]), float(found.high[0])
    ([2.0, 2.0], 1.0, 3.0)
    """
    if not len(values) or not (~np.isnan(values)).any(0).all():
        raise EmbedLensError("no picture has a value to average: take more pictures, or leave out the empty columns")
    flat = values.reshape(len(values), -1).astype(np.float64)
    there = ~np.isnan(flat)
    filled, counted = np.where(there, flat, 0), there.astype(np.float64)
    times = draws(len(flat), resamples, seed)
    asked = times @ counted
    drawn = np.where(asked > 0, times @ filled, np.nan) / np.maximum(asked, 1)  # nan: none of those that have a value
    return percentile_interval(filled.sum(0) / counted.sum(0), drawn, level, values.shape[1:])


def beyond_seen(share: Interval, pictures: int, level: float = 0.95) -> Interval:
    """A share of which no picture has any, or all have all, with the exact bound: a bootstrap draws only what it saw.

    >>> [round(float(part), 3) for part in beyond_seen(Interval(*(np.array(0.0) for _ in range(3))), 4)]
    [0.0, 0.0, 0.602]
    """
    unseen = 1 - ((1 - level) / 2) ** (1 / pictures)
    if float(share.value) == 0:
        return Interval(share.value, share.low, np.asarray(unseen))
    return Interval(share.value, np.asarray(1 - unseen), share.high) if float(share.value) == 1 else share


def pair_interval(
    values: Shaped[np.ndarray, "pairs *columns"],  # noqa: UP037 - a shape, no annotation to unquote
    pairs: Int[np.ndarray, "pairs 2"],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Mean over pairs of pictures of what each pair gives, with a percentile bootstrap over *pictures*.

    Pairs that share a picture are not independent: a picture drawn twice counts twice in each of its pairs, on either
    side. Drawing pairs instead would give intervals that are too narrow. A nan is left out of its column.

    Args:
        values: one row per pair.
        pairs: indices of the two pictures of each, as `embedlens.clusters.picture_pairs` gives them.

    Raises:
        EmbedLensError: a column has no value in any pair.

    >>> found = pair_interval(np.array([1.0, 2.0, 3.0]), np.array([[0, 1], [1, 2], [2, 0]]), resamples=50)
    >>> float(found.value)
    2.0
    """
    if not len(values) or not (~np.isnan(values)).any(0).all():
        raise EmbedLensError("no pair has a value to average: take more pictures, or leave out the empty columns")
    flat = values.reshape(len(values), -1).astype(np.float64)
    there = ~np.isnan(flat)
    filled, counted = np.where(there, flat, 0), there.astype(np.float64)
    drawn = []
    for times in np.array_split(draws(int(pairs.max()) + 1, resamples, seed), max(1, resamples // 50)):
        weights = times[:, pairs[:, 0]] * times[:, pairs[:, 1]]
        asked = weights @ counted
        drawn.append(np.where(asked > 0, weights @ filled, np.nan) / np.maximum(asked, 1))
    return percentile_interval(filled.sum(0) / counted.sum(0), np.concatenate(drawn), level, values.shape[1:])


def draws(n: int, resamples: int, seed: int) -> Float[np.ndarray, "resamples n"]:
    """How often each picture is drawn in each resample."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def percentile_interval(value: np.ndarray, drawn: np.ndarray, level: float, shape: tuple[int, ...]) -> Interval:
    """The value with the quantiles of what was drawn, in the given shape."""
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Interval(*(steady(part).reshape(shape) for part in (value, low, high)))


def steady(values: Any) -> np.ndarray:
    """Without the bits that belong to the processor, at the twelfth decimal: what adds up to 0 is 0 on each of them,
    so that `low > 0` and `high < 1` are answered alike.

    >>> 0.1 + 0.2 - 0.3 > 0, bool(steady(0.1 + 0.2 - 0.3) > 0)
    (True, False)
    """
    return np.asarray(np.round(np.asarray(values, dtype=np.float64), 12) + 0.0)
