"""Clusters of many pictures, how alike they are from picture to picture, and what the token groups hold (Section 2).

`embedlens.clusters` has the algorithm; a rank is a place in the order of sizes, C0 the largest cluster of a picture.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from embedlens.clusters import MOST, anchor_clusters, cluster_means, matched_null, text_centroid
from embedlens.groups import Reference, token_groups_of
from embedlens.lenses import EmbedLens, unit_vectors
from embedlens.measures.labels import objects
from embedlens.prompts import looked_at, prompts_of
from embedlens.samples import Sample
from embedlens.sweep import generator
from embedlens.vlm import VisionLanguageModel

CENTROIDS = ("means", "null_means")


@dataclass(frozen=True, eq=False)
class ClusterStudy:
    """Clusters of many pictures at one threshold: centroids, no tokens, in a temporary file (at width 4096 and three
    repeats 0.4 MB a picture), so that memory does not grow."""

    ids: tuple[int, ...]  #: Of the pictures
    sizes: Int[np.ndarray, "pictures k"]  #: Tokens in the cluster of each rank; 0 where a picture has no such cluster
    tokens: Int[np.ndarray, " pictures"]  #: Visual tokens of each picture
    singletons: Int[np.ndarray, " pictures"]  #: Tokens that are a cluster by themselves
    #: Mean of the normalised members of each cluster; zero where there is no cluster
    means: Float[Tensor, "pictures k d"] = field(repr=False)
    #: The same of random token sets of the same sizes (`matched_null`)
    null_means: Float[Tensor, "pictures repeats k d"] = field(repr=False)
    center: Float[Tensor, " d"] = field(repr=False)  #: Mean of all normalised visual tokens of all pictures
    nearest: Int[np.ndarray, "pictures k"]  #: Vocabulary entry nearest to each centroid; -1 without a cluster
    in_bars: Float[np.ndarray, "pictures k"]  #: Share of its tokens that show no pixel; nan without a cluster
    bars: Float[np.ndarray, " pictures"]  #: Share of all the picture's tokens that show no pixel of it
    largest: tuple[Bool[np.ndarray, " _"], ...] = field(repr=False)  #: Tokens in each picture's largest cluster

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
        """Share of the largest cluster in three totals: all tokens; ranks 0 to 4; all clusters of two or more. "Larger
        than the remaining clusters combined" is a share above one half; which clusters are meant is open."""
        first = self.sizes[:, 0].astype(np.float64)
        several = self.tokens - self.singletons
        of_several = np.where(several > 0, first / np.maximum(several, 1), 0.0)
        return np.stack([first / self.tokens, first / self.sizes[:, :5].sum(1), of_several], 1)

    def similarity(
        self, pairs: Int[np.ndarray, "pairs 2"], mean_removed: bool = False, null: bool = False
    ) -> Float[np.ndarray, "pairs k"]:
        """`cross_image_similarity` by rank for each pair of pictures; nan where the first has no such cluster.
        `mean_removed` takes `center` from all centroids first, `null` compares the random sets, mean over repeats."""
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
) -> dict[tuple[float, str], ClusterStudy]:
    """Cluster the visual tokens of every picture where they enter the language model, which is not run.

    Args:
        thresholds, orders: as for `anchor_clusters`; every combination is studied on the same tokens.
        repeats: random token sets of each picture for the matched null; drawn by its id and the seed.

    Returns:
        (threshold, order) → its clusters.
    """
    lens, center, most = EmbedLens.from_model(model), torch.zeros(model.width, dtype=torch.float64), MOST
    parts: dict[tuple[float, str], list[dict[str, Any]]] = {key: [] for key in product(thresholds, orders)}
    files: dict[Any, IO[bytes]] = defaultdict(TemporaryFile)
    for batch, prompts in looked_at(model, samples, batch_size):
        for sample, prompt in zip(batch, prompts, strict=True):
            tokens, padded = prompt.embeds[prompt.visual].float(), prompt.grid.padded.double()
            center += unit_vectors(tokens).mean(0).double().cpu()
            for key, found in parts.items():
                labels = anchor_clusters(tokens, *key)
                sets = [matched_null(labels, generator(sample.id, f"random {r}", seed)) for r in range(repeats)]
                means, of = cluster_means(tokens, labels, most), labels.cpu()
                none, sizes = (0, 0, 0, most - len(means)), of.bincount(minlength=most)
                null = [pad(cluster_means(tokens, own, most), none).cpu() for own in sets]
                words = lens.topk(unit_vectors(means), 1)[1][:, 0].cpu()
                part = {
                    "ids": sample.id,
                    "sizes": sizes[:most].numpy(),
                    "tokens": len(of),
                    "singletons": int((sizes == 1).sum()),
                    "means": pad(means, none).cpu(),
                    "null_means": torch.stack(null) if null else torch.zeros(0, most, model.width),
                    "nearest": pad(words, none[2:], value=-1).numpy(),
                    "in_bars": (of.bincount(padded, most) / sizes)[:most].numpy(),  # 0 of 0 is nan
                    "bars": float(padded.mean()),
                    "largest": (of == 0).numpy(),
                }
                for name in CENTROIDS:
                    files[key, name].write(part[name].numpy().tobytes())
                    part[name] = part[name].shape
                found.append(part)
    studies = {}
    for key, found in parts.items():
        columns: dict[str, Any] = {name: tuple(part[name] for part in found) for name in found[0]}
        for name in columns.keys() - {"ids", "largest", *CENTROIDS}:
            columns[name] = np.array(columns[name])
        for name in CENTROIDS:  # what was written to a file, picture by picture, read from it where it is used
            files[key, name].flush()
            shape = (len(found), *columns[name][0])
            empty = not math.prod(shape)  # which cannot be mapped
            data = np.zeros(shape) if empty else np.memmap(files[key, name], np.float32, "r+", shape=shape)
            columns[name] = torch.from_numpy(data).float()
        studies[key] = ClusterStudy(**columns, center=(center / len(found)).float())
    return studies


def by_group(model: VisionLanguageModel, samples: Sequence[Sample], reference: Reference) -> list[list[dict[str, Any]]]:
    """What each group of visual tokens holds: alive, dead, sinks of each kind and of both, C0, and what is not in C0.
    Returns per sample, one row per group: share of the tokens and, where the group has any, to_text (mean cosine to the
    centroid of the vocabulary) and inside (share whose patch centre lies in the box of an object; crowds are none)."""
    prompts, text, rows = prompts_of(model, samples), text_centroid(model), []
    found = token_groups_of(model, prompts, reference, batch_size=len(prompts))
    for sample, prompt, groups in zip(samples, prompts, found, strict=True):
        tokens = prompt.embeds[prompt.visual].float()
        closeness = (unit_vectors(tokens) @ text).double().cpu()
        first = (anchor_clusters(tokens) == 0).cpu()
        parts = [torch.zeros_like(first), *(part for _, _, part in objects(sample, prompt.grid))]
        inside, own = torch.stack(parts).any(0).double(), []
        for name, mask in (groups.named | {"sink": groups.sink, "C0": first, "not C0": ~first}).items():
            row: dict[str, Any] = {"group": name, "share": float(mask.double().mean())}
            if mask.any():
                row |= {"to_text": float(closeness[mask].mean()), "inside": float(inside[mask].mean())}
            own.append(row)
        rows.append(own)
    return rows
