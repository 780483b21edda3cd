"""Which visual tokens a picture keeps: published and plain ways, behind one call at one budget.

    chosen = prune(PRUNERS["DivPrune"], features, Context(), budget=16)
    chosen.keep                       # Bool[n], exactly 16 True
    chosen.prompt(prompt)             # the prompt with these tokens only, before layer 0

Every rule in `PRUNERS` is written from its authors' description and code (`Pruner.source`), reduced to its choice of
tokens at a fixed budget before layer 0, FastV and SparseVLM too. A pruner says what it needs, and is refused without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from embedlens.codebook import Codebook, checked_budget, keep_lowest
from embedlens.cues import Features, cls_similarity
from embedlens.errors import EmbedLensError
from embedlens.groups import TokenGroups
from embedlens.patches import PatchGrid
from embedlens.vlm import Prompt

#: What of Features or Context may be missing → what is said to a model or call that lacks it.
NEEDS: Mapping[str, str] = {
    "cls_attention": "a vision tower with a CLS token",
    "keys": "a vision tower whose attention can be read, one row per visual token",
    "attention": "attention of the language model: pass Context(attention=..., rated=...) from `attended`",
    "rated": "attention of the language model: pass Context(attention=..., rated=...) from `attended`",
    "groups": "sink and dead tokens: pass Context(groups=...) from `embedlens.token_groups`",
    "codebook": "a codebook: pass Context(codebook=...) from `embedlens.codebook.build`",
    "rng": "a source of chance: pass Context(rng=...)",
}
FASTV_LAYER = 1  # K = 2 layers run with all tokens; the attention of the second chooses
NEAREST = 32 / 576  # of the tokens, that PruMerge merges into a kept one
HIPRUNE_LAYER = 9 / 24  # depth of its "object layer"
HIPRUNE_ANCHORS = 0.1
VISIONZIP_CONTEXTUAL = 10 / 64
DROPPED_A_ROUND = 8  # VisPruner


@dataclass(frozen=True, eq=False)
class Context:
    """What is not of the vision tower."""

    attention: Float[Tensor, "layers n"] | None = None  #: From the prompt's last position, mean over heads
    rated: Float[Tensor, " n"] | None = None  #: From SparseVLM's raters at its layer
    groups: TokenGroups | None = None
    codebook: Codebook | None = None
    rng: np.random.Generator | None = None


@dataclass(frozen=True, eq=False)
class Selection:
    """The tokens that stay, and what stands in their rows where a pruner merges."""

    keep: Bool[Tensor, " n"]
    merged: Float[Tensor, "r d"] | None = None  #: New rows in raster order; None: the tokens as they are

    def prompt(self, prompt: Prompt) -> Prompt:
        """The prompt with these visual tokens only; its positions count on without gaps, as released."""
        shorter = prompt.without(~self.keep.to(prompt.visual.device))
        if self.merged is None:
            return shorter
        embeds = shorter.embeds.clone()
        embeds[shorter.visual] = self.merged.to(embeds)
        return replace(shorter, embeds=embeds)


#: (features, context, budget) → what stays. `prune` calls it where all that it needs is there, so it need not ask.
Select: TypeAlias = Callable[[Any, Any, int], Tensor | Selection]


@dataclass(frozen=True)
class Pruner:
    """One way to choose. What needs attention of the language model depends on the question."""

    name: str
    select: Select
    needs: tuple[str, ...] = ()  #: Fields of Features or Context, keys of NEEDS
    source: str = ""

    @property
    def random(self) -> bool:
        """Whether it draws, so that it is repeated with several seeds."""
        return "rng" in self.needs

    def missing(self, features: Features, context: Context) -> list[str]:
        """Which of its needs are not there."""
        return [need for need in self.needs if getattr(features, need, getattr(context, need, None)) is None]


@torch.no_grad()
def prune(pruner: Pruner, features: Features, context: Context, budget: int) -> Selection:
    """The selection of a pruner, with exactly `budget` tokens; what it needs and is missing is named."""
    checked_budget(budget, len(features.tokens))
    if missing := pruner.missing(features, context):
        raise EmbedLensError(f"{pruner.name} needs {NEEDS[missing[0]]}; without it, use 'strided'")
    chosen = pruner.select(features, context, budget)
    chosen = chosen if isinstance(chosen, Selection) else Selection(chosen)
    if int(chosen.keep.sum()) != budget or (chosen.merged is not None and len(chosen.merged) != budget):
        raise EmbedLensError(f"{pruner.name} kept {int(chosen.keep.sum())} tokens for a budget of {budget}: correct it")
    return chosen


def keep_highest(values: Float[Tensor, " n"], budget: int) -> Bool[Tensor, " n"]:
    """The `budget` tokens of highest value; ties go to the lower place."""
    return keep_lowest(-values, budget)


def keep_order(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Places from highest to lowest value, ties in raster order."""
    return values.float().cpu().argsort(descending=True, stable=True)


def kept(n: int, places: Tensor | np.ndarray) -> Bool[Tensor, " n"]:
    """The mask of n tokens that is True at some places."""
    return torch.zeros(n, dtype=torch.bool).index_fill_(0, torch.as_tensor(places).long().cpu(), True)


def cells(grid: PatchGrid, budget: int) -> Int[Tensor, " n"]:
    """Which of `budget` near-square cells each patch lies in, in raster order: bands of equal height, cut into columns,
    so many that all add up. Several views share the budget by their sizes; -1 where a view is too small to get any.

    >>> from embedlens.patches import Frame
    >>> cells(PatchGrid(rows=4, cols=4, frame=Frame.stretch(4, 4)), 4).view(4, 4).tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    """
    checked_budget(budget, len(grid))
    if len(grid.views) > 1:
        parts, seen, given = [], 0, 0
        for view in grid.views:
            seen += len(view)
            share = budget * seen // len(grid) - given
            parts.append(cells(view, share) + given if share else torch.full((len(view),), -1))
            given += share
        return torch.cat(parts)
    bands = min(grid.rows, budget, max(1, -(-budget // grid.cols), round((budget * grid.rows / grid.cols) ** 0.5)))
    columns = [(budget * (band + 1)) // bands - (budget * band) // bands for band in range(bands)]
    first = np.cumsum([0, *columns])
    row, col = np.divmod(np.arange(len(grid)), grid.cols)
    band = row * bands // grid.rows
    cell = first[band] + col * np.array(columns)[band] // grid.cols
    return torch.from_numpy(cell)


def middles(grid: PatchGrid, budget: int) -> Bool[Tensor, " n"]:
    """The patch nearest to the middle of each cell: a regular sample of the grid."""
    of, chosen = cells(grid, budget), []
    at = torch.cat([torch.cartesian_prod(torch.arange(v.rows), torch.arange(v.cols)) for v in grid.views]).double()
    for cell in range(budget):
        inside = (of == cell).nonzero()[:, 0]
        chosen.append(inside[(at[inside] - at[inside].mean(0)).pow(2).sum(-1).argmin()])
    return kept(len(grid), torch.stack(chosen))


def _random(features: Features, context: Any, budget: int) -> Tensor:
    return kept(len(features.tokens), context.rng.choice(len(features.tokens), budget, replace=False))


def _pooling(features: Features, context: Context, budget: int) -> Selection:
    """Means over the cells, each at its middle patch."""
    of, keep = cells(features.grid, budget).to(features.tokens.device), middles(features.grid, budget)
    means = torch.stack([features.tokens[of == cell].mean(0) for cell in range(budget)])
    return Selection(keep, means[of[keep.to(of.device)]])


def _visionzip(features: Any, context: Context, budget: int) -> Selection:
    """Dominant patches by attention from CLS; the others merge into strided targets by their keys. Its extra CLS row is
    left out, as it belongs to no patch."""
    contextual = round(budget * VISIONZIP_CONTEXTUAL)
    if not contextual:
        return Selection(keep_highest(features.cls_attention, budget))
    keep = keep_highest(features.cls_attention, budget - contextual)  # of 1 or more, as ten of 64 are contextual
    rest = (~keep).nonzero()[:, 0]
    target = torch.linspace(0, len(rest) - 1, contextual).round().long()
    keys = functional.normalize(features.keys.float().cpu()[rest], dim=-1)
    other = ~kept(len(rest), target)
    nearest = (keys[other] @ keys[target].mT).argmax(-1)
    tower = features.tower.cpu()
    rows = tower.clone()
    for place, index in enumerate(rest[target].tolist()):
        merged = tower[rest[other][nearest == place]]
        rows[index] = tower[index] + (merged.mean(0) if len(merged) else 0)
    keep[rest[target]] = True
    return Selection(keep, _projected(features, rows[keep]))


def _prumerge(features: Any, context: Context, budget: int) -> Selection:
    """PruMerge+ at a fixed budget: half by attention from CLS, half strided; each takes up its nearest by key. One row
    is the attention-weighted sum of all that are dropped; it stands at the most attended of them."""
    attention = features.cls_attention_last.float().cpu()
    n, extra = len(attention), int(1 < budget < len(attention))
    first = -(-(budget - extra) // 2)
    keep = keep_highest(attention, first)
    rest, more = (~keep).nonzero()[:, 0], budget - extra - first
    if more:
        keep[rest[torch.linspace(0, len(rest) - 1, more).round().long()]] = True
    tower, keys = features.tower.float().cpu(), functional.normalize(features.keys.float().cpu(), dim=-1)
    alike = (keys @ keys.mT).fill_diagonal_(-torch.inf)
    near = alike.topk(min(max(1, round(NEAREST * n)), n - 1), dim=-1).indices
    rows = tower + (attention[near][..., None] * tower[near]).sum(1)
    if extra:
        dropped = (~keep).nonzero()[:, 0]
        at = dropped[attention[dropped].argmax()]
        rows[at] = (attention[dropped][:, None] * tower[dropped]).sum(0)
        keep[at] = True
    return Selection(keep, _projected(features, rows[keep]))


def hiprune(
    shallow: Float[Tensor, " n"], deep: Float[Tensor, " n"], grid: PatchGrid, budget: int
) -> Bool[Tensor, " n"]:
    """Anchors by attention received in an early layer, their four neighbours, then registers by a deep layer. The code
    wraps neighbours around row ends; this does not."""
    anchors = keep_order(shallow)[: round(budget * HIPRUNE_ANCHORS / 5)].tolist()
    around = [place for anchor in anchors for place in (anchor, *grid.neighbours(anchor))]
    chosen = list(dict.fromkeys(around))[:budget]
    return kept(len(grid), torch.tensor(list(dict.fromkeys([*chosen, *keep_order(deep).tolist()]))[:budget]))


def vispruner(attention: Float[Tensor, " n"], rows: Float[Tensor, "n v"], budget: int) -> Bool[Tensor, " n"]:
    """Half of the budget by attention from CLS; from the rest, duplicates are dropped until the other half remains. A
    round splits what remains, in order of attention, into even and odd places, and drops the even ones that are most
    like an odd one, up to eight."""
    order, first = keep_order(attention), budget // 2
    left, unit = order[first:], functional.normalize(rows.float().cpu(), dim=-1)
    while len(left) > budget - first:
        if len(left) == 1:
            left = left[:0]
            break
        even, odd = left[::2], left[1::2]
        best = (unit[even] @ unit[odd].mT).amax(-1)
        gone = even[keep_order(best)[: min(DROPPED_A_ROUND, len(left) - (budget - first))]]
        left = left[~torch.isin(left, gone)]
    return kept(len(order), torch.cat([order[:first], left]))


def divprune(tokens: Float[Tensor, "n d"], budget: int) -> Bool[Tensor, " n"]:
    """Greedy farthest points by 1 - cosine, from the token whose nearest other is farthest."""
    unit = functional.normalize(tokens.float().cpu(), dim=-1)
    distance = 1 - unit @ unit.mT
    chosen = [int(distance.clone().fill_diagonal_(torch.inf).amin(-1).argmax()) if len(tokens) > 1 else 0]
    nearest = distance[chosen[0]].clone()
    while len(chosen) < budget:
        nearest[chosen[-1]] = -torch.inf
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[chosen[-1]])
    return kept(len(tokens), torch.tensor(chosen))


def _projected(features: Features, rows: Float[Tensor, "r v"]) -> Float[Tensor, "r d"]:
    """Merged patches through the model's own projector."""
    if features.project is None:
        raise EmbedLensError("merging before the projector needs it: build Features with features_of")
    return features.project(rows.to(features.tokens)[None])[0]


def _hiprune(features: Any, context: Context, budget: int) -> Tensor:
    layer = min(len(features.received) - 1, round(HIPRUNE_LAYER * len(features.received)))
    return hiprune(features.received[layer], features.received[-1], features.grid, budget)


def _groups(features: Features, context: Any, budget: int) -> Tensor:
    """Sinks and dead tokens go first, then alive ones; within each by chance."""
    chance = torch.from_numpy(context.rng.random(len(features.tokens)))
    return keep_lowest(chance + (~context.groups.alive.cpu()).double(), budget)


def _by(score: Callable[[Any, Any], Tensor]) -> Select:
    """The tokens of highest score, which is made of features and context."""
    return lambda features, context, budget: keep_highest(score(features, context), budget)


_redundant = _by(lambda f, c: -c.codebook.redundancy(f.tokens))
_softmax = _by(lambda f, c: -c.codebook.double_softmax(f.tokens))
_fastv = _by(lambda f, c: c.attention[min(FASTV_LAYER, len(c.attention) - 1)])
CODEBOOK = Pruner("codebook", _redundant, ("codebook",), "arXiv 2503.20540: largest cosine to a prototype")
PRUNERS: Mapping[str, Pruner] = {
    pruner.name: pruner
    for pruner in (
        CODEBOOK,
        Pruner("random", _random, ("rng",), "uniform, without replacement"),
        Pruner("strided", lambda f, c, n: middles(f.grid, n), (), "regular sample of the grid"),
        Pruner("pooling", _pooling, (), "means over a coarser grid"),
        Pruner("[cls] top", _by(lambda f, c: cls_similarity(f)), ("cls_attention",), "2503.20540, high_sim_patch"),
        Pruner("[cls] bottom", _by(lambda f, c: -cls_similarity(f)), ("cls_attention",), "the same, low_sim_patch"),
        Pruner("FastV", _fastv, ("attention",), "ECCV 2024: last position, second layer"),
        Pruner("SparseVLM", _by(lambda f, c: c.rated), ("rated",), "ICML 2025: rater words, third layer"),
        Pruner("VisionZip", _visionzip, ("cls_attention", "keys"), "CVPR 2025: dominant and contextual tokens"),
        Pruner("PruMerge+", _prumerge, ("cls_attention", "keys"), "ICCV 2025, at a fixed budget"),
        Pruner("HiPrune", _hiprune, ("keys",), "arXiv 2508.00553: anchors, buffers, registers"),
        Pruner(
            "VisPruner",
            lambda f, c, n: vispruner(f.cls_attention, f.tower, n),
            ("cls_attention",),
            "ICCV 2025: important, then diverse",
        ),
        Pruner("DivPrune", lambda f, c, n: divprune(f.tokens, n), (), "CVPR 2025: largest least distance"),
        Pruner("dead and sinks", _groups, ("groups", "rng"), "the other paper: arXiv 2603.00510's groups"),
        Pruner("codebook, double softmax", _softmax, ("codebook",), "its release, for OneVision"),
    )
}


def usable(features: Features, context: Context, names: Sequence[str] | None = None) -> list[Pruner]:
    """The pruners that can run on this model, in their order; `prune` says what the others lack."""
    if unknown := [name for name in names or () if name not in PRUNERS]:
        raise EmbedLensError(f"unknown pruner {unknown[0]!r}: use one of {', '.join(PRUNERS)}")
    chosen = [PRUNERS[name] for name in names or PRUNERS]
    return [pruner for pruner in chosen if not set(pruner.missing(features, context)) - {"rng"}]
