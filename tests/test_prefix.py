"""Answers that share the beginning of their prompts are those of each prompt alone, token by token."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import compress

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from twins import BY_FAMILY

import embedlens as el
from embedlens import EmbedLensError, EnterAt, LeaveAt, Prune, ReleasedLayer0, Rescale, Silence, prefix
from embedlens.interventions import SkipSublayers
from embedlens.prefix import Case

QUESTIONS = (
    "What is it?",
    "Is there a red dog on the green grass?",
    "How many cats are there in the picture, and how many of them are blue?",
)
N_TOKENS = 5


@pytest.fixture
def ids(monkeypatch):
    """Answers as token ids: two answers may differ where their texts do not."""

    def of(model):
        pad = model.tokenizer.pad_token_id

        def written(rows, **options):
            kept = [[int(token) for token in row if int(token) != pad] for row in rows]
            return [" ".join(map(str, row)) for row in kept]

        monkeypatch.setattr(type(model.tokenizer), "batch_decode", lambda self, rows, **options: written(rows))
        monkeypatch.setattr(type(model.tokenizer), "decode", lambda self, row, **options: written([row])[0])

    return of


def prompts_of(model, n_pictures: int = 3, n_questions: int = 3):
    """Picture by picture, its questions of unequal lengths."""
    pictures = [sample.image for sample in el.samples.load("miniworld", n=n_pictures)]
    first = model.prompts(pictures, [QUESTIONS[0]] * n_pictures)
    more = QUESTIONS[1:n_questions]
    return [prompt for one in first for prompt in (one, *(model.asked(one, question) for question in more))]


def drawn(rng, n: int) -> torch.Tensor:
    mask = torch.from_numpy(rng.random(n) < rng.uniform(0.05, 0.9))
    mask[torch.from_numpy(rng.choice(n, 2, replace=False))] = torch.tensor([True, False])
    return mask


def alone(model, case: Case, max_new_tokens: int = N_TOKENS) -> str:
    """One answer, by nothing but the stock model and its own `generate`."""
    if not case.plan:
        return model.answer(case.prompt, max_new_tokens)
    with el.intervene(model, *case.plan):
        return model.answer(case.prompt, max_new_tokens)


def test_every_kind_of_intervention_answers_the_same(tiny, ids):
    ids(tiny)
    prompts = prompts_of(tiny, 2, 2)
    n, rng = len(prompts[0].grid), np.random.default_rng(0)
    plans = [
        (),
        (Prune(drawn(rng, n)),),
        (Prune(drawn(rng, n), positions="renumber"),),
        (SkipSublayers(drawn(rng, n), at=[0.5, 1, 1.5]),),
        (Silence("attention"),),
        (Silence("mlp", layers=[tiny.n_layers - 1]),),
        (Silence("mlp", rows="text"),),
        (EnterAt(2),),
        (LeaveAt(drawn(rng, n), 2),),
        (LeaveAt(drawn(rng, n), 1, "renumber"), LeaveAt(drawn(rng, n), 2, "renumber")),
        (Rescale(0.1),),
        (Silence("attention"), ReleasedLayer0()),
        (Prune(drawn(rng, n)), SkipSublayers(drawn(rng, n), at=[0]), EnterAt(2), Rescale(2)),
    ]
    cases = [Case(prompt, plan, str(number % 2)) for number, plan in enumerate(plans) for prompt in prompts]
    rng.shuffle(cases)
    expected = [alone(tiny, case) for case in cases]
    assert len(set(expected)) > 4
    try:
        for kernel, batch_size in (("sdpa", 5), ("sdpa", 32), ("eager", 5)):
            tiny.hf.set_attn_implementation(kernel)
            able = [kernel == "sdpa" or ReleasedLayer0() not in case.plan for case in cases]
            assert prefix.answers(tiny, [*compress(cases, able)], N_TOKENS, batch_size) == [*compress(expected, able)]
            assert prefix._SHARING.pop(tiny)  # found anew for the other kernel
    finally:
        tiny.hf.set_attn_implementation("sdpa")


@pytest.mark.parametrize("family", BY_FAMILY)
def test_every_family_answers_the_same(twin_of, ids, family):
    _, model = twin_of(BY_FAMILY[family])
    ids(model)
    prompts = prompts_of(model, 2, 2)
    rng = np.random.default_rng(0)
    masks = {id(p.pixel_values): drawn(rng, len(p.grid)) for p in prompts}
    plans = [[(), (Prune(masks[id(p.pixel_values)]),), (Silence("mlp"), Rescale(0.5))] for p in prompts]
    cases = [Case(prompt, plan) for prompt, own in zip(prompts, plans, strict=True) for plan in own]
    assert prefix.answers(model, cases, 4) == [alone(model, case, 4) for case in cases]
    plain = prompts[0].positions is None and prompts[0].deep is None
    assert prefix._SHARING.get(model, False) == plain  # those that can share do


def test_answers_that_end_early_change_no_other(tiny, ids, monkeypatch):
    ids(tiny)
    vocabulary = tiny.hf.get_output_embeddings().out_features
    monkeypatch.setattr(tiny.hf.generation_config, "eos_token_id", list(range(2, vocabulary, 3)))
    left, select = [], DynamicCache.batch_select_indices
    monkeypatch.setattr(
        DynamicCache, "batch_select_indices", lambda cache, rows: left.append(len(rows)) or select(cache, rows)
    )
    rng = np.random.default_rng(1)
    cases = [Case(p, plan) for p in prompts_of(tiny, 6) for plan in ((), (Prune(drawn(rng, len(p.grid))),))]
    found = prefix.answers(tiny, cases, 12)
    assert found == [alone(tiny, case, 12) for case in cases]
    assert len({len(answer.split()) for answer in found}) > 3 and left  # rows that have ended leave the batch


def test_pictures_that_come_first_in_the_prompt_have_nothing_before_them_to_share(tiny, ids):
    ids(tiny)
    prompts = []
    for prompt in prompts_of(tiny):
        first = int(prompt.visual.int().argmax())
        parts = {name: getattr(prompt, name)[first:] for name in ("ids", "embeds", "visual")}
        prompts.append(replace(prompt, **parts))
    mask = drawn(np.random.default_rng(0), len(prompts[0].grid))
    mask[0] = True
    cases = [Case(prompt, plan) for prompt in prompts for plan in ((), (Prune(mask),), (Rescale(2.0),))]
    assert prefix.answers(tiny, cases, N_TOKENS) == [alone(tiny, case) for case in cases]


def test_what_prompts_have_in_common_runs_once(tiny):
    prompts = prompts_of(tiny, n_pictures=2)
    assert prefix._remembers(tiny, prompts[0])
    mask = drawn(np.random.default_rng(0), len(prompts[0].grid))
    plans = (), (Silence("mlp"),), (Prune(mask.clone()),), (EnterAt(1),), (LeaveAt(mask, 1),)
    cases = [Case(prompt, plan) for prompt in prompts for plan in plans]
    counts = []
    hook = tiny.blocks[0].register_forward_hook(
        lambda module, args, out: counts.append((out if isinstance(out, torch.Tensor) else out[0]).shape[:2])
    )
    try:
        prefix.answers(tiny, cases, 1, batch_size=64)
    finally:
        hook.remove()
    end, longest = prefix._end(prompts[0]), max(map(len, prompts))
    asked = sum(len(prompt) - end for prompt in prompts[:3])
    leaving = (6, longest)  # goes on behind the picture, so that nothing is shared
    remembered = [(2, end), (2, end), (2, end - int(mask.sum())), (2, end)]
    # three questions a picture in one row, those that see it late by themselves
    assert list(map(tuple, counts)) == [leaving, *remembered, (6, asked), (2, asked)]


def asked_without_sharing(model, monkeypatch) -> list[int]:
    monkeypatch.setattr(prefix, "_SHARING", weakref.WeakKeyDictionary())
    asked = []
    answers = model.answers
    monkeypatch.setattr(model, "answers", lambda prompts, *rest: asked.append(len(prompts)) or answers(prompts, *rest))
    return asked


def test_answers_are_greedy_whatever_the_generation_config_of_the_checkpoint_says(tiny, ids, monkeypatch):
    ids(tiny)
    prompts = prompts_of(tiny)
    cases = [Case(prompt, plan) for prompt in prompts for plan in ((), (Silence("mlp"),))]
    plain = [alone(tiny, case) for case in cases]
    own = tiny.hf.generation_config
    monkeypatch.setattr(own, "repetition_penalty", 5.0)
    monkeypatch.setattr(own, "suppress_tokens", list(range(0, len(tiny.tokens), 2)))
    asked = asked_without_sharing(tiny, monkeypatch)
    assert [alone(tiny, case) for case in cases] == plain and sum(asked) == len(cases)
    assert prefix.answers(tiny, cases, N_TOKENS, batch_size=1) == plain and sum(asked) == len(cases)
    assert tiny.hf.generation_config is own


def test_a_model_whose_picture_sees_what_follows_is_found_out(tiny, ids, monkeypatch):
    ids(tiny)
    asked = asked_without_sharing(tiny, monkeypatch)

    def looks_ahead(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        mixed = states + states.flip(1).cumsum(1).flip(1) / states.shape[1]
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    hook = tiny.blocks[1].register_forward_hook(looks_ahead)
    try:
        cases = [Case(prompt) for prompt in prompts_of(tiny, 1)]
        found = prefix.answers(tiny, cases, 1, batch_size=1)
        assert sum(asked) == len(cases)
        assert found == [alone(tiny, case, 1) for case in cases]
    finally:
        hook.remove()


def test_an_intervention_around_it_acts_and_nothing_is_shared(tiny, ids, monkeypatch):
    ids(tiny)
    prompts = prompts_of(tiny, 2)
    asked = asked_without_sharing(tiny, monkeypatch)
    with el.intervene(tiny, Rescale(3.0)):
        found = prefix.answers(tiny, [Case(prompt) for prompt in prompts], N_TOKENS)
    assert sum(asked) == len(prompts)
    assert found == [alone(tiny, Case(prompt, (Rescale(3.0),))) for prompt in prompts]


def test_what_cannot_be_answered_is_refused_and_leaves_the_model_as_it_was(tiny):
    def hooks():
        return [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in tiny.blocks]

    prompts, before = prompts_of(tiny, 1), hooks()  # stock blocks keep hooks once they were asked for hidden states
    assert prefix.answers(tiny, []) == []
    with pytest.raises(EmbedLensError, match="the mask has shape"):
        prefix.answers(tiny, [Case(prompts[0], (Prune(torch.tensor([True, False])),))])
    broken = tiny.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prefix.answers(tiny, [Case(prompts[0], (Silence("mlp"),))])
    broken.remove()
    assert tiny.intervention is None
    assert hooks() == before
