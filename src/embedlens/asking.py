"""Asking a model in the words of its family: what stands beside a question, the unit of boxes, room for the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from embedlens.families.instructions import instructions_of
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
            size, box = (1000, 1000), cast(Any, box_of(question.answer))
            width, height = sample.width, sample.height
            if model.preprocessing == "letterbox":
                width = height = max(width, height)
            else:
                box = in_original(box, width, height)
            if how.unit == "pixels":
                size = model.family.enough(model.hf, model.processor, (width, height))
            numbers = [round(part * side) for part, side in zip(box, 2 * size, strict=True)]
            question = replace(question, answer=f"[{', '.join(map(str, numbers))}]")
        found.append(Item(sample, instructed(model, question)))
    return found


def answer_tokens(model: VisionLanguageModel) -> int:
    """How many tokens an answer may take: the longest expected one as the model writes it, and two beside it."""
    how = instructions_of(model)
    box = {"fractions": "[0.88, 0.88, 0.88, 0.88]"}.get(how.unit, "[888, 888, 888, 888]")
    longest = max(NAMES, key=len)
    texts = {*YES_NO, *NUMBERS, *LETTERS, how.written.format(box, f"red {longest}")}.union(*OPTIONS.values())
    pieces = model.tokenizer(sorted(texts), add_special_tokens=False)["input_ids"]
    return max(ANSWER_TOKENS, 2 + max(map(len, pieces)))


def asked_with(model: VisionLanguageModel) -> dict[str, str | float]:
    """For the record of a chapter that asks questions: instructions, unit of boxes, tokens of an answer.

    Nothing for a model of this repository, which is asked the questions as they stand.
    """
    how = instructions_of(model)
    return {**how.parameters, "answer_tokens": answer_tokens(model)} if how.short else {}
