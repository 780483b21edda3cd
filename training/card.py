"""For a model card: what a model answers about its own pictures and about others', and how its training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from embedlens import figures, stats
from embedlens.prefix import Case
from embedlens.prefix import answers as answered
from embedlens.samples import Sample
from embedlens.stats import Estimate
from embedlens.tasks import ANSWER_TOKENS, Item, said_yes, score
from embedlens.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ABOUT = ("own picture", "another picture")
NO_SHARE = ("caption", "captioning", "contrastive", "loss", "bos", "peak")  # what training logs beside shares


def with_another(items: Sequence[Item]) -> list[Sample]:
    """The pictures of one kind of question; each is asked its own question and that of the picture half the list away.

    >>> from embedlens.tasks import questions
    >>> first, second = with_another(questions("colour", 2))
    >>> first.questions[0] == second.questions[1]
    True
    """
    away = len(items) // 2
    other = [items[place - away].question for place in range(len(items))]
    return [
        replace(item.sample, questions=(item.question, swapped)) for item, swapped in zip(items, other, strict=True)
    ]


def answers(model: VisionLanguageModel, batch: Sequence[Sample]) -> list[list[dict[str, Any]]]:
    """A study of pictures from `with_another`: a row for each question, the picture's own and the other's.

    Columns: kind, about ("own picture" or "another picture"), question, answer, prediction, correct (1.0 or 0.0). A
    picture passes through the model once for both questions.
    """
    prompts = model.prompts([sample.image for sample in batch], [sample.questions[0].text for sample in batch])
    asked = [
        (prompt, *(model.asked(prompt, question.text) for question in sample.questions[1:]))
        for prompt, sample in zip(prompts, batch, strict=True)
    ]
    predictions = iter(answered(model, [Case(one) for own in asked for one in own], ANSWER_TOKENS, len(batch)))
    return [
        [
            {
                "kind": question.kind,
                "about": about,
                "question": question.text,
                "answer": question.answer,
                "prediction": (prediction := next(predictions)),
                "correct": score(question, prediction),
            }
            for question, about in zip(sample.questions, ABOUT, strict=False)
        ]
        for sample in batch
    ]


def untrained(model: VisionLanguageModel, seed: int = 0) -> VisionLanguageModel:
    """The same architecture with random weights."""
    torch.manual_seed(seed)
    hf = type(model.hf)(model.hf.config).float().to(model.device)
    return VisionLanguageModel(hf, model.processor, "untrained", model.preprocessing)


def rate(rows: pd.DataFrame, f1: bool = False, seed: int = 0) -> Estimate:
    """Share of right answers with its exact interval; or POPE's F1 of "yes" with a bootstrap over pictures."""
    if not f1:
        return stats.share(int(rows.correct.sum()), len(rows), "questions")
    yes, said = rows.answer == "yes", rows.prediction.map(said_yes)
    parts = rows.assign(both=2.0 * (yes & said), asked=yes.astype(int) + said)
    return stats.estimate(stats.drawn(parts, "both", over="asked", seed=seed))


AXES = {"left": "horizontal", "right": "horizontal", "above": "vertical", "below": "vertical"}


def relation_parts(rows: pd.DataFrame) -> tuple[Estimate, Estimate]:
    """Answers about two objects, taken apart: how often the axis is right, and of those the end of it.

    >>> rows = pd.DataFrame({"answer": ["left", "left"], "prediction": ["Right", "above"]})
    >>> axis, end = relation_parts(rows)
    >>> axis.value, end.value
    (0.5, 0.0)
    """
    said = rows.prediction.str.strip().str.lower()
    axis = rows.answer.map(AXES) == said.map(AXES)
    end = (said == rows.answer)[axis]
    return stats.share(int(axis.sum()), len(rows), "questions"), stats.share(int(end.sum()), len(end), "questions")


def curves(stages: Mapping[str, Any]) -> pd.DataFrame:
    """What was logged while a model trained, tidy: stage, samples (thousands), minutes, quantity, value.

    Quantities: "loss", and what was measured on held-out samples under its own name: shares of right answers, and
    of signs of sinks the largest over blocks, "bos" (attention of text on BOS) and "peak" (|x| / RMS).

    >>> run = {"log": [{"samples": 2000, "seconds": 90, "heldout/object": 0.5, "heldout/bos": [0.1, 0.2], "loss": 3.0}]}
    >>> curves({"tower": run})[["minutes", "quantity", "value"]].values.tolist()
    [[1.5, 'object', 0.5], [1.5, 'bos', 0.2], [1.5, 'loss', 3.0]]
    """
    rows = [
        (stage, entry["samples"] / 1000, entry["seconds"] / 60, name.removeprefix("heldout/"), np.max(value))
        for stage, run in stages.items()
        for entry in run["log"]
        for name, value in entry.items()
        if name == "loss" or name.startswith("heldout/")
    ]
    return pd.DataFrame(rows, columns=["stage", "samples", "minutes", "quantity", "value"])


def panels(
    rows: pd.DataFrame,
    title: str,
    model: str,
    of: str,
    by: str = "stage",
    x: str = "samples",
    log: Mapping[str, Any] | None = None,
    **look: Any,
) -> dict[str, Axes]:
    """Draw `curves`, a panel to each value of the column `by`, two in a row, over thousand samples or minutes.

    Args:
        title: the message, above all panels.
        model: whose training it was; with `of` it signs the figure.
        log: `training.json`, for a dotted line where a further training of a stage began.
        look: for `seaborn.lineplot`, such as hue; its legend stands once, beside the panels.
    """
    import seaborn as sns
    from matplotlib import pyplot as plt

    parts = dict(list(rows.groupby(by, sort=False)))
    fig, places = plt.subplots(-(-len(parts) // 2), 2, figsize=(figures.WIDTH, 1.4 * len(parts)), squeeze=False)
    drawn = dict(zip(parts, places.flat, strict=False))
    named: dict[str, Any] = {}
    for name, axes in drawn.items():
        sns.lineplot(parts[name], x=x, y="value", errorbar=None, ax=axes, **look)
        axes.set(title=name, xlabel="thousand samples" if x == "samples" else x, ylabel="")
        for at in resumed(log, name) if log else ():
            axes.axvline(at, color=figures.CHANCE, linestyle=":", linewidth=1.2)
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    if "hue" in look:
        for axes in drawn.values():
            axes.get_legend().remove()
        fig.legend(named.values(), named, loc="outside right center", fontsize=9)
    figures.headline(fig, title)
    figures.sign(fig, model, of)
    return drawn


def resumed(log: Mapping[str, Any], stage: str) -> list[float]:
    """Thousand samples at which further trainings of a stage began, as `training.json` tells its history."""
    steps = [entry["step"] for entry in log.get("history", []) if entry["stage"] == stage and entry.get("further")]
    entries = log["stages"][stage]["log"]
    return [max((e["samples"] for e in entries if e["step"] <= step), default=0) / 1000 for step in steps]


def runs(of: Mapping[str, Any], shown: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Trainings, one row each: steps, samples, minutes, and of what was logged its first and last value.

    Args:
        of: name → run, as `training.json` keeps stages and experiments.
        shown: quantity of `curves` → format, of those to show; "–" where it was not logged.

    >>> log = [{"samples": s, "seconds": s, "heldout/box": s / 64} for s in (16, 64)]
    >>> run = {"steps": 4, "seconds": 150, "log": log}
    >>> runs({"tuning": run}, {"box": ".2f", "bos": ".2f"}).iloc[0, 3:].tolist()
    ['0.25 to 1.00', '–']
    """
    rows = {}
    for name, run in of.items():
        logged = {quantity: found.value.tolist() for quantity, found in curves({name: run}).groupby("quantity")}
        rows[name] = {
            "steps": run["steps"],
            "samples": run["log"][-1]["samples"],
            "minutes": round(run["seconds"] / 60),
        } | {
            quantity: f"{logged[quantity][0]:{form}} to {logged[quantity][-1]:{form}}" if quantity in logged else "–"
            for quantity, form in (shown or {}).items()
        }
    return pd.DataFrame(rows.values(), index=pd.Index(rows, name="training"))
