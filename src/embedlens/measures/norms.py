"""Norms of visual and text positions, how far each block turns them, and what rescaling changes (Section 6.2).

A pre-norm block divides the length out as it reads. So a factor on the visual tokens leaves what the first attention
reads, and changes how much its update weighs: `first_block` separates this arithmetic from what the model does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from embedlens.groups import Reference, token_groups_of
from embedlens.lenses import Lens
from embedlens.prompts import prompts_of
from embedlens.samples import Sample
from embedlens.tracing import traces
from embedlens.vlm import Prompt, VisionLanguageModel

SCALES = (1.0, 0.3, 0.1, 0.03, 0.01)  # the paper scales by 0.01


def by_layer(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    scales: Sequence[float] = (1.0,),
    reference: Reference | None = None,
    lens: Lens | None = None,
) -> list[list[dict[str, Any]]]:
    """Norms and layer-to-layer cosines of each picture, means over its positions, visual tokens scaled by each factor.

    Positions: "visual"; "text" without the first one; "all text"; and the groups of the unscaled picture, if there is a
    reference. Where a picture has none of them, there is no row.

    Returns:
        per sample, one row per scale, positions and layer: norm (L2; layer 0 enters the first block) and, where a block
        follows, of that block: turn (cos of h_l and h_l+1), centred (the same after the mean over the positions is
        taken out) and, of unscaled visual tokens with a lens, renamed: the share whose nearest word changes.
    """
    prompts = prompts_of(model, samples)
    masks: list[dict[str, Bool[Tensor, " s"]]] = []
    for prompt in prompts:
        later = torch.arange(len(prompt), device=prompt.visual.device) > 0
        masks.append({"visual": prompt.visual, "text": prompt.text & later, "all text": prompt.text})
    if reference is not None:
        found = token_groups_of(model, prompts, reference, batch_size=len(prompts))
        for of, prompt, groups in zip(masks, prompts, found, strict=True):
            of |= {name: prompt.spread(mask) for name, mask in groups.named.items()}
    rows: list[list[dict[str, Any]]] = [[] for _ in prompts]
    for scale in scales:
        scaled = [prompt.rescaled(scale) for prompt in prompts]
        for own, named, states in zip(rows, masks, model.streams_of(scaled, len(scaled)), strict=True):
            for name, mask in named.items():
                h = states[:, mask.to(states.device)].float()
                columns = _course(h)
                if lens is not None and scale == 1 and name == "visual":
                    nearest = lens.topk(h, 1)[1][..., 0]
                    columns["renamed"] = (nearest[1:] != nearest[:-1]).double().mean(-1)
                for layer in range(len(columns.get("norm", ()))):
                    values = {key: float(found[layer]) for key, found in columns.items() if layer < len(found)}
                    own.append({"scale": scale, "positions": name, "layer": layer, **values})
    return rows


def first_block(
    model: VisionLanguageModel, samples: Sequence[Sample], scales: Sequence[float] = SCALES
) -> list[list[dict[str, Any]]]:
    """Is a rescaled token turned more because the block does something else, or because the token is shorter?

    Returns:
        per sample, one row per scale, means over the visual tokens: turn (cos of h_0 and h_1), frozen (the same if the
        block added what it adds to the unscaled tokens: arithmetic alone), attention_moved and mlp_moved (how far the
        update is from the unscaled one, as a share of that one's norm; the MLP reads token and attention update added
        up).
    """
    prompts = prompts_of(model, samples)
    plain = list(_updates(model, prompts, 1.0))
    rows: list[list[dict[str, Any]]] = [[] for _ in prompts]
    for scale in scales:
        for own, (x, *new), (_, *old) in zip(rows, _updates(model, prompts, scale), plain, strict=True):
            moved = [(a - b).norm(dim=-1).mean() / b.norm(dim=-1).mean() for a, b in zip(new, old, strict=True)]
            turns = [cosine_similarity(x, x + sum(updates), dim=-1).mean() for updates in (new, old)]
            names = ("turn", "frozen", "attention_moved", "mlp_moved")
            own.append({"scale": scale, **dict(zip(names, map(float, (*turns, *moved)), strict=True))})
    return rows


def _course(h: Float[Tensor, "layers n d"]) -> dict[str, Float[Tensor, " layers"]]:
    """Means over positions by layer; nothing where there are no positions, `centred` only where there are two."""
    apart = h - h.mean(1, keepdim=True)
    parts = {"turn": h, "centred": apart} if h.shape[1] > 1 else {"turn": h}
    turns = {name: cosine_similarity(part[1:], part[:-1], dim=-1).mean(-1) for name, part in parts.items()}
    return {"norm": h.norm(dim=-1).mean(-1), **turns} if h.shape[1] else {}


def _updates(
    model: VisionLanguageModel, prompts: Sequence[Prompt], scale: float
) -> Iterator[tuple[Float[Tensor, "n d"], Float[Tensor, "n d"], Float[Tensor, "n d"]]]:
    """Visual tokens as they enter the first block, what its attention adds, what its MLP adds; per prompt."""
    scaled = [prompt.rescaled(scale) for prompt in prompts]
    for prompt, seen in zip(scaled, traces(model, scaled, batch_size=len(scaled)), strict=True):
        pre, mid, post = (h[0, prompt.visual].float() for h in (seen.resid_pre, seen.resid_mid, seen.resid_post))
        yield pre, mid - pre, post - mid
