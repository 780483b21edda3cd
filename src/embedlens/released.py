"""Released checkpoints whose size is known: their configs by hand, so that `embedlens models` needs no network.

The numbers are those of config.json in each repository, but only what decides the number of weights. Nothing here was
run: weights are not part of this repository, and what a model does is measured on small checkpoints of the same class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Released:
    """A repository on the Hugging Face hub, and how large its model is."""

    name: str
    model_type: str
    text: dict[str, Any]
    vision: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The config of the stock class, made from the numbers here."""
        from transformers import AutoConfig

        config = {"text_config": self.text, "vision_config": self.vision, "tie_word_embeddings": False}
        return AutoConfig.for_model(self.model_type, **config | self.more)


def _text(
    width: int, mlp: int, layers: int, heads: int, vocabulary: int, kv: int | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv is None else kv,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    } | more


def _tower(width: int, mlp: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    } | more


def _qwen_tower(width: int, mlp: int, depth: int, out: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": mlp, "depth": depth, "out_hidden_size": out, "num_heads": 16}
    return sizes | more


CLIP = _tower(1024, 4096, 24, 16, model_type="clip_vision_model", image_size=336, patch_size=14, projection_dim=768)
SIGLIP = _tower(
    1152, 4304, 26, 16, model_type="siglip_vision_model", image_size=384, patch_size=14, vision_use_head=False
)
INTERNVIT = _tower(1024, 4096, 24, 16, image_size=[448, 448], patch_size=[14, 14], attention_bias=True)
VICUNA = _text(4096, 11008, 32, 32, 32064, model_type="llama")
QWEN2_7B = _text(3584, 18944, 28, 28, 152000, kv=4, model_type="qwen2")
QWEN2_HALF = _text(896, 4864, 24, 14, 152000, kv=2, model_type="qwen2", tie_word_embeddings=True)
TIED = {"tie_word_embeddings": True}

RELEASED = (
    Released("llava-hf/llava-1.5-7b-hf", "llava", VICUNA, CLIP),
    Released("llava-hf/llava-1.5-13b-hf", "llava", _text(5120, 13824, 40, 40, 32064, model_type="llama"), CLIP),
    Released("llava-hf/llava-v1.6-vicuna-7b-hf", "llava_next", VICUNA, CLIP),
    Released(
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava_next",
        _text(4096, 14336, 32, 32, 32064, kv=8, model_type="mistral"),
        CLIP,
    ),
    Released("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava_onevision", QWEN2_7B, SIGLIP),
    Released("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava_onevision", QWEN2_HALF, SIGLIP, TIED),
    Released(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "qwen2_5_vl",
        _text(3584, 18944, 28, 28, 152064, kv=4),
        _qwen_tower(1280, 3420, 32, 3584),
    ),
    Released(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "qwen2_5_vl",
        _text(2048, 11008, 36, 16, 151936, kv=2, tie_word_embeddings=True),
        _qwen_tower(1280, 3420, 32, 2048),
        TIED,
    ),
    Released(
        "Qwen/Qwen3-VL-8B-Instruct",
        "qwen3_vl",
        _text(4096, 12288, 36, 32, 151936, kv=8, head_dim=128),
        _qwen_tower(1152, 4304, 27, 4096, deepstack_visual_indexes=[8, 16, 24]),
    ),
    Released(
        "Qwen/Qwen3-VL-4B-Instruct",
        "qwen3_vl",
        _text(2560, 9728, 36, 32, 151936, kv=8, head_dim=128, tie_word_embeddings=True),
        _qwen_tower(1024, 4096, 24, 2560, deepstack_visual_indexes=[5, 11, 17]),
        TIED,
    ),
    Released(
        "OpenGVLab/InternVL3-8B-hf",
        "internvl",
        QWEN2_7B | {"vocab_size": 151674},
        INTERNVIT,
    ),
    Released(
        "OpenGVLab/InternVL3-1B-hf",
        "internvl",
        QWEN2_HALF | {"vocab_size": 151674, "tie_word_embeddings": False},
        INTERNVIT,
    ),
)


def size_lines() -> dict[str, str]:
    """Name of a repository → its size in words, counted without any storage."""
    from embedlens.memory import GIB, needed

    lines = {}
    for one in RELEASED:
        plain, packed = needed(one.config), needed(one.config, quantize="4bit")
        lines[one.name] = (
            f"{plain.parameters / 1e9:.2f} B parameters; with one picture about {plain.total() / GIB:.0f} GiB in "
            f"bfloat16, {packed.total() / GIB:.0f} GiB in 4 bit"
        )
    return lines
