"""The cells that every notebook begins with: install what is missing, check the parameters.

The first cell installs the package where it is missing (Colab) and does nothing elsewhere; the cell behind the
parameters checks them. `python -m embedlens.launch` writes both into the notebooks of a checkout, again and again with
the same result; outputs stay, because neither cell has any.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from embedlens import book
from embedlens.address import address_of

INSTALL, CHECK = "install", "check-parameters"
HIDDEN = ["remove-cell"]
CHECKING = """\
from embedlens import parameters

parameters.check(globals(), globals().get("In", ()))"""


def installing(address: str) -> str:
    """Source of the first cell.

    Args:
        address: of the repository, such as https://github.com/owner/name; empty: unknown, and only a checkout helps.

    >>> "git+https://github.com/owner/name" in installing("https://github.com/owner/name")
    True
    """
    home = f"""
    home = Path("..").resolve().as_uri() if Path("../pyproject.toml").is_file() else "git+{address}\""""
    if not address:
        home = """
    if not Path("../pyproject.toml").is_file():
        raise ModuleNotFoundError("embedlens is missing: pip install it from the repository of this notebook")
    home = Path("..").resolve().as_uri()"""
    return f"""\
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("embedlens") is None:  # as on Colab; elsewhere this cell does nothing{home}
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"embedlens[book] @ {{home}}"], check=True)"""


def stated(notebook: Any) -> str | None:
    """The address that a notebook's first cell installs from; empty: none is known; None: it has no such cell."""
    for cell in notebook["cells"]:
        if cell["id"] == INSTALL:
            found = re.search(r"git\+(https?://[^\"]+)", cell["source"])
            return found[1] if found else ""
    return None


def begin(notebook: Any, address: str = "") -> bool:
    """Give a notebook its first cell and, where it has parameters, the check behind them; whether anything changed.

    Cells are known by their `id`. A cell that moves others down adds one to their execution counts, which is what
    running the notebook again would do.
    """
    import nbformat.v4

    before = [(cell["id"], cell["source"]) for cell in notebook["cells"]]
    ran = any(cell.get("execution_count") for cell in notebook["cells"])
    cells = [cell for cell in notebook["cells"] if cell["id"] not in (INSTALL, CHECK)]
    if not any(cell["cell_type"] == "code" for cell in cells):
        return False
    new = {name: nbformat.v4.new_code_cell("", id=name, metadata={"tags": list(HIDDEN)}) for name in (INSTALL, CHECK)}
    new[INSTALL]["source"], new[CHECK]["source"] = installing(address), CHECKING
    first = next(place for place, cell in enumerate(cells) if cell["cell_type"] == "code")
    cells.insert(first, new[INSTALL])
    behind = [place for place, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", [])]
    if behind:
        cells.insert(behind[0] + 1, new[CHECK])
    notebook["cells"] = cells
    if ran:
        _renumber(cells)
    return before != [(cell["id"], cell["source"]) for cell in cells]


def _renumber(cells: Sequence[Any]) -> None:
    code = [cell for cell in cells if cell["cell_type"] == "code" and cell["source"].strip()]
    for count, cell in enumerate(code, start=1):
        cell["execution_count"] = count
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = count


def main(names: Sequence[str] = ()) -> None:
    """Write the first cells into the notebooks of this checkout: all, or those named as for `embedlens book`."""
    root = book.find_root()
    address = address_of(root)
    for page in book.chapters(root, list(names) or None):
        notebook = book.read(root / page)
        if begin(notebook, address):
            book.write(notebook, root / page)
            print(f"{page}: first cells written")


if __name__ == "__main__":
    main(sys.argv[1:])
