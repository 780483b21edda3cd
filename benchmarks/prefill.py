"""What pruning the dead tokens saves before the first word of an answer: time beside the number of rows.

The miniature's own dead tokens, one prompt at a time and in a batch; and a decoder of random weights, four times as
wide, that reads 576 visual tokens as LLaVA-1.5 does, of which as large a share is pruned at random. Random weights
serve as well as trained ones, as no step looks at the values to decide what to compute. The time is that of the
decoder's forward over the prompt with everything that pruning adds to it; the group masks are known before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import embedlens as el
from benchmarks.measure import compared, in_fresh_process, rounded, timed
from embedlens.groups import token_groups_of
from embedlens.vlm import QUESTION, VisionLanguageModel

WHOLE, PRUNED = "all tokens", "dead tokens pruned"
TOGETHER = 8  # prompts of the miniature in a batch
SIDE, WIDTH, LAYERS = 336, 1024, 4  # of the model of random weights: px of its pictures, width, decoder blocks


def prefill(
    threads: int, pictures: int = 32, repeats: int = 7, side: int = SIDE, width: int = WIDTH, model: str = "miniature"
) -> dict[str, Any]:
    """Times of both ways in each setting, in a fresh process, and how many rows they run."""
    load = round(os.getloadavg()[0], 1)
    found = in_fresh_process(_times, threads, pictures=pictures, repeats=repeats, side=side, width=width, model=model)
    return {"model": model, "threads": threads, "load_before": load, "settings": found}


def _times(pictures: int, repeats: int, side: int, width: int, model: str) -> list[dict[str, Any]]:
    small = el.load(model, device="cpu")
    samples = el.samples.load("miniworld", n=pictures)
    prompts = small.prompts([sample.image for sample in samples], [QUESTION] * pictures)
    dead = [groups.dead for groups in token_groups_of(small, prompts)]
    if not all(bool(mask.any()) for mask in dead):  # a model without dead tokens: a share of the paper's size
        dead = [_at_random(len(prompt.grid), 0.4) for prompt in prompts]
    large = of_random_weights(small, side, width)
    picture = large.prompts([samples[0].image], [QUESTION])
    share = float(torch.cat(dead).float().mean())
    # those that keep as many tokens run together, as in `embedlens.prefix`: a batch is as long as its longest prompt
    order = sorted(range(pictures), key=lambda place: int(dead[place].sum()))
    prompts, dead = [prompts[place] for place in order], [dead[place] for place in order]
    alone = _setting(small, prompts, dead, batch_size=1, repeats=repeats)
    batch = _setting(small, prompts, dead, batch_size=TOGETHER, repeats=repeats)
    wide = _setting(large, picture, [_at_random(len(picture[0].grid), share)], batch_size=1, repeats=repeats)
    return [
        {"name": f"{small.name}, one prompt at a time", **alone},
        {"name": f"{small.name}, {TOGETHER} prompts of like length together", **batch},
        {"name": f"random weights, width {width}, {len(picture[0].grid)} visual tokens, one prompt", **wide},
    ]


def _at_random(n: int, share: float) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=torch.Generator().manual_seed(0))[: max(1, round(share * n))]] = True
    return mask


def of_random_weights(like: VisionLanguageModel, side: int, width: int, layers: int = LAYERS) -> VisionLanguageModel:
    """A model of the same class and vocabulary that reads pictures of another size; its decoder is wider."""
    from copy import deepcopy

    config = deepcopy(like.hf.config)
    config.vision_config.image_size = side
    config.image_seq_length = (side // config.vision_config.patch_size) ** 2
    text = config.text_config
    text.num_hidden_layers, text.max_position_embeddings = layers, config.image_seq_length + 512
    text.hidden_size, text.intermediate_size = width, 4 * width * 2 // 3
    text.head_dim = width // text.num_attention_heads
    torch.manual_seed(0)
    return VisionLanguageModel(type(like.hf)(config), deepcopy(like.processor), "random weights")


def _setting(
    model: VisionLanguageModel, prompts: Sequence[el.Prompt], masks: Sequence[Tensor], batch_size: int, repeats: int
) -> dict[str, Any]:
    whole = sum(map(len, prompts))
    pruned = whole - sum(int(mask.sum()) for mask in masks)
    ways = {WHOLE: _prefilling(model, prompts, batch_size), PRUNED: _pruning(model, prompts, masks, batch_size)}
    times = compared(timed(ways, repeats, warm_up=2), to=WHOLE)
    return {"rows": {WHOLE: whole, PRUNED: pruned}, "rows_ratio": rounded(pruned / whole), "ways": times}


def _prefilling(model: VisionLanguageModel, prompts: Sequence[el.Prompt], batch_size: int) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            with model.running(batch, start, len(prompts)) as entered:
                embeds, mask = model.padded(entered)
                model.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=True)

    return run


def _pruning(
    model: VisionLanguageModel, prompts: Sequence[el.Prompt], masks: Sequence[Tensor], batch_size: int
) -> Callable[[], None]:
    plain = _prefilling(model, prompts, batch_size)

    def run() -> None:
        with el.intervene(model, el.Prune(list(masks))):
            plain()

    return run


def lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, ratio, memory: rows of the printed table."""
    rows = []
    for setting in found["settings"]:
        ratio = setting["ways"][PRUNED]["ratio"]
        rows.append(
            (
                f"prefill without dead tokens ({setting['rows_ratio']:.2f} of the rows), {setting['name']}",
                f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
                "",
            )
        )
    return rows
