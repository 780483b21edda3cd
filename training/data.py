"""Endless, seeded batches. Batch `step` of a stage is a function of (recipe, stage, step) and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from embedlens.samples.miniworld import draw, language, scene
from embedlens.samples.miniworld.scene import Scene
from training.documents import document
from training.recipe import ASSISTANT, SYSTEM, USER, Recipe, Stage

BARS = tuple(int(255 * mean) for mean in OPENAI_CLIP_MEAN)
DESCRIBE = ("Describe the picture.", "What do you see?", "Write a caption.")
# Seeds of a stage start here; far enough apart that no picture is used by two stages.
FIRST = {"tower": 0, "language": 100_000_000, "alignment": 200_000_000, "tuning": 300_000_000}
TRAINING = 10_000_000  # a further training of the same weights starts so much later in each stage
# How many questions of a kind a conversation asks, on average: what is hard to learn is asked more often.
SHARE = {"where": 1.5, "relation": 2.0, "count": 1.6, "box": 2.0, "text": 2.0, "object": 1.6}


@dataclass(frozen=True)
class Batch:
    """Rows of a prefix followed by blocks that do not see each other: every block is a first turn of its own.

    Attributes:
        ids: Long[b, t].
        weight: Float[b, t], weight of the loss for predicting this token; 0 is not predicted.
        block: Long[b, t]; 0 prefix, 1.. blocks, -1 padding.
        position: Long[b, t]; every block starts where the prefix ends.
        kind: Long[b, t]; index into KINDS of the question a token answers, -1 elsewhere.
        pixels: UInt8[b, 3, side, side] or None.
        image: Bool[b, t]; where the visual tokens go.
    """

    ids: Tensor
    weight: Tensor
    block: Tensor
    position: Tensor
    kind: Tensor
    image: Tensor
    pixels: Tensor | None = None

    def mask(self) -> Tensor:
        """Bool[b, 1, t, t]: a token sees what came before it in the prefix and in its own block."""
        block = self.block
        length = block.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=block.device).tril()
        seen = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
        return (causal & seen)[:, None]

    def to(self, device: str) -> Batch:
        return Batch(**{name: None if value is None else value.to(device) for name, value in vars(self).items()})


OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
KINDS = (*language.KINDS, "caption")


def seeded(recipe: Recipe, stage: str, split: scene.Split, index: int) -> random.Random:
    past = recipe.onward * TRAINING if split == "train" else 0
    return scene.rng_of(split, FIRST[stage] + past + index)


def options(recipe: Recipe, progress: float, stage: str, pairs: bool = False) -> dict[str, Any]:
    """Tower and language model start on few, larger things; from a quarter of the way on, they meet the whole world.

    In an onward training only the writing starts easy, for the tower: large single characters.
    """
    ease = max(0.0, 1 - 4 * progress) if stage in ("tower", "language") and not recipe.onward else 0.0
    chosen: dict[str, Any] = {"square": not recipe.letterbox}
    if stage == "tower":
        chosen["words"] = recipe.tower_words
        early = max(0.0, 1 - 2 * progress) if recipe.onward else 0.0
        if early > 0:
            chosen["writing"] = 1 + early
            chosen["lengths"] = tuple(share * (1 - early) + early * (i == 0) for i, share in enumerate(scene.LENGTHS))
    if ease > 0:
        chosen |= {
            "tiny": scene.TINY * (1 - ease),
            "textured": 0.55 * (1 - ease),
            "objects": (1, 2 if ease > 0.5 else 3),
            "repeated": 0.45 * (1 - ease),
        }
    if pairs:
        chosen |= {"objects": (2, 2), "words": 0.0, "repeated": 0.0, "tiny": 0.0}
    return chosen


def pixels_of(drawn: Scene, recipe: Recipe) -> np.ndarray:
    """What the image processor makes of the picture, before normalisation: UInt8[side, side, 3]."""
    side = recipe.image_size
    picture = np.asarray(draw.picture(drawn, recipe.scale))
    height, width = picture.shape[:2]
    square = np.empty((side, side, 3), np.uint8)
    square[:] = BARS
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = picture
    return square


def normalised(pixels: Tensor) -> Tensor:
    """UInt8[b, 3, h, w] -> Float[b, 3, h, w] as CLIP expects them."""
    mean = torch.tensor(OPENAI_CLIP_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


class Encoder:
    """Words to ids, remembering what it has seen: questions repeat."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.encode: Callable[[str], list[int]] = lru_cache(maxsize=100_000)(self._encode)
        self.eos = int(tokenizer.eos_token_id)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def turn(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        return self.encode(f"\n{question}{ASSISTANT}"), [*self.encode(f" {answer}"), self.eos]


def mirrored(question: language.Question) -> language.Question:
    """The same relation asked the other way round."""
    one, other = question.text.removeprefix("Where is the ").removesuffix("?").split(" relative to the ")
    return replace(question, text=f"Where is the {other} relative to the {one}?", answer=OPPOSITE[question.answer])


def asked(
    drawn: Scene,
    rng: random.Random,
    most: int,
    asks: Mapping[str, float] | None = None,
    both_ways: bool = False,
) -> list[language.Question]:
    """Up to `most` different questions; hard kinds more often than easy ones, unless `asks` says how often.

    Args:
        both_ways: every relation is asked in both orders of its pair.
    """
    found: dict[str, language.Question] = {}
    for kind, ask in language.ASK.items():
        share = SHARE.get(kind, 1.0) if asks is None else asks.get(kind, 0.0)
        for _ in range(int(share) + (rng.random() < share % 1)):
            question = ask(drawn, rng)
            if question is not None:
                found.setdefault(question.text, question)
    if not both_ways:
        chosen = list(found.values())
        rng.shuffle(chosen)
        return chosen[:most]
    groups: dict[str, list[language.Question]] = {}
    for question in found.values():
        pair = [question, mirrored(question)] if question.kind == "relation" else [question]
        groups.setdefault(min(item.text for item in pair), pair)
    shuffled = list(groups.values())
    rng.shuffle(shuffled)
    return [question for pair in shuffled for question in pair][:most]


def collate(rows: list[tuple[list[int], float, list[tuple[list[int], list[int], int, float]]]], image_id: int) -> Batch:
    """Rows of (prefix ids, weight of the prefix, [(question ids, answer ids, kind, weight)]) to one padded batch."""
    longest = max(len(prefix) + sum(len(q) + len(a) for q, a, *_ in turns) for prefix, _, turns in rows)
    longest = -(-longest // 16) * 16
    shape = (len(rows), longest)
    ids, block = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    weight, position, kind = torch.zeros(shape), torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    for r, (prefix, prefix_weight, turns) in enumerate(rows):
        n = len(prefix)
        ids[r, :n], block[r, :n], position[r, :n] = torch.tensor(prefix), 0, torch.arange(n)
        weight[r, 1:n] = prefix_weight
        at = n
        for number, (question, answer, which, answer_weight) in enumerate(turns, start=1):
            end = at + len(question) + len(answer)
            ids[r, at:end] = torch.tensor(question + answer)
            block[r, at:end] = number
            position[r, at:end] = torch.arange(n, n + end - at)
            weight[r, end - len(answer) : end] = answer_weight
            kind[r, end - len(answer) : end] = which
            at = end
    return Batch(ids, weight, block, position, kind, ids == image_id)


def side_by_side(drawn: Scene) -> bool:
    """Whether the two objects are in one row, one on the left and one on the right."""
    places = sorted(scene.region(thing, drawn) for thing in drawn.objects)
    return places in (["left", "right"], ["top left", "top right"], ["bottom left", "bottom right"])


def paired(recipe: Recipe, step: int, progress: float) -> bool:
    """Whether a batch is about pairs: with `relation_first` two of three at first, one of six from half-way on."""
    share = (1 + 3 * max(0.0, 1 - 2 * progress)) / 6 if recipe.relation_first else 0.0
    return recipe.pairs or random.Random(f"pairs {recipe.seed} {step}").random() < share


def conversations(
    recipe: Recipe, stage: str, split: scene.Split, step: int, batch: int, encoder: Encoder, progress: float = 1.0
) -> Batch:
    """One batch of stage `language` (prefix = description), `alignment` (caption only) or `tuning` (questions)."""
    pairs = recipe.pairs or split == "train" and stage != "alignment" and paired(recipe, step, progress)
    asks = recipe.asks or ({"relation": 6.0} if pairs else None)
    beside = pairs and recipe.relation_first and progress < 0.25
    image_id = encoder.tokenizer.convert_tokens_to_ids("<image>")

    def room(prefix: list[int], turns: list) -> bool:
        return len(prefix) + sum(len(question) + len(answer) for question, answer, *_ in turns) <= recipe.longest

    head = [encoder.tokenizer.bos_token_id, *encoder.encode(f"{SYSTEM}{USER}")]
    rows, pictures = [], []
    for i in range(batch):
        rng = seeded(recipe, stage, split, step * batch + i)
        how = options(recipe, progress, "tower" if recipe.tower_learns and split == "train" else stage, pairs)
        drawn = scene.scene(rng, split, **how)
        tries = 30 if beside else 0
        while tries and not side_by_side(drawn):
            drawn, tries = scene.scene(rng, split, **how), tries - 1
        caption = language.caption(drawn, rng, recipe.mention_background)
        if stage == "language":
            prefix = head + encoder.encode(document(drawn, rng))
        else:  # the processor puts one placeholder per visual token where the template says <image>
            prefix = head + [image_id] * recipe.visual_tokens
            pictures.append(pixels_of(drawn, recipe))
        turns = []
        if stage != "tuning" or rng.random() < 0.15:
            question, answer = encoder.turn(rng.choice(DESCRIBE), caption)
            turns.append((question, answer, KINDS.index("caption"), 1.0 if stage == "alignment" else 0.25))
        if stage != "alignment":
            for item in asked(drawn, rng, 14, asks, recipe.relation_first and split == "train"):
                question, answer = encoder.turn(item.text, item.answer)
                turns.append((question, answer, KINDS.index(item.kind), 1.0))
        while not room(prefix, turns):
            turns.pop()
        rows.append((prefix, 0.1 if stage == "language" else 0.0, turns))
    made = collate(rows, image_id)
    if not pictures:
        return made
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return Batch(**{**vars(made), "pixels": pixels})


@dataclass(frozen=True)
class Captioned:
    """pixels UInt8[b, 3, side, side] and captions Long[b, t], starting with <s>, ending with </s>, 0-padded."""

    pixels: Tensor
    ids: Tensor


def captioned(
    recipe: Recipe, split: scene.Split, step: int, batch: int, encoder: Encoder, progress: float = 1.0
) -> Captioned:
    """One batch of the tower's stage: pictures and what is said about them."""
    pictures, captions = [], []
    for i in range(batch):
        rng = seeded(recipe, "tower", split, step * batch + i)
        drawn = scene.scene(rng, split, **options(recipe, progress, "tower"))
        text = language.caption(drawn, rng, recipe.mention_background, place_first=0.75, reading_order=1.0)
        captions.append([encoder.tokenizer.bos_token_id, *encoder.encode(text), encoder.eos])
        pictures.append(pixels_of(drawn, recipe))
    ids = torch.zeros(batch, max(map(len, captions)), dtype=torch.long)
    for row, caption in zip(ids, captions, strict=True):
        row[: len(caption)] = torch.tensor(caption)
    return Captioned(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), ids)


class Steps(Dataset):
    """Step number -> batch, so that a resumed run goes on exactly where it stopped."""

    def __init__(self, make: Callable[[int], Batch | Captioned], steps: int):
        self.make, self.steps = make, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch | Captioned:
        return self.make(step)


def loader(
    make: Callable[[int], Batch | Captioned], start: int, stage: Stage, workers: int
) -> Iterator[Batch | Captioned]:
    """Batches from `start` to the end of the stage, made by other processes while the model learns."""
    workers = workers if stage.workers is None else stage.workers
    return iter(
        DataLoader(
            Steps(make, stage.steps),
            batch_size=None,
            sampler=range(start, stage.steps),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=lambda _: torch.set_num_threads(1),
        )
    )
