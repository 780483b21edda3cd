"""What the paper prints of its tables of answers follows from itself, but for what is listed here (E59)."""

from __future__ import annotations

import pytest

from embedlens import printed


def test_the_baseline_follows_the_described_arithmetic():
    """E59: 58.7/36.9/54.0/61.1 -> 52.7. The OCR mean is 36.97: the paper has cut it, not rounded."""
    means = printed.means("a").iloc[0]
    assert means.tolist() == pytest.approx((58.7125, 36.9667, 53.9667, 61.05, 52.674), abs=1e-3)
    scores = printed.table("a").iloc[0].drop("Avg")
    assert len(scores) == 12
    of_scores = scores.where(scores.index != "MME-P", scores / 20).mean()
    assert of_scores == pytest.approx(52.48, abs=1e-2)  # the mean of the twelve would have been something else


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_every_avg_of_the_detailed_tables_follows_within_the_rounding_of_its_scores(name):
    assert printed.table(name).Avg.tolist() == pytest.approx(printed.means(name).Avg.tolist(), abs=0.1)


def test_the_entries_that_do_not_follow_are_these():
    """Two Avgs of Table a, of which one row is printed twice and only the second fits; in Table 1 two rows' grounding
    is swapped."""
    found = {tuple(entry[:3]): entry[5] for entry in printed.contradictions().itertuples(index=False)}
    assert found == {
        ("1", "LLaVA-v1.5 7B", "ocr"): True,
        ("1", "-LLM sinks", "general"): False,
        ("1", "-LLM sinks", "grounding"): False,
        ("1", "-LLM sinks", "Avg"): True,
        ("1", "-ViT sinks", "grounding"): False,
        ("1", "LLM sinks skip MLP-2", "grounding"): False,
        ("2", "LLaVA-v1.5 7B", "ocr"): True,
        ("a", "-LLM sinks", "Avg"): True,
        ("a", "LLM sinks skip MLP-1/2, MHA-2", "Avg"): True,
    }
    shown, due = printed.table("1").grounding, printed.means("a").grounding.round(1)
    assert (shown["-LLM sinks"], shown["-ViT sinks"]) == (due["-ViT sinks"], due["-LLM sinks"])


def test_the_gain_of_pruning_dead_tokens_is_in_one_family():
    change = printed.changes("b").loc["-dead"]
    assert change.grounding == pytest.approx(3.77, abs=0.01) and change.Avg == pytest.approx(1.0, abs=0.01)
    assert (change[["general", "ocr", "hallucination"]].abs() < 0.2).all()


def test_the_caption_of_table_c_says_the_opposite_of_its_numbers():
    change = printed.changes("c").grounding
    assert change["-vFFN"] < change["-vMHA"] < 0 and change["-vFFN"] == pytest.approx(-16.8, abs=0.05)
