"""The linear probe reads what was planted, is not fooled by noise, and never sees a test picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from embedlens import samples, stats
from embedlens.errors import EmbedLensError
from embedlens.groups import discover
from embedlens.lenses import EmbedLens
from embedlens.measures.readout import (
    COLOURS,
    QUESTIONS,
    READERS,
    linear_readout,
    patch_colours,
    patch_objects,
    projected,
    random_projector,
    readouts,
    token_table,
)
from embedlens.patches import Frame, PatchGrid
from embedlens.vlm import QUESTION

NAMES = list(COLOURS)


@pytest.mark.parametrize("seed", range(2))
def test_the_colour_of_a_patch_is_that_of_its_pixels(seed):
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(20, 60, 2))
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    pixels[: height // 2] //= 4
    grid = PatchGrid(4, 4, Frame.letterbox(width, height))
    found = patch_colours(Image.fromarray(pixels), grid)
    for index in range(16):
        x0, y0, x1, y1 = grid.box(index)
        inside = [
            pixels[row, col].astype(float)
            for row in range(height)
            for col in range(width)
            if x0 <= col + 0.5 < x1 and y0 <= row + 0.5 < y1
        ]
        if bool(grid.padded[index]) or not inside:
            assert found[index] == -1
            continue
        mean = np.mean(inside, 0)
        distances = [float(((mean - np.array(colour)) ** 2).sum()) for colour in COLOURS.values()]
        assert distances[found[index]] == pytest.approx(min(distances))


def test_objects_inside_and_beside_against_a_loop():
    for sample in samples.load("miniworld", n=6):
        grid = PatchGrid(8, 8, Frame.letterbox(sample.width, sample.height))
        inside, beside = patch_objects(sample, grid)
        assert not ((inside >= 0) & (beside >= 0)).any()
        for index, (x, y) in enumerate(grid.centres.tolist()):
            if bool(grid.padded[index]):
                assert inside[index] == beside[index] == -1
                continue
            distances = {}
            for entry in sample.annotations:
                x0, y0, w, h = entry["bbox"]
                across, down = max(x0 - x, 0, x - x0 - w), max(y0 - y, 0, y - y0 - h)
                key = (across**2 + down**2) ** 0.5
                distances.setdefault(key, set()).add(entry["category_id"])
            holding = [
                (e["bbox"][2] * e["bbox"][3], e["category_id"])
                for e in sample.annotations
                if e["bbox"][0] <= x < e["bbox"][0] + e["bbox"][2] and e["bbox"][1] <= y < e["bbox"][1] + e["bbox"][3]
            ]
            if holding:
                assert inside[index] == min(holding)[1]
            else:
                assert inside[index] == -1 and beside[index] in distances[min(distances)]
    empty = samples.Sample(0, 8, 8, (), (), (), {}, lambda: Image.new("RGB", (8, 8)))
    assert (np.stack(patch_objects(empty, PatchGrid(2, 2, Frame.stretch(8, 8)))) == -1).all()


def planted(seed=0, pictures=40, each=12, strength=1.0):
    rng = np.random.default_rng(seed)
    picture = np.repeat(np.arange(pictures), each)
    answers = rng.integers(0, 3, len(picture))
    vectors = rng.normal(0, 0.05, (len(picture), 16))
    vectors[np.arange(len(picture)), answers] += 0.2 * strength
    vectors[:, 15] += 100  # a direction that all share: every cosine is near one
    return vectors.astype(np.float32), answers, picture


def rate(found, of="hits"):
    return stats.estimate(stats.drawn(found, of, over="asked")[of])


def gain(found):
    drawn = stats.drawn(found.assign(gain=found.hits - found.majority), "gain", over="asked")
    return stats.estimate(drawn["gain"])


def test_content_behind_a_shared_direction_is_read():
    vectors, answers, picture = planted()
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (units @ units.T).min() > 0.9999
    found = linear_readout([vectors], answers, picture)
    assert rate(found).low > 0.95 and rate(found, "majority").high < 0.6 and gain(found).low > 0.3


def test_noise_is_not_read_and_the_majority_is_what_it_is_held_against():
    vectors, answers, picture = planted(strength=0)
    assert gain(linear_readout([vectors], answers, picture)).low < 0.05
    lopsided = np.where(np.arange(len(answers)) % 10 == 0, answers, 1)
    often = linear_readout([vectors], lopsided, picture)
    assert rate(often, "majority").value > 0.85 and abs(gain(often).value) < 0.05


def test_pictures_are_on_one_side_only():
    """Each picture has its own random answer and its own mark: a probe that saw the picture would be right."""
    rng = np.random.default_rng(0)
    picture = np.repeat(np.arange(60), 10)
    answers = rng.integers(0, 2, 60)[picture]
    vectors = np.eye(60, dtype=np.float32)[picture] + rng.normal(0, 0.01, (600, 60)).astype(np.float32)
    found = linear_readout([vectors], answers, picture)
    assert found.id.nunique() == len(found) == 20 and rate(found).value < 0.75
    shuffled = rng.permutation(600)  # tokens, not pictures, apart: the same probe reads the marks
    leaking = linear_readout([vectors], answers, np.arange(600)[shuffled] // 10)
    assert rate(leaking).value > 0.95


def test_several_forms_are_averaged_and_too_little_is_none():
    vectors, answers, picture = planted()
    noise = np.random.default_rng(1).normal(0, 1, vectors.shape).astype(np.float32)
    one, other = (linear_readout([form], answers, picture) for form in (vectors, noise))
    both = linear_readout([vectors, noise], answers, picture)
    assert both.hits.to_numpy() == pytest.approx((one.hits + other.hits).to_numpy() / 2)
    assert both.asked.sum() == np.isin(picture, both.id).sum()
    assert linear_readout([vectors], np.full(len(answers), -1), picture) is None
    assert linear_readout([vectors], np.zeros_like(answers), picture) is None
    assert linear_readout([vectors], answers, picture // 10) is None  # four pictures


def test_the_projector_gives_the_visual_tokens_and_a_random_one_does_not(tiny):
    pictures = samples.load("miniworld", n=3)
    prompts = tiny.prompts([sample.image for sample in pictures], [QUESTION] * 3)
    before = torch.stack(tiny.tower_states_of(prompts))[:, tiny.feature_layer].flatten(0, 1)
    tokens = torch.cat([prompt.embeds[prompt.visual] for prompt in prompts]).numpy()
    own = tiny.projector
    assert projected(own, before) == pytest.approx(tokens, abs=1e-5)
    drawn = projected(random_projector(own, 0), before)
    assert drawn.shape == tokens.shape and not np.allclose(drawn, tokens, atol=1e-2)
    assert np.array_equal(drawn, projected(random_projector(own, 0), before))
    assert not np.allclose(drawn, projected(random_projector(own, 1), before), atol=1e-2)
    state = torch.random.get_rng_state()
    random_projector(own, 2)
    assert torch.equal(state, torch.random.get_rng_state())

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    with pytest.raises(EmbedLensError, match="no reset_parameters"):
        random_projector(nn.Sequential(Scale()), 0)


@pytest.fixture(scope="module")
def marked(tiny):
    """Pictures, and a reference by whose word some of their tokens are dead."""
    pictures = samples.load("miniworld", n=40)
    found = discover(tiny, pictures[:2])
    words = EmbedLens.from_model(tiny).topk(tiny.visual_features_of([pictures[3].image])[0], 1)[1].flatten()
    return pictures, replace(found, dead_id=int(words.bincount().argmax()))


def test_the_token_table_holds_as_many_of_each_kind_as_asked_for_whatever_stands_before(tiny, marked):
    pictures, reference = marked[0][:4], marked[1]
    before, table = token_table(tiny, pictures, reference, per_picture=3, batch_size=3)
    assert set(table.id) == {0, 1, 2, 3} and tuple(table.columns[3:]) == QUESTIONS
    assert (table.dead != table.alive).all() and table.dead.any()
    assert table.groupby("id")[["dead", "alive"]].sum().to_numpy().max() <= 3
    states, alone = token_table(tiny, pictures[3:], reference, per_picture=3, batch_size=1)
    own = table.id == 3
    torch.testing.assert_close(before[torch.tensor(own.tolist())], states, atol=1e-4, rtol=1e-4)
    assert table[own].reset_index(drop=True).equals(alone)
    with pytest.raises(EmbedLensError, match="no samples"):
        token_table(tiny, [], reference)


def test_everything_is_asked_of_dead_and_alive_tokens_by_all_projectors(tiny, marked):
    read = readouts(tiny, *marked, projectors=1)
    assert set(read.reader) == set(READERS) and set(read.question) <= set(QUESTIONS)
    before, table = token_table(tiny, *marked)
    alive, of = table.alive.to_numpy(), QUESTIONS[0]
    answers, picture = (table[name].to_numpy()[alive] for name in (of, "id"))
    alone = linear_readout([projected(tiny.projector, before)[alive]], answers, picture)
    own = read[(read.question == of) & (read.group == "alive") & (read.reader == READERS[0])]
    assert own.hits.tolist() == alone.hits.tolist() and own.asked.tolist() == alone.asked.tolist()
    guess = read[(read.question == of) & (read.group == "alive") & (read.reader == READERS[2])]
    assert guess.hits.tolist() == alone.majority.tolist()
    without = readouts(tiny, marked[0], replace(marked[1], dead_id=None), projectors=1)
    assert set(without.group) == {"alive"}  # no word, no dead tokens, no rows
    assert readouts(tiny, marked[0][:3], marked[1], projectors=1).empty
