"""An arm is compared with the baseline question by question, and no verdict says more than the questions can."""

import math

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from embedlens import EmbedLensError, paired, stats, tasks
from embedlens.paired import compare


def answers(n: int, right: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < right).astype(float)


def flipped(baseline: np.ndarray, lost: int, gained: int) -> np.ndarray:
    arm = baseline.copy()
    arm[np.flatnonzero(baseline == 1)[:lost]] = 0
    arm[np.flatnonzero(baseline == 0)[:gained]] = 1
    return arm


def compare_answers(baseline: np.ndarray, arm: np.ndarray, pictures=None) -> paired.Comparison:
    """Right (1) and wrong (0) answers to the same questions, by default of one picture each."""
    ids = range(len(baseline)) if pictures is None else pictures
    parts = [
        pd.DataFrame({"item": range(len(right)), "id": ids, "correct": right, "arm": name, "seed": 0, "acted": True})
        for name, right in (("baseline", baseline), ("arm", arm))
    ]
    return compare(pd.concat(parts), "arm")


def width(found: paired.Comparison) -> float:
    return found.change.high - found.change.low


def family_scores(rows: pd.DataFrame) -> dict[str, float]:
    """Appendix A by hand: a family is the plain mean of its metrics, Avg the mean of the four, not of the twelve."""
    found = {family: part.groupby("kind").correct.mean().mean() for family, part in rows.groupby("family")}
    pope = rows[rows.family == "hallucination"]
    found["hallucination"] = f1_score(pope.answer == "yes", pope.prediction == "yes")
    return found | {"Avg": sum(found.values()) / 4}


def sweep_table(n: int = 24, arms=(("baseline", 0), ("arm", 0)), seed: int = 0) -> pd.DataFrame:
    """Answers to made-up questions of all families, half of them right, at random in every arm."""
    rng = np.random.default_rng(seed)
    kinds = [(family, kind) for family, metrics in tasks.FAMILIES.items() for m in metrics for kind in m.kinds]
    asked = [(*kinds[i % len(kinds)], "yes" if rng.random() < 0.5 else "no", i // 2) for i in range(n)]
    rows = [
        (item, picture, family, kind, answer, arm, repeat, True, said, float(said == answer))
        for arm, repeat in arms
        for item, (family, kind, answer, picture) in enumerate(asked)
        for said in [str(rng.choice(["yes", "no"]))]
    ]
    names = ["item", "id", "family", "kind", "answer", "arm", "seed", "acted", "prediction", "correct"]
    return pd.DataFrame(rows, columns=names)


@pytest.mark.parametrize(
    ("lost", "gained", "n", "verdict"),
    [
        (40, 2, 400, "degradation"),
        (2, 40, 400, "improvement"),
        (5, 5, 2000, "no degradation shown"),
        (12, 10, 200, "undecided"),
        (3, 0, 200, "undecided"),  # below zero, but McNemar: p = 0.25
    ],
)
def test_the_verdict_is_what_the_answers_that_changed_allow(lost, gained, n, verdict):
    baseline = answers(n, 0.6)
    found = compare_answers(baseline, flipped(baseline, lost, gained))
    assert found.verdict == verdict
    assert (found.lost, found.gained) == (lost, gained)
    assert found.difference == pytest.approx((gained - lost) / n)
    assert found.change.low < found.narrow.low <= found.difference <= found.narrow.high < found.change.high


def test_nothing_is_shown_by_few_questions_or_by_an_arm_that_never_acted():
    """Of n pictures of which none differs one cannot exclude that about 3 in n would (rule of three)."""
    for n, verdict in ((200, "undecided"), (400, "no degradation shown")):
        same = answers(n, 0.6)
        found = compare_answers(same, same)
        assert (found.difference, found.p, found.verdict) == (0, 1, verdict)
        assert 2.5 / n < found.narrow.high < 3 / n
    table = sweep_table(n=2000)
    table.loc[table.arm == "arm", "correct"] = table[table.arm == "baseline"].correct.to_numpy()
    assert compare(table, "arm").verdict == "no degradation shown"
    table.loc[table.arm == "arm", "acted"] = False
    found = compare(table, "arm")
    assert (found.verdict, found.acted) == ("undecided", 0)


@pytest.mark.parametrize("of", ["accuracy", *tasks.FAMILIES, "Avg"])
def test_scores_are_those_of_tasks(of):
    table = sweep_table(n=120)
    found = compare(table, "arm", of, resamples=50)
    for value, arm in ((found.baseline, "baseline"), (found.score, "arm")):
        rows = table[table.arm == arm]
        wanted = rows.correct.mean() if of == "accuracy" else family_scores(rows)[of]
        assert value == pytest.approx(wanted)
    assert math.isnan(found.p) == (of in ("hallucination", "Avg"))
    assert found.change.low < found.difference < found.change.high
    if of == "accuracy":
        return
    many = sweep_table(n=400)
    scored = paired.scored(many, "arm", of)
    assert float(scored.value) == pytest.approx(family_scores(many[many.arm == "arm"])[of])
    assert 0 <= scored.low < scored.value < scored.high <= 1


def test_a_bootstrap_of_a_family_equals_drawing_pictures_by_hand():
    table = sweep_table(n=900)  # as many as chance needs to outweigh what a bootstrap cannot see
    found = compare(table, "arm", "ocr", resamples=100, seed=3)
    part = table[table.family == "ocr"]
    ids = np.unique(part.id)
    changes = []
    for times in stats.draws(len(ids), 100, seed=3):
        drawn = part.loc[part.index.repeat(times[np.searchsorted(ids, part.id)].astype(int))]
        means = drawn.groupby(["arm", "kind"]).correct.mean().groupby("arm").mean()
        changes.append(means["arm"] - means["baseline"])
    assert (found.change.low, found.change.high) == pytest.approx(tuple(np.quantile(changes, [0.025, 0.975])))


def test_seeds_of_a_control_are_averaged_and_their_pictures_drawn_together():
    arms = [("baseline", 0), ("control", 0), ("control", 1), ("control", 2)]
    table = sweep_table(n=120, arms=arms)
    found = compare(table, "control")
    rows = table[table.arm == "control"]
    each = [compare(table[(table.arm != "control") | (table.seed == seed)], "control") for seed in range(3)]
    assert (found.seeds, found.questions, found.change.n) == (3, 120, 60)
    assert found.score == pytest.approx(rows.correct.mean())
    assert found.difference == pytest.approx(np.mean([one.difference for one in each]))
    assert found.lost == pytest.approx(np.mean([one.lost for one in each]))
    assert math.isnan(found.p) and not any(math.isnan(one.p) for one in each)
    assert width(found) < max(map(width, each))
    # (2 of 5 + 4 of 5) / 2 - 3 of 5 is above 0 by the last bit of a float
    table = sweep_table(n=5, arms=arms[:3])
    right = {("baseline", 0): 3, ("control", 0): 2, ("control", 1): 4}
    keys = zip(table.arm, table.seed, table["item"], strict=True)
    table["correct"] = [float(item < right[arm, seed]) for arm, seed, item in keys]
    assert compare(table, "control").difference == 0.0


def test_a_baseline_of_several_seeds_is_compared_seed_by_seed():
    """What all pairs have in common shows, however far the seeds are apart."""
    table = sweep_table(n=200, arms=[(arm, repeat) for arm in ("twin", "late") for repeat in (0, 1)])
    alone = [compare(table[table.seed == repeat], "late", baseline="twin") for repeat in (0, 1)]
    found = compare(table, "late", baseline="twin")
    assert found.seeds == 2 and math.isnan(found.p)
    assert found.difference == pytest.approx(np.mean([one.difference for one in alone]))
    assert found.gained == pytest.approx(np.mean([one.gained for one in alone]))
    other = compare(table.replace({"seed": {1: 7}}), "late", baseline="twin")  # only their order counts
    assert other.difference == found.difference
    lacking = table[(table.arm == "twin") | (table.seed == 0)]
    with pytest.raises(EmbedLensError, match="2 seeds: compare with an arm that has one, or the same seeds"):
        compare(lacking, "late", baseline="twin")


def test_a_score_without_a_hit_has_room_for_some_and_one_that_was_not_asked_is_none():
    table = sweep_table(n=400)
    with pytest.raises(EmbedLensError, match="no answer of ocr is to word"):
        paired.scored(table[table.kind != "word"], "arm", "ocr")
    none = paired.scored(table.assign(correct=0.0), "arm")
    assert none.value == none.low == 0 < none.high < 0.05  # 200 pictures without a hit leave room for some


@pytest.mark.parametrize(
    ("table", "how", "sentence"),
    [
        (lambda t: t, {"arm": "x"}, "no arm 'x': it has 'baseline', 'arm'"),
        (lambda t: t, {"of": "x"}, "unknown score 'x'"),
        (lambda t: t.iloc[:-1], {}, "answered other questions"),
        (lambda t: pd.concat([t, t.tail(1)]), {}, "answered a question twice"),
        (lambda t: t[t.family != "ocr"], {"of": "ocr"}, "no question of 'ocr'"),
        (
            lambda t: sweep_table(arms=[("baseline", 0), ("baseline", 1), ("arm", 0)]),
            {},
            "2 seeds: compare with an arm",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(table, how, sentence):
    with pytest.raises(EmbedLensError, match=sentence):
        compare(**{"table": table(sweep_table(n=24)), "arm": "arm"} | how)
