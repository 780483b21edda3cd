"""One sweep, many arms: the same questions under every intervention, each picture seen by the vision tower once.

    table = run_arms(model, items, [BASELINE, pruning("-dead", partial(members, names=("dead",)))])

Vision features, group masks, keys and values of what prompts share (`embedlens.prefix`) are computed once a picture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from embedlens import batches, kept
from embedlens.arms import (  # noqa: F401 - arms are named as of this module, too
    BASELINE,
    Arm,
    Plan,
    dead_arms,
    everywhere,
    generator,
    members,
    on_things,
    pruning,
    random_alive,
    random_tokens,
    repeated,
    sink_arms,
    skipping,
)
from embedlens.batches import watched
from embedlens.errors import EmbedLensError
from embedlens.groups import TokenGroups, token_groups_of
from embedlens.interventions import MASKED, Intervention
from embedlens.patches import PatchGrid
from embedlens.prefix import Case, answers, identity
from embedlens.processes import processes
from embedlens.tasks import CHUNK, Item, able, answer_tokens, box_score, by_picture, in_words_of, prompts_about, score
from embedlens.vlm import VisionLanguageModel


def run_arms(
    model: VisionLanguageModel,
    items: Sequence[Item],
    arms: Sequence[Arm],
    groups: Callable[..., Sequence[Any]] = token_groups_of,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    out: Path | str | None = None,
) -> pd.DataFrame:
    """Ask every question under every arm, in the words of the model's family. `tasks.able` looks first which families
    are testable here; of the others a few questions are asked.

    Args:
        items: from `tasks.family_questions`; several questions on one picture share what is computed for it.
        arms: `sink_arms()`, `dead_arms()`, or your own. With `BASELINE` among them, `embedlens.paired` compares.
        groups: (model, prompts) → what arms choose by, of each prompt's picture; `pruner_arms.seen` for pruners.
        batch_size: pictures that run together, each with up to eight questions; fewer where they do not fit.
        max_new_tokens: of an answer; by default what the longest expected one needs.
        out: a folder for rows, from which a sweep that was stopped goes on; by default that of `EMBEDLENS_ROWS`.

    Returns:
        One row per question and arm, question by question: item (its place), id (of the picture), family, kind,
        question, answer; arm, seed; acted (False: this picture gave the arm nothing to act on, the answer is the
        baseline's), tokens (how many visual tokens it acted on); prediction, correct, and correct_original: a box
        read in the frame of the original picture, all else as `correct`.
    """
    items, arms = list(items), list(arms)
    _check(items, arms, batch_size)
    unable = able(model, items, ask=any(arm.name == BASELINE.name for arm in arms))
    items = [item for item in items if item in unable.get(item.question.family, (item,))]
    items, max_new_tokens = in_words_of(model, items), max_new_tokens or answer_tokens(model)
    rows: list[dict[str, Any]] = []
    common = arms, groups, max_new_tokens
    together = processes(model.device.type)
    what = {"model": kept.of_model(model), "asked": common} if out or kept.ROWS in os.environ else None
    chunks = list(by_picture(items, CHUNK * batch_size))
    for number, places in enumerate(watched(chunks, model.name, "groups of questions")):
        if number % together.count != together.rank:
            continue
        own = {place: items[place] for place in places}
        run = partial(batches.halving, partial(_rows_of, model, own, *common), batch_size)
        shown = {item.sample.id: item.sample for item in own.values()}
        of_pictures = [kept.of_sample(sample) for sample in shown.values()] if what else []
        key = places, of_pictures, [(item.sample.id, item.question) for item in own.values()]
        found, batch_size = kept.remembered({**what, "items": key}, run, out) if what else run()
        rows += found
    rows = [row for part in together.gathered(rows) for row in part]
    order = {(arm.name, arm.seed): number for number, arm in enumerate(arms)}
    rows.sort(key=lambda row: (row["item"], order[row["arm"], row["seed"]]))
    table = pd.DataFrame(rows)
    return table.assign(testable=~table["family"].isin(unable))


def _check(items: Sequence[Item], arms: Sequence[Arm], batch_size: int) -> None:
    if not items or not arms:
        raise EmbedLensError(f"{len(items)} questions and {len(arms)} arms: pass at least one of each")
    if batch_size < 1:
        raise EmbedLensError(f"batch_size is {batch_size}: pass at least 1")
    named = [(arm.name, arm.seed) for arm in arms]
    twice = next((pair for pair in named if named.count(pair) > 1), None)
    if twice:
        raise EmbedLensError(f"two arms are named {twice[0]!r} with seed {twice[1]}: give each its own name or seed")


def _rows_of(
    model: VisionLanguageModel,
    items: dict[int, Item],
    arms: Sequence[Arm],
    groups: Callable[..., Sequence[Any]],
    max_new_tokens: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Rows of questions whose pictures are held at the same time."""
    prompts = prompts_about(model, items, batch_size)
    first = {item.sample.id: place for place, item in reversed(items.items())}
    pictures = list(dict.fromkeys(item.sample.id for item in items.values()))
    found = list(groups(model, [prompts[first[picture]] for picture in pictures]))
    if len(found) != len(pictures):
        raise EmbedLensError(f"groups gave {len(found)} results for {len(pictures)} prompts: return one for each")
    of_picture = {
        picture: replace(own, on_things=on_things(items[first[picture]].sample, prompts[first[picture]].grid))
        if isinstance(own, TokenGroups)  # other arms may know something else of a picture
        else own
        for picture, own in zip(pictures, found, strict=True)
    }
    plans = {
        (arm.name, arm.seed, picture): plan_of(arm, picture, of_picture[picture], prompts[first[picture]].grid)
        for arm in arms
        for picture in pictures
    }
    # a question is asked once for all arms that do the same to its picture
    cases: dict[Any, Case] = {}
    asked_as, tokens = {}, {}
    for arm in arms:
        for place, item in items.items():
            plan, rewritten = plans[arm.name, arm.seed, item.sample.id], prompts[place]
            if callable(plan):
                rewritten, plan = plan(rewritten), ()
            key = place, id(rewritten), identity(plan)
            cases.setdefault(key, Case(rewritten, tuple(plan), item.question.kind))
            asked_as[arm.name, arm.seed, place] = key
            removed = len(rewritten.grid) - int(rewritten.visual.sum())
            tokens[arm.name, arm.seed, place] = removed or acted_on(plan, len(rewritten.grid))
    texts = dict(zip(cases, answers(model, list(cases.values()), max_new_tokens, batch_size), strict=True))
    rows = []
    for arm in arms:
        for place, item in items.items():
            question, case = item.question, (arm.name, arm.seed, place)
            prediction = texts[asked_as[case]]
            correct = score(question, prediction)
            row: dict[str, Any] = {"item": place, "id": item.sample.id, "family": question.family}
            row |= {"kind": question.kind, "question": question.text, "answer": question.answer}
            row |= {"arm": arm.name, "seed": arm.seed}
            row |= {"acted": tokens[case] > 0, "tokens": tokens[case], "prediction": prediction, "correct": correct}
            original = box_score(item, prediction, "original") if question.kind == "box" else correct
            rows.append(row | {"correct_original": original})
    return rows


def plan_of(arm: Arm, picture: int, groups: Any, grid: PatchGrid) -> Plan:
    """What an arm does to a picture; nothing where it finds nothing to act on."""
    plan = arm.act(groups, grid, generator(picture, arm.name, arm.seed))
    if plan is None or callable(plan):
        return plan or ()
    for value in plan:
        if isinstance(value, MASKED) and not isinstance(value.mask, Tensor):
            what = f"arm {arm.name!r} gave {type(value).__name__} a list of masks"
            raise EmbedLensError(f"{what}: pass the picture's one")
    return tuple(plan)


def acted_on(plan: Sequence[Intervention], n: int) -> int:
    """How many visual tokens interventions act on: those of their masks, or all where one has no mask."""
    masks = [value.mask for value in plan if isinstance(value, MASKED)]
    if len(masks) < len(plan):
        return n
    return int(torch.stack([torch.as_tensor(mask) for mask in masks]).any(0).sum()) if masks else 0
