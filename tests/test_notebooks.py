"""The committed notebooks are what a plain run gives, and what they hand to the prose is used."""

import sys
from pathlib import Path

import book_build as book
import book_rules
import launch
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.relative_to(ROOT) for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_every_notebook_is_in_the_book_and_glued_values_and_prose_fit_together():
    assert set(NOTEBOOKS) == set(book.chapters(ROOT))
    assert book_rules.glue_faults(ROOT, book.pages(ROOT)) == []


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_a_committed_notebook_was_run_in_order_and_carries_nothing_of_its_machine(page):
    notebook = book.read(ROOT / page)
    machine = [str(ROOT), str(Path.home()) + "/", sys.prefix]
    assert book_rules.run_faults(notebook, str(page)) + book_rules.metadata_faults(notebook, str(page), machine) == []
    address = launch.stated(notebook)  # it begins with the cell that installs what is missing and checks parameters
    assert address is not None and not launch.begin(notebook, address), "run python book/_tools/launch.py"
    sources = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(sources) == len(set(sources)), "a cell stands there twice"
    # IPython finds the semicolon in its history, which nbval's kernel does not keep: the value is shown after all.
    assert not [source for source in sources if source.rstrip().endswith(";")]
    if "quantize" in book.declared_parameters(ROOT / page):
        lines = [line for source in sources for line in source.splitlines()]
        assert [line for line in lines if "el.load(" in line] == [
            "vlm = el.load(model, device=device, dtype=dtype, quantize=quantize or None)"
        ]
        assert any(line.startswith("model = vlm.name") for line in lines), "its record would replace the whole model's"
