"""Adapters of trained late entry: what a projector and a language model learned with visual tokens entering later.

`training/entry.py` makes them (the recipe is there); a checkpoint folder holds them in `late_entry/`. One is put on
for the time of a block, and the model then runs with the entry it was trained for:

    for adapter in adapters(model):
        with adapted(model, adapter), el.intervene(model, el.EnterAt(adapter.layer)):
            model.answer(model.prompt(image, question))

Prompts are made inside the block: they hold what the projector makes of the picture, and the projector is part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from embedlens.errors import EmbedLensError

if TYPE_CHECKING:
    from embedlens.vlm import VisionLanguageModel

FOLDER = "late_entry"


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
