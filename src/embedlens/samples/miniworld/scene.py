"""What is where in a picture of the miniature world, from a seed. Layout only: nothing is drawn here."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from functools import partial
from math import exp, log
from typing import Literal

from embedlens.samples.miniworld import sprites
from embedlens.samples.miniworld.sprites import ANGLES, BY_GROUP, CATEGORIES, COLOURS, DIGITS, FONTS, LETTERS

Split = Literal["train", "heldout"]
LONG_SIDE = 112  # px at scale 1
PATCH = 14  # px: the smallest thing is at most one patch of the miniature
TINY = 0.18  # share of objects that fit one patch
NATURAL = 0.65  # share of objects in the sprite's own colours

LENGTHS = (0.4, 0.25, 0.2, 0.15)  # shares of words of one, two, three and four characters

SHAPES: tuple[tuple[int, int, float], ...] = (  # width, height at scale 1, share
    (112, 84, 0.25),  # 4:3
    (112, 75, 0.20),  # 3:2
    (112, 63, 0.08),  # 16:9
    (112, 112, 0.22),
    (84, 112, 0.12),
    (75, 112, 0.08),
    (63, 112, 0.05),
)
TEXTURES = ("grass", "sky", "water", "sand", "brick", "wood", "noise")

# A picture's companions come from the same group this often, so that "adversarial" questions
# (is there a dog? asked where there is a cat) have something to exploit, as in POPE.
SAME_GROUP = 0.35
HELDOUT_ONE_IN = 10


@dataclass(frozen=True)
class Thing:
    """An object or a word with its box (x, y, width, height) in px at scale 1, tight around what is drawn."""

    category: int | None  # index into CATEGORIES; None for a word
    colour: str | None  # None: the sprite's own colours
    box: tuple[float, float, float, float]
    angle: int = 0
    mirrored: bool = False
    text: str = ""
    font: int = 0

    @property
    def name(self) -> str:
        return CATEGORIES[self.category].name if self.category is not None else "word"

    @property
    def centre(self) -> tuple[float, float]:
        x, y, w, h = self.box
        return x + w / 2, y + h / 2


@dataclass(frozen=True)
class Background:
    kind: str  # flat, gradient or one of TEXTURES
    colours: tuple[str, ...]  # flat: 1, gradient: 2, texture: 0
    seed: int


@dataclass(frozen=True)
class Scene:
    width: int
    height: int
    background: Background
    things: tuple[Thing, ...]

    @property
    def objects(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.category is not None)

    @property
    def words(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.category is None)


def is_heldout_pair(category: int, colour: str) -> bool:
    """True for the (category, colour) pairs that no training picture shows: about one in ten, spread evenly."""
    return zlib.crc32(f"{CATEGORIES[category].name}/{colour}".encode()) % HELDOUT_ONE_IN == 0


def is_heldout_word(text: str) -> bool:
    """True for the words of 2-4 characters that no training picture or document shows: about one in ten."""
    return len(text) > 1 and zlib.crc32(f"word/{text}".encode()) % HELDOUT_ONE_IN == 0


def rng_of(split: Split, index: int) -> random.Random:
    """The only source of chance: split and index together, so that the two splits never share a stream."""
    return random.Random(f"miniworld/{split}/{index}")


def letters(rng: random.Random, split: Split, length: int) -> str:
    """A string to write. Half look like words (consonant-vowel), half are any letters; one character may be a digit.
    Training shows no held-out word; held-out pictures show one half the time."""
    if length == 1:
        return rng.choice(LETTERS + DIGITS)
    heldout = split == "heldout" and rng.random() < 0.5
    while True:
        if rng.random() < 0.5:
            start = rng.randrange(2)
            text = "".join(rng.choice("AEIOU" if (i + start) % 2 else "BCDFGHKLMNPRST") for i in range(length))
        else:
            text = "".join(rng.choice(LETTERS) for _ in range(length))
        if is_heldout_word(text) == heldout:
            return text


def _place(
    rng: random.Random, size: tuple[int, int], aspect: float, side: float, things: list[Thing]
) -> tuple[float, float, float, float] | None:
    """A box beside all things whose longer side is `side`; shrinks after failures, None if there is no room."""
    width, height = size
    for attempt in range(24):
        if attempt % 6 == 5:
            side *= 0.8
        w, h = (side, side / aspect) if aspect >= 1 else (side * aspect, side)
        w, h = max(3, round(w)), max(3, round(h))
        if w > width - 2 or h > height - 2:
            side *= 0.8
            continue
        x, y = rng.randint(1, width - w - 1), rng.randint(1, height - h - 1)
        boxes = (thing.box for thing in things)
        if all(x >= a + c + 1 or a >= x + w + 1 or y >= b + d + 1 or b >= y + h + 1 for a, b, c, d in boxes):
            return x, y, w, h
    return None


def _colour(rng: random.Random, split: Split, category: int, avoid: tuple[str, ...]) -> str | None:
    if rng.random() < NATURAL:
        return None
    while True:
        colour = rng.choice(tuple(COLOURS))
        if colour not in avoid and (split == "heldout" or not is_heldout_pair(category, colour)):
            return colour


def background(rng: random.Random, textured: float = 0.55) -> Background:
    seed = rng.getrandbits(30)
    if rng.random() < textured:
        return Background(rng.choice(TEXTURES), (), seed)
    first, second = rng.sample(tuple(COLOURS), 2)
    return Background("flat", (first,), seed) if rng.random() < 0.7 else Background("gradient", (first, second), seed)


def _categories(rng: random.Random, number: int) -> list[int]:
    """Distinct categories; each further one comes from the first one's group with the chance SAME_GROUP."""
    chosen = [rng.randrange(len(CATEGORIES))]
    while len(chosen) < number:
        pool = BY_GROUP[CATEGORIES[chosen[0]].group] if rng.random() < SAME_GROUP else range(len(CATEGORIES))
        candidate = rng.choice(pool)
        if candidate not in chosen:
            chosen.append(candidate)
    return chosen


def scene(
    rng: random.Random,
    split: Split,
    *,
    objects: tuple[int, int] = (1, 5),
    repeated: float = 0.45,
    words: float = 0.4,
    tiny: float = TINY,
    textured: float = 0.55,
    lengths: tuple[float, ...] = LENGTHS,
    writing: float = 1.0,
    square: bool = False,
) -> Scene:
    """Draw a layout. Held-out pictures may show held-out pairs and words, training pictures never do.

    Args:
        objects: fewest and most objects.
        repeated, words: how often one category appears two to four times, how often a word is written, too.
        tiny, textured: shares of objects that fit into one patch, of textured backgrounds.
        lengths: shares of words of one, two, three and four characters.
        writing: how much larger than usual words are written.
        square: 1:1 only.
    """
    if square:
        width = height = LONG_SIDE
    else:
        width, height, _ = rng.choices(SHAPES, [share for *_, share in SHAPES])[0]
    ground = background(rng, textured)
    fewest, most = objects
    copies = min(most, rng.randint(2, 4) if most >= 2 and rng.random() < repeated else 1)
    others = rng.choices(range(most - copies + 1), [1.0, 1.3, 0.9, 0.5, 0.25][: most - copies + 1])[0]
    others = max(others, fewest - copies)
    kinds = _categories(rng, 1 + others)
    crowd = copies + others
    largest = 0.6 * LONG_SIDE if crowd <= 2 else 44 if crowd <= 4 else 34

    things: list[Thing] = []
    avoid = ground.colours
    one_colour = rng.random() < 0.6
    shared = _colour(rng, split, kinds[0], avoid)
    if rng.random() < words:
        length = rng.choices((1, 2, 3, 4), lengths)[0]
        text, font = letters(rng, split, length), rng.randrange(len(FONTS))
        mask = sprites.word(text, font)
        height_px = writing * rng.uniform(10, 26 if length < 3 else 20)
        aspect = mask.width / mask.height
        box = _place(rng, (width, height), aspect, height_px * max(aspect, 1), things)
        if box is not None and box[3] >= 8:
            ink = rng.choice([c for c in COLOURS if c not in avoid])
            things.append(Thing(None, ink, box, text=text, font=font))
    for i, category in enumerate([kinds[0]] * copies + kinds[1:]):
        colour = shared if one_colour and i < copies else _colour(rng, split, category, avoid)
        angle, mirrored = rng.choice(ANGLES), rng.random() < 0.5
        stamp = sprites.sprite(category, angle, mirrored)
        side = rng.uniform(11, PATCH) if rng.random() < tiny else exp(rng.uniform(log(20), log(largest)))
        box = _place(rng, (width, height), stamp.width / stamp.height, side, things)
        if box is not None:
            things.append(Thing(category, colour, box, angle, mirrored))
    drawn = Scene(width, height, ground, tuple(things))
    if drawn.objects:
        return drawn
    again = partial(scene, objects=objects, repeated=repeated, tiny=tiny, textured=textured, square=square)
    return again(rng, split, words=0.0)  # no room beside the word: without it


REGIONS = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))


def region(thing: Thing, within: Scene) -> str:
    """Which ninth of the picture holds the centre of the thing."""
    x, y = thing.centre
    return REGIONS[min(2, int(3 * y / within.height))][min(2, int(3 * x / within.width))]


def region_is_clear(thing: Thing, within: Scene) -> bool:
    """True if the centre is at least 4 % of the side away from a border between ninths."""
    x, y = thing.centre
    shares = x / within.width, y / within.height
    return all(abs(share - border) >= 0.04 for share in shares for border in (1 / 3, 2 / 3))
