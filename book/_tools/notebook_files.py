"""Notebooks as files: read, written, cleaned of what belongs to one run on one machine."""

from __future__ import annotations

from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

from embedlens.errors import EmbedLensError

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
NOTEBOOK_METADATA = {"kernelspec", "language_info", "mystnb"}
CELL_METADATA = {"tags", "mystnb", "editable", "slideshow"}

Notebook = dict[str, Any]  # what nbformat reads: a dict with attribute access


class BookError(EmbedLensError):
    """The book cannot be run or rendered; where there are several findings, one to a line."""


def read(path: Path) -> Notebook:
    """The notebook at `path`, in format 4."""
    import nbformat

    return nbformat.read(path, as_version=4)


def write(notebook: Notebook, path: Path) -> None:
    """Write the notebook, ending in one newline."""
    import nbformat

    nbformat.write(notebook, path)


def tagged(notebook: Notebook, tag: str) -> list[Notebook]:
    """The cells that bear a tag."""
    return [cell for cell in notebook["cells"] if tag in cell["metadata"].get("tags", [])]


def cleaned(notebook: Notebook) -> Notebook:
    """The notebook without what belongs to one run on one machine (times, durations, versions, kernel names), and
    with its figures in a third of the bytes: every run that is committed stays in the repository's history."""
    notebook["metadata"] = {
        **{key: value for key, value in notebook["metadata"].items() if key in NOTEBOOK_METADATA},
        "kernelspec": dict(KERNEL),
        "language_info": {"name": "python"},
    }
    for cell in notebook["cells"]:
        cell["metadata"] = {key: value for key, value in cell["metadata"].items() if key in CELL_METADATA}
        tags = cell["metadata"].get("tags", [])
        if "injected-parameters" in tags and "hide-input" not in tags:
            tags.append("hide-input")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data |= {mime: lighter(content) for mime, content in data.items() if mime.endswith("image/png")}
    return notebook


def lighter(png: str) -> str:
    """The picture, base64 as notebooks hold it, in 256 colours; one with see-through parts is left as it is."""
    import numpy as np
    from PIL import Image

    picture = Image.open(BytesIO(b64decode(png)))
    if picture.mode == "P" or np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
        return png
    written = BytesIO()
    picture.convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
    return b64encode(written.getvalue()).decode("ascii")


def merged(present: Notebook, run: Notebook) -> Notebook:
    """The prose as it is now with the outputs of a run, and the cell of parameters that the run was given, if any."""
    ran = [cell for cell in run["cells"] if cell["cell_type"] == "code"]
    cells = []
    for cell in present["cells"]:
        if cell["cell_type"] == "code":
            cell |= {name: ran[0][name] for name in ("outputs", "execution_count")}
            ran = ran[1:]
        cells.append(cell)
        while ran and "injected-parameters" in ran[0]["metadata"].get("tags", []):
            cells.append(ran.pop(0))
    present["cells"] = cells
    return present
