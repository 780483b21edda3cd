"""The codebook against every other pruner: the same questions, the same budgets, what of the score is kept.

    table = shootout(model, items, budgets_of(n), {"codebook": book}, reference)
    kept(table, "codebook", budget)        # share of the full score, with its interval over pictures

All pruners remove their tokens before layer 0, so that at one budget everyone feeds as many tokens to every layer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from embedlens.codebook import Codebook
from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, token_groups_of
from embedlens.intervals import Interval, mean_interval, ratio_interval
from embedlens.paired import BASELINE
from embedlens.pruners import CODEBOOK, DOUBLE_SOFTMAX, PRUNERS, Context, Features, Pruner, attended, features_of, prune
from embedlens.sweep import generator
from embedlens.tasks import ANSWER_TOKENS, Item, score

if TYPE_CHECKING:
    import pandas as pd

    from embedlens.vlm import Prompt, VisionLanguageModel
else:
    Prompt = VisionLanguageModel = object

SEEDS = 5  # repeats of what draws
SHARES = (1 / 3, 1 / 6, 1 / 9, 0.05)  # of the tokens: LLaVA-1.5's 192, 96, 64 and 29 of 576
#: Pruners that choose by attention or by likeness to CLS, which the paper calls intermediate states.
INTERMEDIATE = ("[cls] top", "FastV", "SparseVLM", "VisionZip", "PruMerge+", "HiPrune", "VisPruner")


def budgets_of(n: int, shares: Sequence[float] = SHARES) -> list[int]:
    """Budgets of a picture of n tokens, largest first, each once, none below 1.

    >>> budgets_of(576), budgets_of(64)
    ([192, 96, 64, 29], [21, 11, 7, 3])
    """
    if n < 1 or not all(0 < share <= 1 for share in shares):
        raise EmbedLensError(f"shares {tuple(shares)} of {n} tokens: pass shares above 0 up to 1")
    return sorted({max(1, round(n * share)) for share in shares}, reverse=True)


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
    budgets: Sequence[int],
    codebooks: Mapping[str, Codebook],
    reference: Reference | None = None,
    names: Sequence[str] | None = None,
    seeds: int = SEEDS,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Ask every question with all visual tokens, and with each pruner's at each budget.

    Args:
        model: from `embedlens.load`.
        items: from `tasks.family_questions`, one question a picture.
        budgets: tokens kept, from `budgets_of`.
        codebooks: name → codebook; each is a pruner of that name.
        reference: of the token groups; default: the model's own.
        names: of PRUNERS; default: all that the model can run.
        seeds: of pruners that draw.
        batch_size: questions answered together.

    Returns:
        One row per question, pruner, budget and seed, the columns of `sweep.run_arms` and "budget"; `tokens` is how
        many visual tokens were fed. Arm "baseline", budget n, has them all.

    Raises:
        EmbedLensError: no questions, a budget that a picture does not have, or another model's codebook.
    """
    import pandas as pd

    if not items or not budgets or seeds < 1:
        raise EmbedLensError(
            f"{len(items)} questions, {len(budgets)} budgets, {seeds} seeds: pass at least one of each"
        )
    for book in codebooks.values():
        book.check(model)
    prompts: list[Prompt] = []
    for start in range(0, len(items), batch_size):
        part = items[start : start + batch_size]
        prompts += model.prompts([item.sample.image for item in part], [item.question.text for item in part])
    features = [one for _, batch in model.batches(prompts, batch_size) for one in features_of(model, batch)]
    weights = attended(model, prompts)
    groups = list(token_groups_of(model, prompts, reference=reference))
    rows = _answered(model, items, [(BASELINE, 0, len(p.grid), i, p) for i, p in enumerate(prompts)], batch_size)
    for budget in budgets:
        asked = []
        for pruner, book in arms_of(features[0], codebooks, names):
            for seed in range(seeds if pruner.random else 1):
                for i, (prompt, seen) in enumerate(zip(prompts, features, strict=True)):
                    rng = generator(items[i].sample.id, pruner.name, seed)
                    context = Context(*weights[i], groups=groups[i], codebook=book, rng=rng)
                    chosen = prune(pruner, seen, context, budget)
                    asked.append((pruner.name, seed, budget, i, chosen.prompt(prompt)))
        rows += _answered(model, items, asked, batch_size)
    return pd.DataFrame(rows)


def _answered(
    model: VisionLanguageModel,
    items: Sequence[Item],
    asked: Sequence[tuple[str, int, int, int, Prompt]],
    batch_size: int,
) -> list[dict[str, Any]]:
    """Answers to prompts, like questions together: no padding, and short answers do not wait for long ones."""
    order = sorted(range(len(asked)), key=lambda k: (items[asked[k][3]].question.kind, len(asked[k][4]), k))
    texts = model.answers([asked[k][4] for k in order], ANSWER_TOKENS, batch_size)
    of = dict(zip(order, texts, strict=True))
    rows = []
    for k, (arm, seed, budget, i, prompt) in enumerate(asked):
        sample, question = items[i]
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
                "budget": budget,
                "acted": arm != BASELINE,
                "tokens": int(prompt.visual.sum()),
                "prediction": of[k],
                "correct": score(question, of[k]),
            }
        )
    return rows


# --- reading the table -----------------------------------------------------------------------------------------------


def per_question(
    table: pd.DataFrame, arm: str, budget: int | None = None, family: str | None = None
) -> Float[np.ndarray, " questions"]:
    """Whether each question was answered right; of several seeds the share. Order: by item."""
    rows = table[table["arm"] == arm]
    if budget is not None and arm != BASELINE:
        rows = rows[rows["budget"] == budget]
    if family is not None:
        rows = rows[rows["family"] == family]
    if rows.empty:
        raise EmbedLensError(f"the table has no arm {arm!r} at budget {budget}: run it first")
    return rows.groupby("item")["correct"].mean().to_numpy(dtype=float)


def accuracy(table: pd.DataFrame, arm: str, budget: int, family: str | None = None, seed: int = 0) -> Interval:
    """Share of right answers, with an interval over pictures."""
    return mean_interval(per_question(table, arm, budget, family), seed=seed)


def kept(table: pd.DataFrame, arm: str, budget: int, family: str | None = None, seed: int = 0) -> Interval:
    """Share of the full score that is left; both scores are of the same resampled pictures."""
    return ratio_interval(
        per_question(table, arm, budget, family), per_question(table, BASELINE, None, family), seed=seed
    )


def lead(table: pd.DataFrame, arm: str, over: Sequence[str], budgets: Sequence[int], seed: int = 0) -> Interval:
    """By how much an arm's accuracy exceeds the mean of others, over several budgets; interval over pictures."""
    own = np.mean([per_question(table, arm, budget) for budget in budgets], axis=0)
    others = np.mean([per_question(table, name, budget) for name in over for budget in budgets], axis=0)
    return mean_interval(own - others, seed=seed)


def arms_in(table: pd.DataFrame) -> list[str]:
    """The pruners of a table, in order, without the baseline."""
    return [str(arm) for arm in dict.fromkeys(table["arm"]) if arm != BASELINE]


def score_table(table: pd.DataFrame, budgets: Sequence[int]) -> pd.DataFrame:
    """Per cent right by pruner and budget, best at the middle budget first, with the interval of the last column."""
    import pandas as pd

    rows = {}
    for arm in arms_in(table):
        rows[arm] = {
            str(b): "{:.0f} ({:.0f}–{:.0f})".format(*(100 * float(v) for v in accuracy(table, arm, b))) for b in budgets
        }
    middle = budgets[len(budgets) // 2]
    order = sorted(rows, key=lambda arm: -float(per_question(table, arm, middle).mean()))
    frame = pd.DataFrame({arm: rows[arm] for arm in order}).T
    frame.index.name = "tokens kept"
    return frame


def costs(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    budget: int,
    codebooks: Mapping[str, Codebook],
    reference: Reference | None = None,
) -> pd.DataFrame:
    """Milliseconds per picture: what each pruner must read, what its choice takes, and the prefill that it saves.

    The prefill is that of a whole prompt, one at a time; a pruner that needs the language model's attention pays one.
    """
    import pandas as pd

    def each(act: Any) -> float:
        began = time.perf_counter()
        for i in range(len(prompts)):
            act(i)
        return 1000 * (time.perf_counter() - began) / len(prompts)

    full = each(lambda i: model.logits(prompts[i]))
    features = features_of(model, prompts)
    weights = attended(model, prompts)
    groups = list(token_groups_of(model, prompts, reference=reference))
    looked = each(lambda i: attended(model, [prompts[i]]))
    grouped = each(lambda i: token_groups_of(model, [prompts[i]], reference=reference))
    rows = {}
    for pruner, book in arms_of(features[0], codebooks):

        def context(i: int, book: Codebook | None = book) -> Context:
            return Context(*weights[i], groups=groups[i], codebook=book, rng=np.random.default_rng(i))

        chosen = [prune(pruner, features[i], context(i), budget).prompt(prompts[i]) for i in range(len(prompts))]
        rows[pruner.name] = {
            "choosing": each(lambda i, p=pruner: prune(p, features[i], context(i), budget)),
            "reading": looked if pruner.asks else grouped if "groups" in pruner.needs else 0.0,
            "prefill after": each(lambda i, c=chosen: model.logits(c[i])),
            "prefill before": full,
        }
    return pd.DataFrame(rows).T.round(1)
