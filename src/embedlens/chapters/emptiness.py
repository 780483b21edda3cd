"""Are dead tokens empty? The claims about their words, likeness, readers, origin and entropy (Sections 5.1 and 5.2).

Measured by `embedlens.consistency`; here are the verdicts E31 and E34 to E39, their figures and their sentences. Where
no word marks dead tokens, a picture's largest cluster, C0, stands in for them; it is named so everywhere, and no claim
about it earns more than "partly".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from embedlens import claims, figures
from embedlens.claims import FAILS, HOLDS, PARTLY, Finding
from embedlens.consistency import SELECTION, Common, GroupStudy, is_word, selection_study
from embedlens.figures import Look
from embedlens.groups import QUESTION, Reference, token_groups
from embedlens.intervals import Interval, mean_interval
from embedlens.lenses import EmbedLens
from embedlens.measures.hubs import random_directions
from embedlens.readout import QUESTIONS, Readout
from embedlens.samples import Sample

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from embedlens.vlm import VisionLanguageModel

BAR = 0.08  # of the text's attention at every layer, in the paper (Section 5.2)
LATE = 7 / 8  # of the tower's depth: "around layer 21" of 24
SPLITS = 3  # of the coordinates into a half that chooses and one that does not
OF_STAND_IN = " Measured on C0, the stand-in: no word marks dead tokens here."
SHADE = "#F4F4F0"
LOOKS: Mapping[str, Look] = figures.GROUPS | {
    "random": Look(figures.CHANCE, ".", "-"),
    "highest norm": Look(figures.GROUPS["ViT sink"].colour, "^", ":"),
}
READINGS = {"inside": "among one another", "inside_removed": "the same, mean removed", "kept": "a layer later"}


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of the groups of some pictures, and what to call them."""

    study: GroupStudy
    shared: Common
    stand_in: bool
    """Whether C0, a picture's largest cluster, stands in for dead tokens."""
    model: str
    """As passed to `embedlens.load`; figures are signed with it."""
    seed: int = 0
    """Of the bootstrap."""

    @property
    def dead(self) -> str:
        """What dead tokens are called in tables and figures."""
        return "C0, stand-in for dead" if self.stand_in else "dead"

    @property
    def short(self) -> str:
        """What dead tokens are called in titles."""
        return "C0" if self.stand_in else "dead"

    @property
    def named(self) -> list[str]:
        """The groups that have a token in some picture."""
        return [name for name in ("alive", "dead", "ViT sink", "LLM sink") if self.study.has(name)]

    @property
    def rivals(self) -> list[str]:
        """Groups that share a picture with dead tokens, both with at least two."""
        sizes = {name: self.study.of("sizes", name) for name in self.named}
        return [name for name in self.named if name != "dead" and bool(((sizes[name] > 1) & (sizes["dead"] > 1)).any())]

    def called(self, name: str) -> str:
        """A group's name on the page."""
        return {"dead": self.dead, "random": "random tokens", "highest norm": "5 highest norms (no ViT sinks)"}.get(
            name, name
        )

    def of(self, name: str, group: str) -> Interval:
        """Mean over pictures of one measure of one group."""
        return self.over(self.study.of(name, group))

    def over(self, values: Float[np.ndarray, "pictures *columns"]) -> Interval:  # noqa: UP037 - a shape
        """Mean over pictures with its interval."""
        return mean_interval(np.asarray(values, dtype=float), seed=self.seed)

    def finding(self, interval: Sequence[Any], verdict: str, note: str) -> Finding:
        """Of a stand-in nothing more than "partly" can be said about dead tokens."""
        if self.stand_in:
            verdict, note = PARTLY if verdict == HOLDS else verdict, f"{note}{OF_STAND_IN}"
        value, low, high = (float(part) for part in interval)
        return Finding(value, low, high, len(self.study), verdict, note)

    def untestable(self, note: str) -> Finding:
        """There is nothing to measure it on."""
        return Finding(None, None, None, len(self.study), claims.UNTESTABLE, note)


def graded(parts: Sequence[bool]) -> str:
    """All, some or none of what a claim says.

    >>> graded([True, True]), graded([True, False]), graded([False, False])
    ('holds', 'partly', 'does not hold')
    """
    return HOLDS if all(parts) else PARTLY if any(parts) else FAILS


def group_table(measured: Measured) -> pd.DataFrame:
    """How many visual tokens each group has, and how many of these lie in the bars."""
    import pandas as pd

    study = measured.study
    return pd.DataFrame(
        {
            "share of visual tokens": {
                measured.called(name): measured.over(study.share(name)).texts(3)[0] for name in measured.named
            },
            "of these, in the bars": {
                measured.called(name): measured.of("in_bars", name).texts(3)[0] for name in measured.named
            },
        }
    )


# --- E31: no word nearby ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NoWords:
    """Shares of tokens, and of random directions, whose nearest vocabulary entry is no word by `is_word`."""

    shares: Mapping[str, Interval]
    """By group; "random" tokens as many as dead ones; "random directions" of the residual stream."""
    beyond: Interval
    """Dead tokens less random directions."""
    vocabulary: float
    """Share of the vocabulary's entries."""


def no_words(measured: Measured, model: VisionLanguageModel, directions: int = 100) -> NoWords:
    """The groups' shares beside those of `directions` random directions a picture."""
    n = len(measured.study)
    words = np.array([is_word(word) for word in model.tokens])
    lens = EmbedLens.from_model(model)
    drawn = lens.topk(random_directions(n * directions, model.width, measured.seed), 1)[1].cpu().numpy()
    at_random = (~words[drawn]).reshape(n, -1).mean(1)
    values = {name: measured.study.of("no_words", name) for name in [*measured.named, "random"]}
    values["random directions"] = at_random
    shares = {name: measured.over(found) for name, found in values.items() if np.isfinite(found).any()}
    return NoWords(shares, measured.over(values["dead"] - at_random.mean()), float((~words).mean()))


def no_word_table(measured: Measured, found: NoWords) -> pd.DataFrame:
    """One row per group, random directions, and the vocabulary."""
    import pandas as pd

    told = {measured.called(name): share.texts(3)[0] for name, share in found.shares.items()}
    return pd.DataFrame({"nearest entry is no word": told | {"vocabulary": f"{found.vocabulary:.3f}"}})


def e31(measured: Measured, found: NoWords) -> Finding:
    """Holds if most dead tokens are nearest to no word, more than of random directions; partly if one of the two."""
    empty, chance = found.shares["dead"], float(found.shares["random directions"].value)
    note = f"Share of dead tokens nearest to no word; random directions: {chance:.3f}."
    return measured.finding(empty, graded([bool(empty.low > 0.5), bool(found.beyond.low > 0)]), note)


# --- E34: alike ------------------------------------------------------------------------------------------------------


def ahead_of(measured: Measured, rival: str, of: str) -> Interval:
    """Dead less another group in one of READINGS, mean over the layers after the first."""
    study = measured.study
    return measured.over((study.of(of, "dead") - study.of(of, rival))[:, 1:].mean(1))


def ahead_table(measured: Measured) -> pd.DataFrame:
    """By how much dead tokens are more alike than each other group."""
    import pandas as pd

    return pd.DataFrame(
        {
            said: {f"less {name}": ahead_of(measured, name, of).texts(3)[0] for name in measured.rivals}
            for of, said in READINGS.items()
        }
    )


def e34(measured: Measured) -> Finding:
    """Holds if dead tokens are ahead of every group in both readings, by the whole interval; partly if in one."""
    if not measured.rivals:
        return measured.untestable("No picture has two dead tokens and two of another group.")
    ahead = {(name, of): ahead_of(measured, name, of) for name in measured.rivals for of in READINGS}
    closest = min(measured.rivals, key=lambda name: float(ahead[name, "inside"].value))
    won = [all(bool(ahead[name, of].low > 0) for name in measured.rivals) for of in ("inside", "kept")]
    note = (
        f"Pairwise cosine of dead less {closest} tokens, layers 1 on; with the common mean removed "
        f"{ahead[closest, 'inside_removed'].texts(3)[0]}; to themselves a layer later "
        f"{ahead[closest, 'kept'].texts(3)[0]}."
    )
    return measured.finding(ahead[closest, "inside"], graded(won), note)


def likeness_figure(measured: Measured) -> Figure:
    """Cosine within each group by layer, read in two ways."""
    fig, panes = _two_panes(("to the others in the group", "to itself one layer later"))
    for name in [name for name in [*measured.named, "random"] if measured.study.has(name, 2)]:
        for axes, of in zip(panes, ("inside", "kept"), strict=True):
            figures.layer_curve(axes, *measured.of(of, name), measured.called(name), LOOKS[name])
    panes[0].set_ylabel("mean cosine")
    _finish(fig, panes, "layer", _likeness_title(measured))
    panes[1].legend(loc="best", fontsize=10)
    figures.sign(fig, measured.model, f"n = {len(measured.study)} held-out pictures")
    return fig


def _likeness_title(measured: Measured) -> str:
    """By how much dead tokens are ahead of the group that comes nearest to them."""
    if not measured.rivals:
        return f"No picture has two {measured.short} tokens and two of another group"
    ahead = {name: float(ahead_of(measured, name, "inside").value) for name in measured.rivals}
    closest = min(ahead, key=lambda name: ahead[name])
    later = float(ahead_of(measured, closest, "kept").value)
    who = f"{measured.short[0].upper()}{measured.short[1:]} less {closest}"
    among, later = (round(value, 2) + 0.0 for value in (ahead[closest], later))  # no minus before a zero
    return f"{who}: {among:+.2f} among one another, {later:+.2f} a layer later"


def held_out_likeness(
    measured: Measured,
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    reference: Reference,
    membership: str,
    splits: int = SPLITS,
) -> dict[str, Interval]:
    """Pairwise cosine of dead tokens on the coordinates that did not choose them, by name of `consistency.SELECTION`.

    Empty where no picture has two dead tokens by some half.
    """
    chosen = selection_study(model, samples, reference, measured.shared, membership, splits, measured.seed)
    chosen = chosen[~np.isnan(chosen[:, 0])]
    return dict(zip(SELECTION, map(measured.over, chosen.T), strict=True)) if len(chosen) else {}


def chosen_sentence(found: Mapping[str, Interval]) -> str:
    """Whether the likeness is a result of choosing by it."""
    if not found:
        return "No picture has two tokens that either half chooses."
    rest, any_ = found["other half"], found["any tokens"]
    kept, any_kept = found["other half, mean removed"], found["any tokens, mean removed"]
    return (
        f"On the coordinates that did not choose, the cosine is {rest.value:.3f} (any two tokens: {any_.value:.3f}); "
        f"less the mean it is {kept.value:.3f} (any two: {any_kept.value:.3f}). "
        + ("So the likeness is not made by choosing." if kept.low > any_kept.high else "So choosing may have made it.")
    )


def direction_figure(measured: Measured, tower: bool = False) -> Figure:
    """Cosine of each group to its mean direction in other pictures, raw and less the mean of all visual tokens.

    Args:
        tower: in the vision tower instead of the language model.
    """
    what, of = ("patches", "tower_aligned") if tower else ("visual tokens", "aligned")
    directions = measured.shared.tower_direction if tower else measured.shared.direction
    fig, panes = _two_panes(("raw", f"mean of all {what} removed"))
    for name in [name for name in [*measured.named, "random"] if name in directions]:
        for axes, suffix in zip(panes, ("", "_removed"), strict=True):
            figures.layer_curve(axes, *measured.of(f"{of}{suffix}", name), measured.called(name), LOOKS[name])
    for axes in panes:
        axes.axhline(0, color=figures.CHANCE, linewidth=1.0)
        if tower:
            axes.axvspan(_late(measured) - 0.5, _depth(measured) - 0.5, color=SHADE, zorder=0)
    panes[0].set_ylabel("cosine to the group elsewhere")
    if tower:
        title = _turn_title(measured)
    else:
        first, less_mean = (float(measured.of(f"{of}{suffix}", "dead").value[0]) for suffix in ("", "_removed"))
        title = f"Alike across pictures: {first:.2f} at layer 0, {less_mean:.2f} less the mean"
    _finish(fig, panes, "layer of the vision tower" if tower else "layer", title)
    panes[1 if tower else 0].legend(loc="upper left" if tower else "best", fontsize=10)
    n = len(measured.study)
    figures.sign(fig, measured.model, f"n = {n} pictures, directions from {measured.shared.n_pictures} others")
    return fig


def _turn_title(measured: Measured) -> str:
    """How much of the rise of the cosine comes in the tower's last eighth."""
    values = measured.study.of("tower_aligned", "dead")
    if _late(measured) < 2:
        return f"Cosine to the group's direction at the last layer: {measured.over(values).value[-1]:.2f}"
    rise, last = (float(measured.over(part).value) for part in (_rise(measured, values), _last_step(measured, values)))
    return f"Late rise of the cosine {rise:+.2f}, over the layer before it {last:+.2f}"


# --- E35, E36: who reads them ----------------------------------------------------------------------------------------


def attention_figure(measured: Measured) -> Figure:
    """Where the text's attention goes by block, of all keys and of visual keys; the paper's bar dashed."""
    study = measured.study
    fig, panes = _two_panes(("of all keys", "of visual keys"), height=4.4)
    inset = panes[0].inset_axes((0.36, 0.68, 0.62, 0.24))
    for name in measured.named:
        figures.layer_curve(panes[0], *measured.of("attention", name), measured.called(name), LOOKS[name])
        of_visual = measured.over(study.attention_of_visual(name))
        figures.layer_curve(panes[1], *of_visual, measured.called(name), LOOKS[name])
        per_token = 100 * measured.over(study.attention_per_token(name)).value
        inset.plot(per_token, LOOKS[name].line, color=LOOKS[name].colour)
    inset.set_title("per token, %", fontsize=10, fontweight="normal")
    inset.tick_params(labelsize=9)
    inset.set_ylim(bottom=0)
    inset.set_xlabel("block", fontsize=9, labelpad=1)
    for axes in panes:
        axes.axhline(BAR, color=figures.FACT, linestyle="--", linewidth=1.2)
        axes.annotate("paper (7B): below 8 %", (0.0, 0.012), color=figures.FACT, fontsize=9, va="bottom")
        axes.set_ylim(0, 1.4)  # room for the inset above the curves
        axes.set_yticks(np.linspace(0, 1, 6))
    panes[0].set_ylabel("share of the text's attention")
    seen, of_tokens = float(np.nanmean(study.attention_of_visual("dead"))), study.share("dead").mean()
    short = "C0" if measured.stand_in else "Dead"
    _finish(fig, panes, "block", f"{short}: {of_tokens:.0%} of the visual tokens, {seen:.0%} of the attention on these")
    panes[1].legend(loc="upper right", fontsize=10)
    figures.sign(fig, measured.model, f"n = {len(study)} held-out pictures")
    return fig


def e35(measured: Measured) -> Finding:
    """Holds if the interval at the highest block lies below the paper's bar in both readings; partly if in one."""
    study = measured.study
    of_all, of_visual = measured.of("attention", "dead"), measured.over(study.attention_of_visual("dead"))
    peak, visual_peak = int(of_all.value.argmax()), int(of_visual.value.argmax())
    note = (
        f"Attention of text on dead tokens at the highest block ({peak}), of all keys; of visual keys "
        f"{of_visual.texts(3)[visual_peak]} at block {visual_peak}; they are {study.share('dead').mean():.3f} of the "
        "visual tokens."
    )
    below = [bool(of_all.high.max() < BAR), bool(of_visual.high.max() < BAR)]
    return measured.finding([part[peak] for part in of_all], graded(below), note)


def e36(measured: Measured) -> Finding:
    """Holds if a dead token gets less than a remaining one at every block; partly if only on their mean."""
    study = measured.study
    with np.errstate(invalid="ignore", divide="ignore"):
        per_token = study.attention_per_token("dead") / study.attention_per_token("remaining")
    if not np.isfinite(per_token).any():
        return measured.untestable("No picture has dead tokens and others.")
    ratio, ratios = measured.over(per_token.mean(1)), measured.over(per_token)
    lower, blocks = int((ratios.high < 1).sum()), per_token.shape[1]
    verdict = claims.judged(1 - float(ratio.high), 1 - float(ratio.low))
    verdict = PARTLY if verdict == HOLDS and lower < blocks else verdict
    note = (
        "Attention per dead token over attention per remaining token, mean of blocks; "
        f"below 1 at {lower} of {blocks} blocks."
    )
    return measured.finding(ratio, verdict, note)


# --- E37, E38: where they come from ----------------------------------------------------------------------------------


def _depth(measured: Measured) -> int:
    """Layers of the vision tower, its embedding among them."""
    return measured.study.tower_norms.shape[-1]


def _late(measured: Measured) -> int:
    """The first layer of the tower's last eighth, rounded outwards to whole layers."""
    return max(1, int(LATE * (_depth(measured) - 1)))


def tower_figure(measured: Measured) -> Figure:
    """Norms by layer of the vision tower, and how dead patches turn from layer to layer."""
    from matplotlib import pyplot as plt

    names = [*measured.named, *([] if "ViT sink" in measured.named else ["highest norm"])]
    fig, panes = plt.subplots(1, 2, figsize=(figures.WIDTH, 3.9))
    panes[0].axvspan(_late(measured) - 0.5, _depth(measured) - 0.5, color=SHADE, zorder=0)
    norms = {name: measured.of("tower_norms", name) for name in names}
    for name, found in norms.items():
        figures.layer_curve(panes[0], *found, measured.called(name), LOOKS[name])
    panes[0].set_ylabel("L2 norm")
    panes[0].set_ylim(0, 1.5 * max(found.high.max() for found in norms.values()))
    panes[0].legend(loc="upper left", fontsize=9.5)
    turned = measured.of("tower_map", "dead").value
    drawn = panes[1].imshow(turned, vmin=0, vmax=1, cmap="cividis", origin="lower")
    panes[1].grid(False)
    panes[1].set_ylabel("layer of the vision tower")
    short = "C0" if measured.stand_in else "dead"
    panes[1].set_title(f"cosine of {short}, layer to layer", fontsize=11, fontweight="normal")
    fig.colorbar(drawn, ax=panes[1], shrink=0.8)
    _finish(fig, panes, "layer of the vision tower", _norms_title(measured))
    figures.sign(fig, measured.model, f"n = {len(measured.study)} held-out pictures; shaded: the last eighth")
    return fig


def _over_alive(measured: Measured) -> Float[np.ndarray, "pictures tower"]:
    """Norm of dead patches over that of alive ones."""
    return measured.study.of("tower_norms", "dead") / measured.study.of("tower_norms", "alive")


def _norms_title(measured: Measured) -> str:
    if not _comparable(measured):
        norm = float(measured.of("tower_norms", "dead").value[-1])
        return f"Norm of {measured.short} patches at the tower's last layer: {norm:.1f}"
    late, ratios = _late(measured), _over_alive(measured)
    before, after = (float(measured.over(part.mean(1)).value) for part in (ratios[:, 1:late], ratios[:, late:]))
    return f"Norm, {measured.short} over alive: {before:.2f} before the last eighth, {after:.2f} in it"


def _last_step(measured: Measured, values: Float[np.ndarray, "pictures tower"]) -> Float[np.ndarray, " pictures"]:
    """Mean of the last eighth of the tower's layers less the layer just before."""
    late = _late(measured)
    return values[:, late:].mean(1) - values[:, late - 1]


def _rise(measured: Measured, values: Float[np.ndarray, "pictures tower"]) -> Float[np.ndarray, " pictures"]:
    """Mean of the last eighth of the tower's layers less that of the layers before."""
    late = _late(measured)
    return values[:, late:].mean(1) - values[:, 1:late].mean(1)


def _comparable(measured: Measured) -> bool:
    return "alive" in measured.rivals and _late(measured) > 1


def e37(measured: Measured) -> Finding:
    """Holds if dead patches have smaller norms than alive ones before, larger ones late; partly if the ratio rises."""
    if not _comparable(measured):
        return measured.untestable("No picture has dead and alive tokens, or the tower is too shallow.")
    late = _late(measured)
    over_alive = _over_alive(measured)
    before, after = measured.over(over_alive[:, 1:late].mean(1)), measured.over(over_alive[:, late:].mean(1))
    rises = measured.over(_rise(measured, over_alive))
    parts = [bool(before.high < 1), bool(after.low > 1), bool(rises.low > 0)]
    verdict = HOLDS if all(parts) else PARTLY if parts[2] else FAILS
    note = f"Rise of the norm ratio dead / alive: {before.texts(3)[0]} before, {after.texts(3)[0]} in the last eighth."
    return measured.finding(rises, verdict, note)


def e38(measured: Measured) -> Finding:
    """Holds if dead patches turn to their direction elsewhere late, more than alive ones, raw and less the mean.

    Late is the last eighth of the tower's layers, which has to lie above the mean of the layers before and above the
    layer just before: a rise that is over by then earns "partly".
    """
    if not _comparable(measured):
        return measured.untestable("No picture has dead and alive tokens, or the tower is too shallow.")
    turns = {
        (name, of): _rise(measured, measured.study.of(f"tower_{of}", name))
        for name in ("dead", "alive")
        for of in ("aligned", "aligned_removed")
    }
    turned, less_mean = measured.over(turns["dead", "aligned"]), measured.over(turns["dead", "aligned_removed"])
    more = [measured.over(turns["dead", of] - turns["alive", of]) for of in ("aligned", "aligned_removed")]
    last = [
        measured.over(_last_step(measured, measured.study.of(f"tower_{of}", "dead")))
        for of in ("aligned", "aligned_removed")
    ]
    parts = [bool(found.low > 0) for found in (turned, less_mean, *more, *last)]
    verdict = HOLDS if all(parts) else PARTLY if parts[0] else FAILS
    note = (
        f"Rise of the cosine to the group's direction elsewhere; beyond that of alive patches {more[0].texts(3)[0]}, "
        f"with the mean removed {more[1].texts(3)[0]}; the last eighth less the layer just before "
        f"{last[0].texts(3)[0]}, with the mean removed {last[1].texts(3)[0]}."
    )
    return measured.finding(turned, verdict, note)


# --- E39: what would be said there -----------------------------------------------------------------------------------


def e39(measured: Measured, vocabulary: int) -> Finding:
    """Holds if the entropy at dead tokens is above that at the remaining ones, by the whole interval."""
    gap = measured.study.of("entropy", "dead") - measured.study.of("entropy", "remaining")
    if not np.isfinite(gap).any():
        return measured.untestable("No picture has dead tokens and others.")
    more = measured.over(gap)
    of_most = float(more.value) / np.log(vocabulary)
    note = f"Entropy at dead less remaining tokens, in nats; as a share of ln V {of_most:.3f}."
    return measured.finding(more, claims.judged(float(more.low), float(more.high)), note)


def entropy_figure(measured: Measured) -> Figure:
    """Quartiles over pictures of the entropy at the last layer, by group."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 0.5 * len(measured.named) + 1.6))
    for row, name in enumerate(measured.named):
        values, mean = measured.study.of("entropy", name), float(measured.of("entropy", name).value)
        axes.boxplot(
            values[np.isfinite(values)],
            positions=[row],
            orientation="horizontal",
            widths=0.5,
            sym="",
            medianprops={"color": "#222222"},
        )
        axes.plot(mean, row, LOOKS[name].marker, color=LOOKS[name].colour, markersize=10)
        axes.annotate(f"{mean:.2f}", (mean, row + 0.3), ha="center", va="bottom", fontsize=10)
    axes.set_yticks(range(len(measured.named)), [measured.called(name) for name in measured.named])
    axes.set_ylim(-0.6, len(measured.named) - 0.2)
    axes.set_xlabel("entropy at the last layer, nats, mean of a picture's tokens")
    title = f"Entropy at {measured.short} tokens: {float(measured.of('entropy', 'dead').value):.2f} nats"
    if measured.study.has("remaining"):
        title += f", at the remaining ones {float(measured.of('entropy', 'remaining').value):.2f}"
    figures.headline(fig, title)
    figures.sign(fig, measured.model, f"boxes: quartiles of n = {len(measured.study)} pictures")
    return fig


# --- what a probe reads ----------------------------------------------------------------------------------------------

OWN, ANEW = "own projector", "random projectors"
Readouts = Mapping[tuple[str, str, str], "Readout | None"]  # as `readout.readouts` gives them


def readout_figure(measured: Measured, read: Readouts, n_pictures: int) -> Figure:
    """Share of right answers of each probe, beside the most frequent answer."""
    from matplotlib import pyplot as plt

    rows = [(asked, name) for asked in QUESTIONS for name in ("dead", "alive")]
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.6))
    for row, (asked, name) in enumerate(rows):
        look = figures.GROUPS[name]
        axes.axhline(row, color="#EEEEEE", linewidth=1.0, zorder=0)
        for form, filled, shift in ((ANEW, "white", -0.17), (OWN, look.colour, 0.17)):
            found = read[asked, name, form]
            if found is None:
                axes.annotate("too few tokens to probe", (0.5, row + 0.05), ha="center", va="center", fontsize=10)
                break
            value, low, high = (float(part) for part in found.accuracy(measured.seed))
            axes.errorbar(value, row + shift, xerr=[[value - low], [high - value]], color=look.colour)
            axes.plot(value, row + shift, look.marker, color=look.colour, markerfacecolor=filled, markersize=9)
            usual = float(found.baseline(measured.seed).value)
            axes.plot(usual, row, "|", color=figures.CHANCE, markersize=22, markeredgewidth=2.5)
    axes.set_yticks(range(len(rows)), [f"{asked}\n{measured.called(name)}" for asked, name in rows], fontsize=9.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(axis="y", visible=False)
    legend = "filled: own projector; open: random projectors; grey bar: most frequent answer"
    axes.set_xlabel(f"right answers in pictures that the probe has not seen\n{legend}", fontsize=10.5, x=0.35)
    figures.headline(fig, _probe_title(measured, read))
    figures.sign(fig, measured.model, f"n = {n_pictures} pictures, a third of them for the test")
    return fig


def _probe_title(measured: Measured, read: Readouts) -> str:
    own, anew = (read.get((QUESTIONS[0], "dead", form)) for form in (OWN, ANEW))
    if own is None or anew is None:
        return f"Too few {measured.short} tokens to probe for the colour of the patch"
    right, beside = float(own.accuracy().value), float(anew.accuracy().value)
    return f"Colour from {measured.short} tokens: {right:.0%} right, random projectors {beside:.0%}"


def readout_table(measured: Measured, read: Readouts) -> pd.DataFrame:
    """The figure's numbers; a dash where too few tokens qualify."""
    import pandas as pd

    def written(found: Readout | None, of: str) -> str:
        return "–" if found is None else getattr(found, of)(seed=measured.seed).texts(2)[0]

    rows = {
        (asked, measured.called(name)): (read[asked, name, OWN], read[asked, name, ANEW])
        for asked in QUESTIONS
        for name in ("dead", "alive")
    }
    return pd.DataFrame(
        {
            OWN: [written(own, "accuracy") for own, _ in rows.values()],
            ANEW: [written(anew, "accuracy") for _, anew in rows.values()],
            "most frequent answer": [written(own, "baseline") for own, _ in rows.values()],
            "gain of own": [written(own, "gain") for own, _ in rows.values()],
            "answers": [0 if own is None else len(own.classes) for own, _ in rows.values()],
            "test tokens": [0 if own is None else int(own.asked.sum()) for own, _ in rows.values()],
        },
        index=pd.MultiIndex.from_tuples(rows, names=["question", "tokens"]),
    )


def reads_colour(measured: Measured, read: Readouts) -> bool:
    """Whether a probe reads the patch's colour from dead tokens beyond the most frequent answer."""
    colour = read[QUESTIONS[0], "dead", OWN]
    return colour is not None and bool(colour.gain(seed=measured.seed).low > 0)


def hidden_sentence(measured: Measured, read: Readouts) -> str:
    """For the top of the page: does a probe read the patch's colour from dead tokens?"""
    colour = read[QUESTIONS[0], "dead", OWN]
    if colour is None:
        return "Too few tokens to probe what they hold."
    reads = (
        "Yet a linear probe reads" if colour.gain(seed=measured.seed).low > 0 else "And a linear probe does not read"
    )
    return (
        f"{reads} the colour of the patch from them: {float(colour.accuracy().value):.0%} right in unseen pictures, "
        f"where always saying the most frequent colour gives {float(colour.baseline().value):.0%}"
        f"{_beside_random(colour, read.get((QUESTIONS[0], 'dead', ANEW)), measured.seed)}."
    )


def _beside_random(own: Readout, anew: Readout | None, seed: int) -> str:
    """What is read behind random projectors, and what that says of the model's own."""
    if anew is None:
        return ""
    lead = own.gain(anew, seed=seed)
    said = "which is less" if lead.low > 0 else "which is more" if lead.high < 0 else "not told apart from it"
    read = own.gain(seed=seed).low > 0
    gives = ", so it is the vision tower that gives it" if read and not lead.low > 0 else ""
    return f" (random projectors: {float(anew.accuracy().value):.0%}, {said}{gives})"


def probe_sentence(measured: Measured, read: Readouts) -> str:
    """What is read from dead tokens, question by question."""
    said = []
    for asked in QUESTIONS:
        own, anew = read[asked, "dead", OWN], read[asked, "dead", ANEW]
        if own is None or anew is None:
            continue
        gain, lead = own.gain(seed=measured.seed), own.gain(anew, seed=measured.seed)
        more = "more than from" if lead.low > 0 else "less than from" if lead.high < 0 else "not told apart from"
        said.append(
            f"{asked}: {float(own.accuracy().value):.0%} against {float(own.baseline().value):.0%} for the most "
            f"frequent answer ({'read' if gain.low > 0 else 'not read beyond it'}; {more} random projectors)"
        )
    whose = "C0" if measured.stand_in else "dead"
    return f"From {whose} tokens: {'; '.join(said)}." if said else "Too few tokens to probe."


# --- for the page ----------------------------------------------------------------------------------------------------


def finding_text(found: Finding, measured: Measured) -> str:
    """A finding as a sentence after its verdict: number, interval, n and note."""
    note = found.note.removesuffix(OF_STAND_IN)
    if found.value is not None:
        note = f"{found.value:.3f} (95 % interval {found.low:.3f} to {found.high:.3f}, n = {found.n} pictures): {note}"
    return note.replace("dead", "C0") if measured.stand_in else note


def findings(measured: Measured, words: NoWords, vocabulary: int) -> dict[str, Finding]:
    """Claim → what was found."""
    return {
        "E31": e31(measured, words),
        "E34": e34(measured),
        "E35": e35(measured),
        "E36": e36(measured),
        "E37": e37(measured),
        "E38": e38(measured),
        "E39": e39(measured, vocabulary),
    }


def told_of_words(measured: Measured, words: NoWords) -> dict[str, Any]:
    """Key → value for the prose on E31."""
    alive = words.shares.get("alive")
    return {
        "no_word_dead": words.shares["dead"],
        "no_word_random": float(words.shares["random directions"].value),
        "no_word_alive": "none is there" if alive is None else f"{float(alive.value):.1%}",
    }


def told_of_probe(measured: Measured, read: Readouts) -> dict[str, Any]:
    """Key → value for the prose on what a probe reads."""
    return {"hidden_sentence": hidden_sentence(measured, read), "probe_sentence": probe_sentence(measured, read)}


def told(
    measured: Measured, model: VisionLanguageModel, reference: Reference, found_out: Mapping[str, Finding]
) -> dict[str, Any]:
    """Key → value for the prose: what dead tokens are here, and a note on each claim from E34 on."""
    study = measured.study
    tokens = int((study.of("sizes", "dead") + study.of("sizes", "remaining")).sum())
    part = f"{study.share('dead').mean():.0%} of the visual tokens"
    found = {
        "n_tokens": tokens,
        "seen_one_in": tokens // 3,  # the rule of three
        "dead_name": "C0" if measured.stand_in else "dead",
        "kind_of_dead": f"By the discovered reference word {part} are dead.",
        "how_found": f"In this model: {reference.notes['dead']}",
        "what_is_dead": "Dead are the tokens that have this word among their three nearest.",
        "cap": "Dead tokens are those near the discovered reference word.",
        "late_first": _late(measured),
        "late_last": _depth(measured) - 1,
        "feature_layer": model.feature_layer,
        "ln_v": np.log(len(model.tokens)),
        "vocabulary": len(model.tokens),
    }
    if measured.stand_in:
        found["kind_of_dead"] = (
            f"No word marks dead tokens in this model; with its largest cluster, C0, in their place, {part} are looked "
            "at."
        )
        found["what_is_dead"] = (
            "So dead tokens in the paper's sense are absent here. Every figure is drawn all the same for a stand-in, "
            "the picture's largest cluster, C0, wherever it lies; it has the colour of dead tokens and is named C0."
        )
        found["cap"] = 'As only a stand-in can be measured, no claim about dead tokens gets more than "partly".'
    for at, place in (("first", 0), ("last", -1)):
        found[f"aligned_{at}"] = measured.of("aligned", "dead").at(place)
        found[f"removed_{at}"] = measured.of("aligned_removed", "dead").at(place)
    last, less_mean = (float(measured.of(of, "dead").value[-1]) for of in ("tower_aligned", "tower_aligned_removed"))
    found["fixed_caveat"] = (
        f"At the tower's last layer the cosine is {last:.2f}, and {less_mean:.2f} less the common mean."
    )
    notes = {f"{name.lower()}_note": finding_text(one, measured) for name, one in found_out.items() if name != "E31"}
    return found | notes


def numbers(measured: Measured, read: Readouts, held_out: Mapping[str, Interval]) -> dict[str, float]:
    """What else the record keeps, by name."""
    study = measured.study
    found = {"stand_in": float(measured.stand_in), "dead_share": float(study.share("dead").mean())}
    if study.has("dead", 2):
        for of in ("inside", "inside_removed", "kept", "aligned", "aligned_removed"):
            found |= {f"{of}_layer_{at}": float(value) for at, value in enumerate(measured.of(of, "dead").value)}
    of_visual = measured.over(study.attention_of_visual("dead"))
    for said, values in (("attention", measured.of("attention", "dead")), ("attention_of_visual", of_visual)):
        found |= {f"{said}_block_{at}": float(value) for at, value in enumerate(values.value)}
    for (asked, name, form), probe in read.items():
        if probe is not None:
            key = f"{asked}_{name}_{form}".replace(" ", "_")
            found |= {key: float(probe.accuracy().value), f"{key}_majority": float(probe.baseline().value)}
    for said, likeness in held_out.items():
        found[f"likeness_{said.replace(', ', '_').replace(' ', '_')}"] = float(likeness.value)
    return found


def scene_figure(
    measured: Measured, model: VisionLanguageModel, sample: Sample, reference: Reference, membership: str
) -> Figure:
    """One picture, its patches outlined by group, with the nearest word at layer 0 on each."""
    prompt = model.prompt(sample.image, QUESTION)
    groups = token_groups(model, prompt, reference, membership)
    words = [found[0] for found in EmbedLens.from_model(model).words(prompt.embeds[prompt.visual], 1)]
    what = "in C0, the stand-in for dead" if measured.stand_in else "dead"
    title = f"{int(groups.dead.sum())} of {len(groups.dead)} tokens are {what}"
    footer = figures.signature(measured.model, "EmbedLens, layer 0")
    return figures.group_figure(prompt.image, prompt.grid, groups.named, words, title, footer, {"dead": measured.dead})


# --- drawing ---------------------------------------------------------------------------------------------------------


def _two_panes(titles: tuple[str, str], height: float = 4.0) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib import pyplot as plt

    fig, panes = plt.subplots(1, 2, figsize=(figures.WIDTH, height), sharey=True)
    for axes, title in zip(panes, titles, strict=True):
        axes.set_title(title, fontsize=11, fontweight="normal")
    return fig, panes


def _finish(fig: Figure, panes: Sequence[Axes], across: str, title: str) -> None:
    for axes in panes:
        axes.set_xlabel(across)
    figures.headline(fig, title)
