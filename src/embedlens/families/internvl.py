"""InternVL3: square tiles one after the other, each a raster of its own, then the whole picture as a thumbnail.

Source: `transformers.models.internvl`, tiles by `GotOcr2ImageProcessorPil`. The picture is stretched to a grid of
tiles whose shape comes closest to its own; each tile's patches are shuffled to a quarter as many tokens, 2x2 patches
to one. A picture that one tile fits has no thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.families import instructions, plain
from embedlens.families.plain import BLOCK, Features, Inputs, feature_layer, image_token_id, shows_patch  # noqa: F401
from embedlens.patches import PatchGrid

NAME = "InternVL3"
CLASSES = ("InternVLForConditionalGeneration",)
EXAMPLES = ("OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL3-1B-hf")
PROCESSOR = "InternVLProcessor"
PREPROCESSINGS = plain.CUTTING
MODULES = dict(plain.MODULES)
INSTRUCTIONS = instructions.INTERNVL
LIMITS = (
    "the picture is shown in tiles and once more as a whole, so a box holds patches of both",
    "a row of the vision tower is four patches side by side, as the pixel shuffle leaves them",
    "checkpoints of the -hf kind only: others bring code of their own",
    "one picture, no video",
)


def canvas_side(hf: Any, processor: Any) -> int:
    """Side of a tile, px."""
    return hf.config.vision_config.image_size[0]


def set_preprocessing(processor: Any, hf: Any, preprocessing: str) -> None:
    """Cut tiles also where the image processor is called without its processor, which asks for them at each call."""
    processor.image_processor.crop_to_patches = True


def enough(hf: Any, processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Size at which a picture of (width, height) px still shows all that its tiles can, its sides scaled apart."""
    return plain.smaller(size, 2 * processor.image_processor.max_patches * canvas_side(hf, processor) ** 2)


def patch_pixels(hf: Any, one: Inputs) -> Float[Tensor, "n 3 patch patch"]:
    """What the vision tower reads of each visual token's 2x2 patches."""
    return plain.cut(one["pixel_values"], 2 * hf.config.vision_config.patch_size[0]).flatten(0, 1)


def patch_grid(hf: Any, processor: Any, preprocessing: str, picture_size: tuple[int, int]) -> PatchGrid:
    """The grids of a picture of (width, height) px: tiles in raster order, then the thumbnail; a grid for one tile."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    width, height = picture_size
    images, side = processor.image_processor, canvas_side(hf, processor)
    tiles = (1, 1)
    if images.max_patches > 1:
        tiles = get_optimal_tiled_canvas((height, width), (side, side), images.min_patches, images.max_patches)
    return plain.tiles_then_whole(picture_size, tiles, side, side // tokens_across(hf))


def tokens_across(hf: Any) -> int:
    """Tokens in a row of a tile."""
    tower = hf.config.vision_config
    return int(tower.image_size[0] // tower.patch_size[0] * hf.config.downsample_ratio)


def visual_features(hf: Any, inputs: Sequence[Inputs]) -> list[Features]:
    """Shuffled and projected visual tokens, by the model's own method, picture by picture: they differ in tiles."""
    return [Features(hf.get_image_features(one["pixel_values"]).pooler_output.flatten(0, 1)) for one in inputs]


def tower_states(hf: Any, inputs: Sequence[Inputs]) -> list[Float[Tensor, "layers n v"]]:
    """Every layer of the vision tower, one row per token: its 2x2 patches side by side, as the model's own shuffle.
    Index 0 is the tower's embedding, l leaves block l; CLS is left out."""
    tower, vision = hf.get_submodule(MODULES["vision_tower"]), hf.config.vision_config
    side = vision.image_size[0] // vision.patch_size[0]

    def shuffled(layer: Tensor) -> Tensor:
        patches = layer[:, 1:].unflatten(1, (side, side))
        return hf.model.pixel_shuffle(patches, scale_factor=hf.config.downsample_ratio).flatten(0, 2)

    seen = (tower(one["pixel_values"], output_hidden_states=True).hidden_states for one in inputs)
    return [torch.stack([shuffled(layer) for layer in layers]) for layers in seen]


def check_config(hf: Any, processor: Any, name: str) -> None:
    """Refuse a checkpoint whose CLS, tiles, count of tokens or shuffle would break the order of tokens."""
    config = hf.config
    if config.vision_feature_select_strategy != "default":
        what = f"{name} keeps the CLS token among the patches (vision_feature_select_strategy), which has no place"
        raise EmbedLensError(f"{what}: set it to 'default' in config.json")
    side, size = config.vision_config.image_size, processor.image_processor.size
    if (size.height, size.width) != tuple(side):
        what = f"the processor of {name} makes tiles of {size.width}x{size.height} px, its tower reads "
        raise EmbedLensError(f"{what}{side[1]}x{side[0]}: set size in preprocessor_config.json to that")
    tokens = tokens_across(hf) ** 2
    if config.downsample_ratio != 0.5 or processor.image_seq_length != tokens:
        what = f"the processor of {name} writes {processor.image_seq_length} tokens a tile, its model makes {tokens} "
        what += f"by downsample_ratio {config.downsample_ratio}, which must be 0.5"
        raise EmbedLensError(f"{what}: set image_seq_length in processor_config.json to {tokens}")
