"""Everything that a picture of the benchmark shows lies in one patch; answers are judged by what they say."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from embedlens import Frame, PatchGrid, samples
from embedlens.samples import patchbench
from embedlens.samples.miniworld.sprites import CATEGORIES, COLOURS
from embedlens.samples.patchbench import AXES, GROUND, GROUPS, INK, OBJECT, OCR, OCR_BACKGROUND, SURROUND

GRIDS = [(112, 14), (336, 14), (224, 16), (30, 15)]


def pixels(picture) -> np.ndarray:
    return np.asarray(picture.image).astype(int)


def differing(a, b) -> np.ndarray:
    """Bool[side, side]: where two pictures differ."""
    return (pixels(a) != pixels(b)).any(-1)


@pytest.mark.parametrize("side, patch", GRIDS)
def test_content_lies_only_in_its_cell(side, patch):
    grid = PatchGrid.of_canvas(Frame.stretch(side, side), (side, side), patch)
    for picture in patchbench.pictures(21, side=side, patch=patch):
        x0, y0, x1, y1 = picture.box
        assert grid.cell(grid.patch_at((x0 + x1) / 2, (y0 + y1) / 2)) == pytest.approx(picture.box)
        shown = (pixels(picture) != COLOURS[picture.surround]).any(-1)
        assert shown[y0:y1, x0:x1].any()
        shown[y0:y1, x0:x1] = False
        assert not shown.any()


def test_seventy_pictures_are_the_papers_thirty_twenty_twenty_with_three_questions_each():
    drawn = patchbench.pictures()
    assert Counter(picture.group for picture in drawn) == dict(zip(GROUPS, (30, 20, 20), strict=True))
    assert all(tuple(picture.asked) == AXES for picture in drawn)
    assert len({picture.id for picture in drawn}) == 70
    objects = [picture for picture in drawn if picture.group == OBJECT]
    assert len({picture.category for picture in objects}) == 30
    assert set(Counter(picture.ink for picture in objects).values()) == {3}
    assert set(Counter(picture.copies for picture in objects).values()) == {7, 8}
    for picture in drawn:  # no two colours that should differ are the same
        assert picture.ink not in (picture.ground, picture.surround)
        if picture.group == OBJECT:
            assert picture.ground == picture.surround
        else:
            assert (picture.ground == "white") == (picture.group == OCR)
            assert picture.group == OCR or picture.ground != picture.surround
    plain = replace(objects[0], ink=None, copies=1)  # in its own colours, the colour is not asked
    assert list(plain.asked) == [AXES[0], AXES[2]] and plain.asked[AXES[2]].answer == "one"


def test_a_seed_is_the_same_bytes_everywhere_whatever_number_is_asked_for():
    drawn, other = (b"".join(p.image.tobytes() for p in patchbench.pictures(14, seed)) for seed in (0, 1))
    assert drawn != other
    pinned = "a10faee90123f6f4c4b21fb5d47c858dd2aba251f9d59b5c6c4311927ef5fb15"
    assert hashlib.sha256(drawn).hexdigest() == pinned, "committed numbers were measured on other pictures"
    few, many = patchbench.pictures(7, 3), patchbench.pictures(50, 3)
    assert many[:7] == few  # whatever number is asked for; and content hangs on no grid
    for small, large in zip(few, patchbench.pictures(7, 3, side=336), strict=True):
        assert small.asked == large.asked and small.surround == large.surround


def test_twins_differ_only_in_the_background_of_their_patch():
    pairs = patchbench.twins(patchbench.pictures(70))
    assert len(pairs) == 20
    for plain, coloured in pairs:
        assert (plain.group, coloured.group) == (OCR, OCR_BACKGROUND)
        assert replace(coloured, id=plain.id, group=OCR, ground="white") == plain
        changed = differing(plain, coloured)
        assert changed.any()
        ink_only = plain.stamp.getchannel("A").point(lambda a: 255 * (a == 255))
        solid = np.asarray(ink_only) > 0
        assert not changed[plain.box[1] : plain.box[3], plain.box[0] : plain.box[2]][solid].any()


def test_probes_differ_only_where_they_say():
    for picture in [p for p in patchbench.pictures(70) if p.group != OBJECT]:
        x0, y0, x1, y1 = picture.box
        outside = np.ones((picture.side, picture.side), bool)
        outside[y0:y1, x0:x1] = False
        alpha = np.asarray(picture.stamp.getchannel("A"))
        changed = {name: differing(picture, probe) for name, probe in patchbench.probes(picture).items()}
        assert changed[SURROUND][outside].all() and not changed[SURROUND][~outside].any()
        for name, still in ((INK, alpha == 0), (GROUND, alpha == 255)):
            assert changed[name].any() and not changed[name][outside].any()
            assert not changed[name][y0:y1, x0:x1][still].any()
        assert patchbench.probes(picture)[INK].ink not in (picture.ink, picture.ground, picture.surround)


def test_load_gives_the_pictures_with_their_boxes_and_questions():
    drawn = patchbench.pictures(14, 2, side=336)
    for sample, picture in zip(samples.load("patchbench", n=14, seed=2, side=336, patch=14), drawn, strict=True):
        assert np.array_equal(np.asarray(sample.image), pixels(picture))
        assert (sample.id, sample.questions) == (picture.id, tuple(picture.asked.values()))
        assert sample.labels == (() if picture.text else (CATEGORIES[picture.category].name,))
        for entry in sample.annotations:
            x, y, w, h = entry["bbox"]
            assert picture.box[0] <= x and picture.box[1] <= y and x + w <= picture.box[2] and y + h <= picture.box[3]
            inside = pixels(picture)[int(y) : int(y + h), int(x) : int(x + w)]
            assert (inside != COLOURS[picture.surround]).any()


def test_only_the_expected_answer_or_its_synonym_is_right_and_others_follow_what_they_name():
    drawn = patchbench.pictures(70)
    for picture in drawn:
        for question in picture.asked.values():
            assert patchbench.correct(question, question.answer)
            assert patchbench.correct(question, f" {question.answer.upper()}. ")
            assert not patchbench.correct(question, f"not {question.answer}")
            assert not patchbench.correct(question, "")
    asked = [question for picture in drawn for question in picture.asked.values()]
    answers = {question.answer for question in asked if question.kind not in ("character", "word")}
    assert len({patchbench.canonical(answer) for answer in answers}) == len(answers)  # synonyms join no two answers
    for picture in drawn:
        for colour in COLOURS:
            wanted = patchbench.OTHER
            for part, name in ((GROUND, picture.ground), (SURROUND, picture.surround), (INK, picture.ink)):
                wanted = part if colour == name else wanted  # the later wins
            assert patchbench.follows(picture, f"{colour}.") == wanted
        assert patchbench.follows(picture, "dog") == patchbench.NO_COLOUR


class Pieces:
    """A tokenizer that knows the given words, and splits all others into a bare space and letters, as LLaMA's does."""

    def __init__(self, *known: str) -> None:
        self.known = known

    def __call__(self, text: str, add_special_tokens: bool) -> dict:
        word = text.strip()
        return {"input_ids": [f"▁{word}"] if word in self.known else ["▁", *word]}

    def convert_ids_to_tokens(self, ids: list[str]) -> list[str]:
        return ids


def test_pieces_do_not_count_a_bare_space_and_strings_are_split_by_them():
    tokenizer = Pieces("FU", "TY")
    assert len(patchbench.strings(tokenizer, 1)["one piece"]) == 26
    split = patchbench.strings(tokenizer, 2)
    assert split["one piece"] == ("FU", "TY") and len(split["several pieces"]) == 26**2 - 2
