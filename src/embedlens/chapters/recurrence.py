"""Clusters that come back in every picture: E05 to E09 of Section 2 and Appendix B, and whether C0 is the letterbox.

Clusters and their matched null are measured by `embedlens.clusters`; here are the verdicts and the figures. Ranks go by
size: C0 is the largest cluster of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from embedlens import claims, figures
from embedlens.claims import Finding
from embedlens.clusters import ClusterStudy, jaccard
from embedlens.figures import Look
from embedlens.intervals import Interval, mean_interval, pair_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PAPER_C0 = 0.3  # share of the tokens, printed by the paper for LLaVA-1.5-7B
C0_ALIKE, C0_VARIANCE = 0.98, 1e-4  # E07, printed by the paper
MOST_ALIKE, LEAST_MOST_ALIKE = 0.99, 0.95  # E06, "near 100 %"; set before the run
SMALLER_ALIKE = 0.9  # E08; set before the run
SAME = 0.9  # overlap of C0 that counts as the same cluster; set before the run
NEUTRAL = "#B8C4D6"
Studies = Mapping[tuple[float, str], ClusterStudy]  # as `cluster_study` gives them


# --- E05: one cluster larger than the others together ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Dominance:
    """How much of a picture its largest clusters hold (claim E05)."""

    n_pictures: int
    shares: Interval
    """Share of the picture's tokens, by rank."""
    of_totals: Interval
    """Share of C0 in all tokens, in ranks 0 to 4, in all clusters of two or more."""

    def table(self) -> pd.DataFrame:
        """C0 in each of the three totals."""
        import pandas as pd

        totals = ["of all tokens", "of ranks 0 to 4", "of all clusters of two or more"]
        columns = {"share of C0": self.of_totals.texts(), "above one half": self.of_totals.low > 0.5}
        return pd.DataFrame(columns, index=totals)

    def finding(self) -> Finding:
        """E05."""
        value = self.of_totals.value
        return Finding.of(
            self.of_totals.at(0),
            self.n_pictures,
            dominance_verdict(self.of_totals.low),
            f"Share of C0 in all tokens, bar one half; {value[1]:.3f} of ranks 0 to 4, {value[2]:.3f} of all clusters "
            "of two or more.",
        )

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        return {"c0_share": self.shares.at(0)}

    def numbers(self) -> dict[str, float]:
        """What the record keeps of it."""
        return {f"share_rank_{rank}": float(x) for rank, x in enumerate(self.shares.value)}


def dominance(study: ClusterStudy, ranks: int, seed: int = 0) -> Dominance:
    """Shares of the largest clusters, with bootstrap intervals over pictures."""
    shares, totals = mean_interval(study.shares[:, :ranks], seed=seed), mean_interval(study.dominance, seed=seed)
    return Dominance(len(study), shares, totals)


def dominance_verdict(lows: Float[np.ndarray, " totals"]) -> str:
    """E05, "more than all remaining clusters combined": a share of C0 above one half.

    It holds if that is so of all tokens, and in part if it is so only of a milder total.

    Args:
        lows: lower bounds of the share of C0, of all tokens first.

    >>> dominance_verdict(np.array([0.6, 0.7])), dominance_verdict(np.array([0.4, 0.7]))
    ('holds', 'partly')
    """
    return claims.HOLDS if lows[0] > 0.5 else claims.PARTLY if (lows[1:] > 0.5).any() else claims.FAILS


def shares_figure(found: Dominance, model: str) -> Figure:
    """Share of the tokens by rank, with what the paper prints for C0."""
    from matplotlib import pyplot as plt

    shares, ranks = found.shares, len(found.shares.value)
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 3.8))
    spread = figures.reach(shares)
    axes.bar(range(ranks), shares.value, yerr=spread, color=figures.ORDER[0], capsize=4, ecolor="#333333")
    figures.paper_line(axes, PAPER_C0, "paper (7B), C0", ranks - 0.5, ha="right")
    for rank, value in enumerate(shares.value):
        axes.annotate(f"{value:.0%}", (rank, shares.high[rank]), (0, 5), textcoords="offset points", ha="center")
    axes.set_ylim(0, max(0.36, 1.15 * float(shares.high.max())))
    axes.set_xlabel("cluster, by rank of size (0 = largest)")
    axes.set_ylabel("share of the picture's tokens")
    axes.set_title(f"The largest cluster holds {shares.value[0]:.0%} of the visual tokens")
    figures.sign(fig, model, f"n = {found.n_pictures} held-out pictures")
    return fig


# --- E06, E07, E08: the same from picture to picture -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Alike:
    """How alike clusters of one rank are across pictures, beside random token sets of the same sizes (E06 to E08)."""

    n_pictures: int
    n_pairs: int
    raw: Interval
    """Similarity by rank; see `clusters.cross_image_similarity`."""
    null: Interval
    """The same of random sets."""
    lead: Interval
    """The first less the second, paired."""
    removed: Interval
    """As `raw`, the mean of all visual tokens removed."""
    null_removed: Interval
    lead_removed: Interval
    variance: float
    """Of the similarity of C0, over pairs."""
    smaller: Interval | None
    """Mean similarity of the ranks below C0; None: no picture has a second cluster."""
    same_word: float
    """Share of the pairs whose C0 have the same nearest word."""

    @property
    def most(self) -> int:
        """The most alike rank."""
        return int(np.argmax(self.raw.value))

    @property
    def consistent(self) -> int:
        """Ranks below C0 that are alike, and more so than random sets."""
        return int(((self.raw.low > SMALLER_ALIKE) & (self.lead.low > 0))[1:].sum())

    def table(self) -> pd.DataFrame:
        """Similarity by rank, of clusters and of random sets."""
        import pandas as pd

        columns = {
            "clusters": self.raw,
            "random sets": self.null,
            "clusters, mean removed": self.removed,
            "random, removed": self.null_removed,
        }
        index = pd.RangeIndex(len(self.raw.value), name="rank")
        return pd.DataFrame({name: found.texts(3) for name, found in columns.items()}, index=index)

    def findings(self) -> dict[str, Finding]:
        """E06, E07 and E08."""
        n, most, ranks = self.n_pictures, self.most, len(self.raw.value)
        e06 = most_alike_verdict(float(self.raw.value[most]), float(self.raw.low[most]), float(self.lead.low[most]))
        e07 = c0_verdict(float(self.raw.low[0]), self.variance, float(self.lead.low[0]))
        smaller = f"Mean similarity of ranks 1 to {ranks - 1}; {self.consistent} of them are above 0.9 and above random"
        return {
            "E06": Finding.of(
                self.raw.at(most),
                n,
                e06,
                f"Similarity of the most alike rank ({most}), bar 0.99; random sets of its size "
                f"{self.null.value[most]:.3f}.",
            ),
            "E07": Finding.of(
                self.raw.at(0),
                n,
                e07,
                f"Similarity of C0, bar 0.98; variance over pairs {self.variance:.6f}; random sets "
                f"{self.null.value[0]:.3f}.",
            ),
            "E08": Finding.of(
                self.smaller,
                n,
                smaller_verdict(self.consistent),
                "No picture has a second cluster." if self.smaller is None else f"{smaller} sets.",
            ),
        }

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        return {
            "s0": self.raw.at(0),
            "lead0": self.lead.at(0),
            "lead0_removed": self.lead_removed.at(0),
            "s0_null": self.null.value[0],
            "s0_removed": self.removed.value[0],
            "s0_null_removed": self.null_removed.value[0],
            "same_word": self.same_word,
            "variance": f"{self.variance:.6f}",
            "most_alike": self.most,
            "consistent": self.consistent,
        }

    def numbers(self) -> dict[str, float]:
        """What the record keeps of it."""
        kinds = {"": self.raw, "_null": self.null, "_removed": self.removed, "_removed_null": self.null_removed}
        kept = {
            f"similarity{name}_rank_{rank}": float(x)
            for name, found in kinds.items()
            for rank, x in enumerate(found.value)
        }
        return kept | {"variance_c0": self.variance}


def alike(study: ClusterStudy, pairs: Int[np.ndarray, "pairs 2"], ranks: int, seed: int = 0) -> Alike:
    """Similarity across pictures, raw and with the mean removed; intervals draw pictures, not pairs."""

    def three(mean_removed: bool) -> list[Interval]:
        of_clusters = study.similarity(pairs, mean_removed)[:, :ranks]
        of_null = study.similarity(pairs, mean_removed, null=True)[:, :ranks]
        return [pair_interval(part, pairs, seed=seed) for part in (of_clusters, of_null, of_clusters - of_null)]

    similar = study.similarity(pairs)[:, :ranks]
    second = ~np.isnan(similar[:, 1:]).all(1)  # pairs whose first picture has a second cluster
    raw, null, lead = three(mean_removed=False)
    removed, null_removed, lead_removed = three(mean_removed=True)
    smaller = pair_interval(np.nanmean(similar[second, 1:], 1), pairs[second], seed=seed) if second.any() else None
    nearest = study.nearest[:, 0]
    return Alike(
        n_pictures=len(study),
        n_pairs=len(pairs),
        raw=raw,
        null=null,
        lead=lead,
        removed=removed,
        null_removed=null_removed,
        lead_removed=lead_removed,
        variance=float(np.nanvar(similar[:, 0])),
        smaller=smaller,
        same_word=float((nearest[pairs[:, 0]] == nearest[pairs[:, 1]]).mean()),
    )


def c0_verdict(low: float, variance: float, lead_low: float) -> str:
    """E07, "C0 has a similarity above 0.98 and a variance below 0.0001"; it must also exceed random sets.

    It does not hold if neither of the paper's two is true.

    >>> c0_verdict(0.99, 1e-5, 0.01), c0_verdict(0.99, 1e-5, -0.01), c0_verdict(0.9, 1e-2, 0.01)
    ('holds', 'partly', 'does not hold')
    """
    parts = [low > C0_ALIKE, variance < C0_VARIANCE]
    return claims.PARTLY if all(parts) and lead_low <= 0 else claims.counted(parts)


def most_alike_verdict(value: float, low: float, lead_low: float) -> str:
    """E06, "the most alike cluster has a similarity near 100 %".

    It holds if the interval lies above 0.99 and random sets are exceeded, in part if the similarity is above 0.95.

    >>> most_alike_verdict(0.995, 0.993, 0.1), most_alike_verdict(0.995, 0.993, -0.1), most_alike_verdict(0.9, 0.8, 0.1)
    ('holds', 'partly', 'does not hold')
    """
    if value <= LEAST_MOST_ALIKE:
        return claims.FAILS
    return claims.HOLDS if low > MOST_ALIKE and lead_low > 0 else claims.PARTLY


def smaller_verdict(consistent: int) -> str:
    """E08, "several smaller clusters are alike too": two or more of them; one is part of it.

    >>> [smaller_verdict(n) for n in (2, 1, 0)]
    ['holds', 'partly', 'does not hold']
    """
    return claims.HOLDS if consistent >= 2 else claims.PARTLY if consistent else claims.FAILS


def alike_figure(found: Alike, model: str) -> Figure:
    """Similarity by rank of clusters and of random sets, raw and with the mean removed."""
    from matplotlib import pyplot as plt

    fig, panels = plt.subplots(1, 2, figsize=(figures.WIDTH, 4.0), sharey=True)
    shown = (("raw", found.raw, found.null), ("mean removed", found.removed, found.null_removed))
    for axes, (name, clusters, random) in zip(panels, shown, strict=True):
        figures.layer_curve(axes, *clusters, "clusters", Look(figures.ORDER[0], "o"))
        figures.layer_curve(axes, *random, "random sets", Look(figures.CHANCE, "s", "--"))
        axes.set_title(name, fontsize=12)
        axes.set_xlabel("cluster rank (0 = largest)")
    figures.paper_line(panels[0], C0_ALIKE, "paper (7B), C0 > 0.98", len(found.raw.value) - 1, ha="right")
    lowest = float(min(found.removed.low.min(), found.null_removed.low.min()))
    panels[0].set_ylim(min(0, lowest) - 0.03, 1.06)
    panels[0].set_ylabel("similarity across pictures (cosine)")
    panels[1].legend(loc="lower left")
    more = "more" if found.lead.value[0] > 0 else "no more"
    figures.headline(fig, f"C0 is {more} alike across pictures than random tokens")
    figures.sign(fig, model, f"n = {found.n_pairs} pairs of {found.n_pictures} held-out pictures")
    return fig


# --- E09: other thresholds -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Thresholds:
    """C0 at other thresholds, and in another order of anchors, against C0 at 0.9 (claim E09)."""

    n_pictures: int
    shares: Mapping[float, Interval]
    """Threshold → share of the tokens by rank, greedy order."""
    overlaps: Mapping[tuple[float, str], Interval]
    """(threshold, order) → overlap with C0 at 0.9, greedy."""

    @property
    def of_thresholds(self) -> list[Interval]:
        """Overlaps at the other thresholds, greedy order."""
        return [found for (_, order), found in self.overlaps.items() if order == "greedy"]

    def finding(self) -> Finding:
        """E09."""
        passing = sum(bool(found.low > SAME) for found in self.of_thresholds)
        return Finding.of(
            min(self.of_thresholds, key=lambda found: float(found.value)),
            self.n_pictures,
            threshold_verdict([float(found.low) for found in self.of_thresholds]),
            f"Lower of the two overlaps of C0 with that at 0.9, bar {SAME}; {passing} of 2 thresholds pass.",
        )

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        names = {(0.95, "greedy"): "overlap_95", (0.8, "greedy"): "overlap_80", (0.9, "raster"): "overlap_raster"}
        return {names[key]: found.value for key, found in self.overlaps.items()}


def thresholds(studies: Studies, seed: int = 0) -> Thresholds:
    """Overlap (Jaccard) of the largest clusters with those at 0.9.

    Args:
        studies: of the same pictures at 0.95, 0.9 and 0.8 in greedy order, and at 0.9 in raster order.
    """
    study = studies[0.9, "greedy"]
    overlaps = {}
    for key in ((0.95, "greedy"), (0.8, "greedy"), (0.9, "raster")):
        pairs = zip(study.largest, studies[key].largest, strict=True)
        overlaps[key] = mean_interval(np.array([jaccard(*two) for two in pairs]), seed=seed)
    shares = {at: mean_interval(studies[at, "greedy"].shares, seed=seed) for at in (0.95, 0.9, 0.8)}
    return Thresholds(len(study), shares, overlaps)


def threshold_verdict(lows: Sequence[float]) -> str:
    """E09, "other thresholds give the same pattern": C0 overlaps by more than 0.9 at each; at some, it is in part so.

    >>> threshold_verdict([0.95, 0.92]), threshold_verdict([0.95, 0.5]), threshold_verdict([0.5, 0.5])
    ('holds', 'partly', 'does not hold')
    """
    return claims.counted(low > SAME for low in lows)


def thresholds_table(studies: Studies, pairs: Int[np.ndarray, "pairs 2"], seed: int = 0) -> pd.DataFrame:
    """Share and similarity of C0, and single tokens, at every threshold and order."""
    import pandas as pd

    rows = {
        f"{threshold}, {order}": {
            "share of C0": mean_interval(found.shares[:, 0], seed=seed).texts()[0],
            "similarity of C0": pair_interval(found.similarity(pairs)[:, 0], pairs, seed=seed).texts(3)[0],
            "single tokens": round(float((found.singletons / found.tokens).mean()), 3),
        }
        for (threshold, order), found in studies.items()
    }
    return pd.DataFrame(rows).T


def thresholds_figure(found: Thresholds, model: str) -> Figure:
    """Shares by rank at each threshold; how far C0 is the same tokens."""
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(figures.WIDTH, 3.9), width_ratios=(3, 2))
    for (threshold, shares), at, line in zip(found.shares.items(), (1, 0, 2), ("--", "-", ":"), strict=True):
        look = Look(figures.ORDER[at], figures.MARKERS[at], line)
        figures.layer_curve(left, *shares, f"threshold {threshold}", look)
    left.set_xlabel("cluster rank (0 = largest)")
    left.set_ylabel("share of the picture's tokens")
    left.legend()
    for at, overlap in enumerate(found.overlaps.values()):
        spread = figures.reach(overlap)[:, None]
        right.bar(at, overlap.value, yerr=spread, color=NEUTRAL, capsize=4, ecolor="#333333")
        right.annotate(f"{overlap.value:.2f}", (at, 0.05), ha="center")
    names = ["raster order" if order == "raster" else rf"$\tau$ = {at}" for at, order in found.overlaps]
    right.set_xticks(range(len(names)), names, rotation=20)
    right.axhline(SAME, color="#555555", linewidth=1, linestyle=":")
    right.set_ylim(0, 1.08)
    right.set_ylabel("overlap with C0 at 0.9")
    least = min(float(overlap.value) for overlap in found.of_thresholds)
    figures.headline(fig, f"The least overlap of C0 at other thresholds is {least:.0%}")
    figures.sign(fig, model, f"n = {found.n_pictures} held-out pictures")
    return fig


# --- is C0 the letterbox? --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Framing:
    """How much of C0 lies in letterbox bars, and what becomes of it without bars. No claim of the paper."""

    n_pictures: int
    in_bars: Interval
    """Share of C0 that lies in bars."""
    bars: Interval
    """The same of all tokens."""
    square: Interval | None
    """Share of C0 in square pictures, which have no bars; None: there is none."""
    caught: Interval | None
    """Share of the bars' tokens that C0 holds; None: no picture has bars."""
    shares: Mapping[str, Interval]
    """Way of preprocessing → share of C0."""
    change: Mapping[str, Interval]
    """The same less that of the first way, paired."""

    def table(self) -> pd.DataFrame:
        """Share of C0 by the way pictures are made square."""
        import pandas as pd

        first = next(iter(self.shares))
        columns = {
            "share of C0": [found.texts()[0] for found in self.shares.values()],
            f"less {first}": [found.texts()[0] for found in self.change.values()],
        }
        return pd.DataFrame(columns, index=list(self.shares))

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        change = float(self.change["stretch"].value)
        first = {"letterbox": "letterboxed"}.get(next(iter(self.shares)), "as the model cuts pictures itself")
        caught = None if self.caught is None else f"C0 takes {self.caught.value:.0%} of the tokens in bars."
        return {
            "in_bars": self.in_bars.value,
            "bars": self.bars.value,
            "caught_sentence": caught or "No picture has bars.",
            "stretch_share": self.shares["stretch"].value,
            "stretch_change": f"{'more' if change > 0 else 'less'} than {first}",
            "stretch_points": f"{abs(100 * change):.1f}",
        }

    def numbers(self) -> dict[str, float]:
        """What the record keeps of it."""
        kept = {f"c0_share_{way}": float(found.value) for way, found in self.shares.items()}
        return kept | {"c0_in_bars": float(self.in_bars.value), "bars": float(self.bars.value)}


def framing(framed: Mapping[str, ClusterStudy], seed: int = 0) -> Framing:
    """C0 of the same pictures, framed as the model is used to and otherwise.

    Args:
        framed: way of preprocessing → clusters of the same pictures; the model's own first.
    """
    study = next(iter(framed.values()))
    barred: Bool[np.ndarray, " pictures"] = study.bars > 0
    held = study.in_bars[barred, 0] * study.sizes[barred, 0] / (study.bars * study.tokens)[barred]
    return Framing(
        n_pictures=len(study),
        in_bars=mean_interval(study.in_bars[:, 0], seed=seed),
        bars=mean_interval(study.bars, seed=seed),
        square=mean_interval(study.shares[~barred, 0], seed=seed) if (~barred).any() else None,
        caught=mean_interval(held, seed=seed) if barred.any() else None,
        shares={way: mean_interval(found.shares[:, 0], seed=seed) for way, found in framed.items()},
        change={
            way: mean_interval(found.shares[:, 0] - study.shares[:, 0], seed=seed) for way, found in framed.items()
        },
    )


def framing_figure(found: Framing, model: str) -> Figure:
    """Share of C0 with and without bars, then how much of C0 and of all tokens lies in bars."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 3.4))
    first = next(iter(found.shares))
    lines = {f"share of C0: {first}": found.shares[first]}
    lines |= {} if found.square is None else {"square pictures only": found.square}
    lines |= {f"share of C0: {way}": share for way, share in found.shares.items() if way != first}
    lines |= {"of C0, in bars": found.in_bars, "of all tokens, in bars": found.bars}
    looks = {name: Look("#DDDDDD", "s", hatch="//") if "bars" in name else Look(NEUTRAL, "o") for name in lines}
    figures.interval_bars(axes, lines, looks, edge="#777777")
    axes.set_xlabel("share of tokens")
    axes.set_title(f"{found.in_bars.value:.0%} of C0 lies in bars")
    figures.sign(fig, model, f"n = {found.n_pictures} held-out pictures")
    return fig
