"""Promises of the interventions: each does to the stock modules what it says, and nothing else, then or later."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import embedlens as el
from embedlens import Prune, SkipSublayers, intervene

CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # same sums in another order, or by another kernel


def picture(seed: int = 0, size: tuple[int, int] = (80, 60)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def prompts_of(model, n: int = 3):
    return model.prompts([picture(i) for i in range(n)], ["what ?" + " and how many dogs ?" * i for i in range(n)])


def random_mask(prompt, seed: int = 0, share: float = 0.4) -> torch.Tensor:
    return torch.rand(len(prompt.grid), generator=torch.Generator().manual_seed(seed)) < share


@pytest.fixture(scope="module")
def prompt(tiny):
    return prompts_of(tiny, 1)[0]


# --- skipping and silencing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [[0], [1], [0.5], [1.5], [0.5, 1, 1.5]])
def test_skipping_leaves_exactly_the_masked_rows_without_update(tiny, prompt, at):
    mask = random_mask(prompt)
    rows = prompt.spread(mask)
    with intervene(tiny, SkipSublayers(mask, at=at)) as run:
        seen = el.trace(tiny, prompt).sublayers
    plain = el.trace(tiny, prompt).sublayers
    assert run.fired == len(at)
    for index in range(2 * tiny.n_layers):  # sublayer index/2 leads from row index to row index + 1
        updated = (seen[index + 1] != seen[index]).any(-1)
        assert torch.equal(updated, ~rows if index / 2 in at else torch.ones_like(rows)), index / 2
        if index / 2 < at[0]:
            assert torch.equal(seen[index + 1], plain[index + 1])
    others = seen[int(2 * at[0]) + 1][~rows]
    assert torch.equal(others, plain[int(2 * at[0]) + 1][~rows])  # the update of the others is the stock one


def test_skipped_rows_still_serve_keys_and_values(tiny, prompt):
    """Brute force: the blocks by hand, with the skipped rows put back after the sublayer."""
    mask, at = random_mask(prompt, 3), {0, 1.5}
    rows = prompt.spread(mask)
    h = prompt.embeds[None]
    rotary = tiny.decoder.rotary_emb(h, torch.arange(len(prompt))[None])
    with torch.no_grad():
        for layer, block in enumerate(tiny.blocks):
            for part, place in (("attention", layer), ("mlp", layer + 0.5)):
                if part == "attention":
                    normed = block.input_layernorm(h)
                    update = block.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
                else:
                    update = block.mlp(block.post_attention_layernorm(h))
                h = h + torch.where(rows[None, :, None], torch.tensor(0.0), update) if place in at else h + update
    with intervene(tiny, SkipSublayers(mask, at=sorted(at))):
        seen = tiny.hidden_states(prompt)[-1]
    assert_close(seen, h[0], **CLOSE)
    with intervene(tiny, SkipSublayers(mask, at=[0, 1.5]), Prune(random_mask(prompt, 4))):
        pruned = tiny.hidden_states(prompt)[-1]
    assert not torch.allclose(pruned[-1], h[0, -1], **CLOSE)
