"""What can be done to visual tokens: pruned, frozen, silenced, entered late, dropped half-way or rescaled.

An intervention is a small frozen value; `embedlens.engine.intervene` applies one or several to the stock modules:

    with el.intervene(model, el.Prune(mask)) as run:
        model.answer(prompt)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, get_args

import torch
from torch import Tensor

from embedlens.errors import EmbedLensError

Masks: TypeAlias = Tensor | Sequence[Tensor]
"""Bool[n_visual] for one prompt, or one such mask per prompt, in the order in which the model is given the prompts. In
a sequence single masks may be empty, but not all."""


@dataclass(frozen=True, eq=False)
class Prune:
    """Take visual tokens out of the sequence before layer 0, as if the picture had never had them.

    Hidden states, logits and traces have only the remaining rows, those of `prompt.without(mask)`, and the cache is
    shorter at every layer. The vision tower has still seen all. `positions="keep"` leaves gaps in the rotary positions,
    as the released code does (Section 5 of the paper), and decoding goes on at the length of the whole prompt;
    `"renumber"` closes the gaps, which models refuse whose patches stand at a row and a column (Qwen-VL).

    >>> Prune(torch.tensor([True, True]))
    Traceback (most recent call last):
        ...
    embedlens.errors.EmbedLensError: Prune removes all 2 visual tokens of a picture; keep at least one (mask has no
    False)
    """

    mask: Masks  #: True = removed
    positions: str = "keep"

    def __post_init__(self) -> None:
        for mask in _checked_masks(self):
            if bool(mask.all()):
                raise EmbedLensError(
                    f"Prune removes all {len(mask)} visual tokens of a picture; keep at least one (mask has no False)"
                )


@dataclass(frozen=True, eq=False)
class SkipSublayers:
    """Zero what some sublayers add to masked visual tokens, which still serve keys and values, from their un-updated
    state. With masks of sinks these are the paper's arms (Section 5.1): MLP-2 there, which counts from 1, is 1.5."""

    mask: Masks  #: True = not updated
    at: Sequence[float]  #: n: the attention of layer n; n + 0.5: its MLP; 0-based

    def __post_init__(self) -> None:
        _checked_masks(self)
        if not len(self.at):
            raise EmbedLensError("SkipSublayers skips nothing: name sublayers, for example at=[1.5], layer 1's MLP")
        for place in self.at:
            if place < 0 or 2 * place != int(2 * place):
                raise EmbedLensError(
                    f"there is no sublayer {place}: pass n for the attention of layer n, n + 0.5 for its MLP"
                )
        object.__setattr__(self, "at", tuple(float(place) for place in self.at))


@dataclass(frozen=True)
class Silence:
    """Zero what one kind of sublayer adds to all visual positions (the paper's -vMHA and -vFFN, Section 7.2).

    Text keeps reading their keys and values. What the released code does at the attention of layer 0 `ReleasedLayer0`
    adds. `rows="text"` is the control that the paper lacks, for all text of the prompt but its last position.
    """

    sublayer: str  #: Either "attention" or "mlp"
    layers: Sequence[int] | None = None  #: 0-based; None: all
    rows: str = "visual"  #: Either "visual" or "text"

    def __post_init__(self) -> None:
        if self.rows not in ("visual", "text"):
            raise EmbedLensError(f"there are no rows {self.rows!r}: pass 'visual' or 'text'")
        if self.sublayer not in ("attention", "mlp"):
            raise EmbedLensError(f"there is no sublayer {self.sublayer!r}: pass 'attention' or 'mlp'")
        if self.layers is not None:
            if not len(self.layers):
                raise EmbedLensError("Silence silences nothing: name layers, or leave layers out for all of them")
            object.__setattr__(self, "layers", tuple(self.layers))


@dataclass(frozen=True)
class EnterAt:
    """Let visual tokens join the sequence at a later layer (the paper's L_in, Section 7.2).

    Blocks below `layer` run the text alone, at its original positions; in traces visual tokens wait unchanged, but for
    what some families add between blocks (Qwen3-VL). EnterAt(0) is the plain run.
    """

    layer: int  #: The first block that sees visual tokens, 0-based


@dataclass(frozen=True, eq=False)
class LeaveAt:
    """Take visual tokens out of the sequence at a later layer, as pruners inside the language model do.

    From `layer` on nothing reads these rows, in prefill and while decoding: all other rows are those of a shorter
    sequence. In traces the rows stay, unchanged since they left. Several LeaveAt are the stages of a schedule; a later
    mask need not repeat an earlier one. `positions="keep"` leaves gaps in rotary positions, as FastV's released code
    does; `"renumber"` closes them from `layer` on, as PyramidDrop's does; see `Prune`.
    """

    mask: Masks  #: True = leaves
    layer: int  #: The first block that does not have them, 0-based: FastV's K
    positions: str = "keep"

    def __post_init__(self) -> None:
        _checked_masks(self)


@dataclass(frozen=True)
class Rescale:
    """Multiply projected visual tokens, before layer 0 (Section 6.2 of the paper scales by 0.01), and what families
    add to them between blocks (Qwen3-VL)."""

    factor: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor):
            raise EmbedLensError(f"the factor is {self.factor}: pass a finite number")


@dataclass(frozen=True)
class ReleasedLayer0:
    """What the released code also does when it skips the attention of layer 0, whichever tokens are skipped.

    In that layer visual queries lose all visual keys, and their weights are not normalised anew; every later query
    moves its whole attention on visual tokens to the first of them. The paper does not mention it. It acts in prefill
    only, as released, and leaves updates in place: `intervene(model, Silence("attention"), ReleasedLayer0())` is the
    released -vMHA, `Silence("attention")` alone the described one. Attention masses in a trace are those before the
    rewriting.
    """


MASKED = (Prune, SkipSublayers, LeaveAt)  # with a mask per prompt
Intervention: TypeAlias = Prune | SkipSublayers | LeaveAt | Silence | EnterAt | Rescale | ReleasedLayer0


def _checked_masks(value: Prune | SkipSublayers | LeaveAt) -> tuple[Tensor, ...]:
    name = type(value).__name__
    if getattr(value, "positions", "keep") not in ("keep", "renumber"):
        raise EmbedLensError(f"positions is {value.positions!r}: pass 'keep' or 'renumber'")  # type: ignore[union-attr]
    masks = (value.mask,) if isinstance(value.mask, Tensor) else tuple(value.mask)
    for mask in masks:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise EmbedLensError(f"the mask of {name} is {kind}: pass a torch.bool tensor, True where it acts")
        if mask.ndim != 1:
            what = f"the mask of {name} has shape {tuple(mask.shape)}"
            raise EmbedLensError(f"{what}: pass one True or False per visual token, and a list for several prompts")
    if not any(bool(mask.any()) for mask in masks):
        raise EmbedLensError(f"the mask of {name} is empty: mark at least one visual token, or run without it")
    return masks


def sublayers_of(value: Intervention, n_layers: int, name: str) -> list[tuple[int, str]]:
    """(layer, role) of the sublayers whose update an intervention zeroes, in the model of that name."""
    if not isinstance(value, Intervention):
        known = ", ".join(kind.__name__ for kind in get_args(Intervention))
        raise EmbedLensError(f"{type(value).__name__} is no intervention: pass one of {known}")
    layers, roles = list(range(n_layers)), ("attention", "mlp")
    if isinstance(value, SkipSublayers):
        found = [(int(place), roles[place != int(place)]) for place in sorted(set(value.at))]
    elif isinstance(value, Silence):
        found = [(layer, value.sublayer) for layer in dict.fromkeys(layers if value.layers is None else value.layers)]
    elif isinstance(value, (EnterAt, LeaveAt)):
        own = layers[: value.layer] if isinstance(value, EnterAt) else layers[value.layer :]
        found = [(layer, role) for layer in own for role in roles]
    else:
        found = []
    named = [value.layer] if isinstance(value, (EnterAt, LeaveAt)) else [layer for layer, _ in found]
    for layer in named:
        if not 0 <= layer < n_layers:
            raise EmbedLensError(f"there is no layer {layer} in {name}: pass 0 to {n_layers - 1}")
    return found
