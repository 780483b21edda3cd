"""Each committed notebook shows what a run of it shows now. `make test` runs this; the name keeps it out of the unit
tests, because the first run takes minutes. Runs that are still good are taken from `_build`."""

from pathlib import Path

import pytest
from notebook_outputs import differences

from embedlens import book

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def runs():
    return book.executed(ROOT)


@pytest.mark.parametrize("page", book.chapters(ROOT), ids=lambda page: page.stem)
def test_a_committed_notebook_shows_what_a_run_shows(page, runs):
    committed = book.read(ROOT / page)
    fresh = book.merged(book.read(ROOT / page), book.read(runs[page]))
    assert not (found := differences(committed, fresh)), "\n".join([f"{page}: run `make notebooks`?", *found])
