"""A stock Hugging Face vision-language model: prompts, visual positions, layers, embeddings, unembedding.

Nothing is reimplemented: the wrapper calls the model's own modules and reads them with hooks, so its numbers are the
stock model's numbers, bit for bit. It checks itself when it is built and refuses to hand out wrong data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from threading import RLock, local
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from embedlens.batches import in_batches
from embedlens.checks import check, real_rows
from embedlens.errors import EmbedLensError
from embedlens.families import family_of, supported_classes
from embedlens.families.plain import Features
from embedlens.pictures import Picture, in_memory, open_picture
from embedlens.prompts import QUESTION as QUESTION
from embedlens.prompts import Prompt, Side, assembled, carried, grid_of, padded, placed, reworded, shown, written

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
else:  # transformers takes seconds to import and is not needed before a model is loaded
    GenerationConfig = PreTrainedModel = PreTrainedTokenizerFast = object

Admitting: TypeAlias = AbstractContextManager[Sequence[Prompt]]
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # one for all wrappers of a Hugging Face model


@dataclass(frozen=True, eq=False)
class Unembed:
    """Residual stream → logits: the model's own final norm, then its own head."""

    final_norm: nn.Module
    head: nn.Linear
    n_rows: int  #: Logits returned: one per real row of the vocabulary, padded rows cut off

    def __call__(self, h: Float[Tensor, "*batch d"], norm: bool = True) -> Float[Tensor, "*batch V"]:
        """Logits of a residual stream taken *before* the final norm, moved to the head's device and dtype. norm=False
        leaves the final norm out (an ablation: some published logit lenses do)."""
        h = h.to(self.head.weight.device, self.head.weight.dtype)
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
        self.family = family_named(type(hf).__name__, name)
        self.preprocessing = preprocessing_of(preprocessing, self.family)
        self.family.check_config(hf, processor, name)
        self.family.set_preprocessing(processor, hf, self.preprocessing)
        if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
            raise EmbedLensError(f"{name} has no chat template: add chat_template.jinja, as the model was trained with")
        for role in self.family.MODULES:
            self._module(role)
        self.decoder = self._module("decoder")
        self.blocks = cast(nn.ModuleList, self._module("blocks"))
        self._embedding = cast(nn.Embedding, self._module("embedding")).weight
        self._n_rows = real_rows(processor.tokenizer, self.family.image_token_id(hf), len(self._embedding), name)
        head = cast(nn.Linear, self._module("head"))
        self.unembed = Unembed(self._module("final_norm"), head, self._n_rows)
        self.tied = head.weight.data_ptr() == self._embedding.data_ptr()
        self.lock = _LOCKS.setdefault(hf, RLock())
        self._of_thread = local()
        check(self)

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.hf.parameters()) / 1e6
        return (
            f"<{self.name}: {type(self.hf).__name__}, {size:.1f} M parameters, {self.n_layers} layers of width "
            f"{self.width}, {self._n_rows} tokens, {'' if self.tied else 'un'}tied embeddings, {self.preprocessing}>"
        )

    def with_preprocessing(self, preprocessing: str) -> VisionLanguageModel:
        """The same weights, reading pictures in another way; nothing is loaded again, nothing takes memory twice."""
        return VisionLanguageModel(self.hf, deepcopy(self.processor), self.name, preprocessing)

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Width d of the residual stream."""
        return self._embedding.shape[1]

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where embeddings live, and where prompts are put."""
        return self._embedding.device

    @property
    def input_embeddings(self) -> Float[Tensor, "V d"]:
        """Embedding rows of ids 0 to V-1, a view on the weight. Left out are rows that pad the matrix to a round size,
        and placeholders that close the vocabulary (image and padding token of llava-hf checkpoints)."""
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
    def intervention(self) -> Callable[..., Admitting] | None:
        """The one of this thread, set for the time of a block; `running` tells it the prompts."""
        held = getattr(self._of_thread, "held", None)
        return held[0] if held else None

    @contextmanager
    def intervening(
        self, admit: Callable[..., Admitting], hooks: Callable[[Callable[..., None]], None]
    ) -> Iterator[None]:
        """`admit`, which `running` tells its prompts, acts for the time of the block, in this thread alone; so do hooks
        on the model's modules that `hooks` registers by the `hook(register, acting, **options)` it is given."""
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
        """A picture (as `embedlens.pictures.open_picture` takes it) and one question, without the image placeholder, as
        the model reads them, in its own chat format. EmbedLensError: the picture or the question cannot be read, or
        both are longer than the model has positions."""
        return self.prompts([image], [question])[0]

    def asked(self, prompt: Prompt, question: str) -> Prompt:
        """Another question about the same picture, which does not go through the vision tower again."""
        ids = reworded(self, prompt, question)
        marked = prompt.ids == self.family.image_token_id(self.hf)
        deep = prompt.deep
        if deep is not None:  # newlines bring nothing there
            deep = deep.new_zeros(len(deep), int(marked.sum()), deep.shape[-1])
            deep[:, prompt.visual[marked]] = cast(Tensor, prompt.deep)
        inputs = {"pixel_values": prompt.pixel_values, **prompt.beside}
        return assembled(self, prompt.image, question, ids, inputs, Features(prompt.embeds[marked], deep))

    def prompts(self, images: Sequence[Picture], questions: Sequence[str]) -> list[Prompt]:
        """Several prompts, their pictures through the tower in one batch; as one by one, up to rounding."""
        if len(images) != len(questions):
            raise EmbedLensError(f"{len(images)} pictures, {len(questions)} questions: pass one question per picture")
        if not images:
            return []
        pictures = [open_picture(image) for image in images]
        inputs = []
        for image, picture, question in zip(images, pictures, questions, strict=True):
            with in_memory(image):
                inputs.append(written(self, picture, question))
        features = self._features([given for _, given in inputs])
        return [
            assembled(self, picture, question, ids, given, row)
            for picture, question, (ids, given), row in zip(pictures, questions, inputs, features, strict=True)
        ]

    @torch.no_grad()
    def _features(self, inputs: Sequence[Mapping[str, Tensor]]) -> list[Features]:
        with self.lock:
            return list(in_batches(lambda _, some: self.family.visual_features(self.hf, some), inputs))

    def check_length(self, prompt: Prompt, new: int = 0) -> None:
        """Refuses a prompt and new tokens beyond the config's positions: there it writes nothing, or anything."""
        most = getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)
        used = len(prompt) if prompt.positions is None else int(prompt.positions.max()) + 1
        if most is None or used + new <= most:
            return
        further = f" and {new} new tokens" if new else ""
        raise EmbedLensError(
            f"the prompt of {len(prompt)} tokens, {int(prompt.visual.sum())} of them visual,{further} take up to "
            f"{used + new} positions, {self.name} has {most}: shorten the question{' or allow fewer' if new else ''}"
        )

    def visual_features_of(self, images: Sequence[Picture], batch_size: int = 32) -> list[Float[Tensor, "n d"]]:
        """Projected visual tokens of several pictures, without any text: what they bring to layer 0."""

        def run(_: int, batch: Sequence[Picture]) -> Iterator[Tensor]:
            pictures, inputs = [open_picture(image) for image in batch], []
            for image, picture in zip(batch, pictures, strict=True):
                with in_memory(image):
                    made = self.processor.image_processor(shown(self, picture), return_tensors="pt")
                    inputs.append(placed(self, made))
            for picture, features in zip(pictures, self._features(inputs), strict=True):
                shows = self.family.shows_patch(grid_of(self, picture))
                yield features.tokens[shows.to(features.tokens.device)]

        return list(in_batches(run, images, batch_size))

    @torch.no_grad()
    def tower_states_of(self, prompts: Sequence[Prompt]) -> list[Float[Tensor, "layers n v"]]:
        """Each layer of the vision tower, a row per visual token: index 0 is its embedding, l leaves block l. Where a
        merger makes one token of 2x2 patches, a row is the four patches' states side by side, as the merger reads them.
        """
        with self.lock:
            inputs = [{"pixel_values": prompt.pixel_values, **prompt.beside} for prompt in prompts]
            return list(in_batches(lambda _, some: self.family.tower_states(self.hf, some), inputs))

    @property
    def projector(self) -> nn.Module:
        """The model's own projector, taking rows of `tower_states_of` at `feature_layer`, one per visual token."""
        return self.family.of_tokens(self.hf) if hasattr(self.family, "of_tokens") else self._module("projector")

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
        """Residual stream: index 0 enters the first block, index l leaves block l-1, `n_layers` + 1 in all; the last
        one is taken *before* the final norm, Hugging Face's own `hidden_states[-1]` after it."""
        return next(self.streams_of([prompt]))

    def streams_of(self, prompts: Sequence[Prompt], batch_size: int = 8) -> Iterator[Float[Tensor, "layers s d"]]:
        """`hidden_states` of several prompts, padded on the right; a batch is held until its last is asked for."""

        def run(start: int, batch: Sequence[Prompt]) -> list[Tensor]:
            with self.running(batch, start, len(prompts)) as entered, self.recording() as layers, torch.no_grad():
                embeds, mask = self.padded(entered)
                self.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
            # one device for all layers: with device_map the blocks may live on several
            stacked = torch.stack([layer.to(embeds.device) for layer in layers], dim=1)
            return [stream[:, : len(prompt)] for stream, prompt in zip(stacked, entered, strict=True)]

        return in_batches(run, prompts, batch_size)

    @contextmanager
    def running(
        self, prompts: Sequence[Prompt], start: int = 0, total: int | None = None, side: Side = "right"
    ) -> Iterator[Sequence[Prompt]]:
        """The prompts that the forward in the block runs, as they enter layer 0, padded on a `side`.

        An active intervention learns here which positions are visual, and may hand back rescaled or shorter prompts.
        Other threads wait meanwhile. `start` is the batch's first prompt among the `total` that the caller was given.
        """
        with ExitStack() as stack:
            stack.enter_context(self.lock)
            if self.intervention is not None:
                total = len(prompts) if total is None else total
                prompts = stack.enter_context(self.intervention(prompts, start, total, side))
            beside = carried(prompts, side, self.family)
            if beside is not None:
                # before those of interventions, which read what it puts in
                hook = self.decoder.register_forward_pre_hook(beside, with_kwargs=True, prepend=True)
                stack.callback(hook.remove)
            yield prompts

    padded = staticmethod(padded)

    @contextmanager
    def recording(self, middle: list[Tensor] | None = None) -> Iterator[list[Float[Tensor, "batch s d"]]]:
        """Collects what enters the first block and what leaves each, with visual features that a family adds between
        blocks; `middle`: what lies between attention and MLP."""
        layers: list[Tensor] = []

        def entering(kept: list[Tensor]) -> Callable[..., None]:
            return lambda _, args, kwargs: kept.append((args[0] if args else kwargs["hidden_states"]).detach())

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            # a tuple in transformers 4, the tensor itself in transformers 5
            layers.append((output[0] if isinstance(output, tuple) else output).detach())

        deep = hasattr(self.family, "deep_inputs")
        entered = [*self.blocks, self.unembed.final_norm] if deep else self.blocks[:1]
        with ExitStack() as hooks, self.lock:
            for module in entered:
                hooks.callback(module.register_forward_pre_hook(entering(layers), with_kwargs=True).remove)
            for block in [] if deep else self.blocks:
                hooks.callback(block.register_forward_hook(leave).remove)
            for layer in range(0 if middle is None else self.n_layers):
                between = entering(cast(list, middle))
                hooks.callback(self.part(layer, "mlp_norm").register_forward_pre_hook(between, with_kwargs=True).remove)
            yield layers

    def answer(self, prompt: Prompt, max_new_tokens: int = 16) -> str:
        """The model's greedy answer."""
        return self.answers([prompt], max_new_tokens)[0]

    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int = 16, batch_size: int = 8) -> list[str]:
        """Greedy answers to several prompts, run together and padded on the left."""
        written = self._written(prompts, max_new_tokens, batch_size)
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]

    def answer_ids(self, prompt: Prompt, max_new_tokens: int = 16) -> Int[Tensor, " tokens"]:
        """The ids of the greedy answer, on the CPU, without the token that ends it."""
        (ids,) = self._written([prompt], max_new_tokens, 1)
        return ids[: int((torch.isin(ids, torch.tensor(self.greedy(1).eos_token_id)).cumsum(0) == 0).sum())]

    @torch.no_grad()
    def _written(self, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int) -> list[Int[Tensor, " tokens"]]:
        """The ids of answers, on the CPU, with the token that ends each and what pads it."""
        if max_new_tokens < 1:
            raise EmbedLensError(f"max_new_tokens is {max_new_tokens}: allow at least 1")
        for prompt in prompts:
            self.check_length(prompt, max_new_tokens)
        own, greedy = self.hf.generation_config, self.greedy(max_new_tokens)

        def run(start: int, batch: Sequence[Prompt]) -> list[Tensor]:
            with self.running(batch, start, len(prompts), side="left") as entered:
                embeds, mask = self.padded(entered, side="left")
                mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
                # `generate` fills what a config leaves open from the model's own: penalties, lengths, forbidden words
                self.hf.generation_config = greedy
                try:
                    new_ids = self.hf.generate(inputs_embeds=embeds, attention_mask=mask)
                finally:
                    self.hf.generation_config = own
            return list(new_ids.cpu())

        return list(in_batches(run, prompts, batch_size))

    def greedy(self, max_new_tokens: int) -> GenerationConfig:
        """How answers are written. Of the checkpoint's own generation config only the tokens that end one are kept."""
        from transformers import GenerationConfig

        own, words = self.hf.generation_config, self.tokenizer
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id if own.eos_token_id is None else own.eos_token_id,
            pad_token_id=words.eos_token_id if words.pad_token_id is None else words.pad_token_id,
        )


def family_named(class_name: str, name: str) -> ModuleType:
    family = family_of(class_name)
    if family is None:
        known = ", ".join(supported_classes())
        raise EmbedLensError(f"{name} is a {class_name}, which is not supported: pass a checkpoint of {known}")
    return family


def preprocessing_of(wanted: str | None, family: ModuleType) -> str:
    """One that the family has; its first by default."""
    wanted = family.PREPROCESSINGS[0] if wanted is None else wanted
    if wanted in family.PREPROCESSINGS:
        return wanted
    raise EmbedLensError(f"unknown preprocessing {wanted!r}: choose one of {', '.join(family.PREPROCESSINGS)}")
