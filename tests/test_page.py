"""A chapter's page: what it says first, what it hands to the prose, what it leaves behind."""

from __future__ import annotations

import numpy as np
import pytest

from embedlens import claims
from embedlens.chapters import page
from embedlens.claims import Finding
from embedlens.intervals import Interval


def interval(value, low, high):
    return Interval(np.array(value), np.array(low), np.array(high))


def test_every_claim_of_a_chapter_has_its_verdict_among_the_glued_values():
    findings = {"E13": Finding(0.2, 0.1, 0.3, 9, "holds", "It leads."), "E14": Finding.of(None, 9, "holds", "None.")}
    said = page.verdicts(findings, "miniature")
    assert (said["e13_verdict"], said["e14_verdict"]) == (claims.HOLDS, claims.UNTESTABLE)
    assert said["agreement"] == claims.agreement(findings, "miniature")
    assert (said["model_name"], said["kind"]) == ("the shipped miniature", "miniature")
    assert page.verdicts(findings, "owner/big")["model_name"] == "owner/big"


def test_an_interval_is_glued_as_three_values_and_a_hole_is_refused(monkeypatch):
    handed = {}
    monkeypatch.setattr(page, "glue", lambda name, value: handed.update({name: float(value)}))
    page.glue_all({"rise": interval(0.5, 0.25, 0.75)}, {"n": 3})
    assert handed == {"rise": 0.5, "rise_low": 0.25, "rise_high": 0.75, "n": 3.0}
    monkeypatch.undo()
    with pytest.raises(ValueError, match="not a finite number"):
        page.glue_all({"rise": interval(np.nan, 0.25, 0.75)})


def test_a_table_has_one_row_per_layer_and_its_own_decimals():
    found = Interval(np.array([0.12345, 0.5]), np.array([0.0, 0.25]), np.array([0.25, 0.75]))
    table = page.table({"a": found, "b": found}, range(2), "layer", {"b": 3})
    assert table.loc[0].tolist() == ["0.12 (0.00 to 0.25)", "0.123 (0.000 to 0.250)"]
    assert table.index.name == "layer"


def test_signing_off_writes_the_record_that_the_verdict_page_reads(tmp_path):
    findings = {"E13": Finding(0.2, 0.1, 0.3, 9, "holds", "It leads.")}
    table = page.sign_off(tmp_path, "miniature", "02_embedlens_vs_logitlens", 9, 0, findings, {"recall": 0.5})
    record = claims.read(tmp_path / "miniature" / "02_embedlens_vs_logitlens.json")
    assert record.claims == findings and record.numbers == {"recall": 0.5}
    assert table.loc["E13", "verdict"] == "holds"


def test_what_cannot_be_tested_keeps_no_number():
    kept = Finding.of(interval(0.5, 0.25, 0.75), 4, claims.PARTLY, "Half.")
    assert (kept.value, kept.low, kept.high) == (0.5, 0.25, 0.75)
    dropped = Finding.of(interval(0.5, 0.25, 0.75), 4, claims.UNTESTABLE, "Half.")
    assert (dropped.value, dropped.low, dropped.high) == (None, None, None)


@pytest.mark.parametrize("met", [(True, True, True), (True, False, True), (False, True, False), (False, False)])
def test_a_claim_of_several_conditions_holds_with_all_and_fails_with_none(met):
    wanted = {len(met): claims.HOLDS, 0: claims.FAILS}.get(sum(met), claims.PARTLY)
    assert claims.counted(met) == wanted
