"""The claims about how long visual tokens are (Section 6.2): longer than text, hardly turned, short ones turned more.

Measured by `embedlens.norms`; here are the verdicts E42 to E45 and E60, and their figures. A *turn* is the cosine
between what enters a block and what leaves it: 1 is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from embedlens import claims, figures, norms, tasks
from embedlens.claims import Finding
from embedlens.figures import Look
from embedlens.intervals import Interval, mean_interval, ratio_interval
from embedlens.labels import LabelHits
from embedlens.norms import Course, FirstBlock

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from embedlens.vlm import VisionLanguageModel

VISUAL, TEXT = Look(figures.ORDER[4], "v"), figures.GROUPS["text"]
STILL = 0.9  # cosine of a block that does little, a turn of 26 degrees; set before the run
KINDS = ("object", "colour", "existence")  # what is asked of a model whose visual tokens are scaled
Courses = Mapping[tuple[float, str], Course]  # as `norms.courses` gives them


# --- E42: longer than text -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Longer:
    """Norms of visual and of text positions, layer by layer (claim E42)."""

    n_pictures: int
    visual: Interval
    """Mean L2 norm by layer; layer 0 is the input."""
    text: Interval
    ratio: Interval
    """Visual over text, of the means, by layer."""
    above: Interval
    """Share of the layers at which visual tokens are longer; 0-d."""

    @property
    def n_above(self) -> int:
        """Layers at which the interval of the ratio lies above 1."""
        return int((self.ratio.low > 1).sum())

    def finding(self) -> Finding:
        """E42."""
        ratio = self.ratio.value
        return Finding.of(
            self.above,
            self.n_pictures,
            longer_verdict(float(self.above.low), float(self.above.high)),
            f"Share of the layers at which visual tokens are longer; visual over text norm is {ratio[0]:.3g} at the "
            f"input, {ratio.min():.3g} at the least (layer {int(ratio.argmin())}) and {ratio[-1]:.3g} at the end.",
        )

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        return {
            "ratio_first": self.ratio.at(0),
            "ratio_last": self.ratio.at(-1),
            "n_above": self.n_above,
            "text_growth": self.text.value[1] / self.text.value[0],
            "visual_growth": self.visual.value[1] / self.visual.value[0],
        }


def longer(course: Courses, seed: int = 0) -> Longer:
    """Norms of the unscaled course, with bootstrap intervals over pictures."""
    visual, text = course[1.0, "visual"].norms, course[1.0, "text"].norms
    return Longer(
        n_pictures=len(visual),
        visual=mean_interval(visual, seed=seed),
        text=mean_interval(text, seed=seed),
        ratio=norms.of_means(lambda v, t: v / t, visual, text, seed=seed),
        above=norms.of_means(lambda v, t: (v > t).mean(-1), visual, text, seed=seed),
    )


def longer_verdict(low: float, high: float) -> str:
    """E42, "consistently longer": at every layer; it does not hold if at no more than half of them.

    Args:
        low, high: interval of the share of the layers at which visual tokens are longer.

    >>> longer_verdict(1.0, 1.0), longer_verdict(0.8, 1.0), longer_verdict(0.2, 0.5)
    ('holds', 'partly', 'does not hold')
    """
    return claims.HOLDS if low == 1 else claims.FAILS if high <= 0.5 else claims.PARTLY


def course_figure(course: Courses, scale: float, shallow: int, title: str, model: str, seed: int = 0) -> Figure:
    """Norms by layer above, turns by block below, visual tokens beside text, the shallow blocks shaded."""
    from matplotlib import pyplot as plt

    fig, (upper, lower) = plt.subplots(2, 1, figsize=(figures.WIDTH, 6.4))
    for name, look in (("visual", VISUAL), ("text", TEXT)):
        figures.layer_curve(upper, *mean_interval(course[scale, name].norms, seed=seed), name, look)
        figures.layer_curve(lower, *mean_interval(course[scale, name].steps, seed=seed), name, look)
    upper.set_yscale("log")
    upper.set_ylabel("mean L2 norm")
    upper.set_title(title)
    upper.legend(loc="lower right")
    lower.axvspan(-0.3, shallow - 0.5, color=figures.SHADE, zorder=0)
    lower.set_ylim(min(-0.05, lower.get_ylim()[0]), 1.02)
    lower.set_xlabel("block l (0 = the first); shallow ones shaded")
    lower.set_ylabel(r"cos($h_l$, $h_{l+1}$)")
    figures.label_ends(lower)
    figures.sign(fig, model, f"n = {len(course[scale, 'visual'].norms)} held-out pictures")
    return fig


# --- E60: hardly turned by shallow blocks ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Turning:
    """How far blocks turn visual tokens, and what becomes of their nearest words meanwhile (claim E60)."""

    shallow: int
    n_pictures: int
    steps: Interval
    """cos(h_l, h_l+1) of visual tokens, by block."""
    centred: Interval
    """The same, the mean of the picture's visual tokens taken out."""
    text: Interval
    renamed: Interval
    """Share of visual tokens whose nearest word becomes another one, by block."""
    gains: Interval
    """What the grounded share of object tokens gains, by block."""
    still: Interval
    """Mean of `steps` over the shallow blocks; 0-d."""
    than_text: Interval
    """`still` less that of text, paired."""
    early_text: float
    early_names: Interval
    early_gain: Interval
    later_gain: Interval
    from_input: Interval
    """cos(h_0, h_l), by layer."""

    def table(self) -> pd.DataFrame:
        """By block: turns, names that change, grounded share that is gained."""
        import pandas as pd

        columns = {
            "cosine, visual": self.steps.texts(),
            "mean taken out": self.centred.texts(),
            "cosine, text": self.text.texts(),
            "nearest word changes": self.renamed.texts(),
            "grounded share gains": self.gains.texts(3),
        }
        return pd.DataFrame(columns, index=pd.RangeIndex(len(self.steps.value), name="block"))

    def finding(self) -> Finding:
        """E60."""
        verdict = still_verdict(
            float(self.still.low), float(self.still.high), self.steps.low[: self.shallow], float(self.than_text.low)
        )
        return Finding.of(
            self.still,
            self.n_pictures,
            verdict,
            f"Mean cos(h_l, h_l+1) of visual tokens over the first {self.shallow} blocks; {self.early_text:.3f} for "
            f"text, {self.centred.value[: self.shallow].mean():.3f} for visual tokens less their mean.",
        )

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        return {
            "still": self.still,
            "still_degrees": float(np.degrees(np.arccos(np.clip(self.still.value, -1, 1)))),
            "still_text": self.early_text,
            "still_centred": self.centred.value[: self.shallow].mean(),
            "early_names": self.early_names,
            "early_gain": self.early_gain,
            "later_gain": self.later_gain,
            "left_last": self.from_input.value[-1],
        }


def turning(
    course: Courses, renamed: Float[np.ndarray, "pictures blocks"], hits: LabelHits, shallow: int, seed: int = 0
) -> Turning:
    """Turns of the unscaled course beside what else changes in each block.

    Args:
        renamed: from `norms.renamed`, of the same pictures.
        hits: from `label_hits`, of the same pictures.
        shallow: how many of the first blocks count as shallow.
    """
    visual, text, grounded = course[1.0, "visual"], course[1.0, "text"], hits.grounded.T
    early, early_text = visual.steps[:, :shallow].mean(1), text.steps[:, :shallow].mean(1)
    asked = hits.object_tokens
    return Turning(
        shallow=shallow,
        n_pictures=len(early),
        steps=mean_interval(visual.steps, seed=seed),
        centred=mean_interval(visual.centred, seed=seed),
        text=mean_interval(text.steps, seed=seed),
        renamed=mean_interval(renamed, seed=seed),
        gains=ratio_interval(np.diff(grounded, axis=1), asked, seed=seed),
        still=mean_interval(early, seed=seed),
        than_text=mean_interval(early - early_text, seed=seed),
        early_text=float(early_text.mean()),
        early_names=mean_interval(renamed[:, :shallow].mean(1), seed=seed),
        early_gain=ratio_interval(grounded[:, shallow] - grounded[:, 0], asked, seed=seed),
        later_gain=ratio_interval(grounded[:, -1] - grounded[:, shallow], asked, seed=seed),
        from_input=mean_interval(visual.from_input, seed=seed),
    )


def still_verdict(
    low: float, high: float, blocks_low: Float[np.ndarray, " shallow"], than_text_low: float, bar: float = STILL
) -> str:
    """E60, "shallow blocks transform visual tokens little".

    It holds if the cosine is above the bar in the mean and in every shallow block, and above that of text. It does
    not hold if the whole interval of the mean lies at the bar or below; else it holds in part.

    Args:
        low, high: interval of the mean over the shallow blocks.
        blocks_low: lower bound in each of them.
        than_text_low: lower bound of the mean less that of text.

    >>> still_verdict(0.92, 0.94, np.array([0.91, 0.93]), 0.1), still_verdict(0.92, 0.94, np.array([0.8, 0.99]), 0.1)
    ('holds', 'partly')
    """
    verdict = claims.judged(low, high, bar)
    everywhere = blocks_low.min() > bar and than_text_low > 0
    return claims.PARTLY if verdict == claims.HOLDS and not everywhere else verdict


# --- E43: scaled down, turned as text is -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shrinking:
    """Turns of visual tokens in shallow blocks, as they are and scaled down (claim E43)."""

    scale: float
    shallow: int
    n_pictures: int
    plain: float
    shrunk: float
    shrunk_text: float
    drop: Interval
    """Fall of the mean cosine, paired."""
    nearer: Interval
    """By how much the distance to the cosine of text shrinks, mean over the blocks."""

    @property
    def turned(self) -> str:
        """ "more" or "less", as the shallow blocks turn the scaled tokens."""
        return "more" if self.drop.value > 0 else "less"

    def finding(self) -> Finding:
        """E43."""
        return Finding.of(
            self.drop,
            self.n_pictures,
            shrinking_verdict(float(self.drop.low), float(self.drop.high), float(self.nearer.low)),
            f"Fall of the cosine of visual tokens at x {self.scale:g}, mean of the first {self.shallow} blocks, from "
            f"{self.plain:.3f} to {self.shrunk:.3f}; text has {self.shrunk_text:.3f}.",
        )

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        return {
            "small": f"{self.scale:g}",
            "more_or_less": self.turned,
            "plain": self.plain,
            "shrunk": self.shrunk,
            "drop": self.drop,
            "nearer": self.nearer,
        }


def shrinking(course: Courses, scale: float, shallow: int, seed: int = 0) -> Shrinking:
    """Turns in the shallow blocks at one factor against those of the tokens as they are."""
    plain, text = (course[1.0, name].steps[:, :shallow] for name in ("visual", "text"))
    shrunk, shrunk_text = (course[scale, name].steps[:, :shallow] for name in ("visual", "text"))

    def closer(p: np.ndarray, s: np.ndarray, tp: np.ndarray, ts: np.ndarray) -> np.ndarray:
        return (np.abs(p - tp) - np.abs(s - ts)).mean(-1)

    return Shrinking(
        scale=scale,
        shallow=shallow,
        n_pictures=len(plain),
        plain=float(plain.mean()),
        shrunk=float(shrunk.mean()),
        shrunk_text=float(shrunk_text.mean()),
        drop=mean_interval((plain - shrunk).mean(1), seed=seed),
        nearer=norms.of_means(closer, plain, shrunk, text, shrunk_text, seed=seed),
    )


def shrinking_verdict(drop_low: float, drop_high: float, nearer_low: float) -> str:
    """E43, "scaled down, they are transformed as text is": the cosine falls *and* comes nearer to that of text.

    >>> shrinking_verdict(0.1, 0.2, 0.1), shrinking_verdict(0.1, 0.2, -0.1), shrinking_verdict(-0.2, -0.1, 0.1)
    ('holds', 'partly', 'does not hold')
    """
    verdict = claims.judged(drop_low, drop_high)
    return claims.PARTLY if verdict == claims.HOLDS and nearer_low <= 0 else verdict


def scales_figure(course: Courses, scales: Sequence[float], model: str, seed: int = 0) -> Figure:
    """Turns by block at every factor, beside text."""
    from matplotlib import pyplot as plt
    from matplotlib.colors import to_hex

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.2))
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(scales)))
    for scale, shade, marker in zip(scales, shades, figures.MARKERS, strict=False):
        found = mean_interval(course[scale, "visual"].steps, seed=seed)
        figures.layer_curve(axes, *found, f"visual x {scale:g}", Look(to_hex(shade), marker))
    text = mean_interval(course[1.0, "text"].steps, seed=seed)
    figures.layer_curve(axes, *text, "text", Look(TEXT.colour, TEXT.marker, ":"))
    axes.set_xlabel("block l (0 = the first)")
    axes.set_ylabel(r"cos($h_l$, $h_{l+1}$)")
    first, last = (float(course[scale, "visual"].steps[:, 0].mean()) for scale in (scales[0], scales[-1]))
    axes.set_title(f"First block: cosine {first:.2f} as it is, {last:.2f} scaled by {scales[-1]:g}")
    axes.legend(loc="lower right", fontsize=10)
    figures.sign(fig, model, f"n = {len(course[1.0, 'visual'].steps)} held-out pictures")
    return fig


@dataclass(frozen=True, eq=False)
class Arithmetic:
    """The first block at every factor: what is measured, and what the unscaled update would give."""

    scales: tuple[float, ...]
    n_pictures: int
    measured: Interval
    frozen: Interval
    attention_moved: Interval
    mlp_moved: Interval
    gap: Interval
    """Measured less predicted at the last factor, paired; 0-d."""

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        return {
            "attention_moved": self.attention_moved.at(-1),
            "mlp_moved": self.mlp_moved.value[-1],
            "n_few": self.n_pictures,
            "measured_small": self.measured.value[-1],
            "frozen_small": self.frozen.value[-1],
            "block_gap": self.gap,
        }


def arithmetic(block: FirstBlock, seed: int = 0) -> Arithmetic:
    """Intervals over pictures of what `norms.first_block` measured."""
    return Arithmetic(
        scales=block.scales,
        n_pictures=len(block.steps),
        measured=mean_interval(block.steps, seed=seed),
        frozen=mean_interval(block.frozen, seed=seed),
        attention_moved=mean_interval(block.attention_moved, seed=seed),
        mlp_moved=mean_interval(block.mlp_moved, seed=seed),
        gap=mean_interval(block.steps[:, -1] - block.frozen[:, -1], seed=seed),
    )


def arithmetic_figure(found: Arithmetic, text: float, model: str) -> Figure:
    """Turns in the first block by factor: measured, by arithmetic alone, and the level of text.

    Args:
        text: mean cosine of text across the first block, unscaled.
    """
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.0))
    _factor_curve(axes, found.scales, found.measured, "measured", VISUAL)
    _factor_curve(axes, found.scales, found.frozen, "arithmetic alone", Look(figures.CHANCE, "X", "--"))
    axes.axhline(text, color=TEXT.colour, linewidth=1.2, linestyle=":", label="text, unscaled")
    axes.set_xscale("log")
    axes.set_xticks(found.scales, [f"{scale:g}" for scale in found.scales])
    axes.invert_xaxis()
    axes.set_xlabel("factor on the projected visual tokens")
    axes.set_ylabel("cosine across the first block")
    measured, frozen = found.measured.value[-1], found.frozen.value[-1]
    axes.set_title(f"At x {found.scales[-1]:g}: {measured:.2f} measured, {frozen:.2f} by arithmetic alone")
    axes.legend(loc="upper right")
    figures.sign(fig, model, f"n = {found.n_pictures} held-out pictures")
    return fig


# --- E44: does the model see worse? ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sight:
    """Right answers with the visual tokens scaled, and about another picture (claim E44)."""

    scales: tuple[float, ...]
    correct: Mapping[str, Float[np.ndarray, "questions scales"]]
    """Kind of question → 1 where it is answered rightly."""
    blind: Mapping[str, Float[np.ndarray, " questions"]]
    """The same questions about the picture of another question, unscaled."""
    seed: int

    @property
    def everything(self) -> Float[np.ndarray, "questions scales"]:
        """All kinds, one below the other."""
        return np.concatenate(list(self.correct.values()))

    @property
    def lost(self) -> Interval:
        """Right answers lost against the first factor, paired by question, by factor."""
        return mean_interval(self.everything[:, :1] - self.everything, seed=self.seed)

    def finding(self) -> Finding:
        """E44."""
        asked, blind, lost = self.everything, np.concatenate(list(self.blind.values())), self.lost.at(-1)
        sees = mean_interval(asked[:, 0] - blind, seed=self.seed)
        verdict = sight_verdict(float(lost.low), float(lost.high), float(sees.low))
        untold = ", so the unscaled model shows no sight that could be lost."
        return Finding.of(
            lost,
            len(asked),
            verdict,
            f"Loss of correct answers at x {self.scales[-1]:g}, paired by question: from {asked[:, 0].mean():.3f} to "
            f"{asked[:, -1].mean():.3f}; about another picture {blind.mean():.3f} are right"
            + (untold if verdict == claims.UNTESTABLE else "."),
        )

    def table(self) -> pd.DataFrame:
        """By factor: right answers of all kinds, what is lost, and each kind."""
        import pandas as pd

        columns = {"correct": mean_interval(self.everything, seed=self.seed), "lost against x 1": self.lost}
        columns |= {kind: mean_interval(found, seed=self.seed) for kind, found in self.correct.items()}
        factors = pd.Index([f"x {scale:g}" for scale in self.scales], name="factor")
        return pd.DataFrame({name: found.texts() for name, found in columns.items()}, index=factors)

    def told(self, mild: float = 0.3) -> dict[str, Any]:
        """What the prose says of it; `mild` is one of the factors."""
        asked = self.everything
        return {
            "n_questions": len(asked),
            "correct_plain": asked[:, 0].mean(),
            "correct_small": asked[:, -1].mean(),
            "correct_blind": np.concatenate(list(self.blind.values())).mean(),
            "loss": self.lost.at(-1),
            "loss_mild": self.lost.at(self.scales.index(mild)),
        }


def sight(
    model: VisionLanguageModel, n: int, scales: Sequence[float], seed: int = 0, kinds: Sequence[str] = KINDS
) -> Sight:
    """Ask the same questions with the visual tokens scaled by each factor, and about another picture.

    Args:
        n: questions of each kind.
        scales: factors, the first one 1.
    """
    items = {kind: tasks.questions(kind, n, seed) for kind in kinds}
    correct = {kind: norms.correct_at(model, asked, scales) for kind, asked in items.items()}
    blind = {kind: tasks.evaluate(model, a, swap=n > 1)["correct"].to_numpy(float) for kind, a in items.items()}
    return Sight(tuple(scales), correct, blind, seed)


def sight_verdict(loss_low: float, loss_high: float, sees_low: float) -> str:
    """E44, "scaling degrades what the model sees"; not testable where it sees nothing unscaled.

    Args:
        loss_low, loss_high: interval of the right answers that scaling costs.
        sees_low: lower bound of the right answers, unscaled, less those about another picture.

    >>> sight_verdict(0.1, 0.3, 0.2), sight_verdict(0.1, 0.3, -0.1)
    ('holds', 'not testable here')
    """
    return claims.judged(loss_low, loss_high) if sees_low > 0 else claims.UNTESTABLE


def sight_figure(found: Sight, model: str) -> Figure:
    """Right answers of each kind by factor; at the right the same questions about another picture."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.2))
    small = found.scales[-1]
    for number, (kind, correct) in enumerate(found.correct.items()):
        look = Look(figures.ORDER[4:][number], figures.MARKERS[number])
        _factor_curve(axes, found.scales, mean_interval(correct, seed=found.seed), kind, look, 0.15)
        other = mean_interval(found.blind[kind], seed=found.seed)
        figures.dots(axes, np.array([0.4 * small * 0.85**number]), [other], look, face="white")
    axes.set_xscale("log")
    axes.minorticks_off()
    factors = [f"{scale:g}" for scale in found.scales]
    axes.set_xticks([*found.scales, 0.34 * small], [*factors, "another\npicture, x 1"])
    axes.invert_xaxis()
    axes.set_ylim(-0.03, 1.2)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_xlabel("factor on the projected visual tokens")
    axes.set_ylabel("questions answered correctly")
    asked = found.everything
    axes.set_title(f"Scaled by {small:g}: {asked[:, 0].mean():.0%} correct become {asked[:, -1].mean():.0%}")
    axes.legend(loc="upper right", ncols=3, fontsize=10)
    figures.sign(fig, model, f"n = {len(asked) // len(found.correct)} held-out questions of each kind")
    return fig


# --- E45: the layer whose text is as long -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Match:
    """The layer whose text is as long as visual tokens are at the input (claim E45)."""

    n_layers: int
    n_pictures: int
    layer: int
    low: int
    high: int
    """Bounds of the layer over resamples of the pictures."""
    drawn: Int[np.ndarray, " resamples"]
    """The layer in each resample."""
    enter: Interval
    """Mean norm of visual tokens at the input; 0-d."""
    text: Interval
    """Mean norm of text, by layer."""
    off: Interval
    """Text at the matching layer over visual tokens at the input; 0-d."""
    worth: float
    """Share of norms drawn at random that would match a middle layer."""

    @property
    def inside(self) -> float:
        """Share of the resamples that match in the middle half of the layers."""
        return float(norms.in_the_middle(self.drawn, self.n_layers).mean())

    def finding(self) -> Finding:
        """E45."""
        found = Interval(*(np.array(x) for x in (self.layer, min(self.low, self.layer), max(self.high, self.layer))))
        return Finding.of(
            found,
            self.n_pictures,
            match_verdict((self.low, self.layer, self.high), self.n_layers, float(self.off.value), self.inside),
            f"Matching layer (of {self.n_layers}); text there is {self.off.value:.2f} times as long as visual tokens "
            f"at the input, and {self.inside:.0%} of the resamples match in the middle half.",
        )

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        middle = np.flatnonzero(norms.in_the_middle(np.arange(self.n_layers + 1), self.n_layers))
        return {
            "l_star": self.layer,
            "l_low": self.low,
            "l_high": self.high,
            "middle_first": int(middle[0]),
            "middle_last": int(middle[-1]),
            "off": self.off,
            "worth": self.worth,
        }


def match(visual: Course, text: Course, seed: int = 0) -> Match:
    """Which layer's text has the norm of visual tokens at the input.

    Args:
        visual: unscaled course of the tokens that enter; pictures without them are left out.
        text: unscaled course of the text.

    Raises:
        EmbedLensError: no picture has such tokens, or all layers have one norm.
    """
    enter, by_layer = visual.norms[:, 0], text.norms
    drawn = norms.matching_layer(*norms.resampled_means(enter, by_layer, seed=seed))
    low, high = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")
    layer = int(norms.matching_layer(np.array(np.nanmean(enter)), by_layer.mean(0)))
    return Match(
        n_layers=by_layer.shape[1] - 1,
        n_pictures=visual.n,
        layer=layer,
        low=int(low),
        high=int(high),
        drawn=drawn,
        enter=mean_interval(enter, seed=seed),
        text=mean_interval(by_layer, seed=seed),
        off=norms.of_means(lambda v, t: t[:, layer] / v, enter, by_layer, seed=seed),
        worth=norms.middle_by_accident(by_layer.mean(0)),
    )


def match_verdict(layers: tuple[int, int, int], n_layers: int, off: float, inside: float) -> str:
    """E45, "norms at the input match those of text in the middle layers".

    It holds if the matching layer and its whole interval lie in the middle half and the two norms differ by less than
    a factor of two; it does not hold if no more than 2.5 % of the resamples match there.

    Args:
        layers: lower bound, matching layer, upper bound.
        off: text at the matching layer over visual tokens at the input.
        inside: share of the resamples that match in the middle half.

    >>> match_verdict((3, 4, 5), 8, 1.1, 1.0), match_verdict((0, 0, 1), 8, 1.1, 0.0)
    ('holds', 'does not hold')
    """
    whole = bool(norms.in_the_middle(np.array(layers), n_layers).all())
    if whole and 0.5 < off < 2:
        return claims.HOLDS
    return claims.PARTLY if inside > 0.025 else claims.FAILS


def match_figure(found: Match, model: str) -> Figure:
    """Text norms by layer with the level of visual tokens at the input; below, which layer matches in resamples."""
    from matplotlib import pyplot as plt

    n, layers = found.n_layers, np.arange(found.n_layers + 1)
    fig, (axes, bars) = plt.subplots(2, 1, figsize=(figures.WIDTH, 5.4), height_ratios=(3, 1), sharex=True)
    for part in (axes, bars):
        part.axvspan(n / 4, 3 * n / 4, color=figures.SHADE, zorder=0)
    figures.layer_curve(axes, *found.text, "text, by layer", TEXT)
    axes.axhspan(float(found.enter.low), float(found.enter.high), color=VISUAL.colour, alpha=0.2, linewidth=0)
    axes.axhline(float(found.enter.value), color=VISUAL.colour, label="visual, at the input")
    axes.set_yscale("log")
    axes.set_ylabel("mean L2 norm")
    axes.set_xlabel("")
    axes.set_title(f"Visual tokens enter as long as text is at layer {found.layer} of {n}")
    axes.legend(loc="lower right")
    bars.bar(layers, np.bincount(found.drawn, minlength=n + 1) / len(found.drawn), color=VISUAL.colour)
    bars.set_ylim(0, 1)
    bars.set_xlabel("layer (middle half shaded)")
    bars.set_ylabel("share of\nresamples")
    figures.sign(fig, model, f"n = {found.n_pictures} held-out pictures, {len(found.drawn)} resamples of them")
    return fig


def match_table(course: Courses, seed: int = 0) -> pd.DataFrame:
    """The matching layer under three readings of "visual" and "text"; a reading without tokens is left out."""
    import pandas as pd

    readings = {
        "visual tokens, text without first position": ("visual", "text"),
        "visual tokens, text with first position": ("visual", "all text"),
        "alive tokens, text without first position": ("alive", "text"),
    }
    rows = {}
    for name, (seen, read) in readings.items():
        if course[1.0, seen].n:
            found = match(course[1.0, seen], course[1.0, read], seed)
            rows[name] = {"l*": found.layer, "95 % interval": f"{found.low} to {found.high}", "n": found.n_pictures}
    return pd.DataFrame(rows).T.rename_axis("reading")


def numbers(course: Courses, sight: Sight, match: Match, block: Arithmetic) -> dict[str, float]:
    """What the record keeps of the norms, the turns, the answers and the matching layer."""
    kept: dict[str, Any] = {}
    for name in ("visual", "text"):
        kept |= {f"{name}_norm_layer_{at}": x for at, x in enumerate(course[1.0, name].norms.mean(0))}
    for scale in sight.scales:
        steps = course[scale, "visual"].steps.mean(0)
        kept |= {f"visual_cosine_scale_{scale:g}_block_{at}": x for at, x in enumerate(steps)}
    kept |= {f"correct_scale_{scale:g}": x for scale, x in zip(sight.scales, sight.everything.mean(0), strict=True)}
    kept |= {"middle_by_accident": match.worth, "matching_norm_ratio": match.off.value}
    kept |= {"first_block_frozen": block.frozen.value[-1], "first_block_measured": block.measured.value[-1]}
    return {name: float(x) for name, x in kept.items()}


def _factor_curve(
    axes: Any, scales: Sequence[float], found: Interval, label: str, look: Look, alpha: float = 0.18
) -> None:
    axes.fill_between(scales, found.low, found.high, color=look.colour, alpha=alpha, linewidth=0)
    axes.plot(scales, found.value, color=look.colour, marker=look.marker, linestyle=look.line, label=label)
