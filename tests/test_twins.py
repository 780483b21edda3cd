"""What is promised of every checkpoint that is named, on its small twin: readable words, real rows, chapters that run.

Its numbers and its map of patches are in test_families.py.
"""

from __future__ import annotations

import json
import os
import re

import pytest
from chapters import NOTEBOOKS, run_chapter
from twins import TWINS, save_twin

import embedlens as el
from embedlens import EmbedLensError
from embedlens.measures.dead import is_word
from embedlens.readings import ARTICLES, Protocol, Reader
from embedlens.samples import load as load_samples
from embedlens.words import textless_ids

CHAPTERS = ("01_motivation_clustering", "02_embedlens_vs_logitlens")
INTERNVL = "OpenGVLab/InternVL3-8B-hf"


@pytest.fixture(params=TWINS)
def model(request, twin_of):
    return twin_of(request.param)[1]


def test_entries_that_start_a_word_are_read_as_that_word(model):
    pieces = model.tokenizer.convert_ids_to_tokens(range(len(model.tokens)))
    begin = [place for place, piece in enumerate(pieces) if piece[0] in "▁Ġ" and re.fullmatch("[A-Za-z]+", piece[1:])]
    assert len(begin) > 100 and [model.tokens[place] for place in begin] == [pieces[place][1:] for place in begin]
    assert all(is_word(model.tokens[place]) for place in begin if len(pieces[place]) > 2)
    assert "犬" not in pieces or model.tokens[pieces.index("犬")] == "·犬"
    assert "<0x0A>" not in pieces or model.tokens[pieces.index("<0x0A>")] == "⏎"
    none = {model.tokens[place] for place in textless_ids(model.tokenizer, len(model.tokens))}
    assert "<0xE3>" in none and not none & {"dog", "the"}


def test_articles_that_begin_an_answer_are_skipped(model):
    prompt = model.prompt(load_samples("miniworld", n=1)[0].image, "what is in the picture ?")
    skipped = model.tokenizer.convert_ids_to_tokens(Reader(model, prompt, Protocol(), 1).articles.tolist())
    assert {piece[1:] for piece in skipped if piece[0] in "▁Ġ"} == set(ARTICLES)


def test_a_placeholder_beyond_the_embedding_is_no_row_but_a_word_is_refused(tmp_path):
    folder = save_twin(tmp_path / "twin", INTERNVL)
    model = el.load(folder, device="cpu")
    rows = len(model.hf.get_input_embeddings().weight)
    assert model.tokenizer.convert_tokens_to_ids("<video>") == rows
    assert len(model.tokens) == rows and model.tokens[-1] == "</box>"
    words = json.loads((folder / "tokenizer_config.json").read_text())
    last = words["added_tokens_decoder"][str(rows)]
    word = {str(rows + 1): last | {"content": "zyzzyva", "special": False}}
    more = words | {"added_tokens_decoder": words["added_tokens_decoder"] | word}
    (folder / "tokenizer_config.json").write_text(json.dumps(more))
    with pytest.raises(EmbedLensError, match=f"has ids up to {rows + 1}, the embedding only {rows} rows: tokenizer"):
        el.load(folder, device="cpu")
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_id": rows}))
    with pytest.raises(EmbedLensError, match=f"has ids up to {rows}, the embedding only {rows} rows: tokenizer"):
        el.load(folder, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_what_the_first_chapters_compute_runs(model, chapter, tmp_path, monkeypatch):
    """Their cells one after the other, without pictures with patches; the model is loaded and its groups found once.

    With EMBEDLENS_TWIN_CHAPTERS set, as papermill runs them.
    """
    parameters = {"model": model.name, "n_images": 5, "out": str(tmp_path)}
    if os.environ.get("EMBEDLENS_TWIN_CHAPTERS"):
        import papermill

        papermill.execute_notebook(
            NOTEBOOKS / f"{chapter}.ipynb", tmp_path / "run.ipynb", parameters, kernel_name="python3", cwd=tmp_path,
            progress_bar=False,
        )  # fmt: skip
    else:
        run_chapter(chapter, model, monkeypatch, **parameters)
    (record,) = tmp_path.rglob(f"{chapter}.json")
    assert json.loads(record.read_text())["n_images"] == 5
