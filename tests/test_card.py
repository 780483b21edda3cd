"""The card's measuring: the same questions about the own and another picture; what a training logged, whole."""

from __future__ import annotations

import json
from importlib.resources import files

import pandas as pd
import pytest

import embedlens as el
from embedlens import tasks
from training import card


@pytest.fixture(scope="module")
def log():
    return json.loads(files("embedlens").joinpath("miniature/training.json").read_text())


def test_own_and_another_picture_are_answered_as_one_by_one(miniature):
    items = tasks.questions("colour", 6)
    table = el.run(card.answers, miniature, card.with_another(items), batch_size=4)
    own, another = (table[table.about == about] for about in card.ABOUT)
    assert own.prediction.tolist() == tasks.evaluate(miniature, items).prediction.tolist()
    swapped = tasks.evaluate(miniature, items, swap=True).set_index("id")
    assert another.set_index("id").prediction.to_dict() == swapped.prediction.to_dict()
    assert sorted(own.question) == sorted(another.question) and own.id.tolist() == another.id.tolist()
    assert (own.correct == (own.answer == own.prediction)).all()


def test_random_weights_are_of_the_same_anatomy(tiny):
    other = card.untrained(tiny)
    assert other.n_layers == tiny.n_layers and not (other.input_embeddings == tiny.input_embeddings).all()


def test_existence_is_scored_by_f1_and_all_else_by_share():
    rows = pd.DataFrame({"id": range(10), "answer": "yes", "prediction": ["Yes."] * 7 + ["no"] * 3})
    rows["correct"] = [1.0] * 7 + [0.0] * 3
    share, f1 = card.rate(rows), card.rate(rows, f1=True)
    assert f1.value == pytest.approx(2 * 7 / 17) and share.value == 0.7
    assert share.low < 0.4 and share.high > 0.9  # exact, of ten questions


def test_curves_and_runs_of_the_shipped_log_are_whole(log):
    curves = card.curves(log["stages"])
    assert set(curves.stage) == set(log["stages"]) and curves.value.notna().all()
    assert {"loss", "name", "box"} <= set(curves.quantity)
    table = card.runs(log["experiments"], {"relation": ".2f", "peak": ".1f"})
    assert table.index.tolist() == list(log["experiments"]) and (table.loc["relation_words", "peak"] == "–")


def test_a_further_training_is_marked_where_it_began():
    entries = [{"step": s, "samples": 48 * s} for s in (50, 100, 150)]
    both = {"stages": {"tower": {"log": entries}}, "history": [{"stage": "tower", "step": 100, "further": True}]}
    assert card.resumed(both, "tower") == [4.8] and card.resumed({**both, "history": []}, "tower") == []
