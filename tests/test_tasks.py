"""Question sets are balanced and held out; scoring and controls do what they say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from embedlens import EmbedLensError, tasks
from embedlens.samples import Question
from embedlens.samples.miniworld import scene, sprites


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_every_answer_is_asked_for_equally_often(kind):
    items = tasks.questions(kind, n=40)
    assert len(items) == 40 and len({item.sample.id for item in items}) == 40
    answers = Counter(item.question.answer for item in items)
    if tasks.KINDS[kind].answers:
        assert max(answers.values()) <= -(-40 // len(tasks.KINDS[kind].answers))
    if kind == "word":
        assert all(scene.is_heldout_word(answer) for answer in answers)


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_a_family_spreads_its_questions_over_its_kinds_and_its_pictures(family):
    items = tasks.family_questions(family, n=32)
    assert len(items) == 32 == len({item.sample.id for item in items})
    asked = Counter(item.question.kind for item in items)
    assert list(asked) == [kind for metric in tasks.FAMILIES[family] for kind in metric.kinds]
    assert max(asked.values()) - min(asked.values()) <= 1
    assert {item.question.family for item in items} == {family}


def test_families_share_no_picture_and_none_with_another_seed():
    def ids(seed):
        return [item.sample.id for family in tasks.FAMILIES for item in tasks.family_questions(family, 8, seed)]

    assert len(set(ids(0))) == len(ids(0))
    assert not set(ids(0)) & set(ids(1))


def named(item: tasks.Item) -> str:
    return item.question.text.removeprefix("Is there a").removeprefix("n").strip().removesuffix(" in the picture?")


@pytest.mark.parametrize("kind", ["pope_random", "pope_popular", "pope_adversarial"])
def test_pope_asks_for_what_is_there_and_for_what_is_absent_in_its_way(kind):
    items = tasks.questions(kind, n=40)
    groups = {category.name: category.group for category in sprites.CATEGORIES}
    absent = []
    for item in items:
        assert (named(item) in item.sample.labels) == (item.question.answer == "yes")
        if item.question.answer == "no":
            absent.append((named(item), {groups[label] for label in item.sample.labels}))
    popular = all(name in tasks.popular_categories() for name, _ in absent)
    company = all(groups[name] in there for name, there in absent)
    assert len(absent) == 20
    assert popular == (kind == "pope_popular")
    assert company == (kind == "pope_adversarial")


def test_a_larger_picture_has_the_same_question_and_answer():
    small, large = (tasks.family_questions("grounding", 4, scale=scale) for scale in (1, 2))
    assert [item.question for item in small] == [item.question for item in large]
    assert [2 * item.sample.width for item in small] == [item.sample.width for item in large]


def test_the_same_seed_asks_the_same_and_another_seed_does_not():
    def asked(seed):
        return [(item.question, item.sample.image.tobytes()) for item in tasks.questions("where", 6, seed)]

    assert asked(0) == asked(0)
    assert asked(0) != asked(1)


def test_one_patch_objects_touch_one_cell_only():
    for item in tasks.questions("one_patch", 30):
        x, y, w, h = item.sample.annotations[0]["bbox"]
        assert x // 14 == (x + w - 1) // 14 and y // 14 == (y + h - 1) // 14
        assert max(w, h) == 14


def grounding(width, height, box):
    sample = tasks.questions("box", 1)[0].sample
    question = Question(
        "Give the box of the dog.", "[" + ", ".join(f"{side:.3f}" for side in box) + "]", "grounding", "box"
    )
    return tasks.Item(replace(sample, width=width, height=height), question)


@pytest.mark.parametrize("size", [(100, 100), (640, 480), (480, 640), (640, 427)])
def test_a_box_in_the_frame_of_the_picture_is_the_same_pixels(size):
    width, height = size
    side = max(size)
    padded = (0.3, 0.4, 0.6, 0.7)
    x0, y0, x1, y1 = tasks.in_original(padded, width, height)
    left, top = (side - width) // 2, (side - height) // 2
    pixels = [x0 * width + left, y0 * height + top, x1 * width + left, y1 * height + top]
    assert pixels == pytest.approx([value * side for value in padded])


def test_a_perfect_padded_answer_is_right_and_can_be_wrong_in_the_original_frame():
    near_the_edge = (0.10, 0.20, 0.20, 0.30)
    square, wide = grounding(100, 100, near_the_edge), grounding(640, 480, near_the_edge)
    for item in (square, wide):
        assert tasks.box_score(item, item.question.answer) == 1 == tasks.score(item.question, item.question.answer)
    assert tasks.box_score(square, square.question.answer, "original") == 1
    assert tasks.box_score(wide, wide.question.answer, "original") == 0
    unpadded = "[" + ", ".join(f"{v:.3f}" for v in tasks.in_original(near_the_edge, 640, 480)) + "]"
    assert tasks.box_score(wide, unpadded, "original") == 1
    assert tasks.box_score(wide, unpadded) == 0
    assert tasks.box_score(wide, "dog") == tasks.box_score(wide, "dog", "original") == 0


def test_swapping_shows_another_picture_for_the_same_question(miniature):
    items = tasks.questions("colour", n=4)
    own, other = tasks.evaluate(miniature, items), tasks.evaluate(miniature, items, swap=True)
    assert list(own.question) == list(other.question) and list(own.answer) == list(other.answer)
    assert not set(zip(own.question, own.id, strict=True)) & set(zip(other.question, other.id, strict=True))


def test_bad_requests_say_what_to_do(miniature):
    with pytest.raises(EmbedLensError, match="unknown kind of question 'taste'"):
        tasks.questions("taste")
    with pytest.raises(EmbedLensError, match="at least one"):
        tasks.questions("count", n=0)
    with pytest.raises(EmbedLensError, match="unknown family 'taste'"):
        tasks.family_questions("taste")
    with pytest.raises(EmbedLensError, match="n is 2: ocr has 3 kinds"):
        tasks.family_questions("ocr", n=2)
    colour = tasks.questions("colour", 1)[0]
    with pytest.raises(EmbedLensError, match="asks for no box"):
        tasks.box_score(colour, "red")
    with pytest.raises(EmbedLensError, match="unknown frame 'mine'"):
        tasks.box_score(colour, "red", "mine")
    with pytest.raises(EmbedLensError, match="no questions"):
        tasks.evaluate(miniature, [])
