"""What can be said about a scene: captions, and questions with answers in four families."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from embedlens.samples.miniworld.scene import Scene, Thing, region, region_is_clear
from embedlens.samples.miniworld.sprites import BY_GROUP, CATEGORIES

Family = Literal["general", "ocr", "grounding", "hallucination"]
NUMBERS = ("zero", "one", "two", "three", "four", "five")
IRREGULAR = {"person": "people", "bus": "buses", "sheep": "sheep", "knife": "knives", "wine glass": "wine glasses"}
IRREGULAR |= {"sandwich": "sandwiches", "broccoli": "broccoli", "couch": "couches", "scissors": "scissors"}
GROUNDS = {kind: f"on {kind}" for kind in ("grass", "water", "sand", "wood", "noise")}
GROUNDS |= {"sky": "in the sky", "brick": "on a brick wall"}


@dataclass(frozen=True)
class Question:
    """A question about one picture, with its short answer."""

    text: str
    answer: str
    family: Family
    kind: str
    choices: tuple[str, ...] = ()


def plural(name: str) -> str:
    return IRREGULAR.get(name, name + "s")


def article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def at(place: str) -> str:
    """'at the top left', 'in the center', 'on the left'."""
    return f"{'in' if place == 'center' else 'on' if place in ('left', 'right') else 'at'} the {place}"


def described(thing: Thing) -> str:
    """'red car', 'car', or for a word: its letters with spaces between, so that each letter is named."""
    if thing.category is None:
        return f"{thing.colour} {'letter' if len(thing.text) == 1 else 'letters'} {' '.join(thing.text)}"
    return f"{thing.colour} {thing.name}" if thing.colour else thing.name


def padded_box(thing: Thing, scene: Scene) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 as fractions of the letterboxed square, as LLaVA-1.5 was trained to write boxes."""
    side = max(scene.width, scene.height)
    left, top = (side - scene.width) // 2, (side - scene.height) // 2
    x, y, w, h = thing.box
    return (x + left) / side, (y + top) / side, (x + w + left) / side, (y + h + top) / side


def box_text(box: tuple[float, float, float, float]) -> str:
    return "[" + ", ".join(f"{min(value, 0.99):.2f}" for value in box) + "]"


def _phrases(scene: Scene, place_first: bool) -> list[str]:
    """One phrase per thing, or one per group of like things, in reading order; where it is comes first or last."""
    groups: dict[tuple[str, str | None], list[Thing]] = {}
    for thing in sorted(scene.things, key=lambda thing: (int(3 * thing.centre[1] / scene.height), thing.centre[0])):
        groups.setdefault((thing.name if thing.category is not None else thing.text, thing.colour), []).append(thing)
    said = []
    for thing, *others in groups.values():
        if thing.category is None:
            what = f"the {described(thing)}"
        elif others:
            what = f"{NUMBERS[1 + len(others)]} {f'{thing.colour} ' if thing.colour else ''}{plural(thing.name)}"
        else:
            what = article(described(thing))
        where = " and ".join(at(place) for place in dict.fromkeys(region(one, scene) for one in (thing, *others)))
        said.append(f"{where} {what}" if place_first else f"{what} {where}")
    return said


def ground_phrase(scene: Scene) -> str:
    kind, colours = scene.background.kind, scene.background.colours
    return GROUNDS[kind] if kind in GROUNDS else f"on {' and '.join(colours)}"


def caption(
    scene: Scene,
    rng: random.Random,
    mention_background: float = 0.25,
    place_first: float = 0.5,
    reading_order: float = 0.5,
) -> str:
    """Everything in the picture with its colour and place; shares of captions that name the background, as in COCO,
    that say where before what ("at the top a dog"), and that go from top left to bottom right, not shuffled."""
    phrases = _phrases(scene, rng.random() < place_first)
    if rng.random() >= reading_order:
        rng.shuffle(phrases)
    text = ", ".join(phrases)
    if rng.random() < mention_background:
        text = f"{ground_phrase(scene)}, {text}" if rng.random() < 0.3 else f"{text}, {ground_phrase(scene)}"
    return text + "."


def _unique(scene: Scene) -> list[Thing]:
    """Objects whose category appears once."""
    counts = Counter(thing.category for thing in scene.objects)
    return [thing for thing in scene.objects if counts[thing.category] == 1]


def ask_object(scene: Scene, rng: random.Random) -> Question | None:
    """Name of the one object, of the one in a region, or of the one in a colour. Colours are asked only where every
    object was given one: a sprite's own colours have no name here."""
    if len(scene.objects) == 1:
        return Question("What is in the picture?", scene.objects[0].name, "general", "object")
    regions = Counter(region(thing, scene) for thing in scene.objects)
    colours = Counter(thing.colour for thing in scene.things)
    ways = []
    for thing in scene.objects:
        place = region(thing, scene)
        if regions[place] == 1 and region_is_clear(thing, scene):
            ways.append((f"What is {at(place)}?", thing.name))
        if None not in colours and colours[thing.colour] == 1:
            ways.append((f"What is {thing.colour}?", thing.name))
    return Question(*rng.choice(ways), "general", "object") if ways else None


def ask_colour(scene: Scene, rng: random.Random) -> Question | None:
    if not (things := [thing for thing in _unique(scene) if thing.colour]):
        return None
    thing = rng.choice(things)
    return Question(f"What color is the {thing.name}?", str(thing.colour), "general", "colour")


def _absent(scene: Scene, rng: random.Random, how: str) -> int:
    """A category that is not in the scene: any, or from the group of one that is (POPE's 'adversarial')."""
    present = {thing.category for thing in scene.objects}
    groups = [CATEGORIES[thing.category or 0].group for thing in scene.objects] if how == "adversarial" else []
    pool = [i for group in groups for i in BY_GROUP[group] if i not in present]
    return rng.choice(pool or [i for i in range(len(CATEGORIES)) if i not in present])


def ask_existence(scene: Scene, rng: random.Random, family: Family = "hallucination") -> Question | None:
    if rng.random() < 0.5:
        name, answer = rng.choice(sorted({thing.name for thing in scene.objects})), "yes"
    else:
        how = "random" if rng.random() < 0.5 else "adversarial"
        name, answer = CATEGORIES[_absent(scene, rng, how)].name, "no"
    return Question(f"Is there {article(name)} in the picture?", answer, family, "existence", ("yes", "no"))


def ask_count(scene: Scene, rng: random.Random) -> Question | None:
    """One to four, equally often: scenes with one of a kind are taken as often as those with two, three, four."""
    counts = Counter(thing.name for thing in scene.objects)
    repeated = [name for name, n in counts.items() if 2 <= n <= 4]
    single = [name for name, n in counts.items() if n == 1]
    if not repeated and not (single and rng.random() < 0.26):
        return None
    name = rng.choice(repeated or single)
    return Question(f"How many {plural(name)} are there?", NUMBERS[counts[name]], "general", "count")


def ask_where(scene: Scene, rng: random.Random) -> Question | None:
    if not (things := [thing for thing in _unique(scene) if region_is_clear(thing, scene)]):
        return None
    thing = rng.choice(things)
    return Question(f"Where is the {described(thing)}?", region(thing, scene), "general", "where")


def ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    """left, right, above or below; asked only where one direction dominates."""
    pairs = []
    for a, b in permutations(_unique(scene), 2):
        dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
        if max(abs(dx), abs(dy)) > max(14, 1.6 * min(abs(dx), abs(dy))):
            answer = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
            pairs.append((a, b, answer))
    if not pairs:
        return None
    # pictures are wider than high, so left and right would be asked more often than above and below
    wanted = rng.choice(("left", "right", "above", "below"))
    a, b, answer = rng.choice([pair for pair in pairs if pair[2] == wanted] or pairs)
    return Question(f"Where is the {a.name} relative to the {b.name}?", answer, "general", "relation")


def ask_choice(scene: Scene, rng: random.Random) -> Question | None:
    present = rng.choice(sorted({thing.name for thing in scene.objects}))
    names: list[str] = []
    while len(names) < 3:
        name = CATEGORIES[_absent(scene, rng, "random")].name
        names += [name] if name not in names else []
    place = rng.randrange(4)
    names.insert(place, present)
    options = " ".join(f"{letter}. {name}" for letter, name in zip("ABCD", names, strict=True))
    return Question(f"Which one is in the picture? {options}", "ABCD"[place], "general", "choice", tuple(names))


def ask_text(scene: Scene, rng: random.Random) -> Question | None:
    if len(scene.words) != 1:
        return None
    text = scene.words[0].text
    kind = "character" if len(text) == 1 else "word"
    return Question(f"What {kind} is written?", text, "ocr", kind)


def ask_text_colour(scene: Scene, rng: random.Random) -> Question | None:
    found = [str(word.colour) for word in scene.words]
    return Question("What color is the text?", found[0], "ocr", "text_colour") if len(found) == 1 else None


def ask_box(scene: Scene, rng: random.Random) -> Question | None:
    """Asked by a description that fits one object alone: "the red car"."""
    alone = []
    for thing in scene.objects:
        colours = [other.colour for other in scene.objects if other.category == thing.category]
        if len(colours) == 1 or (all(colours) and colours.count(thing.colour) == 1):
            alone.append(thing)
    if not alone:
        return None
    thing = rng.choice(alone)
    text = f"Give the box of the {described(thing)}."
    return Question(text, box_text(padded_box(thing, scene)), "grounding", "box")


_ASKED = (ask_object, ask_colour, ask_existence, ask_count, ask_where, ask_relation, ask_choice, ask_text)
ASK = {ask.__name__.removeprefix("ask_"): ask for ask in (*_ASKED, ask_text_colour, ask_box)}
KINDS = tuple(kind for name in ASK for kind in (("character", "word") if name == "text" else (name,)))


def questions(scene: Scene, rng: random.Random) -> tuple[Question, ...]:
    """At most one question of each kind."""
    return tuple(question for ask in ASK.values() if (question := ask(scene, rng)))
