"""Stages "language", "alignment" and "tuning": a Llama learns to answer, first from words, then from pictures.

language    the decoder alone, on text: a description in place of the picture, then questions
alignment   the projector alone, on captions; tower and language model frozen
tuning      projector and language model, on questions; tower frozen, unless the recipe's `tower_learns`
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from transformers import (
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training.data import KINDS, Batch, Encoder, conversations, loader, normalised
from training.loop import along, autocast, optimisers, seed_everything, train
from training.recipe import Recipe, Stage
from training.shipped import shipped
from training.tower import Captioner, attention


def initialised(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Embeddings of norm one, unit-gain matrices, small writes into the residual stream.

    At this width the usual std of .02 gives embeddings of norm .3, which the first layer drowns: the direction of a
    word would be lost after one layer, and with it what nearest-embedding retrieval could find.
    """
    config = model.config
    std = config.hidden_size**-0.5
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(parameter, std=std * (2 * config.num_hidden_layers) ** -0.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=std)
    return model


def quick_attention(model: PreTrainedModel, recipe: Recipe) -> None:
    """On CPUs plain products beat the fused kernel's backward at these lengths (by half, measured at 176 tokens)."""
    if recipe.device == "cpu":
        model.set_attn_implementation("eager")


def predicted(
    model: nn.Module, head: nn.Module, embeds: Tensor, batch: Batch, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits for the weighted tokens only: (logits Float[n, V], targets Long[n], weights Float[n])."""
    wanted, targets, weights = weighted_tokens(batch)
    with autocast(recipe.device), sdpa_kernel(attention(recipe)):
        mask = additive(batch) if model.config._attn_implementation == "eager" else batch.mask()
        hidden = model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=batch.position, use_cache=False
        ).last_hidden_state
        logits = head(hidden[:, :-1][wanted])
    return logits.float(), targets, weights


def weighted_tokens(batch: Batch) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Where the loss looks (row and column of the token before), which tokens it wants there, their weights."""
    wanted = (batch.weight[:, 1:] > 0).nonzero(as_tuple=True)
    return wanted, batch.ids[:, 1:][wanted], batch.weight[:, 1:][wanted]


def additive(batch: Batch) -> Tensor:
    """Float[b, 1, t, t]: the mask that eager attention adds, in the precision that scores have here."""
    mask, device = batch.mask(), batch.ids.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()


def exact(logits: Tensor, batch: Batch) -> dict[str, tuple[int, int]]:
    """kind -> (answers whose every token is the first choice, answers asked). Same as greedy decoding being exact."""
    row, column = (batch.weight[:, 1:] > 0).nonzero(as_tuple=True)
    hit = (logits.argmax(-1) == batch.ids[:, 1:][row, column]).tolist()
    kind, block = batch.kind[:, 1:][row, column].tolist(), batch.block[:, 1:][row, column].tolist()
    answers: dict[tuple[int, int, int], bool] = {}
    for r, k, b, ok in zip(row.tolist(), kind, block, hit, strict=True):
        if k >= 0:
            answers[r, b, k] = answers.get((r, b, k), True) and ok
    counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for (_, _, k), ok in answers.items():
        right, asked = counts[KINDS[k]]
        counts[KINDS[k]] = (right + ok, asked + 1)
    return counts


def heldout(
    outputs: Callable[[Batch], tuple[Tensor, Tensor, Tensor]], recipe: Recipe, stage: str, encoder: Encoder
) -> dict[str, float]:
    """kind of question -> share of held-out answers that are right."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for number in range(recipe.measured):
        batch = conversations(recipe, stage, "heldout", number, 24, encoder).to(recipe.device)
        for kind, (hits, questions) in exact(outputs(batch)[0], batch).items():
            right[kind] += hits
            asked[kind] += questions
    return {kind: right[kind] / asked[kind] for kind in sorted(asked)}


def sinks(
    language: nn.Module,
    outputs: Callable[[Batch], tuple[Tensor, Tensor, Tensor]],
    recipe: Recipe,
    stage: str,
    encoder: Encoder,
) -> dict[str, list[float]]:
    """On one held-out batch: what makes an attention sink, layer by layer.

    bos   mean share of attention that text queries give <s>, over heads and queries; a list over blocks
    peak  largest |x| / RMS of any token in the residual stream; a list over block inputs, then the last output
    """
    batch = conversations(recipe, stage, "heldout", 0, 24, encoder).to(recipe.device)
    text = (batch.block >= 0) & ~batch.image
    text[:, 0] = False  # <s> itself
    real = batch.block >= 0
    found: dict[str, list[float]] = {"bos": [], "peak": []}

    def stream(hidden: Tensor) -> None:
        x = hidden[real].float()
        found["peak"].append((x.abs().amax(-1) / x.square().mean(-1).sqrt()).max().item())

    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: stream(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for block in language.layers
    ]
    handles += [
        block.self_attn.register_forward_hook(
            lambda _, args, output: found["bos"].append(output[1][..., 0].float().mean(1)[text].mean().item())
        )
        for block in language.layers
    ]
    handles.append(language.norm.register_forward_pre_hook(lambda _, args: stream(args[0])))
    usual = language.config._attn_implementation
    language.set_attn_implementation("eager")  # the fused kernels do not say where they look
    try:
        outputs(batch)
    finally:
        language.set_attn_implementation(usual)
        for handle in handles:
            handle.remove()
    return found


def batches(recipe: Recipe, name: str, stage: Stage, encoder: Encoder) -> Callable[[int, Tensor], Iterator[Batch]]:
    """Start step, progress -> the stage's training batches from there on."""
    return lambda start, done: loader(
        lambda step: conversations(recipe, name, "train", step, stage.batch, encoder, along(step, stage, done)),
        start,
        stage,
        recipe.workers,
    )


def train_language(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path, stop_after: int | None = None
) -> LlamaForCausalLM:
    seed_everything(recipe.seed + 1, recipe.device)
    stage, encoder = recipe.language, Encoder(tokenizer)
    model = initialised(LlamaForCausalLM(recipe.text_config(len(tokenizer)))).to(recipe.device)
    if recipe.onward:
        before = shipped()
        model.model.load_state_dict(before.model.language_model.state_dict())
        model.lm_head.load_state_dict(before.lm_head.state_dict())
    quick_attention(model, recipe)

    def outputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return predicted(model.model, model.lm_head, model.model.embed_tokens(batch.ids), batch, recipe)

    train(
        "language",
        model,
        stage,
        optimisers(model, stage, lambda name: "layers" in name),
        batches(recipe, "language", stage, encoder),
        lambda batch: (weighted_loss(*outputs(batch.to(recipe.device))), {}),
        lambda: (
            heldout(outputs, recipe, "language", encoder) | sinks(model.model, outputs, recipe, "language", encoder)
        ),
        folder,
        stop_after,
    )
    return model


def configured(recipe: Recipe, vocabulary: int, image_token: int) -> LlavaConfig:
    return LlavaConfig(
        vision_config=recipe.vision_config(),
        text_config=recipe.text_config(vocabulary),
        image_token_index=image_token,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=recipe.visual_tokens,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def untrained(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlavaForConditionalGeneration:
    """The whole model from the recipe's configuration, seeded, nothing learned."""
    seed_everything(recipe.seed + 2, recipe.device)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    return LlavaForConditionalGeneration(configured(recipe, len(tokenizer), image_token))


def assembled(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> LlavaForConditionalGeneration:
    """Tower and language model put together, from the latest checkpoint of each stage.

    An onward training keeps the part that ships where its stage has no steps.
    """
    model = shipped() if recipe.onward else untrained(recipe, tokenizer)
    whole = [file for stage in ("tuning", "alignment") if (file := folder / f"{stage}.pt").exists()]
    if whole:
        model.load_state_dict(torch.load(whole[0], weights_only=True, map_location="cpu")["module"])
        return model
    planned = {"tower": recipe.tower, "language": recipe.language}
    parts = {name: folder / f"{name}.pt" for name, stage in planned.items() if stage.steps or not recipe.onward}
    for stage, file in parts.items():
        if not file.exists():
            raise FileNotFoundError(f"no {file.name} in {folder}: run `python -m training --stage {stage}` first")
    if "tower" in parts:
        tower = Captioner(recipe, len(tokenizer))
        tower.load_state_dict(torch.load(parts["tower"], weights_only=True, map_location="cpu")["module"])
        model.model.vision_tower.load_state_dict(tower.vision.state_dict())
    if "language" in parts:
        words = LlamaForCausalLM(recipe.text_config(len(tokenizer)))
        words.load_state_dict(torch.load(parts["language"], weights_only=True, map_location="cpu")["module"])
        model.model.language_model.load_state_dict(words.model.state_dict())
        model.lm_head.load_state_dict(words.lm_head.state_dict())
    return model


def visual(model: LlavaForConditionalGeneration, pixels: Tensor, recipe: Recipe) -> Tensor:
    """Float[b, n, d]: projected patches of hidden layer -2."""
    with autocast(recipe.device):
        with torch.set_grad_enabled(recipe.tower_learns and torch.is_grad_enabled()):
            seen = model.model.vision_tower(normalised(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]
        return model.model.multi_modal_projector(seen)


def with_pictures(model: LlavaForConditionalGeneration, batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    assert batch.pixels is not None
    embeds = model.get_input_embeddings()(batch.ids)
    seen = visual(model, batch.pixels, recipe).to(embeds.dtype)
    embeds = embeds.masked_scatter(batch.image[..., None].expand_as(embeds), seen)
    return predicted(model.model.language_model, model.lm_head, embeds, batch, recipe)


def train_together(
    name: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path, stop_after: int | None = None
) -> LlavaForConditionalGeneration:
    """Stage "alignment" or "tuning"."""
    stage = {"alignment": recipe.alignment, "tuning": recipe.tuning}[name]
    encoder = Encoder(tokenizer)
    model = assembled(recipe, tokenizer, folder).to(recipe.device)
    seed_everything(recipe.seed + (3 if name == "alignment" else 4), recipe.device)
    model.requires_grad_(True)
    seeing = recipe.tower_learns and name == "tuning"
    model.model.vision_tower.requires_grad_(seeing)
    muon = "vision_tower" if seeing else "language_model.layers"
    quick_attention(model, recipe)
    if name == "alignment" and recipe.freeze_language_in_alignment:
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)

    def outputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return with_pictures(model, batch, recipe)

    train(
        name,
        model,
        stage,
        optimisers(model, stage, lambda parameter: muon in parameter and "layers" in parameter),
        batches(recipe, name, stage, encoder),
        lambda batch: (weighted_loss(*outputs(batch.to(recipe.device))), {}),
        lambda: (
            heldout(outputs, recipe, "tuning", encoder)
            | sinks(model.model.language_model, outputs, recipe, "tuning", encoder)
        ),
        folder,
        stop_after,
    )
    return model
