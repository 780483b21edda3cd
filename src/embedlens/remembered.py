"""Keys and values of the beginnings of prompts: what a decoder has computed for some rows, and goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from embedlens.prompts import side_by_side

if TYPE_CHECKING:
    from embedlens.vlm import Prompt, VisionLanguageModel

ALL, NONE = -1, -2  # whose a column is, where it is not one question's


@dataclass(frozen=True, eq=False)
class Memory:
    """Keys and values of the first rows of a prompt: one tensor for all layers that follow each other on a device."""

    banks: tuple[Float[Tensor, "layers 2 heads rows c"], ...]

    def __len__(self) -> int:
        return self.banks[0].shape[-2]

    def first(self, rows: int) -> Memory:
        """What is remembered of fewer rows."""
        return Memory(tuple(bank[..., :rows, :] for bank in self.banks))


class Table:
    """Keys and values of a batch while it runs: what is remembered, then what is new, with room for answers.

    A row may hold several questions on one picture. `owner` says for every column whose it is: of question 0, 1, ...,
    of all (ALL), or of none, as padding is (NONE). Questions do not see each other.
    """

    def __init__(
        self,
        memories: Sequence[Memory],
        owners: Sequence[Int[Tensor, " _"]],
        side: Literal["left", "right"],
        room: int = 0,
    ) -> None:
        from transformers.cache_utils import Cache

        self.begins = [len(memory) for memory in memories]
        self.before = max(self.begins)
        columns = self.before + max(map(len, owners)) + room
        self.banks: list[Float[Tensor, "layers 2 b heads columns c"]] = []
        for parts in zip(*(memory.banks for memory in memories), strict=True):
            layers, _, heads, _, width = parts[0].shape
            # zeros: a masked key still counts with weight zero, so it has to be finite
            bank = parts[0].new_zeros(layers, 2, len(parts), heads, columns, width)
            for row, (part, begin) in enumerate(zip(parts, self.begins, strict=True)):
                bank[:, :, row, :, self.before - begin : self.before] = part
            self.banks.append(bank)
        # counted from NONE, as padding is zeros
        known = [torch.full((begin,), ALL) for begin in self.begins]
        whole = [torch.cat(parts) - NONE for parts in zip(known, owners, strict=True)]
        laid = side_by_side(whole, side, self.begins) + NONE
        self.owner = nn.functional.pad(laid, (0, room), value=NONE).to(self.banks[0].device)
        self.several = int(self.owner.max()) > 0
        self.cache = Cache(layers=[])
        self._laid(self.before)

    def _laid(self, used: int) -> None:
        self.cache.layers = [_stored()(*layer, used) for bank in self.banks for layer in bank]

    def keep(self, rows: Int[Tensor, " left"]) -> None:
        """Go on with some rows of the batch."""
        used = self.cache.get_seq_length()
        self.banks = [bank[:, :, rows.to(bank.device)] for bank in self.banks]
        self.owner = self.owner[rows.to(self.owner.device)]
        self._laid(used)

    def mask(self, queries: int) -> Tensor:
        """What the next so many columns may see: Int[b, k], or Bool[b, 1, q, k] where a row holds several questions."""
        used = self.cache.get_seq_length()
        owner, own = self.owner[:, : used + queries], self.owner[:, used : used + queries]
        if not self.several:
            return (owner != NONE).long()
        columns = torch.arange(used + queries, device=owner.device)
        before = columns <= columns[used:, None]
        return ((owner == ALL)[:, None] | (owner[:, None] == own[:, :, None]))[:, None] & before

    def memory(self, row: int, length: int) -> Memory:
        """What a row of a batch that is padded on the right will be remembered by."""
        begin = self.before - self.begins[row]
        return Memory(tuple(bank[:, :, row, :, begin : self.before + length] for bank in self.banks))


class Remembered(Exception):
    """The last keys and values are there: the rest of a forward would be of no use."""


@cache
def _stored() -> type:
    """The class of a cache layer that writes into a place kept for it, where a dynamic one copies itself every step."""
    from transformers.cache_utils import DynamicLayer

    class Stored(DynamicLayer):
        def __init__(self, keys: Tensor, values: Tensor, used: int) -> None:
            super().__init__()
            self.place, self.used, self.last = (keys, values), used, False
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            end = self.used + key_states.shape[-2]
            for place, states in zip(self.place, (key_states, value_states), strict=True):
                place[:, :, self.used : end] = states
            self.used = end
            if self.last:
                raise Remembered
            self.keys, self.values = (place[:, :, :end] for place in self.place)
            return self.keys, self.values

        def get_seq_length(self) -> int:
            return self.used

    return Stored


_EMPTY: WeakKeyDictionary[VisionLanguageModel, Memory | None] = WeakKeyDictionary()


def empty_of(model: VisionLanguageModel, prompt: Prompt) -> Memory | None:
    """Memory of no rows; None if rows see later ones or the model's cache is no list of keys and values."""
    if model not in _EMPTY:
        with model.lock:
            _EMPTY[model] = _probed(model, prompt)
    return _EMPTY[model]


@torch.no_grad()
def _probed(model: VisionLanguageModel, prompt: Prompt) -> Memory | None:
    """Runs a prompt in four pieces; None if that gives other logits than in one."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    whole = model.logits(prompt)[-1].float()
    found = DynamicCache()
    first, end = extent(prompt)
    borders = sorted({0, first, (first + end) // 2, end, len(prompt)})
    hidden = torch.zeros(0)
    for start, stop in zip(borders, borders[1:], strict=False):
        positions = torch.arange(start, stop, device=model.device)[None]
        hidden = model.decoder(
            inputs_embeds=prompt.embeds[None, start:stop], position_ids=positions, past_key_values=found, use_cache=True
        ).last_hidden_state
    head = model.unembed.head
    logits = head(hidden[0, -1].to(head.weight.device))[: len(whole)].float()
    alike = torch.allclose(logits, whole.to(logits.device), rtol=1e-2, atol=1e-2 * float(whole.abs().max()))
    layers = [layer for layer in found.layers if type(layer) is DynamicLayer and layer.keys is not None]
    same = all(layer.keys.shape == layer.values.shape for layer in layers)
    if not alike or not same or len(layers) != model.n_layers:
        return None
    empty = [torch.stack([layer.keys[0, :, :0], layer.values[0, :, :0]]) for layer in layers]
    together = groupby(empty, key=lambda layer: (layer.device, layer.dtype, layer.shape))
    return Memory(tuple(torch.stack(list(bank)) for _, bank in together))


def extent(prompt: Prompt) -> tuple[int, int]:
    """(the first row of the picture, the row after its last)."""
    rows = prompt.visual.nonzero()[:, 0]
    return int(rows[0]), int(rows[-1]) + 1


def forward(
    model: VisionLanguageModel, table: Table, embeds: Float[Tensor, "b s d"], positions: Int[Tensor, "b s"]
) -> Float[Tensor, "b s d"]:
    return model.decoder(
        inputs_embeds=embeds,
        attention_mask=table.mask(embeds.shape[1]),
        position_ids=positions.to(embeds.device),
        past_key_values=table.cache,
        use_cache=True,
    ).last_hidden_state
