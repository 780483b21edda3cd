"""Clusters of the visual tokens of a picture, and how alike they are from picture to picture (Section 2, Appendix B).

The paper does not say in which order anchors are taken nor whether clusters may share tokens. Here they are disjoint,
and the anchor with the most unassigned neighbours comes first; `order="raster"` is the ablation. A rank is a place in
the order of sizes and nothing else: which kind of token a cluster holds is told by its nearest word.

Clusters are made within one picture, so the matrix of all cosines has the number of *its* tokens squared entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.lenses import EmbedLens, unit_vectors
from embedlens.samples import Sample, readable
from embedlens.vlm import QUESTION

if TYPE_CHECKING:
    from embedlens.vlm import VisionLanguageModel

ORDERS = ("greedy", "raster")
MOST = 6  # clusters kept of a picture: ranks 0 to 5, as the paper's Figure 1 and Appendix B.2 have them
ROUNDING = 1e-9  # two equal tokens have a cosine of 1 at every threshold, whatever the last bit says


def anchor_clusters(tokens: Float[Tensor, "n d"], threshold: float = 0.9, order: str = "greedy") -> Int[Tensor, " n"]:
    """Disjoint clusters around anchors: an anchor takes every unassigned token at a cosine of `threshold` or more.

    Appendix B.1 of the paper. "greedy" takes the unassigned token with the most unassigned neighbours as the next
    anchor, ties by lowest index; "raster" takes the first unassigned token. A zero vector has no direction and is a
    cluster by itself.

    Args:
        tokens: the visual tokens of *one* picture, any length; normalised here. Memory grows with n squared.
        threshold: in (0, 1].

    Returns:
        The cluster of each token; 0 is the largest, equal sizes are numbered as they were found.

    Raises:
        EmbedLensError: a threshold or an order that there is not, no tokens, tokens of several pictures in one tensor,
            or values that are not finite.

    >>> anchor_clusters(torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])).tolist()
    [1, 0, 0]
    """
    if not 0 < threshold <= 1:
        raise EmbedLensError(f"the threshold is {threshold}: pass a cosine above 0 and at most 1")
    if order not in ORDERS:
        raise EmbedLensError(f"unknown order {order!r}: use one of {', '.join(ORDERS)}")
    if tokens.ndim != 2 or not len(tokens):
        raise EmbedLensError(
            f"the tokens have shape {tuple(tokens.shape)}: pass those of one picture, at least one, as [n, d]"
        )
    if not bool(tokens.isfinite().all()):
        raise EmbedLensError("some tokens are not finite: load the model in float32 or bfloat16")
    units = unit_vectors(unit_vectors(tokens).double())  # at length one to the last bit, which float32 is not
    near = ((units @ units.T) >= threshold - ROUNDING).cpu().numpy()
    np.fill_diagonal(near, True)  # zero vectors too
    labels = np.full(len(near), -1)
    neighbours = near.sum(1)  # of each token, those not assigned yet
    found = 0
    while (open_ := labels < 0).any():
        anchor = int(np.argmax(np.where(open_, neighbours, 0)) if order == "greedy" else np.argmax(open_))
        taken = near[anchor] & open_
        labels[taken] = found
        neighbours -= near[:, taken].sum(1)
        found += 1
    rank = np.empty(found, dtype=np.int64)
    rank[np.argsort(-np.bincount(labels), kind="stable")] = np.arange(found)
    return torch.from_numpy(rank[labels]).to(tokens.device)


def centroids(
    tokens: Float[Tensor, "n d"],
    labels: Int[Tensor, " m"],
    most: int | None = None,
    center: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "k d"]:
    """The mean of the normalised members of each cluster, at length one, largest cluster first (Appendix B.2).

    Args:
        most: keep only so many; default: all.
        center: subtracted from the mean of the normalised members: what all pictures share. Cosines are then
            mean-removed.

    Raises:
        EmbedLensError: one label per token is not what was passed.

    >>> centroids(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 5.0]]), torch.tensor([1, 0, 0])).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    means = _means(tokens, labels, most)
    return unit_vectors(means if center is None else means - center)


def cross_image_similarity(a: Float[Tensor, "k d"], b: Float[Tensor, "m d"]) -> Float[Tensor, " k"]:
    """Highest cosine of each centroid of one picture to any centroid of another.

    Appendix B.2 of the paper: s_i = max_j C_i(1) · C_j(2), both sides unit length. The more clusters the other picture
    has, the higher the maximum: hold it against `matched_null`.

    Args:
        a: centroids of the first picture, any length; normalised here.
        b: centroids of the second picture.

    Raises:
        EmbedLensError: either picture has no cluster, or the widths differ.

    >>> cross_image_similarity(torch.eye(3), torch.eye(3)).tolist()
    [1.0, 1.0, 1.0]
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise EmbedLensError(
            f"centroids of shapes {tuple(a.shape)} and {tuple(b.shape)}: pass at least one of each picture, all of one "
            "width"
        )
    return (unit_vectors(a) @ unit_vectors(b).T).amax(1)


def matched_null(labels: Int[Tensor, " n"], seed: int | Sequence[int]) -> Int[Tensor, " n"]:
    """Random disjoint token sets of the same sizes as the clusters: the labels, dealt out anew.

    Args:
        seed: make it differ from picture to picture, such as (seed, index of the picture).

    >>> sorted(matched_null(torch.tensor([0, 0, 1, 2]), seed=0).tolist())
    [0, 0, 1, 2]
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    return labels[torch.from_numpy(order).to(labels.device)]


def jaccard(a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " n"]) -> float:
    """Overlap of two sets of tokens: shared by both over in either; nan if both are empty.

    >>> jaccard(np.array([True, True, False]), np.array([False, True, True]))
    0.3333333333333333
    """
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else float("nan")


def picture_pairs(n: int, partners: int = 20, seed: int = 0) -> Int[np.ndarray, "pairs 2"]:
    """Ordered pairs of different pictures, by index: each picture first in as many, with partners drawn at random.

    Args:
        n: number of pictures.
        partners: of each picture; all others if there are no more.

    Raises:
        EmbedLensError: fewer than two pictures.

    >>> picture_pairs(3, seed=0).tolist()
    [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]
    """
    if n < 2:
        raise EmbedLensError(f"{n} picture{'s' * (n != 1)}: comparing pictures needs at least two, so take more")
    if partners < 1:
        raise EmbedLensError(f"{partners} partners a picture: pass at least one")
    rng = np.random.default_rng(seed)
    chosen = [np.sort(rng.choice(n - 1, size=min(partners, n - 1), replace=False)) for _ in range(n)]
    return np.array([(first, other + (other >= first)) for first, others in enumerate(chosen) for other in others])


@dataclass(frozen=True, eq=False)
class ClusterStudy:
    """The clusters of many pictures at one threshold. Per picture two centroids of each rank are kept, no tokens."""

    threshold: float
    order: str
    sizes: Int[np.ndarray, "pictures k"]
    """Tokens in the cluster of each rank; 0 where a picture has no such cluster."""
    tokens: Int[np.ndarray, " pictures"]
    """Visual tokens of each picture."""
    singletons: Int[np.ndarray, " pictures"]
    """Tokens that are a cluster by themselves."""
    means: Float[Tensor, "pictures k d"] = field(repr=False)
    """Mean of the normalised members of each cluster; zero where there is no cluster."""
    null_means: Float[Tensor, "pictures repeats k d"] = field(repr=False)
    """The same of random token sets of the same sizes (`matched_null`)."""
    center: Float[Tensor, " d"] = field(repr=False)
    """Mean of all normalised visual tokens of all pictures."""
    nearest: Int[np.ndarray, "pictures k"]
    """The vocabulary entry nearest to each centroid; -1 where there is no cluster."""
    to_text: Float[np.ndarray, "pictures k"]
    """Cosine of each centroid to the centroid of the vocabulary; nan where there is no cluster."""
    in_bars: Float[np.ndarray, "pictures k"]
    """Share of each cluster's tokens that show no pixel of the picture; nan where there is no cluster."""
    bars: Float[np.ndarray, " pictures"]
    """Share of all the picture's tokens that show no pixel of it."""
    largest: tuple[Bool[np.ndarray, " _"], ...] = field(repr=False)
    """Which tokens of each picture are in its largest cluster."""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def shares(self) -> Float[np.ndarray, "pictures k"]:
        """Share of the picture's tokens in the cluster of each rank."""
        return self.sizes / self.tokens[:, None]

    @property
    def dominance(self) -> Float[np.ndarray, "pictures 3"]:
        """Share of the largest cluster in three totals: all tokens; ranks 0 to 4; all clusters of two or more.

        "Larger than the remaining clusters combined" is a share above one half; which clusters are meant is open.
        Where all clusters are single tokens the last is 0: the largest is no cluster of two or more.
        """
        first = self.sizes[:, 0].astype(np.float64)
        several = self.tokens - self.singletons
        of_several = np.where(several > 0, first / np.maximum(several, 1), 0.0)
        return np.stack([first / self.tokens, first / self.sizes[:, :5].sum(1), of_several], 1)

    def similarity(
        self, pairs: Int[np.ndarray, "pairs 2"], mean_removed: bool = False, null: bool = False
    ) -> Float[np.ndarray, "pairs k"]:
        """`cross_image_similarity` by rank for each pair of pictures; nan where the first has no such cluster.

        Args:
            mean_removed: take `center` from all centroids first.
            null: of the matched random token sets instead, averaged over repeats.
        """
        means = self.null_means if null else self.means[:, None]  # [pictures, repeats, k, d]
        units = unit_vectors(means - self.center if mean_removed else means)
        there = torch.from_numpy(self.sizes > 0)
        parts = []
        for some in np.array_split(pairs, max(1, len(pairs) // 512)):
            first, second = torch.from_numpy(some).unbind(1)
            cosines = units[first] @ units[second].mT  # [pairs, repeats, k, k]
            cosines = cosines.masked_fill(~there[second][:, None, None], -torch.inf)
            best = cosines.amax(-1).mean(1)
            parts.append(best.masked_fill(~there[first], torch.nan))
        return torch.cat(parts).double().numpy()


def cluster_study(
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    thresholds: Sequence[float] = (0.9,),
    orders: Sequence[str] = ("greedy",),
    repeats: int = 3,
    seed: int = 0,
    batch_size: int = 16,
    most: int = MOST,
) -> dict[tuple[float, str], ClusterStudy]:
    """Cluster the visual tokens of every picture where they enter the language model, which is not run.

    Tokens are dropped picture by picture; what is kept of each does not grow with its number of tokens but for one
    truth value a token.

    Args:
        model: from `embedlens.load`.
        samples: pictures; read one batch at a time.
        thresholds, orders: as for `anchor_clusters`; every combination is studied on the same tokens.
        repeats: random token sets of each picture for the matched null.
        seed: of these, together with the place of the picture.
        most: ranks kept.

    Returns:
        (threshold, order) → its clusters.

    Raises:
        EmbedLensError: no samples, or as `anchor_clusters`.
    """
    lens = EmbedLens.from_model(model)
    text = text_centroid(model)
    parts: dict[tuple[float, str], list[dict[str, object]]] = {}
    total = torch.zeros(model.width, dtype=torch.float64)
    seen, stream = 0, readable(samples)
    while batch := list(islice(stream, batch_size)):
        for prompt in model.prompts([sample.image for sample in batch], [QUESTION] * len(batch)):
            tokens = prompt.embeds[prompt.visual].float()
            total += unit_vectors(tokens).mean(0).double().cpu()
            padded = prompt.grid.padded.numpy()
            for threshold in thresholds:
                for order in orders:
                    labels = anchor_clusters(tokens, threshold, order)
                    part = _kept(tokens, labels, padded, lens, text, [(seed, seen, r) for r in range(repeats)], most)
                    parts.setdefault((threshold, order), []).append(part)
            seen += 1
    if not seen:
        raise EmbedLensError("no samples: pass at least one picture")
    center = (total / seen).float()
    return {(t, order): _study(t, order, found, center) for (t, order), found in parts.items()}


def text_centroid(model: VisionLanguageModel) -> Float[Tensor, " d"]:
    """Mean of the normalised rows of the input embedding, at length one: the middle of the vocabulary."""
    rows = model.input_embeddings
    total = torch.stack([unit_vectors(part).sum(0) for part in rows.split(4096)]).sum(0)
    return unit_vectors(total)


def _kept(
    tokens: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    padded: Bool[np.ndarray, " n"],
    lens: EmbedLens,
    text: Float[Tensor, " d"],
    seeds: Sequence[Sequence[int]],
    most: int,
) -> dict[str, object]:
    """What is kept of one picture."""
    means = _means(tokens, labels, most)
    units, missing = unit_vectors(means), most - len(means)
    of = labels.cpu().numpy()
    counts = np.bincount(of)
    bars = np.bincount(of, weights=padded) / counts
    null = torch.stack([_means(tokens, matched_null(labels, seed), most) for seed in seeds])

    def filled(values: np.ndarray, value: float) -> np.ndarray:
        return np.concatenate([values[:most], np.full(missing, value, dtype=values.dtype)])

    return {
        "sizes": filled(counts, 0),
        "tokens": len(of),
        "singletons": int((counts == 1).sum()),
        "means": torch.nn.functional.pad(means, (0, 0, 0, missing)).cpu(),
        "null_means": torch.nn.functional.pad(null, (0, 0, 0, missing)).cpu(),
        "nearest": filled(lens.topk(units, 1)[1][:, 0].cpu().numpy(), -1),
        "to_text": filled((units @ text).double().cpu().numpy(), np.nan),
        "in_bars": filled(bars, np.nan),
        "bars": float(padded.mean()),
        "largest": of == 0,
    }


def _study(threshold: float, order: str, parts: list[dict], center: Float[Tensor, " d"]) -> ClusterStudy:
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    largest = tuple(columns.pop("largest"))
    means, null = torch.stack(columns.pop("means")), torch.stack(columns.pop("null_means"))
    stacked = {name: np.array(column) for name, column in columns.items()}
    return ClusterStudy(threshold, order, means=means, null_means=null, center=center, largest=largest, **stacked)


def _means(tokens: Float[Tensor, "n d"], labels: Int[Tensor, " m"], most: int | None) -> Float[Tensor, "k d"]:
    """Mean of the normalised members of each cluster, not at length one."""
    if labels.shape != tokens.shape[:1] or not len(labels) or int(labels.min()) < 0:
        raise EmbedLensError(
            f"{len(tokens)} tokens but labels of shape {tuple(labels.shape)}: pass one label from 0 on per token, as "
            "anchor_clusters gives them"
        )
    counts = labels.bincount()
    if not bool((counts > 0).all()):
        raise EmbedLensError("some cluster has no token: number the clusters without gaps, from 0")
    sums = torch.zeros(len(counts), tokens.shape[1], dtype=torch.float32, device=tokens.device)
    sums.index_add_(0, labels, unit_vectors(tokens).float())
    return (sums / counts[:, None])[:most]
