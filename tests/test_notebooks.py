"""The committed notebooks are what a plain run gives, and what they hand to the prose is used."""

import sys
from pathlib import Path

import book_build as book
import book_rules
import launch
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.relative_to(ROOT) for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_a_committed_notebook_was_run_in_order_and_carries_nothing_of_its_machine(page):
    notebook = book.read(ROOT / page)
    machine = [str(ROOT), str(Path.home()) + "/", sys.prefix]
    assert book_rules.run_faults(notebook, str(page)) + book_rules.metadata_faults(notebook, str(page), machine) == []


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_a_chapter_that_takes_quantize_loads_with_it_and_signs_what_it_measures_with_it(page):
    if "quantize" in book.declared_parameters(ROOT / page):
        lines = [line for cell in book.read(ROOT / page)["cells"] for line in cell["source"].splitlines()]
        assert [line for line in lines if "el.load(" in line] == [
            "vlm = el.load(model, device=device, dtype=dtype, quantize=quantize or None)"
        ]
        assert any(line.startswith("model = vlm.name") for line in lines), "its record would replace the whole model's"


def test_every_notebook_is_in_the_book():
    assert set(NOTEBOOKS) == set(book.chapters(ROOT))


def test_glued_values_and_prose_fit_together():
    assert book_rules.glue_faults(ROOT, book.pages(ROOT)) == []


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_no_cell_hides_its_value_behind_a_semicolon(page):
    """IPython finds the semicolon in its history, which nbval's kernel does not keep: the value is shown after all."""
    cells = book.read(ROOT / page)["cells"]
    assert not [
        cell["source"] for cell in cells if cell["cell_type"] == "code" and cell["source"].rstrip().endswith(";")
    ]


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_a_notebook_begins_with_the_cell_that_installs_what_is_missing_and_checks_its_parameters(page):
    notebook = book.read(ROOT / page)
    address = launch.stated(notebook)
    assert address is not None, "run python book/_tools/launch.py"
    assert not launch.begin(notebook, address), "run python book/_tools/launch.py"
    sources = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(sources) == len(set(sources)), "a cell stands there twice"
