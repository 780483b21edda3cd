"""Chapters 01 to 08 run on a COCO folder and the twins of named checkpoints, in three manners.

In bfloat16, and in float32 on a small card of its own (`pretend_devices`): each chapter and each family in both (not
chapter 08 on the card), cell by cell without pictures with patches; this is about running, so samples are few. With
EMBEDLENS_TWIN_CHAPTERS set, each chapter on the twin of each checkpoint, whole and by papermill, in float32 on the CPU,
too; the card is in this process.
"""

from __future__ import annotations

import ast
import json
import os
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pretend_devices import on_card, small_card
from sklearn.manifold import TSNE
from test_coco import write_coco
from twins import BY_FAMILY, TWINS

import embedlens as el
from embedlens import samples, sweep, tasks
from embedlens.measures import patch_reading
from embedlens.parameters import assigned
from embedlens.samples import patchbench

FEW = {"n_questions": 5, "n_seeds": 1, "n_trained": 5, "n_fewer": 5}
ROWS = 5  # prompts, or pictures, that fit on the card at a time
TOKENS = 3  # of an answer
QUESTIONNAIRES = cache(tasks.questionnaires)
PAGES = sorted((Path(__file__).parent.parent / "notebooks").glob("0[1-8]*.ipynb"))
FAMILIES = (next(iter(TWINS)), *BY_FAMILY.values())
MANNERS = {"bfloat16": 5, "card": 1}  # and with which family chapter 01 runs
SLOW = ("card", "08")  # three minutes, so only with the switch
RUNS = [
    (page, FAMILIES[(at + first) % 7], manner)
    for manner, first in MANNERS.items()
    for at, page in enumerate(PAGES)
    if (manner, page.stem[:2]) != SLOW
]
if WHOLE := bool(os.environ.get("EMBEDLENS_TWIN_CHAPTERS")):
    RUNS = list(product(PAGES, TWINS, ("float32", *MANNERS)))


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("coco")
    write_coco(samples.load("miniworld", n=32), folder)
    return f"coco:{folder}"


@pytest.fixture(autouse=True)
def little_asked(monkeypatch):
    """Of what notebooks have no parameter for. A random model never ends an answer by itself."""
    monkeypatch.setattr("embedlens.groups.CALIBRATION", ROWS + 1)
    monkeypatch.setattr(sweep, "dead_arms", partial(sweep.dead_arms, seeds=1))
    for module in (sweep, tasks):
        monkeypatch.setattr(module, "answer_tokens", lambda _: TOKENS)
    monkeypatch.setattr(patch_reading, "ANSWER_TOKENS", TOKENS)
    monkeypatch.setattr(patchbench, "PAPER", 14)
    monkeypatch.setattr(tasks, "questionnaires", QUESTIONNAIRES)
    monkeypatch.setattr("sklearn.manifold.TSNE", lambda **how: TSNE(**how | {"max_iter": 250}))


def run_cells(cells: list[dict[str, Any]], parameters: dict[str, Any]) -> dict[str, Any]:
    """The names that a chapter's cells leave, run here one after the other."""
    names: dict[str, Any] = {}
    for cell in cells:
        tree = ast.parse("".join(cell["source"]))
        tree.body = [node for node in tree.body if "figure" not in map(ast.unparse, getattr(node, "targets", ()))]
        exec(compile(tree, cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= parameters
    return names


@pytest.mark.slow
@pytest.mark.parametrize(("page", "name", "manner"), RUNS, ids=lambda part: getattr(part, "stem", part))
def test_a_chapter_runs(page, name, manner, coco, twin_of, monkeypatch, tmp_path):
    cells = [cell for cell in json.loads(page.read_text())["cells"] if cell["cell_type"] == "code"]
    declared = assigned("".join(next(cell["source"] for cell in cells if "parameters" in str(cell["metadata"]))))
    folder, loaded = twin_of(name)
    given = FEW | {"model": str(folder), "dataset": coco, "out": str(tmp_path), "dtype": manner}
    given["n_images"] = {"06": 14, "07": 6}.get(page.stem[:2], 4)  # some of every kind
    given = {key: value for key, value in given.items() if key in declared}
    if manner == "card":
        with on_card(loaded) as model, small_card(ROWS, loaded) as asked:
            monkeypatch.setattr(el, "load", lambda *_, **__: model)
            run_cells(cells, given | {"dtype": "auto"})
        assert max(asked) > ROWS, "nothing had to be halved"
    elif WHOLE:
        from papermill import execute_notebook

        execute_notebook(page, tmp_path / "run.ipynb", given, cwd=tmp_path, progress_bar=False)
    else:
        assert str(run_cells(cells, given)["vlm"].hf.dtype) == f"torch.{manner}"
    (record,) = tmp_path.rglob(f"{page.stem}.json")
    assert json.loads(record.read_text())["n_images"] == given["n_images"]
