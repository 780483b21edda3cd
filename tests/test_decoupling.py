"""Silenced and late visual tokens: arms do what they are named for, twins pair by seed, verdicts follow their rules."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import embedlens as el
from embedlens import figures, paired, tasks
from embedlens.book import printable
from embedlens.chapters import decoupling, decoupling_figures
from embedlens.chapters.decoupling import (
    BOTH,
    FFN,
    MHA,
    OTHER,
    RELEASED,
    TEXT_FFN,
    TEXT_MHA,
    AtEntry,
    Decoupling,
    Grounded,
    entering,
    frozen_until,
    trained,
)
from embedlens.claims import FAILS, HOLDS, PARTLY, UNTESTABLE
from embedlens.errors import EmbedLensError
from embedlens.labels import LabelHits
from embedlens.late_entry import Adapter
from embedlens.paired import AVG, Comparison

matplotlib.use("Agg")
DRAWN = ["silence", "control", "entry", "depth", "twin", "grounded"]
N_LAYERS = 8


def answers(arms: dict[tuple[str, int], float], n: int = 80, seed: int = 0) -> pd.DataFrame:
    """Made-up answers to `n` questions of every family; (arm, seed) → share of right ones."""
    rng = np.random.default_rng(seed)
    kinds = [(family, kind) for family, metrics in tasks.FAMILIES.items() for m in metrics for kind in m.kinds]
    asked = [(*kinds[i % len(kinds)], "yes" if rng.random() < 0.5 else "no", i // len(kinds)) for i in range(4 * n)]
    rows = [
        (item, picture, family, kind, kind, answer, arm, repeat, True, said, float(said == answer), 0.0)
        for (arm, repeat), right in arms.items()
        for item, (family, kind, answer, picture) in enumerate(asked)
        for said in [answer if rng.random() < right else {"yes": "no", "no": "yes"}[answer]]
    ]
    names = ["item", "id", "family", "kind", "question", "answer", "arm", "seed", "acted", "prediction", "correct"]
    return pd.DataFrame(rows, columns=[*names, "correct_original"])


def change(difference: float, half: float = 0.02, arm: str = MHA, of: str = AVG, p: float = float("nan")) -> Comparison:
    narrow = 0.84 * half
    return Comparison(
        arm=arm, of=of, baseline=0.6, score=0.6 + difference, difference=difference, low=difference - half,
        high=difference + half, narrow_low=difference - narrow, narrow_high=difference + narrow, margin=0.01,
        questions=400, pictures=400, seeds=1, acted=1.0, gained=1.0, lost=1.0, p=p,
    )  # fmt: skip


def hits(grounded: list[list[int]], tokens: int = 10) -> LabelHits:
    """Grounded object tokens, by layer and picture."""
    counts = np.array(grounded)
    pictures = counts.shape[1]
    return LabelHits(
        labels=("dog",), present=np.ones((pictures, 1), bool), retrieved=np.ones((len(counts), pictures, 1), bool),
        tokens=np.full(pictures, 4 * tokens), object_tokens=np.full(pictures, tokens), grounded=counts,
        label_tokens=np.array([tokens * pictures]), retrieving=counts.sum(1)[:, None],
    )  # fmt: skip


def everything(with_runs: bool = True, n: int = 80) -> Decoupling:
    """A whole chapter's answers, made up."""
    silenced = answers(
        {(arm, 0): right for arm, right in (("baseline", 0.7), (MHA, 0.68), (FFN, 0.6), (RELEASED, 0.5))}, n
    )
    beside = [(BOTH, 0.4), (TEXT_MHA, 0.3), (TEXT_FFN, 0.3), (OTHER, 0.1)]
    late = [(entering(layer), 0.7 - 0.08 * layer) for layer in range(1, N_LAYERS)]
    held = [(frozen_until(layer), 0.7 - 0.04 * layer) for layer in (2, 4, 6)]
    arms = [("baseline", 0.7), (MHA, 0.68), (FFN, 0.6), *beside, *late, *held]
    untrained = answers({(arm, 0): right for arm, right in arms}, n)
    late_runs = {(trained(layer), seed): 0.7 - 0.03 * layer for layer in (0, 1, 2, 4, 6) for seed in (0, 1)}
    runs = answers({("baseline", 0): 0.7} | late_runs, n)
    rng = np.random.default_rng(0)
    entries: list[int | None] = [None, 0, 1, 2, 4, 6] if with_runs else [None]
    by_layer = {e: Grounded(e or 0, hits(rng.integers(0, 4, (N_LAYERS + 1, 20)).tolist())) for e in entries}
    at_entry = AtEntry(np.full(20, 10), {e: rng.integers(0, 4, 20).astype(float) for e in entries})
    return Decoupling(silenced, untrained, runs if with_runs else None, at_entry, by_layer, N_LAYERS)


# --- arms ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items():
    return tasks.family_questions("general", 5)[:2] + tasks.family_questions("grounding", 2)


def test_frozen_rows_stand_still_below_their_layer_and_are_read_all_the_way(tiny, items):
    prompt = tiny.prompt(items[0].sample.image, "What is in the picture?")
    plain = tiny.hidden_states(prompt)
    (arm, *_) = decoupling.frozen_arms(tiny.n_layers)
    until = int(arm.name.split()[-1])
    groups = decoupling.ungrouped(tiny, [prompt])[0]
    with el.intervene(tiny, *arm.act(groups, prompt.grid, np.random.default_rng(0))):
        held = tiny.hidden_states(prompt)
    visual = prompt.visual
    assert all(torch.equal(held[layer, visual], held[0, visual]) for layer in range(until + 1))
    assert not torch.equal(held[until + 1, visual], held[0, visual])
    with el.intervene(tiny, el.EnterAt(until)):
        late = tiny.hidden_states(prompt)
    assert torch.equal(held[0], plain[0])
    assert not torch.allclose(held[until, ~visual], late[until, ~visual], atol=1e-4)  # text has read them, below


@pytest.mark.parametrize("n_layers", [1, 2, 3, 8, 32])
def test_every_layer_is_entered_once_and_controls_stop_short_of_all(n_layers):
    assert [arm.name for arm in decoupling.entry_arms(n_layers)] == [entering(at) for at in range(1, n_layers)]
    held = [int(arm.name.split()[-1]) for arm in decoupling.frozen_arms(n_layers)]
    assert held == sorted(set(held)) and all(0 < at < n_layers for at in held)


@pytest.mark.parametrize("sublayer", ["attention", "mlp"])
def test_text_rows_but_the_last_get_no_update_and_nothing_else_changes_hands(tiny, items, sublayer):
    prompt = tiny.prompt(items[0].sample.image, "What is in the picture?")
    still = prompt.text.clone()
    still[-1] = False
    with decoupling.text_silenced(tiny, sublayer):
        seen = el.trace(tiny, prompt)
    before, after = (seen.resid_pre, seen.resid_mid) if sublayer == "attention" else (seen.resid_mid, seen.resid_post)
    assert torch.equal(before[:, still], after[:, still])
    moved = (before != after).any(-1)
    assert moved[:, ~still].all()
    assert tiny.intervention is None


def test_the_text_control_answers_a_padded_batch_as_one_by_one_and_leaves_no_hooks(tiny, items):
    long = "What is in the picture, and where in the picture is it, and what is beside it?"
    prompts = [tiny.prompt(items[0].sample.image, "What?"), tiny.prompt(items[1].sample.image, long)]
    with decoupling.text_silenced(tiny, "mlp"):
        together = tiny.answers(prompts, 4)
        alone = [tiny.answer(prompt, 4) for prompt in prompts]
    assert together == alone
    before = tiny.logits(prompts[0])
    with pytest.raises(RuntimeError, match="stop"), decoupling.text_silenced(tiny, "mlp"):
        raise RuntimeError("stop")
    assert torch.equal(tiny.logits(prompts[0]), before)
    with pytest.raises(EmbedLensError, match="a block of its own"), el.intervene(tiny, el.Silence("mlp")):
        with decoupling.text_silenced(tiny, "mlp"):
            pass


def test_another_picture_is_asked_the_same_and_pairs_with_the_own_one(tiny, items):
    found = decoupling.about_another(tiny, items)
    assert found["id"].tolist() == [item.sample.id for item in items]
    assert found["question"].tolist() == [item.question.text for item in items]
    shown = [items[(place + 2) % 4].sample for place in range(4)]
    said = [tiny.answer(tiny.prompt(s.image, i.question.text), 12) for s, i in zip(shown, items, strict=True)]
    assert found["prediction"].tolist() == said
    with pytest.raises(EmbedLensError, match="at least two"):
        decoupling.about_another(tiny, items[:1])


def test_all_arms_of_the_chapter_answer_all_questions(tiny, items):
    table = decoupling.untrained_entry(tiny, items)
    assert set(table.groupby("arm").size()) == {len(items)}
    wanted = {"baseline", MHA, FFN, BOTH, TEXT_MHA, TEXT_FFN, OTHER}
    assert wanted <= set(table["arm"])
    assert decoupling.frozen_layers(table) == [
        int(arm.name.split()[-1]) for arm in decoupling.frozen_arms(tiny.n_layers)
    ]


@pytest.fixture
def worn(monkeypatch, tiny):
    """Adapters that shift the projector's bias; the fixture is the log of what was put on."""
    log = []

    @contextmanager
    def adapted(model, adapter):
        log.append((adapter.layer, adapter.seed))
        with torch.no_grad():
            own = [parameter.clone() for parameter in model.projector.parameters()]
            for parameter in model.projector.parameters():
                parameter.add_(0.1 * (1 + adapter.layer + 10 * adapter.seed))
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(model.projector.parameters(), own, strict=True):
                    parameter.copy_(value)

    monkeypatch.setattr(decoupling, "adapted", adapted)
    return log


def runs_of(*layers: int, seeds: int = 1) -> list[Adapter]:
    return [Adapter(layer, seed, 1, Path("none"), "") for seed in range(seeds) for layer in layers]


def test_every_run_is_asked_with_its_own_weights_and_entry(tiny, items, worn):
    found = decoupling.trained_entry(tiny, items, runs_of(0, 1, seeds=2))
    assert worn == [(0, 0), (1, 0), (0, 1), (1, 1)]
    asked = [("baseline", 0), *((trained(layer), seed) for layer in (0, 1) for seed in (0, 1))]
    assert found.groupby(["arm", "seed"]).size().to_dict() == dict.fromkeys(asked, len(items))
    with decoupling.adapted(tiny, runs_of(1)[0]), el.intervene(tiny, el.EnterAt(1)):
        said = [tiny.answer(tiny.prompt(item.sample.image, item.question.text), 12) for item in items]
    rows = found[(found["arm"] == trained(1)) & (found["seed"] == 0)]
    assert rows["prediction"].tolist() == said
    assert decoupling.trained_entry(tiny, items, []) is None


# --- grounding -------------------------------------------------------------------------------------------------------


def test_what_is_grounded_at_entry_is_layer_zero_of_what_is_grounded_by_layer(tiny, worn):
    samples = el.samples.load("miniworld", n=6, seed=3)
    runs = runs_of(0, 2, seeds=2)
    by_layer = decoupling.grounded_by_entry(tiny, samples, runs)
    at_entry = decoupling.grounded_at_entry(tiny, samples, runs)
    assert list(by_layer) == [None, 0, 2] == list(at_entry.grounded)
    for entry, one in by_layer.items():
        n = 1 if entry is None else 2
        assert at_entry.grounded[entry] == pytest.approx(one.hits.grounded[0] / n)
        assert (one.hits.object_tokens == n * at_entry.object_tokens).all()
    assert (by_layer[2].hits.grounded[0] == by_layer[2].hits.grounded[2]).all()  # they wait below their entry


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=6), st.data())
def test_steps_of_refinement_by_brute_force(grounded, data):
    entry = data.draw(st.integers(0, len(grounded) - 1))
    curve = [sum(layer) for layer in grounded][entry:]
    goal = curve[0] + decoupling.REFINED * (max(curve) - curve[0])
    steps = next(at for at, value in enumerate(curve) if value / 30 >= goal / 30 - 1e-12)
    found = Grounded(entry, hits(grounded)).steps(np.ones((1, 3)))
    assert abs(found[0] - steps) <= (0 if abs(curve[int(found[0])] - goal) > 1e-9 else len(curve))


def test_a_later_entry_that_rises_longer_takes_more_steps():
    flat, rising = [[5] * 20] * 9, [[1] * 20] * 2 + [[at] * 20 for at in range(1, 8)]
    found = decoupling.step_difference(Grounded(2, hits(rising)), Grounded(0, hits(flat)))
    assert float(found.low) > 0 and float(found.value) == 6


# --- comparing -------------------------------------------------------------------------------------------------------


def test_runs_are_compared_with_the_twin_of_their_own_seed():
    table = answers({(trained(layer), seed): 0.8 - 0.1 * layer for layer in (0, 1, 3) for seed in (0, 1)})
    lone = answers({(trained(5), 0): 0.5})  # trained with one seed only: its twins are not its own
    table = pd.concat([table, lone])
    assert decoupling.late_layers(table) == [1, 3]
    twins, seeds = decoupling.against_twins(table), decoupling.by_seed(table)
    for layer in (1, 3):
        own = [seeds[layer, seed].difference for seed in (0, 1)]
        assert twins[trained(layer), AVG].difference == pytest.approx(np.mean(own))
        assert own[0] != own[1]
    assert decoupling.late_layers(None) == [] and decoupling.against_twins(None) == {} == decoupling.by_seed(None)


def test_four_times_the_questions_halve_the_interval():
    one = change(0.0, half=0.02)
    assert decoupling.questions_needed(one) == pytest.approx(400 * (0.84 * 2) ** 2, rel=0.01)
    assert decoupling.questions_needed(change(0.0, half=0.04)) == pytest.approx(
        4 * decoupling.questions_needed(one), abs=4
    )


def test_layers_are_matched_by_their_share_of_the_depth():
    assert decoupling.within_paper([1, 2, 4, 6], 8) == [1, 2]
    assert decoupling.within_paper([4, 10, 11], 32) == [4, 10]
    assert decoupling.nearest_layer([1, 2, 4, 6], 8, 0.5) == 4
    assert decoupling.nearest_layer([8, 24], 32, 0.5) == 8


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "half", "verdict"), [(-0.02, 0.01, HOLDS), (-0.02, 0.04, PARTLY), (-0.09, 0.03, FAILS)]
)
def test_an_arm_keeps_its_answers_by_its_whole_interval(difference, half, verdict):
    found = {(MHA, of): change(difference, half, of=of) for of in decoupling.SCORES}
    assert decoupling.silenced_finding(found, MHA).verdict == verdict


@pytest.mark.parametrize(
    ("fine", "worse", "verdict"), [(4, 0, HOLDS), (3, 1, HOLDS), (2, 1, PARTLY), (0, 0, PARTLY), (2, 2, FAILS)]
)
def test_most_is_three_of_four(fine, worse, verdict):
    changes = [change(0.0, 0.005)] * fine + [change(-0.1, 0.02)] * worse + [change(0.0, 0.05)] * (4 - fine - worse)
    places = [(arm, of) for arm in (MHA, FFN) for of in decoupling.STANDARD]
    found = decoupling.standard_finding(dict(zip(places, changes, strict=True)))
    assert found.verdict == verdict
    assert found.value == min(one.difference for one in changes)


@pytest.mark.parametrize(
    ("own", "over_ffn", "verdict"),
    [
        (change(-0.1, 0.03), change(-0.08, 0.03), HOLDS),
        (change(-0.1, 0.03), change(-0.02, 0.04), PARTLY),
        (change(-0.1, 0.03), change(0.08, 0.03), FAILS),  # the other sublayer costs more
        (change(0.0, 0.005), change(-0.08, 0.03), FAILS),  # it costs less than a point
        (change(-0.02, 0.04), change(-0.08, 0.03), PARTLY),
    ],
)
def test_crucial_is_a_loss_and_a_larger_one_than_the_others(own, over_ffn, verdict):
    found = {(MHA, "grounding"): own, (FFN, "grounding"): change(-0.01)}
    assert decoupling.crucial_finding(found, over_ffn).verdict == verdict


@pytest.mark.parametrize(
    ("early", "later", "middle", "kept", "sufficient"),
    [
        (change(0.0, 0.005), change(-0.01, 0.01), change(0.0, 0.005), HOLDS, HOLDS),
        (change(0.0, 0.005), change(-0.04, 0.03), change(-0.2, 0.02), PARTLY, PARTLY),
        (change(-0.1, 0.02), change(-0.02, 0.01), change(-0.2, 0.02), FAILS, FAILS),
    ],
)
def test_trained_entry_is_judged_at_the_depths_of_the_paper_and_in_the_middle(early, later, middle, kept, sufficient):
    twins = {(trained(layer), AVG): one for layer, one in ((1, early), (2, later), (4, middle), (6, change(-0.5)))}
    layers = [1, 2, 4, 6]
    assert decoupling.trained_finding(twins, layers, 8).verdict == kept
    assert decoupling.sufficient_finding(twins, layers, 8).verdict == sufficient


def test_without_trained_runs_their_claims_cannot_be_tested():
    found = everything(with_runs=False).findings
    assert {name for name, one in found.items() if one.verdict == UNTESTABLE} == {"E53", "E54", "E57"}
    assert "training/entry.py" in found["E53"].note
    deep = decoupling.trained_finding({}, [6], 8)
    assert deep.verdict == UNTESTABLE and "none at the paper's depths" in deep.note


@pytest.mark.parametrize(
    ("late", "rises", "verdict"),
    [(5.0, True, HOLDS), (5.0, False, PARTLY), (8.0, True, PARTLY), (8.0, False, FAILS)],
)
def test_equal_at_entry_and_longer_refinement_are_two_conditions(late, rises, verdict):
    at_entry = AtEntry(np.full(50, 10), {0: np.full(50, 5.0), 2: np.full(50, late)})
    curve = [[1] * 50] * 3 + [[at if rises else 1] * 50 for at in range(2, 8)]
    by_layer = {0: Grounded(0, hits([[5] * 50] * 9)), 2: Grounded(2, hits(curve))}
    assert decoupling.grounded_finding(at_entry, by_layer, 8).verdict == verdict


def test_the_released_rewriting_matters_only_beyond_its_interval():
    assert decoupling.released_verdict(change(-0.1, 0.02)).endswith("-8.0), so it matters")
    assert decoupling.released_verdict(change(0.0, 0.005)).endswith("no difference beyond a point")
    assert decoupling.released_verdict(change(-0.01, 0.05)).endswith("undecided")


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_runs", [True, False])
def test_everything_said_drawn_and_recorded_is_there(with_runs):
    from matplotlib import pyplot as plt

    figures.set_style()
    found = everything(with_runs)
    runs = runs_of(0, 1, 2, 4, 6, seeds=2) if with_runs else []
    for key, value in (found.told() | decoupling.told_of_runs(runs)).items():
        assert printable(key, value) not in ("", "nan")
    assert np.isfinite(list(found.numbers().values())).all()
    for name in DRAWN:
        fig = getattr(decoupling_figures, f"{name}_figure")(found)
        fig.draw_without_rendering()
        title = fig.get_suptitle()
        assert title and "nan" not in title
        width = fig._suptitle.get_window_extent().width
        assert width < fig.bbox.width, f"{name}: the title is wider than the figure"
        plt.close(fig)


def test_tables_hold_no_blank_and_the_papers_own_column_stands_apart():
    found = everything()
    table = decoupling.change_table(found.silencing, {MHA: MHA, FFN: FFN})
    assert table.loc[(FFN, "CV-centric"), f"paper ({decoupling.PAPER})"] == "-16.8"
    assert table.loc[(MHA, "Avg"), "here"] == found.silencing[MHA, AVG].text()
    tables = [table, decoupling.change_table(found.twins), decoupling.contradiction_table()]
    for one in (*tables, decoupling.entry_table(found), decoupling.entry_table(everything(with_runs=False))):
        assert len(one) and not one.isna().any().any()
        assert not one.astype(str).apply(lambda column: column.str.contains("nan")).any().any()
    widths = decoupling.interval_table(list(found.silencing.values()), found.silenced)
    assert len(widths) == 10 and (widths["questions for one point"] > 0).all()


def test_contradictions_of_the_print_are_shown():
    table = decoupling.contradiction_table()
    assert "-3.3" in table.loc["Table c, caption"].iloc[1] and "-16.8" in table.loc["Table c, caption"].iloc[1]
    assert table.loc["Table 1, -ViT sinks, CV-centric"].tolist() == ["53.8", "54.37"]


def test_the_frame_of_the_original_picture_is_a_score_of_its_own():
    found = everything()
    table = found.silenced.copy()
    table.loc[table["arm"] == MHA, "correct_original"] = 1.0
    told = dataclasses.replace(found, silenced=table).told()
    assert told["original_mha"].startswith("+100.0") and told["original_ffn"].startswith("+0.0")
    assert paired.compare(table, MHA, "grounding").difference == found.silencing[MHA, "grounding"].difference
