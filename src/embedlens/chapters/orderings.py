"""Do attention and likeness to CLS order visual tokens by what they say, and by what is lost without them?

Figures 1, 3 and 4 of 2503.20540: every token of some pictures is read alone and left out (`embedlens.redundancy`), and
two "intermediate states" order the same tokens: the cosine of CLS and patch in the vision tower, and the attention
from the last text position, summed over the language model's layers.

The released notebook of Figure 4 does not reset the attention between pictures: its order at picture k is that of the
sum over pictures 1 to k. `by_rank(cumulative=True)` is that, the default orders each picture by its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from embedlens import claims, figures
from embedlens.claims import FAILS, HOLDS, PARTLY, UNTESTABLE, Finding
from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, TokenGroups, token_groups_of
from embedlens.intervals import Interval, beyond_seen, mean_interval, ratio_interval
from embedlens.measures.labels import named_patches
from embedlens.pruners import attended, cls_similarity, features_of
from embedlens.redundancy import Protocol, Readings, TokenScores, describing, readings_of, sampled_ranks, token_scores
from embedlens.samples import Sample, load, readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from embedlens.vlm import Prompt, VisionLanguageModel
else:
    Figure = Prompt = VisionLanguageModel = object

SURE, UNSURE = 0.4, 0.1  # the paper's "40 % to 80 %" and "below 10 %" (caption of Figure 1)
THIRD = 1 / 3  # of a picture's tokens: what counts as low and as high
NO_TREND = 0.1  # Spearman's rho up to which an order says next to nothing; set before the run
FOLLOWED = 8  # pictures whose words are followed through both divergences
SOME = 0.01  # a share of tokens below this is not "some"; set before the run
PAPER_LEVEL = {"probability": 0.24, "divergence": 4e-3}  # what Figure 4's curves are said to fluctuate around
SCORES = {"similarity": "[cls] similarity", "attention": "text-to-image attention"}
VALUES = {"probability": "top-1 probability", "divergence": "divergence D"}


@dataclass(frozen=True, eq=False)
class Orderings:
    """Scored tokens of some pictures, picture by picture; arrays have one entry per scored token."""

    model: str
    protocol: Protocol
    samples: Sequence[Sample]
    prompts: Sequence[Prompt]
    scores: Sequence[TokenScores]
    groups: Sequence[TokenGroups]
    similarity: Sequence[Float[np.ndarray, " _"]] | None
    """Cosine to CLS; None for a tower that has none."""
    attention: Sequence[Float[np.ndarray, " _"]]
    """From the last text position, summed over layers."""
    named: Sequence[Bool[np.ndarray, " _"]]
    """The token alone names the object that its patch lies in."""
    misnamed: Sequence[Bool[np.ndarray, " _"]]
    """The control: the words of the next picture's tokens name this picture's object at their place."""

    @property
    def tokens(self) -> list[Float[Tensor, "_ d"]]:
        """All visual tokens of each picture."""
        return [prompt.embeds[prompt.visual] for prompt in self.prompts]

    @property
    def orders(self) -> dict[str, Sequence[Float[np.ndarray, " _"]]]:
        """Name in SCORES → what orders each picture's tokens; only what the model has."""
        with_cls = {} if self.similarity is None else {"similarity": self.similarity}
        return {**with_cls, "attention": self.attention}

    def values(self, name: str) -> list[Float[np.ndarray, " _"]]:
        """Name in VALUES → that score of each picture's tokens."""
        if name not in VALUES:
            raise EmbedLensError(f"unknown value {name!r}: use {' or '.join(map(repr, VALUES))}")
        if name == "probability":
            return [score.probability.double().cpu().numpy() for score in self.scores]
        return [score.cascade().double().cpu().numpy() for score in self.scores]

    def extreme(self, high: bool) -> list[Bool[np.ndarray, " _"]]:
        """Tokens in the highest (lowest) third of their picture by every order that the model has."""
        masks = []
        for i in range(len(self.samples)):
            own = [order[i] for order in self.orders.values()]
            ranks = np.stack([np.argsort(np.argsort(-part if high else part, kind="stable")) for part in own])
            masks.append((ranks < THIRD * ranks.shape[1]).all(0))
        return masks


def study(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    protocol: Protocol | None = None,
    reference: Reference | None = None,
    batch_size: int = 64,
) -> Orderings:
    """Read the tokens of some pictures: all of few, the release's 96 ranks of [cls] similarity of many.

    Args:
        model: from `embedlens.load`.
        samples: pictures with boxes, at least two.
        protocol: default: the release's, with the model's own question and aligned articles.
        reference: of the token groups; default: the model's own.
        batch_size: readings that run together.
    """
    if len(samples) < 2:
        raise EmbedLensError(f"{len(samples)} pictures: pass at least two, better 24")
    protocol = protocol or Protocol(question=describing(model))
    prompts = model.prompts([sample.image for sample in samples], [protocol.question] * len(samples))
    features = [one for _, batch in model.batches(prompts, 16) for one in features_of(model, batch)]
    with_cls = all("CLS" in one.has for one in features)
    similarity = [cls_similarity(one).double().cpu().numpy() for one in features] if with_cls else None
    attention = [part.double().sum(0).cpu().numpy() for part, _ in attended(model, prompts)]
    order = similarity or attention
    places = [
        torch.from_numpy(np.argsort(-own, kind="stable")[sampled_ranks(len(own))].copy()).sort().values for own in order
    ]
    scores = token_scores(model, prompts, places, protocol, batch_size)
    named: list[np.ndarray] = []
    misnamed: list[np.ndarray] = []
    for i, (sample, prompt, at) in enumerate(zip(samples, prompts, places, strict=True)):
        for words, found in ((scores[i].word, named), (scores[(i + 1) % len(scores)].word, misnamed)):
            ids = torch.full((len(prompt.grid), 1), -1)
            ids[at[: len(words)], 0] = words.cpu()[: len(at)]
            found.append(np.asarray(named_patches(model, sample, prompt.grid, ids)[0])[at])
    at_places = [own.numpy() for own in places]
    return Orderings(
        model.name,
        protocol,
        samples,
        prompts,
        scores,
        list(token_groups_of(model, prompts, reference=reference)),
        None if similarity is None else [own[at] for own, at in zip(similarity, at_places, strict=True)],
        [own[at] for own, at in zip(attention, at_places, strict=True)],
        named,
        misnamed,
    )


# --- statistics ------------------------------------------------------------------------------------------------------


def rank_correlation(a: Float[np.ndarray, " m"], b: Float[np.ndarray, " m"]) -> float:
    """Spearman's rho, ties at their mean rank; nan where one of the two is constant.

    >>> round(rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 9.0, 8.0])), 6)
    0.5
    """
    from scipy.stats import rankdata

    if len(a) != len(b) or not len(a):
        raise EmbedLensError(f"{len(a)} and {len(b)} values: pass as many of both, at least one")
    ranks = [rankdata(part) - (len(part) + 1) / 2 for part in (a, b)]
    scale = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float(ranks[0] @ ranks[1]) / scale if scale > 0 else float("nan")


def by_rank(
    order: Sequence[Float[np.ndarray, " _"]], values: Sequence[Float[np.ndarray, " _"]], cumulative: bool = False
) -> Float[np.ndarray, "pictures ranks"]:
    """Values of each picture's tokens from the highest to the lowest score.

    Pictures of different numbers of tokens are read at as many ranks as the smallest has, equally far along each.

    Args:
        order: the score of each picture's tokens.
        values: what is read in that order.
        cumulative: order picture k by the sum of scores over pictures 1 to k, as the released notebook does.

    Raises:
        EmbedLensError: scores and values of different numbers of tokens; a sum over pictures that have different ones.
    """
    lengths = [len(part) for part in order]
    if not lengths or lengths != [len(part) for part in values]:
        raise EmbedLensError(f"{lengths} scores, {[len(part) for part in values]} values: pass one of each per token")
    if len(set(lengths)) > 1:
        if cumulative:
            raise EmbedLensError("the pictures have different numbers of tokens, whose scores do not sum: leave it out")
        along = np.linspace(0, 1, min(lengths))
        sorted_by = [value[np.argsort(-own, kind="stable")] for own, value in zip(order, values, strict=True)]
        return np.stack([own[np.round(along * (len(own) - 1)).astype(int)] for own in sorted_by])
    scores = np.stack([np.asarray(part, dtype=np.float64) for part in order])
    if cumulative:
        scores = scores.cumsum(0)
    return np.take_along_axis(np.stack(values), np.argsort(-scores, axis=1, kind="stable"), axis=1)


def trends(found: Orderings, seed: int = 0) -> dict[tuple[str, str], Interval]:
    """(score, value) → mean over pictures of Spearman's rho, with its interval; 0 where all values are equal."""
    result = {}
    for score, order in found.orders.items():
        for value in VALUES:
            rho = np.array([rank_correlation(a, b) for a, b in zip(order, found.values(value), strict=True)])
            result[score, value] = mean_interval(rho if np.isfinite(rho).any() else np.zeros(len(rho)), seed=seed)
    return result


def larger_below(found: Orderings, seed: int = 0) -> Interval:
    """Of pairs of tokens of one picture of which one is lower in every order: how often it has the larger D.

    nan where no pair is ordered alike by all scores.
    """
    hits, asked = [], []
    for i, divergence in enumerate(found.values("divergence")):
        lower = np.logical_and.reduce([order[i][:, None] < order[i][None] for order in found.orders.values()])
        hits.append(float((lower & (divergence[:, None] > divergence[None])).sum()))
        asked.append(float(lower.sum()))
    if not sum(asked):
        return Interval(*(np.array(np.nan) for _ in range(3)))
    return ratio_interval(np.array(hits), np.array(asked), seed=seed)


def _share(hits: Sequence[Bool[np.ndarray, " _"]], asked: Sequence[Bool[np.ndarray, " _"]], seed: int) -> Interval:
    return ratio_interval(
        np.array([float((a & b).sum()) for a, b in zip(hits, asked, strict=True)]),
        np.array([float(b.sum()) for b in asked]),
        seed=seed,
    )


# --- verdicts --------------------------------------------------------------------------------------------------------

RULES = {
    "R03": f"holds if more than {SOME:.0%} of the tokens in the lowest third by both scores say the name of their "
    f"object with at least {SURE:.0%}, and more of them than with the next picture's words; does not hold if no more "
    f"than {SOME:.0%} do, with the whole interval; partly otherwise",
    "R04": f"holds if more than {SOME:.0%} of the tokens in the highest third by both scores stay below {UNSURE:.0%} "
    "and do not name their object; does not hold if no more do, with the whole interval; partly otherwise",
    "R05": "holds if, in pairs where one token is lower by both scores, that one has the larger D in more than a "
    "quarter (half is what no relation gives); partly above a hundredth",
    "R06": "holds if the tokens that name their object with confidence raise that word's logit in their region",
    "R07": "holds if their region raises it in the whole picture",
    "R08": f"holds if the mean rho of top-1 probability lies below {NO_TREND} with its whole interval for both scores; "
    "partly if for one",
    "R09": f"holds if the mean rho of D lies below {NO_TREND} with its whole interval for both scores; partly if for "
    "one",
}


def findings(
    model: VisionLanguageModel, found: Orderings, seed: int = 0, raised: tuple[Interval, Interval] | None = None
) -> dict[str, Finding]:
    """R03 to R09 by `RULES`.

    Args:
        model: whose tokens they are.
        found: from `study`.
        seed: of the bootstrap.
        raised: from `raised_logits`; None: read here.
    """
    n = len(found.samples)
    low, high = found.extreme(high=False), found.extreme(high=True)
    p = found.values("probability")
    sure, unsure = [part >= SURE for part in p], [part < UNSURE for part in p]
    result = {}

    def finding(value: Interval, verdict: str, note: str) -> Finding:
        return Finding(float(value.value), float(value.low), float(value.high), n, verdict, note)

    def some(hits: Sequence[np.ndarray], among: Sequence[np.ndarray], what: str, control: Interval | None) -> Finding:
        if not any(part.any() for part in among):
            return Finding(None, None, None, n, UNTESTABLE, f"No token is {what} by both scores in any picture.")
        asked, pictures = sum(int(part.sum()) for part in among), sum(bool(part.any()) for part in among)
        value = beyond_seen(_share(hits, among, seed), pictures)
        control = control if control is None else beyond_seen(control, pictures)
        beyond = control is None or float(value.low) > float(control.value)
        verdict = HOLDS if value.low > SOME and beyond else FAILS if value.high <= SOME else PARTLY
        beside = "" if control is None else f"; with the next picture's words {control.texts(3)[0]}"
        note = f"Share of the {asked} tokens that are {what} by both scores, in {pictures} pictures{beside}."
        return replace(finding(value, verdict, note), n=pictures)

    says = [a & b for a, b in zip(sure, found.named, strict=True)]
    control = _share([a & b for a, b in zip(sure, found.misnamed, strict=True)], low, seed) if _any(low) else None
    result["R03"] = some(says, low, "lowest", control)
    result["R04"] = some([a & ~b for a, b in zip(unsure, found.named, strict=True)], high, "highest", None)
    pairs = larger_below(found, seed)
    if np.isfinite(pairs.value):
        verdict = HOLDS if pairs.low > 0.25 else PARTLY if pairs.low > SOME else FAILS
        result["R05"] = finding(
            pairs,
            verdict,
            "Share of pairs in which the token that is lower by both has the larger D (no relation gives a half).",
        )
    else:
        note = "No two tokens of a picture are ordered alike by both scores."
        result["R05"] = Finding(None, None, None, n, UNTESTABLE, note)
    raised = raised_logits(model, found, seed=seed) if raised is None else raised
    followed = min(FOLLOWED, max(1, sum(bool((a & b).any()) for a, b in zip(sure, found.named, strict=True))))
    for name, value, where in zip(("R06", "R07"), raised, ("its region", "the whole picture"), strict=True):
        if not np.isfinite(value.value):
            note = "No token names its object with confidence, so there is no logit to follow."
            result[name] = Finding(None, None, None, n, UNTESTABLE, note)
            continue
        said = (
            f"By how much a token that names its object raises that word's logit in {where} (in the paper: one patch)."
        )
        verdict = claims.judged(float(value.low), float(value.high))
        result[name] = replace(finding(value, verdict, said), n=followed)
    rhos = trends(found, seed)
    for name, value_name in (("R08", "probability"), ("R09", "divergence")):
        own = {score: rhos[score, value_name] for score in found.orders}
        flat = [float(rho.high) < NO_TREND for rho in own.values()]
        worst = max(own.values(), key=lambda rho: float(rho.value))
        level = mean_interval(np.array([part.mean() for part in found.values(value_name)]), seed=seed)
        said = ", ".join(f"{SCORES[score]} {rho.texts()[0]}" for score, rho in own.items())
        note = f"Larger of the mean rhos of {VALUES[value_name]}: {said}; level {level.texts(3)[0]}."
        result[name] = finding(worst, HOLDS if all(flat) else PARTLY if any(flat) else FAILS, note)
    return result


def _any(masks: Sequence[np.ndarray]) -> bool:
    return any(part.any() for part in masks)


def raised_logits(
    model: VisionLanguageModel, found: Orderings, pictures: int = FOLLOWED, seed: int = 0
) -> tuple[Interval, Interval]:
    """How much a confident, right token raises its word's logit in its region, and its region in the whole picture.

    Of the first pictures that have such tokens; nan where none has.
    """
    means: list[list[float]] = []
    for i, prompt in enumerate(found.prompts):
        right = found.named[i] & (found.values("probability")[i] >= SURE)
        if not right.any() or len(means) == pictures:
            continue
        score = found.scores[i]
        at = score.places[torch.from_numpy(right)]
        read = readings_of(model, prompt, at, found.protocol)
        word = score.word[torch.from_numpy(right)].cpu()[:, None]
        pairs = ((read.region, read.region_without), (read.picture, read.picture_without))
        means.append([float((a.cpu().gather(1, word) - b.cpu().gather(1, word)).mean()) for a, b in pairs])
    if not means:
        nothing = Interval(*(np.array(np.nan) for _ in range(3)))
        return nothing, nothing
    both = mean_interval(np.array(means), seed=seed)
    region, picture = (Interval(*(np.asarray(part[at]) for part in both)) for at in range(2))
    return region, picture


# --- figures ---------------------------------------------------------------------------------------------------------


def words_figure(model: VisionLanguageModel, found: Orderings, at: int) -> Figure:
    """Figure 1: what each token says alone, with its probability in per cent; thick outline: at least `SURE`."""
    score, prompt, low = found.scores[at], found.prompts[at], found.extreme(high=False)[at]
    words = [""] * len(prompt.grid)
    marked = np.zeros(len(prompt.grid), dtype=bool)
    for place, word, p, is_low in zip(
        score.places.tolist(), score.word.tolist(), score.probability.tolist(), low, strict=True
    ):
        words[place] = f"{model.tokens[word]} {100 * p:.0f}"
        marked[place] = is_low
    sure = score.probability.cpu().numpy() >= SURE
    marked[score.places.cpu().numpy()] = sure
    both = int((sure & low).sum())
    title = (
        f"{int(sure.sum())} of {len(sure)} tokens alone say a word with {SURE:.0%} or more; {both} low by both scores"
    )
    footer = "number: probability in % | " + figures.signature(found.model, "one picture")
    return figures.patch_figure(prompt.image, prompt.grid, words, title, marked, footer)


def two_patches(found: Orderings, at: int) -> tuple[int, int]:
    """Two rows of a picture's scored tokens for Figure 3, by the scores and what lies there, not by what comes out:
    the lowest one on an object and the highest one off any, but in the picture, by [cls] similarity (attention where
    there is no CLS)."""
    order = next(iter(found.orders.values()))[at]
    grid, covered = found.prompts[at].grid, np.zeros(len(found.prompts[at].grid), dtype=bool)
    for x, y, w, h in (entry["bbox"] for entry in found.samples[at].annotations):
        covered |= np.asarray(grid.inside((x, y, x + w, y + h)))
    places = found.scores[at].places.cpu().numpy()
    inside = covered[places]
    outside = ~inside & ~np.asarray(grid.padded)[places]
    if not outside.any() or not inside.any():
        return int(order.argmin()), int(order.argmax())
    return int(np.where(inside, order, np.inf).argmin()), int(np.where(outside, order, -np.inf).argmax())


def shifts_figure(model: VisionLanguageModel, found: Orderings, at: int) -> Figure:
    """Figure 3: two patches, their D, and by how much each word's logit falls without them."""
    from matplotlib import pyplot as plt

    rows = two_patches(found, at)
    score = found.scores[at]
    read: Readings = readings_of(model, found.prompts[at], score.places[list(rows)], found.protocol)
    divergence = score.cascade()[list(rows)].tolist()
    fig, grid = plt.subplots(2, 2, figsize=(figures.WIDTH, 5.6))
    runs = ((read.region, read.region_without, "its region"), (read.picture, read.picture_without, "the picture"))
    for row, axes_of in enumerate(grid):
        for axes, (intact, without, where) in zip(axes_of, runs, strict=True):
            ids = intact[row].topk(5).indices.cpu()
            change = (intact[row].cpu() - without[row].cpu())[ids]
            look = figures.ORDER[0] if row == 0 else figures.ORDER[1]
            axes.barh(range(5), change.tolist(), color=look, hatch="" if row == 0 else "//", edgecolor="white")
            axes.set_yticks(range(5), [model.tokens[int(i)] for i in ids])
            axes.invert_yaxis()
            axes.axvline(0, color="#555555", linewidth=1)
            axes.set_title(f"patch {int(score.places[rows[row]])}: adds to {where}", fontsize=11)
        axes_of[0].set_ylabel(f"D = {divergence[row]:.3g}")
    for axes in grid.flat:
        axes.set_xlabel("logit with minus without")
    more = "more" if divergence[0] > divergence[1] else "less"
    low, high = (int(score.places[row]) for row in rows)
    figures.headline(fig, f"Low-scored patch {low} weighs {more} than high-scored patch {high}")
    figures.sign(fig, found.model, "one picture")
    return fig


def orders_figure(found: Orderings, seed: int = 0) -> Figure:
    """Figure 4: top-1 probability and D along both orders; dashed: the order that the released notebook makes."""
    from matplotlib import pyplot as plt

    rhos = trends(found, seed)
    orders, one_length = found.orders, len({len(part) for part in found.attention}) == 1
    fig, grid = plt.subplots(2, len(orders), figsize=(figures.WIDTH, 5.6), sharex=True, squeeze=False)
    for column, (score, order) in enumerate(orders.items()):
        for row, value in enumerate(VALUES):
            axes, values = grid[row, column], found.values(value)
            own = mean_interval(by_rank(order, values), seed=seed)
            ranks = np.arange(1, len(own.value) + 1)
            axes.fill_between(ranks, own.low, own.high, color=figures.ORDER[0], alpha=0.2, linewidth=0)
            axes.plot(ranks, own.value, color=figures.ORDER[0], linewidth=1.6)
            if score == "attention" and one_length:
                summed = by_rank(order, values, cumulative=True).mean(0)
                axes.plot(ranks, summed, color=figures.CHANCE, linewidth=1.2, linestyle="--")
            axes.set_ylim(bottom=0)
            axes.annotate(
                f"rho {float(rhos[score, value].value) + 0.0:+.2f}",
                (0.97, 0.95),
                xycoords="axes fraction",
                ha="right",
                va="top",
            )
            if column == 0:
                axes.set_ylabel(VALUES[value])
        grid[0, column].set_title(f"by {SCORES[score]}", fontsize=11)
        grid[1, column].set_xlabel("rank, highest score first" if one_length else "rank in the smallest picture")
    flat = sum(abs(float(rho.value)) < NO_TREND for rho in rhos.values())
    figures.headline(
        fig, f"{flat or 'None'} of {len(rhos)} curves {'is' if flat < 2 else 'are'} flat (mean rho within ±{NO_TREND})"
    )
    pictures = f"n = {len(found.samples)} pictures, {sum(map(len, found.attention))} tokens"
    figures.sign(fig, found.model, f"{pictures}; dashed: the released order" if one_length else pictures)
    return fig


# --- for the page ----------------------------------------------------------------------------------------------------


def pictures_of(model: VisionLanguageModel, dataset: str, n: int, seed: int = 0) -> list[Sample]:
    """Pictures to score: drawn training pictures at the model's own size, or the first of a COCO folder."""
    if dataset != "miniworld":
        return list(readable(load(dataset, n=n, seed=seed)))
    return list(load(dataset, n=n, seed=seed, split="train", scale=max(1.0, model.canvas_side / 112)))


def told(found: Orderings, seed: int = 0) -> dict[str, str | int]:
    """What the prose says: counts, levels, mean rhos with their intervals."""
    said: dict[str, str | int] = {
        "n_scored": len(found.samples),
        "n_scored_tokens": sum(len(score.places) for score in found.scores),
        "question": found.protocol.question,
        "n_low": sum(int(part.sum()) for part in found.extreme(high=False)),
        "n_high": sum(int(part.sum()) for part in found.extreme(high=True)),
    }
    rhos = trends(found, seed)
    for score in SCORES:
        for value in VALUES:
            rho = rhos.get((score, value))
            said[f"rho_{score}_{value}"] = "not measurable (no CLS)" if rho is None else rho.texts()[0]
    for value in VALUES:
        level = mean_interval(np.array([part.mean() for part in found.values(value)]), seed=seed)
        said[f"level_{value}"] = level.texts(3)[0]
    if len({len(part) for part in found.attention}) == 1:
        summed = np.stack(found.attention).cumsum(0)
        each = [rank_correlation(a, b) for a, b in zip(summed, found.values("probability"), strict=True)]
        said["rho_summed"] = mean_interval(np.nan_to_num(np.array(each)), seed=seed).texts()[0]
    else:
        said["rho_summed"] = "not defined, as the pictures differ in their numbers of tokens and cannot be summed"
    head = mean_interval(
        np.array([float((s.probability - s.probability_full).mean()) for s in found.scores]), seed=seed
    )
    said["head_gain"] = head.texts(3)[0]
    ratio = [float(s.cascade("released").sum() / s.cascade("textbook").sum()) for s in found.scores]
    said["jsd_ratio"] = mean_interval(np.array(ratio), seed=seed).texts(2)[0]
    return said


def numbers(found: Orderings, seed: int = 0) -> dict[str, float]:
    """What the record keeps beside the claims."""
    kept = {f"rho_{score}_{value}": float(rho.value) for (score, value), rho in trends(found, seed).items()}
    return kept | {f"level_{value}": float(np.mean([part.mean() for part in found.values(value)])) for value in VALUES}
