"""What a study of sinks says about the claims: rules that can fail, stand-ins that never pass as sinks."""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from sink_references import both_found, none_found
from twins import save_twin

from embedlens import claims, samples
from embedlens.chapters import sinkhood
from embedlens.sinks import KINDS, sink_study

matplotlib.use("Agg")

FIGURES = [
    sinkhood.norms_figure,
    sinkhood.excitement_figure,
    sinkhood.centroids_figure,
    sinkhood.attention_figure,
    sinkhood.phi_figure,
    sinkhood.turning_figure,
    sinkhood.staying_figure,
    sinkhood.skipping_figure,
]
NAN = float("nan")
BOUNDS = sinkhood.ALIKE["ViT sink"]


@pytest.fixture(scope="module")
def pictures():
    return list(samples.load("miniworld", n=6))


@pytest.fixture(scope="module")
def references(tiny, pictures):
    """No sinks; some of each kind; kinds that these pictures do not show."""
    none = none_found(tiny)
    prompts = tiny.prompts([picture.image for picture in pictures], ["What?"] * len(pictures))
    some = both_found(tiny, prompts, none)
    return {"none": none, "some": some, "unseen": replace(some, vit_norm=1e9, phi_threshold=1e9)}


@pytest.fixture(scope="module")
def readings(tiny, pictures, references):
    return {
        name: sinkhood.sinkhood(tiny, sink_study(tiny, pictures, reference, few=3, repeats=2))
        for name, reference in references.items()
    }


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "holds", "partly", "fails"),
    [
        (sinkhood.alike_verdict, (0.995, 1e-6, 0.1, BOUNDS), (0.995, 1e-4, 0.1, BOUNDS), (1.0, 0.0, -0.1, BOUNDS)),
        (sinkhood.share_verdict, (0.02, 0.1), (0.3, 0.6), (0.0, 0.1)),
        (sinkhood.cluster_verdict, (0.6, 0.1), (0.4, 0.1), (0.9, -0.1)),
        (sinkhood.word_verdict, (0.6, 0.1), (0.6, -0.1), (0.4, -0.1)),
        (sinkhood.disregard_verdict, (0.4,), (0.9,), (1.1,)),
        (sinkhood.onset_verdict, (1.0, 0.5, 3.0, 20.0, 10.0), (1.0, 0.5, 3.0, 5.0, 10.0), (1.0, -0.5, 3.0, 5.0, 10.0)),
        (sinkhood.turn_verdict, (0.5, 0.4, True), (0.5, 0.4, False), (0.5, -0.1, True)),
        (sinkhood.apart_verdict, (0.3, -0.1), (0.3, 0.1), (-0.1, -0.1)),
        (sinkhood.stay_verdict, (0.6, 0.1, 0.3, 0.1), (0.4, 0.1, 0.3, 0.1), (0.05, 0.1, 0.3, 0.1)),
        (sinkhood.skip_verdict, (-0.2, -0.1, -0.05, 0.2), (-0.2, 0.1, -0.05, 0.2), (-0.05, -0.1, -0.01, 0.2)),
    ],
)  # fmt: skip
def test_every_rule_can_pass_in_part_and_fail(rule, holds, partly, fails):
    assert [rule(*numbers) for numbers in (holds, partly, fails)] == [claims.HOLDS, claims.PARTLY, claims.FAILS]
    nothing = [NAN if isinstance(number, float) else number for number in holds]
    assert rule(*nothing) == claims.FAILS  # an empty group meets nothing


def test_a_stand_in_holds_in_part_at_best():
    assert sinkhood.at_best(claims.HOLDS, all_found=True) == claims.HOLDS
    assert sinkhood.at_best(claims.HOLDS, all_found=False) == claims.PARTLY
    for verdict in (claims.PARTLY, claims.FAILS, claims.UNTESTABLE):
        assert sinkhood.at_best(verdict, all_found=False) == verdict


# --- findings --------------------------------------------------------------------------------------------------------


def test_without_sinks_no_claim_about_them_holds_and_every_note_names_what_stood_in(readings):
    found = sinkhood.findings(readings["none"])
    assert found["E15"].verdict == found["E21"].verdict == claims.FAILS
    assert (found["E21"].value, found["E21"].low) == (0, 0) and found["E21"].high == pytest.approx(
        1 - 0.025 ** (1 / 6), abs=1e-6
    )
    for name in ("E16", "E17", "E18", "E20", "E22", "E23", "E24", "E25", "E30"):
        assert found[name].verdict != claims.HOLDS and "measured on the 5 highest" in found[name].note, name
    assert "No ViT sink, no LLM sinks" not in found["E25"].note and "no LLM sinks" in found["E25"].note


def test_with_sinks_nothing_stands_in(readings):
    assert readings["some"].standing == "This model has both kinds of sinks."
    assert "no ViT sinks and no LLM sinks. In their place stand the 5 highest-norm" in readings["none"].standing
    found = sinkhood.findings(readings["some"])
    assert not any("measured on" in finding.note for finding in found.values())
    study = readings["some"].study
    assert found["E21"].value == pytest.approx(study.counts("LLM sink").sum() / study.tokens.sum())


def test_sinks_that_no_picture_shows_cannot_be_tested_and_crash_nothing(readings):
    seen = readings["unseen"]
    found = sinkhood.findings(seen)
    for name in ("E16", "E17", "E18", "E20", "E22", "E24", "E25", "E30"):
        assert found[name].verdict == claims.UNTESTABLE, name
    assert found["E15"].verdict == found["E21"].verdict == claims.FAILS
    assert "not measurable" in sinkhood.alike_table(seen).to_string()


@pytest.mark.parametrize("kind", ["none", "some", "unseen"])
def test_nothing_on_the_page_is_a_hole(readings, kind, tiny, pictures):
    seen = readings[kind]
    texts = sinkhood.told(seen, sinkhood.findings(seen))
    assert all(text.strip() and "nan" not in text for text in texts.values()), texts
    assert np.isfinite(list(sinkhood.numbers(seen).values())).all()
    for table in (sinkhood.alike_table(seen), sinkhood.words_table(seen)):
        assert "nan" not in table.drop(columns="variance over pairs", errors="ignore").to_string() or kind == "unseen"
    for draw in FIGURES:
        figure = draw(seen)
        said = [text.get_text() for text in figure.texts] + [a.get_title(loc="left") for a in figure.axes]
        assert any(said) and not any("nan" in text for text in said), draw
        assert any("full scale" in text for text in said)  # signed
        matplotlib.pyplot.close(figure)
    figure = sinkhood.scene_figure(tiny, seen, pictures)
    assert ("No sinks" in figure.texts[0].get_text()) == (kind == "none")


def test_titles_say_what_was_measured(readings):
    seen = readings["unseen"]
    assert "Beyond random sets: ViT sink not measurable" in sinkhood.centroids_figure(seen).get_suptitle()
    assert sinkhood.phi_figure(seen).get_suptitle() == "phi of the LLM sinks: none"
    own = readings["none"]
    beyond = float(own.alike["ViT sink"].beyond.value)
    assert f"highest norms {beyond:+.2f}, highest phi" in sinkhood.centroids_figure(own).get_suptitle()
    late = float(own.rising[2].value)
    assert sinkhood.phi_figure(own).get_suptitle().endswith(f"in layers 0 and 1, {late:.1f} later")
    tall = tuple(norms + 1e6 * (np.arange(norms.shape[-1]) == 0) for norms in own.study.norms)  # one patch of 16
    high = replace(own.study, norms=tall)
    for study, said in ((own.study, "No patch stands out"), (high, "6.25% of the patches stand out")):
        shown = sinkhood.norms_figure(replace(own, study=study)).get_suptitle()
        assert shown.startswith(said)


def test_what_is_read_is_what_was_measured(readings):
    seen = readings["none"]
    study, at = seen.study, seen.study.aligner
    own, others = study.attention.mean(1)[:, [1, 3]].T
    both = np.isfinite(own) & np.isfinite(others)  # not every picture has a token of each
    assert float(seen.attended["LLM sink"].value) == pytest.approx(own[both].sum() / others[both].sum())
    rise = study.cosine[:, at] - study.cosine[:, at - 1]
    assert float(seen.turning.own.value) == pytest.approx(rise[:, 1].mean())
    assert float(seen.turning.beyond.value) == pytest.approx(np.nanmean(rise[:, 1] - rise[:, 3]))
    assert float(seen.leads[0].value) == pytest.approx((study.cosine[:, at, 1] - study.cosine[:, at, 0]).mean())
    assert float(seen.staying[0].own.value) == pytest.approx(study.kept[:, at + 1 :].mean())
    mass = study.skipping.mass
    assert float(seen.skipped.attention.value) == pytest.approx((mass[:, 1] - mass[:, 0]).mean())
    assert float(seen.skipped.held.value) == pytest.approx(mass[:, 0].mean())
    dead, own = np.concatenate(study.met("dead")), np.concatenate(study.met("LLM sink"))
    assert float(seen.dead_share("LLM sink").value) == pytest.approx(dead[own].mean())
    steps = np.diff(study.cosine[:, :, 1], axis=1).mean(0)
    assert seen.largest_turn == steps.argmax() + 1


def test_the_first_lines_say_what_is_looked_at(readings):
    text = sinkhood.looked_at(readings["none"])
    assert all(f"{kind}s: {readings['none'].study.reference.notes[kind]}" in text for kind in KINDS)
    assert "5 highest-phi tokens, 3.0 of 16 tokens a picture" in text


def test_pictures_of_unequal_token_counts_are_read_and_drawn(tmp_path, pictures):
    from embedlens import load
    from embedlens.chapters.sink_removal import attention_moved, moved_finding

    model = load(save_twin(tmp_path / "next", "llava-hf/llava-v1.6-vicuna-7b-hf"), device="cpu")
    reference = none_found(model)
    seen = sinkhood.sinkhood(model, sink_study(model, pictures, reference, repeats=2))
    assert len(set(seen.study.tokens)) > 1
    texts = sinkhood.told(seen, sinkhood.findings(seen))
    assert not any("nan" in text for text in texts.values())
    for draw in FIGURES:
        matplotlib.pyplot.close(draw(seen))
    moved = attention_moved(model, pictures, seen.study.groups, reference=reference)
    np.testing.assert_allclose(moved.mass.sum(-1), 1, atol=1e-4)
    assert moved_finding(moved).n == len(pictures)
