"""The sweep of Table 1 in one pass against the released protocol: every arm a run of its own, one question at a time.

Both ask the same questions of the same loaded model under the same eight arms. The released way recomputes vision
features, the lens and the group masks for every question, at batch 1 with eager attention; that it also loads the
model and the data again for every arm is not counted. Sinks are a stand-in, the highest norms among a picture's visual
tokens: a model without sinks would leave most arms nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import embedlens as el
from benchmarks.measure import compared, in_fresh_process, timed
from embedlens import tasks
from embedlens.groups import TokenGroups, reference_of, token_groups_of
from embedlens.sweep import BASELINE, Arm, generator, run_arms, sink_arms

RELEASED, OURS = "as released", "one sweep"
SHARE = 0.05  # of the visual tokens, for either kind of sink


def sweep(
    threads: int, per_family: int = 12, repeats: int = 3, batch_size: int = 32, model: str = "miniature"
) -> dict[str, Any]:
    """Time of both ways over all families, in a fresh process, and how many answers agree."""
    found = in_fresh_process(
        _times, threads, per_family=per_family, repeats=repeats, batch_size=batch_size, model=model
    )
    return {"model": model, "arms": len(sink_arms()), "batch_size": batch_size, **found}


def _times(per_family: int, repeats: int, batch_size: int, model: str) -> dict[str, Any]:
    vlm = el.load(model, device="cpu")
    reference_of(vlm)  # what tells groups apart is found once per model in both ways
    items = [item for family in tasks.FAMILIES for item in tasks.family_questions(family, per_family)]
    for item in items:
        item.sample.image  # noqa: B018 - drawing is no part of either way
    answers: dict[str, list[str]] = {}

    def ours() -> None:
        answers[OURS] = list(run_arms(vlm, items, sink_arms(), stand_ins, batch_size)["prediction"])

    def released() -> None:
        answers[RELEASED] = _one_by_one(vlm, items)

    ways = compared(timed({RELEASED: released, OURS: ours}, repeats), to=OURS)
    same = sum(a == b for a, b in zip(answers[OURS], answers[RELEASED], strict=True))
    return {"questions": len(items), "ways": ways, "same_answers": same / len(answers[OURS])}


def stand_ins(model: el.VisionLanguageModel, prompts: Sequence[el.Prompt]) -> list[TokenGroups]:
    """The model's own groups, at their own cost, then sinks by rank of the norm instead."""
    found = []
    for prompt, own in zip(prompts, token_groups_of(model, prompts), strict=True):
        ranks = prompt.embeds[prompt.visual].norm(dim=-1).argsort(descending=True).argsort().cpu()
        few = max(1, round(SHARE * len(ranks)))
        vit, llm = ranks < few, (ranks >= few) & (ranks < 2 * few)
        dead = own.dead & ~vit & ~llm
        found.append(TokenGroups(vit, llm, dead, ~(vit | llm | dead), own.met))
    return found


def _one_by_one(model: el.VisionLanguageModel, items: Sequence[tasks.Item]) -> list[str]:
    """Answers arm by arm, one question at a time; handed out in the order of `run_arms`."""
    with eager(model):
        by_arm = [[_alone(model, item, arm) for item in items] for arm in sink_arms()]
    return [text for of_item in zip(*by_arm, strict=True) for text in of_item]


def _alone(model: el.VisionLanguageModel, item: tasks.Item, arm: Arm) -> str:
    """One answer, with everything it needs computed for it alone."""
    prompt = model.prompt(item.sample.image, item.question.text)
    if arm is BASELINE:
        return model.answer(prompt, tasks.ANSWER_TOKENS)
    groups = stand_ins(model, [prompt])[0]
    plan = arm.act(groups, prompt.grid, generator(item.sample.id, arm.name, arm.seed))
    if not plan:
        return model.answer(prompt, tasks.ANSWER_TOKENS)
    with el.intervene(model, *plan):
        return model.answer(prompt, tasks.ANSWER_TOKENS)


@contextmanager
def eager(model: el.VisionLanguageModel) -> Iterator[None]:
    """Eager attention for the time of the block."""
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.hf.set_attn_implementation(before)


def lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, ratio, memory: rows of the printed table."""
    ratio = found["ways"][RELEASED]["ratio"]
    return [
        (
            f"Table 1 as released, {found['questions']} questions x {found['arms']} arms, times one sweep",
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
            "",
        )
    ]
