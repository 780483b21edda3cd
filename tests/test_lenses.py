"""Promises of the lenses: exact rankings, ties by lowest id, the model's own logits at the last layer."""

from __future__ import annotations

import pytest
import torch
from stock import QUESTION, picture

from embedlens import EmbedLens, EmbedLensError, LogitLens, lenses


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    lengths = float(a.norm() * b.norm())
    return round(float(torch.dot(a, b)) / lengths, 12) if lengths else 0.0


def brute_force(h: torch.Tensor, embeddings: torch.Tensor, k: int) -> list[list[int]]:
    """Cosine in float64, one pair at a time, sorted by (-cosine, id). A zero row, as that of <pad>, has cosine 0."""
    rankings = []
    for vector in h.double():
        cosines = [cosine(vector, row) for row in embeddings.double()]
        rankings.append(sorted(range(len(cosines)), key=lambda index: (-cosines[index], index))[:k])
    return rankings


@pytest.fixture
def many():
    """300 tokens, 40 vectors, width 16."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(300, 16, generator=generator), torch.randn(40, 16, generator=generator) * 30


def named(n: int) -> list[str]:
    return [f"t{index}" for index in range(n)]


@pytest.mark.parametrize("k", [1, 5, 300])
def test_embedlens_is_the_brute_force_cosine_ranking(many, k):
    embeddings, h = many
    values, ids = EmbedLens(embeddings, named(300)).topk(h, k)
    assert ids.tolist() == brute_force(h, embeddings, k)
    expected = torch.cosine_similarity(h[:, None], embeddings[None], dim=-1).gather(1, ids)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)  # same sums, other order
    assert values.min() >= -1 - 1e-5 and values.max() <= 1 + 1e-5


def test_ties_go_to_the_lowest_id(many):
    """Equal rows, and rows of equal direction (powers of two scale exactly), wherever they stand."""
    embeddings, h = many
    embeddings[[7, 150, 299]] = embeddings[3].clone()
    embeddings[[33, 200]] = embeddings[64] * 4
    embeddings[65:90] = embeddings[64].clone()  # more ties than k
    h[0], h[1], h[2] = embeddings[3] * 5, embeddings[64] * 0.5, -embeddings[64]
    values, ids = EmbedLens(embeddings, named(300)).topk(h, 6)
    assert ids[0, :4].tolist() == [3, 7, 150, 299] and values[0, 0] == values[0, 3]
    assert ids[1].tolist() == [33, 64, 65, 66, 67, 68]
    assert ids.tolist() == brute_force(h, embeddings, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("like", ["noise", "words", "alike"])
def test_a_search_in_the_tables_format_gives_the_ranking_of_exact_cosines(dtype, like):
    """Thousands of near ties: what a bound misses, or a matrix product rounds apart, would be in another place."""
    generator = torch.Generator().manual_seed(1)
    table, h = (torch.randn(n, 48, generator=generator) for n in (3001, 90))
    if like == "words":  # visual tokens near some words, in a table of unequal lengths
        table *= torch.rand(3001, 1, generator=generator) * 9 + 0.1
        h = table[:90] + 0.3 * h
    if like == "alike":  # a cone, as of hidden states: cosines of 0.99, and rows that are the same
        table = 10 + 0.3 * table
        table[1000:1040] = table[7]
        h = 10 + 0.3 * h
    h[3], table[5] = 0, 0
    table, h = table.to(dtype), h.to(dtype) * 1000
    unit = torch.nn.functional.normalize
    exact = (unit(h.double(), dim=-1) @ unit(table.double(), dim=-1).T).float()
    exact[:, 11] = -torch.inf
    for vectors in (h, h.float() if dtype == torch.bfloat16 else h.double()):
        values, ids = EmbedLens(table, named(3001), exclude=[11]).topk(vectors, 7)
        expected = exact.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(ids, expected.indices[:, :7])
        torch.testing.assert_close(values, expected.values[:, :7], atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_tie_once_rounded_go_to_the_lowest_id_in_any_table(dtype):
    """A score is float32: entries that float64 tells apart and float32 does not are ties."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 8, generator=generator)
    table = (centre + 1e-3 * torch.randn(2000, 8, generator=generator)).to(dtype)
    h = centre + 1e-3 * torch.randn(30, 8, generator=generator)
    lens = EmbedLens(table, named(2000))
    assert torch.equal(lens.topk(h, 10)[1], lens.scores(h).sort(dim=-1, descending=True, stable=True).indices[:, :10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_that_weight_decay_left_with_next_to_no_length_are_words_like_others(many, dtype):
    embeddings, h = many
    embeddings[::7] *= 1e-40  # one over their length overflows
    embeddings = embeddings.to(dtype)
    lens = EmbedLens(embeddings, named(300))
    assert torch.equal(lens.topk(h, 5)[1], lens.scores(h).sort(dim=-1, descending=True, stable=True).indices[:, :5])


def test_a_vector_between_the_steps_of_bfloat16_is_still_ranked_exactly():
    """Rounded as the table is, it would be nearest to the other row."""
    table = torch.zeros(400, 64, dtype=torch.bfloat16)
    table[:, 0] = 1
    table[:, 1] = torch.linspace(-1, 1, 400).bfloat16()
    h = torch.zeros(1, 64)
    h[0, :2] = torch.tensor([1.0, 0.5019])
    cosines = torch.nn.functional.cosine_similarity(h.double(), table.double(), dim=-1)
    assert float(h[0, 1].bfloat16()) != float(h[0, 1])
    assert EmbedLens(table, named(400)).topk(h, 3)[1][0].tolist() == cosines.topk(3).indices.tolist()


@pytest.mark.parametrize("which", ["embed", "logit"])
def test_the_full_score_matrix_is_never_held(many, tiny, monkeypatch, which):
    embeddings, h = many
    if which == "embed":
        lens, h = EmbedLens(embeddings, named(300)), h.repeat(10, 1)
    else:
        lens = LogitLens.from_model(tiny)
        h = torch.randn(400, lens.width, generator=torch.Generator().manual_seed(0))
    whole = lens.topk(h, 5)
    monkeypatch.setattr(lenses, "SLICE_BYTES", 1)
    monkeypatch.setattr(lenses, "SLICE_ROWS", 7)
    held, contenders = [], lenses._contenders
    monkeypatch.setattr(
        lenses, "_contenders", lambda scores, *more: held.append(len(scores)) or contenders(scores, *more)
    )
    sliced = lens.topk(h, 5)
    assert max(held) <= 7 and sum(held) == 400
    assert torch.equal(sliced[1], whole[1])
    torch.testing.assert_close(sliced[0], whole[0], atol=1e-6, rtol=1e-6)


def test_any_leading_shape_like_torch_topk(many):
    embeddings, h = many
    lens = EmbedLens(embeddings, named(300))
    values, ids = lens.topk(h, 3)
    assert ids.dtype == torch.long
    assert torch.equal(lens.topk(h.view(4, 10, 16), 3)[1], ids.view(4, 10, 3))
    assert torch.equal(lens.topk(h[0], 3)[1], ids[0])
    assert lens.topk(h[:0], 3)[1].shape == (0, 3)
    assert lens.words(h[:2], 3) == [[f"t{index}" for index in row] for row in ids[:2].tolist()]


def test_norms_are_float32_whatever_comes_in(many):
    embeddings, h = many
    half = EmbedLens(embeddings.half(), named(300)).topk(h.half() * 200, 5)  # norms beyond float16
    assert half[0].dtype == torch.float32 and torch.isfinite(half[0]).all()
    assert half[1].tolist() == brute_force(h.half(), embeddings.half(), 5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_vectors_that_are_no_numbers_are_refused_not_read(tiny, many, bad):
    """All scores of such a vector are NaN or equal, and the words of ids 0, 1, 2 would come out as if read."""
    for lens in (EmbedLens.from_model(tiny), LogitLens.from_model(tiny)):
        h = torch.ones(3, 4, lens.width)
        whole = lens.topk(h, 3)
        h[0, 1, 5] = h[2, 0, 0] = bad
        for read in (lens.scores, lambda h, lens=lens: lens.rank(h, [7]), lens.topk):
            with pytest.raises(EmbedLensError, match="2 of 12 vectors hold NaN or inf, .*dtype='float32'"):
                read(h)
        with pytest.raises(EmbedLensError, match="1 of 4 vectors"):
            lens.words(h[0], 3)
        assert torch.equal(lens.topk(h[1], 3)[1], whole[1][1])
    embeddings, _ = many
    embeddings[4, 4] = bad
    with pytest.raises(EmbedLensError, match="1 of 300 embedding rows hold NaN"):
        EmbedLens(embeddings, named(300))


def test_the_rank_of_an_entry_is_its_place_in_the_whole_ranking(many):
    embeddings, h = many
    embeddings[[33, 200]] = embeddings[64] * 4  # equal scores: the lowest id is ahead
    lens = EmbedLens(embeddings, named(300))
    order = lens.topk(h, 300)[1].tolist()
    for ids in ([5], [64], [200, 33], [299, 0, 150]):
        expected = [1 + min(ranking.index(index) for index in ids) for ranking in order]
        assert lens.rank(h, ids).tolist() == expected
        assert lens.rank(h.view(4, 10, 16), ids).flatten().tolist() == expected


@pytest.fixture(params=["tiny", "miniature"])
def model(request):
    return request.getfixturevalue(request.param)


def test_logitlens_at_the_last_layer_gives_the_models_own_logits(model):
    prompt = model.prompt(picture(), QUESTION)
    lens, last = LogitLens.from_model(model), model.hidden_states(prompt)[-1]
    logits = model.logits(prompt)
    assert torch.equal(lens.scores(last), logits)
    values, ids = lens.topk(last, 1)
    assert torch.equal(ids[:, 0], logits.argmax(-1))
    # Norming twice, as readers of Hugging Face's hidden_states[-1] do, or not at all, is something else.
    with torch.no_grad():
        assert not torch.allclose(lens.scores(model.unembed.final_norm(last)), logits, atol=1e-2)
    assert not torch.allclose(LogitLens.from_model(model, norm=False).scores(last), logits, atol=1e-2)


def test_logitlens_never_answers_with_an_excluded_id_and_ranks_the_rest_as_before(model):
    last = model.hidden_states(model.prompt(picture(), QUESTION))[-1]
    first = LogitLens.from_model(model).topk(last, 3)[1]
    gone = first[:, 0].unique().tolist()
    ids = LogitLens.from_model(model, exclude=gone).topk(last, 1)[1][:, 0]
    assert not torch.isin(ids, torch.tensor(gone)).any()
    second_is_free = ~torch.isin(first[:, 1], torch.tensor(gone))
    assert torch.equal(ids[second_is_free], first[second_is_free, 1])


def test_numbers_beyond_float32_and_logits_that_are_nan_get_their_sentence(tiny, many, monkeypatch):
    far = torch.full((2, 16), 1e60, dtype=torch.float64)
    with pytest.raises(EmbedLensError, match="2 of 2 vectors hold .* numbers too large for a norm"):
        EmbedLens(many[0], named(300)).topk(far)
    lens = LogitLens.from_model(tiny)
    monkeypatch.setattr(tiny.unembed.head.weight, "data", torch.full_like(tiny.unembed.head.weight, torch.nan))
    for read in (lens.topk, lambda h: lens.rank(h, [7])):
        with pytest.raises(EmbedLensError, match="some logits are NaN: load the model with dtype='float32'"):
            read(torch.ones(1, lens.width))
