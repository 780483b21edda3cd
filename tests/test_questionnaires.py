"""Every family asks about every picture, as evenly as when it asks alone; no other set shows these pictures."""

from __future__ import annotations

from collections import Counter

import pytest

from embedlens import EmbedLensError, tasks
from embedlens.tasks import questionnaires


@pytest.fixture(scope="module")
def alone():
    return {family: tasks.family_questions(family, 17) for family in tasks.FAMILIES}


@pytest.mark.parametrize("n", [5, 17])
def test_each_picture_is_asked_once_by_every_family(n):
    items = questionnaires(n)
    asked = Counter((item.sample.id, item.question.family) for item in items)
    assert len({picture for picture, _ in asked}) == n
    assert set(asked.values()) == {1} and len(asked) == n * len(tasks.FAMILIES) == len(items)
    first = [item.question.family for item in items[: len(tasks.FAMILIES)]]
    assert first == list(tasks.FAMILIES)


def test_kinds_and_answers_are_asked_for_as_evenly_as_by_the_families_alone(alone):
    items = questionnaires(17)
    for family in tasks.FAMILIES:
        own = [item.question for item in items if item.question.family == family]
        assert Counter(question.kind for question in own) == Counter(item.question.kind for item in alone[family])
        for kind in {question.kind for question in own}:
            possible = tasks.KINDS[kind].answers
            given = Counter(question.answer for question in own if question.kind == kind)
            if possible:
                assert set(given) <= set(possible)
                assert max(given.values()) - min(given[answer] for answer in possible) <= 1, kind
    counted = {(family, kind) for family, metrics in tasks.FAMILIES.items() for m in metrics for kind in m.kinds}
    assert {(item.question.family, item.question.kind) for item in items} == counted


def test_the_questions_fit_their_pictures():
    for item in questionnaires(12):
        assert tasks.score(item.question, item.question.answer) == 1
        if item.question.kind == "box":
            assert tasks.box_score(item, item.question.answer) == 1
        if item.question.kind in ("presence", "pope_random", "pope_popular", "pope_adversarial"):
            name = item.question.text.removesuffix(" in the picture?").split(" ", 3)[3]
            assert (name in item.sample.labels) == (item.question.answer == "yes"), item.question


def test_the_same_seed_asks_the_same_and_no_other_set_shows_these_pictures(alone):
    once, again, other = questionnaires(5), questionnaires(5), questionnaires(5, seed=1)
    assert [item.question for item in once] == [item.question for item in again]
    assert once[0].sample.image.tobytes() == again[0].sample.image.tobytes()
    own = {item.sample.id for item in once}
    assert not own & {item.sample.id for item in other}
    others = {item.sample.id for items in alone.values() for item in items}
    assert not own & others


def test_fewer_questions_than_kinds_are_refused():
    with pytest.raises(EmbedLensError, match="general has 5 kinds"):
        questionnaires(4)
