"""Promises of the codebook: planted redundancy is found and nothing else, it is stored with its origin, it selects."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from embedlens.codebook import (
    COLUMNS,
    Codebook,
    Recipe,
    Thresholds,
    build,
    keep_lowest,
    quantile_thresholds,
)
from embedlens.errors import EmbedLensError
from embedlens.redundancy import TokenScores

MODEL = SimpleNamespace(name="made up", width=16)
THRESHOLDS = Thresholds(0.1, 2e-3)


def scores(low: torch.Tensor, n: int) -> TokenScores:
    """Low confidence and low divergence where asked."""
    probability = torch.where(low, 0.05, 0.5)
    region = torch.where(low, 1e-4, 1e-2)[:, None].expand(n, 2)
    return TokenScores(
        torch.arange(n),
        torch.zeros(n, dtype=torch.long),
        probability,
        region,
        region,
        (1.0, 16.0),
    )


def planted(pictures: int = 20, n: int = 24, seed: int = 0):
    """Three redundant tokens a picture along two directions shared by all pictures, one that is rare over pictures,
    and content; some content lies along a third shared direction but matters, so that it must not be found."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    tokens, found, where = [], [], []
    for _ in range(pictures):
        own = torch.randn(n, 16, generator=generator)
        low = torch.zeros(n, dtype=torch.bool)
        for place, direction in ((2, 0), (9, 1), (17, 0)):
            own[place] = 8 * shared[direction] + 0.1 * torch.randn(16, generator=generator)
            low[place] = True
        own[20] = 6 * torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
        low[20] = True  # redundant, but nothing recurs
        own[22] = 8 * shared[2]  # recurs, but matters
        tokens.append(own)
        found.append(scores(low, n))
        where.append({2, 9, 17})
    return tokens, found, where, shared


RECIPE = Recipe(picture_clusters=8, most_in_picture=24, clusters=8, more_pictures=10)


def test_planted_directions_are_found_and_only_they():
    tokens, found, where, shared = planted()
    book, stages = build(MODEL, tokens, found, list(range(20)), THRESHOLDS, RECIPE)
    assert {(int(i), int(p)) for i, p in zip(book.image_ids, book.patches, strict=True)} == {
        (i, p) for i, places in enumerate(where) for p in places
    }
    unit = torch.nn.functional.normalize(book.prototypes, dim=-1)
    assert float((unit @ shared[:2].T).amax(-1).min()) > 0.95
    assert (stages.scored, stages.candidates, stages.rare, stages.codebook) == (480, 80, 80, 60)
    # a token along a planted direction is redundant, one that matters is not
    assert float(book.redundancy(shared[0])) > 0.95 > 0.5 > float(book.redundancy(shared[2]))


def test_a_large_cluster_of_its_own_picture_is_not_rare():
    tokens, found, _, _ = planted()
    with pytest.raises(EmbedLensError, match="most_in_picture = 0: raise it"):
        build(MODEL, tokens, found, list(range(20)), THRESHOLDS, Recipe(most_in_picture=0, more_pictures=10))


def test_thresholds_are_strict_and_recurrence_counts_different_pictures():
    tokens, found, _, _ = planted()
    with pytest.raises(EmbedLensError, match="no token is below both"):
        build(MODEL, tokens, found, list(range(20)), Thresholds(0.05, 1.0), RECIPE)  # p is exactly 0.05
    same = [0] * 20  # twenty times the same picture spans one
    with pytest.raises(EmbedLensError, match="spans more than 10 pictures: lower"):
        build(MODEL, tokens, found, same, THRESHOLDS, RECIPE)
    share = Recipe(most_in_picture=24, clusters=8, more_pictures=0.5)
    assert len(build(MODEL, tokens, found, list(range(20)), THRESHOLDS, share)[0]) == 60


def test_the_same_pictures_give_the_same_codebook():
    tokens, found, _, _ = planted()
    one, two = (build(MODEL, tokens, found, list(range(20)), THRESHOLDS, RECIPE)[0] for _ in range(2))
    assert torch.equal(one.prototypes, two.prototypes) and torch.equal(one.clusters, two.clusters)


def test_quantile_thresholds_are_below_what_they_say():
    _, found, _, _ = planted()
    limits = quantile_thresholds(found, 0.2, 0.3)
    p = torch.cat([score.probability for score in found])
    assert float((p <= limits.probability).float().mean()) >= 0.2
    with pytest.raises(EmbedLensError, match="shares above 0"):
        quantile_thresholds(found, 0, 0.3)


# --- storing ---------------------------------------------------------------------------------------------------------


def small(n: int = 4, model: str = "made up", seed: int = 0) -> Codebook:
    rows = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)).half().float()
    numbers = {name: torch.arange(n).float() / 10 for name in COLUMNS[2:5]}
    return Codebook(
        rows, torch.arange(n) + 10 * seed, torch.arange(n), *numbers.values(), torch.zeros(n, dtype=torch.long), model,
        {"pictures": "4"},
    )  # fmt: skip


def test_what_is_written_is_read_with_its_origin(tmp_path):
    small().write(tmp_path / "book.safetensors")
    found = Codebook.read(tmp_path / "book.safetensors", MODEL)
    assert found.model == "made up" and found.provenance == {"pictures": "4"}
    for name in ("prototypes", *COLUMNS):
        assert_close(getattr(found, name), getattr(small(), name))


def test_a_foreign_codebook_is_refused(tmp_path):
    small(model="other").write(tmp_path / "book.safetensors")
    with pytest.raises(EmbedLensError, match=r"is of other \(width 16\), not of made up \(width 16\): build one"):
        Codebook.read(tmp_path / "book.safetensors", MODEL)
    with pytest.raises(EmbedLensError, match=r"of made up \(width 16\), not of made up \(width 8\): build"):
        small().check(SimpleNamespace(name="made up", width=8))
    with pytest.raises(EmbedLensError, match="tokens of width 8, a codebook of width 16"):
        small().redundancy(torch.zeros(3, 8))
    with pytest.raises(EmbedLensError, match="extend one with another of the same model"):
        small().extend(small(model="other"))


def test_files_that_are_no_codebook_are_refused_with_a_sentence(tmp_path):
    with pytest.raises(EmbedLensError, match="no codebook at"):
        Codebook.read(tmp_path / "none")
    (tmp_path / "text").write_text("not tensors at all")
    with pytest.raises(EmbedLensError, match="no safetensors file"):
        Codebook.read(tmp_path / "text")
    with pytest.raises(EmbedLensError, match="codebook is empty"):
        small(0)


def test_a_released_codebook_is_read_without_running_it(tmp_path):
    torch.save(small().prototypes.half(), tmp_path / "book.pt")
    (tmp_path / "ids.json").write_text(json.dumps(["000000000139", "000000000139", "285", "632"]))
    found = Codebook.read_released(tmp_path / "book.pt", tmp_path / "ids.json", "llava")
    assert found.image_ids.tolist() == [139, 139, 285, 632] and found.prototypes.dtype == torch.float32
    torch.save(SimpleNamespace(rows=small().prototypes), tmp_path / "code.pt")  # a pickle of anything else
    with pytest.raises(EmbedLensError, match="cannot be read as a matrix"):
        Codebook.read_released(tmp_path / "code.pt", tmp_path / "ids.json", "llava")
    with pytest.raises(EmbedLensError, match="pass a matrix"):
        Codebook.read_released(tmp_path / "book.pt", ["1"], "llava")


def test_extending_adds_rows_and_can_ask_for_recurrence_again():
    both = small().extend(small(seed=1))
    assert len(both) == 8 and torch.equal(both.prototypes[4:], small(seed=1).prototypes)
    assert set(both.clusters.tolist()) == {0, 1} and "extended_with" in both.provenance
    tokens = torch.randn(20, 16)
    assert bool((both.redundancy(tokens) >= small().redundancy(tokens) - 1e-6).all())


# --- selecting -------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_the_lowest_stay_and_ties_go_to_the_lower_place(values, data):
    budget = data.draw(st.integers(1, len(values)))
    keep = keep_lowest(torch.tensor(values).float(), budget)
    expected = sorted(sorted(range(len(values)), key=lambda i: (values[i], i))[:budget])
    assert keep.nonzero()[:, 0].tolist() == expected


def test_redundancy_is_the_largest_cosine_and_a_zero_row_has_none():
    book, tokens = small(), torch.cat([torch.randn(6, 16), torch.zeros(1, 16)])
    expected = [max(float(torch.cosine_similarity(t, c, dim=0)) for c in book.prototypes) for t in tokens]
    assert_close(book.redundancy(tokens), torch.tensor(expected), atol=1e-5, rtol=1e-4)
    assert float(book.redundancy(tokens)[-1]) == 0


def test_the_double_softmax_is_the_released_one():
    book, tokens = small(), torch.randn(6, 16)
    cosines = book.cosines(tokens)
    over_tokens, over_prototypes = torch.softmax(cosines, 0), torch.softmax(cosines, 1)
    expected = [max(float(over_tokens[i, j] * over_prototypes[i, j]) for j in range(4)) for i in range(6)]
    assert_close(book.double_softmax(tokens), torch.tensor(expected), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("budget", [0, -1, 5])
def test_a_budget_outside_the_picture_is_refused(budget):
    with pytest.raises(EmbedLensError, match=f"budget is {budget} of 4 visual tokens: keep at least 1 and at most 4"):
        keep_lowest(torch.zeros(4), budget)


def test_other_wrong_input():
    with pytest.raises(EmbedLensError, match="a count, or a share"):
        Recipe(more_pictures=1.5)
    with pytest.raises(EmbedLensError, match="one each"):
        build(MODEL, [], [], [], THRESHOLDS)
