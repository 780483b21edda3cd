"""Run the notebooks, hold them to the book's rules, render them.

The book's sources are copied to `_build/src`, run there with papermill, checked, and rendered with Jupyter Book to
`_build/html`. The committed notebooks stay as they are, so building the book never changes the working tree;
`refresh` is what renews them.

Papermill and Sphinx both end well in cases a reader would call broken: a misspelt parameter, a number that is blank in
its sentence, a figure that a screen reader calls `_images/3f2a.png`, a page that is empty without the network. Each
rule below closes one of these holes and returns its findings as sentences; `build` raises them together.
"""

from __future__ import annotations

import ast
import math
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from embedlens.address import address_of, configured
from embedlens.errors import EmbedLensError

SOURCES = ("_config.yml", "_toc.yml", "book", "notebooks", "results", "benchmarks")
CELL_TIMEOUT = 3600  # seconds for one cell; papermill's own default is to wait for ever
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
NOTEBOOK_METADATA = {"kernelspec", "language_info", "mystnb"}
CELL_METADATA = {"tags", "mystnb", "editable", "slideshow"}
# Progress bars would land in the notebooks' outputs; a kernel of the same name in the home folder must not be taken.
KERNEL_ENVIRONMENT = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}

Notebook = dict[str, Any]  # what nbformat reads: a dict with attribute access


class BookError(EmbedLensError):
    """The book breaks one of its rules; the message lists every finding, one to a line."""


def glue(name: str, value: Any, digits: int = 4) -> None:
    """Hand one measured value to the prose: `` {glue:text}`name:.1%` `` prints it.

    Floats are rounded to `digits` significant digits (digits before the point are all kept), because the regression
    test compares glued values exactly and the last bits of a float belong to the machine.

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


def read(path: Path) -> Notebook:
    """The notebook at `path`, in format 4."""
    import nbformat

    return nbformat.read(path, as_version=4)


def write(notebook: Notebook, path: Path) -> None:
    """Write the notebook, ending in one newline."""
    import nbformat

    nbformat.write(notebook, path)


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


def run(source: Path, target: Path, parameters: Mapping[str, Any] | None = None, timeout: int = CELL_TIMEOUT) -> None:
    """Run `source` from top to bottom in its own folder and write the cleaned result to `target`.

    Args:
        target: in a folder that exists; may be `source`.
        parameters: values for names that the notebook declares; their cell is kept but folded away on the page.
        timeout: seconds that one cell may take.

    Raises:
        BookError: if a cell raises. The half-run notebook is written next to `target`, with `.failed` in its name.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    half_run = target.with_suffix(".failed.ipynb")
    for name, value in KERNEL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        papermill.execute_notebook(
            str(source.resolve()),
            str(half_run.resolve()),
            parameters=dict(parameters or {}),
            kernel_name=KERNEL["name"],
            cwd=str(source.resolve().parent),
            execution_timeout=timeout,
            start_timeout=120,
            progress_bar=False,
        )
    except PapermillExecutionError as error:
        raise BookError(
            f"{source.name}: cell [{error.exec_count}] raises {error.ename}: {error.evalue} (run so far: {half_run})"
        ) from error
    notebook = cleaned(read(half_run))
    demand(run_faults(notebook, source.name))
    write(notebook, target)
    half_run.unlink()


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


# ---------------------------------------------------------------------------------------------------------------------
# Rules. Each returns what it found, as sentences; an empty list is a pass.


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
            if (page, key) not in used
        ]
    return faults


def image_faults(html: str, name: str) -> list[str]:
    """Images that a screen reader cannot name: no alt text, an empty one, or the file's own name."""
    from bs4 import BeautifulSoup

    faults = []
    for image in BeautifulSoup(html, "html.parser").find_all("img"):
        alt, source = str(image.get("alt") or "").strip(), str(image.get("src") or "")
        if not alt or alt.startswith("_images/") or alt == Path(source).name:
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
    from bs4 import BeautifulSoup

    page = BeautifulSoup(html, "html.parser")
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


def demand(faults: Sequence[str]) -> None:
    """Raise every finding at once.

    Raises:
        BookError: if there is any.
    """
    if faults:
        raise BookError("\n".join(faults))


# ---------------------------------------------------------------------------------------------------------------------
# Building


def render(source: Path, work: Path) -> Path:
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
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    if done.returncode:
        log = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
        said = [line for line in log.splitlines() if re.search(r"WARNING|ERROR|CRITICAL|Error:", line)]
        raise BookError("Jupyter Book refuses the pages:\n" + "\n".join(said or log.splitlines()[-20:]))
    return work / "_build" / "html"


def build(
    notebooks: Sequence[str] | None = None,
    execute: bool = True,
    parameters: Mapping[str, Any] | None = None,
    out: Path | str = "_build",
    root: Path | str = ".",
    say: Callable[[str], object] = print,
) -> Path:
    """Run the chapters, check them and render the book; the working tree stays as it is.

    Args:
        notebooks: chapters to run, by name or leading number; None: all. The others keep their committed outputs.
        execute: False renders the committed outputs of all chapters.
        parameters: values for the notebooks' parameters, such as `model` and `n_images`.
        out: folder for `src` (what was run) and `html` (what was rendered), relative to the repository.
        root: a folder in the checkout.
        say: called with one line of progress at a time.

    Returns:
        The front page.

    Raises:
        BookError: listing what breaks the book's rules; the previous `html` stays in place then.
    """
    root = find_root(root)
    out = root / out
    chosen = chapters(root, notebooks) if execute else []
    values = parameters_for([root / page for page in chosen], parameters or {})
    source = stage(root, out / "src")
    config = source / "_config.yml"
    config.write_text(configured(config.read_text(encoding="utf-8"), address_of(root)), encoding="utf-8")
    for page in chosen:
        say(f"running {page}")
        run(source / page, source / page, values[root / page])

    faults = []
    for page in chapters(source):
        notebook = cleaned(read(source / page))
        write(notebook, source / page)
        faults += run_faults(notebook, str(page))
    demand(faults + glue_faults(source, pages(source)))

    say("rendering")
    rendered = render(source, out / "work")
    demand(html_faults(rendered))
    shutil.rmtree(out / "html", ignore_errors=True)
    shutil.move(rendered, out / "html")
    shutil.rmtree(out / "work")
    front = out / "html" / "index.html"
    say(f"the book is at {os.path.relpath(front)}")
    return front


def refresh(
    notebooks: Sequence[str] | None = None, root: Path | str = ".", say: Callable[[str], object] = print
) -> list[Path]:
    """Run the committed chapters with their own parameters and replace them by the result, in the working tree.

    Raises:
        BookError: if a cell raises; that notebook is left as it was.
    """
    root = find_root(root)
    chosen = chapters(root, notebooks)
    for page in chosen:
        say(f"running {page}")
        fresh = root / "_build" / "fresh" / page.name
        fresh.parent.mkdir(parents=True, exist_ok=True)
        run(root / page, fresh)
        shutil.move(fresh, root / page)
    return chosen
