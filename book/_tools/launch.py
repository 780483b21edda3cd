"""The cells that every notebook begins with: install what is missing (as on Colab), check the parameters.

`python book/_tools/launch.py` writes both into the notebooks of a checkout, with the address that `repository: url:` in
`_config.yml` says; the theme's launch buttons go by the same setting.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import book_build as book

INSTALL, CHECK = "install", "check-parameters"  # ids of the cells
CHECKING = """\
from embedlens import parameters

parameters.check(globals(), globals().get("In", ()))"""


def address_of(root: Path) -> str:
    """Web address of the repository as `_config.yml` says it; empty: none yet."""
    import yaml

    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8")) or {}
    return (config.get("repository") or {}).get("url") or ""


def installing(address: str) -> str:
    """Source of the first cell.

    Args:
        address: of the repository, such as https://github.com/owner/name; empty: unknown, and only a checkout helps.

    >>> "git+https://github.com/owner/name" in installing("https://github.com/owner/name")
    True
    """
    package = '"..[notebook]"'
    first = """\
    if not os.path.isfile("../pyproject.toml"):
        raise ModuleNotFoundError("open this in a checkout of the book or pip install 'embedlens[notebook] @ git+…'")"""
    if address:
        package = "package"
        first = f"""\
    here = os.path.isfile("../pyproject.toml")  # in a checkout
    package = "..[notebook]" if here else "embedlens[notebook] @ git+{address}\""""
    return f"""\
import os
import subprocess
import sys
from importlib.util import find_spec

if find_spec("embedlens") is None:  # as on Colab; elsewhere nothing is installed
{first}
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", {package}], check=True)
if os.path.isdir("/content/drive/MyDrive"):  # Colab's, mounted: after a disconnect what was measured is found there
    os.environ.setdefault("EMBEDLENS_ROWS", "/content/drive/MyDrive/embedlens-rows")"""


def stated(notebook: Any) -> str | None:
    """The address that a notebook's first cell installs from; empty: none is known; None: it has no such cell."""
    for cell in notebook["cells"]:
        if cell["id"] == INSTALL:
            found = re.search(r"git\+(https?://[^\"]+)", cell["source"])
            return found[1] if found else ""
    return None


def begin(notebook: Any, address: str = "") -> bool:
    """Give a notebook its first cell and, where it has parameters, the check behind them; whether anything changed.

    Cells are known by their `id`: one that is there keeps place and count, a new one waits for the next run.
    """
    import nbformat.v4

    cells, changed = notebook["cells"], False
    for name, source, before in ((INSTALL, installing(address), "code"), (CHECK, CHECKING, "parameters")):
        there = next((cell for cell in cells if cell["id"] == name), None)
        if there is None:
            at = [
                place
                for place, cell in enumerate(cells)
                if before == cell["cell_type"] or before in cell["metadata"].get("tags", [])
            ]
            if not at:
                continue
            there = nbformat.v4.new_code_cell("", id=name, metadata={"tags": ["remove-cell"]})
            cells.insert(at[0] + (name == CHECK), there)
        changed |= there["source"] != source
        there["source"] = source
    return changed


def main(names: Sequence[str] = ()) -> None:
    """Write the first cells into the notebooks of this checkout: all, or those named as for `embedlens book`."""
    root = book.find_root()
    for page in book.chapters(root, list(names) or None):
        notebook = book.read(root / page)
        if begin(notebook, address_of(root)):
            book.write(notebook, root / page)
            print(f"{page}: first cells written")


if __name__ == "__main__":
    main(sys.argv[1:])
