"""A random LLaVA, small enough to build in a test: stock classes, own byte-level BPE, saved like any checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

CHAT_TEMPLATE = (
    "{{ bos_token }}A chat between a user and an assistant. {% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {{ message['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEXT = "a red dog and a blue cat on the green grass . what is in the picture ? how many are there ? two three four " * 4


def save_tiny_llava(folder: Path, tied: bool = False, specials_first: bool = True) -> Path:
    """Write a checkpoint folder that `AutoProcessor` and `AutoModelForImageTextToText` load offline.

    Weights are larger than the usual init, so that pictures matter, answers differ and near ties are rare.
    The embedding has seven rows more than the tokenizer has tokens, as released checkpoints do.
    """
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    specials = ["<unk>", "<s>", "</s>"] + (["<pad>", "<image>"] if specials_first else [])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    letters = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    bpe.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=340, special_tokens=specials, **letters))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    extra = {"image_token": "<image>"}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=bpe, **named, extra_special_tokens=extra)
    side = {"height": 56, "width": 56}
    images = LlavaImageProcessorPil(do_pad=True, do_center_crop=False, size=side, crop_size=side)
    seen = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = hf.LlavaProcessor(images, tokenizer, **seen, chat_template=CHAT_TEMPLATE)
    tower = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": len(tokenizer) + 7, **ids}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**tower, image_size=56, patch_size=14),
        text_config=hf.LlamaConfig(**text, tie_word_embeddings=tied),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.02)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)  # unequal gains: norming twice must show
            if "vision_tower" in name and name.endswith(("out_proj.weight", "fc2.weight")):
                parameter.mul_(0.2)  # layers add to a patch what it is not drowned by, as in trained towers
        # A picture's own content over the tower's constant parts, as trained towers have it.
        model.model.vision_tower.embeddings.patch_embedding.weight.mul_(4)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
