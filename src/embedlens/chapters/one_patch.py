"""What is answered about pictures with all their content in one patch (Section 7.1): E46 and E47, tables and figures.

Pictures are `embedlens.samples.patchbench`, asking is `embedlens.trajectories`. Shares have Wilson's interval. What
colours wrong answers follow is `embedlens.chapters.colour_sources`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from embedlens import claims, figures
from embedlens.claims import Finding
from embedlens.figures import Look
from embedlens.intervals import Interval, mean_interval
from embedlens.probe import probe_picture
from embedlens.samples import patchbench
from embedlens.samples.patchbench import AXES, GROUPS, OBJECT, OCR, OCR_BACKGROUND, OnePatch
from embedlens.trajectories import ask, share

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from embedlens.vlm import VisionLanguageModel

LARGER, PAPER_SIZED, ANOTHER = "larger", "70", "another picture"
CELLS = tuple((group, axis) for group in GROUPS for axis in AXES)
FEWEST = 5  # recognised objects that a verdict on them needs; set before the run
MORE_OFTEN = 0.5  # of the recognised objects with colour and count right; set before the run
PAPER_OBJECTS = 6 / 30  # recognised, printed by the paper
WHAT = AXES[0]

Answers = Mapping[str, "pd.DataFrame"]  # name of a set of pictures → what `trajectories.ask` gives
Rates = Mapping[str, Mapping[tuple[str, str], Interval]]  # name of a set → (group, question) → share


# --- figure 9: what is answered rightly ------------------------------------------------------------------------------


def ask_all(
    model: VisionLanguageModel, paper_sized: Sequence[OnePatch], larger: Sequence[OnePatch]
) -> dict[str, pd.DataFrame]:
    """Answers about the larger set, about as many pictures as the paper has, and about other pictures as a control."""
    return {
        PAPER_SIZED: ask(model, paper_sized),
        LARGER: ask(model, larger),
        ANOTHER: ask(model, larger, swap=True),
    }


def rates(said: Answers) -> Rates:
    """Share of right answers of each set, by group and question."""
    return {
        name: {key: share(part.correct.to_numpy()) for key, part in answers.groupby(["group", "axis"])}
        for name, answers in said.items()
    }


def rates_table(found: Rates) -> pd.DataFrame:
    """`rates`, one row per group and question."""
    import pandas as pd

    columns = {name: [rate[cell].texts()[0] for cell in CELLS] for name, rate in found.items()}
    return pd.DataFrame(columns, index=pd.MultiIndex.from_tuples(CELLS, names=["group", "question"]))


def rates_figure(found: Rates, n_larger: int, model: str) -> Figure:
    """Right answers by group and question: both sets and the control, with the paper's one number.

    Its title counts the cells in which the intervals of the larger set and of the control do not touch.
    """
    from matplotlib import pyplot as plt

    arms = (
        (LARGER, f"{n_larger} pictures", figures.ARMS["miniature"], -0.22, None),
        (PAPER_SIZED, "70 pictures", Look("#0072B2", "D"), 0.0, "white"),
        (ANOTHER, "another picture", figures.ARMS["another picture"], 0.22, None),
    )
    places = np.arange(9) + np.repeat([0, 0.6, 1.2], 3)
    helps = sum(bool(found[LARGER][cell].low > found[ANOTHER][cell].high) for cell in CELLS)
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.4))
    for name, label, look, shift, face in arms:
        figures.dots(axes, places + shift, [found[name][cell] for cell in CELLS], look, label, face=face)
    axes.plot([-0.4, 0.4], [PAPER_OBJECTS] * 2, "--", color=figures.FACT, linewidth=1.2, label="paper: 6 of 30")
    axes.set_xticks(places, AXES * 3, rotation=35, ha="right")
    for start, group in zip(places[::3], GROUPS, strict=True):
        axes.annotate(group, (start + 1, 1.06), ha="center", fontsize=11, color="#555555")
    axes.set_ylim(-0.03, 1.35)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_ylabel("answered rightly")
    axes.set_title(f"The picture helps in {helps} of 9 cells")
    axes.legend(loc="upper center", ncols=4, fontsize=10, columnspacing=1.2, handletextpad=0.4)
    n = f"larger set: n = {3 * n_larger // 7} objects, 2 × {2 * n_larger // 7} texts"
    figures.sign(fig, model, f"{n}; Wilson's 95 % intervals")
    return fig


def rates_told(found: Rates) -> dict[str, float]:
    """What the prose says of the rates."""
    larger, other = found[LARGER], found[ANOTHER]
    told = {}
    for short, axis in zip(("what", "colour", "count"), AXES, strict=True):
        told[f"rate_object_{short}"] = float(larger[OBJECT, axis].value)
        told[f"other_object_{short}"] = float(other[OBJECT, axis].value)
    return told | {
        "rate_ocr_what": float(larger[OCR, WHAT].value),
        "other_ocr_what": float(other[OCR, WHAT].value),
        "rate_ocr_colour": float(larger[OCR, AXES[1]].value),
        "rate_background_colour": float(larger[OCR_BACKGROUND, AXES[1]].value),
    }


def rates_numbers(found: Rates) -> dict[str, float]:
    """What the record keeps of the rates."""
    names = {PAPER_SIZED: "seventy", LARGER: "larger", ANOTHER: "another_picture"}
    return {
        f"{names[name]} {group} {axis}".replace(" ", "_"): float(rate[group, axis].value)
        for name, rate in found.items()
        for group, axis in CELLS
    }


def examples_figure(pictures: Sequence[OnePatch], answers: pd.DataFrame, model: str) -> Figure:
    """The first picture of each group with its patch magnified, its three questions and what is answered."""
    from matplotlib import pyplot as plt

    firsts = firsts_of(pictures)
    told = [answers[answers.id == picture.id] for picture in firsts]
    fig, rows = plt.subplots(3, 2, figsize=(figures.WIDTH, 5.6), width_ratios=(1, 2.6))
    for (axes, text), picture, lines in zip(rows, firsts, told, strict=True):
        _example(axes, picture)
        said = [
            f"{question}\n   expected {answer}, says {words or 'nothing'}"
            for question, answer, words in zip(lines.question, lines.answer, lines.said, strict=True)
        ]
        text.text(0, 0.5, "\n".join(said), va="center", fontsize=11)
        text.set_axis_off()
    fig.set_layout_engine("constrained", wspace=0.3)
    right = sum(int(lines.correct.sum()) for lines in told)
    figures.headline(fig, f"The first of each group: {right} of 9 answers are right")
    figures.sign(fig, model, "beside each picture its one patch, magnified")
    return fig


def firsts_of(pictures: Sequence[OnePatch]) -> list[OnePatch]:
    """The first picture of each group."""
    return [next(picture for picture in pictures if picture.group == group) for group in GROUPS]


def _example(axes: Axes, picture: OnePatch) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = picture.box
    patch, side = picture.patch, picture.side
    axes.imshow(picture.image, interpolation="none")
    outline = Rectangle((x0 - 0.5, y0 - 0.5), patch, patch, fill=False, edgecolor="#777777", linewidth=1)
    axes.add_patch(outline)
    near = axes.inset_axes((1.06, 0, 1, 1))
    around = (max(0, x0 - 2), max(0, y0 - 2), min(side, x1 + 2), min(side, y1 + 2))
    near.imshow(picture.image.crop(around), interpolation="none")
    for part in (axes, near):
        part.set_axis_off()


def words_figure(model: VisionLanguageModel, picture: OnePatch) -> Figure:
    """The nearest word of every patch where the picture enters the language model; the patch with content outlined."""
    seen = probe_picture(model, picture.image)
    x0, y0, x1, y1 = picture.box
    at = seen.grid.patch_at((x0 + x1) / 2, (y0 + y1) / 2)
    words = [best[0] for best in seen.words]
    title = f"The patch with the {picture.ink} {picture.text} on {picture.ground}: {words[at]}"
    footer = figures.signature(model.name, "EmbedLens, layer 0, one picture")
    return figures.patch_figure(seen.image, seen.grid, words, title, np.arange(len(seen.grid)) == at, footer)


# --- E46: do colour and count come with the object? ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Together:
    """Objects that are named, and whether their colour and count are right too (claim E46)."""

    named: Bool[np.ndarray, " objects"]
    colour: Bool[np.ndarray, " objects"]
    count: Bool[np.ndarray, " objects"]
    habit_both: Bool[np.ndarray, " objects"]
    """Colour and count right about another picture."""
    habit_named: Bool[np.ndarray, " objects"]

    @property
    def both(self) -> Bool[np.ndarray, " objects"]:
        """Colour and count are right."""
        return self.colour & self.count

    @property
    def among_named(self) -> Interval:
        """Share with colour and count right among the objects that are named."""
        return share(self.both[self.named])

    def finding(self) -> Finding:
        """E46."""
        named, among, by_habit = int(self.named.sum()), self.among_named, share(self.habit_both)
        verdict = together_verdict(
            named,
            float(share(self.named).low),
            float(self.habit_named.mean()),
            float(among.low),
            float(among.high),
            float(by_habit.high),
        )
        testable = verdict != claims.UNTESTABLE
        few = f"; too few are recognised to judge by (here: {FEWEST} or more, and more than by habit)."
        return Finding.of(
            among,
            named if testable else len(self.named),
            verdict,
            f"Of {named} recognised objects of {len(self.named)}, {int(self.both[self.named].sum())} get colour and "
            f"count; of the others {share(self.both[~self.named]).value:.3f} do, about another picture "
            f"{by_habit.value:.3f}" + ("." if testable else few),
        )

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        named = self.named
        return {
            "n_objects": len(named),
            "n_named": int(named.sum()),
            "n_both": int(self.both[named].sum()),
            "together": self.among_named,
            "apart": float(self.colour[named].mean() * self.count[named].mean()) if named.any() else 0.0,
            "otherwise": share(self.both[~named]).value,
            "by_habit": share(self.habit_both).value,
        }


def together(said: Answers) -> Together:
    """Which objects of the larger set are named, and which of their other answers are right."""
    objects, control = (_by_picture(said[name]) for name in (LARGER, ANOTHER))
    return Together(
        named=objects[WHAT].to_numpy(),
        colour=objects["colour"].to_numpy(),
        count=objects["count"].to_numpy(),
        habit_both=(control["colour"] & control["count"]).to_numpy(),
        habit_named=control[WHAT].to_numpy(),
    )


def together_verdict(named: int, named_low: float, habit: float, low: float, high: float, habit_high: float) -> str:
    """E46, "colour and count come with the object".

    It cannot be tested where fewer than five objects are named, or no more than by habit. It holds if more often than
    not colour and count are right too, and in part if the interval reaches that bar or lies above what habit gives.

    Args:
        named: objects that are named.
        named_low: lower bound of their share.
        habit: share that is named about another picture.
        low, high: interval of the share with colour and count right, among the named.
        habit_high: upper bound of the share with both right about another picture.

    >>> together_verdict(10, 0.2, 0.02, 0.6, 0.9, 0.1), together_verdict(4, 0.2, 0.02, 0.6, 0.9, 0.1)
    ('holds', 'not testable here')
    """
    if named < FEWEST or named_low <= habit:
        return claims.UNTESTABLE
    if low > MORE_OFTEN:
        return claims.HOLDS
    return claims.PARTLY if high > MORE_OFTEN or low > habit_high else claims.FAILS


def copies_table(said: Answers, larger: Sequence[OnePatch]) -> pd.DataFrame:
    """Right answers of each question by how many objects stand in the patch."""
    import pandas as pd

    copies = pd.Series({p.id: p.copies for p in larger if p.group == OBJECT}, name="objects in the patch")
    table = _by_picture(said[LARGER]).groupby(copies).agg(["mean", "size"]).round(2)
    return table[[*((axis, "mean") for axis in AXES), ("count", "size")]]


def ladder(
    model: VisionLanguageModel, larger: Sequence[OnePatch], named: Bool[np.ndarray, " objects"], n: int = 60
) -> dict[str, Interval]:
    """Share of objects named when the difficulties of the picture are taken away one by one.

    Args:
        larger: pictures; the first `n` objects of them are drawn again, in the same places.
        named: which objects of `larger` are named as they are.

    Returns:
        name of the rung → share of its objects that are named.
    """
    base = [picture for picture in larger if picture.group == OBJECT][:n]
    rungs = {
        "own colours, one": [replace(picture, ink=None, copies=1) for picture in base],
        "own colours, one to four": [replace(picture, ink=None) for picture in base],
        "tinted, one": [replace(picture, copies=1) for picture in base],
    }
    climbed = {name: share(ask(model, drawn, [WHAT]).correct.to_numpy()) for name, drawn in rungs.items()}
    return climbed | {"tinted, one to four": share(named[: len(base)])}  # asked above


def ladder_figure(climbed: Mapping[str, Interval], habit: float, n: int, model: str) -> Figure:
    """Objects named on each rung; a line at what is named about another picture."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 2.8))
    rows = np.arange(len(climbed))[::-1]
    figures.dots(axes, rows.astype(float), list(climbed.values()), figures.ARMS["miniature"], along="x")
    axes.axvline(habit, color=figures.CHANCE, linewidth=1.2)
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 10, "color": figures.CHANCE}
    axes.annotate("another picture", (habit, 3.45), xytext=(4, 0), **style)
    axes.set_yticks(rows, list(climbed))
    axes.set_xlim(-0.02, 1)
    axes.set_ylim(-0.5, 3.8)
    figures.percent_axis(axes.xaxis)
    axes.set_xlabel("objects named rightly")
    own, tinted = (climbed[name].value for name in ("own colours, one", "tinted, one"))
    figures.headline(fig, f"One object in its own colours is named in {own:.0%}, tinted in {tinted:.0%}")
    figures.sign(fig, model, f"n = {n} objects, Wilson's 95 % intervals")
    return fig


# --- E47: strings of one vocabulary piece ----------------------------------------------------------------------------


def splits_table(tokenizer: Any, said: Answers, larger: Sequence[OnePatch]) -> pd.DataFrame:
    """Strings of the larger set that are read, by their characters and vocabulary pieces."""
    import pandas as pd

    rows = [(len(p.text), patchbench.pieces(tokenizer, p.text), p.id) for p in larger if p.text]
    strings = pd.DataFrame(rows, columns=["characters", "pieces", "id"])
    answers = said[LARGER]
    reading = answers[answers.axis == WHAT].merge(strings, on="id").groupby(["characters", "pieces"]).correct
    read = [share(part.to_numpy()).texts()[0] for _, part in reading]
    return pd.DataFrame({"strings": reading.size(), "read": read})


@dataclass(frozen=True, eq=False)
class Halves:
    """Two-letter strings of one vocabulary piece and of several, in the same pictures (claim E47)."""

    strings: Mapping[str, int]
    """How many such strings there are; a half without a string was not asked."""
    own: Mapping[str, Float[np.ndarray, " pictures"]]
    """1 where the string of a half is read."""
    other: Mapping[str, Float[np.ndarray, " pictures"]]
    """The same about another picture of the half."""
    n: int
    seed: int

    @property
    def lead(self) -> Interval | None:
        """Strings of one piece read, less those of several, both less their control; None without both halves."""
        if len(self.own) < 2:
            return None
        one, several = (self.own[half] - self.other[half] for half in self.own)
        return mean_interval(one - several, seed=self.seed)

    def finding(self) -> Finding:
        """E47."""
        if self.lead is None:
            note = f"This vocabulary has two-letter strings of {' and '.join(self.own) or 'no kind'} only."
            return Finding.of(None, self.n, claims.UNTESTABLE, note)
        beyond = [float(mean_interval(self.own[h] - self.other[h], seed=self.seed).low) for h in self.own]
        verdict = pieces_verdict(float(self.lead.low), float(self.lead.high), beyond)
        (one, one_other), (several, several_other) = (
            (float(self.own[half].mean()), float(self.other[half].mean())) for half in self.own
        )
        return Finding.of(
            self.lead,
            self.n,
            verdict,
            "Strings of one piece read, less those of several, both less what is right about another picture: "
            f"{one:.3f} less {one_other:.3f}, against {several:.3f} less {several_other:.3f}"
            + ("; neither half is read beyond chance." if verdict == claims.UNTESTABLE else "."),
        )

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        found = self.finding()
        bounds = [x + 0.0 for x in (found.value, found.low, found.high) if x is not None]  # + 0.0: no "-0.000"
        lead = "{:.3f} ({:.3f} to {:.3f})".format(*bounds) if bounds else "not measured"
        return {"e47_note": found.note, "pieces_lead": lead, "n_blank": self.n}


def halves(model: VisionLanguageModel, pictures: Sequence[OnePatch], n: int = 40, seed: int = 0) -> Halves:
    """Ask the same pictures with strings of one piece and with strings of several, each beside its control.

    Args:
        pictures: of which the first `n` texts on white patches give place, ink and font.
        seed: of the strings drawn and of the bootstrap.
    """
    texts = patchbench.strings(model.tokenizer, length=2)
    blank = [picture for picture in pictures if picture.group == OCR][:n]
    draw = np.random.default_rng(seed)
    drawn = {kind: [replace(p, text=str(draw.choice(some))) for p in blank] for kind, some in texts.items() if some}

    def read(swap: bool) -> dict[str, np.ndarray]:
        return {half: ask(model, some, [WHAT], swap=swap).correct.to_numpy(float) for half, some in drawn.items()}

    counts = {kind: len(some) for kind, some in texts.items()}
    return Halves(counts, read(swap=False), read(swap=True), len(blank), seed)


def pieces_verdict(lead_low: float, lead_high: float, beyond: Sequence[float]) -> str:
    """E47, "strings of one piece are read, strings of several are not"; testable where one half is read at all.

    Args:
        lead_low, lead_high: interval of the lead of strings of one piece, less their controls.
        beyond: of each half, the lower bound of what is read beyond its control.

    >>> pieces_verdict(0.1, 0.3, [0.1, -0.1]), pieces_verdict(0.1, 0.3, [-0.1, -0.1])
    ('holds', 'not testable here')
    """
    return claims.judged(lead_low, lead_high) if any(low > 0 for low in beyond) else claims.UNTESTABLE


def halves_figure(found: Halves, model: str) -> Figure:
    """Strings read in each half, about its own picture and about another."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 3.0))
    best = 0.0
    for shift, label, arm, read in (
        (-0.1, "its own picture", "miniature", found.own),
        (0.1, "another picture", "another picture", found.other),
    ):
        shares = [share(part) for part in read.values()]
        best = max([best, *(float(part.high) for part in shares)])
        figures.dots(axes, np.arange(len(shares)) + shift, shares, figures.ARMS[arm], label)
    axes.set_xticks(range(len(found.own)), [f"{half}\n({found.strings[half]} strings)" for half in found.own])
    axes.set_xlim(-0.5, len(found.own) - 0.5)
    axes.set_ylim(-0.02, max(0.3, 1.35 * best))
    axes.set_ylabel("strings read")
    axes.set_title(
        "Two capitals read: " + ", ".join(f"{part.mean():.0%} of {half}" for half, part in found.own.items())
    )
    axes.legend(loc="upper center", ncols=2)
    figures.sign(fig, model, f"n = {found.n} pictures a half, Wilson's 95 % intervals")
    return fig


def _by_picture(answers: pd.DataFrame) -> pd.DataFrame:
    """Right or wrong, one row per picture of an object, one column per question."""
    objects = answers[answers.group == OBJECT]
    return objects.pivot(index="id", columns="axis", values="correct").astype(bool)
