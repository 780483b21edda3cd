"""Released checkpoints by the numbers of their config.json that decide their size (`released.json`): nothing was run.

>>> sizes().loc["llava-hf/llava-1.5-7b-hf", ["visual tokens", "parameters", "bfloat16"]].tolist()
['576', '7.06 B', '16']
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pandas as pd

from embedlens.memory import CARDS, GIB, needed, visual_tokens_of

WEIGHTS = {"bfloat16": None, "8 bit": "8bit", "4 bit": "4bit"}


def configs() -> dict[str, Any]:
    """Repository → config of the stock class, made without a network."""
    from transformers import AutoConfig

    listed = json.loads(files("embedlens").joinpath("released.json").read_text(encoding="utf-8"))
    return {name: AutoConfig.for_model(**config) for name, config in listed.items()}


def sizes() -> pd.DataFrame:
    """Visual tokens, parameters, GiB for one picture by kind of weights, and what fits a card, as texts.

    What fits: how many pictures at a time in 16, 8 and 4 bit, up to 64; – where not even one does. A row a repository.
    """
    rows = {}
    for name, config in configs().items():
        found = {kind: needed(config, "bfloat16", quantize) for kind, quantize in WEIGHTS.items()}
        plain = found["bfloat16"]
        row = {"visual tokens": str(visual_tokens_of(config)), "parameters": f"{plain.parameters / 1e9:.2f} B"}
        row |= {kind: f"{memory.total() / GIB:.0f}" for kind, memory in found.items()}
        row["each further picture in a batch"] = f"{plain.sample / GIB:.1f}"
        for card, gib in CARDS.items():
            row[card] = " / ".join(str(memory.pictures(gib) or "–") for memory in found.values())
        rows[name] = row
    return pd.DataFrame(rows.values(), index=pd.Index(rows, name="model"))
