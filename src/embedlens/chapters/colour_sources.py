"""Where the colour in an answer about one patch comes from: its text, its background, its surround (E48, E55, E56).

Section 7.1 and Appendices E and F. Pictures are `embedlens.samples.patchbench`; `follows` names what an answer follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from embedlens import claims, figures
from embedlens.claims import Finding
from embedlens.figures import Look
from embedlens.intervals import Interval, mean_interval
from embedlens.lenses import EmbedLens, LogitLens
from embedlens.samples import patchbench
from embedlens.samples.miniworld.sprites import COLOURS
from embedlens.samples.patchbench import FOLLOWS, GROUND, INK, NO_COLOUR, OBJECT, OCR, OTHER, SURROUND, OnePatch
from embedlens.trajectories import ask, by_part, colours_held, content_states, nearest_colour, share

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from embedlens.vlm import VisionLanguageModel

LOOKS = {
    INK: Look("#009E73", "o"),
    GROUND: Look("#D55E00", "X", "--", "//"),
    SURROUND: Look("#0072B2", "^", "-.", ".."),
    OTHER: Look("#BDBDBD", "s"),
    NO_COLOUR: Look("#F0F0F0", "D", hatch="xx"),
}
CHANGES = {
    "stays": Look("#BDBDBD", "o"),
    "becomes the new colour": Look("#009E73", "s", hatch="//"),
    "becomes another": Look("#F0E442", "^", hatch=".."),
}
RECOLOURED = {INK: "text", GROUND: "patch", SURROUND: "surround"}
ONE_OF = 1 / 9  # a wrong answer that is any other colour of ten


# --- E48 and E55: twins on white and on coloured patches -------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Twins:
    """Answers about the colour of a text on a white patch and of its twin on a coloured one (claims E48, E55)."""

    on_white: Float[np.ndarray, " pairs"]
    """1 where the colour is named rightly."""
    on_colour: Float[np.ndarray, " pairs"]
    habit: Float[np.ndarray, " texts"]
    """The same for texts on white, asked about another picture."""
    answers: tuple[str, ...]
    """What each answer about a coloured patch follows, one of FOLLOWS."""
    expected: tuple[Mapping[str, float], ...]
    """Of each pair, how often a wrong answer on the coloured patch follows what by chance."""
    covered: Float[np.ndarray, " pairs"]
    """Share of its patch that the text covers."""
    calls_white: Mapping[bool, float]
    """Whether the surround is white → share of the answers on white patches that say "white"."""
    situations: Mapping[str, Mapping[str, float]]
    """Kind of picture → what its answers follow, as shares."""
    n_pictures: int
    seed: int

    @property
    def errors(self) -> list[int]:
        """The pairs whose colour is not named rightly on the coloured patch."""
        return [i for i, kind in enumerate(self.answers) if kind != INK]

    @property
    def fall(self) -> Interval:
        """Right answers on white less those on colour, paired."""
        return mean_interval(self.on_white - self.on_colour, seed=self.seed)

    @property
    def wrong(self) -> dict[str, Interval]:
        """What wrong answers on coloured patches follow."""
        kinds = np.array([self.answers[i] for i in self.errors], dtype=object)
        return {kind: share(kinds == kind) for kind in FOLLOWS[1:]}

    @property
    def chance(self) -> dict[str, float]:
        """The same by chance."""
        some = [self.expected[i] for i in self.errors]
        return {kind: float(np.mean([x[kind] for x in some])) if some else 0.0 for kind in (GROUND, SURROUND, OTHER)}

    @property
    def background(self) -> Interval:
        """Share of the wrong answers that name the patch or the surround."""
        return share(np.array([self.answers[i] in (GROUND, SURROUND) for i in self.errors], dtype=bool))

    @property
    def background_chance(self) -> float:
        """The same by chance."""
        return self.chance[GROUND] + self.chance[SURROUND]

    def names(self, kind: str) -> Interval:
        """Share of all answers about coloured patches that follow something."""
        return share(np.array([said == kind for said in self.answers], dtype=bool))

    @property
    def preferred(self) -> Interval:
        """Answers that name the patch background less those that name the colour of the text, paired."""
        values = np.array([float(said == GROUND) - (said == INK) for said in self.answers])
        return mean_interval(values, seed=self.seed)

    def findings(self) -> dict[str, Finding]:
        """E48 and E55."""
        n, errors, fall, background = len(self.on_white), len(self.errors), self.fall, self.background
        sees = mean_interval(self.on_white - self.habit, seed=self.seed)
        drop = background_verdict(
            (float(fall.low), float(fall.high)),
            (float(background.low), float(background.high)) if errors else None,
            self.background_chance,
            float(sees.low),
        )
        dominant = dominant_verdict(
            float(self.preferred.low),
            float(self.preferred.high),
            float(self.names(GROUND).low),
            any(said != NO_COLOUR for said in self.answers),
        )
        return {
            "E48": Finding.of(
                fall,
                n,
                drop,
                f"Fall of colour accuracy from white to coloured patch, paired: {self.on_white.mean():.3f} to "
                f"{self.on_colour.mean():.3f}; of {errors} wrong answers there {background.value:.3f} name the patch "
                f"or the surround, by chance {self.background_chance:.3f}"
                + ("; on white no more are right than about another picture." if drop == claims.UNTESTABLE else "."),
            ),
            "E55": Finding.of(
                self.preferred,
                n,
                dominant,
                f"Share of answers that name the patch background ({self.names(GROUND).value:.3f}) less those that "
                f"name the colour of the text ({self.names(INK).value:.3f}), coloured patches"
                + ("; no answer names a colour." if dominant == claims.UNTESTABLE else "."),
            ),
        }

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        faint = self.covered <= np.median(self.covered)
        ground = np.array([said == GROUND for said in self.answers])
        return {
            "follow_ground": self.names(GROUND).value,
            "on_white": self.on_white.mean(),
            "on_colour": self.on_colour.mean(),
            "fall": self.fall,
            "n_pairs": len(self.on_white),
            "n_errors": len(self.errors),
            "background": self.background,
            "background_chance": self.background_chance,
            "white_on_white": self.calls_white[True],
            "white_in_colour": self.calls_white[False],
            "ink_share": self.covered.mean(),
            "names_ground": self.names(GROUND),
            "names_ink": self.names(INK),
            "names_surround": self.names(SURROUND).value,
            "preferred": self.preferred,
            "ground_less": share(ground[faint]).value,
            "ground_more": share(ground[~faint]).value,
        }

    def numbers(self) -> dict[str, float]:
        """What the record keeps of it."""
        return {f"wrong_follow_{kind}".replace(" ", "_"): float(part.value) for kind, part in self.wrong.items()}

    def wrong_table(self) -> pd.DataFrame:
        """What wrong answers on coloured patches follow, beside chance."""
        import pandas as pd

        columns = {
            "share of wrong answers": [part.texts()[0] for part in self.wrong.values()],
            "chance": [round(self.chance.get(kind, 0.0), 2) for kind in self.wrong],
        }
        return pd.DataFrame(columns, index=pd.Index(self.wrong, name="follows"))


def twins(pictures: Sequence[OnePatch], answers: pd.DataFrame, control: pd.DataFrame, seed: int = 0) -> Twins:
    """Pair the answers about texts on white patches with those about their twins on coloured ones.

    Args:
        pictures: with twins, as `patchbench.pictures` draws them.
        answers: about these pictures, as `trajectories.ask` gives them.
        control: the same questions about other pictures.
        seed: of the bootstrap.
    """
    colour = answers[answers.axis == "colour"].set_index("id")
    pairs = patchbench.twins(pictures)
    on_white, on_colour = (colour.loc[[pair[i].id for pair in pairs]].correct.to_numpy(float) for i in (0, 1))
    other = control[(control.axis == "colour") & (control.group == OCR)]
    white: dict[bool, list[float]] = {True: [], False: []}
    for plain, _ in pairs:
        says = patchbench.canonical(str(colour.loc[plain.id].said)) == "white"
        white[plain.surround == "white"].append(float(says))
    situations = {
        "object": [p for p in pictures if p.group == OBJECT],
        "text on white,\nwhite surround": [a for a, _ in pairs if a.surround == "white"],
        "text on white,\ncoloured surround": [a for a, _ in pairs if a.surround != "white"],
        "text on colour,\nwhite surround": [b for _, b in pairs if b.surround == "white"],
        "text on colour,\ncoloured surround": [b for _, b in pairs if b.surround != "white"],
    }
    followed = {
        name: colour.loc[[p.id for p in some]].follows.value_counts(normalize=True).reindex(FOLLOWS, fill_value=0)
        for name, some in situations.items()
        if some
    }
    return Twins(
        on_white=on_white,
        on_colour=on_colour,
        habit=other.correct.to_numpy(float),
        answers=tuple(str(colour.loc[b.id].follows) for _, b in pairs),
        expected=tuple(patchbench.expected_by_chance(b) for _, b in pairs),
        covered=np.array([float(b.covered.mean()) for _, b in pairs]),
        calls_white={which: float(np.mean(said or [0.0])) for which, said in white.items()},
        situations={name: {kind: float(part[kind]) for kind in FOLLOWS} for name, part in followed.items()},
        n_pictures=len(colour),
        seed=seed,
    )


def background_verdict(
    fall: tuple[float, float], follow: tuple[float, float] | None, chance: float, sees_low: float
) -> str:
    """E48, "colour accuracy declines, and wrong answers follow the background".

    It holds if both are so beyond chance, and does not hold if neither is and one is refuted; else it holds in part.
    It cannot be tested where no more colours are named rightly on white than about another picture.

    Args:
        fall: interval of the fall of accuracy.
        follow: interval of the share of wrong answers that name patch or surround; None: no answer is wrong.
        chance: that share by chance.
        sees_low: lower bound of the right answers on white less those about another picture.

    >>> background_verdict((0.1, 0.2), (0.5, 0.7), 0.2, 0.3), background_verdict((-0.1, 0.2), (0.1, 0.3), 0.2, 0.3)
    ('holds', 'partly')
    """
    if sees_low <= 0:
        return claims.UNTESTABLE
    drops, follows = fall[0] > 0, follow is not None and follow[0] > chance
    refuted = fall[1] <= 0 or (follow is not None and follow[1] <= chance)
    if drops and follows:
        return claims.HOLDS
    return claims.FAILS if refuted and not (drops or follows) else claims.PARTLY


def dominant_verdict(preferred_low: float, preferred_high: float, ground_low: float, told: bool) -> str:
    """E55, "the dominant colour of the patch is named instead of that of the text".

    It holds if the patch is named more often than the text, and in part if it may be or if the patch is named more
    often than one colour in nine. It cannot be tested where no answer names a colour.

    Args:
        preferred_low, preferred_high: interval of the answers that name the patch less those that name the text.
        ground_low: lower bound of the share that names the patch.
        told: some answer names a colour.

    >>> dominant_verdict(0.1, 0.3, 0.4, True), dominant_verdict(-0.3, -0.1, 0.2, True)
    ('holds', 'partly')
    """
    if not told:
        return claims.UNTESTABLE
    if preferred_low > 0:
        return claims.HOLDS
    return claims.PARTLY if ground_low > ONE_OF or preferred_high > 0 else claims.FAILS


def follows_figure(found: Twins, model: str) -> Figure:
    """What answers about colour name, by kind of picture."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.6))
    figures.stacked_bars(axes, found.situations, LOOKS)
    axes.set_xlabel("colour that the answer names: that of the ...")
    white, colour = found.on_white.mean(), found.on_colour.mean()
    figures.headline(fig, f"Colour of the text: {white:.0%} right on white, {colour:.0%} on a coloured patch")
    figures.sign(fig, model, f"n = {found.n_pictures} pictures")
    return fig


def wrong_figure(found: Twins, model: str) -> Figure:
    """What wrong answers about texts on coloured patches name, with chance."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 3.0))
    kinds = list(reversed(found.wrong))
    for row, kind in enumerate(kinds):
        value, low, high = (float(x) for x in found.wrong[kind])
        look, at = LOOKS[kind], found.chance.get(kind, 0.0)
        axes.barh(row, value, color=look.colour, hatch=look.hatch, edgecolor="#888888", height=0.6)
        axes.plot([low, high], [row, row], color="#333333", linewidth=1.5)
        label = None if row else "chance"
        axes.plot([at, at], [row - 0.42, row + 0.42], color=figures.FACT, linewidth=2, label=label)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlim(0, 1)
    figures.percent_axis(axes.xaxis)
    axes.set_xlabel("wrong answers that name its colour")
    axes.legend(loc="lower right")
    figures.headline(fig, f"{found.background.value:.0%} of the wrong colours are the patch's or the surround's")
    figures.sign(fig, model, f"n = {len(found.errors)} wrong answers on coloured patches, Wilson's 95 % intervals")
    return fig


# --- E56: one thing recoloured at a time -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Recoloured:
    """Texts on white patches in coloured surrounds, each with one thing recoloured (claim E56).

    Keys of the mappings are INK, GROUND and SURROUND: what is recoloured, or whose colour is meant.
    """

    cases: tuple[OnePatch, ...]
    changed: Mapping[str, tuple[OnePatch, ...]]
    said: tuple[str, ...]
    """The answer to each case as it is drawn."""
    said_then: Mapping[str, tuple[str, ...]]
    says_surround: Bool[np.ndarray, " cases"]
    """The answer to the case as it is names the colour of the surround."""
    held: Mapping[str, Mapping[str, Bool[np.ndarray, "cases layers"]]]
    """Lens → part → whether the five nearest words of the patch hold its colour."""
    nearest: Mapping[str, Mapping[str, Bool[np.ndarray, "cases layers"]]]
    """Lens → part → whether the nearest name of a colour is its colour."""
    seed: int

    def turned(self, part: str) -> Bool[np.ndarray, " cases"]:
        """Whether the answer is the new colour once a part is recoloured."""
        new = [picture.ink for picture in self.changed[INK]]
        then = map(patchbench.canonical, self.said_then[part])
        return np.array([word == colour for word, colour in zip(then, new, strict=True)], dtype=bool)

    def kept(self, part: str) -> Bool[np.ndarray, " cases"]:
        """Whether the answer stays as it was."""
        pairs = zip(self.said_then[part], self.said, strict=True)
        return np.array([patchbench.canonical(a) == patchbench.canonical(b) for a, b in pairs], dtype=bool)

    @property
    def like_the_paper(self) -> Bool[np.ndarray, " cases"]:
        """Says the surround, keeps it when the text turns, follows the surround, and has no word for it anywhere."""
        silent = ~self.held["EmbedLens"][SURROUND].any(1)
        return self.says_surround & self.kept(INK) & self.turned(SURROUND) & silent

    @property
    def more(self) -> Interval:
        """Answers that turn with the surround less those that turn with the text, paired."""
        return mean_interval(self.turned(SURROUND).astype(float) - self.turned(INK), seed=self.seed)

    def finding(self) -> Finding:
        """E56."""
        lows = [float(share(self.turned(part)).low) for part in self.changed]
        pattern = self.like_the_paper
        verdict = recolouring_verdict(float(self.more.low), bool(pattern.any()), lows)
        return Finding.of(
            self.more,
            len(self.cases),
            verdict,
            f"Answers that turn with the surround ({self.turned(SURROUND).mean():.3f}) less those that turn with the "
            f"text ({self.turned(INK).mean():.3f}); {int(pattern.sum())} of {len(self.cases)} cases show the whole "
            "pattern of the paper"
            + ("; no change turns answers beyond chance." if verdict == claims.UNTESTABLE else "."),
        )

    def told(self) -> dict[str, Any]:
        """What the prose says of it."""
        held = self.held["EmbedLens"]
        return {
            "turned_surround": self.turned(SURROUND).mean(),
            "turned_ink": self.turned(INK).mean(),
            "turned_ground": self.turned(GROUND).mean(),
            "more": self.more,
            "n_cases": len(self.cases),
            "like_the_paper": share(np.asarray(self.like_the_paper)),
            "n_colours": len(COLOURS),
            "silent": 1 - held[SURROUND].any(1).mean(),
            "silent_ink": 1 - held[INK].any(1).mean(),
        }

    def numbers(self) -> dict[str, float]:
        """What the record keeps of it."""
        return {f"turned_with_{part}".replace(" ", "_"): float(self.turned(part).mean()) for part in self.changed}

    @property
    def one(self) -> int:
        """The case to show: the first with a digit, or the first of all."""
        return next((i for i, picture in enumerate(self.cases) if picture.text.isdigit()), 0)

    @property
    def versions(self) -> dict[str, OnePatch]:
        """That case as drawn and with one thing recoloured."""
        changed = {RECOLOURED[part]: pictures[self.one] for part, pictures in self.changed.items()}
        return {"as drawn": self.cases[self.one]} | changed

    def held_table(self) -> pd.DataFrame:
        """How often the five nearest words of the patch hold a colour of the picture."""
        import pandas as pd

        rows = {
            (lens, part): [share(part_held).texts()[0] for part_held in (np.asarray(values.any(1)), values[:, 0])]
            for lens, parts in self.held.items()
            for part, values in parts.items()
        }
        table = pd.DataFrame(rows, index=["among five, at any layer", "among five, at layer 0"])
        return table.T.rename_axis(["lens", "colour of"])


def recoloured(model: VisionLanguageModel, pictures: Sequence[OnePatch], n: int = 60, seed: int = 0) -> Recoloured:
    """Recolour the text, the patch and the surround of the same pictures, one at a time, and ask for the colour.

    Args:
        pictures: of which the first `n` texts on white patches in coloured surrounds are taken.
        seed: of the bootstrap.

    Raises:
        EmbedLensError: no such picture.
    """
    cases = [picture for picture in pictures if picture.group == OCR and picture.surround != "white"][:n]
    changed = {part: tuple(patchbench.probes(p)[part] for p in cases) for part in (INK, GROUND, SURROUND)}
    before = ask(model, cases, ["colour"])
    after = {part: tuple(ask(model, some, ["colour"]).said) for part, some in changed.items()}
    states = content_states(model, cases)
    readers = _readers(model)
    read = [(name, reader, model.tokenizer, states) for name, reader in readers.items()]
    return Recoloured(
        cases=tuple(cases),
        changed=changed,
        said=tuple(before.said),
        said_then=after,
        says_surround=before.follows.to_numpy() == SURROUND,
        held={name: by_part(cases, colours_held(*rest)) for name, *rest in read},
        nearest={name: by_part(cases, nearest_colour(*rest)) for name, *rest in read},
        seed=seed,
    )


def recolouring_verdict(more_low: float, pattern: bool, turned_lows: Sequence[float]) -> str:
    """E56, "the answer follows the surround, of which no word is at the patch".

    It holds if answers follow the surround more than the text and the whole pattern of the paper occurs, in part if
    one of the two is so. It cannot be tested where no change turns answers beyond one colour in nine.

    Args:
        more_low: lower bound of the answers that turn with the surround less those that turn with the text.
        pattern: some case shows the whole pattern.
        turned_lows: lower bounds of the share that turns with each change.

    >>> recolouring_verdict(0.1, True, [0.2, 0.1]), recolouring_verdict(0.1, False, [0.2, 0.1])
    ('holds', 'partly')
    """
    moved = any(low > ONE_OF for low in turned_lows)
    return claims.counted([more_low > 0, pattern]) if moved else claims.UNTESTABLE


def recoloured_figure(found: Recoloured, model: str) -> Figure:
    """What becomes of the answer when the text, its patch or the surround is recoloured."""
    from matplotlib import pyplot as plt

    parts = {}
    for part in found.changed:
        stays, turns = found.kept(part), found.turned(part)
        shares = (stays.mean(), turns.mean(), (~stays & ~turns).mean())
        parts[f"the {RECOLOURED[part]}"] = dict(zip(CHANGES, map(float, shares), strict=True))
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 3.4))
    figures.stacked_bars(axes, parts, CHANGES)
    axes.set_xlabel("the answer ...")
    axes.set_ylabel("recoloured:")
    turned = ((name.removeprefix("the "), shares["becomes the new colour"]) for name, shares in parts.items())
    said = ", ".join(f"{name} {share:.0%}" for name, share in turned)
    figures.headline(fig, f"Recolouring turns: {said}")
    figures.sign(fig, model, f"n = {len(found.cases)} texts on white patches in coloured surrounds")
    return fig


def versions_figure(found: Recoloured, model: str) -> Figure:
    """One case in its four versions, with what is said of each."""
    from matplotlib import pyplot as plt

    heard = [found.said[found.one], *(said[found.one] for said in found.said_then.values())]
    fig, row = plt.subplots(1, 4, figsize=(figures.WIDTH, 2.9))
    for axes, (name, picture), words in zip(row, found.versions.items(), heard, strict=True):
        x0, y0, x1, y1 = picture.box
        side, patch = picture.side, picture.patch
        around = (max(0, x0 - patch), max(0, y0 - patch), min(side, x1 + patch), min(side, y1 + patch))
        axes.imshow(picture.image.crop(around), interpolation="none")
        axes.set_axis_off()
        said = f"{name}{'' if name == 'as drawn' else ' recoloured'}\nsays {words}"
        axes.set_title(said, fontsize=11, fontweight="normal")
    inks = ", ".join(str(picture.ink) for picture in found.versions.values())
    figures.headline(fig, f"Color of the text? Expected: {inks}")
    figures.sign(fig, model, "one case, its patch and the patches around it")
    return fig


def versions_table(model: VisionLanguageModel, found: Recoloured) -> pd.DataFrame:
    """The three nearest words of the one patch with content, by layer, for versions of the case shown."""
    import pandas as pd

    readers, names = _readers(model), list(found.versions)
    states = content_states(model, list(found.versions.values()))
    columns = {}
    for lens, version in (("EmbedLens", 0), ("EmbedLens", 1), ("EmbedLens", 3), ("LogitLens", 0)):
        name = f"{lens}, {names[version]}{' recoloured' if version else ''}"
        columns[name] = ["  ".join(words) for words in readers[lens].words(states[version], 3)]
    return pd.DataFrame(columns, index=pd.RangeIndex(model.n_layers + 1, name="layer"))


def nearest_figure(found: Recoloured, model: str) -> Figure:
    """How often the nearest name of a colour is that of the text, its patch or the surround, by layer and lens."""
    from matplotlib import pyplot as plt

    fig, panels = plt.subplots(2, 1, figsize=(figures.WIDTH, 6.2), sharex=True, sharey=True)
    parts = (INK, GROUND, SURROUND)
    for axes, (lens, nearest) in zip(panels, found.nearest.items(), strict=True):
        for part in parts:
            by_layer = mean_interval(nearest[part].astype(float), seed=found.seed)
            figures.layer_curve(axes, *by_layer, part, LOOKS[part])
        figures.chance_curve(axes, np.full(nearest[INK].shape[1], 1 / len(COLOURS)), "chance", ":")
        axes.set_title(lens, fontsize=12, fontweight="normal")
        axes.set_ylabel("share of the cases")
        axes.set_ylim(-0.02, 1.02)
        figures.label_ends(axes, least=0.09)
    panels[0].set_xlabel("")
    means = {part: float(found.nearest["EmbedLens"][part].mean()) for part in parts}
    top = max(parts, key=lambda part: means[part])
    figures.headline(fig, f"EmbedLens: the nearest colour name is the {top}'s in {means[top]:.0%}")
    figures.sign(fig, model, f"n = {len(found.cases)} texts on white patches in coloured surrounds")
    return fig


def _readers(model: VisionLanguageModel) -> dict[str, EmbedLens | LogitLens]:
    return {"EmbedLens": EmbedLens.from_model(model), "LogitLens": LogitLens.from_model(model)}
