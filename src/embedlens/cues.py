"""What pruners choose by: what the vision tower shows of each patch, and how much the text attends to it.

features = features_of(model, prompts)      # per picture: tokens, CLS, keys, attention in the tower
weights = attended(model, prompts)          # per prompt: attention of the text to its visual tokens, by layer

"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from embedlens.batches import in_batches
from embedlens.errors import EmbedLensError
from embedlens.patches import PatchGrid
from embedlens.tracing import reading
from embedlens.vlm import Prompt, VisionLanguageModel

SPARSEVLM_LAYER = 2  # the first of its three


@dataclass(frozen=True, eq=False)
class Features:
    """What the vision side gives for one picture. What a tower does not have is None."""

    tokens: Float[Tensor, "n d"]  #: As they leave the projector
    grid: PatchGrid
    tower: Float[Tensor, "n v"] | None = None  #: Patches as the projector reads them
    cls: Float[Tensor, " v"] | None = None  #: CLS at the same layer
    cls_attention: Float[Tensor, " n"] | None = None  #: From CLS, in the block before that layer, mean over heads
    cls_attention_last: Float[Tensor, " n"] | None = None  #: In the last block, all heads as one, as PruMerge does
    keys: Float[Tensor, "n c"] | None = None  #: Mean over heads, of the block before that layer
    received: Float[Tensor, "blocks n"] | None = None  #: By a patch, mean over heads and queries, up to that layer
    project: Callable[[Tensor], Tensor] | None = None  #: The projector, for pruners that merge before it


@torch.no_grad()
def features_of(model: VisionLanguageModel, prompts: Sequence[Prompt]) -> list[Features]:
    """What the pruners read of each picture's vision side; every picture goes through the tower once more."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: Any, args: tuple, output: Any) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output

    wanted = re.compile(r"layers\.(\d+)(\.self_attn\.[qk]_proj)?$")
    tower = model.family.MODULES.get("vision_tower")
    with model.lock, ExitStack() as hooks:
        for name, module in model.hf.get_submodule(tower).named_modules() if tower else ():
            if found := wanted.search(name):
                hooks.callback(module.register_forward_hook(partial(keep, found[0])).remove)
        inputs = [{"pixel_values": prompt.pixel_values, **prompt.beside} for prompt in prompts]
        states = model.family.tower_states(model.hf, inputs)  # all in one pass: of halves the hooks would keep the last
    if any(len(value) != len(prompts) for value in seen.values()):  # tiles: rows of the tower are no pictures
        seen.clear()
    own = ({name: value[row] for name, value in seen.items()} for row in range(len(prompts)))
    return [_features(model, *parts) for parts in zip(prompts, states, own, strict=True)]


def _features(
    model: VisionLanguageModel, prompt: Prompt, states: Float[Tensor, "layers n v"], seen: Mapping[str, Tensor]
) -> Features:
    tokens, n, block = prompt.embeds[prompt.visual], len(prompt.grid), model.feature_layer - 1
    heads = getattr(model.hf.config.vision_config, "num_attention_heads", None)
    last = max((int(name.split(".")[1]) for name in seen), default=-1)
    names = [f"layers.{index}.self_attn.{part}_proj" for index in (*range(block + 1), last) for part in "qk"]
    if heads is None or block < 0 or states.shape[1] != n or any(name not in seen for name in names):
        return Features(tokens, prompt.grid)  # a tower of another build, or one that merges patches into tokens
    before = len(seen[names[0]]) - n
    if before not in (0, 1):
        return Features(tokens, prompt.grid)
    received = []
    for index in range(block + 1):
        q, k = (
            seen[f"layers.{index}.self_attn.{part}_proj"].unflatten(-1, (heads, -1)).transpose(0, 1) for part in "qk"
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).float().softmax(-1).mean(0)
        received.append(weights.mean(0)[before:])
    keys, cls, cls_attention, cls_last = k.mean(0)[before:], None, None, None  # of the last of these blocks
    if before:
        cls, cls_attention = seen[f"layers.{block}"][0], weights[0, before:]
        q, k = (seen[f"layers.{last}.self_attn.{part}_proj"].float() for part in "qk")
        cls_last = (q[0] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[before:]
    projector: Any = model.hf.get_submodule(model.family.MODULES["projector"])
    tower = states[model.feature_layer]
    return Features(tokens, prompt.grid, tower, cls, cls_attention, cls_last, keys, torch.stack(received), projector)


@torch.no_grad()
def attended(
    model: VisionLanguageModel, prompts: Sequence[Prompt], batch_size: int = 32
) -> list[tuple[Float[Tensor, "layers n"], Float[Tensor, " n"]]]:
    """How much attention the text of each prompt pays to its visual tokens, with all of them in place. Returns per
    prompt, means over heads: from the last position, which predicts the first word, in every layer; and from
    SparseVLM's raters in its layer."""

    def asking(prompt: Prompt) -> Int[Tensor, " _"]:
        return torch.cat([raters(prompt), torch.tensor([len(prompt) - 1])])

    rated_at = min(SPARSEVLM_LAYER, model.n_layers - 1)
    read = attention_of(model, prompts, asking, model.n_layers, batch_size)
    return [(own[:, -1], own[rated_at, :-1].mean(0)) for own in read]


def attention_of(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    asking: Callable[[Prompt], Int[Tensor, " _"]],
    n_layers: int,
    batch_size: int,
) -> Iterator[Float[Tensor, "layers queries _"]]:
    """Attention of some positions of each prompt to its visual tokens in the first layers, mean over heads. What comes
    after those layers is not run."""

    def run(start: int, batch: Sequence[Prompt]) -> Iterator[Tensor]:
        layers: list[list[Tensor]] = []

        def keep(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:  # [b, h, s, c] each
            layers.append([])
            for row, asked in enumerate(queries):
                at = asked.to(query.device)
                scores = (query[row, :, at] @ key[row].mT * scale).float()
                unseen = torch.arange(scores.shape[-1], device=at.device) > at[:, None]
                if mask is not None:  # an intervention may hide more; one row of it may serve all prompts
                    own = mask[min(row, len(mask) - 1), 0, at.clamp(max=mask.shape[2] - 1)]
                    unseen = unseen | (~own if own.dtype == torch.bool else own < 0)
                layers[-1].append(scores.masked_fill(unseen, -torch.inf).softmax(-1).mean(0))
            if len(layers) == n_layers < model.n_layers:
                raise _Read

        with model.running(batch, start, len(prompts)) as entered:
            embeds, mask = model.padded(entered)
            queries = [asking(prompt) for prompt in entered]
            with suppress(_Read), reading(model, keep):
                model.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        for row, prompt in enumerate(entered):
            places = prompt.visual.nonzero()[:, 0]
            yield torch.stack([layer[row][:, places.to(layer[row].device)] for layer in layers])

    return in_batches(run, prompts, batch_size)


def raters(prompt: Prompt) -> Int[Tensor, " r"]:
    """SparseVLM's text tokens that look at the picture: after it, and more like its tokens than the mean of them.
    Softmax over the text of inner products with a visual token, averaged over visual tokens."""
    last = int(prompt.visual.nonzero()[-1, 0])
    text = torch.arange(last + 1, len(prompt))
    if not len(text):
        return torch.tensor([len(prompt) - 1])
    rows = prompt.embeds.float()
    share = (rows[prompt.visual] @ rows[text.to(rows.device)].mT).softmax(-1).mean(0).cpu()
    return text[share >= share.mean()]


class _Read(Exception):
    """All attention that is asked for has been read: the rest of a forward would be of no use."""


def cls_similarity(features: Features) -> Float[Tensor, " n"]:
    """Cosine of CLS and patch at the layer that the projector reads, before it: the release's ViT-[cls] similarity."""
    if features.cls is None or features.tower is None:
        raise EmbedLensError("similarity to CLS needs a vision tower with a CLS token; this one has none")
    return functional.cosine_similarity(features.tower.float(), features.cls.float()[None], dim=-1)
