"""How many visual tokens name the object they lie in: shares by layer, against chance and the paper (Section 6.2).

A token is an *object token* if its patch centre lies in an object's box, and *grounded* if its nearest words hold the
label of an object it lies in. Counting is `embedlens.labels`; here are the two claims about it, E40 and E41.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from embedlens import claims, figures
from embedlens.claims import Finding
from embedlens.intervals import Interval, ratio_interval
from embedlens.labels import LabelHits
from embedlens.norms import of_means

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PEAK = 0.07  # of all tokens, at the peak; printed by the paper for LLaVA-1.5-7B
INPUT, SETTLED = 0.02, 0.10  # of the object tokens, at the input and after layer 7; printed by the paper


@dataclass(frozen=True, eq=False)
class Grounding:
    """Shares of grounded tokens by layer, with what the claims E40 and E41 need of them."""

    settled: int
    """Layer from which on the share is said to stay; layer 0 is the input."""
    n_pictures: int
    n_object_tokens: int
    rate: Interval
    """Grounded share of the object tokens, by layer."""
    of_all: Interval
    """Grounded share of all visual tokens, by layer."""
    chance: Float[np.ndarray, " layers"]
    """`rate`, if each object token had the label of an object token drawn at random."""
    plateau: Interval
    """Mean of `rate` from layer `settled` on."""
    rise: Interval
    """`plateau` less the share at the input."""
    doubled: Interval
    """`plateau` less twice the share at the input."""
    peak: Interval
    """Largest share of all tokens, found anew in each resample."""
    in_objects: Interval
    """Share of all tokens that are object tokens."""

    @property
    def top(self) -> int:
        """Layer with the largest share of all tokens."""
        return int(self.of_all.value.argmax())

    @property
    def accident(self) -> float:
        """Share of all tokens that would be grounded by chance at the layer `top`."""
        return float(self.chance[self.top] * self.in_objects.value)

    @property
    def best_after_input(self) -> int:
        """Layer after the input at which the share of object tokens, less chance, is largest."""
        return 1 + int((self.rate.value - self.chance)[1:].argmax())

    def findings(self) -> dict[str, Finding]:
        """E40 and E41."""
        last = len(self.chance) - 1
        rise = rise_verdict(
            float(self.rise.value),
            float(self.doubled.low),
            self.rate.value[self.settled :],
            float(self.plateau.low),
            float(self.chance[self.settled :].mean()),
        )
        peak = peak_verdict(
            float(self.peak.low), float(self.peak.high), float(self.of_all.low[self.top]), self.accident
        )
        return {
            "E40": Finding.of(
                self.rise,
                self.n_pictures,
                rise,
                f"Rise of the grounded share of object tokens from {self.rate.value[0]:.3f} at the input to "
                f"{self.plateau.value:.3f}, the mean of layers {self.settled} to {last}; chance is "
                f"{self.chance[0]:.3f} and {self.chance[self.settled :].mean():.3f}.",
            ),
            "E41": Finding.of(
                self.peak,
                self.n_pictures,
                peak,
                f"Largest grounded share of all tokens, at layer {self.top}; chance there is {self.accident:.3f}, and "
                f"{self.in_objects.value:.3f} of all tokens lie in an object.",
            ),
        }

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        return {
            "rate_first": self.rate.at(0),
            "plateau": self.plateau,
            "rise": self.rise,
            "peak": self.peak,
            "chance_first": self.chance[0],
            "rate_best": self.rate.value.max(),
            "rate_best_at": int(self.rate.value.argmax()),
            "above_chance": int((self.rate.low > self.chance).sum()),
            "peak_at": self.top,
            "accident": self.accident,
            "in_objects": self.in_objects.value,
            "best_layer": self.best_after_input,
        }

    def numbers(self) -> dict[str, float]:
        """What the record keeps of it."""
        columns = {
            "grounded_share_layer": self.rate.value,
            "grounded_share_of_all_layer": self.of_all.value,
            "token_chance_layer": self.chance,
        }
        kept = {f"{name}_{at}": float(x) for name, values in columns.items() for at, x in enumerate(values)}
        return kept | {"plateau": float(self.plateau.value)}


def grounding(hits: LabelHits, settled: int, seed: int = 0) -> Grounding:
    """Shares of grounded tokens, with bootstrap intervals over pictures.

    Args:
        hits: of one lens, k and rule, as `label_hits` gives them.
        settled: layer from which on the share is said to stay.
        seed: of the bootstrap.

    Raises:
        EmbedLensError: no token lies in an object.
    """
    grounded = hits.grounded.T
    late = grounded[:, settled:].mean(1)
    return Grounding(
        settled=settled,
        n_pictures=len(hits.tokens),
        n_object_tokens=int(hits.object_tokens.sum()),
        rate=hits.token_rate(seed=seed),
        of_all=hits.token_rate("all tokens", seed=seed),
        chance=hits.token_chance(),
        plateau=ratio_interval(late, hits.object_tokens, seed=seed),
        rise=ratio_interval(late - grounded[:, 0], hits.object_tokens, seed=seed),
        doubled=ratio_interval(late - 2 * grounded[:, 0], hits.object_tokens, seed=seed),
        peak=of_means(lambda hit, of: (hit / of[:, None]).max(-1), grounded, hits.tokens, seed=seed),
        in_objects=ratio_interval(hits.object_tokens, hits.tokens, seed=seed),
    )


def rise_verdict(
    rise: float, doubled_low: float, late: Float[np.ndarray, " layers"], plateau_low: float, chance: float
) -> str:
    """E40, "the share rises quickly and then stays".

    It does not hold without a rise. It holds if the plateau is more than twice the share at the input and above
    chance, and its layers stay within a factor of two of one another; else it holds in part.

    Args:
        rise: plateau less the share at the input.
        doubled_low: lower bound of the plateau less twice that share.
        late: shares of the layers of the plateau.
        plateau_low: lower bound of their mean.
        chance: what that mean would be by chance.

    >>> rise_verdict(0.08, 0.05, np.array([0.1, 0.1]), 0.09, 0.01)
    'holds'
    """
    if rise <= 0:
        return claims.FAILS
    stays = late.min() >= late.max() / 2
    return claims.HOLDS if doubled_low > 0 and stays and plateau_low > chance else claims.PARTLY


def peak_verdict(low: float, high: float, share_low: float, accident: float, bar: float = PEAK) -> str:
    """E41, "fewer than 7 % of all tokens have a label, even at the peak".

    A lens that finds nothing passes that test too, so a peak that is not above chance holds in part only.

    Args:
        low, high: interval of the peak.
        share_low: lower bound of the share at the layer of the peak.
        accident: that share by chance.

    >>> peak_verdict(0.05, 0.06, 0.05, 0.01), peak_verdict(0.05, 0.06, 0.05, 0.05)
    ('holds', 'partly')
    """
    verdict = claims.judged(-high, -low, -bar)
    return claims.PARTLY if verdict == claims.HOLDS and share_low <= accident else verdict


def grounding_figure(found: Grounding, model: str) -> Figure:
    """Shares by layer of object tokens and of all tokens, with chance and what the paper prints."""
    from matplotlib import pyplot as plt

    last = len(found.chance) - 1
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.4))
    figures.layer_curve(axes, *found.rate, "object tokens", figures.LENSES["EmbedLens"])
    figures.layer_curve(axes, *found.of_all, "all tokens", figures.Look("#5C7FB8", "s", "--"))
    figures.chance_curve(axes, found.chance, "chance, objects")
    line: dict[str, Any] = {"color": figures.FACT, "linestyle": "--", "linewidth": 1.0}
    axes.plot([-0.3, 0.3], [INPUT, INPUT], **line)
    axes.plot([found.settled, last], [SETTLED, SETTLED], **line)
    axes.plot([0, last], [PEAK, PEAK], **line | {"linestyle": ":"})
    said: dict[str, Any] = {"color": figures.FACT, "fontsize": 9}
    axes.annotate("paper (7B), objects: 2 % at layer 0, then 10 %", (found.settled, SETTLED + 0.004), **said)
    axes.annotate("paper (7B), all tokens: below 7 %", (found.settled, PEAK + 0.004), **said)
    axes.set_ylim(0, max(0.125, 1.15 * float(found.rate.high.max())))
    figures.percent_axis(axes.yaxis)
    axes.set_ylabel("tokens that name their object")
    axes.set_title(f"At most {found.rate.value.max():.0%} of the object tokens name their object")
    figures.label_ends(axes)
    figures.sign(fig, model, f"n = {found.n_object_tokens} object tokens of {found.n_pictures} held-out pictures")
    return fig


def counting_table(hits: Mapping[tuple[str, int, str], LabelHits], settled: int, seed: int = 0) -> pd.DataFrame:
    """How the share of grounded object tokens depends on what counts as a label, and on how many words count."""
    import pandas as pd

    rows = []
    for (_, k, rule), found in hits.items():
        late = ratio_interval(found.grounded.T[:, settled:].mean(1), found.object_tokens, seed=seed)
        rows.append(
            {
                "rule": rule,
                "k": k,
                "labels": len(found.labels),
                "object tokens": int(found.object_tokens.sum()),
                "input": found.token_rate(seed=seed).texts(3)[0],
                "chance at input": round(float(found.token_chance()[0]), 3),
                f"layers {settled} to {len(found.grounded) - 1}": late.texts(3)[0],
            }
        )
    return pd.DataFrame(rows).set_index(["rule", "k"]).sort_index()
