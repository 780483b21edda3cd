"""`embedlens book`: run the notebooks and render them, with papermill and Jupyter Book.

The book's sources are copied to `_build/src`; chapters whose inputs changed are run there (`book_runs`), and Jupyter
Book renders them to `_build/html`. What this book asks of its pages is its own Sphinx extension, `book_pages`: what
breaks a rule is refused as what Sphinx warns about. The committed notebooks stay as they are, so building the book
never changes the working tree; `refresh` is what renews them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from book_runs import digest, environment, installed, owned, run_all
from notebook_files import KERNEL, BookError, cleaned, merged, read, write  # noqa: F401 - known by this name

from embedlens.book import find_root
from embedlens.errors import EmbedLensError

SOURCES = ("_config.yml", "_toc.yml", "book", "notebooks", "results", "benchmarks", "training")


# ---------------------------------------------------------------------------------------------------------------------
# What the book consists of


def pages(root: Path) -> list[Path]:
    """Every page of the table of contents, in order, relative to `root`, with its suffix."""
    named = re.findall(r"^[-\s]*(?:root|file): *(\S+)", (root / "_toc.yml").read_text(encoding="utf-8"), re.M)
    found = []
    for name in named:
        candidates = [Path(f"{name.removesuffix(ending)}{ending}") for ending in (".ipynb", ".md")]
        existing = [page for page in candidates if (root / page).is_file()]
        if not existing:
            raise BookError(f"_toc.yml names {name}, but there is no {' or '.join(map(str, candidates))}")
        found.append(existing[0])
    return found


def chapters(root: Path, names: Sequence[str] | None = None) -> list[Path]:
    """The notebooks of the table of contents, or those of them that `names` picks by path, name or leading number."""
    notebooks = [page for page in pages(root) if page.suffix == ".ipynb"]
    picked = set() if names else set(notebooks)
    for name in names or ():
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
            shutil.copytree(
                source,
                target / name,
                ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__", "runs", "cache"),
            )
        elif source.is_file():
            shutil.copy2(source, target / name)
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Running


def declared_parameters(path: Path) -> dict[str, str]:
    """Name and help of each parameter of a notebook: the cell tagged `parameters`, the comment behind each line."""
    return {name: str(entry["help"]) for name, entry in _inspected(path).items()}


def _inspected(path: Path) -> dict[str, Any]:
    import logging

    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    return papermill.inspect_notebook(str(path))


def parse_parameters(assignments: Sequence[str], notebooks: Sequence[Path] = ()) -> dict[str, Any]:
    """Values of `NAME=VALUE` words, each of the type that the notebooks declare; a text stays as it is written.

    >>> parse_parameters(["device=cuda:0", "out=2024-01-01"])
    {'device': 'cuda:0', 'out': '2024-01-01'}
    """
    inspected = [_inspected(path) for path in notebooks] if assignments else []
    types = {name: str(entry["inferred_type_name"]) for found in inspected for name, entry in found.items()}
    values = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or not name.isidentifier():
            raise BookError(f"-p {assignment}: write NAME=VALUE, for example -p n_images=500")
        values[name] = typed(name, text, types.get(name, "str"))
    return values


def typed(name: str, text: str, annotation: str) -> str | int | float | bool:
    """What is written on a command line as the type that a notebook declares.

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
    """For each notebook those of `parameters` that it declares; papermill only logs a name that no notebook knows."""
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
    """The folder of pages that Jupyter Book makes of staged sources; a warning or a missing reference is an error."""
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
        said = [line for line in log.splitlines() if re.search(r"WARNING|ERROR|CRITICAL|Error:|exception:", line)]
        raise BookError("Jupyter Book refuses the pages:\n" + "\n".join(said or log.splitlines()[-20:]))
    return work / "_build" / "html"


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
        runs = run_all(source, folder, {page: values[root / page] for page in chosen}, say, jobs)
        for page, run in runs.items():
            write(cleaned(merged(read(source / page), read(run))), source / page)
        html, old, told = folder / "html", folder / "html.old", folder / "html.digest"
        key = digest(source.rglob("*"), installed())
        if old.is_dir() and not html.is_dir():  # a kill between the two renames below
            old.rename(html)
        if not (html / "index.html").is_file() or not told.is_file() or told.read_text() != key:
            say("rendering")
            rendered = render(source, folder / "work", folder / "home")
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
    """Each chapter's page and the file of its run with its own parameters; runs those that changed since."""
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
) -> None:
    """Replace the outputs and records of the committed chapters by those of a run; of none where a cell raises."""
    root = find_root(root)
    for page, run in executed(root, notebooks, out, say, jobs).items():
        fresh = run.with_suffix(".whole")
        write(cleaned(merged(read(root / page), read(run))), fresh)
        shutil.copy2(fresh, root / page)
        if (run.parent / "results").is_dir():
            shutil.copytree(run.parent / "results", root / "results", dirs_exist_ok=True)
