"""Pruners as arms of a sweep: the same questions at the same budgets, before layer 0 and inside the language model.

    table = at_budgets(model, items, shares_of(counts), {"codebook": book}, names=["FastV", "random", "codebook"])

A budget is a share of each picture's own tokens. Rules in `INSIDE` drop tokens where they are published to, after some
layers have run with all of them, so that a budget is either what is *left* at the end or the *average* over layers:

    stages = INSIDE["FastV"].left(n=64, n_layers=8, budget=16)        # ((2, 16),): from layer 2 on, 16 tokens
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from embedlens.arms import BASELINE, SEEDS, Arm, Plan
from embedlens.batches import in_batches
from embedlens.codebook import Codebook, checked_budget
from embedlens.cues import Features, attended, attention_of, features_of
from embedlens.engine import intervene
from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, token_groups_of
from embedlens.interventions import LeaveAt, Prune
from embedlens.patches import PatchGrid
from embedlens.pruners import CODEBOOK, FASTV_LAYER, Context, Pruner, keep_highest, prune, usable
from embedlens.sweep import run_arms
from embedlens.tasks import Item
from embedlens.vlm import Prompt, VisionLanguageModel

Stages: TypeAlias = tuple[tuple[int, int], ...]  #: (layer, visual tokens from there on), by depth; all before the first


def average_tokens(stages: Stages, n: int, n_layers: int) -> float:
    """Visual tokens that a layer has on average, of a picture of n.

    >>> average_tokens(((2, 64),), 576, 32)
    96.0
    """
    layers, counts = zip(*stages, strict=True)
    lengths = np.diff([0, *layers, n_layers])
    return float(lengths @ [n, *counts]) / n_layers


@dataclass(frozen=True)
class Inside:
    """A rule that drops tokens inside the language model, by attention from the last position of the prompt. At each of
    its layers a like share of the tokens goes: a number left at the end, or an average over layers, fixes all stages of
    a schedule."""

    name: str
    at: Callable[[int], Sequence[int]]  #: Layers of a model → the first blocks without the tokens of each stage
    ranked: int  #: Whose attention ranks, counted from that block: -1 is the one before it, which has run
    positions: str  #: What becomes of rotary positions: "keep" or "renumber"
    source: str

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """Where tokens leave, each layer once, none before the first has run."""
        if n_layers < 2:
            what = f"{self.name} drops tokens between layers, and the model has {n_layers}"
            raise EmbedLensError(f"{what}: use a pruner before layer 0")
        return tuple(sorted({min(max(1, layer), n_layers - 1) for layer in self.at(n_layers)}))

    def left(self, n: int, n_layers: int, budget: int) -> Stages:
        """Stages after which exactly `budget` of n tokens are left."""
        checked_budget(budget, n)
        return self._stages(n, n_layers, budget / n)

    def averaging(self, n: int, n_layers: int, budget: int) -> Stages | None:
        """Stages with `budget` tokens a layer on average, to rounding; None where the layers with all have more."""
        checked_budget(budget, n)

        def beyond(share: float) -> float:
            return average_tokens(self._stages(n, n_layers, share), n, n_layers) - budget

        if beyond(0) > 0:
            return None
        low, high = 0.0, 1.0  # the share that is left at the end
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if beyond(middle) > 0 else (middle, high)
        return self._stages(n, n_layers, min(low, high, key=lambda share: abs(beyond(share))))

    def _stages(self, n: int, n_layers: int, share: float) -> Stages:
        layers = self.layers(n_layers)
        return tuple((at, max(1, round(n * share ** (stage / len(layers))))) for stage, at in enumerate(layers, 1))


#: PyramidDrop's stages are published for 32 layers: 8, 16, 24, as deep here.
INSIDE: Mapping[str, Inside] = {
    rule.name: rule
    for rule in (
        Inside("FastV", lambda n: (FASTV_LAYER + 1,), -1, "keep", "ECCV 2024: K = 2 layers with all tokens"),
        Inside(
            "PyramidDrop",
            lambda n: [round(n * quarter / 4) for quarter in (1, 2, 3)],
            0,
            "renumber",
            "CVPR 2025: after each quarter of the layers, by the attention of the next one",
        ),
    )
}


@torch.no_grad()
def plans_inside(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    rule: Inside,
    stages: Sequence[Stages],
    attention: Sequence[Float[Tensor, "layers _"]] | None = None,
    batch_size: int = 32,
) -> list[tuple[LeaveAt, ...]]:
    """What leaves where: interventions of each prompt, a stage that drops nothing of its picture left out.

    A stage ranks what the stages before it have left, by attention that is read with those gone; `attention` is that of
    `attended` with all tokens. `stages` are of each prompt, from `Inside.left` or `Inside.averaging`.
    """
    layers = rule.layers(model.n_layers)
    if len(stages) != len(prompts) or any(tuple(layer for layer, _ in own) != layers for own in stages):
        what = f"{len(stages)} schedules for {len(prompts)} prompts"
        raise EmbedLensError(f"{what}: pass one per prompt, from {rule.name}'s `left` or `averaging` for this model")
    # positions by row and column cannot close up: gaps stay there
    closing = rule.positions if all(prompt.positions is None for prompt in prompts) else "keep"
    gone = [torch.zeros(len(prompt.grid), dtype=torch.bool) for prompt in prompts]
    plans: list[tuple[LeaveAt, ...]] = [()] * len(prompts)
    before: list[LeaveAt] = []
    for stage, layer in enumerate(layers):
        if stage or attention is None:
            with intervene(model, *before) if before else nullcontext():
                upto = layer + rule.ranked + 1
                read = attention_of(model, prompts, lambda prompt: torch.tensor([len(prompt) - 1]), upto, batch_size)
                attention = [own[:, -1] for own in read]
        masks = []
        for i, (own, weights) in enumerate(zip(stages, attention, strict=True)):
            weight = weights[layer + rule.ranked].cpu().masked_fill(gone[i], -torch.inf)
            masks.append(~keep_highest(weight, own[stage][1]) & ~gone[i])
            gone[i] |= masks[i]
            plans[i] += (LeaveAt(masks[i], layer, closing),) if bool(masks[i].any()) else ()
        if any(bool(mask.any()) for mask in masks):
            before.append(LeaveAt(masks, layer, closing))
    return plans


SHARES = (1 / 3, 1 / 6, 1 / 9, 0.05)  # of the tokens: LLaVA-1.5's 192, 96, 64 and 29 of 576
LEFT, AVERAGE = "R left", "mean R"  # the two budgets of a pruner inside the language model


def budget_of(n: int, share: float) -> int:
    """Tokens that a picture of n keeps of a share, at least one.

    >>> budget_of(576, 1 / 6), budget_of(3, 0.05)
    (96, 1)
    """
    if n < 1 or not 0 < share <= 1:
        raise EmbedLensError(f"a share of {share} of {n} tokens: pass shares above 0 up to 1")
    return max(1, round(n * share))


def shares_of(counts: Sequence[int], shares: Sequence[float] = SHARES) -> list[float]:
    """Shares, largest first, without those that leave every picture what a larger one does.

    >>> [budget_of(64, share) for share in shares_of([64])], [budget_of(3, share) for share in shares_of([3])]
    ([21, 11, 7, 3], [1])
    """
    if not counts or not shares:
        raise EmbedLensError(f"{len(counts)} pictures, {len(shares)} shares: pass at least one of each")
    found: dict[tuple[int, ...], float] = {}
    for share in sorted(shares, reverse=True):
        found.setdefault(tuple(budget_of(n, share) for n in counts), share)
    return list(found.values())


def budget_name(counts: Sequence[int], share: float) -> str:
    """A budget as readers see it: tokens, or per cent where pictures have different numbers of them.

    >>> budget_name([64, 64], 1 / 9), budget_name([96, 144], 1 / 9)
    ('7', '11%')
    """
    return str(budget_of(counts[0], share)) if len(set(counts)) == 1 else f"{share:.0%}"


@dataclass(frozen=True, eq=False)
class Seen:
    """What pruners know of one picture and the first question about it."""

    prompt: Prompt
    features: Features
    context: Context
    #: Arm of a rule of INSIDE → what leaves where; None: the layers with all tokens have more than the budget
    inside: Mapping[str, tuple[LeaveAt, ...] | None]


def seen(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    reference: Reference | None = None,
    share: float | None = None,
) -> list[Seen]:
    """What the arms of `pruner_arms` choose by: `groups` of `sweep.run_arms`, with a share bound. Some choose by the
    question: ask one a picture. The rules of INSIDE are read for a `share` of the tokens, or not at all."""
    features = list(in_batches(lambda _, some: features_of(model, some), prompts, 64))
    weights, groups = attended(model, prompts), token_groups_of(model, prompts, reference=reference)
    inside: list[dict[str, tuple[LeaveAt, ...] | None]] = [{} for _ in prompts]
    for rule in INSIDE.values() if share is not None and model.n_layers > 1 else ():
        sizes = [(n := len(prompt.grid), model.n_layers, budget_of(n, share)) for prompt in prompts]  # type: ignore[arg-type]
        for kind, schedule in ((LEFT, rule.left), (AVERAGE, rule.averaging)):
            stages = [schedule(*size) for size in sizes]
            there = [i for i, own in enumerate(stages) if own is not None]
            asked, given = [prompts[i] for i in there], [stages[i] for i in there]
            plans = plans_inside(model, asked, rule, given, [weights[i][0] for i in there], 64) if there else []  # type: ignore[arg-type]
            found = dict(zip(there, plans, strict=True))
            for i, own in enumerate(inside):
                own[f"{rule.name} inside, {kind}"] = found.get(i)
    contexts = [Context(whole, rated, group) for (whole, rated), group in zip(weights, groups, strict=True)]
    return [Seen(*parts) for parts in zip(prompts, features, contexts, inside, strict=True)]


def pruner_arms(
    look: Seen, share: float, codebooks: Mapping[str, Codebook], names: Sequence[str] | None = None, seeds: int = SEEDS
) -> list[Arm]:
    """Every pruner that a model can run, at one budget, as arms for `sweep.run_arms` with `seen` as its groups.

    `look` is from `seen` of one picture, with this share of its tokens. `codebooks`: name → codebook, each a pruner of
    that name; `names` are of PRUNERS, by default all, `seeds` of those that draw.
    """
    book = next(iter(codebooks.values()), None)
    given: list[tuple[Pruner, Codebook | None]] = []
    for pruner in usable(look.features, replace(look.context, codebook=book), names):
        named = codebooks.items() if pruner is CODEBOOK else [(pruner.name, book)]
        given += [(replace(pruner, name=name), own) for name, own in named]
    arms = [
        Arm(pruner.name, partial(_choice, pruner=pruner, share=share, codebook=own), seed)
        for pruner, own in given
        for seed in range(seeds if pruner.random else 1)
    ]
    there = [name for name, plan in look.inside.items() if plan is not None]
    return arms + [Arm(name, partial(_leaving, name=name)) for name in there]


def _choice(
    look: Seen, grid: PatchGrid, rng: np.random.Generator, pruner: Pruner, share: float, codebook: Codebook | None
) -> Plan:
    context = replace(look.context, codebook=codebook, rng=rng)
    chosen = prune(pruner, look.features, context, budget_of(len(grid), share))
    if chosen.merged is not None or look.prompt.positions is not None or bool(chosen.keep.all()):
        return chosen.prompt
    return (Prune(~chosen.keep, positions="renumber"),)  # what prompts of a picture share runs once


def _leaving(look: Seen, grid: PatchGrid, rng: np.random.Generator, name: str) -> Plan | None:
    return look.inside[name]


def at_budgets(
    model: VisionLanguageModel,
    items: Sequence[Item],
    shares: Sequence[float],
    codebooks: Mapping[str, Codebook],
    reference: Reference | None = None,
    names: Sequence[str] | None = None,
    seeds: int = SEEDS,
    inside: Sequence[float] = (),
) -> pd.DataFrame:
    """`run_arms` of every pruner at every budget, and of the model with all tokens.

    `items` are one question a picture (`tasks.family_questions`); `inside` the shares at which the rules of INSIDE are
    asked as well, several times as slow. Gives the rows of `run_arms` with `share`; arm "baseline" has share 1.
    """
    tables = [run_arms(model, items, [BASELINE], lambda _, prompts: [None] * len(prompts)).assign(share=1.0)]
    first = model.prompt(items[0].sample.image, items[0].question.text)
    for share in shares:
        look = partial(seen, reference=reference, share=share if share in inside else None)
        arms = pruner_arms(look(model, [first])[0], share, codebooks, names, seeds)
        tables.append(run_arms(model, items, arms, look).assign(share=share))
    return pd.concat(tables, ignore_index=True)
