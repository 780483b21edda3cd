"""Question sets are balanced and held out; scoring and controls do what they say."""

from __future__ import annotations

from collections import Counter

import pytest

from embedlens import EmbedLensError, tasks
from embedlens.samples import Question
from embedlens.samples.miniworld import scene


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_every_answer_is_asked_for_equally_often(kind):
    items = tasks.questions(kind, n=40)
    assert len(items) == 40 and len({item.sample.id for item in items}) == 40
    answers = Counter(item.question.answer for item in items)
    if tasks.KINDS[kind].answers:
        assert max(answers.values()) <= -(-40 // len(tasks.KINDS[kind].answers))
    if kind == "word":
        assert all(scene.is_heldout_word(answer) for answer in answers)


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


def test_scoring():
    box = Question("Give the box of the dog.", "[0.10, 0.10, 0.50, 0.50]", "grounding", "box")
    assert tasks.score(box, "[0.12, 0.10, 0.50, 0.52]") == 1
    assert (
        tasks.score(box, "[0.60, 0.60, 0.90, 0.90]") == tasks.score(box, "dog") == tasks.score(box, "[0.1, 0.2]") == 0
    )
    name = Question("What is it?", "wine glass", "general", "object")
    assert tasks.score(name, " Wine glass.") == 1
    assert tasks.score(name, "wine") == tasks.score(name, "") == 0


def test_f1_is_zero_for_always_no_and_two_thirds_for_always_yes():
    truth = ["yes", "no"] * 5
    assert tasks.f1(truth, ["no"] * 10) == 0
    assert tasks.f1(truth, ["yes"] * 10) == pytest.approx(2 / 3)
    assert tasks.f1(truth, truth) == 1


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
    with pytest.raises(EmbedLensError, match="no questions"):
        tasks.evaluate(miniature, [])
