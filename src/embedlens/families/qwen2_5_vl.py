"""Qwen2.5-VL: pictures at their own resolution and shape, 2x2 patches to a token, rotary positions by row and column.

Source: `transformers.models.qwen2_5_vl`. The vision tower's rows are no raster: they come in blocks of 2x2 patches, and
inside the tower the blocks are sorted by attention window. The merger makes one token of each block, and tokens leave
it in raster order of the merged grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from embedlens.errors import EmbedLensError
from embedlens.families import instructions, plain
from embedlens.families.plain import BLOCK, Inputs, image_token_id, set_preprocessing, shows_patch, visual_features  # noqa: F401
from embedlens.patches import Frame, PatchGrid

NAME = "Qwen2.5-VL"
CLASSES = ("Qwen2_5_VLForConditionalGeneration",)
EXAMPLES = ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct")
PROCESSOR = "Qwen2_5_VLProcessor"
PREPROCESSINGS = plain.CUTTING
MODULES = plain.MODULES | {"vision_tower": "model.visual", "projector": "model.visual.merger"}
INSTRUCTIONS = instructions.QWEN
LIMITS = (
    "no Prune(positions='renumber'): patches stand at a row and a column, and gaps between those cannot be closed",
    "a row of the vision tower is four patches side by side, as the merger reads them",
    "one picture, no video",
)


def canvas_side(hf: Any, processor: Any) -> int:
    """Side of a square picture that is not resized, px: 16x16 tokens, or fewer where the processor allows no more."""
    factor = hf.config.vision_config.patch_size * hf.config.vision_config.spatial_merge_size
    return factor * min(16, int(math.sqrt(processor.image_processor.size.longest_edge)) // factor)


def patch_grid(hf: Any, processor: Any, preprocessing: str, picture_size: tuple[int, int]) -> PatchGrid:
    """The merged grid of a picture of (width, height) px: both sides are stretched to whole tokens."""
    factor = processor.image_processor.patch_size * processor.image_processor.merge_size
    cols, rows = (side // factor for side in enough(hf, processor, picture_size))
    return PatchGrid(rows, cols, Frame.stretch(*picture_size))


def enough(hf: Any, processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Size to which the processor itself brings a picture of (width, height) px. EmbedLensError: its sides are too far
    apart for this family."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    width, height = size
    images = processor.image_processor
    factor = images.patch_size * images.merge_size
    try:
        rows_px, cols_px = smart_resize(height, width, factor, images.size.shortest_edge, images.size.longest_edge)
    except ValueError:  # it has no other
        what = f"a picture of {width}x{height} px cannot be cut, this model reads sides up to 200 times apart"
        raise EmbedLensError(f"{what}: crop it, or pass preprocessing='letterbox'") from None
    return cols_px, rows_px


def patch_pixels(hf: Any, one: Inputs) -> Float[Tensor, "n 3 patch patch"]:
    """What the vision tower reads of each visual token's patches, of the first of two equal frames."""
    tower = hf.config.vision_config
    merge, patch = tower.spatial_merge_size, tower.patch_size
    parts = one["pixel_values"].reshape(-1, merge, merge, 3, tower.temporal_patch_size, patch, patch)[:, :, :, :, 0]
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, merge * patch, merge * patch)


def positions(hf: Any, ids: Int[Tensor, " s"], beside: Inputs) -> Int[Tensor, "3 s"]:
    """Rotary positions (time, height, width) of a prompt, by the model's own method."""
    visual = (ids == image_token_id(hf)).int()[None]
    places, _ = hf.model.get_rope_index(
        input_ids=ids[None], mm_token_type_ids=visual, image_grid_thw=beside["image_grid_thw"]
    )
    return places[:, 0]


def tower_states(hf: Any, inputs: Sequence[Inputs]) -> list[Float[Tensor, "layers n v"]]:
    """Every layer of the vision tower, one row per token: its 2x2 patches side by side, in the order of the merger.
    Index 0 is the tower's embedding, l leaves block l. Windows are undone."""
    from transformers.vision_utils import get_vision_window_index

    config, found = hf.config.vision_config, []
    cut = config.spatial_merge_size, config.window_size, config.patch_size
    for one in inputs:
        raster = torch.argsort(get_vision_window_index(one["image_grid_thw"], *cut)[0])
        found.append(torch.stack([layer[raster.to(layer.device)] for layer in merged_rows(hf, one)]))
    return found


def merged_rows(hf: Any, one: Inputs) -> list[Float[Tensor, "n v"]]:
    """Every layer of the vision tower for one picture, patches of a block side by side, blocks in its order."""
    block = hf.config.vision_config.spatial_merge_size**2
    tower = hf.get_submodule(MODULES["vision_tower"])
    layers = tower(one["pixel_values"], grid_thw=one["image_grid_thw"], output_hidden_states=True).hidden_states
    return [layer.reshape(len(layer) // block, -1) for layer in layers]


def of_tokens(hf: Any) -> nn.Module:
    """The merger, of a token's patches side by side, as `tower_states` hands them out."""
    patches = nn.Unflatten(-1, (hf.config.vision_config.spatial_merge_size**2, hf.config.vision_config.hidden_size))
    return nn.Sequential(patches, nn.Flatten(0, 1), hf.get_submodule(MODULES["projector"]))


def feature_layer(hf: Any) -> int:
    """Index into `tower_states` of the layer that the projector reads: the last."""
    return hf.config.vision_config.depth


def check_config(hf: Any, processor: Any, name: str) -> None:
    """Refuse a checkpoint whose processor cuts other patches than its vision tower reads."""
    tower, images = hf.config.vision_config, processor.image_processor
    for said in ("patch_size", "merge_size", "temporal_patch_size"):
        wanted = "spatial_merge_size" if said == "merge_size" else said
        if getattr(images, said) != getattr(tower, wanted):
            raise EmbedLensError(
                f"the processor of {name} has {said} {getattr(images, said)}, its vision tower {wanted} "
                f"{getattr(tower, wanted)}: set {said} in preprocessor_config.json to the tower's"
            )
