"""What one visual token says, and what the answer loses without it: the scores behind the redundancy codebook.

Source: "Beyond Intermediate States: Explaining Visual Redundancy through Language" (2503.20540) and its released code.
A token is read in three ways, each of them one step of the language model:

    alone       the only visual token of the prompt: how sure is the first word of the answer?
    region      its 3 x 3 neighbourhood alone, with and without it
    picture     the whole picture, with and without that whole neighbourhood

"Without" puts one fixed vector in a token's place; the length stays. `D = JSD(region) + 16 JSD(picture)` is what the
answer loses. Where the release differs from its description, `Protocol` has both.

The readings of a picture share all rows before the first that differs. Their keys and values are kept when they run;
what follows runs in batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.model_names import MINIATURE, unsigned
from embedlens.vlm import QUESTION

if TYPE_CHECKING:
    from embedlens.patches import PatchGrid
    from embedlens.vlm import Prompt, VisionLanguageModel
else:
    PatchGrid = Prompt = VisionLanguageModel = object

#: The released prompt for LLaVA-1.5, and the one in the paper's figure of the pipeline.
RELEASED_QUESTION = "What does this image show? You must provide a single word that best describes the image."
FIGURE_QUESTION = "What does this image show? You must provide a single word or phrase that best describes it."
ARTICLES = ("A", "a", "An", "an", "The", "the")
RELEASED_ARTICLES = ("A",)
REPLACEMENTS = ("row 0", "zeros", "mean token")
VARIANTS = ("released", "textbook")
HEAD = 50  # logits that the released top-1 probability is taken over
RANKS = (  # places in the order of similarity to CLS, of 576, that the release scores; counted from 0
    *range(24), *range(36, 44), *range(72, 80), *range(144, 152), *range(216, 224), *range(288, 296),
    *range(360, 368), *range(432, 440), *range(504, 512), *range(568, 576),
)  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """How tokens are read. The defaults are the release's, but for articles."""

    question: str = RELEASED_QUESTION
    replacement: str = "row 0"
    """What stands in for a removed token: "row 0" of the input embeddings (the release's padding id), "zeros", or the
    "mean token" of the picture."""
    articles: tuple[str, ...] = ARTICLES
    """Words that are skipped where the answer begins with one."""
    aligned: bool = True
    """True: the run without the token is read after the article that the intact run wrote. False, as released: each
    run skips its own article, so that two runs may be compared at different steps."""
    head: int = HEAD
    side: int = 3
    """Of the square neighbourhood, in patches."""
    k: int = 10
    """Words of the intact run that the divergence compares."""
    weights: tuple[float, float] = (1.0, 16.0)
    """Of region and picture in the cascade."""

    def __post_init__(self) -> None:
        if self.replacement not in REPLACEMENTS:
            names = ", ".join(map(repr, REPLACEMENTS))
            raise EmbedLensError(f"unknown replacement {self.replacement!r}: use one of {names}")
        if min(self.head, self.side, self.k) < 1:
            raise EmbedLensError(f"head {self.head}, side {self.side} and k {self.k}: each is at least 1")


RELEASED = Protocol(articles=RELEASED_ARTICLES, aligned=False)


def describing(model: VisionLanguageModel) -> str:
    """The question that asks this model for one word: the paper's, or the miniature's own, which it was trained with.

    The miniature answers the paper's prompt with a caption, whose first word is no object.
    """
    return QUESTION if unsigned(model.name) == MINIATURE else RELEASED_QUESTION


# --- pure parts ------------------------------------------------------------------------------------------------------


def window(place: int, grid: PatchGrid, side: int = 3) -> Int[Tensor, " m"]:
    """The tokens around one, in raster order: a square of `side` patches, shifted inward where it would leave the grid.

    A grid that is smaller than the square gives its whole side.

    >>> from embedlens.patches import Frame, PatchGrid
    >>> grid = PatchGrid(rows=4, cols=5, frame=Frame.stretch(50, 40))
    >>> window(7, grid).tolist(), window(0, grid).tolist()
    ([1, 2, 3, 6, 7, 8, 11, 12, 13], [0, 1, 2, 5, 6, 7, 10, 11, 12])
    """
    if not 0 <= place < len(grid):
        raise EmbedLensError(f"there is no token {place} in a grid of {len(grid)}: pass 0 to {len(grid) - 1}")
    if len(grid.views) > 1:  # a neighbourhood lies in one view
        start = 0
        for view in grid.views:
            if place < start + len(view):
                return start + window(place - start, view, side)
            start += len(view)
    row, col = divmod(place, grid.cols)

    def along(at: int, length: int) -> Tensor:
        size = min(side, length)
        first = min(max(0, at - (size - 1) // 2), length - size)
        return torch.arange(first, first + size)

    rows, cols = along(row, grid.rows), along(col, grid.cols)
    return (rows[:, None] * grid.cols + cols).flatten()


def block_centres(grid: PatchGrid, side: int = 3) -> Int[Tensor, " m"]:
    """Middle tokens of the disjoint blocks that tile a grid: the paper's 64 of 576 (Figure 4).

    >>> from embedlens.patches import Frame, PatchGrid
    >>> block_centres(PatchGrid(rows=24, cols=24, frame=Frame.stretch(24, 24)))[:3].tolist()
    [25, 28, 31]
    """
    if len(grid.views) > 1:
        starts = [sum(map(len, grid.views[:at])) for at in range(len(grid.views))]
        return torch.cat([start + block_centres(view, side) for start, view in zip(starts, grid.views, strict=True)])
    if min(grid.rows, grid.cols) < side:
        return torch.arange(len(grid))
    rows, cols = (torch.arange((side - 1) // 2, length - side // 2, side) for length in (grid.rows, grid.cols))
    return (rows[:, None] * grid.cols + cols).flatten()


def sampled_ranks(n: int) -> Int[Tensor, " m"]:
    """Which places of an order of n tokens are scored: the released 96 of 576, as far along it; all of few.

    >>> len(sampled_ranks(576)), len(sampled_ranks(64))
    (96, 64)
    """
    if n <= len(RANKS):
        return torch.arange(n)
    return torch.tensor(sorted({round(rank * (n - 1) / 575) for rank in RANKS}))


def top_probability(logits: Float[Tensor, "*batch V"], head: int | None = HEAD) -> Float[Tensor, "*batch"]:
    """Probability of the likeliest word: over the `head` highest logits, as released, or over the whole vocabulary.

    >>> logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    >>> round(float(top_probability(logits, head=2)), 4), round(float(top_probability(logits, head=None)), 4)
    (0.7311, 0.6439)
    """
    if head is not None:
        logits = logits.topk(min(head, logits.shape[-1])).values
    return logits.float().softmax(-1).amax(-1)


def divergence(
    intact: Float[Tensor, "*batch V"], without: Float[Tensor, "*batch V"], variant: str = "released", k: int = 10
) -> Float[Tensor, "*batch"]:
    """How far the answer's first word moves, on the k likeliest words of the intact run; in nats.

    Both runs' logits at those k words are normalised to p and q, with m = (p + q) / 2.

    Args:
        intact: logits with the token.
        without: logits without it.
        variant: "textbook", the Jensen-Shannon divergence [KL(p|m) + KL(q|m)] / 2; or "released", which has the
            arguments of KL turned around and a mean over the k words in place of the sum: about a tenth of it.
        k: words compared; all of a smaller vocabulary.

    >>> p, q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(float(divergence(p, q, "textbook")), 6), round(float(divergence(p, q, "released")), 6)
    (0.130812, 0.071921)
    """
    if variant not in VARIANTS:
        raise EmbedLensError(f"unknown variant {variant!r}: use 'released' or 'textbook'")
    if intact.shape != without.shape:
        raise EmbedLensError(
            f"logits of shapes {tuple(intact.shape)} and {tuple(without.shape)}: pass both runs of the same tokens"
        )
    ids = intact.topk(min(k, intact.shape[-1])).indices
    log_p, log_q = (logits.gather(-1, ids).double().log_softmax(-1) for logits in (intact, without))
    p, q = log_p.exp(), log_q.exp()
    m = (p + q) / 2
    log_m = m.log()
    if variant == "textbook":
        value = (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2
    else:
        value = (m * (2 * log_m - log_p - log_q)).mean(-1) / 2
    return value.clamp_min(0).float()


def dpc_knn(tokens: Float[Tensor, "n d"], clusters: int, k: int = 5, rms: float | None = None) -> Int[Tensor, " n"]:
    """Clusters by density peaks with nearest neighbours; 0 is that of the first centre. The same on every run.

    Distances are Euclidean over √d. A token's density is exp(-mean square distance to its k nearest, itself among
    them); its separation is the distance to the nearest denser token; the tokens of largest product are the centres,
    and every token goes to the nearest. The release breaks ties by noise, this by index, and products are compared as
    logarithms, as densities of long vectors would all be zero.

    Args:
        tokens: one per row.
        clusters: how many; as many as there are tokens if they are fewer.
        k: neighbours that make a density.
        rms: bring the tokens' median root mean square to this first, as densities depend on the unit; None: as they
            are, which is what the release does at the `LLAVA_RMS` of its model.

    Source: Du, Ding and Jia, Knowledge-Based Systems 99 (2016); as in TCFormer and Chat-UniVi.

    >>> dpc_knn(torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.3], [5.6]]), clusters=2, k=2).tolist()
    [0, 0, 0, 1, 1, 1]
    """
    if not len(tokens) or clusters < 1 or k < 1:
        raise EmbedLensError(f"{len(tokens)} tokens, {clusters} clusters, k = {k}: each is at least 1")
    tokens = tokens.detach().double().cpu()
    if rms is not None:
        own = float(tokens.pow(2).mean(-1).sqrt().median())
        tokens = tokens * (rms / own) if own > 0 else tokens
    n = len(tokens)
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / tokens.shape[1] ** 0.5
    log_density = -distance.topk(min(k, n), largest=False).values.pow(2).mean(-1)
    order = torch.arange(n)
    denser = (log_density[None] > log_density[:, None]) | (
        (log_density[None] == log_density[:, None]) & (order[None] < order[:, None])
    )
    separation = distance.masked_fill(~denser, torch.inf).amin(-1)
    separation = torch.where(denser.any(-1), separation, distance.max())
    product = log_density + separation.log()  # a duplicate of a denser token is no centre: its log is -inf
    centres = product.sort(descending=True, stable=True).indices[: min(clusters, n)]
    labels = distance[:, centres].argmin(-1)
    labels[centres] = torch.arange(len(centres))
    return labels


LLAVA_RMS = 31 / 4096**0.5  # median norm of LLaVA-1.5's stored tokens over the root of their width


# --- readings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Readings:
    """Logits of the first word of the answer, of one picture. Row i is about token `places[i]`."""

    places: Int[Tensor, " m"]
    alone: Float[Tensor, "m V"]
    region: Float[Tensor, "m V"]
    region_without: Float[Tensor, "m V"]
    """The region with the one token replaced."""
    picture: Float[Tensor, "m V"]
    """The intact picture: the same run in every row where nothing depends on the token."""
    picture_without: Float[Tensor, "m V"]
    """The picture with the token's whole region replaced."""
    protocol: Protocol = field(repr=False, default_factory=Protocol)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """The scores of some visual tokens of one picture."""

    places: Int[Tensor, " m"]
    word: Int[Tensor, " m"]
    """Likeliest first word of the token alone."""
    probability: Float[Tensor, " m"]
    """Its probability over the head vocabulary, which thresholds are calibrated to."""
    probability_full: Float[Tensor, " m"]
    """Over the whole vocabulary."""
    logit: Float[Tensor, " m"]
    region: Float[Tensor, "m 2"]
    """Divergence of the region, "released" and "textbook"."""
    picture: Float[Tensor, "m 2"]
    """Divergence of the picture, likewise."""
    weights: tuple[float, float]

    def cascade(self, variant: str = "released") -> Float[Tensor, " m"]:
        """D: weighted sum of both divergences (Section 3 of the facts; weights 1 and 16 in every released config)."""
        if variant not in VARIANTS:
            raise EmbedLensError(f"unknown variant {variant!r}: use 'released' or 'textbook'")
        at = VARIANTS.index(variant)
        return self.weights[0] * self.region[:, at] + self.weights[1] * self.picture[:, at]


def scored(readings: Readings) -> TokenScores:
    """The scores that logits give."""
    protocol = readings.protocol

    def both(intact: Tensor, without: Tensor) -> Tensor:
        return torch.stack([divergence(intact, without, variant, protocol.k) for variant in VARIANTS], -1)

    logit, word = readings.alone.max(-1)
    return TokenScores(
        places=readings.places,
        word=word,
        probability=top_probability(readings.alone, protocol.head),
        probability_full=top_probability(readings.alone, None),
        logit=logit,
        region=both(readings.region, readings.region_without),
        picture=both(readings.picture, readings.picture_without),
        weights=protocol.weights,
    )


def token_scores(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    places: Sequence[Int[Tensor, " _"]] | None = None,
    protocol: Protocol | None = None,
    batch_size: int = 64,
) -> list[TokenScores]:
    """Scores of the tokens of several pictures; `readings_of` says what is run.

    Args:
        model: from `embedlens.load`.
        prompts: one per picture; their question is replaced by the protocol's.
        places: tokens of each picture; default: all.
        protocol: default: the release's with the model's own question (`describing`), articles aligned.
        batch_size: readings that run together; the scores do not depend on it, up to rounding.
    """
    if places is not None and len(places) != len(prompts):
        raise EmbedLensError(f"{len(prompts)} pictures but {len(places)} sets of places: pass one set per picture")
    chosen = [None] * len(prompts) if places is None else places
    return [
        scored(readings_of(model, prompt, at, protocol, batch_size)) for prompt, at in zip(prompts, chosen, strict=True)
    ]


@torch.no_grad()
def readings_of(
    model: VisionLanguageModel,
    prompt: Prompt,
    places: Int[Tensor, " _"] | Sequence[int] | None = None,
    protocol: Protocol | None = None,
    batch_size: int = 64,
) -> Readings:
    """Read tokens of one picture alone, in their region and in the whole picture.

    Four readings a token and one of the picture. The text before the picture runs once, and a reading without a token
    starts at the first row that differs within its batch.

    Raises:
        EmbedLensError: a place that is not in the picture, an active intervention, a batch size below 1.
    """
    reader, prompt, at = _prepared(model, prompt, places, protocol, batch_size)
    n = len(prompt.grid)
    around = [window(int(place), prompt.grid, reader.protocol.side) for place in at]
    if len({len(own) for own in around}) > 1:
        raise EmbedLensError("some places lie in views smaller than the neighbourhood: score each size by itself")
    regions = torch.stack(around)
    none = torch.zeros(0, dtype=torch.long)
    alone, _ = reader.read(at[:, None], none, torch.zeros(0, 1, dtype=torch.bool))
    # tokens at the border share their windows, which are read once
    windows, of_token = regions.unique(dim=0, return_inverse=True)
    region, region_without = reader.read(windows, of_token, regions == at[:, None])
    gone = torch.zeros(len(windows), n, dtype=torch.bool).scatter_(1, windows, True)
    picture, without = reader.read(torch.arange(n)[None], torch.zeros(len(windows), dtype=torch.long), gone)
    return Readings(
        at, alone, region[of_token], region_without, picture.expand(len(at), -1), without[of_token], reader.protocol
    )


@torch.no_grad()
def words_alone(
    model: VisionLanguageModel, prompt: Prompt, k: int = 1, batch_size: int = 64
) -> Int[Tensor, "1 tokens k"]:
    """The k likeliest first words of the answer for each visual token as the only one of the prompt.

    One layer, so that `measures.labels.label_hits` takes it beside lenses. A lens reads a vector; here the whole model
    works on it.
    """
    reader, _, at = _prepared(model, prompt, None, None, batch_size)
    none = torch.zeros(0, dtype=torch.long)
    alone, _ = reader.read(at[:, None], none, torch.zeros(0, 1, dtype=torch.bool))
    return alone.topk(k).indices[None]


def _prepared(
    model: VisionLanguageModel,
    prompt: Prompt,
    places: Int[Tensor, " _"] | Sequence[int] | None,
    protocol: Protocol | None,
    batch_size: int,
) -> tuple[_Reader, Prompt, Int[Tensor, " m"]]:
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
    return (_Reader if plain else PromptReader)(model, prompt, protocol, batch_size), prompt, at


#: Keys and values of each layer, of some rows of one prompt or of several.
Bank = Sequence[tuple[Float[Tensor, "_ heads _ c"], Float[Tensor, "_ heads _ c"]]]
TAIL = 8  # times `batch_size`: rows of a batch of readings that start at different rows


class _Reader:
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
        return self._run(self.embeds[None, : self.start], keep=True)[1]

    def read(
        self, at: Int[Tensor, "m w"], source: Int[Tensor, " k"], gone: Bool[Tensor, "k w"]
    ) -> tuple[Float[Tensor, "m V"], Float[Tensor, "k V"]]:
        """Logits at the first content word: of prompts with some visual tokens, and of the same with some replaced.

        Args:
            at: which tokens a prompt has, in raster order; text between visual rows stays where it is.
            source: prompts to read again, which share the rows before the first that is replaced.
            gone: which of their tokens are replaced.
        """
        tails, columns = self._tails(at)
        lost = torch.zeros(len(source), tails.shape[1], dtype=torch.bool).scatter_(1, columns[source], gone)
        first = lost.int().argmax(1)
        intact, without = (self._empty(len(rows)) for rows in (at, source))
        for batch in _batches(torch.arange(len(at)), self.batch_size):
            found, bank = self._run(tails[batch], [self.prefix], keep=True)
            again = partial(self._further, found, [self.prefix, bank])
            intact[batch], wrote = self._content(again, len(batch), None)
            own = torch.isin(source, batch).nonzero()[:, 0]
            own = own[first[own].argsort(stable=True)]  # those that differ early run together
            for rows in _batches(own, max(1, TAIL * self.batch_size // tails.shape[1])):
                of, shared = source[rows] - batch[0], int(first[rows].min())
                tail = tails[source[rows], shared:]
                tail[lost[rows, shared:].to(tail.device)] = self.blank
                before = [self.prefix, [(keys[:, :, :shared], values[:, :, :shared]) for keys, values in bank]]
                given = wrote[of] if self.protocol.aligned else None
                without[rows], _ = self._content(partial(self._variants, tail, before, of), len(rows), given)
        return intact, without

    def _tails(self, at: Int[Tensor, "m w"]) -> tuple[Float[Tensor, "m s d"], Int[Tensor, "m w"]]:
        """What follows the prefix, in order of position, and where in it the visual rows are."""
        text = (~self.prompt.visual).nonzero()[:, 0].cpu()
        text = text[text > self.start]
        places = torch.cat([self.visual[at], text.expand(len(at), -1)], 1)
        order = places.argsort(1)
        return self.embeds[places.gather(1, order).to(self.embeds.device)], order.argsort(1)[:, : at.shape[1]]

    def _further(
        self, found: Float[Tensor, "m d"], before: Sequence[Bank], rows: Int[Tensor, " b"], words: Tensor | None
    ) -> Float[Tensor, "b V"]:
        """Logits of rows of a batch that has run, or after one more word each."""
        if words is not None:
            return self._logits(self._run(self._embedded(words), before, rows)[0])
        return self._logits(found[rows.to(found.device)])

    def _variants(
        self,
        tail: Float[Tensor, "m s d"],
        before: Sequence[Bank],
        of: Int[Tensor, " m"],
        rows: Int[Tensor, " b"],
        words: Tensor | None,
    ) -> Float[Tensor, "b V"]:
        """Logits of rows of a batch, or after one more word each."""
        tail = tail[rows.to(tail.device)]
        tail = tail if words is None else torch.cat([tail, self._embedded(words)], 1)
        return self._logits(self._run(tail, before, of[rows])[0])

    def _content(self, run: Any, m: int, wrote: Int[Tensor, " m"] | None) -> tuple[Float[Tensor, "m V"], Tensor]:
        """Logits at the first content word of m readings, and the article before it (-1: none).

        Args:
            run: logits of some of them; and after a further word each, if such are given.
            m: how many.
            wrote: articles to read after; None: those that the readings begin with themselves.
        """
        logits, every = self._empty(m), torch.arange(m)
        if wrote is None:
            logits[every] = run(every, None)
            best = logits.argmax(-1).cpu()
            wrote = torch.where(torch.isin(best, self.articles), best, -1)
        elif bool((wrote < 0).any()):
            logits[wrote < 0] = run(every[wrote < 0], None)
        if bool((wrote >= 0).any()):
            logits[wrote >= 0] = run(every[wrote >= 0], wrote[wrote >= 0])
        return logits, wrote

    def _empty(self, m: int) -> Float[Tensor, "m V"]:
        return torch.empty(m, self.model.unembed.n_rows, device=self.embeds.device)

    def _embedded(self, words: Int[Tensor, " b"]) -> Float[Tensor, "b 1 d"]:
        return self.model.input_embeddings[words.to(self.embeds.device)][:, None].to(self.embeds)

    def _logits(self, hidden: Float[Tensor, "b d"]) -> Float[Tensor, "b V"]:
        return self.model.unembed(hidden, norm=False).to(self.embeds.device).float()  # the decoder has normed it

    def _run(
        self, tail: Float[Tensor, "b s d"], before: Sequence[Bank] = (), of: Tensor | None = None, keep: bool = False
    ) -> tuple[Float[Tensor, "b d"], Bank]:
        """What the decoder says after the last row of each tail, and the keys and values of all its rows, if kept.

        Args:
            tail: rows to run.
            before: what stands before them, one after the other; of one prompt, or of several.
            of: which of several stands before each tail.
            keep: whether later runs need keys and values.
        """
        from transformers.cache_utils import Cache

        last = self.model.n_layers - 1
        layers = [_before_class()([bank[layer] for bank in before], of, keep) for layer in range(last + 1)]

        def cut(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            return (args[0][:, -1:],)

        # Nothing reads the last block's other rows. Its MLP, of one row, is added to all of them: they are wrong.
        with self.model.lock:
            hook = self.model.part(last, "mlp_norm").register_forward_pre_hook(cut)
            try:
                output = self.model.decoder(inputs_embeds=tail, past_key_values=Cache(layers=layers), use_cache=True)
            finally:
                hook.remove()
        return output.last_hidden_state[:, -1], [layer.own for layer in layers] if keep else []


@cache
def _before_class() -> Any:
    """The class of a cache layer that puts what is remembered before new rows, where a dynamic one takes them in.

    Nothing is copied for the rows of a batch but for the time that one layer computes.
    """
    from transformers.cache_utils import DynamicLayer

    class Before(DynamicLayer):
        def __init__(self, parts: Bank, of: Tensor | None, keep: bool) -> None:
            super().__init__()
            self.parts, self.of, self.keep = parts, of, keep
            self.own: tuple[Tensor, Tensor] | None = None

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            own = (key_states, value_states)
            self.own = own if self.keep else None
            keys, values = (self._joined([part[side] for part in self.parts], own[side]) for side in range(2))
            return keys, values

        def _joined(self, parts: list[Tensor], new: Tensor) -> Tensor:
            laid = [part.expand(len(new), -1, -1, -1) if len(part) == 1 else part[self.of] for part in parts]
            return torch.cat([*laid, new], -2)

        def get_seq_length(self) -> int:
            return sum(keys.shape[-2] for keys, _ in self.parts)

    return Before


class PromptReader(_Reader):
    """The same readings as whole prompts, by the model's own way of running them: slower, and right for any family.

    Models whose visual rows have positions of their own, or features that are added at depth, are read like this.
    """

    def read(
        self, at: Int[Tensor, "m w"], source: Int[Tensor, " k"], gone: Bool[Tensor, "k w"]
    ) -> tuple[Float[Tensor, "m V"], Float[Tensor, "k V"]]:
        intact, wrote = self._prompts([self._shorter(places) for places in at], None)
        shorter = [self._shorter(at[row], lost) for row, lost in zip(source, gone, strict=True)]
        return intact, self._prompts(shorter, wrote[source] if self.protocol.aligned else None)[0]

    def _shorter(self, places: Int[Tensor, " w"], gone: Bool[Tensor, " w"] | None = None) -> Prompt:
        """The prompt with some of its tokens, of which some are replaced."""
        rows = self.tokens[places]
        if gone is not None:
            rows[gone] = self.blank
        absent = torch.ones(len(self.visual), dtype=torch.bool, device=self.prompt.visual.device)
        absent[places] = False
        prompt = self.prompt.without(absent) if bool(absent.any()) else self.prompt
        embeds = prompt.embeds.clone()
        embeds[prompt.visual] = rows
        deep = None
        if prompt.deep is not None:  # what replaces a token brings no features of its own
            deep = prompt.deep * (rows != self.blank).any(-1)[:, None].to(prompt.deep)
        return replace(prompt, embeds=embeds, deep=deep)

    def _prompts(self, prompts: list[Prompt], wrote: Int[Tensor, " m"] | None) -> tuple[Float[Tensor, "m V"], Tensor]:
        logits, articles = self._empty(len(prompts)), torch.full((len(prompts),), -1)
        for keep in _batches(torch.arange(len(prompts)), self.batch_size):
            run = partial(self._whole, [prompts[row] for row in keep])
            logits[keep], articles[keep] = self._content(run, len(keep), None if wrote is None else wrote[keep])
        return logits, articles

    def _whole(self, prompts: list[Prompt], rows: Int[Tensor, " b"], words: Tensor | None) -> Float[Tensor, "b V"]:
        """Logits of some of these prompts, or after one more word each."""
        chosen = [prompts[row] for row in rows]
        if words is not None:
            chosen = [_with_word(self.model, prompt, int(word)) for prompt, word in zip(chosen, words, strict=True)]
        with self.model.running(chosen) as entered:
            embeds, mask = self.model.padded(entered)
            output = self.model.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        ends = torch.tensor([len(prompt) - 1 for prompt in entered], device=output.last_hidden_state.device)
        return self._logits(output.last_hidden_state[torch.arange(len(ends), device=ends.device), ends])


def _batches(rows: Int[Tensor, " m"], size: int) -> Sequence[Int[Tensor, " _"]]:
    return rows.split(size) if len(rows) else ()


def _with_word(model: VisionLanguageModel, prompt: Prompt, word: int) -> Prompt:
    """A prompt that goes on with one more word."""

    def grown(rows: Tensor, last: Tensor) -> Tensor:
        return torch.cat([rows, last.to(rows)[None]])

    return replace(
        prompt,
        ids=grown(prompt.ids, torch.tensor(word)),
        embeds=grown(prompt.embeds, model.input_embeddings[word]),
        visual=grown(prompt.visual, torch.tensor(False)),
        rows=None if prompt.rows is None else grown(prompt.rows, prompt.rows.max() + 1),
        positions=None
        if prompt.positions is None
        else torch.cat([prompt.positions, prompt.positions.max(1, keepdim=True).values + 1], 1),
    )
