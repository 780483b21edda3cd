"""Pictures whose whole content lies in one patch, for any model's grid (Sec. 7.1 and E of the paper).

The paper's 70 pictures are not published; these are drawn from a seed. Of every seven three show an object, two a short
string on a white patch, and the last two the same strings, in the same ink and surround, on a patch of another colour.

>>> [picture.group for picture in pictures(7)]
['object', 'object', 'object', 'OCR', 'OCR', 'OCR with background', 'OCR with background']
>>> shown = pictures(4, side=336, patch=14)[3]
>>> shown.ground, len(shown.asked), shown.image.size
('white', 3, (336, 336))
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from jaxtyping import Bool
from PIL import Image

from embedlens.errors import EmbedLensError
from embedlens.samples.miniworld import CATEGORY_NAMES, sprites
from embedlens.samples.miniworld.language import NUMBERS, Family, Question, plural
from embedlens.samples.miniworld.scene import letters
from embedlens.samples.miniworld.sprites import ASSETS, CATEGORIES, COLOURS, FONTS, LETTERS

if TYPE_CHECKING:
    from embedlens.samples import Sample

OBJECT, OCR, OCR_BACKGROUND = GROUPS = ("object", "OCR", "OCR with background")
PATTERN = (OBJECT, OBJECT, OBJECT, OCR, OCR, OCR_BACKGROUND, OCR_BACKGROUND)  # of every seven pictures
PAPER = 70  # pictures of the paper: 30, 20 and 20
AXES = ("recognition", "colour", "count")  # the three questions of a picture, in their order
COPIES = (1, 2, 3, 4)
LENGTHS = (1, 1, 2, 2, 3)  # characters of a string
SMALLEST = 8  # px; a letter in a smaller patch is no letter

#: What an answer about a colour follows, best first.
FOLLOWS = ("content", "patch background", "surround", "another colour", "no colour")
INK, GROUND, SURROUND, OTHER, NO_COLOUR = FOLLOWS
SYNONYMS = json.loads((ASSETS / "synonyms.json").read_text(encoding="utf-8"))
CANONICAL = {other: word for word, others in SYNONYMS.items() for other in others}
CANONICAL |= {str(number): word for number, word in enumerate(NUMBERS)}
CANONICAL |= {plural(category.name): category.name for category in CATEGORIES}

T = TypeVar("T")


@dataclass(frozen=True)
class OnePatch:
    """A square picture with all its content in one cell; equal values are equal pictures. `dataclasses.replace` gives a
    picture that differs in one thing: `replace(picture, ink="blue")`."""

    id: int
    group: str  #: One of GROUPS
    side: int  #: px of the picture
    patch: int  #: px of a cell; cells beyond the last whole one, at the right and at the foot, stay empty
    row: int
    col: int
    surround: str  #: Colour of everything outside the cell; names in `sprites.COLOURS`
    ground: str  #: Colour of the cell behind its content; that of the surround where the cell has none of its own
    ink: str | None  #: Colour of the object or text; None leaves an object its own, of which nothing is asked
    category: int | None = None  #: Index into CATEGORIES; None for a string
    copies: int = 1
    text: str = ""
    font: int = 0

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The cell: x0, y0, x1, y1 in px."""
        x, y = self.col * self.patch, self.row * self.patch
        return x, y, x + self.patch, y + self.patch

    @property
    def asked(self) -> dict[str, Question]:
        """Axis of AXES → question, in the words of the miniature world: what it is, in which colour, how many."""
        if self.category is None:
            kind, family = "character" if len(self.text) == 1 else "word", "ocr"
            found = [(f"What {kind} is written?", self.text, kind)]
            found += [("What color is the text?", str(self.ink), "text_colour")]
            found += [("How many characters are there?", NUMBERS[len(self.text)], "count")]
        else:
            name, family = CATEGORIES[self.category].name, "general"
            found = [("What is in the picture?", name, "object")]
            found += [(f"What color is the {name}?", str(self.ink), "colour")]
            found += [(f"How many {plural(name)} are there?", NUMBERS[self.copies], "count")]
        asked = (Question(text, answer, cast(Family, family), kind) for text, answer, kind in found)
        return {axis: one for axis, one in zip(AXES, asked, strict=True) if self.ink or axis != AXES[1]}

    @cached_property
    def stamp(self) -> Image.Image:
        """The content alone, RGBA, one cell large; clear where the background of the patch shows."""
        clear = Image.new("RGBA", (self.patch, self.patch), (0, 0, 0, 0))
        columns = 1 if self.category is None else ceil(sqrt(self.copies))
        slot = self.patch // columns
        if self.category is None:
            mask = _fitted(sprites.word(self.text, self.font), self.patch - 2)
            drawn = Image.new("RGBA", mask.size, (*COLOURS[str(self.ink)], 255))
            drawn.putalpha(mask)
        else:
            drawn = _fitted(sprites.sprite(self.category, 0, False), slot - (columns > 1))
            if self.ink is not None:
                drawn = Image.fromarray(sprites.tinted(np.asarray(drawn), COLOURS[self.ink]), "RGBA")
        top = (self.patch - ceil(self.copies / columns) * slot) // 2
        for copy in range(self.copies):
            row, col = divmod(copy, columns)
            clear.paste(drawn, (col * slot + (slot - drawn.width) // 2, top + row * slot + (slot - drawn.height) // 2))
        return clear

    @property
    def image(self) -> Image.Image:
        """The picture, RGB."""
        canvas = Image.new("RGB", (self.side, self.side), COLOURS[self.surround])
        canvas.paste(COLOURS[self.ground], self.box)
        canvas.paste(self.stamp, self.box[:2], self.stamp)
        return canvas

    @property
    def covered(self) -> Bool[np.ndarray, "patch patch"]:
        """Which pixels of the cell the content covers, at least by half."""
        return np.asarray(self.stamp.getchannel("A")) > 127

    def sample(self) -> Sample:
        """The picture as a sample. A string is no COCO object, so its annotations are empty."""
        from embedlens.samples import Sample

        entries: list[dict[str, Any]] = []
        if self.category is not None:
            solid = self.stamp.getchannel("A").point(lambda alpha: 255 * (alpha > 127))
            left, top, right, bottom = solid.getbbox() or (0, 0, 0, 0)
            bbox = [float(side) for side in (self.box[0] + left, self.box[1] + top, right - left, bottom - top)]
            of = {"id": self.id * 100, "image_id": self.id, "category_id": CATEGORIES[self.category].id, "iscrowd": 0}
            entries.append(of | {"bbox": bbox, "area": float(self.covered.sum()), "colour": self.ink})
        shown = self.side, self.side, tuple(entries), (), tuple(self.asked.values()), CATEGORY_NAMES
        return Sample(self.id, *shown, draw=lambda: self.image)


def pictures(n: int = PAPER, seed: int = 0, side: int = 112, patch: int = 14) -> list[OnePatch]:
    """The first `n` pictures of a seed, of `side` px, which the model reads without resampling, in cells of `patch` px;
    70 have the paper's 30, 20 and 20.

    Objects, colours, numbers and lengths come from shuffled decks, so that each comes equally often. A picture does
    not depend on how many are asked for; on another grid it has the same content in another cell. Every second string
    has a white surround, as the paper's text says, the others a coloured one, as its example has (A59).
    """
    if n < 1 or seed < 0:
        raise EmbedLensError(f"n is {n} and the seed {seed}: n is 1 or more, the seed 0 or more")
    if not SMALLEST <= patch <= side:
        what = f"a patch of {patch} px in a picture of {side} px: pass the model's own patch and image size"
        raise EmbedLensError(f"{what}, the patch at least {SMALLEST} px and no larger than the picture")
    return [_picture(index, seed, side, patch) for index in range(n)]


def _picture(index: int, seed: int, side: int, patch: int) -> OnePatch:
    week, day = divmod(index, len(PATTERN))
    group = PATTERN[day]
    if group == OCR_BACKGROUND:
        twin = _picture(index - 2, seed, side, patch)
        ground = _rng(seed, "ground", index).choice([c for c in COLOURS if c not in (twin.ink, "white", twin.surround)])
        return replace(twin, id=index, group=group, ground=ground)
    where = _rng(seed, "cell", index)
    at = index, group, side, patch, where.randrange(side // patch), where.randrange(side // patch)
    if group == OBJECT:
        i = 3 * week + day
        ink = _dealt(tuple(COLOURS), i, seed, "ink of objects")
        surround = _rng(seed, "surround", index).choice([c for c in COLOURS if c != ink])
        category = _dealt(tuple(range(len(CATEGORIES))), i, seed, "category")
        return OnePatch(*at, surround, surround, ink, category, _dealt(COPIES, i, seed, "copies"))
    i = 2 * week + day - 3
    ink = _dealt(tuple(c for c in COLOURS if c != "white"), i, seed, "ink of strings")
    others = [c for c in COLOURS if c not in (ink, "white")]
    surround = "white" if i % 2 == 0 else _rng(seed, "surround", index).choice(others)
    rng = _rng(seed, "text", index)
    text = letters(rng, "heldout", _dealt(LENGTHS, i, seed, "length"))
    return OnePatch(*at, surround, "white", ink, text=text, font=rng.randrange(len(FONTS)))


def twins(drawn: Sequence[OnePatch]) -> list[tuple[OnePatch, OnePatch]]:
    """(string on white, the same on another background) of all that are there, in order."""
    at = {picture.id: picture for picture in drawn}
    return [(at[p.id - 2], p) for p in drawn if p.group == OCR_BACKGROUND and p.id - 2 in at]


def probes(picture: OnePatch) -> dict[str, OnePatch]:
    """The three changes of Figure f, each alone: another ink, another patch background, another surround. The new
    colour is none that the picture shows, the same in all three, so that an answer tells what it followed."""
    if picture.category is not None:
        raise EmbedLensError("an object's patch has the colour of its surround: probe a picture with a string")
    shown = (picture.ink, picture.ground, picture.surround)
    new = _rng(picture.id, "probe", len(picture.text)).choice([c for c in COLOURS if c not in shown])
    other = {INK: replace(picture, ink=new), GROUND: replace(picture, ground=new)}
    return other | {SURROUND: replace(picture, surround=new)}


def bare(said: str) -> str:
    """An answer in lower case, without quotes, article and final stop."""
    words = re.sub(r"[\"'`]", "", said).strip().rstrip(".!").strip().lower()
    return re.sub(r"^(an|a|the) (?=.)", "", words)


def canonical(said: str) -> str:
    """`bare`, with a synonym or plural replaced by the book's word.

    >>> canonical("a sofa"), canonical("2"), canonical("wine glasses")
    ('couch', 'two', 'wine glass')
    """
    return CANONICAL.get(bare(said), bare(said))


def correct(question: Question, said: str) -> bool:
    """Whether an answer is the expected one or a synonym of it, and nothing else. What is written has no synonyms.

    >>> asked = pictures(1)[0].asked["count"]
    >>> correct(asked, asked.answer.upper()), correct(asked, f"{asked.answer} or five")
    (True, False)
    """
    alike = bare if question.kind in ("character", "word") else canonical
    return alike(said) == alike(question.answer)


def follows(picture: OnePatch, said: str) -> str:
    """Whose colour an answer names, one of FOLLOWS. Where patch and surround have one colour it is the surround's."""
    colour = canonical(said)
    of = {picture.ground: GROUND, picture.surround: SURROUND, picture.ink: INK}
    return of.get(colour, OTHER) if colour in COLOURS else NO_COLOUR


def strings(tokenizer: Any, length: int = 2) -> dict[str, tuple[str, ...]]:
    """All strings of 1 to 3 capitals that are one vocabulary entry at the start of a word, and all that are not. A
    piece that is a bare space is not counted: LLaMA's tokenizer splits "9" into a space and "9". Longer strings have
    more pieces, so reading by pieces compares only strings of one length."""
    if not 1 <= length <= 3:  # of four letters there are half a million
        raise EmbedLensError(f"the length is {length}: list strings of 1 to 3 letters")
    found: dict[str, list[str]] = {"one piece": [], "several pieces": []}
    for text in map("".join, product(LETTERS, repeat=length)):
        ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        pieces = [piece for piece in tokenizer.convert_ids_to_tokens(ids) if piece not in ("▁", "Ġ")]
        found["one piece" if len(pieces) == 1 else "several pieces"].append(text)
    return {name: tuple(texts) for name, texts in found.items()}


def _rng(seed: int, what: str, index: int) -> random.Random:
    return random.Random(f"patchbench/{seed}/{what}/{index}")


def _dealt(items: tuple[T, ...], index: int, seed: int, what: str) -> T:
    """The index-th card of shuffled decks laid one after another."""
    deck, at = divmod(index, len(items))
    return _rng(seed, what, deck).sample(items, len(items))[at]


def _fitted(drawn: Image.Image, side: int) -> Image.Image:
    """As large as fits into a square of `side` px, its proportions kept."""
    scale = side / max(drawn.size)
    width, height = (max(1, min(side, round(length * scale))) for length in drawn.size)
    return drawn.resize((width, height), Image.Resampling.BILINEAR)
