"""Scoring every token of a picture alone, in its region and in the whole picture, against one stock call a reading.

The release runs each reading by itself at batch one: the picture through the vision tower, the prompt, and up to eight
generated tokens, of which the first counts: `FULL`. `BARE` leaves out what is not needed: no tower, no generation.
Neither counts the processor's work on picture and text. Operations are counted beside the seconds, as a processor
cannot be faster than its arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.measure import compared, in_fresh_process, operations, timed
from embedlens import load, samples
from embedlens.readings import Protocol, describing
from embedlens.redundancy import readings_of, window
from embedlens.vlm import Prompt, VisionLanguageModel

OURS, BARE, FULL = "readings_of", "one forward a reading", "one call a reading, as released"
NEW_TOKENS = 8  # of the released script


def scoring(threads: int, model: str = "miniature", tokens: int | None = None, repeats: int = 3) -> dict[str, Any]:
    """Seconds for all readings of one picture, each way in the same fresh process.

    Args:
        threads: of PyTorch.
        model: what `embedlens.load` takes.
        tokens: how many of the picture's are scored; default: all.
        repeats: rounds.
    """
    return in_fresh_process(_times, threads, model=model, tokens=tokens, repeats=repeats)


def _times(model: str, tokens: int | None, repeats: int) -> dict[str, Any]:
    vlm = load(model, device="cpu")
    prompt = vlm.prompt(samples.load("miniworld", n=1)[0].image, describing(vlm))
    places = list(range(len(prompt.grid)))[:tokens]
    protocol = Protocol(question=prompt.question, articles=())
    ways = {
        OURS: partial(readings_of, vlm, prompt, places, protocol),
        BARE: partial(one_by_one, vlm, prompt, places),
        FULL: partial(one_by_one, vlm, prompt, places, True),
    }
    found = compared(timed(ways, repeats), to=OURS)
    for name, run in ways.items():
        found[name]["operations"] = operations(run)
    return {
        "model": model,
        "tokens": len(places),
        "new_tokens": NEW_TOKENS,
        "readings": 4 * len(places) + 1,
        "ways": found,
    }


@torch.no_grad()
def one_by_one(model: VisionLanguageModel, prompt: Prompt, places: list[int], released: bool = False) -> torch.Tensor:
    """The same logits, one call of the stock model each: Float[4 m + 1, V], in no special order."""
    blank, at, n = model.input_embeddings[0], prompt.visual.nonzero()[:, 0], len(prompt.grid)
    variants = [prompt]
    for place in places:
        own = window(place, prompt.grid)
        alone, region = (torch.ones(n, dtype=torch.bool) for _ in range(2))
        alone[place], region[own] = False, False
        variants += [prompt.without(alone), prompt.without(region)]
        for gone, mask in (([place], region), (own, None)):
            embeds = prompt.embeds.clone()
            embeds[at[gone]] = blank
            blanked = replace(prompt, embeds=embeds)
            variants.append(blanked if mask is None else blanked.without(mask))
    return torch.stack([_reading(model, variant, released) for variant in variants])


def _reading(model: VisionLanguageModel, prompt: Prompt, released: bool) -> torch.Tensor:
    if not released:
        return model.logits(prompt)[-1]
    hf: Any = model.hf
    hf.get_image_features(pixel_values=prompt.pixel_values)
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    output = hf.generate(
        inputs_embeds=prompt.embeds[None], attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return output.logits[0][0, : len(model.tokens)]


def lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured and the ratio to ours: rows of the printed table."""
    rows = []
    for name, way in found["ways"].items():
        ratio = way["ratio"]
        text = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        what = f"scoring {found['tokens']} tokens, {found['readings']} readings, {way['operations'] / 1e9:.1f} GFLOP"
        rows.append((f"{what}, {name}", text, "not measured"))
    return rows
