"""What a reader gets: every rendered page in a browser, and what the pages around the chapters speak of."""

import re
from itertools import permutations
from pathlib import Path
from urllib.parse import unquote, urlsplit

import book_build as book
import book_pages
import browser
import pytest
import yaml
from bs4 import BeautifulSoup

import embedlens

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))

TALLEST, FIRST_FIGURE = 7000, 1200  # px: of a page at 1400 px width, folds closed; of its first figure, on a phone too
WORDS, FIGURES, TABLES, CARDS = 900, 4, 2, 5  # of a chapter, folds closed; words of prose, beside cards and tables
CHAPTER = re.compile(r"notebooks/(0[1-9]|10)_|notebooks/miniature")
VARIANTS = [(1400, False), (400, False), (400, True), (1400, True)]

MEASURED = """(() => {
  const article = document.querySelector('article.bd-article') || document.body;
  const shown = element => element.checkVisibility();  // false in a closed fold
  const scrolls = element => ['auto', 'scroll'].includes(getComputedStyle(element).overflowX);
  const all = selector => [...article.querySelectorAll(selector)].filter(shown);
  const figure = all('img')[0];
  const top = figure ? figure.getBoundingClientRect().top + scrollY : null;
  const words = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  let before = '', prose = '';
  for (let node; (node = words.nextNode());) {
    if (!shown(node.parentElement) || node.parentElement.closest('script, style, summary')) continue;
    if (figure && figure.compareDocumentPosition(node) & Node.DOCUMENT_POSITION_PRECEDING) before += ' ' + node.data;
    if (!node.parentElement.closest('pre, table, mjx-container, p.claim, p.claim + p, .prev-next-area'))
      prose += ' ' + node.data;
  }
  const cut = [];
  for (const element of article.querySelectorAll('*')) {
    if (!shown(element) || element.closest('mjx-container, svg, span.math, .headerlink, .visually-hidden')) continue;
    const edge = element.getBoundingClientRect();
    if (edge.width < 2 || edge.height < 2) continue;
    let held = scrolls(element);
    for (let holder = element.parentElement; holder && holder !== document.body && !held; holder = holder.parentElement)
      held = scrolls(holder);
    if (edge.right > innerWidth + 1 && !held) cut.push(element.tagName + '.' + element.className);
    if (element.scrollWidth > element.clientWidth + 2 && element.clientWidth > 0) {
      if (!held && ['hidden', 'clip'].includes(getComputedStyle(element).overflowX))
        cut.push('hidden in ' + element.tagName + '.' + element.className);
      if (scrolls(element) && element.matches('pre')) cut.push('code: ' + element.textContent.slice(0, 60));
      if (scrolls(element) && element.querySelector(':scope > table, :scope > div > table') &&
          getComputedStyle(element, '::before').content === 'none') cut.push('a table that does not say it scrolls');
    }
  }
  if (document.documentElement.scrollWidth > innerWidth) cut.push('the page scrolls sideways');
  const ground = getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).map(Number);
  return {height: document.documentElement.scrollHeight, figure: top, before, cut: [...new Set(cut)].slice(0, 5),
          words: prose.split(/\\s+/).filter(word => /[A-Za-z0-9]/.test(word)).length, figures: all('img').length,
          tables: all('table').length, cards: all('p.claim').length,
          dark: ground.length < 4 && ground[0] + ground[1] + ground[2] < 380};
})()"""


# --- what a browser says of a page ------------------------------------------------------------------------------------


def looked_at(tab, page):
    """(width, dark) → what a browser measures of a page, and what it heard of it."""
    found = {}
    tab.open(page.as_uri())
    for width, dark in VARIANTS:
        tab.view(width, dark)
        found[width, dark] = tab.evaluate(MEASURED)
    return found, tab.heard


def layout_faults(name, found):
    """Pages beyond their budget, whose first figure comes late, or that speak in codes before it."""
    one = found[1400, False]
    if one["height"] > TALLEST:
        yield f"{name}: {one['height']:.0f} px tall, {TALLEST} at most"
    if CHAPTER.match(name):
        budget = {"words": WORDS, "figures": FIGURES, "tables": TABLES, "cards": CARDS}
        yield from (f"{name}: {one[of]} {of}, {most} at most" for of, most in budget.items() if one[of] > most)
        for width in (1400, 400):
            if (top := found[width, False]["figure"]) is None or top > FIRST_FIGURE:
                yield f"{name} at {width} px: first figure at {top} px, {FIRST_FIGURE} at most"
        if code := re.search(r"\b[ER]\d\d\b", one["before"]):
            yield f"{name}: speaks of {code[0]} before its first figure"


def width_and_theme_faults(name, found):
    """What is cut off at the side without a box that scrolls, and pages in the wrong colours."""
    for (width, dark), one in found.items():
        yield from (f"{name} at {width} px: cut off, {what}" for what in one["cut"])
        if one["dark"] is not dark:
            yield f"{name} at {width} px: {'light' if dark else 'dark'} where the reader asked for the other"


def noise_faults(name, heard):
    """Errors that a page reports, and what it asks for from elsewhere."""
    for event in heard:
        method, said = event.get("method"), event.get("params", {})
        wrong = method == "Runtime.exceptionThrown"
        wrong |= method == "Log.entryAdded" and said["entry"]["level"] == "error"
        wrong |= method == "Runtime.consoleAPICalled" and said["type"] in ("error", "assert")
        address = said["request"]["url"] if method == "Network.requestWillBeSent" else ""
        if wrong or address.startswith(("http", "ws", "//")):
            error = said.get("exceptionDetails", {}).get("exception", {}).get("description")
            yield f"{name}: {address or error or said.get('args') or said}"[:300]


def link_faults(pages):
    """Links within the book that lead nowhere; `pages`: path → soup."""
    ids = {page: {str(tag["id"]) for tag in soup.find_all(id=True)} | {""} for page, soup in pages.items()}
    for page, soup in pages.items():
        for link in soup.find_all("a", href=True):
            address = urlsplit(str(link["href"]))
            if address.scheme or address.netloc:
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            if not target.exists() or (target in ids and unquote(address.fragment) not in ids[target]):
                yield f"{page.name}: {link['href']} leads nowhere"


UNITS = r"cosine|correlation|similarity|nats|layer|attention|logit|norm\b|times"
NUMBER = r"[+−]?\d[\d,]*(?:\.\d+)?"
ESTIMATE = re.compile(rf"({NUMBER})\s?(%|points)? \(({NUMBER})(?:–| to )({NUMBER})\)")


def unit_faults(pages):
    """Cards whose number has no unit: neither per cent nor points, nor a word that says what is counted."""
    for page, soup in pages.items():
        for card in soup.select("p.claim"):
            text = card.get_text().replace("\u00a0", " ")
            found = list(ESTIMATE.finditer(text))
            for number in found:
                if not number[2] and not re.search(UNITS, text[found[0].end() :]):
                    yield f"{page.name}: {text[:60]} …: {number[0]} has no unit"


def rounding_faults(pages):
    """One estimate in two roundings, on one page or on two: value and both ends agree once the longer is rounded.

    Numbers of few digits agree by accident and are left out; so are times, which are measured one by one.
    """
    seen = dict[tuple[str, ...], str]()
    for page, soup in pages.items():
        if page.stem == "benchmarks":
            continue
        text = " ".join(soup.get_text(" ").split()).replace("−", "-")
        for value, unit, low, high in re.findall(ESTIMATE.pattern.replace("−", "-"), text):
            seen.setdefault((value.lstrip("+"), low, high, unit), page.name)
    digits = {one: len(one[0].partition(".")[2]) for one in seen}
    for fine, coarse in permutations(seen, 2):
        telling = len(set(coarse[:3])) == 3 and len(re.sub(r"\D", "", "".join(coarse[:3]))) > 3
        if telling and digits[fine] > digits[coarse] and fine[3] == coarse[3]:
            numbers = [float(part.replace(",", "")) for part in fine[:3] + coarse[:3]]
            step = 10.0 ** -digits[coarse]
            if all(abs(a - b) <= 0.5001 * step for a, b in zip(numbers[:3], numbers[3:], strict=True)):
                said = ["{} {} ({} to {})".format(one[0], one[3], *one[1:3]) for one in (fine, coarse)]
                yield f"{said[0]} on {seen[fine]} is {said[1]} on {seen[coarse]}"


def percent_faults(pages):
    """Per cent signs without a space, or with one that breaks, outside code."""
    for page, soup in pages.items():
        for text in soup.find_all(string=re.compile(r"\d ?%")):
            if not text.find_parent(["pre", "code", "script", "style"]):
                yield f"{page.name}: {text.strip()[:80]}"


def soups_of(html):
    """Pages that a reader sees, read; index.html only sends the reader on."""
    found = [path for path in sorted(html.resolve().rglob("*.html")) if "_static" not in path.parts]
    found = [path for path in found if path.name not in ("index.html", "genindex.html", "search.html")]
    return {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in found}


@pytest.mark.slow
def test_every_page_keeps_what_a_reader_may_expect(tmp_path):
    html = book.build(execute=False, out=tmp_path / "out", root=ROOT, say=lambda _: None).parent
    pages = soups_of(html)
    faults = [*link_faults(pages), *unit_faults(pages), *rounding_faults(pages), *percent_faults(pages)]
    front_page_and_search(html, pages[html.resolve() / "book/intro.html"])
    if browser.chromium():
        with browser.tab() as tab:
            for page in pages:
                name, (found, heard) = page.relative_to(html.resolve()).as_posix(), looked_at(tab, page)
                faults += [*layout_faults(name, found), *width_and_theme_faults(name, found)]
                faults += noise_faults(name, heard)
    assert not faults, "\n".join(dict.fromkeys(faults))
    if not browser.chromium():
        pytest.skip(f"links are sound; no browser to measure pages with: install one of {', '.join(browser.NAMES)}")


def front_page_and_search(html, front):
    """One title, a link preview, an icon, short titles at the side, a search that knows the words of the field."""
    assert front.title.string.strip() == CONFIG["title"]
    preview = {tag["property"]: tag["content"] for tag in front.find_all("meta", property=True)}
    assert (html / "book" / preview["og:image"]).resolve().is_file()
    assert (html / "book" / front.find("link", rel="icon")["href"]).resolve().is_file()
    shared = BeautifulSoup((html / "index.html").read_text(encoding="utf-8"), "html.parser")
    assert (html / shared.find("meta", property="og:image")["content"]).is_file()
    index = (html / "searchindex.js").read_text(encoding="utf-8")
    for stem in ("norm", "imag", "cosin", "prune"):
        assert re.search(rf'"{stem}": (\d+|\[[\d, ]+\])', index), f"the search does not know {stem}"
    sidebar = [link.get_text(strip=True) for link in front.select("nav.bd-links a.reference")]
    placed = [int(number[0]) for title in sidebar if (number := re.match(r"\d+", title))]
    assert placed == sorted(placed) and set(range(1, 10)) <= set(placed)
    assert max(map(len, sidebar)) <= 22


@pytest.mark.slow
def test_a_page_that_breaks_the_rules_is_caught(tmp_path):
    if not browser.chromium():
        pytest.skip(f"no browser to measure pages with: install one of {', '.join(browser.NAMES)}")
    wide = "<div style='overflow: hidden; width: 200px'><p style='width: 900px'>wide</p></div>"
    slides = "<div style='overflow-x: auto; width: 200px'><table style='width: 900px'><tr><td>1</table></div>"
    code = f"<pre style='overflow-x: auto; width: 200px'>{'x' * 99}</pre>"
    cards = "<p class='claim'>E05 · 0.12 (0.10 to 0.14) of them</p><p>rule</p>" * 6
    prose = f"<p>{'word ' * 901}</p><p>0.120 (0.100 to 0.140), 5% of a cosine</p>"
    dot = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    page = tmp_path / "page.html"
    page.write_text(
        f"<body style='background: white'><a href='gone.html'>x</a>{cards}{wide}{slides}{code}{prose}"
        f"<details><summary>more</summary>{prose}{slides * 3}</details><p style='height: 8000px'></p>"
        f"<img src='{dot}' width=9><script>fetch('http://127.0.0.1:9/x').catch(() => 0); nowhere()</script>"
    )
    with browser.tab() as tab:
        found, heard = looked_at(tab, page)
    said = " ".join(layout_faults("notebooks/01_x.html", found))
    assert all(words in said for words in ("px tall", "400 px: first figure at", "speaks of E05", "6 cards"))
    assert re.search(r"91\d words", said) and "tables" not in said  # what is folded does not count
    said = " ".join(width_and_theme_faults("x", found))
    assert all(words in said for words in ("hidden in DIV", "light where", "does not say it scrolls", "code: xxx"))
    said = " ".join(noise_faults("x", heard))
    assert "127.0.0.1:9" in said and "nowhere is not defined" in said
    pages = soups_of(tmp_path)
    assert "gone.html leads nowhere" in " ".join(link_faults(pages))
    assert "0.12 (0.10 to 0.14) has no unit" in " ".join(unit_faults(pages))
    assert "0.120  (0.100 to 0.140) on page.html is 0.12" in " ".join(rounding_faults(pages))
    assert "5% of a cosine" in " ".join(percent_faults(pages))


def test_per_cent_signs_are_set_one_way_and_code_stays_as_it_is_written():
    nbsp = "\u00a0"
    text = "<p title='5%'>35% of 7 %</p><pre>x %  5% <b>5%</b></pre><code>9%</code> 1%"
    assert book_pages.typeset(text) == (
        f"<p title='5%'>35{nbsp}% of 7{nbsp}%</p><pre>x %  5% <b>5%</b></pre><code>9%</code> 1{nbsp}%"
    )


# --- what the pages say -----------------------------------------------------------------------------------------------


def numbers(text):
    """The numbers of a glued text, its minus signs as Python writes them."""
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text.replace("−", "-"))]


def glued(chapter, *names):
    """First numbers of what a chapter's committed run hands to the prose."""
    notebook = book.read(next((ROOT / "notebooks").glob(f"{chapter}*.ipynb")))
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
    attention, likeness = glued("08", "rho_attention", "rho_cls")
    assert attention[1] > 0 > likeness[2]  # the first knows, the second has it backwards
    work, late, middle = glued("07", "both_change", "e53", "e54")
    assert work[2] < 0 > late[2] and middle[2] < 0
    assert glued("06", "e48")[0][1] > 0


def test_the_front_page_is_one_minute_long():
    shown = re.sub(r":::\{dropdown\}.*?^:::$|```.*?```", "", (BOOK / "intro.md").read_text(), flags=re.S | re.M)
    words = re.sub(r"\{[\w:]+\}`[^`]*`", " 1 ", re.sub(r"\]\([^)]*\)", "", shown)).split()
    assert len([word for word in words if re.search(r"\w", word)]) <= 335


@pytest.mark.slow
def test_the_controls_run_as_printed_and_print_what_they_name(capsys, monkeypatch):
    monkeypatch.setattr("embedlens.groups.CALIBRATION", 16)
    blocks = re.findall(r"^```python\n(.*?)^```$", (BOOK / "controls.md").read_text(), re.S | re.M)
    assert len(blocks) == 6
    space = {}
    for block in blocks:
        exec(compile(block, "controls.md", "exec"), space)
    said = capsys.readouterr().out
    named = ("random sets", "of the dead", "without background", "enters at", "arithmetic")
    assert all(words in said for words in named)


@pytest.mark.slow
def test_the_picture_of_the_front_page_is_what_its_script_draws(tmp_path):
    from importlib.util import module_from_spec, spec_from_file_location

    import numpy as np
    from PIL import Image

    spec = spec_from_file_location("hero", BOOK / "hero.py")
    hero = module_from_spec(spec)
    spec.loader.exec_module(hero)
    hero.main(tmp_path)
    for file in hero.FILES:
        committed, drawn = (np.asarray(Image.open(f / file).convert("RGB"), dtype=int) for f in (hero.FOLDER, tmp_path))
        assert drawn.shape == committed.shape
        assert (abs(drawn - committed).max(-1) > 60).mean() < 0.001  # words and ticks; antialiasing may differ


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


# --- what pages are filled with ---------------------------------------------------------------------------------------


def test_a_mark_that_names_nothing_is_an_error_that_says_what_there_is(tmp_path):
    page = tmp_path / "book" / "api.md"
    with pytest.raises(book.BookError, match=r"no_such_name, which the package does not have"):
        book_pages.filled("<!-- api: no_such_name -->", tmp_path, page)
    mark = "<!-- figure: 04_dead_tokens | a map of nothing -->"
    with pytest.raises(book.BookError, match="no chapter"):
        book_pages.filled(mark, tmp_path, page)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    with pytest.raises(book.BookError, match=r"'a map of nothing'; there is: \w+"):
        book_pages.filled(mark, tmp_path, page)


def test_the_package_page_names_every_public_name():
    import inspect

    named = set(" ".join(re.findall(r"<!-- api: ([^>]+) -->", (BOOK / "api.md").read_text())).split())
    missing = set(embedlens.__all__) - named
    errors = {name for name in missing if inspect.isclass(getattr(embedlens, name)) and "Error" in name}
    assert missing - errors <= {"Lens", "Unembed", "VisionLanguageModel", "traces"}  # met as parts of others


def test_parameters_rules_and_the_table_of_verdicts_are_folded_once_and_other_code_is_shown():
    sources = {"n: int = 4": ["parameters"]}
    sources |= {'chapter.judge("E05", "a > 0")': [], "chapter.sign_off()": [], "print(1)": []}
    cells = [{"cell_type": "code", "source": s, "metadata": {"tags": t} if t else {}} for s, t in sources.items()]
    folded = book_pages.folded(book_pages.folded({"cells": cells}))
    for cell in folded["cells"]:  # an open fold keeps its words
        prompts = cell["metadata"].get("mystnb", {})
        assert prompts.get("code_prompt_hide") == prompts.get("code_prompt_show")
    tags = [cell["metadata"].get("tags") for cell in folded["cells"]]
    assert tags == [["parameters", "hide-input"], ["hide-input"], ["hide-cell"], None]
    opens = [cell["metadata"].get("mystnb", {}).get("code_prompt_show", "") for cell in folded["cells"]]
    assert [words.split()[0] for words in opens if words] == ["Parameters", "Code", "All"]
