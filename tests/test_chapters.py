"""Chapters 01 to 08 run on a COCO folder, on the miniature and the twin of every named checkpoint, in three manners.

In float32, in bfloat16, and on a small card of its own (`pretend_devices`). Each chapter runs in each manner, and each
model in some, cell by cell and without pictures with patches: this is about running, so samples are few. With
EMBEDLENS_TWIN_CHAPTERS set, each chapter runs on each model in each manner, whole and by papermill but for the card,
which is in this process.
"""

from __future__ import annotations

import ast
import json
import os
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pretend_devices import on_card, small_card
from test_coco import write_coco
from twins import TWINS

import embedlens as el
from embedlens import samples, sweep

ROWS = 3  # prompts, or pictures, that fit on the card at a time
CHAPTERS: dict[str, dict[str, Any]] = {
    "01_motivation_clustering": {"n_images": 4},
    "02_embedlens_vs_logitlens": {"n_images": 5},
    "03_sinks": {"n_images": 4, "n_questions": 5, "n_seeds": 1},
    "04_dead_tokens": {"n_images": 4, "n_questions": 5},
    "05_alive_sparsity": {"n_images": 4},
    "06_multi_trajectory_benchmark": {"n_images": 14},
    "07_decoupling": {"n_images": 6, "n_trained": 5, "n_fewer": 5},
    "08_redundancy_through_language": {"n_images": 4, "n_questions": 5},
}
MODELS = ("miniature", *TWINS)
MANNERS = {"float32": 4, "bfloat16": 7, "card": 0}  # and the model with which the first chapter runs
SOME = [
    (chapter, MODELS[(first + number) % len(MODELS)], manner)
    for manner, first in MANNERS.items()
    for number, chapter in enumerate(CHAPTERS)
]
WHOLE = bool(os.environ.get("EMBEDLENS_TWIN_CHAPTERS"))


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("coco")
    write_coco(samples.load("miniworld", n=32), folder)
    return f"coco:{folder}"


def run_cells(page: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """The names that a chapter's cells leave, run here one after the other."""
    names: dict[str, Any] = {}
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            tree.body = [node for node in tree.body if "figure" not in map(ast.unparse, getattr(node, "targets", ()))]
            exec(compile(tree, f"{page.stem} {cell['id']}", "exec"), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                names |= parameters
    return names


@pytest.mark.slow
@pytest.mark.parametrize(("chapter", "name", "manner"), product(CHAPTERS, MODELS, MANNERS) if WHOLE else SOME)
def test_a_chapter_runs(chapter, name, manner, coco, twin_of, miniature, monkeypatch, tmp_path):
    page = Path(__file__).parent.parent / "notebooks" / f"{chapter}.ipynb"
    folder, loaded = ("miniature", miniature) if name == "miniature" else twin_of(name)
    parameters = CHAPTERS[chapter] | {"model": str(folder), "out": str(tmp_path)}
    parameters |= {"dataset": coco} if chapter[:2] != "06" else {}
    monkeypatch.setattr("embedlens.groups.CALIBRATION", 4)
    if manner == "card":
        monkeypatch.setattr(sweep, "dead_arms", partial(sweep.dead_arms, seeds=1))
        with on_card(loaded) as model, small_card(ROWS, loaded) as asked:
            monkeypatch.setattr(el, "load", lambda *_, **__: model)
            run_cells(page, parameters)
        assert max(asked) > ROWS, "nothing had to be halved"
    elif WHOLE:
        from papermill import execute_notebook

        execute_notebook(page, tmp_path / "run.ipynb", parameters | {"dtype": manner}, cwd=tmp_path, progress_bar=False)
    else:
        vlm = run_cells(page, parameters | {"dtype": manner})["vlm"]
        assert str(vlm.hf.dtype) == f"torch.{manner}"
    (record,) = tmp_path.rglob(f"{chapter}.json")
    assert json.loads(record.read_text())["n_images"] == parameters["n_images"]
