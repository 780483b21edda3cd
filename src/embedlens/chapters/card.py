"""The model card's measurements and figures: what a miniature answers, against bars and controls, and how it learned.

The bars were set before the first miniature was trained; they are not lowered here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from embedlens import figures, tasks
from embedlens.errors import EmbedLensError
from embedlens.intervals import Interval, ratio_interval
from embedlens.vlm import VisionLanguageModel

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

UNTRAINED_SHARE = 4  # random weights are asked one question in so many


@dataclass(frozen=True)
class Bar:
    """What a kind of question is called, the bar set for it, and the level that guessing must stay near."""

    asked: str
    bar: float
    near: float


BARS: Mapping[str, Bar] = {
    "object": Bar("name an object", 0.85, 0.02),
    "colour": Bar("colour of an object", 0.90, 0.10),
    "text_colour": Bar("colour of the text", 0.90, 0.10),
    "existence": Bar("is there a ...? (POPE, F1)", 0.92, 0.50),
    "count": Bar("how many, 1 to 4", 0.65, 0.25),
    "where": Bar("where, 3 x 3 regions", 0.75, 0.11),
    "relation": Bar("left, right, above, below", 0.80, 0.50),
    "box": Bar("give the box (IoU of 0.5)", 0.50, 0.05),
    "character": Bar("read one character", 0.80, 0.02),
    "word": Bar("read a held-out word", 0.40, 0.00),
    "one_patch": Bar("object within one patch", 0.40, 0.02),
}
LEARNS = {
    "tower": ("vision tower", "captions: contrastive and captioning loss"),
    "language": ("language model", "descriptions in words, and questions about them"),
    "alignment": ("projector", "captions of pictures"),
    "tuning": ("projector, language model", "questions about pictures"),
}


def parts_table(model: VisionLanguageModel) -> pd.DataFrame:
    """Layers, width, heads and parameters of each part."""
    import pandas as pd

    vision, text = model.hf.config.vision_config, model.hf.config.text_config
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.hf.model.named_children()}
    head = sum(p.numel() for p in model.hf.lm_head.parameters())
    rows = [
        ("vision tower", vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads, "vision_tower"),
        ("projector", 2, text.hidden_size, "–", "multi_modal_projector"),
        ("language model", text.num_hidden_layers, text.hidden_size, text.num_attention_heads, "language_model"),
    ]
    table = [(*row[:-1], count[row[-1]]) for row in rows] + [("output head", 1, text.hidden_size, "–", head)]
    return pd.DataFrame(table, columns=["part", "layers", "width", "heads", "parameters"]).set_index("part")


def untrained(model: VisionLanguageModel, seed: int = 0) -> VisionLanguageModel:
    """The same architecture with random weights."""
    import torch

    torch.manual_seed(seed)
    hf = type(model.hf)(model.hf.config).float().to(model.device)
    return VisionLanguageModel(hf, model.processor, "untrained", model.preprocessing)


def rate(answers: pd.DataFrame, kind: str, seed: int = 0) -> Interval:
    """Share of right answers with Wilson's interval; for existence POPE's F1 with a bootstrap over pictures."""
    from scipy.stats import binomtest

    if kind == "existence":
        yes = (answers.answer == "yes").to_numpy()
        said = (answers.prediction.str.lower() == "yes").to_numpy()
        return ratio_interval(2.0 * (yes & said), yes.astype(int) + said, seed=seed)
    right = int(answers.correct.sum())
    found = binomtest(right, len(answers)).proportion_ci(method="wilson")
    return Interval(*(np.array(value) for value in (right / len(answers), found.low, found.high)))


AXES = {"left": "horizontal", "right": "horizontal", "above": "vertical", "below": "vertical"}


def relation_parts(answers: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Answers about two objects, taken apart.

    Returns:
        whether each answer is of the right axis (left and right, or above and below); for those that are, whether it is
        the right end of it.

    >>> import pandas as pd
    >>> axis, end = relation_parts(pd.DataFrame({"answer": ["left", "left"], "prediction": ["Right", "above"]}))
    >>> axis.tolist(), end.tolist()
    ([True, False], [False])
    """
    said = answers.prediction.str.strip().str.lower()
    axis = answers.answer.map(AXES) == said.map(AXES)
    return axis, (said == answers.answer)[axis]


def ask(
    model: VisionLanguageModel, items: Mapping[str, Sequence[tasks.Item]], seed: int = 0
) -> dict[tuple[str, str], pd.DataFrame]:
    """(kind, arm of `figures.ARMS`) → answers: the model, the model with another picture, random weights."""
    random_weights = untrained(model, seed)
    answers = {}
    for kind, asked in items.items():
        answers[kind, "miniature"] = tasks.evaluate(model, asked)
        answers[kind, "another picture"] = tasks.evaluate(model, asked, swap=True)
        answers[kind, "untrained"] = tasks.evaluate(random_weights, asked[: max(2, len(asked) // UNTRAINED_SHARE)])
    return answers


def verdict(found: Interval, bar: float) -> str:
    """Is the bar reached, and does the interval agree?

    >>> verdict(Interval(np.array(0.9), np.array(0.8), np.array(0.95)), 0.85)
    'reached, interval extends below'
    """
    if found.value >= bar:
        return "reached" if found.low >= bar else "reached, interval extends below"
    return "not reached" if found.high < bar else "not reached, interval extends above"


def quality_table(
    answers: Mapping[tuple[str, str], pd.DataFrame], measured: Mapping[tuple[str, str], Interval]
) -> pd.DataFrame:
    """Per cent right by kind of question: the model, its bar, and the controls."""
    import pandas as pd

    def written(found: Interval) -> str:
        return f"{100 * found.value:.0f} ({100 * found.low:.0f}–{100 * found.high:.0f})"

    rows = [
        {
            "question": entry.asked,
            "n": len(answers[kind, "miniature"]),
            "miniature": written(measured[kind, "miniature"]),
            "bar": f"{100 * entry.bar:.0f}",
            "the bar is": verdict(measured[kind, "miniature"], entry.bar),
            "another picture": written(measured[kind, "another picture"]),
            "should be near": f"{100 * entry.near:.0f}",
            "untrained": written(measured[kind, "untrained"]),
        }
        for kind, entry in BARS.items()
    ]
    return pd.DataFrame(rows).set_index("question")


def quality_figure(measured: Mapping[tuple[str, str], Interval]) -> Figure:
    """Every kind of question with its bar, the model and the two controls."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(figures.WIDTH, 5.6))
    for row, entry in enumerate(BARS.values()):
        axes.plot(
            [entry.bar] * 2,
            [row - 0.38, row + 0.38],
            color=figures.FACT,
            linewidth=2.5,
            label=None if row else "bar",
        )
    for shift, (arm, look) in zip((-0.2, 0.0, 0.2), figures.ARMS.items(), strict=True):
        value, low, high = np.array([[float(part) for part in measured[kind, arm]] for kind in BARS]).T
        axes.errorbar(
            value,
            np.arange(len(BARS)) + shift,
            xerr=np.clip([value - low, high - value], 0, None),
            color=look.colour,
            marker=look.marker,
            linestyle="none",
            elinewidth=1.5,
            label=arm,
        )
    axes.set_yticks(range(len(BARS)), [entry.asked for entry in BARS.values()])
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("right answers (existence: F1), with 95 % interval")
    axes.set_title("What it answers, and what guessing would give")
    axes.legend(loc="lower center", bbox_to_anchor=(0.35, -0.26), ncols=4, handletextpad=0.3, columnspacing=1.2)
    return fig


def gallery(model: VisionLanguageModel, items: Sequence[tasks.Item]) -> Figure:
    """Six pictures with question, right answer and what the model says."""
    from matplotlib import pyplot as plt

    if len(items) != 6:
        raise EmbedLensError(f"{len(items)} questions: the gallery shows six")
    fig, axes = plt.subplots(2, 3, figsize=(figures.WIDTH, 6.2))
    for place, (sample, question) in zip(axes.flat, items, strict=True):
        said = model.answer(model.prompt(sample.image, question.text))
        place.imshow(sample.image, interpolation="nearest")
        place.set_xticks([])
        place.set_yticks([])
        place.grid(False)
        place.spines[:].set_visible(False)
        place.set_title(textwrap.fill(question.text, 23), fontsize=10, fontweight="normal")
        place.set_xlabel(f"answer: {question.answer}\nsaid: {said}", fontsize=10, loc="left")
    fig.suptitle("Six held-out pictures and what the miniature says", fontsize=13, fontweight="bold", x=0.01, ha="left")
    return fig


def stages_table(log: Mapping[str, Any]) -> pd.DataFrame:
    """What each stage learned from what, for how long. `log` is `training.json`."""
    import pandas as pd

    recipe = log["recipe"]
    rows = [
        {
            "stage": stage,
            "learns": LEARNS[stage][0],
            "from": LEARNS[stage][1],
            "steps": run["steps"],
            "samples": run["log"][-1]["samples"],
            "AdamW": recipe[stage]["lr"],
            "Muon": recipe[stage]["muon_lr"] or "–",
            "minutes": round(run["seconds"] / 60),
        }
        for stage, run in log["stages"].items()
    ]
    return pd.DataFrame(rows).set_index("stage")


TRIED = {
    "relation_words": ("language model", "descriptions of two objects in words"),
    "relation_pictures": ("projector, language model", "pictures of two objects"),
    "onward2": ("language model, by AdamW alone", "descriptions, relations first; stopped early"),
}


def experiments_table(log: Mapping[str, Any]) -> pd.DataFrame:
    """Further trainings from the weights that ship: on how many samples, and what share of relations was then right.

    Held-out samples of the same kind; every token of the answer is the first choice. Where it was logged, also the
    largest share of its attention that text gives BOS in any block, and the largest |x| / RMS, first and last: signs
    of sinks.
    """
    import pandas as pd

    rows = []
    for name, run in log.get("experiments", {}).items():
        points = heldout(run)["relation"]
        signs = [(max(e["heldout/bos"]), max(e["heldout/peak"])) for e in run["log"] if "heldout/bos" in e]
        learns, source = TRIED[name]
        rows.append(
            {
                "learns": learns,
                "from": source,
                "steps": run["steps"],
                "samples": run["log"][-1]["samples"],
                "right at first": round(points[0][1], 2),
                "at the end": round(points[-1][1], 2),
                "at best": round(max(share for _, share in points), 2),
                "minutes": round(run["seconds"] / 60),
                "BOS attention": f"{signs[0][0]:.3f} to {signs[-1][0]:.3f}" if signs else "–",
                "|x| / RMS": f"{signs[0][1]:.1f} to {signs[-1][1]:.1f}" if signs else "–",
            }
        )
    return pd.DataFrame(rows)


def loss_figure(log: Mapping[str, Any]) -> Figure:
    """Training loss by stage, over the samples seen; a dotted line where a further training began."""
    from matplotlib import pyplot as plt

    stages = log["stages"]
    rows = -(-len(stages) // 2)
    fig, axes = plt.subplots(rows, 2, figsize=(figures.WIDTH, 2.7 * rows), squeeze=False)
    for place in axes.flat[len(stages) :]:
        place.set_axis_off()
    for place, (stage, run) in zip(axes.flat, stages.items(), strict=False):
        points = [(entry["samples"] / 1000, entry["loss"]) for entry in run["log"] if "loss" in entry]
        if points:
            place.plot(*zip(*points, strict=True), color=figures.ORDER[0])
            place.set_yscale("log")
            place.minorticks_off()
            low, high = min(y for _, y in points), max(y for _, y in points)
            ticks = np.unique(np.round(np.geomspace(low, high, 4), 2 if low < 1 else 1))
            place.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        _mark_beginnings(place, log, stage)
        place.set_title(stage)
        place.set_xlabel("thousand samples")
        place.set_ylabel("training loss")
    return fig


def heldout_figure(log: Mapping[str, Any]) -> Figure:
    """Measurements on held-out samples, by stage, over the samples seen."""
    from matplotlib import pyplot as plt

    curves = {stage: found for stage, run in log["stages"].items() if (found := heldout(run))}
    n = len(curves) or 1
    fig, axes = plt.subplots(n, 1, figsize=(figures.WIDTH, 3.4 * n), squeeze=False)
    for place, (stage, found) in zip(axes.flat, curves.items(), strict=False):
        for number, (name, points) in enumerate(sorted(found.items())):
            look = {"color": figures.ORDER[number % 7], "marker": figures.MARKERS[(number + number // 7) % 7]}
            place.plot(*zip(*points, strict=True), label=name.replace("_", " "), markersize=4, linewidth=1.5, **look)
        _mark_beginnings(place, log, stage)
        place.set_ylim(0, 1)
        place.set_title(f"held-out, during stage {stage}")
        place.set_xlabel("thousand samples")
        place.set_ylabel("right")
        figures.label_ends(place, least=0.085)
    return fig


def heldout(run: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Name → (thousand samples, share of right answers) points of one stage.

    >>> heldout({"log": [{"samples": 2000, "heldout/object": 0.5, "heldout/contrastive": 1.2, "loss": 3.0}]})
    {'object': [(2.0, 0.5)]}
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in run["log"]:
        for name, value in entry.items():
            key = name.removeprefix("heldout/")
            if key != name and key not in ("caption", "captioning", "contrastive", "loss", "bos", "peak"):
                found.setdefault(key, []).append((entry["samples"] / 1000, value))
    return found


def beginnings(log: Mapping[str, Any], stage: str) -> list[float]:
    """Thousand samples at which further trainings of a stage began."""
    steps = [entry["step"] for entry in log.get("history", []) if entry["stage"] == stage and entry.get("further")]
    entries = log["stages"][stage]["log"]
    return [max((e["samples"] for e in entries if e["step"] <= step), default=0) / 1000 for step in steps]


def _mark_beginnings(axes: Any, log: Mapping[str, Any], stage: str) -> None:
    for at in beginnings(log, stage):
        axes.axvline(at, color=figures.CHANCE, linestyle=":", linewidth=1.2)
