"""Adapters of trained late entry, as `training.entry` writes them, put on a model for the time of a block.

    for adapter in adapters(model):
        with adapter.on(model), el.intervene(model, el.EnterAt(adapter.layer)):
            model.answer(model.prompt(image, question))

A run with entry at 0 is the *twin* of those of its seed: trained alike, on the same batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from embedlens.errors import EmbedLensError
from embedlens.vlm import VisionLanguageModel

FOLDER = "late_entry"  # in a checkpoint's folder


@dataclass(frozen=True)
class Adapter:
    """One trained run: what a projector and a language model learned with visual tokens entering at a later layer."""

    layer: int  #: The block at which they entered, 0-based; 0 is the twin that the others are compared with
    seed: int  #: Runs of one seed saw the same batches in the same order and began at the same additions
    steps: int  #: Optimiser steps
    path: Path  #: The safetensors file
    base: str  #: Fingerprint of the projector that it began at

    @contextmanager
    def on(self, model: VisionLanguageModel) -> Iterator[None]:
        """The model with these weights, until the end of the block; its own are put back whatever happens."""
        tensors, parts = load_file(self.path), {"projector": model.projector, "language": model.decoder}
        weights = {f"{part}.{name}": own for part, module in parts.items() for name, own in module.named_parameters()}
        changed: dict[str, torch.Tensor] = {}
        for name, value in tensors.items():
            if name.startswith("projector."):
                changed[name] = value.float()
            elif name.endswith(".down"):
                path = name.removesuffix(".down")
                changed[f"{path}.weight"] = tensors[f"{path}.up"].float() @ value.float()
        wrong = [name for name, value in changed.items() if name not in weights or weights[name].shape != value.shape]
        if wrong:
            what = f"{self.path.name} does not fit {model.name} ({wrong[0]})"
            raise EmbedLensError(f"{what}: put on one of adapters(model)")
        own = {name: weights[name].detach().clone() for name in changed}
        try:
            with torch.no_grad():
                for name, value in changed.items():
                    before = own[name].float() if name.startswith("language.") else 0
                    weights[name].copy_(before + value.to(weights[name].device))
            yield
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    weights[name].copy_(value)


def fingerprint(projector: nn.Module) -> str:
    """Sixteen hexadecimal digits of a projector's weights, in fp16, whatever they are held in."""
    digest = hashlib.sha256()
    for name, value in sorted(projector.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def adapters(model: VisionLanguageModel) -> tuple[Adapter, ...]:
    """Those that lie beside the model's weights, by seed and layer; none where the folder has no `late_entry/`.
    EmbedLensError: a file that is no adapter, or adapters that began at other weights."""
    found, remake = [], "with `python -m training.entry`"
    for path in sorted((Path(model.hf.name_or_path) / FOLDER).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
            adapter = Adapter(int(facts["layer"]), int(facts["seed"]), int(facts["steps"]), path, facts["base"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise EmbedLensError(f"{path.name} is no late-entry adapter: remake it {remake}") from error
        found.append(adapter)
    own = fingerprint(model.projector) if found else ""
    if foreign := ", ".join(adapter.path.name for adapter in found if adapter.base != own):
        raise EmbedLensError(f"{foreign} began at other weights than {model.name}'s: remake the adapters {remake}")
    return tuple(sorted(found, key=lambda adapter: (adapter.seed, adapter.layer)))
