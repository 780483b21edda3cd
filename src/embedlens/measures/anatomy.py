"""Clusters and token groups of one model, a row a picture, to be laid beside those of others (Figure c, Appendix C.1).

measured, calibration, compared = anatomy.pictures(dataset, n, seed)
table = el.run(anatomy.study_of(model, calibration, compared, seed), model, measured, batch_size="auto")
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from embedlens import samples, stats
from embedlens.clusters import anchor_clusters, centroids, cross_image_similarity, matched_null
from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, discover, reference_of, token_groups_of
from embedlens.prompts import prompts_of
from embedlens.samples import Sample
from embedlens.vlm import VisionLanguageModel

CHAPTER = "09_other_models"
THRESHOLD = 0.9
RANKS = 6  # largest clusters of a picture
PARTNERS = 8  # fixed pictures that every picture is compared with
NULLS = 3  # random token sets of each picture
CALIBRATION = 64  # pictures in which the groups of a model are found
GROUPS = ("alive", "dead", "ViT sink", "LLM sink")
#: Last part of a repository's name → what the paper calls the model.
PAPER = {
    "llava-1.5-7b-hf": "LLaVA-1.5-7B",
    "llava-1.5-13b-hf": "LLaVA-1.5-13B",
    "Qwen2.5-VL-7B-Instruct": "Qwen2.5-VL-7B",
    "InternVL3-8B-hf": "InternVL3-8B",
    "Qwen3-VL-8B-Instruct": "Qwen3-VL-8B",
}


def name_of(model: str) -> str:
    """What the paper calls a model, by its repository or a folder called as that is; else the last part of its name.

    >>> name_of("/data/llava-1.5-13b-hf"), name_of("llava-hf/llava-1.5-7b-hf@4bit")
    ('LLaVA-1.5-13B', 'llava-1.5-7b-hf@4bit')
    """
    last = model.rstrip("/").rpartition("/")[2]
    return next((name for part, name in PAPER.items() if part.lower() == last.lower()), last)


#: Of a picture: its largest clusters' shares of the tokens (0: none), their centroids, and those of random token sets.
Clustered: TypeAlias = tuple[Float[np.ndarray, " ranks"], Float[Tensor, "_ d"], Float[Tensor, "repeats _ d"]]


def pictures(dataset: str, n: int, seed: int) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Pictures to measure, to find the groups in, and to compare with; none is in two of the lists. In the drawn world
    the second list is empty: groups are found there as in every chapter (`reference_of`)."""
    others = 0 if dataset == "miniworld" else CALIBRATION
    loaded = samples.load(dataset, n=n + others + PARTNERS, seed=seed)
    return loaded[:n], loaded[n : n + others], loaded[n + others :]


def study_of(
    model: VisionLanguageModel, calibration: Sequence[Sample], compared: Sequence[Sample], seed: int = 0
) -> partial[list[dict[str, Any]]]:
    """`anatomy` with what it needs of this model bound: how its groups are told apart, and the partner pictures."""
    if not compared:
        raise EmbedLensError("no picture to compare with: pass at least one, see anatomy.pictures")
    reference, partners = discover(model, calibration) if calibration else reference_of(model), []
    for picture in samples.readable(compared):
        (prompt,) = prompts_of(model, [picture])
        partners.append(_clustered(prompt.embeds[prompt.visual], picture.id, seed))
    return partial(anatomy, reference=reference, partners=tuple(partners), seed=seed)


def anatomy(
    model: VisionLanguageModel,
    batch: Sequence[Sample],
    reference: Reference,
    partners: Sequence[Clustered],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row per picture: its clusters, how similar they are to those of the partners, and its groups.

    Columns: tokens; share_0 ... share_5, the clusters' shares of the tokens (0: no such cluster); similarity_i, the
    mean over partners of `cross_image_similarity`, and random_i, the same of random token sets of the same sizes (nan:
    no such cluster); alive, dead, ViT sink and LLM sink, shares of the tokens.
    """
    prompts, rows = prompts_of(model, batch), []
    for picture, prompt, groups in zip(batch, prompts, token_groups_of(model, prompts, reference), strict=True):
        shares, clusters, null = _clustered(prompt.embeds[prompt.visual], picture.id, seed)
        pairs = {"similarity": [(clusters, other) for _, other, _ in partners]}
        pairs["random"] = [pair for _, _, others in partners for pair in zip(null, others, strict=True)]
        row: dict[str, Any] = {"id": picture.id, "tokens": int(prompt.visual.sum())}
        row |= {f"share_{rank}": share for rank, share in enumerate(shares.tolist())}
        for name, own in pairs.items():
            means = torch.stack([cross_image_similarity(*pair) for pair in own]).mean(0).tolist()
            row |= {f"{name}_{rank}": (means + [np.nan] * RANKS)[rank] for rank in range(RANKS)}
        rows.append(row | {name: float(groups.named[name].float().mean()) for name in GROUPS})
    return rows


def _clustered(tokens: Float[Tensor, "n d"], picture: int, seed: int) -> Clustered:
    tokens = tokens.float().cpu()
    labels = anchor_clusters(tokens, THRESHOLD)
    sets = [matched_null(labels, (seed, picture, repeat)) for repeat in range(NULLS)]
    shares = np.bincount(labels.numpy(), minlength=RANKS)[:RANKS] / len(tokens)
    null = torch.stack([centroids(tokens, one, RANKS) for one in sets])
    return shares, centroids(tokens, labels, RANKS), null


def numbers(table: pd.DataFrame, photographs: bool, seed: int = 0) -> dict[str, float]:
    """What the record of one model holds: means over the rows of `anatomy`, each with `_low` and `_high`, by name.
    `photographs` says whether the pictures were; models are compared on pictures of one kind."""
    lead = table.similarity_0 - table.random_0
    columns = table.assign(similarity=table.similarity_0, random=table.random_0, lead=lead)
    found = {"photographs": float(photographs), "tokens": float(table.tokens.mean())}
    for name in (*(f"share_{rank}" for rank in range(RANKS)), "similarity", "random", "lead", *GROUPS):
        mean = stats.estimate(stats.drawn(columns, name, seed=seed))
        found |= {name: mean.value, f"{name}_low": mean.low, f"{name}_high": mean.high}
    return found
