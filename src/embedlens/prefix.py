"""Many answers about few pictures: what prompts begin with runs once and is remembered.

A prompt is text, a picture, a question. What a decoder computes for a row depends on the rows before it alone, so its
keys and values for the leading text serve all pictures, those for the picture serve all its questions, and those before
the first visual token that an intervention touches serve the intervention as well. Questions and answers then run on
what is remembered, batched. The modules are the stock ones; only the order of the work is ours.

A model for which this is not so (image rows that see later rows, caches of another kind, decoding that is more than
greedy) is found out by a comparison on the first prompt; it answers prompt by prompt then, as `model.answers` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from embedlens.engine import intervene
from embedlens.errors import EmbedLensError
from embedlens.interventions import MASKED, EnterAt, Intervention, LeaveAt, Prune, ReleasedLayer0, Silence, sublayers_of
from embedlens.prompts import side_by_side
from embedlens.remembered import ALL, NONE, Memory, Remembered, Table, empty_of, extent, forward

if TYPE_CHECKING:
    from embedlens.vlm import Prompt, VisionLanguageModel

TOGETHER = 8  # questions on a picture that run in one row
HELD = 2  # remembered pictures, in batches: under how many arms a picture is kept decides how many pictures those are


@dataclass(frozen=True, eq=False)
class Case:
    """A prompt to answer, and what is done to its picture's tokens meanwhile."""

    prompt: Prompt
    plan: tuple[Intervention, ...] = ()
    """Interventions, masks for this prompt alone; empty: none."""
    kind: str = ""
    """Answers of a kind are of like length; those run together."""


@torch.no_grad()
def answers(
    model: VisionLanguageModel, cases: Sequence[Case], max_new_tokens: int = 16, batch_size: int = 32
) -> list[str]:
    """Greedy answers, the same as those of each prompt alone under its interventions.

    Prompts share what the picture of `prompt.image` and equal interventions have in common; build further questions
    on a picture with `model.asked`.

    Args:
        model: from `embedlens.load`.
        cases: in any order.
        max_new_tokens: of an answer.
        batch_size: pictures that run together, each with up to eight questions; about three times as many are held in
            memory.

    Raises:
        EmbedLensError: an intervention that does not fit the model or the prompt, or that never acts.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise EmbedLensError(f"max_new_tokens is {max_new_tokens}, batch_size {batch_size}: allow at least 1 of each")
    if not cases:
        return []
    for case in cases:
        model.check_length(case.prompt, max_new_tokens)
    found: dict[int, str] = {}
    alone = [any(isinstance(value, Silence) and value.rows == "text" for value in case.plan) for case in cases]
    if any(alone) and not all(alone):  # silenced text runs as a whole: its question is part of what is silenced
        for kind in (True, False):
            places = [place for place, one in enumerate(alone) if one is kind]
            said = answers(model, [cases[place] for place in places], max_new_tokens, batch_size)
            found |= dict(zip(places, said, strict=True))
        return [found[place] for place in range(len(cases))]
    sharing = not any(alone) and model.intervention is None and all(_plain(case.prompt) for case in cases)
    empty = empty_of(model, cases[0].prompt) if sharing else None
    if empty is None:
        return _unshared(model, cases, max_new_tokens, batch_size)
    before: dict[bytes, Memory] = {b"": empty}  # by the ids of the text
    for places in _groups(cases, HELD * batch_size):
        group = {place: cases[place] for place in places}
        found |= _answered(model, group, before, max_new_tokens, batch_size)
    return [found[place] for place in range(len(cases))]


def _plain(prompt: Prompt) -> bool:
    """Whether the embeddings are all that a prompt brings: no rotary positions or deep features of its own."""
    return getattr(prompt, "positions", None) is None and getattr(prompt, "deep", None) is None


# --- which prompts have what in common -------------------------------------------------------------------------------


def signature(value: Intervention) -> Any:
    """What interventions of several prompts must have in common to run together; masks may differ."""
    if isinstance(value, MASKED):
        return type(value), *(getattr(value, field.name) for field in fields(value) if field.name != "mask")
    return value


def identity(plan: Sequence[Intervention]) -> tuple[Any, ...]:
    """Equal for plans that do the same to a picture."""
    return tuple((signature(value), _mask_of(value).cpu().numpy().tobytes()) for value in plan)


def _mask_of(value: Intervention) -> Tensor:
    """The mask of an intervention on one prompt; empty if it has none."""
    if not isinstance(value, MASKED):
        return torch.zeros(0, dtype=torch.bool)
    if not isinstance(value.mask, Tensor):
        raise EmbedLensError(f"{type(value).__name__} has a list of masks: pass each prompt's plan its own mask")
    return value.mask


def merged(plans: Sequence[Sequence[Intervention]]) -> list[Intervention]:
    """The interventions of several prompts as one each, with a mask per prompt."""
    together: list[Intervention] = []
    for values in zip(*plans, strict=True):
        first = values[0]
        if isinstance(first, MASKED):
            first = replace(first, mask=[value.mask for value in values])
        together.append(first)
    return together


@dataclass(frozen=True, eq=False)
class _Unit:
    """What several cases share: everything up to the end of the picture, under one plan."""

    prompt: Prompt
    """Of one of them, cut off behind the picture."""
    plan: tuple[Intervention, ...]
    cases: list[int]

    @property
    def touched(self) -> int:
        """The first row that the plan may change."""
        first, _ = extent(self.prompt)
        if not all(isinstance(value, MASKED) for value in self.plan):
            return first
        return min((int(self.prompt.spread(_mask_of(value)).int().argmax()) for value in self.plan), default=first)

    @property
    def pruned(self) -> int:
        """Rows that the plan takes out."""
        return sum(int(_mask_of(value).sum()) for value in self.plan if isinstance(value, Prune))

    @property
    def rows(self) -> int:
        """Rows that remain."""
        return len(self.prompt) - self.pruned

    @property
    def gap(self) -> int:
        """By how much the positions of what follows the picture close up."""
        renumbered = any(isinstance(value, Prune) and value.positions == "renumber" for value in self.plan)
        return self.pruned if renumbered else 0


def _picture_of(prompt: Prompt) -> tuple[int, bytes]:
    """Equal for prompts that begin alike: the same picture, after the same text."""
    _, end = extent(prompt)
    return id(prompt.pixel_values), prompt.ids[:end].cpu().numpy().tobytes()


def _groups(cases: Sequence[Case], most: int) -> Iterator[list[int]]:
    """Places of cases, all of a picture together, so that at most about `most` pictures under a plan are remembered."""
    of_picture: dict[Any, list[int]] = {}
    for place, case in enumerate(cases):
        of_picture.setdefault(_picture_of(case.prompt), []).append(place)
    # pictures whose questions are alike come together: their answers end together
    order = sorted(of_picture.values(), key=lambda own: (cases[own[0]].kind, len(cases[own[0]].prompt), own[0]))
    group: list[int] = []
    held = 0
    for places in order:
        plans = len({identity(cases[place].plan) for place in places})
        if group and held + plans > most:
            yield group
            group, held = [], 0
        group += places
        held += plans
    if group:
        yield group


# --- running ---------------------------------------------------------------------------------------------------------


def _unshared(model: VisionLanguageModel, cases: Sequence[Case], max_new_tokens: int, batch_size: int) -> list[str]:
    """Whole prompts in batches of like interventions."""
    found: dict[int, str] = {}
    alike: dict[Any, list[int]] = {}
    order = sorted(range(len(cases)), key=lambda place: (cases[place].kind, len(cases[place].prompt), place))
    for place in order:
        alike.setdefault(tuple(map(signature, cases[place].plan)), []).append(place)
    for places in alike.values():
        prompts = [cases[place].prompt for place in places]
        with _intervening(model, [cases[place].plan for place in places]):
            found |= dict(zip(places, model.answers(prompts, max_new_tokens, batch_size), strict=True))
    return [found[place] for place in range(len(cases))]


@contextmanager
def _intervening(model: VisionLanguageModel, plans: Sequence[tuple[Intervention, ...]]) -> Iterator[None]:
    if not plans[0]:
        yield
        return
    with intervene(model, *merged(plans)):
        yield


@contextmanager
def _entering(
    model: VisionLanguageModel, prompts: Sequence[Prompt], begins: Sequence[int], side: str
) -> Iterator[Sequence[Prompt]]:
    """`model.running`, for prompts whose first rows are remembered."""
    with model.lock:
        if model.intervention is None:
            yield prompts
            return
        with model.intervention(prompts, 0, len(prompts), side, begins) as entered:
            yield entered


def _answered(
    model: VisionLanguageModel,
    cases: dict[int, Case],
    before: dict[bytes, Memory],
    max_new_tokens: int,
    batch_size: int,
) -> dict[int, str]:
    """Answers to cases whose pictures are remembered at the same time."""
    units = _units(cases)
    memories = _remembered(model, units, before, batch_size)
    alike: dict[Any, list[tuple[int, list[int]]]] = {}
    for number, unit in enumerate(units):
        # most interventions are over when the picture has run: their questions run together with all others
        ongoing = any(isinstance(value, (EnterAt, LeaveAt, ReleasedLayer0)) for value in unit.plan)
        most = 1 if ongoing else _together(model)
        own = sorted(unit.cases, key=lambda place: (cases[place].kind, len(cases[place].prompt), place))
        rows = [(number, own[start : start + most]) for start in range(0, len(own), most)]
        alike.setdefault(tuple(map(signature, unit.plan)) if ongoing else (), []).extend(rows)
    found: dict[int, str] = {}
    for kind, rows in alike.items():
        # rows of like questions: little is padded, and short answers do not wait for long ones
        rows.sort(key=lambda row: (len(row[1]), cases[row[1][0]].kind, _asked_rows(cases, row[1]), row[1]))
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            prompts = [[cases[place].prompt for place in places] for _, places in batch]
            gaps = [units[number].gap for number, _ in batch]
            known = [memories[number] for number, _ in batch]
            with _intervening(model, [units[number].plan if kind else () for number, _ in batch]):
                texts = _decoded(model, prompts, known, gaps, max_new_tokens)
            found |= dict(zip((place for _, places in batch for place in places), texts, strict=True))
    return found


def _together(model: VisionLanguageModel) -> int:
    """How many questions a row may hold: several need a mask of their own, which is not for every kind of attention."""
    config = model.decoder.config
    own_mask = config._attn_implementation == "sdpa" and not getattr(config, "sliding_window", None)
    return TOGETHER if own_mask else 1


def _asked_rows(cases: dict[int, Case], places: Sequence[int]) -> int:
    return sum(len(cases[place].prompt) - extent(cases[place].prompt)[1] for place in places)


def _units(cases: dict[int, Case]) -> list[_Unit]:
    shared: dict[Any, list[int]] = {}
    for place, case in cases.items():
        shared.setdefault((_picture_of(case.prompt), identity(case.plan)), []).append(place)
    return [
        _Unit(_cut(cases[places[0]].prompt, extent(cases[places[0]].prompt)[1]), cases[places[0]].plan, places)
        for places in shared.values()
    ]


def _cut(prompt: Prompt, end: int) -> Prompt:
    return replace(prompt, ids=prompt.ids[:end], embeds=prompt.embeds[:end], visual=prompt.visual[:end])


def _remembered(
    model: VisionLanguageModel, units: Sequence[_Unit], before: dict[bytes, Memory], batch_size: int
) -> list[Memory]:
    """Every unit's rows, run on top of what it shares with others."""
    found: dict[int, Memory] = {}
    plain: dict[Any, Memory] = {}
    alike: dict[Any, list[int]] = {(): []}  # without a plan first: the others build on them
    for number, unit in enumerate(units):
        alike.setdefault(tuple(map(signature, unit.plan)), []).append(number)
    for numbers in alike.values():
        known = {number: _known(model, units[number], plain, before) for number in numbers}
        # those with as many rows to run together, as nothing is padded then
        numbers = sorted(numbers, key=lambda number: (units[number].rows - len(known[number]), number))
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            plans = [units[number].plan for number in batch]
            prompts, own = [units[number].prompt for number in batch], [known[number] for number in batch]
            with _intervening(model, plans):
                memories = _extended(model, prompts, own, short=not _acts_last(model, plans[0]))
            found |= dict(zip(batch, memories, strict=True))
            plain |= {_picture_of(units[number].prompt): found[number] for number in batch if not units[number].plan}
    return [found[number] for number in range(len(units))]


def _known(model: VisionLanguageModel, unit: _Unit, plain: dict[Any, Memory], before: dict[bytes, Memory]) -> Memory:
    """What is remembered already of a unit's rows: the picture as it is, or the text before it."""
    picture = plain.get(_picture_of(unit.prompt)) if unit.plan else None
    if picture is None:
        picture = _leading(model, unit.prompt, before)
    # one row is left to run, so that the plan acts where nothing remains behind what it prunes
    return picture.first(min(unit.touched, len(picture), unit.rows - 1))


def _acts_last(model: VisionLanguageModel, plan: Sequence[Intervention]) -> bool:
    """Whether a plan does something in the last layer."""
    last = model.n_layers - 1
    return not last or any(layer == last for value in plan for layer, _ in sublayers_of(value, model.n_layers, ""))


def _leading(model: VisionLanguageModel, prompt: Prompt, before: dict[bytes, Memory]) -> Memory:
    """What stands before the picture: the same for all pictures."""
    first, _ = extent(prompt)
    key = prompt.ids[:first].cpu().numpy().tobytes()
    if key not in before:
        before[key] = _extended(model, [_cut(prompt, first)], [before[b""]])[0]
    return before[key]


def _extended(
    model: VisionLanguageModel, prompts: Sequence[Prompt], known: Sequence[Memory], short: bool = True
) -> list[Memory]:
    """What is remembered of whole prompts, of whose first rows it is known.

    `short`: the forward may end with the last layer's keys and values, as nothing acts on what comes after them.
    """
    begins = [len(memory) for memory in known]
    with _entering(model, prompts, begins, "right") as entered:
        new = [len(prompt) - begin for prompt, begin in zip(entered, begins, strict=True)]
        table = Table(known, [torch.full((length,), ALL) for length in new], "right")
        table.cache.layers[-1].last = short
        embeds = [prompt.embeds[begin:] for prompt, begin in zip(entered, begins, strict=True)]
        positions = [torch.arange(begin, len(prompt)) for prompt, begin in zip(entered, begins, strict=True)]
        with suppress(Remembered):
            forward(model, table, side_by_side(embeds, "right"), side_by_side(positions, "right"))
    return [table.memory(row, length) for row, length in enumerate(new)]


def _decoded(
    model: VisionLanguageModel,
    asked: Sequence[Sequence[Prompt]],
    memories: Sequence[Memory],
    gaps: Sequence[int],
    max_new_tokens: int,
) -> list[str]:
    """Answers to the questions that follow remembered pictures, row by row."""
    with _entering(model, [prompts[0] for prompts in asked], [len(memory) for memory in memories], "left"):
        embeds, positions, owners = [], [], []
        questions: list[_Question] = []
        for row, (prompts, gap) in enumerate(zip(asked, gaps, strict=True)):
            ends = [extent(prompt)[1] for prompt in prompts]
            new = [len(prompt) - end for prompt, end in zip(prompts, ends, strict=True)]
            embeds.append(torch.cat([prompt.embeds[end:] for prompt, end in zip(prompts, ends, strict=True)]))
            positions.append(
                torch.cat([torch.arange(len(p) - n, len(p)) - gap for p, n in zip(prompts, new, strict=True)])
            )
            owners.append(torch.arange(len(prompts)).repeat_interleave(torch.tensor(new)))
            for number, prompt in enumerate(prompts):
                # the last of its rows, counted from the end, as padding stands before
                questions.append(_Question(row, number, -1 - sum(new[number + 1 :]), len(prompt) - gap))
        room = (max_new_tokens - 1) * max(map(len, asked))
        table = Table(memories, owners, "left", room)
        hidden = forward(model, table, side_by_side(embeds, "left"), side_by_side(positions, "left"))
        ids = _greedy(model, table, hidden, questions, max_new_tokens)
    return [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]


class _Question(NamedTuple):
    row: int
    """Of the batch, as it began."""
    number: int
    """Within its row."""
    at: int
    """Column of the forward that gives its next token."""
    following: int
    """Position of its first new token."""


def _greedy(
    model: VisionLanguageModel,
    table: Table,
    hidden: Float[Tensor, "b s d"],
    questions: Sequence[_Question],
    max_new_tokens: int,
) -> list[list[int]]:
    """The likeliest token, again and again, until each answer has ended."""
    head, embedding = model.unembed.head, model.hf.get_input_embeddings()
    ends = _end_ids(model)
    written: list[list[int]] = [[] for _ in questions]
    rows = sorted({question.row for question in questions})  # those in the table
    asking = list(range(len(questions)))
    at = [(question.row, question.at) for question in questions]
    going = set(asking)
    for step in range(max_new_tokens):
        last = hidden[[row for row, _ in at], [column for _, column in at]]
        chosen = head(last.to(head.weight.device)).argmax(-1).tolist()
        for index, token in zip(asking, chosen, strict=True):
            if index in going:
                written[index].append(token)
                if token in ends:
                    going.discard(index)
        if not going or step == max_new_tokens - 1:
            break
        if model.intervention is None:  # an intervention knows the batch as it began
            asking = [index for index in asking if index in going]
            left = sorted({questions[index].row for index in asking})
            if 2 * len(left) <= len(rows):
                table.keep(torch.tensor([place for place, row in enumerate(rows) if row in left]))
                rows = left
        place_of = {row: place for place, row in enumerate(rows)}
        filled = [0] * len(rows)
        at = []
        for index in asking:
            place = place_of[questions[index].row]
            at.append((place, filled[place]))
            filled[place] += 1
        ids, positions = (torch.zeros(len(rows), max(filled), dtype=torch.long) for _ in range(2))
        owner = torch.full_like(ids, NONE)
        for index, (place, column) in zip(asking, at, strict=True):
            ids[place, column] = written[index][-1]
            positions[place, column] = questions[index].following + step
            owner[place, column] = questions[index].number
        used = table.cache.get_seq_length()
        table.owner[:, used : used + owner.shape[1]] = owner.to(table.owner.device)
        hidden = forward(model, table, embedding(ids.to(model.device)), positions)
    return written


def _end_ids(model: VisionLanguageModel) -> set[int]:
    own = model.hf.generation_config.eos_token_id
    found = own if own is not None else model.tokenizer.eos_token_id
    return set(found) if isinstance(found, (list, tuple)) else {found}
