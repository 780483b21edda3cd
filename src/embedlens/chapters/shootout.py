"""The codebook against every other pruner: the same questions, the same budgets, what of the score is kept.

    table = shootout(model, items, shares_of(counts), {"codebook": book}, reference)
    kept(table, "codebook", share)         # share of the full score, with its interval over pictures

A budget is a share of each picture's own visual tokens. Pruners before layer 0 feed as many tokens to every layer.
Pruners inside the language model run its first layers with all tokens, so they are compared twice: with the budget
*left* at the end, which feeds more, and with the budget as the *average* over layers, which costs about as much.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from embedlens import figures
from embedlens.chapters import orderings
from embedlens.chapters.orderings import Orderings, rank_correlation
from embedlens.claims import FAILS, HOLDS, PARTLY, UNTESTABLE, Finding
from embedlens.codebook import Codebook, Recipe, Thresholds, build, keep_lowest, quantile_thresholds
from embedlens.codebook import Stages as Steps
from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, token_groups_of
from embedlens.intervals import Interval, beyond_seen, mean_interval, ratio_interval
from embedlens.interventions import LeaveAt, Prune
from embedlens.paired import BASELINE
from embedlens.prefix import Case, answers
from embedlens.pruners import (
    CODEBOOK,
    DOUBLE_SOFTMAX,
    INSIDE,
    PRUNERS,
    Context,
    Features,
    Inside,
    Pruner,
    Selection,
    Stages,
    attended,
    average_tokens,
    features_of,
    plans_inside,
    prune,
)
from embedlens.redundancy import LLAVA_RMS
from embedlens.sweep import generator
from embedlens.tasks import ANSWER_TOKENS, FAMILIES, Item, family_questions, score

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from embedlens.vlm import Prompt, VisionLanguageModel
else:
    Figure = Prompt = VisionLanguageModel = object

SEEDS = 5  # repeats of what draws
SHARES = (1 / 3, 1 / 6, 1 / 9, 0.05)  # of the tokens: LLaVA-1.5's 192, 96, 64 and 29 of 576
#: Pruners that choose by attention or by likeness to CLS, which the paper calls intermediate states.
RELEASED_NAME, LOOSE_NAME = CODEBOOK.name, f"{CODEBOOK.name}, no rarity"
KEPT = 0.9  # "90 % to 110 % of the performance": what counts as kept
ALIKE = 0.9  # share of kept tokens in common from which two codebooks count as one; set before the run
# Choice by intermediate states: published pruners, and the score itself, which no one publishes as a pruner.
PUBLISHED = ("FastV", "SparseVLM", "VisionZip", "PruMerge+", "HiPrune", "VisPruner")
INTERMEDIATE = ("[cls] top", *PUBLISHED)


LEFT, AVERAGE = "R left", "mean R"  # the two budgets of a pruner inside the language model


def budget_of(n: int, share: float) -> int:
    """Tokens that a picture of n keeps of a share, at least one.

    >>> budget_of(576, 1 / 6), budget_of(3, 0.05)
    (96, 1)
    """
    if n < 1 or not 0 < share <= 1:
        raise EmbedLensError(f"a share of {share} of {n} tokens: pass shares above 0 up to 1")
    return max(1, round(n * share))


def shares_of(counts: Sequence[int], shares: Sequence[float] = SHARES) -> list[float]:
    """Shares, largest first, without those that leave every picture what a larger one does.

    >>> [budget_of(64, share) for share in shares_of([64])], [budget_of(3, share) for share in shares_of([3])]
    ([21, 11, 7, 3], [1])
    """
    if not counts or not shares:
        raise EmbedLensError(f"{len(counts)} pictures, {len(shares)} shares: pass at least one of each")
    found: dict[tuple[int, ...], float] = {}
    for share in sorted(shares, reverse=True):
        found.setdefault(tuple(budget_of(n, share) for n in counts), share)
    return list(found.values())


def budget_name(counts: Sequence[int], share: float) -> str:
    """A budget as readers see it: tokens, or per cent where pictures have different numbers of them.

    >>> budget_name([64, 64], 1 / 9), budget_name([96, 144], 1 / 9)
    ('7', '11%')
    """
    budgets = {budget_of(n, share) for n in counts}
    return str(budgets.pop()) if len(set(counts)) == 1 else f"{share:.0%}"


def counts_in(table: pd.DataFrame) -> list[int]:
    """Visual tokens of each picture of a table."""
    return [int(n) for n in table[table["arm"] == BASELINE].sort_values("item")["tokens"]]


def inside_name(rule: str, kind: str) -> str:
    """Name of the arm of a rule of INSIDE at one of its two budgets."""
    return f"{rule} inside, {kind}"


MATCHED = tuple(inside_name(name, AVERAGE) for name in INSIDE)
INSIDE_ARMS = tuple(inside_name(name, kind) for name in INSIDE for kind in (LEFT, AVERAGE))


def arms_of(
    features: Features, codebooks: Mapping[str, Codebook], names: Sequence[str] | None = None, grouped: bool = True
) -> list[tuple[Pruner, Codebook | None]]:
    """Every pruner that this model can run, and the codebook rule once for each codebook, under the codebook's name."""
    given: list[tuple[Pruner, Codebook | None]] = []
    there = features.has | {"chance", "LLM attention"} | ({"groups"} if grouped else set())
    for name, pruner in PRUNERS.items():
        if names is not None and name not in names:
            continue
        if pruner is CODEBOOK:
            given += [(replace(CODEBOOK, name=called), book) for called, book in codebooks.items()]
        elif pruner is DOUBLE_SOFTMAX:
            given += [(pruner, book) for book in list(codebooks.values())[:1]]
        elif set(pruner.needs) <= there:
            given.append((pruner, None))
    return given


def shootout(
    model: VisionLanguageModel,
    items: Sequence[Item],
    shares: Sequence[float],
    codebooks: Mapping[str, Codebook],
    reference: Reference | None = None,
    names: Sequence[str] | None = None,
    seeds: int = SEEDS,
    batch_size: int = 64,
    inside: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Ask every question with all visual tokens, and with each pruner's at each budget.

    Args:
        model: from `embedlens.load`.
        items: from `tasks.family_questions`, one question a picture.
        shares: of a picture's tokens that are kept, from `shares_of`.
        codebooks: name → codebook; each is a pruner of that name.
        reference: of the token groups; default: the model's own.
        names: of PRUNERS; default: all that the model can run.
        seeds: of pruners that draw.
        batch_size: questions answered together.
        inside: of INSIDE; default: all. A model of one layer has none.

    Returns:
        One row per question, pruner, share and seed, the columns of `sweep.run_arms`, "share", "budget", "inside" and
        "average". `tokens` is how many visual tokens enter layer 0, `average` how many a layer has. Arm "baseline",
        share 1, has them all. A budget below what the first layers have on average is missing there.

    Raises:
        EmbedLensError: no questions, a share that is none, an unknown rule, or another model's codebook.
    """
    import pandas as pd

    if not items or not shares or seeds < 1:
        raise EmbedLensError(f"{len(items)} questions, {len(shares)} budgets, {seeds} seeds: pass at least one of each")
    unknown = [name for name in inside or () if name not in INSIDE]
    if unknown:
        raise EmbedLensError(f"unknown rule inside the model {unknown[0]!r}: use one of {', '.join(INSIDE)}")
    for own in codebooks.values():
        own.check(model)
    prompts: list[Prompt] = []
    for start in range(0, len(items), batch_size):
        part = items[start : start + batch_size]
        prompts += model.prompts([item.sample.image for item in part], [item.question.text for item in part])
    counts = [len(prompt.grid) for prompt in prompts]
    budgets = {share: [budget_of(n, share) for n in counts] for share in shares}
    features = [one for _, batch in model.batches(prompts, batch_size) for one in features_of(model, batch)]
    weights = attended(model, prompts)
    groups = list(token_groups_of(model, prompts, reference=reference))
    asked = [_Asked(BASELINE, 0, 1.0, n, i, Case(p)) for i, (p, n) in enumerate(zip(prompts, counts, strict=True))]
    rows = _answered(model, items, asked, batch_size)
    rules = [] if model.n_layers < 2 else [INSIDE[name] for name in (INSIDE if inside is None else inside)]
    for share, own_budgets in budgets.items():
        asked = []
        for pruner, book in arms_of(features[0], codebooks, names):
            for seed in range(seeds if pruner.random else 1):
                for i, (prompt, seen) in enumerate(zip(prompts, features, strict=True)):
                    rng = generator(items[i].sample.id, pruner.name, seed)
                    context = Context(weights[i][0], weights[i][1], groups[i], book, rng)
                    chosen = prune(pruner, seen, context, own_budgets[i])
                    asked.append(_Asked(pruner.name, seed, share, own_budgets[i], i, _case(prompt, chosen)))
        for rule in rules:
            for kind, stages in _both(rule, counts, model.n_layers, own_budgets).items():
                attention = [own for own, _ in weights]
                plans = plans_inside(model, prompts, rule, stages, attention, batch_size)
                asked += [
                    _Asked(inside_name(rule.name, kind), 0, share, own_budgets[i], i, Case(prompt, plan))
                    for i, (prompt, plan) in enumerate(zip(prompts, plans, strict=True))
                ]
        rows += _answered(model, items, asked, batch_size)
    return pd.DataFrame(rows)


def _both(rule: Inside, counts: Sequence[int], n_layers: int, budgets: Sequence[int]) -> dict[str, list[Stages]]:
    """Stages of each picture with the budget left at the end, and on average where all pictures allow it."""
    left = [rule.left(n, n_layers, budget) for n, budget in zip(counts, budgets, strict=True)]
    mean = [rule.averaging(n, n_layers, budget) for n, budget in zip(counts, budgets, strict=True)]
    possible = [stages for stages in mean if stages is not None]
    return {LEFT: left} | ({AVERAGE: possible} if len(possible) == len(mean) else {})


class _Asked(NamedTuple):
    arm: str
    seed: int
    share: float
    budget: int
    item: int
    case: Case


def _case(prompt: Prompt, chosen: Selection) -> Case:
    """The selection as an intervention, so that what prompts of a picture share runs once; merged rows cannot be."""
    if chosen.merged is not None or prompt.positions is not None or bool(chosen.keep.all()):
        return Case(chosen.prompt(prompt))
    return Case(prompt, (Prune(~chosen.keep, positions="renumber"),))


def _average(case: Case, n_layers: int) -> float:
    """Visual tokens that a layer of a case has on average."""
    n = int(case.prompt.visual.sum())
    left = n - sum(int(torch.as_tensor(value.mask).sum()) for value in case.plan if isinstance(value, Prune))
    stages = []
    for value in case.plan:
        if isinstance(value, LeaveAt):
            left -= int(torch.as_tensor(value.mask).sum())
            stages.append((value.layer, left))
    return average_tokens(tuple(stages), n, n_layers) if stages else float(left)


def _answered(
    model: VisionLanguageModel, items: Sequence[Item], asked: Sequence[_Asked], batch_size: int
) -> list[dict[str, Any]]:
    """Answers, like questions together: no padding, and short answers do not wait for long ones."""
    order = sorted(range(len(asked)), key=lambda k: (items[asked[k].item].question.kind, len(asked[k].case.prompt), k))
    pruned = [k for k in order if asked[k].case.plan]
    alone = [k for k in order if not asked[k].case.plan]
    cases = [replace(asked[k].case, kind=items[asked[k].item].question.kind) for k in pruned]
    of = dict(zip(pruned, answers(model, cases, ANSWER_TOKENS, batch_size), strict=True))
    of |= dict(zip(alone, model.answers([asked[k].case.prompt for k in alone], ANSWER_TOKENS, batch_size), strict=True))
    rows = []
    for k, (arm, seed, share, budget, i, case) in enumerate(asked):
        sample, question = items[i]
        removed = sum(int(torch.as_tensor(value.mask).sum()) for value in case.plan if isinstance(value, Prune))
        rows.append(
            {
                "item": i,
                "id": sample.id,
                "family": question.family,
                "kind": question.kind,
                "question": question.text,
                "answer": question.answer,
                "arm": arm,
                "seed": seed,
                "share": share,
                "budget": budget,
                "inside": arm in INSIDE_ARMS,
                "acted": arm != BASELINE,
                "tokens": int(case.prompt.visual.sum()) - removed,
                "average": _average(case, model.n_layers),
                "prediction": of[k],
                "correct": score(question, of[k]),
            }
        )
    return rows


# --- reading the table -----------------------------------------------------------------------------------------------


def per_question(
    table: pd.DataFrame, arm: str, share: float | None = None, family: str | None = None
) -> Float[np.ndarray, " questions"]:
    """Whether each question was answered right; of several seeds the share. Order: by item."""
    rows = table[table["arm"] == arm]
    if share is not None and arm != BASELINE:
        rows = rows[rows["share"] == share]
    if family is not None:
        rows = rows[rows["family"] == family]
    if rows.empty:
        raise EmbedLensError(f"the table has no arm {arm!r} at share {share}: run it first")
    return rows.groupby("item")["correct"].mean().to_numpy(dtype=float)


def asked_at(table: pd.DataFrame, arm: str, share: float) -> bool:
    """Whether an arm has this budget: an average below what the first layers have with all tokens is out of reach."""
    return bool(((table["arm"] == arm) & (table["share"] == share)).any())


def accuracy(table: pd.DataFrame, arm: str, share: float, family: str | None = None, seed: int = 0) -> Interval:
    """Share of right answers, with an interval over pictures."""
    return mean_interval(per_question(table, arm, share, family), seed=seed)


def kept(table: pd.DataFrame, arm: str, share: float, family: str | None = None, seed: int = 0) -> Interval:
    """Share of the full score that is left; both scores are of the same resampled pictures.

    Raises:
        EmbedLensError: no answer is right with all tokens, so that there is nothing to keep.
    """
    if not per_question(table, BASELINE, None, family).any():
        raise EmbedLensError("the model answers nothing right with all its tokens: ask questions that it can answer")
    return ratio_interval(
        per_question(table, arm, share, family), per_question(table, BASELINE, None, family), seed=seed
    )


def lead(table: pd.DataFrame, arm: str, over: Sequence[str], shares: Sequence[float], seed: int = 0) -> Interval:
    """By how much an arm's accuracy exceeds the mean of others, over several budgets; interval over pictures.

    A budget that another does not have is left out of that comparison, for both.
    """
    pairs = [(name, share) for name in over for share in shares if asked_at(table, name, share)]
    if not pairs:
        raise EmbedLensError(f"none of {', '.join(over)} has any of these budgets: run them first")
    apart = [per_question(table, arm, share) - per_question(table, name, share) for name, share in pairs]
    return mean_interval(np.mean(apart, axis=0), seed=seed)


def arms_in(table: pd.DataFrame) -> list[str]:
    """The pruners of a table that act before layer 0, in order, without the baseline."""
    return [str(arm) for arm in dict.fromkeys(table["arm"]) if arm not in (BASELINE, *INSIDE_ARMS)]


def inside_in(table: pd.DataFrame) -> list[str]:
    """The arms of a table inside the language model, in order."""
    return [arm for arm in INSIDE_ARMS if arm in set(table["arm"])]


def average_in(table: pd.DataFrame, arm: str, share: float) -> float:
    """Visual tokens that a layer has on average, over pictures."""
    return float(table[(table["arm"] == arm) & (table["share"] == share)]["average"].mean())


def ranked(table: pd.DataFrame, share: float, arms: Sequence[str] | None = None) -> list[str]:
    """Arms from the most right answers at a budget to the fewest."""
    return sorted(arms_in(table) if arms is None else arms, key=lambda a: -float(per_question(table, a, share).mean()))


def score_table(table: pd.DataFrame, shares: Sequence[float]) -> pd.DataFrame:
    """Per cent right by pruner and budget with its interval, best at the middle budget first.

    Pruners inside the language model stand below, with the tokens that a layer has on average after "at".
    """
    import pandas as pd

    counts, middle = counts_in(table), shares[len(shares) // 2]

    def cell(arm: str, share: float) -> str:
        if not asked_at(table, arm, share):
            return "–"
        said = "{:.0f} ({:.0f}–{:.0f})".format(*(100 * float(v) for v in accuracy(table, arm, share)))
        return said + (f" at {average_in(table, arm, share):.1f}" if arm in INSIDE_ARMS else "")

    order = [*ranked(table, middle), *inside_in(table)]
    frame = pd.DataFrame({arm: {budget_name(counts, b): cell(arm, b) for b in shares} for arm in order}).T
    frame.index.name = "tokens kept"
    return frame


def costs(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    share: float,
    codebooks: Mapping[str, Codebook],
    reference: Reference | None = None,
) -> pd.DataFrame:
    """Milliseconds per picture: what each pruner must read, what its choice takes, and the prefill that it saves.

    The prefill is that of a whole prompt, one at a time; a pruner that needs the language model's attention pays one.
    Pruners inside the language model are left out: here their tokens are hidden, which saves no time.
    """
    import pandas as pd

    def each(act: Any) -> float:
        began = time.perf_counter()
        for i in range(len(prompts)):
            act(i)
        return 1000 * (time.perf_counter() - began) / len(prompts)

    budgets = [budget_of(len(prompt.grid), share) for prompt in prompts]
    full = each(lambda i: model.logits(prompts[i]))
    features = features_of(model, prompts)
    weights = attended(model, prompts)
    groups = list(token_groups_of(model, prompts, reference=reference))
    looked = each(lambda i: attended(model, [prompts[i]]))
    grouped = each(lambda i: token_groups_of(model, [prompts[i]], reference=reference))
    rows = {}
    for pruner, book in arms_of(features[0], codebooks):

        def context(i: int, book: Codebook | None = book) -> Context:
            return Context(weights[i][0], weights[i][1], groups[i], book, np.random.default_rng(i))

        chosen = [prune(pruner, features[i], context(i), budgets[i]).prompt(prompts[i]) for i in range(len(prompts))]
        rows[pruner.name] = {
            "choosing": each(lambda i, p=pruner: prune(p, features[i], context(i), budgets[i])),
            "reading": looked if pruner.asks else grouped if "groups" in pruner.needs else 0.0,
            "prefill after": each(lambda i, c=chosen: model.logits(c[i])),
            "prefill before": full,
        }
    return pd.DataFrame(rows).T.round(1)


# --- two codebooks, and what they share with the other paper's groups ------------------------------------------------


@dataclass(frozen=True, eq=False)
class Codebooks:
    """The codebook by the release's recipe, the same without its step of rarity, and one of half of the pictures."""

    released: Codebook
    stages: Steps
    without_rarity: Codebook
    stages_without: Steps
    halves: tuple[Codebook, Codebook]
    """Of the first and the second half of the pictures, without the step of rarity: few pictures leave enough there."""
    thresholds: Thresholds

    @property
    def named(self) -> dict[str, Codebook]:
        """As `shootout` takes them."""
        return {RELEASED_NAME: self.released, LOOSE_NAME: self.without_rarity}


def codebooks_of(
    model: VisionLanguageModel, found: Orderings, recipe: Recipe | None = None, thresholds: Thresholds | None = None
) -> Codebooks:
    """Build them from scored pictures.

    Args:
        model: whose tokens they are.
        found: from `orderings.study`.
        recipe: default: the release's, its counts as shares, its tokens' unit.
        thresholds: default: `quantile_thresholds`.
    """
    recipe = recipe or Recipe(most_in_picture=8 / 96, more_pictures=64 / 500, rms=LLAVA_RMS)
    limits = thresholds or quantile_thresholds(found.scores)
    loose = replace(recipe, most_in_picture=1.0)
    ids = [sample.id for sample in found.samples]
    tokens, scores, half = found.tokens, list(found.scores), len(ids) // 2

    def made(part: slice, recipe: Recipe) -> tuple[Codebook, Steps]:
        return build(model, tokens[part], scores[part], ids[part], limits, recipe, found.protocol)

    everything = slice(0, len(ids))
    released, without = made(everything, recipe), made(everything, loose)
    halves = made(slice(0, half), loose)[0], made(slice(half, len(ids)), loose)[0]
    return Codebooks(*released, *without, halves, limits)


def dead_shares(found: Orderings, books: Codebooks, share: float, seed: int = 0) -> dict[str, Interval]:
    """Share of dead and sink tokens among all tokens, among prototypes, and among what each codebook removes."""
    place = {sample.id: i for i, sample in enumerate(found.samples)}
    gone = [~groups.alive.cpu().numpy() for groups in found.groups]

    def of(masks: Sequence[np.ndarray]) -> Interval:
        hits = np.array([float((mask & dead).sum()) for mask, dead in zip(masks, gone, strict=True)])
        part = ratio_interval(hits, np.array([float(mask.sum()) for mask in masks]), seed=seed)
        return beyond_seen(part, sum(bool(mask.any()) for mask in masks))

    def prototypes(book: Codebook) -> list[np.ndarray]:
        masks = [np.zeros(len(dead), dtype=bool) for dead in gone]
        for image, patch in zip(book.image_ids.tolist(), book.patches.tolist(), strict=True):
            masks[place[image]][patch] = True
        return masks

    shares = {"all tokens": of([np.ones(len(dead), dtype=bool) for dead in gone])}
    for name, book in books.named.items():
        shares[f"prototypes, {name}"] = of(prototypes(book))
        removed = [
            ~keep_lowest(book.redundancy(tokens), budget_of(len(tokens), share)).numpy() for tokens in found.tokens
        ]
        if any(mask.any() for mask in removed):
            shares[f"removed, {name}"] = of(removed)
    return shares


def agreement_of(
    one: Codebook, other: Codebook, tokens: Sequence[Float[Tensor, "_ d"]], share: float, seed: int = 0
) -> Interval:
    """Share of the kept tokens that two codebooks have in common, at one budget."""
    both = []
    for own in tokens:
        budget = budget_of(len(own), share)
        keep = [keep_lowest(book.redundancy(own), budget) for book in (one, other)]
        both.append(float((keep[0] & keep[1]).sum()) / budget)
    return mean_interval(np.array(both), seed=seed)


# --- verdicts --------------------------------------------------------------------------------------------------------

RULES = {
    "R01": f"holds if the kept share of the score, at the budgets of 10 % to 20 % of the tokens, lies above {KEPT:.0%} "
    "with its whole interval; fails if below it",
    "R10": "holds if the codebook's lead over each published pruner by intermediate states lies above zero, with its "
    "whole interval, at every budget that the pruner has; does not hold if the mean lead lies at or below zero with "
    "its whole interval; partly otherwise; pruners inside the language model count at an average of the budget over "
    "layers",
    "R11": "holds if no weight changes",
    "R12": "holds if exactly the budget is fed",
    "R13": "holds if no kept token is more redundant than a removed one, in any picture at any budget",
    "R14": "holds if the codebooks of two halves together have all their rows and score no token lower than either",
    "R17": f"holds if the codebooks of two halves of the pictures keep the same tokens to {ALIKE:.0%} or more, with "
    "the whole interval; partly if more than two random choices share",
}


def findings(
    model: VisionLanguageModel,
    table: pd.DataFrame,
    found: Orderings,
    books: Codebooks,
    shares: Sequence[float],
    changed_weights: int = 0,
    seed: int = 0,
) -> dict[str, Finding]:
    """R01, R02 and R10 to R18 by `RULES`.

    Args:
        model: the one that all was measured on.
        table: from `shootout`, with both codebooks.
        found: from `orderings.study`, the pictures of the codebooks.
        books: from `codebooks_of`.
        shares: as in the table, largest first.
        changed_weights: how many of the model's tensors the whole run changed.
        seed: of the bootstrap.
    """
    n, tokens = len(per_question(table, BASELINE)), found.tokens
    heavy = [share for share in shares if 0.1 <= share <= 0.2] or [shares[len(shares) // 2]]

    def finding(value: Interval, verdict: str, note: str, of: int = n) -> Finding:
        return Finding(float(value.value), float(value.low), float(value.high), of, verdict, note)

    def sure(value: float, verdict: str, note: str, of: int) -> Finding:
        return Finding(value, value, value, of, verdict, note)

    def untestable(note: str) -> Finding:
        return Finding(None, None, None, n, UNTESTABLE, note)

    result = {}
    own = np.mean([per_question(table, RELEASED_NAME, part) for part in heavy], axis=0)
    kept(table, RELEASED_NAME, heavy[0], seed=seed)  # refuses a model that answers nothing
    share = ratio_interval(own, per_question(table, BASELINE), seed=seed)
    verdict = HOLDS if share.low > KEPT else FAILS if share.high < KEPT else PARTLY
    counts = counts_in(table)
    names = ", ".join(budget_name(counts, part) for part in heavy)
    result["R01"] = finding(
        share, verdict, f"Share of the full score, mean over the budgets of {names} of {counted(counts)} tokens."
    )
    result["R02"] = untestable(
        "Only questions about one picture are asked here; several pictures and video need other data."
    )
    rivals = [name for name in (*PUBLISHED, *MATCHED) if name in set(table["arm"])]
    if rivals:
        mean = lead(table, RELEASED_NAME, rivals, shares, seed)
        pairs = [(name, part) for name in rivals for part in shares if asked_at(table, name, part)]
        each = {(name, part): lead(table, RELEASED_NAME, [name], [part], seed) for name, part in pairs}
        ahead = sum(float(value.low) > 0 for value in each.values())
        behind = sum(float(value.high) < 0 for value in each.values())
        verdict = HOLDS if ahead == len(each) else FAILS if mean.high <= 0 else PARTLY
        note = (
            f"Mean lead, as a share of the questions, over {'; '.join(rivals)}. With its whole interval ahead in "
            f"{ahead}, behind in {behind} of {len(each)} pairs of pruner and budget."
        )
        if "[cls] top" in set(table["arm"]):
            with_top = lead(table, RELEASED_NAME, ["[cls] top", *rivals], shares, seed)
            note += f" With [cls] top, a score and no published pruner, among them: {with_top.texts(3)[0]}."
        result["R10"] = finding(mean, verdict, note)
    else:
        result["R10"] = untestable("No pruner by intermediate states can run on this model.")
    verdict = FAILS if changed_weights else HOLDS
    result["R11"] = sure(
        float(changed_weights), verdict, "Weights that scoring, building and pruning changed.", len(found.samples)
    )
    rows = table[(table["arm"] != BASELINE) & ~table["inside"]]
    exact = float((rows["tokens"] == rows["budget"]).mean())
    result["R12"] = sure(
        exact,
        HOLDS if exact == 1 else FAILS,
        "Share of the prompts that feed exactly the budget, of the pruners before layer 0.",
        len(rows),
    )
    asked = [(own, budget_of(len(own), part)) for own in tokens for part in shares]
    ordered = [_ordered(books.released.redundancy(own).cpu(), b) for own, b in asked if b < len(own)]
    share_of = float(np.mean(ordered)) if ordered else 1.0
    result["R13"] = sure(
        share_of, HOLDS if share_of == 1 else FAILS, "Share of selections without an exception.", max(1, len(ordered))
    )
    both = books.halves[0].extend(books.halves[1])
    grows = all(
        bool((both.redundancy(own) >= part.redundancy(own) - 1e-5).all()) for own in tokens for part in books.halves
    )
    whole = len(both) == sum(map(len, books.halves))
    gain = agreement_of(both, books.halves[0], tokens, heavy[0], seed)
    note = (
        f"Rows after `extend`, as a share; {gain.texts()[0]} of the kept tokens are those that one half keeps. The "
        "halves are built without the step of rarity."
    )
    result["R14"] = sure(
        len(both) / sum(map(len, books.halves)), HOLDS if grows and whole else FAILS, note, len(tokens)
    )
    scores = found.scores
    weighed = [
        rank_correlation(s.cascade().double().numpy(), (s.region + s.picture)[:, 0].double().numpy()) for s in scores
    ]
    same = mean_interval(np.array(weighed), seed=seed)
    result["R15"] = untestable(
        f"A setting of the release, used here; with equal weights D orders the tokens alike: rho {same.texts()[0]}."
    )
    size = f"This model's has {len(books.released)} prototypes, {len(books.without_rarity)} without the step of rarity."
    result["R16"] = untestable(f"Sizes of three released codebooks. {size}")
    alike = agreement_of(*books.halves, tokens, heavy[0], seed)
    verdict = HOLDS if alike.low > ALIKE else PARTLY if alike.low > heavy[0] else FAILS
    half = len(found.samples) // 2
    note = f"Share of kept tokens in common of the codebooks of two times {half} pictures, without the step of rarity."
    result["R17"] = finding(alike, verdict, note, len(tokens))
    double = (
        lead(table, DOUBLE_SOFTMAX.name, [RELEASED_NAME], shares, seed)
        if DOUBLE_SOFTMAX.name in set(table["arm"])
        else None
    )
    beside = "" if double is None else f" Here the double softmax leads the largest cosine by {double.texts()[0]}."
    result["R18"] = untestable(f"Said of LLaVA-NeXT and LLaVA-OneVision.{beside}")
    return result


def _ordered(redundancy: Float[Tensor, " n"], budget: int) -> bool:
    keep = keep_lowest(redundancy, budget)
    return float(redundancy[keep].max()) <= float(redundancy[~keep].min())


def counted(counts: Sequence[int]) -> str:
    """How many tokens pictures have.

    >>> counted([64, 64]), counted([96, 144])
    ('64', '96 to 144')
    """
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def digest(model: VisionLanguageModel) -> dict[str, float]:
    """A number for each of the model's tensors, to see that none changed."""
    return {name: float(part.detach().double().sum()) for name, part in model.hf.named_parameters()}


# --- figures ---------------------------------------------------------------------------------------------------------


def pipeline_figure(books: Codebooks, found: Orderings, share: float) -> Figure:
    """Figure 2: identify, probe, prune, with the numbers of this run."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    stages, counts = books.stages, [len(own) for own in found.tokens]
    least = f"the {budget_name(counts, share)} of {counted(counts)}"
    steps = [
        ("identify", f"{stages.scored:,} tokens of\n{len(found.samples)} pictures,\nread alone and\nleft out"),
        ("", f"{stages.candidates} sure of little\nand missed\nby little"),
        ("", f"{stages.rare} of them rare\nin their picture"),
        ("codebook", f"{stages.codebook} whose like\nrecurs over\npictures"),
        ("probe", "a token's\nlargest cosine\nto a prototype"),
        ("prune", f"{least}\nleast redundant\nenter layer 0"),
    ]
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 3.9))
    for at, (name, text) in enumerate(steps):
        x, y = at % 3, 1.55 * (1 - at // 3)
        colour = figures.ORDER[0] if at < 4 else figures.ORDER[2]
        where, style = (x + 0.06, y), "round,pad=0.01"
        axes.add_patch(
            FancyBboxPatch(where, 0.84, 1, boxstyle=style, facecolor="white", edgecolor=colour, linewidth=1.8)
        )
        axes.text(x + 0.48, y + 0.5, text, ha="center", va="center", fontsize=11)
        axes.text(x + 0.08, y + 1.06, name, ha="left", va="bottom", fontsize=11, fontweight="bold", color=colour)
        if x:
            axes.annotate(
                "", (x + 0.06, y + 0.5), (x - 0.1, y + 0.5), arrowprops={"arrowstyle": "-|>", "color": "#555555"}
            )
    axes.plot([2.54, 2.54, 0.75], [1.53, 1.37, 1.37], color="#555555", linewidth=1)  # above the names of the lower row
    axes.annotate("", (0.75, 1.02), (0.75, 1.38), arrowprops={"arrowstyle": "-|>", "color": "#555555"})
    axes.set_xlim(0, 3)
    axes.set_ylim(-0.1, 2.85)
    axes.set_axis_off()
    figures.headline(fig, f"{stages.codebook} of {stages.scored:,} tokens become prototypes")
    figures.sign(fig, found.model, f"n = {len(found.samples)} pictures")
    return fig


def removal_figure(found: Orderings, book: Codebook, at: int, share: float) -> Figure:
    """Figure 5: the redundancy of every token of a picture; kept ones have a thick outline."""
    prompt, tokens = found.prompts[at], found.tokens[at]
    redundancy, budget = book.redundancy(tokens).cpu(), budget_of(len(tokens), share)
    keep = keep_lowest(redundancy, budget)
    on = ~np.asarray(found.prompts[at].grid.padded)
    words = [f"{float(value):.2f}" for value in redundancy]
    kept_on = int((keep.numpy() & on).sum())
    title = f"{kept_on} of the {budget} tokens kept show the picture, {budget - kept_on} a bar beside it"
    footer = "number: largest cosine to a prototype | " + figures.signature(found.model, "one picture")
    return figures.patch_figure(prompt.image, prompt.grid, words, title, keep, footer)


def shootout_figure(table: pd.DataFrame, shares: Sequence[float], model: str, seed: int = 0) -> Figure:
    """Share of the full score that each pruner keeps, one panel a budget; the paper's 90 % to 110 % dashed.

    Below the line: pruners inside the language model, hollow with the budget left at the end, filled with it as their
    average over layers.
    """
    from matplotlib import pyplot as plt

    counts, middle = counts_in(table), shares[len(shares) // 2]
    before, inside = ranked(table, middle), inside_in(table)
    names = [*before, *inside]
    fig, grid = plt.subplots(
        1, len(shares), figsize=(figures.WIDTH, 0.3 * len(names) + 1.9), sharey=True, squeeze=False
    )
    for axes, share in zip(grid[0], shares, strict=True):
        for place, name in enumerate(names):
            if not asked_at(table, name, share):
                axes.text(0.02, place, "out of reach", fontsize=8, va="center", color="#555555")
                continue
            face = "white" if name.endswith(LEFT) else None
            value = kept(table, name, share, seed=seed)
            figures.dots(axes, np.array([float(place)]), [value], _look(name), along="x", face=face)
        for bound in (0.9, 1.1):
            axes.axvline(bound, color=figures.FACT, linestyle="--", linewidth=1)
        if inside:
            axes.axhline(len(before) - 0.5, color="#555555", linewidth=0.8)
        axes.set_xlim(0, 1.25)
        axes.set_xticks([0, 0.5, 1], ["0", "50", "100"])
        same = len(set(counts)) == 1
        axes.set_title(f"{budget_name(counts, share)} tokens\n{share:.0%}" if same else f"{share:.0%}", fontsize=11)
        axes.grid(axis="y", visible=False)
    grid[0, 0].set_yticks(range(len(names)), names, fontsize=10)
    grid[0, 0].invert_yaxis()
    place = before.index(RELEASED_NAME) + 1 if RELEASED_NAME in before else 0
    kept_at = budget_name(counts, middle)
    best = f"Before layer 0, {before[0]} keeps most at {kept_at} tokens"
    figures.headline(fig, f"{best};\ncodebook: number {place} of {len(before)}")
    figures.sign(
        fig,
        model,
        f"% of the full score, n = {len(per_question(table, BASELINE))} questions; dashed: paper's 90 to 110 %",
    )
    return fig


def inside_figure(table: pd.DataFrame, shares: Sequence[float], model: str, seed: int = 0) -> Figure | None:
    """Share of the full score against visual tokens a layer: where dropping inside the model stands for its cost.

    Lines: the codebook, FastV's choice and a random one before layer 0. Marks: rules of INSIDE, hollow with the budget
    left at the end, filled with it as their average. None where nothing ran inside.
    """
    from matplotlib import pyplot as plt

    inside = inside_in(table)
    if not inside:
        return None
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 4.2))
    full = np.mean(counts_in(table))
    for name, style in ((RELEASED_NAME, "-"), ("FastV", "--"), ("random", ":")):
        if name in arms_in(table):
            at = [average_in(table, name, share) / full for share in shares]
            values = [kept(table, name, share, seed=seed) for share in shares]
            look = _look(name)
            axes.plot(
                at,
                [float(v.value) for v in values],
                style,
                color=look.colour,
                marker=look.marker,
                label=f"{name}, before layer 0",
            )
            low, high = (
                [float(part) for part in parts] for parts in zip(*(value[1:] for value in values), strict=True)
            )
            axes.fill_between(at, low, high, color=look.colour, alpha=0.1, linewidth=0)
    for name in inside:
        have = [share for share in shares if asked_at(table, name, share)]
        at = [average_in(table, name, share) / full for share in have]
        values = [kept(table, name, share, seed=seed) for share in have]
        figures.dots(axes, np.array(at), values, _look(name), name, face="white" if name.endswith(LEFT) else None)
    axes.set_xlabel("visual tokens a layer, % of all, mean over layers")
    axes.set_ylabel("% of the full score")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9, ncols=2, loc="lower right")
    share, others = _inside_pair(table, shares)
    gains = ", ".join(
        "{} {:+.0%} ({:+.0%} to {:+.0%})".format(name.split(" inside")[0], *map(float, value))
        for name, value in others.items()
    )
    title = f"Dropped inside at an average of {share:.0%}, lead over before layer 0:\n{gains}"
    figures.headline(fig, title if others else "No budget is as large as the average of the first layers")
    figures.sign(
        fig,
        model,
        f"leads in % of the questions, over FastV's choice, n = {len(per_question(table, BASELINE))} questions",
    )
    return fig


def _inside_pair(table: pd.DataFrame, shares: Sequence[float]) -> tuple[float, dict[str, Interval]]:
    """The smallest budget that all rules inside reach on average, and each one's lead there over FastV's choice before
    layer 0; empty where there is none."""
    names = [name for name in MATCHED if name in set(table["arm"])]
    both = [share for share in shares if names and all(asked_at(table, name, share) for name in names)]
    if not both or not asked_at(table, "FastV", both[-1]):
        return 0.0, {}
    return both[-1], {name: lead(table, name, ["FastV"], [both[-1]]) for name in names}


def _look(name: str) -> figures.Look:
    if name in (RELEASED_NAME, LOOSE_NAME, DOUBLE_SOFTMAX.name):
        return figures.Look(figures.ORDER[1], "D")
    if name in INSIDE_ARMS:
        return figures.Look(*((figures.ORDER[0], "^") if name.startswith("FastV") else (figures.ORDER[3], "v")))
    if name in INTERMEDIATE:
        return figures.Look(figures.ORDER[0], "o")
    if name == "random":
        return figures.Look("#222222", "X")
    return figures.Look(figures.ORDER[2], "s")


def families_figure(table: pd.DataFrame, share: float, model: str) -> Figure:
    """Per cent right by pruner and family at one budget, the full model on top."""
    from matplotlib import pyplot as plt

    families = list(dict.fromkeys(table["family"]))
    names = [*ranked(table, share), *(name for name in inside_in(table) if asked_at(table, name, share))]
    rows = np.array(
        [[per_question(table, arm, share, family).mean() for family in families] for arm in (BASELINE, *names)]
    )
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 0.3 * len(rows) + 1.7))
    axes.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            axes.text(
                x, y, f"{value:.0%}", ha="center", va="center", fontsize=10, color="white" if value > 0.6 else "black"
            )
    axes.set_xticks(range(len(families)), families)
    axes.set_yticks(range(len(rows)), ["all tokens", *names], fontsize=10)
    axes.grid(visible=False)
    loss = rows[0] - rows[1 : 1 + len(arms_in(table))].max(0)
    tokens, worst = budget_name(counts_in(table), share), families[int(loss.argmax())]
    figures.headline(fig, f"Before layer 0, the best with {tokens} tokens loses most in {worst}")
    figures.sign(
        fig, model, f"per cent right, n = {len(per_question(table, BASELINE, None, families[0]))} questions a family"
    )
    return fig


def few_to_tell(shares: Mapping[str, Interval]) -> bool:
    """Whether the codebook's share of dead and sink tokens may as well be that of all tokens."""
    own, base = shares[f"prototypes, {RELEASED_NAME}"], float(shares["all tokens"].value)
    return float(own.low) <= base <= float(own.high)


def overlap_figure(shares: Mapping[str, Interval], model: str, pictures: int) -> Figure:
    """Share of dead and sink tokens among all tokens, prototypes, and what the codebooks remove."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 0.55 * len(shares) + 1.6))
    looks = {name: figures.GROUPS["text"] if name == "all tokens" else figures.GROUPS["dead"] for name in shares}
    figures.interval_bars(axes, shares, looks)
    axes.set_xlabel("share of dead and sink tokens")
    base, own = float(shares["all tokens"].value), shares[f"prototypes, {RELEASED_NAME}"]
    loose = float(shares[f"prototypes, {LOOSE_NAME}"].value)
    told = f"{float(own.value):.0%} of the prototypes are dead or sink tokens, {base:.0%} of all tokens"
    if few_to_tell(shares):
        told = f"Dead or sink tokens: {base:.0%} of all, {loose:.0%} of the prototypes without rarity;\ntoo few with it"
    figures.headline(fig, told)
    figures.sign(fig, model, f"n = {pictures} pictures")
    return fig


# --- for the page ----------------------------------------------------------------------------------------------------


def told(
    table: pd.DataFrame, books: Codebooks, shares_dead: Mapping[str, Interval], shares: Sequence[float], layers: int
) -> dict[str, str | int]:
    """What the prose says of the codebooks and the shoot-out."""
    middle, counts = shares[len(shares) // 2], counts_in(table)
    names = ranked(table, middle)
    stages, limits = books.stages, books.thresholds
    # 0-d intervals as shares in per cent
    percent = {name: "{:.0%} ({:.0%} to {:.0%})".format(*map(float, value)) for name, value in shares_dead.items()}
    return {
        "n_questions": len(per_question(table, BASELINE)),
        "budgets": ", ".join(budget_name(counts, share) for share in shares),
        "middle": budget_name(counts, middle),
        "tokens_a_picture": counted(counts),
        "best": names[0],
        "worst": names[-1],
        "place": names.index(RELEASED_NAME) + 1,
        "n_pruners": len(names),
        "full_score": _percent(accuracy(table, BASELINE, 0)),
        "codebook_kept": _percent(kept(table, RELEASED_NAME, middle)),
        "loose_kept": _percent(kept(table, LOOSE_NAME, middle)),
        "best_kept": _percent(kept(table, names[0], middle)),
        "random_kept": _percent(kept(table, "random", middle)),
        "over_random": lead(table, RELEASED_NAME, ["random"], [middle]).texts(2)[0],
        "tau_p": f"{limits.probability:.3g}",
        "tau_d": f"{limits.divergence:.2g}",
        "candidates": stages.candidates,
        "rare": stages.rare,
        "prototypes": stages.codebook,
        "prototype_pictures": len(books.released.image_ids.unique()),
        "loose_prototypes": books.stages_without.codebook,
        "directions": len(books.without_rarity.deduplicated(0.9)),
        "dead_all": percent["all tokens"],
        "dead_prototypes": percent[f"prototypes, {RELEASED_NAME}"]
        + (f", {len(books.released)} prototypes being too few to tell," if few_to_tell(shares_dead) else ""),
        "dead_loose": percent[f"prototypes, {LOOSE_NAME}"],
        "dead_removed": percent.get(f"removed, {RELEASED_NAME}", "none"),
        "inside_averages": _averages(table, middle),
        "inside_layers": _where(layers),
        "inside_matched": _matched_said(table, shares),
    }


def _matched_said(table: pd.DataFrame, shares: Sequence[float]) -> str:
    share, leads = _inside_pair(table, shares)
    if not leads:
        return (
            "No budget is as large as what the first layers have on average, so there is no comparison at one average."
        )
    own = ", ".join(f"{name.split(',')[0]} {value.texts(2)[0]}" for name, value in leads.items())
    return f"At an average of {budget_name(counts_in(table), share)} tokens a layer their leads over it are: {own}."


def _where(n_layers: int) -> str:
    if n_layers < 2:
        return "nothing, as the model has one layer"
    return ", ".join(f"{name} before layer {_listed(rule.layers(n_layers))}" for name, rule in INSIDE.items())


def _averages(table: pd.DataFrame, share: float) -> str:
    own = [name for name in inside_in(table) if name.endswith(LEFT)]
    return ", ".join(f"{name.split(',')[0]} {average_in(table, name, share):.1f}" for name in own) or "nothing"


def _listed(layers: Sequence[int]) -> str:
    return " and ".join(", ".join(map(str, part)) for part in (layers[:-1], layers[-1:]) if part)


def _percent(value: Interval) -> str:
    return "{:.0%} ({:.0%} to {:.0%})".format(*map(float, value))


def numbers(table: pd.DataFrame, books: Codebooks, shares: Sequence[float]) -> dict[str, float]:
    """What the record keeps beside the claims: every pruner's accuracy at every budget, and the codebook's sizes."""
    found, counts = {"accuracy_all_tokens": float(per_question(table, BASELINE).mean())}, counts_in(table)
    for arm in (*arms_in(table), *inside_in(table)):
        for share in shares:
            if asked_at(table, arm, share):
                name = f"{arm}_{budget_name(counts, share)}"
                found[f"accuracy_{name}"] = float(per_question(table, arm, share).mean())
                if arm in INSIDE_ARMS:
                    found[f"average_tokens_{name}"] = average_in(table, arm, share)
    return found | {"prototypes": len(books.released), "prototypes_without_rarity": len(books.without_rarity)}


def questions_of(model: VisionLanguageModel, n: int, seed: int = 0) -> list[Item]:
    """`n` held-out questions of every family, their pictures drawn at the model's own size."""
    scale = max(1.0, model.canvas_side / 112)
    return [item for family in FAMILIES for item in family_questions(family, n, seed, scale)]


NOTED = ("R01", "R02", "R03", "R04", "R05", "R06", "R10")  # claims whose note, value and rule stand in the prose
VALUED = ("R01", "R05", "R06", "R07", "R10")
RULED = ("R01", "R03", "R04", "R05", "R06", "R07", "R08", "R09", "R10")


def glued(findings: Mapping[str, Finding]) -> dict[str, str]:
    """What the prose says of single claims: note, value with its interval, rule."""
    rules = {**orderings.RULES, **RULES}
    said = {f"{name.lower()}_note": findings[name].note for name in NOTED}
    said |= {f"{name.lower()}_rule": rules[name] for name in RULED}
    for name in VALUED:
        found = findings[name]
        parts = (found.value, found.low, found.high)
        told_as = "{:.2f}, {:.2f} to {:.2f}".format(*parts) if found.value is not None else "not measurable"
        said[f"{name.lower()}_value"] = told_as
    return said
