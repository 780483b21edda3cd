"""EmbedLens retrieval against the bare matrix product, and against the way the paper's release does it.

576 visual tokens, a vocabulary of 32,000 and width 4096: one picture of LLaVA-1.5-7B; and Qwen2.5-VL's 152,000 of
width 3584. Random vectors are no easier than trained ones: as many entries are nearly as near as the nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import compared, in_fresh_process, peak_extra_bytes, rounded, timed
from embedlens import EmbedLens
from embedlens.loading import DTYPES

OURS, BARE, FULL = "EmbedLens.topk", "bare product", "as released"


def retrieval(
    threads: int,
    tokens: int = 576,
    vocabulary: int = 32_000,
    width: int = 4096,
    dtype: str = "float32",
    k: int = 5,
    repeats: int = 9,
) -> dict[str, Any]:
    """Time and peak extra memory of the three ways, each in fresh processes."""
    sizes = {"tokens": tokens, "vocabulary": vocabulary, "width": width, "dtype": dtype, "k": k}
    ways = in_fresh_process(_times, threads, repeats=repeats, **sizes)
    for name in ways:
        ways[name]["peak_extra_bytes"] = in_fresh_process(_peak, threads, name=name, **sizes)
    matrix = tokens * vocabulary * DTYPES[dtype].itemsize
    return {**sizes, "similarity_matrix_bytes": matrix, "ways": ways}


def _ways(tokens: int, vocabulary: int, width: int, dtype: str, k: int) -> dict[str, Callable[[int], Any]]:
    """Name → the call, for the first so many tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(vocabulary, width, generator=generator).to(DTYPES[dtype])
    h = torch.randn(tokens, width, generator=generator).to(DTYPES[dtype])
    lens = EmbedLens(rows, [""] * vocabulary)  # ids are asked for, not words
    return {
        OURS: lambda n: lens.topk(h[:n], k),
        BARE: lambda n: h[:n] @ rows.T,
        FULL: lambda n: _as_released(rows, h[:n], k),
    }


def _as_released(rows: Tensor, h: Tensor, k: int) -> Tensor:
    """Normalise the table anew for every picture, hold all similarities, take the best of each."""
    unit = torch.nn.functional.normalize
    return (unit(h, dim=-1) @ unit(rows, dim=-1).T).topk(k, dim=-1).indices


def _times(repeats: int, tokens: int, **sizes: Any) -> dict[str, dict[str, Any]]:
    ways = {name: partial(call, tokens) for name, call in _ways(tokens, **sizes).items()}
    return compared(timed(ways, repeats), to=BARE)


def _peak(name: str, tokens: int, **sizes: Any) -> int | None:
    call = _ways(tokens, **sizes)[name]
    call(1)  # what the library sets up once is no cost of the call
    return peak_extra_bytes(partial(call, tokens))


def lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, seconds or ratio, memory: rows of the printed table."""
    matrix = found["similarity_matrix_bytes"]
    rows = []
    for name, way in found["ways"].items():
        peak = way["peak_extra_bytes"]
        rows.append(
            (
                f"retrieval, {found['vocabulary']} x {found['width']}, {found['dtype']}, {name}",
                f"{way['ratio']['median']:.2f} ({way['ratio']['low']:.2f} to {way['ratio']['high']:.2f})",
                "not measured" if peak is None else f"{rounded(peak / matrix, 3):g} of the similarity matrix",
            )
        )
    return rows
