"""A task of lmms-eval on the miniature's questions: written for `--include_path`, this file beside it as its functions.

    write_task("miniature-task", kinds=["colour", "count", "word"], n=100)  # then --tasks embedlens_miniature

The questions stand in the words of the miniature. Other models, whose authors ask and write boxes in other words, are
asked in theirs by `tasks.evaluate` and `sweep.run_arms`, not here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from embedlens import tasks

TASK = "embedlens_miniature"

YAML = """\
# A task of lmms-eval: {n} held-out questions of each kind about drawn pictures, seed {seed}. Run it with
#   python -m lmms_eval --model embedlens --tasks {task} --include_path <this folder>
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures_of
doc_to_text: !function utils.text_of
doc_to_target: answer
process_results: !function utils.scored
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: right
    aggregation: !function utils.mean
    higher_is_better: true
metadata:
  - version: 1.0
"""


def write_task(folder: Path | str, kinds: Sequence[str], n: int = 20, seed: int = 0) -> Path:
    """Write YAML, questions, and the functions that it names; pictures are drawn on use.

    Args:
        kinds: of `tasks.KINDS`.
        n: questions of each.

    Returns:
        The YAML file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    questions = folder / "questions.jsonl"
    docs = [
        {"kind": kind, "n": n, "seed": seed, "place": place}
        | {"question": item.question.text, "answer": item.question.answer}
        for kind in kinds
        for place, item in enumerate(tasks.questions(kind, n, seed))
    ]
    questions.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    (folder / "utils.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    text = YAML.format(task=TASK, n=n, seed=seed, questions=questions.resolve(), tokens=tasks.ANSWER_TOKENS)
    file = folder / f"{TASK}.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@cache
def _items(kind: str, n: int, seed: int) -> tuple[tasks.Item, ...]:
    return tuple(tasks.questions(kind, n, seed))


def pictures_of(doc: Mapping[str, Any]) -> list[Any]:
    """doc_to_visual: the picture of a question."""
    return [_items(doc["kind"], doc["n"], doc["seed"])[doc["place"]].sample.image]


def text_of(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """doc_to_text: the question."""
    return doc["question"]


def scored(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """process_results: 1 for a right answer, as `tasks.score` has it."""
    return {"right": tasks.score(_items(doc["kind"], doc["n"], doc["seed"])[doc["place"]].question, results[0])}


def mean(values: Sequence[float]) -> float:
    """aggregation."""
    return sum(values) / len(values)
