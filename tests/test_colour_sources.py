"""Where colours in answers come from: every outcome of the rules for E48, E55 and E56, and counts by hand."""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import numpy as np
import pytest

from embedlens import claims
from embedlens.chapters import colour_sources
from embedlens.samples import patchbench
from embedlens.samples.patchbench import GROUND, INK, NO_COLOUR, OTHER, SURROUND
from embedlens.trajectories import ask, canvas_of

matplotlib.use("Agg")
HOLDS, PARTLY, FAILS, UNTESTABLE = claims.HOLDS, claims.PARTLY, claims.FAILS, claims.UNTESTABLE


@pytest.mark.parametrize(
    ("fall", "follow", "sees", "verdict"),
    [
        ((0.1, 0.3), (0.4, 0.6), 0.1, HOLDS),
        ((0.1, 0.3), (0.1, 0.3), 0.1, PARTLY),  # only the fall
        ((-0.1, 0.3), (0.4, 0.6), 0.1, PARTLY),  # only the following
        ((-0.1, 0.3), (0.1, 0.3), 0.1, PARTLY),  # nothing shown, nothing refuted
        ((-0.3, 0.0), (0.1, 0.3), 0.1, FAILS),
        ((-0.1, 0.3), (0.0, 0.2), 0.1, FAILS),
        ((-0.1, 0.3), None, 0.1, PARTLY),  # no wrong answer
        ((0.1, 0.3), (0.4, 0.6), 0.0, UNTESTABLE),  # blind on white
    ],
)
def test_a_background_spoils_colours_or_does_not(fall, follow, sees, verdict):
    assert colour_sources.background_verdict(fall, follow, 0.2, sees) == verdict


@pytest.mark.parametrize(
    ("low", "high", "ground", "told", "verdict"),
    [
        (0.1, 0.3, 0.4, True, HOLDS),
        (-0.1, 0.3, 0.0, True, PARTLY),
        (-0.3, -0.1, 0.2, True, PARTLY),  # named more often than one colour in nine
        (-0.3, -0.1, 0.1, True, FAILS),
        (0.1, 0.3, 0.4, False, UNTESTABLE),
    ],
)
def test_the_dominant_colour_wins_or_does_not(low, high, ground, told, verdict):
    assert colour_sources.dominant_verdict(low, high, ground, told) == verdict


@pytest.mark.parametrize(
    ("more", "pattern", "turned", "verdict"),
    [
        (0.1, True, (0.2, 0.0), HOLDS),
        (0.1, False, (0.2, 0.0), PARTLY),
        (-0.1, True, (0.2, 0.0), PARTLY),
        (-0.1, False, (0.2, 0.0), FAILS),
        (0.1, True, (0.1, 0.1), UNTESTABLE),  # no change turns answers
    ],
)
def test_recolouring_shows_what_answers_follow(more, pattern, turned, verdict):
    assert colour_sources.recolouring_verdict(more, pattern, turned) == verdict


@pytest.fixture(scope="module")
def drawn(tiny):
    side, patch = canvas_of(tiny)
    return patchbench.pictures(28, side=side, patch=patch)


@pytest.fixture(scope="module")
def twins(tiny, drawn):
    """Answers made up: on white the ink, on colour the patch, the surround and the ink in turn."""
    answers, control = ask(tiny, drawn), ask(tiny, drawn, swap=True)
    pairs, at = patchbench.twins(drawn), {picture.id: picture for picture in drawn}
    turn = {b.id: (b.ground, b.surround, b.ink)[i % 3] for i, (_, b) in enumerate(pairs)}
    asked = answers.axis == "colour"
    answers.loc[asked, "said"] = [turn.get(i, at[i].ink) for i in answers[asked].id]
    answers["correct"] = answers.correct.where(~asked, answers.said == answers.answer)
    answers.loc[asked, "follows"] = [patchbench.follows(at[i], s) for i, s in answers[asked][["id", "said"]].values]
    control["correct"] = False
    return colour_sources.twins(drawn, answers, control)


def test_twins_are_paired_and_their_errors_counted_by_what_they_follow(twins, drawn):
    n = len(patchbench.twins(drawn))
    wanted = [(GROUND, SURROUND, INK)[i % 3] for i in range(n)]
    assert list(twins.answers) == wanted
    assert twins.on_white.tolist() == [1.0] * n
    assert twins.on_colour.tolist() == [float(kind == INK) for kind in wanted]
    wrong = [kind for kind in wanted if kind != INK]
    assert len(twins.errors) == len(wrong) and float(twins.background.value) == 1.0
    assert float(twins.wrong[GROUND].value) == wrong.count(GROUND) / len(wrong)
    assert float(twins.preferred.value) == pytest.approx((wanted.count(GROUND) - wanted.count(INK)) / n)
    assert 0.1 < twins.background_chance < 0.25  # each once in nine
    found = twins.findings()
    assert found["E48"].verdict == HOLDS and found["E48"].value == float(twins.fall.value)
    assert all(sum(part.values()) == pytest.approx(1) for part in twins.situations.values())


def test_an_answer_without_a_colour_tests_nothing_and_crashes_nothing(twins):
    silent = replace(twins, answers=(NO_COLOUR,) * len(twins.answers))
    assert silent.findings()["E55"].verdict == UNTESTABLE
    perfect = replace(twins, answers=(INK,) * len(twins.answers), on_colour=np.ones(len(twins.on_colour)))
    assert perfect.findings()["E48"].verdict in (PARTLY, FAILS) and perfect.chance[OTHER] == 0.0
    assert set(perfect.told()) == set(twins.told())


def test_the_figures_of_twins_show_every_kind(twins):
    labels = [text.get_text() for text in colour_sources.follows_figure(twins, "miniature").axes[0].get_yticklabels()]
    assert labels == list(twins.situations)
    shown = colour_sources.wrong_figure(twins, "miniature").axes[0].get_yticklabels()
    assert [text.get_text() for text in shown] == list(reversed(twins.wrong))


@pytest.fixture(scope="module")
def recoloured(tiny, drawn):
    return colour_sources.recoloured(tiny, drawn, n=3)


def test_each_version_differs_in_one_colour(recoloured):
    for i, case in enumerate(recoloured.cases):
        assert case.surround != "white"
        parts = {INK: "ink", GROUND: "ground", SURROUND: "surround"}
        for part, attribute in parts.items():
            changed = recoloured.changed[part][i]
            assert replace(changed, **{attribute: getattr(case, attribute)}) == case != changed


def test_turned_and_kept_are_read_off_the_answers(recoloured):
    new = [picture.ink for picture in recoloured.changed[INK]]
    then = {INK: ("dog",) * 3, GROUND: tuple(new), SURROUND: tuple(new)}
    says = replace(recoloured, said=("dog",) * 3, said_then=then, says_surround=np.ones(3, bool))
    assert says.kept(INK).all() and not says.turned(INK).any()
    assert says.turned(SURROUND).all() and says.turned(GROUND).all()
    assert float(says.more.value) == 1.0
    silent = ~says.held["EmbedLens"][SURROUND].any(1)
    assert says.like_the_paper.tolist() == silent.tolist()
    assert says.told()["silent"] == pytest.approx(silent.mean())
    assert says.finding().verdict == (HOLDS if silent.any() else PARTLY)


def test_figures_and_tables_of_recoloured_cases_are_whole(tiny, recoloured):
    assert len(colour_sources.versions_figure(recoloured, "miniature").axes) == 4
    assert len(colour_sources.nearest_figure(recoloured, "miniature").axes) == 2
    assert len(colour_sources.recoloured_figure(recoloured, "miniature").axes[0].get_yticklabels()) == 3
    assert colour_sources.versions_table(tiny, recoloured).shape == (tiny.n_layers + 1, 4)
    assert recoloured.held_table().shape == (6, 2)
