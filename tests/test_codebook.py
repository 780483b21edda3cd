"""Promises of the codebook: planted redundancy is found and nothing else, it is stored with its origin, it selects."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from embedlens.codebook import COLUMNS, Codebook, Recipe, Thresholds, build
from embedlens.errors import EmbedLensError
from embedlens.redundancy import TokenScores

MODEL = SimpleNamespace(name="made up", width=16)
THRESHOLDS = Thresholds(0.1, 2e-3)


def scores(low: torch.Tensor, n: int) -> TokenScores:
    """Low confidence and low divergence where asked."""
    region = torch.where(low, 1e-4, 1e-2)[:, None].expand(n, 2)
    ids = torch.arange(n)
    return TokenScores(ids, 0 * ids, torch.where(low, 0.05, 0.5), region, region, (1.0, 16.0))


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
    again = build(MODEL, tokens, found, list(range(20)), THRESHOLDS, RECIPE)[0]
    assert torch.equal(book.prototypes, again.prototypes) and torch.equal(book.clusters, again.clusters)


def test_thresholds_are_strict_and_recurrence_counts_different_pictures():
    tokens, found, _, _ = planted()
    every = list(range(20))
    with pytest.raises(EmbedLensError, match="no token is below both"):
        build(MODEL, tokens, found, every, Thresholds(0.05, 1.0), RECIPE)  # p is exactly 0.05
    with pytest.raises(EmbedLensError, match="spans more than 10 pictures: lower"):
        build(MODEL, tokens, found, [0] * 20, THRESHOLDS, RECIPE)  # twenty times the same picture spans one
    with pytest.raises(EmbedLensError, match="most_in_picture = 0: raise it"):
        build(MODEL, tokens, found, every, THRESHOLDS, Recipe(most_in_picture=0, more_pictures=10))
    share = Recipe(most_in_picture=24, clusters=8, more_pictures=0.5)
    assert len(build(MODEL, tokens, found, every, THRESHOLDS, share)[0]) == 60


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


def test_a_foreign_codebook_and_a_file_that_is_none_are_refused(tmp_path):
    small(model="other").write(tmp_path / "book.safetensors")
    (tmp_path / "text").write_text("not tensors at all")
    for file, sentence in (
        ("book.safetensors", r"is of other \(width 16\), not of made up \(width 16\): build one"),
        ("text", "no safetensors file"),
        ("none", "no codebook at"),
    ):
        with pytest.raises(EmbedLensError, match=sentence):
            Codebook.read(tmp_path / file, MODEL)
    with pytest.raises(EmbedLensError, match=r"of made up \(width 16\), not of made up \(width 8\): build"):
        small().check(SimpleNamespace(name="made up", width=8))
    with pytest.raises(EmbedLensError, match="extend one with another of the same model"):
        small().extend(small(model="other"))
    with pytest.raises(EmbedLensError, match="codebook is empty"):
        small(0)


def test_extending_adds_rows():
    both = small().extend(small(seed=1))
    assert len(both) == 8 and torch.equal(both.prototypes[4:], small(seed=1).prototypes)
    assert set(both.clusters.tolist()) == {0, 1} and "extended_with" in both.provenance
    tokens = torch.randn(20, 16)
    assert bool((both.redundancy(tokens) >= small().redundancy(tokens) - 1e-6).all())


def test_redundancy_is_the_largest_cosine_and_a_zero_row_has_none():
    book, tokens = small(), torch.cat([torch.randn(6, 16), torch.zeros(1, 16)])
    expected = [max(float(torch.cosine_similarity(t, c, dim=0)) for c in book.prototypes) for t in tokens]
    assert_close(book.redundancy(tokens), torch.tensor(expected), atol=1e-5, rtol=1e-4)
    assert float(book.redundancy(tokens)[-1]) == 0
    cosines = book.cosines(tokens)  # as released: softmax over tokens times softmax over prototypes
    released = (torch.softmax(cosines, 0) * torch.softmax(cosines, 1)).amax(1)
    assert_close(book.double_softmax(tokens), released, atol=1e-6, rtol=1e-4)
