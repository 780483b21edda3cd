"""A stock Hugging Face vision-language model: prompts, visual positions, layers, embeddings, unembedding.

Nothing is reimplemented: the wrapper calls the model's own modules and reads them with hooks, so its numbers are the
stock model's numbers, bit for bit. It checks itself when it is built and refuses to hand out wrong data.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from threading import RLock, local
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image
from torch import Tensor, nn

from embedlens.errors import EmbedLensError
from embedlens.families import family_of, supported_classes
from embedlens.families.plain import OWN, Features
from embedlens.model_names import MINIATURE, signed
from embedlens.patches import PREPROCESSINGS, Frame, PatchGrid, within
from embedlens.pictures import LARGEST, Picture, in_memory, natural_side, open_picture, resized, squared

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast
else:  # transformers takes seconds to import and is not needed before a model is loaded
    BitsAndBytesConfig = PreTrainedModel = PreTrainedTokenizerFast = object

QUESTION = "What is in the picture?"  # where only the picture matters: visual tokens stand before it and cannot see it
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # one for all wrappers of a Hugging Face model
_ATTENTION = RLock()  # transformers looks its attention up in one place for all models
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Prompt:
    """One picture and one question, ready to enter layer 0."""

    image: Image
    """The picture as the processor read it: upright RGB, original size."""
    question: str
    ids: Int[Tensor, " s"]
    """Token ids, the image placeholder expanded to one id per visual token."""
    embeds: Float[Tensor, "s d"]
    """What enters layer 0; the text rows are embeddings, the visual rows are projected features."""
    visual: Bool[Tensor, " s"]
    """Which positions are visual tokens; the i-th True is patch i of `grid`."""
    grid: PatchGrid
    pixel_values: Float[Tensor, ...] = field(repr=False)
    """What entered the vision tower: pictures Float[1, 3, height, width], tiles or patches, as the family has it."""
    rows: Int[Tensor, " s"] | None = field(default=None, repr=False)
    """Which rows of the prompt as written these are; None: all. `grid` still describes the whole picture."""
    beside: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """What the processor said of the picture beside its pixels: original size, numbers of patches, by its names."""
    positions: Int[Tensor, "axes s"] | None = field(default=None, repr=False)
    """Rotary positions (time, height, width) where a family gives patches such; None: 0 to s-1."""
    deep: Float[Tensor, "joins n d"] | None = field(default=None, repr=False)
    """What is added to the visual rows after decoder block 0, 1, ..., where a family does that."""

    def __post_init__(self) -> None:
        length = len(self.ids)
        if self.embeds.shape[:1] != (length,) or self.visual.shape != (length,):
            raise EmbedLensError(
                f"the prompt has {length} ids, embeds of shape {tuple(self.embeds.shape)} and a visual mask of shape "
                f"{tuple(self.visual.shape)}: all three need the same first side"
            )
        if self.positions is not None and self.positions.shape[1] != length:
            raise EmbedLensError(f"the prompt has {length} ids but {self.positions.shape[1]} positions: pass as many")

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

    def without(self, mask: Bool[Tensor, " n"]) -> Prompt:
        """The same prompt, physically shorter by the masked visual tokens.

        Run as it is, its positions count anew, unless it has `positions`: the remaining rows keep those.
        """
        kept = (~self.spread(mask)).nonzero()[:, 0]
        return replace(
            self,
            ids=self.ids[kept],
            embeds=self.embeds[kept],
            visual=self.visual[kept],
            rows=kept,
            positions=None if self.positions is None else self.positions[:, kept],
            deep=None if self.deep is None else self.deep[:, ~mask.to(self.deep.device)],
        )

    def spread(self, mask: Bool[Tensor, " n"]) -> Bool[Tensor, " s"]:
        """A mask over visual tokens as a mask over all positions."""
        if self.rows is not None:
            raise EmbedLensError("this prompt has lost visual tokens already: spread the mask on the whole prompt")
        if mask.shape != (len(self.grid),):
            raise EmbedLensError(
                f"the mask has shape {tuple(mask.shape)}, the picture {len(self.grid)} visual tokens: pass one "
                "True or False per visual token"
            )
        whole = torch.zeros_like(self.visual)
        whole[self.visual] = mask.to(whole.device)
        return whole


@dataclass(frozen=True, eq=False)
class Unembed:
    """Residual stream → logits: the model's own final norm, then its own head."""

    final_norm: nn.Module
    head: nn.Linear
    n_rows: int
    """Logits returned: one per real row of the vocabulary, padded rows cut off."""

    def __call__(self, h: Float[Tensor, "*batch d"], norm: bool = True) -> Float[Tensor, "*batch V"]:
        """Logits of a residual stream taken *before* the final norm.

        Args:
            h: residual stream; moved to the head's device and dtype.
            norm: False leaves the final norm out (an ablation: some published logit lenses do).
        """
        weight = self.head.weight
        h = h.to(weight.device, weight.dtype)
        return self.head(self.final_norm(h) if norm else h)[..., : self.n_rows]


class VisionLanguageModel:
    """A stock model with its processor, wrapped; made by `load`.

    Attributes:
        hf: the Hugging Face model, in eval mode, untouched.
        processor: its processor, set to `preprocessing`.
        name: what was passed to `load`, signed with the quantisation: of what figures and records are.
        family: the module under `embedlens.families` that knows this class.
        blocks: the decoder's transformer blocks, `n_layers` of them.
        input_embeddings: Float[V, d], the embedding rows of the tokenizer's vocabulary; never padded rows.
        unembed: final norm and head, `unembed(h) → logits`.
        tied: whether embedding and head are one matrix.
        lock: held while the model runs with what reads or changes it, so that threads take turns; others wait.
    """

    def __init__(self, hf: PreTrainedModel, processor: Any, name: str, preprocessing: str | None = None) -> None:
        self.hf = hf.eval()
        self.processor = processor
        self.name = name
        self.family = _family(type(hf).__name__, name)
        self.preprocessing = _preprocessing(preprocessing, self.family)
        self.family.check_config(hf, processor, name)
        self.family.set_preprocessing(processor, hf, self.preprocessing)
        if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
            raise EmbedLensError(f"{name} has no chat template: add chat_template.jinja, as the model was trained with")
        for role in self.family.MODULES:
            self._module(role)
        self.decoder = self._module("decoder")
        self.blocks = cast(nn.ModuleList, self._module("blocks"))
        head = cast(nn.Linear, self._module("head"))
        self._embedding = cast(nn.Embedding, self._module("embedding")).weight
        self._n_rows = _real_rows(processor.tokenizer, self.family.image_token_id(hf), len(self._embedding), name)
        self.unembed = Unembed(self._module("final_norm"), head, self._n_rows)
        self.tied = head.weight.data_ptr() == self._embedding.data_ptr()
        self.lock = _LOCKS.setdefault(hf, RLock())
        self._of_thread = local()
        self._check()

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.hf.parameters()) / 1e6
        tying = "tied" if self.tied else "untied"
        return (
            f"<{self.name}: {type(self.hf).__name__}, {size:.1f} M parameters, {self.n_layers} layers of width "
            f"{self.width}, {self._n_rows} tokens, {tying} embeddings, {self.preprocessing}>"
        )

    def with_preprocessing(self, preprocessing: str) -> VisionLanguageModel:
        """The same weights, reading pictures in another way; nothing is loaded again, nothing takes memory twice."""
        return VisionLanguageModel(self.hf, deepcopy(self.processor), self.name, preprocessing)

    # --- what the model is -------------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Width d of the residual stream."""
        return self._embedding.shape[1]

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where embeddings live, and where prompts are put."""
        return self._embedding.device

    @property
    def input_embeddings(self) -> Float[Tensor, "V d"]:
        """Embedding rows of ids 0 to V-1: all real ones. A view on the weight, in the model's dtype.

        Left out are rows that pad the matrix to a round size, and placeholders that close the vocabulary (image
        and padding token of llava-hf checkpoints, never read as input).
        """
        return self._embedding.detach()[: self._n_rows]

    @cached_property
    def tokens(self) -> list[str]:
        """A readable word for each row of `input_embeddings`."""
        from embedlens.words import readable_tokens

        return readable_tokens(self.tokenizer, self._n_rows)

    def part(self, layer: int, role: str) -> nn.Module:
        """A part of a decoder block: "attention", "mlp" or "mlp_norm" (the norm between the two)."""
        return self.blocks[layer].get_submodule(self.family.BLOCK[role])

    def _module(self, role: str) -> nn.Module:
        path = self.family.MODULES[role]
        try:
            return self.hf.get_submodule(path)
        except AttributeError:
            import transformers

            raise EmbedLensError(
                f"{type(self.hf).__name__} of transformers {transformers.__version__} has no module {path}: "
                f"install the version in requirements.lock, or correct MODULES[{role!r}] in {self.family.__name__}"
            ) from None

    # --- interventions -----------------------------------------------------------------------------------------------

    @property
    def intervention(self) -> Callable[..., AbstractContextManager[Sequence[Prompt]]] | None:
        """The one of this thread, set for the time of a block; `running` tells it the prompts."""
        held = getattr(self._of_thread, "held", None)
        return held[0] if held else None

    @contextmanager
    def intervening(
        self,
        admit: Callable[..., AbstractContextManager[Sequence[Prompt]]],
        hooks: Callable[[Callable[..., None]], None],
    ) -> Iterator[None]:
        """`admit` is the intervention of this thread for the time of the block; other threads run as if it were not.

        Args:
            admit: what `running` tells its prompts.
            hooks: called with `hook(register, acting, **options)`, which registers hooks on the model's modules that
                act in this thread alone and go at the end of the block.
        """
        if self.intervention is not None:
            raise EmbedLensError("an intervention is active already: pass all of them to one intervene(model, a, b)")
        held = [admit]  # emptied at the end, in whichever thread that is
        removed = ExitStack()

        def hook(register: Callable[..., Any], acting: Callable[..., Any], **options: Any) -> None:
            def own(*given: Any) -> Any:
                return acting(*given) if getattr(self._of_thread, "held", None) is held else None

            removed.callback(register(own, **options).remove)

        try:
            with self.lock:  # no hook comes or goes while another thread runs the model
                hooks(hook)
            self._of_thread.held = held
            yield
        finally:
            held.clear()
            with self.lock:
                removed.close()

    # --- prompts -----------------------------------------------------------------------------------------------------

    def prompt(self, image: Picture, question: str) -> Prompt:
        """A picture and a question as the model reads them, in its own chat format.

        Args:
            image: path, PIL image or uint8 array; see `embedlens.pictures.open_picture`.
            question: one question, without the image placeholder.

        Raises:
            EmbedLensError: the picture cannot be read, the question is empty or holds the placeholder, or both together
                are longer than the model has positions.
        """
        return self.prompts([image], [question])[0]

    def asked(self, prompt: Prompt, question: str) -> Prompt:
        """Another question about the same picture, which does not go through the vision tower again."""
        ids, _ = self._inputs(prompt.image, question)
        marked = prompt.ids == self.family.image_token_id(self.hf)
        deep = prompt.deep
        if deep is not None:  # newlines bring nothing there
            whole = deep.new_zeros(len(deep), int(marked.sum()), deep.shape[-1])
            whole[:, prompt.visual[marked]] = deep
            deep = whole
        inputs = {"pixel_values": prompt.pixel_values, **prompt.beside}
        return self._assemble(prompt.image, question, ids, inputs, Features(prompt.embeds[marked], deep))

    def prompts(self, images: Sequence[Picture], questions: Sequence[str]) -> list[Prompt]:
        """Several prompts, their pictures through the tower in one batch; as one by one, up to rounding."""
        if len(images) != len(questions):
            raise EmbedLensError(
                f"{len(images)} pictures but {len(questions)} questions: pass one question per picture"
            )
        if not images:
            return []
        pictures = [open_picture(image) for image in images]
        inputs = []
        for image, picture, question in zip(images, pictures, questions, strict=True):
            with in_memory(image):
                inputs.append(self._inputs(picture, question))
        features = self._features([given for _, given in inputs])
        return [
            self._assemble(picture, question, ids, given, row)
            for picture, question, (ids, given), row in zip(pictures, questions, inputs, features, strict=True)
        ]

    def _inputs(self, picture: Image, question: str) -> tuple[Int[Tensor, " s"], dict[str, Tensor]]:
        """Ids, and what belongs to the picture, by the stock processor and its chat template."""
        if not isinstance(question, str) or not question.strip():
            raise EmbedLensError("the question is empty: ask something, for example 'What is in the picture?'")
        if self.processor.image_token in question:
            raise EmbedLensError(
                f"the question holds the image placeholder {self.processor.image_token}: leave it out, "
                "the chat format puts the picture in"
            )
        content = [{"type": "image", "image": self._shown(picture)}, {"type": "text", "text": question}]
        told = [{"role": "user", "content": content}]
        self._check_template(told)
        inputs = self.processor.apply_chat_template(
            told, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        text = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        return inputs["input_ids"][0].to(self.device), self._of_picture(inputs, leave_out=text)

    def _check_template(self, told: list[dict[str, Any]]) -> None:
        """What a template raises is whatever its author wrote; without a picture in it the processor is at a loss."""
        try:
            text = self.processor.apply_chat_template(told, add_generation_prompt=True, tokenize=False)
        except Exception as error:
            why = f"raises {type(error).__name__} ({' '.join(str(error).split())})"
        else:
            if self.processor.image_token in text:
                return
            why = "writes no picture"
        raise EmbedLensError(
            f"{self.name}: its chat template {why} for one question about one picture: take chat_template.jinja from "
            "the checkpoint as it was published"
        )

    def _of_picture(self, inputs: Mapping[str, Tensor], leave_out: Sequence[str] = ()) -> dict[str, Tensor]:
        """A processor's output on the model's device, numbers with a point in its dtype."""
        found = {}
        for name, value in inputs.items():
            if name not in leave_out:
                value = torch.as_tensor(value)
                found[name] = value.to(self.device, self.hf.dtype if value.is_floating_point() else None)
        return found

    @torch.no_grad()
    def _features(self, inputs: Sequence[Mapping[str, Tensor]]) -> list[Features]:
        with self.lock:
            return self.family.visual_features(self.hf, inputs)

    def _shown(self, picture: Image) -> Image:
        """The picture as the processor gets it: as it is, or square where that is wanted, but never huge."""
        family, way = self.family, self.preprocessing
        if OWN not in family.PREPROCESSINGS:
            return family.shown(self.hf, self.processor, way, picture)
        size = self._shown_size(picture.size)
        if way == OWN:
            return picture if size == picture.size else resized(picture, size)
        mean = self.processor.image_processor.image_mean
        return squared(picture, way, tuple(int(255 * part) for part in mean), size[0])

    def _shown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of what families that cut are shown of a picture of that size."""
        natural = size if self.preprocessing == OWN else (natural_side(size, self.preprocessing),) * 2
        enough = self.family.enough(self.hf, self.processor, natural)
        return natural if max(size) <= LARGEST else enough

    def _grid(self, picture: Image) -> PatchGrid:
        if OWN not in self.family.PREPROCESSINGS:
            return self.family.patch_grid(self.hf, self.processor, self.preprocessing, picture.size)
        size = self._shown_size(picture.size)
        grid = self.family.patch_grid(self.hf, self.processor, self.preprocessing, size)
        if self.preprocessing == OWN:
            return grid if size == picture.size else within(grid, Frame.stretch(*picture.size), size)
        return within(grid, Frame.of(self.preprocessing, *picture.size, side=min(picture.size)), size)

    def check_length(self, prompt: Prompt, new: int = 0) -> None:
        """Refuses what the model was not made for: beyond its positions it writes nothing, or anything.

        Raises:
            EmbedLensError: a prompt and `new` further tokens take more positions than the config names.
        """
        most = getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)
        used = len(prompt) if prompt.positions is None else int(prompt.positions.max()) + 1
        if most is None or used + new <= most:
            return
        further = f" and {new} new tokens" if new else ""
        raise EmbedLensError(
            f"the prompt of {len(prompt)} tokens, {int(prompt.visual.sum())} of them visual,{further} take up to "
            f"{used + new} positions, {self.name} has {most}: shorten the question{' or allow fewer' if new else ''}"
        )

    @torch.no_grad()
    def _assemble(
        self, picture: Image, question: str, ids: Tensor, inputs: Mapping[str, Tensor], features: Features
    ) -> Prompt:
        marked = ids == self.family.image_token_id(self.hf)
        grid = self._grid(picture)
        shows = self.family.shows_patch(grid).to(marked.device)
        if not int(marked.sum()) == len(shows) == len(features.tokens):
            raise EmbedLensError(
                f"{self.name}: the processor writes {int(marked.sum())} image tokens, the patch grid has {len(shows)}, "
                f"the vision tower gives {len(features.tokens)}: make patch_size, num_additional_image_tokens and "
                "vision_feature_select_strategy of the processor agree with the model's config"
            )
        embeds = self.hf.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(marked[:, None], features.tokens.to(embeds.device, embeds.dtype))
        visual = marked.clone()
        visual[marked] = shows
        beside = {name: value for name, value in inputs.items() if name != "pixel_values"}
        positions = self.family.positions(self.hf, ids, beside) if hasattr(self.family, "positions") else None
        deep = None if features.deep is None else features.deep[:, shows.to(features.deep.device)]
        prompt = Prompt(
            picture, question, ids, embeds, visual, grid, inputs["pixel_values"], None, beside, positions, deep
        )
        self.check_length(prompt)
        return prompt

    def visual_features_of(self, images: Sequence[Picture], batch_size: int = 32) -> list[Float[Tensor, "n d"]]:
        """Projected visual tokens of several pictures, without any text: what they bring to layer 0."""
        if not len(images):
            raise EmbedLensError("no pictures: pass at least one")
        rows = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            pictures, inputs = [open_picture(image) for image in batch], []
            for image, picture in zip(batch, pictures, strict=True):
                with in_memory(image):
                    made = self.processor.image_processor(self._shown(picture), return_tensors="pt")
                    inputs.append(self._of_picture(made))
            for picture, features in zip(pictures, self._features(inputs), strict=True):
                shows = self.family.shows_patch(self._grid(picture))
                rows.append(features.tokens[shows.to(features.tokens.device)])
        return rows

    def visual_features(self, images: Sequence[Picture], batch_size: int = 32) -> Float[Tensor, "pictures n d"]:
        """`visual_features_of` stacked, for pictures of as many visual tokens each."""
        return _stacked(self.visual_features_of(images, batch_size), "visual_features")

    @torch.no_grad()
    def tower_states_of(self, prompts: Sequence[Prompt]) -> list[Float[Tensor, "layers n v"]]:
        """Every layer of the vision tower, one row per visual token: index 0 is its embedding, l leaves block l.

        The projector reads layer `feature_layer`; in LLaVA that is the last but one. Where a merger makes one token of
        2x2 patches, a row is the four patches' states side by side, as the merger reads them.
        """
        inputs = [{"pixel_values": prompt.pixel_values, **prompt.beside} for prompt in prompts]
        with self.lock:
            return self.family.tower_states(self.hf, inputs)

    def tower_states(self, prompts: Sequence[Prompt]) -> Float[Tensor, "pictures layers n v"]:
        """`tower_states_of` stacked, for pictures of as many visual tokens each."""
        return _stacked(self.tower_states_of(prompts), "tower_states")

    @property
    def projector(self) -> nn.Module:
        """The model's own projector, taking rows of `tower_states_of` at `feature_layer`, one per visual token."""
        module = self._module("projector")
        return self.family.of_tokens(module) if hasattr(self.family, "of_tokens") else module

    @property
    def canvas_side(self) -> int:
        """Side of a square picture that the vision tower reads without resizing, px."""
        return self.family.canvas_side(self.hf, self.processor)

    @property
    def feature_layer(self) -> int:
        """The vision tower's layer that the projector reads, as an index into `tower_states`."""
        return self.family.feature_layer(self.hf)

    # --- running -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, prompt: Prompt) -> Float[Tensor, "s V"]:
        """Next-token logits at every position, real rows only."""
        with self.running([prompt]) as (entered,):
            output = self.hf(inputs_embeds=entered.embeds[None], use_cache=False)
        return output.logits[0, :, : self._n_rows]

    def hidden_states(self, prompt: Prompt) -> Float[Tensor, "layers s d"]:
        """The residual stream: index 0 enters the first block, index l leaves block l-1, `n_layers` + 1 in all.

        The last one is taken *before* the final norm. Hugging Face's own `hidden_states[-1]` is after it, so the two
        agree everywhere but there.
        """
        return self.hidden_states_of([prompt])[0]

    def hidden_states_of(self, prompts: Sequence[Prompt], batch_size: int = 8) -> list[Float[Tensor, "layers s d"]]:
        """`hidden_states` of several prompts, run together and padded on the right."""
        streams: list[Tensor] = []
        for start, batch in self.batches(prompts, batch_size):
            with self.running(batch, start, len(prompts)) as entered, self.recording() as layers, torch.no_grad():
                embeds, mask = self.padded(entered)
                self.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
            # one device for all layers: with device_map the blocks may live on several
            stacked = torch.stack([layer.to(embeds.device) for layer in layers], dim=1)
            streams += [stream[:, : len(prompt)] for stream, prompt in zip(stacked, entered, strict=True)]
        return streams

    @staticmethod
    def batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[tuple[int, Sequence[Prompt]]]:
        """(index of the first, prompts) of each batch."""
        if batch_size < 1:
            raise EmbedLensError(f"batch_size is {batch_size}: pass at least 1")
        for start in range(0, len(prompts), batch_size):
            yield start, prompts[start : start + batch_size]

    @contextmanager
    def running(
        self,
        prompts: Sequence[Prompt],
        start: int = 0,
        total: int | None = None,
        side: Literal["left", "right"] = "right",
    ) -> Iterator[Sequence[Prompt]]:
        """The prompts that the forward in the block runs, as they enter layer 0.

        Without an intervention they are the ones given. An active one learns here which positions are visual, and may
        hand back others: rescaled, or shorter. Until the block ends, other threads wait to run the model.

        Args:
            prompts: one batch.
            start: index of its first prompt among all that the caller was given.
            total: how many those are; by default the batch is all.
            side: on which side the batch is padded.
        """
        with ExitStack() as stack:
            stack.enter_context(self.lock)
            if self.intervention is not None:
                total = len(prompts) if total is None else total
                prompts = stack.enter_context(self.intervention(prompts, start, total, side))
            stack.enter_context(self._carrying(prompts, side))
            yield prompts

    @contextmanager
    def _carrying(self, prompts: Sequence[Prompt], side: Literal["left", "right"]) -> Iterator[None]:
        """Hands the decoder what these prompts bring beside their embeddings: own positions, deep visual features."""
        if all(prompt.positions is None and prompt.deep is None for prompt in prompts):
            yield
            return
        hook = self.decoder.register_forward_pre_hook(_luggage(prompts, side, self.family), with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @staticmethod
    def padded(
        prompts: Sequence[Prompt], side: Literal["left", "right"] = "right"
    ) -> tuple[Float[Tensor, "batch s d"], Int[Tensor, "batch s"] | None]:
        """Embeddings side by side, and their attention mask; None where nothing is padded, as for a single prompt."""
        longest = max(map(len, prompts))
        if all(len(prompt) == longest for prompt in prompts):
            return torch.stack([prompt.embeds for prompt in prompts]), None
        first = prompts[0].embeds
        embeds = first.new_zeros(len(prompts), longest, first.shape[-1])
        mask = torch.zeros(len(prompts), longest, dtype=torch.long, device=first.device)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt) if side == "left" else 0
            embeds[row, start : start + len(prompt)] = prompt.embeds
            mask[row, start : start + len(prompt)] = 1
        return embeds, mask

    @contextmanager
    def recording(self, middle: list[Tensor] | None = None) -> Iterator[list[Float[Tensor, "batch s d"]]]:
        """Collects what enters the first block and what leaves each; its hooks, and only they, go at the end.

        Where a family adds visual features between blocks, they are part of what leaves the block before.

        Args:
            middle: filled with what lies between attention and MLP of each block, if given.
        """
        layers: list[Tensor] = []

        def enter(module, args, kwargs):
            layers.append((args[0] if args else kwargs["hidden_states"]).detach())

        def leave(module, args, output):
            # a tuple in transformers 4, the tensor itself in transformers 5
            layers.append((output[0] if isinstance(output, tuple) else output).detach())

        def between(module, args, kwargs):
            cast(list, middle).append((args[0] if args else kwargs["hidden_states"]).detach())

        with self.lock:
            hooks = [self.blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
            if hasattr(self.family, "deep_inputs"):
                after = [*self.blocks[1:], self.unembed.final_norm]
                hooks += [module.register_forward_pre_hook(enter, with_kwargs=True) for module in after]
            else:
                hooks += [block.register_forward_hook(leave) for block in self.blocks]
            if middle is not None:
                norms = [self.part(layer, "mlp_norm") for layer in range(self.n_layers)]
                hooks += [norm.register_forward_pre_hook(between, with_kwargs=True) for norm in norms]
            try:
                yield layers
            finally:
                for hook in hooks:
                    hook.remove()

    def answer(self, prompt: Prompt, max_new_tokens: int = 16) -> str:
        """The model's greedy answer."""
        return self.answers([prompt], max_new_tokens)[0]

    @torch.no_grad()
    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int = 16, batch_size: int = 8) -> list[str]:
        """Greedy answers to several prompts, run together and padded on the left.

        Of the checkpoint's own generation config only the tokens that end an answer are kept.
        """
        from transformers import GenerationConfig

        if max_new_tokens < 1:
            raise EmbedLensError(f"max_new_tokens is {max_new_tokens}: allow at least 1")
        for prompt in prompts:
            self.check_length(prompt, max_new_tokens)
        own = self.hf.generation_config
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=own.eos_token_id if own.eos_token_id is not None else self.tokenizer.eos_token_id,
            pad_token_id=pad,
        )
        texts: list[str] = []
        for start, batch in self.batches(prompts, batch_size):
            with self.running(batch, start, len(prompts), side="left") as entered:
                embeds, mask = self.padded(entered, side="left")
                if mask is None:
                    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
                # `generate` fills what a config leaves open from the model's own: penalties, lengths, forbidden words
                self.hf.generation_config = greedy
                try:
                    new_ids = self.hf.generate(inputs_embeds=embeds, attention_mask=mask)
                finally:
                    self.hf.generation_config = own
            texts += [text.strip() for text in self.tokenizer.batch_decode(new_ids, skip_special_tokens=True)]
        return texts

    # --- checking ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """One small prompt through the model: are the declared parts the ones that compute the answer?

        Raises:
            EmbedLensError: naming the part that is not what the family file says.
        """
        expected = self.hf.config.get_text_config().num_hidden_layers
        if self.n_layers != expected:
            raise EmbedLensError(
                f"{self.name} has {self.n_layers} modules under {self.family.MODULES['blocks']} but its config says "
                f"{expected} layers: correct MODULES['blocks'] in {self.family.__name__}"
            )
        picture = _check_picture()
        ids, inputs = self._inputs(picture, "What is this?")
        self._check_pixels(picture, inputs)
        prompt = self._assemble(picture, "What is this?", ids, inputs, self._features([inputs])[0])
        with self.recording() as layers:
            logits = self.logits(prompt)
        if len(layers) != self.n_layers + 1:
            raise EmbedLensError(
                f"{self.name} ran {len(layers) - 1} of {self.n_layers} blocks: the checkpoint skips layers, which this "
                "wrapper does not support"
            )
        if not torch.isfinite(logits).all():
            raise EmbedLensError(
                f"{self.name} gives logits that are not finite in {self.hf.dtype}: pass dtype='float32' or 'bfloat16'"
            )
        with torch.no_grad():
            read = self.unembed(layers[-1][0])
        if not torch.allclose(read.float(), logits.float(), rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
            raise EmbedLensError(
                f"final norm and head of {self.name} do not turn the last block's output into its logits: correct "
                f"MODULES['final_norm'] and MODULES['head'] in {self.family.__name__}"
            )
        (tower,) = self.tower_states_of([prompt])
        if tower.shape[1] != len(prompt.grid) or not 0 <= self.feature_layer < len(tower):
            raise EmbedLensError(
                f"the vision tower of {self.name} hands out {len(tower)} layers of {tower.shape[1]} rows for "
                f"{len(prompt.grid)} visual tokens, of which the projector reads layer {self.feature_layer}: correct "
                f"tower_states and feature_layer in {self.family.__name__}"
            )
        # The effect: text after the picture must see the visual rows, or masks over them would mean nothing.
        blank = replace(prompt, embeds=prompt.embeds.masked_fill(prompt.visual[:, None], 0))
        if torch.equal(self.logits(blank)[-1], logits[-1]):
            raise EmbedLensError(
                f"{self.name} answers the same with its visual tokens blanked: the weights ignore the picture, or the "
                f"chat format puts it after the question; compare the folder with {self.family.EXAMPLES[0]}"
            )


    def _check_pixels(self, picture: Image, inputs: Mapping[str, Tensor]) -> None:
        """Does each token's patch show what its cell of the grid covers, and nothing else?

        The check picture's colours say where they are, so what is expected at a pixel of a patch follows from the
        grid alone; a bar has one colour, black or the mean.

        Raises:
            EmbedLensError: the image processor does something else than the preprocessing that was asked for.
        """
        images, grid = self.processor.image_processor, self._grid(picture)
        try:
            seen = self.family.patch_pixels(self.hf, inputs).float().cpu()
            mean, std = (torch.tensor(part).view(3, 1, 1) for part in (images.image_mean, images.image_std))
            seen = seen * std + mean
            off = _colour_error(seen, grid, mean)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # pixels of another layout
            off = float("inf")
        if not off < 0.02:  # one pixel of the check picture further down is 0.021 redder
            raise EmbedLensError(
                f"{self.name}: under {self.preprocessing!r} its {type(images).__name__} does not show a picture where "
                f"the patch grid has it: take preprocessor_config.json from {self.family.EXAMPLES[0]}"
            )


def load(
    name_or_folder: str | Path = MINIATURE,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    preprocessing: str | None = None,
) -> VisionLanguageModel:
    """A model to study: the shipped miniature, a checkpoint folder, or a Hugging Face repository.

    Args:
        name_or_folder: `"miniature"`, a folder that `save_pretrained` wrote, or a repository id such as
            `llava-hf/llava-1.5-7b-hf`.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, ..., or `"auto"` to spread the layers over all GPUs.
            Default: the first GPU if there is one, else the CPU.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`. Default: float32 for the miniature and on the CPU, the
            checkpoint's own on a GPU.
        quantize: `"4bit"` or `"8bit"` weights through bitsandbytes (needs a CUDA GPU).
        preprocessing: how LLaVA-1.5 makes a picture a square. It was trained with `"letterbox"`, the default; the
            stock processor of the llava-hf checkpoints does `"centre-crop"`; `"stretch"` ignores the aspect ratio.
            Other families cut pictures in their own way, `"own"`; the three make a picture square before that.

    Raises:
        EmbedLensError: unknown name, folder without checkpoint, unsupported class, missing or incomplete weights,
            missing processor, unknown device, dtype, quantisation or preprocessing.
    """
    with warnings.catch_warnings():  # in a notebook without ipywidgets its first import prints a path of this machine
        warnings.simplefilter("ignore")
        import_module("tqdm.auto")
    place = _device(device)
    if preprocessing is not None and preprocessing not in (*PREPROCESSINGS, OWN):
        raise EmbedLensError(f"unknown preprocessing {preprocessing!r}: choose one of {', '.join(PREPROCESSINGS)}")
    own_dtype = "auto" if place != "cpu" and name_or_folder != MINIATURE else torch.float32
    weights_dtype = own_dtype if dtype is None else _dtype(dtype)
    quantization = _quantization(quantize, place)
    source = _locate(name_or_folder)
    name = str(name_or_folder)
    family = _family(_class_name(source, name), name)
    _preprocessing(preprocessing, family)
    if isinstance(source, Path):
        _check_weight_files(source, name)
    hf = _load_weights(source, name, place, weights_dtype, quantization)
    return VisionLanguageModel(hf, _load_processor(source, name, family), signed(name, quantize), preprocessing)


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


def _family(class_name: str, name: str) -> ModuleType:
    family = family_of(class_name)
    if family is None:
        raise EmbedLensError(
            f"{name} is a {class_name}, which is not supported: pass a checkpoint of {', '.join(supported_classes())}"
        )
    return family


def _preprocessing(wanted: str | None, family: ModuleType) -> str:
    """One that the family has; its first by default."""
    if wanted is None:
        return family.PREPROCESSINGS[0]
    if wanted in family.PREPROCESSINGS:
        return wanted
    raise EmbedLensError(f"unknown preprocessing {wanted!r}: choose one of {', '.join(family.PREPROCESSINGS)}")


def _stacked(parts: list[Tensor], method: str) -> Tensor:
    if len({part.shape for part in parts}) > 1:
        raise EmbedLensError(
            f"the pictures have between {min(part.shape[-2] for part in parts)} and "
            f"{max(part.shape[-2] for part in parts)} visual tokens, which cannot be stacked: call {method}_of"
        )
    return torch.stack(parts)


def _luggage(prompts: Sequence[Prompt], side: Literal["left", "right"], family: ModuleType) -> Callable[..., Any]:
    """A pre-hook of the decoder that puts in what these prompts, padded on this side, bring beside embeddings."""
    longest = max(map(len, prompts))
    visual = torch.zeros(len(prompts), longest, dtype=torch.bool, device=prompts[0].visual.device)
    own = prompts[0].positions
    positions = None if own is None else own.new_zeros(len(own), len(prompts), longest)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt) if side == "left" else 0
        visual[row, start : start + len(prompt)] = prompt.visual
        if positions is not None:
            positions[:, row, start : start + len(prompt)] = cast(Tensor, prompt.positions)
    # Text ends the prompt, so the next token stands right behind its last one.
    following = None if positions is None else torch.stack([cast(Tensor, p.positions).max() + 1 for p in prompts])
    deep = None if prompts[0].deep is None else torch.cat([cast(Tensor, prompt.deep) for prompt in prompts], dim=1)

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
        if positions is not None and cached == 0:
            added["position_ids"] = positions.to(embeds.device)
        elif positions is not None:
            new = cached - longest + torch.arange(embeds.shape[1], device=embeds.device)
            places = cast(Tensor, following).to(embeds.device)[:, None] + new
            added["position_ids"] = places.expand(len(positions), -1, -1)
        return args, kwargs | added

    return hand_over


def _device(device: str | torch.device | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "auto":
        if find_spec("accelerate") is None:
            raise EmbedLensError("device='auto' needs accelerate: pip install accelerate, or name one device")
        return "auto"
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise EmbedLensError(f"unknown device {device!r}: pass 'cpu', 'cuda', 'cuda:1', 'mps' or 'auto'") from None
    if wanted.type == "cuda":
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if seen == 0:
            raise EmbedLensError(f"device {device!r} is asked for, but PyTorch sees no CUDA GPU: pass device='cpu'")
        if (wanted.index or 0) >= seen:
            raise EmbedLensError(f"device {device!r} is asked for, but PyTorch sees {seen} GPU(s): pass 'cuda:0'")
    elif wanted.type == "mps":
        if not torch.backends.mps.is_available():
            raise EmbedLensError(f"device {device!r} is asked for, but PyTorch has no MPS here: pass device='cpu'")
    elif wanted.type != "cpu":
        raise EmbedLensError(f"unsupported device {device!r}: pass 'cpu', 'cuda', 'cuda:1', 'mps' or 'auto'")
    return str(wanted)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    known = DTYPES.get(dtype) if isinstance(dtype, str) else dtype if dtype in DTYPES.values() else None
    if known is None:
        raise EmbedLensError(f"unknown dtype {dtype!r}: pass one of {', '.join(map(repr, DTYPES))}")
    return known


def _quantization(quantize: str | None, place: str) -> BitsAndBytesConfig | None:
    if quantize is None:
        return None
    if quantize not in ("4bit", "8bit"):
        raise EmbedLensError(f"unknown quantize {quantize!r}: pass '4bit' or '8bit', or leave it out")
    if not torch.cuda.is_available():
        raise EmbedLensError(f"quantize={quantize!r} needs a CUDA GPU, and PyTorch sees none: leave it out")
    if not place.startswith(("cuda", "auto")):
        raise EmbedLensError(
            f"quantize={quantize!r} needs a CUDA GPU, not {place}: pass device='cuda', or leave it out"
        )
    absent = [package for package in ("bitsandbytes", "accelerate") if find_spec(package) is None]
    if absent:
        raise EmbedLensError(f"quantize={quantize!r} needs {' and '.join(absent)}: pip install {' '.join(absent)}")
    from transformers import BitsAndBytesConfig

    # The head stays unquantised, which lenses rely on; transformers' default does that too.
    return BitsAndBytesConfig(
        load_in_4bit=quantize == "4bit", load_in_8bit=quantize == "8bit", bnb_4bit_compute_dtype=torch.float16
    )


def _locate(name_or_folder: str | Path) -> Path | str:
    """The checkpoint's folder, or a repository id."""
    if name_or_folder == MINIATURE:
        folder = Path(str(files("embedlens").joinpath(MINIATURE)))
        if not (folder / "config.json").is_file():
            raise EmbedLensError(
                f"the miniature is missing from this installation ({folder}): reinstall it, or run make train"
            )
        return folder
    if not str(name_or_folder):
        raise EmbedLensError("the model name is empty: pass 'miniature', a folder or a Hugging Face repository id")
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise EmbedLensError(f"{folder} is a file: pass the folder that holds config.json and the weights")
    text = str(name_or_folder)
    if text.count("/") == 1 and not text.startswith(("/", ".", "~")) and not text.endswith("/"):
        return text
    raise EmbedLensError(
        f"no folder {text!r}: pass 'miniature', a checkpoint folder, or a Hugging Face repository id such as "
        "llava-hf/llava-1.5-7b-hf"
    )


def _class_name(source: Path | str, name: str) -> str:
    """The model class that config.json names."""
    if isinstance(source, Path):
        config = source / "config.json"
        if not config.is_file():
            raise EmbedLensError(
                f"{name} is no checkpoint, it has no config.json: pass the folder that model.save_pretrained wrote"
            )
    else:
        from transformers.utils import cached_file

        try:
            config = Path(cached_file(source, "config.json") or "")
        except (OSError, ValueError) as error:
            raise EmbedLensError(
                f"no folder {name!r}, and the Hugging Face hub did not give a model of this name: check the spelling "
                f"and the connection, or pass a folder ({_first_line(error)})"
            ) from None
    try:
        architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        raise EmbedLensError(f"config.json of {name} is not a JSON object: download or save the model again") from None
    return architectures[0] if architectures else "model of unnamed class"


def _check_weight_files(folder: Path, name: str) -> None:
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            absent = [shard for shard in shards if not (folder / shard).is_file()]
            if absent:
                raise EmbedLensError(
                    f"{name} lacks {len(absent)} of {len(shards)} weight files ({absent[0]}): copy them too"
                )
            return
    if not any((folder / file).is_file() for file in ("model.safetensors", "pytorch_model.bin")):
        raise EmbedLensError(f"no weights in {name}: model.safetensors is missing; save or download the model again")


def _load_weights(
    source: Path | str,
    name: str,
    place: str,
    dtype: torch.dtype | str,
    quantization: BitsAndBytesConfig | None,
) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    # Straight to the GPU where accelerate can do it: the weights then never lie in main memory as a whole.
    direct = find_spec("accelerate") is not None
    device_map = place if place == "auto" or (place.startswith("cuda") and direct) else None
    try:
        with _quiet(isinstance(source, Path)):
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                source,
                dtype=dtype,
                device_map=device_map,
                quantization_config=quantization,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise EmbedLensError(
            f"the weights of {name} cannot be loaded: save or download the model again ({_first_line(error)})"
        ) from error
    hf, found = loaded
    absent = sorted(found["missing_keys"])
    if absent:
        # transformers would go on with random numbers in their place
        raise EmbedLensError(
            f"the weights of {name} lack {len(absent)} tensors ({absent[0]}, ...): save the whole model, not a part"
        )
    return hf.to(place) if device_map is None else hf


def _load_processor(source: Path | str, name: str, family: ModuleType) -> Any:
    import transformers

    try:
        own = getattr(family, "PROCESSOR", None)
        loader = transformers.AutoProcessor if own is None else _without_video(getattr(transformers, own))
        # Pillow resizes the same everywhere; torchvision, where installed, would give other pixels.
        processor = loader.from_pretrained(source, backend="pil")
    except Exception as error:  # the ways in which parts of a processor can be missing or damaged have no common class
        raise EmbedLensError(
            f"{name} has no usable processor: add the files that processor.save_pretrained writes "
            f"(processor_config.json, tokenizer.json, ...) ({_first_line(error)})"
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise EmbedLensError(
            f"{name} has no image processor, only a {type(processor).__name__}: add processor_config.json, as "
            "processor.save_pretrained writes it"
        )
    return processor


def _without_video(processor: type) -> Any:
    """A stock processor's class that does not ask for its video half, which needs torchvision."""

    def get_attributes(cls) -> list[str]:
        return [part for part in processor.get_attributes() if part != "video_processor"]  # type: ignore[attr-defined]

    return type(processor.__name__, (processor,), {"get_attributes": classmethod(get_attributes)})


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """No progress bar while a local folder loads: it takes no time, and notebooks would keep the bar."""
    from transformers.utils import logging

    if not (quiet and logging.is_progress_bar_enabled()):
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _real_rows(tokenizer: PreTrainedTokenizerFast, image_token_id: int, n_embeddings: int, name: str) -> int:
    """Number of embedding rows that belong to the vocabulary: ids from 0 to the last that is no placeholder.

    A special token beyond the embedding, as InternVL3's <video>, has no row: nothing here writes it.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    rowless = {image_token_id, tokenizer.pad_token_id, *(index for index in special if index >= n_embeddings)}
    n_rows = 1 + max(index for index in tokenizer.get_vocab().values() if index not in rowless)
    needed = max(n_rows, 1 + image_token_id)
    if needed > n_embeddings:
        raise EmbedLensError(
            f"the tokenizer of {name} has ids up to {needed - 1}, the embedding only {n_embeddings} rows: "
            "tokenizer and weights are of different models; copy both from one"
        )
    return n_rows


def _check_picture() -> Image:
    """A ramp down in red, across in green, both in blue, wider than high: a wrong grid or an ignored picture shows."""
    from PIL import Image

    x, y = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(48) + 0.5, indexing="xy")
    return Image.fromarray((255 * _ramp(x / 64, y / 48)).round().byte().permute(1, 2, 0).numpy())


def _ramp(x: Float[Tensor, "*n"], y: Float[Tensor, "*n"]) -> Float[Tensor, rgb *n]:
    """Colours of the check picture at points of it, whose sides are 1."""
    return torch.stack([y, x, 1 - (x + y) / 2])


def _colour_error(seen: Float[Tensor, "n 3 h w"], grid: PatchGrid, mean: Float[Tensor, "3 1 1"]) -> float:
    """How far patches of the check picture are from what the grid says they show, colours from 0 to 1.

    Left out is what lies as near to the picture's edge as interpolation reaches, there and back.
    """
    cells = torch.tensor([grid.cell(index) for index in range(len(grid))])
    down, across = seen.shape[-2:]
    step = (cells[:, 2:] - cells[:, :2]) / torch.tensor([across, down])
    x = (cells[:, :1] + (torch.arange(across) + 0.5) * step[:, :1])[:, None, :].expand(-1, down, -1)
    y = (cells[:, 1:2] + (torch.arange(down) + 0.5) * step[:, 1:])[:, :, None].expand(-1, -1, across)
    width, height = grid.frame.width, grid.frame.height
    reach = 2 * step.clamp(min=1)[:, :, None, None]
    depth = torch.minimum(torch.minimum(x, width - x) / reach[:, 0], torch.minimum(y, height - y) / reach[:, 1])
    inside = (seen - _ramp(x / width, y / height).movedim(0, 1)).abs().amax(1)[depth > 1]
    bars = torch.minimum((seen - mean).abs().amax(1), seen.abs().amax(1))[depth < -1]
    return max(float(inside.max()), float(bars.max()) if len(bars) else 0.0)
