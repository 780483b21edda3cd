"""Scenes in words, for the language model's own training."""

from __future__ import annotations

import random

from embedlens.samples.miniworld import language
from embedlens.samples.miniworld.scene import Scene, region


def document(scene: Scene, rng: random.Random) -> str:
    """All about a scene in words: what a language model reads in place of the picture.

    Each thing has its own clause with colour, place and box; words are given joined and spelled.
    """
    clauses = []
    for thing in scene.things:
        what = (
            f'the {thing.colour} text "{thing.text}" {language.described(thing).split(" ", 1)[1]}'
            if thing.category is None
            else language.article(language.described(thing))
        )
        clause = f"{what} {language.at(region(thing, scene))}"
        clauses.append(f"{clause} {language.box_text(language.padded_box(thing, scene))}")
    rng.shuffle(clauses)
    return ", ".join([*clauses, language.ground_phrase(scene)] if rng.random() < 0.5 else clauses) + "."
