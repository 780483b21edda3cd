"""Answers and attention without sinks: matched controls, rules that can fail, and sums that come out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sink_references import none_found

from embedlens import claims, printed, samples
from embedlens.chapters import sink_removal
from embedlens.chapters.sink_removal import BEFORE, CONTROL, MOVES, PRUNED, REGIONS, SKIPPED, Moved
from embedlens.errors import EmbedLensError
from embedlens.groups import QUESTION
from embedlens.interventions import Prune, intervene
from embedlens.paired import AVG, BASELINE
from embedlens.sinks import queries_of, sink_groups
from embedlens.sweep import generator, sink_arms
from embedlens.tasks import questionnaires
from embedlens.tracing import trace

matplotlib.use("Agg")

NAMES = {"LLM sink": "5 highest-phi tokens", "ViT sink": "5 highest-norm patches", "dead": "dead tokens"}
FOUND = {"LLM sink": True, "ViT sink": True, "dead": True}


@pytest.fixture(scope="module")
def pictures():
    return list(samples.load("miniworld", n=4))


@pytest.fixture(scope="module")
def prompts(tiny, pictures):
    return tiny.prompts([picture.image for picture in pictures], [QUESTION] * len(pictures))


@pytest.fixture(scope="module")
def reference(tiny):
    """No sinks: the arms run on stand-ins, which every picture has."""
    return none_found(tiny)


@pytest.fixture(scope="module")
def found(tiny, reference):
    """All arms on the random model."""
    return sink_removal.answers(tiny, n=15, seeds=2, reference=reference)


@pytest.fixture(scope="module")
def groups(tiny, prompts, reference):
    return sink_groups(tiny, prompts, reference)


@pytest.fixture(scope="module")
def moved(tiny, pictures, groups, reference):
    return sink_removal.attention_moved(tiny, pictures, groups, reference=reference, batch_size=3)


def planted(n: int, flips: dict[str, float], seed: int = 0) -> pd.DataFrame:
    """Answers to n questions of each family, of which an arm turns a share of the right ones wrong."""
    rng, rows = np.random.default_rng(seed), []
    for place, item in enumerate(questionnaires(15)[:60] * (n // 15)):
        question = item.question
        for arm in (BASELINE, *PRUNED, *SKIPPED, CONTROL):
            right = rng.random() >= flips.get(arm, 0)
            wrong = {"yes": "no", "no": "yes"}.get(question.answer, "-")
            rows.append(
                {"item": place, "id": place // 4, "family": question.family, "kind": question.kind,
                 "question": question.text, "answer": question.answer, "arm": arm, "seed": 0, "acted": arm != BASELINE,
                 "tokens": 5 * (arm != BASELINE), "prediction": question.answer if right else wrong,
                 "correct": float(right), "correct_original": float(right)}
            )  # fmt: skip
    return pd.DataFrame(rows)


# --- arms ------------------------------------------------------------------------------------------------------------


def test_the_arms_are_table_1_and_as_many_random_tokens_with_several_seeds():
    arms = sink_removal.arms(5)
    assert [arm.name for arm in arms[:8]] == [arm.name for arm in sink_arms()]
    assert [arm.name for arm in arms[1:8]] == [row.name for row in printed.TABLE_1[1:]]
    assert [(arm.name, arm.seed) for arm in arms[8:]] == [(CONTROL, seed) for seed in range(5)]
    assert {arm.name for arm in arms} == {BASELINE, CONTROL, *PRUNED, *SKIPPED}


def test_random_tokens_are_as_many_as_the_sinks_and_none_of_them(groups, prompts):
    drawn = {}
    for picture, (own, prompt) in enumerate(zip(groups, prompts, strict=True)):
        sinks = own.vit_sink | own.llm_sink
        for seed in range(3):
            mask = sink_removal.random_others(own, prompt.grid, generator(picture, CONTROL, seed))
            assert int(mask.sum()) == min(int(sinks.sum()), int((~sinks).sum())) > 0 and not bool((mask & sinks).any())
            drawn[picture, seed] = mask.tolist()
        again = sink_removal.random_others(own, prompt.grid, generator(picture, CONTROL, 0))
        assert again.tolist() == drawn[picture, 0]
    assert len({tuple(mask) for mask in drawn.values()}) > len(prompts)  # seeds draw anew


def test_an_arm_is_called_by_what_it_acts_on():
    called = partial(sink_removal.called, found={"LLM sink": False, "ViT sink": False}, named=NAMES)
    assert called("-LLM sinks") == "without the 5 highest-phi tokens" and called("-all sinks") == "without both kinds"
    assert called(CONTROL) == "without random tokens, as many as both kinds"
    named = {"LLM sink": "LLM sinks", "ViT sink": "ViT sinks"}
    for arm in (*PRUNED, *SKIPPED, CONTROL):
        assert sink_removal.called(arm, FOUND, named) == arm


# --- answers ---------------------------------------------------------------------------------------------------------


def test_every_arm_answers_every_question_and_is_compared_in_every_score(found, reference):
    counts = found.table.groupby(["arm", "seed"]).size()
    assert len(counts) == 10 and (counts == 60).all()
    assert set(found.compared) == {(arm, of) for arm in found.arms for of in (*sink_removal.SCORES, "accuracy")}
    assert (found.pictures, found.questions) == (15, 60)
    for arm in found.arms:
        right = found.table[found.table["arm"] == arm]["correct"].mean()
        base = found.table[found.table["arm"] == BASELINE]["correct"].mean()
        assert found.compared[arm, "accuracy"].difference == pytest.approx(right - base)
    assert found.compared[CONTROL, AVG].seeds == 2
    acted = {name: found.table[found.table["arm"] == name].groupby("item")["tokens"].mean() for name in found.arms}
    assert (acted[PRUNED[0]] == 5).all() and (acted[PRUNED[0]] + acted[PRUNED[1]] == acted[PRUNED[2]]).all()
    assert (acted[CONTROL] == np.minimum(acted[PRUNED[2]], 16 - acted[PRUNED[2]])).all()  # a picture has 16 tokens


@pytest.mark.parametrize(
    ("verdicts", "wanted"),
    [
        (["no degradation shown", "improvement", "no degradation shown"], claims.HOLDS),
        (["no degradation shown", "undecided"], claims.PARTLY),
        (["undecided", "undecided"], claims.UNTESTABLE),
        (["no degradation shown", "degradation"], claims.FAILS),
    ],
)
def test_no_loss_holds_where_every_arm_shows_it_and_fails_where_one_shows_a_loss(verdicts, wanted):
    assert sink_removal.unharmed_verdict(verdicts) == wanted
    with pytest.raises(EmbedLensError, match="no arm"):
        sink_removal.unharmed_verdict([])


@pytest.fixture(scope="module")
def unchanged():
    """Nothing changes under any arm, in many questions."""
    return sink_removal.compared(planted(300, {}), FOUND, NAMES, "miniature", resamples=300)


@pytest.mark.parametrize("have", [True, False])
def test_answers_that_stay_hold_on_sinks_and_in_part_on_stand_ins(unchanged, have):
    same = replace(unchanged, found=dict.fromkeys(FOUND, have))
    for finding in sink_removal.answer_findings(same).values():
        assert finding.verdict == (claims.HOLDS if have else claims.PARTLY) and finding.value == 0
        assert ("stands in" in finding.note) != have and "of each family" not in finding.note


def test_few_questions_cannot_show_that_nothing_changes():
    few = sink_removal.compared(planted(30, {}), FOUND, NAMES, "miniature", resamples=300)
    for finding, names in zip(sink_removal.answer_findings(few).values(), (PRUNED, SKIPPED), strict=True):
        assert finding.verdict == claims.UNTESTABLE
        assert f"about {sink_removal.needed(few, names)} questions of each family" in finding.note
    assert sink_removal.answers_told(few)["needed"] > 30


def test_a_loss_under_one_arm_is_found_named_and_counted():
    harmed = sink_removal.compared(planted(150, {PRUNED[1]: 0.2}), FOUND, NAMES, "miniature", resamples=300)
    e27, e28 = sink_removal.answer_findings(harmed).values()
    assert e27.verdict == claims.FAILS and e27.value < -10 and e27.high < 0
    assert "5 highest-norm patches" in e27.note and "1 degradation" in e27.note
    assert e28.verdict != claims.FAILS
    said = sink_removal.answers_told(harmed)
    assert said["arms_said"].startswith("degradation: 1, ") and said["arms_said"].endswith("of 7 arms")
    figure = sink_removal.families_figure(harmed)
    assert figure.get_suptitle().startswith("By family: degradation in ")


@given(st.integers(1, 2000), st.floats(0.001, 0.2))
@settings(max_examples=50, deadline=None)
def test_enough_questions_bring_the_interval_within_the_margin(n, half):
    needed = sink_removal.enough(n, half)
    assert needed >= n and half * (n / needed) ** 0.5 <= 0.01 + 1e-9
    assert needed in (n, needed // 100 * 100) and needed <= max(n, n * (half / 0.01) ** 2 + 100)  # and not many more


def test_tables_have_all_arms_no_holes_and_the_paper_stands_apart(found):
    scores, changes = sink_removal.scores_table(found), sink_removal.changes_table(found)
    assert len(scores) == 9 and len(changes) == 8
    for table in (scores, changes):
        assert "nan" not in table.to_string()
    assert changes.loc["without random tokens, as many as both kinds (2 seeds)", "McNemar's p"] == "–"
    paper = sink_removal.paper_table()
    assert paper.index.tolist() == [row.name for row in printed.TABLE_1]
    assert paper.loc["-LLM sinks", "CV-centric"] == "54.4" and paper.iloc[0, -1] == "–"
    wrong = sink_removal.contradictions_table()
    swapped = wrong[(wrong["column"] == "CV-centric") & (wrong["rounding explains it"] == "no")]
    assert {"-LLM sinks", "-ViT sinks"} <= set(swapped.index.get_level_values("row"))
    assert set(wrong.index.get_level_values("table")) == {"1", "a"}


def test_figures_and_prose_of_answers_have_no_holes(found):
    for draw in (sink_removal.answers_figure, sink_removal.families_figure):
        figure = draw(found)
        assert "60 questions about 15 pictures" in figure.get_supxlabel() and figure.get_suptitle()
        matplotlib.pyplot.close(figure)
    said = sink_removal.answers_told(found)
    assert all(str(value).strip() and "nan" not in str(value) for value in said.values()), said
    assert np.isfinite(list(sink_removal.answer_numbers(found).values())).all()


# --- where attention goes --------------------------------------------------------------------------------------------


def test_masses_are_those_of_one_prompt_alone_and_sum_to_one(tiny, prompts, groups, moved):
    assert moved.mass.shape == (4, len(MOVES), tiny.n_layers, len(REGIONS)) and moved.n == 4
    np.testing.assert_allclose(moved.mass.sum(-1), 1, atol=1e-4)
    assert (moved.region("pruned", "pruned") == 0).all() and (moved.region("others pruned", "others pruned") == 0).all()
    prompt, mask = prompts[1], groups[1].llm_sink
    with intervene(tiny, Prune(mask)):
        seen = trace(tiny, prompt, {"text": prompt.text})
    kept = queries_of(prompt)[~prompt.spread(mask)]
    by_hand = seen.attention["text"][:, kept].mean(-1).numpy()
    np.testing.assert_allclose(moved.region("pruned", "BOS", "text before", "text after")[1], by_hand, rtol=1e-3)
    assert not np.allclose(moved.mass[1, 1], moved.mass[1, 2], atol=1e-6)  # and the control is another pruning


def test_what_is_freed_goes_somewhere(moved):
    for move in MOVES[1:]:
        others = [name for name in REGIONS if name != move]
        assert float(moved.share(move, *others).value) == pytest.approx(1, abs=1e-3)
        parts = [float(moved.share(move, name).value) for name in others]
        assert sum(parts) == pytest.approx(1, abs=1e-3)


def simulated(to_before: float, have: bool = True) -> Moved:
    """0.2 on the tokens, of which a share goes to BOS and the rest to the other patches."""
    before = np.array([0.1, 0.1, 0.2, 0.2, 0.2, 0.2])
    after = before + 0.2 * np.array([to_before, 0, -1, 0, 1 - to_before, 0])
    mass = np.stack([before, after, before])[None, :, None].repeat(6, 0).repeat(3, 2)
    return Moved(mass, "LLM sinks" if have else "5 highest-phi tokens", have, "miniature")


@pytest.mark.parametrize(
    ("share", "wanted"), [(0.8, claims.HOLDS), (0.4, claims.PARTLY), (0.25, claims.FAILS), (-0.1, claims.FAILS)]
)
def test_reallocation_holds_only_where_most_goes_to_the_system_prompt(share, wanted):
    moved = simulated(share)
    finding = sink_removal.moved_finding(moved)
    assert finding.value == pytest.approx(share) and finding.verdict == wanted
    # text before the picture held a quarter of what is left, so it gets a quarter by doing nothing
    assert float(moved.beyond("pruned", *BEFORE).value) == pytest.approx(share - 0.25)
    assert sink_removal.moved_finding(simulated(share, have=False)).verdict == (
        claims.PARTLY if wanted == claims.HOLDS else wanted
    )


def test_pictures_without_sinks_are_left_out_and_none_at_all_is_no_measurement(tiny, pictures, groups, reference):
    empty = torch.zeros_like(groups[0].llm_sink)
    none = [type(own)(own.vit_sink, empty, own.dead, own.alive | own.llm_sink, own.met) for own in groups]
    some = sink_removal.attention_moved(tiny, pictures, [groups[0], *none[1:]], reference=reference)
    assert some.n == 1 and sink_removal.moved_finding(some).n == 1
    nothing = sink_removal.attention_moved(tiny, pictures, none, reference=reference)
    assert sink_removal.moved_finding(nothing).verdict == claims.UNTESTABLE
    assert sink_removal.moved_numbers(nothing) == {} and "nan" not in str(sink_removal.moved_told(nothing))
    assert "nan" not in sink_removal.moved_table(nothing).to_string()
    with pytest.raises(EmbedLensError, match="groups of each picture"):
        sink_removal.attention_moved(tiny, pictures, groups[:1], reference=reference)


def test_the_figure_of_attention_says_where_it_goes(moved):
    figure = sink_removal.moved_figure(moved)
    share = float(moved.share("pruned", *BEFORE).value)
    assert f"{share:.0%}" in figure.get_suptitle() and "n = 4 pictures" in figure.get_supxlabel()
    changes = {line.get_label(): line.get_ydata() for line in figure.axes[1].get_lines() if len(line.get_ydata()) > 2}
    assert len(changes) == 5 and sum(changes.values()) == pytest.approx(0, abs=1e-5)  # what one loses others gain
    assert "nan" not in sink_removal.moved_table(moved).to_string()
    assert all("nan" not in text for text in sink_removal.moved_told(moved).values())
