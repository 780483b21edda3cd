"""Time and GPU memory of a model as large as LLaVA-1.5-7B, with random weights: `python -m benchmarks.full_size`.

Weights cannot be downloaded everywhere, and no step looks at their values to decide what to compute: random ones cost
what trained ones do. Only the answers mean nothing. Without a GPU nothing is measured and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import embedlens as el
from benchmarks.measure import spread, timed
from embedlens import memory, records, sweep, tasks
from embedlens.groups import TokenGroups
from embedlens.loading import DTYPES
from embedlens.memory import configs
from embedlens.vlm import QUESTION, VisionLanguageModel

SHARE = 0.33  # of the visual tokens that is pruned: what the paper calls dead
QUESTIONS = 2  # of each family, in the sweep


def model_of(config: Any, dtype: str, device: str) -> VisionLanguageModel:
    """A stock model of this config with random weights; it reads the miniature's words and pictures of its own size."""
    from transformers import AutoModelForImageTextToText

    small = el.load("miniature", device="cpu")
    config = deepcopy(config)
    config.image_token_id = small.hf.config.image_token_id
    config.image_seq_length = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with torch.device(device):
            hf = AutoModelForImageTextToText.from_config(config)
    finally:
        torch.set_default_dtype(before)
    hf.generation_config = deepcopy(small.hf.generation_config)
    return VisionLanguageModel(hf, deepcopy(small.processor), "random weights")


def measured(config: Any, dtype: str, device: str, repeats: int = 5) -> dict[str, Any]:
    """Seconds, and on a GPU the peak of its memory, of retrieval, a trace, a pruned prefill and a small sweep."""
    model = model_of(config, dtype, device)
    samples = el.samples.load("miniworld", n=QUESTIONS)
    prompt = model.prompt(samples[0].image, QUESTION)
    rows = model.hf.get_input_embeddings().weight.detach()
    lens = el.EmbedLens(rows, [str(index) for index in range(len(rows))])
    tokens = prompt.embeds[prompt.visual]
    mask = torch.zeros(len(tokens), dtype=torch.bool)
    mask[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[: round(SHARE * len(tokens))]] = True
    items = [item for family in tasks.FAMILIES for item in tasks.family_questions(family, max(QUESTIONS, 5))]
    arms = [sweep.BASELINE, sweep.pruning("pruned", partial(_at_random, share=SHARE))]
    ways: dict[str, Callable[[], Any]] = {
        f"retrieval: 5 nearest of {len(rows)} words, {len(tokens)} tokens": lambda: lens.topk(tokens, 5),
        f"trace: {model.n_layers} layers, one prompt": lambda: el.trace(model, prompt),
        "prefill: one prompt": lambda: model.logits(prompt),
        f"prefill: {SHARE:.0%} of the visual tokens pruned": lambda: _pruned(model, prompt, mask),
        f"sweep: 2 arms, {len(items)} questions": lambda: sweep.run_arms(model, items, arms, groups=_ungrouped),
    }
    found = {}
    for name, way in ways.items():
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        seconds = timed({name: _synchronised(way, device)}, repeats)[name]
        peak = torch.cuda.max_memory_allocated() / memory.GIB if device.startswith("cuda") else None
        found[name] = {"seconds": spread(seconds), "peak GiB": None if peak is None else round(peak, 2)}
    return {
        "machine": records.machine(),
        "versions": records.versions(),
        "parameters": sum(parameter.numel() for parameter in model.hf.parameters()),
        "dtype": dtype,
        "device": "GPU" if device.startswith("cuda") else "CPU",
        "estimate GiB": round(memory.needed(config, dtype).total() / memory.GIB, 1),
        "ways": found,
    }


def _pruned(model: VisionLanguageModel, prompt: el.Prompt, mask: Tensor) -> Tensor:
    with el.intervene(model, el.Prune(mask)):
        return model.logits(prompt)


def _at_random(groups: TokenGroups, grid: el.PatchGrid, rng: np.random.Generator, share: float) -> Tensor:
    return sweep.random_tokens(groups.alive, round(share * len(grid)), rng)


def _ungrouped(model: VisionLanguageModel, prompts: Any) -> list[TokenGroups]:
    """All tokens alive: random weights have no groups to find."""
    sizes = [len(prompt.grid) for prompt in prompts]
    none = [torch.zeros(size, dtype=torch.bool) for size in sizes]
    return [TokenGroups(mask, mask, mask, ~mask, {}) for mask in none]


def _synchronised(way: Callable[[], Any], device: str) -> Callable[[], None]:
    def run() -> None:
        way()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return run


def main() -> None:
    """Measure and write, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("full_size.json"))
    parser.add_argument("--dtype", choices=[*DTYPES], default="bfloat16")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA GPU, so nothing is measured: run this where there is one")
    found = measured(configs()["llava-hf/llava-1.5-7b-hf"], given.dtype, "cuda")
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
