"""What pruners choose by: what the vision tower shows of each patch, and how much the text attends to it.

    features = features_of(model, prompts)      # per picture: tokens, CLS, keys, attention in the tower
    weights = attended(model, prompts)          # per prompt: attention of the text to its visual tokens, by layer

What a tower does not have is None, so that a rule that needs it can say so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from embedlens.batches import in_batches
from embedlens.errors import EmbedLensError
from embedlens.patches import PatchGrid
from embedlens.tracing import attending

if TYPE_CHECKING:
    from embedlens.vlm import Prompt, VisionLanguageModel
else:
    Prompt = VisionLanguageModel = object

SPARSEVLM_LAYER = 2  # the first of its three


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
        try:  # all in one pass, or not at all: of halves the hooks would keep the last
            inputs = [{"pixel_values": prompt.pixel_values, **prompt.beside} for prompt in prompts]
            states = model.family.tower_states(model.hf, inputs)
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

    read = attention_of(model, prompts, asking, model.n_layers, batch_size)
    return [(own[:, -1], own[rated_at, :-1].mean(0)) for own in read]


def attention_of(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    asking: Callable[[Prompt], Int[Tensor, " _"]],
    n_layers: int,
    batch_size: int,
) -> Iterator[Float[Tensor, "layers queries _"]]:
    """Attention of some positions of each prompt to its visual tokens in the first layers, mean over heads.

    What comes after those layers is not run.
    """

    def run(start: int, batch: Sequence[Prompt]) -> Iterator[Tensor]:
        with model.running(batch, start, len(prompts)) as entered:
            layers: list[list[Tensor]] = []
            embeds, mask = model.padded(entered)
            with suppress(_Read), _attending(model, [asking(prompt) for prompt in entered], layers, n_layers):
                model.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        for row, prompt in enumerate(entered):
            places = prompt.visual.nonzero()[:, 0]
            yield torch.stack([layer[row][:, places.to(layer[row].device)] for layer in layers])

    return in_batches(run, prompts, batch_size)


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


def cls_similarity(features: Features) -> Float[Tensor, " n"]:
    """Cosine of CLS and patch at the layer that the projector reads, before it: the release's ViT-[cls] similarity."""
    if features.cls is None or features.tower is None:
        raise EmbedLensError("similarity to CLS needs a vision tower with a CLS token; this one has none")
    return functional.cosine_similarity(features.tower.float(), features.cls.float()[None], dim=-1)
