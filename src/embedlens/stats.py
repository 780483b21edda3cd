"""From a tidy table to an estimate: bootstrap over pictures, one way for every number of the book.

Pictures are drawn, not tokens or questions. `drawn` gives a frame of the statistic in every resample; row 0 is the data
itself. What is made of such frames by arithmetic is resampled with it and paired: a seed draws the same pictures.

    norm = drawn(rows, "norm", by=["positions", "layer"])
    estimate((norm["visual"] / norm["text"])[0])
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from embedlens.errors import EmbedLensError

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, of `n` pictures (or questions, as `of` says).

    Comparing is three-valued: True or False where the whole interval lies on one side of the bar, None where not.

    >>> share = Estimate(0.35, 0.34, 0.36, n=150)
    >>> f"{share:.0%}", f"{share:.2f}", share > 0.3, share > 0.35
    ('35 % (34–36)', '0.35 (0.34 to 0.36)', True, None)
    >>> f"{Estimate(-0.007, -0.026, 0.012, n=200):+.1f points}"
    '−0.7 points (−2.6 to 1.2)'
    """

    value: float
    low: float
    high: float
    n: int
    of: str = "pictures"
    testable: bool = field(default=True, repr=False)  #: False: of questions that the model cannot answer; no bar is met

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.value, self.low, self.high))):
            what = f"an estimate is three finite numbers, not {self.value}, {self.low}, {self.high}"
            raise EmbedLensError(f"{what}: mend the measurement (is it a mean over no samples?)")
        if self.n < 1:
            raise EmbedLensError(f"an estimate of {self.n} {self.of} says nothing: pass at least one")

    def __format__(self, spec: str) -> str:
        percent, points = spec.endswith("%"), spec.endswith(" points")
        digits = spec.removesuffix("%").removesuffix(" points") or ".2f"
        form = digits if digits.endswith(("f", "g", "e")) else f"{digits}f"
        scale, unit = 100 if percent or points else 1, " %" if percent else " points" if points else ""
        value, low, high = (_number(scale * part, form) for part in (self.value, self.low, self.high))
        dash = "–" if percent and "−" not in low + high else " to "
        return f"{value}{unit} ({low.lstrip('+')}{dash}{high.lstrip('+')})"

    def __str__(self) -> str:
        return format(self, ".3g")

    def __gt__(self, bar: Any) -> bool | None:
        return self._sure(self.low > _bar(bar), self.high <= bar)

    def __lt__(self, bar: Any) -> bool | None:
        return self._sure(self.high < _bar(bar), self.low >= bar)

    def __ge__(self, bar: Any) -> bool | None:
        return self._sure(self.low >= _bar(bar), self.high < bar)

    def __le__(self, bar: Any) -> bool | None:
        return self._sure(self.high <= _bar(bar), self.low > bar)

    def _sure(self, met: Any, missed: Any) -> bool | None:  # NumPy's booleans come too
        return None if not self.testable else True if met else False if missed else None

    def __abs__(self) -> Estimate:
        low, high = sorted((abs(self.low), abs(self.high)))
        low = 0.0 if self.low <= 0 <= self.high else low
        return replace(self, value=min(max(abs(self.value), low), high), low=low, high=high)

    def needed(self, bar: float) -> int | None:
        """About how many it takes until the interval leaves the bar, if the value stays; None: no number would.

        >>> Estimate(0.012, -0.014, 0.034, n=160).needed(0)
        752
        """
        away = self.value - bar
        reach = away - (self.low - bar) if away > 0 else self.high - self.value
        return math.ceil(self.n * (reach / away) ** 2) if away else None


def _bar(bar: Any) -> float:
    if isinstance(bar, Estimate):
        raise EmbedLensError("two estimates of the same pictures are paired: compare the estimate of their difference")
    return bar


def _number(value: float, form: str) -> str:
    """A number as readers write it: a real minus, and no minus before what rounds to zero."""
    text = format(value, form)
    return text.replace("-", "−" if float(text) else "")


def drawn(
    table: pd.DataFrame,
    value: str,
    over: str | None = None,
    by: str | Sequence[str] = (),
    picture: str = "id",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Sum of `value` over sum of `over` in the data (row 0) and in each bootstrap resample of the pictures.

    Without `over` it is the mean over rows. A picture without a row in a cell, or with nan there, is left out of it.

    Args:
        table: tidy: one row per picture and whatever varies.
        by: columns whose values tell the cells apart; they become the columns of the result, in order of appearance.
        picture: the column that names what is drawn; "question" makes it an estimate over questions.

    Returns:
        frame [1 + resamples, cells], or with no `by` one column named `value`; `attrs` says how many pictures it is of.

    >>> rows = pd.DataFrame({"id": [0, 0, 1, 1], "layer": [0, 1, 0, 1], "hits": [1, 2, 3, 4], "asked": [2, 4, 4, 4]})
    >>> drawn(rows, "hits", over="asked", by="layer", resamples=9).loc[0].round(3).to_dict()
    {0: 0.667, 1: 0.75}
    """
    keys = [by] if isinstance(by, str) else list(by)
    missing = [name for name in (value, picture, *keys, *([over] if over else [])) if name not in table]
    if missing or table.empty:
        what = f"no column {', '.join(missing)}" if missing else "no rows"
        raise EmbedLensError(f"the table has {what}: its columns are {', '.join(map(str, table.columns))}")
    places, ids = pd.factorize(table[picture])
    columns, names = np.zeros(len(table), dtype=int), pd.Index([value])
    if keys:
        cells = pd.MultiIndex.from_frame(table[keys]) if len(keys) > 1 else pd.Index(table[keys[0]])
        columns, names = pd.factorize(cells)
        names = names.set_names(keys)
    hits = table[value].to_numpy(dtype=np.float64)
    asked = np.ones(len(table)) if over is None else table[over].to_numpy(dtype=np.float64)
    there = ~np.isnan(hits)
    flat = places * len(names) + columns
    summed = [
        np.bincount(flat[there], parts[there], minlength=len(ids) * len(names)).reshape(len(ids), len(names))
        for parts in (hits, asked)
    ]
    if (summed[1].sum(0) == 0).any():
        empty = names[int((summed[1].sum(0) == 0).argmax())]
        raise EmbedLensError(f"nothing was asked of {empty}: take more pictures, or leave that cell out")
    times = np.vstack([np.ones((1, len(ids))), draws(len(ids), resamples, seed)])
    hit, counted = (times @ part for part in summed)
    values = np.where(counted > 0, hit, np.nan) / np.where(counted > 0, counted, 1)
    found = pd.DataFrame(values, columns=names)
    found.attrs |= {"n": len(ids), "of": "pictures" if picture == "id" else f"{picture}s"}
    return found


def drawn_pairs(
    values: pd.DataFrame, pairs: Int[np.ndarray, "pairs 2"], resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """As `drawn`, of what pairs of pictures give; drawn are *pictures*, since pairs that share one are not independent.
    `values` has one row per pair, one column per cell; `pairs` are as `embedlens.clusters.picture_pairs` gives them.

    >>> alike = pd.DataFrame({0: [1.0, 2.0, 3.0]})
    >>> float(drawn_pairs(alike, np.array([[0, 1], [1, 2], [2, 0]]), resamples=9)[0][0])
    2.0
    """
    cells = values.to_numpy(dtype=np.float64)
    there = ~np.isnan(cells)
    if not len(cells) or not there.any(0).all():
        raise EmbedLensError("no pair has a value to average: take more pictures, or leave out the empty columns")
    n = int(pairs.max()) + 1
    filled, counted, found = np.where(there, cells, 0), there.astype(np.float64), []
    for times in np.array_split(np.vstack([np.ones((1, n)), draws(n, resamples, seed)]), max(1, resamples // 50)):
        weights = times[:, pairs[:, 0]] * times[:, pairs[:, 1]]
        asked = weights @ counted
        found.append(np.where(asked > 0, weights @ filled, np.nan) / np.maximum(asked, 1))
    resampled = pd.DataFrame(np.concatenate(found), columns=values.columns)
    resampled.attrs |= {"n": n, "of": "pictures"}
    return resampled


def steady(values: Any) -> np.ndarray:
    """To twelve decimals: the bits beyond belong to the processor, and what adds up to 0 is 0 on each.

    >>> 0.1 + 0.2 - 0.3 > 0, bool(steady(0.1 + 0.2 - 0.3) > 0)
    (True, False)
    """
    return np.asarray(np.round(np.asarray(values, dtype=np.float64), 12) + 0.0)


@lru_cache(maxsize=2)  # a chapter asks for the same hundreds of times
def draws(n: int, resamples: int = RESAMPLES, seed: int = 0) -> Float[np.ndarray, "resamples n"]:
    """How often each of `n` pictures is drawn in each resample; not to be written to."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def estimate(resampled: pd.Series | pd.DataFrame, n: int | None = None, level: float = LEVEL) -> Estimate:
    """The value (row 0) with the percentiles of the resamples, of one column of what `drawn` gave or arithmetic made of
    it. `n` are the pictures; by default what `drawn` noted.

    >>> estimate(pd.Series([0.5, 0.25, 0.75, 0.5]), n=4)
    Estimate(value=0.5, low=0.2625, high=0.7375, n=4, of='pictures')
    """
    n = resampled.attrs.get("n") if n is None else n
    if n is None:
        raise EmbedLensError("how many pictures this rests on was lost in the arithmetic: pass n=")
    values = steady(resampled).reshape(len(resampled), -1)
    if values.shape[1] != 1:
        raise EmbedLensError(f"{values.shape[1]} columns are several estimates: choose one, or use estimates")
    value, (low, high) = float(values[0, 0]), np.nanquantile(values[1:, 0], [(1 - level) / 2, (1 + level) / 2])
    of = resampled.attrs.get("of", "pictures")
    return Estimate(value, min(float(low), value), max(float(high), value), int(n), of)


def estimates(resampled: pd.DataFrame, n: int | None = None) -> dict[Hashable, Estimate]:
    """`estimate` of every column, by its name."""
    n = resampled.attrs.get("n") if n is None else n
    return {name: estimate(resampled[name], n) for name in resampled}


def curve(resampled: pd.DataFrame, n: int | None = None) -> pd.DataFrame:
    """`estimates` as a tidy table for figures: the names of the cells, value, low, high, n.

    >>> rows = pd.DataFrame({"id": [0, 0, 1, 1], "layer": [0, 1, 0, 1], "norm": [1.0, 2.0, 3.0, 4.0]})
    >>> curve(drawn(rows, "norm", by="layer", resamples=9)).round(1).values.tolist()
    [[0.0, 2.0, 1.0, 3.0, 2.0], [1.0, 3.0, 2.0, 4.0, 2.0]]
    """
    found = pd.DataFrame(map(vars, estimates(resampled, n).values()))[["value", "low", "high", "n"]]
    return pd.concat([resampled.columns.to_frame(index=False), found], axis=1)


def of_group(
    table: pd.DataFrame, value: str, group: str, minus: str | None = None, over: str | None = None, seed: int = 0
) -> pd.DataFrame:
    """`drawn` by layer of one group's value, or of its difference from or ratio to another group's, by picture.

    `table` has rows of id, group, layer and value. A picture that lacks one of the two is left out; where no picture
    has both, all is nan, of which `known` gives None.

    >>> rows = pd.DataFrame({"id": [0, 0, 1], "group": ["a", "b", "a"], "layer": 0, "norm": [3.0, 2.0, 9.0]})
    >>> float(of_group(rows, "norm", "a", minus="b")[0][0]), known(of_group(rows, "norm", "c")[0])
    (1.0, None)
    """
    wide = table.dropna(subset=value).pivot(index=["id", "layer"], columns="group", values=value)
    wide = wide.reindex(columns=dict.fromkeys([*wide, group, *(name for name in (minus, over) if name)]))
    found = wide[group] - wide[minus] if minus else wide[group] / wide[over] if over else wide[group]
    if found.isna().all():
        return pd.DataFrame(math.nan, range(2), wide.index.unique("layer"))
    return drawn(found.rename(value).reset_index(), value, by="layer", seed=seed)


def known(resampled: pd.Series | pd.DataFrame, n: int | None = None) -> Any:
    """`estimate`, or None where nothing was measured; of a frame a list with one for each of its columns."""
    if isinstance(resampled, pd.DataFrame):
        return [known(resampled[column], n) for column in resampled]
    return None if resampled.isna().all() else estimate(resampled, n)


def share(hits: int, asked: int, of: str = "pictures") -> Estimate:
    """A share with its exact (Clopper-Pearson) interval, also where none or all were hit.

    >>> f"{share(0, 41):.1%}"
    '0.0 % (0.0–8.6)'
    """
    if not 0 <= hits <= asked or asked < 1:
        raise EmbedLensError(f"{hits} of {asked} is no share: pass 0 <= hits <= asked and asked of at least 1")
    from scipy.stats import binomtest  # takes a second to import

    found = binomtest(int(hits), int(asked)).proportion_ci(LEVEL, method="exact")
    return Estimate(hits / asked, float(found.low), float(found.high), int(asked), of)


def at_least_seen(found: Estimate) -> Estimate:
    """A bootstrapped share of which no picture shows any, or all show all, with the exact bound for its pictures. A
    bootstrap draws only what it saw: its interval is a point there."""
    if found.value not in (0, 1) or found.low != found.high:
        return found
    exact = share(int(found.value * found.n), found.n, found.of)
    return replace(found, low=exact.low, high=exact.high)
