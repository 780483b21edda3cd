"""Each committed notebook shows, and each committed record holds, what a run gives now.

`make test` runs this; the name keeps it out of the unit tests, because the first run takes minutes. Runs that are still
good are taken from `_build`."""

import json
from pathlib import Path

import book_build as book
import pytest
from notebook_outputs import differences

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def runs():
    return book.executed(ROOT)


@pytest.mark.parametrize("page", book.chapters(ROOT), ids=lambda page: page.stem)
def test_a_committed_notebook_shows_what_a_run_shows(page, runs):
    committed = book.read(ROOT / page)
    fresh = book.merged(book.read(ROOT / page), book.read(runs[page]))
    assert not (found := differences(committed, fresh)), "\n".join([f"{page}: run `make notebooks`?", *found])


def numbers(record):
    """Every value of a record by the name that a reader would look it up under."""
    of_claims = {f"{claim} {key}": value for claim, found in record["claims"].items() for key, value in found.items()}
    return of_claims | record["numbers"]


RECORDS = sorted((ROOT / "results" / "miniature").glob("[!.]*.json"))


@pytest.mark.parametrize("file", [file for file in RECORDS if "." not in file.stem], ids=lambda file: file.stem)
def test_a_committed_record_holds_what_a_run_records(file, runs):
    page = next(page for page in runs if page.stem == file.stem)
    committed = numbers(json.loads(file.read_text()))
    fresh = numbers(json.loads((runs[page].parent / file.relative_to(ROOT)).read_text()))
    assert set(fresh) == set(committed)
    words = {key: (committed[key], fresh[key]) for key in committed if key.split()[-1] in ("verdict", "rule")}
    assert [key for key, (was, now) in words.items() if was != now] == []
    # 1 % or two units of the fourth decimal, which records are rounded to
    values = {key: value for key, value in committed.items() if isinstance(value, (int, float))}
    far = {key: (value, fresh[key]) for key, value in values.items() if fresh[key] != pytest.approx(value, 0.01, 2e-4)}
    assert not far
