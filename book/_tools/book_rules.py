"""The rules of this book, on notebooks as files and on rendered pages.

Papermill and Sphinx both end well in cases a reader would call broken: a number that is blank in its sentence, a figure
that a screen reader calls `_images/3f2a.png`, a page that is empty without the network. Each rule closes one of these
holes and returns what it found, as sentences; an empty list is a pass.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from notebook_files import CELL_METADATA, KERNEL, NOTEBOOK_METADATA, Notebook, read


def run_faults(notebook: Notebook, name: str) -> list[str]:
    """Cells that raised, papermill's failure banners, and notebooks that were not run once from top to bottom."""
    faults = []
    counts = []
    for number, cell in enumerate(notebook["cells"]):
        if "papermill-error-cell-tag" in cell["metadata"].get("tags", []):
            faults.append(f"{name}: cell {number} is papermill's banner of a failed run; run the notebook again")
        if cell["cell_type"] != "code" or not cell["source"].strip():
            continue
        counts.append(cell["execution_count"])
        faults += [
            f"{name}: cell {number} shows {output.get('ename')}: {output.get('evalue')}; mend the cell and run it again"
            for output in cell["outputs"]
            if output["output_type"] == "error"
        ]
    if counts != list(range(1, len(counts) + 1)):
        faults.append(f"{name}: not run once from top to bottom (execution counts {counts}); run `make notebooks`")
    return faults


def metadata_faults(notebook: Notebook, name: str, machine: Iterable[str] = ()) -> list[str]:
    """Metadata that would change with every run or machine, and texts of `machine` (its paths) in the outputs."""
    faults = []
    extra = set(notebook["metadata"]) - NOTEBOOK_METADATA
    extra |= {f"language_info.{key}" for key in notebook["metadata"].get("language_info", {}) if key != "name"}
    for cell in notebook["cells"]:
        extra |= {f"cell {key}" for key in set(cell["metadata"]) - CELL_METADATA}
        if "injected-parameters" in cell["metadata"].get("tags", []):
            faults.append(f"{name}: was run with other parameters than its own; run `make notebooks`")
    if extra:
        faults.append(f"{name}: metadata of one run ({', '.join(sorted(extra))}); run `make notebooks`")
    if dict(notebook["metadata"].get("kernelspec", {})) != KERNEL:
        faults.append(f"{name}: the kernel is not plain python3; run `make notebooks`")
    outputs = [str(output) for cell in notebook["cells"] for output in cell.get("outputs", [])]
    faults += [
        f"{name}: an output holds {text!r}, a path of one machine; print a relative path"
        for text in machine
        if any(text in output for output in outputs)
    ]
    return faults


GLUE_ROLE = re.compile(r"\{glue(?::\w*)?\}`([^`]+)`")
GLUE_DIRECTIVE = re.compile(
    r"^[ \t]*(?:`{3,}|:{3,})\{glue(?::\w*)?\}[ \t]*(\S+)[^\n]*\n((?:[ \t]*:[\w-]+:[^\n]*\n)*)", re.M
)
CODE_FENCE = re.compile(r"^(`{3,})(?!\{)[^\n]*\n.*?^\1", re.M | re.S)


def glued(notebook: Notebook) -> list[str]:
    """The keys that a run notebook has glued, in order, with repeats."""
    return [
        output["metadata"]["scrapbook"]["name"]
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if "scrapbook" in output.get("metadata", {})
    ]


def glue_references(text: str) -> list[tuple[str | None, str]]:
    """The (document, key) pairs that a page's Markdown refers to; document None is the page itself.

    >>> glue_references("recall {glue:text}`recall:.1%`, elsewhere {glue:text}`02.ipynb::chance:.2f`")
    [(None, 'recall'), ('02.ipynb', 'chance')]
    """
    text = CODE_FENCE.sub("", text)
    targets = GLUE_ROLE.findall(text)
    for key, options in GLUE_DIRECTIVE.findall(text):
        document = re.search(r":doc:[ \t]*(\S+)", options)
        targets.append(f"{document[1]}::{key}" if document else key)
    pairs = []
    for target in targets:
        document_part, separator, key = target.rpartition("::")
        pairs.append((document_part if separator else None, key.split(":")[0].strip()))
    return pairs


ON_CARDS = re.compile(r"[er]\d\d(_verdict)?|kind|model_name")  # `claims.Chapter` glues them for prose that wants them


def glue_faults(root: Path, book_pages: Sequence[Path]) -> list[str]:
    """Keys that a page uses and no notebook glues (they print as nothing), keys glued twice, keys that no page uses."""
    texts: dict[Path, str] = {}
    produced: dict[Path, list[str]] = {}
    for page in book_pages:
        if page.suffix == ".ipynb":
            notebook = read(root / page)
            produced[page] = glued(notebook)
            texts[page] = "\n\n".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        else:
            texts[page] = (root / page).read_text(encoding="utf-8")
    faults = []
    used = set()
    for page, text in texts.items():
        faults += [
            f"{page}: {{glue:text}}`{target}` needs a format behind the key (:s, :d, :.1%), or MyST misreads its path"
            for target in re.findall(r"\{glue:text\}`([^`]+::[^`:]+)`", CODE_FENCE.sub("", text))
        ]
        for document, key in glue_references(text):
            home = Path(os.path.normpath(page.parent / document)) if document else page
            if not home.suffix:
                home = home.with_suffix(".ipynb")
            used.add((home, key))
            if key not in produced.get(home, []):
                faults.append(
                    f"{page}: uses the glued value {key!r}, which {home} does not glue; its sentence has a hole"
                )
    for page, keys in produced.items():
        faults += [
            f"{page}: glues {key!r} twice; use two names" for key in sorted({k for k in keys if keys.count(k) > 1})
        ]
        faults += [
            f"{page}: glues {key!r}, which no page uses; use it or drop it"
            for key in dict.fromkeys(keys)
            if (page, key) not in used and not ON_CARDS.fullmatch(key)
        ]
    return faults


@lru_cache(1)  # two rules read a page one after the other
def _parsed(html: str) -> Any:
    from bs4 import BeautifulSoup

    return BeautifulSoup(html, "html.parser")


def image_faults(html: str, name: str) -> list[str]:
    """Images that a screen reader cannot name: no alt text, an empty one, or the file's own name."""
    faults = []
    for image in _parsed(html).find_all("img"):
        alt, source = str(image.get("alt") or "").strip(), str(image.get("src") or "")
        if not alt or Path(alt).name == Path(source).name:
            faults.append(
                f"{name}: {source[:80]} has no alt text; give the cell the metadata mystnb.image.alt, "
                "or the figure the option :alt:"
            )
    return faults


REMOTE = re.compile(r"^\s*(?:https?:)?//")
REMOTE_CSS = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])((?:https?:)?//[^"')\s]+)""")
REMOTE_SCRIPT = re.compile(
    r"""(?:\.src\s*=\s*|\bfrom\s*|\bimport\s*\(?\s*|\bfetch\s*\(\s*|importScripts\s*\(\s*)["'`]((?:https?:)?//[^"'`]+)"""
)
LOADED_LINKS = {"stylesheet", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "icon", "manifest"}
LOADED_ATTRIBUTES = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}


def request_faults(html: str, name: str) -> list[str]:
    """What the page would fetch from elsewhere while it loads: scripts, styles, fonts, images, frames.

    Links that a reader may click are not requests.
    """
    page = _parsed(html)
    remote = []
    for tag, attributes in LOADED_ATTRIBUTES.items():
        for element in page.find_all(tag):
            values = [str(element.get(attribute) or "") for attribute in attributes]
            remote += [url for value in values for url in value.split(", ") if REMOTE.match(url)]
    for link in page.find_all("link"):
        if LOADED_LINKS & {str(word) for word in link.get("rel") or []} and REMOTE.match(str(link.get("href") or "")):
            remote.append(str(link["href"]))
    for element in page.find_all("script"):
        remote += REMOTE_SCRIPT.findall(element.string or "")
    for style in [element.string or "" for element in page.find_all("style")]:
        remote += REMOTE_CSS.findall(style)
    for element in page.find_all(style=True):
        remote += REMOTE_CSS.findall(str(element["style"]))
    return [
        f"{name}: loads {url.strip()} from the network; ship it under book/_static" for url in dict.fromkeys(remote)
    ]


def html_faults(folder: Path) -> list[str]:
    """`image_faults` and `request_faults` of every rendered page, and remote requests of its style sheets."""
    faults = []
    for page in sorted(folder.rglob("*.html")):
        name = page.relative_to(folder).as_posix()
        if name.startswith("_static/"):
            continue  # templates of the theme, not pages
        html = page.read_text(encoding="utf-8")
        faults += image_faults(html, name) + request_faults(html, name)
    for sheet in sorted(folder.rglob("*.css")):
        name = sheet.relative_to(folder).as_posix()
        faults += [
            f"{name}: loads {url} from the network; ship it under book/_static"
            for url in REMOTE_CSS.findall(sheet.read_text(encoding="utf-8"))
        ]
    return faults
