"""Nearest words *in context*: a visual token beside what text tokens look like deep inside the same model.

LatentLens (arXiv 2602.00462) compares with what words of real sentences are at the layers of the language model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from embedlens.batches import in_batches
from embedlens.errors import EmbedLensError, writing
from embedlens.lenses import EmbedLens
from embedlens.prompts import side_by_side
from embedlens.vlm import Prompt, VisionLanguageModel

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
LAYERS = 8  # by default at most
FORMAT = "embedlens context bank 1"


class ContextLens(EmbedLens):
    """Nearest contextual representations of words, by cosine; made by `build`, kept by `save`. As any lens, whose
    `topk` gives rows of the bank, `sentences` each word in its sentence. A word may come several times.

    Attributes:
        tokens: the word of each row.
        layer: Long[rows], which layer it was taken from; l is what leaves block l - 1, as in `model.hidden_states`.
    """

    def __init__(
        self,
        vectors: Float[Tensor, "rows d"],
        tokens: Sequence[str],
        layer: Int[Tensor, " rows"],
        places: Sequence[tuple[int, int]],
        texts: Sequence[str],
        model: str,
    ) -> None:
        super().__init__(vectors, tokens)
        self.layer = layer
        self._vectors, self._places, self._texts, self._model = vectors, list(places), list(texts), model

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        model: VisionLanguageModel,
        texts: Iterable[str],
        layers: Sequence[int] | None = None,
        per_word: int = 20,
        most: int = 100_000,
        batch_size: int = 32,
    ) -> ContextLens:
        """Run texts through the language model and keep what its words look like there: of a word of several tokens
        the last one. What stands behind the same beginning of a text is the same vector and is kept once.

        Args:
            texts: sentences, such as captions; read until the bank is full, each as far as the model has positions.
                Shuffle them before if they are sorted.
            layers: which to keep, 1 to `model.n_layers`; by default up to eight, evenly spaced, the last included.
            per_word: sentences of each word at most.
            most: rows at most, all layers together; a row takes 2 d bytes.

        Raises:
            EmbedLensError: no words, no such layer, no room for one word, or an active intervention.

        >>> import embedlens as el
        >>> model = el.load("miniature")
        >>> lens = el.ContextLens.build(model, ["a red dog", "a red cat"], layers=[4])
        >>> lens.tokens, lens.sentences(lens.vectors[-1:], k=1)
        (['a', 'red', 'dog', 'cat'], [['a red «cat»']])
        """
        layers = _spaced(model.n_layers) if layers is None else list(dict.fromkeys(layers))
        if not layers or not all(layer in range(1, model.n_layers + 1) for layer in layers):
            raise EmbedLensError(f"layers are {layers}: pass some of 1 to {model.n_layers}; layer 0 has no context yet")
        if isinstance(texts, str):
            raise EmbedLensError("the texts are one text: pass a list of them")
        limits = {"per_word": (per_word, 1), "batch_size": (batch_size, 1), "most": (most, len(layers))}
        for name, (given, least) in limits.items():
            if given < least:
                raise EmbedLensError(f"{name} is {given}: pass at least {least}")
        if model.intervention is not None:
            raise EmbedLensError("a bank is built without interventions: leave the intervene block first")
        seen, counted = set[str](), Counter[str]()
        kept_texts: list[str] = []
        tokens: list[str] = []
        places: list[tuple[int, int]] = []
        vectors: list[Tensor] = []
        for batch in _batches(model, texts, batch_size):
            wanted: list[tuple[int, int]] = []  # row of the batch, token
            for row, (text, _, ends) in enumerate(batch):
                for start, stop, token in ends:
                    word, beginning = text[start:stop], text[:stop]
                    if beginning in seen or counted[word] >= per_word or (len(places) + 1) * len(layers) > most:
                        continue
                    seen.add(beginning)
                    counted[word] += 1
                    tokens.append(word)
                    places.append((len(kept_texts) + row, stop))
                    wanted.append((row, token))
            kept_texts += [text for text, _, _ in batch]
            if wanted:
                read = partial(_read, model, layers, wanted)
                vectors.append(torch.cat(list(in_batches(read, [ids for _, ids, _ in batch])), dim=1))
            if (len(places) + 1) * len(layers) > most:
                break
        if not vectors:
            raise EmbedLensError("the texts hold no word: pass sentences")
        bank = torch.cat(vectors, dim=1)
        layer = torch.tensor(layers).repeat_interleave(bank.shape[1])
        return cls(bank.flatten(0, 1), tokens * len(layers), layer, places * len(layers), kept_texts, _signed(model))

    @property
    def vectors(self) -> Float[Tensor, "rows d"]:
        """The representations; a file keeps them in half precision."""
        return self._vectors

    def sentences(self, h: Float[Tensor, "n d"], k: int = 5) -> list[list[str]]:
        """The k nearest words of each vector, each in the text it was taken from, up to it."""
        return [[self._sentence(index) for index in row] for row in self.topk(h, k)[1].tolist()]

    def _sentence(self, index: int) -> str:
        (text, stop), word = self._places[index], self.tokens[index]
        return f"{self._texts[text][: stop - len(word)]}«{word}»"

    def reading(self, model: VisionLanguageModel, prompt: Prompt, k: int) -> Int[Tensor, "layers tokens k"]:
        """Vocabulary ids of the k nearest words of each visual token by layer, as `label_hits` takes a reading."""
        return self.vocabulary_ids(model)[self.topk(model.hidden_states(prompt)[:, prompt.visual], k)[1].cpu()]

    def vocabulary_ids(self, model: VisionLanguageModel) -> Int[Tensor, " rows"]:
        """The vocabulary entry of each row's word; where it is no single one, the token that begins a text."""
        known, none = model.tokenizer.get_vocab(), model.tokenizer.bos_token_id or 0
        forms = ([space + word for space in ("", "Ġ", "▁") if space + word in known] for word in self.tokens)
        return torch.tensor([known[found[0]] if found else none for found in forms])

    def save(self, file: Path | str) -> Path:
        """Write the bank to one .safetensors file, with the model it is of."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        file = Path(file).expanduser()
        told = {"words": list(self.tokens), "places": self._places, "texts": self._texts, "model": self._model}
        # half precision; what is too large for it is made shorter, as only directions are compared
        too_large = self._vectors.float().abs().amax(-1, keepdim=True) / torch.finfo(torch.half).max
        halved = (self._vectors.float() / too_large.clamp(min=1)).half()
        parts = {"vectors": halved.cpu().contiguous(), "layer": self.layer.cpu()}
        with writing(file):
            try:
                save_file(parts, file, metadata={"format": FORMAT, "told": json.dumps(told)})
            except SafetensorError as error:
                raise OSError(str(error)) from None
        return file

    @classmethod
    def load(cls, file: Path | str, model: VisionLanguageModel) -> ContextLens:
        """The bank in a file, if it is of this model. EmbedLensError: no such file, no bank, or the bank of another
        model or of other weights."""
        from safetensors import SafetensorError, safe_open

        file = Path(file).expanduser()
        if not file.is_file():
            raise EmbedLensError(f"no bank at {file}: make one with ContextLens.build(...).save({file.name!r})")
        try:
            with safe_open(file, "pt") as opened:
                told = opened.metadata() or {}
                if told.get("format") != FORMAT:
                    raise EmbedLensError(f"{file} is no bank of ContextLens: pass a file that `save` wrote")
                parts = {name: opened.get_tensor(name) for name in ("vectors", "layer")}
        except SafetensorError as error:
            raise EmbedLensError(f"{file} cannot be read ({error}): build the bank again") from None
        known = json.loads(told["told"])
        if known["model"].split()[-1] != _signed(model).split()[-1]:  # a folder may be called by another name
            raise EmbedLensError(f"{file} is of {known['model']}, the model is {_signed(model)}: build a bank of it")
        places = [tuple(place) for place in known["places"]]
        return cls(
            parts["vectors"].to(model.device), known["words"], parts["layer"], places, known["texts"], known["model"]
        )


def _spaced(n_layers: int) -> list[int]:
    """
    >>> _spaced(32), _spaced(3)
    ([4, 8, 12, 16, 20, 24, 28, 32], [1, 2, 3])
    """
    count = min(LAYERS, n_layers)
    return [round((place + 1) * n_layers / count) for place in range(count)]


def _batches(model: VisionLanguageModel, texts: Iterable[str], size: int):
    """(text, ids, words as (start, stop, place of the last token)) of several texts at a time."""
    first = [model.tokenizer.bos_token_id] if model.tokenizer.bos_token_id is not None else []
    most = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    batch = []
    for text in texts:
        if not isinstance(text, str):
            raise EmbedLensError(f"one of the texts is of type {type(text).__name__}: pass texts")
        made = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = []
        for found in WORD.finditer(text):
            inside = [at for at, (a, b) in enumerate(made["offset_mapping"]) if a < found.end() and b > found.start()]
            if inside and (most is None or len(first) + inside[-1] < most):
                ends.append((found.start(), found.end(), len(first) + inside[-1]))
        if ends:
            batch.append((text, [*first, *made["input_ids"]][:most], ends))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _read(
    model: VisionLanguageModel,
    layers: Sequence[int],
    wanted: Sequence[tuple[int, int]],
    start: int,
    ids: Sequence[Sequence[int]],
) -> list[Float[Tensor, "layers words d"]]:
    """Wanted tokens, (row, token), of the texts from row `start` on."""
    own = [(row - start, token) for row, token in wanted if start <= row < start + len(ids)]
    rows, at = torch.tensor(own, dtype=torch.long, device=model.device).reshape(-1, 2).T
    stream = _stream(model, ids)
    return [torch.stack([stream[layer].to(model.device)[rows, at].float() for layer in layers])]


def _stream(model: VisionLanguageModel, ids: Sequence[Sequence[int]]) -> list[Float[Tensor, "b s d"]]:
    """What enters the first block and what leaves each, of texts padded on the right."""
    texts = [torch.tensor(own, device=model.device) for own in ids]
    rows, mask = side_by_side(texts, "right"), side_by_side([torch.ones_like(own) for own in texts], "right")
    with model.lock, model.recording() as layers:
        model.decoder(inputs_embeds=model.hf.get_input_embeddings()(rows), attention_mask=mask, use_cache=False)
    return layers


def _signed(model: VisionLanguageModel) -> str:
    """Name and a digest of weights of the language model, some of each of its parts: others are another model."""
    parts = [model.input_embeddings[:64], *(p.detach().flatten()[:256] for p in model.blocks.parameters())]
    data = b"".join(part.float().cpu().numpy().tobytes() for part in parts)
    return f"{model.name} ({hashlib.sha256(data).hexdigest()[:12]})"
