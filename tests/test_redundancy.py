"""Promises of the token scores: alone, in the region, in the picture; windows, divergences, density peaks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from twins import BY_FAMILY

from benchmarks.measure import operations
from benchmarks.redundancy import BARE, FULL, OURS, lines, one_by_one
from embedlens import redundancy
from embedlens.patches import Frame, ManyViews, PatchGrid
from embedlens.readings import ARTICLES, PromptReader, Protocol
from embedlens.redundancy import divergence, dpc_knn, readings_of, sampled_ranks, scored, token_scores, window


def grid_of(rows: int, cols: int) -> PatchGrid:
    return PatchGrid(rows=rows, cols=cols, frame=Frame.stretch(cols, rows))


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.data())
def test_a_window_is_a_square_inside_the_grid_as_near_to_its_token_as_the_border_lets_it(rows, cols, side, data):
    place = data.draw(st.integers(0, rows * cols - 1))
    found = window(place, grid_of(rows, cols), side).tolist()
    tall, wide = min(side, rows), min(side, cols)
    assert place in found and len(found) == tall * wide and found == sorted(found)
    row, col = divmod(place, cols)
    tops, lefts = {p // cols for p in found}, {p % cols for p in found}
    for at, taken, length, size in ((row, tops, rows, tall), (col, lefts, cols, wide)):
        starts = range(length - size + 1)  # every window inside; the best has the token nearest to its middle
        best = min(abs(at - (start + (side - 1) // 2)) for start in starts)
        assert taken == set(range(min(taken), min(taken) + size))
        assert abs(at - (min(taken) + (side - 1) // 2)) == best


def test_a_window_lies_in_one_view_of_several():
    grid = ManyViews.of([PatchGrid(r, 4, Frame.stretch(8, 8)) for r in (3, 4)])
    assert window(13, grid).tolist() == [12 + i for i in window(1, grid_of(4, 4)).tolist()]
    assert window(11, grid).tolist() == window(11, grid_of(3, 4)).tolist()


def test_the_released_ranks_are_96_of_576_and_keep_both_ends_elsewhere():
    assert sampled_ranks(576)[:24].tolist() == list(range(24)) and sampled_ranks(576)[-1] == 575
    assert sampled_ranks(729)[-1] == 728 and sampled_ranks(64).tolist() == list(range(64))


def test_divergence_has_its_closed_form_in_both_variants():
    p, q = np.array([0.9, 0.1]), np.array([0.5, 0.5])
    m = (p + q) / 2
    textbook = sum((a * np.log(a / m)).sum() for a in (p, q)) / 2
    released = sum((m * np.log(m / a)).sum() for a in (p, q)) / 2 / 2  # KL turned around, mean over two entries
    intact, without = (torch.tensor(np.log(a)).float() for a in (p, q))
    assert float(divergence(intact, without, "textbook")) == pytest.approx(textbook, rel=1e-5)
    assert float(divergence(intact, without, "released")) == pytest.approx(released, rel=1e-5)
    apart = divergence(torch.tensor([50.0, 0.0]), torch.tensor([0.0, 50.0]), "textbook")
    assert float(apart) == pytest.approx(math.log(2), rel=1e-5)
    # the last word was not among the first three of the intact run
    intact, without = torch.tensor([3.0, 2.0, 1.0, -9.0]), torch.tensor([3.0, 2.0, 1.0, 99.0])
    assert float(divergence(intact, without, k=3)) == pytest.approx(0, abs=1e-7)
    assert float(divergence(without, intact, k=3)) > 0.1
    change = 0.05 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    small = [divergence(change * 0, change, variant) for variant in ("released", "textbook")]
    assert 0.095 < float(small[0] / small[1]) < 0.105  # of small changes a tenth


@pytest.mark.parametrize("family", ["llava", *BY_FAMILY])
def test_readings_are_what_the_stock_model_says_to_each_prompt_alone(tiny, family, twin_of):
    model = tiny if family == "llava" else twin_of(BY_FAMILY[family])[1]
    prompt = model.prompt(picture(), "what is in the picture?")
    n, at = len(prompt.grid), prompt.visual.nonzero()[:, 0]
    places = [0, n // 3, n // 2, n - 1]
    found = readings_of(model, prompt, places, Protocol(question=prompt.question, articles=()))

    def blanked(tokens):
        embeds, deep = prompt.embeds.clone(), prompt.deep
        embeds[at[tokens]] = model.input_embeddings[0]
        if deep is not None:
            deep = deep.clone()
            deep[:, tokens] = 0
        return replace(prompt, embeds=embeds, deep=deep)

    close = dict(atol=2e-4, rtol=2e-4)
    for row, place in enumerate(places):
        own = window(place, prompt.grid)
        only, region = (torch.ones(n, dtype=torch.bool) for _ in range(2))
        only[place], region[own] = False, False
        assert_close(found.alone[row], model.logits(prompt.without(only))[-1], **close)
        assert_close(found.region[row], model.logits(prompt.without(region))[-1], **close)
        assert_close(found.region_without[row], model.logits(blanked([place]).without(region))[-1], **close)
        assert_close(found.picture[row], model.logits(prompt)[-1], **close)
        assert_close(found.picture_without[row], model.logits(blanked(own))[-1], **close)
    assert not torch.allclose(found.picture, found.picture_without, atol=1e-2)


def test_sharing_the_prefix_gives_what_whole_prompts_give_in_batches_of_any_size(tiny, monkeypatch):
    prompt = tiny.prompt(picture(2), "what is in the picture?")
    most = tiny.tokens[int(tiny.logits(prompt)[-1].argmax())]  # the word that it begins with counts as an article
    protocol = Protocol(question=prompt.question, articles=(most, *ARTICLES))
    shared = readings_of(tiny, prompt, None, protocol, batch_size=1)
    words = redundancy.words_alone(tiny, prompt, k=3)[0]
    assert torch.equal(words, readings_of(tiny, prompt).alone.topk(3).indices)
    other = replace(protocol, replacement="mean token")
    assert not torch.allclose(shared.region_without, readings_of(tiny, prompt, None, other).region_without, atol=1e-3)
    monkeypatch.setattr("embedlens.readings.Reader", PromptReader)
    whole = readings_of(tiny, prompt, None, protocol, batch_size=7)
    for name in ("alone", "region", "region_without", "picture", "picture_without"):
        assert_close(getattr(shared, name), getattr(whole, name), atol=2e-4, rtol=1e-4)


def test_a_leading_article_is_read_past_at_one_aligned_place_or_as_released(tiny):
    prompt = tiny.prompt(picture(3), "what is in the picture?")
    plain = readings_of(tiny, prompt, [5], Protocol(question=prompt.question, articles=()))
    word = int(plain.picture[0].argmax())
    name = tiny.tokens[word].removeprefix("·")
    aligned = readings_of(tiny, prompt, [5], Protocol(question=prompt.question, articles=(name,)))
    after = torch.cat([prompt.embeds, tiny.input_embeddings[word][None]])
    with torch.no_grad():
        expected = tiny.hf(inputs_embeds=after[None]).logits[0, -1, : len(tiny.tokens)]
    assert_close(aligned.picture[0], expected, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(aligned.picture, plain.picture, atol=1e-2)
    # as released, the run without the region skips an article only if it writes one itself
    skipped = aligned if int(plain.picture_without[0].argmax()) == word else plain
    released = readings_of(tiny, prompt, [5], Protocol(question=prompt.question, articles=(name,), aligned=False))
    assert_close(released.picture_without, skipped.picture_without, atol=2e-4, rtol=1e-4)


def test_scores_are_those_of_the_readings_and_the_cascade_weighs_them(tiny):
    prompt = tiny.prompt(picture(5), "what is in the picture?")
    protocol = Protocol(question=prompt.question, weights=(1.0, 16.0))
    readings = readings_of(tiny, prompt, None, protocol)
    score = scored(readings)
    again = token_scores(tiny, [prompt], None, protocol)[0]
    assert_close(score.probability, again.probability)
    for at, variant in enumerate(("released", "textbook")):
        expected = divergence(readings.region, readings.region_without, variant)
        expected = expected + 16 * divergence(readings.picture, readings.picture_without, variant)
        assert_close(score.cascade(variant), expected)
        assert_close(score.region[:, at], divergence(readings.region, readings.region_without, variant))
    assert torch.equal(score.word, readings.alone.max(-1).indices)


def test_density_peaks_of_long_vectors_do_not_drown_in_rounding_and_have_no_unit_once_it_is_set():
    """exp(-distance²) is zero for all of them; the order of the densities is still there."""
    near = torch.tensor([[0.0], [1.0], [2.0], [500.0], [501.0], [502.0]]) * 100
    assert dpc_knn(near, 2, 2).tolist() == [0, 0, 0, 1, 1, 1]
    tokens = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dpc_knn(tokens, 4, rms=0.5), dpc_knn(1000 * tokens, 4, rms=0.5))


def test_one_call_a_reading_gives_the_same_logits_with_more_arithmetic(tiny):
    prompt = tiny.prompt(picture(), "what is in the picture?")
    protocol = Protocol(question=prompt.question, articles=())
    ours = readings_of(tiny, prompt, [3, 5], protocol)
    expected = [ours.picture[0]]
    for row in range(2):
        expected += [part[row] for part in (ours.alone, ours.region, ours.region_without, ours.picture_without)]
    for released in (False, True):
        assert_close(one_by_one(tiny, prompt, [3, 5], released), torch.stack(expected), atol=2e-4, rtol=1e-4)
    shared = operations(lambda: readings_of(tiny, prompt, [3, 5], protocol))
    bare, full = (operations(lambda way=way: one_by_one(tiny, prompt, [3, 5], way)) for way in (False, True))
    assert 0 < shared < bare < full
    assert operations(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 2 * 3 * 5 * 7
    way = {"ratio": {"median": 2.0, "low": 1.0, "high": 3.0}, "operations": 5e9}
    found = {"tokens": 2, "readings": 9, "ways": dict.fromkeys((OURS, BARE, FULL), way)}
    assert [row[0].split(", ", 3)[2:] for row in lines(found)] == [["5.0 GFLOP", name] for name in (OURS, BARE, FULL)]
