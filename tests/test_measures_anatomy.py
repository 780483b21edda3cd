"""Clusters and groups of one model: one row a picture, which needs no other row."""

import numpy as np
import pytest

import embedlens as el
from embedlens import samples
from embedlens.clusters import anchor_clusters, unit_vectors
from embedlens.measures import anatomy
from embedlens.measures.anatomy import GROUPS, RANKS, study_of
from embedlens.vlm import QUESTION


@pytest.fixture(scope="module")
def study(tiny):
    calibration, compared = samples.load(n=12)[:8], samples.load(n=12)[8:]
    return study_of(tiny, calibration, compared, seed=3)


def test_a_row_says_what_a_brute_force_count_says(tiny, study):
    picture = samples.load(n=1, seed=5)[0]
    (row,) = study(tiny, [picture])
    prompt = tiny.prompt(picture.image, QUESTION)
    tokens = prompt.embeds[prompt.visual]
    labels = anchor_clusters(tokens, 0.9)
    for rank in range(RANKS):
        assert row[f"share_{rank}"] == pytest.approx(float((labels == rank).float().mean()))
    first = unit_vectors(unit_vectors(tokens)[labels == 0].mean(0))
    best = [max(float(first @ center) for center in clusters) for _, clusters, _ in study.keywords["partners"]]
    assert row["similarity_0"] == pytest.approx(np.mean(best), abs=1e-5)
    assert sum(row[name] for name in GROUPS) == pytest.approx(1)
    assert np.isnan(row["similarity_5"]) == (int(labels.max()) < 5)


def test_a_row_does_not_depend_on_its_batch(tiny, study):
    pictures = samples.load(n=5, seed=7)
    together = study(tiny, pictures)
    alone = [study(tiny, [picture])[0] for picture in pictures]
    for a, b in zip(together, alone, strict=True):
        assert a == pytest.approx(b, abs=1e-5, nan_ok=True)


def test_no_picture_is_measured_and_compared_with():
    measured, calibration, compared = anatomy.pictures("miniworld", 6, 0)
    ids = [picture.id for part in (measured, calibration, compared) for picture in part]
    assert len(ids) == len(set(ids)) and len(measured) == 6 and compared and not calibration


def test_pictures_of_another_family_with_unequal_token_counts_are_measured(tmp_path):
    from twins import save_twin

    model = el.load(save_twin(tmp_path / "qwen", "Qwen/Qwen2.5-VL-7B-Instruct"), device="cpu")
    measured, calibration, compared = anatomy.pictures("miniworld", 4, 0)
    table = el.run(study_of(model, calibration, compared), model, measured, batch_size="auto")
    found = anatomy.numbers(table, photographs=False)
    assert table["tokens"].nunique() > 1 and found["photographs"] == 0
    assert 0 < found["share_0_low"] <= found["share_0"] <= found["share_0_high"]
