"""An arm against the baseline, question by question: difference, interval over pictures, McNemar, equivalence.

The same questions are asked under every arm, so what is compared is what changes: two scores with overlapping
intervals can differ clearly, and two equal ones can hide that half the answers flipped.

    degradation           the 95 % interval of the difference lies below zero, and McNemar's p, where there is one, is
                          below 5 %
    improvement           the same, above
    no degradation shown  neither, and the 90 % interval lies within the margin on both sides (two one-sided tests)
    undecided             none of these: the questions are too few to say
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Shaped

from embedlens.errors import EmbedLensError
from embedlens.intervals import Interval, draws, steady
from embedlens.stats import Estimate
from embedlens.tasks import FAMILIES, Metric, metric_parts, rows_of

if TYPE_CHECKING:
    import pandas as pd

MARGIN = 0.01  # one point: what the paper's tables call stable
LEVEL = 0.95
BASELINE = "baseline"
AVG = "Avg"


@dataclass(frozen=True)
class Comparison:
    """How one arm's score differs from the baseline's on the same questions. Scores are from 0 to 1."""

    arm: str
    of: str
    """What is compared: "accuracy", a family, or "Avg"."""
    baseline: float
    score: float
    """The arm's; of several seeds their mean."""
    difference: float
    low: float
    high: float
    """95 % interval of the difference, over pictures."""
    narrow_low: float
    narrow_high: float
    """90 % interval, which the equivalence test asks to lie within the margin."""
    margin: float
    questions: int
    pictures: int
    seeds: int
    acted: float
    """Share of the answers before which the arm changed anything."""
    gained: float
    lost: float
    """Answers wrong under the baseline and right under the arm, and the other way round; a mean over seeds."""
    p: float
    """McNemar's exact test, two-sided; nan for F1 and for several seeds."""

    @property
    def change(self) -> Estimate:
        """The difference with its 95 % interval."""
        return Estimate(self.difference, self.low, self.high, self.pictures)

    @property
    def narrow(self) -> Estimate:
        """The difference with its 90 % interval: `narrow > -0.01 and narrow < 0.01` are two one-sided tests."""
        return Estimate(self.difference, self.narrow_low, self.narrow_high, self.pictures)

    @property
    def needed(self) -> int | None:
        """About how many pictures would show that nothing is lost beyond the margin; None: it is lost, or no number
        would show it."""
        return self.narrow.needed(-self.margin) if self.difference > -self.margin else None

    @property
    def equivalent(self) -> bool:
        """Within the margin on both sides: two one-sided tests at 5 % each."""
        return -self.margin < self.narrow_low and self.narrow_high < self.margin

    @property
    def not_worse(self) -> bool:
        """Above minus the margin: one of the two tests, which an improvement also passes."""
        return -self.margin < self.narrow_low

    @property
    def verdict(self) -> str:
        """One of the four that the module describes; "undecided" also where the arm never acted."""
        agreed = math.isnan(self.p) or self.p < 1 - LEVEL
        if not self.acted:
            return "undecided"
        if self.high < 0 and agreed:
            return "degradation"
        if self.low > 0 and agreed:
            return "improvement"
        return "no degradation shown" if self.equivalent else "undecided"

    def text(self) -> str:
        """In points, for tables.

        >>> compare_answers([1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0], resamples=100).text()
        '-25.0 points (-75.0 to 24.0)'
        """
        value, low, high = (round(100 * part, 1) + 0.0 for part in (self.difference, self.low, self.high))
        return f"{value:+.1f} points ({low:.1f} to {high:.1f})"


def compare(
    table: pd.DataFrame,
    arm: str,
    of: str = "accuracy",
    baseline: str = BASELINE,
    correct: str = "correct",
    margin: float = MARGIN,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """One arm of a sweep against another, by default the baseline.

    Pictures are drawn in the bootstrap, the same ones for both arms and for all families. A bootstrap cannot draw what
    no picture shows: where no answer differs, its interval is a point. So neither bound is nearer to the difference
    than z² / (n + z²), which is Tango's score interval for n questions of which none differs.

    Args:
        table: from `embedlens.sweep.run_arms`: columns item, id, family, kind, answer, arm, seed, acted, prediction
            and correct.
        arm: of several seeds the scores are averaged; they are the repeats of a random control.
        baseline: one seed, or the seeds of the arm: each is then compared with the arm's of its own seed, and the
            differences are averaged.
        of: "accuracy" of all questions in the table, a family (the mean of its metrics), or "Avg" of the four.
        correct: the column that says what is right; "correct_original" reads boxes in the original picture's frame.
        margin: of the equivalence test, in the scores' unit.

    Raises:
        EmbedLensError: an arm or family that is not there, or arms that answered other questions.

    Source: Tango, Statistics in Medicine 17 (1998).
    """
    if margin <= 0 or resamples < 1:
        raise EmbedLensError(f"margin is {margin} and resamples {resamples}: both are above 0")
    base = _of_arm(table, baseline)
    repeats = _of_arm(table, arm)
    seeds = [[int(rows["seed"].iloc[0]) for rows in runs] for runs in (base, repeats)]
    if len(base) != 1 and seeds[0] != seeds[1]:
        raise EmbedLensError(
            f"{baseline!r} was run with {len(base)} seeds: compare with an arm that has one, or the same seeds"
        )
    for rows in (*base[1:], *repeats):
        if not np.array_equal(rows["item"].to_numpy(), base[0]["item"].to_numpy()):
            raise EmbedLensError(f"{arm!r} and {baseline!r} answered other questions: run both on the same items")
    wanted = _metrics(of)
    parts = [_chosen(rows, of) for rows in (*base, *repeats)]
    ids, places = np.unique(parts[0]["id"].to_numpy(), return_inverse=True)
    sums = [
        [[_sums(rows, family, metric, correct, ids) for family, metric in metrics] for metrics in wanted]
        for rows in parts
    ]
    times = np.vstack([np.ones((1, len(ids))), draws(len(ids), resamples, seed)])
    scores = [_scores(times, found) for found in sums]
    of_base, of_arm = np.mean(scores[: len(base)], axis=0), np.mean(scores[len(base) :], axis=0)
    change = steady(of_arm - of_base)
    low, high = _interval(change, LEVEL, len(places))
    narrow_low, narrow_high = _interval(change, 2 * LEVEL - 1, len(places))
    right = [rows[correct].to_numpy(dtype=float) for rows in parts]
    before, after = right[: len(base)], right[len(base) :]
    before = before * (len(after) // len(before))
    gained = float(np.mean([((now > 0) & ~(was > 0)).sum() for was, now in zip(before, after, strict=True)]))
    lost = float(np.mean([(~(now > 0) & (was > 0)).sum() for was, now in zip(before, after, strict=True)]))
    counts = not any(metric is not None and metric.f1 for metrics in wanted for _, metric in metrics)
    return Comparison(
        arm=arm,
        of=of,
        baseline=float(of_base[0]),
        score=float(of_arm[0]),
        difference=float(change[0]),
        low=low,
        high=high,
        narrow_low=narrow_low,
        narrow_high=narrow_high,
        margin=margin,
        questions=len(places),
        pictures=len(ids),
        seeds=len(repeats),
        acted=float(np.mean([rows["acted"].mean() for rows in parts[len(base) :]])),
        gained=gained,
        lost=lost,
        p=mcnemar(int(gained), int(lost)) if counts and len(repeats) == 1 else math.nan,
    )


def scored(
    table: pd.DataFrame, arm: str, of: str = "accuracy", correct: str = "correct", resamples: int = 2000, seed: int = 0
) -> Interval:
    """The score of one arm with its 95 % interval over pictures; several seeds are averaged.

    Arguments are those of `compare`, and so is the rule for an arm that answers all or nothing rightly: no bound is
    nearer than chance allows. Two such intervals that overlap say little about a difference: use `compare`.
    """
    runs = [_chosen(rows, of) for rows in _of_arm(table, arm)]
    ids = np.unique(runs[0]["id"].to_numpy())
    times = np.vstack([np.ones((1, len(ids))), draws(len(ids), resamples, seed)])
    sums = [
        [[_sums(rows, family, metric, correct, ids) for family, metric in metrics] for metrics in _metrics(of)]
        for rows in runs
    ]
    found = np.mean([_scores(times, parts) for parts in sums], axis=0)
    low, high = _interval(found, LEVEL, len(runs[0]))
    return Interval(*(np.array(part) for part in (found[0], max(0.0, low), high)))


def compare_answers(
    baseline: Sequence[float] | Shaped[np.ndarray, " questions"],
    arm: Sequence[float] | Shaped[np.ndarray, " questions"],
    pictures: Sequence[int] | Shaped[np.ndarray, " questions"] | None = None,
    margin: float = MARGIN,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """`compare` of two lists of right (1) and wrong (0) answers to the same questions.

    Args:
        baseline: one entry per question.
        arm: the same questions in the same order.
        pictures: id of each question's picture; by default one picture a question.

    >>> found = compare_answers([1.0] * 50 + [0.0] * 50, [0.0] * 30 + [1.0] * 20 + [0.0] * 50)
    >>> found.verdict, found.difference, found.lost
    ('degradation', -0.3, 30.0)
    """
    import pandas as pd

    if len(baseline) != len(arm) or (pictures is not None and len(pictures) != len(baseline)):
        raise EmbedLensError(f"{len(baseline)} and {len(arm)} answers: pass the same questions, and a picture for each")
    ids = range(len(baseline)) if pictures is None else pictures
    table = pd.concat(
        pd.DataFrame({"item": range(len(right)), "id": ids, "correct": right, "arm": name, "seed": 0, "acted": True})
        for name, right in ((BASELINE, baseline), ("arm", arm))
    )
    return compare(table, "arm", margin=margin, resamples=resamples, seed=seed)


def comparisons(
    table: pd.DataFrame,
    of: Sequence[str] = ("accuracy",),
    baseline: str = BASELINE,
    margin: float = MARGIN,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """`compare` of every arm but the baseline; one row per arm and score, with its verdict and text."""
    import pandas as pd

    rows = [
        compare(table, arm, name, baseline, margin=margin, resamples=resamples, seed=seed)
        for arm in dict.fromkeys(table["arm"])
        if arm != baseline
        for name in of
    ]
    return pd.DataFrame([asdict(row) | {"verdict": row.verdict, "text": row.text()} for row in rows])


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of as uneven a split of the answers that changed, if either way were equally likely.

    >>> mcnemar(0, 0), mcnemar(5, 0), round(mcnemar(1, 9), 4)
    (1.0, 0.0625, 0.0215)
    """
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


# --- pieces ----------------------------------------------------------------------------------------------------------

#: Per family its (family, metric); (None, None) is the accuracy of everything.
_Wanted = list[list[tuple["str | None", "Metric | None"]]]


def _metrics(of: str) -> _Wanted:
    if of == "accuracy":
        return [[(None, None)]]
    families = list(FAMILIES) if of == AVG else [of]
    if families[0] not in FAMILIES:
        raise EmbedLensError(f"unknown score {of!r}: use 'accuracy', {', '.join(map(repr, FAMILIES))} or {AVG!r}")
    return [[(family, metric) for metric in FAMILIES[family]] for family in families]


def _of_arm(table: pd.DataFrame, arm: str) -> list[pd.DataFrame]:
    """The rows of each seed, in the order of the questions."""
    rows = table[table["arm"] == arm]
    if rows.empty:
        known = ", ".join(map(repr, dict.fromkeys(table["arm"])))
        raise EmbedLensError(f"the table has no arm {arm!r}: it has {known}")
    found = [part.sort_values("item") for _, part in rows.groupby("seed")]
    if any(part["item"].duplicated().any() for part in found):
        raise EmbedLensError(f"{arm!r} answered a question twice with one seed: pass each arm's rows once")
    return found


def _chosen(rows: pd.DataFrame, of: str) -> pd.DataFrame:
    """The rows that count for a score."""
    if of == "accuracy":
        return rows
    chosen = rows if of == AVG else rows[rows["family"] == of]
    if chosen.empty:
        raise EmbedLensError(f"the table has no question of {of!r}: ask family_questions({of!r})")
    return chosen


def _sums(
    rows: pd.DataFrame, family: str | None, metric: Metric | None, correct: str, ids: np.ndarray
) -> tuple[Float[np.ndarray, " pictures"], Float[np.ndarray, " pictures"]]:
    """What each picture adds to numerator and denominator of a metric."""
    if family is None or metric is None:
        hits, asked = [float(value) for value in rows[correct]], [1.0] * len(rows)
    else:
        rows = rows_of(rows, family, metric)
        hits, asked = metric_parts(rows, metric, correct)
    places = np.searchsorted(ids, rows["id"].to_numpy())
    summed = [np.bincount(places, weights=values, minlength=len(ids)) for values in (hits, asked)]
    return summed[0], summed[1]


def _scores(
    times: Float[np.ndarray, "resamples pictures"],
    sums: Sequence[Sequence[tuple[Float[np.ndarray, " pictures"], Float[np.ndarray, " pictures"]]]],
) -> Float[np.ndarray, " resamples"]:
    """Mean of families of mean of metrics; nan where a resample asks nothing of a metric."""
    families = []
    for metrics in sums:
        ratios = []
        for hits, asked in metrics:
            counted = times @ asked
            ratios.append(np.where(counted > 0, times @ hits, np.nan) / np.maximum(counted, 1e-12))
        families.append(np.mean(ratios, axis=0))
    return np.mean(families, axis=0)


def _interval(change: Float[np.ndarray, " resamples"], level: float, questions: int) -> tuple[float, float]:
    """Percentiles of the resamples after the first, which is the value itself; never nearer to it than chance allows.

    >>> _interval(np.zeros(10), 0.95, questions=96)
    (-0.03847..., 0.03847...)
    """
    from scipy.stats import norm

    change = steady(change)
    low, high = np.nanquantile(change[1:], [(1 - level) / 2, (1 + level) / 2])
    squared = norm.ppf((1 + level) / 2) ** 2
    unseen = squared / (questions + squared)
    return float(max(-1.0, min(low, change[0] - unseen))), float(min(1.0, max(high, change[0] + unseen)))
