"""A positive control for `embedlens.measures.sinks`: a copy of a LLaVA in which a few weights are edited by hand, so
that which tokens are sinks, of which kind and from which layer on is known.

Two channels of the vision tower mark some positions, by much or by little; two units of the projector read them, and a
marked patch becomes one vector, the same in every picture. Two units of the second block's MLP, the paper's MLP-2, read
the mark of the LLM sinks, and one on BOS's embedding, and write one massive dimension, to which all queries of later
blocks attend: BOS and the LLM sinks, whose values are nearly zero. ViT sinks, marked by much, repel.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import nn
from torch.nn.functional import normalize

from embedlens.errors import EmbedLensError
from embedlens.loading import load
from embedlens.model_names import MINIATURE
from embedlens.samples import load as load_samples
from embedlens.vlm import QUESTION, VisionLanguageModel

VIT, LLM = (3, 14, 29, 40, 58), (9, 20, 33, 46, 55)  # of 64 patches, none beside another


@torch.no_grad()
def planted(
    model: VisionLanguageModel | None = None, vit: Sequence[int] = VIT, llm: Sequence[int] = LLM
) -> VisionLanguageModel:
    """A copy with ViT sinks and LLM sinks at some patches of every picture, and BOS as a sink; `model` stays as it is.
    It is a LLaVA with a CLIP tower and a LLaMA, in 32 bits; default: the miniature."""
    model = load(MINIATURE, device="cpu") if model is None else model
    parts, name = (deepcopy(model.hf), deepcopy(model.processor)), f"{model.name} with planted sinks"
    copy = VisionLanguageModel(*parts, name, model.preprocessing)
    inner = copy.hf.model
    if type(copy.hf).__name__ != "LlavaForConditionalGeneration" or copy.n_layers < 3:
        raise EmbedLensError(f"sinks cannot be planted in {model.name}: pass a LLaVA of at least three blocks")
    prompt = copy.prompt(load_samples("miniworld", n=1, split="train")[0].image, QUESTION)
    if len({*vit, *llm}) != len(vit) + len(llm) or not {*vit, *llm} <= set(range(len(prompt.grid))):
        raise EmbedLensError(f"patches {vit} and {llm}: name different ones below {len(prompt.grid)}")
    in_tower = float(copy.tower_states_of([prompt])[0][-1].norm(dim=-1).median())
    size = 10 * float(prompt.embeds[prompt.visual].norm(dim=-1).mean())
    _mark(getattr(inner.vision_tower, "vision_model", inner.vision_tower), (vit, 40 * in_tower), (llm, 2 * in_tower))

    rows, massive = copy.hf.get_input_embeddings().weight, copy.width - 1
    generator = torch.Generator().manual_seed(0)
    of_llm, of_bos = torch.linalg.qr(torch.randn(copy.width, 2, generator=generator))[0].T.to(rows)
    early, second = copy.blocks[0], copy.blocks[1]
    projector = inner.multi_modal_projector
    writers = [projector.linear_2, early.self_attn.o_proj, early.mlp.down_proj, second.self_attn.o_proj]
    for weight in (rows.T, projector.linear_2.bias[:, None], *(writer.weight for writer in writers)):
        for mark in (of_llm, of_bos):  # nothing else writes it before MLP-2 reads it
            weight -= torch.outer(mark, mark @ weight)
    words = normalize(rows[[len(copy.tokens) - 1, len(copy.tokens) - 2]], dim=-1)
    rows[prompt.ids[0]] += size * of_bos

    projector.linear_1.weight[:, :2] = 0
    for unit, (value, vector) in enumerate(((20 * in_tower, words[0]), (in_tower, 0.4 * (words[1] + of_llm)))):
        projector.linear_1.weight[unit] = 0
        projector.linear_1.weight[unit, unit], projector.linear_1.bias[unit] = 1, -value
        projector.linear_2.weight[:, unit] = size * vector / value

    for unit, mark in enumerate((of_llm, of_bos)):
        read = mark / second.post_attention_layernorm.weight
        second.mlp.gate_proj.weight[unit] = second.mlp.up_proj.weight[unit] = read
        second.mlp.down_proj.weight[:, unit] = 0
        second.mlp.down_proj.weight[massive, unit] = 60 * size / copy.width

    for block in copy.blocks[2:]:
        query, key = block.self_attn.q_proj, block.self_attn.k_proj
        width = block.self_attn.head_dim
        slow = width // 2 - 1  # of a head: rotary positions turn this component least
        query.bias = nn.Parameter(torch.zeros_like(query.weight[:, 0]))
        query.weight[slow::width], query.bias[slow::width] = 0, width**0.5
        read = -words[0]
        read[massive] += 1
        key.weight[slow::width] = 6 * copy.width**-0.5 * read / block.input_layernorm.weight  # a logit of 6
        block.self_attn.v_proj.weight[:, massive] = 0
    return copy


def _mark(tower: nn.Module, *marks: tuple[Sequence[int], float]) -> None:
    """Make the first channels hold a value at some places and, after the first norm, exactly nothing elsewhere."""
    patches, places = tower.embeddings.patch_embedding.weight, tower.embeddings.position_embedding.weight
    norm, before = tower.pre_layrnorm, len(places) - tower.embeddings.num_patches
    for channel, (chosen, value) in enumerate(marks):
        for part in (patches, places.T, tower.embeddings.class_embedding):
            part[channel] = part[len(marks) :].mean(0)  # the mean of the others is what the norm takes out
        places[[before + at for at in chosen], channel] += 1e4 * places.std()
        norm.weight[channel], norm.bias[channel] = value / len(norm.weight) ** 0.5, 0
