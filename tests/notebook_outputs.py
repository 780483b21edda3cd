"""Are two runs of a notebook the same? Words exactly, numbers as numbers.

Another processor adds in another order, so the last digits of a measurement are the machine's. Compared here are the
outputs of code cells: what was printed, tables, glued values, and whether there is a figure; never a figure's pixels,
stderr (a library's remark about its cache is no result), durations, dates, or the folders above the repository's.

- A *number* may differ by 1 %, or by two units of its last digit if that is more: the finer of the two as printed, the
  fourth significant digit for a glued float (not for a glued text that holds numbers), because `book.glue` rounds to
  that. So a sign may only turn within two units of zero. A count is a number like any other: where one picture more or
  less falls under a threshold is noise.
- A *name* is equal: every word (verdicts too), punctuation, a number that is part of a word (`E40`, `MLP-2`, `4x4`,
  `·0.25`), whole numbers behind a word of `NAMING` (`layers 2, 3 and 5`, a column or a glued key `layer`), and all that
  a table holds in its header and in front of its rows. So is the number of words, rows, columns and outputs.

Whitespace is not compared: how pandas aligns or wraps a frame follows from its longest number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

RELATIVE, UNITS = 0.01, 2
NAMING = re.compile(r"(?:layer|rank|head|dimension|id)s?|picture|seed", re.I)
LISTING = re.compile(r"[,–-]|and|or|to", re.I)
NOT_COMPARED = (
    re.compile(r"\b(?:\d+(?:\.\d+)? ?(?:ms|s|min)\b\s*)+"),
    re.compile(r"\b\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2})?)?\b"),
    re.compile(r"(?:/[\w.-]+)+/(?=(?:_build|notebooks|results|src)/)"),
)
TOKEN = re.compile(
    r"(?P<number>(?<![\w.·])[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.(?P<decimals>\d+))?(?:e(?P<exponent>[+-]?\d+))?(?!\w|\.\d))"
    r"|[^\W\d]\w*(?:[-./'·]\w+)*|\w+(?:\.\w+)*|\S",
    re.I,
)
FIGURE = "(a figure)"
RECORD = "application/papermill.record/"


def differences(committed: Mapping[str, Any], fresh: Mapping[str, Any]) -> list[str]:
    """What a fresh run of a notebook shows otherwise than the committed one, a sentence each; none if it is the same.

    Args:
        committed: the notebook as nbformat gives it, outputs and all.
        fresh: the same notebook after another run. Cells are numbered from 0, as `book.run_faults` does.
    """
    pairs = [
        [(number, cell) for number, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "code"]
        for notebook in (committed, fresh)
    ]
    if len(pairs[0]) != len(pairs[1]):
        return [f"{len(pairs[0])} code cells are now {len(pairs[1])}"]
    return [
        f"cell {number}: {difference}"
        for (number, before), (_, after) in zip(*pairs, strict=True)
        if "nbval-ignore-output" not in before["metadata"].get("tags", [])  # a cell that times something
        for difference in cell_differences(before["outputs"], after["outputs"])
    ]


def cell_differences(committed: Sequence[Mapping[str, Any]], fresh: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same for the outputs of one cell."""
    found = []
    for (kind, before), (new_kind, after) in zip_longest(shown(committed), shown(fresh), fillvalue=("nothing", [])):
        if kind == new_kind == "printed" and same(*(" ".join(line for _, line in lines) for lines in (before, after))):
            continue  # also where print wrapped a frame elsewhere
        places, new_places = [place for place, _ in before], [place for place, _ in after]
        if kind != new_kind or places != new_places:
            gone = [text for text in before if text[0] not in new_places]
            come = [text for text in after if text[0] not in places]
            if not gone and not come:
                gone, come = before, after
            found.append(f"{kind} of {len(before)}{excerpt(gone)} is now {new_kind} of {len(after)}{excerpt(come)}")
            continue
        found += [
            f"{kind} {place}".strip() + f": {old!r} is now {new!r}"
            for (place, old), (_, new) in zip(before, after, strict=True)
            if not same(f"{place} {old}", f"{place} {new}", glued=kind == "glued" and old[:1] not in ("'", '"'))
        ]
    return found


def excerpt(texts: Sequence[tuple[str, str]]) -> str:
    words = " / ".join(f"{place} {text}".strip() for place, text in texts)
    return f" ({words[:200]}{'…' * (len(words) > 200)})" if words else ""


def shown(outputs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What a reader sees of a cell: a kind each, with its texts and where they stand (a column, a glued key)."""
    seen: list[tuple[str, list[tuple[str, str]]]] = []
    printed = "".join(text_of(output["text"]) for output in outputs if output.get("name") == "stdout")
    if printed.strip():
        seen.append(("printed", [("", line) for line in printed.splitlines() if line.strip()]))
    for output in outputs:
        if output["output_type"] == "error":
            seen.append(("error", [("", f"{output['ename']}: {output['evalue']}")]))
        data = {mime: content for mime, content in output.get("data", {}).items() if "widget" not in mime}
        if not data:
            continue
        key = output.get("metadata", {}).get("scrapbook", {}).get("name")
        plain = text_of(data.get(f"{RECORD}text/plain", data.get("text/plain", "")))
        cells = list(table_cells(text_of(data["text/html"]))) if "text/html" in data else []
        if any("image/" in mime for mime in data):
            seen.append(("figure", [(key or "", FIGURE if key else plain)]))
        elif key:
            seen.append(("glued", [(key.replace("_", " "), plain)]))
        elif cells:
            seen.append(("table", cells))
        else:
            seen.append(("shown", [("", plain or str(data))]))
    return seen


def table_cells(html: str) -> Iterator[tuple[str, str]]:
    """The cells of an HTML table that hold values, each under its place: all names of its row and of its column."""
    from bs4 import BeautifulSoup

    above: list[str] = []
    for number, row in enumerate(BeautifulSoup(html, "html.parser").find_all("tr")):
        names = [cell.get_text(" ", strip=True) for cell in row.find_all("th")]
        values = [cell.get_text(" ", strip=True) for cell in row.find_all("td")]
        if not values:
            above = above or names
            yield f"header {' | '.join(names)}", ""
            continue
        columns = above[-len(values) :] if len(above) >= len(values) else [""] * len(values)
        for column, value in zip(columns, values, strict=True):
            yield f"row {number} ({', '.join(names)}) {column}", value


def text_of(content: Any) -> str:
    return "".join(content) if isinstance(content, list) else str(content)


def same(committed: str, fresh: str, glued: bool = False) -> bool:
    """Equal words and near numbers, in the same order.

    >>> same("E40 0.0002043 (0.45 to 0.48) holds", "E40  0.0002044 (0.46 to 0.48) holds")
    True
    >>> same("layers 2 and 3", "layers 2 and 4")
    False
    """
    before, after = tokens(committed), tokens(fresh)
    if len(before) != len(after):
        return False
    for (word, number), (other_word, other_number) in zip(before, after, strict=True):
        if number is None or other_number is None:
            if word != other_word:
                return False
        elif not near(number, other_number, fourth_digit=glued and bool(re.search(r"[.e]", word + other_word))):
            return False
    return True


def near(a: tuple[float, float], b: tuple[float, float], fourth_digit: bool = False) -> bool:
    """Numbers with the unit of their last digit: within 1 % or two units."""
    unit = min(a[1], b[1])
    if fourth_digit:
        unit = 10.0 ** (math.floor(math.log10(abs(a[0]))) - 3) if a[0] else 1e-4
    return abs(a[0] - b[0]) <= max(RELATIVE * abs(a[0]), UNITS * unit) * (1 + 1e-9)


def tokens(text: str) -> list[tuple[str, tuple[float, float] | None]]:
    """The words of a text and, for those that are numbers rather than names, value and unit of the last digit."""
    text = text.replace("−", "-")
    for pattern in NOT_COMPARED:
        text = pattern.sub(" ", text)
    found: list[tuple[str, tuple[float, float] | None]] = []
    naming = False
    for match in TOKEN.finditer(text):
        word, number = match[0], None
        if match["number"] and not (naming and word.isdigit()):
            places = len(match["decimals"] or "") - int(match["exponent"] or 0)
            number = float(word.replace(",", "")), 10.0**-places
        listed = number is None and (word.isdigit() or LISTING.fullmatch(word))
        naming = bool(NAMING.fullmatch(word) or (naming and listed))
        found.append((word, number))
    return found
