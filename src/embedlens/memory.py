"""How much memory a model will take, from its config alone, and what to do where a batch takes too much.

Weights are counted exactly, on an architecture without storage; the rest is an estimate, before anything is loaded.

>>> from embedlens.model_names import MINIATURE
>>> found = needed(config_of(MINIATURE), dtype="float32")
>>> found.parameters > 1e6, found.total(batch_size=8) > found.weights
(True, True)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from embedlens.errors import EmbedLensError
from embedlens.loading import DTYPES, _locate

T = TypeVar("T")
GIB = 2**30
TEXT = 64  # positions of template and question, beside the visual ones
RESERVE = GIB  # what driver, kernels and fragments take on a GPU; on a CPU, Python with its libraries
#: Views of one picture: the largest grid and the whole.
TILES = {"llava_next": 5, "llava_onevision": 10, "internvl": 13, "idefics3": 17}
MEGAPIXEL, UNKNOWN = 10**6, 2048  # a picture of a family that keeps its size; visual tokens where nothing says how many
#: Bytes per weight of a quantised matrix: four bits, and one float32 scale for 64 of them; eight bits.
QUANTIZED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}


@dataclass(frozen=True)
class Memory:
    """Bytes that a model takes, in parts; `parameters` is a count, `vocabulary` EmbedLens's float32 copy of the input
    embedding, `sample` one prompt in a batch with the residual stream of every layer."""

    parameters: int
    weights: int
    vocabulary: int
    sample: int

    def total(self, batch_size: int = 1) -> int:
        """Everything, with a reserve of 1 GiB for what is not the model's."""
        return self.weights + self.vocabulary + batch_size * self.sample + RESERVE

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
    """What a model of this config takes, computed in `dtype`; "4bit" or "8bit" as bitsandbytes does it.

    `visual_tokens`: of one picture; None: those of an ordinary one. EmbedLensError for what is unknown here, or a
    config that is no vision-language model's.
    """
    from transformers import AutoModelForImageTextToText

    if dtype not in DTYPES:
        raise EmbedLensError(f"unknown dtype {dtype!r}: pass one of {', '.join(map(repr, DTYPES))}")
    if quantize not in (None, *QUANTIZED):
        raise EmbedLensError(f"unknown quantize {quantize!r}: pass '4bit' or '8bit', or leave it out")
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except ValueError:
        raise EmbedLensError(
            f"{type(config).__name__} is no config of a vision-language model: pass a checkpoint that embedlens.load "
            "takes"
        ) from None
    head, size = model.get_output_embeddings(), torch.empty((), dtype=DTYPES[dtype]).element_size()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    packed = sum(module.weight.numel() for module in linear)  # the matrices that quantisation packs
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
        vocabulary=4 * model.get_input_embeddings().weight.numel(),
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


def halving(run: Callable[[int], T], batch_size: int) -> tuple[T, int]:
    """What `run(batch_size)` gives, with half the batch as often as it does not fit on the device, and the last size.

    accelerate's find_executable_batch_size shrinks by a tenth, so that rounding moves; and it does not say the size.

    >>> halving(lambda batch_size: "so many at a time", 8)
    ('so many at a time', 8)
    """
    while True:
        try:
            return run(batch_size), batch_size
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not out_of_memory(error):
                raise
        release()  # out of the clause, whose traceback holds what filled the memory
        batch_size //= 2


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a batch is too large for the device, or for main memory."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)


def release() -> None:
    """Give back to the device what a failed attempt held."""
    from accelerate.utils import release_memory

    release_memory()


def available(device: str) -> int | None:
    """Bytes that are free on a device, or None where it cannot be asked."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return None
