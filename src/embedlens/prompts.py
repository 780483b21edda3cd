"""One picture and one question, as the model reads them and as they enter layer 0; several side by side in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from types import ModuleType
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image
from torch import Tensor, nn

from embedlens.batches import watched
from embedlens.errors import EmbedLensError
from embedlens.families.instructions import instructions_of
from embedlens.families.plain import OWN, Features
from embedlens.patches import Frame, PatchGrid, within
from embedlens.pictures import LARGEST, natural_side, resized, squared
from embedlens.samples import Sample, readable

Side = Literal["left", "right"]
QUESTION = "What is in the picture?"  # where only the picture matters: visual tokens stand before it and cannot see it


@dataclass(frozen=True, eq=False)
class Prompt:
    """One picture and one question, ready to enter layer 0."""

    image: Image  #: The picture as the processor read it: upright RGB, original size
    question: str
    ids: Int[Tensor, " s"]  #: Token ids, the image placeholder expanded to one id per visual token
    embeds: Float[Tensor, "s d"]  #: What enters layer 0; text rows are embeddings, visual rows projected features
    visual: Bool[Tensor, " s"]  #: Which positions are visual tokens; the i-th True is patch i of `grid`
    grid: PatchGrid
    pixel_values: Float[Tensor, ...] = field(repr=False)
    """What entered the vision tower: pictures Float[1, 3, height, width], tiles or patches, as the family has it."""
    rows: Int[Tensor, " s"] | None = field(default=None, repr=False)
    """Which rows of the prompt as written these are; None: all. `grid` still describes the whole picture."""
    beside: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """What the processor said of the picture beside its pixels: original size, numbers of patches, by its names."""
    positions: Int[Tensor, "axes s"] | None = field(default=None, repr=False)
    """Rotary positions: (time, height, width) where a family gives patches such, or one row; None: 0 to s-1."""
    deep: Float[Tensor, "joins n d"] | None = field(default=None, repr=False)
    """What is added to the visual rows after decoder block 0, 1, ..., where a family does that."""
    said: int = field(default=0, repr=False)  #: How many of the last ids are the answer's

    def __post_init__(self) -> None:
        sides = {"ids": len(self.ids), "embeds": len(self.embeds), "visual": len(self.visual)}
        sides |= {} if self.positions is None else {"positions": self.positions.shape[1]}
        if len(set(sides.values())) > 1:
            raise EmbedLensError(f"the parts of a prompt are of unequal lengths, {sides}: pass as many of each")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def text(self) -> Bool[Tensor, " s"]:
        """Which positions are not visual: template, question and specials, newlines between patches included."""
        return ~self.visual

    def rescaled(self, factor: float) -> Prompt:
        """The same prompt with its projected visual tokens multiplied by `factor`."""
        embeds = torch.where(self.visual[:, None], self.embeds * factor, self.embeds)
        return replace(self, embeds=embeds, deep=None if self.deep is None else self.deep * factor)

    def without(self, mask: Bool[Tensor, " n"], gaps: bool = False) -> Prompt:
        """The prompt, physically shorter by the masked visual tokens. The remaining rows keep their `positions`; of
        a prompt without such they count anew, with `gaps` as before."""
        kept = (~self.spread(mask)).nonzero()[:, 0]
        positions = self.positions
        if gaps and positions is None:
            positions = torch.arange(len(self), device=kept.device)[None]
        return replace(
            self,
            ids=self.ids[kept],
            embeds=self.embeds[kept],
            visual=self.visual[kept],
            rows=kept,
            positions=None if positions is None else positions[:, kept],
            deep=None if self.deep is None else self.deep[:, ~mask.to(self.deep.device)],
        )

    def spread(self, mask: Bool[Tensor, " n"]) -> Bool[Tensor, " s"]:
        """A mask over visual tokens as a mask over all positions."""
        if self.rows is not None:
            raise EmbedLensError("this prompt has lost visual tokens already: spread the mask on the whole prompt")
        if mask.shape != (len(self.grid),):
            what = f"the mask has shape {tuple(mask.shape)}, the picture {len(self.grid)} visual tokens"
            raise EmbedLensError(f"{what}: pass one True or False per visual token")
        whole = torch.zeros_like(self.visual)
        whole[self.visual] = mask.to(whole.device)
        return whole


def prompts_of(model: Any, samples: Sequence[Sample]) -> list[Prompt]:
    """QUESTION about the picture of each sample."""
    return model.prompts([sample.image for sample in samples], [QUESTION] * len(samples))


def looked_at(
    model: Any, samples: Iterable[Sample], batch_size: int = 8
) -> Iterator[tuple[list[Sample], list[Prompt]]]:
    """Batches of the samples that can be read, with `prompts_of` them; pictures are opened batch by batch."""
    stream, some = readable(watched(samples, model.name, "pictures"), opened=True), False
    while batch := list(islice(stream, batch_size)):
        some = True
        yield batch, prompts_of(model, batch)
    if not some:
        raise EmbedLensError("no samples: pass at least one picture")


def written(model: Any, picture: Image, question: str) -> tuple[Int[Tensor, " s"], dict[str, Tensor]]:
    """Ids, and what belongs to the picture, by the stock processor and its chat template."""
    turn, _ = _turn(model, question, image=shown(model, picture))
    made = model.processor.apply_chat_template(
        turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    text_only = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    of_picture = {name: value for name, value in made.items() if name not in text_only}
    return made["input_ids"][0].to(model.device), placed(model, of_picture)


def reworded(model: Any, prompt: Prompt, question: str) -> Int[Tensor, " s"]:
    """Ids of the prompt with another question: what stands for the picture stays, so that it is not processed again."""
    ids, sides = prompt.ids.cpu(), []
    for text in (prompt.question, question):
        own = model.tokenizer(_turn(model, text)[1], add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        own = torch.cat([ids[: int(ids[0] != own[0])], own])  # a token that begins every text
        at = int((own == model.family.image_token_id(model.hf)).int().argmax())
        sides.append((own[:at], own[at + 1 :]))
    (before, after), (_, asked) = sides
    stop = len(ids) - len(after)
    if not (torch.equal(ids[: len(before)], before) and torch.equal(ids[stop:], after)):
        return written(model, prompt.image, question)[0]
    return torch.cat([ids[:stop], asked]).to(model.device)


def _turn(model: Any, question: str, **image: Any) -> tuple[list[dict[str, Any]], str]:
    """What the chat template is given, and what it makes of it."""
    processor = model.processor
    if not isinstance(question, str) or not question.strip():
        raise EmbedLensError("the question is empty: ask something, for example 'What is in the picture?'")
    if processor.image_token in question:
        raise EmbedLensError(f"the question holds the image placeholder {processor.image_token}: leave it out")
    content = [{"type": "image", **image}, {"type": "text", "text": question}]
    turn = [{"role": "user", "content": content}]
    if system := instructions_of(model).system:
        turn = [{"role": "system", "content": [{"type": "text", "text": system}]}, *turn]
    try:  # what a template raises is whatever its author wrote; without a picture in it the processor is at a loss
        text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        why = "" if processor.image_token in text else "writes no picture"
    except Exception as error:
        why = f"raises {type(error).__name__} ({' '.join(str(error).split())})"
    if why:
        raise EmbedLensError(
            f"{model.name}: its chat template {why} for one question about one picture: take chat_template.jinja from "
            "the checkpoint as it was published"
        )
    return turn, text


def placed(model: Any, made: Mapping[str, Any]) -> dict[str, Tensor]:
    """A processor's output on the model's device, numbers with a point in its dtype."""
    tensors = {name: torch.as_tensor(value) for name, value in made.items()}
    dtype = model.hf.dtype
    return {name: part.to(model.device, dtype if part.is_floating_point() else None) for name, part in tensors.items()}


def shown(model: Any, picture: Image) -> Image:
    """The picture as the processor gets it: as it is, or square where that is wanted, but never huge."""
    way = model.preprocessing
    if OWN not in model.family.PREPROCESSINGS:
        return model.family.shown(model.hf, model.processor, way, picture)
    size = _shown_size(model, picture.size)
    if way == OWN:
        return picture if size == picture.size else resized(picture, size)
    mean = model.processor.image_processor.image_mean
    return squared(picture, way, tuple(int(255 * part) for part in mean), size[0])


def _shown_size(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of what families that cut are shown of a picture of that size."""
    natural = size if model.preprocessing == OWN else (natural_side(size, model.preprocessing),) * 2
    enough = model.family.enough(model.hf, model.processor, natural)
    return natural if max(size) <= LARGEST else enough


def grid_of(model: Any, picture: Image) -> PatchGrid:
    """Which patch of a picture each of its visual tokens is."""
    cuts, way = OWN in model.family.PREPROCESSINGS, model.preprocessing
    size = _shown_size(model, picture.size) if cuts else picture.size
    grid = model.family.patch_grid(model.hf, model.processor, way, size)
    if not cuts or (way == OWN and size == picture.size):
        return grid
    own = Frame.stretch(*picture.size) if way == OWN else Frame.of(way, *picture.size, side=min(picture.size))
    return within(grid, own, size)


@torch.no_grad()
def assembled(
    model: Any, picture: Image, question: str, ids: Tensor, inputs: Mapping[str, Tensor], features: Features
) -> Prompt:
    """The prompt that ids, a processed picture and its projected features make."""
    family = model.family
    marked, grid = ids == family.image_token_id(model.hf), grid_of(model, picture)
    shows = family.shows_patch(grid).to(marked.device)
    if not int(marked.sum()) == len(shows) == len(features.tokens):
        raise EmbedLensError(
            f"{model.name}: the processor writes {int(marked.sum())} image tokens, the patch grid has {len(shows)}, "
            f"the vision tower gives {len(features.tokens)}: make patch_size, num_additional_image_tokens and "
            "vision_feature_select_strategy of the processor agree with the model's config"
        )
    embeds = model.hf.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter(marked[:, None], features.tokens.to(embeds.device, embeds.dtype))
    visual = marked.clone()
    visual[marked] = shows
    beside = {name: value for name, value in inputs.items() if name != "pixel_values"}
    positions = family.positions(model.hf, ids, beside) if hasattr(family, "positions") else None
    deep = None if features.deep is None else features.deep[:, shows.to(features.deep.device)]
    pixels = inputs["pixel_values"]
    prompt = Prompt(picture, question, ids, embeds, visual, grid, pixels, None, beside, positions, deep)
    model.check_length(prompt)
    return prompt


# --- side by side ----------------------------------------------------------------------------------------------------


def side_by_side(parts: Sequence[Tensor], side: Side) -> Tensor:
    """Rows of different lengths as one tensor [b, s, ...], padded with zeros on a side.

    >>> side_by_side([torch.tensor([1, 2, 3]), torch.tensor([4])], "left").tolist()
    [[1, 2, 3], [0, 0, 4]]
    """
    return nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_side=side)


def padded(
    prompts: Sequence[Prompt], side: Side = "right"
) -> tuple[Float[Tensor, "batch s d"], Int[Tensor, "batch s"] | None]:
    """Embeddings side by side, and their attention mask; None where nothing is padded, as for a single prompt."""
    embeds = side_by_side([prompt.embeds for prompt in prompts], side)
    if all(len(prompt) == embeds.shape[1] for prompt in prompts):
        return embeds, None
    return embeds, side_by_side([torch.ones_like(prompt.ids) for prompt in prompts], side)


def carried(prompts: Sequence[Prompt], side: Side, family: ModuleType) -> Callable[..., Any] | None:
    """A pre-hook of the decoder that puts in what these prompts, padded on this side, bring beside embeddings."""
    own, added_later = prompts[0].positions, prompts[0].deep
    if own is None and added_later is None:
        return None
    visual = side_by_side([prompt.visual for prompt in prompts], side)
    positions = following = deep = None
    if own is not None:
        each = [cast(Tensor, prompt.positions) for prompt in prompts]
        positions = side_by_side([part.T for part in each], side).permute(2, 0, 1)
        following = torch.stack([part.max() + 1 for part in each])  # text ends the prompt: the next token stands there
    if added_later is not None:
        deep = torch.cat([cast(Tensor, prompt.deep) for prompt in prompts], dim=1)

    def hand_over(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        embeds, past = kwargs["inputs_embeds"], kwargs.get("past_key_values")
        cached = 0 if past is None else past.get_seq_length()
        added: dict[str, Any] = {}
        if cached == 0 and embeds.shape[:2] != visual.shape:
            raise EmbedLensError(
                f"the forward runs embeddings of shape {tuple(embeds.shape[:2])}, announced were "
                f"{tuple(visual.shape)}: run what model.running returned"
            )
        if cached == 0 and deep is not None:
            added = family.deep_inputs(visual.to(embeds.device), deep)
        if positions is not None:
            places = positions.to(embeds.device)
            if cached:
                new = cached - visual.shape[1] + torch.arange(embeds.shape[1], device=embeds.device)
                new = cast(Tensor, following).to(embeds.device)[:, None] + new
                places = new.expand(len(positions), -1, -1)
            elif len(positions) == 1 and kwargs.get("attention_mask") is None:
                # without a mask transformers takes a gap in the positions for the start of another sequence
                added["attention_mask"] = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            added["position_ids"] = places[0] if len(positions) == 1 else places
        return args, kwargs | added

    return hand_over
