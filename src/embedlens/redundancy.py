"""What one visual token says, and what the answer loses without it: the scores behind the redundancy codebook.

Source: "Beyond Intermediate States: Explaining Visual Redundancy through Language" (2503.20540) and its released code.
A token is read in three ways (`embedlens.readings`): alone, as the only visual token of the prompt; its 3 x 3 region
alone, with and without it; the whole picture, with and without that region. "Without" puts one fixed vector in a
token's place; the length stays. `D = JSD(region) + 16 JSD(picture)` is what the answer loses. Where the release differs
from its description, `Protocol` has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.patches import PatchGrid
from embedlens.readings import HEAD, Protocol, Reader, prepared
from embedlens.vlm import Prompt, VisionLanguageModel

VARIANTS = ("released", "textbook")
RANKS = (  # places in the order of similarity to CLS, of 576, that the release scores; counted from 0
    *range(24), *range(36, 44), *range(72, 80), *range(144, 152), *range(216, 224), *range(288, 296),
    *range(360, 368), *range(432, 440), *range(504, 512), *range(568, 576),
)  # fmt: skip


def window(place: int, grid: PatchGrid, side: int = 3) -> Int[Tensor, " m"]:
    """The tokens around one, in raster order: a square of `side` patches, shifted inward where it would leave the grid,
    smaller in a grid that is smaller.

    >>> from embedlens.patches import Frame, PatchGrid
    >>> grid = PatchGrid(rows=4, cols=5, frame=Frame.stretch(50, 40))
    >>> window(7, grid).tolist(), window(0, grid).tolist()
    ([1, 2, 3, 6, 7, 8, 11, 12, 13], [0, 1, 2, 5, 6, 7, 10, 11, 12])
    """
    if not 0 <= place < len(grid):
        raise EmbedLensError(f"there is no token {place} in a grid of {len(grid)}: pass 0 to {len(grid) - 1}")
    start = 0
    for view in grid.views if len(grid.views) > 1 else ():  # a neighbourhood lies in one view
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


def sampled_ranks(n: int) -> Int[Tensor, " m"]:
    """Which places of an order of n tokens are scored: the released 96 of 576, as far along it; all of few.

    >>> len(sampled_ranks(576)), len(sampled_ranks(64))
    (96, 64)
    """
    ranks = sorted({round(rank * (n - 1) / 575) for rank in RANKS})
    return torch.arange(n) if n <= len(RANKS) else torch.tensor(ranks)


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

    Both runs' logits at those k words are normalised to p and q, with m = (p + q) / 2. "textbook" is the Jensen-Shannon
    divergence [KL(p|m) + KL(q|m)] / 2; "released" has the arguments of KL turned around and a mean over the k words in
    place of the sum: about a tenth of it.

    >>> p, q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(float(divergence(p, q, "textbook")), 6), round(float(divergence(p, q, "released")), 6)
    (0.130812, 0.071921)
    """
    place_of(variant)
    if intact.shape != without.shape:
        shapes = f"logits of shapes {tuple(intact.shape)} and {tuple(without.shape)}"
        raise EmbedLensError(f"{shapes}: pass both runs of the same tokens")
    ids = intact.topk(min(k, intact.shape[-1])).indices
    log_p, log_q = (logits.gather(-1, ids).double().log_softmax(-1) for logits in (intact, without))
    p, q = log_p.exp(), log_q.exp()
    m = (p + q) / 2
    log_m = m.log()
    turned = (m * (2 * log_m - log_p - log_q)).mean(-1)
    value = (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) if variant == "textbook" else turned
    return (value / 2).clamp_min(0).float()


def place_of(variant: str) -> int:
    """Place of a variant in VARIANTS; one that is not there is refused."""
    if variant not in VARIANTS:
        raise EmbedLensError(f"unknown variant {variant!r}: use 'released' or 'textbook'")
    return VARIANTS.index(variant)


def dpc_knn(tokens: Float[Tensor, "n d"], clusters: int, k: int = 5, rms: float | None = None) -> Int[Tensor, " n"]:
    """Clusters by density peaks with nearest neighbours; 0 is that of the first centre. The same on every run.

    Distances are Euclidean over √d. A token's density is exp(-mean square distance to its k nearest, itself among
    them); its separation is the distance to the nearest denser token; the tokens of largest product (compared as
    logarithms) are the centres, and every token goes to the nearest. Ties go by index, in the release by noise.

    Args:
        clusters: how many; as many as there are tokens if they are fewer.
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
    place = log_density.sort(descending=True, stable=True).indices.argsort()  # of each token, the densest first
    denser = place[None] < place[:, None]
    separation = distance.masked_fill(~denser, torch.inf).amin(-1)
    separation = torch.where(denser.any(-1), separation, distance.max())
    product = log_density + separation.log()  # a duplicate of a denser token is no centre: its log is -inf
    centres = product.sort(descending=True, stable=True).indices[: min(clusters, n)]
    labels = distance[:, centres].argmin(-1)
    labels[centres] = torch.arange(len(centres))
    return labels


LLAVA_RMS = 31 / 4096**0.5  # median norm of LLaVA-1.5's stored tokens over the root of their width


@dataclass(frozen=True, eq=False)
class Readings:
    """Logits of the first word of the answer, of one picture. Row i is about token `places[i]`."""

    places: Int[Tensor, " m"]
    alone: Float[Tensor, "m V"]
    region: Float[Tensor, "m V"]
    region_without: Float[Tensor, "m V"]  #: The region with the one token replaced
    picture: Float[Tensor, "m V"]  #: The intact picture, the same run in every row
    picture_without: Float[Tensor, "m V"]  #: The picture with the token's whole region replaced
    protocol: Protocol = field(repr=False, default_factory=Protocol)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """The scores of some visual tokens of one picture."""

    places: Int[Tensor, " m"]
    word: Int[Tensor, " m"]  #: Likeliest first word of the token alone
    probability: Float[Tensor, " m"]  #: Of it over the head vocabulary, which thresholds are calibrated to
    region: Float[Tensor, "m 2"]  #: Divergence of the region, "released" and "textbook"
    picture: Float[Tensor, "m 2"]  #: Divergence of the picture, likewise
    weights: tuple[float, float]

    def cascade(self, variant: str = "released") -> Float[Tensor, " m"]:
        """D: weighted sum of both divergences (weights 1 and 16 in every released config)."""
        at = place_of(variant)
        return self.weights[0] * self.region[:, at] + self.weights[1] * self.picture[:, at]


def scored(readings: Readings) -> TokenScores:
    """The scores that logits give."""
    protocol = readings.protocol

    def both(intact: Tensor, without: Tensor) -> Tensor:
        return torch.stack([divergence(intact, without, variant, protocol.k) for variant in VARIANTS], -1)

    sure = readings.alone.argmax(-1), top_probability(readings.alone, protocol.head)
    lost = both(readings.region, readings.region_without), both(readings.picture, readings.picture_without)
    return TokenScores(readings.places, *sure, *lost, protocol.weights)


def token_scores(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    places: Sequence[Int[Tensor, " _"]] | None = None,
    protocol: Protocol | None = None,
    batch_size: int = 64,
) -> list[TokenScores]:
    """Scores of the tokens of several pictures, or of some `places` of each; `readings_of` says what is run. The
    question of the prompts is replaced by the protocol's: by default the release's with the model's own question
    (`describing`), articles aligned. `batch_size` readings run together; scores do not depend on it, up to rounding."""
    if places is not None and len(places) != len(prompts):
        raise EmbedLensError(f"{len(prompts)} pictures but {len(places)} sets of places: pass one set per picture")
    asked = zip(prompts, [None] * len(prompts) if places is None else places, strict=True)
    return [scored(readings_of(model, prompt, at, protocol, batch_size)) for prompt, at in asked]


@torch.no_grad()
def readings_of(
    model: VisionLanguageModel,
    prompt: Prompt,
    places: Int[Tensor, " _"] | Sequence[int] | None = None,
    protocol: Protocol | None = None,
    batch_size: int = 64,
) -> Readings:
    """Read tokens of one picture alone, in their region and in the whole picture. Four readings a token and one of the
    picture. The text before the picture runs once, and a reading without a token starts at the first row that differs
    within its batch."""
    reader, prompt, at = prepared(model, prompt, places, protocol, batch_size)
    n = len(prompt.grid)
    around = [window(int(place), prompt.grid, reader.protocol.side) for place in at]
    if len({len(own) for own in around}) > 1:
        raise EmbedLensError("some places lie in views smaller than the neighbourhood: score each size by itself")
    regions = torch.stack(around)
    alone = _alone(reader, at)
    # tokens at the border share their windows, which are read once
    windows, of_token = regions.unique(dim=0, return_inverse=True)
    region, region_without = reader.read(windows, of_token, regions == at[:, None])
    gone = torch.zeros(len(windows), n, dtype=torch.bool).scatter_(1, windows, True)
    picture, without = reader.read(torch.arange(n)[None], torch.zeros(len(windows), dtype=torch.long), gone)
    return Readings(
        at, alone, region[of_token], region_without, picture.expand(len(at), -1), without[of_token], reader.protocol
    )


@torch.no_grad()
def words_alone(model: VisionLanguageModel, prompt: Prompt, k: int = 1) -> Int[Tensor, "1 tokens k"]:
    """The k likeliest first words of the answer for each visual token as the only one of the prompt. One layer, so that
    `measures.labels.label_hits` takes it beside lenses. A lens reads a vector; here the whole model works on it."""
    reader, _, at = prepared(model, prompt, None, None, 64)
    return _alone(reader, at).topk(k).indices[None]


def _alone(reader: Reader, at: Int[Tensor, " m"]) -> Float[Tensor, "m V"]:
    none = torch.zeros(0, dtype=torch.long)
    return reader.read(at[:, None], none, none[:, None].bool())[0]
