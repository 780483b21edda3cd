"""LLaVA-1.5 and its kin: one square picture, one visual token per patch, a two-layer projector, a Llama decoder.

Source: `transformers.models.llava` (module names of transformers 5) and LLaVA-1.5's own `expand2square`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from embedlens.families import instructions, plain
from embedlens.families.plain import BLOCK, Features, Inputs, feature_layer, image_token_id, shows_patch, side_by_side  # noqa: F401
from embedlens.patches import PREPROCESSINGS as PREPROCESSINGS
from embedlens.patches import Frame, PatchGrid
from embedlens.pictures import LARGEST, natural_side, resized, squared

NAME = "LLaVA-1.5"
CLASSES = ("LlavaForConditionalGeneration",)
EXAMPLES = ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf")

MODULES = dict(plain.MODULES)
canvas_side = plain.canvas_side
INSTRUCTIONS = instructions.LLAVA
check_config = plain.check_selection

#: What it cannot do, in words; the rest of the package works.
LIMITS: tuple[str, ...] = ()


def set_preprocessing(processor: Any, hf: Any, preprocessing: str) -> None:
    """Make the stock image processor do one of the three preprocessings, as far as it can; `shown` does the rest.
    LLaVA-1.5 was trained on letterboxed pictures (padded with the mean colour, `image_aspect_ratio: pad`); the
    processor saved with the llava-hf checkpoints crops the centre instead, so the choice is set, never inherited."""
    from transformers.image_utils import SizeDict

    side = canvas_side(hf, processor)
    images = processor.image_processor
    images.do_resize = True
    images.do_pad = preprocessing == "letterbox"
    images.do_center_crop = preprocessing == "centre-crop"
    images.crop_size = SizeDict(height=side, width=side)
    images.size = SizeDict(shortest_edge=side) if preprocessing == "centre-crop" else SizeDict(height=side, width=side)


def shown(hf: Any, processor: Any, preprocessing: str, picture: Image) -> Image:
    """The square that the vision tower reads, which the image processor then only normalises.

    It is drawn here because the processors of published checkpoints differ in what they can do: `LlavaImageProcessor`
    pads, `CLIPImageProcessor` and `SiglipImageProcessor`, which llava-hf ships, silently do not. Same pixels as the
    first one's, bit for bit, up to `LARGEST` px.
    """
    side, images = canvas_side(hf, processor), processor.image_processor
    if preprocessing == "centre-crop":
        width, height = picture.size
        long = int(side * max(width, height) / min(width, height))  # as transformers' get_resize_output_image_size
        if max(width, height, long) > LARGEST:
            return resized(picture, (side, side), images.resample, Frame.centre_crop(width, height, side).box)
        picture = resized(picture, (side, long) if width <= height else (long, side), images.resample)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        return picture.crop((left, top, left + side, top + side))
    if preprocessing == "letterbox":
        mean = tuple(int(255 * part) for part in images.image_mean)
        natural = natural_side(picture.size, preprocessing)
        picture = squared(picture, preprocessing, mean, natural if natural <= LARGEST else 2 * side)
    return resized(picture, (side, side), images.resample)


def patch_pixels(hf: Any, one: Inputs) -> Float[Tensor, "n 3 patch patch"]:
    """What the vision tower reads of each visual token's patch."""
    return plain.cut(one["pixel_values"], hf.config.vision_config.patch_size)[0]


def patch_grid(hf: Any, processor: Any, preprocessing: str, picture_size: tuple[int, int]) -> PatchGrid:
    """The grid of a picture of (width, height) px."""
    side = canvas_side(hf, processor)
    frame = Frame.of(preprocessing, *picture_size, side=side)
    return PatchGrid.of_canvas(frame, canvas=(side, side), patch=hf.config.vision_config.patch_size)


def visual_features(hf: Any, inputs: Sequence[Inputs]) -> list[Features]:
    """Projected visual tokens: CLIP's layer -2 without CLS through the projector, by the model's own method."""
    return [Features(rows) for rows in hf.get_image_features(pixel_values=side_by_side(inputs)).pooler_output]


def tower_states(hf: Any, inputs: Sequence[Inputs]) -> list[Float[Tensor, "layers n v"]]:
    """Patch rows of every layer of the vision tower: index 0 is its embedding, l leaves block l. CLS is left out."""
    return list(torch.stack(plain.patch_states(hf, side_by_side(inputs)), dim=1))
