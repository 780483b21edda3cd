"""Clusters of many pictures, how alike they are from picture to picture, and what the token groups hold (Section 2).

`embedlens.clusters` has the algorithm; a rank is a place in the order of sizes, C0 the largest cluster of a picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from embedlens.clusters import MOST, anchor_clusters, cluster_means, matched_null, text_centroid
from embedlens.groups import Reference, token_groups_of
from embedlens.lenses import EmbedLens, unit_vectors
from embedlens.prompts import looked_at, prompts_of
from embedlens.samples import Sample
from embedlens.sweep import generator
from embedlens.vlm import VisionLanguageModel

CENTROIDS = ("means", "null_means")


@dataclass(frozen=True, eq=False)
class ClusterStudy:
    """The clusters of many pictures at one threshold. Per picture some centroids of each rank are kept, no tokens.

    Centroids lie in a temporary file, so that memory does not grow with the pictures: at width 4096 and three repeats
    0.4 MB a picture.
    """

    threshold: float
    order: str
    ids: tuple[int, ...]  #: Of the pictures
    sizes: Int[np.ndarray, "pictures k"]  #: Tokens in the cluster of each rank; 0 where a picture has no such cluster
    tokens: Int[np.ndarray, " pictures"]  #: Visual tokens of each picture
    singletons: Int[np.ndarray, " pictures"]  #: Tokens that are a cluster by themselves
    means: Float[Tensor, "pictures k d"] = field(repr=False)
    """Mean of the normalised members of each cluster; zero where there is no cluster."""
    null_means: Float[Tensor, "pictures repeats k d"] = field(repr=False)
    """The same of random token sets of the same sizes (`matched_null`)."""
    center: Float[Tensor, " d"] = field(repr=False)  #: Mean of all normalised visual tokens of all pictures
    nearest: Int[np.ndarray, "pictures k"]
    """The vocabulary entry nearest to each centroid; -1 where there is no cluster."""
    to_text: Float[np.ndarray, "pictures k"]
    """Cosine of each centroid to the centroid of the vocabulary; nan where there is no cluster."""
    in_bars: Float[np.ndarray, "pictures k"]
    """Share of each cluster's tokens that show no pixel of the picture; nan where there is no cluster."""
    bars: Float[np.ndarray, " pictures"]  #: Share of all the picture's tokens that show no pixel of it
    largest: tuple[Bool[np.ndarray, " _"], ...] = field(repr=False)
    """Which tokens of each picture are in its largest cluster."""

    def __len__(self) -> int:
        return len(self.sizes)

    def table(self) -> pd.DataFrame:
        """One row per picture and rank that some picture has: share of the tokens (0: no such cluster), in_bars."""
        ranks = int((self.sizes > 0).any(0).sum())
        found = {"share": self.sizes / self.tokens[:, None], "in_bars": self.in_bars}
        rows = {"id": np.repeat(self.ids, ranks), "rank": np.tile(np.arange(ranks), len(self))}
        return pd.DataFrame(rows | {name: values[:, :ranks].ravel() for name, values in found.items()})

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
        there = torch.from_numpy(self.sizes > 0)
        parts = []
        for some in np.array_split(pairs, max(1, len(pairs) // 512)):
            first, second = torch.from_numpy(some).unbind(1)
            needed, places = np.unique(some, return_inverse=True)
            units = unit_vectors(means[needed] - self.center if mean_removed else means[needed])
            at_first, at_second = torch.from_numpy(places.reshape(some.shape)).unbind(1)
            cosines = units[at_first] @ units[at_second].mT  # [pairs, repeats, k, k]
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
        seed: of these, together with the id of the picture.
        most: ranks kept.

    Returns:
        (threshold, order) → its clusters.

    Raises:
        EmbedLensError: no samples, or as `anchor_clusters`.
    """
    lens = EmbedLens.from_model(model)
    text = text_centroid(model)
    parts: dict[tuple[float, str], list[dict[str, Any]]] = {}
    files: dict[Any, IO[bytes]] = defaultdict(TemporaryFile)
    total = torch.zeros(model.width, dtype=torch.float64)
    seen = 0
    for batch, prompts in looked_at(model, samples, batch_size):
        for sample, prompt in zip(batch, prompts, strict=True):
            tokens = prompt.embeds[prompt.visual].float()
            total += unit_vectors(tokens).mean(0).double().cpu()
            padded = prompt.grid.padded.numpy()
            for threshold in thresholds:
                for order in orders:
                    labels = anchor_clusters(tokens, threshold, order)
                    sets = [matched_null(labels, generator(sample.id, f"random {r}", seed)) for r in range(repeats)]
                    part: dict[str, Any] = {"ids": sample.id, **_kept(tokens, labels, padded, lens, text, sets, most)}
                    parts.setdefault((threshold, order), []).append(part)
                    for name in CENTROIDS:
                        files[threshold, order, name].write(part[name].numpy().tobytes())
                        part[name] = part[name].shape
            seen += 1
    center = (total / seen).float()
    studies = {}
    for at, found in parts.items():
        means, null = (_mapped(files[(*at, name)], found, name) for name in CENTROIDS)
        studies[at] = _study(*at, found, center, means, null)
    return studies


def _kept(
    tokens: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    padded: Bool[np.ndarray, " n"],
    lens: EmbedLens,
    text: Float[Tensor, " d"],
    sets: Sequence[Int[Tensor, " n"]],
    most: int,
) -> dict[str, object]:
    """What is kept of one picture."""
    means = cluster_means(tokens, labels, most)
    units, missing = unit_vectors(means), most - len(means)
    of = labels.cpu().numpy()
    counts = np.bincount(of)
    bars = np.bincount(of, weights=padded) / counts
    null = torch.stack([cluster_means(tokens, own, most) for own in sets]) if sets else means.new_zeros(0, *means.shape)

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


def _mapped(file: IO[bytes], parts: list[dict], name: str) -> Tensor:
    """What was written to a file, picture by picture, read from it where it is used."""
    file.flush()
    shape = (len(parts), *parts[0][name])
    return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape)) if np.prod(shape) else torch.zeros(shape)


def _study(
    threshold: float, order: str, parts: list[dict], center: Float[Tensor, " d"], means: Tensor, null: Tensor
) -> ClusterStudy:
    columns = {name: [part[name] for part in parts] for name in parts[0] if name not in CENTROIDS}
    largest, ids = tuple(columns.pop("largest")), tuple(columns.pop("ids"))
    stacked = {name: np.array(column) for name, column in columns.items()}
    return ClusterStudy(threshold, order, ids, means=means, null_means=null, center=center, largest=largest, **stacked)


def by_group(
    model: VisionLanguageModel, samples: Sequence[Sample], reference: Reference, threshold: float = 0.9
) -> list[list[dict[str, Any]]]:
    """What each group of visual tokens holds: alive, dead, sinks of each kind and of both, C0, and what is not in C0.

    Returns:
        per sample, one row per group: share of the tokens and, where the group has any, to_text (mean cosine to the
        centroid of the vocabulary) and inside (share whose patch centre lies in the box of an object; crowds are none).
    """
    prompts = prompts_of(model, samples)
    found = token_groups_of(model, prompts, reference, batch_size=len(prompts))
    text = text_centroid(model)
    rows = []
    for sample, prompt, groups in zip(samples, prompts, found, strict=True):
        tokens = prompt.embeds[prompt.visual].float()
        closeness = (unit_vectors(tokens) @ text).double().cpu()
        first = (anchor_clusters(tokens, threshold) == 0).cpu()
        inside = torch.zeros(len(tokens), dtype=torch.bool)
        for x, y, w, h in (entry["bbox"] for entry in sample.annotations if not entry.get("iscrowd")):
            inside |= prompt.grid.inside((x, y, x + w, y + h))
        own = []
        for name, mask in (groups.named | {"sink": groups.sink, "C0": first, "not C0": ~first}).items():
            row: dict[str, Any] = {"group": name, "share": float(mask.double().mean())}
            if mask.any():
                row |= {"to_text": float(closeness[mask].mean()), "inside": float(inside[mask].double().mean())}
            own.append(row)
        rows.append(own)
    return rows


def joint_map(
    model: VisionLanguageModel, samples: Sequence[Sample], reference: Reference, most: int = 600, seed: int = 0
) -> pd.DataFrame:
    """t-SNE by cosine distance of visual tokens and words, at most so many of each: x, y, of (the group, or "text")."""
    from sklearn.manifold import TSNE

    rng = np.random.default_rng(seed)
    prompts = prompts_of(model, samples)
    kinds = np.concatenate([groups.names for groups in token_groups_of(model, prompts, reference)])
    tokens = torch.cat([prompt.embeds[prompt.visual].float().cpu() for prompt in prompts])
    kept, words = (np.sort(rng.choice(n, min(most, n), False)) for n in (len(tokens), len(model.tokens)))
    points = np.concatenate([tokens[kept], model.input_embeddings[words].float().cpu()])
    settings: dict[str, Any] = {"metric": "cosine", "init": "pca", "perplexity": 30, "max_iter": 500, "n_jobs": 1}
    places = TSNE(random_state=seed, **settings).fit_transform(points)
    return pd.DataFrame(places, columns=["x", "y"]).assign(of=[*kinds[kept], *["text"] * len(words)])
