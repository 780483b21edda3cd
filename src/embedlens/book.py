"""Run the notebooks, hold them to the book's rules, render them.

The book's sources are copied to `_build/src`; chapters whose inputs changed are run there (`book_runs`), all are
checked (`book_rules`), and Jupyter Book renders them to `_build/html`. The committed notebooks stay as they are, so
building the book never changes the working tree; `refresh` is what renews them.
"""

from __future__ import annotations

import ast
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedlens.book_pages import completed, explored, folded, forwarded, settled
from embedlens.book_rules import (  # noqa: F401 - tests and other modules know the rules by this module's name
    KERNEL,
    BookError,
    cleaned,
    demand,
    glue_faults,
    html_faults,
    metadata_faults,
    read,
    run_faults,
    write,
)
from embedlens.book_runs import digest, environment, installed, merged, owned, run_all
from embedlens.errors import EmbedLensError

SOURCES = ("_config.yml", "_toc.yml", "book", "notebooks", "results", "benchmarks")


def glue(name: str, value: Any, digits: int = 4) -> None:
    """Hand one measured value to the prose: `` {glue:text}`name:.1%` `` prints it.

    Floats are rounded to `digits` significant digits (digits before the point are all kept), because the last
    bits of a float belong to the machine.

    Args:
        name: letters, digits and underscores; unique in its notebook.
        value: a number, a bool, a string, or anything with `.item()` (NumPy scalar, 0-d tensor).

    Raises:
        ValueError: for None, NaN, infinity, an empty string or a name that cannot be referred to: the sentence would
            print with a hole in it.
        TypeError: for anything that is not one value, such as a figure or an array.

    >>> glue("recall", float("nan"))
    Traceback (most recent call last):
    ...
    ValueError: glue('recall', nan): not a finite number, so the sentence that uses it would say nothing; mend ...
    """
    from myst_nb import glue as myst_glue

    myst_glue(name, printable(name, value, digits), display=False)


def printable(name: str, value: Any, digits: int = 4) -> bool | int | float | str:
    """What `glue` hands on: a plain Python value, floats rounded.

    >>> import numpy as np
    >>> printable("recall", np.float64(0.123456))
    0.1235
    >>> printable("pixels", 123456.789)
    123457.0
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ValueError(f"glue({name!r}, …): use letters, digits and underscores only, so that prose can refer to it")
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if plain is None or (isinstance(plain, str) and not plain.strip()):
        raise ValueError(f"glue({name!r}, {plain!r}): nothing to print; glue a value or leave the sentence out")
    if not isinstance(plain, (bool, int, float, str)):
        kind = type(plain).__name__
        raise TypeError(f"glue({name!r}, …): a {kind} is not one value; glue a number, a bool or a string")
    if isinstance(plain, float):
        if not math.isfinite(plain):
            raise ValueError(
                f"glue({name!r}, {plain}): not a finite number, so the sentence that uses it would say nothing; "
                "mend the measurement (is it a mean over no samples?)"
            )
        whole = math.floor(math.log10(abs(plain))) + 1 if plain else 1
        return round(plain, max(0, digits - whole))
    return plain


# ---------------------------------------------------------------------------------------------------------------------
# What the book consists of


def find_root(start: Path | str = ".") -> Path:
    """The folder with `_toc.yml`: `start` or the nearest one above it.

    Raises:
        BookError: outside a checkout of the book.
    """
    start = Path(start).resolve()
    for folder in (start, *start.parents):
        if (folder / "_toc.yml").is_file() and (folder / "_config.yml").is_file():
            return folder
    raise BookError(f"no _toc.yml and _config.yml in {start} or above: run this in a checkout of the repository")


def pages(root: Path) -> list[Path]:
    """Every page of the table of contents, in order, relative to `root`, with its suffix.

    Raises:
        BookError: if the table of contents names a file that is not there.
    """
    import yaml

    def named(node: Any) -> Iterator[str]:
        if isinstance(node, Mapping):
            yield from (str(node[key]) for key in ("root", "file") if key in node)
            yield from (name for value in node.values() if isinstance(value, (list, dict)) for name in named(value))
        elif isinstance(node, list):
            yield from (name for item in node for name in named(item))

    found = []
    for name in named(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))):
        complete = Path(name).suffix in (".ipynb", ".md")
        candidates = [Path(name)] if complete else [Path(f"{name}.ipynb"), Path(f"{name}.md")]
        existing = [page for page in candidates if (root / page).is_file()]
        if not existing:
            raise BookError(f"_toc.yml names {name}, but there is no {' or '.join(map(str, candidates))}")
        found.append(existing[0])
    return found


def chapters(root: Path, names: Sequence[str] | None = None) -> list[Path]:
    """The notebooks of the table of contents, or those of them that `names` picks by path, name or leading number.

    Raises:
        BookError: if a name picks no notebook.
    """
    notebooks = [page for page in pages(root) if page.suffix == ".ipynb"]
    if not names:
        return notebooks
    picked = set()
    for name in names:
        stem = Path(name).name.removesuffix(".ipynb")
        match = [page for page in notebooks if page.stem == stem or page.stem.startswith(f"{stem}_")]
        if not match:
            known = ", ".join(page.stem for page in notebooks)
            raise BookError(f"no notebook {name!r} in the book: choose from {known}")
        picked.update(match)
    return [page for page in notebooks if page in picked]


def stage(root: Path, target: Path) -> Path:
    """Copy the book's sources to `target`, replacing what is there, so that running them leaves `root` alone."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in SOURCES:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
        elif source.is_file():
            shutil.copy2(source, target / name)
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Running


def declared_parameters(path: Path) -> dict[str, str]:
    """Name and help of each parameter of a notebook: the cell tagged `parameters`, the comment behind each line."""
    import logging

    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    return {name: str(entry["help"]) for name, entry in papermill.inspect_notebook(str(path)).items()}


def parse_parameters(assignments: Sequence[str], notebooks: Sequence[Path] = ()) -> dict[str, Any]:
    """Values of `NAME=VALUE` words, each of the type that the notebooks declare; a text stays as it is written.

    Raises:
        EmbedLensError: for a word without a name or `=`, or a value that is not written as its type is.

    >>> parse_parameters(["device=cuda:0", "out=2024-01-01"])
    {'device': 'cuda:0', 'out': '2024-01-01'}
    """
    cells = [cell for path in notebooks for cell in read(path)["cells"]] if assignments else []
    types: dict[str, str] = {}
    for cell in cells:
        if "parameters" in cell["metadata"].get("tags", []):
            types |= assigned(cell["source"])
    values = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or not name.isidentifier():
            raise BookError(f"-p {assignment}: write NAME=VALUE, for example -p n_images=500")
        values[name] = typed(name, text, types.get(name, "str"))
    return values


def assigned(source: str) -> dict[str, str]:
    """Name → annotation, or nothing, of what a cell assigns.

    >>> assigned("n_images: int = 4  # pictures")
    {'n_images': 'int'}
    """
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return {}
    found: dict[str, str] = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign):
            found |= {target.id: "" for target in node.targets if isinstance(target, ast.Name)}
    return found


def typed(name: str, text: str, annotation: str) -> str | int | float | bool:
    """What is written on a command line as the type that a notebook declares; a text stays as it is written.

    Raises:
        EmbedLensError: it is not written as that type is.

    >>> typed("out", "2024-01-01", "str"), typed("n_images", "010", "int")
    ('2024-01-01', 10)
    """
    try:
        if annotation == "bool":
            return {"true": True, "false": False}[text.strip().lower()]
        return {"int": int, "float": float}.get(annotation, str)(text)
    except (KeyError, ValueError):
        what = {"int": "a whole number", "float": "a number", "bool": "true or false"}[annotation]
        raise EmbedLensError(f"{name} is {text!r}: pass {what}") from None


def parameters_for(paths: Sequence[Path], parameters: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """For each notebook those of `parameters` that it declares.

    Papermill only logs a name that a notebook does not know and runs with the defaults; here a name that no notebook
    knows is an error.

    Raises:
        BookError: naming the unknown parameters and the known ones.
    """
    declared = {path: set(declared_parameters(path) if parameters else ()) for path in paths}
    known: set[str] = set().union(*declared.values())
    unknown = sorted(set(parameters) - known)
    if unknown:
        raise BookError(
            f"no notebook has the parameter {', '.join(map(repr, unknown))}: "
            f"choose from {', '.join(sorted(known)) or 'nothing, these notebooks declare none'}"
        )
    return {path: {name: value for name, value in parameters.items() if name in declared[path]} for path in paths}


# ---------------------------------------------------------------------------------------------------------------------
# Building


def render(source: Path, work: Path, home: Path) -> Path:
    """Render staged sources with Jupyter Book; warnings and missing references are errors.

    Returns:
        The folder with the pages, `work/_build/html`.

    Raises:
        BookError: with what Sphinx warned about.
    """
    shutil.rmtree(work, ignore_errors=True)  # pages that left the table of contents would stay otherwise
    command_line = "from jupyter_book.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command_line, "build", source, "--path-output", work, "-W", "-n", "--keep-going"],
        capture_output=True,
        text=True,
        env={**environment(home), "PYTHONWARNINGS": "ignore"},
    )
    if done.returncode:
        log = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
        said = [line for line in log.splitlines() if re.search(r"WARNING|ERROR|CRITICAL|Error:", line)]
        raise BookError("Jupyter Book refuses the pages:\n" + "\n".join(said or log.splitlines()[-20:]))
    return work / "_build" / "html"


def anchor_cards(html: Path) -> None:
    """Give each claim's card the claim as its anchor, `#e40`, where the verdict page leads; without a card, its row."""
    for page in (html / "notebooks").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        for claim in sorted(set(re.findall(r"<(?:strong|th)>([ER]\d\d)</", text))):
            card, row = f"<p><strong>{claim}</strong> · ", f"<th>{claim}</th>"
            place, look = (card, ' class="claim"') if card in text else (row, "")
            text = text.replace(place, place.replace(">", f'{look} id="{claim.lower()}">', 1), 1)
        page.write_text(text, encoding="utf-8")


AS_WRITTEN = re.compile(r"(<(pre|code|script|style)\b.*?</\2>|<[^>]*>)", re.S)


def typeset(html: Path) -> None:
    """Set per cent signs one way, after a space that does not break, whoever wrote them: a run, a format, an author."""
    for page in (*html.glob("book/*.html"), *html.glob("notebooks/*.html")):
        text, parts, at = page.read_text(encoding="utf-8"), list[str](), 0
        for kept in (*AS_WRITTEN.finditer(text), None):  # code and tags stay as they are
            parts.append(re.sub(r"(?<=\d)\s?%", "\u00a0%", text[at : kept.start() if kept else None]))
            parts.append(kept[0] if kept else "")
            at = kept.end() if kept else at
        page.write_text("".join(parts), encoding="utf-8")


def build(
    notebooks: Sequence[str] | None = None,
    execute: bool = True,
    parameters: Mapping[str, Any] | None = None,
    out: Path | str = "_build",
    root: Path | str = ".",
    say: Callable[[str], object] = print,
    jobs: int | None = None,
) -> Path:
    """Run the chapters that changed, check them and render the book; the working tree stays as it is.

    Args:
        notebooks: chapters to run, by name or leading number; None: all. The others keep their committed outputs.
        execute: False renders the committed outputs of all chapters.
        parameters: values for the notebooks' parameters, such as `model` and `n_images`.
        out: folder for `src` (what was run), `runs` (what need not run again) and `html` (what was rendered), relative
            to the repository; made and marked by this function, and replaced only if it bears that mark.
        root: a folder in the checkout.
        say: called with one line of progress at a time.
        jobs: chapters to run at a time; None: as cores and memory allow.

    Returns:
        The front page.

    Raises:
        BookError: listing what breaks the book's rules; the previous `html` stays in place then.
    """
    begun = time.monotonic()
    root = find_root(root)
    chosen = chapters(root, notebooks) if execute else []
    values = parameters_for([root / page for page in chosen], parameters or {})
    with owned(root, out, SOURCES) as folder:
        source = stage(root, folder / "src")
        config = source / "_config.yml"
        config.write_text(settled(config.read_text(encoding="utf-8")), encoding="utf-8")
        runs = run_all(source, folder, {page: values[root / page] for page in chosen}, say, jobs)

        faults = []
        for page in chapters(source):
            notebook = read(source / page)
            notebook = cleaned(merged(notebook, read(runs[page])) if page in runs else notebook)
            write(folded(notebook), source / page)
            faults += run_faults(notebook, str(page))
            if page_to_explore := explored(notebook):
                (source / "book" / "_static" / "explorer.html").write_text(page_to_explore, encoding="utf-8")
        completed(source, pages(source))
        demand(faults + glue_faults(source, pages(source)))

        html, old, told = folder / "html", folder / "html.old", folder / "html.digest"
        shown = [path for path in source.rglob("*") if "results" not in path.relative_to(source).parts[:1]]
        key = digest(shown, installed())
        if old.is_dir() and not html.is_dir():  # a kill between the two renames below
            old.rename(html)
        if not (html / "index.html").is_file() or not told.is_file() or told.read_text() != key:
            say("rendering")
            rendered = render(source, folder / "work", folder / "home")
            anchor_cards(rendered)
            typeset(rendered)
            if (source / "results").is_dir():
                shutil.copytree(source / "results", rendered / "results")  # the verdict page links to records
            demand(html_faults(rendered))
            forwarded(rendered)
            shutil.rmtree(old, ignore_errors=True)
            told.unlink(missing_ok=True)
            if html.is_dir():
                html.rename(old)
            rendered.rename(html)
            told.write_text(key)
            for done_with in (old, folder / "work"):
                shutil.rmtree(done_with, ignore_errors=True)
        front = html / "index.html"
    say(f"the book is at {os.path.relpath(front)} ({time.monotonic() - begun:.0f} s)")
    return front


def executed(
    root: Path | str = ".",
    notebooks: Sequence[str] | None = None,
    out: Path | str = "_build",
    say: Callable[[str], object] = print,
    jobs: int | None = None,
) -> dict[Path, Path]:
    """Each chapter's page and the file of its run with its own parameters; runs those that changed since.

    Raises:
        BookError: if a cell raises.
    """
    root = find_root(root)
    chosen = chapters(root, notebooks)
    with owned(root, out, SOURCES) as folder:
        return run_all(stage(root, folder / "src"), folder, {page: {} for page in chosen}, say, jobs)


def refresh(
    notebooks: Sequence[str] | None = None,
    root: Path | str = ".",
    say: Callable[[str], object] = print,
    out: Path | str = "_build",
    jobs: int | None = None,
) -> list[Path]:
    """Replace the outputs and records of the committed chapters by those of a run, in the working tree.

    Raises:
        BookError: if a cell raises; all notebooks are left as they were.
    """
    root = find_root(root)
    chosen = chapters(root, notebooks)
    with owned(root, out, SOURCES) as folder:
        runs = run_all(stage(root, folder / "src"), folder, {page: {} for page in chosen}, say, jobs)
        for page, run in runs.items():
            fresh = run.with_suffix(".whole")
            write(cleaned(merged(read(root / page), read(run))), fresh)
            shutil.copy2(fresh, root / page)
            if (run.parent / "results").is_dir():
                shutil.copytree(run.parent / "results", root / "results", dirs_exist_ok=True)
    return chosen
