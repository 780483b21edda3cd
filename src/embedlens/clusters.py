"""Clusters of the visual tokens of a picture, and how alike they are from picture to picture (Section 2, Appendix B).

The paper does not say in which order anchors are taken nor whether clusters may share tokens. Here they are disjoint,
and `order="raster"` is the ablation. A rank is a place in the order of sizes and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.lenses import unit_vectors
from embedlens.vlm import VisionLanguageModel

ORDERS = ("greedy", "raster")
MOST = 6  # clusters kept of a picture: ranks 0 to 5, as the paper's Figure 1 and Appendix B.2 have them
ROUNDING = 1e-9  # two equal tokens have a cosine of 1 at every threshold, whatever the last bit says


def anchor_clusters(tokens: Float[Tensor, "n d"], threshold: float = 0.9, order: str = "greedy") -> Int[Tensor, " n"]:
    """Disjoint clusters around anchors: an anchor takes every unassigned token at a cosine of `threshold` or more.

    Appendix B.1 of the paper. "greedy" takes the unassigned token with the most unassigned neighbours as the next
    anchor, ties by lowest index; "raster" the first unassigned one. A zero vector is a cluster by itself. `tokens` are
    those of *one* picture, any length; `threshold` is in (0, 1]. Memory grows with n squared.

    Returns:
        The cluster of each token; 0 is the largest, equal sizes are numbered as they were found.

    >>> anchor_clusters(torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])).tolist()
    [1, 0, 0]
    """
    if not 0 < threshold <= 1:
        raise EmbedLensError(f"the threshold is {threshold}: pass a cosine above 0 and at most 1")
    if order not in ORDERS:
        raise EmbedLensError(f"unknown order {order!r}: use one of {', '.join(ORDERS)}")
    if tokens.ndim != 2 or not len(tokens):
        raise EmbedLensError(f"the tokens have shape {tuple(tokens.shape)}: pass at least one of one picture, [n, d]")
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


def centroids(tokens: Float[Tensor, "n d"], labels: Int[Tensor, " m"], most: int | None = None) -> Float[Tensor, "k d"]:
    """`cluster_means` at length one (App. B.2).

    >>> centroids(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 5.0]]), torch.tensor([1, 0, 0])).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    return unit_vectors(cluster_means(tokens, labels, most))


def cross_image_similarity(a: Float[Tensor, "k d"], b: Float[Tensor, "m d"]) -> Float[Tensor, " k"]:
    """Highest cosine of each centroid of one picture to any centroid of another.

    Appendix B.2 of the paper: s_i = max_j C_i(1) · C_j(2), both sides unit length. The more clusters the other picture
    has, the higher the maximum: hold it against `matched_null`.

    >>> cross_image_similarity(torch.eye(3), torch.eye(3)).tolist()
    [1.0, 1.0, 1.0]
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        shapes = f"centroids of shapes {tuple(a.shape)} and {tuple(b.shape)}"
        raise EmbedLensError(f"{shapes}: pass at least one of each picture, all of one width")
    return (unit_vectors(a) @ unit_vectors(b).T).amax(1)


def matched_null(labels: Int[Tensor, " n"], seed: int | Sequence[int] | np.random.Generator) -> Int[Tensor, " n"]:
    """Random disjoint token sets of the same sizes as the clusters: the labels, dealt out anew, by picture and seed.

    >>> sorted(matched_null(torch.tensor([0, 0, 1, 2]), seed=0).tolist())
    [0, 0, 1, 2]
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    return labels[torch.from_numpy(order).to(labels.device)]


def picture_pairs(n: int, partners: int = 20, seed: int = 0) -> Int[np.ndarray, "pairs 2"]:
    """Ordered pairs of `n` pictures, by index: each comes first in as many, all others or `partners` drawn at random.

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


def text_centroid(model: VisionLanguageModel) -> Float[Tensor, " d"]:
    """Mean of the normalised rows of the input embedding, at length one: the middle of the vocabulary."""
    rows = model.input_embeddings
    total = torch.stack([unit_vectors(part).sum(0) for part in rows.split(4096)]).sum(0)
    return unit_vectors(total)


def cluster_means(
    tokens: Float[Tensor, "n d"], labels: Int[Tensor, " m"], most: int | None = None
) -> Float[Tensor, "k d"]:
    """The mean of the normalised members of each cluster, largest first, so `most` of them; not at length one."""
    if labels.shape != tokens.shape[:1] or not len(labels) or int(labels.min()) < 0:
        what = f"{len(tokens)} tokens but labels of shape {tuple(labels.shape)}"
        raise EmbedLensError(f"{what}: pass one label from 0 on per token, as anchor_clusters gives them")
    counts = labels.bincount()
    if not bool((counts > 0).all()):
        raise EmbedLensError("some cluster has no token: number the clusters without gaps, from 0")
    sums = torch.zeros(len(counts), tokens.shape[1], dtype=torch.float32, device=tokens.device)
    sums.index_add_(0, labels, unit_vectors(tokens).float())
    return (sums / counts[:, None])[:most]
