"""Random checkpoints of every family: stock classes made small, saved as the released repositories are laid out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import embedlens

TALK = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {{ message['content'][0]['text'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PADDED_ROWS = 7


def tokenizer(**specials: str) -> Any:
    """The shipped miniature's words, with a family's own special tokens behind them."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(Path(embedlens.__file__).parent / "miniature" / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=specials,
    )


def text_sizes(words: Any, layers: int = 3) -> dict[str, Any]:
    return {
        "vocab_size": len(words) + PADDED_ROWS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


#: Ends of the names of matrices through which a layer of a vision tower adds to its patches.
WRITERS = ("out_proj.weight", "fc2.weight", "attn.proj.weight", "down_proj.weight", "projection_layer.weight")
TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def save(folder: Path, model: Any, words: Any, images: Any, kind: str, template: str, **processor: Any) -> Path:
    """A folder as on the hub: weights, tokenizer, preprocessor_config.json, processor_config.json, chat template.

    Args:
        kind: `image_processor_type` as released repositories write it.
        processor: what else processor_config.json says.
    """
    randomise(model)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    images.save_pretrained(folder)
    config = folder / "preprocessor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_processor_type": kind}))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(template)
    return folder


@torch.no_grad()
def randomise(model: Any, seed: int = 0) -> None:
    """Weights larger than the usual init, so that pictures matter and answers differ; patches stay local in the tower.

    A picture's own content lies over the tower's constant parts, and layers add to a patch what it is not drowned by,
    as trained towers have it; norms have unequal gains, so that norming twice shows. Nothing is left as the
    constructor drew it: that depends on what ran before.
    """
    torch.manual_seed(seed)
    own = torch.Generator().manual_seed(seed)  # of single vectors, so that all other weights stay what they are
    for name, parameter in model.named_parameters():
        tower = "vision_tower" in name or "visual." in name
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.02)
        elif "norm" in name or "ln_q" in name:
            parameter.uniform_(0.5, 1.5)
        elif "lambda" not in name:  # newlines and class tokens; the gains of a tower's layers are one constant
            parameter.normal_(0, parameter.numel() ** -0.5, generator=own)
        if tower and name.endswith(WRITERS) and "patch_embed" not in name:
            parameter.mul_(0.1)
        if tower and "patch_embed" in name and parameter.ndim > 1:
            parameter.mul_(4)
        if tower and ("position_embed" in name or "pos_embed" in name or name.endswith("cls_token")):
            parameter.mul_(0.2)


def save_llava_next(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    words, pinpoints = tokenizer(image_token="<image>"), [[56, 112], [112, 56], [112, 112], [168, 56]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=56, patch_size=14),
        text_config=LlamaConfig(**text_sizes(words)),
        image_token_index=words.image_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
    )
    return save(
        folder,
        LlavaNextForConditionalGeneration(config),
        words,
        images,
        "LlavaNextImageProcessor",
        TALK.replace("IMAGE", "<image>"),
        processor_class="LlavaNextProcessor",
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def save_llava_onevision(folder: Path) -> Path:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    words = tokenizer(image_token="<image>", video_token="<video>")
    pinpoints = [[32 * rows, 32 * cols] for rows in range(1, 4) for cols in range(1, 4)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, image_size=32, patch_size=10, vision_use_head=False),
        text_config=Qwen2Config(**text_sizes(words)),
        image_token_index=words.image_token_id,
        video_token_index=words.video_token_id,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_4",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints)
    return save(
        folder,
        LlavaOnevisionForConditionalGeneration(config),
        words,
        images,
        "LlavaOnevisionImageProcessor",
        TALK.replace("IMAGE", "<image>"),
        processor_class="LlavaOnevisionProcessor",
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
    )


QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
QWEN |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}


def save_qwen2_5_vl(folder: Path) -> Path:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = tokenizer(**QWEN)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "window_size": 56,  # 2x2 tokens
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
        },
        text_config=text_sizes(words)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        vision_start_token_id=words.vision_start_token_id,
        vision_end_token_id=words.vision_end_token_id,
        tie_word_embeddings=False,
    )
    return save(
        folder,
        Qwen2_5_VLForConditionalGeneration(config),
        words,
        Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}),
        "Qwen2VLImageProcessor",
        TALK.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
        processor_class="Qwen2_5_VLProcessor",
    )


def save_qwen3_vl(folder: Path) -> Path:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = tokenizer(**QWEN)
    config = Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config=text_sizes(words, layers=4)
        | {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        vision_start_token_id=words.vision_start_token_id,
        vision_end_token_id=words.vision_end_token_id,
        tie_word_embeddings=False,
    )
    return save(
        folder,
        Qwen3VLForConditionalGeneration(config),
        words,
        Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 16 * 16 * 64}),
        "Qwen2VLImageProcessorFast",
        TALK.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
        processor_class="Qwen3VLProcessor",
    )


def save_internvl(folder: Path) -> Path:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    words = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        vision_config=TOWER | {"image_size": [56, 56], "patch_size": [7, 7]},
        text_config=Qwen2Config(**text_sizes(words)),
        image_token_id=words.context_image_token_id,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return save(
        folder,
        InternVLForConditionalGeneration(config),
        words,
        GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, crop_to_patches=False, max_patches=6),
        "GotOcr2ImageProcessorFast",
        TALK.replace("IMAGE", "<IMG_CONTEXT>"),
        processor_class="InternVLProcessor",
        image_seq_length=16,
    )


#: Name → (how it is saved, name of its stock processor, picture sizes of different grids).
FAMILIES = {
    "llava_next": (save_llava_next, "LlavaNextProcessor", [(112, 112), (200, 90), (80, 150)]),
    "llava_onevision": (save_llava_onevision, "LlavaOnevisionProcessor", [(60, 62), (95, 64), (90, 94), (31, 33)]),
    "qwen2_5_vl": (save_qwen2_5_vl, "Qwen2_5_VLProcessor", [(112, 84), (60, 150), (170, 120)]),
    "qwen3_vl": (save_qwen3_vl, "Qwen3VLProcessor", [(80, 66), (37, 110), (100, 33)]),
    "internvl": (save_internvl, "InternVLProcessor", [(60, 60), (120, 50), (70, 110)]),
}
