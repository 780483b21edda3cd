"""Claims about lengths and turns: every outcome of each rule, and figures of what was measured."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest

from embedlens import claims, norms, samples
from embedlens.chapters import lengths
from embedlens.labels import LabelHits
from embedlens.norms import Course

matplotlib.use("Agg")
HOLDS, PARTLY, FAILS, UNTESTABLE = claims.VERDICTS


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1, 1, HOLDS), (0.9, 1, PARTLY), (0.4, 0.6, PARTLY), (0.2, 0.5, FAILS)]
)
def test_longer_means_at_every_layer(low, high, verdict):
    assert lengths.longer_verdict(low, high) == verdict


@pytest.mark.parametrize(
    ("low", "high", "blocks", "than_text", "verdict"),
    [
        (0.95, 0.97, (0.92, 0.98), 0.1, HOLDS),
        (0.95, 0.97, (0.85, 0.99), 0.1, PARTLY),  # one block turns them
        (0.95, 0.97, (0.92, 0.98), -0.1, PARTLY),  # text is as still
        (0.85, 0.97, (0.92, 0.98), 0.1, PARTLY),
        (0.85, 0.90, (0.92, 0.98), 0.1, FAILS),
    ],
)
def test_little_transformation_means_in_every_shallow_block_and_less_than_text(low, high, blocks, than_text, verdict):
    assert lengths.still_verdict(low, high, np.array(blocks), than_text) == verdict


@pytest.mark.parametrize(
    ("low", "high", "nearer", "verdict"),
    [(0.1, 0.2, 0.1, HOLDS), (0.1, 0.2, 0.0, PARTLY), (-0.1, 0.2, 0.1, PARTLY), (-0.2, 0.0, 0.1, FAILS)],
)
def test_short_tokens_must_turn_more_and_come_nearer_to_text(low, high, nearer, verdict):
    assert lengths.shrinking_verdict(low, high, nearer) == verdict


@pytest.mark.parametrize(
    ("low", "high", "sees", "verdict"),
    [(0.1, 0.2, 0.1, HOLDS), (-0.1, 0.2, 0.1, PARTLY), (-0.2, 0.0, 0.1, FAILS), (0.1, 0.2, 0.0, UNTESTABLE)],
)
def test_sight_that_is_not_there_cannot_be_lost(low, high, sees, verdict):
    assert lengths.sight_verdict(low, high, sees) == verdict


@pytest.mark.parametrize(
    ("layers", "off", "inside", "verdict"),
    [
        ((2, 3, 6), 1.2, 0.99, HOLDS),
        ((1, 3, 6), 1.2, 0.90, PARTLY),  # the interval leaves the middle half
        ((2, 3, 6), 2.5, 0.99, PARTLY),  # no match, only the nearest
        ((0, 0, 1), 1.0, 0.01, FAILS),
    ],
)
def test_a_match_lies_in_the_middle_and_is_a_match(layers, off, inside, verdict):
    assert lengths.match_verdict(layers, 8, off, inside) == verdict


@pytest.fixture(scope="module")
def pictures():
    return samples.load("miniworld", n=4, seed=0)


@pytest.fixture(scope="module")
def course(tiny, pictures):
    return norms.courses(tiny, pictures, (1.0, 0.01))


def test_summaries_are_of_the_courses_that_were_measured(tiny, pictures, course):
    visual, text = course[1.0, "visual"], course[1.0, "text"]
    longer = lengths.longer(course)
    assert longer.ratio.value == pytest.approx(visual.norms.mean(0) / text.norms.mean(0))
    assert float(longer.above.value) == (visual.norms.mean(0) > text.norms.mean(0)).mean()
    shrunk = lengths.shrinking(course, 0.01, shallow=1)
    fall = visual.steps[:, 0] - course[0.01, "visual"].steps[:, 0]
    assert float(shrunk.drop.value) == pytest.approx(fall.mean()) == pytest.approx(shrunk.plain - shrunk.shrunk)
    assert shrunk.turned == ("more" if fall.mean() > 0 else "less")
    grounded = np.random.default_rng(0).integers(0, 5, (tiny.n_layers + 1, len(pictures)))
    four = np.full(len(pictures), 4)
    none = np.zeros((tiny.n_layers + 1, len(pictures), 1), dtype=bool)
    hits = LabelHits(
        ("dog",), none[0] | True, none, 4 * four, four, grounded, np.ones(1, int), np.ones((len(none), 1), int)
    )
    renamed = np.full((len(pictures), tiny.n_layers), 0.25)
    turning = lengths.turning(course, renamed, hits, shallow=1)
    assert float(turning.still.value) == pytest.approx(visual.steps[:, 0].mean())
    assert float(turning.early_names.value) == 0.25
    both = float(turning.early_gain.value) + float(turning.later_gain.value)
    share = hits.grounded.sum(1) / hits.object_tokens.sum()
    assert both == pytest.approx(share[-1] - share[0])
    assert len(turning.table()) == tiny.n_layers


def test_every_figure_shows_its_curves(tiny, pictures, course):
    assert len(lengths.course_figure(course, 1.0, 1, "title", "miniature").axes) == 2
    names = [line.get_label() for line in lengths.scales_figure(course, (1.0, 0.01), "miniature").axes[0].get_lines()]
    assert names == ["visual x 1", "visual x 0.01", "text"]
    block = lengths.arithmetic(norms.first_block(tiny, pictures, (1.0, 0.01)))
    lines = lengths.arithmetic_figure(block, 0.5, "miniature").axes[0].get_lines()
    assert lines[0].get_ydata().tolist() == block.measured.value.tolist()
    assert lines[1].get_ydata().tolist() == block.frozen.value.tolist()


def made_course(by_layer):
    values = np.asarray(by_layer, dtype=np.float64)
    return Course(values, values[:, 1:], values[:, 1:], values)


def test_the_match_is_the_nearest_mean_and_a_picture_without_tokens_is_left_out():
    text = made_course(np.tile([1.0, 4.0, 8.0, 16.0, 40.0], (6, 1)))
    enter = np.array([8.0, 9.0, 7.0, 8.5, 7.5, np.nan])
    found = lengths.match(made_course(np.tile(enter[:, None], (1, 5))), text)
    assert (found.layer, found.low, found.high, found.n_pictures) == (2, 2, 2, 5)
    assert float(found.off.value) == pytest.approx(1.0) and found.inside == 1.0
    assert found.finding().verdict == HOLDS
    table = lengths.match_table({(1.0, "visual"): made_course([[8.0] * 5] * 6), (1.0, "text"): text,
                                 (1.0, "all text"): text, (1.0, "alive"): made_course([[np.nan] * 5] * 6)})  # fmt: skip
    assert len(table) == 2  # no picture has alive tokens
    assert len(lengths.match_figure(found, "miniature").axes) == 2


def test_sight_counts_what_scaling_costs():
    correct = {"object": np.array([[1.0, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]]), "colour": np.zeros((4, 3)) + 1}
    found = lengths.Sight((1.0, 0.3, 0.01), correct, {"object": np.zeros(4), "colour": np.zeros(4)}, seed=0)
    assert found.lost.value.tolist() == [0.0, 0.125, 0.5]
    told = found.told()
    assert (told["n_questions"], told["correct_small"], told["correct_blind"]) == (8, 0.5, 0.0)
    assert found.finding().verdict == HOLDS
    guessed = lengths.Sight(found.scales, correct, {kind: right[:, 0] for kind, right in correct.items()}, seed=0)
    assert guessed.finding().verdict == UNTESTABLE
    assert found.table().loc["x 0.01", "correct"].startswith("0.50")
    assert lengths.sight_figure(found, "miniature").axes[0].get_title() == "Scaled by 0.01: 100% correct become 50%"
