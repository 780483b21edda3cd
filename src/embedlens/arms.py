"""Arms: ways to run the same questions. Which tokens of a picture an arm acts on, and what it does to them.

An arm is a name and a function of one picture, its token groups and a generator, that gives the interventions for it.
What is random about it is seeded by picture, arm and seed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.groups import TokenGroups
from embedlens.interventions import Intervention, Prune, SkipSublayers
from embedlens.patches import PatchGrid
from embedlens.samples import Sample
from embedlens.vlm import Prompt

SEEDS = 5  # repeats of a random control

Select: TypeAlias = Callable[[TokenGroups, PatchGrid, np.random.Generator], Tensor]
"""Visual tokens of a picture: its groups, its grid, the arm's generator for it → Bool[n]."""
Plan: TypeAlias = Sequence[Intervention] | Callable[[Prompt], Prompt]
"""Interventions, or a function that gives another prompt to ask instead: rows that are merged are no intervention."""
Act: TypeAlias = Callable[[Any, PatchGrid, np.random.Generator], Plan | None]
"""The plan for a picture, or None where there is nothing to do: it runs as the baseline then. The first argument is
what `run_arms` was given as `groups`."""


@dataclass(frozen=True)
class Arm:
    """One way to run all questions. Repeats of a random control share a name and differ in the seed."""

    name: str
    act: Act
    seed: int = 0


# --- which tokens ----------------------------------------------------------------------------------------------------


def members(groups: TokenGroups, grid: PatchGrid, rng: np.random.Generator, names: Sequence[str]) -> Bool[Tensor, " n"]:
    """The tokens of some groups, named as in `TokenGroups.named`."""
    unknown = [name for name in names if name not in groups.named]
    if unknown or not names:
        raise EmbedLensError(f"no group {', '.join(unknown) or 'is named'}: use {', '.join(groups.named)}")
    return torch.stack([groups.named[name] for name in names]).any(0)


def on_things(sample: Sample, grid: PatchGrid) -> Bool[Tensor, " n"]:
    """Patches that show some of the box of an object or of writing; a crowd is no object, COCO has no writing."""
    found = torch.zeros(len(grid), dtype=torch.bool)
    objects = [entry["bbox"] for entry in sample.annotations if not entry.get("iscrowd")]
    for x, y, w, h in (*objects, *sample.writing):
        found |= grid.touching((x, y, x + w, y + h))
    return found


def some_left(groups: TokenGroups, grid: PatchGrid, rng: np.random.Generator, names: Sequence[str]) -> Tensor:
    """The tokens of some groups; none where these are all tokens of the picture, which cannot be pruned."""
    chosen = members(groups, grid, rng, names)
    return chosen & ~chosen.all()


def others(groups: TokenGroups, grid: PatchGrid, rng: np.random.Generator, names: Sequence[str]) -> Bool[Tensor, " n"]:
    """The tokens of all other groups."""
    return ~members(groups, grid, rng, names)


def random_alive(
    groups: TokenGroups, grid: PatchGrid, rng: np.random.Generator, matched: Sequence[str], among: str = "all"
) -> Bool[Tensor, " n"]:
    """Alive tokens at random, as many as some groups have together, or all of them where they are fewer. `among`: "all"
    alive tokens; those on "things", see `on_things`; or on the "background"."""
    pool = groups.alive
    if among != "all":
        if groups.on_things is None or among not in ("things", "background"):
            raise EmbedLensError(
                f"alive tokens among {among!r}: use 'all', or 'things' or 'background' where boxes are known"
            )
        pool = pool & (groups.on_things if among == "things" else ~groups.on_things)
    return random_tokens(pool, int(members(groups, grid, rng, matched).sum()), rng)


def block_alive(
    groups: TokenGroups, grid: PatchGrid, rng: np.random.Generator, matched: Sequence[str]
) -> Bool[Tensor, " n"]:
    """A connected block of alive tokens, as many as some groups have together, or all where they are fewer: unlike
    tokens removed at random it can miss some objects, as the dead tokens do, which lie side by side."""
    return random_block(groups.alive, int(members(groups, grid, rng, matched).sum()), grid, rng)


def random_tokens(pool: Bool[Tensor, " n"], size: int, rng: np.random.Generator) -> Bool[Tensor, " n"]:
    """`size` tokens of a pool, each set of them equally likely; the whole pool where it is smaller.

    >>> int(random_tokens(torch.ones(9, dtype=torch.bool), 4, np.random.default_rng(0)).sum())
    4
    """
    places = np.flatnonzero(pool.cpu().numpy())
    chosen = torch.zeros(len(pool), dtype=torch.bool)
    chosen[torch.from_numpy(rng.choice(places, min(size, len(places)), replace=False))] = True
    return chosen


def random_block(pool: Bool[Tensor, " n"], size: int, grid: PatchGrid, rng: np.random.Generator) -> Bool[Tensor, " n"]:
    """A connected block of `size` tokens of a pool, or the whole of a smaller one, grown neighbour by neighbour in a
    part that has room for it, from each token equally likely; where no part has, the largest is taken whole first."""
    if len(pool) != len(grid):
        raise EmbedLensError(f"the pool has {len(pool)} tokens, the grid {len(grid)}: pass those of one picture")
    parts = _connected_parts(pool, grid)
    size = min(size, sum(map(len, parts)))
    chosen = torch.zeros(len(pool), dtype=torch.bool)
    while size > 0:
        roomy = [part for part in parts if len(part) >= size] or parts[:1]
        starts = [place for part in roomy for place in part]
        start = starts[int(rng.integers(len(starts)))]
        part = next(part for part in roomy if start in part)
        grown = _grown(start, set(part), min(size, len(part)), grid, rng)
        chosen[torch.tensor(grown)] = True
        size -= len(grown)
        parts.remove(part)
    return chosen


def _connected_parts(pool: Bool[Tensor, " n"], grid: PatchGrid) -> list[list[int]]:
    """Largest first, of equal ones the one that starts first."""
    left = {int(place) for place in pool.nonzero()[:, 0]}
    parts = []
    while left:
        part, border = [], [min(left)]
        left -= set(border)
        while border:
            place = border.pop()
            part.append(place)
            new = [other for other in grid.neighbours(place) if other in left]
            left -= set(new)
            border += new
        parts.append(sorted(part))
    return sorted(parts, key=lambda part: (-len(part), part[0]))


def _grown(start: int, part: set[int], size: int, grid: PatchGrid, rng: np.random.Generator) -> list[int]:
    grown, border = [start], sorted(set(grid.neighbours(start)) & part)
    while len(grown) < size:
        place = border.pop(int(rng.integers(len(border))))
        grown.append(place)
        border = sorted({*border, *grid.neighbours(place)} & part - set(grown))
    return grown


# --- arms ------------------------------------------------------------------------------------------------------------


def _masked(
    groups: TokenGroups, grid: PatchGrid, rng: np.random.Generator, select: Select, make: Callable[..., Intervention]
) -> list[Intervention] | None:
    mask = select(groups, grid, rng)
    return [make(mask)] if bool(mask.any()) else None


def _same(
    groups: Any, grid: PatchGrid, rng: np.random.Generator, interventions: tuple[Intervention, ...]
) -> tuple[Intervention, ...]:
    return interventions


BASELINE = Arm("baseline", partial(_same, interventions=()))


def pruning(name: str, select: Select, seed: int = 0) -> Arm:
    """Take the selected tokens out before layer 0; a picture that has none runs as the baseline."""
    return Arm(name, partial(_masked, select=select, make=Prune), seed)


def skipping(name: str, select: Select, at: Sequence[float]) -> Arm:
    """Leave some sublayers' updates of the selected tokens out (`SkipSublayers`)."""
    return Arm(name, partial(_masked, select=select, make=partial(SkipSublayers, at=tuple(at))))


def everywhere(name: str, *interventions: Intervention) -> Arm:
    """The same in every picture: Silence, EnterAt, Rescale, ReleasedLayer0."""
    if not interventions:
        raise EmbedLensError(f"arm {name!r} does nothing: pass at least one intervention, or use sweep.BASELINE")
    return Arm(name, partial(_same, interventions=interventions))


def repeated(name: str, select: Select, seeds: int = SEEDS) -> list[Arm]:
    """A random control: the same pruning arm with several seeds."""
    if seeds < 1:
        raise EmbedLensError(f"seeds is {seeds}: draw at least once")
    return [pruning(name, select, seed) for seed in range(seeds)]


def sink_arms() -> list[Arm]:
    """The eight rows of Table 1: baseline, three sinks pruned, four with sublayers skipped.

    MLP-2, which counts from 1, is 1.5. The last row is that of "all non-sink visual tokens", as the paper says; the
    released code leaves dead tokens out of it as well.
    """
    both = ("LLM sink", "ViT sink")
    of_llm = partial(members, names=both[:1])
    return [
        BASELINE,
        pruning("-LLM sinks", of_llm),
        pruning("-ViT sinks", partial(members, names=both[1:])),
        pruning("-all sinks", partial(members, names=both)),
        skipping("LLM sinks skip MLP-2", of_llm, at=(1.5,)),
        skipping("LLM sinks skip MLP-1, MHA-2", of_llm, at=(0.5, 1)),
        skipping("LLM sinks skip MLP-1/2, MHA-2", of_llm, at=(0.5, 1, 1.5)),
        skipping("others skip MLP-2", partial(others, names=both), at=(1.5,)),
    ]


def dead_arms(seeds: int = SEEDS) -> list[Arm]:
    """Table 2 with the controls that it lacks.

    The paper removes as many remaining tokens as there are dead ones, the released code as many as dead and sinks
    together. Both are here, from the alive tokens; and, of the smaller size, a block, those on things and background.
    """
    dead, more = ("dead",), ("dead", "ViT sink", "LLM sink")
    return [
        BASELINE,
        pruning("-dead", partial(some_left, names=dead)),
        pruning("-dead and sinks", partial(some_left, names=more)),
        *repeated("-random, as many as dead", partial(random_alive, matched=dead), seeds),
        *repeated("-random, as many as dead and sinks", partial(random_alive, matched=more), seeds),
        *repeated("-block, as many as dead", partial(block_alive, matched=dead), seeds),
        *repeated("-things, as many as dead", partial(random_alive, matched=dead, among="things"), seeds),
        *repeated("-background, as many as dead", partial(random_alive, matched=dead, among="background"), seeds),
    ]


def generator(picture: int, arm: str, seed: int) -> np.random.Generator:
    """The source of chance of an arm for a picture: the same in every process, in any order, on every machine.

    >>> int(generator(0, "-dead", 0).integers(1000)) == int(generator(0, "-dead", 0).integers(1000))
    True
    """
    digest = hashlib.sha256(f"{picture}/{arm}/{seed}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))
