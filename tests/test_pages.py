"""What a reader gets: every rendered page in a browser, and the pages around the chapters against what they speak of."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import browser
import pytest
import yaml
from bs4 import BeautifulSoup

import embedlens
from embedlens import book, book_pages, book_rules

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
pytestmark = pytest.mark.slow

# Longer than the budget as committed; a page that has become shorter leaves the list.
TALLEST, FIRST_FIGURE = 7000, 1200  # px, at 1400 px width, folds closed
VARIANTS = [(width, dark) for width in (1400, 400) for dark in (False, True)]

MEASURED = """(() => {
  const article = document.querySelector('article.bd-article') || document.body;
  const shown = element => element.getClientRects().length > 0;
  const scrolls = element => ['auto', 'scroll'].includes(getComputedStyle(element).overflowX);
  const figure = [...article.querySelectorAll('img')].find(shown);
  const top = figure ? figure.getBoundingClientRect().top + scrollY : null;
  const words = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  let before = '';
  for (let node; (node = words.nextNode());)
    if (figure && figure.compareDocumentPosition(node) & Node.DOCUMENT_POSITION_PRECEDING &&
        shown(node.parentElement) && !node.parentElement.closest('details, script, style')) before += node.data;
  const cut = [];
  for (const element of article.querySelectorAll('*')) {
    if (!shown(element) || element.closest('mjx-container, svg, span.math, .headerlink, .visually-hidden')) continue;
    const edge = element.getBoundingClientRect();
    if (edge.width < 2 || edge.height < 2) continue;
    let holder = element.parentElement, held = scrolls(element);
    for (; holder && holder !== document.documentElement && !held; holder = holder.parentElement) held = scrolls(holder);
    if (edge.right > innerWidth + 1 && !held) cut.push(element.tagName + '.' + element.className);
    if (element.scrollWidth > element.clientWidth + 2 && element.clientWidth > 0 && !held &&
        ['hidden', 'clip'].includes(getComputedStyle(element).overflowX))
      cut.push('hidden in ' + element.tagName + '.' + element.className);
  }
  return {height: document.documentElement.scrollHeight, wide: document.documentElement.scrollWidth > innerWidth,
          figure: top, before, cut: [...new Set(cut)].slice(0, 5),
          dark: document.documentElement.dataset.theme, ground: getComputedStyle(document.body).backgroundColor};
})()"""


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The book, rendered with its committed outputs."""
    return book.build(execute=False, out=tmp_path_factory.mktemp("book") / "out", root=ROOT, say=lambda _: None).parent


def pages_of(html):
    """Pages that a reader sees; index.html only sends the reader on."""
    found = [path for path in sorted(html.rglob("*.html")) if "_static" not in path.parts]
    return [path for path in found if path.name not in ("index.html", "genindex.html", "search.html")]


@pytest.fixture(scope="module")
def seen(html):
    """What a browser finds on every page, at two widths, light and dark."""
    if not browser.chromium():
        pytest.skip(f"no browser to measure pages with: install one of {', '.join(browser.NAMES)}")
    found = {}
    with browser.tab() as tab:
        for page in pages_of(html):
            for width, dark in VARIANTS:
                heard = tab.open(page.as_uri(), width, dark=dark)
                found[page.relative_to(html).as_posix(), width, dark] = {**tab.evaluate(MEASURED), "heard": heard}
    return found


def test_pages_are_short_and_show_their_first_figure_on_the_first_screens(seen):
    faults = []
    for (page, width, dark), one in seen.items():
        if width == 1400 and not dark:
            if one["height"] > TALLEST:
                faults.append(f"{page}: {one['height']:.0f} px, {TALLEST} at most")
            if re.search(r"notebooks/0\d", page) and not 0 < (one["figure"] or 0) < FIRST_FIGURE:
                faults.append(f"{page}: first figure at {one['figure']} px, {FIRST_FIGURE} at most")
            if re.search(r"notebooks/0\d", page) and (code := re.search(r"\b[ER]\d\d\b", one["before"])):
                faults.append(f"{page}: speaks of {code[0]} before its first figure")
    assert not faults, "\n".join(faults)


def test_nothing_is_cut_off_at_the_side(seen):
    faults = [f"{page} at {width} px: {one['cut']}" for (page, width, _), one in seen.items() if one["cut"] or one["wide"]]
    assert not faults, "\n".join(dict.fromkeys(faults))


def test_dark_and_light_are_what_the_reader_asked_for(seen):
    for (page, width, dark), one in seen.items():
        light = sum(map(int, re.findall(r"\d+", one["ground"])[:3])) > 380
        assert light is not dark, f"{page} at {width} px is {one['ground']}"


def test_pages_report_no_error_and_ask_for_nothing_from_elsewhere(seen):
    faults = []
    for (page, width, _), one in seen.items():
        for event in one["heard"]:
            method, said = event.get("method"), event.get("params", {})
            wrong = method == "Runtime.exceptionThrown"
            wrong |= method == "Log.entryAdded" and said["entry"]["level"] == "error"
            wrong |= method == "Runtime.consoleAPICalled" and said["type"] in ("error", "assert")
            address = said.get("request", {}).get("url", "") if method == "Network.requestWillBeSent" else ""
            if wrong or address.startswith(("http", "ws", "//")):
                error = said.get("exceptionDetails", {}).get("exception", {}).get("description")
                faults.append(f"{page}: {address or error or said.get('args') or said}"[:300])
    assert not faults, "\n".join(dict.fromkeys(faults))


def test_no_link_is_dead(html):
    ids, faults = {}, []
    soups = {page: BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser") for page in pages_of(html)}
    for page, soup in soups.items():
        ids[page] = {str(tag["id"]) for tag in soup.find_all(id=True)} | {""}
    for page, soup in soups.items():
        for link in soup.find_all("a", href=True):
            address = urlsplit(str(link["href"]))
            if address.scheme or address.netloc:
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            if not target.exists():
                faults.append(f"{page.name}: {link['href']} leads nowhere")
            elif target in ids and unquote(address.fragment) not in ids[target]:
                faults.append(f"{page.name}: {link['href']}: no such place on that page")
    assert not faults, "\n".join(dict.fromkeys(faults))


def test_one_title_a_preview_an_icon_and_a_search_that_finds_the_words_of_the_field(html):
    front = BeautifulSoup((html / "book/intro.html").read_text(encoding="utf-8"), "html.parser")
    assert front.title.string.strip() == CONFIG["title"]
    preview = {tag.get("property"): tag["content"] for tag in front.find_all("meta") if tag.get("property")}
    assert (html / "book" / preview["og:image"]).resolve().is_file()
    assert (html / "book" / front.find("link", rel="icon")["href"]).resolve().is_file()
    index = (html / "searchindex.js").read_text(encoding="utf-8")
    for stem in ("norm", "imag", "cosin", "prune"):
        assert re.search(rf'"{stem}": (\d+|\[[\d, ]+\])', index), f"the search does not know {stem}"
    sidebar = [link.get_text(strip=True) for link in front.select("nav.bd-links a.reference")]
    assert [title for title in sidebar if title[:1].isdigit()][0].startswith("1 ")
    assert max(map(len, sidebar)) <= 22


# --- what the pages say -----------------------------------------------------------------------------------------------


def numbers(text):
    """The numbers of a glued text, its minus signs as Python writes them."""
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text.replace("−", "-"))]


def glued(chapter, *names):
    """First numbers of what a chapter's committed run hands to the prose."""
    notebook = book_rules.read(next((ROOT / "notebooks").glob(f"{chapter}*.ipynb")))
    values = {
        output["metadata"]["scrapbook"]["name"]: next(iter(output["data"].values()))
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if "scrapbook" in output.get("metadata", {})
    }
    return [numbers(values[name].strip("'")) for name in names]


def test_the_front_page_says_what_its_numbers_say():
    nearest, head, alone = glued("02", "embed_right", "logit_right", "alone_right")
    assert nearest[0] < head[0] < alone[1]  # the content is there: beyond the output head with its whole interval
    dead, ground, anywhere = glued("04", "e32", "ground", "e33")
    assert anywhere[2] < min(dead[1], ground[1])  # things are missed, background is not
    cosine, chance = glued("01", "e07", "s0_null")
    assert cosine[0] > 0.9 < chance[0]  # a cosine near one proves little
    attention, likeness = glued("08", "rho_attention_probability", "rho_similarity_probability")
    assert attention[1] > 0 > likeness[2]  # the first knows, the second has it backwards
    work, late = glued("07", "both_change", "e53")
    assert work[2] < 0 > late[2]
    assert glued("06", "e48")[0][1] > 0


def test_the_front_page_is_one_minute_long():
    shown = re.sub(r":::\{dropdown\}.*?^:::$|```.*?```", "", (BOOK / "intro.md").read_text(), flags=re.S | re.M)
    words = re.sub(r"\{[\w:]+\}`[^`]*`", " 1 ", re.sub(r"\]\([^)]*\)", "", shown)).split()
    assert len([word for word in words if re.search(r"\w", word)]) <= 335


def test_the_controls_run_as_printed_and_print_what_they_name(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", (BOOK / "controls.md").read_text(), re.S | re.M)
    assert len(blocks) == 6
    space = {}
    for block in blocks:
        exec(compile(block, "controls.md", "exec"), space)
    said = capsys.readouterr().out
    assert all(words in said for words in ("random sets", "of the dead", "without background", "enters at", "arithmetic"))


def test_the_picture_of_the_front_page_is_what_its_script_draws(tmp_path, monkeypatch):
    from importlib.util import module_from_spec, spec_from_file_location

    import numpy as np
    from PIL import Image

    spec = spec_from_file_location("hero", BOOK / "hero.py")
    hero = module_from_spec(spec)
    spec.loader.exec_module(hero)
    committed = np.asarray(Image.open(hero.FILE).convert("RGB"), dtype=int)
    monkeypatch.setattr(hero, "FILE", tmp_path / "hero.png")
    hero.main()
    drawn = np.asarray(Image.open(hero.FILE).convert("RGB"), dtype=int)
    assert drawn.shape == committed.shape
    assert (abs(drawn - committed).max(-1) > 60).mean() < 0.001  # words and ticks are pixels; antialiasing may differ


def test_guarantees_name_tests_that_exist():
    text = (BOOK / "guarantees.md").read_text()
    named = set(re.findall(r"tests/\w+\.py", text))
    assert named and not [name for name in named if not (ROOT / name).is_file()]
    assert not [p for p in re.findall(r"notebooks/\w+\.ipynb", text) if not (ROOT / p).is_file()]


def test_author_version_and_address_are_said_once():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert [one["name"] for one in citation["authors"]] == [CONFIG["author"]]
    assert citation["version"] == embedlens.__version__
    assert citation.get("repository-code", "") == (CONFIG["repository"]["url"] or "")
    said = book_pages.citation(CONFIG, "https://example.org/x")
    assert said["address"] == "https://example.org/x" and CONFIG["author"] in said["bibtex"]
    assert "url" not in book_pages.citation(CONFIG, "")["bibtex"]


def test_every_work_that_a_page_cites_is_in_the_bibliography():
    known = set(re.findall(r"@\w+\{(\w+),", (BOOK / "references.bib").read_text()))
    pages = [path.read_text() for path in BOOK.glob("*.md")]
    cited = {key.strip() for page in pages for keys in re.findall(r"\{cite:\w\}`([^`]+)`", page) for key in keys.split(",")}
    assert cited <= known and {"hiprune", "fastv", "krojer2026latentlens"} <= cited


# --- what pages are filled with ---------------------------------------------------------------------------------------


def test_a_mark_that_names_nothing_is_an_error_that_says_what_there_is(tmp_path):
    (tmp_path / "book").mkdir()
    page = tmp_path / "book" / "api.md"
    page.write_text("<!-- api: no_such_name -->")
    with pytest.raises(book_rules.BookError, match=r"no_such_name, which the package does not have"):
        book_pages.completed(tmp_path)
    page.write_text("<!-- figure: 04_dead_tokens | a map of nothing -->")
    with pytest.raises(book_rules.BookError, match="no chapter"):
        book_pages.completed(tmp_path)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    with pytest.raises(book_rules.BookError, match=r"'a map of nothing'; there is: \w+"):
        book_pages.completed(tmp_path)


def test_the_package_page_names_every_public_name():
    import inspect

    named = set(" ".join(re.findall(r"<!-- api: ([^>]+) -->", (BOOK / "api.md").read_text())).split())
    missing = set(embedlens.__all__) - named
    errors = {name for name in missing if inspect.isclass(getattr(embedlens, name)) and "Error" in name}
    assert missing - errors <= {"Lens", "Unembed", "VisionLanguageModel", "traces"}  # met as parts of others


def test_parameters_rules_and_the_table_of_verdicts_are_folded_once_and_other_code_is_shown():
    sources = {"n: int = 4": ["parameters"], 'chapter.judge("E05", "a > 0")': [], "chapter.sign_off()": [], "print(1)": []}
    cells = [{"cell_type": "code", "source": s, "metadata": {"tags": t} if t else {}} for s, t in sources.items()]
    folded = book_pages.folded(book_pages.folded({"cells": cells}))
    tags = [cell["metadata"].get("tags") for cell in folded["cells"]]
    assert tags == [["parameters", "hide-input"], ["hide-input"], ["hide-cell"], None]
