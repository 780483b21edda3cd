"""Records of what a chapter found: written as the design says, read back, refused when wrong."""

import errno
import json
import os
from pathlib import Path

import book_build as book
import numpy as np
import pandas as pd
import pytest

from embedlens import claims, records
from embedlens.errors import EmbedLensError
from embedlens.stats import Estimate

ROOT = Path(__file__).parents[1]
FOUND = claims.Finding(0.123456, 0.1, 0.2, n=50, verdict="holds", note="It was measured.")


def record(folder, **changes):
    settings = {"model": "miniature", "chapter": "02_test", "n_images": 50, "seed": 0, "claims": {"E13": FOUND}}
    settings |= {"numbers": {"share": np.float64(0.98765432), "n": np.int64(3)}}
    return records.write(folder, **(settings | changes))


def test_a_record_has_the_fixed_fields_and_comes_back(tmp_path):
    file = record(tmp_path)
    assert file == tmp_path / "miniature" / "02_test.json"
    content = json.loads(file.read_text())
    about = ["model", "chapter", "n_images", "seed", "parameters", "machine", "versions"]
    assert list(content) == [*about, "claims", "numbers"]
    found = {"value": 0.1235, "low": 0.1, "high": 0.2, "n": 50, "verdict": "holds", "note": "It was measured."}
    assert content["claims"]["E13"] == found | {"rule": "", "text": ""}
    assert content["numbers"] == {"n": 3, "share": 0.9877}
    again = records.read(file)
    assert again.claims["E13"].value == 0.1235 and again.versions["torch"]
    text = file.read_text()
    assert record(tmp_path / "again").read_text() == text  # the same from run to run
    assert os.uname().nodename not in text and str(tmp_path) not in text


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda c: c.pop("seed"), "does not have the fields"),
        (lambda c: c["claims"].update(E0=c["claims"]["E13"]), "E0, which claims.csv does not list"),
        (lambda c: c["claims"]["E13"].update(verdict="maybe"), "unknown verdict"),
        (lambda c: c["claims"]["E13"].pop("n"), "other fields"),
        (lambda c: c["numbers"].update(share=float("nan")), "'share' is nan"),
    ],
)
def test_a_damaged_record_is_refused_and_none_is_written(tmp_path, damage, says):
    with pytest.raises(EmbedLensError, match="run the chapter first"):
        records.read(tmp_path / "miniature" / "02_test.json")
    with pytest.raises(EmbedLensError, match="'share' is nan"):
        record(tmp_path, numbers={"share": float("nan")})
    assert not list(tmp_path.rglob("*.json"))
    file = record(tmp_path)
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    with pytest.raises(EmbedLensError, match=says):
        records.read(file)


def test_a_record_of_other_parameters_is_written_beside_the_one_that_is_there(tmp_path, capsys):
    main = record(tmp_path, dataset="miniworld")
    before = main.read_text()
    assert record(tmp_path, dataset="miniworld") == main and not capsys.readouterr().out
    fewer = record(tmp_path, n_images=20, dataset="miniworld", numbers={"share": 0.5})
    assert fewer.name == "02_test.n_images=20.json" and records.read(fewer).n_images == 20
    assert capsys.readouterr().out.strip() == (
        "02_test.json is of other parameters and stays: this run's record is 02_test.n_images=20.json, beside it"
    )
    photographs = record(tmp_path, seed=1, dataset="coco:/data/coco/val2017", claims={"E14": FOUND})
    assert photographs.name == "02_test.dataset=coco-val2017,seed=1.json"
    assert "/data" not in photographs.read_text()
    assert main.read_text() == before and len(list(tmp_path.rglob("*.*"))) == 3
    assert records.main_records(tmp_path) == [main]
    table = claims.overview(tmp_path)  # the verdict page reads the main record alone
    assert (table.verdict != claims.UNMEASURED).sum() == 1
    main.unlink()
    record(tmp_path, seed=1)  # nor is one beside it replaced by one of other parameters
    other = record(tmp_path, n_images=20, seed=1)
    assert other.name == "02_test.n_images=20,seed=1.json" and records.read(fewer).seed == 0
    assert record(tmp_path, n_images=20, seed=1) == other


def test_a_full_disk_leaves_the_record_that_is_there(tmp_path, monkeypatch):
    main = record(tmp_path)
    before = main.read_text()

    def fills_up(path, text, **how):
        path.write_bytes(text.encode()[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fills_up)
    with pytest.raises(EmbedLensError, match=r"cannot write .*02_test.json \(No space left on device\): free space"):
        record(tmp_path, numbers={})
    assert main.read_text() == before


def test_records_go_to_the_checkouts_own_results_from_whichever_folder_or_stay_here(tmp_path, monkeypatch):
    home, away = tmp_path / "checkout", tmp_path / "away"
    for folder in (home / "src" / "embedlens", home / "notebooks", home / "book" / "_static", away):
        folder.mkdir(parents=True)
    monkeypatch.chdir(away)
    monkeypatch.setattr(records, "__file__", str(home / "src" / "embedlens" / "records.py"))
    assert records.results() == Path("results")  # installed, as on Colab
    for name in ("_toc.yml", "_config.yml"):
        (home / name).touch()
    assert records.results() == home / "results"  # installed editable
    monkeypatch.setattr(records, "__file__", str(tmp_path / "site-packages" / "embedlens" / "records.py"))
    for inside in (home, home / "notebooks", home / "book" / "_static"):
        monkeypatch.chdir(inside)
        assert records.results() == records.results("") == home / "results"
        assert record("") == home / "results" / "miniature" / "02_test.json"
        assert records.results("elsewhere") == Path("elsewhere")


RECORDED = [file for file in records.main_records(ROOT / "results") if file.parent.name == "miniature"]


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_a_chapter_records_every_parameter_that_its_numbers_depend_on(file):
    elsewhere = {"model", "dtype", "quantize", "n_images", "seed", "device", "out", "results"}  # told elsewhere
    declared = set(book.declared_parameters(ROOT / "notebooks" / f"{file.stem}.ipynb")) - elsewhere
    assert set(records.read(file).parameters) == declared


def test_a_chapter_judges_each_claim_once_and_keeps_rule_and_unit_in_its_record(tmp_path, monkeypatch):
    glued = {}
    monkeypatch.setattr("embedlens.book.glue", glued.__setitem__)
    chapter = claims.Chapter("05_test", "miniature", 50, 0)
    found = Estimate(0.02, 0.01, 0.03, 50)
    card = chapter.judge("E40", "rise > 0", shown=found, unit="+.1f points", of="more", rise=found)
    assert glued["e40_verdict"] == "holds" and glued["e40"] == "+2.0 points (1.0 to 3.0)"
    assert "rise > 0" in card._repr_markdown_() and "n = 50 pictures" in repr(card)
    untested = claims.Finding(None, None, None, 0, "not testable here", "It has no sinks.")
    table = claims.verdict_table({"E14": FOUND, "E13": untested})
    assert table.index.tolist() == ["E13", "E14"] and table.loc["E13", "here"] == "–"
    assert table.loc["E14", ["here", "n", "verdict"]].tolist() == ["0.123 (0.100 to 0.200)", 50, "holds"]
    with pytest.raises(EmbedLensError, match="judged before"):
        chapter.judge("E40", "rise > 0", shown=found, rise=found)
    with pytest.raises(EmbedLensError, match="not in claims.csv"):
        chapter.judge("E99", "rise > 0", shown=found, rise=found)
    chapter.record(rise=found, by_layer=pd.Series([0.5, 0.25], index=[0, 2]))
    chapter.sign_off(tmp_path)
    record = records.read(tmp_path / "miniature" / "05_test.json")
    assert (record.claims["E40"].rule, record.claims["E40"].here) == ("rise > 0", "+2.0 points (1.0 to 3.0)")
    assert record.numbers == {"rise": 0.02, "by_layer_0": 0.5, "by_layer_2": 0.25}


def test_the_overview_has_every_claim_judged_or_not(tmp_path):
    record(tmp_path)
    record(tmp_path, chapter="03_other", model="org/other", claims={"E13": FOUND, "E14": FOUND})
    table = claims.overview(tmp_path)
    assert set(table.claim) == set(claims.claims())
    judged = table[table.claim == "E13"]
    assert judged.model.tolist() == ["miniature", "org/other"] and set(judged.here) == {"0.123 (0.100 to 0.200)"}
    assert table[table.claim == "E15"].verdict.tolist() == [claims.UNMEASURED]
    assert (claims.overview(tmp_path / "none").verdict == claims.UNMEASURED).all()
    record(tmp_path, chapter="03_other", claims={"E13": FOUND})
    with pytest.raises(EmbedLensError, match="02_test.json and 03_other.json both judge E13 on miniature"):
        claims.overview(tmp_path)
