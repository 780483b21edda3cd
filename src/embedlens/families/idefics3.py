"""SmolVLM and Idefics3: square tiles one after the other, then the whole picture; blocks of patches to a token.

Source: `transformers.models.idefics3`, tiles by `Idefics3ImageProcessorPil`. The longer side is always brought to one
length, also of small pictures, and both sides are then stretched to whole tiles. The connector shuffles each tile's
patches, 4x4 to a token in SmolVLM-256M. `<row_1_col_1>` and its like stand before tiles and are text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from embedlens.errors import EmbedLensError
from embedlens.families import instructions, plain
from embedlens.families.plain import BLOCK, Inputs, image_token_id, set_preprocessing, shows_patch  # noqa: F401
from embedlens.patches import PatchGrid

NAME = "SmolVLM / Idefics3"
CLASSES = ("Idefics3ForConditionalGeneration",)
EXAMPLES = ("HuggingFaceTB/SmolVLM-256M-Instruct", "HuggingFaceTB/SmolVLM-500M-Instruct")
PREPROCESSINGS = plain.CUTTING
canvas_side, visual_features = plain.canvas_side, plain.visual_features
MODULES = {role: path.replace("language_model", "text_model") for role, path in plain.MODULES.items()}
MODULES |= {"vision_tower": "model.vision_model", "projector": "model.connector"}
INSTRUCTIONS = instructions.ANY
LIMITS = (
    "the picture is shown in tiles and once more as a whole, so a box holds patches of both",
    "a token is a block of patches, 4x4 in SmolVLM-256M, and a row of the vision tower is those side by side",
    "SmolVLM2, the model of videos, is another class and not read; tested with transformers 5.23.0 alone",
)


def block_side(hf: Any) -> int:
    """Side of a token's block of patches, px of a tile."""
    return hf.config.scale_factor * hf.config.vision_config.patch_size


def enough(hf: Any, processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Size to which the processor itself brings a picture of (width, height) px before it makes whole tiles of it."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

    width, height = size
    blank = np.broadcast_to(np.uint8(0), (3, height, width))  # only its shape is read, so it needs no memory
    rows_px, cols_px = get_resize_output_image_size(blank, processor.image_processor.size.longest_edge)
    return cols_px, rows_px


def patch_grid(hf: Any, processor: Any, preprocessing: str, picture_size: tuple[int, int]) -> PatchGrid:
    """The grids of a picture of (width, height) px: tiles in raster order, then the whole; one where none are cut."""
    width, height = picture_size
    _, down, across = processor.image_processor.get_number_of_image_patches(height, width)
    return plain.tiles_then_whole(picture_size, (across, down), canvas_side(hf, processor), block_side(hf))


def patch_pixels(hf: Any, one: Inputs) -> Float[Tensor, "n 3 block block"]:
    """What the vision tower reads of each visual token's block of patches."""
    return plain.cut(one["pixel_values"][0], block_side(hf)).flatten(0, 1)


def tower_states(hf: Any, inputs: Sequence[Inputs]) -> list[Float[Tensor, "layers n v"]]:
    """Every layer of the vision tower, one row per token: its patches side by side, as the model's own shuffle. Index 0
    is the tower's embedding, l leaves block l; the norm behind the last block is the projector's."""
    tower, shuffled = hf.get_submodule(MODULES["vision_tower"]), hf.model.connector.pixel_shuffle
    seen = (tower(one["pixel_values"][0], output_hidden_states=True).hidden_states for one in inputs)
    scale = hf.config.scale_factor
    return [torch.stack([shuffled(layer.contiguous(), scale).flatten(0, 1) for layer in layers]) for layers in seen]


def of_tokens(hf: Any) -> nn.Module:
    """The tower's last norm and the connector, of a token's patches side by side, as `tower_states` hands them out."""
    patches = nn.Unflatten(-1, (hf.config.scale_factor**2, hf.config.vision_config.hidden_size))
    norm, projection = hf.model.vision_model.post_layernorm, hf.model.connector.modality_projection
    return nn.Sequential(patches, norm, nn.Flatten(-2), projection)


def feature_layer(hf: Any) -> int:
    """Index into `tower_states` of the layer that the projector reads: the last."""
    return hf.config.vision_config.num_hidden_layers


def check_config(hf: Any, processor: Any, name: str) -> None:
    """Refuse a checkpoint whose tiles or count of tokens would break the order of tokens."""
    side, images = hf.config.vision_config.image_size, processor.image_processor
    tile, longest = images.max_image_size["longest_edge"], images.size.longest_edge
    if tile != side or not longest or longest % side:
        what = f"the processor of {name} makes tiles of {tile} px of pictures of {longest}, its tower reads {side}"
        raise EmbedLensError(f"{what}: in preprocessor_config.json set max_image_size so, and size to a multiple of it")
    tokens = (side // hf.config.vision_config.patch_size // hf.config.scale_factor) ** 2
    if processor.image_seq_len != tokens:
        what = f"the processor of {name} writes {processor.image_seq_len} tokens a tile, its model makes {tokens}"
        raise EmbedLensError(f"{what}: set image_seq_len in processor_config.json to {tokens}")
