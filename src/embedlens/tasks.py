"""Question sets on held-out pictures, the paper's four families of them, scoring of answers, and the controls.

The families have the formats of the benchmarks behind the paper's tables, on the miniature's world:

    general         existence, colour, count, relation, multiple choice (there: GQA, MME, MMStar, MMBench)
    ocr             read one character, a word, a word that training never shows (there: TextVQA, OCRBench, DocVQA)
    grounding       a referring expression → its box, right from an IoU of 0.5 on (there: three splits of RefCOCO(+))
    hallucination   POPE: present, or absent at random, popular, adversarial; F1 (there also HallusionBench)

>>> items = questions("count", n=8, seed=0)
>>> sorted(item.question.answer for item in items)
['four', 'four', 'one', 'one', 'three', 'three', 'two', 'two']
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import numpy as np

from embedlens.asking import ANSWER_TOKENS, answer_tokens, asked_with, in_words_of  # noqa: F401
from embedlens.batches import halving, in_batches
from embedlens.errors import EmbedLensError
from embedlens.prefix import Case, answers
from embedlens.samples import Question, Sample
from embedlens.samples.miniworld import first_index, language, of_scene, sprites
from embedlens.samples.miniworld import scene as scenes
from embedlens.samples.miniworld.scene import PATCH, Scene, Thing
from embedlens.scoring import LETTERS, NAMES, OPTIONS, YES_NO, Item, box_score, in_original, said_yes, score  # noqa: F401

if TYPE_CHECKING:
    import pandas as pd

    from embedlens.vlm import Prompt, VisionLanguageModel

POPULAR = 10  # so many most frequent categories are asked for in POPE's "popular"
CENSUS = 1000  # training pictures in which they are counted
FIRST = 950_000  # pictures of a seed that `questions` does not reach with its kinds
MOST_DRAWN = 50_000  # and how many of them there are
GUARD = 32  # questions at a time, of each family, that tell whether it can be asked here
MOST_GUARD = 128  # and in all
CHUNK = 8  # batches whose pictures are held at a time, so that questions of a length find each other

Quotas = dict[str, Counter[str]]  #: Kind → answer → how many questions are still wanted; the answer "" is any


@dataclass(frozen=True)
class Kind:
    """One kind of question: how it is asked, in which pictures, and which answers are asked for equally often."""

    ask: Callable[[Scene, random.Random], Question | None]
    answers: tuple[str, ...] = ()
    words: float = 0.4
    alone: bool = False


def _written(scene: Scene, rng: random.Random, kind: str, heldout: bool = False) -> Question | None:
    """What is written, if it is a character, or a word that training never shows or does."""
    question = language.ask_text(scene, rng)
    fits = question and question.kind == kind and scenes.is_heldout_word(question.answer) == heldout
    return question if fits else None


@cache
def popular_categories() -> tuple[str, ...]:
    """The categories that most training pictures show, most frequent first."""
    seen: Counter[str] = Counter()
    for index in range(CENSUS):
        seen.update({thing.name for thing in scenes.scene(scenes.rng_of("train", index), "train").objects})
    return tuple(sorted(seen, key=lambda name: (-seen[name], name))[:POPULAR])


def _pope(scene: Scene, rng: random.Random, absent: str) -> Question | None:
    """POPE asks for what is there and for what is not: any category, a frequent one, or one that keeps company with
    what is there (here: of the same group, as pictures are composed). None where no such category is absent."""
    present, answer = sorted({thing.name for thing in scene.objects}), "yes"
    pool = present
    if rng.random() >= 0.5:
        groups = {category.group for category in sprites.CATEGORIES if category.name in present}
        alike = tuple(category.name for category in sprites.CATEGORIES if category.group in groups)
        names = {"random": NAMES, "adversarial": alike}.get(absent) or popular_categories()
        pool, answer = [name for name in names if name not in present], "no"
    if not pool:
        return None
    text = f"Is there {language.article(rng.choice(pool))} in the picture?"
    return Question(text, answer, "hallucination", "existence", YES_NO)


KINDS: dict[str, Kind] = {
    "object": Kind(language.ask_object, NAMES),
    "colour": Kind(language.ask_colour, tuple(sprites.COLOURS)),
    "text_colour": Kind(language.ask_text_colour, tuple(sprites.COLOURS), words=1.0),
    "existence": Kind(language.ask_existence, YES_NO),
    "count": Kind(language.ask_count, language.NUMBERS[1:5]),
    "where": Kind(language.ask_where, OPTIONS["where"]),
    "relation": Kind(language.ask_relation, OPTIONS["relation"]),
    "box": Kind(language.ask_box),
    "character": Kind(partial(_written, kind="character"), tuple(sprites.LETTERS + sprites.DIGITS), words=1.0),
    "word": Kind(partial(_written, kind="word", heldout=True), words=1.0),
    "one_patch": Kind(language.ask_object, NAMES, alone=True),
    # a kind's place decides its pictures: new ones go to the end
    "presence": Kind(partial(language.ask_existence, family="general"), YES_NO),
    "choice": Kind(language.ask_choice, tuple(LETTERS)),
    "trained_word": Kind(partial(_written, kind="word"), words=1.0),
    "pope_random": Kind(partial(_pope, absent="random"), YES_NO),
    "pope_popular": Kind(partial(_pope, absent="popular"), YES_NO),
    "pope_adversarial": Kind(partial(_pope, absent="adversarial"), YES_NO),
}


@dataclass(frozen=True)
class Metric:
    """One number of a family: the share of right answers to some kinds, or their F1; questions are pooled."""

    name: str
    kinds: tuple[str, ...]
    f1: bool = False


_ACCURACIES: dict[str, tuple[str, ...]] = {"general": ("presence", "colour", "count", "relation", "choice")}
_ACCURACIES |= {"ocr": ("character", "trained_word", "word"), "grounding": ("box",)}
FAMILIES: Mapping[str, tuple[Metric, ...]] = {
    **{family: tuple(Metric(kind, (kind,)) for kind in kinds) for family, kinds in _ACCURACIES.items()},
    "hallucination": (Metric("POPE F1", ("pope_random", "pope_popular", "pope_adversarial"), f1=True),),
}


def alone_in_a_patch(rng: random.Random) -> Scene:
    """A square picture with one object, upright, within one cell of the 8 x 8 grid."""
    category, side = rng.randrange(len(sprites.CATEGORIES)), scenes.LONG_SIDE
    drawn = sprites.sprite(category, 0, False)
    w, h = (max(3, round(edge * (PATCH / max(drawn.size)))) for edge in drawn.size)
    x, y = (rng.randrange(side // PATCH) * PATCH + (PATCH - edge) // 2 for edge in (w, h))
    return Scene(side, side, scenes.background(rng), (Thing(category, None, (x, y, w, h)),))


def questions(kind: str, n: int = 200, seed: int = 0, scale: float = 1) -> list[Item]:
    """`n` held-out questions of one kind, one a picture, every possible answer equally often.

    Args:
        kind: one of KINDS. "word" asks for words of 2-4 letters that no training picture shows, "one_patch" for an
            object within one cell of the patch grid, "existence" is asked as in POPE (half random, half adversarial).
        seed: of the pictures; no seed gives pictures that training has seen or measured itself on.
        scale: 1 draws the longer side with 112 px, the miniature's own size; 3 suits models that read 336 px.
    """
    if kind not in KINDS:
        raise EmbedLensError(f"unknown kind of question {kind!r}: use one of {', '.join(KINDS)}")
    if n < 1:
        raise EmbedLensError(f"n is {n}: ask at least one question")
    asked, given, items = KINDS[kind], Counter[str](), list[Item]()
    quota = -(-n // max(1, len(asked.answers)))
    # kinds use different pictures of a seed, so that their errors are independent
    index = first_index(seed) + 50_000 * list(KINDS).index(kind)
    while len(items) < n:
        rng = scenes.rng_of("heldout", index)
        drawn = alone_in_a_patch(rng) if asked.alone else scenes.scene(rng, "heldout", words=asked.words)
        question = asked.ask(drawn, rng)
        if question and (not asked.answers or given[question.answer] < quota):
            given[question.answer] += 1
            items.append(Item(of_scene(drawn, index - first_index(0), scale), question))
        index += 1
    return items


def family_questions(family: str, n: int = 200, seed: int = 0, scale: float = 1) -> list[Item]:
    """`n` held-out questions of one family, one a picture, spread evenly over its kinds (`question.kind`, of KINDS).

    >>> [item.question.kind for item in family_questions("ocr", n=4)]
    ['character', 'character', 'trained_word', 'word']
    """
    return [
        Item(sample, replace(question, kind=kind, family=cast(language.Family, family)))
        for kind, count in _shares(family, n).items()
        for sample, question in questions(kind, count, seed, scale)
    ]


def questionnaires(n: int = 200, seed: int = 0, scale: float = 1) -> list[Item]:
    """`n` questions of each family, one of every family about each picture, so that arms share what a picture costs.

    Kinds of a family are asked equally often, and so are the possible answers of a kind. Every picture has something
    written on it, or the family "ocr" could not ask. `seed` and `scale` are those of `questions`. The order is picture
    by picture, the families in the order of `FAMILIES`: `n` pictures, 4 `n` questions.

    >>> items = questionnaires(n=16, seed=1)
    >>> len(items), len({item.sample.id for item in items})
    (64, 16)
    """
    wanted = {family: _quotas(family, n) for family in FAMILIES}
    items: list[Item] = []
    for index in range(first_index(seed) + FIRST, first_index(seed) + FIRST + MOST_DRAWN):
        rng = scenes.rng_of("heldout", index)
        drawn = scenes.scene(rng, "heldout", words=1.0)
        found = {family: _asked(drawn, quotas, rng) for family, quotas in wanted.items()}
        if not all(found.values()):
            continue  # a picture that not every family can use
        sample = of_scene(drawn, index - first_index(0), scale)
        for family, question in found.items():
            question = replace(cast("Question", question), family=cast(language.Family, family))
            wanted[family][question.kind][_slot(question)] -= 1
            items.append(Item(sample, question))
        if len(items) == n * len(FAMILIES):
            return items
    raise EmbedLensError(f"n is {n}: {MOST_DRAWN} pictures do not hold so many questions; ask fewer, of several seeds")


def _shares(family: str, n: int) -> dict[str, int]:
    """How many of `n` questions are of each kind."""
    if family not in FAMILIES:
        raise EmbedLensError(f"unknown family {family!r}: use one of {', '.join(FAMILIES)}")
    kinds = [kind for metric in FAMILIES[family] for kind in metric.kinds]
    if n < len(kinds):
        raise EmbedLensError(f"n is {n}: {family} has {len(kinds)} kinds of questions, ask at least one of each")
    return {kind: n // len(kinds) + (place < n % len(kinds)) for place, kind in enumerate(kinds)}


def _quotas(family: str, n: int) -> Quotas:
    quotas: Quotas = {}
    for kind, of_kind in _shares(family, n).items():
        answers = KINDS[kind].answers or ("",)
        share, rest = divmod(of_kind, len(answers))
        quotas[kind] = Counter({answer: share + (number < rest) for number, answer in enumerate(answers)})
    return quotas


def _slot(question: Question) -> str:
    return question.answer if KINDS[question.kind].answers else ""


def _asked(drawn: Scene, quotas: Quotas, rng: random.Random) -> Question | None:
    """A question that is still wanted, of the kind that lacks most; None if the picture allows none."""
    for kind in sorted(quotas, key=lambda kind: -sum(quotas[kind].values())):
        question = KINDS[kind].ask(drawn, rng) if sum(quotas[kind].values()) else None
        if question and quotas[kind][_slot(question := replace(question, kind=kind))] > 0:
            return question
    return None


_ABLE: WeakKeyDictionary[VisionLanguageModel, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()


def able(model: VisionLanguageModel, items: Sequence[Item], ask: bool = True) -> dict[str, list[Item]]:
    """The guard before a sweep: families that are not testable here, with the few questions that showed it.

    Questions of each family are asked about their own pictures and about others', GUARD at a time, until answers are
    more often right about their own (sign test, 1 % at each of four looks). Families with no more than GUARD questions
    are not asked beforehand. Without `ask`: what is known from an earlier sweep over the same.
    """
    known, few = _ABLE.setdefault(model, {}), dict[str, list[Item]]()
    for family in dict.fromkeys(item.question.family for item in items):
        own = [item for item in items if item.question.family == family]
        if len(own) > GUARD:
            spread = sorted(range(len(own)), key=lambda place: place * 0.618034 % 1)  # evenly, however many are asked
            few[family] = [own[place] for place in spread[:MOST_GUARD]]
    keys = {family: tuple((item.sample.id, item.question) for item in own) for family, own in few.items()}
    if ask:
        found = _beat_another_picture(model, {family: few[family] for family in few if keys[family] not in known})
        known |= {keys[family]: better for family, better in found.items()}
    return {family: own for family, own in few.items() if not known.get(keys[family], True)}


def _beat_another_picture(model: VisionLanguageModel, few: Mapping[str, Sequence[Item]]) -> dict[str, bool]:
    """Of each family; what all of them ask in a look is asked together, as many ask about the same pictures."""
    from scipy.stats import binomtest  # takes a second to import

    right = {family: np.zeros((2, 0)) for family in few}  # about the own picture, about another
    found = dict.fromkeys(few, False)
    for start in range(0, MOST_GUARD, GUARD):
        looks = [family for family, own in few.items() if not found[family] and start < len(own) - 1]
        parts = [in_words_of(model, few[family][start : start + GUARD]) for family in looks]
        looked = [[part, _swapped(part)] for part in parts]
        texts = iter(_answered(model, [item for both in looked for part in both for item in part]))
        for family, both in zip(looks, looked, strict=True):
            scores = [[score(item.question, next(texts)) for item in part] for part in both]
            right[family] = own, other = np.hstack([right[family], scores])
            better, worse = int((own > other).sum()), int((own < other).sum())
            sure = better > worse and binomtest(better, better + worse, alternative="greater").pvalue < 0.01
            found[family] = bool(sure)
    for family in (family for family in few if not found[family]):
        (own, other), asked = right[family].sum(1), right[family].shape[1]
        what = f"{own:.0f} of {asked} questions of {family!r} rightly, and {other:.0f} about another picture"
        rest = f"{family} is not testable here, so only these are asked under every arm"
        warnings.warn(f"{model.name} answers {what}: {rest}", stacklevel=3)
    return found


def _swapped(items: Sequence[Item]) -> list[Item]:
    """The same questions, about the pictures of items half the way round."""
    return [Item(items[(i + len(items) // 2) % len(items)].sample, item.question) for i, item in enumerate(items)]


def evaluate(
    model: VisionLanguageModel, items: Sequence[Item], swap: bool = False, batch_size: int = 32
) -> pd.DataFrame:
    """Ask every question, in the words of the model's family; one row each: id (of the picture shown), question,
    answer, prediction, correct (1.0 or 0.0). `swap`, the control, asks about the picture of another item."""
    import pandas as pd

    if not items:
        raise EmbedLensError("no questions to ask: pass at least one item")
    if swap and len(items) < 2:
        raise EmbedLensError("swapping pictures needs at least two items")
    items = in_words_of(model, items)
    items = _swapped(items) if swap else items
    columns = ["id", "question", "answer", "prediction", "correct"]
    rows = (
        (item.sample.id, item.question.text, item.question.answer, text, score(item.question, text))
        for item, text in zip(items, _answered(model, items, batch_size), strict=True)
    )
    return pd.DataFrame(rows, columns=columns)


def _answered(model: VisionLanguageModel, items: Sequence[Item], batch_size: int = 32) -> list[str]:
    """Answers to questions as they are worded; those on a picture share what it costs."""
    found, most = dict[int, str](), answer_tokens(model)

    def texts(own: dict[int, Item], size: int) -> list[str]:
        asked = prompts_about(model, own, size)
        return answers(model, [Case(asked[place], kind=item.question.kind) for place, item in own.items()], most, size)

    for places in by_picture(items, CHUNK * batch_size):
        said, batch_size = halving(partial(texts, {place: items[place] for place in places}), batch_size)
        found |= dict(zip(places, said, strict=True))
    return [found[place] for place in range(len(items))]


def by_picture(items: Sequence[Item], most: int) -> Iterator[list[int]]:
    """Places of questions, all of a picture together, up to `most` where a picture does not have more."""
    of_picture: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        known = items[of_picture.setdefault(item.sample.id, [place])[0]].sample
        if known is not item.sample and replace(known, questions=()) != replace(item.sample, questions=()):
            raise EmbedLensError(f"two pictures have the id {item.sample.id}: give each its own, masks are drawn by it")
        of_picture[item.sample.id].append(place)
    chunk: list[int] = []
    for _, *places in of_picture.values():
        if chunk and len(chunk) + len(places) > most:
            yield chunk
            chunk = []
        chunk += places
    yield chunk


def prompts_about(model: VisionLanguageModel, items: Mapping[int, Item], batch_size: int) -> dict[int, Prompt]:
    """A prompt per question; each picture goes through the vision tower once."""
    leading: dict[int, int] = {}
    for place, item in items.items():
        leading.setdefault(item.sample.id, place)

    def run(_: int, places: Sequence[int]) -> Iterable[tuple[int, Prompt]]:
        asked = [items[place] for place in places]
        found = model.prompts([_picture(item.sample) for item in asked], [item.question.text for item in asked])
        return zip(places, found, strict=True)

    first = dict(in_batches(run, list(leading.values()), batch_size))
    return {
        place: first[place] if place in first else model.asked(first[leading[item.sample.id]], item.question.text)
        for place, item in items.items()
    }


def _picture(sample: Sample) -> Any:
    """The picture, without leaving it on the sample: a long list of samples would fill up with decoded pictures."""
    return sample.image if "image" in vars(sample) else replace(sample).image


def metric_parts(table: pd.DataFrame, family: str, metric: Metric, correct: str) -> tuple[pd.Series, Any, Any]:
    """Of the answers that a metric counts the picture's id, and what each adds to its numerator and denominator."""
    rows = table[(table["family"] == family) & table["kind"].isin(metric.kinds)]
    if rows.empty:
        kinds = " or ".join(metric.kinds)
        raise EmbedLensError(f"no answer of {family} is to {kinds}: ask family_questions({family!r})")
    if not metric.f1:
        return rows["id"], rows[correct].to_numpy(float), np.ones(len(rows))
    asked = rows["question"] if "question" in rows else [""] * len(rows)
    said = np.array([said_yes(*both) for both in zip(rows["prediction"], asked, strict=True)])
    yes = (rows["answer"] == "yes").to_numpy()
    return rows["id"], 2.0 * (yes & said), yes + said * 1.0
