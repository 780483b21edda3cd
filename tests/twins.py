"""A small random twin of each checkpoint that `embedlens models` names, laid out as its repository on the Hub.

Facts that break code are kept as published: class and processor names, fields that are there and that are missing,
legacy names of weights, special tokens with their order and how many rows the embedding has beside them, chat formats,
generation configs, the traps in vocabularies. Sizes are small, so ids are; what an id is relative to is kept.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import embedlens

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]
PIXELS = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3}
PIXELS |= {"rescale_factor": 0.00392156862745098, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
CLIP = TOWER | {"image_size": 56, "model_type": "clip_vision_model", "patch_size": 14, "projection_dim": 8}
CLIP |= {"vocab_size": 32000}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 4096}
LEGACY = {r"^vision_tower\.(?!vision_model)": "vision_tower.vision_model."}

# --- chat formats, as published but for tools, videos and turns of the assistant ------------------------------------

VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{' [/INST]' }}{% endif %}{% endfor %}"
)
ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN2_5 = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + QWEN3
INTERNVL = QWEN3.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n")
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# --- vocabularies ----------------------------------------------------------------------------------------------------

CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_TOKENS = [
    *CHAT,
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]
QWEN3_TOKENS = [*QWEN_TOKENS, "<tool_response>", "</tool_response>", "<think>", "</think>"]
INTERNVL_TOKENS = [*QWEN_TOKENS, "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>"]
INTERNVL_TOKENS += ["<box>", "</box>", "<video>"]
SMOLVLM_TOKENS = ["<global-img>", *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7))]
SMOLVLM_TOKENS += ["<fake_token_around_image>", "<image>", "<|reserved_special_token_0|>", "<end_of_utterance>"]
ORDINARY = {token for token in QWEN3_TOKENS if re.fullmatch(r"</?(tool_\w+|think)>|<\|(fim|repo|file)\w+\|>", token)}


@cache
def lines() -> tuple[str, ...]:
    """The words that the miniature knows, as often as it takes to be one entry each."""
    known = Path(embedlens.__file__).parent / "miniature" / "tokenizer.json"
    pieces = json.loads(known.read_text(encoding="utf-8"))["model"]["vocab"]
    words = [piece[1:] for piece in pieces if piece.startswith("Ġ") and piece[1:].isalpha()]
    return tuple(f"{word} " * 3 for word in [*words, "A", "The", "An", "a", "the", "an", "USER", "ASSISTANT", "ĠĠ"])


@cache
def sentencepiece(with_byte_letter: bool) -> str:
    """tokenizer.json of LLaMA: ▁ begins words, bytes are <0x..>, single letters come last, "Ġ" among them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trained.train_from_iterator(lines(), trainers.BpeTrainer(vocab_size=1500, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    letters = [piece for piece in model["vocab"] if len(piece) == 1 and piece != "Ġ"] + ["Ġ"] * with_byte_letter
    letters += [letter for letter in "犬.,?:[]/0123456789" if letter not in letters]
    longer = [piece for piece in model["vocab"] if len(piece) > 1 and "Ġ" not in piece]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *longer, *letters]
    merges = [tuple(pair) for pair in model["merges"] if "Ġ" not in "".join(pair)]
    made = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )  # fmt: skip
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>", "<image>", "<pad>"])
    return made.to_str()


@cache
def byte_level(tokens: tuple[str, ...], first: tuple[str, ...] = ()) -> str:
    """tokenizer.json of Qwen: GPT-2's bytes, special tokens behind them; of SmolLM2: single digits, some before."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if first:
        digits = pre_tokenizers.Digits(individual_digits=True)
        made.pre_tokenizer = pre_tokenizers.Sequence([digits, made.pre_tokenizer])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [f" {line}" for line in lines()]
    options = {"vocab_size": 1500, "initial_alphabet": alphabet, "show_progress": False}
    made.train_from_iterator(text, trainers.BpeTrainer(**options, special_tokens=list(first)))
    made.add_tokens([AddedToken(token, special=token not in ORDINARY, normalized=False) for token in tokens])
    return made.to_str()


LLAMA_WORDS = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
LLAMA_WORDS |= {"unk_token": "<unk>", "pad_token": "<pad>", "extra_special_tokens": {"image_token": "<image>"}}
LLAMA_WORDS |= {"image_token": "<image>", "padding_side": "left", "legacy": False, "add_prefix_space": None}
QWEN_WORDS = {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_prefix_space": False}
SMOLLM_WORDS = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "bos_token": "<|im_start|>"}
SMOLLM_WORDS |= {"eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
SMOLLM_WORDS |= {"truncation_side": "left", "model_max_length": 8192, "processor_class": "Idefics3Processor"}
SMOLLM_WORDS |= {"additional_special_tokens": ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]}
QWEN_WORDS |= {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Twin:
    """Facts of a repository. In configs "<token>" stands for its id, "rows" for the number of embedding rows."""

    processor: str
    config: dict[str, Any]
    pixels: dict[str, Any]
    """preprocessor_config.json"""
    words: dict[str, Any]
    """tokenizer_config.json"""
    tokens: tuple[str, ...]
    """Added tokens behind the vocabulary; () for LLaMA's."""
    rows: int
    """Rows of the embedding beyond the highest id."""
    template: str
    generation: dict[str, Any]
    sizes: tuple[tuple[int, int], ...]
    """Pictures of different grids, (width, height) px."""
    said: dict[str, Any] = field(default_factory=dict)
    """processor_config.json"""
    renamed: dict[str, str] = field(default_factory=dict)
    """Weights whose names today's transformers does not write as the repository has them."""
    template_file: str = "chat_template.jinja"
    first: tuple[str, ...] = ()
    """Special tokens before the vocabulary."""
    byte_letter: bool = True
    """Whether a SentencePiece vocabulary has the letter "Ġ"."""
    dtype: torch.dtype = torch.bfloat16


# fmt: off
SPECIALS = {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"}
LLAVA = Twin(
    processor="LlavaProcessor",
    config={
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": "<image>",
        "model_type": "llava", "pad_token_id": "<pad>", "projector_hidden_act": "gelu",
        "text_config": TEXT | {"model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": "rows"},
        "tie_word_embeddings": False, "torch_dtype": "float16", "vision_config": CLIP, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "vocab_size": "rows",
    },
    pixels=PIXELS
    | {
        "crop_size": {"height": 56, "width": 56}, "do_center_crop": True, "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor", "size": {"shortest_edge": 56},
    },
    words=LLAMA_WORDS | {"processor_class": "LlavaProcessor"},
    tokens=(),
    rows=62,  # 32064 rows, <pad> is 32001
    template=VICUNA,
    generation=SPECIALS | {"_from_model_config": True},
    sizes=((56, 56), (112, 70), (70, 112)),  # a patch of bar alone beside a whole one would norm up what seeps in
    said={
        "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14,
        "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default",
    },
    renamed=LEGACY, dtype=torch.float16,
)
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
VICUNA_NEXT = replace(
    LLAVA,
    processor="LlavaNextProcessor",
    config=LLAVA.config
    | {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
        "image_grid_pinpoints": PINPOINTS, "use_image_newline_parameter": True,
    },
    pixels=LLAVA.pixels
    | {
        "aspect_ratio_setting": "anyres", "do_pad": True, "image_grid_pinpoints": PINPOINTS,
        "image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor",
    },
    words=LLAMA_WORDS | {"processor_class": "LlavaNextProcessor"},
    sizes=((112, 112), (200, 90), (80, 150)),
    said=LLAVA.said | {"processor_class": "LlavaNextProcessor"},
)
MISTRAL_TEXT = TEXT | {"model_type": "mistral", "rms_norm_eps": 1e-05, "sliding_window": None, "vocab_size": "rows"}
VIEWS = [[32 * rows, 32 * cols] for rows in range(1, 4) for cols in range(1, 4)]
QWEN_TEXT = TEXT | {"model_type": "qwen2", "vocab_size": "rows", "rms_norm_eps": 1e-06, "use_sliding_window": False}
QWEN_ENDS = {"bos_token_id": "<|endoftext|>", "eos_token_id": ["<|im_end|>", "<|endoftext|>"]}
QWEN_ENDS |= {"pad_token_id": "<|endoftext|>", "do_sample": True}
ONEVISION_TWIN = Twin(
    processor="LlavaOnevisionProcessor",
    config={
        "architectures": ["LlavaOnevisionForConditionalGeneration"], "image_grid_pinpoints": VIEWS,
        "image_token_index": "<image>", "model_type": "llava_onevision", "projector_hidden_act": "gelu",
        "text_config": QWEN_TEXT | {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"},
        "tie_word_embeddings": False, "torch_dtype": "float16", "use_image_newline_parameter": True,
        "video_token_index": "<video>", "vision_aspect_ratio": "anyres_max_9",
        "vision_config": TOWER
        | {"image_size": 32, "model_type": "siglip_vision_model", "patch_size": 10, "vision_use_head": False},
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    },
    pixels=PIXELS
    | {
        "do_pad": True, "image_grid_pinpoints": VIEWS, "image_mean": HALF,
        "image_processor_type": "LlavaOnevisionImageProcessor", "image_std": HALF,
        "processor_class": "LlavaOnevisionProcessor", "size": {"height": 32, "width": 32},
    },
    words=QWEN_WORDS | {"processor_class": "LlavaOnevisionProcessor"},
    tokens=(*CHAT, "<image>", "<video>"),
    rows=352,  # 152000 rows, <video> is 151647
    template=ONEVISION,
    generation=QWEN_ENDS | {"repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    sizes=((60, 62), (95, 64), (90, 94), (31, 33)),
    said={
        "image_token": "<image>", "num_image_tokens": 9, "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>", "vision_aspect_ratio": "anyres_max_9", "vision_feature_select_strategy": "full",
    },
    renamed=LEGACY, dtype=torch.float16,
)
QWEN_IDS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
QWEN_IDS |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
QWEN2_5_VL = Twin(
    processor="Qwen2_5_VLProcessor",
    config=TEXT  # flat: no text_config
    | QWEN_IDS
    | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "bos_token_id": "<|endoftext|>",
        "eos_token_id": "<|im_end|>", "hidden_act": "silu", "model_type": "qwen2_5_vl", "rms_norm_eps": 1e-06,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
        "vision_config": {
            "depth": 3, "fullatt_block_indexes": [1], "hidden_act": "silu", "hidden_size": 24, "in_chans": 3,
            "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "temporal_patch_size": 2, "tokens_per_second": 2, "window_size": 56,
        },
        "vision_token_id": "<|vision_pad|>", "vocab_size": "rows",
    },
    pixels={
        "image_mean": CLIP_MEAN, "image_processor_type": "Qwen2VLImageProcessor", "image_std": CLIP_STD,
        "max_pixels": 28 * 28 * 64, "merge_size": 2, "min_pixels": 56 * 56, "patch_size": 14,
        "processor_class": "Qwen2_5_VLProcessor", "temporal_patch_size": 2,
    },
    words=QWEN_WORDS,
    tokens=tuple(QWEN_TOKENS),
    rows=399,  # 152064 rows, <|file_sep|> is 151664
    template=QWEN2_5, template_file="chat_template.json",
    generation=QWEN_ENDS | {"repetition_penalty": 1.05, "temperature": 0.000001},
    sizes=((112, 84), (60, 150), (170, 120)),
)
QWEN3_VL = Twin(
    processor="Qwen3VLProcessor",
    config=QWEN_IDS
    | {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl",
        "text_config": TEXT
        | {
            "attention_bias": False, "bos_token_id": "<|endoftext|>", "dtype": "bfloat16", "eos_token_id": "<|im_end|>",
            "head_dim": 8, "hidden_act": "silu", "model_type": "qwen3_vl_text", "num_hidden_layers": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default"},
            "rope_theta": 5000000, "vocab_size": "rows",
        },
        "tie_word_embeddings": False,
        "vision_config": {
            "deepstack_visual_indexes": [0, 1], "depth": 3, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 24,
            "in_channels": 3, "intermediate_size": 48, "model_type": "qwen3_vl", "num_heads": 2,
            "num_position_embeddings": 16, "out_hidden_size": 32, "patch_size": 8, "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    pixels={
        "image_mean": HALF, "image_processor_type": "Qwen2VLImageProcessorFast", "image_std": HALF, "merge_size": 2,
        "patch_size": 8, "processor_class": "Qwen3VLProcessor",
        "size": {"longest_edge": 16 * 16 * 64, "shortest_edge": 32 * 32}, "temporal_patch_size": 2,
    },
    words=QWEN_WORDS,
    tokens=tuple(QWEN3_TOKENS),
    rows=267,  # 151936 rows, </think> is 151668
    template=QWEN3,
    generation=QWEN_ENDS | {"repetition_penalty": 1.0, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    sizes=((80, 66), (37, 110), (100, 33)),
)
INTERNVL3 = Twin(
    processor="InternVLProcessor",
    config={  # no tie_word_embeddings
        "architectures": ["InternVLForConditionalGeneration"], "downsample_ratio": 0.5, "image_seq_length": 16,
        "image_token_id": "<IMG_CONTEXT>", "model_type": "internvl", "projector_hidden_act": "gelu",
        "text_config": QWEN_TEXT | {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"},
        "torch_dtype": "bfloat16",
        "vision_config": TOWER
        | {
            "attention_bias": True, "hidden_act": "gelu", "image_size": [56, 56], "layer_scale_init_value": 0.1,
            "model_type": "internvl_vision", "norm_type": "layer_norm", "patch_size": [7, 7],
            "use_absolute_position_embeddings": True, "use_mask_token": False, "use_mean_pooling": True,
            "use_qk_norm": False,
        },
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
    },
    pixels=PIXELS
    | {
        "crop_size": None, "crop_to_patches": False, "data_format": "channels_first", "default_to_square": True,
        "do_center_crop": None, "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "GotOcr2ImageProcessorFast", "image_std": [0.229, 0.224, 0.225], "max_patches": 6,
        "min_patches": 1, "processor_class": "InternVLProcessor", "size": {"height": 56, "width": 56},
    },
    words=QWEN_WORDS
    | {
        "context_image_token": "<IMG_CONTEXT>", "end_image_token": "</img>", "start_image_token": "<img>",
        "video_token": "<video>",
        "extra_special_tokens": {
            "context_image_token": "<IMG_CONTEXT>", "end_image_token": "</img>", "start_image_token": "<img>",
            "video_token": "<video>",
        },
        "processor_class": "InternVLProcessor",
    },
    tokens=tuple(INTERNVL_TOKENS),
    rows=-1,  # 151674 rows, <video> is 151674
    template=INTERNVL,
    generation={"_from_model_config": True, "eos_token_id": "<|im_end|>", "pad_token_id": "<|endoftext|>"},
    sizes=((60, 60), (120, 50), (70, 110)),
    said={"image_seq_length": 16, "processor_class": "InternVLProcessor"},
)
SMOL = Twin(
    processor="Idefics3Processor",
    config={  # no id of an end in text_config, and the outer pad_token_id is beyond the vocabulary
        "architectures": ["Idefics3ForConditionalGeneration"], "image_token_id": "<image>", "model_type": "idefics3",
        "pad_token_id": 128002, "scale_factor": 4,
        "text_config": TEXT
        | {
            "_flash_attn_2_enabled": True, "architectures": ["VLlama3ForCausalLM"], "head_dim": 8, "hidden_act": "silu",
            "is_llama_config": True, "model_type": "llama", "neftune_noise_alpha": 0.0, "pad_token_id": "<|im_end|>",
            "pixel_shuffle_factor": 4, "qk_layer_norms": False, "rms_norm_eps": 1e-05, "rope_interleaved": False,
            "rope_theta": 100000, "use_resampler": False, "vocab_size": "rows",
        },
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "vision_config": TOWER
        | {
            "image_size": 64, "max_image_size": {"longest_edge": 64}, "model_type": "idefics3", "patch_size": 4,
            "size": {"longest_edge": 128}, "tie_word_embeddings": False, "use_base_siglip": False,
        },
        "vocab_size": "rows",
    },
    pixels=PIXELS
    | {
        "do_image_splitting": True, "do_pad": True, "image_mean": HALF,
        "image_processor_type": "Idefics3ImageProcessor", "image_std": HALF, "max_image_size": {"longest_edge": 64},
        "processor_class": "Idefics3Processor", "resample": 1, "size": {"longest_edge": 128},
    },
    words=SMOLLM_WORDS,
    tokens=tuple(SMOLVLM_TOKENS), first=tuple(CHAT),
    rows=0,  # 49280 rows, <end_of_utterance> is 49279; <|im_end|>, the pad, is 2
    template=SMOLVLM, template_file="chat_template.json",
    generation={
        "_from_model_config": True, "bos_token_id": "<|endoftext|>", "eos_token_id": "<end_of_utterance>",
        "pad_token_id": "<|im_end|>",
    },
    sizes=((120, 120), (140, 60), (50, 110)),
    said={"image_seq_len": 16, "processor_class": "Idefics3Processor"},
)
# fmt: on

#: Repository → its facts. Sizes apart, siblings of 13B, 3B and less are the same but where it says.
TWINS = {
    "llava-hf/llava-1.5-7b-hf": LLAVA,
    "llava-hf/llava-v1.6-vicuna-7b-hf": VICUNA_NEXT,
    "llava-hf/llava-v1.6-mistral-7b-hf": replace(
        VICUNA_NEXT,
        config=VICUNA_NEXT.config | {"text_config": MISTRAL_TEXT},
        template=MISTRAL,
        byte_letter=False,
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": ONEVISION_TWIN,
    "Qwen/Qwen2.5-VL-7B-Instruct": QWEN2_5_VL,
    "Qwen/Qwen3-VL-8B-Instruct": QWEN3_VL,
    "Qwen/Qwen3-VL-4B-Instruct": replace(QWEN3_VL, config=QWEN3_VL.config | {"tie_word_embeddings": True}),
    "OpenGVLab/InternVL3-8B-hf": INTERNVL3,
    "HuggingFaceTB/SmolVLM-256M-Instruct": SMOL,
}
#: One twin of each family that cuts pictures in its own way.
BY_FAMILY = {twin.config["model_type"]: name for name, twin in TWINS.items() if twin is not LLAVA}
SIBLINGS = {
    "llava-hf/llava-1.5-13b-hf": "llava-hf/llava-1.5-7b-hf",
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen/Qwen2.5-VL-7B-Instruct",
    "OpenGVLab/InternVL3-1B-hf": "OpenGVLab/InternVL3-8B-hf",
    "HuggingFaceTB/SmolVLM-500M-Instruct": "HuggingFaceTB/SmolVLM-256M-Instruct",
}


#: Ends of keys of configs whose values are ids, or hold such.
NUMBERS = ("_token_id", "_token_index", "text_config", "vocab_size")
#: Ends of the names of matrices through which a layer of a vision tower adds to its patches.
WRITERS = ("out_proj.weight", "fc2.weight", "attn.proj.weight", "down_proj.weight", "projection_layer.weight")


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
        tower = any(part in name for part in ("vision_tower", "vision_model", "visual."))
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


def save_twin(folder: Path, name: str) -> Path:
    """Write the twin of a repository as its files lie on the Hub; `embedlens.load` and transformers read it."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    twin = TWINS[SIBLINGS.get(name, name)]
    folder.mkdir(parents=True, exist_ok=True)
    text = byte_level(twin.tokens, twin.first) if twin.tokens else sentencepiece(twin.byte_letter)
    spelled = json.loads(text)
    ids = spelled["model"]["vocab"] | {token["content"]: token["id"] for token in spelled["added_tokens"]}
    ids["rows"] = 1 + max(ids.values()) + twin.rows

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(part) if key.endswith(NUMBERS) else value[key] for key, part in value.items()}
        return [filled(part) for part in value] if isinstance(value, list) else ids.get(value, value)

    added = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in spelled["added_tokens"]}
    template = json.dumps({"chat_template": twin.template}) if twin.template_file.endswith("json") else twin.template
    contents = {
        "config.json": filled(twin.config),
        "generation_config.json": filled(twin.generation),
        "preprocessor_config.json": twin.pixels,
        "tokenizer_config.json": twin.words | {"added_tokens_decoder": added},
        **({"processor_config.json": twin.said} if twin.said else {}),
    }
    for file, content in contents.items():
        (folder / file).write_text(json.dumps(content, indent=2))
    (folder / "tokenizer.json").write_text(text)
    (folder / twin.template_file).write_text(template)

    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    randomise(model)
    untrained = ids["rows"] - twin.rows if twin.tokens else ids["<image>"]
    with torch.no_grad():  # never said
        model.get_output_embeddings().weight[untrained:] = 0
    scratch = folder / "scratch"
    model.save_pretrained(scratch)  # in the names of the first release, but for `renamed`
    weights = {}
    for key, weight in load_file(scratch / "model.safetensors").items():
        for old, new in twin.renamed.items():
            key = re.sub(old, new, key)
        weights[key] = weight.to(twin.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()
    return folder
