"""Are the words on visual tokens hubs of the vocabulary? Their counts beside directions that hold no picture.

Counting is `embedlens.hubs`; here are the comparison, its figure and its table (Section 3.2, a control of ours).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from embedlens import figures
from embedlens.hubs import Hubness, coverage, hubs
from embedlens.intervals import Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SHORT = {"tokens": "visual tokens", "matched": "matched directions", "random": "random directions"}


@dataclass(frozen=True, eq=False)
class HubWords:
    """Answers of a lens on visual tokens, matched and random directions. Keys of mappings: the values of SHORT."""

    counted: Hubness
    entries: tuple[str, ...]
    """The vocabulary, readable."""
    skewed: Mapping[str, Interval]
    """Skewness of the counts over the vocabulary."""
    on_hubs: Mapping[str, Interval]
    """Share of the answers that are hubs of the matched directions."""
    matched_hubs: Bool[np.ndarray, " V"]

    @property
    def answers(self) -> dict[str, Int[np.ndarray, "groups V"]]:
        """How often each entry is among the nearest."""
        counted = (self.counted.tokens, self.counted.matched, self.counted.random)
        return dict(zip(SHORT.values(), counted, strict=True))

    @property
    def half(self) -> dict[str, int]:
        """How many of the most frequent entries give half of the answers."""
        return {name: int((coverage(counts.sum(0)) < 0.5).sum()) + 1 for name, counts in self.answers.items()}

    def table(self, most: int = 8) -> pd.DataFrame:
        """The entries that visual tokens name most often, and the share of vectors of each kind that name them."""
        import pandas as pd

        often = np.argsort(-self.counted.tokens.sum(0), kind="stable")[:most]
        shares = {name: n[:, often].sum(0) * self.counted.k / n.sum() for name, n in self.answers.items()}
        table = pd.DataFrame(shares, index=pd.Index([self.entries[i] for i in often], name="entry"))
        table["hub of matched directions"] = np.where(self.matched_hubs[often], "yes", "no")
        return table.round(3)

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        told: dict[str, Any] = {"half_tokens": self.half["visual tokens"], "n_hubs": int(self.matched_hubs.sum())}
        for short, name in SHORT.items():
            whole = short == "tokens"
            told[f"skew_{short}"] = self.skewed[name] if whole else self.skewed[name].value
            told[f"{short}_on_hubs"] = self.on_hubs[name] if whole else self.on_hubs[name].value
        return told

    def numbers(self) -> dict[str, float]:
        """What the record keeps of it."""
        kept = {f"skewness_of_{name.replace(' ', '_')}": float(found.value) for name, found in self.skewed.items()}
        return kept | {f"{name.replace(' ', '_')}_on_hubs": float(found.value) for name, found in self.on_hubs.items()}


def hub_words(counted: Hubness, entries: tuple[str, ...], seed: int = 0) -> HubWords:
    """Summarise the counts of `hubs.hubness`.

    Args:
        entries: the vocabulary, readable.
        seed: of the bootstrap over pictures.
    """
    found = hubs(counted.matched.sum(0))
    return HubWords(counted, entries, counted.skewness(seed=seed), counted.share_on(found, seed=seed), found)


def coverage_figure(found: HubWords, n_pictures: int, model: str) -> Figure:
    """Share of all answers that the most frequent entries give together."""
    from matplotlib import pyplot as plt

    lines = ("-", "--", ":")
    colours = (figures.LENSES["EmbedLens"].colour, figures.ORDER[1], figures.CHANCE)
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.0))
    for (name, counts), line, colour in zip(found.answers.items(), lines, colours, strict=True):
        share = coverage(counts.sum(0))
        label = f"{name}: {found.half[name]} for half"
        axes.plot(np.arange(1, len(share) + 1), share, line, color=colour, label=label)
    axes.axhline(0.5, color="#B0B0B0", linewidth=1.0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(0, 1.45)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_xlabel("most frequent vocabulary entries taken together")
    axes.set_ylabel("share of all answers")
    half = found.half["visual tokens"]
    axes.set_title(f"{half} of {len(found.entries)} entries give half of the answers on tokens")
    axes.legend(loc="upper left")
    words = f"top {found.counted.k}, {found.counted.n} tokens of {n_pictures} pictures"
    figures.sign(fig, model, f"EmbedLens, layer 0, {words}")
    return fig
