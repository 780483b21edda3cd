"""What looking inside a picture costs: attention beside the bare forward, words in context beside the bare product, and
the explorer from a picture to its file.

The search in context is that of `retrieval.py` at the size of a full bank. Attention is read on the miniature, where a
forward takes milliseconds and Python weighs most, and on the decoder of random weights of `prefill.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import embedlens as el
from benchmarks.measure import compared, in_fresh_process, spread, timed
from benchmarks.prefill import SIDE, WIDTH, of_random_weights
from embedlens.vlm import QUESTION, VisionLanguageModel

BARE, MAPS, ASKING = "bare forward", "el.attention", "el.attention, question too"
PRODUCT, SEARCH = "bare product", "ContextLens.topk"
ANSWER = "a red dog and a blue car"


def attention(
    threads: int, repeats: int = 15, side: int = SIDE, width: int = WIDTH, model: str = "miniature"
) -> list[dict[str, Any]]:
    """Time of the three ways on one prompt with its answer, of both models, in a fresh process."""
    return in_fresh_process(_attention, threads, repeats=repeats, side=side, width=width, model=model)


def _attention(repeats: int, side: int, width: int, model: str) -> list[dict[str, Any]]:
    small = el.load(model, device="cpu")
    image = el.samples.load("miniworld", n=1)[0].image
    found = []
    for vlm in (small, of_random_weights(small, side, width)):
        prompt = vlm.prompt(image, QUESTION)
        ways = {BARE: _bare(vlm, prompt)}
        ways[MAPS] = lambda vlm=vlm, prompt=prompt: el.attention(vlm, prompt, ANSWER)
        ways[ASKING] = lambda vlm=vlm, prompt=prompt: el.attention(vlm, prompt, ANSWER, question=True)
        times = compared(timed(ways, repeats, warm_up=2), to=BARE)
        found.append({"model": vlm.name, "visual_tokens": len(prompt.grid), "ways": times})
    return found


def _bare(model: VisionLanguageModel, prompt: el.Prompt) -> Any:
    from embedlens.attention_maps import answer_ids, followed_by

    whole = followed_by(model, prompt, answer_ids(model, prompt, ANSWER))

    @torch.no_grad()
    def run() -> None:
        model.decoder(inputs_embeds=whole.embeds[None], attention_mask=None, use_cache=False)

    return run


def context(
    threads: int, tokens: int = 576, rows: int = 100_000, width: int = 4096, k: int = 5, repeats: int = 5
) -> dict[str, Any]:
    """Time of a search in a full bank, and of the bare product with it."""
    sizes = {"tokens": tokens, "rows": rows, "width": width, "k": k}
    return {**sizes, "ways": in_fresh_process(_context, threads, repeats=repeats, **sizes)}


def _context(repeats: int, tokens: int, rows: int, width: int, k: int) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    vectors, h = (torch.randn(n, width, generator=generator) for n in (rows, tokens))
    bank = el.ContextLens(vectors, [""] * rows, torch.ones(rows, dtype=torch.long), [(0, 0)] * rows, [""], "random")
    ways = {PRODUCT: lambda: h @ vectors.T, SEARCH: lambda: bank.topk(h, k)}
    return compared(timed(ways, repeats), to=PRODUCT)


def explorer(threads: int, repeats: int = 5, model: str = "miniature") -> dict[str, Any]:
    """Seconds from a picture to a page, the groups' reference included, and bytes of the file."""
    return in_fresh_process(_explorer, threads, repeats=repeats, model=model)


def _explorer(repeats: int, model: str) -> dict[str, Any]:
    from embedlens import groups

    vlm = el.load(model, device="cpu")
    image = el.samples.load("miniworld", n=1)[0].image
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"

        def run() -> None:
            groups._REFERENCES.clear()  # what a first call finds out is part of it
            el.explore(vlm, image).save(file)

        seconds = timed({"el.explore": run}, repeats)["el.explore"]
        return {"model": vlm.name, "seconds": spread(seconds), "bytes": file.stat().st_size}


def lines(maps: list[dict[str, Any]], bank: dict[str, Any], page: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, ratio or seconds, memory: rows of the printed table."""
    rows = [
        (f"{name}, {found['model']}, {found['visual_tokens']} tokens", _told(way["ratio"]), "")
        for found in maps
        for name, way in found["ways"].items()
    ]
    for name, way in bank["ways"].items():
        rows.append((f"{name}, {bank['tokens']} tokens in {bank['rows']} rows", _told(way["ratio"]), ""))
    seconds, size = _told(page["seconds"]), f"file of {page['bytes'] / 1e6:.2f} MB"
    return [*rows, (f"el.explore, {page['model']}, picture to file", f"{seconds} s", size)]


def _told(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
