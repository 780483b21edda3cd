"""The residual stream at every sublayer, and where attention goes, read while the stock model runs.

The forward pass is the stock one. A mass is the attention that a query puts on a set of keys, mean over heads, by a
second attention whose values are the set's indicator, so that the [queries, keys] weights are never held as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from embedlens.batches import in_batches
from embedlens.errors import EmbedLensError
from embedlens.vlm import Prompt, VisionLanguageModel

_ATTENTION = RLock()  # transformers looks its attention up in one place for all models


@dataclass(frozen=True, eq=False)
class Trace:
    """One prompt's way through the decoder.

    `resid_pre[l]` enters block l, `resid_mid[l]` leaves its attention (after the residual add), `resid_post[l]` leaves
    its MLP; `resid_post[l]` is `resid_pre[l + 1]`. All are taken before the final norm.
    """

    stream: Float[Tensor, "layers_and_one s d"]  #: What enters block 0, and what leaves each block
    resid_mid: Float[Tensor, "layers s d"]
    #: Name of a mask → share of each position's attention that falls on the mask's keys, mean over heads
    attention: Mapping[str, Float[Tensor, "layers s"]]

    @property
    def resid_pre(self) -> Float[Tensor, "layers s d"]:
        return self.stream[:-1]

    @property
    def resid_post(self) -> Float[Tensor, "layers s d"]:
        return self.stream[1:]

    @property
    def sublayers(self) -> Float[Tensor, "sublayers s d"]:
        """The stream after every sublayer: input, MHA-1, MLP-1, MHA-2 ... as the paper counts, from 1."""
        between = torch.stack([self.resid_mid, self.resid_post], dim=1).flatten(0, 1)
        return torch.cat([self.stream[:1], between])


def trace(model: VisionLanguageModel, prompt: Prompt, masks: Mapping[str, Bool[Tensor, " s"]] | None = None) -> Trace:
    """Run one prompt and keep what every sublayer leaves. `masks`: name → positions whose share of everyone's attention
    is wanted. They may overlap. EmbedLensError: a mask of another length than the prompt, or an attention kernel that
    cannot be read."""
    return next(traces(model, [prompt], None if masks is None else [masks]))


def traces(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    masks: Sequence[Mapping[str, Bool[Tensor, " _"]]] | None = None,
    batch_size: int = 8,
) -> Iterator[Trace]:
    """`trace` of several prompts, padded on the right, `batch_size` of them held at a time. Masks need the same names.
    Under `embedlens.Prune` a trace has the remaining rows only; masks are still given for the whole prompt."""
    if masks is not None and len(masks) != len(prompts):
        raise EmbedLensError(f"{len(prompts)} prompts but {len(masks)} sets of masks: pass one set per prompt")

    def run(start: int, batch: Sequence[Prompt]) -> Iterator[Trace]:
        named = [] if masks is None else list(masks[start : start + len(batch)])
        middle: list[Tensor] = []
        mass: list[Tensor] = []
        with model.running(batch, start, len(prompts)) as entered:
            embeds, padding = model.padded(entered)
            indicators = _indicators(named, batch, entered, embeds)
            weighing: AbstractContextManager[None] = nullcontext()
            if indicators is not None:
                weighing = reading(model, partial(_weigh, mass, indicators))
            with model.recording(middle) as seen, weighing, torch.no_grad():
                model.decoder(inputs_embeds=embeds, attention_mask=padding, use_cache=False)
        stream, mid = (torch.stack([h.to(embeds.device) for h in part], dim=1) for part in (seen, middle))
        names = list(named[0]) if named else []
        for row, prompt in enumerate(entered):
            attention = {name: torch.stack([m[row, : len(prompt), g] for m in mass]) for g, name in enumerate(names)}
            yield Trace(stream[row, :, : len(prompt)], mid[row, :, : len(prompt)], attention)

    yield from in_batches(run, prompts, batch_size)


def _indicators(
    masks: Sequence[Mapping[str, Bool[Tensor, " _"]]],
    prompts: Sequence[Prompt],
    entered: Sequence[Prompt],
    embeds: Float[Tensor, "b s d"],
) -> Float[Tensor, "b s g"] | None:
    """1 where a key belongs to a set, one column per name; None if nothing is asked."""
    if not masks or not masks[0]:
        return None
    names = list(masks[0])
    columns = embeds.new_zeros(*embeds.shape[:2], len(names))
    for row, (named, prompt, short) in enumerate(zip(masks, prompts, entered, strict=True)):
        if list(named) != names:
            raise EmbedLensError(f"the masks of one prompt are {list(named)}, of another {names}: use the same names")
        for column, (name, mask) in enumerate(named.items()):
            if mask.shape != (len(prompt),):
                raise EmbedLensError(
                    f"the mask {name!r} has shape {tuple(mask.shape)}, the prompt {len(prompt)} positions: "
                    "a mask covers the whole prompt, text included"
                )
            kept = mask.to(columns.device)
            if short.rows is not None and len(short) < len(prompt):  # an intervention took rows out
                kept = kept[short.rows]
            columns[row, : len(short), column] = kept.to(columns.dtype)
    return columns


@contextmanager
def reading(
    model: VisionLanguageModel, of_products: Callable[[Tensor, Tensor, Tensor | None, float], None]
) -> Iterator[None]:
    """For the time of the block, the attention of the decoder is read, layer by layer. `of_products`: is given queries
    Float[b, h, q, c], keys Float[b, h, s, c], mask and scale of SDPA attention. EmbedLensError: another kernel."""
    kernel = model.decoder.config._attn_implementation
    owners = {model.part(layer, "attention") for layer in range(model.n_layers)}
    if kernel != "sdpa":
        raise EmbedLensError(f"{kernel!r} attention cannot be read: call model.hf.set_attn_implementation('sdpa')")

    def attend(
        stock: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        if module in owners:
            keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            of_products(query, keys, mask, options.get("scaling") or query.shape[-1] ** -0.5)
        return stock(module, query, key, value, mask, **options)

    with attending(attend):
        yield


@contextmanager
def attending(attend: Callable[..., Any]) -> Iterator[None]:
    """For the time of the block, SDPA attention of every model is `attend(stock, module, query, key, value, ...)`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with _ATTENTION:  # other threads wait: each puts back what it found
        stock: Callable = ALL_ATTENTION_FUNCTIONS["sdpa"]
        ALL_ATTENTION_FUNCTIONS["sdpa"] = partial(attend, stock)
        try:
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = stock


def _weigh(
    mass: list[Tensor],
    indicators: Float[Tensor, "b s g"],
    query: Float[Tensor, "b h s c"],
    key: Float[Tensor, "b h s c"],
    mask: Tensor | None,
    scale: float,
) -> None:
    """softmax(q k^T) 1_set, mean over heads: attention whose values are the indicators."""
    heads, width = query.shape[1], query.shape[-1]
    causal = mask is None and query.shape[2] > 1
    found = []
    for part in indicators.to(query.device, query.dtype).split(width, dim=-1):
        # as wide as a head, so that the fused kernels take it
        values = functional.pad(part, (0, width - part.shape[-1]))[:, None].expand(-1, heads, -1, -1)
        seen = functional.scaled_dot_product_attention(query, key, values, mask, is_causal=causal, scale=scale)
        found.append(seen[..., : part.shape[-1]].float().mean(1))
    mass.append(torch.cat(found, -1))
