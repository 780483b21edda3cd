"""Dead tokens are held against controls of their size; what is said of the costs is what was planted, and no more."""

from __future__ import annotations

import math
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from embedlens import EmbedLensError, Frame, PatchGrid, Prune, TokenGroups, claims, figures, printed, tasks
from embedlens.book import printable
from embedlens.chapters import controls
from embedlens.chapters.controls import (
    A_THIRD_MORE,
    BLOCK,
    BOTH,
    DEAD,
    MORE,
    ORIGINAL,
    RANDOM,
    SCORES,
    Asked,
    ask,
    costs,
)
from embedlens.groups import reference_of
from embedlens.paired import AVG, compare, compare_answers
from embedlens.tasks import questionnaires

matplotlib.use("Agg")
GRID = PatchGrid(6, 6, Frame.stretch(6, 6))


@pytest.fixture(scope="module")
def reference(tiny):
    return reference_of(tiny)


def partition(dead, vit=None) -> TokenGroups:
    none = torch.zeros_like(dead)
    vit = none if vit is None else vit
    return TokenGroups(vit, none, dead, ~(dead | vit), met={})


def at_random(seed: int, share: float = 0.3) -> TokenGroups:
    draw = torch.rand(36, generator=torch.Generator().manual_seed(seed))
    return partition(draw < share, (draw >= share) & (draw < share + 0.1))


# --- arms ------------------------------------------------------------------------------------------------------------


def with_sinks(reference):
    return replace(reference, vit_norm=1.0)


@pytest.mark.parametrize("seed", range(5))
def test_controls_remove_as_many_alive_tokens_as_they_say(reference, seed):
    groups, rng = at_random(seed), np.random.default_rng(seed)
    dead, sinks, alive = (int(mask.sum()) for mask in (groups.dead, groups.sink, groups.alive))
    wanted = {DEAD: dead, BOTH: dead + sinks, RANDOM: dead, MORE: dead + sinks, BLOCK: dead}
    wanted |= {A_THIRD_MORE: round(4 * dead / 3)}
    without = replace(reference, vit_norm=None, sink_dims=())
    for which in (with_sinks(reference), without):
        arms = [*controls.arms_of(which, 2)[1:], *controls.further_controls(which, 2)]
        assert {arm.name for arm in arms} >= {DEAD, RANDOM, BLOCK}
        for arm in arms:
            (plan,) = arm.act(groups, GRID, rng)
            assert isinstance(plan, Prune)
            if arm.name in (DEAD, BOTH):
                assert int(plan.mask.sum()) == wanted[arm.name] and not bool((plan.mask & groups.alive).any())
            else:
                assert int(plan.mask.sum()) == min(wanted[arm.name], alive)
                assert bool((plan.mask <= groups.alive).all())


def test_a_model_without_sinks_gets_a_third_more_and_one_with_sinks_gets_theirs(reference):
    without = replace(reference, vit_norm=None, sink_dims=())
    assert not controls.has_sinks(without) and controls.has_sinks(with_sinks(reference))
    names = {arm.name for arm in [*controls.arms_of(without), *controls.further_controls(without)]}
    assert A_THIRD_MORE in names and not names & {BOTH, MORE}
    names = {
        arm.name
        for arm in [*controls.arms_of(with_sinks(reference)), *controls.further_controls(with_sinks(reference))]
    }
    assert {BOTH, MORE} <= names and A_THIRD_MORE not in names
    seeds = [arm.seed for arm in controls.arms_of(without) if arm.name == RANDOM]
    assert seeds == list(range(5))


def test_a_picture_whose_tokens_are_all_dead_runs_as_the_baseline(reference):
    arm = controls.arms_of(reference)[1]
    assert arm.act(partition(torch.ones(36, dtype=torch.bool)), GRID, np.random.default_rng(0)) is None


# --- asking ----------------------------------------------------------------------------------------------------------


def test_all_arms_answer_and_the_further_controls_every_second_picture(tiny, reference):
    items = questionnaires(40)[: 4 * 40]
    short = [item for item in items if item.question.kind != "box" or item.sample.id % 2]
    asked = ask(tiny, short, reference, "cluster", seeds=1)
    table = asked.table
    counts = table.groupby("arm")["id"].nunique()
    assert counts["baseline"] == counts[DEAD] == counts[RANDOM] == 40
    assert counts[BLOCK] == counts[A_THIRD_MORE] == 20
    assert asked.stand_in and asked.n_visual == 16 and 0 < asked.n_alive < 16
    places = table.groupby("item")[["question", "id"]].nunique()
    assert (places == 1).all().all()  # a place is the same question in every arm
    cost = costs(asked, "tiny")
    assert cost.of[DEAD, AVG].pictures == 40 and cost.of[BLOCK, AVG].pictures == cost.shape.pictures == 20


def test_too_few_pictures_for_every_metric_are_all_asked_by_all(tiny, reference):
    asked = ask(tiny, questionnaires(5), reference, "cluster", seeds=1)
    assert asked.table.groupby("arm")["item"].nunique().eq(20).all()


def test_no_dead_token_anywhere_is_refused(tiny, reference):
    nowhere = replace(reference, dead_id=None)
    with pytest.raises(EmbedLensError, match="membership='cluster'"):
        ask(tiny, questionnaires(5), nowhere, "top3", seeds=1)


# --- comparing -------------------------------------------------------------------------------------------------------


def made_up(
    dead: float = 0.8, scattered: float = 0.5, more: float = 0.4, block: float = 0.6, n: int = 120, seed: int = 0
) -> Asked:
    """Answers that are right with these chances; the baseline with 0.8. Where chances are equal, so are answers."""
    rng = np.random.default_rng(seed)
    kinds = {
        family: [kind for metric in metrics for kind in metric.kinds] for family, metrics in tasks.FAMILIES.items()
    }
    chance = [("baseline", 0, 0.8), (DEAD, 0, dead)]
    chance += [(arm, s, p) for arm, p in ((RANDOM, scattered), (A_THIRD_MORE, more), (BLOCK, block)) for s in range(3)]
    luck = rng.random((4 * n, 3))
    sizes = {"baseline": 0, DEAD: 10, RANDOM: 10, A_THIRD_MORE: 13, BLOCK: 10}
    rows = []
    for arm, repeat, p in chance:
        for place in range(4 * n):
            picture, family = place // 4, list(kinds)[place % 4]
            if arm in (A_THIRD_MORE, BLOCK) and picture % 2:
                continue
            kind = kinds[family][(picture // 2) % len(kinds[family])]
            right = luck[place, 0 if p == 0.8 else repeat] < p
            answer = "yes" if (picture // 7) % 2 else "no"
            said = answer if right else {"yes": "no", "no": "yes"}[answer]
            tokens = 7 if arm in (RANDOM, BLOCK) and picture % 10 == 0 else sizes[arm]
            rows.append((place, picture, family, kind, answer, arm, repeat, tokens > 0, tokens, said, float(right)))
    names = ["item", "id", "family", "kind", "answer", "arm", "seed", "acted", "tokens", "prediction", "correct"]
    table = pd.DataFrame(rows, columns=names)
    return Asked(table.assign(correct_original=0.5 * table["correct"]), False, 36, 26)


@pytest.fixture(scope="module")
def cost():
    return costs(made_up(), "miniature")


def test_differences_are_those_of_the_scores_on_common_questions(cost):
    table = made_up().table
    for arm in (DEAD, RANDOM, BLOCK):
        own = table[table.arm == arm]
        base = tasks.family_scores(table[(table.arm == "baseline") & table.item.isin(own.item)])
        each = [tasks.family_scores(rows) for _, rows in own.groupby("seed")]
        for name in SCORES:
            wanted = np.mean([scores[name] for scores in each]) - base[name]
            assert cost.of[arm, name].difference == pytest.approx(wanted), (arm, name)
        assert cost.per_seed[arm] == pytest.approx([scores[AVG] - base[AVG] for scores in each])
    assert cost.removed[RANDOM] == pytest.approx(9.7) and cost.short == pytest.approx(0.1)
    full = table[table.id % 10 > 0]
    assert cost.matched.difference == pytest.approx(compare(full, RANDOM, AVG).difference)
    assert cost.of[DEAD, ORIGINAL].baseline == pytest.approx(cost.of[DEAD, "grounding"].baseline / 2)


def test_the_frame_is_told_by_the_same_boxes(cost):
    boxes = cost.of[DEAD, "grounding"]
    assert float(cost.frame.value) == pytest.approx(cost.of[DEAD, ORIGINAL].difference - boxes.difference)


@pytest.mark.parametrize(
    ("dead", "verdict", "said"),
    [
        (0.95, "holds", "is an improvement"),
        (0.8, "partly", "neither told from zero nor shown"),
        (0.6, "does not hold", "is a degradation"),
    ],
)
def test_e32_asks_for_an_improvement(dead, verdict, said):
    found = costs(made_up(dead=dead), "miniature")
    assert controls.e32(found).verdict == verdict
    assert said in controls.dead_sentence(found)


def test_e33_asks_for_a_loss_and_an_open_result_is_partly(cost):
    assert controls.e33(cost).verdict == "holds"
    assert controls.e33(costs(made_up(scattered=0.8), "miniature")).verdict == "partly"  # 480 questions leave it open
    many = costs(made_up(scattered=0.8, n=300), "miniature")
    assert many.of[RANDOM, AVG].equivalent and controls.e33(many).verdict == "does not hold"


def test_size_and_shape_are_told_by_the_contrasts(cost):
    assert cost.size.high < 0 < cost.shape.low
    said = controls.control_sentence(cost)
    assert "The larger size costs more than the smaller." in said and "block costs less than as many" in said
    same = costs(made_up(scattered=0.8, more=0.8, block=0.8), "miniature")
    assert controls.control_sentence(same).count("is not told apart from") == 3


def test_a_stand_in_is_named_and_earns_partly_at_best():
    found = costs(replace(made_up(dead=0.95), stand_in=True), "tiny")
    assert controls.e32(found).verdict == controls.e33(found).verdict == "partly"
    assert "C0, the stand-in" in controls.e32(found).note
    texts = [str(value) for key, value in controls.told(found).items() if key != "cost_paper"]
    texts += [*controls.difference_table(found).columns, *controls.contrast_table(found).index]
    texts += [text.get_text() for text in controls.cost_figure(found).axes[0].texts]
    assert not [text for text in texts if "dead" in text]


def test_pages_and_record_have_no_holes(cost, tmp_path):
    for key, value in controls.told(cost).items():
        printable(key, value)
    assert all(math.isfinite(value) for value in controls.numbers(cost).values())
    claims.write(tmp_path, "miniature", "04_dead_tokens", 9, 0, controls.findings(cost), controls.numbers(cost))
    assert "pictures with enough alive tokens, by " in controls.told(cost)["cost_headline"]
    assert controls.matched_clause(replace(cost, short=0.0)) == ""
    assert controls.matched_clause(replace(cost, matched=None)) == ""
    for table in (controls.difference_table, controls.verdict_table, controls.contrast_table):
        shown = table(cost)
        assert not shown.isna().any().any() and "nan" not in shown.to_string()


def test_what_is_read_is_held_against_what_is_missed(cost):
    assert "nothing to be missed" in controls.synthesis(cost, read=False)
    assert "not been shown to need" in controls.synthesis(cost, read=True)
    worse = costs(made_up(dead=0.5), "miniature")
    assert "is used" in controls.synthesis(worse, read=True)


# --- how many questions ----------------------------------------------------------------------------------------------


def test_so_many_questions_would_show_that_nothing_changes():
    """Equal answers: the bound on what no picture showed. Some changes, evenly: the spread that was seen."""
    same = [1.0] * 100
    enough = controls.questions_needed(compare_answers(same, same))
    for n, shown in ((enough, True), (enough - 2, False)):
        assert compare_answers([1.0] * n, [1.0] * n).equivalent == shown
    base, arm = np.tile([1.0, 1.0, 0.0, 0.0] * 10, 10), np.tile([0.0, 1.0, 1.0, 0.0] + [1.0, 1.0, 0.0, 0.0] * 9, 10)
    needed = controls.questions_needed(compare_answers(base, arm))
    assert needed > 400
    times = -(-needed // 400)
    assert compare_answers(np.tile(base, 2 * times), np.tile(arm, 2 * times)).equivalent
    assert not compare_answers(np.tile(base, times // 2), np.tile(arm, times // 2)).equivalent


# --- showing ---------------------------------------------------------------------------------------------------------


def test_the_figure_names_every_arm_and_keeps_the_paper_apart(cost):
    left, right = controls.cost_figure(cost).axes
    named = " ".join(text.get_text().replace("\n", " ") for text in left.texts)
    for arm in cost.arms:
        assert arm.removeprefix("-") in named
    assert {line.get_color() for line in right.get_lines()} <= {figures.FACT, figures.CHANCE}
    assert figures.FACT not in {line.get_color() for line in left.get_lines()}
    printed_avg = [printed.changes(printed.TABLE_B)[name][AVG] for name in ("-dead", "-remaining")]
    heights = {round(float(y), 6) for line in right.get_lines() for y in np.ravel(line.get_ydata())}
    assert {round(value, 6) for value in printed_avg} <= heights


def test_the_printed_table_is_that_of_the_paper():
    table = controls.printed_table()
    assert list(table.loc["-dead, Table 2"]) == ["+0.0", "+0.2", "+3.7", "+0.1", "+1.0"]
    assert table.loc["-remaining, from Table b", "grounding"] == "-5.43"
    said = controls.paper_sentence()
    assert "+3.8 in grounding" in said and "does not drop on HallusionBench." in said
    wrong = sum(found.table == "2" for found in printed.contradictions())
    assert f"{wrong} of the 15 entries" in said


def test_questions_are_drawn_as_large_as_the_model_reads_them(tiny, monkeypatch):
    plain = controls.items_for(tiny, 5)
    monkeypatch.setattr(type(tiny), "canvas_side", 336)
    large = controls.items_for(tiny, 5)
    assert [3 * item.sample.width for item in plain] == [item.sample.width for item in large]
