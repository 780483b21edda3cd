"""The trace reads the stock forward and nothing else."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from benchmarks.sweep import eager
from embedlens import load
from embedlens.errors import EmbedLensError
from embedlens.tracing import trace, traces


def pictures(n: int) -> list[Image.Image]:
    return [Image.linear_gradient("L").resize((40 + 8 * i, 50)).rotate(45 * i).convert("RGB") for i in range(n)]


def prompts_of(model, n=3):
    return model.prompts(pictures(n), ["What?" + " and what else?" * i for i in range(n)])


def random_masks(prompt, seed=0):
    generator = torch.Generator().manual_seed(seed)
    some = torch.rand(len(prompt), generator=generator) > 0.5
    return {"visual": prompt.visual, "text": prompt.text, "some": some}


def eager_weights(model, prompt):
    """The full attention weights [layers, heads, s, s], by the stock model's own eager kernel."""
    with eager(model), torch.no_grad():
        output = model.decoder(inputs_embeds=prompt.embeds[None], output_attentions=True, use_cache=False)
    return torch.cat(output.attentions)


def test_the_middle_lies_between_attention_and_mlp(tiny):
    prompt = prompts_of(tiny, 1)[0]
    seen = trace(tiny, prompt)
    for layer, block in enumerate(tiny.blocks):
        with torch.no_grad():
            after = seen.resid_mid[layer] + block.mlp(block.post_attention_layernorm(seen.resid_mid[layer]))
        assert_close(after, seen.resid_post[layer], atol=1e-5, rtol=1e-5)
        assert not torch.equal(seen.resid_mid[layer], seen.resid_pre[layer])


def test_masses_are_sums_of_the_full_attention_weights(tiny):
    prompt = prompts_of(tiny, 1)[0]
    masks = random_masks(prompt)
    weights = eager_weights(tiny, prompt).mean(1)
    seen = trace(tiny, prompt, masks)
    for name, mask in masks.items():
        assert_close(seen.attention[name], weights[:, :, mask].sum(-1), atol=1e-5, rtol=1e-4)  # same sums, other order
    assert_close(seen.attention["visual"] + seen.attention["text"], torch.ones(tiny.n_layers, len(prompt)))
    assert not torch.allclose(seen.attention["some"], weights[:, :, ~masks["some"]].sum(-1), atol=1e-2)


def test_many_masks_are_more_than_a_head_is_wide(tiny):
    prompt = prompts_of(tiny, 1)[0]
    single = {f"at {i}": torch.arange(len(prompt)) == i for i in range(len(prompt))}
    weights = eager_weights(tiny, prompt).mean(1)
    seen = trace(tiny, prompt, single)
    assert_close(torch.stack(list(seen.attention.values()), -1), weights, atol=1e-5, rtol=1e-4)


def test_sublayers_stand_in_order(tiny):
    seen = trace(tiny, prompts_of(tiny, 1)[0])
    parts = [part for pair in zip(seen.resid_mid, seen.resid_post, strict=True) for part in pair]
    assert torch.equal(seen.sublayers, torch.stack([seen.resid_pre[0], *parts]))
    assert torch.equal(seen.resid_post[0], seen.resid_pre[1])


def test_nothing_is_left_behind_even_after_an_exception(tiny):
    prompt = prompts_of(tiny, 1)[0]
    before = tiny.logits(prompt)

    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in tiny.hf.modules()]

    hooks_before = hooks()
    with pytest.raises(EmbedLensError, match="a mask covers the whole prompt"):
        trace(tiny, prompt, {"short": torch.ones(3, dtype=torch.bool)})
    broken = tiny.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace(tiny, prompt, random_masks(prompt))
    broken.remove()
    assert torch.equal(tiny.logits(prompt), before)
    assert hooks() == hooks_before
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_unreadable_kernels_and_unequal_masks_are_refused(tiny, monkeypatch):
    one, two = prompts_of(tiny, 2)
    with pytest.raises(EmbedLensError, match="one set per prompt"):
        next(traces(tiny, [one, two], [{"visual": one.visual}]))
    with pytest.raises(EmbedLensError, match="use the same names"):
        next(traces(tiny, [one, two], [{"visual": one.visual}, {"text": two.text}]))
    monkeypatch.setattr(tiny.decoder.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(EmbedLensError, match="set_attn_implementation"):
        trace(tiny, one, {"visual": one.visual})


def test_a_mask_of_visual_tokens_is_spread_over_the_prompt(tiny):
    prompt = prompts_of(tiny, 1)[0]
    with pytest.raises(EmbedLensError, match="one True or False per visual token"):
        prompt.spread(torch.ones(3, dtype=torch.bool))
    spread = prompt.spread(torch.arange(len(prompt.grid)) == 2)
    assert int(spread.nonzero()[0]) == int(prompt.visual.nonzero()[2])


@pytest.fixture(scope="module")
def without_cls(tiny_folder, tmp_path_factory):
    """The random LLaVA with a SigLIP tower, which has no CLS token."""
    from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    folder = tmp_path_factory.mktemp("checkpoints") / "siglip"
    processor = AutoProcessor.from_pretrained(tiny_folder, backend="pil")
    config = LlavaConfig.from_pretrained(tiny_folder)
    old = config.vision_config
    config.vision_config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=old.image_size,
        patch_size=old.patch_size,
        vision_use_head=False,
    )
    config.vision_feature_select_strategy = processor.vision_feature_select_strategy = "full"
    processor.num_additional_image_tokens = 0
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_tower_without_cls_gives_every_patch(without_cls):
    model = load(without_cls, device="cpu")
    prompt = prompts_of(model, 1)[0]
    states = torch.stack(model.tower_states_of([prompt]))
    assert states.shape[2] == len(prompt.grid) == int(prompt.visual.sum())
    with torch.no_grad():
        projected = model.hf.model.multi_modal_projector(states[0, model.feature_layer])
    assert_close(prompt.embeds[prompt.visual], projected, atol=1e-5, rtol=1e-4)


def test_a_tower_without_cls_whose_first_patch_would_be_dropped_is_refused(without_cls, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(without_cls, tmp_path / "dropped")
    config = json.loads((folder / "config.json").read_text())
    config["vision_feature_select_strategy"] = "default"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EmbedLensError, match="has no CLS token.*set it to 'full'"):
        load(folder, device="cpu")
