"""What a model is asked when it is wrapped: are its parts, its words and its patches what the family file says?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.patches import PatchGrid
from embedlens.prompts import assembled, grid_of, written


def check(model: Any) -> None:
    """One small prompt through the model: are the declared parts the ones that compute the answer?"""
    expected = model.hf.config.get_text_config().num_hidden_layers
    if model.n_layers != expected:
        raise EmbedLensError(
            f"{model.name} has {model.n_layers} modules under {model.family.MODULES['blocks']} but its config says "
            f"{expected} layers: correct MODULES['blocks'] in {model.family.__name__}"
        )
    # a ramp down in red, across in green, both in blue, wider than high: a wrong grid or an ignored picture shows
    x, y = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(48) + 0.5, indexing="xy")
    picture = Image.fromarray((255 * _ramp(x / 64, y / 48)).round().byte().permute(1, 2, 0).numpy())
    ids, inputs = written(model, picture, "What is this?")
    _check_pixels(model, picture, inputs)
    prompt = assembled(model, picture, "What is this?", ids, inputs, model._features([inputs])[0])
    with model.recording() as layers:
        logits = model.logits(prompt)
    if len(layers) != model.n_layers + 1:
        raise EmbedLensError(f"{model.name} ran {len(layers) - 1} of {model.n_layers} blocks: no layers may be skipped")
    if not torch.isfinite(logits).all():
        raise EmbedLensError(f"{model.name} gives logits that are not finite: pass dtype='float32' or 'bfloat16'")
    with torch.no_grad():
        read = model.unembed(layers[-1][0])
    if not torch.allclose(read.float(), logits.float(), rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
        raise EmbedLensError(
            f"final norm and head of {model.name} do not turn the last block's output into its logits: correct "
            f"MODULES['final_norm'] and MODULES['head'] in {model.family.__name__}"
        )
    (tower,) = model.tower_states_of([prompt])
    if tower.shape[1] != len(prompt.grid) or not 0 <= model.feature_layer < len(tower):
        raise EmbedLensError(
            f"the vision tower of {model.name} hands out {len(tower)} layers of {tower.shape[1]} rows for "
            f"{len(prompt.grid)} visual tokens, of which the projector reads layer {model.feature_layer}: correct "
            f"tower_states and feature_layer in {model.family.__name__}"
        )
    # The effect: text after the picture must see the visual rows, or masks over them would mean nothing.
    blank = replace(prompt, embeds=prompt.embeds.masked_fill(prompt.visual[:, None], 0))
    if torch.equal(model.logits(blank)[-1], logits[-1]):
        raise EmbedLensError(
            f"{model.name} answers the same with its visual tokens blanked: the weights ignore the picture, or the "
            f"chat format puts it after the question; compare the folder with {model.family.EXAMPLES[0]}"
        )


def _check_pixels(model: Any, picture: Image.Image, inputs: Mapping[str, Tensor]) -> None:
    """Does each token's patch show what its cell of the grid covers, and nothing else? The check picture's colours say
    where they are, so what is expected at a pixel of a patch follows from the grid alone; a bar has one colour, black
    or the mean."""
    images, grid = model.processor.image_processor, grid_of(model, picture)
    try:
        seen = model.family.patch_pixels(model.hf, inputs).float().cpu()
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in (images.image_mean, images.image_std))
        seen = seen * std + mean
        off = _colour_error(seen, grid, mean)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # pixels of another layout
        off = float("inf")
    if not off < 0.02:  # one pixel of the check picture further down is 0.021 redder
        raise EmbedLensError(
            f"{model.name}: under {model.preprocessing!r} its {type(images).__name__} does not show a picture where "
            f"the patch grid has it: take preprocessor_config.json from {model.family.EXAMPLES[0]}"
        )


def real_rows(tokenizer: Any, image_token_id: int, n_embeddings: int, name: str) -> int:
    """Number of embedding rows that belong to the vocabulary: ids from 0 to the last that is no placeholder, nor a
    special token beyond the embedding, as InternVL3's <video>."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    rowless = {image_token_id, tokenizer.pad_token_id, *(index for index in special if index >= n_embeddings)}
    n_rows = 1 + max(index for index in tokenizer.get_vocab().values() if index not in rowless)
    needed = max(n_rows, 1 + image_token_id)
    if needed > n_embeddings:
        raise EmbedLensError(
            f"the tokenizer of {name} has ids up to {needed - 1}, the embedding only {n_embeddings} rows: "
            "tokenizer and weights are of different models; copy both from one"
        )
    return n_rows


def _ramp(x: Float[Tensor, "*n"], y: Float[Tensor, "*n"]) -> Float[Tensor, rgb * n]:
    """Colours of the check picture at points of it, whose sides are 1."""
    return torch.stack([y, x, 1 - (x + y) / 2])


def _colour_error(seen: Float[Tensor, "n 3 h w"], grid: PatchGrid, mean: Float[Tensor, "3 1 1"]) -> float:
    """How far patches of the check picture are from what the grid says they show, colours from 0 to 1. Left out is what
    lies as near to the picture's edge as interpolation reaches, there and back."""
    cells = grid.cells.float()
    down, across = seen.shape[-2:]
    step = (cells[:, 2:] - cells[:, :2]) / torch.tensor([across, down])
    x = (cells[:, :1] + (torch.arange(across) + 0.5) * step[:, :1])[:, None, :].expand(-1, down, -1)
    y = (cells[:, 1:2] + (torch.arange(down) + 0.5) * step[:, 1:])[:, :, None].expand(-1, -1, across)
    width, height = grid.frame.width, grid.frame.height
    reach = 2 * step.clamp(min=1)[:, :, None, None]
    depth = torch.minimum(torch.minimum(x, width - x) / reach[:, 0], torch.minimum(y, height - y) / reach[:, 1])
    inside = (seen - _ramp(x / width, y / height).movedim(0, 1)).abs().amax(1)[depth > 1]
    bars = torch.minimum((seen - mean).abs().amax(1), seen.abs().amax(1))[depth < -1]
    return max(float(inside.max()), float(bars.max()) if len(bars) else 0.0)
