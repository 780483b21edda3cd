"""The card shows what was measured, and says plainly where a bar is missed."""

from __future__ import annotations

import json
from importlib.resources import files

import matplotlib
import numpy as np
import pandas as pd
import pytest

from embedlens import tasks
from embedlens.chapters import card
from embedlens.errors import EmbedLensError
from embedlens.intervals import Interval

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def log():
    return json.loads(files("embedlens").joinpath("miniature/training.json").read_text())


def answered(right: int, of: int) -> pd.DataFrame:
    return pd.DataFrame({"answer": ["yes"] * of, "prediction": ["yes"] * right + ["no"] * (of - right),
                         "correct": [1.0] * right + [0.0] * (of - right)})  # fmt: skip


@pytest.mark.parametrize(
    ("low", "value", "high", "said"),
    [
        (0.86, 0.9, 0.95, "reached"),
        (0.8, 0.9, 0.95, "reached, interval extends below"),
        (0.7, 0.8, 0.9, "not reached, interval extends above"),
        (0.6, 0.7, 0.8, "not reached"),
    ],
)
def test_a_bar_is_reached_by_the_value_and_the_interval_says_how_surely(low, value, high, said):
    assert card.verdict(Interval(*map(np.array, (value, low, high))), 0.85) == said


def test_the_table_has_every_bar_and_no_blank():
    answers = {
        (kind, arm): answered(7, 10) for kind in card.BARS for arm in ("miniature", "another picture", "untrained")
    }
    measured = {key: card.rate(table, key[0]) for key, table in answers.items()}
    table = card.quality_table(answers, measured)
    assert len(table) == len(card.BARS) and (table.to_numpy() != "").all()
    assert table.loc[card.BARS["object"].asked, "miniature"].startswith("70 (")
    assert table.loc[card.BARS["object"].asked, "the bar is"] == "not reached, interval extends above"
    assert float(measured["existence", "miniature"].value) == pytest.approx(2 * 7 / 17)  # F1, not accuracy
    assert len(card.quality_figure(measured).axes[0].get_yticklabels()) == len(card.BARS)


def test_curves_of_the_shipped_log_are_drawn_whole(log):
    assert list(card.stages_table(log).index) == list(log["stages"])
    assert len(card.loss_figure(log).axes) >= len(log["stages"])
    figure = card.heldout_figure(log)
    names = set(card.heldout(log["stages"]["tower"]))
    drawn = {line.get_label() for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")}
    assert drawn == {name.replace("_", " ") for name in names} and "name" in drawn


def test_a_further_training_is_marked_where_it_began(log):
    entries = [{"step": s, "samples": 48 * s, "seconds": s, "loss": 1.0} for s in (50, 100, 150)]
    both = {
        "stages": {"tower": {"steps": 150, "seconds": 150, "log": entries}},
        "history": [{"stage": "tower", "step": 100, "further": True, "change": "a further training"}],
    }
    assert card.beginnings(both, "tower") == [4.8]
    assert card.beginnings({**both, "history": []}, "tower") == []
    assert len(card.loss_figure(both).axes[0].get_lines()) == 2


def test_the_gallery_shows_six_pictures_with_what_is_said(tiny):
    items = tasks.questions("object", 6)
    assert len(card.gallery(tiny, items).axes) == 6
    with pytest.raises(EmbedLensError, match="shows six"):
        card.gallery(tiny, items[:2])


def test_random_weights_and_another_picture_are_asked_the_same_questions(tiny):
    items = {"object": tasks.questions("object", 8)}
    answers = card.ask(tiny, items)
    assert set(answers) == {("object", arm) for arm in ("miniature", "another picture", "untrained")}
    assert answers["object", "miniature"].question.tolist() == answers["object", "another picture"].question.tolist()
    assert answers["object", "miniature"].id.tolist() != answers["object", "another picture"].id.tolist()
    assert len(answers["object", "untrained"]) == 2


def test_experiments_say_how_many_samples_and_what_was_right(log):
    run = {
        "stage": "language",
        "steps": 4,
        "seconds": 150,
        "log": [
            {"samples": 16, "heldout/relation": 0.4, "heldout/caption": 0.1},
            {"samples": 32, "heldout/relation": 0.626},
            {"samples": 64, "heldout/relation": 0.5, "loss": 1.0},
        ],
    }
    table = card.experiments_table({**log, "experiments": {"relation_words": run}})
    assert table.loc[0, ["steps", "samples", "right at first", "at the end", "at best", "minutes"]].tolist() == [
        4, 64, 0.4, 0.5, 0.63, 2
    ]  # fmt: skip
    assert card.experiments_table({"stages": {}}).empty
    assert set(log["experiments"]) == set(card.TRIED)
