"""What most families share, so that a family's file holds only what is its own; and what a vision tower hands out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.patches import PREPROCESSINGS, Frame, ManyViews, PatchGrid

Inputs = Mapping[str, Tensor]  #: What the processor made of one picture: `pixel_values` and sizes or counts beside it

OWN = "own"  # the preprocessing of families that cut pictures in a way that belongs to them
CUTTING = (OWN, *PREPROCESSINGS)  # theirs is the default; the others make a picture square before it is cut that way

#: Canonical role → module path below the Hugging Face model.
MODULES = {
    "vision_tower": "model.vision_tower",
    "projector": "model.multi_modal_projector",
    "decoder": "model.language_model",
    "embedding": "model.language_model.embed_tokens",
    "blocks": "model.language_model.layers",
    "final_norm": "model.language_model.norm",
    "head": "lm_head",
}

#: Role → module path below a decoder block.
BLOCK = {"attention": "self_attn", "mlp": "mlp", "mlp_norm": "post_attention_layernorm"}


class Features(NamedTuple):
    """What one picture brings to the language model."""

    tokens: Float[Tensor, "m d"]
    """Rows that take the place of the image placeholders, in their order; newlines included."""
    deep: Float[Tensor, "joins m d"] | None = None
    """What is added to the same rows after decoder block 0, 1, ..., where a family does that."""


def image_token_id(hf: Any) -> int:
    """Id of the placeholder that visual tokens replace."""
    return hf.config.image_token_id


def shows_patch(grid: PatchGrid) -> Bool[Tensor, " m"]:
    """Which image placeholders stand for a patch: all of them, where a family writes no newlines between."""
    return torch.ones(len(grid), dtype=torch.bool)


def feature_layer(hf: Any) -> int:
    """Index into `tower_states` of the layer that the projector reads; configs also count it from the end."""
    wanted = hf.config.vision_feature_layer
    return wanted if wanted >= 0 else hf.config.vision_config.num_hidden_layers + 1 + wanted


def set_preprocessing(processor: Any, hf: Any, preprocessing: str) -> None:
    """Nothing to set: pictures are cut the way that belongs to the model."""


def patch_states(hf: Any, views: Float[Tensor, "views 3 side side"]) -> list[Float[Tensor, "views patches v"]]:
    """Every layer of the vision tower for each view, in raster order, without CLS where the tower has one (SigLIP has
    none). Nothing is normed that the tower does not norm: CLIP's norm after the last block works on CLS alone."""
    patches = (hf.config.vision_config.image_size // hf.config.vision_config.patch_size) ** 2
    layers = hf.get_submodule(MODULES["vision_tower"])(views, output_hidden_states=True).hidden_states
    return [layer[:, layer.shape[1] - patches :] for layer in layers]


def canvas_side(hf: Any, processor: Any) -> int:
    """Side of the square that the vision tower reads, px: of the whole view, and of each tile."""
    return hf.config.vision_config.image_size


def visual_features(hf: Any, inputs: Sequence[Inputs]) -> list[Features]:
    """Projected visual tokens, and newlines, by the model's own method, picture by picture: they differ in size."""
    return [Features(hf.get_image_features(**one).pooler_output[0]) for one in inputs]


def side_by_side(inputs: Sequence[Inputs]) -> Tensor:
    """The pixels of several pictures of one size as one batch."""
    return torch.cat([one["pixel_values"] for one in inputs])


def smaller(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """(width, height) of at most about so many pixels, in the same shape as far as both sides keep one.

    >>> smaller((400, 100), 10_000), smaller((100, 50), 10_000)
    ((200, 50), (100, 50))
    """
    scale = min(1.0, math.sqrt(pixels / (size[0] * size[1])))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def cut(views: Float[Tensor, "views 3 height width"], patch: int) -> Float[Tensor, "views n 3 patch patch"]:
    """The patches of each view in raster order, without a remainder at the right and at the bottom."""
    down, across = (edge // patch for edge in views.shape[-2:])
    parts = views[..., : down * patch, : across * patch].unflatten(3, (across, patch)).unflatten(2, (down, patch))
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def tiles_then_whole(size: tuple[int, int], tiles: tuple[int, int], side: int, block: int) -> PatchGrid:
    """The grids of a picture of (width, height) px cut into (across, down) tiles, in raster order, and of the whole.
    Each is stretched to a square of `side` px, of which a token is a block of `block`. One tile is the whole."""
    (width, height), (across, down) = size, tiles
    xs = [Fraction(width * col, across) for col in range(across + 1)] if across else []
    ys = [Fraction(height * row, down) for row in range(down + 1)] if down else []
    frames = [Frame(width, height, (x0, y0, x1, y1)) for y0, y1 in pairwise(ys) for x0, x1 in pairwise(xs)]
    frames = [*frames, Frame.stretch(width, height)] if len(frames) > 1 else [Frame.stretch(width, height)]
    grids = [PatchGrid.of_canvas(frame, (side, side), block) for frame in frames]
    return ManyViews.of(grids) if len(grids) > 1 else grids[0]


def check_patches(hf: Any, name: str) -> None:
    """Refuse a checkpoint that keeps CLS among its visual tokens, or drops a patch as if it were CLS."""
    strategy, tower = hf.config.vision_feature_select_strategy, hf.config.vision_config.model_type
    wanted = "default" if tower.startswith("clip") else "full"
    if strategy != wanted:
        what = {
            "default": "keeps the CLS token among the visual tokens, which has no patch",
            "full": f"has no CLS token in its vision tower ({tower}), yet drops the first row, which is a patch",
        }[wanted]
        raise EmbedLensError(
            f"{name} {what} (vision_feature_select_strategy {strategy!r}): set it to {wanted!r} in config.json and "
            "processor_config.json if the model was trained so"
        )


def check_selection(hf: Any, processor: Any, name: str) -> None:
    """`check_patches`, and refuse a checkpoint whose processor does not say how it counts visual tokens."""
    check_patches(hf, name)
    strategy, patch = hf.config.vision_feature_select_strategy, hf.config.vision_config.patch_size
    missing = [field for field in ("patch_size", "vision_feature_select_strategy") if not getattr(processor, field)]
    if missing:
        raise EmbedLensError(
            f"the processor of {name} does not say its {' and '.join(missing)}: add "
            f'"patch_size": {patch}, "vision_feature_select_strategy": "{strategy}" to processor_config.json'
        )
