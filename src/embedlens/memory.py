"""How much memory a model will take, from its config alone, and what to do where a batch takes too much.

Nothing is loaded for an estimate, so the answer comes before the wait. What is counted exactly is the weights: the
architecture is built without any storage. The rest is an estimate of what
a study holds at a time, and whether it fits is known only when it runs.

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

from embedlens.errors import EmbedLensError
from embedlens.loading import DTYPES, _locate

T = TypeVar("T")
GIB = 2**30
TEXT = 64  # positions of template and question, beside the visual ones
RESERVE = GIB  # what driver, kernels and fragments take on a GPU; on a CPU, Python with its libraries
#: Views of one picture: tiles of the largest grid, and the whole picture once more.
TILES = {"llava_next": 5, "llava_onevision": 10, "internvl": 13}
MEGAPIXEL = 10**6
UNKNOWN = 2048  # visual tokens of a family whose pictures have no set size
#: Bytes per weight of a quantised matrix: four bits, and one float32 scale for 64 of them; eight bits.
QUANTIZED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}


@dataclass(frozen=True)
class Memory:
    """Bytes that a model takes, in parts."""

    parameters: int
    """A count, not bytes."""
    weights: int
    vocabulary: int
    """The unit-length copy of the input embedding that EmbedLens ranks by, float32."""
    sample: int
    """One prompt in a batch: the residual stream of every layer, keys and values, logits, and the widest activation."""

    def total(self, batch_size: int = 1) -> int:
        """Everything, with a reserve of 1 GiB for what is not the model's."""
        return self.weights + self.vocabulary + batch_size * self.sample + RESERVE

    def told(self, batch_size: int = 1) -> str:
        """One sentence.

        >>> Memory(7 * 10**9, 14 * GIB, GIB // 2, GIB // 4).told(4)
        'about 16.5 GiB (estimate from the config: 7.00 B weights take 14.0, a batch of 4 takes 1.0)'
        """
        batch = batch_size * self.sample / GIB
        return (
            f"about {self.total(batch_size) / GIB:.1f} GiB (estimate from the config: {self.parameters / 1e9:.2f} B "
            f"weights take {self.weights / GIB:.1f}, a batch of {batch_size} takes {batch:.1f})"
        )


def config_of(name_or_folder: str | Path) -> Any:
    """The config of what `embedlens.load` takes; a repository id is looked up on the Hub.

    Raises:
        EmbedLensError: as `load`, for a name that leads nowhere.
    """
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
    """What a model of this config takes.

    Args:
        config: of a checkpoint; from `config_of`, or made by hand.
        dtype: of the weights and of everything computed.
        quantize: "4bit" or "8bit": matrices but the output head, as bitsandbytes does it.
        visual_tokens: of one picture; None: those of an ordinary one, `visual_tokens_of`.

    Raises:
        EmbedLensError: unknown dtype or quantisation, or a config that is no vision-language model's.
    """
    import torch

    if dtype not in DTYPES:
        raise EmbedLensError(f"unknown dtype {dtype!r}: pass one of {', '.join(map(repr, DTYPES))}")
    if quantize not in (None, *QUANTIZED):
        raise EmbedLensError(f"unknown quantize {quantize!r}: pass '4bit' or '8bit', or leave it out")
    size = torch.empty((), dtype=DTYPES[dtype]).element_size()
    plain, matrices, vocabulary = _counted(config)
    text = config.get_text_config()
    width, layers = text.hidden_size, text.num_hidden_layers
    heads = text.num_attention_heads
    kept = 2 * layers * (getattr(text, "num_key_value_heads", None) or heads) * _head_width(text)
    positions = (visual_tokens_of(config) if visual_tokens is None else visual_tokens) + TEXT
    widest = 3 * max(text.intermediate_size, 2 * width)
    per_position = ((layers + 1) * width + kept + widest + text.vocab_size) * size + 4 * text.vocab_size
    return Memory(
        parameters=plain + matrices,
        weights=int(plain * size + matrices * (size if quantize is None else QUANTIZED[quantize])),
        vocabulary=4 * vocabulary,
        sample=positions * per_position,
    )


def _counted(config: Any) -> tuple[int, int, int]:
    """Weights that stay as they are, weights in matrices that quantisation packs, and those of the input embedding."""
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except ValueError:
        raise EmbedLensError(
            f"{type(config).__name__} is no config of a vision-language model: pass a checkpoint that embedlens.load "
            "takes"
        ) from None
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    packed = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    return sum(parameter.numel() for parameter in model.parameters()) - packed, packed, embedding.numel()


def _head_width(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def visual_tokens_of(config: Any) -> int:
    """Visual tokens of an ordinary picture: all tiles where a family cuts, a megapixel where it keeps the size."""
    vision = config.vision_config
    merge = getattr(vision, "spatial_merge_size", None)
    image, patch = (_side(getattr(vision, name, None)) for name in ("image_size", "patch_size"))
    if merge and patch:
        return round(MEGAPIXEL / (patch * merge) ** 2)
    if not image or not patch:
        return UNKNOWN
    shrunk = getattr(config, "downsample_ratio", 1.0) ** 2
    return round(TILES.get(config.model_type, 1) * (image // patch) ** 2 * shrunk)


def _side(value: Any) -> int | None:
    return max(value) if isinstance(value, (tuple, list)) else value


def halving(run: Callable[[int], T], batch_size: int) -> tuple[T, int]:
    """What `run(batch_size)` gives, with half the batch as often as it does not fit on the device, and the last size.

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
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)


def release() -> None:
    """Give back to the device what a failed attempt held."""
    from accelerate.utils import release_memory

    release_memory()


def available(device: str) -> int | None:
    """Bytes that are free on a device, or None where it cannot be asked."""
    import torch

    if device.startswith("cuda") and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return None
