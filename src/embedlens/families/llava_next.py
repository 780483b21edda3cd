"""LLaVA-NeXT (LLaVA-1.6): the whole picture in one square view, then its tiles as one grid with a newline per row.

Source: `transformers.models.llava_next`: `LlavaNextImageProcessorPil` cuts, `LlavaNextModel.pack_image_features` puts
the tiles' tokens side by side, takes off rows or columns of bars and writes a newline token behind every row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.families import instructions, plain
from embedlens.families.plain import BLOCK, Inputs, feature_layer, image_token_id, set_preprocessing  # noqa: F401
from embedlens.patches import Frame, ManyViews, PatchGrid, Span

NAME = "LLaVA-NeXT"
CLASSES = ("LlavaNextForConditionalGeneration",)
EXAMPLES = ("llava-hf/llava-v1.6-vicuna-7b-hf", "llava-hf/llava-v1.6-mistral-7b-hf")
PREPROCESSINGS = plain.CUTTING
MODULES = dict(plain.MODULES)
canvas_side, visual_features = plain.canvas_side, plain.visual_features
INSTRUCTIONS = instructions.LLAVA
LIMITS = (
    "newline tokens stand between rows of patches and count as text",
    "the picture is shown twice, so a box holds patches of both views",
)


def tile_plan(
    pinpoints: Sequence[Sequence[int]], picture_size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of the canvas that is cut into tiles, and of the picture on it, by the processor's own rules.

    >>> tile_plan([[336, 672], [672, 336], [672, 672]], (640, 480))
    ((672, 672), (672, 504))
    """
    from transformers.image_processing_utils import select_best_resolution
    from transformers.image_transforms import ChannelDimension
    from transformers.models.llava_next.image_processing_pil_llava_next import get_patch_output_size

    width, height = picture_size
    best = select_best_resolution((height, width), [list(point) for point in pinpoints])
    blank = np.broadcast_to(np.uint8(0), (3, height, width))  # only its shape is read, so it needs no memory
    new_height, new_width = get_patch_output_size(blank, best, input_data_format=ChannelDimension.FIRST)
    return (best[1], best[0]), (new_width, new_height)


def tiled_spans(canvas: int, shown: int, picture: int, side: int, patch: int) -> list[Span]:
    """Where the patches of tiles lie along one axis of the picture (px); gaps where `patch` does not divide the tile's
    `side`.

    `canvas` and `shown` are the sides of the canvas and of the resized picture in its middle, of which `side` and
    `patch` are px; `picture` is the side of the original.

    >>> [(float(a), float(b)) for a, b in tiled_spans(canvas=8, shown=6, picture=12, side=4, patch=2)]
    [(-2.0, 2.0), (2.0, 6.0), (6.0, 10.0), (10.0, 14.0)]
    """
    before = (canvas - shown) // 2
    starts = [tile * side + place * patch for tile in range(canvas // side) for place in range(side // patch)]
    scale = Fraction(picture, shown)
    return [((start - before) * scale, (start + patch - before) * scale) for start in starts]


def unpadded(shape: tuple[int, int], picture_size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a tiled grid that the model keeps; the rest lies in bars. By the model's own function."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    rows, cols = shape
    width, height = picture_size
    kept = unpad_image(torch.arange(rows * cols).view(1, rows, cols), (height, width))[0]
    if not kept.numel():
        what = "this picture is so thin that the model takes its tiles for bars"
        raise EmbedLensError(f"{what}: crop it, or pass preprocessing='letterbox'")
    top, left = divmod(int(kept[0, 0]), cols)
    return slice(top, top + kept.shape[0]), slice(left, left + kept.shape[1])


def tiles_grid(hf: Any, picture_size: tuple[int, int]) -> PatchGrid:
    """The grid of all tiles together, without the rows and columns that the model takes off."""
    side, patch = hf.config.vision_config.image_size, hf.config.vision_config.patch_size
    canvas, shown = tile_plan(hf.config.image_grid_pinpoints, picture_size)
    columns, lines = (tiled_spans(*sizes, side, patch) for sizes in zip(canvas, shown, picture_size, strict=True))
    rows_kept, cols_kept = unpadded((len(lines), len(columns)), picture_size)
    return PatchGrid.of_spans(Frame.stretch(*picture_size), columns[cols_kept], lines[rows_kept])


def whole_view(hf: Any, picture_size: tuple[int, int]) -> PatchGrid:
    """The grid of the first view: the whole picture, its sides scaled apart to a square."""
    side, patch = hf.config.vision_config.image_size, hf.config.vision_config.patch_size
    return PatchGrid.of_canvas(Frame.stretch(*picture_size), canvas=(side, side), patch=patch)


def patch_grid(hf: Any, processor: Any, preprocessing: str, picture_size: tuple[int, int]) -> ManyViews:
    """The grids of a picture of (width, height) px: the whole view, then the tiles."""
    return ManyViews.of([whole_view(hf, picture_size), tiles_grid(hf, picture_size)])


def enough(hf: Any, processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Size at which a picture of (width, height) px still shows all that the largest canvas can."""
    return plain.smaller(size, max(max(point) for point in hf.config.image_grid_pinpoints) ** 2)


def patch_pixels(hf: Any, one: Inputs) -> Float[Tensor, "n 3 patch patch"]:
    """What the vision tower reads of each visual token's patch, or the mix of several that a token of OneVision is."""
    patches = plain.cut(one["pixel_values"][0], hf.config.vision_config.patch_size)
    return pack(hf, patches.flatten(2), one).unflatten(1, patches.shape[2:])


def pack(hf: Any, views: Float[Tensor, "views patches v"], one: Inputs) -> Float[Tensor, "n v"]:
    """Rows of all views in the order of the visual tokens, by the model's own method, without newlines."""
    config, how = hf.config, "vision_feature_select_strategy"
    how = "vision_aspect_ratio" if config.model_type == "llava_onevision" else how  # their methods differ in this alone
    return hf.model.pack_image_features([views], one["image_sizes"], **{how: getattr(config, how)})[0][0]


def shows_patch(grid: PatchGrid) -> Bool[Tensor, " m"]:
    """All placeholders but the newlines, of which one ends every row of the tiles' grid."""
    whole, tiles = grid.views
    lines = torch.ones(tiles.rows, tiles.cols + 1, dtype=torch.bool)
    lines[:, -1] = False
    return torch.cat([torch.ones(len(whole), dtype=torch.bool), lines.flatten()])


def tower_states(hf: Any, inputs: Sequence[Inputs]) -> list[Float[Tensor, "layers n v"]]:
    """Patch rows of every layer of the vision tower, put in the order of the visual tokens by the model's own method.
    Index 0 is the tower's embedding, l leaves block l; CLS is left out. Rows are mixed where tokens are."""
    layers = (plain.patch_states(hf, one["pixel_values"][0]) for one in inputs)
    return [torch.stack([pack(hf, layer, one) for layer in own]) for own, one in zip(layers, inputs, strict=True)]


def check_config(hf: Any, processor: Any, name: str) -> None:
    """Refuse a checkpoint whose tower layers, CLS or tiles would break the order of tokens."""
    check_tiles(hf, processor, name)
    plain.check_selection(hf, processor, name)


def check_tiles(hf: Any, processor: Any, name: str) -> None:
    """Refuse a checkpoint whose processor cuts other tiles than its model expects, or that reads several layers."""
    config, images = hf.config, processor.image_processor
    if not isinstance(config.vision_feature_layer, int):
        what = f"the projector of {name} reads several layers of the vision tower ({config.vision_feature_layer})"
        raise EmbedLensError(f"{what}: choose a checkpoint whose vision_feature_layer is one number")
    side, cut = config.vision_config.image_size, images.size.height or images.size.shortest_edge
    if cut != side:
        what = f"the processor of {name} makes tiles of {cut} px, its vision tower reads {side}"
        raise EmbedLensError(f"{what}: set size in preprocessor_config.json to the tower's image_size")
    if [list(point) for point in images.image_grid_pinpoints] != [list(p) for p in config.image_grid_pinpoints]:
        what = f"the processor of {name} and its config.json name different image_grid_pinpoints"
        raise EmbedLensError(f"{what}: copy those of config.json to preprocessor_config.json")
    if any(math.gcd(edge, side) != side for point in config.image_grid_pinpoints for edge in point):
        what = f"the image_grid_pinpoints of {name} are no multiples of {side} px"
        raise EmbedLensError(f"{what}: correct them in config.json")
