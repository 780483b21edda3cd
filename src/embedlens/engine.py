"""Interventions at work: hooks on the stock modules, in prefill and while decoding, that go at the end of a block.

The prompts reach the engine through `model.running`, which all ways to run a model call. A forward that is not
announced there is refused, as nobody could say which of its positions are visual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from embedlens.errors import EmbedLensError
from embedlens.interventions import (
    MASKED,
    EnterAt,
    Intervention,
    LeaveAt,
    Prune,
    ReleasedLayer0,
    Rescale,
    Silence,
    SkipSublayers,
    sublayers_of,
)
from embedlens.prompts import Side, side_by_side
from embedlens.tracing import attending
from embedlens.vlm import Prompt, VisionLanguageModel


@dataclass(frozen=True, eq=False)
class _Batch:
    """Prompts about to run, in the layout in which they are padded."""

    entered: Sequence[Prompt]
    visual: Bool[Tensor, "b s"]
    frozen: dict[int, Bool[Tensor, "b s"]]  #: Index of an intervention → rows whose updates it zeroes, if any
    pruned: bool


class Run:
    """What an `intervene` block hands out. `counts`: per intervention the number of module calls that it changed;
    Prune, Rescale and EnterAt(0) count forwards of prompts, the others sublayers or blocks."""

    def __init__(self, model: VisionLanguageModel, interventions: tuple[Intervention, ...]) -> None:
        self.model, self.interventions = model, interventions
        self.counts = [0] * len(interventions)
        self._sublayers = {
            index: sublayers_of(value, model.n_layers, model.name) for index, value in enumerate(interventions)
        }
        self._batch: _Batch | None = None
        self._prefill = False
        self._cached = 0
        self._masks: dict[Any, Tensor] = {}
        self._positions: Tensor | None = None

    @property
    def fired(self) -> int:
        """How often all of them together acted."""
        return sum(self.counts)

    def _of(self, kind: type | tuple[type, ...]) -> list[tuple[int, Any]]:
        return [(index, value) for index, value in enumerate(self.interventions) if isinstance(value, kind)]

    # Before a forward: which prompts, and which of their rows -------------------------------------------------------

    @contextmanager
    def _admit(self, prompts: Sequence[Prompt], start: int, total: int, side: Side) -> Iterator[Sequence[Prompt]]:
        """Called by `model.running`: the prompts as they enter layer 0."""
        self._batch = self._prepare(prompts, start, total, side)
        try:
            with ExitStack() as stack:
                for index, _ in self._of(ReleasedLayer0):
                    stack.enter_context(attending(partial(self._rewriting, index)))
                yield self._batch.entered
        finally:
            self._batch = None
            self._masks.clear()

    def _prepare(self, prompts: Sequence[Prompt], start: int, total: int, side: Side) -> _Batch:
        masks: dict[int, Sequence[Tensor]] = {}
        for index, value in self._of(MASKED):
            every = (value.mask,) if isinstance(value.mask, Tensor) else value.mask
            if len(every) != total:
                raise EmbedLensError(
                    f"{type(value).__name__} has {len(every)} masks for {total} prompts: pass a list with one mask per "
                    "prompt, in their order"
                )
            masks[index] = every[start : start + len(prompts)]
        entered = list(prompts)
        own = any(prompt.positions is not None for prompt in prompts)
        if own and any(value.positions == "renumber" for _, value in self._of((Prune, LeaveAt))):
            raise EmbedLensError(f"{self.model.name} places patches by row and column: pass positions='keep'")
        for _, rescale in self._of(Rescale):
            entered = [prompt.rescaled(rescale.factor) for prompt in entered]
        for index, prune in self._of(Prune):
            gaps = prune.positions == "keep"
            entered = [prompt.without(mask, gaps) for prompt, mask in zip(entered, masks[index], strict=True)]
        rows = [torch.arange(len(p), device=p.visual.device) if p.rows is None else p.rows for p in entered]
        laid_out = partial(side_by_side, side=side)

        visual = laid_out([prompt.visual for prompt in entered])
        frozen = {}
        for index, value in enumerate(self.interventions):
            if isinstance(value, (SkipSublayers, LeaveAt)):
                whole = [prompt.spread(mask) for prompt, mask in zip(prompts, masks[index], strict=True)]
                frozen[index] = laid_out([mask[kept] for mask, kept in zip(whole, rows, strict=True)])
            elif isinstance(value, Silence) and value.rows == "text":
                own_text = [nn.functional.pad(p.text[: -1 - p.said], (0, 1 + p.said)) for p in entered]
                frozen[index] = laid_out(own_text)
            elif isinstance(value, (Silence, EnterAt)):
                frozen[index] = visual
        return _Batch(
            entered,
            visual,
            {index: mask for index, mask in frozen.items() if bool(mask.any())},
            any(bool(mask.any()) for index, _ in self._of(Prune) for mask in masks[index]),
        )

    # While it runs ---------------------------------------------------------------------------------------------------

    def _hooks(self, hook: Callable[..., None]) -> None:
        """Everything that acts on the model, by `VisionLanguageModel.intervening`."""
        model = self.model
        if self._of(ReleasedLayer0) and model.decoder.config._attn_implementation != "sdpa":
            raise EmbedLensError("ReleasedLayer0 needs SDPA attention: call model.hf.set_attn_implementation('sdpa')")
        hook(model.decoder.register_forward_pre_hook, self._enter, with_kwargs=True)
        acting: dict[tuple[int, str], list[int]] = {}
        for index, places in self._sublayers.items():
            for place in places:
                acting.setdefault(place, []).append(index)
        for (layer, role), indices in acting.items():
            hook(model.part(layer, role).register_forward_hook, partial(self._freeze, indices))
        for layer, block in enumerate(model.blocks):
            waiting = [index for index, value in self._of(EnterAt) if layer < value.layer]
            gone = [index for index, value in self._of(LeaveAt) if layer >= value.layer]
            if waiting or gone:
                hook(block.register_forward_pre_hook, partial(self._hide, waiting + gone), with_kwargs=True)
            closed = [index for index in gone if self.interventions[index].positions == "renumber"]  # type: ignore[union-attr]
            if closed:
                hook(block.register_forward_pre_hook, partial(self._renumber, closed), with_kwargs=True)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the decoder: is this what was announced, and at which positions does it stand?"""
        batch = self._batch
        if batch is None:
            raise EmbedLensError(
                "an intervention is active, but this forward was not announced: call model.answer, model.logits, "
                "model.hidden_states or el.trace, or wrap the call in `with model.running([prompt])`"
            )
        embeds, past = kwargs["inputs_embeds"], kwargs.get("past_key_values")
        self._cached = 0 if past is None else past.get_seq_length()
        self._prefill = self._cached == 0
        self._masks.clear()
        if self._prefill and embeds.shape[:2] != batch.visual.shape:
            raise EmbedLensError(
                f"the forward runs embeddings of shape {tuple(embeds.shape[:2])}, announced were "
                f"{tuple(batch.visual.shape)}: run what model.running returned"
            )
        if self._prefill:
            for index, value in enumerate(self.interventions):
                whole = isinstance(value, Rescale) or (isinstance(value, EnterAt) and value.layer == 0)
                self.counts[index] += whole or (isinstance(value, Prune) and batch.pruned)
        self._positions = kwargs.get("position_ids")

    def _acting(self, indices: Sequence[int]) -> tuple[tuple[int, ...], Tensor]:
        """Those of the interventions that have rows in this batch, and these rows: Bool[b, s]."""
        frozen = cast(_Batch, self._batch).frozen
        acting = tuple(index for index in indices if index in frozen)
        rows = torch.stack([frozen[index] for index in acting]).any(0) if acting else torch.zeros(0, dtype=torch.bool)
        return acting, rows

    def _freeze(self, indices: Sequence[int], module: nn.Module, args: tuple, output: Any) -> Any:
        """After a sublayer: its update is zero in the rows of these interventions. New tokens are never among them."""
        if not self._prefill:
            return None
        acting, rows = self._acting(indices)
        if not acting:
            return None
        for index in acting:
            self.counts[index] += 1
        update = output[0] if isinstance(output, tuple) else output
        update = update.masked_fill(rows[..., None].to(update.device), 0)
        return (update, *output[1:]) if isinstance(output, tuple) else update

    def _hide(self, indices: Sequence[int], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Before a block without some visual rows, which wait or have left: no other row sees them as keys, in prefill
        or from the cache."""
        acting, rows = self._acting(indices)
        if not acting:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        stock = kwargs.get("attention_mask")
        key = acting, id(stock)  # alive as long as the forward; most models pass one mask to all blocks
        if key not in self._masks:
            self._masks[key] = self._without(rows, stock, hidden)
        for index in acting:
            self.counts[index] += 1
        return args, {**kwargs, "attention_mask": self._masks[key].to(hidden.device)}

    def _renumber(self, indices: Sequence[int], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Before a block that rows have left: what remains stands at positions without gaps."""
        acting, gone = self._acting(indices)
        if not acting:
            return None
        if "position_embeddings" not in kwargs:
            raise EmbedLensError(f"{self.model.name} hands its blocks no rotary embedding: pass positions='keep'")
        hidden = args[0] if args else kwargs["hidden_states"]
        gone = gone.to(hidden.device)
        before = gone.cumsum(1) if self._prefill else gone.sum(1, keepdim=True)
        places = self._cached + torch.arange(hidden.shape[1])[None] if self._positions is None else self._positions
        # a row that has left keeps a position of its own, which nothing reads
        places = (places.to(hidden.device) - before).clamp_min(0)
        return args, {**kwargs, "position_embeddings": self.model.decoder.rotary_emb(hidden, places)}

    def _without(self, rows: Bool[Tensor, "b s"], stock: Tensor | None, hidden: Tensor) -> Tensor:
        """The stock mask Bool or Float[b, 1, q, k], where no other query sees these rows as keys."""
        queries, device = hidden.shape[1], hidden.device
        keys = self._cached + queries if stock is None else stock.shape[-1]
        rows = rows.to(device)
        hidden_keys = nn.functional.pad(rows, (0, keys - rows.shape[1]))[:, None, None, :]
        # The rows themselves keep their view: their updates are zeroed, and a row that sees nothing would be NaN.
        seen = ~(hidden_keys & ~rows[:, None, :, None]) if self._prefill else ~hidden_keys
        kernel = self.model.decoder.config._attn_implementation
        if kernel not in ("sdpa", "eager") or (stock is not None and stock.ndim != 4):
            raise EmbedLensError(f"{kernel!r} attention hides no visual tokens: set_attn_implementation('sdpa') first")
        if stock is None:
            stock = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]
            if kernel == "eager":
                stock = torch.zeros_like(stock, dtype=hidden.dtype).masked_fill(~stock, torch.finfo(hidden.dtype).min)
        if stock.dtype == torch.bool:
            return stock & seen
        return stock.masked_fill(~seen, torch.finfo(stock.dtype).min)

    def _rewriting(
        self, index: int, stock: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
        *mask: Tensor | None, **options: Any,
    ) -> Any:  # fmt: skip
        """The released weights of layer 0, by other values: a weight moved to a key is a value moved to the weight."""
        if module is not self.model.part(0, "attention") or not self._prefill:
            return stock(module, query, key, value, *mask, **options)
        visual = cast(_Batch, self._batch).visual.to(value.device)
        first = value[torch.arange(len(value), device=value.device), :, visual.int().argmax(1)]
        keys = visual[:, None, :, None]
        moved = torch.where(keys, first[:, :, None], value)
        later, weights = stock(module, query, key, moved, *mask, **options)
        bare, _ = stock(module, query, key, value.masked_fill(keys, 0), *mask, **options)
        self.counts[index] += 1
        return torch.where(visual[..., None, None], bare, later), weights


@contextmanager
def intervene(model: VisionLanguageModel, *interventions: Intervention) -> Iterator[Run]:
    """Apply interventions to everything the model runs in the block, in the thread that opened it.

    Other threads may run the model meanwhile, as it is or under interventions of their own; they take turns.

    They compose in any order; two Prune or two EnterAt are refused, several LeaveAt are stages. Masks always cover all
    visual tokens of the prompt as written, also beside Prune. One that never acts is an error at the end of the block.
    """
    if not interventions:
        raise EmbedLensError("no intervention: pass at least one, for example el.Prune(mask)")
    for kind in (Prune, EnterAt):
        if sum(isinstance(value, kind) for value in interventions) > 1:
            raise EmbedLensError(f"several {kind.__name__}: pass one")
    run = Run(model, interventions)
    with model.intervening(run._admit, run._hooks):
        yield run
    for value, count in zip(interventions, run.counts, strict=True):
        if not count:
            raise EmbedLensError(
                f"{type(value).__name__} never acted: run a prompt that it changes in the block, in the same thread, "
                "with model.answer, model.logits, model.hidden_states or el.trace"
            )
