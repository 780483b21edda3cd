"""The paper's printed tables of answers, and whether they follow from each other.

Tables a, b and c of Appendix A give twelve benchmark scores per row, Tables 1 and 2 of the text four family means and
Avg. The body of Table 3 is missing from the paper; Table c stands for it. All of LLaVA-1.5-7B, none measured here.

>>> [round(value, 2) for value in family_means(TABLE_A[0].scores)], round(average(TABLE_A[0].scores), 2)
([58.71, 36.97, 53.97, 61.05], 52.67)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from embedlens.errors import EmbedLensError

FAMILIES = ("general", "ocr", "grounding", "hallucination")
BENCHMARKS: Mapping[str, tuple[str, ...]] = {
    "general": ("GQA", "MME-P", "MMStar", "MMBench"),
    "ocr": ("TextVQA", "OCRBench", "DocVQA"),
    "grounding": ("RefCOCO+ val", "RefCOCO testA", "RefCOCO testB"),
    "hallucination": ("POPE", "HallusionBench"),
}
MME = 1  # place of the score that counts to 2000 and is divided by 20


class Row(NamedTuple):
    """One row of Table a, b or c."""

    name: str
    scores: tuple[float, ...]
    """In the order of BENCHMARKS, as printed."""
    avg: float


class Summary(NamedTuple):
    """One row of Table 1 or 2."""

    name: str
    families: tuple[float, float, float, float]
    avg: float


class Contradiction(NamedTuple):
    """A printed entry of Table 1 or 2 that is not what its row of Table a or b gives."""

    table: str
    row: str
    column: str
    printed: float
    follows: float
    """From the printed scores."""
    rounding: bool
    """Whether the rounding of the printed scores could explain it."""


def _row(name: str, *values: float) -> Row:
    return Row(name, values[:-1], values[-1])


BASELINE = _row("LLaVA-v1.5 7B", 61.9, 1507, 33.5, 64.1, 58.2, 31.2, 21.5, 50.0, 64.5, 47.4, 85.9, 36.2, 52.7)
# The paper prints the row of MLP1/2,ATT2 twice, with 52.8 and with 52.9 as its Avg.
TABLE_A = (
    BASELINE,
    _row("-ViT sinks", 61.9, 1502, 33.2, 64.5, 58.2, 31.5, 21.9, 50.4, 65.1, 47.6, 85.9, 36.3, 52.8),
    _row("-LLM sinks", 62.0, 1488, 33.5, 63.8, 58.2, 31.3, 21.5, 50.1, 64.2, 47.0, 85.9, 36.6, 52.7),
    _row("-all sinks", 62.0, 1499, 33.1, 64.3, 58.2, 31.4, 21.9, 50.5, 64.5, 47.4, 85.9, 36.6, 52.8),
    _row("LLM sinks skip MLP-2", 62.0, 1501, 32.9, 64.7, 58.2, 31.7, 21.6, 50.7, 64.9, 47.8, 85.7, 36.2, 52.8),
    _row("LLM sinks skip MLP-1, MHA-2", 61.9, 1517, 33.5, 64.3, 58.2, 31.6, 21.5, 50, 64.3, 47.4, 85.9, 36.4, 52.8),
    _row("LLM sinks skip MLP-1/2, MHA-2", 62.0, 1513, 33.4, 64.7, 58.2, 31.5, 21.5, 50.5, 64.6, 47.8, 85.8, 36.6, 52.8),
    _row("LLM sinks skip MLP-1/2, MHA-2", 62.0, 1513, 33.4, 64.7, 58.2, 31.5, 21.5, 50.5, 64.6, 47.8, 85.8, 36.6, 52.9),
    _row("others skip MLP-2", 61.9, 1525, 33.6, 64.2, 58.2, 31.6, 21.5, 50.4, 64.5, 48.1, 85.7, 35.8, 52.8),
)  # fmt: skip
TABLE_B = (
    BASELINE,
    _row("-dead", 61.8, 1495, 34, 64.1, 58.2, 31.6, 21.6, 53.4, 68.4, 51.4, 86, 36.3, 53.7),
    _row("-remaining", 60.5, 1475, 32.2, 62.5, 55.4, 29, 18.6, 44.4, 58.3, 42.9, 84.2, 36.2, 50.1),
)
TABLE_C = (
    BASELINE,
    _row("-vMHA", 61.9, 1472, 32.1, 63.5, 56.9, 30.3, 19, 45.1, 62.3, 44.5, 86.6, 36.7, 51.4),
    _row("-vFFN", 62.2, 1507, 33.7, 63.5, 56.3, 31.2, 18.7, 33.5, 46, 32.1, 86.6, 37.3, 48.3),
    _row("enter at 4, trained", 62.4, 1444, 34.0, 66.0, 55.9, 32.0, 21.8, 51.2, 67.9, 50.0, 85.6, 36.8, 53.2),
    _row("enter at 5, trained", 62.4, 1442, 33.3, 65.8, 56.5, 31.9, 21.6, 51.9, 68.0, 50.6, 85.8, 36.4, 53.3),
    _row("enter at 6, trained", 62.2, 1413, 33.1, 66.2, 57.3, 31.3, 21.2, 51.4, 67.3, 49.3, 85.4, 36.8, 52.9),
    _row("enter at 8, trained", 61.5, 1440, 32.7, 65.4, 56.1, 31.0, 20.5, 48.0, 64.0, 46.1, 85.4, 36.7, 51.9),
    _row("enter at 10, trained", 61.9, 1391, 33.3, 63.1, 57.6, 30.5, 20.0, 46.7, 63.8, 45.5, 85.9, 34.2, 51.3),
)
TABLE_1 = (
    Summary("LLaVA-v1.5 7B", (58.7, 36.9, 54.0, 61.1), 52.7),
    Summary("-LLM sinks", (58.6, 37.0, 54.4, 61.3), 52.7),
    Summary("-ViT sinks", (58.7, 37.2, 53.8, 61.1), 52.8),
    Summary("-all sinks", (58.6, 37.2, 54.1, 61.3), 52.8),
    Summary("LLM sinks skip MLP-2", (58.7, 37.2, 54.0, 61.0), 52.8),
    Summary("LLM sinks skip MLP-1, MHA-2", (58.9, 37.1, 53.9, 61.2), 52.8),
    Summary("LLM sinks skip MLP-1/2, MHA-2", (58.9, 37.1, 54.3, 61.2), 52.9),
    Summary("others skip MLP-2", (59.0, 37.1, 54.3, 60.8), 52.8),
)
TABLE_2 = (
    Summary("LLaVA-v1.5 7B", (58.7, 36.9, 54.0, 61.1), 52.7),
    Summary("-dead", (58.7, 37.1, 57.7, 61.2), 53.7),
    Summary("-remaining", (57.2, 34.3, 48.5, 60.2), 50.1),
)


def family_means(scores: Sequence[float]) -> tuple[float, float, float, float]:
    """Unweighted mean per family of twelve printed scores; MME is divided by 20 (Appendix A).

    Raises:
        EmbedLensError: not twelve scores.
    """
    if len(scores) != sum(map(len, BENCHMARKS.values())):
        raise EmbedLensError(f"{len(scores)} scores: pass the twelve of a row of Table a, b or c, in their order")
    of_100 = [value / 20 if place == MME else value for place, value in enumerate(scores)]
    means, start = [], 0
    for names in BENCHMARKS.values():
        means.append(sum(of_100[start : start + len(names)]) / len(names))
        start += len(names)
    general, ocr, grounding, hallucination = means
    return general, ocr, grounding, hallucination


def average(scores: Sequence[float]) -> float:
    """The paper's Avg: the mean of the four family means, not of the twelve scores."""
    return sum(family_means(scores)) / len(FAMILIES)


def changes(table: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Row → family (and Avg) → points by which it differs from the table's first row.

    >>> {name: round(change["grounding"], 1) for name, change in changes(TABLE_C[:3]).items()}
    {'-vMHA': -3.3, '-vFFN': -16.8}
    """
    first = (*family_means(table[0].scores), average(table[0].scores))
    return {
        row.name: {
            column: value - base
            for column, value, base in zip(
                (*FAMILIES, "Avg"), (*family_means(row.scores), average(row.scores)), first, strict=True
            )
        }
        for row in table[1:]
    }


def contradictions() -> list[Contradiction]:
    """Entries of Tables 1 and 2 that are not the rounded means of their rows in Tables a and b.

    Rows are matched by name; the row that Table a prints twice has the same scores both times.
    """
    found = []
    for label, summaries, rows in (("1", TABLE_1, TABLE_A), ("2", TABLE_2, TABLE_B)):
        scores = {row.name: row.scores for row in rows}
        for summary in summaries:
            found += [
                Contradiction(label, summary.name, column, printed, follows, rounding)
                for column, printed, follows, rounding in _entries(scores[summary.name], summary.families, summary.avg)
                if round(abs(printed - follows), 6) > 0.05
            ]
    return found


def contradictory_averages() -> list[Contradiction]:
    """Avg entries of Tables a, b and c that are not the rounded mean of the four family means of their own row."""
    return [
        Contradiction(label, row.name, "Avg", row.avg, average(row.scores), _by_rounding(row.avg, average(row.scores)))
        for label, rows in (("a", TABLE_A), ("b", TABLE_B), ("c", TABLE_C))
        for row in rows
        if round(abs(row.avg - average(row.scores)), 6) > 0.05
    ]


def _entries(scores: Sequence[float], families: Sequence[float], avg: float) -> list[tuple[str, float, float, bool]]:
    follow = (*family_means(scores), average(scores))
    return [
        (column, printed, follows, _by_rounding(printed, follows))
        for column, printed, follows in zip((*FAMILIES, "Avg"), (*families, avg), follow, strict=True)
    ]


def _by_rounding(printed: float, follows: float) -> bool:
    """Scores are printed to 0.1, so a mean of them is off by up to 0.05, and so is the printed mean itself."""
    return round(abs(printed - follows), 6) <= 0.1
