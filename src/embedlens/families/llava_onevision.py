"""LLaVA-OneVision: LLaVA-NeXT's views with SigLIP, many more tiles, and a grid thinned out when it gets too large.

Source: `transformers.models.llava_onevision`. SigLIP's patches of 14 px do not divide its 384 px, so that tiles leave
gaps of 6 px where they meet. Above `anyres_max_N` (N views' worth of tokens) the tiles' grid is resized bilinearly to
fewer rows and columns: a token is then a mix of up to four patches, and its cell the share of the grid that it stands
for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from embedlens.errors import EmbedLensError
from embedlens.families import instructions, llava_next, plain
from embedlens.families.llava_next import enough, patch_pixels, shows_patch, tiles_grid, tower_states  # noqa: F401
from embedlens.families.plain import BLOCK, feature_layer, image_token_id, set_preprocessing  # noqa: F401
from embedlens.patches import ManyViews, PatchGrid, Span

NAME = "LLaVA-OneVision"
CLASSES = ("LlavaOnevisionForConditionalGeneration",)
EXAMPLES = ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf")
PROCESSOR = "LlavaOnevisionProcessor"
PREPROCESSINGS = plain.CUTTING
MODULES = dict(plain.MODULES)
canvas_side, visual_features = plain.canvas_side, plain.visual_features
INSTRUCTIONS = instructions.LLAVA
LIMITS = (
    "newline tokens stand between rows of patches and count as text",
    "the picture is shown twice, so a box holds patches of both views",
    "in large pictures a token mixes up to four patches, and its box is the share of the picture that it stands for",
    "one picture, no video",
)


def thinned(spans: Sequence[Span], count: int) -> list[Span]:
    """`count` equal shares of a row of spans, each share as long in spans as any other.

    >>> [(float(a), float(b)) for a, b in thinned([(Fraction(i), Fraction(i + 1)) for i in range(6)], 4)]
    [(0.0, 1.5), (1.5, 3.0), (3.0, 4.5), (4.5, 6.0)]
    """

    def edge(place: Fraction, stop: bool) -> Fraction:
        whole = math.ceil(place) - 1 if stop else math.floor(place)  # at a gap, starts lie behind it and stops before
        start, end = spans[whole]
        return start + (place - whole) * (end - start)

    step = Fraction(len(spans), count)
    return [(edge(i * step, False), edge((i + 1) * step, True)) for i in range(count)]


def patch_grid(hf: Any, processor: Any, preprocessing: str, picture_size: tuple[int, int]) -> ManyViews:
    """The grids of a picture of (width, height) px: the whole view, then the tiles, thinned out if they are many."""
    whole, tiles = llava_next.whole_view(hf, picture_size), tiles_grid(hf, picture_size)
    most_views = int(hf.config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(tiles.rows * tiles.cols / (most_views * whole.rows**2))
    if ratio > 1.1:
        columns, lines = tiles.spans
        fewer = (thinned(columns, int(tiles.cols // ratio)), thinned(lines, int(tiles.rows // ratio)))
        tiles = PatchGrid.of_spans(tiles.frame, *fewer)
    return ManyViews.of([whole, tiles])


def check_config(hf: Any, processor: Any, name: str) -> None:
    """Refuse a checkpoint whose tower layers or views would break the order of tokens."""
    llava_next.check_tiles(hf, processor, name)
    config = hf.config
    if not config.vision_aspect_ratio.startswith("anyres_max_"):
        what = f"{name} has vision_aspect_ratio {config.vision_aspect_ratio!r}, which this wrapper does not support"
        raise EmbedLensError(f"{what}: choose a checkpoint with 'anyres_max_9' or the like")
    if processor.vision_aspect_ratio != config.vision_aspect_ratio:
        what = f"the processor of {name} says {processor.vision_aspect_ratio!r}, not {config.vision_aspect_ratio!r}"
        raise EmbedLensError(f"{what}: make vision_aspect_ratio in processor_config.json and config.json agree")
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    if processor.num_image_tokens != patches:
        what = f"the processor of {name} expects {processor.num_image_tokens} tokens a view, its tower makes {patches}"
        raise EmbedLensError(f"{what}: set num_image_tokens in processor_config.json to {patches}")
    plain.check_patches(hf, name)
