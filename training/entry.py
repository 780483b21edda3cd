"""Trained late entry: projector and language model learn on with the visual tokens entering at a later layer.

The arms (entry layers) begin at the weights that ship, see the same batches in the same order and are trained side by
side: projector whole, language model by low-rank additions to its matrices, so that ten of them fit the repository.
The arm that enters at layer 0 is the twin that the others are compared with.

    python -m training.entry              # every seed that is not finished, then written into the package
    python -m training.entry --seed 1     # one seed
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.nn.utils import parametrize
from transformers import AutoTokenizer, LlamaModel, LlavaForConditionalGeneration

from embedlens.measures.adapters import FOLDER, fingerprint
from training.data import Batch, Encoder, normalised
from training.loop import autocast, optimisers, seed_everything, train
from training.recipe import LATE_ENTRY, LateEntry, Recipe
from training.shipped import HOME, shipped
from training.talk import additive, batches, heldout, quick_attention, weighted_loss, weighted_tokens
from training.tower import attention


class LowRank(nn.Module):
    """W + up @ down: Float[out, in] from Float[out, rank] and Float[rank, in]; begins at W."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) * weight.shape[1] ** -0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


class Arm(nn.Module):
    """A projector and a language model whose visual tokens enter at block `layer`."""

    def __init__(self, base: LlavaForConditionalGeneration, layer: int, rank: int):
        super().__init__()
        self.layer = layer
        self.projector = copy.deepcopy(base.model.multi_modal_projector).requires_grad_(True)
        self.language: LlamaModel = copy.deepcopy(base.model.language_model).requires_grad_(False)
        for module in list(self.language.layers.modules()):
            if isinstance(module, nn.Linear):
                parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))

    def forward(self, seen: Tensor, batch: Batch) -> Tensor:
        """Last hidden states Float[b, t, d]. Below `layer` the text runs alone, at the positions of the whole."""
        language, image = self.language, batch.image[0]
        if not bool((batch.image == image).all()):
            raise ValueError("visual tokens stand in other columns from row to row: batch rows of one prefix")
        hidden = language.embed_tokens(batch.ids)
        visual = self.projector(seen).to(hidden.dtype)
        hidden = hidden.masked_scatter(batch.image[..., None].expand_as(hidden), visual)
        rotary, mask = language.rotary_emb(hidden, position_ids=batch.position), additive(batch)
        text = (~image).nonzero()[:, 0]
        alone = (hidden[:, text], mask[:, :, text][..., text], tuple(part[:, text] for part in rotary))
        for block in language.layers[: self.layer]:
            alone = (block(alone[0], attention_mask=alone[1], position_embeddings=alone[2]), *alone[1:])
        hidden = hidden.index_copy(1, text, alone[0].to(hidden.dtype))
        for block in language.layers[self.layer :]:
            hidden = block(hidden, attention_mask=mask, position_embeddings=rotary)
        return language.norm(hidden)


class Arms(nn.Module):
    """All entry layers, on one frozen tower."""

    def __init__(self, base: LlavaForConditionalGeneration, late: LateEntry, seed: int):
        super().__init__()
        base.requires_grad_(False)
        self.tower, self.head = base.model.vision_tower, base.lm_head
        self.arms = nn.ModuleDict()
        for layer in late.layers:
            torch.manual_seed(seed)  # every arm begins at the same additions
            self.arms[str(layer)] = Arm(base, layer, late.rank)

    def outputs(self, layer: int, batch: Batch, seen: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the weighted tokens, the tokens, their weights; as `talk.predicted`."""
        rows, targets, weights = weighted_tokens(batch)
        with autocast(recipe.device), sdpa_kernel(attention(recipe)):
            logits = self.head(self.arms[str(layer)](seen, batch)[:, :-1][rows])
        return logits.float(), targets, weights

    def seen(self, batch: Batch, recipe: Recipe) -> Tensor:
        assert batch.pixels is not None
        with torch.no_grad(), autocast(recipe.device):
            return self.tower(normalised(batch.pixels), output_hidden_states=True).hidden_states[-2][:, 1:]


def train_arms(late: LateEntry, seed: int, folder: Path, stop_after: int | None = None) -> Arms:
    """One seed: its pictures, and its first additions."""
    recipe = late.recipe(seed)
    encoder = Encoder(AutoTokenizer.from_pretrained(HOME))
    seed_everything(seed)
    base = shipped().to(recipe.device)
    quick_attention(base, recipe)
    model = Arms(base, late, seed).to(recipe.device)

    def loss(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        batch = batch.to(recipe.device)
        seen = model.seen(batch, recipe)
        found = {layer: weighted_loss(*model.outputs(layer, batch, seen, recipe)) for layer in late.layers}
        return sum(found.values(), torch.zeros(())), {f"L{layer}": value.item() for layer, value in found.items()}

    def measured() -> dict[str, float]:
        return {
            f"L{layer}/{kind}": share
            for layer in late.layers
            for kind, share in heldout(
                lambda batch, layer=layer: model.outputs(layer, batch, model.seen(batch, recipe), recipe),
                recipe,
                "tuning",
                encoder,
            ).items()
        }

    train(
        f"entry_seed{seed}",
        model,
        recipe.tuning,
        optimisers(model, recipe.tuning),
        batches(recipe, "tuning", recipe.tuning, encoder),
        loss,
        measured,
        folder,
        stop_after,
        clipped=list(model.arms.values()),
    )
    return model


def written(model: Arms, late: LateEntry, seed: int, home: Path) -> None:
    """One small file per arm: the projector, and the two factors of every addition, in fp16."""
    home.mkdir(parents=True, exist_ok=True)
    base = fingerprint(shipped().model.multi_modal_projector)
    for arm in model.arms.values():
        tensors = {f"projector.{name}": value for name, value in arm.projector.state_dict().items()}
        for path, module in arm.language.named_modules():
            if parametrize.is_parametrized(module, "weight"):
                addition = module.parametrizations.weight[0]
                tensors |= {f"language.{path}.down": addition.down.data, f"language.{path}.up": addition.up.data}
        facts = {"layer": arm.layer, "seed": seed, "steps": late.stage.steps, "rank": late.rank, "base": base}
        file = home / f"entry{arm.layer}_seed{seed}.safetensors"
        save_file(
            {name: value.detach().cpu().half().contiguous() for name, value in tensors.items()},
            file,
            metadata={key: str(value) for key, value in facts.items()},
        )
        file.chmod(0o644)  # safetensors writes for its owner alone


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.entry", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, action="append", help="only this one (repeatable)")
    parser.add_argument("--folder", type=Path, default=Path(".training") / "entry", help="checkpoints and logs")
    parser.add_argument("--threads", type=int, default=LATE_ENTRY.start.threads)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for seed in arguments.seed or range(LATE_ENTRY.seeds):
        model = train_arms(LATE_ENTRY, seed, arguments.folder)
        written(model, LATE_ENTRY, seed, HOME / FOLDER)
        log = [json.loads(line) for line in (arguments.folder / f"entry_seed{seed}.jsonl").read_text().splitlines()]
        (HOME / FOLDER / f"training_seed{seed}.json").write_text(json.dumps(log, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
