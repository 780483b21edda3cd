"""Question sets on held-out pictures, scoring of answers, and the controls beside them.

>>> items = questions("count", n=8, seed=0)
>>> sorted(item.question.answer for item in items)
['four', 'four', 'one', 'one', 'three', 'three', 'two', 'two']
>>> score(items[0].question, items[0].question.answer)
1.0
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from embedlens.errors import EmbedLensError
from embedlens.samples import Question, Sample
from embedlens.samples.miniworld import first_index, language, of_scene, sprites
from embedlens.samples.miniworld import scene as scenes
from embedlens.samples.miniworld.scene import PATCH, Scene, Thing

if TYPE_CHECKING:
    import pandas as pd

    from embedlens.vlm import VisionLanguageModel

ANSWER_TOKENS = 12  # the longest answer, a box, has ten


class Item(NamedTuple):
    """A question about a sample."""

    sample: Sample
    question: Question


@dataclass(frozen=True)
class Kind:
    """One kind of question: how it is asked, in which pictures, and which answers are asked for equally often."""

    ask: Callable[[Scene, random.Random], Question | None]
    answers: tuple[str, ...] = ()
    words: float = 0.4
    alone: bool = False


def _character(scene: Scene, rng: random.Random) -> Question | None:
    question = language.ask_text(scene, rng)
    return question if question and question.kind == "character" else None


def _heldout_word(scene: Scene, rng: random.Random) -> Question | None:
    question = language.ask_text(scene, rng)
    return question if question and scenes.is_heldout_word(question.answer) else None


NAMES = tuple(category.name for category in sprites.CATEGORIES)
KINDS: dict[str, Kind] = {
    "object": Kind(language.ask_object, NAMES),
    "colour": Kind(language.ask_colour, tuple(sprites.COLOURS)),
    "text_colour": Kind(language.ask_text_colour, tuple(sprites.COLOURS), words=1.0),
    "existence": Kind(language.ask_existence, ("yes", "no")),
    "count": Kind(language.ask_count, language.NUMBERS[1:5]),
    "where": Kind(language.ask_where, tuple(place for row in scenes.REGIONS for place in row)),
    "relation": Kind(language.ask_relation, ("left", "right", "above", "below")),
    "box": Kind(language.ask_box),
    "character": Kind(_character, tuple(sprites.LETTERS + sprites.DIGITS), words=1.0),
    "word": Kind(_heldout_word, words=1.0),
    "one_patch": Kind(language.ask_object, NAMES, alone=True),
}


def alone_in_a_patch(rng: random.Random) -> Scene:
    """A square picture with one object, upright, within one cell of the 8 x 8 grid."""
    category, colour = rng.randrange(len(sprites.CATEGORIES)), None
    drawn = sprites.sprite(category, 0, False)
    shrink = PATCH / max(drawn.size)
    w, h = (max(3, round(side * shrink)) for side in drawn.size)
    cells = scenes.LONG_SIDE // PATCH
    x, y = rng.randrange(cells) * PATCH + (PATCH - w) // 2, rng.randrange(cells) * PATCH + (PATCH - h) // 2
    return Scene(scenes.LONG_SIDE, scenes.LONG_SIDE, scenes.background(rng), (Thing(category, colour, (x, y, w, h)),))


def questions(kind: str, n: int = 200, seed: int = 0) -> list[Item]:
    """`n` held-out questions of one kind, one a picture, every possible answer equally often.

    Args:
        kind: one of KINDS. "word" asks for words of 2-4 letters that no training picture shows, "one_patch" for an
            object within one cell of the patch grid, "existence" is asked as in POPE (half random, half adversarial).
        n: how many questions.
        seed: of the pictures; no seed gives pictures that training has seen or measured itself on.

    Raises:
        EmbedLensError: unknown kind, or `n` below 1.
    """
    if kind not in KINDS:
        raise EmbedLensError(f"unknown kind of question {kind!r}: use one of {', '.join(KINDS)}")
    if n < 1:
        raise EmbedLensError(f"n is {n}: ask at least one question")
    asked = KINDS[kind]
    quota = -(-n // max(1, len(asked.answers)))
    given: Counter[str] = Counter()
    items: list[Item] = []
    # kinds use different pictures of a seed, so that their errors are independent
    index = first_index(seed) + 50_000 * list(KINDS).index(kind)
    while len(items) < n:
        rng = scenes.rng_of("heldout", index)
        drawn = alone_in_a_patch(rng) if asked.alone else scenes.scene(rng, "heldout", words=asked.words)
        question = asked.ask(drawn, rng)
        if question and (not asked.answers or given[question.answer] < quota):
            given[question.answer] += 1
            items.append(Item(of_scene(drawn, index - first_index(0)), question))
        index += 1
    return items


def box_of(text: str) -> tuple[float, float, float, float] | None:
    """The first four numbers in brackets, or None.

    >>> box_of("[0.10, 0.20, 0.30, 0.40]")
    (0.1, 0.2, 0.3, 0.4)
    """
    found = re.search(r"\[\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*\]", text)
    if found is None:
        return None
    x0, y0, x1, y1 = map(float, found.groups())
    return x0, y0, x1, y1


def iou(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1.

    >>> round(iou((0, 0, 2, 2), (1, 0, 3, 2)), 3)
    0.333
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def score(question: Question, prediction: str) -> float:
    """1 for the right answer, else 0: exact words (case and a final stop ignored), or IoU of at least 0.5 for a box."""
    if question.kind == "box":
        predicted, wanted = box_of(prediction), box_of(question.answer)
        return float(predicted is not None and wanted is not None and iou(predicted, wanted) >= 0.5)
    return float(prediction.strip().rstrip(".").lower() == question.answer.lower())


def evaluate(
    model: VisionLanguageModel, items: Sequence[Item], swap: bool = False, batch_size: int = 32
) -> pd.DataFrame:
    """Ask every question; one row each.

    Args:
        model: from `embedlens.load`.
        items: from `questions`.
        swap: control: ask about the picture of another item (the next but `len(items) // 2`), so that everything
            but the picture's content is the same.
        batch_size: questions answered together.

    Returns:
        columns id (of the picture shown), question, answer, prediction, correct (1.0 or 0.0).
    """
    import pandas as pd

    if not items:
        raise EmbedLensError("no questions to ask: pass at least one item")
    if swap and len(items) < 2:
        raise EmbedLensError("swapping pictures needs at least two items")
    shift = len(items) // 2 if swap else 0
    shown = [items[(i + shift) % len(items)].sample for i in range(len(items))]
    rows = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        pictures = [sample.image for sample in shown[start : start + batch_size]]
        prompts = model.prompts(pictures, [item.question.text for item in batch])
        predictions = model.answers(prompts, max_new_tokens=ANSWER_TOKENS, batch_size=batch_size)
        for item, sample, prediction in zip(batch, shown[start:], predictions, strict=False):
            rows.append(
                {
                    "id": sample.id,
                    "question": item.question.text,
                    "answer": item.question.answer,
                    "prediction": prediction,
                    "correct": score(item.question, prediction),
                }
            )
    return pd.DataFrame(rows)


def f1(answers: Sequence[str], predictions: Sequence[str]) -> float:
    """POPE's F1: "yes" is the positive class; 0 if nothing is rightly found.

    >>> f1(["yes", "no"], ["yes", "yes"])
    0.6666666666666666
    """
    positive = sum(answer == "yes" for answer in answers)
    said = sum(prediction == "yes" for prediction in predictions)
    both = sum(a == p == "yes" for a, p in zip(answers, predictions, strict=True))
    return 2 * both / (positive + said) if positive + said else 0.0
