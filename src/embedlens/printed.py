"""The paper's printed tables of answers (`printed.csv`), and what follows from them. Nothing here was measured.

Tables a, b and c of Appendix A give twelve benchmark scores a row, Tables 1 and 2 of the text four family means, Avg
all of LLaVA-1.5-7B. The body of Table 3 is missing from the text that this book has; Table c stands for it. Table a
prints the row of MLP1/2,ATT2 twice, with two values of Avg.
"""

from __future__ import annotations

from importlib.resources import files

import pandas as pd

BENCHMARKS = {
    "general": ["GQA", "MME-P", "MMStar", "MMBench"],
    "ocr": ["TextVQA", "OCRBench", "DocVQA"],
    "grounding": ["RefCOCO+ val", "RefCOCO testA", "RefCOCO testB"],
    "hallucination": ["POPE", "HallusionBench"],
}
COLUMNS = [*BENCHMARKS, "Avg"]
SUMS_UP = {"1": "a", "2": "b"}  # the table of scores that a table of means sums up


def table(name: str) -> pd.DataFrame:
    """A table as printed, by row: of "a", "b" and "c" the scores and Avg, of "1" and "2" the family means and Avg.

    >>> table("b").loc["-dead", ["POPE", "Avg"]].tolist()
    [86.0, 53.7]
    """
    with files("embedlens").joinpath("printed.csv").open(encoding="utf-8") as file:
        rows = pd.read_csv(file, dtype={"table": str})
    return rows[rows.table == name].drop(columns="table").set_index("row").dropna(axis="columns")


def means(name: str) -> pd.DataFrame:
    """Family means of a table of scores and Avg, the mean of the four (Appendix A); MME counts to 2000.

    >>> means("a").iloc[0].round(2).tolist()
    [58.71, 36.97, 53.97, 61.05, 52.67]
    """
    scores = table(name).assign(**{"MME-P": lambda rows: rows["MME-P"] / 20})
    found = pd.DataFrame({family: scores[of].mean(axis=1) for family, of in BENCHMARKS.items()})
    return found.assign(Avg=found.mean(axis=1))


def changes(name: str) -> pd.DataFrame:
    """By how many points the means of each row differ from those of the first.

    >>> changes("c").grounding[:2].round(1).to_dict()
    {'-vMHA': -3.3, '-vFFN': -16.8}
    """
    found = means(name)
    return found.iloc[1:] - found.iloc[0]


def contradictions() -> pd.DataFrame:
    """Printed means that are not those of their scores: table, row, column, printed, follows, and whether the
    rounding of the scores, which are printed to 0.1, could explain it."""
    rows = []
    for name in (*SUMS_UP, "a", "b", "c"):
        follow = means(SUMS_UP.get(name, name))
        follow = follow[~follow.index.duplicated()] if name in SUMS_UP else follow
        shown = table(name)
        follow = follow.loc[shown.index] if name in SUMS_UP else follow
        for at, row in enumerate(shown.index):
            for column in COLUMNS if name in SUMS_UP else ["Avg"]:
                said, due = float(shown[column].iloc[at]), float(follow[column].iloc[at])
                if round(abs(said - due), 6) > 0.05:
                    rows.append((name, row, column, said, due, round(abs(said - due), 6) <= 0.1))
    return pd.DataFrame(rows, columns=["table", "row", "column", "printed", "follows", "rounding"])
