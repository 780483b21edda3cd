"""Silenced updates and late entry (Section 7.2): arms, floor, trained runs, and how well tokens are grounded at entry.

Adapters of trained late entry are what a projector and a language model learned with visual tokens entering later.
`training/entry.py` makes them (the recipe is there); a checkpoint folder holds them in `late_entry/`. One is put on
for the time of a block, and the model then runs with the entry it was trained for:

    for adapter in adapters(model):
        with adapted(model, adapter), el.intervene(model, el.EnterAt(adapter.layer)):
            model.answer(model.prompt(image, question))

Prompts are made inside the block: they hold what the projector makes of the picture, and the projector is part of it.
A run with entry at 0 is the *twin* of those of its seed: trained alike, on the same batches. The paper has no twin.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from embedlens.engine import intervene
from embedlens.errors import EmbedLensError
from embedlens.groups import TokenGroups
from embedlens.interventions import EnterAt, Silence
from embedlens.lenses import EmbedLens
from embedlens.measures.labels import label_hits, label_ids
from embedlens.patches import PatchGrid
from embedlens.samples import Sample
from embedlens.sweep import BASELINE, Arm, everywhere, run_arms
from embedlens.tasks import Item
from embedlens.vlm import QUESTION

if TYPE_CHECKING:
    import pandas as pd

    from embedlens.vlm import Prompt, VisionLanguageModel

FOLDER = "late_entry"
OTHER = "another picture"
SHIPPED = "as shipped"
WORDS, RULE = 5, "head-word"
"""A token is grounded if its object's label is among so many nearest words, by this rule of `measures.labels`."""
REFINED = 0.9
"""Refinement is over when so much of the way to the largest grounded share is done."""


@dataclass(frozen=True)
class Adapter:
    """One trained run.

    Attributes:
        layer: the block at which visual tokens entered, 0-based; 0 is the twin that the others are compared with.
        seed: runs of one seed saw the same batches in the same order and began at the same additions.
        steps: optimiser steps.
        path: the safetensors file.
        base: fingerprint of the projector that it began at.
    """

    layer: int
    seed: int
    steps: int
    path: Path
    base: str


def fingerprint(projector: nn.Module) -> str:
    """Sixteen hexadecimal digits of a projector's weights, in fp16, whatever they are held in."""
    digest = hashlib.sha256()
    for name, value in sorted(projector.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def adapters(model: VisionLanguageModel) -> tuple[Adapter, ...]:
    """Those that lie beside the model's weights, by seed and layer; none where the folder has no `late_entry/`.

    Raises:
        EmbedLensError: a file that is no adapter, or adapters that began at other weights.
    """
    from safetensors import SafetensorError, safe_open

    found = []
    for path in sorted((Path(model.hf.name_or_path) / FOLDER).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
            adapter = Adapter(int(facts["layer"]), int(facts["seed"]), int(facts["steps"]), path, facts["base"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise EmbedLensError(
                f"{path.name} is no late-entry adapter: remake it with `python -m training.entry`"
            ) from error
        found.append(adapter)
    if found:
        own = fingerprint(model.projector)
        foreign = [adapter.path.name for adapter in found if adapter.base != own]
        if foreign:
            raise EmbedLensError(
                f"{', '.join(foreign)} began at other weights than those of {model.name}: remake the adapters with "
                "`python -m training.entry`"
            )
    return tuple(sorted(found, key=lambda adapter: (adapter.seed, adapter.layer)))


@contextmanager
def adapted(model: VisionLanguageModel, adapter: Adapter) -> Iterator[None]:
    """The model with an adapter's weights, until the end of the block; its own are put back whatever happens.

    Raises:
        EmbedLensError: an adapter whose shapes are not the model's.
    """
    from safetensors.torch import load_file

    tensors = load_file(adapter.path)
    own: dict[str, torch.Tensor] = {}
    targets = {"projector": model.projector, "language": model.decoder}
    weights = {f"{part}.{name}": value for part, module in targets.items() for name, value in module.named_parameters()}
    changed: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if name.startswith("projector."):
            changed[name] = value.float()
        elif name.endswith(".down"):
            path = name.removesuffix(".down")
            changed[f"{path}.weight"] = tensors[f"{path}.up"].float() @ value.float()
    wrong = [name for name, value in changed.items() if name not in weights or weights[name].shape != value.shape]
    if wrong:
        raise EmbedLensError(
            f"{adapter.path.name} does not fit {model.name} ({wrong[0]}): pass one of late_entry.adapters(model)"
        )
    try:
        with torch.no_grad():
            for name, value in changed.items():
                weight = weights[name]
                own[name] = weight.detach().clone()
                added = (
                    weight.float() if name.startswith("language.") else torch.zeros_like(weight, dtype=torch.float32)
                )
                weight.copy_(added + value.to(weight.device))
        yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                weights[name].copy_(value)


# --- arms ------------------------------------------------------------------------------------------------------------


def entering(layer: int, trained: bool = False) -> str:
    """Name of the arm whose visual tokens enter at a layer, untrained or by a run that was trained for it."""
    return f"enter at {layer}" + ", trained" * trained


def frozen_until(layer: int) -> Arm:
    """The control of late entry: no updates of visual tokens below a layer, but text reads them there.

    Late entry takes away two things at once: what the layers below do with visual tokens, and what text reads there.
    """
    return everywhere(f"frozen until {layer}", *(Silence(part, range(layer)) for part in ("attention", "mlp")))


def asked(model: VisionLanguageModel, items: Sequence[Item], arms: Sequence[Arm], batch_size: int = 32) -> pd.DataFrame:
    """`sweep.run_arms`, for arms that treat all visual tokens alike, so that no groups need be found."""
    return run_arms(model, items, arms, _ungrouped, batch_size)


def about_another(model: VisionLanguageModel, items: Sequence[Item], batch_size: int = 32) -> pd.DataFrame:
    """The floor: every question asked about a picture half the way round, so only the picture's content is wrong.

    The rows keep the number and the id of the question's own picture, so that they pair with it.
    """
    own = list(dict.fromkeys(item.sample.id for item in items))
    if len(own) < 2:
        raise EmbedLensError("swapping pictures needs at least two: ask about more")
    samples = {item.sample.id: item.sample for item in items}
    shown = {one: samples[own[(place + len(own) // 2) % len(own)]] for place, one in enumerate(own)}
    swapped = [Item(shown[item.sample.id], item.question) for item in items]
    table = asked(model, swapped, [Arm(OTHER, _plain)], batch_size)
    return table.assign(id=[items[number].sample.id for number in table["item"]], acted=True)


def trained_runs(
    model: VisionLanguageModel, items: Sequence[Item], runs: Sequence[Adapter], batch_size: int = 32
) -> pd.DataFrame:
    """The model as it is, and every trained run with the entry it was trained for, asked the same questions."""
    import pandas as pd

    parts = [asked(model, items, [BASELINE], batch_size)]
    for run in runs:
        name = entering(run.layer, trained=True)
        arm = everywhere(name, EnterAt(run.layer)) if run.layer else Arm(name, _plain)
        with adapted(model, run):
            parts.append(asked(model, items, [replace(arm, seed=run.seed)], batch_size))
    return pd.concat(parts, ignore_index=True)


def _ungrouped(model: VisionLanguageModel, prompts: Sequence[Prompt]) -> list[TokenGroups]:
    none = [torch.zeros(len(prompt.grid), dtype=torch.bool) for prompt in prompts]
    return [TokenGroups(mask, mask, mask, ~mask, met={}) for mask in none]


def _plain(*_: Any) -> None:
    return None


# --- grounding (Figure g) --------------------------------------------------------------------------------------------


def at_entry(
    model: VisionLanguageModel, samples: Sequence[Sample], runs: Sequence[Adapter] = ()
) -> list[list[dict[str, Any]]]:
    """Grounded tokens as they leave the projector, which is as they enter: no language model, one pass of the tower.

    Returns:
        per sample with an object whose label has a token, one row for the model as shipped and one per run: entry,
        run (its seed), object_tokens, grounded (how many of them name their object).
    """
    lens = EmbedLens.from_model(model)
    prompts = model.prompts([sample.image for sample in samples], [QUESTION] * len(samples))
    objects = [_labelled(model, sample, prompt.grid) for sample, prompt in zip(samples, prompts, strict=True)]
    rows: list[list[dict[str, Any]]] = [[] for _ in samples]

    def count(entry: str, seed: int, features: Sequence[Tensor]) -> None:
        for own, inside, tokens in zip(rows, objects, features, strict=True):
            if not inside:
                continue
            nearest = lens.topk(tokens, WORDS)[1].cpu()
            named = torch.stack([mask & torch.isin(nearest, ids).any(-1) for mask, ids in inside]).any(0)
            of = torch.stack([mask for mask, _ in inside]).any(0)
            own.append({"entry": entry, "run": seed, "object_tokens": int(of.sum()), "grounded": int(named.sum())})

    count(SHIPPED, 0, [prompt.embeds[prompt.visual] for prompt in prompts])
    seen = [states[model.feature_layer] for states in model.tower_states_of(prompts)] if runs else []
    for run in runs:
        with adapted(model, run), torch.no_grad():
            count(entering(run.layer, trained=True), run.seed, [model.projector(states) for states in seen])
    return rows


def by_layer(
    model: VisionLanguageModel, samples: Sequence[Sample], runs: Sequence[Adapter] = (), batch_size: int = 16
) -> pd.DataFrame:
    """The same at every layer: rows of `LabelHits.token_rows` with entry and run, tokens waiting below their entry."""
    import pandas as pd

    lenses = {"EmbedLens": EmbedLens.from_model(model)}
    parts = []
    for run in (None, *runs):
        with ExitStack() as stack:
            if run is not None:
                stack.enter_context(adapted(model, run))
            if run is not None and run.layer:
                stack.enter_context(intervene(model, EnterAt(run.layer)))
            found = label_hits(model, samples, (WORDS,), (RULE,), lenses, batch_size)["EmbedLens", WORDS, RULE]
        name, seed = (SHIPPED, 0) if run is None else (entering(run.layer, trained=True), run.seed)
        parts.append(found.token_rows().assign(entry=name, run=seed))
    return pd.concat(parts, ignore_index=True)


def refinement(share: pd.DataFrame, entry: int) -> pd.Series:
    """Blocks after entry until REFINED of the way to the largest share is done; 0 where it never rises.

    Args:
        share: resamples of the grounded share, a column per layer.

    >>> import pandas as pd
    >>> refinement(pd.DataFrame([[0.1, 0.1, 0.2, 0.3, 0.2]]), entry=1).tolist()
    [2.0]
    """
    import pandas as pd

    later = share.loc[:, entry:]
    goal = later[entry] + REFINED * (later.max(axis=1) - later[entry])
    return pd.Series(later.ge(goal, axis=0).to_numpy().argmax(1), index=share.index, dtype=float)


def _labelled(
    model: VisionLanguageModel, sample: Sample, grid: PatchGrid
) -> list[tuple[Bool[Tensor, " n"], Int[Tensor, " ids"]]]:
    """Patches and label ids of each object whose label has a token."""
    found = []
    for entry in (entry for entry in sample.annotations if not entry["iscrowd"]):
        x, y, w, h = entry["bbox"]
        ids = label_ids(model.tokenizer, sample.category_names[entry["category_id"]], RULE)
        if ids:
            found.append((grid.inside((x, y, x + w, y + h)), torch.tensor(ids)))
    return found
