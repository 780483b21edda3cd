"""One questionnaire a picture: a question of every family about it, so that arms share what a picture costs.

`tasks.family_questions` asks one question a picture. Where many arms are asked, most of the work is the picture, which
every question about it can share; so here each picture is asked once by every family. Questions about one picture are
not independent, which intervals over pictures allow for.

>>> items = questionnaires(n=15)
>>> len(items), len({item.sample.id for item in items})
(60, 15)
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import cast

from embedlens.errors import EmbedLensError
from embedlens.samples.miniworld import first_index, language, of_scene
from embedlens.samples.miniworld import scene as scenes
from embedlens.samples.miniworld.scene import Scene
from embedlens.tasks import FAMILIES, KINDS, Item

FIRST = 950_000  # pictures of a seed that `tasks.questions` does not reach with its kinds
MOST_DRAWN = 50_000  # and how many of them there are

Quotas = dict[str, Counter[str]]
"""Kind → answer → how many questions are still wanted; the answer "" stands for any."""


def questionnaires(n: int = 200, seed: int = 0, scale: float = 1) -> list[Item]:
    """`n` questions of each family, one of every family about each picture, `question.kind` a key of `tasks.KINDS`.

    Kinds of a family are asked equally often, and so are the possible answers of a kind. Every picture has something
    written on it, or the family "ocr" could not ask.

    Args:
        n: questions of each family.
        seed: of the pictures; no seed gives pictures that training has seen or measured itself on.
        scale: 1 draws the longer side with 112 px, the miniature's own size; 3 suits models that read 336 px.

    Returns:
        Picture by picture, the families in the order of `tasks.FAMILIES`: `n` pictures, 4 `n` questions.

    Raises:
        EmbedLensError: fewer questions than a family has kinds.
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
            question = replace(cast(language.Question, question), family=cast(language.Family, family))
            wanted[family][question.kind][_slot(question)] -= 1
            items.append(Item(sample, question))
        if len(items) == n * len(FAMILIES):
            return items
    raise EmbedLensError(
        f"n is {n}: {MOST_DRAWN} pictures do not hold so many questions; ask fewer, with several seeds"
    )


def _quotas(family: str, n: int) -> Quotas:
    kinds = [kind for metric in FAMILIES[family] for kind in metric.kinds]
    if n < len(kinds):
        raise EmbedLensError(f"n is {n}: {family} has {len(kinds)} kinds of questions, ask at least one of each")
    quotas: Quotas = {}
    for place, kind in enumerate(kinds):
        of_kind = n // len(kinds) + (place < n % len(kinds))
        answers = KINDS[kind].answers or ("",)
        share, rest = divmod(of_kind, len(answers))
        quotas[kind] = Counter({answer: share + (number < rest) for number, answer in enumerate(answers)})
    return quotas


def _slot(question: language.Question) -> str:
    return question.answer if KINDS[question.kind].answers else ""


def _asked(drawn: Scene, quotas: Quotas, rng: random.Random) -> language.Question | None:
    """A question that is still wanted, of the kind that lacks most; None if the picture allows none."""
    for kind in sorted(quotas, key=lambda kind: -sum(quotas[kind].values())):
        question = KINDS[kind].ask(drawn, rng) if sum(quotas[kind].values()) else None
        if question is None:
            continue
        question = replace(question, kind=kind)
        if quotas[kind][_slot(question)] > 0:
            return question
    return None
