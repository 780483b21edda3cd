"""Silenced updates and late entry (Section 7.2): arms, floor, trained runs, and how well tokens are grounded at entry.

A *trained run* is what a projector and a language model learned with visual tokens entering later: anything with a
`layer` of entry, a `seed`, and `on(model)`, a block in which the model has its weights. `measures.adapters` reads those
of the miniature. Prompts are made inside the block: they hold what the projector makes of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from embedlens.engine import intervene
from embedlens.errors import EmbedLensError
from embedlens.groups import TokenGroups
from embedlens.interventions import EnterAt, Silence
from embedlens.lenses import EmbedLens
from embedlens.measures.labels import label_hits, label_ids, objects
from embedlens.prompts import prompts_of
from embedlens.samples import Sample
from embedlens.sweep import BASELINE, Arm, everywhere, run_arms
from embedlens.tasks import Item
from embedlens.vlm import Prompt, VisionLanguageModel

OTHER = "another picture"
SHIPPED = "as shipped"
WORDS, RULE = 5, "head-word"  #: A token is grounded if its object's label is among so many nearest words, by this rule
REFINED = 0.9  #: Refinement is over when so much of the way to the largest grounded share is done


def entering(layer: int, trained: bool = False) -> str:
    """Name of the arm whose visual tokens enter at a layer, untrained or by a run that was trained for it."""
    return f"enter at {layer}" + ", trained" * trained


def frozen_until(layer: int) -> Arm:
    """The control of late entry: no updates of visual tokens below a layer, but text reads them there."""
    return everywhere(f"frozen until {layer}", *(Silence(part, range(layer)) for part in ("attention", "mlp")))


def asked(model: VisionLanguageModel, items: Sequence[Item], arms: Sequence[Arm]) -> pd.DataFrame:
    """`sweep.run_arms`, for arms that treat all visual tokens alike, so that no groups need be found."""
    return run_arms(model, items, arms, _ungrouped)


def about_another(model: VisionLanguageModel, items: Sequence[Item]) -> pd.DataFrame:
    """The floor: every question asked about a picture half the way round. The rows keep the number and the id of the
    question's own picture, so that they pair with it."""
    samples = {item.sample.id: item.sample for item in items}
    own = list(samples)
    if len(own) < 2:
        raise EmbedLensError("swapping pictures needs at least two: ask about more")
    shown = {one: samples[own[(place + len(own) // 2) % len(own)]] for place, one in enumerate(own)}
    swapped = [Item(shown[item.sample.id], item.question) for item in items]
    table = asked(model, swapped, [replace(BASELINE, name=OTHER)])
    return table.assign(id=[items[number].sample.id for number in table["item"]], acted=True)


def trained_runs(model: VisionLanguageModel, items: Sequence[Item], runs: Sequence[Any]) -> pd.DataFrame:
    """The model as it is, and every trained run with the entry it was trained for, asked the same questions."""
    parts = [asked(model, items, [BASELINE])]
    for run in runs:
        name = entering(run.layer, trained=True)
        arm = everywhere(name, EnterAt(run.layer)) if run.layer else replace(BASELINE, name=name)
        with run.on(model):
            parts.append(asked(model, items, [replace(arm, seed=run.seed)]))
    return pd.concat(parts, ignore_index=True)


def _ungrouped(model: VisionLanguageModel, prompts: Sequence[Prompt]) -> list[TokenGroups]:
    none = [torch.zeros(len(prompt.grid), dtype=torch.bool) for prompt in prompts]
    return [TokenGroups(mask, mask, mask, ~mask, met={}) for mask in none]


def at_entry(
    model: VisionLanguageModel, samples: Sequence[Sample], runs: Sequence[Any] = ()
) -> list[list[dict[str, Any]]]:
    """Grounded tokens as they leave the projector, which is as they enter: no language model, one pass of the tower.

    Returns:
        per sample with an object whose label has a token, one row for the model as shipped and one per run: entry,
        run (its seed), object_tokens, grounded (how many of them name their object).
    """
    lens, prompts = EmbedLens.from_model(model), prompts_of(model, samples)
    known = [
        [
            (inside, torch.tensor(ids))
            for name, _, inside in objects(sample, prompt.grid)
            if (ids := label_ids(model.tokenizer, name, RULE))
        ]
        for sample, prompt in zip(samples, prompts, strict=True)
    ]
    seen = [states[model.feature_layer] for states in model.tower_states_of(prompts)] if runs else []
    rows: list[list[dict[str, Any]]] = [[] for _ in samples]
    for run in (None, *runs):
        features = [prompt.embeds[prompt.visual] for prompt in prompts]
        if run is not None:
            with run.on(model), torch.no_grad():
                features = [model.projector(states) for states in seen]
        for own, labelled, tokens in zip(rows, known, features, strict=True):
            if labelled:
                nearest = lens.topk(tokens, WORDS)[1].cpu()
                named = torch.stack([mask & torch.isin(nearest, ids).any(-1) for mask, ids in labelled]).any(0)
                of = torch.stack([mask for mask, _ in labelled]).any(0)
                own.append({**_named(run), "object_tokens": int(of.sum()), "grounded": int(named.sum())})
    return rows


def by_layer(model: VisionLanguageModel, samples: Sequence[Sample], runs: Sequence[Any] = ()) -> pd.DataFrame:
    """The same at every layer: rows of `LabelHits.token_rows` with entry and run, tokens waiting below their entry."""
    lenses, parts = {"EmbedLens": EmbedLens.from_model(model)}, []
    for run in (None, *runs):
        with ExitStack() as stack:
            if run is not None:
                stack.enter_context(run.on(model))
            if run is not None and run.layer:
                stack.enter_context(intervene(model, EnterAt(run.layer)))
            found = label_hits(model, samples, (WORDS,), (RULE,), lenses, 16)["EmbedLens", WORDS, RULE]
        parts.append(found.token_rows().assign(**_named(run)))
    return pd.concat(parts, ignore_index=True)


def _named(run: Any) -> dict[str, Any]:
    return {"entry": SHIPPED, "run": 0} if run is None else {"entry": entering(run.layer, True), "run": run.seed}


def refinement(share: pd.DataFrame, entry: int) -> pd.Series:
    """Blocks after entry until REFINED of the way to the largest share is done; 0 where it never rises.

    `share` has the resamples of the grounded share, a column per layer.

    >>> refinement(pd.DataFrame([[0.1, 0.1, 0.2, 0.3, 0.2]]), entry=1).tolist()
    [2.0]
    """
    later = share.loc[:, entry:]
    goal = later[entry] + REFINED * (later.max(axis=1) - later[entry])
    return pd.Series(later.ge(goal, axis=0).to_numpy().argmax(1), index=share.index, dtype=float)
