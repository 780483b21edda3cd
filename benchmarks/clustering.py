"""Chapter 01's clustering study on ten times as many pictures: does time grow in step, does memory stay?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import embedlens as el
from benchmarks.measure import MEGABYTE, compared, in_fresh_process, peak_extra_bytes, timed
from embedlens.measures.clusters import cluster_study
from embedlens.samples import Sample, miniworld


def clustering(
    threads: int, few: int = 100, many: int = 1000, repeats: int = 3, model: str = "miniature"
) -> dict[str, Any]:
    """Time and peak extra memory for few and for many pictures, in fresh processes."""
    ways = in_fresh_process(_times, threads, few=few, many=many, repeats=repeats, model=model)
    for name, n in (("few", few), ("many", many)):
        ways[name] |= {"pictures": n, "peak_extra_bytes": in_fresh_process(_peak, threads, n=n, model=model)}
    return {"model": model, "ways": ways}


def _pictures(n: int) -> Iterator[Sample]:
    """Drawn one after the other and let go, so that the memory is the study's."""
    first = miniworld.first_index(0)
    return (miniworld.sample(first + index, "heldout") for index in range(n))


def _times(few: int, many: int, repeats: int, model: str) -> dict[str, dict[str, Any]]:
    vlm = el.load(model, device="cpu")
    cluster_study(vlm, _pictures(few))  # warms up both
    ways = {name: lambda n=n: cluster_study(vlm, _pictures(n)) for name, n in (("few", few), ("many", many))}
    return compared(timed(ways, repeats, warm_up=0), to="few")


def _peak(n: int, model: str) -> int | None:
    vlm = el.load(model, device="cpu")
    cluster_study(vlm, _pictures(1))  # loads what is drawn with, once
    return peak_extra_bytes(partial(cluster_study, vlm, _pictures(n)))


def lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, ratio, memory: rows of the printed table."""
    rows = []
    for way in found["ways"].values():
        peak = way["peak_extra_bytes"]
        rows.append(
            (
                f"clustering study, {way['pictures']} pictures",
                f"{way['ratio']['median']:.2f} ({way['ratio']['low']:.2f} to {way['ratio']['high']:.2f})",
                "not measured" if peak is None else f"{peak / MEGABYTE:.0f} MB",
            )
        )
    return rows
