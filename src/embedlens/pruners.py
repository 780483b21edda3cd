"""Which visual tokens a picture keeps: published and plain ways, behind one call at one budget.

    chosen = prune(PRUNERS["DivPrune"], features, Context(), budget=16)
    chosen.keep                       # Bool[n], exactly 16 True
    chosen.prompt(prompt)             # the prompt with these tokens only, before layer 0

Every rule in `PRUNERS` is written from its authors' description and code (`Pruner.source`), reduced to its choice of
tokens at a fixed budget, and removes them before layer 0. FastV and SparseVLM choose by attention inside the language
model; there it is their choice alone that is compared.

Rules in `INSIDE` drop tokens where they are published to, in the language model, after some layers have run with all:

    stages = INSIDE["FastV"].left(n=64, n_layers=8, budget=16)        # ((2, 16),): from layer 2 on, 16 tokens
    plans = plans_inside(model, prompts, INSIDE["FastV"], [stages] * len(prompts))
    with el.intervene(model, *merged(plans)): ...                       # `LeaveAt` of `embedlens.interventions`

A pruner says what it needs, and a model that lacks it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from embedlens.arms import SEEDS, Arm, Plan
from embedlens.codebook import Codebook, checked_budget, keep_lowest
from embedlens.engine import intervene
from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, TokenGroups, token_groups_of
from embedlens.interventions import LeaveAt, Prune
from embedlens.patches import PatchGrid
from embedlens.vlm import attending

if TYPE_CHECKING:
    from embedlens.vlm import Prompt, VisionLanguageModel
else:
    Prompt = VisionLanguageModel = object

#: Need → what is said to a model or call that lacks it.
NEEDS: Mapping[str, str] = {
    "CLS": "a vision tower with a CLS token",
    "keys": "a vision tower whose attention can be read, one row per visual token",
    "LLM attention": "attention of the language model: pass Context(attention=..., rated=...) from `attended`",
    "groups": "sink and dead tokens: pass Context(groups=...) from `embedlens.token_groups`",
    "codebook": "a codebook: pass Context(codebook=...) from `embedlens.codebook.build`",
    "chance": "a source of chance: pass Context(rng=...)",
}
FASTV_LAYER = 1  # K = 2 layers run with all tokens; the attention of the second chooses
SPARSEVLM_LAYER = 2  # the first of its three
NEAREST = 32 / 576  # of the tokens, that PruMerge merges into a kept one
HIPRUNE_LAYER = 9 / 24  # depth of its "object layer"
HIPRUNE_ANCHORS = 0.1
VISIONZIP_CONTEXTUAL = 10 / 64
DROPPED_A_ROUND = 8  # VisPruner


@dataclass(frozen=True, eq=False)
class Features:
    """What the vision side gives for one picture. What a tower does not have is None."""

    tokens: Float[Tensor, "n d"]
    """As they leave the projector."""
    grid: PatchGrid
    tower: Float[Tensor, "n v"] | None = None
    """Patches as the projector reads them."""
    cls: Float[Tensor, " v"] | None = None
    """CLS at the same layer."""
    cls_attention: Float[Tensor, " n"] | None = None
    """Attention from CLS in the block before that layer, mean over heads."""
    cls_attention_last: Float[Tensor, " n"] | None = None
    """The same in the last block, all heads taken as one, as PruMerge does."""
    keys: Float[Tensor, "n c"] | None = None
    """Mean over heads, of the block before that layer."""
    received: Float[Tensor, "blocks n"] | None = field(default=None, repr=False)
    """Attention received by a patch, mean over heads and queries, of every block up to that layer."""
    project: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    """The projector, for pruners that merge before it."""

    @property
    def has(self) -> set[str]:
        """Which of NEEDS the tower meets."""
        found = {"CLS"} if self.cls is not None and self.cls_attention is not None else set()
        return found | ({"keys"} if self.keys is not None and self.received is not None else set())


@dataclass(frozen=True, eq=False)
class Context:
    """What is not of the vision tower."""

    attention: Float[Tensor, "layers n"] | None = None
    """From the last position of the prompt, mean over heads; depends on the question."""
    rated: Float[Tensor, " n"] | None = None
    """From SparseVLM's raters at its layer; depends on the question."""
    groups: TokenGroups | None = None
    codebook: Codebook | None = None
    rng: np.random.Generator | None = None

    @property
    def has(self) -> set[str]:
        given = {"groups": self.groups, "codebook": self.codebook, "chance": self.rng, "LLM attention": self.attention}
        return {name for name, value in given.items() if value is not None}


@dataclass(frozen=True, eq=False)
class Selection:
    """The tokens that stay, and what stands in their rows where a pruner merges."""

    keep: Bool[Tensor, " n"]
    merged: Float[Tensor, "r d"] | None = None
    """New rows in raster order of `keep`; None: the tokens as they are."""

    def prompt(self, prompt: Prompt) -> Prompt:
        """The prompt with these visual tokens only; its positions count on without gaps, as released."""
        shorter = prompt.without(~self.keep.to(prompt.visual.device))
        if self.merged is None:
            return shorter
        embeds = shorter.embeds.clone()
        embeds[shorter.visual] = self.merged.to(embeds)
        return replace(shorter, embeds=embeds)


Select: TypeAlias = Callable[[Features, Context, int], Tensor | Selection]


@dataclass(frozen=True)
class Pruner:
    """One way to choose."""

    name: str
    select: Select
    needs: tuple[str, ...] = ()
    source: str = ""

    @property
    def random(self) -> bool:
        """Whether it draws, so that it is repeated with several seeds."""
        return "chance" in self.needs

    @property
    def asks(self) -> bool:
        """Whether its choice depends on the question, so that it is made for each."""
        return "LLM attention" in self.needs


def prune(pruner: Pruner, features: Features, context: Context, budget: int) -> Selection:
    """The selection of a pruner, with exactly `budget` tokens.

    Raises:
        EmbedLensError: a budget of 0 or above the token count, or something that the pruner needs is missing.
    """
    checked_budget(budget, len(features.tokens))
    missing = [need for need in pruner.needs if need not in features.has | context.has]
    if missing:
        raise EmbedLensError(f"{pruner.name} needs {NEEDS[missing[0]]}; without it, use 'strided'")
    chosen = pruner.select(features, context, budget)
    chosen = chosen if isinstance(chosen, Selection) else Selection(chosen)
    if int(chosen.keep.sum()) != budget or (chosen.merged is not None and len(chosen.merged) != budget):
        raise EmbedLensError(f"{pruner.name} kept {int(chosen.keep.sum())} tokens for a budget of {budget}: correct it")
    return chosen


# --- reading the model -----------------------------------------------------------------------------------------------


@torch.no_grad()
def features_of(model: VisionLanguageModel, prompts: Sequence[Prompt]) -> list[Features]:
    """What the pruners read of each picture's vision side; every picture goes through the tower once more."""
    seen: dict[str, Tensor] = {}
    tower: Any = (
        model.hf.get_submodule(model.family.MODULES["vision_tower"])
        if "vision_tower" in model.family.MODULES
        else torch.nn.Module()
    )
    wanted = re.compile(r"layers\.(\d+)(\.self_attn\.[qk]_proj)?$")
    hooks = []
    with model.lock:
        for name, module in tower.named_modules():
            if wanted.search(name):
                hooks.append(module.register_forward_hook(partial(_keep, seen, name[wanted.search(name).start() :])))  # type: ignore[union-attr]
        try:
            states = model.tower_states_of(prompts)
        finally:
            for hook in hooks:
                hook.remove()
    if any(len(value) != len(prompts) for value in seen.values()):  # tiles: rows of the tower are no pictures
        seen.clear()
    block = model.feature_layer - 1
    heads = getattr(model.hf.config.vision_config, "num_attention_heads", None)
    last = max((int(name.split(".")[1]) for name in seen), default=-1)
    return [
        _features(model, prompt, states[row], {name: value[row] for name, value in seen.items()}, block, last, heads)
        for row, prompt in enumerate(prompts)
    ]


def _keep(seen: dict[str, Tensor], name: str, module: Any, args: tuple, output: Any) -> None:
    seen[name] = output[0] if isinstance(output, tuple) else output


def _features(
    model: VisionLanguageModel,
    prompt: Prompt,
    states: Float[Tensor, "layers n v"],
    seen: Mapping[str, Tensor],
    block: int,
    last: int,
    heads: int | None,
) -> Features:
    tokens, n = prompt.embeds[prompt.visual], len(prompt.grid)
    plain = Features(tokens, prompt.grid)
    names = [f"layers.{index}.self_attn.{part}_proj" for index in (*range(block + 1), last) for part in "qk"]
    if heads is None or block < 0 or states.shape[1] != n or any(name not in seen for name in names):
        return plain  # a tower of another build, or one whose patches are merged before they become tokens
    before = len(seen[names[0]]) - n
    if before not in (0, 1):
        return plain
    received, cls_attention, keys = [], None, None
    for index in range(block + 1):
        q, k = (_by_head(seen[f"layers.{index}.self_attn.{part}_proj"], heads) for part in "qk")
        weights = (q @ k.mT / q.shape[-1] ** 0.5).float().softmax(-1).mean(0)
        received.append(weights.mean(0)[before:])
        if index == block:
            keys = k.mean(0)[before:]
            cls_attention = weights[0, before:] if before else None
    cls = cls_last = None
    if before:
        cls = seen[f"layers.{block}"][0]
        q, k = (seen[f"layers.{last}.self_attn.{part}_proj"].float() for part in "qk")
        cls_last = (q[0] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[before:]
    projector: Any = model.hf.get_submodule(model.family.MODULES["projector"])
    return Features(
        tokens,
        prompt.grid,
        states[model.feature_layer],
        cls,
        cls_attention,
        cls_last,
        keys,
        torch.stack(received),
        projector,
    )


def _by_head(rows: Float[Tensor, "s v"], heads: int) -> Float[Tensor, "h s c"]:
    return rows.unflatten(-1, (heads, -1)).transpose(0, 1)


@torch.no_grad()
def attended(
    model: VisionLanguageModel, prompts: Sequence[Prompt], batch_size: int = 32
) -> list[tuple[Float[Tensor, "layers n"], Float[Tensor, " n"]]]:
    """How much attention the text of each prompt pays to its visual tokens, with all of them in place.

    Returns:
        per prompt: from the last position, which predicts the first word, in every layer; and from SparseVLM's raters
        in its layer. Both are means over heads.
    """
    rated_at = min(SPARSEVLM_LAYER, model.n_layers - 1)

    def asking(prompt: Prompt) -> Tensor:
        return torch.cat([raters(prompt), torch.tensor([len(prompt) - 1])])

    read = _attention_of(model, prompts, asking, model.n_layers, batch_size)
    return [(own[:, -1], own[rated_at, :-1].mean(0)) for own in read]


def _attention_of(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    asking: Callable[[Prompt], Int[Tensor, " _"]],
    n_layers: int,
    batch_size: int,
) -> Iterator[Float[Tensor, "layers queries _"]]:
    """Attention of some positions of each prompt to its visual tokens in the first layers, mean over heads.

    What comes after those layers is not run.
    """
    for start, batch in model.batches(prompts, batch_size):
        with model.running(batch, start, len(prompts)) as entered:
            layers: list[list[Tensor]] = []
            embeds, mask = model.padded(entered)
            with suppress(_Read), _attending(model, [asking(prompt) for prompt in entered], layers, n_layers):
                model.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        for row, prompt in enumerate(entered):
            places = prompt.visual.nonzero()[:, 0]
            yield torch.stack([layer[row][:, places.to(layer[row].device)] for layer in layers])


def raters(prompt: Prompt) -> Int[Tensor, " r"]:
    """SparseVLM's text tokens that look at the picture: after it, and more like its tokens than the mean of them.

    Softmax over the text of inner products with a visual token, averaged over visual tokens.
    """
    last = int(prompt.visual.nonzero()[-1, 0])
    text = torch.arange(last + 1, len(prompt))
    if not len(text):
        return torch.tensor([len(prompt) - 1])
    rows = prompt.embeds.float()
    share = (rows[prompt.visual] @ rows[text.to(rows.device)].mT).softmax(-1).mean(0).cpu()
    return text[share >= share.mean()]


class _Read(Exception):
    """All attention that is asked for has been read: the rest of a forward would be of no use."""


@contextmanager
def _attending(
    model: VisionLanguageModel, queries: Sequence[Int[Tensor, " _"]], layers: list[list[Tensor]], n_layers: int
) -> Iterator[None]:
    """Append, layer by layer, the attention Float[q, s] of some queries of each prompt, while the forward runs; it ends
    with so many layers, by `_Read` if there are more."""
    kernel = model.decoder.config._attn_implementation
    owners = {model.part(layer, "attention") for layer in range(model.n_layers)}
    if kernel != "sdpa":
        raise EmbedLensError(
            f"attention cannot be read from {kernel!r} attention: call model.hf.set_attn_implementation('sdpa') first"
        )

    def attend(
        stock: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        if module in owners:
            scale = options.get("scaling") or query.shape[-1] ** -0.5
            key_of = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            found = []
            for row, asked in enumerate(queries):
                at = asked.to(query.device)
                scores = (query[row, :, at] @ key_of[row].mT * scale).float()
                unseen = torch.arange(scores.shape[-1], device=at.device) > at[:, None]
                if mask is not None:  # an intervention may hide more; one row of it may serve all prompts
                    own = mask[min(row, len(mask) - 1), 0, at.clamp(max=mask.shape[2] - 1)]
                    unseen = unseen | (~own if own.dtype == torch.bool else own < 0)
                found.append(scores.masked_fill(unseen, -torch.inf).softmax(-1).mean(0))
            layers.append(found)
            if len(layers) == n_layers < model.n_layers:
                raise _Read
        return stock(module, query, key, value, mask, **options)

    with attending(attend):
        yield


# --- the rules -------------------------------------------------------------------------------------------------------


def keep_highest(values: Float[Tensor, " n"], budget: int) -> Bool[Tensor, " n"]:
    """The `budget` tokens of highest value; ties go to the lower place."""
    return keep_lowest(-values, budget)


def cells(grid: PatchGrid, budget: int) -> Int[Tensor, " n"]:
    """Which of `budget` near-square cells each patch lies in, in raster order: any budget divides any grid.

    Rows of the grid form bands of equal height, and each band is cut into columns, so many that all add up. Several
    views share the budget by their sizes; -1 where a view is too small to get any.

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
    of, keep = cells(grid, budget), torch.zeros(len(grid), dtype=torch.bool)
    shapes = [(torch.arange(len(view)) // view.cols, torch.arange(len(view)) % view.cols) for view in grid.views]
    at = torch.cat([torch.stack(shape, -1) for shape in shapes]).double()
    for cell in range(budget):
        inside = (of == cell).nonzero()[:, 0]
        keep[inside[(at[inside] - at[inside].mean(0)).pow(2).sum(-1).argmin()]] = True
    return keep


def _random(features: Features, context: Context, budget: int) -> Tensor:
    assert context.rng is not None
    keep = torch.zeros(len(features.tokens), dtype=torch.bool)
    keep[torch.from_numpy(context.rng.choice(len(keep), budget, replace=False))] = True
    return keep


def _strided(features: Features, context: Context, budget: int) -> Tensor:
    return middles(features.grid, budget)


def _pooling(features: Features, context: Context, budget: int) -> Selection:
    """Means over the cells, each at its middle patch."""
    of, keep = cells(features.grid, budget).to(features.tokens.device), middles(features.grid, budget)
    means = torch.stack([features.tokens[of == cell].mean(0) for cell in range(budget)])
    return Selection(keep, means[of[keep.to(of.device)]])


def cls_similarity(features: Features) -> Float[Tensor, " n"]:
    """Cosine of CLS and patch at the layer that the projector reads, before it: the release's ViT-[cls] similarity."""
    if features.cls is None or features.tower is None:
        raise EmbedLensError(f"similarity to CLS needs {NEEDS['CLS']}; this tower has none")
    return functional.cosine_similarity(features.tower.float(), features.cls.float()[None], dim=-1)


def _cls(features: Features, context: Context, budget: int, sign: float) -> Tensor:
    return keep_highest(sign * cls_similarity(features), budget)


def _fastv(features: Features, context: Context, budget: int) -> Tensor:
    assert context.attention is not None
    return keep_highest(context.attention[min(FASTV_LAYER, len(context.attention) - 1)], budget)


def _sparsevlm(features: Features, context: Context, budget: int) -> Tensor:
    if context.rated is None:
        raise EmbedLensError(f"SparseVLM needs {NEEDS['LLM attention']}")
    return keep_highest(context.rated, budget)


def _visionzip(features: Features, context: Context, budget: int) -> Selection:
    """Dominant patches by attention from CLS; the others merge into strided targets by their keys.

    Its extra CLS row is left out, as it belongs to no patch.
    """
    assert features.cls_attention is not None and features.tower is not None and features.keys is not None
    contextual = round(budget * VISIONZIP_CONTEXTUAL)
    keep = keep_highest(features.cls_attention, budget - contextual) if contextual < budget else _none(features)
    if not contextual:
        return Selection(keep)
    rest = (~keep).nonzero()[:, 0]
    target = torch.linspace(0, len(rest) - 1, contextual).round().long()
    keys = functional.normalize(features.keys.float().cpu()[rest], dim=-1)
    other = torch.ones(len(rest), dtype=torch.bool)
    other[target] = False
    nearest = (keys[other] @ keys[target].mT).argmax(-1)
    tower = features.tower.cpu()
    rows = tower.clone()
    for place, index in enumerate(rest[target].tolist()):
        merged = tower[rest[other][nearest == place]]
        rows[index] = tower[index] + (merged.mean(0) if len(merged) else 0)
    keep[rest[target]] = True
    return Selection(keep, _projected(features, rows[keep]))


def _prumerge(features: Features, context: Context, budget: int) -> Selection:
    """PruMerge+ at a fixed budget: half by attention from CLS, half strided; each takes up its nearest by key.

    One row is the attention-weighted sum of all that are dropped; it stands at the most attended of them.
    """
    assert features.cls_attention_last is not None and features.tower is not None and features.keys is not None
    attention = features.cls_attention_last.float().cpu()
    n, extra = len(attention), int(1 < budget < len(attention))
    first = -(-(budget - extra) // 2)
    keep = keep_highest(attention, first)
    rest = (~keep).nonzero()[:, 0]
    more = budget - extra - first
    if more:
        keep[rest[torch.linspace(0, len(rest) - 1, more).round().long()]] = True
    tower, keys = features.tower.float().cpu(), functional.normalize(features.keys.float().cpu(), dim=-1)
    alike = keys @ keys.mT
    alike.fill_diagonal_(-torch.inf)
    near = alike.topk(min(max(1, round(NEAREST * n)), n - 1), dim=-1).indices
    rows = tower + (attention[near][..., None] * tower[near]).sum(1)
    if extra:
        dropped = (~keep).nonzero()[:, 0]
        at = dropped[attention[dropped].argmax()]
        rows[at] = (attention[dropped][:, None] * tower[dropped]).sum(0)
        keep[at] = True
    return Selection(keep, _projected(features, rows[keep]))


def _hiprune(features: Features, context: Context, budget: int) -> Tensor:
    assert features.received is not None
    layer = min(len(features.received) - 1, round(HIPRUNE_LAYER * len(features.received)))
    return hiprune(features.received[layer], features.received[-1], features.grid, budget)


def hiprune(
    shallow: Float[Tensor, " n"], deep: Float[Tensor, " n"], grid: PatchGrid, budget: int
) -> Bool[Tensor, " n"]:
    """Anchors by attention received in an early layer, their four neighbours, then registers by a deep layer.

    The code wraps neighbours around row ends; this does not.
    """
    keep = torch.zeros(len(grid), dtype=torch.bool)
    for anchor in keep_order(shallow)[: round(budget * HIPRUNE_ANCHORS / 5)]:
        for place in (int(anchor), *grid.neighbours(int(anchor))):
            if int(keep.sum()) < budget:
                keep[place] = True
    left = budget - int(keep.sum())
    keep[[int(i) for i in keep_order(deep) if not keep[i]][:left]] = True
    return keep


def keep_order(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Places from highest to lowest value, ties in raster order."""
    return values.float().cpu().sort(descending=True, stable=True).indices


def _vispruner(features: Features, context: Context, budget: int) -> Tensor:
    assert features.cls_attention is not None and features.tower is not None
    return vispruner(features.cls_attention, features.tower, budget)


def vispruner(
    attention: Float[Tensor, " n"], rows: Float[Tensor, "n v"], budget: int, important: float = 0.5
) -> Bool[Tensor, " n"]:
    """Half of the budget by attention from CLS; from the rest, duplicates are dropped until the other half remains.

    A round splits what remains, in order of attention, into even and odd places, and drops the even ones that are
    most like an odd one, up to eight.
    """
    order = keep_order(attention)
    first = int(budget * important)
    keep = torch.zeros(len(order), dtype=torch.bool)
    keep[order[:first]] = True
    left, unit = order[first:], functional.normalize(rows.float().cpu(), dim=-1)
    while len(left) > budget - first:
        if len(left) == 1:
            left = left[:0]
            break
        even, odd = left[::2], left[1::2]
        best = (unit[even] @ unit[odd].mT).amax(-1)
        gone = even[keep_order(best)[: min(DROPPED_A_ROUND, len(left) - (budget - first))]]
        left = left[~torch.isin(left, gone)]
    keep[left] = True
    return keep


def _divprune(features: Features, context: Context, budget: int) -> Tensor:
    return divprune(features.tokens, budget)


def divprune(tokens: Float[Tensor, "n d"], budget: int) -> Bool[Tensor, " n"]:
    """Greedy farthest points by 1 - cosine, from the token whose nearest other is farthest."""
    unit = functional.normalize(tokens.float().cpu(), dim=-1)
    distance = 1 - unit @ unit.mT
    alone = distance.clone().fill_diagonal_(torch.inf)
    keep = torch.zeros(len(tokens), dtype=torch.bool)
    at = int(alone.amin(-1).argmax()) if len(tokens) > 1 else 0
    keep[at] = True
    nearest = distance[at].clone()
    while int(keep.sum()) < budget:
        at = int(nearest.masked_fill(keep, -torch.inf).argmax())
        keep[at] = True
        nearest = torch.minimum(nearest, distance[at])
    return keep


def _groups(features: Features, context: Context, budget: int) -> Tensor:
    """Sinks and dead tokens go first, then alive ones; within each by chance."""
    assert context.groups is not None and context.rng is not None
    chance = torch.from_numpy(context.rng.random(len(features.tokens)))
    return keep_lowest(chance + (~context.groups.alive.cpu()).double(), budget)


def _codebook(features: Features, context: Context, budget: int) -> Tensor:
    assert context.codebook is not None
    return keep_lowest(context.codebook.redundancy(features.tokens), budget)


def _codebook_softmax(features: Features, context: Context, budget: int) -> Tensor:
    assert context.codebook is not None
    return keep_lowest(context.codebook.double_softmax(features.tokens), budget)


def _none(features: Features) -> Tensor:
    return torch.zeros(len(features.tokens), dtype=torch.bool)


def _projected(features: Features, rows: Float[Tensor, "r v"]) -> Float[Tensor, "r d"]:
    """Merged patches through the model's own projector."""
    if features.project is None:
        raise EmbedLensError("merging before the projector needs it: build Features with features_of")
    with torch.no_grad():
        return features.project(rows.to(features.tokens)[None])[0]


CODEBOOK = Pruner("codebook", _codebook, ("codebook",), "arXiv 2503.20540: largest cosine to a prototype")
DOUBLE_SOFTMAX = Pruner("codebook, double softmax", _codebook_softmax, ("codebook",), "its release, for OneVision")
PRUNERS: Mapping[str, Pruner] = {
    pruner.name: pruner
    for pruner in (
        CODEBOOK,
        Pruner("random", _random, ("chance",), "uniform, without replacement"),
        Pruner("strided", _strided, (), "regular sample of the grid"),
        Pruner("pooling", _pooling, (), "means over a coarser grid"),
        Pruner("[cls] top", partial(_cls, sign=1.0), ("CLS",), "release of arXiv 2503.20540, high_sim_patch"),
        Pruner("[cls] bottom", partial(_cls, sign=-1.0), ("CLS",), "the same, low_sim_patch"),
        Pruner("FastV", _fastv, ("LLM attention",), "ECCV 2024: last position, second layer"),
        Pruner("SparseVLM", _sparsevlm, ("LLM attention",), "ICML 2025: rater words, third layer"),
        Pruner("VisionZip", _visionzip, ("CLS", "keys"), "CVPR 2025: dominant and contextual tokens"),
        Pruner("PruMerge+", _prumerge, ("CLS", "keys"), "ICCV 2025, at a fixed budget"),
        Pruner("HiPrune", _hiprune, ("keys",), "arXiv 2508.00553: anchors, buffers, registers"),
        Pruner("VisPruner", _vispruner, ("CLS",), "ICCV 2025: important and diverse tokens"),
        Pruner("DivPrune", _divprune, (), "CVPR 2025: largest least distance"),
        Pruner("dead and sinks", _groups, ("groups", "chance"), "the other paper: arXiv 2603.00510's groups"),
        DOUBLE_SOFTMAX,
    )
}


# --- inside the language model ---------------------------------------------------------------------------------------

Stages: TypeAlias = tuple[tuple[int, int], ...]
"""(layer, visual tokens that it and later ones have), in order of depth. Layers before the first have all."""


def average_tokens(stages: Stages, n: int, n_layers: int) -> float:
    """Visual tokens that a layer has on average, of a picture of n.

    >>> average_tokens(((2, 64),), 576, 32)
    96.0
    """
    borders = [*(layer for layer, _ in stages), n_layers]
    total = n * borders[0]
    for (layer, count), end in zip(stages, borders[1:], strict=True):
        total += count * (end - layer)
    return total / n_layers


@dataclass(frozen=True)
class Inside:
    """A rule that drops tokens inside the language model, by attention from the last position of the prompt.

    At each of its layers a like share of the tokens goes, so that what a schedule is made for (a number left at the
    end, or an average over layers) fixes all its stages.
    """

    name: str
    at: Callable[[int], Sequence[int]]
    """Layers of a model → the first blocks without the tokens of each stage, as published or as deep."""
    ranked: int
    """Whose attention ranks, counted from that block: -1 is the one before it, which has run."""
    positions: str
    """What becomes of rotary positions: "keep" or "renumber"."""
    source: str

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """Where tokens leave, each layer once, none before the first has run.

        Raises:
            EmbedLensError: a model of one layer has no inside.
        """
        if n_layers < 2:
            raise EmbedLensError(
                f"{self.name} drops tokens between layers, and the model has {n_layers}: use a pruner before layer 0"
            )
        return tuple(sorted({min(max(1, layer), n_layers - 1) for layer in self.at(n_layers)}))

    def left(self, n: int, n_layers: int, budget: int) -> Stages:
        """Stages after which exactly `budget` of n tokens are left."""
        checked_budget(budget, n)
        return self._stages(n, n_layers, budget / n)

    def averaging(self, n: int, n_layers: int, budget: int) -> Stages | None:
        """Stages with `budget` tokens a layer on average, to rounding; None where the layers with all have more."""
        checked_budget(budget, n)
        if average_tokens(self._stages(n, n_layers, 0), n, n_layers) > budget:
            return None
        low, high = 0.0, 1.0  # the share that is left at the end
        for _ in range(40):
            middle = (low + high) / 2
            above = average_tokens(self._stages(n, n_layers, middle), n, n_layers) > budget
            low, high = (low, middle) if above else (middle, high)
        either = [self._stages(n, n_layers, share) for share in (low, high)]
        return min(either, key=lambda stages: abs(average_tokens(stages, n, n_layers) - budget))

    def _stages(self, n: int, n_layers: int, share: float) -> Stages:
        layers = self.layers(n_layers)
        counts = [max(1, round(n * share ** ((stage + 1) / len(layers)))) for stage in range(len(layers))]
        return tuple(zip(layers, counts, strict=True))


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

    A stage ranks what the stages before it have left, by attention that is read with those gone.

    Args:
        model: from `embedlens.load`.
        prompts: with their questions, which the choice depends on.
        rule: of INSIDE.
        stages: of each prompt, from `Inside.left` or `Inside.averaging`.
        attention: of each prompt with all tokens, from `attended`, if it is there already.
        batch_size: prompts that run together.

    Raises:
        EmbedLensError: as many stages as prompts are needed, and counts that the pictures have.
    """
    layers = rule.layers(model.n_layers)
    if len(stages) != len(prompts) or any(tuple(layer for layer, _ in own) != layers for own in stages):
        raise EmbedLensError(
            f"{len(stages)} schedules for {len(prompts)} prompts: pass one per prompt, from {rule.name}'s `left` or "
            "`averaging` for this model"
        )
    for own, prompt in zip(stages, prompts, strict=True):
        for _, count in own:
            checked_budget(count, len(prompt.grid))
    # positions by row and column cannot close up: gaps stay there
    closing = rule.positions if all(prompt.positions is None for prompt in prompts) else "keep"
    gone = [torch.zeros(len(prompt.grid), dtype=torch.bool) for prompt in prompts]
    plans: list[tuple[LeaveAt, ...]] = [()] * len(prompts)
    before: list[LeaveAt] = []
    for stage, layer in enumerate(layers):
        if stage or attention is None:
            with intervene(model, *before) if before else nullcontext():
                upto = layer + rule.ranked + 1
                attention = [own[:, -1] for own in _attention_of(model, prompts, _last, upto, batch_size)]
        masks = []
        for i, (own, weights) in enumerate(zip(stages, attention, strict=True)):
            weight = weights[layer + rule.ranked].cpu().masked_fill(gone[i], -torch.inf)
            leaving = ~keep_highest(weight, own[stage][1]) & ~gone[i]
            gone[i] = gone[i] | leaving
            masks.append(leaving)
            if bool(leaving.any()):
                plans[i] = (*plans[i], LeaveAt(leaving, layer, closing))
        if any(bool(mask.any()) for mask in masks):
            before.append(LeaveAt(masks, layer, closing))
    return plans


def _last(prompt: Prompt) -> Int[Tensor, " 1"]:
    return torch.tensor([len(prompt) - 1])


def usable(features: Features, context: Context, names: Sequence[str] | None = None) -> list[Pruner]:
    """The pruners that can run on this model, in their order; `prune` says what the others lack."""
    unknown = [name for name in names or () if name not in PRUNERS]
    if unknown:
        raise EmbedLensError(f"unknown pruner {unknown[0]!r}: use one of {', '.join(PRUNERS)}")
    there = features.has | context.has | {"chance"}
    return [PRUNERS[name] for name in names or PRUNERS if set(PRUNERS[name].needs) <= there]


# --- as arms of a sweep: the same questions at the same budgets ------------------------------------------------------

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
    inside: Mapping[str, tuple[LeaveAt, ...] | None]
    """Arm of a rule of INSIDE → what leaves where; None: the layers with all tokens have more than the budget."""


def seen(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    reference: Reference | None = None,
    share: float | None = None,
    batch_size: int = 64,
) -> list[Seen]:
    """What the arms of `pruner_arms` choose by; pass it to `sweep.run_arms` as `groups`, with a share bound.

    FastV, SparseVLM and the rules of INSIDE choose by the question of these prompts: ask one question a picture.

    Args:
        reference: of the token groups; default: the model's own.
        share: of its tokens that a picture keeps, for the rules of INSIDE; None: these are not read.
    """
    features = [one for _, batch in model.batches(prompts, batch_size) for one in features_of(model, batch)]
    weights = attended(model, prompts)
    groups = token_groups_of(model, prompts, reference=reference)
    inside: list[dict[str, tuple[LeaveAt, ...] | None]] = [{} for _ in prompts]
    for rule in INSIDE.values() if share is not None and model.n_layers > 1 else ():
        sizes = [(n := len(prompt.grid), model.n_layers, budget_of(n, share)) for prompt in prompts]  # type: ignore[arg-type]
        for kind, schedule in ((LEFT, rule.left), (AVERAGE, rule.averaging)):
            stages = [schedule(*size) for size in sizes]
            there = [i for i, own in enumerate(stages) if own is not None]
            asked, given = [prompts[i] for i in there], [stages[i] for i in there]
            plans = plans_inside(model, asked, rule, given, [weights[i][0] for i in there], batch_size) if there else []  # type: ignore[arg-type]
            found = dict(zip(there, plans, strict=True))
            for i, own in enumerate(inside):
                own[f"{rule.name} inside, {kind}"] = found.get(i)
    return [
        Seen(prompt, own, Context(weights[i][0], weights[i][1], group), inside[i])
        for i, (prompt, own, group) in enumerate(zip(prompts, features, groups, strict=True))
    ]


def pruner_arms(
    look: Seen,
    share: float,
    codebooks: Mapping[str, Codebook],
    names: Sequence[str] | None = None,
    seeds: int = SEEDS,
) -> list[Arm]:
    """Every pruner that a model can run, at one budget, as arms for `sweep.run_arms` with `seen` as its groups.

    Args:
        look: from `seen` of one picture of the model, with this share.
        share: of a picture's own tokens that it keeps, from `shares_of`.
        codebooks: name → codebook; each is a pruner of that name.
        names: of PRUNERS; default: all.
        seeds: of pruners that draw.
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
    return arms + [Arm(name, partial(_leaving, name=name)) for name, plan in look.inside.items() if plan is not None]


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
