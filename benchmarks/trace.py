"""A trace of every sublayer of the miniature against the bare forward pass of its decoder."""

from __future__ import annotations

from typing import Any

import torch

import embedlens as el
from benchmarks.measure import compared, in_fresh_process, timed
from embedlens.tracing import traces

BARE, PLAIN, MASSES = "bare forward", "trace", "trace with attention masses"
GROUPS = 4  # masks a prompt: sink, sink, dead, alive


def trace(threads: int, prompts: int = 8, repeats: int = 15, model: str = "miniature") -> dict[str, Any]:
    """Time of the three ways on one batch of prompts, in a fresh process."""
    ways = in_fresh_process(_times, threads, prompts=prompts, repeats=repeats, model=model)
    return {"model": model, "prompts": prompts, "masks": GROUPS, "ways": ways}


def _times(prompts: int, repeats: int, model: str) -> dict[str, dict[str, Any]]:
    vlm = el.load(model, device="cpu")
    samples = el.samples.load("miniworld", n=prompts)
    asked = vlm.prompts([sample.image for sample in samples], ["What is in the picture?"] * prompts)
    embeds, padding = vlm.padded(asked)
    masks = [
        {str(group): prompt.visual & (torch.arange(len(prompt)) % GROUPS == group) for group in range(GROUPS)}
        for prompt in asked
    ]

    @torch.no_grad()
    def bare() -> None:
        vlm.decoder(inputs_embeds=embeds, attention_mask=padding, use_cache=False)

    ways = {
        BARE: bare,
        PLAIN: lambda: list(traces(vlm, asked, batch_size=prompts)),
        MASSES: lambda: list(traces(vlm, asked, masks, batch_size=prompts)),
    }
    return compared(timed(ways, repeats, warm_up=2), to=BARE)


def lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, ratio, memory: rows of the printed table."""
    return [
        (
            f"{name}, {found['prompts']} prompts",
            f"{way['ratio']['median']:.2f} ({way['ratio']['low']:.2f} to {way['ratio']['high']:.2f})",
            "",
        )
        for name, way in found["ways"].items()
    ]
