"""Stage "tower": the vision tower learns from captions alone, contrastive (CLIP) and captioning (CoCa, CapPa).

The captioning decoder reads the patches of hidden layer -2, the very ones that LLaVA consumes. No boxes, no labels.
Decoder and text encoder are no part of the miniature; they are kept for a further training of the tower.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPVisionModel, PreTrainedTokenizerBase

from training.data import Captioned, Encoder, captioned, loader, normalised
from training.loop import along, autocast, optimisers, seed_everything, train
from training.recipe import Recipe, Stage
from training.shipped import shipped

LONGEST = 160
HEADS = Path(__file__).parent / "heads.safetensors"  # of the tower that ships; not part of the package


class Captioner(nn.Module):
    """Vision tower + text encoder (contrastive) + caption decoder (captioning)."""

    def __init__(self, recipe: Recipe, vocabulary: int):
        super().__init__()
        width = recipe.vision_width
        self.vision = CLIPVisionModel(recipe.vision_config())
        self.text_embed = nn.Embedding(vocabulary, width)
        self.text_position_embed = nn.Embedding(LONGEST, width)
        block = {"d_model": width, "nhead": recipe.vision_heads, "dim_feedforward": 4 * width, "dropout": 0.0}
        shared = {"activation": partial(F.gelu, approximate="tanh"), "batch_first": True, "norm_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**block, **shared), 1, enable_nested_tensor=False
        )
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(**block, **shared) for _ in range(recipe.reader_layers))
        self.patch_norm = nn.LayerNorm(width)
        self.text_norm, self.image_norm, self.word_norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        if recipe.device == "cpu":  # the fused kernel's backward is slower than plain products at 65 tokens
            self.vision.set_attn_implementation("eager")
        for embedding in (self.text_embed, self.text_position_embed):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """pixels Float[b, 3, h, w], ids Long[b, t] -> word logits [b, t-1, V], image and text vectors [b, d], scale."""
        seen = self.vision(pixels, output_hidden_states=True)
        patches = self.patch_norm(seen.hidden_states[-2][:, 1:])
        place = torch.arange(ids.shape[1], device=ids.device)
        words = self.text_embed(ids) + self.text_position_embed(place)
        padding = ids == 0
        said = self.encoder(words, src_key_padding_mask=padding)
        counted = (~padding).unsqueeze(-1).to(said.dtype)
        text = self.text_norm((said * counted).sum(1) / counted.sum(1))
        image = self.image_norm(seen.pooler_output)
        h = words[:, :-1]
        ahead = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        for layer in self.decoder:
            h = layer(h, patches, tgt_mask=ahead, tgt_is_causal=True)
        logits = self.word_norm(h) @ self.text_embed.weight.T
        return logits, F.normalize(image, dim=-1), F.normalize(text, dim=-1), self.log_scale.exp().clamp(max=100)


def attention(recipe: Recipe) -> list[SDPBackend]:
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    return [*(fused if recipe.device != "cpu" else []), SDPBackend.MATH]


def losses(model: Captioner, batch: Captioned, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    pixels, ids = batch.pixels.to(recipe.device), batch.ids.to(recipe.device)
    with autocast(recipe.device), sdpa_kernel(attention(recipe)):
        logits, image, text, scale = model(normalised(pixels), ids)
    captioning = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
    pairs = scale * image.float() @ text.float().T
    own = torch.arange(len(pairs), device=pairs.device)
    contrastive = (F.cross_entropy(pairs, own) + F.cross_entropy(pairs.T, own)) / 2
    found = (pairs.argmax(1) == own).float().mean()
    loss = recipe.contrastive * contrastive + recipe.captioning * captioning
    return loss, {"captioning": captioning.item(), "contrastive": contrastive.item(), "retrieved": found.item()}


def name_accuracy(
    model: Captioner, batch: Captioned, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> dict[str, float]:
    """Share of names, colours and letters in held-out captions that the decoder puts first, given the words before."""
    from embedlens.samples.miniworld.sprites import CATEGORIES, COLOURS, DIGITS, LETTERS

    with autocast(recipe.device), sdpa_kernel(attention(recipe)):
        logits, *_ = model(normalised(batch.pixels.to(recipe.device)), batch.ids.to(recipe.device))
    target = batch.ids[:, 1:].to(recipe.device)
    hit = logits.argmax(-1) == target
    result = {}
    for what, words in {
        "name": [c.name for c in CATEGORIES],
        "colour": list(COLOURS),
        "letter": list(LETTERS + DIGITS),
    }.items():
        first = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in words]
        asked = torch.isin(target, torch.tensor(first, device=target.device))
        result[what] = hit[asked].float().mean().item()
    return result


def again(fresh: Iterator[Captioned], times: int, device: str, kept: int = 400) -> Iterator[Captioned]:
    """Every batch once as it comes, then `times` - 1 of the last `kept`, which stay on the device."""
    rng, pool = random.Random(0), deque[Captioned](maxlen=kept)
    for batch in fresh:
        pool.append(Captioned(batch.pixels.to(device), batch.ids.to(device)))
        yield pool[-1]
        yield from (rng.choice(pool) for _ in range(times - 1))


def kept_heads(model: Captioner) -> dict[str, Tensor]:
    """Caption decoder and text encoder that the shipped tower learned with; empty if none of this shape were kept."""
    found = load_file(HEADS) if HEADS.exists() else {}
    own = {name: value.shape for name, value in model.state_dict().items() if not name.startswith("vision.")}
    return found if {name: value.shape for name, value in found.items()} == own else {}


def keep_heads(module: Mapping[str, Tensor], file: Path) -> None:
    """Keep them (fp16) from the state of a Captioner: beginning without them costs a further training its start."""
    heads = {name: value.half().contiguous() for name, value in module.items() if not name.startswith("vision.")}
    save_file(heads, file)
    file.chmod(0o644)  # safetensors writes for its owner alone


def train_tower(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path, stop_after: int | None = None
) -> CLIPVisionModel:
    """Train (or go on training) the tower; returns it in float32."""
    seed_everything(recipe.seed, recipe.device)
    stage, encoder = recipe.tower, Encoder(tokenizer)
    model = Captioner(recipe, len(tokenizer)).to(recipe.device)
    hidden = lambda name: "embed" not in name and "layers" in name or name.startswith("decoder")  # noqa: E731

    def batches(stage: Stage) -> Callable[[int, Tensor], Iterator[Captioned]]:
        def from_step(start: int, done: Tensor) -> Iterator[Captioned]:
            def make(step: int) -> Captioned:
                return captioned(recipe, "train", step, stage.batch, encoder, along(step, stage, done))

            fresh = loader(make, start // stage.seen, stage, recipe.workers)
            return fresh if stage.seen == 1 else again(fresh, stage.seen, recipe.device)

        return from_step

    def measure() -> dict[str, float]:
        total: dict[str, float] = {}
        rounds = recipe.measured
        for number in range(rounds):
            batch = captioned(recipe, "heldout", number, 64, encoder)
            found = losses(model, batch, recipe)[1] | name_accuracy(model, batch, tokenizer, recipe)
            for key, value in found.items():
                total[key] = total.get(key, 0.0) + value / rounds
        return total

    def learn(name: str, stage: Stage) -> None:
        optims = optimisers(model, stage, hidden)
        train(
            name, model, stage, optims, batches(stage), lambda batch: losses(model, batch, recipe), measure, folder,
            stop_after,
        )  # fmt: skip

    heads: dict[str, Tensor] = {}
    if recipe.onward:
        model.vision.load_state_dict(shipped().model.vision_tower.state_dict())
        heads = kept_heads(model)
        model.load_state_dict(heads, strict=False)
    if recipe.heads and not heads and not (folder / "tower.pt").exists():
        model.vision.requires_grad_(False)
        learn("heads", recipe.heads)
        model.vision.requires_grad_(True)
    learn("tower", stage)
    return model.vision.float().cpu().eval()
