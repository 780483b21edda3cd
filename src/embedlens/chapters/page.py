"""What the page of every chapter begins and ends with: the book's look, values for the prose, verdicts, the record.

A chapter measures with the module of its subject, draws with it, and signs off here:

    page.begin()
    ...
    page.glue_all(page.verdicts(findings, model), lengths.told(), {"n_pictures": len(pictures)})
    page.sign_off(out, model, "05_alive_sparsity", n_images, seed, findings, lengths.numbers())
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedlens import claims, figures
from embedlens.book import glue
from embedlens.claims import Finding
from embedlens.intervals import Interval

if TYPE_CHECKING:
    import pandas as pd


def begin() -> None:
    """Figures in the book's style, tables as wide as the page."""
    import pandas as pd

    figures.set_style()
    pd.set_option("display.width", 160, "display.max_colwidth", None, "display.max_columns", 20)


def table(columns: Mapping[str, Interval], index: Any, name: str, digits: int | Mapping[str, int] = 2) -> pd.DataFrame:
    """Values with their intervals as a table.

    Args:
        columns: heading → values, one per row.
        index: what the rows are.
        name: what the index is called, such as "layer".
        digits: decimals of all columns, or of some (the others have 2).

    >>> import numpy as np
    >>> found = Interval(np.array([0.5, 0.25]), np.array([0.25, 0.0]), np.array([0.75, 0.5]))
    >>> table({"share": found}, range(2), "layer").loc[1, "share"]
    '0.25 (0.00 to 0.50)'
    """
    import pandas as pd

    places = {key: digits if isinstance(digits, int) else digits.get(key, 2) for key in columns}
    texts = {key: found.texts(places[key]) for key, found in columns.items()}
    return pd.DataFrame(texts, index=pd.Index(index, name=name))


def verdicts(findings: Mapping[str, Finding], model: str) -> dict[str, str]:
    """What every chapter's first lines say: agreement with the paper, the model, the kind of result, each verdict.

    Keys `agreement`, `model_name`, `kind`, and `e40_verdict` for a claim E40.

    >>> verdicts({"E13": Finding(0.2, 0.1, 0.3, 9, "holds", "It leads.")}, "miniature")["e13_verdict"]
    'holds'
    """
    said = {
        "agreement": claims.agreement(findings, model),
        "model_name": "the shipped miniature" if model == claims.MINIATURE else model,
        "kind": claims.kind_of_result(model),
    }
    return said | {f"{name.lower()}_verdict": found.verdict for name, found in findings.items()}


def parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the key that prose uses: an interval becomes three, the others stay.

    >>> import numpy as np
    >>> sorted(parts({"rise": Interval(*np.array([0.5, 0.25, 0.75])), "n": 3}))
    ['n', 'rise', 'rise_high', 'rise_low']
    """
    single: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Interval):
            single |= dict(zip((name, f"{name}_low", f"{name}_high"), value, strict=True))
        else:
            single[name] = value
    return single


def glue_all(*tables: Mapping[str, Any]) -> None:
    """Hand measured values to the prose, each as `embedlens.book.glue` does.

    Args:
        tables: key → value; a 0-d `Interval` under the key `rise` gives `rise`, `rise_low` and `rise_high`.

    Raises:
        ValueError: as `glue`, for what would print as a hole.
        TypeError: as `glue`, for what is not one value.
    """
    for values in tables:
        for name, value in parts(values).items():
            glue(name, value)


def sign_off(
    out: Path | str | None,
    model: str,
    chapter: str,
    n_images: int,
    seed: int,
    findings: Mapping[str, Finding],
    numbers: Mapping[str, float],
    **parameters: str | float,
) -> pd.DataFrame:
    """Write the record, as `claims.write` does, and give the table of verdicts: the last cell that a reader sees."""
    claims.write(out, model, chapter, n_images, seed, findings, numbers, **parameters)
    return claims.verdict_table(findings)
