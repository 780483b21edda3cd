"""What an answer says: yes or no, a number, a letter, a name, what is written, a box; and whether it is right.

An answer that says two things, or denies one, is undecided, and what is undecided is wrong.

>>> asked = Question("Is there a dog in the picture?", "yes", "hallucination", "existence", ("yes", "no"))
>>> [said(asked, text) for text in ("Yes, there is a dog.", "There is no dog.", "no dog, yes a cat")]
['yes', 'no', None]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from embedlens.errors import EmbedLensError
from embedlens.patches import Box, Frame
from embedlens.samples import Question, Sample
from embedlens.samples.miniworld import language, sprites
from embedlens.samples.miniworld import scene as scenes
from embedlens.samples.patchbench import CANONICAL

FRAMES = ("padded", "original")
YES_NO = ("yes", "no")
LETTERS = "ABCD"
NAMES = tuple(category.name for category in sprites.CATEGORIES)
#: Kind of question → all its answers, where they are few.
OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("object", "one_patch"), NAMES),
    **dict.fromkeys(("colour", "text_colour"), tuple(sprites.COLOURS)),
    "where": tuple(place for row in scenes.REGIONS for place in row),
    "relation": ("left", "right", "above", "below"),
}
NUMBERS = (*language.NUMBERS, "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
ALIKE = {"centre": "center", "middle": "center", "over": "above", "on top of": "above", "under": "below"}
ALIKE |= {"beneath": "below", "underneath": "below"} | {f"upper {side}": f"top {side}" for side in ("left", "right")}
ALIKE |= {f"lower {side}": f"bottom {side}" for side in ("left", "right")}
ALIKE |= {f"{side} {other}": side for side in ("top", "bottom", "left", "right") for other in ("center", "middle")}
ALIKE |= {f"{other} {side}": side for side in ("top", "bottom", "left", "right") for other in ("center", "middle")}
_LEAD = re.compile(r"^(?:so,? )?(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?(?:: *| +)", re.IGNORECASE)
_DENIES = re.compile(r"\b(?:no|not|none|neither|nor|cannot|never|without|unsure|unclear)\b|n't\b")
_HEDGES = re.compile(r"\b(?:or|but|hardly)\b")
_VAGUE = re.compile(
    r"\b(?:than|least|most|about|around|approximately|roughly|nearly|almost|up to|maybe|perhaps|plus|half|or)\b"
    r"|\bover (?:\d+|[a-z]+)$|[+<>~%½]"
)
_LARGE = ("dozen", "hundred", "thousand", *(f"{ten}ty" for ten in "twen thir for fif six seven eigh nine".split()))
_NUMBER = r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*"
_BOX = re.compile(rf"[\[(]{_NUMBER},{_NUMBER}(?:,|[\])]\s*,?\s*[\[(]){_NUMBER},{_NUMBER}[\])]")


class Item(NamedTuple):
    """A question about a sample."""

    sample: Sample
    question: Question


def score(question: Question, prediction: str) -> float:
    """1 for the right answer, else 0: what is `said` is the answer; for a box an IoU of at least 0.5."""
    if question.kind == "box":
        predicted, wanted = box_of(prediction), box_of(question.answer)
        return float(predicted is not None and wanted is not None and iou(predicted, wanted) >= 0.5)
    return float((said(question, prediction) or "").lower() == question.answer.lower())


def said(question: Question, prediction: str) -> str | None:
    """The answer that a prediction gives to a question, in the words of its answers; None where it is undecided."""
    plain = " ".join(prediction.replace("*", "").replace("’", "'").split())
    wrapped = re.fullmatch(r"[\"'`“‘\[(]([^\"'`“”‘\[\]()]+)[\"'`”\])]\.?", plain)
    plain = wrapped[1].strip() if wrapped else plain
    if plain.rstrip(".").lower() == question.answer.lower():
        return question.answer
    if question.choices == YES_NO:
        return yes_or_no(plain, re.sub(r"^Is there an? | in the picture\?.*$", "", question.text, flags=re.DOTALL))
    if question.kind == "choice":
        return letter_of(plain, question.choices)
    if question.kind == "count":
        return number_of(plain)
    if question.kind in ("character", "word", "trained_word"):
        return written_in(plain)
    return one_of(plain, OPTIONS.get(question.kind, (question.answer,)))


def said_yes(prediction: str, question: str = "") -> bool:
    """Whether an answer is POPE's positive class."""
    return said(Question(question, "", "hallucination", "existence", YES_NO), prediction) == "yes"


def yes_or_no(text: str, name: str = "") -> str | None:
    """What an answer begins with, unless it goes on with the contrary; or a statement that there is, or is no, `name`.

    >>> [yes_or_no(text, "dog") for text in ("No.", "Yes, no doubt", "There is a dog.", "There is a hot dog.")]
    ['no', None, 'yes', None]
    """
    words = _LEAD.sub("", text).lower()
    thing = rf"{re.escape(name.lower())}s?(?=$|[.,;!]| (?:in|on|at)\b)"
    found = re.match(r"(yes|no)(?=$|[.,;:!]|\s+there\b|\s*[-–—]\s)", words)
    if found:
        rest = words[found.end() :]
        contrary = rf"\byes\b|(?:\b(?:is|are|shows?|see|has|have)|'s) (?:an?|one) {thing}" if name else r"\byes\b"
        against = _DENIES.search(rest) if found[1] == "yes" else re.search(contrary, rest)
        return None if against else found[1]
    if not name:
        return None
    stated = re.match(rf"there (?:is|are) (not |n't )?(no|an?|one|any) {thing}", words)
    stated = stated or re.match(rf"there (isn't|aren't) (an?|any) {thing}", words)
    if not stated or re.search(r"\byes\b|\bbut\b", words):
        return None
    rest = words[stated.end() :]
    if stated[1] or stated[2] == "no":
        return None if re.match(r" (?:on|at)\b", rest) else "no"  # none on the left may be one on the right
    return None if _DENIES.search(rest) else "yes"


def number_of(text: str) -> str | None:
    """The one number that is named, as a word up to twelve; None for several, and for "more than two".

    >>> [number_of(text) for text in ("2", "There are two dogs.", "no dogs", "two or three", "one, and one")]
    ['two', 'two', 'zero', None, None]
    """
    words = text.lower()
    tokens = re.findall(r"\d+(?:[.,/:]\d+)*\w*|[a-z']+", words)
    found = [token for token in tokens if token[0].isdigit() or token in NUMBERS or token in _LARGE]
    if not found:
        return NUMBERS[0] if re.match(r"(?:there (?:is|are) )?(?:no|none)\b", words) else None
    named = {NUMBERS[int(token)] if token.isdigit() and int(token) < len(NUMBERS) else token for token in found}
    unclear = _VAGUE.search(words) or re.search(r"\b(?:not|none|neither|no one)\b|n't\b", words)
    return None if unclear or len(named) > 1 or found.count("one") > 1 else named.pop()


def letter_of(text: str, options: Sequence[str]) -> str | None:
    """The letter that an answer begins with, or that of the one option it names; None where the two disagree.

    >>> [letter_of(text, ("cat", "dog")) for text in ("(B)", "B. dog", "b", "A dog", "B: cat", "A or B")]
    ['B', 'B', 'B', 'B', None, None]
    """
    letters = LETTERS[: len(options)]
    words = _LEAD.sub("", text)
    found = re.match(rf"\(?([{letters}{letters.lower()}])(?:[).:]+|$)\s*", words)
    rest = words[found.end() :] if found else words
    named = one_of(rest, options)
    if found is None:
        letter = None if named is None else letters[list(options).index(named)]
        return letter if set(re.findall(rf"\b[{letters[1:]}]\b", rest)) <= {letter} else None
    letter = found[1].upper()
    others = [option for option in options if option != options[letters.index(letter)]]
    # "A" may be an article behind its own letter, the other letters stand for themselves
    another = set(re.findall(rf"\b([{letters[1:]}])\b|\(([{letters}])\)|\b([{letters}])[).:]", rest))
    mixed = _named(rest, others) or {one for group in another for one in group if one} - {letter}
    return None if mixed or (rest and named is None) else letter


def one_of(text: str, options: Sequence[str]) -> str | None:
    """The one option that is named, in singular or plural or by a synonym; None for several, and where one is denied.

    Nor is anything named in numbers, as broken models mix them into words, or behind a yes, which answers another
    question.

    >>> [one_of(text, ("red", "blue")) for text in ("The car is red.", "red and blue", "not red", "Yes, red")]
    ['red', None, None, None]
    """
    named, words = _named(text, options), text.lower()
    doubtful = re.search(r"\d|^yes\b", words) or _DENIES.search(words) or _HEDGES.search(words)
    return named.pop() if len(named) == 1 and not doubtful else None


def _named(text: str, options: Sequence[str]) -> set[str]:
    """Options that are named; the longest first, so that a hot dog is no dog and the top left no left."""
    names: Mapping[str, str] = {other: name for other, name in (CANONICAL | ALIKE).items() if name in options}
    names = {**names, **{option: option for option in options}}
    known = sorted({*names, *NAMES} if set(options) <= set(NAMES) else names, key=len, reverse=True)
    words = text.lower().replace("-", " ")
    found = re.findall(rf"\b(?:{'|'.join(map(re.escape, known))})\b", words)
    return {names[name] for name in found if name in names}


def written_in(text: str) -> str | None:
    """What an answer says is written: the one thing in quotation marks, else the one word in capitals or digits.

    >>> [written_in(text) for text in ("The word is STOP.", "It says 'go'.", "A sign that says B", "A B", "a dog")]
    ['STOP', 'go', 'B', None, None]
    """
    quoted = re.findall(r"(?<!\w)[\"'“‘]([^\"'“”‘’]+)[\"'”’](?!\w)", text)
    capitals = re.findall(r"\b[A-Z0-9]+\b", re.sub(r"\bI'\w+|^A (?=[a-z])|^I (?=\w)", "", text))
    found = {part.strip(" .") for part in quoted or capitals}
    if len(found) != 1:
        return None
    (said,) = found
    return None if _DENIES.search(text.replace(said, "").lower()) else said  # what is written may be NO


def box_of(text: str) -> Box | None:
    """The first four numbers in brackets, in whatever unit: `[x, y, x, y]`, `(x, y), (x, y)`, in JSON or tags; or None.

    >>> box_of('{"bbox_2d": [10, 20, 30, 40]}'), box_of("<box>[[1, 2, 3, 4]]</box>"), box_of("[0.1, 0.2,")
    ((10.0, 20.0, 30.0, 40.0), (1.0, 2.0, 3.0, 4.0), None)
    """
    found = _BOX.search(text)
    if found is None:
        return None
    x0, y0, x1, y1 = map(float, found.groups())
    return x0, y0, x1, y1


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1.

    >>> round(iou((0, 0, 2, 2), (1, 0, 3, 2)), 3)
    0.333
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def in_original(box: Box, width: int, height: int) -> Box:
    """A box in fractions of the letterboxed square as fractions of the picture; reaches beyond it over the bars.

    >>> in_original((0.0, 0.125, 1.0, 0.875), 640, 480)
    (0.0, 0.0, 1.0, 1.0)
    """
    left, top, right, bottom = Frame.letterbox(width, height).box
    x0, x1 = ((left + x * (right - left)) / width for x in box[::2])
    y0, y1 = ((top + y * (bottom - top)) / height for y in box[1::2])
    return x0, y0, x1, y1


def box_score(item: Item, prediction: str, frame: str = "padded") -> float:
    """Acc@0.5 of one referring expression: 1 where the numbers that the model wrote overlap the box by an IoU of 0.5.

    LLaVA-1.5 and the miniature write fractions of the letterboxed square ("padded"). The harness behind the paper's
    CV-centric column reads them as fractions of the original picture ("original"), where a perfect answer can be wrong.
    Families that write thousandths or pixels write them of the original picture: there the two are one.

    >>> picture = Sample(0, 640, 480, (), (), (), {}, lambda: None)
    >>> item = Item(picture, Question("Give the box of the dog.", "[0.10, 0.20, 0.20, 0.30]", "grounding", "box"))
    >>> box_score(item, item.question.answer), box_score(item, item.question.answer, frame="original")
    (1.0, 0.0)
    """
    if frame not in FRAMES:
        raise EmbedLensError(f"unknown frame {frame!r}: use one of {', '.join(FRAMES)}")
    wanted, predicted = box_of(item.question.answer), box_of(prediction)
    if wanted is None:
        raise EmbedLensError(f"{item.question.text!r} asks for no box: score its answer with tasks.score")
    if frame == "original" and max(wanted) <= 1:
        wanted = in_original(wanted, item.sample.width, item.sample.height)
    return float(predicted is not None and iou(predicted, wanted) >= 0.5)
