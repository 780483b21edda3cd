"""Many answers about few pictures: what prompts on a picture begin with runs once and is remembered.

What a decoder computes for a row depends on the rows before it alone, so that the keys and values of all rows up to the
end of the picture, under some interventions, serve every question on it. Questions on a picture stand in one row and do
not see each other. Interventions that go on behind the picture, but for late entry, and models for which this is not so
(image rows that see what follows, patches with rotary positions of their own), are asked prompt by prompt, as
`model.answers` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from embedlens.engine import intervene
from embedlens.errors import EmbedLensError
from embedlens.interventions import MASKED, EnterAt, Intervention, LeaveAt, Prune, ReleasedLayer0, Silence
from embedlens.prompts import side_by_side
from embedlens.vlm import Prompt, VisionLanguageModel

TOGETHER = 8  # questions on a picture that run in one row
HELD = 2  # times `batch_size`: pictures under a plan that are remembered at a time
# whose a column is: of all questions (a patch from its layer of entry on), or of one of its row; of none where padded
PATCH, ALL, FIRST = -1, 1, 2
_SHARING: WeakKeyDictionary[VisionLanguageModel, bool] = WeakKeyDictionary()  # what `_remembers` has found


@dataclass(frozen=True, eq=False)
class Case:
    """A prompt to answer, and what is done to its picture's tokens meanwhile."""

    prompt: Prompt
    plan: tuple[Intervention, ...] = ()  #: Interventions, masks for this prompt alone; empty: none
    kind: str = ""  #: Answers of a kind are of like length; those run together


@torch.no_grad()
def answers(
    model: VisionLanguageModel, cases: Sequence[Case], max_new_tokens: int = 16, batch_size: int = 32
) -> list[str]:
    """Greedy answers, the same as those of each prompt alone under its interventions.

    Build further questions on a picture with `model.asked`. `batch_size` pictures run together, with eight questions
    each. EmbedLensError: an intervention that does not fit the model or the prompt, or that never acts.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise EmbedLensError(f"max_new_tokens is {max_new_tokens}, batch_size {batch_size}: allow at least 1 of each")
    for case in cases:
        model.check_length(case.prompt, max_new_tokens)
    units: dict[Any, list[int]] = {}  # of one picture under one plan
    whole: dict[Any, list[int]] = {}  # of like interventions, to be asked prompt by prompt
    for place in sorted(range(len(cases)), key=lambda place: (cases[place].kind, len(cases[place].prompt), place)):
        prompt, plan = cases[place].prompt, cases[place].plan
        if _over_with_the_picture(prompt, plan) and model.intervention is None and _remembers(model, prompt):
            picture = id(prompt.pixel_values), prompt.ids[: _end(prompt)].cpu().numpy().tobytes()
            units.setdefault((signature(plan), picture, identity(plan)), []).append(place)
        else:
            whole.setdefault(signature(plan), []).append(place)
    found: dict[int, str] = {}
    for places in whole.values():
        with _intervening(model, [cases[place].plan for place in places]):
            texts = model.answers([cases[place].prompt for place in places], max_new_tokens, batch_size)
        found |= dict(zip(places, texts, strict=True))
    own = list(units.items())
    for start in range(0, len(own), HELD * batch_size):
        found |= _answered(model, cases, dict(own[start : start + HELD * batch_size]), max_new_tokens, batch_size)
    return [found[place] for place in range(len(cases))]


# --- which prompts have what in common -------------------------------------------------------------------------------


def signature(plan: Sequence[Intervention]) -> Any:
    """What interventions of several prompts must have in common to run together; masks may differ."""
    return tuple(
        (type(value), *(getattr(value, field.name) for field in fields(value) if field.name != "mask"))
        for value in plan
    )


def identity(plan: Sequence[Intervention]) -> Any:
    """Equal for plans that do the same to a picture."""
    return signature(plan), *(_mask_of(value).cpu().numpy().tobytes() for value in plan if isinstance(value, MASKED))


def _mask_of(value: Any) -> Tensor:
    if not isinstance(value.mask, Tensor):
        raise EmbedLensError(f"{type(value).__name__} has a list of masks: pass each prompt's plan its own mask")
    return value.mask


def _over_with_the_picture(prompt: Prompt, plan: Sequence[Intervention]) -> bool:
    """Whether nothing is done to what follows the picture, and embeddings are all that it brings."""
    ongoing = any(
        isinstance(value, (LeaveAt, ReleasedLayer0)) or (isinstance(value, Silence) and value.rows == "text")
        for value in plan
    )
    return not ongoing and prompt.positions is None and prompt.deep is None and prompt.rows is None


def _end(prompt: Prompt) -> int:
    """The row after the last of the picture."""
    return int(prompt.visual.nonzero()[-1, 0]) + 1


def _intervening(model: VisionLanguageModel, plans: Sequence[Sequence[Intervention]]) -> AbstractContextManager[Any]:
    """The interventions of several prompts as one each, with a mask per prompt."""
    merged = [
        replace(values[0], mask=[_mask_of(value) for value in values]) if isinstance(values[0], MASKED) else values[0]
        for values in zip(*plans, strict=True)
    ]
    return intervene(model, *merged) if merged else nullcontext()


# --- running ---------------------------------------------------------------------------------------------------------

Memory: TypeAlias = tuple[Tensor, list[tuple[Tensor, Tensor]]]
"""Of a prompt's first rows which are visual; and their keys and values, each Float[rows, heads, c], layer by layer."""


def _answered(
    model: VisionLanguageModel, cases: Sequence[Case], units: dict[Any, list[int]], max_new_tokens: int, batch_size: int
) -> dict[int, str]:
    """Answers to questions on pictures that are remembered at the same time."""
    memories: dict[Any, Memory] = {}
    for kind in dict.fromkeys(key[0] for key in units):
        alike = [key for key in units if key[0] == kind]
        for start in range(0, len(alike), batch_size):
            keys = alike[start : start + batch_size]
            leading = [cases[units[key][0]] for key in keys]
            with _intervening(model, [case.plan for case in leading]):
                memories |= dict(zip(keys, _remembered(model, [case.prompt for case in leading]), strict=True))
    rows = [
        (key, own[first : first + TOGETHER]) for key, own in units.items() for first in range(0, len(own), TOGETHER)
    ]
    # rows of like questions: little is padded, and short answers do not wait for long ones
    rows.sort(key=lambda row: (len(row[1]), cases[row[1][0]].kind, sum(len(cases[place].prompt) for place in row[1])))
    layers = [next((v.layer for v in cases[own[0]].plan if isinstance(v, EnterAt)), 0) for _, own in rows]
    found: dict[int, str] = {}
    for layer in sorted(set(layers)):  # from which the picture is seen
        alike = [row for row, own in zip(rows, layers, strict=True) if own == layer]
        for start in range(0, len(alike), batch_size):
            ahead, places = zip(*alike[start : start + batch_size], strict=True)
            asked = [[cases[place] for place in row] for row in places]
            texts = _decoded(model, [memories[key] for key in ahead], asked, max_new_tokens, layer)
            found |= dict(zip((place for row in places for place in row), texts, strict=True))
    return found


def _remembered(model: VisionLanguageModel, prompts: Sequence[Prompt]) -> list[Memory]:
    """Runs prompts up to the end of their pictures."""
    from transformers import DynamicCache

    past = DynamicCache()
    cut = [
        replace(prompt, ids=prompt.ids[:end], embeds=prompt.embeds[:end], visual=prompt.visual[:end])
        for prompt, end in zip(prompts, map(_end, prompts), strict=True)
    ]
    with model.running(cut) as entered:
        embeds, mask = model.padded(entered)
        model.decoder(inputs_embeds=embeds, attention_mask=mask, past_key_values=past, use_cache=True)
    by_row = [(layer.keys.transpose(1, 2), layer.values.transpose(1, 2)) for layer in past.layers]
    return [
        (prompt.visual, [(keys[row, : len(prompt)], values[row, : len(prompt)]) for keys, values in by_row])
        for row, prompt in enumerate(entered)
    ]


def _decoded(
    model: VisionLanguageModel, memories: Sequence[Memory], asked: Sequence[Sequence[Case]], most: int, enter: int = 0
) -> list[str]:
    """Answers to the questions that follow remembered pictures, row by row: the likeliest token, again and again.
    Blocks before `enter` do not see the pictures."""
    from transformers import DynamicCache

    beside = partial(side_by_side, side="left")
    layers = zip(*(memory for _, memory in memories), strict=True)
    past = DynamicCache([[beside(part).transpose(1, 2) for part in zip(*layer, strict=True)] for layer in layers])
    owner = beside([torch.where(visual.cpu(), PATCH, ALL) for visual, _ in memories])
    embeds = beside([torch.cat([case.prompt.embeds[_end(case.prompt) :] for case in row]) for row in asked])
    own, positions = torch.zeros(2, *embeds.shape[:2], dtype=torch.long)
    questions = []  # row, number within it, the column that gives its first token, the position of that token
    for row, cases in enumerate(asked):
        stop = embeds.shape[1]
        for number, case in reversed(list(enumerate(cases))):
            end, length = _end(case.prompt), len(case.prompt)
            closing = [value for value in case.plan if isinstance(value, Prune) and value.positions != "keep"]
            closed = sum(int(_mask_of(value).sum()) for value in closing)  # positions after the picture
            own[row, stop - (length - end) : stop] = FIRST + number
            positions[row, stop - (length - end) : stop] = torch.arange(end, length) - closed
            questions.append((row, number, stop - 1, length - closed))
            stop -= length - end
    rows, numbers, columns, following = torch.tensor(sorted(questions)).T.contiguous()
    head, embedding, greedy = model.unembed.head, model.hf.get_input_embeddings(), model.greedy(most)
    written = torch.full((len(rows), most), greedy.pad_token_id)
    going = torch.arange(len(rows))  # the questions whose answers have not ended
    for step in range(most):
        owner = torch.cat([owner, own], 1)
        seen = ((owner.abs() == ALL)[:, None] | (owner[:, None] == own[..., None])).tril(owner.shape[1] - own.shape[1])
        least = torch.finfo(embeds.dtype).min
        mask = torch.zeros(seen.shape, dtype=embeds.dtype).masked_fill(~seen, least)[:, None].to(embeds.device)
        patches = (owner == PATCH)[:, None, None].to(embeds.device)
        without = partial(_seeing, mask.masked_fill(patches, least)) if enter else None
        with model.lock, ExitStack() as hooks:
            for block in model.blocks[:enter]:
                hooks.callback(block.register_forward_pre_hook(without, with_kwargs=True).remove)
            hidden = model.decoder(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions.to(embeds.device),
                past_key_values=past,
                use_cache=True,
            ).last_hidden_state
        chosen = head(hidden[rows[going], columns].to(head.weight.device)).argmax(-1).cpu()
        written[going, step] = chosen
        more = ~torch.isin(chosen, torch.tensor(greedy.eos_token_id))
        going, chosen = going[more], chosen[more]
        if not len(going):
            break
        left = rows[going].unique()
        if 2 * len(left) <= len(owner):  # most have ended
            past.batch_select_indices(left)
            owner, rows = owner[left], torch.searchsorted(left, rows)
        at = rows[going]
        columns = torch.arange(len(going)) - torch.searchsorted(at, at)
        ids, own, positions = torch.zeros(3, len(owner), int(columns.max()) + 1, dtype=torch.long)
        ids[at, columns], own[at, columns] = chosen, FIRST + numbers[going]
        positions[at, columns] = following[going] + step
        embeds = embedding(ids.to(model.device))
    return [text.strip() for text in model.tokenizer.batch_decode(written, skip_special_tokens=True)]


def _seeing(mask: Tensor, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Before a block: another attention mask than the rest have."""
    return args, {**kwargs, "attention_mask": mask}


def _remembers(model: VisionLanguageModel, prompt: Prompt) -> bool:
    """Whether a question behind a remembered picture is read as in the whole prompt: tried once for each model."""
    config = model.decoder.config
    if config._attn_implementation not in ("sdpa", "eager") or getattr(config, "sliding_window", None):
        return False  # which take no mask of one's own
    if model not in _SHARING:
        whole = model.logits(prompt)[-1].float()
        with model.lock, model.recording() as layers:
            _decoded(model, _remembered(model, [prompt]), [[Case(prompt)]], 1)
        logits = model.unembed(layers[-1][0, -1]).float()
        near = {"rtol": 1e-2, "atol": 1e-2 * float(whole.abs().max())}
        _SHARING[model] = torch.allclose(logits, whole.to(logits.device), **near)
    return _SHARING[model]
