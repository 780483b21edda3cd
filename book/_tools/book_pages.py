"""The book's own Sphinx extension: what pages are made of beside their sources, and the rules that they keep.

Jupyter Book loads it by `sphinx: local_extensions` in `_config.yml`. The sources in `book/` hold marks, so that nothing
is copied by hand and goes stale:

    <!-- api: load EmbedLens -->                       public names, each with its signature and its docstring
    <!-- figure: 04_dead_tokens | as many as dead -->  the chapter's figure whose description has these words

What breaks a rule of `book_rules` is a warning of Sphinx, which `embedlens book` takes for an error.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from base64 import b64decode
from functools import partial
from html import unescape
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import book_rules
import yaml
from book_build import chapters, pages
from notebook_files import BookError, Notebook, read
from sphinx.util import logging

from embedlens import __version__

NO_ADDRESS = "none is set in this copy; give the one where you read it"
API = re.compile(r"<!-- api: ([\w. ]+?) -->")
EXPLORER = re.compile(r'<iframe srcdoc="([^"]+)"')
FIGURE = re.compile(r"<!-- figure: (\w+) \| (.+?) -->")


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls first."""
    app.connect("config-inited", _cite)
    app.connect("source-read", _fill)
    app.connect("html-page-context", _anchor)
    app.connect("build-finished", _finish, priority=900)  # after the table of contents has written index.html
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _cite(app: Any, config: Any) -> None:
    settings = yaml.safe_load((Path(app.srcdir) / "_config.yml").read_text(encoding="utf-8"))
    config.myst_substitutions = citation(settings, (settings.get("repository") or {}).get("url") or "")


def _fill(app: Any, name: str, text: list[str]) -> None:
    source = Path(app.srcdir)
    if Path(app.env.doc2path(name)).suffix == ".ipynb":
        text[0] = json.dumps(folded(json.loads(text[0])))
    else:
        text[0] = filled(text[0], source, source / f"{name}.md")


def _anchor(app: Any, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if name.startswith("notebooks/"):
        context["body"] = sourced(anchored(context["body"]), name, Path(app.srcdir))
    if "body" in context:
        context["body"] = typeset(one_head(context["body"]))


def _finish(app: Any, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    source, html = Path(app.srcdir), Path(app.outdir)
    faults = book_rules.glue_faults(source, pages(source))
    for page in chapters(source):
        notebook = read(source / page)
        faults += book_rules.run_faults(notebook, str(page))
        if page_to_explore := explored(notebook):
            (html / "_static/explorer.html").write_text(page_to_explore, encoding="utf-8")
    if (source / "results").is_dir():
        shutil.copytree(source / "results", html / "results", dirs_exist_ok=True)  # the verdict page links to records
    for fault in faults + book_rules.html_faults(html):
        logging.getLogger(__name__).warning(fault)
    forwarded(html)


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def filled(text: str, source: Path, page: Path) -> str:
    """A page's text with its marks replaced; its figures are written beside it.

    Raises:
        BookError: a mark that names nothing that is there.
    """
    text = API.sub(lambda mark: "\n\n".join(map(entry, mark[1].split())), text)
    return FIGURE.sub(partial(_figure, source, page), text)


def anchored(text: str) -> str:
    """A page with the claim as each card's anchor, `#e40`, where the verdict page leads; without a card, its row."""
    for claim in sorted(set(re.findall(r"<(?:strong|th)>([ER]\d\d)</", text))):
        card, row = f"<p><strong>{claim}</strong> · ", f"<th>{claim}</th>"
        place, look = (card, ' class="claim"') if card in text else (row, "")
        text = text.replace(place, place.replace(">", f'{look} id="{claim.lower()}">', 1), 1)
    return text


ROW = r"<tr[^>]*>((?:(?!</tr>).)*)</tr>\s*"
HEAD = re.compile(rf"<thead>\s*{ROW}{ROW}</thead>", re.S)


def one_head(text: str) -> str:
    """A page whose tables name their index in the row that names the columns; pandas gives it a row of its own.

    >>> one_head("<thead><tr><th></th><th>b</th></tr><tr><th>a</th><th></th></tr></thead>")
    '<thead><tr><th>a</th><th>b</th></tr></thead>'
    """

    def merged(head: re.Match[str]) -> str:
        names, index = (re.findall(r"<th>(.*?)</th>", row, re.S) for row in head.groups())
        if len(names) != len(index) or any(a and b for a, b in zip(names, index, strict=True)):
            return head[0]
        return f"<thead><tr>{''.join(f'<th>{a or b}</th>' for a, b in zip(names, index, strict=True))}</tr></thead>"

    return HEAD.sub(merged, text)


def sourced(text: str, page: str, source: Path) -> str:
    """A chapter's page with links behind its subtitle: to its notebook, and to the record of the run that it shows.

    >>> sourced("<h1>A</h1><p><em>b</em></p>", "notebooks/01_a", Path("gone"))
    '<h1>A</h1><p><em>b</em> <a href="../_sources/notebooks/01_a.ipynb">notebook</a></p>'
    """
    links = [f'<a href="../_sources/{page}.ipynb">notebook</a>']
    record = f"results/miniature/{Path(page).name}.json"
    if (source / record).is_file():
        links.append(f'<a href="../{record}">record of the run</a>')
    subtitle = re.compile(r"(</h1>\s*<p><em>.*?</em>)(?=</p>)", re.S)
    return subtitle.sub(lambda found: f"{found[1]} {' · '.join(links)}", text, count=1)


AS_WRITTEN = re.compile(r"(<(pre|code|script|style)\b.*?</\2>|<[^>]*>)", re.S)


ESTIMATE = re.compile(r"([+−]?\d[\d.,]*(?:\s%|\spoints)?) (\([+−]?\d[\d.,]*(?:–| to )[+−]?\d[\d.,]*\))")


def typeset(text: str) -> str:
    """A page with one unbreaking space before each per cent sign; a line may end before an interval, not within it.

    >>> typeset("by −2.7 points (−4.6 to −0.9)")
    'by <span class="estimate">−2.7 points</span> <span class="estimate">(−4.6 to −0.9)</span>'
    """
    parts, at = list[str](), 0
    for kept in (*AS_WRITTEN.finditer(text), None):  # code and tags stay as they are
        words = re.sub(r"(?<=\d)\s?%", "\u00a0%", text[at : kept.start() if kept else None])
        parts.append(ESTIMATE.sub(r'<span class="estimate">\1</span> <span class="estimate">\2</span>', words))
        parts.append(kept[0] if kept else "")
        at = kept.end() if kept else at
    return "".join(parts)


FOLDED = {"hide-output", "hide-cell", "remove-cell", "remove-input", "remove-output"}


def folded(notebook: Notebook) -> Notebook:
    """The notebook with parameters, the code of verdicts and the table of them behind buttons that say what they open.

    A verdict's card prints its rule as it was judged, and the table at the end repeats the cards. A button keeps its
    words when it is open.
    """
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        code = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
        judges, draws = "chapter.judge(" in code, any("image/png" in o.get("data", ()) for o in cell.get("outputs", []))
        opens = ""
        if FOLDED & set(tags):
            pass
        elif "chapter.sign_off(" in code:
            cell["metadata"]["tags"] = [*(tag for tag in tags if tag != "hide-input"), "hide-cell"]
            opens = "All verdicts of this page, and its record"
        elif "hide-input" in tags or "parameters" in tags or judges:
            cell["metadata"]["tags"] = [*(tag for tag in tags if tag != "hide-input"), "hide-input"]
            other = "Imports" if code.startswith(("import ", "from ")) else "Code"
            other = "Parameters" if "parameters" in tags else other
            opens = "Code of this verdict" if judges else "Code of this figure" if draws else other
        words = cell["metadata"].get("mystnb", {}).get("code_prompt_show", opens)
        if words:
            prompts = cell["metadata"].setdefault("mystnb", {})
            prompts |= {"code_prompt_show": words, "code_prompt_hide": words}
    return notebook


def explored(notebook: Notebook) -> str:
    """The page that a cell shows by `el.explore`, whole, so that others can link into it; empty: no cell shows one."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            found = EXPLORER.match("".join(output.get("data", {}).get("text/html", "")))
            if found:
                return unescape(found[1])
    return ""


def forwarded(html: Path) -> None:
    """Give `index.html`, which only sends on to the front page, its preview: people share that address."""
    index, front = html / "index.html", html / "book" / "intro.html"
    if not (index.is_file() and front.is_file()):
        return
    shown = re.findall(
        r'<(?:title>.*?</title|meta (?:property="og:|name="twitter:|name="description")[^>]*)>', front.read_text()
    )
    index.write_text("<!DOCTYPE html>\n" + "\n".join(shown).replace('"../', '"') + "\n" + index.read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Reference


def entry(name: str) -> str:
    """One public name as a fold in MyST: its first sentence on the outside, signature and docstring inside.

    Args:
        name: as in `el.NAME`, or a path in the package such as clusters.matched_null.

    >>> print(entry("centroids").splitlines()[0])
    :::{dropdown} `el.centroids` · ...

    Raises:
        BookError: the package has no such name, or it has no docstring.
    """
    thing, shown = _found(name)
    text = inspect.getdoc(thing)
    if not text:
        raise BookError(f"book/api.md names {name}, which has no docstring: write one")
    first, _, rest = text.partition("\n\n")
    call = _signature(thing, shown)
    parts = [f":::{{dropdown}} `{shown}` · {_plain(first)}", f"```python\n{call}\n```" if call else "", written(rest)]
    return "\n\n".join([*filter(None, parts), ":::"])


def written(docstring: str) -> str:
    """The rest of a docstring in MyST: prose reflowed, what each argument means as a list, examples as code.

    >>> print(written("Two\\nlines.\\n\\nArgs:\\n    k: how\\n        many *words*."))
    Two lines.
    <BLANKLINE>
    **Args**
    <BLANKLINE>
    - `k`: how many \\*words\\*.
    """
    shown = []
    for block in re.split(r"\n[ \t]*\n", docstring.strip("\n")):
        section, _, inside = block.partition("\n")
        if block.lstrip().startswith(">>>"):
            shown.append(f"```python\n{dedent(block)}\n```")
        elif re.fullmatch(r"[A-Z]\w+:", section) and inside:
            shown.append(f"**{section[:-1]}**")
            items = re.split(r"\n(?! )", dedent(inside))
            named = [re.fullmatch(r"([\w*, ]+?): (.+)", item, re.S) for item in items]
            shown.append(
                "\n".join(f"- `{m[1]}`: {_plain(m[2])}" if m else _plain(i) for m, i in zip(named, items, strict=True))
            )
        else:
            shown.append(f"````text\n{dedent(block)}\n````" if block.startswith(" ") else _plain(block))
    return "\n\n".join(filter(None, shown))


def _plain(text: str) -> str:
    """Prose on one line, with nothing in it that Markdown would take for its own but the code in backticks."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_{}\[\]<>$#|~])", r"\\\1", part) for part in parts)


def _found(name: str) -> tuple[Any, str]:
    """What a name of the page stands for, and how a reader writes it."""
    import embedlens

    head, *path = name.split(".")
    public = head in embedlens.__all__ or head == "samples"
    try:
        thing = getattr(embedlens, head) if public else import_module(f"embedlens.{head}")
        for part in path:
            thing = _attribute(thing, part)
    except (AttributeError, ImportError):
        raise BookError(f"book/api.md names {name}, which the package does not have: mend the name") from None
    return thing, (f"el.{name}" if public else name).replace("el.VisionLanguageModel.", "model.")


def _attribute(thing: Any, part: str) -> Any:
    if hasattr(thing, part):
        return getattr(thing, part)
    return import_module(f"{thing.__name__}.{part}")


def _signature(thing: Any, shown: str) -> str:
    """How it is called, annotations as they are written; empty for a value."""
    if isinstance(thing, property) or not callable(thing):
        return ""
    call = re.sub(r"(: |-> )(['\"])(.*?)\2(?=[,)\s]|$)", r"\1\3", str(inspect.signature(thing)))  # written as text
    call = re.sub(
        r"\b(?:embedlens|torch|PIL\.Image|collections\.abc|pathlib|numpy|pandas)(?:\.\w+)*\.(?=[A-Z])", "", call
    )
    call = re.sub(r"\(self(?:, )?", "(", call, count=1)
    call = call.removesuffix(" -> None") if inspect.isclass(thing) else call
    inside, arrow, gives = call[1:].rpartition(") -> ")
    if not arrow:
        inside, gives = call[1:-1], ""
    whole = f"{shown}({inside})" + (f" -> {gives}" if gives else "")
    if len(whole) <= 88:
        return whole
    arguments = "".join(f"    {argument},\n" for argument in _split(inside))
    return f"{shown}(\n{arguments})" + (f" -> {gives}" if gives else "")


def _split(arguments: str) -> list[str]:
    """Arguments at the commas that stand in no bracket and no quotes.

    >>> _split("a: dict[str, int], b: 'x, y' = 1")
    ['a: dict[str, int]', "b: 'x, y' = 1"]
    """
    parts, depth, quote = [""], 0, ""
    for letter in arguments:
        depth += (letter in "([{") - (letter in ")]}") if not quote else 0
        quote = ("" if letter == quote else quote or letter) if letter in "\"'" else quote
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def _figure(source: Path, page: Path, mark: re.Match[str]) -> str:
    """A chapter's figure in Markdown, its file beside the pages."""
    chapter, words = mark.groups()
    path = source / "notebooks" / f"{chapter}.ipynb"
    if not path.is_file():
        raise BookError(f"book/{page.name} wants a figure of {chapter}, which is no chapter: mend the name")
    seen = []
    for cell in read(path)["cells"]:
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        pictures = [data for data in (o.get("data", {}).get("image/png") for o in cell.get("outputs", [])) if data]
        if not pictures or not alt:
            continue
        seen.append(alt)
        if words in alt:
            target = page.parent / "figures" / f"{chapter}_{len(seen)}.png"
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(b64decode(pictures[0]))
            return f"```{{image}} figures/{target.name}\n:alt: {' '.join(alt.split())}\n```"
    told = "; ".join(alt[:60] for alt in seen) or "nothing"
    raise BookError(f"book/{page.name} wants the figure of {chapter} described with {words!r}; there is: {told}")


# ---------------------------------------------------------------------------------------------------------------------
# Who wrote it, which version, where it is


def citation(config: dict[str, Any], address: str) -> dict[str, str]:
    """What the page on citing says, from `author`, `title` and `copyright` of the configuration and the package.

    >>> citation({"title": "T", "author": "A", "copyright": 2026}, "")["address"]
    'none is set in this copy; give the one where you read it'
    """
    year = str(config.get("copyright", ""))
    facts = {
        "author": f"{{{config.get('author', '')}}}",
        "title": f"{{{config.get('title', '')}}}",
        "year": f"{{{year}}}",
    }
    facts |= {"version": f"{{{__version__}}}", "url": f"{{{address}}}" if address else ""}
    lines = ",\n".join(f"  {key:<7} = {value}" for key, value in facts.items() if value)
    return {
        "author": str(config.get("author", "")),
        "version": __version__,
        "year": year,
        "address": address or NO_ADDRESS,
        "bibtex": f"```bibtex\n@software{{embedlens,\n{lines}\n}}\n```",
    }
