"""Arrays of values with their bounds, by the bootstrap of `embedlens.stats`; goes with chapters/."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from embedlens.errors import EmbedLensError
from embedlens.stats import LEVEL, RESAMPLES, draws, share, steady


class Interval(NamedTuple):  # goes with chapters/{orderings,shootout,page,card,other_models} and claims
    """A value with the bounds of its interval, one entry per layer (or 0-d)."""

    value: Float[np.ndarray, "*layers"]
    low: Float[np.ndarray, "*layers"]
    high: Float[np.ndarray, "*layers"]

    def texts(self, digits: int = 2) -> list[str]:
        """One "value (low to high)" per layer.

        >>> Interval(np.array([0.5]), np.array([-0.001]), np.array([0.75])).texts()
        ['0.50 (0.00 to 0.75)']
        """
        rows = np.round(np.stack([np.ravel(part) for part in self], -1), digits) + 0.0  # + 0.0: no "-0.00"
        return [f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})" for value, low, high in rows]


def ratio_interval(  # goes with chapters/{orderings,shootout,card}
    hits: Shaped[np.ndarray, "pictures *layers"],  # noqa: UP037 - a shape, no annotation to unquote
    asked: Shaped[np.ndarray, " pictures"],
    seed: int = 0,
) -> Interval:
    """Sum of `hits` over sum of `asked`."""
    if asked.sum() == 0:
        raise EmbedLensError("no picture has a label that counts: take more pictures, or a rule that matches more")
    flat, times = hits.reshape(len(hits), -1).astype(np.float64), draws(len(hits), RESAMPLES, seed)
    drawn = (times @ flat) / np.maximum(times @ asked.astype(np.float64), 1)[:, None]
    return _interval(flat.sum(0) / asked.sum(), drawn, hits.shape[1:])


def mean_interval(  # goes with chapters/{orderings,shootout,other_models}
    values: Shaped[np.ndarray, "pictures *columns"],  # noqa: UP037 - a shape, no annotation to unquote
    seed: int = 0,
) -> Interval:
    """Mean over pictures; a nan is left out of its column, here and in every resample."""
    if not len(values) or not (~np.isnan(values)).any(0).all():
        raise EmbedLensError("no picture has a value to average: take more pictures, or leave out the empty columns")
    flat, times = values.reshape(len(values), -1).astype(np.float64), draws(len(values), RESAMPLES, seed)
    there = ~np.isnan(flat)
    asked = times @ there.astype(np.float64)
    drawn = np.where(asked > 0, times @ np.where(there, flat, 0), np.nan) / np.maximum(asked, 1)
    return _interval(np.where(there, flat, 0).sum(0) / there.sum(0), drawn, values.shape[1:])


def beyond_seen(found: Interval, pictures: int) -> Interval:  # goes with chapters/{orderings,shootout}
    """A share of which no picture has any, or all have all, with the exact bound."""
    if float(found.value) not in (0, 1):
        return found
    exact = share(int(found.value * pictures), pictures)
    return Interval(found.value, *(np.asarray(bound) for bound in (exact.low, exact.high)))


def _interval(value: np.ndarray, drawn: np.ndarray, shape: tuple[int, ...]) -> Interval:
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Interval(*(steady(part).reshape(shape) for part in (value, low, high)))
