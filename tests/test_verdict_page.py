"""The verdict page: claims across models are judged where records meet; each claim is there with a way to its card."""

import re
from pathlib import Path

import book_build as book
import book_pages
import pytest
from bs4 import BeautifulSoup

from embedlens import claims, records
from embedlens.claims import FAILS, HOLDS, PARTLY, UNDECIDED, UNTESTABLE
from embedlens.measures.anatomy import CHAPTER, GROUPS, RANKS

PAGE = Path(__file__).parents[1] / "notebooks" / "verdicts.ipynb"
CELLS = {cell["id"]: cell for cell in book.read(PAGE)["cells"]}
SEVEN, THIRTEEN = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"
OTHERS = ("Qwen/Qwen2.5-VL-7B-Instruct", "OpenGVLab/InternVL3-8B-hf", "Qwen/Qwen3-VL-8B-Instruct")


@pytest.fixture
def judged(tmp_path):
    """(model, share of C0, …) → the table that the page makes of such records of chapter 09."""

    def of(*models):
        for model, share, *rest in models:
            dead, lead, width, photographs = (*rest, *(0.3, 0.1, 0.01, 1.0)[len(rest) :])
            values = dict.fromkeys(("similarity", "random", *GROUPS, *(f"share_{rank}" for rank in range(RANKS))), 0.0)
            values |= {"share_0": share, "dead": dead, "lead": lead}
            bounds = {"_low": -width, "_high": width}
            ends = {f"{name}{end}": at + by for name, at in values.items() for end, by in bounds.items()}
            records.write(tmp_path, model, CHAPTER, 100, 0, {}, values | ends | {"photographs": photographs})
        space = {"results": str(tmp_path)}
        for name in ("v2", "v3"):
            exec(compile(CELLS[name]["source"], name, "exec"), space)
        return space["table"].set_index("claim")

    return of


def test_nothing_is_judged_of_models_that_were_not_run_or_of_drawn_pictures_beside_photographs(judged):
    drawn = (0.3, 0.1, 0.01, 0.0)
    assert judged(("miniature", 0.35, *drawn)).verdict[["E10", "E11"]].tolist() == [UNTESTABLE] * 2
    assert judged((SEVEN, 0.3), (f"{THIRTEEN}@4bit", 0.3)).verdict["E10"] == UNTESTABLE  # not the one that is named
    assert judged((SEVEN, 0.3), (THIRTEEN, 0.3, *drawn)).verdict["E10"] == UNTESTABLE


@pytest.mark.parametrize(
    ("share", "dead", "width", "verdict"),
    [(0.31, 0.3, 0.01, HOLDS), (0.31, 0.3, 0.05, UNDECIDED), (0.31, 0.2, 0.01, FAILS), (0.5, 0.3, 0.01, FAILS)],
)
def test_nearly_identical_means_within_five_points_interval_included(judged, share, dead, width, verdict):
    found = judged((SEVEN, 0.3, 0.3, 0.1, width), (f"/data/{THIRTEEN.rpartition('/')[2]}", share, dead, 0.1, width))
    assert found.verdict["E10"] == verdict


@pytest.mark.parametrize(
    ("models", "verdict"),
    [
        ([(name, 0.05) for name in OTHERS], HOLDS),  # too small
        ([(name, 0.3, 0.3, -0.02) for name in OTHERS], HOLDS),  # no more alike than chance
        ([(name, 0.3) for name in OTHERS], FAILS),
        ([(OTHERS[0], 0.05)], PARTLY),
        ([(OTHERS[0], 0.3)], FAILS),  # there in one
        ([(name, 0.3, 0.3, 0.18, 0.2) for name in OTHERS], UNDECIDED),  # few pictures are no sign of absence
    ],
)
def test_absent_means_small_or_no_more_alike_than_chance_in_all_three(judged, models, verdict):
    assert judged(*models).verdict["E11"] == verdict


def test_the_page_has_every_claim_its_number_its_word_and_a_way_to_its_card():
    cell = CELLS["v5"]
    page = BeautifulSoup(cell["outputs"][0]["data"]["text/html"], "html.parser")
    rows = page.select("tr[data-verdict]")
    measured = [name for file in records.main_records() for name in records.read(file).claims]
    assert sorted(row.a.text for row in rows if row["data-section"] != "ve") == sorted(measured)
    for row in rows:
        said, number, word = (cell.get_text(" ", strip=True) for cell in row.find_all("td"))
        assert row.a["href"].endswith(f".html#{row.a.text.lower()}") or row.a["href"] == "#other-models"
        assert said.endswith(".") and number and re.search(r"^[●◐○◇–▪] ", word)
    assert page.find(id="verdict-filter").has_attr("hidden")  # without JavaScript everything is there, and no filter
    assert len(page.select("#verdict-filter label > select, #verdict-filter label > input")) == 3


def test_seven_claims_are_the_abstracts_and_what_no_run_can_refute_is_not_counted():
    listed = claims.claims().values()
    assert len([claim for claim in listed if claim.headline]) == 7
    assert {claim.id for claim in listed if claim.by_construction} == {"R11", "R12", "R13", "R14"}
    assert all(claim.sentence.endswith(".") for claim in listed)


def test_each_card_has_its_claim_as_anchor():
    text = "<p><strong>E40</strong> · tokens</p><p><strong>R01</strong> in prose</p><th>E40</th><th>E41</th>"
    assert book_pages.anchored(text) == (
        '<p class="claim" id="e40"><strong>E40</strong> · tokens</p><p><strong>R01</strong> in prose</p>'
        '<th>E40</th><th id="e41">E41</th>'  # a claim without a card has its row in the chapter's table
    )


@pytest.mark.parametrize("model", ["", "org/other"])
def test_the_page_is_made_of_whatever_records_there_are(tmp_path, model, monkeypatch):
    glued = {}
    monkeypatch.setattr("embedlens.book.glue", glued.__setitem__)
    if model:
        found = claims.Finding(0.1, 0.0, 0.2, 9, FAILS, "10 % (0–20) of all", rule="x > 0", text="10 % (0–20)")
        records.write(tmp_path, model, "07_decoupling", 9, 0, {"E51": found}, {})
    space = {"results": str(tmp_path)}
    for name, cell in CELLS.items():
        if cell["cell_type"] == "code" and name.startswith("v") and name != "v1":
            exec(compile(cell["source"], name, "exec"), space)
    said = "1 does not hold and 2 cannot" if model else "by construction), 2 cannot"
    assert said in glued["found_first"] and glued["main_model"] == (model or "the miniature")
