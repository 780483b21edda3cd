"""A chapter's cells, one after the other, in this process: without pictures with patches, its model given."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import embedlens as el

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def run_chapter(chapter: str, loaded: Any, monkeypatch: Any, calibration: int = 4, **parameters: Any) -> dict[str, Any]:
    """The names that a chapter leaves, and its record where `out` is among the parameters."""
    monkeypatch.setattr(el, "load", lambda *_, **__: loaded)
    monkeypatch.setattr("embedlens.groups.CALIBRATION", calibration)  # this is about running, not about what is found
    (page,) = NOTEBOOKS.glob(f"{chapter}*.ipynb")
    names: dict[str, Any] = {}
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            tree.body = [node for node in tree.body if "figure" not in map(ast.unparse, getattr(node, "targets", ()))]
            exec(compile(tree, f"{chapter} {cell['id']}", "exec"), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                names |= parameters
    return names
