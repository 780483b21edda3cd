"""What becomes of answers and of attention without sinks: Table 1 of the paper, Figure d (left), claims E27 to E29.

The paper prunes sinks, or skips sublayers for them, and asks the same questions as before. Here every arm is compared
with the baseline question by question, and beside the arms stand random tokens, as many: where these can be pruned
just as well, that sinks can be pruned says nothing about sinks. Where a model has no sinks, the arms run on the tokens
that stand in for them (`embedlens.sinks.sink_groups`), and a claim can hold in part only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from embedlens import claims, figures, printed
from embedlens.chapters.sinkhood import BOS, at_best, said
from embedlens.claims import Finding
from embedlens.errors import EmbedLensError
from embedlens.figures import Look
from embedlens.groups import QUESTION, Reference, TokenGroups, reference_of
from embedlens.intervals import Interval, ratio_interval
from embedlens.interventions import Prune, intervene
from embedlens.paired import AVG, BASELINE, MARGIN, Comparison, compare
from embedlens.patches import PatchGrid
from embedlens.samples import Sample
from embedlens.sinks import KINDS, curve, found_kinds, labels_of, queries_of, sink_groups
from embedlens.sweep import SEEDS, Arm, members, random_tokens, repeated, run_arms, sink_arms
from embedlens.tasks import FAMILIES, questionnaires
from embedlens.tracing import traces

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from embedlens.vlm import Prompt, VisionLanguageModel

PRUNED = ("-LLM sinks", "-ViT sinks", "-all sinks")
SKIPPED = (
    "LLM sinks skip MLP-2",
    "LLM sinks skip MLP-1, MHA-2",
    "LLM sinks skip MLP-1/2, MHA-2",
    "others skip MLP-2",
)
CONTROL = "-random tokens, as many as all sinks"
SCORES = (*FAMILIES, AVG)
CALLED = {"general": "General", "ocr": "OCR", "grounding": "Grounding", "hallucination": "Hallucination", AVG: AVG}
#: Groups of arms in figures: colour and marker.
LOOKS = {"prune": figures.GROUPS["LLM sink"], "skip": figures.GROUPS["ViT sink"], "random": Look(figures.CHANCE, "o")}
DONE = ("no degradation shown", "improvement")


# --- the arms --------------------------------------------------------------------------------------------------------


def random_others(
    groups: TokenGroups, grid: PatchGrid, rng: np.random.Generator, matched: Sequence[str] = KINDS
) -> Bool[Tensor, " n"]:
    """Random tokens of all other groups, as many as some groups have together, or all where they are fewer."""
    own = members(groups, grid, rng, matched)
    return random_tokens(~own, int(own.sum()), rng)


def arms(seeds: int = SEEDS) -> list[Arm]:
    """The eight rows of Table 1, and random tokens in place of all sinks, with several seeds."""
    return [*sink_arms(), *repeated(CONTROL, random_others, seeds)]


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers under every arm, compared with the baseline's."""

    table: pd.DataFrame = field(repr=False)
    """From `run_arms`."""
    compared: Mapping[tuple[str, str], Comparison] = field(repr=False)
    """(arm, one of SCORES or "accuracy") → the arm against the baseline."""
    random_beyond: Comparison
    """Random tokens pruned, against all sinks pruned, in Avg."""
    found: Mapping[str, bool]
    """Which kinds of sinks the model has."""
    named: Mapping[str, str]
    """What to call each kind."""
    model: str

    @property
    def arms(self) -> list[str]:
        """All but the baseline."""
        return [name for name in dict.fromkeys(self.table["arm"]) if name != BASELINE]

    @property
    def pictures(self) -> int:
        return self.table["id"].nunique()

    @property
    def questions(self) -> int:
        return self.table["item"].nunique()

    def tokens(self, arm: str) -> float:
        """How many tokens an arm acts on, mean over questions."""
        return float(self.table.loc[self.table["arm"] == arm, "tokens"].mean())

    def called(self, arm: str) -> str:
        """An arm by the tokens that it acts on here: sinks, or what stands in for them."""
        return called(arm, self.found, self.named)


def called(arm: str, found: Mapping[str, bool], named: Mapping[str, str]) -> str:
    """What to call an arm where stand-ins take the place of sinks.

    >>> names = {"LLM sink": "5 highest-phi tokens", "ViT sink": "ViT sinks"}
    >>> called("LLM sinks skip MLP-2", {"LLM sink": False, "ViT sink": True}, names)
    '5 highest-phi tokens skip MLP-2'
    >>> called("-LLM sinks", {"LLM sink": False, "ViT sink": True}, names)
    'without the 5 highest-phi tokens'
    """
    if not all(found[kind] for kind in KINDS):
        arm = arm.replace("all sinks", "both kinds")
    for kind in KINDS:
        arm = arm.replace(f"{kind}s", named[kind])
    if not all(found[kind] for kind in KINDS) and arm.startswith("-"):  # "-5 tokens" would be minus five
        arm = f"without {'the ' if arm[1].isdigit() else ''}{arm[1:]}"
    return arm


def answers(
    model: VisionLanguageModel,
    n: int = 200,
    seeds: int = SEEDS,
    reference: Reference | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> Answers:
    """Ask the same questions of all four families under every arm.

    Args:
        model: from `embedlens.load`.
        n: questions of each family; one of each about a picture.
        seeds: of the random control.
        reference: what tells sinks; default: `reference_of(model)`.
        seed: of the pictures and the bootstrap.
    """
    reference = reference_of(model) if reference is None else reference
    items = questionnaires(n, seed, scale=max(1.0, model.canvas_side / 112))
    table = run_arms(model, items, arms(seeds), partial(sink_groups, reference=reference), batch_size)
    return compared(table, found_kinds(reference), labels_of(reference), model.name, seed)


def compared(
    table: pd.DataFrame,
    found: Mapping[str, bool],
    named: Mapping[str, str],
    model: str,
    seed: int = 0,
    resamples: int = 2000,
) -> Answers:
    """Every arm of a table against its baseline, in every family, in Avg and in all answers."""
    against = partial(compare, table, resamples=resamples, seed=seed)
    names = [name for name in dict.fromkeys(table["arm"]) if name != BASELINE]
    pairs = {(arm, of): against(arm, of) for arm in names for of in (*SCORES, "accuracy")}
    beyond = against(CONTROL, AVG, baseline=PRUNED[-1])
    return Answers(table, pairs, beyond, dict(found), dict(named), model)


def unharmed_verdict(verdicts: Sequence[str]) -> str:
    """E27, E28, "no loss" under several arms, from what `paired` says of each arm's Avg.

    It holds if every arm shows no degradation within the margin, and fails if one shows a degradation. Where some are
    undecided it holds in part; where all are, the questions are too few to test it.

    >>> unharmed_verdict(["no degradation shown", "improvement"]), unharmed_verdict(["undecided", "degradation"])
    ('holds', 'does not hold')
    >>> unharmed_verdict(["undecided", "improvement"]), unharmed_verdict(["undecided", "undecided"])
    ('partly', 'not testable here')
    """
    if not verdicts:
        raise EmbedLensError("no arm to judge: pass the verdict of at least one")
    if "degradation" in verdicts:
        return claims.FAILS
    shown = [verdict in DONE for verdict in verdicts]
    return claims.HOLDS if all(shown) else claims.PARTLY if any(shown) else claims.UNTESTABLE


def answer_findings(found: Answers) -> dict[str, Finding]:
    """E27 (pruning) and E28 (skipping sublayers): the arm whose Avg falls most, in points, and what all show."""
    return {"E27": _unharmed(found, PRUNED, KINDS), "E28": _unharmed(found, SKIPPED, KINDS)}


def _unharmed(found: Answers, names: Sequence[str], kinds: Sequence[str]) -> Finding:
    rows = [found.compared[name, AVG] for name in names]
    worst = min(rows, key=lambda row: row.difference)
    lacking = [kind for kind in kinds if not found.found[kind]]
    told = f"No {'s, no '.join(lacking)}s: run on what stands in for them. " if lacking else ""
    counts = {
        verdict: [row.verdict for row in rows].count(verdict) for verdict in dict.fromkeys(r.verdict for r in rows)
    }
    told += f"Change of Avg, in points, of the arm that loses most ({found.called(worst.arm)}); "
    told += f"of {len(rows)} arms: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}; "
    told += f"as many random tokens pruned as of both kinds: {found.compared[CONTROL, AVG].text()}."
    verdict = at_best(unharmed_verdict([row.verdict for row in rows]), not lacking)
    if verdict == claims.UNTESTABLE:
        told += (
            f" For an arm whose score does not move, about {needed(found, names)} questions of each family would be "
        )
        told += f"needed; {found.questions // len(FAMILIES)} were asked."
    value, low, high = (round(100 * part, 6) for part in (worst.difference, worst.low, worst.high))
    return Finding(value, low, high, worst.pictures, verdict, told)


def answers_told(found: Answers) -> dict[str, str | int]:
    """What the prose says of the answers."""
    of = {name: found.compared[name, AVG] for name in found.arms}
    least = narrowest(found, (*PRUNED, *SKIPPED))
    return {
        "n_asked": found.questions,
        "n_of_family": found.questions // len(FAMILIES),
        "n_asked_about": found.pictures,
        "baseline_avg": f"{100 * of[PRUNED[0]].baseline:.1f}",
        "llm_pruned": of[PRUNED[0]].text(),
        "vit_pruned": of[PRUNED[1]].text(),
        "both_pruned": of[PRUNED[2]].text(),
        "random_pruned": of[CONTROL].text(),
        "random_beyond": found.random_beyond.text(),
        "removed_tokens": f"{found.tokens(PRUNED[2]):.1f}",
        "margin": f"{100 * MARGIN:g}",
        "narrowest": f"{100 * least:.1f}",
        "needed": needed(found, (*PRUNED, *SKIPPED)),
        "arms_said": arms_said([of[name].verdict for name in (*PRUNED, *SKIPPED)]),
        "e27_note": answer_findings(found)["E27"].note,
        "e28_note": answer_findings(found)["E28"].note,
    }


def arms_said(verdicts: Sequence[str]) -> str:
    """How many arms show what, worst first.

    >>> arms_said(["undecided", "degradation", "undecided"])
    'degradation: 1, undecided: 2 of 3 arms'
    """
    order = ("degradation", "undecided", "no degradation shown", "improvement")
    counts = [f"{verdict}: {verdicts.count(verdict)}" for verdict in order if verdict in verdicts]
    return f"{', '.join(counts)} of {len(verdicts)} arms"


def enough(n: int, half_width: float, margin: float = MARGIN) -> int:
    """About how many questions the equivalence test needs at least, if nothing else about the answers changed.

    The interval narrows with the square root of their number, and has to lie within the margin even around a
    difference of zero. Rounded up to hundreds.

    >>> enough(200, half_width=0.02), enough(200, half_width=0.005)
    (800, 200)
    """
    return n if half_width < margin else int(-(-n * (half_width / margin) ** 2 // 100) * 100)


def narrowest(found: Answers, names: Sequence[str]) -> float:
    """How far the narrowest 90 % interval of some arms' changes of Avg reaches to either side."""
    return min((found.compared[name, AVG].narrow_high - found.compared[name, AVG].narrow_low) / 2 for name in names)


def needed(found: Answers, names: Sequence[str]) -> int:
    """About how many questions of each family would be enough for one of some arms (see `enough`)."""
    return enough(found.questions // len(FAMILIES), narrowest(found, names))


def answer_numbers(found: Answers) -> dict[str, float]:
    """What the record keeps: every arm's scores, and changes of Avg with their bounds, in points."""
    kept = {f"baseline {of}": 100 * found.compared[PRUNED[0], of].baseline for of in SCORES}
    for name in found.arms:
        kept |= {f"{name} {of}": 100 * found.compared[name, of].score for of in SCORES}
        row = found.compared[name, AVG]
        kept |= {f"{name} change low": 100 * row.low, f"{name} change high": 100 * row.high}
    return {name: float(value) for name, value in kept.items()}


# --- tables and figures of answers -----------------------------------------------------------------------------------


def scores_table(found: Answers) -> pd.DataFrame:
    """The miniature's Table 1: per cent right by family and Avg, and how many tokens each arm acts on."""
    import pandas as pd

    first = found.compared[PRUNED[0], AVG]
    rows = {"baseline": ["–", *(f"{100 * found.compared[first.arm, of].baseline:.1f}" for of in SCORES)]}
    for name in found.arms:
        scores = [f"{100 * found.compared[name, of].score:.1f}" for of in SCORES]
        rows[_seeded(found, name)] = [f"{found.tokens(name):.1f}", *scores]
    return pd.DataFrame.from_dict(rows, "index", columns=["tokens", *CALLED.values()]).rename_axis("arm")


def changes_table(found: Answers) -> pd.DataFrame:
    """Each arm against the baseline: change of Avg with both intervals, answers that changed, McNemar, verdict."""
    import pandas as pd

    rows = {}
    for name in found.arms:
        avg, every = found.compared[name, AVG], found.compared[name, "accuracy"]
        rows[_seeded(found, name)] = {
            "change of Avg, points (95 %)": avg.text().replace(" points", ""),
            "90 %": f"{100 * avg.narrow_low:.1f} to {100 * avg.narrow_high:.1f}",
            "gained": f"{every.gained:g}",
            "lost": f"{every.lost:g}",
            "McNemar's p": "–" if np.isnan(every.p) else f"{every.p:.2f}",
            "verdict": avg.verdict,
        }
    return pd.DataFrame.from_dict(rows, "index").rename_axis("arm")


def paper_table() -> pd.DataFrame:
    """Table 1 as printed, and what Table a gives as the change of its Avg. None of it is measured here."""
    import pandas as pd

    follows = printed.changes(printed.TABLE_A)
    rows = {
        row.name: [
            *(f"{value:.1f}" for value in (*row.families, row.avg)),
            f"{follows[row.name][AVG]:+.2f}" if row.name in follows else "–",
        ]
        for row in printed.TABLE_1
    }
    columns = ["General", "OCR", "CV-centric", "Hallucination", "Avg", "change of Avg, from Table a"]
    return pd.DataFrame.from_dict(rows, "index", columns=columns).rename_axis("paper (LLaVA-1.5-7B)")


def contradictions_table() -> pd.DataFrame:
    """Where Table 1 and the Avg column of Table a do not follow from the twelve scores printed in Table a."""
    import pandas as pd

    of_a = [entry for entry in printed.contradictory_averages() if entry.table == "a"]
    rows = [
        {
            "table": entry.table,
            "row": entry.row,
            "column": {"grounding": "CV-centric"}.get(entry.column, CALLED.get(entry.column, entry.column)),
            "printed": f"{entry.printed:.1f}",
            "follows from Table a": f"{entry.follows:.2f}",
            "rounding explains it": "yes" if entry.rounding else "no",
        }
        for entry in [*(entry for entry in printed.contradictions() if entry.table == "1"), *of_a]
    ]
    return pd.DataFrame(rows).set_index(["table", "row"])


def answers_figure(found: Answers) -> Figure:
    """Change of Avg under every arm, with its interval, the margin, and the paper's change, computed from Table a."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 0.5 * len(found.arms) + 1.9))
    _changes(axes, found, AVG)
    _labelled(axes, found)
    axes.set_xlabel("change of Avg, points (shaded: margin of 1 point)")
    own = [found.compared[name, AVG].verdict for name in (*PRUNED, *SKIPPED)]
    random = 100 * found.compared[CONTROL, AVG].difference
    figures.headline(fig, f"{_capital(arms_said(own))}; random tokens: {random:+.1f} points")
    axes.legend(loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=3, fontsize=10)
    figures.sign(fig, found.model, _n(found))
    return fig


def families_figure(found: Answers) -> Figure:
    """The same by family, one panel each."""
    from matplotlib import pyplot as plt

    fig, panels = plt.subplots(1, len(FAMILIES), figsize=(figures.WIDTH, 0.5 * len(found.arms) + 1.7), sharey=True)
    for axes, family in zip(panels, FAMILIES, strict=True):
        _changes(axes, found, family)
        axes.set_title(CALLED[family], fontsize=11)
    _labelled(panels[0], found)
    widest = max(abs(x) for axes in panels for x in axes.get_xlim())
    for axes in panels:
        axes.set_xlim(-widest, widest)
        axes.tick_params(axis="x", labelsize=9)
        axes.set_xlabel("change, points", fontsize=10)
    own = [found.compared[name, of].verdict for name in (*PRUNED, *SKIPPED) for of in FAMILIES]
    random = [found.compared[CONTROL, of].verdict for of in FAMILIES].count("degradation")
    degraded = own.count("degradation")
    figures.headline(
        fig, f"By family: degradation in {degraded} of {len(own)}, random tokens in {random} of {len(FAMILIES)}"
    )
    figures.sign(fig, found.model, f"change in points, {_n(found)}")
    return fig


def _changes(axes: Axes, found: Answers, of: str) -> None:
    axes.axvspan(-100 * MARGIN, 100 * MARGIN, color="#F0EBD8", zorder=0, linewidth=0)
    axes.axvline(0, color="#808080", linewidth=1)
    paper = printed.changes(printed.TABLE_A)
    for label, names in (("prune", PRUNED), ("skip", SKIPPED), ("random", (CONTROL,))):
        rows = [found.compared[name, of] for name in names]
        points = [Interval(*(np.array(100 * x) for x in (row.difference, row.low, row.high))) for row in rows]
        places = np.array([found.arms.index(name) for name in names], dtype=float)
        figures.dots(axes, places, points, LOOKS[label], along="x")
    for number, (name, change) in enumerate((name, paper[name]) for name in found.arms if name in paper):
        row, named = found.arms.index(name), "paper (7B), from Table a" if number == 0 else None
        axes.plot([change[of]] * 2, [row - 0.32, row + 0.32], color=figures.FACT, linewidth=2, label=named)
    axes.grid(axis="y", visible=False)


def _labelled(axes: Axes, found: Answers) -> None:
    labels = [_seeded(found, name) for name in found.arms]
    broken = [
        label.replace(" skip ", "\nskip ")
        .replace("without the ", "without the\n")
        .replace(", as many", ",\nas many")
        .replace(" (", "\n(")
        for label in labels
    ]
    axes.set_yticks(range(len(labels)), broken, fontsize=9.5)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def _seeded(found: Answers, arm: str) -> str:
    seeds = found.compared[arm, AVG].seeds
    return found.called(arm) + (f" ({seeds} seeds)" if arm == CONTROL else "")


def _n(found: Answers) -> str:
    return f"n = {found.questions} questions about {found.pictures} pictures"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# --- where attention goes --------------------------------------------------------------------------------------------

MOVES = ("as it is", "pruned", "others pruned")
REGIONS = ("BOS", "text before", "pruned", "others pruned", "other patches", "text after")


@dataclass(frozen=True, eq=False)
class Moved:
    """Attention of the text after the picture, by what it falls on, before and after some tokens are pruned.

    nan where a picture has no such token, or nothing but them.
    """

    mass: Float[np.ndarray, "pictures moves layers regions"] = field(repr=False)
    """Shares that sum to one, in the order of MOVES and REGIONS: as it is, the tokens pruned, as many others pruned."""
    named: str
    """What the tokens are."""
    all_found: bool
    """Whether they are sinks, not stand-ins."""
    model: str
    seed: int = 0

    @property
    def n(self) -> int:
        return int(np.isfinite(self.mass[:, 0, 0, 0]).sum())

    def region(self, move: str, *names: str) -> Float[np.ndarray, "pictures layers"]:
        """Mass on some regions together."""
        return self.mass[:, MOVES.index(move)][:, :, [REGIONS.index(name) for name in names]].sum(-1)

    def share(self, move: str, *names: str) -> Interval:
        """Of the attention that pruning frees, the share that some regions gain; mean of layers, nan if none is freed.

        Negative where they lose.
        """
        gain, freed = self._gain(move, names).sum(1), self.region(MOVES[0], move).sum(1)
        return _ratio(gain, freed, self.seed)

    def beyond(self, move: str, *names: str) -> Interval:
        """`share`, less what the regions would gain if each key kept its share of what is left."""
        freed, held = self.region(MOVES[0], move), self.region(MOVES[0], *names)
        expected = held / (1 - freed) * freed
        return _ratio((self._gain(move, names) - expected).sum(1), freed.sum(1), self.seed)

    def _gain(self, move: str, names: Sequence[str]) -> Float[np.ndarray, "pictures layers"]:
        return self.region(move, *names) - self.region(MOVES[0], *names)


BEFORE = ("BOS", "text before")  # the system prompt, its first token among it


def attention_moved(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    groups: Sequence[TokenGroups],
    kinds: Sequence[str] = ("LLM sink",),
    reference: Reference | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> Moved:
    """Where the attention of the text after each picture falls, before and after pruning (Figure d, left).

    Args:
        samples: pictures.
        groups: of each, such as `SinkStudy.groups`.
        kinds: which groups are pruned.
        reference: tells sinks from stand-ins; default: `reference_of(model)`.
        seed: of the random others that are pruned as a control, with the place of the picture.
    """
    reference = reference_of(model) if reference is None else reference
    if len(samples) != len(groups):
        raise EmbedLensError(f"{len(samples)} pictures but {len(groups)} groups: pass the groups of each picture")
    mass = np.full((len(samples), len(MOVES), model.n_layers, len(REGIONS)), np.nan)
    for start in range(0, len(samples), batch_size):
        batch = list(samples[start : start + batch_size])
        prompts = model.prompts([sample.image for sample in batch], [QUESTION] * len(batch))
        own = [_own(of, kinds) for of in groups[start : start + batch_size]]
        some = [row for row, mask in enumerate(own) if bool(mask.any()) and int((~mask).sum()) > int(mask.sum())]
        rngs = [np.random.default_rng((seed, start + row)) for row in some]
        others = [random_tokens(~own[row], int(own[row].sum()), rng) for row, rng in zip(some, rngs, strict=True)]
        chosen = [prompts[row] for row in some]
        regions = [_regions(prompts[row], own[row], drawn) for row, drawn in zip(some, others, strict=True)]
        for move, pruned in enumerate((None, [own[row] for row in some], others)):
            if not some:
                continue
            with nullcontext() if pruned is None else intervene(model, Prune(pruned)):
                seen = traces(model, chosen, regions, batch_size)
                for place, row, prompt, trace in zip(range(len(some)), some, chosen, seen, strict=True):
                    queries = queries_of(prompt)
                    if pruned is not None:
                        queries = queries[~prompt.spread(pruned[place].to(queries.device))]
                    masses = torch.stack([trace.attention[name][:, queries].float().mean(-1) for name in REGIONS], -1)
                    mass[start + row, move] = masses.cpu().numpy()
    found, named = found_kinds(reference), labels_of(reference)
    return Moved(mass, " and ".join(named[k] for k in kinds), all(found[k] for k in kinds), model.name, seed)


def _own(groups: TokenGroups, kinds: Sequence[str]) -> Bool[Tensor, " n"]:
    return torch.stack([groups.named[kind] for kind in kinds]).any(0).cpu()


def _regions(prompt: Prompt, own: Bool[Tensor, " n"], others: Bool[Tensor, " n"]) -> dict[str, Bool[Tensor, " s"]]:
    """REGIONS over all positions, disjoint."""
    device = prompt.visual.device
    first = torch.zeros_like(prompt.visual)
    first[0] = True
    rest = ~(own | others)
    parts = {name: prompt.spread(mask.to(device)) for name, mask in (("pruned", own), ("others pruned", others))}
    later = torch.arange(len(prompt), device=device) > int(prompt.visual.nonzero()[0, 0])
    return {
        "BOS": first & ~prompt.visual,
        "text before": prompt.text & ~first & ~later,
        **parts,
        "other patches": prompt.spread(rest.to(device)),
        "text after": prompt.text & ~first & later,
    }


def moved_verdict(share_low: float, beyond_low: float) -> str:
    """E29, "reallocated to textual sinks in the system prompt": more than half of the freed attention goes there.

    More than its share of what is left is "partly"; otherwise it gains no more than every other token does.

    >>> moved_verdict(0.7, 0.4), moved_verdict(0.3, 0.1), moved_verdict(0.1, -0.05)
    ('holds', 'partly', 'does not hold')
    """
    return claims.HOLDS if share_low > 0.5 and beyond_low > 0 else claims.PARTLY if beyond_low > 0 else claims.FAILS


def moved_finding(found: Moved) -> Finding:
    """E29."""
    if not found.n:
        return Finding.of(None, len(found.mass), claims.UNTESTABLE, "No picture has such tokens.")
    share, beyond = found.share("pruned", *BEFORE), found.beyond("pruned", *BEFORE)
    note = "" if found.all_found else f"No LLM sinks: measured on the {found.named}. "
    note += "Share of the attention on them that goes to the text before the picture when they are pruned; "
    note += f"beyond its share of the rest {said(beyond)}; when random others are pruned "
    note += f"{said(found.share('others pruned', *BEFORE))} of theirs."
    verdict = at_best(moved_verdict(float(share.low), float(beyond.low)), found.all_found)
    return Finding.of(share, found.n, verdict, note)


def moved_table(found: Moved) -> pd.DataFrame:
    """By region: attention before and after, mean of layers, and the share of the freed attention that it gains."""
    import pandas as pd

    rows = {}
    for label, names in _shown(found.named).items():
        before, after = (curve(found.region(move, *names).mean(1), found.seed) for move in MOVES[:2])
        gone = names == ("pruned",)
        stay = tuple(name for name in names if name != MOVES[2])  # under the control
        rows[label.replace("\n", " ")] = {
            "attention on it": said(before, 3),
            "after pruning": "–" if gone else said(after, 3),
            "gains of what is freed": "–" if gone else said(found.share("pruned", *names)),
            "random others pruned: gains of theirs": said(found.share("others pruned", *stay)),
        }
    return pd.DataFrame.from_dict(rows, "index").rename_axis("keys")


def moved_told(found: Moved) -> dict[str, str]:
    """What the prose says of it."""
    return {
        "freed": said(curve(found.region(MOVES[0], "pruned").mean(1), found.seed), 3),
        "to_prompt": said(found.share("pruned", *BEFORE)),
        "to_prompt_beyond": said(found.beyond("pruned", *BEFORE)),
        "to_prompt_random": said(found.share("others pruned", *BEFORE)),
        "to_patches": said(found.share("pruned", "others pruned", "other patches")),
        "to_question": said(found.share("pruned", "text after")),
    }


def moved_numbers(found: Moved) -> dict[str, float]:
    """What the record keeps: mean attention by region, before and after, and where the freed part goes."""
    kept: dict[str, float] = {}
    for move in MOVES[: 3 if found.n else 0]:
        masses = np.nanmean(found.mass[:, MOVES.index(move)], axis=(0, 1))
        kept |= {f"attention_on_{r}_{move}".replace(" ", "_"): float(x) for r, x in zip(REGIONS, masses, strict=True)}
    return kept


def moved_figure(found: Moved) -> Figure:
    """Attention by region and layer, before pruning and after; below, what each region gains."""
    from matplotlib import pyplot as plt

    looks = (
        BOS,
        figures.GROUPS["text"],
        figures.GROUPS["LLM sink"],
        figures.GROUPS["alive"],
        Look(figures.ORDER[5], "P"),
    )
    fig, (upper, lower) = plt.subplots(2, 1, figsize=(figures.WIDTH, 6.6), sharex=True)
    for (label, names), look in zip(_shown(found.named).items(), looks, strict=True):
        before, after = (found.region(move, *names) for move in MOVES[:2])
        figures.layer_curve(upper, *curve(before, found.seed), label, Look(look.colour, look.marker))
        figures.layer_curve(lower, *curve(after - before, found.seed), label, Look(look.colour, look.marker))
        if names != ("pruned",):
            upper.plot(curve(after, found.seed).value, color="#222222", linestyle="--", linewidth=1.2)
    upper.set_ylim(bottom=0)
    upper.set_xlabel("")
    upper.set_ylabel("share of attention\n(dashed: after pruning)")
    upper.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=10)
    lower.axhline(0, color=figures.CHANCE, linewidth=1.0, zorder=0)
    lower.set_ylabel("change of that share")
    lower.set_xlabel("layer (0 = first block)")
    share = found.share("pruned", *BEFORE).value
    gained = "Nothing is pruned" if np.isnan(share) else f"Text before the picture gains {share:.0%} of what is freed"
    figures.headline(fig, gained)
    figures.sign(fig, found.model, f"n = {found.n} pictures, queries after the picture")
    return fig


def _shown(named: str) -> dict[str, tuple[str, ...]]:
    """Label → regions that a figure shows as one."""
    return {
        "BOS": ("BOS",),
        "other text\nbefore the picture": ("text before",),
        named: ("pruned",),
        "other patches": ("others pruned", "other patches"),
        "text after\nthe picture": ("text after",),
    }


def _ratio(of: Float[np.ndarray, " pictures"], unit: Float[np.ndarray, " pictures"], seed: int) -> Interval:
    """Ratio of sums over pictures that have both; nan if none has."""
    there = np.isfinite(of) & np.isfinite(unit)
    scale = unit[there].mean() if there.any() else 0.0  # so that a resample's sum is that of many, as counts are
    if not scale:
        return Interval(*(np.array(np.nan) for _ in range(3)))
    return ratio_interval(of[there] / scale, unit[there] / scale, seed=seed)
