"""Put the parts together as a stock Hugging Face folder that ships in the package."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from training.recipe import ASSISTANT, SYSTEM, USER, Recipe
from training.shipped import HOME
from training.talk import assembled
from training.tower import HEADS, keep_heads

STAGES = ("tower", "language", "alignment", "tuning")
PARTS = "weights-[0-9][0-9]-of-[0-9][0-9]"
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
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

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


def curve(folder: Path, stage: str) -> dict[str, Any]:
    """How long a stage has learned, and its log."""
    state = torch.load(folder / f"{stage}.pt", weights_only=True, map_location="cpu")
    return {"steps": state["step"], "seconds": round(state["seconds"]), "log": state["log"]}


def logs(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Settings, every stage's curve with its held-out measurements, and what was changed on the way."""
    stages = {stage: curve(folder, stage) for stage in STAGES if getattr(recipe, stage).steps}
    history = folder / "history.json"  # what a person changed while a stage ran; absent if nothing was
    return {
        "recipe": dataclasses.asdict(recipe),
        "torch": torch.__version__.split("+")[0],
        "stages": stages,
        "history": json.loads(history.read_text()) if history.exists() else [],
    }


def continued(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The log of an onward training behind the log of what it went on from: one curve per stage."""
    stages = dict(before["stages"])
    history = list(before["history"])
    for stage, run in now["stages"].items():
        past = before["stages"][stage]
        already = {"step": past["steps"], "samples": past["log"][-1]["samples"], "seconds": past["seconds"]}
        log = [{**entry, **{key: entry[key] + more for key, more in already.items()}} for entry in run["log"]]
        stages[stage] = {
            "steps": past["steps"] + run["steps"],
            "seconds": past["seconds"] + run["seconds"],
            "log": past["log"] + log,
        }
        history.append(
            {
                "stage": stage,
                "step": past["steps"],
                "further": True,
                "change": f"a further training (recipe {now['recipe']['name']}) of {run['steps']:,} steps from the "
                "weights that shipped until then, with a fresh optimiser and new pictures",
            }
        )
        history += [{**e, "step": e["step"] + past["steps"]} for e in now["history"] if e["stage"] == stage]
    return {**before, **now, "stages": stages, "history": history}


def record(recipe: Recipe, folder: Path, home: Path = HOME) -> None:
    """Put the curves of an experiment into the log that ships, one entry per stage; its weights are not kept."""
    file = home / "training.json"
    log = json.loads(file.read_text())
    stages = [name for name in STAGES if getattr(recipe, name).steps]
    curves = {stage: curve(folder, stage) for stage in stages if (folder / f"{stage}.pt").exists()}
    if not curves:
        raise FileNotFoundError(f"no stage in {folder}: run `python -m training --recipe {recipe.name}` first")
    for stage, found in curves.items():
        name = recipe.name if len(curves) == 1 else f"{recipe.name}_{stage}"
        log.setdefault("experiments", {})[name] = {"stage": stage, **found}
    measured = folder / "miniature.json"  # what the card's notebook found of its weights; absent if nobody asked
    if measured.exists():
        numbers = json.loads(measured.read_text())["numbers"].items()
        bars = {name.removesuffix(" miniature"): value for name, value in numbers if name.endswith(" miniature")}
        log["experiments"][name]["answers"] = bars
    file.write_text(json.dumps(log, separators=(",", ":")) + "\n")
    print(f"recorded {recipe.name} in {file.name}")


def ship(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path, home: Path = HOME) -> None:
    """Write the folder that ships; an experiment adds its log to it and nothing else.

    Into a folder that holds no miniature yet an experiment is written whole, to be measured beside the one that ships.
    """
    if recipe.experiment and (home / "training.json").exists():
        return record(recipe, folder, home)
    model = assembled(recipe, tokenizer, folder)
    model.set_attn_implementation("sdpa")
    log = logs(recipe, folder)
    if recipe.onward:
        kept = folder / "before.json"  # of what this training began at, in case it is shipped twice
        if not kept.exists():
            shutil.copy(HOME / "training.json", kept)
        log = continued(json.loads(kept.read_text()), log)
    written(model, recipe, tokenizer, home)
    if recipe.tower.steps:
        heads = HEADS if home == HOME else home / HEADS.name
        keep_heads(torch.load(folder / "tower.pt", weights_only=True, map_location="cpu")["module"], heads)
    (home / "training.json").write_text(json.dumps(log, separators=(",", ":")) + "\n")
    (home / "model.safetensors").chmod(0o644)
    size = sum(file.stat().st_size for file in home.iterdir()) / 1e6
    print(f"shipped {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {size:.1f} MB")


def packed(folder: Path, out: Path, part: int = 15_000_000) -> list[Path]:
    """Weights (fp16) and logs of the stages done so far, in files of at most `part` bytes: what comes home from a GPU.

    Optimisers stay behind, and so do weights that a later stage holds too. `unpacked` puts the parts together.
    """
    files = {stage: file for stage in STAGES if (file := folder / f"{stage}.pt").exists()}
    if not files:
        raise FileNotFoundError(f"no stage in {folder}: there is nothing to pack")
    whole = [stage for stage in files if stage in ("alignment", "tuning")]
    home: dict[str, Any] = {}
    for stage, file in files.items():
        state = torch.load(file, weights_only=True, map_location="cpu")
        module = state["module"]
        if whole and stage != whole[-1]:  # the heads of the tower are nowhere else
            module = {name: value for name, value in module.items() if stage == "tower" and "vision." not in name}
        half = {name: value.half() if value.is_floating_point() else value for name, value in module.items()}
        home[stage] = {"module": half, **{key: state[key] for key in ("step", "seconds", "log")}}
    blob = io.BytesIO()
    torch.save(home, blob)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(PARTS):
        old.unlink()
    data = blob.getbuffer()
    count = -(-len(data) // part)
    made = [out / f"weights-{number + 1:02d}-of-{count:02d}" for number in range(count)]
    for number, file in enumerate(made):
        file.write_bytes(data[number * part : (number + 1) * part])
    log = out / "log.json"
    log.write_text(json.dumps({stage: found["log"] for stage, found in home.items()}, separators=(",", ":")) + "\n")
    return [*made, log]


def unpacked(source: Path, folder: Path) -> None:
    """Put what `packed` wrote into a folder from which stage "ship" ships."""
    parts = sorted(source.glob(PARTS))
    if not parts or len(parts) != int(parts[0].name[-2:]):
        raise FileNotFoundError(f"{len(parts)} files {PARTS} in {source}, not all: pass the folder that --out named")
    home = torch.load(io.BytesIO(b"".join(part.read_bytes() for part in parts)), weights_only=True)
    folder.mkdir(parents=True, exist_ok=True)
    for stage, state in home.items():
        if (folder / f"{stage}.pt").exists():
            raise FileExistsError(f"{folder} holds a training already: unpack into another --folder")
        torch.save(state, folder / f"{stage}.pt")
