"""References under which the random model has a few sinks of each kind, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from embedlens import samples
from embedlens.groups import Reference, discover, phi
from embedlens.lenses import EmbedLens


def none_found(model) -> Reference:
    found = discover(model, samples.load("miniworld", n=4, split="train"))
    nothing = {"vit_norm": None, "sink_dims": (), "sink_layer": None, "phi_threshold": None}
    return replace(found, **nothing, dead_id=None, vit_sink_id=None, llm_sink_id=None)


def both_found(model, prompts: Sequence, none: Reference, share: float = 0.2) -> Reference:
    """Thresholds that about a share of the visual tokens pass, of each kind."""
    norms = torch.cat([states[-1].norm(dim=-1) for states in model.tower_states_of(prompts)])
    excited = torch.cat([phi(model.hidden_states(p)[1, p.visual], (3, 7)) for p in prompts])
    words = EmbedLens.from_model(model).topk(torch.cat([p.embeds[p.visual] for p in prompts]), 1)[1]
    return replace(
        none,
        vit_norm=float(norms.quantile(1 - share)),
        vit_sink_id=int(words[1, 0]),
        sink_dims=(3, 7),
        sink_layer=1,
        phi_threshold=float(excited.quantile(1 - share)),
        llm_sink_id=int(words[2, 0]),
    )
