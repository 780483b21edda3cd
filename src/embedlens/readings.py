"""One prompt whose visual rows are exchanged: what its readings share runs once.

Readings of a picture share all rows before the first that differs, whose keys and values are kept; what follows runs in
batches. `embedlens.redundancy` says what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from embedlens.attention_maps import followed_by
from embedlens.batches import halving
from embedlens.errors import EmbedLensError
from embedlens.model_names import MINIATURE, unsigned
from embedlens.vlm import QUESTION, Prompt, VisionLanguageModel

#: The released prompt for LLaVA-1.5.
RELEASED_QUESTION = "What does this image show? You must provide a single word that best describes the image."
ARTICLES = ("A", "a", "An", "an", "The", "the")
RELEASED_ARTICLES = ("A",)
REPLACEMENTS = ("row 0", "zeros", "mean token")
HEAD = 50  # logits that the released top-1 probability is taken over


@dataclass(frozen=True)
class Protocol:
    """How tokens are read. The defaults are the release's, but for articles."""

    question: str = RELEASED_QUESTION
    replacement: str = "row 0"  #: For a removed token, of REPLACEMENTS; row 0 of the embedding is the release's pad id
    articles: tuple[str, ...] = ARTICLES  #: Words that are skipped where the answer begins with one
    #: The run without the token is read after the article that the intact run wrote; False, as released: each run skips
    #: its own article, so that two runs may be compared at different steps
    aligned: bool = True
    head: int = HEAD
    side: int = 3  #: Of the square neighbourhood, in patches
    k: int = 10  #: Words of the intact run that the divergence compares
    weights: tuple[float, float] = (1.0, 16.0)  #: Of region and picture in the cascade

    def __post_init__(self) -> None:
        if self.replacement not in REPLACEMENTS:
            raise EmbedLensError(f"unknown replacement {self.replacement!r}: use one of {str(REPLACEMENTS)[1:-1]}")
        if min(self.head, self.side, self.k) < 1:
            raise EmbedLensError(f"head {self.head}, side {self.side} and k {self.k}: each is at least 1")


RELEASED = Protocol(articles=RELEASED_ARTICLES, aligned=False)


def describing(model: VisionLanguageModel) -> str:
    """The question that asks this model for one word: the paper's, or the miniature's own, which it was trained with.
    The miniature answers the paper's prompt with a caption, whose first word is no object."""
    return QUESTION if unsigned(model.name) == MINIATURE else RELEASED_QUESTION


def prepared(
    model: VisionLanguageModel,
    prompt: Prompt,
    places: Int[Tensor, " _"] | Sequence[int] | None,
    protocol: Protocol | None,
    batch_size: int,
) -> tuple[Reader, Prompt, Int[Tensor, " m"]]:
    """Who reads, the prompt with the protocol's question, and which tokens are read."""
    protocol = Protocol(question=describing(model)) if protocol is None else protocol
    if model.intervention is not None:
        raise EmbedLensError("tokens are read without interventions: leave the intervene block first")
    if batch_size < 1:
        raise EmbedLensError(f"batch_size is {batch_size}: pass at least 1")
    if prompt.rows is not None:
        raise EmbedLensError("this prompt has lost visual tokens already: pass the whole prompt")
    prompt = prompt if prompt.question == protocol.question else model.asked(prompt, protocol.question)
    n = len(prompt.grid)
    at = torch.arange(n) if places is None else torch.as_tensor(places, dtype=torch.long)
    if not len(at) or int(at.min()) < 0 or int(at.max()) >= n:
        raise EmbedLensError(f"places {at.tolist()} in a picture of {n} tokens: pass some of 0 to {n - 1}")
    # own positions or features added at depth: each reading is a prompt of its own
    plain = prompt.positions is None and prompt.deep is None
    return (Reader if plain else PromptReader)(model, prompt, protocol, batch_size), prompt, at


#: Keys and values of each layer, of some rows of one prompt or of several.
Bank = Sequence[tuple[Float[Tensor, "_ heads _ c"], Float[Tensor, "_ heads _ c"]]]
TAIL = 8  # times `batch_size`: rows of a batch of readings that start at different rows


class Reader:
    """One prompt whose visual rows are exchanged: it keeps what readings share, and runs the rest."""

    def __init__(self, model: VisionLanguageModel, prompt: Prompt, protocol: Protocol, batch_size: int) -> None:
        self.model, self.protocol, self.batch_size, self.prompt = model, protocol, batch_size, prompt
        self.embeds, self.visual = prompt.embeds, prompt.visual.nonzero()[:, 0].cpu()
        self.start = int(self.visual[0])
        self.tokens = prompt.embeds[prompt.visual]
        self.blank = {
            "row 0": model.input_embeddings[0],
            "zeros": torch.zeros_like(self.tokens[0]),
            "mean token": self.tokens.mean(0),
        }[protocol.replacement].to(self.tokens)
        skipped = [index for index, word in enumerate(model.tokens) if word.removeprefix("·") in protocol.articles]
        self.articles = torch.tensor(skipped, dtype=torch.long)

    @cached_property
    def prefix(self) -> Bank:
        """The text before the picture, which all readings begin with."""
        return self._run(self.embeds[None, : self.start])[1]

    def read(
        self, at: Int[Tensor, "m w"], source: Int[Tensor, " k"], gone: Bool[Tensor, "k w"]
    ) -> tuple[Float[Tensor, "m V"], Float[Tensor, "k V"]]:
        """Logits at the first content word: of prompts with some visual tokens, and of the same with some replaced.

        `at` are the tokens that a prompt has, in raster order, `source` the prompts to read again, which share the rows
        before the first that is replaced, and `gone` which of their tokens are.
        """
        found, self.batch_size = halving(partial(self._read, at, source, gone), self.batch_size)
        return found

    def _read(
        self, at: Int[Tensor, "m w"], source: Int[Tensor, " k"], gone: Bool[Tensor, "k w"], batch_size: int
    ) -> tuple[Float[Tensor, "m V"], Float[Tensor, "k V"]]:
        tails, columns = self._tails(at)
        lost = torch.zeros(len(source), tails.shape[1], dtype=torch.bool).scatter_(1, columns[source], gone)
        first = lost.int().argmax(1)
        intact, without = (self._empty(len(rows)) for rows in (at, source))
        for batch in _batches(torch.arange(len(at)), batch_size):
            found, bank = self._run(tails[batch], [self.prefix])
            intact[batch], wrote = self._content(found, partial(self._after, tails[batch], [self.prefix], None), None)
            own = torch.isin(source, batch).nonzero()[:, 0]
            own = own[first[own].argsort(stable=True)]  # those that differ early run together
            for rows in _batches(own, max(1, TAIL * batch_size // tails.shape[1])):
                of, shared = source[rows] - batch[0], int(first[rows].min())
                tail = tails[source[rows], shared:]
                tail[lost[rows, shared:].to(tail.device)] = self.blank
                before = [self.prefix, [(keys[:, :, :shared], values[:, :, :shared]) for keys, values in bank]]
                given = wrote[of] if self.protocol.aligned else None
                again = partial(self._after, tail, before, of)
                without[rows], _ = self._content(self._run(tail, before, of)[0], again, given)
        return intact, without

    def _tails(self, at: Int[Tensor, "m w"]) -> tuple[Float[Tensor, "m s d"], Int[Tensor, "m w"]]:
        """What follows the prefix, in order of position, and where in it the visual rows are."""
        text = self.start + (~self.prompt.visual[self.start :]).nonzero()[:, 0].cpu()
        places = torch.cat([self.visual[at], text.expand(len(at), -1)], 1)
        order = places.argsort(1)
        return self.embeds[places.gather(1, order).to(self.embeds.device)], order.argsort(1)[:, : at.shape[1]]

    def _after(
        self, tail: Float[Tensor, "m s d"], before: Sequence[Bank], of: Tensor | None, rows: Tensor, words: Tensor
    ) -> Float[Tensor, "b V"]:
        """Logits of rows of a batch, run again with one more word each."""
        word = self.model.input_embeddings[words.to(self.embeds.device)][:, None].to(self.embeds)
        tail = torch.cat([tail[rows.to(tail.device)], word], 1)
        return self._run(tail, before, None if of is None else of[rows])[0]

    def _content(
        self, logits: Float[Tensor, "m V"], again: Callable[[Tensor, Tensor], Tensor], wrote: Int[Tensor, " m"] | None
    ) -> tuple[Float[Tensor, "m V"], Int[Tensor, " m"]]:
        """Logits at the first content word of readings, given those at the first word, and the article before it (-1:
        none). `again` gives the logits of some of them after a further word each; `wrote` are the articles to read
        after, None: those that the readings begin with themselves."""
        if wrote is None:
            best = logits.argmax(-1).cpu()
            wrote = torch.where(torch.isin(best, self.articles), best, -1)
        if bool((wrote >= 0).any()):
            logits[wrote >= 0] = again((wrote >= 0).nonzero()[:, 0], wrote[wrote >= 0])
        return logits, wrote

    def _empty(self, m: int) -> Float[Tensor, "m V"]:
        return torch.empty(m, self.model.unembed.n_rows, device=self.embeds.device)

    def _logits(self, hidden: Float[Tensor, "b d"]) -> Float[Tensor, "b V"]:
        return self.model.unembed(hidden, norm=False).to(self.embeds.device).float()  # the decoder has normed it

    def _run(
        self, tail: Float[Tensor, "b s d"], before: Sequence[Bank] = (), of: Tensor | None = None
    ) -> tuple[Float[Tensor, "b V"], Bank]:
        """Logits after the last row of each tail, and the keys and values of all its rows. `before` is what stands
        before them, one after the other, of one prompt or of several; `of` says which of several stands before each
        tail."""
        from transformers import DynamicCache

        def laid(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([p.expand(len(tail), -1, -1, -1) if len(p) == 1 else p[of] for p in parts], -2)

        layers = zip(*before, strict=True)
        past = DynamicCache([[laid(side) for side in zip(*parts, strict=True)] for parts in layers])
        start = past.get_seq_length()
        with self.model.lock:
            output = self.model.decoder(inputs_embeds=tail, past_key_values=past, use_cache=True)
        own = [(layer.keys[:, :, start:], layer.values[:, :, start:]) for layer in past.layers]
        return self._logits(output.last_hidden_state[:, -1]), own


class PromptReader(Reader):
    """The same readings as whole prompts, by the model's own way of running them: slower, and right for any family.
    Models whose visual rows have positions of their own, or features that are added at depth, are read like this."""

    def _read(
        self, at: Int[Tensor, "m w"], source: Int[Tensor, " k"], gone: Bool[Tensor, "k w"], batch_size: int
    ) -> tuple[Float[Tensor, "m V"], Float[Tensor, "k V"]]:
        intact, wrote = self._prompts([self._shorter(places) for places in at], None, batch_size)
        shorter = [self._shorter(at[row], lost) for row, lost in zip(source, gone, strict=True)]
        return intact, self._prompts(shorter, wrote[source] if self.protocol.aligned else None, batch_size)[0]

    def _shorter(self, places: Int[Tensor, " w"], gone: Bool[Tensor, " w"] | None = None) -> Prompt:
        """The prompt with some of its tokens, of which some are replaced."""
        rows = self.tokens[places]
        if gone is not None:
            rows[gone] = self.blank
        absent = torch.ones(len(self.visual), dtype=torch.bool, device=self.prompt.visual.device)
        absent[places] = False
        prompt = self.prompt.without(absent) if bool(absent.any()) else self.prompt
        embeds, deep = prompt.embeds.clone(), prompt.deep
        embeds[prompt.visual] = rows
        if deep is not None:  # what replaces a token brings no features of its own
            deep = deep * (rows != self.blank).any(-1)[:, None].to(deep)
        return replace(prompt, embeds=embeds, deep=deep)

    def _prompts(
        self, prompts: list[Prompt], wrote: Int[Tensor, " m"] | None, batch_size: int
    ) -> tuple[Float[Tensor, "m V"], Tensor]:
        logits, articles = self._empty(len(prompts)), torch.full((len(prompts),), -1)
        for keep in _batches(torch.arange(len(prompts)), batch_size):
            own, given = [prompts[row] for row in keep], None if wrote is None else wrote[keep]
            logits[keep], articles[keep] = self._content(self._whole(own), partial(self._longer, own), given)
        return logits, articles

    def _longer(self, prompts: list[Prompt], rows: Int[Tensor, " b"], words: Int[Tensor, " b"]) -> Tensor:
        own = zip(rows, words, strict=True)
        return self._whole([followed_by(self.model, prompts[row], word[None]) for row, word in own])

    def _whole(self, prompts: list[Prompt]) -> Float[Tensor, "b V"]:
        with self.model.running(prompts) as entered:
            embeds, mask = self.model.padded(entered)
            hidden = self.model.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        return self._logits(torch.stack([row[len(prompt) - 1] for row, prompt in zip(hidden, entered, strict=True)]))


def _batches(rows: Int[Tensor, " m"], size: int) -> Sequence[Int[Tensor, " _"]]:
    return rows.split(size) if len(rows) else ()
