"""How much memory a model will take, from its config alone.

Weights are counted exactly; the rest is an estimate, before anything is loaded.
>>> from embedlens.model_names import MINIATURE
>>> found = needed(config_of(MINIATURE), dtype="float32")
>>> found.parameters > 1e6, found.total(batch_size=8) > found.weights
(True, True)

Released checkpoints are known by the numbers of their config.json that decide their size (`released.json`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from embedlens.errors import EmbedLensError
from embedlens.families import family_of
from embedlens.loading import AUTO, _locate, dtype_of, unpacked
from embedlens.model_names import MINIATURE

GIB = 2**30
TEXT = 64  # positions of template and question, beside the visual ones
RESERVE = GIB  # what driver, kernels and fragments take on a GPU; on a CPU, Python with its libraries
#: Views of one picture: the largest grid and the whole.
TILES = {"llava_next": 5, "llava_onevision": 10, "internvl": 13, "idefics3": 17}
MEGAPIXEL, UNKNOWN = 10**6, 2048  # a picture of a family that keeps its size; visual tokens where nothing says how many
#: Bytes per weight of a quantised matrix: four bits, and one float32 scale for 64 of them; eight bits.
QUANTIZED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
LENSES = 3  # float32 copies of the vocabulary: a study's lens, and one more with what it is made from
#: Cards that people have → GiB that PyTorch sees on them.
CARDS = {"T4 16 GB": 14.7, "L4 24 GB": 22.0, "A100 40 GB": 39.4, "H100 80 GB": 79.1}
MOST = 64  # pictures in a batch; more are not asked for


@dataclass(frozen=True)
class Memory:
    """Bytes that a model takes, in parts; `parameters` is a count, `vocabulary` EmbedLens's float32 copies of the input
    embedding, `sample` one prompt in a batch with the residual stream of every layer and its keys and values."""

    parameters: int
    weights: int
    vocabulary: int
    sample: int

    def total(self, batch_size: int = 1) -> int:
        """Everything, with a reserve of 1 GiB for what is not the model's."""
        return self.weights + self.vocabulary + batch_size * self.sample + RESERVE

    def pictures(self, gib: float) -> int:
        """How many run at a time in so many GiB, up to 64; 0: not even one.

        >>> Memory(7 * 10**9, 14 * GIB, GIB // 2, GIB // 4).pictures(22), Memory(1, 14 * GIB, 0, GIB).pictures(14.7)
        (26, 0)
        """
        return int(max(0, min(MOST, (gib * GIB - self.total(0)) // self.sample)))

    def told(self, batch_size: int = 1) -> str:
        """
        >>> Memory(7 * 10**9, 14 * GIB, GIB // 2, GIB // 4).told(4)
        'about 16.5 GiB (estimate from the config: 7.00 B weights take 14.0, a batch of 4 takes 1.0)'
        """
        batch = batch_size * self.sample / GIB
        return (
            f"about {self.total(batch_size) / GIB:.1f} GiB (estimate from the config: {self.parameters / 1e9:.2f} B "
            f"weights take {self.weights / GIB:.1f}, a batch of {batch_size} takes {batch:.1f})"
        )


def config_of(name_or_folder: str | Path) -> Any:
    """The config of what `embedlens.load` takes; a repository id is looked up on the Hub. EmbedLensError if none."""
    from transformers import AutoConfig

    source = _locate(name_or_folder)
    try:
        return AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise EmbedLensError(f"no config.json for {name_or_folder} ({first}): pass a checkpoint folder") from None


def needed(
    config: Any, dtype: str = "bfloat16", quantize: str | None = None, visual_tokens: int | None = None
) -> Memory:
    """What a model of this config takes, computed in `dtype`; "4bit" or "8bit" as bitsandbytes does it; `visual_tokens`
    of one picture, None: an ordinary one. EmbedLensError for what is unknown here, or no vision-language model's."""
    from transformers import AutoModelForImageTextToText

    size = dtype_of(dtype).itemsize
    if quantize not in (None, *QUANTIZED):
        raise EmbedLensError(f"unknown quantize {quantize!r}: pass '4bit' or '8bit', or leave it out")
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except ValueError:
        raise EmbedLensError(f"{type(config).__name__} is no vision-language config: pass another model") from None
    family = family_of(type(model).__name__)
    left = tuple(unpacked(family)) if family else ()
    packed = sum(  # the matrices that quantisation packs
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.startswith(left)
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = config.get_text_config()
    width, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or width // heads
    cached = 2 * layers * (getattr(text, "num_key_value_heads", None) or heads) * head_width
    positions = (visual_tokens_of(config) if visual_tokens is None else visual_tokens) + TEXT
    widest = 3 * max(text.intermediate_size, 2 * width)
    return Memory(
        parameters=parameters,
        weights=int((parameters - packed) * size + packed * (size if quantize is None else QUANTIZED[quantize])),
        vocabulary=LENSES * 4 * model.get_input_embeddings().weight.numel(),
        sample=positions * (((layers + 1) * width + cached + widest + text.vocab_size) * size + 4 * text.vocab_size),
    )


def visual_tokens_of(config: Any) -> int:
    """Visual tokens of an ordinary picture: all tiles where a family cuts, a megapixel where it keeps the size."""
    vision = config.vision_config
    merge = getattr(vision, "spatial_merge_size", None)
    sides = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    image, patch = (max(side) if isinstance(side, (tuple, list)) else side for side in sides)
    if merge and patch:
        return round(MEGAPIXEL / (patch * merge) ** 2)
    if not image or not patch:
        return UNKNOWN
    ratio = getattr(config, "downsample_ratio", 1 / getattr(config, "scale_factor", 1))
    return round(TILES.get(config.model_type, 1) * (image // patch) ** 2 * ratio**2)


def foretold(
    model: str, device: str | None = None, dtype: str | None = None, quantize: str | None = None, batch_size: int = 1
) -> str:
    """What a run on this model will take, and what is free where it is to run, in one sentence. EmbedLensError: as
    `config_of` and `needed`."""
    if dtype in (None, AUTO):  # as `load` chooses; of the two half precisions both are of a size
        on_gpu = device != "cpu" and (device is not None or torch.cuda.is_available())
        dtype = "bfloat16" if on_gpu and model != MINIATURE else "float32"
    need, free = needed(config_of(model), str(dtype), quantize), 0
    if (device or "cuda").startswith("cuda") and torch.cuda.is_available():
        free = torch.cuda.mem_get_info(torch.device(device or "cuda"))[0]
    there = f"; {free / GIB:.1f} GiB are free" if free else ""
    return f"memory: {need.told(batch_size)} on each device{there}"


def configs() -> dict[str, Any]:
    """Released repository → config of the stock class, made without a network."""
    from transformers import AutoConfig

    listed = json.loads(files("embedlens").joinpath("released.json").read_text(encoding="utf-8"))
    return {name: AutoConfig.for_model(**config) for name, config in listed.items()}


def sizes() -> pd.DataFrame:
    """Visual tokens, parameters, GiB for one picture by kind of weights, and what fits a card, as texts.

    What fits: how many pictures at a time in 16, 8 and 4 bit, up to 64; – where not even one does. A row a repository.

    >>> sizes().loc["llava-hf/llava-1.5-7b-hf", ["visual tokens", "parameters", "bfloat16"]].tolist()
    ['576', '7.06 B', '16']
    """
    rows = {}
    for name, config in configs().items():
        kinds = {"bfloat16": None, "8 bit": "8bit", "4 bit": "4bit"}
        found = {kind: needed(config, "bfloat16", quantize) for kind, quantize in kinds.items()}
        plain = found["bfloat16"]
        row = {"visual tokens": str(visual_tokens_of(config)), "parameters": f"{plain.parameters / 1e9:.2f} B"}
        row |= {kind: f"{memory.total() / GIB:.0f}" for kind, memory in found.items()}
        row["each further picture in a batch"] = f"{plain.sample / GIB:.1f}"
        for card, gib in CARDS.items():
            row[card] = " / ".join(str(memory.pictures(gib) or "–") for memory in found.values())
        rows[name] = row
    return pd.DataFrame(rows.values(), index=pd.Index(rows, name="model"))
