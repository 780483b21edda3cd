"""Norms, turns and rescaling: against plain loops over positions, and against what arithmetic demands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from embedlens import samples, tasks
from embedlens.errors import EmbedLensError
from embedlens.groups import Reference
from embedlens.intervals import mean_interval
from embedlens.labels import QUESTION
from embedlens.lenses import EmbedLens
from embedlens.norms import (
    SCALES,
    correct_at,
    course,
    courses,
    first_block,
    in_the_middle,
    matching_layer,
    middle_by_accident,
    of_means,
    renamed,
    resampled_means,
)


@pytest.fixture(scope="module")
def pictures():
    return samples.load("miniworld", n=3, seed=0)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def looped(states, positions):
    """Norms, steps, centred steps and cosine to the input, one position at a time."""
    norms, steps, centred, back = [], [], [], []
    for layer in range(len(states)):
        norms.append(np.mean([float(states[layer, i].pow(2).sum()) ** 0.5 for i in positions]))
        back.append(np.mean([cosine(states[0, i], states[layer, i]) for i in positions]))
    for layer in range(len(states) - 1):
        here, there = states[layer], states[layer + 1]
        steps.append(np.mean([cosine(here[i], there[i]) for i in positions]))
        a, b = (sum(h[i] for i in positions) / len(positions) for h in (here, there))
        centred.append(np.mean([cosine(here[i] - a, there[i] - b) for i in positions]))
    return norms, steps, centred, back


@pytest.mark.parametrize("seed", range(10))
def test_a_course_is_what_a_loop_over_positions_gives(seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(4, 9, 6, generator=generator) * 10 ** torch.randn(4, 1, 1, generator=generator)
    mask = torch.rand(9, generator=generator) > 0.4
    mask[:2] = True
    found = course(states, mask)
    wanted = looped(states, mask.nonzero()[:, 0].tolist())
    for mine, theirs in zip((found.norms, found.steps, found.centred, found.from_input), wanted, strict=True):
        assert mine[0] == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    other = looped(states, (~mask).nonzero()[:, 0].tolist() or [0])
    assert found.norms[0] != pytest.approx(other[0], rel=1e-3)


def test_no_position_and_a_single_one_give_nan_and_no_crash():
    states = torch.randn(3, 4, 5)
    assert np.isnan(course(states, torch.zeros(4, dtype=torch.bool)).norms).all()
    single = course(states, torch.arange(4) == 1)
    assert np.isnan(single.centred).all() and not np.isnan(single.steps).any() and single.n == 1


def test_courses_read_the_stock_stream_of_the_rescaled_prompt(tiny, pictures):
    found = courses(tiny, pictures, scales=(1.0, 0.01), batch_size=2)
    for row, sample in enumerate(pictures):
        prompt = tiny.prompt(sample.image, QUESTION)
        text = prompt.text.nonzero()[1:, 0].tolist()
        for scale in (1.0, 0.01):
            states = tiny.hidden_states(prompt.rescaled(scale))
            for name, positions in (("visual", prompt.visual.nonzero()[:, 0].tolist()), ("text", text)):
                norms, steps, _, back = looped(states, positions)
                assert found[scale, name].norms[row] == pytest.approx(norms, rel=1e-4)
                assert found[scale, name].steps[row] == pytest.approx(steps, abs=1e-4)
                assert found[scale, name].from_input[row] == pytest.approx(back, abs=1e-4)
    shrunk = found[0.01, "visual"].norms[:, 0] / found[1.0, "visual"].norms[:, 0]
    assert shrunk == pytest.approx(0.01, rel=1e-4)
    assert np.array_equal(found[1.0, "text"].norms[:, 0], found[0.01, "text"].norms[:, 0])
    assert not np.allclose(found[1.0, "text"].norms, found[1.0, "all text"].norms)


def test_groups_that_nobody_belongs_to_are_nan_and_alive_is_all_the_rest(tiny, pictures):
    none = Reference(tiny.name, tiny.width, len(tiny.tokens), 2, 0.9, None, (), None, None, None, None, None)
    found = courses(tiny, pictures, reference=none)
    assert found[1.0, "dead"].n == 0 and np.isnan(found[1.0, "dead"].steps).all()
    assert np.array_equal(found[1.0, "alive"].norms, found[1.0, "visual"].norms)


def test_a_factor_reaches_the_first_attention_only_through_the_norms_epsilon(tiny, pictures):
    for module in tiny.decoder.modules():
        if hasattr(module, "variance_epsilon"):
            assert module.variance_epsilon <= 1e-5
    found = first_block(tiny, pictures, scales=(1.0, 0.5, 4.0))
    assert found.attention_moved.max() < 1e-2  # epsilon and rounding
    assert found.attention_moved[:, 0].max() < 1e-5
    assert found.mlp_moved[:, 1:].min() > 1e-2


def test_the_frozen_prediction_is_the_unscaled_update_on_a_scaled_token(tiny, pictures):
    found = first_block(tiny, pictures, scales=SCALES)
    for row, sample in enumerate(pictures):
        prompt = tiny.prompt(sample.image, QUESTION)
        before, after = tiny.hidden_states(prompt)[:2, prompt.visual]
        for column, scale in enumerate(SCALES):
            wanted = np.mean([cosine(scale * x, scale * x + (y - x)) for x, y in zip(before, after, strict=True)])
            assert found.frozen[row, column] == pytest.approx(wanted, abs=1e-4)
            states = tiny.hidden_states(prompt.rescaled(scale))[:2, prompt.visual]
            wanted = np.mean([cosine(x, y) for x, y in zip(*states, strict=True)])
            assert found.steps[row, column] == pytest.approx(wanted, abs=1e-4)
    assert found.steps[:, 0] == pytest.approx(found.frozen[:, 0], abs=1e-5)
    assert not np.allclose(found.steps[:, -1], found.frozen[:, -1], atol=1e-3)


def test_renamed_counts_tokens_whose_nearest_word_changes(tiny, pictures):
    lens = EmbedLens.from_model(tiny)
    found = renamed(tiny, pictures, lens, batch_size=2)
    for row, sample in enumerate(pictures):
        prompt = tiny.prompt(sample.image, QUESTION)
        words = [[best[0] for best in lens.words(h[prompt.visual], 1)] for h in tiny.hidden_states(prompt)]
        for block in range(tiny.n_layers):
            pairs = list(zip(words[block], words[block + 1], strict=True))
            assert found[row, block] == pytest.approx(sum(a != b for a, b in pairs) / len(pairs), abs=2 / len(pairs))
    assert 0 < found.mean() <= 1


def test_answers_at_scale_one_are_those_of_the_evaluation(miniature):
    items = tasks.questions("colour", n=6, seed=0)
    found = correct_at(miniature, items, scales=(1.0, 0.0), batch_size=4)
    assert found[:, 0].tolist() == tasks.evaluate(miniature, items)["correct"].tolist()
    blind = [miniature.answer(miniature.prompt(i.sample.image, i.question.text).rescaled(0.0), 12) for i in items]
    assert found[:, 1].tolist() == [tasks.score(i.question, said) for i, said in zip(items, blind, strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_the_matching_layer_is_found_by_a_plain_search(seed):
    rng = np.random.default_rng(seed)
    visual, text = rng.lognormal(size=5), rng.lognormal(size=(5, 7))
    wanted = [min(range(7), key=lambda at, row=row: abs(text[row, at] - visual[row])) for row in range(5)]
    assert matching_layer(visual, text).tolist() == wanted


def test_the_middle_half_is_the_middle_half():
    assert in_the_middle(np.arange(33), 32).nonzero()[0].tolist() == list(range(8, 25))
    assert in_the_middle(np.arange(5), 4).tolist() == [False, True, True, True, False]


def test_a_match_in_the_middle_is_worth_the_norms_that_would_give_it():
    # five layers; layers 1 to 3 are the middle: the norms from half way between 1 and 2 to half way between 4 and 8
    wanted = (np.log(6) - np.log(1.5)) / np.log(8)
    assert middle_by_accident(np.array([1.0, 2.0, 3.0, 4.0, 8.0])) == pytest.approx(wanted, abs=1e-3)
    with pytest.raises(EmbedLensError, match="tell no layers apart"):
        middle_by_accident(np.ones(4))


def test_statistics_of_means_agree_with_the_interval_of_a_mean_and_leave_nan_out():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 4))
    values[rng.random(values.shape) < 0.2] = np.nan
    mine, theirs = of_means(lambda mean: mean, values, seed=3), mean_interval(values, seed=3)
    for a, b in zip(mine, theirs, strict=True):
        assert_close(torch.tensor(a), torch.tensor(b))


def test_values_of_one_picture_are_drawn_together():
    values = np.random.default_rng(0).lognormal(size=50)
    ratio = of_means(lambda a, b: a / b, values, 2 * values)
    assert [float(part) for part in ratio] == pytest.approx([0.5, 0.5, 0.5])
    first, second = resampled_means(values, 2 * values, resamples=5)
    assert np.allclose(2 * first, second) and first.std() > 0


def test_nothing_to_measure_is_refused(tiny, pictures):
    for call in (
        lambda: courses(tiny, []),
        lambda: courses(tiny, pictures, scales=()),
        lambda: first_block(tiny, []),
        lambda: first_block(tiny, pictures, scales=()),
        lambda: renamed(tiny, [], EmbedLens.from_model(tiny)),
        lambda: correct_at(tiny, []),
        lambda: of_means(lambda mean: mean, np.full(3, np.nan)),
    ):
        with pytest.raises(EmbedLensError):
            call()
    with pytest.raises((EmbedLensError, TypeError), match="pictures"):  # the shapes in the signature, where checked
        resampled_means(np.ones(3), np.ones(4))
