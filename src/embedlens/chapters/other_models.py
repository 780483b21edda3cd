"""Clusters and token groups of one model beside those of others (Figure c and Appendix C.1 of the paper).

The study gives one row per picture and needs no other picture but a few fixed ones, so that it can be shared out over
processes and resumed (`embedlens.run`). What it found is a record per model, `results/<model>/09_other_models.json`;
the chapter lays the records side by side and judges the two claims that compare models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from embedlens import claims, figures, samples
from embedlens.claims import FAILS, HOLDS, PARTLY, UNDECIDED, UNTESTABLE, Finding, Record
from embedlens.clusters import anchor_clusters, centroids, cross_image_similarity, matched_null
from embedlens.errors import EmbedLensError
from embedlens.groups import Reference, discover, reference_of, token_groups_of
from embedlens.intervals import Interval, mean_interval
from embedlens.vlm import QUESTION

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from embedlens.samples import Sample
    from embedlens.vlm import VisionLanguageModel

CHAPTER = "09_other_models"
THRESHOLD = 0.9
RANKS = 6  # largest clusters of a picture
PARTNERS = 8  # fixed pictures that every picture is compared with
NULLS = 3  # random token sets of each picture
CALIBRATION = 64  # pictures in which the groups of a model are found
MARGIN = 0.05  # two models within this show "nearly identical" clusters (E10)
ABSENT = 0.1  # a largest cluster below this share of the tokens is none (E11): a third of the paper's 30 %
GROUPS = ("alive", "dead", "ViT sink", "LLM sink")


@dataclass(frozen=True)
class Named:
    """A model that the paper names, and what it says of it."""

    repository: str
    name: str
    claim: str
    """Claim about it; empty: the model that others are compared with."""


PAPER = (
    Named("llava-hf/llava-1.5-7b-hf", "LLaVA-1.5-7B", ""),
    Named("llava-hf/llava-1.5-13b-hf", "LLaVA-1.5-13B", "E10"),
    Named("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-7B", "E11"),
    Named("OpenGVLab/InternVL3-8B-hf", "InternVL3-8B", "E11"),
    Named("Qwen/Qwen3-VL-8B-Instruct", "Qwen3-VL-8B", "E11"),
)


def named(model: str) -> Named | None:
    """The paper's entry for a repository, or for a folder that is called as the repository is.

    >>> named("/data/llava-1.5-13b-hf").name, named("miniature")
    ('LLaVA-1.5-13B', None)
    """
    last = model.rstrip("/").rpartition("/")[2].lower()
    return next((entry for entry in PAPER if entry.repository.rpartition("/")[2].lower() == last), None)


# --- the study -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Clustered:
    """A picture: its largest clusters, and random token sets of the same sizes."""

    shares: Float[np.ndarray, " ranks"]
    """Of the picture's tokens; 0 where it has no such cluster."""
    clusters: Float[Tensor, "k d"]
    """Centroids."""
    null: Float[Tensor, "repeats k d"]


def pictures(dataset: str, n: int, seed: int) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Pictures to measure, to find the groups in, and to compare with; none is in two of the lists.

    In the drawn world the second list is empty: groups are found there as in every chapter (`reference_of`).
    """
    drawn = dataset == "miniworld"
    others = 0 if drawn else CALIBRATION
    loaded = samples.load(dataset, n=n + others + PARTNERS, seed=seed)
    return loaded[:n], loaded[n : n + others], loaded[n + others :]


def study_of(
    model: VisionLanguageModel, calibration: Sequence[Sample], compared: Sequence[Sample], seed: int = 0
) -> partial[list[dict[str, Any]]]:
    """`anatomy` with what it needs of this model bound: how its groups are told apart, and the partner pictures."""
    if not compared:
        raise EmbedLensError("no picture to compare with: pass at least one, see other_models.pictures")
    reference = discover(model, calibration) if calibration else reference_of(model)
    tokens_of = _tokens(model, list(samples.readable(compared)))
    partners = tuple(_clustered(tokens, picture.id, seed) for picture, tokens in tokens_of)
    return partial(anatomy, reference=reference, partners=partners, seed=seed)


def anatomy(
    model: VisionLanguageModel,
    batch: Sequence[Sample],
    reference: Reference,
    partners: Sequence[Clustered],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row per picture: its clusters, how alike they are to those of the partners, and its groups.

    Columns: tokens; share_0 ... share_5, the clusters' shares of the tokens (0: no such cluster); similarity_i, the
    mean over partners of `cross_image_similarity`, and random_i, the same of random token sets of the same sizes (nan:
    no such cluster); alive, dead, ViT sink and LLM sink, shares of the tokens.
    """
    prompts = model.prompts([picture.image for picture in batch], [QUESTION] * len(batch))
    rows = []
    for picture, prompt, groups in zip(batch, prompts, token_groups_of(model, prompts, reference), strict=True):
        own = _clustered(prompt.embeds[prompt.visual], picture.id, seed)
        row: dict[str, Any] = {"id": picture.id, "tokens": int(prompt.visual.sum())}
        row |= {f"share_{rank}": share for rank, share in enumerate(own.shares.tolist())}
        alike = torch.stack([cross_image_similarity(own.clusters, other.clusters) for other in partners]).mean(0)
        random = torch.stack(
            [
                cross_image_similarity(sets, others)
                for other in partners
                for sets, others in zip(own.null, other.null, strict=True)
            ]
        ).mean(0)
        for rank in range(RANKS):
            row[f"similarity_{rank}"] = float(alike[rank]) if rank < len(alike) else float("nan")
            row[f"random_{rank}"] = float(random[rank]) if rank < len(random) else float("nan")
        row |= {name: float(groups.named[name].float().mean()) for name in GROUPS}
        rows.append(row)
    return rows


def _tokens(model: VisionLanguageModel, pictures: Sequence[Sample]) -> list[tuple[Sample, Float[Tensor, "n d"]]]:
    """Visual tokens as they enter the language model, a picture at a time: tiles differ in number."""
    prompts = [model.prompt(picture.image, QUESTION) for picture in pictures]
    return [(picture, prompt.embeds[prompt.visual]) for picture, prompt in zip(pictures, prompts, strict=True)]


def _clustered(tokens: Float[Tensor, "n d"], picture: int, seed: int) -> Clustered:
    tokens = tokens.float().cpu()
    labels = anchor_clusters(tokens, THRESHOLD)
    sets = [matched_null(labels, (seed, picture, repeat)) for repeat in range(NULLS)]
    shares = np.bincount(labels.numpy(), minlength=RANKS)[:RANKS] / len(tokens)
    null = torch.stack([centroids(tokens, one, RANKS) for one in sets])
    return Clustered(shares, centroids(tokens, labels, RANKS), null)


# --- the record of one model -----------------------------------------------------------------------------------------


def numbers(table: pd.DataFrame, photographs: bool, seed: int = 0) -> dict[str, float]:
    """What the record of one model holds: means over pictures, each with `_low` and `_high`, by name.

    Args:
        table: of `anatomy`, one row per picture.
        photographs: whether the pictures were; models are compared on pictures of one kind.
    """
    columns = {f"share_{rank}": table[f"share_{rank}"] for rank in range(RANKS)}
    lead = table["similarity_0"] - table["random_0"]
    columns |= {"similarity": table["similarity_0"], "random": table["random_0"], "lead": lead}
    columns |= {name: table[name] for name in GROUPS}
    found: dict[str, float] = {"photographs": float(photographs), "tokens": float(table["tokens"].mean())}
    for name, values in columns.items():
        value, low, high = mean_interval(values.to_numpy(dtype=np.float64), seed=seed)
        found |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def measure(
    model: VisionLanguageModel,
    dataset: str,
    n: int,
    seed: int = 0,
    out: str | Path | None = None,
    batch_size: int | str | None = "auto",
    progress: bool | None = None,
) -> pd.DataFrame:
    """`anatomy` of `n` pictures of a data set, as `embedlens.run` does it."""
    from embedlens.study import run

    measured, calibration, compared = pictures(dataset, n, seed)
    return run(study_of(model, calibration, compared, seed), model, measured, out, batch_size, progress)


def write(folder: str | Path | None, model: str, dataset: str, table: pd.DataFrame, seed: int = 0) -> Path:
    """The record of one model, `folder/<model>/09_other_models.json`, with the claims judged on all records there."""
    measured = claims.rounded(numbers(table, dataset != "miniworld", seed))
    own = Record(model, CHAPTER, len(table), seed, "", {}, {}, measured)
    judged = findings(records(folder) | {model: own})
    return claims.write(folder, model, CHAPTER, len(table), seed, judged, measured, dataset=dataset)


def records(folder: str | Path | None, *own: Path) -> dict[str, Record]:
    """Model → its record, of all that a folder of results holds; `own` go before those of the same model."""
    files = [file for file in claims.main_records(folder) if file.stem == CHAPTER]
    return {record.model: record for record in map(claims.read, [*files, *own])}


def interval(record: Record, name: str) -> Interval:
    """A number of a record with its bounds."""
    try:
        return Interval(*(np.array(record.numbers[name + end]) for end in ("", "_low", "_high")))
    except KeyError as error:
        raise EmbedLensError(
            f"the record of {record.model} has no number {error}: run embedlens run other_models again"
        ) from None


# --- judging ---------------------------------------------------------------------------------------------------------


def findings(found: Mapping[str, Record]) -> dict[str, Finding]:
    """E10 and E11, judged on the records that there are.

    E10: the shares of the largest cluster and of dead tokens of the 13B model lie within 5 points of those of the 7B
    model, interval of the difference included: holds; the difference exceeds 5 points for sure in either: does not
    hold; else partly. E11: the largest cluster of a model is absent if its share lies below a tenth, interval
    included, or if it is not more alike across pictures than random token sets, likewise. Absent in all three
    models: holds; in some: partly; there in one: does not hold; else undecided. Only records on pictures of one
    kind are compared.
    """
    return {"E10": _same_clusters(found), "E11": _no_cluster(found)}


def _of(found: Mapping[str, Record], claim: str) -> dict[str, Record]:
    """Paper's name → record, of the models that a claim is about."""
    of_paper = {entry.name: record for model, record in found.items() if (entry := named(model)) is not None}
    return {entry.name: of_paper[entry.name] for entry in PAPER if entry.claim == claim and entry.name in of_paper}


def _absentees(found: Mapping[str, Record]) -> list[Named]:
    """Models that the paper names and that have no record."""
    there = {named(model) for model in found}
    return [entry for entry in PAPER if entry not in there]


def _same_clusters(found: Mapping[str, Record]) -> Finding:
    base, others = _of(found, ""), _of(found, "E10")
    if not base or not others:
        return Finding(None, None, None, 0, UNTESTABLE, "Needs LLaVA-1.5-7B and 13B, which were not both run.")
    (seven,), (thirteen,) = base.values(), others.values()
    if seven.numbers["photographs"] != thirteen.numbers["photographs"]:
        return Finding(None, None, None, 0, UNTESTABLE, "LLaVA-1.5-7B and 13B were run on pictures of different kinds.")
    apart = {name: _difference(interval(thirteen, name), interval(seven, name)) for name in ("share_0", "dead")}
    within = [abs(low) <= MARGIN and abs(high) <= MARGIN for _, low, high in apart.values()]
    beyond = [low > MARGIN or high < -MARGIN for _, low, high in apart.values()]
    verdict = HOLDS if all(within) else FAILS if any(beyond) else PARTLY
    value, low, high = apart["share_0"]
    note = f"Share of the largest cluster, 13B less 7B; dead tokens {apart['dead'][0]:+.3f}; margin {MARGIN:.2f}."
    return Finding(value, low, high, min(seven.n_images, thirteen.n_images), verdict, note)


def _difference(a: Interval, b: Interval) -> tuple[float, float, float]:
    """Of two means over different pictures; their errors are independent and add up as squares."""
    value = float(a.value - b.value)
    down = np.hypot(a.value - a.low, b.high - b.value)
    up = np.hypot(a.high - a.value, b.value - b.low)
    return value, value - float(down), value + float(up)


def absent(record: Record) -> bool | None:
    """Whether a model shows no cluster of the kind: too small, or no more alike across pictures than chance.

    None: the intervals do not say; few pictures are no sign of absence.
    """
    share, lead = interval(record, "share_0"), interval(record, "lead")
    if share.high < ABSENT or lead.high <= 0:
        return True
    return False if share.low >= ABSENT and lead.low > 0 else None


def _no_cluster(found: Mapping[str, Record]) -> Finding:
    wanted = [entry.name for entry in PAPER if entry.claim == "E11"]
    run = _of(found, "E11")
    if not run:
        return Finding(None, None, None, 0, UNTESTABLE, f"Needs {', '.join(wanted)}, none of which was run.")
    said = {name: absent(record) for name, record in run.items()}
    without = [name for name, gone in said.items() if gone]
    present = False in said.values()
    verdict = HOLDS if len(without) == len(wanted) else PARTLY if without else FAILS if present else UNDECIDED
    largest = max(run.values(), key=lambda record: float(interval(record, "share_0").value))
    value, low, high = map(float, interval(largest, "share_0"))
    missing = [name for name in wanted if name not in run]
    note = f"Largest share of C0 among {', '.join(run)}; absent in {', '.join(without) or 'none'}"
    note += f"; not run: {', '.join(missing)}." if missing else "."
    return Finding(value, low, high, min(record.n_images for record in run.values()), verdict, note)


# --- showing ---------------------------------------------------------------------------------------------------------


def name_of(model: str) -> str:
    """What the paper calls a model; else the last part of its name."""
    entry = named(model)
    return entry.name if entry is not None else model.rstrip("/").rpartition("/")[2]


def command(model: str) -> str:
    """What fills in the record of a model."""
    return f"embedlens run other_models --model {model} --dataset coco:/path/to/val2017 -n 1000"


def side_by_side(found: Mapping[str, Record]) -> pd.DataFrame:
    """One row per model, those that the paper names first; "not run here" where there is no record."""
    import pandas as pd

    def told(record: Record, *names: str) -> str:
        return interval(record, names[0]).texts(3)[0] if len(names) == 1 else _sum(record, names)

    rows = []
    by_name = {name_of(model): record for model, record in found.items()}
    for name in dict.fromkeys([*(entry.name for entry in PAPER), *by_name]):
        record = by_name.get(name)
        row = {"model": name}
        if record is None:
            rows.append(row | dict.fromkeys(COLUMNS, "–") | {"kind": "not run here"})
            continue
        rows.append(
            row
            | {
                "kind": claims.kind_of_result(record.model),
                "pictures": f"{record.n_images} {_shown(record)}",
                "share of C0": told(record, "share_0"),
                "C0 across pictures": told(record, "similarity"),
                "random sets": told(record, "random"),
                "dead": told(record, "dead"),
                "sinks": told(record, "ViT sink", "LLM sink"),
            }
        )
    return pd.DataFrame(rows, columns=["model", "kind", *COLUMNS]).set_index("model")


COLUMNS = ("pictures", "share of C0", "C0 across pictures", "random sets", "dead", "sinks")


def _sum(record: Record, names: Sequence[str]) -> str:
    return f"{sum(record.numbers[name] for name in names):.3f}"


def missing(found: Mapping[str, Record]) -> list[str]:
    """The commands that would fill in what was not run, one per model that the paper names."""
    return [command(entry.repository) for entry in _absentees(found)]


def clusters_figure(found: Mapping[str, Record]) -> Figure:
    """Shares of the six largest clusters, a panel per model with a record, and which models have none."""
    from matplotlib import pyplot as plt

    _demand_records(found)
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    size = (figures.WIDTH, 0.6 + 3.2 * rows)
    fig, panels = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    for axes in panels.flat[len(found) :]:
        axes.set_axis_off()
    for axes, (model, record) in zip(panels.flat, found.items(), strict=False):
        value, low, high = np.array([[float(part) for part in interval(record, f"share_{r}")] for r in range(RANKS)]).T
        spread = np.clip([value - low, high - value], 0, None)
        axes.bar(range(RANKS), value, yerr=spread, color=figures.ORDER[0], capsize=3, ecolor="#333333")
        figures.paper_line(axes, 0.3, "paper (7B), C0: ~30 %", RANKS - 0.5, ha="right")
        axes.set_title(name_of(model), fontsize=11)
        axes.set_xlabel("cluster, by rank of size")
    for axes in panels[:, 0]:
        axes.set_ylabel("share of the tokens")
    figures.headline(fig, f"The largest cluster holds {_span(found, ['share_0'])} of the visual tokens")
    _sign(fig, found)
    return fig


def groups_figure(found: Mapping[str, Record]) -> Figure:
    """What share of the visual tokens is alive, dead or a sink, one bar per model with a record."""
    from matplotlib import pyplot as plt

    _demand_records(found)
    fig, axes = plt.subplots(figsize=(figures.WIDTH, 2.1 + 0.6 * len(found)))
    parts = {name_of(model): {name: record.numbers[name] for name in GROUPS} for model, record in found.items()}
    figures.stacked_bars(axes, parts, {name: figures.GROUPS[name] for name in GROUPS})
    axes.set_xlabel("share of the visual tokens")
    sinks = _span(found, ["ViT sink", "LLM sink"])
    figures.headline(fig, f"Of the visual tokens {_span(found, ['dead'])} are dead and {sinks} are sinks")
    _sign(fig, found)
    return fig


def _span(found: Mapping[str, Record], names: Sequence[str]) -> str:
    """Smallest to largest share among the models; one number where they agree."""
    shares = [sum(record.numbers[name] for name in names) for record in found.values()]
    ends = list(dict.fromkeys(f"{share:.0%}" for share in (min(shares), max(shares))))
    return " to ".join(ends)


def _sign(fig: Figure, found: Mapping[str, Record]) -> None:
    """Under a figure of several models: which kind of result each of them is, and of how many pictures."""
    lines = [
        f"{name_of(model)}: {claims.kind_of_result(model)} result, n = {record.n_images} {_shown(record)}"
        for model, record in found.items()
    ]
    fig.supxlabel("\n".join(lines), fontsize=10, color="#555555", x=0.99, ha="right")


def _shown(record: Record) -> str:
    return "photographs" if record.numbers["photographs"] else "drawn pictures"


def told(found: Mapping[str, Record], model: str) -> dict[str, Any]:
    """What the chapter says in words of the model it ran, and which models have records, by the keys of its prose."""
    record = found[model]
    absentees = [entry.name for entry in _absentees(found)]
    return {
        "c0": interval(record, "share_0"),
        "similarity": record.numbers["similarity"],
        "random": record.numbers["random"],
        "lead": interval(record, "lead"),
        "dead": interval(record, "dead"),
        "run_list": ", ".join(name_of(name) for name in found),
        "not_run_list": ", ".join(absentees) or "none of those that the paper names",
        "n_pictures": record.n_images,
    }


def _demand_records(found: Mapping[str, Record]) -> None:
    if not found:
        raise EmbedLensError(f"no {CHAPTER}.json under results: run embedlens run other_models first")
