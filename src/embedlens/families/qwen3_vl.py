"""Qwen3-VL: as Qwen2.5-VL without windows, and with visual features of three depths: the merger's stand in the prompt,
those of earlier tower layers are added to the same rows after the first decoder blocks ("deepstack").

Source: `transformers.models.qwen3_vl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from embedlens.families import instructions, plain, qwen2_5_vl
from embedlens.families.plain import BLOCK, Features, Inputs, image_token_id, set_preprocessing, shows_patch  # noqa: F401
from embedlens.families.qwen2_5_vl import canvas_side, check_config, enough, feature_layer, of_tokens, patch_grid  # noqa: F401

NAME = "Qwen3-VL"
CLASSES = ("Qwen3VLForConditionalGeneration",)
EXAMPLES = ("Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-4B-Instruct")
PROCESSOR = "Qwen3VLProcessor"
PREPROCESSINGS = plain.CUTTING
MODULES = dict(qwen2_5_vl.MODULES)
INSTRUCTIONS = instructions.QWEN3
patch_pixels, positions = qwen2_5_vl.patch_pixels, qwen2_5_vl.positions
LIMITS = (
    *qwen2_5_vl.LIMITS,
    "what joins visual tokens after the first blocks is no sublayer: it is part of what leaves the block before",
)


def visual_features(hf: Any, inputs: Sequence[Inputs]) -> list[Features]:
    """Merged and projected visual tokens, and what joins them later, by the model's own method, picture by picture."""
    seen = (hf.get_image_features(**one) for one in inputs)
    return [Features(s.pooler_output[0], torch.stack([layer[0] for layer in s.deepstack_features])) for s in seen]


def deep_inputs(visual: Bool[Tensor, "b s"], deep: Float[Tensor, "joins n d"]) -> dict[str, Any]:
    """What the decoder is told of features that join after its first blocks; `deep` runs through the batch's rows."""
    return {"visual_pos_masks": visual, "deepstack_visual_embeds": list(deep)}


def tower_states(hf: Any, inputs: Sequence[Inputs]) -> list[Float[Tensor, "layers n v"]]:
    """Every layer of the vision tower, one row per token: its 2x2 patches side by side, in the order of the merger."""
    return [torch.stack(qwen2_5_vl.merged_rows(hf, one)) for one in inputs]
