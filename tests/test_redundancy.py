"""Promises of the token scores: alone, in the region, in the picture; windows, divergences, density peaks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from twins import BY_FAMILY, save_twin

from embedlens import load
from embedlens.errors import EmbedLensError
from embedlens.patches import Frame, ManyViews, PatchGrid
from embedlens.readings import ARTICLES, PromptReader, Protocol
from embedlens.redundancy import (
    divergence,
    dpc_knn,
    readings_of,
    sampled_ranks,
    scored,
    token_scores,
    window,
    words_alone,
)


def grid_of(rows: int, cols: int) -> PatchGrid:
    return PatchGrid(rows=rows, cols=cols, frame=Frame.stretch(cols, rows))


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8))


# --- windows ---------------------------------------------------------------------------------------------------------


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


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_divergence_has_its_closed_form_in_both_variants():
    p, q = np.array([0.9, 0.1]), np.array([0.5, 0.5])
    m = (p + q) / 2
    textbook = sum((a * np.log(a / m)).sum() for a in (p, q)) / 2
    released = sum((m * np.log(m / a)).sum() for a in (p, q)) / 2 / 2  # KL turned around, mean over two entries
    intact, without = (torch.tensor(np.log(a)).float() for a in (p, q))
    assert float(divergence(intact, without, "textbook")) == pytest.approx(textbook, rel=1e-5)
    assert float(divergence(intact, without, "released")) == pytest.approx(released, rel=1e-5)


def test_divergence_is_zero_for_equal_runs_and_at_most_log_two():
    logits = torch.randn(5, 40)
    for variant in ("released", "textbook"):
        assert_close(divergence(logits, logits + 3, variant), torch.zeros(5), atol=1e-6, rtol=0)
    apart = divergence(torch.tensor([50.0, 0.0]), torch.tensor([0.0, 50.0]), "textbook")
    assert float(apart) == pytest.approx(math.log(2), rel=1e-5)


def test_divergence_looks_at_the_likeliest_words_of_the_intact_run_alone():
    intact = torch.tensor([3.0, 2.0, 1.0, -9.0])
    without = torch.tensor([3.0, 2.0, 1.0, 99.0])  # the last word was not among the first three of the intact run
    assert float(divergence(intact, without, k=3)) == pytest.approx(0, abs=1e-7)
    assert float(divergence(without, intact, k=3)) > 0.1


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_the_released_divergence_is_about_a_tenth_of_the_textbook_one_for_small_changes(seed):
    generator = torch.Generator().manual_seed(seed)
    intact = torch.randn(60, generator=generator)
    without = intact + 0.05 * torch.randn(60, generator=generator)
    ratio = divergence(intact, without, "released") / divergence(intact, without, "textbook")
    assert 0.095 < float(ratio) < 0.105


# --- readings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", *BY_FAMILY])
def test_readings_are_what_the_stock_model_says_to_each_prompt_alone(tiny, family, tmp_path):
    model = tiny if family == "llava" else load(save_twin(tmp_path, BY_FAMILY[family]), device="cpu")
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


def test_the_batch_size_changes_nothing(tiny):
    prompt = tiny.prompt(picture(1), "what is in the picture?")
    protocol = Protocol(question=prompt.question)
    one, many = (readings_of(tiny, prompt, None, protocol, batch_size=size) for size in (1, 64))
    for name in ("alone", "region", "region_without", "picture", "picture_without"):
        assert_close(getattr(one, name), getattr(many, name), atol=2e-4, rtol=1e-4)


def test_words_alone_are_the_likeliest_of_the_reading_alone(tiny):
    prompt = tiny.prompt(picture(1), "what is in the picture?")
    assert words_alone(tiny, prompt, k=3)[0].tolist() == readings_of(tiny, prompt).alone.topk(3).indices.tolist()


def test_sharing_the_prefix_gives_what_whole_prompts_give(tiny, monkeypatch):
    prompt = tiny.prompt(picture(2), "what is in the picture?")
    most = tiny.tokens[int(tiny.logits(prompt)[-1].argmax())]  # the word that it begins with counts as an article
    protocol = Protocol(question=prompt.question, articles=(most, *ARTICLES))
    shared = readings_of(tiny, prompt, None, protocol)
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
    other = int(plain.picture_without[0].argmax())
    released = readings_of(tiny, prompt, [5], Protocol(question=prompt.question, articles=(name,), aligned=False))
    if other == word:
        assert_close(released.picture_without, aligned.picture_without, atol=2e-4, rtol=1e-4)
    else:
        assert_close(released.picture_without, plain.picture_without, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("replacement", ["zeros", "mean token"])
def test_the_replacement_is_a_choice(tiny, replacement):
    prompt = tiny.prompt(picture(4), "what is in the picture?")
    default, other = (
        readings_of(tiny, prompt, [3], Protocol(question=prompt.question, replacement=name))
        for name in ("row 0", replacement)
    )
    assert_close(default.region, other.region)
    assert not torch.allclose(default.region_without, other.region_without, atol=1e-3)


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


def test_a_token_that_is_the_replacement_already_is_missed_by_nothing(tiny):
    prompt = tiny.prompt(picture(6), "what is in the picture?")
    embeds = prompt.embeds.clone()
    embeds[prompt.visual.nonzero()[:, 0][window(0, prompt.grid)]] = tiny.input_embeddings[0]
    score = token_scores(tiny, [replace(prompt, embeds=embeds)], [torch.tensor([0, 15])], Protocol(prompt.question))[0]
    assert float(score.cascade()[0]) == pytest.approx(0, abs=1e-6)
    assert float(score.cascade()[1]) > 1e-5


# --- density peaks ---------------------------------------------------------------------------------------------------


def peaks_by_hand(tokens: np.ndarray, clusters: int, k: int) -> list[int]:
    n = len(tokens)
    far = np.sqrt(((tokens[:, None] - tokens[None]) ** 2).sum(-1)) / np.sqrt(tokens.shape[1])
    density = [math.exp(-np.mean(sorted(far[i])[:k] ** np.array(2))) for i in range(n)]
    delta = []
    for i in range(n):
        above = [far[i, j] for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        delta.append(min(above) if above else far.max())
    order = sorted(range(n), key=lambda i: (-density[i] * delta[i], i))
    centres = order[:clusters]
    labels = [min(range(len(centres)), key=lambda c, i=i: (far[i, centres[c]], c)) for i in range(n)]
    for label, centre in enumerate(centres):
        labels[centre] = label
    return labels


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 14), st.integers(1, 5), st.integers(1, 5))
def test_density_peaks_are_those_of_the_definition(seed, n, clusters, k):
    tokens = np.random.default_rng(seed).normal(size=(n, 3))
    expected = peaks_by_hand(tokens, min(clusters, n), min(k, n))
    assert dpc_knn(torch.from_numpy(tokens), clusters, k).tolist() == expected


def test_density_peaks_of_long_vectors_do_not_drown_in_rounding():
    """exp(-distance²) is zero for all of them; the order of the densities is still there."""
    near = torch.tensor([[0.0], [1.0], [2.0], [500.0], [501.0], [502.0]]) * 100
    assert dpc_knn(near, 2, 2).tolist() == [0, 0, 0, 1, 1, 1]


def test_the_unit_of_the_tokens_does_not_matter_once_it_is_set():
    tokens = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dpc_knn(tokens, 4, rms=0.5), dpc_knn(1000 * tokens, 4, rms=0.5))


# --- wrong input -----------------------------------------------------------------------------------------------------


def test_wrong_input_gets_a_sentence_with_the_fix(tiny):
    prompt = tiny.prompt(picture(), "what is in the picture?")
    with pytest.raises(EmbedLensError, match="16 tokens: pass some of 0 to 15"):
        readings_of(tiny, prompt, [16], Protocol(prompt.question))
    with pytest.raises(EmbedLensError, match="pass at least 1"):
        readings_of(tiny, prompt, [1], Protocol(prompt.question), batch_size=0)
    with pytest.raises(EmbedLensError, match="use one of 'row 0'"):
        Protocol(replacement="noise")
    with pytest.raises(EmbedLensError, match="pass the whole prompt"):
        readings_of(tiny, prompt.without(torch.arange(16) < 3), [1], Protocol(prompt.question))
    with pytest.raises(EmbedLensError, match="one set per picture"):
        token_scores(tiny, [prompt], [torch.tensor([0])] * 2)
    with pytest.raises(EmbedLensError, match="'released' or 'textbook'"):
        divergence(torch.zeros(3), torch.zeros(3), "mine")
    with pytest.raises(EmbedLensError, match="pass 0 to 15"):
        window(16, prompt.grid)
    with pytest.raises(EmbedLensError, match="each is at least 1"):
        dpc_knn(torch.zeros(0, 3), 2)
