"""Put the parts together as a stock Hugging Face folder that ships in the package."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from training.recipe import ASSISTANT, SYSTEM, USER, Recipe
from training.shipped import HOME
from training.talk import assembled

# Roles and contents as in LLaVA-1.5; the tokenizer adds <s>. jinja's trim_blocks would eat a bare newline.
TEMPLATE = (
    SYSTEM
    + "{% for message in messages %}"
    + "{% if message['role'] == 'user' %}"
    + USER
    + "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    + "{% for part in message['content'] if part['type'] == 'text' %}{{ '\\n' + part['text'] }}{% endfor %}"
    + "{% else %}"
    + ASSISTANT
    + " {% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>"
    + "{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}"
    + ASSISTANT
    + "{% endif %}"
)


def processor_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Pads to a square with the mean colour, as LLaVA-1.5 does, then resizes and normalises."""
    size = {"height": recipe.image_size, "width": recipe.image_size}
    images = LlavaImageProcessorPil(
        do_pad=True,
        do_resize=True,
        size={"shortest_edge": recipe.image_size},
        do_center_crop=True,
        crop_size=size,
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=recipe.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )


def written(
    model: LlavaForConditionalGeneration, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, home: Path
) -> None:
    """Save model (fp16), processor, tokenizer and chat template to a folder."""
    home.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=16, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model.half().save_pretrained(home)
    processor_of(recipe, tokenizer).save_pretrained(home)


def logs(recipe: Recipe, folder: Path) -> dict[str, object]:
    """Settings, every stage's curve with its held-out measurements, and what was changed on the way."""
    import dataclasses

    stages = {}
    for stage in ("tower", "language", "alignment", "tuning"):
        state = torch.load(folder / f"{stage}.pt", weights_only=True, map_location="cpu")
        stages[stage] = {"steps": state["step"], "seconds": round(state["seconds"]), "log": state["log"]}
    history = folder / "history.json"  # what a person changed while a stage ran; absent if nothing was
    return {
        "recipe": dataclasses.asdict(recipe),
        "torch": torch.__version__.split("+")[0],
        "stages": stages,
        "history": json.loads(history.read_text()) if history.exists() else [],
    }


def ship(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path, home: Path = HOME) -> None:
    model = assembled(recipe, tokenizer, folder)
    model.set_attn_implementation("sdpa")
    written(model, recipe, tokenizer, home)
    (home / "training.json").write_text(json.dumps(logs(recipe, folder), separators=(",", ":")) + "\n")
    (home / "model.safetensors").chmod(0o644)
    size = sum(file.stat().st_size for file in home.iterdir()) / 1e6
    print(f"shipped {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {size:.1f} MB")
