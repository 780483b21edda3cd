"""How much memory a model will take, from its config alone: nothing is loaded, so the answer comes before the wait.

What is counted exactly is the weights: the architecture is built without any storage. The rest is an estimate of what
a study holds at a time, and whether it fits is known only when it runs.

>>> from embedlens.vlm import MINIATURE
>>> found = needed(config_of(MINIATURE), dtype="float32")
>>> found.parameters > 1e6, found.total(batch_size=8) > found.weights
(True, True)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedlens.errors import EmbedLensError
from embedlens.vlm import DTYPES, _locate

if TYPE_CHECKING:
    import pandas as pd

GIB = 2**30
TEXT = 64  # positions of template and question, beside the visual ones
RESERVE = GIB  # what driver, kernels and fragments take on a GPU; on a CPU, Python with its libraries
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
        visual_tokens: of one picture; None: one for each patch of a square picture, 2048 where that is not fixed.

    Raises:
        EmbedLensError: unknown dtype or quantisation, or a config that is no vision-language model's.
    """
    import torch

    if dtype not in DTYPES:
        raise EmbedLensError(f"unknown dtype {dtype!r}: pass one of {', '.join(map(repr, DTYPES))}")
    if quantize not in (None, *QUANTIZED):
        raise EmbedLensError(f"unknown quantize {quantize!r}: pass '4bit', '8bit' or None")
    size = torch.empty((), dtype=DTYPES[dtype]).element_size()
    plain, matrices, vocabulary = _counted(config)
    text = config.get_text_config()
    width, layers = text.hidden_size, text.num_hidden_layers
    heads = text.num_attention_heads
    kept = 2 * layers * (getattr(text, "num_key_value_heads", None) or heads) * _head_width(text)
    positions = (_visual_tokens(config) if visual_tokens is None else visual_tokens) + TEXT
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


def _visual_tokens(config: Any) -> int:
    vision = config.vision_config
    image, patch = (_side(getattr(vision, name, None)) for name in ("image_size", "patch_size"))
    return (image // patch) ** 2 if image and patch else 2048


def _side(value: Any) -> int | None:
    return max(value) if isinstance(value, (tuple, list)) else value


def available(device: str) -> int | None:
    """Bytes that are free on a device, or None where it cannot be asked."""
    import torch

    if device.startswith("cuda") and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return None


# --- the models of the book's page -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A published model by the sizes that its config holds, so that the page can be written without the Hub."""

    model: str
    visual_tokens: int
    """Of one ordinary picture; where a picture is cut into tiles, with all of them."""
    kind: str
    """transformers' name of the architecture."""
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    rest: Mapping[str, Any]

    def config(self) -> Any:
        """The config, as far as sizes go."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.kind, text_config=dict(self.text), vision_config=dict(self.vision), **dict(self.rest)
        )


_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _llama(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": inner,
        "vocab_size": 32064,
    }


def _qwen(kind: str, vocabulary: int, **other: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **other,
    }


KNOWN = (
    Known("llava-hf/llava-1.5-7b-hf", 576, "llava", _llama(4096, 32, 32, 11008), _CLIP, {}),
    Known("llava-hf/llava-1.5-13b-hf", 576, "llava", _llama(5120, 40, 40, 13824), _CLIP, {}),
    Known("llava-hf/llava-v1.6-vicuna-7b-hf", 2880, "llava_next", _llama(4096, 32, 32, 11008), _CLIP, {}),
    Known(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        7290,
        "llava_onevision",
        _qwen("qwen2", 152000),
        {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        {},
    ),
    Known(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        1300,
        "qwen2_5_vl",
        _qwen("qwen2_5_vl_text", 152064),
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
        {"tie_word_embeddings": False},
    ),
    Known(
        "Qwen/Qwen3-VL-8B-Instruct",
        1300,
        "qwen3_vl",
        {
            "model_type": "qwen3_vl_text",
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12288,
            "vocab_size": 151936,
        },
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096},
        {"tie_word_embeddings": False},
    ),
    Known(
        "OpenGVLab/InternVL3-8B-hf",
        3328,
        "internvl",
        _qwen("qwen2", 151674),
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": [448, 448],
            "patch_size": [14, 14],
        },
        {"tie_word_embeddings": False},
    ),
)


def table(batch_size: int = 1) -> pd.DataFrame:
    """GiB that each published model takes at half precision, in eight and in four bits: estimates, nothing measured."""
    import pandas as pd

    rows = []
    for known in KNOWN:
        config = known.config()
        found = {kind: needed(config, "bfloat16", kind, known.visual_tokens) for kind in (None, "8bit", "4bit")}
        rows.append(
            {
                "model": known.model,
                "visual tokens": known.visual_tokens,
                "parameters": f"{found[None].parameters / 1e9:.2f} B",
                "bfloat16": f"{found[None].total(batch_size) / GIB:.0f} GiB",
                "8 bit": f"{found['8bit'].total(batch_size) / GIB:.0f} GiB",
                "4 bit": f"{found['4bit'].total(batch_size) / GIB:.0f} GiB",
                "each further picture in a batch": f"{found[None].sample / GIB:.1f} GiB",
            }
        )
    return pd.DataFrame(rows).set_index("model")


def markdown(batch_size: int = 1) -> str:
    """`table` as the page "Run it on a GPU" shows it."""
    found = table(batch_size).reset_index()
    lines = [list(found.columns), ["---"] * len(found.columns), *found.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
