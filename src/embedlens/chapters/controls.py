"""What pruning dead tokens costs, beside as many alive ones: Table 2 with the controls that it lacks (Section 5.1).

The paper's control takes "the same number" of remaining tokens away, once; its released code takes as many as dead
tokens and sinks together. Here both sizes are drawn from the alive tokens, with several seeds, and a third control
takes a connected block: dead tokens lie side by side, tokens drawn at random hit every object of a picture.

Scores are the paper's: four families and the mean of these, Avg. Every arm is compared with the baseline on the same
questions, with a bootstrap over pictures. In every seed each picture has its own draw, so that the pictures that are
drawn bring their draws along: the interval covers both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from embedlens import claims, figures, printed, sweep
from embedlens.chapters.emptiness import OF_STAND_IN
from embedlens.claims import FAILS, HOLDS, PARTLY, Finding
from embedlens.errors import EmbedLensError
from embedlens.figures import Look
from embedlens.groups import Reference, TokenGroups, token_groups_of
from embedlens.intervals import Interval, ratio_interval
from embedlens.paired import AVG, LEVEL, MARGIN, Comparison, compare
from embedlens.patches import PatchGrid
from embedlens.samples.miniworld.scene import LONG_SIDE
from embedlens.sweep import SEEDS, Arm, Select
from embedlens.tasks import FAMILIES, Item, family_scores, questionnaires

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from embedlens.vlm import Prompt, VisionLanguageModel

DEAD, BOTH = "-dead", "-dead and sinks"
RANDOM, MORE, BLOCK = "-random, as many as dead", "-random, as many as dead and sinks", "-block, as many as dead"
A_THIRD_MORE = "-random, a third more than dead"
THIRD = 4 / 3  # of the dead tokens: the paper's 30 % dead and 40 % dead or sink
ORIGINAL = "grounding, original frame"
SCORES = (*FAMILIES, AVG)
LOOKS: Mapping[str, Look] = {
    DEAD: figures.GROUPS["dead"],
    BOTH: Look(figures.GROUPS["dead"].colour, "P"),
    RANDOM: Look(figures.GROUPS["alive"].colour, "o"),
    MORE: Look(figures.GROUPS["alive"].colour, "s"),
    A_THIRD_MORE: Look(figures.GROUPS["alive"].colour, "s"),
    BLOCK: Look(figures.ORDER[0], "D"),
}
#: What a comparison's verdict says, in a sentence.
SHOWN = {
    "improvement": "a gain",
    "degradation": "a loss",
    "no degradation shown": f"no change beyond {100 * MARGIN:g} point",
    "undecided": "neither a gain nor a loss is shown",
}
#: Share of the visual tokens that the paper removes, in per cent: "about 30 %", and sinks up to "about 40 %".
PAPER_REMOVED = {"-dead": (30.0, 30.0), "-remaining": (30.0, 40.0)}


# --- asking ----------------------------------------------------------------------------------------------------------


def has_sinks(reference: Reference) -> bool:
    """Whether a model has sinks of either kind; without, "as many as dead and sinks" is as many as dead."""
    return reference.vit_norm is not None or bool(reference.sink_dims)


def some_left(
    groups: TokenGroups, grid: PatchGrid, rng: np.random.Generator, names: Sequence[str]
) -> Bool[Tensor, " n"]:
    """The tokens of some groups; none where these are all tokens of the picture, which cannot be pruned."""
    chosen = sweep.members(groups, grid, rng, names)
    return chosen & ~chosen.all()


def a_third_more(groups: TokenGroups, grid: PatchGrid, rng: np.random.Generator) -> Bool[Tensor, " n"]:
    """Alive tokens at random, a third more than there are dead ones; all of them where they are fewer."""
    return sweep.random_tokens(groups.alive, round(THIRD * int(groups.dead.sum())), rng)


def arms_of(reference: Reference, seeds: int = SEEDS) -> list[Arm]:
    """The rows of Table 2, and pruning of dead tokens and sinks, as the released script has it, where there are any."""
    dead, both = ("dead",), ("dead", "ViT sink", "LLM sink")
    return [
        sweep.BASELINE,
        sweep.pruning(DEAD, partial(some_left, names=dead)),
        *([sweep.pruning(BOTH, partial(some_left, names=both))] if has_sinks(reference) else []),
        *sweep.repeated(RANDOM, partial(sweep.random_alive, matched=dead), seeds),
    ]


def further_controls(reference: Reference, seeds: int = SEEDS) -> list[Arm]:
    """A larger random control, and a connected block as large as the dead tokens.

    A model without sinks has no second size; its stand-in is a third more than the dead tokens, the paper's ratio.
    """
    both: Select = partial(sweep.random_alive, matched=("dead", "ViT sink", "LLM sink"))
    larger = (MORE, both) if has_sinks(reference) else (A_THIRD_MORE, a_third_more)
    block = partial(sweep.block_alive, matched=("dead",))
    return [*sweep.repeated(*larger, seeds), *sweep.repeated(BLOCK, block, seeds)]


@dataclass(frozen=True, eq=False)
class Asked:
    """What was answered under every arm of `arms_of`."""

    table: pd.DataFrame
    """One row per question, arm and seed, as `sweep.run_arms` gives it."""
    stand_in: bool
    """Whether C0, a picture's largest cluster, stands in for dead tokens."""
    n_visual: float
    """Visual tokens of a picture, mean."""
    n_alive: float
    """Alive tokens of a picture, mean."""


def items_for(model: VisionLanguageModel, n: int = 200, seed: int = 0) -> list[Item]:
    """`n` questions of each family on `n` pictures, drawn as large as the model reads them."""
    return questionnaires(n, seed, scale=max(1.0, model.canvas_side / LONG_SIDE))


def ask(
    model: VisionLanguageModel,
    items: Sequence[Item],
    reference: Reference,
    membership: str = "top3",
    seeds: int = SEEDS,
    every: int = 2,
) -> Asked:
    """Every question under every arm; the further controls are asked about one picture in `every` where that is enough.

    Args:
        model: from `embedlens.load`.
        items: of all four families, from `questionnaires` or `tasks.family_questions`.
        reference, membership: as for `token_groups`.
        seeds: repeats of each random control.

    Raises:
        EmbedLensError: no picture has a dead token, so that there is nothing to prune.
    """
    import pandas as pd

    seen: list[TokenGroups] = []

    def groups(model: VisionLanguageModel, prompts: Sequence[Prompt]) -> list[TokenGroups]:
        found = token_groups_of(model, prompts, reference, membership)
        seen.extend(found)
        return found

    table = sweep.run_arms(model, items, arms_of(reference, seeds), groups)
    if not any(bool(found.dead.any()) for found in seen):
        raise EmbedLensError("no picture has a dead token to prune: pass membership='cluster', the stand-in")
    sizes = np.array([(len(found.alive), int(found.alive.sum())) for found in seen])
    n_visual, n_alive = (float(mean) for mean in sizes.mean(0))
    pictures = set(list(dict.fromkeys(item.sample.id for item in items))[::every])
    places = np.array([place for place, item in enumerate(items) if item.sample.id in pictures])
    if not _of_every_metric((items[place].question.family, items[place].question.kind) for place in places):
        places = np.arange(len(items))  # too few to choose from
    further = sweep.run_arms(model, [items[place] for place in places], further_controls(reference, seeds), groups)
    further["item"] = places[further["item"].to_numpy()]
    return Asked(pd.concat([table, further], ignore_index=True), membership == "cluster", n_visual, n_alive)


# --- comparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cost:
    """What each arm costs against the baseline, on the same questions."""

    model: str
    """As passed to `embedlens.load`; figures are signed with it."""
    stand_in: bool
    """Whether C0, a picture's largest cluster, stands in for dead tokens."""
    of: Mapping[tuple[str, str], Comparison]
    """(arm, one of SCORES or ORIGINAL) → comparison with the baseline."""
    per_seed: Mapping[str, tuple[float, ...]]
    """Arm → difference of Avg of each seed."""
    removed: Mapping[str, float]
    """Arm → tokens removed of a picture, mean."""
    n_visual: float
    """Visual tokens of a picture, mean."""
    alive_removed: float
    """Share of the alive tokens that the control as large as the dead ones removes."""
    short: float
    """Share of the pictures with fewer alive than dead tokens, where controls of that size remove all alive ones."""
    matched: Comparison | None
    """Avg under RANDOM in the other pictures only; None where these do not ask of every family."""
    frame: Interval
    """What pruning dead tokens changes of grounding read in the original frame, less what it changes in the padded."""
    beside_dead: Mapping[str, Comparison]
    """Random control → its Avg less that under DEAD."""
    size: Comparison
    """Avg under the larger random control less that under the smaller."""
    shape: Comparison
    """Avg under the block less that under as many scattered tokens."""

    @property
    def arms(self) -> list[str]:
        """In the order of `arms_of`."""
        return list(self.removed)

    @property
    def larger(self) -> str:
        """The second size of random control that was run."""
        return next(arm for arm in self.arms if arm in (MORE, A_THIRD_MORE))

    @property
    def pictures(self) -> int:
        return self.of[DEAD, AVG].pictures

    @property
    def questions(self) -> int:
        """Of all families together."""
        return self.of[DEAD, AVG].questions


def costs(asked: Asked, model: str, seed: int = 0) -> Cost:
    """Compare every arm with the baseline.

    Args:
        asked: from `ask`.
        model: the name to sign figures with.
        seed: of the bootstrap.
    """
    table = asked.table

    def against(arm: str, name: str = AVG, baseline: str = "baseline", **options: Any) -> Comparison:
        """On the questions that both were asked."""
        common = table["item"].isin(table.loc[table["arm"] == arm, "item"])
        return compare(table[common], arm, name, baseline, seed=seed, **options)

    arms = [arm for arm in dict.fromkeys(table["arm"]) if arm != "baseline"]
    larger = next(arm for arm in arms if arm in (MORE, A_THIRD_MORE))
    of = {(arm, name): against(arm, name) for arm in arms for name in SCORES}
    of |= {(arm, ORIGINAL): against(arm, "grounding", correct="correct_original") for arm in arms}
    sizes = table.groupby(["arm", "id"])["tokens"].mean()
    fewer = sizes[RANDOM] < sizes[DEAD]
    return Cost(
        model=model,
        stand_in=asked.stand_in,
        of=of,
        per_seed={arm: _per_seed(table, arm) for arm in arms},
        removed={arm: float(sizes[arm].mean()) for arm in arms},
        n_visual=asked.n_visual,
        alive_removed=float(sizes[RANDOM].mean() / max(asked.n_alive, 1)),
        short=float(fewer.mean()),
        matched=_matched(table, fewer[~fewer].index, seed),
        frame=_frame(table, seed),
        beside_dead={arm: against(arm, baseline=DEAD) for arm in (RANDOM, larger, BLOCK)},
        size=against(larger, baseline=RANDOM),
        shape=against(BLOCK, baseline=RANDOM),
    )


def _per_seed(table: pd.DataFrame, arm: str) -> tuple[float, ...]:
    """Difference of Avg of each seed, without intervals."""
    own = table[table["arm"] == arm]
    base = family_scores(table[(table["arm"] == "baseline") & table["item"].isin(own["item"])])[AVG]
    return tuple(family_scores(rows)[AVG] - base for _, rows in own.groupby("seed"))


def _frame(table: pd.DataFrame, seed: int) -> Interval:
    """Mean over boxes of what the two frames' changes differ by."""
    boxes = table[table["family"] == "grounding"]
    shift = (boxes["correct_original"] - boxes["correct"]).groupby([boxes["arm"], boxes["id"], boxes["item"]]).mean()
    moved = (shift[DEAD] - shift["baseline"]).groupby("id")
    return ratio_interval(moved.sum().to_numpy(), moved.count().to_numpy(), seed=seed)


def _matched(table: pd.DataFrame, pictures: pd.Index, seed: int) -> Comparison | None:
    """RANDOM against the baseline in some pictures; None where a metric has no question about them."""
    inside = table[table["id"].isin(pictures)]
    if not _of_every_metric(zip(inside["family"], inside["kind"], strict=True)):
        return None
    return compare(inside, RANDOM, AVG, seed=seed)


def _of_every_metric(kinds: Iterable[tuple[str, str]]) -> bool:
    """Whether pairs of family and kind hold something for each metric of each family, so that there is an Avg."""
    asked = set(kinds)
    return all(
        any((family, kind) in asked for kind in metric.kinds)
        for family, metrics in FAMILIES.items()
        for metric in metrics
    )


def questions_needed(found: Comparison) -> int:
    """How many questions an arm that changes nothing would need to be shown to stay within the margin.

    As many about each picture as were asked. What a bootstrap draws narrows with the root of the pictures; what it
    cannot draw, the bound on changes that no picture showed, with their number (`paired.compare`). With a difference
    other than zero it takes more, or the margin is never kept.

    >>> from embedlens.paired import compare_answers
    >>> changed = [1.0] * 80 + [0.0] * 110 + [1.0] * 10
    >>> questions_needed(compare_answers([1.0] * 90 + [0.0] * 110, changed)) > 2000
    True
    >>> questions_needed(compare_answers(changed, changed))
    268
    """
    from scipy.stats import norm

    squared = norm.ppf(LEVEL) ** 2  # both sides of the 90 % interval
    half, unseen = (found.narrow_high - found.narrow_low) / 2, squared / (found.pictures + squared)
    pictures = squared * (1 / found.margin - 1)
    if half > unseen + 1e-9:
        pictures = max(pictures, found.pictures * (half / found.margin) ** 2)
    return math.ceil(pictures * found.questions / found.pictures)


# --- judging ---------------------------------------------------------------------------------------------------------


def e32(cost: Cost) -> Finding:
    """Pruning dead tokens improves Avg: holds above zero by the whole interval, does not below it, else partly."""
    avg, boxes = cost.of[DEAD, AVG], cost.of[DEAD, "grounding"]
    note = f"Avg without dead tokens less the baseline: {avg.verdict}; grounding {_points(boxes)}, {boxes.verdict}."
    return _finding(cost, avg, claims.judged(avg.low, avg.high), note)


def e33(cost: Cost) -> Finding:
    """As many alive tokens hurt: holds if Avg and grounding degrade; does not if Avg loses less than the margin.

    Partly if one of the two degrades, or if neither a loss nor its absence is shown.
    """
    avg, boxes = cost.of[RANDOM, AVG], cost.of[RANDOM, "grounding"]
    hurt = [found.verdict == "degradation" for found in (avg, boxes)]
    verdict = HOLDS if all(hurt) else FAILS if avg.not_worse and not any(hurt) else PARTLY
    note = (
        f"Avg without as many alive tokens, mean of {avg.seeds} seeds: {SHOWN[avg.verdict]}; grounding "
        f"{_points(boxes)}: {SHOWN[boxes.verdict]}; Avg less that without dead tokens "
        f"{_points(cost.beside_dead[RANDOM])}."
    )
    return _finding(cost, avg, verdict, note)


def findings(cost: Cost) -> dict[str, Finding]:
    """Claim → what was found."""
    return {"E32": e32(cost), "E33": e33(cost)}


def _finding(cost: Cost, found: Comparison, verdict: str, note: str) -> Finding:
    if cost.stand_in:
        verdict, note = PARTLY if verdict == HOLDS else verdict, f"{note}{OF_STAND_IN}"
    return Finding(found.difference, found.low, found.high, found.pictures, verdict, note)


# --- showing ---------------------------------------------------------------------------------------------------------


def difference_table(cost: Cost) -> pd.DataFrame:
    """Points by which each arm differs from the baseline, one column an arm; the baseline's own scores come first."""
    import pandas as pd

    rows = (*FAMILIES, ORIGINAL, AVG)
    columns = {
        "baseline, score": {"tokens removed": "0", "pictures": f"{cost.pictures}"}
        | {name: f"{100 * cost.of[DEAD, name].baseline:.1f}" for name in rows}
    }
    for arm in cost.arms:
        found = cost.of[arm, AVG]
        columns[_called(cost, arm)] = {"tokens removed": f"{cost.removed[arm]:.1f}", "pictures": f"{found.pictures}"}
        columns[_called(cost, arm)] |= {name: _points(cost.of[arm, name], "") for name in rows}
    return pd.DataFrame(columns)


def verdict_table(cost: Cost, arm: str = DEAD) -> pd.DataFrame:
    """One arm against the baseline by family: answers that changed, the tests, and what would decide."""
    import pandas as pd

    rows = {}
    for name in (*FAMILIES, ORIGINAL, AVG):
        found = cost.of[arm, name]
        rows[name] = {
            "questions": found.questions,
            "became wrong": f"{found.lost:g}",
            "became right": f"{found.gained:g}",
            "McNemar's p": "–" if math.isnan(found.p) else f"{found.p:.3f}",
            "difference (90 %)": _range(found.difference, found.narrow_low, found.narrow_high, ""),
            "verdict": found.verdict,
            "questions for 1 point": questions_needed(found),
        }
    return pd.DataFrame(rows).T


def printed_table() -> pd.DataFrame:
    """Tables 2 and b of the paper: changes in points, as Table 2 prints them and as the scores of Table b give them."""
    import pandas as pd

    columns = (*printed.FAMILIES, AVG)
    first = (*printed.TABLE_2[0].families, printed.TABLE_2[0].avg)
    follow = printed.changes(printed.TABLE_B)
    rows = {"LLaVA-1.5-7B, score": [f"{value:.1f}" for value in first]}
    for row in printed.TABLE_2[1:]:
        shown = [value - base for value, base in zip((*row.families, row.avg), first, strict=True)]
        rows[f"{row.name}, Table 2"] = [f"{value:+.1f}" for value in shown]
        rows[f"{row.name}, from Table b"] = [f"{follow[row.name][name]:+.2f}" for name in columns]
    return pd.DataFrame(rows, index=columns).T


def cost_figure(cost: Cost) -> Figure:
    """Points of Avg against tokens removed: this model on the left, the paper's two rows, printed, on the right."""
    from matplotlib import pyplot as plt

    fig, panes = plt.subplots(1, 2, figsize=(figures.WIDTH, 4.4), width_ratios=(2.4, 1))
    for arm in cost.arms:
        found, look, at = cost.of[arm, AVG], LOOKS[arm], cost.removed[arm]
        if len(cost.per_seed[arm]) > 1:
            seeds = 100 * np.array(cost.per_seed[arm])
            beside = at - 0.02 * cost.n_visual
            panes[0].plot([beside] * len(seeds), seeds, look.marker, color=look.colour, markersize=3, alpha=0.6)
        spread = Interval(*(100 * np.array(part) for part in (found.difference, found.low, found.high)))
        figures.dots(panes[0], np.array([at]), [spread], look, _called(cost, arm).removeprefix("-"))
    panes[0].set_xlim(0, 2.1 * max(cost.removed.values()))
    panes[0].set_xlabel(f"visual tokens removed, of {cost.n_visual:.0f}")
    panes[0].set_ylabel("change of Avg, points")
    _name_arms(panes[0], cost)
    _draw_paper(panes[1])
    for axes in panes:
        axes.axhline(0, color=figures.CHANCE, linewidth=1.0)
    dead, alive = cost.of[DEAD, AVG], cost.of[RANDOM, AVG]
    losses = f"{100 * dead.difference:+.1f}; as many alive ones: {100 * alive.difference:+.1f} points"
    title = f"Pruned dead tokens: {losses}"
    figures.headline(fig, _called(cost, title))
    further = cost.of[BLOCK, AVG].pictures
    of = f"{cost.questions} questions on {cost.pictures} pictures ({further} for squares and diamonds)"
    figures.sign(fig, cost.model, of)
    return fig


def _name_arms(axes: Axes, cost: Cost, least: float = 0.12) -> None:
    """Each arm's name to the right of all points, at its height or as near to it as other names allow."""
    bottom, top = axes.get_ylim()
    at, heights = 1.08 * max(cost.removed.values()), dict[str, float]()
    above = top
    for arm in sorted(cost.arms, key=lambda arm: -cost.of[arm, AVG].difference):
        above = heights[arm] = min(100 * cost.of[arm, AVG].difference, above - least * (top - bottom))
    for arm, height in heights.items():
        said = _called(cost, arm).removeprefix("-").replace(", ", ",\n")
        axes.annotate(said, (at, height), color=LOOKS[arm].colour, va="center", fontsize=10, linespacing=0.95)


def _draw_paper(axes: Axes) -> None:
    """The paper's two rows of Table 2, in the colour of what is printed."""
    follow = printed.changes(printed.TABLE_B)
    for (name, (low, high)), marker in zip(PAPER_REMOVED.items(), ("X", "o"), strict=True):
        change = follow[name][AVG]
        axes.plot((low, high), (change, change), color=figures.FACT, linewidth=1.2)
        axes.plot(low, change, marker, color=figures.FACT, markersize=9)
        axes.annotate(
            f"{name} {change:+.1f}",
            (low, change),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            color=figures.FACT,
        )
    axes.set_xlim(0, 65)
    axes.set_ylim(-4, 3)
    axes.set_xlabel("% of 576 removed")
    axes.set_title("paper, printed (7B)", fontsize=11, fontweight="normal", color=figures.FACT)


def _called(cost: Cost, text: str) -> str:
    """An arm's name, or a sentence about this model; where C0 stands in for dead tokens it is named."""
    if not cost.stand_in:
        return text
    for said, instead in (("the dead tokens", "C0"), ("dead tokens", "C0"), ("dead ones", "C0's"), ("dead", "C0")):
        text = text.replace(said, instead)
    return text


def _points(found: Comparison, unit: str = " points") -> str:
    return _range(found.difference, found.low, found.high, unit)


def _range(value: float, low: float, high: float, unit: str = " points") -> str:
    """A difference of shares in points.

    >>> _range(0.012, -0.01, 0.03)
    '+1.2 points (-1.0 to 3.0)'
    """
    value, low, high = (round(100 * part, 1) + 0.0 for part in (value, low, high))
    return f"{value:+.1f}{unit} ({low:.1f} to {high:.1f})"


# --- for the page ----------------------------------------------------------------------------------------------------


def dead_sentence(cost: Cost) -> str:
    """What pruning dead tokens does to Avg, and what it would take to say more."""
    found = cost.of[DEAD, AVG]
    said = {
        "improvement": "is an improvement",
        "degradation": "is a degradation",
        "no degradation shown": f"stays within {100 * found.margin:g} point of the baseline",
        "undecided": f"is neither told from zero nor shown to stay within {100 * found.margin:g} point",
    }[found.verdict]
    text = f"Without the dead tokens Avg changes by {_points(found)}, which {said}."
    if found.verdict != "undecided":
        return text
    return (
        f"{text} An arm that changes nothing would need about {questions_needed(found)} questions of this kind to be "
        f"shown to stay within it; {found.questions} were asked."
    )


def control_sentence(cost: Cost) -> str:
    """What size and shape of the control do."""
    seeds = [100 * value for value in cost.per_seed[RANDOM]]
    text = (
        f"Without as many alive tokens as dead ones, scattered, Avg changes by {_points(cost.of[RANDOM, AVG])}, mean "
        f"of {len(seeds)} seeds (single ones {min(seeds):+.1f} to {max(seeds):+.1f}). The larger size "
        f"{_beside(cost.size)} the smaller. A connected block {_beside(cost.shape)} as many scattered tokens, and it "
        f"{_beside(cost.beside_dead[BLOCK])} the dead tokens."
    )
    return _called(cost, text)


def _beside(found: Comparison) -> str:
    return "costs more than" if found.high < 0 else "costs less than" if found.low > 0 else "is not told apart from"


def contrast_table(cost: Cost) -> pd.DataFrame:
    """Arms held against each other on the same questions: what the control's size and shape change of Avg."""
    import pandas as pd

    contrasts = {
        f"{cost.larger} | {RANDOM}": cost.size,
        f"{BLOCK} | {RANDOM}": cost.shape,
        **{f"{arm} | {DEAD}": found for arm, found in cost.beside_dead.items()},
    }
    return pd.DataFrame(
        {
            _called(cost, name): {
                "Avg, first less second": _points(found),
                "the first": _beside(found).removesuffix(" than").removesuffix(" from"),
                "pictures": found.pictures,
                "seeds": found.seeds,
            }
            for name, found in contrasts.items()
        }
    ).T


def match_sentence(cost: Cost) -> str:
    """How well the control is matched."""
    text = (
        f"The control of the smaller size removes {cost.alive_removed:.0%} of the alive tokens on average. In "
        f"{cost.short:.0%} of the pictures there are fewer alive tokens than dead ones, and it removes all of them"
    )
    if cost.matched is None:
        return f"{text}."
    return (
        f"{text}; in the other {cost.matched.pictures} pictures it removes exactly as many, and Avg changes by "
        f"{_points(cost.matched)}."
    )


def matched_clause(cost: Cost) -> str:
    """How the control does where it is exactly as large as the dead tokens; nothing where it is so everywhere."""
    if cost.matched is None or not cost.short:
        return ""
    return f"; in the {cost.matched.pictures} pictures with enough alive tokens, by {_points(cost.matched)}"


def frame_sentence(cost: Cost) -> str:
    """Whether the change in grounding depends on the frame in which boxes are read."""
    padded, original = cost.of[DEAD, "grounding"], cost.of[DEAD, ORIGINAL]
    apart = "more than" if cost.frame.low > 0 else "less than" if cost.frame.high < 0 else "not told apart from"
    return (
        f"Without the dead tokens grounding changes by {_points(padded)} with boxes read in "
        f"the padded square (baseline {100 * padded.baseline:.1f}), and by {_points(original)} with the same boxes "
        f"read in the frame of the original picture (baseline {100 * original.baseline:.1f}). The second is {apart} "
        f"the first: {_range(float(cost.frame.value), float(cost.frame.low), float(cost.frame.high))}."
    )


def paper_sentence() -> str:
    """What the printed tables say once their parts are looked at."""
    dead, rest = (printed.changes(printed.TABLE_B)[name] for name in ("-dead", "-remaining"))
    others = [dead[name] for name in printed.FAMILIES if name != "grounding"]
    scores = {row.name: row.scores for row in printed.TABLE_B}
    base = printed.TABLE_B[0].scores
    names = [name for names in printed.BENCHMARKS.values() for name in names]
    unhurt = [name for name, before, after in zip(names, base, scores["-remaining"], strict=True) if after >= before]
    wrong = [found for found in printed.contradictions() if found.table == "2"]
    rounded = all(found.rounding for found in wrong)
    return (
        f"The paper's gain of {dead[AVG]:+.1f} is {dead['grounding']:+.1f} in grounding and "
        f"{sum(others) / len(others):+.2f} on the mean of the other three families. Its control, {rest[AVG]:+.1f}, is "
        f'said to drop "across all benchmarks"; as printed it does not drop on {" and ".join(unhurt) or "none"}. '
        f"{len(wrong)} of the {5 * len(printed.TABLE_2)} entries of Table 2 {'do' if len(wrong) != 1 else 'does'} not "
        f"follow from Table b{', by rounding only' if wrong and rounded else ''}."
    )


def synthesis(cost: Cost, read: bool) -> str:
    """What a probe reads held against what the answers lose.

    Args:
        read: whether a probe reads anything from dead tokens (`emptiness.reads_colour`).
    """
    found = cost.of[DEAD, AVG]
    if not read:
        return "A probe reads nothing from them, so there is nothing to be missed."
    if found.verdict == "degradation":
        return "So something of what a probe reads from them is used: the answers get worse without it."
    return (
        "So a probe reads from them what the answers to these questions have not been shown to need. The questions "
        "are about objects and writing; what a patch of background looks like is not asked."
    )


def told(cost: Cost) -> dict[str, Any]:
    """Key → value for the prose."""
    dead, scattered = cost.of[DEAD, AVG], cost.of[RANDOM, AVG]
    second = "as many as dead tokens and sinks together"
    if cost.larger == A_THIRD_MORE:
        second = (
            "a third more than the dead ones, which stands in for dead tokens and sinks together, as this model "
            "has no sinks (the paper's ratio: 40 % of the tokens to 30 %)"
        )
    here = {
        "cost_headline": (
            f"Pruning dead tokens changes the mean score of four families of questions by {_points(dead)}: "
            f"{SHOWN[dead.verdict]}. Pruning as many alive tokens changes it by {_points(scattered)}: "
            f"{SHOWN[scattered.verdict]}{matched_clause(cost)}."
        ),
        "cost_dead": dead_sentence(cost),
        "cost_controls": control_sentence(cost),
        "cost_match": match_sentence(cost),
        "cost_frame": frame_sentence(cost),
        "second_size": second,
        "e32_note": _finding_text(cost, DEAD, e32(cost)),
        "e33_note": _finding_text(cost, RANDOM, e33(cost)),
    }
    counts = {
        "n_asked": cost.of[DEAD, "grounding"].questions,
        "n_asked_pictures": cost.pictures,
        "n_further": cost.of[BLOCK, AVG].pictures,
        "n_seeds": cost.of[RANDOM, AVG].seeds,
    }
    return {key: _called(cost, text) for key, text in here.items()} | counts | {"cost_paper": paper_sentence()}


def _finding_text(cost: Cost, arm: str, found: Finding) -> str:
    """A finding as a sentence after its verdict, in points."""
    note = found.note.removesuffix(OF_STAND_IN)
    return f"{_points(cost.of[arm, AVG])}, 95 % interval, n = {found.n} pictures: {note}"


def numbers(cost: Cost) -> dict[str, float]:
    """What the record keeps, by name; differences as shares."""
    found: dict[str, Any] = {"alive_tokens_removed": cost.alive_removed, "pictures_short_of_alive": cost.short}
    for arm in cost.arms:
        key = _key(arm)
        found[f"tokens{key}"] = cost.removed[arm]
        for name in (*FAMILIES, ORIGINAL, AVG):
            compared = cost.of[arm, name]
            found[f"{_key(name)}{key}"] = compared.difference
            if name == AVG:
                found |= {f"Avg_low{key}": compared.low, f"Avg_high{key}": compared.high}
    found |= {f"{_key(name)}_baseline": cost.of[DEAD, name].baseline for name in (*FAMILIES, ORIGINAL, AVG)}
    found |= {f"frame_shift{part}": float(x) for part, x in zip(("", "_low", "_high"), cost.frame, strict=True)}
    beside = {f"{_key(arm)[1:]}_less_dead": compared for arm, compared in cost.beside_dead.items()}
    for said, compared in (beside | {"larger_less_smaller": cost.size, "block_less_scattered": cost.shape}).items():
        found |= {said: compared.difference, f"{said}_low": compared.low, f"{said}_high": compared.high}
    return found


def _key(name: str) -> str:
    return name.replace("-", "_without_").replace(", ", "_").replace(" ", "_")
