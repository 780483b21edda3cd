"""Claims about dead tokens are judged by what was measured; a stand-in is named, and an absent group hurts nothing."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import matplotlib
import numpy as np
import pytest
import torch

from embedlens import claims, figures, samples
from embedlens.book import printable
from embedlens.chapters import emptiness
from embedlens.chapters.emptiness import Measured, NoWords, graded
from embedlens.chapters.page import parts
from embedlens.consistency import ARMS, Common, GroupStudy
from embedlens.groups import reference_of
from embedlens.intervals import Interval
from embedlens.readout import QUESTIONS, linear_readout, readouts, token_table

matplotlib.use("Agg")
N, LAYERS, TOWER = 40, 4, 9
SHAPES = {
    "inside": (LAYERS + 1,),
    "inside_removed": (LAYERS + 1,),
    "kept": (LAYERS,),
    "aligned": (LAYERS + 1,),
    "aligned_removed": (LAYERS + 1,),
    "attention": (LAYERS,),
    "tower_norms": (TOWER,),
    "tower_norms_l1": (TOWER,),
    "tower_aligned": (TOWER,),
    "tower_aligned_removed": (TOWER,),
    "tower_map": (TOWER, TOWER),
}
SIZES = {"alive": 10, "dead": 6, "ViT sink": 0, "LLM sink": 0, "remaining": 10, "random": 6, "highest norm": 5}


def planted(sizes=None, **values) -> GroupStudy:
    """A study in which every value of a group is what is planted, give or take a little; 0.5 where nothing is.

    Args:
        values: measure → group → value (or one value per layer); groups of no size have nan.
    """
    rng = np.random.default_rng(0)
    sizes = SIZES | (sizes or {})
    found = {"sizes": np.tile([sizes[name] for name in ARMS], (N, 1))}
    for name in (field.name for field in fields(GroupStudy)):
        if name in ("groups", "sizes", "attention_visual"):
            continue
        wanted = np.stack(
            [np.broadcast_to(values.get(name, {}).get(group, 0.5), SHAPES.get(name, ())) for group in ARMS]
        )
        wanted = wanted.astype(float) + rng.normal(0, 0.001, (N, *wanted.shape))
        wanted[:, [sizes[group] == 0 for group in ARMS]] = np.nan
        found[name] = wanted
    found["attention"] = np.nan_to_num(found["attention"])
    found["attention_visual"] = values.get("attention_visual", np.full((N, LAYERS), 0.8))
    return GroupStudy(groups=ARMS, **found)


def measured(stand_in: bool = False, **values) -> Measured:
    shared = Common(
        7,
        torch.zeros(LAYERS + 1, 3),
        torch.zeros(TOWER, 3),
        {name: torch.zeros(LAYERS + 1, 3) for name in ("alive", "dead", "random")},
        {name: torch.zeros(TOWER, 3) for name in ("alive", "dead", "random")},
    )
    return Measured(planted(**values), shared, stand_in, "miniature", 0)


def interval(value: float, around: float = 0.01) -> Interval:
    return Interval(np.array(value), np.array(value - around), np.array(value + around))


def by_layer(early: float, late: float) -> np.ndarray:
    """Over the tower: layers before the last eighth, and in it."""
    return np.array([early] * (TOWER - 2) + [late] * 2)


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dead", "beyond", "verdict"),
    [(0.9, 0.2, "holds"), (0.9, -0.1, "partly"), (0.3, 0.2, "partly"), (0.3, -0.2, "does not hold")],
)
def test_e31_wants_most_dead_tokens_far_from_words_and_more_than_random_directions(dead, beyond, verdict):
    words = NoWords({"dead": interval(dead), "random directions": interval(dead - beyond)}, interval(beyond), 0.7)
    assert emptiness.e31(measured(), words).verdict == verdict


@pytest.mark.parametrize(
    ("inside", "kept", "verdict"),
    [(0.8, 0.8, "holds"), (0.8, 0.3, "partly"), (0.3, 0.8, "partly"), (0.3, 0.3, "does not hold")],
)
def test_e34_wants_both_readings_ahead_of_every_group(inside, kept, verdict):
    study = measured(inside={"dead": inside}, kept={"dead": kept})
    found = emptiness.e34(study)
    assert found.verdict == verdict
    assert found.value == pytest.approx(inside - 0.5, abs=0.01)
    rival = measured(
        sizes={"ViT sink": 4}, inside={"dead": inside, "ViT sink": 0.9}, kept={"dead": kept, "ViT sink": 0.9}
    )
    assert emptiness.e34(rival).verdict == "does not hold"  # one group ahead is enough


@pytest.mark.parametrize(
    ("of_all", "visual", "verdict"), [(0.02, 0.8, "holds"), (0.06, 0.3, "partly"), (0.2, 0.8, "does not hold")]
)
def test_e35_wants_the_bar_kept_at_every_block_in_both_readings(of_all, visual, verdict):
    attention = np.array([0.01, of_all, 0.01, 0.01])
    study = measured(attention={"dead": attention}, attention_visual=np.full((N, LAYERS), visual))
    found = emptiness.e35(study)
    assert found.verdict == verdict and found.value == pytest.approx(of_all, abs=0.01)


def test_e36_wants_less_per_token_at_every_block():
    less = {"dead": 0.1, "remaining": 0.5}
    assert emptiness.e36(measured(attention=less)).verdict == "holds"
    once_more = {"dead": np.array([0.1, 0.1, 0.1, 0.4]), "remaining": 0.5}
    assert emptiness.e36(measured(attention=once_more)).verdict == "partly"
    assert emptiness.e36(measured(attention={"dead": 0.5, "remaining": 0.5})).verdict == "does not hold"


@pytest.mark.parametrize(
    ("early", "late", "verdict"),
    [(0.6, 1.4, "holds"), (1.1, 1.4, "partly"), (0.6, 0.9, "partly"), (1.2, 0.8, "does not hold")],
)
def test_e37_wants_smaller_norms_before_and_larger_ones_late(early, late, verdict):
    study = measured(tower_norms={"dead": by_layer(early, late), "alive": 1.0})
    found = emptiness.e37(study)
    assert found.verdict == verdict and found.value == pytest.approx(late - early, abs=0.01)


def test_e38_wants_a_late_turn_beyond_that_of_alive_patches_raw_and_less_the_mean():
    turns = {"dead": by_layer(0.3, 0.8)}
    assert emptiness.e38(measured(tower_aligned=turns, tower_aligned_removed=turns)).verdict == "holds"
    assert emptiness.e38(measured(tower_aligned=turns)).verdict == "partly"  # the mean alone turned
    all_turn = {name: by_layer(0.3, 0.8) for name in ("dead", "alive")}
    assert emptiness.e38(measured(tower_aligned=all_turn, tower_aligned_removed=all_turn)).verdict == "partly"
    assert emptiness.e38(measured(tower_aligned={"dead": by_layer(0.8, 0.3)})).verdict == "does not hold"
    over = {"dead": np.array([0.3] * 4 + [0.85] * 3 + [0.8] * 2)}  # risen, and falling again when it is late
    early = emptiness.e38(measured(tower_aligned=over, tower_aligned_removed=over))
    assert early.verdict == "partly" and "less the layer just before -0.050" in early.note


def test_e39_wants_a_higher_entropy():
    assert emptiness.e39(measured(entropy={"dead": 3.0, "remaining": 2.0}), 100).verdict == "holds"
    found = emptiness.e39(measured(entropy={"dead": 2.0, "remaining": 3.0}), 100)
    assert found.verdict == "does not hold" and found.value == pytest.approx(-1, abs=0.01)
    assert f"{-1 / math.log(100):.3f}" in found.note


def test_all_some_or_none():
    assert [graded(x) for x in ([True] * 3, [True, False], [False])] == ["holds", "partly", "does not hold"]


# --- stand-ins and absent groups -------------------------------------------------------------------------------------


def test_a_stand_in_earns_partly_at_best_and_is_named():
    study = measured(stand_in=True, entropy={"dead": 3.0, "remaining": 2.0})
    found = emptiness.e39(study, 100)
    assert found.verdict == "partly" and "C0, the stand-in" in found.note
    assert "dead" not in emptiness.finding_text(found, study) and "C0" in emptiness.finding_text(found, study)
    assert list(emptiness.group_table(study).index) == ["alive", "C0, stand-in for dead"]


def test_where_all_tokens_are_dead_nothing_is_compared():
    alone = measured(sizes={"alive": 0, "remaining": 0, "dead": 16, "random": 16})
    for judge in (emptiness.e34, emptiness.e36, emptiness.e37, emptiness.e38):
        assert judge(alone).verdict == claims.UNTESTABLE
    assert emptiness.e39(alone, 100).verdict == claims.UNTESTABLE
    assert alone.named == ["dead"] and alone.rivals == []
    for draw in (
        emptiness.attention_figure,
        emptiness.tower_figure,
        emptiness.entropy_figure,
        emptiness.likeness_figure,
    ):
        assert draw(alone).axes


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [0, 3])
def test_figures_draw_every_group_that_is_there(sinks):
    study = measured(sizes={"ViT sink": sinks, "LLM sink": sinks})
    names = {"alive", "dead", "ViT sink", "LLM sink"} if sinks else {"alive", "dead"}
    assert set(study.named) == names
    attention = emptiness.attention_figure(study)
    lines = {line.get_label() for line in attention.axes[1].get_lines() if not line.get_label().startswith("_")}
    assert lines == names
    tower = {line.get_label() for line in emptiness.tower_figure(study).axes[0].get_lines()}
    assert ("5 highest norms (no ViT sinks)" in tower) == (not sinks)
    assert [label.get_text() for label in emptiness.entropy_figure(study).axes[0].get_yticklabels()] == study.named
    for tower_too in (False, True):
        drawn = emptiness.direction_figure(study, tower=tower_too)
        assert {line.get_label() for line in drawn.axes[0].get_lines()} >= {"alive", "dead", "random tokens"}


def test_titles_say_what_was_measured():
    study = measured(
        entropy={"dead": 3.0, "remaining": 2.0},
        inside={"dead": 0.8},
        tower_norms={"dead": by_layer(0.6, 1.4), "alive": 1.0},
        tower_aligned={"dead": by_layer(0.3, 0.8)},
    )
    assert emptiness.entropy_figure(study).get_suptitle() == (
        "Entropy at dead tokens: 3.00 nats, at the remaining ones 2.00"
    )
    assert "Dead less alive: +0.30 among one another" in emptiness.likeness_figure(study).get_suptitle()
    assert "0.60 before the last eighth, 1.40 in it" in emptiness.tower_figure(study).get_suptitle()
    assert (
        "cosine +0.50, over the layer before it +0.50" in emptiness.direction_figure(study, tower=True).get_suptitle()
    )


def test_the_bar_of_the_paper_is_drawn_as_the_papers():
    drawn = emptiness.attention_figure(measured())
    bars = [line for line in drawn.axes[0].get_lines() if line.get_color() == figures.FACT]
    assert [float(np.ravel(line.get_ydata())[0]) for line in bars] == [emptiness.BAR]


# --- the probe -------------------------------------------------------------------------------------------------------


def probe(strength: float):
    """Answers that are read from the first dimension, or nearly always the same and read from nothing."""
    rng = np.random.default_rng(0)
    answers = (rng.random(480) < (0.5 if strength else 0.9)).astype(int)
    vectors = rng.normal(0, 0.1, (480, 4)).astype(np.float32)
    vectors[:, 0] += strength * answers
    return linear_readout([vectors], answers, np.repeat(np.arange(40), 12))


def test_sentences_say_whether_colour_is_read():
    names = [
        (asked, group, form)
        for asked in QUESTIONS
        for group in ("dead", "alive")
        for form in ("own projector", "random projectors")
    ]
    for strength, reads in ((1.0, "Yet a linear probe reads"), (0.0, "And a linear probe does not read")):
        read = dict.fromkeys(names, probe(strength))
        assert emptiness.hidden_sentence(measured(), read).startswith(reads)
        assert emptiness.reads_colour(measured(), read) == (strength > 0)
        assert ("it is the vision tower that gives it" in emptiness.hidden_sentence(measured(), read)) == (strength > 0)
        assert "not told apart from random projectors" in emptiness.probe_sentence(measured(), read)
    weak, strong = probe(0.15), probe(1.0)
    for own, anew, said in ((strong, weak, "which is less)"), (weak, strong, "which is more")):
        read = dict.fromkeys(names, own) | {(QUESTIONS[0], "dead", "random projectors"): anew}
        sentence = emptiness.hidden_sentence(measured(), read)
        assert f"random projectors: {float(anew.accuracy().value):.0%}, {said}" in sentence
        title = emptiness.readout_figure(measured(), read, 9).get_suptitle()
        assert title.endswith(f"random projectors {float(anew.accuracy().value):.0%}")
    nothing = dict.fromkeys(names)
    assert emptiness.hidden_sentence(measured(), nothing) == "Too few tokens to probe what they hold."
    assert emptiness.probe_sentence(measured(), nothing) == "Too few tokens to probe."
    assert not emptiness.readout_table(measured(), nothing).isna().any().any()
    assert emptiness.readout_figure(measured(), nothing, 9).axes


def test_readouts_ask_everything_of_dead_and_alive_tokens_by_all_projectors(tiny):
    pictures = samples.load("miniworld", n=36)
    read = readouts(tiny, pictures, reference_of(tiny), "cluster", projectors=1)
    assert set(read) == {
        (asked, group, form)
        for asked in QUESTIONS
        for group in ("dead", "alive")
        for form in ("own projector", "random projectors")
    }
    table = token_table(tiny, pictures, reference_of(tiny), "cluster")
    own = tiny.projector(table.before).detach().numpy()[table.alive]
    alone = linear_readout([own], table.answers[QUESTIONS[0]][table.alive], table.picture[table.alive])
    assert read[QUESTIONS[0], "alive", "own projector"].hits == pytest.approx(alone.hits)


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stand_in", [False, True])
def test_the_page_and_the_record_have_no_holes(tiny, tmp_path, stand_in):
    study = measured(stand_in=stand_in)
    words = NoWords({"dead": interval(0.3), "random directions": interval(0.5)}, interval(-0.2), 0.7)
    found = emptiness.findings(study, words, 100)
    assert list(found) == ["E31", "E34", "E35", "E36", "E37", "E38", "E39"]
    read = {(asked, "dead", form): None for asked in QUESTIONS for form in ("own projector", "random projectors")}
    for values in (
        emptiness.told(study, tiny, reference_of(tiny), found),
        emptiness.told_of_words(study, words),
        emptiness.told_of_probe(study, read),
    ):
        for key, value in parts(values).items():
            printable(key, value)
    numbers = emptiness.numbers(study, read, {"other half, mean removed": interval(0.3)})
    assert numbers["likeness_other_half_mean_removed"] == 0.3
    claims.write(tmp_path, "miniature", "04_dead_tokens", N, 0, found, numbers)


def test_likeness_on_the_other_half_decides_whether_choosing_made_it():
    other = {"other half": interval(0.9), "any tokens": interval(0.5), "any tokens, mean removed": interval(0.2)}
    said = emptiness.chosen_sentence(other | {"other half, mean removed": interval(0.6)})
    assert said.endswith("not made by choosing.")
    assert emptiness.chosen_sentence(other | {"other half, mean removed": interval(0.2)}).endswith("may have made it.")
    assert "No picture" in emptiness.chosen_sentence({})


def test_the_scene_shows_every_patch_with_its_group(tiny):
    study = replace(measured(), stand_in=True)
    sample = samples.load("miniworld", n=1)[0]
    drawn = emptiness.scene_figure(study, tiny, sample, reference_of(tiny), "cluster")
    said = " ".join(text.get_text() for text in drawn.texts)
    assert "of 16 tokens are in C0, the stand-in for dead" in said and "D = C0, stand-in for dead" in said
