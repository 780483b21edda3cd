"""What the paper prints of its tables of answers follows from itself, but for what is listed here (E59)."""

from __future__ import annotations

import pytest

from embedlens import EmbedLensError, printed

TABLES = {"a": printed.TABLE_A, "b": printed.TABLE_B, "c": printed.TABLE_C}


def by_name(rows):
    return {row.name: row for row in rows}


def test_the_baseline_follows_the_described_arithmetic():
    """E59: 58.7/36.9/54.0/61.1 -> 52.7. The OCR mean is 36.97: the paper has cut it, not rounded."""
    means = printed.family_means(printed.BASELINE.scores)
    assert means == pytest.approx((58.7125, 36.9667, 53.9667, 61.05), abs=1e-4)
    assert printed.average(printed.BASELINE.scores) == pytest.approx(52.674, abs=1e-3)
    of_scores = sum(v / 20 if i == printed.MME else v for i, v in enumerate(printed.BASELINE.scores)) / 12
    assert of_scores == pytest.approx(52.48, abs=1e-2)  # the mean of the twelve would have been something else


@pytest.mark.parametrize("label", TABLES)
def test_every_avg_of_the_detailed_tables_follows_within_the_rounding_of_its_scores(label):
    for row in TABLES[label]:
        assert len(row.scores) == 12
        assert row.avg == pytest.approx(printed.average(row.scores), abs=0.1)


def test_two_avgs_of_table_a_are_not_the_rounded_means():
    """One row is printed twice, and only the second of its two Avgs fits."""
    found = [(entry.row, entry.printed) for entry in printed.contradictory_averages()]
    assert found == [("-LLM sinks", 52.7), ("LLM sinks skip MLP-1/2, MHA-2", 52.8)]


def test_the_entries_of_tables_1_and_2_that_do_not_follow_are_these():
    found = {(c.table, c.row, c.column): c.rounding for c in printed.contradictions()}
    assert found == {
        ("1", "LLaVA-v1.5 7B", "ocr"): True,
        ("1", "-LLM sinks", "general"): False,
        ("1", "-LLM sinks", "grounding"): False,
        ("1", "-LLM sinks", "Avg"): True,
        ("1", "-ViT sinks", "grounding"): False,
        ("1", "LLM sinks skip MLP-2", "grounding"): False,
        ("2", "LLaVA-v1.5 7B", "ocr"): True,
    }


def test_table_1_has_the_grounding_of_two_rows_swapped():
    rows, summaries = by_name(printed.TABLE_A), by_name(printed.TABLE_1)
    for name, other in (("-LLM sinks", "-ViT sinks"), ("-ViT sinks", "-LLM sinks")):
        shown = summaries[name].families[2]
        assert round(printed.family_means(rows[other].scores)[2], 1) == shown
        assert round(printed.family_means(rows[name].scores)[2], 1) != shown


def test_the_gain_of_pruning_dead_tokens_is_in_one_family():
    change = printed.changes(printed.TABLE_B)["-dead"]
    assert change["grounding"] == pytest.approx(3.77, abs=0.01)
    assert all(abs(change[family]) < 0.2 for family in ("general", "ocr", "hallucination"))
    assert change["Avg"] == pytest.approx(1.0, abs=0.01)


def test_the_caption_of_table_c_says_the_opposite_of_its_numbers():
    change = printed.changes(printed.TABLE_C)
    assert change["-vFFN"]["grounding"] < change["-vMHA"]["grounding"] < 0
    assert change["-vFFN"]["grounding"] == pytest.approx(-16.8, abs=0.05)


def test_a_row_of_another_length_is_refused():
    with pytest.raises(EmbedLensError, match="11 scores: pass the twelve"):
        printed.family_means(range(11))
