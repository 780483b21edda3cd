"""Measure everything, print the table, write `results.json` beside this file: `make bench`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks import clustering, looking, prefill, redundancy, retrieval, sweep, trace
from benchmarks.measure import circumstances

RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    """Command line; the machine should have nothing else to do."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch, default: its own")
    chosen = parser.parse_args()
    threads = chosen.threads

    content = circumstances(threads)
    table: list[tuple[str, str, str]] = []
    content["retrieval"] = [
        retrieval.retrieval(threads, vocabulary=vocabulary, width=width, dtype=dtype, repeats=repeats)
        for vocabulary, width, repeats in ((32_000, 4096, 9), (152_000, 3584, 5))
        for dtype in ("float32", "bfloat16")
    ]
    content["attention"], content["context"] = looking.attention(threads), looking.context(threads)
    content["explorer"] = looking.explorer(threads)
    content["trace"] = [trace.trace(threads, prompts=prompts) for prompts in (1, 8)]
    content["clustering"] = clustering.clustering(threads)
    content["sweep"] = [sweep.sweep(threads, 1, questions=24), sweep.sweep(threads, 6)]
    content["prefill"] = prefill.prefill(threads)
    content["redundancy"] = redundancy.scoring(threads)
    for found in content["retrieval"]:
        table += retrieval.lines(found)
    table += looking.lines(content["attention"], content["context"], content["explorer"])
    for found in content["trace"]:
        table += trace.lines(found)
    table += clustering.lines(content["clustering"])
    for found in content["sweep"]:
        table += sweep.lines(found)
    table += prefill.lines(content["prefill"])
    table += redundancy.lines(content["redundancy"])

    print(f"{content['machine']}, {threads} threads, load before: {content['load_before']}")
    header = ("measured", "times the bare way: median (range)", "extra memory at the peak")
    widths = [max(len(row[column]) for row in (header, *table)) for column in range(3)]
    for row in (header, *table):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    chosen.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
