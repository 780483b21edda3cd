"""Asking a model in the words of its family: what stands beside a question, the unit of boxes, room for the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from embedlens.families.instructions import instructions_of
from embedlens.families.plain import OWN
from embedlens.patches import Box, Frame
from embedlens.pictures import natural_side
from embedlens.samples import Question
from embedlens.scoring import LETTERS, NAMES, NUMBERS, OPTIONS, YES_NO, Item, box_of, in_original

if TYPE_CHECKING:
    from embedlens.vlm import VisionLanguageModel

ANSWER_TOKENS = 12  # at least: a short sentence


def instructed(model: VisionLanguageModel, question: Question) -> Question:
    """A question with what the model's family needs to answer it in a word, a letter or the numbers of a box."""
    how, text = instructions_of(model), question.text
    if question.kind == "box":
        described = text.removeprefix("Give the box of ").rstrip(".")
        return replace(question, text=how.box.format(described)) if how.box else question
    if question.kind == "choice" and how.letter:
        return replace(question, text=re.sub(r" (?=[A-D]\. )", "\n", text) + how.letter)
    return replace(question, text=text + (how.yes_no if question.choices == YES_NO else how.short))


def in_words_of(model: VisionLanguageModel, items: Sequence[Item]) -> list[Item]:
    """Items as the model is asked: `instructed`, and boxes in the unit and frame in which its family writes them."""
    how, found = instructions_of(model), []
    for sample, question in items:
        if question.kind == "box" and how.unit != "fractions":
            size, way = (sample.width, sample.height), model.preprocessing
            side = natural_side(size, way)
            frame = Frame.stretch(*size) if way == OWN else Frame.of(way, *size, side=side)
            box = within(cast(Any, box_of(question.answer)), frame)
            read = (1000, 1000)
            if how.unit == "pixels":
                read = model.family.enough(model.hf, model.processor, size if way == OWN else (side, side))
            numbers = [round(part * edge) for part, edge in zip(box, 2 * read, strict=True)]
            question = replace(question, answer=f"[{', '.join(map(str, numbers))}]")
        found.append(Item(sample, instructed(model, question)))
    return found


def within(box: Box, frame: Frame) -> Box:
    """A box in fractions of the letterboxed square as fractions of what a frame shows of the picture."""
    across, down = frame.width, frame.height
    x0, y0, x1, y1 = in_original(box, across, down)
    left, top, right, bottom = frame.box
    xs = [min(1.0, max(0.0, (x * across - left) / (right - left))) for x in (x0, x1)]
    ys = [min(1.0, max(0.0, (y * down - top) / (bottom - top))) for y in (y0, y1)]
    return xs[0], ys[0], xs[1], ys[1]


def answer_tokens(model: VisionLanguageModel) -> int:
    """How many tokens an answer may take: the longest expected one as the model writes it, and two beside it."""
    how = instructions_of(model)
    box = {"fractions": "[0.88, 0.88, 0.88, 0.88]"}.get(how.unit, "[888, 888, 888, 888]")
    longest = max(NAMES, key=len)
    texts = {*YES_NO, *NUMBERS, *LETTERS, how.written.format(box, f"red {longest}")}.union(*OPTIONS.values())
    pieces = model.tokenizer(sorted(texts), add_special_tokens=False)["input_ids"]
    return max(ANSWER_TOKENS, 2 + max(map(len, pieces)))


def asked_with(model: VisionLanguageModel) -> dict[str, str | float]:
    """For the record: instructions, unit of boxes, tokens of an answer; nothing for a model of this repository."""
    how = instructions_of(model)
    return {**how.parameters, "answer_tokens": answer_tokens(model)} if how.short else {}
