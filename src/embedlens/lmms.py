"""Interventions inside lmms-eval: what the plugin answers with, and a task on the miniature's questions.

On the command line:

    python -m lmms_eval --model embedlens --tasks pope,mme --batch_size auto \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,intervention=prune_dead

This module does not need lmms-eval; `lmms_model`, which its entry point leads to, does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedlens import samples, study
from embedlens.arms import Select
from embedlens.batches import in_batches
from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, discover, reference_of, token_groups_of
from embedlens.interventions import EnterAt, Intervention, Rescale, Silence
from embedlens.prefix import Case, answers
from embedlens.sweep import BASELINE, Arm, acted_on, everywhere, members, plan_of, pruning, random_alive, skipping

if TYPE_CHECKING:
    from PIL.Image import Image

    from embedlens.vlm import Prompt, VisionLanguageModel

MODEL = "embedlens"  # the name that lmms-eval knows the model by
CALIBRATION = 64  # pictures in which a model's groups are found
NEW_TOKENS = 128  # where a task does not say
DEAD, SINKS = ("dead",), ("LLM sink", "ViT sink")

#: Name → the tokens that are pruned, or skip sublayers.
SELECTED: Mapping[str, Select] = {
    "prune_dead": partial(members, names=DEAD),
    "prune_random": partial(random_alive, matched=DEAD),
    "prune_sinks": partial(members, names=SINKS),
    "prune_llm_sinks": partial(members, names=SINKS[:1]),
    "prune_vit_sinks": partial(members, names=SINKS[1:]),
    "skip_llm_sinks": partial(members, names=SINKS[:1]),
}
#: Name → what is done to all tokens, given a layer and a factor.
EVERYWHERE: Mapping[str, Callable[[int | None, float | None], Intervention]] = {
    "silence_attention": lambda layer, factor: Silence("attention"),
    "silence_mlp": lambda layer, factor: Silence("mlp"),
    "enter_at": lambda layer, factor: EnterAt(_given("layer", layer, "enter_at")),
    "rescale": lambda layer, factor: Rescale(_given("factor", factor, "rescale")),
}
INTERVENTIONS = ("none", *SELECTED, *EVERYWHERE)


def _given(name: str, value: Any, intervention: str) -> Any:
    if value is None:
        raise EmbedLensError(f"intervention={intervention} needs {name}: add {name}=… to --model_args")
    return value


def arm_of(intervention: str, seed: Any = 0, layer: Any = None, factor: Any = None) -> Arm:
    """The arm that `--model_args intervention=…` names.
    EmbedLensError: unknown intervention, or a number that is missing or not whole.

    >>> arm_of("prune_random", seed=3.0).seed
    3
    """
    if intervention not in INTERVENTIONS:
        raise EmbedLensError(f"unknown intervention {intervention!r}: use one of {', '.join(INTERVENTIONS)}")
    whole = {}
    for name, value in (("seed", seed), ("layer", layer)):
        if value is not None and (isinstance(value, (str, bool)) or value != int(value) or value < 0):
            raise EmbedLensError(f"{name} is {value!r}: pass a whole number, 0 or more")
        whole[name] = None if value is None else int(value)
    if intervention == "none":
        return BASELINE
    if intervention in EVERYWHERE:
        return everywhere(intervention, EVERYWHERE[intervention](whole["layer"], factor))
    if intervention.startswith("skip"):
        return skipping(intervention, SELECTED[intervention], at=(1.5,))
    return pruning(intervention, SELECTED[intervention], whole["seed"] or 0)


def batch_size_of(given: Any) -> int | str:
    """What `--batch_size` says: a number of questions, or "auto".

    >>> batch_size_of("4"), batch_size_of("auto")
    (4, 'auto')
    """
    if given == study.AUTO or (str(given).isdecimal() and int(given) > 0):
        return study.AUTO if given == study.AUTO else int(given)
    raise EmbedLensError(f"--batch_size {given}: pass a number of at least 1, or auto")


@dataclass(frozen=True)
class Asked:
    """One question."""

    picture: Any
    question: str
    key: int  #: Of the picture; what is random about the arm is seeded by it
    max_new_tokens: int
    stops: tuple[str, ...] = ()  #: The answer ends before the first of these


@dataclass(frozen=True)
class Said:
    """One answer, and on how many visual tokens of its picture the intervention acted."""

    text: str
    tokens: int


class Answerer:
    """A model that answers under one arm, and counts questions `asked`, those whose picture the arm `acted` on, and the
    visual `tokens` that it acted on in all. `batch_size` questions are answered together, or as many as fit."""

    def __init__(
        self, model: VisionLanguageModel, arm: Arm, calibration: str | None = None, batch_size: int | str = study.AUTO
    ) -> None:
        self.model, self.arm = model, arm
        self.asked = self.acted = self.tokens = 0
        most = study.ON_CPU if model.device.type == "cpu" else study.LARGEST
        self.batch_size = most if isinstance(batch_size, str) else batch_size
        self._reference: Reference | None = None
        if arm.name in SELECTED:
            drawn = samples.load(calibration, CALIBRATION) if calibration else None
            self._reference = discover(model, drawn) if drawn else reference_of(model)

    def answers(self, questions: Sequence[Any], read: Callable[[Any], Asked] = lambda one: one) -> Iterator[Said]:
        """The greedy answers in the order of the questions, which `read` makes of what is given a batch at a time.
        EmbedLensError: an empty answer, which no benchmark may count as a wrong one, or an intervention that was to act
        and did not."""

        def run(_: int, batch: Sequence[Any]) -> Iterator[Said]:
            for _, alike in groupby(map(read, batch), key=lambda one: one.max_new_tokens):
                yield from self._said(list(alike))

        for said in in_batches(run, questions, self.batch_size):
            self.asked += 1
            self.acted += said.tokens > 0
            self.tokens += said.tokens
            yield said

    def _said(self, batch: Sequence[Asked]) -> list[Said]:
        prompts = self.model.prompts([one.picture for one in batch], [one.question for one in batch])
        plans = self._plans(prompts, [one.key for one in batch])
        cases = [Case(prompt, plan) for prompt, plan in zip(prompts, plans, strict=True)]
        texts = answers(self.model, cases, batch[0].max_new_tokens, len(batch))
        found = []
        for one, case, text in zip(batch, cases, texts, strict=True):
            text = until(text, one.stops)
            if not text:
                raise EmbedLensError(
                    f"the answer to {one.question[:60]!r} about picture {one.key} is empty, and no score counts it as "
                    "a wrong one: allow more new tokens, or choose another intervention"
                )
            found.append(Said(text, acted_on(case.plan, len(case.prompt.grid))))
        return found

    def _plans(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[tuple[Intervention, ...]]:
        """What is done to each picture; nothing where the arm finds nothing to act on."""
        groups: Sequence[Any] = [None] * len(prompts)  # an arm that does the same to all tokens looks at none
        if self._reference is not None:
            groups = token_groups_of(self.model, prompts, self._reference)
        return [
            tuple(plan_of(self.arm, key, own, prompt.grid))  # type: ignore[arg-type]  # no arm here asks another prompt
            for own, prompt, key in zip(groups, prompts, keys, strict=True)
        ]

    def report(self) -> str:
        """How often the arm acted, in one sentence. EmbedLensError: it never did, so that all scores are the
        baseline's."""
        if self.arm.name == BASELINE.name:
            return f"{self.asked} answers without an intervention"
        if self.asked and not self.acted:
            raise EmbedLensError(
                f"{self.arm.name} found nothing to act on in any of {self.asked} pictures, so the scores would be the "
                "plain model's: run intervention=none, or choose another"
            )
        mean = self.tokens / self.acted if self.acted else 0.0
        return (
            f"{self.arm.name} (seed {self.arm.seed}) acted on {self.acted} of {self.asked} pictures, on {mean:.1f} "
            "visual tokens each; pruned positions keep their gaps, and the cache is short at every layer"
        )


def until(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop, without spaces around it.

    >>> until("a dog\\n\\nis here", ["\\n\\n"])
    'a dog'
    """
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text.strip()


def generation(kwargs: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """(new tokens, stops) of a task's `generation_kwargs`; only greedy decoding is supported. EmbedLensError: the task
    samples or searches beams."""
    if kwargs.get("do_sample") or (kwargs.get("temperature") or 0) > 0 or (kwargs.get("num_beams") or 1) > 1:
        raise EmbedLensError("answers here are greedy: pass --gen_kwargs do_sample=false,temperature=0,num_beams=1")
    stops = kwargs.get("until") or ()
    return int(kwargs.get("max_new_tokens") or NEW_TOKENS), (stops,) if isinstance(stops, str) else tuple(stops)


def one_question(messages: Sequence[Mapping[str, Any]]) -> tuple[Image, str]:
    """Picture and text of one user turn, as this package asks them: the picture first. EmbedLensError: several turns,
    no picture or several, a video, or sound."""
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) != 1 or turns[0]["role"] != "user" or len(turns) != len(messages):
        raise EmbedLensError("the task has several turns or a system prompt: choose tasks of one question a picture")
    parts = turns[0]["content"]
    pictures = [part["url"] for part in parts if part["type"] == "image"]
    other = [part["type"] for part in parts if part["type"] not in ("image", "text")]
    if len(pictures) != 1 or other:
        what = ", ".join(other) or f"{len(pictures)} pictures"
        raise EmbedLensError(f"a question comes with {what}: choose tasks with one picture a question")
    return pictures[0], "\n".join(part["text"] for part in parts if part["type"] == "text").strip()


def judges(task: str, folder: Path) -> set[str]:
    """Names of keys one of which a task's scoring needs, as a judge behind a service reads the answers; {}: none.
    `folder`: lmms-eval's `tasks`. What a task's YAML names, and what that imports beside it, is searched for keys."""
    files = (file for file in folder.rglob("*.yaml") if re.search(_NAMED, file.read_text("utf-8")))
    for file in files:
        text = file.read_text("utf-8")
        if task not in re.findall(_NAMED, text):
            continue
        parts = [file.parent / part for part in re.findall(r"(?m)^include: *(\S+)", text)]
        text += "".join(part.read_text("utf-8") for part in parts if part.is_file())
        modules, code = re.findall(r"!function (\w+)\.", text), {}
        while modules:
            module = file.parent / f"{modules.pop()}.py"
            if module not in code and module.is_file():
                code[module] = module.read_text("utf-8")
                modules += re.findall(r"(?m)^from [\w.]*\b(\w+) import", code[module])
        read = "".join(code.values())
        keys = set(re.findall(r"(?:getenv\(|environ\.get\(|environ\[)\s*[\"'](\w*KEY\w*)", read))
        return keys | ({"OPENAI_API_KEY"} if "llm_judge" in read else set())
    return set()


_NAMED = r"(?m)^task: *[\"']?([\w+-]+)"


def check_keys(tasks_asked: Iterable[str], folder: Path) -> None:
    """Say before anything runs that a key is missing: without it every answer would be scored as a wrong one.
    EmbedLensError: a task is scored by a judge, and none of its keys is set."""
    for task in tasks_asked:
        keys = judges(task, folder)
        if keys and not any(os.environ.get(key) for key in keys):
            raise EmbedLensError(
                f"{task} is scored by a judge and {' or '.join(sorted(keys))} is not set: leave it out"
            )


def manifests() -> Any:
    """What lmms-eval's entry point asks for: the model's name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(MODEL, chat_class_path="embedlens.lmms_model.EmbedLensModel")]
