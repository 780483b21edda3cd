"""Do attention and likeness to CLS order visual tokens by what they say, and by what is lost without them?

Figures 1, 3 and 4 of 2503.20540: two "intermediate states" order tokens, the cosine of CLS and patch in the vision
tower, and the attention from the last text position, summed over the language model's layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from embedlens.batches import in_batches
from embedlens.codebook import AS_SHARES, Codebook, Recipe, Stages, build, quantile_thresholds
from embedlens.cues import attended, cls_similarity, features_of
from embedlens.errors import EmbedLensError
from embedlens.measures.labels import named_patches
from embedlens.readings import Protocol, describing
from embedlens.redundancy import TokenScores, readings_of, sampled_ranks, token_scores
from embedlens.samples import Sample
from embedlens.vlm import Prompt, VisionLanguageModel

SURE, UNSURE = 0.4, 0.1  # the paper's "40 % to 80 %" and "below 10 %" (caption of Figure 1)
THIRD = 1 / 3  # of a picture's tokens: what counts as low and as high
SCORES, VALUES = ("similarity", "attention"), ("probability", "divergence")


@dataclass(frozen=True, eq=False)
class Scored:
    """Scored tokens of some pictures; `scores` is picture by picture, `table` has a row per scored token."""

    protocol: Protocol
    samples: Sequence[Sample]
    prompts: Sequence[Prompt]
    scores: Sequence[TokenScores]
    #: id, patch; similarity (nan for a tower without CLS) and attention; low, high: in that third of its picture by
    #: every score that there is; probability, divergence, word; named: the token alone names the object that its patch
    #: lies in, misnamed: the next picture's word at its place does
    table: pd.DataFrame

    @property
    def tokens(self) -> list[Float[Tensor, "_ d"]]:
        """All visual tokens of each picture."""
        return [prompt.embeds[prompt.visual] for prompt in self.prompts]

    def codebook(self, model: VisionLanguageModel, recipe: Recipe = AS_SHARES) -> tuple[Codebook, Stages] | None:
        """The codebook that these pictures give, with thresholds by quantiles; None where no token is a prototype, and
        a warning says at which step the last one went."""
        ids, limits = [sample.id for sample in self.samples], quantile_thresholds(self.scores)
        try:
            return build(model, self.tokens, self.scores, ids, limits, recipe, self.protocol)
        except EmbedLensError as error:
            warnings.warn(f"these {len(ids)} pictures give no codebook: {error}", stacklevel=2)
            return None


def scored(
    model: VisionLanguageModel, samples: Sequence[Sample], protocol: Protocol | None = None, low_only: bool = False
) -> Scored:
    """Read the tokens of some pictures: all of few, the release's 96 ranks of likeness to CLS of many. `protocol` is by
    default the release's, with the model's own question and aligned articles. `low_only`: read only the tokens in the
    lowest third of their picture by every score; pictures without any are left out, and all may be."""
    if len(samples) < 2:
        raise EmbedLensError(f"{len(samples)} pictures: pass at least two, better 24")
    protocol = protocol or Protocol(question=describing(model))
    prompts = model.prompts([sample.image for sample in samples], [protocol.question] * len(samples))
    features = list(in_batches(lambda _, some: features_of(model, some), prompts, 16))
    attention = [part.double().sum(0).cpu() for part, _ in attended(model, prompts)]
    similarity = [cls_similarity(one).double().cpu() for one in features if one.cls is not None]
    order, tables = similarity if len(similarity) == len(samples) else attention, []
    for i, sample in enumerate(samples):
        at = order[i].argsort(descending=True, stable=True)[sampled_ranks(len(order[i]))].sort().values
        own = {"attention": attention[i][at], "similarity": similarity[i][at] if order is similarity else np.nan}
        tables.append(pd.DataFrame({"id": sample.id, "patch": at, **own}))
    ordered = extremes(pd.concat(tables, ignore_index=True))
    ordered = ordered[ordered["low"]] if low_only else ordered
    kept = [i for i, sample in enumerate(samples) if (ordered["id"] == sample.id).any()]
    samples, prompts = [samples[i] for i in kept], [prompts[i] for i in kept]
    parts = [ordered[ordered["id"] == sample.id] for sample in samples]
    places = [torch.tensor(part["patch"].to_numpy()) for part in parts]
    scores, tables = token_scores(model, prompts, places, protocol), []
    for i, (sample, part, at, read) in enumerate(zip(samples, parts, places, scores, strict=True)):
        columns: dict[str, Any] = {"probability": read.probability.double().cpu().numpy()}
        columns |= {"divergence": read.cascade().double().cpu().numpy(), "word": read.word.cpu().numpy()}
        for name, words in (("named", read.word), ("misnamed", scores[(i + 1) % len(scores)].word)):
            ids = torch.full((len(prompts[i].grid), 1), -1)
            ids[at[: len(words)], 0] = words.cpu()[: len(at)]
            columns[name] = np.asarray(named_patches(model, sample, prompts[i].grid, ids)[0])[at]
        tables.append(part.assign(**columns))
    none: dict[str, Any] = {"probability": 0.0, "divergence": 0.0, "word": 0, "named": False, "misnamed": False}
    table = pd.concat(tables, ignore_index=True) if tables else ordered.assign(**none)
    return Scored(protocol, samples, prompts, scores, table)


def orders_in(table: pd.DataFrame) -> list[str]:
    """Of SCORES what the model has, which orders the tokens of a table."""
    return [name for name in SCORES if table[name].notna().all()]


def extremes(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `low` and `high`: in the lowest (highest) third of its picture by every score that there is."""
    size = table.groupby("id")["id"].transform("size")
    found = {"low": True, "high": True}
    for name in orders_in(table):
        for end, values in (("low", table[name]), ("high", -table[name])):
            found[end] &= values.groupby(table["id"]).rank(method="first") <= np.ceil(THIRD * size)
    return table.assign(**found)


def trends(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rho of each picture: id, score, value, rho; no row where one of the two is constant."""
    rows = []
    for picture, own in table.groupby("id", sort=False):
        for score in orders_in(table):
            for value in VALUES:
                if own[score].nunique() > 1 and own[value].nunique() > 1:
                    rho = float(spearmanr(own[score], own[value]).statistic)
                    rows.append({"id": picture, "score": score, "value": value, "rho": rho})
    return pd.DataFrame(rows, columns=["id", "score", "value", "rho"])


def by_rank(table: pd.DataFrame, score: str, cumulative: bool = False) -> pd.DataFrame:
    """The table with `rank`: from 1, the highest score of its picture, to as many as the smallest picture has. Larger
    pictures are read equally far along. `cumulative`: picture k is ordered by the sum of scores over pictures 1 to k,
    which is what the released notebook of Figure 4 does as it does not reset the attention between pictures."""
    groups = [own for _, own in table.groupby("id", sort=False)]
    fewest = min(map(len, groups))
    if cumulative and any(len(own) != fewest for own in groups):
        raise EmbedLensError("the pictures have different numbers of tokens, whose scores do not sum: leave it out")
    summed, found = np.zeros(fewest), []
    for own in groups:
        values = own[score].to_numpy()
        if cumulative:
            values = summed = summed + values
        along = np.round(np.linspace(0, len(own) - 1, fewest)).astype(int)
        found.append(own.iloc[np.argsort(-values, kind="stable")[along]].assign(rank=np.arange(1, fewest + 1)))
    return pd.concat(found, ignore_index=True)


def larger_below(table: pd.DataFrame) -> pd.DataFrame:
    """Pairs of tokens of one picture, one lower in every score: how many (asked), how often it has the larger D (hits).
    One row per picture that has such pairs."""
    rows = []
    for picture, own in table.groupby("id", sort=False):
        scores = [own[name].to_numpy() for name in orders_in(table)]
        lower = np.logical_and.reduce([part[:, None] < part[None] for part in scores])
        d = own["divergence"].to_numpy()
        if lower.any():
            rows.append({"id": picture, "hits": int((lower & (d[:, None] > d[None])).sum()), "asked": int(lower.sum())})
    return pd.DataFrame(rows, columns=["id", "hits", "asked"])


def raised(model: VisionLanguageModel, found: Scored, chosen: pd.Series) -> pd.DataFrame:
    """How much chosen tokens (True for rows of `found.table`) raise the logit of their word in their region, and their
    region in the whole picture; one row per picture that has such tokens, means over them: id, region, picture."""
    rows = []
    for sample, prompt in zip(found.samples, found.prompts, strict=True):
        own = found.table[chosen & (found.table["id"] == sample.id)]
        if len(own):
            read = readings_of(model, prompt, torch.tensor(own["patch"].to_numpy()), found.protocol)
            pairs = {"region": (read.region, read.region_without), "picture": (read.picture, read.picture_without)}
            word = torch.tensor(own["word"].to_numpy())[:, None]
            said = {name: float((a - b).cpu().gather(1, word).mean()) for name, (a, b) in pairs.items()}
            rows.append({"id": sample.id, **said})
    return pd.DataFrame(rows, columns=["id", "region", "picture"])
