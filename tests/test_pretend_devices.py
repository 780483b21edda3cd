"""Measures run on a card of their own, which is small: nothing meets the wrong side, batches halve."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest
import torch
from pretend_devices import CARD, on_card, small_card
from torch import Tensor

import embedlens as el
from embedlens import cues, pruner_arms, redundancy, samples, sweep, tasks
from embedlens.context import ContextLens
from embedlens.explorer import alone
from embedlens.groups import discover, token_groups_of
from embedlens.measures import entry

ROWS = 3  # prompts, or pictures, that fit at a time


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(sweep, "answer_tokens", lambda _: 3)


@pytest.mark.parametrize(
    ("mixing", "sentence"),
    [
        (lambda card, cpu: card + cpu, "found at least two devices"),
        (lambda card, cpu: torch.cat([card, cpu]), "found at least two devices"),
        (lambda card, cpu: torch.nn.functional.linear(card, cpu), "found at least two devices"),
        (lambda card, cpu: cpu[card > 0], "indices should be either on cpu"),
        (lambda card, cpu: card.__setitem__(card > 0, cpu[cpu > 0]), "same device"),
        (lambda card, cpu: card.numpy(), "can't convert cuda:0"),
        (lambda card, cpu: np.asarray(card), "can't convert cuda:0"),
        (lambda card, cpu: torch.rand(2, device="cuda", generator=torch.Generator()), "device type for generator"),
    ],
)
def test_the_card_refuses_what_a_card_refuses(miniature, mixing, sentence):
    with on_card(miniature) as model, pytest.raises((RuntimeError, TypeError), match=sentence):
        mixing(torch.ones(2, 2, device=model.device), torch.ones(2, 2))


def test_the_card_takes_what_a_card_takes_and_gives_the_same_numbers(miniature):
    prompts = prompts_of(miniature)
    plain = miniature.logits(prompts[0])
    with on_card(miniature) as model:
        assert model.device == CARD and model.logits(prompts_of(model)[0]).device == CARD
        assert torch.equal(model.logits(prompts_of(model)[0]).cpu(), plain)
        rows = torch.arange(6, device="cuda").reshape(2, 3)
        assert rows[torch.tensor([True, False])].tolist() == [[0, 1, 2]]  # a CPU mask on a tensor of the card
        assert (rows * torch.tensor(2)).sum().item() == 30  # a number is on no side
        assert rows.shape[1:].numel() == 3  # a size is no bare tuple
        assert rows.to("cpu").numpy().sum() == 15 and rows.new_zeros(2).device == rows.device == CARD
    assert miniature.device == torch.device("cpu") and torch.equal(miniature.logits(prompts[0]), plain)


def prompts_of(model, n=5):
    pictures = samples.load("miniworld", n=n)
    return model.prompts([picture.image for picture in pictures], ["What is in the picture?"] * n)


@cache
def few():
    """Of every family of questions, about two pictures."""
    return tasks.questionnaires(5, 0)[:8]


def swept(model, arms):
    reference = discover(model, samples.load("miniworld", n=4, split="train"))
    return sweep.run_arms(model, few(), arms, partial(token_groups_of, reference=reference)).prediction.tolist()


def chosen_by(model):
    reference = discover(model, samples.load("miniworld", n=4, split="train"))
    found = pruner_arms.seen(model, prompts_of(model), reference, 0.3)
    return [[one.context.attention, one.context.rated, one.features.tower] for one in found]


MEASURES = {
    "hidden states": lambda model: list(model.streams_of(prompts_of(model))),
    "answers": lambda model: model.answers(prompts_of(model), 4),
    "traces": lambda model: [each.resid_mid for each in el.traces(model, prompts_of(model))],
    "tower": lambda model: [states[-1] for states in model.tower_states_of(prompts_of(model))],
    "attention": lambda model: [read for read, _ in cues.attended(model, prompts_of(model))],
    "sweep of groups": lambda model: swept(model, sweep.dead_arms()[:3]),
    "sweep of sublayers": lambda model: entry.asked(
        model,
        few(),
        [
            sweep.everywhere("late", el.EnterAt(3)),
            sweep.everywhere("silent", el.Silence("attention")),
            sweep.everywhere("text", el.Silence("mlp", rows="text")),
        ],
    ).prediction.tolist(),
    "pruners": chosen_by,
    "words of single tokens": lambda model: redundancy.words_alone(model, prompts_of(model, 1)[0]),
    "scores of tokens": lambda model: [
        read.probability for read in redundancy.token_scores(model, prompts_of(model, 2), [torch.arange(5)] * 2)
    ],
    "explorer": lambda model: alone(model, prompts_of(model, 1)[0])[0],
    "texts": lambda model: ContextLens.build(model, [f"a {word} cup" for word in ("red", "blue", "big", "")]).vectors,
}  # fmt: skip


def plainly(found):
    """Numbers and texts, on the CPU."""
    if isinstance(found, Tensor):
        return found.detach().cpu()
    return [plainly(each) for each in found] if isinstance(found, (list, tuple)) else found


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_gives_on_a_small_card_what_it_gives_without(measure, miniature):
    plain = plainly(MEASURES[measure](miniature))
    with on_card(miniature) as model, small_card(ROWS, miniature) as asked:
        found = plainly(MEASURES[measure](model))
    assert max(asked) > ROWS, "nothing had to be halved"
    if isinstance(plain[0], str):
        assert found == plain
    else:
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
