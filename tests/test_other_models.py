"""Clusters and groups of models side by side: one row a picture, records compared by rules set before, gaps shown."""

import numpy as np
import pytest
import torch

from embedlens import EmbedLensError, claims, samples
from embedlens.chapters import other_models
from embedlens.chapters.other_models import GROUPS, PAPER, RANKS, anatomy, findings, numbers, study_of
from embedlens.claims import FAILS, HOLDS, PARTLY, UNDECIDED, UNTESTABLE
from embedlens.clusters import anchor_clusters, unit_vectors
from embedlens.vlm import QUESTION

SEVEN, THIRTEEN, *OTHERS = (named.repository for named in PAPER)


@pytest.fixture(scope="module")
def study(tiny):
    calibration, compared = samples.load(n=12)[:8], samples.load(n=12)[8:]
    return study_of(tiny, calibration, compared, seed=3)


def test_a_row_says_what_a_brute_force_count_says(tiny, study):
    picture = samples.load(n=1, seed=5)[0]
    (row,) = anatomy(tiny, [picture], **study.keywords)
    prompt = tiny.prompt(picture.image, QUESTION)
    tokens = prompt.embeds[prompt.visual]
    labels = anchor_clusters(tokens, 0.9)
    for rank in range(RANKS):
        assert row[f"share_{rank}"] == pytest.approx(float((labels == rank).float().mean()))
    first = unit_vectors(unit_vectors(tokens)[labels == 0].mean(0))
    best = [max(float(first @ center) for center in other.clusters) for other in study.keywords["partners"]]
    assert row["similarity_0"] == pytest.approx(np.mean(best), abs=1e-5)
    assert sum(row[name] for name in GROUPS) == pytest.approx(1)
    assert np.isnan(row["similarity_5"]) == (int(labels.max()) < 5)


def test_a_row_does_not_depend_on_its_batch(tiny, study):
    pictures = samples.load(n=5, seed=7)
    together = anatomy(tiny, pictures, **study.keywords)
    alone = [anatomy(tiny, [picture], **study.keywords)[0] for picture in pictures]
    for a, b in zip(together, alone, strict=True):
        assert a == pytest.approx(b, abs=1e-5, nan_ok=True)


def test_no_picture_is_measured_and_compared_with():
    measured, calibration, compared = other_models.pictures("miniworld", 6, 0)
    ids = [picture.id for part in (measured, calibration, compared) for picture in part]
    assert len(ids) == len(set(ids)) and len(measured) == 6 and compared and not calibration


def record(model, share, dead=0.3, lead=0.1, width=0.01, photographs=1.0):
    values = {name: 0.0 for name in ("similarity", "random", *GROUPS)}
    values |= {f"share_{rank}": 0.0 for rank in range(RANKS)} | {"share_0": share, "dead": dead, "lead": lead}
    spread = {f"{name}_low": value - width for name, value in values.items()}
    spread |= {f"{name}_high": value + width for name, value in values.items()}
    every = values | spread | {"photographs": photographs, "tokens": 576.0}
    return claims.Record(model, other_models.CHAPTER, 100, 0, "machine", {}, {}, every)


def judged(*found):
    return {name: entry.verdict for name, entry in findings({one.model: one for one in found}).items()}


def test_nothing_is_judged_of_models_that_were_not_run():
    assert judged(record("miniature", 0.35, photographs=0.0)) == {"E10": UNTESTABLE, "E11": UNTESTABLE}
    assert judged(record(SEVEN, 0.3))["E10"] == UNTESTABLE
    assert judged(record(SEVEN, 0.3), record(THIRTEEN, 0.3, photographs=0.0))["E10"] == UNTESTABLE


def test_a_quantised_model_is_shown_and_is_not_the_one_that_the_paper_names():
    packed, thirteen = record(f"{SEVEN}@4bit", 0.3), record(THIRTEEN, 0.3)
    assert judged(packed, thirteen)["E10"] == UNTESTABLE
    table = other_models.side_by_side({packed.model: packed})
    assert table.loc["LLaVA-1.5-7B", "kind"] == "not run here"
    assert table.loc["llava-1.5-7b-hf@4bit", "kind"] == "full scale"


@pytest.mark.parametrize(
    ("share", "dead", "width", "verdict"),
    [(0.31, 0.3, 0.01, HOLDS), (0.31, 0.3, 0.05, PARTLY), (0.31, 0.2, 0.01, FAILS), (0.5, 0.3, 0.01, FAILS)],
)
def test_nearly_identical_means_within_five_points_interval_included(share, dead, width, verdict):
    assert judged(record(SEVEN, 0.3), record(THIRTEEN, share, dead, width=width))["E10"] == verdict


def test_absent_means_small_or_no_more_alike_than_chance_in_all_three():
    none, chance, there = (0.05, 0.1), (0.3, -0.02), (0.3, 0.1)
    assert judged(*(record(name, *none[:1], lead=none[1]) for name in OTHERS))["E11"] == HOLDS
    assert judged(*(record(name, chance[0], lead=chance[1]) for name in OTHERS))["E11"] == HOLDS
    assert judged(*(record(name, there[0], lead=there[1]) for name in OTHERS))["E11"] == FAILS
    some = findings({OTHERS[0]: record(OTHERS[0], 0.05)})["E11"]
    assert some.verdict == PARTLY and "not run: InternVL3-8B, Qwen3-VL-8B" in some.note


def test_few_pictures_are_no_sign_that_a_cluster_is_absent():
    """Share and lead as eight pictures of one model gave them: the lead straddles chance."""
    few = (record(name, 0.3, lead=0.18, width=0.2) for name in OTHERS)
    assert judged(*few)["E11"] == UNDECIDED


def test_every_model_has_its_row_and_what_was_not_run_its_command():
    found = {"miniature": record("miniature", 0.35, photographs=0.0), SEVEN: record(SEVEN, 0.3)}
    table = other_models.side_by_side(found)
    assert table.index.tolist() == [named.name for named in PAPER] + ["miniature"]
    assert table.loc["LLaVA-1.5-13B", "kind"] == "not run here" and table.loc["miniature", "kind"] == "miniature"
    assert table.loc["LLaVA-1.5-7B", "pictures"] == "100 photographs"
    commands = other_models.missing(found)
    assert len(commands) == 4 and all("embedlens run other_models --model" in line for line in commands)
    assert not any("nan" in str(cell) for cell in table.to_numpy().ravel())


def test_a_folder_called_as_the_repository_counts_as_the_model():
    seven, thirteen = (record(f"/data/{name.rpartition('/')[2]}", 0.3) for name in (SEVEN, THIRTEEN))
    assert judged(seven, thirteen)["E10"] == HOLDS
    assert other_models.side_by_side({seven.model: seven}).loc["LLaVA-1.5-7B", "pictures"] == "100 photographs"


def test_pictures_of_another_family_with_unequal_token_counts_are_measured(tmp_path):
    from twins import save_twin

    import embedlens as el

    model = el.load(save_twin(tmp_path / "qwen", "Qwen/Qwen2.5-VL-7B-Instruct"), device="cpu")
    table = other_models.measure(model, "miniworld", 4)
    assert table["tokens"].nunique() > 1
    assert numbers(table, False)["share_0"] > 0


def test_figures_are_drawn_for_one_model_and_for_several():
    for found in ([record("miniature", 0.35)], [record(SEVEN, 0.3), record(OTHERS[0], 0.05, dead=0.0)]):
        by_model = {one.model: one for one in found}
        figure = other_models.clusters_figure(by_model)
        assert len(figure.axes) == len(found)
        signed = other_models.groups_figure(by_model).get_supxlabel().splitlines()
        assert len(signed) == len(found)
        assert all(claims.kind_of_result(one.model) in line for one, line in zip(found, signed, strict=True))
    with pytest.raises(EmbedLensError, match="run embedlens run other_models first"):
        other_models.groups_figure({})


def test_the_record_is_written_with_the_claims_judged_on_all_records(tmp_path, tiny, study):
    import pandas as pd

    table = pd.DataFrame(anatomy(tiny, samples.load(n=4, seed=1), **study.keywords))
    file = other_models.write(tmp_path, "tiny", "miniworld", table)
    found = other_models.records(tmp_path)
    assert file.is_file() and found["tiny"].claims["E11"].verdict == UNTESTABLE
    low, value, high = (found["tiny"].numbers[f"share_0{end}"] for end in ("_low", "", "_high"))
    assert low <= value <= high and value == pytest.approx(table["share_0"].mean(), abs=1e-4)
    assert numbers(table, False)["photographs"] == 0
    assert set(other_models.told(found, "tiny")) >= {"c0", "not_run_list", "run_list"}
    assert torch.isfinite(torch.tensor(list(found["tiny"].numbers.values()))).all()
