"""Question sets are balanced and held out; scoring and controls do what they say."""

from collections import Counter
from dataclasses import replace

import pytest

from embedlens import tasks
from embedlens.samples import Question
from embedlens.samples.miniworld import scene, sprites


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_every_answer_is_asked_for_equally_often(kind):
    items = tasks.questions(kind, n=24)
    assert len(items) == 24 == len({item.sample.id for item in items})
    answers = Counter(item.question.answer for item in items)
    if tasks.KINDS[kind].answers:
        assert max(answers.values()) <= -(-24 // len(tasks.KINDS[kind].answers))
    if kind == "word":
        assert all(scene.is_heldout_word(answer) for answer in answers)


@pytest.fixture(scope="module")
def alone():
    return {family: tasks.family_questions(family, 16, seed=1) for family in tasks.FAMILIES}


@pytest.fixture(scope="module")
def together():
    return tasks.questionnaires(16, seed=1)


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_a_family_spreads_its_questions_over_its_kinds_and_its_pictures(alone, family):
    items = alone[family]
    assert len(items) == 16 == len({item.sample.id for item in items})
    asked = Counter(item.question.kind for item in items)
    assert list(asked) == [kind for metric in tasks.FAMILIES[family] for kind in metric.kinds]
    assert max(asked.values()) - min(asked.values()) <= 1
    assert {item.question.family for item in items} == {family}


def test_the_same_seed_asks_the_same_and_no_other_set_shows_these_pictures(alone, together):
    once, again, other = (tasks.questions("where", 6, seed) for seed in (0, 0, 1))
    assert [item.question for item in once] == [item.question for item in again]
    assert once[0].sample.image.tobytes() == again[0].sample.image.tobytes()
    sets = [*alone.values(), together, once, other, tasks.family_questions("general", 8)]
    sets.append(tasks.questionnaires(5))
    ids = [{item.sample.id for item in items} for items in sets]
    assert len(set().union(*ids)) == sum(map(len, ids))
    small, large = (tasks.family_questions("grounding", 4, scale=scale) for scale in (1, 2))  # the same, larger
    assert [item.question for item in small] == [item.question for item in large]
    assert [2 * item.sample.width for item in small] == [item.sample.width for item in large]


def test_each_picture_is_asked_once_by_every_family_as_evenly_as_by_the_families_alone(alone, together):
    asked = Counter((item.sample.id, item.question.family) for item in together)
    assert len({picture for picture, _ in asked}) == 16
    assert set(asked.values()) == {1} and len(asked) == 16 * len(tasks.FAMILIES) == len(together)
    assert [item.question.family for item in together[: len(tasks.FAMILIES)]] == list(tasks.FAMILIES)
    for family in tasks.FAMILIES:
        own = [item.question for item in together if item.question.family == family]
        assert Counter(question.kind for question in own) == Counter(item.question.kind for item in alone[family])
        for kind in {question.kind for question in own}:
            possible = tasks.KINDS[kind].answers
            given = Counter(question.answer for question in own if question.kind == kind)
            if possible:
                assert set(given) <= set(possible)
                assert max(given.values()) - min(given[answer] for answer in possible) <= 1, kind
    for item in together:  # the questions fit their pictures
        assert tasks.score(item.question, item.question.answer) == 1
        if item.question.kind == "box":
            assert tasks.box_score(item, item.question.answer) == 1
        if item.question.kind in ("presence", "pope_random", "pope_popular", "pope_adversarial"):
            assert (named(item) in item.sample.labels) == (item.question.answer == "yes"), item.question


def named(item: tasks.Item) -> str:
    return item.question.text.removeprefix("Is there a").removeprefix("n").strip().removesuffix(" in the picture?")


@pytest.mark.parametrize("kind", ["pope_random", "pope_popular", "pope_adversarial"])
def test_pope_asks_for_what_is_there_and_for_what_is_absent_in_its_way(kind):
    items = tasks.questions(kind, n=24)
    groups = {category.name: category.group for category in sprites.CATEGORIES}
    absent = []
    for item in items:
        assert (named(item) in item.sample.labels) == (item.question.answer == "yes")
        if item.question.answer == "no":
            absent.append((named(item), {groups[label] for label in item.sample.labels}))
    popular = all(name in tasks.popular_categories() for name, _ in absent)
    company = all(groups[name] in there for name, there in absent)
    assert len(absent) == 12
    assert popular == (kind == "pope_popular")
    assert company == (kind == "pope_adversarial")


def test_one_patch_objects_touch_one_cell_only():
    for item in tasks.questions("one_patch", 20):
        x, y, w, h = item.sample.annotations[0]["bbox"]
        assert x // 14 == (x + w - 1) // 14 and y // 14 == (y + h - 1) // 14
        assert max(w, h) == 14


def written(box):
    return "[" + ", ".join(f"{side:.3f}" for side in box) + "]"


def grounding(width, height, box):
    sample = tasks.questions("box", 1)[0].sample
    question = Question("Give the box of the dog.", written(box), "grounding", "box")
    return tasks.Item(replace(sample, width=width, height=height), question)


def test_a_perfect_padded_answer_is_right_and_can_be_wrong_in_the_original_frame():
    near_the_edge = (0.10, 0.20, 0.20, 0.30)
    square, wide = grounding(100, 100, near_the_edge), grounding(640, 480, near_the_edge)
    for item in (square, wide):
        assert tasks.box_score(item, item.question.answer) == 1 == tasks.score(item.question, item.question.answer)
    assert tasks.box_score(square, square.question.answer, "original") == 1
    assert tasks.box_score(wide, wide.question.answer, "original") == 0
    unpadded = written(tasks.in_original(near_the_edge, 640, 480))
    assert tasks.in_original((0.3, 0.4, 0.6, 0.7), 480, 640) == pytest.approx((7 / 30, 0.4, 19 / 30, 0.7))
    assert tasks.box_score(wide, unpadded, "original") == 1
    assert tasks.box_score(wide, unpadded) == 0
    assert tasks.box_score(wide, "dog") == tasks.box_score(wide, "dog", "original") == 0


def test_swapping_shows_another_picture_for_the_same_question(miniature):
    items = tasks.questions("colour", n=4)
    own, other = tasks.evaluate(miniature, items), tasks.evaluate(miniature, items, swap=True)
    assert list(own.question) == list(other.question) and list(own.answer) == list(other.answer)
    assert not set(zip(own.question, own.id, strict=True)) & set(zip(other.question, other.id, strict=True))
