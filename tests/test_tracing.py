"""The trace reads the stock forward and nothing else."""

from __future__ import annotations

import pytest
import torch
from test_interventions import prompts_of, state
from torch.testing import assert_close

from benchmarks.sweep import eager
from embedlens.errors import EmbedLensError
from embedlens.tracing import trace, traces


def random_masks(prompt, seed=0):
    generator = torch.Generator().manual_seed(seed)
    some = torch.rand(len(prompt), generator=generator) > 0.5
    return {"visual": prompt.visual, "text": prompt.text, "some": some}


def eager_weights(model, prompt):
    """The full attention weights [layers, heads, s, s], by the stock model's own eager kernel."""
    with eager(model), torch.no_grad():
        output = model.decoder(inputs_embeds=prompt.embeds[None], output_attentions=True, use_cache=False)
    return torch.cat(output.attentions)


def test_masses_are_sums_of_the_full_attention_weights(tiny):
    prompt = prompts_of(tiny, 1)[0]
    masks = random_masks(prompt) | {f"at {i}": torch.arange(len(prompt)) == i for i in range(len(prompt))}
    weights = eager_weights(tiny, prompt).mean(1)
    seen = trace(tiny, prompt, masks)
    for name, mask in masks.items():
        assert_close(seen.attention[name], weights[:, :, mask].sum(-1), atol=1e-5, rtol=1e-4)  # same sums, other order
    assert_close(seen.attention["visual"] + seen.attention["text"], torch.ones(tiny.n_layers, len(prompt)))
    assert not torch.allclose(seen.attention["some"], weights[:, :, ~masks["some"]].sum(-1), atol=1e-2)


def test_nothing_is_left_behind_even_after_an_exception(tiny):
    prompt = prompts_of(tiny, 1)[0]
    before, logits = state(tiny), tiny.logits(prompt)
    with pytest.raises(EmbedLensError, match="a mask covers the whole prompt"):
        trace(tiny, prompt, {"short": torch.ones(3, dtype=torch.bool)})
    broken = tiny.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace(tiny, prompt, random_masks(prompt))
    broken.remove()
    assert torch.equal(tiny.logits(prompt), logits) and state(tiny) == before


def test_unreadable_kernels_and_unequal_masks_are_refused(tiny, monkeypatch):
    one, two = prompts_of(tiny, 2)
    with pytest.raises(EmbedLensError, match="one set per prompt"):
        next(traces(tiny, [one, two], [{"visual": one.visual}]))
    with pytest.raises(EmbedLensError, match="use the same names"):
        next(traces(tiny, [one, two], [{"visual": one.visual}, {"text": two.text}]))
    monkeypatch.setattr(tiny.decoder.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(EmbedLensError, match="set_attn_implementation"):
        trace(tiny, one, {"visual": one.visual})
