"""What released models need, as the page "Run it on a GPU" shows it: estimates from their configs, nothing measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedlens.memory import GIB, needed, visual_tokens_of
from embedlens.released import RELEASED

if TYPE_CHECKING:
    import pandas as pd


def table() -> pd.DataFrame:
    """GiB for one picture at half precision, in eight and in four bits, one row per released model."""
    import pandas as pd

    rows = []
    for released in RELEASED:
        config = released.config
        found = {kind: needed(config, "bfloat16", kind) for kind in (None, "8bit", "4bit")}
        row = {
            "model": released.name,
            "visual tokens": visual_tokens_of(config),
            "parameters": f"{found[None].parameters / 1e9:.2f} B",
        }
        row |= {name: f"{found[kind].total() / GIB:.0f}" for name, kind in COLUMNS.items()}
        rows.append(row | {"each further picture in a batch": f"{found[None].sample / GIB:.1f}"})
    return pd.DataFrame(rows).set_index("model")


COLUMNS = {"bfloat16": None, "8 bit": "8bit", "4 bit": "4bit"}


def markdown() -> str:
    """`table` in Markdown."""
    found = table().reset_index()
    lines = [list(found.columns), ["---"] * len(found.columns), *found.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
