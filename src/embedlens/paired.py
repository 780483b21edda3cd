"""An arm against the baseline, question by question: difference, interval over pictures, McNemar, equivalence.

The verdict:

    degradation           the 95 % interval of the difference lies below zero, and McNemar's p, where there is one, is
                          below 5 %
    improvement           the same, above
    no degradation shown  neither, and the 90 % interval lies within the margin on both sides (two one-sided tests)
    undecided             none of these: the questions are too few to say
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from embedlens.errors import EmbedLensError
from embedlens.stats import LEVEL, RESAMPLES, Estimate, draws, steady
from embedlens.tasks import FAMILIES, metric_parts

MARGIN = 0.01  # one point: what the paper's tables call stable
BASELINE = "baseline"
AVG = "Avg"


@dataclass(frozen=True)
class Comparison:
    """How one arm's score differs from the baseline's on the same questions. Scores are from 0 to 1."""

    arm: str
    of: str  #: What is compared: "accuracy", a family, or "Avg"
    baseline: float
    score: float  #: The arm's; of several seeds their mean
    change: Estimate  #: The difference with its 95 % interval, over pictures
    narrow: Estimate  #: With its 90 % interval: `narrow > -0.01 and narrow < 0.01` are two one-sided tests
    questions: int
    seeds: int
    acted: float  #: Share of the answers before which the arm changed anything
    gained: float
    lost: float  #: Answers wrong under the baseline and right under the arm, and the other way round; a mean over seeds
    p: float  #: McNemar's exact test, two-sided; nan for F1 and for several seeds

    @property
    def difference(self) -> float:
        return self.change.value

    @property
    def needed(self) -> int | None:
        """About how many pictures would show that nothing is lost beyond the margin; None: it is lost."""
        return self.narrow.needed(-MARGIN) if self.difference > -MARGIN else None

    @property
    def verdict(self) -> str:
        """One of the four that the module describes; "undecided" also where the arm never acted."""
        if not self.acted:
            return "undecided"
        worse = self.change < 0
        if (math.isnan(self.p) or self.p < 1 - LEVEL) and (worse or self.change > 0):
            return "degradation" if worse else "improvement"
        stable = self.narrow > -MARGIN and self.narrow < MARGIN
        return "no degradation shown" if stable else "undecided"


def compare(
    table: pd.DataFrame,
    arm: str,
    of: str = "accuracy",
    baseline: str = BASELINE,
    correct: str = "correct",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """One arm of a sweep against another, by default the baseline.

    Pictures are drawn in the bootstrap, the same ones for both arms and for all families. Where no answer differs, its
    interval is a point; so neither bound is nearer to the difference than z² / (n + z²), Tango's score interval then.

    Args:
        table: from `embedlens.sweep.run_arms`.
        arm: of several seeds, the repeats of a random control, the scores are averaged.
        baseline: one seed, or the seeds of the arm: each is then compared with the arm's of its own seed.
        of: "accuracy" of all questions in the table, a family (the mean of its metrics), or "Avg" of the four.
        correct: the column that says what is right; "correct_original" reads boxes in the original picture's frame.

    Source: Tango, Statistics in Medicine 17 (1998).
    """
    base, repeats = _of_arm(table, baseline), _of_arm(table, arm)
    if len(base) != 1 and [rows["seed"].iloc[0] for rows in base] != [rows["seed"].iloc[0] for rows in repeats]:
        what = f"{baseline!r} was run with {len(base)} seeds"
        raise EmbedLensError(f"{what}: compare with an arm that has one, or the same seeds")
    for rows in (*base[1:], *repeats):
        if not np.array_equal(rows["item"].to_numpy(), base[0]["item"].to_numpy()):
            raise EmbedLensError(f"{arm!r} and {baseline!r} answered other questions: run both on the same items")
    parts = [_chosen(rows, of) for rows in (*base, *repeats)]
    scores = _resampled(parts, of, correct, resamples, seed)
    of_base, of_arm = np.mean(scores[: len(base)], axis=0), np.mean(scores[len(base) :], axis=0)
    able = bool(of_base[0] > 0) and all(rows["testable"].all() for rows in parts if "testable" in rows)
    change, narrow = (
        replace(_estimate(of_arm - of_base, parts[0], level), testable=able) for level in (LEVEL, 2 * LEVEL - 1)
    )
    right = [rows[correct].to_numpy(dtype=float) > 0 for rows in parts]
    before, after = right[: len(base)] * (len(repeats) // len(base)), right[len(base) :]
    gained = float(np.mean([(now & ~was).sum() for was, now in zip(before, after, strict=True)]))
    lost = float(np.mean([(was & ~now).sum() for was, now in zip(before, after, strict=True)]))
    counts = len(repeats) == 1 and not any(metric.f1 for _, metric in _metrics(of))
    acted = float(np.mean([rows["acted"].mean() for rows in parts[len(base) :]]))
    p = mcnemar(int(gained), int(lost)) if counts else math.nan
    of_each = float(of_base[0]), float(of_arm[0]), change, narrow
    return Comparison(arm, of, *of_each, len(parts[0]), len(repeats), acted, gained, lost, p)


def scored(table: pd.DataFrame, arm: str, of: str = "accuracy", seed: int = 0) -> Estimate:
    """The score of one arm with its 95 % interval over pictures, by the rules of `compare`."""
    runs = [_chosen(rows, of) for rows in _of_arm(table, arm)]
    found = np.mean(_resampled(runs, of, "correct", RESAMPLES, seed), axis=0)
    score = _estimate(found, runs[0], LEVEL)
    return replace(score, value=float(found[0]), low=max(0.0, score.low))


def comparisons(table: pd.DataFrame, of: Sequence[str] = ("accuracy",), **options: Any) -> pd.DataFrame:
    """`compare` of every arm but the baseline; one row per arm and score, with its verdict and its change as text."""
    arms = [arm for arm in dict.fromkeys(table["arm"]) if arm != BASELINE]
    rows = [compare(table, arm, name, **options) for arm in arms for name in of]
    more = [{"difference": row.difference, "verdict": row.verdict, "text": f"{row.change:+.1f points}"} for row in rows]
    return pd.DataFrame([vars(row) | also for row, also in zip(rows, more, strict=True)])


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of as uneven a split of the answers that changed, if either way were equally likely.

    >>> mcnemar(0, 0), mcnemar(5, 0), round(mcnemar(1, 9), 4)
    (1.0, 0.0625, 0.0215)
    """
    from scipy.stats import binomtest  # takes a second to import

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _metrics(of: str) -> Iterator[tuple[str, Any]]:
    """(family, metric) of a score; none of the accuracy of everything."""
    families = [] if of == "accuracy" else FAMILIES if of == AVG else [of]
    for family in families:
        if family not in FAMILIES:
            raise EmbedLensError(f"unknown score {of!r}: use 'accuracy', {', '.join(map(repr, FAMILIES))} or {AVG!r}")
        yield from ((family, metric) for metric in FAMILIES[family])


def _of_arm(table: pd.DataFrame, arm: str) -> list[pd.DataFrame]:
    """The rows of each seed, in the order of the questions."""
    rows = table[table["arm"] == arm]
    if rows.empty:
        raise EmbedLensError(f"the table has no arm {arm!r}: it has {', '.join(map(repr, table['arm'].unique()))}")
    if rows.duplicated(["seed", "item"]).any():
        raise EmbedLensError(f"{arm!r} answered a question twice with one seed: pass each arm's rows once")
    return [part.sort_values("item") for _, part in rows.groupby("seed")]


def _chosen(rows: pd.DataFrame, of: str) -> pd.DataFrame:
    """The rows that count for a score."""
    chosen = rows if len({family for family, _ in _metrics(of)}) != 1 else rows[rows["family"] == of]
    if chosen.empty:
        raise EmbedLensError(f"the table has no question of {of!r}: ask family_questions({of!r})")
    return chosen


def _resampled(
    runs: Sequence[pd.DataFrame], of: str, correct: str, resamples: int, seed: int
) -> list[Float[np.ndarray, " resamples"]]:
    """Of each run the mean of families of mean of metrics, on all pictures (entry 0) and on each draw of them."""
    ids = np.unique(runs[0]["id"].to_numpy())
    times = np.vstack([np.ones((1, len(ids))), draws(len(ids), resamples, seed)])

    def ratio(of_rows: pd.Series, hits: Any, asked: Any) -> Float[np.ndarray, " resamples"]:
        places = np.searchsorted(ids, of_rows.to_numpy())
        hit, counted = (times @ np.bincount(places, part, len(ids)) for part in (hits, asked))
        return np.where(counted > 0, hit, np.nan) / np.maximum(counted, 1e-12)

    found = []
    for rows in runs:
        families: dict[str, list[np.ndarray]] = {}
        for family, metric in _metrics(of):
            families.setdefault(family, []).append(ratio(*metric_parts(rows, family, metric, correct)))
        every = families or {of: [ratio(rows["id"], rows[correct].to_numpy(float), np.ones(len(rows)))]}
        found.append(np.mean([np.mean(ratios, axis=0) for ratios in every.values()], axis=0))
    return found


def _estimate(found: Float[np.ndarray, " resamples"], rows: pd.DataFrame, level: float) -> Estimate:
    """Percentiles of a score or a difference, whose entry 0 is the value itself; never nearer than chance allows.

    >>> _estimate(np.zeros(10), pd.DataFrame({"id": range(96)}), 0.95).high
    0.03847...
    """
    from scipy.stats import norm

    value, *_ = found = steady(found)
    low, high = np.nanquantile(found[1:], [(1 - level) / 2, (1 + level) / 2])
    unseen = norm.ppf((1 + level) / 2) ** 2
    unseen /= len(rows) + unseen
    low, high = max(-1.0, min(low, value - unseen)), min(1.0, max(high, value + unseen))
    return Estimate(float(value), float(low), float(high), rows["id"].nunique())
