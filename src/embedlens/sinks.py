"""Sinks under measurement: how alike, how BOS-like, how much attended (Sections 4.1 to 4.3, Appendix D.2).

One pass over the pictures, `sink_study`, keeps per picture what the chapter on sinks asks for. Which tokens are sinks
is told by a `Reference`; where a model has none of a kind, a few tokens that come nearest to it stand in for them, so
that the same figures can be drawn and say how far from sinks the nearest tokens are. Stand-ins are never called sinks.

The first token of the sequence (BOS) sees nothing but itself, so its state at every layer is one and the same for all
pictures. What lies along it therefore cannot hold anything of a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import normalize

from embedlens.clusters import anchor_clusters, centroids
from embedlens.errors import EmbedLensError
from embedlens.groups import (
    NAMES,
    QUESTION,
    WORDS,
    Reference,
    TokenGroups,
    fence,
    phi,
    ratios,
    reference_of,
    token_groups_of,
)
from embedlens.intervals import Interval, mean_interval, pair_interval, ratio_interval
from embedlens.interventions import SkipSublayers, intervene
from embedlens.lenses import EmbedLens
from embedlens.samples import Sample, readable
from embedlens.tracing import Trace, traces

if TYPE_CHECKING:
    from embedlens.vlm import Prompt, VisionLanguageModel
else:
    Prompt = VisionLanguageModel = object

KINDS = ("ViT sink", "LLM sink")
#: Columns of everything that is given by group; text leaves the first token out.
COLUMNS = ("ViT sink", "LLM sink", "dead", "alive", "text")
FEW = 5  # tokens that stand in for a kind of sink, and tokens followed through the network, as in the paper's Figure 4
CLUSTERS = 6  # largest clusters of a picture that are compared across pictures
STAND_INS = {
    "ViT sink": f"{FEW} highest-norm patches",
    "LLM sink": f"{FEW} highest-phi tokens",
    "dead": "largest cluster",
}
PLURALS = {
    "ViT sink": "ViT sinks",
    "LLM sink": "LLM sinks",
    "dead": "dead tokens",
    "alive": "other patches",
    "text": "text",
}


# --- on numbers ------------------------------------------------------------------------------------------------------


def cosine_to_first(states: Float[Tensor, "sublayers s d"]) -> Float[Tensor, "sublayers s"]:
    """Cosine of every position to the first one, sublayer by sublayer.

    >>> cosine_to_first(torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]])).tolist()
    [[1.0, 0.0, 1.0]]
    """
    return _cosine_to(states, 0)


def group_means(
    values: Float[Tensor, "layers n"], masks: Mapping[str, Bool[Tensor, " n"]]
) -> Float[np.ndarray, "layers groups"]:
    """Mean over the tokens of each group; nan for a group without tokens.

    >>> group_means(torch.tensor([[1.0, 2.0, 3.0]]), {"a": torch.tensor([True, False, True])}).tolist()
    [[2.0]]
    """
    columns = [values[:, mask.to(values.device)].float().mean(-1) for mask in masks.values()]
    return torch.stack(columns, -1).double().cpu().numpy()


def places(values: Shaped[Tensor, "*batch n"]) -> Int[Tensor, "*batch n"]:
    """The place of each entry in descending order along the last side; 1 is the largest, ties by lowest index.

    >>> places(torch.tensor([0.1, 0.9, 0.1])).tolist()
    [2, 1, 3]
    """
    order = values.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1, stable=True) + 1


def followed(values: Float[Tensor, "sublayers n"], at: int, k: int = FEW) -> Int[Tensor, "k sublayers"]:
    """The places, at every sublayer, of the k tokens that come first at one sublayer (Figure 4, right).

    Fewer rows if there are fewer tokens.

    >>> followed(torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 4.0]]), at=0, k=2).tolist()
    [[1, 2], [2, 3]]
    """
    place = places(values)
    return place[:, place[at].argsort(stable=True)[:k]].T


def attention_per_token(
    mass: Float[Tensor, "layers s"], size: int, queries: Bool[Tensor, " s"]
) -> Float[Tensor, " layers"]:
    """Attention that a token of a set gets, in units of what it would get if every query attended uniformly.

    A query at position q sees q + 1 keys and would put 1 / (q + 1) on each. The mean over queries; nan for an empty
    set or no queries.

    Args:
        mass: share of each position's attention that falls on the set, from `Trace.attention`.
        size: number of positions in the set, all of them seen by all queries.

    >>> attention_per_token(torch.full((1, 4), 0.5), 2, torch.tensor([False, False, False, True])).tolist()
    [1.0]
    """
    at = queries.nonzero()[:, 0].to(mass.device)
    if not size or not len(at):
        return mass.new_full((len(mass),), torch.nan)
    return (mass[:, at] * (at + 1) / size).mean(-1)


def highest(values: Shaped[Tensor, " n"], k: int = FEW) -> Bool[Tensor, " n"]:
    """The k largest entries; all if there are fewer. Ties by lowest index.

    >>> highest(torch.tensor([0.1, 0.9, 0.5]), 2).tolist()
    [False, True, True]
    """
    return places(values) <= k


def leading_dims(of_first: Float[np.ndarray, "layers d"], k: int = 2) -> tuple[int, ...]:
    """The dimensions that the first token excites most, on average over the layers between the first and the last.

    Args:
        of_first: `groups.ratios` of the first token, index 0 = what enters the first block.
    """
    middle = of_first[1 : max(2, len(of_first) - 1)].mean(0)
    return tuple(int(index) for index in np.argsort(-middle, kind="stable")[:k])


def share_interval(found: int, n: int, level: float = 0.95) -> Interval:
    """A share with its exact (Clopper-Pearson) interval: of zero in n, the upper bound is about 3.7 / n.

    >>> [round(float(bound), 3) for bound in share_interval(0, 100)]
    [0.0, 0.0, 0.036]
    """
    from scipy.stats import binomtest

    if n < 1:
        raise EmbedLensError(f"a share of {n}: pass at least one")
    bounds = binomtest(found, n).proportion_ci(level, "exact")
    return Interval(*(np.asarray(part, dtype=np.float64) for part in (found / n, bounds.low, bounds.high)))


@dataclass(frozen=True)
class Overlap:
    """How well a second definition of a set of tokens matches a first one, over many pictures.

    Each is an interval over pictures, of nan where nothing meets the definition that it divides by.
    """

    precision: Interval
    """Of the tokens that meet the second, the share that meets the first."""
    recall: Interval
    """Of the tokens that meet the first, the share that meets the second."""
    jaccard: Interval
    """Shared by both over in either."""


def overlap(
    first: Sequence[Bool[np.ndarray, " _"]], second: Sequence[Bool[np.ndarray, " _"]], seed: int = 0
) -> Overlap:
    """Precision, recall and Jaccard index of two definitions, tokens pooled, intervals over pictures.

    Args:
        first, second: one mask per picture.

    >>> one = [np.array([True, True, False])]
    >>> float(overlap(one, [np.array([False, True, True])]).jaccard.value)
    0.3333333333333333
    """
    if len(first) != len(second):
        raise EmbedLensError(f"masks of {len(first)} and of {len(second)} pictures: pass one of each per picture")
    both = np.array([(a & b).sum() for a, b in zip(first, second, strict=True)], dtype=np.float64)
    either = np.array([(a | b).sum() for a, b in zip(first, second, strict=True)])
    sizes = [np.array([mask.sum() for mask in masks]) for masks in (second, first)]
    return Overlap(*(ratio_interval(both, asked, seed=seed) if asked.sum() else _nan() for asked in (*sizes, either)))


def pair_cosines(
    means: Float[np.ndarray, "pictures *repeats d"],  # noqa: UP037 - a shape, no annotation to unquote
    pairs: Int[np.ndarray, "pairs 2"],
    center: Float[np.ndarray, " d"] | None = None,
) -> Float[np.ndarray, " pairs"]:
    """Cosine of the centroids of the two pictures of each pair, averaged over repeats; nan where either has none.

    Args:
        means: a row of nan where a picture has no such token.
        center: subtracted first, which gives mean-removed cosines.
    """
    moved = means if center is None else means - center
    lengths = np.linalg.norm(moved, axis=-1, keepdims=True)
    units = moved / np.where(lengths == 0, 1, lengths)
    cosines = (units[pairs[:, 0]] * units[pairs[:, 1]]).sum(-1)
    return cosines.reshape(len(pairs), -1).mean(1)


def most_alike_cluster(
    means: Sequence[Float[Tensor, "_ d"]], pairs: Int[np.ndarray, "pairs 2"]
) -> Int[np.ndarray, " pictures"]:
    """Which cluster of each picture is most alike across pictures: highest mean of its best cosines in the partners.

    Args:
        means: unit centroids of each picture's clusters, largest first, at least one.
        pairs: from `clusters.picture_pairs`; every picture comes first in some.
    """
    sums = [torch.zeros(len(part)) for part in means]
    for one, other in pairs:
        sums[one] += (means[one] @ means[other].T).amax(1)
    return np.array([int(total.argmax()) for total in sums])


def curve(values: Float[np.ndarray, "pictures *layers"], seed: int = 0) -> Interval:  # noqa: UP037
    """`mean_interval`; nan in columns where no picture has a value, as those of an empty group.

    >>> curve(np.array([[1.0, np.nan], [3.0, np.nan]])).value.tolist()
    [2.0, nan]
    """
    flat = values.reshape(len(values), -1)
    there = np.isfinite(flat).any(0)
    whole = _nan(there.shape)
    if there.any():
        for part, found in zip(whole, mean_interval(flat[:, there], seed=seed), strict=True):
            part[there] = found
    return Interval(*(part.reshape(values.shape[1:]) for part in whole))


def group_curves(values: Float[np.ndarray, "pictures layers groups"], seed: int = 0) -> dict[str, Interval]:
    """`curve` of each of COLUMNS that has a token in some picture."""
    found = {name: curve(values[:, :, at], seed) for at, name in enumerate(COLUMNS)}
    return {name: value for name, value in found.items() if np.isfinite(value.value).all()}


def pair_curve(values: Float[np.ndarray, " pairs"], pairs: Int[np.ndarray, "pairs 2"], seed: int = 0) -> Interval:
    """`pair_interval`, or nan where no pair has a value."""
    return pair_interval(values, pairs, seed=seed) if np.isfinite(values).any() else _nan()


def times(of: Float[np.ndarray, " pictures"], unit: Float[np.ndarray, " pictures"], seed: int = 0) -> Interval:
    """How many times one quantity the other is, over pictures that have both: ratio of sums; nan if none has.

    >>> float(times(np.array([2.0, 4.0, np.nan]), np.array([1.0, 2.0, 5.0])).value)
    2.0
    """
    there = np.isfinite(of) & np.isfinite(unit)
    return ratio_interval(of[there], unit[there], seed=seed) if unit[there].any() else _nan()


def _nan(shape: tuple[int, ...] = ()) -> Interval:
    return Interval(*(np.full(shape, np.nan) for _ in range(3)))


# --- which tokens ----------------------------------------------------------------------------------------------------


def found_kinds(reference: Reference) -> dict[str, bool]:
    """Which groups the model has, as `discover` saw it: a threshold, and calibration tokens beyond it."""
    return {
        "ViT sink": reference.vit_norm is not None and reference.vit_sink_id is not None,
        "LLM sink": bool(reference.sink_dims) and reference.llm_sink_id is not None,
        "dead": reference.dead_id is not None,
    }


def labels_of(reference: Reference) -> dict[str, str]:
    """What to call each group in a figure: the group, or what stands in for it.

    A stand-in says what it is: "5 highest-norm patches" are those of highest norm in each picture.
    """
    found = found_kinds(reference)
    return {name: STAND_INS[name] if name in found and not found[name] else PLURALS[name] for name in COLUMNS}


def sink_groups(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    reference: Reference | None = None,
    few: int = FEW,
    batch_size: int = 8,
    norms: Sequence[Float[np.ndarray, " _"]] | None = None,
) -> list[TokenGroups]:
    """`token_groups_of`, with stand-ins for the kinds that the model does not have.

    For ViT sinks the patches of highest norm at the tower's last layer; for LLM sinks the visual tokens of highest phi
    in the dimensions that the first token excites most, at `picking_layer`; for dead tokens those of the picture's
    largest cluster. `TokenGroups.met` holds each set whole, before precedence makes them disjoint.

    Args:
        norms: per picture, of its patches at the tower's last layer, if they are at hand.
    """
    reference = reference_of(model) if reference is None else reference
    found = found_kinds(reference)
    membership = "top3" if found["dead"] else "cluster"
    groups = token_groups_of(model, prompts, reference, membership, batch_size=batch_size)
    if found["ViT sink"] and found["LLM sink"]:
        return groups
    if norms is None:
        norms = [states[-1].float().norm(dim=-1).cpu().numpy() for states in model.tower_states_of(prompts)]
    streams = [None] * len(prompts) if found["LLM sink"] else model.hidden_states_of(prompts, batch_size)
    filled = []
    for prompt, old, norm, stream in zip(prompts, groups, norms, streams, strict=True):
        met = dict(old.met)
        if not found["ViT sink"]:
            met["ViT sink"] = highest(torch.from_numpy(norm), few)
        if stream is not None:
            dims = leading_dims(ratios(stream[:, 0]).cpu().numpy())
            at = picking_layer(reference, model.n_layers)
            met["LLM sink"] = highest(phi(stream[at, prompt.visual], dims).cpu(), few)
        filled.append(_partition(met))
    return filled


def picking_layer(reference: Reference, n_layers: int) -> int:
    """Index into `hidden_states` of the layer where LLM sinks, or what stands in for them, are told: after block 2."""
    return min(2, n_layers) if reference.sink_layer is None else reference.sink_layer


def _partition(met: Mapping[str, Bool[Tensor, " n"]]) -> TokenGroups:
    left = torch.ones_like(met["dead"])
    taken = {}
    for name in NAMES[:-1]:
        taken[name] = met[name] & left
        left = left & ~met[name]
    return TokenGroups(taken["ViT sink"], taken["LLM sink"], taken["dead"], left, met)


# --- the measurement -------------------------------------------------------------------------------------------------


#: What `SkipEffect` compares: the stock run, MLP-2 skipped for the tokens, MLP-2 skipped for as many random others.
ARMS = ("as it is", "skipped", "skipped for others")
SKIPPING = ("cosine", "mass", "visual_mass")


@dataclass(frozen=True, eq=False)
class SkipEffect:
    """What becomes of the tokens of one kind when a sublayer is skipped for them (Appendix D.2, Figure d right).

    nan where a picture has no such token. Arms are in the order of ARMS.
    """

    cosine: Float[np.ndarray, "pictures arms sublayers"] = field(repr=False)
    """Mean cosine of the tokens to the first token."""
    mass: Float[np.ndarray, "pictures arms layers"] = field(repr=False)
    """Share of the attention of text after the picture that falls on the tokens, all of them together."""
    visual_mass: Float[np.ndarray, "pictures arms layers"] = field(repr=False)
    """The same on all visual tokens."""

    def change(self, arm: str, sublayers: slice = slice(None)) -> Float[np.ndarray, "pictures 2"]:
        """Per picture: change of the mean cosine over some sublayers, and of the mean mass over all layers."""
        at = ARMS.index(arm)
        cosine = (self.cosine[:, at, sublayers] - self.cosine[:, 0, sublayers]).mean(-1)
        return np.stack([cosine, (self.mass[:, at] - self.mass[:, 0]).mean(-1)], -1)


def skip_effect(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    masks: Sequence[Bool[Tensor, " _"]],
    at: float = 1.5,
    seed: int | Sequence[int] = 0,
    batch_size: int = 8,
) -> SkipEffect:
    """Skip a sublayer for some visual tokens of each prompt, and, as the control, for as many random others.

    Args:
        masks: True = the tokens; a picture where all or none are marked has no control or no effect and gives nan.
        at: as `SkipSublayers`: n the attention of layer n, n + 0.5 its MLP, 0-based; 1.5 is the paper's MLP-2.
        seed: of the random others, together with the place of the prompt.

    >>> SkipEffect(np.zeros((1, 3, 2)), np.zeros((1, 3, 1)), np.zeros((1, 3, 1))).change("skipped").tolist()
    [[0.0, 0.0]]
    """
    n, layers = len(prompts), model.n_layers
    cosine = np.full((n, len(ARMS), 2 * layers + 1), np.nan)
    mass, visual = np.full((2, n, len(ARMS), layers), np.nan)
    root = (seed,) if isinstance(seed, int) else tuple(seed)
    some = [row for row, mask in enumerate(masks) if bool(mask.any()) and not bool(mask.all())]
    if not some:
        return SkipEffect(cosine, mass, visual)
    chosen = [prompts[row] for row in some]
    own = [masks[row].cpu() for row in some]
    others = [_as_many_others(mask, np.random.default_rng((*root, row))) for row, mask in zip(some, own, strict=True)]
    sets = [
        {"own": prompt.spread(mask.to(prompt.visual.device)), "visual": prompt.visual}
        for prompt, mask in zip(chosen, own, strict=True)
    ]
    for arm, skipped in enumerate((None, own, others)):
        active = nullcontext() if skipped is None else intervene(model, SkipSublayers(skipped, at=[at]))
        with active:
            for row, prompt, named, seen in zip(
                some, chosen, sets, traces(model, chosen, sets, batch_size), strict=True
            ):
                queries = queries_of(prompt)
                cosine[row, arm] = group_means(cosine_to_first(seen.sublayers), {"own": named["own"]})[:, 0]
                for kept, name in ((mass, "own"), (visual, "visual")):
                    kept[row, arm] = seen.attention[name][:, queries].float().mean(-1).cpu().numpy()
    return SkipEffect(cosine, mass, visual)


def _as_many_others(mask: Bool[Tensor, " n"], rng: np.random.Generator) -> Bool[Tensor, " n"]:
    """Random tokens outside the mask, as many as inside or as there are."""
    outside = (~mask).nonzero()[:, 0].numpy()
    drawn = rng.choice(outside, min(int(mask.sum()), len(outside)), replace=False)
    others = torch.zeros_like(mask)
    others[torch.from_numpy(drawn)] = True
    return others


@dataclass(frozen=True, eq=False)
class SinkStudy:
    """What `sink_study` kept of many pictures. Columns named "groups" are in the order of COLUMNS."""

    reference: Reference
    dims: tuple[int, ...]
    """Dimensions of phi: the reference's, or those that the first token excites most."""
    aligner: int
    """Index into sublayers of the MLP of block 2, "MLP-2"."""
    groups: tuple[TokenGroups, ...] = field(repr=False)
    norms: tuple[Float[np.ndarray, "tower_layers _"], ...] = field(repr=False)
    """L2 norm of every patch at every layer of the vision tower, index 0 = its embedding."""
    largest: tuple[Float[np.ndarray, "states _"], ...] = field(repr=False)
    """Largest |x|/RMS of every token but the first, index 0 = what enters the first block."""
    first: Float[np.ndarray, "states d"] = field(repr=False)
    """|x|/RMS of the first token, the same in every picture."""
    first_moves: float
    """Largest distance of the first token's state between two pictures, over its length: rounding."""
    phi: Float[np.ndarray, "pictures states groups"] = field(repr=False)
    cosine: Float[np.ndarray, "pictures sublayers groups"] = field(repr=False)
    """Mean over tokens of the cosine to the first token: mean of cosines, not cosine of means."""
    places: Int[np.ndarray, "pictures k sublayers"] = field(repr=False)
    """`followed` at the aligner, among visual tokens."""
    places_of_other: Int[np.ndarray, "pictures k sublayers"] = field(repr=False)
    """The same with another text token in the place of the first one."""
    attention: Float[np.ndarray, "pictures layers groups"] = field(repr=False)
    """`attention_per_token` from text after the picture."""
    attention_on_first: Float[np.ndarray, "pictures layers"] = field(repr=False)
    mass: Float[np.ndarray, "pictures layers groups"] = field(repr=False)
    """Share of the attention of text after the picture, mean over its positions."""
    means: Float[np.ndarray, "kinds pictures d"] = field(repr=False)
    """Mean of the normalised sinks of each kind where they enter layer 0; nan where a picture has none."""
    random_means: Float[np.ndarray, "kinds pictures repeats d"] = field(repr=False)
    """The same of random visual tokens of that picture, as many."""
    center: Float[np.ndarray, " d"] = field(repr=False)
    """Mean of all normalised visual tokens."""
    words: Int[np.ndarray, "kinds pictures"] = field(repr=False)
    """Entry nearest to `means`; -1 where there is none."""
    random_words: Int[np.ndarray, "kinds pictures repeats"] = field(repr=False)
    nearest: tuple[Int[np.ndarray, "_ words"], ...] = field(repr=False)
    """The three entries nearest to every visual token at layer 0, best first."""
    clusters: tuple[Int[np.ndarray, " _"], ...] = field(repr=False)
    """`anchor_clusters` of the visual tokens at layer 0."""
    cluster_means: tuple[Float[Tensor, "_ d"], ...] = field(repr=False)
    """Centroids of the largest clusters."""
    skipping: SkipEffect = field(repr=False)
    """`skip_effect` of MLP-2 on the LLM sinks, or what stands in for them."""

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def tokens(self) -> Int[np.ndarray, " pictures"]:
        """Visual tokens of each picture."""
        return np.array([len(groups.alive) for groups in self.groups])

    def met(self, kind: str) -> list[Bool[np.ndarray, " _"]]:
        """Per picture, which tokens meet a kind's definition."""
        return [groups.met[kind].numpy() for groups in self.groups]

    def counts(self, kind: str) -> Int[np.ndarray, " pictures"]:
        """Per picture, how many tokens meet a kind's definition."""
        return np.array([int(mask.sum()) for mask in self.met(kind)])

    def near(self, word: int, k: int) -> list[Bool[np.ndarray, " _"]]:
        """Per picture, which tokens have a word among their k nearest, k at most 3."""
        return [(ids[:, :k] == word).any(1) for ids in self.nearest]

    def word_of(self, kind: str) -> int | None:
        """The entry that is nearest to the kind's centroid in most pictures; None if no picture has the kind."""
        return _commonest(self.words[KINDS.index(kind)])

    def agreeing(self, kind: str) -> tuple[Float[np.ndarray, " pictures"], Float[np.ndarray, " pictures"]]:
        """Per picture, whether its centroid of a kind is nearest to the commonest entry, and the same of random sets.

        Random sets have a commonest entry of their own, and the share of repeats that agree with it. nan where a
        picture has none of the kind.
        """
        at = KINDS.index(kind)
        words, drawn = self.words[at], self.random_words[at]
        there = words >= 0
        own = np.where(there, words == _commonest(words), np.nan)
        random = np.where(there, (drawn == _commonest(drawn.ravel())).mean(1), np.nan)
        return own.astype(np.float64), random.astype(np.float64)

    def in_cluster(self, kind: str, cluster: Int[np.ndarray, " pictures"]) -> Float[np.ndarray, "pictures 2"]:
        """Per picture, the share of a kind's tokens in one of its clusters, and the share of all its tokens in it."""
        rows = []
        for mask, labels, chosen in zip(self.met(kind), self.clusters, cluster, strict=True):
            inside = labels == chosen
            rows.append((inside[mask].mean() if mask.any() else np.nan, inside.mean()))
        return np.array(rows)

    @property
    def norm_fences(self) -> Float[np.ndarray, " tower_layers"]:
        """`groups.fence` of all patches at every layer of the tower."""
        return np.array([fence(layer) for layer in np.concatenate(self.norms, axis=1)])

    @property
    def ratio_fences(self) -> Float[np.ndarray, " states"]:
        """`groups.fence` of the largest |x|/RMS of all tokens but the first, at every layer."""
        return np.array([fence(layer) for layer in np.concatenate(self.largest, axis=1)])

    @property
    def kept(self) -> Float[np.ndarray, "pictures sublayers"]:
        """Of the tokens followed, the share that is among as many first ones at each sublayer."""
        return (self.places <= self.places.shape[1]).mean(1)

    @property
    def kept_of_other(self) -> Float[np.ndarray, "pictures sublayers"]:
        return (self.places_of_other <= self.places_of_other.shape[1]).mean(1)

    @property
    def kept_by_chance(self) -> float:
        """What as many random visual tokens would give."""
        return float((self.places.shape[1] / self.tokens).mean())


def sink_study(
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    reference: Reference | None = None,
    few: int = FEW,
    repeats: int = 5,
    seed: int = 0,
    batch_size: int = 8,
) -> SinkStudy:
    """Measure the sinks of many pictures, or what stands in for them (`sink_groups`).

    Pictures are read one batch at a time. Of each are kept a few numbers per layer and group, and per token its norms,
    its largest ratio and its cluster: no states of tokens.

    Args:
        model: from `embedlens.load`.
        samples: pictures that the reference was not found on.
        reference: from `discover`; default: `reference_of(model)`.
        few: tokens that stand in for a kind, and tokens followed.
        repeats: random sets of visual tokens of each picture.
        seed: of these, together with the place of the picture.

    Raises:
        EmbedLensError: no samples.
    """
    reference = reference_of(model) if reference is None else reference
    rows = list(_rows(model, samples, reference, few, repeats, seed, batch_size))
    if not rows:
        raise EmbedLensError("no samples: pass at least one picture")
    first = rows[0]["first_state"]
    scale = first.norm(dim=-1).clamp_min(1e-12)
    moves = max(float(((row["first_state"] - first).norm(dim=-1) / scale).max()) for row in rows)

    def stacked(key: str) -> np.ndarray:
        return np.stack([row[key] for row in rows])

    def by_kind(key: str) -> np.ndarray:
        return np.stack([row[key] for row in rows], axis=1)

    def listed(key: str) -> tuple:
        return tuple(row[key] for row in rows)

    return SinkStudy(
        reference=reference,
        dims=rows[0]["dims"],
        aligner=aligner_of(model.n_layers),
        groups=listed("groups"),
        norms=listed("norms"),
        largest=listed("largest"),
        first=ratios(first).numpy(),
        first_moves=moves,
        phi=stacked("phi"),
        cosine=stacked("cosine"),
        places=stacked("places"),
        places_of_other=stacked("places_of_other"),
        attention=stacked("attention"),
        attention_on_first=stacked("attention_on_first"),
        mass=stacked("mass"),
        means=by_kind("means"),
        random_means=by_kind("random_means"),
        center=stacked("center").mean(0),
        words=by_kind("words"),
        random_words=by_kind("random_words"),
        nearest=listed("nearest"),
        clusters=listed("clusters"),
        cluster_means=listed("cluster_means"),
        skipping=SkipEffect(*(stacked(f"skipping {part}") for part in SKIPPING)),
    )


def aligner_of(n_layers: int) -> int:
    """Row of `Trace.sublayers` that the paper calls MLP-2: 4, or the last MLP of a shorter model."""
    return min(4, 2 * n_layers)


def _rows(
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    reference: Reference,
    few: int,
    repeats: int,
    seed: int,
    batch_size: int,
) -> Iterator[dict]:
    lens, stream, index = EmbedLens.from_model(model), readable(samples), 0
    while batch := list(islice(stream, batch_size)):
        prompts = model.prompts([sample.image for sample in batch], [QUESTION] * len(batch))
        towers = [states.float().norm(dim=-1).cpu().numpy() for states in model.tower_states_of(prompts)]
        groups = sink_groups(model, prompts, reference, few, batch_size, [norms[-1] for norms in towers])
        masks = [_masks(prompt, found) for prompt, found in zip(prompts, groups, strict=True)]
        seen = traces(model, prompts, masks, batch_size)
        rows: list[dict] = []
        for prompt, found, norms, named, trace in zip(prompts, groups, towers, masks, seen, strict=True):
            row = _stream_row(trace, prompt, found, named, reference, few)
            row |= _entry_row(prompt, found, lens, reference.threshold, repeats, (seed, index))
            rows.append(row | {"groups": found, "norms": norms})
            index += 1
        masks_of_kind = [found.llm_sink for found in groups]
        effect = skip_effect(
            model, prompts, masks_of_kind, aligner_of(model.n_layers) / 2 - 0.5, (seed, index), batch_size
        )
        for row, place in zip(rows, range(len(rows)), strict=True):
            yield row | {f"skipping {part}": getattr(effect, part)[place] for part in SKIPPING}


def _masks(prompt: Prompt, groups: TokenGroups) -> dict[str, Bool[Tensor, " s"]]:
    """COLUMNS and "first" over all positions, disjoint."""
    first = torch.zeros_like(prompt.visual)
    first[0] = True
    masks = {name: prompt.spread(mask.to(prompt.visual.device)) for name, mask in groups.named.items()}
    masks |= {"text": prompt.text & ~first, "first": first}
    return {name: masks[name] for name in (*COLUMNS, "first")}


def queries_of(prompt: Prompt) -> Bool[Tensor, " s"]:
    """Text that sees the whole picture: the positions after its last visual token."""
    last = int(prompt.visual.nonzero()[-1, 0])
    return prompt.text & (torch.arange(len(prompt), device=prompt.visual.device) > last)


def _stream_row(
    trace: Trace,
    prompt: Prompt,
    groups: TokenGroups,
    masks: Mapping[str, Bool[Tensor, " s"]],
    reference: Reference,
    few: int,
) -> dict:
    """What one picture gives inside the language model."""
    inside = {name: mask for name, mask in masks.items() if name != "first"}
    ratio = ratios(trace.stream).cpu()
    dims = reference.sink_dims or leading_dims(ratio[:, 0].numpy())
    states, at = trace.sublayers, aligner_of(len(trace.resid_mid))
    cosine, queries = cosine_to_first(states), queries_of(prompt)
    texts = prompt.text.nonzero()[1:, 0]
    before = texts[texts < int(prompt.visual.nonzero()[0, 0])]
    other = int(before[-1] if len(before) else texts[-1])  # the same in every picture too, where the picture allows it
    received = {
        name: attention_per_token(trace.attention[name], int(mask.sum()), queries) for name, mask in masks.items()
    }
    return {
        "dims": tuple(dims),
        "first_state": trace.stream[:, 0].float().cpu(),
        "largest": ratio[:, 1:].amax(-1).numpy(),
        "phi": group_means(phi(trace.stream, dims), inside),
        "cosine": group_means(cosine, inside),
        "places": followed(cosine[:, prompt.visual], at, few).cpu().numpy(),
        "places_of_other": followed(_cosine_to(states, other)[:, prompt.visual], at, few).cpu().numpy(),
        "attention": torch.stack([received[name] for name in inside], -1).double().cpu().numpy(),
        "attention_on_first": received["first"].double().cpu().numpy(),
        "mass": torch.stack([trace.attention[n][:, queries].mean(-1) for n in inside], -1).double().cpu().numpy(),
    }


def _entry_row(
    prompt: Prompt, groups: TokenGroups, lens: EmbedLens, threshold: float, repeats: int, seed: tuple[int, int]
) -> dict:
    """What one picture gives where it enters the language model."""
    tokens = prompt.embeds[prompt.visual].float()
    units = normalize(tokens, dim=-1).cpu()
    means, drawn, words, drawn_words = [], [], [], []
    for number, kind in enumerate(KINDS):
        mask = groups.met[kind]
        rng = np.random.default_rng((*seed, number))
        size = int(mask.sum())
        sets = [torch.from_numpy(rng.choice(len(units), size, replace=False)) for _ in range(repeats)]
        rows = torch.stack([units[mask].mean(0), *(units[part].mean(0) for part in sets)])  # nan of an empty set
        nearest = lens.topk(rows.to(tokens.device), 1)[1][:, 0].cpu().numpy() if size else np.full(len(rows), -1)
        means.append(rows[0].numpy())
        drawn.append(rows[1:].numpy())
        words.append(nearest[0])
        drawn_words.append(nearest[1:])
    labels = anchor_clusters(tokens, threshold).cpu()
    return {
        "means": np.stack(means),
        "random_means": np.stack(drawn),
        "center": units.mean(0).numpy(),
        "words": np.array(words),
        "random_words": np.stack(drawn_words),
        "nearest": lens.topk(tokens, WORDS)[1].cpu().numpy(),
        "clusters": labels.numpy(),
        "cluster_means": centroids(tokens.cpu(), labels, CLUSTERS),
    }


def _cosine_to(states: Float[Tensor, "sublayers s d"], position: int) -> Float[Tensor, "sublayers s"]:
    units = normalize(states.float(), dim=-1)
    return torch.einsum("lsd,ld->ls", units, units[:, position])


def _commonest(words: Int[np.ndarray, " _"]) -> int | None:
    """The most frequent entry, -1 left out; ties by lowest id."""
    counts = np.bincount(words[words >= 0]) if (words >= 0).any() else np.zeros(0)
    return int(counts.argmax()) if len(counts) else None
