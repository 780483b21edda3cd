"""Who is in the groups: every outcome of the rules for E01 to E04, E12, E19 and E31, and counts by hand."""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest

from embedlens import claims, samples
from embedlens.chapters import census
from embedlens.chapters.census import Census, DeadWords
from embedlens.clusters import cluster_study
from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, token_groups
from embedlens.intervals import Interval

matplotlib.use("Agg")
HOLDS, PARTLY, FAILS, UNTESTABLE = claims.HOLDS, claims.PARTLY, claims.FAILS, claims.UNTESTABLE


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.55, 0.65, HOLDS), (0.45, 0.65, PARTLY), (0.55, 0.75, PARTLY), (0.3, 0.45, FAILS), (0.75, 0.8, FAILS)],
)
def test_about_means_that_the_whole_interval_is_near(low, high, verdict):
    assert census.about_verdict(low, high, 0.6, 0.1) == verdict


@pytest.mark.parametrize(("low", "verdict"), [(0.95, HOLDS), (0.9, PARTLY), (0.6, PARTLY), (0.5, FAILS)])
def test_one_word_means_nearly_every_picture(low, verdict):
    assert census.one_word_verdict(low) == verdict


@pytest.mark.parametrize(
    ("low", "at_random", "verdict"),
    [(0.7, 0.6, HOLDS), (0.7, 0.8, PARTLY), (0.4, 0.3, PARTLY), (0.4, 0.6, FAILS)],
)
def test_no_words_means_most_and_more_than_at_random(low, at_random, verdict):
    assert census.wordless_verdict(low, at_random) == verdict


def made(membership="top3", **columns):
    """A census of four pictures; columns are "measure|group"."""
    rows = {("share", group): [0.25] * 4 for group in census.ROWS}
    rows |= {(measure, group): [np.nan] * 4 for measure in ("to text", "inside", "no words") for group in census.ROWS}
    rows |= {tuple(name.split("|")): values for name, values in columns.items()}
    return Census(pd.DataFrame(rows), membership, 0.3, seed=0)


@pytest.mark.parametrize(
    ("nearer", "alive", "membership", "verdict"),
    [
        (0.2, 0.1, "top3", HOLDS),
        (0.2, -0.1, "top3", PARTLY),
        (-0.2, 0.1, "top3", PARTLY),
        (-0.2, -0.1, "top3", FAILS),
        (0.2, -0.1, "cluster", HOLDS),  # a stand-in for dead tokens is not judged
        (np.nan, 0.1, "top3", UNTESTABLE),
    ],
)
def test_dead_tokens_are_far_from_words_when_c0_is_and_alive_ones_nearer(nearer, alive, membership, verdict):
    found = made(membership, **{"to text|C0": [0.0] * 4, "to text|not C0": [nearer] * 4, "to text|dead": [0.0] * 4,
                                "to text|alive": [alive] * 4})  # fmt: skip
    assert found.findings()["E12"].verdict == verdict


def test_shares_are_held_against_the_printed_ones_and_absent_groups_are_dashes():
    found = made(**{"share|alive": [0.6] * 4, "share|dead": [0.35] * 4, "share|sink": [0.05] * 4})
    verdicts = {name: finding.verdict for name, finding in found.findings().items()}
    assert {verdicts[name] for name in ("E01", "E02", "E03", "E04")} == {HOLDS}
    assert found.told()["c0_inside"] == "–" and found.shown().loc["ViT sink", "inside an object"] == "–"
    assert found.findings()["E02"].value == pytest.approx(0.4)
    assert census.groups_figure(found, "", "miniature").axes[0].get_title() == "60% of the visual tokens are alive"


def test_a_group_that_no_picture_shows_is_bounded_by_how_many_pictures_there_are():
    found = made(**{"share|sink": [0.0] * 4}).findings()["E04"]
    assert (found.value, found.low) == (0, 0) and found.high == pytest.approx(0.602, abs=1e-3)


@pytest.fixture(scope="module")
def pictures():
    return samples.load("miniworld", n=3, seed=0)


@pytest.fixture(scope="module")
def reference(tiny):
    return Reference(tiny.name, tiny.width, len(tiny.tokens), 2, 0.9, None, (), None, None, None, None, None)


@pytest.fixture(scope="module")
def counted(tiny, pictures, reference):
    study = cluster_study(tiny, pictures)[0.9, "greedy"]
    return study, census.census(tiny, pictures, study, reference, "cluster", batch_size=2)


def test_every_row_is_its_picture_counted_alone(tiny, pictures, reference, counted):
    study, found = counted
    for row, sample in enumerate(pictures):
        prompt = tiny.prompt(sample.image, census.QUESTION)
        groups = token_groups(tiny, prompt, reference, "cluster")
        assert found.table["share", "dead"][row] == pytest.approx(float(groups.dead.float().mean()))
        assert found.table["share", "C0"][row] == study.largest[row].mean()
        covered = np.zeros(len(prompt.grid), bool)
        for x, y, w, h in (entry["bbox"] for entry in sample.annotations):
            covered |= prompt.grid.inside((x, y, x + w, y + h)).numpy()
        assert found.table["inside", "C0"][row] == pytest.approx(covered[study.largest[row]].mean())
    assert found.share("alive") + found.share("dead") + found.share("sink") == pytest.approx(1)


def test_dead_words_count_pictures_and_directions(tiny, counted):
    study, found = counted
    words = census.dead_words(tiny, study, found)
    assert words.usual == np.bincount(study.nearest[:, 0]).argmax()
    assert float(words.agreeing.value) == (study.nearest[:, 0] == words.usual).mean()
    assert words.in_vocabulary == pytest.approx(1 - census.word_entries(tiny).mean())
    assert words.table().pictures.sum() == len(study)


def test_no_dead_tokens_are_no_verdict_on_their_words():
    few = Interval(*(np.array(part) for part in (0.6, 0.55, 0.65)))
    words = DeadWords(np.array([1, 1, 0]), ("a", "b"), None, None, few, 0.5, 0.5, "top3", 0)
    found = words.findings()
    assert found["E31"].verdict == UNTESTABLE and words.told()["dead_no_words"] == "–"
    assert replace(words, empty=few, of_five=few).findings()["E31"].verdict == HOLDS
    assert found["E19"].value == pytest.approx(2 / 3)


def test_the_map_has_every_group_and_says_how_many(tiny, pictures, reference):
    found = census.joint_map(tiny, pictures, reference, "cluster", most=40)
    assert found.told() == {"n_shown_tokens": 40, "n_shown_words": min(40, len(tiny.tokens))}
    shown = census.joint_map_figure(found, "", "miniature").axes[0].get_legend_handles_labels()[1]
    assert sum(int(label.split("(")[1][:-1]) for label in shown) == len(found.kinds)


def test_the_patch_of_several_meanings_has_the_nearest_fifth_word(tiny, pictures):
    found = census.several_meanings(tiny, pictures)
    assert len(found.words) == 8 and (np.diff(found.cosines) <= 1e-6).all()
    assert not bool(found.prompt.grid.padded[found.patch])
    assert len(census.meanings_figure(found, "miniature").axes) == 2
    with pytest.raises(EmbedLensError, match="at least one"):
        census.several_meanings(tiny, [])
