"""One sweep, many arms: the same questions under every intervention, each picture seen by the vision tower once.

An arm is a name and a function of one picture, its token groups and a generator, that gives the interventions for it:

    table = run_arms(model, items, [BASELINE, pruning("-dead", partial(members, names=("dead",)))])

Per picture, vision features and group masks are computed once and serve every question and arm; so do the keys and
values of what prompts have in common (`embedlens.prefix`). Questions of all arms are answered in batches. What is
random about an arm is seeded by picture, arm and seed alone, so a sweep that is resumed, shared out or run in another
order draws the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from embedlens import kept, memory
from embedlens.errors import EmbedLensError
from embedlens.groups import TokenGroups, token_groups_of
from embedlens.interventions import MASKED, Intervention, Prune, SkipSublayers
from embedlens.patches import PatchGrid
from embedlens.prefix import Case, answers, asked_of, identity
from embedlens.samples import Sample
from embedlens.tasks import ANSWER_TOKENS, Item, box_score, score

if TYPE_CHECKING:
    import pandas as pd

    from embedlens.vlm import Prompt, VisionLanguageModel

SEEDS = 5  # repeats of a random control
CHUNK = 8  # batches whose pictures are held at a time, so that questions of a length find each other

Select: TypeAlias = Callable[[TokenGroups, PatchGrid, np.random.Generator], Tensor]
"""Visual tokens of a picture: its groups, its grid, the arm's generator for it → Bool[n]."""
Plan: TypeAlias = "Sequence[Intervention] | Callable[[Prompt], Prompt]"
"""Interventions, or a function that gives another prompt to ask instead: rows that are merged are no intervention."""
Act: TypeAlias = Callable[[Any, PatchGrid, np.random.Generator], "Plan | None"]
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


def some_left(
    groups: TokenGroups, grid: PatchGrid, rng: np.random.Generator, names: Sequence[str]
) -> Bool[Tensor, " n"]:
    """The tokens of some groups; none where these are all tokens of the picture, which cannot be pruned."""
    chosen = members(groups, grid, rng, names)
    return chosen & ~chosen.all()


def others(groups: TokenGroups, grid: PatchGrid, rng: np.random.Generator, names: Sequence[str]) -> Bool[Tensor, " n"]:
    """The tokens of all other groups."""
    return ~members(groups, grid, rng, names)


def random_alive(
    groups: TokenGroups, grid: PatchGrid, rng: np.random.Generator, matched: Sequence[str], among: str = "all"
) -> Bool[Tensor, " n"]:
    """Alive tokens at random, as many as some groups have together, or all of them where they are fewer.

    Args:
        among: "all" alive tokens; those on "things", whose patch shows some of an object's box; or on the "background".
    """
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
    """A connected block of alive tokens, as many as some groups have together, or all where they are fewer.

    Dead tokens lie side by side, in bars and background. Tokens removed at random hit every object of a picture; a
    block of them can miss some, as the dead tokens do.
    """
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
    """A connected block of `size` tokens of a pool, grown from a random one neighbour by neighbour.

    It starts in a connected part of the pool that has room for it, each token equally likely; where no part has, it
    takes the largest part whole and goes on in the next. The whole pool where that is smaller than `size`.
    """
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


def _nothing(groups: Any, grid: PatchGrid, rng: np.random.Generator) -> None:
    return None


def _prune(groups: TokenGroups, grid: PatchGrid, rng: np.random.Generator, select: Select) -> list[Intervention] | None:
    mask = select(groups, grid, rng)
    return [Prune(mask)] if bool(mask.any()) else None


def _skip(
    groups: TokenGroups, grid: PatchGrid, rng: np.random.Generator, select: Select, at: tuple[float, ...]
) -> list[Intervention] | None:
    mask = select(groups, grid, rng)
    return [SkipSublayers(mask, at=at)] if bool(mask.any()) else None


def _same(
    groups: Any, grid: PatchGrid, rng: np.random.Generator, interventions: tuple[Intervention, ...]
) -> tuple[Intervention, ...]:
    return interventions


BASELINE = Arm("baseline", _nothing)


def pruning(name: str, select: Select, seed: int = 0) -> Arm:
    """Take the selected tokens out before layer 0; a picture that has none runs as the baseline."""
    return Arm(name, partial(_prune, select=select), seed)


def skipping(name: str, select: Select, at: Sequence[float], seed: int = 0) -> Arm:
    """Leave some sublayers' updates of the selected tokens out (`SkipSublayers`)."""
    return Arm(name, partial(_skip, select=select, at=tuple(at)), seed)


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


def sink_arms(llm: Sequence[str] = ("LLM sink",), vit: Sequence[str] = ("ViT sink",)) -> list[Arm]:
    """The eight rows of Table 1: baseline, three sinks pruned, four with sublayers skipped.

    MLP-2, which counts from 1, is 1.5. The last row is that of "all non-sink visual tokens", as the paper says; the
    released code leaves dead tokens out of it as well.
    """
    both = tuple(dict.fromkeys((*llm, *vit)))
    of_llm = partial(members, names=tuple(llm))
    return [
        BASELINE,
        pruning("-LLM sinks", of_llm),
        pruning("-ViT sinks", partial(members, names=tuple(vit))),
        pruning("-all sinks", partial(members, names=both)),
        skipping("LLM sinks skip MLP-2", of_llm, at=(1.5,)),
        skipping("LLM sinks skip MLP-1, MHA-2", of_llm, at=(0.5, 1)),
        skipping("LLM sinks skip MLP-1/2, MHA-2", of_llm, at=(0.5, 1, 1.5)),
        skipping("others skip MLP-2", partial(others, names=both), at=(1.5,)),
    ]


def dead_arms(seeds: int = SEEDS) -> list[Arm]:
    """Table 2 with the controls that it lacks.

    The paper says that as many remaining tokens are removed as there are dead ones; the released code removes as many
    as dead tokens and sinks together, and its released script prunes these. Both sizes are here, from the alive
    tokens; and, of the smaller size, a connected block, alive tokens on things, and alive tokens on the background.
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


# --- running ---------------------------------------------------------------------------------------------------------


def run_arms(
    model: VisionLanguageModel,
    items: Sequence[Item],
    arms: Sequence[Arm],
    groups: Callable[..., Sequence[Any]] = token_groups_of,
    batch_size: int = 32,
    max_new_tokens: int = ANSWER_TOKENS,
    halve: bool = True,
) -> pd.DataFrame:
    """Ask every question under every arm.

    Args:
        model: from `embedlens.load`.
        items: from `tasks.family_questions`; several questions on one picture share what is computed for it.
        arms: `sink_arms()`, `dead_arms()`, or your own. With `BASELINE` among them, `embedlens.paired` compares.
        groups: (model, prompts) → what arms choose by, of each prompt's picture: its groups, bind a reference or
            membership with `partial`, or `pruners.seen` for the arms of pruners.
        batch_size: pictures that run together, each with up to eight questions.
        max_new_tokens: of an answer.
        halve: run fewer pictures together where they do not fit on the device; False: raise, the caller halves.

    Returns:
        One row per question and arm, question by question: item (its place), id (of the picture), family, kind,
        question, answer; arm, seed; acted (False: this picture gave the arm nothing to act on, the answer is the
        baseline's), tokens (how many visual tokens it acted on); prediction, correct, and correct_original: a box
        read in the frame of the original picture, all else as `correct`.

    Raises:
        EmbedLensError: no questions, no arms, two arms of one name and seed, or two pictures of one id. Whatever an
            arm or the model raises stops the sweep; no answer is ever made up.
    """
    import pandas as pd

    items, arms = list(items), list(arms)
    _check(items, arms, batch_size)
    rows: list[dict[str, Any]] = []
    common = arms, groups, max_new_tokens
    what = {"model": kept.of_model(model), "asked": common} if halve and kept.ROWS in os.environ else None
    for places in _chunks(items, CHUNK * batch_size):
        own = {place: items[place] for place in places}
        if not halve:  # the caller keeps rows
            rows += _rows_of(model, own, *common, batch_size)
            continue
        run = partial(memory.halving, partial(_rows_of, model, own, *common), batch_size)
        key = {place: (kept.of_sample(item.sample), item.question) for place, item in own.items()}
        found, batch_size = kept.remembered({**what, "items": key}, run) if what else run()
        rows += found
    order = {(arm.name, arm.seed): number for number, arm in enumerate(arms)}
    rows.sort(key=lambda row: (row["item"], order[row["arm"], row["seed"]]))
    return pd.DataFrame(rows)


def asked(items: Sequence[Item]) -> list[Sample]:
    """Items as samples that carry their questions, which is what `embedlens.run` streams over."""
    of_picture: dict[int, list[Item]] = {}
    for item in items:
        of_picture.setdefault(item.sample.id, []).append(item)
    return [replace(own[0].sample, questions=tuple(item.question for item in own)) for own in of_picture.values()]


def answer_arms(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    arms: Sequence[Arm],
    groups: Callable[..., Sequence[TokenGroups]] = token_groups_of,
) -> list[list[dict[str, Any]]]:
    """`run_arms` as a study that can be killed, resumed and shared out; its item is "id/place" of the question.

    el.run(partial(answer_arms, arms=sink_arms()), model, asked(items), out="arms", batch_size=32)
    """
    items = [Item(sample, question) for sample in samples for question in sample.questions]
    table = run_arms(model, items, arms, groups, batch_size=max(1, len(items)), halve=False)
    first = {item.sample.id: place for place, item in reversed(list(enumerate(items)))}
    found: dict[int, list[dict[str, Any]]] = {sample.id: [] for sample in samples}
    for row in table.to_dict("records"):
        named = {str(key): value for key, value in row.items()}
        found[row["id"]].append(named | {"item": f"{row['id']}/{row['item'] - first[row['id']]}"})
    return [found[sample.id] for sample in samples]


def _check(items: Sequence[Item], arms: Sequence[Arm], batch_size: int) -> None:
    if not items or not arms:
        raise EmbedLensError(f"{len(items)} questions and {len(arms)} arms: pass at least one of each")
    if batch_size < 1:
        raise EmbedLensError(f"batch_size is {batch_size}: pass at least 1")
    named = [(arm.name, arm.seed) for arm in arms]
    twice = next((pair for pair in named if named.count(pair) > 1), None)
    if twice:
        raise EmbedLensError(f"two arms are named {twice[0]!r} with seed {twice[1]}: give each its own name or seed")
    seen: dict[int, Sample] = {}
    for item in items:
        known = seen.setdefault(item.sample.id, item.sample)
        if known is not item.sample and replace(known, questions=()) != replace(item.sample, questions=()):
            raise EmbedLensError(f"two pictures have the id {item.sample.id}: give each its own, masks are drawn by it")


def _chunks(items: Sequence[Item], most: int) -> Iterator[list[int]]:
    """Places of questions, all of a picture together, up to `most` where a picture does not have more."""
    of_picture: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        of_picture.setdefault(item.sample.id, []).append(place)
    chunk: list[int] = []
    for places in of_picture.values():
        if chunk and len(chunk) + len(places) > most:
            yield chunk
            chunk = []
        chunk += places
    yield chunk


def _rows_of(
    model: VisionLanguageModel,
    items: dict[int, Item],
    arms: Sequence[Arm],
    groups: Callable[..., Sequence[Any]],
    max_new_tokens: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Rows of questions whose pictures are held at the same time."""
    prompts = _prompts(model, items, batch_size)
    first = {item.sample.id: place for place, item in reversed(items.items())}
    pictures = list(dict.fromkeys(item.sample.id for item in items.values()))
    found = list(groups(model, [prompts[first[picture]] for picture in pictures]))
    if len(found) != len(pictures):
        raise EmbedLensError(f"groups gave {len(found)} results for {len(pictures)} prompts: return one for each")
    of_picture = {
        picture: replace(own, on_things=_on_things(items[first[picture]].sample, prompts[first[picture]].grid))
        if isinstance(own, TokenGroups)  # other arms may know something else of a picture
        else own
        for picture, own in zip(pictures, found, strict=True)
    }
    plans = {
        (arm.name, arm.seed, picture): _plan(arm, picture, of_picture[picture], prompts[first[picture]].grid)
        for arm in arms
        for picture in pictures
    }
    # a question is asked once for all arms that do the same to its picture
    cases: dict[Any, Case] = {}
    alone: dict[Any, Prompt] = {}
    asked_as, tokens = {}, {}
    for arm in arms:
        for place, item in items.items():
            plan, rewritten = plans[arm.name, arm.seed, item.sample.id], prompts[place]
            key: tuple[int, Any]
            if callable(plan):
                rewritten, plan = plan(rewritten), ()
                key = place, id(rewritten)
                alone[key] = rewritten
            else:
                key = place, identity(plan)
                cases.setdefault(key, Case(rewritten, tuple(plan), item.question.kind))
            asked_as[arm.name, arm.seed, place] = key
            removed = len(rewritten.grid) - int(rewritten.visual.sum())
            tokens[arm.name, arm.seed, place] = removed or acted_on(plan, len(rewritten.grid))
    texts = dict(zip(cases, answers(model, list(cases.values()), max_new_tokens, batch_size), strict=True))
    like = sorted(alone, key=lambda key: (items[key[0]].question.kind, len(alone[key])))  # they end together
    texts |= dict(zip(like, model.answers([alone[key] for key in like], max_new_tokens, batch_size), strict=True))
    return [
        _row(
            place,
            item,
            arm,
            tokens[arm.name, arm.seed, place],
            texts[asked_as[arm.name, arm.seed, place]],
        )
        for arm in arms
        for place, item in items.items()
    ]


def _prompts(model: VisionLanguageModel, items: dict[int, Item], batch_size: int) -> dict[int, Prompt]:
    """A prompt per question; each picture goes through the vision tower once."""
    prompts: dict[int, Prompt] = {}
    first: dict[int, int] = {}
    for place, item in items.items():
        first.setdefault(item.sample.id, place)
    leading = list(first.values())
    for start in range(0, len(leading), batch_size):
        batch = leading[start : start + batch_size]
        pictures = [_picture(items[place].sample) for place in batch]
        prompts |= dict(
            zip(batch, model.prompts(pictures, [items[place].question.text for place in batch]), strict=True)
        )
    further: dict[int, list[int]] = {}
    for place, item in items.items():
        if place not in prompts:
            further.setdefault(first[item.sample.id], []).append(place)
    for leader, places in further.items():
        texts = [items[place].question.text for place in places]
        prompts |= dict(zip(places, asked_of(model, prompts[leader], texts), strict=True))
    return prompts


def _on_things(sample: Sample, grid: PatchGrid) -> Bool[Tensor, " n"]:
    """Patches that show some of an object's box; a crowd is no object."""
    found = torch.zeros(len(grid), dtype=torch.bool)
    for entry in sample.annotations:
        x, y, w, h = entry["bbox"]
        found |= grid.touching((x, y, x + w, y + h)) & (not entry.get("iscrowd"))
    return found


def _picture(sample: Sample) -> Any:
    """The picture, without leaving it on the sample: a long list of samples would fill up with decoded pictures."""
    return sample.image if "image" in vars(sample) else replace(sample).image


def _plan(arm: Arm, picture: int, groups: Any, grid: PatchGrid) -> Plan:
    plan = arm.act(groups, grid, generator(picture, arm.name, arm.seed))
    if plan is None or callable(plan):
        return plan or ()
    for value in plan:
        if isinstance(value, MASKED) and not isinstance(value.mask, Tensor):
            raise EmbedLensError(
                f"arm {arm.name!r} gave {type(value).__name__} a list of masks: pass the picture's one"
            )
    return tuple(plan)


def acted_on(plan: Sequence[Intervention], n: int) -> int:
    """How many visual tokens interventions act on: those of their masks, or all where one has no mask."""
    masks = [value.mask for value in plan if isinstance(value, MASKED)]
    if len(masks) < len(plan):
        return n
    return int(torch.stack([torch.as_tensor(mask) for mask in masks]).any(0).sum()) if masks else 0


def _row(place: int, item: Item, arm: Arm, tokens: int, prediction: str) -> dict[str, Any]:
    question = item.question
    correct = score(question, prediction)
    return {
        "item": place,
        "id": item.sample.id,
        "family": question.family,
        "kind": question.kind,
        "question": question.text,
        "answer": question.answer,
        "arm": arm.name,
        "seed": arm.seed,
        "acted": tokens > 0,
        "tokens": tokens,
        "prediction": prediction,
        "correct": correct,
        "correct_original": box_score(item, prediction, "original") if question.kind == "box" else correct,
    }
