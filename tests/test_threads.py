"""Promises about threads: several on one model get what one alone gets, bit for bit, whatever the others do to it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from stock import picture
from test_interventions import ARMS, prompts_of, random_mask, state

import embedlens as el
from embedlens import EmbedLensError, Prune, intervene, prefix, redundancy


@pytest.fixture
def eager_threads():
    """Threads take turns as often as they can, so that a race shows."""
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(jobs, rounds: int = 3):
    """What each job gives, run `rounds` times in a pool with all the others."""
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(job) for _ in range(rounds) for job in jobs]
        return [future.result(timeout=120) for future in futures]


def same(seen, alone, rounds: int = 3) -> None:
    for one, other in zip(seen, alone * rounds, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def reading(model):
    """Everything that runs the model and reads it, as jobs."""
    prompts = prompts_of(model, 3)
    cases = [prefix.Case(prompt, plan) for prompt in prompts for plan in ((), (Prune(random_mask(prompt)),))]
    jobs = [lambda: model.visual_features_of([picture(seed=7)])[0], lambda: prefix.answers(model, cases, 4)]
    for prompt in prompts:
        jobs += [
            lambda prompt=prompt: model.hidden_states(prompt),
            lambda prompt=prompt: model.logits(prompt),
            lambda prompt=prompt: el.trace(model, prompt, {"seen": prompt.visual}).attention["seen"],
            lambda prompt=prompt: torch.stack(model.tower_states_of([prompt])),
            lambda prompt=prompt: redundancy.readings_of(model, prompt, [0, 5]).alone.argmax(-1),
        ]
    return jobs


def test_threads_read_what_one_thread_reads_of_one_model_and_of_two(tiny, tiny_folder, eager_threads):
    other, second = tiny.with_preprocessing("stretch"), el.load(tiny_folder, device="cpu")
    assert other.lock is tiny.lock and second.lock is not tiny.lock
    jobs = [job for model in (tiny, other, second) for job in reading(model)]
    alone, before = [job() for job in jobs], state(tiny)
    same(in_threads(jobs), alone)
    assert state(tiny) == before


def test_an_intervention_is_of_its_own_thread(tiny, eager_threads):
    prompts = prompts_of(tiny, 3)
    mask = random_mask(prompts[0])

    def intervened(name):
        def job():
            with intervene(tiny, *ARMS[name]([mask])) as run:
                return torch.cat([tiny.logits(prompts[0])[-1], torch.tensor([float(run.fired)])])

        return job

    jobs = [intervened(name) for name in ARMS] + [lambda prompt=prompt: tiny.logits(prompt) for prompt in prompts]
    alone, before = [job() for job in jobs], state(tiny)
    same(in_threads(jobs), alone)
    assert state(tiny) == before


def test_in_a_block_another_thread_runs_the_plain_model_without_waiting_for_its_end(tiny):
    (prompt,) = prompts_of(tiny, 1)
    plain = tiny.logits(prompt)
    with ThreadPoolExecutor(1) as pool, intervene(tiny, Prune(random_mask(prompt))) as run:
        assert torch.equal(pool.submit(tiny.logits, prompt).result(timeout=60), plain) and run.fired == 0
        assert len(tiny.logits(prompt)) < len(plain)
    message = "Prune never acted: run a prompt that it changes in the block, in the same thread"
    with ThreadPoolExecutor(1) as pool, pytest.raises(EmbedLensError, match=message):
        with intervene(tiny, Prune(random_mask(prompt))):
            pool.submit(tiny.logits, prompt).result(timeout=60)


def test_a_block_that_ends_in_another_thread_has_ended(tiny):
    """As generators do that a server closes in another thread."""
    (prompt,) = prompts_of(tiny, 1)
    before, plain = state(tiny), tiny.logits(prompt)
    stack = ExitStack()
    stack.enter_context(intervene(tiny, Prune(random_mask(prompt))))
    assert len(tiny.logits(prompt)) < len(plain)
    ending = threading.Thread(target=stack.close)
    ending.start()
    ending.join(timeout=60)
    assert not ending.is_alive() and state(tiny) == before
    assert torch.equal(tiny.logits(prompt), plain)
