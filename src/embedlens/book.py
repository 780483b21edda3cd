"""What a notebook hands to the prose around it, and the checkout that a book is built from.

Running and rendering the book, `embedlens book`, is the checkout's own: `book/_tools`.
"""

from __future__ import annotations

import math
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from embedlens.errors import EmbedLensError


def glue(name: str, value: Any) -> None:
    """Hand one measured value to the prose: `` {glue:text}`name:.1%` `` prints it.

    Args:
        name: letters, digits and underscores; unique in its notebook.
        value: a number, a bool, a string, or anything with `.item()` (NumPy scalar, 0-d tensor); see `printable`.
    """
    from myst_nb import glue as myst_glue

    myst_glue(name, printable(name, value), display=False)


def printable(name: str, value: Any, digits: int = 4) -> bool | int | float | str:
    """What `glue` hands on: a plain Python value, floats rounded, because their last bits belong to the machine.
    `digits`: significant ones of a float; those before its point are all kept.

    Raises:
        ValueError: None, NaN, infinity, an empty string or a name that cannot be referred to: the sentence would print
            with a hole in it.
        TypeError: what is not one value, such as a figure or an array.

    >>> printable("pixels", 123456.789)
    123457.0
    >>> printable("recall", float("nan"))
    Traceback (most recent call last):
    ...
    ValueError: glue('recall', nan): not a finite number, so the sentence that uses it would say nothing; mend ...
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ValueError(f"glue({name!r}, …): use letters, digits and underscores only, so that prose can refer to it")
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if plain is None or (isinstance(plain, str) and not plain.strip()):
        raise ValueError(f"glue({name!r}, {plain!r}): nothing to print; glue a value or leave the sentence out")
    if not isinstance(plain, (bool, int, float, str)):
        kind = type(plain).__name__
        raise TypeError(f"glue({name!r}, …): a {kind} is not one value; glue a number, a bool or a string")
    if not isinstance(plain, float):
        return plain
    if not math.isfinite(plain):
        raise ValueError(
            f"glue({name!r}, {plain}): not a finite number, so the sentence that uses it would say nothing; "
            "mend the measurement (is it a mean over no samples?)"
        )
    whole = math.floor(math.log10(abs(plain))) + 1 if plain else 1
    return round(plain, max(0, digits - whole))


def find_root(start: Path | str = ".") -> Path:
    """The folder with `_toc.yml`: `start` or the nearest one above it; EmbedLensError outside a checkout."""
    start = Path(start).resolve()
    for folder in (start, *start.parents):
        if (folder / "_toc.yml").is_file() and (folder / "_config.yml").is_file():
            return folder
    raise EmbedLensError(f"no _toc.yml and _config.yml in {start} or above: run this in a checkout of the repository")


def builder() -> Any:
    """The module `book/_tools/book_build.py` of the checkout around the working folder."""
    tools = find_root() / "book" / "_tools"
    if not tools.is_dir():
        raise EmbedLensError(f"no {tools}: this checkout has lost its tools, restore them with git")
    if str(tools) not in sys.path:
        sys.path.insert(0, str(tools))
    return import_module("book_build")
